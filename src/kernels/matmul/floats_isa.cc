// SPDX-License-Identifier: Apache-2.0
// Products with F32, F16 and BF16 weights in float32. Lane r of a vector belongs to row r of a panel.
#include "kernels/matmul/gemm_isa.h"
#include "kernels/matmul/layout.h"
#include "kernels/matmul/matmul_isa.h"

namespace kilin::KILIN_ISA {
namespace {

constexpr int kParts = 16 / kLanes;  // vectors that hold a unit of 16 rows
using Rows = Vec[kParts];

// Widened panels of gemm_floats: kDepth x (16 kPanels) floats are 64 KB with AVX-512, which stays in L2 while
// 12 rows of x stay in L1.
constexpr int64_t kDepth = 512;
constexpr int64_t kPanels = kNr > 16 ? kNr / 16 : 1;
constexpr int64_t kWidth = 16 * kPanels;

// kColumns columns of each row of one unit
struct F32 {
  static constexpr Dtype kDtype = Dtype::kF32;
  static constexpr int kColumns = 1;
  KILIN_INLINE void widen(const char* unit, Vec (&out)[1]) { std::memcpy(&out[0], unit, sizeof(Vec)); }
};
struct BF16 {
  static constexpr Dtype kDtype = Dtype::kBF16;
  static constexpr int kColumns = 2;
  KILIN_INLINE void widen(const char* unit, Vec (&out)[2]) {
    VecUint pair;
    std::memcpy(&pair, unit, sizeof pair);
    out[0] = reinterpret_cast<Vec>(pair << 16);
    out[1] = reinterpret_cast<Vec>(pair & 0xffff0000u);
  }
};
struct F16 {
  static constexpr Dtype kDtype = Dtype::kF16;
  static constexpr int kColumns = 2;
  KILIN_INLINE void widen(const char* unit, Vec (&out)[2]) {
    VecUint pair;
    std::memcpy(&pair, unit, sizeof pair);
    const VecHalfBits even = __builtin_convertvector(pair, VecHalfBits);
    const VecHalfBits odd = __builtin_convertvector(pair >> 16, VecHalfBits);
    out[0] = load_f16(&even);
    out[1] = load_f16(&odd);
  }
};

// M tokens, kUnits units in flight: with one token a sum of its own for each, because a multiply-add takes
// four cycles.
template <class Type, int M>
KILIN_INLINE void panel_tokens(const char* units, int64_t cols, const float* x, int64_t x_stride, int rows,
                               float* y, int64_t y_stride) {
  constexpr int kSums = M * kParts >= 8 ? 1 : M * kParts >= 4 ? 2 : 4;
  constexpr int kColumns = Type::kColumns;
  Rows sum[kSums][M];
  for (auto& set : sum) {
    for (auto& token : set) {
      for (auto& part : token) part = zero();
    }
  }
  int64_t c = 0;
  for (; c + kSums * kColumns <= cols; c += kSums * kColumns) {
    for (int s = 0; s < kSums; ++s) {
      const char* unit = units + (c / kColumns + s) * packed::kUnitBytes;
      __builtin_prefetch(unit + 2048);
      for (int p = 0; p < kParts; ++p) {
        Vec w[kColumns];
        Type::widen(unit + 4 * p * kLanes, w);
        for (int t = 0; t < M; ++t) {
          for (int i = 0; i < kColumns; ++i) {
            sum[s][t][p] += w[i] * splat(x[t * x_stride + c + s * kColumns + i]);
          }
        }
      }
    }
  }
  for (; c < cols; ++c) {
    for (int p = 0; p < kParts; ++p) {
      Vec w[kColumns];
      Type::widen(units + c / kColumns * packed::kUnitBytes + 4 * p * kLanes, w);
      for (int t = 0; t < M; ++t) sum[0][t][p] += w[c % kColumns] * splat(x[t * x_stride + c]);
    }
  }
  for (int t = 0; t < M; ++t) {
    for (int p = 0; p < kParts; ++p) {
      Vec total = sum[0][t][p];
      for (int s = 1; s < kSums; ++s) total += sum[s][t][p];
      const int n = rows - p * kLanes;
      if (n >= kLanes) {
        store(y + t * y_stride + p * kLanes, total);
      } else if (n > 0) {
        store_part(y + t * y_stride + p * kLanes, total, n);
      }
    }
  }
}

template <class Type, int M = kLanes == 16 ? 8 : 4>
KILIN_INLINE void tokens_from(const char* units, const MatmulJob& job, int64_t t, int rows, float* y) {
  for (; t + M <= job.tokens; t += M) {
    panel_tokens<Type, M>(units, job.w.cols, job.x + t * job.x_stride, job.x_stride, rows,
                          y + t * job.y_stride, job.y_stride);
  }
  if constexpr (M > 1) tokens_from<Type, M / 2>(units, job, t, rows, y);
}

template <class Type>
void dot_panels(const MatmulJob& job, PanelRange panels) {
  const auto* base = static_cast<const char*>(job.w.data);
  const int64_t panel_bytes = packed::panel_bytes(Type::kDtype, job.w.cols);
  for (int64_t i = panels.begin; i < panels.end; ++i) {
    const int64_t left = job.w.rows - i * packed::kRows;
    tokens_from<Type>(base + i * panel_bytes, job, 0, static_cast<int>(left < 16 ? left : 16),
                      job.y + i * packed::kRows);
  }
}

// wide[k][16 j + r] = column k0 + k of row r of panel j
template <class Type>
void widen_panels(const char* panels, int64_t panel_bytes, int64_t count, int64_t k0, int64_t depth,
                  float* wide) {
  constexpr int kColumns = Type::kColumns;
  for (int64_t j = 0; j < count; ++j) {
    const char* units = panels + j * panel_bytes + k0 / kColumns * packed::kUnitBytes;
    for (int64_t k = 0; k < depth; k += kColumns) {
      for (int p = 0; p < kParts; ++p) {
        Vec w[kColumns];
        Type::widen(units + k / kColumns * packed::kUnitBytes + 4 * p * kLanes, w);
        for (int i = 0; i < kColumns && k + i < depth; ++i)
          store(wide + (k + i) * kWidth + 16 * j + p * kLanes, w[i]);
      }
    }
  }
}

template <class Type>
void gemm_panels_of(const MatmulJob& job, PanelRange panels, TokenRange tokens, float* wide) {
  const auto* base = static_cast<const char*>(job.w.data);
  const int64_t panel_bytes = packed::panel_bytes(Type::kDtype, job.w.cols);
  for (int64_t i = panels.begin; i < panels.end; i += kPanels) {
    const int64_t count = panels.end - i < kPanels ? panels.end - i : kPanels;
    const int64_t row = i * packed::kRows;
    const int64_t left = job.w.rows - row;
    const int64_t rows = left < count * 16 ? left : count * 16;
    for (int64_t k0 = 0; k0 < job.w.cols; k0 += kDepth) {
      const int64_t depth = job.w.cols - k0 < kDepth ? job.w.cols - k0 : kDepth;
      widen_panels<Type>(base + i * panel_bytes, panel_bytes, count, k0, depth, wide);
      for (int64_t j = 0; j < rows; j += kNr) {
        const int n = static_cast<int>(rows - j < kNr ? rows - j : kNr);
        gemm_panel(tokens.end - tokens.begin, n, depth, job.x + tokens.begin * job.x_stride + k0,
                   job.x_stride, wide + j, kWidth, job.y + tokens.begin * job.y_stride + row + j,
                   job.y_stride, k0 > 0);
      }
    }
  }
}

}  // namespace

void dot_floats(const MatmulJob& job, PanelRange panels) {
  if (job.w.dtype == Dtype::kF32) return dot_panels<F32>(job, panels);
  if (job.w.dtype == Dtype::kBF16) return dot_panels<BF16>(job, panels);
  dot_panels<F16>(job, panels);
}

void gemm_floats(const MatmulJob& job, PanelRange panels, TokenRange tokens, float* scratch) {
  if (job.w.dtype == Dtype::kF32) return gemm_panels_of<F32>(job, panels, tokens, scratch);
  if (job.w.dtype == Dtype::kBF16) return gemm_panels_of<BF16>(job, panels, tokens, scratch);
  gemm_panels_of<F16>(job, panels, tokens, scratch);
}

int64_t gemm_panels() { return kPanels; }
int64_t gemm_scratch_floats() { return kDepth * kWidth; }

}  // namespace kilin::KILIN_ISA
