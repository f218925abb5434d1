// SPDX-License-Identifier: Apache-2.0
#include "train/run_directory.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "io/atomic_file.h"
#include "io/json.h"

namespace kilin::train {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kPrefix = "step-";
constexpr const char* kStateFile = "trainer_state.json";
constexpr const char* kWriting = ".writing-";
constexpr const char* kRemoving = ".removing-";
constexpr int64_t kFormat = 1;
constexpr int64_t kMost = std::numeric_limits<int64_t>::max();

std::optional<int64_t> step_of(const std::string& name) {
  if (!name.starts_with(kPrefix)) return std::nullopt;
  int64_t step = 0;
  const char* begin = name.data() + kPrefix.size();
  const auto [end, error] = std::from_chars(begin, name.data() + name.size(), step);
  if (error != std::errc{} || end != name.data() + name.size() || step < 0) return std::nullopt;
  return step;
}

// A rename is only safe against power loss once its directory is on the disk.
void sync_directory(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;
  (void)::fsync(fd);
  ::close(fd);
}

void rename(const fs::path& from, const fs::path& to) {
  std::error_code error;
  fs::rename(from, to, error);
  check(!error, "{}: cannot rename '{}' to it: {}", to.string(), from.string(), error.message());
}

}  // namespace

std::string to_json(const TrainerState& state) {
  nlohmann::ordered_json json;
  json["format"] = kFormat;
  json["step"] = state.step;
  json["tokens"] = state.tokens;
  json["seconds"] = state.seconds;
  json["loss_sum"] = state.loss_sum;
  json["accuracy_sum"] = state.accuracy_sum;
  json["loss_steps"] = state.loss_steps;
  json["tail_sum"] = state.tail_sum;
  json["tail_steps"] = state.tail_steps;
  json["config"] = state.config;
  return json.dump(1) + "\n";
}

TrainerState read_trainer_state(const std::string& file) {
  const auto json = io::JsonReader::open(file);
  json.integer("format", kFormat, kFormat);
  TrainerState state;
  state.step = json.integer("step", 0, kMost);
  state.tokens = json.integer("tokens", 0, kMost);
  state.seconds = json.number("seconds", 0);
  state.loss_sum = json.number("loss_sum");
  state.accuracy_sum = json.number("accuracy_sum");
  state.loss_steps = json.integer("loss_steps", 0, kMost);
  state.tail_sum = json.number("tail_sum");
  state.tail_steps = json.integer("tail_steps", 0, kMost);
  const auto config = json.object("config");
  for (const std::string& key : config.keys()) state.config[key] = config.string(key);
  return state;
}

RunDirectory::RunDirectory(std::string path) : path_(std::move(path)) {
  std::error_code error;
  fs::create_directories(path_, error);
  check(!error && fs::is_directory(path_), "{}: cannot make the directory of the run: {}", path_,
        error ? error.message() : "it is a file");
}

std::string RunDirectory::state_file(const std::string& checkpoint) { return checkpoint + "/" + kStateFile; }

std::string RunDirectory::checkpoint(int64_t step) const {
  return fmt::format("{}/{}{:06}", path_, kPrefix, step);
}

std::string RunDirectory::temporary(int64_t step) const {
  return fmt::format("{}/{}{}{:06}", path_, kWriting, kPrefix, step);
}

std::vector<int64_t> RunDirectory::checkpoints() const {
  std::vector<int64_t> steps;
  for (const fs::directory_entry& entry : fs::directory_iterator(path_)) {
    const auto step = step_of(entry.path().filename().string());
    std::error_code ignored;
    if (step && fs::is_regular_file(entry.path() / kStateFile, ignored)) steps.push_back(*step);
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

std::optional<int64_t> RunDirectory::latest() const {
  const std::vector<int64_t> steps = checkpoints();
  return steps.empty() ? std::nullopt : std::optional(steps.back());
}

void RunDirectory::clean() const {
  std::vector<fs::path> left;
  for (const fs::directory_entry& entry : fs::directory_iterator(path_)) {
    const std::string name = entry.path().filename().string();
    const bool log = name.starts_with("log.") && name.find(".tmp-") != std::string::npos;
    if (name.starts_with(kWriting) || name.starts_with(kRemoving) || log) left.push_back(entry.path());
  }
  for (const fs::path& path : left) {
    std::error_code error;
    fs::remove_all(path, error);
    check(!error, "{}: cannot remove: {}", path.string(), error.message());
  }
}

std::string RunDirectory::begin(int64_t step) const {
  std::string path = temporary(step);
  std::error_code error;
  fs::remove_all(path, error);
  if (!error) fs::create_directory(path, error);
  check(!error, "{}: cannot make the directory: {}", path, error.message());
  return path;
}

void RunDirectory::commit(const TrainerState& state, int64_t keep) const {
  const std::string from = temporary(state.step);
  io::AtomicFile file(state_file(from));
  file.write(to_json(state));
  file.commit();
  sync_directory(from);
  // A checkpoint of the same step is there when a run stops right where it began; the two are equal.
  const std::vector<int64_t> before = checkpoints();
  if (std::find(before.begin(), before.end(), state.step) != before.end()) remove(state.step);
  rename(from, checkpoint(state.step));
  sync_directory(path_);
  std::vector<int64_t> steps = checkpoints();
  while (static_cast<int64_t>(steps.size()) > keep && steps.front() != state.step) {
    remove(steps.front());
    steps.erase(steps.begin());
  }
}

// Renamed first: a checkpoint that is half removed must not look like one.
void RunDirectory::remove(int64_t step) const {
  const std::string away = fmt::format("{}/{}{}{:06}", path_, kRemoving, kPrefix, step);
  std::error_code error;
  fs::remove_all(away, error);
  rename(checkpoint(step), away);
  fs::remove_all(away, error);
  check(!error, "{}: cannot remove: {}", away, error.message());
}

}  // namespace kilin::train
