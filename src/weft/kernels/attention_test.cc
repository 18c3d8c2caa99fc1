// Attention, merge and the writing of the paged cache, on every backend, against sums in double written here.

#include <memory>
#include <numeric>

#include "weft/core/error.h"
#include "weft/kernels/kernels_testing.h"

namespace weft {
namespace {

float ReadElement(const void* data, DType dtype, int64_t at) {
  return dtype == DType::kBF16 ? ToFloat(static_cast<const bf16*>(data)[at]) : static_cast<const float*>(data)[at];
}

int64_t RowStride(int64_t stride, int64_t dim) { return stride != 0 ? stride : dim; }

// The keys and values of one shard, in the cache's own layout, with a random block table or contiguous.
struct Shard {
  Buffer k;
  Buffer v;
  std::vector<int32_t> table;
  std::vector<int32_t> visible;
  KvPages pages;
};

struct Problem {
  int64_t rows = 0;
  int q_heads = 0;
  int kv_heads = 0;
  int k_dim = 0;
  int v_dim = 0;
  bool latent = false;  // the value of a key is the beginning of its row
  float scale = 1;
  int64_t q_stride = 0;
  int64_t out_stride = 0;
  int64_t lse_stride = 0;
  std::vector<float> q;
  std::vector<float> out;
  std::vector<float> lse;
  std::vector<std::unique_ptr<Shard>> shards;
  std::vector<KvPages> kv;

  AttentionTask Task(bool with_lse) {
    kv.clear();
    for (const auto& shard : shards) kv.push_back(shard->pages);
    return {.q = q.data(),
            .q_stride = q_stride,
            .out = out.data(),
            .out_stride = out_stride,
            .lse = with_lse ? lse.data() : nullptr,
            .lse_stride = lse_stride,
            .rows = rows,
            .kv = kv};
  }
};

// Where the row of a key (counted through its shard) begins in the block that holds it.
int64_t KeyAt(const KvPages& kv, const Problem& p, int64_t block, int64_t head, int64_t key) {
  const int64_t row = kv.block_tokens > 0 ? key % kv.block_tokens : key;
  return block * kv.k_block_stride + head * kv.k_head_stride + row * RowStride(kv.k_row_stride, p.k_dim);
}
int64_t ValueAt(const KvPages& kv, const Problem& p, int64_t block, int64_t head, int64_t key) {
  const int64_t row = kv.block_tokens > 0 ? key % kv.block_tokens : key;
  return block * kv.v_block_stride + head * kv.v_head_stride + row * RowStride(kv.v_row_stride, p.v_dim);
}

class AttentionTest : public KernelTest {
 protected:
  std::unique_ptr<Shard> MakeShard(const Problem& p, std::vector<int32_t> visible, DType dtype, bool paged,
                                   int32_t block_tokens, float k_scale) {
    auto shard = std::make_unique<Shard>();
    const int64_t keys = *std::max_element(visible.begin(), visible.end());
    const int64_t used = paged ? (keys + block_tokens - 1) / block_tokens : 1;
    const int64_t blocks = paged ? used + Int(0, 3) : 1;
    const int64_t rows_of_block = paged ? block_tokens : keys;
    KvPages& pages = shard->pages;
    pages.dtype = dtype;
    pages.block_tokens = paged ? block_tokens : 0;
    // What lies between the rows is NaN.
    auto place = [&](Buffer& buffer, int dim, float scale, int64_t& block_stride, int64_t& head_stride,
                     int64_t& row_stride) {
      const Strides strides = MakeStrides(p.kv_heads, rows_of_block, dim);
      block_stride = strides.block;
      head_stride = strides.head;
      row_stride = strides.row == dim && Coin() ? 0 : strides.row;
      const int64_t count = blocks * strides.block;
      buffer = Buffer(static_cast<size_t>(count) * SizeOf(dtype));
      for (int64_t i = 0; i < count; ++i) Store(buffer, dtype, i, std::nanf(""));
      const std::vector<float> values = Normal(blocks * p.kv_heads * rows_of_block * dim, scale);
      for (size_t i = 0; i < values.size(); ++i) {
        int64_t rest = static_cast<int64_t>(i);
        const int64_t d = rest % dim;
        const int64_t row = (rest /= dim) % rows_of_block;
        const int64_t head = (rest /= rows_of_block) % p.kv_heads;
        const int64_t block = rest / p.kv_heads;
        Store(buffer, dtype, block * strides.block + head * strides.head + row * strides.row + d, values[i]);
      }
    };
    place(shard->k, p.k_dim, k_scale, pages.k_block_stride, pages.k_head_stride, pages.k_row_stride);
    pages.k = shard->k.data();
    if (p.latent) {
      pages.v = pages.k;
      pages.v_block_stride = pages.k_block_stride;
      pages.v_head_stride = pages.k_head_stride;
      pages.v_row_stride = RowStride(pages.k_row_stride, p.k_dim);
    } else {
      place(shard->v, p.v_dim, 1.0f, pages.v_block_stride, pages.v_head_stride, pages.v_row_stride);
      pages.v = shard->v.data();
    }
    shard->table.resize(static_cast<size_t>(blocks));
    std::iota(shard->table.begin(), shard->table.end(), 0);
    std::shuffle(shard->table.begin(), shard->table.end(), rng);
    shard->table.resize(static_cast<size_t>(used));
    shard->visible = std::move(visible);
    // What no row sees must not matter, not even a NaN: blocks are reused without being cleared.
    for (int64_t key = keys; paged && key < used * block_tokens; ++key) {
      const int64_t block = shard->table[static_cast<size_t>(key / block_tokens)];
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        for (int64_t d = 0; d < p.k_dim; ++d) Store(shard->k, dtype, KeyAt(pages, p, block, h, key) + d, std::nanf(""));
        for (int64_t d = 0; d < p.v_dim && !p.latent; ++d) {
          Store(shard->v, dtype, ValueAt(pages, p, block, h, key) + d, std::nanf(""));
        }
      }
    }
    if (paged) pages.block_table = shard->table.data();
    pages.visible = shard->visible.data();
    return shard;
  }

  // Elements between blocks, heads and rows of a cache: the heads of a block one after another, or those of a row (as
  // in keys and values that were just computed); with gaps or without.
  struct Strides {
    int64_t block = 0;
    int64_t head = 0;
    int64_t row = 0;
  };
  Strides MakeStrides(int64_t heads, int64_t rows, int64_t dim) {
    const int64_t gap = Coin() ? 0 : OneOf<int64_t>({1, 2, 16, 100});
    Strides strides;
    if (Coin()) {
      strides.row = dim + gap;
      strides.head = rows * strides.row + gap;
      strides.block = heads * strides.head;
    } else {
      strides.head = dim + gap;
      strides.row = heads * strides.head + gap;
      strides.block = rows * strides.row;
    }
    return strides;
  }

  static void Store(Buffer& buffer, DType dtype, int64_t at, float value) {
    if (dtype == DType::kBF16) {
      buffer.as<bf16>()[at] = ToBf16(value);
    } else {
      buffer.as<float>()[at] = value;
    }
  }

  Problem MakeProblem(int64_t rows, int q_heads, int kv_heads, int k_dim, int v_dim, float q_scale = 1.0f) {
    Problem p;
    p.rows = rows;
    p.q_heads = q_heads;
    p.kv_heads = kv_heads;
    p.k_dim = k_dim;
    p.v_dim = v_dim;
    p.scale = 1.0f / std::sqrt(static_cast<float>(k_dim));
    p.q_stride = int64_t{q_heads} * k_dim + Int(0, 3);
    p.out_stride = int64_t{q_heads} * v_dim + Int(0, 3);
    p.lse_stride = q_heads + Int(0, 3);
    p.q = Normal(rows * p.q_stride, q_scale);
    p.out.assign(static_cast<size_t>(rows * p.out_stride), 77.0f);
    p.lse.assign(static_cast<size_t>(rows * p.lse_stride), 77.0f);
    return p;
  }

  // The causal counts of rows that end at `last` of a shard that gets every `every`-th token.
  std::vector<int32_t> Causal(int64_t rows, int64_t last, int64_t every = 1, int64_t phase = 0) {
    std::vector<int32_t> visible;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t tokens = std::max<int64_t>(0, last - rows + 1 + i);
      visible.push_back(static_cast<int32_t>((tokens + every - 1 - phase) / every));
    }
    return visible;
  }

  // Counts that never fall: zeros, repeats and jumps.
  std::vector<int32_t> Rising(int64_t rows, int64_t most) {
    std::vector<int32_t> visible;
    for (int64_t i = 0; i < rows; ++i) visible.push_back(static_cast<int32_t>(Int(0, most)));
    std::sort(visible.begin(), visible.end());
    if (Coin()) visible[0] = 0;
    return visible;
  }

  void Run(std::vector<Problem>& problems, bool with_lse) {
    std::vector<AttentionTask> tasks;
    for (Problem& p : problems) tasks.push_back(p.Task(with_lse));
    const Problem& p = problems[0];
    table().attention({.tasks = tasks,
                       .q_heads = p.q_heads,
                       .kv_heads = p.kv_heads,
                       .k_dim = p.k_dim,
                       .v_dim = p.v_dim,
                       .scale = p.scale},
                      pool());
  }

  void CheckRow(const Problem& p, int64_t row, int head, bool with_lse) {
    const int kv_head = head / (p.q_heads / p.kv_heads);
    const float* q = &p.q[static_cast<size_t>(row * p.q_stride + int64_t{head} * p.k_dim)];
    std::vector<double> scores;
    std::vector<std::vector<double>> values;
    double largest = -kInf;
    double k_norm = 0;
    double v_most = 0;
    for (const auto& shard : p.shards) {
      const KvPages& kv = shard->pages;
      for (int32_t key = 0; key < shard->visible[static_cast<size_t>(row)]; ++key) {
        const bool paged = kv.block_table != nullptr;
        const int64_t block = paged ? kv.block_table[key / kv.block_tokens] : 0;
        const int64_t k_at = KeyAt(kv, p, block, kv_head, key);
        const int64_t v_at = ValueAt(kv, p, block, kv_head, key);
        double dot = 0;
        double squares = 0;
        for (int d = 0; d < p.k_dim; ++d) {
          const double k = ReadElement(kv.k, kv.dtype, k_at + d);
          dot += k * q[d];
          squares += k * k;
        }
        k_norm = std::max(k_norm, std::sqrt(squares));
        scores.push_back(dot * p.scale);
        largest = std::max(largest, scores.back());
        values.emplace_back();
        for (int d = 0; d < p.v_dim; ++d) {
          values.back().push_back(ReadElement(kv.v, kv.dtype, v_at + d));
          v_most = std::max(v_most, std::abs(values.back().back()));
        }
      }
    }
    std::vector<double> want(static_cast<size_t>(p.v_dim), 0.0);
    double total = 0;
    for (size_t i = 0; i < scores.size(); ++i) {
      const double weight = std::exp(scores[i] - largest);
      total += weight;
      for (size_t d = 0; d < want.size(); ++d) want[d] += weight * values[i][d];
    }
    // A score is off by at most about eps sqrt(k_dim) |q| |k| scale, and its exponential by that in proportion; the
    // sums over keys add their own roundings.
    const double score_size = p.scale * Norm(q, p.k_dim) * k_norm * std::sqrt(static_cast<double>(p.k_dim)) + 1;
    const double relative = kEps * (score_size + 16 + std::sqrt(static_cast<double>(scores.size())));
    for (int d = 0; d < p.v_dim; ++d) {
      const float got = p.out[static_cast<size_t>(row * p.out_stride + int64_t{head} * p.v_dim + d)];
      const double wanted = total > 0 ? want[static_cast<size_t>(d)] / total : 0.0;
      ASSERT_NEAR(got, wanted, relative * v_most) << "row " << row << " head " << head << " d " << d;
      if (scores.empty()) {
        ASSERT_EQ(got, 0.0f);
      }
    }
    if (!with_lse) return;
    const float lse = p.lse[static_cast<size_t>(row * p.lse_stride + head)];
    if (scores.empty()) {
      ASSERT_EQ(lse, -kInf) << "row " << row;
    } else {
      const double wanted = largest + std::log(total);
      ASSERT_NEAR(lse, wanted, kEps * (score_size + std::abs(wanted) + 4)) << "row " << row << " head " << head;
    }
  }

  void Check(std::vector<Problem>& problems) {
    const bool with_lse = Coin();
    Run(problems, with_lse);
    for (const Problem& p : problems) {
      SCOPED_TRACE(fmt::format("rows {} heads {}/{} dims {}/{} shards {} keys of the last row {} {}", p.rows, p.q_heads,
                               p.kv_heads, p.k_dim, p.v_dim, p.shards.size(),
                               p.shards.empty() ? 0 : p.shards[0]->visible.back(),
                               p.shards.empty() ? "" : NameOf(p.shards[0]->pages.dtype)));
      for (int64_t row = 0; row < p.rows; ++row) {
        for (int head = 0; head < p.q_heads; ++head) {
          CheckRow(p, row, head, with_lse);
          if (HasFatalFailure()) return;
        }
        for (int64_t i = int64_t{p.q_heads} * p.v_dim; i < p.out_stride; ++i) {
          ASSERT_EQ(p.out[static_cast<size_t>(row * p.out_stride + i)], 77.0f) << "wrote behind row " << row;
        }
      }
    }
  }

  int RandomDim() { return OneOf({16, 24, 32, 64, 80, 96, 112, 128, 192, 256, 17, 2}); }
};
WEFT_FOR_ALL_BACKENDS(AttentionTest);

TEST_P(AttentionTest, RandomProblems) {
  for (int i = 0; i < 50; ++i) {
    const int kv_heads = static_cast<int>(Int(1, 3));
    const int group = OneOf({1, 2, 3, 4, 5, 7, 8});
    const int k_dim = RandomDim();
    const int v_dim = Coin() ? k_dim : RandomDim();
    std::vector<Problem> problems;
    for (int64_t tasks = Int(1, 3); tasks > 0; --tasks) {
      const int64_t rows = OneOf<int64_t>({1, 1, 2, 5, 17, 40});
      problems.push_back(MakeProblem(rows, kv_heads * group, kv_heads, k_dim, v_dim));
      const DType dtype = OneOf({DType::kBF16, DType::kF32});
      for (int64_t shards = Int(1, 3); shards > 0; --shards) {
        const int32_t block_tokens = OneOf({1, 3, 8, 16, 32, 64});
        const int64_t most = OneOf<int64_t>({0, 1, block_tokens, block_tokens + 1, 63, 64, 65, 128, 150, 300});
        std::vector<int32_t> visible = Coin() ? Causal(rows, most) : Rising(rows, most);
        if (Coin()) visible.assign(static_cast<size_t>(rows), static_cast<int32_t>(most));
        problems.back().shards.push_back(
            MakeShard(problems.back(), visible, Int(0, 9) == 0 ? DType::kF32 : dtype, Coin(), block_tokens, 1.0f));
      }
    }
    Check(problems);
    if (HasFatalFailure()) return;
  }
}

TEST_P(AttentionTest, PrefillOverShardsInOneSoftmax) {
  for (const int64_t rows : {Int(60, 90), Int(130, 200)}) {
    std::vector<Problem> problems;
    problems.push_back(MakeProblem(rows, 4, 2, 64, 64));
    const int64_t last = rows + Int(0, 200);
    for (int64_t phase = 0; phase < 3; ++phase) {
      problems[0].shards.push_back(MakeShard(problems[0], Causal(rows, last, 3, phase), DType::kBF16, true, 16, 1.0f));
    }
    Check(problems);
  }
}

TEST_P(AttentionTest, LongDecodeSplitsItsKeys) {
  std::vector<Problem> problems;
  for (const int64_t keys : {Int(3000, 4000), Int(1, 50)}) {
    problems.push_back(MakeProblem(OneOf<int64_t>({1, 2, 12}), 3, 1, 32, 48));
    Problem& p = problems.back();
    p.shards.push_back(MakeShard(p, Causal(p.rows, keys), DType::kBF16, true, 16, 1.0f));
    p.shards.push_back(MakeShard(p, Rising(p.rows, keys), DType::kBF16, true, 16, 1.0f));
  }
  Check(problems);
}

TEST_P(AttentionTest, HugeScoresNeitherOverflowNorVanish) {
  for (const float scale : {30.0f, 1000.0f}) {
    for (const int64_t rows : {1, 20}) {
      std::vector<Problem> problems;
      problems.push_back(MakeProblem(rows, 4, 2, 64, 64, scale));
      problems[0].shards.push_back(
          MakeShard(problems[0], Causal(rows, 200), OneOf({DType::kBF16, DType::kF32}), true, 16, scale));
      Check(problems);
    }
  }
}

TEST_P(AttentionTest, NothingVisible) {
  for (const int64_t rows : {1, 33}) {
    for (const int shards : {0, 1, 2}) {
      std::vector<Problem> problems;
      problems.push_back(MakeProblem(rows, 4, 2, 32, 32));
      Problem& p = problems[0];
      for (int i = 0; i < shards; ++i) {
        p.shards.push_back(MakeShard(p, std::vector<int32_t>(static_cast<size_t>(rows), 0), DType::kBF16, true, 16, 1));
      }
      Run(problems, true);
      for (int64_t row = 0; row < rows; ++row) {
        for (int h = 0; h < 4; ++h) {
          EXPECT_EQ(p.lse[static_cast<size_t>(row * p.lse_stride + h)], -kInf);
          for (int d = 0; d < 32; ++d) EXPECT_EQ(p.out[static_cast<size_t>(row * p.out_stride + h * 32 + d)], 0.0f);
        }
      }
    }
  }
}

// Rows h .. h + k of a request that is being verified (speculative decoding), its context spread over shards: each row
// has its own count on each shard, local_len(p + 1, r), and some rows see nothing on some shards. Attended to shard by
// shard and merged, they are as over all keys at once.
TEST_P(AttentionTest, SpeculativeRowsMergedOverShards) {
  constexpr int kHeads = 4;
  constexpr int kDim = 32;
  bool rows_without_keys = false;
  bool counts_differ = false;  // local_len(G - k) is not local_len(G) - k
  for (const int64_t h : {int64_t{0}, int64_t{3}, Int(8, 60), Int(100, 400)}) {
    const int64_t interleave = OneOf<int64_t>({1, 8, 16});
    const int64_t shards = OneOf<int64_t>({2, 4, 8});
    const int64_t rows = Int(2, 6);
    // Counted one by one; cp::KvLayout has the formula.
    const auto local_len = [&](int64_t length, int64_t shard) {
      int32_t n = 0;
      for (int64_t x = 0; x < length; ++x) n += x / interleave % shards == shard;
      return n;
    };
    Problem whole = MakeProblem(rows, kHeads, 2, kDim, kDim);
    std::vector<Problem> problems;
    for (int64_t shard = 0; shard < shards; ++shard) {
      std::vector<int32_t> visible;
      for (int64_t row = 0; row < rows; ++row) {
        visible.push_back(local_len(h + row + 1, shard));
        rows_without_keys |= visible.back() == 0;
        counts_differ |= local_len(h + rows, shard) - (rows - 1 - row) != visible.back();
      }
      Problem part = MakeProblem(rows, kHeads, 2, kDim, kDim);
      part.q_stride = whole.q_stride;
      part.out_stride = whole.out_stride;
      part.lse_stride = whole.lse_stride;
      part.q = whole.q;
      part.out = whole.out;
      part.lse = whole.lse;
      part.shards.push_back(MakeShard(part, visible, DType::kBF16, true, 16, 1.0f));
      problems.push_back(std::move(part));
    }
    Run(problems, true);
    std::vector<const float*> outs, lses;
    for (const Problem& p : problems) {
      outs.push_back(p.out.data());
      lses.push_back(p.lse.data());
    }
    table().merge({.out = outs,
                   .lse = lses,
                   .rows = rows,
                   .heads = kHeads,
                   .dim = kDim,
                   .out_row_stride = whole.out_stride,
                   .lse_row_stride = whole.lse_stride,
                   .merged = whole.out.data(),
                   .merged_row_stride = whole.out_stride,
                   .merged_lse = nullptr},
                  pool());
    for (Problem& p : problems) whole.shards.push_back(std::move(p.shards[0]));
    for (int64_t row = 0; row < rows; ++row) {
      for (int head = 0; head < kHeads; ++head) {
        CheckRow(whole, row, head, false);
        if (HasFatalFailure()) return;
      }
    }
  }
  EXPECT_TRUE(rows_without_keys);
  EXPECT_TRUE(counts_differ);
}

// A batch padded to the size of a captured graph: its last rows see nothing.
TEST_P(AttentionTest, PaddingRowsSeeNothingAndChangeNothing) {
  for (const int64_t rows : {int64_t{1}, Int(2, 9), Int(40, 90)}) {
    const int64_t padding = Int(1, 20);
    Problem real = MakeProblem(rows, 4, 2, 64, 64);
    const std::vector<int32_t> visible = Causal(rows, rows + Int(0, 150));
    real.shards.push_back(MakeShard(real, visible, DType::kBF16, true, 16, 1.0f));
    // Rows of padding are tasks of their own: within a task the counts of keys never fall.
    std::vector<Problem> problems;
    problems.push_back(std::move(real));
    for (int64_t i = 0; i < padding; ++i) {
      problems.push_back(MakeProblem(1, 4, 2, 64, 64));
      problems.back().shards.push_back(MakeShard(problems.back(), {0}, DType::kBF16, true, 16, 1.0f));
    }
    Run(problems, true);
    for (const Problem& p : problems) {
      for (int64_t row = 0; row < p.rows; ++row) {
        for (int head = 0; head < 4; ++head) {
          CheckRow(p, row, head, true);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(AttentionTest, ManyHeadsOfOneKvHead) {  // multi-query: one row alone fills several panels of columns
  std::vector<Problem> problems;
  problems.push_back(MakeProblem(Int(1, 3), 70, 1, 24, 16));
  problems[0].shards.push_back(MakeShard(problems[0], Causal(problems[0].rows, 140), DType::kF32, false, 0, 1.0f));
  Check(problems);
}

// The latent form of MLA: one KV head, the value of a key is the beginning of its row.
TEST_P(AttentionTest, ValuesInsideKeys) {
  for (const auto& [k_dim, v_dim] : {std::pair(576, 512), std::pair(24, 16), std::pair(40, 32), std::pair(33, 17)}) {
    for (const int q_heads : {1, static_cast<int>(Int(2, 15)), 16, static_cast<int>(Int(17, 128))}) {
      std::vector<Problem> problems;
      for (int64_t tasks = Int(1, 2); tasks > 0; --tasks) {
        const int64_t rows = k_dim > 100 ? 1 : Int(1, 3);
        problems.push_back(MakeProblem(rows, q_heads, 1, k_dim, v_dim));
        Problem& p = problems.back();
        p.latent = true;
        const DType dtype = OneOf({DType::kBF16, DType::kF32});
        for (int64_t shards = Int(1, 2); shards > 0; --shards) {
          p.shards.push_back(MakeShard(p, Rising(rows, Int(1, 150)), dtype, Int(0, 3) != 0, OneOf({1, 16, 64}), 1.0f));
        }
      }
      Check(problems);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(AttentionTest, LongLatentDecodeSplitsItsKeys) {
  for (const int q_heads : {4, 16, 40}) {
    std::vector<Problem> problems;
    problems.push_back(MakeProblem(1, q_heads, 1, 72, 64));
    Problem& p = problems.back();
    p.latent = true;
    p.shards.push_back(MakeShard(p, {static_cast<int32_t>(Int(2000, 3000))}, DType::kBF16, true, 16, 1.0f));
    Check(problems);
  }
}

// As in the expanded form of MLA: keys and values of different sizes, computed into one array.
TEST_P(AttentionTest, ValuesNarrowerThanKeysInContiguousRows) {
  for (const auto& [k_dim, v_dim] : {std::pair(192, 128), std::pair(24, 16), std::pair(16, 40)}) {
    for (const int64_t rows : {int64_t{1}, Int(20, 60)}) {
      std::vector<Problem> problems;
      problems.push_back(MakeProblem(rows, 4, 4, k_dim, v_dim));
      Problem& p = problems.back();
      p.shards.push_back(MakeShard(p, Causal(rows, 130), DType::kF32, false, 0, 1.0f));
      p.shards.push_back(MakeShard(p, Causal(rows, 70), OneOf({DType::kBF16, DType::kF32}), false, 0, 1.0f));
      Check(problems);
    }
  }
}

TEST_P(AttentionTest, HeadsWiderThanATile) {
  for (const int64_t rows : {1, 10}) {
    std::vector<Problem> problems;
    problems.push_back(MakeProblem(rows, 4, 1, 576, 512));
    problems[0].shards.push_back(MakeShard(problems[0], Causal(rows, 150), DType::kBF16, true, 16, 1.0f));
    Check(problems);
  }
}

class MergeTest : public KernelTest {};
WEFT_FOR_ALL_BACKENDS(MergeTest);

TEST_P(MergeTest, WeighsByExpOfLse) {
  for (int i = 0; i < 40; ++i) {
    const int64_t rows = Int(1, 20);
    const int64_t heads = Int(1, 6);
    const int64_t dim = Int(1, 140);
    const int64_t out_stride = heads * dim + Int(0, 3);
    const int64_t lse_stride = heads + Int(0, 3);
    const int64_t shards = Int(1, 5);
    std::vector<std::vector<float>> outs;
    std::vector<std::vector<float>> lses;
    for (int64_t s = 0; s < shards; ++s) {
      outs.push_back(Normal(rows * out_stride));
      lses.push_back(Normal(rows * lse_stride, OneOf({1.0f, 50.0f, 1000.0f})));
      const bool all_empty = Int(0, 3) == 0;
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t h = 0; h < heads; ++h) {
          if (!all_empty && Int(0, 3) != 0) continue;
          lses.back()[static_cast<size_t>(row * lse_stride + h)] = -kInf;
          outs.back()[static_cast<size_t>(row * out_stride + h * dim)] = std::nanf("");  // must not count
        }
      }
    }
    std::vector<const float*> out_pointers;
    std::vector<const float*> lse_pointers;
    for (int64_t s = 0; s < shards; ++s) {
      out_pointers.push_back(outs[static_cast<size_t>(s)].data());
      lse_pointers.push_back(lses[static_cast<size_t>(s)].data());
    }
    const int64_t merged_stride = heads * dim + 1;
    std::vector<float> merged(static_cast<size_t>(rows * merged_stride), 55.0f);
    std::vector<float> merged_lse(static_cast<size_t>(rows * heads), 55.0f);
    const bool with_lse = Coin();
    table().merge({.out = out_pointers,
                   .lse = lse_pointers,
                   .rows = rows,
                   .heads = heads,
                   .dim = dim,
                   .out_row_stride = out_stride,
                   .lse_row_stride = lse_stride,
                   .merged = merged.data(),
                   .merged_row_stride = merged_stride,
                   .merged_lse = with_lse ? merged_lse.data() : nullptr},
                  pool());
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t h = 0; h < heads; ++h) {
        double largest = -kInf;
        for (const auto& lse : lses) {
          largest = std::max<double>(largest, lse[static_cast<size_t>(row * lse_stride + h)]);
        }
        double total = 0;
        std::vector<double> want(static_cast<size_t>(dim), 0.0);
        for (size_t s = 0; s < outs.size(); ++s) {
          const double lse = lses[s][static_cast<size_t>(row * lse_stride + h)];
          if (lse == -kInf) continue;
          total += std::exp(lse - largest);
          for (int64_t d = 0; d < dim; ++d) {
            want[static_cast<size_t>(d)] +=
                std::exp(lse - largest) * outs[s][static_cast<size_t>(row * out_stride + h * dim + d)];
          }
        }
        for (int64_t d = 0; d < dim; ++d) {
          const double wanted = total > 0 ? want[static_cast<size_t>(d)] / total : 0;
          // Convex combination of normal values, at most about 6 each.
          ASSERT_NEAR(merged[static_cast<size_t>(row * merged_stride + h * dim + d)], wanted, 6 * 6 * kEps);
        }
        const float lse = merged_lse[static_cast<size_t>(row * heads + h)];
        if (!with_lse) {
          ASSERT_EQ(lse, 55.0f);
        } else if (total == 0) {
          ASSERT_EQ(lse, -kInf);
        } else {
          const double wanted = largest + std::log(total);
          ASSERT_NEAR(lse, wanted, kEps * (1 + std::abs(wanted)));
        }
      }
      ASSERT_EQ(merged[static_cast<size_t>((row + 1) * merged_stride - 1)], 55.0f);
    }
  }
}

class KvWriteTest : public KernelTest {};
WEFT_FOR_ALL_BACKENDS(KvWriteTest);

// Rows of other shards, and rows that pad a batch, have slot -1: nothing of them is stored.
TEST_P(KvWriteTest, StoresOwnedRowsAndNothingElse) {
  for (int i = 0; i < 20; ++i) {
    const DType dtype = OneOf({DType::kBF16, DType::kF32});
    const int64_t rows = Int(1, 50);
    const int kv_heads = static_cast<int>(Int(1, 4));
    const int k_dim = static_cast<int>(Int(1, 140));
    const int v_dim = static_cast<int>(Int(1, 140));
    const bool with_v = Coin();
    const int32_t block_tokens = static_cast<int32_t>(Int(1, 20));
    const int64_t blocks = rows / block_tokens + 3;
    const int64_t slots_in_all = blocks * block_tokens;
    std::vector<int64_t> slots(static_cast<size_t>(slots_in_all));
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), rng);
    slots.resize(static_cast<size_t>(rows));
    for (int64_t& slot : slots) {
      if (Int(0, 3) == 0) slot = -1;
    }
    const int64_t k_stride = int64_t{kv_heads} * k_dim + 1;
    const int64_t v_stride = int64_t{kv_heads} * v_dim + 2;
    std::vector<float> k = Normal(rows * k_stride);
    const std::vector<float> v = Normal(rows * v_stride);
    k[0] = std::nanf("");
    k[static_cast<size_t>(k_stride - 2)] = -kInf;
    Buffer k_cache(static_cast<size_t>(slots_in_all * kv_heads * k_dim) * SizeOf(dtype));
    Buffer v_cache(static_cast<size_t>(slots_in_all * kv_heads * v_dim) * SizeOf(dtype));
    table().kv_write({.k = k.data(),
                      .k_stride = k_stride,
                      .v = with_v ? v.data() : nullptr,
                      .v_stride = v_stride,
                      .slots = slots.data(),
                      .rows = rows,
                      .kv_heads = kv_heads,
                      .k_dim = k_dim,
                      .v_dim = v_dim,
                      .block_tokens = block_tokens,
                      .k_cache = k_cache.data(),
                      .v_cache = with_v ? v_cache.data() : nullptr,
                      .dtype = dtype},
                     pool());
    std::vector<int64_t> row_of(static_cast<size_t>(slots_in_all), -1);
    for (int64_t row = 0; row < rows; ++row) {
      if (slots[static_cast<size_t>(row)] >= 0) row_of[static_cast<size_t>(slots[static_cast<size_t>(row)])] = row;
    }
    auto check = [&](const Buffer& cache, const std::vector<float>& source, int64_t stride, int dim, bool written) {
      for (int64_t slot = 0; slot < slots_in_all; ++slot) {
        const int64_t row = row_of[static_cast<size_t>(slot)];
        for (int h = 0; h < kv_heads; ++h) {
          for (int d = 0; d < dim; ++d) {
            const int64_t at = ((slot / block_tokens * kv_heads + h) * block_tokens + slot % block_tokens) * dim + d;
            const float value =
                row < 0 || !written ? 0.0f : source[static_cast<size_t>(row * stride + int64_t{h} * dim + d)];
            if (dtype == DType::kBF16) {
              ASSERT_EQ(cache.as<bf16>()[at].bits, ToBf16(value).bits) << "slot " << slot;
            } else {
              ASSERT_EQ(std::bit_cast<uint32_t>(cache.as<float>()[at]), std::bit_cast<uint32_t>(value)) << slot;
            }
          }
        }
      }
    };
    check(k_cache, k, k_stride, k_dim, true);
    check(v_cache, v, v_stride, v_dim, with_v);
  }
}

}  // namespace
}  // namespace weft
