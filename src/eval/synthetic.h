// SPDX-License-Identifier: Apache-2.0
// Synthetic tasks that ask a sequence model for exact memory (Kimi Linear, arXiv 2510.26692, section 5.1).
//
//   palindrome  x1 ... xn <sep> xn ... x2        reverse what stood before <sep>
//   mqar        k1 v1 ... kn vn  . k2 . . k1 .   multi-query associative recall: the value of each key asked
//               for, as in Zoology (arXiv 2312.04927): keys from [1, V/2), values from [V/2, V), all
//               different; the first element of a pair of positions behind the pairs may be a query; pair j
//               (counted from 1) is one with a probability that falls as p(j) ~ a j^(a-1)
//   stack       <push> s x, <pop> s x            several stacks at once: what comes off stack s
//
// An example depends on the configuration, the split and its index alone: not on the threads or the machine.
// Examples of one split never occur in the other, whatever their seeds and indices.
#pragma once
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace kilin::eval {

enum class SyntheticKind { kPalindrome, kMqar, kStack };

inline constexpr int32_t kNotCounted = -1;

struct SyntheticConfig {
  SyntheticKind kind = SyntheticKind::kPalindrome;
  int64_t length = 256;       // tokens of an example; even for palindrome and mqar
  int64_t vocabulary = 8192;  // token ids are 0 to vocabulary - 1
  int64_t kv_pairs = 0;       // mqar: keys, each asked for once; 0: length / 8, at least 1
  double power = 0.01;        // mqar: a of the power law; 1: uniform
  bool random_filler = true;  // mqar: what is no query is any token, else token 0
  int64_t stacks = 64;        // stack
  uint64_t seed = 0;
};

enum class Split { kTrain, kHeldOut };

struct SyntheticExample {
  std::vector<int32_t> tokens;  // [length]
  // [length]: what the model must predict after tokens[i], so nothing is to be shifted; kNotCounted: nothing
  std::vector<int32_t> labels;
};

// "palindrome", "mqar" or "stack"; Error naming `key` for another name.
SyntheticKind synthetic_kind(std::string_view name, std::string_view key);
std::string_view synthetic_name(SyntheticKind kind);

class SyntheticTask {
 public:
  // Throws Error "KEY: found ..., expected ..." for a configuration that no example can have.
  explicit SyntheticTask(const SyntheticConfig& config);

  // With defaults filled in.
  const SyntheticConfig& config() const { return config_; }

  // Writes example `index` to tokens[length] and labels[length]. At least one label counts. Thread-safe.
  // Throws Error when the split has no example (tiny vocabularies and lengths).
  void fill(Split split, uint64_t index, std::span<int32_t> tokens, std::span<int32_t> labels) const;
  SyntheticExample example(Split split, uint64_t index) const;

 private:
  SyntheticConfig config_;
  std::vector<uint64_t> gap_weights_;  // mqar: a Fenwick tree of the integer weights of the places of queries
};

// The ids of the tokens that mean something; elements are the ids from `first_element` on.
namespace palindrome {
inline constexpr int32_t kSeparator = 0;
inline constexpr int32_t kFirstElement = 1;
}  // namespace palindrome
namespace stack {
inline constexpr int32_t kPush = 0;
inline constexpr int32_t kPop = 1;
inline constexpr int32_t kFirstStack = 2;  // then `stacks` names, then the elements
}  // namespace stack

}  // namespace kilin::eval
