// SPDX-License-Identifier: Apache-2.0
// Our kernels for Hopper GPUs as functions with gradients, in bfloat16 on torch's current stream, with
// workspace from torch's allocator. Nothing here waits for the GPU.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>

#include "base/error.h"
#include "kernels/conv/short_conv_cuda.h"
#include "kernels/kda/kda_backward_cuda.h"
#include "kernels/norm/norm_cuda.h"
#include "train/delta_mix.h"
#include "train/gated_norm.h"
#include "train/short_convolution.h"

namespace kilin::train {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

CUstream_st* stream_of(const at::Tensor& t) {
  return c10::cuda::getCurrentCUDAStream(t.device().index()).stream();
}

CudaType cuda_type(const at::Tensor& t) {
  if (t.scalar_type() == at::kFloat) return CudaType::kF32;
  KILIN_ASSERT(t.scalar_type() == at::kBFloat16);
  return CudaType::kBf16;
}

CudaTokens tokens(const at::Tensor& t) { return {t.data_ptr(), t.stride(0)}; }
CudaGradient written(const at::Tensor& t) { return {t.data_ptr(), t.stride(0)}; }

at::Tensor bytes(size_t count, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(count)}, like.options().dtype(at::kByte));
}

bool is_hopper(at::Device device) {
  int major = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index()) == cudaSuccess &&
         major == 9;
}

at::Tensor brain(const at::Tensor& x) { return x.to(at::kBFloat16).contiguous(); }

// In the order of the inputs of DeltaMixCuda
enum Input { kQ, kK, kV, kGate, kBeta, kALog, kDtBias, kCu };

KdaCudaParams forward_params(const KdaParams& settings, const variable_list& in) {
  KdaCudaParams p;
  p.heads = settings.heads;
  p.value_heads = settings.value_heads;
  p.key_dim = settings.key_dim;
  p.value_dim = settings.value_dim;
  p.sequences = static_cast<int>(in[kCu].size(0)) - 1;
  p.tokens = in[kQ].size(0);
  p.cu_seqlens = in[kCu].data_ptr();
  p.q = tokens(in[kQ]);
  p.k = tokens(in[kK]);
  p.v = tokens(in[kV]);
  p.gate = tokens(in[kGate]);
  p.gate_type = cuda_type(in[kGate]);
  p.beta = tokens(in[kBeta]);
  p.beta_type = cuda_type(in[kBeta]);
  p.gate_kind = settings.gate_kind;
  p.lower_bound = settings.lower_bound;
  p.a_log = in[kALog].data_ptr<float>();
  p.dt_bias = in[kDtBias].data_ptr<float>();
  p.l2norm = true;
  p.beta_is_logit = true;
  p.scale = 1.0f / std::sqrt(static_cast<float>(settings.key_dim));
  return p;
}

struct DeltaMixCuda : torch::autograd::Function<DeltaMixCuda> {
  static at::Tensor forward(AutogradContext* context, const KdaParams& settings, const at::Tensor& q,
                            const at::Tensor& k, const at::Tensor& v, const at::Tensor& gate,
                            const at::Tensor& beta, const at::Tensor& a_log, const at::Tensor& dt_bias,
                            const at::Tensor& cu) {
    const c10::cuda::CUDAGuard guard(q.device());
    const variable_list in{q, k, v, gate, beta, a_log, dt_bias, cu};
    context->save_for_backward(in);
    context->saved_data["dims"] =
        std::vector<int64_t>{settings.heads, settings.value_heads, settings.key_dim, settings.value_dim,
                             static_cast<int64_t>(settings.gate_kind)};
    context->saved_data["bound"] = static_cast<double>(settings.lower_bound);
    at::Tensor out = at::empty_like(v);
    KdaCudaParams p = forward_params(settings, in);
    p.out = out.data_ptr();
    p.out_stride = out.stride(0);
    const at::Tensor workspace = bytes(kda_chunk_cuda_workspace(p), q);
    kda_chunk_cuda(p, workspace.data_ptr(), static_cast<size_t>(workspace.numel()), stream_of(q));
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list in = context->get_saved_variables();
    const c10::cuda::CUDAGuard guard(in[kQ].device());
    const auto dims = context->saved_data["dims"].toIntVector();
    KdaParams settings;
    settings.heads = static_cast<int>(dims[0]);
    settings.value_heads = static_cast<int>(dims[1]);
    settings.key_dim = static_cast<int>(dims[2]);
    settings.value_dim = static_cast<int>(dims[3]);
    settings.gate_kind = static_cast<KdaGate>(dims[4]);
    settings.lower_bound = static_cast<float>(context->saved_data["bound"].toDouble());
    const at::Tensor d_out = gradients[0].contiguous();
    variable_list d;
    for (size_t i = 0; i < kCu; ++i) d.push_back(at::empty_like(in[i]));
    KdaBackwardCudaParams p;
    p.forward = forward_params(settings, in);
    p.d_out = tokens(d_out);
    p.d_q = written(d[kQ]);
    p.d_k = written(d[kK]);
    p.d_v = written(d[kV]);
    p.d_gate = written(d[kGate]);
    p.d_beta = written(d[kBeta]);
    p.d_a_log = d[kALog].data_ptr<float>();
    p.d_dt_bias = d[kDtBias].data_ptr<float>();
    const at::Tensor workspace = bytes(kda_backward_cuda_workspace(p), in[kQ]);
    kda_backward_cuda(p, workspace.data_ptr(), static_cast<size_t>(workspace.numel()), stream_of(in[kQ]));
    d.insert(d.begin(), at::Tensor());
    d.emplace_back();
    return d;
  }
};

ShortConvCudaParams conv_params(const at::Tensor& x, const at::Tensor& w, const at::Tensor& cu) {
  ShortConvCudaParams p;
  p.channels = x.size(1);
  p.taps = static_cast<int>(w.size(1));
  p.sequences = static_cast<int>(cu.size(0)) - 1;
  p.tokens = x.size(0);
  p.cu_seqlens = cu.data_ptr();
  p.u = tokens(x);
  p.weight = w.data_ptr();
  p.weight_type = cuda_type(w);
  return p;
}

struct ShortConvCuda : torch::autograd::Function<ShortConvCuda> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& w,
                            const at::Tensor& cu) {
    const c10::cuda::CUDAGuard guard(x.device());
    context->save_for_backward({x, w, cu});
    at::Tensor y = at::empty_like(x);
    ShortConvCudaParams p = conv_params(x, w, cu);
    p.y = y.data_ptr();
    p.y_stride = y.stride(0);
    short_conv_cuda(p, stream_of(x));
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list in = context->get_saved_variables();
    const c10::cuda::CUDAGuard guard(in[0].device());
    const at::Tensor dy = gradients[0].contiguous();
    at::Tensor dx = at::empty_like(in[0]), dw = at::empty_like(in[1]);
    ShortConvCudaBackward p;
    p.forward = conv_params(in[0], in[1], in[2]);
    p.dy = tokens(dy);
    p.du = dx.data_ptr();
    p.du_stride = dx.stride(0);
    p.d_weight = dw.data_ptr<float>();
    const at::Tensor workspace = bytes(short_conv_backward_cuda_workspace(p), dx);
    short_conv_backward_cuda(p, workspace.data_ptr(), static_cast<size_t>(workspace.numel()), stream_of(dx));
    return {dx, dw, at::Tensor()};
  }
};

GatedNormCudaParams norm_params(const at::Tensor& x, const at::Tensor& z, const at::Tensor& w, double eps,
                                GateActivation activation) {
  GatedNormCudaParams p;
  p.tokens = x.size(0);
  p.width = static_cast<int>(w.size(0));
  p.heads = static_cast<int>(x.size(1) / w.size(0));
  p.x = tokens(x);
  if (activation != GateActivation::kNone) p.z = tokens(z);
  p.weight = w.data_ptr();
  p.weight_type = cuda_type(w);
  p.eps = static_cast<float>(eps);
  p.activation = activation;
  return p;
}

struct GatedNormCuda : torch::autograd::Function<GatedNormCuda> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& z,
                            const at::Tensor& w, double eps, int64_t activation) {
    const c10::cuda::CUDAGuard guard(x.device());
    context->save_for_backward({x, z, w});
    context->saved_data["eps"] = eps;
    context->saved_data["activation"] = activation;
    at::Tensor y = at::empty_like(x);
    GatedNormCudaParams p = norm_params(x, z, w, eps, static_cast<GateActivation>(activation));
    p.y = y.data_ptr();
    p.y_stride = y.stride(0);
    gated_rms_norm_cuda(p, stream_of(x));
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list in = context->get_saved_variables();
    const c10::cuda::CUDAGuard guard(in[0].device());
    const auto activation = static_cast<GateActivation>(context->saved_data["activation"].toInt());
    const bool gated = activation != GateActivation::kNone;
    const at::Tensor dy = gradients[0].contiguous();
    at::Tensor dx = at::empty_like(in[0]), dw = at::empty_like(in[2]);
    at::Tensor dz = gated ? at::empty_like(in[1]) : at::Tensor();
    GatedNormCudaBackward p;
    p.forward = norm_params(in[0], in[1], in[2], context->saved_data["eps"].toDouble(), activation);
    p.dy = tokens(dy);
    p.dx = dx.data_ptr();
    p.dx_stride = dx.stride(0);
    if (gated) {
      p.dz = dz.data_ptr();
      p.dz_stride = dz.stride(0);
    }
    p.d_weight = dw.data_ptr<float>();
    const at::Tensor workspace = bytes(gated_rms_norm_backward_cuda_workspace(p), dx);
    gated_rms_norm_backward_cuda(p, workspace.data_ptr(), static_cast<size_t>(workspace.numel()),
                                 stream_of(dx));
    return {dx, dz, dw, at::Tensor(), at::Tensor()};
  }
};

}  // namespace

std::string delta_mix_cuda_obstacle(const KdaParams& p, at::Device device) {
  if (!is_hopper(device)) return "the kernels are for Hopper GPUs (sm_90)";
  if (p.key_dim != p.value_dim || (p.key_dim != 64 && p.key_dim != 128))
    return fmt::format("heads of {} x {}, the kernels have 64 x 64 and 128 x 128", p.key_dim, p.value_dim);
  return "";
}

at::Tensor delta_mix_cuda(const DeltaMix& mix, const Sequences& sequences) {
  const KdaParams& p = mix.settings;
  at::Tensor gate = mix.gate, bias = mix.dt_bias;
  if (p.scalar_gate) {  // GDN: the same for every channel
    gate = gate.unsqueeze(-1).expand({-1, -1, p.key_dim}).reshape({gate.size(0), -1});
    bias = bias.unsqueeze(-1).expand({-1, p.key_dim}).reshape({-1});
  }
  return DeltaMixCuda::apply(p, brain(mix.q), brain(mix.k), brain(mix.v), gate.contiguous(),
                             mix.beta.contiguous(), mix.a_log.contiguous(), bias.contiguous(),
                             sequences.cu_tensor);
}

std::optional<at::Tensor> short_convolution_cuda(const at::Tensor& x, const at::Tensor& w,
                                                 const Sequences& sequences) {
  const int64_t taps = w.size(2);
  if (x.scalar_type() != at::kBFloat16 || w.scalar_type() != at::kFloat || x.size(1) % 8 != 0 || taps < 2 ||
      taps > 4 || !is_hopper(x.device()))
    return std::nullopt;
  return ShortConvCuda::apply(x.contiguous(), w.view({w.size(0), taps}).contiguous(), sequences.cu_tensor);
}

std::optional<at::Tensor> gated_norm_cuda(const at::Tensor& x, const at::Tensor& w, double eps,
                                          const at::Tensor* z, GateActivation activation) {
  const int64_t width = w.size(0);
  const bool brains = x.scalar_type() == at::kBFloat16 && (z == nullptr || z->scalar_type() == at::kBFloat16);
  if (!brains || w.scalar_type() != at::kFloat || (width != 64 && width != 128 && width != 256) ||
      !is_hopper(x.device()))
    return std::nullopt;
  const at::Tensor rows = x.contiguous();
  return GatedNormCuda::apply(rows, z == nullptr ? rows : z->contiguous(), w, eps,
                              static_cast<int64_t>(activation));
}

}  // namespace kilin::train
