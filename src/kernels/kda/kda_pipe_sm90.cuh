// SPDX-License-Identifier: Apache-2.0
// Images and scan at the same time in one launch, for few sequences and heads: some blocks scan
// (kda_scan_sm90.cuh has the formulas), the others make images, in the order of time over all sequences and
// heads, and hand them over through the L2: a sequence and head has places for kPipeRing images, which are
// used again and again and so hardly ever reach device memory.
//
// Makers wait until a place is free, scans until an image is there. That cannot hang, because the launch is
// cooperative: all blocks are on the chip before one of them begins, or the launch fails, whatever else runs
// on the device. Of the images that warps have drawn and not stored let x be the earliest. All images before
// x are there, so the scan of x's head comes to the chunk of x and has reported all but the last kStages +
// kPipeReport chunks before it; kPipeRing is more than that, so the place of x is free.
//
// The result does not depend on who makes which image and when: the bits are those of images made beforehand.
#pragma once
#include "kernels/kda/kda_scan_sm90.cuh"

namespace kilin::cuda {

constexpr int kPipeRows = 64;   // of S that a block scans
constexpr int kPipeParts = 2;   // blocks that scan one state, at most
constexpr int kPipeRing = 32;   // places for images of a sequence and head
constexpr int kPipeReport = 8;  // chunks between two reports of a scan's progress
constexpr int kPipeNap = 125;   // ns that a maker sleeps for each chunk that its scan is behind
// Words between the progress of two sequences and heads: a line of 128 bytes each. All makers ask for these
// words again and again; where those of all heads shared two lines, the questions queued at one place of the
// L2, and reports and images behind them (docs/notes/20261126-cuda-pipe-wgmma.md).
constexpr int kPipeLine = 32;

struct KdaPipe {
  uint32_t* drawn;       // how many images makers have taken on
  uint32_t* progress;    // [N][HV][kPipeLine], of which kPipeParts: chunks whose images a scan has read
  uint32_t* ready;       // [HV][words] a bit for each chunk whose image has been there; see ready_words
  const int64_t* order;  // [chunks] sequence << 32 | chunk of it, by time; null: sequences of one length
  int64_t words;         // per head
  int scans;             // blocks that scan
  uint32_t images;       // with order null
};

// A block that scans is laid out as one of kda_scan; one that makes images has a place for each warp.
template <int K>
struct PipeBlock {
  static constexpr int kMakers = 16;
  static constexpr int kThreads = kMakers * 32;
  using Scan = ScanBlock<K, kPipeRows, false>;
  static constexpr int kBytes =
      Scan::kBytes > kMakers* KdaImage<K>::kPlace ? Scan::kBytes : kMakers* KdaImage<K>::kPlace;
  static_assert(kPipeRing > Scan::Stages::kStages + kPipeReport && kPipeParts <= kPipeLine);
};

// The image of a chunk and value head that is to be made.
struct PipeImage {
  uint32_t number;  // images in front of it; the rest is there only if this is less than all images
  int head;
  int64_t pair;   // n HV + head
  int64_t first;  // token
  int length;
  uint32_t chunk;   // of its sequence
  uint32_t* ready;  // the word with its bit, chunk % 32
};

// Words of a sequence and head; first_chunk: the first of sequence n among all.
__device__ __forceinline__ uint32_t* ready_words(const KdaPipe& pipe, int head, int n, int64_t first_chunk) {
  return pipe.ready + head * pipe.words + (first_chunk >> 5) + n;
}

__device__ __forceinline__ PipeImage pipe_image(const KdaArgs& args, const KdaPipe& pipe, uint32_t number,
                                                uint32_t images) {
  PipeImage image;
  image.number = number;
  if (number >= images) return image;
  const uint32_t heads = args.value_heads, position = number / heads;
  image.head = static_cast<int>(number - position * heads);
  uint32_t n;
  int64_t first_chunk, end;
  if (pipe.order == nullptr) {
    const uint32_t sequences = args.layout.sequences;
    image.chunk = position / sequences;
    n = position - image.chunk * sequences;
    first_chunk = static_cast<int64_t>(n) * args.layout.chunks_per_sequence;
    image.first = n * args.layout.length;
    end = image.first + args.layout.length;
  } else {
    const int64_t entry = pipe.order[position];
    n = static_cast<uint32_t>(entry >> 32);
    image.chunk = static_cast<uint32_t>(entry);
    first_chunk = args.layout.offsets[n];
    image.first = args.layout.starts[n];
    end = args.layout.starts[n + 1];
  }
  image.pair = static_cast<int64_t>(n) * heads + image.head;
  image.first += static_cast<int64_t>(image.chunk) * kChunk;
  image.length = static_cast<int>(min(end - image.first, static_cast<int64_t>(kChunk)));
  image.ready = ready_words(pipe, image.head, static_cast<int>(n), first_chunk) + (image.chunk >> 5);
  return image;
}

// The number of the next image, in lane 0.
__device__ __forceinline__ uint32_t draw(const KdaPipe& pipe, int lane) {
  return lane == 0 ? atomicAdd(pipe.drawn, 1u) : 0;
}

// A warp makes images in `place` until none is left.
template <class Element, int K, class GateElement, KdaGate kGate>
__device__ __forceinline__ void pipe_make(const KdaArgs& args, const KdaPipe& pipe, uint8_t* place) {
  using Image = KdaImage<K>;
  const int lane = threadIdx.x & 31, parts = args.value_dim / kPipeRows;
  const uint32_t images =
      pipe.order == nullptr ? pipe.images : args.layout.offsets[args.layout.sequences] * args.value_heads;
  PipeImage own = pipe_image(args, pipe, __shfl_sync(~0u, draw(pipe, lane), 0), images);
  while (own.number < images) {
    const uint32_t next = draw(pipe, lane);
    ImageWarp<Element, K, GateElement, kGate, 1> image(args, own.head);
    image.load(place, own.first, own.length);
    copy_commit();
    const PipeImage following = pipe_image(args, pipe, __shfl_sync(~0u, next, 0), images);
    if (following.number < images)
      prefetch_rows<Element, K, GateElement>(
          args, following.head, following.head / (args.value_heads / args.heads),
          static_cast<int>(following.first), static_cast<int>(following.first) + following.length, 0, 0);
    const uint32_t* progress = pipe.progress + own.pair * kPipeLine + min(lane, parts - 1);
    copy_wait<0>();
    __syncwarp();
    uint32_t seen = load_acquire(progress);
    image.make();
    while (!__all_sync(~0u, own.chunk < seen + kPipeRing)) {
      const uint32_t behind = own.chunk < seen + kPipeRing ? 1 : own.chunk - seen - kPipeRing + 1;
      __nanosleep(min(behind, 64u) * kPipeNap);
      seen = load_acquire(progress);
    }
    async_proxy_fence_all();
    __syncwarp();
    // Announced before the next is begun: makers have time to spare, a place in the ring has not.
    if (lane == 0) {
      bulk_store(args.images + (own.pair * kPipeRing + own.chunk % kPipeRing) * Image::kBytes, image.place,
                 Image::kBytes);
      bulk_commit();
      bulk_wait();
      set_bits_release(own.ready, 1u << (own.chunk & 31));
    }
    __syncwarp();
    own = following;
  }
}

// The warp that loads the images a block scans, and reports which have been read: those that scan are done
// with their stages.
template <int K>
__device__ __forceinline__ void pipe_load_images(const KdaArgs& args, const KdaPipe& pipe,
                                                 const ScanWork& work, uint32_t base) {
  using Shared = typename PipeBlock<K>::Scan::Stages;
  using Image = KdaImage<K>;
  const int lane = threadIdx.x & 31;
  const uint8_t* images = args.images + work.pair(args) * kPipeRing * Image::kBytes;
  uint32_t* progress = pipe.progress + work.pair(args) * kPipeLine + work.column / kPipeRows;
  const uint32_t* words = ready_words(pipe, work.head, work.number, work.sequence.chunk);
  int ready = 0, stage = 0;
  uint32_t parity = 1;  // of the stage's having been read
  for (int c = 0; c < work.sequence.chunks; ++c) {
    const uint32_t full = base + Shared::kBarriers + stage * 16;
    if (c >= Shared::kStages) {
      barrier_wait(full + 8, parity);
      if (lane == 0 && c % kPipeReport == 0) store_release(progress, c - Shared::kStages + 1);
    }
    while (ready <= c) {
      const uint32_t missing = ~load_acquire(words + (c >> 5));
      ready = (c & ~31) + (missing == 0 ? 32 : __ffs(static_cast<int>(missing)) - 1);
      async_proxy_fence_global();
    }
    if (lane == 0) {
      barrier_arrive_expect(full, Image::kBytes);
      bulk_load(base + stage * Shared::kStage, images + c % kPipeRing * Image::kBytes, Image::kBytes, full);
    }
    if (++stage == Shared::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
}

// The warp that loads the values.
template <class Element, int K>
__device__ __forceinline__ void pipe_load_values(const KdaArgs& args, const ScanWork& work, uint32_t base) {
  using Shared = typename PipeBlock<K>::Scan::Stages;
  int stage = 0;
  uint32_t parity = 1;
  for (int c = 0; c < work.sequence.chunks; ++c) {
    const uint32_t full = base + Shared::kBarriers + stage * 16;
    if (c >= Shared::kStages) barrier_wait(full + 8, parity);
    load_values<Element, kPipeRows>(args, work, c, base + stage * Shared::kStage + Shared::kValues);
    barrier_arrive_copies(full);
    if (++stage == Shared::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  copy_wait<0>();
}

template <class Element, int K, class GateElement, KdaGate kGate>
__global__ void __launch_bounds__(PipeBlock<K>::kThreads, 1)
    kda_pipe(const __grid_constant__ KdaArgs args, const __grid_constant__ KdaPipe pipe) {
  using Scan = typename PipeBlock<K>::Scan;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);  // known to be the same in the whole warp
  if (static_cast<int>(blockIdx.x) >= pipe.scans) {
    pipe_make<Element, K, GateElement, kGate>(args, pipe, shared + warp * KdaImage<K>::kPlace);
    return;
  }
  init_stages<Scan::Stages::kStages>(base + Scan::Stages::kBarriers, 33, 32 * Scan::kWarps);
  const ScanWork work = scan_work<kPipeRows, true>(args, blockIdx.x, args.value_dim);
  static_assert(Scan::kWarps == 4);  // a warpgroup
  if (warp < Scan::kWarps) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    ScanWarp<Element, K, Scan, false>(args, work, warp, base).run(base);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (warp == Scan::kWarps) pipe_load_images<K>(args, pipe, work, base);
    if (warp == Scan::kWarps + 1) pipe_load_values<Element, K>(args, work, base);
  }
}

// The order in which makers draw the chunks of sequences of different lengths: by time. A thread per chunk.
inline __global__ void kda_pipe_order(const __grid_constant__ KdaLayout layout, int64_t* order) {
  const int64_t chunk = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (chunk >= layout.offsets[layout.sequences]) return;
  int low = 0, high = layout.sequences;  // offsets[low] <= chunk < offsets[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (layout.offsets[middle] <= chunk ? low : high) = middle;
  }
  const int own = static_cast<int>(chunk - layout.offsets[low]);
  int64_t before = 0;
  for (int n = 0; n < layout.sequences; ++n) {
    const int chunks = layout.offsets[n + 1] - layout.offsets[n];
    before += min(chunks, own) + (n < low && chunks > own ? 1 : 0);
  }
  order[before] = (static_cast<int64_t>(low) << 32) | own;
}

}  // namespace kilin::cuda
