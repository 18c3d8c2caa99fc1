#pragma once
// What the routes do, without HTTP: bodies in, engine requests and JSON out.

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "weft/engine/engine.h"
#include "weft/server/mailbox.h"
#include "weft/server/response_writer.h"
#include "weft/server/server.h"

namespace weft {

// An API request that the engine works on. Destroying it aborts what has not ended.
class Generation {
 public:
  Generation(Engine& engine, Call api_call, std::shared_ptr<Mailbox> outputs)
      : call(std::move(api_call)), mailbox(std::move(outputs)), engine_(engine) {}
  ~Generation();
  Generation(const Generation&) = delete;
  Generation& operator=(const Generation&) = delete;

  // Ends the choices that still run: their last outputs say kAbort.
  void Abort();

  const Call call;
  const std::shared_ptr<Mailbox> mailbox;
  std::unique_ptr<ResponseWriter> writer;
  std::vector<std::string> engine_ids;  // of the choices that the engine has taken

 private:
  Engine& engine_;
};

// Thread-safe.
class Service {
 public:
  Service(const ServerOptions& options, Engine& engine, std::shared_ptr<const Tokenizer> tokenizer);

  // Reads the body, tokenizes and hands the requests to the engine. Slow for long prompts: never on an I/O thread.
  // `header_request_id`: the client's X-Request-Id or empty. `notify`: see Mailbox.
  Result<std::shared_ptr<Generation>> StartCompletion(std::string_view body, std::string_view header_request_id,
                                                      const std::function<void()>& notify);
  Result<std::shared_ptr<Generation>> StartChat(std::string_view body, std::string_view header_request_id,
                                                const std::function<void()>& notify);

  Result<std::string> Tokenize(std::string_view body);
  Result<std::string> Detokenize(std::string_view body);

  std::string Models() const;
  // A model by its name, as /v1/models/{name} shows it.
  Result<std::string> Model(const std::string& name) const;
  std::string Metrics() const;

 private:
  Result<std::string> CheckModel(const std::string& model) const;
  Result<void> NeedTokenizer(const char* param) const;
  Result<std::vector<int32_t>> RenderChat(const ChatPrompt& chat, bool add_special_tokens) const;
  std::vector<std::vector<int32_t>> EncodeBadWords(const std::vector<std::string>& words) const;
  std::vector<int32_t> Truncate(const GenerationRequest& request, std::vector<int32_t> tokens) const;
  Result<std::shared_ptr<Generation>> Start(Call call, const std::function<void()>& notify);
  Json ModelCard(const std::string& name) const;
  void WarnUnknown(const std::vector<std::string>& fields);
  std::string NewId(const char* prefix, const std::string& body_id, std::string_view header_id) const;

  const ServerOptions& options_;
  Engine& engine_;
  const std::shared_ptr<const Tokenizer> tokenizer_;
  const RequestLimits limits_;
  const int64_t started_;
  std::atomic<uint64_t> next_request_{0};
  std::mutex warned_mutex_;
  std::set<std::string> warned_;
};

}  // namespace weft
