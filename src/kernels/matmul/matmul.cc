// SPDX-License-Identifier: Apache-2.0
// Which form each product takes, the preparation of its activations, and the division of the work.
#include "kernels/matmul/matmul.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "base/cpu.h"
#include "base/error.h"
#include "kernels/cpu/scratch.h"
#include "kernels/matmul/amx.h"
#include "kernels/matmul/dpbf16.h"
#include "kernels/matmul/layout.h"
#include "kernels/matmul/matmul_isa.h"
#include "kernels/matmul/vnni.h"

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
// Panels of one piece of work in the forms that multiply blocks of tokens.
constexpr int64_t kTilePanels = 4;
// Tokens of one piece of work in float32: their inputs stay in L2 while the panels pass by.
constexpr int64_t kGemmTokens = 192;

// How a job is computed. The last five are forms of x86, which form_of() chooses nowhere else.
enum class Form {
  kDotFloats,      // float weights, few tokens
  kGemmFloats,     // float weights, many tokens
  kIntegers,       // quantised weights, few tokens
  kBytes,          // the same sums by VNNI for blocks of tokens
  kRoundedDots,    // quantised weights, few tokens, 8-bit activations, by VNNI
  kRoundedBytes,   // the same for blocks of tokens
  kRoundedFloats,  // BF16 weights, bfloat16 activations, by vdpbf16ps
  kTiles,          // AMX
};

// Measured on 2-core machines, with AMX (docs/notes/20261124-cpu-matmul.md) and without
// (docs/notes/20261125-cpu-vs-llama-cpp.md).
constexpr int64_t kDotTokens = 16;          // up to here dot_floats
constexpr int64_t kTileTokensBF16 = 8;      // from here AMX for BF16 weights
constexpr int64_t kTileTokensWidened = 24;  // from here AMX for weights that are widened first
constexpr int64_t kByteTokensK = 8;         // from here VNNI for Q4_K and Q6_K, whose unpacking is long
constexpr int64_t kByteTokens = 64;         // and for the others
constexpr int64_t kRoundedTokens = 17;      // from here VNNI with rounded activations, and vdpbf16ps

Form form_of(const MatmulJob& job, Isa isa, Activations activations) {
  const Dtype dtype = job.w.dtype;
  if (isa == Isa::kAmx && dtype != Dtype::kF32) {
    if (job.tokens >= (dtype == Dtype::kBF16 ? kTileTokensBF16 : kTileTokensWidened)) return Form::kTiles;
  }
  const bool vnni = isa >= Isa::kAvx512;
  const bool round = rounds(dtype, activations);
  const bool few = job.tokens < kRoundedTokens;
  if (is_quantized(dtype)) {
    if (round) return few ? Form::kRoundedDots : Form::kRoundedBytes;
    const bool long_unpacking = dtype == Dtype::kQ4_K || dtype == Dtype::kQ6_K;
    return vnni && job.tokens >= (long_unpacking ? kByteTokensK : kByteTokens) ? Form::kBytes
                                                                               : Form::kIntegers;
  }
  if (round && !few) return Form::kRoundedFloats;
  return job.tokens <= kDotTokens ? Form::kDotFloats : Form::kGemmFloats;
}

// Equal blocks of about `wanted` tokens, of which one is never more than half as many again.
int64_t equal_blocks(int64_t tokens, int64_t wanted) {
  const int64_t blocks = std::max<int64_t>(1, (tokens + wanted / 2) / wanted);
  return (tokens + blocks - 1) / blocks;
}

// Tokens of one piece of work.
int64_t block_tokens(Form form, int64_t tokens) {
  switch (form) {
    case Form::kGemmFloats:
      return equal_blocks(tokens, kGemmTokens);
    case Form::kBytes:
    case Form::kRoundedBytes:
      return equal_blocks(tokens, vnni::kBlockTokens);
    case Form::kRoundedFloats:
      return equal_blocks(tokens, dpbf16::kBlockTokens);
    case Form::kTiles:
      return amx::block_tokens(tokens);
    default:
      return tokens;
  }
}

// Floats between copied rows of x: rows a power of two apart would fight for the same lines of the
// first-level cache, where 12 of them are walked side by side.
constexpr int64_t kAliasFloats = 1024;
int64_t copied_stride(Form form, int64_t cols) {
  return form == Form::kGemmFloats && cols % kAliasFloats == 0 ? cols + 16 : cols;
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
  TokenRange tokens;  // forms for few tokens take all of the job
};

// The lists of one call, kept by the calling thread for the next.
struct Plan {
  // with x the copy for forms that read x itself, and x_rows only where the form chooses rows of its input
  std::vector<MatmulJob> jobs;
  std::vector<Input> inputs;
  std::vector<size_t> input_of;  // [jobs], kNone without
  std::vector<Piece> pieces;
  Scratch<std::byte> buffer;
};
constexpr size_t kNone = SIZE_MAX;

thread_local Plan plan_of_thread;
thread_local Scratch<std::byte> worker_scratch;

size_t input_bytes(Form form, int64_t tokens, int64_t cols) {
  int64_t bytes = 0;
  switch (form) {
#if defined(__x86_64__)
    case Form::kTiles:
      return static_cast<size_t>(amx::split_bytes(tokens, cols));
    case Form::kRoundedDots:
    case Form::kRoundedBytes:
      bytes = tokens * (cols / 32) * static_cast<int64_t>(sizeof(ByteBlock));
      break;
    case Form::kRoundedFloats:
      bytes = tokens * dpbf16::row_values(cols) * 2;
      break;
#endif
    case Form::kIntegers:
    case Form::kBytes:
      bytes = tokens * (cols / 32) * static_cast<int64_t>(sizeof(ActivationBlock));
      break;
    default:
      bytes = tokens * copied_stride(form, cols) * static_cast<int64_t>(sizeof(float));
  }
  return static_cast<size_t>(packed::round_up(bytes, 64));
}

bool reads_x(Form form) { return form == Form::kDotFloats || form == Form::kGemmFloats; }

// Whether a form that reads x itself can do so: not chosen rows, nor rows that fight for the same lines.
bool reads_x_in_place(const MatmulJob& job, Form form) {
  if (!reads_x(form) || job.x_rows != nullptr) return false;
  return form != Form::kGemmFloats || job.x_stride % kAliasFloats != 0;
}

// The input of all rows of x, in forms that choose rows themselves.
bool chooses_rows(const MatmulJob& job, Form form) {
  return job.x_rows != nullptr && job.x_count > 0 && (form == Form::kBytes || form == Form::kRoundedBytes);
}

void add_input(MatmulJob job, Form form, Plan& plan, size_t& bytes) {
  if (reads_x_in_place(job, form)) return plan.input_of.push_back(kNone);
  const size_t count = plan.inputs.size();
  size_t looked_at = 2;  // jobs with the same input follow one another
  if (chooses_rows(job, form)) {
    job.tokens = job.x_count;
    job.x_rows = nullptr;
    looked_at = count;  // but those of experts that choose from the same rows do not
  }
  for (size_t i = count; i-- > 0 && count - i <= looked_at;) {
    const Input& known = plan.inputs[i];
    if (known.x == job.x && known.x_rows == job.x_rows && known.x_stride == job.x_stride &&
        known.tokens == job.tokens && known.cols == job.w.cols && known.form == form) {
      return plan.input_of.push_back(i);
    }
  }
  const int64_t tasks = form == Form::kTiles ? (job.tokens + 15) / 16 : job.tokens;
  plan.input_of.push_back(count);
  plan.inputs.push_back({job.x, job.x_rows, job.x_stride, job.tokens, job.w.cols, form, bytes, tasks});
  bytes += input_bytes(form, job.tokens, job.w.cols);
}

// What one task writes of an input: a token's row, or a tile of them.
void prepare(const Input& in, int64_t task, [[maybe_unused]] bool stream, std::byte* buffer) {
  const auto row = [&] { return in.x + (in.x_rows != nullptr ? in.x_rows[task] : task) * in.x_stride; };
  std::byte* const first = buffer + in.offset;
  const int64_t blocks = in.cols / 32;
  switch (in.form) {
#if defined(__x86_64__)
    case Form::kTiles:
      return amx::split_activations(in.x, in.x_stride, in.x_rows, in.tokens, in.cols, task, stream, first);
    case Form::kRoundedDots:
    case Form::kRoundedBytes:
      return vnni::quantize_bytes(row(), in.cols, reinterpret_cast<ByteBlock*>(first) + task * blocks);
    case Form::kRoundedFloats:
      return dpbf16::round_row(row(), in.cols,
                               reinterpret_cast<uint16_t*>(first) + task * dpbf16::row_values(in.cols));
#endif
    case Form::kIntegers:
    case Form::kBytes:
      return KILIN_DISPATCH(quantize_activations)(row(), in.cols,
                                                  reinterpret_cast<ActivationBlock*>(first) + task * blocks);
    default:
      std::memcpy(reinterpret_cast<float*>(first) + task * copied_stride(in.form, in.cols), row(),
                  static_cast<size_t>(in.cols) * sizeof(float));
  }
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
    if (form == Form::kTiles || form == Form::kBytes || form == Form::kRoundedBytes ||
        form == Form::kRoundedFloats)
      return kTilePanels;
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
  const int64_t block = block_tokens(form, job.tokens);
  for (int64_t t = 0; t < job.tokens; t += block) {
    for (int64_t p = 0; p < panels;) {
      const int64_t end = std::min(panels, p + size.next(job, form, panels - p));
      list.push_back({&job, input, form, {p, end}, {t, std::min(job.tokens, t + block)}});
      p = end;
    }
  }
}

std::byte* scratch_of(int64_t bytes) { return worker_scratch.get(static_cast<size_t>(bytes)); }

void run_piece(const Piece& piece, const std::byte* buffer, [[maybe_unused]] bool stream) {
  const MatmulJob& job = *piece.job;
  const std::byte* prepared = piece.input == nullptr ? nullptr : buffer + piece.input->offset;
  switch (piece.form) {
    case Form::kDotFloats:
      return KILIN_DISPATCH(dot_floats)(job, piece.panels);
    case Form::kGemmFloats: {
      const auto floats = KILIN_DISPATCH(gemm_scratch_floats)();
      auto* scratch = reinterpret_cast<float*>(scratch_of(floats * static_cast<int64_t>(sizeof(float))));
      return KILIN_DISPATCH(gemm_floats)(job, piece.panels, piece.tokens, scratch);
    }
    case Form::kIntegers:
      return KILIN_DISPATCH(dot_integers)(job, piece.panels,
                                          reinterpret_cast<const ActivationBlock*>(prepared));
#if defined(__x86_64__)
    case Form::kRoundedDots:
      return vnni::dot_integers(job, piece.panels, reinterpret_cast<const ByteBlock*>(prepared));
    case Form::kBytes:
      return vnni::matmul_bytes(job, piece.panels, piece.tokens, stream,
                                reinterpret_cast<const ActivationBlock*>(prepared),
                                scratch_of(vnni::scratch_bytes()));
    case Form::kRoundedBytes:
      return vnni::matmul_bytes(job, piece.panels, piece.tokens, stream,
                                reinterpret_cast<const ByteBlock*>(prepared),
                                scratch_of(vnni::scratch_bytes()));
    case Form::kRoundedFloats:
      return dpbf16::matmul_halves(job, piece.panels, piece.tokens, stream,
                                   reinterpret_cast<const uint16_t*>(prepared),
                                   scratch_of(dpbf16::scratch_bytes()));
    case Form::kTiles:
      return amx::matmul_tiles(job, piece.panels, piece.tokens.begin, piece.tokens.end, stream, prepared,
                               scratch_of(amx::scratch_bytes()));
#else
    default:
      KILIN_ASSERT(false);
#endif
  }
}

}  // namespace

bool rounds(Dtype weights, Activations activations) {
  if (active_isa() != Isa::kAvx512 || activations == Activations::kExact) return false;
  return is_quantized(weights) || (weights == Dtype::kBF16 && fast_bf16_products());
}

void matmul(std::span<const MatmulJob> jobs, ThreadPool& pool, Activations activations) {
  const Isa isa = active_isa();
  Plan plan = std::move(plan_of_thread);
  plan.jobs.assign(jobs.begin(), jobs.end());
  plan.inputs.clear();
  plan.input_of.clear();
  plan.pieces.clear();
  size_t bytes = 0;
  for (const MatmulJob& job : jobs) add_input(job, form_of(job, isa, activations), plan, bytes);
  int64_t results = 0;
  for (const MatmulJob& job : jobs) results += job.tokens * job.w.rows;
  const bool stream = results * static_cast<int64_t>(sizeof(float)) >= kStreamBytes;
  std::byte* buffer = plan.buffer.get(bytes);
  PieceSize size(jobs, pool.size());
  for (size_t i = 0; i < jobs.size(); ++i) {
    const Input* input = plan.input_of[i] == kNone ? nullptr : &plan.inputs[plan.input_of[i]];
    MatmulJob& job = plan.jobs[i];
    const Form form = form_of(job, isa, activations);
    if (input != nullptr && reads_x(form)) {
      job.x = reinterpret_cast<const float*>(buffer + input->offset);
      job.x_stride = copied_stride(form, job.w.cols);
    }
    if (!chooses_rows(job, form)) job.x_rows = nullptr;  // the input has them in order already
    add_pieces(job, input, form, size, plan.pieces);
  }
  prepare_inputs(plan, static_cast<int64_t>(bytes) >= kStreamBytes, buffer, pool);
  pool.parallel_for(static_cast<int64_t>(plan.pieces.size()),
                    [&](int64_t i, int) { run_piece(plan.pieces[static_cast<size_t>(i)], buffer, stream); });
  plan_of_thread = std::move(plan);
}

}  // namespace kilin
