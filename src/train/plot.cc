// SPDX-License-Identifier: Apache-2.0
#include "train/plot.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "io/atomic_file.h"
#include "io/mapped_file.h"
#include "io/printable.h"

extern char** environ;

namespace kilin::train {
namespace {

// A file without a name in memory.
class MemoryFile {
 public:
  explicit MemoryFile(const char* name) : fd_(::memfd_create(name, 0)) {
    if (fd_ < 0) fail("plot: cannot make a file in memory: {}", io::errno_text(errno));
  }
  ~MemoryFile() { ::close(fd_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  int get() const { return fd_; }

  void write(std::string_view text) const {
    while (!text.empty()) {
      const ssize_t done = ::write(fd_, text.data(), text.size());
      if (done < 0 && errno == EINTR) continue;
      if (done < 0) fail("plot: cannot write to memory: {}", io::errno_text(errno));
      text.remove_prefix(static_cast<size_t>(done));
    }
  }
  void rewind() const { ::lseek(fd_, 0, SEEK_SET); }
  std::string content() const {
    rewind();
    std::string result;
    std::array<char, 1 << 16> buffer;
    for (ssize_t got = 0; (got = ::read(fd_, buffer.data(), buffer.size())) > 0;)
      result.append(buffer.data(), static_cast<size_t>(got));
    return result;
  }

 private:
  int fd_;
};

// Runs gnuplot, without a shell, with `script` as its standard input, and returns its standard output.
std::string run_gnuplot(const std::string& script) {
  const MemoryFile input("script"), output("plot"), errors("errors");
  input.write(script);
  input.rewind();
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, input.get(), STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, output.get(), STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, errors.get(), STDERR_FILENO);
  std::string program = "gnuplot";
  std::string from_stdin = "-";
  char* arguments[] = {program.data(), from_stdin.data(), nullptr};
  pid_t child = -1;
  const int status = ::posix_spawnp(&child, "gnuplot", &actions, nullptr, arguments, environ);
  posix_spawn_file_actions_destroy(&actions);
  if (status == ENOENT) fail("plot: gnuplot is not installed (Debian: apt-get install gnuplot-nox)");
  if (status != 0) fail("plot: cannot run gnuplot: {}", io::errno_text(status));
  int result = 0;
  while (::waitpid(child, &result, 0) < 0 && errno == EINTR) {
  }
  const bool good = WIFEXITED(result) && WEXITSTATUS(result) == 0;
  if (!good) fail("plot: gnuplot failed: {}", io::printable(errors.content(), 400));
  return output.content();
}

// A text between double quotes of gnuplot, with its markup switched off by 'noenhanced'.
std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c >= ' ' || c < 0 ? c : ' ';  // bytes of UTF-8 pass
  }
  return result + "\"";
}

std::string axis_label(const std::string& key) {
  if (key == "step") return "update";
  if (key == "loss") return "training loss (nats per token)";
  if (key == "valid_loss") return "validation loss (nats per token)";
  std::string text = key;
  std::replace(text.begin(), text.end(), '_', ' ');
  return text;
}

// The log of a run's directory (kept ones may have the log.csv alone), or the file itself.
std::string log_file(const std::string& given) {
  const std::filesystem::path path(given);
  std::error_code ignored;
  if (!std::filesystem::is_directory(path, ignored)) return given;
  const bool csv = !std::filesystem::exists(path / "log.jsonl", ignored) &&
                   std::filesystem::exists(path / "log.csv", ignored);
  return (path / (csv ? "log.csv" : "log.jsonl")).string();
}

// Calls f(line, its number) for each line that has its end.
template <class F>
void each_line(std::string_view text, const F& f) {
  int64_t number = 1;
  for (size_t begin = 0, end = 0; (end = text.find('\n', begin)) != std::string_view::npos; begin = end + 1)
    f(text.substr(begin, end - begin), number++);
}

void read_jsonl(std::string_view text, const std::string& path, const PlotOptions& options, Curve& curve) {
  each_line(text, [&](std::string_view line, int64_t number) {
    const auto record = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    const std::string place = fmt::format("{}:{}", path, number);
    check(record.is_object(), "{}: found no JSON object, expected a record of a training log", place);
    const auto x = record.find(options.x);
    const auto y = record.find(options.y);
    if (x == record.end() || y == record.end()) return;
    check(x->is_number() && y->is_number(), "{}: keys '{}' and '{}': expected numbers", place, options.x,
          options.y);
    curve.x.push_back(x->get<double>());
    curve.y.push_back(y->get<double>());
  });
}

std::vector<std::string_view> fields_of(std::string_view line) {
  std::vector<std::string_view> fields;
  for (size_t begin = 0; begin <= line.size();) {
    const size_t end = std::min(line.find(',', begin), line.size());
    fields.push_back(line.substr(begin, end - begin));
    begin = end + 1;
  }
  return fields;
}

void read_csv(std::string_view text, const std::string& path, const PlotOptions& options, Curve& curve) {
  size_t x = 0, y = 0, columns = 0;
  const auto number_of = [&](std::string_view field, int64_t line) {
    double value = 0;
    const auto [end, error] = std::from_chars(field.data(), field.data() + field.size(), value);
    check(error == std::errc{} && end == field.data() + field.size(), "{}:{}: found '{}', expected a number",
          path, line, io::printable(field));
    return value;
  };
  each_line(text, [&](std::string_view line, int64_t number) {
    const auto fields = fields_of(line);
    if (number == 1) {
      columns = fields.size();
      x = static_cast<size_t>(std::find(fields.begin(), fields.end(), options.x) - fields.begin());
      y = static_cast<size_t>(std::find(fields.begin(), fields.end(), options.y) - fields.begin());
      return;
    }
    check(fields.size() == columns, "{}:{}: found {} fields, expected the {} of the first line", path, number,
          fields.size(), columns);
    if (x == columns || y == columns || fields[x].empty() || fields[y].empty()) return;
    curve.x.push_back(number_of(fields[x], number));
    curve.y.push_back(number_of(fields[y], number));
  });
}

}  // namespace

Curve read_curve(const std::string& given, const PlotOptions& options) {
  const std::string path = log_file(given);
  const io::MappedFile file(path);
  Curve curve;
  if (path.ends_with(".csv")) {
    read_csv(file.text(), path, options, curve);
  } else {
    read_jsonl(file.text(), path, options, curve);
  }
  check(!curve.x.empty(), "{}: no record has both '{}' and '{}'", path, options.x, options.y);
  const std::filesystem::path absolute = std::filesystem::absolute(path).lexically_normal();
  const bool of_run = absolute.filename() == "log.jsonl" || absolute.filename() == "log.csv";
  curve.label = of_run ? absolute.parent_path().filename().string() : absolute.stem().string();
  return curve;
}

std::string plot_script(const std::vector<Curve>& curves, const PlotOptions& options,
                        const std::string& terminal) {
  std::string script = fmt::format("set terminal {} size {},{} noenhanced font \"Helvetica,12\"\n", terminal,
                                   options.width, options.height);
  script += "set grid\nset key outside right top\n";
  script +=
      "set xlabel " + quoted(axis_label(options.x)) + "\nset ylabel " + quoted(axis_label(options.y)) + "\n";
  if (!options.title.empty()) script += "set title " + quoted(options.title) + "\n";
  if (options.log_y) script += "set logscale y\n";
  const bool share =
      options.y.find("accuracy") != std::string::npos || options.y.find("exact") != std::string::npos;
  if (share) script += "set yrange [0:1.02]\n";
  for (size_t i = 0; i < curves.size(); ++i) {
    script += fmt::format("$curve{} << END_OF_CURVE\n", i);
    for (size_t k = 0; k < curves[i].x.size(); ++k)
      script += fmt::format("{} {}\n", curves[i].x[k], curves[i].y[k]);
    script += "END_OF_CURVE\n";
  }
  script += "plot ";
  for (size_t i = 0; i < curves.size(); ++i) {
    const char* style = curves[i].x.size() < 40 ? "linespoints pointsize 0.6" : "lines";
    script += fmt::format("{}$curve{} using 1:2 with {} linewidth 2 title {}", i > 0 ? ", " : "", i, style,
                          quoted(curves[i].label));
  }
  return script + "\n";
}

void draw_plot(const std::vector<Curve>& curves, const PlotOptions& options, const std::string& path) {
  const bool svg = path.ends_with(".svg");
  check(svg || path.ends_with(".png"), "{}: expected a name that ends in .svg or .png", path);
  const std::string picture = run_gnuplot(plot_script(curves, options, svg ? "svg" : "pngcairo"));
  check(!picture.empty(), "plot: gnuplot drew nothing (has it the terminal {}?)", svg ? "svg" : "pngcairo");
  io::AtomicFile file(path);
  file.write(picture);
  file.commit();
}

}  // namespace kilin::train
