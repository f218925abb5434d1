// SPDX-License-Identifier: Apache-2.0
#include "io/checkpoint.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "io/safetensors_writer.h"
#include "io/test_support.h"

namespace kilin::io {
namespace {

constexpr const char* kDocs = KILIN_SOURCE_DIR "/models/kilin-docs-10m";
constexpr const char* kTiny = KILIN_SOURCE_DIR "/tests/data/reference/tiny-random";
constexpr uint64_t kTinyBytes = (338'438 + 3 * 8) * 4;  // float32 parameters and 3 router biases

TEST(Checkpoint, ReadsTheShardedReference) {
  const Checkpoint checkpoint = Checkpoint::open(kDocs);
  EXPECT_EQ(checkpoint.names().size(), 493u);
  EXPECT_EQ(checkpoint.files().size(), 2u);
  EXPECT_EQ(checkpoint.files()[0], std::string(kDocs) + "/model-00001-of-00002.safetensors");
  EXPECT_EQ(checkpoint.total_bytes(), 25'796'640u);  // metadata.total_size of the index
  int64_t elements = 0;
  for (const std::string& name : checkpoint.names()) elements += checkpoint.get(name).elements();
  EXPECT_EQ(elements, 12'896'536 + 7 * 16);  // the parameters and 7 router biases
  EXPECT_EQ(to_string(checkpoint.get("lm_head.weight").shape), "[8192, 256]");
  EXPECT_EQ(checkpoint.get("model.layers.0.self_attn.A_log").dtype, Dtype::kF32);
}

TEST(Checkpoint, ReadsADirectoryWithOneFileAndThatFileItself) {
  const Checkpoint directory = Checkpoint::open(kTiny);
  const Checkpoint file = Checkpoint::open(std::string(kTiny) + "/model.safetensors");
  EXPECT_EQ(directory.names(), file.names());
  EXPECT_EQ(directory.total_bytes(), kTinyBytes);
  EXPECT_EQ(directory.find("no.such.tensor"), nullptr);
  EXPECT_EQ(error_of([&] { directory.get("no.such.tensor"); }),
            std::string(kTiny) + ": tensor 'no.such.tensor': found nothing of that name among 151 tensors");
}

TEST(Checkpoint, CopiesKeepTheMappingsAlive) {
  std::vector<Checkpoint> kept;
  const TensorView* view = nullptr;
  {
    const Checkpoint checkpoint = Checkpoint::open(kTiny);
    kept.push_back(checkpoint);
    view = kept[0].find("lm_head.weight");
  }
  kept[0].advise(Access::kWillNeed);
  EXPECT_NE(static_cast<const unsigned char*>(view->data)[view->bytes() - 1], 256);
}

// A directory with tensor `a` in s1 and `b` in s2, and an index as given.
class Shards : public testing::Test {
 protected:
  Shards() {
    write_safetensors(directory_.file("s1.safetensors"),
                      std::vector<NamedTensor>{{"a", {Dtype::kU8, {4}, "abcd"}}});
    write_safetensors(directory_.file("s2.safetensors"),
                      std::vector<NamedTensor>{{"b", {Dtype::kU8, {4}, "efgh"}}});
  }
  std::string error(const std::string& index) const {
    directory_.write("model.safetensors.index.json", index);
    return error_of([&] { Checkpoint::open(directory_.path()); });
  }
  std::string error_with_map(const std::string& map) const { return error(R"({"weight_map":)" + map + "}"); }
  std::string index() const { return directory_.file("model.safetensors.index.json"); }

  TemporaryDirectory directory_;
};

TEST_F(Shards, AreReadWhenIndexAndFilesAgree) {
  EXPECT_EQ(error_with_map(R"({"a":"s1.safetensors","b":"s2.safetensors"})"), "");
}

TEST_F(Shards, TheIndexMustBeAnObjectWithAWeightMap) {
  EXPECT_EQ(error("[]"), index() + ": found an array of 0, expected a JSON object");
  EXPECT_EQ(error("{}"), index() + ": key 'weight_map': missing, expected an object");
  EXPECT_EQ(error_with_map("[1]"), index() + ": key 'weight_map': found an array of 1, expected an object");
  EXPECT_EQ(error_with_map("{}"), index() + ": key 'weight_map': found no tensors, expected at least one");
}

TEST_F(Shards, TheIndexMustBeStrictJson) {
  EXPECT_EQ(error("{\n \"weight_map\": {\"a\":\"x\", \"a\":\"y\"}}"),
            index() + ": line 2, column 28: key 'a' comes twice in the same object");
  EXPECT_TRUE(error("{\"weight_map\"").starts_with(index() + ": line 1, column 13: syntax error"));
}

TEST_F(Shards, ShardNamesMustNotLeaveTheDirectory) {
  for (const std::string name : {"../s1.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a\\\\b"}) {
    const std::string text = error_with_map(R"({"a":")" + name + "\"}");
    EXPECT_TRUE(text.starts_with(index() + ": key 'weight_map.a': found \"")) << text;
    EXPECT_TRUE(text.ends_with("expected the name of a file in the same directory")) << text;
  }
  EXPECT_EQ(error_with_map(R"({"a":1})"),
            index() + ": key 'weight_map.a': found 1, expected the name of a file in the same directory");
}

TEST_F(Shards, AMissingShardIsNamedWithIndexAndTensor) {
  EXPECT_EQ(error_with_map(R"({"a":"s1.safetensors","b":"s3.safetensors"})"),
            index() + ": tensor 'b': shard 's3.safetensors': found no such file, expected it in '" +
                directory_.path() + "'");
}

TEST_F(Shards, ATensorMustBeInItsShard) {
  EXPECT_EQ(error_with_map(R"({"a":"s1.safetensors","c":"s2.safetensors"})"),
            index() + ": tensor 'c': found no such tensor in shard 's2.safetensors', expected it there");
}

TEST_F(Shards, AShardMustNotHoldMoreThanTheIndexLists) {
  write_safetensors(
      directory_.file("s2.safetensors"),
      std::vector<NamedTensor>{{"b", {Dtype::kU8, {1}, "x"}}, {"extra", {Dtype::kU8, {1}, "x"}}});
  EXPECT_EQ(error_with_map(R"({"a":"s1.safetensors","b":"s2.safetensors"})"),
            directory_.file("s2.safetensors") + ": tensor 'extra': found in the shard, expected '" + index() +
                "' to list it there");
}

TEST_F(Shards, ABrokenShardIsNamed) {
  directory_.write("s2.safetensors", "short");
  EXPECT_EQ(
      error_with_map(R"({"a":"s1.safetensors","b":"s2.safetensors"})"),
      directory_.file("s2.safetensors") + ": header length: found a file of 5 bytes, expected at least 8");
}

TEST_F(Shards, ADirectoryWithoutIndexIsRefused) {
  EXPECT_EQ(error_of([&] { Checkpoint::open(directory_.path()); }),
            directory_.path() +
                ": found neither model.safetensors nor model.safetensors.index.json in this directory, "
                "expected one of them");
}

TEST(Checkpoint, APathThatDoesNotExistIsNamed) {
  EXPECT_EQ(error_of([] { Checkpoint::open("/no/such/model"); }),
            "/no/such/model: cannot open: No such file or directory");
}

}  // namespace
}  // namespace kilin::io
