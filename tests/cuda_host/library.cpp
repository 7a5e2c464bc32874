// csrc/library_cuda.cpp for tensors of the CPU, with the kernels run on the host, and the stream's words as a kernel.
#define USE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

// From here on, in the one place where it stands by itself: the dispatch key.
#define CUDA CPU
#include "../../csrc/library_cuda.cpp"
#undef CUDA

// A CPU has no streams and nothing to switch to.
extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  return 0;
}
}

namespace {

struct Words {
  int64_t seed, offset, count;
  uint32_t* out;
};

__global__ void fill_words(const Words words) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < words.count)
    words.out[i] = diffmask::stream_word(
        static_cast<uint64_t>(words.seed), static_cast<uint64_t>(words.offset), static_cast<uint64_t>(i));
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void stream_words(
    int64_t seed, int64_t offset, int64_t count, int64_t threads, uint32_t* out) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((count + threads - 1) / threads));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  cudaLaunchKernelEx(&config, fill_words, Words{seed, offset, count, out});
}
