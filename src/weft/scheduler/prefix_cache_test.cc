// Requests that share beginnings, through the scheduler and real ranks: on every kind of layout their logits are those
// of the same request alone on one rank without any cache.
#include <gtest/gtest.h>

#include <map>
#include <random>

#include "weft/runner/test_support.h"
#include "weft/scheduler/scheduler.h"

namespace weft {
namespace {

using Tokens = std::vector<int32_t>;
using Logits = std::map<int64_t, std::vector<float>>;  // by position

constexpr double kTolerance = 1e-4;
constexpr int32_t kBlock = 8;
const testing::SmallModel kModel{.heads = 8, .kv_heads = 2};

struct Job {
  Tokens prompt;
  int32_t max_tokens = 1;
  std::string salt;
};

struct Outcome {
  Tokens tokens;  // prompt and output
  Logits logits;
  int64_t cached = 0;
};

// Like an engine: a scheduler and ranks.
class Machine {
 public:
  Machine(const cp::ParallelConfig& parallel, uint64_t seed, int64_t blocks, bool caching, int64_t budget,
          ContextExchange exchange = ContextExchange::kAuto)
      : scheduler_(
            {.max_model_len = 2000, .max_num_batched_tokens = budget, .max_num_seqs = 6, .prefix_caching = caching},
            {.block_tokens = parallel.block_tokens,
             .interleave = parallel.kv_interleave,
             .shards = parallel.KvShards()},
            blocks) {
    ExecutorOptions options;
    options.parallel = parallel;
    options.dtype = DType::kF32;
    options.kv_dtype = DType::kF32;
    options.threads_per_rank = 1;
    options.num_blocks = blocks;
    options.exchange = exchange;
    options.progress = false;
    executor_ = MakeThreadExecutor(options, testing::RandomCheckpoint(testing::SmallConfig(kModel), seed));
  }

  // All of them at once.
  std::vector<Outcome> Run(const std::vector<Job>& jobs) {
    std::map<RequestHandle, size_t> index;
    std::vector<Outcome> outcomes(jobs.size());
    for (size_t i = 0; i < jobs.size(); ++i) {
      EngineRequest request;
      request.prompt_token_ids = jobs[i].prompt;
      request.params.max_tokens = jobs[i].max_tokens;
      request.params.temperature = 0;
      request.cache_salt = jobs[i].salt;
      index[scheduler_.Add(std::move(request)).value()] = i;
    }
    while (scheduler_.HasRequests()) {
      StepPlan plan = scheduler_.Plan();
      plan.capture_logits = true;
      for (const RequestStep& step : plan.requests) {
        for (const BlockCopy& copy : step.copies) copied += copy.tokens;
      }
      for (const RowOutput& row : scheduler_.Update(plan, executor_->Execute(plan))) {
        EXPECT_FALSE(row.error) << *row.error;
        Outcome& outcome = outcomes[index.at(row.handle)];
        const size_t vocab = row.logits.size() / std::max<size_t>(1, row.logit_positions.size());
        for (size_t p = 0; p < row.logit_positions.size(); ++p) {
          const auto begin = row.logits.begin() + static_cast<std::ptrdiff_t>(p * vocab);
          outcome.logits[row.logit_positions[p]].assign(begin, begin + static_cast<std::ptrdiff_t>(vocab));
        }
        const Scheduler::Request* request = scheduler_.Find(row.handle);
        if (request == nullptr) continue;
        outcome.tokens = request->tokens;
        outcome.cached = request->cached_tokens;
        if (request->output_tokens() >= request->params.max_tokens) scheduler_.Finish(row.handle);
      }
    }
    return outcomes;
  }
  SchedulerStats Stats() const { return scheduler_.Stats(); }

  int64_t copied = 0;

 private:
  Scheduler scheduler_;
  std::unique_ptr<StepExecutor> executor_;
};

std::string Name(const cp::ParallelConfig& p) {
  const bool replicated = p.pcp_kv_layout == cp::PcpKvLayout::kReplicated;
  return fmt::format("tp{}_pcp{}{}_dcp{}_i{}", p.tensor_parallel, p.prefill_context_parallel, replicated ? "r" : "",
                     p.decode_context_parallel, p.kv_interleave);
}

cp::ParallelConfig Layout(int32_t tp, int32_t pcp, int32_t dcp, int32_t interleave) {
  return {.prefill_context_parallel = pcp,
          .decode_context_parallel = dcp,
          .tensor_parallel = tp,
          .kv_interleave = interleave,
          .block_tokens = kBlock};
}

class PrefixCacheOnRanks : public ::testing::Test {
 protected:
  Tokens Random(int64_t n) {
    Tokens tokens(static_cast<size_t>(n));
    for (int32_t& token : tokens) token = std::uniform_int_distribution<int32_t>(0, 130)(rng_);
    return tokens;
  }
  int64_t Any(int64_t min, int64_t max) { return std::uniform_int_distribution<int64_t>(min, max)(rng_); }

  // Rounds of requests, each of which may begin like any of the rounds before it and like its neighbours.
  std::vector<std::vector<Job>> Rounds() {
    std::vector<std::vector<Job>> rounds;
    std::vector<Tokens> seen = {Random(150), Random(40)};
    for (int round = 0; round < 4; ++round) {
      std::vector<Job>& jobs = rounds.emplace_back();
      if (round == 0) jobs.push_back({seen[0], 3, ""});
      if (round == 1) {
        Tokens prompt(seen[0].begin(), seen[0].begin() + 141);
        prompt.push_back((seen[0][141] + 1) % 131);
        jobs.push_back({prompt, 3, ""});
      }
      for (int i = 0; i < 4; ++i) {
        Tokens prompt = seen[static_cast<size_t>(Any(0, std::ssize(seen) - 1))];
        prompt.resize(static_cast<size_t>(Any(std::ssize(prompt) / 3, std::ssize(prompt))));
        const Tokens more = Random(Any(1, 30));
        prompt.insert(prompt.end(), more.begin(), more.end());
        seen.push_back(prompt);
        jobs.push_back({prompt, static_cast<int32_t>(Any(1, 6)), Any(0, 7) == 0 ? "salt" : ""});
      }
    }
    return rounds;
  }

  void Check(const cp::ParallelConfig& parallel, const std::vector<std::vector<Job>>& rounds,
             const std::vector<std::vector<Outcome>>& expected, ContextExchange exchange, bool tight) {
    SCOPED_TRACE(Name(parallel) + (tight ? "_tight" : ""));
    const int64_t whole = int64_t{kBlock} * parallel.KvShards();
    // Tight: room for two of the longest ones at most, so that blocks are evicted and requests preempted.
    const int64_t blocks = tight ? 2 * (250 / whole + 2) : 4000 / whole + 20;
    Machine machine(parallel, seed_, blocks, true, tight ? 48 : 200, exchange);
    for (size_t r = 0; r < rounds.size(); ++r) {
      const std::vector<Outcome> got = machine.Run(rounds[r]);
      for (size_t i = 0; i < got.size(); ++i) {
        for (const auto& [position, logits] : got[i].logits) {
          const auto& want = expected[r][i];
          // Behind a tie that the tolerance cannot tell apart the outputs may differ.
          if (!std::equal(got[i].tokens.begin(), got[i].tokens.begin() + position + 1, want.tokens.begin())) break;
          ASSERT_LE(testing::RelativeError(logits, want.logits.at(position)), kTolerance)
              << "round " << r << ", request " << i << " of " << rounds[r][i].prompt.size() << " tokens at " << position
              << ", " << got[i].cached << " cached";
        }
        // What was found was not computed.
        if (tight) continue;  // preempted ones were computed again
        ASSERT_EQ(std::ssize(got[i].logits), std::ssize(got[i].tokens) - 1 - got[i].cached);
      }
    }
    // The first request of the second round at least; where blocks are evicted it may have come too late.
    if (!tight) {
      EXPECT_GE(machine.Stats().prefix_cache_hits, 141u);
      EXPECT_GE(machine.copied, 141 % whole);
    }
    hits_ += machine.Stats().prefix_cache_hits;
  }

  uint64_t seed_ = testing::FreshSeed();
  std::mt19937_64 rng_{seed_};
  uint64_t hits_ = 0;
};

cp::ParallelConfig Replicated(cp::ParallelConfig layout) {
  layout.pcp_kv_layout = cp::PcpKvLayout::kReplicated;
  return layout;
}

TEST_F(PrefixCacheOnRanks, LogitsAreThoseWithoutCacheOnOneRank) {
  const std::vector<std::vector<Job>> rounds = Rounds();
  std::vector<std::vector<Outcome>> expected;
  {
    Machine one(Layout(1, 1, 1, 1), seed_, 600, false, 2000);
    for (const auto& jobs : rounds) {
      auto& outcomes = expected.emplace_back();
      for (const Job& job : jobs) outcomes.push_back(one.Run({job})[0]);
    }
    ASSERT_EQ(one.Stats().prefix_cache_hits, 0u);
    ASSERT_EQ(one.copied, 0);
  }
  for (const auto& layout : {Layout(1, 1, 1, 1), Layout(2, 1, 1, 1), Layout(1, 2, 1, 1), Layout(1, 2, 1, 8),
                             Layout(1, 3, 1, 2), Layout(4, 1, 2, 4), Layout(4, 2, 2, 1), Layout(4, 2, 2, 8),
                             Layout(8, 1, 4, 2), Replicated(Layout(1, 2, 1, 1)), Replicated(Layout(4, 2, 2, 4))}) {
    const bool tight_q = Any(0, 1) == 1;
    Check(layout, rounds, expected, ContextExchange::kGatherQ, tight_q);
    if (HasFatalFailure()) return;
    Check(layout, rounds, expected, ContextExchange::kGatherKv, !tight_q);
    if (HasFatalFailure()) return;
  }
  std::printf("%llu tokens found\n", static_cast<unsigned long long>(hits_));
}

}  // namespace
}  // namespace weft
