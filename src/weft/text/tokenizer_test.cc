#include "weft/text/tokenizer.h"

#include <gtest/gtest.h>

#include <thread>

#include "weft/core/utf8.h"
#include "weft/text/test_data.h"

namespace weft {
namespace {

using test::Shared;
using Ids = std::vector<int32_t>;

class TokenizerVectors : public testing::TestWithParam<const char*> {};

TEST_P(TokenizerVectors, EncodeAndDecode) {
  const auto tokenizer = Shared(GetParam());
  const auto vectors = test::Vectors(std::string("tokenizer_") + GetParam());
  ASSERT_GE(vectors["encode"].size(), 80u);
  for (const auto& entry : vectors["encode"]) {
    SCOPED_TRACE(entry["name"].get<std::string>());
    const auto text = entry["text"].get<std::string>();
    const Ids ids = entry["ids"];
    EXPECT_EQ(tokenizer->Encode(text, true), ids);
    EXPECT_EQ(tokenizer->Encode(text, false), entry.value("ids_no_special", ids));
  }
  size_t decodes = 0;
  for (const char* kind : {"encode", "decode"}) {
    for (const auto& entry : vectors[kind]) {
      SCOPED_TRACE(entry["name"].get<std::string>());
      const Ids ids = entry["ids"];
      const std::string decoded = entry["decoded"];
      EXPECT_EQ(tokenizer->Decode(ids, false), decoded);
      EXPECT_EQ(tokenizer->Decode(ids, true), entry.value("decoded_skip_special", decoded));
      ++decodes;
    }
  }
  EXPECT_GE(decodes, 110u);
}

TEST_P(TokenizerVectors, TokensAndIds) {
  const auto tokenizer = Shared(GetParam());
  const auto seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  const int32_t size = tokenizer->vocab_size();
  EXPECT_GT(size, 49000);
  int known = 0;
  for (int i = 0; i < 2000; ++i) {
    const auto id = static_cast<int32_t>(random() % static_cast<uint32_t>(size));
    const std::string text = tokenizer->TokenString(id);
    if (text.empty()) continue;
    ++known;
    EXPECT_EQ(tokenizer->TokenId(text), id) << text;
  }
  EXPECT_GT(known, 1900);
  for (const int32_t id : {-1, size, INT32_MAX, INT32_MIN}) {
    EXPECT_EQ(tokenizer->TokenString(id), "") << id;
    EXPECT_EQ(tokenizer->Decode(Ids{id}, false), "") << id;
  }
  EXPECT_EQ(tokenizer->TokenId("no such token"), std::nullopt);
  EXPECT_EQ(tokenizer->Encode("", false), Ids());
  EXPECT_EQ(tokenizer->Decode(Ids(), true), "");
  EXPECT_THROW(tokenizer->Encode("\xff", false), Error);
}

std::string RandomText(std::mt19937& random) {
  const auto below = [&](uint32_t n) { return static_cast<uint32_t>(random()) % n; };
  std::string text;
  const auto append = [&](uint32_t c) {
    if (c < 0x80) {
      text += static_cast<char>(c);
    } else if (c < 0x800) {
      text += static_cast<char>(0xc0 | (c >> 6));
      text += static_cast<char>(0x80 | (c & 63));
    } else if (c < 0x10000) {
      text += static_cast<char>(0xe0 | (c >> 12));
      text += static_cast<char>(0x80 | ((c >> 6) & 63));
      text += static_cast<char>(0x80 | (c & 63));
    } else {
      text += static_cast<char>(0xf0 | (c >> 18));
      text += static_cast<char>(0x80 | ((c >> 12) & 63));
      text += static_cast<char>(0x80 | ((c >> 6) & 63));
      text += static_cast<char>(0x80 | (c & 63));
    }
  };
  for (uint32_t i = 0, n = below(60); i < n; ++i) {
    switch (below(5)) {
      case 0:
        append(0x20 + below(0x5f));
        break;
      case 1:
        append(" \n\t\r 01"[below(7)]);
        break;
      case 2:
        append(0x4e00 + below(0x5000));
        break;
      case 3:
        append(0x1f300 + below(0x300));
        break;
      default:
        append(0xa0 + below(0x2000));
    }
  }
  return text;
}

// Byte-level tokenizers lose nothing. Qwen's normalises to NFC first, once: the second round gives the same.
TEST_P(TokenizerVectors, RandomTextSurvives) {
  const auto tokenizer = Shared(GetParam());
  const auto seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  for (int i = 0; i < 500; ++i) {
    std::string text = RandomText(random);
    ASSERT_TRUE(IsValidUtf8(text));
    if (std::string(GetParam()) == "qwen3") text = tokenizer->Decode(tokenizer->Encode(text, false), false);
    EXPECT_EQ(tokenizer->Decode(tokenizer->Encode(text, false), false), text);
  }
}

// Runs that make regular expressions backtrack: they must neither fail nor be cut differently past some length.
TEST_P(TokenizerVectors, LongRuns) {
  const auto tokenizer = Shared(GetParam());
  for (const char* unit : {" ", "\n", "a", "1", "\t ", "\xe4\xb8\xad", "!"}) {
    std::string text;
    while (text.size() < 100000) text += unit;
    text += "x";
    const Ids ids = tokenizer->Encode(text, false);
    EXPECT_EQ(tokenizer->Decode(ids, false), text) << '"' << unit << '"';
    EXPECT_EQ(tokenizer->TokenId(tokenizer->TokenString(ids.back())), ids.back());
  }
}

TEST_P(TokenizerVectors, ThreadsShareIt) {
  const auto tokenizer = Shared(GetParam());
  const auto vectors = test::Vectors(std::string("tokenizer_") + GetParam());
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0}, done{0};
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      const auto& entries = vectors["encode"];
      for (size_t i = 0; i < entries.size(); ++i) {
        const auto& entry = entries[(i + static_cast<size_t>(t) * 20) % entries.size()];
        const Ids ids = entry["ids"];
        if (tokenizer->Encode(entry["text"].get<std::string>(), true) != ids) ++wrong;
        auto stream = tokenizer->MakeStream(false);
        std::string text;
        for (const int32_t id : ids) text += stream->Push(id);
        text += stream->Flush();
        if (text != entry["decoded"].get<std::string>()) ++wrong;
        ChatTemplateInput chat;
        chat.messages_json = R"([{"role": "user", "content": "Hi"}])";
        const auto prompt = tokenizer->ApplyChatTemplate(chat);
        if (!prompt || prompt->find("Hi") == std::string::npos) ++wrong;
        ++done;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(done, 300);
}

INSTANTIATE_TEST_SUITE_P(All, TokenizerVectors, testing::ValuesIn(test::kTokenizers),
                         [](const auto& param) { return std::string(param.param); });

}  // namespace
}  // namespace weft
