#include "weft/cli/layout_report.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "weft/core/error.h"

namespace weft::cli {
namespace {

using nlohmann::json;

constexpr int64_t kMapColumns = 64;
constexpr int64_t kMapLines = 8;  // at most; longer maps are coarser
constexpr size_t kShownSteps = 3;

[[noreturn]] void Refuse(const char* flag, int64_t value, const std::string& rule) {
  throw Error(fmt::format("{} = {}: {}", flag, value, rule), ErrorKind::kInvalidArgument, flag);
}

// Part `index` of n heads over `parts` ranks; with more ranks than heads neighbours hold the same one.
LayoutReport::Heads HeadsOf(int64_t n, int64_t parts, int64_t index) {
  if (parts > n) return {index / (parts / n), 1};
  return {n / parts * index, n / parts};
}

char Digit(int64_t n) { return n < 10 ? static_cast<char>('0' + n) : n < 36 ? static_cast<char>('a' + n - 10) : '#'; }

std::string Bytes(int64_t bytes) {
  const auto b = static_cast<double>(bytes);
  if (bytes < 10 << 10) return fmt::format("{} B", bytes);
  if (bytes < 10 << 20) return fmt::format("{:.1f} KiB", b / (1 << 10));
  if (bytes < int64_t{10} << 30) return fmt::format("{:.1f} MiB", b / (1 << 20));
  return fmt::format("{:.1f} GiB", b / (1 << 30));
}

std::string Span(int64_t first, int64_t count) {
  if (count == 0) return "none";
  return count == 1 ? fmt::format("{}", first) : fmt::format("{}-{}", first, first + count - 1);
}

// Lines of characters, each for `unit` tokens, with the position of the first one of each line.
template <typename At>
std::string Map(int64_t tokens, int64_t unit, At at) {
  std::string out;
  for (int64_t first = 0; first < tokens; first += kMapColumns * unit) {
    out += fmt::format("{:>9} |", first);
    for (int64_t x = first; x < std::min(tokens, first + kMapColumns * unit); x += unit) out += at(x);
    out += "|\n";
  }
  return out;
}

// Cells of so many tokens, a multiple of `granule`, that a map of all tokens has no more than kMapLines lines.
int64_t UnitFor(int64_t tokens, int64_t granule) {
  const int64_t cells = kMapColumns * kMapLines;
  const int64_t least = (tokens + cells - 1) / cells;
  return (least + granule - 1) / granule * granule;
}

}  // namespace

LayoutReport MakeLayoutReport(const LayoutQuery& query) {
  const cp::ParallelConfig& parallel = query.parallel;
  cp::Validate(parallel, query.heads);
  if (query.prompt_tokens < 1) Refuse("--prompt-tokens", query.prompt_tokens, "must be at least 1");
  if (query.cached_tokens < 0 || query.cached_tokens >= query.prompt_tokens) {
    Refuse("--cached-tokens", query.cached_tokens,
           fmt::format("must be below --prompt-tokens = {}: the last token of a prompt is always computed",
                       query.prompt_tokens));
  }
  if (query.tokens_per_step < 1) Refuse("--max-num-batched-tokens", query.tokens_per_step, "must be at least 1");

  LayoutReport report;
  report.query = query;
  report.layout = {
      .block_tokens = parallel.block_tokens, .interleave = parallel.kv_interleave, .shards = parallel.KvShards()};
  const cp::KvLayout& layout = report.layout;
  const int64_t n = query.prompt_tokens;
  report.blocks = layout.BlocksFor(n);
  for (int32_t shard = 0; shard < layout.shards; ++shard) {
    LayoutReport::Shard& s = report.shards.emplace_back();
    s.tokens = layout.LocalLen(n, shard);
    if (s.tokens == 0) continue;
    s.first = layout.GlobalPosition(0, shard);
    s.last = layout.GlobalPosition(s.tokens - 1, shard);
  }
  for (int32_t rank = 0; rank < parallel.WorldSize(); ++rank) {
    LayoutReport::Rank& r = report.ranks.emplace_back();
    r.coord = cp::CoordOf(parallel, rank);
    r.heads = HeadsOf(query.heads.heads, parallel.tensor_parallel, r.coord.tp);
    r.kv_heads = HeadsOf(query.heads.mla ? 1 : query.heads.kv_heads, parallel.tensor_parallel, r.coord.tp);
    r.tokens = report.shards[static_cast<size_t>(r.coord.kv_shard)].tokens;
    r.kv_bytes = r.tokens * query.kv_token_bytes;
    r.allocated_kv_bytes = report.blocks * layout.block_tokens * query.kv_token_bytes;
  }

  const int32_t pcp = parallel.prefill_context_parallel;
  report.work.resize(static_cast<size_t>(pcp));
  double all = 0;
  double critical = 0;
  for (int64_t first = query.cached_tokens; first < n; first += query.tokens_per_step) {
    LayoutReport::Step& step = report.steps.emplace_back();
    step.chunk = {first, std::min(query.tokens_per_step, n - first)};
    const cp::QueryItem item{step.chunk.first, step.chunk.tokens, false};
    const auto dealt = cp::DealQueries(std::span(&item, 1), query.costs, pcp);
    const double total = cp::WorkOf(query.costs, first, step.chunk.tokens);
    double most = 0;
    for (int32_t rank = 0; rank < pcp; ++rank) {
      LayoutReport::Part& part = step.parts.emplace_back();
      part.pcp = rank;
      double work = 0;
      for (const cp::DealtChunk& d : dealt[static_cast<size_t>(rank)]) {
        part.chunks.push_back(d.chunk);
        part.tokens += d.chunk.tokens;
        work += cp::WorkOf(query.costs, d.chunk.first, d.chunk.tokens);
      }
      part.work = work / total;
      report.work[static_cast<size_t>(rank)] += work;
      most = std::max(most, work);
    }
    step.cut = std::ranges::count_if(step.parts, [](const auto& part) { return part.tokens > 0; }) > 1;
    all += total;
    critical += most;
  }
  for (double& work : report.work) work /= all;
  report.critical_share = critical / all;
  return report;
}

std::string TextOf(const LayoutReport& report) {
  const LayoutQuery& query = report.query;
  const cp::ParallelConfig& p = query.parallel;
  const cp::KvLayout& layout = report.layout;
  const int64_t n = query.prompt_tokens;
  const int32_t pcp = p.prefill_context_parallel;
  std::string out;
  const auto row = [&](const char* name, const std::string& value) { out += fmt::format("{:<18}{}\n", name, value); };
  row("ranks", fmt::format("{} = PCP {} x TP {}", p.WorldSize(), pcp, p.tensor_parallel));
  row("KV shards", p.pcp_kv_layout == cp::PcpKvLayout::kReplicated
                       ? fmt::format("{} = DCP {}; each of the {} PCP ranks holds all of them", layout.shards,
                                     p.decode_context_parallel, pcp)
                       : fmt::format("{} = PCP {} x DCP {}", layout.shards, pcp, p.decode_context_parallel));
  row("block",
      fmt::format("{} tokens on one shard; {} a turn", layout.block_tokens,
                  layout.interleave == 1 ? "1 token" : fmt::format("{} consecutive tokens", layout.interleave)));
  row("virtual block",
      fmt::format("{} tokens on all shards; the prompt takes {}", layout.VirtualBlockTokens(), report.blocks));
  row("prompt", query.cached_tokens > 0 ? fmt::format("{} tokens, {} of them cached, {} to compute", n,
                                                      query.cached_tokens, n - query.cached_tokens)
                                        : fmt::format("{} tokens", n));

  out += "\nRanks\n  rank  pcp   tp  dcp  shard    heads  KV heads   tokens held";
  out += query.kv_token_bytes > 0 ? "     KV bytes   in blocks of\n" : "\n";
  for (const LayoutReport::Rank& r : report.ranks) {
    out += fmt::format("  {:>4} {:>4} {:>4} {:>4} {:>6} {:>8}  {:>8} {:>13}", r.coord.rank, r.coord.pcp, r.coord.tp,
                       r.coord.dcp, r.coord.kv_shard, Span(r.heads.first, r.heads.count),
                       Span(r.kv_heads.first, r.kv_heads.count), r.tokens);
    if (query.kv_token_bytes > 0) out += fmt::format(" {:>12} {:>14}", Bytes(r.kv_bytes), Bytes(r.allocated_kv_bytes));
    out += '\n';
  }

  out += "\nWho stores a token\n";
  for (int32_t shard = 0; shard < layout.shards; ++shard) {
    const LayoutReport::Shard& s = report.shards[static_cast<size_t>(shard)];
    if (s.tokens == 0) {
      out += fmt::format("  shard {}: no token\n", shard);
      continue;
    }
    std::vector<std::string> runs;
    constexpr int64_t kShown = 3;
    const int64_t turns = (s.tokens + layout.interleave - 1) / layout.interleave;
    for (int64_t turn = 0; turn < turns; ++turn) {
      if (turn == kShown && turns > kShown + 1) {
        runs.emplace_back("...");
        turn = turns - 1;
      }
      const int64_t k = turn * layout.interleave;
      runs.push_back(Span(layout.GlobalPosition(k, shard), std::min<int64_t>(layout.interleave, s.tokens - k)));
    }
    out +=
        fmt::format("  shard {}: {} token{}: {}\n", shard, s.tokens, s.tokens == 1 ? "" : "s", fmt::join(runs, ", "));
  }
  if (layout.shards > 1) {
    // A turn is a character; the pattern repeats itself.
    const int64_t unit = layout.interleave;
    const int64_t shown = std::min(n, 2 * kMapColumns * unit);
    out += fmt::format("  each character {}, the shard that stores {}{}\n",
                       unit == 1 ? "a token" : fmt::format("{} tokens", unit), unit == 1 ? "it" : "them",
                       shown < n ? fmt::format("; the first {} tokens", shown) : "");
    out += Map(shown, unit, [&](int64_t x) { return Digit(layout.Owner(x)); });
  }

  out += "\nWho computes a token\n";
  for (size_t i = 0; i < report.steps.size(); ++i) {
    if (i == kShownSteps && report.steps.size() > kShownSteps + 1) {
      out += fmt::format("  ... {} steps more\n", report.steps.size() - kShownSteps - 1);
      i = report.steps.size() - 1;
    }
    const LayoutReport::Step& step = report.steps[i];
    out +=
        fmt::format("  step {}: tokens {}{}\n", i, Span(step.chunk.first, step.chunk.tokens),
                    pcp > 1 && !step.cut ? fmt::format(": fewer than {}, not cut", query.costs.min_tokens_to_cut) : "");
    for (const LayoutReport::Part& part : step.parts) {
      std::vector<std::string> chunks;
      for (const cp::Chunk& chunk : part.chunks) chunks.push_back(Span(chunk.first, chunk.tokens));
      if (chunks.empty()) chunks.emplace_back("none");
      out += fmt::format("    PCP rank {}: {} ({} tokens, {:.1f} % of the work)\n", part.pcp,
                         fmt::join(chunks, " and "), part.tokens, 100 * part.work);
    }
  }
  if (pcp > 1) {
    const int64_t unit = UnitFor(n, 1);
    out += fmt::format("  each character {}, the PCP rank that computes {}{}\n",
                       unit == 1 ? "a token" : fmt::format("{} tokens", unit), unit == 1 ? "it" : "the first of them",
                       query.cached_tokens > 0 ? ", - cached" : "");
    out += Map(n, unit, [&](int64_t x) {
      if (x < query.cached_tokens) return '-';
      const auto& step = report.steps[static_cast<size_t>((x - query.cached_tokens) / query.tokens_per_step)];
      for (const LayoutReport::Part& part : step.parts) {
        for (const cp::Chunk& c : part.chunks) {
          if (x >= c.first && x < c.first + c.tokens) return Digit(part.pcp);
        }
      }
      return '?';
    });
    std::vector<std::string> shares;
    for (const double work : report.work) shares.push_back(fmt::format("{:.1f} %", 100 * work));
    out += fmt::format("  work of the PCP ranks: {}; the longest of each step together: {:.1f} % (even: {:.1f} %)\n",
                       fmt::join(shares, ", "), 100 * report.critical_share, 100.0 / pcp);
  }
  return out;
}

json JsonOf(const LayoutReport& report) {
  const LayoutQuery& query = report.query;
  const cp::ParallelConfig& p = query.parallel;
  const auto heads = [](const LayoutReport::Heads& h) { return json::array({h.first, h.first + h.count}); };
  json out = {{"tensor_parallel_size", p.tensor_parallel},
              {"prefill_context_parallel_size", p.prefill_context_parallel},
              {"decode_context_parallel_size", p.decode_context_parallel},
              {"cp_kv_cache_interleave_size", p.kv_interleave},
              {"block_size", p.block_tokens},
              {"pcp_kv_layout", p.pcp_kv_layout == cp::PcpKvLayout::kReplicated ? "replicated" : "sharded"},
              {"kv_shards", report.layout.shards},
              {"virtual_block_tokens", report.layout.VirtualBlockTokens()},
              {"virtual_blocks", report.blocks},
              {"prompt_tokens", query.prompt_tokens},
              {"cached_tokens", query.cached_tokens},
              {"critical_share", report.critical_share},
              {"ranks", json::array()},
              {"shards", json::array()},
              {"steps", json::array()}};
  for (const LayoutReport::Rank& r : report.ranks) {
    json& rank = out["ranks"].emplace_back(json{{"rank", r.coord.rank},
                                                {"pcp", r.coord.pcp},
                                                {"tp", r.coord.tp},
                                                {"dcp", r.coord.dcp},
                                                {"shard", r.coord.kv_shard},
                                                {"heads", heads(r.heads)},
                                                {"kv_heads", heads(r.kv_heads)},
                                                {"tokens", r.tokens}});
    if (query.kv_token_bytes == 0) continue;
    rank["kv_bytes"] = r.kv_bytes;
    rank["allocated_kv_bytes"] = r.allocated_kv_bytes;
  }
  for (size_t i = 0; i < report.shards.size(); ++i) {
    const LayoutReport::Shard& s = report.shards[i];
    // Its tokens are runs of interleave_size, the first at `first`, one every `stride`.
    out["shards"].push_back({{"shard", i},
                             {"tokens", s.tokens},
                             {"first", s.first},
                             {"last", s.last},
                             {"run", report.layout.interleave},
                             {"stride", int64_t{report.layout.interleave} * report.layout.shards}});
  }
  for (const LayoutReport::Step& step : report.steps) {
    json parts = json::array();
    for (const LayoutReport::Part& part : step.parts) {
      json chunks = json::array();
      for (const cp::Chunk& c : part.chunks) chunks.push_back({c.first, c.first + c.tokens});
      parts.push_back({{"pcp", part.pcp}, {"chunks", chunks}, {"tokens", part.tokens}, {"work", part.work}});
    }
    out["steps"].push_back({{"first", step.chunk.first},
                            {"tokens", step.chunk.tokens},
                            {"cut", step.cut},
                            {"pcp_ranks", std::move(parts)}});
  }
  return out;
}

}  // namespace weft::cli
