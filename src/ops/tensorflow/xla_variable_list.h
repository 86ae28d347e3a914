// The variables that an op's lowering reads and assigns, within a function that XLA compiles.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <string>
#include <vector>

#include "input_checks.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_resource.h"
#include "xla/hlo/builder/xla_builder.h"

namespace accumops {

class XlaVariableList final : public Variables {
 public:
  explicit XlaVariableList(tensorflow::XlaOpKernelContext* ctx) : ctx_(ctx) {}

  // Adds the variables behind these list inputs. Fails where one is not a variable, is given twice,
  // has no value yet, or has one of a shape that is known only when the function runs.
  absl::Status Add(std::initializer_list<const char*> lists);

  DataType dtype(std::size_t i) const override { return entries_[i].variable->type(); }
  const TensorShape& shape(std::size_t i) const override { return entries_[i].variable->shape(); }
  std::string Describe(std::size_t i) const override;

  std::size_t size() const { return entries_.size(); }

  absl::Status Read(std::size_t i, xla::XlaOp* value) const;
  // Gives variable `i` a value of its own type and shape.
  absl::Status Assign(std::size_t i, xla::XlaOp value) const;

 private:
  struct Entry {
    tensorflow::XlaResource* variable;
    const char* list;  // the op's name for it
    int position;      // within the list
    int input;         // within all of the op's inputs
  };

  tensorflow::XlaOpKernelContext* ctx_;
  std::vector<Entry> entries_;
};

}  // namespace accumops
