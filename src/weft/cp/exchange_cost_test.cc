#include "weft/cp/exchange_cost.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cmath>

#include "weft/cp/test_random.h"

namespace weft::cp {
namespace {

// A core with AVX-512; a network of 10 Gbit/s.
constexpr MachineRates kRates{
    .flop_per_s = 200e9, .read_bytes_per_s = 20e9, .exchange_bytes_per_s = 1.2e9, .latency_s = 5e-6};
// A head of 128, 4 query heads for each of 2 KV heads, bf16.
constexpr AttentionShape kGqa{.heads = 8,
                              .kv_heads = 2,
                              .k_dim = 128,
                              .v_dim = 128,
                              .cached_k_dim = 128,
                              .cached_v_dim = 128,
                              .cached_bytes = 2 * 256 * 2};
// DeepSeek-V2-Lite.
constexpr AttentionShape kMla{.heads = 16,
                              .kv_heads = 1,
                              .k_dim = 192,
                              .v_dim = 128,
                              .cached_k_dim = 576,
                              .cached_v_dim = 512,
                              .cached_bytes = 576 * 2,
                              .expand_flop = 2.0 * 512 * 16 * 256};

bool GathersQ(const ExchangeItem& item, const AttentionShape& shape, const ExchangeGroup& group,
              const MachineRates& rates = kRates) {
  return ChooseGatherQ(std::span(&item, 1), shape, group, rates).at(0);
}

TEST(ExchangeCost, LongContextsOfDecodeRowsGatherQ) {
  const ExchangeItem decode{.context = 100000, .tokens = 1, .decode = true};
  for (const bool messages : {false, true}) {
    EXPECT_TRUE(GathersQ(decode, kGqa, {.shards = 4, .dcp = 4, .messages = messages}));
    EXPECT_TRUE(GathersQ(decode, kGqa, {.shards = 4, .dcp = 2, .pcp_ranks = 2, .messages = messages}));
    EXPECT_TRUE(GathersQ(decode, kMla, {.shards = 8, .dcp = 8, .messages = messages}));
    EXPECT_TRUE(GathersQ(decode, kMla, {.shards = 2, .dcp = 1, .pcp_ranks = 2, .messages = messages}));
  }
  // On one shard MLA chooses the form of its keys: absorbed for one row.
  EXPECT_TRUE(GathersQ(decode, kMla, {}));
}

TEST(ExchangeCost, PromptsWithLittleContextGatherKv) {
  for (const int64_t context : {0, 500}) {
    const ExchangeItem prompt{.context = context, .tokens = 2048, .cut = true};
    for (const bool messages : {false, true}) {
      const ExchangeGroup group{.shards = 2, .dcp = 1, .pcp_ranks = 2, .messages = messages};
      EXPECT_FALSE(GathersQ(prompt, kGqa, group));
      EXPECT_FALSE(GathersQ(prompt, kMla, group));
    }
    EXPECT_FALSE(GathersQ(prompt, kMla, {}));
  }
}

TEST(ExchangeCost, OverAWireTheCrossoverOfAChunkIsWhereBytesAreEqual) {
  const ExchangeGroup group{.shards = 2, .dcp = 1, .pcp_ranks = 2, .messages = true};
  // Nothing but the wire counts.
  const MachineRates wire{
      .flop_per_s = 1e18, .read_bytes_per_s = 1e18, .exchange_bytes_per_s = 1e9, .latency_s = 1e-12};
  const auto item = [](int64_t context) { return ExchangeItem{.context = context, .tokens = 512, .cut = true}; };
  // Received: half of the context's keys (1024 bytes each), or half of the queries of 512 rows (8 x 128 floats) and
  // half of two results for each of 256 rows (8 x 129 floats).
  const int64_t equal = 512 * (8 * 128 + 8 * 129) * 4 / 1024;
  EXPECT_FALSE(GathersQ(item(equal - 8), kGqa, group, wire));
  EXPECT_TRUE(GathersQ(item(equal + 8), kGqa, group, wire));
}

TEST(ExchangeCost, AFewNewTokensBehindALongLatentAreAbsorbed) {
  const ExchangeGroup alone;
  EXPECT_TRUE(GathersQ({.context = 30000, .tokens = 20}, kMla, alone));
  EXPECT_FALSE(GathersQ({.context = 30000, .tokens = 2000}, kMla, alone));
}

TEST(ExchangeCost, AShortPromptIsNotLeftToOneRank) {
  // 30 new tokens are not cut; with gather-Q both ranks work for them.
  const ExchangeGroup group{.shards = 2, .dcp = 1, .pcp_ranks = 2};
  EXPECT_TRUE(GathersQ({.context = 50000, .tokens = 30}, kGqa, group));
  EXPECT_FALSE(GathersQ({.context = 0, .tokens = 30}, kGqa, group));
}

TEST(ExchangeCost, WithoutRatesByState) {
  const std::vector<ExchangeItem> items = {{.context = 10, .decode = true}, {.tokens = 50}, {.context = 9000}};
  const auto chosen = ChooseGatherQ(items, kGqa, {.shards = 2, .dcp = 2}, {});
  EXPECT_EQ(chosen, (std::vector<bool>{true, false, false}));
}

TEST(ExchangeCost, ASecondExchangeHasToPayForItself) {
  const ExchangeGroup group{.shards = 4, .dcp = 4};
  const std::vector<ExchangeItem> items = {{.context = 30000, .decode = true},
                                           {.context = 0, .tokens = 2000, .cut = true}};
  MachineRates rates = kRates;
  rates.latency_s = 1e-9;
  EXPECT_EQ(ChooseGatherQ(items, kGqa, group, rates), (std::vector<bool>{true, false}));
  rates.latency_s = 1;  // then one exchange for both, and keys have fewer
  EXPECT_EQ(ChooseGatherQ(items, kGqa, group, rates), (std::vector<bool>{false, false}));
}

ExchangeGroup AnyGroup() {
  ExchangeGroup group;
  group.dcp = InRange(1, 5);
  group.pcp_ranks = InRange(1, 5);
  group.shards = group.dcp * (InRange(0, 3) > 0 ? group.pcp_ranks : 1);
  group.messages = InRange(0, 2) == 1;
  return group;
}

ExchangeItem AnyItem(const ExchangeGroup& group) {
  ExchangeItem item;
  item.context = InRange<int64_t>(0, 200000);
  item.decode = InRange(0, 3) == 0;
  item.tokens = item.decode ? 1 : InRange<int64_t>(1, 4096);
  item.cut = !item.decode && group.pcp_ranks > 1 && InRange(0, 2) == 1;
  return item;
}

RC_GTEST_PROP(ExchangeCostProperty, CostsGrowWithContextAndRows, ()) {
  const ExchangeGroup group = AnyGroup();
  const ExchangeItem item = AnyItem(group);
  const AttentionShape& shape = InRange(0, 2) == 0 ? kGqa : kMla;
  ExchangeItem longer = item;
  longer.context += InRange<int64_t>(1, 10000);
  ExchangeItem more = item;
  more.tokens += InRange<int64_t>(1, 1000);
  for (const auto cost : {GatherKvSeconds, GatherQSeconds}) {
    const double base = cost(item, shape, group, kRates, 1);
    RC_ASSERT(base > 0);
    RC_ASSERT(cost(longer, shape, group, kRates, 1) > base);
    RC_ASSERT(cost(more, shape, group, kRates, 1) >= base);
    // Nothing gets slower on a faster machine, nor with others to share the work.
    MachineRates faster = kRates;
    faster.flop_per_s *= 2;
    faster.read_bytes_per_s *= 2;
    faster.exchange_bytes_per_s *= 2;
    RC_ASSERT(cost(item, shape, group, faster, 1) < base);
    RC_ASSERT(cost(item, shape, group, kRates, 3) <= base);
  }
}

RC_GTEST_PROP(ExchangeCostProperty, OneChoiceForAStepThatIsNoDearerThanEitherKindAlone, ()) {
  const ExchangeGroup group = AnyGroup();
  std::vector<ExchangeItem> items(InRange<size_t>(1, 8));
  for (ExchangeItem& item : items) item = AnyItem(group);
  const AttentionShape& shape = InRange(0, 2) == 0 ? kGqa : kMla;
  const std::vector<bool> chosen = ChooseGatherQ(items, shape, group, kRates);
  RC_ASSERT(chosen == ChooseGatherQ(items, shape, group, kRates));
  const auto whole = std::ranges::count_if(items, [](const ExchangeItem& item) { return !item.cut; });
  const auto total = [&](const auto& gathers_q) {
    double sum = 0;
    bool any_q = false, any_kv = false;
    for (size_t i = 0; i < items.size(); ++i) {
      const bool q = gathers_q(i);
      (q ? any_q : any_kv) = true;
      sum += (q ? GatherQSeconds : GatherKvSeconds)(items[i], shape, group, kRates, whole);
    }
    const double latency = group.shards > 1 ? kRates.latency_s : 0;
    return sum + latency * (2 * any_q + any_kv);
  };
  const double got = total([&](size_t i) { return chosen[i]; });
  RC_ASSERT(got <= total([](size_t) { return true; }) * (1 + 1e-12));
  RC_ASSERT(got <= total([](size_t) { return false; }) * (1 + 1e-12));
}

// bf16, Qwen3-0.6B's layer.
int64_t CutFrom(const MachineRates& rates, int32_t ranks, bool solo) {
  return MinTokensToCut(rates, 2, 31.5e6, ranks, solo);
}

TEST(MinTokensToCut, FollowsTheRatesOfTheMachine) {
  EXPECT_EQ(CutFrom({}, 2, true), 48);
  // 10 rows balance reading and arithmetic.
  EXPECT_EQ(CutFrom(kRates, 2, true), 80);
  EXPECT_EQ(CutFrom(kRates, 2, false), 20);
  EXPECT_EQ(CutFrom(kRates, 3, true), 120);
  EXPECT_EQ(MinTokensToCut(kRates, 4, 31.5e6, 2, true), 160);  // f32 weights take twice as long to read
  // Two exchanges of 2 ms each in every layer against half of 0.1575 ms a token.
  MachineRates slow = kRates;
  slow.latency_s = 2e-3;
  EXPECT_EQ(CutFrom(slow, 2, false), 51);
  slow.latency_s = 1;
  EXPECT_EQ(CutFrom(slow, 2, false), 192);
}

TEST(MinTokensToCut, StaysWithinReason) {
  EXPECT_TRUE(rc::check([] {
    const auto rate = [] { return std::pow(10.0, InRange(0, 160) / 10.0 - 2); };
    const MachineRates rates{.flop_per_s = rate(), .read_bytes_per_s = rate(), .latency_s = rate() * 1e-6};
    const int64_t tokens = MinTokensToCut(rates, 2, rate(), InRange(2, 9), InRange(0, 2) == 1);
    RC_ASSERT(tokens >= 2);
    RC_ASSERT(tokens <= 192);
  }));
}

}  // namespace
}  // namespace weft::cp
