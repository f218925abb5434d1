// SPDX-License-Identifier: Apache-2.0
// Any bytes are either refused with an Error of one line or give views that lie within them. What is read is
// also taken as a tokenizer.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <span>
#include <string>

#include "base/error.h"
#include "io/gguf.h"
#include "text/chat_template.h"
#include "text/gguf_tokenizer.h"

namespace {

void require(bool ok) {
  if (!ok) std::abort();
}

// Runs f; an Error must be one line of printable text.
template <class F>
void refuse_or_do(const F& f) {
  try {
    f();
  } catch (const kilin::Error& error) {
    for (const char c : std::string(error.what())) require(static_cast<unsigned char>(c) >= 0x20);
  }
}

void read_tensors(const kilin::io::GgufFile& file, std::span<const std::byte> bytes) {
  uint64_t total = 0;
  for (const std::string& name : file.names()) {
    require(file.contains(name) && !file.type_name(name).empty());
    const kilin::TensorView* view = nullptr;
    try {
      view = file.find(name);
    } catch (const kilin::Error&) {  // an element type that Kilin does not read
      continue;
    }
    require(view != nullptr && view->elements() > 0);
    const std::span data(static_cast<const std::byte*>(view->data), view->bytes());
    require(!data.empty() && data.data() >= bytes.data() && &data.back() <= &bytes.back());
    total += data.size();
    // The sanitizer objects when a view reaches outside.
    volatile int sum =
        std::accumulate(data.begin(), data.end(), 0, [](int s, std::byte b) { return s ^ int(b); });
    (void)sum;
  }
  require(total <= file.data_bytes() && file.data_bytes() <= bytes.size());
}

void read_tokenizer(const kilin::io::GgufFile& file) {
  refuse_or_do([&] { static_cast<void>(kilin::text::gguf_chat_template(file)); });
  const auto tokenizer = kilin::text::Tokenizer::from_gguf(file);
  for (const int32_t id : tokenizer.encode("Hello ab, 中文  1234's")) {
    require(id >= 0 && id < tokenizer.vocab_size());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  refuse_or_do([&] {
    const auto file = kilin::io::GgufFile::parse(bytes, "fuzz.gguf");
    read_tensors(file, bytes);
    for (const auto& [key, value] : file.metadata()) {
      require(file.has(key));
      refuse_or_do([&, name = key] { static_cast<void>(file.get_double(name)); });
      refuse_or_do([&, name = key] { static_cast<void>(file.get_strings(name)); });
    }
    read_tokenizer(file);
  });
  return 0;
}
