#pragma once
// Runs steps on ranks: threads of this process, or (mpi_executor.h) of several.

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "weft/core/dtype.h"
#include "weft/cp/grid.h"
#include "weft/model/checkpoint.h"
#include "weft/runner/rank_batch.h"
#include "weft/runner/step_plan.h"

namespace weft {

struct ExecutorOptions {
  cp::ParallelConfig parallel;
  DType dtype = DType::kBF16;     // weights: kBF16 or kF32
  DType kv_dtype = DType::kBF16;  // kBF16 or kF32
  std::string kernels = "auto";   // "auto", "cpu", "ref"
  int32_t threads_per_rank = 0;   // 0: the CPUs of this process divided by the ranks, at least 1
  // Size of the KV cache: virtual blocks if not 0, else bytes for all ranks together.
  int64_t num_blocks = 0;
  int64_t kv_cache_bytes = 0;
  int64_t max_model_len = 0;  // positions that rope is prepared for; 0: the model's
  ContextExchange exchange = ContextExchange::kAuto;
  // Measure this machine for `exchange` = kAuto and `pcp_min_tokens` = 0, in some milliseconds, when the ranks are
  // made; else these are its rates.
  bool measure_rates = false;
  cp::MachineRates rates = {};
  int64_t pcp_min_tokens = 0;     // prompts of fewer new tokens are not cut over PCP ranks; 0: by the rates
  int64_t solo_max_tokens = 256;  // BatchOptions::solo_max_tokens
  // Keys from earlier steps that prompts get from other processes, or expand (MLA), at a time: the bound on the memory
  // that they take (--cp-context-segment-tokens).
  int64_t context_segment_tokens = 8192;
  bool stream = false;  // exchange in messages what could be read in place (tests)
  uint64_t seed = 0;
  bool progress = true;  // show how the weights are loaded
  // Several processes: a step that takes longer than so many seconds has failed, and so have all processes.
  double step_timeout_s = 600;
};

// Throws weft::Error, naming flag, value and rule, where this model cannot be laid out so.
void ValidateLayout(const cp::ParallelConfig& parallel, const ModelConfig& config);

// Bytes of KV cache, over all ranks, that one virtual block takes.
int64_t VirtualBlockBytes(const ModelConfig& config, const cp::ParallelConfig& parallel, DType kv_dtype);

// Loads the weights, makes the ranks and their KV caches. One replica (data_parallel = 1): see replicas.h. Throws
// weft::Error: an illegal layout, a missing tensor, too little memory for a single block.
std::unique_ptr<StepExecutor> MakeThreadExecutor(const ExecutorOptions& options,
                                                 std::shared_ptr<const Checkpoint> checkpoint);

}  // namespace weft
