// SPDX-License-Identifier: Apache-2.0
// TorchOps' mixture of experts: tokens sorted by expert, then grouped products, or each expert's in turn
// (float64, LoRA, odd widths). Sums are over a token's own experts, in their order, without atomic additions.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "model/blocks.h"
#include "train/torch_ops.h"

namespace kilin::train {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Row order[i] / copies of x in row i; `inverse` is the inverse permutation of `order`.
struct SortRows : torch::autograd::Function<SortRows> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& order,
                            const at::Tensor& inverse, int64_t copies) {
    context->save_for_backward({inverse});
    context->saved_data["copies"] = copies;
    return x.index_select(0, copies == 1 ? order : at::floor_divide(order, copies));
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const at::Tensor sorted = gradients[0].index_select(0, context->get_saved_variables()[0]);
    const int64_t copies = context->saved_data["copies"].toInt();
    const at::Tensor dx = copies == 1 ? sorted : sorted.view({-1, copies, sorted.size(1)}).sum(1);
    return {dx, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

// The tensor of which the leaves are parts ([experts][rows][columns], each leaf some rows of one expert), in
// the type of products.
struct WholeOfParts : torch::autograd::Function<WholeOfParts> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& whole, at::ScalarType type,
                            at::TensorList parts) {
    context->saved_data["parts"] = static_cast<int64_t>(parts.size()) / whole.size(0);
    context->saved_data["type"] = static_cast<int64_t>(whole.scalar_type());
    return type == whole.scalar_type() ? whole.detach() : whole.to(type);
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const int64_t parts = context->saved_data["parts"].toInt();
    const at::Tensor d = gradients[0].to(static_cast<at::ScalarType>(context->saved_data["type"].toInt()));
    variable_list out(2);
    for (int64_t e = 0; e < d.size(0); ++e) {
      for (const at::Tensor& part : d.select(0, e).chunk(parts, 0)) out.push_back(part);
    }
    return out;
  }
};

at::Tensor tokens_of_each(const at::Tensor& ids, int64_t bins) {
  return at::zeros({bins}, ids.options()).scatter_add_(0, ids, at::ones_like(ids));
}

// [experts][rows][columns], the storage that `first`, a part of it, lies in
at::Tensor storage_of(const at::Tensor& first, int64_t experts, int64_t parts) {
  const int64_t rows = first.size(0) * parts, columns = first.size(1);
  return first.detach().as_strided({experts, rows, columns}, {rows * columns, columns, 1});
}

bool has_lora(const std::vector<MlpWeights<TorchWeight>>& experts) {
  return std::any_of(experts.begin(), experts.end(), [](const auto& e) {
    return e.gate.lora_a.defined() || e.up.lora_a.defined() || e.down.lora_a.defined();
  });
}

}  // namespace

TorchOps::Choice TorchOps::choose(const Tensor& x, const MoeWeights<Weight>& w, int layer) {
  const MoeConfig& m = config_.moe;
  const Tensor logits = at::linear(exact(x), w.router.value);
  const Tensor score = m.sigmoid_router ? at::sigmoid(logits) : at::softmax(logits, -1);
  const Tensor bias = w.router_bias.value.reshape({-1});
  Tensor choice = (score + bias).detach();
  if (m.groups > 1) {
    const int64_t size = m.experts / m.groups;
    const Tensor members = choice.view({-1, m.groups, size});
    const Tensor best = std::get<0>(members.topk(std::min<int64_t>(2, size), -1)).sum(-1);
    const Tensor order = std::get<1>(at::sort(best, true, -1, true)).narrow(-1, 0, m.groups_kept);
    const Tensor kept = at::zeros_like(best).scatter_(-1, order, 1.0);
    choice = (members * kept.unsqueeze(-1)).view(choice.sizes());
  }
  Choice chosen;
  chosen.experts = std::get<1>(at::sort(choice, true, -1, true)).narrow(-1, 0, m.top_k);
  chosen.weights = (m.biased_weights ? score + bias : score).gather(-1, chosen.experts);
  if (m.renormalize) chosen.weights = chosen.weights / (chosen.weights.sum(-1, true) + 1e-20);
  chosen.weights = chosen.weights * m.scale;
  if (count_) {
    const auto of_layer = [&](const RouterCounts& c) { return c.layer == layer; };
    std::find_if(counts_.begin(), counts_.end(), of_layer)
        ->counts.add_(tokens_of_each(chosen.experts.flatten(), m.experts));
  }
  return chosen;
}

// x [tokens][hidden] sorted by expert, counts [experts]
at::Tensor TorchOps::each_expert(const Tensor& x, const Tensor& counts,
                                 const std::vector<MlpWeights<Weight>>& experts) {
  const Tensor host = counts.cpu();
  std::vector<Tensor> out;
  int64_t first = 0;
  for (size_t e = 0; e < experts.size(); ++e) {
    const auto count = host.data_ptr<int64_t>()[e];
    if (count == 0) continue;
    const Tensor part = x.narrow(0, first, count);
    first += count;
    const Tensor hidden = swiglu(product(part, experts[e].gate), product(part, experts[e].up));
    out.push_back(product(hidden, experts[e].down));
  }
  return at::cat(out);
}

// The same by grouped products of all experts at once.
at::Tensor TorchOps::grouped_experts(const Tensor& x, const Tensor& counts,
                                     const std::vector<MlpWeights<Weight>>& experts) {
  const auto count = static_cast<int64_t>(experts.size());
  const int64_t width = experts[0].gate.value.size(0);
  std::vector<Tensor> gates_ups, downs;
  for (const auto& e : experts) {
    gates_ups.insert(gates_ups.end(), {e.gate.value, e.up.value});
    downs.push_back(e.down.value);
  }
  const Tensor gate_up = WholeOfParts::apply(storage_of(experts[0].gate.value, count, 2), x.scalar_type(),
                                             at::TensorList(gates_ups));
  const Tensor down = WholeOfParts::apply(storage_of(experts[0].down.value, count, 1), x.scalar_type(),
                                          at::TensorList(downs));
  const Tensor ends = counts.cumsum(0, at::kInt);
  const Tensor both = at::_grouped_mm(x, gate_up.transpose(1, 2), ends);
  const std::vector<Tensor> halves = both.split(width, 1);
  const Tensor hidden = swiglu(halves[0], halves[1]);
  return at::_grouped_mm(hidden, down.transpose(1, 2), ends);
}

at::Tensor TorchOps::moe(const Tensor& x, const MoeWeights<Weight>& w, int layer) {
  const MoeConfig& m = config_.moe;
  const Choice choice = choose(x, w, layer);
  const Tensor flat = choice.experts.flatten();
  const Tensor order = std::get<1>(at::sort(flat, true, -1, false));  // stable
  const Tensor inverse = at::empty_like(order).scatter_(0, order, at::arange(order.size(0), order.options()));
  const Tensor counts = tokens_of_each(flat, m.experts);
  const Tensor in = SortRows::apply(shared_operand(x), order, inverse, m.top_k);
  // torch's grouped products: rows of 16 bytes, on the GPU bfloat16
  const bool type_fits = in.scalar_type() == at::kBFloat16 || (in.scalar_type() == at::kFloat && x.is_cpu());
  const bool grouped = type_fits && m.width % 8 == 0 && config_.hidden % 8 == 0 && !has_lora(w.experts);
  const Tensor out = grouped ? grouped_experts(in, counts, w.experts) : each_expert(in, counts, w.experts);
  const Tensor by_token =
      SortRows::apply(out, inverse, order, int64_t{1}).view({x.size(0), m.top_k, x.size(1)});
  const Tensor y = at::bmm(choice.weights.unsqueeze(1), exact(by_token)).squeeze(1);
  return m.shared > 0 ? y + mlp_block(*this, w.shared, x) : y;
}

}  // namespace kilin::train
