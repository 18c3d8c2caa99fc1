// Random traffic against an executor that checks every plan by itself.
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <cmath>
#include <iostream>
#include <map>
#include <random>
#include <set>
#include <sstream>
#include <vector>

#include "weft/cp/test_random.h"
#include "weft/scheduler/fake_ranks_test.h"
#include "weft/scheduler/scheduler.h"
#include "weft/scheduler/stop.h"

namespace weft {
namespace {

using cp::InRange;

struct Scenario {
  cp::KvLayout layout;
  int64_t blocks = 1;
  SchedulerConfig config;
  int requests = 0;
  double finish_rate = 0;  // of live requests ended from outside, per step
  double error_rate = 0;   // of rows that fail
  double share_rate = 0;   // of prompts that begin like an earlier request
  uint64_t seed = 0;
};

std::ostream& operator<<(std::ostream& out, const Scenario& s) {
  return out << "B " << s.layout.block_tokens << " I " << s.layout.interleave << " W " << s.layout.shards << " blocks "
             << s.blocks << " model_len " << s.config.max_model_len << " budget " << s.config.max_num_batched_tokens
             << " seqs " << s.config.max_num_seqs << " chunked " << s.config.chunked_prefill << " requests "
             << s.requests << " finish " << s.finish_rate << " error " << s.error_rate << " share " << s.share_rate
             << " caching " << s.config.prefix_caching << " seed " << s.seed;
}

Scenario AnyScenario() {
  Scenario s;
  s.layout.interleave = *rc::gen::element(1, 2, 4);
  s.layout.block_tokens = s.layout.interleave * InRange(1, 5);
  s.layout.shards = InRange(1, 5);
  s.blocks = InRange<int64_t>(1, *rc::gen::element(6, 40));
  const int64_t capacity = s.blocks * s.layout.VirtualBlockTokens();
  s.config.max_model_len = InRange<int64_t>(2, std::min<int64_t>(capacity + capacity / 2 + 2, 200) + 1);
  s.config.max_num_seqs = InRange<int64_t>(1, 9);
  s.config.chunked_prefill = InRange(0, 4) != 0;
  s.config.max_num_batched_tokens = s.config.max_num_seqs + InRange<int64_t>(0, 40);
  if (!s.config.chunked_prefill) s.config.max_num_batched_tokens += s.config.max_model_len;
  s.requests = InRange(1, 25);
  s.finish_rate = *rc::gen::element(0.0, 0.02, 0.2);
  s.error_rate = *rc::gen::element(0.0, 0.01);
  s.share_rate = *rc::gen::element(0.0, 0.5, 0.95);
  s.config.prefix_caching = InRange(0, 4) != 0;
  s.seed = *rc::gen::arbitrary<uint64_t>();
  return s;
}

// Drives a scheduler and a twin of it, which has to plan the same, until all requests are done.
class Simulation {
 public:
  explicit Simulation(const Scenario& scenario)
      : s_(scenario),
        scheduler_(s_.config, s_.layout, s_.blocks),
        twin_(s_.config, s_.layout, s_.blocks),
        ranks_({.virtual_block_tokens = s_.layout.VirtualBlockTokens(),
                .num_blocks = s_.blocks,
                .max_num_batched_tokens = s_.config.max_num_batched_tokens,
                .max_num_seqs = s_.config.max_num_seqs,
                .chunked_prefill = s_.config.chunked_prefill,
                .prefix_caching = s_.config.prefix_caching}),
        random_(s_.seed) {}

  // What went wrong first, empty if nothing.
  std::string Run() {
    int steps = 0;
    while ((to_add_ > 0 || scheduler_.HasRequests()) && problem_.empty()) {
      if (++steps > 20000) Wrong("no end after 20000 steps");
      while (to_add_ > 0 && (Chance(0.3) || !scheduler_.HasRequests())) Add();
      FinishSome();
      if (scheduler_.HasRequests()) Step();
    }
    if (problem_.empty()) CheckEmpty();
    return problem_;
  }

  uint64_t preemptions() const { return scheduler_.Stats().preemptions; }
  int completed() const { return completed_; }
  int64_t reused_tokens() const { return ranks_.reused_tokens(); }
  int64_t copied_tokens() const { return ranks_.copied_tokens(); }

 private:
  struct Expected {
    std::vector<int32_t> prompt;
    SamplingParams params;
    std::vector<int32_t> output;
    std::vector<int32_t> prompt_logprobs;  // tokens, from position 1 on
  };

  bool Chance(double p) { return std::uniform_real_distribution<>(0, 1)(random_) < p; }
  int64_t Any(int64_t min, int64_t max) { return std::uniform_int_distribution<int64_t>(min, max)(random_); }
  void Wrong(const std::string& what) {
    if (problem_.empty()) problem_ = what;
  }

  void Add() {
    --to_add_;
    EngineRequest request;
    for (int64_t n = Any(1, s_.config.max_model_len); n > 0; --n) {
      request.prompt_token_ids.push_back(static_cast<int32_t>(Any(0, 999)));
    }
    if (Chance(0.5)) request.prompt_token_ids.resize(static_cast<size_t>((request.prompt_token_ids.size() + 7) / 8));
    if (!seen_.empty() && Chance(s_.share_rate)) {
      // The beginning of an earlier sequence, prompt and output, as it has become; mostly most of it.
      const std::vector<int32_t>& earlier = seen_[static_cast<size_t>(Any(0, std::ssize(seen_) - 1))];
      const int64_t n = std::min(std::ssize(earlier), s_.config.max_model_len);
      std::vector<int32_t> prompt(earlier.begin(), earlier.begin() + std::max(Any(0, n), Any(0, n)));
      const auto more = std::min<int64_t>(s_.config.max_model_len - std::ssize(prompt), Any(0, 8));
      prompt.insert(prompt.end(), request.prompt_token_ids.begin(),
                    request.prompt_token_ids.begin() + std::min(more, std::ssize(request.prompt_token_ids)));
      if (!prompt.empty()) request.prompt_token_ids = prompt;
    }
    if (seen_.size() > 8) seen_.erase(seen_.begin());
    seen_.push_back(request.prompt_token_ids);
    if (Chance(0.1)) request.cache_salt = Chance(0.5) ? "a" : "b";
    request.params.max_tokens = static_cast<int32_t>(Any(1, 30));
    request.params.ignore_eos = Chance(0.5);
    request.params.eos_token_ids = {static_cast<int32_t>(Any(0, 1 << 24))};
    if (Chance(0.3)) request.params.prompt_logprobs = 0;
    if (Chance(0.3)) request.params.logprobs = 0;
    if (Chance(0.3)) request.priority = static_cast<int32_t>(Any(-1, 1));

    const auto prompt = static_cast<int64_t>(request.prompt_token_ids.size());
    const int64_t kv = std::min(prompt + request.params.max_tokens, s_.config.max_model_len) - 1;
    const bool fits = prompt < s_.config.max_model_len && kv <= s_.blocks * s_.layout.VirtualBlockTokens();
    const auto now = Scheduler::Clock::now();
    const Result<RequestHandle> handle = scheduler_.Add(request, now);
    const Result<RequestHandle> twin = twin_.Add(request, now);
    if (handle.has_value() != fits) Wrong("Add took what cannot fit, or refused what can");
    if (!handle) return;
    if (*twin != *handle) Wrong("the twin gave another handle");
    ranks_.SetSalt(*handle, request.cache_salt);
    expected_[*handle] = {request.prompt_token_ids, request.params, {}, {}};
  }

  void Finish(RequestHandle handle) {
    if (!scheduler_.Finish(handle) || !twin_.Finish(handle)) Wrong("Finish knows nothing of a live request");
    if (scheduler_.Finish(handle)) Wrong("Finish finished twice");
    expected_.erase(handle);
  }

  void FinishSome() {
    std::vector<RequestHandle> gone;
    for (const auto& [handle, _] : expected_) {
      if (Chance(s_.finish_rate)) gone.push_back(handle);
    }
    for (const RequestHandle handle : gone) Finish(handle);
  }

  void Step() {
    const auto decoding = ranks_.live();  // before the step
    const StepPlan plan = scheduler_.Plan();
    if (Dump(plan) != Dump(twin_.Plan())) Wrong("two schedulers with the same calls plan differently");
    if (plan.requests.empty()) Wrong("an empty plan though there are requests");
    CheckFair(plan, decoding);
    StepOutput output = ranks_.Execute(plan);
    if (!ranks_.Problem().empty()) return Wrong(ranks_.Problem());
    CheckStats(plan);
    for (RowOutput& row : output.rows) {
      if (Chance(s_.error_rate)) row.error = "NaN";
    }
    std::shuffle(output.rows.begin(), output.rows.end(), random_);
    // While the step runs:
    if (Chance(0.2)) FinishSome();
    if (to_add_ > 0 && Chance(0.2)) Add();
    const StepOutput copy = output;
    (void)twin_.Update(plan, copy);
    for (RowOutput& row : scheduler_.Update(plan, std::move(output))) TakeIn(row);
  }

  // Decoding requests run in every step unless they were preempted, and the best of the running ones always runs.
  void CheckFair(const StepPlan& plan, const std::map<RequestHandle, FakeRanks::Live>& before) {
    const auto planned = [&](RequestHandle handle) {
      return std::any_of(plan.requests.begin(), plan.requests.end(), [&](const auto& r) { return r.handle == handle; });
    };
    const Scheduler::Request* best = nullptr;
    for (const auto& [handle, _] : expected_) {
      const Scheduler::Request& request = *scheduler_.Find(handle);
      if (!request.running) continue;
      if (best == nullptr || request.priority < best->priority) best = &request;  // handles ascend with arrival
      const auto live = before.find(handle);
      if (live != before.end() && live->second.decoding() && !planned(handle)) {
        Wrong("a decoding request was left out of step " + std::to_string(plan.step));
      }
    }
    if (best == nullptr || !planned(best->handle)) Wrong("the best request does not run");
  }

  void CheckStats(const StepPlan& plan) {
    const SchedulerStats stats = scheduler_.Stats();
    int64_t running = 0;
    std::set<int32_t> blocks;
    std::set<int64_t> slots;
    std::vector<int64_t> tokens(static_cast<size_t>(s_.layout.shards));
    for (const auto& [handle, _] : expected_) {
      const Scheduler::Request& request = *scheduler_.Find(handle);
      running += request.running;
      if (!request.running && request.computed != 0) Wrong("a waiting request says that it has KV");
      if (!request.running) continue;
      const std::vector<int32_t>& table = ranks_.live().at(handle).blocks;
      blocks.insert(table.begin(), table.end());
      const int64_t whole = s_.layout.VirtualBlockTokens();
      for (int64_t x = 0; x < request.computed; ++x) {
        if (!slots.insert(table[static_cast<size_t>(x / whole)] * whole + x % whole).second) continue;
        ++tokens[static_cast<size_t>(s_.layout.Owner(x))];
      }
    }
    if (stats.running != running || stats.waiting != static_cast<int64_t>(expected_.size()) - running) {
      Wrong("wrong counts of requests");
    }
    if (stats.kv_tokens_per_shard != tokens) Wrong("wrong KV tokens per shard");
    // During the step the sources of its copies are in use, too.
    for (const RequestStep& step : plan.requests) {
      for (const BlockCopy& copy : step.copies) blocks.insert(copy.source);
    }
    if (std::llround(stats.kv_cache_usage * static_cast<double>(s_.blocks)) != std::ssize(blocks)) Wrong("blocks leak");

    for (const NewRequest& request : plan.admitted) {
      const auto step = std::ranges::find(plan.requests, request.handle, &RequestStep::handle);
      if (scheduler_.Find(request.handle)->cached_tokens != step->computed) Wrong("wrong cached_tokens");
      if (request.params.prompt_logprobs || !s_.config.prefix_caching) continue;
      queries_ += request.prompt_token_ids.size();
      hits_ += static_cast<uint64_t>(step->computed);
    }
    if (stats.prefix_cache_queries != queries_ || stats.prefix_cache_hits != hits_) Wrong("wrong counts of hits");
  }

  void TakeIn(RowOutput& row) {
    const auto found = expected_.find(row.handle);
    if (found == expected_.end()) return Wrong("a row of a request that is gone");
    Expected& e = found->second;
    if (row.error) {
      if (scheduler_.Find(row.handle) != nullptr) Wrong("a failed request lives on");
      expected_.erase(found);
      return;
    }
    if (!row.prompt_logprobs.empty()) {
      if (row.first_prompt_position != static_cast<int64_t>(e.prompt_logprobs.size()) + 1) {
        Wrong("prompt log-probabilities twice or with a gap");
      }
      for (const PositionLogprobs& p : row.prompt_logprobs) e.prompt_logprobs.push_back(p.chosen.token);
    }
    if (!row.token_id) return;
    std::vector<int32_t> tokens = e.prompt;
    tokens.insert(tokens.end(), e.output.begin(), e.output.end());
    if (*row.token_id != FakeRanks::NextToken(tokens)) Wrong("another token than on a machine of its own");
    if (row.logprobs.has_value() != e.params.logprobs.has_value()) Wrong("logprobs are lost");
    e.output.push_back(*row.token_id);
    tokens.push_back(*row.token_id);
    if (scheduler_.Find(row.handle)->tokens != tokens) Wrong("the scheduler keeps other tokens");
    if (CheckStop(e.params, *row.token_id, static_cast<int64_t>(e.output.size()), static_cast<int64_t>(tokens.size()),
                  s_.config.max_model_len)) {
      const std::vector<int32_t> want(e.prompt.begin() + 1, e.prompt.end());
      if (e.params.prompt_logprobs && e.prompt_logprobs != want) Wrong("prompt log-probabilities are lost");
      ++completed_;
      if (Chance(0.5)) seen_.push_back(tokens);
      Finish(row.handle);
    }
  }

  void CheckEmpty() {
    const SchedulerStats stats = scheduler_.Stats();
    if (stats.running != 0 || stats.waiting != 0 || stats.kv_cache_usage != 0) Wrong("blocks or requests are left");
    const StepPlan plan = scheduler_.Plan();
    if (!plan.requests.empty()) Wrong("a plan of nothing has rows");
    ranks_.Execute(plan);
    if (!ranks_.Problem().empty()) Wrong(ranks_.Problem());
    if (!ranks_.live().empty()) Wrong("the ranks were not told of the end of a request");
  }

  Scenario s_;
  Scheduler scheduler_;
  Scheduler twin_;
  FakeRanks ranks_;
  std::mt19937_64 random_;
  int to_add_ = s_.requests;
  uint64_t queries_ = 0;
  uint64_t hits_ = 0;
  std::map<RequestHandle, Expected> expected_;
  std::vector<std::vector<int32_t>> seen_;  // some sequences of before
  int completed_ = 0;
  std::string problem_;
};

TEST(SchedulerSimulation, RandomTraffic) {
  uint64_t preemptions = 0;
  int completed = 0;
  int64_t reused = 0;
  int64_t copied = 0;
  EXPECT_TRUE(rc::check([&] {
    for (int i = 0; i < 10; ++i) {
      const Scenario scenario = AnyScenario();
      Simulation simulation(scenario);
      const std::string problem = simulation.Run();
      preemptions += simulation.preemptions();
      completed += simulation.completed();
      reused += simulation.reused_tokens();
      copied += simulation.copied_tokens();
      if (!problem.empty()) {
        std::ostringstream text;
        text << problem << "\n" << scenario;
        RC_FAIL(text.str());
      }
    }
  }));
  RecordProperty("completed", completed);
  RecordProperty("preemptions", static_cast<int>(preemptions));
  std::cout << completed << " completed, " << preemptions << " preemptions, " << reused << " tokens reused, " << copied
            << " of them copied\n";
  // The traffic was not trivial.
  EXPECT_GT(preemptions, 100u);
  EXPECT_GT(completed, 1000);
  EXPECT_GT(reused, 10000);
  EXPECT_GT(copied, 3000);
}

}  // namespace
}  // namespace weft
