// exp and the activations with their slopes, on 16 lanes.
#pragma once

#include "row_simd.h"

namespace fusedformer {
namespace {

// e^x, within 2 ulp; 0 far below, infinity above 88.72, NaN for NaN.
inline Floats exp(const Floats& x) {
  // The order matters: max and min give their second operand where it is a NaN.
  const Floats clamped = max(splat(-110.0f), min(splat(90.0f), x));
  const Floats n = round_even(clamped * splat(1.44269504f));
  // ln 2 in two parts, the first so short that n times it is exact.
  Floats r = fnma(n, splat(0.693145752f), clamped);
  r = fnma(n, splat(1.42860677e-6f), r);
  // 1 + r + r^2 q(r) with q fitted for the least relative error, 3e-9, where |r| <= ln(2) / 2.
  Floats q = splat(1.381446475e-3f);
  q = fma(q, r, splat(8.368780622e-3f));
  q = fma(q, r, splat(4.166839426e-2f));
  q = fma(q, r, splat(1.666652011e-1f));
  q = fma(q, r, splat(4.999999341e-1f));
  return scale_by_power(fma(r * r, q, r) + splat(1.0f), n);
}

// The logistic function s of z, and 1 - s without the subtraction's cancellation.
struct Logistic {
  Floats s, rest;
};
inline Logistic logistic(const Floats& z) {
  const Floats tail = exp(splat(0.0f) - abs(z));
  const Floats near = splat(1.0f) / (splat(1.0f) + tail), far = tail * near;
  const Mask positive = greater(z, splat(0.0f));
  return {select(positive, near, far), select(positive, far, near)};
}

// The normal distribution at z: P(X <= z), and its density.
struct Normal {
  Floats cdf, pdf;
};
inline Normal normal(const Floats& z) {
  const Floats bell = exp(z * z * splat(-0.5f));
  // P(X > |z|) = erfc(u) / 2 with u = |z| / sqrt(2); erfc(u) = e^(-u^2) t p(t) with
  // t = 1 / (1 + 0.4 u) and p fitted for the least relative error, 6e-8, where u <= 10.
  const Floats t = splat(1.0f) / fma(abs(z), splat(0.4f * 0.707106781f), splat(1.0f));
  Floats p = splat(4.125333103e-2f);
  p = fma(p, t, splat(-1.403206284e-1f));
  p = fma(p, t, splat(8.399010197e-2f));
  p = fma(p, t, splat(8.796120162e-2f));
  p = fma(p, t, splat(7.975859328e-2f));
  p = fma(p, t, splat(1.933923445e-1f));
  p = fma(p, t, splat(2.018878020e-1f));
  p = fma(p, t, splat(2.264430830e-1f));
  p = fma(p, t, splat(2.256342327e-1f));
  const Floats beyond = splat(0.5f) * t * p * bell;
  const Floats cdf = select(greater(z, splat(0.0f)), splat(1.0f) - beyond, beyond);
  return {cdf, bell * splat(0.398942280f)};
}

// --- Activations: act(z) and act'(z) -------------------------------------------------------------

struct Identity {
  static Floats value(const Floats& z) { return z; }
};

struct Relu {
  static Floats value(const Floats& z) { return max(splat(0.0f), z); }  // a NaN stays one
  static Floats slope(const Floats& z) {
    return select(greater(z, splat(0.0f)), splat(1.0f), splat(0.0f));
  }
};

struct Silu {
  static Floats value(const Floats& z) { return z * logistic(z).s; }
  static Floats slope(const Floats& z) {
    const Logistic l = logistic(z);
    return l.s * fma(z, l.rest, splat(1.0f));
  }
};

struct Gelu {
  static Floats value(const Floats& z) { return z * normal(z).cdf; }
  static Floats slope(const Floats& z) {
    const Normal n = normal(z);
    return fma(z, n.pdf, n.cdf);
  }
};

// (1 + tanh u) / 2 is the logistic function of 2 u, u = sqrt(2 / pi) (z + 0.044715 z^3).
struct GeluTanh {
  static Floats twice(const Floats& z, float cubic) {
    return splat(1.59576912f) * fma(z * z, splat(cubic), splat(1.0f));
  }
  static Floats value(const Floats& z) { return z * logistic(z * twice(z, 0.044715f)).s; }
  static Floats slope(const Floats& z) {
    const Logistic l = logistic(z * twice(z, 0.044715f));
    // In this order a large z meets the zero of s (1 - s) before its square can overflow.
    return fma(z * l.s * l.rest, twice(z, 3 * 0.044715f), l.s);
  }
};

}  // namespace
}  // namespace fusedformer
