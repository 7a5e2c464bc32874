// The scalar math and the kernels of csrc as plain C functions on arrays, for test_gate_math.py.
#include "../../csrc/gate_mix_cpu.h"
#include "../../csrc/half_types.h"

using namespace diffmask;

extern "C" {

void exp_of_negative_all(int64_t n, const float* in, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = exp_of_negative(in[i]);
}

void log_of_positive_all(int64_t n, const float* in, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = log_of_positive(in[i]);
}

void log1p_of_unit_all(int64_t n, const float* in, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = log1p_of_unit(in[i]);
}

void tanh_of_all(int64_t n, const float* in, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = tanh_of(in[i]);
}

void load_all(int64_t bfloat, const uint16_t* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = bfloat ? BFloat16::load(in[i]) : Float16::load(in[i]);
}

void store_all(int64_t bfloat, const float* in, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = bfloat ? BFloat16::store(in[i]) : Float16::store(in[i]);
}

// Everything the kernels compute for rows of count gates and width values, one array after the other in out.
void kernels(
    int64_t rows, int64_t count, int64_t width, int64_t dtype, const float* logits, const uint16_t* states,
    const float* baseline, float* out) {
  const Gates gates{{0.2f, -0.2f, 1.2f, -0.32188758f}, 0x123456789ABCDEFu, ~static_cast<uint64_t>(7), count};
  const int64_t elements = rows * count;
  float *running = out, *open = running + elements, *gate = open + elements, *slope = gate + elements;
  float *grad = slope + elements, *product = grad + elements, *dots = product + rows, *sum = dots + rows;
  auto* mixed = reinterpret_cast<char*>(sum + width);
  auto* grad_state = mixed + rows * width * sizeof(float);
  const auto kind = static_cast<Dtype>(dtype);
  const int64_t row_bytes = width * (dtype == 0 ? 4 : 2);
  const auto* state = reinterpret_cast<const char*>(states);
  gates_forward(gates, logits, 0, rows, running, open);
  gates_again(gates, logits, 0, rows, gate, slope, product);
  for (int64_t row = 0; row < rows; ++row) {
    const char* x = state + row * row_bytes;
    mix_row(kind, width, product[row], x, baseline, mixed + row * row_bytes);
    dots[row] = mix_row_backward(
        kind, width, product[row], x, x, baseline, sum, row == 0, grad_state + row * row_bytes);
  }
  gates_backward(gates, logits, gate, slope, dots, running, open, 0, rows, grad);
}
}
