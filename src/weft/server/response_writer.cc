#include "weft/server/response_writer.h"

#include <algorithm>
#include <numeric>

namespace weft {

std::string TokenText::Of(int32_t token) const {
  if (as_ids_ || tokenizer_ == nullptr) return "token_id:" + std::to_string(token);
  return tokenizer_->Decode(std::span(&token, 1), /*skip_special_tokens=*/false);
}

Json TokenText::Decoded(int32_t token) const {
  if (tokenizer_ == nullptr) return nullptr;
  return tokenizer_->Decode(std::span(&token, 1), /*skip_special_tokens=*/false);
}

double JsonLogprob(float logprob) {
  // The negation catches NaN as well.
  return !(logprob > -9999.0f) ? -9999.0 : static_cast<double>(logprob);
}

Json StopReasonJson(const RequestOutput& output) {
  if (const auto* text = std::get_if<std::string>(&output.stop_reason)) return *text;
  if (const auto* token = std::get_if<int32_t>(&output.stop_reason)) return *token;
  return nullptr;
}

Json FinishReasonJson(const RequestOutput& output) {
  if (!output.finish_reason) return nullptr;
  return NameOf(*output.finish_reason);
}

Json PromptLogprobsJson(const RequestOutput& output, const TokenText& text) {
  if (!output.prompt_logprobs) return nullptr;
  Json list = Json::array();
  for (const std::optional<PositionLogprobs>& position : *output.prompt_logprobs) {
    if (!position) {
      list.push_back(nullptr);
      continue;
    }
    Json entry = Json::object();
    const auto add = [&](const TokenLogprob& token) {
      Json value;
      value["logprob"] = JsonLogprob(token.logprob);
      value["rank"] = token.rank;
      value["decoded_token"] = text.Decoded(token.token);
      AppendMember(entry, std::to_string(token.token), std::move(value));
    };
    add(position->chosen);
    for (const TokenLogprob& token : position->top) {
      if (token.token != position->chosen.token) add(token);
    }
    list.push_back(std::move(entry));
  }
  return list;
}

std::string DumpJson(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

void AppendEvent(const Json& json, std::string& events) {
  events += "data: ";
  events += DumpJson(json);
  events += "\n\n";
}

int64_t CountCharacters(const std::string& text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; });
}

UsageCounter::UsageCounter(const Call& call)
    : call_(call), completion_(call.choices(), 0), cached_(call.prompts.size(), 0) {}

void UsageCounter::Update(int choice, const RequestOutput& output) {
  completion_[choice] = call_.prompt_only ? 0 : output.completion_tokens;
  // Of several choices of a prompt the first one tells what had been cached before this request.
  if (choice % call_.request.n == 0) cached_[choice / call_.request.n] = output.cached_tokens;
}

namespace {

Json UsageJson(int64_t prompt, int64_t completion) {
  Json usage;
  usage["prompt_tokens"] = prompt;
  usage["total_tokens"] = prompt + completion;
  usage["completion_tokens"] = completion;
  return usage;
}

}  // namespace

Json UsageCounter::Total() const {
  int64_t prompt = 0;
  for (const auto& tokens : call_.prompts) prompt += static_cast<int64_t>(tokens.size());
  Json usage = UsageJson(prompt, std::accumulate(completion_.begin(), completion_.end(), int64_t{0}));
  Json details;
  details["cached_tokens"] = std::accumulate(cached_.begin(), cached_.end(), int64_t{0});
  usage["prompt_tokens_details"] = std::move(details);
  return usage;
}

Json UsageCounter::OfChoice(int choice) const {
  return UsageJson(static_cast<int64_t>(call_.prompts[choice / call_.request.n].size()), completion_[choice]);
}

}  // namespace weft
