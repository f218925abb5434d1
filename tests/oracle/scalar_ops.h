// SPDX-License-Identifier: Apache-2.0
// The oracle: the model text over plain loops in T = double, or std::complex<double> for exact derivatives by
// complex step. Written for clarity; each sequence of a batch gets its own state, as in the engine. Branches
// look at real parts.
#pragma once
#include <algorithm>
#include <cmath>
#include <complex>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <vector>

#include "base/float16.h"
#include "kernels/kda/kda_reference.h"
#include "model/batch.h"
#include "model/blocks.h"
#include "tensor/tensor_view.h"

namespace kilin::testing {

template <class T>
struct Matrix {
  int64_t rows = 0, width = 0;
  std::vector<T> v;
  Matrix() = default;
  Matrix(int64_t r, int64_t w) : rows(r), width(w), v(static_cast<size_t>(r * w)) {}
  T* row(int64_t r) { return v.data() + r * width; }
  const T* row(int64_t r) const { return v.data() + r * width; }
};

template <class T>
T sigmoid(T x) {
  return 1.0 / (1.0 + std::exp(-x));
}

template <class T>
class ScalarOps {
 public:
  using Tensor = Matrix<T>;
  using Weight = Matrix<T>;  // matrices [out][in]; vectors one row
  std::function<void(std::string_view, int, const Tensor&)> observer;

  explicit ScalarOps(const Config& config) : c_(config) {}

  void begin(const Batch& batch) { batch_ = batch; }

  Tensor embed(const Weight& table) {
    Tensor x(batch_.rows(), table.width);
    for (int64_t r = 0; r < x.rows; ++r)
      std::copy_n(table.row(batch_.tokens[static_cast<size_t>(r)]), x.width, x.row(r));
    return x;
  }

  Tensor rms_norm(const Tensor& x, const Weight& w, double eps) {
    Tensor y(x.rows, x.width);
    for (int64_t r = 0; r < x.rows; ++r) norm_row(x.row(r), w.row(0), x.width, eps, y.row(r));
    return y;
  }

  Tensor linear(const Tensor& x, const Weight& w) {
    Tensor y(x.rows, w.rows);
    for (int64_t r = 0; r < x.rows; ++r) {
      for (int64_t o = 0; o < w.rows; ++o)
        y.row(r)[o] = std::inner_product(x.row(r), x.row(r) + x.width, w.row(o), T(0));
    }
    return y;
  }

  template <size_t N>
  std::array<Tensor, N> linears(const Tensor& x, const std::array<const Weight*, N>& w) {
    std::array<Tensor, N> y;
    for (size_t i = 0; i < N; ++i) y[i] = linear(x, *w[i]);
    return y;
  }

  // w [channels][taps]
  Tensor short_conv(const Tensor& x, const Weight* w, int layer, ConvStream stream) {
    Tensor y = x;
    const int64_t history = c_.linear.conv_taps - 1;
    for (int s = 0; w != nullptr && s < batch_.sequences(); ++s) {
      auto& past = state(conv_, layer * 4 + static_cast<int>(stream), s, history * x.width);
      std::vector<T> u = past;  // past inputs, then the new ones
      for (int64_t r = first(s); r < first(s + 1); ++r) u.insert(u.end(), x.row(r), x.row(r) + x.width);
      for (int64_t r = first(s); r < first(s + 1); ++r) {
        for (int64_t ch = 0; ch < x.width; ++ch) {
          T sum = 0;
          for (int64_t i = 0; i <= history; ++i) {
            sum += w->row(ch)[i] * u[static_cast<size_t>((r - first(s) + i) * x.width + ch)];
          }
          y.row(r)[ch] = sum;
        }
      }
      past.assign(u.end() - history * x.width, u.end());
    }
    for (T& e : y.v) e *= sigmoid(e);
    return y;
  }

  Tensor delta_mix(const MixInputs<Tensor, Weight>& in, int layer, LayerKind kind) {
    const LinearAttentionConfig& a = c_.linear;
    KdaParams p;
    p.key_dim = static_cast<int>(a.key_dim);
    p.value_dim = static_cast<int>(a.value_dim);
    p.gate_kind = a.gate_lower_bound ? KdaGate::kBounded : KdaGate::kSoftplus;
    p.lower_bound = static_cast<float>(a.gate_lower_bound.value_or(-5.0));
    p.scalar_gate = kind == LayerKind::kGdn;
    p.beta_is_logit = true;
    // kda_reference's scale is a float; the exact one goes to the output instead, which is linear in q.
    const double scale = 1.0 / std::sqrt(static_cast<double>(a.key_dim));
    const int64_t gates = p.scalar_gate ? 1 : a.key_dim;
    Tensor out(in.v.rows, in.v.width);
    for (int s = 0; s < batch_.sequences(); ++s) {
      auto& states = state(delta_, layer, s, a.value_heads * a.value_dim * a.key_dim);
      for (int64_t h = 0; h < a.value_heads; ++h) {
        const int64_t qk = h / (a.value_heads / a.heads);
        const auto q = head(in.q, s, qk, a.key_dim);
        const auto k = head(in.k, s, qk, a.key_dim);
        const auto v = head(in.v, s, h, a.value_dim);
        const auto gate = head(in.gate, s, h, gates);
        const auto beta = head(in.beta, s, h, 1);
        std::vector<T> o(v.size());
        kda_reference<T>(p, static_cast<int>(first(s + 1) - first(s)), q.data(), k.data(), v.data(),
                         gate.data(), beta.data(), in.a_log.v[static_cast<size_t>(h)],
                         in.dt_bias.v.data() + h * gates, states.data() + h * a.value_dim * a.key_dim,
                         o.data());
        for (int64_t r = first(s); r < first(s + 1); ++r) {
          for (int64_t i = 0; i < a.value_dim; ++i) {
            out.row(r)[h * a.value_dim + i] =
                o[static_cast<size_t>((r - first(s)) * a.value_dim + i)] * scale;
          }
        }
      }
    }
    return out;
  }

  Tensor gated_rms_norm(const Tensor& x, const Weight& w, const Tensor* z) {
    Tensor y(x.rows, x.width);
    const int64_t d = w.width;
    for (int64_t r = 0; r < x.rows; ++r) {
      for (int64_t h = 0; h < x.width; h += d) norm_row(x.row(r) + h, w.row(0), d, c_.norm_eps, y.row(r) + h);
    }
    for (size_t i = 0; z != nullptr && i < y.v.size(); ++i) {
      y.v[i] *= c_.linear.output_gate == OutputGate::kSilu ? z->v[i] * sigmoid(z->v[i]) : sigmoid(z->v[i]);
    }
    return y;
  }

  Tensor mla_mix(const Tensor& q, const Tensor& kv, const MlaWeights<Weight>& w, int layer) {
    const MlaConfig& a = c_.mla;
    const int64_t width = a.latent + a.rope, q_width = a.nope + a.rope;
    Tensor out(q.rows, a.heads * a.value);
    for (int s = 0; s < batch_.sequences(); ++s) {
      auto& cache = state(latents_, layer, s, 0);
      for (int64_t r = first(s); r < first(s + 1); ++r) {
        const auto position = static_cast<int64_t>(cache.size()) / width;
        cache.resize(cache.size() + static_cast<size_t>(width));
        T* row = cache.data() + position * width;
        norm_row(kv.row(r), w.kv_norm.row(0), a.latent, a.latent_norm_eps, row);
        std::copy_n(kv.row(r) + a.latent, a.rope, row + a.latent);
        rotate(row + a.latent, position);
        for (int64_t h = 0; h < a.heads; ++h) {
          std::vector<T> query(q.row(r) + h * q_width, q.row(r) + (h + 1) * q_width);
          rotate(query.data() + a.nope, position);
          attend(query, cache, position + 1, w.kv_b, h, out.row(r) + h * a.value);
        }
      }
    }
    return out;
  }

  Tensor swiglu(const Tensor& gate, const Tensor& up) {
    Tensor y(gate.rows, gate.width);
    for (size_t i = 0; i < y.v.size(); ++i) y.v[i] = gate.v[i] * sigmoid(gate.v[i]) * up.v[i];
    return y;
  }

  Tensor moe(const Tensor& x, const MoeWeights<Weight>& w, int) {
    const Tensor logits = linear(x, w.router);
    Tensor y(x.rows, x.width);
    if (c_.moe.shared > 0) y = mlp_block(*this, w.shared, x);
    for (int64_t r = 0; r < x.rows; ++r) {
      Tensor one(1, x.width);
      std::copy_n(x.row(r), x.width, one.v.data());
      for (const auto& [expert, weight] : choose(logits.row(r), w.router_bias.row(0))) {
        const Tensor e = mlp_block(*this, w.experts[static_cast<size_t>(expert)], one);
        for (int64_t i = 0; i < x.width; ++i) y.row(r)[i] += weight * e.v[static_cast<size_t>(i)];
      }
    }
    return y;
  }

  void add_to(Tensor& x, const Tensor& y) {
    for (size_t i = 0; i < x.v.size(); ++i) x.v[i] += y.v[i];
  }
  Tensor wanted_rows(const Tensor& x) {
    Tensor y(static_cast<int64_t>(batch_.wanted.size()), x.width);
    for (int64_t r = 0; r < y.rows; ++r)
      std::copy_n(x.row(batch_.wanted[static_cast<size_t>(r)]), x.width, y.row(r));
    return y;
  }
  int scope() { return 0; }
  void observe(std::string_view what, int layer, const Tensor& x) {
    if (observer) observer(what, layer, x);
  }

 private:
  using States = std::map<std::pair<int, int32_t>, std::vector<T>>;

  int64_t first(int s) const { return batch_.cu_seqlens[static_cast<size_t>(s)]; }
  std::vector<T>& state(States& states, int layer, int s, int64_t size) {
    auto [it, fresh] = states.try_emplace({layer, batch_.slots[static_cast<size_t>(s)]});
    if (fresh) it->second.resize(static_cast<size_t>(size));
    return it->second;
  }
  std::vector<T> head(const Tensor& x, int s, int64_t h, int64_t width) const {
    std::vector<T> v;
    for (int64_t r = first(s); r < first(s + 1); ++r)
      v.insert(v.end(), x.row(r) + h * width, x.row(r) + (h + 1) * width);
    return v;
  }
  static void norm_row(const T* x, const T* w, int64_t n, double eps, T* y) {
    const T scale = 1.0 / std::sqrt(std::inner_product(x, x + n, x, T(0)) / static_cast<double>(n) + eps);
    for (int64_t i = 0; i < n; ++i) y[i] = w[i] * x[i] * scale;
  }
  void rotate(T* x, int64_t position) const {
    for (int64_t i = 0; c_.mla.use_rope && i < c_.mla.rope; i += 2) {
      const double angle =
          static_cast<double>(position) *
          std::pow(c_.mla.rope_theta, -static_cast<double>(i) / static_cast<double>(c_.mla.rope));
      const T a = x[i], b = x[i + 1];
      x[i] = a * std::cos(angle) - b * std::sin(angle);
      x[i + 1] = a * std::sin(angle) + b * std::cos(angle);
    }
  }
  // Keys and values multiplied out, as the equations of the paper have them.
  void attend(const std::vector<T>& q, const std::vector<T>& cache, int64_t keys, const Weight& kv_b,
              int64_t h, T* out) const {
    const MlaConfig& a = c_.mla;
    const int64_t width = a.latent + a.rope, rows = h * (a.nope + a.value);
    const double scale = 1.0 / std::sqrt(static_cast<double>(a.nope + a.rope));
    std::vector<T> scores(static_cast<size_t>(keys));
    T total = 0;
    double top = -1e300;
    for (int64_t j = 0; j < keys; ++j) {
      const T* c = cache.data() + j * width;
      T s = 0;
      for (int64_t d = 0; d < a.nope; ++d)
        s += q[static_cast<size_t>(d)] * std::inner_product(c, c + a.latent, kv_b.row(rows + d), T(0));
      for (int64_t d = 0; d < a.rope; ++d) s += q[static_cast<size_t>(a.nope + d)] * c[a.latent + d];
      scores[static_cast<size_t>(j)] = s * scale;
      top = std::max(top, std::real(scores[static_cast<size_t>(j)]));
    }
    for (T& s : scores) total += s = std::exp(s - top);
    std::fill_n(out, a.value, T(0));
    for (int64_t j = 0; j < keys; ++j) {
      const T* c = cache.data() + j * width;
      for (int64_t d = 0; d < a.value; ++d) {
        out[d] += scores[static_cast<size_t>(j)] / total *
                  std::inner_product(c, c + a.latent, kv_b.row(rows + a.nope + d), T(0));
      }
    }
  }
  // (expert, weight) of one token
  std::vector<std::pair<int64_t, T>> choose(const T* logits, const T* bias) const {
    const MoeConfig& m = c_.moe;
    std::vector<T> score(static_cast<size_t>(m.experts));
    T exp_sum = 0;
    for (int64_t e = 0; e < m.experts; ++e) exp_sum += std::exp(logits[e]);
    for (int64_t e = 0; e < m.experts; ++e)
      score[static_cast<size_t>(e)] = m.sigmoid_router ? sigmoid(logits[e]) : std::exp(logits[e]) / exp_sum;
    std::vector<std::pair<double, int64_t>> choice;
    const int64_t size = m.experts / m.groups;
    std::vector<std::pair<double, int64_t>> groups;
    for (int64_t g = 0; g < m.groups; ++g) {
      std::vector<double> members;
      for (int64_t e = g * size; e < (g + 1) * size; ++e)
        members.push_back(std::real(score[static_cast<size_t>(e)] + bias[e]));
      std::sort(members.rbegin(), members.rend());
      groups.emplace_back(members[0] + (members.size() > 1 ? members[1] : 0.0), g);
    }
    std::stable_sort(groups.begin(), groups.end(), [](auto& a, auto& b) { return a.first > b.first; });
    groups.resize(static_cast<size_t>(m.groups_kept));
    for (int64_t e = 0; e < m.experts; ++e) {
      const bool kept =
          std::any_of(groups.begin(), groups.end(), [&](auto& g) { return g.second == e / size; });
      choice.emplace_back(kept ? std::real(score[static_cast<size_t>(e)] + bias[e]) : 0.0, e);
    }
    std::stable_sort(choice.begin(), choice.end(), [](auto& a, auto& b) { return a.first > b.first; });
    std::vector<std::pair<int64_t, T>> chosen;
    T sum = 0;
    for (int64_t j = 0; j < m.top_k; ++j) {
      const int64_t e = choice[static_cast<size_t>(j)].second;
      const T weight =
          m.biased_weights ? score[static_cast<size_t>(e)] + bias[e] : score[static_cast<size_t>(e)];
      chosen.emplace_back(e, weight);
      sum += weight;
    }
    for (auto& [e, weight] : chosen) weight *= m.scale / (m.renormalize ? sum + 1e-20 : T(1));
    return chosen;
  }

  const Config& c_;
  Batch batch_;
  States conv_, delta_, latents_;
};

static_assert(Ops<ScalarOps<double>>);
static_assert(Ops<ScalarOps<std::complex<double>>>);

// A parameter's stored values widened exactly.
template <class T>
Matrix<T> widen(const Parameter& p, const TensorView& view) {
  const bool row = p.role == Role::kVector;
  Matrix<T> m(row ? 1 : view.shape.at(0), row ? view.elements() : view.elements() / view.shape.at(0));
  for (size_t i = 0; i < m.v.size(); ++i) {
    const auto* at = static_cast<const std::byte*>(view.data) + i * dtype_size(view.dtype);
    BFloat16 b;
    Float16 h;
    float f = 0;
    if (view.dtype == Dtype::kF32) std::memcpy(&f, at, 4);
    if (view.dtype == Dtype::kBF16) f = (std::memcpy(&b, at, 2), to_float(b));
    if (view.dtype == Dtype::kF16) f = (std::memcpy(&h, at, 2), to_float(h));
    m.v[i] = f;
  }
  return m;
}

}  // namespace kilin::testing
