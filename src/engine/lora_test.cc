// SPDX-License-Identifier: Apache-2.0
#include "engine/lora.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/random.h"
#include "engine/convert.h"
#include "engine/weights.h"
#include "io/safetensors_writer.h"
#include "io/test_support.h"
#include "model/stored_parameter.h"

namespace kilin {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

const std::string kTiny = KILIN_SOURCE_DIR "/tests/data/reference/tiny-random";

Config tiny_config() { return read_config_file(kTiny + "/config.json", "transformers"); }

struct Matrix {
  Shape shape;
  std::vector<float> values;
};

// An adapter with random values for every matrix that `wanted` takes, to be changed and written.
struct TestAdapter {
  json config = {{"peft_type", "LORA"}, {"r", 3}, {"lora_alpha", 6.0}, {"target_modules", nullptr}};
  std::map<std::string, Matrix> tensors;

  explicit TestAdapter(const std::function<bool(const Parameter&)>& wanted, uint64_t seed = 1) {
    Random random(seed);
    struct Nothing {};
    const Config config_of_model = tiny_config();
    ModelWeights<Nothing> weights(config_of_model);
    visit_parameters(weights, config_of_model, [&](const Parameter& p, Nothing&) {
      const bool matrix = p.role != Role::kVector && p.role != Role::kConv && p.role != Role::kEmbedding;
      if (!matrix || !wanted(p)) return;
      add(p.name.substr(0, p.name.size() - 7), p.shape, random);
    });
  }
  void add(const std::string& module, const Shape& shape, Random& random) {
    const auto fill = [&](int64_t rows, int64_t cols) {
      Matrix m{{rows, cols}, std::vector<float>(static_cast<size_t>(rows * cols))};
      for (float& x : m.values) x = static_cast<float>(random.normal() * 0.1);
      return m;
    };
    tensors["base_model.model." + module + ".lora_A.weight"] = fill(3, shape[1]);
    tensors["base_model.model." + module + ".lora_B.weight"] = fill(shape[0], 3);
  }
  std::string write(const std::string& directory) const {
    fs::create_directories(directory);
    std::ofstream(directory + "/adapter_config.json") << config.dump();
    std::vector<io::NamedTensor> list;
    for (const auto& [name, m] : tensors) list.push_back({name, {Dtype::kF32, m.shape, m.values.data()}});
    io::write_safetensors(directory + "/adapter_model.safetensors", list);
    return directory;
  }
  // s B A of a module in double, or zeros
  std::vector<double> delta(const std::string& module, int64_t out, int64_t in, double scale) const {
    std::vector<double> sum(static_cast<size_t>(out * in), 0.0);
    const auto a = tensors.find("base_model.model." + module + ".lora_A.weight");
    if (a == tensors.end()) return sum;
    const Matrix& b = tensors.at("base_model.model." + module + ".lora_B.weight");
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t i = 0; i < in; ++i) {
        double x = 0;
        for (int64_t k = 0; k < 3; ++k) {
          x += static_cast<double>(b.values[static_cast<size_t>(o * 3 + k)]) *
               static_cast<double>(a->second.values[static_cast<size_t>(k * in + i)]);
        }
        sum[static_cast<size_t>(o * in + i)] = scale * x;
      }
    }
    return sum;
  }
};

bool all(const Parameter&) { return true; }

std::string error_of(const TestAdapter& adapter) {
  const io::TemporaryDirectory directory;
  try {
    const LoraSource source{adapter.write(directory.path() + "/a"), 1.0};
    LoraSet({&source, 1}, tiny_config());
  } catch (const Error& error) {
    std::string text = error.what();
    const size_t at = text.find(directory.path());
    if (at != std::string::npos) text.erase(at, directory.path().size() + 3);  // "DIR/a/"
    return text;
  }
  return "no error";
}

void expect_error(const std::string& expected, const std::function<void(TestAdapter&)>& change) {
  TestAdapter adapter(all);
  change(adapter);
  EXPECT_EQ(error_of(adapter).substr(0, expected.size()), expected);
}

// Every matrix of the model of every kind, twice over: W + 2 B A + 0.5 * (2 / sqrt(3)) B' A'.
TEST(Lora, adds_the_scaled_products_to_every_matrix) {
  const io::TemporaryDirectory directory;
  TestAdapter first(all, 1);
  TestAdapter second([](const Parameter& p) { return p.role == Role::kExpert; }, 2);
  second.config["use_rslora"] = true;
  second.config["lora_alpha"] = 2;
  const LoraSource sources[] = {{first.write(directory.path() + "/1"), 1.0},
                                {second.write(directory.path() + "/2"), 0.5}};
  const Config config = tiny_config();
  const LoraSet set(sources, config);
  const auto checkpoint = io::Checkpoint::open(kTiny);
  ThreadPool pool(3);
  int matrices = 0;
  struct Nothing {};
  ModelWeights<Nothing> weights(config);
  visit_parameters(weights, config, [&](const Parameter& p, Nothing&) {
    if (!set.changes(p)) return;
    ++matrices;
    const auto stored = StoredParameter::find(checkpoint, p, config);
    std::vector<float> before(static_cast<size_t>(stored.elements()));
    stored.read(0, stored.elements(), before.data());
    std::vector<float> after = before;
    set.add_to(p, after, pool);
    const std::string module = p.name.substr(0, p.name.size() - 7);
    const auto d1 = first.delta(module, p.shape[0], p.shape[1], 2.0);
    const auto d2 = second.delta(module, p.shape[0], p.shape[1], 0.5 * 2.0 / std::sqrt(3.0));
    for (size_t i = 0; i < before.size(); ++i) {
      ASSERT_NEAR(after[i], static_cast<double>(before[i]) + d1[i] + d2[i], 1e-6) << p.name << " " << i;
    }
  });
  EXPECT_EQ(matrices, static_cast<int>(set.changed()));
  EXPECT_EQ(static_cast<size_t>(matrices) * 2, first.tensors.size());
}

// The packed weights of a loaded model, whose kv_b is cut into heads and transposed.
TEST(Lora, loaded_models_compute_with_the_sum) {
  const io::TemporaryDirectory directory;
  const TestAdapter adapter(all);
  const LoraSource source{adapter.write(directory.path() + "/a"), -1.0};
  const auto plain = LoadedModel::load(tiny_config(), io::Checkpoint::open(kTiny), 1);
  const auto with = LoadedModel::load(tiny_config(), io::Checkpoint::open(kTiny), 2, {&source, 1});
  const auto compare = [&](const WeightMatrix& w, const WeightMatrix& base, const std::string& module) {
    ASSERT_EQ(w.dtype, Dtype::kF32);
    const auto delta = adapter.delta(module, w.rows, w.cols, -2.0);
    std::vector<float> row(static_cast<size_t>(w.cols)), before(row.size());
    for (int64_t r = 0; r < w.rows; ++r) {
      unpack_row(w, r, row.data());
      unpack_row(base, r, before.data());
      for (size_t i = 0; i < row.size(); ++i) {
        ASSERT_NEAR(row[i], static_cast<double>(before[i]) + delta[static_cast<size_t>(r * w.cols) + i], 1e-6)
            << module;
      }
    }
  };
  compare(with.weights().head.matrix, plain.weights().head.matrix, "lm_head");
  const Config& c = with.config();
  for (size_t i = 0; i < c.layers.size(); ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    const auto& w = with.weights().layers[i];
    const auto& base = plain.weights().layers[i];
    if (c.layers[i] == LayerKind::kMla) {
      const auto delta = adapter.delta(layer + "self_attn.kv_b_proj",
                                       c.mla.heads * (c.mla.nope + c.mla.value), c.mla.latent, -2.0);
      const auto& heads = with.latent_heads(static_cast<int>(i));
      const auto& heads_before = plain.latent_heads(static_cast<int>(i));
      std::vector<float> row(static_cast<size_t>(c.mla.latent)), before(row.size());
      const int64_t h = c.mla.heads - 1;
      unpack_row(heads.value_up[static_cast<size_t>(h)], 1, row.data());
      unpack_row(heads_before.value_up[static_cast<size_t>(h)], 1, before.data());
      const int64_t first = (h * (c.mla.nope + c.mla.value) + c.mla.nope + 1) * c.mla.latent;
      for (size_t k = 0; k < row.size(); ++k) {
        ASSERT_NEAR(row[k], static_cast<double>(before[k]) + delta[static_cast<size_t>(first) + k], 1e-6);
      }
      compare(w.mla.q.matrix, base.mla.q.matrix, layer + "self_attn.q_proj");
    } else {
      compare(w.linear.f_b.matrix, base.linear.f_b.matrix, layer + "self_attn.f_b_proj");
      compare(w.linear.beta.matrix, base.linear.beta.matrix, layer + "self_attn.b_proj");
    }
    if (c.sparse[i]) {
      compare(with.experts(static_cast<int>(i))[2].down, plain.experts(static_cast<int>(i))[2].down,
              layer + "block_sparse_moe.experts.2.w2");
      compare(w.moe.router.matrix, base.moe.router.matrix, layer + "block_sparse_moe.gate");
    }
  }
}

// Quantised weights: what the file says, plus the adapter, with nothing rounded to blocks again.
TEST(Lora, quantised_weights_keep_the_whole_sum) {
  const io::TemporaryDirectory directory;
  const std::string gguf = directory.path() + "/m.gguf";
  ConvertOptions options;
  options.type = WeightType::kQ8_0;
  convert_to_gguf(kTiny, gguf, options);
  const TestAdapter adapter([](const Parameter& p) { return p.name.ends_with("up_proj.weight"); });
  const LoraSource source{adapter.write(directory.path() + "/a"), 1.0};
  const auto plain = LoadedModel::load(tiny_config(), io::Checkpoint::open(gguf), 1);
  const auto with = LoadedModel::load(tiny_config(), io::Checkpoint::open(gguf), 1, {&source, 1});
  const WeightMatrix& w = with.weights().layers[0].mlp.up.matrix;
  const WeightMatrix& base = plain.weights().layers[0].mlp.up.matrix;
  ASSERT_EQ(base.dtype, Dtype::kQ8_0);
  ASSERT_EQ(w.dtype, Dtype::kF32);
  EXPECT_EQ(with.weights().layers[0].mlp.gate.matrix.dtype, Dtype::kQ8_0);
  const auto delta = adapter.delta("model.layers.0.mlp.up_proj", w.rows, w.cols, 2.0);
  std::vector<float> row(static_cast<size_t>(w.cols)), before(row.size());
  for (int64_t r = 0; r < w.rows; ++r) {
    unpack_row(w, r, row.data());
    unpack_row(base, r, before.data());
    for (size_t i = 0; i < row.size(); ++i) {
      ASSERT_NEAR(row[i], static_cast<double>(before[i]) + delta[static_cast<size_t>(r * w.cols) + i], 1e-6);
    }
  }
}

// PEFT stores the head's own weights beside its pair.
TEST(Lora, copies_of_the_base_have_to_be_those_of_the_model) {
  const io::TemporaryDirectory directory;
  TestAdapter adapter([](const Parameter& p) { return p.role == Role::kHead; });
  const auto checkpoint = io::Checkpoint::open(kTiny);
  const TensorView& head = checkpoint.get("lm_head.weight");
  Matrix copy{head.shape, std::vector<float>(static_cast<size_t>(head.elements()))};
  std::memcpy(copy.values.data(), head.data, head.bytes());
  const std::string name = "base_model.model.lm_head.base_layer.weight";
  adapter.tensors[name] = copy;
  const LoraSource source{adapter.write(directory.path() + "/a"), 1.0};
  EXPECT_NO_THROW(LoadedModel::load(tiny_config(), io::Checkpoint::open(kTiny), 1, {&source, 1}));
  adapter.tensors[name].values[7] += 0.1F;
  adapter.write(source.directory);
  try {
    LoadedModel::load(tiny_config(), io::Checkpoint::open(kTiny), 1, {&source, 1});
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("element 7: "), std::string::npos) << error.what();
  }
  adapter.tensors[name].shape = {copy.shape[1], copy.shape[0]};
  EXPECT_NE(error_of(adapter).find("the copy of 'lm_head' has shape"), std::string::npos);
}

// transformers' own class names some modules otherwise.
TEST(Lora, other_spellings_of_a_module_are_the_same_module) {
  TestAdapter adapter([](const Parameter&) { return false; });
  Random random(3);
  const Config c = tiny_config();
  adapter.add("model.layers.0.self_attn.forget_gate.f_a_proj", {c.linear.key_dim, c.hidden}, random);
  EXPECT_EQ(error_of(adapter), "no error");
  adapter.add("model.layers.0.self_attn.f_a_proj", {c.linear.key_dim, c.hidden}, random);
  EXPECT_NE(error_of(adapter).find("comes twice"), std::string::npos);
}

TEST(Lora, bad_tensors_are_named) {
  const std::string file =
      "adapter_model.safetensors: tensor 'base_model.model.model.layers.0.mlp.up_proj.lora_";
  const std::string up = "base_model.model.model.layers.0.mlp.up_proj.lora_";
  expect_error("no error", [](TestAdapter&) {});
  expect_error(file + "A.weight' is missing, expected it beside the other half",
               [&](TestAdapter& a) { a.tensors.erase(up + "A.weight"); });
  expect_error(file + "B.weight' is missing", [&](TestAdapter& a) { a.tensors.erase(up + "B.weight"); });
  expect_error(file + "A.weight': found shape [4, 2], expected [3, in] (r in adapter_config.json)",
               [&](TestAdapter& a) {
                 a.tensors[up + "A.weight"] = {{4, 2}, std::vector<float>(8)};
               });
  expect_error(file + "B.weight': found shape [3], expected [out, 3]", [&](TestAdapter& a) {
    a.tensors[up + "B.weight"] = {{3}, std::vector<float>(3)};
  });
  expect_error(file + "B.weight': the pair gives a matrix [5, ", [&](TestAdapter& a) {
    a.tensors[up + "B.weight"] = {{5, 3}, std::vector<float>(15)};
  });
  expect_error(file + "A.weight' holds NaN or infinity",
               [&](TestAdapter& a) { a.tensors[up + "A.weight"].values[1] = std::nanf(""); });
  expect_error("adapter_model.safetensors: tensor 'x.lora_A.weight': expected a name base_model.model.MODULE",
               [](TestAdapter& a) {
                 a.tensors["x.lora_A.weight"] = {{3, 1}, {1, 1, 1}};
               });
  expect_error("adapter_model.safetensors: found no tensors", [](TestAdapter& a) { a.tensors.clear(); });
  Random random(1);
  const auto refused = [&](const std::string& module, const Shape& shape, const std::string& why) {
    expect_error("adapter_model.safetensors: tensor 'base_model.model." + module + ".lora_B.weight': " + why,
                 [&](TestAdapter& a) { a.add(module, shape, random); });
  };
  refused("model.layers.99.mlp.up_proj", {8, 8}, "the model has no matrix 'model.layers.99.mlp.up_proj'");
  refused("model.embed_tokens", {8, 8}, "'model.embed_tokens' is the embedding table, expected a matrix");
  refused("model.norm", {8, 1}, "'model.norm' is a convolution or a vector, expected a matrix");
}

TEST(Lora, bad_configurations_are_named) {
  const auto refused = [](const char* key, const json& value, const std::string& why) {
    expect_error("adapter_config.json: key '" + std::string(key) + "': " + why,
                 [&](TestAdapter& a) { a.config[key] = value; });
  };
  refused("peft_type", "IA3", "found \"IA3\", expected \"LORA\"");
  refused("r", 0, "found 0, expected an integer from 1");
  refused("lora_alpha", "x", "found \"x\", expected a number");
  refused("use_dora", true, "found true, expected nothing: Kilin does not compute this");
  refused("alpha_pattern", {{"q_proj", 2}}, "found an object, expected nothing");
  refused("modules_to_save", {"lm_head"}, "found an array of 1, expected nothing");
  refused("bias", "all", "found \"all\", expected \"none\"");
  refused("init_lora_weights", "pissa", "found \"pissa\", expected true, false");
  refused("something_new", 1, "found 1, expected nothing");
  expect_error("no error", [](TestAdapter& a) {
    a.config["rank_pattern"] = json::object();
    a.config["modules_to_save"] = nullptr;
    a.config["use_dora"] = false;
    a.config["init_lora_weights"] = "gaussian";
    a.config["lora_dropout"] = 0.1;
    a.config["qalora_group_size"] = 16;  // PEFT writes it although use_qalora is false
  });
  expect_error(
      "adapter_model.safetensors: tensor 'base_model.model.lm_head.lora_A.weight': no module of this name is "
      "in",
      [](TestAdapter& a) { a.config["target_modules"] = {"q_proj"}; });
}

TEST(Lora, missing_and_cut_files_are_named) {
  const io::TemporaryDirectory directory;
  const std::string path = directory.path() + "/a";
  const auto error = [&](double scale) -> std::string {
    try {
      LoraAdapter::open({path, scale});
    } catch (const Error& e) {
      return std::string(e.what()).substr(path.size());
    }
    return "no error";
  };
  EXPECT_EQ(error(1).substr(0, 17), ": is no directory");
  TestAdapter(all).write(path);
  EXPECT_EQ(error(1), "no error");
  EXPECT_EQ(error(std::nan("")), ": found scale nan, expected a finite number");
  const std::string weights = path + "/adapter_model.safetensors";
  fs::resize_file(weights, fs::file_size(weights) - 10);
  EXPECT_EQ(error(1).substr(0, 27), "/adapter_model.safetensors:");
  fs::remove(weights);
  EXPECT_EQ(error(1).substr(0, 37), ": has no adapter_model.safetensors, e");
  fs::remove(path + "/adapter_config.json");
  EXPECT_EQ(error(1).substr(0, 30), ": has no adapter_config.json, ");
}

}  // namespace
}  // namespace kilin
