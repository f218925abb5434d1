// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>
#include <vector>

#include "io/checkpoint.h"
#include "model/alternatives.h"

namespace kilin {

// A parameter as some checkpoint stores it, read as float32 in parts: for conversions, which never hold a
// whole model. Lives as long as the checkpoint or a copy of it.
class StoredParameter {
 public:
  // At the first of tensor_sources() that the checkpoint has. An Error, naming file and tensor, when there is
  // none, or of another shape or a type that cannot be read.
  static StoredParameter find(const io::Checkpoint& checkpoint, const Parameter& parameter,
                              const Config& config);

  Dtype dtype() const { return view_.dtype; }
  Transform transform() const { return transform_; }
  int64_t elements() const { return elements_; }
  // Names of the tensors that hold it: two for Transform::kJoinHeads.
  const std::vector<std::string>& tensors() const { return tensors_; }
  const std::string& place() const { return place_; }  // "FILE: tensor 'NAME'", for errors

  // The stored bytes, if they are the parameter's elements in their order (no transform); else nullptr.
  const std::byte* bytes() const;
  // The value of elements [first, first + n), multiples of the type's block. Thread-safe.
  void read(int64_t first, int64_t n, float* out) const;
  // -exp of it, for A_log: as stored in GGUF, else computed.
  void read_negative_exp(int64_t first, int64_t n, float* out) const;

 private:
  void join_heads(const Config& config, const TensorView& k, const TensorView& v);

  TensorView view_;  // of the parameter alone, if it is a part of a tensor
  Transform transform_ = Transform::kNone;
  int64_t elements_ = 0;
  std::vector<std::string> tensors_;
  std::string place_;
  std::vector<float> joined_;
};

}  // namespace kilin
