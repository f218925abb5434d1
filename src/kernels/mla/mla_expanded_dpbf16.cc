// SPDX-License-Identifier: Apache-2.0
// Compiled with AVX-512 (cmake/isa.cmake); runs only where base/cpu.h found it with bfloat16. Both products
// run in register tiles of 12 queries x 32 keys or values, two values of the depth or two keys a step; a
// panel of keys or values stays in L1 while the queries pass by.
#include "kernels/matmul/layout.h"
#include "kernels/mla/mla_dpbf16.h"
#include "kernels/mla/mla_dpbf16_simd.h"

namespace kilin::dpbf16 {
namespace {

constexpr int kTile = 12;  // queries of a register tile: 24 of 32 registers are sums
constexpr int64_t kUnit = 2 * kPanel;
// For permutexvar_epi16: values 0 and 16, 1 and 17, ... beside each other.
KILIN_INLINE __m512i pair_order() {
  return _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                          20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
}

// c[M][32] (+)= sum over units of a's pair times b's unit
template <int M, bool kAdd>
KILIN_INLINE void multiply_tile(int64_t units, const uint16_t* a, int64_t a_stride, const uint16_t* b,
                                float* c, int64_t c_stride) {
  __m512 acc[M][2];
#pragma GCC unroll 12
  for (int t = 0; t < M; ++t) {
    acc[t][0] = kAdd ? _mm512_loadu_ps(c + t * c_stride) : _mm512_setzero_ps();
    acc[t][1] = kAdd ? _mm512_loadu_ps(c + t * c_stride + kLanes) : _mm512_setzero_ps();
  }
  for (int64_t u = 0; u < units; ++u) {
    const __m512bh b0 = load_pairs(b + u * kUnit);
    const __m512bh b1 = load_pairs(b + u * kUnit + kPanel);
#pragma GCC unroll 12
    for (int t = 0; t < M; ++t) {
      const __m512bh v = splat_pair(a + t * a_stride + 2 * u);
      acc[t][0] = _mm512_dpbf16_ps(acc[t][0], b0, v);
      acc[t][1] = _mm512_dpbf16_ps(acc[t][1], b1, v);
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < M; ++t) {
    _mm512_storeu_ps(c + t * c_stride, acc[t][0]);
    _mm512_storeu_ps(c + t * c_stride + kLanes, acc[t][1]);
  }
}

template <bool kAdd, int M = kTile>
void multiply_rows(int64_t rows, int64_t units, const uint16_t* a, int64_t a_stride, const uint16_t* b,
                   float* c, int64_t c_stride) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_rows<kAdd, M - 1>(rows, units, a, a_stride, b, c, c_stride);
  }
  multiply_tile<M, kAdd>(units, a, a_stride, b, c, c_stride);
}

// What a task keeps while it goes over a block of keys.
struct Work {
  uint16_t* queries;  // [count][query_stride]
  int64_t query_stride;
  float* scores;      // [count][kKeyStep]
  uint16_t* weights;  // [count][kWeightStride]
  float* contexts;    // [count][values]
  int64_t values;
  float* sums;  // [count][kLanes]
};
constexpr int64_t kWeightStride = kKeyStep + kPanel;

Work make_work(const MlaParams& p, float* scratch) {
  Work w{};
  const int64_t depth = panels_of(p.nope + p.rope) * kPanel;
  w.values = panels_of(p.value) * kPanel;
  w.query_stride = depth + kPanel;
  w.queries = reinterpret_cast<uint16_t*>(scratch);
  w.scores = scratch + kQueryStep * w.query_stride / 2;
  w.weights = reinterpret_cast<uint16_t*>(w.scores + kQueryStep * kKeyStep);
  w.contexts = w.scores + kQueryStep * (kKeyStep + kWeightStride / 2);
  w.sums = w.contexts + kQueryStep * w.values;
  return w;
}

// The queries as bfloat16 with zeros behind them.
void round_queries(const MlaParams& p, const MlaQueries& t, const Work& w) {
  const int64_t depth = p.nope + p.rope;
  for (int64_t r = 0; r < t.q_end - t.q_begin; ++r) {
    const float* from = p.q + ((t.sequence->first + t.q_begin + r) * p.heads + t.head) * depth;
    uint16_t* to = w.queries + r * w.query_stride;
    for (int64_t c = 0; c < depth; c += kPanel) {
      const auto part = [&](int64_t at) {
        return load_part(from + at, static_cast<int>(at >= depth ? 0 : least(kLanes, depth - at)));
      };
      _mm512_storeu_si512(to + c, round_pairs(part(c), part(c + kLanes)));
    }
  }
}

// Sums and tops of the keys before this block, or of none.
void begin_rows(const MlaParams& p, const MlaQueries& t, bool first, const float* out, const Work& w) {
  for (int64_t r = 0; r < t.q_end - t.q_begin; ++r) {
    float* context = w.contexts + r * w.values;
    store(w.sums + r * kLanes, zero());
    for (int64_t v = 0; v < w.values; v += kLanes) store(context + v, zero());
    if (first) {
      t.top[r] = kMinusInfinity;
    } else {
      w.sums[r * kLanes] = t.sum[r];
      std::memcpy(context, out + r * p.heads * p.value, static_cast<size_t>(p.value) * sizeof(float));
    }
  }
}

void end_rows(const MlaParams& p, const MlaQueries& t, bool last, float* out, const Work& w) {
  for (int64_t r = 0; r < t.q_end - t.q_begin; ++r) {
    float* context = w.contexts + r * w.values;
    t.sum[r] = reduce_add(load(w.sums + r * kLanes));
    if (last) scale_row(w.values, 1.0f / t.sum[r], context);
    std::memcpy(out + r * p.heads * p.value, context, static_cast<size_t>(p.value) * sizeof(float));
  }
}

// Rows [first, count) in tiles of equal height.
template <class Body>
KILIN_INLINE void for_tiles(int64_t first, int64_t count, const Body& body) {
  int64_t tiles = (count - first + kTile - 1) / kTile;
  for (int64_t r = first; r < count; --tiles) {
    const int64_t rows = (count - r + tiles - 1) / tiles;
    body(r, rows);
    r += rows;
  }
}

// The first of `count` queries, the first of which sees `past` keys before itself, that sees key j.
KILIN_INLINE int64_t first_seeing(int64_t j, int64_t past, int64_t count) {
  return least(count, j > past ? j - past : 0);
}

}  // namespace

void pack_keys(const MlaParams& p, const Keys& keys, const KeyRows& from) {
  const int64_t depth = panels_of(p.nope + p.rope) * kPanel;
  const int64_t width = mla_padded(p.latent + p.rope);
  const int64_t values = mla_padded(p.value);
  alignas(64) float rows[kLanes][kPanel];
  uint16_t* panel = keys.keys + (from.head * keys.capacity + from.row) * depth;
  const auto value_of = [&](int64_t row, int64_t c) {
    return c < p.nope ? from.keys[row * p.nope + c] : from.latents[row * width + p.latent + c - p.nope];
  };
  for (int64_t half = 0; half < kPanel; half += kLanes) {
    for (int64_t c = 0; c < depth; c += kPanel) {
      for (int64_t k = 0; k < kLanes; ++k) {
        const int64_t row = half + k;
        if (row >= from.rows) {
          std::memset(rows[k], 0, kPanel * sizeof(float));
        } else if (c + kPanel <= p.nope) {
          std::memcpy(rows[k], from.keys + row * p.nope + c, kPanel * sizeof(float));
        } else if (c >= p.nope && c + kPanel <= p.nope + p.rope) {
          std::memcpy(rows[k], from.latents + row * width + p.latent + c - p.nope, kPanel * sizeof(float));
        } else {
          for (int64_t i = 0; i < kPanel; ++i)
            rows[k][i] = c + i < p.nope + p.rope ? value_of(row, c + i) : 0;
        }
      }
      Vec pairs[kLanes];
      for (int k = 0; k < kLanes; ++k)
        pairs[k] = reinterpret_cast<Vec>(round_pairs(load(rows[k]), load(rows[k] + kLanes)));
      transpose(pairs);
      for (int64_t i = 0; i < kLanes; ++i) std::memcpy(panel + (c / 2 + i) * kUnit + 2 * half, &pairs[i], 64);
    }
  }
  const __m512i order = pair_order();
  for (int64_t c = 0; c < panels_of(p.value) * kPanel; c += kLanes) {
    uint16_t* to = keys.values + (from.head * panels_of(p.value) + c / kPanel) * keys.capacity * kPanel +
                   from.row * kPanel + c % kPanel * 2;
    for (int64_t j = 0; j < kPanel; j += 2, to += kUnit) {
      // rows of values are whole vectors; behind the last value lie zeros or numbers that are multiplied into
      // columns nobody reads
      const auto row = [&](int64_t k) {
        return k < from.rows && c < values ? load(from.values + k * values + c) : zero();
      };
      _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, round_pairs(row(j), row(j + 1))));
    }
  }
}

void expanded_block(const MlaParams& p, const Keys& keys, const MlaQueries& t) {
  const int64_t depth = panels_of(p.nope + p.rope) * kPanel;
  const int64_t count = t.q_end - t.q_begin;
  const int64_t past = t.sequence->past + t.q_begin;  // keys before the first query
  const Work w = make_work(p, t.scratch);
  float* out = p.out + ((t.sequence->first + t.q_begin) * p.heads + t.head) * p.value;
  round_queries(p, t, w);
  begin_rows(p, t, keys.begin == 0, out, w);
  const int64_t end = least(keys.end, past + count);
  for (int64_t j = keys.begin; j < end; j += kKeyStep) {
    const int64_t n = least(kKeyStep, end - j);
    const int64_t row = j - keys.begin;
    const int64_t first = first_seeing(j, past, count);
    for (int64_t i = 0; i < n; i += kPanel) {
      const uint16_t* panel = keys.keys + (t.head * keys.capacity + row + i) * depth;
      for_tiles(first_seeing(j + i, past, count), count, [&](int64_t r, int64_t rows) {
        multiply_rows<false>(rows, depth / 2, w.queries + r * w.query_stride, w.query_stride, panel,
                             w.scores + r * kKeyStep + i, kKeyStep);
      });
    }
    for (int64_t r = first; r < count; ++r) {
      const SoftmaxRow softmax{t.top + r, w.sums + r * kLanes, w.contexts + r * w.values, w.values};
      softmax_row<kKeyStep / kLanes>(least(n, past + r + 1 - j), kLog2E * p.scale, w.scores + r * kKeyStep,
                                     softmax, w.weights + r * kWeightStride);
    }
    for (int64_t c = 0; c < w.values; c += kPanel) {
      const uint16_t* panel = keys.values + ((t.head * w.values + c) * keys.capacity) + row * kPanel;
      for_tiles(first, count, [&](int64_t r, int64_t rows) {
        const int64_t seen = least(n, past + r + rows - j);  // by the last of the tile
        multiply_rows<true>(rows, (seen + 1) / 2, w.weights + r * kWeightStride, kWeightStride, panel,
                            w.contexts + r * w.values + c, w.values);
      });
    }
  }
  end_rows(p, t, keys.end >= past + count, out, w);
}

void round_weights(const WeightMatrix& w, void* to) {
  const int64_t panels = (w.rows + packed::kRows - 1) / packed::kRows;
  const int64_t pairs = packed::columns(w.cols) / 2;
  const auto* from = static_cast<const float*>(w.data);
  auto* at = static_cast<uint16_t*>(to);
  const __m512i order = pair_order();
  for (int64_t i = 0; i < panels * pairs; ++i) {
    const __m512i rounded = round_pairs(load(from + i * 32), load(from + i * 32 + kLanes));
    _mm512_storeu_si512(at + i * 32, _mm512_permutexvar_epi16(order, rounded));
  }
}

}  // namespace kilin::dpbf16
