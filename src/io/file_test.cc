// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <utility>

#include "io/atomic_file.h"
#include "io/mapped_file.h"
#include "io/printable.h"
#include "io/test_support.h"

namespace kilin::io {
namespace {

TEST(MappedFile, ShowsTheBytesOfTheFile) {
  const TemporaryDirectory directory;
  const MappedFile file(directory.write("f", "hello"));
  for (Access access : {Access::kNormal, Access::kSequential, Access::kRandom, Access::kWillNeed}) {
    file.advise(access);
  }
  EXPECT_EQ(file.text(), "hello");
  EXPECT_EQ(file.bytes().size(), 5u);
  EXPECT_EQ(file.path(), directory.file("f"));
}

TEST(MappedFile, AnEmptyFileIsAnEmptySpan) {
  const TemporaryDirectory directory;
  const MappedFile file(directory.write("f", ""));
  file.advise(Access::kWillNeed);
  EXPECT_TRUE(file.bytes().empty());
}

TEST(MappedFile, MovesItsMapping) {
  const TemporaryDirectory directory;
  MappedFile first(directory.write("f", "hello"));
  MappedFile second(std::move(first));
  MappedFile third(directory.write("g", "other"));
  third = std::move(second);
  EXPECT_EQ(third.text(), "hello");
  EXPECT_EQ(third.path(), directory.file("f"));
}

TEST(MappedFile, RefusesWhatIsNoRegularReadableFile) {
  const TemporaryDirectory directory;
  const auto error = [](const std::string& path) { return error_of([&] { MappedFile file(path); }); };
  EXPECT_EQ(error("/no/such/file"), "/no/such/file: cannot open: No such file or directory");
  EXPECT_EQ(error(directory.path()), directory.path() + ": cannot open: Is a directory");
  EXPECT_EQ(error("/dev/null"), "/dev/null: cannot map: not a regular file");
  const std::string pipe = directory.file("pipe");
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_EQ(error(pipe), pipe + ": cannot map: not a regular file");
}

TEST(MappedFile, RefusesAFileWithoutPermission) {
  const TemporaryDirectory directory;
  const std::string path = directory.write("f", "secret");
  ::chmod(path.c_str(), 0);
  EXPECT_EQ(in_child([&] {
              constexpr uid_t kNobody = 65534;  // root may read everything
              if (::geteuid() == 0 && ::seteuid(kNobody) != 0) return 2;
              const std::string error = error_of([&] { MappedFile file(path); });
              return error == path + ": cannot open: Permission denied" ? 0 : 1;
            }),
            0);
}

TEST(AtomicFile, WithoutCommitNothingIsLeft) {
  const TemporaryDirectory directory;
  directory.write("f", "old");
  {
    AtomicFile file(directory.file("f"));
    file.write("new");
    EXPECT_EQ(file.written(), 3u);
    EXPECT_EQ(directory.entries(), 2u);
  }
  EXPECT_EQ(directory.entries(), 1u);
  EXPECT_EQ(read_text(directory.file("f")), "old");
}

TEST(AtomicFile, CommitReplacesTheOldFile) {
  const TemporaryDirectory directory;
  directory.write("f", "old");
  AtomicFile file(directory.file("f"));
  file.write("new");
  EXPECT_EQ(read_text(directory.file("f")), "old");
  file.commit();
  EXPECT_EQ(read_text(directory.file("f")), "new");
  EXPECT_EQ(directory.entries(), 1u);
}

TEST(Printable, KeepsAnyNameOnOneShortLine) {
  EXPECT_EQ(printable("model.norm"), "model.norm");
  EXPECT_EQ(printable("a\nb\xff"), "a\\x0ab\\xff");
  EXPECT_EQ(printable("abcdef", 3), "abc...");
}

}  // namespace
}  // namespace kilin::io
