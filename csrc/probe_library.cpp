// What PyTorch sees of the probe's CPU backend: operators on tensors that diffmask_fast/ops/probe_cpu.py has allocated.
//
// As in library.cpp: the stable ABI alone, and chunks of work whose size does not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "probe_cpu.h"

namespace diffmask {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t CHUNK_ROWS = 64;
constexpr int64_t BLOCK_COLUMNS = 64;

// Calls f(begin, end) for chunks of [0, size).
template <typename F>
void for_each_chunk(int64_t size, int64_t chunk, const F& f) {
  torch::stable::parallel_for(0, (size + chunk - 1) / chunk, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i * chunk, std::min(size, (i + 1) * chunk));
  });
}

template <typename T>
const T* values(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_values(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// The public door is probe_logits in Python. These guard the memory of someone who calls the operators themselves.
void check_plain(const char* name, const Tensor& tensor, int64_t numel, ScalarType dtype = ScalarType::Float) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == numel, name,
      " must be contiguous, ", dtype == ScalarType::Float ? "float32" : "int64", ", with ", numel, " elements");
}

void check_index(const Tensor& index, int64_t count, int64_t rows) {
  check_plain("index", index, count, ScalarType::Long);
  const auto* place = values<int64_t>(index);
  STD_TORCH_CHECK(
      std::all_of(place, place + count, [&](int64_t i) { return i >= 0 && i < rows; }), "index is out of range");
}

// hidden (n, W) holds the product of features and first weight, or, with left (U, W), what is missing from
// left[index]; it becomes the hidden values. Fills raw (n,) and logits (n,), of any stride.
void probe_epilogue(
    Tensor hidden, std::optional<Tensor> left, std::optional<Tensor> index, Tensor scale, Tensor bias, Tensor outer,
    Tensor offset, double bound, Tensor raw, Tensor logits) {
  STD_TORCH_CHECK(hidden.dim() == 2 && logits.dim() == 1, "wrong dims");
  const int64_t count = hidden.size(0), width = hidden.size(1);
  check_plain("hidden", hidden, count * width);
  check_plain("scale", scale, width);
  check_plain("bias", bias, width);
  check_plain("outer", outer, width);
  check_plain("offset", offset, 1);
  check_plain("raw", raw, count);
  STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float && logits.size(0) == count, "logits must be like raw");
  STD_TORCH_CHECK(left.has_value() == index.has_value(), "left and index come together");
  if (left.has_value()) {
    STD_TORCH_CHECK(left->dim() == 2, "wrong dims");
    check_plain("left", *left, left->size(0) * width);
    check_index(*index, count, left->size(0));
  }
  const Epilogue head{width,
                      values<float>(scale),
                      values<float>(bias),
                      values<float>(outer),
                      *values<float>(offset),
                      static_cast<float>(bound)};
  auto* rows = mutable_values<float>(hidden);
  auto* raws = mutable_values<float>(raw);
  auto* out = mutable_values<float>(logits);
  const float* lefts = left.has_value() ? values<float>(*left) : nullptr;
  const int64_t* places = left.has_value() ? values<int64_t>(*index) : nullptr;
  const int64_t step = logits.stride(0);
  for_each_chunk(count, CHUNK_ROWS, [&](int64_t begin, int64_t end) {
    probe_rows(
        head, end - begin, rows + begin * width, lefts, places == nullptr ? nullptr : places + begin, raws + begin,
        out + begin * step, step);
  });
}

// From grad (n,), that of raw, and hidden (n, W): fills inside (n, W), the gradient before tanh, and adds to sums (2, W)
// those of the bias and of the second weight.
void probe_epilogue_backward(Tensor grad, Tensor hidden, Tensor outer, Tensor inside, Tensor sums) {
  STD_TORCH_CHECK(hidden.dim() == 2, "wrong dims");
  const int64_t count = hidden.size(0), width = hidden.size(1);
  check_plain("grad", grad, count);
  check_plain("hidden", hidden, count * width);
  check_plain("outer", outer, width);
  check_plain("inside", inside, count * width);
  check_plain("sums", sums, 2 * width);
  const auto* g = values<float>(grad);
  const auto* rows = values<float>(hidden);
  const auto* weight = values<float>(outer);
  auto* out = mutable_values<float>(inside);
  const int64_t parts = (count + CHUNK_ROWS - 1) / CHUNK_ROWS;
  std::vector<float> partial(parts * 2 * width);
  for_each_chunk(count, CHUNK_ROWS, [&](int64_t begin, int64_t end) {
    probe_rows_backward(
        width, weight, end - begin, g + begin, rows + begin * width, out + begin * width,
        partial.data() + begin / CHUNK_ROWS * 2 * width);
  });
  auto* total = mutable_values<float>(sums);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t i = 0; i < 2 * width; ++i) total[i] += partial[part * 2 * width + i];
}

// into[index[row]] += from[row]; threads share out the columns, so rows are added in their order.
void probe_scatter_add(Tensor from, Tensor index, Tensor into) {
  STD_TORCH_CHECK(from.dim() == 2 && into.dim() == 2, "wrong dims");
  const int64_t count = from.size(0), width = from.size(1);
  check_plain("from", from, count * width);
  check_plain("into", into, into.size(0) * width);
  check_index(index, count, into.size(0));
  for_each_chunk(width, BLOCK_COLUMNS, [&](int64_t begin, int64_t end) {
    scatter_add(
        width, begin, end, count, values<float>(from), values<int64_t>(index), mutable_values<float>(into));
  });
}

uint64_t hash_row(const char* row, int64_t bytes) {
  uint64_t lanes[4] = {1, 2, 3, 4};
  for (int64_t i = 0; i < bytes; i += 32) {
    uint64_t words[4] = {};
    memcpy(words, row + i, std::min<int64_t>(32, bytes - i));
    for (int lane = 0; lane < 4; ++lane) {
      lanes[lane] = (lanes[lane] ^ words[lane]) * 0x9E3779B97F4A7C15u;
      lanes[lane] ^= lanes[lane] >> 29;
    }
  }
  return (lanes[0] * 3 + lanes[1]) * 0xBF58476D1CE4E5B9u + lanes[2] * 5 + lanes[3];
}

// For x (R, H): fills index (R,) with the number of each row among the distinct ones, rows that are equal bit for bit
// having one number, and first (R,) with the row where each number comes first. Returns how many are distinct.
int64_t probe_distinct_rows(Tensor x, Tensor index, Tensor first) {
  STD_TORCH_CHECK(x.dim() == 2 && x.stride(1) == 1, "x must be a matrix whose last stride is 1");
  const int64_t count = x.size(0);
  check_plain("index", index, count, ScalarType::Long);
  check_plain("first", first, count, ScalarType::Long);
  const int64_t element = x.scalar_type() == ScalarType::Float ? 4 : 2;
  STD_TORCH_CHECK(
      element == 4 || x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half,
      "x must be float32, bfloat16 or float16");
  const int64_t bytes = x.size(1) * element, step = x.stride(0) * element;
  const auto* rows = static_cast<const char*>(x.const_data_ptr());
  std::vector<uint64_t> hashes(count);
  for_each_chunk(count, CHUNK_ROWS, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) hashes[row] = hash_row(rows + row * step, bytes);
  });
  uint64_t slots = 2;
  while (slots < 2 * static_cast<uint64_t>(count)) slots *= 2;
  std::vector<int64_t> table(slots, -1);  // numbers of distinct rows
  auto* number = mutable_values<int64_t>(index);
  auto* firsts = mutable_values<int64_t>(first);
  int64_t distinct = 0;
  for (int64_t row = 0; row < count; ++row) {
    uint64_t slot = (hashes[row] ^ hashes[row] >> 32) & (slots - 1);
    for (;; slot = (slot + 1) & (slots - 1)) {
      const int64_t known = table[slot];
      if (known < 0) {
        firsts[distinct] = row;
        table[slot] = distinct++;
        break;
      }
      const int64_t other = firsts[known];
      if (hashes[other] == hashes[row] && memcmp(rows + other * step, rows + row * step, bytes) == 0) break;
    }
    number[row] = table[slot];
  }
  return distinct;
}

}  // namespace
}  // namespace diffmask

STABLE_TORCH_LIBRARY_FRAGMENT(diffmask_fast, m) {
  m.def(
      "probe_epilogue_cpu(Tensor(a!) hidden, Tensor? left, Tensor? index, Tensor scale, Tensor bias, Tensor outer, "
      "Tensor offset, float bound, Tensor(b!) raw, Tensor(c!) logits) -> ()");
  m.def(
      "probe_epilogue_backward_cpu(Tensor grad, Tensor hidden, Tensor outer, Tensor(a!) inside, Tensor(b!) sums) "
      "-> ()");
  m.def("probe_scatter_add_cpu(Tensor rows, Tensor index, Tensor(a!) into) -> ()");
  m.def("probe_distinct_rows_cpu(Tensor x, Tensor(a!) index, Tensor(b!) first) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(diffmask_fast, CPU, m) {
  m.impl("probe_epilogue_cpu", TORCH_BOX(&diffmask::probe_epilogue));
  m.impl("probe_epilogue_backward_cpu", TORCH_BOX(&diffmask::probe_epilogue_backward));
  m.impl("probe_scatter_add_cpu", TORCH_BOX(&diffmask::probe_scatter_add));
  m.impl("probe_distinct_rows_cpu", TORCH_BOX(&diffmask::probe_distinct_rows));
}
