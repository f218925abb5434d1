// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace kilin::io {

// A model directory that is made. Where there is none, or an empty one, its files appear in it (config.json
// last: without it the directory is no model). Where there is one already, all is written into a new
// directory beside it, and commit() exchanges the two: at every moment a complete model exists under one of
// the names. Files that are no part of a model move over from the old one, which is removed then. Without
// commit() what was written disappears again and an old model stays untouched.
class OutputDirectory {
 public:
  // kInPlace: a new directory fills up under its name. kAtOnce: nothing has the name before commit().
  enum class Appears { kInPlace, kAtOnce };

  // Throws Error if `path` is a file, cannot be made, or is not empty without `overwrite`.
  OutputDirectory(std::filesystem::path path, bool overwrite, Appears appears = Appears::kInPlace);
  ~OutputDirectory();
  OutputDirectory(const OutputDirectory&) = delete;
  OutputDirectory& operator=(const OutputDirectory&) = delete;

  // Where to write the file of this name
  std::string add(const std::string& name);
  void write(const std::string& name, std::string_view text);
  void commit();

 private:
  void exchange();

  std::filesystem::path path_;     // the directory in the end
  std::filesystem::path written_;  // where files are written: path_, or a new directory beside it
  std::vector<std::filesystem::path> files_;
  bool created_ = false;  // written_ was made here
  bool committed_ = false;
};

}  // namespace kilin::io
