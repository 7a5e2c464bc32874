// The kernels of the CPU backend, on plain pointers; they know nothing of PyTorch and nothing of threads.
#pragma once

#include <cstdint>

#include "gate_math.h"

namespace diffmask {

enum class Dtype { float32, bfloat16, float16 };

struct Gates {
  Law law;
  uint64_t seed;
  uint64_t offset;
  int64_t count;  // K, the gates of a row
};

// All of these work on the rows [begin, end) of (rows, K) float32 arrays; begin is a multiple of 4, so that a chunk
// begins with a whole Philox call.

// Running products of the gates and running sums of log P(z != 0). Returns the index of the first logit that is not
// finite, or -1.
int64_t gates_forward(
    const Gates& gates, const float* logits, int64_t begin, int64_t end, float* running, float* log_open);

// Gates, their slopes times the gates before them (z_0 ... z_{k-1} * dz_k / dlogit_k), and the (rows,) products.
void gates_again(
    const Gates& gates, const float* logits, int64_t begin, int64_t end, float* gate, float* slope, float* product);

// Gradient of the logits, from what gates_again gave and the gradients of the row products (rows,), of the running
// products and of the running sums; each gradient may be null.
void gates_backward(
    const Gates& gates,
    const float* logits,
    const float* gate,
    const float* slope,
    const float* grad_product,
    const float* grad_running,
    const float* grad_log_open,
    int64_t begin,
    int64_t end,
    float* grad_logits);

// mixed = z * state + (1 - z) * baseline, for one row of width values.
void mix_row(Dtype dtype, int64_t width, float z, const void* state, const float* baseline, void* mixed);

// For one row: adds (1 - z) * grad to grad_baseline, or sets it where first; writes z * grad to grad_state; returns
// sum(grad * (state - baseline)). grad_baseline and grad_state may be null.
float mix_row_backward(
    Dtype dtype,
    int64_t width,
    float z,
    const void* grad,
    const void* state,
    const float* baseline,
    float* grad_baseline,
    bool first,
    void* grad_state);

// sum[i] = parts[0][i] + parts[1][i] + ..., in this order; parts are stride apart.
void sum_parts(int64_t width, int64_t count, const float* parts, int64_t stride, float* sum);

}  // namespace diffmask
