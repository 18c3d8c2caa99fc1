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

// The fields of config.json that the metadata of a model of architecture llama, qwen2, qwen3, qwen2moe, qwen3moe or
// deepseek2 amount to. What config.json cannot say (biases, rope_freqs.weight) follows from the tensors. Throws
// weft::Error naming file and key.
nlohmann::json GgufToHfConfig(const GgufFile& file);

// Where a GGUF has what Hugging Face calls a tensor.
struct GgufName {
  std::string tensor;
  int64_t expert = -1;  // of a tensor [experts, rows, cols] that holds them all
  bool operator==(const GgufName&) const = default;
};

// "model.layers.3.self_attn.q_proj.weight" -> {"blk.3.attn_q.weight"}, "model.layers.3.mlp.experts.5.up_proj.weight" ->
// {"blk.3.ffn_up_exps.weight", 5}; none for a name that no GGUF has a tensor of.
std::optional<GgufName> FindGgufName(std::string_view hf_name);

// Row of a GGUF of architecture llama that holds row `row` of Hugging Face's q_proj or k_proj: there, neighbouring rows
// (2i, 2i + 1) of a head are turned together by rope, in Hugging Face's order rows (i, i + head_dim / 2).
constexpr int64_t PermutedRow(int64_t row, int64_t head_dim) {
  const int64_t in_head = row % head_dim;
  const int64_t half = head_dim / 2;
  return row - in_head + (in_head < half ? 2 * in_head : 2 * (in_head - half) + 1);
}

}  // namespace weft::internal
