// What planning a step and taking in its result costs, without the step itself. Target: at most 50 us at 64 requests.
#include <benchmark/benchmark.h>

#include <algorithm>

#include "weft/scheduler/scheduler.h"

namespace weft {
namespace {

constexpr cp::KvLayout kLayout{.block_tokens = 128, .interleave = 1, .shards = 2};

EngineRequest Request(int64_t prompt_tokens) {
  EngineRequest request;
  request.prompt_token_ids.assign(static_cast<size_t>(prompt_tokens), 7);
  request.params.max_tokens = 1 << 30;
  return request;
}

StepOutput Tokens(const StepPlan& plan) {
  StepOutput output;
  for (const RequestStep& step : plan.requests) {
    if (!step.sample) continue;
    RowOutput& row = output.rows.emplace_back();
    row.handle = step.handle;
    row.token_id = 7;
  }
  return output;
}

// All requests decode; every 256 steps each takes a further virtual block.
void Decode(benchmark::State& state) {
  const int64_t requests = state.range(0);
  constexpr int64_t kBlocks = int64_t{1} << 20;
  Scheduler scheduler({.max_model_len = kBlocks * kLayout.VirtualBlockTokens(),
                       .max_num_batched_tokens = 1 << 20,
                       .max_num_seqs = requests},
                      kLayout, kBlocks);
  for (int64_t i = 0; i < requests; ++i) {
    if (!scheduler.Add(Request(1000))) return state.SkipWithError("a request was refused");
  }
  const StepPlan prefill = scheduler.Plan();
  scheduler.Update(prefill, Tokens(prefill));
  for (auto _ : state) {
    const StepPlan plan = scheduler.Plan();
    state.PauseTiming();
    StepOutput output = Tokens(plan);
    state.ResumeTiming();
    benchmark::DoNotOptimize(scheduler.Update(plan, std::move(output)));
  }
}
BENCHMARK(Decode)->Arg(1)->Arg(16)->Arg(64)->Arg(256)->Unit(benchmark::kMicrosecond);

// Requests come, run for a while and go, with blocks a little short: admission, release and preemption.
void Churn(benchmark::State& state) {
  const int64_t requests = state.range(0);
  Scheduler scheduler({.max_model_len = 4096, .max_num_batched_tokens = 8192, .max_num_seqs = requests}, kLayout,
                      requests * 5);
  int64_t steps = 0;
  for (auto _ : state) {
    while (scheduler.num_running() + scheduler.num_waiting() < requests + 4) {
      EngineRequest request = Request(1000);
      request.params.max_tokens = 300;
      if (!scheduler.Add(std::move(request))) return state.SkipWithError("a request was refused");
    }
    const StepPlan plan = scheduler.Plan();
    state.PauseTiming();
    StepOutput output = Tokens(plan);
    state.ResumeTiming();
    for (const RowOutput& row : scheduler.Update(plan, std::move(output))) {
      const Scheduler::Request* request = scheduler.Find(row.handle);
      if (request->output_tokens() == request->params.max_tokens) scheduler.Finish(row.handle);
    }
    ++steps;
  }
  state.counters["preemptions/step"] =
      static_cast<double>(scheduler.Stats().preemptions) / static_cast<double>(std::max<int64_t>(1, steps));
}
BENCHMARK(Churn)->Arg(64)->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace weft
