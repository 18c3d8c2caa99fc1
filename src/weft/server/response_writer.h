#pragma once
// What the engine puts out, as the JSON of completions and chat completions.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "weft/api/json_fields.h"
#include "weft/api/openai_request.h"
#include "weft/api/request.h"
#include "weft/text/tokenizer.h"

namespace weft {

// One API request on its way through the engine. Choice c belongs to prompt c / n.
struct Call {
  std::string id;  // "cmpl-..." or "chatcmpl-..."
  int64_t created = 0;
  std::string model;
  bool chat = false;
  GenerationRequest request;
  bool prompt_only = false;
  std::vector<std::vector<int32_t>> prompts;  // token ids
  std::vector<std::string> echo_texts;        // per prompt, with echo
  std::string role;                           // chat

  int choices() const { return static_cast<int>(prompts.size()) * request.n; }
};

// Strings for token ids, as logprobs show them.
class TokenText {
 public:
  TokenText(const Tokenizer* tokenizer, bool as_ids) : tokenizer_(tokenizer), as_ids_(as_ids) {}
  // The token decoded by itself, or "token_id:N" (when asked for, and where there is no tokenizer).
  std::string Of(int32_t token) const;
  // The token decoded by itself, or null without a tokenizer.
  Json Decoded(int32_t token) const;

 private:
  const Tokenizer* tokenizer_;
  bool as_ids_;
};

class ResponseWriter {
 public:
  virtual ~ResponseWriter() = default;

  // The body of a plain answer. `outputs`: the merged output of every choice.
  virtual std::string Whole(const std::vector<RequestOutput>& outputs) = 0;
  // Appends the server-sent events for news of one choice.
  virtual void Stream(int choice, const RequestOutput& output, std::string& events) = 0;
  // Appends the last events: usage when asked for, then [DONE].
  virtual void EndStream(std::string& events) = 0;
};

std::unique_ptr<ResponseWriter> MakeCompletionWriter(const Call& call, const Tokenizer* tokenizer);
std::unique_ptr<ResponseWriter> MakeChatWriter(const Call& call, const Tokenizer* tokenizer);

// The pieces that both writers use.
// JSON has no -inf: like vLLM, nothing below -9999 is written.
double JsonLogprob(float logprob);
Json StopReasonJson(const RequestOutput& output);
Json FinishReasonJson(const RequestOutput& output);
// null for the first token, then {"TOKEN ID": {"logprob", "rank", "decoded_token"}}.
Json PromptLogprobsJson(const RequestOutput& output, const TokenText& text);
void AppendEvent(const Json& json, std::string& events);
std::string DumpJson(const Json& json);
// The number of characters (code points) of a UTF-8 string.
int64_t CountCharacters(const std::string& text);

// Totals over the choices, a prompt counted once however many choices it has.
class UsageCounter {
 public:
  explicit UsageCounter(const Call& call);
  void Update(int choice, const RequestOutput& output);
  Json Total() const;
  Json OfChoice(int choice) const;

 private:
  const Call& call_;
  std::vector<int32_t> completion_;  // per choice
  std::vector<int32_t> cached_;      // per prompt
};

}  // namespace weft
