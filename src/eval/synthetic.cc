// SPDX-License-Identifier: Apache-2.0
#include "eval/synthetic.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <string>

#include "base/error.h"

namespace kilin::eval {
namespace {

constexpr std::array<std::string_view, 3> kNames{"palindrome", "mqar", "stack"};
constexpr int64_t kMaxLength = 1 << 20;
constexpr int64_t kMaxVocabulary = 1 << 20;

// One example in eight is held out, by a hash of its tokens.
constexpr uint64_t kSplits = 8;
// Where an eighth of all examples qualifies, 2000 draws miss it with a probability of 1e-116.
constexpr uint64_t kMaxDraws = 2000;

// SplitMix64 (Steele, Lea, Flood 2014): the output function and the generator.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

constexpr uint64_t kGamma = 0x9e3779b97f4a7c15ull;

class Draws {
 public:
  Draws(uint64_t seed, uint64_t stream, uint64_t index, uint64_t attempt) {
    for (const uint64_t part : {seed, stream, index, attempt})
      state_ = mix((state_ + kGamma) ^ mix(part + kGamma));
  }
  uint64_t bits() { return mix(state_ += kGamma); }
  // Uniform in [0, n), without bias.
  uint64_t below(uint64_t n) {
    const uint64_t excess = (~n + 1) % n;  // 2^64 mod n
    uint64_t x = bits();
    while (x < excess) x = bits();
    return x % n;
  }

 private:
  uint64_t state_ = 0;
};

// FNV-1a over the ids, stirred so that every bit counts.
uint64_t content_hash(std::span<const int32_t> tokens) {
  uint64_t hash = 14695981039346656037ull;
  for (const int32_t token : tokens) hash = (hash ^ static_cast<uint32_t>(token)) * 1099511628211ull;
  return mix(hash);
}

// Sums over the places [0, i] in O(log n): node i holds the weights of the (i & -i) places up to i (from 1).
std::vector<uint64_t> fenwick_tree(const std::vector<uint64_t>& weights) {
  std::vector<uint64_t> tree(weights.size() + 1, 0);
  for (size_t i = 1; i < tree.size(); ++i) {
    tree[i] += weights[i - 1];
    const size_t parent = i + (i & (~i + 1));
    if (parent < tree.size()) tree[parent] += tree[i];
  }
  return tree;
}

// The place whose share of the cumulated weights `target` falls into; its weight leaves the tree.
size_t take_place(std::vector<uint64_t>& tree, uint64_t target, const std::vector<uint64_t>& weights) {
  size_t place = 0;
  size_t step = 1;
  while (step * 2 < tree.size()) step *= 2;
  for (; step > 0; step /= 2) {
    if (place + step < tree.size() && tree[place + step] <= target) {
      place += step;
      target -= tree[place];
    }
  }
  for (size_t i = place + 1; i < tree.size(); i += i & (~i + 1)) tree[i] -= weights[place];
  return place;
}

// `count` different numbers of [first, last), in random order.
std::vector<int32_t> choose(int64_t first, int64_t last, int64_t count, Draws& draws) {
  std::vector<int32_t> all(static_cast<size_t>(last - first));
  std::iota(all.begin(), all.end(), static_cast<int32_t>(first));
  for (size_t i = 0; i < static_cast<size_t>(count); ++i)
    std::swap(all[i], all[i + draws.below(all.size() - i)]);
  all.resize(static_cast<size_t>(count));
  return all;
}

int32_t element(int64_t first, int64_t vocabulary, Draws& draws) {
  return static_cast<int32_t>(first +
                              static_cast<int64_t>(draws.below(static_cast<uint64_t>(vocabulary - first))));
}

void fill_palindrome(const SyntheticConfig& c, Draws& draws, std::span<int32_t> tokens,
                     std::span<int32_t> labels) {
  const size_t n = tokens.size() / 2;
  for (size_t i = 0; i < n; ++i) tokens[i] = element(palindrome::kFirstElement, c.vocabulary, draws);
  tokens[n] = palindrome::kSeparator;
  for (size_t i = 0; i < n; ++i) {
    labels[n + i] = tokens[n - 1 - i];
    if (i + 1 < n) tokens[n + 1 + i] = tokens[n - 1 - i];
  }
}

void fill_mqar(const SyntheticConfig& c, const std::vector<uint64_t>& weights, Draws& draws,
               std::span<int32_t> tokens, std::span<int32_t> labels) {
  const auto pairs = static_cast<size_t>(c.kv_pairs);
  const auto keys = choose(1, c.vocabulary / 2, c.kv_pairs, draws);
  const auto values = choose(c.vocabulary / 2, c.vocabulary, c.kv_pairs, draws);
  for (size_t i = 0; i < pairs; ++i) {
    tokens[2 * i] = keys[i];
    tokens[2 * i + 1] = values[i];
  }
  for (size_t i = 2 * pairs; i < tokens.size(); ++i) {
    tokens[i] = c.random_filler ? element(0, c.vocabulary, draws) : 0;
  }
  std::vector<uint64_t> tree = fenwick_tree(weights);
  uint64_t total = std::accumulate(weights.begin(), weights.end(), uint64_t{0});
  for (size_t i = 0; i < pairs; ++i) {
    const size_t place = take_place(tree, draws.below(total), weights);
    total -= weights[place];
    tokens[2 * (pairs + place)] = keys[i];
    labels[2 * (pairs + place)] = values[i];
  }
}

// Push or pop with equal probability; a push goes to any stack, a pop to any that is not empty. The last
// operation is cut where the example ends.
void fill_stack(const SyntheticConfig& c, Draws& draws, std::span<int32_t> tokens,
                std::span<int32_t> labels) {
  std::vector<std::vector<int32_t>> stacks(static_cast<size_t>(c.stacks));
  std::vector<size_t> filled;  // the stacks that are not empty, in no order
  std::vector<size_t> place(stacks.size());
  size_t at = 0;
  const auto put = [&](int32_t token) {
    if (at < tokens.size()) tokens[at] = token;
    ++at;
  };
  while (at < tokens.size()) {
    const bool pop = draws.below(2) == 1 && !filled.empty();
    const size_t s = pop ? filled[draws.below(filled.size())] : draws.below(stacks.size());
    put(pop ? stack::kPop : stack::kPush);
    put(stack::kFirstStack + static_cast<int32_t>(s));
    if (!pop) {
      if (stacks[s].empty()) {
        place[s] = filled.size();
        filled.push_back(s);
      }
      stacks[s].push_back(element(stack::kFirstStack + c.stacks, c.vocabulary, draws));
      put(stacks[s].back());
      continue;
    }
    if (at <= tokens.size()) labels[at - 1] = stacks[s].back();
    put(stacks[s].back());
    stacks[s].pop_back();
    if (stacks[s].empty()) {
      place[filled.back()] = place[s];
      std::swap(filled[place[s]], filled.back());
      filled.pop_back();
    }
  }
}

void check_range(std::string_view key, int64_t found, int64_t low, int64_t high, std::string_view why = {}) {
  check(found >= low && found <= high, "{}: found {}, expected {} to {}{}{}", key, found, low, high,
        why.empty() ? "" : " ", why);
}

void check_even(const SyntheticConfig& c) {
  check(c.length % 2 == 0, "length: found {}, expected an even number for {}", c.length,
        synthetic_name(c.kind));
}

void check_mqar(const SyntheticConfig& c) {
  check_even(c);
  check_range("vocabulary", c.vocabulary, 4, kMaxVocabulary, "for mqar");
  const int64_t most = std::min({c.length / 4, c.vocabulary / 2 - 1, c.vocabulary - c.vocabulary / 2});
  check(c.kv_pairs >= 1 && c.kv_pairs <= most,
        "kv_pairs: found {}, expected 1 to {}: a pair takes 4 of the {} tokens, and of the vocabulary of {} "
        "{} are "
        "keys",
        c.kv_pairs, most, c.length, c.vocabulary, c.vocabulary / 2 - 1);
  check(c.power > 0 && c.power <= 1, "power: found {}, expected a number above 0, up to 1", c.power);
}

// Integers, so that no later step rounds: libm's last bit could matter only where 2^32 j^(a-1) lies within
// some 2^-20 of a half.
std::vector<uint64_t> power_law(const SyntheticConfig& c) {
  std::vector<uint64_t> weights(static_cast<size_t>((c.length - 2 * c.kv_pairs) / 2));
  for (size_t i = 0; i < weights.size(); ++i) {
    const double share = std::pow(static_cast<double>(i + 1), c.power - 1);
    weights[i] = static_cast<uint64_t>(std::floor(share * 0x1p32 + 0.5));
  }
  return weights;
}

}  // namespace

SyntheticKind synthetic_kind(std::string_view name, std::string_view key) {
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  check(found != kNames.end(), "{}: found '{}', expected palindrome, mqar or stack", key, name);
  return static_cast<SyntheticKind>(found - kNames.begin());
}

std::string_view synthetic_name(SyntheticKind kind) { return kNames[static_cast<size_t>(kind)]; }

SyntheticTask::SyntheticTask(const SyntheticConfig& config) : config_(config) {
  SyntheticConfig& c = config_;
  switch (c.kind) {
    case SyntheticKind::kPalindrome:
      check_range("length", c.length, 2, kMaxLength, "for palindrome");
      check_even(c);
      check_range("vocabulary", c.vocabulary, 3, kMaxVocabulary, "for palindrome: <sep> and two elements");
      break;
    case SyntheticKind::kMqar:
      check_range("length", c.length, 4, kMaxLength, "for mqar");
      if (c.kv_pairs == 0) c.kv_pairs = std::max<int64_t>(c.length / 8, 1);
      check_mqar(c);
      gap_weights_ = power_law(c);
      break;
    case SyntheticKind::kStack:
      check_range("length", c.length, 5, kMaxLength, "for stack: a push and a pop");
      check_range("stacks", c.stacks, 1, kMaxVocabulary - 4);
      check_range("vocabulary", c.vocabulary, c.stacks + 4, kMaxVocabulary,
                  "for stack: <push>, <pop>, the stacks' names and two elements");
      break;
  }
}

void SyntheticTask::fill(Split split, uint64_t index, std::span<int32_t> tokens,
                         std::span<int32_t> labels) const {
  KILIN_ASSERT(static_cast<int64_t>(tokens.size()) == config_.length && labels.size() == tokens.size());
  for (uint64_t attempt = 0; attempt < kMaxDraws; ++attempt) {
    std::fill(labels.begin(), labels.end(), kNotCounted);
    Draws draws(config_.seed, static_cast<uint64_t>(config_.kind) * 2 + static_cast<uint64_t>(split), index,
                attempt);
    switch (config_.kind) {
      case SyntheticKind::kPalindrome:
        fill_palindrome(config_, draws, tokens, labels);
        break;
      case SyntheticKind::kMqar:
        fill_mqar(config_, gap_weights_, draws, tokens, labels);
        break;
      case SyntheticKind::kStack:
        fill_stack(config_, draws, tokens, labels);
        break;
    }
    const bool held_out = content_hash(tokens) % kSplits == 0;
    const bool counted =
        std::any_of(labels.begin(), labels.end(), [](int32_t x) { return x != kNotCounted; });
    if (held_out == (split == Split::kHeldOut) && counted) return;
  }
  fail("{} of length {} and vocabulary {}: found no {} example in {} draws, expected a larger task",
       synthetic_name(config_.kind), config_.length, config_.vocabulary,
       split == Split::kTrain ? "training" : "held-out", kMaxDraws);
}

SyntheticExample SyntheticTask::example(Split split, uint64_t index) const {
  SyntheticExample e;
  e.tokens.resize(static_cast<size_t>(config_.length));
  e.labels.resize(e.tokens.size());
  fill(split, index, e.tokens, e.labels);
  return e;
}

}  // namespace kilin::eval
