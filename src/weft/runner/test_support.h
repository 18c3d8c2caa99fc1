#pragma once
// For the tests of this folder: a checkpoint of random weights without files, and a driver that takes requests through
// an executor in random steps.

#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "weft/cp/grid.h"
#include "weft/model/checkpoint.h"
#include "weft/runner/executor.h"
#include "weft/runner/step_plan.h"

namespace weft::testing {

// A seed that differs from run to run, printed so that a failure can be made again: WEFT_TEST_SEED=n sets it.
uint64_t FreshSeed();

// Sanitizers find the same in a sample, and take ten times as long.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

// Every element is a function of (seed, tensor, index).
std::shared_ptr<const Checkpoint> RandomCheckpoint(const ModelConfig& config, uint64_t seed);

struct SmallModel {
  int64_t heads = 8;
  int64_t kv_heads = 2;
  bool qk_norm = false;
  bool bias = false;
  bool tied = false;
  bool mla = false;  // kv_heads is then 1, whatever it says
  int64_t q_lora_rank = 0;
  int64_t experts = 0;   // a mixture of so many in all layers but the first
  bool sigmoid = false;  // DeepSeek-V3's choice of experts, else Qwen3-MoE's
};
// What of it the rank grid has to fit.
cp::ModelHeads HeadsOf(const SmallModel& model);
// Odd sizes: a vocabulary and a width of the MLP that nothing divides.
ModelConfig SmallConfig(const SmallModel& model);

struct DrivenRequest {
  std::vector<int32_t> prompt;
  // The output that is fed back whatever the executor chooses, so that runs can be compared step by step. Its last
  // token is not run.
  std::vector<int32_t> forced_output;
};

struct DriveOptions {
  // 0: a request's known tokens all in one step; else random pieces of up to so many.
  int64_t max_chunk = 0;
  // Requests take part in a step at random, and start at random.
  bool mixed = false;
  double preempt = 0.0;  // chance of a request to lose its blocks before a step
};

// Experts whose scores are this close may change places with the order of sums, and the token's output with them: f32
// scores of tokens whose logits agree within 1e-4 differ by some 1e-6.
inline constexpr float kRouterTie = 3e-5f;

struct DrivenResult {
  std::map<int64_t, std::vector<float>> logits;  // by position; the last computation of a position counts
  std::map<int64_t, float> router_margins;       // by position, where the model has experts
  std::vector<int32_t> sampled;                  // greedy, one per output position

  // Whether the position's output may be another one as well. The experts of the small models are in their last layer,
  // so that no other position changes with it.
  bool IsRouterTie(int64_t position) const {
    const auto margin = router_margins.find(position);
    return margin != router_margins.end() && margin->second < kRouterTie;
  }
};

// Runs the requests to their end. Blocks are given out in random order and come back in random order.
std::vector<DrivenResult> Drive(StepExecutor& executor, const cp::ParallelConfig& parallel,
                                const std::vector<DrivenRequest>& requests, const DriveOptions& options,
                                std::mt19937_64& rng);

// The request alone, free-running: its greedy output of `tokens` tokens.
std::vector<int32_t> GreedyOutput(StepExecutor& executor, const cp::ParallelConfig& parallel,
                                  const std::vector<int32_t>& prompt, int64_t tokens);

// ||a - b|| / ||b||
double RelativeError(const std::vector<float>& a, const std::vector<float>& b);
// The distance of the two largest.
double TopMargin(const std::vector<float>& logits);

}  // namespace weft::testing
