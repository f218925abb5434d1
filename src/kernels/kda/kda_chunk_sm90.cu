// SPDX-License-Identifier: Apache-2.0
// The chunked form on Hopper: workspace and launches. The kernels: kda_image_sm90.cuh, kda_scan_sm90.cuh,
// kda_fused_sm90.cuh, kda_pipe_sm90.cuh.
#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/cuda/device.h"
#include "kernels/kda/kda_fused_sm90.cuh"
#include "kernels/kda/kda_launch_sm90.cuh"
#include "kernels/kda/kda_pipe_sm90.cuh"

namespace kilin {
namespace cuda {
namespace {

int64_t image_bytes(const KdaCudaParams& p) {
  return p.key_dim == 64 ? KdaImage<64>::kBytes : KdaImage<128>::kBytes;
}

// What the plan counts on.
int64_t multiprocessors(const KdaCudaParams& p) {
  return p.multiprocessors > 0 ? p.multiprocessors : cuda_device().multiprocessors;
}

// Whether one block per sequence, head and part of V makes its own images.
bool fused(const KdaCudaParams& p) {
  if (p.plan != KdaCudaPlan::kAuto) return p.plan == KdaCudaPlan::kFused;
  // Measured (bench/cuda_kda.cu): with few sequences and heads the chain from chunk to chunk decides, and
  // that is shorter when the images are there already; with many, memory.
  return 3 * static_cast<int64_t>(p.sequences) * p.value_heads > multiprocessors(p);
}

// Into how many segments the scan cuts each sequence: as many as fill the chip with blocks of kSegmentRows
// rows. Segments cost twice the products and loads of a scan, so they pay from four on, and for sequences
// that are long.
constexpr int kSegmentRows = 64, kMostSegments = 16, kLeastSegmentChunks = 64;
int segments(const KdaCudaParams& p) {
  const int64_t blocks =
      std::max<int64_t>(1, static_cast<int64_t>(p.sequences) * p.value_heads * (p.value_dim / kSegmentRows));
  const int64_t room = std::min<int64_t>(multiprocessors(p) / blocks, kMostSegments);
  if (p.plan == KdaCudaPlan::kSegments) return static_cast<int>(std::max<int64_t>(room, 2));
  if (p.plan != KdaCudaPlan::kAuto || fused(p)) return 1;
  const int64_t most = std::min(room, p.tokens / std::max(p.sequences, 1) / kChunk / kLeastSegmentChunks);
  return most < 4 ? 1 : static_cast<int>(most);
}

// Blocks of kda_pipe that scan.
int64_t pipe_scans(const KdaCudaParams& p) {
  return static_cast<int64_t>(p.sequences) * p.value_heads * (p.value_dim / kPipeRows);
}

// Whether images and scan run side by side in one launch. Measured (docs/notes/20261126-cuda-pipe-wgmma.md):
// faster than two kernels with 24 to 44 heads, the more the longer; a short pipe is not worth its beginning.
// Sequences of different lengths, several sequences and smaller heads have not been timed.
constexpr int kLeastPipeImages = 5120, kLeastPipePairs = 24;
bool piped(const KdaCudaParams& p) {
  if (p.plan != KdaCudaPlan::kAuto) return p.plan == KdaCudaPlan::kPipe;
  return !fused(p) && segments(p) == 1 && p.cu_seqlens == nullptr && p.key_dim == 128 && p.value_dim == 128 &&
         p.sequences == 1 && p.value_heads >= kLeastPipePairs &&
         chunk_bound<kChunk>(p) * p.value_heads >= kLeastPipeImages && pipe_scans(p) < multiprocessors(p);
}

// Words of KdaPipe::ready of one head.
int64_t ready_words_per_head(const KdaCudaParams& p) { return chunk_bound<kChunk>(p) / 32 + p.sequences + 1; }

struct Workspace {
  size_t offsets, starts, chunks, images, summaries, segment_starts, order, drawn, progress, ready, bytes;
  explicit Workspace(const KdaCudaParams& p) {
    const bool table = p.cu_seqlens != nullptr;
    const int64_t pairs = static_cast<int64_t>(p.sequences) * p.value_heads, parts = segments(p);
    offsets = 0;
    starts = offsets + (table ? aligned((p.sequences + 1) * 4) : 0);
    chunks = starts + (table ? aligned((p.sequences + 1) * 8) : 0);
    images = chunks + (table ? aligned(chunk_bound<kChunk>(p) * 8) : 0);
    const int64_t places = piped(p) ? int64_t{p.sequences} * kPipeRing : chunk_bound<kChunk>(p);
    summaries = images + (fused(p) ? 0 : aligned(places * p.value_heads * image_bytes(p)));
    segment_starts = summaries + aligned(pairs * (parts - 1) * (p.value_dim + p.key_dim) * p.key_dim * 4);
    order = segment_starts + (parts > 1 ? aligned(pairs * parts * p.value_dim * p.key_dim * 4) : 0);
    drawn = order + (piped(p) && table ? aligned(chunk_bound<kChunk>(p) * 8) : 0);
    progress = drawn + (piped(p) ? 256 : 0);
    ready = progress + (piped(p) ? aligned(pairs * kPipeLine * 4) : 0);
    bytes = ready + (piped(p) ? aligned(p.value_heads * ready_words_per_head(p) * 4) : 0);
  }
};

// 64 or 128 rows of the state per block: as many blocks as there are multiprocessors, no more.
int groups(const KdaCudaParams& p) {
  const int64_t pairs = static_cast<int64_t>(p.sequences) * p.value_heads;
  return p.value_dim == 64 || 2 * pairs <= multiprocessors(p) ? 1 : 2;
}

template <class Element, int K, int kRows, bool kSummary>
void scan(const KdaArgs& args, int64_t blocks, cudaStream_t stream) {
  using Block = ScanBlock<K, kRows, kSummary>;
  launch(kda_scan<Element, K, kRows, kSummary>, "kda_scan", blocks, Block::kThreads, Block::kBytes,
         LaunchKind::kOverlapping, stream, args);
}

// From images to out and states.
template <class Element, int K>
void run_scans(const KdaCudaParams& p, const KdaArgs& args, cudaStream_t stream) {
  const int64_t pairs = static_cast<int64_t>(p.sequences) * p.value_heads;
  if (args.segments > 1) {
    scan<Element, K, kSegmentRows, true>(
        args, pairs * (args.segments - 1) * ((p.value_dim + K) / kSegmentRows), stream);
    launch(kda_starts<K>, "kda_starts", pairs * (p.value_dim / kStartRows), kStartRows * 32, 0,
           LaunchKind::kOverlapping, stream, args);
  }
  // As many rows of S per block as leave no multiprocessor without work.
  if (pairs * args.segments * (p.value_dim / 32) > multiprocessors(p)) {
    scan<Element, K, 64, false>(args, pairs * args.segments * (p.value_dim / 64), stream);
  } else {
    scan<Element, K, 32, false>(args, pairs * args.segments * (p.value_dim / 32), stream);
  }
}

template <class Element, int K, class GateElement, KdaGate kGate>
void run_pipe(const KdaCudaParams& p, const KdaArgs& args, cudaStream_t stream) {
  const Workspace place(p);
  uint8_t* base = args.images - place.images;
  const int64_t scans = pipe_scans(p), images = chunk_bound<kChunk>(p) * p.value_heads;
  check(scans < multiprocessors(p),
        "kda_pipe: {} blocks scan, and this context has room for {} blocks at once", scans,
        multiprocessors(p));
  check(images < (int64_t{1} << 31), "kda_pipe: {} images are too many for one launch", images);
  KdaPipe pipe{};
  pipe.drawn = reinterpret_cast<uint32_t*>(base + place.drawn);
  pipe.progress = reinterpret_cast<uint32_t*>(base + place.progress);
  pipe.ready = reinterpret_cast<uint32_t*>(base + place.ready);
  pipe.words = ready_words_per_head(p);
  pipe.scans = static_cast<int>(scans);
  pipe.images = static_cast<uint32_t>(images);
  check_cuda(cudaMemsetAsync(pipe.drawn, 0, place.bytes - place.drawn, stream), "words of kda_pipe");
  if (p.cu_seqlens != nullptr && images > 0) {
    pipe.order = reinterpret_cast<const int64_t*>(base + place.order);
    launch(kda_pipe_order, "kda_pipe_order", divide_up(chunk_bound<kChunk>(p), 128), 128, 0,
           LaunchKind::kPlain, stream, args.layout, reinterpret_cast<int64_t*>(base + place.order));
  }
  const int64_t makers =
      std::clamp<int64_t>(divide_up(images, PipeBlock<K>::kMakers), 1, multiprocessors(p) - scans);
  launch(kda_pipe<Element, K, GateElement, kGate>, "kda_pipe", scans + makers, PipeBlock<K>::kThreads,
         PipeBlock<K>::kBytes, LaunchKind::kTogether, stream, args, pipe);
}

template <class Element, int K, class GateElement, KdaGate kGate>
void run_gate(const KdaCudaParams& p, const KdaArgs& args, cudaStream_t stream) {
  const int64_t pairs = static_cast<int64_t>(p.sequences) * p.value_heads;
  const int64_t images = chunk_bound<kChunk>(p) * p.value_heads;
  if (fused(p)) {
    if (groups(p) == 1) {
      launch(kda_fused<Element, K, GateElement, kGate, 1>, "kda_fused", pairs * (p.value_dim / 64), 512,
             ScanShared<K, 64, 12>::kBytes, LaunchKind::kPlain, stream, args);
    } else {
      launch(kda_fused<Element, K, GateElement, kGate, 2>, "kda_fused", pairs, 512,
             ScanShared<K, 128, 12>::kBytes, LaunchKind::kPlain, stream, args);
    }
    return;
  }
  if (piped(p)) return run_pipe<Element, K, GateElement, kGate>(p, args, stream);
  launch(kda_images<Element, K, GateElement, kGate>, "kda_images", divide_up(images, kImageWarps),
         32 * kImageWarps, kImageWarps * KdaImage<K>::kPlace, LaunchKind::kPlain, stream, args, images);
  run_scans<Element, K>(p, args, stream);
}

template <class Element, int K, class GateElement>
void run_gate_type(const KdaCudaParams& p, const KdaArgs& args, cudaStream_t stream) {
  switch (p.gate_kind) {
    case KdaGate::kSoftplus:
      return run_gate<Element, K, GateElement, KdaGate::kSoftplus>(p, args, stream);
    case KdaGate::kBounded:
      return run_gate<Element, K, GateElement, KdaGate::kBounded>(p, args, stream);
    case KdaGate::kNone:
      return run_gate<Element, K, GateElement, KdaGate::kNone>(p, args, stream);
  }
}

template <class Element>
void run(const KdaCudaParams& p, const KdaArgs& args, cudaStream_t stream) {
  const bool wide = p.gate_type == CudaType::kF32;
  if (p.key_dim == 128) {
    wide ? run_gate_type<Element, 128, float>(p, args, stream)
         : run_gate_type<Element, 128, Element>(p, args, stream);
  } else {
    wide ? run_gate_type<Element, 64, float>(p, args, stream)
         : run_gate_type<Element, 64, Element>(p, args, stream);
  }
}

}  // namespace
}  // namespace cuda

KdaCudaPlan kda_chunk_cuda_plan(const KdaCudaParams& params) {
  validate(params);
  if (cuda::fused(params)) return KdaCudaPlan::kFused;
  if (cuda::piped(params)) return KdaCudaPlan::kPipe;
  return cuda::segments(params) > 1 ? KdaCudaPlan::kSegments : KdaCudaPlan::kTwoKernels;
}

size_t kda_chunk_cuda_workspace(const KdaCudaParams& params) {
  validate(params);
  return cuda::Workspace(params).bytes;
}

void kda_chunk_cuda(const KdaCudaParams& p, void* workspace, size_t workspace_bytes, CUstream_st* stream) {
  validate(p);
  const cuda::Workspace place(p);
  check(workspace_bytes >= place.bytes, "kda_chunk_cuda: workspace of {} bytes, expected {}", workspace_bytes,
        place.bytes);
  check(reinterpret_cast<uintptr_t>(workspace) % 256 == 0,
        "kda_chunk_cuda: the workspace must be aligned to 256 bytes");
  if (p.sequences == 0) return;
  uint8_t* base = static_cast<uint8_t*>(workspace);
  const cuda::KdaLayout layout = cuda::make_layout<cuda::kChunk>(
      p, reinterpret_cast<int32_t*>(base + place.offsets), reinterpret_cast<int64_t*>(base + place.starts),
      reinterpret_cast<int64_t*>(base + place.chunks), stream);
  const cuda::KdaArgs args{.layout = layout,
                           .q = p.q.data,
                           .k = p.k.data,
                           .v = p.v.data,
                           .gate = p.gate.data,
                           .beta = p.beta.data,
                           .out = p.out,
                           .q_stride = p.q.stride,
                           .k_stride = p.k.stride,
                           .v_stride = p.v.stride,
                           .gate_stride = p.gate.stride,
                           .beta_stride = p.beta.stride,
                           .out_stride = p.out_stride,
                           .a_log = p.a_log,
                           .dt_bias = p.gate_kind == KdaGate::kNone ? nullptr : p.dt_bias,
                           .heads = p.heads,
                           .value_heads = p.value_heads,
                           .value_dim = p.value_dim,
                           .beta_type = p.beta_type,
                           .l2norm = p.l2norm,
                           .beta_is_logit = p.beta_is_logit,
                           .beta_scale = p.beta_scale,
                           .lower_bound = p.lower_bound,
                           .scale = p.scale,
                           .images = base + place.images,
                           .segments = cuda::segments(p),
                           .summaries = reinterpret_cast<float*>(base + place.summaries),
                           .starts = reinterpret_cast<float*>(base + place.segment_starts),
                           .initial = p.initial,
                           .final = p.final,
                           .chunk_states = p.chunk_states,
                           .chunk_state_type = p.chunk_state_type};
  if (p.type == CudaType::kBf16) {
    cuda::run<__nv_bfloat16>(p, args, stream);
  } else {
    cuda::run<__half>(p, args, stream);
  }
}

}  // namespace kilin
