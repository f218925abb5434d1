// SPDX-License-Identifier: Apache-2.0
#include "model/config_text.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.h"

namespace kilin {
namespace {

Config read(const std::string& text, const std::string& compat = "transformers") {
  return read_config(io::JsonReader(io::parse_json(text, "written"), "written"), compatibility(compat));
}

Config tiny() {
  return read_config_file(std::string(KILIN_SOURCE_DIR) + "/tests/data/reference/tiny-random/config.json",
                          "transformers");
}

// Each member of the configuration away from what it has in tiny-random.
std::vector<Config> members() {
  std::vector<Config> all(1, tiny());
  const auto add = [&](auto change) {
    all.push_back(tiny());
    change(all.back());
  };
  add([](Config& c) { c.layers = {LayerKind::kGdn, LayerKind::kKda, LayerKind::kMla, LayerKind::kGdn}; });
  add([](Config& c) { c.sparse = {true, false, true, false}; });
  add([](Config& c) { c.sparse = {false, false, false, true}; });
  add([](Config& c) {
    c.linear.value_heads = 6;
    c.linear.value_dim = 24;
    c.linear.conv_taps = 1;
    c.linear.gate_lower_bound = -4.5;
  });
  add([](Config& c) { c.linear.output_gate = OutputGate::kNone; });
  add([](Config& c) { c.linear.output_gate = OutputGate::kSilu; });
  add([](Config& c) {
    c.mla.use_rope = true;
    c.mla.rope_theta = 500.25;
  });
  add([](Config& c) {
    c.moe.sigmoid_router = c.moe.renormalize = false;
    c.moe.groups = 4;
    c.moe.groups_kept = 2;
    c.moe.scale = 1.1;
    c.moe.shared = 0;
  });
  add([](Config& c) {
    c.moe = {};
    c.sparse.assign(4, false);
  });
  add([](Config& c) {
    c.tied_head = true;
    c.eos_ids = {3, 4};
    c.bos_id.reset();
    c.norm_eps = 1.25e-6;
    c.max_length = 77;
  });
  add([](Config& c) {
    c.layers.assign(4, LayerKind::kMla);
    c.linear = {};
  });
  return all;
}

TEST(ConfigText, reads_back_as_the_same_configuration) {
  for (const Config& c : members()) {
    const std::string text = config_text(c, "bfloat16");
    EXPECT_EQ(read(text), c) << text;
  }
}

TEST(ConfigText, a_new_dtype_takes_the_place_of_the_old_one) {
  const auto json = nlohmann::json::parse(config_text_with_dtype(
      R"({"torch_dtype": "bfloat16", "auto_map": {"a": "b"}, "hidden_size": 64})", "f", "float32"));
  EXPECT_EQ(json, (nlohmann::json{{"dtype", "float32"}, {"hidden_size", 64}}));
  EXPECT_THROW(config_text_with_dtype("[1]", "f", "float32"), Error);
}

}  // namespace
}  // namespace kilin
