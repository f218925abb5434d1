// SPDX-License-Identifier: Apache-2.0
// Any bytes are either refused with a one-line Error or are a token file all of whose ids can be asked for.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "train/token_file.h"

namespace {

void require(bool ok) {
  if (!ok) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  try {
    const auto file = kilin::train::TokenFile::parse(bytes, "t.kbin");
    require(file.tokens() <= size);
    std::vector<int32_t> ids(file.tokens());
    file.read(0, ids.size(), ids.data());
    for (const int32_t id : ids) require(id >= 0 && static_cast<uint64_t>(id) < file.header().vocab_size);
  } catch (const kilin::Error& error) {
    require(std::string(error.what()).find('\n') == std::string::npos);
  }
  return 0;
}
