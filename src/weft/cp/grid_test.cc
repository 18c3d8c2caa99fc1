#include "weft/cp/grid.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

#include "weft/core/error.h"

namespace weft::cp {
namespace {

ParallelConfig Config(int32_t dp, int32_t pcp, int32_t dcp, int32_t tp, int32_t interleave = 1, int32_t block = 16) {
  return {.data_parallel = dp,
          .prefill_context_parallel = pcp,
          .decode_context_parallel = dcp,
          .tensor_parallel = tp,
          .kv_interleave = interleave,
          .block_tokens = block};
}

// Counts ranks by nested loops instead of dividing.
TEST(Grid, CoordinatesAndGroups) {
  for (const int32_t dp : {1, 2}) {
    for (const int32_t pcp : {1, 2, 3}) {
      for (const int32_t tp : {1, 2, 4, 6}) {
        for (int32_t dcp = 1; dcp <= tp; ++dcp) {
          if (tp % dcp != 0) continue;
          const ParallelConfig config = Config(dp, pcp, dcp, tp);
          EXPECT_EQ(config.WorldSize(), dp * pcp * tp);
          int32_t rank = 0;
          for (int32_t d = 0; d < dp; ++d) {
            for (int32_t p = 0; p < pcp; ++p) {
              for (int32_t t = 0; t < tp; ++t, ++rank) {
                const RankCoord coord = CoordOf(config, rank);
                EXPECT_EQ(coord.rank, rank);
                EXPECT_EQ(coord.dp, d);
                EXPECT_EQ(coord.pcp, p);
                EXPECT_EQ(coord.tp, t);
                EXPECT_EQ(coord.kv_shard, p * dcp + coord.dcp);
                // I am in each of my groups, at my own index, and all members agree on the group.
                const auto check = [&](auto group_of, int32_t index, int32_t size) {
                  const std::vector<int32_t> group = group_of(config, rank);
                  ASSERT_EQ(group.size(), static_cast<size_t>(size));
                  EXPECT_EQ(group[static_cast<size_t>(index)], rank);
                  for (const int32_t member : group) EXPECT_EQ(group_of(config, member), group);
                };
                check(TpGroup, t, tp);
                check(PcpGroup, p, pcp);
                check(DcpGroup, coord.dcp, dcp);
                check(CpGroup, coord.kv_shard, pcp * dcp);
                // DCP groups are consecutive TP ranks.
                const std::vector<int32_t> dcp_group = DcpGroup(config, rank);
                for (size_t i = 1; i < dcp_group.size(); ++i) EXPECT_EQ(dcp_group[i], dcp_group[i - 1] + 1);
                // The shards of a CP group are 0 .. W-1, each once.
                int32_t shard = 0;
                for (const int32_t member : CpGroup(config, rank)) EXPECT_EQ(CoordOf(config, member).kv_shard, shard++);
              }
            }
          }
          EXPECT_EQ(rank, config.WorldSize());
        }
      }
    }
  }
}

TEST(Grid, ADcpGroupHoldsOneKvHead) {
  const ModelHeads model{.heads = 16, .kv_heads = 2};
  for (const int32_t dcp : {1, 2, 4}) {
    const ParallelConfig config = Config(1, 2, dcp, 8);
    Validate(config, model);
    for (int32_t rank = 0; rank < config.WorldSize(); ++rank) {
      std::set<int32_t> heads;
      for (const int32_t member : CpGroup(config, rank))
        heads.insert(CoordOf(config, member).tp / (8 / model.kv_heads));
      EXPECT_EQ(heads.size(), 1u);
    }
  }
}

// Brute force over small grids: legal exactly when the tokens and heads can be dealt out evenly.
TEST(Validate, AcceptsExactlyTheLegalOnes) {
  int legal = 0;
  for (int32_t heads = 1; heads <= 12; ++heads) {
    for (int32_t kv_heads = 1; kv_heads <= heads; ++kv_heads) {
      if (heads % kv_heads != 0) continue;
      for (int32_t tp = 1; tp <= 12; ++tp) {
        for (int32_t dcp = 1; dcp <= 12; ++dcp) {
          // KV head of each TP rank, replicas side by side; a DCP group must hold one head and lie on whole ranks.
          bool ok = tp % dcp == 0 && heads % tp == 0 && (tp % kv_heads == 0 || kv_heads % tp == 0);
          if (ok && dcp > 1) {
            ok = tp > kv_heads;
            for (int32_t t = 0; ok && t < tp; ++t) ok = t * kv_heads / tp == (t - t % dcp) * kv_heads / tp;
          }
          bool accepted = true;
          try {
            Validate(Config(1, 2, dcp, tp), {.heads = heads, .kv_heads = kv_heads});
          } catch (const Error&) {
            accepted = false;
          }
          EXPECT_EQ(accepted, ok) << "heads " << heads << " kv " << kv_heads << " tp " << tp << " dcp " << dcp;
          legal += ok;
        }
      }
    }
  }
  EXPECT_GT(legal, 100);
}

void ExpectRefused(const ParallelConfig& config, const ModelHeads& model, const std::string& flag,
                   const std::string& value, const std::string& rule) {
  try {
    Validate(config, model);
    ADD_FAILURE() << "accepted; expected: " << flag << " = " << value << ": " << rule;
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kInvalidArgument);
    EXPECT_EQ(error.param(), flag);
    EXPECT_EQ(std::string(error.what()).rfind(flag + " = " + value + ": ", 0), 0u) << error.what();
    EXPECT_NE(std::string(error.what()).find(rule), std::string::npos) << error.what();
  }
}

TEST(Validate, NamesFlagValueAndRule) {
  const ModelHeads gqa{.heads = 16, .kv_heads = 2};
  ExpectRefused(Config(0, 1, 1, 1), gqa, "--data-parallel-size", "0", "at least 1");
  ExpectRefused(Config(1, -3, 1, 1), gqa, "--prefill-context-parallel-size", "-3", "at least 1");
  ExpectRefused(Config(1, 1, 0, 1), gqa, "--decode-context-parallel-size", "0", "at least 1");
  ExpectRefused(Config(1, 1, 1, 0), gqa, "--tensor-parallel-size", "0", "at least 1");
  ExpectRefused(Config(1, 1, 1, 1, 0), gqa, "--cp-kv-cache-interleave-size", "0", "at least 1");
  ExpectRefused(Config(1, 1, 1, 1, 1, 0), gqa, "--block-size", "0", "at least 1");
  ExpectRefused(Config(1, 1 << 20, 1, 1 << 20), gqa, "--tensor-parallel-size", "1048576", "ranks in all");
  ExpectRefused(Config(1, 1, 4, 2), gqa, "--decode-context-parallel-size", "4",
                "must divide --tensor-parallel-size = 2");
  ExpectRefused(Config(1, 1, 3, 8), gqa, "--decode-context-parallel-size", "3",
                "must divide --tensor-parallel-size = 8");
  ExpectRefused(Config(1, 1, 1, 3), gqa, "--tensor-parallel-size", "3", "attention heads, 16");
  ExpectRefused(Config(1, 1, 1, 4), {.heads = 12, .kv_heads = 3}, "--tensor-parallel-size", "4", "KV heads, 3");
  ExpectRefused(Config(1, 1, 1, 3), {.heads = 12, .kv_heads = 4}, "--tensor-parallel-size", "3", "KV heads, 4");
  ExpectRefused(Config(1, 1, 2, 2), gqa, "--decode-context-parallel-size", "2", "must be 1");
  ExpectRefused(Config(1, 1, 8, 8), gqa, "--decode-context-parallel-size", "8", "same KV head, 4");
  ExpectRefused(Config(1, 1, 1, 1, 3, 16), gqa, "--cp-kv-cache-interleave-size", "3", "must divide --block-size = 16");
  // MLA: one latent on every rank, so only D | TP.
  EXPECT_NO_THROW(Validate(Config(1, 2, 8, 8), {.heads = 16, .kv_heads = 16, .mla = true}));
  EXPECT_NO_THROW(Validate(Config(1, 2, 4, 8), gqa));
}

}  // namespace
}  // namespace weft::cp
