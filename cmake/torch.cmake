# SPDX-License-Identifier: Apache-2.0
# libtorch as pip installs it (scripts/setup), as the target kilin_libtorch. Not through torch's own TorchConfig.cmake:
# for a torch with CUDA that wants the whole CUDA toolkit, for one without it links more than is needed.
set(KILIN_TORCH_PYTHON "${CMAKE_SOURCE_DIR}/.venv/bin/python" CACHE FILEPATH "the Python whose torch is linked")
# Found, not imported: that would need the libraries of its GPU too.
execute_process(COMMAND ${KILIN_TORCH_PYTHON} -c
                        "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
                OUTPUT_VARIABLE KILIN_TORCH_PATH OUTPUT_STRIP_TRAILING_WHITESPACE
                RESULT_VARIABLE KILIN_TORCH_MISSING ERROR_QUIET)
if(KILIN_TORCH_MISSING)
  message(FATAL_ERROR "KILIN_TRAIN: ${KILIN_TORCH_PYTHON} has no torch: run scripts/setup, or set KILIN_TORCH_PYTHON")
endif()

add_library(kilin_libtorch INTERFACE)
# Behind all other folders: torch carries copies of fmt and others among its headers.
target_compile_options(
  kilin_libtorch INTERFACE "SHELL:-idirafter ${KILIN_TORCH_PATH}/include"
                           "SHELL:-idirafter ${KILIN_TORCH_PATH}/include/torch/csrc/api/include"
                           -Wno-shadow -Wno-unused-parameter -Wno-pedantic)
foreach(library torch torch_cpu c10 torch_cuda c10_cuda)
  set(path ${KILIN_TORCH_PATH}/lib/lib${library}.so)
  if(EXISTS ${path})
    list(APPEND KILIN_TORCH_LIBRARIES ${path})
  endif()
endforeach()
# The libraries that a torch for CUDA needs itself are looked for where the program runs.
if(EXISTS ${KILIN_TORCH_PATH}/lib/libtorch_cuda.so)
  target_link_options(kilin_libtorch INTERFACE -Wl,--allow-shlib-undefined)
endif()
# libtorch_cuda registers itself when it is loaded; nothing refers to it.
target_link_libraries(kilin_libtorch INTERFACE -Wl,--no-as-needed ${KILIN_TORCH_LIBRARIES} -Wl,--as-needed)
