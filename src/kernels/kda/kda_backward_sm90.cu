// SPDX-License-Identifier: Apache-2.0
// Gradients on Hopper: workspace and launches. Stages (docs/notes/20261124-cuda-backward.md): the forward
// pass again (kda_prepare, kda_backward_scan, which keeps the states between chunks and U), the reverse scan,
// kda_gradient for all chunks at once, sums.
#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/kda/kda_backward_gradient_sm90.cuh"
#include "kernels/kda/kda_backward_prepare_sm90.cuh"
#include "kernels/kda/kda_backward_scan_sm90.cuh"
#include "kernels/kda/kda_launch_sm90.cuh"

namespace kilin {
namespace cuda::backward {
namespace {

int64_t image_bytes(const KdaCudaParams& p) {
  return p.key_dim == 64 ? KdaImage<64>::kBytes : KdaImage<128>::kBytes;
}

struct BackwardWorkspace {
  size_t offsets, starts, chunks, images, states, d_states, u, d_u, beta, d_q, d_k, sums, bytes;
  explicit BackwardWorkspace(const KdaCudaParams& p) {
    size_t next = 0;
    const auto take = [&](size_t& at, int64_t count) {
      at = next;
      next += aligned(count);
    };
    const bool table = p.cu_seqlens != nullptr;
    const int64_t pairs = chunk_bound<kChunk>(p) * p.value_heads;
    const int64_t state = static_cast<int64_t>(p.key_dim) * p.value_dim * 2;
    const int64_t wide = p.value_heads > p.heads ? p.tokens * p.value_heads * p.key_dim * 4 : 0;
    take(offsets, table ? (p.sequences + 1) * 4 : 0);
    take(starts, table ? (p.sequences + 1) * 8 : 0);
    take(chunks, table ? chunk_bound<kChunk>(p) * 8 : 0);
    take(images, pairs * image_bytes(p));
    take(states, pairs * state);
    take(d_states, pairs * state);
    take(u, pairs * kChunk * p.value_dim * 2);
    take(d_u, pairs * kChunk * p.value_dim * 2);
    take(beta, p.beta_is_logit ? 0 : p.tokens * p.value_heads * 4);
    take(d_q, wide);
    take(d_k, wide);
    take(sums, pairs * (1 + p.key_dim) * 4);
    bytes = next;
  }
};

// The gradient of beta is found times beta: a zero becomes a number too small to matter.
__global__ void kda_copy_beta(const void* from, CudaType type, int64_t stride, int64_t tokens, int heads,
                              float least, float* to) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < tokens * heads;
       i += int64_t{gridDim.x} * blockDim.x) {
    const float beta = load(from, type, i / heads * stride + i % heads);
    to[i] = fabsf(beta) < least ? least : beta;
  }
}

// The sum over the value heads of a head.
template <class Element>
__global__ void kda_sum_heads(const float* from, int64_t tokens, int heads, int group, int key_dim,
                              Element* to, int64_t stride) {
  const int64_t width = static_cast<int64_t>(heads) * key_dim;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < tokens * width;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t token = i / width, head = i % width / key_dim, channel = i % key_dim;
    const float* x = from + (token * heads * group + head * group) * key_dim + channel;
    float sum = 0.0f;
    for (int n = 0; n < group; ++n) sum += x[static_cast<int64_t>(n) * key_dim];
    to[token * stride + head * key_dim + channel] = static_cast<Element>(sum);
  }
}

// d_a_log and d_dt_bias of one head: sums over chunks in a fixed order. Blocks of (1 + K rounded up, 4)
// threads.
__global__ void kda_sum_chunks(const float* sums, KdaLayout layout, int64_t chunks, int value_heads,
                               int key_dim, float* d_a_log, float* d_dt_bias) {
  __shared__ float parts[4][160];
  if (layout.offsets != nullptr) chunks = layout.offsets[layout.sequences];
  const int channel = static_cast<int>(threadIdx.x), part = static_cast<int>(threadIdx.y);
  const int64_t head = blockIdx.x;
  float sum = 0.0f;
  if (channel <= key_dim) {
    for (int64_t c = part; c < chunks; c += 4)
      sum += sums[(c * value_heads + head) * (1 + key_dim) + channel];
  }
  parts[part][channel] = sum;
  __syncthreads();
  if (part != 0 || channel > key_dim) return;
  sum = parts[0][channel] + parts[1][channel] + parts[2][channel] + parts[3][channel];
  if (channel == 0) {
    if (d_a_log != nullptr) d_a_log[head] = sum;
  } else if (d_dt_bias != nullptr) {
    d_dt_bias[head * key_dim + channel - 1] = sum;
  }
}

template <class Element, int K, class GateElement>
void run_kernels(const KdaCudaParams& p, const KdaPrepareArgs& prepare_args, const ScanArgs& scan_args,
                 const ScanArgs& reverse_args, const KdaGradientArgs& gradient_args, cudaStream_t stream) {
  const int64_t chunks = chunk_bound<kChunk>(p) * p.value_heads;
  const int64_t pairs = static_cast<int64_t>(p.sequences) * p.value_heads * (K / 64);
  launch(kda_prepare<Element, K, GateElement>, "kda_prepare", chunks, 128, PrepareShared<K>::kBytes,
         LaunchKind::kPlain, stream, prepare_args);
  launch(kda_backward_scan<Element, K, false>, "kda_backward_scan", pairs, 160, ScanShared<K, false>::kBytes,
         LaunchKind::kPlain, stream, scan_args);
  launch(kda_backward_scan<Element, K, true>, "kda_backward_scan (reverse)", pairs, 160,
         ScanShared<K, true>::kBytes, LaunchKind::kPlain, stream, reverse_args);
  launch(kda_gradient<Element, K, K, GateElement>, "kda_gradient", chunks, GradientShared<K, K>::kThreads,
         GradientShared<K, K>::kBytes, LaunchKind::kPlain, stream, gradient_args);
}

template <class Element>
void run(const KdaBackwardCudaParams& params, const KdaPrepareArgs& prepare_args, const ScanArgs& scan_args,
         const ScanArgs& reverse_args, const KdaGradientArgs& gradient_args, cudaStream_t stream) {
  const KdaCudaParams& p = params.forward;
  const auto call = [&](auto kernels) {
    kernels(p, prepare_args, scan_args, reverse_args, gradient_args, stream);
  };
  const bool wide_gate = p.gate_type == CudaType::kF32;
  if (p.key_dim == 64) {
    wide_gate ? call(run_kernels<Element, 64, float>) : call(run_kernels<Element, 64, Element>);
  } else {
    wide_gate ? call(run_kernels<Element, 128, float>) : call(run_kernels<Element, 128, Element>);
  }
  const int64_t chunks = p.cu_seqlens == nullptr ? chunk_bound<kChunk>(p) : 0;
  const auto sum_heads = [&](const void* from, const CudaGradient& to) {
    if (to.data == nullptr) return;
    kda_sum_heads<<<1024, 256, 0, stream>>>(static_cast<const float*>(from), p.tokens, p.heads,
                                            p.value_heads / p.heads, p.key_dim,
                                            static_cast<Element*>(to.data), to.stride);
    check_launch("kda_sum_heads");
  };
  if (gradient_args.wide_keys && p.tokens > 0) {
    sum_heads(gradient_args.d_q, params.d_q);
    sum_heads(gradient_args.d_k, params.d_k);
  }
  if (params.d_a_log != nullptr || params.d_dt_bias != nullptr) {
    const dim3 threads(static_cast<unsigned>(p.key_dim + 32), 4);
    kda_sum_chunks<<<static_cast<unsigned>(p.value_heads), threads, 0, stream>>>(
        gradient_args.sums, gradient_args.layout, chunks, p.value_heads, p.key_dim, params.d_a_log,
        params.d_dt_bias);
    check_launch("kda_sum_chunks");
  }
}

}  // namespace
}  // namespace cuda::backward

size_t kda_backward_cuda_workspace(const KdaBackwardCudaParams& params) {
  validate(params);
  return cuda::backward::BackwardWorkspace(params.forward).bytes;
}

void kda_backward_cuda(const KdaBackwardCudaParams& params, void* workspace, size_t workspace_bytes,
                       CUstream_st* stream) {
  validate(params);
  const KdaCudaParams& p = params.forward;
  const cuda::backward::BackwardWorkspace place(p);
  check(workspace_bytes >= place.bytes, "kda_backward_cuda: workspace of {} bytes, expected {}",
        workspace_bytes, place.bytes);
  check(reinterpret_cast<uintptr_t>(workspace) % 256 == 0,
        "kda_backward_cuda: the workspace must be aligned to 256 bytes");
  if (p.sequences == 0) return;
  uint8_t* base = static_cast<uint8_t*>(workspace);
  const cuda::KdaLayout layout = cuda::make_layout<cuda::backward::kChunk>(
      p, reinterpret_cast<int32_t*>(base + place.offsets), reinterpret_cast<int64_t*>(base + place.starts),
      reinterpret_cast<int64_t*>(base + place.chunks), stream);
  cuda::backward::KdaPrepareArgs inputs{.layout = layout,
                                        .q = p.q.data,
                                        .k = p.k.data,
                                        .gate = p.gate.data,
                                        .beta = p.beta.data,
                                        .q_stride = p.q.stride,
                                        .k_stride = p.k.stride,
                                        .gate_stride = p.gate.stride,
                                        .beta_stride = p.beta.stride,
                                        .a_log = p.a_log,
                                        .dt_bias = p.gate_kind == KdaGate::kNone ? nullptr : p.dt_bias,
                                        .heads = p.heads,
                                        .value_heads = p.value_heads,
                                        .gate_kind = p.gate_kind,
                                        .beta_type = p.beta_type,
                                        .l2norm = p.l2norm,
                                        .beta_is_logit = p.beta_is_logit,
                                        .beta_scale = p.beta_scale,
                                        .lower_bound = p.lower_bound,
                                        .scale = p.scale,
                                        .images = base + place.images};
  if (!p.beta_is_logit && p.tokens > 0) {
    float* beta = reinterpret_cast<float*>(base + place.beta);
    const float least = p.type == CudaType::kBf16 ? 1e-20f : 1e-3f;
    cuda::backward::kda_copy_beta<<<256, 256, 0, stream>>>(p.beta.data, p.beta_type, p.beta.stride, p.tokens,
                                                           p.value_heads, least, beta);
    check_launch("kda_copy_beta");
    inputs.beta = beta;
    inputs.beta_stride = p.value_heads;
    inputs.beta_type = CudaType::kF32;
  }
  const cuda::backward::ScanArgs scan{.layout = layout,
                                      .images = inputs.images,
                                      .values = p.v.data,
                                      .values_stride = p.v.stride,
                                      .value_heads = p.value_heads,
                                      .value_dim = p.value_dim,
                                      .from = p.initial,
                                      .to = {},
                                      .states = base + place.states,
                                      .written = base + place.u};
  const cuda::backward::ScanArgs reverse{.layout = layout,
                                         .images = inputs.images,
                                         .values = params.d_out.data,
                                         .values_stride = params.d_out.stride,
                                         .value_heads = p.value_heads,
                                         .value_dim = p.value_dim,
                                         .from = params.d_final,
                                         .to = params.d_initial,
                                         .states = base + place.d_states,
                                         .written = base + place.d_u};
  const bool wide = p.value_heads > p.heads;
  const cuda::backward::KdaGradientArgs gradient{.layout = layout,
                                                 .inputs = inputs,
                                                 .states = base + place.states,
                                                 .d_states = base + place.d_states,
                                                 .u = base + place.u,
                                                 .d_u = base + place.d_u,
                                                 .v = p.v.data,
                                                 .d_out = params.d_out.data,
                                                 .v_stride = p.v.stride,
                                                 .d_out_stride = params.d_out.stride,
                                                 .d_q = wide ? base + place.d_q : params.d_q.data,
                                                 .d_k = wide ? base + place.d_k : params.d_k.data,
                                                 .d_v = params.d_v.data,
                                                 .d_gate = params.d_gate.data,
                                                 .d_beta = params.d_beta.data,
                                                 .d_beta_type = p.beta_type,
                                                 .d_q_stride = params.d_q.stride,
                                                 .d_k_stride = params.d_k.stride,
                                                 .d_v_stride = params.d_v.stride,
                                                 .d_gate_stride = params.d_gate.stride,
                                                 .d_beta_stride = params.d_beta.stride,
                                                 .wide_keys = wide,
                                                 .sums = reinterpret_cast<float*>(base + place.sums)};
  if (p.type == CudaType::kBf16) {
    cuda::backward::run<__nv_bfloat16>(params, inputs, scan, reverse, gradient, stream);
  } else {
    cuda::backward::run<__half>(params, inputs, scan, reverse, gradient, stream);
  }
}

}  // namespace kilin
