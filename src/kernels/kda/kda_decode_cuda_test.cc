// SPDX-License-Identifier: Apache-2.0
#include "kernels/kda/kda_decode_cuda.h"

#include <gtest/gtest.h>

#include "kernels/kda/kda_decode_test_util.h"

namespace kilin {
namespace {

using kda_decode_testing::Case;
using kda_decode_testing::Problem;

class KdaDecodeCuda : public GpuTest {};

const std::vector<Case>& cases() {
  using A = GateActivation;
  constexpr CudaType f32 = CudaType::kF32, f16 = CudaType::kF16, bf16 = CudaType::kBf16;
  static const std::vector<Case> all = {
      {.name = "one token", .lengths = {1}, .one_each = true},
      {.name = "batch", .lengths = {1, 1, 1, 1, 1}, .one_each = true},
      {.name = "padding", .lengths = {1, 1, 1}, .one_each = true, .padding = {1}},
      {.name = "null slot", .lengths = {1, 1, 1}, .one_each = true, .padding = {0, 2}, .first_slot = 1},
      {.name = "plain", .lengths = {1, 1}, .conv = false, .norm = false, .one_each = true},
      {.name = "no conv", .lengths = {1, 1}, .conv = false, .one_each = true},
      {.name = "no norm", .lengths = {1, 1}, .norm = false, .one_each = true},
      {.name = "silu gate", .lengths = {1, 1}, .activation = A::kSilu, .one_each = true},
      {.name = "no output gate", .lengths = {1, 1}, .activation = A::kNone, .one_each = true},
      {.name = "bounded", .lengths = {1, 1}, .gate = KdaGate::kBounded, .one_each = true},
      {.name = "bounded, no a_log",
       .lengths = {1},
       .gate = KdaGate::kBounded,
       .a_log = false,
       .one_each = true},
      {.name = "activated gate",
       .lengths = {1, 1},
       .gate_type = f32,
       .gate = KdaGate::kNone,
       .one_each = true},
      {.name = "no decay",
       .lengths = {1, 1},
       .gate_type = f32,
       .gate = KdaGate::kNone,
       .one_each = true,
       .fixed_gate = 0,
       .use_fixed_gate = true},
      {.name = "all forgotten",
       .lengths = {1, 1},
       .gate_type = f32,
       .gate = KdaGate::kNone,
       .one_each = true,
       .fixed_gate = -1000,
       .use_fixed_gate = true},
      {.name = "raw beta", .lengths = {1, 1}, .beta_type = f32, .logit = false, .one_each = true},
      {.name = "negative eigenvalues", .lengths = {1, 1}, .beta_scale = 2, .one_each = true},
      {.name = "no l2norm", .lengths = {1}, .l2norm = false, .one_each = true},
      {.name = "no dt_bias", .lengths = {1}, .dt_bias = false, .one_each = true},
      {.name = "fp16",
       .lengths = {1, 1},
       .type = f16,
       .gate_type = f16,
       .beta_type = f16,
       .weight_type = f16,
       .one_each = true},
      {.name = "fp32 weights and gates",
       .lengths = {1, 1},
       .gate_type = f32,
       .beta_type = f32,
       .weight_type = f32,
       .one_each = true},
      {.name = "a row per tap",
       .heads = 2,
       .value_heads = 4,
       .lengths = {1, 1},
       .weight_type = f32,
       .tap_rows = true,
       .one_each = true},
      {.name = "lengths, a row per tap", .lengths = {3, 0, 2}, .weight_type = f32, .tap_rows = true},
      {.name = "bf16 state", .lengths = {1, 1, 1}, .state_type = bf16, .one_each = true},
      {.name = "bf16 state, 64", .dim = 64, .lengths = {1, 1, 1}, .state_type = bf16, .one_each = true},
      {.name = "64", .heads = 3, .value_heads = 3, .dim = 64, .lengths = {1, 1, 1}, .one_each = true},
      {.name = "grouped", .heads = 2, .value_heads = 4, .lengths = {1, 1, 1}, .one_each = true},
      {.name = "grouped by 3", .heads = 1, .value_heads = 3, .dim = 64, .lengths = {1, 1}, .one_each = true},
      {.name = "grouped by 8", .heads = 1, .value_heads = 8, .lengths = {1, 1}, .one_each = true},
      {.name = "grouped by 12, no conv",
       .heads = 1,
       .value_heads = 12,
       .lengths = {1},
       .conv = false,
       .one_each = true},
      {.name = "from zeros", .lengths = {1, 1}, .zero_initial = true, .one_each = true},
      {.name = "some tokens each", .lengths = {3, 3}, .one_each = true},
      {.name = "lengths", .lengths = {1, 5, 0, 2, 17}},
      {.name = "lengths, plain", .lengths = {4, 0, 9, 1}, .conv = false, .norm = false},
      {.name = "lengths, padding", .lengths = {4, 2, 3}, .wide_seqlens = true, .padding = {1}},
      {.name = "lengths, grouped", .heads = 2, .value_heads = 4, .lengths = {4, 2, 3}},
      {.name = "lengths, 64", .dim = 64, .lengths = {4, 2, 3}, .activation = A::kSilu},
      {.name = "lengths, bf16 state", .lengths = {4, 2}, .state_type = bf16},
      {.name = "lengths, from zeros", .lengths = {4, 0, 3}, .zero_initial = true},
      {.name = "lengths, forgotten",
       .lengths = {4, 3},
       .gate_type = f32,
       .gate = KdaGate::kNone,
       .fixed_gate = -1000,
       .use_fixed_gate = true},
      {.name = "long", .heads = 1, .value_heads = 1, .lengths = {200}, .gate = KdaGate::kBounded},
      {.name = "verify", .lengths = {4, 4, 4}, .one_each = true, .accepted = {1, 3, 4}},
      {.name = "verify, lengths", .lengths = {4, 1, 3, 2}, .accepted = {2, 4, 1, 3}},
      {.name = "verify, padding", .lengths = {2, 2}, .padding = {0}, .accepted = {1, 2}},
      {.name = "verify, grouped", .heads = 2, .value_heads = 4, .lengths = {3, 2}, .accepted = {2, 3}},
      {.name = "verify, 64", .dim = 64, .lengths = {3, 2}, .type = f16, .accepted = {2, 3}},
      {.name = "verify, bf16 state", .lengths = {3, 2}, .state_type = bf16, .accepted = {2, 3}},
      {.name = "verify, one token", .lengths = {1, 1}, .one_each = true, .accepted = {2, 3}},
  };
  return all;
}

TEST_F(KdaDecodeCuda, EveryVariantAgreesWithDouble) {
  for (Case wanted : cases()) {
    const int group = wanted.conv ? wanted.value_heads / wanted.heads : 1;
    for (int split : {0, 1, 2, 4, 8}) {
      if (split * group > 8 || (wanted.dim == 64 && split > 2)) continue;
      wanted.split = split;
      Problem(wanted, 1).check_run();
    }
  }
}

// What compute-sanitizer runs: every kind of access once.
TEST_F(KdaDecodeCuda, SmallVariants) {
  for (Case wanted : cases()) {
    const std::string name = wanted.name;
    if (name != "one token" && name != "padding" && name != "grouped" && name != "lengths" &&
        name != "verify, lengths" && name != "bf16 state, 64" && name != "fp32 weights and gates" &&
        name != "a row per tap") {
      continue;
    }
    for (int split : {1, 2}) {
      wanted.split = split;
      Problem(wanted).check_run();
    }
  }
}

// More heads than CTAs fit on the GPU.
TEST_F(KdaDecodeCuda, ManySequences) {
  for (const CudaType state_type : {CudaType::kF32, CudaType::kBf16}) {
    for (const int dim : {64, 128}) {
      Case wanted = {.name = "many", .heads = 5, .value_heads = 5, .dim = dim, .one_each = true};
      wanted.state_type = state_type;
      wanted.lengths.assign(90, 1);
      wanted.padding = {0, 3, 4, 50, 89};
      Problem(wanted).check_run();
      wanted.conv = wanted.norm = false;
      wanted.value_heads = 10;
      wanted.lengths.assign(45, 1);
      wanted.padding = {44};
      wanted.first_slot = 1;
      Problem(wanted).check_run();
    }
  }
}

TEST_F(KdaDecodeCuda, SameBitsEveryTime) {
  for (const Case& wanted : {Case{.name = "batch",
                            .heads = 2,
                            .value_heads = 4,
                            .lengths = std::vector<int>(9, 1),
                            .one_each = true,
                            .split = 2},
                             Case{.name = "verify",
                             .heads = 2,
                             .value_heads = 2,
                             .lengths = {4, 2, 3, 4},
                             .accepted = {3, 2, 1, 4},
                             .split = 4}}) {
    Problem problem(wanted);
    std::vector<uint8_t> first;
    for (int i = 0; i < 100; ++i) {
      problem.reset();
      kda_decode_cuda(problem.params(), nullptr);
      const std::vector<uint8_t> bytes = problem.result_bytes();
      if (i == 0) first = bytes;
      ASSERT_EQ(bytes, first) << wanted.name << " repeat " << i;
    }
  }
}

// The state must not depend on how the rows are shared out.
TEST_F(KdaDecodeCuda, SplitKeepsTheStatesBits) {
  Case wanted = {.name = "split", .lengths = {1, 1, 1}, .one_each = true, .split = 1};
  Problem whole(wanted);
  kda_decode_cuda(whole.params(), nullptr);
  const KdaDecodeCudaParams p = whole.params();
  const size_t bytes = p.final.slot_stride * 5 * sizeof(float);
  std::vector<uint8_t> first(bytes), other(bytes);
  check_cuda(cudaMemcpy(first.data(), p.final.data, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
  for (int split : {2, 4, 8}) {
    wanted.split = split;
    Problem parts(wanted);
    kda_decode_cuda(parts.params(), nullptr);
    check_cuda(cudaMemcpy(other.data(), parts.params().final.data, bytes, cudaMemcpyDeviceToHost),
               "cudaMemcpy");
    EXPECT_EQ(first, other) << split;
  }
}

TEST_F(KdaDecodeCuda, RunsInAGraph) {
  Problem problem({.name = "graph", .lengths = {1, 1}, .one_each = true, .split = 4});
  kda_decode_cuda(problem.params(), nullptr);
  const std::vector<uint8_t> plain = problem.result_bytes();
  problem.reset();
  const KdaDecodeCudaParams p = problem.params();
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t program = nullptr;
  check_cuda(cudaStreamCreate(&stream), "cudaStreamCreate");
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  kda_decode_cuda(p, stream);
  check_cuda(cudaStreamEndCapture(stream, &graph), "capture");
  check_cuda(cudaGraphInstantiate(&program, graph, 0), "cudaGraphInstantiate");
  check_cuda(cudaGraphLaunch(program, stream), "cudaGraphLaunch");
  check_cuda(cudaStreamSynchronize(stream), "graph");
  EXPECT_EQ(problem.result_bytes(), plain);
  check_cuda(cudaGraphExecDestroy(program), "cudaGraphExecDestroy");
  check_cuda(cudaGraphDestroy(graph), "cudaGraphDestroy");
  check_cuda(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

TEST(KdaDecodeCudaArguments, AreChecked) {
  KdaDecodeCudaParams p;
  p.heads = 2, p.value_heads = 3, p.key_dim = p.value_dim = 128;
  EXPECT_THROW(validate(p), Error);
  p.value_heads = 2, p.key_dim = 96;
  EXPECT_THROW(validate(p), Error);
  p.key_dim = 128;
  EXPECT_NO_THROW(validate(p));
  p.sequences = p.tokens = 1;
  EXPECT_THROW(validate(p), Error);  // no q
  float x[4] = {};
  p.q = p.k = p.v = p.gate = {x, 256}, p.beta = {x, 2}, p.out = x, p.out_stride = 256;
  EXPECT_NO_THROW(validate(p));
  p.v.stride = 255;
  EXPECT_THROW(validate(p), Error);
  p.v.stride = 256, p.split = 3;
  EXPECT_THROW(validate(p), Error);
  p.split = 0, p.conv.q_weight = x;
  EXPECT_THROW(validate(p), Error);
  p.conv = {x, x, x, CudaType::kF32, x, 2304};
  EXPECT_NO_THROW(validate(p));
  p.conv.tap_stride = 255;
  EXPECT_THROW(validate(p), Error);
  p.conv.tap_stride = 256;
  EXPECT_NO_THROW(validate(p));
  p.conv.weight_type = CudaType::kBf16;
  EXPECT_THROW(validate(p), Error);
}

}  // namespace
}  // namespace kilin
