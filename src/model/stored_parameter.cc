// SPDX-License-Identifier: Apache-2.0
#include "model/stored_parameter.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "model/gguf_names.h"
#include "quant/formats.h"

namespace kilin {
namespace {

const TensorView& checked(const io::Checkpoint& checkpoint, const std::string& name, const Shape& expected,
                          Role role) {
  const TensorView* stored = checkpoint.find(name);
  check(stored != nullptr, "{}: tensor '{}' is missing, expected with shape {}", checkpoint.path(), name,
        to_string(expected));
  check(same_shape(stored->shape, expected, role), "{}: tensor '{}': found shape {}, expected {}",
        checkpoint.path(), name, to_string(stored->shape), to_string(expected));
  check(quant::readable(stored->dtype), "{}: tensor '{}': found type {}, expected a type of weights",
        checkpoint.path(), name, dtype_name(stored->dtype));
  return *stored;
}

}  // namespace

StoredParameter StoredParameter::find(const io::Checkpoint& checkpoint, const Parameter& p, const Config& c) {
  for (const TensorSource& source : tensor_sources(p, c)) {
    if (!checkpoint.contains(source.name)) continue;
    const TensorView& stored = checked(checkpoint, source.name, source.shape, p.role);
    StoredParameter found;
    found.transform_ = source.transform;
    found.elements_ = element_count(p.shape);
    found.tensors_ = {source.name};
    found.place_ = fmt::format("{}: tensor '{}'", checkpoint.path(), source.name);
    found.view_ = stored;
    if (source.transform == Transform::kJoinHeads) {
      const TensorView& second = checked(checkpoint, source.second_name, source.second_shape, p.role);
      found.tensors_.push_back(source.second_name);
      found.join_heads(c, stored, second);
      return found;
    }
    // A part of a tensor has to start and end at a block's edge: rows do, since a block lies within one.
    const int64_t block = dtype_block(stored.dtype);
    const int64_t row = stored.shape.empty() ? 1 : stored.shape.back();  // a scalar has no dimensions
    check(source.offset % block == 0 && found.elements_ % block == 0 && row % block == 0,
          "{}: rows of {} elements are no multiple of the {} of a block of {}", found.place_, row, block,
          dtype_name(stored.dtype));
    found.view_.shape = p.shape;
    found.view_.data = static_cast<const std::byte*>(stored.data) + dtype_bytes(stored.dtype, source.offset);
    return found;
  }
  const std::string other = checkpoint.gguf() != nullptr ? fmt::format(" (in GGUF '{}')", gguf_name(p)) : "";
  fail("{}: tensor '{}'{} is missing, expected with shape {}", checkpoint.path(), p.name, other,
       to_string(p.shape));
}

// Rows of head h: k_b[h] transposed to [nope][latent], then v_b[h] [value][latent].
void StoredParameter::join_heads(const Config& c, const TensorView& k, const TensorView& v) {
  const MlaConfig& a = c.mla;
  std::vector<float> k_b(static_cast<size_t>(k.elements()));
  std::vector<float> v_b(static_cast<size_t>(v.elements()));
  quant::dequantize(k.dtype, k.data, k.elements(), k_b.data());
  quant::dequantize(v.dtype, v.data, v.elements(), v_b.data());
  joined_.resize(static_cast<size_t>(elements_));
  float* out = joined_.data();
  for (int64_t head = 0; head < a.heads; ++head) {
    const float* from = k_b.data() + head * a.latent * a.nope;
    for (int64_t row = 0; row < a.nope; ++row) {
      for (int64_t column = 0; column < a.latent; ++column) *out++ = from[column * a.nope + row];
    }
    out = std::copy_n(v_b.data() + head * a.value * a.latent, a.value * a.latent, out);
  }
}

const std::byte* StoredParameter::bytes() const {
  return transform_ == Transform::kNone ? static_cast<const std::byte*>(view_.data) : nullptr;
}

void StoredParameter::read(int64_t first, int64_t n, float* out) const {
  KILIN_ASSERT(first >= 0 && n >= 0 && first + n <= elements_);
  if (transform_ == Transform::kJoinHeads) {
    std::copy_n(joined_.data() + first, n, out);
    return;
  }
  const auto* at = static_cast<const std::byte*>(view_.data) + dtype_bytes(view_.dtype, first);
  quant::dequantize(view_.dtype, at, n, out);
  if (transform_ != Transform::kLogOfNegative) return;
  for (int64_t i = 0; i < n; ++i) {
    check(out[i] < 0, "{}: element {}: found {}, expected a negative number (-exp(A_log))", place_, first + i,
          out[i]);
    out[i] = std::log(-out[i]);
  }
}

void StoredParameter::read_negative_exp(int64_t first, int64_t n, float* out) const {
  if (transform_ == Transform::kLogOfNegative) {
    const auto* at = static_cast<const std::byte*>(view_.data) + dtype_bytes(view_.dtype, first);
    return quant::dequantize(view_.dtype, at, n, out);
  }
  read(first, n, out);
  for (int64_t i = 0; i < n; ++i) out[i] = -std::exp(out[i]);
}

}  // namespace kilin
