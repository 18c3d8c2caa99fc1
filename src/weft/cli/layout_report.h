#pragma once
// What a layout does with one prompt: who holds which tokens, who computes which, what each rank stores. For
// `weft inspect layout`. All of it from the functions of cp/ that the engine itself calls.

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "weft/cp/deal.h"
#include "weft/cp/grid.h"
#include "weft/cp/layout.h"

namespace weft::cli {

struct LayoutQuery {
  cp::ParallelConfig parallel;
  cp::ModelHeads heads;
  int64_t prompt_tokens = 1;
  int64_t cached_tokens = 0;       // found in the prefix cache: stored, not computed; below prompt_tokens
  int64_t tokens_per_step = 2048;  // --max-num-batched-tokens
  cp::QueryCosts costs;            // what a token and a pair of tokens weigh
  int64_t kv_token_bytes = 0;      // bytes of KV that a rank stores for a token of its shard; 0: not known
};

struct LayoutReport {
  struct Heads {
    int64_t first = 0;
    int64_t count = 0;
  };
  struct Rank {
    cp::RankCoord coord;
    Heads heads;     // attention heads that it computes
    Heads kv_heads;  // whose keys and values it stores; with MLA the latent counts as one
    int64_t tokens = 0;
    int64_t kv_bytes = 0;            // of these tokens
    int64_t allocated_kv_bytes = 0;  // of the blocks that hold them
  };
  struct Shard {
    int64_t tokens = 0;
    int64_t first = -1;  // position of its first token; -1: it has none
    int64_t last = -1;
  };
  struct Part {
    int32_t pcp = 0;
    std::vector<cp::Chunk> chunks;
    int64_t tokens = 0;
    double work = 0;  // share of the step's, 0 .. 1
  };
  struct Step {
    cp::Chunk chunk;
    bool cut = false;  // over the PCP ranks; else one of them runs it whole
    std::vector<Part> parts;
  };
  LayoutQuery query;
  cp::KvLayout layout;
  int64_t blocks = 0;  // virtual ones of the prompt
  std::vector<Rank> ranks;
  std::vector<Shard> shards;
  std::vector<Step> steps;
  std::vector<double> work;   // of each PCP rank, share of all steps
  double critical_share = 0;  // the sum over the steps of the largest part, of all work: 1 / PCP is perfect
};

// Throws weft::Error: an illegal layout, or numbers that do not go together.
LayoutReport MakeLayoutReport(const LayoutQuery& query);

std::string TextOf(const LayoutReport& report);
nlohmann::json JsonOf(const LayoutReport& report);

}  // namespace weft::cli
