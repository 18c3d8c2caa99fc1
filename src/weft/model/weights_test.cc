#include "weft/model/weights.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdio>
#include <random>
#include <string>

#include "weft/model/file_io.h"
#include "weft/model/test_files.h"

namespace weft {
namespace {

const std::string kModels = WEFT_TEST_DATA "/models/";

// The checkpoint of a folder, or, for NAME-fp8, one of the shapes of NAME with all projections in random FP8 with
// scales of blocks that no slice lines up with.
std::unique_ptr<Checkpoint> Open(std::string name, const testing::TempFolder& folder) {
  constexpr int64_t kBlockRows = 24, kBlockCols = 40;
  if (!name.ends_with("-fp8")) return OpenCheckpoint(kModels + name);
  name.resize(name.size() - 4);
  const auto seed = std::random_device()();
  std::printf("seed %u\n", seed);
  std::mt19937 random(seed);
  const std::unique_ptr<Checkpoint> from = OpenCheckpoint(kModels + name);
  nlohmann::json header = nlohmann::json::object();
  std::string data;
  const auto add = [&](const std::string& tensor, const char* type, const std::vector<int64_t>& shape,
                       const std::string& bytes) {
    header[tensor] = {{"dtype", type}, {"shape", shape}, {"data_offsets", {data.size(), data.size() + bytes.size()}}};
    data += bytes;
  };
  for (const ModelTensor& tensor : ModelTensors(from->config())) {
    const int64_t rows = std::max<int64_t>(tensor.rows, 1);
    std::string bytes;
    if (tensor.rows > 0 && tensor.name.find("_proj") != std::string::npos) {
      const std::vector<int64_t> blocks = {(rows + kBlockRows - 1) / kBlockRows,
                                           (tensor.cols + kBlockCols - 1) / kBlockCols};
      for (int64_t i = 0; i < tensor.elements(); ++i) bytes += static_cast<char>(random() % 0x7f | (random() & 0x80));
      std::string scales;
      for (int64_t i = 0; i < blocks[0] * blocks[1]; ++i) {
        testing::Append(scales, std::uniform_real_distribution<float>(0.001f, 0.1f)(random));
      }
      add(tensor.name, "F8_E4M3", {rows, tensor.cols}, bytes);
      add(tensor.name + "_scale_inv", "F32", blocks, scales);
    } else {
      std::vector<float> values(static_cast<size_t>(tensor.elements()));
      from->Read(tensor.name, 0, rows, 0, tensor.cols, DType::kF32, values.data());
      for (const float value : values) testing::Append(bytes, value);
      add(tensor.name, "F32", from->Shape(tensor.name), bytes);
    }
  }
  nlohmann::json config = ReadJsonFile(kModels + name + "/config.json");
  config["quantization_config"] = {{"quant_method", "fp8"}, {"weight_block_size", {kBlockRows, kBlockCols}}};
  folder.Write("config.json", config.dump());
  folder.Write("model.safetensors", testing::Safetensors(header, data));
  return OpenCheckpoint(folder.path());
}

class Weights : public ::testing::TestWithParam<const char*> {
 protected:
  std::shared_ptr<const ModelWeights> Load(int tp_size, int tp, DType dtype = DType::kF32) {
    return LoadWeights(*checkpoint_, tp_size, tp, dtype, kernels_, pool_, [&](int64_t bytes) { told_ += bytes; });
  }
  std::shared_ptr<const ExpertWeights> Experts(const ExpertSlice& slice, DType dtype = DType::kF32) {
    return LoadExperts(*checkpoint_, slice, dtype, kernels_, pool_, [&](int64_t bytes) { told_ += bytes; });
  }

  // Rows [row0, row0 + rows) x columns [col0, col0 + cols) of a tensor.
  std::vector<float> Read(const std::string& name, int64_t row0, int64_t rows, int64_t col0, int64_t cols) const {
    std::vector<float> values(static_cast<size_t>(rows * cols));
    checkpoint_->Read(name, row0, rows, col0, cols, DType::kF32, values.data());
    return values;
  }
  std::vector<float> Unpack(const PackedWeights& w) const {
    std::vector<float> values(static_cast<size_t>(w.n * w.k));
    for (int64_t row = 0; row < w.n; ++row) kernels_.unpack_row(w, row, values.data() + row * w.k);
    return values;
  }
  // `w` is these rows of the tensors one below the other.
  struct Part {
    std::string name;
    Range rows;
  };
  void ExpectRows(const PackedWeights& w, const std::vector<Part>& parts) const {
    std::vector<float> want;
    for (const Part& part : parts) {
      const std::vector<float> rows = Read(part.name, part.rows.begin, part.rows.size(), 0, w.k);
      want.insert(want.end(), rows.begin(), rows.end());
    }
    EXPECT_EQ(Unpack(w), want) << parts[0].name;
  }
  void ExpectColumns(const PackedWeights& w, const std::string& name, Range cols) const {
    EXPECT_EQ(Unpack(w), Read(name, 0, w.n, cols.begin, cols.size())) << name;
  }
  void ExpectMlp(const PackedWeights& gate_up, const PackedWeights& down, const std::string& name, int64_t width,
                 int tp_size, int tp) const {
    const Range part = SplitRange(width, tp_size, tp);
    EXPECT_EQ(gate_up.n, 2 * part.size());
    EXPECT_EQ(down.k, part.size());
    ExpectRows(gate_up, {{name + "gate_proj.weight", part}, {name + "up_proj.weight", part}});
    ExpectColumns(down, name + "down_proj.weight", part);
  }

  const testing::TempFolder folder_;
  const std::unique_ptr<Checkpoint> checkpoint_ = Open(GetParam(), folder_);
  const ModelConfig& c_ = checkpoint_->config();
  const KernelTable& kernels_ = CpuKernels();
  ThreadPool pool_{2};
  std::atomic<int64_t> told_{0};
};

TEST_P(Weights, EachRankHasItsSlice) {
  for (const int tp_size : {1, 2, 4}) {
    for (int tp = 0; tp < tp_size; ++tp) {
      const auto weights = Load(tp_size, tp);
      const Range heads = SplitRange(c_.num_heads, tp_size, tp);
      EXPECT_EQ(weights->heads, heads.size());
      EXPECT_EQ(weights->kv_heads, std::max<int64_t>(1, c_.num_kv_heads / tp_size));
      for (int64_t i = 0; i < c_.num_layers; ++i) {
        const std::string base = fmt::format("model.layers.{}.", i);
        const std::string attn = base + "self_attn.";
        const LayerWeights& layer = weights->layers[static_cast<size_t>(i)];
        SCOPED_TRACE(fmt::format("rank {} of {}, {}", tp, tp_size, base));
        const Range q{heads.begin * c_.head_dim, heads.end * c_.head_dim};
        ExpectColumns(layer.o, attn + "o_proj.weight", {heads.begin * c_.v_dim(), heads.end * c_.v_dim()});
        EXPECT_EQ(layer.o.k, heads.size() * c_.v_dim());
        if (c_.mla) {
          const MlaConfig& mla = *c_.mla;
          const Part kv_a{attn + "kv_a_proj_with_mqa.weight", {0, mla.kv_lora_rank + mla.qk_rope_head_dim}};
          if (mla.q_lora_rank > 0) {
            ExpectRows(layer.qkv, {{attn + "q_a_proj.weight", {0, mla.q_lora_rank}}, kv_a});
            ExpectRows(layer.q_b, {{attn + "q_b_proj.weight", q}});
            EXPECT_EQ(layer.q_a_norm, Read(attn + "q_a_layernorm.weight", 0, 1, 0, mla.q_lora_rank));
          } else {
            ExpectRows(layer.qkv, {{attn + "q_proj.weight", q}, kv_a});
            EXPECT_TRUE(layer.q_b.n == 0 && layer.q_a_norm.empty());
          }
          EXPECT_EQ(layer.kv_a_norm, Read(attn + "kv_a_layernorm.weight", 0, 1, 0, mla.kv_lora_rank));
          ASSERT_EQ(layer.k_up.size(), static_cast<size_t>(heads.size()));
          ASSERT_EQ(layer.v_up.size(), layer.k_up.size());
          ASSERT_EQ(layer.k_absorb.size(), layer.k_up.size());
          for (int64_t h = 0; h < heads.size(); ++h) {
            const auto at = static_cast<size_t>(h);
            const int64_t row = (heads.begin + h) * (mla.qk_nope_head_dim + mla.v_head_dim);
            const int64_t v_row = row + mla.qk_nope_head_dim;
            ExpectRows(layer.k_up[at], {{attn + "kv_b_proj.weight", {row, v_row}}});
            ExpectRows(layer.v_up[at], {{attn + "kv_b_proj.weight", {v_row, v_row + mla.v_head_dim}}});
            EXPECT_EQ(layer.v_up[at].n, mla.v_head_dim);
            const std::vector<float> up = Unpack(layer.k_up[at]), absorb = Unpack(layer.k_absorb[at]);
            ASSERT_EQ(layer.k_absorb[at].n, mla.kv_lora_rank);
            ASSERT_EQ(layer.k_absorb[at].k, mla.qk_nope_head_dim);
            for (int64_t r = 0; r < mla.kv_lora_rank; ++r) {
              for (int64_t d = 0; d < mla.qk_nope_head_dim; ++d) {
                ASSERT_EQ(absorb[static_cast<size_t>(r * mla.qk_nope_head_dim + d)],
                          up[static_cast<size_t>(d * mla.kv_lora_rank + r)]);
              }
            }
          }
        } else {
          const int64_t first = tp * c_.num_kv_heads / tp_size;
          const Range kv{first * c_.head_dim, (first + weights->kv_heads) * c_.head_dim};
          ExpectRows(layer.qkv,
                     {{attn + "q_proj.weight", q}, {attn + "k_proj.weight", kv}, {attn + "v_proj.weight", kv}});
        }
        if (!c_.IsMoe(i)) {
          ExpectMlp(layer.gate_up, layer.down, base + "mlp.", c_.intermediate_size, tp_size, tp);
          EXPECT_TRUE(layer.router.n == 0 && layer.correction_bias.empty());
          continue;
        }
        const MoeConfig& moe = *c_.moe;
        ExpectRows(layer.router, {{base + "mlp.gate.weight", {0, moe.num_experts}}});
        if (moe.correction_bias) {
          EXPECT_EQ(layer.correction_bias, Read(base + "mlp.gate.e_score_correction_bias", 0, 1, 0, moe.num_experts));
        } else {
          EXPECT_TRUE(layer.correction_bias.empty());
        }
        if (moe.shared_ffn > 0) {
          EXPECT_EQ(weights->shared_ffn, SplitRange(moe.shared_ffn, tp_size, tp).size());
          ExpectMlp(layer.gate_up, layer.down, base + "mlp.shared_experts.", moe.shared_ffn, tp_size, tp);
        } else {
          EXPECT_TRUE(layer.gate_up.n == 0 && layer.down.n == 0);
        }
      }
    }
  }
}

TEST_P(Weights, ExpertsByWidthAndByRange) {
  const MoeConfig& moe = *c_.moe;
  const std::vector<ExpertSlice> slices = {{{0, moe.num_experts}},
                                           {{0, moe.num_experts}, 2, 1},
                                           {{0, moe.num_experts}, 5, 3},
                                           {{3, 7}},
                                           {{moe.num_experts - 1, moe.num_experts}},
                                           {{2, 2}}};
  for (const ExpertSlice& slice : slices) {
    SCOPED_TRACE(fmt::format("experts {} to {}, rank {} of {}", slice.experts.begin, slice.experts.end, slice.tp,
                             slice.tp_size));
    const auto experts = Experts(slice);
    EXPECT_EQ(experts->ffn, SplitRange(moe.expert_ffn, slice.tp_size, slice.tp).size());
    EXPECT_EQ(experts->experts.begin, slice.experts.begin);
    ASSERT_EQ(experts->layers.size(), static_cast<size_t>(c_.num_layers));
    for (int64_t i = 0; i < c_.num_layers; ++i) {
      const std::vector<ExpertMlp>& layer = experts->layers[static_cast<size_t>(i)];
      ASSERT_EQ(layer.size(), static_cast<size_t>(c_.IsMoe(i) ? slice.experts.size() : 0));
      for (size_t e = 0; e < layer.size(); ++e) {
        ExpectMlp(layer[e].gate_up, layer[e].down,
                  fmt::format("model.layers.{}.mlp.experts.{}.", i, slice.experts.begin + static_cast<int64_t>(e)),
                  moe.expert_ffn, slice.tp_size, slice.tp);
      }
    }
  }
}

TEST_P(Weights, RouterPrecisionAndBytes) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    told_ = 0;
    const auto weights = Load(1, 0, dtype);
    const auto experts = Experts({{0, c_.moe->num_experts}}, dtype);
    for (int64_t i = 0; i < c_.num_layers; ++i) {
      const LayerWeights& layer = weights->layers[static_cast<size_t>(i)];
      EXPECT_EQ(layer.qkv.dtype, dtype);
      if (c_.IsMoe(i)) {
        EXPECT_EQ(layer.router.dtype, c_.moe->router_f32 ? DType::kF32 : dtype);
      }
    }
    // What was read is what the estimate says; in memory panels are padded.
    EXPECT_EQ(told_, WeightBytes(c_, dtype));
    EXPECT_GE(weights->bytes() + experts->bytes(), WeightBytes(c_, dtype) * 9 / 10);
    EXPECT_LE(weights->bytes() + experts->bytes(), WeightBytes(c_, dtype) * 13 / 10);
  }
}

INSTANTIATE_TEST_SUITE_P(Golden, Weights,
                         ::testing::Values("qwen3_moe", "deepseek_v2_lite", "deepseek_v2_full", "deepseek_v3",
                                           "qwen3_moe-fp8", "deepseek_v3-fp8"));

TEST(DenseWeights, HaveNoExperts) {
  const auto checkpoint = OpenCheckpoint(kModels + "llama_tied");
  ThreadPool pool(1);
  std::atomic<int64_t> told{0};
  const auto add = [&](int64_t bytes) { told += bytes; };
  EXPECT_EQ(LoadExperts(*checkpoint, {{0, 0}}, DType::kBF16, CpuKernels(), pool, add), nullptr);
  LoadWeights(*checkpoint, 1, 0, DType::kBF16, CpuKernels(), pool, add);
  EXPECT_EQ(told, WeightBytes(checkpoint->config(), DType::kBF16));
}

TEST(DenseWeights, ATensorOfAnotherShapeIsNamed) {
  const auto checkpoint = OpenCheckpoint(kModels + "deepseek_v3", {{"n_routed_experts", 32}});
  ThreadPool pool(1);
  const std::string error =
      testing::ErrorOf([&] { LoadWeights(*checkpoint, 1, 0, DType::kBF16, CpuKernels(), pool, [](int64_t) {}); });
  EXPECT_TRUE(testing::Mentions(error, "model.layers.1.mlp.gate.weight has shape [16, 64]"));
  const std::string missing = testing::ErrorOf([&] {
    LoadExperts(*checkpoint, {{15, 17}}, DType::kBF16, CpuKernels(), pool, [](int64_t) {});
  });
  EXPECT_TRUE(testing::Mentions(missing, "model.layers.1.mlp.experts.16.gate_proj.weight is missing"));
}

}  // namespace
}  // namespace weft
