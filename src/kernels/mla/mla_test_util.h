// SPDX-License-Identifier: Apache-2.0
// What the tests of kernels/mla compute, and its definition in double.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/cpu.h"
#include "base/float16.h"
#include "base/random.h"
#include "base/thread_pool.h"
#include "kernels/mla/mla.h"
#include "kernels/mla/mla_isa.h"

namespace kilin::mla_testing {

struct Shape {
  int64_t heads, nope, rope, value, latent;
};

inline constexpr int64_t kPageTokens = 256;

// A packed matrix in memory of its own.
class Packed {
 public:
  // dtype kF32 or kBF16
  Packed(Dtype dtype, const std::vector<float>& values, int64_t rows, int64_t cols)
      : memory_(packed_bytes(dtype, rows, cols) + kPackAlignment) {
    void* at = memory_.data();
    size_t space = memory_.size();
    std::align(kPackAlignment, packed_bytes(dtype, rows, cols), at, space);
    std::vector<BFloat16> halves;
    for (float x : values) halves.push_back(to_bfloat16(x));
    const void* stored = dtype == Dtype::kF32 ? static_cast<const void*>(values.data()) : halves.data();
    pack_weights(dtype, stored, rows, cols, 0, rows, at);
    matrix_ = {at, dtype, rows, cols};
  }
  const WeightMatrix& matrix() const { return matrix_; }

 private:
  std::vector<std::byte> memory_;
  WeightMatrix matrix_;
};

// The cache of one sequence.
struct Past {
  int64_t past = 0, count = 0;
  std::vector<std::vector<uint16_t>> pages;  // of 16-bit words: float32 takes two
  std::vector<const void*> pointers;
  std::vector<float> exact;  // [past + count][latent + rope] before rounding to the cache's type
};

// Sequences in pages, their queries and weights, and the definition of mla.h in double.
class Problem {
 public:
  Problem(const Shape& s, const std::vector<std::pair<int64_t, int64_t>>& pasts, Dtype type,
          double score_scale, uint64_t seed, Dtype weights = Dtype::kF32)
      : random_(seed), weights_(weights) {
    p_.heads = s.heads;
    p_.nope = s.nope;
    p_.rope = s.rope;
    p_.value = s.value;
    p_.latent = s.latent;
    p_.scale = static_cast<float>(score_scale / std::sqrt(static_cast<double>(s.nope + s.rope)));
    p_.cache_type = type;
    p_.page_tokens = kPageTokens;
    p_.page_stride = width();
    for (int64_t h = 0; h < s.heads; ++h) add_head();
    p_.k_absorb = k_absorb_.data();
    p_.k_expand = k_expand_.data();
    p_.value_up = value_up_.data();
    int64_t tokens = 0;
    sequences_.resize(pasts.size());
    for (const auto& [past, count] : pasts) tokens += count;
    for (size_t i = 0; i < pasts.size(); ++i) add_sequence(i, pasts[i].first, pasts[i].second);
    fill(q_, tokens * s.heads * (s.nope + s.rope), 1.0);
    p_.q = q_.data();
    out_.resize(static_cast<size_t>(tokens * s.heads * s.value));
    p_.out = out_.data();
    forget();
    p_.sequences = static_cast<int64_t>(sequences_.size());
    p_.sequence = sequences_.data();
  }

  // Writes row `position` of the first sequence's cache anew; the definition does not know of it.
  void store(int64_t position, const std::vector<float>& row) {
    auto& page = caches_.front()->pages[static_cast<size_t>(position / kPageTokens)];
    mla_store_row(p_.cache_type, width(), row.data(),
                  page.data() + static_cast<size_t>(position % kPageTokens) * words_of_row());
  }

  void forget() { std::fill(out_.begin(), out_.end(), std::numeric_limits<float>::quiet_NaN()); }

  // of the cache as it was before rounding, or as it is stored
  std::vector<double> exact(bool rounded) const {
    std::vector<double> out(out_.size());
    for (size_t i = 0; i < sequences_.size(); ++i) {
      for (int64_t t = 0; t < sequences_[i].count; ++t) {
        for (int64_t h = 0; h < p_.heads; ++h) {
          exact_row(i, t, h, rounded, out.data() + ((sequences_[i].first + t) * p_.heads + h) * p_.value);
        }
      }
    }
    return out;
  }

  void expect_exact(const char* what, double tolerance, bool rounded = true) const {
    const auto reference = exact(rounded);
    double error = 0, norm = 1e-30;
    for (size_t i = 0; i < reference.size(); ++i) {
      ASSERT_FALSE(std::isnan(out_[i])) << what << " at " << i;
      error += (out_[i] - reference[i]) * (out_[i] - reference[i]);
      norm += reference[i] * reference[i];
    }
    EXPECT_LT(std::sqrt(error / norm), tolerance)
        << what << " " << dtype_name(p_.cache_type) << " heads " << p_.heads << " latent " << p_.latent
        << " past " << sequences_[0].past << " count " << sequences_[0].count;
  }

  const MlaParams& params() const { return p_; }
  const MlaSequence& sequence(size_t i = 0) const { return sequences_[i]; }
  std::vector<float>& out() { return out_; }

 private:
  int64_t width() const { return p_.latent + p_.rope; }
  size_t words_of_row() const {  // of 16 bits
    return static_cast<size_t>(width()) * dtype_size(p_.cache_type) / sizeof(uint16_t);
  }
  void fill(std::vector<float>& v, int64_t n, double scale) {
    v.resize(static_cast<size_t>(n));
    for (float& x : v) x = static_cast<float>(scale * random_.normal());
  }

  void add_head() {
    const double scale = 1.0 / std::sqrt(static_cast<double>(p_.latent));
    std::vector<float> keys, values;
    fill(keys, p_.nope * p_.latent, scale);
    fill(values, p_.value * p_.latent, scale);
    if (weights_ == Dtype::kBF16) {
      for (float& x : keys) x = to_float(to_bfloat16(x));
      for (float& x : values) x = to_float(to_bfloat16(x));
    }
    std::vector<float> turned(keys.size());
    for (int64_t i = 0; i < p_.nope * p_.latent; ++i) {
      turned[static_cast<size_t>(i % p_.latent * p_.nope + i / p_.latent)] = keys[static_cast<size_t>(i)];
    }
    packed_.push_back(std::make_unique<Packed>(weights_, turned, p_.latent, p_.nope));
    k_absorb_.push_back(packed_.back()->matrix());
    packed_.push_back(std::make_unique<Packed>(weights_, keys, p_.nope, p_.latent));
    k_expand_.push_back(packed_.back()->matrix());
    packed_.push_back(std::make_unique<Packed>(weights_, values, p_.value, p_.latent));
    value_up_.push_back(packed_.back()->matrix());
    keys_.push_back(std::move(keys));
    values_.push_back(std::move(values));
  }

  void add_sequence(size_t index, int64_t past, int64_t count) {
    caches_.push_back(std::make_unique<Past>());
    Past& c = *caches_.back();
    c.past = past;
    c.count = count;
    fill(c.exact, (past + count) * width(), 1.0);
    const size_t row_words = words_of_row();
    for (int64_t t = 0; t < past + count; t += kPageTokens) {
      // Rows that no query may see are NaN in every type; nothing may be read behind the page.
      c.pages.emplace_back(kPageTokens * row_words, uint16_t{0x7fff});
      for (int64_t i = 0; i < std::min(kPageTokens, past + count - t); ++i) {
        EXPECT_TRUE(mla_store_row(p_.cache_type, width(), c.exact.data() + (t + i) * width(),
                                  c.pages.back().data() + static_cast<size_t>(i) * row_words));
      }
    }
    for (const auto& page : c.pages) c.pointers.push_back(page.data());
    const int64_t first = index == 0 ? 0 : sequences_[index - 1].first + sequences_[index - 1].count;
    sequences_[index] = {first, count, past, c.pointers.data()};
  }

  std::vector<float> cached(size_t sequence, int64_t j, bool rounded) const {
    const Past& c = *caches_[sequence];
    const auto row = c.exact.begin() + j * width();
    std::vector<float> values(row, row + width());
    if (rounded) {
      const size_t row_words = words_of_row();
      mla_load_row(p_.cache_type, width(),
                   c.pages[static_cast<size_t>(j / kPageTokens)].data() +
                       static_cast<size_t>(j % kPageTokens) * row_words,
                   values.data());
    }
    return values;
  }

  void exact_row(size_t sequence, int64_t t, int64_t h, bool rounded, double* out) const {
    const MlaSequence& s = sequences_[sequence];
    const float* q = q_.data() + ((s.first + t) * p_.heads + h) * (p_.nope + p_.rope);
    const auto& keys = keys_[static_cast<size_t>(h)];
    const auto& values = values_[static_cast<size_t>(h)];
    const auto latent = static_cast<size_t>(p_.latent);
    std::vector<double> query(latent, 0.0), context(latent, 0.0), scores;
    for (size_t i = 0; i < keys.size(); ++i)
      query[i % latent] += static_cast<double>(q[i / latent]) * keys[i];
    double top = -1e300, total = 0;
    for (int64_t j = 0; j <= s.past + t; ++j) {
      const auto row = cached(sequence, j, rounded);
      double score = 0;
      for (size_t c = 0; c < latent; ++c) score += query[c] * row[c];
      for (int64_t c = 0; c < p_.rope; ++c) {
        score += static_cast<double>(q[p_.nope + c]) * row[latent + static_cast<size_t>(c)];
      }
      scores.push_back(score * p_.scale);
      top = std::max(top, scores.back());
    }
    for (double& x : scores) total += x = std::exp(x - top);
    for (size_t j = 0; j < scores.size(); ++j) {
      const auto row = cached(sequence, static_cast<int64_t>(j), rounded);
      for (size_t c = 0; c < latent; ++c) context[c] += scores[j] / total * row[c];
    }
    for (int64_t v = 0; v < p_.value; ++v) out[v] = 0;
    for (size_t i = 0; i < values.size(); ++i) out[i / latent] += values[i] * context[i % latent];
  }

  Random random_;
  Dtype weights_;
  MlaParams p_;
  std::vector<MlaSequence> sequences_;
  std::vector<std::vector<float>> keys_, values_;  // [heads], [nope][latent] and [value][latent]
  std::vector<std::unique_ptr<Packed>> packed_;
  std::vector<WeightMatrix> k_absorb_, k_expand_, value_up_;
  std::vector<float> q_, out_;
  std::vector<std::unique_ptr<Past>> caches_;
};

inline double relative_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0, norm = 1e-30;
  for (size_t i = 0; i < a.size(); ++i) {
    error += std::pow(static_cast<double>(a[i]) - b[i], 2);
    norm += std::pow(static_cast<double>(a[i]), 2);
  }
  return std::sqrt(error / norm);
}

// Tests of every instruction set with every type of cache.
class IsaCacheTest : public ::testing::TestWithParam<std::tuple<Isa, Dtype>> {
 protected:
  void SetUp() override { set_isa(isa()); }
  void TearDown() override { set_isa(supported_isas().back()); }
  static Isa isa() { return std::get<0>(GetParam()); }
  static Dtype type() { return std::get<1>(GetParam()); }
  ThreadPool pool_{2};
};

inline auto isas_and_caches() {
  return ::testing::Combine(::testing::ValuesIn(supported_isas().begin(), supported_isas().end()),
                            ::testing::Values(Dtype::kF16, Dtype::kBF16, Dtype::kF32));
}
inline std::string isa_and_cache(const ::testing::TestParamInfo<std::tuple<Isa, Dtype>>& test) {
  return std::string(isa_name(std::get<0>(test.param))) + "_" +
         std::string(dtype_name(std::get<1>(test.param)));
}

}  // namespace kilin::mla_testing
