// The probe's kernels of the CPU backend, on plain pointers; they know nothing of PyTorch and nothing of threads.
#pragma once

#include <cstdint>

namespace diffmask {

// What comes after the first matrix product of one head; width is that of the hidden layer.
struct Epilogue {
  int64_t width;
  const float* scale;  // magnitude / norm of each row of the first weight
  const float* bias;
  const float* outer;  // the second weight
  float offset;
  float bound;  // 0: none
};

// For each of count rows: hidden = tanh(scale * (hidden + left[index]) + bias), in place; raw = hidden . outer;
// logits = bound * tanh(raw) + offset, or raw + offset, step values apart. left and index may be null together.
void probe_rows(
    const Epilogue& head, int64_t count, float* hidden, const float* left, const int64_t* index, float* raw,
    float* logits, int64_t step);

// For each of count rows: inside = grad * outer * (1 - hidden^2). Sets sums (2, width) to the column sums of inside and
// of grad * hidden.
void probe_rows_backward(
    int64_t width, const float* outer, int64_t count, const float* grad, const float* hidden, float* inside,
    float* sums);

// into[index[row]] += from[row] on the columns [begin, end), row after row.
void scatter_add(
    int64_t width, int64_t begin, int64_t end, int64_t count, const float* from, const int64_t* index, float* into);

}  // namespace diffmask
