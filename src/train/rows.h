// SPDX-License-Identifier: Apache-2.0
// What a training step computes: rows of tokens with the token wanted after each. Every row follows from its
// number alone, so a run that goes on after a stop needs no state of its data.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "eval/synthetic.h"
#include "train/token_file.h"

namespace kilin::train {

inline constexpr int32_t kNoLabel = -1;

// Rows one after the other, each of one or several sequences that do not see each other.
struct PackedRows {
  std::vector<int32_t> tokens;
  std::vector<int32_t> labels;         // what is to be predicted after tokens[i]; kNoLabel: nothing
  std::vector<int32_t> cu_seqlens{0};  // where sequences end, see model/batch.h

  // Ends a sequence at the tokens so far; nothing when it would be empty.
  void end_sequence();
  int64_t counted() const;  // labels that are not kNoLabel
};

class RowSource {
 public:
  virtual ~RowSource() = default;
  // Rows 0 to rows() - 1 exist; at least 1.
  virtual uint64_t rows() const = 0;
  virtual void append(uint64_t row, PackedRows& out) const = 0;
};

// The training row that is the number'th of a run: the rows in a new order in each pass over them.
void append_training_row(const RowSource& source, uint64_t seed, uint64_t number, PackedRows& out);

// A stream of ids that rows are cut out of.
class TokenStream {
 public:
  virtual ~TokenStream() = default;
  virtual uint64_t tokens() const = 0;
  virtual void read(uint64_t first, size_t count, int32_t* out) const = 0;
};

std::unique_ptr<TokenStream> stream_of(TokenFile file);
std::unique_ptr<TokenStream> stream_of(std::vector<int32_t> ids);

// Windows of `length` tokens of each stream; the label of each is the token behind it. The end of a stream
// that fills no window is left out.
class StreamRows : public RowSource {
 public:
  // split_documents: a document (it begins with bos_id, or where that is -1 behind eos_id) is a sequence of
  // its own, and the token behind its end is not predicted. Throws Error, naming `name`, when there is no
  // window.
  StreamRows(std::vector<std::unique_ptr<TokenStream>> streams, int64_t length, bool split_documents,
             int32_t bos_id, int32_t eos_id, const std::string& name);
  uint64_t rows() const override { return first_rows_.back(); }
  void append(uint64_t row, PackedRows& out) const override;

 private:
  std::vector<std::unique_ptr<TokenStream>> streams_;
  std::vector<uint64_t> first_rows_;  // [streams + 1]
  int64_t length_;
  bool split_documents_;
  int32_t bos_id_, eos_id_;
};

// The examples of a synthetic task. The training split has no end.
class SyntheticRows : public RowSource {
 public:
  // One example of config.length tokens a row; or, row n, examples[n mod count] of them, all of one length
  // and each with its share of the key value pairs. Throws Error for a number that no row can be cut into.
  SyntheticRows(const eval::SyntheticConfig& config, eval::Split split, uint64_t rows,
                const std::vector<int64_t>& examples = {});
  uint64_t rows() const override { return rows_; }
  void append(uint64_t row, PackedRows& out) const override;

 private:
  int64_t row_length_;
  std::vector<eval::SyntheticTask> tasks_;  // row n takes the n mod size'th
  eval::Split split_;
  uint64_t rows_;
};
inline constexpr uint64_t kEndlessRows = uint64_t{1} << 62;

// A conversation or any other sequence with labels of its own.
struct LabelledSequence {
  std::vector<int32_t> tokens, labels;
};

// Whole sequences, several to a row of at most `length` tokens, in a shuffled order that `seed` fixes. Longer
// ones are cut off at the end; see cut().
class PackedSequences : public RowSource {
 public:
  PackedSequences(std::vector<LabelledSequence> sequences, int64_t length, uint64_t seed);
  uint64_t rows() const override { return first_.size() - 1; }
  void append(uint64_t row, PackedRows& out) const override;
  int64_t cut() const { return cut_; }  // sequences that lost their end

 private:
  std::vector<LabelledSequence> sequences_;  // in the order of the rows
  std::vector<size_t> first_;                // [rows + 1] of sequences_
  int64_t cut_ = 0;
};

}  // namespace kilin::train
