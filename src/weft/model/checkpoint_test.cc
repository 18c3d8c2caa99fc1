#include "weft/model/checkpoint.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <random>

#include "weft/model/convert.h"
#include "weft/model/safetensors.h"
#include "weft/model/test_files.h"

namespace weft {
namespace {

using testing::Entry;
using testing::ErrorOf;
using testing::Mentions;
using Json = nlohmann::json;

const std::string kModels = WEFT_TEST_DATA "/models/";

// One layer of 2 heads, hidden 8: what is tested here is files, not sizes.
Json TinyConfig() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"hidden_size", 8},
          {"intermediate_size", 12},
          {"num_hidden_layers", 1},
          {"num_attention_heads", 2},
          {"vocab_size", 10},
          {"eos_token_id", 2}};
}

class GoldenCheckpoint : public ::testing::TestWithParam<const char*> {};

TEST_P(GoldenCheckpoint, HasExactlyTheTensorsOfItsConfig) {
  const auto checkpoint = OpenCheckpoint(kModels + GetParam());
  const SafetensorsFile file(kModels + GetParam() + "/model.safetensors");
  size_t count = 0;
  int64_t bytes = 0;
  for (const ModelTensor& tensor : ModelTensors(checkpoint->config())) {
    ASSERT_TRUE(checkpoint->Has(tensor.name)) << tensor.name;
    const std::vector<int64_t> want =
        tensor.rows == 0 ? std::vector<int64_t>{tensor.cols} : std::vector<int64_t>{tensor.rows, tensor.cols};
    EXPECT_EQ(checkpoint->Shape(tensor.name), want) << tensor.name;
    const bool f32 = tensor.name.ends_with("e_score_correction_bias");
    EXPECT_EQ(checkpoint->NaturalDType(tensor.name), f32 ? DType::kF32 : DType::kBF16);
    ++count;
    bytes += tensor.elements() * (f32 ? 4 : 2);
  }
  EXPECT_EQ(file.tensors().size(), count);
  EXPECT_EQ(checkpoint->total_bytes(), bytes);
}

TEST_P(GoldenCheckpoint, SlicesEqualThePartsOfTheWhole) {
  const auto checkpoint = OpenCheckpoint(kModels + GetParam());
  const SafetensorsFile file(kModels + GetParam() + "/model.safetensors");
  const auto seed = std::random_device()();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  std::mt19937 random(seed);
  const auto between = [&](int64_t a, int64_t b) { return std::uniform_int_distribution<int64_t>(a, b)(random); };
  for (const ModelTensor& tensor : ModelTensors(checkpoint->config())) {
    if (file.Get(tensor.name).type() != DType::kBF16) continue;  // other types: ConvertsStoredTypes
    const std::vector<uint16_t> stored = file.Values<uint16_t>(tensor.name);
    const int64_t rows = std::max<int64_t>(tensor.rows, 1);
    for (int round = 0; round < 4; ++round) {
      // The whole first, then random slices.
      const int64_t row0 = round == 0 ? 0 : between(0, rows), n = round == 0 ? rows : between(0, rows - row0);
      const int64_t col0 = round == 0 ? 0 : between(0, tensor.cols);
      const int64_t m = round == 0 ? tensor.cols : between(0, tensor.cols - col0);
      std::vector<uint16_t> as_bf16(static_cast<size_t>(n * m) + 1, 0xdead);
      std::vector<float> as_f32(static_cast<size_t>(n * m) + 1, -77.0f);
      checkpoint->Read(tensor.name, row0, n, col0, m, DType::kBF16, as_bf16.data());
      checkpoint->Read(tensor.name, row0, n, col0, m, DType::kF32, as_f32.data());
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < m; ++j) {
          const uint16_t want = stored[static_cast<size_t>((row0 + i) * tensor.cols + col0 + j)];
          ASSERT_EQ(as_bf16[static_cast<size_t>(i * m + j)], want) << tensor.name;
          ASSERT_EQ(as_f32[static_cast<size_t>(i * m + j)], ToFloat(bf16{want})) << tensor.name;
        }
      }
      EXPECT_EQ(as_bf16.back(), 0xdead);  // nothing written behind the end
      EXPECT_EQ(as_f32.back(), -77.0f);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Golden, GoldenCheckpoint,
                         ::testing::Values("llama_llama3", "llama_tied", "llama_bias", "qwen2_yarn", "qwen3",
                                           "qwen3_moe", "deepseek_v2_lite", "deepseek_v2_full", "deepseek_v3"));

TEST(Checkpoint, ConvertsStoredTypes) {
  const testing::TempFolder folder;
  folder.Write("config.json", TinyConfig().dump());
  // 1 + 2^-8 lies between two bf16 values, and the even one is below; 1 + 3 * 2^-8: the even one is above.
  const std::vector<float> f32 = {1.0f + 0x1p-8f, 1.0f + 3 * 0x1p-8f, -0.1f, 0x1p-140f};
  const std::vector<uint16_t> f16 = {0x3c00, 0xb555, 0x0001, 0x7bff};  // 1, -1/3, the least subnormal, 65504
  std::string data = "!";                                              // odd addresses
  for (const float x : f32) testing::Append(data, x);
  for (const uint16_t x : f16) testing::Append(data, x);
  for (const int64_t x : {1, 2}) testing::Append(data, x);
  folder.Write("weights.safetensors", testing::Safetensors(Json{{"pad", Entry("U8", {1}, 0, 1)},
                                                                {"f32", Entry("F32", {2, 2}, 1, 17)},
                                                                {"f16", Entry("F16", {4}, 17, 25)},
                                                                {"i64", Entry("I64", {2}, 25, 41)},
                                                                {"cube", Entry("U8", {2, 2, 4}, 25, 25 + 16)}},
                                                           data));
  EXPECT_TRUE(Mentions(ErrorOf([&] { OpenCheckpoint(folder.path()); }), "overlap"));
  folder.Write("weights.safetensors", testing::Safetensors(Json{{"pad", Entry("U8", {1}, 0, 1)},
                                                                {"f32", Entry("F32", {2, 2}, 1, 17)},
                                                                {"f16", Entry("F16", {4}, 17, 25)},
                                                                {"i64", Entry("I64", {2}, 25, 41)},
                                                                {"cube", Entry("F32", {1, 0, 4}, 25, 25)}},
                                                           data));
  const auto checkpoint = OpenCheckpoint(folder.path());
  EXPECT_EQ(checkpoint->NaturalDType("f32"), DType::kF32);
  EXPECT_EQ(checkpoint->NaturalDType("f16"), DType::kF32);
  float values[4];
  uint16_t bits[4];
  checkpoint->Read("f32", 0, 2, 0, 2, DType::kF32, values);
  EXPECT_EQ(std::vector<float>(values, values + 4), f32);
  checkpoint->Read("f32", 0, 2, 0, 2, DType::kBF16, bits);
  EXPECT_EQ(bits[0], 0x3f80);
  EXPECT_EQ(bits[1], 0x3f82);
  EXPECT_EQ(bits[2], 0xbdcd);
  checkpoint->Read("f32", 1, 1, 1, 1, DType::kF32, values);
  EXPECT_EQ(values[0], 0x1p-140f);
  checkpoint->Read("f16", 0, 1, 0, 4, DType::kF32, values);
  EXPECT_EQ(std::vector<float>(values, values + 4), (std::vector<float>{1.0f, -0x1.554p-2f, 0x1p-24f, 65504.0f}));
  checkpoint->Read("f16", 0, 1, 1, 1, DType::kBF16, bits);
  EXPECT_EQ(bits[0], 0xbeab);

  const auto read = [&](const char* name, int64_t row0, int64_t rows, int64_t col0, int64_t cols) {
    return ErrorOf([&] { checkpoint->Read(name, row0, rows, col0, cols, DType::kF32, values); });
  };
  EXPECT_TRUE(Mentions(read("i64", 0, 1, 0, 2), "tensor i64 has type I64"));
  EXPECT_TRUE(Mentions(read("cube", 0, 1, 0, 0), "3 dimensions"));
  EXPECT_TRUE(Mentions(read("none", 0, 1, 0, 2), "tensor none is missing in " + folder.path("weights.safetensors")));
  EXPECT_TRUE(Mentions(ErrorOf([&] { checkpoint->Shape("none"); }), "tensor none is missing"));
  for (const auto& [row0, rows, col0, cols] : std::vector<std::array<int64_t, 4>>{
           {0, 3, 0, 2}, {0, 1, 1, 2}, {-1, 1, 0, 2}, {0, -1, 0, 2}, {3, 0, 0, 2}, {0, 1, 0, INT64_MAX}}) {
    EXPECT_TRUE(Mentions(read("f32", row0, rows, col0, cols), "it has 2 x 2"));
  }
}

// Every half there is, against the definition of the format.
TEST(Convert, EveryHalf) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const int exponent = static_cast<int>(bits >> 10 & 31), mantissa = static_cast<int>(bits & 1023);
    const float got = HalfToFloatFast(static_cast<uint16_t>(bits));
    if (exponent == 31 && mantissa != 0) {
      EXPECT_TRUE(std::isnan(got));
      continue;
    }
    const double magnitude = exponent == 31  ? INFINITY
                             : exponent == 0 ? std::ldexp(mantissa, -24)
                                             : std::ldexp(1024 + mantissa, exponent - 25);
    ASSERT_EQ(got, static_cast<float>(bits & 0x8000 ? -magnitude : magnitude)) << bits;
    ASSERT_EQ(std::signbit(got), bits >= 0x8000);
  }
}

// Every byte, against the definition of the format.
TEST(Convert, EveryFp8) {
  for (int bits = 0; bits < 256; ++bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    const float got = Fp8E4m3ToFloat(static_cast<uint8_t>(bits));
    if (exponent == 15 && mantissa == 7) {
      EXPECT_TRUE(std::isnan(got));
      continue;
    }
    const double magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    ASSERT_EQ(got, static_cast<float>(bits & 0x80 ? -magnitude : magnitude)) << bits;
    ASSERT_EQ(std::signbit(got), bits >= 0x80);
  }
}

// Random bytes with random scales, in slices that no block's edge lines up with.
TEST(Checkpoint, ReadsBlockScaledFp8) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  std::mt19937 random(seed);
  const auto between = [&](int64_t a, int64_t b) { return std::uniform_int_distribution<int64_t>(a, b)(random); };
  for (int round = 0; round < 12; ++round) {
    const int64_t block_rows = round < 4 ? 128 : between(1, 40), block_cols = round < 4 ? 128 : between(1, 40);
    const int64_t rows = between(1, 300), cols = between(1, 300);
    const int64_t scale_rows = (rows + block_rows - 1) / block_rows, scale_cols = (cols + block_cols - 1) / block_cols;
    const bool bf16_scales = round % 2 == 1;  // as Qwen publishes them
    std::string data;
    std::vector<uint8_t> bytes(static_cast<size_t>(rows * cols));
    for (uint8_t& byte : bytes) {
      byte = static_cast<uint8_t>(between(0, 253));
      if ((byte & 0x7f) == 0x7f) byte = 0x81;  // no NaN
      testing::Append(data, byte);
    }
    std::vector<float> scales(static_cast<size_t>(scale_rows * scale_cols));
    for (float& scale : scales) {
      const float exact = std::ldexp(static_cast<float>(between(1, 1 << 20)), -24);
      const bf16 rounded = ToBf16(exact);
      scale = bf16_scales ? ToFloat(rounded) : exact;
      if (bf16_scales) {
        testing::Append(data, rounded.bits);
      } else {
        testing::Append(data, exact);
      }
    }
    const auto end = static_cast<int64_t>(data.size());
    Json config = TinyConfig();
    config["quantization_config"] = {{"quant_method", "fp8"}, {"weight_block_size", {block_rows, block_cols}}};
    const testing::TempFolder folder;
    folder.Write("config.json", config.dump());
    folder.Write("model.safetensors",
                 testing::Safetensors(Json{{"w.weight", Entry("F8_E4M3", {rows, cols}, 0, rows * cols)},
                                           {"w.weight_scale_inv", Entry(bf16_scales ? "BF16" : "F32",
                                                                        {scale_rows, scale_cols}, rows * cols, end)}},
                                      data));
    const auto checkpoint = OpenCheckpoint(folder.path());
    EXPECT_EQ(checkpoint->NaturalDType("w.weight"), DType::kF32);
    for (int slice = 0; slice < 6; ++slice) {
      const int64_t row0 = slice == 0 ? 0 : between(0, rows), n = slice == 0 ? rows : between(0, rows - row0);
      const int64_t col0 = slice == 0 ? 0 : between(0, cols), m = slice == 0 ? cols : between(0, cols - col0);
      std::vector<float> as_f32(static_cast<size_t>(n * m) + 1, -77.0f);
      std::vector<uint16_t> as_bf16(static_cast<size_t>(n * m) + 1, 0xdead);
      checkpoint->Read("w.weight", row0, n, col0, m, DType::kF32, as_f32.data());
      checkpoint->Read("w.weight", row0, n, col0, m, DType::kBF16, as_bf16.data());
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < m; ++j) {
          const int64_t row = row0 + i, col = col0 + j;
          const int byte = bytes[static_cast<size_t>(row * cols + col)];
          const int exponent = byte >> 3 & 15, mantissa = byte & 7;
          const double magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
          const float value = static_cast<float>(byte & 0x80 ? -magnitude : magnitude) *
                              scales[static_cast<size_t>(row / block_rows * scale_cols + col / block_cols)];
          ASSERT_EQ(as_f32[static_cast<size_t>(i * m + j)], value) << row << ", " << col;
          ASSERT_EQ(as_bf16[static_cast<size_t>(i * m + j)], ToBf16(value).bits);
        }
      }
      EXPECT_EQ(as_f32.back(), -77.0f);
      EXPECT_EQ(as_bf16.back(), 0xdead);
    }
  }
}

TEST(Checkpoint, RefusesFp8WithoutItsScales) {
  const testing::TempFolder folder;
  Json config = TinyConfig();
  folder.Write("config.json", config.dump());
  const auto write = [&](const Json& header) {
    folder.Write("model.safetensors", testing::Safetensors(header, std::string(12, '\0')));
  };
  const auto error = [&] {
    return ErrorOf([&] {
      float values[8];
      OpenCheckpoint(folder.path())->Read("a.weight", 0, 2, 0, 4, DType::kF32, values);
    });
  };
  Json header = {{"a.weight", Entry("F8_E4M3", {2, 4}, 0, 8)}, {"a.weight_scale_inv", Entry("F32", {1}, 8, 12)}};
  write(header);
  EXPECT_TRUE(Mentions(error(), "tensor a.weight has type F8_E4M3, but config.json has no quantization_config"));
  config["quantization_config"] = {{"quant_method", "fp8"}, {"weight_block_size", {2, 4}}};
  folder.Write("config.json", config.dump());
  EXPECT_TRUE(Mentions(error(), "tensor a.weight_scale_inv has shape [1]"));
  header["a.weight_scale_inv"]["shape"] = {1, 1};
  write(header);
  EXPECT_EQ(error(), "");
  header["b.weight_scale_inv"] = header["a.weight_scale_inv"];
  header.erase("a.weight_scale_inv");
  write(header);
  EXPECT_TRUE(Mentions(error(), "tensor a.weight_scale_inv is missing in"));
}

// KiB of this process's memory that are pages of the file.
int64_t ResidentKiB(const std::string& path) {
  std::ifstream maps("/proc/self/smaps");
  int64_t total = 0;
  bool of_file = false;
  for (std::string line; std::getline(maps, line);) {
    if (line.find(path) != line.npos) of_file = true;
    if (of_file && line.starts_with("Rss:")) {
      total += std::stoll(line.substr(4));
      of_file = false;
    }
  }
  return total;
}

// Loading must not keep the files in memory beside the weights, whichever way a tensor is read.
TEST(Checkpoint, WhatWasReadLeavesTheProcess) {
  constexpr int64_t kRows = 3072, kCols = 4096;  // 24 MiB of bf16, 12 of FP8
  constexpr int64_t kLimitKiB = 8 << 10;         // a tile, to whole huge pages where the kernel maps those
  const testing::TempFolder folder;
  Json config = TinyConfig();
  config["quantization_config"] = {{"quant_method", "fp8"}, {"weight_block_size", {kRows, kCols}}};
  folder.Write("config.json", config.dump());
  const Json header = {{"a.weight", Entry("BF16", {kRows, kCols}, 0, 2 * kRows * kCols)},
                       {"b.weight", Entry("F8_E4M3", {kRows, kCols}, 2 * kRows * kCols, 3 * kRows * kCols)},
                       {"b.weight_scale_inv", Entry("F32", {1, 1}, 3 * kRows * kCols, 3 * kRows * kCols + 4)}};
  const std::string path =
      folder.Write("model.safetensors", testing::Safetensors(header, std::string(3 * kRows * kCols + 4, '\0')));
  const auto checkpoint = OpenCheckpoint(folder.path());
  std::vector<uint16_t> tile(64 * kCols);
  for (const char* name : {"a.weight", "b.weight"}) {
    for (const int64_t cols : {kCols, kCols / 2}) {
      for (int64_t row = 0; row < kRows; row += 64) {
        checkpoint->Read(name, row, 64, kCols - cols, cols, DType::kBF16, tile.data());
        ASSERT_LE(ResidentKiB(path), kLimitKiB) << name << " row " << row;
      }
    }
  }
}

// A folder of two shards; the tests break one thing each.
struct Sharded {
  testing::TempFolder folder;
  Json index = {{"metadata", {{"total_size", 16}}},
                {"weight_map", {{"a", "one.safetensors"}, {"b", "two.safetensors"}}}};

  Sharded() {
    folder.Write("config.json", TinyConfig().dump());
    std::string a, b;
    for (const float x : {1.0f, 2.0f}) testing::Append(a, x);
    for (const float x : {3.0f, 4.0f}) testing::Append(b, x);
    folder.Write("one.safetensors", testing::Safetensors(Json{{"a", Entry("F32", {2}, 0, 8)}}, a));
    folder.Write("two.safetensors", testing::Safetensors(Json{{"b", Entry("F32", {2}, 0, 8)}}, b));
  }
  void WriteIndex() const { folder.Write("model.safetensors.index.json", index.dump()); }
  std::string Error() const {
    return ErrorOf([&] { OpenCheckpoint(folder.path()); });
  }
};

TEST(Checkpoint, ReadsShardsWithAndWithoutIndex) {
  const Sharded sharded;
  for (const bool with_index : {false, true}) {
    if (with_index) sharded.WriteIndex();
    const auto checkpoint = OpenCheckpoint(sharded.folder.path());
    float values[2];
    checkpoint->Read("b", 0, 1, 0, 2, DType::kF32, values);
    EXPECT_EQ(values[1], 4.0f);
    checkpoint->Read("a", 0, 1, 1, 1, DType::kF32, values);
    EXPECT_EQ(values[0], 2.0f);
    EXPECT_EQ(checkpoint->total_bytes(), 16);
    EXPECT_EQ(checkpoint->config().eos_token_ids, std::vector<int32_t>{2});
    EXPECT_TRUE(Mentions(ErrorOf([&] { checkpoint->Shape("c"); }), "tensor c is missing in the 2 safetensors files"));
  }
}

TEST(Checkpoint, RefusesAWrongIndexNamingTheFile) {
  Sharded sharded;
  sharded.index["weight_map"]["c"] = "two.safetensors";
  sharded.WriteIndex();
  EXPECT_TRUE(Mentions(sharded.Error(), "two.safetensors: has no tensor c"));
  for (const Json& bad : {Json("../two.safetensors"), Json("/two.safetensors"), Json(""), Json(".."), Json(3)}) {
    sharded.index["weight_map"]["c"] = bad;
    sharded.WriteIndex();
    EXPECT_TRUE(Mentions(sharded.Error(), "not the name of a file"));
  }
  sharded.index["weight_map"]["c"] = "three.safetensors";
  sharded.WriteIndex();
  EXPECT_TRUE(Mentions(sharded.Error(), "three.safetensors: is missing"));
  sharded.index.erase("weight_map");
  sharded.WriteIndex();
  EXPECT_TRUE(Mentions(sharded.Error(), "weight_map"));
  sharded.folder.Write("model.safetensors.index.json", "{");
  EXPECT_TRUE(Mentions(sharded.Error(), "model.safetensors.index.json: not JSON"));
}

TEST(Checkpoint, RefusesAnIncompleteFolderNamingTheFile) {
  const Sharded sharded;
  sharded.folder.Write("again.safetensors", testing::ReadAll(sharded.folder.path("one.safetensors")));
  EXPECT_TRUE(Mentions(sharded.Error(), "tensor a is both in"));
  const testing::TempFolder empty;
  EXPECT_TRUE(Mentions(ErrorOf([&] { OpenCheckpoint(empty.path()); }), "config.json: is missing"));
  empty.Write("config.json", "nonsense");
  EXPECT_TRUE(Mentions(ErrorOf([&] { OpenCheckpoint(empty.path()); }), "config.json: not JSON"));
  empty.Write("config.json", TinyConfig().dump());
  EXPECT_TRUE(Mentions(ErrorOf([&] { OpenCheckpoint(empty.path()); }), "no *.safetensors"));
  EXPECT_TRUE(Mentions(ErrorOf([&] { OpenCheckpoint(empty.path("none")); }), "no such file"));
  const std::string text = empty.Write("model.bin", "something");
  EXPECT_TRUE(Mentions(ErrorOf([&] { OpenCheckpoint(text); }), "neither"));
}

TEST(Checkpoint, NamesTheShardThatIsMissing) {
  const Sharded sharded;
  const testing::TempFolder folder;
  folder.Write("config.json", TinyConfig().dump());
  const std::string one = testing::ReadAll(sharded.folder.path("one.safetensors"));
  const std::string two = testing::ReadAll(sharded.folder.path("two.safetensors"));
  const auto error = [&] { return ErrorOf([&] { OpenCheckpoint(folder.path()); }); };
  folder.Write("model-00001-of-00002.safetensors", one);
  EXPECT_TRUE(Mentions(error(), "model-00002-of-00002.safetensors: is missing"));  // without an index, by its name
  folder.Write("model.safetensors.index.json", R"({"weight_map": {"a": "model-00001-of-00002.safetensors",
                                                                  "b": "model-00002-of-00002.safetensors"}})");
  EXPECT_TRUE(Mentions(error(), "model-00002-of-00002.safetensors: is missing"));
  folder.Write("model-00002-of-00002.safetensors", two);
  std::filesystem::remove(folder.path("model.safetensors.index.json"));
  EXPECT_EQ(error(), "");
}

TEST(Checkpoint, MergesOverridesAndGenerationConfig) {
  const Sharded sharded;
  sharded.folder.Write("generation_config.json", R"({"eos_token_id": [2, 9]})");
  const auto checkpoint = OpenCheckpoint(sharded.folder.path(), {{"rope_theta", 5e5}});
  EXPECT_EQ(checkpoint->config().rope.theta, 5e5);
  EXPECT_EQ(checkpoint->config().eos_token_ids, (std::vector<int32_t>{2, 9}));
  EXPECT_TRUE(Mentions(ErrorOf([&] {
                         OpenCheckpoint(sharded.folder.path(), {{"hidden_size", 7}});
                       }),
                       sharded.folder.path() + ": model config: hidden_size = 7"));
}

}  // namespace
}  // namespace weft
