// SPDX-License-Identifier: Apache-2.0
#include "quant/formats.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "quant/quantize_blocks.h"

namespace kilin::quant {

namespace {

template <class Block, class Expand>
void each_block(const void* data, int64_t n, float* out, Expand expand) {
  constexpr Dtype kDtype = Expand::kDtype;
  constexpr int64_t kBlock = dtype_block(kDtype);
  static_assert(sizeof(Block) == dtype_traits(kDtype).block_bytes);
  KILIN_ASSERT(n % kBlock == 0);
  const auto* bytes = static_cast<const std::byte*>(data);
  for (int64_t i = 0; i < n; i += kBlock, bytes += sizeof(Block)) {
    Block block;
    std::memcpy(&block, bytes, sizeof(Block));
    expand(block, out + i);
  }
}

struct ExpandF16 {
  static constexpr Dtype kDtype = Dtype::kF16;
  void operator()(const Float16& b, float* out) const { *out = to_float(b); }
};

struct ExpandBF16 {
  static constexpr Dtype kDtype = Dtype::kBF16;
  void operator()(const BFloat16& b, float* out) const { *out = to_float(b); }
};

struct ExpandQ8 {
  static constexpr Dtype kDtype = Dtype::kQ8_0;
  void operator()(const BlockQ8_0& b, float* out) const {
    const float d = to_float(Float16{b.d});
    for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(b.q[i]);
  }
};

// n_i - 16
int level(const BlockQ5_0& b, int i) {
  const int low = i < 16 ? b.q[i] & 15 : b.q[i - 16] >> 4;
  const int high = b.high[i / 8] >> (i % 8) & 1;
  return (low | high << 4) - 16;
}

struct ExpandQ5 {
  static constexpr Dtype kDtype = Dtype::kQ5_0;
  void operator()(const BlockQ5_0& b, float* out) const {
    const float d = to_float(Float16{b.d});
    for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(level(b, i));
  }
};

struct ExpandQ4 {
  static constexpr Dtype kDtype = Dtype::kQ4_0;
  void operator()(const BlockQ4_0& b, float* out) const {
    const float d = to_float(Float16{b.d});
    for (int j = 0; j < 16; ++j) {
      out[j] = d * static_cast<float>((b.q[j] & 15) - 8);
      out[j + 16] = d * static_cast<float>((b.q[j] >> 4) - 8);
    }
  }
};

struct ExpandQ4K {
  static constexpr Dtype kDtype = Dtype::kQ4_K;
  void operator()(const BlockQ4_K& b, float* out) const {
    const float d = to_float(Float16{b.d});
    const float dmin = to_float(Float16{b.dmin});
    for (int p = 0; p < 8; ++p) {
      const ScaleMin s = scale_min(b.scales, p);
      const float scale = d * static_cast<float>(s.scale);
      const float minimum = dmin * static_cast<float>(s.min);
      const uint8_t* q = b.q + 32 * (p / 2);
      const int shift = p % 2 * 4;
      for (int i = 0; i < 32; ++i) out[32 * p + i] = scale * static_cast<float>(q[i] >> shift & 15) - minimum;
    }
  }
};

struct ExpandQ6K {
  static constexpr Dtype kDtype = Dtype::kQ6_K;
  void operator()(const BlockQ6_K& b, float* out) const {
    const float d = to_float(Float16{b.d});
    for (int run = 0; run < 8; ++run) {  // runs of 32 elements: quarter t of half h
      const int half = run / 4;
      const int t = run % 4;
      const uint8_t* low = b.low + 64 * half + 32 * (t % 2);
      const uint8_t* high = b.high + 32 * half;
      for (int i = 0; i < 32; ++i) {
        const int n = (low[i] >> (t / 2 * 4) & 15) | (high[i] >> (2 * t) & 3) << 4;
        const int8_t part = b.scales[2 * run + i / 16];
        const float scale = d * static_cast<float>(part);
        out[32 * run + i] = scale * static_cast<float>(n - 32);
      }
    }
  }
};

// The index of the first element that is not finite, or n.
int64_t first_not_finite(const float* x, int64_t n) {
  uint32_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu;
    found |= magnitude >= 0x7f800000u ? 1u : 0u;
  }
  if (found == 0) return n;
  return std::find_if(x, x + n, [](float v) { return !std::isfinite(v); }) - x;
}

template <class Block, class Make>
void make_blocks(const float* x, int64_t n, int64_t block, void* out, Make make) {
  KILIN_ASSERT(n % block == 0);
  auto* bytes = static_cast<std::byte*>(out);
  for (int64_t i = 0; i < n; i += block, bytes += sizeof(Block)) {
    const Block made = make(x + i);
    std::memcpy(bytes, &made, sizeof(Block));
  }
}

// What storing a scale of `units` steps of d in float16 can shift the product by: half a unit of its last
// place, of relative size 2^-11, or half the least subnormal.
double scale_rounding(double d, double units) { return units * std::max(d * 0x1p-11, 0x1p-25); }

double q4_0_bound(const float* x) {
  double highest = 0;
  double lowest = 0;
  for (int i = 0; i < 32; ++i) {
    highest = std::max<double>(highest, x[i]);
    lowest = std::min<double>(lowest, x[i]);
  }
  const double d = std::max(highest, -lowest) / 8;
  const double opposite = std::min(highest, -lowest);  // its levels end at 7 d
  return std::max(d / 2, opposite - 7 * d) + scale_rounding(d, 8);
}

// Of one part: how far its line may miss an element inside its range, or clip the ends; and the largest scale
// and minimum that the line can have.
struct LineBound {
  double error, scale, minimum;
};

// The search only takes a line of a smaller weighted error E than that of the plain step s0 = range / 15, for
// which E <= sum w s0^2 / 4. So the line misses the highest and the lowest element, of weight w, by at most
// e = s0 / 2 sqrt(sum w / w) <= 4 s0 (w >= rms, sum w <= 64 rms); an element between them by half a step or
// by what its end misses. The levels of the two ends lie at least 7 apart (steps of (highest - m) / 14 to
// / 16 with m at most 4 s0 from the lowest), and that of the lowest is at most 7.
LineBound line_bound(const float* x) {
  double low = x[0];
  double high = x[0];
  double squares = 0;
  double sum = 0;
  for (int i = 0; i < 32; ++i) {
    low = std::min<double>(low, x[i]);
    high = std::max<double>(high, x[i]);
    squares += static_cast<double>(x[i]) * x[i];
    sum += std::abs(static_cast<double>(x[i]));
  }
  const double rms = std::sqrt(squares / 32);
  const double sum_w = 32 * rms + sum;
  if (sum_w == 0) return {0, 0, 0};
  const double miss_low = std::sqrt(sum_w / (rms + std::abs(low)));
  const double miss_high = std::sqrt(sum_w / (rms + std::abs(high)));
  low = std::min(low, 0.0);  // the line starts at or below 0
  const double half_step = (high - low) / 30;
  const double scale = (high - low + (miss_low + miss_high) * half_step) / 7;
  return {std::max({scale / 2, half_step * miss_low, half_step * miss_high}), scale,
          -low + half_step * miss_low + 7 * scale};
}

double q4_k_bound(const float* x) {
  LineBound bounds = {0, 0, 0};
  for (int p = 0; p < 8; ++p) {
    const LineBound b = line_bound(x + 32 * p);
    bounds = {std::max(bounds.error, b.error), std::max(bounds.scale, b.scale),
              std::max(bounds.minimum, b.minimum)};
  }
  // Scales and minima are rounded to steps of the largest / 63, and those to float16.
  const double scale = bounds.scale / 126 + scale_rounding(bounds.scale / 63, 63);
  const double minimum = bounds.minimum / 126 + scale_rounding(bounds.minimum / 63, 63);
  return bounds.error + 15 * scale + minimum;
}

}  // namespace

bool readable(Dtype dtype) { return dtype == Dtype::kQ5_0 || dtype == Dtype::kQ6_K || writable(dtype); }

bool writable(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
    case Dtype::kF16:
    case Dtype::kBF16:
    case Dtype::kQ8_0:
    case Dtype::kQ4_0:
    case Dtype::kQ4_K:
      return true;
    default:
      return false;
  }
}

void dequantize(Dtype dtype, const void* data, int64_t n, float* out) {
  switch (dtype) {
    case Dtype::kF32:
      std::memcpy(out, data, static_cast<size_t>(n) * sizeof(float));
      return;
    case Dtype::kF16:
      return each_block<Float16>(data, n, out, ExpandF16{});
    case Dtype::kBF16:
      return each_block<BFloat16>(data, n, out, ExpandBF16{});
    case Dtype::kQ8_0:
      return each_block<BlockQ8_0>(data, n, out, ExpandQ8{});
    case Dtype::kQ5_0:
      return each_block<BlockQ5_0>(data, n, out, ExpandQ5{});
    case Dtype::kQ4_0:
      return each_block<BlockQ4_0>(data, n, out, ExpandQ4{});
    case Dtype::kQ4_K:
      return each_block<BlockQ4_K>(data, n, out, ExpandQ4K{});
    case Dtype::kQ6_K:
      return each_block<BlockQ6_K>(data, n, out, ExpandQ6K{});
    default:
      fail("weights of type {} cannot be read", dtype_name(dtype));
  }
}

void q5_0_to_q8_0(const void* data, int64_t n, void* out) {
  KILIN_ASSERT(n % 32 == 0);
  const auto* from = static_cast<const std::byte*>(data);
  auto* to = static_cast<std::byte*>(out);
  for (int64_t i = 0; i < n; i += 32, from += sizeof(BlockQ5_0), to += sizeof(BlockQ8_0)) {
    BlockQ5_0 block;
    std::memcpy(&block, from, sizeof(block));
    BlockQ8_0 made{block.d, {}};
    for (int j = 0; j < 32; ++j) made.q[j] = static_cast<int8_t>(level(block, j));
    std::memcpy(to, &made, sizeof(made));
  }
}

void quantize(Dtype dtype, const float* x, int64_t n, void* out) {
  if (const int64_t bad = first_not_finite(x, n); bad < n)
    fail("element {} is {}: not a finite number", bad, x[bad]);
  switch (dtype) {
    case Dtype::kF32:
      std::memcpy(out, x, static_cast<size_t>(n) * sizeof(float));
      return;
    case Dtype::kF16:
      return make_blocks<uint16_t>(x, n, 1, out, [](const float* v) {
        const uint16_t bits = to_float16(*v).bits;
        if ((bits & 0x7c00) == 0x7c00) fail("{} overflows float16 (65504)", *v);
        return bits;
      });
    case Dtype::kBF16:
      return make_blocks<uint16_t>(x, n, 1, out, [](const float* v) {
        const uint16_t bits = to_bfloat16(*v).bits;
        if ((bits & 0x7f80) == 0x7f80) fail("{} overflows bfloat16", *v);
        return bits;
      });
    case Dtype::kQ8_0:
      return make_blocks<BlockQ8_0>(x, n, 32, out, quantize_q8_0);
    case Dtype::kQ4_0:
      return make_blocks<BlockQ4_0>(x, n, 32, out, quantize_q4_0);
    case Dtype::kQ4_K:
      return make_blocks<BlockQ4_K>(x, n, 256, out, quantize_q4_k);
    default:
      fail("weights of type {} cannot be written", dtype_name(dtype));
  }
}

double error_bound(Dtype dtype, const float* x) {
  constexpr double kSlack = 1 + 1e-5;  // float32 arithmetic along the way
  const double magnitude = std::abs(static_cast<double>(x[0]));
  switch (dtype) {
    case Dtype::kF32:
      return 0;
    case Dtype::kF16:
      return std::max(magnitude * 0x1p-11, 0x1p-25);
    case Dtype::kBF16:
      return std::max(magnitude * 0x1p-8, 0x1p-134);
    case Dtype::kQ8_0: {
      double largest = 0;
      for (int i = 0; i < 32; ++i) largest = std::max(largest, std::abs(static_cast<double>(x[i])));
      const double d = largest / 127;
      return (d / 2 + scale_rounding(d, 127)) * kSlack;
    }
    case Dtype::kQ4_0:
      return q4_0_bound(x) * kSlack;
    case Dtype::kQ4_K:
      return q4_k_bound(x) * kSlack;
    default:
      fail("weights of type {} cannot be written", dtype_name(dtype));
  }
}

}  // namespace kilin::quant
