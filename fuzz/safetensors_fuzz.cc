// SPDX-License-Identifier: Apache-2.0
// Any bytes are either refused with an Error or give views that lie within them.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "io/safetensors.h"

namespace {

void require(bool ok) {
  if (!ok) std::abort();
}

void read_all(std::span<const std::byte> bytes) {
  const auto file = kilin::io::SafetensorsFile::parse(bytes, "fuzz.safetensors");
  uint64_t total = 0;
  for (const std::string& name : file.names()) {
    require(file.contains(name));
    const kilin::TensorView* view = nullptr;
    try {
      view = file.find(name);
    } catch (const kilin::Error&) {  // an element type that Kilin does not compute with
      total = file.data_bytes();
      continue;
    }
    require(view != nullptr);
    const std::span data(static_cast<const std::byte*>(view->data), view->bytes());
    if (!data.empty()) require(data.data() >= bytes.data() && &data.back() <= &bytes.back());
    total += data.size();
    // The sanitizer objects when a view reaches outside.
    volatile int sum =
        std::accumulate(data.begin(), data.end(), 0, [](int s, std::byte b) { return s ^ int(b); });
    (void)sum;
  }
  require(total >= file.data_bytes());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  try {
    read_all(bytes);
  } catch (const kilin::Error& error) {
    require(std::string(error.what()).find('\n') == std::string::npos);
  }
  // Once more as the header alone, behind a length that fits: mutations seldom get those 8 bytes right.
  std::vector<std::byte> framed(8);
  constexpr size_t kData = 16;
  const size_t length = size > kData ? size - kData : size;
  for (size_t i = 0; i < 8; ++i) framed[i] = static_cast<std::byte>(length >> (8 * i) & 0xff);
  framed.insert(framed.end(), bytes.begin(), bytes.end());
  try {
    read_all(framed);
  } catch (const kilin::Error& error) {
    require(std::string(error.what()).find('\n') == std::string::npos);
  }
  return 0;
}
