#include "weft/server/test_client.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <stdexcept>

namespace weft {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsUntil(Clock::time_point end) { return std::chrono::duration<double>(end - Clock::now()).count(); }

Clock::time_point In(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

}  // namespace

TestClient::TestClient(uint16_t port) : fd_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (::connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    throw std::runtime_error(std::string("connect: ") + std::strerror(errno));
  }
}

TestClient::TestClient(const std::string& unix_path) : fd_(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, unix_path.c_str(), sizeof(address.sun_path) - 1);
  if (::connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    throw std::runtime_error(std::string("connect: ") + std::strerror(errno));
  }
}

TestClient::~TestClient() { Close(); }

void TestClient::Close() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

void TestClient::HalfClose() { ::shutdown(fd_, SHUT_WR); }

bool TestClient::TrySend(std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t sent = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent <= 0) return false;
    bytes.remove_prefix(static_cast<size_t>(sent));
  }
  return true;
}

void TestClient::Send(std::string_view bytes) {
  if (!TrySend(bytes)) throw std::runtime_error("send: the server has closed the connection");
}

bool TestClient::More(double seconds) {
  if (ended_) return false;
  pollfd descriptor{fd_, POLLIN, 0};
  const int ready = ::poll(&descriptor, 1, std::max(0, static_cast<int>(seconds * 1000)));
  if (ready <= 0) return false;
  char bytes[65536];
  const ssize_t count = ::recv(fd_, bytes, sizeof(bytes), 0);
  if (count <= 0) {
    ended_ = true;
    return false;
  }
  buffer_.append(bytes, static_cast<size_t>(count));
  return true;
}

bool TestClient::ReadUntil(std::string_view text, double seconds) {
  const Clock::time_point end = In(seconds);
  while (buffer_.find(text) == std::string::npos) {
    if (!More(SecondsUntil(end))) return false;
  }
  return true;
}

bool TestClient::WaitClosed(double seconds) {
  const Clock::time_point end = In(seconds);
  while (More(SecondsUntil(end))) {
  }
  return ended_;
}

TestResponse TestClient::Read(double seconds) {
  const Clock::time_point end = In(seconds);
  TestResponse response;
  if (!ReadUntil("\r\n\r\n", seconds)) {
    response.closed = ended_;
    return response;
  }
  const size_t head_end = buffer_.find("\r\n\r\n");
  const std::string head = buffer_.substr(0, head_end + 2);
  buffer_.erase(0, head_end + 4);
  const int status = std::stoi(head.substr(9, 3));
  for (size_t begin = head.find("\r\n") + 2; begin < head.size();) {
    const size_t line_end = head.find("\r\n", begin);
    const size_t colon = head.find(": ", begin);
    std::string name = head.substr(begin, colon - begin);
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
    response.headers[name] = head.substr(colon + 2, line_end - colon - 2);
    begin = line_end + 2;
  }
  response.closed = response.headers.contains("connection") && response.headers["connection"] == "close";
  if (const auto length = response.headers.find("content-length"); length != response.headers.end()) {
    const size_t bytes = std::stoul(length->second);
    while (buffer_.size() < bytes) {
      if (!More(SecondsUntil(end))) return response;
    }
    response.body = buffer_.substr(0, bytes);
    buffer_.erase(0, bytes);
  } else if (response.headers.contains("transfer-encoding")) {
    size_t at = 0;  // what lies before it in the buffer is done with
    for (;;) {
      while (buffer_.find("\r\n", at) == std::string::npos) {
        if (!More(SecondsUntil(end))) return response;
      }
      const size_t line = buffer_.find("\r\n", at);
      const size_t bytes = std::stoul(buffer_.substr(at, line - at), nullptr, 16);
      while (buffer_.size() < line + 2 + bytes + 2) {
        if (!More(SecondsUntil(end))) return response;
      }
      response.body += buffer_.substr(line + 2, bytes);
      at = line + 2 + bytes + 2;
      if (bytes == 0) break;
    }
    buffer_.erase(0, at);
  } else if (status != 204 && status != 100) {
    while (More(SecondsUntil(end))) {
    }
    response.body = std::move(buffer_);
    buffer_.clear();
    response.closed = ended_;
  }
  response.status = status;  // only a whole answer has one
  return response;
}

std::string TestClient::PostText(const std::string& path, const std::string& body, const std::string& headers) {
  return "POST " + path + " HTTP/1.1\r\nHost: test\r\n" + headers +
         "Content-Type: application/json\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}

TestResponse TestClient::Get(const std::string& path, const std::string& headers) {
  Send("GET " + path + " HTTP/1.1\r\nHost: test\r\n" + headers + "\r\n");
  return Read();
}

TestResponse TestClient::Post(const std::string& path, const std::string& body, const std::string& headers) {
  Send(PostText(path, body, headers));
  return Read();
}

std::vector<std::string> EventsOf(const std::string& body) {
  std::vector<std::string> events;
  for (size_t begin = 0; begin < body.size();) {
    const size_t end = std::min(body.find("\n\n", begin), body.size());
    const std::string event = body.substr(begin, end - begin);
    events.push_back(event.starts_with("data: ") ? event.substr(6) : "malformed: " + event);
    begin = end + 2;
  }
  return events;
}

}  // namespace weft
