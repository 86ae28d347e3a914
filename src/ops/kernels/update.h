// An optimizer's step over a list of float32 tensors, in place: each value, its accumulator and its
// slots are read once and written once.
//
//   gradient = clamp(scale * ((overwrite ? 0 : accumulator) + weight * latest), -clip, clip)
//   value   -= value * decay                                      where the item decays
//
// A weight of 0, of either sign, counts as no latest gradient at all, whatever that holds.
//
//   kSgd       value -= rate * gradient
//   kMomentum  m = m * beta_1 - rate * gradient;  value += m
//   kNesterov  m = m * beta_1 - rate * gradient;  value += m * beta_1 - rate * gradient
//   kAdam      m += (gradient - m) * new_1;  v += (gradient * gradient - v) * new_2
//              value -= m * rate / (sqrt(v) + epsilon)
//   kAmsgrad   as kAdam, with w = max(w, v) in place of v under the root
//   kLion      value -= rate * sign(m * beta_1 + gradient * new_1)
//              m = m * beta_2 + gradient * new_2
//
// A step that does not apply writes nothing.
//
// Adam's m and v are biased, since they start at zero. With kAdam and kAmsgrad the rate corrects
// that. Given the number of updates before this one, the step computes the corrected rate:
//
//   rate = rate * sqrt(1 - beta_2^(iterations + 1)) / (1 - beta_1^(iterations + 1))
//
// Every operation is rounded on its own, in the order that is
// written here, never contracted into an FMA: all instruction sets and devices give the same bits.
// The accumulator is not written. The sign of NaN is NaN, and so is the clamp of one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"
#include "parallel_for.h"

struct CUstream_st;

namespace accumops {

// A new rule is written in this file and in
//   src/ops/kernels     update_span.cc, update_cuda.cu
//   src/ops/python      update_bindings.cc (the docstring)
//   src/ops/tensorflow  update_attributes.h (if it has new settings), update_op.cc, update_xla.cc
//   accumops            ops/update.py, ops/reference/update.py, adapters/keras_optimizer.py,
//                       verification/update.py
enum class UpdateRule : std::uint8_t { kSgd, kMomentum, kNesterov, kAdam, kAmsgrad, kLion };

// The names by which Python and TensorFlow know the rules.
struct NamedUpdateRule {
  const char* name;
  UpdateRule rule;
};
inline constexpr NamedUpdateRule kUpdateRules[] = {
    {"sgd", UpdateRule::kSgd},           {"momentum", UpdateRule::kMomentum},
    {"nesterov", UpdateRule::kNesterov}, {"adam", UpdateRule::kAdam},
    {"amsgrad", UpdateRule::kAmsgrad},   {"lion", UpdateRule::kLion}};

constexpr int kMaxSlots = 3;

constexpr int SlotsOf(UpdateRule rule) {
  switch (rule) {
    case UpdateRule::kSgd:
      return 0;
    case UpdateRule::kMomentum:
    case UpdateRule::kNesterov:
    case UpdateRule::kLion:
      return 1;
    case UpdateRule::kAdam:
      return 2;
    case UpdateRule::kAmsgrad:
      return 3;
  }
  return 0;
}

// Whether a rule's slots are biased by their start at zero, which the rate corrects.
constexpr bool CorrectsBias(UpdateRule rule) {
  return rule == UpdateRule::kAdam || rule == UpdateRule::kAmsgrad;
}

struct UpdateItem {
  float* value;
  float* slots[kMaxSlots];   // m, v, w; as many as the rule has
  const float* accumulator;  // or null
  const void* latest;        // a gradient that no accumulator has yet, or null
  const bool* touched_rows;  // a flag for each row, or null; false leaves values and slots alone
  std::int64_t size;         // values
  std::int64_t row_size;     // values of a row, at least 1; used with touched_rows
  DType latest_dtype;        // not kFloat64
  bool decays;
};

struct UpdateSettings {
  UpdateRule rule;
  float beta_1, beta_2;
  float new_1, new_2;  // 1 - beta, rounded once
  float epsilon;
  float clip;  // no clamp where it is 0
};

// The scalars of a step: in host memory for the CPU, in device memory for CUDA.
struct UpdateScalars {
  const float* scales;  // one for all items, or one for each
  bool scale_for_each;
  const float* rate;
  const std::int64_t* iterations;  // updates before this one; null if `rate` is corrected
  float* corrected_rate;           // device memory for the rate, for CUDA with iterations
  const float* decay;              // the rate of weight decay: decay times learning rate
  const float* weight;             // the factor of the latest gradients
  const bool* overwrite;           // whether accumulators count as zero
  const bool* applies;             // whether the step is made at all
};

void UpdateCpu(const UpdateItem* items, std::size_t count, const UpdateSettings& settings,
               const UpdateScalars& scalars, Executor& executor);

// All pointers within the items and the scalars are device memory; the item list itself is read
// before the call returns. Returns null, or the text of the CUDA error.
const char* UpdateCuda(const UpdateItem* items, std::size_t count, const UpdateSettings& settings,
                       const UpdateScalars& scalars, CUstream_st* stream);

}  // namespace accumops
