// SPDX-License-Identifier: Apache-2.0
#include "quant/formats.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/random.h"

namespace kilin::quant {
namespace {

constexpr Dtype kWritable[] = {Dtype::kF32,  Dtype::kF16,  Dtype::kBF16,
                               Dtype::kQ8_0, Dtype::kQ4_0, Dtype::kQ4_K};
constexpr Dtype kBlocks[] = {Dtype::kQ8_0, Dtype::kQ4_0, Dtype::kQ4_K};

std::vector<uint8_t> quantized(Dtype dtype, const std::vector<float>& x) {
  std::vector<uint8_t> bytes(dtype_bytes(dtype, static_cast<int64_t>(x.size())));
  quantize(dtype, x.data(), static_cast<int64_t>(x.size()), bytes.data());
  return bytes;
}

std::vector<float> expanded(Dtype dtype, const std::vector<uint8_t>& bytes, int64_t n) {
  std::vector<float> x(static_cast<size_t>(n), -1.0f);
  dequantize(dtype, bytes.data(), n, x.data());
  return x;
}

uint64_t hash_of(const std::vector<float>& x) {
  uint64_t hash = 0xcbf29ce484222325;
  const auto* bytes = reinterpret_cast<const uint8_t*>(x.data());
  for (size_t i = 0; i < x.size() * sizeof(float); ++i) hash = (hash ^ bytes[i]) * 0x100000001b3;
  return hash;
}

// tests/data/quant/make_ggml_blocks.cc says how the file was made and what it holds.
TEST(QuantFormats, BytesAndValuesAreThoseOfGgml) {
  std::ifstream file(KILIN_SOURCE_DIR "/tests/data/quant/ggml_blocks.bin", std::ios::binary);
  const std::vector<char> data{std::istreambuf_iterator<char>(file), {}};
  constexpr Dtype kOrder[] = {Dtype::kQ8_0, Dtype::kQ4_0, Dtype::kQ4_K, Dtype::kQ6_K, Dtype::kQ5_0};
  size_t record_size = 256 * sizeof(float);
  for (const Dtype dtype : kOrder) record_size += dtype_bytes(dtype, 256) + sizeof(uint64_t);
  ASSERT_EQ(data.size(), 12 * record_size);
  const char* at = data.data();
  for (int record = 0; record < 12; ++record) {
    std::vector<float> x(256);
    std::memcpy(x.data(), at, 256 * sizeof(float));
    at += 256 * sizeof(float);
    for (const Dtype dtype : kOrder) {
      SCOPED_TRACE(std::string(dtype_name(dtype)) + ", record " + std::to_string(record));
      const std::vector<uint8_t> expected(at, at + dtype_bytes(dtype, 256));
      at += expected.size();
      uint64_t hash = 0;
      std::memcpy(&hash, at, sizeof(hash));
      at += sizeof(hash);
      if (writable(dtype)) {
        EXPECT_EQ(quantized(dtype, x), expected);
      }
      EXPECT_EQ(hash_of(expanded(dtype, expected, 256)), hash);
    }
  }
}

TEST(QuantFormats, Q5BecomesQ8WithoutLoss) {
  std::vector<uint8_t> stored(8 * sizeof(BlockQ5_0));
  Random random(12);
  for (uint8_t& byte : stored) byte = static_cast<uint8_t>(random.bits());
  for (size_t b = 0; b < 8; ++b) stored[b * sizeof(BlockQ5_0) + 1] &= 0xbb;  // finite scales, of both signs
  std::vector<uint8_t> made(dtype_bytes(Dtype::kQ8_0, 256));
  q5_0_to_q8_0(stored.data(), 256, made.data());
  EXPECT_EQ(expanded(Dtype::kQ8_0, made, 256), expanded(Dtype::kQ5_0, stored, 256));
}

// Every float of a distribution, by kind.
double sample(int kind, int i, Random& random) {
  const double v = random.normal();
  switch (kind) {
    case 0:
      return v;
    case 1:
      return std::fabs(v);
    case 2:
      return -100 - v;
    case 3:
      return std::pow(v, 5);
    case 4:
      return random.below(20) == 0 ? 30 * v : 0.1 * v;
    case 5:
      return i / 32 % 2 != 0 ? 1e-6 * v : v;
    case 6:
      return 1000 + 1e-4 * v;
    default:
      return 1e-9 * v;
  }
}

TEST(QuantFormats, ErrorStaysWithinItsBound) {
  Random random(5);
  for (int round = 0; round < 400; ++round) {
    std::vector<float> x(256);
    for (int i = 0; i < 256; ++i) x[i] = static_cast<float>(sample(round % 8, i, random));
    for (const Dtype dtype : kWritable) {
      const std::vector<float> y = expanded(dtype, quantized(dtype, x), 256);
      const int64_t block = dtype_block(dtype);
      for (int64_t first = 0; first < 256; first += block) {
        const double bound = error_bound(dtype, &x[first]);
        for (int64_t i = first; i < first + block; ++i) {
          ASSERT_LE(std::abs(static_cast<double>(x[i]) - y[i]), bound)
              << dtype_name(dtype) << " kind " << round % 8 << " element " << i;
        }
      }
    }
  }
}

// The bound says something: it is no wider than a few steps, and normal data loses what theory says.
TEST(QuantFormats, NormalDataLosesLittle) {
  Random random(6);
  std::vector<float> x(256 * 64);
  for (float& v : x) v = static_cast<float>(random.normal());
  for (const auto& [dtype, limit] :
       {std::pair{Dtype::kBF16, 0.002}, {Dtype::kQ8_0, 0.006}, {Dtype::kQ4_0, 0.09}, {Dtype::kQ4_K, 0.077}}) {
    const std::vector<float> y = expanded(dtype, quantized(dtype, x), static_cast<int64_t>(x.size()));
    double squares = 0;
    for (size_t i = 0; i < x.size(); ++i) squares += (x[i] - y[i]) * (x[i] - y[i]);
    EXPECT_LT(std::sqrt(squares / static_cast<double>(x.size())), limit) << dtype_name(dtype);
    EXPECT_LT(error_bound(dtype, x.data()), 1.0) << dtype_name(dtype);
  }
}

TEST(QuantFormats, ZerosStayZeros) {
  const std::vector<float> x(512, 0.0f);
  for (const Dtype dtype : kWritable) {
    for (const float y : expanded(dtype, quantized(dtype, x), 512)) EXPECT_EQ(y, 0.0f) << dtype_name(dtype);
    EXPECT_LE(error_bound(dtype, x.data()), 1e-4) << dtype_name(dtype);
  }
}

std::string error_of(Dtype dtype, const std::vector<float>& x) {
  try {
    quantized(dtype, x);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(QuantFormats, RefusesWhatIsNotFinite) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()}) {
    std::vector<float> x(256, 1.0f);
    x[77] = bad;
    for (const Dtype dtype : kWritable) {
      EXPECT_NE(error_of(dtype, x).find("element 77 is"), std::string::npos) << dtype_name(dtype);
    }
  }
}

TEST(QuantFormats, RefusesWhatDoesNotFit) {
  for (const float huge : {3.4e38f, -3.4e38f}) {
    for (const Dtype dtype : {Dtype::kF16, Dtype::kBF16, Dtype::kQ8_0, Dtype::kQ4_0, Dtype::kQ4_K}) {
      std::vector<float> x(256, 1.0f);
      x[200] = huge;
      EXPECT_NE(error_of(dtype, x).find("overflow"), std::string::npos) << dtype_name(dtype);
    }
  }
  // The largest scale that fits, and the next: d = 65504 and what rounds to infinity.
  std::vector<float> x(256, 0.0f);
  x[0] = 65504.0f * 127;
  EXPECT_EQ(error_of(Dtype::kQ8_0, x), "");
  x[0] = 65520.0f * 127;
  EXPECT_NE(error_of(Dtype::kQ8_0, x), "");
  x[0] = 65504.0f * -8;
  EXPECT_EQ(error_of(Dtype::kQ4_0, x), "");
  x[0] = 65520.0f * -8;
  EXPECT_NE(error_of(Dtype::kQ4_0, x), "");
  x[0] = -65504.0f * 63;
  EXPECT_EQ(error_of(Dtype::kQ4_K, x), "");
  x[0] = -65535.0f * 63;
  EXPECT_NE(error_of(Dtype::kQ4_K, x), "");
  EXPECT_THROW(quantized(Dtype::kQ5_0, std::vector<float>(256)), Error);
  EXPECT_THROW(quantized(Dtype::kQ6_K, std::vector<float>(256)), Error);
  EXPECT_THROW(quantized(Dtype::kI32, std::vector<float>(256)), Error);
  EXPECT_THROW(expanded(Dtype::kU8, std::vector<uint8_t>(256), 256), Error);
}

// The formulas of the header, taken literally for every nibble and both nibbles' places.
TEST(QuantFormats, EveryNibble) {
  for (int pattern = 0; pattern < 256; ++pattern) {
    BlockQ4_0 small{to_float16(0.25f).bits, {}};
    std::fill(std::begin(small.q), std::end(small.q), static_cast<uint8_t>(pattern));
    float y[256];
    dequantize(Dtype::kQ4_0, &small, 32, y);
    for (int i = 0; i < 32; ++i) {
      EXPECT_EQ(y[i], 0.25f * static_cast<float>((i < 16 ? pattern & 15 : pattern >> 4) - 8));
    }

    BlockQ5_0 five{to_float16(0.25f).bits, {}, {}};
    std::fill(std::begin(five.q), std::end(five.q), static_cast<uint8_t>(pattern));
    std::fill(std::begin(five.high), std::end(five.high), static_cast<uint8_t>(pattern * 5));
    dequantize(Dtype::kQ5_0, &five, 32, y);
    for (int i = 0; i < 32; ++i) {
      const int n = (i < 16 ? pattern & 15 : pattern >> 4) + 16 * ((pattern * 5) >> i % 8 & 1);
      EXPECT_EQ(y[i], 0.25f * static_cast<float>(n - 16));
    }

    BlockQ4_K large{};
    large.d = to_float16(0.5f).bits;
    large.dmin = to_float16(0.125f).bits;
    for (int i = 0; i < 12; ++i) large.scales[i] = static_cast<uint8_t>(pattern * 7 + 31 * i);
    std::fill(std::begin(large.q), std::end(large.q), static_cast<uint8_t>(pattern));
    dequantize(Dtype::kQ4_K, &large, 256, y);
    for (int i = 0; i < 256; ++i) {
      const ScaleMin s = scale_min(large.scales, i / 32);
      const int n = i / 32 % 2 != 0 ? pattern >> 4 : pattern & 15;
      EXPECT_EQ(y[i], 0.5f * s.scale * static_cast<float>(n) - 0.125f * s.min);
    }

    BlockQ6_K six{};
    six.d = to_float16(0.5f).bits;
    for (int i = 0; i < 16; ++i) six.scales[i] = static_cast<int8_t>(3 * i - 20);
    std::fill(std::begin(six.low), std::end(six.low), static_cast<uint8_t>(pattern));
    std::fill(std::begin(six.high), std::end(six.high), static_cast<uint8_t>(pattern ^ 0x5a));
    dequantize(Dtype::kQ6_K, &six, 256, y);
    for (int i = 0; i < 256; ++i) {
      const int quarter = i / 32 % 4;
      const int n = (quarter < 2 ? pattern & 15 : pattern >> 4) + 16 * ((pattern ^ 0x5a) >> 2 * quarter & 3);
      const int part = i / 16;
      const auto scale = static_cast<float>(six.scales[part]);
      EXPECT_EQ(y[i], 0.5f * scale * static_cast<float>(n - 32));
    }
  }
}

// The levels that quantise() writes land where dequantise() reads them: x is exact in every format.
TEST(QuantFormats, ExactValuesSurvive) {
  std::vector<float> x(256);
  for (int i = 0; i < 256; ++i) x[i] = static_cast<float>((i * 7 + i / 32) % 16 - 8);
  for (const Dtype dtype : {Dtype::kF32, Dtype::kF16, Dtype::kBF16, Dtype::kQ4_0}) {
    EXPECT_EQ(expanded(dtype, quantized(dtype, x), 256), x) << dtype_name(dtype);
  }
}

TEST(QuantFormats, DataNeedNotBeAligned) {
  Random random(9);
  std::vector<float> x(512);
  for (float& v : x) v = static_cast<float>(random.normal());
  for (const Dtype dtype : kBlocks) {
    const std::vector<uint8_t> bytes = quantized(dtype, x);
    std::vector<uint8_t> shifted(bytes.size() + 1);
    quantize(dtype, x.data(), 512, shifted.data() + 1);
    EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), shifted.begin() + 1));
    std::vector<float> y(512);
    dequantize(dtype, shifted.data() + 1, 512, y.data());
    EXPECT_EQ(y, expanded(dtype, bytes, 512));
  }
}

TEST(QuantFormats, WhichTypesCanBeReadAndWritten) {
  for (const Dtype dtype : kWritable) EXPECT_TRUE(writable(dtype) && readable(dtype)) << dtype_name(dtype);
  for (const Dtype dtype : {Dtype::kQ5_0, Dtype::kQ6_K}) EXPECT_TRUE(readable(dtype) && !writable(dtype));
  for (const Dtype dtype : {Dtype::kF64, Dtype::kI32, Dtype::kI64, Dtype::kU8}) {
    EXPECT_FALSE(readable(dtype) || writable(dtype)) << dtype_name(dtype);
  }
}

}  // namespace
}  // namespace kilin::quant
