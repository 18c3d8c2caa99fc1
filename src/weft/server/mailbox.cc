#include "weft/server/mailbox.h"

#include <iterator>

namespace weft {
namespace {

template <typename T>
void Append(std::vector<T>& into, std::vector<T>&& more) {
  if (into.empty()) {
    into = std::move(more);
  } else {
    into.insert(into.end(), std::make_move_iterator(more.begin()), std::make_move_iterator(more.end()));
  }
}

}  // namespace

void MergeOutput(RequestOutput& into, RequestOutput&& more) {
  into.text += more.text;
  Append(into.token_ids, std::move(more.token_ids));
  Append(into.logprobs, std::move(more.logprobs));
  if (more.prompt_logprobs) into.prompt_logprobs = std::move(more.prompt_logprobs);
  if (more.finish_reason) {
    into.finish_reason = more.finish_reason;
    into.stop_reason = std::move(more.stop_reason);
    into.error = std::move(more.error);
    into.error_kind = more.error_kind;
  }
  into.prompt_tokens = more.prompt_tokens;
  into.cached_tokens = more.cached_tokens;
  into.completion_tokens = more.completion_tokens;
}

Mailbox::Mailbox(int choices, bool every_output, std::function<void()> notify)
    : notify_(std::move(notify)),
      every_output_(every_output),
      pending_(choices),
      has_news_(choices, false),
      ended_(choices, false),
      open_(choices) {}

void Mailbox::Put(int choice, RequestOutput&& output) {
  const std::lock_guard lock(mutex_);
  if (ended_[choice]) return;
  if (output.finish_reason) {
    ended_[choice] = true;
    --open_;
    if (*output.finish_reason == FinishReason::kError) failed_ = true;
  }
  if (has_news_[choice]) {
    MergeOutput(pending_[choice], std::move(output));
  } else {
    pending_[choice] = std::move(output);
    has_news_[choice] = true;
    ++news_;
  }
  if (!notify_ || notified_ || !(every_output_ || open_ == 0 || failed_)) return;
  notified_ = true;
  notify_();
}

std::vector<std::pair<int, RequestOutput>> Mailbox::Take() {
  const std::lock_guard lock(mutex_);
  std::vector<std::pair<int, RequestOutput>> taken;
  taken.reserve(news_);
  for (size_t i = 0; i < pending_.size(); ++i) {
    if (!has_news_[i]) continue;
    taken.emplace_back(static_cast<int>(i), std::exchange(pending_[i], RequestOutput()));
    has_news_[i] = false;
  }
  news_ = 0;
  notified_ = false;
  return taken;
}

bool Mailbox::Ready() const {
  const std::lock_guard lock(mutex_);
  return every_output_ ? news_ > 0 : open_ == 0 || failed_;
}

bool Mailbox::Drained() const {
  const std::lock_guard lock(mutex_);
  return open_ == 0 && news_ == 0;
}

void Mailbox::Close() {
  const std::lock_guard lock(mutex_);
  notify_ = nullptr;
}

bool Mailbox::Ended(int choice) const {
  const std::lock_guard lock(mutex_);
  return ended_[choice];
}

}  // namespace weft
