// SPDX-License-Identifier: Apache-2.0
// Which form each product takes, the preparation of its activations, and the division of the work.
#include "kernels/matmul/matmul.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "base/error.h"
#include "kernels/cpu/scratch.h"
#include "kernels/matmul/amx.h"
#include "kernels/matmul/layout.h"
#include "kernels/matmul/matmul_isa.h"

namespace kilin {
namespace {

// Least weight bytes of one piece of work in the memory-bound forms: enough to hide the hand-out of the piece
// and the start of its stream.
constexpr int64_t kLeastPieceBytes = 64 * 1024;
// Values of activations below which their preparation is not worth a parallel region.
constexpr int64_t kSerialValues = 16 * 1024;
// Bytes of results, or of prepared activations, from which they are written past the caches: they would push
// each other out of the second level, and a line that is not read before it is written costs half the
// traffic.
constexpr int64_t kStreamBytes = 4 * 1024 * 1024;
// Panels of one piece of work by AMX.
constexpr int64_t kTilePanels = 4;

// How a job is computed. Measured on a 2-core machine with AMX: docs/notes/20261124-cpu-matmul.md.
enum class Form {
  kDotFloats,   // float weights, few tokens
  kGemmFloats,  // float weights, many tokens
  kIntegers,    // quantised weights
  kTiles,       // AMX
};

constexpr int64_t kDotTokens = 16;          // up to here dot_floats
constexpr int64_t kTileTokensBF16 = 8;      // from here AMX for BF16 weights
constexpr int64_t kTileTokensWidened = 24;  // from here AMX for weights that are widened first

Form form_of(const MatmulJob& job, bool amx) {
  const bool quantized = is_quantized(job.w.dtype);
  if (amx && job.w.dtype != Dtype::kF32) {
    if (job.tokens >= (job.w.dtype == Dtype::kBF16 ? kTileTokensBF16 : kTileTokensWidened))
      return Form::kTiles;
  }
  if (quantized) return Form::kIntegers;
  return job.tokens <= kDotTokens ? Form::kDotFloats : Form::kGemmFloats;
}

// Activations in the shape a form wants, shared by the jobs with the same x.
struct Input {
  const float* x;
  const int32_t* x_rows;
  int64_t x_stride, tokens, cols;
  Form form;
  size_t offset;  // in the buffer
  int64_t tasks;  // tokens, or tiles of them
};

struct Piece {
  const MatmulJob* job;
  const Input* input;  // null: x as it is
  Form form;
  PanelRange panels;
  int64_t first, last;  // tokens, kTiles only
};

// The lists of one call, kept by the calling thread for the next.
struct Plan {
  std::vector<MatmulJob> jobs;  // with chosen rows of x already gathered for the forms that read x itself
  std::vector<Input> inputs;
  std::vector<size_t> input_of;  // [jobs], kNone without
  std::vector<Piece> pieces;
  Scratch<std::byte> buffer;
};
constexpr size_t kNone = SIZE_MAX;

thread_local Plan plan_of_thread;
thread_local Scratch<std::byte> worker_scratch;

size_t input_bytes(Form form, int64_t tokens, int64_t cols) {
#if defined(__x86_64__)
  if (form == Form::kTiles) return static_cast<size_t>(amx::split_bytes(tokens, cols));
#endif
  const int64_t bytes = form == Form::kIntegers
                            ? tokens * (cols / 32) * static_cast<int64_t>(sizeof(ActivationBlock))
                            : tokens * cols * static_cast<int64_t>(sizeof(float));
  return static_cast<size_t>(packed::round_up(bytes, 64));
}

bool reads_x(Form form) { return form == Form::kDotFloats || form == Form::kGemmFloats; }

void add_input(const MatmulJob& job, Form form, Plan& plan, size_t& bytes) {
  if (reads_x(form) && job.x_rows == nullptr) return plan.input_of.push_back(kNone);
  // Jobs with the same input follow one another.
  for (size_t i = plan.inputs.size(); i-- > 0 && plan.inputs.size() - i <= 2;) {
    const Input& known = plan.inputs[i];
    if (known.x == job.x && known.x_rows == job.x_rows && known.x_stride == job.x_stride &&
        known.tokens == job.tokens && known.cols == job.w.cols && known.form == form) {
      return plan.input_of.push_back(i);
    }
  }
  const int64_t tasks = form == Form::kTiles ? (job.tokens + 15) / 16 : job.tokens;
  plan.input_of.push_back(plan.inputs.size());
  plan.inputs.push_back({job.x, job.x_rows, job.x_stride, job.tokens, job.w.cols, form, bytes, tasks});
  bytes += input_bytes(form, job.tokens, job.w.cols);
}

void prepare(const Input& in, int64_t task, bool stream, std::byte* buffer) {
#if defined(__x86_64__)
  if (in.form == Form::kTiles) {
    return amx::split_activations(in.x, in.x_stride, in.x_rows, in.tokens, in.cols, task, stream,
                                  buffer + in.offset);
  }
#endif
  (void)stream;
  const float* row = in.x + (in.x_rows != nullptr ? in.x_rows[task] : task) * in.x_stride;
  if (reads_x(in.form)) {
    const auto bytes = static_cast<size_t>(in.cols) * sizeof(float);
    std::memcpy(buffer + in.offset + static_cast<size_t>(task) * bytes, row, bytes);
    return;
  }
  const int64_t blocks = in.cols / 32;
  auto* to = reinterpret_cast<ActivationBlock*>(buffer + in.offset) + task * blocks;
  KILIN_DISPATCH(quantize_activations)(row, in.cols, to);
}

void prepare_inputs(const Plan& plan, bool stream, std::byte* buffer, ThreadPool& pool) {
  int64_t values = 0;
  int64_t tasks = 0;
  for (const Input& in : plan.inputs) {
    values += in.tokens * in.cols;
    tasks += in.tasks;
  }
  if (values <= kSerialValues) {
    for (const Input& in : plan.inputs) {
      for (int64_t i = 0; i < in.tasks; ++i) prepare(in, i, false, buffer);
    }
    return;
  }
  std::vector<std::pair<const Input*, int64_t>> list;
  list.reserve(static_cast<size_t>(tasks));
  for (const Input& in : plan.inputs) {
    for (int64_t i = 0; i < in.tasks; ++i) list.emplace_back(&in, i);
  }
  pool.parallel_for(tasks, [&](int64_t i, int) {
    const auto& [in, task] = list[static_cast<size_t>(i)];
    prepare(*in, task, stream, buffer);
  });
}

// Pieces shrink towards the end of the list (guided self-scheduling): long streams first, because every start
// of one costs the latency of memory, small ones last to balance the threads.
class PieceSize {
 public:
  PieceSize(std::span<const MatmulJob> jobs, int threads) : threads_(threads) {
    for (const MatmulJob& job : jobs) {
      if (job.tokens > 0) left_ += static_cast<int64_t>(packed_bytes(job.w.dtype, job.w.rows, job.w.cols));
    }
  }
  // Panels of the next piece, of `panels` left in the job
  int64_t next(const MatmulJob& job, Form form, int64_t panels) {
    if (form == Form::kTiles) return kTilePanels;
    if (form == Form::kGemmFloats) return KILIN_DISPATCH(gemm_panels)();
    const int64_t panel = packed::panel_bytes(job.w.dtype, job.w.cols);
    const int64_t share = left_ / (2 * threads_);
    const int64_t step = std::clamp<int64_t>(std::max(share, kLeastPieceBytes) / panel, 1, panels);
    left_ -= step * panel;
    return step;
  }

 private:
  int64_t left_ = 0;
  int64_t threads_;
};

void add_pieces(const MatmulJob& job, const Input* input, Form form, PieceSize& size,
                std::vector<Piece>& list) {
  if (job.tokens == 0 || job.w.rows == 0) return;
  const int64_t panels = (job.w.rows + kPanelRows - 1) / kPanelRows;
  int64_t block = job.tokens;
#if defined(__x86_64__)
  if (form == Form::kTiles) block = amx::block_tokens(job.tokens);
#endif
  for (int64_t t = 0; t < job.tokens; t += block) {
    for (int64_t p = 0; p < panels;) {
      const int64_t end = std::min(panels, p + size.next(job, form, panels - p));
      list.push_back({&job, input, form, {p, end}, t, std::min(job.tokens, t + block)});
      p = end;
    }
  }
}

void run_piece(const Piece& piece, const std::byte* buffer, bool stream) {
  const std::byte* prepared = piece.input == nullptr ? nullptr : buffer + piece.input->offset;
  switch (piece.form) {
    case Form::kDotFloats:
      return KILIN_DISPATCH(dot_floats)(*piece.job, piece.panels);
    case Form::kGemmFloats: {
      const auto floats = static_cast<size_t>(KILIN_DISPATCH(gemm_scratch_floats)());
      auto* scratch = reinterpret_cast<float*>(worker_scratch.get(floats * sizeof(float)));
      return KILIN_DISPATCH(gemm_floats)(*piece.job, piece.panels, scratch);
    }
    case Form::kIntegers:
      return KILIN_DISPATCH(dot_integers)(*piece.job, piece.panels,
                                          reinterpret_cast<const ActivationBlock*>(prepared));
    case Form::kTiles:
#if defined(__x86_64__)
      return amx::matmul_tiles(*piece.job, piece.panels, piece.first, piece.last, stream, prepared,
                               worker_scratch.get(static_cast<size_t>(amx::scratch_bytes())));
#else
      (void)stream;
      return;
#endif
  }
}

}  // namespace

void matmul(std::span<const MatmulJob> jobs, ThreadPool& pool) {
  const bool amx = active_isa() == Isa::kAmx;
  Plan plan = std::move(plan_of_thread);
  plan.jobs.assign(jobs.begin(), jobs.end());
  plan.inputs.clear();
  plan.input_of.clear();
  plan.pieces.clear();
  size_t bytes = 0;
  for (const MatmulJob& job : jobs) add_input(job, form_of(job, amx), plan, bytes);
  int64_t results = 0;
  for (const MatmulJob& job : jobs) results += job.tokens * job.w.rows;
  const bool stream = results * static_cast<int64_t>(sizeof(float)) >= kStreamBytes;
  std::byte* buffer = plan.buffer.get(bytes);
  PieceSize size(jobs, pool.size());
  for (size_t i = 0; i < jobs.size(); ++i) {
    const Input* input = plan.input_of[i] == kNone ? nullptr : &plan.inputs[plan.input_of[i]];
    MatmulJob& job = plan.jobs[i];
    const Form form = form_of(job, amx);
    if (input != nullptr && reads_x(form)) {
      job.x = reinterpret_cast<const float*>(buffer + input->offset);
      job.x_stride = job.w.cols;
    }
    add_pieces(job, input, form, size, plan.pieces);
  }
  prepare_inputs(plan, static_cast<int64_t>(bytes) >= kStreamBytes, buffer, pool);
  pool.parallel_for(static_cast<int64_t>(plan.pieces.size()),
                    [&](int64_t i, int) { run_piece(plan.pieces[static_cast<size_t>(i)], buffer, stream); });
  plan_of_thread = std::move(plan);
}

}  // namespace kilin
