# Asks a Python interpreter's TensorFlow where its headers and libraries are. Nothing of this is cached: each build in
# pip's isolated environment has another TensorFlow.
# Sets TENSORFLOW_VERSION, TENSORFLOW_INCLUDE_DIRECTORIES, TENSORFLOW_COMPILE_OPTIONS and TENSORFLOW_LIBRARIES.

set(accumops_find_tensorflow_script "${CMAKE_CURRENT_LIST_DIR}/find_tensorflow.py")

macro(accumops_find_tensorflow interpreter)
  execute_process(
    COMMAND "${CMAKE_COMMAND}" -E env TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES=-1
      "${interpreter}" "${accumops_find_tensorflow_script}"
    OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE result ERROR_VARIABLE errors)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "The TensorFlow to build against cannot be imported by ${interpreter}:\n${errors}")
  endif()
  string(JSON TENSORFLOW_VERSION GET "${found}" version)
  string(JSON TENSORFLOW_INCLUDE_DIRECTORIES GET "${found}" include)
  string(JSON TENSORFLOW_COMPILE_OPTIONS GET "${found}" options)
  string(JSON TENSORFLOW_LIBRARIES GET "${found}" libraries)
  list(APPEND TENSORFLOW_INCLUDE_DIRECTORIES "${TENSORFLOW_INCLUDE_DIRECTORIES}/external/local_config_cuda/cuda")
endmacro()
