// SPDX-License-Identifier: Apache-2.0
#include "support/reference.h"

#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "model/config.h"

namespace kilin::testing {

namespace {
// The checkout; of a program that was carried to another machine the variable of the environment says where.
std::string source_directory() {
  const char* moved = std::getenv("KILIN_SOURCE_DIR");
  return moved != nullptr ? moved : KILIN_SOURCE_DIR;
}
}  // namespace

std::string bundled_model() { return source_directory() + "/models/kilin-docs-10m"; }
std::string reference_path(const std::string& name) {
  return source_directory() + "/tests/data/reference/" + name;
}

Golden::Golden(const std::string& name)
    : file_(io::SafetensorsFile::open(reference_path("goldens/" + name + ".safetensors"))) {}

namespace {
template <class T>
std::vector<T> values(const io::SafetensorsFile& file, const std::string& tensor, Dtype dtype) {
  const TensorView& view = file.get(tensor);
  if (view.dtype != dtype) throw std::runtime_error(tensor + " has another type");
  std::vector<T> v(static_cast<size_t>(view.elements()));
  std::memcpy(v.data(), view.data, view.bytes());
  return v;
}
}  // namespace

std::vector<float> Golden::floats(const std::string& t) const { return values<float>(file_, t, Dtype::kF32); }
std::vector<double> Golden::doubles(const std::string& t) const {
  return values<double>(file_, t, Dtype::kF64);
}
std::vector<int32_t> Golden::ids(const std::string& t) const {
  return values<int32_t>(file_, t, Dtype::kI32);
}

LoadedModel load_model(const std::string& directory) {
  return LoadedModel::load(read_config_file(directory + "/config.json", "transformers"),
                           io::Checkpoint::open(directory));
}

std::vector<float> run(Engine& engine, int32_t slot, int64_t past, std::span<const int32_t> tokens,
                       bool all) {
  const auto count = static_cast<int32_t>(tokens.size());
  const std::array<int32_t, 2> cu{0, count};
  std::vector<int32_t> wanted;
  for (int32_t i = all ? 0 : count - 1; i < count; ++i) {
    if (i >= 0) wanted.push_back(i);
  }
  const auto logits = engine.forward({tokens, cu, std::span(&slot, 1), std::span(&past, 1), wanted});
  return {logits.begin(), logits.end()};
}

double relative_error(std::span<const float> a, std::span<const float> b) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    const double d = static_cast<double>(a[i]) - b[i];
    error += d * d;
    norm += static_cast<double>(b[i]) * b[i];
  }
  return std::sqrt(error / (norm + 1e-300));
}

double largest_difference(std::span<const float> a, std::span<const float> b) {
  double largest = 0;
  for (size_t i = 0; i < b.size(); ++i)
    largest = std::max(largest, std::abs(static_cast<double>(a[i]) - b[i]));
  return largest;
}

::testing::AssertionResult close(std::span<const float> a, std::span<const float> b, double relative) {
  if (a.size() != b.size())
    return ::testing::AssertionFailure() << a.size() << " values, expected " << b.size();
  size_t worst = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    if (std::isnan(a[i]) != std::isnan(b[i])) return ::testing::AssertionFailure() << "NaN at " << i;
    if (std::abs(a[i] - b[i]) > std::abs(a[worst] - b[worst])) worst = i;
  }
  const double error = relative_error(a, b);
  if (b.empty() || error <= relative) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure()
         << "relative error " << error << " above " << relative << ", largest at " << worst << ": "
         << a[worst] << ", expected " << b[worst];
}

}  // namespace kilin::testing
