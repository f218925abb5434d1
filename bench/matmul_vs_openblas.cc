// SPDX-License-Identifier: Apache-2.0
// Our matmul on packed bfloat16 weights, beside OpenBLAS's sgemm on float32 weights widened
// beforehand (work that is not counted against it), interleaved in one run. Usage: bench_matmul [THREADS];
// apt-get install libopenblas-dev
#include <cblas.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <nlohmann/json.hpp>
#include <vector>

#include "base/cpu.h"
#include "base/float16.h"
#include "base/random.h"
#include "kernels/matmul/matmul.h"

extern "C" void openblas_set_num_threads(int threads);

namespace {

using Clock = std::chrono::steady_clock;

struct Shape {
  int64_t tokens, rows, cols;
};

template <class F>
double seconds(const F& f) {
  const auto start = Clock::now();
  f();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

struct Free {
  void operator()(std::byte* p) const { ::operator delete (p, std::align_val_t{kilin::kPackAlignment}); }
};

struct Result {
  double ours = 1e30, blas = 1e30, difference = 0;
};

Result measure(const Shape& s, kilin::ThreadPool& pool) {
  kilin::Random random(1);
  std::vector<kilin::BFloat16> w(static_cast<size_t>(s.rows * s.cols));
  std::vector<float> wide(w.size()), x(static_cast<size_t>(s.tokens * s.cols));
  std::vector<float> ours(static_cast<size_t>(s.tokens * s.rows)), blas(ours.size());
  for (size_t i = 0; i < w.size(); ++i) {
    w[i] = kilin::to_bfloat16(static_cast<float>(random.normal()));
    wide[i] = kilin::to_float(w[i]);
  }
  for (float& v : x) v = static_cast<float>(random.normal());
  const std::unique_ptr<std::byte, Free> packed(static_cast<std::byte*>(::operator new (
      kilin::packed_bytes(kilin::Dtype::kBF16, s.rows, s.cols), std::align_val_t{kilin::kPackAlignment})));
  kilin::pack_weights(kilin::Dtype::kBF16, w.data(), s.rows, s.cols, 0, s.rows, packed.get());
  const kilin::MatmulJob job{
      s.tokens, x.data(), s.cols, {packed.get(), kilin::Dtype::kBF16, s.rows, s.cols}, ours.data(), s.rows};
  Result best;
  for (int i = 0; i < 15; ++i) {
    best.ours = std::min(best.ours, seconds([&] { kilin::matmul(std::span(&job, 1), pool); }));
    best.blas = std::min(best.blas, seconds([&] {
                           cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<int>(s.tokens),
                                       static_cast<int>(s.rows), static_cast<int>(s.cols), 1.0f, x.data(),
                                       static_cast<int>(s.cols), wide.data(), static_cast<int>(s.cols), 0.0f,
                                       blas.data(), static_cast<int>(s.rows));
                         }));
  }
  for (size_t i = 0; i < ours.size(); ++i) {
    best.difference = std::max(best.difference, static_cast<double>(std::abs(ours[i] - blas[i])));
  }
  return best;
}

}  // namespace

namespace {

void run(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : kilin::physical_cores();
  kilin::ThreadPool pool(threads);
  openblas_set_num_threads(threads);
  nlohmann::json lines = nlohmann::json::array();
  fmt::print("{} threads, {}; GFLOP/s of the best of 15 runs\n", threads,
             kilin::isa_name(kilin::active_isa()));
  fmt::print("{:>7} {:>7} {:>7} {:>12} {:>12} {:>7} {:>12}\n", "tokens", "rows", "cols", "kilin bf16",
             "openblas f32", "ratio", "difference");
  for (const Shape& s : {Shape{1, 4096, 1024},
                         {4, 4096, 1024},
                         {16, 1024, 1024},
                         {64, 512, 1024},
                         {512, 256, 256},
                         {512, 1024, 1024},
                         {512, 4096, 2304},
                         {2048, 4096, 1024}}) {
    const Result r = measure(s, pool);
    const double flops = 2e-9 * static_cast<double>(s.tokens * s.rows * s.cols);
    fmt::print("{:>7} {:>7} {:>7} {:>12.1f} {:>12.1f} {:>7.2f} {:>12.1e}\n", s.tokens, s.rows, s.cols,
               flops / r.ours, flops / r.blas, r.blas / r.ours, r.difference);
    lines.push_back({{"tokens", s.tokens},
                     {"rows", s.rows},
                     {"cols", s.cols},
                     {"kilin_gflops", flops / r.ours},
                     {"openblas_gflops", flops / r.blas}});
  }
  fmt::print("{}\n", lines.dump());
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "bench_matmul: %s\n", e.what());
    return 1;
  }
  return 0;
}
