#pragma once
// How fast this machine is at what the choice between gather-Q and gather-KV weighs (cp/exchange_cost.h), measured at
// start-up in some milliseconds, and the same for all ranks.

#include "weft/core/thread_pool.h"
#include "weft/cp/exchange_cost.h"
#include "weft/cp/grid.h"
#include "weft/kernels/table.h"
#include "weft/model/config.h"
#include "weft/model/weights.h"
#include "weft/parallel/communicator.h"

namespace weft {

// Attention of one layer on one rank of this grid.
cp::AttentionShape AttentionShapeOf(const ModelConfig& config, const cp::ParallelConfig& parallel, DType kv_dtype);

// Collective over `group`, the ranks of the KV shards, whose exchange is measured, and meant to be called by all ranks
// of the world at once: so they run in the steps. `weights` are read as products read them. `messages`:
// the exchange is measured also where memory is shared, as ExecutorOptions::stream has it.
cp::MachineRates MeasureRates(const KernelTable& kernels, const cp::AttentionShape& shape, const ModelWeights& weights,
                              ThreadPool& pool, Communicator& group, bool messages = false);

// Those of rank 0, for all. Collective over `world`.
cp::MachineRates AgreeOnRates(const cp::MachineRates& mine, Communicator& world);
// Whether `mine` is true on any rank. Collective over `world`.
bool AnyRank(bool mine, Communicator& world);

}  // namespace weft
