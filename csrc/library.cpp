// What PyTorch sees of the CPU backend: two operators on tensors that diffmask_fast/ops/cpu.py has allocated.
//
// Only the stable ABI is used (torch/csrc/stable, torch/headeronly), so one binary serves many versions of PyTorch.
//
// Work is cut into chunks whose size does not depend on the number of threads, and partial sums are added in the order
// of the chunks: any number of threads gives the same bits.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "gate_mix_cpu.h"

namespace diffmask {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t CHUNK_ROWS = 64;  // a multiple of 4, see gate_mix_cpu.h
constexpr int64_t BLOCK_GROUPS = 8;  // rows of the baseline's gradient that are gathered at a time
constexpr int64_t SUM_COLUMNS = 512;

int64_t ceil_divide(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <typename F>
void for_each_chunk(int64_t chunks, const F& f) {
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) f(chunk);
  });
}

// Calls f(begin, end) for chunks of consecutive rows.
template <typename F>
void for_each_rows(int64_t rows, const F& f) {
  for_each_chunk(ceil_divide(rows, CHUNK_ROWS), [&](int64_t chunk) {
    f(chunk * CHUNK_ROWS, std::min(rows, (chunk + 1) * CHUNK_ROWS));
  });
}

// ---- tensors as pointers

struct Dimension {
  int64_t size;
  int64_t row;         // how far a step along it moves in the row-major index of rows
  int64_t strides[2];  // how far it moves, in bytes, in each of two tensors
};

struct Place {
  int64_t row = 0;
  int64_t offsets[2] = {0, 0};
};

// Some of the leading dims of the states.
struct Rows {
  std::vector<Dimension> dims;
  int64_t count = 1;

  void append(const Dimension& dim) {
    dims.push_back(dim);
    count *= dim.size;
  }

  // The place of the row-major index.
  Place at(int64_t index) const {
    Place place;
    for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
      const int64_t step = index % dim->size;
      index /= dim->size;
      place.row += step * dim->row;
      place.offsets[0] += step * dim->strides[0];
      place.offsets[1] += step * dim->strides[1];
    }
    return place;
  }
};

int64_t element_size(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float ? 4 : 2;  // the others are bfloat16 and float16
}

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, "states must be float32, bfloat16 or float16");
  }
}

// Whether the baseline has one row for all of dim d of the states.
bool is_broadcast(const Tensor& states, const Tensor& baseline, int64_t d) {
  const int64_t missing = states.dim() - baseline.dim();
  return d < missing || baseline.size(d - missing) != states.size(d);
}

// How many rows a step along dim d moves in a contiguous tensor of the states' leading shape.
int64_t row_stride(const Tensor& states, int64_t d) {
  int64_t stride = 1;
  for (int64_t later = d + 1; later < states.dim() - 1; ++later) stride *= states.size(later);
  return stride;
}

const char* bytes(const Tensor& tensor) {
  return static_cast<const char*>(tensor.const_data_ptr());
}

const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

float* mutable_floats(const Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

const float* floats_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? floats(*tensor) : nullptr;
}

Gates gates_of(const Tensor& seed, const Tensor& logits, double temperature, double left, double right) {
  const auto* stream = static_cast<const int64_t*>(seed.const_data_ptr());
  Gates gates;
  gates.law = law_of(temperature, left, right);
  gates.seed = static_cast<uint64_t>(stream[0]);
  gates.offset = static_cast<uint64_t>(stream[1]);
  gates.count = logits.size(logits.dim() - 1);
  return gates;
}

// The public door is gate_mix in Python. These guard the memory of someone who calls the operators themselves.
void check_plain(const char* name, const Tensor& tensor, int64_t numel) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == numel,
      name, " must be contiguous float32 with ", numel, " elements");
}

void check_inputs(const Tensor& states, const Tensor& logits, const Tensor& baseline, const Tensor& seed) {
  const int64_t dims = states.dim();
  STD_TORCH_CHECK(dims >= 2 && logits.dim() == dims && baseline.dim() >= 1 && baseline.dim() <= dims, "wrong dims");
  STD_TORCH_CHECK(states.numel() > 0 && states.stride(dims - 1) == 1, "states must not be empty, last stride 1");
  for (int64_t d = 0; d < dims - 1; ++d)
    STD_TORCH_CHECK(logits.size(d) == states.size(d), "states and logits differ in dim ", d);
  const int64_t missing = dims - baseline.dim();
  for (int64_t d = missing; d < dims; ++d)
    STD_TORCH_CHECK(
        baseline.size(d - missing) == states.size(d) || (d < dims - 1 && baseline.size(d - missing) == 1),
        "the baseline does not broadcast in dim ", d);
  check_plain("logits", logits, logits.numel());
  check_plain("baseline", baseline, baseline.numel());
  STD_TORCH_CHECK(
      seed.scalar_type() == ScalarType::Long && seed.is_contiguous() && seed.numel() == 2, "seed must be int64 (2,)");
}

void check_like(const char* name, const Tensor& tensor, const Tensor& states) {
  bool same = tensor.scalar_type() == states.scalar_type() && tensor.dim() == states.dim();
  for (int64_t d = 0; same && d < states.dim(); ++d) same = tensor.size(d) == states.size(d);
  STD_TORCH_CHECK(same && tensor.stride(states.dim() - 1) == 1, name, " must be like states, last stride 1");
}

// ---- forward

// Fills mixed, gates and log_open. Returns the index of the first logit that is not finite, or -1.
int64_t gate_mix_forward(
    Tensor states, Tensor logits, Tensor baseline, Tensor seed, double temperature, double left, double right,
    Tensor mixed, Tensor gates_out, Tensor log_open) {
  check_inputs(states, logits, baseline, seed);
  check_like("mixed", mixed, states);
  STD_TORCH_CHECK(mixed.is_contiguous(), "mixed must be contiguous");
  check_plain("gates", gates_out, logits.numel());
  check_plain("log_open", log_open, logits.numel());

  const Gates gates = gates_of(seed, logits, temperature, left, right);
  const Dtype dtype = dtype_of(states);
  const int64_t width = states.size(states.dim() - 1);
  const int64_t row_bytes = width * element_size(states);
  const int64_t dims = states.dim() - 1;
  Rows rows;
  for (int64_t d = 0; d < dims; ++d) {
    const bool broadcast = is_broadcast(states, baseline, d);
    const int64_t baseline_stride = broadcast ? 0 : baseline.stride(d - (states.dim() - baseline.dim()));
    rows.append(
        {states.size(d), row_stride(states, d),
         {states.stride(d) * element_size(states), baseline_stride * element_size(baseline)}});
  }

  const float* logit = floats(logits);
  const char* state = bytes(states);
  const char* base = bytes(baseline);
  auto* out = static_cast<char*>(mixed.mutable_data_ptr());
  float* running = mutable_floats(gates_out);
  float* open = mutable_floats(log_open);
  constexpr int64_t none = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> first_bad{none};
  for_each_rows(rows.count, [&](int64_t begin, int64_t end) {
    const int64_t bad = gates_forward(gates, logit, begin, end, running, open);
    if (bad >= 0) {
      int64_t before = first_bad.load();
      while (bad < before && !first_bad.compare_exchange_weak(before, bad)) {
      }
      return;
    }
    for (int64_t row = begin; row < end; ++row) {
      const Place place = rows.at(row);
      const float z = running[(row + 1) * gates.count - 1];
      const auto* b = reinterpret_cast<const float*>(base + place.offsets[1]);
      mix_row(dtype, width, z, state + place.offsets[0], b, out + row * row_bytes);
    }
  });
  return first_bad == none ? -1 : first_bad.load();
}

// ---- backward

// The pass over the states: dots[row] = sum(grad * (state - baseline)), the gradient of the states row by row, and that
// of the baseline, whose every row gathers the rows it was broadcast to. Empty tensors stand for what is not wanted.
void backward_of_mix(
    const Tensor& grad_mixed, const Tensor& states, const Tensor& baseline, const float* products, float* dots,
    const Tensor& grad_states, const Tensor& grad_baseline) {
  const Dtype dtype = dtype_of(states);
  const int64_t width = states.size(states.dim() - 1);
  const int64_t row_bytes = width * element_size(states);
  // groups: the rows of the baseline. members: the rows of the states that share one.
  Rows groups, members;
  bool adjacent = false;  // whether neighbours in memory belong to different groups
  for (int64_t d = 0; d < states.dim() - 1; ++d) {
    const bool broadcast = is_broadcast(states, baseline, d);
    (broadcast ? members : groups)
        .append(
            {states.size(d), row_stride(states, d),
             {grad_mixed.stride(d) * element_size(states), states.stride(d) * element_size(states)}});
    if (states.size(d) > 1) adjacent = !broadcast;
  }
  const int64_t block = adjacent ? BLOCK_GROUPS : 1;
  const int64_t blocks = ceil_divide(groups.count, block);
  const int64_t parts = ceil_divide(members.count, CHUNK_ROWS);

  const bool with_baseline = grad_baseline.numel() > 0;
  float* sums = with_baseline ? mutable_floats(grad_baseline) : nullptr;
  std::unique_ptr<float[]> scratch;
  if (with_baseline && parts > 1) scratch.reset(new float[parts * groups.count * width]);
  float* partial = scratch ? scratch.get() : sums;

  auto* grad_state = grad_states.numel() > 0 ? static_cast<char*>(grad_states.mutable_data_ptr()) : nullptr;
  const char* grad = bytes(grad_mixed);
  const char* state = bytes(states);
  const float* base = floats(baseline);
  for_each_chunk(blocks * parts, [&](int64_t chunk) {
    const int64_t part = chunk / blocks, first_group = chunk % blocks * block;
    const int64_t last_group = std::min(first_group + block, groups.count);
    const int64_t first_member = part * CHUNK_ROWS;
    const int64_t last_member = std::min(first_member + CHUNK_ROWS, members.count);
    for (int64_t member = first_member; member < last_member; ++member) {
      const Place outer = members.at(member);
      for (int64_t group = first_group; group < last_group; ++group) {
        const Place inner = groups.at(group);
        const int64_t row = outer.row + inner.row;
        dots[row] = mix_row_backward(
            dtype, width, products[row], grad + outer.offsets[0] + inner.offsets[0],
            state + outer.offsets[1] + inner.offsets[1], base + group * width,
            with_baseline ? partial + (part * groups.count + group) * width : nullptr, member == first_member,
            grad_state == nullptr ? nullptr : grad_state + row * row_bytes);
      }
    }
  });
  if (!scratch) return;
  const int64_t size = groups.count * width;
  for_each_chunk(ceil_divide(size, SUM_COLUMNS), [&](int64_t chunk) {
    const int64_t column = chunk * SUM_COLUMNS;
    sum_parts(std::min(SUM_COLUMNS, size - column), parts, partial + column, size, sums + column);
  });
}

// Fills grad_logits, and grad_states and grad_baseline where they are not empty and there is a grad_mixed.
void gate_mix_backward(
    std::optional<Tensor> grad_mixed, std::optional<Tensor> grad_gates, std::optional<Tensor> grad_log_open,
    Tensor states, Tensor logits, Tensor baseline, Tensor seed, double temperature, double left, double right,
    Tensor grad_states, Tensor grad_logits, Tensor grad_baseline) {
  check_inputs(states, logits, baseline, seed);
  check_plain("grad_logits", grad_logits, logits.numel());
  if (grad_mixed.has_value()) check_like("grad_mixed", *grad_mixed, states);
  if (grad_gates.has_value()) check_plain("grad_gates", *grad_gates, logits.numel());
  if (grad_log_open.has_value()) check_plain("grad_log_open", *grad_log_open, logits.numel());
  if (grad_states.numel() > 0) check_like("grad_states", grad_states, states);
  STD_TORCH_CHECK(grad_states.is_contiguous(), "grad_states must be contiguous");
  if (grad_baseline.numel() > 0) check_plain("grad_baseline", grad_baseline, baseline.numel());

  const Gates gates = gates_of(seed, logits, temperature, left, right);
  const int64_t elements = logits.numel(), rows = elements / gates.count;
  const std::unique_ptr<float[]> scratch(new float[2 * elements + 2 * rows]);
  float* gate = scratch.get();
  float* slope = gate + elements;
  float* products = slope + elements;
  float* dots = products + rows;

  const float* logit = floats(logits);
  for_each_rows(rows, [&](int64_t begin, int64_t end) {
    gates_again(gates, logit, begin, end, gate, slope, products);
  });
  if (grad_mixed.has_value())
    backward_of_mix(*grad_mixed, states, baseline, products, dots, grad_states, grad_baseline);
  const float* grad_product = grad_mixed.has_value() ? dots : nullptr;
  const float* grad_running = floats_or_null(grad_gates);
  const float* grad_open = floats_or_null(grad_log_open);
  float* out = mutable_floats(grad_logits);
  for_each_rows(rows, [&](int64_t begin, int64_t end) {
    gates_backward(gates, logit, gate, slope, grad_product, grad_running, grad_open, begin, end, out);
  });
}

}  // namespace
}  // namespace diffmask

STABLE_TORCH_LIBRARY_FRAGMENT(diffmask_fast, m) {
  m.def(
      "gate_mix_forward_cpu(Tensor states, Tensor logits, Tensor baseline, Tensor seed, float temperature, float left, "
      "float right, Tensor(a!) mixed, Tensor(b!) gates, Tensor(c!) log_open) -> int");
  m.def(
      "gate_mix_backward_cpu(Tensor? grad_mixed, Tensor? grad_gates, Tensor? grad_log_open, Tensor states, "
      "Tensor logits, Tensor baseline, Tensor seed, float temperature, float left, float right, "
      "Tensor(a!) grad_states, Tensor(b!) grad_logits, Tensor(c!) grad_baseline) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(diffmask_fast, CPU, m) {
  m.impl("gate_mix_forward_cpu", TORCH_BOX(&diffmask::gate_mix_forward));
  m.impl("gate_mix_backward_cpu", TORCH_BOX(&diffmask::gate_mix_backward));
}
