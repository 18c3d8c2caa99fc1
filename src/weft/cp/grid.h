#pragma once
// The rank grid: world = DP x PCP x TP, rank = (dp*PCP + pcp)*TP + tp; DCP subdivides TP.

#include <cstdint>
#include <string>
#include <vector>

#include "weft/cp/layout.h"

namespace weft::cp {

// What PCP does to the KV cache (--pcp-kv-layout).
enum class PcpKvLayout {
  kSharded,     // KV over P*D shards: the most room
  kReplicated,  // PCP divides compute only: every PCP rank holds the request's KV over its D shards
};

struct ParallelConfig {
  int32_t data_parallel = 1;
  int32_t prefill_context_parallel = 1;  // P
  int32_t decode_context_parallel = 1;   // D
  int32_t tensor_parallel = 1;           // TP
  int32_t kv_interleave = 1;             // I, --cp-kv-cache-interleave-size
  int32_t block_tokens = 128;            // B, --block-size
  PcpKvLayout pcp_kv_layout = PcpKvLayout::kSharded;
  bool expert_parallel = false;  // --enable-expert-parallel: whole experts on the ranks of the world, not slices by TP

  int32_t WorldSize() const { return data_parallel * prefill_context_parallel * tensor_parallel; }
  // Number of KV shards W: P*D, or D where every PCP rank holds all.
  int32_t KvShards() const {
    return pcp_kv_layout == PcpKvLayout::kReplicated ? decode_context_parallel
                                                     : prefill_context_parallel * decode_context_parallel;
  }
};

// Where this grid's KV cache keeps a token.
inline KvLayout LayoutOf(const ParallelConfig& parallel) {
  return {.block_tokens = parallel.block_tokens, .interleave = parallel.kv_interleave, .shards = parallel.KvShards()};
}

// What of a model the rank grid has to fit.
struct ModelHeads {
  int32_t heads = 1;
  int32_t kv_heads = 1;
  bool mla = false;  // one latent for all heads: every TP rank holds a copy
};

// Throws weft::Error naming the flag, the value and the rule when the layout is not legal.
void Validate(const ParallelConfig& config, const ModelHeads& model);

struct RankCoord {
  int32_t rank = 0;
  int32_t dp = 0;
  int32_t pcp = 0;
  int32_t tp = 0;
  int32_t dcp = 0;       // tp % D
  int32_t kv_shard = 0;  // cp_rank = pcp*D + dcp; where KV is replicated over PCP: dcp
};
RankCoord CoordOf(const ParallelConfig& config, int32_t rank);

// World ranks of the groups that `rank` belongs to, ascending by their own index in the group.
std::vector<int32_t> TpGroup(const ParallelConfig& config, int32_t rank);   // same dp, pcp; index = tp
std::vector<int32_t> PcpGroup(const ParallelConfig& config, int32_t rank);  // same dp, tp; index = pcp
std::vector<int32_t> DcpGroup(const ParallelConfig& config, int32_t rank);  // D consecutive tp ranks; index = dcp
// The W ranks that together hold this rank's KV head(s): its DCP group on every PCP rank, or its own DCP group where
// KV is replicated over PCP; index = kv_shard.
std::vector<int32_t> CpGroup(const ParallelConfig& config, int32_t rank);

}  // namespace weft::cp
