// SPDX-License-Identifier: Apache-2.0
#define USE_C10D_GLOO
#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include "base/error.h"
#include "train/process_group_backends.h"

namespace kilin::train {
namespace {

class GlooGroup : public ProcessGroup {
 public:
  GlooGroup(const c10::intrusive_ptr<c10d::Store>& store, const Ranks& ranks) : ProcessGroup(ranks) {
    const auto options = c10d::ProcessGroupGloo::Options::create();
    options->devices.push_back(c10d::ProcessGroupGloo::createDefaultDevice());
    group_ = c10::make_intrusive<c10d::ProcessGroupGloo>(store, ranks.rank, ranks.size, options);
  }
  void sum(at::Tensor& tensor) override {
    std::vector<at::Tensor> tensors{tensor};
    finish(group_->allreduce(tensors));
  }
  void barrier() override { finish(group_->barrier()); }

 private:
  static void finish(const c10::intrusive_ptr<c10d::Work>& work) {
    try {
      work->wait();
    } catch (const std::exception& error) {
      const std::string what = error.what();
      fail("a process of the run is gone: {}", what.substr(0, what.find('\n')));
    }
  }
  c10::intrusive_ptr<c10d::Backend> group_;
};

}  // namespace

std::unique_ptr<ProcessGroup> gloo_group(const c10::intrusive_ptr<c10d::Store>& store, const Ranks& ranks) {
  return std::make_unique<GlooGroup>(store, ranks);
}

}  // namespace kilin::train
