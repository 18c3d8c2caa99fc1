#pragma once
// How a GGUF file says what Hugging Face files say.

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "weft/core/gguf_metadata.h"
#include "weft/model/config.h"

namespace weft::internal {

// The fields of config.json that the metadata of a model of architecture llama, qwen2 or qwen3 amount to. What
// config.json cannot say (biases, rope_freqs.weight) follows from the tensors. Throws weft::Error naming file and key.
nlohmann::json GgufToHfConfig(const GgufFile& file);

// "model.layers.3.self_attn.q_proj.weight" -> "blk.3.attn_q.weight"; none for a name that no GGUF has a tensor of.
std::optional<std::string> GgufTensorName(std::string_view hf_name);

// Row of a GGUF of architecture llama that holds row `row` of Hugging Face's q_proj or k_proj: there, neighbouring rows
// (2i, 2i + 1) of a head are turned together by rope, in Hugging Face's order rows (i, i + head_dim / 2).
constexpr int64_t PermutedRow(int64_t row, int64_t head_dim) {
  const int64_t in_head = row % head_dim;
  const int64_t half = head_dim / 2;
  return row - in_head + (in_head < half ? 2 * in_head : 2 * (in_head - half) + 1);
}

}  // namespace weft::internal
