#include "gate_mix_cpu.h"

#include "clones.h"
#include "half_types.h"

namespace diffmask {
namespace {

constexpr int64_t BLOCK = 256;  // elements whose words are in the first-level cache at a time; a multiple of 4
constexpr int64_t LANES = 16;   // partial sums of a row's dot product, whatever the width of a register

// The logistic noise of elements [first, first + size); first is a multiple of 4, size at most BLOCK. Drawing, here, and
// the two functions of the gate below are loops of their own: one loop of all would run out of registers.
GATE_INLINE void draw_noise(const Gates& gates, int64_t first, int64_t size, float* __restrict noise) {
  uint32_t words[BLOCK];
  const uint64_t counter = gates.offset + static_cast<uint64_t>(first) / 4;
  const uint32_t low = static_cast<uint32_t>(counter), high = static_cast<uint32_t>(counter >> 32);
  const uint32_t k0 = static_cast<uint32_t>(gates.seed), k1 = static_cast<uint32_t>(gates.seed >> 32);
  const uint32_t calls = static_cast<uint32_t>(size + 3) / 4;
  for (uint32_t call = 0; call < calls; ++call) {
    uint32_t c0 = low + call;
    uint32_t c1 = high + (c0 < low ? 1u : 0u);
    uint32_t c2, c3;
    philox(k0, k1, c0, c1, c2, c3);
    words[4 * call] = c0;
    words[4 * call + 1] = c1;
    words[4 * call + 2] = c2;
    words[4 * call + 3] = c3;
  }
  for (int64_t i = 0; i < size; ++i) noise[i] = logistic_noise(words[i]);
}

template <typename T>
GATE_INLINE void mix(
    int64_t width, float z, const void* state, const float* __restrict baseline, void* mixed) {
  const auto* __restrict x = static_cast<const typename T::Storage*>(state);
  auto* __restrict out = static_cast<typename T::Storage*>(mixed);
  const float rest = 1.0f - z;
  for (int64_t i = 0; i < width; ++i) out[i] = T::store(z * T::load(x[i]) + rest * baseline[i]);
}

GATE_INLINE float sum_lanes(float* lanes) {
  for (int64_t half = LANES / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

enum class Accumulate { no, set, add };

template <typename T, Accumulate accumulate, bool with_state>
GATE_INLINE float mix_backward(
    int64_t width,
    float z,
    const void* grad,
    const void* state,
    const float* __restrict baseline,
    float* __restrict grad_baseline,
    void* grad_state) {
  const auto* __restrict g = static_cast<const typename T::Storage*>(grad);
  const auto* __restrict x = static_cast<const typename T::Storage*>(state);
  auto* __restrict grad_x = static_cast<typename T::Storage*>(grad_state);
  const float rest = 1.0f - z;
  float lanes[LANES] = {};
  const auto step = [&](int64_t i, int64_t lane) __attribute__((always_inline)) {
    const float wide = T::load(g[i]);
    lanes[lane] += wide * (T::load(x[i]) - baseline[i]);
    if constexpr (accumulate == Accumulate::set) grad_baseline[i] = rest * wide;
    if constexpr (accumulate == Accumulate::add) grad_baseline[i] += rest * wide;
    if constexpr (with_state) grad_x[i] = T::store(z * wide);
  };
  const int64_t whole = width - width % LANES;
  for (int64_t i = 0; i < whole; i += LANES)
    for (int64_t lane = 0; lane < LANES; ++lane) step(i + lane, lane);
  for (int64_t i = whole; i < width; ++i) step(i, i - whole);
  return sum_lanes(lanes);
}

template <typename T, bool with_state, typename... Arguments>
GATE_INLINE float mix_backward_into(float* grad_baseline, bool first, Arguments... arguments) {
  if (grad_baseline == nullptr) return mix_backward<T, Accumulate::no, with_state>(arguments...);
  if (first) return mix_backward<T, Accumulate::set, with_state>(arguments...);
  return mix_backward<T, Accumulate::add, with_state>(arguments...);
}

template <typename T, typename... Arguments>
GATE_INLINE float mix_backward_of(void* grad_state, Arguments... arguments) {
  if (grad_state == nullptr) return mix_backward_into<T, false>(arguments...);
  return mix_backward_into<T, true>(arguments...);
}

}  // namespace

GATE_CLONES int64_t gates_forward(
    const Gates& gates, const float* logits, int64_t begin, int64_t end, float* __restrict running,
    float* __restrict log_sums) {
  const Law law = gates.law;
  float noise[BLOCK];
  uint32_t bad = 0;
  for (int64_t first = begin * gates.count; first < end * gates.count; first += BLOCK) {
    const int64_t size = end * gates.count - first < BLOCK ? end * gates.count - first : BLOCK;
    draw_noise(gates, first, size, noise);
    const float* __restrict logit = logits + first;
    float* gate = running + first;
    float* open = log_sums + first;
    for (int64_t i = 0; i < size; ++i) gate[i] = hard_concrete(law, noise[i], logit[i]).gate;
    for (int64_t i = 0; i < size; ++i) {
      open[i] = log_open(law, logit[i]);
      bad |= is_finite(logit[i]) ? 0u : 1u;
    }
  }
  for (int64_t row = begin; row < end; ++row) {
    float product = 1.0f, sum = 0.0f;
    for (int64_t i = row * gates.count; i < (row + 1) * gates.count; ++i) {
      running[i] = product *= running[i];
      log_sums[i] = sum += log_sums[i];
    }
  }
  if (bad != 0)
    for (int64_t i = begin * gates.count; i < end * gates.count; ++i)
      if (!is_finite(logits[i])) return i;
  return -1;
}

GATE_CLONES void gates_again(
    const Gates& gates, const float* logits, int64_t begin, int64_t end, float* __restrict gate,
    float* __restrict slope, float* __restrict product) {
  const Law law = gates.law;
  float noise[BLOCK];
  for (int64_t first = begin * gates.count; first < end * gates.count; first += BLOCK) {
    const int64_t size = end * gates.count - first < BLOCK ? end * gates.count - first : BLOCK;
    draw_noise(gates, first, size, noise);
    const float* __restrict logit = logits + first;
    float* gate_out = gate + first;
    float* slope_out = slope + first;
    for (int64_t i = 0; i < size; ++i) {
      const Sample sample = hard_concrete(law, noise[i], logit[i]);
      gate_out[i] = sample.gate;
      slope_out[i] = sample.slope;
    }
  }
  for (int64_t row = begin; row < end; ++row) {
    float before = 1.0f;
    for (int64_t i = row * gates.count; i < (row + 1) * gates.count; ++i) {
      slope[i] *= before;
      before *= gate[i];
    }
    product[row] = before;
  }
}

GATE_CLONES void gates_backward(
    const Gates& gates,
    const float* logits,
    const float* gate,
    const float* slope,
    const float* grad_product,
    const float* grad_running,
    const float* grad_log_open,
    int64_t begin,
    int64_t end,
    float* __restrict grad_logits) {
  const int64_t count = gates.count;
  if (grad_log_open != nullptr) {
    const Law law = gates.law;
    for (int64_t i = begin * count; i < end * count; ++i) grad_logits[i] = log_open_slope(law, logits[i]);
  }
  // With G_j = z_0 ... z_j:  dz_j = G_{j-1} * S_j,  S_j = dG_j + z_{j+1} * S_{j+1}. Nothing is divided by a gate.
  for (int64_t row = begin; row < end; ++row) {
    float suffix = grad_product == nullptr ? 0.0f : grad_product[row];
    float later = 0.0f;
    for (int64_t i = (row + 1) * count - 1; i >= row * count; --i) {
      if (grad_running != nullptr) suffix += grad_running[i];
      float grad = suffix * slope[i];
      if (grad_log_open != nullptr) {
        later += grad_log_open[i];
        grad += later * grad_logits[i];
      }
      grad_logits[i] = grad;
      suffix *= gate[i];
    }
  }
}

GATE_CLONES void mix_row(
    Dtype dtype, int64_t width, float z, const void* state, const float* baseline, void* mixed) {
  switch (dtype) {
    case Dtype::float32: return mix<Float32>(width, z, state, baseline, mixed);
    case Dtype::bfloat16: return mix<BFloat16>(width, z, state, baseline, mixed);
    case Dtype::float16: return mix<Float16>(width, z, state, baseline, mixed);
  }
}

GATE_CLONES float mix_row_backward(
    Dtype dtype,
    int64_t width,
    float z,
    const void* grad,
    const void* state,
    const float* baseline,
    float* grad_baseline,
    bool first,
    void* grad_state) {
#define MIX_ROW_BACKWARD(T) \
  return mix_backward_of<T>( \
      grad_state, grad_baseline, first, width, z, grad, state, baseline, grad_baseline, grad_state)
  switch (dtype) {
    case Dtype::float32: MIX_ROW_BACKWARD(Float32);
    case Dtype::bfloat16: MIX_ROW_BACKWARD(BFloat16);
    case Dtype::float16: MIX_ROW_BACKWARD(Float16);
  }
#undef MIX_ROW_BACKWARD
  return 0.0f;
}

GATE_CLONES void sum_parts(
    int64_t width, int64_t count, const float* parts, int64_t stride, float* __restrict sum) {
  for (int64_t i = 0; i < width; ++i) sum[i] = parts[i];
  for (int64_t part = 1; part < count; ++part)
    for (int64_t i = 0; i < width; ++i) sum[i] += parts[part * stride + i];
}

}  // namespace diffmask
