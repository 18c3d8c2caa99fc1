#include "weft/cp/grid.h"

#include <fmt/format.h>

#include <limits>
#include <string_view>

#include "weft/core/error.h"

namespace weft::cp {
namespace {

constexpr const char kTp[] = "--tensor-parallel-size";
constexpr const char kPcp[] = "--prefill-context-parallel-size";
constexpr const char kDcp[] = "--decode-context-parallel-size";
constexpr const char kDp[] = "--data-parallel-size";
constexpr const char kInterleave[] = "--cp-kv-cache-interleave-size";
constexpr const char kBlock[] = "--block-size";

// "--flag = 3: rule".
[[noreturn]] void Refuse(const char* flag, int64_t value, std::string_view rule) {
  throw Error(fmt::format("{} = {}: {}", flag, value, rule), ErrorKind::kInvalidArgument, flag);
}

void RequirePositive(const char* flag, int32_t value) {
  if (value < 1) Refuse(flag, value, "must be at least 1");
}

void ValidateHeads(const ParallelConfig& config, const ModelHeads& model) {
  const int32_t tp = config.tensor_parallel;
  const int32_t dcp = config.decode_context_parallel;
  WEFT_CHECK(model.heads >= 1 && model.kv_heads >= 1, "heads = {}, kv_heads = {}", model.heads, model.kv_heads);
  if (model.heads % tp != 0) {
    Refuse(kTp, tp, fmt::format("must divide the model's number of attention heads, {}", model.heads));
  }
  if (model.mla) return;  // one latent, whole on every TP rank: any D that divides TP will do
  if (tp <= model.kv_heads) {
    if (model.kv_heads % tp != 0) {
      Refuse(kTp, tp,
             fmt::format("must divide the model's number of KV heads, {}, or be a multiple of it", model.kv_heads));
    }
    if (dcp != 1) {
      Refuse(kDcp, dcp,
             fmt::format("must be 1 where {} = {} is not greater than the model's number of KV heads, {}: no two ranks "
                         "hold the same KV head, so there is no copy to split",
                         kTp, tp, model.kv_heads));
    }
    return;
  }
  if (tp % model.kv_heads != 0) {
    Refuse(
        kTp, tp,
        fmt::format("must be a multiple of the model's number of KV heads, {}, where it is greater", model.kv_heads));
  }
  const int32_t copies = tp / model.kv_heads;
  if (dcp > copies || copies % dcp != 0) {
    Refuse(kDcp, dcp,
           fmt::format("must divide the number of TP ranks that hold the same KV head, {} (= {} {} / {} KV heads)",
                       copies, kTp, tp, model.kv_heads));
  }
}

}  // namespace

void Validate(const ParallelConfig& config, const ModelHeads& model) {
  RequirePositive(kDp, config.data_parallel);
  RequirePositive(kPcp, config.prefill_context_parallel);
  RequirePositive(kDcp, config.decode_context_parallel);
  RequirePositive(kTp, config.tensor_parallel);
  RequirePositive(kInterleave, config.kv_interleave);
  RequirePositive(kBlock, config.block_tokens);

  // Ranks are counted, and virtual blocks indexed, in 32 bits; far below that no machine exists.
  constexpr int64_t kMaxRanks = 1 << 16;
  int64_t world = 1;
  for (const auto& [flag, value] :
       {std::pair{kTp, config.tensor_parallel}, std::pair{kPcp, config.prefill_context_parallel},
        std::pair{kDp, config.data_parallel}}) {
    world *= value;
    if (world > kMaxRanks) Refuse(flag, value, fmt::format("asks for more than {} ranks in all", kMaxRanks));
  }

  const int32_t tp = config.tensor_parallel;
  const int32_t dcp = config.decode_context_parallel;
  if (dcp > tp || tp % dcp != 0) {
    Refuse(kDcp, dcp, fmt::format("must divide {} = {}: it subdivides the TP ranks", kTp, tp));
  }
  if (config.block_tokens % config.kv_interleave != 0) {
    Refuse(kInterleave, config.kv_interleave, fmt::format("must divide {} = {}", kBlock, config.block_tokens));
  }
  ValidateHeads(config, model);
}

RankCoord CoordOf(const ParallelConfig& config, int32_t rank) {
  WEFT_CHECK(rank >= 0 && rank < config.WorldSize(), "rank {} of {}", rank, config.WorldSize());
  RankCoord coord;
  coord.rank = rank;
  coord.tp = rank % config.tensor_parallel;
  coord.pcp = rank / config.tensor_parallel % config.prefill_context_parallel;
  coord.dp = rank / config.tensor_parallel / config.prefill_context_parallel;
  coord.dcp = coord.tp % config.decode_context_parallel;
  coord.kv_shard = (coord.pcp * config.decode_context_parallel + coord.dcp) % config.KvShards();
  return coord;
}

namespace {

int32_t RankOf(const ParallelConfig& config, int32_t dp, int32_t pcp, int32_t tp) {
  return (dp * config.prefill_context_parallel + pcp) * config.tensor_parallel + tp;
}

}  // namespace

std::vector<int32_t> TpGroup(const ParallelConfig& config, int32_t rank) {
  const RankCoord me = CoordOf(config, rank);
  std::vector<int32_t> group;
  for (int32_t tp = 0; tp < config.tensor_parallel; ++tp) group.push_back(RankOf(config, me.dp, me.pcp, tp));
  return group;
}

std::vector<int32_t> PcpGroup(const ParallelConfig& config, int32_t rank) {
  const RankCoord me = CoordOf(config, rank);
  std::vector<int32_t> group;
  for (int32_t pcp = 0; pcp < config.prefill_context_parallel; ++pcp) {
    group.push_back(RankOf(config, me.dp, pcp, me.tp));
  }
  return group;
}

std::vector<int32_t> DcpGroup(const ParallelConfig& config, int32_t rank) {
  const RankCoord me = CoordOf(config, rank);
  std::vector<int32_t> group;
  for (int32_t dcp = 0; dcp < config.decode_context_parallel; ++dcp) {
    group.push_back(RankOf(config, me.dp, me.pcp, me.tp - me.dcp + dcp));
  }
  return group;
}

std::vector<int32_t> CpGroup(const ParallelConfig& config, int32_t rank) {
  if (config.pcp_kv_layout == PcpKvLayout::kReplicated) return DcpGroup(config, rank);
  const RankCoord me = CoordOf(config, rank);
  std::vector<int32_t> group;
  for (int32_t pcp = 0; pcp < config.prefill_context_parallel; ++pcp) {
    for (int32_t dcp = 0; dcp < config.decode_context_parallel; ++dcp) {
      group.push_back(RankOf(config, me.dp, pcp, me.tp - me.dcp + dcp));
    }
  }
  return group;
}

}  // namespace weft::cp
