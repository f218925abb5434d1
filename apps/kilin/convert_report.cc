// SPDX-License-Identifier: Apache-2.0
#include "kilin/convert_report.h"

#include <fmt/format.h>

#include <functional>
#include <map>
#include <optional>

#include "kilin/common.h"
#include "kilin/format.h"
#include "kilin/interrupt.h"
#include "kilin/output.h"
#include "kilin/progress.h"

namespace kilin::cli {
namespace {

std::string sizes(const ConvertReport& report) {
  std::string after = human_bytes(static_cast<double>(report.target_bytes));
  if (report.source_bytes == 0) return after;
  return fmt::format(
      "{} -> {} ({})", human_bytes(static_cast<double>(report.source_bytes)), after,
      percent(static_cast<double>(report.target_bytes) / static_cast<double>(report.source_bytes)));
}

// "Q4_K 71 %, Q8_0 20 %, F32 9 %" of the bytes, the largest share first.
std::string shares(const ConvertReport& report) {
  std::multimap<uint64_t, Dtype, std::greater<>> by_size;
  for (const auto& [dtype, share] : report.shares) by_size.emplace(share.bytes, dtype);
  std::string text;
  for (const auto& [bytes, dtype] : by_size) {
    const double share = static_cast<double>(bytes) / static_cast<double>(report.target_bytes);
    text += fmt::format("{}{} {}", text.empty() ? "" : ", ", dtype_name(dtype), percent(share));
  }
  return text;
}

}  // namespace

int run_conversion(const std::string& label, const std::string& target, bool progress, ConvertOptions options,
                   const std::function<ConvertReport(const ConvertOptions&)>& work) {
  const Stopwatch clock;
  const InterruptScope interrupt;
  std::optional<Progress> line;
  options.progress = [&](int64_t done, int64_t total) {
    if (!line) line.emplace(label, total, "weights", progress || progress_by_default());
    line->update(done);
    return !interrupt.interrupted();
  };
  const ConvertReport report = work(options);
  line.reset();
  for (const std::string& note : report.notes) log_line("note: " + note);
  if (report.cancelled) {
    log_line(fmt::format("cancelled; nothing was written to {}", target));
    return kInterruptedExit;
  }
  if (report.fallbacks > 0) {
    log_line(fmt::format(
        "{} tensors have rows that the blocks of the wanted type do not fill; they have a wider one",
        with_commas(report.fallbacks)));
  }
  for (const auto& [dtype, loss] : report.losses) {
    log_line(fmt::format(
        "{} is off by {:.2g} % (root mean square; {:.2g} % in {}), at most {} of the format's bound",
        dtype_name(dtype), 100 * loss.relative, 100 * loss.worst, loss.worst_tensor, percent(loss.of_bound)));
  }
  log_line(fmt::format("wrote {}: {}; {} of the bytes; {}", target, sizes(report), shares(report),
                       human_duration(clock.seconds())));
  return 0;
}

}  // namespace kilin::cli
