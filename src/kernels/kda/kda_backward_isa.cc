// SPDX-License-Identifier: Apache-2.0
// The gradients of the chunked form (kda_chunk_isa.cc has the forward pass and its symbols). With S the state
// before a chunk (V x K), H the gradient of the state after it, kt_j = k_j D_C/D_j, E = v - (k D) S^T, U the
// pseudo values:
//     dU   = P^T dO + kt H^T                       C x V
//     W    = (I + L)^-T dU                         back substitution
//     dP   = tril(dO U^T),  dL = -stril(W U^T)     C x C
//     dv   = beta W,  dbeta_i = W_i . E_i + k_i . sum_j dL_ij k_j D_i/D_j
//     d(k D) = -dv S,  d(q D) = dO S,  d(kt) = U H C x K
//     H    <- H diag(D_C) + dO^T (q D) - dv^T (k D)
// and for the pairs inside the chunk and the gates: pairs_forward(), pairs_backward(). The gradient of g_t is
// that of all sums of logarithms from t to the end of the chunk: sum_{i >= t} (q dq + k (dk - 2 c))_i, and
// for the last one D_C sum_v S H + sum_j kt_j d(kt)_j more. No quotient of decays and no positive exponent
// occurs, as in the forward pass.
//
// Of 16 K V operations per token, 4 K V are the forward pass again: it keeps the state before every chunk, E,
// L and P. They go out to memory and come back once (75 KB for 16 tokens of 128 x 128, against 4 MFLOP). A
// sequence that is too long for the memory is cut into pieces; a first forward scan keeps the states between
// them, and each piece is computed again when its turn comes.
//
// Layout. S and H lie in panels [K][kPanel] as in the forward pass. Sums over K have the values in the lanes;
// sums over V (d(k D), d(q D), d(kt), dP, dL) have the 16 tokens in the lanes and broadcast an element of the
// panel: no sum crosses lanes.
#include "kernels/kda/kda_backward_panel.h"
#include "kernels/kda/kda_backward_simd.h"

namespace kilin::KILIN_ISA {
namespace {

struct Job {
  const KdaBackwardParams& params;
  const KdaParams& p;
  Head head;
  KdaBackwardSizes sizes;
  int panels{};
  int64_t panel_floats{};
  int64_t begin{};  // tokens of the sequence
  int64_t end{};
  bool add{};  // to d_q and d_k: not the first value head
  Chunk forward{};
  BackwardChunk chunk{};
  PanelRows rows{};
  float* d_state{};  // panels of H
  float* a_log{};    // [kLanes] sum over the tokens
  float* bias{};     // [padded] likewise
  float* saved{};    // [chunks of a piece][sizes.chunk()]
  float* starts{};   // [pieces][sizes.state()] the state before each piece
};

// U from E, -dv, its way out, and the part of dbeta that comes from E
void value_rows(const Job& job, const float* residual, int64_t token, int n, int64_t column, int width) {
  const BackwardChunk& c = job.chunk;
  const PanelRows& rows = job.rows;
  float* d_v = job.params.d_v == nullptr ? nullptr : job.params.d_v + token * job.params.d_v_stride + column;
  for (int i = 0; i < kC; ++i) {
    const Vec beta = splat(c.beta[i]);
    Vec sum = load(c.d_beta + i * kLanes);
    Vec dv[2];
    for (int h = 0; h < 2; ++h) {
      const int at = i * kPanel + h * kLanes;
      const Vec e = load(residual + at);
      const Vec w = load(rows.w + at);
      store(rows.u + at, beta * e);
      sum += w * e;
      dv[h] = beta * w;
      store(rows.minus_dv + at, -dv[h]);
    }
    store(c.d_beta + i * kLanes, sum);
    if (d_v != nullptr && i < n) store_columns(d_v + i * job.params.d_v_stride, width, dv);
  }
  substitute(c.lower, rows.u);
}

// Everything of a chunk that has to do with the values of one panel.
void backward_panel(const Job& job, const float* s, const float* residual, int64_t token, int n, int panel) {
  const KdaParams& p = job.p;
  const BackwardChunk& c = job.chunk;
  const PanelRows& rows = job.rows;
  float* h = job.d_state + panel * job.panel_floats;
  const int64_t column = static_cast<int64_t>(job.head.value_head) * p.value_dim + panel * kPanel;
  const int rest = p.value_dim - panel * kPanel;
  const int width = rest < kPanel ? rest : kPanel;
  for (int i = 0; i < kC; ++i) {
    Vec value[2] = {};
    if (i < n) load_columns(job.params.d_out + (token + i) * job.params.d_out_stride + column, width, value);
    store(rows.d_out + i * kPanel, value[0]);
    store(rows.d_out + i * kPanel + kLanes, value[1]);
  }
  pseudo_gradient(p, c, rows, h);
  value_rows(job, residual, token, n, column, width);
  transpose_rows(rows.u, kPanel, kC, kPanel, rows.ut, kC);
  transpose_rows(rows.minus_dv, kPanel, kC, kPanel, rows.from_out, 2 * kC);
  transpose_rows(rows.d_out, kPanel, kC, kPanel, rows.from_out + kC, 2 * kC);
  const bool add = panel > 0;
  multiply_columns<kNarrowRows, kTokenVecs>(rows.d_out, rows.ut, kC, add, c.dp);
  multiply_columns<kNarrowRows, kTokenVecs>(rows.w, rows.ut, kC, add, c.dp + kC * kC);
  multiply_columns<kWideRows, 2 * kTokenVecs>(s, rows.from_out, c.padded, add, c.columns);
  multiply_columns<kNarrowRows, kTokenVecs>(h, rows.ut, c.padded, add, c.columns + 2 * kC * c.padded);
  add_total(c, s, h, add);
  update_gradient(c, rows, h);
}

// Gradients of the n tokens from `token` on, of everything but the values.
void finish_chunk(const Job& job, int64_t token, int n) {
  const KdaParams& p = job.p;
  const KdaBackwardParams& to = job.params;
  const BackwardChunk& c = job.chunk;
  transpose_rows(c.columns, 2 * kC, c.padded, 2 * kC, c.dx, c.padded);
  transpose_rows(c.columns + 2 * kC * c.padded, kC, c.padded, kC, c.dkt, c.padded);
  for (int d = 0; d < c.padded; d += kLanes) {
    const Vec last = pairs_forward(c, d);
    pairs_backward(c, d, last + load(c.total + d) * load(c.d_total + d));
  }
  const int64_t head = job.head.q - p.q;  // column of the head
  const int64_t value_head = job.head.value_head;
  Vec a_log = load(job.a_log);
  for (int i = 0; i < n; ++i) {
    const int64_t t = token + i;
    const float* dk = c.dx + i * c.padded;
    const float* dq = dk + kC * c.padded;
    if (to.d_q != nullptr)
      finish_keys(p, job.head.q + t * p.q_stride, dq, p.scale, job.add, to.d_q + t * to.d_q_stride + head);
    if (to.d_k != nullptr)
      finish_keys(p, job.head.k + t * p.k_stride, dk, 1.0f, job.add, to.d_k + t * to.d_k_stride + head);
    const int64_t channel = job.head.gate - p.gate;
    finish_gate(p, c, i, to.d_gate == nullptr ? nullptr : to.d_gate + t * to.d_gate_stride + channel, a_log,
                job.bias);
    if (to.d_beta == nullptr) continue;
    const float d_beta = reduce_add(load(c.d_beta + i * kLanes));
    const float beta = c.beta[i];
    to.d_beta[t * to.d_beta_stride + value_head] = p.beta_is_logit ? d_beta * beta * (1.0f - beta) : d_beta;
  }
  store(job.a_log, a_log);
}

void prefetch_rows(const Job& job, int64_t token, int64_t count) {
  const int64_t column = static_cast<int64_t>(job.head.value_head) * job.p.value_dim;
  for (int64_t t = token; t < token + count; ++t) {
    prefetch_keys(job.p, job.head, t);
    prefetch(job.params.d_out + t * job.params.d_out_stride + column, job.p.value_dim);
  }
}

void backward_chunk(const Job& job, const float* saved, int64_t token, int n) {
  const BackwardChunk& c = job.chunk;
  const float* residual = saved + job.sizes.state();
  const float* lower = residual + kC * job.sizes.columns;
  std::memcpy(c.lower, lower, sizeof(float) * kC * kC);
  transpose_rows(lower + kC * kC, kC, kC, kC, c.pt, kC);
  std::memset(c.d_beta, 0, sizeof(float) * kC * kLanes);
  prepare_chunk(job.p, job.head, token, n, c);
  for (int panel = 0; panel < job.panels; ++panel) {
    // the rows of the chunk before this one, in portions
    const int64_t from = panel * kC / job.panels;
    if (token > job.begin) prefetch_rows(job, token - kC + from, (panel + 1) * kC / job.panels - from);
    backward_panel(job, saved + panel * job.panel_floats, residual + panel * kC * kPanel, token, n, panel);
  }
  finish_chunk(job, token, n);
}

// One chunk of the forward pass without its outputs, from the state in panels `from` to the one in `to` (may
// be the same; null: not wanted). With `saved` it keeps E, L and P there.
void forward_chunk(const Job& job, const float* from, float* to, float* saved, int64_t token, int n) {
  const KdaParams& p = job.p;
  const Chunk& c = job.forward;
  std::memset(c.lower, 0, sizeof(float) * 2 * kC * kC);
  if (n < kC) std::memset(c.keys, 0, sizeof(float) * 3 * kC * static_cast<unsigned>(c.padded));
  const int64_t column = static_cast<int64_t>(job.head.value_head) * p.value_dim;
  for (int i = 0; i < n; ++i) {
    if (token + kC + i < job.end) {
      prefetch_keys(p, job.head, token + kC + i);
      prefetch(p.v + (token + kC + i) * p.v_stride + column, p.value_dim);
    }
    add_row(p, job.head, token + i, i, c);
  }
  if (saved != nullptr)
    std::memcpy(saved + job.sizes.state() + kC * job.sizes.columns, c.lower, sizeof(float) * 2 * kC * kC);
  for (int panel = 0; panel < job.panels; ++panel) {
    const int rest = p.value_dim - panel * kPanel;
    const int width = rest < kPanel ? rest : kPanel;
    const float* s = from + panel * job.panel_floats;
    const float* v = p.v + token * p.v_stride + column + panel * kPanel;
    if (saved != nullptr)
      right_side<true>(p, c, s, v, n, width, saved + job.sizes.state() + panel * kC * kPanel);
    else
      right_side<false>(p, c, s, v, n, width, nullptr);
    if (to == nullptr) continue;
    substitute(c.lower, c.u);
    update(p, c, s, to + panel * job.panel_floats, n);
  }
}

int chunk_length(const Job& job, int64_t token) {
  return job.end - token < kC ? static_cast<int>(job.end - token) : kC;
}

// Moves all panels between a V x K matrix and `panels`.
template <class Matrix, class Move>
void each_panel(const Job& job, Matrix* matrix, float* panels, Move move) {
  for (int i = 0; i < job.panels; ++i) {
    const int rest = job.p.value_dim - i * kPanel;
    move(matrix + static_cast<int64_t>(i) * kPanel * job.p.key_dim, rest < kPanel ? rest : kPanel,
         panels + i * job.panel_floats);
  }
}

// null: zeros
void load_matrix(const Job& job, const float* matrix, float* panels) {
  if (matrix == nullptr) {
    std::memset(panels, 0, sizeof(float) * static_cast<size_t>(job.sizes.state()));
    return;
  }
  each_panel(job, matrix, panels, [&](const float* from, int width, float* to) {
    load_panel(from, job.p.key_dim, job.chunk.padded, width, to);
  });
}

// The tokens [begin, end), whose first state is in `saved`: forward to keep the states, then backward.
void backward_piece(const Job& job, int64_t begin, int64_t end) {
  const int64_t size = job.sizes.chunk();
  const int64_t chunks = (end - begin + kC - 1) / kC;
  for (int64_t i = 0; i < chunks; ++i) {
    float* saved = job.saved + i * size;
    const int64_t token = begin + i * kC;
    forward_chunk(job, saved, i + 1 < chunks ? saved + size : nullptr, saved, token,
                  chunk_length(job, token));
  }
  for (int64_t i = chunks - 1; i >= 0; --i) {
    const int64_t token = begin + i * kC;
    backward_chunk(job, job.saved + i * size, token, chunk_length(job, token));
  }
}

void backward_head(Job& job, int64_t piece_tokens, const float* state, float* d_state) {
  const auto state_bytes = static_cast<size_t>(job.sizes.state()) * sizeof(float);
  load_matrix(job, d_state, job.d_state);
  load_matrix(job, state, job.saved);
  const int64_t pieces = (job.end - job.begin + piece_tokens - 1) / piece_tokens;
  for (int64_t i = 0; i + 1 < pieces; ++i) {
    std::memcpy(job.starts + i * job.sizes.state(), job.saved, state_bytes);
    for (int64_t t = job.begin + i * piece_tokens; t < job.begin + (i + 1) * piece_tokens; t += kC)
      forward_chunk(job, job.saved, job.saved, nullptr, t, kC);
  }
  for (int64_t i = pieces - 1; i >= 0; --i) {
    if (i + 1 < pieces) std::memcpy(job.saved, job.starts + i * job.sizes.state(), state_bytes);
    const int64_t begin = job.begin + i * piece_tokens;
    backward_piece(job, begin, i + 1 < pieces ? begin + piece_tokens : job.end);
  }
  if (d_state == nullptr) return;
  each_panel(job, d_state, job.d_state,
             [&](float* to, int width, float* panel) { store_panel(panel, job.p.key_dim, width, to); });
}

}  // namespace

void kda_backward_task(const KdaBackwardParams& params, const KdaBackwardTask& task) {
  const KdaParams& p = params.forward;
  const int group = p.value_heads / p.heads;
  Job job{.params = params, .p = p, .head = make_head(p, task.head * group), .sizes = KdaBackwardSizes(p)};
  const int padded = job.head.padded;
  Carver memory{task.scratch};
  job.panels = (p.value_dim + kPanel - 1) / kPanel;
  job.panel_floats = static_cast<int64_t>(padded) * kPanel;
  job.begin = p.cu_seqlens[task.sequence];
  job.end = p.cu_seqlens[task.sequence + 1];
  job.d_state = memory.take(job.sizes.state());
  job.chunk = make_backward_chunk(memory, padded);
  job.rows = make_rows(memory);
  job.a_log = memory.take(kLanes);
  job.bias = memory.take(padded);
  job.forward = make_chunk(memory.next, padded, 0);
  job.saved = task.scratch + job.sizes.work();
  job.starts = job.saved + task.piece_chunks * job.sizes.chunk();
  for (int g = 0; g < group; ++g) {
    job.head = make_head(p, task.head * group + g);
    job.add = g > 0;
    std::memset(job.a_log, 0, sizeof(float) * kLanes);
    std::memset(job.bias, 0, sizeof(float) * static_cast<size_t>(padded));
    const int64_t matrix = static_cast<int64_t>(job.head.value_head) * p.value_dim * p.key_dim;
    const int64_t slot = p.slots[task.sequence];
    backward_head(
        job, static_cast<int64_t>(task.piece_chunks) * kC,
        p.state == nullptr ? nullptr : p.state + slot * p.slot_stride + matrix,
        params.d_state == nullptr ? nullptr : params.d_state + slot * params.d_slot_stride + matrix);
    float* sums = task.sums + g * kda_backward_sum_floats(p);
    sums[0] = reduce_add(load(job.a_log));
    std::memcpy(sums + 1, job.bias, sizeof(float) * static_cast<size_t>(kda_backward_sum_floats(p) - 1));
  }
}

}  // namespace kilin::KILIN_ISA
