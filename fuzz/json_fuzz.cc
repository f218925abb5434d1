// SPDX-License-Identifier: Apache-2.0
// Any text is either refused with a one-line Error or read as nlohmann reads it; a JsonReader over it answers
// every question of a configuration with a value in range or with an Error.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "base/error.h"
#include "io/json.h"

namespace {

using kilin::io::JsonReader;

void require(bool ok) {
  if (!ok) std::abort();
}

template <class F>
void attempt(F f) {
  try {
    f();
  } catch (const kilin::Error& error) {
    require(std::string(error.what()).find('\n') == std::string::npos);
  }
}

// Asks for each key as every type; `depth` ends the walk through nested objects.
void read_as_config(const JsonReader& reader, int depth) {
  for (const std::string& key : reader.keys()) {
    attempt([&] {
      const int64_t value = reader.integer(key, 1, 65536);
      require(value >= 1 && value <= 65536);
    });
    attempt([&] { reader.integer_or(key, 3, INT64_MIN, INT64_MAX); });
    attempt([&] {
      const double value = reader.number_or(key, 0.5, 0, 1);
      require(value >= 0 && value <= 1);
    });
    attempt([&] { reader.number(key); });
    attempt([&] { reader.boolean_or(key, true); });
    attempt([&] { reader.string_or(key, ""); });
    attempt([&] { reader.choice(key, {"silu", "sigmoid"}); });
    attempt([&] { reader.strings(key); });
    attempt([&] {
      for (int64_t value : reader.integers(key, 1, 8)) require(value >= 1 && value <= 8);
    });
    if (depth == 0) continue;
    attempt([&] {
      if (auto nested = reader.optional_object(key)) read_as_config(*nested, depth - 1);
    });
    attempt([&] {
      for (const JsonReader& nested : reader.objects(key)) read_as_config(nested, depth - 1);
    });
  }
  attempt([&] { reader.integer("head_dim", 1, 65536); });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  attempt([&] {
    nlohmann::json value = kilin::io::parse_json(text, "config.json");
    require(value == nlohmann::json::parse(text));
    const JsonReader reader(std::move(value), "config.json");
    read_as_config(reader, 4);
    require(reader.unread_keys().empty());
  });
  return 0;
}
