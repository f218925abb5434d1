// SPDX-License-Identifier: Apache-2.0
// The operators' schemas and their CPU kernels (float32). python/kilin/_ops.py says what they do.
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <thread>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "base/thread_pool.h"
#include "cpu.h"
#include "kernels/kda/kda.h"

namespace kilin::torch_ops {
namespace {

constexpr int64_t kStatesEvery = 64;  // tokens between the states of chunk_states, as on the GPU

// One pool for the process, remade when its size changes and in a child after fork (where the threads of the
// parent do not exist; its pool is left alone, as it cannot be joined there).
class Threads {
 public:
  ThreadPool& pool() {
    const std::lock_guard lock(mutex_);
    if (pool_ == nullptr || owner_ != getpid()) {
      pool_ = new ThreadPool(count_);  // never freed: joining threads while the process exits can hang
      owner_ = getpid();
    }
    return *pool_;
  }
  void resize(int count) {
    const std::lock_guard lock(mutex_);
    if (count == count_ && pool_ != nullptr) return;
    count_ = count;
    pool_ = nullptr;  // other threads may be inside the old one: it sleeps from now on
  }

 private:
  std::mutex mutex_;
  ThreadPool* pool_ = nullptr;
  pid_t owner_ = 0;
  int count_ = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
};

Threads& threads() {
  static Threads instance;
  return instance;
}

}  // namespace

ThreadPool& thread_pool() { return threads().pool(); }

std::vector<int32_t> sequence_bounds(const OptionalTensor& cu_seqlens, int64_t sequences, int64_t length,
                                     int64_t tokens) {
  std::vector<int32_t> bounds(static_cast<size_t>(sequences) + 1);
  for (size_t n = 0; n < bounds.size(); ++n) {
    if (!cu_seqlens) {
      bounds[n] = static_cast<int32_t>(static_cast<int64_t>(n) * length);
      continue;
    }
    const bool wide = cu_seqlens->scalar_type() == ScalarType::Long;
    const int64_t bound = wide ? pointer<int64_t>(*cu_seqlens)[n] : pointer<int32_t>(*cu_seqlens)[n];
    check(bound >= (n == 0 ? 0 : bounds[n - 1]) && bound <= tokens,
          "kda: cu_seqlens[{}] is {}, expected rising offsets up to {}", n, bound, tokens);
    bounds[n] = static_cast<int32_t>(bound);
  }
  check(bounds.front() == 0 && bounds.back() == tokens, "kda: cu_seqlens must go from 0 to {}, not {} to {}",
        tokens, bounds.front(), bounds.back());
  return bounds;
}

KdaParams cpu_params(const Inputs& in, const Shape& shape) {
  for (const auto& [name, tensor] :
       {std::pair{"q", &in.q}, {"k", &in.k}, {"v", &in.v}, {"gate", &in.gate}, {"beta", &in.beta}}) {
    check_type(name, *tensor, ScalarType::Float);
  }
  check(in.options.beta_scale == 1.0, "kda: beta_scale is {} on the CPU, expected 1", in.options.beta_scale);
  KdaParams p;
  set_sizes_and_options(p, in, shape);
  p.q = pointer<float>(in.q);
  p.k = pointer<float>(in.k);
  p.v = pointer<float>(in.v);
  p.gate = pointer<float>(in.gate);
  p.beta = pointer<float>(in.beta);
  p.q_stride = token_stride("q", in.q);
  p.k_stride = token_stride("k", in.k);
  p.v_stride = token_stride("v", in.v);
  p.gate_stride = token_stride("gate", in.gate);
  p.beta_stride = token_stride("beta", in.beta);
  p.slot_stride = shape.state_size();
  return p;
}

std::vector<int32_t> slots_in_order(int64_t count) {
  std::vector<int32_t> slots(static_cast<size_t>(count));
  for (size_t n = 0; n < slots.size(); ++n) slots[n] = static_cast<int32_t>(n);
  return slots;
}

namespace {

// form 0: by length, 1: in chunks, 2: token by token
void run(const KdaParams& params, int64_t form) {
  check(form >= 0 && form <= 2, "kda: form is {}, expected 0 to 2", form);
  constexpr std::array kForms = {kda_forward, kda_chunk, kda_recurrent};
  kForms[static_cast<size_t>(form)](params, thread_pool());
}

// Runs 64 tokens at a time and keeps the state before each such piece.
void run_keeping_states(KdaParams params, const std::vector<int32_t>& bounds, int64_t form, float* states,
                        int64_t count) {
  const int64_t size = params.slot_stride;
  int64_t done = 0;
  for (int32_t n = 0; n + 1 < static_cast<int32_t>(bounds.size()); ++n) {
    // The form that the sequence as a whole would take, so that the bits are those of a plain call.
    const int64_t by_length = bounds[n + 1] - bounds[n] < kKdaChunkFrom ? 2 : 1;
    const int64_t piece_form = form == 0 ? by_length : form;
    for (int32_t begin = bounds[n]; begin < bounds[n + 1]; begin += kStatesEvery) {
      check(done < count, "kda: chunk_states has room for {} states, which is too few", count);
      std::memcpy(states + done * size, params.state + n * size, static_cast<size_t>(size) * sizeof(float));
      ++done;
      const int32_t piece[2] = {begin, std::min<int32_t>(begin + kStatesEvery, bounds[n + 1])};
      params.sequences = 1;
      params.cu_seqlens = piece;
      params.slots = &n;
      run(params, piece_form);
    }
  }
  check(done == count, "kda: there are {} chunk states, but {} were expected", done, count);
}

std::tuple<Tensor, Tensor, Tensor> kda_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate, const Tensor& beta,
    const OptionalTensor& a_log, const OptionalTensor& dt_bias, const OptionalTensor& initial_state,
    const OptionalTensor& cu_seqlens, double scale, int64_t gate_kind, double lower_bound, bool l2norm,
    bool beta_is_logit, double beta_scale, int64_t form, bool want_state, int64_t chunk_states) {
  const Inputs in{q,       k,          v,
                  gate,    beta,       a_log,
                  dt_bias, cu_seqlens, {scale, gate_kind, lower_bound, l2norm, beta_is_logit, beta_scale}};
  const Shape shape = shape_of(in);
  KdaParams params = cpu_params(in, shape);
  Tensor out = empty(q, {shape.batch, shape.length, shape.value_heads, shape.value_dim}, ScalarType::Float);
  const std::initializer_list<int64_t> sizes = {shape.sequences, shape.value_heads, shape.value_dim,
                                                shape.key_dim};
  Tensor state = zeros(q, sizes, ScalarType::Float);
  if (initial_state) {
    check_sizes("initial_state", *initial_state, sizes);
    check_plain("initial_state", *initial_state, state.numel(), ScalarType::Float, q);
    std::memcpy(state.data_ptr(), initial_state->data_ptr(),
                static_cast<size_t>(state.numel()) * sizeof(float));
  }
  const std::vector<int32_t> bounds = sequence_bounds(in, shape);
  const std::vector<int32_t> slots = slots_in_order(shape.sequences);
  params.cu_seqlens = bounds.data();
  params.slots = slots.data();
  params.state = pointer<float>(state);
  params.out = pointer<float>(out);
  Tensor kept =
      empty(q, {chunk_states, shape.value_heads, shape.value_dim, shape.key_dim}, ScalarType::Float);
  if (chunk_states > 0) {
    run_keeping_states(params, bounds, form, pointer<float>(kept), chunk_states);
  } else {
    run(params, form);
  }
  if (!want_state) state = empty(q, {0}, ScalarType::Float);
  return {out, state, kept};
}

// States of a pool, read and written in place. A sequence whose slot is below first_slot is padding: its
// outputs are zeros.
Tensor kda_pool_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate, const Tensor& beta,
                    const OptionalTensor& a_log, const OptionalTensor& dt_bias, const Tensor& pool,
                    const Tensor& slots, const OptionalTensor& accepted, const OptionalTensor& cu_seqlens,
                    double scale, int64_t gate_kind, double lower_bound, bool l2norm, bool beta_is_logit,
                    double beta_scale, int64_t form, int64_t first_slot) {
  const Inputs in{q,       k,          v,
                  gate,    beta,       a_log,
                  dt_bias, cu_seqlens, {scale, gate_kind, lower_bound, l2norm, beta_is_logit, beta_scale}};
  const Shape shape = shape_of(in);
  KdaParams params = cpu_params(in, shape);
  check(!accepted && slots.dim() == 1, "kda: a slot per token is for CUDA tensors only");
  check(first_slot >= 0, "kda: first_slot is {}, expected 0 or more", first_slot);
  check_type("pool", pool, ScalarType::Float);
  const int64_t slot_stride = pool_stride(pool, shape);
  check_plain("slots", slots, shape.sequences, ScalarType::Int, q);
  const std::vector<int32_t> bounds = sequence_bounds(in, shape);
  // The kernel wants a slot for every sequence: padding gets an empty state behind the pool's, for which the
  // named states are gathered and scattered again. Without padding they stay where they are.
  const int32_t* slot = pointer<int32_t>(slots);
  for (int64_t n = 0; n < shape.sequences; ++n) {
    check(slot[n] < pool.size(0), "kda: slots[{}] is {}, but the pool has {}", n, slot[n], pool.size(0));
  }
  const auto padding = [&](int64_t n) { return slot[n] < first_slot; };
  bool copying = false;
  for (int64_t n = 0; n < shape.sequences; ++n) copying = copying || padding(n);
  const auto state_of = [&](int64_t n) { return pointer<float>(pool) + slot[n] * slot_stride; };
  const int64_t size = shape.state_size();
  std::vector<float> gathered(copying ? static_cast<size_t>(shape.sequences * size) : 0);
  for (int64_t n = 0; copying && n < shape.sequences; ++n) {
    if (!padding(n)) std::copy_n(state_of(n), size, gathered.data() + n * size);
  }
  const std::vector<int32_t> in_order = slots_in_order(shape.sequences);
  Tensor out = empty(q, {shape.batch, shape.length, shape.value_heads, shape.value_dim}, ScalarType::Float);
  params.cu_seqlens = bounds.data();
  params.slots = copying ? in_order.data() : slot;
  params.state = copying ? gathered.data() : pointer<float>(pool);
  params.slot_stride = copying ? size : slot_stride;
  params.out = pointer<float>(out);
  run(params, form);
  for (int64_t n = 0; copying && n < shape.sequences; ++n) {
    if (padding(n)) {
      std::fill(params.out + bounds[n] * shape.value_row(), params.out + bounds[n + 1] * shape.value_row(),
                0.0f);
    } else {
      std::copy_n(gathered.data() + n * size, size, state_of(n));
    }
  }
  return out;
}

void set_num_threads(int64_t count) {
  check(count >= 1 && count <= 1024, "kilin: {} threads, expected 1 to 1024", count);
  threads().resize(static_cast<int>(count));
}

}  // namespace
}  // namespace kilin::torch_ops

STABLE_TORCH_LIBRARY(kilin, m) {
#define KILIN_TENSORS \
  "Tensor q, Tensor k, Tensor v, Tensor gate, Tensor beta, Tensor? a_log, Tensor? dt_bias, "
#define KILIN_OPTIONS                                                                                    \
  "Tensor? cu_seqlens, float scale, int gate_kind, float lower_bound, bool l2norm, bool beta_is_logit, " \
  "float beta_scale"
  m.def("kda(" KILIN_TENSORS "Tensor? initial_state, " KILIN_OPTIONS
        ", int form, bool want_state, int chunk_states) -> (Tensor, Tensor, Tensor)");
  m.def("kda_pool(" KILIN_TENSORS "Tensor(a!) pool, Tensor slots, Tensor? accepted, " KILIN_OPTIONS
        ", int form, int first_slot) -> Tensor");
  m.def(
      "kda_backward(" KILIN_TENSORS "Tensor? initial_state, " KILIN_OPTIONS
      ", Tensor d_out, Tensor? d_state) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("set_num_threads(int count) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kilin, CPU, m) {
  m.impl("kda", TORCH_BOX(&kilin::torch_ops::kda_cpu));
  m.impl("kda_pool", TORCH_BOX(&kilin::torch_ops::kda_pool_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(kilin, CompositeExplicitAutograd, m) {
  m.impl("set_num_threads", TORCH_BOX(&kilin::torch_ops::set_num_threads));
}
