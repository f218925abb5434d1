// SPDX-License-Identifier: Apache-2.0
// config.json of a model: any bytes give a configuration that passes its own checks, or an Error.
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "base/error.h"
#include "model/config.h"
#include "model/parameters.h"

namespace {
struct Nothing {};
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    const kilin::io::JsonReader json(kilin::io::parse_json(text, "config.json"), "config.json");
    const kilin::Config config = kilin::read_config(json, kilin::compatibility("transformers"));
    kilin::check_config(config, "config.json");
    if (config.layer_count() * (1 + config.moe.experts) < 10000) {
      kilin::ModelWeights<Nothing> weights(config);
      kilin::visit_parameters(weights, config, [](const kilin::Parameter& p, Nothing&) {
        for (int64_t d : p.shape) {
          if (d < 0) __builtin_trap();
        }
      });
    }
  } catch (const kilin::Error&) {
  }
  return 0;
}
