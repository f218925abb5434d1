// SPDX-License-Identifier: Apache-2.0
#include "io/safetensors.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/resource.h>

#include <csignal>
#include <cstring>
#include <vector>

#include "io/safetensors_writer.h"
#include "io/test_support.h"

namespace kilin::io {
namespace {

constexpr const char* kTinyRandom = KILIN_SOURCE_DIR "/tests/data/reference/tiny-random/model.safetensors";
constexpr int64_t kTinyElements = 338'438 + 3 * 8;  // the parameters and 3 router biases
constexpr const char* kGolden = KILIN_SOURCE_DIR "/tests/data/reference/goldens/docs_prompt_7.safetensors";

std::string bytes_of(const TensorView& view) { return {static_cast<const char*>(view.data), view.bytes()}; }

TEST(Safetensors, ReadsTheReferenceCheckpoint) {
  const SafetensorsFile file = SafetensorsFile::open(kTinyRandom);
  EXPECT_EQ(file.names().size(), 151u);
  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{{"format", "pt"}}));
  int64_t elements = 0;
  for (const std::string& name : file.names()) elements += file.get(name).elements();
  EXPECT_EQ(elements, kTinyElements);
  EXPECT_EQ(file.data_bytes(), static_cast<uint64_t>(kTinyElements) * 4);
}

TEST(Safetensors, ReadsGoldenVectorsWithTheirValues) {
  const SafetensorsFile file = SafetensorsFile::open(kGolden);
  const TensorView& ids = file.get("input_ids");
  EXPECT_EQ(ids.dtype, Dtype::kI32);
  EXPECT_EQ(to_string(ids.shape), "[7]");
  int32_t first = 0;
  std::memcpy(&first, ids.data, sizeof first);
  EXPECT_EQ(first, 7936);  // [BOS]
  EXPECT_TRUE(file.metadata().contains("greedy"));
}

TEST(Safetensors, FindsNothingUnderAnUnknownName) {
  const SafetensorsFile file = SafetensorsFile::open(kGolden);
  EXPECT_EQ(file.find("no.such.tensor"), nullptr);
  EXPECT_EQ(error_of([&] { file.get("no.such.tensor"); }),
            std::string(kGolden) + ": tensor 'no.such.tensor': found nothing of that name among 16 tensors");
}

TEST(Safetensors, ViewsOutliveTheirFirstOwner) {
  TensorView view;
  std::vector<SafetensorsFile> kept;
  {
    const SafetensorsFile file = SafetensorsFile::open(kGolden);
    view = file.get("input_ids");
    kept.push_back(file);
  }
  EXPECT_EQ(bytes_of(view), bytes_of(kept[0].get("input_ids")));
}

TEST(Safetensors, UnsupportedElementTypesFailOnlyWhenAskedFor) {
  const std::string bytes = safetensors_text(
      R"({"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[1],"data_offsets":[4,5]}})",
      5);
  const SafetensorsFile file = SafetensorsFile::parse(std::as_bytes(std::span(bytes)), "f8.safetensors");
  EXPECT_EQ(file.names(), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(file.get("b").elements(), 1);
  EXPECT_EQ(error_of([&] { file.find("a"); }),
            "f8.safetensors: tensor 'a': dtype: found F8_E4M3, expected F32, F16, BF16, F64, I32, I64 or U8");
}

TEST(Safetensors, NamesComeInTheOrderOfTheData) {
  const std::string bytes = safetensors_text(
      R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[2,3]},"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
      R"("empty":{"dtype":"U8","shape":[0,3],"data_offsets":[2,2]}}   )",
      3);
  const SafetensorsFile file = SafetensorsFile::parse(std::as_bytes(std::span(bytes)), "order");
  EXPECT_EQ(file.names(), (std::vector<std::string>{"b", "empty", "a"}));
  EXPECT_EQ(file.get("empty").bytes(), 0u);
}

// One tensor of each element type, of odd sizes, so that a wrong order would break the alignment.
struct Sample {
  std::vector<std::string> data;
  std::vector<NamedTensor> tensors;

  Sample() {
    constexpr Dtype kAll[] = {Dtype::kU8,  Dtype::kF16, Dtype::kBF16, Dtype::kI32,
                              Dtype::kF32, Dtype::kI64, Dtype::kF64};
    for (Dtype dtype : kAll) {
      std::string content(3 * dtype_size(dtype), '\0');
      for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<char>(17 * i + data.size());
      data.push_back(content);
    }
    for (size_t i = 0; i < data.size(); ++i) {
      tensors.push_back({"t." + std::string(dtype_name(kAll[i])), {kAll[i], {1, 3}, data[i].data()}});
    }
    tensors.push_back({"empty", {Dtype::kF32, {0, 4}, nullptr}});
    tensors.push_back({"scalar \"quoted\"\n", {Dtype::kU8, {}, data[0].data()}});
  }
};

TEST(SafetensorsWriter, EveryElementTypeComesBackAlignedAndEqual) {
  const TemporaryDirectory directory;
  const Sample sample;
  const std::string path = directory.file("all.safetensors");
  write_safetensors(path, sample.tensors, {{"format", "pt"}, {"note", "a \"quote\""}});
  const SafetensorsFile file = SafetensorsFile::open(path);
  EXPECT_EQ(file.names().size(), sample.tensors.size());
  EXPECT_EQ(file.metadata().at("note"), "a \"quote\"");
  for (const NamedTensor& tensor : sample.tensors) {
    const TensorView& view = file.get(tensor.name);
    EXPECT_EQ(view.dtype, tensor.view.dtype);
    EXPECT_EQ(view.shape, tensor.view.shape);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(view.data) % dtype_size(view.dtype), 0u) << tensor.name;
    EXPECT_EQ(bytes_of(view), std::string(static_cast<const char*>(tensor.view.data), view.bytes()))
        << tensor.name;
  }
  EXPECT_EQ(directory.entries(), 1u);
}

TEST(SafetensorsWriter, RewritesTheReferenceWithoutLoss) {
  const TemporaryDirectory directory;
  const SafetensorsFile original = SafetensorsFile::open(kTinyRandom);
  std::vector<NamedTensor> tensors;
  for (const std::string& name : original.names()) tensors.push_back({name, original.get(name)});
  write_safetensors(directory.file("copy.safetensors"), tensors, original.metadata());
  const SafetensorsFile copy = SafetensorsFile::open(directory.file("copy.safetensors"));
  EXPECT_EQ(copy.data_bytes(), original.data_bytes());
  for (const std::string& name : original.names())
    EXPECT_EQ(bytes_of(copy.get(name)), bytes_of(original.get(name)));
}

TEST(SafetensorsWriter, ReplacesAFileThatIsStillMapped) {
  const TemporaryDirectory directory;
  const Sample sample;
  const std::string path = directory.file("x.safetensors");
  write_safetensors(path, sample.tensors);
  const SafetensorsFile old = SafetensorsFile::open(path);
  const std::string before = bytes_of(old.get("t.F32"));
  const std::vector<NamedTensor> fewer = {{"t.F32", old.get("t.F32")}};
  write_safetensors(path, fewer);
  EXPECT_EQ(bytes_of(old.get("t.F32")), before);
  EXPECT_EQ(bytes_of(SafetensorsFile::open(path).get("t.F32")), before);
}

TEST(SafetensorsWriter, RefusesTensorsThatNoReaderWouldTake) {
  const TemporaryDirectory directory;
  const std::string path = directory.file("x.safetensors");
  const float value = 1;
  const auto error = [&](std::vector<NamedTensor> tensors) {
    return error_of([&] { write_safetensors(path, tensors); });
  };
  EXPECT_EQ(error({{"a", {Dtype::kF32, {1}, &value}}, {"a", {Dtype::kF32, {1}, &value}}}),
            path + ": tensor 'a': found twice, expected each name once");
  EXPECT_EQ(error({{"__metadata__", {Dtype::kF32, {1}, &value}}}),
            path + ": tensor '__metadata__': the format reserves this name");
  EXPECT_EQ(error({{"a", {Dtype::kF32, {-1}, &value}}}),
            path + ": tensor 'a': shape: found [-1], expected non-negative sizes and less than 2^63 bits");
  EXPECT_EQ(error({{"a", {Dtype::kF32, {2}, nullptr}}}),
            path + ": tensor 'a': data: found a null pointer, expected 8 bytes");
  EXPECT_EQ(error({{"\xff", {Dtype::kF32, {1}, &value}}}),
            path + ": name '\\xff': found bytes that are not UTF-8, expected UTF-8");
  EXPECT_EQ(directory.entries(), 0u);
}

TEST(SafetensorsWriter, NamesTheDirectoryThatDoesNotExist) {
  const TemporaryDirectory directory;
  const std::string path = directory.file("missing/x.safetensors");
  const std::string error = error_of([&] { write_safetensors(path, {}); });
  EXPECT_TRUE(error.starts_with(path + ": cannot write: cannot create '" + path + ".tmp-")) << error;
  EXPECT_TRUE(error.ends_with(": No such file or directory")) << error;
}

TEST(SafetensorsWriter, ADirectoryInTheWayStaysAndNoTemporaryIsLeft) {
  const TemporaryDirectory directory;
  const std::string path = directory.file("taken");
  std::filesystem::create_directory(path);
  const std::string error = error_of([&] { write_safetensors(path, {}); });
  EXPECT_TRUE(error.starts_with(path + ": cannot rename '")) << error;
  EXPECT_TRUE(error.ends_with("Is a directory")) << error;
  EXPECT_EQ(directory.entries(), 1u);
}

constexpr int kKept = 0, kCannotRun = 1, kNoError = 2, kWrongError = 3, kTemporaryLeft = 4,
              kTargetChanged = 5;

// Writes more than fits over a good file; `reason` must be what the system says.
int overfill(const std::string& directory, const std::string& reason) {
  const std::string path = directory + "/x.safetensors";
  const Sample sample;
  write_safetensors(path, sample.tensors);
  const std::string before = read_text(path);
  const std::vector<char> big(1 << 20);
  const std::vector<NamedTensor> tensors = {{"big", {Dtype::kU8, {1 << 20}, big.data()}}};
  const std::string error = error_of([&] { write_safetensors(path, tensors); });
  if (error.empty()) return kNoError;
  if (!error.starts_with(path + ": cannot write") || !error.ends_with(reason)) return kWrongError;
  const auto entries = std::distance(std::filesystem::directory_iterator(directory), {});
  if (entries != 1) return kTemporaryLeft;
  return read_text(path) == before ? kKept : kTargetChanged;
}

TEST(SafetensorsWriter, AFileSizeLimitLeavesTheOldFile) {
  const TemporaryDirectory directory;
  EXPECT_EQ(in_child([&] {
              std::signal(SIGXFSZ, SIG_IGN);
              const rlimit limit{100'000, 100'000};
              if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return kCannotRun;
              return overfill(directory.path(), "File too large");
            }),
            kKept);
}

TEST(SafetensorsWriter, AFullDiskLeavesTheOldFile) {
  const TemporaryDirectory directory;
  const int result = in_child([&] {
    // In a mount namespace of the child's own: nothing is seen outside and nothing is left behind.
    if (unshare(CLONE_NEWNS) != 0) return kCannotRun;
    if (mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) return kCannotRun;
    if (mount("tmpfs", directory.path().c_str(), "tmpfs", 0, "size=128k") != 0) return kCannotRun;
    return overfill(directory.path(), "No space left on device");
  });
  if (result == kCannotRun) GTEST_SKIP() << "mounting a small tmpfs is not permitted here";
  EXPECT_EQ(result, kKept);
}

}  // namespace
}  // namespace kilin::io
