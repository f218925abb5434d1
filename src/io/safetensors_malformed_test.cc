// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <ostream>
#include <string>
#include <vector>

#include "io/safetensors.h"
#include "io/test_support.h"

namespace kilin::io {
namespace {

std::string error_of_bytes(const std::string& bytes) {
  return error_of([&] { SafetensorsFile::parse(std::as_bytes(std::span(bytes)), "bad.safetensors"); });
}

struct Malformed {
  const char* name;
  std::string header;
  size_t data_bytes;
  std::string message;  // all of it, behind "bad.safetensors: "
};
void PrintTo(const Malformed& malformed, std::ostream* out) { *out << malformed.name; }

class MalformedHeader : public testing::TestWithParam<Malformed> {};

TEST_P(MalformedHeader, IsRefusedWithFileFieldFoundAndExpected) {
  const Malformed& malformed = GetParam();
  EXPECT_EQ(error_of_bytes(safetensors_text(malformed.header, malformed.data_bytes)),
            "bad.safetensors: " + malformed.message);
}

std::string one_tensor(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"w":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
}

const std::vector<Malformed> kMalformed = {
    {"EmptyHeader", "", 0, "header: found nothing, expected a JSON object that starts with '{'"},
    {"HeaderIsArray", "[1]", 0, "header: found '[1]', expected a JSON object that starts with '{'"},
    {"HeaderStartsWithSpace", " {}", 0, "header: found ' {}', expected a JSON object that starts with '{'"},
    {"HeaderCutOff", R"({"w":)", 0,
     "header: line 1, column 5: syntax error while parsing value - unexpected end of input; expected '[', "
     "'{', or a "
     "literal"},
    {"TextBehindHeader", "{} x", 0,
     "header: line 1, column 4: syntax error while parsing value - invalid literal; last read: '{} x'; "
     "expected end "
     "of input"},
    {"NulInHeader", std::string("{}\0", 3), 0, "header: found a NUL byte at offset 2, expected JSON text"},
    {"NotUtf8", "{\"\xff\":1}", 0,
     "header: line 1, column 3: syntax error while parsing object key - invalid string: ill-formed UTF-8 "
     "byte; last "
     "read: '\"\\xff'; expected string literal"},
    {"SameTensorTwice", R"({"w":1,"w":2})", 0,
     "header: line 1, column 10: key 'w' comes twice in the same object"},
    {"SameFieldTwice", R"({"w":{"dtype":"F32","dtype":"F16"}})", 0,
     "header: line 1, column 27: key 'dtype' comes twice in the same object"},
    {"NestedTooDeep", R"({"w":{"shape":[[1]]}})", 0,
     "header: line 1, column 16: found nesting deeper than 3 levels, expected at most 3"},
    {"TensorIsNumber", R"({"w":3})", 0,
     "tensor 'w': found 3, expected an object with dtype, shape and data_offsets"},
    {"UnknownField", R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"scale":1}})", 4,
     "tensor 'w': keys: found 'scale', expected dtype, shape and data_offsets only"},
    {"NoDtype", R"({"w":{"shape":[1],"data_offsets":[0,4]}})", 4,
     "tensor 'w': dtype: found nothing, expected the name of an element type, such as \"F32\" or \"BF16\""},
    {"DtypeIsNumber", one_tensor("32", "[1]", "[0,4]"), 4,
     "tensor 'w': dtype: found 32, expected the name of an element type, such as \"F32\" or \"BF16\""},
    {"DtypeUnknown", one_tensor("\"F33\"", "[1]", "[0,4]"), 4,
     "tensor 'w': dtype: found \"F33\", expected the name of an element type, such as \"F32\" or \"BF16\""},
    {"NoShape", R"({"w":{"dtype":"F32","data_offsets":[0,4]}})", 4,
     "tensor 'w': shape: found nothing, expected an array of non-negative integers"},
    {"ShapeIsNumber", one_tensor("\"F32\"", "1", "[0,4]"), 4,
     "tensor 'w': shape: found 1, expected an array of non-negative integers"},
    {"ShapeNegative", one_tensor("\"F32\"", "[2,-1]", "[0,4]"), 4,
     "tensor 'w': shape[1]: found -1, expected a non-negative integer"},
    {"ShapeFraction", one_tensor("\"F32\"", "[1.0]", "[0,4]"), 4,
     "tensor 'w': shape[0]: found 1.0, expected a non-negative integer"},
    {"ShapeAbove63Bits", one_tensor("\"F32\"", "[9223372036854775808]", "[0,4]"), 4,
     "tensor 'w': shape[0]: found 9223372036854775808, expected a non-negative integer"},
    {"ShapeOverflows", one_tensor("\"F32\"", "[4294967296,4294967296]", "[0,0]"), 0,
     "tensor 'w': shape: found [4294967296, 4294967296], expected a size below 2^63 bits"},
    {"ShapeOverflowsBeforeZero", one_tensor("\"F32\"", "[4294967296,4294967296,0]", "[0,0]"), 0,
     "tensor 'w': shape: found [4294967296, 4294967296, 0], expected a size below 2^63 bits"},
    {"ShapeNotWholeBytes", one_tensor("\"F4\"", "[3]", "[0,1]"), 1,
     "tensor 'w': shape: found 12 bits, expected whole bytes"},
    {"NoOffsets", R"({"w":{"dtype":"F32","shape":[1]}})", 4,
     "tensor 'w': data_offsets: found nothing, expected two non-negative integers [begin, end]"},
    {"OneOffset", one_tensor("\"F32\"", "[1]", "[4]"), 4,
     "tensor 'w': data_offsets: found [4], expected two non-negative integers [begin, end]"},
    {"OffsetsNegative", one_tensor("\"F32\"", "[1]", "[-4,0]"), 4,
     "tensor 'w': data_offsets: found [-4,0], expected two non-negative integers [begin, end]"},
    {"OffsetsSwapped", one_tensor("\"F32\"", "[1]", "[4,0]"), 4,
     "tensor 'w': data_offsets: found [4,0], expected begin not behind end"},
    {"OffsetsBehindFile", one_tensor("\"F32\"", "[2]", "[0,8]"), 7,
     "tensor 'w': data_offsets: found [0,8], expected an end of at most 7, the bytes of data in the file"},
    {"OffsetsHuge", one_tensor("\"F32\"", "[1]", "[0,18446744073709551615]"), 4,
     "tensor 'w': data_offsets: found [0,18446744073709551615], expected an end of at most 4, the bytes of "
     "data in "
     "the file"},
    {"SizeDiffers", one_tensor("\"BF16\"", "[3,2]", "[0,8]"), 8,
     "tensor 'w': data_offsets: found 8 bytes, expected 12 bytes for BF16 of shape [3, 2]"},
    {"HoleAtStart", one_tensor("\"U8\"", "[4]", "[2,6]"), 6,
     "tensor 'w': data_offsets: found begin 2 (a hole), expected 0, after the start of the data"},
    {"HoleBetween",
     R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[3,5]}})",
     5, "tensor 'b': data_offsets: found begin 3 (a hole), expected 2, after tensor 'a'"},
    {"Overlap",
     R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[1,3]},"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})",
     3, "tensor 'a': data_offsets: found begin 1 (an overlap), expected 2, after tensor 'b'"},
    {"DataBehindLastTensor", one_tensor("\"U8\"", "[4]", "[0,4]"), 5,
     "data: found 5 bytes, expected 4, where tensor 'w' ends"},
    {"DataWithoutTensors", "{}", 3, "data: found 3 bytes, expected 0, where a file without tensors ends"},
    {"MetadataIsString", R"({"__metadata__":"x"})", 0,
     "__metadata__: found \"x\", expected an object of strings"},
    {"MetadataHoldsNumber", R"({"__metadata__":{"step":3}})", 0,
     "__metadata__: key 'step': found 3, expected a string"},
    {"NameOnOneLine", R"({"a\nb":3})", 0,
     "tensor 'a\\x0ab': found 3, expected an object with dtype, shape and data_offsets"},
};

INSTANTIATE_TEST_SUITE_P(Safetensors, MalformedHeader, testing::ValuesIn(kMalformed),
                         [](const auto& test) { return std::string(test.param.name); });

TEST(Safetensors, RefusesFilesTooShortForTheirHeader) {
  EXPECT_EQ(error_of_bytes(""),
            "bad.safetensors: header length: found a file of 0 bytes, expected at least 8");
  EXPECT_EQ(error_of_bytes("1234567"),
            "bad.safetensors: header length: found a file of 7 bytes, expected at least 8");
  EXPECT_EQ(error_of_bytes(std::string("\3\0\0\0\0\0\0\0{}", 10)),
            "bad.safetensors: header length: found 3 bytes, expected at most 2 (the file has 10)");
}

TEST(Safetensors, RefusesHeadersAboveTheLimitOfTheFormat) {
  EXPECT_EQ(error_of_bytes(std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10)),
            "bad.safetensors: header length: found 18446744073709551615 bytes, expected at most 100000000");
}

TEST(Safetensors, SaysThatAGitLfsPointerIsNotTheFile) {
  EXPECT_EQ(error_of_bytes("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
            "bad.safetensors: found a Git LFS pointer, expected the file itself (run: git lfs pull)");
}

TEST(Safetensors, EveryPrefixOfAGoodFileIsRefusedOrRead) {
  const std::string good = safetensors_text(one_tensor("\"F32\"", "[2,2]", "[0,16]"), 16);
  EXPECT_EQ(error_of_bytes(good), "");
  for (size_t size = 0; size < good.size(); ++size)
    EXPECT_NE(error_of_bytes(good.substr(0, size)), "") << size;
}

}  // namespace
}  // namespace kilin::io
