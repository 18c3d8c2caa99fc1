#include "weft/core/gguf_metadata.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "weft/core/error.h"
#include "weft/core/utf8.h"

namespace weft {
namespace {

using Bytes = std::string;

template <typename T>
void Put(Bytes& out, T value) {
  char raw[sizeof(T)];
  std::memcpy(raw, &value, sizeof(T));
  out.append(raw, sizeof(T));
}

void PutString(Bytes& out, const std::string& text) {
  Put<uint64_t>(out, text.size());
  out += text;
}

template <typename T>
Bytes Scalar(uint32_t type, T value) {
  Bytes out;
  Put(out, type);
  Put(out, value);
  return out;
}

Bytes Text(const std::string& text) {
  Bytes out;
  Put<uint32_t>(out, 8);
  PutString(out, text);
  return out;
}

struct Tensor {
  std::string name;
  std::vector<uint64_t> dims;
  uint32_t type;
  uint64_t offset;
};

// A GGUF file from its parts; `data` are the bytes behind the aligned header.
struct Builder {
  uint32_t version = 3;
  std::vector<std::pair<std::string, Bytes>> keys;
  std::vector<Tensor> tensors;
  size_t alignment = 32;
  Bytes data;
  std::optional<uint64_t> key_count, tensor_count;

  Bytes Build() const {
    Bytes out = "GGUF";
    Put(out, version);
    Put<uint64_t>(out, tensor_count.value_or(tensors.size()));
    Put<uint64_t>(out, key_count.value_or(keys.size()));
    for (const auto& [key, value] : keys) {
      PutString(out, key);
      out += value;
    }
    for (const Tensor& t : tensors) {
      PutString(out, t.name);
      Put<uint32_t>(out, static_cast<uint32_t>(t.dims.size()));
      for (const uint64_t d : t.dims) Put(out, d);
      Put(out, t.type);
      Put(out, t.offset);
    }
    if (!data.empty()) out.resize((out.size() + alignment - 1) / alignment * alignment);
    return out + data;
  }
};

class GgufMetadata : public testing::Test {
 protected:
  GgufMetadata()
      : path_((std::filesystem::temp_directory_path() / fmt::format("weft_gguf_{}.gguf", getpid())).string()) {}
  ~GgufMetadata() override { std::filesystem::remove(path_); }

  GgufFile Open(const Bytes& bytes) {
    std::ofstream(path_, std::ios::binary | std::ios::trunc).write(bytes.data(), static_cast<long>(bytes.size()));
    return GgufFile::Open(path_);
  }

  void ExpectRefused(const Bytes& bytes, const std::string& part) {
    try {
      Open(bytes);
      ADD_FAILURE() << "accepted, but should say: " << part;
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
      EXPECT_NE(std::string(e.what()).find(path_), std::string::npos) << e.what();
    }
  }

  std::string path_;
};

template <typename F>
void ExpectError(F&& call, const std::string& part) {
  try {
    call();
    ADD_FAILURE() << "no error, but should say: " << part;
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

TEST_F(GgufMetadata, ReadsEveryType) {
  Builder b;
  b.keys = {{"u8", Scalar<uint8_t>(0, 200)},           {"i8", Scalar<int8_t>(1, -5)},
            {"u16", Scalar<uint16_t>(2, 60000)},       {"i16", Scalar<int16_t>(3, -300)},
            {"u32", Scalar<uint32_t>(4, 4000000000u)}, {"i32", Scalar<int32_t>(5, -70000)},
            {"f32", Scalar<float>(6, 1.5f)},           {"bool", Scalar<uint8_t>(7, 1)},
            {"string", Text("gr\xc3\xbc\xc3\x9f")},    {"u64", Scalar<uint64_t>(10, UINT64_MAX)},
            {"i64", Scalar<int64_t>(11, INT64_MIN)},   {"f64", Scalar<double>(12, 1e300)},
            {"bad_bool", Scalar<uint8_t>(7, 2)},       {"bad_text", Text("\xff\xfe")}};
  Bytes strings;
  Put<uint32_t>(strings, 9);
  Put<uint32_t>(strings, 8);
  Put<uint64_t>(strings, 3);
  for (const char* s : {"a", "", "\xe4\xb8\xad"}) PutString(strings, s);
  b.keys.emplace_back("strings", strings);
  Bytes ints;
  Put<uint32_t>(ints, 9);
  Put<uint32_t>(ints, 3);
  Put<uint64_t>(ints, 2);
  Put<int16_t>(ints, -1);
  Put<int16_t>(ints, 7);
  b.keys.emplace_back("ints", ints);
  Bytes floats;
  Put<uint32_t>(floats, 9);
  Put<uint32_t>(floats, 6);
  Put<uint64_t>(floats, 2);
  Put<float>(floats, 0.25f);
  Put<float>(floats, -3.0f);
  b.keys.emplace_back("floats", floats);
  b.keys.emplace_back("general.alignment", Scalar<uint32_t>(4, 64));
  b.alignment = 64;
  b.tensors = {{"a", {3, 2}, 0, 0}, {"b", {64, 5}, 2, 64}};
  b.data = Bytes(64 + 5 * 2 * 18, '\x2a');

  GgufFile first = Open(b.Build());
  const GgufFile file = std::move(first);
  EXPECT_EQ(file.version(), 3u);
  EXPECT_EQ(file.keys().size(), b.keys.size());
  EXPECT_EQ(file.keys()[8], "string");
  EXPECT_EQ(file.GetU64("u8"), 200u);
  EXPECT_EQ(file.GetI64("i8"), -5);
  EXPECT_EQ(file.GetU64("u16"), 60000u);
  EXPECT_EQ(file.GetI64("i16"), -300);
  EXPECT_EQ(file.GetU64("u32"), 4000000000u);
  EXPECT_EQ(file.GetI64("i32"), -70000);
  EXPECT_EQ(file.GetF64("f32"), 1.5);
  EXPECT_EQ(file.GetBool("bool"), true);
  EXPECT_EQ(file.GetString("string"), "gr\xc3\xbc\xc3\x9f");
  EXPECT_EQ(file.GetU64("u64"), UINT64_MAX);
  EXPECT_EQ(file.GetI64("i64"), INT64_MIN);
  EXPECT_EQ(file.GetF64("f64"), 1e300);
  EXPECT_EQ(file.GetF64("u8"), 200.0);
  EXPECT_EQ(file.GetStringArray("strings"), (std::vector<std::string_view>{"a", "", "\xe4\xb8\xad"}));
  EXPECT_EQ(file.GetI64Array("ints"), (std::vector<int64_t>{-1, 7}));
  EXPECT_EQ(file.GetF32Array("floats"), (std::vector<float>{0.25f, -3.0f}));
  EXPECT_TRUE(file.IsArray("ints"));
  EXPECT_FALSE(file.IsArray("u8"));
  EXPECT_FALSE(file.Has("none"));
  EXPECT_EQ(file.GetU64("none"), std::nullopt);
  EXPECT_EQ(file.GetStringArray("none"), std::nullopt);

  ExpectError([&] { file.RequireU64("none"); }, "key \"none\" is missing");
  ExpectError([&] { file.GetU64("i8"); }, "-5 must not be negative");
  ExpectError([&] { file.GetI64("u64"); }, "18446744073709551615 is beyond");
  ExpectError([&] { file.GetU64("f32"); }, "key \"f32\" is of type float32, wanted is an unsigned integer");
  ExpectError([&] { file.GetString("u8"); }, "is of type uint8, wanted is a string");
  ExpectError([&] { file.GetU64("ints"); }, "is an array of int16");
  ExpectError([&] { file.GetStringArray("string"); }, "wanted is an array of strings");
  ExpectError([&] { file.GetF32Array("ints"); }, "wanted is an array of floats");
  ExpectError([&] { file.GetBool("bad_bool"); }, "a boolean is 0 or 1, this is 2");
  ExpectError([&] { file.GetString("bad_text"); }, "\"\\xff\\xfe\" is not UTF-8");

  ASSERT_EQ(file.tensors().size(), 2u);
  EXPECT_EQ(file.alignment(), 64u);
  EXPECT_EQ(file.data_offset() % 64, 0u);
  const GgufTensorInfo* t = file.FindTensor("b");
  ASSERT_NE(t, nullptr);
  EXPECT_EQ(t->dims, (std::vector<uint64_t>{64, 5}));
  EXPECT_STREQ(t->type.name, "Q4_0");
  EXPECT_EQ(t->elements, 320u);
  EXPECT_EQ(t->bytes, 180u);
  EXPECT_EQ(t->data[179], 0x2a);
  EXPECT_EQ(file.FindTensor("c"), nullptr);
}

TEST_F(GgufMetadata, MalformedFilesAreNamed) {
  EXPECT_THROW(GgufFile::Open("/nonexistent/x.gguf"), Error);
  ExpectError([] { GgufFile::Open("/"); }, "/");
  ExpectRefused("", "not a GGUF file: 0 bytes");
  ExpectRefused(Bytes("PK\x03\x04", 4) + Bytes(60, '\0'), "begins with \"PK\\x03\\x04\"");
  Builder b;
  b.version = 1;
  ExpectRefused(b.Build(), "GGUF version 1");
  b.version = 0x03000000;
  ExpectRefused(b.Build(), "big-endian");
  b.version = 3;
  b.key_count = uint64_t{1} << 60;
  ExpectRefused(b.Build(), "1152921504606846976 keys cannot fit");
  b.key_count = 1;
  ExpectRefused(b.Build(), "1 keys cannot fit");
  b.key_count.reset();
  b.tensor_count = UINT64_MAX;
  ExpectRefused(b.Build(), "18446744073709551615 tensors cannot fit");
  b.tensor_count.reset();

  const auto with_key = [](const std::string& key, const Bytes& value) {
    Builder k;
    k.keys = {{key, value}};
    return k.Build();
  };
  ExpectRefused(with_key("k", Scalar<uint32_t>(13, 0)), "key \"k\": unknown value type 13");
  ExpectRefused(with_key("\xc0\x80", Scalar<uint32_t>(4, 0)), "is not UTF-8");
  ExpectRefused(with_key("", Scalar<uint32_t>(4, 0)), "has no name");
  ExpectRefused(with_key(Bytes(70000, 'k'), Scalar<uint32_t>(4, 0)), "70000 bytes long");
  ExpectRefused(with_key("k", Scalar<uint64_t>(8, uint64_t{1} << 63)), "a string of 9223372036854775808 bytes");
  Bytes array;
  Put<uint32_t>(array, 9);
  Put<uint32_t>(array, 10);
  Put<uint64_t>(array, (uint64_t{1} << 61) + 1);  // times 8 bytes wraps around to 8
  ExpectRefused(with_key("k", array + Bytes(8, '\0')), "key \"k\": 2305843009213693953 elements of type uint64");
  array.clear();
  Put<uint32_t>(array, 9);
  Put<uint32_t>(array, 9);
  Put<uint64_t>(array, 0);
  ExpectRefused(with_key("k", array), "arrays of arrays");
  Builder twice;
  twice.keys = {{"k", Text("1")}, {"k", Text("2")}};
  ExpectRefused(twice.Build(), "key \"k\" occurs twice");
  for (const uint32_t alignment : {0u, 3u, 0x80000000u}) {
    ExpectRefused(with_key("general.alignment", Scalar<uint32_t>(4, alignment)), "general.alignment");
  }

  const auto with_tensor = [](const Tensor& tensor, size_t bytes = 64) {
    Builder t;
    t.tensors = {tensor};
    t.data = Bytes(bytes, '\0');
    return t.Build();
  };
  Open(with_tensor({"t", {16}, 0, 0}));
  ExpectRefused(with_tensor({"t", {17}, 0, 0}), "tensor \"t\": 68 bytes at offset 0");
  ExpectRefused(with_tensor({"t", {16}, 0, 32}), "64 bytes at offset 32 of the data exceed the file");
  ExpectRefused(with_tensor({"t", {1}, 0, UINT64_MAX - 31}), "exceed the file");
  ExpectRefused(with_tensor({"t", {1}, 0, 4}), "offset 4 is not a multiple of the alignment 32");
  ExpectRefused(with_tensor({"t", {uint64_t{1} << 32, uint64_t{1} << 32}, 0, 0}), "its dimensions overflow");
  ExpectRefused(with_tensor({"t", {uint64_t{1} << 62}, 0, 0}), "its size of 4611686018427387904 elements overflows");
  ExpectRefused(with_tensor({"t", {0, 4}, 0, 0}), "dimension 0 is 0");
  ExpectRefused(with_tensor({"t", {}, 0, 0}), "has 0 dimensions");
  ExpectRefused(with_tensor({"t", {1, 1, 1, 1, 1}, 0, 0}), "has 5 dimensions");
  ExpectRefused(with_tensor({"t", {1}, 4, 0}), "unknown type 4");
  ExpectRefused(with_tensor({"t", {33}, 8, 0}), "rows of 33 elements do not divide into Q8_0 blocks of 32");
  ExpectRefused(with_tensor({"\xff", {1}, 0, 0}), "\"\\xff\" is not UTF-8");
  Builder both;
  both.tensors = {{"t", {1}, 0, 0}, {"t", {1}, 0, 32}};
  both.data = Bytes(64, '\0');
  ExpectRefused(both.Build(), "tensor \"t\" occurs twice");
  // A file without data ends where its header ends.
  EXPECT_TRUE(Open(Builder().Build()).tensors().empty());
}

// Asks for everything in every way; only weft::Error may come out.
void Visit(const GgufFile& file) {
  const auto ask = [](auto&& call) {
    try {
      call();
    } catch (const Error&) {
    }
  };
  for (const std::string& key : file.keys()) {
    ask([&] { file.GetString(key); });
    ask([&] { file.GetU64(key); });
    ask([&] { file.GetI64(key); });
    ask([&] { file.GetF64(key); });
    ask([&] { file.GetBool(key); });
    ask([&] { file.GetStringArray(key); });
    ask([&] { file.GetI64Array(key); });
    ask([&] { file.GetF32Array(key); });
  }
  unsigned sum = 0;
  for (const GgufTensorInfo& t : file.tensors()) sum += t.data[0] + t.data[t.bytes - 1];
  EXPECT_GE(sum, 0u);
}

TEST_F(GgufMetadata, MutatedFilesNeverLeaveTheMapping) {
  const auto seed = std::random_device()();
  std::mt19937_64 random(seed);
  int refused = 0, accepted = 0;
  for (const char* name : {"blocks.gguf", "llama-Q4_0.gguf"}) {
    std::ifstream in(std::string(WEFT_TEST_DATA) + "/gguf/" + name, std::ios::binary);
    const Bytes original((std::istreambuf_iterator<char>(in)), {});
    ASSERT_FALSE(original.empty()) << name;
    const GgufFile whole = Open(original);
    Visit(whole);
    const size_t header = whole.data_offset();
    for (int round = 0; round < 1500; ++round) {
      Bytes bytes = original;
      const int kind = static_cast<int>(random() % 4);
      if (kind == 0) {  // cut anywhere, most often in the header
        bytes.resize(random() % (random() % 2 ? header : bytes.size()));
      } else if (kind == 1) {  // single bytes
        for (size_t i = 0, n = 1 + random() % 4; i < n; ++i) bytes[random() % header] = static_cast<char>(random());
      } else if (kind == 2) {  // a 64-bit field of an extreme value
        const uint64_t extremes[] = {0, 1, UINT64_MAX, uint64_t{1} << 63, uint64_t{1} << 61, bytes.size(), random()};
        const uint64_t value = extremes[random() % std::size(extremes)];
        std::memcpy(bytes.data() + 8 + random() % (header - 16), &value, 8);
      } else {  // a piece taken out or doubled
        const size_t at = random() % header, length = 1 + random() % 16;
        random() % 2 ? bytes.erase(at, length) : bytes.insert(at, bytes.substr(at, length));
      }
      try {
        Visit(Open(bytes));
        ++accepted;
      } catch (const Error& e) {
        EXPECT_NE(std::string(e.what()).find(path_), std::string::npos) << e.what();
        ++refused;
      } catch (const std::exception& e) {
        ADD_FAILURE() << e.what() << ": seed " << seed << " round " << round;
      }
    }
  }
  EXPECT_GT(refused, 500) << "seed " << seed;
  EXPECT_GT(accepted, 100) << "seed " << seed;
}

TEST(Utf8, Table) {
  for (const char* good : {"", "a", "\xc2\x80", "\xdf\xbf", "\xe0\xa0\x80", "\xed\x9f\xbf", "\xee\x80\x80",
                           "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf"}) {
    EXPECT_TRUE(IsValidUtf8(good)) << good;
  }
  for (const char* bad :
       {"\x80", "\xc0\x80", "\xc1\xbf", "\xc2", "\xc2\x41", "\xe0\x9f\xbf", "\xed\xa0\x80", "\xe4\xb8",
        "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xff", "a\xe4\xb8z"}) {
    EXPECT_FALSE(IsValidUtf8(bad)) << bad;
  }
}

}  // namespace
}  // namespace weft
