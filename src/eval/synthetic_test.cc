// SPDX-License-Identifier: Apache-2.0
#include "eval/synthetic.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <map>
#include <set>
#include <thread>

#include "base/error.h"

namespace kilin::eval {
namespace {

using Ids = std::vector<int32_t>;

constexpr Split kBoth[] = {Split::kTrain, Split::kHeldOut};

SyntheticConfig config(SyntheticKind kind, int64_t length, int64_t vocabulary, uint64_t seed = 1) {
  SyntheticConfig c;
  c.kind = kind;
  c.length = length;
  c.vocabulary = vocabulary;
  c.seed = seed;
  return c;
}

// Plain programs that solve the tasks: the prediction after tokens[0, i], for a labelled i.
int32_t solve_palindrome(const Ids& tokens, size_t i) {
  size_t separator = 0;
  while (tokens[separator] != palindrome::kSeparator) ++separator;
  return tokens[separator - 1 - (i - separator)];
}

int32_t solve_mqar(const Ids& tokens, size_t i, int64_t pairs) {
  for (size_t j = 0; j < static_cast<size_t>(pairs); ++j) {
    if (tokens[2 * j] == tokens[i]) return tokens[2 * j + 1];
  }
  return kNotCounted;
}

int32_t solve_stack(const Ids& tokens, size_t i) {
  std::map<int32_t, Ids> stacks;
  for (size_t at = 0; at + 2 < i; at += 3) {
    Ids& s = stacks[tokens[at + 1]];
    if (tokens[at] == stack::kPush) {
      s.push_back(tokens[at + 2]);
    } else {
      EXPECT_FALSE(s.empty());
      EXPECT_EQ(tokens[at + 2], s.back());
      s.pop_back();
    }
  }
  EXPECT_EQ(tokens[i - 1], stack::kPop);
  return stacks[tokens[i]].empty() ? kNotCounted : stacks[tokens[i]].back();
}

int32_t solve(const SyntheticConfig& c, const Ids& tokens, size_t i) {
  switch (c.kind) {
    case SyntheticKind::kPalindrome:
      return solve_palindrome(tokens, i);
    case SyntheticKind::kMqar:
      return solve_mqar(tokens, i, c.kv_pairs);
    default:
      return solve_stack(tokens, i);
  }
}

TEST(SyntheticTask, a_plain_program_solves_every_label) {
  SyntheticConfig dense = config(SyntheticKind::kMqar, 64, 64);
  dense.kv_pairs = 16;  // a query at every place
  SyntheticConfig few = config(SyntheticKind::kStack, 301, 40);
  few.stacks = 2;
  SyntheticConfig plain = config(SyntheticKind::kMqar, 128, 300);
  plain.random_filler = false;
  for (const SyntheticConfig& c :
       {config(SyntheticKind::kPalindrome, 256, 64), config(SyntheticKind::kPalindrome, 2048, 8192),
        config(SyntheticKind::kMqar, 256, 8192), config(SyntheticKind::kMqar, 2048, 8192), dense, plain,
        config(SyntheticKind::kStack, 256, 256), config(SyntheticKind::kStack, 2047, 512), few}) {
    const SyntheticTask task(c);
    for (const Split split : kBoth) {
      for (uint64_t index = 0; index < 20; ++index) {
        const auto [tokens, labels] = task.example(split, index);
        ASSERT_EQ(static_cast<int64_t>(tokens.size()), c.length);
        int64_t counted = 0;
        for (size_t i = 0; i < tokens.size(); ++i) {
          ASSERT_TRUE(tokens[i] >= 0 && tokens[i] < c.vocabulary);
          if (labels[i] == kNotCounted) continue;
          ++counted;
          ASSERT_EQ(labels[i], solve(task.config(), tokens, i))
              << synthetic_name(c.kind) << " " << index << " " << i;
        }
        if (c.kind == SyntheticKind::kPalindrome) {
          EXPECT_EQ(counted, c.length / 2);
        }
        if (c.kind == SyntheticKind::kMqar) {
          EXPECT_EQ(counted, task.config().kv_pairs);
        }
        EXPECT_GE(counted, 1);
      }
    }
  }
}

// Where the next token is the answer (palindrome, stack), the label is that token.
TEST(SyntheticTask, labels_are_aligned_with_the_next_token) {
  for (const SyntheticKind kind : {SyntheticKind::kPalindrome, SyntheticKind::kStack}) {
    const auto [tokens, labels] = SyntheticTask(config(kind, 200, 100)).example(Split::kTrain, 3);
    for (size_t i = 0; i + 1 < tokens.size(); ++i) {
      if (labels[i] != kNotCounted) {
        EXPECT_EQ(labels[i], tokens[i + 1]);
      }
    }
  }
}

TEST(SyntheticTask, mqar_has_zoologys_layout) {
  SyntheticConfig c = config(SyntheticKind::kMqar, 128, 512);
  c.random_filler = false;
  const SyntheticTask task(c);
  EXPECT_EQ(task.config().kv_pairs, 16);
  for (uint64_t index = 0; index < 50; ++index) {
    const auto [tokens, labels] = task.example(Split::kTrain, index);
    std::set<int32_t> keys, values, asked;
    for (size_t i = 0; i < 32; i += 2) {
      EXPECT_TRUE(tokens[i] >= 1 && tokens[i] < 256 && keys.insert(tokens[i]).second);
      EXPECT_TRUE(tokens[i + 1] >= 256 && values.insert(tokens[i + 1]).second);
    }
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (labels[i] == kNotCounted) {
        if (i >= 32) {
          EXPECT_EQ(tokens[i], 0);
        }
        continue;
      }
      EXPECT_TRUE(i >= 32 && i % 2 == 0);
      EXPECT_TRUE(asked.insert(tokens[i]).second);
    }
    EXPECT_EQ(asked, keys);
  }
}

// The place of a single pair's query is distributed as p(j) ~ j^(a-1).
TEST(SyntheticTask, mqar_gaps_follow_the_power_law) {
  SyntheticConfig c = config(SyntheticKind::kMqar, 66, 8192);
  c.kv_pairs = 1;
  const SyntheticTask task(c);
  constexpr int kExamples = 40000;
  constexpr size_t kPlaces = 32;
  std::vector<int> counts(kPlaces, 0);
  Ids tokens(66), labels(66);
  for (uint64_t index = 0; index < kExamples; ++index) {
    task.fill(Split::kTrain, index, tokens, labels);
    for (size_t i = 2; i < 66; ++i) counts[(i - 2) / 2] += labels[i] != kNotCounted ? 1 : 0;
  }
  double sum = 0;
  for (size_t j = 1; j <= kPlaces; ++j) sum += std::pow(static_cast<double>(j), -0.99);
  double chi_squared = 0;
  for (size_t j = 1; j <= kPlaces; ++j) {
    const double expected = kExamples * std::pow(static_cast<double>(j), -0.99) / sum;
    chi_squared += (counts[j - 1] - expected) * (counts[j - 1] - expected) / expected;
  }
  EXPECT_LT(chi_squared, 62);  // 31 degrees of freedom: p = 0.001
}

// No weight lies so close to a rounding edge that another libm could choose the other side.
TEST(SyntheticTask, mqar_weights_do_not_depend_on_libm) {
  for (int j = 1; j <= 4096; ++j) {
    const double scaled = std::pow(static_cast<double>(j), 0.01 - 1) * 0x1p32;
    EXPECT_GT(std::fabs(scaled - std::floor(scaled) - 0.5), 1e-5) << j;
  }
}

// Which tokens come for which seed must never change: checkpoints are trained and judged on them. The values
// are those of an independent program (Python integers).
TEST(SyntheticTask, examples_are_the_same_for_ever) {
  const auto first = [](SyntheticConfig c, Split split, uint64_t index) {
    const auto e = SyntheticTask(c).example(split, index);
    Ids both = e.tokens;
    both.insert(both.end(), e.labels.begin(), e.labels.end());
    return both;
  };
  SyntheticConfig stacks = config(SyntheticKind::kStack, 13, 16, 7);
  stacks.stacks = 3;
  EXPECT_EQ(first(config(SyntheticKind::kPalindrome, 8, 100, 7), Split::kTrain, 5),
            (Ids{27, 40, 49, 30, 0, 30, 49, 40, -1, -1, -1, -1, 30, 49, 40, 27}));
  EXPECT_EQ(first(config(SyntheticKind::kMqar, 16, 64, 7), Split::kHeldOut, 5),
            (Ids{30, 57, 3,  39, 30, 33, 26, 30, 3,  43, 14, 60, 45, 25, 29, 31,
                 -1, -1, -1, -1, 57, -1, -1, -1, 39, -1, -1, -1, -1, -1, -1, -1}));
  EXPECT_EQ(first(stacks, Split::kTrain, 5), (Ids{0,  3,  5,  1,  3, 5,  0,  4,  12, 0,  4,  15, 0,
                                                  -1, -1, -1, -1, 5, -1, -1, -1, -1, -1, -1, -1, -1}));
}

TEST(SyntheticTask, examples_do_not_depend_on_threads) {
  const SyntheticTask task(config(SyntheticKind::kStack, 128, 100));
  std::vector<SyntheticExample> expected;
  for (uint64_t i = 0; i < 64; ++i) expected.push_back(task.example(Split::kTrain, i));
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (uint64_t i = 64; i-- > 0;) {
        if (i % 4 == t) {
          EXPECT_EQ(task.example(Split::kTrain, i).tokens, expected[i].tokens);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Even where nearly every example that exists is drawn many times (6^3 of them).
TEST(SyntheticTask, splits_share_no_example_under_any_seed) {
  std::set<Ids> train, held_out;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const SyntheticTask task(config(SyntheticKind::kPalindrome, 6, 7, seed));
    for (uint64_t i = 0; i < 100; ++i) {
      train.insert(task.example(Split::kTrain, i).tokens);
      held_out.insert(task.example(Split::kHeldOut, i).tokens);
    }
  }
  for (const Ids& tokens : held_out) EXPECT_FALSE(train.contains(tokens));
  EXPECT_EQ(train.size() + held_out.size(), 216u);
}

TEST(SyntheticTask, seeds_and_indices_give_different_examples) {
  std::set<Ids> seen;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    const SyntheticTask task(config(SyntheticKind::kPalindrome, 64, 64, seed));
    for (uint64_t i = 0; i < 100; ++i) EXPECT_TRUE(seen.insert(task.example(Split::kTrain, i).tokens).second);
  }
}

std::string refusal(const std::function<void(SyntheticConfig&)>& change, SyntheticKind kind) {
  SyntheticConfig c = config(kind, 64, 256);
  change(c);
  try {
    SyntheticTask(c).example(Split::kTrain, 0);
  } catch (const Error& error) {
    return error.what();
  }
  return "accepted";
}

TEST(SyntheticTask, impossible_settings_are_named) {
  using C = SyntheticConfig&;
  const auto palindrome = SyntheticKind::kPalindrome;
  const auto mqar = SyntheticKind::kMqar;
  const auto stacks = SyntheticKind::kStack;
  EXPECT_EQ(refusal([](C) {}, mqar), "accepted");
  EXPECT_EQ(refusal([](C c) { c.length = 63; }, palindrome),
            "length: found 63, expected an even number for palindrome");
  EXPECT_EQ(refusal([](C c) { c.length = 0; }, palindrome),
            "length: found 0, expected 2 to 1048576 for palindrome");
  EXPECT_EQ(refusal([](C c) { c.vocabulary = 2; }, palindrome),
            "vocabulary: found 2, expected 3 to 1048576 for palindrome: <sep> and two elements");
  EXPECT_EQ(
      refusal([](C c) { c.kv_pairs = 17; }, mqar),
      "kv_pairs: found 17, expected 1 to 16: a pair takes 4 of the 64 tokens, and of the vocabulary of 256 "
      "127 are keys");
  EXPECT_EQ(refusal([](C c) { c.vocabulary = 16; }, mqar),
            "kv_pairs: found 8, expected 1 to 7: a pair takes 4 of the 64 tokens, and of the vocabulary of "
            "16 7 are "
            "keys");
  EXPECT_EQ(refusal([](C c) { c.power = 0; }, mqar), "power: found 0, expected a number above 0, up to 1");
  EXPECT_EQ(refusal([](C c) { c.power = std::nan(""); }, mqar),
            "power: found nan, expected a number above 0, up to 1");
  EXPECT_EQ(refusal([](C c) { c.stacks = 0; }, stacks), "stacks: found 0, expected 1 to 1048572");
  EXPECT_EQ(
      refusal([](C c) { c.vocabulary = 67; }, stacks),
      "vocabulary: found 67, expected 68 to 1048576 for stack: <push>, <pop>, the stacks' names and two "
      "elements");
  EXPECT_THROW(synthetic_kind("copy", "task"), Error);
  EXPECT_EQ(synthetic_kind("mqar", "task"), SyntheticKind::kMqar);
}

// One element pair and length 2: the only examples are (1, <sep>) and (2, <sep>).
TEST(SyntheticTask, says_when_a_split_is_empty) {
  const SyntheticTask task(config(SyntheticKind::kPalindrome, 2, 3));
  EXPECT_THROW(
      {
        task.example(Split::kTrain, 0);
        task.example(Split::kHeldOut, 0);
      },
      Error);
}

}  // namespace
}  // namespace kilin::eval
