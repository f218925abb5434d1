// SPDX-License-Identifier: Apache-2.0
// tests/data/gguf was written by ggml's own Python package (make.py there).
#include "io/gguf.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <numeric>
#include <string>
#include <vector>

#include "io/checkpoint.h"
#include "io/gguf_writer.h"
#include "io/test_support.h"

namespace kilin::io {
namespace {

constexpr const char* kAllTypes = KILIN_SOURCE_DIR "/tests/data/gguf/all_types.gguf";
constexpr const char* kSplit = KILIN_SOURCE_DIR "/tests/data/gguf/split-00001-of-00002.gguf";
constexpr const char* kSplitSecond = KILIN_SOURCE_DIR "/tests/data/gguf/split-00002-of-00002.gguf";

template <class T>
std::vector<T> values_of(const TensorView& view) {
  std::vector<T> values(view.bytes() / sizeof(T));
  std::memcpy(values.data(), view.data, view.bytes());
  return values;
}

template <class T>
std::vector<T> counted(size_t n) {
  std::vector<T> values(n);
  std::iota(values.begin(), values.end(), T{});
  return values;
}

TEST(Gguf, ReadsEveryTypeOfValue) {
  const GgufFile file = GgufFile::open(kAllTypes);
  EXPECT_EQ(file.metadata().size(), 26u);
  EXPECT_EQ(file.get_string("general.architecture"), "kimi-linear");
  EXPECT_EQ(file.get_int("general.alignment"), 64);
  EXPECT_EQ(file.get_int("test.uint8"), 250);
  EXPECT_EQ(file.get_int("test.int8"), -100);
  EXPECT_EQ(file.get_int("test.uint16"), 65000);
  EXPECT_EQ(file.get_int("test.int16"), -30000);
  EXPECT_EQ(file.get_int("test.uint32"), 4'000'000'000);
  EXPECT_EQ(file.get_int("test.int32"), -2'000'000'000);
  EXPECT_EQ(file.get_int("test.uint64"), INT64_MAX);
  EXPECT_EQ(file.get_int("test.int64"), INT64_MIN);
  EXPECT_EQ(file.get_double("test.float32"), static_cast<double>(0.1f));
  EXPECT_EQ(file.get_double("test.float64"), 0.1);
  EXPECT_EQ(file.get_double("test.int16"), -30000.0);
  EXPECT_TRUE(file.get_bool("test.bool", false));
  EXPECT_EQ(file.get_string("test.string"), std::string("Mond 月 \0 end", 14));
}

TEST(Gguf, ReadsEveryTypeOfArray) {
  using Ints = std::vector<int64_t>;
  const GgufFile file = GgufFile::open(kAllTypes);
  EXPECT_EQ(file.get_ints("test.array.uint8"), (Ints{0, 255}));
  EXPECT_EQ(file.get_ints("test.array.int8"), (Ints{-128, 127}));
  EXPECT_EQ(file.get_ints("test.array.uint16"), (Ints{0, 65535}));
  EXPECT_EQ(file.get_ints("test.array.int16"), (Ints{-32768, 32767}));
  EXPECT_EQ(file.get_ints("test.array.uint32"), (Ints{0, 4'294'967'295}));
  EXPECT_EQ(file.get_ints("test.array.int32"), (Ints{INT32_MIN, INT32_MAX}));
  EXPECT_EQ(file.get_ints("test.array.uint64"), (Ints{0, INT64_MAX}));
  EXPECT_EQ(file.get_ints("test.array.int64"), (Ints{INT64_MIN, INT64_MAX}));
  EXPECT_EQ(file.get_doubles("test.array.float32"), (std::vector<double>{1.5, -2.25}));
  EXPECT_EQ(file.get_doubles("test.array.float64"), (std::vector<double>{0.1, 1e300}));
  EXPECT_EQ(std::get<GgufArray>(file.metadata().find("test.array.bool")->second),
            GgufArray(std::vector<bool>{true, false, true}));
  EXPECT_EQ(file.get_strings("test.array.string"), (std::vector<std::string>{"", "Ġthe", "月"}));
}

TEST(Gguf, ReadsTensorsOfThePlainTypes) {
  const GgufFile file = GgufFile::open(kAllTypes);
  EXPECT_EQ(to_string(file.find("f32")->shape), "[2, 3]");
  EXPECT_EQ(file.find("f32")->dtype, Dtype::kF32);
  EXPECT_EQ(values_of<float>(*file.find("f32")), counted<float>(6));
  EXPECT_EQ(to_string(file.find("f16")->shape), "[4, 3, 2]");
  EXPECT_EQ(values_of<uint16_t>(*file.find("f16"))[23], 0x4dc0);  // 23.0
  EXPECT_EQ(values_of<float>(*file.find("one")), std::vector<float>{7.5f});
  EXPECT_EQ(to_string(file.find("four")->shape), "[2, 1, 2, 4]");
  EXPECT_EQ(values_of<float>(*file.find("four")), counted<float>(16));
  EXPECT_EQ(values_of<int32_t>(*file.find("i32")), counted<int32_t>(5));
  EXPECT_EQ(file.find("bf16")->dtype, Dtype::kBF16);
  EXPECT_EQ(values_of<uint8_t>(*file.find("bf16")), counted<uint8_t>(12));
  EXPECT_EQ(file.find("no.such.tensor"), nullptr);
}

TEST(Gguf, ReadsBlocksWhole) {
  const GgufFile file = GgufFile::open(kAllTypes);
  const struct {
    const char* name;
    Dtype dtype;
    std::string shape;
    size_t bytes;
  } cases[] = {{"q8_0", Dtype::kQ8_0, "[2, 64]", 136},
               {"q5_0", Dtype::kQ5_0, "[2, 32]", 44},
               {"q4_0", Dtype::kQ4_0, "[3, 32]", 54},
               {"q4_k", Dtype::kQ4_K, "[2, 256]", 288},
               {"q6_k", Dtype::kQ6_K, "[1, 512]", 420}};
  for (const auto& c : cases) {
    const TensorView* view = file.find(c.name);
    ASSERT_NE(view, nullptr) << c.name;
    EXPECT_EQ(view->dtype, c.dtype) << c.name;
    EXPECT_EQ(to_string(view->shape), c.shape);
    EXPECT_EQ(view->bytes(), c.bytes);
    EXPECT_EQ(values_of<uint8_t>(*view), counted<uint8_t>(c.bytes)) << c.name;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(view->data) % 64, 0u);
  }
}

TEST(Gguf, ListsOtherTypesAndRefusesToHandThemOut) {
  const GgufFile file = GgufFile::open(kAllTypes);
  EXPECT_EQ(file.names().size(), 15u);
  EXPECT_EQ(file.names().front(), "f32");
  EXPECT_TRUE(file.contains("q5_k"));
  EXPECT_EQ(file.type_name("q5_k"), "Q5_K");
  EXPECT_EQ(file.type_name("iq4_xs"), "IQ4_XS");
  EXPECT_EQ(file.type_name("mxfp4"), "MXFP4");
  EXPECT_EQ(file.type_name("i8"), "I8");
  EXPECT_EQ(file.type_name("q4_k"), "Q4_K");
  EXPECT_EQ(
      error_of([&] { file.find("q5_k"); }),
      std::string(kAllTypes) +
          ": tensor 'q5_k': type: found Q5_K, expected F32, F16, BF16, F64, I32, I64, Q8_0, Q5_0, Q4_0, Q4_K "
          "or Q6_K");
  EXPECT_EQ(file.data_bytes(), 24u + 48 + 4 + 64 + 20 + 5 + 12 + 136 + 54 + 288 + 420 + 352 + 136 + 34 + 44);
  EXPECT_EQ(error_of([&] { static_cast<void>(file.type_name("x")); }),
            std::string(kAllTypes) + ": tensor 'x': found nothing of that name among 15 tensors");
}

TEST(Gguf, ValuesOfAnotherTypeOrNoneAreRefusedByName) {
  const GgufFile file = GgufFile::open(kAllTypes);
  const std::string path = std::string(kAllTypes) + ": ";
  EXPECT_EQ(error_of([&] { file.get_int("test.none"); }),
            path + "key 'test.none': missing, expected an integer");
  EXPECT_EQ(error_of([&] { file.get_int("test.string"); }),
            path + "key 'test.string': found a string, expected an integer");
  EXPECT_EQ(error_of([&] { file.get_int("test.float32", 1); }),
            path + "key 'test.float32': found a float, expected an integer");
  EXPECT_EQ(error_of([&] { file.get_double("test.bool"); }),
            path + "key 'test.bool': found a bool, expected a number");
  EXPECT_EQ(error_of([&] { file.get_string("test.array.string"); }),
            path + "key 'test.array.string': found an array of strings, expected a string");
  EXPECT_EQ(error_of([&] { file.get_bool("test.uint8", true); }),
            path + "key 'test.uint8': found an integer, expected a bool");
  EXPECT_EQ(error_of([&] { file.get_ints("test.array.float32"); }),
            path + "key 'test.array.float32': found an array of floats, expected an array of integers");
  EXPECT_EQ(error_of([&] { file.get_doubles("test.array.bool"); }),
            path + "key 'test.array.bool': found an array of bools, expected an array of floats");
  EXPECT_EQ(error_of([&] { file.get_strings("test.int8"); }),
            path + "key 'test.int8': found an integer, expected an array of strings");
  EXPECT_EQ(file.get_int("test.none", 3), 3);
  EXPECT_EQ(file.get_double("test.none", 2.5), 2.5);
  EXPECT_EQ(file.get_string("test.none", "x"), "x");
  EXPECT_TRUE(file.get_bool("test.none", true));
  EXPECT_FALSE(file.has("test.none"));
}

TEST(Gguf, OpensAllPartsOfASplitFile) {
  const GgufFile file = GgufFile::open(kSplit);
  EXPECT_EQ(file.names(), (std::vector<std::string>{"a", "b", "c"}));
  EXPECT_EQ(file.files(), (std::vector<std::string>{kSplit, kSplitSecond}));
  EXPECT_EQ(file.get_string("test.where"), "only in the first part");
  EXPECT_EQ(file.get_int("split.no"), 0);
  EXPECT_EQ(file.data_bytes(), 48u);
  for (const std::string& name : file.names())
    EXPECT_EQ(values_of<float>(*file.find(name)), std::vector<float>(4, static_cast<float>(name[0])));
  file.advise(Access::kSequential);
}

TEST(Gguf, ASplitFileMustBeWholeAndNamedAsItsPartsSay) {
  const std::string first = read_text(kSplit), second = read_text(kSplitSecond);
  EXPECT_EQ(error_of([] { GgufFile::open(kSplitSecond); }),
            std::string(kSplitSecond) +
                ": key 'split.no': found 1, expected 0: the first of the 2 parts of a split file");
  TemporaryDirectory directory;
  const std::string one = directory.write("m-00001-of-00002.gguf", first);
  EXPECT_EQ(error_of([&] { GgufFile::open(one); }),
            directory.file("m-00002-of-00002.gguf") + ": found no such file, expected part 2 of 2 beside '" +
                one + "'");
  const std::string two = directory.write("m-00002-of-00002.gguf", first);
  EXPECT_EQ(error_of([&] { GgufFile::open(one); }), two + ": tensor 'a': found twice, expected once");
  directory.write("m-00002-of-00002.gguf", second);
  EXPECT_EQ(error_of([&] { GgufFile::open(one); }), "");
  std::string third = second;
  third[second.find("split.no") + 12] = 2;
  directory.write("m-00002-of-00002.gguf", third);
  EXPECT_EQ(error_of([&] { GgufFile::open(one); }),
            two + ": keys 'split.no' and 'split.count': found 2 and 2, expected 1 and 2");
  std::string more = first;
  more[first.find("split.tensors.count") + 19 + 4] = 5;
  directory.write("m-00001-of-00002.gguf", more);
  directory.write("m-00002-of-00002.gguf", second);
  EXPECT_EQ(error_of([&] { GgufFile::open(one); }),
            one + ": key 'split.tensors.count': found 5, expected 3, the number of tensors in all parts");
  const std::string other = directory.write("m.gguf", first);
  EXPECT_EQ(error_of([&] { GgufFile::open(other); }),
            other + ": found the first of 2 parts, expected a name that ends in '-00001-of-00002.gguf'");
  more = first;
  more[first.find("split.count") + 11 + 4 + 1] = '\xff';  // 65282 parts
  const std::string many = directory.write("m-00001-of-65282.gguf", more);
  EXPECT_EQ(error_of([&] { GgufFile::open(many); }),
            directory.file("m-00002-of-65282.gguf") +
                ": found no such file, expected part 2 of 65282 beside '" + many + "'");
}

TEST(Gguf, IsRecognisedByItsMagic) {
  TemporaryDirectory directory;
  EXPECT_TRUE(GgufFile::is_gguf(kAllTypes));
  EXPECT_FALSE(GgufFile::is_gguf(directory.write("short", "GGU")));
  EXPECT_TRUE(GgufFile::is_gguf(directory.write("long", "GGUF")));
  EXPECT_FALSE(GgufFile::is_gguf(directory.write("other", "GGML____")));
  EXPECT_FALSE(GgufFile::is_gguf(directory.path()));
  EXPECT_FALSE(GgufFile::is_gguf(directory.file("none")));
}

TEST(Gguf, CopiesKeepTheMappingAlive) {
  std::vector<GgufFile> kept;
  const TensorView* view = nullptr;
  {
    const GgufFile file = GgufFile::open(kAllTypes);
    view = file.find("f32");
    kept.push_back(file);
  }
  EXPECT_EQ(values_of<float>(*view), counted<float>(6));
}

TEST(Gguf, IsACheckpoint) {
  const Checkpoint checkpoint = Checkpoint::open(kAllTypes);
  EXPECT_EQ(checkpoint.names().size(), 15u);
  EXPECT_TRUE(std::is_sorted(checkpoint.names().begin(), checkpoint.names().end()));
  EXPECT_EQ(checkpoint.get("q6_k").bytes(), 420u);
  EXPECT_EQ(checkpoint.files(), std::vector<std::string>{kAllTypes});
  EXPECT_EQ(checkpoint.total_bytes(), GgufFile::open(kAllTypes).data_bytes());
  EXPECT_EQ(checkpoint.gguf()->get_int("test.uint8"), 250);
  EXPECT_EQ(checkpoint.find("none"), nullptr);
  EXPECT_EQ(error_of([&] { static_cast<void>(checkpoint.get("none")); }),
            std::string(kAllTypes) + ": tensor 'none': found nothing of that name among 15 tensors");
  EXPECT_NE(error_of([&] { static_cast<void>(checkpoint.get("iq4_xs")); }), "");
  EXPECT_EQ(Checkpoint::open(kSplit).files(), (std::vector<std::string>{kSplit, kSplitSecond}));
  EXPECT_EQ(Checkpoint::open(KILIN_SOURCE_DIR "/models/kilin-docs-10m").gguf(), nullptr);
  TemporaryDirectory directory;
  const std::string renamed = directory.write("weights", read_text(kAllTypes));
  EXPECT_EQ(Checkpoint::open(renamed).names(), checkpoint.names());
  const std::string broken = directory.write("broken.gguf", "nothing");
  EXPECT_EQ(error_of([&] { Checkpoint::open(broken); }),
            broken + ": magic: found 'noth...', expected 'GGUF'");
}

TEST(GgufWriter, WhatItWritesReadsBackTheSame) {
  TemporaryDirectory directory;
  const std::string path = directory.file("out.gguf");
  const std::vector<float> f32 = counted<float>(12);
  const std::vector<uint8_t> q4_k = counted<uint8_t>(288);
  GgufWriter writer(path);
  writer.add_string("general.architecture", "kimi-linear");
  writer.add_uint32("a.uint32", 4'000'000'000);
  writer.add_float32("a.float32", 2.446f);
  writer.add_bool("a.bool", true);
  writer.add_bool("a.bool.no", false);
  writer.add_string("a.string", std::string_view("月\0x", 5));
  writer.add_int32s("a.int32s", {0, -1, INT32_MAX});
  writer.add_float32s("a.float32s", {0.5f, -3.0f});
  writer.add_strings("a.strings", {"", "Ġthe"});
  writer.add_strings("a.none", {});
  writer.add_tensor("f32", Dtype::kF32, {3, 1, 4});
  writer.add_tensor("q4_k", Dtype::kQ4_K, {2, 256});
  writer.add_tensor("last", Dtype::kBF16, {3});
  EXPECT_EQ(writer.data_bytes(), 48u + 288 + 6);
  writer.write(f32.data(), 20);
  writer.write(f32.data() + 5, 28);
  writer.write(q4_k.data(), q4_k.size());
  writer.write("abcdef", 6);
  EXPECT_FALSE(std::filesystem::exists(path));
  writer.commit();

  const GgufFile file = GgufFile::open(path);
  EXPECT_EQ(file.metadata().size(), 10u);
  EXPECT_EQ(file.get_string("general.architecture"), "kimi-linear");
  EXPECT_EQ(file.get_int("a.uint32"), 4'000'000'000);
  EXPECT_EQ(file.get_double("a.float32"), static_cast<double>(2.446f));
  EXPECT_TRUE(file.get_bool("a.bool", false));
  EXPECT_FALSE(file.get_bool("a.bool.no", true));
  EXPECT_EQ(file.get_string("a.string"), std::string("月\0x", 5));
  EXPECT_EQ(file.get_ints("a.int32s"), (std::vector<int64_t>{0, -1, INT32_MAX}));
  EXPECT_EQ(file.get_doubles("a.float32s"), (std::vector<double>{0.5, -3.0}));
  EXPECT_EQ(file.get_strings("a.strings"), (std::vector<std::string>{"", "Ġthe"}));
  EXPECT_EQ(file.get_strings("a.none"), std::vector<std::string>{});
  EXPECT_EQ(file.names(), (std::vector<std::string>{"f32", "q4_k", "last"}));
  EXPECT_EQ(to_string(file.find("f32")->shape), "[3, 1, 4]");
  EXPECT_EQ(values_of<float>(*file.find("f32")), f32);
  EXPECT_EQ(values_of<uint8_t>(*file.find("q4_k")), q4_k);
  EXPECT_EQ(file.find("q4_k")->dtype, Dtype::kQ4_K);
  EXPECT_EQ(std::memcmp(file.find("last")->data, "abcdef", 6), 0);
  EXPECT_EQ(std::filesystem::file_size(path) % 32, 0u);
}

// ggml's package wrote the parts of the split file; the same values in the same order must give the same
// bytes.
TEST(GgufWriter, WritesTheBytesThatGgmlWrites) {
  TemporaryDirectory directory;
  const std::string path = directory.file("out.gguf");
  GgufWriter writer(path);
  writer.add_string("general.architecture", "kimi-linear");
  writer.add_string("test.where", "only in the first part");
  writer.add_uint32("split.no", 0);
  writer.add_tensor("a", Dtype::kF32, {2, 2});
  writer.add_tensor("b", Dtype::kF32, {2, 2});
  for (const float value : {97.0f, 98.0f}) writer.write(std::vector<float>(4, value).data(), 16);
  writer.commit();
  const std::string ours = read_text(path), theirs = read_text(kSplit);
  // Up to the values of which ggml's file has others: 24 bytes of header, whose count of values differs.
  const size_t same = theirs.find("split.no") - 8;
  EXPECT_EQ(ours.substr(24, same - 24), theirs.substr(24, same - 24));
  EXPECT_EQ(ours.substr(0, 16), theirs.substr(0, 16));
  // And from the table of tensors on.
  const std::string table("\1\0\0\0\0\0\0\0a\2\0\0\0", 13);
  const size_t table_bytes = 2 * (8 + 1 + 4 + 16 + 4 + 8);
  EXPECT_EQ(ours.substr(ours.find(table), table_bytes), theirs.substr(theirs.find(table), table_bytes));
  EXPECT_EQ(ours.substr(ours.size() - 64), theirs.substr(theirs.size() - 64));
}

TEST(GgufWriter, RefusesWhatWouldNotBeReadable) {
  TemporaryDirectory directory;
  const std::string path = directory.file("out.gguf");
  GgufWriter writer(path);
  writer.add_uint32("a", 1);
  writer.add_tensor("t", Dtype::kF32, {2});
  const auto tensor_error = [&](Dtype dtype, const Shape& shape) {
    return error_of([&] { writer.add_tensor("x", dtype, shape); });
  };
  const std::string x = path + ": tensor 'x': ";
  EXPECT_EQ(error_of([&] { writer.add_bool("a", true); }), path + ": key 'a': added twice, expected once");
  EXPECT_EQ(error_of([&] { writer.add_bool("", true); }), path + ": found an empty key, expected a name");
  EXPECT_EQ(error_of([&] { writer.add_uint32("general.alignment", 64); }),
            path + ": key 'general.alignment': found 64, expected 32");
  EXPECT_EQ(error_of([&] { writer.add_tensor("t", Dtype::kF32, {2}); }),
            path + ": tensor 't': added twice, expected once");
  EXPECT_EQ(error_of([&] { writer.add_tensor("", Dtype::kF32, {2}); }),
            path + ": tensor '': found a name of 0 bytes, expected 1 to 63");
  EXPECT_TRUE(error_of([&] {
                writer.add_tensor(std::string(64, 'n'), Dtype::kF32, {2});
              }).ends_with("found a name of 64 bytes, expected 1 to 63"));
  EXPECT_EQ(tensor_error(Dtype::kU8, {2}), x + "dtype: found U8, which GGUF does not have");
  EXPECT_EQ(tensor_error(Dtype::kF32, {}), x + "shape: found 0 dimensions, expected 1 to 4");
  EXPECT_EQ(tensor_error(Dtype::kF32, {1, 1, 1, 1, 1}), x + "shape: found 5 dimensions, expected 1 to 4");
  const std::string expected = ", expected positive sizes, rows of a multiple of ";
  EXPECT_EQ(tensor_error(Dtype::kQ8_0, {2, 48}),
            x + "shape: found [2, 48]" + expected + "32 and less than 2^63 bytes");
  EXPECT_EQ(tensor_error(Dtype::kF32, {0, 4}),
            x + "shape: found [0, 4]" + expected + "1 and less than 2^63 bytes");
  EXPECT_NE(tensor_error(Dtype::kF32, {-4}), "");
  EXPECT_NE(tensor_error(Dtype::kF32, {int64_t{1} << 61}), "");
  EXPECT_NE(tensor_error(Dtype::kF32, {int64_t{1} << 32, int64_t{1} << 32}), "");
}

TEST(GgufWriter, RefusesDataOutOfOrderAndLeavesNoFile) {
  TemporaryDirectory directory;
  const std::string path = directory.file("out.gguf");
  {
    GgufWriter writer(path);
    writer.add_tensor("t", Dtype::kF32, {2});
    EXPECT_EQ(error_of([&] { writer.write("123456789", 9); }),
              path + ": tensor 't': found 9 bytes of data behind the first 0, expected at most 8 more");
    writer.write("1234", 4);
    EXPECT_EQ(error_of([&] { writer.commit(); }), path + ": tensor 't': found 4 bytes of data, expected 8");
    EXPECT_EQ(error_of([&] { writer.add_bool("k", true); }),
              path + ": key 'k': added behind the first data, expected all metadata before");
    EXPECT_EQ(error_of([&] { writer.add_tensor("u", Dtype::kF32, {2}); }),
              path + ": tensor 'u': added behind the first data, expected all tensors before");
    writer.write("5678", 4);
    EXPECT_EQ(error_of([&] { writer.write("9", 1); }),
              path + ": found 1 bytes of data behind the last tensor, expected none");
  }
  EXPECT_EQ(directory.entries(), 0u);
}

TEST(GgufWriter, WritesFilesWithoutTensors) {
  TemporaryDirectory directory;
  const std::string path = directory.file("vocabulary.gguf");
  GgufWriter writer(path);
  writer.add_uint32("a", 1);
  writer.commit();
  const GgufFile file = GgufFile::open(path);
  EXPECT_EQ(file.get_int("a"), 1);
  EXPECT_TRUE(file.names().empty());
}

}  // namespace
}  // namespace kilin::io
