// SPDX-License-Identifier: Apache-2.0
// The chunked form on the GPU, and the form token by token, against the recurrence in double precision
// (kda_reference.h).
#include "kernels/kda/kda_backward_cuda.h"
#include "kernels/kda/kda_cuda_test_util.h"

namespace kilin::kda_cuda_testing {
namespace {

TEST_F(KdaCuda, TokenByToken) {
  // float32: the error grows with the length as rounding does, far below that of 16-bit operands.
  const Case c{.lengths = {1, 70, 0, 300},
               .heads = 2,
               .value_heads = 4,
               .type = CudaType::kF32,
               .gate_type = CudaType::kF32,
               .steep = 0.02f,
               .recurrent = true,
               .tolerance = 2e-6};
  const auto expect = [](const Case& settings, const char* name) {
    expect_agreement(Problem(settings), name, KdaCudaPlan::kAuto);
  };
  expect(c, "float32");
  Case other = c;
  other.key_dim = 60, other.value_dim = 100;
  expect(other, "60 x 100");
  other.key_dim = 256, other.value_dim = 256;
  expect(other, "256 x 256");
  other.key_dim = 33, other.value_dim = 17, other.gate_kind = KdaGate::kBounded;
  expect(other, "33 x 17, bounded");
  other = c, other.gate_kind = KdaGate::kNone, other.varlen = false, other.lengths = {50, 50};
  expect(other, "no gate, equal lengths");
  other = c, other.type = CudaType::kBf16, other.tolerance = 5e-3;
  expect(other, "bf16, float32 gate");
  other.type = other.gate_type = CudaType::kF16, other.state_type = CudaType::kBf16;
  expect(other, "fp16, bf16 state");
}

TEST_F(KdaCuda, SmallLengths) {
  for (const int length : {1, 2, 15, 16, 17, 63, 64, 65, 100, 128, 129, 200})
    expect_agreement({.lengths = {length}}, ("length " + std::to_string(length)).c_str());
}

TEST_F(KdaCuda, SmallShapes) {
  expect_agreement({.lengths = {130}, .key_dim = 64, .value_dim = 64}, "64 x 64");
  expect_agreement({.lengths = {130}, .key_dim = 64}, "K 64, V 128");
  expect_agreement({.lengths = {130}, .value_dim = 64}, "K 128, V 64");
  expect_agreement({.lengths = {130}, .heads = 1, .value_heads = 3}, "1 head, 3 value heads");
  expect_agreement(
      {.lengths = {130}, .type = CudaType::kF16, .gate_type = CudaType::kF16, .tolerance = 2.5e-3}, "fp16");
  expect_agreement({.lengths = {130}, .gate_type = CudaType::kF32}, "fp32 gate");
  expect_agreement({.lengths = {130, 130}, .varlen = false}, "equal lengths");
  expect_agreement({.lengths = {130}, .state_type = CudaType::kBf16}, "bf16 state");
}

TEST_F(KdaCuda, SmallGates) {
  expect_agreement({.lengths = {200}, .gate_kind = KdaGate::kBounded}, "bounded");
  expect_agreement({.lengths = {200}, .gate_kind = KdaGate::kNone}, "no gate");
  expect_agreement({.lengths = {200}, .gate_offset = -8.0f}, "slow decay");
  expect_agreement({.lengths = {200}, .gate_offset = 6.0f, .tolerance = 3.9e-3}, "fast decay");
  // Chunks that decay by 2^-100 to 2^-250: the ranges of kda_image_sm90.cuh.
  expect_agreement({.lengths = {200}, .gate_offset = 3.0f}, "decay around the first limit");
  expect_agreement({.lengths = {200}, .gate_offset = 5.0f}, "decay around the second limit");
  expect_agreement(
      {.lengths = {200}, .type = CudaType::kF16, .gate_type = CudaType::kF16, .gate_offset = 4.0f},
      "decay between the limits, fp16");
  expect_agreement({.lengths = {200}, .gate_offset = -4.0f, .steep = 0.3f}, "steep 0.3");
  expect_agreement({.lengths = {200}, .gate_offset = -4.0f, .steep = 0.05f}, "steep 0.05");
  expect_agreement({.lengths = {200}, .gate_kind = KdaGate::kNone, .steep = 0.9f}, "no gate, steep 0.9");
  expect_agreement({.lengths = {200}, .gate_kind = KdaGate::kNone, .steep = 1.0f}, "no gate, steep 1");
  expect_agreement({.lengths = {200},
                    .gate_offset = -12.0f,
                    .repeated_keys = true,
                    .beta_offset = 6.0f,
                    .tolerance = 1.2e-2},
                   "repeated keys");
  expect_agreement({.lengths = {200},
                    .gate_offset = -12.0f,
                    .repeated_keys = true,
                    .beta_offset = 6.0f,
                    .beta_scale = 2.0f,
                    .tolerance = 0.06},
                   "repeated keys, beta 2");
}

TEST_F(KdaCuda, VariableLengths) {
  expect_agreement({.lengths = {0, 15, 1, 0, 64, 200, 1, 300, 0}, .heads = 4, .value_heads = 4}, "varlen");
  expect_agreement({.lengths = {0, 0}}, "empty sequences");
  expect_agreement({.lengths = {300, 500, 20}, .heads = 48, .value_heads = 48}, "many heads");
}

TEST_F(KdaCuda, LongDecays) {
  expect_agreement({.lengths = {4096}, .heads = 4, .value_heads = 4, .gate_offset = -9.0f}, "4096 tokens");
  expect_agreement({.lengths = {3000, 0, 1000, 1}, .heads = 2, .value_heads = 2, .gate_offset = -9.0f},
                   "segments");
  expect_agreement({.lengths = {2048}, .heads = 70, .value_heads = 70, .gate_kind = KdaGate::kBounded},
                   "70 heads");
}

TEST(KdaCudaArguments, AreChecked) {
  KdaCudaParams p;
  p.heads = p.value_heads = 1;
  p.key_dim = p.value_dim = 128;
  EXPECT_NO_THROW(validate(p));
  KdaCudaParams bad = p;
  bad.key_dim = 96;
  EXPECT_THROW(validate(bad), Error);
  bad = p;
  bad.heads = 2;
  EXPECT_THROW(validate(bad), Error);
  bad = p;
  bad.sequences = 3;
  bad.tokens = 100;
  EXPECT_THROW(validate(bad), Error);
}

TEST(KdaCudaArguments, StatesAreChecked) {
  KdaBackwardCudaParams p;
  p.forward.heads = p.forward.value_heads = 1;
  p.forward.key_dim = p.forward.value_dim = 128;
  uint8_t* const somewhere = reinterpret_cast<uint8_t*>(4096);
  p.forward.initial = p.d_final = p.d_initial = {somewhere, CudaType::kF32, 128 * 128, nullptr};
  EXPECT_NO_THROW(validate(p));
  for (CudaStates KdaBackwardCudaParams::*states :
       {&KdaBackwardCudaParams::d_final, &KdaBackwardCudaParams::d_initial}) {
    KdaBackwardCudaParams bad = p;
    (bad.*states).type = CudaType::kF16;
    EXPECT_THROW(validate(bad), Error);
    bad = p;
    (bad.*states).slot_stride += 1;
    EXPECT_THROW(validate(bad), Error);
    bad = p;
    (bad.*states).data = somewhere + 4;
    EXPECT_THROW(validate(bad), Error);
  }
}

}  // namespace
}  // namespace kilin::kda_cuda_testing
