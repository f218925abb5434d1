// SPDX-License-Identifier: Apache-2.0
#include "train/run_log.h"

#include <cerrno>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "io/atomic_file.h"
#include "io/mapped_file.h"
#include "io/printable.h"

namespace kilin::train {
namespace {

struct Column {
  const char* name;
  std::optional<double> LogRecord::*value;
};

constexpr Column kColumns[] = {
    {"loss", &LogRecord::loss},
    {"accuracy", &LogRecord::accuracy},
    {"grad_norm", &LogRecord::grad_norm},
    {"lr", &LogRecord::lr},
    {"tokens_per_second", &LogRecord::tokens_per_second},
    {"share_of_peak", &LogRecord::share_of_peak},
    {"valid_loss", &LogRecord::valid_loss},
    {"valid_perplexity", &LogRecord::valid_perplexity},
    {"valid_accuracy", &LogRecord::valid_accuracy},
    {"valid_exact", &LogRecord::valid_exact},
};

std::string csv_header() {
  std::string line = "step,tokens,seconds";
  for (const Column& column : kColumns) line += std::string(",") + column.name;
  return line + "\n";
}

std::string csv_line(const LogRecord& record) {
  std::string line = fmt::format("{},{},{}", record.step, record.tokens, record.seconds);
  for (const Column& column : kColumns) {
    const auto& value = record.*column.value;
    line += value ? fmt::format(",{}", *value) : ",";
  }
  return line + "\n";
}

// The step of a line of either file; none for headers and for a line that a crash left half-written.
std::optional<int64_t> step_of(std::string_view line) {
  constexpr std::string_view kKey = "{\"step\":";
  if (line.starts_with(kKey)) line.remove_prefix(kKey.size());
  int64_t step = 0;
  const auto [end, error] = std::from_chars(line.data(), line.data() + line.size(), step);
  if (error != std::errc{} || end == line.data() + line.size() || *end != ',') return std::nullopt;
  return step;
}

void keep_up_to(const std::string& path, int64_t last, const std::string& header) {
  std::error_code ignored;
  std::string kept = header;
  if (std::filesystem::exists(path, ignored)) {
    const io::MappedFile file(path);
    std::string_view text = file.text();
    for (size_t end = text.find('\n'); end != std::string_view::npos; end = text.find('\n')) {
      const auto step = step_of(text.substr(0, end));
      if (step && *step <= last) kept.append(text.substr(0, end + 1));
      text.remove_prefix(end + 1);
    }
  }
  io::AtomicFile file(path);
  file.write(kept);
  file.commit();
}

}  // namespace

std::string json_line(const LogRecord& record) {
  nlohmann::ordered_json json;
  json["step"] = record.step;
  json["tokens"] = record.tokens;
  json["seconds"] = record.seconds;
  for (const Column& column : kColumns) {
    const auto& value = record.*column.value;
    if (value && std::isfinite(*value)) json[column.name] = *value;
  }
  return json.dump();
}

RunLog::RunLog(const std::string& directory, int64_t step)
    : json_path_(directory + "/log.jsonl"), csv_path_(directory + "/log.csv") {
  keep_up_to(json_path_, step, "");
  keep_up_to(csv_path_, step, csv_header());
  json_ = open(json_path_);
  csv_ = open(csv_path_);
}

RunLog::File RunLog::open(const std::string& path) {
  File file(std::fopen(path.c_str(), "ae"));
  if (!file) fail("{}: cannot write: {}", path, io::errno_text(errno));
  return file;
}

void RunLog::put(std::FILE* file, const std::string& path, const std::string& line) {
  const bool written =
      std::fwrite(line.data(), 1, line.size(), file) == line.size() && std::fflush(file) == 0;
  if (!written) fail("{}: cannot write: {}", path, io::errno_text(errno));
}

void RunLog::write(const LogRecord& record) {
  put(json_.get(), json_path_, json_line(record) + "\n");
  put(csv_.get(), csv_path_, csv_line(record));
}

}  // namespace kilin::train
