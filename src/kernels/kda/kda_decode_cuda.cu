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
#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/device.h"
#include "kernels/kda/kda_decode_parts.cuh"

namespace kilin {
namespace {

using namespace kda_decode;

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
  if (values >= 64 * 128) return multi ? 1 : 2;
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
  const Place at = find_place<kMulti>(p, blockIdx.x / kSplit, blockIdx.x % kSplit * kRows);
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
    const float beta = prepare(p, mine, shared);
    __syncthreads();
    // For the epilogue: under way during the update of the state.
    const RawValue norm_weight =
        issue(p.norm.weight, p.norm.weight_type, at.row + thread, has_norm && thread < kRows);
    const uint32_t gate_bits = issue_16(p.norm.gate.data, token * p.norm.gate.stride + out_index, gated);
    if constexpr (kMulti) mine.load_token(p, at, token + 1, t + 1 < at.tokens);

    const Keys<Part> keys(p, shared.sums, shared.q, shared.k, shared.decay, lane);

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
      const int row = step * kRowsPerStep + first_row;
      const float out = keys.template update<kLanes>(s, beta, shared.v[row]);
      if (write) Part::store(rows + step * kRowsPerStep * K, lane, s);
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
        y = normalise(p, y, sum, norm_weight.value(p.norm.weight_type), gate_bits);
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

// Many heads, one token each: persistent CTAs, each with room for one head's state in shared memory, which a
// bulk copy fills while the CTA ends the head before and prepares the next one; three of them share a
// multiprocessor. Results have the same bits as those of kda_decode_kernel with kSplit = 1.
constexpr int kStreamBlocks = 3;

template <class State, int K>
__global__ void __launch_bounds__(kThreads, kStreamBlocks)
    kda_decode_stream_kernel(const __grid_constant__ KdaDecodeCudaParams p, const int items) {
  constexpr int kLanes = K / 8;
  constexpr int kRowsPerStep = kWarps * 32 / kLanes;
  constexpr int kSteps = K / kRowsPerStep;
  constexpr uint32_t kBytes = K * K * sizeof(State);
  using Part = Piece<State, K>;
  extern __shared__ __align__(128) unsigned char stage_bytes[];
  const State* stage = reinterpret_cast<const State*>(stage_bytes);
  __shared__ Shared<K, K> shared;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kLanes;
  const int first_row = thread / kLanes;
  if (thread == 0) {
    mbarrier_init(&shared.barriers[0], 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  const bool has_norm = p.norm.weight != nullptr;
  const bool gated = has_norm && p.norm.activation != GateActivation::kNone && thread < K;
  const float norm_weight = has_norm && thread < K ? load(p.norm.weight, p.norm.weight_type, thread) : 1.0f;
  const auto read_slot = [&](int item) {
    const int n = item / p.value_heads;
    return p.initial.slots != nullptr ? p.initial.slots[n] : n;
  };
  const auto fetch = [&](int item, int slot) {
    const State* from = static_cast<const State*>(p.initial.data) + slot * p.initial.slot_stride +
                        static_cast<int64_t>(item % p.value_heads) * K * K;
    if (thread == 0 && slot >= p.first_slot) bulk_load(stage_bytes, from, kBytes, &shared.barriers[0]);
  };

  int item = static_cast<int>(blockIdx.x);
  fetch(item, read_slot(item));
  uint32_t parity = 0;
  for (; item < items; item += static_cast<int>(gridDim.x)) {
    const Place at = find_place<false>(p, item, 0);
    Channel<K, K> mine;
    mine.setup(p, at);
    mine.load_token(p, at, at.begin, true);
    mine.load_history(p, at);
    const int next_item = item + static_cast<int>(gridDim.x);
    const int next_slot = read_slot(min(next_item, items - 1));
    const int64_t out_index = at.begin * p.out_stride + static_cast<int64_t>(at.value_head) * K + thread;
    if (at.padding) {
      if (thread < K) store(p.out, p.type, out_index, 0.0f);
      if (next_item < items) fetch(next_item, next_slot);
    } else {
      const float beta = prepare(p, mine, shared);
      mine.store_history(p, at, 0, true);  // each thread read what it writes
      __syncthreads();
      const uint32_t gate_bits =
          issue_16(p.norm.gate.data,
                   at.begin * p.norm.gate.stride + static_cast<int64_t>(at.value_head) * K + thread, gated);
      const Keys<Part> keys(p, shared.sums, shared.q, shared.k, shared.decay, lane);
      const bool write = p.final.data != nullptr && at.write_slot >= p.first_slot;
      State* rows = static_cast<State*>(p.final.data) + at.write_slot * p.final.slot_stride +
                    (static_cast<int64_t>(at.value_head) * K + first_row) * K;
      mbarrier_wait(&shared.barriers[0], parity);
      parity ^= 1;
      float square = 0.0f;
#pragma unroll 4
      for (int step = 0; step < kSteps; ++step) {
        const int row = step * kRowsPerStep + first_row;
        float s[8];
        Part::read(stage + row * K, lane, s);
        const float out = keys.template update<kLanes>(s, beta, shared.v[row]);
        if (write) Part::store(rows + step * kRowsPerStep * K, lane, s);
        if (lane == 0) shared.out[row] = out;
        square = fmaf(out, out, square);
      }
#pragma unroll
      for (int mask = kLanes; mask < 32; mask *= 2) square += __shfl_xor_sync(0xffffffffu, square, mask);
      if (thread % 32 == 0) shared.squares[0][0][thread / 32] = square;
      __syncthreads();  // the stage is read
      if (next_item < items) fetch(next_item, next_slot);
      if (thread < K) {
        float y = shared.out[thread];
        if (has_norm) {
          float sum = 0.0f;
#pragma unroll
          for (int i = 0; i < kWarps; ++i) sum += shared.squares[0][0][i];
          y = normalise(p, y, sum, norm_weight, gate_bits);
        }
        store(p.out, p.type, out_index, y);
      }
    }
  }
}

template <class State, int K>
void launch_stream(const KdaDecodeCudaParams& p, cudaStream_t stream) {
  constexpr int kBytes = K * K * static_cast<int>(sizeof(State));
  static const cudaError_t allowed = cudaFuncSetAttribute(
      kda_decode_stream_kernel<State, K>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  check_cuda(allowed, "shared memory of kda_decode");
  const int items = p.sequences * p.value_heads;
  const int blocks = std::min(items, kStreamBlocks * cuda_device().multiprocessors);
  kda_decode_stream_kernel<State, K><<<blocks, kThreads, kBytes, stream>>>(p, items);
  check_launch("kda_decode_stream");
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
  const bool multi = has_many_tokens(p);
  const CudaStates& states = p.final.data != nullptr ? p.final : p.initial;
  const int group = p.conv.q_weight != nullptr ? p.value_heads / p.heads : 1;
  const bool streams = p.split == 0 && split == 1 && !multi && group == 1 && p.initial.data != nullptr &&
                       p.sequences * p.value_heads > 2 * cuda_device().multiprocessors;
  const auto run = [&]<class State, int K>() {
    if (streams) return launch_stream<State, K>(p, stream);
    multi ? launch_split<State, K, true>(p, split, stream) : launch_split<State, K, false>(p, split, stream);
  };
  if (states.data != nullptr && states.type == CudaType::kBf16) {
    p.key_dim == 128 ? run.operator()<__nv_bfloat16, 128>() : run.operator()<__nv_bfloat16, 64>();
  } else {
    p.key_dim == 128 ? run.operator()<float, 128>() : run.operator()<float, 64>();
  }
}

}  // namespace kilin
