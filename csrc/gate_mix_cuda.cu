// The kernels of the CUDA backend and their launchers.
//
// Nothing is added by atomics and the shape of the work follows from the shapes of the tensors alone, so that the same
// input gives the same bits on every GPU. Running gates, log_open, mixed and the gradient of the states have the bits
// of the C++ backend too. A row's dot product and a baseline shared by many rows are summed in another order than
// there, and the dot products of rows that don't lie at multiples of 16 bytes in another order than of those that do.
//
// A logit that is not finite can't be reported without waiting for the device: its row becomes NaN, and its gradients.
#include "gate_mix_cuda.h"

#include <algorithm>
#include <initializer_list>
#include <limits>

#include "gate_mix_cuda.cuh"

namespace diffmask {
namespace {

constexpr int TILE_ROWS = 16;   // rows of mix_backward whose gates are computed at a time
constexpr int TILE_GATES = 64;  // and the gates of such a row that are
constexpr int FINISH_THREADS = 256;
constexpr int FINISH_WARPS = FINISH_THREADS / LANES;

// ---- forward: one warp for each row

// Leading dims from outer to inner in the row-major order of rows.
struct RowMajor {
  struct Dim {
    int64_t size, states, baseline;
  } dims[4];
};

struct Forward {
  RowMajor rows;
  int64_t row_count, width;
  DeviceGates gates;
  ForwardArrays arrays;
};

template <typename A>
__global__ void __launch_bounds__(THREADS) mix_forward(const Forward f) {
  constexpr int AHEAD = 4;  // accesses of a lane on their way at a time
  const int thread = static_cast<int>(threadIdx.x), lane = thread % LANES;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + thread / LANES;
  if (row >= f.row_count) return;

  int64_t flat = row, states_offset = 0, baseline_offset = 0;
#pragma unroll
  for (int d = 3; d >= 0; --d) {
    const int64_t index = take_index(flat, f.rows.dims[d].size);
    states_offset += index * f.rows.dims[d].states;
    baseline_offset += index * f.rows.dims[d].baseline;
  }
  const auto* states = static_cast<const typename A::Storage*>(f.arrays.states) + states_offset;
  const float* baseline = f.arrays.baseline + baseline_offset;
  auto* mixed = static_cast<typename A::Storage*>(f.arrays.mixed) + row * f.width;

  // The first states travel while the gates are computed.
  typename A::Values x[AHEAD];
  const auto column_of = [&](int64_t first, int i) { return first + (lane + i * LANES) * A::SIZE; };
  const auto load = [&](int64_t first) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
      if (column_of(first, i) < f.width) x[i] = A::load(states, column_of(first, i));
  };
  load(0);
  const float z = write_gates(f.gates, row, lane, f.arrays.running, f.arrays.log_open);
  const float rest = 1.0f - z;
  for (int64_t first = 0; first < f.width;) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int64_t column = column_of(first, i);
      if (column >= f.width) continue;
      float b[A::SIZE];
      A::load_floats(baseline + column, b);
      typename A::Values out;
#pragma unroll
      for (int j = 0; j < A::SIZE; ++j) out.set(j, z * x[i].get(j) + rest * b[j]);
      A::store(mixed, column, out);
    }
    first += AHEAD * LANES * A::SIZE;
    load(first);
  }
}

// ---- backward, first launch: one pass over states and gradient

struct Backward {
  DeviceLayout layout;
  DeviceGates gates;
  BackwardArrays arrays;
  float* sums;  // (parts, groups, width): the partial sums, or the gradient of the baseline itself; may be null
};

// Rows of a tile: where they lie and what their gates multiply to.
struct Tile {
  Place places[TILE_ROWS];
  float products[TILE_ROWS];
  float gates[TILE_ROWS][TILE_GATES + 1];  // an odd pitch keeps the threads that multiply rows on different banks
  float dots[WARPS][TILE_ROWS];
};

// The whole block draws the gates, then one thread for each row multiplies them, in the order of the C++ backend.
__device__ __forceinline__ void draw_products(const DeviceGates& gates, int rows, Tile& tile) {
  const int thread = static_cast<int>(threadIdx.x);
  float product = 1.0f;
  for (int64_t first = 0; first < gates.count; first += TILE_GATES) {
    const int count = static_cast<int>(gates.count - first < TILE_GATES ? gates.count - first : TILE_GATES);
    for (int i = thread; i < rows * count; i += THREADS) {
      const int row = i / count, gate = i % count;
      const int64_t element = tile.places[row].row * gates.count + first + gate;
      tile.gates[row][gate] = draw_gate(gates, element, gates.logits[element]).gate;
    }
    __syncthreads();
    if (thread < rows)
      for (int gate = 0; gate < count; ++gate) product *= tile.gates[thread][gate];
    __syncthreads();
  }
  if (thread < rows) tile.products[thread] = product;
  __syncthreads();
}

// What a thread has loaded of a row.
template <typename A>
struct Ahead {
  typename A::Values grad[A::PARTS], states[A::PARTS];
};

// A block has a chunk of columns of some members of one group. Each thread owns columns and adds them up by itself.
template <typename A>
__global__ void __launch_bounds__(THREADS, 4) mix_backward(const Backward b) {
  __shared__ Tile tile;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % LANES, warp = thread / LANES;
  const int64_t width = b.layout.width;
  void* const __restrict__ grad_states = b.arrays.grad_states;
  int64_t part = blockIdx.x;
  const int64_t group = take_index(part, b.layout.groups());
  const int64_t members = b.layout.members();
  const int64_t begin = part * b.arrays.part_members;
  const int64_t end = members - begin < b.arrays.part_members ? members : begin + b.arrays.part_members;

  // This thread's columns are those at column + i * STRIDE where that is left of the row.
  constexpr int STRIDE = THREADS * A::SIZE;
  const int64_t column = blockIdx.y * CHUNK_COLUMNS + thread * A::SIZE;
  const int left = static_cast<int>(width - column < CHUNK_COLUMNS ? width - column : CHUNK_COLUMNS);
  float baseline[A::PARTS][A::SIZE], sums[A::PARTS][A::SIZE];
#pragma unroll
  for (int i = 0; i < A::PARTS; ++i) {
#pragma unroll
    for (int j = 0; j < A::SIZE; ++j) sums[i][j] = 0.0f;
    if (i * STRIDE < left) A::load_floats(b.arrays.baseline + group * width + column + i * STRIDE, baseline[i]);
  }
  Place group_place{0, 0, 0};
  int64_t flat = group;
  move_along(group_place, take_index(flat, b.layout.dims[1].size), b.layout.dims[1]);
  move_along(group_place, flat, b.layout.dims[0]);

  for (int64_t first = begin; first < end; first += TILE_ROWS) {
    const int rows = static_cast<int>(end - first < TILE_ROWS ? end - first : TILE_ROWS);
    if (thread < rows) {
      Place place = group_place;
      flat = first + thread;
      move_along(place, take_index(flat, b.layout.dims[3].size), b.layout.dims[3]);
      move_along(place, flat, b.layout.dims[2]);
      tile.places[thread] = place;
    }
    __syncthreads();

    Ahead<A> ahead[A::BATCH];
    const auto load = [&](int n, int row) {
      if (row >= rows) return;
      const auto* grad = static_cast<const typename A::Storage*>(b.arrays.grad_mixed) + tile.places[row].grad;
      const auto* states = static_cast<const typename A::Storage*>(b.arrays.states) + tile.places[row].states;
#pragma unroll
      for (int i = 0; i < A::PARTS; ++i) {
        if (i * STRIDE >= left) continue;
        ahead[n].grad[i] = A::load(grad, column + i * STRIDE);
        ahead[n].states[i] = A::load(states, column + i * STRIDE);
      }
    };
    // The first rows travel while the gates are computed, and then always BATCH of them.
#pragma unroll
    for (int n = 0; n < A::BATCH; ++n) load(n, n);
    draw_products(b.gates, rows, tile);
    for (int first_row = 0; first_row < rows; first_row += A::BATCH) {
#pragma unroll
      for (int n = 0; n < A::BATCH; ++n) {
        const int row = first_row + n;
        if (row >= rows) continue;
        const float z = tile.products[row], rest = 1.0f - z;
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < A::PARTS; ++i) {
          if (i * STRIDE >= left) continue;
          typename A::Values out;
#pragma unroll
          for (int j = 0; j < A::SIZE; ++j) {
            const float g = ahead[n].grad[i].get(j);
            dot += g * (ahead[n].states[i].get(j) - baseline[i][j]);
            sums[i][j] += rest * g;
            out.set(j, z * g);
          }
          if (grad_states != nullptr) A::store(grad_states, tile.places[row].row * width + column + i * STRIDE, out);
        }
        load(n, row + A::BATCH);
        dot = sum_of_lanes(dot);
        if (lane == 0) tile.dots[warp][row] = dot;
      }
    }
    __syncthreads();
    if (thread < rows) {
      float dot = tile.dots[0][thread];
#pragma unroll
      for (int w = 1; w < WARPS; ++w) dot += tile.dots[w][thread];
      b.arrays.dots[blockIdx.y * b.layout.rows() + tile.places[thread].row] = dot;
    }
  }
  if (b.sums == nullptr) return;
#pragma unroll
  for (int i = 0; i < A::PARTS; ++i)
    if (i * STRIDE < left) A::store_floats(b.sums + blockIdx.x * width + column + i * STRIDE, sums[i]);
}

// ---- backward, second launch: the gradient of the logits, and the sum of the baseline's parts

struct Finish {
  DeviceGates gates;
  int64_t rows;
  const float* dots;  // (chunks, rows), or null
  int64_t chunks;
  const float* grad_running;
  const float* grad_log_open;
  float* grad_logits;
  int64_t row_blocks;  // the first blocks, which have a row for each warp; the others have a column for each lane
  const float* partial;
  float* grad_baseline;
  int64_t parts, columns;
};

// The lanes of a warp have a gate each, 32 at a time. With G_j = z_0 ... z_j:  dz_j = G_{j-1} * S_j,
// S_j = dG_j + z_{j+1} * S_{j+1}. Nothing is divided by a gate.
__device__ __forceinline__ void finish_row(const Finish& f, int64_t row, int lane) {
  const int64_t count = f.gates.count;
  const int64_t last = (count - 1) / LANES * LANES;
  const float* logits = f.gates.logits + row * count;
  float* grad_logits = f.grad_logits + row * count;
  Sample sample;
  float logit, weight = 0.0f;  // dz_j / dlogit_j * G_{j-1}
  const auto draw = [&](int64_t gate) {
    logit = gate < count ? logits[gate] : 0.0f;
    sample = draw_gate(f.gates, row * count + gate, logit);
  };
  float before = 1.0f;
  for (int64_t first = 0; first <= last; first += LANES) {
    draw(first + lane);
    const int used = lanes_in_use(count - first);
#pragma unroll 4
    for (int k = 0; k < used; ++k) {
      if (k == lane) weight = sample.slope * before;
      before *= of_lane(sample.gate, k);
    }
    if (first < last) grad_logits[first + lane] = weight;  // kept until the way back
  }

  float suffix = 0.0f, later = 0.0f;
  if (f.dots != nullptr)
    for (int64_t chunk = 0; chunk < f.chunks; ++chunk) suffix += f.dots[chunk * f.rows + row];
  for (int64_t first = last; first >= 0; first -= LANES) {
    const int64_t gate = first + lane;
    const bool in_use = gate < count;
    if (first < last) {
      draw(gate);
      weight = grad_logits[gate];
    }
    const float running = in_use && f.grad_running != nullptr ? f.grad_running[row * count + gate] : 0.0f;
    const float opened = in_use && f.grad_log_open != nullptr ? f.grad_log_open[row * count + gate] : 0.0f;
    float suffix_here = 0.0f, later_here = 0.0f;
#pragma unroll 4
    for (int k = lanes_in_use(count - first) - 1; k >= 0; --k) {
      suffix += of_lane(running, k);
      later += of_lane(opened, k);
      if (k == lane) {
        suffix_here = suffix;
        later_here = later;
      }
      suffix *= of_lane(sample.gate, k);
    }
    float grad = suffix_here * weight;
    if (f.grad_log_open != nullptr) grad += later_here * log_open_slope(f.gates.law, logit);
    if (in_use) grad_logits[gate] = grad;
  }
}

__global__ void __launch_bounds__(FINISH_THREADS) finish_backward(const Finish f) {
  __shared__ float sums[FINISH_WARPS][LANES];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % LANES, warp = thread / LANES;
  if (blockIdx.x < f.row_blocks) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * FINISH_WARPS + warp;
    if (row < f.rows) finish_row(f, row, lane);
    return;
  }
  const int64_t column = (blockIdx.x - f.row_blocks) * LANES + lane;
  float sum = 0.0f;
  if (column < f.columns)
#pragma unroll 8
    for (int64_t part = warp; part < f.parts; part += FINISH_WARPS) sum += f.partial[part * f.columns + column];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= f.columns) return;
#pragma unroll
  for (int w = 1; w < FINISH_WARPS; ++w) sum += sums[w][lane];
  f.grad_baseline[column] = sum;
}

// ---- launchers

int64_t ceil_divide(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <typename Parameters>
cudaError_t launch(
    void (*kernel)(Parameters), const Parameters& parameters, int64_t blocks, int64_t blocks_y, int threads,
    cudaStream_t stream) {
  if (blocks > std::numeric_limits<int32_t>::max() || blocks_y > 65535) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(blocks_y));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, parameters);
  const cudaError_t last = cudaGetLastError();
  return error != cudaSuccess ? error : last;
}

RowMajor row_major(const DeviceLayout& layout) {
  DeviceDim dims[4];
  int64_t baseline[4] = {layout.dims[1].size * layout.width, layout.width, 0, 0};
  int order[4] = {0, 1, 2, 3};
  std::copy(layout.dims, layout.dims + 4, dims);
  // A dim of size 1 moves nothing, wherever it stands.
  std::sort(order, order + 4, [&](int a, int b) { return dims[a].row > dims[b].row; });
  RowMajor rows;
  for (int d = 0; d < 4; ++d) rows.dims[d] = {dims[order[d]].size, dims[order[d]].states, baseline[order[d]]};
  return rows;
}

// Whether rows begin at multiples of 16 bytes, and end there.
bool is_aligned(const void* base, int64_t value_bytes, std::initializer_list<int64_t> strides) {
  bool aligned = reinterpret_cast<uintptr_t>(base) % 16 == 0;
  for (const int64_t stride : strides) aligned = aligned && stride * value_bytes % 16 == 0;
  return aligned;
}

int64_t value_bytes(DeviceDtype dtype) {
  return dtype == DeviceDtype::float32 ? 4 : 2;
}

// The instantiations: KERNEL<Access<dtype, wide>>.
#define FOR_DTYPE(KERNEL, dtype, wide)                                     \
  ((dtype) == DeviceDtype::float32        ? KERNEL<Access<Float32, wide>>  \
       : (dtype) == DeviceDtype::bfloat16 ? KERNEL<Access<BFloat16, wide>> \
                                          : KERNEL<Access<Float16, wide>>)
#define FOR_ACCESS(KERNEL, dtype, wide) ((wide) ? FOR_DTYPE(KERNEL, dtype, true) : FOR_DTYPE(KERNEL, dtype, false))

}  // namespace

cudaError_t launch_forward(
    DeviceDtype dtype, const DeviceLayout& layout, const DeviceGates& gates, const ForwardArrays& arrays,
    cudaStream_t stream) {
  const int64_t bytes = value_bytes(dtype);
  const auto* d = layout.dims;
  const bool wide = layout.width * bytes % 16 == 0 && is_aligned(arrays.baseline, 4, {}) &&
      is_aligned(arrays.mixed, bytes, {}) &&
      is_aligned(arrays.states, bytes, {d[0].states, d[1].states, d[2].states, d[3].states});
  const Forward forward{row_major(layout), layout.rows(), layout.width, gates, arrays};
  return launch(FOR_ACCESS(mix_forward, dtype, wide), forward, ceil_divide(layout.rows(), WARPS), 1, THREADS, stream);
}

cudaError_t launch_backward(
    DeviceDtype dtype, const DeviceLayout& layout, const DeviceGates& gates, const BackwardArrays& arrays,
    cudaStream_t stream) {
  const int64_t bytes = value_bytes(dtype), rows = layout.rows();
  const int64_t chunks = ceil_divide(layout.width, CHUNK_COLUMNS);
  const int64_t parts = ceil_divide(layout.members(), arrays.part_members);
  const bool with_mixed = arrays.grad_mixed != nullptr;
  const bool with_parts = with_mixed && arrays.grad_baseline != nullptr && parts > 1;
  if (with_mixed) {
    const auto* d = layout.dims;
    float* sums = with_parts ? arrays.partial : arrays.grad_baseline;
    const bool wide = layout.width * bytes % 16 == 0 && is_aligned(arrays.baseline, 4, {}) &&
        is_aligned(sums, 4, {}) && is_aligned(arrays.grad_states, bytes, {}) &&
        is_aligned(arrays.grad_mixed, bytes, {d[0].grad, d[1].grad, d[2].grad, d[3].grad}) &&
        is_aligned(arrays.states, bytes, {d[0].states, d[1].states, d[2].states, d[3].states});
    const Backward backward{layout, gates, arrays, sums};
    const cudaError_t error = launch(
        FOR_ACCESS(mix_backward, dtype, wide), backward, layout.groups() * parts, chunks, THREADS, stream);
    if (error != cudaSuccess) return error;
  }
  Finish finish{};
  finish.gates = gates;
  finish.rows = rows;
  finish.dots = with_mixed ? arrays.dots : nullptr;
  finish.chunks = chunks;
  finish.grad_running = arrays.grad_running;
  finish.grad_log_open = arrays.grad_log_open;
  finish.grad_logits = arrays.grad_logits;
  finish.row_blocks = ceil_divide(rows, FINISH_WARPS);
  finish.partial = arrays.partial;
  finish.grad_baseline = arrays.grad_baseline;
  finish.parts = parts;
  finish.columns = layout.groups() * layout.width;
  const int64_t sum_blocks = with_parts ? ceil_divide(finish.columns, LANES) : 0;
  return launch(finish_backward, finish, finish.row_blocks + sum_blocks, 1, FINISH_THREADS, stream);
}

cudaError_t find_kernel() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(finish_backward));
  cudaGetLastError();
  return error;
}

}  // namespace diffmask
