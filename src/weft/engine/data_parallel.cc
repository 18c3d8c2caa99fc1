#include "weft/engine/data_parallel.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "weft/core/error.h"

namespace weft {
namespace {

void AddHistogram(const Histogram& from, Histogram& to) {
  if (to.bounds.empty()) {
    to = from;
    return;
  }
  WEFT_CHECK(from.bounds == to.bounds && from.counts.size() == to.counts.size());
  for (size_t i = 0; i < to.counts.size(); ++i) to.counts[i] += from.counts[i];
  to.sum += from.sum;
}

int64_t LoadOf(const SchedulerProspect& prospect) { return prospect.tokens_ahead + kRequestTokens * prospect.requests; }

}  // namespace

size_t ChooseReplica(std::span<const SchedulerProspect> prospects, size_t turn) {
  const size_t n = prospects.size();
  WEFT_CHECK(n >= 1);
  const bool all_wait = std::ranges::all_of(prospects, [](const SchedulerProspect& p) { return p.must_wait; });
  // What the request costs at a replica, less the length of its prompt, which is the same everywhere: the replicas that
  // are not overloaded are those where that is least.
  const auto cost = [](const SchedulerProspect& p) { return LoadOf(p) - p.cached_tokens; };
  size_t best = n;
  for (size_t i = 0; i < n; ++i) {
    const size_t replica = (turn + i) % n;
    const SchedulerProspect& p = prospects[replica];
    if (p.must_wait && !all_wait) continue;
    if (best < n) {
      const SchedulerProspect& b = prospects[best];
      if (cost(p) > cost(b) || (cost(p) == cost(b) && p.cached_tokens <= b.cached_tokens)) continue;
    }
    best = replica;
  }
  return best;
}

void AddStats(const EngineStats& from, EngineStats& to) {
  to.num_requests_running += from.num_requests_running;
  to.num_requests_waiting += from.num_requests_waiting;
  to.num_preemptions += from.num_preemptions;
  to.prompt_tokens += from.prompt_tokens;
  to.generation_tokens += from.generation_tokens;
  to.prefix_cache_queries += from.prefix_cache_queries;
  to.prefix_cache_hits += from.prefix_cache_hits;
  for (const auto& [reason, count] : from.request_success) to.request_success[reason] += count;
  AddHistogram(from.time_to_first_token_seconds, to.time_to_first_token_seconds);
  AddHistogram(from.inter_token_latency_seconds, to.inter_token_latency_seconds);
  AddHistogram(from.e2e_request_latency_seconds, to.e2e_request_latency_seconds);
  AddHistogram(from.request_queue_time_seconds, to.request_queue_time_seconds);
  AddHistogram(from.request_prefill_time_seconds, to.request_prefill_time_seconds);
  AddHistogram(from.request_decode_time_seconds, to.request_decode_time_seconds);
  to.kv_tokens_per_shard.insert(to.kv_tokens_per_shard.end(), from.kv_tokens_per_shard.begin(),
                                from.kv_tokens_per_shard.end());
  to.context += from.context;
  to.expert_tokens.resize(std::max(to.expert_tokens.size(), from.expert_tokens.size()));
  for (size_t e = 0; e < from.expert_tokens.size(); ++e) to.expert_tokens[e] += from.expert_tokens[e];
}

DataParallelEngine::DataParallelEngine(std::vector<std::unique_ptr<LLMEngine>> replicas)
    : replicas_(std::move(replicas)) {
  WEFT_CHECK(!replicas_.empty());
}

DataParallelEngine::~DataParallelEngine() { Shutdown(0); }

Result<void> DataParallelEngine::Add(EngineRequest request, OutputSink sink) {
  if (const std::string failure = Failure(); !failure.empty()) {
    return tl::make_unexpected(Error("The engine has failed: " + failure, ErrorKind::kUnavailable));
  }
  const std::lock_guard lock(routing_);
  std::vector<SchedulerProspect> prospects;
  std::vector<size_t> open;  // the replicas that they are of
  for (size_t i = 0; i < replicas_.size(); ++i) {
    const EngineProspect prospect = replicas_[i]->Foresee(request);
    if (prospect.knows_id) return replicas_[i]->Add(std::move(request), std::move(sink));  // which says so
    prospects.push_back(prospect.scheduler);
    open.push_back(i);
  }
  while (true) {
    const size_t choice = ChooseReplica(prospects, turn_ % prospects.size());
    LLMEngine& replica = *replicas_[open[choice]];
    turn_ = open[choice] + 1;
    const int64_t cached = prospects[choice].cached_tokens;
    if (prospects.size() == 1) return replica.Add(std::move(request), std::move(sink), cached);
    Result<void> added = replica.Add(request, sink, cached);
    // Its queue is full: there are others.
    if (added || added.error().kind() != ErrorKind::kUnavailable) return added;
    prospects.erase(prospects.begin() + static_cast<std::ptrdiff_t>(choice));
    open.erase(open.begin() + static_cast<std::ptrdiff_t>(choice));
  }
}

void DataParallelEngine::Abort(const std::string& id) {
  // Those that do not know it ignore it.
  for (const auto& replica : replicas_) replica->Abort(id);
}

std::vector<EngineStats> DataParallelEngine::StatsByReplica() const {
  std::vector<EngineStats> stats;
  for (const auto& replica : replicas_) stats.push_back(replica->Stats());
  return stats;
}

EngineStats DataParallelEngine::Stats() const {
  EngineStats sum;
  double usage = 0;
  for (const EngineStats& stats : StatsByReplica()) {
    AddStats(stats, sum);
    usage += stats.kv_cache_usage;
  }
  sum.kv_cache_usage = usage / static_cast<double>(replicas_.size());
  return sum;
}

std::string DataParallelEngine::Failure() const {
  for (const auto& replica : replicas_) {
    if (std::string failure = replica->Failure(); !failure.empty()) return failure;
  }
  return {};
}

void DataParallelEngine::Shutdown(double timeout_s) {
  // At once on all, so that none takes a request any more and the time is everybody's.
  std::vector<std::jthread> threads;
  for (const auto& replica : replicas_) {
    threads.emplace_back([&replica, timeout_s] { replica->Shutdown(timeout_s); });
  }
}

}  // namespace weft
