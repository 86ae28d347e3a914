#include "call.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace accumops {
namespace {

constexpr std::uintptr_t kWorkspaceAlignment = 256;  // bytes, as cudaMalloc aligns

}  // namespace

void RestoreGil(PyThreadState* state) {
  try {
    PyEval_RestoreThread(state);
  } catch (...) {
    // The interpreter is exiting, and CPython before 3.14 ends a daemon thread that comes back by
    // unwinding its stack. The destructors in it would use Python without the GIL: stay here.
    for (;;) pause();
  }
}

int ThreadCount(py::handle threads) {
  if (threads.is_none()) return AvailableThreads();
  const Py_ssize_t count = PyIndex_Check(threads.ptr())
                               ? PyNumber_AsSsize_t(threads.ptr(), nullptr)  // clips
                               : 0;
  if (PyErr_Occurred()) throw py::error_already_set();
  if (count >= 1) {
    return static_cast<int>(std::min<Py_ssize_t>(count, std::numeric_limits<int>::max()));
  }
  const std::string message =
      "threads must be None or an int of at least 1, got " + py::repr(threads).cast<std::string>();
  if (!PyIndex_Check(threads.ptr())) throw py::type_error(message);
  throw py::value_error(message);
}

void WrongType(const char* argument, const char* expected, py::handle got) {
  throw py::type_error(std::string(argument) + " must be " + expected + ", got " +
                       py::str(py::type::of(got).attr("__name__")).cast<std::string>());
}

double ToNumber(py::handle object, const char* argument, const char* expected) {
  const double value = PyFloat_AsDouble(object.ptr());
  if (!PyErr_Occurred()) return value;
  if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
  PyErr_Clear();
  WrongType(argument, expected, object);
}

double ToMagnitude(py::handle object, const char* argument) {
  const double value = ToNumber(object, argument);
  if (value >= 0 && std::isfinite(value)) return value;
  throw py::value_error(std::string(argument) + " must be finite and not negative, got " +
                        py::repr(object).cast<std::string>());
}

void RequireLength(const char* argument, std::size_t length, std::size_t expected,
                   const char* because) {
  if (length == expected) return;
  throw py::value_error(std::string(argument) + " has " + std::to_string(length) +
                        " items; it must have " + std::to_string(expected) + because);
}

std::vector<py::object> ToObjects(py::handle object, const char* argument, const char* expected) {
  if (!PySequence_Check(object.ptr()) || PyUnicode_Check(object.ptr())) {
    WrongType(argument, expected, object);
  }
  const auto items = py::reinterpret_steal<py::tuple>(PySequence_Tuple(object.ptr()));
  if (!items) throw py::error_already_set();
  std::vector<py::object> list;
  for (const py::handle item : items) list.push_back(py::reinterpret_borrow<py::object>(item));
  return list;
}

Scalar::Scalar(py::handle object, const char* argument, std::initializer_list<Element> allowed,
               const char* description) {
  if (!HasCudaInterface(object)) {
    value = ToNumber(object, argument, "a number, or for CUDA arrays a one-element device array");
    return;
  }
  array = ToArray(object, {argument});
  RequireElement(*array, allowed, description);
  RequireOneElement(*array);
}

Flag::Flag(py::handle object, const char* argument) {
  if (PyBool_Check(object.ptr())) {
    value = object.is(py::handle(Py_True));
    return;
  }
  if (!HasCudaInterface(object) && !PyObject_CheckBuffer(object.ptr())) {
    WrongType(argument, "a bool, or for CUDA arrays a one-element device array of bool", object);
  }
  Array found = ToArray(object, {argument});  // also NumPy's own bool
  RequireElement(found, {Element::kBool}, "bool");
  RequireOneElement(found);
  if (found.on_device) {
    array = std::move(found);
  } else {
    value = *found.data != 0;
  }
}

std::optional<Array> ToAllFinite(py::handle object) {
  std::optional<Array> array = ToOptionalArray(object, "all_finite");
  if (array) {
    RequireElement(*array, {Element::kBool}, "bool");
    RequireOneElement(*array);
    RequireWritable(*array);
  }
  return array;
}

void Call::Read(const Array& array) {
  RequireContiguous(array);
  read_.push_back(&array);
}

void Call::Write(const Array& array) {
  RequireContiguous(array);
  RequireWritable(array);
  written_.push_back(&array);
}

void Call::ReadScalar(const std::optional<Array>& array) {
  if (array) Read(*array);
}

std::vector<const Array*> Call::CheckTogether() const {
  std::vector<const Array*> all = written_;
  all.insert(all.end(), read_.begin(), read_.end());
  for (const Array* array : all) RequireSameSide(*array, *all.front());
  RejectOverlaps(written_, read_);
  return all;
}

Workspace::Workspace(py::handle object) : array_(ToOptionalArray(object, "workspace")) {
  if (!array_ || !array_->on_device) return;
  if (reinterpret_cast<std::uintptr_t>(array_->data) % kWorkspaceAlignment == 0) return;
  throw py::value_error("workspace is not aligned to " + std::to_string(kWorkspaceAlignment) +
                        " bytes; pass one that is, such as a whole array");
}

void Workspace::RequireBytes(std::int64_t bytes) const {
  if (array_->bytes >= bytes) return;
  throw py::value_error("workspace has " + std::to_string(array_->bytes) +
                        " bytes; it must have at least " + std::to_string(bytes));
}

}  // namespace accumops
