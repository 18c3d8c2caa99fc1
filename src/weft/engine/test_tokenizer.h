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
  explicit PieceStream(const PieceVocabulary* vocabulary) : vocabulary_(vocabulary) {}

  std::string Push(int32_t token) override {
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
  std::string bytes_;
};

}  // namespace weft
