// SPDX-License-Identifier: Apache-2.0
// A pool of worker threads for kernels: parallel_for with little latency (a short spin before sleeping),
// nested calls run inline, correct with more threads than cores. On request its threads are pinned to cores.
#pragma once
#include <sched.h>
#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>
#include <thread>
#include <type_traits>
#include <vector>

namespace kilin {

class ThreadPool {
 public:
  // threads >= 1 counts the calling thread. `pin` binds worker i to the i-th physical core this process may
  // run on (from the first again when there are more threads), the constructing thread, worker 0, included:
  // threads that it starts meanwhile inherit this. The destructor gives it back the cores it had. Throws
  // Error if threads < 1 or above 1,024, or if the system refuses to pin.
  explicit ThreadPool(int threads, bool pin = false);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls task(index, worker) for every index in [0, count) exactly once, on any worker in [0, size());
  // returns when all are done. Indices are handed out one at a time, in rising order. The first exception of
  // a task is rethrown here after all workers stopped. Called from inside a task, it runs inline on that
  // worker.
  template <class Task>
  void parallel_for(int64_t count, Task&& task) {  // NOLINT(cppcoreguidelines-missing-std-forward)
    using T = std::remove_reference_t<Task>;
    const auto call = [](const void* object, int64_t index, int worker) {
      (*static_cast<T*>(const_cast<void*>(object)))(index, worker);
    };
    run(count, call, &task);
  }

 private:
  // A plain pair of pointers instead of std::function: decode starts a hundred of these per token.
  using Call = void (*)(const void* task, int64_t index, int worker);
  void run(int64_t count, Call call, const void* task);
  void worker_loop(int worker);
  void run_indices(int worker);
  void stop_workers();
  void pin_threads();
  template <class Done>
  bool spin_until(const Done& done) const;

  // The constructing thread's cores before it was pinned.
  struct Unpinned {
    pid_t thread = 0;
    cpu_set_t cpus{};
  };

  // phase_ = epoch * 65536 + workers inside. An odd epoch is open: workers may join; closing it makes it
  // even. The caller waits only for workers that joined, so one that is asleep, or that the system has
  // descheduled, costs nothing.
  static constexpr uint64_t kEpoch = 65536;
  static bool open(uint64_t phase) { return phase / kEpoch % 2 == 1; }

  std::vector<std::thread> workers_;
  bool crowded_ = false;  // more threads than cores
  std::optional<Unpinned> unpinned_;
  std::mutex caller_mutex_;  // one parallel_for at a time
  std::mutex mutex_;         // of wake_ and error_
  std::condition_variable wake_;
  std::atomic<uint64_t> phase_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> next_{0};
  int64_t count_ = 0;
  Call call_ = nullptr;
  const void* task_ = nullptr;
  std::exception_ptr error_;
};

}  // namespace kilin
