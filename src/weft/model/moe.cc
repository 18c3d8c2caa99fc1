#include "weft/model/moe.h"

#include <algorithm>
#include <cstring>

#include "weft/core/error.h"
#include "weft/model/router.h"

namespace weft {
namespace {

void ReserveFloats(Buffer& buffer, int64_t n) { buffer.Reserve(static_cast<size_t>(n) * sizeof(float)); }

// What the sorted rows and their activations may take, about.
constexpr int64_t kTileBytes = int64_t{256} << 20;
constexpr int64_t kLeastTileRows = 256;
constexpr int64_t kMostTileRows = 4096;

// What one rank sends to another: the head, the pairs, and, where memory is not shared, the rows.
struct Head {
  int64_t rows = 0;  // different rows among the pairs
  int64_t pairs = 0;
  const float* base = nullptr;  // where memory is shared: the rows that the pairs name
};

}  // namespace

MoeExperts::MoeExperts(Options options) : o_(std::move(options)), c_(*o_.config), moe_(*c_.moe), k_(*o_.kernels) {
  WEFT_CHECK(o_.experts != nullptr);
  // Of whole experts, so that it is the same on all ranks: they take the same number of tiles.
  const int64_t row_bytes =
      moe_.experts_per_token * (2 * c_.hidden_size + 3 * moe_.expert_ffn) * static_cast<int64_t>(sizeof(float));
  tile_rows_ = std::clamp(kTileBytes / row_bytes, kLeastTileRows, kMostTileRows);
  load_.assign(static_cast<size_t>(moe_.num_experts), 0);
}

void MoeExperts::Run(int64_t layer, const float* x, int64_t rows, float* out, ThreadPool& pool, float* margins) {
  if (o_.world != nullptr) {
    Exchange(layer, x, rows, out, pool, margins);
    return;
  }
  Route(layer, x, rows, pool, margins);
  const Source source{.base = x, .numbers = {}, .pairs = pairs_, .out = out, .count = rows};
  RunExperts(layer, {&source, 1}, pool);
}

void MoeExperts::Route(int64_t layer, const float* x, int64_t rows, ThreadPool& pool, float* margins) {
  const LayerWeights& w = o_.weights->layers[static_cast<size_t>(layer)];
  const int64_t n = moe_.num_experts;
  const int64_t top = moe_.experts_per_token;
  ReserveFloats(logits_, rows * n);
  float* logits = logits_.as<float>();
  k_.linear({.x = x, .x_stride = c_.hidden_size, .m = rows, .w = &w.router, .y = logits, .y_stride = n}, pool);
  pairs_.resize(static_cast<size_t>(rows * top));
  const float* bias = w.correction_bias.empty() ? nullptr : w.correction_bias.data();
  pool.ParallelFor(rows, 16, [&](int64_t begin, int64_t end, int) {
    std::vector<float> scratch(static_cast<size_t>(2 * n));
    std::vector<int32_t> experts(static_cast<size_t>(top));
    std::vector<float> weights(static_cast<size_t>(top));
    for (int64_t row = begin; row < end; ++row) {
      ChooseExperts(moe_, logits + row * n, bias, experts.data(), weights.data(), scratch.data());
      for (int64_t k = 0; k < top; ++k) {
        const auto i = static_cast<size_t>(k);
        pairs_[static_cast<size_t>(row * top + k)] = {static_cast<int32_t>(row), experts[i], weights[i]};
      }
      if (margins == nullptr) continue;
      margins[row] = std::min(margins[row], ChoiceMargin(moe_, logits + row * n, bias, scratch.data()));
    }
  });
}

void MoeExperts::RunExperts(int64_t layer, std::span<const Source> sources, ThreadPool& pool) {
  const std::vector<ExpertMlp>& mlps = o_.experts->layers[static_cast<size_t>(layer)];
  const Range range = o_.experts->experts;
  const auto experts = static_cast<size_t>(range.size());
  const int64_t hidden = c_.hidden_size;
  const int64_t ffn = o_.experts->ffn;

  // Where each expert's rows begin among the sorted ones.
  std::vector<int64_t> begin(experts + 1, 0);
  for (const Source& source : sources) {
    for (const Pair& pair : source.pairs) {
      ++begin[static_cast<size_t>(pair.expert - range.begin) + 1];
      ++load_[static_cast<size_t>(pair.expert)];
    }
  }
  for (size_t e = 0; e < experts; ++e) begin[e + 1] += begin[e];
  const int64_t rows = begin[experts];
  if (rows == 0) return;

  struct Placed {
    const float* from = nullptr;
    int64_t at = 0;
  };
  std::vector<Placed> placed;  // by pair, all sources
  placed.reserve(static_cast<size_t>(rows));
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (const Source& source : sources) {
    for (const Pair& pair : source.pairs) {
      placed.push_back({source.row(pair.row, hidden), next[static_cast<size_t>(pair.expert - range.begin)]++});
    }
  }
  ReserveFloats(sorted_x_, rows * hidden);
  ReserveFloats(sorted_y_, rows * hidden);
  ReserveFloats(gate_up_, rows * 2 * ffn);
  ReserveFloats(act_, rows * ffn);
  float* x = sorted_x_.as<float>();
  float* y = sorted_y_.as<float>();
  float* gate_up = gate_up_.as<float>();
  float* act = act_.as<float>();
  pool.ParallelFor(rows, 16, [&](int64_t first, int64_t last, int) {
    for (int64_t i = first; i < last; ++i) {
      const Placed& p = placed[static_cast<size_t>(i)];
      std::memcpy(x + p.at * hidden, p.from, static_cast<size_t>(hidden) * sizeof(float));
    }
  });

  const auto run = [&](const float* from, int64_t from_dim, float* to, int64_t to_dim, auto weights) {
    products_.clear();
    for (size_t e = 0; e < experts; ++e) {
      const int64_t m = begin[e + 1] - begin[e];
      if (m == 0) continue;  // its weights are not read
      products_.push_back({.x = from + begin[e] * from_dim,
                           .x_stride = from_dim,
                           .m = m,
                           .w = &(mlps[e].*weights),
                           .y = to + begin[e] * to_dim,
                           .y_stride = to_dim});
    }
    k_.linear_many(products_, pool);
  };
  run(x, hidden, gate_up, 2 * ffn, &ExpertMlp::gate_up);
  k_.swiglu(gate_up, 2 * ffn, gate_up + ffn, 2 * ffn, act, ffn, rows, ffn, pool);
  run(act, ffn, y, hidden, &ExpertMlp::down);

  // The pairs of a row lie together, so that one thread adds them, in their order.
  size_t first_pair = 0;
  for (const Source& source : sources) {
    std::vector<size_t> row_begin(static_cast<size_t>(source.count) + 1, 0);
    for (const Pair& pair : source.pairs) ++row_begin[static_cast<size_t>(pair.row) + 1];
    for (size_t i = 0; i < static_cast<size_t>(source.count); ++i) row_begin[i + 1] += row_begin[i];
    pool.ParallelFor(source.count, 16, [&](int64_t first, int64_t last, int) {
      for (int64_t row = first; row < last; ++row) {
        float* out = source.out + row * hidden;
        for (size_t i = row_begin[static_cast<size_t>(row)]; i < row_begin[static_cast<size_t>(row) + 1]; ++i) {
          const float* part = y + placed[first_pair + i].at * hidden;
          const float weight = source.pairs[i].weight;
          for (int64_t d = 0; d < hidden; ++d) out[d] += weight * part[d];
        }
      }
    });
    first_pair += source.pairs.size();
  }
}

void MoeExperts::Exchange(int64_t layer, const float* x, int64_t rows, float* out, ThreadPool& pool, float* margins) {
  Communicator& world = *o_.world;
  const auto members = static_cast<size_t>(world.size());
  const bool sends_rows = o_.stream || !world.shares_memory();
  const int64_t hidden = c_.hidden_size;
  const auto row_bytes = static_cast<size_t>(hidden) * sizeof(float);
  // The TP peers have the same rows: each sends a share of them.
  const Range share = SplitRange(rows, o_.tp->size(), o_.tp->rank());
  const float* own = x + share.begin * hidden;
  Route(layer, own, share.size(), pool, margins == nullptr ? nullptr : margins + share.begin);

  // By member: its pairs, with rows counted among those that go to it, and these rows.
  std::vector<std::vector<Pair>> pairs(members);
  std::vector<std::vector<int32_t>> rows_to(members);
  const auto owner_of = [&](int32_t expert) {
    // The member r with SplitRange(num_experts, members, r) around it.
    auto r = static_cast<size_t>(expert) * members / static_cast<size_t>(moe_.num_experts);
    while (expert >= SplitRange(moe_.num_experts, world.size(), static_cast<int64_t>(r)).end) ++r;
    while (expert < SplitRange(moe_.num_experts, world.size(), static_cast<int64_t>(r)).begin) --r;
    return r;
  };
  for (const Pair& pair : pairs_) {
    const size_t member = owner_of(pair.expert);
    if (rows_to[member].empty() || rows_to[member].back() != pair.row) rows_to[member].push_back(pair.row);
    pairs[member].push_back({static_cast<int32_t>(rows_to[member].size()) - 1, pair.expert, pair.weight});
  }

  // [head, pairs, row numbers (shared memory) or rows]
  std::vector<size_t> sizes(members), offsets(members + 1, 0);
  for (size_t i = 0; i < members; ++i) {
    const size_t n = rows_to[i].size();
    sizes[i] = sizeof(Head) + pairs[i].size() * sizeof(Pair) + (sends_rows ? n * row_bytes : n * sizeof(int32_t));
    offsets[i + 1] = offsets[i] + (sizes[i] + 63) / 64 * 64;
  }
  sent_.Reserve(offsets[members]);
  std::vector<std::span<const std::byte>> parts;
  for (size_t i = 0; i < members; ++i) {
    auto* to = sent_.as<std::byte>() + offsets[i];
    parts.emplace_back(to, sizes[i]);
    const Head head{static_cast<int64_t>(rows_to[i].size()), static_cast<int64_t>(pairs[i].size()),
                    sends_rows ? nullptr : own};
    std::memcpy(to, &head, sizeof(head));
    to += sizeof(head);
    if (!pairs[i].empty()) std::memcpy(to, pairs[i].data(), pairs[i].size() * sizeof(Pair));
    to += pairs[i].size() * sizeof(Pair);
    if (!sends_rows) {
      if (!rows_to[i].empty()) std::memcpy(to, rows_to[i].data(), rows_to[i].size() * sizeof(int32_t));
      continue;
    }
    for (const int32_t row : rows_to[i]) {
      std::memcpy(to, own + row * hidden, row_bytes);
      to += row_bytes;
    }
  }
  std::vector<std::span<const std::byte>> received;
  world.AllToAll(parts, received);

  // The sums that go back: one row for each that came.
  std::vector<Head> heads(members);
  int64_t total = 0;
  for (size_t i = 0; i < members; ++i) {
    std::memcpy(&heads[i], received[i].data(), sizeof(Head));
    total += heads[i].rows;
  }
  ReserveFloats(returned_, total * hidden);
  if (total > 0) std::memset(returned_.data(), 0, static_cast<size_t>(total) * row_bytes);
  std::vector<Source> sources;
  float* back = returned_.as<float>();
  std::vector<std::span<const std::byte>> answers;
  for (size_t i = 0; i < members; ++i) {
    // What follows the head is aligned to 4 bytes, as all of it needs.
    const std::byte* from = received[i].data() + sizeof(Head);
    const auto n = static_cast<size_t>(heads[i].rows);
    Source source;
    source.out = back;
    source.count = heads[i].rows;
    source.pairs = {reinterpret_cast<const Pair*>(from), static_cast<size_t>(heads[i].pairs)};
    from += source.pairs.size_bytes();
    if (sends_rows) {
      source.base = reinterpret_cast<const float*>(from);
    } else {
      source.base = heads[i].base;
      source.numbers = {reinterpret_cast<const int32_t*>(from), n};
    }
    sources.push_back(source);
    answers.push_back(std::as_bytes(std::span<const float>(back, n * static_cast<size_t>(hidden))));
    back += heads[i].rows * hidden;
  }
  RunExperts(layer, sources, pool);

  world.AllToAll(answers, received);
  float* own_out = out + share.begin * hidden;
  for (size_t i = 0; i < members; ++i) {
    const auto* sums = reinterpret_cast<const float*>(received[i].data());
    for (size_t row = 0; row < rows_to[i].size(); ++row) {
      float* to = own_out + rows_to[i][row] * hidden;
      const float* from = sums + row * static_cast<size_t>(hidden);
      for (int64_t d = 0; d < hidden; ++d) to[d] += from[d];
    }
  }
}

}  // namespace weft
