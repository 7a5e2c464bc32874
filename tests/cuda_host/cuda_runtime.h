// What CUDA's words mean on the host, so that a .cu file runs, as it is, on a machine without a GPU.
//
// Each thread of a block is a fiber; blocks run one after the other. A fiber runs until it waits for its warp or its
// block. The order in which fibers are taken up is CUDA_HOST_ORDER: "up", "down" or a number to shuffle by. A kernel
// that lacks a barrier gives another result in another order, and one whose threads wait for different things aborts.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// Kernels have internal linkage, so these lie together in a section that is poisoned before each block.
#define __shared__ static __attribute__((section("cuda_shared")))
#define threadIdx (cuda_host::current->index)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

inline dim3 blockIdx, blockDim, gridDim;

extern "C" unsigned char __start_cuda_shared[], __stop_cuda_shared[];

namespace cuda_host {

constexpr int LANES = 32;
constexpr size_t STACK = 256 * 1024;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "cuda_host: %s\n", message);
  std::abort();
}

enum class Waits { no, warp, block, done };

struct Fiber {
  dim3 index;
  ucontext_t context;
  std::vector<unsigned char> stack = std::vector<unsigned char>(STACK);
  Waits waits;
  unsigned shuffles;  // done so far; its parity says which slot the next one uses
  uint32_t slots[2];
  void* fake_stack = nullptr;
};

inline Fiber* current = nullptr;
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline void* scheduler_fake_stack = nullptr;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_size = 0;
inline const std::function<void()>* body = nullptr;

// AddressSanitizer has to be told when the stack changes.
inline void leave_for([[maybe_unused]] void** fake, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake, stack, size);
#endif
}
inline void arrive([[maybe_unused]] void* fake, [[maybe_unused]] bool from_scheduler) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  size_t size;
  __sanitizer_finish_switch_fiber(fake, &stack, &size);
  if (from_scheduler) {
    scheduler_stack = stack;
    scheduler_stack_size = size;
  }
#endif
}

inline void wait(Waits what) {
  Fiber* self = current;
  self->waits = what;
  leave_for(what == Waits::done ? nullptr : &self->fake_stack, scheduler_stack, scheduler_stack_size);
  swapcontext(&self->context, &scheduler);
  arrive(self->fake_stack, true);
}

inline void run_fiber() {
  arrive(nullptr, true);
  (*body)();
  wait(Waits::done);
}

inline void resume(Fiber& fiber) {
  current = &fiber;
  leave_for(&scheduler_fake_stack, fiber.stack.data(), STACK);
  swapcontext(&scheduler, &fiber.context);
  arrive(scheduler_fake_stack, false);
}

inline std::vector<size_t> order_of(size_t threads) {
  std::vector<size_t> order(threads);
  for (size_t i = 0; i < threads; ++i) order[i] = i;
  const char* asked = std::getenv("CUDA_HOST_ORDER");
  const std::string name = asked == nullptr ? "up" : asked;
  if (name == "down") std::reverse(order.begin(), order.end());
  else if (name != "up") std::shuffle(order.begin(), order.end(), std::mt19937(std::stoul(name)));
  return order;
}

// Lets go those who wait for a barrier that all of theirs have reached. Whether there were any.
inline bool release(size_t begin, size_t end, Waits what) {
  bool all = begin < end;
  for (size_t i = begin; i < end; ++i) all = all && fibers[i].waits == what;
  if (all)
    for (size_t i = begin; i < end; ++i) fibers[i].waits = Waits::no;
  return all;
}

inline void run_block(unsigned threads) {
  if (fibers.size() != threads) fibers = std::vector<Fiber>(threads);
  std::memset(__start_cuda_shared, 0xFF, __stop_cuda_shared - __start_cuda_shared);  // NaN
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.index = dim3(i, 0, 0);
    fiber.waits = Waits::no;
    fiber.shuffles = 0;
    fiber.fake_stack = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  const std::vector<size_t> order = order_of(threads);
  while (true) {
    for (const size_t i : order)
      if (fibers[i].waits == Waits::no) resume(fibers[i]);
    bool moved = release(0, threads, Waits::block), done = true;
    for (unsigned warp = 0; warp < threads; warp += LANES)
      moved = release(warp, std::min<size_t>(warp + LANES, threads), Waits::warp) || moved;
    for (const Fiber& fiber : fibers) done = done && fiber.waits == Waits::done;
    if (done) return;
    if (!moved) fail("threads wait for others that do not come");
  }
}

inline uint32_t shuffle(unsigned mask, uint32_t value, int lane) {
  if (mask != 0xFFFFFFFFu || lane < 0 || lane >= LANES) fail("shuffles are of whole warps");
  Fiber* self = current;
  const unsigned slot = self->shuffles++ % 2;
  self->slots[slot] = value;
  wait(Waits::warp);
  const Fiber& other = fibers[self->index.x / LANES * LANES + static_cast<unsigned>(lane)];
  // Who is a shuffle further has left this slot alone; who is two further can't be.
  return other.slots[slot];
}

}  // namespace cuda_host

inline void __syncthreads() {
  cuda_host::wait(cuda_host::Waits::block);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = cuda_host::shuffle(mask, bits, lane);
  std::memcpy(&value, &bits, 4);
  return value;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % cuda_host::LANES) ^ distance);
}

template <typename T>
void __stcg(T* to, T value) {
  *to = value;
}

// ---- the part of the runtime that launches

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

struct cudaFuncAttributes {};

inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t) {
  return "a launch of a wrong size";
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const std::function<void()> call = [&] { kernel(arguments...); };
  cuda_host::body = &call;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (unsigned y = 0; y < gridDim.y; ++y)
    for (unsigned x = 0; x < gridDim.x; ++x) {
      blockIdx = dim3(x, y, 0);
      cuda_host::run_block(blockDim.x);
    }
  cuda_host::body = nullptr;
  return cudaSuccess;
}
