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
    kda_decode_kernel(const __grid_constant__ KdaDecodeCudaParams p, const int group, const int cluster) {
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
      barrier_init(shared_address(&shared.barriers[0]), 1);
      barrier_init(shared_address(&shared.barriers[1]), 1);
      barrier_init_fence();
    }
    cluster_arrive_relaxed();
  }
  const Place at = find_place<kMulti>(p, blockIdx.y, blockIdx.x / kSplit, group, blockIdx.x % kSplit * kRows);
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
      if (thread == 0) barrier_arrive_expect(shared_address(barrier), cluster * kWarps * sizeof(float));
      cluster_barrier_wait(barrier, t / 2 % 2);
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

template <class State, int K, int kSplit, bool kMulti>
void launch(const KdaDecodeCudaParams& p, cudaStream_t stream) {
  const int group = p.value_heads / p.heads;
  const int cluster = kSplit * (p.conv.q_weight != nullptr ? group : 1);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(p.value_heads) * kSplit, static_cast<unsigned>(p.sequences));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kda_decode_kernel<State, K, kSplit, kMulti>, p, group, cluster),
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
