// The ops vlmo_fast::attention_cpu_ and vlmo_fast::attention_backward_cpu_: checks and threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "capability.h"

namespace vlmo_fast::attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kWorkOfThread = 1 << 17;  // multiplications below which starting another thread does not pay

void check(const Tensor& tensor, const char* name, ScalarType dtype, int64_t dim) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "attention: ", name, " must be of dtype ", toString(dtype), ", got ",
                  toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.dim() == dim, "attention: ", name, " must have ", dim, " dimensions, got ", tensor.dim());
  const bool dense = dim == 0 || tensor.size(dim - 1) < 2 || tensor.stride(dim - 1) == 1;
  STD_TORCH_CHECK(dense, "attention: ", name, " must have a contiguous last dimension");
}

Tokens tokens_of(const int32_t* row) {
  return {{{row[0], row[1], row[2]}, {row[3], row[4], row[5]}}, int64_t{row[1]} + row[4]};
}

// Two tables of the same sequences, (B, 2, 3): they were checked against rows and bias where the op was called.
std::vector<Sequence> sequences_of(const Tensor& queries, const Tensor& keys, const std::optional<Tensor>& mask) {
  for (const Tensor* table : {&queries, &keys}) {
    check(*table, "segments", ScalarType::Int, 3);
    STD_TORCH_CHECK(table->is_contiguous(), "attention: segments must be contiguous");
  }
  if (mask) {
    check(*mask, "key_mask", ScalarType::Bool, 2);
    STD_TORCH_CHECK(mask->is_contiguous(), "attention: key_mask must be contiguous");
  }
  const auto* of_queries = static_cast<const int32_t*>(queries.data_ptr());
  const auto* of_keys = static_cast<const int32_t*>(keys.data_ptr());
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < queries.size(0); ++b) {
    const bool* visible = mask ? static_cast<const bool*>(mask->data_ptr()) + b * mask->size(1) : nullptr;
    sequences.push_back({tokens_of(of_queries + 6 * b), tokens_of(of_keys + 6 * b), visible});
  }
  return sequences;
}

int64_t longest_of(const std::vector<Sequence>& sequences) {
  int64_t longest = 0;
  for (const Sequence& sequence : sequences) longest = std::max(longest, sequence.keys.length);
  return longest;
}

// A tensor (rows, H, d) or (H, rows, d), as its heads. Made before threads start: data_ptr() may copy a lazy clone.
struct Heads {
  float* data = nullptr;
  int64_t head = 0, row = 0;  // strides

  const float* begin(int64_t h) const { return data ? data + h * head : nullptr; }
  Rows rows(int64_t h) const { return {data + h * head, row}; }
  MutableRows mutable_rows(int64_t h) const { return {data + h * head, row}; }
};

Heads rows_of(const Tensor& tensor, const char* name) {
  check(tensor, name, ScalarType::Float, 3);
  return {static_cast<float*>(tensor.data_ptr()), tensor.stride(1), tensor.stride(0)};
}

Heads bias_of(const std::optional<Tensor>& tensor, const char* name) {
  if (!tensor) return {};
  check(*tensor, name, ScalarType::Float, 3);
  return {static_cast<float*>(tensor->data_ptr()), tensor->stride(0), tensor->stride(1)};
}

struct Inputs {
  Heads query, key, value, bias;
  int64_t width;
  float scale;

  Head head(int64_t h) const {
    return {query.rows(h), key.rows(h), value.rows(h), width, bias.begin(h), bias.row, scale};
  }
};

// (2, H, rows of the query), contiguous.
struct AllStats {
  explicit AllStats(const Tensor& tensor)
      : data(static_cast<float*>(tensor.data_ptr())), part(tensor.stride(0)), head(tensor.stride(1)) {
    check(tensor, "stats", ScalarType::Float, 3);
  }

  Stats of(int64_t h) const { return {data + h * head, data + part + h * head}; }

  float* data;
  int64_t part, head;
};

int64_t grain_of(const std::vector<Sequence>& sequences, int64_t width, int64_t together) {
  double work = 1;
  for (const Sequence& s : sequences) work += 2.0 * s.queries.length * s.keys.length * width;
  return static_cast<int64_t>(kWorkOfThread * sequences.size() / work / together) + 1;
}

void forward(Tensor query, Tensor key, Tensor value, Tensor queries, Tensor keys, std::optional<Tensor> bias,
             std::optional<Tensor> key_mask, double scale, Tensor out, Tensor stats) {
  const int64_t heads = key.size(1), width = key.size(2);
  const Inputs inputs{rows_of(query, "query"), rows_of(key, "key"), rows_of(value, "value"), bias_of(bias, "bias"), width,
                      static_cast<float>(scale)};
  const Heads results = rows_of(out, "out");
  const AllStats all_stats(stats);
  const std::vector<Sequence> sequences = sequences_of(queries, keys, key_mask);
  const int64_t longest = longest_of(sequences), tasks = heads * static_cast<int64_t>(sequences.size());
  const Kernels& kernels = *capability().attention;
  torch::stable::parallel_for(0, tasks, grain_of(sequences, width, 1), [&](int64_t begin, int64_t end) {
    std::vector<float> room(kernels.room(longest, width));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t h = task % heads;
      kernels.forward(inputs.head(h), sequences[task / heads], results.mutable_rows(h), all_stats.of(h), room.data());
    }
  });
}

void backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor queries, Tensor keys,
              std::optional<Tensor> bias, std::optional<Tensor> key_mask, double scale, Tensor stats, Tensor d_query,
              Tensor d_key, Tensor d_value, std::optional<Tensor> d_bias) {
  const int64_t heads = key.size(1), width = key.size(2);
  const Inputs inputs{rows_of(query, "query"), rows_of(key, "key"), rows_of(value, "value"), bias_of(bias, "bias"), width,
                      static_cast<float>(scale)};
  const Heads grads = rows_of(grad, "grad"), of_query = rows_of(d_query, "d_query"), of_key = rows_of(d_key, "d_key"),
              of_value = rows_of(d_value, "d_value"), of_bias = bias_of(d_bias, "d_bias");
  const AllStats all_stats(stats);
  const std::vector<Sequence> sequences = sequences_of(queries, keys, key_mask);
  const int64_t longest = longest_of(sequences);
  const Kernels& kernels = *capability().attention;
  // A head's gradient of the bias is the sum over the sequences in their order, so one thread adds it up.
  const int64_t number = static_cast<int64_t>(sequences.size()), together = d_bias ? std::max<int64_t>(number, 1) : 1;
  const int64_t tasks = heads * number / together;
  torch::stable::parallel_for(0, tasks, grain_of(sequences, width, together), [&](int64_t begin, int64_t end) {
    std::vector<float> room(kernels.room(longest, width));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t h = task % heads, first = task / heads * together;
      const Gradients gradients{grads.rows(h),
                                of_query.mutable_rows(h),
                                of_key.mutable_rows(h),
                                of_value.mutable_rows(h),
                                of_bias.data ? of_bias.data + h * of_bias.head : nullptr,
                                of_bias.row};
      for (int64_t s = first; s < first + together; ++s) {
        kernels.backward(inputs.head(h), sequences[s], all_stats.of(h), gradients, room.data());
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlmo_fast, CPU, m) {
  m.impl("attention_cpu_", TORCH_BOX(&forward));
  m.impl("attention_backward_cpu_", TORCH_BOX(&backward));
}

}  // namespace vlmo_fast::attention
