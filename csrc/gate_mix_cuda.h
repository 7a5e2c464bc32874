// The kernels of the CUDA backend as functions on plain pointers to device memory; they know nothing of PyTorch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gate_math.h"

namespace diffmask {

enum class DeviceDtype { float32, bfloat16, float16 };

// One leading dim of the states, see diffmask_fast/ops/layout.py: its size, and how far a step along it moves.
struct DeviceDim {
  int64_t size;
  int64_t row;     // in the row-major index of rows
  int64_t states;  // in elements of the states
  int64_t grad;    // in elements of the gradient of the mixed states
};

struct DeviceLayout {
  DeviceDim dims[4];  // two group dims, two member dims
  int64_t width;      // values of a row

  GATE_INLINE int64_t groups() const { return dims[0].size * dims[1].size; }
  GATE_INLINE int64_t members() const { return dims[2].size * dims[3].size; }
  GATE_INLINE int64_t rows() const { return groups() * members(); }
};

struct DeviceGates {
  Law law;
  int64_t count;        // K, the gates of a row
  const int64_t* seed;  // (seed, offset), read on the device: a CUDA graph replays with what stands there then
  const float* logits;  // (rows, K)
};

// mixed = z * states + (1 - z) * baseline, in one launch. A row with a logit that is not finite becomes NaN.
struct ForwardArrays {
  const void* states;
  const float* baseline;  // (groups, width)
  void* mixed;            // (rows, width)
  float* running;         // (rows, K)
  float* log_open;        // (rows, K)
};

cudaError_t launch_forward(
    DeviceDtype dtype, const DeviceLayout& layout, const DeviceGates& gates, const ForwardArrays& arrays,
    cudaStream_t stream);

// What may be null: any gradient that comes in; grad_states and grad_baseline where they are not wanted. Without
// grad_mixed those two and the scratch are not touched, and one launch remains of two.
struct BackwardArrays {
  const void* grad_mixed;
  const float* grad_running;   // (rows, K)
  const float* grad_log_open;  // (rows, K)
  const void* states;
  const float* baseline;
  void* grad_states;     // (rows, width)
  float* grad_logits;    // (rows, K)
  float* grad_baseline;  // (groups, width)
  // Scratch. Columns are cut into chunks of CHUNK_COLUMNS, the members of a group into parts of part_members.
  int64_t part_members;
  float* dots;     // (chunks, rows): sum of grad_mixed * (states - baseline) over the columns of a chunk
  float* partial;  // (parts, groups, width): a part's gradient of the baseline; null where there is one part
};

constexpr int64_t CHUNK_COLUMNS = 1024;

cudaError_t launch_backward(
    DeviceDtype dtype, const DeviceLayout& layout, const DeviceGates& gates, const BackwardArrays& arrays,
    cudaStream_t stream);

// Whether this binary has code for the current device.
cudaError_t find_kernel();

}  // namespace diffmask
