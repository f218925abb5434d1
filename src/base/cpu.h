// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels run on. Chosen once: the best this machine has, or the one forced by
// set_isa() or by the environment variable KILIN_ISA (portable, avx2, avx512, amx). amx is avx512 with
// Intel's tile matrix unit for the products that have a form for it.
#pragma once
#include <span>
#include <string_view>
#include <vector>

namespace kilin {

enum class Isa { kPortable, kAvx2, kAvx512, kAmx };

std::string_view isa_name(Isa isa);
// The instruction sets that are compiled in and that this machine can run, weakest first.
std::span<const Isa> supported_isas();
// The instruction set in use. Throws Error if KILIN_ISA names an unknown or unsupported one.
Isa active_isa();
// Forces an instruction set from here on (tests loop over supported_isas()). Not for use while kernels run.
void set_isa(Isa isa);

// Whether avx512's products of bfloat16 (vdpbf16ps, two products a lane) come at the rate of float32
// multiply-adds, twice as many in all. By the maker, not by a timing, so that a model gives the same bits
// every time: AMD's do (measured on Zen 4, docs/notes/20261125-cpu-vs-llama-cpp.md); Intel's come at half
// that rate (measured on Sapphire Rapids, docs/notes/20261124-cpu-matmul.md), so there they gain nothing.
bool fast_bf16_products();

// Whether the processor reads ahead in long streams of weights well enough by itself, so that loops which ask
// for lines in advance only lose by it: AMD's do (docs/notes/20261126-cpu-decode.md); on Intel's asking made
// up to four times the speed (docs/notes/20261124-cpu-matmul.md).
bool prefetches_streams();

// One cpu number (the lowest) of each physical core this process may run on, at least one; as it was at the
// first call, so that pinned threads do not change it.
const std::vector<int>& physical_core_cpus();
// Number of them.
int physical_cores();

}  // namespace kilin
