// y = x W^T. Few rows: the panels of W are streamed once, from memory to the multipliers (GemvPanels). Many rows: the
// loops of Goto & van de Geijn, "Anatomy of high-performance matrix multiplication" (2008), with x in the role of the
// L2-resident block and a panel of W unpacked to f32 in L1 (GemmPiece).

#include <unistd.h>

#include <algorithm>

#include "weft/kernels/cpu/kernels.h"
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

// Rows for which streaming beats unpacking: as many as keep rows x panel vectors of accumulators in registers.
constexpr int64_t kStreamRows = HWY_TARGET == HWY_AVX3 ? 8 : HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_NEON ? 4 : 1;

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

// Panels [panel0, panel1) for rows row0 .. row0 + kRows.
template <int kRows, typename T>
void GemvPanels(const LinearArgs& args, int64_t row0, int64_t panel0, int64_t panel1) {
  const DF d;
  const PackedWeights& w = *args.w;
  // Independent chains: an FMA's result is ready after 4 cycles and two start in each, so 8 sums are wanted.
  constexpr int64_t kSums = kRows * kPanelVectors;
  constexpr int64_t kUnroll = kSums >= 8 ? 1 : kSums >= 4 ? 2 : 4;
  // How far ahead of the arithmetic memory is read: about the bandwidth of a core times the latency of memory.
  constexpr int64_t kAheadBytes = 4096;
  const int64_t pairs = w.k / 2;
  const float* x[kRows];
  for (int i = 0; i < kRows; ++i) x[i] = args.x + (row0 + i) * args.x_stride;
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    const T* weights = reinterpret_cast<const T*>(w.data.as<const char>() + panel * PanelBytes(w));
    VF sums[kUnroll][kRows][kPanelVectors];
    for (int64_t u = 0; u < kUnroll; ++u) {
      for (int i = 0; i < kRows; ++i) {
        for (int64_t v = 0; v < kPanelVectors; ++v) sums[u][i][v] = hn::Zero(d);
      }
    }
    int64_t q = 0;
    for (; q + kUnroll <= pairs; q += kUnroll) {
      constexpr int64_t kStepBytes = kUnroll * 2 * kPanel * static_cast<int64_t>(sizeof(T));
      const char* ahead = reinterpret_cast<const char*>(weights + 2 * q * kPanel) + kAheadBytes;
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
      for (int64_t v = 0; v < kPanelVectors; ++v) {
        VF even, odd;
        LoadPair(weights, q, v * kLanes, even, odd);
        for (int i = 0; i < kRows; ++i) {
          sums[0][i][v] = hn::MulAdd(even, hn::Set(d, x[i][2 * q]), sums[0][i][v]);
          if (whole) sums[0][i][v] = hn::MulAdd(odd, hn::Set(d, x[i][2 * q + 1]), sums[0][i][v]);
        }
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int64_t u = 1; u < kUnroll; ++u) {
        for (int64_t v = 0; v < kPanelVectors; ++v) sums[0][i][v] = hn::Add(sums[0][i][v], sums[u][i][v]);
      }
      StorePanel(sums[0][i], args, row0 + i, panel * kPanel, std::min(kPanel, w.n - panel * kPanel));
    }
  }
}

template <typename T>
void GemvRange(const LinearArgs& args, int64_t panel0, int64_t panel1) {
  for (int64_t row = 0; row < args.m;) {
    const int64_t rows = args.m - row;
    if constexpr (kStreamRows >= 8) {
      if (rows >= 8) {
        GemvPanels<8, T>(args, row, panel0, panel1);
        row += 8;
        continue;
      }
      if (rows >= 5) {
        switch (rows) {
          case 5:
            GemvPanels<5, T>(args, row, panel0, panel1);
            break;
          case 6:
            GemvPanels<6, T>(args, row, panel0, panel1);
            break;
          default:
            GemvPanels<7, T>(args, row, panel0, panel1);
        }
        return;
      }
    }
    if constexpr (kStreamRows >= 4) {
      if (rows >= 4) {
        GemvPanels<4, T>(args, row, panel0, panel1);
        row += 4;
        continue;
      }
      if (rows == 3) {
        GemvPanels<3, T>(args, row, panel0, panel1);
        return;
      }
      if (rows == 2) {
        GemvPanels<2, T>(args, row, panel0, panel1);
        return;
      }
    }
    GemvPanels<1, T>(args, row, panel0, panel1);
    ++row;
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

// Rows of x that one thread keeps packed in its L2 at a time: half of it, the other half is for what streams through.
int64_t RowsPerPiece() {
  static const int64_t rows = [] {
    const int64_t l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
    const int64_t half = (l2 > 0 ? l2 : int64_t{512} << 10) / 2;
    return std::clamp<int64_t>(half / (kRowStride * 4), 8 * kTileRows, 512);
  }();
  return rows;
}

template <typename T>
void LinearOf(const LinearArgs& args, ThreadPool& pool) {
  const int64_t panels = (args.w->n + kPanel - 1) / kPanel;
  const int64_t threads = pool.size();
  // Below this much work waking the other threads costs more than it brings (some microseconds).
  const bool small = args.m * args.w->n * args.w->k < int64_t{1} << 17;
  if (args.m <= kStreamRows) {
    // A few pieces a thread, so that one which was held up elsewhere does not hold up the rest.
    const int64_t grain = small ? panels : std::max<int64_t>(1, (panels + threads * 4 - 1) / (threads * 4));
    pool.ParallelFor(panels, grain, [&](int64_t begin, int64_t end, int) { GemvRange<T>(args, begin, end); });
    return;
  }
  int64_t row_pieces = (args.m + RowsPerPiece() - 1) / RowsPerPiece();
  int64_t col_pieces = 1;
  if (!small && threads > 1) {
    // By rows if each thread gets enough of them to make the unpacking of W (once per piece) cheap, else by columns.
    if (args.m >= 96 * threads) {
      row_pieces = (row_pieces + threads - 1) / threads * threads;
    } else {
      const int64_t blocks = (panels + kBlockPanels - 1) / kBlockPanels;
      col_pieces = std::min(blocks, args.m >= 64 ? threads * 2 : threads * 4);
    }
  }
  const int64_t rows_each = (args.m + row_pieces - 1) / row_pieces;
  const int64_t panels_each = ((panels + col_pieces - 1) / col_pieces + kBlockPanels - 1) / kBlockPanels * kBlockPanels;
  col_pieces = (panels + panels_each - 1) / panels_each;
  pool.ParallelFor(row_pieces * col_pieces, small ? row_pieces * col_pieces : 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t row0 = piece / col_pieces * rows_each;
      const int64_t panel0 = piece % col_pieces * panels_each;
      GemmPiece<T>(args, row0, std::min(row0 + rows_each, args.m), panel0, std::min(panel0 + panels_each, panels));
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

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace weft
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace weft {
namespace {
HWY_EXPORT(Linear);
}

void cpu::Linear(const LinearArgs& args, ThreadPool& pool) { HWY_DYNAMIC_DISPATCH(weft::Linear)(args, pool); }

}  // namespace weft
#endif  // HWY_ONCE
