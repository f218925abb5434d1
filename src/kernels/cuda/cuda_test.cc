// SPDX-License-Identifier: Apache-2.0
// The program of all GPU tests: its main(), and what holds without any kernel.
#include <gtest/gtest.h>

#include <cstdlib>

#include "kernels/cuda/check.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/gpu_test.h"

namespace kilin {
namespace {

TEST(CudaCheck, NamesCallAndError) {
  try {
    check_cuda(cudaErrorInvalidValue, "copy of {} bytes", 7);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "copy of 7 bytes: CUDA error cudaErrorInvalidValue: invalid argument");
  }
  check_cuda(cudaSuccess, "nothing");
}

class CudaDeviceTest : public GpuTest {};

TEST_F(CudaDeviceTest, SmallCopyThereAndBack) {
  const std::vector<float> values = {1.0f, -2.5f, 3.0f};
  const GpuArray<float> there(values);
  EXPECT_EQ(there.host(), values);
  EXPECT_GT(cuda_device().multiprocessors, 0);
  EXPECT_GE(cuda_device().shared_memory_limit, 227 * 1024);
}

}  // namespace
}  // namespace kilin

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
