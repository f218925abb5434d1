// SPDX-License-Identifier: Apache-2.0
#include "text/vocabulary.h"

#include <bit>
#include <cstring>

#include "base/error.h"

namespace kilin::text {
namespace {

uint64_t mix(uint64_t value) {  // the finaliser of splitmix64
  value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9u;
  value = (value ^ value >> 27) * 0x94D049BB133111EBu;
  return value ^ value >> 31;
}

uint64_t hash_bytes(std::string_view bytes) {
  uint64_t hash = bytes.size();
  while (bytes.size() >= 8) {
    uint64_t word;
    std::memcpy(&word, bytes.data(), 8);
    hash = mix(hash ^ word);
    bytes.remove_prefix(8);
  }
  uint64_t word = 0;
  std::memcpy(&word, bytes.data(), bytes.size());
  return mix(hash * 0x9E3779B97F4A7C15u ^ word);
}

}  // namespace

Vocabulary::Vocabulary(std::span<const std::string> tokens) {
  offsets_.reserve(tokens.size() + 1);
  offsets_.push_back(0);
  for (const std::string& token : tokens) {
    bytes_ += token;
    offsets_.push_back(bytes_.size());
  }
  slots_.resize(std::bit_ceil(2 * tokens.size() + 1));
  for (int32_t id = 0; id < size(); ++id) {
    if (!tokens[static_cast<size_t>(id)].empty()) insert(id);
  }
}

void Vocabulary::insert(int32_t id) {
  const uint64_t hash = hash_bytes(bytes(id));
  for (size_t at = hash;; ++at) {
    Slot& slot = slots_[at & (slots_.size() - 1)];
    if (slot.id < 0) {
      slot = {static_cast<uint32_t>(hash >> 32), id};
      return;
    }
    check(bytes(slot.id) != bytes(id), "tokens {} and {} have the same bytes", slot.id, id);
  }
}

int32_t Vocabulary::find(std::string_view wanted) const {
  const uint64_t hash = hash_bytes(wanted);
  for (size_t at = hash;; ++at) {
    const Slot& slot = slots_[at & (slots_.size() - 1)];
    if (slot.id < 0) return -1;
    if (slot.tag == static_cast<uint32_t>(hash >> 32) && bytes(slot.id) == wanted) return slot.id;
  }
}

}  // namespace kilin::text
