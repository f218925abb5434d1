// SPDX-License-Identifier: Apache-2.0
#include "base/thread_pool.h"

#include <chrono>
#include <system_error>
#include <utility>

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
  try {
    for (int worker = 1; worker < threads; ++worker) {
      workers_.emplace_back([this, worker] { worker_loop(worker); });
    }
  } catch (const std::system_error& e) {  // the destructor does not run: end what was started here
    const size_t started = workers_.size();
    stop_workers();
    fail("threads: the system started {} of {} threads: {}", started + 1, threads, e.what());
  }
}

ThreadPool::~ThreadPool() { stop_workers(); }

void ThreadPool::stop_workers() {
  stop_ = true;
  { std::lock_guard lock(mutex_); }  // a worker that saw stop_ unset is asleep by now, and hears the call
  wake_.notify_all();
  for (auto& thread : workers_) thread.join();
}

void ThreadPool::run_indices(int worker) {
  for (;;) {
    const int64_t index = next_.fetch_add(1);
    if (index >= count_) return;
    try {
      call_(task_, index, worker);
    } catch (...) {
      std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
      next_.store(count_);
    }
  }
}

void ThreadPool::worker_loop(int worker) {
  current_pool = this;
  current_worker = worker;
  uint64_t last = 0;  // epoch that this worker has been in
  const auto news = [&] {
    const uint64_t phase = phase_.load();
    return stop_.load() || (open(phase) && phase / kEpoch != last);
  };
  for (;;) {
    if (!spin_until(news)) {
      std::unique_lock lock(mutex_);
      ++sleepers_;
      wake_.wait(lock, news);
      --sleepers_;
    }
    if (stop_) return;
    uint64_t phase = phase_.load();
    if (!open(phase) || !phase_.compare_exchange_strong(phase, phase + 1))
      continue;  // closed or moved on: look again
    last = phase / kEpoch;
    run_indices(worker);
    phase_.fetch_sub(1);
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
  next_ = 0;
  phase_.fetch_add(kEpoch);  // opens
  if (sleepers_.load() > 0) {
    { std::lock_guard lock(mutex_); }
    wake_.notify_all();
  }
  const ThreadPool* outer = std::exchange(current_pool, this);
  const int outer_worker = std::exchange(current_worker, 0);
  run_indices(0);
  current_pool = outer;
  current_worker = outer_worker;
  phase_.fetch_add(kEpoch);  // closes
  const auto left = [&] { return phase_.load() % kEpoch == 0; };
  while (!spin_until(left)) std::this_thread::yield();
  if (error_) std::rethrow_exception(error_);
}

}  // namespace kilin
