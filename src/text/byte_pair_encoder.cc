// SPDX-License-Identifier: Apache-2.0
#include "text/byte_pair_encoder.h"

#include <algorithm>
#include <bit>
#include <queue>

#include "base/error.h"

namespace kilin::text {
namespace {

constexpr size_t kShortPiece = 48;  // up to here, scanning an array beats keeping a heap

uint64_t pair_of(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

// A piece as a linked list of tokens, with a heap of the merges that its neighbours allow: n log n for any
// piece.
class MergeList {
 public:
  MergeList(std::string_view piece, const std::array<int32_t, 256>& id_of_byte, const MergeTable& merges)
      : merges_(merges), nodes_(piece.size()) {
    for (size_t i = 0; i < piece.size(); ++i) {
      const auto at = static_cast<uint32_t>(i);
      nodes_[i] = {id_of_byte[static_cast<uint8_t>(piece[i])], at - 1, at + 1, MergeTable::kNone};
    }
    for (uint32_t at = 0; at + 1 < nodes_.size(); ++at) look_up(at);
  }

  void run() {
    while (!heap_.empty()) {
      const Candidate best = heap_.top();
      heap_.pop();
      if (nodes_[best.at].merge.rank == best.rank) merge(best.at);  // else its neighbours have changed since
    }
  }

  void append_to(std::vector<int32_t>& ids) const {
    for (uint32_t at = 0; at < nodes_.size(); at = nodes_[at].next) ids.push_back(nodes_[at].id);
  }

 private:
  struct Node {
    int32_t id;
    uint32_t previous, next;  // nodes_.size() after the last, wrapped below 0 before the first
    MergeTable::Found merge;  // with the next node
  };
  struct Candidate {
    int32_t rank;
    uint32_t at;
    bool operator>(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : at > other.at;
    }
  };

  void look_up(uint32_t at) {
    Node& node = nodes_[at];
    node.merge = node.next < nodes_.size() ? merges_.find(node.id, nodes_[node.next].id) : MergeTable::kNone;
    if (node.merge.result >= 0) heap_.push({node.merge.rank, at});
  }

  void merge(uint32_t at) {
    Node& node = nodes_[at];
    Node& gone = nodes_[node.next];
    gone.merge = MergeTable::kNone;
    node.id = node.merge.result;
    node.next = gone.next;
    if (node.next < nodes_.size()) nodes_[node.next].previous = at;
    look_up(at);
    if (node.previous < nodes_.size()) look_up(node.previous);
  }

  const MergeTable& merges_;
  std::vector<Node> nodes_;
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> heap_;
};

}  // namespace

MergeTable::MergeTable(std::span<const Merge> merges) : slots_(std::bit_ceil(2 * merges.size() + 1)) {
  for (const Merge& merge : merges) {
    const uint64_t pair = pair_of(merge.left, merge.right);
    size_t at = hash(pair);
    while (slots_[at & (slots_.size() - 1)].pair != kNoPair &&
           slots_[at & (slots_.size() - 1)].pair != pair) {
      ++at;
    }
    slots_[at & (slots_.size() - 1)] = {pair, {merge.rank, merge.result}};
  }
}

size_t MergeTable::hash(uint64_t pair) {
  const uint64_t product = (pair ^ pair >> 29) * 0x9E3779B97F4A7C15u;
  return product ^ product >> 32;
}

MergeTable::Found MergeTable::find(int32_t left, int32_t right) const {
  const uint64_t pair = pair_of(left, right);
  for (size_t at = hash(pair);; ++at) {
    const Slot& slot = slots_[at & (slots_.size() - 1)];
    if (slot.pair == pair) return slot.found;
    if (slot.pair == kNoPair) return kNone;
  }
}

std::vector<Merge> merges_of_ranked_vocabulary(const Vocabulary& vocabulary) {
  std::vector<Merge> merges;
  for (int32_t id = 0; id < vocabulary.size(); ++id) {
    const std::string_view token = vocabulary.bytes(id);
    for (size_t cut = 1; cut < token.size(); ++cut) {
      const int32_t left = vocabulary.find(token.substr(0, cut));
      const int32_t right = left < 0 ? -1 : vocabulary.find(token.substr(cut));
      if (right >= 0) merges.push_back({left, right, id, id});
    }
  }
  return merges;
}

BytePairEncoder::BytePairEncoder(std::shared_ptr<const Vocabulary> vocabulary, std::span<const Merge> merges,
                                 bool whole_first)
    : vocabulary_(std::move(vocabulary)), merges_(merges), whole_first_(whole_first) {
  for (int byte = 0; byte < 256; ++byte) {
    const char c = static_cast<char>(byte);
    const int32_t id = vocabulary_->find({&c, 1});
    check(id >= 0, "vocabulary: no token for byte 0x{:02X}, expected one for each of the 256 bytes", byte);
    id_of_byte_[static_cast<size_t>(byte)] = id;
  }
}

void BytePairEncoder::encode(std::string_view piece, std::vector<int32_t>& ids) const {
  if (whole_first_) {
    const int32_t id = vocabulary_->find(piece);
    if (id >= 0) {
      ids.push_back(id);
      return;
    }
  }
  check(piece.size() < INT32_MAX, "text: a piece of {} bytes, expected less than 2 GiB", piece.size());
  if (piece.size() <= kShortPiece) {
    encode_short(piece, ids);
  } else {
    encode_long(piece, ids);
  }
}

void BytePairEncoder::encode_short(std::string_view piece, std::vector<int32_t>& ids) const {
  std::array<int32_t, kShortPiece> id;
  std::array<MergeTable::Found, kShortPiece> merge;  // of each token with the next
  size_t n = piece.size();
  for (size_t i = 0; i < n; ++i) id[i] = id_of_byte_[static_cast<uint8_t>(piece[i])];
  for (size_t i = 0; i + 1 < n; ++i) merge[i] = merges_.find(id[i], id[i + 1]);
  while (n > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < n; ++i) {
      if (merge[i].rank < merge[best].rank) best = i;
    }
    if (merge[best].result < 0) break;
    id[best] = merge[best].result;
    std::copy(id.begin() + best + 2, id.begin() + n, id.begin() + best + 1);
    std::copy(merge.begin() + best + 1, merge.begin() + n - 1, merge.begin() + best);
    --n;
    if (best + 1 < n) merge[best] = merges_.find(id[best], id[best + 1]);
    if (best > 0) merge[best - 1] = merges_.find(id[best - 1], id[best]);
  }
  ids.insert(ids.end(), id.begin(), id.begin() + n);
}

void BytePairEncoder::encode_long(std::string_view piece, std::vector<int32_t>& ids) const {
  MergeList list(piece, id_of_byte_, merges_);
  list.run();
  list.append_to(ids);
}

}  // namespace kilin::text
