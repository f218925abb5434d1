// SPDX-License-Identifier: Apache-2.0
// For GPU tests and benchmarks: arrays on the device, and a fixture that needs a GPU.
#pragma once
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "base/float16.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/types.h"

namespace kilin {

// An array on the device. Copies wait for everything that runs there.
template <class T>
class GpuArray {
 public:
  GpuArray() = default;
  explicit GpuArray(size_t size) : size_(size) {
    if (size > 0) check_cuda(cudaMalloc(&data_, bytes()), "cudaMalloc of {} bytes", bytes());
  }
  explicit GpuArray(const std::vector<T>& values) : GpuArray(values.size()) { assign(values); }
  GpuArray(GpuArray&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
  GpuArray& operator=(GpuArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~GpuArray() { static_cast<void>(cudaFree(data_)); }

  T* data() const { return data_; }
  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }
  void assign(const std::vector<T>& values) {
    check(values.size() == size_, "{} values for an array of {}", values.size(), size_);
    if (size_ > 0)
      check_cuda(cudaMemcpy(data_, values.data(), bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  std::vector<T> host() const {
    std::vector<T> values(size_);
    check_cuda(cudaDeviceSynchronize(), "kernel");
    if (size_ > 0)
      check_cuda(cudaMemcpy(values.data(), data_, bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

// Values as bytes of one of the GPU's types, each rounded to it, and back.
template <class T>
std::vector<uint8_t> encode(CudaType type, const std::vector<T>& values) {
  const auto size = static_cast<size_t>(cuda_size(type));
  std::vector<uint8_t> bytes(values.size() * size);
  for (size_t i = 0; i < values.size(); ++i) {
    const auto x = static_cast<float>(values[i]);
    const uint16_t bits = type == CudaType::kF16 ? to_float16(x).bits : to_bfloat16(x).bits;
    std::memcpy(&bytes[size * i], type == CudaType::kF32 ? static_cast<const void*>(&x) : &bits, size);
  }
  return bytes;
}

template <class T>
std::vector<T> decode(CudaType type, const std::vector<uint8_t>& bytes) {
  const auto size = static_cast<size_t>(cuda_size(type));
  std::vector<T> values(bytes.size() / size);
  for (size_t i = 0; i < values.size(); ++i) {
    float x = 0;
    uint16_t bits = 0;
    std::memcpy(type == CudaType::kF32 ? static_cast<void*>(&x) : &bits, &bytes[size * i], size);
    if (type == CudaType::kF16) x = to_float(Float16{bits});
    if (type == CudaType::kBf16) x = to_float(BFloat16{bits});
    values[i] = x;
  }
  return values;
}

// Host values in one of the GPU's types, with their rounded values in double and a copy on the device.
class TypedArray {
 public:
  TypedArray() = default;
  TypedArray(CudaType type, const std::vector<double>& values) : type_(type) {
    const std::vector<uint8_t> bytes = encode(type, values);
    values_ = decode<double>(type, bytes);
    device_ = GpuArray<uint8_t>(bytes);
  }
  const std::vector<double>& values() const { return values_; }
  double operator[](int64_t i) const { return values_[static_cast<size_t>(i)]; }
  CudaType type() const { return type_; }
  void* data() const { return device_.data(); }
  std::vector<uint8_t> bytes() const { return device_.host(); }
  void assign(const std::vector<uint8_t>& bytes) { device_.assign(bytes); }
  // What is on the device now.
  std::vector<double> now() const { return decode<double>(type_, bytes()); }

 private:
  CudaType type_ = CudaType::kF32;
  std::vector<double> values_;
  GpuArray<uint8_t> device_;
};

// |got - expected| / |expected| over all values; infinite when a value is not finite. `scale` joins
// |expected|, for gradients that may vanish.
inline double relative_error(const std::vector<double>& got, const std::vector<double>& expected,
                             double scale = 0) {
  double error = 0;
  double norm = scale * scale;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (!std::isfinite(got[i])) return std::numeric_limits<double>::infinity();
    error += (got[i] - expected[i]) * (got[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
}

// For failure messages: where the two differ most.
inline std::string worst(const std::vector<double>& got, const std::vector<double>& expected) {
  size_t at = 0;
  double most = -1;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error =
        std::isfinite(got[i]) ? std::abs(got[i] - expected[i]) : std::numeric_limits<double>::infinity();
    if (error > most) most = error, at = i;
  }
  if (expected.empty()) return "nothing";
  return fmt::format("at {} of {}: {} instead of {}", at, expected.size(), got[at], expected[at]);
}

// Skips where no Hopper GPU is there, unless KILIN_REQUIRE_GPU is set: then that is a failure.
class GpuTest : public testing::Test {
 protected:
  void SetUp() override {
    if (cuda_available()) return;
    if (std::getenv("KILIN_REQUIRE_GPU") != nullptr) FAIL() << "no GPU of compute capability 9.0";
    GTEST_SKIP() << "no GPU of compute capability 9.0";
  }
};

}  // namespace kilin
