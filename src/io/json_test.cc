// SPDX-License-Identifier: Apache-2.0
#include "io/json.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "io/test_support.h"

namespace kilin::io {
namespace {

constexpr const char* kConfig = KILIN_SOURCE_DIR "/models/kilin-docs-10m/config.json";

std::string parse_error(const std::string& text) {
  return error_of([&] { parse_json(text, "c.json"); });
}

JsonReader reader(const std::string& text) { return {parse_json(text, "config.json"), "config.json"}; }

TEST(Json, ParsesWhatNlohmannParses) {
  const std::string text = R"({"a":[1,-2,3.5,true,null,"\u00e9"],"b":{"c":{}}, "big":18446744073709551615})";
  EXPECT_EQ(parse_json(text, "c.json"), nlohmann::json::parse(text));
  EXPECT_EQ(parse_json("3", "c.json"), 3);
}

TEST(Json, ErrorsNameFileLineAndColumn) {
  EXPECT_EQ(parse_error("{\n  \"a\": 1,\n  \"a\": 2}"),
            "c.json: line 3, column 5: key 'a' comes twice in the same object");
  EXPECT_EQ(parse_error("{\"a\": {\"x\": 1}, \"b\": {\"x\": 1}}"), "");
  EXPECT_EQ(parse_error("{\"a\": 1,}"),
            "c.json: line 1, column 9: syntax error while parsing object key - unexpected '}'; expected "
            "string literal");
  EXPECT_EQ(parse_error(""),
            "c.json: line 1, column 1: syntax error while parsing value - unexpected end of input; expected "
            "'[', '{', or "
            "a literal");
  EXPECT_EQ(parse_error("[1e999]"), "c.json: line 1, column 7: number overflow parsing '1e999'");
  EXPECT_TRUE(parse_error("[1]\n[2]").starts_with("c.json: line 2, column 1: syntax error"));
  EXPECT_TRUE(parse_error("[NaN]").starts_with("c.json: line 1, column 2: syntax error"));
  EXPECT_TRUE(parse_error("[\"\\ud800\"]").starts_with("c.json: line 1, column 9: syntax error"));
  EXPECT_TRUE(parse_error("[\"\xc3(\"]").starts_with("c.json: line 1, column 4: syntax error"));
  EXPECT_EQ(parse_error(std::string("{}\0x", 4)), "c.json: found a NUL byte at offset 2, expected JSON text");
}

TEST(Json, LimitsNestingAndSize) {
  EXPECT_EQ(parse_error(std::string(64, '[') + std::string(64, ']')), "");
  EXPECT_EQ(parse_error(std::string(65, '[') + std::string(65, ']')),
            "c.json: line 1, column 65: found nesting deeper than 64 levels, expected at most 64");
  EXPECT_EQ(parse_error(std::string(1'000'000, '[')),
            "c.json: line 1, column 65: found nesting deeper than 64 levels, expected at most 64");
  const TemporaryDirectory directory;
  const std::string path = directory.write("big.json", "[1, 2, 3]");
  EXPECT_EQ(parse_json_file(path, 9).size(), 3u);
  EXPECT_EQ(error_of([&] { parse_json_file(path, 8); }),
            path + ": found 9 bytes, expected at most 8 bytes of JSON");
}

TEST(JsonReader, ReadsTheReferenceConfig) {
  const JsonReader config = JsonReader::open(kConfig);
  EXPECT_EQ(config.integer("hidden_size", 1, 1 << 20), 256);
  EXPECT_EQ(config.number("rms_norm_eps", 0, 1), 1e-5);
  EXPECT_EQ(config.number("rope_theta"), 10000.0);
  EXPECT_EQ(config.string("model_type"), "kimi_linear");
  EXPECT_TRUE(config.boolean("mla_use_nope"));
  EXPECT_FALSE(config.has("q_lora_rank"));  // null
  EXPECT_EQ(config.integer_or("q_lora_rank", 0, 0, 100), 0);
  EXPECT_FALSE(config.optional_object("rope_scaling").has_value());
  EXPECT_EQ(config.object("linear_attn_config").integers("full_attn_layers", 1, 8),
            (std::vector<int64_t>{4, 8}));
}

TEST(JsonReader, ErrorsNameFileKeyFoundAndExpected) {
  const JsonReader r = reader(
      R"({"n":"abc","l":{"head_dim":"abc","x":0},"f":1.0,"big":18446744073709551615,"a":[1,"2",3],"t":1,)"
      R"("o":[{"k":1},2],"null":null,"s":["x",{}],"text":"a\nb"})");
  const auto error = [&](auto f) { return error_of([&] { f(); }); };
  const std::string c = "config.json: key ";
  EXPECT_EQ(error([&] { r.object("l").integer("head_dim", 1, 65536); }),
            c + "'l.head_dim': found \"abc\", expected an integer from 1 to 65536");
  EXPECT_EQ(error([&] { r.object("l").integer("x", 1, 65536); }),
            c + "'l.x': found 0, expected an integer from 1 to 65536");
  EXPECT_EQ(error([&] { r.object("l").integer("y", 1, 8); }),
            c + "'l.y': missing, expected an integer from 1 to 8");
  EXPECT_EQ(error([&] { r.integer("f", 0, 2); }), c + "'f': found 1.0, expected an integer from 0 to 2");
  EXPECT_EQ(error([&] { r.integer("big", 0, INT64_MAX); }),
            c + "'big': found 18446744073709551615, expected an integer of at least 0");
  EXPECT_EQ(error([&] { r.integer("null", 0, 2); }),
            c + "'null': found null, expected an integer from 0 to 2");
  EXPECT_EQ(error([&] { r.integer_or("n", 7, 0, 2); }),
            c + "'n': found \"abc\", expected an integer from 0 to 2");
  EXPECT_EQ(error([&] { r.number("n"); }), c + "'n': found \"abc\", expected a number");
  EXPECT_EQ(error([&] { r.number("t", 2); }), c + "'t': found 1, expected a number of at least 2");
  EXPECT_EQ(error([&] { r.number("t", 2, 3); }), c + "'t': found 1, expected a number from 2 to 3");
  EXPECT_EQ(error([&] { r.boolean("t"); }), c + "'t': found 1, expected true or false");
  EXPECT_EQ(error([&] { r.string("t"); }), c + "'t': found 1, expected a string");
  EXPECT_EQ(error([&] {
              r.choice("text", {"silu", "gelu"});
            }),
            c + "'text': found \"a\\x0ab\", expected \"silu\" or \"gelu\"");
  EXPECT_EQ(error([&] { r.integers("t"); }), c + "'t': found 1, expected an array of integers");
  EXPECT_EQ(error([&] { r.integers("a"); }), c + "'a[1]': found \"2\", expected an integer");
  EXPECT_EQ(error([&] { r.strings("s"); }), c + "'s[1]': found an object, expected a string");
  EXPECT_EQ(error([&] { r.object("t"); }), c + "'t': found 1, expected an object");
  EXPECT_EQ(error([&] { r.objects("o"); }), c + "'o[1]': found 2, expected an object");
  EXPECT_EQ(error([&] { r.value("none"); }), c + "'none': missing, expected a value");
  EXPECT_EQ(error([] { reader("[1]"); }), "config.json: found an array of 1, expected a JSON object");
}

TEST(JsonReader, ListsTheKeysNobodyAskedFor) {
  const JsonReader r =
      reader(R"({"a":1,"b":2,"c":{"d":3,"e":4},"f":{"g":1},"h":[{"i":1,"j":2}],"k":0,"l":null})");
  EXPECT_EQ(r.unread_keys(), (std::vector<std::string>{"a", "b", "c", "f", "h", "k", "l"}));
  EXPECT_EQ(r.integer("a", 0, 9), 1);
  EXPECT_EQ(r.object("c").integer("d", 0, 9), 3);
  EXPECT_EQ(r.value("f").size(), 1u);
  EXPECT_EQ(r.objects("h")[0].integer("i", 0, 9), 1);
  r.ignore({"k", "absent"});
  EXPECT_EQ(r.integer_or("l", 5, 0, 9), 5);
  EXPECT_EQ(r.unread_keys(), (std::vector<std::string>{"b", "c.e", "h[0].j"}));
  EXPECT_EQ(r.object("c").integer("e", 0, 9), 4);
  EXPECT_EQ(r.unread_keys(), (std::vector<std::string>{"b", "h[0].j"}));
}

TEST(JsonReader, NestedReadersOutliveTheDocument) {
  const JsonReader inner = reader(R"({"a":{"b":{"c":7}}})").object("a").object("b");
  EXPECT_EQ(inner.integer("c", 0, 9), 7);
  EXPECT_EQ(inner.key_path("c"), "a.b.c");
}

}  // namespace
}  // namespace kilin::io
