# SPDX-License-Identifier: Apache-2.0
# Warnings and sanitizers for every target of the project.
add_library(kilin_flags INTERFACE)
# nvcc takes the compiler's own options behind -Xcompiler only (cmake/cuda.cmake).
target_compile_options(
  kilin_flags INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Wshadow;-Wno-unknown-pragmas>")
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # Vector types by value differ in ABI between instruction sets; they never cross a translation unit here.
  target_compile_options(
    kilin_flags INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:-Wno-psabi;-Wno-restrict>")  # GCC 12: false alarms in std::string
endif()
if(KILIN_SANITIZE)
  target_compile_options(kilin_flags INTERFACE -fsanitize=${KILIN_SANITIZE} -fno-sanitize-recover=all
                                               -fno-omit-frame-pointer)
  string(REPLACE ",fuzzer-no-link" "" KILIN_LINK_SANITIZE "${KILIN_SANITIZE}")
  target_link_options(kilin_flags INTERFACE -fsanitize=${KILIN_LINK_SANITIZE})
endif()
