// Arrays as Python passes them: NumPy's, anything that NumPy can view without a copy, and whatever
// has `__cuda_array_interface__`. Everything that a kernel relies on is checked here, with an error
// that says which argument is wrong and what would be right.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "dtype.h"

namespace accumops {

namespace py = pybind11;

// An argument, or one item of a list, as error messages call it: "gradients[3]".
struct Name {
  const char* argument;
  std::ptrdiff_t index = -1;

  std::string str() const;
};

enum class Element : std::uint8_t {
  kFloat16,
  kBFloat16,
  kFloat32,
  kFloat64,
  kBool,
  kUInt16,
  kInt32,
  kInt64,
  kOther
};

struct Array {
  Name name;
  py::object object;  // keeps the memory alive
  py::object dtype;   // as the array states it, for messages
  char* data;
  std::vector<std::int64_t> shape;
  std::int64_t size;   // elements
  std::int64_t bytes;  // from the first to past the last; right for contiguous arrays only
  Element element;
  bool writable;
  bool contiguous;  // in C order, and aligned to its elements
  bool on_device;
  std::uintptr_t producer_stream = 0;  // the stream to wait for, as the interface says; 0 for none
};

// Views the object's memory. Throws TypeError if it is not an array.
Array ToArray(py::handle object, Name name);
std::optional<Array> ToOptionalArray(py::handle object, const char* argument);
std::vector<Array> ToArrays(py::handle sequence, const char* argument);
// The same for a sequence whose items may be None.
std::vector<std::optional<Array>> ToOptionalArrays(py::handle sequence, const char* argument);
bool HasCudaInterface(py::handle object);

void RequireContiguous(const Array& array);
void RequireWritable(const Array& array);
// Throws unless both arrays lie in host memory, or both in CUDA memory.
void RequireSameSide(const Array& array, const Array& first);
void RequireElement(const Array& array, std::initializer_list<Element> allowed,
                    const char* description);
void RequireOneElement(const Array& array);
void RequireShape(const Array& array, const std::vector<std::int64_t>& shape,
                  const std::string& because);
// The type of an array. Throws TypeError unless the kernels know it.
DType ToDType(const Array& array);
// The type of an accumulator, which must be float32 or float64.
DType AccumulatorDType(const Array& array);
// The type of a gradient, which must not be wider than the accumulator's.
DType GradientDType(const Array& gradient, const Array& accumulator);

// Throws where an array that a call writes shares memory with another of its arrays: threads would
// race, and an index could change after it was checked.
void RejectOverlaps(const std::vector<const Array*>& written,
                    const std::vector<const Array*>& read);

std::string ShapeText(const std::vector<std::int64_t>& shape);
std::string DTypeText(const Array& array);

}  // namespace accumops
