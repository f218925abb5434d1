// SPDX-License-Identifier: Apache-2.0
// What the two scans over chunks share: the work of a block, its stages in shared memory, and the state in
// registers.
#pragma once
#include "kernels/kda/kda_image_sm90.cuh"

namespace kilin::cuda {

// What a block works on: a segment of a sequence (all of it, where args.segments is 1), some rows of S of a
// head.
struct ScanWork {
  KdaSequence sequence;  // the segment
  int number;            // of the sequence
  int head;              // value head
  int segment;
  int column;           // first row of S
  bool ends;            // with the segment the sequence ends
  int64_t state_chunk;  // chunks of kKdaCudaChunk tokens before the segment

  __device__ __forceinline__ int64_t pair(const KdaArgs& args) const {
    return static_cast<int64_t>(number) * args.value_heads + head;
  }
  template <int K>
  __device__ __forceinline__ float* summary(const KdaArgs& args) const {
    return args.summaries + (pair(args) * (args.segments - 1) + segment) * (args.value_dim + K) * K;
  }
  template <int K>
  __device__ __forceinline__ float* start(const KdaArgs& args, int of_segment) const {
    return args.starts + (pair(args) * args.segments + of_segment) * args.value_dim * K;
  }
};

// The index-th part of kRows of `rows` rows of the first `segments` segments of all sequences; with kWhole,
// sequences are not cut.
template <int kRows, bool kWhole = false>
__device__ __forceinline__ ScanWork scan_work(const KdaArgs& args, int index, int rows, int segments = 1) {
  const int parts = rows / kRows;
  ScanWork work;
  work.column = index % parts * kRows;
  index /= parts;
  work.segment = kWhole ? 0 : index % segments;
  if (!kWhole) index /= segments;
  work.head = index % args.value_heads;
  work.number = index / args.value_heads;
  work.sequence = kda_sequence(args.layout, work.number);
  work.state_chunk = 0;
  if (args.chunk_states != nullptr) {
    if (args.layout.offsets == nullptr) {
      work.state_chunk = work.number * ((args.layout.length + kKdaCudaChunk - 1) / kKdaCudaChunk);
    } else {
      for (int n = 0; n < work.number; ++n)
        work.state_chunk +=
            (args.layout.starts[n + 1] - args.layout.starts[n] + kKdaCudaChunk - 1) / kKdaCudaChunk;
    }
  }
  work.ends = true;
  if (kWhole) return work;
  // Segments begin where chunk states are kept.
  constexpr int kEvery = kKdaCudaChunk / kChunk;
  const int chunks = work.sequence.chunks,
            size = (chunks + args.segments * kEvery - 1) / (args.segments * kEvery) * kEvery;
  const int begin = min(work.segment * size, chunks), end = min(begin + size, chunks);
  work.ends = end == chunks && (begin < end || work.segment == 0);
  work.state_chunk += begin / kEvery;
  work.sequence.first += static_cast<int64_t>(begin) * kChunk;
  work.sequence.length = min(work.sequence.length - static_cast<int64_t>(begin) * kChunk,
                             static_cast<int64_t>(end - begin) * kChunk);
  work.sequence.chunk += begin;
  work.sequence.chunks = end - begin;
  return work;
}

// Stages of an image and of v, which makes room for out: [kRows / 64, at least 1][16 tokens][64], in the
// 128-byte swizzle (64 columns are kept for fewer rows too).
template <int K, int kRows, int kWanted>
struct ScanShared {
  static constexpr int kValues = KdaImage<K>::kPlace;
  static constexpr int kStage = kValues + (kRows + 63) / 64 * 2048;
  static constexpr int kStages = kWanted;
  static constexpr int kBarriers = kStages * kStage;  // full, empty of each stage
  static constexpr int kBytes = kBarriers + kStages * 16;
  static_assert(kBytes <= 232448);
};

// Begins the copies of v of a chunk (cp.async, not committed), by one warp.
template <class Element, int kRows>
__device__ __forceinline__ void load_values(const KdaArgs& args, const ScanWork& work, int c, uint32_t to) {
  constexpr int kPieces = kRows / 8, kAtOnce = 32 / kPieces;
  const int lane = threadIdx.x & 31, piece = lane % kPieces, row = lane / kPieces;
  const int token = c * kChunk, left = static_cast<int>(work.sequence.length) - token;
  const Element* v =
      row_address(static_cast<const Element*>(args.v), static_cast<int>(work.sequence.first) + token + row,
                  args.v_stride, work.head * args.value_dim + work.column + piece * 8);
  const auto copy = [&](int i, bool valid) {
    copy_16_async(to + swizzled<16>(i * kAtOnce + row, piece),
                  row_address(v, valid ? i * kAtOnce : 0, args.v_stride), valid);
  };
  if (left >= kChunk) {
#pragma unroll
    for (int i = 0; i < kChunk / kAtOnce; ++i) copy(i, true);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk / kAtOnce; ++i) copy(i, i * kAtOnce + row < left);
  }
}

template <int kStages>
__device__ __forceinline__ void init_stages(uint32_t barriers, uint32_t producers, uint32_t consumers) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(barriers + 16 * i, producers);
      barrier_init(barriers + 16 * i + 8, consumers);
    }
    barrier_init_fence();
  }
  __syncthreads();
}

// A kernel argument, or what follows from one, or (with `lane` its own lane) a lane's constant, that the
// assembler would otherwise read from constant memory again for every chunk, and wait for.
__device__ __forceinline__ uint32_t kept_in_register(uint32_t x, int lane = 0) {
  return __shfl_sync(~0u, x, lane);
}
__device__ __forceinline__ int64_t kept_in_register(int64_t x) { return __shfl_sync(~0u, x, 0); }

// Address of this warp's 16 columns of v (`part` of the 4 in a tile of 64), for ldmatrix and stmatrix
// transposed.
__device__ __forceinline__ uint32_t values_block(uint32_t values, int part) {
  const int lane = threadIdx.x & 31;
  return values + swizzled<16>((lane & 7) + 8 * (lane >> 4), 2 * part + ((lane >> 3) & 1));
}

// Where a lane stores what a warp computes of out: 16 bytes of token lane / 2 of a chunk, from `lag` chunks
// before the first.
template <class Element>
struct OutRows {
  Element* out;
  int64_t step;         // elements from one chunk to the next
  int64_t tokens_left;  // from the lane's token of the chunk to the end of the sequence

  __device__ __forceinline__ OutRows(const KdaArgs& args, const ScanWork& work, int row, int lag = 0)
      : step(kChunk * args.out_stride) {
    const int64_t token = static_cast<int>((threadIdx.x & 31) >> 1) - lag * kChunk;
    tokens_left = work.sequence.length - token;
    out = static_cast<Element*>(args.out) + (work.sequence.first + token) * args.out_stride +
          work.head * args.value_dim + work.column + row + (threadIdx.x & 1) * 8;
  }

  // Stores, if there is such a token, and moves on to the next chunk.
  __device__ __forceinline__ void put(const uint4& x, bool there) {
    if (there && tokens_left > 0) {
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(out), "r"(x.x), "r"(x.y), "r"(x.z),
                   "r"(x.w)
                   : "memory");
    }
    out += step;
    tokens_left -= kChunk;
  }

  // out^T of 16 rows x 16 tokens, through this warp's columns of the place of v.
  __device__ __forceinline__ void put_transposed(const float (&x)[8], uint32_t values, int part) {
    const int lane = threadIdx.x & 31;
    stmatrix_trans(values_block(values, part), pack<Element>(x[0], x[1]), pack<Element>(x[2], x[3]),
                   pack<Element>(x[4], x[5]), pack<Element>(x[6], x[7]));
    __syncwarp();
    put(load_shared_16(values + swizzled<16>(lane >> 1, 2 * part + (lane & 1))), true);
  }
};

// 16 rows of S of one warp in accumulator layout: s[4 n + 2 half + e] = S[row g + 8 half][8 n + 2t + e].
template <class Element, int K>
struct StateRows {
  const KdaArgs& args;
  const ScanWork& work;
  int lane, g, t;
  int column;     // first row of S
  uint32_t keep;  // whether states before chunks are kept
  float s[K / 2];

  __device__ __forceinline__ StateRows(const KdaArgs& arguments, const ScanWork& scan, int row)
      : args(arguments),
        work(scan),
        lane(threadIdx.x & 31),
        g(lane >> 2),
        t(lane & 3),
        column(scan.column + row) {
    keep = arguments.chunk_states != nullptr ? 1u : 0u;
  }

  // Place of row g + 8 half, columns 8 n + 2t of the state of a slot.
  __device__ __forceinline__ int64_t index(int64_t slot, int64_t stride, int half, int n) const {
    return slot * stride + (static_cast<int64_t>(work.head) * args.value_dim + column + g + 8 * half) * K +
           8 * n + 2 * t;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < K / 2; ++i) s[i] = 0.0f;
  }

  // Rows of the identity, from `row` on.
  __device__ __forceinline__ void load_identity(int row) {
#pragma unroll
    for (int i = 0; i < K / 2; ++i) {
      const int own = row + g + 8 * ((i >> 1) & 1), channel = 8 * (i >> 2) + 2 * t + (i & 1);
      s[i] = own == channel ? 1.0f : 0.0f;
    }
  }

  // Rows of a matrix [..][K], from `row` on.
  __device__ __forceinline__ void load_rows(const float* from, int row) {
#pragma unroll
    for (int i = 0; i < K / 4; ++i) {
      const float2 pair =
          *reinterpret_cast<const float2*>(from + (row + g + 8 * (i & 1)) * K + 8 * (i >> 1) + 2 * t);
      s[2 * i] = pair.x;
      s[2 * i + 1] = pair.y;
    }
  }
  __device__ __forceinline__ void store_rows(float* to, int row) const {
#pragma unroll
    for (int i = 0; i < K / 4; ++i)
      *reinterpret_cast<float2*>(to + (row + g + 8 * (i & 1)) * K + 8 * (i >> 1) + 2 * t) = {s[2 * i],
                                                                                             s[2 * i + 1]};
  }

  __device__ __forceinline__ void load() {
    clear();
    if (args.initial.data == nullptr) return;
    const int64_t slot = args.initial.slots != nullptr ? args.initial.slots[work.number] : work.number;
    if (slot < 0) return;
#pragma unroll
    for (int i = 0; i < K / 4; ++i) {
      const int64_t at = index(slot, args.initial.slot_stride, i & 1, i >> 1);
      float2 pair;
      if (args.initial.type == CudaType::kF32) {
        pair = *reinterpret_cast<const float2*>(static_cast<const float*>(args.initial.data) + at);
      } else {
        pair = unpack<__nv_bfloat16>(
            *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(args.initial.data) + at));
      }
      s[2 * i] = pair.x;
      s[2 * i + 1] = pair.y;
    }
  }

  __device__ __forceinline__ void store(void* to, CudaType type, int64_t slot, int64_t stride) const {
#pragma unroll
    for (int i = 0; i < K / 4; ++i) {
      const int64_t at = index(slot, stride, i & 1, i >> 1);
      if (type == CudaType::kF32) {
        *reinterpret_cast<float2*>(static_cast<float*>(to) + at) = {s[2 * i], s[2 * i + 1]};
      } else {
        *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(to) + at) =
            pack<__nv_bfloat16>(s[2 * i], s[2 * i + 1]);
      }
    }
  }

  __device__ __forceinline__ void store_final() const {
    if (args.final.data == nullptr || !work.ends) return;
    const int64_t slot = args.final.slots != nullptr ? args.final.slots[work.number] : work.number;
    if (slot >= 0) store(args.final.data, args.final.type, slot, args.final.slot_stride);
  }

  __device__ __forceinline__ void store_chunk_state(int c) const {
    constexpr int kEvery = kKdaCudaChunk / kChunk;
    if (keep != 0 && c % kEvery == 0) {
      store(args.chunk_states, args.chunk_state_type, work.state_chunk + c / kEvery,
            static_cast<int64_t>(args.value_heads) * args.value_dim * K);
    }
  }

  // S rounded, as A operands of the steps of 16 channels.
  __device__ __forceinline__ void round(uint32_t (&rounded)[K / 16][4]) const {
#pragma unroll
    for (int i = 0; i < K / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) rounded[i][j] = pack<Element>(s[8 * i + 2 * j], s[8 * i + 2 * j + 1]);
    }
  }

  // By the factors of step i of 16 channels.
  __device__ __forceinline__ void decay(int i, const float4& f) {
    s[8 * i] *= f.x;
    s[8 * i + 1] *= f.y;
    s[8 * i + 2] *= f.x;
    s[8 * i + 3] *= f.y;
    s[8 * i + 4] *= f.z;
    s[8 * i + 5] *= f.w;
    s[8 * i + 6] *= f.z;
    s[8 * i + 7] *= f.w;
  }
};

}  // namespace kilin::cuda
