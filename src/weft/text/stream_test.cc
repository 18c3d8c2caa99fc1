#include <gtest/gtest.h>

#include "weft/core/utf8.h"
#include "weft/text/test_data.h"

namespace weft {
namespace {

using test::Shared;
using Ids = std::vector<int32_t>;

constexpr size_t kMaxHeldTokens = 16;

class Streams : public testing::TestWithParam<const char*> {
 protected:
  // GPT-2's character of each byte, as the tokens of single bytes are spelled.
  Ids ByteTokens() {
    Ids out(256);
    uint32_t next = 256;
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const bool itself = (byte >= 33 && byte < 127) || (byte >= 161 && byte < 173) || byte >= 174;
      const uint32_t c = itself ? byte : next++;
      std::string text;
      if (c < 0x80) {
        text += static_cast<char>(c);
      } else {
        text += static_cast<char>(0xc0 | (c >> 6));
        text += static_cast<char>(0x80 | (c & 63));
      }
      const auto id = Shared(GetParam())->TokenId(text);
      // SmolLM2 lacks the bytes that no UTF-8 text holds.
      out[byte] = id.value_or(-1);
    }
    return out;
  }
};

TEST_P(Streams, PiecesAreThoseOfTheVectors) {
  const auto tokenizer = Shared(GetParam());
  const auto vectors = test::Vectors(std::string("tokenizer_") + GetParam());
  int compared = 0, flushed = 0;
  for (const char* kind : {"encode", "decode"}) {
    for (const auto& entry : vectors[kind]) {
      SCOPED_TRACE(entry["name"].get<std::string>());
      const Ids ids = entry["ids"];
      for (const bool skip : {false, true}) {
        const auto pieces = skip ? entry.value("pieces_skip_special", entry["pieces"]) : entry["pieces"];
        const std::string decoded = skip ? entry.value("decoded_skip_special", entry["decoded"]) : entry["decoded"];
        const auto stream = tokenizer->MakeStream(skip);
        std::string text;
        for (size_t i = 0; i < ids.size(); ++i) {
          const std::string piece = stream->Push(ids[i]);
          EXPECT_EQ(piece, pieces[i].is_null() ? "" : pieces[i].get<std::string>()) << "token " << i;
          EXPECT_TRUE(IsValidUtf8(piece));
          text += piece;
          ++compared;
        }
        const std::string rest = stream->Flush();
        flushed += !rest.empty();
        EXPECT_EQ(text + rest, decoded);
      }
    }
  }
  EXPECT_GT(compared, 1000);
  EXPECT_GT(flushed, 3);
}

// Feeds ids and checks: valid pieces, nothing held for too long, pieces and rest are the whole text.
void CheckStream(const Tokenizer& tokenizer, const Ids& ids, bool skip) {
  const auto stream = tokenizer.MakeStream(skip);
  std::string text;
  Ids loud;  // those that give text
  for (size_t i = 0; i < ids.size(); ++i) {
    const std::string piece = stream->Push(ids[i]);
    ASSERT_TRUE(IsValidUtf8(piece)) << "token " << i;
    text += piece;
    if (!tokenizer.Decode(std::span(ids).subspan(i, 1), skip).empty()) loud.push_back(ids[i]);
    if (loud.size() <= kMaxHeldTokens) continue;
    // What the tokens before the last 16 say must be out, but for a last character that may be unfinished.
    const auto before = std::span(loud).first(loud.size() - kMaxHeldTokens);
    ASSERT_GE(text.size() + 3, tokenizer.Decode(before, skip).size()) << "token " << i;
  }
  text += stream->Flush();
  ASSERT_EQ(text, tokenizer.Decode(ids, skip));
  EXPECT_EQ(stream->Flush(), "");
}

TEST_P(Streams, RandomIds) {
  const auto tokenizer = Shared(GetParam());
  const auto seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  const auto size = static_cast<uint32_t>(tokenizer->vocab_size());
  for (int round = 0; round < 150; ++round) {
    Ids ids(random() % 80);
    for (int32_t& id : ids) id = static_cast<int32_t>(random() % (size + 100));
    CheckStream(*tokenizer, ids, round % 2 == 0);
    if (HasFatalFailure()) return;
  }
}

TEST_P(Streams, RandomBytes) {
  const auto tokenizer = Shared(GetParam());
  const Ids byte_tokens = ByteTokens();
  const auto seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  const std::string good = "a\xc3\xa9\xe4\xb8\xad\xf0\x9f\x98\x80\xef\xbf\xbd ";
  const std::vector<int32_t> specials = tokenizer->eos_token_ids();
  ASSERT_FALSE(specials.empty());
  for (int round = 0; round < 300; ++round) {
    Ids ids;
    while (ids.size() < 60) {
      switch (random() % 5) {
        case 0:  // whole characters
          for (const char c : good) ids.push_back(byte_tokens[static_cast<uint8_t>(c)]);
          break;
        case 1:  // any byte
          ids.push_back(byte_tokens[random() % 256]);
          break;
        case 2:  // continuation bytes alone
          for (size_t i = 0, n = 1 + random() % 30; i < n; ++i) ids.push_back(byte_tokens[0x80 + random() % 64]);
          break;
        case 3:  // beginnings alone
          for (size_t i = 0, n = 1 + random() % 8; i < n; ++i) ids.push_back(byte_tokens[0xc2 + random() % 51]);
          break;
        default:
          ids.push_back(specials[0]);
      }
    }
    CheckStream(*tokenizer, ids, round % 2 == 0);
    if (HasFatalFailure()) return;
  }
}

TEST_P(Streams, EndlessInvalidBytesComeOut) {
  const auto tokenizer = Shared(GetParam());
  const Ids byte_tokens = ByteTokens();
  for (const int byte : {0x80, 0xbf, 0xe4, 0xf0}) {
    const int32_t id = byte_tokens[static_cast<size_t>(byte)];
    if (id < 0) continue;
    const auto stream = tokenizer->MakeStream(true);
    size_t characters = 0;
    for (size_t i = 1; i <= 5000; ++i) {
      const std::string piece = stream->Push(id);
      ASSERT_EQ(piece.size() % 3, 0u);
      for (size_t at = 0; at < piece.size(); at += 3) ASSERT_EQ(piece.substr(at, 3), "\xef\xbf\xbd");
      characters += piece.size() / 3;
      if (i > kMaxHeldTokens) {
        ASSERT_GE(characters + kMaxHeldTokens, i);
      }
    }
    characters += stream->Flush().size() / 3;
    EXPECT_EQ(characters, 5000u) << byte;
  }
}

// Tokens that give no text (skipped specials, ids outside the vocabulary) are not kept.
TEST_P(Streams, SilentTokens) {
  const auto tokenizer = Shared(GetParam());
  const auto stream = tokenizer->MakeStream(true);
  const Ids hello = tokenizer->Encode("Hello", false);
  std::string text;
  for (const int32_t id : hello) text += stream->Push(id);
  const int32_t eos = tokenizer->eos_token_ids().at(0);
  for (int i = 0; i < 20000; ++i) {
    EXPECT_EQ(stream->Push(eos), "");
    EXPECT_EQ(stream->Push(-1), "");
    EXPECT_EQ(stream->Push(tokenizer->vocab_size()), "");
  }
  for (const int32_t id : hello) text += stream->Push(id);
  EXPECT_EQ(text + stream->Flush(), "HelloHello");
  EXPECT_EQ(stream->Flush(), "");
}

// The stream keeps what it needs of the tokenizer.
TEST(Stream, OutlivesTheTokenizer) {
  auto tokenizer = LoadTokenizer(test::TokenizerPath("smollm2"));
  const Ids ids = tokenizer->Encode("one \xe4\xb8\xad", false);
  const auto stream = tokenizer->MakeStream(false);
  tokenizer.reset();
  std::string text;
  for (const int32_t id : ids) text += stream->Push(id);
  EXPECT_EQ(text + stream->Flush(), "one \xe4\xb8\xad");
}

INSTANTIATE_TEST_SUITE_P(All, Streams, testing::ValuesIn(test::kTokenizers),
                         [](const auto& param) { return std::string(param.param); });

}  // namespace
}  // namespace weft
