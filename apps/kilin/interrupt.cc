// SPDX-License-Identifier: Apache-2.0
#include "kilin/interrupt.h"

#include <time.h>

#include <cstdint>

namespace kilin::cli {
namespace {

// `timeout -s INT` and terminals with wrappers deliver one wish twice; a person needs longer for a second
// one.
constexpr int64_t kSameWishMilliseconds = 250;

volatile std::sig_atomic_t interrupt_seen = 0;
volatile int64_t first_interrupt = 0;

int64_t milliseconds_now() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<int64_t>(now.tv_sec) * 1000 + now.tv_nsec / 1'000'000;
}

// Only calls that signal handlers may make.
void note_interrupt(int) {
  const int64_t now = milliseconds_now();
  if (interrupt_seen == 0) {
    first_interrupt = now;
    interrupt_seen = 1;
  } else if (now - first_interrupt > kSameWishMilliseconds) {
    std::signal(SIGINT, SIG_DFL);
    std::raise(SIGINT);
  }
}

}  // namespace

InterruptScope::InterruptScope() {
  interrupt_seen = 0;
  struct sigaction action {};
  action.sa_handler = note_interrupt;
  // Without SA_RESTART, so that waiting for input ends too.
  sigaction(SIGINT, &action, &before_);
}

InterruptScope::~InterruptScope() { sigaction(SIGINT, &before_, nullptr); }

bool InterruptScope::interrupted() const { return interrupt_seen != 0; }

}  // namespace kilin::cli
