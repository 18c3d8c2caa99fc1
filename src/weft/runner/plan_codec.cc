#include "weft/runner/plan_codec.h"

#include <cereal/archives/binary.hpp>
#include <cereal/types/map.hpp>
#include <cereal/types/optional.hpp>
#include <cereal/types/string.hpp>
#include <cereal/types/vector.hpp>
#include <istream>
#include <ostream>
#include <streambuf>

#include "weft/core/error.h"

namespace weft {

// For cereal, which finds them here. The structured bindings name every member: one that is added does not compile
// until it is sent, too.

template <typename Archive>
void serialize(Archive& archive, SamplingParams& params) {
  auto& [temperature, top_p, top_k, min_p, presence_penalty, frequency_penalty, repetition_penalty, seed, logit_bias,
         bad_words, allowed_token_ids, max_tokens, min_tokens, ignore_eos, stop_token_ids, eos_token_ids, stop,
         include_stop_str_in_output, skip_special_tokens, spaces_between_special_tokens, detokenize, logprobs,
         prompt_logprobs] = params;
  archive(temperature, top_p, top_k, min_p, presence_penalty, frequency_penalty, repetition_penalty, seed, logit_bias,
          bad_words, allowed_token_ids, max_tokens, min_tokens, ignore_eos, stop_token_ids, eos_token_ids, stop,
          include_stop_str_in_output, skip_special_tokens, spaces_between_special_tokens, detokenize, logprobs,
          prompt_logprobs);
}

template <typename Archive>
void serialize(Archive& archive, NewRequest& request) {
  auto& [handle, prompt_token_ids, params] = request;
  archive(handle, prompt_token_ids, params);
}

template <typename Archive>
void serialize(Archive& archive, BlockCopy& copy) {
  auto& [source, destination, tokens] = copy;
  archive(source, destination, tokens);
}

template <typename Archive>
void serialize(Archive& archive, RequestStep& step) {
  auto& [handle, computed, tokens, prefill, sample, appended_token_ids, first_block, block_ids, copies] = step;
  archive(handle, computed, tokens, prefill, sample, appended_token_ids, first_block, block_ids, copies);
}

template <typename Archive>
void serialize(Archive& archive, StepPlan& plan) {
  auto& [step, admitted, released, requests, capture_logits] = plan;
  archive(step, admitted, released, requests, capture_logits);
}

template <typename Archive>
void serialize(Archive& archive, TokenLogprob& logprob) {
  auto& [token, value, rank] = logprob;
  archive(token, value, rank);
}

template <typename Archive>
void serialize(Archive& archive, PositionLogprobs& position) {
  auto& [chosen, top] = position;
  archive(chosen, top);
}

template <typename Archive>
void serialize(Archive& archive, RowOutput& row) {
  auto& [handle, token_id, logprobs, first_prompt_position, prompt_logprobs, logit_positions, logits, router_margins,
         error] = row;
  archive(handle, token_id, logprobs, first_prompt_position, prompt_logprobs, logit_positions, logits, router_margins,
          error);
}

template <typename Archive>
void serialize(Archive& archive, ProcessOutputs& outputs) {
  auto& [ranks, expert_loads] = outputs;
  archive(ranks, expert_loads);
}

namespace {

class WriteBuffer : public std::streambuf {
 public:
  std::vector<std::byte> bytes;

 protected:
  std::streamsize xsputn(const char* text, std::streamsize n) override {
    const auto* first = reinterpret_cast<const std::byte*>(text);
    bytes.insert(bytes.end(), first, first + n);
    return n;
  }
  int_type overflow(int_type c) override {
    bytes.push_back(static_cast<std::byte>(c));
    return c;
  }
};

class ReadBuffer : public std::streambuf {
 public:
  explicit ReadBuffer(std::span<const std::byte> bytes) {
    char* first = const_cast<char*>(reinterpret_cast<const char*>(bytes.data()));  // only ever read
    setg(first, first, first + bytes.size());
  }
  bool at_end() const { return gptr() == egptr(); }
};

template <typename T>
std::vector<std::byte> Encode(const T& value) {
  WriteBuffer buffer;
  std::ostream stream(&buffer);
  cereal::BinaryOutputArchive archive(stream);
  archive(value);
  return std::move(buffer.bytes);
}

template <typename T>
T Decode(std::span<const std::byte> bytes, const char* what) {
  ReadBuffer buffer(bytes);
  std::istream stream(&buffer);
  T value;
  try {
    cereal::BinaryInputArchive archive(stream);
    archive(value);
  } catch (const std::exception& e) {  // cereal's own, and what a nonsensical length does
    throw Error(fmt::format("{} of {} bytes cannot be read: {}", what, bytes.size(), e.what()), ErrorKind::kInternal);
  }
  if (!buffer.at_end()) {
    throw Error(fmt::format("{} of {} bytes is followed by something", what, bytes.size()), ErrorKind::kInternal);
  }
  return value;
}

}  // namespace

std::vector<std::byte> EncodePlans(std::span<const StepPlan* const> plans) {
  std::vector<std::optional<StepPlan>> copies(plans.size());
  for (size_t i = 0; i < plans.size(); ++i) {
    if (plans[i] != nullptr) copies[i] = *plans[i];
  }
  return Encode(copies);
}
std::vector<std::optional<StepPlan>> DecodePlans(std::span<const std::byte> bytes) {
  return Decode<std::vector<std::optional<StepPlan>>>(bytes, "the plans of a step");
}

std::vector<std::byte> EncodeOutputs(const ProcessOutputs& outputs) { return Encode(outputs); }
ProcessOutputs DecodeOutputs(std::span<const std::byte> bytes) {
  return Decode<ProcessOutputs>(bytes, "the outputs of a step");
}

}  // namespace weft
