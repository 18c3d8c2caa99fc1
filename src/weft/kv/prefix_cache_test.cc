#include "weft/kv/prefix_cache.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>

#include "weft/cp/test_random.h"
#include "weft/kv/kv_manager.h"

namespace weft {
namespace {

using cp::InRange;
using Tokens = std::vector<int32_t>;

// Few different tokens, so that sequences agree for a while by chance, too.
Tokens AnyTokens(size_t n, int32_t kinds) {
  Tokens tokens(n);
  for (int32_t& token : tokens) token = InRange(0, kinds);
  return tokens;
}

int64_t Common(const Tokens& a, const Tokens& b) {
  int64_t n = 0;
  while (n < static_cast<int64_t>(std::min(a.size(), b.size())) &&
         a[static_cast<size_t>(n)] == b[static_cast<size_t>(n)])
    ++n;
  return n;
}

uint64_t OneHash(uint64_t, std::span<const int32_t>) { return 7; }
uint64_t WeakHash(uint64_t parent, std::span<const int32_t> tokens) {
  return (parent + static_cast<uint64_t>(std::accumulate(tokens.begin(), tokens.end(), 0))) % 3;
}

// Against a list of what was inserted: nothing wrong is found, and nothing longer could have been. Also when all chains
// have the same hash.
TEST(PrefixCache, FindsTheLongestBeginningAndNothingElse) {
  EXPECT_TRUE(rc::check([] {
    const int64_t whole = InRange<int64_t>(1, 6);
    const int32_t num_blocks = InRange(1, 40);
    const int32_t kinds = InRange(1, 4);
    const auto hash = *rc::gen::element(&PrefixCache::DefaultHash, &OneHash, &WeakHash);
    PrefixCache cache(whole, num_blocks, hash);
    struct Known {
      std::string salt;
      Tokens chain;  // from the sequence's beginning to the end of the block
    };
    std::map<int32_t, Known> known;
    const auto salt = [] { return *rc::gen::element<std::string>("", "a", "b"); };
    std::vector<Tokens> seen;
    const auto tokens = [&](int64_t n) {
      Tokens t = seen.empty() || InRange(0, 4) == 0 ? Tokens{} : seen[InRange<size_t>(0, seen.size())];
      t.resize(std::min(t.size(), InRange<size_t>(0, t.size() + 1)));
      const Tokens more = AnyTokens(static_cast<size_t>(InRange<int64_t>(0, n + 1)), kinds);
      t.insert(t.end(), more.begin(), more.end());
      if (static_cast<int64_t>(t.size()) > n) t.resize(static_cast<size_t>(n));
      seen.push_back(t);
      return t;
    };
    for (int i = InRange(1, 40); i > 0; --i) {
      const std::string at = salt();
      std::vector<int32_t> changed;
      if (InRange(0, 3) != 0) {
        // A sequence in blocks that the cache does not know, published in one go or two.
        std::vector<int32_t> blocks;
        for (int32_t b = 0; b < num_blocks; ++b) {
          if (!cache.Knows(b)) blocks.push_back(b);
        }
        const Tokens t = tokens(static_cast<int64_t>(blocks.size()) * whole);
        PrefixCache::Cursor cursor;
        const size_t first = InRange<size_t>(0, t.size() + 1);
        for (const size_t n : {first, t.size()}) {
          const bool partial = InRange(0, 2) == 1;
          cache.Insert(at, std::span(t).first(n), blocks, partial, cursor, changed);
          for (size_t b = 0; b * static_cast<size_t>(whole) < n; ++b) {
            const size_t end = std::min(n, (b + 1) * static_cast<size_t>(whole));
            if (!cache.Knows(blocks[b])) continue;
            const bool full = end == (b + 1) * static_cast<size_t>(whole);
            Known& entry = known[blocks[b]];
            if (full || partial) entry = {at, Tokens(t.begin(), t.begin() + static_cast<std::ptrdiff_t>(end))};
          }
        }
      } else if (!known.empty()) {
        const int32_t block = std::next(known.begin(), InRange<std::ptrdiff_t>(0, std::ssize(known)))->first;
        cache.Remove(block, changed);
        RC_ASSERT(!cache.Knows(block));
      }
      std::erase_if(known, [&](const auto& entry) { return !cache.Knows(entry.first); });
      RC_ASSERT(cache.size() == std::ssize(known));

      const Tokens wanted = tokens(InRange<int64_t>(0, 30));
      const std::string of = salt();
      const PrefixCache::Match match = cache.Find(of, wanted);
      RC_ASSERT(match.blocks.empty() == (match.node == 0));
      RC_ASSERT((match.partial_tokens > 0) == (match.partial_block >= 0));
      int64_t end = 0;
      const auto holds = [&](int32_t block) {
        RC_ASSERT(known.contains(block));
        RC_ASSERT(known[block].salt == of);
        RC_ASSERT(Common(known[block].chain, wanted) >= end);
      };
      for (const int32_t block : match.blocks) {
        end += whole;
        holds(block);
        RC_ASSERT(std::ssize(known[block].chain) == end);
      }
      end += match.partial_tokens;
      if (match.partial_block >= 0) holds(match.partial_block);
      int64_t best = 0;
      for (const auto& [block, entry] : known) {
        const int64_t begin = (std::ssize(entry.chain) - 1) / whole * whole;
        const int64_t common = Common(entry.chain, wanted);
        if (entry.salt == of && common > begin) best = std::max(best, common);
      }
      RC_ASSERT(end == best);
    }
  }));
}

// Equal hashes cost comparisons: the hash has to follow the parent and every token, and their order.
TEST(PrefixCache, TheHashFollowsTheParentAndEveryToken) {
  const Tokens tokens = {5, 6, 7, 8};
  std::set<uint64_t> hashes = {PrefixCache::DefaultHash(1, tokens), PrefixCache::DefaultHash(2, tokens)};
  for (size_t i = 0; i < tokens.size(); ++i) {
    Tokens other = tokens;
    other[i] = 9;
    hashes.insert(PrefixCache::DefaultHash(1, other));
  }
  hashes.insert(PrefixCache::DefaultHash(1, Tokens{6, 5, 7, 8}));
  hashes.insert(PrefixCache::DefaultHash(1, Tokens{5, 6, 7}));
  EXPECT_EQ(hashes.size(), 2 + tokens.size() + 2);
}

TEST(PrefixCache, SaltsShareNothing) {
  PrefixCache cache(2, 4);
  PrefixCache::Cursor cursor;
  std::vector<int32_t> changed;
  cache.Insert("a", Tokens{1, 2, 3}, Tokens{0, 1}, true, cursor, changed);
  EXPECT_EQ(cache.Find("a", Tokens{1, 2, 3}).blocks, Tokens{0});
  EXPECT_EQ(cache.Find("a", Tokens{1, 2, 3}).partial_block, 1);
  EXPECT_TRUE(cache.Find("", Tokens{1, 2, 3}).blocks.empty());
  EXPECT_TRUE(cache.Find("b", Tokens{1, 2, 3}).blocks.empty());
}

TEST(PrefixCache, ABlockIsFoundOnlyBehindItsOwnParents) {
  for (const auto hash : {&PrefixCache::DefaultHash, &OneHash}) {
    PrefixCache cache(2, 8, hash);
    PrefixCache::Cursor a, b;
    std::vector<int32_t> changed;
    cache.Insert("", Tokens{1, 2, 5, 6}, Tokens{0, 1}, true, a, changed);
    cache.Insert("", Tokens{3, 4, 5, 7}, Tokens{2, 3}, true, b, changed);
    EXPECT_EQ(cache.Find("", Tokens{3, 4, 5, 6}).blocks, Tokens{2});
    EXPECT_EQ(cache.Find("", Tokens{3, 4, 5, 6}).partial_block, 3);
    EXPECT_EQ(cache.Find("", Tokens{3, 4, 5, 6}).partial_tokens, 1);
    EXPECT_TRUE(cache.Find("", Tokens{5, 6}).blocks.empty());
    // With a parent its children go.
    cache.Remove(0, changed);
    EXPECT_EQ(cache.size(), 2);
    EXPECT_FALSE(cache.Knows(1));
    EXPECT_TRUE(cache.Find("", Tokens{1, 2, 5, 6}).blocks.empty());
  }
}

// The twin that came first is the known one; when it goes, the other takes its place.
TEST(PrefixCache, ATwinTakesThePlaceOfTheOneThatWent) {
  PrefixCache cache(2, 8);
  PrefixCache::Cursor a, b;
  std::vector<int32_t> changed;
  cache.Insert("", Tokens{1, 2}, Tokens{0}, true, a, changed);
  cache.Insert("", Tokens{1, 2, 3, 4}, Tokens{1, 2}, true, b, changed);
  EXPECT_EQ(cache.Find("", Tokens{1, 2, 3, 4}).blocks, (Tokens{0, 2}));
  cache.Remove(0, changed);
  EXPECT_TRUE(cache.Find("", Tokens{1, 2, 3, 4}).blocks.empty());
  cache.Insert("", Tokens{1, 2, 3, 4, 5}, Tokens{1, 2, 3}, true, b, changed);
  EXPECT_EQ(cache.Find("", Tokens{1, 2, 3, 4}).blocks, (Tokens{1, 2}));
  EXPECT_EQ(cache.Find("", Tokens{1, 2, 3, 4, 5}).partial_block, 3);
}

// KvManager with the cache: a model of the memory says what every slot holds, and every sequence must find its own
// tokens in its table, whatever was shared, copied, evicted. Evictions happen only for lack of blocks, the least
// recently used one first.
TEST(KvManagerWithPrefixCache, SequencesFindTheirOwnTokens) {
  int64_t hits = 0, copies = 0, evictions = 0;
  EXPECT_TRUE(rc::check([&] {
    const int32_t interleave = *rc::gen::element(1, 2);
    const cp::KvLayout layout{
        .block_tokens = interleave * InRange(1, 4), .interleave = interleave, .shards = InRange(1, 4)};
    const int64_t whole = layout.VirtualBlockTokens();
    const int64_t blocks = InRange<int64_t>(2, 24);
    KvManager kv(layout, blocks);
    std::vector<std::vector<Tokens>> memory(static_cast<size_t>(blocks),
                                            std::vector<Tokens>(static_cast<size_t>(whole)));
    struct Sequence {
      std::string salt;
      Tokens tokens;
      int64_t computed = 0;
      BlockTable table;
    };
    std::vector<Sequence> live;
    std::vector<Tokens> seen;
    const auto slot = [&](const Sequence& s, int64_t x) -> Tokens& {
      return memory[static_cast<size_t>(s.table.blocks[static_cast<size_t>(x / whole)])]
                   [static_cast<size_t>(x % whole)];
    };
    // What a slot holds: the salt and the history up to its token.
    const auto history = [](const Sequence& s, int64_t x) {
      Tokens h = {s.salt.empty() ? -1 : -2};
      h.insert(h.end(), s.tokens.begin(), s.tokens.begin() + x + 1);
      return h;
    };
    for (int i = InRange(1, 60); i > 0; --i) {
      const int64_t cached = kv.num_cached_blocks();
      const int64_t free = kv.num_free_blocks();
      if (live.empty() || InRange(0, 3) == 0) {
        Sequence s;
        s.salt = *rc::gen::element<std::string>("", "", "", "salt");
        if (!seen.empty() && InRange(0, 4) != 0) s.tokens = seen[InRange<size_t>(0, seen.size())];
        s.tokens.resize(InRange<size_t>(0, s.tokens.size() + 1));
        const Tokens more = AnyTokens(InRange<size_t>(1, 12), 3);
        s.tokens.insert(s.tokens.end(), more.begin(), more.end());
        seen.push_back(s.tokens);
        PrefixHit hit = kv.FindPrefix(s.salt, s.tokens);
        RC_ASSERT(hit.tokens < std::ssize(s.tokens));
        if (!kv.AllocateWithPrefix(s.table, hit, std::ssize(s.tokens), 0)) {
          RC_ASSERT(layout.BlocksFor(std::ssize(s.tokens)) > free);  // a hit never asks for more than none
          RC_ASSERT(kv.num_cached_blocks() == cached);
          continue;
        }
        hits += std::ssize(hit.blocks);
        if (hit.copy_source >= 0) {
          ++copies;
          RC_ASSERT(std::ranges::count(s.table.blocks, hit.copy_source) == 0);
          const int32_t to = s.table.blocks[hit.blocks.size()];
          for (int64_t v = 0; v < whole; ++v) {
            memory[static_cast<size_t>(to)][static_cast<size_t>(v)] =
                v < hit.copy_tokens ? memory[static_cast<size_t>(hit.copy_source)][static_cast<size_t>(v)] : Tokens{};
          }
          kv.Unpin(hit.copy_source);
        }
        s.computed = hit.tokens;
        live.push_back(std::move(s));
      } else {
        const size_t which = InRange<size_t>(0, live.size());
        Sequence& s = live[which];
        switch (InRange(0, 3)) {
          case 0:  // the end
            kv.Publish(s.salt, s.table, std::span(s.tokens).first(static_cast<size_t>(s.computed)), true);
            kv.Free(s.table);
            RC_ASSERT(s.table.blocks.empty());
            live.erase(live.begin() + static_cast<std::ptrdiff_t>(which));
            break;
          case 1: {  // more tokens
            const int64_t tokens = std::ssize(s.tokens) + InRange(0, 5);
            if (!kv.Allocate(s.table, tokens)) break;
            const Tokens more = AnyTokens(static_cast<size_t>(tokens) - s.tokens.size(), 3);
            s.tokens.insert(s.tokens.end(), more.begin(), more.end());
            seen.push_back(s.tokens);
            break;
          }
          default: {  // computes some
            const int64_t end = InRange<int64_t>(s.computed, std::ssize(s.tokens) + 1);
            for (; s.computed < end; ++s.computed) slot(s, s.computed) = history(s, s.computed);
            kv.Publish(s.salt, s.table, std::span(s.tokens).first(static_cast<size_t>(end)), InRange(0, 2) == 1);
          }
        }
      }
      std::map<int32_t, int> users;
      for (const Sequence& s : live) {
        for (int64_t x = 0; x < s.computed; ++x) RC_ASSERT(slot(s, x) == history(s, x));
        for (const int32_t block : s.table.blocks) ++users[block];
        // Only blocks that are full and computed may have other users.
        for (size_t b = static_cast<size_t>(s.computed / whole); b < s.table.blocks.size(); ++b) {
          int uses = 0;
          for (const Sequence& other : live)
            uses += static_cast<int>(std::ranges::count(other.table.blocks, s.table.blocks[b]));
          RC_ASSERT(uses == 1);
        }
      }
      RC_ASSERT(kv.num_free_blocks() == blocks - std::ssize(users));
      evictions += kv.num_cached_blocks() < cached && kv.num_free_blocks() < free;
    }
  }));
  // It was not trivial.
  EXPECT_GT(hits, 50);
  EXPECT_GT(copies, 50);
  EXPECT_GT(evictions, 20);
}

Tokens Iota(int32_t first, int32_t n) {
  Tokens tokens(static_cast<size_t>(n));
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

// A sequence that is computed, published and freed.
Tokens Leave(KvManager& kv, const Tokens& tokens) {
  BlockTable table;
  PrefixHit hit = kv.FindPrefix("", tokens);
  EXPECT_TRUE(kv.AllocateWithPrefix(table, hit, std::ssize(tokens), 0));
  if (hit.copy_source >= 0) kv.Unpin(hit.copy_source);
  kv.Publish("", table, tokens, true);
  const Tokens blocks = table.blocks;
  kv.Free(table);
  return blocks;
}

TEST(KvManagerWithPrefixCache, TheLeastRecentlyUsedGoesFirstAndTheEndOfAChainBeforeItsBeginning) {
  KvManager kv({.block_tokens = 4}, 6);
  Leave(kv, Iota(0, 8));
  Leave(kv, Iota(100, 8));
  EXPECT_EQ(kv.FindPrefix("", Iota(0, 9)).tokens, 8);
  Leave(kv, Iota(0, 8));  // used again (7 tokens: the last one is always computed), in a copy of its second block
  // The two blocks that hold nothing go first.
  BlockTable table;
  ASSERT_TRUE(kv.Allocate(table, 8));
  EXPECT_EQ(kv.num_cached_blocks(), 4);
  ASSERT_TRUE(kv.Allocate(table, 12));
  EXPECT_EQ(kv.FindPrefix("", Iota(100, 9)).tokens, 4);
  ASSERT_TRUE(kv.Allocate(table, 16));
  EXPECT_EQ(kv.FindPrefix("", Iota(100, 9)).tokens, 0);
  EXPECT_EQ(kv.FindPrefix("", Iota(0, 9)).tokens, 8);
  ASSERT_TRUE(kv.Allocate(table, 20));
  EXPECT_EQ(kv.FindPrefix("", Iota(0, 9)).tokens, 4);
}

TEST(KvManagerWithPrefixCache, ABlockInUseIsNeverEvicted) {
  KvManager kv({.block_tokens = 4}, 3);
  const Tokens blocks = Leave(kv, Iota(0, 8));
  BlockTable user;
  PrefixHit hit = kv.FindPrefix("", Iota(0, 9));
  ASSERT_TRUE(kv.AllocateWithPrefix(user, hit, 9, 0));
  EXPECT_EQ(Tokens(user.blocks.begin(), user.blocks.begin() + 2), blocks);
  BlockTable other;
  EXPECT_FALSE(kv.Allocate(other, 1));
  kv.Free(user);
  EXPECT_TRUE(kv.Allocate(other, 4));
  EXPECT_EQ(kv.FindPrefix("", Iota(0, 9)).tokens, 8);
}

TEST(KvManagerWithPrefixCache, WithoutRoomForBothEndsOfACopyThereIsNone) {
  KvManager kv({.block_tokens = 4}, 2);
  Leave(kv, Iota(0, 7));
  Tokens tokens = Iota(0, 6);
  BlockTable table;
  PrefixHit hit = kv.FindPrefix("", tokens);
  EXPECT_EQ(hit.tokens, 5);
  ASSERT_TRUE(kv.AllocateWithPrefix(table, hit, 6, 0));
  EXPECT_EQ(hit.tokens, 4);
  EXPECT_EQ(hit.copy_source, -1);
}

TEST(KvManagerWithPrefixCache, OffFindsNothing) {
  KvManager kv({.block_tokens = 4}, 8, /*prefix_caching=*/false);
  Leave(kv, Iota(0, 8));
  EXPECT_EQ(kv.FindPrefix("", Iota(0, 9)).tokens, 0);
  EXPECT_EQ(kv.num_cached_blocks(), 0);
}

}  // namespace
}  // namespace weft
