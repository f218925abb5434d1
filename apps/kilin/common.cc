// SPDX-License-Identifier: Apache-2.0
#include "kilin/common.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <limits>
#include <system_error>

#include "base/error.h"
#include "io/gguf.h"
#include "io/printable.h"
#include "kilin/help.h"
#include "text/utf8.h"

namespace kilin::cli {
namespace {

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  ~FileDescriptor() {
    if (fd_ > STDERR_FILENO) close(fd_);
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

// Texts are held in memory, several times over once they are tokens; an endless pipe must not take it all.
constexpr size_t kMaxInputBytes = size_t{1} << 30;

std::string read_all(int fd, const std::string& name) {
  std::string content;
  std::array<char, 1 << 16> buffer;
  while (true) {
    const ssize_t count = read(fd, buffer.data(), buffer.size());
    if (count > 0) content.append(buffer.data(), static_cast<size_t>(count));
    check(content.size() <= kMaxInputBytes, "{}: found more than {} bytes of input, expected at most that",
          name, kMaxInputBytes);
    if (count == 0) return content;
    check(count > 0 || errno == EINTR, "{}: {}", name, io::errno_text(errno));
  }
}

bool has_tokenizer(const std::string& model) {
  std::error_code ignored;
  if (io::GgufFile::is_gguf(model)) {
    return io::GgufFile::open(model).get_string("tokenizer.ggml.model", "none") != "none";
  }
  const std::filesystem::path path(model);
  return std::filesystem::exists(path / "tokenizer.json", ignored) ||
         std::filesystem::exists(path / "tiktoken.model", ignored);
}

}  // namespace

void add_model_argument(const App& app, ModelArguments& arguments) {
  app.add_option("MODEL", arguments.path, "Hugging Face directory or GGUF file of a Kimi Linear model")
      .required();
}

void add_threads_option(const App& app, int& threads) {
  app.add_option("--threads", threads, "threads to compute with (default: the physical cores)")
      .type_name("N")
      .check(in_range(1, 1024, "a whole number from 1 to 1024"))
      .group("Engine");
}

void add_cache_options(const App& app, ModelArguments& arguments) {
  app.add_option(
         "--cache-type", arguments.cache_type,
         "keep positions of latent attention as f16 (half the memory), bf16 (as rounded attention reads "
         "them), or f32 (exact); auto: bf16 where attention is rounded, else f16")
      .type_name("TYPE")
      .check(one_of({"auto", "f16", "bf16", "f32"}))
      .capture_default_str()
      .group("Engine");
  app.add_option(
         "--activations", arguments.activations,
         "exact, or rounded to 8 bits as llama.cpp does (faster without AMX); auto: rounded if weights are")
      .type_name("HOW")
      .check(one_of({"auto", "exact", "rounded"}))
      .capture_default_str()
      .group("Engine");
  app.add_flag("--pin", arguments.pin, "bind each thread to a core").group("Engine");
}

void add_engine_options(const App& app, ModelArguments& arguments) {
  add_threads_option(app, arguments.threads);
  app.add_option("--device", arguments.device, "cpu or cuda")
      .type_name("D")
      .check(one_of({"cpu", "cuda"}))
      .capture_default_str()
      .group("Engine");
  app.add_option("--compat", arguments.compatibility,
                 "agree with 'transformers', 'remote-code' (modeling_kimi.py) or 'vllm' where these differ")
      .type_name("NAME")
      .check(one_of({"transformers", "remote-code", "vllm"}))
      .capture_default_str()
      .group("Engine");
  app.add_option("--prefill-chunk", arguments.prefill_chunk,
                 "prompt tokens computed at once: more is faster and takes more memory")
      .type_name("N")
      .check(in_range(1, 1 << 20, "a whole number from 1 to 1048576"))
      .capture_default_str()
      .group("Engine");
  add_cache_options(app, arguments);
  app.add_option("--lora", arguments.lora,
                 "add a LoRA adapter (a PEFT directory), times SCALE; may be given several times")
      .type_name("DIR[:SCALE]")
      .check(not_empty())
      .one_value_each()
      .group("Engine");
}

LoraSource lora_source(const std::string& text) {
  std::error_code ignored;
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos || std::filesystem::is_directory(text, ignored)) return {text, 1.0};
  const char* const begin = text.data() + colon + 1;
  const char* const end = text.data() + text.size();
  LoraSource source{text.substr(0, colon), 0.0};
  const auto [at, error] = std::from_chars(begin, end, source.scale);
  const bool number = error == std::errc{} && at == end && std::isfinite(source.scale);
  check(number, "{}: no such directory, and found '{}' as its scale, expected a number", text,
        std::string(begin, end));
  return source;
}

ModelOptions model_options(const ModelArguments& arguments) {
  check(arguments.device != "cuda", "--device cuda: this kilin was built without CUDA");
  ModelOptions options;
  options.threads = arguments.threads;
  options.compatibility = arguments.compatibility;
  options.prefill_chunk = arguments.prefill_chunk;
  options.cache_type = arguments.cache_type;
  options.activations = arguments.activations;
  options.pin_threads = arguments.pin;
  for (const std::string& text : arguments.lora) options.lora.push_back(lora_source(text));
  return options;
}

Model load_model(const ModelArguments& arguments, bool need_tokenizer) {
  ModelOptions options = model_options(arguments);
  options.require_tokenizer = need_tokenizer || has_tokenizer(arguments.path);
  return Model::load(arguments.path, options);
}

void add_sampling_options(const App& app, SamplingOptions& sampling) {
  const auto add = [&](const char* name, auto& value, const char* text, const char* type) {
    return app.add_option(name, value, text).type_name(type).capture_default_str().group("Sampling");
  };
  add("--temperature", sampling.temperature, "0: always the most likely token; higher: more varied", "T")
      .check(in_range(0, 1000, "a number from 0 to 1000"));
  add("--top-k", sampling.top_k, "only the K most likely tokens; 0: all", "K")
      .check(in_range(0, std::numeric_limits<int>::max(), "a whole number from 0"));
  add("--top-p", sampling.top_p, "only the likeliest tokens that hold this share of probability; 1: all", "P")
      .check(in_range(1e-9, 1, "a number above 0, up to 1"));
  add("--min-p", sampling.min_p, "only tokens at least P times as likely as the best; 0: all", "P")
      .check(in_range(0, 1, "a number from 0 to 1"));
  add("--repetition-penalty", sampling.repetition_penalty, "above 1: tokens seen are less likely; 1: off",
      "R")
      .check(in_range(1e-6, 1e3, "a number above 0, up to 1000"));
  add("--seed", sampling.seed, "of the random numbers: the same seed gives the same text", "N")
      .check(seed_number());
}

std::string read_input(const std::string& path) {
  if (path == "-") return read_all(STDIN_FILENO, "standard input");
  const FileDescriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  check(file.get() >= 0, "{}: {}", path.empty() ? "(empty file name)" : path, io::errno_text(errno));
  return read_all(file.get(), path);
}

void check_text(std::string_view text, std::string_view what) { text::check_utf8(text, what); }

}  // namespace kilin::cli
