// The scalar math of the gate: Philox, exp and log, the Hard Concrete and its derivatives.
//
// Everything is branch-free float32 without library calls, so that a compiler can vectorise a loop around it, and
// without fused multiply-adds (-ffp-contract=off, for nvcc -fmad=false), so that every instruction set and a GPU give
// the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define GATE_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define GATE_INLINE inline __attribute__((always_inline))
#else
#define GATE_INLINE inline
#endif

namespace diffmask {

// Louizos et al. 2018, equations 10-12, with what follows from the three numbers computed once in float64.
struct Law {
  float temperature;
  float left;
  float width;  // right - left
  float shift;  // temperature * log(-left / right): log P(z != 0) = logsigmoid(logit - shift)
};

inline Law law_of(double temperature, double left, double right) {
  return {
      static_cast<float>(temperature), static_cast<float>(left), static_cast<float>(right - left),
      static_cast<float>(temperature * std::log(-left / right))};
}

GATE_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

GATE_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

GATE_INLINE float minus_magnitude(float x) {
  return float_of(bits_of(x) | 0x80000000u);
}

// ---- the stream (the contract is in diffmask_fast/ops/philox.py)

// Philox4x32-10 of the counter (c0, c1, 0, 0); the four words come back in place.
GATE_INLINE void philox(uint32_t k0, uint32_t k1, uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3) {
  c2 = c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// The word of one element of the stream.
GATE_INLINE uint32_t stream_word(uint64_t seed, uint64_t offset, uint64_t element) {
  const uint64_t counter = offset + element / 4;
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2, c3;
  philox(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), c0, c1, c2, c3);
  const uint32_t even = element & 2 ? c2 : c0, odd = element & 2 ? c3 : c1;
  return element & 1 ? odd : even;
}

// ---- exp and log

// x = n log 2 + r with a whole n and |r| <= log(2) / 2.
struct Reduced {
  uint32_t exponent;  // n in its low bits, moved to where a float keeps its exponent
  float growth;       // exp(r) - 1
};

GATE_INLINE Reduced reduce(float x) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  // log 2 in two parts; the first has 10 bits, so that n times it is exact.
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  // Minimax for (exp(r) - 1 - r) / r^2 on |r| <= log(2) / 2, relative error of exp 2^-28.
  float p = 0.0013813145f;
  p = p * r + 0.008369419f;
  p = p * r + 0.041668456f;
  p = p * r + 0.16666515f;
  p = p * r + 0.49999994f;
  return {bits_of(shifted) << 23, r + r * r * p};
}

// exp(x) for x <= 0 within 1 ulp; 0 where the result would be subnormal.
GATE_INLINE float exp_of_negative(float x) {
  const float bounded = x < -87.0f ? -87.0f : x;
  const Reduced reduced = reduce(bounded);
  const float y = 1.0f + reduced.growth;
  const float scaled = float_of(bits_of(y) + reduced.exponent);
  return x < -87.0f ? 0.0f : scaled;
}

// tanh(x) within 3 ulp, and within 2 beyond 0.55; its sign that of x.
GATE_INLINE float tanh_of(float x) {
  const float doubled = 2.0f * minus_magnitude(x);
  const Reduced reduced = reduce(doubled < -20.0f ? -20.0f : doubled);
  const float power = float_of(0x3F800000u + reduced.exponent);
  const float part = power * reduced.growth;
  // With e = exp(-2 |x|): tanh |x| = 1 - 2 e / (1 + e), and where that would cancel (1 - e) / (1 + e).
  const float e = power + part;
  const float rest = (1.0f - power) - part;
  const bool large = doubled < -1.1f;
  const float magnitude = (large ? 1.0f : 0.0f) + (large ? -2.0f * e : rest) / (1.0f + e);
  return float_of((bits_of(magnitude) & 0x7FFFFFFFu) | (bits_of(x) & 0x80000000u));
}

// k * log(2) + log(1 + f) for sqrt(1/2) - 1 <= f <= sqrt(2) - 1 and a whole number k.
GATE_INLINE float log_of_reduced(float f, float k) {
  // Minimax for (log(1 + f) - f + f^2 / 2) / f^3, relative error of the logarithm 2^-27.
  float p = -0.076344974f;
  p = p * f + 0.12761578f;
  p = p * f + -0.13160183f;
  p = p * f + 0.14201757f;
  p = p * f + -0.16623357f;
  p = p * f + 0.20001227f;
  p = p * f + -0.2500082f;
  p = p * f + 0.3333333f;
  const float square = f * f;
  const float small = (f * square * p + k * -2.12194440e-4f) - 0.5f * square;
  return k * 0.693359375f + (f + small);
}

// log(x) for a positive normal x, within 1 ulp.
GATE_INLINE float log_of_positive(float x) {
  // Exponent and mantissa such that the mantissa is in [sqrt(1/2), sqrt(2)).
  const uint32_t moved = bits_of(x) - 0x3F3504F3u;
  const float k = static_cast<float>(static_cast<int32_t>(moved) >> 23);
  const float mantissa = float_of((moved & 0x007FFFFFu) + 0x3F3504F3u);
  return log_of_reduced(mantissa - 1.0f, k);
}

// log(1 + x) for 0 <= x <= 1, within 2 ulp.
GATE_INLINE float log1p_of_unit(float x) {
  // k = x > sqrt(2) - 1, taken from a sign bit: a comparison would make compilers compute the polynomial twice.
  const float k = static_cast<float>(static_cast<int32_t>(bits_of(0.41421357f - x) >> 31));
  return log_of_reduced((x - k) * (1.0f - 0.5f * k), k);
}

// ---- the gate

// log u - log(1 - u) of the uniform u = ((word >> 9) + 1/2) * 2^-23: both u and 1 - u are whole multiples of 2^-24.
GATE_INLINE float logistic_noise(uint32_t word) {
  const int32_t odd = static_cast<int32_t>(word >> 9) * 2 + 1;
  return log_of_positive(static_cast<float>(odd) / static_cast<float>(16777216 - odd));
}

struct Sample {
  float gate;
  float slope;  // d gate / d logit
};

GATE_INLINE Sample hard_concrete(const Law& law, float noise, float logit) {
  const float x = (noise + logit) / law.temperature;
  const float e = exp_of_negative(minus_magnitude(x));
  const float r = 1.0f / (1.0f + e);
  const float s = x < 0.0f ? e * r : r;
  const float stretched = law.left + law.width * s;
  Sample sample;
  const float floored = stretched < 0.0f ? 0.0f : stretched;
  sample.gate = floored > 1.0f ? 1.0f : floored;
  // s (1 - s) = e r^2, without the cancellation in 1 - s.
  const float slope = law.width / law.temperature * (e * r * r);
  sample.slope = stretched > 0.0f && stretched < 1.0f ? slope : 0.0f;
  return sample;
}

// log P(z != 0)
GATE_INLINE float log_open(const Law& law, float logit) {
  const float a = logit - law.shift;
  return (a < 0.0f ? a : 0.0f) - log1p_of_unit(exp_of_negative(minus_magnitude(a)));
}

// d log P(z != 0) / d logit = 1 - P(z != 0)
GATE_INLINE float log_open_slope(const Law& law, float logit) {
  const float a = logit - law.shift;
  const float e = exp_of_negative(minus_magnitude(a));
  const float r = 1.0f / (1.0f + e);
  return a < 0.0f ? r : e * r;
}

GATE_INLINE bool is_finite(float x) {
  return (bits_of(x) & 0x7F800000u) != 0x7F800000u;
}

}  // namespace diffmask
