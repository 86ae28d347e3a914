// Several resource variables held at once, to be written in place.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "input_checks.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/lib/core/refcount.h"

namespace accumops {

// Copies a tensor's bytes, on this processor or on the op's stream.
using CopyBytes = absl::Status (*)(tensorflow::OpKernelContext* ctx, void* to, const void* from,
                                   std::size_t bytes);

class VariableList final : public Variables {
 public:
  VariableList() = default;
  VariableList(const VariableList&) = delete;
  VariableList& operator=(const VariableList&) = delete;
  ~VariableList() override;

  // Adds the variables behind the list input `name`.
  absl::Status Add(tensorflow::OpKernelContext* ctx, const char* name);

  // Takes every variable's lock, in the order of their addresses as all of TensorFlow does, and
  // keeps them until this object ends. Fails where a variable is given twice or has no value yet.
  absl::Status Lock();

  const tensorflow::Tensor& tensor(std::size_t i) const { return *entries_[i].variable->tensor(); }
  DataType dtype(std::size_t i) const override { return tensor(i).dtype(); }
  const TensorShape& shape(std::size_t i) const override { return tensor(i).shape(); }
  std::string Describe(std::size_t i) const override;

  std::size_t size() const { return entries_.size(); }

  // Gives each of the first `count` variables whose buffer a reader still holds a buffer of its
  // own, so that readers keep what they read. The lock is exclusive, so a buffer with one reference
  // is nobody else's, copy_on_read_mode included.
  absl::Status MakeWritable(tensorflow::OpKernelContext* ctx, CopyBytes copy, std::size_t count);

 private:
  struct Entry {
    tensorflow::core::RefCountPtr<tensorflow::Var> variable;
    const char* input;                         // the op's name for the list
    int position;                              // within the list
    const tensorflow::ResourceHandle* handle;  // one of the op's inputs, which outlive this
  };

  std::vector<Entry> entries_;
  std::vector<decltype(std::declval<tensorflow::Var>().mu())> locked_;
};

}  // namespace accumops
