// SPDX-License-Identifier: Apache-2.0
// Short convolution and gated RMSNorm on a GPU: microseconds in a CUDA graph, and the share of the copy
// bandwidth that the bytes they have to move make of it.
#include "base/float16.h"
#include "base/random.h"
#include "cuda_timing.h"
#include "kernels/conv/short_conv_cuda.h"
#include "kernels/cuda/device.h"
#include "kernels/norm/norm_cuda.h"

namespace kilin {
namespace {

class Arrays {
 public:
  Arrays() = default;
  Arrays(const Arrays&) = delete;
  Arrays& operator=(const Arrays&) = delete;
  ~Arrays() {
    for (void* data : owned_) static_cast<void>(cudaFree(data));
  }
  void* bytes(size_t count) {
    void* data = nullptr;
    check_cuda(cudaMalloc(&data, count), "cudaMalloc of {} bytes", count);
    owned_.push_back(data);
    return data;
  }
  // `count` random bfloat16, the same million over and over.
  void* random(int64_t count) {
    static const std::vector<BFloat16> values = [] {
      Random random(3);
      std::vector<BFloat16> result(1 << 20);
      for (BFloat16& x : result) x = to_bfloat16(static_cast<float>(random.normal()));
      return result;
    }();
    BFloat16* data = static_cast<BFloat16*>(bytes(2 * count));
    const int64_t step = static_cast<int64_t>(values.size());
    for (int64_t at = 0; at < count; at += step) {
      check_cuda(cudaMemcpy(data + at, values.data(), 2 * std::min(step, count - at), cudaMemcpyHostToDevice),
                 "cudaMemcpy");
    }
    return data;
  }

 private:
  std::vector<void*> owned_;
};

void report(const char* name, double copy, double bytes, double us) {
  fmt::print("{:<44} {:8.2f} us {:6.0f} GB/s {:5.1f} % of copy\n", name, us, bytes / us * 1e-3,
             100 * bytes / us * 1e-3 / copy);
}

void conv(double copy, int64_t tokens, int sequences, int64_t channels) {
  Arrays arrays;
  ShortConvCudaParams p;
  p.channels = channels, p.sequences = sequences, p.tokens = tokens;
  p.u = {arrays.random(tokens * channels), channels};
  p.weight = arrays.random(channels * 4);
  p.y = arrays.random(tokens * channels), p.y_stride = channels;
  p.initial = {arrays.random(sequences * 3 * channels), 3 * channels, nullptr};
  p.final = {arrays.random(sequences * 3 * channels), 3 * channels, nullptr};
  const double rows = 2.0 * static_cast<double>(tokens * channels);
  report(fmt::format("convolution, {} x {} tokens, {} channels", sequences, tokens / sequences, channels)
             .c_str(),
         copy, 2 * rows, graph_time(4, [&](int, cudaStream_t stream) { short_conv_cuda(p, stream); }));
  ShortConvCudaBackward b;
  b.forward = p;
  b.dy = {arrays.random(tokens * channels), channels};
  b.du = arrays.random(tokens * channels), b.du_stride = channels;
  b.d_weight = static_cast<float*>(arrays.bytes(channels * 16));
  const size_t size = short_conv_backward_cuda_workspace(b);
  void* workspace = arrays.bytes(size);
  report("  backward", copy, 3 * rows, graph_time(4, [&](int, cudaStream_t stream) {
           short_conv_backward_cuda(b, workspace, size, stream);
         }));
}

void conv_update(double copy, int batch, int64_t channels) {
  Arrays arrays;
  ShortConvCudaParams p;
  p.channels = channels, p.sequences = batch, p.tokens = batch;
  p.u = {arrays.random(batch * channels), channels};
  p.weight = arrays.random(channels * 4);
  p.y = arrays.random(batch * channels), p.y_stride = channels;
  p.initial = {arrays.random(batch * 3 * channels), 3 * channels, nullptr};
  p.final = p.initial;
  report(fmt::format("convolution, update, batch {}, {} channels", batch, channels).c_str(), copy,
         2.0 * static_cast<double>(channels) * (8 * batch + 4),
         graph_time(20, [&](int, cudaStream_t stream) { short_conv_update_cuda(p, stream); }));
}

void norm(double copy, int64_t tokens, int heads) {
  Arrays arrays;
  const int64_t width = heads * 128;
  GatedNormCudaParams p;
  p.tokens = tokens, p.heads = heads;
  p.x = {arrays.random(tokens * width), width}, p.z = {arrays.random(tokens * width), width};
  p.weight = arrays.random(128);
  p.y = arrays.random(tokens * width), p.y_stride = width;
  const double rows = 2.0 * static_cast<double>(tokens * width);
  report(fmt::format("gated norm, {} tokens, {} heads", tokens, heads).c_str(), copy, 3 * rows,
         graph_time(4, [&](int, cudaStream_t stream) { gated_rms_norm_cuda(p, stream); }));
  GatedNormCudaBackward b;
  b.forward = p;
  b.dy = {arrays.random(tokens * width), width};
  b.dx = arrays.random(tokens * width), b.dx_stride = width;
  b.dz = arrays.random(tokens * width), b.dz_stride = width;
  b.d_weight = static_cast<float*>(arrays.bytes(512));
  const size_t size = gated_rms_norm_backward_cuda_workspace(b);
  void* workspace = arrays.bytes(size);
  report("  backward", copy, 5 * rows, graph_time(4, [&](int, cudaStream_t stream) {
           gated_rms_norm_backward_cuda(b, workspace, size, stream);
         }));
}

int run() {
  if (!cuda_available()) {
    fmt::print(stderr, "bench_cuda_rows: no GPU of compute capability 9.0\n");
    return 1;
  }
  double copy = 0;
  {
    Arrays arrays;
    const int64_t bytes = int64_t{1} << 30;
    void* from = arrays.random(bytes / 2);
    void* to = arrays.bytes(bytes);
    copy =
        2e-3 * static_cast<double>(bytes) / graph_time(4, [&](int, cudaStream_t stream) {
          check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream), "cudaMemcpyAsync");
        });
  }
  fmt::print("copy of 1 GiB: {:.0f} GB/s\n", copy);
  conv(copy, 8192, 1, 12288);
  conv(copy, 8192, 8, 12288);
  conv(copy, 65536, 16, 4096);
  conv_update(copy, 1, 12288);
  conv_update(copy, 128, 12288);
  norm(copy, 8192, 32);
  norm(copy, 32768, 32);
  return 0;
}

}  // namespace
}  // namespace kilin

int main() {
  try {
    return kilin::run();
  } catch (const std::exception& error) {
    fmt::print(stderr, "bench_cuda_rows: {}\n", error.what());
    return 1;
  }
}
