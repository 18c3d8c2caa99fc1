// Every kernel but attention, on every backend, against sums in double written here.

#include <memory>
#include <numeric>

#include "weft/core/error.h"
#include "weft/kernels/kernels_testing.h"

namespace weft {
namespace {

constexpr float kUntouched = 1234.5f;

class LinearTest : public KernelTest {
 protected:
  // Random weights as the table is to see them: rounded where they are kept in bf16.
  struct Weights {
    std::vector<float> values;  // [n, k]
    PackedWeights packed;
  };

  Weights MakeWeights(int64_t n, int64_t k, DType dtype, DType src_dtype) {
    Weights w;
    w.values = Normal(n * k, 0.3f);
    const int64_t stride = k + Int(0, 3);
    std::vector<float> source(static_cast<size_t>(n * stride), std::nanf(""));
    std::vector<bf16> source16(source.size(), ToBf16(std::nanf("")));
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t p = 0; p < k; ++p) {
        float& value = w.values[static_cast<size_t>(j * k + p)];
        source[static_cast<size_t>(j * stride + p)] = value;
        source16[static_cast<size_t>(j * stride + p)] = ToBf16(value);
        if (dtype == DType::kBF16 || src_dtype == DType::kBF16) value = ToFloat(ToBf16(value));
      }
    }
    w.packed.dtype = dtype;
    w.packed.n = n;
    w.packed.k = k;
    // In one piece or in several, as a loader would bring them.
    const int64_t step = Coin() ? n : PackedWeights::kPanel * Int(1, 3);
    for (int64_t row = 0; row < n; row += step) {
      const void* from = src_dtype == DType::kF32 ? static_cast<const void*>(source.data() + row * stride)
                                                  : static_cast<const void*>(source16.data() + row * stride);
      table().pack_weights(from, src_dtype, stride, row, std::min(step, n - row), w.packed);
    }
    return w;
  }

  // One product: its operands, and what lies in y before.
  struct Product {
    std::string what;
    std::shared_ptr<const Weights> w;
    std::shared_ptr<const std::vector<float>> x;
    std::vector<float> bias;
    std::vector<float> before;
    std::vector<float> y;
    LinearArgs args;
  };

  // `x` of an earlier product with the same k, and its stride, or null: a fresh one.
  Product MakeProduct(int64_t m, std::shared_ptr<const Weights> w, const Product* share_x = nullptr) {
    const int64_t n = w->packed.n;
    const int64_t k = w->packed.k;
    Product p;
    p.w = std::move(w);
    const int64_t x_stride = share_x != nullptr ? share_x->args.x_stride : k + Int(0, 5);
    if (share_x != nullptr) {
      p.x = share_x->x;
    } else {
      auto x = std::make_shared<std::vector<float>>(static_cast<size_t>(m * x_stride), std::nanf(""));
      for (int64_t i = 0; i < m; ++i) {
        const std::vector<float> row = Normal(k);
        std::copy(row.begin(), row.end(), x->begin() + i * x_stride);
      }
      p.x = x;
    }
    const int64_t y_stride = n + Int(0, 5);
    p.bias = Normal(n);
    p.before = Normal(m * y_stride);
    p.y = p.before;
    p.args = {.x = p.x->data(),
              .x_stride = x_stride,
              .m = m,
              .w = &p.w->packed,
              .bias = Coin() ? p.bias.data() : nullptr,
              .y = p.y.data(),
              .y_stride = y_stride,
              .accumulate = Coin()};
    p.what = fmt::format("m {} n {} k {} {} bias {} accumulate {}", m, n, k, NameOf(p.w->packed.dtype),
                         p.args.bias != nullptr, p.args.accumulate);
    return p;
  }

  void CheckProduct(const Product& p) {
    SCOPED_TRACE(p.what);
    const int64_t n = p.w->packed.n;
    const int64_t k = p.w->packed.k;
    for (int64_t i = 0; i < p.args.m; ++i) {
      const float* x = &(*p.x)[static_cast<size_t>(i * p.args.x_stride)];
      const double x_norm = Norm(x, k);
      for (int64_t j = 0; j < p.args.y_stride; ++j) {
        const size_t at = static_cast<size_t>(i * p.args.y_stride + j);
        if (j >= n) {
          ASSERT_EQ(p.y[at], p.before[at]) << "wrote behind row " << i;
          continue;
        }
        const float* weights = &p.w->values[static_cast<size_t>(j * k)];
        double want = 0;
        for (int64_t e = 0; e < k; ++e) want += static_cast<double>(x[e]) * weights[e];
        double size = std::sqrt(static_cast<double>(k)) * x_norm * Norm(weights, k);
        if (p.args.bias != nullptr) {
          want += p.bias[static_cast<size_t>(j)];
          size += std::abs(p.bias[static_cast<size_t>(j)]);
        }
        if (p.args.accumulate) {
          want += p.before[at];
          size += std::abs(p.before[at]);
        }
        ASSERT_NEAR(p.y[at], want, kEps * (size + std::abs(want))) << "row " << i << " column " << j;
      }
    }
  }

  std::shared_ptr<const Weights> RandomWeights(int64_t n, int64_t k) {
    return std::make_shared<const Weights>(
        MakeWeights(n, k, OneOf({DType::kBF16, DType::kF32}), OneOf({DType::kBF16, DType::kF32})));
  }

  void Check(int64_t m, int64_t n, int64_t k) {
    const Product p = MakeProduct(m, RandomWeights(n, k));
    table().linear(p.args, pool());
    CheckProduct(p);
  }

  void CheckMany(const std::vector<Product>& products) {
    std::vector<LinearArgs> args;
    for (const Product& p : products) args.push_back(p.args);
    table().linear_many(args, pool());
    for (const Product& p : products) {
      CheckProduct(p);
      if (HasFatalFailure()) return;
    }
  }
};
WEFT_FOR_ALL_BACKENDS(LinearTest);

TEST_P(LinearTest, SmallShapes) {
  for (int i = 0; i < 60; ++i) Check(Int(1, 20), Int(1, 70), Int(1, 90));
  Check(1, 5, 37);
}

TEST_P(LinearTest, EveryFewRows) {
  for (int64_t m = 1; m <= 26; ++m) Check(m, Int(1, 80), Int(1, 300));
}

TEST_P(LinearTest, MoreThanOneCacheBlock) {
  Check(Int(100, 150), Int(30, 100), Int(500, 900));
  Check(Int(500, 700), Int(20, 50), Int(200, 300));
  Check(Int(4, 9), Int(300, 600), Int(500, 800));
  Check(Int(40, 60), Int(300, 400), 256);
}

TEST_P(LinearTest, ScratchOfAnEarlierCallDoesNotMatter) {
  // Leaves NaN wherever a kernel keeps packed rows; an odd k must not multiply one with its padding.
  for (const int64_t m : {2, 9, 40, 300}) {
    const Weights w = MakeWeights(40, 300, DType::kF32, DType::kF32);
    const std::vector<float> x(static_cast<size_t>(m * 300), std::nanf(""));
    std::vector<float> y(static_cast<size_t>(m * 40));
    for (ThreadPool* p : {&pool1, &pool3}) {
      table().linear({.x = x.data(), .x_stride = 300, .m = m, .w = &w.packed, .y = y.data(), .y_stride = 40}, *p);
    }
    Check(m, 40, 37);
    Check(m, 40, 299);
  }
}

TEST_P(LinearTest, NoRows) {
  const Weights w = MakeWeights(20, 8, DType::kBF16, DType::kF32);
  float y = kUntouched;
  table().linear({.x = &y, .x_stride = 8, .m = 0, .w = &w.packed, .y = &y, .y_stride = 20}, pool());
  EXPECT_EQ(y, kUntouched);
}

TEST_P(LinearTest, ManyOfAnyShape) {
  for (int i = 0; i < 15; ++i) {
    std::vector<Product> products;
    for (int64_t count = Int(0, 12); count > 0; --count) {
      const int64_t m = OneOf<int64_t>({0, 0, 1, 2, 3, Int(4, 30), Int(4, 30), Int(30, 80)});
      products.push_back(MakeProduct(m, RandomWeights(Int(1, 70), Int(1, 90))));
    }
    CheckMany(products);
    if (HasFatalFailure()) return;
  }
}

TEST_P(LinearTest, ManyOneLargeAmongSmall) {  // an expert that most rows go to
  const int64_t k = Int(300, 600);
  std::vector<Product> products;
  for (const int64_t m : {int64_t{1}, Int(300, 400), int64_t{0}, int64_t{2}, int64_t{1}, Int(3, 12), Int(13, 60)}) {
    products.push_back(MakeProduct(m, RandomWeights(Int(40, 90), k)));
  }
  std::shuffle(products.begin(), products.end(), rng);
  CheckMany(products);
}

TEST_P(LinearTest, ManyOfTheSameX) {  // the heads of MLA
  for (const int64_t m : {int64_t{1}, int64_t{2}, Int(3, 20), Int(100, 200)}) {
    const int64_t k = Int(20, 200);
    std::vector<Product> products;
    for (int64_t head = 0; head < 7; ++head) {
      products.push_back(MakeProduct(m, RandomWeights(Int(1, 50), k), head == 0 ? nullptr : products.data()));
    }
    CheckMany(products);
    if (HasFatalFailure()) return;
  }
}

// A piece of a thread may end in the middle of a register tile of columns: what lies behind it is another thread's.
TEST_P(LinearTest, ManyOfTheSameXCutBetweenOddPanels) {
  const int64_t m = Int(7, 20);
  const int64_t k = Int(100, 200);
  std::vector<Product> products;
  for (int64_t head = 0; head < 24; ++head) {
    const int64_t n = PackedWeights::kPanel * (head % 2 == 0 ? 1 : 2);
    products.push_back(MakeProduct(m, RandomWeights(n, k), head == 0 ? nullptr : products.data()));
    products.back().args.accumulate = true;  // a column that is written twice stays wrong
  }
  std::vector<LinearArgs> args;
  for (const Product& p : products) args.push_back(p.args);
  table().linear_many(args, pool3);
  for (const Product& p : products) {
    CheckProduct(p);
    if (HasFatalFailure()) return;
  }
}

// As the heads of MLA lie: those of a row side by side, in x and in y.
TEST_P(LinearTest, ManyInterleaved) {
  const int64_t m = OneOf<int64_t>({1, 2, Int(3, 20), 140});
  const int64_t heads = Int(1, 6);
  const int64_t n = Int(1, 40);
  const int64_t k = Int(1, 40);
  const std::vector<float> x = Normal(m * heads * k);
  std::vector<float> y(static_cast<size_t>(m * heads * n), std::nanf(""));
  std::vector<Product> products;
  std::vector<LinearArgs> args;
  for (int64_t h = 0; h < heads; ++h) {
    products.push_back(MakeProduct(m, RandomWeights(n, k)));
    Product& p = products.back();
    p.x = std::make_shared<std::vector<float>>(x.begin() + h * k, x.end());
    p.args = {.x = x.data() + h * k,
              .x_stride = heads * k,
              .m = m,
              .w = p.args.w,
              .y = y.data() + h * n,
              .y_stride = heads * n};
    args.push_back(p.args);
  }
  table().linear_many(args, pool());
  for (int64_t h = 0; h < heads; ++h) {
    Product& p = products[static_cast<size_t>(h)];
    p.y.clear();
    for (int64_t i = 0; i < m; ++i) {
      const auto from = y.begin() + (i * heads + h) * n;
      p.y.insert(p.y.end(), from, from + n);
    }
    p.args.y_stride = n;
    CheckProduct(p);
  }
}

TEST_P(LinearTest, UnpackRowGivesTheWeightsBack) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    const int64_t n = Int(1, 60);
    const int64_t k = Int(1, 600);
    const Weights w = MakeWeights(n, k, dtype, OneOf({DType::kBF16, DType::kF32}));
    for (int64_t j = 0; j < n; ++j) {
      std::vector<float> row(static_cast<size_t>(k) + 1, kUntouched);
      table().unpack_row(w.packed, j, row.data());
      EXPECT_TRUE(std::equal(row.begin(), row.end() - 1, w.values.begin() + j * k)) << "row " << j;
      EXPECT_EQ(row.back(), kUntouched);
    }
  }
}

class ElementwiseTest : public KernelTest {};
WEFT_FOR_ALL_BACKENDS(ElementwiseTest);

TEST_P(ElementwiseTest, RmsNorm) {
  for (int i = 0; i < 30; ++i) {
    const int64_t rows = Int(1, 40);
    const int64_t cols = i == 0 ? 3000 : Int(1, 300);
    const int64_t stride = cols + Int(0, 3);
    const float scale = OneOf({1e-5f, 1.0f, 1e5f});
    const float eps = OneOf({1e-6f, 1e-5f});
    const std::vector<float> x = Normal(rows * stride, scale);
    const std::vector<float> weight = Normal(cols);
    std::vector<float> y(x.size(), kUntouched);
    const bool in_place = Coin();
    if (in_place) y = x;
    table().rms_norm(in_place ? y.data() : x.data(), stride, weight.data(), eps, y.data(), stride, rows, cols, pool());
    for (int64_t r = 0; r < rows; ++r) {
      const double norm = Norm(&x[static_cast<size_t>(r * stride)], cols);
      const double inverse = 1 / std::sqrt(norm * norm / static_cast<double>(cols) + eps);
      for (int64_t c = 0; c < stride; ++c) {
        const size_t at = static_cast<size_t>(r * stride + c);
        if (c >= cols) {
          ASSERT_EQ(y[at], in_place ? x[at] : kUntouched);
          continue;
        }
        const double want = x[at] * inverse * weight[static_cast<size_t>(c)];
        // Three roundings, and half of the relative error of the sum of squares.
        ASSERT_NEAR(y[at], want, kEps * (4 + std::log2(static_cast<double>(cols))) * std::abs(want)) << r << " " << c;
      }
    }
  }
}

TEST_P(ElementwiseTest, Add) {
  const int64_t rows = Int(1, 60);
  const int64_t cols = Int(1, 700);
  const int64_t stride = cols + 2;
  const std::vector<float> before = Normal(rows * stride);
  const std::vector<float> delta = Normal(rows * cols);
  std::vector<float> x = before;
  table().add(x.data(), stride, delta.data(), cols, rows, cols, pool());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < stride; ++c) {
      const size_t at = static_cast<size_t>(r * stride + c);
      ASSERT_EQ(x[at], c < cols ? before[at] + delta[static_cast<size_t>(r * cols + c)] : before[at]);
    }
  }
}

TEST_P(ElementwiseTest, Swiglu) {
  const int64_t rows = Int(1, 30);
  const int64_t cols = Int(1, 700);
  std::vector<float> gate_up = Normal(rows * 2 * cols, OneOf({1.0f, 10.0f, 100.0f}));
  gate_up[0] = 0.0f;
  std::vector<float> out(static_cast<size_t>(rows * cols), kUntouched);
  table().swiglu(gate_up.data(), 2 * cols, gate_up.data() + cols, 2 * cols, out.data(), cols, rows, cols, pool());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      const double g = gate_up[static_cast<size_t>(r * 2 * cols + c)];
      const double up = gate_up[static_cast<size_t>(r * 2 * cols + cols + c)];
      const double want = g / (1 + std::exp(-g)) * up;
      // Below -87 silu may be flushed to 0: less than 1e-36.
      ASSERT_NEAR(out[static_cast<size_t>(r * cols + c)], want, 6 * kEps * std::abs(want) + 1e-34 * std::abs(up)) << g;
    }
  }
}

TEST_P(ElementwiseTest, Rope) {
  for (int i = 0; i < 20; ++i) {
    const int64_t rows = Int(1, 30);
    const int64_t heads = Int(1, 5);
    const int64_t head_dim = 2 * Int(1, 70);
    const int64_t rotary = Coin() ? head_dim : 2 * Int(1, head_dim / 2);
    const int64_t head_stride = head_dim + Int(0, 3);
    const int64_t row_stride = heads * head_stride + Int(0, 3);
    const bool interleaved = Coin();
    SCOPED_TRACE(
        fmt::format("rows {} heads {} dim {} rotary {} interleaved {}", rows, heads, head_dim, rotary, interleaved));
    const std::vector<float> cos_sin = Normal(50 * rotary);
    std::vector<int32_t> positions(static_cast<size_t>(rows));
    for (int32_t& position : positions) position = static_cast<int32_t>(Int(0, 49));
    const std::vector<float> before = Normal(rows * row_stride);
    std::vector<float> x = before;
    table().rope({.x = x.data(),
                  .row_stride = row_stride,
                  .head_stride = head_stride,
                  .rows = rows,
                  .heads = heads,
                  .rotary_dim = rotary,
                  .positions = positions.data(),
                  .cos_sin = cos_sin.data(),
                  .interleaved = interleaved},
                 pool());
    std::vector<double> want(before.begin(), before.end());
    for (int64_t r = 0; r < rows; ++r) {
      const float* cosines = &cos_sin[static_cast<size_t>(positions[static_cast<size_t>(r)] * rotary)];
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t d = 0; d < rotary / 2; ++d) {
          const int64_t head = r * row_stride + h * head_stride;
          const size_t first = static_cast<size_t>(head + (interleaved ? 2 * d : d));
          const size_t second = static_cast<size_t>(head + (interleaved ? 2 * d + 1 : d + rotary / 2));
          const double c = cosines[d];
          const double s = cosines[rotary / 2 + d];
          want[first] = before[first] * c - before[second] * s;
          want[second] = before[second] * c + before[first] * s;
        }
      }
    }
    for (size_t at = 0; at < x.size(); ++at) ASSERT_NEAR(x[at], want[at], 4 * kEps * 20) << at;
  }
}

TEST_P(ElementwiseTest, SumPartsInOrderAndInPlace) {
  const int64_t count = Int(1, 40000);
  std::vector<std::vector<float>> parts;
  std::vector<const float*> pointers;
  for (int64_t i = Int(1, 5); i > 0; --i) parts.push_back(Normal(count));
  for (const auto& part : parts) pointers.push_back(part.data());
  std::vector<float> want(static_cast<size_t>(count), 0.0f);
  for (const auto& part : parts) {
    for (size_t i = 0; i < want.size(); ++i) want[i] += part[i];
  }
  std::vector<float> out(want.size());
  table().sum_parts(pointers, count, out.data(), pool());
  EXPECT_EQ(out, want);  // bit for bit: every rank must get the same sum
  table().sum_parts(pointers, count, parts[0].data(), pool());
  EXPECT_EQ(parts[0], want);
}

class SamplingTest : public KernelTest {};
WEFT_FOR_ALL_BACKENDS(SamplingTest);

TEST_P(SamplingTest, ArgmaxTakesTheLowestIndex) {
  for (int i = 0; i < 50; ++i) {
    std::vector<float> x = Normal(Int(1, 5000));
    if (Coin()) std::fill(x.begin(), x.end(), -kInf);
    const int64_t size = static_cast<int64_t>(x.size());
    const int64_t first = Int(0, size - 1);
    x[static_cast<size_t>(first)] = 10.0f;
    x[static_cast<size_t>(Int(first, size - 1))] = 10.0f;
    EXPECT_EQ(table().argmax(x.data(), size), first);
  }
  const std::vector<float> none(20, -kInf);
  EXPECT_EQ(table().argmax(none.data(), 20), 0);
}

TEST_P(SamplingTest, LogSumExpAndSoftmax) {
  for (int i = 0; i < 40; ++i) {
    const int64_t n = i == 0 ? 150001 : Int(1, 3000);
    std::vector<float> x = Normal(n, OneOf({0.1f, 3.0f, 30.0f}));
    const float shift = OneOf({0.0f, -20000.0f, 20000.0f});
    for (float& value : x) value += shift;
    for (int64_t k = Int(0, 3); k > 0; --k) x[static_cast<size_t>(Int(0, n - 1))] = -kInf;
    x[static_cast<size_t>(Int(0, n - 1))] = shift;  // at least one is left
    const double largest = *std::max_element(x.begin(), x.end());
    double sum = 0;
    for (const float value : x) sum += std::exp(value - largest);
    const double want = largest + std::log(sum);
    // Sums in float are at most 64 long: 64 roundings of at most eps / 2 each, and some for the exponentials.
    const double sum_error = 32 + 8;
    EXPECT_NEAR(table().log_sum_exp(x.data(), n), want, kEps * (std::abs(want) + sum_error));
    std::vector<float> p = x;
    table().softmax(p.data(), n);
    double total = 0;
    for (int64_t j = 0; j < n; ++j) {
      const size_t at = static_cast<size_t>(j);
      if (x[at] == -kInf) {
        ASSERT_EQ(p[at], 0.0f);
        continue;
      }
      const double wanted = std::exp(x[at] - largest) / sum;
      // The difference to the maximum is rounded, and an exponential grows by as much as its argument.
      ASSERT_NEAR(p[at], wanted, (sum_error + std::abs(x[at] - largest)) * kEps * wanted + 1e-37)
          << x[at] << " of " << n;
      total += p[at];
    }
    EXPECT_NEAR(total, 1.0, sum_error * kEps);
  }
}

TEST_P(SamplingTest, NothingLeft) {
  std::vector<float> x(33, -kInf);
  EXPECT_EQ(table().log_sum_exp(x.data(), 33), -kInf);
  table().softmax(x.data(), 33);
  EXPECT_EQ(x, std::vector<float>(33, 0.0f));
}

// A broken model must not look like a sure one: wherever it stands, a NaN is seen.
TEST_P(SamplingTest, LogSumExpOfNaNIsNotFinite) {
  for (const int64_t n : {1, 3, 16, 17, 64, 200, 5000}) {
    for (const int64_t at : {int64_t{0}, n / 2, n - 1}) {
      std::vector<float> x(static_cast<size_t>(n), 1.5f);
      x[static_cast<size_t>(at)] = std::nanf("");
      EXPECT_FALSE(std::isfinite(table().log_sum_exp(x.data(), n))) << n << " " << at;
    }
  }
}

TEST(KernelsByName, NamesAndError) {
  EXPECT_EQ(KernelsByName("ref").name, "ref");
  EXPECT_EQ(KernelsByName("cpu").name, "cpu");
  EXPECT_EQ(&KernelsByName("auto"), &CpuKernels());
  EXPECT_THROW(KernelsByName("gpu"), Error);
}

}  // namespace
}  // namespace weft
