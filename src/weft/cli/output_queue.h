#pragma once
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>

#include "weft/api/request.h"

namespace weft::cli {

// From the engine's thread to the one that prints. Must outlive the request.
class OutputQueue {
 public:
  OutputSink Sink() {
    return [this](RequestOutput&& output) {
      const std::lock_guard lock(mutex_);
      outputs_.push_back(std::move(output));
      arrived_.notify_one();
    };
  }
  // Nothing when none came within `patience`.
  std::optional<RequestOutput> Take(std::chrono::milliseconds patience) {
    std::unique_lock lock(mutex_);
    if (!arrived_.wait_for(lock, patience, [&] { return !outputs_.empty(); })) return std::nullopt;
    RequestOutput output = std::move(outputs_.front());
    outputs_.pop_front();
    return output;
  }
  RequestOutput Take() {
    while (true) {
      if (auto output = Take(std::chrono::seconds(60))) return std::move(*output);
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::deque<RequestOutput> outputs_;
};

}  // namespace weft::cli
