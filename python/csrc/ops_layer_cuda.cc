// SPDX-License-Identifier: Apache-2.0
// The short convolution and the gated RMSNorm around KDA on NVIDIA GPUs, forward and backward.
#include <tuple>

#include "cuda.h"
#include "kernels/conv/short_conv_cuda.h"
#include "kernels/norm/norm_cuda.h"
#include "layer.h"

namespace kilin::torch_ops {
namespace {

// What forward and backward have in common; y is checked like an output, so one has to be given.
ShortConvCudaParams conv_params(const Tensor& u, const Tensor& weight, const OptionalTensor& initial_state,
                                const OptionalTensor& cu_seqlens, bool silu, const ConvShape& shape,
                                const Tensor& y) {
  ShortConvCudaParams p;
  p.channels = shape.channels;
  p.taps = static_cast<int>(shape.taps);
  p.sequences = static_cast<int>(shape.sequences);
  p.tokens = shape.tokens();
  p.cu_seqlens = pointer<void>(cu_seqlens);
  p.wide_seqlens = cu_seqlens && cu_seqlens->scalar_type() == ScalarType::Long;
  p.type = cuda_type("u", u);
  p.u = {u.data_ptr(), token_stride("u", u)};
  p.weight = weight.data_ptr();
  p.weight_type = cuda_type("weight", weight);
  p.silu = silu;
  if (initial_state)
    p.initial = {.data = initial_state->data_ptr(), .slot_stride = (shape.taps - 1) * shape.channels};
  p.y = y.data_ptr();
  p.y_stride = shape.channels;
  return p;
}

std::tuple<Tensor, Tensor> short_conv_gpu(const Tensor& u, const Tensor& weight,
                                          const OptionalTensor& initial_state,
                                          const OptionalTensor& cu_seqlens, bool silu, bool want_state) {
  const ConvShape shape = conv_shape(u, weight, initial_state, cu_seqlens);
  const DeviceGuard guard(u.get_device());
  const Tensor y = empty(u, {shape.batch, shape.length, shape.channels}, u.scalar_type());
  const Tensor state = want_state
                           ? empty(u, {shape.sequences, shape.taps - 1, shape.channels}, u.scalar_type())
                           : empty(u, {0}, u.scalar_type());
  ShortConvCudaParams p = conv_params(u, weight, initial_state, cu_seqlens, silu, shape, y);
  if (want_state) p.final = {.data = state.data_ptr(), .slot_stride = (shape.taps - 1) * shape.channels};
  if (shape.sequences > 0) short_conv_cuda(p, current_stream(u.get_device()));
  return {y, state};
}

std::tuple<Tensor, Tensor, Tensor> short_conv_backward_gpu(const Tensor& u, const Tensor& weight,
                                                           const OptionalTensor& initial_state,
                                                           const OptionalTensor& cu_seqlens, bool silu,
                                                           const Tensor& d_y, const OptionalTensor& d_state) {
  const ConvShape shape = conv_shape(u, weight, initial_state, cu_seqlens);
  const DeviceGuard guard(u.get_device());
  check_sizes("d_y", d_y, {shape.batch, shape.length, shape.channels});
  check_type("d_y", d_y, u.scalar_type());
  const int64_t slot = (shape.taps - 1) * shape.channels;
  if (d_state) check_plain("d_state", *d_state, shape.sequences * slot, u.scalar_type(), u);
  const Tensor du = empty(u, {shape.batch, shape.length, shape.channels}, u.scalar_type());
  const Tensor d_weight = zeros(u, {shape.channels, shape.taps}, ScalarType::Float);
  const Tensor d_initial = initial_state
                               ? zeros(u, {shape.sequences, shape.taps - 1, shape.channels}, u.scalar_type())
                               : empty(u, {0}, u.scalar_type());
  ShortConvCudaBackward p;
  p.forward = conv_params(u, weight, initial_state, cu_seqlens, silu, shape, du);
  p.dy = {d_y.data_ptr(), token_stride("d_y", d_y)};
  if (d_state) p.d_final = {.data = d_state->data_ptr(), .slot_stride = slot};
  p.du = du.data_ptr();
  p.du_stride = shape.channels;
  p.d_weight = pointer<float>(d_weight);
  if (initial_state) p.d_initial = {.data = d_initial.data_ptr(), .slot_stride = slot};
  if (shape.sequences > 0) {
    const auto bytes = static_cast<int64_t>(short_conv_backward_cuda_workspace(p));
    const Tensor workspace = empty(u, {bytes}, ScalarType::Byte);
    short_conv_backward_cuda(p, workspace.data_ptr(), static_cast<size_t>(bytes),
                             current_stream(u.get_device()));
  }
  return {du, d_weight, d_initial};
}

// u [N, C], one token a sequence; pool [slots, taps - 1, C] is updated in place.
Tensor short_conv_update_gpu(const Tensor& u, const Tensor& weight, const Tensor& pool, const Tensor& slots,
                             bool silu) {
  check(u.dim() == 2 && u.is_contiguous(), "short_conv_update: u must be contiguous [N, C]");
  check(weight.dim() == 2 && weight.size(0) == u.size(1) && weight.is_contiguous(),
        "short_conv_update: weight must be contiguous [{}, taps]", u.size(1));
  check(pool.dim() == 3 && pool.size(1) == weight.size(1) - 1 && pool.size(2) == u.size(1) &&
            pool.stride(2) == 1 && pool.stride(1) == u.size(1),
        "short_conv_update: pool must be [slots, {}, {}], contiguous within a slot", weight.size(1) - 1,
        u.size(1));
  check_type("pool", pool, u.scalar_type());
  check_plain("slots", slots, u.size(0), ScalarType::Int, u);
  const DeviceGuard guard(u.get_device());
  Tensor y = empty(u, {u.size(0), u.size(1)}, u.scalar_type());
  const ConvShape shape{1, u.size(0), u.size(1), weight.size(1), u.size(0)};
  ShortConvCudaParams p;
  p.channels = shape.channels;
  p.taps = static_cast<int>(shape.taps);
  p.sequences = static_cast<int>(shape.sequences);
  p.tokens = shape.sequences;
  p.type = cuda_type("u", u);
  p.u = {u.data_ptr(), shape.channels};
  p.weight = weight.data_ptr();
  p.weight_type = cuda_type("weight", weight);
  p.silu = silu;
  p.initial = {.data = pool.data_ptr(), .slot_stride = pool.stride(0), .slots = pointer<int32_t>(slots)};
  p.final = p.initial;
  p.y = y.data_ptr();
  p.y_stride = shape.channels;
  if (shape.sequences > 0) short_conv_update_cuda(p, current_stream(u.get_device()));
  return y;
}

GatedNormCudaParams norm_params(const Tensor& x, const OptionalTensor& z, const OptionalTensor& weight,
                                double eps, const NormShape& shape, const Tensor& y) {
  GatedNormCudaParams p;
  p.tokens = shape.tokens;
  p.heads = static_cast<int>(shape.heads);
  p.width = static_cast<int>(shape.width);
  p.type = cuda_type("x", x);
  p.x = {x.data_ptr(), row_stride("x", x)};
  if (z) {
    check_type("z", *z, x.scalar_type());
    p.z = {z->data_ptr(), row_stride("z", *z)};
  }
  p.weight = pointer<void>(weight);
  if (weight) p.weight_type = cuda_type("weight", *weight);
  p.eps = static_cast<float>(eps);
  p.activation = shape.activation;
  p.y = y.data_ptr();
  p.y_stride = shape.heads * shape.width;
  return p;
}

Tensor gated_rms_norm_gpu(const Tensor& x, const OptionalTensor& z, const OptionalTensor& weight, double eps,
                          int64_t activation) {
  const NormShape shape = norm_shape(x, z, weight, activation);
  const DeviceGuard guard(x.get_device());
  Tensor y = empty(x, {shape.tokens, shape.heads, shape.width}, x.scalar_type());
  if (shape.tokens > 0)
    gated_rms_norm_cuda(norm_params(x, z, weight, eps, shape, y), current_stream(x.get_device()));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> gated_rms_norm_backward_gpu(const Tensor& x, const OptionalTensor& z,
                                                               const OptionalTensor& weight, double eps,
                                                               int64_t activation, const Tensor& d_y) {
  const NormShape shape = norm_shape(x, z, weight, activation);
  const DeviceGuard guard(x.get_device());
  check_sizes("d_y", d_y, {shape.tokens, shape.heads, shape.width});
  check_type("d_y", d_y, x.scalar_type());
  const Tensor dx = empty(x, {shape.tokens, shape.heads, shape.width}, x.scalar_type());
  const Tensor dz = z ? empty(x, {shape.tokens, shape.heads, shape.width}, x.scalar_type())
                      : empty(x, {0}, x.scalar_type());
  const Tensor d_weight = zeros(x, {weight ? shape.width : 0}, ScalarType::Float);
  if (shape.tokens > 0) {
    GatedNormCudaBackward p;
    p.forward = norm_params(x, z, weight, eps, shape, dx);
    p.dy = {d_y.data_ptr(), row_stride("d_y", d_y)};
    p.dx = dx.data_ptr();
    p.dx_stride = shape.heads * shape.width;
    p.dz = z ? dz.data_ptr() : nullptr;
    p.dz_stride = shape.heads * shape.width;
    p.d_weight = weight ? pointer<float>(d_weight) : nullptr;
    const auto bytes = static_cast<int64_t>(gated_rms_norm_backward_cuda_workspace(p));
    const Tensor workspace = empty(x, {bytes}, ScalarType::Byte);
    gated_rms_norm_backward_cuda(p, workspace.data_ptr(), static_cast<size_t>(bytes),
                                 current_stream(x.get_device()));
  }
  return {dx, dz, d_weight};
}

}  // namespace
}  // namespace kilin::torch_ops

STABLE_TORCH_LIBRARY_IMPL(kilin, CUDA, m) {
  m.impl("short_conv", TORCH_BOX(&kilin::torch_ops::short_conv_gpu));
  m.impl("short_conv_backward", TORCH_BOX(&kilin::torch_ops::short_conv_backward_gpu));
  m.impl("short_conv_update", TORCH_BOX(&kilin::torch_ops::short_conv_update_gpu));
  m.impl("gated_rms_norm", TORCH_BOX(&kilin::torch_ops::gated_rms_norm_gpu));
  m.impl("gated_rms_norm_backward", TORCH_BOX(&kilin::torch_ops::gated_rms_norm_backward_gpu));
}
