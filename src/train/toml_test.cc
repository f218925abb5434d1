// SPDX-License-Identifier: Apache-2.0
#include "train/toml.h"

#include <gtest/gtest.h>

#include "io/test_support.h"

namespace kilin::train {
namespace {

using io::error_of;
using io::TemporaryDirectory;

constexpr const char* kText = R"(# a comment
top = 1
[optimizer]
kind = "adamw"
lr = 1e-3
betas = [0.9, 0.95]

[data.inner]
deep = true
)";

TEST(Toml, TypedValuesWithLines) {
  const TomlTable table = parse_toml(kText, "train.toml");
  const TomlReader root(table, "train.toml");
  const TomlReader optimizer = root.section("optimizer");
  EXPECT_EQ(root.integer("top", 0, 10), 1);
  EXPECT_EQ(optimizer.string("kind"), "adamw");
  EXPECT_EQ(optimizer.number("lr", 0, 1), 1e-3);
  EXPECT_EQ(optimizer.place("lr"), "train.toml:5");
  EXPECT_EQ(optimizer.key_path("lr"), "optimizer.lr");
  EXPECT_TRUE(root.section("data").section("inner").boolean_or("deep", false));
  EXPECT_EQ(optimizer.number_or("missing", 7, 0, 10), 7);
  EXPECT_FALSE(root.section("nothing").has("x"));
}

TEST(Toml, ErrorsNameLineAndKey) {
  const TomlTable table = parse_toml(kText, "train.toml");
  const TomlReader root(table, "train.toml");
  const TomlReader optimizer = root.section("optimizer");
  EXPECT_EQ(error_of([&] { optimizer.integer("kind", 1, 5); }),
            "train.toml:4: key 'optimizer.kind': found \"adamw\", expected a whole number from 1 to 5");
  EXPECT_EQ(error_of([&] { optimizer.number("lr", 1, 2); }),
            "train.toml:5: key 'optimizer.lr': found 0.001, expected a number from 1 to 2");
  EXPECT_EQ(error_of([&] { optimizer.string("name"); }),
            "train.toml: key 'optimizer.name' is missing, expected a text in quotes");
  EXPECT_EQ(error_of([&] {
              optimizer.choice_or("kind", "x", {"sgd", "muon"});
            }),
            "train.toml:4: key 'optimizer.kind': found \"adamw\", expected \"sgd\" or \"muon\"");
  EXPECT_EQ(error_of([&] { root.section("top"); }),
            "train.toml:2: key 'top': found 1, expected a section, [top]");
  EXPECT_EQ(error_of([&] { optimizer.strings("betas"); }),
            "train.toml:6: key 'optimizer.betas': found [0.9, 0.95], expected a text or a list of texts");
}

TEST(Toml, RefusesKeysThatNobodyAskedFor) {
  const TomlTable table = parse_toml(kText, "train.toml");
  const TomlReader root(table, "train.toml");
  root.integer("top", 0, 10);
  const TomlReader optimizer = root.section("optimizer");
  optimizer.string("kind");
  optimizer.number("lr", 0, 1);
  root.section("data").section("inner").boolean_or("deep", false);
  EXPECT_EQ(error_of([&] { root.refuse_unknown(); }),
            "train.toml:6: key 'optimizer.betas' is unknown (known in [optimizer]: kind, lr)");
  optimizer.value("betas");
  EXPECT_EQ(error_of([&] { root.refuse_unknown(); }), "");
}

TEST(Toml, MalformedTextNamesThePlace) {
  EXPECT_TRUE(error_of([] { parse_toml("a = 1\nb = = 2\n", "x.toml"); }).starts_with("x.toml:2:"));
  EXPECT_TRUE(error_of([] { parse_toml("a = 1\na = 2\n", "x.toml"); }).starts_with("x.toml:2:"));
  EXPECT_EQ(error_of([] { parse_toml("\nday = 2020-01-01\n", "x.toml"); }),
            "x.toml:2: key 'day': found a date or a time, which no key takes");
}

TEST(Toml, OverridesReplaceAndAdd) {
  TomlTable table = parse_toml(kText, "train.toml");
  set_toml(table, "optimizer.lr=0.5");
  set_toml(table, "optimizer.kind=muon");
  set_toml(table, "new.section.flag=true");
  set_toml(table, "run.out=runs/a=b");
  const TomlReader root(table, "train.toml");
  EXPECT_EQ(root.section("optimizer").number("lr", 0, 1), 0.5);
  EXPECT_EQ(root.section("optimizer").place("lr"), "--set optimizer.lr");
  EXPECT_EQ(root.section("optimizer").string("kind"), "muon");
  EXPECT_EQ(root.section("run").string("out"), "runs/a=b");
  EXPECT_TRUE(root.section("new").section("section").boolean_or("flag", false));
  EXPECT_EQ(error_of([&] { set_toml(table, "optimizer.lr"); }),
            "--set optimizer.lr: expected SECTION.KEY=VALUE");
  EXPECT_EQ(error_of([&] { set_toml(table, "a..b=1"); }), "--set a..b: expected SECTION.KEY=VALUE");
  EXPECT_EQ(error_of([&] { set_toml(table, "top.b=1"); }), "--set top.b: 'top' is no section (train.toml:2)");
}

TEST(Toml, IncludesAreMergedBelowTheFile) {
  const TemporaryDirectory directory;
  directory.write("base.toml", "[a]\nx = 1\ny = 2\nlist = [1, 2, 3]\n");
  const std::string path = directory.write("top.toml", "include = \"base.toml\"\n[a]\ny = 3\nlist = [4]\n");
  const TomlTable table = read_toml_file(path);
  const TomlReader a = TomlReader(table, path).section("a");
  EXPECT_EQ(a.integer("x", 0, 9), 1);
  EXPECT_EQ(a.integer("y", 0, 9), 3);
  EXPECT_EQ(a.place("x"), directory.file("base.toml") + ":2");
  EXPECT_EQ(flatten_toml(table).at("a.list"), "[4]");
}

TEST(Toml, IncludeFaultsNameTheLine) {
  const TemporaryDirectory directory;
  const std::string missing = directory.write("missing.toml", "\ninclude = \"nothing.toml\"\n");
  EXPECT_TRUE(error_of([&] { read_toml_file(missing); }).starts_with(missing + ":2: key 'include': "));
  const std::string cycle = directory.write("cycle.toml", "include = \"cycle.toml\"\n");
  EXPECT_NE(error_of([&] { read_toml_file(cycle); }).find("files deep"), std::string::npos);
  const std::string wrong = directory.write("wrong.toml", "include = 3\n");
  EXPECT_EQ(error_of([&] { read_toml_file(wrong); }),
            wrong + ":1: key 'include': expected a path or a list of paths");
}

TEST(Toml, FlattenWritesValuesAsText) {
  const auto flat = flatten_toml(parse_toml(kText, "train.toml"));
  EXPECT_EQ(flat.at("optimizer.betas"), "[0.9, 0.95]");
  EXPECT_EQ(flat.at("optimizer.kind"), "\"adamw\"");
  EXPECT_EQ(flat.at("data.inner.deep"), "true");
  EXPECT_EQ(flat.size(), 5u);
}

}  // namespace
}  // namespace kilin::train
