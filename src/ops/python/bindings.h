// The module's functions, by subject. Docstrings begin with the signature, which
// inspect.signature() reads.
#pragma once

#include <pybind11/pybind11.h>

namespace accumops {

namespace py = pybind11;

void BindAccumulate(py::module_& module);
void BindUpdate(py::module_& module);
void BindSquaredNorms(py::module_& module);
void BindBatchNorm(py::module_& module);
void BindClipUnits(py::module_& module);
void BindMoments(py::module_& module);
void BindNoise(py::module_& module);

}  // namespace accumops
