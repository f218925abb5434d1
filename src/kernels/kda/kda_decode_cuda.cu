// SPDX-License-Identifier: Apache-2.0
// One CTA of 256 threads per (sequence, value head), or `split` of them as a cluster that share the value
// rows. The state stays in registers: `kLanes` lanes hold a row, 8 channels each, so a row's two dot products
// are butterflies over those lanes, and nothing of the state passes through shared memory. Both dot products
// are taken on the decayed state before the update,
//     d = beta (v - S k),   o = S q + d (k . q),   S <- S + d k^T
// so that one round of reductions serves both. Loads of the inputs are issued first, those of the state
// behind them, and the prologue (convolution, gate, norms of q and k) is computed while the state is under
// way.
//
// Warps 0 to 3 prepare q and k, warps 4 to 7 v and the gate. Every CTA of a cluster convolves q and k of its
// head for itself. The CTAs send each other their sums for the norm (st.async, counted by mbarriers: a
// barrier of the cluster with release would wait for the stores of the state). A sum is sent behind its CTA's
// reads of the convolution's state, so CTA 0 may update that state once it has all of them.
#include "kernels/cuda/check.h"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/device.h"
#include "kernels/kda/kda_decode_parts.cuh"

namespace kilin {
namespace {

using namespace kda_decode;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

template <int K, int kRows>
struct Shared {
  alignas(16) float q[K], k[K], decay[K];
  float v[kRows], out[kRows];
  float sums[3][4];  // q . q, k . k, q . k of warps 0 to 3
  // Sums of out^2 by warp, of all CTAs of the cluster; two tokens' worth, since a CTA may run one token
  // ahead.
  float squares[2][kMaxCluster][kWarps];
  uint64_t barriers[2];
};

// CTAs per multiprocessor that leave enough registers for a part of the state of this many values.
constexpr int min_blocks(int values, bool multi) {
  if (values >= 64 * 128) return multi && values > 64 * 128 ? 1 : 2;
  return multi ? 2 : 3;
}

template <class State, int K, int kSplit, bool kMulti>
__global__ void __launch_bounds__(kThreads, min_blocks(K / kSplit * K, kMulti))
    kda_decode_kernel(const __grid_constant__ KdaDecodeCudaParams p, const int cluster) {
  constexpr int V = K;
  constexpr int kRows = V / kSplit;
  constexpr int kLanes = K / 8;                       // of a row
  constexpr int kRowsPerStep = kWarps * 32 / kLanes;  // that the CTA holds in one register piece
  constexpr int kSteps = kRows / kRowsPerStep;
  static_assert(kSteps * kRowsPerStep == kRows && kSteps > 0);
  using Part = Piece<State, K>;
  __shared__ Shared<K, kRows> shared;

  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % kLanes;
  const int first_row = thread / kLanes;
  const uint32_t rank = cluster > 1 ? cluster_rank() : 0;

  if (cluster > 1) {  // waited for below: then the others run, and their barriers may be reported to
    if (thread == 0) {
      mbarrier_init(&shared.barriers[0], 1);
      mbarrier_init(&shared.barriers[1], 1);
      mbarrier_init_fence();
    }
    cluster_arrive_relaxed();
  }
  const Place at = find_place<kMulti>(p, kSplit, kRows);
  Channel<K, kRows> mine;
  mine.setup(p, at);
  mine.load_token(p, at, at.begin, !kMulti || at.tokens > 0);
  const bool has_norm = p.norm.weight != nullptr;
  const bool gated = has_norm && p.norm.activation != GateActivation::kNone && thread < kRows;
  const int64_t out_index = static_cast<int64_t>(at.value_head) * V + at.row + thread;
  if (at.padding) {  // the same for all CTAs of a cluster
    if (cluster > 1) cluster_wait();
    for (int t = 0; t < at.tokens && thread < kRows; ++t) {
      store(p.out, p.type, (at.begin + t) * p.out_stride + out_index, 0.0f);
    }
    return;
  }
  mine.load_history(p, at);

  const int64_t state_offset = (static_cast<int64_t>(at.value_head) * V + at.row + first_row) * K;
  Part parts[kSteps];
  if (p.initial.data != nullptr) {
    const State* rows =
        static_cast<const State*>(p.initial.data) + at.read_slot * p.initial.slot_stride + state_offset;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) parts[step].load(rows + step * kRowsPerStep * K, lane);
  } else {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) parts[step].clear();
  }
  float state[kSteps][8];
  if constexpr (kMulti) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) parts[step].expand(state[step]);
  }
  if (cluster > 1) cluster_wait();

  for (int t = 0; t < at.tokens; ++t) {
    const int64_t token = at.begin + t;
    // Prologue: q, k, decay, v of this token into shared memory, sums for the norms of q and k.
    if (mine.keys) {
      const float q = mine.active[0] ? mine.convolve(p, 0) : 0.0f;
      const float k = mine.active[0] ? mine.convolve(p, 1) : 0.0f;
      if (mine.active[0]) shared.q[mine.index] = q, shared.k[mine.index] = k;
      const float qq = warp_sum(q * q);
      const float kk = warp_sum(k * k);
      const float qk = warp_sum(q * k);
      if (thread % 32 == 0) shared.sums[0][warp] = qq, shared.sums[1][warp] = kk, shared.sums[2][warp] = qk;
    } else {
      if (mine.active[1]) shared.decay[mine.index] = mine.decay(p);
      if (mine.active[0]) shared.v[mine.index] = mine.convolve(p, 0);
    }
    const float raw_beta = mine.beta.value(p.beta_type);
    const float beta = p.beta_scale * (p.beta_is_logit ? 1.0f / (1.0f + expf(-raw_beta)) : raw_beta);
    __syncthreads();
    // For the epilogue: under way during the update of the state.
    const RawValue norm_weight =
        issue(p.norm.weight, p.norm.weight_type, at.row + thread, has_norm && thread < kRows);
    const uint32_t gate_bits = issue_16(p.norm.gate.data, token * p.norm.gate.stride + out_index, gated);
    if constexpr (kMulti) mine.load_token(p, at, token + 1, t + 1 < at.tokens);

    float totals[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      totals[i] = (shared.sums[i][0] + shared.sums[i][1]) + (shared.sums[i][2] + shared.sums[i][3]);
    }
    const float q_factor = p.scale * (p.l2norm ? rsqrtf(totals[0] + 1e-6f) : 1.0f);
    const float k_factor = p.l2norm ? rsqrtf(totals[1] + 1e-6f) : 1.0f;
    const float k_dot_q = totals[2] * q_factor * k_factor;
    float q[8], k[8], decay[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int channel = i < 4 ? Part::first(lane) + i : Part::second(lane) + i - 4;
      q[i] = shared.q[channel] * q_factor;
      k[i] = shared.k[channel] * k_factor;
      decay[i] = shared.decay[channel];
    }

    // The state of this token goes to its own slot, or after the last one to the final slot.
    int slot = at.write_slot;
    if (kMulti && p.token_slots != nullptr) slot = p.token_slots[at.sequence * p.token_slot_stride + t];
    const bool write = p.final.data != nullptr && slot >= p.first_slot &&
                       (!kMulti || p.token_slots != nullptr || t + 1 == at.tokens);
    State* rows = static_cast<State*>(p.final.data) + slot * p.final.slot_stride + state_offset;
    float square = 0.0f;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      float(&s)[8] = state[step];
      if constexpr (!kMulti) parts[step].expand(s);
      float recalled = 0.0f;
      float out = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        s[i] *= decay[i];
        recalled = fmaf(s[i], k[i], recalled);
        out = fmaf(s[i], q[i], out);
      }
#pragma unroll
      for (int mask = kLanes / 2; mask > 0; mask /= 2) {
        recalled += __shfl_xor_sync(0xffffffffu, recalled, mask);
        out += __shfl_xor_sync(0xffffffffu, out, mask);
      }
      const int row = step * kRowsPerStep + first_row;
      const float d = beta * (shared.v[row] - recalled);
#pragma unroll
      for (int i = 0; i < 8; ++i) s[i] = fmaf(d, k[i], s[i]);
      if (write) Part::store(rows + step * kRowsPerStep * K, lane, s);
      out = fmaf(d, k_dot_q, out);
      if (lane == 0) shared.out[row] = out;
      square = fmaf(out, out, square);
    }

    // The norm's sum over all rows of the head, and the only barrier between a token's reads and the next
    // one's writes.
#pragma unroll
    for (int mask = kLanes; mask < 32; mask *= 2) square += __shfl_xor_sync(0xffffffffu, square, mask);
    float(&squares)[kMaxCluster][kWarps] = shared.squares[t % 2];
    if (cluster > 1) {
      uint64_t* barrier = &shared.barriers[t % 2];
      const int peer = thread % 32;
      if (peer < cluster) store_to_rank(&squares[rank][warp], barrier, peer, square);
      if (thread == 0) mbarrier_expect(barrier, cluster * kWarps * sizeof(float));
      mbarrier_wait(barrier, t / 2 % 2);
    } else {
      if (thread % 32 == 0) squares[0][warp] = square;
    }
    __syncthreads();
    mine.store_history(p, at, t, rank == 0);
    if (thread < kRows) {
      float y = shared.out[thread];
      if (has_norm) {
        float sum = 0.0f;
#pragma unroll
        for (int part = 0; part < kSplit; ++part) {
#pragma unroll
          for (int i = 0; i < kWarps; ++i) sum += squares[rank - rank % kSplit + part][i];
        }
        y *= rsqrtf(sum * (1.0f / V) + p.norm.eps) * norm_weight.value(p.norm.weight_type);
        if (gated) {
          const float out_gate = from_bits(static_cast<uint16_t>(gate_bits), p.type);
          const float s = sigmoid(out_gate);
          y *= p.norm.activation == GateActivation::kSilu ? out_gate * s : s;
        }
      }
      store(p.out, p.type, token * p.out_stride + out_index, y);
    }
  }

  if constexpr (kMulti) {  // a sequence without tokens: only the state moves
    if (at.tokens > 0 || p.final.data == nullptr || p.token_slots != nullptr || at.write_slot < p.first_slot)
      return;
    State* rows = static_cast<State*>(p.final.data) + at.write_slot * p.final.slot_stride + state_offset;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) Part::store(rows + step * kRowsPerStep * K, lane, state[step]);
  }
}

template <class State, int K, int kSplit, bool kMulti>
void launch(const KdaDecodeCudaParams& p, cudaStream_t stream) {
  const int group = p.conv.q_weight != nullptr ? p.value_heads / p.heads : 1;
  const int cluster = kSplit * group;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(p.sequences) * p.value_heads * kSplit);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kda_decode_kernel<State, K, kSplit, kMulti>, p, cluster),
             "launch of kda_decode");
}

template <class State, int K, bool kMulti>
void launch_split(const KdaDecodeCudaParams& p, int split, cudaStream_t stream) {
  switch (split) {
    case 1:
      return launch<State, K, 1, kMulti>(p, stream);
    case 2:
      return launch<State, K, 2, kMulti>(p, stream);
    case 4:
      if constexpr (K == 128) return launch<State, K, 4, kMulti>(p, stream);
      break;
    case 8:
      if constexpr (K == 128) return launch<State, K, 8, kMulti>(p, stream);
      break;
    default:
      break;
  }
  fail("kda_decode: split is {}, expected 1, 2, 4 or 8 (1 or 2 for 64 values)", split);
}

}  // namespace

void kda_decode_cuda(const KdaDecodeCudaParams& p, CUstream_st* stream) {
  validate(p);
  if (p.sequences == 0 || (p.tokens == 0 && p.final.data == nullptr)) return;
  const int split = p.split != 0 ? p.split : kda_decode_split(p, cuda_device().multiprocessors);
  const bool multi = p.tokens != p.sequences || p.cu_seqlens != nullptr || p.token_slots != nullptr;
  const CudaStates& states = p.final.data != nullptr ? p.final : p.initial;
  const auto run = [&]<class State, int K>() {
    multi ? launch_split<State, K, true>(p, split, stream) : launch_split<State, K, false>(p, split, stream);
  };
  if (states.data != nullptr && states.type == CudaType::kBf16) {
    p.key_dim == 128 ? run.operator()<__nv_bfloat16, 128>() : run.operator()<__nv_bfloat16, 64>();
  } else {
    p.key_dim == 128 ? run.operator()<float, 128>() : run.operator()<float, 64>();
  }
}

}  // namespace kilin
