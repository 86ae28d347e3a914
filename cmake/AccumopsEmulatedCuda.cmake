# Builds the Python module with the CUDA kernels on an emulated GPU, for tests on machines without one: once with the
# address and undefined-behaviour sanitizers in build/…/address, once with the thread sanitizer in build/…/thread.
# Nothing here is installed. Expects accumops_kernels, cuda_kernels, bindings and warnings.

set(emulated src/ops/emulated_cuda)
set(flags_address -fsanitize=address,undefined -fno-sanitize-recover=undefined)
set(flags_thread -fsanitize=thread)
set(macro_address EMULATED_WITH_ADDRESS_SANITIZER)
set(macro_thread EMULATED_WITH_THREAD_SANITIZER)

add_library(accumops_emulated_bindings OBJECT ${bindings})
target_compile_definitions(accumops_emulated_bindings PRIVATE ACCUMOPS_CUDA)
target_compile_options(accumops_emulated_bindings PRIVATE ${warnings} -O0 -g0)
set_target_properties(accumops_emulated_bindings PROPERTIES UNITY_BUILD ${ACCUMOPS_UNITY} UNITY_BUILD_MODE GROUP)
target_include_directories(accumops_emulated_bindings PRIVATE ${emulated} ${kernels})
target_link_libraries(accumops_emulated_bindings PRIVATE pybind11::module)

set_source_files_properties(${cuda_kernels} tests/kernels/broken_kernels.cu PROPERTIES LANGUAGE CXX)
foreach(build address thread)
  # What CUDA runs a kernel with is not checked itself: the thread sanitizer would see races between fibers that take
  # turns on one thread.
  add_library(accumops_emulated_cuda_${build} OBJECT ${emulated}/block.cc ${emulated}/stream.cc)
  target_compile_definitions(accumops_emulated_cuda_${build} PRIVATE ${macro_${build}})
  target_compile_options(accumops_emulated_cuda_${build} PRIVATE ${warnings})

  add_library(accumops_emulated_kernels_${build} OBJECT ${cuda_kernels})
  add_library(accumops_broken_kernels_${build} MODULE tests/kernels/broken_kernels.cu
    $<TARGET_OBJECTS:accumops_emulated_cuda_${build}>)
  foreach(target accumops_emulated_kernels_${build} accumops_broken_kernels_${build})
    target_compile_definitions(${target} PRIVATE ACCUMOPS_CUDA ACCUMOPS_EMULATED_CUDA)
    target_compile_options(${target} PRIVATE ${warnings} -Wno-unknown-pragmas -ffp-contract=off ${flags_${build}})
    target_include_directories(${target} PRIVATE ${emulated} ${kernels})
  endforeach()

  pybind11_add_module(accumops_emulated_${build} MODULE NO_EXTRAS
    $<TARGET_OBJECTS:accumops_emulated_bindings>
    $<TARGET_OBJECTS:accumops_emulated_cuda_${build}>
    $<TARGET_OBJECTS:accumops_emulated_kernels_${build}>)
  target_link_libraries(accumops_emulated_${build} PRIVATE accumops_kernels)
  set_target_properties(accumops_emulated_${build} PROPERTIES OUTPUT_NAME _kernels)
  set_target_properties(accumops_broken_kernels_${build} PROPERTIES PREFIX "" OUTPUT_NAME broken_kernels)
  foreach(target accumops_emulated_${build} accumops_broken_kernels_${build})
    target_link_options(${target} PRIVATE ${flags_${build}})
    set_target_properties(${target} PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/${build}")
  endforeach()
endforeach()
