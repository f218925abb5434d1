// SPDX-License-Identifier: Apache-2.0
// Compiled with AVX-512 (cmake/isa.cmake); runs only where base/cpu.h found it with bfloat16.
#include "kernels/matmul/dpbf16.h"

#include <immintrin.h>

#include <cstring>

#include "kernels/cpu/vec.h"
#include "kernels/matmul/layout.h"
#include "kernels/matmul/matmul_simd.h"

namespace kilin::dpbf16 {
namespace {

using namespace avx512;  // NOLINT: the SIMD vocabulary, compiled for this file's instruction set

constexpr int kPanels = 2;
constexpr int kTokens = 12;               // of a register tile: 24 of 32 registers are sums
constexpr int64_t kDepthUnits = 256 / 2;  // 256 columns of two panels are 16 KB and stay in L1

using Sums = float[kPanels][16];

// Units (two columns of 16 rows, 64 bytes) of two panels.
struct Weights {
  const std::byte* panel[kPanels];
  int64_t units;
};

template <int M>
KILIN_INLINE void multiply_tile(const Weights& w, const uint16_t* x, int64_t stride, Sums* sums) {
  __m512 acc[M][kPanels];
#pragma GCC unroll 12
  for (int t = 0; t < M; ++t) {
    acc[t][0] = _mm512_load_ps(sums[t][0]);
    acc[t][1] = _mm512_load_ps(sums[t][1]);
  }
  for (int64_t u = 0; u < w.units; ++u) {
    const auto w0 = reinterpret_cast<__m512bh>(_mm512_load_si512(w.panel[0] + u * packed::kUnitBytes));
    const auto w1 = reinterpret_cast<__m512bh>(_mm512_load_si512(w.panel[1] + u * packed::kUnitBytes));
#pragma GCC unroll 12
    for (int t = 0; t < M; ++t) {
      int32_t pair;
      std::memcpy(&pair, x + t * stride + 2 * u, 4);
      const auto v = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
      acc[t][0] = _mm512_dpbf16_ps(acc[t][0], w0, v);
      acc[t][1] = _mm512_dpbf16_ps(acc[t][1], w1, v);
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < M; ++t) {
    _mm512_store_ps(sums[t][0], acc[t][0]);
    _mm512_store_ps(sums[t][1], acc[t][1]);
  }
}

template <int M = kTokens>
void multiply_tokens(const Weights& w, int64_t tokens, const uint16_t* x, int64_t stride, Sums* sums) {
  if constexpr (M > 1) {
    if (tokens < M) return multiply_tokens<M - 1>(w, tokens, x, stride, sums);
  }
  multiply_tile<M>(w, x, stride, sums);
}

}  // namespace

int64_t row_values(int64_t cols) { return packed::columns(cols) + 32; }

void round_row(const float* x, int64_t cols, uint16_t* to) {
  const int64_t padded = row_values(cols);
  for (int64_t c = 0; c < padded; c += 32) {
    const int64_t left = cols - c;
    Vec first = zero(), second = zero();
    if (left >= 32) {
      first = load(x + c);
      second = load(x + c + 16);
    } else if (left > 0) {
      first = load_part(x + c, static_cast<int>(left < 16 ? left : 16));
      if (left > 16) second = load_part(x + c + 16, static_cast<int>(left - 16));
    }
    const __m512bh pair =
        _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
    std::memcpy(to + c, &pair, 64);
  }
}

void matmul_halves(const MatmulJob& job, PanelRange panels, TokenRange tokens, bool stream, const uint16_t* x,
                   std::byte* scratch) {
  auto* const sums = reinterpret_cast<Sums*>(scratch);
  const WeightMatrix& w = job.w;
  const int64_t units = packed::columns(w.cols) / 2;
  const int64_t stride = row_values(w.cols);
  const int64_t panel_bytes = packed::panel_bytes(Dtype::kBF16, w.cols);
  stream = stream && reinterpret_cast<uintptr_t>(job.y) % 64 == 0 && job.y_stride % 16 == 0;
  for (int64_t p = panels.begin; p < panels.end; p += kPanels) {
    const int64_t second = p + 1 < panels.end ? 1 : 0;  // a lone panel is multiplied twice, stored once
    const int64_t left = w.rows - p * packed::kRows;
    const int64_t rows = left < (1 + second) * 16 ? left : (1 + second) * 16;
    std::memset(sums, 0, static_cast<size_t>(tokens.end - tokens.begin) * sizeof(Sums));
    const std::byte* panel = static_cast<const std::byte*>(w.data) + p * panel_bytes;
    for (int64_t k = 0; k < units; k += kDepthUnits) {
      const std::byte* from = panel + k * packed::kUnitBytes;
      const Weights weights{{from, from + second * panel_bytes},
                            units - k < kDepthUnits ? units - k : kDepthUnits};
      int64_t tiles = (tokens.end - tokens.begin + kTokens - 1) / kTokens;  // of equal height
      for (int64_t t = tokens.begin; t < tokens.end; --tiles) {
        const int64_t height = (tokens.end - t + tiles - 1) / tiles;
        multiply_tokens(weights, height, x + t * stride + 2 * k, stride, sums + (t - tokens.begin));
        t += height;
      }
    }
    for (int64_t t = tokens.begin; t < tokens.end; ++t)
      write_row(sums[t - tokens.begin], rows, stream, job.y + t * job.y_stride + p * packed::kRows);
  }
  if (stream) _mm_sfence();  // before another thread is told that y is there
}

int64_t scratch_bytes() { return kMostBlockTokens * static_cast<int64_t>(sizeof(Sums)); }

}  // namespace kilin::dpbf16
