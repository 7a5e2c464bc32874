#include "probe_cpu.h"

#include "clones.h"
#include "gate_math.h"

namespace diffmask {
namespace {

constexpr int64_t LANES = 16;  // partial sums of a row's dot product, whatever the width of a register

GATE_INLINE float sum_lanes(float* lanes) {
  for (int64_t half = LANES / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// One row's hidden values and their product with the second weight. Two loops: the first is long enough to fill the
// registers by itself, and a row stays in the first-level cache.
template <bool with_left>
GATE_INLINE float probe_row(const Epilogue& head, float* __restrict hidden, const float* __restrict left) {
  const float* __restrict scale = head.scale;
  const float* __restrict bias = head.bias;
  const float* __restrict outer = head.outer;
  for (int64_t i = 0; i < head.width; ++i) {
    const float product = with_left ? hidden[i] + left[i] : hidden[i];
    hidden[i] = tanh_of(scale[i] * product + bias[i]);
  }
  float lanes[LANES] = {};
  const int64_t whole = head.width - head.width % LANES;
  for (int64_t i = 0; i < whole; i += LANES)
    for (int64_t lane = 0; lane < LANES; ++lane) lanes[lane] += hidden[i + lane] * outer[i + lane];
  for (int64_t i = whole; i < head.width; ++i) lanes[i - whole] += hidden[i] * outer[i];
  return sum_lanes(lanes);
}

}  // namespace

GATE_CLONES void probe_rows(
    const Epilogue& head, int64_t count, float* hidden, const float* left, const int64_t* index, float* raw,
    float* logits, int64_t step) {
  for (int64_t row = 0; row < count; ++row) {
    float* values = hidden + row * head.width;
    raw[row] = left == nullptr ? probe_row<false>(head, values, nullptr)
                               : probe_row<true>(head, values, left + index[row] * head.width);
  }
  for (int64_t row = 0; row < count; ++row)
    logits[row * step] = (head.bound == 0.0f ? raw[row] : head.bound * tanh_of(raw[row])) + head.offset;
}

GATE_CLONES void probe_rows_backward(
    int64_t width, const float* outer, int64_t count, const float* grad, const float* hidden,
    float* __restrict inside, float* __restrict sums) {
  float* __restrict inside_sum = sums;
  float* __restrict hidden_sum = sums + width;
  for (int64_t i = 0; i < 2 * width; ++i) sums[i] = 0.0f;
  for (int64_t row = 0; row < count; ++row) {
    const float g = grad[row];
    const float* __restrict values = hidden + row * width;
    float* __restrict out = inside + row * width;
    for (int64_t i = 0; i < width; ++i) {
      const float value = values[i];
      out[i] = g * outer[i] * (1.0f - value * value);
      inside_sum[i] += out[i];
      hidden_sum[i] += g * value;
    }
  }
}

GATE_CLONES void scatter_add(
    int64_t width, int64_t begin, int64_t end, int64_t count, const float* from, const int64_t* index,
    float* __restrict into) {
  for (int64_t row = 0; row < count; ++row) {
    const float* __restrict source = from + row * width;
    float* __restrict target = into + index[row] * width;
    for (int64_t i = begin; i < end; ++i) target[i] += source[i];
  }
}

}  // namespace diffmask
