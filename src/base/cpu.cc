// SPDX-License-Identifier: Apache-2.0
#include "base/cpu.h"

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <array>
#include <atomic>
#include <cstdlib>
#include <fstream>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"

namespace kilin {
namespace {

#if defined(__x86_64__)
// Conversions of float16, which clang 14's __builtin_cpu_supports() does not know.
bool have_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

// AMX with bfloat16, and the system's leave to use its 8 KB of registers (Linux grants it by process on
// request).
bool have_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

std::vector<Isa> detect() {
  std::vector<Isa> isas{Isa::kPortable};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && have_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  if (avx2) isas.push_back(Isa::kAvx2);
  if (avx512) isas.push_back(Isa::kAvx512);
  if (avx512 && have_amx()) isas.push_back(Isa::kAmx);
#endif
  return isas;
}

Isa initial_isa() {
  const auto isas = supported_isas();
  const char* forced = std::getenv("KILIN_ISA");
  if (forced == nullptr || *forced == '\0') return isas.back();
  for (Isa isa : isas) {
    if (isa_name(isa) == forced) return isa;
  }
  std::string names;
  for (Isa isa : isas) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  fail("KILIN_ISA: found '{}', expected one that this machine runs: {}", forced, names);
}

std::atomic<int>& forced_isa() {
  static std::atomic<int> isa{-1};
  return isa;
}

}  // namespace

std::string_view isa_name(Isa isa) {
  static constexpr std::array<std::string_view, 4> kNames{"portable", "avx2", "avx512", "amx"};
  return kNames[static_cast<size_t>(isa)];
}

std::span<const Isa> supported_isas() {
  static const std::vector<Isa> isas = detect();
  return isas;
}

Isa active_isa() {
  const int forced = forced_isa().load(std::memory_order_relaxed);
  if (forced >= 0) return static_cast<Isa>(forced);
  static const Isa isa = initial_isa();
  return isa;
}

namespace {
bool made_by_amd() {
#if defined(__x86_64__)
  static const bool amd = [] {
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") != 0;
  }();
  return amd;
#else
  return false;
#endif
}
}  // namespace

bool fast_bf16_products() { return made_by_amd() && active_isa() >= Isa::kAvx512; }
bool prefetches_streams() { return made_by_amd(); }

void set_isa(Isa isa) { forced_isa() = static_cast<int>(isa); }

namespace {

std::vector<int> find_core_cpus() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return {0};
  std::set<std::pair<int, int>> cores;  // (package, core): hyper-threads of one core count once
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    const std::string topology = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    int package = 0;
    int core = cpu;
    std::ifstream(topology + "physical_package_id") >> package;
    std::ifstream core_file(topology + "core_id");
    if (core_file) core_file >> core;
    if (cores.emplace(package, core).second) cpus.push_back(cpu);
  }
  return cpus.empty() ? std::vector<int>{0} : cpus;
}

}  // namespace

const std::vector<int>& physical_core_cpus() {
  static const std::vector<int> cpus = find_core_cpus();
  return cpus;
}

int physical_cores() { return static_cast<int>(physical_core_cpus().size()); }

}  // namespace kilin
