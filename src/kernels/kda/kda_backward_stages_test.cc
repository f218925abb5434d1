// SPDX-License-Identifier: Apache-2.0
// The stages of the gradients on Hopper (docs/notes/20261124-cuda-backward.md) in plain loops in double,
// against the oracle: chunks of 64 tokens, sub-chunks of 16, the same factors and exponents. What the kernels
// compute is explained there; here it is checked that the formulas hold and that no exponent is positive.
#include <gtest/gtest.h>

#include "kernels/kda/kda_backward_test_util.h"

namespace kilin {
namespace {

using namespace kda_testing;
constexpr int kTokens = 64;
constexpr int kSub = 16;

// A dense matrix
struct Matrix {
  int rows = 0, columns = 0;
  std::vector<double> x;
  Matrix() = default;
  Matrix(int r, int c) : rows(r), columns(c), x(static_cast<size_t>(r) * static_cast<size_t>(c)) {}
  double& operator()(int i, int j) {
    return x[static_cast<size_t>(i) * static_cast<size_t>(columns) + static_cast<size_t>(j)];
  }
  double operator()(int i, int j) const { return const_cast<Matrix&>(*this)(i, j); }
};

Matrix transposed_of(const Matrix& a) {
  Matrix b(a.columns, a.rows);
  for (int i = 0; i < a.rows; ++i)
    for (int j = 0; j < a.columns; ++j) b(j, i) = a(i, j);
  return b;
}

Matrix multiply(const Matrix& a, const Matrix& b, double factor = 1.0) {
  Matrix c(a.rows, b.columns);
  for (int i = 0; i < a.rows; ++i)
    for (int k = 0; k < a.columns; ++k)
      for (int j = 0; j < b.columns; ++j) c(i, j) += factor * a(i, k) * b(k, j);
  return c;
}

void add(Matrix& a, const Matrix& b) {
  for (size_t i = 0; i < a.x.size(); ++i) a.x[i] += b.x[i];
}

double decay(double log) {
  EXPECT_LE(log, 1e-12) << "a positive exponent";
  return std::exp(log);
}

// What does not depend on the state. Rows behind `length` are zero, their decays 1.
struct Chunk {
  int length = 0;
  Matrix q, k, v, d_out;        // q with its scale
  Matrix local;                 // sum of g from the start of the sub-chunk on
  Matrix total, before, after;  // [4][K] of sub-chunks: sum of g in it, in those before it, in those after it
  std::vector<double> beta;
  Matrix p, a, w, q_start, k_end;  // P, A diag(beta), A diag(beta) (k D), q D, k D_C / D
  Matrix state, d_state, u;        // S before, H after, U
};

void prepare(Chunk& c, const Matrix& g) {
  const int K = c.q.columns;
  c.local = Matrix(kTokens, K);
  c.total = c.before = c.after = Matrix(4, K);
  for (int d = 0; d < K; ++d) {
    for (int i = 0; i < kTokens; ++i) c.local(i, d) = g(i, d) + (i % kSub > 0 ? c.local(i - 1, d) : 0.0);
    for (int s = 0; s < 4; ++s) c.total(s, d) = c.local(kSub * s + kSub - 1, d);
    for (int s = 1; s < 4; ++s) c.before(s, d) = c.before(s - 1, d) + c.total(s - 1, d);
    for (int s = 2; s >= 0; --s) c.after(s, d) = c.after(s + 1, d) + c.total(s + 1, d);
  }
  c.p = Matrix(kTokens, kTokens);
  Matrix inverse(kTokens, kTokens);  // (I + L)^-1
  for (int i = 0; i < kTokens; ++i) {
    inverse(i, i) = 1.0;
    for (int j = 0; j <= i; ++j) {
      double l = 0.0;
      for (int d = 0; d < K; ++d) {
        double sum = 0.0;
        for (int m = j + 1; m <= i; ++m) sum += g(m, d);
        c.p(i, j) += c.q(i, d) * c.k(j, d) * decay(sum);
        l += c.beta[static_cast<size_t>(i)] * c.k(i, d) * c.k(j, d) * decay(sum);
      }
      for (int m = 0; m <= j && j < i; ++m) inverse(i, m) -= l * inverse(j, m);
    }
  }
  c.a = inverse;
  for (int i = 0; i < kTokens; ++i)
    for (int j = 0; j < kTokens; ++j) c.a(i, j) *= c.beta[static_cast<size_t>(j)];
  c.q_start = c.k_end = Matrix(kTokens, K);
  Matrix k_start(kTokens, K);
  for (int i = 0; i < kTokens; ++i) {
    const int s = i / kSub;
    for (int d = 0; d < K; ++d) {
      k_start(i, d) = c.k(i, d) * decay(c.before(s, d) + c.local(i, d));
      c.q_start(i, d) = c.q(i, d) * decay(c.before(s, d) + c.local(i, d));
      c.k_end(i, d) = c.k(i, d) * decay(c.after(s, d) + c.total(s, d) - c.local(i, d));
    }
  }
  c.w = multiply(c.a, k_start);
}

void scale_columns(Matrix& a, const Chunk& c) {
  for (int i = 0; i < a.rows; ++i)
    for (int d = 0; d < a.columns; ++d) a(i, d) *= decay(c.before(3, d) + c.total(3, d));
}

// Forward scan: the state after the chunk
Matrix scan(Chunk& c, const Matrix& state) {
  c.state = state;
  c.u = multiply(c.a, c.v);
  add(c.u, multiply(c.w, transposed_of(state), -1.0));
  Matrix next = state;
  scale_columns(next, c);
  add(next, multiply(transposed_of(c.u), c.k_end));
  return next;
}

// Reverse scan: the gradient of the state before the chunk; dU is left in `d_u`
Matrix reverse_scan(Chunk& c, const Matrix& d_state, Matrix& d_u) {
  c.d_state = d_state;
  d_u = multiply(transposed_of(c.p), c.d_out);
  add(d_u, multiply(c.k_end, transposed_of(d_state)));
  Matrix before = d_state;
  scale_columns(before, c);
  add(before, multiply(transposed_of(c.d_out), c.q_start));
  add(before, multiply(transposed_of(d_u), c.w, -1.0));
  return before;
}

struct ChunkGradients {
  Matrix q, k, v, g;
  std::vector<double> beta_beta;  // beta dbeta
};

// Blocks of pairs of tokens in different sub-chunks, row I against all J < I: Horner's rule over the
// sub-chunks. by_row += left of the row's start, by_column += right of the column's end.
void pairs_between(const Chunk& c, const Matrix& dp, const Matrix& dm, Matrix& dq, Matrix& dk, Matrix& back) {
  const int K = c.q.columns;
  for (int d = 0; d < K; ++d) {
    for (int row = 0; row < 4; ++row) {
      for (int i = kSub * row; i < kSub * (row + 1); ++i) {
        double by_p = 0.0, by_m = 0.0;
        for (int column = 0; column < row; ++column) {
          by_p *= decay(c.total(column, d));
          by_m *= decay(c.total(column, d));
          for (int j = kSub * column; j < kSub * (column + 1); ++j) {
            const double key = c.k(j, d) * decay(c.total(column, d) - c.local(j, d));
            by_p += dp(i, j) * key;
            by_m += dm(i, j) * key;
          }
        }
        dq(i, d) += by_p;
        dk(i, d) += by_m;
      }
    }
    for (int j = 0; j < kTokens; ++j) {
      double sum = 0.0;
      for (int row = 3; row > j / kSub; --row) {
        sum *= decay(c.total(row, d));
        double block = 0.0;
        for (int i = kSub * row; i < kSub * (row + 1); ++i)
          block += decay(c.local(i, d)) * (dp(i, j) * c.q(i, d) + dm(i, j) * c.k(i, d));
        sum += block;
      }
      back(j, d) += sum;
    }
  }
}

ChunkGradients chunk_gradients(const Chunk& c, const Matrix& g, const Matrix& d_u) {
  const int K = c.q.columns;
  ChunkGradients d;
  d.v = multiply(transposed_of(c.a), d_u);
  Matrix dp = multiply(c.d_out, transposed_of(c.u));
  Matrix dm = multiply(d.v, transposed_of(c.u), -1.0);
  for (int i = 0; i < kTokens; ++i) {
    for (int j = 0; j < kTokens; ++j) {
      if (j > i) dp(i, j) = 0.0;
      if (j >= i) dm(i, j) = 0.0;
    }
  }
  // d.q and d.k relative to the start of the row's sub-chunk, back relative to the end
  d.q = multiply(c.d_out, c.state);
  d.k = multiply(d.v, c.state, -1.0);
  const Matrix d_end = multiply(c.u, c.d_state);
  Matrix back = d_end;
  for (int i = 0; i < kTokens; ++i) {
    for (int e = 0; e < K; ++e) {
      d.q(i, e) *= decay(c.before(i / kSub, e));
      d.k(i, e) *= decay(c.before(i / kSub, e));
      back(i, e) *= decay(c.after(i / kSub, e));
    }
  }
  pairs_between(c, dp, dm, d.q, d.k, back);
  d.g = Matrix(kTokens, K);
  for (int e = 0; e < K; ++e) {
    double last = 0.0;
    for (int j = 0; j < c.state.rows; ++j) last += c.state(j, e) * c.d_state(j, e);
    last *= decay(c.before(3, e) + c.total(3, e));
    for (int j = 0; j < kTokens; ++j) last += c.k_end(j, e) * d_end(j, e);
    for (int s = 3; s >= 0; --s) {
      double key[kSub] = {}, later[kSub];
      double prefix = 1.0;
      for (int i = 0; i < kSub; ++i) {
        const int t = kSub * s + i;
        const double a = decay(g(t, e));
        prefix *= a;
        double by_p = 0.0, by_m = 0.0;
        for (int j = 0; j < i; ++j) {
          key[j] *= a;
          by_p += dp(t, kSub * s + j) * key[j];
          by_m += dm(t, kSub * s + j) * key[j];
        }
        key[i] = c.k(t, e);
        d.q(t, e) = d.q(t, e) * prefix + by_p + dp(t, t) * key[i];
        d.k(t, e) = d.k(t, e) * prefix + by_m;
        later[i] = back(t, e);
      }
      double a = 1.0;
      for (int i = kSub - 1; i >= 0; --i) {
        const int t = kSub * s + i;
        for (int j = 0; j <= i; ++j)
          later[j] = later[j] * a + dp(t, kSub * s + j) * c.q(t, e) + dm(t, kSub * s + j) * c.k(t, e);
        a = decay(g(t, e));
        last += c.q(t, e) * d.q(t, e) + c.k(t, e) * (d.k(t, e) - later[i]);
        d.g(t, e) = last;
        back(t, e) = later[i];
      }
    }
  }
  d.beta_beta.resize(kTokens);
  for (int i = 0; i < kTokens; ++i) {
    for (int e = 0; e < c.v.columns; ++e) d.beta_beta[static_cast<size_t>(i)] += c.v(i, e) * d.v(i, e);
    for (int e = 0; e < K; ++e) d.beta_beta[static_cast<size_t>(i)] += c.k(i, e) * d.k(i, e);
  }
  add(d.k, back);
  return d;
}

TEST(KdaBackwardStages, FollowTheOracle) {
  for (const int tokens : {1, 64, 65, 200}) {
    for (const double hard : {0.0, 0.3}) {
      BackwardProblem problem({.key_dim = 12,
                               .value_dim = 9,
                               .lengths = {tokens},
                               .gate = KdaGate::kNone,
                               .l2norm = false,
                               .beta_is_logit = false});
      Random random(5);
      for (float& x : problem.k) x *= 0.3f;
      for (float& x : problem.gate) x = random.uniform() < hard ? -1000.0f : 0.3f * x;
      const KdaParams p = problem.params();
      const HeadInputs in = head_inputs(problem, 0, 0);
      const KdaReferenceGradients expected = kda_backward_reference(
          p, tokens, in.q.data(), in.k.data(), in.v.data(), in.gate.data(), in.beta.data(), in.a_log,
          in.dt_bias.data(), in.state.data(), in.d_out.data(), in.d_state.data());
      const auto count = static_cast<size_t>((tokens + kTokens - 1) / kTokens);
      std::vector<Chunk> chunks(count);
      std::vector<Matrix> gates(count);
      Matrix state(p.value_dim, p.key_dim);
      state.x = in.state;
      const auto rows = [&](const std::vector<double>& from, size_t n, int width, double factor) {
        Matrix to(kTokens, width);
        const auto begin = n * kTokens * static_cast<size_t>(width);
        for (size_t i = 0; i < to.x.size() && begin + i < from.size(); ++i)
          to.x[i] = factor * from[begin + i];
        return to;
      };
      for (size_t n = 0; n < count; ++n) {
        Chunk& c = chunks[n];
        c.q = rows(in.q, n, p.key_dim, static_cast<double>(p.scale));
        c.k = rows(in.k, n, p.key_dim, 1.0);
        c.v = rows(in.v, n, p.value_dim, 1.0);
        c.d_out = rows(in.d_out, n, p.value_dim, 1.0);
        c.beta = rows(in.beta, n, 1, 1.0).x;
        gates[n] = rows(in.gate, n, p.key_dim, 1.0);
        prepare(c, gates[n]);
        state = scan(c, state);
      }
      Matrix d_state(p.value_dim, p.key_dim);
      d_state.x = in.d_state;
      std::vector<double> q(in.q.size()), k(in.k.size()), v(in.v.size()), g(in.gate.size()),
          beta(in.beta.size());
      for (size_t n = count; n-- > 0;) {
        Matrix d_u;
        d_state = reverse_scan(chunks[n], d_state, d_u);
        const ChunkGradients d = chunk_gradients(chunks[n], gates[n], d_u);
        const auto put = [&](std::vector<double>& to, const Matrix& from, double factor) {
          const size_t begin = n * from.x.size();
          for (size_t i = 0; i < from.x.size() && begin + i < to.size(); ++i)
            to[begin + i] = factor * from.x[i];
        };
        put(q, d.q, static_cast<double>(p.scale)), put(k, d.k, 1.0), put(v, d.v, 1.0), put(g, d.g, 1.0);
        for (size_t i = 0; i < kTokens && n * kTokens + i < beta.size(); ++i)
          beta[n * kTokens + i] = d.beta_beta[i] / chunks[n].beta[i];
      }
      const std::string what = std::to_string(tokens) + " hard " + std::to_string(hard);
      EXPECT_LT(relative_error(q, expected.q), 1e-12) << what;
      EXPECT_LT(relative_error(k, expected.k), 1e-12) << what;
      EXPECT_LT(relative_error(v, expected.v), 1e-12) << what;
      EXPECT_LT(relative_error(g, expected.gate), 1e-11) << what;
      EXPECT_LT(relative_error(beta, expected.beta), 1e-11) << what;
      EXPECT_LT(relative_error(d_state.x, expected.state), 1e-12) << what;
    }
  }
}

}  // namespace
}  // namespace kilin
