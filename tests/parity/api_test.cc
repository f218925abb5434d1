// SPDX-License-Identifier: Apache-2.0
// The public API: what users rely on about sequences and their states.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include "io/test_support.h"
#include "kilin/kilin.h"
#include "support/reference.h"

namespace kilin::testing {
namespace {

class Api : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { model_ = new Model(Model::load(bundled_model())); }
  static void TearDownTestSuite() {
    delete model_;
    model_ = nullptr;
  }
  static std::vector<int32_t> prompt(size_t n) {
    auto ids = Golden("docs_prompt_300").ids("input_ids");
    ids.resize(n);
    return ids;
  }
  static std::vector<float> logits(const Sequence& s) { return {s.logits().begin(), s.logits().end()}; }
  static std::string error_of(const std::function<void()>& f) {
    try {
      f();
    } catch (const std::runtime_error& e) {
      return e.what();
    }
    return "";
  }
  static Model* model_;
};
Model* Api::model_ = nullptr;

TEST_F(Api, a_sequence_without_tokens_has_no_logits) {
  Sequence s = model_->new_sequence();
  EXPECT_TRUE(s.logits().empty());
  EXPECT_EQ(s.prefill({}), 0);
  EXPECT_EQ(s.length(), 0);
  EXPECT_NE(error_of([&] { Sampler().sample(s.logits()); }), "");
}

TEST_F(Api, copies_go_on_independently_and_exactly) {
  Sequence a = model_->new_sequence();
  a.prefill(prompt(260));
  Sequence b = a.copy();
  EXPECT_EQ(logits(a), logits(b));
  Sequence reference = model_->new_sequence();
  reference.prefill(prompt(260));
  for (int32_t token : {5, 9, 11}) {
    a.decode(token);
    reference.decode(token);
  }
  EXPECT_EQ(logits(a), logits(reference)) << "writing the copy's pages must not touch the original's";
  b.decode(100);
  Sequence other = model_->new_sequence();
  other.prefill(prompt(260));
  other.decode(100);
  EXPECT_EQ(logits(b), logits(other));
  EXPECT_EQ(a.length(), 263);
  EXPECT_EQ(b.length(), 261);
}

TEST_F(Api, a_restored_checkpoint_goes_on_exactly) {
  for (size_t length : {0, 1, 65, 300}) {
    Sequence a = model_->new_sequence();
    a.prefill(prompt(length));
    const auto bytes = a.checkpoint();
    Sequence b = model_->new_sequence();
    b.prefill(prompt(12));
    b.restore(bytes);
    EXPECT_EQ(b.length(), static_cast<int64_t>(length));
    EXPECT_EQ(logits(a), logits(b));
    a.decode(77);
    b.decode(77);
    EXPECT_EQ(logits(a), logits(b)) << length;
  }
}

TEST_F(Api, broken_checkpoints_are_refused_and_change_nothing) {
  Sequence a = model_->new_sequence();
  a.prefill(prompt(20));
  const auto good = a.checkpoint();
  const auto before = logits(a);
  auto truncated = good;
  truncated.resize(good.size() - 1);
  auto other_magic = good;
  other_magic[0] = std::byte{'X'};
  auto other_shape = good;
  other_shape[9] ^= std::byte{1};
  auto huge = good;
  huge[22] = std::byte{0x7f};
  for (const auto& bytes : {truncated, other_magic, other_shape, huge, std::vector<std::byte>{}}) {
    EXPECT_NE(error_of([&] { a.restore(bytes); }).find("sequence checkpoint"), std::string::npos);
  }
  EXPECT_EQ(logits(a), before);
  EXPECT_EQ(a.length(), 20);
  Model tiny = Model::load(reference_path("tiny-random"), {.require_tokenizer = false});
  Sequence foreign = tiny.new_sequence();
  EXPECT_NE(error_of([&] { foreign.restore(good); }).find("another shape"), std::string::npos);
}

TEST_F(Api, bad_tokens_leave_the_sequence_unchanged) {
  Sequence a = model_->new_sequence();
  a.prefill(prompt(10));
  const auto before = logits(a);
  EXPECT_NE(error_of([&] { a.prefill(std::vector<int32_t>{1, 8192}); }).find("8192"), std::string::npos);
  EXPECT_NE(error_of([&] { a.decode(-1); }).find("-1"), std::string::npos);
  EXPECT_EQ(a.length(), 10);
  EXPECT_EQ(logits(a), before);
  a.clear();
  EXPECT_EQ(a.length(), 0);
  a.prefill(prompt(10));
  EXPECT_EQ(logits(a), before);
}

TEST_F(Api, all_logits_end_with_the_logits_of_the_last_token) {
  Sequence a = model_->new_sequence(), b = model_->new_sequence();
  const auto all = a.prefill_all_logits(prompt(33));
  b.prefill(prompt(33));
  const auto vocab = static_cast<size_t>(model_->info().vocab_size);
  ASSERT_EQ(all.size(), 33 * vocab);
  EXPECT_EQ(std::vector<float>(all.end() - static_cast<std::ptrdiff_t>(vocab), all.end()), logits(a));
  EXPECT_TRUE(close(logits(a), logits(b), 1e-5));
}

TEST_F(Api, a_batch_of_decode_steps_equals_single_steps) {
  std::vector<Sequence> batch, single;
  std::vector<Sequence*> pointers;
  std::vector<int32_t> tokens;
  for (size_t i = 0; i < 20; ++i) {
    batch.push_back(model_->new_sequence());
    single.push_back(model_->new_sequence());
    if (i > 0) batch[i].prefill(prompt(i * 3));
    if (i > 0) single[i].prefill(prompt(i * 3));
    tokens.push_back(static_cast<int32_t>(100 + i));
  }
  for (Sequence& s : batch) pointers.push_back(&s);
  model_->decode(pointers, tokens);
  for (size_t i = 0; i < 20; ++i) {
    single[i].decode(tokens[i]);
    EXPECT_TRUE(close(logits(batch[i]), logits(single[i]), 1e-5)) << i;
  }
  EXPECT_NE(error_of([&] {
              model_->decode(std::vector<Sequence*>{pointers[0], pointers[0]}, std::vector<int32_t>{1, 2});
            }),
            "");
  EXPECT_NE(error_of([&] { model_->decode(pointers, std::vector<int32_t>{1}); }), "");
}

TEST_F(Api, prefill_can_be_stopped_and_goes_on) {
  const Model small_chunks = Model::load(bundled_model(), {.prefill_chunk = 50});
  Sequence a = small_chunks.new_sequence();
  const auto ids = prompt(300);
  EXPECT_EQ(a.prefill(ids, [](int64_t done) { return done < 100; }), 100);
  a.prefill(std::span(ids).subspan(100));
  Sequence b = model_->new_sequence();
  b.prefill(ids);
  EXPECT_TRUE(close(logits(a), logits(b), 1e-4));
}

TEST_F(Api, the_same_seed_gives_the_same_text_and_another_seed_another) {
  const auto text = [&](uint64_t seed) {
    Sequence s = model_->new_sequence();
    GenerateOptions options;
    options.max_tokens = 40;
    options.sampling = {.temperature = 1.0, .top_p = 0.95, .seed = seed};
    return model_->generate(s, prompt(30), options).ids;
  };
  EXPECT_EQ(text(3), text(3));
  EXPECT_NE(text(3), text(4));
}

TEST_F(Api, a_stop_text_ends_the_generation_and_is_not_shown) {
  Sequence s = model_->new_sequence();
  GenerateOptions options;
  options.stop = {"accessing\nthe", "never this"};
  const auto result = model_->generate(s, Golden("docs_prompt_7").ids("input_ids"), options);
  EXPECT_EQ(result.text, " of functions for ");
  EXPECT_EQ(result.finish_reason, "stop");
}

TEST_F(Api, generation_can_be_cancelled_and_continued) {
  Sequence s = model_->new_sequence();
  GenerateOptions options;
  options.max_tokens = 64;
  int pieces = 0;
  options.on_text = [&](std::string_view) { return ++pieces < 5; };
  const auto first = model_->generate(s, Golden("docs_prompt_7").ids("input_ids"), options);
  EXPECT_EQ(first.finish_reason, "cancelled");
  options.on_text = nullptr;
  options.max_tokens = 10;
  // The sequence holds all tokens but the last one generated.
  const auto rest = model_->generate(s, std::span(&first.ids.back(), 1), options);
  const auto golden = Golden("docs_prompt_7").ids("greedy_ids");
  auto joined = first.ids;
  joined.insert(joined.end(), rest.ids.begin(), rest.ids.end());
  EXPECT_TRUE(std::equal(joined.begin(), joined.end(), golden.begin()));
}

TEST_F(Api, a_model_without_a_tokenizer_can_be_cancelled_by_token) {
  const Model tiny = Model::load(reference_path("tiny-random"), {.require_tokenizer = false});
  Sequence s = tiny.new_sequence();
  GenerateOptions options;
  options.ignore_end_tokens = true;
  int tokens = 0;
  options.on_token = [&](int32_t) { return ++tokens < 7; };
  const auto result = tiny.generate(s, std::vector<int32_t>{5}, options);
  EXPECT_EQ(result.ids.size(), 7u);
  EXPECT_EQ(result.finish_reason, "cancelled");
  EXPECT_EQ(result.text, "");
}

TEST_F(Api, a_failed_computation_clears_its_sequence_and_names_the_weights) {
  const io::TemporaryDirectory directory;
  namespace fs = std::filesystem;
  fs::copy_file(reference_path("tiny-random/config.json"), directory.file("config.json"));
  std::ifstream in(reference_path("tiny-random/model.safetensors"), std::ios::binary);
  std::string bytes((std::istreambuf_iterator<char>(in)), {});
  const auto checkpoint = io::SafetensorsFile::open(reference_path("tiny-random/model.safetensors"));
  // The first value of the data: a weight of a matrix, which loading does not look at.
  uint64_t header = 0;
  std::memcpy(&header, bytes.data(), sizeof header);
  bytes.replace(8 + header, 4, std::string("\0\0\xc0\x7f", 4));
  directory.write("model.safetensors", bytes);
  const Model broken = Model::load(directory.path(), {.require_tokenizer = false});
  Sequence s = broken.new_sequence();
  const std::string error = error_of([&] { s.prefill(std::vector<int32_t>{1, 2, 3}); });
  EXPECT_NE(error.find("'" + checkpoint.names().front() + "' holds NaN"), std::string::npos) << error;
  EXPECT_EQ(s.length(), 0);
  EXPECT_TRUE(s.logits().empty());
}

TEST_F(Api, threads_may_share_a_model) {
  const auto ids = prompt(64);
  Sequence reference = model_->new_sequence();
  reference.prefill(ids);
  std::vector<std::vector<float>> results(4);
  std::vector<std::thread> threads;
  for (auto& result : results) {
    threads.emplace_back([&] {
      Sequence s = model_->new_sequence();
      s.prefill(ids);
      result = logits(s);
    });
  }
  for (auto& t : threads) t.join();
  for (const auto& result : results) EXPECT_EQ(result, logits(reference));
}

TEST_F(Api, info_counts_what_the_reference_states) {
  const ModelInfo& info = model_->info();
  EXPECT_EQ(info.parameters, 12896536);
  EXPECT_EQ(info.layers, 8);
  EXPECT_EQ(info.kda_layers, 6);
  EXPECT_EQ(info.mla_layers, 2);
  EXPECT_EQ(info.moe_layers, 7);
  EXPECT_NEAR(static_cast<double>(info.active_parameters), 6.0e6, 0.1e6);
  // 6 layers x (4 heads x 64 x 64 + 3 x 768 inputs) floats; 2 layers x (64 + 16) float16 values a token
  EXPECT_EQ(info.state_bytes_per_sequence, 6 * (4 * 64 * 64 + 3 * 768) * 4);
  EXPECT_EQ(info.cache_bytes_per_token, 2 * 80 * 2);
  EXPECT_EQ(model_->end_ids(), (std::vector<int32_t>{7937, 7938, 7945}));
}

TEST_F(Api, memory_of_a_sequence_grows_by_the_latents_only) {
  Sequence s = model_->new_sequence();
  s.prefill(prompt(256));
  const int64_t one_page = s.bytes();
  s.prefill(prompt(256));
  const int64_t two_pages = s.bytes();
  s.prefill(prompt(256));
  EXPECT_EQ(s.bytes() - two_pages, two_pages - one_page);
  EXPECT_NEAR(static_cast<double>(two_pages - one_page), 256.0 * 320, 1024);
}

TEST_F(Api, the_type_of_the_cache_is_a_choice_and_goes_with_checkpoints) {
  const Model exact = Model::load(bundled_model(), {.cache_type = "f32", .require_tokenizer = false});
  EXPECT_EQ(exact.info().cache_bytes_per_token, 2 * model_->info().cache_bytes_per_token);
  Sequence a = exact.new_sequence();
  Sequence b = model_->new_sequence();
  a.prefill(prompt(70));
  b.prefill(prompt(70));
  EXPECT_LT(relative_error(logits(b), logits(a)), std::sqrt(2.0) * 0x1p-11);  // two MLA layers
  EXPECT_NE(logits(b), logits(a));
  const std::string error = error_of([&] { b.restore(a.checkpoint()); });
  EXPECT_NE(error.find("--cache-type f32"), std::string::npos) << error;
  EXPECT_EQ(b.length(), 70);
  EXPECT_THROW(Model::load(bundled_model(), {.cache_type = "f8"}), std::runtime_error);
  EXPECT_THROW(Model::load(bundled_model(), {.activations = "int8"}), std::runtime_error);
}

TEST_F(Api, pinned_threads_compute_the_same) {
  const Model pinned =
      Model::load(bundled_model(), {.threads = 2, .pin_threads = true, .require_tokenizer = false});
  Sequence a = pinned.new_sequence();
  Sequence b = model_->new_sequence();
  a.prefill(prompt(20));
  b.prefill(prompt(20));
  EXPECT_EQ(logits(a), logits(b));
}

}  // namespace
}  // namespace kilin::testing
