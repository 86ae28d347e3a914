# Decides whether the CUDA kernels are built, and for which architectures.
# Sets ACCUMOPS_WITH_CUDA, ACCUMOPS_CUDA_REASON (why they are not built), ACCUMOPS_CUDA_VERSION, ACCUMOPS_CUDA_OPTIONS (of
# nvcc) and, unless it is given, CMAKE_CUDA_ARCHITECTURES.

set(ACCUMOPS_WITH_CUDA OFF)
set(ACCUMOPS_CUDA_VERSION "")
set(ACCUMOPS_CUDA_REASON "")

if(NOT ACCUMOPS_CUDA)
  set(ACCUMOPS_CUDA_REASON "switched off with ACCUMOPS_CUDA=OFF")
  return()
endif()

if(ACCUMOPS_CUDA STREQUAL "EMULATED")
  set(ACCUMOPS_CUDA_REASON "emulated: see AccumopsEmulatedCuda.cmake")
  return()
endif()

# As with CMake's own languages, CUDACXX names the compiler, and no other one will do.
if(NOT CMAKE_CUDA_COMPILER AND NOT "$ENV{CUDACXX}" STREQUAL "")
  separate_arguments(named UNIX_COMMAND "$ENV{CUDACXX}")
  list(POP_FRONT named program)
  find_program(ACCUMOPS_CUDACXX "${program}" NO_CACHE)
  if(NOT ACCUMOPS_CUDACXX)
    message(FATAL_ERROR "CUDACXX is \"$ENV{CUDACXX}\", which is no program. Give it the path of nvcc, or unset it to build "
      "with the nvcc on PATH. ACCUMOPS_CUDA=OFF builds without CUDA kernels.")
  endif()
  set(CMAKE_CUDA_COMPILER "${ACCUMOPS_CUDACXX}")
  list(JOIN named " " flags)
  string(STRIP "${flags} $ENV{CUDAFLAGS}" flags)
  set(ENV{CUDAFLAGS} "${flags}")
endif()

if(NOT CMAKE_CUDA_COMPILER)
  find_program(ACCUMOPS_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(NOT ACCUMOPS_NVCC)
    if(NOT ACCUMOPS_CUDA STREQUAL "AUTO")
      message(FATAL_ERROR "ACCUMOPS_CUDA=ON, but nvcc was not found. Put it on PATH or set CUDACXX.")
    endif()
    set(ACCUMOPS_CUDA_REASON "nvcc was not found at build time")
    return()
  endif()
  set(CMAKE_CUDA_COMPILER "${ACCUMOPS_NVCC}")
endif()

# ACCUMOPS_CUDA_MACHINES=ALL, for a wheel, builds machine code for each architecture from sm_70 on that this compiler
# knows (CUDA 13 begins with sm_75), and PTX of the newest one for later GPUs. LOCAL, for a checkout, builds for the GPUs
# of this machine; without a GPU it builds for the oldest and the newest architecture.
if(NOT CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch
    OUTPUT_VARIABLE listed OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[0-9]+" numbers "${listed}")
  list(SORT numbers COMPARE NATURAL)
  list(FILTER numbers EXCLUDE REGEX "^([0-9]|[1-6][0-9])$")
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    list(FILTER numbers EXCLUDE REGEX "^(72|87|101|110)$")  # only in Jetsons, whose CPUs are others
  endif()
  if(ACCUMOPS_CUDA_MACHINES STREQUAL "LOCAL")
    set(known ${numbers})
    list(GET numbers 0 -1 numbers)
    find_program(ACCUMOPS_NVIDIA_SMI nvidia-smi)
    if(ACCUMOPS_NVIDIA_SMI)
      execute_process(COMMAND "${ACCUMOPS_NVIDIA_SMI}" --query-gpu=compute_cap --format=csv,noheader
        OUTPUT_VARIABLE present ERROR_QUIET)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]+" present "${present}")
      list(TRANSFORM present REPLACE "\\." "")
      list(JOIN present "|" present)
      list(FILTER known INCLUDE REGEX "^(${present})$")
      if(known)
        set(numbers ${known})
      endif()
    endif()
  endif()
  list(POP_BACK numbers newest)
  list(TRANSFORM numbers APPEND "-real")
  set(CMAKE_CUDA_ARCHITECTURES ${numbers} ${newest})
endif()

enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
# A tenth of the size. Drivers for CUDA 12, which older toolkits serve too, may not read it.
if(CUDAToolkit_VERSION VERSION_GREATER_EQUAL 13)
  set(ACCUMOPS_CUDA_OPTIONS --compress-mode=size)
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(ACCUMOPS_WITH_CUDA ON)
set(ACCUMOPS_CUDA_VERSION "${CUDAToolkit_VERSION_MAJOR}.${CUDAToolkit_VERSION_MINOR}")
