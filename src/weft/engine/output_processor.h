#pragma once
// From sampled tokens to what the client sees: text, stop conditions, log-probabilities, counts.

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "weft/api/request.h"
#include "weft/engine/stop_matcher.h"
#include "weft/runner/step_plan.h"
#include "weft/text/tokenizer.h"

namespace weft {

// The output side of one request. Not thread-safe.
//
// The rules are vLLM's: a token that ends the request (EOS, stop_token_ids) is among the token ids, but its text is not
// in the text unless include_stop_str_in_output; EOS goes before stop ids, these before the length; a stop string
// found in the text goes before all of them. Before min_tokens tokens neither EOS nor stop ids count, and a stop string
// does not count when it ends within the first min_tokens tokens.
class OutputProcessor {
 public:
  // `stream` may be null: no text then (the request must not have stop strings).
  OutputProcessor(std::string id, SamplingParams params, int64_t prompt_tokens, int64_t max_model_len,
                  std::unique_ptr<TokenStream> stream);

  // What a step gave for this request: an output when there is one (a chunk of a prompt gives none). It has a
  // finish_reason when the request is at its end; nothing may be called after that.
  std::optional<RequestOutput> Process(RowOutput&& row);

  // The last output of a request that ends for a reason from outside: kAbort, or kError with its message. The text held
  // back until now comes along.
  RequestOutput End(FinishReason reason, std::string error = {}, ErrorKind kind = ErrorKind::kInternal);

  int64_t prompt_tokens() const { return prompt_tokens_; }
  int64_t completion_tokens() const { return completion_tokens_; }
  void set_cached_tokens(int64_t tokens) { cached_tokens_ = tokens; }
  const std::string& id() const { return id_; }
  const SamplingParams& params() const { return params_; }

 private:
  RequestOutput Make();
  void KeepPromptLogprobs(int64_t first, std::vector<PositionLogprobs>&& values);
  // Takes new text; cuts it and sets the finish when a stop string is complete.
  void AddText(const std::string& text, RequestOutput& output);

  std::string id_;
  SamplingParams params_;
  int64_t prompt_tokens_;
  int64_t max_model_len_;
  std::unique_ptr<TokenStream> stream_;
  std::optional<StopMatcher> matcher_;
  std::string held_;  // not given out yet: may be the beginning of a stop string
  std::optional<std::vector<std::optional<PositionLogprobs>>> prompt_logprobs_;
  int64_t completion_tokens_ = 0;
  int64_t cached_tokens_ = 0;
};

}  // namespace weft
