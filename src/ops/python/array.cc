#include "array.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <limits>
#include <utility>

namespace accumops {
namespace {

std::string TypeName(py::handle object) {
  return py::str(py::type::of(object).attr("__name__")).cast<std::string>();
}

// The attribute, or null where there is none; other errors of a property are passed on.
py::object FindAttribute(py::handle object, const char* name) {
  PyObject* found = PyObject_GetAttrString(object.ptr(), name);
  if (found == nullptr) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
    PyErr_Clear();
  }
  return py::reinterpret_steal<py::object>(found);
}

bool IsBFloat16(py::handle dtype) {
  return dtype && py::str(py::getattr(dtype, "name", py::str())).equal(py::str("bfloat16"));
}

Element ElementOf(char kind, std::int64_t item_size) {
  switch (kind) {
    case 'f':
      return item_size == 2   ? Element::kFloat16
             : item_size == 4 ? Element::kFloat32
             : item_size == 8 ? Element::kFloat64
                              : Element::kOther;
    case 'i':
      return item_size == 4 ? Element::kInt32 : item_size == 8 ? Element::kInt64 : Element::kOther;
    case 'u':
      return item_size == 2 ? Element::kUInt16 : Element::kOther;
    case 'b':
      return item_size == 1 ? Element::kBool : Element::kOther;
  }
  return Element::kOther;
}

Element ElementOf(const py::dtype& dtype) {
  // NumPy numbers types that it does not know itself, for the life of the process. To ask for the
  // name each time would cost more than the rest of an array's checks.
  static int bfloat16_number = -1;
  const char order = dtype.byteorder();
  if (order == (PY_LITTLE_ENDIAN ? '>' : '<')) return Element::kOther;
  if (dtype.kind() != 'V') return ElementOf(dtype.kind(), dtype.itemsize());
  if (dtype.num() == bfloat16_number) return Element::kBFloat16;
  if (dtype.itemsize() != 2 || !IsBFloat16(dtype)) return Element::kOther;
  bfloat16_number = dtype.num();
  return Element::kBFloat16;
}

Array FromNumpy(py::array array, Name name) {
  Array result{};
  result.name = name;
  const py::dtype dtype = array.dtype();
  result.dtype = dtype;
  result.data = static_cast<char*>(const_cast<void*>(array.data()));
  result.shape.assign(array.shape(), array.shape() + array.ndim());
  result.size = array.size();
  result.bytes = array.nbytes();
  result.element = ElementOf(dtype);
  result.writable = array.writeable();
  result.contiguous =
      (array.flags() & py::array::c_style) != 0 &&
      reinterpret_cast<std::uintptr_t>(result.data) %
              std::max<std::size_t>(1, static_cast<std::size_t>(dtype.itemsize())) ==
          0;
  result.object = std::move(array);
  return result;
}

[[noreturn]] void Malformed(Name name, const std::string& what) {
  throw py::type_error(name.str() + " has a malformed __cuda_array_interface__: " + what);
}

// The value as an integer, or -1 where it is none: no entry of an interface may be -1.
std::int64_t ToInteger(py::handle value) {
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  const long long result = index ? PyLong_AsLongLong(index.ptr()) : -1;
  PyErr_Clear();
  return result;
}

Array FromCudaInterface(py::handle object, py::handle attribute, Name name) {
  if (!py::isinstance<py::dict>(attribute)) Malformed(name, "it is not a dict");
  const auto interface = py::reinterpret_borrow<py::dict>(attribute);
  const auto entry = [&](const char* key) -> py::object {
    return interface.contains(key) ? py::object(interface[key]) : py::none();
  };
  const py::object shape = entry("shape"), data = entry("data"), type = entry("typestr"),
                   strides = entry("strides"), stream = entry("stream");
  if (!py::isinstance<py::tuple>(shape)) Malformed(name, "'shape' is not a tuple");
  if (!py::isinstance<py::tuple>(data) || py::len(data) != 2) {
    Malformed(name, "'data' is not a pair of address and read-only flag");
  }
  const std::string typestr = py::isinstance<py::str>(type) ? type.cast<std::string>() : "";
  if (typestr.size() < 3) Malformed(name, "'typestr' is not a type string");
  if (!entry("mask").is_none()) {
    throw py::type_error(name.str() + " has a mask; pass an array without one");
  }

  Array result{};
  result.name = name;
  result.object = py::reinterpret_borrow<py::object>(object);
  result.dtype = type;
  result.on_device = true;

  const std::int64_t item_size = std::max(1, std::atoi(typestr.c_str() + 2));
  const bool native = typestr[0] != (PY_LITTLE_ENDIAN ? '>' : '<');
  result.element = native ? ElementOf(typestr[1], item_size) : Element::kOther;
  if (native && typestr[1] == 'V' && item_size == 2 && IsBFloat16(FindAttribute(object, "dtype"))) {
    result.element = Element::kBFloat16;
  }

  const auto extents = py::reinterpret_borrow<py::tuple>(shape);
  result.size = 1;
  bool empty = false;
  for (const py::handle extent : extents) {
    result.shape.push_back(ToInteger(extent));
    if (result.shape.back() < 0) Malformed(name, "'shape' holds something else than extents");
    empty |= result.shape.back() == 0;
  }
  for (const std::int64_t extent : result.shape) {
    if (empty) {
      result.size = 0;
    } else if (__builtin_mul_overflow(result.size, extent, &result.size)) {
      Malformed(name, "its shape has too many elements");
    }
  }
  if (__builtin_mul_overflow(result.size, item_size, &result.bytes)) {
    Malformed(name, "its shape has too many elements");
  }

  const auto pair = py::reinterpret_borrow<py::tuple>(data);
  const std::int64_t address = pair[0].is_none() ? 0 : ToInteger(pair[0]);
  if (address < 0 || (address == 0 && !empty)) Malformed(name, "'data' holds no address");
  result.data = reinterpret_cast<char*>(static_cast<std::uintptr_t>(address));
  const int read_only = PyObject_IsTrue(pair[1].ptr());
  if (read_only < 0) throw py::error_already_set();
  result.writable = read_only == 0;

  result.contiguous = address % item_size == 0;
  if (!strides.is_none()) {
    if (!py::isinstance<py::tuple>(strides) || py::len(strides) != extents.size()) {
      Malformed(name, "'strides' does not match 'shape'");
    }
    const auto steps = py::reinterpret_borrow<py::tuple>(strides);
    std::int64_t expected = item_size;
    for (std::size_t i = extents.size(); i-- > 0 && !empty;) {
      if (result.shape[i] == 1) continue;
      result.contiguous &= ToInteger(steps[i]) == expected;
      expected *= result.shape[i];
    }
  }
  if (!stream.is_none()) {
    const std::int64_t handle = ToInteger(stream);
    if (handle <= 0) Malformed(name, "'stream' is neither None nor a positive number");
    result.producer_stream = static_cast<std::uintptr_t>(handle);
  }
  return result;
}

py::tuple ToItems(py::handle sequence, const char* argument) {
  // An array is a sequence of its rows, but hardly meant as that.
  if (!PySequence_Check(sequence.ptr()) || PyUnicode_Check(sequence.ptr()) ||
      PyObject_CheckBuffer(sequence.ptr()) || HasCudaInterface(sequence)) {
    throw py::type_error(std::string(argument) + " must be a sequence of arrays, got " +
                         TypeName(sequence) + "; pass a list, also for one array");
  }
  // A copy: looking at an item may run Python code, which may change the list.
  auto items = py::reinterpret_steal<py::tuple>(PySequence_Tuple(sequence.ptr()));
  if (!items) throw py::error_already_set();
  return items;
}

struct Range {
  std::uintptr_t begin;
  std::uintptr_t end;
  const Array* array;

  explicit Range(const Array& a)
      : begin(reinterpret_cast<std::uintptr_t>(a.data)),
        end(begin + static_cast<std::uintptr_t>(a.bytes)),
        array(&a) {}
};

[[noreturn]] void Overlap(const Array& one, const Array& other) {
  throw py::value_error(one.name.str() + " and " + other.name.str() +
                        " share memory; what a call writes must not overlap its other arrays, so "
                        "pass a copy of one of them");
}

}  // namespace

std::string Name::str() const {
  return index < 0 ? argument : std::string(argument) + "[" + std::to_string(index) + "]";
}

std::string ShapeText(const std::vector<std::int64_t>& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

std::string DTypeText(const Array& array) { return py::str(array.dtype).cast<std::string>(); }

bool HasCudaInterface(py::handle object) {
  return static_cast<bool>(FindAttribute(object, "__cuda_array_interface__"));
}

Array ToArray(py::handle object, Name name) {
  if (py::isinstance<py::array>(object)) {
    return FromNumpy(py::reinterpret_borrow<py::array>(object), name);
  }
  if (!PyType_Check(object.ptr())) {
    if (const py::object interface = FindAttribute(object, "__cuda_array_interface__")) {
      return FromCudaInterface(object, interface, name);
    }
    const auto asarray = [] { return py::module_::import("numpy").attr("asarray"); };
    // Through a memoryview: NumPy copies bytes and its own scalars, and what a call wrote to the
    // copy would be lost.
    if (PyObject* view =
            PyObject_CheckBuffer(object.ptr()) ? PyMemoryView_FromObject(object.ptr()) : nullptr) {
      return FromNumpy(asarray()(py::reinterpret_steal<py::object>(view)), name);
    }
    PyErr_Clear();
    if (FindAttribute(object, "__array_interface__")) {
      return FromNumpy(asarray()(object), name);
    }
  }
  throw py::type_error(name.str() + " must be an array, got " + TypeName(object) +
                       "; pass a NumPy array, or an object with __array_interface__, the buffer "
                       "protocol or __cuda_array_interface__");
}

std::optional<Array> ToOptionalArray(py::handle object, const char* argument) {
  if (object.is_none()) return std::nullopt;
  return ToArray(object, {argument});
}

std::vector<Array> ToArrays(py::handle sequence, const char* argument) {
  const py::tuple items = ToItems(sequence, argument);
  std::vector<Array> arrays;
  arrays.reserve(items.size());
  for (std::size_t i = 0; i < items.size(); ++i) {
    arrays.push_back(ToArray(items[i], {argument, static_cast<std::ptrdiff_t>(i)}));
  }
  return arrays;
}

std::vector<std::optional<Array>> ToOptionalArrays(py::handle sequence, const char* argument) {
  const py::tuple items = ToItems(sequence, argument);
  std::vector<std::optional<Array>> arrays(items.size());
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (items[i].is_none()) continue;
    arrays[i] = ToArray(items[i], {argument, static_cast<std::ptrdiff_t>(i)});
  }
  return arrays;
}

void RequireContiguous(const Array& array) {
  if (array.contiguous || array.size == 0) return;
  throw py::value_error(array.name.str() + " of shape " + ShapeText(array.shape) +
                        " is not C-contiguous, or not aligned to its elements; pass one that is");
}

void RequireWritable(const Array& array) {
  if (array.writable) return;
  throw py::value_error(array.name.str() + " is read-only; pass a writable array");
}

void RequireSameSide(const Array& array, const Array& first) {
  if (array.on_device == first.on_device) return;
  const auto memory = [](const Array& a) { return a.on_device ? "CUDA memory" : "host memory"; };
  throw py::value_error(array.name.str() + " is in " + memory(array) + ", but " + first.name.str() +
                        " is in " + memory(first) + "; pass all arrays of one call in one memory");
}

void RequireElement(const Array& array, std::initializer_list<Element> allowed,
                    const char* description) {
  if (std::find(allowed.begin(), allowed.end(), array.element) != allowed.end()) return;
  throw py::type_error(array.name.str() + " has dtype " + DTypeText(array) + "; it must be " +
                       description);
}

void RequireOneElement(const Array& array) {
  if (array.size == 1) return;
  throw py::value_error(array.name.str() + " has shape " + ShapeText(array.shape) +
                        "; it must have one element");
}

void RequireShape(const Array& array, const std::vector<std::int64_t>& shape,
                  const std::string& because) {
  if (array.shape == shape) return;
  throw py::value_error(array.name.str() + " has shape " + ShapeText(array.shape) +
                        "; it must have shape " + ShapeText(shape) + because);
}

DType AccumulatorDType(const Array& array) {
  RequireElement(array, {Element::kFloat32, Element::kFloat64}, "float32 or float64");
  return array.element == Element::kFloat32 ? DType::kFloat32 : DType::kFloat64;
}

DType ToDType(const Array& array) {
  RequireElement(array,
                 {Element::kFloat16, Element::kBFloat16, Element::kUInt16, Element::kFloat32,
                  Element::kFloat64},
                 "float16, bfloat16 (or its bits as uint16), float32 or float64");
  return array.element == Element::kFloat16   ? DType::kFloat16
         : array.element == Element::kFloat32 ? DType::kFloat32
         : array.element == Element::kFloat64 ? DType::kFloat64
                                              : DType::kBFloat16;
}

DType GradientDType(const Array& gradient, const Array& accumulator) {
  const DType dtype = ToDType(gradient);
  if (!CanAccumulate(AccumulatorDType(accumulator), dtype)) {
    throw py::type_error(gradient.name.str() + " has dtype " + DTypeText(gradient) +
                         ", which is wider than that of " + accumulator.name.str() + ", " +
                         DTypeText(accumulator) + "; use a float64 accumulator");
  }
  return dtype;
}

void RejectOverlaps(const std::vector<const Array*>& written,
                    const std::vector<const Array*>& read) {
  std::vector<Range> ranges;
  ranges.reserve(written.size());
  for (const Array* array : written) {
    if (array->bytes > 0) ranges.emplace_back(*array);
  }
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (std::size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].begin < ranges[i - 1].end) Overlap(*ranges[i - 1].array, *ranges[i].array);
  }
  for (const Array* array : read) {
    if (array->bytes == 0) continue;
    const Range range(*array);
    // Disjoint ranges end in the order in which they begin: among the ranges that begin before this
    // one ends, the last reaches furthest.
    const auto after =
        std::lower_bound(ranges.begin(), ranges.end(), range.end,
                         [](const Range& r, std::uintptr_t end) { return r.begin < end; });
    if (after != ranges.begin() && std::prev(after)->end > range.begin) {
      Overlap(*array, *std::prev(after)->array);
    }
  }
}

}  // namespace accumops
