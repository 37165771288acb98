// exp for loops that the compiler vectorises. Without linkage: each file that includes it has a copy for its own
// instruction set.
#pragma once

#include <cstdint>

namespace vlmo_fast {
namespace {

inline float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t as_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

// exp(x) for x up to about 88, to 2 units in the last place; 0 below -87.3, where float32 turns subnormal; NaN for NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial in r (coefficients as in Cephes, expf).
inline float exp_fast(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which then lies in the low bits
  float shifted = x * 1.44269504f + kRound;
  uint32_t n = as_bits(shifted) - as_bits(kRound);
  float whole = shifted - kRound;
  float r = x - whole * 0.693359375f;
  r = r + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  float y = (p * (r * r) + r + 1.0f) * as_float((n + 127u) << 23);
  return x < -87.3f ? 0.0f : y;
}

}  // namespace
}  // namespace vlmo_fast
