// SPDX-License-Identifier: Apache-2.0
// The two loops that measure a machine: how fast it reads memory and how fast it multiplies and adds.
#include "kilin/machine_probe_isa.h"

#include "kernels/cpu/vec.h"

namespace kilin::KILIN_ISA {
namespace {

// Enough independent chains to cover the latency of an FMA (4 cycles, two per cycle), with a register left
// for each operand.
constexpr int kChains = 12;

}  // namespace

float probe_sum(const float* data, int64_t count) {
  constexpr int kStreams = 8;
  Vec sums[kStreams] = {};
  int64_t at = 0;
  for (; at + kStreams * kLanes <= count; at += kStreams * kLanes) {
#pragma GCC unroll 8
    for (int i = 0; i < kStreams; ++i) sums[i] += load(data + at + i * kLanes);
  }
  Vec all = zero();
#pragma GCC unroll 8
  for (const Vec& sum : sums) all += sum;
  float total = reduce_add(all);
  for (; at < count; ++at) total += data[at];
  return total;
}

float probe_multiply_add(int64_t rounds) {
  Vec chains[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) chains[i] = splat(1.0f + static_cast<float>(i));
  const Vec factor = splat(0.999f);
  Vec term = splat(0.001f);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (Vec& chain : chains) chain = chain * factor + term;
    // Keeps the compiler from reasoning about many rounds at once.
    asm volatile("" : "+m"(term));
  }
  Vec total = zero();
#pragma GCC unroll 12
  for (const Vec& chain : chains) total += chain;
  return reduce_add(total);
}

int64_t probe_flops_per_round() { return int64_t{2} * kChains * kLanes; }

}  // namespace kilin::KILIN_ISA
