// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <ostream>
#include <string>
#include <vector>

#include "io/gguf.h"
#include "io/test_support.h"

namespace kilin::io {
namespace {

std::string error_of_bytes(const std::string& bytes) {
  return error_of([&] { GgufFile::parse(std::as_bytes(std::span(bytes)), "bad.gguf"); });
}

std::string number(uint64_t value, size_t size) {
  std::string bytes;
  for (size_t i = 0; i < size; ++i) bytes += static_cast<char>(value >> (8 * i) & 0xff);
  return bytes;
}
std::string u32(uint64_t value) { return number(value, 4); }
std::string u64(uint64_t value) { return number(value, 8); }
std::string text(const std::string& content) { return u64(content.size()) + content; }

std::string header(uint64_t tensors, uint64_t values, uint32_t version = 3) {
  return "GGUF" + u32(version) + u64(tensors) + u64(values);
}

// Metadata of one key of that type (a number of enum gguf_type) and value, and no tensors.
constexpr uint32_t kUint8 = 0, kUint32 = 4, kInt32 = 5, kFloat32 = 6, kBool = 7, kString = 8, kArray = 9,
                   kUint64 = 10;
std::string one_value(uint32_t type, const std::string& value) {
  return header(0, 1) + text("k") + u32(type) + value;
}

// ne is in the order of the file: fastest first.
std::string tensor(const std::string& name, const std::vector<uint64_t>& ne, uint32_t type, uint64_t offset) {
  std::string bytes = text(name) + u32(ne.size());
  for (const uint64_t size : ne) bytes += u64(size);
  return bytes + u32(type) + u64(offset);
}
constexpr uint32_t kTypeF32 = 0, kTypeQ80 = 8, kTypeQ4K = 12, kTypeQ5K = 13, kTypeUnknown = 99;

std::string padded(std::string bytes, size_t data, size_t alignment = 32) {
  bytes.resize((bytes.size() + alignment - 1) / alignment * alignment);
  return bytes + std::string(data, '\1');
}
std::string one_tensor(const std::vector<uint64_t>& ne, uint32_t type, uint64_t offset, size_t data) {
  return padded(header(1, 0) + tensor("w", ne, type, offset), data);
}
std::string two_tensors(uint64_t a, uint64_t b, size_t data, uint32_t type = kTypeF32) {
  return padded(header(2, 0) + tensor("a", {12}, kTypeF32, a) + tensor("b", {4}, type, b), data);
}
std::string with_alignment(uint32_t type, const std::string& value) {
  return header(0, 1) + text("general.alignment") + u32(type) + value;
}

struct Malformed {
  const char* name;
  std::string bytes;
  std::string message;  // all of it, behind "bad.gguf: "
};
void PrintTo(const Malformed& malformed, std::ostream* out) { *out << malformed.name; }

class MalformedGguf : public testing::TestWithParam<Malformed> {};

TEST_P(MalformedGguf, IsRefusedWithFilePlaceFoundAndExpected) {
  EXPECT_EQ(error_of_bytes(GetParam().bytes), "bad.gguf: " + GetParam().message);
}

const std::vector<Malformed> kMalformed = {
    // The header.
    {"Empty", "", "magic: found nothing, expected 'GGUF'"},
    {"Short", "GGU", "magic: found 'GGU', expected 'GGUF'"},
    {"OtherMagic", "GGML" + u32(3), "magic: found 'GGML...', expected 'GGUF'"},
    {"BinaryMagic", "\x1\xff\n\r", "magic: found '\\x01\\xff\\x0a\\x0d', expected 'GGUF'"},
    {"GitLfsPointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
     "found a Git LFS pointer, expected the file itself (run: git lfs pull)"},
    {"NoVersion", "GGUF\3", "header: found the end of the file at byte 5, expected 3 more bytes"},
    {"BigEndian", "GGUF" + std::string("\0\0\0\3", 4) + u64(0) + u64(0),
     "version: found 3 in reverse byte order (a big-endian file), expected a little-endian file"},
    {"Version0", header(0, 0, 0), "version: found 0, expected 2 or 3"},
    {"Version1", header(0, 0, 1), "version: found 1, expected 2 or 3"},
    {"Version4", header(0, 0, 4), "version: found 4, expected 2 or 3"},
    {"NoCounts", "GGUF" + u32(3) + u64(0),
     "header: found the end of the file at byte 16, expected 8 more bytes"},
    {"ValuesHuge", header(0, UINT64_MAX),
     "metadata: found a count of 18446744073709551615, expected at most 0 in the 0 bytes behind the header"},
    {"ValuesMoreThanFit", header(0, 3) + std::string(30, '\0'),
     "metadata: found a count of 3, expected at most 2 in the 30 bytes behind the header"},
    {"TensorsHuge", header(UINT64_MAX, 0),
     "tensors: found a count of 18446744073709551615, expected at most 0 in the 0 bytes behind the metadata"},
    {"TensorsMoreThanFit", header(3, 0) + std::string(60, '\0'),
     "tensors: found a count of 3, expected at most 2 in the 60 bytes behind the metadata"},
    // Metadata.
    {"KeyEmpty", header(0, 1) + text("") + u32(kUint8) + "12",
     "metadata: found an empty key, expected a name"},
    {"KeyTooLong", header(0, 1) + u64(100) + std::string(20, 'k'),
     "metadata: found a string of 100 bytes, expected at most the 20 left in the file"},
    {"KeyLengthHuge", header(0, 1) + u64(UINT64_MAX) + std::string(20, 'k'),
     "metadata: found a string of 18446744073709551615 bytes, expected at most the 20 left in the file"},
    {"KeyOnOneLine", header(0, 1) + text("a\nb\xff") + u32(77) + u64(0),
     "key 'a\\x0ab\\xff': found a value of type 77, expected a type from 0 to 12"},
    {"KeyTwice", header(0, 2) + text("k") + u32(kUint8) + "1" + text("k") + u32(kUint8) + "2",
     "key 'k': found twice, expected once"},
    {"ValueCutOff", one_value(kUint64, "1234567"),
     "key 'k': found the end of the file at byte 44, expected 1 more bytes"},
    {"NextKeyCutOff", header(0, 2) + text("k") + u32(kString) + text("0123456"),
     "metadata: found the end of the file at byte 52, expected 8 more bytes"},
    {"UintAbove63Bits", one_value(kUint64, u64(uint64_t{1} << 63)),
     "key 'k': found 9223372036854775808, expected an integer below 2^63"},
    {"BoolIsTwo", one_value(kBool, "\2"), "key 'k': found the bool 2, expected 0 or 1"},
    {"StringTooLong", one_value(kString, u64(8) + "1234567"),
     "key 'k': found a string of 8 bytes, expected at most the 7 left in the file"},
    {"ArrayOfArrays", one_value(kArray, u32(kArray) + u64(1) + u32(kUint8) + u64(0)),
     "key 'k': found an array of arrays, expected an array of plain values"},
    {"ArrayOfUnknownType", one_value(kArray, u32(13) + u64(1)),
     "key 'k': found a value of type 13, expected a type from 0 to 12"},
    {"ArrayHuge", one_value(kArray, u32(kInt32) + u64(UINT64_MAX) + "12345678"),
     "key 'k': found an array of 18446744073709551615 elements, expected at most 2 (8 bytes are left)"},
    {"ArrayCountWraps", one_value(kArray, u32(kInt32) + u64(uint64_t{1} << 62) + "12345678"),
     "key 'k': found an array of 4611686018427387904 elements, expected at most 2 (8 bytes are left)"},
    {"ArrayOfStringsHuge", one_value(kArray, u32(kString) + u64(3) + std::string(23, '\0')),
     "key 'k': found an array of 3 elements, expected at most 2 (23 bytes are left)"},
    {"ArrayOfStringsCutOff", one_value(kArray, u32(kString) + u64(2) + text("123456789") + "1234567"),
     "key 'k': found the end of the file at byte 73, expected 1 more bytes"},
    {"ArrayHoldsBoolTwo", one_value(kArray, u32(kBool) + u64(2) + "\1\2"),
     "key 'k': found the bool 2, expected 0 or 1"},
    {"AlignmentIsString", with_alignment(kString, text("32")),
     "key 'general.alignment': found a string, expected an integer"},
    {"AlignmentIsFloat", with_alignment(kFloat32, u32(0x42000000)),
     "key 'general.alignment': found a float, expected an integer"},
    {"AlignmentZero", with_alignment(kUint32, u32(0)),
     "key 'general.alignment': found 0, expected a power of two up to 1073741824"},
    {"AlignmentNegative", with_alignment(kInt32, u32(0xffffffe0)),
     "key 'general.alignment': found -32, expected a power of two up to 1073741824"},
    {"AlignmentNoPowerOfTwo", with_alignment(kUint32, u32(48)),
     "key 'general.alignment': found 48, expected a power of two up to 1073741824"},
    {"AlignmentHuge", with_alignment(kUint64, u64(uint64_t{1} << 62)),
     "key 'general.alignment': found 4611686018427387904, expected a power of two up to 1073741824"},
    // The table of tensors.
    {"NameEmpty", padded(header(1, 0) + tensor("", {4}, kTypeF32, 0), 16),
     "tensor 1 of 1: found an empty name, expected a name"},
    {"NameTooLong", header(1, 0) + u64(1000) + std::string(24, 'w'),
     "tensor 1 of 1: found a string of 1000 bytes, expected at most the 24 left in the file"},
    {"NameNotUtf8", padded(header(1, 0) + tensor("\xc3\n", {0}, kTypeF32, 0), 16),
     "tensor '\\xc3\\x0a': shape: found 0 as dimension 0, expected a size from 1 to 2^63 - 1"},
    {"NameTwice", padded(header(2, 0) + tensor("w", {4}, kTypeF32, 0) + tensor("w", {4}, kTypeF32, 32), 48),
     "tensor 'w': found twice, expected once"},
    {"FiveDimensions", one_tensor({1, 1, 1, 1, 1}, kTypeF32, 0, 4),
     "tensor 'w': shape: found 5 dimensions, expected at most 4"},
    {"DimensionsHuge", header(1, 0) + text("w") + u32(0xffffffff) + std::string(20, '\0'),
     "tensor 'w': shape: found 4294967295 dimensions, expected at most 4"},
    {"DimensionZero", one_tensor({4, 0}, kTypeF32, 0, 16),
     "tensor 'w': shape: found 0 as dimension 1, expected a size from 1 to 2^63 - 1"},
    {"DimensionNegative", one_tensor({UINT64_MAX}, kTypeF32, 0, 16),
     "tensor 'w': shape: found 18446744073709551615 as dimension 0, expected a size from 1 to 2^63 - 1"},
    {"ShapeCutOff", header(1, 0) + text("w") + u32(3) + std::string(20, '\1'),
     "tensor 'w': found the end of the file at byte 57, expected 4 more bytes"},
    {"ShapeOverflows", one_tensor({uint64_t{1} << 32, uint64_t{1} << 32}, kTypeF32, 0, 16),
     "tensor 'w': shape: found [4294967296, 4294967296] of F32, expected a size below 2^63"},
    {"BytesOverflow", one_tensor({uint64_t{1} << 61}, kTypeF32, 0, 16),
     "tensor 'w': shape: found [2305843009213693952] of F32, expected a size below 2^63"},
    // Fewer bytes than elements: 144 per 256.
    {"ElementsOverflow", one_tensor({uint64_t{1} << 62, 2}, kTypeQ4K, 0, 16),
     "tensor 'w': shape: found [2, 4611686018427387904] of Q4_K, expected a size below 2^63"},
    {"RowNotABlock", one_tensor({48, 2}, kTypeQ80, 0, 102),
     "tensor 'w': shape: found [2, 48] with rows of 48, expected a multiple of 32 for Q8_0"},
    {"ScalarOfBlocks", one_tensor({}, kTypeQ80, 0, 34),
     "tensor 'w': shape: found [] with rows of 1, expected a multiple of 32 for Q8_0"},
    {"RowOfUnreadTypeNotABlock", one_tensor({32}, kTypeQ5K, 0, 176),
     "tensor 'w': shape: found [32] with rows of 32, expected a multiple of 256 for Q5_K"},
    {"TableCutOff",
     header(2, 0) + tensor("a", {1}, kTypeF32, 0) + tensor("b", {1}, kTypeF32, 32).substr(0, 30),
     "tensor 'b': found the end of the file at byte 87, expected 3 more bytes"},
    // Offsets.
    {"OffsetMisaligned", one_tensor({4}, kTypeF32, 4, 32),
     "tensor 'w': offset: found 4, expected a multiple of the alignment 32"},
    {"DataCutOff", one_tensor({4}, kTypeF32, 0, 15),
     "tensor 'w': data: found 16 bytes at offset 0, expected them within the 15 bytes of data in the file"},
    {"DataMissing", header(1, 0) + tensor("w", {4}, kTypeF32, 0),
     "tensor 'w': data: found 16 bytes at offset 0, expected them within the 0 bytes of data in the file"},
    {"OffsetBehindFile", one_tensor({4}, kTypeF32, 64, 64),
     "tensor 'w': data: found 16 bytes at offset 64, expected them within the 64 bytes of data in the file"},
    {"OffsetHuge", one_tensor({4}, kTypeF32, UINT64_MAX - 31, 64),
     "tensor 'w': data: found 16 bytes at offset 18446744073709551584, expected them within the 64 bytes of "
     "data in the file"},
    {"OffsetOfUnknownTypeBehindFile", one_tensor({4}, kTypeUnknown, 96, 64),
     "tensor 'w': data: found 0 bytes at offset 96, expected them within the 64 bytes of data in the file"},
    {"DataOfUnreadTypeCutOff", one_tensor({256}, kTypeQ5K, 0, 175),
     "tensor 'w': data: found 176 bytes at offset 0, expected them within the 175 bytes of data in the file"},
    {"Overlap", two_tensors(0, 32, 96),
     "tensor 'b': offset: found 32 (an overlap), expected at least 48, where tensor 'a' ends"},
    {"OverlapInReverse",
     padded(header(2, 0) + tensor("b", {4}, kTypeF32, 32) + tensor("a", {12}, kTypeF32, 0), 96),
     "tensor 'b': offset: found 32 (an overlap), expected at least 48, where tensor 'a' ends"},
    {"SamePlace", two_tensors(0, 0, 96),
     "tensor 'a': offset: found 0 (an overlap), expected at least 16, where tensor 'b' ends"},
    {"UnknownTypeWithinAnother", two_tensors(0, 32, 96, kTypeUnknown),
     "tensor 'b': offset: found 32 (an overlap), expected at least 48, where tensor 'a' ends"},
};

INSTANTIATE_TEST_SUITE_P(Gguf, MalformedGguf, testing::ValuesIn(kMalformed),
                         [](const auto& test) { return std::string(test.param.name); });

// What is unusual and right all the same: the cases above fail for the reason that they name.
TEST(Gguf, AcceptsTheGoodNeighboursOfTheMalformed) {
  for (const std::string& good :
       {header(0, 0), header(0, 0, 2), one_value(kUint64, u64(INT64_MAX)), one_value(kBool, "\1"),
        one_value(kString, text("")), one_value(kArray, u32(kString) + u64(2) + text("") + text("x")),
        one_value(kArray, u32(kUint8) + u64(0)), with_alignment(kUint32, u32(1)),
        one_tensor({}, kTypeF32, 0, 4), one_tensor({4, 1, 1, 1}, kTypeF32, 0, 16),
        one_tensor({4}, kTypeF32, 32, 48), one_tensor({64}, kTypeQ80, 0, 68),
        one_tensor({4}, kTypeUnknown, 0, 0), two_tensors(0, 64, 80), two_tensors(32, 0, 80),
        padded(header(1, 0) + tensor("\xff", {4}, kTypeF32, 0), 16)})
    EXPECT_EQ(error_of_bytes(good), "");
}

TEST(Gguf, DataStartsAtTheAlignmentOfTheFile) {
  const auto bytes = [](uint32_t alignment) {
    return padded(header(1, 1) + text("general.alignment") + u32(kUint32) + u32(alignment) +
                      tensor("w", {1}, kTypeF32, alignment),
                  alignment + 4, alignment) +
           "end";
  };
  for (const uint32_t alignment : {1u, 8u, 256u}) {
    std::string good = bytes(alignment);
    good.replace(good.size() - 7, 4, "\xde\xad\xbe\xef");
    const GgufFile file = GgufFile::parse(std::as_bytes(std::span(good)), "good.gguf");
    EXPECT_EQ(static_cast<const uint8_t*>(file.find("w")->data)[0], 0xde) << alignment;
  }
}

TEST(Gguf, ATypeThatIsNotKnownIsListed) {
  const std::string bytes = one_tensor({4}, kTypeUnknown, 0, 64);
  const GgufFile file = GgufFile::parse(std::as_bytes(std::span(bytes)), "new.gguf");
  EXPECT_EQ(file.type_name("w"), "type 99");
  EXPECT_EQ(
      error_of([&] { file.find("w"); }),
      "new.gguf: tensor 'w': type: found type 99, expected F32, F16, BF16, F64, I32, I64, Q8_0, Q5_0, Q4_0, "
      "Q4_K or Q6_K");
}

TEST(Gguf, EveryPrefixOfAGoodFileIsRefused) {
  const std::string good = read_text(KILIN_SOURCE_DIR "/tests/data/gguf/all_types.gguf");
  ASSERT_GT(good.size(), 3000u);
  EXPECT_EQ(error_of_bytes(good), "");
  // The last tensor, of 44 bytes, is padded to 64.
  for (size_t size = 0; size < good.size() - 20; ++size)
    ASSERT_NE(error_of_bytes(good.substr(0, size)), "") << size;
}

}  // namespace
}  // namespace kilin::io
