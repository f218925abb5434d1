// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <sched.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "base/cpu.h"
#include "base/error.h"
#include "base/float16.h"
#include "base/random.h"
#include "base/thread_pool.h"

namespace kilin {
namespace {

TEST(Float16, every_half_survives_the_round_trip) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const Float16 half{static_cast<uint16_t>(bits)};
    const float wide = to_float(half);
    if (std::isnan(wide)) {
      EXPECT_TRUE(std::isnan(to_float(to_float16(wide))));
    } else {
      EXPECT_EQ(to_float16(wide).bits, half.bits);
    }
  }
}

TEST(Float16, rounds_to_nearest_even_and_overflows_to_infinity) {
  EXPECT_EQ(to_float16(1.0f + 0x1p-11f).bits, 0x3c00);
  EXPECT_EQ(to_float16(1.0f + 0x1.8p-10f).bits, 0x3c02);
  EXPECT_EQ(to_float16(65519.0f).bits, 0x7bff);
  EXPECT_EQ(to_float16(65520.0f).bits, 0x7c00);
  EXPECT_EQ(to_float16(0x1p-25f).bits, 0x0000);
  EXPECT_EQ(to_float16(0x1.8p-25f).bits, 0x0001);
}

TEST(BFloat16, rounds_to_nearest_even_and_keeps_nan) {
  EXPECT_EQ(to_bfloat16(1.0f + 0x1p-8f).bits, 0x3f80);
  EXPECT_EQ(to_bfloat16(1.0f + 0x1.8p-7f).bits, 0x3f82);
  EXPECT_TRUE(std::isnan(to_float(to_bfloat16(std::numeric_limits<float>::quiet_NaN()))));
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const BFloat16 value{static_cast<uint16_t>(bits)};
    if (!std::isnan(to_float(value))) {
      EXPECT_EQ(to_bfloat16(to_float(value)).bits, value.bits);
    }
  }
}

TEST(ThreadPool, visits_every_index_once_with_more_threads_than_cores) {
  for (int threads : {1, 2, 3, 17}) {
    ThreadPool pool(threads);
    for (int64_t count : {0, 1, 2, 63, 1000}) {
      std::vector<std::atomic<int>> visits(static_cast<size_t>(count));
      pool.parallel_for(count, [&](int64_t i, int worker) {
        ASSERT_LT(worker, threads);
        ++visits[static_cast<size_t>(i)];
      });
      for (auto& v : visits) EXPECT_EQ(v, 1);
    }
  }
}

TEST(ThreadPool, nested_calls_run_and_exceptions_reach_the_caller) {
  ThreadPool pool(3);
  std::atomic<int> inner{0};
  pool.parallel_for(8, [&](int64_t, int) { pool.parallel_for(5, [&](int64_t, int) { ++inner; }); });
  EXPECT_EQ(inner, 40);
  EXPECT_THROW(pool.parallel_for(100, [](int64_t i, int) { check(i != 7, "index {}", i); }), Error);
  std::atomic<int> after{0};
  pool.parallel_for(10, [&](int64_t, int) { ++after; });
  EXPECT_EQ(after, 10);
}

TEST(ThreadPool, rejects_a_silly_size) { EXPECT_THROW(ThreadPool(0), Error); }

cpu_set_t current_cpus() {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  EXPECT_EQ(sched_getaffinity(0, sizeof cpus, &cpus), 0);
  return cpus;
}

TEST(ThreadPool, pinned_threads_stay_on_their_cores_and_the_caller_gets_its_own_back) {
  const cpu_set_t before = current_cpus();
  const std::vector<int>& cores = physical_core_cpus();
  const auto threads = static_cast<int>(cores.size()) + 1;  // the last one shares the first core
  {
    ThreadPool pool(threads, true);
    std::atomic<int> wrong{0};
    pool.parallel_for(500, [&](int64_t, int worker) {
      const cpu_set_t cpus = current_cpus();
      const int expected = cores[static_cast<size_t>(worker) % cores.size()];
      if (CPU_COUNT(&cpus) != 1 || !CPU_ISSET(static_cast<size_t>(expected), &cpus)) ++wrong;
    });
    EXPECT_EQ(wrong, 0);
    EXPECT_EQ(physical_cores(), static_cast<int>(cores.size())) << "pinning must not hide cores";
    const cpu_set_t mine = current_cpus();
    EXPECT_EQ(CPU_COUNT(&mine), 1);
  }
  const cpu_set_t after = current_cpus();
  EXPECT_TRUE(CPU_EQUAL(&before, &after));
}

TEST(ThreadPool, pools_that_are_not_pinned_leave_the_caller_alone) {
  const cpu_set_t before = current_cpus();
  ThreadPool pool(2);
  const cpu_set_t during = current_cpus();
  EXPECT_TRUE(CPU_EQUAL(&before, &during));
}

TEST(ThreadPool, a_thread_that_is_not_pinned_by_the_constructor_may_destroy_the_pool) {
  const cpu_set_t before = current_cpus();
  auto pool = std::make_unique<ThreadPool>(2, true);
  std::thread([&] { pool.reset(); }).join();
  const cpu_set_t after = current_cpus();
  EXPECT_TRUE(CPU_EQUAL(&before, &after));
}

TEST(Cpu, portable_is_always_there_and_can_be_forced) {
  const Isa before = active_isa();
  EXPECT_EQ(supported_isas().front(), Isa::kPortable);
  set_isa(Isa::kPortable);
  EXPECT_EQ(active_isa(), Isa::kPortable);
  set_isa(before);
  EXPECT_GE(physical_cores(), 1);
}

TEST(Random, is_the_same_everywhere) {
  Random random(42);
  EXPECT_EQ(random.bits(), 13930160852258120406ull);  // mt19937_64 is fixed by the standard
  double sum = 0, squares = 0;
  for (int i = 0; i < 100000; ++i) {
    const double x = random.normal();
    sum += x;
    squares += x * x;
  }
  EXPECT_NEAR(sum / 1e5, 0.0, 0.02);
  EXPECT_NEAR(squares / 1e5, 1.0, 0.02);
}

}  // namespace
}  // namespace kilin
