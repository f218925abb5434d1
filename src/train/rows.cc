// SPDX-License-Identifier: Apache-2.0
#include "train/rows.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "train/permutation.h"

namespace kilin::train {
namespace {

class FileStream : public TokenStream {
 public:
  explicit FileStream(TokenFile file) : file_(std::move(file)) {}
  uint64_t tokens() const override { return file_.tokens(); }
  void read(uint64_t first, size_t count, int32_t* out) const override { file_.read(first, count, out); }

 private:
  TokenFile file_;
};

class MemoryStream : public TokenStream {
 public:
  explicit MemoryStream(std::vector<int32_t> ids) : ids_(std::move(ids)) {}
  uint64_t tokens() const override { return ids_.size(); }
  void read(uint64_t first, size_t count, int32_t* out) const override {
    std::copy_n(ids_.begin() + static_cast<std::ptrdiff_t>(first), count, out);
  }

 private:
  std::vector<int32_t> ids_;
};

}  // namespace

std::unique_ptr<TokenStream> stream_of(TokenFile file) {
  return std::make_unique<FileStream>(std::move(file));
}

std::unique_ptr<TokenStream> stream_of(std::vector<int32_t> ids) {
  return std::make_unique<MemoryStream>(std::move(ids));
}

void PackedRows::end_sequence() {
  const auto end = static_cast<int32_t>(tokens.size());
  if (end > cu_seqlens.back()) cu_seqlens.push_back(end);
}

int64_t PackedRows::counted() const {
  return std::count_if(labels.begin(), labels.end(), [](int32_t label) { return label != kNoLabel; });
}

void append_training_row(const RowSource& source, uint64_t seed, uint64_t number, PackedRows& out) {
  const uint64_t rows = source.rows();
  if (rows == kEndlessRows) return source.append(number, out);
  const uint64_t pass = number / rows;
  source.append(Permutation(rows, mix_bits(seed ^ mix_bits(pass)))(number % rows), out);
}

StreamRows::StreamRows(std::vector<std::unique_ptr<TokenStream>> streams, int64_t length,
                       bool split_documents, int32_t bos_id, int32_t eos_id, const std::string& name)
    : streams_(std::move(streams)),
      first_rows_{0},
      length_(length),
      split_documents_(split_documents),
      bos_id_(bos_id),
      eos_id_(eos_id) {
  uint64_t tokens = 0;
  for (const auto& stream : streams_) {
    const uint64_t found = stream->tokens();
    const uint64_t windows = found == 0 ? 0 : (found - 1) / static_cast<uint64_t>(length);
    first_rows_.push_back(first_rows_.back() + windows);
    tokens += found;
  }
  check(rows() > 0, "{}: found {} tokens, expected at least {} (a row and the token behind it)", name, tokens,
        length + 1);
  check(!split_documents || bos_id >= 0 || eos_id >= 0,
        "{}: the text has neither [BOS] nor [EOS], by which packing = \"documents\" parts it", name);
}

void StreamRows::append(uint64_t row, PackedRows& out) const {
  const auto after = std::upper_bound(first_rows_.begin(), first_rows_.end(), row);
  const auto stream = static_cast<size_t>(after - first_rows_.begin()) - 1;
  const auto length = static_cast<size_t>(length_);
  std::vector<int32_t> ids(length + 1);
  streams_[stream]->read((row - first_rows_[stream]) * static_cast<uint64_t>(length_), length + 1,
                         ids.data());
  for (size_t i = 0; i < length; ++i) {
    out.tokens.push_back(ids[i]);
    const bool ends = split_documents_ && (bos_id_ >= 0 ? ids[i + 1] == bos_id_ : ids[i] == eos_id_);
    out.labels.push_back(ends ? kNoLabel : ids[i + 1]);
    if (ends) out.end_sequence();
  }
  out.end_sequence();
}

SyntheticRows::SyntheticRows(const eval::SyntheticConfig& config, eval::Split split, uint64_t rows,
                             const std::vector<int64_t>& examples)
    : row_length_(config.length), split_(split), rows_(rows) {
  const eval::SyntheticConfig whole = eval::SyntheticTask(config).config();
  for (const int64_t count : examples.empty() ? std::vector<int64_t>{1} : examples) {
    check(count > 0 && row_length_ % count == 0,
          "examples_per_row: found {}, expected a divisor of the {} tokens of a row", count, row_length_);
    eval::SyntheticConfig part = whole;
    part.length = row_length_ / count;
    part.kv_pairs = std::max<int64_t>(1, whole.kv_pairs / count);
    tasks_.emplace_back(part);
  }
}

void SyntheticRows::append(uint64_t row, PackedRows& out) const {
  const eval::SyntheticTask& task = tasks_[row % tasks_.size()];
  const auto length = static_cast<size_t>(task.config().length);
  const auto examples = static_cast<uint64_t>(row_length_ / task.config().length);
  for (uint64_t i = 0; i < examples; ++i) {
    const size_t begin = out.tokens.size();
    out.tokens.resize(begin + length);
    out.labels.resize(begin + length);
    task.fill(split_, row * examples + i, std::span(out.tokens).subspan(begin),
              std::span(out.labels).subspan(begin));
    out.end_sequence();
  }
}

PackedSequences::PackedSequences(std::vector<LabelledSequence> sequences, int64_t length, uint64_t seed)
    : first_{0} {
  const size_t limit = static_cast<size_t>(length);
  const Permutation order(std::max<size_t>(1, sequences.size()), mix_bits(seed ^ 0x7061636bULL));
  size_t filled = 0;
  for (size_t i = 0; i < sequences.size(); ++i) {
    LabelledSequence sequence = std::move(sequences[order(i)]);
    if (sequence.tokens.size() > limit) {
      sequence.tokens.resize(limit);
      sequence.labels.resize(limit);
      ++cut_;
    }
    if (filled > 0 && filled + sequence.tokens.size() > limit) {
      first_.push_back(sequences_.size());
      filled = 0;
    }
    filled += sequence.tokens.size();
    sequences_.push_back(std::move(sequence));
  }
  first_.push_back(sequences_.size());
}

void PackedSequences::append(uint64_t row, PackedRows& out) const {
  for (size_t i = first_[row]; i < first_[row + 1]; ++i) {
    const LabelledSequence& sequence = sequences_[i];
    out.tokens.insert(out.tokens.end(), sequence.tokens.begin(), sequence.tokens.end());
    out.labels.insert(out.labels.end(), sequence.labels.begin(), sequence.labels.end());
    out.end_sequence();
  }
}

}  // namespace kilin::train
