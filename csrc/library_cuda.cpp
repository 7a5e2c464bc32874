// What PyTorch sees of the CUDA backend: two operators on tensors that diffmask_fast/ops/cuda.py has allocated.
//
// Only the stable ABI is used, as in library.cpp.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "gate_mix_cuda.h"

namespace diffmask {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Work goes to the tensors' device and to the stream that PyTorch uses there.
struct Place {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Place(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "a CUDA kernel of gate_mix was not launched: ", cudaGetErrorString(error));
}

DeviceDtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DeviceDtype::float32;
    case ScalarType::BFloat16: return DeviceDtype::bfloat16;
    case ScalarType::Half: return DeviceDtype::float16;
    default: STD_TORCH_CHECK(false, "states must be float32, bfloat16 or float16");
  }
}

const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

float* floats_to_fill(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<float*>(tensor.mutable_data_ptr());
}

const float* floats_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? floats(*tensor) : nullptr;
}

// The public door is gate_mix in Python. These guard the memory of someone who calls the operators themselves.
void check_floats(const char* name, const Tensor& tensor, const Tensor& states, int64_t numel) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == numel &&
          tensor.get_device_index() == states.get_device_index(),
      name, " must be contiguous float32 with ", numel, " elements, on the device of the states");
}

void check_like(const char* name, const Tensor& tensor, const Tensor& states) {
  bool same = tensor.scalar_type() == states.scalar_type() && tensor.dim() == states.dim() &&
      tensor.get_device_index() == states.get_device_index();
  for (int64_t d = 0; same && d < states.dim(); ++d) same = tensor.size(d) == states.size(d);
  STD_TORCH_CHECK(same && tensor.stride(states.dim() - 1) == 1, name, " must be like states, last stride 1");
}

// How far the last row of a tensor lies from the first: a layout that reaches as far stays inside.
int64_t reach_of(const Tensor& tensor) {
  int64_t reach = 0;
  for (int64_t d = 0; d < tensor.dim() - 1; ++d) reach += (tensor.size(d) - 1) * tensor.stride(d);
  return reach;
}

DeviceLayout layout_of(const std::vector<int64_t>& numbers, const Tensor& states, const Tensor* grad) {
  STD_TORCH_CHECK(numbers.size() == 16, "the layout must have 16 numbers");
  STD_TORCH_CHECK(states.dim() >= 2 && states.numel() > 0, "states must have two dims or more and not be empty");
  STD_TORCH_CHECK(states.stride(states.dim() - 1) == 1, "states must have last stride 1");
  DeviceLayout layout;
  layout.width = states.size(states.dim() - 1);
  int64_t reach[3] = {0, 0, 0};
  for (int d = 0; d < 4; ++d) {
    const int64_t* dim = numbers.data() + 4 * d;
    layout.dims[d] = {dim[0], dim[1], dim[2], dim[3]};
    for (int n = 0; n < 3; ++n) {
      STD_TORCH_CHECK(dim[0] > 0 && dim[n + 1] >= 0, "sizes in a layout are positive, strides not negative");
      reach[n] += (dim[0] - 1) * dim[n + 1];
    }
  }
  STD_TORCH_CHECK(
      layout.rows() * layout.width == states.numel() && reach[0] == layout.rows() - 1 &&
          reach[1] == reach_of(states) && (grad == nullptr || reach[2] == reach_of(*grad)),
      "the layout is not that of the tensors");
  return layout;
}

DeviceGates gates_of(
    const Tensor& seed, const Tensor& logits, const Tensor& states, const DeviceLayout& layout, double temperature,
    double left, double right) {
  STD_TORCH_CHECK(
      seed.scalar_type() == ScalarType::Long && seed.is_contiguous() && seed.numel() == 2 &&
          seed.get_device_index() == states.get_device_index(),
      "seed must be int64 (2,), on the device of the states");
  STD_TORCH_CHECK(logits.dim() >= 1 && logits.numel() > 0, "logits must not be empty");
  DeviceGates gates;
  gates.law = law_of(temperature, left, right);
  gates.count = logits.size(logits.dim() - 1);
  gates.seed = static_cast<const int64_t*>(seed.const_data_ptr());
  gates.logits = floats(logits);
  check_floats("logits", logits, states, layout.rows() * gates.count);
  return gates;
}

// Fills mixed, gates and log_open.
void gate_mix_forward(
    Tensor states, Tensor logits, Tensor baseline, Tensor seed, double temperature, double left, double right,
    std::vector<int64_t> numbers, Tensor mixed, Tensor gates_out, Tensor log_open) {
  const DeviceLayout layout = layout_of(numbers, states, nullptr);
  const DeviceGates gates = gates_of(seed, logits, states, layout, temperature, left, right);
  check_floats("baseline", baseline, states, layout.groups() * layout.width);
  check_like("mixed", mixed, states);
  STD_TORCH_CHECK(mixed.is_contiguous(), "mixed must be contiguous");
  check_floats("gates", gates_out, states, logits.numel());
  check_floats("log_open", log_open, states, logits.numel());

  const ForwardArrays arrays{
      states.const_data_ptr(), floats(baseline), mixed.mutable_data_ptr(), floats_to_fill(gates_out),
      floats_to_fill(log_open)};
  const Place place(states);
  check_launch(launch_forward(dtype_of(states), layout, gates, arrays, place.stream));
}

// Fills grad_logits, and grad_states and grad_baseline where they are not empty and there is a grad_mixed.
void gate_mix_backward(
    std::optional<Tensor> grad_mixed, std::optional<Tensor> grad_gates, std::optional<Tensor> grad_log_open,
    Tensor states, Tensor logits, Tensor baseline, Tensor seed, double temperature, double left, double right,
    std::vector<int64_t> numbers, int64_t part_members, Tensor dots, Tensor partial, Tensor grad_states,
    Tensor grad_logits, Tensor grad_baseline) {
  if (grad_mixed.has_value()) check_like("grad_mixed", *grad_mixed, states);
  const DeviceLayout layout = layout_of(numbers, states, grad_mixed.has_value() ? &*grad_mixed : nullptr);
  const DeviceGates gates = gates_of(seed, logits, states, layout, temperature, left, right);
  const int64_t rows = layout.rows(), sums = layout.groups() * layout.width;
  check_floats("baseline", baseline, states, sums);
  check_floats("grad_logits", grad_logits, states, logits.numel());
  if (grad_gates.has_value()) check_floats("grad_gates", *grad_gates, states, logits.numel());
  if (grad_log_open.has_value()) check_floats("grad_log_open", *grad_log_open, states, logits.numel());
  if (grad_states.numel() > 0) check_like("grad_states", grad_states, states);
  STD_TORCH_CHECK(grad_states.is_contiguous(), "grad_states must be contiguous");
  const bool with_baseline = grad_baseline.numel() > 0;
  if (with_baseline) check_floats("grad_baseline", grad_baseline, states, sums);
  STD_TORCH_CHECK(part_members > 0, "part_members must be positive");
  const int64_t parts = (layout.members() - 1) / part_members + 1;
  const int64_t chunks = (layout.width - 1) / CHUNK_COLUMNS + 1;
  check_floats("dots", dots, states, grad_mixed.has_value() ? chunks * rows : 0);
  check_floats("partial", partial, states, grad_mixed.has_value() && with_baseline && parts > 1 ? parts * sums : 0);

  BackwardArrays arrays{};
  arrays.grad_mixed = grad_mixed.has_value() ? grad_mixed->const_data_ptr() : nullptr;
  arrays.grad_running = floats_or_null(grad_gates);
  arrays.grad_log_open = floats_or_null(grad_log_open);
  arrays.states = states.const_data_ptr();
  arrays.baseline = floats(baseline);
  arrays.grad_states = grad_states.numel() > 0 ? grad_states.mutable_data_ptr() : nullptr;
  arrays.grad_logits = floats_to_fill(grad_logits);
  arrays.grad_baseline = floats_to_fill(grad_baseline);
  arrays.part_members = part_members;
  arrays.dots = floats_to_fill(dots);
  arrays.partial = floats_to_fill(partial);
  const Place place(states);
  check_launch(launch_backward(dtype_of(states), layout, gates, arrays, place.stream));
}

// 0 where this library has code for the current device, else CUDA's number for what is wrong.
int64_t gate_mix_cuda_error() {
  return static_cast<int64_t>(find_kernel());
}

}  // namespace
}  // namespace diffmask

STABLE_TORCH_LIBRARY_FRAGMENT(diffmask_fast, m) {
  m.def(
      "gate_mix_forward_cuda(Tensor states, Tensor logits, Tensor baseline, Tensor seed, float temperature, "
      "float left, float right, int[] layout, Tensor(a!) mixed, Tensor(b!) gates, Tensor(c!) log_open) -> ()");
  m.def(
      "gate_mix_backward_cuda(Tensor? grad_mixed, Tensor? grad_gates, Tensor? grad_log_open, Tensor states, "
      "Tensor logits, Tensor baseline, Tensor seed, float temperature, float left, float right, int[] layout, "
      "int part_members, Tensor(a!) dots, Tensor(b!) partial, Tensor(c!) grad_states, Tensor(d!) grad_logits, "
      "Tensor(e!) grad_baseline) -> ()");
  m.def("gate_mix_cuda_error() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(diffmask_fast, CUDA, m) {
  m.impl("gate_mix_forward_cuda", TORCH_BOX(&diffmask::gate_mix_forward));
  m.impl("gate_mix_backward_cuda", TORCH_BOX(&diffmask::gate_mix_backward));
}

STABLE_TORCH_LIBRARY_IMPL(diffmask_fast, CompositeExplicitAutograd, m) {
  m.impl("gate_mix_cuda_error", TORCH_BOX(&diffmask::gate_mix_cuda_error));
}
