// SPDX-License-Identifier: Apache-2.0
#include "train/recompute.h"

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

namespace kilin::train {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Carries the function to the backward pass.
struct Again : torch::CustomClassHolder {
  explicit Again(std::function<void(at::Tensor&)> f) : function(std::move(f)) {}
  std::function<void(at::Tensor&)> function;
};

struct Recompute : torch::autograd::Function<Recompute> {
  static at::Tensor forward(AutogradContext* context, const std::function<void(at::Tensor&)>& block,
                            const std::function<void(at::Tensor&)>& again, const at::Tensor& x,
                            at::TensorList leaves) {
    context->saved_data["again"] = c10::IValue::make_capsule(c10::make_intrusive<Again>(again));
    variable_list saved{x};
    saved.insert(saved.end(), leaves.begin(), leaves.end());
    context->save_for_backward(saved);
    at::Tensor y = x;
    block(y);
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto capsule = context->saved_data["again"].toCapsule();
    const auto& again = static_cast<const Again&>(*capsule);
    variable_list inputs = context->get_saved_variables();
    const bool want_x = inputs[0].requires_grad();
    inputs[0] = inputs[0].detach().requires_grad_(want_x);
    at::Tensor y = inputs[0];
    {
      const c10::AutoGradMode with_gradients(true);
      again.function(y);
    }
    variable_list wanted(inputs.begin() + (want_x ? 0 : 1), inputs.end());
    variable_list found = torch::autograd::grad({y}, wanted, gradients, std::nullopt, false, true);
    variable_list out(2);  // of the two functions: none
    if (!want_x) out.emplace_back();
    out.insert(out.end(), found.begin(), found.end());
    return out;
  }
};

}  // namespace

at::Tensor recompute(const std::function<void(at::Tensor&)>& block,
                     const std::function<void(at::Tensor&)>& again, const std::vector<at::Tensor>& leaves,
                     const at::Tensor& x) {
  return Recompute::apply(block, again, x, at::TensorList(leaves));
}

}  // namespace kilin::train
