// bench_kernels: the speed of the kernels on Qwen3-0.6B's shapes, as shares of what the machine can do.
//   bench_kernels [--kernels cpu|ref] [--threads N] [--only linear|many|attention|mla|small] [--shape NAME] [--seconds
//   S]
//                 [--rows M ...] [--depths N ...] [--cpu-time] [--target AVX2]

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "machine_limits.h"
#include "weft/kernels/cpu/targets.h"
#include "weft/kernels/table.h"
//
#include "hwy/targets.h"

namespace weft::bench {
namespace {

struct Options {
  std::string kernels = "cpu";
  int threads = 0;
  std::string only;
  double seconds = 0.2;
  Clock clock = Clock::kWall;
  std::string shape;
  std::vector<int64_t> depths = {512, 4096, 16384};
  int32_t block_tokens = 128;  // as --block-size
  std::vector<int64_t> rows = {1, 4, 16, 64, 512, 4096};
};

constexpr double kGiga = 1e9;

void FillRandom(float* data, int64_t count, float scale) {
  // Any values will do, as long as none is denormal: a cheap generator, for these are hundreds of megabytes.
  uint32_t state = 12345;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    data[i] = (static_cast<float>(state >> 8) / 16777216.0f - 0.5f) * scale;
  }
}

void FillRandom(bf16* data, int64_t count, float scale) {
  uint32_t state = 12345;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    data[i] = ToBf16((static_cast<float>(state >> 8) / 16777216.0f - 0.5f) * scale);
  }
}

std::string Share(double value, double limit) { return fmt::format("{:5.1f}%", 100 * value / limit); }

void BenchLinear(const KernelTable& table, ThreadPool& pool, const MachineLimits& limits, const Options& options) {
  struct Shape {
    const char* name;
    int64_t n;
    int64_t k;
  };
  constexpr Shape kShapes[] = {
      {"q_proj", 2048, 1024},  {"kv_proj", 1024, 1024},   {"o_proj", 1024, 2048},
      {"gate_up", 6144, 1024}, {"down_proj", 1024, 3072}, {"lm_head", 151936, 1024},
  };
  // Decode reads every layer's weights from memory: as many copies of a matrix as it takes to leave the caches.
  constexpr int64_t kColdBytes = int64_t{256} << 20;
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    std::printf("\nlinear, %s weights (median; share of FMA / of read bandwidth; best)\n",
                std::string(NameOf(dtype)).c_str());
    for (const Shape& shape : kShapes) {
      if (!options.shape.empty() && options.shape != shape.name) continue;
      const int64_t bytes = shape.n * shape.k * static_cast<int64_t>(SizeOf(dtype));
      const int64_t copies = std::max<int64_t>(1, std::min<int64_t>(kColdBytes / bytes, 64));
      Buffer source(static_cast<size_t>(shape.n * shape.k) * sizeof(float));
      FillRandom(source.as<float>(), shape.n * shape.k, 0.1f);
      std::vector<PackedWeights> weights(static_cast<size_t>(copies));
      for (PackedWeights& w : weights) {
        w.dtype = dtype;
        w.n = shape.n;
        w.k = shape.k;
        table.pack_weights(source.data(), DType::kF32, shape.k, 0, shape.n, w);
      }
      for (const int64_t m : options.rows) {
        if (shape.n > 100000 && m > 64) continue;  // prefill computes the logits of few rows
        Buffer x(static_cast<size_t>(m * shape.k) * sizeof(float));
        Buffer y(static_cast<size_t>(m * shape.n) * sizeof(float));
        FillRandom(x.as<float>(), m * shape.k, 2.0f);
        size_t next = 0;
        const Timing timing = Measure(
            [&] {
              table.linear({.x = x.as<float>(),
                            .x_stride = shape.k,
                            .m = m,
                            .w = &weights[next],
                            .y = y.as<float>(),
                            .y_stride = shape.n},
                           pool);
              next = (next + 1) % weights.size();
            },
            5, options.seconds, options.clock);
        const double flop = 2.0 * static_cast<double>(m * shape.n * shape.k);
        std::printf("  %-10s m=%-5ld %10.1f us  %7.1f GFLOP/s %s  %6.1f GB/s %s   best %s %s\n", shape.name, m,
                    timing.median_s * 1e6, flop / timing.median_s / kGiga,
                    Share(flop / timing.median_s / kGiga, limits.fma_gflops.all).c_str(),
                    static_cast<double>(bytes) / timing.median_s / kGiga,
                    Share(static_cast<double>(bytes) / timing.median_s / kGiga, limits.read_gb_s.all).c_str(),
                    Share(flop / timing.best_s / kGiga, limits.fma_gflops.all).c_str(),
                    Share(static_cast<double>(bytes) / timing.best_s / kGiga, limits.read_gb_s.all).c_str());
        std::fflush(stdout);
      }
    }
  }
}

// Many products as one job: each case's time, its shares of the limits, and how much longer the same products take one
// after another.
void BenchMany(const KernelTable& table, ThreadPool& pool, const MachineLimits& limits, const Options& options) {
  struct Case {
    std::string name;
    int64_t n;
    int64_t k;
    std::vector<int64_t> rows;  // of each product
    bool heads = false;         // the products are the heads of a row: x and y interleaved
    bool same_x = false;
  };
  std::vector<Case> cases;
  // Experts of 1408 x 2048 (DeepSeek-V2-Lite, Moonlight).
  for (const auto& [name, n, k] : {std::tuple("gate_up", 2816, 2048), std::tuple("down", 2048, 1408)}) {
    for (const int64_t m : {1, 2, 4}) {
      cases.push_back({fmt::format("experts {}, 6 x m={}", name, m), n, k, std::vector<int64_t>(6, m)});
    }
    std::vector<int64_t> mixed(64);
    for (size_t i = 0; i < mixed.size(); ++i) mixed[i] = 50 + static_cast<int64_t>(i * 37 % 64) * 7;
    cases.push_back({fmt::format("experts {}, 64 x m=50..491", name), n, k, mixed});
    cases.push_back({fmt::format("experts {}, 64 x m=24", name), n, k, std::vector<int64_t>(64, 24)});
    std::vector<int64_t> one_large(16, 4);
    one_large[5] = 2000;
    one_large[7] = 0;
    cases.push_back({fmt::format("experts {}, m=2000 and 14 x m=4", name), n, k, one_large});
  }
  for (const int64_t heads : {16, 128}) {
    for (const int64_t m : {1, 4, 16, 512}) {
      const std::vector<int64_t> rows(static_cast<size_t>(heads), m);
      cases.push_back({fmt::format("MLA q absorbed, {} heads, m={}", heads, m), 512, 128, rows, true});
      cases.push_back({fmt::format("MLA values, {} heads, m={}", heads, m), 128, 512, rows, true});
      if (m >= 16) cases.push_back({fmt::format("MLA expanded, {} heads, m={}", heads, m), 128, 512, rows, true, true});
    }
  }
  std::printf("\nlinear_many, bf16 weights (median; share of FMA / of read bandwidth; best; linear in a loop)\n");
  for (const Case& c : cases) {
    if (!options.shape.empty() && c.name.find(options.shape) == std::string::npos) continue;
    const int64_t bytes = c.n * c.k * 2;
    // Decode finds other experts (other layers' heads) each time, none of them in the caches.
    const size_t copies = static_cast<size_t>((int64_t{300} << 20) / bytes);
    Buffer source(static_cast<size_t>(c.n * c.k) * sizeof(float));
    FillRandom(source.as<float>(), c.n * c.k, 0.1f);
    std::vector<PackedWeights> weights(copies);
    for (PackedWeights& w : weights) {
      w.n = c.n;
      w.k = c.k;
      table.pack_weights(source.data(), DType::kF32, c.k, 0, c.n, w);
    }
    const int64_t count = static_cast<int64_t>(c.rows.size());
    int64_t total = 0;
    int64_t used = 0;
    for (const int64_t m : c.rows) {
      total += m;
      used += m > 0;
    }
    Buffer x(static_cast<size_t>(total * c.k) * sizeof(float));
    Buffer y(static_cast<size_t>(total * c.n) * sizeof(float));
    FillRandom(x.as<float>(), total * c.k, 2.0f);
    std::vector<LinearArgs> args;
    int64_t row = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t m = c.rows[static_cast<size_t>(i)];
      args.push_back({.x = x.as<float>() + (c.same_x  ? 0
                                            : c.heads ? i * c.k
                                                      : row * c.k),
                      .x_stride = c.heads && !c.same_x ? count * c.k : c.k,
                      .m = m,
                      .y = y.as<float>() + (c.heads ? i * c.n : row * c.n),
                      .y_stride = c.heads ? count * c.n : c.n});
      row += m;
    }
    size_t next = 0;
    auto renew = [&] {
      for (LinearArgs& one : args) {
        one.w = &weights[next];
        next = (next + 1) % copies;
      }
    };
    const Timing many = Measure(
        [&] {
          renew();
          table.linear_many(args, pool);
        },
        5, options.seconds, options.clock);
    const Timing loop = Measure(
        [&] {
          renew();
          for (const LinearArgs& one : args) table.linear(one, pool);
        },
        5, options.seconds, options.clock);
    const double gflop = 2.0 * static_cast<double>(total * c.n * c.k) / kGiga;
    const double gbytes = static_cast<double>(used * bytes) / kGiga;
    std::printf("  %-38s %10.1f us  %6.1f GFLOP/s %s  %5.1f GB/s %s   best %s %s   loop %.2f x\n", c.name.c_str(),
                many.median_s * 1e6, gflop / many.median_s, Share(gflop / many.median_s, limits.fma_gflops.all).c_str(),
                gbytes / many.median_s, Share(gbytes / many.median_s, limits.read_gb_s.all).c_str(),
                Share(gflop / many.best_s, limits.fma_gflops.all).c_str(),
                Share(gbytes / many.best_s, limits.read_gb_s.all).c_str(), loop.median_s / many.median_s);
    std::fflush(stdout);
  }
}

// A paged cache of one layer whose blocks lie in random order.
struct Cache {
  Cache(int32_t block_tokens_in, int64_t tokens, int kv_heads, int dim, DType dtype_in, bool with_values = true)
      : block_tokens(block_tokens_in), dtype(dtype_in) {
    const int64_t blocks = (tokens + block_tokens - 1) / block_tokens;
    const int64_t elements = blocks * kv_heads * block_tokens * dim;
    stride = int64_t{kv_heads} * block_tokens * dim;
    for (Buffer* buffer : {&k, &v}) {
      if (buffer == &v && !with_values) break;
      *buffer = Buffer(static_cast<size_t>(elements) * SizeOf(dtype));
      if (dtype == DType::kBF16) {
        FillRandom(buffer->as<bf16>(), elements, 2.0f);
      } else {
        FillRandom(buffer->as<float>(), elements, 2.0f);
      }
    }
    table.resize(static_cast<size_t>(blocks));
    for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
    std::shuffle(table.begin(), table.end(), std::mt19937(7));
  }

  KvPages Pages(const int32_t* visible, int dim) const {
    return {.k = k.data(),
            .v = v.data(),
            .dtype = dtype,
            .block_table = table.data(),
            .block_tokens = block_tokens,
            .k_block_stride = stride,
            .k_head_stride = int64_t{block_tokens} * dim,
            .v_block_stride = stride,
            .v_head_stride = int64_t{block_tokens} * dim,
            .visible = visible};
  }

  int32_t block_tokens;
  DType dtype;
  int64_t stride;
  Buffer k;
  Buffer v;
  std::vector<int32_t> table;
};

void BenchAttention(const KernelTable& table, ThreadPool& pool, const MachineLimits& limits, const Options& options) {
  struct Heads {
    const char* name;
    int q_heads;
    int kv_heads;
    int dim;
  };
  for (const Heads& heads : {Heads{"Qwen3-0.6B", 16, 8, 128}, Heads{"SmolLM2", 9, 3, 64}}) {
    std::printf("\nattention, %s heads, bf16 cache: the last 512 rows of a prompt (share of FMA, of what is causal)\n",
                heads.name);
    auto run = [&](int64_t depth, int64_t rows, const Cache& cache, const std::vector<int32_t>& visible, float* q,
                   float* out, float* lse) {
      const KvPages pages = cache.Pages(visible.data(), heads.dim);
      const AttentionTask task = {.q = q,
                                  .q_stride = int64_t{heads.q_heads} * heads.dim,
                                  .out = out,
                                  .out_stride = int64_t{heads.q_heads} * heads.dim,
                                  .lse = lse,
                                  .lse_stride = heads.q_heads,
                                  .rows = rows,
                                  .kv = {&pages, 1}};
      (void)depth;
      table.attention({.tasks = {&task, 1},
                       .q_heads = heads.q_heads,
                       .kv_heads = heads.kv_heads,
                       .k_dim = heads.dim,
                       .v_dim = heads.dim,
                       .scale = 0.1f},
                      pool);
    };
    constexpr int64_t kRows = 512;
    std::vector<float> q(static_cast<size_t>(kRows * heads.q_heads * heads.dim));
    std::vector<float> out(q.size());
    std::vector<float> lse(static_cast<size_t>(kRows * heads.q_heads));
    FillRandom(q.data(), static_cast<int64_t>(q.size()), 2.0f);
    for (const int64_t depth : options.depths) {
      const Cache cache(options.block_tokens, depth, heads.kv_heads, heads.dim, DType::kBF16);
      std::vector<int32_t> visible(static_cast<size_t>(kRows));
      double keys = 0;
      for (size_t i = 0; i < visible.size(); ++i) {
        visible[i] = static_cast<int32_t>(depth - kRows) + static_cast<int32_t>(i) + 1;
        keys += visible[i];
      }
      const Timing timing = Measure([&] { run(depth, kRows, cache, visible, q.data(), out.data(), lse.data()); }, 5,
                                    options.seconds, options.clock);
      const double flop = 4.0 * keys * heads.q_heads * heads.dim;
      std::printf("  prefill depth=%-6ld %10.1f us  %7.1f GFLOP/s %s   best %s\n", depth, timing.median_s * 1e6,
                  flop / timing.median_s / kGiga, Share(flop / timing.median_s / kGiga, limits.fma_gflops.all).c_str(),
                  Share(flop / timing.best_s / kGiga, limits.fma_gflops.all).c_str());
      std::fflush(stdout);
    }
    std::printf("attention, %s heads, bf16 cache: one row of decode, cache not in the CPU's caches\n", heads.name);
    for (const int64_t depth : options.depths) {
      const int64_t bytes = 2 * depth * heads.kv_heads * heads.dim * 2;
      const int64_t copies = std::max<int64_t>(1, (int64_t{256} << 20) / bytes);
      const Cache cache(options.block_tokens, depth * copies, heads.kv_heads, heads.dim, DType::kBF16);
      const std::vector<int32_t> visible = {static_cast<int32_t>(depth)};
      int64_t next = 0;
      const Timing timing = Measure(
          [&] {
            KvPages pages = cache.Pages(visible.data(), heads.dim);
            pages.block_table += next * (depth / options.block_tokens);
            next = (next + 1) % copies;
            const AttentionTask task = {
                .q = q.data(), .out = out.data(), .lse = lse.data(), .rows = 1, .kv = {&pages, 1}};
            table.attention({.tasks = {&task, 1},
                             .q_heads = heads.q_heads,
                             .kv_heads = heads.kv_heads,
                             .k_dim = heads.dim,
                             .v_dim = heads.dim,
                             .scale = 0.1f},
                            pool);
          },
          20, options.seconds, options.clock);
      const double rate = static_cast<double>(bytes) / kGiga;
      std::printf("  decode  depth=%-6ld %10.1f us  %7.1f GB/s    %s   best %s\n", depth, timing.median_s * 1e6,
                  rate / timing.median_s, Share(rate / timing.median_s, limits.read_gb_s.all).c_str(),
                  Share(rate / timing.best_s, limits.read_gb_s.all).c_str());
      std::fflush(stdout);
    }
  }
}

// Absorbed MLA: every head of a row attends to the one latent row of a token (576, of which 512 are the value).
// Expanded MLA: each head has keys (192) and values (128) of its own, just computed, in contiguous f32 rows.
void BenchMla(const KernelTable& table, ThreadPool& pool, const MachineLimits& limits, const Options& options) {
  constexpr int kRank = 512;
  constexpr int kLatent = 576;
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    std::printf(
        "\nattention, absorbed MLA, %s latent cache: one row, cache not in the CPU's caches (median; share of "
        "FMA / of read bandwidth; of the higher floor)\n",
        std::string(NameOf(dtype)).c_str());
    for (const int q_heads : {2, 4, 8, 16, 32, 64, 128}) {
      const std::string name = fmt::format("{} {} heads", NameOf(dtype), q_heads);
      if (name.find(options.shape) == std::string::npos) continue;
      std::vector<float> q(static_cast<size_t>(q_heads * kLatent));
      std::vector<float> out(static_cast<size_t>(q_heads * kRank));
      std::vector<float> lse(static_cast<size_t>(q_heads));
      FillRandom(q.data(), static_cast<int64_t>(q.size()), 2.0f);
      for (const int64_t depth : options.depths) {
        const int64_t bytes = depth * kLatent * static_cast<int64_t>(SizeOf(dtype));
        const int64_t copies = std::max<int64_t>(1, (int64_t{128} << 20) / bytes);
        const Cache cache(options.block_tokens, depth * copies, 1, kLatent, dtype, false);
        const std::vector<int32_t> visible = {static_cast<int32_t>(depth)};
        int64_t next = 0;
        const Timing timing = Measure(
            [&] {
              KvPages pages = cache.Pages(visible.data(), kLatent);
              pages.v = pages.k;
              pages.v_row_stride = kLatent;
              pages.block_table += next * (depth / options.block_tokens);
              next = (next + 1) % copies;
              const AttentionTask task = {
                  .q = q.data(), .out = out.data(), .lse = lse.data(), .rows = 1, .kv = {&pages, 1}};
              table.attention({.tasks = {&task, 1},
                               .q_heads = q_heads,
                               .kv_heads = 1,
                               .k_dim = kLatent,
                               .v_dim = kRank,
                               .scale = 0.1f},
                              pool);
            },
            10, options.seconds, options.clock);
        const double flop = 2.0 * static_cast<double>(depth * q_heads) * (kLatent + kRank) / kGiga;
        const double read = static_cast<double>(bytes) / kGiga;
        const double floor = std::max(flop / limits.fma_gflops.all, read / limits.read_gb_s.all);
        std::printf("  %3d heads depth=%-6ld %10.1f us  %6.1f GFLOP/s %s  %5.1f GB/s %s  floor %s  best %s\n", q_heads,
                    depth, timing.median_s * 1e6, flop / timing.median_s,
                    Share(flop / timing.median_s, limits.fma_gflops.all).c_str(), read / timing.median_s,
                    Share(read / timing.median_s, limits.read_gb_s.all).c_str(), Share(floor, timing.median_s).c_str(),
                    Share(floor, timing.best_s).c_str());
        std::fflush(stdout);
      }
    }
  }
  constexpr int kHeads = 16;
  constexpr int kKeyDim = 192;
  constexpr int kValueDim = 128;
  constexpr int64_t kStride = kHeads * (kKeyDim + kValueDim);
  constexpr int64_t kRows = 512;
  std::printf(
      "\nattention, expanded MLA, contiguous f32 keys and values: the last 512 rows (share of FMA, of what is "
      "causal)\n");
  std::vector<float> q(static_cast<size_t>(kRows * kHeads * kKeyDim));
  std::vector<float> out(static_cast<size_t>(kRows * kHeads * kValueDim));
  std::vector<float> lse(static_cast<size_t>(kRows * kHeads));
  FillRandom(q.data(), static_cast<int64_t>(q.size()), 2.0f);
  for (const int64_t depth : options.depths) {
    std::vector<float> rows(static_cast<size_t>(depth * kStride));
    FillRandom(rows.data(), static_cast<int64_t>(rows.size()), 2.0f);
    std::vector<int32_t> visible(static_cast<size_t>(kRows));
    double keys = 0;
    for (size_t i = 0; i < visible.size(); ++i) {
      visible[i] = static_cast<int32_t>(depth - kRows) + static_cast<int32_t>(i) + 1;
      keys += visible[i];
    }
    const KvPages pages = {.k = rows.data(),
                           .v = rows.data() + kHeads * kKeyDim,
                           .dtype = DType::kF32,
                           .k_head_stride = kKeyDim,
                           .v_head_stride = kValueDim,
                           .k_row_stride = kStride,
                           .v_row_stride = kStride,
                           .visible = visible.data()};
    const AttentionTask task = {.q = q.data(),
                                .q_stride = kHeads * kKeyDim,
                                .out = out.data(),
                                .out_stride = kHeads * kValueDim,
                                .lse = lse.data(),
                                .lse_stride = kHeads,
                                .rows = kRows,
                                .kv = {&pages, 1}};
    const Timing timing = Measure(
        [&] {
          table.attention({.tasks = {&task, 1},
                           .q_heads = kHeads,
                           .kv_heads = kHeads,
                           .k_dim = kKeyDim,
                           .v_dim = kValueDim,
                           .scale = 0.1f},
                          pool);
        },
        5, options.seconds, options.clock);
    const double flop = 2.0 * keys * kHeads * (kKeyDim + kValueDim) / kGiga;
    std::printf("  prefill depth=%-6ld %10.1f us  %7.1f GFLOP/s %s   best %s\n", depth, timing.median_s * 1e6,
                flop / timing.median_s, Share(flop / timing.median_s, limits.fma_gflops.all).c_str(),
                Share(flop / timing.best_s, limits.fma_gflops.all).c_str());
    std::fflush(stdout);
  }
}

// What lies between the matrix products, as the time it adds to a layer of Qwen3-0.6B at 512 rows and at one.
void BenchSmall(const KernelTable& table, ThreadPool& pool, const Options& options) {
  std::printf("\nthe small kernels (median)\n");
  for (const int64_t rows : {int64_t{1}, int64_t{512}}) {
    constexpr int64_t kHidden = 1024;
    constexpr int64_t kFfn = 3072;
    std::vector<float> x(static_cast<size_t>(rows * kFfn * 2));
    std::vector<float> y(x.size());
    std::vector<float> weight(kHidden, 1.0f);
    std::vector<int32_t> positions(static_cast<size_t>(rows), 3);
    std::vector<float> cos_sin(128 * 8, 0.5f);
    std::vector<int64_t> slots(static_cast<size_t>(rows));
    for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i);
    std::vector<bf16> cache(static_cast<size_t>((rows + 16) * 2 * kHidden));
    FillRandom(x.data(), static_cast<int64_t>(x.size()), 2.0f);
    auto report = [&](const char* name, FunctionRef<void()> fn) {
      std::printf("  %-12s rows=%-4ld %10.2f us\n", name, rows,
                  Measure(fn, 5, options.seconds / 4, options.clock).median_s * 1e6);
    };
    report("rms_norm",
           [&] { table.rms_norm(x.data(), kHidden, weight.data(), 1e-6f, y.data(), kHidden, rows, kHidden, pool); });
    report("add", [&] { table.add(y.data(), kHidden, x.data(), kHidden, rows, kHidden, pool); });
    report("swiglu",
           [&] { table.swiglu(x.data(), 2 * kFfn, x.data() + kFfn, 2 * kFfn, y.data(), kFfn, rows, kFfn, pool); });
    report("rope q", [&] {
      table.rope({.x = y.data(),
                  .row_stride = 2048,
                  .head_stride = 128,
                  .rows = rows,
                  .heads = 16,
                  .rotary_dim = 128,
                  .positions = positions.data(),
                  .cos_sin = cos_sin.data()},
                 pool);
    });
    report("kv_write", [&] {
      table.kv_write({.k = x.data(),
                      .k_stride = kHidden,
                      .v = x.data(),
                      .v_stride = kHidden,
                      .slots = slots.data(),
                      .rows = rows,
                      .kv_heads = 8,
                      .k_dim = 128,
                      .v_dim = 128,
                      .block_tokens = 16,
                      .k_cache = cache.data(),
                      .v_cache = cache.data() + (rows + 16) * kHidden},
                     pool);
    });
  }
  std::vector<float> logits(151936);
  FillRandom(logits.data(), static_cast<int64_t>(logits.size()), 20.0f);
  auto report = [&](const char* name, FunctionRef<void()> fn) {
    std::printf("  %-12s 151936   %10.2f us\n", name,
                Measure(fn, 5, options.seconds / 4, options.clock).median_s * 1e6);
  };
  int64_t sink = 0;
  report("argmax", [&] { sink += table.argmax(logits.data(), static_cast<int64_t>(logits.size())); });
  float sum = 0;
  report("log_sum_exp", [&] { sum += table.log_sum_exp(logits.data(), static_cast<int64_t>(logits.size())); });
  report("softmax", [&] { table.softmax(logits.data(), static_cast<int64_t>(logits.size())); });
  std::printf("  (checksums %ld %g)\n", sink, sum);
}

bool ForceTarget(const std::string& name) {
  for (int64_t rest = hwy::SupportedTargets(); rest != 0; rest &= rest - 1) {
    const int64_t target = rest & -rest;
    if (name != hwy::TargetName(target)) continue;
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    return true;
  }
  return false;
}

int Main(int argc, char** argv) {
  Options options;
  CLI::App app("Speed of weft's kernels against the limits of this machine");
  app.add_option("--kernels", options.kernels, "cpu or ref")->capture_default_str();
  app.add_option("--threads", options.threads, "threads, 0: one a CPU")->capture_default_str();
  app.add_option("--only", options.only, "linear, many, attention, mla or small; empty: all");
  app.add_option("--seconds", options.seconds, "least time of a measurement")->capture_default_str();
  app.add_option("--depths", options.depths, "context lengths for attention, multiples of --block-tokens");
  app.add_option("--block-tokens", options.block_tokens, "tokens of a block of the cache")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--rows", options.rows, "rows for linear");
  app.add_option("--shape", options.shape,
                 "linear: only the shape of this name; many, mla: cases whose name contains this");
  std::string target;
  app.add_option("--target", target, "SIMD target for the kernels and the limits, e.g. AVX2; empty: the best");
  bool cpu_time = false;
  app.add_flag("--cpu-time", cpu_time, "time on the CPU instead of time that passed; one thread only");
  CLI11_PARSE(app, argc, argv);
  // One thread in a process of its own is left to the scheduler: it knows which CPU has time.
  const std::vector<int> cpus = cpu_time ? std::vector<int>() : AllowedCpus();
  if (options.threads <= 0) options.threads = static_cast<int>(AllowedCpus().size());
  if (!target.empty() && !ForceTarget(target)) {
    std::fprintf(stderr, "--target %s: not a target of this machine\n", target.c_str());
    return 1;
  }
  if (cpu_time) {
    options.clock = Clock::kThreadCpu;
    options.threads = 1;
  }
  ThreadPool pool(options.threads, cpus);
  const KernelTable& table = KernelsByName(options.kernels);
  const MachineLimits limits = MeasureMachineLimits(pool, options.clock);
  std::printf("%skernels: %s, %s\n", Describe(limits).c_str(), std::string(table.name).c_str(),
              std::string(table.target).c_str());
  if (options.only.empty() || options.only == "linear") BenchLinear(table, pool, limits, options);
  if (options.only.empty() || options.only == "many") BenchMany(table, pool, limits, options);
  if (options.only.empty() || options.only == "attention") BenchAttention(table, pool, limits, options);
  if (options.only.empty() || options.only == "mla") BenchMla(table, pool, limits, options);
  if (options.only.empty() || options.only == "small") BenchSmall(table, pool, options);
  std::printf("\n%s", Describe(MeasureMachineLimits(pool, options.clock)).c_str());
  return 0;
}

}  // namespace
}  // namespace weft::bench

int main(int argc, char** argv) { return weft::bench::Main(argc, argv); }
