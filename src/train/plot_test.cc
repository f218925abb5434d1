// SPDX-License-Identifier: Apache-2.0
#include "train/plot.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "io/test_support.h"

namespace kilin::train {
namespace {

using io::error_of;
using io::read_text;
using io::TemporaryDirectory;

TEST(Plot, ReadsTheCurveOfALog) {
  const TemporaryDirectory directory;
  const std::string log = directory.write(
      "log.jsonl",
      "{\"step\":1,\"loss\":2.5}\n{\"step\":2,\"valid_loss\":2}\n{\"step\":3,\"loss\":1}\n{\"step\":4,\"lo");
  const Curve curve = read_curve(directory.path(), {});
  EXPECT_EQ(curve.x, (std::vector<double>{1, 3}));
  EXPECT_EQ(curve.y, (std::vector<double>{2.5, 1}));
  EXPECT_EQ(curve.label, std::filesystem::path(directory.path()).filename());
  PlotOptions options;
  options.y = "accuracy";
  EXPECT_EQ(error_of([&] { read_curve(log, options); }), log + ": no record has both 'step' and 'accuracy'");
  const std::string bad = directory.write("bad.jsonl", "{\"step\":1,\"loss\":2}\nnot json\n");
  EXPECT_EQ(error_of([&] { read_curve(bad, {}); }),
            bad + ":2: found no JSON object, expected a record of a training log");
}

TEST(Plot, ReadsTheCsvThatIsKeptOfARun) {
  const TemporaryDirectory directory;
  const std::string log = directory.write("log.csv", "step,loss,valid_loss\n1,2.5,\n2,,2\n3,1e-1,\n4,7");
  const Curve curve = read_curve(directory.path(), {});
  EXPECT_EQ(curve.x, (std::vector<double>{1, 3}));
  EXPECT_EQ(curve.y, (std::vector<double>{2.5, 0.1}));
  EXPECT_EQ(curve.label, std::filesystem::path(directory.path()).filename());
  PlotOptions options;
  options.y = "accuracy";
  EXPECT_EQ(error_of([&] { read_curve(log, options); }), log + ": no record has both 'step' and 'accuracy'");
  const std::string bad = directory.write("bad.csv", "step,loss\n1,two\n");
  EXPECT_EQ(error_of([&] { read_curve(bad, {}); }), bad + ":2: found 'two', expected a number");
  const std::string cut = directory.write("cut.csv", "step,loss\n1\n");
  EXPECT_EQ(error_of([&] { read_curve(cut, {}); }),
            cut + ":2: found 1 fields, expected the 2 of the first line");
}

TEST(Plot, ScriptQuotesWhatUsersName) {
  PlotOptions options;
  options.title = "a \"title\"";
  const std::string script = plot_script({{"x\"; !rm\\\n", {1, 2}, {3, 4}}}, options, "svg");
  EXPECT_NE(script.find("set title \"a \\\"title\\\"\"\n"), std::string::npos);
  EXPECT_NE(script.find("title \"x\\\"; !rm\\\\ \"\n"), std::string::npos);
  EXPECT_NE(script.find("1 3\n2 4\nEND_OF_CURVE\n"), std::string::npos);
}

TEST(Plot, DrawsSvgAndPng) {
  if (std::system("command -v gnuplot > /dev/null") != 0) GTEST_SKIP() << "gnuplot is not installed";
  const TemporaryDirectory directory;
  const std::vector<Curve> curves{{"first", {1, 2, 3}, {3, 2, 1}}, {"second", {1, 2, 3}, {3, 1, 0.5}}};
  draw_plot(curves, {}, directory.file("p.svg"));
  const std::string svg = read_text(directory.file("p.svg"));
  EXPECT_NE(svg.find("<svg"), std::string::npos);
  EXPECT_NE(svg.find("first"), std::string::npos);
  EXPECT_NE(svg.find("training loss"), std::string::npos);
  draw_plot(curves, {}, directory.file("p.png"));
  EXPECT_TRUE(read_text(directory.file("p.png")).starts_with("\x89PNG"));
  EXPECT_EQ(error_of([&] { draw_plot(curves, {}, directory.file("p.gif")); }),
            directory.file("p.gif") + ": expected a name that ends in .svg or .png");
}

TEST(Plot, WithoutGnuplotSaysWhatToInstall) {
  const TemporaryDirectory directory;
  const int status = io::in_child([&] {
    ::setenv("PATH", "/nowhere", 1);
    const std::string error = error_of([&] { draw_plot({{"a", {1}, {1}}}, {}, directory.file("p.svg")); });
    return error == "plot: gnuplot is not installed (Debian: apt-get install gnuplot-nox)" ? 0 : 1;
  });
  EXPECT_EQ(status, 0);
  EXPECT_FALSE(std::filesystem::exists(directory.file("p.svg")));
}

}  // namespace
}  // namespace kilin::train
