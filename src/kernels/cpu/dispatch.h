// SPDX-License-Identifier: Apache-2.0
// Choosing among the copies of a kernel that cmake/isa.cmake compiled. A kernel's private header declares its
// table of function pointers for each ISA namespace with KILIN_DECLARE_ISA; its X.cc calls KILIN_DISPATCH.
#pragma once
#include "base/cpu.h"

#if defined(__x86_64__)
#define KILIN_DECLARE_ISA(...) \
  namespace kilin::portable {  \
  __VA_ARGS__                  \
  }                            \
  namespace kilin::avx2 {      \
  __VA_ARGS__                  \
  }                            \
  namespace kilin::avx512 {    \
  __VA_ARGS__                  \
  }
// KILIN_DISPATCH(f)(args...) calls kilin::<active isa>::f(args...)
#define KILIN_DISPATCH(function)                                               \
  (::kilin::active_isa() >= ::kilin::Isa::kAvx512 ? &::kilin::avx512::function \
   : ::kilin::active_isa() == ::kilin::Isa::kAvx2 ? &::kilin::avx2::function   \
                                                  : &::kilin::portable::function)
#else
#define KILIN_DECLARE_ISA(...) \
  namespace kilin::portable {  \
  __VA_ARGS__                  \
  }
#define KILIN_DISPATCH(function) (&::kilin::portable::function)
#endif
