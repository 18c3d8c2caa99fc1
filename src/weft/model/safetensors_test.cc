#include "weft/model/safetensors.h"

#include <gtest/gtest.h>

#include "weft/model/test_files.h"

namespace weft {
namespace {

using testing::Entry;
using testing::ErrorOf;
using testing::Mentions;
using testing::Safetensors;
using Json = nlohmann::json;

const std::string kData(24, 'x');

std::string OpenError(const std::string& content) {
  const testing::TempFolder folder;
  const std::string path = folder.Write("a.safetensors", content);
  const std::string error = ErrorOf([&] { SafetensorsFile file(path); });
  if (!error.empty()) {
    EXPECT_TRUE(Mentions(error, "a.safetensors"));
  }
  return error;
}

TEST(Safetensors, ReadsValuesShapesAndTypes) {
  const testing::TempFolder folder;
  std::string data;
  for (const float x : {1.5f, -2.0f, 3.25f, 4.0f, 5.0f, -6.5f}) testing::Append(data, x);
  for (const int64_t x : {int64_t{7}, int64_t{-8}}) testing::Append(data, x);
  const std::string path = folder.Write("a.safetensors", Safetensors(Json{{"__metadata__", {{"format", "pt"}}},
                                                                          {"m", Entry("F32", {2, 3}, 0, 24)},
                                                                          {"i", Entry("I64", {2}, 24, 40)},
                                                                          {"odd", Entry("F4", {3}, 40, 40)},
                                                                          {"empty", Entry("F16", {0, 5}, 40, 40)}},
                                                                     data));
  const SafetensorsFile file(path);
  EXPECT_EQ(file.tensors().size(), 4u);
  EXPECT_EQ(file.Get("m").shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(file.Get("m").type(), DType::kF32);
  EXPECT_EQ(file.Values<float>("m"), (std::vector<float>{1.5f, -2.0f, 3.25f, 4.0f, 5.0f, -6.5f}));
  EXPECT_EQ(file.Values<int64_t>("i"), (std::vector<int64_t>{7, -8}));
  EXPECT_TRUE(file.Values<uint16_t>("empty").empty());
  EXPECT_EQ(file.Get("odd").type(), std::nullopt);
  EXPECT_EQ(file.Find("none"), nullptr);
  EXPECT_TRUE(Mentions(ErrorOf([&] { file.Get("none"); }), "none"));
  EXPECT_TRUE(Mentions(ErrorOf([&] { file.Values<uint16_t>("m"); }), "tensor m of F32"));
}

TEST(Safetensors, RefusesABrokenFrame) {
  EXPECT_TRUE(Mentions(OpenError(""), "too few"));
  EXPECT_TRUE(Mentions(OpenError("1234567"), "too few"));
  EXPECT_TRUE(Mentions(OpenError(std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10)), "does not fit"));
  EXPECT_TRUE(Mentions(OpenError(std::string("\x03\0\0\0\0\0\0\0{}", 10)), "does not fit"));
  EXPECT_EQ(OpenError(std::string("\x02\0\0\0\0\0\0\0{}", 10)), "");
  EXPECT_TRUE(Mentions(OpenError(Safetensors(std::string("{\"a\":"), kData)), "not JSON"));
  EXPECT_TRUE(Mentions(OpenError(Safetensors(std::string("[]"), kData)), "not a JSON object"));
  EXPECT_TRUE(Mentions(OpenError(Safetensors(std::string(100000, '['), kData)), "not JSON"));
  EXPECT_TRUE(Mentions(OpenError(Safetensors(std::string(R"({"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},)"
                                                         R"("a":{"dtype":"U8","shape":[8],"data_offsets":[8,16]}})"),
                                             kData)),
                       "tensor a twice"));
}

TEST(Safetensors, RefusesWrongEntries) {
  const auto error = [](const Json& entry) {
    return OpenError(Safetensors(Json{{"good", Entry("F32", {2}, 0, 8)}, {"bad", entry}}, kData));
  };
  EXPECT_EQ(error(Entry("F32", {2, 2}, 8, 24)), "");  // the pattern itself is right
  constexpr auto kSize = "is not a size", kInside = "are not inside", kBytes = "does not take";
  EXPECT_TRUE(Mentions(error(Json(3)), "tensor bad"));
  EXPECT_TRUE(Mentions(error(Json{{"dtype", "F32"}, {"shape", {2}}}), "data_offsets"));
  EXPECT_TRUE(Mentions(error(Json{{"dtype", 1}, {"shape", {2}}, {"data_offsets", {8, 16}}}), "tensor bad"));
  EXPECT_TRUE(Mentions(error(Json{{"dtype", "F32"}, {"shape", 2}, {"data_offsets", {8, 16}}}), "tensor bad"));
  EXPECT_TRUE(Mentions(error(Json{{"dtype", "F32"}, {"shape", {2}}, {"data_offsets", {8}}}), "data_offsets"));
  EXPECT_TRUE(Mentions(error(Entry("F32", {-2}, 8, 16)), kSize));
  EXPECT_TRUE(Mentions(error(Entry("F32", {2.0}, 8, 16)), kSize));
  EXPECT_TRUE(Mentions(error(Entry("F32", {"2"}, 8, 16)), kSize));
  EXPECT_TRUE(Mentions(error(Entry("F32", {2}, -8, 0)), kSize));
  EXPECT_TRUE(Mentions(error(Entry("F32", {2}, 8, uint64_t{1} << 63)), kSize));
  EXPECT_TRUE(Mentions(error(Entry("F32", {2}, 16, 8)), kInside));
  EXPECT_TRUE(Mentions(error(Entry("F32", {2}, 24, 32)), kInside));  // behind the end
  EXPECT_TRUE(Mentions(error(Entry("F32", {4}, 16, 32)), kInside));  // truncated
  EXPECT_TRUE(Mentions(error(Entry("U8", {8}, int64_t{1} << 62, (int64_t{1} << 62) + 8)), kInside));
  EXPECT_TRUE(Mentions(error(Entry("F32", {3}, 8, 16)), kBytes));
  EXPECT_TRUE(Mentions(error(Entry("F32", {int64_t{1} << 62, 4}, 8, 8)), kBytes));      // 4 * 2^64 = 0 in 64 bits
  EXPECT_TRUE(Mentions(error(Entry("F32", {(int64_t{1} << 62) + 2}, 8, 16)), kBytes));  // = 8 in 64 bits
  EXPECT_TRUE(Mentions(error(Entry("F32", {2}, 4, 12)), "tensors good and bad overlap"));
  EXPECT_TRUE(Mentions(error(Entry("F32", {2}, 0, 8)), "overlap"));
}

TEST(Safetensors, RefusesEveryTruncationOfARealFile) {
  const testing::TempFolder folder;
  const std::string whole = testing::ReadAll(WEFT_TEST_DATA "/models/llama_llama3/model.safetensors");
  ASSERT_EQ(OpenError(whole), "");
  for (size_t n = 0; n < whole.size(); n += n < 64 ? 1 : whole.size() / 40) {
    EXPECT_NE(OpenError(whole.substr(0, n)), "") << n << " bytes of " << whole.size();
  }
  EXPECT_NE(OpenError(whole.substr(0, whole.size() - 1)), "");
}

}  // namespace
}  // namespace weft
