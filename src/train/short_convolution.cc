// SPDX-License-Identifier: Apache-2.0
#include "train/short_convolution.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/conv/short_conv.h"
#include "kernels/conv/short_conv_backward.h"
#include "train/threads.h"

namespace kilin::train {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// x [rows][channels], w [taps][channels], float32 on the CPU
struct ShortConvCpu : torch::autograd::Function<ShortConvCpu> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& w,
                            const std::vector<int32_t>& cu) {
    context->save_for_backward({x, w});
    context->saved_data["cu"] = std::vector<int64_t>(cu.begin(), cu.end());
    const std::vector<int32_t> slots = slots_in_order(cu);
    const auto sequences = static_cast<int64_t>(slots.size());
    const at::Tensor states = at::zeros({sequences, w.size(0) - 1, w.size(1)}, x.options());
    at::Tensor y = at::empty_like(x);
    ShortConvParams p;
    p.channels = w.size(1);
    p.taps = w.size(0);
    p.sequences = static_cast<int>(sequences);
    p.cu_seqlens = cu.data();
    p.slots = slots.data();
    p.u = x.data_ptr<float>();
    p.u_stride = x.stride(0);
    p.w = w.data_ptr<float>();
    p.state = states.data_ptr<float>();
    p.slot_stride = states.stride(0);
    p.y = y.data_ptr<float>();
    p.y_stride = y.stride(0);
    short_conv(p, threads());
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list in = context->get_saved_variables();
    const auto wide = context->saved_data["cu"].toIntVector();
    const std::vector<int32_t> cu(wide.begin(), wide.end());
    const at::Tensor dy = gradients[0].contiguous();
    at::Tensor dx = at::empty_like(in[0]), dw = at::empty_like(in[1]);
    ShortConvBackward p;
    p.channels = dw.size(1);
    p.taps = dw.size(0);
    p.sequences = static_cast<int>(cu.size()) - 1;
    p.cu_seqlens = cu.data();
    p.u = in[0].data_ptr<float>();
    p.u_stride = in[0].stride(0);
    p.w = in[1].data_ptr<float>();
    p.dy = dy.data_ptr<float>();
    p.dy_stride = dy.stride(0);
    p.du = dx.data_ptr<float>();
    p.du_stride = dx.stride(0);
    p.dw = dw.data_ptr<float>();
    short_conv_backward(p, threads());
    return {dx, dw, at::Tensor()};
  }
};

at::Tensor composite(const at::Tensor& x, const at::Tensor& kernel, const Sequences& sequences) {
  const int64_t taps = kernel.size(1);
  at::Tensor y = x * kernel.select(1, taps - 1);
  for (int64_t back = 1; back < std::min(taps, x.size(0)); ++back) {
    // the rows `back` earlier, zero where the sequence had not begun
    at::Tensor earlier = at::constant_pad_nd(x.narrow(0, 0, x.size(0) - back), {0, 0, back, 0});
    if (sequences.count() > 1) earlier = earlier * (sequences.positions >= back).to(x.dtype()).unsqueeze(1);
    y = y + earlier * kernel.select(1, taps - 1 - back);
  }
  return at::silu(y);
}

}  // namespace

at::Tensor short_convolution(const at::Tensor& x, const at::Tensor& w, const Sequences& sequences) {
  const at::Tensor kernel = w.view({w.size(0), -1});
  if (x.is_cpu() && w.scalar_type() == at::kFloat)
    return ShortConvCpu::apply(x.to(at::kFloat).contiguous(), kernel.t().contiguous(), sequences.cu);
  return composite(x, kernel.to(x.dtype()), sequences);
}

}  // namespace kilin::train
