#include "weft/engine/llm_engine.h"

#include <algorithm>
#include <utility>

#include "weft/core/log.h"

namespace weft {

LLMEngine::LLMEngine(LLMEngineOptions options, std::unique_ptr<StepExecutor> executor,
                     std::shared_ptr<const Tokenizer> tokenizer)
    : options_(std::move(options)),
      bounds_{options_.vocab_size, options_.scheduler.max_model_len, options_.max_logprobs, tokenizer != nullptr},
      executor_(std::move(executor)),
      tokenizer_(std::move(tokenizer)),
      scheduler_(options_.scheduler, options_.kv_layout, executor_->num_blocks()),
      capacity_tokens_(scheduler_.CapacityTokens()),
      stats_logged_(Clock::now()) {
  WEFT_CHECK(options_.vocab_size > 0);
  executor_->SetFailureListener([this](const std::string& why) {
    const std::lock_guard lock(mutex_);
    executor_failure_ = why;
    wake_.notify_one();
  });
  thread_ = std::thread([this] { Loop(); });
}

LLMEngine::~LLMEngine() {
  Shutdown(0);
  executor_->SetFailureListener({});
}

Result<void> LLMEngine::Add(EngineRequest request, OutputSink sink, int64_t cached_tokens) {
  if (auto ok = CheckRequest(request, bounds_); !ok) return ok;
  if (request.priority != 0 && !options_.priority_scheduling) {
    return tl::make_unexpected(
        Error(fmt::format("priority = {}: must be 0 without --scheduling-policy priority.", request.priority),
              ErrorKind::kInvalidArgument, "priority"));
  }
  request.params.eos_token_ids = options_.eos_token_ids;
  const auto now = Clock::now();
  const auto prompt_tokens = static_cast<int64_t>(request.prompt_token_ids.size());
  std::unique_ptr<TokenStream> stream;
  if (tokenizer_ != nullptr && request.params.detokenize) {
    stream = tokenizer_->MakeStream(request.params.skip_special_tokens);
  }
  const std::string id = request.id;
  auto live = std::make_shared<Live>(
      OutputProcessor(id, request.params, prompt_tokens, max_model_len(), std::move(stream)), std::move(sink));
  live->times.arrived = now;

  const auto unavailable = [](std::string message) {
    return tl::make_unexpected(Error(std::move(message), ErrorKind::kUnavailable));
  };
  const std::lock_guard lock(mutex_);
  if (!failure_.empty()) return unavailable("The engine has failed: " + failure_);
  if (stopping_) return unavailable("The engine is shutting down.");
  if (handles_.contains(id)) {
    return tl::make_unexpected(Error(fmt::format("A request with the id '{}' is running already.", id),
                                     ErrorKind::kInvalidArgument, "request_id"));
  }
  if (options_.max_num_queued_reqs > 0 && Queued() >= options_.max_num_queued_reqs) {
    return unavailable(fmt::format("The queue is full: {} requests are waiting (--max-num-queued-reqs).", Queued()));
  }
  auto handle = scheduler_.Add(std::move(request), now, cached_tokens);
  if (!handle) return tl::make_unexpected(handle.error());
  if (options_.log_requests) spdlog::info("request {}: {} prompt tokens", id, prompt_tokens);
  handles_.emplace(id, *handle);
  live_.emplace(*handle, std::move(live));
  ++undelivered_;
  wake_.notify_one();
  return {};
}

void LLMEngine::Abort(const std::string& id) {
  const std::lock_guard lock(mutex_);
  const auto found = handles_.find(id);
  if (found == handles_.end()) return;
  aborts_.push_back(found->second);
  wake_.notify_one();
}

EngineProspect LLMEngine::Foresee(const EngineRequest& request) const {
  const std::lock_guard lock(mutex_);
  return {.scheduler = scheduler_.Foresee(request), .knows_id = handles_.contains(request.id)};
}

int64_t LLMEngine::Queued() const {
  const int64_t waiting = scheduler_.num_waiting();
  if (left_waiting_) return waiting;
  // All that waits came since the last plan, and the next one may have room for it.
  const int64_t room = options_.scheduler.max_num_seqs - scheduler_.num_running();
  return std::max<int64_t>(0, waiting - std::max<int64_t>(0, room));
}

void LLMEngine::Forget(RequestHandle handle) {
  scheduler_.Finish(handle);
  const auto found = live_.find(handle);
  if (found == live_.end()) return;
  handles_.erase(found->second->processor.id());
  live_.erase(found);
}

void LLMEngine::Loop() {
  std::vector<Delivery> deliveries;
  std::optional<StepPlan> plan;
  try {
    while (Prepare(plan, deliveries)) {
      Deliver(deliveries);
      if (!plan) continue;
      StepOutput output = executor_->Execute(*plan);
      Process(*plan, std::move(output), deliveries);
      Deliver(deliveries);
    }
  } catch (...) {
    const std::string why = DescribeException(std::current_exception());
    Deliver(deliveries);
    Die(why);
  }
}

bool LLMEngine::Prepare(std::optional<StepPlan>& plan, std::vector<Delivery>& deliveries) {
  plan.reset();
  std::unique_lock lock(mutex_);
  wake_.wait(lock, [&] {
    return exit_ || abort_all_ || !aborts_.empty() || scheduler_.HasRequests() || !executor_failure_.empty();
  });
  if (!executor_failure_.empty()) throw Error(executor_failure_, ErrorKind::kInternal);
  const auto now = Clock::now();
  const auto abort = [&](RequestHandle handle) {
    const auto found = live_.find(handle);
    if (found == live_.end()) return;
    auto live = found->second;
    if (const Scheduler::Request* request = scheduler_.Find(handle)) live->times.scheduled = request->admitted;
    Forget(handle);
    deliveries.push_back({live, live->processor.End(FinishReason::kAbort)});
    live->ended = true;
    metrics_.Finished(live->times, FinishReason::kAbort, now);
  };
  for (const RequestHandle handle : std::exchange(aborts_, {})) abort(handle);
  if (abort_all_) {
    std::vector<RequestHandle> all;
    for (const auto& [handle, live] : live_) all.push_back(handle);
    for (const RequestHandle handle : all) abort(handle);
  }
  if (exit_ && live_.empty()) return !deliveries.empty();
  if (scheduler_.HasRequests()) {
    plan = scheduler_.Plan(now);
    if (options_.max_num_queued_reqs > 0) left_waiting_ = scheduler_.num_waiting() > 0;
    if (plan->requests.empty()) throw Error("the scheduler planned an empty step", ErrorKind::kInternal);
  }
  return true;
}

void LLMEngine::Process(const StepPlan& plan, StepOutput output, std::vector<Delivery>& deliveries) {
  struct Row {
    std::shared_ptr<Live> live;
    RowOutput row;
  };
  std::vector<Row> rows;
  {
    const std::lock_guard lock(mutex_);
    for (RowOutput& row : scheduler_.Update(plan, std::move(output))) {
      const auto found = live_.find(row.handle);
      if (found == live_.end()) continue;
      if (const Scheduler::Request* request = scheduler_.Find(row.handle)) {
        found->second->times.scheduled = request->admitted;
        found->second->processor.set_cached_tokens(request->cached_tokens);
      }
      rows.push_back({found->second, std::move(row)});
    }
  }

  // Detokenization and the rest of the output work need no lock.
  const auto now = Clock::now();
  std::vector<RequestHandle> finished;
  for (Row& row : rows) {
    OutputProcessor& processor = row.live->processor;
    const RequestHandle handle = row.row.handle;
    std::optional<RequestOutput> result;
    try {
      result = processor.Process(std::move(row.row));
    } catch (...) {
      result = processor.End(FinishReason::kError, DescribeException(std::current_exception()));
    }
    if (!result) continue;
    if (!result->token_ids.empty()) {
      metrics_.Tokens(row.live->times, processor.prompt_tokens(), static_cast<int64_t>(result->token_ids.size()), now);
    }
    if (result->finish_reason) {
      metrics_.Finished(row.live->times, *result->finish_reason, now);
      finished.push_back(handle);
      row.live->ended = true;
    }
    deliveries.push_back({std::move(row.live), std::move(*result)});
  }
  if (!finished.empty()) {
    const std::lock_guard lock(mutex_);
    for (const RequestHandle handle : finished) Forget(handle);
  }
  if (options_.log_stats_interval_s > 0) LogStats(now);
}

void LLMEngine::Deliver(std::vector<Delivery>& deliveries) {
  int64_t ended = 0;
  for (Delivery& delivery : deliveries) {
    Live& live = *delivery.live;
    const bool last = delivery.output.finish_reason.has_value();
    if (last) {
      ++ended;
      if (options_.log_requests) {
        spdlog::info("request {}: {} after {} tokens", delivery.output.id, NameOf(*delivery.output.finish_reason),
                     delivery.output.completion_tokens);
      }
    }
    if (!live.sink) continue;
    try {
      live.sink(std::move(delivery.output));
    } catch (...) {
      spdlog::error("request {}: its receiver failed and is not called again: {}", live.processor.id(),
                    DescribeException(std::current_exception()));
      live.sink = nullptr;
      if (!last) Abort(live.processor.id());
    }
  }
  deliveries.clear();
  if (ended == 0) return;
  const std::lock_guard lock(mutex_);
  undelivered_ -= ended;
  if (undelivered_ == 0) ended_.notify_all();
}

void LLMEngine::Die(const std::string& why) {
  spdlog::critical("the engine has failed: {}", why);
  std::vector<Delivery> deliveries;
  {
    const std::lock_guard lock(mutex_);
    failure_ = why.empty() ? "unknown failure" : why;
    const auto now = Clock::now();
    for (auto& [handle, live] : live_) {
      if (live->ended) continue;
      deliveries.push_back({live, live->processor.End(FinishReason::kError, "The engine has failed: " + failure_)});
      metrics_.Finished(live->times, FinishReason::kError, now);
    }
    for (const auto& [handle, live] : live_) scheduler_.Finish(handle);
    live_.clear();
    handles_.clear();
  }
  Deliver(deliveries);
}

EngineStats LLMEngine::Stats() const {
  EngineStats stats = metrics_.Snapshot();
  stats.expert_tokens = executor_->ExpertLoad();
  stats.context = executor_->Context();
  const std::lock_guard lock(mutex_);
  SchedulerStats now = scheduler_.Stats();
  stats.num_requests_running = now.running;
  stats.num_requests_waiting = now.waiting;
  stats.kv_cache_usage = now.kv_cache_usage;
  stats.num_preemptions = now.preemptions;
  stats.prefix_cache_queries = now.prefix_cache_queries;
  stats.prefix_cache_hits = now.prefix_cache_hits;
  stats.kv_tokens_per_shard = std::move(now.kv_tokens_per_shard);
  return stats;
}

std::string LLMEngine::Failure() const {
  const std::lock_guard lock(mutex_);
  return failure_.empty() ? executor_failure_ : failure_;
}

void LLMEngine::Shutdown(double timeout_s) {
  {
    std::unique_lock lock(mutex_);
    stopping_ = true;
    const auto done = [&] { return undelivered_ == 0; };
    constexpr double kLongest = 1e7;  // seconds; a duration beyond that overflows
    const double wait_s = std::clamp(timeout_s, 0.0, kLongest);
    const bool drained = wait_s > 0 ? ended_.wait_for(lock, std::chrono::duration<double>(wait_s), done) : done();
    if (!drained) {
      abort_all_ = true;
      wake_.notify_one();
      ended_.wait(lock, done);
    }
    exit_ = true;
    wake_.notify_one();
  }
  const std::lock_guard lock(join_mutex_);
  if (thread_.joinable()) thread_.join();
}

void LLMEngine::LogStats(Clock::time_point now) {
  const double elapsed = std::chrono::duration<double>(now - stats_logged_).count();
  if (elapsed < options_.log_stats_interval_s) return;
  const EngineStats stats = Stats();
  spdlog::info("prompt {:.1f} tokens/s, generation {:.1f} tokens/s, running {}, waiting {}, KV cache {:.1f} %",
               static_cast<double>(stats.prompt_tokens - logged_prompt_tokens_) / elapsed,
               static_cast<double>(stats.generation_tokens - logged_generation_tokens_) / elapsed,
               stats.num_requests_running, stats.num_requests_waiting, 100 * stats.kv_cache_usage);
  stats_logged_ = now;
  logged_prompt_tokens_ = stats.prompt_tokens;
  logged_generation_tokens_ = stats.generation_tokens;
}

}  // namespace weft
