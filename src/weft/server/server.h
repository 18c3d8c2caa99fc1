#pragma once
// The HTTP server: OpenAI's API in vLLM's dialect in front of an Engine.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "weft/api/openai_request.h"
#include "weft/engine/engine.h"
#include "weft/text/tokenizer.h"

namespace weft {

struct ServerOptions {
  std::string host = "127.0.0.1";  // a name or an address; all addresses of a name are listened on
  uint16_t port = 8000;            // 0: any free one
  std::string uds;                 // path of a Unix domain socket: then host and port are not used

  // Any of these opens everything but /health, /ping, /version, /load and /metrics. Empty: no key is needed.
  std::vector<std::string> api_keys;
  std::vector<std::string> served_model_names;       // at least one; the first one stands in the answers
  std::string model_root;                            // path of the model, shown by /v1/models
  std::optional<std::string> chat_template;          // Jinja text instead of the model's own template
  std::string response_role = "assistant";           // of generated chat messages
  std::vector<std::string> allowed_origins = {"*"};  // CORS; empty: none
  std::string version = "0.1.0";

  SamplingDefaults default_sampling;  // for what requests leave out
  int32_t max_logprobs = 20;          // the most alternatives per token that a request may ask for; -1: no limit
  int32_t max_n = 128;

  size_t max_header_bytes = 64 << 10;
  uint64_t max_body_bytes = 64 << 20;         // 413 above
  int64_t max_buffered_body_bytes = 1 << 30;  // of all requests that are being received; 503 above
  int max_connections = 1024;                 // 503 above

  double header_timeout_s = 30;      // from the first byte of a request to the end of its header
  double body_timeout_s = 120;       // for the whole body
  double keep_alive_timeout_s = 75;  // between two requests
  double write_timeout_s = 60;       // a client that takes nothing for so long is dropped
  double shutdown_timeout_s = 30;    // how long Stop() lets running requests go on
  int retry_after_s = 1;             // what a 503 suggests

  int io_threads = 2;
  int text_threads = 0;  // for parsing and tokenizing; 0: by the number of CPUs
};

class Server {
 public:
  // `tokenizer` may be null (--skip-tokenizer-init): then prompts are token ids and answers have no text. The engine
  // must outlive the server. Throws weft::Error when the options make no sense.
  Server(ServerOptions options, Engine& engine, std::shared_ptr<const Tokenizer> tokenizer);
  ~Server();  // Stop()s
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  // Listens and serves from threads of its own. Throws weft::Error when the address cannot be had.
  void Start();
  // Start(), then waits for SIGINT or SIGTERM (or Stop() from another thread) and drains: a second signal makes that
  // short. The engine is not shut down.
  void Run();
  // Takes no new requests, lets the running ones end for shutdown_timeout_s, then aborts them. Idempotent.
  void Stop();

  uint16_t port() const;  // the real one, from Start() on; 0 with a Unix domain socket

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace weft
