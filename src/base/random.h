// SPDX-License-Identifier: Apache-2.0
// Seeded random numbers that are the same on every machine (the standard fixes mt19937_64 but not its
// distributions).
#pragma once
#include <cmath>
#include <cstdint>
#include <random>
#include <string_view>

namespace kilin {

// A number in [0, 2^64) from a counter: splitmix64's mixing.
inline uint64_t mixed_bits(uint64_t counter) {
  uint64_t bits = counter * 0x9e3779b97f4a7c15ull;
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9ull;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebull;
  return bits ^ (bits >> 31);
}

inline uint64_t text_hash(std::string_view text) {  // FNV-1a
  uint64_t hash = 0xcbf29ce484222325ull;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3ull;
  return hash;
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  uint64_t bits() { return engine_(); }
  // uniform in [0, 1), 53 bits
  double uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  double uniform(double low, double high) { return low + (high - low) * uniform(); }
  // standard normal (Box-Muller)
  double normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return radius * std::cos(6.283185307179586476925 * uniform());
  }
  // uniform integer in [0, n), n > 0; the bias of the modulus is below n / 2^64
  uint64_t below(uint64_t n) { return engine_() % n; }

 private:
  std::mt19937_64 engine_;
};

}  // namespace kilin
