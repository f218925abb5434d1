// SPDX-License-Identifier: Apache-2.0
// width / 8 lanes hold a row, 16 bytes each. A thread loads kBatch rows before it computes the first of them.
// The grid has a fixed size, so that the backward pass adds up d_weight in the same order on every GPU.
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/cuda/vector.cuh"
#include "kernels/norm/norm_cuda.h"

namespace kilin {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr int kBatch = 4;
constexpr int kBackwardBatch = 2;
constexpr int kBackwardBlocks = 528;  // 4 for each of an H100's 132 multiprocessors

__device__ __forceinline__ int64_t offset(int64_t row, int heads, int64_t stride, int width) {
  const unsigned token = static_cast<unsigned>(row) / static_cast<unsigned>(heads);  // validate(): 31 bits
  return static_cast<int64_t>(token) * stride + (row - static_cast<int64_t>(token) * heads) * width;
}

__device__ __forceinline__ void load_weight(const GatedNormCudaParams& p, int channel, float (&w)[8]) {
  if (p.weight == nullptr) {
#pragma unroll
    for (float& x : w) x = 1.0f;
  } else if (p.weight_type == CudaType::kF32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = static_cast<const float*>(p.weight)[channel + i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      w[i] = from_bits(static_cast<const uint16_t*>(p.weight)[channel + i], p.weight_type);
  }
}

__device__ __forceinline__ const uint4* piece(const void* data, int64_t at) {
  return reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + at);
}

__device__ __forceinline__ uint4* piece(void* data, int64_t at) {
  return reinterpret_cast<uint4*>(static_cast<uint16_t*>(data) + at);
}

template <CudaType kType, int kWidth, GateActivation kAct>
__global__ void __launch_bounds__(kThreads) gated_norm_kernel(const __grid_constant__ GatedNormCudaParams p) {
  constexpr int kLanes = kWidth / 8;
  constexpr int kRows = kThreads / kLanes;
  const int channel = static_cast<int>(threadIdx.x) % kLanes * 8;
  const int64_t rows = p.tokens * p.heads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows * kBatch + threadIdx.x / kLanes;
  uint4 x_bits[kBatch];
  uint4 z_bits[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const int64_t row = first + i * kRows;
    x_bits[i] = z_bits[i] = uint4{};
    if (row >= rows) continue;
    x_bits[i] = __ldcs(piece(p.x.data, offset(row, p.heads, p.x.stride, kWidth) + channel));
    if (kAct != GateActivation::kNone) {
      z_bits[i] = __ldcs(piece(p.z.data, offset(row, p.heads, p.z.stride, kWidth) + channel));
    }
  }
  float w[8];
  load_weight(p, channel, w);
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    float x[8];
    float z[8];
    unpack<kType>(x_bits[i], x);
    unpack<kType>(z_bits[i], z);
    float squares = 0.0f;
#pragma unroll
    for (float value : x) squares = fmaf(value, value, squares);
    const float r = rsqrtf(lane_sum<kLanes>(squares) * (1.0f / kWidth) + p.eps);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      x[c] *= r * w[c];
      if (kAct == GateActivation::kSigmoid) x[c] *= sigmoid(z[c]);
      if (kAct == GateActivation::kSilu) x[c] *= z[c] * sigmoid(z[c]);
    }
    const int64_t row = first + i * kRows;
    if (row < rows) *piece(p.y, offset(row, p.heads, p.y_stride, kWidth) + channel) = pack<kType>(x);
  }
}

// act(z) and its derivative.
template <GateActivation kAct>
__device__ __forceinline__ void activate(float z, float& value, float& slope) {
  const float s = sigmoid(z);
  if (kAct == GateActivation::kNone) {
    value = 1.0f, slope = 0.0f;
  } else if (kAct == GateActivation::kSigmoid) {
    value = s, slope = s * (1.0f - s);
  } else {
    value = z * s, slope = s * fmaf(z, 1.0f - s, 1.0f);
  }
}

template <CudaType kType, int kWidth, GateActivation kAct>
__global__ void __launch_bounds__(kThreads, 4)
    gated_norm_backward_kernel(const __grid_constant__ GatedNormCudaBackward b, float* partial) {
  constexpr int kLanes = kWidth / 8;
  constexpr int kRows = kThreads / kLanes;
  __shared__ float sums[kRows][kWidth];
  const GatedNormCudaParams& p = b.forward;
  const int channel = static_cast<int>(threadIdx.x) % kLanes * 8;
  const int64_t rows = p.tokens * p.heads;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kRows * kBackwardBatch;
  float w[8];
  float dw[8] = {};
  load_weight(p, channel, w);
  // The bound is the same for all lanes of a warp's rows: shuffles below need them all.
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * kRows * kBackwardBatch; base < rows;
       base += stride) {
    const int64_t first = base + threadIdx.x / kLanes;
    uint4 x_bits[kBackwardBatch];
    uint4 z_bits[kBackwardBatch];
    uint4 dy_bits[kBackwardBatch];
#pragma unroll
    for (int i = 0; i < kBackwardBatch; ++i) {
      const int64_t row = first + i * kRows;
      x_bits[i] = z_bits[i] = dy_bits[i] = uint4{};
      if (row >= rows) continue;
      x_bits[i] = __ldcs(piece(p.x.data, offset(row, p.heads, p.x.stride, kWidth) + channel));
      dy_bits[i] = __ldcs(piece(b.dy.data, offset(row, p.heads, b.dy.stride, kWidth) + channel));
      if (kAct != GateActivation::kNone) {
        z_bits[i] = __ldcs(piece(p.z.data, offset(row, p.heads, p.z.stride, kWidth) + channel));
      }
    }
#pragma unroll
    for (int i = 0; i < kBackwardBatch; ++i) {
      const int64_t row = first + i * kRows;
      float x[8];
      float z[8];
      float dy[8];
      unpack<kType>(x_bits[i], x);
      unpack<kType>(z_bits[i], z);
      unpack<kType>(dy_bits[i], dy);
      float squares = 0.0f;
#pragma unroll
      for (float value : x) squares = fmaf(value, value, squares);
      const float r = rsqrtf(lane_sum<kLanes>(squares) * (1.0f / kWidth) + p.eps);
      float product = 0.0f;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        float value;
        float slope;
        activate<kAct>(z[c], value, slope);
        x[c] *= r;                           // n
        z[c] = dy[c] * w[c] * x[c] * slope;  // dz
        dw[c] = fmaf(dy[c] * value, x[c], dw[c]);
        dy[c] *= value * w[c];  // h
        product = fmaf(dy[c], x[c], product);
      }
      const float mean = lane_sum<kLanes>(product) * (1.0f / kWidth);
#pragma unroll
      for (int c = 0; c < 8; ++c) dy[c] = r * (dy[c] - x[c] * mean);
      if (row >= rows) continue;
      *piece(b.dx, offset(row, p.heads, b.dx_stride, kWidth) + channel) = pack<kType>(dy);
      if (kAct != GateActivation::kNone) {
        *piece(b.dz, offset(row, p.heads, b.dz_stride, kWidth) + channel) = pack<kType>(z);
      }
    }
  }
  if (partial == nullptr) return;
#pragma unroll
  for (int c = 0; c < 8; ++c) sums[threadIdx.x / kLanes][channel + c] = dw[c];
  __syncthreads();
  for (int c = static_cast<int>(threadIdx.x); c < kWidth; c += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kRows; ++i) sum += sums[i][c];
    partial[static_cast<int64_t>(blockIdx.x) * kWidth + c] = sum;
  }
}

// A warp per channel.
__global__ void __launch_bounds__(32)
    gated_norm_sum_kernel(const float* partial, float* d_weight, int blocks, int width) {
  float sum = 0.0f;
  for (int block = static_cast<int>(threadIdx.x); block < blocks; block += 32) {
    sum += partial[static_cast<int64_t>(block) * width + blockIdx.x];
  }
  sum = lane_sum<32>(sum);
  if (threadIdx.x == 0) d_weight[blockIdx.x] = sum;
}

template <class Run>
void dispatch(const GatedNormCudaParams& p, const Run& run) {
  const auto with_activation = [&]<CudaType kType, int kWidth>() {
    switch (p.activation) {
      case GateActivation::kNone:
        return run.template operator()<kType, kWidth, GateActivation::kNone>();
      case GateActivation::kSigmoid:
        return run.template operator()<kType, kWidth, GateActivation::kSigmoid>();
      case GateActivation::kSilu:
        return run.template operator()<kType, kWidth, GateActivation::kSilu>();
    }
  };
  const auto with_width = [&]<CudaType kType>() {
    if (p.width == 64) return with_activation.template operator()<kType, 64>();
    if (p.width == 128) return with_activation.template operator()<kType, 128>();
    return with_activation.template operator()<kType, 256>();
  };
  if (p.type == CudaType::kBf16) return with_width.template operator()<CudaType::kBf16>();
  return with_width.template operator()<CudaType::kF16>();
}

int rows_per_block(int width, int batch) { return kThreads / (width / 8) * batch; }

int64_t backward_blocks(const GatedNormCudaParams& p) {
  const int each = rows_per_block(p.width, kBackwardBatch);
  return std::min<int64_t>((p.tokens * p.heads + each - 1) / each, kBackwardBlocks);
}

void check_rows(const char* name, const void* data, int64_t stride, const GatedNormCudaParams& p) {
  cuda::check_rows("gated_rms_norm", name, data, stride, static_cast<int64_t>(p.heads) * p.width, p.tokens);
}

}  // namespace

void validate(const GatedNormCudaParams& p) {
  check(p.tokens >= 0 && p.heads > 0, "gated_rms_norm: {} tokens of {} heads", p.tokens, p.heads);
  check(p.width == 64 || p.width == 128 || p.width == 256,
        "gated_rms_norm: width is {}, expected 64, 128 or 256", p.width);
  check(p.type == CudaType::kBf16 || p.type == CudaType::kF16,
        "gated_rms_norm: x must be bfloat16 or float16");
  check(p.tokens * p.heads < (int64_t{1} << 31) - (1 << 20),
        "gated_rms_norm: {} rows are too many for one launch", p.tokens * p.heads);
  check_rows("x", p.x.data, p.x.stride, p);
  if (p.activation != GateActivation::kNone) check_rows("z", p.z.data, p.z.stride, p);
}

void gated_rms_norm_cuda(const GatedNormCudaParams& p, CUstream_st* stream) {
  validate(p);
  check_rows("y", p.y, p.y_stride, p);
  if (p.tokens == 0) return;
  const int each = rows_per_block(p.width, kBatch);
  const unsigned blocks = static_cast<unsigned>((p.tokens * p.heads + each - 1) / each);
  dispatch(p, [&]<CudaType kType, int kWidth, GateActivation kAct>() {
    gated_norm_kernel<kType, kWidth, kAct><<<blocks, kThreads, 0, stream>>>(p);
  });
  check_launch("gated_rms_norm");
}

size_t gated_rms_norm_backward_cuda_workspace(const GatedNormCudaBackward& b) {
  return static_cast<size_t>(backward_blocks(b.forward) * b.forward.width) * sizeof(float);
}

void gated_rms_norm_backward_cuda(const GatedNormCudaBackward& b, void* workspace, size_t workspace_bytes,
                                  CUstream_st* stream) {
  const GatedNormCudaParams& p = b.forward;
  validate(p);
  check_rows("dy", b.dy.data, b.dy.stride, p);
  check_rows("dx", b.dx, b.dx_stride, p);
  if (p.activation != GateActivation::kNone) check_rows("dz", b.dz, b.dz_stride, p);
  const size_t needed = gated_rms_norm_backward_cuda_workspace(b);
  float* partial = b.d_weight != nullptr ? static_cast<float*>(workspace) : nullptr;
  check(b.d_weight == nullptr || needed == 0 || (workspace != nullptr && workspace_bytes >= needed),
        "gated_rms_norm_backward: the workspace has {} bytes, expected {}", workspace_bytes, needed);
  const int64_t blocks = backward_blocks(p);
  if (blocks > 0) {
    dispatch(p, [&]<CudaType kType, int kWidth, GateActivation kAct>() {
      gated_norm_backward_kernel<kType, kWidth, kAct>
          <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(b, partial);
    });
    check_launch("gated_rms_norm_backward");
  }
  if (b.d_weight != nullptr) {
    gated_norm_sum_kernel<<<static_cast<unsigned>(p.width), 32, 0, stream>>>(
        partial, b.d_weight, static_cast<int>(blocks), p.width);
    check_launch("gated_norm_sum");
  }
}

}  // namespace kilin
