#include "weft/model/gguf_checkpoint.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <random>
#include <thread>

#include "weft/model/checkpoint.h"
#include "weft/model/convert.h"
#include "weft/model/dequant.h"
#include "weft/model/safetensors.h"
#include "weft/model/test_gguf.h"

namespace weft {
namespace {

using testing::ErrorOf;
using testing::GgufWriter;
using testing::Mentions;

const std::string kGguf = WEFT_TEST_DATA "/gguf/";

std::vector<uint32_t> Bits(const std::vector<float>& values) {
  std::vector<uint32_t> bits;
  for (const float value : values) bits.push_back(std::bit_cast<uint32_t>(value));
  return bits;
}

std::vector<float> ReadF32(const Checkpoint& checkpoint, std::string_view name, int64_t row0, int64_t rows,
                           int64_t col0, int64_t cols) {
  std::vector<float> values(static_cast<size_t>(rows * cols) + 1, -77.0f);
  checkpoint.Read(name, row0, rows, col0, cols, DType::kF32, values.data());
  EXPECT_EQ(values.back(), -77.0f);  // nothing written behind the end
  values.pop_back();
  return values;
}

std::pair<int64_t, int64_t> RowsAndColumns(const Checkpoint& checkpoint, std::string_view name) {
  const auto shape = checkpoint.Shape(name);
  return {shape.size() == 1 ? 1 : shape[0], shape.back()};
}

std::vector<float> ReadWhole(const Checkpoint& checkpoint, std::string_view name) {
  const auto [rows, cols] = RowsAndColumns(checkpoint, name);
  return ReadF32(checkpoint, name, 0, rows, 0, cols);
}

// Random slices of every tensor against parts of the whole, as f32 and as bf16.
void ExpectSlicesEqualTheWhole(const Checkpoint& checkpoint, int rounds) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  std::mt19937 random(seed);
  const auto between = [&](int64_t a, int64_t b) { return std::uniform_int_distribution<int64_t>(a, b)(random); };
  for (const ModelTensor& tensor : ModelTensors(checkpoint.config())) {
    const std::vector<float> whole = ReadWhole(checkpoint, tensor.name);
    const auto [rows, cols] = RowsAndColumns(checkpoint, tensor.name);
    for (int round = 0; round < rounds; ++round) {
      const int64_t row0 = between(0, rows), n = between(0, rows - row0);
      const int64_t col0 = between(0, cols), m = between(0, cols - col0);
      const std::vector<float> got = ReadF32(checkpoint, tensor.name, row0, n, col0, m);
      std::vector<uint16_t> bf16s(static_cast<size_t>(n * m));
      checkpoint.Read(tensor.name, row0, n, col0, m, DType::kBF16, bf16s.data());
      for (int64_t i = 0; i < n * m; ++i) {
        const float want = whole[static_cast<size_t>((row0 + i / m) * cols + col0 + i % m)];
        ASSERT_EQ(std::bit_cast<uint32_t>(got[static_cast<size_t>(i)]), std::bit_cast<uint32_t>(want)) << tensor.name;
        ASSERT_EQ(bf16s[static_cast<size_t>(i)], ToBf16(want).bits) << tensor.name;
      }
    }
  }
}

TEST(Dequantise, EveryFormatBitForBit) {
  const GgufFile file = GgufFile::Open(kGguf + "blocks.gguf");
  const SafetensorsFile expected(kGguf + "blocks_expected.safetensors");
  int read = 0;
  for (const char* name : {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"}) {
    SCOPED_TRACE(name);
    const std::string tensor_name = std::string("blocks.") + name;
    const GgufTensorInfo* tensor = file.FindTensor(tensor_name);
    ASSERT_NE(tensor, nullptr);
    ASSERT_TRUE(CanDequantise(tensor->type.type));
    std::vector<float> got(tensor->elements);
    Dequantise(tensor->type.type, tensor->data, static_cast<int64_t>(tensor->elements / tensor->type.block_elements),
               got.data());
    EXPECT_EQ(Bits(got), Bits(expected.Values<float>(tensor_name)));
    ++read;
  }
  EXPECT_EQ(read, 8);
  for (const char* name : {"Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4"}) {
    EXPECT_FALSE(CanDequantise(file.FindTensor(std::string("blocks.") + name)->type.type)) << name;
  }
}

class GoldenGguf : public ::testing::TestWithParam<const char*> {};

TEST_P(GoldenGguf, ConfigIsThatOfTheTwin) {
  const auto gguf = OpenCheckpoint(kGguf + "llama-" + GetParam() + ".gguf");
  const auto hf = OpenCheckpoint(WEFT_TEST_DATA "/models/llama_llama3");
  const ModelConfig &a = gguf->config(), &b = hf->config();
  EXPECT_EQ(a.architecture, b.architecture);
  EXPECT_EQ(a.model_type, b.model_type);
  EXPECT_EQ(a.hidden_size, b.hidden_size);
  EXPECT_EQ(a.intermediate_size, b.intermediate_size);
  EXPECT_EQ(a.num_layers, b.num_layers);
  EXPECT_EQ(a.num_heads, b.num_heads);
  EXPECT_EQ(a.num_kv_heads, b.num_kv_heads);
  EXPECT_EQ(a.head_dim, b.head_dim);
  EXPECT_EQ(a.rotary_dim, b.rotary_dim);
  EXPECT_EQ(a.vocab_size, b.vocab_size);
  EXPECT_EQ(a.max_position_embeddings, b.max_position_embeddings);
  EXPECT_EQ(a.rms_norm_eps, b.rms_norm_eps);
  EXPECT_EQ(a.tie_word_embeddings, b.tie_word_embeddings);
  EXPECT_FALSE(a.qkv_bias || a.o_bias || a.mlp_bias || a.qk_norm);
  EXPECT_EQ(a.bos_token_id, b.bos_token_id);
  EXPECT_EQ(a.eos_token_ids, b.eos_token_ids);
  const RopeTable rope_a = MakeRopeTable(a.rope, a.rotary_dim), rope_b = MakeRopeTable(b.rope, b.rotary_dim);
  for (size_t i = 0; i < rope_b.inv_freq.size(); ++i) {
    EXPECT_NEAR(rope_a.inv_freq[i], rope_b.inv_freq[i], 1.2e-7 * rope_b.inv_freq[i]);  // divisors are f32
  }
  EXPECT_EQ(rope_a.attention_factor, 1.0);
  EXPECT_EQ(a.rope.freq_divisors.size(), 16u);
}

void ExpectRowsOfTheReference(const std::string& type) {
  SCOPED_TRACE(type);
  const auto checkpoint = OpenCheckpoint(kGguf + "llama-" + type + ".gguf");
  const SafetensorsFile expected(kGguf + "expected.safetensors");
  for (const auto& [hf, stored] :
       std::map<std::string, std::string>{{"model.embed_tokens.weight", "token_embd.weight"},
                                          {"model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"},
                                          {"model.layers.0.self_attn.k_proj.weight", "blk.0.attn_k.weight"},
                                          {"model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"}}) {
    SCOPED_TRACE(hf);
    const std::vector<float> want = expected.Values<float>(type + "." + stored);
    const int64_t cols = RowsAndColumns(*checkpoint, hf).second;
    ASSERT_EQ(static_cast<int64_t>(want.size()), 8 * cols);
    const bool permuted = stored.find("attn") != stored.npos;
    for (int64_t row = 0; row < 8; ++row) {
      // Stored row 2i + j of a head of 32 is Hugging Face's row 16 j + i.
      const std::vector<float> got = ReadF32(*checkpoint, hf, permuted ? row / 2 + 16 * (row % 2) : row, 1, 0, cols);
      EXPECT_EQ(Bits(got), Bits({want.begin() + row * cols, want.begin() + (row + 1) * cols})) << "row " << row;
    }
  }
}

TEST(GgufCheckpoint, RowsAreThoseOfTheReference) {
  for (const char* type : {"BF16", "Q8_0", "Q4_0"}) ExpectRowsOfTheReference(type);
}

TEST_P(GoldenGguf, TensorsAreThoseOfTheTwin) {
  const std::string type = GetParam();
  const auto gguf = OpenCheckpoint(kGguf + "llama-" + type + ".gguf");
  const auto hf = OpenCheckpoint(WEFT_TEST_DATA "/models/llama_llama3");
  // Of a block's largest value: half of a step of 1/127, or up to a whole step of 1/8 (one side of Q4_0 has only 7),
  // and the rounding of the scale to a half.
  const double tolerance = type == "Q8_0" ? 0.5 / 127 + 0x1p-11 : type == "Q4_0" ? 1.0 / 8 + 0x1p-11 : 0.0;
  for (const ModelTensor& tensor : ModelTensors(hf->config())) {
    EXPECT_EQ(gguf->Shape(tensor.name), hf->Shape(tensor.name));
    const bool plain = tensor.kind == ModelTensor::Kind::kNorm || type == "F32";
    EXPECT_EQ(gguf->NaturalDType(tensor.name), type == "BF16" && !plain ? DType::kBF16 : DType::kF32);
    const std::vector<float> got = ReadWhole(*gguf, tensor.name), want = ReadWhole(*hf, tensor.name);
    for (size_t block = 0; block < want.size(); block += 32) {
      double largest = 0.0;
      for (size_t i = block; i < block + 32; ++i) largest = std::max(largest, std::abs(double{want[i]}));
      for (size_t i = block; i < block + 32; ++i) {
        ASSERT_NEAR(got[i], want[i], (plain ? 0.0 : tolerance) * largest) << tensor.name << " " << i;
      }
    }
  }
}

TEST_P(GoldenGguf, SlicesEqualTheWhole) {
  ExpectSlicesEqualTheWhole(*OpenCheckpoint(kGguf + "llama-" + GetParam() + ".gguf"), 6);
}

INSTANTIATE_TEST_SUITE_P(Golden, GoldenGguf, ::testing::Values("F32", "BF16", "Q8_0", "Q4_0"));

// A model of one layer, hidden 512, two heads of 256 and one KV head, whose matrices are random values of a type.
struct Tiny {
  std::string arch;
  uint32_t type = 0;
  bool with_output = true;
  std::mt19937 random{std::random_device()()};
  GgufWriter writer;

  explicit Tiny(std::string a, uint32_t t = 0, bool output = true) : arch(std::move(a)), type(t), with_output(output) {
    writer.String("general.architecture", arch);
    writer.U32(arch + ".embedding_length", 512);
    writer.U32(arch + ".feed_forward_length", 256);
    writer.U32(arch + ".block_count", 1);
    writer.U32(arch + ".attention.head_count", 2);
    writer.U32(arch + ".attention.head_count_kv", 1);
    writer.U32(arch + ".context_length", 4096);
    writer.F32(arch + ".attention.layer_norm_rms_epsilon", 1e-5f);
    for (const auto& [name, rows, cols] :
         std::vector<std::tuple<std::string, uint64_t, uint64_t>>{{"token_embd", 6, 512},
                                                                  {"blk.0.attn_q", 512, 512},
                                                                  {"blk.0.attn_k", 256, 512},
                                                                  {"blk.0.attn_v", 256, 512},
                                                                  {"blk.0.attn_output", 512, 512},
                                                                  {"blk.0.ffn_gate", 256, 512},
                                                                  {"blk.0.ffn_up", 256, 512},
                                                                  {"blk.0.ffn_down", 512, 256}}) {
      writer.Tensor(name + ".weight", {cols, rows}, type, RandomBlocks(rows * cols));
    }
    for (const char* name : {"output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"})
      Vector(name + std::string(".weight"), 512);
    if (with_output) writer.Tensor("output.weight", {512, 6}, type, RandomBlocks(6 * 512));
  }

  std::vector<float> Vector(const std::string& name, uint64_t n) {
    std::vector<float> values(n);
    for (float& value : values) value = std::normal_distribution<float>()(random);
    writer.F32Tensor(name, {n}, values);
    return values;
  }

  std::string RandomBlocks(uint64_t elements) {
    const GgmlTypeInfo* info = FindGgmlType(type);
    std::string bytes(elements / info->block_elements * info->block_bytes, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random());
    // No infinities and NaN: the exponent's top bit of everything that may be a half (or bf16, or f32) is 0.
    for (size_t i = 1; i < bytes.size(); i += 2) bytes[i] = static_cast<char>(bytes[i] & 0xbf);
    return bytes;
  }

  std::unique_ptr<Checkpoint> Open() const {
    const testing::TempFolder folder;  // a mapping outlives the name of its file
    return OpenCheckpoint(folder.Write("tiny.gguf", writer.Bytes()));
  }
  std::string Error() const {
    return ErrorOf([&] { Open(); });
  }
};

class TinyGguf : public ::testing::TestWithParam<const char*> {};

uint32_t TypeNumber(const std::string& name) {
  for (uint32_t type = 0; type < 64; ++type) {
    const GgmlTypeInfo* info = FindGgmlType(type);
    if (info != nullptr && name == info->name) return type;
  }
  return 999;
}

TEST_P(TinyGguf, SlicesEqualTheWholeAndRowsAreInOrder) {
  const Tiny tiny("llama", TypeNumber(GetParam()));
  const auto checkpoint = tiny.Open();
  ExpectSlicesEqualTheWhole(*checkpoint, 3);
  // The whole, against the file dequantised row by row: q in the order of half-split rope, o as it lies.
  const testing::TempFolder folder;
  const GgufFile file = GgufFile::Open(folder.Write("tiny.gguf", tiny.writer.Bytes()));
  for (const bool permuted : {true, false}) {
    const GgufTensorInfo& tensor = *file.FindTensor(permuted ? "blk.0.attn_q.weight" : "blk.0.attn_output.weight");
    const int64_t row_blocks = 512 / tensor.type.block_elements;
    const std::string name =
        permuted ? "model.layers.0.self_attn.q_proj.weight" : "model.layers.0.self_attn.o_proj.weight";
    std::vector<float> row(512);
    for (int64_t stored = 0; stored < 512; ++stored) {
      Dequantise(tensor.type.type, tensor.data + stored * row_blocks * tensor.type.block_bytes, row_blocks, row.data());
      const int64_t in_head = stored % 256;
      const int64_t hf = permuted ? stored - in_head + in_head / 2 + 128 * (in_head % 2) : stored;
      ASSERT_EQ(Bits(ReadF32(*checkpoint, name, hf, 1, 0, 512)), Bits(row)) << name << " " << stored;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Types, TinyGguf,
                         ::testing::Values("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K",
                                           "Q6_K"));

TEST(GgufCheckpoint, OtherTypesAreRefusedWithTensorAndType) {
  Tiny tiny("llama", TypeNumber("Q3_K"));
  const auto checkpoint = tiny.Open();
  EXPECT_TRUE(Mentions(ErrorOf([&] { ReadWhole(*checkpoint, "model.layers.0.mlp.up_proj.weight"); }),
                       "tensor blk.0.ffn_up.weight has type Q3_K"));
}

TEST(GgufCheckpoint, QwenRowsStayAndBiasesAndNormsAreFound) {
  Tiny qwen2("qwen2");
  const std::vector<float> q = qwen2.Vector("blk.0.attn_q.bias", 512);
  qwen2.Vector("blk.0.attn_k.bias", 256);
  qwen2.Vector("blk.0.attn_v.bias", 256);
  const auto a = qwen2.Open();
  EXPECT_EQ(a->config().architecture, "Qwen2ForCausalLM");
  EXPECT_TRUE(a->config().qkv_bias);
  EXPECT_FALSE(a->config().o_bias || a->config().mlp_bias || a->config().qk_norm || a->config().tie_word_embeddings);
  EXPECT_EQ(ReadWhole(*a, "model.layers.0.self_attn.q_proj.bias"), q);
  EXPECT_EQ(a->config().head_dim, 256);
  EXPECT_EQ(a->config().rms_norm_eps, 1e-5f);
  EXPECT_EQ(a->config().rope.theta, 10000.0);

  Tiny qwen3("qwen3", 0, /*output=*/false);
  qwen3.writer.U32("qwen3.attention.key_length", 128);
  qwen3.writer.U32("qwen3.attention.value_length", 128);
  qwen3.writer.F32("qwen3.rope.freq_base", 1e6f);
  const std::vector<float> norm = qwen3.Vector("blk.0.attn_q_norm.weight", 128);
  qwen3.Vector("blk.0.attn_k_norm.weight", 128);
  const auto b = qwen3.Open();
  EXPECT_TRUE(b->config().qk_norm && b->config().tie_word_embeddings);
  EXPECT_FALSE(b->config().qkv_bias || b->Has("lm_head.weight"));
  EXPECT_EQ(b->config().head_dim, 128);
  EXPECT_EQ(b->config().rope.theta, 1e6);
  EXPECT_EQ(ReadWhole(*b, "model.layers.0.self_attn.q_norm.weight"), norm);
}

TEST(GgufCheckpoint, LlamaBiasesArePermutedLikeTheirRows) {
  Tiny tiny("llama");
  const std::vector<float> stored = tiny.Vector("blk.0.attn_q.bias", 512);
  tiny.Vector("blk.0.attn_k.bias", 256);
  const std::vector<float> v = tiny.Vector("blk.0.attn_v.bias", 256);
  const std::vector<float> o = tiny.Vector("blk.0.attn_output.bias", 512);
  const auto checkpoint = tiny.Open();
  EXPECT_TRUE(checkpoint->config().qkv_bias && checkpoint->config().o_bias);
  const std::vector<float> q = ReadWhole(*checkpoint, "model.layers.0.self_attn.q_proj.bias");
  for (size_t i = 0; i < 512; ++i) {
    const size_t in_head = i % 256;
    EXPECT_EQ(q[i - in_head + in_head / 2 + 128 * (in_head % 2)], stored[i]);
  }
  EXPECT_EQ(ReadF32(*checkpoint, "model.layers.0.self_attn.q_proj.bias", 0, 1, 100, 200),
            std::vector<float>(q.begin() + 100, q.begin() + 300));
  EXPECT_EQ(ReadWhole(*checkpoint, "model.layers.0.self_attn.v_proj.bias"), v);
  EXPECT_EQ(ReadWhole(*checkpoint, "model.layers.0.self_attn.o_proj.bias"), o);
}

TEST(GgufCheckpoint, RopeScaling) {
  Tiny yarn("qwen2");
  yarn.writer.String("qwen2.rope.scaling.type", "yarn");
  yarn.writer.F32("qwen2.rope.scaling.factor", 4.0f);
  yarn.writer.U32("qwen2.rope.scaling.original_context_length", 1024);
  yarn.writer.F32("qwen2.rope.freq_base", 1e6f);
  RopeConfig rope = yarn.Open()->config().rope;
  EXPECT_EQ(rope.type, RopeConfig::Type::kYarn);
  EXPECT_EQ(rope.factor, 4.0);
  EXPECT_EQ(rope.original_max_position, 1024);
  EXPECT_EQ(rope.attention_factor, std::nullopt);
  yarn.writer.F32("qwen2.rope.scaling.attn_factor", 0.5f);
  yarn.writer.F32("qwen2.rope.scaling.yarn_beta_fast", 16.0f);
  rope = yarn.Open()->config().rope;
  EXPECT_NEAR(*rope.attention_factor, 0.5 * (0.1 * std::log(4.0) + 1.0), 1e-12);
  EXPECT_EQ(rope.beta_fast, 16.0);

  Tiny linear("llama");
  linear.writer.String("llama.rope.scaling.type", "linear");
  linear.writer.F32("llama.rope.scaling.factor", 2.5f);
  EXPECT_EQ(linear.Open()->config().rope.type, RopeConfig::Type::kLinear);
  EXPECT_EQ(linear.Open()->config().rope.factor, 2.5);
  Tiny old("llama");
  old.writer.F32("llama.rope.scale_linear", 8.0f);
  EXPECT_EQ(old.Open()->config().rope.factor, 8.0);
  Tiny none("llama");
  none.writer.String("llama.rope.scaling.type", "none");
  none.writer.F32("llama.rope.scaling.factor", 2.5f);
  EXPECT_EQ(none.Open()->config().rope.type, RopeConfig::Type::kDefault);
  Tiny longrope("llama");
  longrope.writer.String("llama.rope.scaling.type", "longrope");
  EXPECT_TRUE(Mentions(longrope.Error(), "longrope"));
}

TEST(GgufCheckpoint, RefusesWhatItCannotRun) {
  GgufWriter other;
  other.String("general.architecture", "mamba");
  const testing::TempFolder folder;
  const std::string path = folder.Write("other.gguf", other.Bytes());
  EXPECT_TRUE(Mentions(ErrorOf([&] { OpenCheckpoint(path); }), "mamba"));
  const auto error = [](const char* arch, const auto& change) {
    Tiny tiny(arch);
    change(tiny);
    return tiny.Error();
  };
  EXPECT_TRUE(Mentions(error("llama", [](Tiny& t) { t.writer.U32("llama.expert_count", 8); }), "expert_count\" = 8"));
  EXPECT_TRUE(
      Mentions(error("qwen2", [](Tiny& t) { t.writer.U32("qwen2.attention.sliding_window", 512); }), "sliding_window"));
  EXPECT_EQ(error("qwen2", [](Tiny& t) { t.writer.U32("qwen2.attention.sliding_window", 4096); }), "");
  EXPECT_TRUE(Mentions(error("llama", [](Tiny& t) { t.writer.U32("llama.rope.dimension_count", 64); }),
                       "dimension_count\" = 64"));
  EXPECT_TRUE(
      Mentions(error("llama", [](Tiny& t) { t.writer.U32("llama.attention.key_length", 128); }), "value_length"));
  EXPECT_TRUE(Mentions(error("llama", [](Tiny& t) { t.Vector("rope_freqs.weight", 64); }), "must be 128 of type F32"));
  EXPECT_TRUE(
      Mentions(error("llama", [](Tiny& t) { t.writer.F32Tensor("rope_freqs.weight", {128}, std::vector<float>(128)); }),
               "has the value 0"));
  EXPECT_TRUE(Mentions(error("llama", [](Tiny& t) { t.writer.U32("split.count", 2); }), "-00001-of-00002.gguf"));
  // Missing metadata, by name; and a count for each layer that differs.
  GgufWriter bare;
  bare.String("general.architecture", "llama");
  const std::string bare_path = folder.Write("bare.gguf", bare.Bytes());
  EXPECT_TRUE(Mentions(ErrorOf([&] { OpenCheckpoint(bare_path); }), "\"llama.embedding_length\" is missing"));
  bare.U32("llama.embedding_length", 512);
  bare.U32("llama.feed_forward_length", 256);
  bare.U32("llama.block_count", 2);
  bare.I32s("llama.attention.head_count", {2, 4});
  folder.Write("bare.gguf", bare.Bytes());
  EXPECT_TRUE(Mentions(ErrorOf([&] { OpenCheckpoint(bare_path); }), "differs between layers (2 and 4)"));

  const auto tiny = Tiny("llama").Open();
  EXPECT_TRUE(Mentions(ErrorOf([&] { tiny->Shape("model.layers.1.mlp.up_proj.weight"); }), "blk.1.ffn_up.weight"));
  EXPECT_TRUE(Mentions(ErrorOf([&] { tiny->Shape("what.ever"); }), "what.ever"));
  EXPECT_TRUE(Mentions(ErrorOf([&] { ReadF32(*tiny, "lm_head.weight", 0, 7, 0, 1); }), "it has 6 x 512"));
  EXPECT_FALSE(tiny->Has("model.layers.0.self_attn.q_proj.scale"));
}

TEST(GgufCheckpoint, OverridesApply) {
  const testing::TempFolder folder;
  const std::string path = folder.Write("tiny.gguf", Tiny("llama").writer.Bytes());
  EXPECT_EQ(OpenCheckpoint(path, {{"rope_theta", 3e5}})->config().rope.theta, 3e5);
  EXPECT_TRUE(Mentions(ErrorOf([&] { OpenCheckpoint(path, {{"hidden_act", "gelu"}}); }), "tiny.gguf"));
}

TEST(GgufCheckpoint, SplitModels) {
  const Tiny tiny("llama", TypeNumber("Q4_0"));
  const auto whole = tiny.Open();
  const testing::TempFolder folder;
  const GgufFile file = GgufFile::Open(folder.Write("whole.gguf", tiny.writer.Bytes()));
  GgufWriter parts[2];
  parts[0].String("general.architecture", "llama");
  for (const char* key : {"embedding_length", "feed_forward_length", "block_count", "attention.head_count",
                          "attention.head_count_kv", "context_length"}) {
    parts[0].U32(std::string("llama.") + key, static_cast<uint32_t>(file.RequireU64(std::string("llama.") + key)));
  }
  parts[0].F32("llama.attention.layer_norm_rms_epsilon", 1e-5f);
  for (uint16_t i = 0; i < 2; ++i) {
    parts[i].U16("split.no", i);
    parts[i].U16("split.count", 2);
    parts[i].U32("split.tensors.count", static_cast<uint32_t>(file.tensors().size()));
  }
  for (size_t i = 0; i < file.tensors().size(); ++i) {
    const GgufTensorInfo& tensor = file.tensors()[i];
    parts[1 - i % 2].Tensor(tensor.name, tensor.dims, tensor.type.type,  // the embedding in the second
                            std::string(reinterpret_cast<const char*>(tensor.data), tensor.bytes));
  }
  const std::string first = folder.Write("m-00001-of-00002.gguf", parts[0].Bytes());
  EXPECT_TRUE(Mentions(ErrorOf([&] { OpenCheckpoint(first); }), "m-00002-of-00002.gguf: is missing"));
  const std::string second = folder.Write("m-00002-of-00002.gguf", parts[1].Bytes());
  const auto split = OpenCheckpoint(first);
  EXPECT_EQ(split->config().vocab_size, 6);
  EXPECT_EQ(split->total_bytes(), whole->total_bytes());
  for (const ModelTensor& tensor : ModelTensors(whole->config())) {
    EXPECT_EQ(Bits(ReadWhole(*split, tensor.name)), Bits(ReadWhole(*whole, tensor.name))) << tensor.name;
  }
  EXPECT_TRUE(Mentions(ErrorOf([&] { OpenCheckpoint(second); }), "give the first one"));
  folder.Write("m-00002-of-00002.gguf", parts[0].Bytes());
  EXPECT_TRUE(Mentions(ErrorOf([&] { OpenCheckpoint(first); }), "is both in"));
}

TEST(GgufCheckpoint, ReadsFromManyThreads) {
  const auto checkpoint = OpenCheckpoint(kGguf + "llama-Q8_0.gguf");
  const std::string name = "model.layers.0.self_attn.q_proj.weight";
  const std::vector<float> want = ReadWhole(*checkpoint, name);
  std::vector<std::thread> threads;
  std::vector<int> equal(4);
  for (size_t t = 0; t < equal.size(); ++t) {
    threads.emplace_back([&, t] { equal[t] = ReadWhole(*checkpoint, name) == want; });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(equal, std::vector<int>(4, 1));
}

TEST(GgufName, FollowsTheLists) {
  using internal::FindGgufName;
  using internal::GgufName;
  EXPECT_EQ(FindGgufName("model.layers.12.self_attn.o_proj.bias"), GgufName{"blk.12.attn_output.bias"});
  EXPECT_EQ(FindGgufName("lm_head.weight"), GgufName{"output.weight"});
  EXPECT_EQ(FindGgufName("model.layers.3.mlp.gate.weight"), GgufName{"blk.3.ffn_gate_inp.weight"});
  EXPECT_EQ(FindGgufName("model.layers.3.mlp.gate.e_score_correction_bias"), GgufName{"blk.3.exp_probs_b.bias"});
  EXPECT_EQ(FindGgufName("model.layers.3.mlp.experts.17.down_proj.weight"),
            (GgufName{"blk.3.ffn_down_exps.weight", 17}));
  for (const char* name : {"", "lm_head", "model.layers.x.mlp.up_proj.weight", "model.layers..mlp.up_proj.weight",
                           "model.layers.1.mlp.weight", "model.layers.9999999999.mlp.up_proj.weight",
                           "model.layers.1.mlp.experts.up_proj.weight", "model.layers.1.mlp.experts.x.up_proj.weight",
                           "model.layers.1.mlp.experts.1.gate.weight", "model.layers.1.e_score_correction_bias"}) {
    EXPECT_EQ(FindGgufName(name), std::nullopt) << name;
  }
}

}  // namespace
}  // namespace weft
