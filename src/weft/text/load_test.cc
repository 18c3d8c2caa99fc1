#include <gtest/gtest.h>

#include <cstring>

#include "weft/text/test_data.h"

namespace weft {
namespace {

using test::Shared;
using test::TempFolder;
using Ids = std::vector<int32_t>;
using nlohmann::json;

template <typename F>
void ExpectError(F&& call, const std::string& part) {
  try {
    call();
    ADD_FAILURE() << "no error, but should say: " << part;
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

TEST(Load, SpecialTokensOfTheFiles) {
  const auto smollm2 = Shared("smollm2");
  EXPECT_EQ(smollm2->bos_token_id(), 1);
  EXPECT_EQ(smollm2->eos_token_ids(), Ids{2});
  EXPECT_EQ(smollm2->vocab_size(), 49152);
  EXPECT_EQ(smollm2->TokenString(2), "<|im_end|>");
  const auto qwen3 = Shared("qwen3");
  EXPECT_EQ(qwen3->bos_token_id(), std::nullopt);
  EXPECT_EQ(qwen3->eos_token_ids(), Ids{151645});
  EXPECT_EQ(qwen3->vocab_size(), 151669);
  const auto deepseek = Shared("deepseek_v3");
  EXPECT_EQ(deepseek->bos_token_id(), 0);
  EXPECT_EQ(deepseek->eos_token_ids(), Ids{1});
  const auto llama = Shared("llama3_1");
  EXPECT_EQ(llama->bos_token_id(), 128000);
  EXPECT_EQ(llama->eos_token_ids(), Ids{128009});
}

// A byte-level tokenizer of 256 bytes, "ab" and two special tokens, with truncation and padding left in.
json SmallTokenizer() {
  json vocab = json::object();
  int id = 0;
  for (const char* c : {"a", "b", "c", "ab", "\xc4\xa0"}) vocab[c] = id++;
  const auto special = [&](int token, const char* text, bool is_special) {
    return json{{"id", token},     {"content", text},     {"single_word", false}, {"lstrip", false},
                {"rstrip", false}, {"normalized", false}, {"special", is_special}};
  };
  return {
      {"version", "1.0"},
      {"truncation", {{"max_length", 4}, {"strategy", "LongestFirst"}, {"stride", 0}, {"direction", "Right"}}},
      {"padding",
       {{"strategy", {{"Fixed", 9}}},
        {"direction", "Right"},
        {"pad_to_multiple_of", nullptr},
        {"pad_id", 0},
        {"pad_type_id", 0},
        {"pad_token", "a"}}},
      {"added_tokens", {special(5, "<s>", true), special(6, "<tool>", false)}},
      {"normalizer", nullptr},
      {"pre_tokenizer",
       {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}}},
      {"post_processor", nullptr},
      {"decoder", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}}},
      {"model",
       {{"type", "BPE"},
        {"dropout", nullptr},
        {"unk_token", nullptr},
        {"continuing_subword_prefix", nullptr},
        {"end_of_word_suffix", nullptr},
        {"fuse_unk", false},
        {"byte_fallback", false},
        {"vocab", vocab},
        {"merges", {"a b"}}}}};
}

ChatTemplateInput Hello() {
  ChatTemplateInput input;
  input.messages_json = R"([{"role": "user", "content": "c"}])";
  return input;
}

TEST(Load, HfFolder) {
  const TempFolder folder;
  ExpectError([&] { LoadTokenizer(folder.path() + "/none"); }, "no such file");
  ExpectError([&] { LoadTokenizer(folder.path()); }, "--skip-tokenizer-init");
  folder.Write("tokenizer.json", SmallTokenizer().dump());
  auto tokenizer = LoadTokenizer(folder.path());
  EXPECT_EQ(tokenizer->Encode("ababc <s>a<tool>", true), (Ids{3, 3, 2, 4, 5, 0, 6}));  // neither cut nor padded
  EXPECT_EQ(tokenizer->Encode("a", true), Ids{0});
  EXPECT_EQ(tokenizer->Decode(Ids{5, 3, 6}, true), "ab<tool>");
  EXPECT_EQ(tokenizer->bos_token_id(), std::nullopt);
  EXPECT_TRUE(tokenizer->eos_token_ids().empty());
  EXPECT_FALSE(tokenizer->has_chat_template());
  const auto none = tokenizer->ApplyChatTemplate(Hello());
  ASSERT_FALSE(none.has_value());
  EXPECT_NE(std::string(none.error().what()).find("no chat template"), std::string::npos);

  // Tokens of tokenizer_config.json: a new one, and one that becomes special.
  folder.Write("tokenizer_config.json",
               R"({"bos_token": {"content": "<s>"}, "eos_token": "<end>", "added_tokens_decoder": {
                 "7": {"content": "<end>", "special": true}, "6": {"content": "<tool>", "special": true}}})");
  folder.Write("generation_config.json", R"({"eos_token_id": [7, 2], "bos_token_id": 0})");
  tokenizer = LoadTokenizer(folder.path());
  EXPECT_EQ(tokenizer->bos_token_id(), 5);
  EXPECT_EQ(tokenizer->eos_token_ids(), (Ids{7, 2}));
  EXPECT_EQ(tokenizer->vocab_size(), 8);
  EXPECT_EQ(tokenizer->Encode("c<end>", false), (Ids{2, 7}));
  EXPECT_EQ(tokenizer->Decode(Ids{2, 6, 7}, true), "c");

  folder.Write("generation_config.json", R"({"eos_token_id": 2})");
  folder.Write("tokenizer_config.json", R"({})");
  folder.Write("special_tokens_map.json", R"({"bos_token": {"content": "<s>"}, "eos_token": "<tool>"})");
  tokenizer = LoadTokenizer(folder.path());
  EXPECT_EQ(tokenizer->bos_token_id(), 5);
  EXPECT_EQ(tokenizer->eos_token_ids(), (Ids{6, 2}));

  folder.Write("generation_config.json", R"({"eos_token_id": "x"})");
  ExpectError([&] { LoadTokenizer(folder.path()); }, "generation_config.json: eos_token_id \"x\" is no token id");
  folder.Write("generation_config.json", "{");
  ExpectError([&] { LoadTokenizer(folder.path()); }, "generation_config.json");
  folder.Write("generation_config.json", "{}");
  folder.Write("tokenizer_config.json", R"({"added_tokens_decoder": {"6": {"content": "<s>"}}})");
  ExpectError([&] { LoadTokenizer(folder.path()); }, "token \"<s>\" the id 6, tokenizer.json 5");
  folder.Write("tokenizer_config.json", R"({"added_tokens_decoder": {"9": {"content": "<z>"}}})");
  ExpectError([&] { LoadTokenizer(folder.path()); }, "the next free one is 7");
  folder.Write("tokenizer_config.json", "{}");
  folder.Write("tokenizer.json", "{\"version\": \"1.0\"}");
  ExpectError([&] { LoadTokenizer(folder.path()); }, "tokenizer.json: ");
}

TEST(Load, ChatTemplatesOfAFolder) {
  const TempFolder folder;
  folder.Write("tokenizer.json", SmallTokenizer().dump());
  ChatTemplateInput plain = Hello(), tools = Hello();
  tools.tools_json = R"([{"type": "function", "function": {"name": "f"}}])";
  const auto load = [&](const std::string& config) {
    folder.Write("tokenizer_config.json", config);
    return LoadTokenizer(folder.path());
  };

  auto tokenizer = load(R"({"chat_template": "one {{ messages[0].content }}"})");
  EXPECT_EQ(tokenizer->ApplyChatTemplate(plain).value(), "one c");
  EXPECT_EQ(tokenizer->ApplyChatTemplate(tools).value(), "one c");

  tokenizer =
      load(R"({"chat_template": [{"name": "default", "template": "two"}, {"name": "tool_use", "template": "three"},
                       {"name": "rag", "template": "four"}]})");
  EXPECT_EQ(tokenizer->ApplyChatTemplate(plain).value(), "two");
  EXPECT_EQ(tokenizer->ApplyChatTemplate(tools).value(), "three");

  tokenizer = load(R"({"chat_template": [{"name": "a", "template": "x"}, {"name": "b", "template": "y"}]})");
  const auto got = tokenizer->ApplyChatTemplate(plain);
  ASSERT_FALSE(got.has_value());
  EXPECT_NE(std::string(got.error().what()).find("(a, b)"), std::string::npos) << got.error().what();

  // The file goes before the configuration.
  folder.Write("chat_template.jinja", "file");
  folder.Write("additional_chat_templates/tool_use.jinja", "file with tools");
  tokenizer = load(R"({"chat_template": "one"})");
  EXPECT_EQ(tokenizer->ApplyChatTemplate(plain).value(), "file");
  EXPECT_EQ(tokenizer->ApplyChatTemplate(tools).value(), "file with tools");

  ExpectError([&] { load(R"({"chat_template": 3})"); }, "chat_template must be text or a list");
  // A template that cannot be compiled does not keep the model from loading.
  folder.Write("chat_template.jinja", "{% if %}");
  tokenizer = load("{}");
  EXPECT_TRUE(tokenizer->has_chat_template());
  EXPECT_FALSE(tokenizer->ApplyChatTemplate(plain).has_value());
  EXPECT_EQ(tokenizer->Encode("ab", false), Ids{3});
}

// The vocabularies of the HF files, handed over as a GGUF file has them, must give what tokenizer.json gives.
class GgufWriter {
 public:
  template <typename T>
  void Scalar(const std::string& key, uint32_t type, T value) {
    Key(key, type);
    Put(value);
  }
  void Text(const std::string& key, const std::string& text) {
    Key(key, 8);
    PutText(text);
  }
  void Texts(const std::string& key, const std::vector<std::string>& texts) {
    Key(key, 9);
    Put<uint32_t>(8);
    Put<uint64_t>(texts.size());
    for (const auto& text : texts) PutText(text);
  }
  template <typename T>
  void Numbers(const std::string& key, uint32_t type, const std::vector<T>& values) {
    Key(key, 9);
    Put<uint32_t>(type);
    Put<uint64_t>(values.size());
    for (const T value : values) Put(value);
  }
  std::string File() const {
    std::string head = "GGUF";
    const uint32_t version = 3;
    const uint64_t counts[] = {0, count_};
    head.append(reinterpret_cast<const char*>(&version), 4).append(reinterpret_cast<const char*>(counts), 16);
    return head + body_;
  }

 private:
  void Key(const std::string& key, uint32_t type) {
    ++count_;
    PutText(key);
    Put(type);
  }
  void PutText(const std::string& text) {
    Put<uint64_t>(text.size());
    body_ += text;
  }
  template <typename T>
  void Put(T value) {
    char raw[sizeof(T)];
    std::memcpy(raw, &value, sizeof(T));
    body_.append(raw, sizeof(T));
  }
  std::string body_;
  uint64_t count_ = 0;
};

class RebuiltFromVocabulary : public testing::TestWithParam<std::pair<const char*, const char*>> {};

TEST_P(RebuiltFromVocabulary, GivesTheSameIds) {
  const auto [name, pre] = GetParam();
  const json original = test::ReadJson(test::TokenizerPath(name) + "/tokenizer.json");
  const auto hf = Shared(name);
  std::vector<std::string> tokens(static_cast<size_t>(hf->vocab_size()));
  std::vector<int32_t> types(tokens.size(), 5);
  for (const auto& [text, id] : original["model"]["vocab"].items()) {
    tokens[id.get<size_t>()] = text;
    types[id.get<size_t>()] = 1;
  }
  for (const auto& token : original["added_tokens"]) {
    tokens[token["id"].get<size_t>()] = token["content"];
    types[token["id"].get<size_t>()] = token["special"] ? 3 : 4;
  }
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i].empty()) tokens[i] = "[PAD" + std::to_string(i) + "]";
  }
  std::vector<std::string> merges;
  for (const auto& merge : original["model"]["merges"]) {
    merges.push_back(merge.is_string() ? merge.get<std::string>()
                                       : merge[0].get<std::string>() + " " + merge[1].get<std::string>());
  }
  GgufWriter writer;
  writer.Text("tokenizer.ggml.model", "gpt2");
  writer.Text("tokenizer.ggml.pre", pre);
  writer.Texts("tokenizer.ggml.tokens", tokens);
  writer.Numbers("tokenizer.ggml.token_type", 5, types);
  writer.Texts("tokenizer.ggml.merges", merges);
  const bool bos = hf->Encode("a", true) != hf->Encode("a", false);
  writer.Scalar<uint8_t>("tokenizer.ggml.add_bos_token", 7, bos);
  if (hf->bos_token_id()) {
    writer.Scalar<uint32_t>("tokenizer.ggml.bos_token_id", 4, static_cast<uint32_t>(*hf->bos_token_id()));
  }
  writer.Scalar<uint32_t>("tokenizer.ggml.eos_token_id", 4, static_cast<uint32_t>(hf->eos_token_ids().at(0)));
  const TempFolder folder;
  folder.Write("v.gguf", writer.File());
  const auto rebuilt = LoadTokenizer(folder.path() + "/v.gguf");
  EXPECT_EQ(rebuilt->bos_token_id(), hf->bos_token_id());
  EXPECT_EQ(rebuilt->eos_token_ids().at(0), hf->eos_token_ids().at(0));
  const auto vectors = test::Vectors(std::string("tokenizer_") + name);
  for (const auto& entry : vectors["encode"]) {
    SCOPED_TRACE(entry["name"].get<std::string>());
    const Ids ids = entry["ids"];
    EXPECT_EQ(rebuilt->Encode(entry["text"].get<std::string>(), true), ids);
    EXPECT_EQ(rebuilt->Decode(ids, false), entry["decoded"].get<std::string>());
    EXPECT_EQ(rebuilt->Decode(ids, true), entry.value("decoded_skip_special", entry["decoded"].get<std::string>()));
  }
}

INSTANTIATE_TEST_SUITE_P(All, RebuiltFromVocabulary,
                         testing::Values(std::pair("qwen3", "qwen2"), std::pair("llama3_1", "llama-bpe"),
                                         std::pair("deepseek_v3", "deepseek-v3")),
                         [](const auto& param) { return std::string(param.param.first); });

// A SentencePiece vocabulary: pieces with scores, and a token for each byte.
GgufWriter SentencePiece(bool space_prefix) {
  std::vector<std::string> tokens = {"<unk>", "<s>", "</s>"};
  std::vector<int32_t> types = {2, 3, 3};
  for (int i = 0; i < 256; ++i) {
    char name[8];
    std::snprintf(name, sizeof(name), "<0x%02X>", i);
    tokens.push_back(name);
    types.push_back(6);
  }
  const std::string space = "\xe2\x96\x81";
  for (const auto& piece : {space, std::string("h"), std::string("e"), std::string("l"), std::string("o"),
                            std::string("he"), std::string("ll"), std::string("hell"), space + "hell"}) {
    tokens.push_back(piece);
    types.push_back(1);
  }
  std::vector<float> scores(tokens.size(), 0.0f);
  for (size_t i = 259; i < tokens.size(); ++i) scores[i] = -100.0f - static_cast<float>(i);
  scores[264] = -1;  // he
  scores[265] = -2;  // ll
  scores[266] = -3;  // hell
  scores[267] = -4;  // _hell
  GgufWriter writer;
  writer.Text("tokenizer.ggml.model", "llama");
  writer.Text("tokenizer.ggml.pre", "default");
  writer.Texts("tokenizer.ggml.tokens", tokens);
  writer.Numbers("tokenizer.ggml.token_type", 5, types);
  writer.Numbers("tokenizer.ggml.scores", 6, scores);
  writer.Scalar<uint32_t>("tokenizer.ggml.bos_token_id", 4, 1);
  writer.Scalar<uint32_t>("tokenizer.ggml.eos_token_id", 4, 2);
  writer.Scalar<uint32_t>("tokenizer.ggml.unknown_token_id", 4, 0);
  writer.Scalar<uint8_t>("tokenizer.ggml.add_space_prefix", 7, space_prefix);
  return writer;
}

TEST(Load, SentencePieceVocabulary) {
  const TempFolder folder;
  folder.Write("v.gguf", SentencePiece(true).File());
  const auto tokenizer = LoadTokenizer(folder.path() + "/v.gguf");
  EXPECT_EQ(tokenizer->Encode("hello", true), (Ids{1, 267, 263}));
  EXPECT_EQ(tokenizer->Encode("hello", false), (Ids{267, 263}));
  EXPECT_EQ(tokenizer->Encode("\xc3\xa9", false), (Ids{259, 3 + 0xc3, 3 + 0xa9}));
  EXPECT_EQ(tokenizer->Decode(Ids{1, 267, 263, 267}, true), "hello hell");
  EXPECT_EQ(tokenizer->eos_token_ids(), Ids{2});
  folder.Write("w.gguf", SentencePiece(false).File());
  EXPECT_EQ(LoadTokenizer(folder.path() + "/w.gguf")->Encode("hello", true), (Ids{1, 266, 263}));

  // Any text comes back through the bytes, also in pieces.
  const auto seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  for (int round = 0; round < 200; ++round) {
    std::string text = "h";
    for (size_t i = 0, n = random() % 20; i < n; ++i) {
      const char* parts[] = {"hell", " ", "\xe4\xb8\xad", "\xf0\x9f\x98\x80", "o", "\n", "z"};
      text += parts[random() % std::size(parts)];
    }
    const Ids ids = tokenizer->Encode(text, false);
    EXPECT_EQ(tokenizer->Decode(ids, false), text);
    const auto stream = tokenizer->MakeStream(false);
    std::string streamed;
    for (const int32_t id : ids) streamed += stream->Push(id);
    EXPECT_EQ(streamed + stream->Flush(), text);
  }
  // Invalid bytes: the stream says something for each, whatever follows, and goes on.
  const auto stream = tokenizer->MakeStream(false);
  std::string streamed;
  for (const int32_t id : {3 + 0xe4, 3 + 0xb8, 3 + 0xad, 3 + 0x80, 264, 265, 263}) streamed += stream->Push(id);
  streamed += stream->Flush();
  EXPECT_NE(streamed.find("\xef\xbf\xbd"), std::string::npos) << streamed;
  EXPECT_NE(streamed.find("hello"), std::string::npos) << streamed;
}

TEST(Load, UnsupportedVocabulariesSayHowToServe) {
  const TempFolder folder;
  const auto expect = [&](const GgufWriter& writer, const std::string& part) {
    folder.Write("v.gguf", writer.File());
    ExpectError([&] { LoadTokenizer(folder.path() + "/v.gguf"); }, part);
  };
  GgufWriter none;
  none.Text("general.architecture", "llama");
  expect(none, "has no vocabulary");
  GgufWriter bert;
  bert.Text("tokenizer.ggml.model", "bert");
  bert.Texts("tokenizer.ggml.tokens", {"a"});
  expect(bert, "\"bert\" is not supported");
  expect(bert, "--skip-tokenizer-init");
  GgufWriter pre;
  pre.Text("tokenizer.ggml.model", "gpt2");
  pre.Text("tokenizer.ggml.pre", "chameleon");
  pre.Texts("tokenizer.ggml.tokens", {"a"});
  expect(pre, "tokenizer.ggml.pre \"chameleon\" is not supported");
  GgufWriter merges;
  merges.Text("tokenizer.ggml.model", "gpt2");
  merges.Text("tokenizer.ggml.pre", "qwen2");
  merges.Texts("tokenizer.ggml.tokens", {"a", "b"});
  merges.Texts("tokenizer.ggml.merges", {"a c"});
  expect(merges, "tokenizer.ggml.merges");
  GgufWriter lengths;
  lengths.Text("tokenizer.ggml.model", "gpt2");
  lengths.Texts("tokenizer.ggml.tokens", {"a", "b"});
  lengths.Numbers<int32_t>("tokenizer.ggml.token_type", 5, {1});
  expect(lengths, "1 elements for 2 tokens");
  GgufWriter eos;
  eos.Text("tokenizer.ggml.model", "gpt2");
  eos.Texts("tokenizer.ggml.tokens", {"a", "b"});
  eos.Scalar<uint32_t>("tokenizer.ggml.eos_token_id", 4, 2);
  expect(eos, "2 is no token id");
}

}  // namespace
}  // namespace weft
