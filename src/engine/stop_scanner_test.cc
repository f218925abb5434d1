// SPDX-License-Identifier: Apache-2.0
#include "engine/stop_scanner.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace kilin {
namespace {

TEST(StopScanner, passes_text_through_without_stops) {
  StopScanner s({});
  EXPECT_EQ(s.push("abc"), "abc");
  EXPECT_EQ(s.flush(), "");
  EXPECT_FALSE(s.stopped());
}

TEST(StopScanner, holds_back_what_may_become_a_stop_text_and_lets_it_go) {
  StopScanner s({"END"});
  EXPECT_EQ(s.push("the E"), "the ");
  EXPECT_EQ(s.push("N"), "");
  EXPECT_EQ(s.push("g"), "ENg");
  EXPECT_EQ(s.push("EEN"), "E");
  EXPECT_EQ(s.flush(), "EN");
}

TEST(StopScanner, finds_a_stop_text_over_any_cut) {
  const std::string text = "one two STOP three";
  for (size_t i = 0; i <= text.size(); ++i) {
    for (size_t j = i; j <= text.size(); ++j) {
      StopScanner s({"STOP", "three"});
      std::string out;
      for (const std::string& piece : {text.substr(0, i), text.substr(i, j - i), text.substr(j)})
        out += s.push(piece);
      out += s.flush();
      EXPECT_EQ(out, "one two ");
      EXPECT_TRUE(s.stopped());
    }
  }
}

TEST(StopScanner, the_earliest_stop_text_wins) {
  StopScanner s({"world", "lo w"});
  EXPECT_EQ(s.push("hello world"), "hel");
}

TEST(StopScanner, an_empty_stop_text_is_refused) { EXPECT_THROW(StopScanner({""}), Error); }

}  // namespace
}  // namespace kilin
