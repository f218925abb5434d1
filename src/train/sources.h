// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "train/config.h"
#include "train/rows.h"

namespace kilin::train {

struct Sources {
  std::unique_ptr<RowSource> train;
  std::unique_ptr<RowSource> valid;  // null: none
  std::vector<std::string> notes;    // lines for the log
};

// Opens what [data] names. Throws Error naming the line and key for files that do not fit the model: another
// vocabulary, another tokenizer, too little text.
Sources open_sources(const TrainConfig& config);

}  // namespace kilin::train
