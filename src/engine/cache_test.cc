// SPDX-License-Identifier: Apache-2.0
#include "engine/cache.h"

#include <gtest/gtest.h>

#include <numeric>

#include "io/json.h"

namespace kilin {
namespace {

Config tiny() {
  return read_config_file(KILIN_SOURCE_DIR "/tests/data/reference/tiny-random/config.json", "transformers");
}

void fill(Cache& cache, const Config& c, int32_t slot, int64_t tokens, float base) {
  cache.reserve(slot, 0, tokens);
  for (int64_t t = 0; t < tokens; ++t) cache.latent_row(3, slot, t)[0] = base + static_cast<float>(t);
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
    fill(cache, c, slots.back(), 300, static_cast<float>(1000 * i));
  }
  for (int i = 0; i < 9; ++i) {
    const int32_t slot = slots[static_cast<size_t>(i)];
    EXPECT_EQ(cache.latent_row(3, slot, 299)[0], 1000 * i + 299);
    EXPECT_EQ((cache.state(2) + slot * cache.state_stride())[1], 2000 * i + 1);
    EXPECT_EQ(cache.conv(1, ConvStream::kValue)[slot * cache.conv_stride()], 3000 * i);
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
  cache.latent_row(3, b, 300)[0] = -1;
  EXPECT_EQ(cache.pages(3, a)[0], cache.pages(3, b)[0]) << "the full page stays shared";
  EXPECT_NE(cache.pages(3, a)[1], cache.pages(3, b)[1]);
  EXPECT_EQ(cache.latent_row(3, b, 299)[0], 306) << "the partial page keeps its rows";
  cache.reserve(a, 300, 301);
  cache.latent_row(3, a, 300)[0] = -2;
  EXPECT_EQ(cache.latent_row(3, b, 300)[0], -1);
}

TEST(Cache, saved_bytes_restore_the_same_past) {
  const Config c = tiny();
  for (int64_t tokens : {0, 1, 256, 257, 513}) {
    Cache cache(c);
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

}  // namespace
}  // namespace kilin
