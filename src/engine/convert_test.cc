// SPDX-License-Identifier: Apache-2.0
#include "engine/convert.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "engine/convert_plan.h"
#include "io/test_support.h"
#include "model/gguf_config.h"
#include "model/random_values.h"
#include "model/stored_model.h"
#include "model/stored_parameter.h"
#include "quant/formats.h"

namespace kilin {
namespace {

namespace fs = std::filesystem;

const std::string kDocs = KILIN_SOURCE_DIR "/models/kilin-docs-10m";
const std::string kTiny = KILIN_SOURCE_DIR "/tests/data/reference/tiny-random";

Config docs_config() { return read_config_file(kDocs + "/config.json", "transformers"); }

ConvertOptions of_type(WeightType type) {
  ConvertOptions options;
  options.type = type;
  options.threads = 2;
  return options;
}

std::string error_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

// Every parameter's values.
std::vector<float> values_of(const io::Checkpoint& checkpoint, const Parameter& p, const Config& c) {
  const auto stored = StoredParameter::find(checkpoint, p, c);
  std::vector<float> x(static_cast<size_t>(stored.elements()));
  stored.read(0, stored.elements(), x.data());
  return x;
}

PlannedTensor planned(const std::string& name, Role role, int64_t columns) {
  PlannedTensor t;
  t.name = name;
  t.shape = {64, columns};
  t.role = role;
  return t;
}

Dtype chosen(WeightType type, Dtype source, PlannedTensor t) {
  choose_dtype(type, source, t);
  return t.dtype;
}

TEST(ConvertPlan, MixedPrecision) {
  using enum WeightType;
  const auto q4 = planned("blk.1.attn_q.weight", Role::kProjection, 512);
  EXPECT_EQ(chosen(kQ4_K, Dtype::kBF16, q4), Dtype::kQ4_K);
  EXPECT_EQ(chosen(kQ4_0, Dtype::kBF16, q4), Dtype::kQ4_0);
  EXPECT_EQ(chosen(kQ8_0, Dtype::kBF16, q4), Dtype::kQ8_0);
  EXPECT_EQ(chosen(kBF16, Dtype::kF32, q4), Dtype::kBF16);
  EXPECT_EQ(chosen(kAuto, Dtype::kF16, q4), Dtype::kF16);
  EXPECT_EQ(chosen(kF32, Dtype::kBF16, q4), Dtype::kF32);
  for (const char* name : {"blk.1.attn_k_b.weight", "blk.1.attn_v_b.weight", "blk.1.attn_kv_a_mqa.weight"}) {
    EXPECT_EQ(chosen(kQ4_K, Dtype::kBF16, planned(name, Role::kProjection, 512)), Dtype::kQ8_0) << name;
  }
  EXPECT_EQ(chosen(kQ4_0, Dtype::kBF16, planned("token_embd.weight", Role::kEmbedding, 512)), Dtype::kQ8_0);
  EXPECT_EQ(chosen(kQ4_K, Dtype::kBF16, planned("output.weight", Role::kHead, 512)), Dtype::kQ8_0);
  for (const char* name : {"blk.1.ssm_f_a.weight", "blk.1.ssm_g_b.weight", "blk.1.ssm_beta.weight"}) {
    const auto gate = planned(name, Role::kProjection, 512);
    EXPECT_EQ(chosen(kQ8_0, Dtype::kBF16, gate), Dtype::kBF16) << name;
    EXPECT_EQ(chosen(kQ4_K, Dtype::kF32, gate), Dtype::kF32) << name;
  }
  for (const Role role : {Role::kVector, Role::kConv, Role::kRouter}) {
    EXPECT_EQ(chosen(kQ4_K, Dtype::kBF16, planned("x", role, 512)), Dtype::kF32);
    EXPECT_EQ(chosen(kAuto, Dtype::kBF16, planned("x", role, 512)), Dtype::kF32);
  }
}

// Types that are read only: copied where the elements stay as they are, Q8_0 where rows are cut anew.
TEST(ConvertPlan, TypesThatCannotBeWritten) {
  using enum WeightType;
  for (const Dtype dtype : {Dtype::kQ5_0, Dtype::kQ6_K}) {
    PlannedTensor t = planned("blk.1.attn_k_b.weight", Role::kProjection, 512);
    EXPECT_EQ(chosen(kAuto, dtype, t), dtype);
    t.content = Content::kKeyRows;
    EXPECT_EQ(chosen(kAuto, dtype, t), Dtype::kQ8_0);
    EXPECT_EQ(chosen(kQ4_K, dtype, planned("blk.1.attn_q.weight", Role::kProjection, 512)), Dtype::kQ4_K);
  }
}

TEST(ConvertPlan, RowsThatBlocksDoNotFill) {
  PlannedTensor t = planned("blk.1.attn_q.weight", Role::kProjection, 96);
  choose_dtype(WeightType::kQ4_K, Dtype::kBF16, t);
  EXPECT_EQ(t.dtype, Dtype::kQ8_0);
  EXPECT_TRUE(t.fell_back);
  t.shape = {64, 48};
  choose_dtype(WeightType::kQ4_K, Dtype::kBF16, t);
  EXPECT_EQ(t.dtype, Dtype::kBF16);
  choose_dtype(WeightType::kQ4_0, Dtype::kBF16, t);
  EXPECT_EQ(t.dtype, Dtype::kBF16);
  t.shape = {64, 64};
  choose_dtype(WeightType::kQ4_0, Dtype::kBF16, t);
  EXPECT_FALSE(t.fell_back);
}

// The names and shapes that llama.cpp's converter writes for this model (row-major).
TEST(ConvertPlan, TensorsOfLlamaCpp) {
  const Config c = docs_config();
  const auto plan = plan_gguf(parameter_table(c), c);
  EXPECT_EQ(plan.size(), 180u);
  std::map<std::string, Shape> shapes;
  for (const PlannedTensor& t : plan) shapes[t.name] = t.shape;
  EXPECT_EQ(shapes["token_embd.weight"], (Shape{8192, 256}));
  EXPECT_EQ(shapes["blk.0.ssm_a"], (Shape{1, 1, 4, 1}));
  EXPECT_EQ(shapes["blk.0.ssm_conv1d_q.weight"], (Shape{1, 256, 1, 4}));
  EXPECT_EQ(shapes["blk.0.ssm_dt.bias"], (Shape{256}));
  EXPECT_EQ(shapes["blk.1.ffn_gate_exps.weight"], (Shape{16, 64, 256}));
  EXPECT_EQ(shapes["blk.1.ffn_down_exps.weight"], (Shape{16, 256, 64}));
  EXPECT_EQ(shapes["blk.3.attn_k_b.weight"], (Shape{4, 64, 32}));
  EXPECT_EQ(shapes["blk.3.attn_v_b.weight"], (Shape{4, 32, 64}));
  EXPECT_EQ(shapes.count("blk.3.attn_kv_b.weight"), 0u);
}

TEST(Convert, ToGgufAndBackKeepsEveryValue) {
  const io::TemporaryDirectory directory;
  const std::string file = directory.path() + "/docs.gguf";
  const std::string back = directory.path() + "/back";
  const ConvertReport report = convert_to_gguf(kDocs, file, of_type(WeightType::kAuto));
  EXPECT_TRUE(report.notes.empty());
  EXPECT_EQ(report.fallbacks, 0);
  EXPECT_EQ(report.target_bytes, io::Checkpoint::open(file).total_bytes());
  convert_to_hugging_face(file, back, of_type(WeightType::kAuto));

  const Config c = docs_config();
  const auto original = io::Checkpoint::open(kDocs);
  const auto gguf = io::Checkpoint::open(file);
  const auto again = io::Checkpoint::open(back);
  for (const Parameter& p : parameter_table(c)) {
    const auto x = values_of(original, p, c);
    if (p.name.ends_with("A_log")) {  // exp and log round
      const auto y = values_of(again, p, c);
      for (size_t i = 0; i < x.size(); ++i)
        EXPECT_NEAR(x[i], y[i], 3e-7 * std::max(1.0f, std::fabs(x[i]))) << p.name;
      continue;
    }
    EXPECT_EQ(values_of(gguf, p, c), x) << p.name;
    EXPECT_EQ(values_of(again, p, c), x) << p.name;
    EXPECT_EQ(again.get(p.name).dtype, original.get(p.name).dtype) << p.name;
  }
  for (const char* name : {"config.json", "generation_config.json", "chat_template.jinja"}) {
    const auto text = [&](const std::string& path) {
      std::ifstream in(path + "/" + name);
      return std::string(std::istreambuf_iterator<char>(in), {});
    };
    EXPECT_EQ(text(back), text(kDocs)) << name;
  }
}

// Older files: kv_b_proj whole, convolutions of three dimensions, other spellings of two vectors.
void write_legacy(const std::string& target) {
  const ConvertOptions options = of_type(WeightType::kAuto);
  const std::string modern = target + ".modern";
  convert_to_gguf(kDocs, modern, options);
  const Config c = docs_config();
  const auto original = io::Checkpoint::open(kDocs);
  const auto gguf = io::GgufFile::open(modern);
  io::GgufWriter writer(target);
  write_gguf_config(c, gguf.get_string(kGgufConfigKey), writer);
  struct Tensor {
    std::string name;
    TensorView view;
  };
  std::vector<Tensor> tensors;
  for (std::string name : gguf.names()) {
    TensorView view = *gguf.find(name);
    if (name.ends_with("attn_v_b.weight")) continue;
    if (const size_t at = name.find("attn_k_b"); at != std::string::npos) {
      view = original.get("model.layers." + name.substr(4, name.find('.', 4) - 4) +
                          ".self_attn.kv_b_proj.weight");
      name.replace(at, 8, "attn_kv_b");
    }
    if (name.find("ssm_conv1d") != std::string::npos) view.shape = {view.shape[1], 1, view.shape[3]};
    if (name.ends_with("ssm_a")) view.shape = {view.elements(), 1};
    if (name.ends_with("ssm_dt.bias") || name.ends_with("exp_probs_b.bias")) name.resize(name.size() - 5);
    writer.add_tensor(name, view.dtype, view.shape);
    tensors.push_back({std::move(name), view});
  }
  for (const Tensor& t : tensors) writer.write(t.view.data, t.view.bytes());
  writer.commit();
}

TEST(Convert, OlderFilesHoldTheSameModel) {
  const io::TemporaryDirectory directory;
  const std::string legacy = directory.path() + "/legacy.gguf";
  const std::string again = directory.path() + "/again.gguf";
  write_legacy(legacy);
  EXPECT_TRUE(io::GgufFile::open(legacy).contains("blk.3.attn_kv_b.weight"));
  convert_to_gguf(legacy, again, of_type(WeightType::kAuto));
  const auto modern = io::GgufFile::open(legacy + ".modern");
  const auto found = io::GgufFile::open(again);
  ASSERT_EQ(found.names(), modern.names());
  for (const std::string& name : modern.names()) {
    const TensorView& a = *modern.find(name);
    const TensorView& b = *found.find(name);
    EXPECT_EQ(a.shape, b.shape) << name;
    ASSERT_EQ(a.bytes(), b.bytes()) << name;
    EXPECT_EQ(std::memcmp(a.data, b.data, a.bytes()), 0) << name;
  }
}

TEST(Convert, SsmAIsMinusExpOfALog) {
  const io::TemporaryDirectory directory;
  const std::string file = directory.path() + "/docs.gguf";
  convert_to_gguf(kDocs, file, of_type(WeightType::kAuto));
  const auto a_log = io::Checkpoint::open(kDocs);
  const auto ssm_a = io::Checkpoint::open(file);
  float log_values[4];
  float values[4];
  std::memcpy(log_values, a_log.get("model.layers.0.self_attn.A_log").data, sizeof(log_values));
  std::memcpy(values, ssm_a.get("blk.0.ssm_a").data, sizeof(values));
  for (int i = 0; i < 4; ++i) EXPECT_EQ(values[i], -std::exp(log_values[i]));
}

// Steps of 1 / 127 and 1 / 8 of the largest of 32 normal weights (2.1 deviations on average), rounded
// uniformly; Q4_K has 16 levels between a block's own ends.
void expect_losses(const ConvertReport& report) {
  const std::map<Dtype, double> expected{{Dtype::kQ8_0, 2.1 / 127 / std::sqrt(12)},
                                         {Dtype::kQ4_0, 2.1 / 8 / std::sqrt(12)},
                                         {Dtype::kQ4_K, 4.2 / 15 / std::sqrt(12)}};
  EXPECT_FALSE(report.losses.empty());
  for (const auto& [dtype, loss] : report.losses) {
    EXPECT_NEAR(loss.relative / expected.at(dtype), 1.0, 0.4) << dtype_name(dtype);
    EXPECT_GE(loss.worst, loss.relative * (1 - 1e-9)) << dtype_name(dtype);
    EXPECT_FALSE(loss.worst_tensor.empty());
    EXPECT_GT(loss.of_bound, 0.2) << dtype_name(dtype);
    EXPECT_LE(loss.of_bound, 1.0) << dtype_name(dtype);
  }
}

TEST(Convert, QuantizedValuesStayWithinTheBound) {
  const io::TemporaryDirectory directory;
  const std::string file = directory.path() + "/q.gguf";
  const Config c = docs_config();
  const auto original = io::Checkpoint::open(kDocs);
  for (const WeightType type : {WeightType::kQ8_0, WeightType::kQ4_0, WeightType::kQ4_K}) {
    ConvertOptions options = of_type(type);
    options.overwrite = true;
    const ConvertReport report = convert_to_gguf(kDocs, file, options);
    EXPECT_LT(report.target_bytes, report.source_bytes * 6 / 10);
    const auto gguf = io::Checkpoint::open(file);
    for (const Parameter& p : parameter_table(c)) {
      const auto stored = StoredParameter::find(gguf, p, c);
      if (stored.transform() != Transform::kNone) continue;  // blocks run along another dimension
      const auto x = values_of(original, p, c);
      const auto y = values_of(gguf, p, c);
      const auto block = static_cast<size_t>(dtype_block(stored.dtype()));
      for (size_t first = 0; first < x.size(); first += block) {
        const double bound = quant::error_bound(stored.dtype(), &x[first]);
        for (size_t i = first; i < first + block; ++i) ASSERT_LE(std::fabs(x[i] - y[i]), bound) << p.name;
      }
    }
    expect_losses(report);
  }
}

// A file that was quantised already is read through its blocks.
TEST(Convert, QuantizesAgainAndSaysSo) {
  const io::TemporaryDirectory directory;
  const std::string first = directory.path() + "/q8.gguf";
  const std::string second = directory.path() + "/q4.gguf";
  convert_to_gguf(kDocs, first, of_type(WeightType::kQ8_0));
  const ConvertReport report = convert_to_gguf(first, second, of_type(WeightType::kQ4_K));
  ASSERT_EQ(report.notes.size(), 1u);
  EXPECT_NE(report.notes[0].find("quantised already"), std::string::npos);
  const auto a = io::GgufFile::open(first);
  const auto b = io::GgufFile::open(second);
  for (const auto& [key, value] : a.metadata()) {
    if (key == "general.file_type") continue;
    ASSERT_TRUE(b.has(key)) << key;
    EXPECT_EQ(b.metadata().at(key), value) << key;
  }
}

TEST(Convert, RefusesWhatItShould) {
  const io::TemporaryDirectory directory;
  const std::string file = directory.path() + "/a.gguf";
  const ConvertOptions options = of_type(WeightType::kAuto);
  std::ofstream(file) << "something";
  EXPECT_NE(error_of([&] { convert_to_gguf(kDocs, file, options); }).find("exists already"),
            std::string::npos);
  EXPECT_NE(error_of([&] { convert_to_gguf(kDocs, directory.path(), options); }).find("directory"),
            std::string::npos);
  EXPECT_NE(error_of([&] { convert_to_gguf(file, directory.path() + "/b.gguf", options); }).find("no GGUF"),
            std::string::npos);
  EXPECT_NE(error_of([&] {
              convert_to_gguf("/nonexistent", directory.path() + "/b.gguf", options);
            }).find("no such"),
            std::string::npos);
  EXPECT_NE(
      error_of([&] { convert_to_hugging_face(file, directory.path() + "/b", options); }).find("no GGUF"),
      std::string::npos);
  EXPECT_FALSE(fs::exists(directory.path() + "/b"));
  EXPECT_FALSE(fs::exists(directory.path() + "/b.gguf"));
}

TEST(Convert, StopsWithoutATrace) {
  const io::TemporaryDirectory directory;
  const std::string file = directory.path() + "/docs.gguf";
  ConvertOptions options = of_type(WeightType::kQ8_0);
  int calls = 0;
  options.progress = [&](int64_t done, int64_t total) {
    EXPECT_LE(done, total);
    return ++calls < 20;
  };
  EXPECT_TRUE(convert_to_gguf(kDocs, file, options).cancelled);
  EXPECT_TRUE(fs::is_empty(directory.path()));

  convert_to_gguf(kDocs, file, of_type(WeightType::kAuto));
  calls = 0;
  const std::string back = directory.path() + "/back";
  options.type = WeightType::kAuto;
  EXPECT_TRUE(convert_to_hugging_face(file, back, options).cancelled);
  EXPECT_FALSE(fs::exists(back));
}

TEST(Convert, ProgressReachesTheEnd) {
  const io::TemporaryDirectory directory;
  ConvertOptions options = of_type(WeightType::kQ4_K);
  int64_t last = 0;
  int64_t all = 0;
  options.progress = [&](int64_t done, int64_t total) {
    EXPECT_GT(done, last);
    last = done;
    all = total;
    return true;
  };
  convert_to_gguf(kDocs, directory.path() + "/docs.gguf", options);
  EXPECT_EQ(last, all);
  EXPECT_GT(all, 12000000);
}

std::string contents(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(in), {});
}

// Name and contents of each file
std::map<std::string, std::string> files_of(const fs::path& directory) {
  std::map<std::string, std::string> files;
  for (const fs::directory_entry& entry : fs::directory_iterator(directory))
    files[entry.path().filename().string()] = contents(entry.path());
  return files;
}

TEST(Convert, OldModelStaysUntilTheNewOneIsComplete) {
  const io::TemporaryDirectory directory;
  const std::string gguf = directory.path() + "/docs.gguf";
  const fs::path parent = directory.path() + "/models";
  const fs::path target = parent / "docs";
  fs::create_directory(parent);
  convert_to_gguf(kDocs, gguf, of_type(WeightType::kAuto));
  convert_to_hugging_face(gguf, target, of_type(WeightType::kF32));
  std::ofstream(target / "model-00007-of-00009.safetensors") << "left by an older model";
  std::ofstream(target / "notes.txt") << "mine";
  const auto before = files_of(target);

  ConvertOptions options = of_type(WeightType::kBF16);
  EXPECT_NE(error_of([&] { convert_to_hugging_face(gguf, target, options); }).find("--force"),
            std::string::npos);
  EXPECT_EQ(files_of(target), before);
  options.overwrite = true;
  // In the quarters before it is given up; reading all files after each of the hundreds of tensors takes
  // minutes.
  int64_t looked_at = -1;
  options.progress = [&](int64_t done, int64_t total) {
    if (const int64_t quarter = 4 * done / total; quarter != looked_at) {
      looked_at = quarter;
      EXPECT_EQ(files_of(target), before);
    }
    return done < total / 2;
  };
  EXPECT_TRUE(convert_to_hugging_face(gguf, target, options).cancelled);
  EXPECT_EQ(looked_at, 2);
  options.progress = [](int64_t, int64_t) -> bool { fail("stop"); };
  EXPECT_EQ(error_of([&] { convert_to_hugging_face(gguf, target, options); }), "stop");
  EXPECT_EQ(files_of(target), before);
  EXPECT_EQ(std::distance(fs::directory_iterator(parent), {}), 1) << "something was left beside it";

  // through a link, which stays one
  fs::create_directory_symlink(target, directory.path() + "/link");
  options.progress = nullptr;
  convert_to_hugging_face(gguf, directory.path() + "/link", options);
  EXPECT_TRUE(fs::is_symlink(directory.path() + "/link"));
  EXPECT_EQ(std::distance(fs::directory_iterator(parent), {}), 1);
  auto after = files_of(target);
  EXPECT_EQ(after["notes.txt"], "mine");
  after.erase("notes.txt");
  const fs::path fresh = directory.path() + "/fresh";
  convert_to_hugging_face(gguf, fresh, of_type(WeightType::kBF16));
  EXPECT_EQ(after, files_of(fresh));
}

TEST(Convert, RandomFilesAreTheSameForTheSameSeed) {
  const io::TemporaryDirectory directory;
  const auto bytes_with = [&](uint64_t seed, int threads) {
    ConvertOptions options = of_type(WeightType::kAuto);
    options.threads = threads;
    options.overwrite = true;
    const std::string file = directory.path() + "/random.gguf";
    random_gguf(kTiny + "/config.json", seed, file, options);
    std::ifstream in(file, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(in), {});
  };
  const std::string first = bytes_with(1, 1);
  EXPECT_TRUE(first == bytes_with(1, 3));
  EXPECT_FALSE(first == bytes_with(2, 1));
}

TEST(RandomValues, DoNotDependOnTheDivision) {
  const Parameter p{"model.layers.0.self_attn.q_proj.weight", {64, 100}, Role::kProjection};
  std::vector<float> whole(6400);
  random_values(p, 5, 0, 6400, whole.data());
  for (const int64_t part : {1, 3, 7, 64, 1000}) {
    for (int64_t first = 0; first < 6400; first += part) {
      std::vector<float> x(static_cast<size_t>(std::min<int64_t>(part, 6400 - first)));
      random_values(p, 5, first, static_cast<int64_t>(x.size()), x.data());
      ASSERT_TRUE(std::equal(x.begin(), x.end(), whole.begin() + first)) << part << " " << first;
    }
  }
  double squares = 0;
  for (const float v : whole) squares += static_cast<double>(v) * v;
  EXPECT_NEAR(std::sqrt(squares / 6400), 0.02, 0.001);

  const Parameter a{"model.layers.0.self_attn.A_log", {1, 1, 100, 1}, Role::kVector};
  std::vector<float> values(100);
  random_values(a, 5, 0, 100, values.data());
  for (const float v : values) EXPECT_TRUE(v >= 0 && v <= std::log(16.0f));
}

}  // namespace
}  // namespace kilin
