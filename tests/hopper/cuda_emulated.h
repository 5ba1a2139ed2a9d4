// CUDA's words for a plain C++ compiler: qualifiers that say nothing here, and 16-bit floats.
#pragma once

#include <stdint.h>
#include <string.h>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

namespace fusedformer {
namespace emulator {

inline float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float widen(__nv_bfloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

inline float widen(__half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7FFF;
  if (rest >= 0x7C00) return as_float(sign | 0x7F800000 | (rest & 0x3FF) << 13);
  // Exact: the exponent's bias moves from 15 to 127, subnormals become normal.
  const float magnitude = as_float(rest << 13) * as_float((254 - 15) << 23);
  return as_float(sign | as_bits(magnitude));
}

// Round to nearest, ties to even.
inline void narrow(float x, __nv_bfloat16& out) {
  const uint32_t bits = as_bits(x);
  if ((bits & 0x7FFFFFFF) > 0x7F800000)
    out.bits = 0x7FFF;
  else
    out.bits = static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline void narrow(float x, __half& out) {
  const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  uint32_t rest;
  if (magnitude > 0x7F800000) {
    out.bits = 0x7FFF;
    return;
  }
  if (magnitude >= 0x477FF000) {
    rest = 0x7C00;  // 65520 and above
  } else if (magnitude < 0x38800000) {
    // Subnormal: adding 1/2 leaves the multiple of 2^-24 in the low bits, rounded.
    rest = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  } else {
    rest = (magnitude - ((127 - 15) << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | rest);
}

}  // namespace emulator
}  // namespace fusedformer
