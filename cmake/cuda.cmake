# SPDX-License-Identifier: Apache-2.0
# The GPU code: nvcc of CUDA 13, real code for sm_90a only, the CUDA runtime linked statically. Targets that do not
# name CUDA sources are built exactly as without it.
list(APPEND CMAKE_PREFIX_PATH /usr/local/cuda)
find_program(CMAKE_CUDA_COMPILER nvcc HINTS /usr/local/cuda/bin REQUIRED)
if(KILIN_CCACHE)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${KILIN_CCACHE_LAUNCHER})
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF)  # flags below instead: CMake 3.25 knows neither 90a nor C++20 of this nvcc
enable_language(CUDA)
set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
set(CMAKE_CUDA_STANDARD 20)
find_package(CUDAToolkit 13 REQUIRED)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
option(KILIN_PTXAS_REPORT "let ptxas print registers and spills of every kernel" OFF)

# The header-only form of fmt, and GoogleTest as an archive: the GPU machine has neither library.
add_library(kilin_cuda_flags INTERFACE)
target_include_directories(kilin_cuda_flags INTERFACE ${CMAKE_SOURCE_DIR}/src)
target_compile_options(
  kilin_cuda_flags
  INTERFACE "$<$<COMPILE_LANGUAGE:CUDA>:-gencode=arch=compute_90a,code=sm_90a;-O3;-lineinfo>"
            "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>"
            "$<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${KILIN_PTXAS_REPORT}>>:-Xptxas=-v>")
# fmt 9 switches constexpr off for nvcc, and then its own C++20 code does not compile.
target_compile_definitions(kilin_cuda_flags INTERFACE "$<$<COMPILE_LANGUAGE:CUDA>:FMT_USE_CONSTEXPR=1>")
target_link_libraries(kilin_cuda_flags INTERFACE kilin_flags fmt::fmt-header-only CUDA::cudart_static)

# kilin_cuda_program(NAME file...): a program that runs on a machine with a driver and glibc, and nothing else.
function(kilin_cuda_program name)
  add_executable(${name} ${ARGN})
  target_link_libraries(${name} PRIVATE kilin_kernels_cuda kilin_cuda_flags)
  target_link_options(${name} PRIVATE -static-libstdc++ -static-libgcc)
endfunction()
