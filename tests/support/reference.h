// SPDX-License-Identifier: Apache-2.0
// The reference data of tests/data/reference and the bundled model, and comparisons that say what differs.
#pragma once
#include <gtest/gtest.h>

#include <span>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "io/safetensors.h"

namespace kilin::testing {

std::string bundled_model();                          // models/kilin-docs-10m
std::string reference_path(const std::string& name);  // tests/data/reference/<name>

// One golden file: tensors as float or int32 values.
class Golden {
 public:
  explicit Golden(const std::string& name);  // without ".safetensors"
  std::vector<float> floats(const std::string& tensor) const;
  std::vector<double> doubles(const std::string& tensor) const;
  std::vector<int32_t> ids(const std::string& tensor) const;
  Shape shape(const std::string& tensor) const { return file_.get(tensor).shape; }
  bool contains(const std::string& tensor) const { return file_.contains(tensor); }

 private:
  io::SafetensorsFile file_;
};

LoadedModel load_model(const std::string& directory);

// One sequence from its beginning in slot `slot` of the engine; logits of all tokens, or of the last.
std::vector<float> run(Engine& engine, int32_t slot, int64_t past, std::span<const int32_t> tokens,
                       bool all = true);

// || a - b || / || b ||, and the place of the largest difference in the failure message.
double relative_error(std::span<const float> a, std::span<const float> b);
::testing::AssertionResult close(std::span<const float> a, std::span<const float> b, double relative);
// largest |a - b|
double largest_difference(std::span<const float> a, std::span<const float> b);

}  // namespace kilin::testing
