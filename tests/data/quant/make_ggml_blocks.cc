// SPDX-License-Identifier: Apache-2.0
// Makes ggml_blocks.bin: blocks that ggml's own reference quantisers write, and a hash of what ggml reads
// from them. Needs a built libggml-base of llama.cpp (made with commit 3f545becc):
//   g++ -std=c++20 -O2 -Isrc tests/data/quant/make_ggml_blocks.cc -L LLAMA/build/bin -lggml-base \
//       -o make_blocks
//   LD_LIBRARY_PATH=LLAMA/build/bin ./make_blocks > tests/data/quant/ggml_blocks.bin
// Per record: 256 float32; then for Q8_0, Q4_0, Q4_K, Q6_K, Q5_0: the bytes of 256 elements and the FNV-1a
// hash of the bytes of the 256 float32 that ggml dequantises them to. The last record's Q6_K block is of
// random bytes.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "base/random.h"
#include "tensor/dtype.h"

extern "C" {
void quantize_row_q8_0_ref(const float*, void*, int64_t);
void quantize_row_q4_0_ref(const float*, void*, int64_t);
void quantize_row_q4_K_ref(const float*, void*, int64_t);
void quantize_row_q6_K_ref(const float*, void*, int64_t);
void quantize_row_q5_0_ref(const float*, void*, int64_t);
void dequantize_row_q8_0(const void*, float*, int64_t);
void dequantize_row_q4_0(const void*, float*, int64_t);
void dequantize_row_q4_K(const void*, float*, int64_t);
void dequantize_row_q6_K(const void*, float*, int64_t);
void dequantize_row_q5_0(const void*, float*, int64_t);
}

struct Format {
  kilin::Dtype dtype;
  void (*quantize)(const float*, void*, int64_t);
  void (*dequantize)(const void*, float*, int64_t);
};

static double element(int record, int i, kilin::Random& random) {
  const double v = random.normal();
  switch (record) {
    case 0:
      return v;
    case 1:
      return 0.02 * v;
    case 2:
      return 0;
    case 3:
      return -0.37;  // constant
    case 4:
      return std::fabs(v);
    case 5:
      return -std::fabs(v);
    case 6:
      return 1e-7 * v;  // subnormal float16 scales
    case 7:
      return 1e4 * v;
    case 8:
      return v > 0 ? 1 : -1;  // equal magnitudes of both signs
    case 9:
      return random.below(16) != 0 ? 0 : 5 * v;  // outliers
    case 10:
      return i / 32 % 2 != 0 ? 1e-6 * v : v;  // parts of very different size
    default:
      return static_cast<double>(random.below(16)) - 3;
  }
}

int main() {
  const Format formats[] = {{kilin::Dtype::kQ8_0, quantize_row_q8_0_ref, dequantize_row_q8_0},
                            {kilin::Dtype::kQ4_0, quantize_row_q4_0_ref, dequantize_row_q4_0},
                            {kilin::Dtype::kQ4_K, quantize_row_q4_K_ref, dequantize_row_q4_K},
                            {kilin::Dtype::kQ6_K, quantize_row_q6_K_ref, dequantize_row_q6_K},
                            {kilin::Dtype::kQ5_0, quantize_row_q5_0_ref, dequantize_row_q5_0}};
  kilin::Random random(2026);
  for (int record = 0; record < 12; ++record) {
    float x[256];
    for (int i = 0; i < 256; ++i) x[i] = static_cast<float>(element(record, i, random));
    std::fwrite(x, sizeof(x), 1, stdout);
    for (const Format& format : formats) {
      unsigned char bytes[512];
      const size_t size = dtype_bytes(format.dtype, 256);
      format.quantize(x, bytes, 256);
      if (record == 11 && format.dtype == kilin::Dtype::kQ6_K) {
        for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<unsigned char>(random.bits());
        bytes[209] &= 0x3b;  // a finite scale
      }
      float y[256];
      format.dequantize(bytes, y, 256);
      uint64_t hash = 0xcbf29ce484222325;
      for (size_t i = 0; i < sizeof(y); ++i)
        hash = (hash ^ reinterpret_cast<unsigned char*>(y)[i]) * 0x100000001b3;
      std::fwrite(bytes, size, 1, stdout);
      std::fwrite(&hash, sizeof(hash), 1, stdout);
    }
  }
}
