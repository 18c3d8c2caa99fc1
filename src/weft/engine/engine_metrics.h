#pragma once
// What the engine counts and times, with vLLM's buckets and meanings.

#include <chrono>
#include <mutex>
#include <optional>

#include "weft/api/request.h"
#include "weft/engine/engine.h"

namespace weft {

struct RequestTimes {
  using Clock = std::chrono::steady_clock;
  Clock::time_point arrived;
  std::optional<Clock::time_point> scheduled;
  std::optional<Clock::time_point> first_token;
  Clock::time_point last_token;
};

// Thread-safe: the engine's thread records, anybody takes snapshots.
class EngineMetrics {
 public:
  using Clock = RequestTimes::Clock;

  EngineMetrics();

  // `tokens` generated at `now`. The request's first one also counts its prompt.
  void Tokens(RequestTimes& times, int64_t prompt_tokens, int64_t tokens, Clock::time_point now);
  void Finished(const RequestTimes& times, FinishReason reason, Clock::time_point now);
  // The counters and histograms; the gauges are the caller's.
  EngineStats Snapshot() const;

 private:
  mutable std::mutex mutex_;
  EngineStats stats_;
};

}  // namespace weft
