// y = x W^T. One row or two: the panels of W are streamed once, from memory to the multipliers (GemvPanels). More: a
// register tile that unpacks W on its way (StreamChunk). Many, where registers are few: the loops of Goto &
// van de Geijn, "Anatomy of high-performance matrix multiplication" (2008), with x in the role of the L2-resident block
// and a panel of W unpacked to f32 in L1 (GemmPiece).

#include <unistd.h>

#include <algorithm>

#include "weft/kernels/cpu/kernels.h"
#include "weft/kernels/cpu/linear_plan.h"
#include "weft/kernels/cpu/pack.h"
#include "weft/kernels/cpu/scratch.h"
#include "weft/kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "weft/kernels/cpu/linear.cc"
#include "hwy/foreach_target.h"
//
#include "hwy/highway.h"
#include "weft/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace weft {
namespace HWY_NAMESPACE {
namespace {

using cpu::EvenDepth;
using cpu::kPanel;
using cpu::PanelBytes;
using cpu::ScratchOf;
using cpu::ScratchSlot;

constexpr int64_t kPanelVectors = kPanel / kLanes;

// Rows up to which single panels are streamed. So many rows x panel vectors of sums must stay in registers; beyond 6
// the register tile over two panels is as fast.
constexpr int kGemvRows = HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON ? 24 / (4 * kPanelVectors)
                          : HWY_TARGET == HWY_AVX2                         ? 2
                                                                           : 1;

// Rows 2q and 2q + 1 of a panel, columns j .. j + kLanes, as floats.
HWY_INLINE void LoadPair(const bf16* panel, int64_t q, int64_t j, VF& even, VF& odd) {
  const VU words = hn::LoadU(DU(), reinterpret_cast<const uint32_t*>(panel) + q * kPanel + j);
  even = LowBf16(words);
  odd = HighBf16(words);
}
HWY_INLINE void LoadPair(const float* panel, int64_t q, int64_t j, VF& even, VF& odd) {
  even = hn::LoadU(DF(), panel + 2 * q * kPanel + j);
  odd = hn::LoadU(DF(), panel + (2 * q + 1) * kPanel + j);
}

// The even (0) or odd (1) row of the pair at which `pair` points.
template <int kOdd>
HWY_INLINE VF LoadHalf(const bf16* pair) {
  const VU words = LoadWords(pair);
  return kOdd == 0 ? LowBf16(words) : HighBf16(words);
}
template <int kOdd>
HWY_INLINE VF LoadHalf(const float* pair) {
  return hn::LoadU(DF(), pair + kOdd * kPanel);
}

// Adds `bias` and the old value where asked for, and stores the first `valid` of one panel's results.
HWY_INLINE void StorePanel(const VF (&sums)[kPanelVectors], const LinearArgs& args, int64_t row, int64_t col,
                           int64_t valid) {
  const DF d;
  float* y = args.y + row * args.y_stride + col;
  if (valid == kPanel) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < kPanelVectors; ++v) {
      VF r = sums[v];
      if (args.bias != nullptr) r = hn::Add(r, hn::LoadU(d, args.bias + col + v * kLanes));
      if (args.accumulate) r = hn::Add(r, hn::LoadU(d, y + v * kLanes));
      hn::StoreU(r, d, y + v * kLanes);
    }
    return;
  }
  HWY_ALIGN float values[kPanel];
  for (int64_t v = 0; v < kPanelVectors; ++v) hn::Store(sums[v], d, values + v * kLanes);
  for (int64_t j = 0; j < valid; ++j) {
    float r = values[j];
    if (args.bias != nullptr) r += args.bias[col + j];
    if (args.accumulate) r += y[j];
    y[j] = r;
  }
}

// How many bytes ahead of the arithmetic GEMV reads memory: at least the bandwidth of a core times the latency of
// memory.
constexpr int64_t kGemvAhead = 8192;

// Panels [panel0, panel1) for the kRows rows of x.
template <int kRows, typename T>
void GemvPanels(const LinearArgs& args, int64_t panel0, int64_t panel1) {
  const DF d;
  const PackedWeights& w = *args.w;
  // Independent chains: an FMA's result is ready after 4 cycles and two start in each, so 8 sums are wanted.
  constexpr int64_t kSums = kRows * kPanelVectors;
  constexpr int64_t kUnroll = kSums >= 8 ? 1 : kSums >= 4 ? 2 : 4;
  const int64_t pairs = w.k / 2;
  const float* x[kRows];
  for (int i = 0; i < kRows; ++i) x[i] = args.x + i * args.x_stride;
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    const T* weights = reinterpret_cast<const T*>(w.data.as<const char>() + panel * PanelBytes(w));
    VF sums[kUnroll][kRows][kPanelVectors];
#pragma GCC unroll 4
    for (int64_t u = 0; u < kUnroll; ++u) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
        for (int64_t v = 0; v < kPanelVectors; ++v) sums[u][i][v] = hn::Zero(d);
      }
    }
    int64_t q = 0;
    for (; q + kUnroll <= pairs; q += kUnroll) {
      constexpr int64_t kStepBytes = kUnroll * 2 * kPanel * static_cast<int64_t>(sizeof(T));
      const char* ahead = reinterpret_cast<const char*>(weights + 2 * q * kPanel) + kGemvAhead;
#pragma GCC unroll 8
      for (int64_t b = 0; b < kStepBytes; b += 64) __builtin_prefetch(ahead + b, 0, 0);
#pragma GCC unroll 4
      for (int64_t u = 0; u < kUnroll; ++u) {
#pragma GCC unroll 16
        for (int64_t v = 0; v < kPanelVectors; ++v) {
          VF even, odd;
          LoadPair(weights, q + u, v * kLanes, even, odd);
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) {
            sums[u][i][v] = hn::MulAdd(even, hn::Set(d, x[i][2 * (q + u)]), sums[u][i][v]);
            sums[u][i][v] = hn::MulAdd(odd, hn::Set(d, x[i][2 * (q + u) + 1]), sums[u][i][v]);
          }
        }
      }
    }
    for (; 2 * q < w.k; ++q) {
      const bool whole = 2 * q + 1 < w.k;  // the last row of an odd k has no partner
#pragma GCC unroll 16
      for (int64_t v = 0; v < kPanelVectors; ++v) {
        VF even, odd;
        LoadPair(weights, q, v * kLanes, even, odd);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          sums[0][i][v] = hn::MulAdd(even, hn::Set(d, x[i][2 * q]), sums[0][i][v]);
          if (whole) sums[0][i][v] = hn::MulAdd(odd, hn::Set(d, x[i][2 * q + 1]), sums[0][i][v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int64_t u = 1; u < kUnroll; ++u) {
#pragma GCC unroll 16
        for (int64_t v = 0; v < kPanelVectors; ++v) sums[0][i][v] = hn::Add(sums[0][i][v], sums[u][i][v]);
      }
      StorePanel(sums[0][i], args, i, panel * kPanel, std::min(kPanel, w.n - panel * kPanel));
    }
  }
}

template <typename T, int... kRowsMinus1>
void GemvOf(const LinearArgs& args, int64_t panel0, int64_t panel1, std::integer_sequence<int, kRowsMinus1...>) {
  using Fn = void (*)(const LinearArgs&, int64_t, int64_t);
  static constexpr Fn kFns[] = {&GemvPanels<kRowsMinus1 + 1, T>...};
  kFns[args.m - 1](args, panel0, panel1);
}

// m <= kGemvRows.
template <typename T>
void GemvRange(const LinearArgs& args, int64_t panel0, int64_t panel1) {
  GemvOf<T>(args, panel0, panel1, std::make_integer_sequence<int, kGemvRows>());
}

// One chunk of x: rows row0 .. row0 + rows of the problem, elements p0 .. p0 + depth of each, packed in blocks of
// kDepth: element (row i, p) of the chunk at x[p / kDepth * x_block + i * kRowStride + p % kDepth], a zero behind an
// odd depth.
struct Chunk {
  const float* x = nullptr;
  int64_t x_block = 0;
  int64_t row0 = 0;
  int64_t rows = 0;
  int64_t p0 = 0;
  int64_t depth = 0;
};

// The register tile over packed panels, unpacking W on its way: kRows x kTileCols sums over `k` elements. The shifts
// and ands run beside the multiply-adds, on ports of their own. Vector v of the columns comes from w[v]; where
// fetch[v] is not null, what lies there is fetched meanwhile, as many bytes.
template <int kRows, typename T>
void StreamTile(const float* HWY_RESTRICT x, int64_t x_block, const T* const (&w)[2], int64_t k,
                const char* const (&fetch)[2], float* HWY_RESTRICT c) {
  const DF d;
  VF acc[kRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) acc[i][0] = acc[i][1] = hn::Zero(d);
  const T* w0 = w[0];
  const T* w1 = w[1];
  const char* fetch0 = fetch[0];
  const char* fetch1 = fetch[1];
  int64_t done = 0;
  constexpr int64_t kPairBytes = 2 * kPanel * static_cast<int64_t>(sizeof(T));
  for (int64_t p0 = 0; p0 < k; p0 += kDepth, x += x_block) {
    const int64_t pairs = (std::min(kDepth, k - p0) + 1) / 2;
    const float* a = x;
    for (int64_t q = 0; q < pairs; ++q) {
      for (int64_t b = 0; b < kPairBytes && fetch0 != nullptr; b += 64) __builtin_prefetch(fetch0 + done + b, 0, 2);
      for (int64_t b = 0; b < kPairBytes && fetch1 != nullptr; b += 64) __builtin_prefetch(fetch1 + done + b, 0, 2);
      done += kPairBytes;
      const VF even0 = LoadHalf<0>(w0);
      const VF even1 = LoadHalf<0>(w1);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const VF av = hn::Set(d, a[i * kRowStride]);
        acc[i][0] = hn::MulAdd(av, even0, acc[i][0]);
        acc[i][1] = hn::MulAdd(av, even1, acc[i][1]);
      }
      const VF odd0 = LoadHalf<1>(w0);
      const VF odd1 = LoadHalf<1>(w1);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const VF av = hn::Set(d, a[i * kRowStride + 1]);
        acc[i][0] = hn::MulAdd(av, odd0, acc[i][0]);
        acc[i][1] = hn::MulAdd(av, odd1, acc[i][1]);
      }
      a += 2;
      w0 += 2 * kPanel;
      w1 += 2 * kPanel;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    hn::Store(acc[i][0], d, c + i * kTileCols);
    hn::Store(acc[i][1], d, c + i * kTileCols + kLanes);
  }
}

// With 16 registers, 4 of them for the columns of an even and an odd row, 5 rows are left (6 spill: -20 %).
constexpr int kStreamTileRows = kTileRows == 6 ? 5 : kTileRows;

template <typename T>
using StreamTileFn = void (*)(const float*, int64_t, const T* const (&)[2], int64_t, const char* const (&)[2], float*);

template <typename T, int... kRowsMinus1>
constexpr std::array<StreamTileFn<T>, sizeof...(kRowsMinus1) + 1> MakeStreamTiles(
    std::integer_sequence<int, kRowsMinus1...>) {
  return {nullptr, &StreamTile<kRowsMinus1 + 1, T>...};
}

// `height` rows of a tile of results, from row `row` and column `col` on. The first chunk of a row adds the bias, and
// the old value where asked for; the others add to what the first one left. Columns from col_end on are not touched:
// they do not exist, or are another piece's.
void StoreTile(const float* tile, const LinearArgs& args, int64_t row, int64_t height, int64_t col, int64_t col_end,
               bool first) {
  const DF d;
  const int64_t valid = std::min(kTileCols, col_end - col);
  const float* bias = first && args.bias != nullptr ? args.bias + col : nullptr;
  const bool add = !first || args.accumulate;
  for (int64_t i = 0; i < height; ++i) {
    const float* from = tile + i * kTileCols;
    float* y = args.y + (row + i) * args.y_stride + col;
    if (valid == kTileCols) {
#pragma GCC unroll 2
      for (int64_t v = 0; v < 2; ++v) {
        VF r = hn::Load(d, from + v * kLanes);
        if (bias != nullptr) r = hn::Add(r, hn::LoadU(d, bias + v * kLanes));
        if (add) r = hn::Add(r, hn::LoadU(d, y + v * kLanes));
        hn::StoreU(r, d, y + v * kLanes);
      }
      continue;
    }
    for (int64_t j = 0; j < valid; ++j) {
      float r = from[j];
      if (bias != nullptr) r += bias[j];
      if (add) r += y[j];
      y[j] = r;
    }
  }
}

// The results may lie in L3 or in memory: they are asked for before the arithmetic, which takes about a microsecond.
HWY_INLINE void PrefetchResults(const LinearArgs& args, int64_t row, int64_t height, int64_t col, int64_t width) {
  const float* y = args.y + row * args.y_stride + col;
  const int64_t last = std::min(width, args.w->n - col) - 1;
  for (int64_t i = 0; i < height; ++i, y += args.y_stride) {
    __builtin_prefetch(y, 1);
    __builtin_prefetch(y + last, 1);
  }
}

int64_t DepthBlocks(int64_t k) { return (k + kDepth - 1) / kDepth; }

int64_t L2Bytes() {
  static const int64_t bytes = [] {
    const int64_t l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return l2 > 0 ? l2 : int64_t{512} << 10;
  }();
  return bytes;
}

// A chunk of x times panels [panel0, panel1). `next` (or null): the panels that will be wanted after these.
template <typename T>
void StreamChunk(const LinearArgs& args, const Chunk& chunk, int64_t panel0, int64_t panel1,
                 const void* next = nullptr) {
  static constexpr auto kTiles = MakeStreamTiles<T>(std::make_integer_sequence<int, kStreamTileRows>());
  const PackedWeights& w = *args.w;
  const Strips strips(chunk.rows, kStreamTileRows);
  const int64_t col_end = std::min(panel1 * kPanel, w.n);
  auto panel_at = [&](int64_t col) {  // the last columns may have no panel behind them: any other will do
    const int64_t panel = std::min(col / kPanel, panel1 - 1);
    return reinterpret_cast<const T*>(w.data.as<const char>() + panel * PanelBytes(w)) + chunk.p0 * kPanel +
           col % kPanel * (sizeof(T) == 2 ? 2 : 1);
  };
  // The next tile's panels are fetched while the first strip or two of rows go over this one's: a core's arithmetic on
  // 12 rows takes about as long as memory takes to bring the next panels.
  const int64_t panel_bytes = PanelBytes(w);
  constexpr bool kTwoPanels = kTileCols > kPanel;
  // Panels that fit L2 beside the chunk are gone over once a strip of rows, whose x then stays in L1 and whose results
  // are written in the order in which they lie; others once for all rows (few rows must not wait for cold panels).
  const int64_t weight_bytes = (panel1 - panel0) * kPanel * chunk.depth * static_cast<int64_t>(sizeof(T));
  const bool by_strips = weight_bytes <= L2Bytes() / 4 && strips.count >= 8;
  const int64_t strips_at_once = by_strips ? 1 : strips.count;
  HWY_ALIGN float tile[kTileRows * kTileCols];
  int64_t row0 = 0;
  for (int64_t s0 = 0; s0 < strips.count; s0 += strips_at_once) {
    const int64_t s1 = s0 + strips_at_once;
    int64_t row = row0;
    for (int64_t col = panel0 * kPanel; col < col_end; col += kTileCols) {
      const T* panels[2] = {panel_at(col), panel_at(col + kLanes)};
      const int64_t next_col = col + kTileCols;
      const char* ahead = nullptr;
      if (next_col >= col_end) {
        if (s1 == strips.count) ahead = static_cast<const char*>(next);
      } else if (s0 == 0) {
        ahead = reinterpret_cast<const char*>(panel_at(next_col));
      }
      row = row0;
      for (int64_t s = s0; s < s1; ++s) {
        const int64_t height = strips.HeightOf(s);
        const bool second = kTwoPanels && ahead != nullptr && s == (strips_at_once > 1 ? s0 + 1 : s0);
        const char* fetch[2] = {s == s0 ? ahead : nullptr, second ? ahead + panel_bytes : nullptr};
        PrefetchResults(args, chunk.row0 + row, height, col, kTileCols);
        kTiles[static_cast<size_t>(height)](chunk.x + row * kRowStride, chunk.x_block, panels, chunk.depth, fetch,
                                            tile);
        StoreTile(tile, args, chunk.row0 + row, height, col, col_end, chunk.p0 == 0);
        row += height;
      }
    }
    row0 = row;
  }
}

// Rows that are fetched ahead of the one being packed.
constexpr int64_t kPackAhead = 4;

// Packs elements p0 .. p0 + depth of rows [begin, end) of x, whose place is that of rows begin - row0 of a chunk.
void PackRows(const LinearArgs& args, int64_t begin, int64_t end, int64_t p0, int64_t depth, int64_t row0,
              int64_t x_block, float* to) {
  for (int64_t d0 = 0; d0 < depth; d0 += kDepth) {
    const int64_t count = std::min(kDepth, depth - d0);
    for (int64_t row = begin; row < end; ++row) {
      // The rows of a head lie too far apart for the hardware to guess the next one.
      const float* soon = args.x + std::min(row + kPackAhead, end - 1) * args.x_stride + p0 + d0;
      for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(soon + i);
      float* out = to + d0 / kDepth * x_block + (row - row0) * kRowStride;
      ToFloats(args.x + row * args.x_stride + p0 + d0, count, out);
      out[count] = 0.0f;  // the partner of the last row of an odd k
    }
  }
}

// Rows [row0, row1) x panels [panel0, panel1), in chunks of x that one thread packs and keeps in its L2.
template <typename T>
void StreamPiece(const LinearArgs& args, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1, int64_t depth) {
  const int64_t rows = row1 - row0;
  float* x = ScratchOf<float>(ScratchSlot::kWork, rows * kRowStride * DepthBlocks(depth));
  for (int64_t p0 = 0; p0 < args.w->k; p0 += depth) {
    const Chunk chunk = {.x = x,
                         .x_block = rows * kRowStride,
                         .row0 = row0,
                         .rows = rows,
                         .p0 = p0,
                         .depth = std::min(depth, args.w->k - p0)};
    PackRows(args, row0, row1, p0, chunk.depth, row0, chunk.x_block, x);
    StreamChunk<T>(args, chunk, panel0, panel1);
  }
}

// Column blocks of two panels (one, at the end of an odd number of panels) are unpacked and multiplied together.
constexpr int64_t kBlockPanels = 2;
constexpr int64_t kBlockCols = kBlockPanels * kPanel;

// Rows [p0, p0 + depth) of `panels` panels as f32 tiles of kTileCols (or kLanes, if there is only that much) columns:
// tile t at to + t * depth_even * kTileCols, dense rows.
template <typename T>
void UnpackBlock(const PackedWeights& w, int64_t panel, int64_t panels, int64_t p0, int64_t depth, float* to) {
  const DF d;
  const int64_t even_depth = (depth + 1) / 2 * 2;
  const int64_t tile_cols = std::min(kTileCols, panels * kPanel);
  for (int64_t i = 0; i < panels; ++i) {
    const T* weights = reinterpret_cast<const T*>(w.data.as<const char>() + (panel + i) * PanelBytes(w)) + p0 * kPanel;
    for (int64_t v = 0; v < kPanelVectors; ++v) {
      const int64_t col = i * kPanel + v * kLanes;
      float* out = to + col / tile_cols * even_depth * tile_cols + col % tile_cols;
      for (int64_t q = 0; q < even_depth / 2; ++q) {
        VF even, odd;
        LoadPair(weights, q, v * kLanes, even, odd);
        hn::Store(even, d, out + 2 * q * tile_cols);
        hn::Store(odd, d, out + (2 * q + 1) * tile_cols);
      }
    }
  }
}

void PrefetchRange(const char* from, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(from + b, 0, 2);
}

// One tile whose columns are not all there: computed aside, then added column by column.
void PartialTile(TileFn tile, const float* a, const float* b, int64_t depth, int64_t height, int64_t width,
                 const LinearArgs& args, int64_t row, int64_t col, bool first) {
  HWY_ALIGN float values[kTileRows * kTileCols];
  tile(a, b, depth, values, width, TileStore::kSet, nullptr);
  const int64_t valid = std::min(width, args.w->n - col);
  for (int64_t i = 0; i < height; ++i) {
    float* y = args.y + (row + i) * args.y_stride + col;
    for (int64_t j = 0; j < valid; ++j) {
      float r = values[i * width + j];
      if (first && args.bias != nullptr) r += args.bias[col + j];
      if (!first || args.accumulate) r += y[j];
      y[j] = r;
    }
  }
}

// Rows [row0, row1) x panels [panel0, panel1) of the result. row1 - row0 is at most what fits the thread's L2.
template <typename T>
void GemmPiece(const LinearArgs& args, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1) {
  const PackedWeights& w = *args.w;
  const int64_t rows = row1 - row0;
  float* b = ScratchOf<float>(ScratchSlot::kWork, kDepth * kBlockCols + rows * kRowStride);
  float* a = b + kDepth * kBlockCols;
  const Strips strips(rows);
  const int64_t depths = (w.k + kDepth - 1) / kDepth;
  const int64_t depth_step = ((w.k + depths - 1) / depths + 1) / 2 * 2;  // even, so that pairs stay together
  for (int64_t p0 = 0; p0 < w.k; p0 += depth_step) {
    const int64_t depth = std::min(depth_step, w.k - p0);
    const bool first = p0 == 0;
    for (int64_t i = 0; i < rows; ++i) ToFloats(args.x + (row0 + i) * args.x_stride + p0, depth, a + i * kRowStride);
    const TileStore store = first && !args.accumulate ? (args.bias != nullptr ? TileStore::kSetAux : TileStore::kSet)
                            : first && args.bias != nullptr ? TileStore::kAddAux
                                                            : TileStore::kAdd;
    for (int64_t panel = panel0; panel < panel1; panel += kBlockPanels) {
      const int64_t panels = std::min(kBlockPanels, panel1 - panel);
      UnpackBlock<T>(w, panel, panels, p0, depth, b);
      // The next block comes from memory while this one is multiplied.
      const int64_t next_panels = std::min(kBlockPanels, panel1 - panel - panels);
      const int64_t next_bytes = depth * kPanel * static_cast<int64_t>(sizeof(T));
      const char* next =
          w.data.as<const char>() + (panel + panels) * PanelBytes(w) + p0 * kPanel * static_cast<int64_t>(sizeof(T));
      const int64_t width = std::min(kTileCols, panels * kPanel);
      const int64_t tiles = panels * kPanel / width;
      const int64_t share = (next_bytes / (strips.count * tiles) + 63) / 64 * 64;
      int64_t fetched = 0;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t col = panel * kPanel + t * width;
        if (col >= w.n) break;
        const float* tile_b = b + t * ((depth + 1) / 2 * 2) * width;
        const bool whole = col + width <= w.n;
        int64_t i = 0;
        for (int64_t s = 0; s < strips.count; ++s) {
          const int64_t height = strips.HeightOf(s);
          if (fetched < next_bytes) {
            const int64_t bytes = std::min(share, next_bytes - fetched);
            for (int64_t n = 0; n < next_panels; ++n) PrefetchRange(next + n * PanelBytes(w) + fetched, bytes);
            fetched += bytes;
          }
          PrefetchResults(args, row0 + i, height, col, width);
          TileFn tile = width == kTileCols ? TileOf<2, kRowStride, 1>(height) : TileOf<1, kRowStride, 1>(height);
          if (whole) {
            tile(a + i * kRowStride, tile_b, depth, args.y + (row0 + i) * args.y_stride + col, args.y_stride, store,
                 args.bias != nullptr ? args.bias + col : nullptr);
          } else {
            PartialTile(tile, a + i * kRowStride, tile_b, depth, height, width, args, row0 + i, col, first);
          }
          i += height;
        }
      }
    }
  }
}

// Rows of x that one thread keeps packed in its L2 at a time: 9/16 of it, the rest is for what streams through.
int64_t RowsPerPiece() { return std::clamp<int64_t>(L2Bytes() * 9 / 16 / (kRowStride * 4), 8 * kTileRows, 512); }

// Rows beyond which panels are unpacked to f32 once rather than on the way. With 32 registers (and ports to spare for
// the shifts) that never pays; a tile of 6 rows has 4 conversions for every 24 multiply-adds.
constexpr int64_t kStreamRows = HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON ? int64_t{1} << 40 : 24;

// Elements of x's rows that are multiplied before the results go to memory and come back. For R = rows * depth floats
// of x in L2, each cycle of the multipliers reads 64 / rows bytes of bf16 weights and moves 256 / depth bytes of
// results: equal at depth = 4 * rows. R = 128k (half of 1 MiB) gives 700; 1024 also spares models of that width any
// return.
constexpr int64_t kChunkDepth = 4 * kDepth;

// How x of m rows is cut into chunks: pieces of at most so many rows, so many elements of them at a time.
struct Blocking {
  int64_t rows = 0;
  int64_t depth = 0;  // a multiple of kDepth
};

Blocking BlockingOf(int64_t m, int64_t k) {
  if (m > kStreamRows) return {.rows = RowsPerPiece(), .depth = kDepth};
  // All of x fits.
  if (m * kRowStride * DepthBlocks(k) * 4 <= L2Bytes() / 2) return {.rows = m, .depth = DepthBlocks(k) * kDepth};
  const int64_t chunks = (k + kChunkDepth - 1) / kChunkDepth;
  const int64_t depth = (DepthBlocks(k) + chunks - 1) / chunks * kDepth;
  const int64_t rows = L2Bytes() / 2 / (4 * kRowStride) * kDepth / depth;
  return {.rows = std::max<int64_t>(2 * kTileRows, rows), .depth = depth};
}

// Below so many multiplications waking the other threads costs more than it brings (some microseconds).
constexpr int64_t kSmall = int64_t{1} << 17;

template <typename T>
void LinearOf(const LinearArgs& args, ThreadPool& pool) {
  const int64_t k = args.w->k;
  const int64_t panels = (args.w->n + kPanel - 1) / kPanel;
  const int64_t threads = pool.size();
  const bool small = args.m * args.w->n * k < kSmall;
  const int64_t grain = small ? panels : std::max<int64_t>(1, (panels + threads * 4 - 1) / (threads * 4));
  if (args.m <= kGemvRows) {
    // A few pieces a thread, so that one which was held up elsewhere does not hold up the rest.
    pool.ParallelFor(panels, grain, [&](int64_t begin, int64_t end, int) { GemvRange<T>(args, begin, end); });
    return;
  }
  const bool stream = args.m <= kStreamRows;
  const int64_t x_block = args.m * kRowStride;
  if (stream && x_block * DepthBlocks(k) * 4 <= L2Bytes() / 2) {
    // All of x fits the L2 of every core: packed once, by all, for all.
    float* x = ScratchOf<float>(ScratchSlot::kShared, x_block * DepthBlocks(k));
    pool.ParallelFor(args.m, std::max<int64_t>(1, 32768 / k),
                     [&](int64_t begin, int64_t end, int) { PackRows(args, begin, end, 0, k, 0, x_block, x); });
    const Chunk chunk = {.x = x, .x_block = x_block, .row0 = 0, .rows = args.m, .p0 = 0, .depth = k};
    pool.ParallelFor(panels, (grain + 1) / 2 * 2,
                     [&](int64_t begin, int64_t end, int) { StreamChunk<T>(args, chunk, begin, end); });
    return;
  }
  const int64_t chunks = (k + kChunkDepth - 1) / kChunkDepth;
  const int64_t depth = (DepthBlocks(k) + chunks - 1) / chunks * kDepth;
  const int64_t most_rows =
      stream ? std::max<int64_t>(2 * kTileRows, L2Bytes() / 2 / (4 * kRowStride) * kDepth / depth) : RowsPerPiece();
  int64_t row_pieces = (args.m + most_rows - 1) / most_rows;
  int64_t col_pieces = 1;
  if (!small && threads > 1) {
    // By rows if each thread gets enough of them to make reading W (once a piece) cheap, else by columns.
    if (args.m >= 64 * threads) {
      row_pieces = (row_pieces + threads - 1) / threads * threads;
    } else {
      const int64_t blocks = (panels + kBlockPanels - 1) / kBlockPanels;
      col_pieces = std::min(blocks, args.m >= 64 ? threads * 2 : threads * 4);
    }
  }
  const int64_t rows_each = (args.m + row_pieces - 1) / row_pieces;
  row_pieces = (args.m + rows_each - 1) / rows_each;
  const int64_t panels_each = ((panels + col_pieces - 1) / col_pieces + kBlockPanels - 1) / kBlockPanels * kBlockPanels;
  col_pieces = (panels + panels_each - 1) / panels_each;
  pool.ParallelFor(row_pieces * col_pieces, small ? row_pieces * col_pieces : 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t row0 = piece / col_pieces * rows_each;
      const int64_t row1 = std::min(row0 + rows_each, args.m);
      const int64_t panel0 = piece % col_pieces * panels_each;
      const int64_t panel1 = std::min(panel0 + panels_each, panels);
      if (stream) {
        StreamPiece<T>(args, row0, row1, panel0, panel1, depth);
      } else {
        GemmPiece<T>(args, row0, row1, panel0, panel1);
      }
    }
  });
}

void Linear(const LinearArgs& args, ThreadPool& pool) {
  if (args.m == 0 || args.w->n == 0) return;
  if (args.w->dtype == DType::kBF16) {
    LinearOf<bf16>(args, pool);
  } else {
    LinearOf<float>(args, pool);
  }
}

// Calls fn(args, panel0, panel1) for the parts of the products of `group` that its panels [panel0, panel1) are.
template <class Fn>
HWY_INLINE void ForProducts(const cpu::LinearGroup& group, int64_t panel0, int64_t panel1, const Fn& fn) {
  for (const LinearArgs& args : group.args) {
    const int64_t panels = (args.w->n + kPanel - 1) / kPanel;
    const int64_t lo = std::max<int64_t>(panel0, 0);
    const int64_t hi = std::min(panel1, panels);
    if (lo < hi) fn(args, lo, hi);
    panel0 -= panels;
    panel1 -= panels;
  }
}

// Where panel `panel` of a group lies.
const char* PanelAt(const cpu::LinearGroup& group, int64_t panel) {
  const char* at = nullptr;
  ForProducts(group, panel, panel + 1, [&](const LinearArgs& args, int64_t lo, int64_t) {
    at = args.w->data.as<const char>() + lo * PanelBytes(*args.w);
  });
  return at;
}

// `next` (or null): the panels that the thread will want after these.
void ManyPiece(const cpu::LinearGroup& group, const cpu::LinearPiece& piece, const char* next) {
  const LinearArgs& x_args = group.args.front();
  if (x_args.m > kGemvRows && x_args.m <= kStreamRows) {
    const int64_t k = x_args.w->k;
    const int64_t depth = BlockingOf(x_args.m, k).depth;
    const int64_t rows = piece.row1 - piece.row0;
    float* x = ScratchOf<float>(ScratchSlot::kWork, rows * kRowStride * DepthBlocks(depth));
    for (int64_t p0 = 0; p0 < k; p0 += depth) {
      const Chunk chunk = {.x = x,
                           .x_block = rows * kRowStride,
                           .row0 = piece.row0,
                           .rows = rows,
                           .p0 = p0,
                           .depth = std::min(depth, k - p0)};
      PackRows(x_args, piece.row0, piece.row1, p0, chunk.depth, piece.row0, chunk.x_block, x);
      ForProducts(group, piece.panel0, piece.panel1, [&](const LinearArgs& args, int64_t lo, int64_t hi) HWY_ATTR {
        const LinearArgs* following = &args == &group.args.back() ? nullptr : &args + 1;
        const void* then = following != nullptr ? following->w->data.data() : next;
        if (args.w->dtype == DType::kBF16) {
          StreamChunk<bf16>(args, chunk, lo, hi, then);
        } else {
          StreamChunk<float>(args, chunk, lo, hi, then);
        }
      });
    }
    return;
  }
  for (int64_t b = 0; b < kGemvAhead && next != nullptr; b += 64) __builtin_prefetch(next + b, 0, 2);
  ForProducts(group, piece.panel0, piece.panel1, [&](const LinearArgs& args, int64_t lo, int64_t hi) HWY_ATTR {
    const bool gemv = args.m <= kGemvRows;
    if (args.w->dtype == DType::kBF16) {
      gemv ? GemvRange<bf16>(args, lo, hi) : GemmPiece<bf16>(args, piece.row0, piece.row1, lo, hi);
    } else {
      gemv ? GemvRange<float>(args, lo, hi) : GemmPiece<float>(args, piece.row0, piece.row1, lo, hi);
    }
  });
}

void LinearMany(std::span<const LinearArgs> args, ThreadPool& pool) {
  thread_local cpu::LinearPlan plan_memory;
  cpu::LinearPlan& plan = plan_memory;
  cpu::PlanLinear(
      args, pool.size(), [](const LinearArgs& one) { return BlockingOf(one.m, one.w->k).rows; }, plan);
  const int64_t pieces = static_cast<int64_t>(plan.pieces.size());
  // Small pieces are taken several at a time, so that each knows which one follows.
  const int64_t few = pieces / (pool.size() * 2 * cpu::kPiecesOfThread);
  const int64_t grain = std::max<int64_t>(1, plan.products < kSmall ? pieces : few);
  pool.ParallelFor(pieces, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const cpu::LinearPiece& piece = plan.pieces[static_cast<size_t>(i)];
      const cpu::LinearPiece* next = i + 1 < end ? &piece + 1 : nullptr;
      ManyPiece(plan.groups[static_cast<size_t>(piece.group)], piece,
                next == nullptr ? nullptr : PanelAt(plan.groups[static_cast<size_t>(next->group)], next->panel0));
    }
  });
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace weft
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace weft {
namespace {
HWY_EXPORT(Linear);
HWY_EXPORT(LinearMany);
}  // namespace

void cpu::Linear(const LinearArgs& args, ThreadPool& pool) { HWY_DYNAMIC_DISPATCH(weft::Linear)(args, pool); }
void cpu::LinearMany(std::span<const LinearArgs> args, ThreadPool& pool) {
  HWY_DYNAMIC_DISPATCH(weft::LinearMany)(args, pool);
}

}  // namespace weft
#endif  // HWY_ONCE
