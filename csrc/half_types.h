// bfloat16 and float16 to float32 and back, rounding to nearest even: by integer steps that vectorise everywhere, and
// on a GPU by its own instructions.
#pragma once

#include "gate_math.h"

namespace diffmask {

// Each type has its storage and the two conversions.
struct Float32 {
  using Storage = float;
  static GATE_INLINE float load(float x) { return x; }
  static GATE_INLINE float store(float x) { return x; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static GATE_INLINE float load(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }
  static GATE_INLINE uint16_t store(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint16_t half;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
#else
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
#endif
  }
};

struct Float16 {
  using Storage = uint16_t;
  static GATE_INLINE float load(uint16_t x) {
#if defined(__CUDA_ARCH__)
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
    return wide;
#else
    const uint32_t sign = (static_cast<uint32_t>(x) & 0x8000u) << 16;
    const uint32_t magnitude = (static_cast<uint32_t>(x) & 0x7FFFu) << 13;
    const uint32_t normal = magnitude + (112u << 23);
    // Subtracting 2^-14 normalises what has no leading bit; no subnormal float32 is touched, whatever the CPU's mode.
    const uint32_t subnormal = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
    const uint32_t special = magnitude | 0x7F800000u;
    const uint32_t finite = magnitude < (1u << 23) ? subnormal : normal;
    return float_of(sign | (magnitude >= (31u << 23) ? special : finite));
#endif
  }
  static GATE_INLINE uint16_t store(float x) {
#if defined(__CUDA_ARCH__)
    uint16_t half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
#else
    const uint32_t bits = bits_of(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    const uint32_t normal = (magnitude - (112u << 23) + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
    // At 0.5 the unit in the last place of float32 is that of a subnormal float16: the addition rounds.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    // 65520 is the smallest number that rounds to infinity.
    return static_cast<uint16_t>(sign | (magnitude >= 0x477FF000u ? special : finite));
#endif
  }
};

}  // namespace diffmask
