// SPDX-License-Identifier: Apache-2.0
#include "kernels/matmul/matmul.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "base/cpu.h"
#include "base/float16.h"
#include "base/huge_memory.h"
#include "base/random.h"
#include "quant/formats.h"

namespace kilin {
namespace {

struct Case {
  Isa isa;
  Dtype dtype;
  Activations activations = Activations::kExact;
};

// Scales of a size that keeps values near 1; everything else random.
void set_scales(Dtype dtype, std::byte* block, Random& random) {
  const auto put = [&](size_t at, double value) {
    const Float16 h = to_float16(static_cast<float>(value * (0.5 + random.uniform())));
    std::memcpy(block + at, &h, 2);
  };
  if (dtype == Dtype::kQ8_0) put(0, 0.01);
  if (dtype == Dtype::kQ4_0) put(0, 0.2);
  if (dtype == Dtype::kQ4_K) {
    put(0, 0.004);
    put(2, 0.03);
  }
  if (dtype == Dtype::kQ6_K) put(208, 0.0005);
}

// Stored at an odd address, as in a mapped file, then packed.
class StoredMatrix {
 public:
  StoredMatrix(Dtype dtype, int64_t rows, int64_t cols, Random& random)
      : values_(static_cast<size_t>(rows * cols)), bytes_(dtype_bytes(dtype, rows * cols) + 1) {
    std::byte* const stored = bytes_.data() + 1;
    if (is_quantized(dtype)) {
      for (size_t i = 1; i < bytes_.size(); ++i) bytes_[i] = static_cast<std::byte>(random.below(256));
      const size_t size = dtype_traits(dtype).block_bytes;
      for (size_t at = 0; at < dtype_bytes(dtype, rows * cols); at += size)
        set_scales(dtype, stored + at, random);
    } else {
      for (float& v : values_) v = static_cast<float>(random.normal());
      quant::quantize(dtype == Dtype::kF16 ? Dtype::kBF16 : dtype, values_.data(), rows * cols, stored);
      if (dtype == Dtype::kF16) {
        for (size_t i = 0; i < values_.size(); ++i) {
          const Float16 h = to_float16(values_[i]);
          std::memcpy(stored + 2 * i, &h, 2);
        }
      }
    }
    quant::dequantize(dtype, stored, rows * cols, values_.data());
    const size_t size = packed_bytes(dtype, rows, cols);
    packed_.reset(static_cast<std::byte*>(::operator new (size, std::align_val_t{kPackAlignment})));
    const int64_t half = rows / 2 / kPanelRows * kPanelRows;
    pack_weights(dtype, stored, rows, cols, half, rows, packed_.get());
    pack_weights(dtype, stored, rows, cols, 0, half, packed_.get());
    matrix = {packed_.get(), dtype, rows, cols};
  }
  float at(int64_t r, int64_t c) const { return values_[static_cast<size_t>(r * matrix.cols + c)]; }
  WeightMatrix matrix;

 private:
  struct Free {
    void operator()(std::byte* p) const { ::operator delete (p, std::align_val_t{kPackAlignment}); }
  };
  std::vector<float> values_;
  std::vector<std::byte> bytes_;
  std::unique_ptr<std::byte, Free> packed_;
};

class Matmul : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override { set_isa(GetParam().isa); }
  void TearDown() override { set_isa(supported_isas().back()); }

  // Columns that the type can have, near `cols`.
  static int64_t fit(int64_t cols) {
    const int64_t block = dtype_block(GetParam().dtype);
    return (cols + block - 1) / block * block;
  }

  static void multiply(std::span<const MatmulJob> jobs, ThreadPool& pool) {
    matmul(jobs, pool, GetParam().activations);
  }

  // Of one product x w, relative to |x|_max |w| where |x|_max is over a block of 32: float weights as they
  // are or two bfloat16 terms of either factor (2^-16 each, and the term that is left out), quantised ones
  // 16-bit activations. Rounded activations: to 8 significant bits, or half a step of |x|_max / 127.
  double product_error(int64_t tokens) const {
    if (GetParam().activations == Activations::kRounded && (is_quantized(GetParam().dtype) || tokens >= 17))
      return GetParam().dtype == Dtype::kBF16 ? 0x1p-8 + 0x1p-23 : 0.5 / 127 + 0x1p-23;
    return GetParam().isa == Isa::kAmx      ? 3 * 0x1p-16
           : is_quantized(GetParam().dtype) ? 0.5 / 32512 + 0x1p-23
                                            : 0x1p-24;
  }

  void expect_product(int64_t tokens, int64_t rows, int64_t cols, int threads) {
    cols = fit(cols);
    Random random(static_cast<uint64_t>(tokens * 7919 + rows * 31 + cols));
    const StoredMatrix w(GetParam().dtype, rows, cols, random);
    const int64_t x_stride = cols + 3;
    const int64_t y_stride = rows + 5;
    std::vector<float> x(static_cast<size_t>(tokens * x_stride + 1));
    std::vector<float> y(static_cast<size_t>(tokens * y_stride + 1), 7.0f);
    for (float& v : x) v = static_cast<float>(random.normal());
    ThreadPool pool(threads);
    const MatmulJob job{tokens, x.data(), x_stride, w.matrix, y.data(), y_stride};
    multiply(std::span(&job, 1), pool);
    for (int64_t t = 0; t < tokens; ++t) {
      const float* row = x.data() + t * x_stride;
      for (int64_t r = 0; r < rows; ++r) {
        double sum = 0, bound = 0, magnitude = 0;
        for (int64_t c = 0; c < cols; ++c) {
          double most = std::abs(row[c]);
          for (int64_t i = c / 32 * 32; i < std::min(cols, c / 32 * 32 + 32); ++i)
            most = std::max<double>(most, std::abs(row[i]));
          sum += static_cast<double>(w.at(r, c)) * row[c];
          bound += product_error(tokens) * most * std::abs(w.at(r, c));
          magnitude += std::abs(w.at(r, c) * row[c]);
        }
        // Q4_K's two parts are summed apart and are larger than their difference.
        const double parts = GetParam().dtype == Dtype::kQ4_K ? 8 : 1;
        ASSERT_NEAR(y[static_cast<size_t>(t * y_stride + r)], sum,
                    parts * (bound + (static_cast<double>(cols) + 2) * 0x1p-24 * magnitude))
            << tokens << " tokens, " << rows << " x " << cols << ", token " << t << " row " << r;
      }
      for (int64_t r = rows; r < y_stride; ++r) ASSERT_EQ(y[static_cast<size_t>(t * y_stride + r)], 7.0f);
    }
  }
};

TEST_P(Matmul, AgreesWithSumsInDoubleOnOddSizes) {
  for (int64_t tokens : {0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 65}) expect_product(tokens, 37, 51, 2);
  for (int64_t rows : {1, 2, 15, 16, 17, 31, 32, 33, 63, 65, 129}) {
    expect_product(1, rows, 67, 3);
    expect_product(7, rows, 67, 3);
    expect_product(40, rows, 67, 3);
  }
  for (int64_t cols : {1, 2, 3, 15, 16, 31, 33, 64, 65, 255, 513, 520, 1025, 1300}) {
    expect_product(1, 35, cols, 2);
    expect_product(4, 35, cols, 2);
    expect_product(40, 35, cols, 2);
  }
  expect_product(300, 70, 300, 2);
}

TEST_P(Matmul, BitsDoNotDependOnThreads) {
  Random random(5);
  const int64_t rows = 203, cols = fit(190);
  const StoredMatrix w(GetParam().dtype, rows, cols, random);
  for (int64_t tokens : {1, 9, 70, 300}) {
    std::vector<float> x(static_cast<size_t>(tokens * cols));
    for (float& v : x) v = static_cast<float>(random.normal());
    std::vector<std::vector<float>> results;
    for (int threads : {1, 2, 5}) {
      ThreadPool pool(threads);
      std::vector<float> y(static_cast<size_t>(tokens * rows));
      const MatmulJob job{tokens, x.data(), cols, w.matrix, y.data(), rows};
      multiply(std::span(&job, 1), pool);
      results.push_back(y);
    }
    EXPECT_EQ(results[0], results[1]);
    EXPECT_EQ(results[0], results[2]);
  }
}

TEST_P(Matmul, ManyJobsAtOnceEqualJobsAlone) {
  Random random(6);
  ThreadPool pool(2);
  std::vector<std::unique_ptr<StoredMatrix>> weights;
  std::vector<std::vector<float>> x, together, alone;
  std::vector<MatmulJob> jobs;
  const std::vector<int64_t> tokens{0, 1, 40, 3, 17, 100};
  for (size_t i = 0; i < tokens.size(); ++i) {
    const int64_t rows = 20 + 13 * static_cast<int64_t>(i);
    weights.push_back(std::make_unique<StoredMatrix>(GetParam().dtype, rows, fit(96), random));
    if (i != 4) x.emplace_back(static_cast<size_t>(100 * fit(96)));  // job 4 takes the x of job 3
    for (float& v : x.back()) v = static_cast<float>(random.normal());
    together.emplace_back(static_cast<size_t>(tokens[i] * rows));
    alone.emplace_back(together.back().size());
  }
  for (size_t i = 0; i < tokens.size(); ++i) {
    const size_t in = i < 4 ? i : i - 1;
    jobs.push_back(
        {tokens[i], x[in].data(), fit(96), weights[i]->matrix, together[i].data(), weights[i]->matrix.rows});
  }
  multiply(jobs, pool);
  for (size_t i = 0; i < tokens.size(); ++i) {
    MatmulJob job = jobs[i];
    job.y = alone[i].data();
    multiply(std::span(&job, 1), pool);
    EXPECT_EQ(together[i], alone[i]) << i;
  }
}

TEST_P(Matmul, ChosenRowsOfXEqualTheirCopies) {
  Random random(10);
  ThreadPool pool(2);
  const int64_t rows = 37, cols = fit(96), x_stride = cols + 5;
  const StoredMatrix w(GetParam().dtype, rows, cols, random);
  std::vector<float> x(static_cast<size_t>(50 * x_stride));
  for (float& v : x) v = static_cast<float>(random.normal());
  for (int64_t tokens : {1, 3, 17, 40, 70, 300}) {
    std::vector<int32_t> chosen(static_cast<size_t>(tokens));
    std::vector<float> copies, y(static_cast<size_t>(tokens * rows)), expected(y.size());
    for (int32_t& row : chosen) {
      row = static_cast<int32_t>(random.below(50));
      copies.insert(copies.end(), x.begin() + row * x_stride, x.begin() + row * x_stride + cols);
    }
    // the same x with other rows in front: their preparations must not be taken for one another
    std::vector<int32_t> first(chosen.size(), 0);
    std::vector<float> other(y.size());
    const MatmulJob jobs[] = {{tokens, x.data(), x_stride, w.matrix, other.data(), rows, first.data()},
                              {tokens, x.data(), x_stride, w.matrix, y.data(), rows, chosen.data()}};
    multiply(jobs, pool);
    const MatmulJob job{tokens, copies.data(), cols, w.matrix, expected.data(), rows};
    multiply(std::span(&job, 1), pool);
    EXPECT_EQ(y, expected) << tokens;
    // and with all rows of x prepared once
    std::vector<float> again(y.size());
    const MatmulJob counted[] = {
        {tokens, x.data(), x_stride, w.matrix, other.data(), rows, first.data(), 50},
        {tokens, x.data(), x_stride, w.matrix, again.data(), rows, chosen.data(), 50}};
    multiply(counted, pool);
    EXPECT_EQ(again, expected) << tokens;
  }
}

// Quantised weights: always, and to the same sums however many tokens there are (Q6_K adds its sixteenths in
// another order). BF16 weights: from 17 tokens on.
TEST_P(Matmul, RoundedWhereAskedFor) {
  if (GetParam().activations == Activations::kExact) return;
  Random random(13);
  ThreadPool pool(2);
  const Dtype dtype = GetParam().dtype;
  const int64_t rows = 37, cols = fit(96), most = 40;
  const StoredMatrix w(dtype, rows, cols, random);
  std::vector<float> x(static_cast<size_t>(most * cols)), all(static_cast<size_t>(most * rows));
  for (float& v : x) v = static_cast<float>(random.normal());
  const MatmulJob all_job{most, x.data(), cols, w.matrix, all.data(), rows};
  multiply(std::span(&all_job, 1), pool);
  const bool fast = GetParam().isa == Isa::kAvx512 && (dtype != Dtype::kBF16 || fast_bf16_products());
  for (const int64_t tokens : {1, 2, 16, 17, 40}) {
    std::vector<float> y(static_cast<size_t>(tokens * rows)), exact(y.size());
    const MatmulJob job{tokens, x.data(), cols, w.matrix, y.data(), rows};
    const MatmulJob exact_job{tokens, x.data(), cols, w.matrix, exact.data(), rows};
    multiply(std::span(&job, 1), pool);
    matmul(std::span(&exact_job, 1), pool);
    EXPECT_EQ(y != exact, fast && (is_quantized(dtype) || tokens >= 17)) << tokens;
    if (fast && is_quantized(dtype) && dtype != Dtype::kQ6_K) {
      EXPECT_TRUE(std::equal(y.begin(), y.end(), all.begin())) << tokens;
    }
  }
}

// 4.2 MB of results, which AMX writes past the caches where their rows are aligned.
TEST_P(Matmul, LargeResultsAreTheSameAlignedOrNot) {
  Random random(11);
  ThreadPool pool(2);
  const int64_t rows = 1000, cols = fit(32), tokens = 1050, stride = 1008;
  const StoredMatrix w(GetParam().dtype, rows, cols, random);
  std::vector<float> x(static_cast<size_t>(tokens * cols));
  for (float& v : x) v = static_cast<float>(random.normal());
  HugeVector<float> aligned(static_cast<size_t>(tokens * stride), 7.0f);
  std::vector<float> odd(static_cast<size_t>(tokens * (rows + 1)));
  const MatmulJob to_aligned{tokens, x.data(), cols, w.matrix, aligned.data(), stride};
  const MatmulJob to_odd{tokens, x.data(), cols, w.matrix, odd.data(), rows + 1};
  multiply(std::span(&to_aligned, 1), pool);
  multiply(std::span(&to_odd, 1), pool);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = aligned.data() + t * stride;
    ASSERT_TRUE(std::equal(row, row + rows, odd.data() + t * (rows + 1))) << t;
    for (int64_t r = rows; r < stride; ++r) ASSERT_EQ(row[r], 7.0f);
  }
}

// 4.3 MB of prepared activations, which AMX writes past the caches, against halves that it keeps there.
TEST_P(Matmul, LargeInputsEqualTheirHalves) {
  Random random(12);
  ThreadPool pool(2);
  const int64_t rows = 32, cols = fit(1024), half = 528;
  const StoredMatrix w(GetParam().dtype, rows, cols, random);
  std::vector<float> x(static_cast<size_t>(2 * half * cols));
  for (float& v : x) v = static_cast<float>(random.normal());
  std::vector<float> y(static_cast<size_t>(2 * half * rows)), expected(y.size());
  const MatmulJob job{2 * half, x.data(), cols, w.matrix, y.data(), rows};
  multiply(std::span(&job, 1), pool);
  for (int64_t i = 0; i < 2; ++i) {
    const MatmulJob part{half,     x.data() + i * half * cols,        cols,
                         w.matrix, expected.data() + i * half * rows, rows};
    multiply(std::span(&part, 1), pool);
  }
  EXPECT_EQ(y, expected);
}

TEST_P(Matmul, RowsComeBackFromThePackedForm) {
  Random random(7);
  const StoredMatrix w(GetParam().dtype, 21, fit(77), random);
  std::vector<float> row(static_cast<size_t>(w.matrix.cols));
  for (int64_t r = 0; r < w.matrix.rows; ++r) {
    unpack_row(w.matrix, r, row.data());
    for (int64_t c = 0; c < w.matrix.cols; ++c)
      ASSERT_EQ(row[static_cast<size_t>(c)], w.at(r, c)) << r << " " << c;
  }
}

TEST_P(Matmul, ZeroAndTinyActivationsGiveFiniteSums) {
  Random random(8);
  const StoredMatrix w(GetParam().dtype, 33, fit(64), random);
  ThreadPool pool(1);
  for (float value : {0.0f, 1e-40f, 1e-30f, 1e30f}) {
    std::vector<float> x(static_cast<size_t>(w.matrix.cols), value), y(33);
    const MatmulJob job{1, x.data(), w.matrix.cols, w.matrix, y.data(), 33};
    multiply(std::span(&job, 1), pool);
    for (int64_t r = 0; r < 33; ++r) {
      double sum = 0, magnitude = 0;
      for (int64_t c = 0; c < w.matrix.cols; ++c) {
        sum += static_cast<double>(w.at(r, c)) * value;
        magnitude += std::abs(static_cast<double>(w.at(r, c)) * value);
      }
      EXPECT_NEAR(y[static_cast<size_t>(r)], sum, 1e-3 * magnitude + 1e-37);
    }
  }
}

// A damaged weight must show in the logits, through any number of products.
TEST_P(Matmul, NotFiniteActivationsGiveNotFiniteSums) {
  Random random(9);
  const StoredMatrix w(GetParam().dtype, 33, fit(96), random);
  ThreadPool pool(1);
  for (const float value :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::quiet_NaN(),
        std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
    for (const int64_t tokens : {1, 40}) {
      for (const int64_t place : {0, 37, 63}) {
        std::vector<float> x(static_cast<size_t>(tokens * w.matrix.cols), 0.5f),
            y(static_cast<size_t>(tokens * 33));
        x[static_cast<size_t>(place)] = value;  // of the first token
        const MatmulJob job{tokens, x.data(), w.matrix.cols, w.matrix, y.data(), 33};
        multiply(std::span(&job, 1), pool);
        for (size_t r = 0; r < y.size(); ++r) ASSERT_EQ(std::isfinite(y[r]), r >= 33) << value << " " << r;
      }
    }
  }
}

TEST_P(Matmul, SizesArePackedSizes) {
  const Dtype dtype = GetParam().dtype;
  // Whole panels take the bytes of the stored form, but for Q4_K's scales, unpacked to bytes (8 more per 256
  // columns), and the padding of Q6_K's to 64 bytes.
  const double ratio = static_cast<double>(packed_bytes(dtype, 1024, 1024)) /
                       static_cast<double>(dtype_bytes(dtype, 1024 * 1024));
  EXPECT_GE(ratio, 1.0);
  EXPECT_LE(ratio, dtype == Dtype::kQ4_K || dtype == Dtype::kQ6_K ? 1.03 : 1.0);
}

std::vector<Case> cases() {
  std::vector<Case> list;
  for (Isa isa : supported_isas()) {
    for (Dtype dtype :
         {Dtype::kF32, Dtype::kF16, Dtype::kBF16, Dtype::kQ8_0, Dtype::kQ4_0, Dtype::kQ4_K, Dtype::kQ6_K})
      list.push_back({isa, dtype});
    if (isa < Isa::kAvx512) continue;  // rounds nothing
    for (Dtype dtype : {Dtype::kBF16, Dtype::kQ8_0, Dtype::kQ4_0, Dtype::kQ4_K, Dtype::kQ6_K})
      list.push_back({isa, dtype, Activations::kRounded});
  }
  return list;
}

INSTANTIATE_TEST_SUITE_P(AllIsas, Matmul, ::testing::ValuesIn(cases()), [](const auto& test) {
  return std::string(isa_name(test.param.isa)) + "_" + std::string(dtype_name(test.param.dtype)) +
         (test.param.activations == Activations::kRounded ? "_rounded" : "");
});

}  // namespace
}  // namespace kilin
