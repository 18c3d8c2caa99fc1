#pragma once
// The engine as the server, the CLI and the bindings see it: requests in, streams of outputs out.

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "weft/api/request.h"
#include "weft/runner/step_plan.h"

namespace weft {

// A snapshot of counters and gauges, in vLLM's terms (the server turns them into Prometheus metrics).
struct Histogram {
  std::vector<double> bounds;    // upper bounds, ascending; one more count than bounds (+Inf)
  std::vector<uint64_t> counts;  // per bucket, not cumulative
  double sum = 0;
};

struct EngineStats {
  int64_t num_requests_running = 0;
  int64_t num_requests_waiting = 0;
  double kv_cache_usage = 0;  // 0 .. 1
  uint64_t num_preemptions = 0;
  uint64_t prompt_tokens = 0;
  uint64_t generation_tokens = 0;
  uint64_t prefix_cache_queries = 0;
  uint64_t prefix_cache_hits = 0;
  std::map<std::string, uint64_t> request_success;  // finished_reason -> count
  Histogram time_to_first_token_seconds;
  Histogram inter_token_latency_seconds;
  Histogram e2e_request_latency_seconds;
  Histogram request_queue_time_seconds;
  Histogram request_prefill_time_seconds;
  Histogram request_decode_time_seconds;
  // KV tokens that each shard holds now, replica by replica.
  std::vector<int64_t> kv_tokens_per_shard;
  // Tokens that each expert has computed, all layers together; empty for a model without experts.
  std::vector<int64_t> expert_tokens;
  ContextCounts context;
};

class Engine {
 public:
  virtual ~Engine() = default;

  // Takes a request, or says why not (kInvalidArgument with `param` set: prompt too long, token id out of range, ...;
  // kUnavailable: the queue is full or the engine is dead or stopping). On success `sink` is called until the output
  // with a finish_reason. Thread-safe.
  virtual Result<void> Add(EngineRequest request, OutputSink sink) = 0;
  // Ends a request with FinishReason::kAbort; unknown ids are ignored. Thread-safe.
  virtual void Abort(const std::string& id) = 0;

  virtual EngineStats Stats() const = 0;
  // The same, of each replica alone where there are several (data parallelism).
  virtual std::vector<EngineStats> StatsByReplica() const { return {Stats()}; }
  // Empty while all is well, else what broke (then /health is 503 and Add fails).
  virtual std::string Failure() const = 0;
  // Takes no more requests, waits until the running ones have ended or `timeout_s` is over (then aborts them).
  virtual void Shutdown(double timeout_s) = 0;

  virtual int64_t max_model_len() const = 0;
  virtual int64_t vocab_size() const = 0;
};

}  // namespace weft
