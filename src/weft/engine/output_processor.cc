#include "weft/engine/output_processor.h"

#include <utility>

#include "weft/core/error.h"
#include "weft/scheduler/stop.h"

namespace weft {
OutputProcessor::OutputProcessor(std::string id, SamplingParams params, int64_t prompt_tokens, int64_t max_model_len,
                                 std::unique_ptr<TokenStream> stream)
    : id_(std::move(id)),
      params_(std::move(params)),
      prompt_tokens_(prompt_tokens),
      max_model_len_(max_model_len),
      stream_(std::move(stream)) {
  WEFT_CHECK(params_.stop.empty() || stream_ != nullptr);
  if (!params_.stop.empty()) matcher_.emplace(params_.stop);
  if (params_.prompt_logprobs) prompt_logprobs_.emplace(static_cast<size_t>(prompt_tokens));
}

RequestOutput OutputProcessor::Make() {
  RequestOutput output;
  output.id = id_;
  output.prompt_tokens = static_cast<int32_t>(prompt_tokens_);
  output.cached_tokens = static_cast<int32_t>(cached_tokens_);
  output.completion_tokens = static_cast<int32_t>(completion_tokens_);
  return output;
}

void OutputProcessor::KeepPromptLogprobs(int64_t first, std::vector<PositionLogprobs>&& values) {
  // They are gone once given out: a recomputation after a preemption brings them again.
  if (!prompt_logprobs_) return;
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t position = first + static_cast<int64_t>(i);
    if (position < 1 || position >= prompt_tokens_) continue;
    (*prompt_logprobs_)[static_cast<size_t>(position)] = std::move(values[i]);
  }
}

void OutputProcessor::AddText(const std::string& text, RequestOutput& output) {
  held_ += text;
  if (!matcher_) return;
  const auto match = matcher_->Push(text, completion_tokens_ > params_.min_tokens);
  if (!match) return;
  const std::string& stop = params_.stop[match->stop];
  const size_t end = held_.size() - text.size() + match->end;
  WEFT_CHECK(end >= stop.size());
  held_.resize(params_.include_stop_str_in_output ? end : end - stop.size());
  output.finish_reason = FinishReason::kStop;
  output.stop_reason = stop;
  matcher_.reset();
  stream_.reset();
}

std::optional<RequestOutput> OutputProcessor::Process(RowOutput&& row) {
  if (row.error) return End(FinishReason::kError, std::move(*row.error));
  KeepPromptLogprobs(row.first_prompt_position, std::move(row.prompt_logprobs));
  if (!row.token_id) return std::nullopt;

  const int32_t token = *row.token_id;
  ++completion_tokens_;
  RequestOutput output = Make();
  output.token_ids = {token};
  if (params_.logprobs && row.logprobs) output.logprobs.push_back(std::move(*row.logprobs));
  if (prompt_logprobs_) output.prompt_logprobs = std::exchange(prompt_logprobs_, std::nullopt);
  const auto stop = CheckStop(params_, token, completion_tokens_, prompt_tokens_ + completion_tokens_, max_model_len_);
  if (stop) {
    output.finish_reason = stop->reason;
    if (stop->stop_token_id) output.stop_reason = *stop->stop_token_id;
  }
  const bool hidden = output.finish_reason == FinishReason::kStop && !params_.include_stop_str_in_output;
  if (stream_ != nullptr && !hidden) AddText(stream_->Push(token), output);
  if (stream_ != nullptr && output.finish_reason) AddText(stream_->Flush(), output);

  if (output.finish_reason || !matcher_) {
    output.text = std::exchange(held_, {});
  } else if (const size_t ready = held_.size() - matcher_->held_bytes(); ready > 0) {
    output.text = held_.substr(0, ready);
    held_.erase(0, ready);
  }
  return output;
}

RequestOutput OutputProcessor::End(FinishReason reason, std::string error, ErrorKind kind) {
  RequestOutput output = Make();
  output.finish_reason = reason;
  output.text = std::exchange(held_, {});
  output.error = std::move(error);
  output.error_kind = kind;
  return output;
}

}  // namespace weft
