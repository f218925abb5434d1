// SPDX-License-Identifier: Apache-2.0
#include "kernels/matmul/matmul.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "base/cpu.h"
#include "base/float16.h"
#include "base/random.h"

namespace kilin {
namespace {

struct Case {
  Isa isa;
  Dtype dtype;
};

// Weights at an odd address, as in a mapped file.
class StoredMatrix {
 public:
  StoredMatrix(Dtype dtype, int64_t rows, int64_t cols, Random& random)
      : values_(static_cast<size_t>(rows * cols)) {
    bytes_.resize(values_.size() * dtype_size(dtype) + 1);
    for (size_t i = 0; i < values_.size(); ++i) {
      float v = static_cast<float>(random.normal());
      char* at = bytes_.data() + 1 + i * dtype_size(dtype);
      if (dtype == Dtype::kF32) std::memcpy(at, &v, 4);
      if (dtype == Dtype::kBF16) {
        const BFloat16 b = to_bfloat16(v);
        v = to_float(b);
        std::memcpy(at, &b, 2);
      }
      if (dtype == Dtype::kF16) {
        const Float16 h = to_float16(v);
        v = to_float(h);
        std::memcpy(at, &h, 2);
      }
      values_[i] = v;
    }
    matrix = {bytes_.data() + 1, dtype, rows, cols};
  }
  double at(int64_t r, int64_t c) const { return values_[static_cast<size_t>(r * matrix.cols + c)]; }
  WeightMatrix matrix;

 private:
  std::vector<float> values_;
  std::vector<char> bytes_;
};

class Matmul : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override { set_isa(GetParam().isa); }
  void TearDown() override { set_isa(supported_isas().back()); }

  // |error| <= (depth + 2) eps sum |x w|: the bound of any order of summation in float32
  void expect_product(int64_t tokens, int64_t rows, int64_t cols, int threads) {
    Random random(static_cast<uint64_t>(tokens * 7919 + rows * 31 + cols));
    const StoredMatrix w(GetParam().dtype, rows, cols, random);
    const int64_t x_stride = cols + 3;
    const int64_t y_stride = rows + 5;
    std::vector<float> x(static_cast<size_t>(tokens * x_stride + 1)),
        y(static_cast<size_t>(tokens * y_stride + 1), 7.0f);
    for (float& v : x) v = static_cast<float>(random.normal());
    ThreadPool pool(threads);
    const MatmulJob job{tokens, x.data(), x_stride, w.matrix, y.data(), y_stride};
    matmul(std::span(&job, 1), pool);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t r = 0; r < rows; ++r) {
        double sum = 0, magnitude = 0;
        for (int64_t c = 0; c < cols; ++c) {
          const double product = w.at(r, c) * x[static_cast<size_t>(t * x_stride + c)];
          sum += product;
          magnitude += std::abs(product);
        }
        ASSERT_NEAR(y[static_cast<size_t>(t * y_stride + r)], sum,
                    (static_cast<double>(cols) + 2) * 0x1p-24 * magnitude)
            << "tokens " << tokens << " rows " << rows << " cols " << cols << " at " << t << ", " << r;
      }
      for (int64_t r = rows; r < y_stride; ++r)
        ASSERT_EQ(y[static_cast<size_t>(t * y_stride + r)], 7.0f) << "gap written";
    }
  }
};

TEST_P(Matmul, agrees_with_double_within_the_bound_of_its_length_on_odd_sizes) {
  for (int64_t tokens : {0, 1, 2, 3, 4, 5, 15, 16, 17, 25, 64}) {
    for (int64_t rows : {1, 3, 4, 31, 33, 70}) {
      for (int64_t cols : {1, 15, 16, 64, 77}) expect_product(tokens, rows, cols, 2);
    }
  }
}

TEST_P(Matmul, agrees_over_several_depth_blocks) {
  expect_product(1, 40, 1100, 2);
  expect_product(20, 40, 1100, 2);
}

TEST_P(Matmul, gives_the_same_bits_for_any_number_of_threads_and_jobs) {
  Random random(5);
  const StoredMatrix a(GetParam().dtype, 65, 130, random), b(GetParam().dtype, 9, 130, random);
  for (int64_t tokens : {1, 7, 40}) {
    std::vector<float> x(static_cast<size_t>(tokens * 130));
    for (float& v : x) v = static_cast<float>(random.normal());
    std::vector<std::vector<float>> results;
    for (int threads : {1, 2, 5}) {
      ThreadPool pool(threads);
      std::vector<float> y(static_cast<size_t>(tokens * (65 + 9)));
      const MatmulJob jobs[] = {{tokens, x.data(), 130, a.matrix, y.data(), 65},
                                {tokens, x.data(), 130, b.matrix, y.data() + tokens * 65, 9}};
      matmul(jobs, pool);
      results.push_back(y);
    }
    EXPECT_EQ(results[0], results[1]);
    EXPECT_EQ(results[0], results[2]);
  }
}

TEST_P(Matmul, widens_every_value_exactly) {
  Random random(3);
  const StoredMatrix w(GetParam().dtype, 2, 37, random);
  std::vector<float> row(37);
  widen_row(w.matrix, 1, row.data());
  for (int64_t c = 0; c < 37; ++c) EXPECT_EQ(row[static_cast<size_t>(c)], static_cast<float>(w.at(1, c)));
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (Isa isa : supported_isas()) {
    for (Dtype dtype : {Dtype::kF32, Dtype::kF16, Dtype::kBF16}) all.push_back({isa, dtype});
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(IsaDtype, Matmul, ::testing::ValuesIn(cases()), [](const auto& test) {
  return std::string(isa_name(test.param.isa)) + "_" + std::string(dtype_name(test.param.dtype));
});

TEST(Float16Weights, every_half_value_is_widened_exactly_by_vectors) {
  std::vector<uint16_t> bits;
  for (uint32_t b = 0; b < 65536; ++b) {
    if ((b & 0x7c00u) != 0x7c00u) bits.push_back(static_cast<uint16_t>(b));  // finite ones
  }
  const auto n = static_cast<int64_t>(bits.size());
  ThreadPool pool(1);
  for (Isa isa : supported_isas()) {
    set_isa(isa);
    // A product with one 1 picks a value through the vector path: 64 columns, one row per value.
    std::vector<uint16_t> matrix(bits.size() * 64, 0);
    for (size_t i = 0; i < bits.size(); ++i) matrix[i * 64 + i % 64] = bits[i];
    std::vector<float> ones(64, 1.0f), y(bits.size());
    const MatmulJob job{1, ones.data(), 64, {matrix.data(), Dtype::kF16, n, 64}, y.data(), n};
    matmul(std::span(&job, 1), pool);
    for (size_t i = 0; i < bits.size(); ++i)
      ASSERT_EQ(y[i], to_float(Float16{bits[i]})) << "bits " << bits[i];
  }
  set_isa(supported_isas().back());
}

}  // namespace
}  // namespace kilin
