#pragma once
// For the layout tests: requests, and what one rank makes of each of them alone, its prompt in one step.

#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "weft/core/error.h"
#include "weft/runner/test_support.h"

namespace weft::testing {

inline constexpr double kTolerance = 1e-4;
inline constexpr int32_t kBlock = 8;

// What of the executor is chosen besides the layout.
struct Choices {
  ContextExchange exchange = ContextExchange::kAuto;
  int64_t pcp_min_tokens = 1;   // every prompt is cut
  int64_t solo_max_tokens = 0;  // PCP rank 0 never works alone
  bool stream = false;          // messages, as between processes, where memory is shared
  int64_t segment_tokens = 8192;
};

// For `tokens` tokens of KV.
inline ExecutorOptions OptionsOf(const cp::ParallelConfig& parallel, int64_t tokens, const Choices& choices = {}) {
  ExecutorOptions options;
  options.exchange = choices.exchange;
  options.pcp_min_tokens = choices.pcp_min_tokens;
  options.solo_max_tokens = choices.solo_max_tokens;
  options.stream = choices.stream;
  options.context_segment_tokens = choices.segment_tokens;
  options.parallel = parallel;
  options.dtype = DType::kF32;
  options.kv_dtype = DType::kF32;
  options.threads_per_rank = 1;
  options.num_blocks = tokens / (int64_t{parallel.block_tokens} * parallel.KvShards()) + 16;
  options.progress = false;
  return options;
}

inline std::unique_ptr<StepExecutor> MakeExecutor(const SmallModel& model, const cp::ParallelConfig& parallel,
                                                  uint64_t seed, int64_t tokens, const Choices& choices = {}) {
  return MakeThreadExecutor(OptionsOf(parallel, tokens, choices), RandomCheckpoint(SmallConfig(model), seed));
}

inline std::string Name(const cp::ParallelConfig& p) {
  return fmt::format("tp{}_pcp{}_dcp{}_i{}_b{}{}{}", p.tensor_parallel, p.prefill_context_parallel,
                     p.decode_context_parallel, p.kv_interleave, p.block_tokens,
                     p.pcp_kv_layout == cp::PcpKvLayout::kReplicated ? "_replicated" : "",
                     p.expert_parallel ? "_ep" : "");
}

// Requests, and what one rank makes of each of them alone.
class Oracle {
 public:
  Oracle(const SmallModel& model, uint64_t seed, std::mt19937_64& rng) : model_(model), seed_(seed), rng_(rng) {
    executor_ = MakeExecutor(model, one_, seed, 8192);
  }

  void Add(int64_t prompt_tokens, int64_t output_tokens) {
    DrivenRequest request;
    std::uniform_int_distribution<int32_t> token(0, 130);
    for (int64_t i = 0; i < prompt_tokens; ++i) request.prompt.push_back(token(rng_));
    request.forced_output = GreedyOutput(*executor_, one_, request.prompt, output_tokens);
    expected_.push_back(Drive(*executor_, one_, {request}, {}, rng_)[0]);
    EXPECT_EQ(expected_.back().sampled, request.forced_output);
    for (const auto& [position, logits] : expected_.back().logits) {
      ++positions_;
      ties_ += expected_.back().IsRouterTie(position);
    }
    EXPECT_LE(ties_, 2 + positions_ / 50);  // or nothing would be compared
    requests_.push_back(std::move(request));
  }

  void Check(StepExecutor& executor, const cp::ParallelConfig& parallel, const DriveOptions& options) {
    SCOPED_TRACE(Name(parallel));
    const std::vector<DrivenResult> got = Drive(executor, parallel, requests_, options, rng_);
    for (size_t i = 0; i < got.size(); ++i) {
      ASSERT_EQ(got[i].logits.size(), expected_[i].logits.size());
      double worst = 0;
      int64_t at = 0;
      for (const auto& [position, logits] : expected_[i].logits) {
        const double error = RelativeError(got[i].logits.at(position), logits);
        if (!(error <= worst) && !(error > kTolerance && expected_[i].IsRouterTie(position))) {
          worst = error;
          at = position;
        }
      }
      ASSERT_LE(worst, kTolerance) << "request " << i << " of " << requests_[i].prompt.size() << " tokens at " << at;
      for (size_t k = 0; k < got[i].sampled.size(); ++k) {
        const auto position = static_cast<int64_t>(requests_[i].prompt.size() + k) - 1;
        // Only a tie that the tolerance cannot tell apart may go the other way.
        if (TopMargin(expected_[i].logits.at(position)) < 1e-3 || expected_[i].IsRouterTie(position)) continue;
        ASSERT_EQ(got[i].sampled[k], requests_[i].forced_output[k]) << "request " << i << ", output " << k;
      }
    }
  }

  void Check(const cp::ParallelConfig& parallel, const DriveOptions& options, const Choices& choices = {}) {
    SCOPED_TRACE(fmt::format("exchange {}, cut from {}, alone up to {}{}, segments of {}",
                             static_cast<int>(choices.exchange), choices.pcp_min_tokens, choices.solo_max_tokens,
                             choices.stream ? ", streamed" : "", choices.segment_tokens));
    int64_t tokens = 0;
    for (const auto& request : requests_) {
      tokens += static_cast<int64_t>(request.prompt.size() + request.forced_output.size());
      tokens += int64_t{parallel.block_tokens} * parallel.KvShards();
    }
    Check(*MakeExecutor(model_, parallel, seed_, tokens, choices), parallel, options);
  }

 private:
  SmallModel model_;
  uint64_t seed_;
  std::mt19937_64& rng_;
  cp::ParallelConfig one_{.block_tokens = kBlock};
  std::unique_ptr<StepExecutor> executor_;
  std::vector<DrivenRequest> requests_;
  std::vector<DrivenResult> expected_;
  int64_t positions_ = 0, ties_ = 0;
};

// Every legal (TP, PCP, DCP, interleave) of at most `max_ranks` ranks.
inline std::vector<cp::ParallelConfig> LegalLayouts(const SmallModel& model, int max_ranks, int32_t block = kBlock) {
  std::vector<cp::ParallelConfig> layouts;
  for (int32_t tp = 1; tp <= max_ranks; ++tp) {
    for (int32_t pcp = 1; tp * pcp <= max_ranks; ++pcp) {
      for (int32_t dcp = 1; dcp <= tp; ++dcp) {
        for (int32_t interleave = 1; interleave <= block; ++interleave) {
          const cp::ParallelConfig layout{.prefill_context_parallel = pcp,
                                          .decode_context_parallel = dcp,
                                          .tensor_parallel = tp,
                                          .kv_interleave = interleave,
                                          .block_tokens = block};
          try {
            cp::Validate(layout, HeadsOf(model));
          } catch (const Error&) {
            continue;
          }
          // The interleave does nothing on one shard.
          if (layout.KvShards() == 1 && interleave > 1) continue;
          layouts.push_back(layout);
          cp::ParallelConfig replicated = layout;
          replicated.pcp_kv_layout = cp::PcpKvLayout::kReplicated;
          if (pcp > 1 && (dcp > 1 || interleave == 1)) layouts.push_back(replicated);
        }
      }
    }
  }
  return layouts;
}

}  // namespace weft::testing
