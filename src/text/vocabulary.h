// SPDX-License-Identifier: Apache-2.0
// The bytes of each token id, and the way back.
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kilin::text {

class Vocabulary {
 public:
  // tokens[id]: the bytes; an empty one is a hole, an id without a token. Error for two ids of the same
  // bytes.
  explicit Vocabulary(std::span<const std::string> tokens);

  int32_t size() const { return static_cast<int32_t>(offsets_.size()) - 1; }  // 1 + the highest id
  std::string_view bytes(int32_t id) const {
    return {bytes_.data() + offsets_[static_cast<size_t>(id)],
            offsets_[static_cast<size_t>(id) + 1] - offsets_[static_cast<size_t>(id)]};
  }
  // -1 when there is none.
  int32_t find(std::string_view bytes) const;

 private:
  struct Slot {
    uint32_t tag = 0;  // other half of the hash: spares most comparisons
    int32_t id = -1;
  };
  void insert(int32_t id);

  std::string bytes_;
  std::vector<size_t> offsets_;
  std::vector<Slot> slots_;  // open addressing, a power of two
};

}  // namespace kilin::text
