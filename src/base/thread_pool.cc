// SPDX-License-Identifier: Apache-2.0
#include "base/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <system_error>
#include <utility>

#include "base/cpu.h"
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

int set_cpus(pid_t thread, const cpu_set_t& cpus) {
  return sched_setaffinity(thread, sizeof cpus, &cpus) == 0 ? 0 : errno;
}

}  // namespace

// Spins until done() holds or the time is over. Gives the core away now and then, and with more threads than
// cores all the time: the thread that is waited for may need it.
template <class Done>
bool ThreadPool::spin_until(const Done& done) const {
  const auto start = std::chrono::steady_clock::now();
  const int pauses = crowded_ ? 4 : 64;
  for (int round = 0;; ++round) {
    for (int i = 0; i < pauses; ++i) {
      if (done()) return true;
      pause_cpu();
    }
    if (std::chrono::steady_clock::now() - start > kSpinTime) return done();
    if (crowded_ || round % 16 == 15) std::this_thread::yield();
  }
}

ThreadPool::ThreadPool(int threads, bool pin) : crowded_(threads > physical_cores()) {
  check(threads >= 1 && threads <= 1024, "threads: found {}, expected 1 to 1024", threads);
  workers_.reserve(static_cast<size_t>(threads - 1));
  try {
    for (int worker = 1; worker < threads; ++worker) {
      workers_.emplace_back([this, worker] { worker_loop(worker); });
    }
    if (pin) pin_threads();
  } catch (const std::system_error& e) {  // the destructor does not run: end what was started here
    const size_t started = workers_.size();
    stop_workers();
    fail("threads: the system started {} of {} threads: {}", started + 1, threads, e.what());
  } catch (const Error&) {
    stop_workers();
    throw;
  }
}

void ThreadPool::pin_threads() {
  const std::vector<int>& cores = physical_core_cpus();
  const auto core_of = [&](size_t worker) {
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(static_cast<size_t>(cores[worker % cores.size()]), &cpus);
    return cpus;
  };
  const auto refuse = [&](size_t worker, int error) {
    fail("--pin: the system refuses to bind thread {} to cpu {}: {}", worker, cores[worker % cores.size()],
         std::generic_category().message(error));
  };
  for (size_t i = 0; i < workers_.size(); ++i) {
    const cpu_set_t cpus = core_of(i + 1);
    const int error = pthread_setaffinity_np(workers_[i].native_handle(), sizeof cpus, &cpus);
    if (error != 0) refuse(i + 1, error);
  }
  Unpinned before;
  before.thread = static_cast<pid_t>(syscall(SYS_gettid));
  if (sched_getaffinity(0, sizeof before.cpus, &before.cpus) != 0) refuse(0, errno);
  const int error = set_cpus(0, core_of(0));
  if (error != 0) refuse(0, error);
  unpinned_ = before;
}

ThreadPool::~ThreadPool() {
  stop_workers();
  // The thread may have ended by now, or its cores were taken away: then there is nothing to give back.
  if (unpinned_) set_cpus(unpinned_->thread, unpinned_->cpus);
}

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
