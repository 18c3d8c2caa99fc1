#include "weft/text/chat_template.h"

namespace weft {

Result<std::shared_ptr<const wt_template>> ChatTemplateCache::Get(const std::string& source) {
  {
    const std::lock_guard lock(mutex_);
    for (auto it = entries_.begin(); it != entries_.end(); ++it) {
      if (it->first == source) {
        entries_.splice(entries_.begin(), entries_, it);
        return it->second;
      }
    }
  }
  wt_template* compiled = nullptr;
  rust::Buf error;
  const wt_status status = wt_template_compile(rust::Str(source), &compiled, error.out());
  if (status != WT_OK) return tl::make_unexpected(rust::MakeError(status, error, {}, "chat_template"));
  std::shared_ptr<const wt_template> shared(
      compiled, [](const wt_template* p) { wt_template_free(const_cast<wt_template*>(p)); });
  const std::lock_guard lock(mutex_);
  entries_.emplace_front(source, shared);
  if (entries_.size() > kCapacity) entries_.pop_back();
  return shared;
}

}  // namespace weft
