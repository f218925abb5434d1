// SPDX-License-Identifier: Apache-2.0
#include "train/delta_mix.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>

#include "kernels/kda/kda_backward.h"
#include "train/threads.h"

namespace kilin::train {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor unit(const at::Tensor& x) { return x * at::rsqrt((x * x).sum(-1, true) + 1e-6); }

// Rows of all sequences in step: [count * longest], behind a sequence's end its last row again (what comes
// out there is dropped); empty sequences take row 0.
std::vector<int64_t> rows_in_step(const Sequences& s, int64_t longest) {
  std::vector<int64_t> rows;
  for (int64_t n = 0; n < s.count(); ++n) {
    const int64_t first = s.cu[static_cast<size_t>(n)];
    for (int64_t t = 0; t < longest; ++t)
      rows.push_back(s.length(n) == 0 ? 0 : first + std::min(t, s.length(n) - 1));
  }
  return rows;
}

// Where each row of the batch is in the above.
std::vector<int64_t> places_in_step(const Sequences& s, int64_t longest) {
  std::vector<int64_t> places;
  for (int64_t n = 0; n < s.count(); ++n) {
    for (int64_t t = 0; t < s.length(n); ++t) places.push_back(n * longest + t);
  }
  return places;
}

// The kernel's settings between forward and backward.
struct Kept {
  static void put(AutogradContext* context, const KdaParams& p, const std::vector<int32_t>& cu) {
    context->saved_data["dims"] = std::vector<int64_t>{
        p.heads, p.value_heads, p.key_dim, p.value_dim, static_cast<int64_t>(p.gate_kind), p.scalar_gate};
    context->saved_data["bound"] = static_cast<double>(p.lower_bound);
    context->saved_data["cu"] = std::vector<int64_t>(cu.begin(), cu.end());
  }
  explicit Kept(AutogradContext* context) {
    const auto dims = context->saved_data["dims"].toIntVector();
    p.heads = static_cast<int>(dims[0]);
    p.value_heads = static_cast<int>(dims[1]);
    p.key_dim = static_cast<int>(dims[2]);
    p.value_dim = static_cast<int>(dims[3]);
    p.gate_kind = static_cast<KdaGate>(dims[4]);
    p.scalar_gate = dims[5] != 0;
    p.lower_bound = static_cast<float>(context->saved_data["bound"].toDouble());
    for (const int64_t x : context->saved_data["cu"].toIntVector()) cu.push_back(static_cast<int32_t>(x));
  }
  KdaParams p;
  std::vector<int32_t> cu;
};

void point_to(KdaParams& p, const variable_list& in, const std::vector<int32_t>& cu,
              const std::vector<int32_t>& slots) {
  p.sequences = static_cast<int>(slots.size());
  p.cu_seqlens = cu.data();
  p.slots = slots.data();
  p.q = in[0].data_ptr<float>();
  p.k = in[1].data_ptr<float>();
  p.v = in[2].data_ptr<float>();
  p.gate = in[3].data_ptr<float>();
  p.beta = in[4].data_ptr<float>();
  p.q_stride = in[0].size(1);
  p.k_stride = in[1].size(1);
  p.v_stride = in[2].size(1);
  p.gate_stride = in[3].size(1);
  p.beta_stride = in[4].size(1);
  p.a_log = in[5].data_ptr<float>();
  p.dt_bias = in[6].data_ptr<float>();
  p.l2norm = true;
  p.beta_is_logit = true;
  p.scale = 1.0f / std::sqrt(static_cast<float>(p.key_dim));
}

struct DeltaMixCpu : torch::autograd::Function<DeltaMixCpu> {
  static at::Tensor forward(AutogradContext* context, const KdaParams& settings,
                            const std::vector<int32_t>& cu, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, const at::Tensor& gate, const at::Tensor& beta,
                            const at::Tensor& a_log, const at::Tensor& dt_bias) {
    const variable_list in{q.contiguous(),    k.contiguous(),     v.contiguous(),      gate.contiguous(),
                           beta.contiguous(), a_log.contiguous(), dt_bias.contiguous()};
    Kept::put(context, settings, cu);
    context->save_for_backward(in);
    KdaParams p = settings;
    const std::vector<int32_t> slots = slots_in_order(cu);
    point_to(p, in, cu, slots);
    const at::Tensor states =
        at::zeros({p.sequences, p.value_heads, p.value_dim, p.key_dim}, at::TensorOptions(at::kFloat));
    at::Tensor out = at::empty_like(in[2]);
    p.state = states.data_ptr<float>();
    p.slot_stride = states.stride(0);
    p.out = out.data_ptr<float>();
    p.out_stride = out.size(1);
    kda_forward(p, threads());
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const Kept kept(context);
    const variable_list in = context->get_saved_variables();
    const at::Tensor d_out = gradients[0].contiguous();
    const std::vector<int32_t> slots = slots_in_order(kept.cu);
    KdaBackwardParams p;
    p.forward = kept.p;
    point_to(p.forward, in, kept.cu, slots);
    p.d_out = d_out.data_ptr<float>();
    p.d_out_stride = d_out.size(1);
    variable_list d;
    for (const at::Tensor& x : in) d.push_back(at::empty_like(x));
    p.d_q = d[0].data_ptr<float>();
    p.d_k = d[1].data_ptr<float>();
    p.d_v = d[2].data_ptr<float>();
    p.d_gate = d[3].data_ptr<float>();
    p.d_beta = d[4].data_ptr<float>();
    p.d_q_stride = d[0].size(1);
    p.d_k_stride = d[1].size(1);
    p.d_v_stride = d[2].size(1);
    p.d_gate_stride = d[3].size(1);
    p.d_beta_stride = d[4].size(1);
    p.d_a_log = d[5].data_ptr<float>();
    p.d_dt_bias = d[6].data_ptr<float>();
    kda_backward(p, threads());
    return {at::Tensor(), at::Tensor(), d[0], d[1], d[2], d[3], d[4], d[5], d[6]};
  }
};

}  // namespace

at::Tensor delta_mix_composite(const DeltaMix& mix, const Sequences& sequences) {
  const KdaParams& p = mix.settings;
  const int64_t heads = p.heads, value_heads = p.value_heads, K = p.key_dim, V = p.value_dim;
  int64_t longest = 0;
  for (int64_t n = 0; n < sequences.count(); ++n) longest = std::max(longest, sequences.length(n));
  const auto index = [&](const std::vector<int64_t>& rows) {
    return at::tensor(rows, at::kLong).to(mix.q.device());
  };
  const at::Tensor in_step = index(rows_in_step(sequences, longest));
  // [sequences][longest][value heads][width]
  const auto by_head = [&](const at::Tensor& x, int64_t count, int64_t width) {
    const at::Tensor y = x.index_select(0, in_step).view({sequences.count(), longest, count, width});
    return count == value_heads ? y : y.repeat_interleave(value_heads / count, 2);
  };
  const at::Tensor q = unit(by_head(mix.q, heads, K)) * (1.0 / std::sqrt(static_cast<double>(K)));
  const at::Tensor k = unit(by_head(mix.k, heads, K));
  const at::Tensor v = by_head(mix.v, value_heads, V);
  const at::Tensor beta = at::sigmoid(by_head(mix.beta, value_heads, 1));
  const int64_t gates = p.scalar_gate ? 1 : K;
  const at::Tensor rate = mix.a_log.exp().view({value_heads, 1});
  const at::Tensor raw = by_head(mix.gate, value_heads, gates) + mix.dt_bias.view({value_heads, gates});
  const at::Tensor log_decay = p.gate_kind == KdaGate::kBounded
                                   ? static_cast<double>(p.lower_bound) * at::sigmoid(rate * raw)
                                   : -rate * at::softplus(raw, 1, 20);
  const at::Tensor decay = log_decay.exp();
  at::Tensor state = at::zeros({sequences.count(), value_heads, V, K}, q.options());
  std::vector<at::Tensor> out;
  for (int64_t t = 0; t < longest; ++t) {
    const at::Tensor key = k.select(1, t).unsqueeze(-2);
    state = state * decay.select(1, t).unsqueeze(-2);
    const at::Tensor missing = beta.select(1, t) * (v.select(1, t) - (state * key).sum(-1));
    state = state + missing.unsqueeze(-1) * key;
    out.push_back((state * q.select(1, t).unsqueeze(-2)).sum(-1));
  }
  const at::Tensor all = at::stack(out, 1).reshape({sequences.count() * longest, value_heads * V});
  return all.index_select(0, index(places_in_step(sequences, longest)));
}

at::Tensor delta_mix_cpu(const DeltaMix& mix, const Sequences& sequences) {
  return DeltaMixCpu::apply(mix.settings, sequences.cu, mix.q, mix.k, mix.v, mix.gate, mix.beta, mix.a_log,
                            mix.dt_bias);
}

}  // namespace kilin::train
