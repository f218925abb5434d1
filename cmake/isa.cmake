# SPDX-License-Identifier: Apache-2.0
# CPU kernels are written once over kernels/cpu/vec.h and compiled once per instruction set.
# A kernel file X_isa.cc puts its code into `namespace kilin::KILIN_ISA`; the sibling X.cc chooses at run time
# (base/cpu.h). Such a file includes no standard-library template with external linkage, so that no function
# compiled for AVX-512 can be picked by the linker for an older machine.
set(KILIN_ISAS portable)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND KILIN_ISAS avx2 avx512)
endif()
set(KILIN_ISA_FLAGS_portable "")
set(KILIN_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi2)
set(KILIN_ISA_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16 -mfma -mf16c -mbmi2
    -mprefer-vector-width=512)
# Sanitized code is not vectorised anyhow, and takes five times as long to compile with -O3.
set(KILIN_ISA_OPTIMIZE -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast)
if(KILIN_SANITIZE)
  list(REMOVE_ITEM KILIN_ISA_OPTIMIZE -O3)
endif()

# kilin_isa_sources(TARGET file...): compiles each file once per instruction set into TARGET.
function(kilin_isa_sources target)
  foreach(isa IN LISTS KILIN_ISAS)
    add_library(${target}_${isa} OBJECT ${ARGN})
    target_include_directories(${target}_${isa} PRIVATE ${CMAKE_SOURCE_DIR}/src)
    target_compile_definitions(${target}_${isa} PRIVATE KILIN_ISA=${isa})
    target_compile_options(${target}_${isa} PRIVATE ${KILIN_ISA_FLAGS_${isa}} ${KILIN_ISA_OPTIMIZE})
    target_link_libraries(${target}_${isa} PRIVATE kilin_flags ${KILIN_FMT})
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_${isa}>)
  endforeach()
endfunction()

# kilin_avx512_sources(TARGET SUFFIX FLAGS file...): files that have one form only, for AVX-512 with more flags (of AMX);
# on other processors nothing.
function(kilin_avx512_sources target suffix flags)
  if(NOT "avx512" IN_LIST KILIN_ISAS)
    return()
  endif()
  add_library(${target}_${suffix} OBJECT ${ARGN})
  target_include_directories(${target}_${suffix} PRIVATE ${CMAKE_SOURCE_DIR}/src)
  target_compile_definitions(${target}_${suffix} PRIVATE KILIN_ISA=avx512)
  target_compile_options(${target}_${suffix} PRIVATE ${KILIN_ISA_FLAGS_avx512} ${flags} ${KILIN_ISA_OPTIMIZE})
  target_link_libraries(${target}_${suffix} PRIVATE kilin_flags ${KILIN_FMT})
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_${suffix}>)
endfunction()
