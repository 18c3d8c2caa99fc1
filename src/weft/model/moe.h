#pragma once
// The routed experts of the mixture-of-experts layers of one rank.

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "weft/core/buffer.h"
#include "weft/core/thread_pool.h"
#include "weft/kernels/table.h"
#include "weft/model/config.h"
#include "weft/model/weights.h"
#include "weft/parallel/communicator.h"

namespace weft {

// Tokens are sorted by expert, so that each expert is one product over its rows and its weights are read once a tile.
//
// Without expert parallelism every rank of a TP group has a slice of each expert and all rows; nothing is sent.
// With it every rank of the `world` group has whole experts (SplitRange of them by rank). The ranks of a TP group have
// the same rows: each sends its share of them to the ranks of the chosen experts and gets one weighted sum a row and
// rank back. Where ranks share memory only the lists are exchanged, and rows are read where they lie.
class MoeExperts {
 public:
  struct Options {
    const ModelConfig* config = nullptr;
    const ModelWeights* weights = nullptr;  // routers
    std::shared_ptr<const ExpertWeights> experts;
    const KernelTable* kernels = nullptr;
    Communicator* tp = nullptr;
    Communicator* world = nullptr;  // null: no expert parallelism
    bool stream = false;            // send rows even where memory is shared (tests)
  };
  explicit MoeExperts(Options options);

  // Rows that one Run may have at most, a bound on its memory.
  int64_t tile_rows() const { return tile_rows_; }

  // out [rows, hidden] += this rank's part of the experts' output for the normed rows x [rows, hidden]; the parts of a
  // TP group add up to the whole. Collective over `world` with expert parallelism, also for a rank without rows.
  // `margins` [rows], where not null, is lowered to each row's ChoiceMargin; with expert parallelism only for the share
  // of the rows that this rank routes.
  void Run(int64_t layer, const float* x, int64_t rows, float* out, ThreadPool& pool, float* margins = nullptr);

  // Rows that went through each expert [num_experts] of this rank since it was made, all layers together.
  std::span<const int64_t> load() const { return load_; }

 private:
  // A row, by where it is, and an expert that it goes to.
  struct Pair {
    int32_t row = 0;
    int32_t expert = 0;
    float weight = 0;
  };
  // Rows to run, `count` of them: row i lies at base + numbers[i] * hidden (without numbers: base + i * hidden); its
  // pairs lie together, and their sum goes to out + i * hidden.
  struct Source {
    const float* base = nullptr;
    std::span<const int32_t> numbers;
    std::span<const Pair> pairs;
    float* out = nullptr;
    int64_t count = 0;

    const float* row(int64_t i, int64_t hidden) const {
      return base + (numbers.empty() ? i : int64_t{numbers[static_cast<size_t>(i)]}) * hidden;
    }
  };
  void Route(int64_t layer, const float* x, int64_t rows, ThreadPool& pool, float* margins);
  // out of each row += the weighted sum of what this rank's experts make of it.
  void RunExperts(int64_t layer, std::span<const Source> sources, ThreadPool& pool);
  void Exchange(int64_t layer, const float* x, int64_t rows, float* out, ThreadPool& pool, float* margins);

  Options o_;
  const ModelConfig& c_;
  const MoeConfig& moe_;
  const KernelTable& k_;
  int64_t tile_rows_;
  std::vector<int64_t> load_;
  std::vector<LinearArgs> products_;
  std::vector<Pair> pairs_;  // of Route: experts_per_token a row
  Buffer logits_, sorted_x_, gate_up_, act_, sorted_y_;
  Buffer sent_, returned_;
};

}  // namespace weft
