// SPDX-License-Identifier: Apache-2.0
// The absorbed order around its core: queries into the space of latents (a product per head), pieces of the
// keys in parallel, the pieces of each row put together, values out of latents (a product per head).
#include <algorithm>
#include <vector>

#include "base/cpu.h"
#include "kernels/cpu/scratch.h"
#include "kernels/mla/mla_amx.h"
#include "kernels/mla/mla_dpbf16.h"
#include "kernels/mla/mla_isa.h"
#include "kernels/mla/mla_orders.h"

namespace kilin {
namespace {

// A sequence is cut into pieces: up to kFewPieces of kShortPiece keys, beyond that of kLongPiece keys (the
// first block of a piece is not asked for ahead), at most kMaxPieces. The cut depends on its length and its
// rows alone, not on the number of threads nor on other sequences, so neither do the sums.
constexpr int64_t kShortPiece = 256;
constexpr int64_t kFewPieces = 16;
constexpr int64_t kLongPiece = 1024;
constexpr int64_t kMaxPieces = 128;
// Bound of the partial sums of one pass, whatever the lengths and the number of queries: 16 MB.
constexpr int64_t kContextFloats = int64_t{4} << 20;
// Rows (queries x heads) of one sequence in a pass; one token's rows at least.
constexpr int64_t kPassRows = 512;

// Queries [begin, end) of one sequence in a pass.
struct Span {
  const MlaSequence* sequence;
  int64_t begin, end;
  int64_t rows, pieces, piece_keys;
  int64_t floats() const { return pieces * mla_padded_rows(rows) * latent_padded; }
  int64_t keys() const { return sequence->past + end; }
  int64_t latent_padded;
  // places in the pass
  int64_t row = 0;      // of its first row among the pass's rows
  int64_t context = 0;  // floats before its contexts
  int64_t top = 0;      // values before its tops and sums
};

Span make_span(const MlaParams& p, const MlaSequence& s, int64_t begin, int64_t end) {
  Span span{};
  span.sequence = &s;
  span.begin = begin;
  span.end = end;
  span.rows = (end - begin) * p.heads;
  span.latent_padded = mla_padded(p.latent);
  const int64_t room = kContextFloats / (mla_padded_rows(span.rows) * span.latent_padded);
  const int64_t few = std::min(kFewPieces, (span.keys() + kShortPiece - 1) / kShortPiece);
  const int64_t wanted = std::min(kMaxPieces, std::max(few, (span.keys() + kLongPiece - 1) / kLongPiece));
  const int64_t pieces = std::max<int64_t>(1, std::min(wanted, room));
  const int64_t even = (span.keys() + pieces - 1) / pieces;
  span.piece_keys = (even + kMlaKeyBlock - 1) / kMlaKeyBlock * kMlaKeyBlock;
  span.pieces = (span.keys() + span.piece_keys - 1) / span.piece_keys;
  return span;
}

struct PieceTask {
  int32_t span, piece;
};

// One pass: spans whose tokens lie one after another.
class Pass {
 public:
  void clear() {
    spans_.clear();
    floats_ = rows_ = tops_ = 0;
  }
  bool empty() const { return spans_.empty(); }
  bool takes(const Span& span) const { return spans_.empty() || floats_ + span.floats() <= kContextFloats; }
  void add(Span span) {
    span.row = rows_;
    span.context = floats_;
    span.top = tops_;
    rows_ += span.rows;
    floats_ += span.floats();
    tops_ += span.pieces * span.rows;
    spans_.push_back(span);
  }
  void run(const MlaParams& p, ThreadPool& pool);

 private:
  void absorb_queries(const MlaParams& p, ThreadPool& pool);
  void run_pieces(const MlaParams& p, ThreadPool& pool);
  void merge(const MlaParams& p, ThreadPool& pool);
  void values_up(const MlaParams& p, ThreadPool& pool);

  int64_t first_token() const { return spans_.front().sequence->first + spans_.front().begin; }

  std::vector<Span> spans_;
  std::vector<PieceTask> tasks_;
  std::vector<MatmulJob> jobs_;
  int64_t rows_ = 0, floats_ = 0, tops_ = 0;
  Scratch<float> queries_memory_, context_memory_, top_memory_, merged_memory_;
  Scratch<int64_t> visible_memory_;
  float* queries_ = nullptr;    // [rows][mla_padded(latent + rope)], a row per token and head
  float* context_ = nullptr;    // per span [pieces][padded rows][mla_padded(latent)]
  float* top_ = nullptr;        // per span [pieces][rows]
  float* sum_ = nullptr;        // like top_
  float* merged_ = nullptr;     // [rows][mla_padded(latent)]
  int64_t* visible_ = nullptr;  // [rows]
};

void Pass::absorb_queries(const MlaParams& p, ThreadPool& pool) {
  const int64_t width = p.latent + p.rope;
  const int64_t stride = mla_padded(width);
  const int64_t depth = p.nope + p.rope;
  const int64_t tokens = rows_ / p.heads;
  const float* q = p.q + first_token() * p.heads * depth;
  jobs_.clear();
  for (int64_t h = 0; h < p.heads; ++h) {
    jobs_.push_back(
        {tokens, q + h * depth, p.heads * depth, p.k_absorb[h], queries_ + h * stride, p.heads * stride});
  }
  matmul(jobs_, pool);
  for (int64_t r = 0; r < rows_; ++r) {
    float* row = queries_ + r * stride;
    std::copy_n(q + r * depth + p.nope, p.rope, row + p.latent);
    std::fill(row + width, row + stride, 0.0f);
  }
}

void Pass::run_pieces(const MlaParams& p, ThreadPool& pool) {
  tasks_.clear();
  for (size_t s = 0; s < spans_.size(); ++s) {
    const Span& span = spans_[s];
    for (int64_t r = 0; r < span.rows; ++r) {
      visible_[span.row + r] = span.sequence->past + span.begin + r / p.heads + 1;
    }
    for (int64_t i = 0; i < span.pieces; ++i) {
      tasks_.push_back({static_cast<int32_t>(s), static_cast<int32_t>(i)});
    }
  }
  auto kernel = KILIN_DISPATCH(mla_piece);
  auto floats = &mla_piece_floats;
#if defined(__x86_64__)
  if (active_isa() == Isa::kAmx && amx::mla_fits(p)) {
    kernel = &amx::mla_piece;
    floats = &amx::mla_piece_floats;
  } else if (mla_rounds(p.value_up->dtype, p.activations) && dpbf16::piece_fits(p)) {
    kernel = &dpbf16::piece;
    floats = &dpbf16::piece_floats;
  }
#endif
  const int64_t stride = mla_padded(p.latent + p.rope);
  pool.parallel_for(static_cast<int64_t>(tasks_.size()), [&](int64_t index, int) {
    static thread_local Scratch<float> scratch;
    const PieceTask& task = tasks_[static_cast<size_t>(index)];
    const Span& span = spans_[static_cast<size_t>(task.span)];
    MlaPiece t{};
    t.params = &p;
    t.pages = span.sequence->pages;
    t.begin = task.piece * span.piece_keys;
    t.end = std::min(span.keys(), t.begin + span.piece_keys);
    const int64_t ahead = index + pool.size();
    const bool known =
        ahead < static_cast<int64_t>(tasks_.size()) && tasks_[static_cast<size_t>(ahead)].span == task.span;
    t.ahead = known ? tasks_[static_cast<size_t>(ahead)].piece * span.piece_keys : -1;
    t.rows = span.rows;
    t.queries = queries_ + span.row * stride;
    t.visible = visible_ + span.row;
    t.context = context_ + span.context + task.piece * mla_padded_rows(span.rows) * span.latent_padded;
    t.top = top_ + span.top + task.piece * span.rows;
    t.sum = sum_ + span.top + task.piece * span.rows;
    t.scratch = scratch.get(floats(p, span.rows));
    kernel(t);
  });
}

void Pass::merge(const MlaParams& p, ThreadPool& pool) {
  const auto kernel = KILIN_DISPATCH(mla_merge);
  const int64_t columns = mla_padded(p.latent);
  // a token's rows at a time, which belong to one span
  pool.parallel_for(rows_ / p.heads, [&](int64_t token, int) {
    const int64_t begin = token * p.heads;
    auto span = std::upper_bound(spans_.begin(), spans_.end(), begin,
                                 [](int64_t row, const Span& other) { return row < other.row; }) -
                1;
    for (int64_t r = begin; r < begin + p.heads; ++r) {
      const int64_t local = r - span->row;
      kernel(p.latent, span->pieces, context_ + span->context + local * columns,
             mla_padded_rows(span->rows) * columns, top_ + span->top + local, sum_ + span->top + local,
             span->rows, merged_ + r * columns);
    }
  });
}

void Pass::values_up(const MlaParams& p, ThreadPool& pool) {
  const int64_t columns = mla_padded(p.latent);
  float* out = p.out + first_token() * p.heads * p.value;
  jobs_.clear();
  for (int64_t h = 0; h < p.heads; ++h) {
    jobs_.push_back({rows_ / p.heads, merged_ + h * columns, p.heads * columns, p.value_up[h],
                     out + h * p.value, p.heads * p.value});
  }
  matmul(jobs_, pool);
}

void Pass::run(const MlaParams& p, ThreadPool& pool) {
  queries_ = queries_memory_.get(rows_ * mla_padded(p.latent + p.rope));
  context_ = context_memory_.get(floats_);
  top_ = top_memory_.get(2 * tops_);
  sum_ = top_ + tops_;
  merged_ = merged_memory_.get(rows_ * mla_padded(p.latent));
  visible_ = visible_memory_.get(rows_);
  absorb_queries(p, pool);
  run_pieces(p, pool);
  merge(p, pool);
  values_up(p, pool);
}

}  // namespace

void mla_absorb(const MlaParams& p, const MlaSequence* sequences, int64_t count, ThreadPool& pool) {
  static thread_local Pass pass;
  pass.clear();
  const int64_t step = std::max<int64_t>(1, kPassRows / p.heads);
  for (int64_t i = 0; i < count; ++i) {
    const MlaSequence& s = sequences[i];
    for (int64_t begin = 0; begin < s.count; begin += step) {
      const Span span = make_span(p, s, begin, std::min(s.count, begin + step));
      if (!pass.takes(span)) {
        pass.run(p, pool);
        pass.clear();
      }
      pass.add(span);
    }
  }
  if (!pass.empty()) pass.run(p, pool);
}

}  // namespace kilin
