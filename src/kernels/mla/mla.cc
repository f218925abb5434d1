// SPDX-License-Identifier: Apache-2.0
#include "kernels/mla/mla.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/error.h"
#include "kernels/mla/mla_isa.h"

namespace kilin {
namespace {

// An absorbed call is cut into at most kMaxPieces pieces of at least kPieceKeys keys. Pieces depend on the
// length only, not on the number of threads, so neither do the sums.
constexpr int64_t kPieceKeys = 1024;
constexpr int64_t kMaxPieces = 64;
// Bound of the partial sums of a call, whatever its length and its number of queries: 16 MB.
constexpr int64_t kContextFloats = int64_t{4} << 20;
// Queries of one piece of an expanded call: the keys are expanded once per piece and head.
constexpr int64_t kExpandQueries = 512;

thread_local std::vector<float> worker_scratch;

float* scratch(int64_t floats) {
  if (worker_scratch.size() < static_cast<size_t>(floats)) worker_scratch.resize(static_cast<size_t>(floats));
  return worker_scratch.data();
}

// Keys of one piece, whole blocks of keys.
int64_t mla_piece_keys(int64_t keys) {
  const int64_t even = (keys + kMaxPieces - 1) / kMaxPieces;
  return std::max(kPieceKeys, (even + kMlaKeyBlock - 1) / kMlaKeyBlock * kMlaKeyBlock);
}

}  // namespace

int64_t mla_expand_threshold(const MlaParams& p) {
  // Per key and head, `count` queries cost count (2 latent + rope) absorbed, and count (nope + rope + value)
  // + (nope + value) latent expanded.
  const int64_t saved = 2 * p.latent - p.nope - p.value;
  return saved <= 0 ? INT64_MAX : (p.nope + p.value) * p.latent / saved + 1;
}

namespace {

// Query rows [begin, end) of an absorbed call; row r is head r % heads of token r / heads.
void absorb_rows(const MlaParams& p, const MlaSequence& s, int64_t begin, int64_t end, ThreadPool& pool) {
  const auto query = KILIN_DISPATCH(mla_absorb_query);
  const auto piece = KILIN_DISPATCH(mla_absorb_piece);
  const auto merge = KILIN_DISPATCH(mla_merge_value);
  const int64_t padded = KILIN_DISPATCH(mla_padded)(p.latent);
  const int64_t width = p.latent + p.rope;
  const int64_t rows = end - begin;
  const int64_t keys = s.past + (end - 1) / p.heads + 1;  // that the last of the rows sees
  const int64_t piece_keys = mla_piece_keys(s.past + s.count);
  const int64_t pieces = (keys + piece_keys - 1) / piece_keys;
  static thread_local std::vector<float> queries, context, top, sum;
  static thread_local std::vector<int64_t> visible;
  queries.resize(static_cast<size_t>(rows * width));
  context.resize(static_cast<size_t>(pieces * rows * padded));
  top.resize(static_cast<size_t>(pieces * rows));
  sum.resize(top.size());
  visible.resize(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r) visible[static_cast<size_t>(r)] = s.past + (begin + r) / p.heads + 1;
  // Lambdas see the caller's thread_local vectors through these, not their own thread's.
  float* const queries_data = queries.data();
  float* const context_data = context.data();
  float* const top_data = top.data();
  float* const sum_data = sum.data();
  const int64_t* const visible_data = visible.data();
  const int64_t first = s.first * p.heads + begin;
  pool.parallel_for(rows, [&](int64_t r, int) {
    query(p, (first + r) % p.heads, p.q + (first + r) * (p.nope + p.rope), queries_data + r * width,
          scratch(p.latent));
  });
  pool.parallel_for(pieces, [&](int64_t i, int) {
    piece(p, s, rows, queries_data, visible_data, i * piece_keys, std::min(keys, (i + 1) * piece_keys),
          context_data + i * rows * padded, top_data + i * rows, sum_data + i * rows,
          scratch(rows * kMlaKeyBlock));
  });
  pool.parallel_for(rows, [&](int64_t r, int) {
    merge(p, (first + r) % p.heads, pieces, context_data + r * padded, rows * padded, top_data + r,
          sum_data + r, rows, scratch(p.latent), p.out + (first + r) * p.value);
  });
}

}  // namespace

void mla_absorbed(const MlaParams& p, const MlaSequence& s, ThreadPool& pool) {
  const int64_t width = p.latent + p.rope;
  check(p.page_stride == width && p.page_tokens % kMlaKeyBlock == 0,
        "mla: page stride {} or page size {} not supported", p.page_stride, p.page_tokens);
  const int64_t keys = s.past + s.count;
  const int64_t pieces = (keys + mla_piece_keys(keys) - 1) / mla_piece_keys(keys);
  const int64_t row_floats = pieces * KILIN_DISPATCH(mla_padded)(p.latent);
  const int64_t step = std::max<int64_t>(1, kContextFloats / std::max<int64_t>(1, row_floats));
  const int64_t rows = s.count * p.heads;
  for (int64_t r = 0; r < rows; r += step) absorb_rows(p, s, r, std::min(rows, r + step), pool);
}

void mla_expanded(const MlaParams& p, const MlaSequence& s, ThreadPool& pool) {
  check(p.page_tokens % kMlaKeyBlock == 0, "mla: page size {} is not a multiple of {}", p.page_tokens,
        kMlaKeyBlock);
  const auto block = KILIN_DISPATCH(mla_expand_block);
  const int64_t floats = KILIN_DISPATCH(mla_expand_floats)(p, std::min(s.count, kExpandQueries));
  const int64_t blocks = (s.count + kExpandQueries - 1) / kExpandQueries;
  pool.parallel_for(p.heads * blocks, [&](int64_t i, int) {
    const int64_t begin = i / p.heads * kExpandQueries;
    block(p, s, i % p.heads, begin, std::min(s.count, begin + kExpandQueries), scratch(floats));
  });
}

void mla_attention(const MlaParams& p, ThreadPool& pool) {
  const int64_t threshold = mla_expand_threshold(p);
  for (int64_t i = 0; i < p.sequences; ++i) {
    if (p.sequence[i].count >= threshold) {
      mla_expanded(p, p.sequence[i], pool);
    } else {
      mla_absorbed(p, p.sequence[i], pool);
    }
  }
}

void rope_interleaved(int64_t rows, int64_t dim, double theta, const int64_t* positions, float* x,
                      int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i + 1 < dim; i += 2) {
      const double angle = static_cast<double>(positions[r]) *
                           std::pow(theta, -static_cast<double>(i) / static_cast<double>(dim));
      const auto c = static_cast<float>(std::cos(angle));
      const auto s = static_cast<float>(std::sin(angle));
      float* pair = x + r * stride + i;
      const float a = pair[0];
      const float b = pair[1];
      pair[0] = a * c - b * s;
      pair[1] = a * s + b * c;
    }
  }
}

}  // namespace kilin
