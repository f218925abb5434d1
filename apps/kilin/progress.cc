// SPDX-License-Identifier: Apache-2.0
#include "kilin/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "kilin/format.h"
#include "kilin/output.h"

namespace kilin::cli {
namespace {

constexpr auto kQuietStart = std::chrono::milliseconds(500);
constexpr auto kRedraw = std::chrono::milliseconds(100);
constexpr auto kLogEvery = std::chrono::seconds(5);

void print(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stderr);
  std::fflush(stderr);
}

}  // namespace

Progress::Progress(std::string label, int64_t total, std::string unit, bool enabled)
    : label_(std::move(label)),
      total_(total),
      unit_(std::move(unit)),
      enabled_(enabled),
      terminal_(is_terminal(STDERR_FILENO)),
      next_(start_ + kQuietStart) {}

Progress::~Progress() { finish(); }

std::string Progress::line(int64_t done, double seconds, const std::string& note) const {
  const double rate = static_cast<double>(done) / seconds;
  std::string text = fmt::format("{}  {} / {} {}", label_, with_commas(done), with_commas(total_), unit_);
  if (done > 0) {
    text += fmt::format("  {}  {} {}/s", percent(static_cast<double>(done) / static_cast<double>(total_)),
                        human_rate(rate), unit_);
    text += fmt::format("  {} left", human_duration(static_cast<double>(total_ - done) / rate));
  }
  return note.empty() ? text : text + "  " + note;
}

void Progress::update(int64_t done, const std::string& note) {
  const auto now = Clock::now();
  if (!enabled_ || total_ <= 0 || now < next_) return;
  next_ = now + (terminal_ ? Clock::duration(kRedraw) : Clock::duration(kLogEvery));
  const std::string text = line(done, std::chrono::duration<double>(now - start_).count(), note);
  print(terminal_ ? "\r\x1b[K" + text : text + "\n");
  drawn_ = true;
}

void Progress::finish() {
  if (drawn_ && terminal_) print("\r\x1b[K");
  drawn_ = false;
  enabled_ = false;
}

bool progress_by_default() { return is_terminal(STDERR_FILENO); }

}  // namespace kilin::cli
