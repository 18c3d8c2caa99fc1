#pragma once
// Compiled chat templates, kept by their text.

#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "weft/core/error.h"
#include "weft/text/rust.h"

namespace weft {

// Thread-safe. Compiling takes about a millisecond, so that requests which bring their own template need no more than a
// few of the last ones.
class ChatTemplateCache {
 public:
  // kInvalidArgument, parameter "chat_template", when it cannot be compiled.
  Result<std::shared_ptr<const wt_template>> Get(const std::string& source);

 private:
  static constexpr size_t kCapacity = 8;
  std::mutex mutex_;
  std::list<std::pair<std::string, std::shared_ptr<const wt_template>>> entries_;  // the last used one first
};

}  // namespace weft
