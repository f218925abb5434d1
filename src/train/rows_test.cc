// SPDX-License-Identifier: Apache-2.0
#include "train/rows.h"

#include <gtest/gtest.h>

#include <numeric>
#include <set>

#include "io/test_support.h"
#include "train/run_log.h"

namespace kilin::train {
namespace {

using io::error_of;
using io::read_text;
using io::TemporaryDirectory;
using Ids = std::vector<int32_t>;

std::vector<std::unique_ptr<TokenStream>> streams(std::vector<Ids> ids) {
  std::vector<std::unique_ptr<TokenStream>> result;
  for (Ids& stream : ids) result.push_back(stream_of(std::move(stream)));
  return result;
}

Ids counting(int32_t from, int count) {
  Ids ids(static_cast<size_t>(count));
  std::iota(ids.begin(), ids.end(), from);
  return ids;
}

TEST(StreamRows, WindowsAndTheTokenBehindEach) {
  const StreamRows rows(streams({counting(0, 10), counting(100, 3), counting(200, 7)}), 3, false, -1, -1,
                        "t");
  EXPECT_EQ(rows.rows(), 3u + 0u + 2u);  // each needs the token behind its end
  PackedRows packed;
  rows.append(2, packed);
  rows.append(3, packed);
  EXPECT_EQ(packed.tokens, (Ids{6, 7, 8, 200, 201, 202}));
  EXPECT_EQ(packed.labels, (Ids{7, 8, 9, 201, 202, 203}));
  EXPECT_EQ(packed.cu_seqlens, (Ids{0, 3, 6}));
  EXPECT_EQ(packed.counted(), 6);
  EXPECT_EQ(error_of([] { StreamRows(streams({counting(0, 3)}), 3, false, -1, -1, "some.kbin"); }),
            "some.kbin: found 3 tokens, expected at least 4 (a row and the token behind it)");
}

TEST(StreamRows, DocumentsDoNotSeeEachOther) {
  // 1 begins a document, 2 ends it.
  const Ids ids{1, 5, 6, 2, 1, 7, 2, 1, 8, 9};
  const StreamRows rows(streams({ids}), 9, true, 1, 2, "t");
  PackedRows packed;
  rows.append(0, packed);
  EXPECT_EQ(packed.cu_seqlens, (Ids{0, 4, 7, 9}));
  EXPECT_EQ(packed.labels, (Ids{5, 6, 2, -1, 7, 2, -1, 8, 9}));
  EXPECT_EQ(packed.counted(), 7);
  const StreamRows by_end(streams({ids}), 9, true, -1, 2, "t");
  PackedRows same;
  by_end.append(0, same);
  EXPECT_EQ(same.labels, packed.labels);
  EXPECT_EQ(same.cu_seqlens, packed.cu_seqlens);
}

TEST(Rows, EveryPassHasAllRowsInAnOrderOfItsOwn) {
  const StreamRows rows(streams({counting(0, 101)}), 1, false, -1, -1, "t");
  ASSERT_EQ(rows.rows(), 100u);
  PackedRows first, second, again;
  for (uint64_t i = 0; i < 100; ++i) append_training_row(rows, 3, i, first);
  for (uint64_t i = 100; i < 200; ++i) append_training_row(rows, 3, i, second);
  for (uint64_t i = 0; i < 100; ++i) append_training_row(rows, 3, i, again);
  EXPECT_EQ(std::set<int32_t>(first.tokens.begin(), first.tokens.end()).size(), 100u);
  EXPECT_EQ(std::set<int32_t>(second.tokens.begin(), second.tokens.end()).size(), 100u);
  EXPECT_EQ(first.tokens, again.tokens);
  EXPECT_NE(first.tokens, second.tokens);
}

TEST(SyntheticRows, AreTheExamplesOfTheTask) {
  eval::SyntheticConfig config;
  config.length = 32;
  config.vocabulary = 64;
  const SyntheticRows train(config, eval::Split::kTrain, kEndlessRows);
  PackedRows packed;
  append_training_row(train, 1, 5, packed);
  append_training_row(train, 1, 6, packed);
  const eval::SyntheticTask task(config);
  const auto example = task.example(eval::Split::kTrain, 6);
  EXPECT_EQ(Ids(packed.tokens.begin() + 32, packed.tokens.end()), example.tokens);
  EXPECT_EQ(Ids(packed.labels.begin() + 32, packed.labels.end()), example.labels);
  EXPECT_EQ(packed.cu_seqlens, (Ids{0, 32, 64}));
}

TEST(SyntheticRows, SeveralExamplesARowInTurn) {
  eval::SyntheticConfig config;
  config.kind = eval::SyntheticKind::kMqar;
  config.length = 32;
  config.vocabulary = 64;
  config.kv_pairs = 8;
  const SyntheticRows train(config, eval::Split::kTrain, kEndlessRows, {4, 1});
  PackedRows packed;
  train.append(6, packed);
  train.append(7, packed);
  EXPECT_EQ(packed.cu_seqlens, (Ids{0, 8, 16, 24, 32, 64}));
  EXPECT_EQ(packed.counted(), 4 * 2 + 8);
  config.length = 8;
  config.kv_pairs = 2;
  const auto example = eval::SyntheticTask(config).example(eval::Split::kTrain, 6 * 4 + 1);
  EXPECT_EQ(Ids(packed.tokens.begin() + 8, packed.tokens.begin() + 16), example.tokens);
  EXPECT_EQ(Ids(packed.labels.begin() + 8, packed.labels.begin() + 16), example.labels);
  config.length = 32;
  EXPECT_EQ(error_of([&] {
              SyntheticRows(config, eval::Split::kTrain, 1, {4, 5});
            }),
            "examples_per_row: found 5, expected a divisor of the 32 tokens of a row");
}

TEST(PackedSequences, FillRowsWithWholeSequences) {
  std::vector<LabelledSequence> sequences;
  size_t total = 0;
  for (int i = 0; i < 20; ++i) {
    const int length = 2 + i % 5;
    sequences.push_back({counting(100 * i, length), Ids(static_cast<size_t>(length), i)});
    total += static_cast<size_t>(length);
  }
  sequences.push_back({counting(5000, 30), Ids(30, 77)});
  const PackedSequences rows(sequences, 8, 1);
  EXPECT_EQ(rows.cut(), 1);
  PackedRows all;
  for (uint64_t row = 0; row < rows.rows(); ++row) {
    PackedRows one;
    rows.append(row, one);
    EXPECT_LE(one.tokens.size(), 8u);
    EXPECT_GT(one.tokens.size(), 0u);
    EXPECT_EQ(one.cu_seqlens.back(), static_cast<int32_t>(one.tokens.size()));
    rows.append(row, all);
  }
  EXPECT_EQ(all.tokens.size(), total + 8);
  EXPECT_EQ(all.cu_seqlens.size(), 22u);
  EXPECT_EQ(all.labels.size(), all.tokens.size());
}

TEST(RunLog, ResumingDropsWhatIsComputedAgain) {
  const TemporaryDirectory directory;
  LogRecord record;
  {
    RunLog log(directory.path(), 0);
    for (record.step = 1; record.step <= 4; ++record.step) {
      record.loss = 1.0 / static_cast<double>(record.step);
      record.valid_loss.reset();
      if (record.step == 2) record.valid_loss = 0.1;
      log.write(record);
    }
  }
  std::ofstream(directory.file("log.jsonl"), std::ios::app) << "{\"step\":5,\"loss\":0.";  // killed here
  RunLog log(directory.path(), 2);
  EXPECT_EQ(read_text(directory.file("log.jsonl")),
            "{\"step\":1,\"tokens\":0,\"seconds\":0.0,\"loss\":1.0}\n"
            "{\"step\":2,\"tokens\":0,\"seconds\":0.0,\"loss\":0.5,\"valid_loss\":0.1}\n");
  EXPECT_EQ(read_text(directory.file("log.csv")),
            "step,tokens,seconds,loss,accuracy,grad_norm,lr,tokens_per_second,share_of_peak,valid_loss,"
            "valid_perplexity,valid_accuracy,valid_exact\n"
            "1,0,0,1,,,,,,,,,\n2,0,0,0.5,,,,,,0.1,,,\n");
  record.step = 3;
  record.loss = 0.25;
  log.write(record);
  EXPECT_NE(
      read_text(directory.file("log.jsonl")).find("\"step\":3,\"tokens\":0,\"seconds\":0.0,\"loss\":0.25"),
      std::string::npos);
}

}  // namespace
}  // namespace kilin::train
