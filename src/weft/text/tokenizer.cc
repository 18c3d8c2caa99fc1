#include "weft/text/tokenizer.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "weft/core/log.h"
#include "weft/text/chat_template.h"
#include "weft/text/rust.h"
#include "weft/text/vocabulary.h"

namespace weft {
namespace {

class RustStream : public TokenStream {
 public:
  RustStream(const wt_tokenizer* tokenizer, bool skip_special_tokens) {
    wt_stream* stream = nullptr;
    rust::Buf error;
    const wt_status status = wt_stream_new(tokenizer, skip_special_tokens, &stream, error.out());
    if (status != WT_OK) throw rust::MakeError(status, error);
    stream_.reset(stream);
  }

  std::string Push(int32_t token) override {
    rust::Buf text, error;
    return Take(wt_stream_push(stream_.get(), token, text.out(), error.out()), text, error);
  }

  std::string Flush() override {
    rust::Buf text, error;
    return Take(wt_stream_flush(stream_.get(), text.out(), error.out()), text, error);
  }

 private:
  // The decoder fails on no sequence of ids. Should it do so, the request goes on with a mark in its text.
  std::string Take(wt_status status, const rust::Buf& text, const rust::Buf& error) {
    if (status == WT_OK) return text.str();
    if (!failed_) spdlog::error("incremental decoding failed: {}", error.view());
    failed_ = true;
    return "\xef\xbf\xbd";
  }

  rust::StreamPtr stream_;
  bool failed_ = false;
};

class RustTokenizer : public Tokenizer {
 public:
  explicit RustTokenizer(Vocabulary vocabulary)
      : vocabulary_(std::move(vocabulary)), special_tokens_json_(nlohmann::json(vocabulary_.special_tokens).dump()) {
    for (const auto& [name, source] : vocabulary_.chat_templates) {
      const auto compiled = templates_.Get(source);
      // The model can still complete texts, and a request can bring a template of its own.
      if (!compiled) spdlog::warn("chat template \"{}\" cannot be used: {}", name, compiled.error().what());
    }
  }

  std::vector<int32_t> Encode(std::string_view text, bool add_special_tokens) const override {
    wt_ids ids = {nullptr, 0};
    rust::Buf error;
    const wt_status status = wt_encode(handle(), rust::Str(text), add_special_tokens, &ids, error.out());
    if (status != WT_OK) throw rust::MakeError(status, error);
    std::vector<int32_t> out(ids.ptr, ids.ptr + ids.len);
    wt_ids_free(ids);
    return out;
  }

  std::string Decode(std::span<const int32_t> tokens, bool skip_special_tokens) const override {
    rust::Buf text, error;
    const wt_status status =
        wt_decode(handle(), tokens.data(), tokens.size(), skip_special_tokens, text.out(), error.out());
    if (status != WT_OK) throw rust::MakeError(status, error);
    return text.str();
  }

  std::unique_ptr<TokenStream> MakeStream(bool skip_special_tokens) const override {
    return std::make_unique<RustStream>(handle(), skip_special_tokens);
  }

  Result<std::string> ApplyChatTemplate(const ChatTemplateInput& input) const override {
    const auto source = ChooseTemplate(input);
    if (!source) return tl::make_unexpected(source.error());
    const auto compiled = templates_.Get(**source);
    if (!compiled) return tl::make_unexpected(compiled.error());
    const auto given = [](const std::optional<std::string>& text) { return text ? rust::Str(*text) : rust::kNotGiven; };
    wt_chat chat = {};
    chat.messages = rust::Str(input.messages_json);
    chat.tools = given(input.tools_json);
    chat.documents = given(input.documents_json);
    chat.kwargs = given(input.kwargs_json);
    chat.special_tokens = rust::Str(special_tokens_json_);
    chat.add_generation_prompt = input.add_generation_prompt;
    chat.continue_final_message = input.continue_final_message;
    chat.adapt = input.adapt_messages;
    rust::Buf text, error;
    const wt_status status = wt_template_render(compiled->get(), &chat, text.out(), error.out());
    if (status != WT_OK) return tl::make_unexpected(rust::MakeError(status, error, {}, "messages"));
    return text.str();
  }

  bool has_chat_template() const override { return !vocabulary_.chat_templates.empty(); }
  int32_t vocab_size() const override { return wt_vocab_size(handle()); }

  std::string TokenString(int32_t token) const override {
    rust::Buf text;
    wt_token_text(handle(), token, text.out());
    return text.str();
  }

  std::optional<int32_t> TokenId(std::string_view token) const override { return FindToken(handle(), token); }
  std::optional<int32_t> bos_token_id() const override { return vocabulary_.bos; }
  std::vector<int32_t> eos_token_ids() const override { return vocabulary_.eos; }

 private:
  const wt_tokenizer* handle() const { return vocabulary_.tokenizer.get(); }

  // As transformers chooses: tool_use when there are tools and such a template, else default.
  Result<const std::string*> ChooseTemplate(const ChatTemplateInput& input) const {
    if (input.template_override) return &*input.template_override;
    const auto& templates = vocabulary_.chat_templates;
    if (templates.empty()) {
      return tl::make_unexpected(Error("the model has no chat template: give one with --chat-template or chat_template",
                                       ErrorKind::kInvalidArgument, "messages"));
    }
    if (input.tools_json) {
      if (const auto it = templates.find("tool_use"); it != templates.end()) return &it->second;
    }
    if (const auto it = templates.find("default"); it != templates.end()) return &it->second;
    if (templates.size() == 1) return &templates.begin()->second;
    std::string names;
    for (const auto& [name, source] : templates) names += (names.empty() ? "" : ", ") + name;
    return tl::make_unexpected(Error(fmt::format("the model has several chat templates ({}) and none is the default: "
                                                 "give one with --chat-template or chat_template",
                                                 names),
                                     ErrorKind::kInvalidArgument, "chat_template"));
  }

  Vocabulary vocabulary_;
  std::string special_tokens_json_;
  mutable ChatTemplateCache templates_;
};

}  // namespace

std::optional<int32_t> FindToken(const wt_tokenizer* tokenizer, std::string_view token) {
  const int32_t id = wt_token_id(tokenizer, rust::Str(token));
  if (id < 0) return std::nullopt;
  return id;
}

void AddEos(Vocabulary& vocabulary, std::optional<int32_t> id) {
  if (id && std::find(vocabulary.eos.begin(), vocabulary.eos.end(), *id) == vocabulary.eos.end()) {
    vocabulary.eos.push_back(*id);
  }
}

std::shared_ptr<const Tokenizer> LoadTokenizer(const std::string& path) {
  if (!std::filesystem::exists(path)) {
    throw Error(fmt::format("{}: no such file or folder", path), ErrorKind::kNotFound);
  }
  const bool folder = std::filesystem::is_directory(path);
  return std::make_shared<RustTokenizer>(folder ? ReadHfFolder(path) : ReadGgufVocabulary(path));
}

}  // namespace weft
