#pragma once
// For tests: a vocabulary of byte strings, and a token stream over it that never gives out half a character.

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "weft/text/tokenizer.h"

namespace weft {

class PieceVocabulary {
 public:
  int32_t Id(const std::string& piece) {
    const auto [at, fresh] = ids_.try_emplace(piece, static_cast<int32_t>(pieces_.size()));
    if (fresh) pieces_.push_back(piece);
    return at->second;
  }
  int32_t Find(const std::string& piece) const {
    const auto found = ids_.find(piece);
    return found == ids_.end() ? -1 : found->second;
  }
  int32_t size() const { return static_cast<int32_t>(pieces_.size()); }
  // Empty for ids that are not in it.
  std::string Piece(int32_t id) const {
    return id >= 0 && static_cast<size_t>(id) < pieces_.size() ? pieces_[static_cast<size_t>(id)] : std::string();
  }

 private:
  std::map<std::string, int32_t> ids_;
  std::vector<std::string> pieces_;
};

// Assumes that the pieces together are well-formed UTF-8.
class PieceStream : public TokenStream {
 public:
  explicit PieceStream(const PieceVocabulary* vocabulary, int32_t throws_on = -1)
      : vocabulary_(vocabulary), throws_on_(throws_on) {}

  std::string Push(int32_t token) override {
    if (token == throws_on_) Throw("token {} cannot be decoded", token);
    bytes_ += vocabulary_->Piece(token);
    size_t whole = 0;
    while (whole < bytes_.size()) {
      const auto lead = static_cast<unsigned char>(bytes_[whole]);
      const size_t length = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
      if (whole + length > bytes_.size()) break;
      whole += length;
    }
    std::string text = bytes_.substr(0, whole);
    bytes_.erase(0, whole);
    return text;
  }
  std::string Flush() override {
    const bool half = !bytes_.empty();
    bytes_.clear();
    return half ? "\xef\xbf\xbd" : "";
  }

 private:
  const PieceVocabulary* vocabulary_;
  int32_t throws_on_;
  std::string bytes_;
};

// Encodes byte by byte; decodes the pieces. `throws_on`: a token whose text makes the stream throw.
class PieceTokenizer : public Tokenizer {
 public:
  explicit PieceTokenizer(PieceVocabulary vocabulary, int32_t throws_on = -1)
      : vocabulary_(std::move(vocabulary)), throws_on_(throws_on) {}

  std::vector<int32_t> Encode(std::string_view text, bool) const override {
    std::vector<int32_t> ids;
    for (const char c : text) ids.push_back(vocabulary_.Find(std::string(1, c)));
    return ids;
  }
  std::string Decode(std::span<const int32_t> tokens, bool) const override {
    std::string text;
    for (const int32_t token : tokens) text += vocabulary_.Piece(token);
    return text;
  }
  std::unique_ptr<TokenStream> MakeStream(bool) const override {
    return std::make_unique<PieceStream>(&vocabulary_, throws_on_);
  }
  Result<std::string> ApplyChatTemplate(const ChatTemplateInput&) const override { return Fail("no chat template"); }
  bool has_chat_template() const override { return false; }
  int32_t vocab_size() const override { return vocabulary_.size(); }
  std::string TokenString(int32_t token) const override { return vocabulary_.Piece(token); }
  std::optional<int32_t> TokenId(std::string_view token) const override {
    const int32_t id = vocabulary_.Find(std::string(token));
    return id < 0 ? std::nullopt : std::optional(id);
  }
  std::optional<int32_t> bos_token_id() const override { return std::nullopt; }
  std::vector<int32_t> eos_token_ids() const override { return {}; }

 private:
  PieceVocabulary vocabulary_;
  int32_t throws_on_;
};

}  // namespace weft
