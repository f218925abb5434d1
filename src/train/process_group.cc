// SPDX-License-Identifier: Apache-2.0
#include "train/process_group.h"

#include <charconv>
#include <cstdlib>
#include <string_view>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "base/error.h"
#include "io/printable.h"
#include "train/process_group_backends.h"

namespace kilin::train {
namespace {

constexpr auto kPatience = std::chrono::seconds(120);  // for processes that start later

class Alone : public ProcessGroup {
 public:
  explicit Alone(const Ranks& ranks) : ProcessGroup(ranks) {}
  void sum(at::Tensor& /*tensor*/) override {}
  void barrier() override {}
};

const char* environment(const char* name) { return std::getenv(name); }

int number(const char* name, int low, int high, int fallback) {
  const char* text = environment(name);
  if (text == nullptr) {
    check(fallback >= 0,
          "environment variable {}: missing, expected it beside WORLD_SIZE (as torchrun sets it)", name);
    return fallback;
  }
  const std::string_view view(text);
  int value = 0;
  const auto [end, error] = std::from_chars(view.data(), view.data() + view.size(), value);
  const bool good = error == std::errc{} && end == view.data() + view.size() && value >= low && value <= high;
  check(good, "environment variable {}: found '{}', expected {} to {}", name, io::printable(view), low, high);
  return value;
}

}  // namespace

Ranks ranks_from_environment() {
  Ranks ranks;
  if (environment("WORLD_SIZE") == nullptr) return ranks;
  ranks.size = number("WORLD_SIZE", 1, 1 << 16, 1);
  ranks.rank = number("RANK", 0, ranks.size - 1, ranks.size == 1 ? 0 : -1);
  ranks.local = number("LOCAL_RANK", 0, 1 << 16, ranks.rank);
  return ranks;
}

std::unique_ptr<ProcessGroup> ProcessGroup::create(const Ranks& ranks, bool cuda) {
  if (ranks.size == 1) return std::make_unique<Alone>(ranks);
  const char* address = environment("MASTER_ADDR");
  check(address != nullptr, "environment variable MASTER_ADDR: missing, expected it beside WORLD_SIZE");
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(number("MASTER_PORT", 1, 65535, -1));
  // Under torchrun the launcher may have a store there already.
  const char* launcher = environment("TORCHELASTIC_USE_AGENT_STORE");
  options.isServer = ranks.rank == 0 && (launcher == nullptr || std::string_view(launcher) != "True");
  options.numWorkers = ranks.size;
  options.waitWorkers = false;
  options.timeout = kPatience;
  try {
    const auto store = c10::make_intrusive<c10d::PrefixStore>(
        "kilin", c10::make_intrusive<c10d::TCPStore>(std::string(address), options));
    return cuda ? nccl_group(store, ranks) : gloo_group(store, ranks);
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    const std::string what = error.what();
    fail("process {} of {}: cannot reach the others at {}:{}: {}", ranks.rank, ranks.size, address,
         options.port, io::printable(what.substr(0, what.find('\n')), 200));
  }
}

}  // namespace kilin::train
