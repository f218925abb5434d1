// SPDX-License-Identifier: Apache-2.0
#include "kernels/kda/kda_decode_cuda.h"

#include "base/error.h"

namespace kilin {
namespace {

constexpr const char* kName = "kda_decode";

bool is_half(CudaType type) { return type == CudaType::kBf16 || type == CudaType::kF16; }

void check_tokens(const char* name, const CudaTokens& tokens, int64_t width) {
  check(tokens.data != nullptr, "{}: {} is null", kName, name);
  check(tokens.stride >= width, "{}: {}.stride is {}, expected at least {}", kName, name, tokens.stride,
        width);
}

void check_states(const char* name, const CudaStates& states, int64_t width) {
  if (states.data == nullptr) return;
  check(states.type == CudaType::kF32 || states.type == CudaType::kBf16,
        "{}: the type of {} must be float32 or bfloat16", kName, name);
  const int64_t granule = 16 / cuda_size(states.type);
  check(states.slot_stride >= width && states.slot_stride % granule == 0,
        "{}: {}.slot_stride is {}, expected a multiple of {} from {} on", kName, name, states.slot_stride,
        granule, width);
  check(reinterpret_cast<uintptr_t>(states.data) % 16 == 0, "{}: {} is not aligned to 16 bytes", kName, name);
}

void check_conv(const KdaDecodeCudaParams& p, int64_t channels) {
  const KdaDecodeConv& conv = p.conv;
  const bool any = conv.q_weight != nullptr || conv.k_weight != nullptr || conv.v_weight != nullptr;
  if (!any) return;
  check(conv.q_weight != nullptr && conv.k_weight != nullptr && conv.v_weight != nullptr,
        "{}: convolution weights of q, k and v must all be there or none", kName);
  check(conv.state != nullptr, "{}: conv.state is null", kName);
  check(conv.rows >= kKdaDecodeTaps - 1, "{}: conv.rows is {}, expected at least {}", kName, conv.rows,
        kKdaDecodeTaps - 1);
  check(conv.slot_stride >= conv.rows * channels, "{}: conv.slot_stride is {}, expected at least {}", kName,
        conv.slot_stride, conv.rows * channels);
  check(p.value_heads / p.heads <= 8, "{}: {} value heads per head with a convolution, expected at most 8",
        kName, p.value_heads / p.heads);
  for (const void* weight : {conv.q_weight, conv.k_weight, conv.v_weight}) {
    check(reinterpret_cast<uintptr_t>(weight) % 4 == 0, "{}: a convolution weight is not aligned to 4 bytes",
          kName);
  }
  if (conv.tap_stride == 0) return;
  const int64_t widest = static_cast<int64_t>(p.value_heads) * p.value_dim;  // at least that of q and k
  check(conv.weight_type == CudaType::kF32, "{}: convolution weights with a row per tap must be float32",
        kName);
  check(conv.tap_stride >= widest, "{}: conv.tap_stride is {}, expected 0 or at least {}", kName,
        conv.tap_stride, widest);
}

}  // namespace

void validate(const KdaDecodeCudaParams& p) {
  check(p.heads > 0 && p.value_heads > 0 && p.value_heads % p.heads == 0,
        "{}: value_heads is {}, expected a multiple of heads ({})", kName, p.value_heads, p.heads);
  check(p.key_dim == p.value_dim && (p.key_dim == 64 || p.key_dim == 128),
        "{}: key_dim x value_dim is {} x {}, expected 64 x 64 or 128 x 128", kName, p.key_dim, p.value_dim);
  check(p.sequences >= 0 && p.tokens >= 0, "{}: {} sequences of {} tokens", kName, p.sequences, p.tokens);
  check(p.sequences < 65536, "{}: {} sequences are too many for one launch", kName, p.sequences);
  if (p.sequences == 0) {
    check(p.tokens == 0, "{}: {} tokens of no sequence", kName, p.tokens);
    return;
  }
  check(p.cu_seqlens != nullptr || p.tokens % p.sequences == 0, "{}: {} tokens do not divide by {} sequences",
        kName, p.tokens, p.sequences);
  check(is_half(p.type), "{}: q, k, v and out must be bfloat16 or float16", kName);
  const int64_t keys = static_cast<int64_t>(p.heads) * p.key_dim;
  const int64_t values = static_cast<int64_t>(p.value_heads) * p.value_dim;
  if (p.tokens > 0) {
    check_tokens("q", p.q, keys);
    check_tokens("k", p.k, keys);
    check_tokens("v", p.v, values);
    check_tokens("gate", p.gate, static_cast<int64_t>(p.value_heads) * p.key_dim);
    check_tokens("beta", p.beta, p.value_heads);
    check_tokens("out", {p.out, p.out_stride}, values);
    if (p.norm.weight != nullptr && p.norm.activation != GateActivation::kNone) {
      check_tokens("norm.gate", p.norm.gate, values);
    }
  }
  check(p.gate_kind != KdaGate::kBounded || p.lower_bound < 0.0f,
        "{}: lower_bound is {}, expected it below 0", kName, p.lower_bound);
  check_states("initial", p.initial, values * p.key_dim);
  check_states("final", p.final, values * p.key_dim);
  check(p.initial.data == nullptr || p.final.data == nullptr || p.initial.type == p.final.type,
        "{}: initial and final states are of different types", kName);
  check_conv(p, 2 * keys + values);
  if (p.token_slots != nullptr) {
    check(p.initial.data != nullptr && p.initial.data == p.final.data &&
              p.initial.slot_stride == p.final.slot_stride,
          "{}: token_slots need one pool as initial and final", kName);
    check(p.token_slot_stride > 0 && p.token_slot_stride < (1 << 20), "{}: token_slot_stride is {}", kName,
          p.token_slot_stride);
    check(p.conv.q_weight == nullptr || p.conv.rows >= kKdaDecodeTaps - 2 + p.token_slot_stride,
          "{}: conv.rows is {}, expected at least {} for {} tokens", kName, p.conv.rows,
          kKdaDecodeTaps - 2 + p.token_slot_stride, p.token_slot_stride);
  } else {
    check(p.accepted == nullptr, "{}: accepted without token_slots", kName);
  }
  check(p.first_slot >= 0, "{}: first_slot is {}, expected 0 or more", kName, p.first_slot);
  const int largest = p.key_dim == 128 ? 8 : 2;
  check(p.split >= 0 && p.split <= largest && (p.split & (p.split - 1)) == 0,
        "{}: split is {}, expected a power of two up to {}, or 0", kName, p.split, largest);
  const int group = p.conv.q_weight != nullptr ? p.value_heads / p.heads : 1;
  check(p.split * group <= 8,
        "{}: split {} times {} value heads per head is more than 8, the size of a cluster", kName, p.split,
        group);
}

bool has_many_tokens(const KdaDecodeCudaParams& p) {
  return p.tokens != p.sequences || p.cu_seqlens != nullptr || p.token_slots != nullptr;
}

int kda_decode_split(const KdaDecodeCudaParams& p, int multiprocessors) {
  const int64_t items = static_cast<int64_t>(p.sequences) * p.value_heads;
  const int group = p.conv.q_weight != nullptr ? p.value_heads / p.heads : 1;
  // More than one CTA for a head only while multiprocessors are idle; two of them also while all are resident
  // at once, which the registers of the form for several tokens do not allow (measured:
  // docs/notes/20261124-cuda-decode.md).
  const int most = p.key_dim == 128 ? 8 : 2;
  int split = 1;
  while (2 * split <= most && 2 * split * group <= 8 &&
         2 * split * items <= (split == 1 && !has_many_tokens(p) ? 2 : 1) * multiprocessors) {
    split *= 2;
  }
  return split;
}

double kda_decode_bytes(const KdaDecodeCudaParams& p) {
  const double keys = static_cast<double>(p.heads) * p.key_dim;
  const double values = static_cast<double>(p.value_heads) * p.value_dim;
  const double tokens = static_cast<double>(p.tokens);
  const double sequences = p.sequences;
  const double per_token =
      2 * (2 * keys + 2 * values) + cuda_size(p.gate_type) * p.value_heads * p.key_dim +
      cuda_size(p.beta_type) * p.value_heads +
      (p.norm.weight != nullptr && p.norm.activation != GateActivation::kNone ? 2 * values : 0);
  double bytes = tokens * per_token;
  const double state = values * p.key_dim;
  if (p.initial.data != nullptr) bytes += sequences * state * cuda_size(p.initial.type);
  if (p.final.data != nullptr) {
    bytes += (p.token_slots != nullptr ? tokens : sequences) * state * cuda_size(p.final.type);
  }
  if (p.conv.q_weight != nullptr) {
    const double channels = 2 * keys + values;
    bytes += channels * kKdaDecodeTaps * cuda_size(p.conv.weight_type);
    bytes += 2 * channels * (kKdaDecodeTaps - 1) * sequences;
    bytes +=
        2 * channels * (p.token_slots != nullptr ? 2 * sequences + tokens : (kKdaDecodeTaps - 1) * sequences);
  }
  return bytes;
}

}  // namespace kilin
