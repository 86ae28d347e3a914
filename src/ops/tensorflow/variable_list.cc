#include "variable_list.h"

#include <algorithm>
#include <numeric>

#include "absl/strings/str_cat.h"

namespace accumops {

using ::tensorflow::OpKernelContext;
using ::tensorflow::ResourceHandle;
using ::tensorflow::Tensor;
using ::tensorflow::Var;

VariableList::~VariableList() {
  for (auto it = locked_.rbegin(); it != locked_.rend(); ++it) (*it)->unlock();
}

std::string VariableList::Describe(std::size_t i) const {
  const Entry& entry = entries_[i];
  return absl::StrCat(entry.input, "[", entry.position, "] ('", entry.handle->name(), "')");
}

absl::Status VariableList::Add(OpKernelContext* ctx, const char* name) {
  tensorflow::OpInputList inputs;
  TF_RETURN_IF_ERROR(ctx->input_list(name, &inputs));
  entries_.reserve(entries_.size() + static_cast<std::size_t>(inputs.size()));
  for (int i = 0; i < inputs.size(); ++i) {
    if (inputs[i].NumElements() != 1) {
      return NotOneVariable(name, i, inputs[i].shape().DebugString());
    }
    const ResourceHandle& handle = inputs[i].flat<ResourceHandle>()(0);
    entries_.push_back({nullptr, name, i, &handle});
    const absl::Status found = tensorflow::LookupResource(ctx, handle, &entries_.back().variable);
    if (absl::IsNotFound(found)) {
      return absl::FailedPreconditionError(absl::StrCat(
          Describe(entries_.size() - 1), " is uninitialized or was deleted: ", found.message()));
    }
    if (!found.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(Describe(entries_.size() - 1), ": ", found.message()));
    }
  }
  return absl::OkStatus();
}

absl::Status VariableList::Lock() {
  std::vector<std::size_t> order(entries_.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [this](std::size_t a, std::size_t b) {
    return entries_[a].variable->mu() < entries_[b].variable->mu();
  });
  for (std::size_t i = 1; i < order.size(); ++i) {
    if (entries_[order[i]].variable.get() == entries_[order[i - 1]].variable.get()) {
      return GivenTwice(*this, order[i - 1], order[i]);
    }
  }
  locked_.reserve(order.size());
  for (const std::size_t i : order) {
    entries_[i].variable->mu()->lock();
    locked_.push_back(entries_[i].variable->mu());
  }
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (!entries_[i].variable->is_initialized || !entries_[i].variable->tensor()->IsInitialized()) {
      return Uninitialized(*this, i);
    }
  }
  return absl::OkStatus();
}

absl::Status VariableList::MakeWritable(OpKernelContext* ctx, CopyBytes copy, std::size_t count) {
  tensorflow::AllocatorAttributes attributes;
  attributes.set_gpu_compatible(true);
  attributes.set_nic_compatible(true);
  for (std::size_t i = 0; i < count; ++i) {
    Entry& entry = entries_[i];
    Tensor* tensor = entry.variable->tensor();
    if (tensor->RefCountIsOne() || tensor->TotalBytes() == 0) continue;
    Tensor own;
    TF_RETURN_IF_ERROR(ctx->allocate_temp(tensor->dtype(), tensor->shape(), &own, attributes));
    TF_RETURN_IF_ERROR(copy(ctx, own.data(), tensor->data(), tensor->TotalBytes()));
    *tensor = own;
  }
  return absl::OkStatus();
}

}  // namespace accumops
