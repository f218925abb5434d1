# SPDX-License-Identifier: Apache-2.0
find_program(KILIN_CCACHE ccache)
if(KILIN_CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${KILIN_CCACHE})
endif()
