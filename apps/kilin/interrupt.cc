// SPDX-License-Identifier: Apache-2.0
#include "kilin/interrupt.h"

namespace kilin::cli {
namespace {

volatile std::sig_atomic_t interrupt_seen = 0;

void note_interrupt(int) { interrupt_seen = 1; }

}  // namespace

InterruptScope::InterruptScope() {
  interrupt_seen = 0;
  struct sigaction action {};
  action.sa_handler = note_interrupt;
  // Once only; and without SA_RESTART, so that waiting for input ends too.
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  sigaction(SIGINT, &action, &before_);
}

InterruptScope::~InterruptScope() { sigaction(SIGINT, &before_, nullptr); }

bool InterruptScope::interrupted() const { return interrupt_seen != 0; }

}  // namespace kilin::cli
