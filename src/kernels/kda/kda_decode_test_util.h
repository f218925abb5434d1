// SPDX-License-Identifier: Apache-2.0
// A decode problem with its memory on host and device, and its reference: the recurrence in double
// (kda_reference.h), with convolution and norm in plain loops.
#pragma once
#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "base/random.h"
#include "kernels/cuda/gpu_test.h"
#include "kernels/kda/kda_decode_cuda.h"
#include "kernels/kda/kda_reference.h"

namespace kilin::kda_decode_testing {

constexpr double kPoison = 1e30;

struct Case {
  const char* name = "";
  int heads = 2, value_heads = 2, dim = 128;
  std::vector<int> lengths{1};
  CudaType type = CudaType::kBf16;
  CudaType gate_type = CudaType::kBf16, beta_type = CudaType::kBf16, state_type = CudaType::kF32;
  CudaType weight_type = CudaType::kBf16;
  KdaGate gate = KdaGate::kSoftplus;
  bool l2norm = true, logit = true, conv = true, norm = true;
  GateActivation activation = GateActivation::kSigmoid;
  float beta_scale = 1;
  bool a_log = true, dt_bias = true;
  bool tap_rows = false;      // convolution weights with a row per tap
  bool zero_initial = false;  // no initial states
  bool wide_seqlens = false;
  bool one_each = false;           // cu_seqlens null
  std::vector<int> padding = {};   // sequences whose slot is -1
  int first_slot = 0;              // with 1, padding sequences have slot 0
  std::vector<int> accepted = {};  // speculative: tokens accepted of the last call
  double fixed_gate = 0;           // with kNone: this value everywhere
  bool use_fixed_gate = false;
  int split = 0;
};

inline int64_t sum(const std::vector<int>& values) {
  return std::accumulate(values.begin(), values.end(), int64_t{0});
}

class Problem {
 public:
  explicit Problem(const Case& wanted, uint64_t seed = 1) : c_(wanted), random_(seed) {
    const int n = sequences();
    const int64_t tokens = sum(c_.lengths);
    rows_ = 3 + (speculative() ? *std::max_element(c_.lengths.begin(), c_.lengths.end()) - 1 + 2 : 0);
    per_sequence_ = speculative() ? rows_ - 2 : 1;
    slots_count_ = n * per_sequence_ * 2 + 3;
    q_ = tensor(c_.type, tokens, keys(), 5, 0, 1);
    k_ = tensor(c_.type, tokens, keys(), 3, 0, 1);
    v_ = tensor(c_.type, tokens, values(), 0, 0, 1);
    out_gate_ = tensor(c_.type, tokens, values(), 7, 0, 2);
    gate_ = tensor(c_.gate_type, tokens, static_cast<int64_t>(c_.value_heads) * c_.dim, 9, -1, 2);
    if (c_.gate == KdaGate::kNone) {
      std::vector<double> g = gate_.values();
      for (double& x : g) x = c_.use_fixed_gate ? c_.fixed_gate : -std::abs(x);
      gate_ = TypedArray(c_.gate_type, g);
    }
    beta_ = tensor(c_.beta_type, tokens, c_.value_heads, 1, 0, 1);
    if (!c_.logit) {
      std::vector<double> b = beta_.values();
      for (double& x : b) x = std::abs(std::sin(x));
      beta_ = TypedArray(c_.beta_type, b);
    }
    a_log_ = TypedArray(CudaType::kF32, normals(c_.value_heads, 0.5, 1));
    dt_bias_ = TypedArray(CudaType::kF32, normals(static_cast<int64_t>(c_.value_heads) * c_.dim, -1, 1));
    norm_weight_ = TypedArray(c_.weight_type, normals(c_.dim, 1, 0.3));
    q_weight_ = TypedArray(c_.weight_type, normals(c_.tap_rows ? 4 * tap_stride() : keys() * 4, 0, 0.6));
    k_weight_ = TypedArray(c_.weight_type, normals(c_.tap_rows ? 4 * tap_stride() : keys() * 4, 0, 0.6));
    v_weight_ = TypedArray(c_.weight_type, normals(c_.tap_rows ? 4 * tap_stride() : values() * 4, 0, 0.6));
    choose_slots();
    fill_pools();
    out_ = TypedArray(c_.type, std::vector<double>(tokens * out_stride(), 77.0));
    std::vector<int32_t> cu{0};
    for (int length : c_.lengths) cu.push_back(cu.back() + length);
    cu_ = GpuArray<int32_t>(cu);
    wide_cu_ = GpuArray<int64_t>(std::vector<int64_t>(cu.begin(), cu.end()));
  }

  KdaDecodeCudaParams params() const {
    KdaDecodeCudaParams p;
    p.heads = c_.heads, p.value_heads = c_.value_heads, p.key_dim = p.value_dim = c_.dim;
    p.sequences = sequences(), p.tokens = sum(c_.lengths);
    if (!c_.one_each) p.cu_seqlens = c_.wide_seqlens ? static_cast<void*>(wide_cu_.data()) : cu_.data();
    p.wide_seqlens = c_.wide_seqlens;
    p.type = c_.type;
    p.q = {q_.data(), keys() + 5}, p.k = {k_.data(), keys() + 3}, p.v = {v_.data(), values()};
    p.gate = {gate_.data(), static_cast<int64_t>(c_.value_heads) * c_.dim + 9}, p.gate_type = c_.gate_type;
    p.beta = {beta_.data(), c_.value_heads + 1}, p.beta_type = c_.beta_type;
    p.gate_kind = c_.gate;
    if (c_.a_log) p.a_log = static_cast<float*>(a_log_.data());
    if (c_.dt_bias) p.dt_bias = static_cast<float*>(dt_bias_.data());
    p.l2norm = c_.l2norm, p.beta_is_logit = c_.logit, p.beta_scale = c_.beta_scale, p.scale = scale();
    p.final = {pool_.data(), c_.state_type, slot_stride(), slots_.data()};
    if (!c_.zero_initial) p.initial = p.final;
    p.first_slot = c_.first_slot;
    if (speculative()) {
      p.token_slots = token_slots_.data(), p.token_slot_stride = per_sequence_, p.accepted = accepted_.data();
    }
    if (c_.conv) {
      p.conv = {q_weight_.data(),
                k_weight_.data(),
                v_weight_.data(),
                c_.weight_type,
                conv_pool_.data(),
                rows_ * channels() + 8,
                rows_,
                conv_slots_.data(),
                true,
                tap_stride()};
    }
    if (c_.norm) {
      p.norm = {norm_weight_.data(), c_.weight_type, 1e-5f, {out_gate_.data(), values() + 7}, c_.activation};
    }
    p.out = out_.data(), p.out_stride = out_stride();
    p.split = c_.split;
    return p;
  }

  void reset() {
    pool_ = TypedArray(c_.state_type, pool_.values());
    conv_pool_ = TypedArray(c_.type, conv_pool_.values());
    out_ = TypedArray(c_.type, out_.values());
  }
  std::vector<uint8_t> result_bytes() const {
    std::vector<uint8_t> all = out_.bytes();
    for (const TypedArray* array : {&pool_, &conv_pool_}) {
      const std::vector<uint8_t> bytes = array->bytes();
      all.insert(all.end(), bytes.begin(), bytes.end());
    }
    return all;
  }

  // Runs the kernel and compares everything it may write with the reference.
  void check_run() {
    SCOPED_TRACE(fmt::format("{} split {}", c_.name, c_.split));
    expect_reference();
    kda_decode_cuda(params(), nullptr);
    check_cuda(cudaDeviceSynchronize(), "kda_decode");
    const double out_limit = c_.type == CudaType::kBf16 ? 2.5e-3 : 6e-4;
    const double state_limit = c_.state_type == CudaType::kF32 ? 2e-6 : 2.5e-3;
    const std::vector<double> out = out_.now();
    const std::vector<double> pool = pool_.now();
    EXPECT_LT(relative_error(out, expected_out_), out_limit) << worst(out, expected_out_);
    int64_t begin = 0;
    for (int n = 0; n < sequences();
         ++n) {  // one by one: a wrong short sequence must not hide behind a long one
      const auto part = [&](const std::vector<double>& x) {
        return std::vector<double>(x.begin() + begin * out_stride(),
                                   x.begin() + (begin + c_.lengths[n]) * out_stride());
      };
      EXPECT_LT(relative_error(part(out), part(expected_out_)), out_limit) << "sequence " << n;
      begin += c_.lengths[n];
    }
    for (int slot = 0; slot < slots_count_; ++slot) {
      const auto part = [&](const std::vector<double>& x) {
        return std::vector<double>(x.begin() + slot * slot_stride(), x.begin() + (slot + 1) * slot_stride());
      };
      if (written_[slot]) {
        EXPECT_LT(relative_error(part(pool), part(expected_pool_)), state_limit)
            << "slot " << slot << " " << worst(part(pool), part(expected_pool_));
      } else {
        EXPECT_EQ(part(pool), part(pool_.values())) << "slot " << slot << " was to stay";
      }
    }
    if (c_.conv) {
      EXPECT_EQ(conv_pool_.now(), expected_conv_pool_) << worst(conv_pool_.now(), expected_conv_pool_);
    }
  }

 private:
  int sequences() const { return static_cast<int>(c_.lengths.size()); }
  bool speculative() const { return !c_.accepted.empty(); }
  int64_t keys() const { return static_cast<int64_t>(c_.heads) * c_.dim; }
  int64_t values() const { return static_cast<int64_t>(c_.value_heads) * c_.dim; }
  int64_t channels() const { return 2 * keys() + values(); }
  int64_t out_stride() const { return values() + 2; }
  int64_t tap_stride() const { return c_.tap_rows ? values() + 3 : 0; }
  int64_t head_size() const { return static_cast<int64_t>(c_.dim) * c_.dim; }
  int64_t slot_stride() const { return c_.value_heads * head_size() + 16; }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(c_.dim)); }
  bool padded(int n) const { return std::find(c_.padding.begin(), c_.padding.end(), n) != c_.padding.end(); }

  std::vector<double> normals(int64_t count, double mean, double deviation) {
    std::vector<double> values(static_cast<size_t>(count));
    for (double& x : values) x = mean + deviation * random_.normal();
    return values;
  }
  // Rows of `width` values and `gap` poisoned ones.
  TypedArray tensor(CudaType type, int64_t tokens, int64_t width, int gap, double mean, double deviation) {
    std::vector<double> values = normals(tokens * (width + gap), mean, deviation);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < gap; ++i) values[t * (width + gap) + width + i] = 6e4;
    }
    return TypedArray(type, values);
  }

  void choose_slots() {
    std::vector<int32_t> free;
    for (int slot = 1; slot < slots_count_; ++slot) free.push_back(slot);
    for (size_t i = free.size(); i > 1; --i) std::swap(free[i - 1], free[random_.below(i)]);
    std::vector<int32_t> conv_slots;
    for (int n = 0; n < sequences(); ++n) {
      const int null_slot = c_.first_slot > 0 ? 0 : -1;
      for (int i = 0; i < per_sequence_; ++i) {
        host_token_slots_.push_back(padded(n) ? null_slot : free.back());
        free.pop_back();
      }
      host_slots_.push_back(host_token_slots_[static_cast<size_t>(n) * per_sequence_]);
      conv_slots.push_back(padded(n) ? -1 : 2 * n + 1);
    }
    slots_ = GpuArray<int32_t>(host_slots_);
    token_slots_ = GpuArray<int32_t>(host_token_slots_);
    conv_slots_ = GpuArray<int32_t>(conv_slots);
    accepted_ = GpuArray<int32_t>(std::vector<int32_t>(c_.accepted.begin(), c_.accepted.end()));
  }

  int accepted(int n) const { return speculative() ? c_.accepted[n] : 1; }
  int read_slot(int n) const { return host_token_slots_[n * per_sequence_ + accepted(n) - 1]; }

  // Everything is 1e30 but what the kernel is to read.
  void fill_pools() {
    std::vector<double> pool(static_cast<size_t>(slots_count_ * slot_stride()), kPoison);
    const int64_t conv_stride = rows_ * channels() + 8;
    std::vector<double> conv(static_cast<size_t>((2 * sequences() + 2) * conv_stride), 6e4);
    for (int n = 0; n < sequences(); ++n) {
      if (padded(n)) continue;
      const std::vector<double> state = normals(c_.value_heads * head_size(), 0, 0.3);
      if (!c_.zero_initial)
        std::copy(state.begin(), state.end(), pool.begin() + read_slot(n) * slot_stride());
      const std::vector<double> inputs = normals(3 * channels(), 0, 1);
      std::copy(inputs.begin(), inputs.end(),
                conv.begin() + (2 * n + 1) * conv_stride + (accepted(n) - 1) * channels());
    }
    pool_ = TypedArray(c_.state_type, pool);
    conv_pool_ = TypedArray(c_.type, conv);
  }

  // Inputs of a channel's convolution: three of history, then the tokens.
  double input(int n, int64_t begin, int64_t t, int64_t channel) const {
    if (t < 0) {
      const int64_t row = accepted(n) - 1 + t + 3;
      return conv_pool_[(2 * n + 1) * (rows_ * channels() + 8) + row * channels() + channel];
    }
    if (channel < keys()) return q_[(begin + t) * (keys() + 5) + channel];
    if (channel < 2 * keys()) return k_[(begin + t) * (keys() + 3) + channel - keys()];
    return v_[(begin + t) * values() + channel - 2 * keys()];
  }
  double convolved(int n, int64_t begin, int64_t t, int64_t channel) const {
    if (!c_.conv) return input(n, begin, t, channel);
    const TypedArray& weight = channel < keys() ? q_weight_ : channel < 2 * keys() ? k_weight_ : v_weight_;
    const int64_t row = channel < keys()       ? channel
                        : channel < 2 * keys() ? channel - keys()
                                               : channel - 2 * keys();
    double total = 0;
    for (int i = 0; i < 4; ++i) {
      total +=
          weight[c_.tap_rows ? i * tap_stride() + row : row * 4 + i] * input(n, begin, t - 3 + i, channel);
    }
    return total / (1 + std::exp(-total));
  }

  void expect_reference() {
    expected_out_ = out_.values();
    expected_pool_ = pool_.values();
    expected_conv_pool_ = conv_pool_.values();
    written_.assign(slots_count_, false);
    int64_t begin = 0;
    for (int n = 0; n < sequences(); begin += c_.lengths[n++]) {
      for (int head = 0; head < c_.value_heads; ++head) expect_head(n, begin, head);
      if (!padded(n)) expect_conv_state(n, begin);
    }
  }

  void expect_head(int n, int64_t begin, int head) {
    const int D = c_.dim;
    if (padded(n)) {
      for (int t = 0; t < c_.lengths[n]; ++t) {
        for (int i = 0; i < D; ++i) expected_out_[(begin + t) * out_stride() + head * D + i] = 0;
      }
      return;
    }
    KdaParams settings;
    settings.key_dim = settings.value_dim = D;
    settings.gate_kind = c_.gate, settings.l2norm = c_.l2norm, settings.scale = scale();
    std::vector<double> state(static_cast<size_t>(head_size()), 0.0), bias(D, 0.0), out(D);
    if (!c_.zero_initial) {
      for (int64_t i = 0; i < head_size(); ++i) {
        state[i] = pool_[read_slot(n) * slot_stride() + head * head_size() + i];
      }
    }
    for (int i = 0; i < D && c_.dt_bias; ++i) bias[i] = dt_bias_[head * D + i];
    const auto keep = [&](int slot) {
      written_[slot] = true;
      std::copy(state.begin(), state.end(),
                expected_pool_.begin() + slot * slot_stride() + head * head_size());
    };
    const int64_t key = static_cast<int64_t>(head / (c_.value_heads / c_.heads)) * D;
    for (int t = 0; t < c_.lengths[n]; ++t) {
      std::vector<double> q(D), k(D), v(D), gate(D);
      for (int i = 0; i < D; ++i) {
        q[i] = convolved(n, begin, t, key + i);
        k[i] = convolved(n, begin, t, keys() + key + i);
        v[i] = convolved(n, begin, t, 2 * keys() + head * D + i);
        gate[i] = gate_[(begin + t) * (static_cast<int64_t>(c_.value_heads) * D + 9) + head * D + i];
      }
      double beta = beta_[(begin + t) * (c_.value_heads + 1) + head];
      beta = c_.beta_scale * (c_.logit ? 1 / (1 + std::exp(-beta)) : beta);
      kda_reference<double>(settings, 1, q.data(), k.data(), v.data(), gate.data(), &beta,
                            c_.a_log ? a_log_[head] : 0.0, bias.data(), state.data(), out.data());
      if (speculative()) keep(host_token_slots_[n * per_sequence_ + t]);
      double squares = 0;
      for (double x : out) squares += x * x;
      for (int i = 0; i < D; ++i) {
        double y = out[i];
        if (c_.norm) {
          const double z = out_gate_[(begin + t) * (values() + 7) + head * D + i];
          const double s = 1 / (1 + std::exp(-z));
          y *= norm_weight_[i] / std::sqrt(squares / D + 1e-5f);
          y *= c_.activation == GateActivation::kNone   ? 1
               : c_.activation == GateActivation::kSilu ? z * s
                                                        : s;
        }
        expected_out_[(begin + t) * out_stride() + head * D + i] = y;
      }
    }
    if (!speculative()) keep(host_slots_[n]);
  }

  void expect_conv_state(int n, int64_t begin) {
    const int length = c_.lengths[n];
    if (!c_.conv || length == 0) return;
    const int first = speculative() ? 1 : length;  // of history and tokens together
    const int count = speculative() ? 2 + length : 3;
    for (int row = 0; row < count; ++row) {
      for (int64_t channel = 0; channel < channels(); ++channel) {
        expected_conv_pool_[(2 * n + 1) * (rows_ * channels() + 8) + row * channels() + channel] =
            input(n, begin, first + row - 3, channel);
      }
    }
  }

  Case c_;
  Random random_;
  int rows_ = 3, per_sequence_ = 1, slots_count_ = 0;
  TypedArray q_, k_, v_, out_gate_, gate_, beta_, a_log_, dt_bias_, norm_weight_, q_weight_, k_weight_,
      v_weight_;
  TypedArray pool_, conv_pool_, out_;
  std::vector<int32_t> host_slots_, host_token_slots_;
  GpuArray<int32_t> slots_, token_slots_, conv_slots_, accepted_, cu_;
  GpuArray<int64_t> wide_cu_;
  std::vector<double> expected_out_, expected_pool_, expected_conv_pool_;
  std::vector<bool> written_;
};

}  // namespace kilin::kda_decode_testing
