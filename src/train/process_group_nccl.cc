// SPDX-License-Identifier: Apache-2.0
// NCCL through its C interface, which is stable within version 2, out of the library that a torch with CUDA
// has loaded: no header of CUDA or NCCL is needed to build, and a torch without CUDA has none of it at run
// time.
#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include <cstring>

#include "base/error.h"
#include "train/process_group_backends.h"

namespace kilin::train {
namespace {

struct UniqueId {  // ncclUniqueId
  char bytes[128];
};

// Of nccl.h: ncclDataType_t and ncclRedOp_t
constexpr int kInt64 = 4, kFloat32 = 7, kFloat64 = 8, kBfloat16 = 9;
constexpr int kSum = 0;

struct Nccl {
  int (*get_unique_id)(UniqueId*);
  int (*init_rank)(void** communicator, int size, UniqueId id, int rank);
  int (*all_reduce)(const void* from, void* to, size_t count, int type, int operation, void* communicator,
                    void* stream);
  int (*destroy)(void* communicator);
  const char* (*error_text)(int);

  static Nccl load() {
    void* library = ::dlopen("libnccl.so.2", RTLD_NOW);
    check(library != nullptr,
          "several processes on GPUs need NCCL (libnccl.so.2), which this torch has not loaded");
    Nccl nccl{};
    find(library, "ncclGetUniqueId", nccl.get_unique_id);
    find(library, "ncclCommInitRank", nccl.init_rank);
    find(library, "ncclAllReduce", nccl.all_reduce);
    find(library, "ncclCommDestroy", nccl.destroy);
    find(library, "ncclGetErrorString", nccl.error_text);
    return nccl;
  }
  void expect(int status, const char* what) const {
    if (status != 0) fail("NCCL: {}: {}", what, error_text(status));
  }

 private:
  template <class F>
  static void find(void* library, const char* name, F& function) {
    void* symbol = ::dlsym(library, name);
    check(symbol != nullptr, "libnccl.so.2: has no function {}", name);
    std::memcpy(&function, &symbol, sizeof symbol);
  }
};

int type_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return kFloat32;
    case at::kDouble:
      return kFloat64;
    case at::kLong:
      return kInt64;
    case at::kBFloat16:
      return kBfloat16;
    default:
      fail("NCCL: found a tensor of {}, expected float32, float64, bfloat16 or int64",
           at::toString(tensor.scalar_type()));
  }
}

class NcclGroup : public ProcessGroup {
 public:
  NcclGroup(const c10::intrusive_ptr<c10d::Store>& store, const Ranks& ranks)
      : ProcessGroup(ranks), nccl_(Nccl::load()) {
    UniqueId id{};
    if (ranks.rank == 0) {
      nccl_.expect(nccl_.get_unique_id(&id), "ncclGetUniqueId");
      const auto* bytes = reinterpret_cast<const uint8_t*>(id.bytes);
      store->set("nccl", std::vector<uint8_t>(bytes, bytes + sizeof id.bytes));
    } else {
      const std::vector<uint8_t> bytes = store->get("nccl");
      check(bytes.size() == sizeof id.bytes, "NCCL: the first process sent {} bytes", bytes.size());
      std::memcpy(id.bytes, bytes.data(), bytes.size());
    }
    nccl_.expect(nccl_.init_rank(&communicator_, ranks.size, id, ranks.rank), "ncclCommInitRank");
  }
  ~NcclGroup() override { nccl_.destroy(communicator_); }

  void sum(at::Tensor& tensor) override {
    KILIN_ASSERT(tensor.is_contiguous() && tensor.is_cuda());
    const c10::impl::VirtualGuardImpl device(at::kCUDA);
    void* stream = device.getStream(tensor.device()).native_handle();
    void* data = tensor.mutable_data_ptr();
    nccl_.expect(nccl_.all_reduce(data, data, static_cast<size_t>(tensor.numel()), type_of(tensor), kSum,
                                  communicator_, stream),
                 "ncclAllReduce");
  }
  void barrier() override {
    at::Tensor one = at::ones({1}, at::TensorOptions().device(at::kCUDA).dtype(at::kLong));
    sum(one);
    check(one.item<int64_t>() == size(), "NCCL: found a sum that is not the number of processes");
  }

 private:
  Nccl nccl_;
  void* communicator_ = nullptr;
};

}  // namespace

std::unique_ptr<ProcessGroup> nccl_group(const c10::intrusive_ptr<c10d::Store>& store, const Ranks& ranks) {
  return std::make_unique<NcclGroup>(store, ranks);
}

}  // namespace kilin::train
