#pragma once
// Owners of what the Rust library hands out.

#include <weft_text.h>

#include <memory>
#include <string>
#include <string_view>

#include "weft/core/error.h"

namespace weft::rust {

struct Free {
  void operator()(wt_tokenizer* p) const { wt_tokenizer_free(p); }
  void operator()(wt_stream* p) const { wt_stream_free(p); }
  void operator()(wt_template* p) const { wt_template_free(p); }
};
using TokenizerPtr = std::unique_ptr<wt_tokenizer, Free>;
using StreamPtr = std::unique_ptr<wt_stream, Free>;
using TemplatePtr = std::unique_ptr<wt_template, Free>;

class Buf {
 public:
  Buf() = default;
  Buf(const Buf&) = delete;
  Buf& operator=(const Buf&) = delete;
  ~Buf() { wt_buf_free(buf_); }

  wt_buf* out() { return &buf_; }
  std::string_view view() const {
    return buf_.ptr == nullptr ? std::string_view() : std::string_view(buf_.ptr, buf_.len);
  }
  std::string str() const { return std::string(view()); }

 private:
  wt_buf buf_ = {nullptr, 0};
};

// Never "not given": the pointer is not null.
inline wt_str Str(std::string_view text) { return {text.data() == nullptr ? "" : text.data(), text.size()}; }
inline constexpr wt_str kNotGiven = {nullptr, 0};

// What a failed call says. `context`, where there is one, stands in front.
Error MakeError(wt_status status, const Buf& error, std::string_view context = {}, std::string param = {});

}  // namespace weft::rust
