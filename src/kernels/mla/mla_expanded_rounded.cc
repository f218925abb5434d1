// SPDX-License-Identifier: Apache-2.0
// The expanded order in bfloat16 (mla_dpbf16.h): as mla_expanded.cc, but keys and values are multiplied out a
// slice at a time and kept as the attention reads them, in half the memory.
#include <algorithm>
#include <vector>

#include "base/cpu.h"
#include "base/error.h"
#include "kernels/cpu/scratch.h"
#include "kernels/mla/mla_dpbf16.h"
#include "kernels/mla/mla_isa.h"
#include "kernels/mla/mla_orders.h"

namespace kilin {

#if defined(__x86_64__)
namespace {

// Bound of a block's keys and values: 32 MB, or kLeastKeys keys if these take more.
constexpr int64_t kBlockValues = int64_t{16} << 20;
constexpr int64_t kLeastKeys = dpbf16::kKeyStep;
constexpr int64_t kMostKeys = 4096;
// Keys whose float32 forms exist at a time: they go from one core's cache to another's, not to memory.
constexpr int64_t kSliceKeys = 512;
constexpr int64_t kValueSlack = 32;  // floats that may be read behind the last value

class RoundedExpansion {
 public:
  void run(const MlaParams& p, const MlaSequence& s, ThreadPool& pool);

 private:
  void round_matrices(ThreadPool& pool);
  void multiply_out(int64_t begin, int64_t end, ThreadPool& pool);
  void attend(ThreadPool& pool);

  const MlaParams* p_ = nullptr;
  const MlaSequence* s_ = nullptr;
  dpbf16::Keys block_{};
  float* latents_ = nullptr;            // of a slice: [kSliceKeys][mla_padded(latent + rope)]
  float* keys_ = nullptr;               // of a slice: [heads][kSliceKeys][nope]
  float* values_ = nullptr;             // of a slice: [heads][kSliceKeys][mla_padded(value)]
  float* top_ = nullptr;                // [heads][count]
  float* sum_ = nullptr;                // [heads][count]
  std::vector<WeightMatrix> matrices_;  // [heads] keys, [heads] values
  std::vector<MatmulJob> jobs_;
  Scratch<uint16_t> block_memory_;
  Scratch<float> slice_memory_, top_memory_;
  Scratch<std::byte> matrix_memory_;
};

// Matrices in float32 (the transposed form of a quantised one) become bfloat16, as their products do.
void RoundedExpansion::round_matrices(ThreadPool& pool) {
  const MlaParams& p = *p_;
  matrices_.assign(p.k_expand, p.k_expand + p.heads);
  matrices_.insert(matrices_.end(), p.value_up, p.value_up + p.heads);
  const auto bytes = [](const WeightMatrix& w) {
    return w.dtype == Dtype::kF32 ? packed_bytes(Dtype::kBF16, w.rows, w.cols) : 0;
  };
  size_t all = 0;
  for (const WeightMatrix& w : matrices_) all += bytes(w);
  std::byte* at = matrix_memory_.get(all);
  std::vector<WeightMatrix> from = matrices_;
  for (WeightMatrix& w : matrices_) {
    if (w.dtype != Dtype::kF32) continue;
    const size_t own = bytes(w);
    w = {at, Dtype::kBF16, w.rows, w.cols};
    at += own;
  }
  pool.parallel_for(static_cast<int64_t>(from.size()), [&](int64_t i, int) {
    const auto n = static_cast<size_t>(i);
    if (from[n].dtype == Dtype::kF32) dpbf16::round_weights(from[n], const_cast<void*>(matrices_[n].data));
  });
}

void RoundedExpansion::multiply_out(int64_t begin, int64_t end, ThreadPool& pool) {
  const MlaParams& p = *p_;
  const int64_t keys = end - begin;
  const int64_t width = mla_padded(p.latent + p.rope);
  const int64_t values = mla_padded(p.value);
  mla_load_latents(p, *s_, begin, end, latents_, pool);
  jobs_.clear();
  for (int64_t h = 0; h < p.heads; ++h) {
    jobs_.push_back(
        {keys, latents_, width, matrices_[static_cast<size_t>(h)], keys_ + h * kSliceKeys * p.nope, p.nope});
    jobs_.push_back({keys, latents_, width, matrices_[static_cast<size_t>(p.heads + h)],
                     values_ + h * kSliceKeys * values, values});
  }
  matmul(jobs_, pool, Activations::kRounded);
  const int64_t panels = dpbf16::panels_of(keys);
  pool.parallel_for(p.heads * panels, [&](int64_t i, int) {
    const int64_t h = i / panels;
    const int64_t row = i % panels * dpbf16::kPanel;
    dpbf16::KeyRows from{};
    from.head = h;
    from.row = begin - block_.begin + row;
    from.rows = std::min(dpbf16::kPanel, keys - row);
    from.keys = keys_ + (h * kSliceKeys + row) * p.nope;
    from.values = values_ + (h * kSliceKeys + row) * values;
    from.latents = latents_ + row * width;
    dpbf16::pack_keys(p, block_, from);
  });
}

void RoundedExpansion::attend(ThreadPool& pool) {
  const MlaParams& p = *p_;
  const int64_t blocks = (s_->count + dpbf16::kQueryStep - 1) / dpbf16::kQueryStep;
  pool.parallel_for(p.heads * blocks, [&](int64_t i, int) {
    static thread_local Scratch<float> scratch;
    MlaQueries t{};
    t.sequence = s_;
    t.head = i % p.heads;
    t.q_begin = (blocks - 1 - i / p.heads) * dpbf16::kQueryStep;  // the last queries see most keys: first
    t.q_end = std::min(s_->count, t.q_begin + dpbf16::kQueryStep);
    if (block_.begin >= s_->past + t.q_end) return;  // none of them sees the block
    t.top = top_ + t.head * s_->count + t.q_begin;
    t.sum = sum_ + t.head * s_->count + t.q_begin;
    t.scratch = scratch.get(static_cast<size_t>(dpbf16::query_floats(p)));
    dpbf16::expanded_block(p, block_, t);
  });
}

void RoundedExpansion::run(const MlaParams& p, const MlaSequence& s, ThreadPool& pool) {
  if (s.count == 0) return;
  p_ = &p;
  s_ = &s;
  const int64_t keys = s.past + s.count;
  const int64_t per_key = dpbf16::keys_values(p);
  const int64_t fitting = kBlockValues / per_key / kSliceKeys * kSliceKeys;
  const int64_t step = std::clamp(fitting, kLeastKeys, kMostKeys);
  const int64_t capacity =
      std::min(step, (keys + dpbf16::kKeyStep - 1) / dpbf16::kKeyStep * dpbf16::kKeyStep);
  block_.capacity = capacity;
  block_.keys = block_memory_.get(static_cast<size_t>(capacity * per_key));
  block_.values = block_.keys + capacity * p.heads * dpbf16::kPanel * dpbf16::panels_of(p.nope + p.rope);
  const int64_t width = mla_padded(p.latent + p.rope);
  const int64_t values = mla_padded(p.value);
  latents_ = slice_memory_.get(
      static_cast<size_t>(kSliceKeys * (width + p.heads * (p.nope + values)) + kValueSlack));
  keys_ = latents_ + kSliceKeys * width;
  values_ = keys_ + kSliceKeys * p.heads * p.nope;
  top_ = top_memory_.get(static_cast<size_t>(2 * p.heads * s.count));
  sum_ = top_ + p.heads * s.count;
  round_matrices(pool);
  for (int64_t begin = 0; begin < keys; begin += step) {
    block_.begin = begin;
    block_.end = std::min(keys, begin + step);
    for (int64_t j = begin; j < block_.end; j += kSliceKeys) {
      multiply_out(j, std::min(block_.end, j + kSliceKeys), pool);
    }
    attend(pool);
  }
}

}  // namespace

void mla_expand_rounded(const MlaParams& p, const MlaSequence& s, ThreadPool& pool) {
  static thread_local RoundedExpansion expansion;
  expansion.run(p, s, pool);
}
#endif

}  // namespace kilin
