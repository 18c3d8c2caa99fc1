#include "weft/runner/measure_rates.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#include "weft/core/buffer.h"
#include "weft/core/function_ref.h"

namespace weft {
namespace {

using Clock = std::chrono::steady_clock;

// The least of some runs: whatever else the machine does can only make a run longer.
double BestSeconds(int runs, FunctionRef<void()> f) {
  double best = 1e30;
  for (int i = 0; i < runs; ++i) {
    const auto start = Clock::now();
    f();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return std::max(best, 1e-9);
}

// Prefill attention: some rows of some heads, to keys that lie one behind the other.
double AttentionFlopPerSecond(const KernelTable& kernels, const cp::AttentionShape& shape, ThreadPool& pool) {
  constexpr int64_t kRows = 64;
  const int64_t heads = std::min<int64_t>(shape.heads, 8);
  const int64_t flop_a_key = 2 * kRows * heads * (shape.k_dim + shape.v_dim);
  // A millisecond or so of a core each.
  const int64_t keys = std::clamp<int64_t>(200'000'000 * pool.size() / flop_a_key, 128, 4096);
  Buffer k(static_cast<size_t>(keys * shape.k_dim) * sizeof(float));
  Buffer v(static_cast<size_t>(keys * shape.v_dim) * sizeof(float));
  Buffer q(static_cast<size_t>(kRows * heads * shape.k_dim) * sizeof(float));
  Buffer out(static_cast<size_t>(kRows * heads * shape.v_dim) * sizeof(float));
  std::fill_n(k.as<float>(), keys * shape.k_dim, 0.01f);
  std::fill_n(v.as<float>(), keys * shape.v_dim, 0.01f);
  std::fill_n(q.as<float>(), kRows * heads * shape.k_dim, 0.01f);
  const std::vector<int32_t> visible(kRows, static_cast<int32_t>(keys));
  const KvPages pages{.k = k.data(), .v = v.data(), .dtype = DType::kF32, .visible = visible.data()};
  const AttentionTask task{.q = q.as<float>(),
                           .q_stride = heads * shape.k_dim,
                           .out = out.as<float>(),
                           .out_stride = heads * shape.v_dim,
                           .rows = kRows,
                           .kv = std::span(&pages, 1)};

  AttentionArgs args{.tasks = std::span(&task, 1),
                     .q_heads = static_cast<int>(heads),
                     .kv_heads = 1,
                     .k_dim = static_cast<int>(shape.k_dim),
                     .v_dim = static_cast<int>(shape.v_dim),
                     .scale = 1.0f / std::sqrt(static_cast<float>(shape.k_dim))};
  const double seconds = BestSeconds(4, [&] { kernels.attention(args, pool); });
  return static_cast<double>(flop_a_key * keys) / seconds;
}

// Products of one row with weights of the layers, one after the other, so that they come from memory.
double ReadBytesPerSecond(const KernelTable& kernels, const ModelWeights& weights, ThreadPool& pool) {
  constexpr size_t kEnough = size_t{48} << 20;
  std::vector<const PackedWeights*> all;
  size_t bytes = 0;
  int64_t widest_in = 1;
  int64_t widest_out = 1;
  for (const LayerWeights& layer : weights.layers) {
    for (const PackedWeights* w : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) {
      if (w->n == 0 || bytes >= kEnough) continue;
      all.push_back(w);
      bytes += static_cast<size_t>(w->n * w->k) * SizeOf(w->dtype);
      widest_in = std::max(widest_in, w->k);
      widest_out = std::max(widest_out, w->n);
    }
  }
  Buffer x(static_cast<size_t>(widest_in) * sizeof(float));
  Buffer y(static_cast<size_t>(widest_out) * sizeof(float));
  std::fill_n(x.as<float>(), widest_in, 0.01f);
  const double seconds = BestSeconds(2, [&] {
    for (const PackedWeights* w : all) {
      kernels.linear({.x = x.as<float>(), .x_stride = w->k, .m = 1, .w = w, .y = y.as<float>(), .y_stride = w->n},
                     pool);
    }
  });
  return static_cast<double>(bytes) / seconds;
}

}  // namespace

cp::AttentionShape AttentionShapeOf(const ModelConfig& config, const cp::ParallelConfig& parallel, DType kv_dtype) {
  const auto element = static_cast<int64_t>(SizeOf(kv_dtype));
  cp::AttentionShape shape;
  shape.heads = config.num_heads / parallel.tensor_parallel;
  shape.k_dim = config.head_dim;
  shape.v_dim = config.v_dim();
  if (!config.mla) {
    shape.kv_heads = std::max<int64_t>(1, config.num_kv_heads / parallel.tensor_parallel);
    shape.cached_k_dim = shape.k_dim;
    shape.cached_v_dim = shape.v_dim;
    shape.cached_bytes = shape.kv_heads * (shape.k_dim + shape.v_dim) * element;
    return shape;
  }
  const MlaConfig& mla = *config.mla;
  shape.cached_k_dim = mla.kv_lora_rank + mla.qk_rope_head_dim;
  shape.cached_v_dim = mla.kv_lora_rank;
  shape.cached_bytes = shape.cached_k_dim * element;
  shape.expand_flop =
      2.0 * static_cast<double>(mla.kv_lora_rank * shape.heads * (mla.qk_nope_head_dim + mla.v_head_dim));
  return shape;
}

cp::MachineRates MeasureRates(const KernelTable& kernels, const cp::AttentionShape& shape, const ModelWeights& weights,
                              ThreadPool& pool, Communicator& group, bool messages) {
  cp::MachineRates rates;
  group.Barrier();
  rates.flop_per_s = AttentionFlopPerSecond(kernels, shape, pool);
  rates.read_bytes_per_s = ReadBytesPerSecond(kernels, weights, pool);
  if (group.size() == 1) return rates;
  group.Barrier();
  rates.latency_s = BestSeconds(8, [&] { group.Barrier(); });
  if (!messages && group.shares_memory()) return rates;
  constexpr size_t kBytes = size_t{1} << 20;
  Buffer mine(kBytes);
  std::fill_n(mine.as<char>(), kBytes, 1);
  const std::span<const std::byte> bytes(mine.as<const std::byte>(), kBytes);
  std::vector<std::span<const std::byte>> views;
  const double seconds = BestSeconds(3, [&] { group.AllGather(bytes, views); });
  group.Release();
  const auto received = static_cast<double>(kBytes) * (group.size() - 1);
  rates.exchange_bytes_per_s = received / std::max(seconds - rates.latency_s, seconds / 2);
  return rates;
}

cp::MachineRates AgreeOnRates(const cp::MachineRates& mine, Communicator& world) {
  std::vector<std::span<const cp::MachineRates>> views;
  world.AllGather(std::span<const cp::MachineRates>(&mine, 1), views);
  const cp::MachineRates agreed = views.at(0)[0];
  world.Release();
  return agreed;
}

bool AnyRank(bool mine, Communicator& world) {
  const char value = mine ? 1 : 0;
  std::vector<std::span<const char>> views;
  world.AllGather(std::span<const char>(&value, 1), views);
  const bool any = std::ranges::any_of(views, [](const auto& view) { return view[0] != 0; });
  world.Release();
  return any;
}

}  // namespace weft
