#include "weft/scheduler/random_mix_test.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <ostream>
#include <random>

#include "weft/core/error.h"
#include "weft/core/log.h"
#include "weft/cp/test_random.h"
#include "weft/runner/random.h"
#include "weft/runner/test_support.h"
#include "weft/scheduler/scheduler.h"

namespace weft::testing {
namespace {

using cp::InRange;

constexpr double kTolerance = 1e-4;
// Two logits this close may change places within the tolerance: logits of a random model are of the order of 1.
constexpr double kNearTie = 1e-3;
constexpr int64_t kMaxModelLen = 3000;

ModelKind Kind(const std::string& name, const SmallModel& model) { return {name, SmallConfig(model), HeadsOf(model)}; }

// One logits row as it came from the ranks.
struct Computed {
  int64_t position = 0;
  uint64_t step = 0;
  std::vector<float> logits;
};

struct Live {
  std::vector<int32_t> prompt;
  std::vector<int32_t> tokens;  // prompt and output
  std::vector<Computed> rows;
  int64_t arrived = 0;  // steps
  RequestHandle handle = 0;
  bool over = false;
};

class MixRun {
 public:
  MixRun(const Mix& mix, MixCounts& counts) : mix_(mix), kind_(ModelKinds().at(mix.kind)), counts_(counts) {}

  std::string Run() {
    const cp::KvLayout layout = LayoutOf(mix_.parallel);
    // The longest that any request can become: its own tokens behind those of a parent, whose output counts.
    std::vector<int64_t> longest;
    for (const MixRequest& r : mix_.requests) {
      const int64_t parent = longest.empty() ? 0 : longest[static_cast<size_t>(r.parent) % longest.size()];
      longest.push_back(static_cast<int64_t>(r.shared * static_cast<double>(parent)) + r.own + r.max_tokens);
    }
    const int64_t needed = layout.BlocksFor(*std::max_element(longest.begin(), longest.end()));
    const int64_t blocks = needed + mix_.spare_blocks;
    scheduler_ = std::make_unique<Scheduler>(
        SchedulerConfig{.max_model_len = kMaxModelLen,
                        .max_num_batched_tokens = mix_.chunked_prefill ? mix_.max_num_batched_tokens : kMaxModelLen,
                        .max_num_seqs = mix_.max_num_seqs,
                        .chunked_prefill = mix_.chunked_prefill,
                        .prefix_caching = mix_.prefix_caching},
        layout, blocks);
    executor_ = MakeExecutor(mix_.parallel, blocks);
    live_.resize(mix_.requests.size());

    int64_t now = 0;
    int64_t next_arrival = 0;
    size_t arrived = 0;
    // Each token is computed once, and again after each preemption, of which every step has few.
    for (int guard = 0; arrived < live_.size() || scheduler_->HasRequests(); ++guard) {
      if (guard > 20000) return "the mix does not come to an end";
      if (!scheduler_->HasRequests()) now = std::max(now, next_arrival);
      while (arrived < live_.size() && next_arrival <= now) {
        std::string problem = Arrive(arrived++, now);
        if (!problem.empty()) return problem;
        if (arrived < live_.size()) next_arrival = now + mix_.requests[arrived].wait;
      }
      Abort(now, false);
      if (scheduler_->HasRequests()) {
        std::string problem = Step(now);
        if (!problem.empty()) return problem;
      }
      ++now;
    }
    if (scheduler_->Stats().kv_cache_usage != 0) return "blocks are still in use when all requests are over";
    counts_.preemptions += static_cast<int64_t>(scheduler_->Stats().preemptions);
    counts_.prefix_hits += static_cast<int64_t>(scheduler_->Stats().prefix_cache_hits);
    executor_.reset();
    return Compare();
  }

 private:
  std::unique_ptr<StepExecutor> MakeExecutor(const cp::ParallelConfig& parallel, int64_t blocks,
                                             bool oracle = false) const {
    ExecutorOptions options;
    options.parallel = parallel;
    options.dtype = DType::kF32;
    options.kv_dtype = DType::kF32;
    options.threads_per_rank = mix_.threads_per_rank;
    options.num_blocks = blocks;
    options.max_model_len = kMaxModelLen;
    options.progress = false;
    if (oracle) {
      // Nothing of what the mix chooses: with MLA a mistake in the absorbed or the expanded form would be in both.
      options.exchange = ContextExchange::kGatherKv;
    } else {
      options.exchange = mix_.exchange;
      options.rates = mix_.rates;
      options.pcp_min_tokens = mix_.pcp_min_tokens;
      options.solo_max_tokens = mix_.solo_max_tokens;
      options.stream = mix_.stream;
      options.context_segment_tokens = mix_.segment_tokens;
    }
    return MakeThreadExecutor(options, RandomCheckpoint(kind_.config, mix_.weights));
  }

  std::string Arrive(size_t index, int64_t now) {
    const MixRequest& r = mix_.requests[index];
    Live& live = live_[index];
    if (index > 0) {
      const std::vector<int32_t>& parent = live_[static_cast<size_t>(r.parent) % index].tokens;
      const auto shared = static_cast<std::ptrdiff_t>(r.shared * static_cast<double>(parent.size()));
      live.prompt.assign(parent.begin(), parent.begin() + shared);
    }
    // By position: two requests may have the same block of tokens behind different ones.
    for (int64_t i = 0; i < r.own; ++i) {
      const double u = UniformAt(r.seed, live.prompt.size());
      live.prompt.push_back(static_cast<int32_t>(u * static_cast<double>(kind_.config.vocab_size)));
    }
    live.tokens = live.prompt;
    live.arrived = now;
    EngineRequest request;
    request.prompt_token_ids = live.prompt;
    request.params.temperature = 0;
    request.params.max_tokens = r.max_tokens;
    if (r.prompt_logprobs) request.params.prompt_logprobs = 1;
    request.priority = r.priority;
    if (r.salted) request.cache_salt = "salt";
    const auto added = scheduler_->Add(std::move(request));
    if (!added) return fmt::format("request {} was refused: {}", index, added.error().what());
    live.handle = *added;
    index_[live.handle] = index;
    return "";
  }

  void Abort(int64_t now, bool in_execution) {
    for (size_t i = 0; i < live_.size(); ++i) {
      const MixRequest& r = mix_.requests[i];
      Live& live = live_[i];
      if (live.handle == 0 || live.over || r.abort_after < 0 || now - live.arrived != r.abort_after) continue;
      if (r.abort_in_execution != in_execution) continue;
      scheduler_->Finish(live.handle);
      live.over = true;
      ++(in_execution ? counts_.aborts_in_execution : counts_.aborts);
    }
  }

  std::string Step(int64_t now) {
    StepPlan plan = scheduler_->Plan();
    if (plan.requests.empty()) return "the scheduler has requests and plans no row";
    plan.capture_logits = true;
    ++counts_.steps;
    for (const RequestStep& step : plan.requests) {
      for (const BlockCopy& copy : step.copies) counts_.copied += copy.tokens;
    }
    StepOutput output = executor_->Execute(plan);
    for (size_t i = 0; i < plan.requests.size(); ++i) {
      const size_t rows = output.rows.at(i).logit_positions.size();
      if (static_cast<int64_t>(rows) == plan.requests[i].tokens) continue;
      return fmt::format("step {}: {} rows of {} came back", plan.step, rows, plan.requests[i].tokens);
    }
    Abort(now, true);
    for (RowOutput& row : scheduler_->Update(plan, std::move(output))) {
      const size_t i = index_.at(row.handle);
      if (row.error) return fmt::format("request {} in step {}: {}", i, plan.step, *row.error);
      Live& live = live_[i];
      const size_t vocab = row.logits.size() / std::max<size_t>(1, row.logit_positions.size());
      for (size_t p = 0; p < row.logit_positions.size(); ++p) {
        const auto begin = row.logits.begin() + static_cast<std::ptrdiff_t>(p * vocab);
        live.rows.push_back({row.logit_positions[p], plan.step, {begin, begin + static_cast<std::ptrdiff_t>(vocab)}});
      }
      const Scheduler::Request* request = scheduler_->Find(row.handle);
      if (request == nullptr) return fmt::format("request {} is gone in step {}", i, plan.step);
      live.tokens = request->tokens;
      if (request->output_tokens() >= request->params.max_tokens) {
        scheduler_->Finish(row.handle);
        live.over = true;
      }
    }
    return "";
  }

  // Each request alone, on one rank, its prompt in one step; its output is made the one that it had in the mix, so that
  // all of it can be compared, also behind a tie.
  std::string Compare() {
    const cp::ParallelConfig one{.block_tokens = 16};
    size_t longest = 1;
    for (const Live& live : live_) longest = std::max(longest, live.tokens.size());
    const auto alone = MakeExecutor(one, static_cast<int64_t>(longest) / one.block_tokens + 2, true);
    std::mt19937_64 rng(1);
    for (size_t i = 0; i < live_.size(); ++i) {
      const Live& live = live_[i];
      if (live.rows.empty()) continue;
      const auto prompt = std::ssize(live.prompt);
      DrivenRequest request{live.prompt, {live.tokens.begin() + prompt, live.tokens.end()}};
      if (request.forced_output.empty()) request.forced_output.push_back(0);  // not run
      const DrivenResult expected = Drive(*alone, one, {request}, {}, rng)[0];
      std::map<int64_t, int> times;
      for (const Computed& row : live.rows) {
        counts_.recomputed += ++times[row.position] > 1;
        ++counts_.compared_logits;
        const double error = RelativeError(row.logits, expected.logits.at(row.position));
        if (error <= kTolerance) continue;
        if (expected.IsRouterTie(row.position)) {
          ++counts_.router_ties;
          continue;
        }
        return fmt::format("request {}, position {} of {} of prompt and {} of output, step {}: relative error {}", i,
                           row.position, prompt, std::ssize(live.tokens) - prompt, row.step, error);
      }
      for (auto x = prompt; x < std::ssize(live.tokens); ++x) {
        const std::vector<float>& logits = expected.logits.at(x - 1);
        if (TopMargin(logits) < kNearTie || expected.IsRouterTie(x - 1)) continue;
        const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
        if (live.tokens[static_cast<size_t>(x)] != best) {
          return fmt::format("request {}, output {}: token {}, alone it is {}", i, x - prompt,
                             live.tokens[static_cast<size_t>(x)], best);
        }
        ++counts_.compared_tokens;
      }
    }
    return "";
  }

  const Mix& mix_;
  const ModelKind& kind_;
  MixCounts& counts_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<StepExecutor> executor_;
  std::vector<Live> live_;
  std::map<RequestHandle, size_t> index_;
};

rc::Gen<MixRequest> GenRequest() {
  return rc::gen::resize(
      rc::kNominalSize, rc::gen::exec([] {
        MixRequest r;
        r.wait = *rc::gen::weightedElement<int>({{8, 0}, {4, 1}, {2, 3}, {1, 10}, {1, 40}});
        r.parent = *rc::gen::inRange(0, 100);
        r.shared = *rc::gen::weightedElement<double>({{4, 0.0}, {2, 0.3}, {2, 0.9}, {2, 1.0}});
        r.own = *rc::gen::weightedOneOf<int64_t>({{3, rc::gen::inRange<int64_t>(1, 8)},
                                                  {5, rc::gen::inRange<int64_t>(1, 60)},
                                                  {3, rc::gen::inRange<int64_t>(30, 300)}});
        r.seed = *rc::gen::weightedOneOf<uint64_t>(
            {{1, rc::gen::inRange<uint64_t>(0, 3)}, {1, rc::gen::inRange<uint64_t>(0, 1000)}});
        r.max_tokens = *rc::gen::weightedOneOf<int>(
            {{1, rc::gen::just(1)}, {3, rc::gen::inRange(2, 25)}, {1, rc::gen::inRange(20, 60)}});
        r.priority = *rc::gen::weightedElement<int>({{4, 0}, {1, 1}, {1, -1}});
        r.salted = *rc::gen::weightedElement<bool>({{7, false}, {1, true}});
        r.prompt_logprobs = *rc::gen::weightedElement<bool>({{7, false}, {1, true}});
        r.abort_after = *rc::gen::weightedOneOf<int>({{5, rc::gen::just(-1)}, {1, rc::gen::inRange(0, 20)}});
        r.abort_in_execution = *rc::gen::arbitrary<bool>();
        return r;
      }));
}

const char* NameOf(ContextExchange exchange) {
  switch (exchange) {
    case ContextExchange::kAuto:
      return "auto";
    case ContextExchange::kGatherQ:
      return "gather-q";
    case ContextExchange::kGatherKv:
      return "gather-kv";
  }
  return "";
}

}  // namespace

const std::vector<ModelKind>& ModelKinds() {
  static const std::vector<ModelKind> kinds = {
      Kind("dense, 8 heads of 2 KV heads", {.heads = 8, .kv_heads = 2, .bias = true}),
      Kind("dense, 8 heads of 1 KV head", {.heads = 8, .kv_heads = 1, .qk_norm = true}),
      Kind("dense, 6 heads of 3 KV heads", {.heads = 6, .kv_heads = 3, .qk_norm = true, .tied = true}),
      Kind("7 experts, 8 heads of 2 KV heads", {.heads = 8, .kv_heads = 2, .qk_norm = true, .experts = 7}),
      Kind("MLA", {.heads = 8, .mla = true, .q_lora_rank = 22}),
      Kind("MLA, 14 experts", {.heads = 8, .mla = true, .experts = 14, .sigmoid = true}),
  };
  return kinds;
}

std::vector<cp::ParallelConfig> LegalLayouts(const ModelKind& kind, int max_ranks) {
  std::vector<cp::ParallelConfig> layouts;
  for (int32_t tp = 1; tp <= max_ranks; ++tp) {
    for (int32_t pcp = 1; tp * pcp <= max_ranks; ++pcp) {
      for (int32_t dcp = 1; dcp <= tp; ++dcp) {
        for (const auto& [block, interleave] :
             {std::pair{8, 1}, {8, 2}, {8, 8}, {4, 1}, {4, 4}, {5, 5}, {6, 3}, {16, 4}, {32, 1}, {32, 16}}) {
          for (const auto kv : {cp::PcpKvLayout::kSharded, cp::PcpKvLayout::kReplicated}) {
            if (kv == cp::PcpKvLayout::kReplicated && pcp == 1) continue;
            layouts.push_back({.prefill_context_parallel = pcp,
                               .decode_context_parallel = dcp,
                               .tensor_parallel = tp,
                               .kv_interleave = interleave,
                               .block_tokens = block,
                               .pcp_kv_layout = kv});
            try {
              cp::Validate(layouts.back(), kind.heads);
            } catch (const Error&) {
              layouts.pop_back();
            }
          }
        }
      }
    }
  }
  std::stable_sort(layouts.begin(), layouts.end(),
                   [](const auto& a, const auto& b) { return a.WorldSize() < b.WorldSize(); });
  return layouts;
}

Mix AnyMix(size_t kind) {
  const auto& model = ModelKinds().at(kind);
  const std::vector<cp::ParallelConfig> layouts = LegalLayouts(model, 8);
  Mix mix;
  mix.kind = kind;
  mix.weights = InRange<uint64_t>(0, 1 << 20);
  mix.parallel = layouts[InRange<size_t>(0, layouts.size())];
  mix.exchange = *rc::gen::element(ContextExchange::kAuto, ContextExchange::kGatherQ, ContextExchange::kGatherKv);
  // Of any machine, so that kAuto chooses this and that in one step; or none known.
  const auto rate = [](double least) { return least * std::pow(10.0, InRange(0, 50) / 10.0); };
  if (InRange(0, 4) > 0) {
    mix.rates = {.flop_per_s = rate(1e8),
                 .read_bytes_per_s = rate(1e8),
                 .exchange_bytes_per_s = rate(1e7),
                 .latency_s = rate(1e-9)};
  }
  mix.pcp_min_tokens = *rc::gen::element<int64_t>(1, 0, 10, 40, 1000);
  mix.solo_max_tokens = *rc::gen::element<int64_t>(0, 8, 64, 256);
  mix.stream = InRange(0, 3) == 1;
  mix.segment_tokens = *rc::gen::weightedElement<int64_t>({{6, 8192}, {6, 100}, {3, 30}, {1, 5}});
  if (model.config.moe) mix.parallel.expert_parallel = *rc::gen::arbitrary<bool>();
  mix.threads_per_rank = *rc::gen::weightedElement<int32_t>({{4, 1}, {1, 2}});
  mix.spare_blocks = *rc::gen::weightedOneOf<int64_t>(
      {{3, rc::gen::inRange<int64_t>(0, 4)}, {2, rc::gen::inRange<int64_t>(0, 12)}, {1, rc::gen::just<int64_t>(300)}});
  mix.max_num_seqs = *rc::gen::weightedElement<int64_t>({{4, 8}, {3, 20}, {2, 3}, {1, 1}});
  mix.max_num_batched_tokens = mix.max_num_seqs + *rc::gen::element<int64_t>(2000, 0, 7, 40, 150);
  mix.chunked_prefill = *rc::gen::weightedElement<bool>({{6, true}, {1, false}});
  mix.prefix_caching = *rc::gen::weightedElement<bool>({{3, true}, {1, false}});
  mix.requests = *rc::gen::resize(16, rc::gen::nonEmpty(rc::gen::container<std::vector<MixRequest>>(GenRequest())));
  // Now and then a long one.
  if (InRange(0, 20) == 7) mix.requests.back().own = InRange<int64_t>(300, 2500);
  // A chain of children would grow beyond the model.
  int64_t longest = 0;
  for (MixRequest& r : mix.requests) {
    if (longest + r.own + r.max_tokens > kMaxModelLen) r.shared = 0;
    longest = std::max(longest, static_cast<int64_t>(r.shared * static_cast<double>(longest)) + r.own + r.max_tokens);
  }
  return mix;
}

std::ostream& operator<<(std::ostream& out, const Mix& mix) {
  const cp::ParallelConfig& p = mix.parallel;
  out << fmt::format(
      "{}, weights {}\n"
      "TP {} PCP {} DCP {} interleave {} block {} {}{}, exchange {}{} (rates {:.2e} {:.2e} {:.2e} {:.2e}), segments of "
      "{}, "
      "cut from {}, solo up to {}, {} threads a rank\n"
      "{} spare blocks, {} tokens a step, {} sequences, chunked prefill {}, prefix cache {}\n",
      ModelKinds().at(mix.kind).name, mix.weights, p.tensor_parallel, p.prefill_context_parallel,
      p.decode_context_parallel, p.kv_interleave, p.block_tokens,
      p.pcp_kv_layout == cp::PcpKvLayout::kSharded ? "sharded" : "replicated", p.expert_parallel ? " EP" : "",
      NameOf(mix.exchange), mix.stream ? " in messages" : "", mix.rates.flop_per_s, mix.rates.read_bytes_per_s,
      mix.rates.exchange_bytes_per_s, mix.rates.latency_s, mix.segment_tokens, mix.pcp_min_tokens, mix.solo_max_tokens,
      mix.threads_per_rank, mix.spare_blocks, mix.max_num_batched_tokens, mix.max_num_seqs, mix.chunked_prefill,
      mix.prefix_caching);
  for (size_t i = 0; i < mix.requests.size(); ++i) {
    const MixRequest& r = mix.requests[i];
    out << fmt::format("request {}: {} steps after the one before, ", i, r.wait);
    if (i > 0 && r.shared > 0) {
      out << fmt::format("{} of request {}, then ", r.shared, static_cast<size_t>(r.parent) % i);
    }
    out << fmt::format("{} tokens of seed {}, output {}, priority {}{}{}", r.own, r.seed, r.max_tokens, r.priority,
                       r.salted ? ", salted" : "", r.prompt_logprobs ? ", prompt log-probabilities" : "");
    if (r.abort_after >= 0) {
      out << fmt::format(", aborted {} step {}", r.abort_in_execution ? "in" : "before", r.abort_after);
    }
    out << "\n";
  }
  return out;
}

std::string Problem(const Mix& mix, MixCounts& counts) {
  ++counts.mixes;
  return MixRun(mix, counts).Run();
}

namespace {

class RandomMix : public ::testing::TestWithParam<size_t> {};

// rapidcheck reads its options from RC_PARAMS: "max_success=5000" for so many mixes, "reproduce=..." (it prints which)
// for the one that failed.
constexpr const char* kDefaultParams = kSanitized ? "max_success=8" : "max_success=60";

TEST_P(RandomMix, EachRequestIsAsAloneOnOneRank) {
  InitLogging("warning");
  setenv("RC_PARAMS", kDefaultParams, /*replace=*/0);
  MixCounts counts;
  const auto property = [&] {
    // Other mixes than those of the other kinds.
    for (size_t i = 0; i < GetParam(); ++i) (void)*rc::gen::arbitrary<bool>();
    Mix mix = AnyMix(GetParam());
    std::vector<ContextExchange> exchanges = {mix.exchange};
    // Now and then the same mix in every way.
    if (InRange(0, 10) == 7) {
      exchanges = {ContextExchange::kAuto, ContextExchange::kGatherQ, ContextExchange::kGatherKv};
    }
    for (const ContextExchange exchange : exchanges) {
      mix.exchange = exchange;
      RC_LOG() << mix;
      const std::string problem = Problem(mix, counts);
      if (!problem.empty()) RC_FAIL(problem);
    }
  };
  rc::detail::checkGTest(property);
  if (HasFatalFailure()) return;
  std::printf(
      "%lld mixes, %lld steps, %lld logits and %lld tokens compared, %lld preemptions, %lld positions "
      "recomputed, %lld tokens found in the prefix cache, %lld of them copied, %lld + %lld aborts\n",
      static_cast<long long>(counts.mixes), static_cast<long long>(counts.steps),
      static_cast<long long>(counts.compared_logits), static_cast<long long>(counts.compared_tokens),
      static_cast<long long>(counts.preemptions), static_cast<long long>(counts.recomputed),
      static_cast<long long>(counts.prefix_hits), static_cast<long long>(counts.copied),
      static_cast<long long>(counts.aborts), static_cast<long long>(counts.aborts_in_execution));
  // Of rows one in a million or so: scores of the order of 1, errors of 1e-7 to 1e-6.
  EXPECT_LE(counts.router_ties, 1 + counts.compared_logits / 200000);
  EXPECT_GT(counts.compared_logits, 0);
  if (counts.router_ties > 0) std::printf("%lld near ties of experts\n", static_cast<long long>(counts.router_ties));
  if (counts.mixes < 50) return;  // a few, or the one that failed
  EXPECT_GT(counts.compared_tokens, 0);
  EXPECT_GT(counts.preemptions, 0);
  EXPECT_GT(counts.recomputed, 0);
  EXPECT_GT(counts.prefix_hits, 0);
  EXPECT_GT(counts.copied, 0);
  EXPECT_GT(counts.aborts, 0);
  EXPECT_GT(counts.aborts_in_execution, 0);
}

std::vector<size_t> AllKinds() {
  std::vector<size_t> kinds(ModelKinds().size());
  for (size_t i = 0; i < kinds.size(); ++i) kinds[i] = i;
  return kinds;
}
INSTANTIATE_TEST_SUITE_P(Kinds, RandomMix, ::testing::ValuesIn(AllKinds()));

}  // namespace
}  // namespace weft::testing
