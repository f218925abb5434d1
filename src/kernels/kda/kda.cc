// SPDX-License-Identifier: Apache-2.0
#include "kernels/kda/kda.h"

#include <algorithm>
#include <vector>

#include "base/error.h"
#include "base/thread_pool.h"
#include "kernels/cpu/scratch.h"
#include "kernels/kda/kda_host.h"
#include "kernels/kda/kda_isa.h"

namespace kilin {
namespace {

using Kernel = void (*)(const KdaParams&, const KdaTask&, float*);

// Runs the chunked kernel on sequences of at least chunk_from tokens and the recurrent one on the others.
void run(const KdaParams& p, ThreadPool& pool, int chunk_from) {
  validate(p);
  const std::vector<int> order = kda_order(p);
  const Kernel recurrent = KILIN_DISPATCH(kda_recurrent_task);
  const Kernel chunk = KILIN_DISPATCH(kda_chunk_task);
  const int64_t pairs = static_cast<int64_t>(order.size()) * p.value_heads;
  if (pairs == 0) return;
  // Heads in groups as long as every thread gets some; with fewer (sequence, head) pairs than threads the
  // values are split instead, and every slice repeats the key side.
  const int64_t threads = pool.size();
  const int64_t group = std::clamp<int64_t>(pairs / threads, 1, std::min(kKdaHeadGroup, p.value_heads));
  const int64_t groups = (p.value_heads + group - 1) / group;  // per sequence
  const int64_t blocks = (p.value_dim + kKdaMaxPanel - 1) / kKdaMaxPanel;
  const int64_t slices = std::clamp<int64_t>((threads + pairs - 1) / pairs, 1, blocks);
  pool.parallel_for(static_cast<int64_t>(order.size()) * groups * slices, [&](int64_t index, int) {
    static thread_local Scratch<float> scratch;
    const FlushSubnormals flush;
    KdaTask task{};
    task.sequence = order[static_cast<size_t>(index / (groups * slices))];
    task.value_head = static_cast<int>(index / slices % groups * group);
    task.head_count = static_cast<int>(std::min<int64_t>(group, p.value_heads - task.value_head));
    task.value_begin = static_cast<int>(blocks * (index % slices) / slices * kKdaMaxPanel);
    task.value_end = static_cast<int>(blocks * (index % slices + 1) / slices * kKdaMaxPanel);
    task.value_end = std::min(task.value_end, p.value_dim);
    const Kernel kernel = kda_length(p, task.sequence) >= chunk_from ? chunk : recurrent;
    kernel(p, task,
           scratch.get(static_cast<size_t>(kda_scratch_floats(p.key_dim, p.value_dim, task.head_count))));
  });
}

void check_stride(const char* name, int64_t found, int64_t least) {
  check(found >= least, "KDA: {} is {}, expected at least {}", name, found, least);
}

void check_pointer(const char* name, const void* pointer) {
  check(pointer != nullptr, "KDA: {} is null", name);
}

void validate_tensors(const KdaParams& p) {
  const int64_t key_row = static_cast<int64_t>(p.heads) * p.key_dim;
  const int64_t value_row = static_cast<int64_t>(p.value_heads) * p.value_dim;
  const int64_t gate_row = p.scalar_gate ? p.value_heads : static_cast<int64_t>(p.value_heads) * p.key_dim;
  check_pointer("q", p.q);
  check_pointer("k", p.k);
  check_pointer("v", p.v);
  check_pointer("gate", p.gate);
  check_pointer("beta", p.beta);
  check_pointer("state", p.state);
  check_pointer("out", p.out);
  check_stride("q_stride", p.q_stride, key_row);
  check_stride("k_stride", p.k_stride, key_row);
  check_stride("v_stride", p.v_stride, value_row);
  check_stride("gate_stride", p.gate_stride, gate_row);
  check_stride("beta_stride", p.beta_stride, p.value_heads);
  check_stride("out_stride", p.out_stride, value_row);
  check_stride("slot_stride", p.slot_stride, value_row * p.key_dim);
}

}  // namespace

void validate(const KdaParams& p) {
  check(p.heads >= 1, "KDA: heads is {}, expected at least 1", p.heads);
  check(p.value_heads >= p.heads && p.value_heads % p.heads == 0,
        "KDA: value_heads is {}, expected a multiple of {}", p.value_heads, p.heads);
  check(p.key_dim >= 1 && p.key_dim <= 256, "KDA: key_dim is {}, expected 1 to 256", p.key_dim);
  check(p.value_dim >= 1 && p.value_dim <= 256, "KDA: value_dim is {}, expected 1 to 256", p.value_dim);
  check(p.sequences >= 0, "KDA: sequences is {}, expected 0 or more", p.sequences);
  check(p.gate_kind != KdaGate::kBounded || p.lower_bound < 0.0f, "KDA: lower_bound is {}, expected below 0",
        p.lower_bound);
  if (p.sequences == 0) return;
  check_pointer("cu_seqlens", p.cu_seqlens);
  check_pointer("slots", p.slots);
  check(p.cu_seqlens[0] >= 0, "KDA: cu_seqlens[0] is {}, expected 0 or more", p.cu_seqlens[0]);
  for (int n = 0; n < p.sequences; ++n) {
    check(kda_length(p, n) >= 0, "KDA: cu_seqlens[{}] is {}, expected at least {}", n + 1,
          p.cu_seqlens[n + 1], p.cu_seqlens[n]);
    check(p.slots[n] >= 0, "KDA: slots[{}] is {}, expected 0 or more", n, p.slots[n]);
  }
  std::vector<int32_t> used;
  for (int n = 0; n < p.sequences; ++n) {
    if (kda_length(p, n) > 0) used.push_back(p.slots[n]);
  }
  if (used.empty()) return;
  std::sort(used.begin(), used.end());
  const auto twice = std::adjacent_find(used.begin(), used.end());
  check(twice == used.end(), "KDA: slot {} belongs to two sequences", twice == used.end() ? 0 : *twice);
  validate_tensors(p);
}

void kda_recurrent(const KdaParams& params, ThreadPool& pool) { run(params, pool, INT32_MAX); }
void kda_chunk(const KdaParams& params, ThreadPool& pool) { run(params, pool, 0); }
void kda_forward(const KdaParams& params, ThreadPool& pool) { run(params, pool, kKdaChunkFrom); }

double kda_chunk_flops(const KdaParams& p) {
  double flops = 0.0;
  for (int n = 0; n < p.sequences; ++n) {
    const double length = kda_length(p, n);
    const double rest = kda_length(p, n) % kKdaChunk;
    const double pairs = (length - rest) * (kKdaChunk - 1) / 2.0 + rest * (rest - 1.0) / 2.0;
    flops += length * (6.0 * p.key_dim * p.value_dim + 2.0 * p.key_dim + 2.0 * p.value_dim);
    flops += pairs * (5.0 * p.key_dim + 4.0 * p.value_dim);
  }
  return flops * p.value_heads;
}

double kda_recurrent_flops(const KdaParams& p) {
  if (p.sequences == 0) return 0.0;
  const double tokens = p.cu_seqlens[p.sequences] - p.cu_seqlens[0];
  return tokens * p.value_heads * 7.0 * p.key_dim * p.value_dim;
}

double kda_bytes(const KdaParams& p) {
  double states = 0.0;
  double tokens = 0.0;
  for (int n = 0; n < p.sequences; ++n) {
    states += kda_length(p, n) > 0 ? 1.0 : 0.0;
    tokens += kda_length(p, n);
  }
  const double gates = p.scalar_gate ? 1.0 : p.key_dim;
  const double row = 2.0 * p.heads * p.key_dim + p.value_heads * (2.0 * p.value_dim + gates + 1.0);
  return sizeof(float) * (tokens * row + 2.0 * states * p.value_heads * p.value_dim * p.key_dim);
}

}  // namespace kilin
