# SPDX-License-Identifier: Apache-2.0
find_program(KILIN_CCACHE ccache)
# Without the checkout's place in the key: the wheel (scripts/setup), the presets and other checkouts share objects.
if(KILIN_CCACHE)
  set(KILIN_CCACHE_LAUNCHER ${CMAKE_COMMAND} -E env CCACHE_BASEDIR=${CMAKE_SOURCE_DIR} CCACHE_NOHASHDIR=1 ${KILIN_CCACHE})
  set(CMAKE_CXX_COMPILER_LAUNCHER ${KILIN_CCACHE_LAUNCHER})
endif()
