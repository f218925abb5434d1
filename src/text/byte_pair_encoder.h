// SPDX-License-Identifier: Apache-2.0
// Byte-pair encoding of one piece: the neighbours whose merge has the lowest rank become one token, the
// leftmost first among equals, until no merge is left.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "text/vocabulary.h"

namespace kilin::text {

struct Merge {
  int32_t left, right, result;
  int32_t rank;
};

class MergeTable {
 public:
  struct Found {
    int32_t rank, result;
  };
  static constexpr Found kNone = {INT32_MAX, -1};

  explicit MergeTable(std::span<const Merge> merges);  // of two merges of the same pair the later one holds
  Found find(int32_t left, int32_t right) const;

 private:
  struct Slot {
    uint64_t pair = kNoPair;
    Found found = kNone;
  };
  static constexpr uint64_t kNoPair = UINT64_MAX;
  static size_t hash(uint64_t pair);

  std::vector<Slot> slots_;  // open addressing, a power of two
};

// The merges that a tiktoken vocabulary implies: every way to cut a token into two tokens, ranked by the
// token's id.
std::vector<Merge> merges_of_ranked_vocabulary(const Vocabulary& vocabulary);

class BytePairEncoder {
 public:
  // Error when one of the 256 bytes has no token. whole_first: a piece that is a token is taken as it is,
  // without asking whether merges lead there (tiktoken, and ignore_merges of tokenizers).
  BytePairEncoder(std::shared_ptr<const Vocabulary> vocabulary, std::span<const Merge> merges,
                  bool whole_first);

  void encode(std::string_view piece, std::vector<int32_t>& ids) const;

 private:
  void encode_short(std::string_view piece, std::vector<int32_t>& ids) const;
  void encode_long(std::string_view piece, std::vector<int32_t>& ids) const;

  std::shared_ptr<const Vocabulary> vocabulary_;
  MergeTable merges_;
  bool whole_first_;
  std::array<int32_t, 256> id_of_byte_;
};

}  // namespace kilin::text
