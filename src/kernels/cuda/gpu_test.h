// SPDX-License-Identifier: Apache-2.0
// For GPU tests and benchmarks: arrays on the device, and a fixture that needs a GPU.
#pragma once
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <utility>
#include <vector>

#include "kernels/cuda/check.h"
#include "kernels/cuda/device.h"

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
