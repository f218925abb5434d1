// SPDX-License-Identifier: Apache-2.0
// The expanded order: blocks of keys are multiplied out for all heads, then all queries go over the block
// with a running softmax. The keys are multiplied out once per call; memory does not grow with the length.
#include <algorithm>
#include <vector>

#include "kernels/cpu/scratch.h"
#include "kernels/mla/mla_isa.h"
#include "kernels/mla/mla_orders.h"

namespace kilin {
namespace {

// Bound of a block's latents, keys, panels and values: 32 MB, or kLeastKeys keys if these take more.
constexpr int64_t kBlockFloats = int64_t{8} << 20;
constexpr int64_t kLeastKeys = 128;
constexpr int64_t kMostKeys = 2048;
constexpr int64_t kValueSlack = 32;  // floats that a product may read behind the last value

class Expansion {
 public:
  void run(const MlaParams& p, const MlaSequence& s, ThreadPool& pool);

 private:
  void multiply_out(ThreadPool& pool);
  void attend(ThreadPool& pool);

  const MlaParams* p_ = nullptr;
  const MlaSequence* s_ = nullptr;
  MlaKeys block_{};
  float* latents_ = nullptr;
  float* keys_ = nullptr;
  float* values_ = nullptr;
  float* top_ = nullptr;  // [heads][count]
  float* sum_ = nullptr;  // [heads][count]
  std::vector<MatmulJob> jobs_;
  Scratch<float> memory_, top_memory_;
};

void Expansion::multiply_out(ThreadPool& pool) {
  const MlaParams& p = *p_;
  const int64_t keys = block_.end - block_.begin;
  const int64_t width = mla_padded(p.latent + p.rope);
  const int64_t values = mla_padded(p.value);
  jobs_.clear();
  for (int64_t h = 0; h < p.heads; ++h) {
    jobs_.push_back({keys, latents_, width, p.k_expand[h], keys_ + h * block_.capacity * p.nope, p.nope});
    jobs_.push_back({keys, latents_, width, p.value_up[h], values_ + h * block_.capacity * values, values});
  }
  matmul(jobs_, pool);
  const auto pack = KILIN_DISPATCH(mla_pack_panel);
  const int64_t panels = (keys + kMlaPanelKeys - 1) / kMlaPanelKeys;
  pool.parallel_for(p.heads * panels, [&](int64_t i, int) { pack(p, block_, i / panels, i % panels); });
}

void Expansion::attend(ThreadPool& pool) {
  const MlaParams& p = *p_;
  const auto kernel = KILIN_DISPATCH(mla_expanded_block);
  const int64_t blocks = (s_->count + kMlaQueryBlock - 1) / kMlaQueryBlock;
  pool.parallel_for(p.heads * blocks, [&](int64_t i, int) {
    static thread_local Scratch<float> scratch;
    MlaQueries t{};
    t.sequence = s_;
    t.head = i % p.heads;
    t.q_begin = (blocks - 1 - i / p.heads) * kMlaQueryBlock;  // the last queries see most keys: first
    t.q_end = std::min(s_->count, t.q_begin + kMlaQueryBlock);
    if (block_.begin >= s_->past + t.q_end) return;  // none of them sees the block
    t.top = top_ + t.head * s_->count + t.q_begin;
    t.sum = sum_ + t.head * s_->count + t.q_begin;
    t.scratch = scratch.get(mla_query_floats(p));
    kernel(p, block_, t);
  });
}

void Expansion::run(const MlaParams& p, const MlaSequence& s, ThreadPool& pool) {
  if (s.count == 0) return;
  p_ = &p;
  s_ = &s;
  const int64_t width = mla_padded(p.latent + p.rope);
  const int64_t values = mla_padded(p.value);
  const int64_t per_key = width + p.heads * (2 * p.nope + p.rope + values);
  const int64_t keys = s.past + s.count;
  const int64_t fitting = kBlockFloats / per_key / kMlaKeyBlock * kMlaKeyBlock;
  const int64_t step = std::clamp(fitting, kLeastKeys, kMostKeys);
  const int64_t capacity = std::min(step, (keys + kMlaKeyBlock - 1) / kMlaKeyBlock * kMlaKeyBlock);
  float* at = memory_.get(capacity * per_key + kValueSlack);
  const auto take = [&](int64_t floats) {
    float* taken = at;
    at += floats;
    return taken;
  };
  block_.capacity = capacity;
  block_.latents = latents_ = take(capacity * width);
  block_.panels = take(capacity * p.heads * (p.nope + p.rope));
  block_.keys = keys_ = take(capacity * p.heads * p.nope);
  block_.values = values_ = take(capacity * p.heads * values);
  top_ = top_memory_.get(2 * p.heads * s.count);
  sum_ = top_ + p.heads * s.count;
  for (int64_t begin = 0; begin < keys; begin += step) {
    block_.begin = begin;
    block_.end = std::min(keys, begin + step);
    mla_load_latents(p, s, block_.begin, block_.end, latents_, pool);
    multiply_out(pool);
    attend(pool);
  }
}

}  // namespace

void mla_load_latents(const MlaParams& p, const MlaSequence& s, int64_t begin, int64_t end, float* to,
                      ThreadPool& pool) {
  const auto load = KILIN_DISPATCH(mla_load_rows);
  const int64_t element = static_cast<int64_t>(dtype_size(p.cache_type));
  const int64_t width = p.latent + p.rope;
  pool.parallel_for((end - begin + kMlaKeyBlock - 1) / kMlaKeyBlock, [&](int64_t i, int) {
    const int64_t j = begin + i * kMlaKeyBlock;
    const char* page = static_cast<const char*>(s.pages[j / p.page_tokens]);
    load(p.cache_type, std::min(kMlaKeyBlock, end - j), width,
         page + j % p.page_tokens * p.page_stride * element, p.page_stride,
         to + i * kMlaKeyBlock * mla_padded(width));
  });
}

void mla_expand(const MlaParams& p, const MlaSequence& s, ThreadPool& pool) {
  if (mla_rounds(p.value_up->dtype, p.activations)) return mla_expand_rounded(p, s, pool);
  static thread_local Expansion expansion;
  expansion.run(p, s, pool);
}

}  // namespace kilin
