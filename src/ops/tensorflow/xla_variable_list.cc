#include "xla_variable_list.h"

#include <map>

#include "absl/strings/str_cat.h"

namespace accumops {

using ::tensorflow::XlaResource;

std::string XlaVariableList::Describe(std::size_t i) const {
  const Entry& entry = entries_[i];
  return absl::StrCat(entry.list, "[", entry.position, "] ('", entry.variable->name(), "')");
}

absl::Status XlaVariableList::Add(std::initializer_list<const char*> lists) {
  for (const char* list : lists) {
    int start = 0, stop = 0;
    TF_RETURN_IF_ERROR(ctx_->op_kernel().InputRange(list, &start, &stop));
    for (int input = start; input < stop; ++input) {
      XlaResource* variable = nullptr;
      TF_RETURN_IF_ERROR(ctx_->GetResourceInput(input, &variable));
      entries_.push_back({variable, list, input - start, input});
    }
  }
  std::map<const XlaResource*, std::size_t> seen;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const auto [found, is_new] = seen.emplace(entries_[i].variable, i);
    if (!is_new) return GivenTwice(*this, i, found->second);
  }
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const XlaResource& variable = *entries_[i].variable;
    if (variable.kind() != XlaResource::kVariable) {
      return absl::InvalidArgumentError(
          absl::StrCat(Describe(i), " is a TensorArray or a stack, not a variable."));
    }
    if (!variable.initialized()) return Uninitialized(*this, i);
    const auto shape = ctx_->builder()->GetShape(variable.value());
    TF_RETURN_IF_ERROR(shape.status());
    if (!shape->is_static()) {
      return absl::InvalidArgumentError(
          absl::StrCat(Describe(i), " is ", shape->ToString(),
                       ": XLA must know its shape before the function runs."));
    }
  }
  return absl::OkStatus();
}

absl::Status XlaVariableList::Read(std::size_t i, xla::XlaOp* value) const {
  return ctx_->ReadVariableInput(entries_[i].input, dtype(i), nullptr, value);
}

absl::Status XlaVariableList::Assign(std::size_t i, xla::XlaOp value) const {
  return ctx_->AssignVariable(entries_[i].input, dtype(i), value);
}

}  // namespace accumops
