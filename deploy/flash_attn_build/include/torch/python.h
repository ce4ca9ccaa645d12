// Stands in for PyTorch's header of this name: flash_api.cpp needs nothing of Python but this macro, whose
// body becomes a template that nobody instantiates.  bindings.cpp has the bindings.
#pragma once
#include <torch/types.h>

#define PYBIND11_MODULE(name, module) \
  template <typename Module>          \
  void python_bindings(Module &module)
