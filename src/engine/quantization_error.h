// SPDX-License-Identifier: Apache-2.0
// What quantising loses, measured while a file is written.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "quant/formats.h"

namespace kilin {

// Over the elements of a tensor, or of a part of it.
struct QuantizationSums {
  double error = 0;     // sum of (x' - x)^2
  double value = 0;     // sum of x^2
  double of_bound = 0;  // the largest |x' - x| / quant::error_bound() of its block

  // n elements x, which were packed to `data`; whole blocks. `scratch` grows to n.
  void add(Dtype dtype, const float* x, int64_t n, const void* data, std::vector<float>& scratch) {
    scratch.resize(static_cast<size_t>(n));
    quant::dequantize(dtype, data, n, scratch.data());
    const int64_t block = dtype_block(dtype);
    for (int64_t first = 0; first < n; first += block) {
      double largest = 0;
      for (int64_t i = first; i < first + block; ++i) {
        const double difference = static_cast<double>(scratch[static_cast<size_t>(i)]) - x[i];
        error += difference * difference;
        value += static_cast<double>(x[i]) * x[i];
        largest = std::max(largest, std::abs(difference));
      }
      if (largest > 0) of_bound = std::max(of_bound, largest / quant::error_bound(dtype, x + first));
    }
  }
  void add(const QuantizationSums& other) {
    error += other.error;
    value += other.value;
    of_bound = std::max(of_bound, other.of_bound);
  }
  double relative() const { return value > 0 ? std::sqrt(error / value) : 0; }
};

}  // namespace kilin
