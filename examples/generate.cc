// SPDX-License-Identifier: Apache-2.0
// Kilin's C++ API in one file: read a prompt once, go on from it in two ways, save the state and restore it.
//   example_generate models/kilin-docs-10m ["a prompt"]
#include <kilin/kilin.h>

#include <cstdint>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

namespace {

// Samples `count` tokens and feeds them to the sequence.
std::vector<int32_t> continue_text(kilin::Sequence& sequence, kilin::Sampler& sampler, int count) {
  std::vector<int32_t> ids;
  for (int i = 0; i < count; ++i) {
    ids.push_back(sampler.sample(sequence.logits()));
    sequence.decode(ids.back());
  }
  return ids;
}

bool run(const std::string& path, const std::string& prompt) {
  const kilin::Model model = kilin::Model::load(path);
  std::cout << model.info().architecture << ", " << model.info().parameters << " parameters\n";

  std::vector<int32_t> ids = model.encode(prompt);
  if (model.bos_id() >= 0) ids.insert(ids.begin(), model.bos_id());
  kilin::Sequence shared = model.new_sequence();
  shared.prefill(ids);
  std::cout << "prompt: " << shared.length() << " tokens, " << shared.bytes() << " bytes of state\n";

  // Two continuations of one prompt: it is read once, and each copy goes on by itself.
  const std::vector<std::byte> saved = shared.checkpoint();
  std::vector<std::vector<int32_t>> continuations;
  for (const uint64_t seed : {1, 2}) {
    kilin::Sequence sequence = shared.copy();
    kilin::Sampler sampler({.temperature = 0.8, .top_p = 0.95, .seed = seed});
    continuations.push_back(continue_text(sequence, sampler, 32));
    std::cout << "--- seed " << seed << "\n" << prompt << model.decode_text(continuations.back()) << "\n";
  }

  // The saved state, in a new sequence, gives the first continuation again.
  kilin::Sequence restored = model.new_sequence();
  restored.restore(saved);
  kilin::Sampler sampler({.temperature = 0.8, .top_p = 0.95, .seed = 1});
  const bool same = continue_text(restored, sampler, 32) == continuations.front();
  std::cout << "--- restored from " << saved.size() << " bytes: " << (same ? "the same" : "ANOTHER")
            << " text\n";
  return same && continuations[0] != continuations[1] && shared.length() == static_cast<int64_t>(ids.size());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::cerr << "usage: example_generate MODEL [PROMPT]\n";
    return 2;
  }
  try {
    return run(argv[1], argc > 2 ? argv[2] : "The Linux kernel") ? 0 : 1;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
