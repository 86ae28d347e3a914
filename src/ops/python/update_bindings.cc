// update().
#include <pybind11/numpy.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "call.h"
#include "update.h"

namespace accumops {
namespace {

constexpr const char* kSlotNames[kMaxSlots] = {"slots[0]", "slots[1]", "slots[2]"};

UpdateRule ToRule(py::handle object) {
  if (!PyUnicode_Check(object.ptr())) WrongType("rule", "a str", object);
  std::string names;
  for (const auto& [name, rule] : kUpdateRules) {
    if (py::str(object).equal(py::str(name))) return rule;
    names += (names.empty() ? "'" : ", '") + std::string(name) + "'";
  }
  throw py::value_error("rule must be one of " + names + ", got " +
                        py::repr(object).cast<std::string>());
}

UpdateSettings ToSettings(py::handle rule, py::handle beta_1, py::handle beta_2, py::handle epsilon,
                          py::handle clip) {
  const double first = ToNumber(beta_1, "beta_1"), second = ToNumber(beta_2, "beta_2");
  return {ToRule(rule),
          static_cast<float>(first),
          static_cast<float>(second),
          static_cast<float>(1 - first),
          static_cast<float>(1 - second),
          static_cast<float>(ToNumber(epsilon, "epsilon")),
          static_cast<float>(ToMagnitude(clip, "clip"))};
}

// Whether each value decays: from None, for all of them, or from a sequence.
std::vector<bool> ToDecays(py::handle object, std::size_t count) {
  if (object.is_none()) return std::vector<bool>(count, true);
  if (!PySequence_Check(object.ptr()) || PyUnicode_Check(object.ptr())) {
    WrongType("decays", "None or a sequence of bool", object);
  }
  const Py_ssize_t length = PySequence_Size(object.ptr());  // which may be far too many to copy
  if (length < 0) throw py::error_already_set();
  RequireLength("decays", static_cast<std::size_t>(length), count, ", one for each of values");
  const auto items = ToObjects(object, "decays", "None or a sequence of bool");
  RequireLength("decays", items.size(), count, ", one for each of values");
  std::vector<bool> decays;
  for (std::size_t i = 0; i < count; ++i) {
    const int decay = PyObject_IsTrue(items[i].ptr());
    if (decay < 0) throw py::error_already_set();
    decays.push_back(decay != 0);
  }
  return decays;
}

// The scalars that a step reads.
class Scalars {
 public:
  Scalars(py::handle scales, py::handle rate, py::handle iterations, py::handle decay,
          py::handle weight, py::handle overwrite, py::handle applies, std::size_t count)
      : scale_(NumberOf(scales), "scales", {Element::kFloat32}, "float32"),
        rate_(rate, "rate", {Element::kFloat32}, "float32"),
        corrects_(!iterations.is_none()),
        iterations_(corrects_ ? iterations : py::int_(0), "iterations", {Element::kInt64}, "int64"),
        decay_(decay, "decay", {Element::kFloat32}, "float32"),
        weight_(weight, "weight", {Element::kFloat32}, "float32"),
        overwrite_(overwrite, "overwrite"),
        applies_(applies, "applies") {
    const double updates = iterations_.value;
    if (!(updates >= 0 && updates < 0x1p53 && updates == std::floor(updates))) {
      throw py::value_error("iterations must be a whole number from 0 on, got " +
                            py::repr(iterations).cast<std::string>());
    }
    if (IsNumber(scales)) return;
    scales_ = ToArray(scales, {"scales"});
    RequireElement(*scales_, {Element::kFloat32}, "float32");
    if (scales_->size == 1) return;
    RequireShape(*scales_, {static_cast<std::int64_t>(count)},
                 ", one for each of values, or be one for all");
    for_each_ = true;
  }

  void AddTo(Call& call) const {
    for (const auto* array : {&scales_, &rate_.array, &iterations_.array, &decay_.array,
                              &weight_.array, &overwrite_.array, &applies_.array}) {
      call.ReadScalar(*array);
    }
  }

  // In host memory, for as long as this object lives.
  UpdateScalars OnHost() {
    host_ = Numbers();
    return From(&host_);
  }

  // In device memory: the arrays' own, or a copy of the host's numbers.
  template <typename On>
  UpdateScalars OnDevice(On& on) const {
    const bool all = scales_ && rate_.array && (iterations_.array || !corrects_) && decay_.array &&
                     weight_.array && overwrite_.array && applies_.array;
    UpdateScalars result =
        From(all ? nullptr
                 : on.Upload(Numbers(),
                             "scales, rate, iterations, decay, weight, overwrite and applies"));
    if (corrects_) result.corrected_rate = static_cast<float*>(on.Allocate(sizeof(float)));
    return result;
  }

 private:
  struct Values {
    std::int64_t iterations;
    float scale, rate, decay, weight;
    bool overwrite, applies;
  };

  // A NumPy array without axes is a number, as NumPy's scalars are.
  static bool IsNumber(py::handle scales) {
    if (!py::isinstance<py::array>(scales)) return !HasCudaInterface(scales);
    return py::reinterpret_borrow<py::array>(scales).ndim() == 0;
  }
  static py::object NumberOf(py::handle scales) {
    return IsNumber(scales) ? py::reinterpret_borrow<py::object>(scales) : py::float_(1.0);
  }

  Values Numbers() const {
    return {static_cast<std::int64_t>(iterations_.value),
            static_cast<float>(scale_.value),
            static_cast<float>(rate_.value),
            static_cast<float>(decay_.value),
            static_cast<float>(weight_.value),
            overwrite_.value,
            applies_.value};
  }

  UpdateScalars From(const Values* values) const {
    UpdateScalars result = {};
    if (values != nullptr) {
      result.scales = &values->scale;
      result.rate = &values->rate;
      result.iterations = corrects_ ? &values->iterations : nullptr;
      result.decay = &values->decay;
      result.weight = &values->weight;
      result.overwrite = &values->overwrite;
      result.applies = &values->applies;
    }
    const auto replace = [](const float*& pointer, const std::optional<Array>& array) {
      if (array) pointer = reinterpret_cast<const float*>(array->data);
    };
    replace(result.scales, scales_);
    replace(result.rate, rate_.array);
    replace(result.decay, decay_.array);
    replace(result.weight, weight_.array);
    if (iterations_.array) {
      result.iterations = reinterpret_cast<const std::int64_t*>(iterations_.array->data);
    }
    if (overwrite_.array) result.overwrite = Flags(&*overwrite_.array);
    if (applies_.array) result.applies = Flags(&*applies_.array);
    result.scale_for_each = for_each_;
    return result;
  }

  Scalar scale_;
  std::optional<Array> scales_;
  bool for_each_ = false;
  Scalar rate_;
  bool corrects_;
  Scalar iterations_, decay_, weight_;
  Flag overwrite_, applies_;
  Values host_ = {};
};

// The arrays of a step, by item.
class Items {
 public:
  Items(py::handle values, py::handle slots, py::handle accumulators, py::handle latest,
        py::handle touched_rows, UpdateRule rule)
      : values_(ToArrays(values, "values")),
        accumulators_(ToOptional(accumulators, "accumulators")),
        latest_(ToOptional(latest, "latest")),
        touched_(ToOptional(touched_rows, "touched_rows")) {
    ReadSlots(slots, rule);
    for (std::size_t i = 0; i < values_.size(); ++i) {
      if (accumulators_[i] || latest_[i]) continue;
      const std::string at = "[" + std::to_string(i) + "]";
      throw py::value_error("accumulators" + at + " and latest" + at +
                            " are both None; give one of them, or both");
    }
  }

  std::size_t count() const { return values_.size(); }

  // Checks all arrays and adds them to the call.
  std::vector<UpdateItem> AddTo(Call& call, const std::vector<bool>& decays) const {
    std::vector<UpdateItem> items(count());
    for (std::size_t i = 0; i < count(); ++i) {
      const Array& value = values_[i];
      UpdateItem& item = items[i];
      RequireElement(value, {Element::kFloat32}, "float32");
      call.Write(value);
      item.value = Floats(value);
      for (std::size_t s = 0; s < slots_.size(); ++s) {
        const Array& slot = slots_[s][i];
        RequireLike(slot, value);
        call.Write(slot);
        item.slots[s] = Floats(slot);
      }
      if (const auto& accumulator = accumulators_[i]) {
        RequireLike(*accumulator, value);
        call.Read(*accumulator);
        item.accumulator = Floats(*accumulator);
      }
      item.latest_dtype = DType::kFloat32;
      if (const auto& latest = latest_[i]) {
        RequireElement(*latest,
                       {Element::kFloat16, Element::kBFloat16, Element::kUInt16, Element::kFloat32},
                       "float16, bfloat16 (or its bits as uint16) or float32");
        RequireShapeOf(*latest, value);
        call.Read(*latest);
        item.latest = latest->data;
        item.latest_dtype = ToDType(*latest);
      }
      item.size = value.size;
      item.row_size = 1;
      item.decays = decays[i];
      if (const auto& touched = touched_[i]) AddRows(call, *touched, value, item);
    }
    return items;
  }

 private:
  std::vector<std::optional<Array>> ToOptional(py::handle sequence, const char* argument) const {
    if (sequence.is_none()) return std::vector<std::optional<Array>>(count());
    std::vector<std::optional<Array>> arrays = ToOptionalArrays(sequence, argument);
    RequireLength(argument, arrays.size(), count(), ", one for each of values");
    return arrays;
  }

  void ReadSlots(py::handle slots, UpdateRule rule) {
    const auto lists = ToObjects(slots, "slots", "a sequence with a list of arrays for each slot");
    RequireLength("slots", lists.size(), static_cast<std::size_t>(SlotsOf(rule)),
                  ", a list of arrays for each slot of the rule");
    for (std::size_t s = 0; s < lists.size(); ++s) {
      slots_.push_back(ToArrays(lists[s], kSlotNames[s]));
      RequireLength(kSlotNames[s], slots_[s].size(), count(), ", one for each of values");
    }
  }

  static void AddRows(Call& call, const Array& touched, const Array& value, UpdateItem& item) {
    RequireElement(touched, {Element::kBool}, "bool");
    if (value.shape.empty()) {
      throw py::value_error(value.name.str() + " has shape (), so " + touched.name.str() +
                            " must be None: there are no rows");
    }
    RequireShape(touched, {value.shape[0]}, ": a flag for each row of " + value.name.str());
    call.Read(touched);
    if (value.size == 0) return;
    item.touched_rows = Flags(&touched);
    item.row_size = value.size / value.shape[0];
  }

  static void RequireShapeOf(const Array& array, const Array& value) {
    if (array.shape != value.shape) {
      RequireShape(array, value.shape, ", that of " + value.name.str());
    }
  }
  static void RequireLike(const Array& array, const Array& value) {
    RequireElement(array, {Element::kFloat32}, "float32");
    RequireShapeOf(array, value);
  }
  static float* Floats(const Array& array) { return reinterpret_cast<float*>(array.data); }

  std::vector<Array> values_;
  std::vector<std::vector<Array>> slots_;
  std::vector<std::optional<Array>> accumulators_, latest_, touched_;
};

void Update(py::handle rule, py::handle values, py::handle slots, py::handle accumulators,
            py::handle latest, py::handle scales, py::handle rate, py::handle iterations,
            py::handle decay, py::handle decays, py::handle weight, py::handle overwrite,
            py::handle applies, py::handle touched_rows, py::handle beta_1, py::handle beta_2,
            py::handle epsilon, py::handle clip, py::handle threads, std::uintptr_t stream) {
  const UpdateSettings settings = ToSettings(rule, beta_1, beta_2, epsilon, clip);
  const Items arrays(values, slots, accumulators, latest, touched_rows, settings.rule);
  if (!iterations.is_none() && !CorrectsBias(settings.rule)) {
    throw py::value_error("iterations are for 'adam' and 'amsgrad', not for " +
                          py::repr(rule).cast<std::string>());
  }
  Scalars scalars(scales, rate, iterations, decay, weight, overwrite, applies, arrays.count());
  Call call(threads, stream);
  const std::vector<UpdateItem> items = arrays.AddTo(call, ToDecays(decays, arrays.count()));
  scalars.AddTo(call);
  call.Run(
      [&](Executor& executor) {
        UpdateCpu(items.data(), items.size(), settings, scalars.OnHost(), executor);
      },
      [&](auto& on) {
        return UpdateCuda(items.data(), items.size(), settings, scalars.OnDevice(on), on.stream());
      });
}

constexpr char kUpdateDoc[] =
    R"(update(rule, values, slots=(), *, accumulators=None, latest=None, scales=1.0, rate, iterations=None, decay=0.0, decays=None, weight=1.0, overwrite=False, applies=True, touched_rows=None, beta_1=0.0, beta_2=0.0, epsilon=0.0, clip=0.0, threads=None, stream=0)
--

Makes an optimizer's step in place, for all values in one pass.

The gradient is clamp(scale * ((overwrite ? 0 : accumulator) + weight * latest), -clip, clip).
Accumulators are not written. Every operation is rounded on its own: the same bits on every device
and with any number of threads, those of the rules' formulas in NumPy's float32. A call that raises
has written nothing.

Args:
    rule: "sgd", "momentum", "nesterov", "adam", "amsgrad" or "lion", as accumops.ops.update().
    values: Sequence of writable, C-contiguous arrays of float32.
    slots: For each slot of the rule a sequence of such arrays, of the same shapes: none for "sgd",
        three for "amsgrad", two for "adam", one for the others.
    accumulators: None, or a sequence with an array like it, or None, for each of values.
    latest: The same of gradients that no accumulator holds: float16, bfloat16 (or its bits as
        uint16) or float32. Each of values needs one of the two.
    scales: A number, or an array of float32 with one for each of values, or one for all.
    iterations: None, or for "adam" and "amsgrad" the number of updates before this one, which
        corrects the rate for the bias of the slots: a number, or for CUDA arrays a one-element
        device array of int64.
    rate, decay, weight: A number, or for CUDA arrays a one-element device array of float32. With a
        weight of 0 the latest gradients count as zero, whatever they hold.
    decays: For each of values whether `value -= value * decay` comes first; None for all.
    overwrite: Whether accumulators count as zero. A bool, or for CUDA arrays a one-element device
        array of bool.
    applies: Whether the step is made; if not, nothing is written. A bool or an array, as overwrite.
    touched_rows: None, or a sequence with None or an array of bool, of shape [rows], for each of
        values: rows whose flag is False, and those of the slots, stay as they are.
    beta_1, beta_2, epsilon: Numbers.
    clip: The largest magnitude of a gradient; 0 for any.
    threads, stream: As in accumulate().

Raises:
    TypeError, ValueError, RuntimeError: As accumulate().)";

}  // namespace

void BindUpdate(py::module_& module) {
  using py::literals::operator""_a;
  const py::none none;
  module.def("update", Update, kUpdateDoc, "rule"_a, "values"_a, "slots"_a = py::tuple(),
             py::kw_only(), "accumulators"_a = none, "latest"_a = none, "scales"_a = 1.0, "rate"_a,
             "iterations"_a = none, "decay"_a = 0.0, "decays"_a = none, "weight"_a = 1.0,
             "overwrite"_a = false, "applies"_a = true, "touched_rows"_a = none, "beta_1"_a = 0.0,
             "beta_2"_a = 0.0, "epsilon"_a = 0.0, "clip"_a = 0.0, "threads"_a = none,
             "stream"_a = 0);
}

}  // namespace accumops
