// SPDX-License-Identifier: Apache-2.0
// JSONL records of kilin eval: any bytes give records that hold what their task needs, or an Error.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/error.h"
#include "eval/records.h"
#include "eval/scores.h"

namespace {

void check(bool ok) {
  if (!ok) __builtin_trap();
}

void check_record(const kilin::eval::Record& record, kilin::eval::RecordKind kind) {
  check(record.line >= 1);
  if (kind == kilin::eval::RecordKind::kChoice) {
    const auto count = static_cast<int64_t>(record.choices.size());
    check(count >= 2 && record.right >= 0 && record.right < count);
    return;
  }
  check(!record.answers.empty());
  for (const std::string& answer : record.answers) {
    const auto score = kilin::eval::score_answer(record.prompt, {&answer, 1});
    check(score.f1 >= 0 && score.f1 <= 1);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using Kind = kilin::eval::RecordKind;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  for (const Kind kind : {Kind::kLabel, Kind::kChoice, Kind::kAnswer}) {
    try {
      for (const auto& record : kilin::eval::parse_records(text, kind, "f.jsonl")) check_record(record, kind);
    } catch (const kilin::Error&) {
    }
  }
  return 0;
}
