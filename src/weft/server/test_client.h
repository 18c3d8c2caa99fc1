#pragma once
// A blocking HTTP client on plain sockets, for tests: independent of the library that the server uses, and able to send
// what no client should.

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace weft {

struct TestResponse {
  int status = 0;                              // 0: no answer (closed or timed out)
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;                            // chunks joined
  bool closed = false;                         // the server closed afterwards, or said that it would
};

class TestClient {
 public:
  explicit TestClient(uint16_t port);
  explicit TestClient(const std::string& unix_path);
  ~TestClient();
  TestClient(const TestClient&) = delete;
  TestClient& operator=(const TestClient&) = delete;

  void Send(std::string_view bytes);
  // False when the peer has closed meanwhile.
  bool TrySend(std::string_view bytes);
  TestResponse Read(double seconds = 20);
  // Reads until `text` has come; false when the connection ends or the time is over before.
  bool ReadUntil(std::string_view text, double seconds = 20);
  // Waits for the end of the connection.
  bool WaitClosed(double seconds = 20);
  void Close();
  void HalfClose();

  TestResponse Get(const std::string& path, const std::string& headers = {});
  TestResponse Post(const std::string& path, const std::string& body, const std::string& headers = {});

  static std::string PostText(const std::string& path, const std::string& body, const std::string& headers = {});

  const std::string& buffered() const { return buffer_; }

 private:
  // Appends what comes next to the buffer; false at the end or when the time is over.
  bool More(double seconds);

  int fd_ = -1;
  bool ended_ = false;
  std::string buffer_;
};

// The payloads of the `data:` lines of an event stream.
std::vector<std::string> EventsOf(const std::string& body);

}  // namespace weft
