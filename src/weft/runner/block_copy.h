#pragma once
// Copies within one rank's KV cache: what a request shares of a block that others continue differently.

#include <cstdint>

#include "weft/core/thread_pool.h"
#include "weft/cp/layout.h"
#include "weft/model/kv_cache.h"
#include "weft/runner/step_plan.h"

namespace weft {

// The part of `copy` that is on KV shard `shard`: the first LocalLen(copy.tokens, shard) rows of the block, of all
// layers and all KV heads of this rank.
void CopyBlock(const BlockCopy& copy, const cp::KvLayout& layout, int32_t shard, const KvCache& cache,
               ThreadPool& pool);

}  // namespace weft
