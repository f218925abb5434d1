// SPDX-License-Identifier: Apache-2.0
#include "kernels/matmul/matmul_isa.h"

#include "base/float16.h"
#include "kernels/matmul/gemm_isa.h"

namespace kilin::KILIN_ISA {
namespace {

// Depth of a packed panel: kNr x 512 floats are 64 KB with AVX-512, which stays in L2 while 12 rows of x stay
// in L1.
constexpr int64_t kPackDepth = 512;

struct LoadF32 {
  using Element = float;
  static Vec wide(const Element* p) { return load(p); }
  static float one(const Element* p) { return *p; }
};
struct LoadBF16 {
  using Element = BFloat16;
  static Vec wide(const Element* p) { return load_bf16(p); }
  static float one(const Element* p) { return to_float(*p); }
};
struct LoadF16 {
  using Element = Float16;
  static Vec wide(const Element* p) { return load_f16(p); }
  static float one(const Element* p) { return to_float(*p); }
};

// Elements of a mapped file may lie at odd addresses; only memcpy may read them then. The vector loads do
// that, and x86 and Arm read single elements from any address, so only the scalar tail copies.
template <class Load>
KILIN_INLINE float load_one(const char* p) {
  typename Load::Element e;
  std::memcpy(&e, p, sizeof e);
  return Load::one(&e);
}

template <class Load>
KILIN_INLINE const typename Load::Element* element(const char* p) {
  return reinterpret_cast<const typename Load::Element*>(p);
}

// y[t][r] for R weight rows and M tokens: 4 x 4 accumulators and 8 operands fit 32 registers; the widening of
// a weight vector serves M tokens.
template <class Load, int R, int M>
KILIN_INLINE void dot_tile(int64_t cols, const char* w, int64_t row_bytes, const float* x, int64_t x_stride,
                           float* y, int64_t y_stride) {
  constexpr int64_t kSize = sizeof(typename Load::Element);
  Vec acc[M][R];
  for (int t = 0; t < M; ++t) {
    for (int r = 0; r < R; ++r) acc[t][r] = zero();
  }
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) {
    Vec xs[M];
    for (int t = 0; t < M; ++t) xs[t] = load(x + t * x_stride + c);
    for (int r = 0; r < R; ++r) {
      // The hardware prefetcher stops at page ends and starts anew for every row: ask for the next R rows
      // ourselves.
      const char* at = w + r * row_bytes + c * kSize;
      __builtin_prefetch(at + R * row_bytes);
      const Vec wr = Load::wide(element<Load>(at));
      for (int t = 0; t < M; ++t) acc[t][r] += wr * xs[t];
    }
  }
  for (int t = 0; t < M; ++t) {
    for (int r = 0; r < R; ++r) {
      float sum = reduce_add(acc[t][r]);
      for (int64_t i = c; i < cols; ++i)
        sum += load_one<Load>(w + r * row_bytes + i * kSize) * x[t * x_stride + i];
      y[t * y_stride + r] = sum;
    }
  }
}

template <class Load, int R>
KILIN_INLINE void dot_rows(const MatmulJob& job, const char* w, int64_t row_bytes, int64_t row) {
  int64_t t = 0;
  for (; t + 4 <= job.tokens; t += 4) {
    dot_tile<Load, R, 4>(job.w.cols, w, row_bytes, job.x + t * job.x_stride, job.x_stride,
                         job.y + t * job.y_stride + row, job.y_stride);
  }
  for (; t + 2 <= job.tokens; t += 2) {
    dot_tile<Load, R, 2>(job.w.cols, w, row_bytes, job.x + t * job.x_stride, job.x_stride,
                         job.y + t * job.y_stride + row, job.y_stride);
  }
  for (; t < job.tokens; ++t) {
    dot_tile<Load, R, 1>(job.w.cols, w, row_bytes, job.x + t * job.x_stride, job.x_stride,
                         job.y + t * job.y_stride + row, job.y_stride);
  }
}

template <class Load>
void rows_of(const MatmulJob& job, int64_t row_begin, int64_t row_end) {
  const int64_t row_bytes = job.w.cols * static_cast<int64_t>(sizeof(typename Load::Element));
  const char* base = static_cast<const char*>(job.w.data);
  int64_t r = row_begin;
  for (; r + 4 <= row_end; r += 4) dot_rows<Load, 4>(job, base + r * row_bytes, row_bytes, r);
  for (; r < row_end; ++r) dot_rows<Load, 1>(job, base + r * row_bytes, row_bytes, r);
}

// kLanes rows of w, transposed into kLanes columns of the panel
template <class Load>
KILIN_INLINE void pack_rows(const char* source, int64_t row_bytes, int64_t depth, float* target) {
  constexpr int64_t kSize = sizeof(typename Load::Element);
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    Vec block[kLanes];
    for (int j = 0; j < kLanes; ++j) block[j] = Load::wide(element<Load>(source + j * row_bytes + k * kSize));
    transpose(block);
    for (int i = 0; i < kLanes; ++i) store(target + (k + i) * kNr, block[i]);
  }
  for (; k < depth; ++k) {
    for (int j = 0; j < kLanes; ++j) target[k * kNr + j] = load_one<Load>(source + j * row_bytes + k * kSize);
  }
}

// pack[k][j] = w[row_begin + j][k0 + k] for j < rows, 0 beyond: kNr columns wide
template <class Load>
void pack_panel(const WeightMatrix& w, int64_t row_begin, int64_t rows, int64_t k0, int64_t depth,
                float* pack) {
  constexpr int64_t kSize = sizeof(typename Load::Element);
  const int64_t row_bytes = w.cols * kSize;
  const char* base = static_cast<const char*>(w.data) + row_begin * row_bytes + k0 * kSize;
  if (rows < kNr) std::memset(pack, 0, static_cast<size_t>(depth * kNr) * sizeof(float));
  int64_t j = 0;
  for (; j + kLanes <= rows; j += kLanes) pack_rows<Load>(base + j * row_bytes, row_bytes, depth, pack + j);
  for (; j < rows; ++j) {
    for (int64_t k = 0; k < depth; ++k) pack[k * kNr + j] = load_one<Load>(base + j * row_bytes + k * kSize);
  }
}

template <class Load>
void panel_of(const MatmulJob& job, int64_t row_begin, int64_t row_end, float* pack) {
  const int rows = static_cast<int>(row_end - row_begin);
  for (int64_t k0 = 0; k0 < job.w.cols; k0 += kPackDepth) {
    const int64_t depth = job.w.cols - k0 < kPackDepth ? job.w.cols - k0 : kPackDepth;
    pack_panel<Load>(job.w, row_begin, rows, k0, depth, pack);
    gemm_panel(job.tokens, rows, depth, job.x + k0, job.x_stride, pack, kNr, job.y + row_begin, job.y_stride,
               k0 > 0);
  }
}

template <class Load>
void widen_of(const WeightMatrix& w, int64_t row, float* out) {
  constexpr int64_t kSize = sizeof(typename Load::Element);
  const char* source = static_cast<const char*>(w.data) + row * w.cols * kSize;
  for (int64_t c = 0; c < w.cols; ++c) out[c] = load_one<Load>(source + c * kSize);
}

}  // namespace

void matmul_rows(const MatmulJob& job, int64_t row_begin, int64_t row_end) {
  if (job.w.dtype == Dtype::kF32) return rows_of<LoadF32>(job, row_begin, row_end);
  if (job.w.dtype == Dtype::kBF16) return rows_of<LoadBF16>(job, row_begin, row_end);
  rows_of<LoadF16>(job, row_begin, row_end);
}

void matmul_panel(const MatmulJob& job, int64_t row_begin, int64_t row_end, float* pack) {
  if (job.w.dtype == Dtype::kF32) return panel_of<LoadF32>(job, row_begin, row_end, pack);
  if (job.w.dtype == Dtype::kBF16) return panel_of<LoadBF16>(job, row_begin, row_end, pack);
  panel_of<LoadF16>(job, row_begin, row_end, pack);
}

int64_t matmul_panel_rows() { return kNr; }
int64_t matmul_pack_floats() { return kNr * kPackDepth; }

void widen(const WeightMatrix& w, int64_t row, float* out) {
  if (w.dtype == Dtype::kF32) return widen_of<LoadF32>(w, row, out);
  if (w.dtype == Dtype::kBF16) return widen_of<LoadBF16>(w, row, out);
  widen_of<LoadF16>(w, row, out);
}

}  // namespace kilin::KILIN_ISA
