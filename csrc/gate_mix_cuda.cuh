// What the CUDA kernels are made of: how a thread reads and writes, where rows lie, how a warp draws gates.
#pragma once

#include <type_traits>

#include "gate_mix_cuda.h"
#include "half_types.h"

namespace diffmask {
namespace {

// ---- traits

constexpr int LANES = 32;
constexpr unsigned WHOLE_WARP = 0xFFFFFFFFu;
constexpr int THREADS = 128;  // of a block that mixes
constexpr int WARPS = THREADS / LANES;

// How a thread reads and writes states: 16 bytes at a time where everything is aligned to that, else one by one.
template <typename T_, bool wide>
struct Access {
  using T = T_;
  using Storage = typename T::Storage;
  static constexpr int SIZE = wide ? 16 / sizeof(Storage) : 1;
  static constexpr int COLUMNS = CHUNK_COLUMNS / THREADS;  // of a thread of mix_backward
  static constexpr int PARTS = COLUMNS / SIZE;             // and the accesses that these are
  static constexpr int BATCH = wide ? 4 / PARTS : 1;       // rows that mix_backward loads ahead, 128 bytes a thread
  static_assert(!wide || COLUMNS % SIZE == 0);

  // What one access moves. Two halves stay in one register until they are used: a compiler would give them one each.
  using Word = std::conditional_t<wide, uint32_t, Storage>;
  static constexpr int PER_WORD = sizeof(Word) / sizeof(Storage);
  struct alignas(SIZE * sizeof(Storage)) Values {
    Word words[SIZE / PER_WORD];

    __device__ __forceinline__ float get(int i) const {
      if constexpr (PER_WORD == 2) return T::load(static_cast<Storage>(words[i / 2] >> (i % 2 * 16)));
      else if constexpr (std::is_same_v<Word, Storage>) return T::load(words[i]);
      else return float_of(words[i]);
    }
    // In ascending order of i.
    __device__ __forceinline__ void set(int i, float value) {
      const Storage stored = T::store(value);
      if constexpr (PER_WORD == 2) words[i / 2] = i % 2 ? words[i / 2] | (uint32_t{stored} << 16) : uint32_t{stored};
      else if constexpr (std::is_same_v<Word, Storage>) words[i] = stored;
      else words[i] = bits_of(stored);
    }
  };

  static __device__ __forceinline__ Values load(const void* row, int64_t column) {
    return *reinterpret_cast<const Values*>(static_cast<const Storage*>(row) + column);
  }
  // By __stcg: a plain store behind a branch nvcc may take apart, or make a generic one. Stores skip the first-level
  // cache in any case.
  static __device__ __forceinline__ void store(void* row, int64_t column, const Values& values) {
    auto* to = static_cast<Storage*>(row) + column;
    const auto& words = values.words;
    if constexpr (wide) __stcg(reinterpret_cast<uint4*>(to), uint4{words[0], words[1], words[2], words[3]});
    else __stcg(to, words[0]);
  }

  // The same columns of a float32 array, in accesses of at most 16 bytes.
  static constexpr int FLOATS = wide ? 4 : 1;
  struct alignas(FLOATS * sizeof(float)) Floats {
    float value[FLOATS];
  };
  static __device__ __forceinline__ void load_floats(const float* from, float* to) {
#pragma unroll
    for (int i = 0; i < SIZE; i += FLOATS) {
      const Floats floats = *reinterpret_cast<const Floats*>(from + i);
#pragma unroll
      for (int j = 0; j < FLOATS; ++j) to[i + j] = floats.value[j];
    }
  }
  static __device__ __forceinline__ void store_floats(float* to, const float* from) {
#pragma unroll
    for (int i = 0; i < SIZE; i += FLOATS) {
      if constexpr (wide)
        __stcg(reinterpret_cast<float4*>(to + i), float4{from[i], from[i + 1], from[i + 2], from[i + 3]});
      else __stcg(to + i, from[i]);
    }
  }
};

// ---- places

// One step of turning a flat index into one index per dim. Most indices fit 32 bits, where a division is far cheaper.
__device__ __forceinline__ int64_t take_index(int64_t& flat, int64_t size) {
  if (size == 1) return 0;
  int64_t index;
  if (((flat | size) >> 32) == 0) {
    const uint32_t quotient = static_cast<uint32_t>(flat) / static_cast<uint32_t>(size);
    index = static_cast<uint32_t>(flat) - quotient * static_cast<uint32_t>(size);
    flat = quotient;
  } else {
    index = flat % size;
    flat /= size;
  }
  return index;
}

struct Place {
  int64_t row, states, grad;
};

__device__ __forceinline__ void move_along(Place& place, int64_t index, const DeviceDim& dim) {
  place.row += index * dim.row;
  place.states += index * dim.states;
  place.grad += index * dim.grad;
}

// ---- gates

// The gate of an element (its row-major index), from the contract of diffmask_fast/ops/philox.py. The lanes of a warp
// run in step, so each draws its own call: sharing one among the four elements it serves would spare no instruction.
__device__ __forceinline__ Sample draw_gate(const DeviceGates& gates, int64_t element, float logit) {
  const uint64_t seed = static_cast<uint64_t>(gates.seed[0]);
  const uint32_t word = stream_word(seed, static_cast<uint64_t>(gates.seed[1]), static_cast<uint64_t>(element));
  Sample sample = hard_concrete(gates.law, logistic_noise(word), logit);
  if (!is_finite(logit)) sample.gate = sample.slope = logit - logit;  // NaN
  return sample;
}

__device__ __forceinline__ float of_lane(float value, int lane) {
  return __shfl_sync(WHOLE_WARP, value, lane);
}

// The sum over the warp, in every lane.
__device__ __forceinline__ float sum_of_lanes(float value) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(WHOLE_WARP, value, distance);
  return value;
}

__device__ __forceinline__ int lanes_in_use(int64_t rest) {
  return rest < LANES ? static_cast<int>(rest) : LANES;
}

// The lanes of a warp draw the gates of a row, then multiply and add them up in the order of the C++ backend. Returns
// the product.
__device__ __forceinline__ float write_gates(
    const DeviceGates& gates, int64_t row, int lane, float* __restrict__ running, float* __restrict__ log_sums) {
  float product = 1.0f, sum = 0.0f;
  for (int64_t first = 0; first < gates.count; first += LANES) {
    const bool in_use = first + lane < gates.count;
    const int64_t element = row * gates.count + first + lane;
    const float logit = in_use ? gates.logits[element] : 0.0f;
    const float gate = draw_gate(gates, element, logit).gate;
    const float open = is_finite(logit) ? log_open(gates.law, logit) : logit - logit;
    float running_product = 0.0f, running_sum = 0.0f;
    const int count = lanes_in_use(gates.count - first);
#pragma unroll 4
    for (int k = 0; k < count; ++k) {
      product *= of_lane(gate, k);
      sum += of_lane(open, k);
      if (k == lane) {
        running_product = product;
        running_sum = sum;
      }
    }
    if (in_use) {
      running[element] = running_product;
      log_sums[element] = running_sum;
    }
  }
  return product;
}

}  // namespace
}  // namespace diffmask
