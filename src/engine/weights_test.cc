// SPDX-License-Identifier: Apache-2.0
#include "engine/weights.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "engine/convert.h"
#include "io/gguf_writer.h"
#include "io/json.h"
#include "io/safetensors_writer.h"
#include "io/test_support.h"
#include "model/gguf_config.h"
#include "model/stored_parameter.h"

namespace kilin {
namespace {

namespace fs = std::filesystem;

const std::string kTiny = KILIN_SOURCE_DIR "/tests/data/reference/tiny-random";

// The tensors of a checkpoint as float32 values that a test can rename, join and spoil.
struct Tensors {
  struct Entry {
    Shape shape;
    std::vector<float> values;
  };
  std::map<std::string, Entry> entries;

  static Tensors tiny() {
    Tensors t;
    const auto checkpoint = io::Checkpoint::open(kTiny);
    for (const std::string& name : checkpoint.names()) {
      const TensorView& view = checkpoint.get(name);
      std::vector<float> values(static_cast<size_t>(view.elements()));
      std::memcpy(values.data(), view.data, view.bytes());
      t.entries[name] = {view.shape, std::move(values)};
    }
    return t;
  }
  Entry take(const std::string& name) {
    Entry e = std::move(entries.at(name));
    entries.erase(name);
    return e;
  }
  void rename(const std::string& from, const std::string& to) { entries[to] = take(from); }
  // Appends the values of `from` to `to`, which gets the given shape.
  void append(const std::string& from, const std::string& to, const Shape& shape) {
    const Entry e = take(from);
    Entry& target = entries[to];
    target.shape = shape;
    target.values.insert(target.values.end(), e.values.begin(), e.values.end());
  }
  LoadedModel load() const {
    const io::TemporaryDirectory directory;
    const std::string path = directory.path() + "/model.safetensors";
    std::vector<io::NamedTensor> list;
    for (const auto& [name, e] : entries) list.push_back({name, {Dtype::kF32, e.shape, e.values.data()}});
    io::write_safetensors(path, list, {});
    return LoadedModel::load(read_config_file(kTiny + "/config.json", "transformers"),
                             io::Checkpoint::open(path));
  }
  std::string error() const {
    try {
      load();
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  }
};

std::vector<std::vector<float>> all_values(const LoadedModel& model) {
  std::vector<std::vector<float>> all;
  for (const NamedWeight& w : model.table()) {
    all.emplace_back(static_cast<size_t>(w.view.elements()));
    std::memcpy(all.back().data(), w.view.data, w.view.bytes());
  }
  return all;
}

TEST(Weights, names_of_the_native_class_load_the_same_model) {
  Tensors t = Tensors::tiny();
  for (const std::string layer : {"model.layers.0.", "model.layers.1.", "model.layers.2."}) {
    for (const char* name : {"A_log", "dt_bias", "f_a_proj.weight", "f_b_proj.weight"}) {
      t.rename(layer + "self_attn." + name, layer + "self_attn.forget_gate." + name);
    }
    t.entries[layer + "self_attn.forget_gate.A_log"].shape = {2, 1};
    t.entries[layer + "self_attn.forget_gate.dt_bias"].shape = {2, 32};
    for (const char* name : {"q", "k", "v"}) {
      t.append(layer + "self_attn." + name + "_conv1d.weight", layer + "self_attn.conv1d.weight",
               {192, 1, 4});
    }
  }
  for (const std::string layer : {"model.layers.1.", "model.layers.2.", "model.layers.3."}) {
    const std::string from = layer + "block_sparse_moe.", to = layer + "mlp.";
    for (int e = 0; e < 8; ++e) {
      const std::string expert = from + "experts." + std::to_string(e) + ".";
      t.append(expert + "w1.weight", to + "experts.gate_up_proj", {8, 64, 64});
      t.append(expert + "w3.weight", to + "experts.gate_up_proj", {8, 64, 64});
      t.append(expert + "w2.weight", to + "experts.down_proj", {8, 64, 32});
    }
    for (const char* name : {"gate.weight", "gate.e_score_correction_bias", "shared_experts.gate_proj.weight",
                             "shared_experts.up_proj.weight", "shared_experts.down_proj.weight"}) {
      t.rename(from + name, to + name);
    }
  }
  EXPECT_EQ(all_values(t.load()), all_values(Tensors::tiny().load()));
}

TEST(Weights, other_spellings_of_experts_and_the_dense_layer_load_too) {
  Tensors t = Tensors::tiny();
  for (const char* name :
       {"gate_proj", "up_proj", "down_proj"}) {  // as save_pretrained writes the dense layer
    t.rename(std::string("model.layers.0.mlp.") + name + ".weight",
             std::string("model.layers.0.block_sparse_moe.") + name + ".weight");
  }
  for (int e = 0; e < 8; ++e) {
    const std::string expert = "model.layers.2.block_sparse_moe.experts." + std::to_string(e) + ".";
    t.rename(expert + "w1.weight", expert + "gate_proj.weight");
    t.rename(expert + "w3.weight", expert + "up_proj.weight");
    t.rename(expert + "w2.weight", expert + "down_proj.weight");
  }
  EXPECT_EQ(all_values(t.load()), all_values(Tensors::tiny().load()));
}

TEST(Weights, a_missing_tensor_is_named_with_its_shape) {
  Tensors t = Tensors::tiny();
  t.take("model.layers.2.self_attn.o_norm.weight");
  const std::string error = t.error();
  EXPECT_NE(error.find("model.layers.2.self_attn.o_norm.weight"), std::string::npos) << error;
  EXPECT_NE(error.find("[32]"), std::string::npos) << error;
}

TEST(Weights, a_wrong_shape_names_both_shapes) {
  Tensors t = Tensors::tiny();
  t.entries["model.layers.1.self_attn.b_proj.weight"].shape = {64, 2};
  const std::string error = t.error();
  EXPECT_NE(error.find("found shape [64, 2], expected [2, 64]"), std::string::npos) << error;
}

TEST(Weights, a_tensor_without_a_parameter_is_refused) {
  Tensors t = Tensors::tiny();
  t.entries["model.layers.1.self_attn.extra.weight"] = {{1}, {0.0f}};
  EXPECT_NE(t.error().find("extra.weight' belongs to no parameter"), std::string::npos);
}

TEST(Weights, not_finite_values_are_found_and_named) {
  Tensors t = Tensors::tiny();
  t.entries["model.layers.1.self_attn.dt_bias"].values[3] = NAN;
  EXPECT_NE(t.error().find("model.layers.1.self_attn.dt_bias"), std::string::npos);
  t = Tensors::tiny();
  EXPECT_EQ(t.load().first_not_finite(), "");
  t.entries["model.layers.2.block_sparse_moe.experts.3.w2.weight"].values[2000] = INFINITY;
  EXPECT_EQ(t.load().first_not_finite(), "model.layers.2.block_sparse_moe.experts.3.w2.weight");
}

TEST(Weights, a_configuration_far_beyond_the_checkpoint_takes_no_memory) {
  Config c = read_config_file(kTiny + "/config.json", "transformers");
  c.moe.experts = 65536;
  c.layers.assign(4096, LayerKind::kKda);
  c.sparse.assign(4096, true);
  EXPECT_THROW(LoadedModel::load(c, io::Checkpoint::open(kTiny)), Error);
  c.moe.width = 1 << 20;
  EXPECT_THROW(LoadedModel::random(c, 1), Error);
}

TEST(Weights, a_parameter_of_one_element_may_be_a_scalar) {
  const io::TemporaryDirectory directory;
  const std::string path = directory.path() + "/model.safetensors";
  const std::string name = "model.layers.0.self_attn.A_log";
  const float value = 0.75f;
  const std::vector<io::NamedTensor> tensors{{name, {Dtype::kF32, {}, &value}}};
  io::write_safetensors(path, tensors, {});
  const auto checkpoint = io::Checkpoint::open(path);
  const Config c = read_config_file(kTiny + "/config.json", "transformers");
  float found = 0;
  StoredParameter::find(checkpoint, {name, {1}, Role::kVector}, c).read(0, 1, &found);
  EXPECT_EQ(found, value);
}

// Dimensions of 1 are no part of a shape's comparison; blocks must lie in the rows all the same.
TEST(Weights, blocks_across_rows_are_refused) {
  const io::TemporaryDirectory directory;
  nlohmann::json json = io::parse_json_file(kTiny + "/config.json");
  json["qk_nope_head_dim"] = 1;
  const std::string config_path = directory.write("config.json", json.dump());
  const std::string whole = directory.path() + "/whole.gguf", bad = directory.path() + "/bad.gguf";
  random_gguf(config_path, 1, whole, {});
  const Config c = read_config_file(config_path, "transformers");
  {
    const auto file = io::GgufFile::open(whole);
    io::GgufWriter writer(bad);
    write_gguf_config(c, json.dump(), writer);
    const std::vector<std::byte> zeros(2 * 34);
    const auto is_key = [](const std::string& name) { return name.ends_with("attn_k_b.weight"); };
    for (const std::string& name : file.names()) {
      const TensorView& view = *file.find(name);
      writer.add_tensor(name, is_key(name) ? Dtype::kQ8_0 : view.dtype,
                        is_key(name) ? Shape{2, 32} : view.shape);
    }
    for (const std::string& name : file.names()) {
      const TensorView& view = *file.find(name);
      writer.write(is_key(name) ? zeros.data() : view.data, is_key(name) ? zeros.size() : view.bytes());
    }
    writer.commit();
  }
  EXPECT_GT(LoadedModel::load(c, io::Checkpoint::open(whole)).packed_bytes(), 0u);
  try {
    LoadedModel::load(c, io::Checkpoint::open(bad));
    FAIL() << "not refused";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("attn_k_b.weight': found type Q8_0, which does not fit rows of 1"),
              std::string::npos)
        << e.what();
  }
}

TEST(Weights, random_weights_repeat_with_the_seed) {
  const Config c = read_config_file(kTiny + "/config.json", "transformers");
  const auto bytes = [&](uint64_t seed) {
    const LoadedModel model = LoadedModel::random(c, seed, StoredValues::kKeep);
    const TensorView& head = model.table().back().view;
    const auto* p = static_cast<const char*>(head.data);
    return std::string(p, p + head.bytes());
  };
  EXPECT_EQ(bytes(1), bytes(1));
  EXPECT_NE(bytes(1), bytes(2));
}

}  // namespace
}  // namespace kilin
