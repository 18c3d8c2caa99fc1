#pragma once
// An engine and a tokenizer for tests of the server: no model, but the same threads, streams and errors.

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "weft/engine/engine.h"
#include "weft/text/tokenizer.h"

namespace weft {

// One token a byte; 256 is BOS, 257 EOS, both written as <bos> and <eos>. The chat template is
// "<role>content</role>" for each message, then "<assistant>".
class ByteTokenizer : public Tokenizer {
 public:
  static constexpr int32_t kBos = 256;
  static constexpr int32_t kEos = 257;
  static constexpr int32_t kVocabSize = 258;

  std::vector<int32_t> Encode(std::string_view text, bool add_special_tokens) const override;
  std::string Decode(std::span<const int32_t> tokens, bool skip_special_tokens) const override;
  std::unique_ptr<TokenStream> MakeStream(bool skip_special_tokens) const override;
  Result<std::string> ApplyChatTemplate(const ChatTemplateInput& input) const override;
  bool has_chat_template() const override { return true; }
  int32_t vocab_size() const override { return kVocabSize; }
  std::string TokenString(int32_t token) const override;
  std::optional<int32_t> TokenId(std::string_view token) const override;
  std::optional<int32_t> bos_token_id() const override { return kBos; }
  std::vector<int32_t> eos_token_ids() const override { return {kEos}; }

  // Called by Encode, for tests that want a slow tokenizer.
  std::function<void(std::string_view)> on_encode;
};

// What the engine does with a request.
struct Script {
  std::string text = {};  // what is generated, byte by byte; when it is used up, EOS
  bool repeat = false;    // starts again instead of EOS
  double seconds_per_token = 0;
  int fail_after = -1;  // tokens before a kError
  bool hang = false;    // nothing comes until Abort
  int cached_tokens = 0;
};

// Runs each request on a thread of its own, by a script that the test chooses. Honours max_tokens, ignore_eos, stop
// strings (as RequestOutput promises: text that could be the beginning of one is held back), stop token ids, logprobs
// and prompt_logprobs (made up: the token stands for certain, its neighbours follow).
class FakeEngine : public Engine {
 public:
  explicit FakeEngine(std::shared_ptr<const Tokenizer> tokenizer, int64_t max_model_len = 4096);
  ~FakeEngine() override;

  Result<void> Add(EngineRequest request, OutputSink sink) override;
  void Abort(const std::string& id) override;
  EngineStats Stats() const override;
  std::string Failure() const override;
  void Shutdown(double timeout_s) override;
  int64_t max_model_len() const override { return max_model_len_; }
  int64_t vocab_size() const override { return ByteTokenizer::kVocabSize; }

  // Set before requests come. The default answers "Hello, world!".
  std::function<Script(const EngineRequest&)> script;
  std::function<Result<void>(const EngineRequest&)> on_add;  // an error refuses the request
  void SetFailure(std::string failure);

  std::vector<EngineRequest> requests() const;  // all that were added
  std::vector<std::string> aborted() const;     // running requests that were aborted
  int running() const;
  // Waits until so many running requests have been aborted; false after `seconds`.
  bool WaitAborted(size_t count, double seconds) const;

 private:
  struct Live {
    bool abort = false;
  };

  void Work(EngineRequest request, OutputSink sink, Script script, std::shared_ptr<Live> live);

  const std::shared_ptr<const Tokenizer> tokenizer_;
  const int64_t max_model_len_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::map<std::string, std::shared_ptr<Live>> live_;
  std::vector<EngineRequest> requests_;
  std::vector<std::string> aborted_;
  std::vector<std::thread> threads_;
  std::string failure_;
  EngineStats stats_;
  bool stopping_ = false;
};

}  // namespace weft
