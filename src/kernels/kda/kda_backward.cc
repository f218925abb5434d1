// SPDX-License-Identifier: Apache-2.0
#include "kernels/kda/kda_backward.h"

#include <algorithm>
#include <vector>

#include "base/error.h"
#include "base/thread_pool.h"
#include "kernels/cpu/scratch.h"
#include "kernels/kda/kda_backward_isa.h"
#include "kernels/kda/kda_host.h"

namespace kilin {
namespace {

// The forward arguments as validate(const KdaParams&) wants them, with stand-ins for what is not used here.
KdaParams checkable(const KdaBackwardParams& params) {
  KdaParams p = params.forward;
  static float unused = 0.0f;
  const int64_t value_row = static_cast<int64_t>(p.value_heads) * p.value_dim;
  if (p.state == nullptr) {
    p.state = &unused;
    p.slot_stride = value_row * p.key_dim;
  }
  p.out = &unused;
  p.out_stride = value_row;
  return p;
}

int64_t tokens_of(const KdaParams& p) {
  return p.sequences == 0 ? 0 : p.cu_seqlens[p.sequences] - p.cu_seqlens[0];
}

// d_a_log and d_dt_bias from the sums of every (sequence, value head), in the order of the sequences
void add_up(const KdaBackwardParams& params, const std::vector<float>& sums, int64_t sequences) {
  const KdaParams& p = params.forward;
  const int64_t size = kda_backward_sum_floats(p);
  for (int64_t hv = 0; hv < p.value_heads; ++hv) {
    for (int64_t i = 0; i < size; ++i) {
      float* to = i == 0 ? params.d_a_log : params.d_dt_bias;
      if (to == nullptr) continue;
      double sum = 0.0;
      for (int64_t n = 0; n < sequences; ++n)
        sum += static_cast<double>(sums[static_cast<size_t>((n * p.value_heads + hv) * size + i)]);
      to[i == 0 ? hv : hv * (size - 1) + i - 1] = static_cast<float>(sum);
    }
  }
}

}  // namespace

void validate(const KdaBackwardParams& params) {
  const KdaParams& p = params.forward;
  validate(checkable(params));
  if (p.gate_kind == KdaGate::kNone) {
    check(params.d_a_log == nullptr, "KDA gradients: d_a_log is given, but there is no gate");
    check(params.d_dt_bias == nullptr, "KDA gradients: d_dt_bias is given, but there is no gate");
  }
  if (tokens_of(p) == 0) return;
  check(params.d_out != nullptr, "KDA gradients: d_out is null");
  const int64_t key_row = static_cast<int64_t>(p.heads) * p.key_dim;
  const int64_t value_row = static_cast<int64_t>(p.value_heads) * p.value_dim;
  const int64_t gate_row = p.value_heads * (kda_backward_sum_floats(p) - 1);
  const auto check_stride = [](const char* name, const float* pointer, int64_t stride, int64_t least) {
    check(pointer == nullptr || stride >= least, "KDA gradients: {} is {}, expected at least {}", name,
          stride, least);
  };
  check_stride("d_out_stride", params.d_out, params.d_out_stride, value_row);
  check_stride("d_slot_stride", params.d_state, params.d_slot_stride, value_row * p.key_dim);
  check_stride("d_q_stride", params.d_q, params.d_q_stride, key_row);
  check_stride("d_k_stride", params.d_k, params.d_k_stride, key_row);
  check_stride("d_v_stride", params.d_v, params.d_v_stride, value_row);
  check_stride("d_gate_stride", params.d_gate, params.d_gate_stride, gate_row);
  check_stride("d_beta_stride", params.d_beta, params.d_beta_stride, p.value_heads);
}

void kda_backward(const KdaBackwardParams& params, ThreadPool& pool) {
  validate(params);
  const KdaParams& p = params.forward;
  const std::vector<int> order = kda_order(p);
  const auto sequences = static_cast<int64_t>(order.size());
  const int64_t group = p.value_heads / p.heads;
  const int64_t sum_floats = kda_backward_sum_floats(p);
  std::vector<float> sums(static_cast<size_t>(sequences * p.value_heads * sum_floats));
  const int64_t chunk_bytes = KdaBackwardSizes(p).chunk() * static_cast<int64_t>(sizeof(float));
  const int64_t most_chunks =
      std::clamp<int64_t>(params.memory_per_thread / chunk_bytes, 1, INT32_MAX / kKdaChunk);
  const auto kernel = KILIN_DISPATCH(kda_backward_task);
  pool.parallel_for(sequences * p.heads, [&](int64_t index, int) {
    static thread_local Scratch<float> scratch;
    const FlushSubnormals flush;
    KdaBackwardTask task{};
    task.sequence = order[static_cast<size_t>(index / p.heads)];
    task.head = static_cast<int>(index % p.heads);
    const int64_t chunks = (kda_length(p, task.sequence) + kKdaChunk - 1) / kKdaChunk;
    task.piece_chunks = static_cast<int>(std::min(most_chunks, chunks));
    const int64_t pieces = (chunks + task.piece_chunks - 1) / task.piece_chunks;
    task.scratch =
        scratch.get(static_cast<size_t>(kda_backward_scratch_floats(p, task.piece_chunks, pieces)));
    task.sums = sums.data() + (index / p.heads * p.value_heads + task.head * group) * sum_floats;
    kernel(params, task);
  });
  add_up(params, sums, sequences);
}

double kda_backward_flops(const KdaParams& p) {
  double flops = 0.0;
  for (int n = 0; n < p.sequences; ++n) {
    const double length = kda_length(p, n);
    const double rest = kda_length(p, n) % kKdaChunk;
    const double pairs = (length - rest) * (kKdaChunk - 1) / 2.0 + rest * (rest - 1.0) / 2.0;
    flops += length * 16.0 * p.key_dim * p.value_dim + pairs * (15.0 * p.key_dim + 12.0 * p.value_dim);
  }
  return flops * p.value_heads;
}

}  // namespace kilin
