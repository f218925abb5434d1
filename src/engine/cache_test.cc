// SPDX-License-Identifier: Apache-2.0
#include "engine/cache.h"

#include <gtest/gtest.h>

#include <numeric>
#include <string>
#include <vector>

#include "base/error.h"
#include "io/json.h"

namespace kilin {
namespace {

Config tiny() {
  return read_config_file(KILIN_SOURCE_DIR "/tests/data/reference/tiny-random/config.json", "transformers");
}

// Latents hold numbers that float16 holds too.
void write(Cache& cache, int32_t slot, int64_t position, float value) {
  std::vector<float> row(static_cast<size_t>(cache.latent_width()), 0.5f);
  row[0] = value;
  cache.store_latent(3, slot, position, row.data());
}

float read(const Cache& cache, int32_t slot, int64_t position) {
  std::vector<float> row(static_cast<size_t>(cache.latent_width()));
  cache.load_latent(3, slot, position, row.data());
  EXPECT_EQ(row.back(), 0.5f);
  return row[0];
}

void fill(Cache& cache, const Config& c, int32_t slot, int64_t tokens, float base) {
  cache.reserve(slot, 0, tokens);
  for (int64_t t = 0; t < tokens; ++t) write(cache, slot, t, base + static_cast<float>(t));
  for (int layer = 0; layer < 3; ++layer) {
    float* state = cache.state(layer) + slot * cache.state_stride();
    std::iota(state, state + c.linear.value_heads * c.linear.value_dim * c.linear.key_dim, base * 2);
    cache.conv(layer, ConvStream::kValue)[slot * cache.conv_stride()] = base * 3;
  }
}

TEST(Cache, slots_keep_apart_when_the_pool_grows) {
  const Config c = tiny();
  Cache cache(c);
  std::vector<int32_t> slots;
  for (int i = 0; i < 9; ++i) {
    slots.push_back(cache.acquire());
    fill(cache, c, slots.back(), 300, static_cast<float>(128 * i));
  }
  for (int i = 0; i < 9; ++i) {
    const int32_t slot = slots[static_cast<size_t>(i)];
    EXPECT_EQ(read(cache, slot, 299), 128 * i + 299);
    EXPECT_EQ((cache.state(2) + slot * cache.state_stride())[1], 256 * i + 1);
    EXPECT_EQ(cache.conv(1, ConvStream::kValue)[slot * cache.conv_stride()], 384 * i);
  }
}

TEST(Cache, a_released_slot_comes_back_empty) {
  const Config c = tiny();
  Cache cache(c);
  const int32_t slot = cache.acquire();
  fill(cache, c, slot, 10, 5);
  cache.release(slot);
  EXPECT_EQ(cache.acquire(), slot);
  EXPECT_EQ(cache.state(0)[slot * cache.state_stride()], 0.0f);
  EXPECT_EQ(cache.conv(2, ConvStream::kValue)[slot * cache.conv_stride()], 0.0f);
  EXPECT_EQ(cache.bytes(slot), cache.state_bytes());
}

TEST(Cache, copies_share_pages_until_one_writes) {
  const Config c = tiny();
  Cache cache(c);
  const int32_t a = cache.acquire();
  const int32_t b = cache.acquire();
  fill(cache, c, a, 300, 7);
  cache.copy(a, b);
  EXPECT_EQ(cache.pages(3, a)[0], cache.pages(3, b)[0]);
  cache.reserve(b, 300, 301);  // writes into the second page
  write(cache, b, 300, -1);
  EXPECT_EQ(cache.pages(3, a)[0], cache.pages(3, b)[0]) << "the full page stays shared";
  EXPECT_NE(cache.pages(3, a)[1], cache.pages(3, b)[1]);
  EXPECT_EQ(read(cache, b, 299), 306) << "the partial page keeps its rows";
  cache.reserve(a, 300, 301);
  write(cache, a, 300, -2);
  EXPECT_EQ(read(cache, b, 300), -1);
}

TEST(Cache, saved_bytes_restore_the_same_past) {
  const Config c = tiny();
  for (auto [type, tokens] : {std::pair<Dtype, int64_t>{Dtype::kF16, 0},
                              {Dtype::kF16, 1},
                              {Dtype::kF16, 256},
                              {Dtype::kF16, 257},
                              {Dtype::kBF16, 300},
                              {Dtype::kF32, 513}}) {
    Cache cache(c, type);
    const int32_t a = cache.acquire();
    fill(cache, c, a, tokens, 3);
    const auto bytes = cache.save(a, tokens);
    EXPECT_EQ(bytes.size(), cache.saved_bytes(tokens));
    const int32_t b = cache.acquire();
    fill(cache, c, b, 700, 99);
    cache.load(b, tokens, bytes);
    EXPECT_EQ(cache.save(b, tokens), bytes) << tokens;
  }
}

TEST(Cache, half_precision_takes_half_the_bytes_and_refuses_what_it_cannot_hold) {
  const Config c = tiny();
  Cache half(c), full(c, Dtype::kF32);
  EXPECT_EQ(half.bytes_per_token() * 2, full.bytes_per_token());
  const int32_t a = half.acquire();
  const int32_t b = full.acquire();
  half.reserve(a, 0, 1);
  full.reserve(b, 0, 1);
  write(half, a, 0, 65504.0f);
  EXPECT_EQ(read(half, a, 0), 65504.0f);
  write(half, a, 0, 1.0f + 0x1p-12f);
  EXPECT_EQ(read(half, a, 0), 1.0f);
  write(full, b, 0, -1e30f);
  EXPECT_EQ(read(full, b, 0), -1e30f);
  try {
    write(half, a, 0, -70000.0f);
    FAIL() << "stored a value that float16 does not have";
  } catch (const Error& e) {
    const std::string message = e.what();
    EXPECT_NE(message.find("-70000"), std::string::npos) << message;
    EXPECT_NE(message.find("--cache-type f32"), std::string::npos) << message;
    EXPECT_NE(message.find("layer 4"), std::string::npos) << message;
  }
}

TEST(Cache, saved_bytes_of_the_other_type_are_refused) {
  const Config c = tiny();
  Cache half(c), full(c, Dtype::kF32);
  const int32_t a = half.acquire();
  const int32_t b = full.acquire();
  fill(half, c, a, 3, 1);
  const auto bytes = half.save(a, 3);
  EXPECT_THROW(full.load(b, 3, bytes), Error);
  EXPECT_THROW(full.check_saved({}), Error);
  const Cache bfloat(c, Dtype::kBF16);  // of as many bits
  try {
    bfloat.check_saved(bytes);
    FAIL() << "took float16 for bfloat16";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("latents in f16, this model keeps bf16"), std::string::npos)
        << e.what();
  }
  EXPECT_THROW(Cache(c, Dtype::kQ8_0), Error);
}

}  // namespace
}  // namespace kilin
