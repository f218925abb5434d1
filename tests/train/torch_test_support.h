// SPDX-License-Identifier: Apache-2.0
// What the tests of the training room share.
#pragma once
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <numeric>

#include "base/random.h"
#include "oracle/scalar_ops.h"
#include "train/torch_model.h"

namespace kilin::testing {

inline std::vector<int32_t> random_ids(int64_t count, int64_t vocab, uint64_t seed) {
  Random random(seed);
  std::vector<int32_t> ids(static_cast<size_t>(count));
  for (int32_t& id : ids) id = static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab)));
  return ids;
}

inline train::TrainBatch batch_of(const std::vector<std::vector<int32_t>>& sequences) {
  std::vector<int64_t> tokens;
  train::TrainBatch batch;
  batch.cu_seqlens = {0};
  for (const auto& ids : sequences) {
    tokens.insert(tokens.end(), ids.begin(), ids.end());
    batch.cu_seqlens.push_back(static_cast<int32_t>(tokens.size()));
  }
  batch.tokens = at::tensor(tokens, at::kLong);
  return batch;
}

inline train::TrainBatch random_batch(const std::vector<int64_t>& lengths, int64_t vocab, uint64_t seed) {
  std::vector<std::vector<int32_t>> sequences;
  for (size_t i = 0; i < lengths.size(); ++i)
    sequences.push_back(random_ids(lengths[i], vocab, seed * 100 + i));
  return batch_of(sequences);
}

inline at::Tensor parameter(const train::TorchModel& model, const std::string& name) {
  for (const auto& p : model.parameters()) {
    if (p.name == name) return p.tensor;
  }
  ADD_FAILURE() << "no parameter " << name;
  return {};
}

// Moves norms, gates, biases away from their initial values and makes matrices larger, so that every part of
// the model matters for its result. Decays end up between 0.05 and 0.9 a token.
inline void disturb(train::TorchModel& model, uint64_t seed) {
  Random random(seed);
  for (const auto& p : model.parameters()) {
    at::Tensor change = at::empty(p.shape, at::kDouble);
    for (int64_t i = 0; i < change.numel(); ++i)
      change.data_ptr<double>()[i] =
          p.role == Role::kVector ? 0.3 * random.uniform(-1, 1) : 0.1 * random.normal();
    if (p.name.ends_with("A_log") || p.name.ends_with("dt_bias")) p.tensor.detach().zero_();
    p.tensor.detach().add_(change.to(p.tensor.scalar_type()));
  }
}

inline double relative_error(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes()) {
    ADD_FAILURE() << "shapes differ";
    return 1e30;
  }
  const at::Tensor x = a.detach().to(at::kDouble), y = b.detach().to(at::kDouble);
  const double size = y.norm().item<double>(), difference = (x - y).norm().item<double>();
  return size == 0.0 ? difference : difference / size;
}

template <class T>
at::Tensor tensor_of(const std::vector<T>& values, at::IntArrayRef shape) {
  return at::tensor(values).view(shape);
}

// The model's parameters for the oracle; `change` may move one before it goes there.
template <class T>
ModelWeights<Matrix<T>> oracle_weights(const train::TorchModel& model) {
  ModelWeights<Matrix<T>> weights(model.config());
  size_t i = 0;
  visit_parameters(weights, model.config(), [&](const Parameter& p, Matrix<T>& w) {
    const at::Tensor x = model.parameters()[i++].tensor.detach().to(at::kDouble).contiguous();
    const bool row = p.role == Role::kVector;
    w = Matrix<T>(row ? 1 : x.size(0), row ? x.numel() : x.numel() / x.size(0));
    std::copy_n(x.data_ptr<double>(), x.numel(), w.v.begin());
  });
  return weights;
}

// Logits of all rows by the oracle.
template <class T>
Matrix<T> oracle_forward(const Config& config, const ModelWeights<Matrix<T>>& weights,
                         const train::TrainBatch& batch) {
  const at::Tensor ids = batch.tokens.to(at::kInt);
  const size_t sequences = batch.cu_seqlens.size() - 1;
  std::vector<int32_t> slots(sequences), wanted(static_cast<size_t>(ids.numel()));
  std::iota(slots.begin(), slots.end(), 0);
  std::iota(wanted.begin(), wanted.end(), 0);
  const std::vector<int64_t> past(sequences);
  ScalarOps<T> oracle(config);
  oracle.begin({{ids.data_ptr<int32_t>(), wanted.size()}, batch.cu_seqlens, slots, past, wanted});
  return model_forward(oracle, config, weights);
}

template <class T>
at::Tensor oracle_logits(const train::TorchModel& model, const train::TrainBatch& batch) {
  const auto logits = oracle_forward<T>(model.config(), oracle_weights<T>(model), batch);
  return tensor_of(logits.v, {logits.rows, logits.width});
}

}  // namespace kilin::testing
