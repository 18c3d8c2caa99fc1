#pragma once
// Where the tokens of a sequence live when its KV cache is spread over W = PCP x DCP shards, and how the new tokens of
// a prompt are dealt to the PCP ranks. Pure values and functions, no I/O; everybody who needs this arithmetic calls it
// here. Formulas: docs/context_parallel.md.

#include <cstdint>
#include <vector>

namespace weft::cp {

// A *virtual block* is the `shards` physical blocks with the same index on all shards: block_tokens * shards tokens.
struct KvLayout {
  int32_t block_tokens = 128;  // B, tokens of a physical block
  int32_t interleave = 1;      // I, tokens that go to one shard before the next one's turn; divides B
  int32_t shards = 1;          // W

  int64_t VirtualBlockTokens() const { return int64_t{block_tokens} * shards; }
  // Index into the request's block table of the token at global position x.
  int64_t VirtualBlock(int64_t x) const { return x / VirtualBlockTokens(); }
  // The shard that stores global position x.
  int32_t Owner(int64_t x) const { return static_cast<int32_t>((x % VirtualBlockTokens()) / interleave % shards); }
  // The offset of global position x in its owner's physical block.
  int32_t Offset(int64_t x) const {
    const int64_t v = x % VirtualBlockTokens();
    return static_cast<int32_t>(v / (int64_t{shards} * interleave) * interleave + v % interleave);
  }
  // How many of the tokens 0 .. length-1 shard r stores. They are its local positions 0 .. LocalLen-1, in order and
  // without gaps in its blocks, so that the keys visible to a query at position p are its first LocalLen(p + 1, r).
  int64_t LocalLen(int64_t length, int32_t r) const {
    const int64_t round = int64_t{interleave} * shards;
    const int64_t whole = length / round * interleave;
    const int64_t rest = length % round - int64_t{r} * interleave;
    return whole + (rest < 0 ? 0 : rest > interleave ? interleave : rest);
  }
  // Inverse: the global position of the k-th token of shard r.
  int64_t GlobalPosition(int64_t k, int32_t r) const {
    return k / interleave * (int64_t{interleave} * shards) + int64_t{r} * interleave + k % interleave;
  }
  // Virtual blocks needed to hold `length` tokens.
  int64_t BlocksFor(int64_t length) const { return (length + VirtualBlockTokens() - 1) / VirtualBlockTokens(); }
};

// Consecutive query tokens of one request.
struct Chunk {
  int64_t first = 0;  // global position
  int64_t tokens = 0;
  friend bool operator==(const Chunk&, const Chunk&) = default;
};

// The chunks of the new tokens [first, first + tokens) that PCP rank `rank` of `ranks` computes (head and tail): the
// tokens are cut into 2*ranks chunks of ceil(tokens / (2*ranks)), clipped at the end; rank p takes chunks p and
// 2*ranks-1-p, in this order; empty ones are dropped. With one rank the two chunks touch: callers may join them.
std::vector<Chunk> SplitPrefill(int64_t first, int64_t tokens, int32_t ranks, int32_t rank);

}  // namespace weft::cp
