// SPDX-License-Identifier: Apache-2.0
#include "base/thread_pool.h"

#include <chrono>

#include "base/error.h"

namespace kilin {
namespace {

// A worker waits this long for the next parallel_for before it sleeps: decode issues one every few
// microseconds.
constexpr auto kSpinTime = std::chrono::microseconds(100);

thread_local const ThreadPool* current_pool = nullptr;
thread_local int current_worker = 0;

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Spins until done() holds or the time is over; gives the core away now and then, so that more threads than
// cores still make progress.
template <class Done>
bool spin_until(const Done& done) {
  const auto start = std::chrono::steady_clock::now();
  for (int round = 0;; ++round) {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      pause_cpu();
    }
    if (std::chrono::steady_clock::now() - start > kSpinTime) return done();
    if (round % 16 == 15) std::this_thread::yield();
  }
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  check(threads >= 1 && threads <= 1024, "threads: found {}, expected 1 to 1024", threads);
  workers_.reserve(static_cast<size_t>(threads - 1));
  for (int worker = 1; worker < threads; ++worker) {
    workers_.emplace_back([this, worker] { worker_loop(worker); });
  }
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
    generation_.fetch_add(1);
  }
  wake_.notify_all();
  for (auto& thread : workers_) thread.join();
}

void ThreadPool::run_indices(int worker) {
  for (;;) {
    const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
    if (index >= count_) return;
    try {
      call_(task_, index, worker);
    } catch (...) {
      std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
      next_.store(count_, std::memory_order_relaxed);
    }
  }
}

void ThreadPool::worker_loop(int worker) {
  current_pool = this;
  current_worker = worker;
  uint64_t seen = 0;
  for (;;) {
    const auto is_new = [&] { return generation_.load(std::memory_order_acquire) != seen; };
    if (!spin_until(is_new)) {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, is_new);
    }
    seen = generation_.load(std::memory_order_acquire);
    if (stop_) return;
    run_indices(worker);
    running_.fetch_sub(1, std::memory_order_acq_rel);
  }
}

void ThreadPool::run(int64_t count, Call call, const void* task) {
  if (count <= 0) return;
  if (count == 1 || workers_.empty() || current_pool == this) {
    const int worker = current_pool == this ? current_worker : 0;
    for (int64_t index = 0; index < count; ++index) call(task, index, worker);
    return;
  }
  std::lock_guard caller(caller_mutex_);
  count_ = count;
  call_ = call;
  task_ = task;
  error_ = nullptr;
  next_.store(0, std::memory_order_relaxed);
  running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  {
    std::lock_guard lock(mutex_);
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  current_pool = this;
  current_worker = 0;
  run_indices(0);
  current_pool = nullptr;
  while (running_.load(std::memory_order_acquire) != 0) {
    spin_until([&] { return running_.load(std::memory_order_acquire) == 0; });
    if (running_.load(std::memory_order_acquire) != 0) std::this_thread::yield();
  }
  if (error_) std::rethrow_exception(error_);
}

}  // namespace kilin
