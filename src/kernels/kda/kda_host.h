// SPDX-License-Identifier: Apache-2.0
// Private to kernels/kda: what the callers of its kernels share.
#pragma once
#include <algorithm>
#include <vector>

#include "kernels/kda/kda.h"

namespace kilin {

// Products of decays run through the subnormal range, where multiplications take a hundred times longer:
// results below 1e-38 become zero while a kernel runs.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8040u); }
  ~FlushSubnormals() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushSubnormals() {}
#endif
};

inline int kda_length(const KdaParams& p, int sequence) {
  return p.cu_seqlens[sequence + 1] - p.cu_seqlens[sequence];
}

// Sequences that are not empty, longest first, so that the last tasks handed out are short ones.
inline std::vector<int> kda_order(const KdaParams& p) {
  std::vector<int> order;
  order.reserve(static_cast<size_t>(p.sequences));
  for (int n = 0; n < p.sequences; ++n) {
    if (kda_length(p, n) > 0) order.push_back(n);
  }
  const auto longer = [&](int a, int b) { return kda_length(p, a) > kda_length(p, b); };
  if (!std::is_sorted(order.begin(), order.end(), longer))
    std::stable_sort(order.begin(), order.end(), longer);
  return order;
}

}  // namespace kilin
