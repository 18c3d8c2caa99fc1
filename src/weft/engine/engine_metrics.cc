#include "weft/engine/engine_metrics.h"

#include <algorithm>

namespace weft {
namespace {

Histogram MakeHistogram(std::vector<double> bounds) {
  Histogram histogram;
  histogram.counts.assign(bounds.size() + 1, 0);
  histogram.bounds = std::move(bounds);
  return histogram;
}

// An upper bound belongs to its bucket (Prometheus: le).
void Observe(Histogram& histogram, double value) {
  const auto bucket = std::lower_bound(histogram.bounds.begin(), histogram.bounds.end(), value);
  ++histogram.counts[static_cast<size_t>(bucket - histogram.bounds.begin())];
  histogram.sum += value;
}

double Seconds(RequestTimes::Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

}  // namespace

EngineMetrics::EngineMetrics() {
  // vLLM's, so that dashboards and alerts keep their meaning.
  stats_.time_to_first_token_seconds =
      MakeHistogram({0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,  0.25,  0.5,   0.75,
                     1.0,   2.5,   5.0,  7.5,  10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0});
  stats_.inter_token_latency_seconds = MakeHistogram(
      {0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0});
  const std::vector<double> request = {0.3,  0.5,  0.8,  1.0,  1.5,   2.0,   2.5,   5.0,   10.0,   15.0,  20.0,
                                       30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0};
  stats_.e2e_request_latency_seconds = MakeHistogram(request);
  stats_.request_queue_time_seconds = MakeHistogram(request);
  stats_.request_prefill_time_seconds = MakeHistogram(request);
  stats_.request_decode_time_seconds = MakeHistogram(request);
  for (const FinishReason reason :
       {FinishReason::kStop, FinishReason::kLength, FinishReason::kAbort, FinishReason::kError}) {
    stats_.request_success[NameOf(reason)] = 0;
  }
}

void EngineMetrics::Tokens(RequestTimes& times, int64_t prompt_tokens, int64_t tokens, Clock::time_point now) {
  const std::lock_guard lock(mutex_);
  stats_.generation_tokens += static_cast<uint64_t>(tokens);
  if (!times.first_token) {
    times.first_token = now;
    stats_.prompt_tokens += static_cast<uint64_t>(prompt_tokens);
    Observe(stats_.time_to_first_token_seconds, Seconds(now - times.arrived));
  } else {
    Observe(stats_.inter_token_latency_seconds, Seconds(now - times.last_token));
  }
  times.last_token = now;
}

void EngineMetrics::Finished(const RequestTimes& times, FinishReason reason, Clock::time_point now) {
  const std::lock_guard lock(mutex_);
  ++stats_.request_success[NameOf(reason)];
  Observe(stats_.e2e_request_latency_seconds, Seconds(now - times.arrived));
  if (!times.scheduled) return;
  Observe(stats_.request_queue_time_seconds, Seconds(*times.scheduled - times.arrived));
  if (!times.first_token) return;
  Observe(stats_.request_prefill_time_seconds, Seconds(*times.first_token - *times.scheduled));
  Observe(stats_.request_decode_time_seconds, Seconds(times.last_token - *times.first_token));
}

EngineStats EngineMetrics::Snapshot() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

}  // namespace weft
