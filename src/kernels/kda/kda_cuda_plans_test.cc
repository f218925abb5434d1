// SPDX-License-Identifier: Apache-2.0
// The chunked form on the GPU against itself: runs, plans, splits and slots that must give the same bits; and
// which plan is taken.
#include <cudaTypedefs.h>

#include <string>
#include <tuple>

#include "kernels/kda/kda_cuda_test_util.h"

namespace kilin::kda_cuda_testing {
namespace {

TEST_F(KdaCuda, SameBitsInEveryRun) {
  const Problem problem({.lengths = {500, 63, 200}, .heads = 8, .value_heads = 8, .steep = 0.02f});
  for (const KdaCudaPlan plan : plans(problem.settings)) {
    std::vector<uint8_t> first, first_pool;
    for (int i = 0; i < 100; ++i) {
      Device device(problem, plan);
      device.run();
      const std::vector<uint8_t> out = device.out.host(), pool = device.pool.host();
      if (i == 0) {
        first = out;
        first_pool = pool;
      }
      ASSERT_EQ(out, first) << "run " << i;
      ASSERT_EQ(pool, first_pool) << "run " << i;
    }
  }
}

TEST_F(KdaCuda, PipeHasTheBitsOfTwoKernels) {
  // Sequences longer than the ring of images (32 chunks), and some that are not.
  for (const bool small : {false, true}) {
    Case c{.lengths = {1300, 0, 547, 1, 2048}, .heads = 4, .value_heads = 8, .steep = 0.02f};
    if (small) c.key_dim = c.value_dim = 64;
    const Problem problem(c);
    Device two(problem, KdaCudaPlan::kTwoKernels), pipe(problem, KdaCudaPlan::kPipe);
    two.run();
    pipe.run();
    EXPECT_EQ(pipe.out.host(), two.out.host());
    EXPECT_EQ(pipe.pool.host(), two.pool.host());
    EXPECT_EQ(pipe.chunk_states.host(), two.chunk_states.host());
  }
}

TEST_F(KdaCuda, PipeInAGraph) {
  const Problem problem({.lengths = {700, 700}, .heads = 6, .value_heads = 6, .varlen = false});
  Device device(problem, KdaCudaPlan::kPipe);
  device.params.final.data = nullptr;  // every replay begins with the same states
  device.run();
  const std::vector<uint8_t> expected = device.out.host();
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check_cuda(cudaStreamCreate(&stream), "cudaStreamCreate");
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  kda_chunk_cuda(device.params, device.workspace.data(), device.workspace.bytes(), stream);
  check_cuda(cudaStreamEndCapture(stream, &graph), "capture");
  check_cuda(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  for (int i = 0; i < 5; ++i) {
    check_cuda(cudaMemsetAsync(device.out.data(), 0xFF, device.out.bytes(), stream), "cudaMemsetAsync");
    check_cuda(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
    check_cuda(cudaStreamSynchronize(stream), "kda_chunk_cuda in a graph");
    EXPECT_EQ(device.out.host(), expected) << "replay " << i;
  }
  check_cuda(cudaGraphExecDestroy(executable), "graph");
  check_cuda(cudaGraphDestroy(graph), "graph");
  check_cuda(cudaStreamDestroy(stream), "stream");
}

TEST_F(KdaCuda, PipeThatDoesNotFitIsRefused) {
  const Problem problem({.lengths = {1}, .heads = 1, .value_heads = 1});
  Device device(problem, KdaCudaPlan::kPipe);
  device.params.sequences = cuda_device().multiprocessors;
  device.params.tokens = device.params.sequences;
  device.params.cu_seqlens = nullptr;
  GpuArray<uint8_t> workspace(kda_chunk_cuda_workspace(device.params));
  EXPECT_THROW(kda_chunk_cuda(device.params, workspace.data(), workspace.bytes(), nullptr), Error);
}

TEST_F(KdaCuda, SequenceAloneAndSplit) {
  // A sequence in a batch has the bits of the sequence alone, and of its two halves (at a chunk's end) after
  // another.
  const Problem both({.lengths = {192, 320}, .heads = 4, .value_heads = 4});
  Device batch(both);
  batch.run();
  const std::vector<uint8_t> out = batch.out.host();
  Device parts(both);
  const size_t row = 4 * 128;
  for (const auto& [begin, end, slot] :
       {std::tuple{192, 320, 1}, std::tuple{320, 512, 1}, std::tuple{0, 192, 2}}) {
    KdaCudaParams p = parts.params;
    p.sequences = 1;
    p.tokens = end - begin;
    p.cu_seqlens = nullptr;
    const auto shift = [begin = begin](CudaTokens& x) {
      x.data = static_cast<const uint8_t*>(x.data) + begin * x.stride * 2;
    };
    shift(p.q);
    shift(p.k);
    shift(p.v);
    shift(p.gate);
    shift(p.beta);
    p.out = parts.out.data() + static_cast<size_t>(begin) * row * 2;
    GpuArray<int32_t> slots(std::vector<int32_t>{slot});
    p.initial.slots = p.final.slots = slots.data();
    p.chunk_states = nullptr;
    kda_chunk_cuda(p, parts.workspace.data(), parts.workspace.bytes(), nullptr);
    check_cuda(cudaDeviceSynchronize(), "kda_chunk_cuda");
  }
  EXPECT_EQ(parts.out.host(), out);
  EXPECT_EQ(parts.pool.host(), batch.pool.host());
}

TEST_F(KdaCuda, NegativeSlotsAreZeroAndKept) {
  Case c{.lengths = {70, 70}, .initial = false};
  const Problem problem(c);
  Device device(problem);
  const std::vector<uint8_t> before = device.pool.host();
  GpuArray<int32_t> none(std::vector<int32_t>{-1, -1});
  device.params.initial.slots = device.params.final.slots = none.data();
  device.run();
  EXPECT_LT(error(problem.out, decode<float>(c.type, device.out.host()).data()), c.tolerance);
  EXPECT_EQ(device.pool.host(), before);
}

TEST_F(KdaCuda, PipeOfMoreBlocksThanFitIsRefused) {
  const Problem problem({.lengths = {1}, .heads = 1, .value_heads = 1});
  Device device(problem, KdaCudaPlan::kPipe);
  KdaCudaParams p = device.params;
  p.multiprocessors = 2 * cuda_device().multiprocessors;
  p.tokens =
      int64_t{16} * 16 * p.multiprocessors;  // images for all of them; the launch does not come to them
  p.cu_seqlens = nullptr;
  const GpuArray<uint8_t> workspace(kda_chunk_cuda_workspace(p));
  try {
    kda_chunk_cuda(p, workspace.data(), workspace.bytes(), nullptr);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("cudaErrorCooperativeLaunchTooLarge"), std::string::npos)
        << error.what();
    EXPECT_NE(std::string(error.what()).find("kda_pipe"), std::string::npos) << error.what();
  }
}

// A part of the GPU, and a stream that runs there; none where the driver has no green contexts.
class GreenContext {
 public:
  explicit GreenContext(unsigned least) {
    const auto device_resource = function<PFN_cuDeviceGetDevResource_v12040>("cuDeviceGetDevResource", 12040);
    const auto split = function<PFN_cuDevSmResourceSplitByCount_v12040>("cuDevSmResourceSplitByCount", 12040);
    const auto describe = function<PFN_cuDevResourceGenerateDesc_v12040>("cuDevResourceGenerateDesc", 12040);
    const auto create = function<PFN_cuGreenCtxCreate_v12040>("cuGreenCtxCreate", 12040);
    const auto convert = function<PFN_cuCtxFromGreenCtx_v12040>("cuCtxFromGreenCtx", 12040);
    const auto stream_create = function<PFN_cuGreenCtxStreamCreate_v12050>("cuGreenCtxStreamCreate", 12050);
    if (!missing_.empty()) return;
    int device = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    CUdevResource all{}, part{};
    CUdevResourceDesc description{};
    unsigned parts = 1;
    if (!step(device_resource(device, &all, CU_DEV_RESOURCE_TYPE_SM), "cuDeviceGetDevResource") ||
        !step(split(&part, &parts, &all, nullptr, 0, least), "cuDevSmResourceSplitByCount") ||
        !step(describe(&description, &part, 1), "cuDevResourceGenerateDesc") ||
        !step(create(&green_, description, device, CU_GREEN_CTX_DEFAULT_STREAM), "cuGreenCtxCreate") ||
        !step(convert(&context_, green_), "cuCtxFromGreenCtx") ||
        !step(stream_create(&stream_, green_, CU_STREAM_NON_BLOCKING, 0), "cuGreenCtxStreamCreate"))
      return;
    multiprocessors_ = static_cast<int>(part.sm.smCount);
  }
  ~GreenContext() {
    if (stream_ != nullptr) static_cast<void>(cudaStreamDestroy(stream_));
    const auto destroy = function<PFN_cuGreenCtxDestroy_v12040>("cuGreenCtxDestroy", 12040);
    if (green_ != nullptr && destroy != nullptr) static_cast<void>(destroy(green_));
  }
  GreenContext(const GreenContext&) = delete;
  GreenContext& operator=(const GreenContext&) = delete;

  // Why there is none; empty when there is one.
  const std::string& missing() const { return missing_; }
  int multiprocessors() const { return multiprocessors_; }
  cudaStream_t stream() const { return stream_; }
  void push() {
    step(function<PFN_cuCtxPushCurrent_v4000>("cuCtxPushCurrent", 4000)(context_), "cuCtxPushCurrent");
  }
  void pop() {
    CUcontext context;
    step(function<PFN_cuCtxPopCurrent_v4000>("cuCtxPopCurrent", 4000)(&context), "cuCtxPopCurrent");
  }

 private:
  template <class Function>
  Function function(const char* name, unsigned version) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    if (cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault, &result) != cudaSuccess ||
        result != cudaDriverEntryPointSuccess) {
      static_cast<void>(cudaGetLastError());
      missing_ = std::string("the driver has no ") + name;
      return nullptr;
    }
    return reinterpret_cast<Function>(found);
  }
  bool step(CUresult result, const char* name) {
    if (result != CUDA_SUCCESS) missing_ = std::string(name) + ": error " + std::to_string(result);
    return result == CUDA_SUCCESS;
  }

  CUgreenCtx green_ = nullptr;
  CUcontext context_ = nullptr;
  cudaStream_t stream_ = nullptr;
  int multiprocessors_ = 0;
  std::string missing_;
};

// 8192 tokens of 32 heads: kAuto takes kPipe where it has a whole GPU. The inputs are those of 64 tokens,
// again and again.
struct LongProblem {
  static constexpr int kTimes = 128;
  Problem problem{{.lengths = {64}, .heads = 1, .value_heads = 32, .varlen = false}};
  Device device{problem};
  GpuArray<uint8_t> q = repeated(problem.q), k = repeated(problem.k), v = repeated(problem.v),
                    gate = repeated(problem.gate), beta = repeated(problem.beta), out = repeated(problem.v);
  KdaCudaParams params = device.params;

  LongProblem() {
    params.tokens = int64_t{64} * kTimes;
    params.q.data = q.data();
    params.k.data = k.data();
    params.v.data = v.data();
    params.gate.data = gate.data();
    params.beta.data = beta.data();
    params.out = out.data();
    params.final.data = nullptr;  // every run begins with the same states
    params.chunk_states = nullptr;
  }
  std::vector<uint8_t> run(const KdaCudaParams& p, cudaStream_t stream) const {
    const GpuArray<uint8_t> workspace(kda_chunk_cuda_workspace(p));
    check_cuda(cudaMemset(out.data(), 0xFF, out.bytes()), "cudaMemset");
    check_cuda(cudaDeviceSynchronize(), "cudaMemset");
    kda_chunk_cuda(p, workspace.data(), workspace.bytes(), stream);
    check_cuda(cudaStreamSynchronize(stream), "kda_chunk_cuda");
    return out.host();
  }

 private:
  GpuArray<uint8_t> repeated(const std::vector<float>& x) const {
    const std::vector<uint8_t> once = encode(problem.settings.type, x);
    std::vector<uint8_t> all;
    for (int i = 0; i < kTimes; ++i) all.insert(all.end(), once.begin(), once.end());
    return GpuArray<uint8_t>(all);
  }
};

TEST_F(KdaCuda, AutoInAGreenContext) {
  const LongProblem problem;
  const KdaCudaParams& p = problem.params;
  ASSERT_EQ(kda_chunk_cuda_plan(p), KdaCudaPlan::kPipe) << "not what this test is about";
  GreenContext green(40);
  if (!green.missing().empty()) GTEST_SKIP() << green.missing();
  const int whole = cuda_device().multiprocessors, part = green.multiprocessors();
  ASSERT_LT(part, 64) << "not what this test is about";
  KdaCudaParams fitting = p;
  fitting.multiprocessors = part;
  KdaCudaParams fused = p;
  fused.plan = kda_chunk_cuda_plan(fitting);
  ASSERT_NE(fused.plan, KdaCudaPlan::kPipe);
  const std::vector<uint8_t> expected = problem.run(fused, nullptr);

  green.push();
  EXPECT_EQ(cuda_device().multiprocessors, part);
  EXPECT_EQ(kda_chunk_cuda_plan(p), fused.plan);
  EXPECT_EQ(problem.run(p, green.stream()), expected);
  EXPECT_EQ(problem.run(p, nullptr), expected);
  KdaCudaParams pipe = p;
  pipe.plan = KdaCudaPlan::kPipe;
  try {
    problem.run(pipe, green.stream());
    ADD_FAILURE() << "kPipe in " << part << " multiprocessors: no error";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("64 blocks scan"), std::string::npos) << error.what();
  }
  green.pop();
  EXPECT_EQ(cuda_device().multiprocessors, whole);

  // Its stream without it: with the number of its multiprocessors as above, without that an error.
  EXPECT_EQ(problem.run(fitting, green.stream()), expected);
  EXPECT_THROW(problem.run(p, green.stream()), Error);
  EXPECT_EQ(problem.run(fused, nullptr), expected);
}

// The choice as a function of heads, tokens and multiprocessors; needs no GPU.
KdaCudaParams sized(int heads, int64_t tokens, int multiprocessors) {
  static const uint8_t* const somewhere = reinterpret_cast<const uint8_t*>(4096);
  KdaCudaParams p;
  p.heads = p.value_heads = heads;
  p.key_dim = p.value_dim = 128;
  p.sequences = 1;
  p.tokens = tokens;
  const int64_t row = int64_t{heads} * 128;
  p.q = p.k = p.v = p.gate = {somewhere, row};
  p.beta = {somewhere, heads};
  p.out = const_cast<uint8_t*>(somewhere);
  p.out_stride = row;
  p.multiprocessors = multiprocessors;
  return p;
}

TEST(KdaCudaPlans, FitTheMultiprocessors) {
  int pipes = 0;
  for (const int64_t tokens : {1, 2048, 8192, 131072}) {
    for (int heads = 1; heads <= 96; ++heads) {
      for (int multiprocessors = 1; multiprocessors <= 148; ++multiprocessors) {
        KdaCudaParams p = sized(heads, tokens, multiprocessors);
        const KdaCudaPlan plan = kda_chunk_cuda_plan(p);
        ASSERT_NE(plan, KdaCudaPlan::kAuto);
        if (plan == KdaCudaPlan::kPipe) {
          ++pipes;
          ASSERT_LT(2 * heads, multiprocessors) << tokens << " tokens";
        }
        if (plan == KdaCudaPlan::kSegments) continue;  // asked for, there are more of them
        const size_t bytes = kda_chunk_cuda_workspace(p);
        p.plan = plan;
        ASSERT_EQ(kda_chunk_cuda_plan(p), plan);
        ASSERT_EQ(kda_chunk_cuda_workspace(p), bytes);
      }
    }
  }
  EXPECT_GT(pipes, 0);
}

TEST(KdaCudaPlans, AreThoseMeasured) {
  EXPECT_EQ(kda_chunk_cuda_plan(sized(32, 8192, 132)), KdaCudaPlan::kPipe);
  EXPECT_EQ(kda_chunk_cuda_plan(sized(24, 8192, 132)), KdaCudaPlan::kPipe);
  EXPECT_EQ(kda_chunk_cuda_plan(sized(32, 2048, 132)), KdaCudaPlan::kTwoKernels);
  EXPECT_EQ(kda_chunk_cuda_plan(sized(32, 8192, 64)), KdaCudaPlan::kFused);
  EXPECT_EQ(kda_chunk_cuda_plan(sized(96, 8192, 132)), KdaCudaPlan::kFused);
  EXPECT_EQ(kda_chunk_cuda_plan(sized(1, 131072, 132)), KdaCudaPlan::kSegments);
  EXPECT_EQ(kda_chunk_cuda_plan(sized(1, 131072, 4)), KdaCudaPlan::kTwoKernels);
  KdaCudaParams p = sized(1, 64, -1);
  EXPECT_THROW(kda_chunk_cuda_plan(p), Error);
}

}  // namespace
}  // namespace kilin::kda_cuda_testing
