// SPDX-License-Identifier: Apache-2.0
// The log of a run: a JSON object and a CSV line per record, in OUT/log.jsonl and OUT/log.csv.
#pragma once
#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>

namespace kilin::train {

// Missing values are left out of the JSON object and empty in the CSV.
struct LogRecord {
  int64_t step = 0;    // updates done
  int64_t tokens = 0;  // computed so far, all processes together
  double seconds = 0;  // since the run began, pauses between its parts left out
  std::optional<double> loss, accuracy, grad_norm, lr, tokens_per_second, share_of_peak;
  std::optional<double> valid_loss, valid_perplexity, valid_accuracy, valid_exact;
};

class RunLog {
 public:
  // Opens the files in `directory` for appending. Records of steps after `step`, which a run that is resumed
  // from there computes again, are removed first.
  RunLog(const std::string& directory, int64_t step);
  // Appends and hands it to the system: a killed process loses no record that it wrote.
  void write(const LogRecord& record);

 private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  using File = std::unique_ptr<std::FILE, Close>;
  static File open(const std::string& path);
  static void put(std::FILE* file, const std::string& path, const std::string& line);

  std::string json_path_, csv_path_;
  File json_, csv_;
};

// One record as the line of log.jsonl, without a newline; numbers with all their digits.
std::string json_line(const LogRecord& record);

}  // namespace kilin::train
