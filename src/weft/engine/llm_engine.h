#pragma once
// The engine: one thread that plans a step, has the ranks execute it, and hands out what came of it, over and over.

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "weft/cp/layout.h"
#include "weft/engine/engine.h"
#include "weft/engine/engine_metrics.h"
#include "weft/engine/output_processor.h"
#include "weft/engine/request_check.h"
#include "weft/runner/step_plan.h"
#include "weft/scheduler/scheduler.h"
#include "weft/text/tokenizer.h"

namespace weft {

struct LLMEngineOptions {
  SchedulerConfig scheduler;  // max_model_len is the engine's, too
  cp::KvLayout kv_layout;
  int64_t vocab_size = 0;
  std::vector<int32_t> eos_token_ids;  // those of the model; every request gets them
  int32_t max_logprobs = 20;           // -1: the whole vocabulary
  int64_t max_num_queued_reqs = 0;     // requests that may wait for their turn; 0: no limit
  bool priority_scheduling = false;    // else a request's priority must be 0
  bool log_requests = false;           // one line a request
  double log_stats_interval_s = 0;     // a line of throughput while there is work; 0: never
};

// What a request would meet if it were added now.
struct EngineProspect {
  SchedulerProspect scheduler;
  bool knows_id = false;  // a live request has its id
};

// The engine's thread sleeps while there is nothing to do. A sink that throws loses its request and nothing else.
class LLMEngine : public Engine {
 public:
  // `tokenizer` may be null: outputs have token ids and no text then. Throws weft::Error for options that make no
  // sense.
  LLMEngine(LLMEngineOptions options, std::unique_ptr<StepExecutor> executor,
            std::shared_ptr<const Tokenizer> tokenizer);
  // Aborts what still runs. Not from a sink.
  ~LLMEngine() override;

  // Checks the request in the caller's thread. May be called from sinks, too; so may Abort.
  Result<void> Add(EngineRequest request, OutputSink sink) override {
    return Add(std::move(request), std::move(sink), 0);
  }
  // `cached_tokens`: what Foresee said.
  Result<void> Add(EngineRequest request, OutputSink sink, int64_t cached_tokens);
  void Abort(const std::string& id) override;
  EngineStats Stats() const override;
  std::string Failure() const override;
  // Returns when the last sink has been called and the thread is gone. Not from a sink.
  void Shutdown(double timeout_s) override;

  // For whoever chooses among engines. Takes as long as planning: the prompt is looked up in the prefix cache.
  EngineProspect Foresee(const EngineRequest& request) const;

  int64_t max_model_len() const override { return options_.scheduler.max_model_len; }
  int64_t vocab_size() const override { return options_.vocab_size; }
  // Tokens that the KV cache holds, over all shards.
  int64_t kv_capacity_tokens() const { return capacity_tokens_; }

 private:
  using Clock = std::chrono::steady_clock;

  struct Live {
    Live(OutputProcessor p, OutputSink s) : processor(std::move(p)), sink(std::move(s)) {}
    OutputProcessor processor;  // this and the times: the engine's thread alone, once the request is in
    OutputSink sink;
    RequestTimes times;
    bool ended = false;  // its last output has been made
  };
  struct Delivery {
    std::shared_ptr<Live> live;
    RequestOutput output;
  };

  void Loop();
  // Sleeps until there is work, ends aborted requests, plans a step. False when the thread is to end.
  bool Prepare(std::optional<StepPlan>& plan, std::vector<Delivery>& deliveries);
  void Process(const StepPlan& plan, StepOutput output, std::vector<Delivery>& deliveries);
  void Deliver(std::vector<Delivery>& deliveries);
  void Die(const std::string& why);
  // With mutex_ held: the request is over.
  void Forget(RequestHandle handle);
  // With mutex_ held: requests that wait although they would run if there were room.
  int64_t Queued() const;
  void LogStats(Clock::time_point now);

  const LLMEngineOptions options_;
  const RequestBounds bounds_;
  const std::unique_ptr<StepExecutor> executor_;
  const std::shared_ptr<const Tokenizer> tokenizer_;
  EngineMetrics metrics_;

  // Guards what follows. Never held while a step is executed or a sink is called, so that adding a request waits for
  // some microseconds of planning at most.
  mutable std::mutex mutex_;
  std::condition_variable wake_;   // the engine's thread waits here
  std::condition_variable ended_;  // Shutdown waits here
  Scheduler scheduler_;
  int64_t capacity_tokens_;
  std::unordered_map<RequestHandle, std::shared_ptr<Live>> live_;
  std::unordered_map<std::string, RequestHandle> handles_;
  std::vector<RequestHandle> aborts_;
  std::string failure_;
  std::string executor_failure_;  // found out between two steps
  int64_t undelivered_ = 0;       // requests whose last output has not been given to the sink
  bool left_waiting_ = false;     // the last plan had no room for all
  bool stopping_ = false;
  bool abort_all_ = false;
  bool exit_ = false;

  // The engine's thread only.
  Clock::time_point stats_logged_;
  uint64_t logged_prompt_tokens_ = 0;
  uint64_t logged_generation_tokens_ = 0;

  std::mutex join_mutex_;
  std::thread thread_;
};

}  // namespace weft
