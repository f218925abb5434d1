// SPDX-License-Identifier: Apache-2.0
#include "io/output_directory.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <system_error>

#include "base/error.h"
#include "io/atomic_file.h"

namespace kilin::io {
namespace {

namespace fs = std::filesystem;

constexpr int kNameAttempts = 100;

// What a reader of the directory would take for a part of the model.
bool is_model_file(const std::string& name) {
  return name.ends_with(".safetensors") || name == "model.safetensors.index.json" || name == "config.json" ||
         name == "adapter_config.json" || name == "generation_config.json" || name == "tokenizer.json" ||
         name == "tokenizer_config.json" || name == "special_tokens_map.json" || name == "tiktoken.model" ||
         name == "chat_template.jinja";
}

void make_directory(const fs::path& path) {
  std::error_code error;
  const bool made = fs::create_directory(path, error);
  check(made, "{}: cannot make the directory: {}", path.string(),
        error ? error.message() : std::string("it exists"));
}

// A name beside `path` that nothing has yet
fs::path free_name(const fs::path& path, const char* what) {
  for (int attempt = 0; attempt < kNameAttempts; ++attempt) {
    fs::path name = path;
    name += fmt::format(".{}-{}-{}", what, ::getpid(), attempt);
    if (!fs::exists(fs::symlink_status(name))) return name;
  }
  fail("{}: found no free name beside it", path.string());
}

void rename_directory(const fs::path& from, const fs::path& to) {
  std::error_code error;
  fs::rename(from, to, error);
  check(!error, "{}: cannot rename '{}' to it: {}", to.string(), from.string(), error.message());
}

}  // namespace

OutputDirectory::OutputDirectory(fs::path path, bool overwrite, Appears appears)
    : path_(std::move(path)), written_(path_) {
  check(!path_.empty(), "(empty file name): expected a directory to write to");
  if (!path_.has_filename()) path_ = path_.parent_path();  // "model/"
  written_ = path_;
  const fs::file_status status = fs::status(path_);
  if (fs::exists(status)) {
    check(fs::is_directory(status), "{}: is a file, expected a directory to write to", path_.string());
    if (fs::is_empty(path_) && appears == Appears::kInPlace) return;
    check(fs::is_empty(path_) || overwrite, "{}: is not empty (--force overwrites the model in it)",
          path_.string());
    path_ = fs::canonical(path_);  // a link to a directory stays one
    written_ = free_name(path_, "new");
  } else if (appears == Appears::kAtOnce) {
    written_ = free_name(path_, "new");
  }
  make_directory(written_);
  created_ = true;
  std::error_code ignored;
  if (written_ != path_ && fs::exists(status)) fs::permissions(written_, status.permissions(), ignored);
}

OutputDirectory::~OutputDirectory() {
  if (committed_) return;
  std::error_code ignored;
  for (const fs::path& file : files_) fs::remove(file, ignored);
  if (created_) fs::remove(written_, ignored);
}

std::string OutputDirectory::add(const std::string& name) {
  files_.push_back(written_ / name);
  return files_.back().string();
}

void OutputDirectory::write(const std::string& name, std::string_view text) {
  AtomicFile file(add(name));
  file.write(text);
  file.commit();
}

void OutputDirectory::commit() {
  if (written_ != path_ && fs::exists(path_)) {
    exchange();
  } else {
    if (written_ != path_) rename_directory(written_, path_);
    committed_ = true;
  }
}

void OutputDirectory::exchange() {
  fs::path old = written_;
  if (::renameat2(AT_FDCWD, written_.c_str(), AT_FDCWD, path_.c_str(), RENAME_EXCHANGE) != 0) {
    // Not every file system can do both renames at once: between two the models have other names for a
    // moment.
    old = free_name(path_, "old");
    rename_directory(path_, old);
    try {
      rename_directory(written_, path_);
    } catch (const Error&) {
      rename_directory(old, path_);
      throw;
    }
  }
  committed_ = true;
  // From here on the new model has its name: what cannot be moved or removed stays, and is named.
  std::vector<fs::path> others;
  for (const fs::directory_entry& entry : fs::directory_iterator(old)) {
    if (!is_model_file(entry.path().filename().string())) others.push_back(entry.path());
  }
  for (const fs::path& other : others) rename_directory(other, path_ / other.filename());
  std::error_code error;
  fs::remove_all(old, error);
  check(!error, "{}: the new model is complete, but the old one cannot be removed: {}", old.string(),
        error.message());
}

}  // namespace kilin::io
