// SPDX-License-Identifier: Apache-2.0
#include "io/checkpoint.h"

#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "base/error.h"
#include "io/json.h"
#include "io/printable.h"

namespace kilin::io {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";

using ShardTensors = std::map<std::string, std::set<std::string, std::less<>>>;  // by shard

// A shard name comes from a downloaded file: it must not lead out of the checkpoint's directory.
bool is_plain_file_name(std::string_view name) {
  return !name.empty() && name != "." && name.find('/') == name.npos && name.find('\\') == name.npos &&
         name.find("..") == name.npos && name.find('\0') == name.npos;
}

ShardTensors read_index(const std::string& index_path) {
  const JsonReader index = JsonReader::open(index_path);
  const JsonReader map = index.object("weight_map");
  ShardTensors shards;
  for (const std::string& tensor : map.keys()) {
    const auto& value = map.value(tensor);
    constexpr std::string_view kExpected = "the name of a file in the same directory";
    if (!value.is_string() || !is_plain_file_name(value.get_ref<const std::string&>()))
      map.refuse(tensor, kExpected);
    shards[value.get_ref<const std::string&>()].insert(tensor);
  }
  check(!shards.empty(), "{}: key 'weight_map': found no tensors, expected at least one", index_path);
  return shards;
}

}  // namespace

Checkpoint Checkpoint::open(const std::string& path) {
  Checkpoint result;
  result.path_ = path;
  std::error_code ignored;
  if (fs::is_directory(path, ignored)) {
    const fs::path directory(path);
    // Where a directory has both, transformers reads the single file: so do we.
    if (fs::exists(directory / kSingleFile, ignored)) {
      result.add_file(SafetensorsFile::open(directory / kSingleFile));
    } else if (fs::exists(directory / kIndexFile, ignored)) {
      result.add_shards(path, directory / kIndexFile);
    } else {
      fail("{}: found neither {} nor {} in this directory, expected one of them", path, kSingleFile,
           kIndexFile);
    }
  } else if (GgufFile::is_gguf(path) || path.ends_with(".gguf")) {
    result.add_file(GgufFile::open(path));
  } else {
    result.add_file(SafetensorsFile::open(path));
  }
  for (const auto& [name, file] : result.file_of_) result.names_.push_back(name);
  return result;
}

void Checkpoint::add_file(File file) {
  const auto& names = std::visit(
      [](const auto& f) -> const auto& { return f.names(); }, file);
  for (const std::string& name : names) file_of_.emplace(name, files_.size());
  files_.push_back(std::move(file));
}

void Checkpoint::add_shards(const std::string& directory, const std::string& index_path) {
  for (const auto& [shard, tensors] : read_index(index_path)) {
    const std::string shard_path = fs::path(directory) / shard;
    std::error_code error;
    check(fs::exists(shard_path, error),
          "{}: tensor '{}': shard '{}': found no such file, expected it in '{}'", index_path,
          printable(*tensors.begin()), printable(shard), directory);
    SafetensorsFile file = SafetensorsFile::open(shard_path);
    for (const std::string& tensor : tensors) {
      check(file.contains(tensor), "{}: tensor '{}': found no such tensor in shard '{}', expected it there",
            index_path, printable(tensor), printable(shard));
    }
    for (const std::string& tensor : file.names()) {
      check(tensors.contains(tensor), "{}: tensor '{}': found in the shard, expected '{}' to list it there",
            shard_path, printable(tensor), index_path);
    }
    add_file(std::move(file));
  }
}

const TensorView* Checkpoint::find(std::string_view name) const {
  const auto at = file_of_.find(name);
  if (at == file_of_.end()) return nullptr;
  return std::visit([name](const auto& file) { return file.find(name); }, files_[at->second]);
}

const TensorView& Checkpoint::get(std::string_view name) const {
  const TensorView* view = find(name);
  check(view != nullptr, "{}: tensor '{}': found nothing of that name among {} tensors", path_,
        printable(name), names_.size());
  return *view;
}

std::vector<std::string> Checkpoint::files() const {
  if (const GgufFile* file = gguf()) return file->files();
  std::vector<std::string> paths;
  for (const File& file : files_) paths.push_back(std::get<SafetensorsFile>(file).path());
  return paths;
}

uint64_t Checkpoint::total_bytes() const {
  uint64_t total = 0;
  for (const File& file : files_) total += std::visit([](const auto& f) { return f.data_bytes(); }, file);
  return total;
}

const GgufFile* Checkpoint::gguf() const {
  return files_.empty() ? nullptr : std::get_if<GgufFile>(&files_.front());
}

void Checkpoint::advise(Access access) const {
  for (const File& file : files_) std::visit([access](const auto& f) { f.advise(access); }, file);
}

}  // namespace kilin::io
