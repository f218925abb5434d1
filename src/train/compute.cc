// SPDX-License-Identifier: Apache-2.0
#include "train/compute.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <chrono>

#include "base/error.h"

namespace kilin::train {
namespace {

using Clock = std::chrono::steady_clock;

void finish(const at::Device& device) {
  if (!device.is_cuda()) return;
  const c10::impl::VirtualGuardImpl guard(device.type());
  guard.synchronizeDevice(guard.getDevice().index());
}

// Sequences with labels, and how many of them have no wrong one.
std::pair<int64_t, int64_t> exact_sequences(const PackedRows& rows, const at::Tensor& correct) {
  const at::Tensor flags = correct.to(at::kCPU).contiguous();
  const bool* flag = flags.data_ptr<bool>();
  int64_t sequences = 0;
  int64_t exact = 0;
  for (size_t i = 0; i + 1 < rows.cu_seqlens.size(); ++i) {
    bool any = false;
    bool all = true;
    for (int32_t row = rows.cu_seqlens[i]; row < rows.cu_seqlens[i + 1]; ++row) {
      if (rows.labels[static_cast<size_t>(row)] == kNoLabel) continue;
      any = true;
      all = *flag++ && all;
    }
    sequences += any ? 1 : 0;
    exact += any && all ? 1 : 0;
  }
  return {sequences, exact};
}

}  // namespace

RowLoss row_loss(TorchModel& model, const PackedRows& rows, bool want_correct) {
  std::vector<int64_t> wanted, labels;
  for (size_t i = 0; i < rows.labels.size(); ++i) {
    if (rows.labels[i] == kNoLabel) continue;
    wanted.push_back(static_cast<int64_t>(i));
    labels.push_back(rows.labels[i]);
  }
  KILIN_ASSERT(!labels.empty());
  // On the CPU: forward() looks at the values, and on a GPU each look would wait for it.
  TrainBatch batch;
  batch.tokens = at::tensor(std::vector<int64_t>(rows.tokens.begin(), rows.tokens.end()), at::kLong);
  batch.cu_seqlens = rows.cu_seqlens;
  if (wanted.size() < rows.labels.size()) batch.wanted = at::tensor(wanted, at::kLong);
  const at::Tensor logits = model.forward(batch);
  const at::Tensor targets = at::tensor(labels, at::kLong).to(model.options().device);
  RowLoss result;
  result.sum = at::cross_entropy_loss(logits, targets, {}, at::Reduction::Sum);
  if (want_correct) result.correct = logits.detach().argmax(1).eq(targets);
  return result;
}

Evaluation evaluate(TorchModel& model, const RowSource& source, int64_t rows, int64_t at_once,
                    ProcessGroup& group) {
  const c10::NoGradGuard no_grad;
  double loss = 0;
  int64_t counted = 0, correct = 0, sequences = 0, exact = 0;
  for (int64_t first = group.rank() * at_once; first < rows; first += group.size() * at_once) {
    PackedRows packed;
    for (int64_t row = first; row < std::min(rows, first + at_once); ++row)
      source.append(static_cast<uint64_t>(row), packed);
    const int64_t labels = packed.counted();
    if (labels == 0) continue;
    const RowLoss part = row_loss(model, packed, true);
    loss += part.sum.item<double>();
    counted += labels;
    correct += part.correct.sum().item<int64_t>();
    const auto [some, right] = exact_sequences(packed, part.correct);
    sequences += some;
    exact += right;
  }
  at::Tensor sums = at::tensor({loss, static_cast<double>(counted), static_cast<double>(correct),
                                static_cast<double>(sequences), static_cast<double>(exact)},
                               at::kDouble)
                        .to(model.options().device);
  group.sum(sums);
  const at::Tensor totals = sums.to(at::kCPU);
  const double* total = totals.data_ptr<double>();
  Evaluation result;
  result.counted = static_cast<int64_t>(total[1]);
  if (result.counted == 0) return result;
  result.loss = total[0] / total[1];
  result.accuracy = total[2] / total[1];
  result.exact = total[4] / total[3];
  return result;
}

double measure_peak_flops(const at::Device& device, bool bf16) {
  const int64_t n = device.is_cuda() ? 8192 : 768;
  constexpr int kTries = 6;
  const c10::NoGradGuard no_grad;
  const auto options = at::TensorOptions().device(device).dtype(bf16 ? at::kBFloat16 : at::kFloat);
  // Not of ones or zeros, with which GPUs run at a higher clock than with anything that is trained
  const at::Tensor a = at::randn({n, n}, options), b = at::randn({n, n}, options);
  at::Tensor c = at::matmul(a, b);
  double best = 1e300;
  for (int i = 0; i < kTries; ++i) {
    finish(device);
    const auto start = Clock::now();
    at::matmul_out(c, a, b);
    finish(device);
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  }
  const auto size = static_cast<double>(n);
  return 2 * size * size * size / best;
}

}  // namespace kilin::train
