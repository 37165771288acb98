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

constexpr double kWorkOfThread = 1 << 17;  // products for which another thread is worth its start

void check(const Tensor& tensor, const char* name, ScalarType dtype, int64_t dim) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "attention: ", name, " has another dtype than the kernel");
  STD_TORCH_CHECK(tensor.dim() == dim, "attention: ", name, " has another number of dimensions");
  const bool dense = dim == 0 || tensor.size(dim - 1) < 2 || tensor.stride(dim - 1) == 1;
  STD_TORCH_CHECK(dense, "attention: ", name, " must have its last dimension side by side");
}

Tokens tokens_of(const int32_t* row) {
  return {{{row[0], row[1], row[2]}, {row[3], row[4], row[5]}}, int64_t{row[1]} + row[4]};
}

// Two tables of the same sequences, (B, 2, 3): they were checked against rows and bias where the op was called.
std::vector<Sequence> sequences_of(const Tensor& queries, const Tensor& keys, const std::optional<Tensor>& mask) {
  for (const Tensor* table : {&queries, &keys}) {
    check(*table, "a table", ScalarType::Int, 3);
    STD_TORCH_CHECK(table->is_contiguous(), "attention: tables must be contiguous");
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

// The inputs, head by head.
struct Batch {
  Batch(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias, double scale)
      : query(query), key(key), value(value), bias(bias), scale(static_cast<float>(scale)) {
    check(query, "query", ScalarType::Float, 3);
    check(key, "key", ScalarType::Float, 3);
    check(value, "value", ScalarType::Float, 3);
    if (bias) check(*bias, "bias", ScalarType::Float, 3);
  }

  static Rows rows(const Tensor& tensor, int64_t head) {
    return {static_cast<const float*>(tensor.data_ptr()) + head * tensor.stride(1), tensor.stride(0)};
  }

  static MutableRows mutable_rows(const Tensor& tensor, int64_t head) {
    return {static_cast<float*>(tensor.data_ptr()) + head * tensor.stride(1), tensor.stride(0)};
  }

  Head head(int64_t h) const {
    Head head{rows(query, h), rows(key, h), rows(value, h), key.size(2), nullptr, 0, scale};
    if (bias) {
      head.bias = static_cast<const float*>(bias->data_ptr()) + h * bias->stride(0);
      head.pitch = bias->stride(1);
    }
    return head;
  }

  const Tensor& query;
  const Tensor& key;
  const Tensor& value;
  const std::optional<Tensor>& bias;
  float scale;
};

// (2, H, rows of the query), contiguous.
Stats stats_of(const Tensor& stats, int64_t head) {
  auto* data = static_cast<float*>(stats.data_ptr());
  return {data + stats.stride(1) * head, data + stats.stride(0) + stats.stride(1) * head};
}

int64_t grain_of(const std::vector<Sequence>& sequences, int64_t width, int64_t together) {
  double work = 1;
  for (const Sequence& s : sequences) work += 2.0 * s.queries.length * s.keys.length * width;
  return static_cast<int64_t>(kWorkOfThread * sequences.size() / work / together) + 1;
}

void forward(Tensor query, Tensor key, Tensor value, Tensor queries, Tensor keys, std::optional<Tensor> bias,
             std::optional<Tensor> key_mask, double scale, Tensor out, Tensor stats) {
  const Batch batch(query, key, value, bias, scale);
  check(out, "out", ScalarType::Float, 3);
  check(stats, "stats", ScalarType::Float, 3);
  const std::vector<Sequence> sequences = sequences_of(queries, keys, key_mask);
  const int64_t heads = key.size(1), width = key.size(2), longest = longest_of(sequences);
  const int64_t tasks = heads * static_cast<int64_t>(sequences.size());
  const Kernels& kernels = *capability().attention;
  torch::stable::parallel_for(0, tasks, grain_of(sequences, width, 1), [&](int64_t begin, int64_t end) {
    std::vector<float> room(kernels.room(longest, width));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t h = task % heads;
      kernels.forward(batch.head(h), sequences[task / heads], Batch::mutable_rows(out, h), stats_of(stats, h), room.data());
    }
  });
}

void backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor queries, Tensor keys,
              std::optional<Tensor> bias, std::optional<Tensor> key_mask, double scale, Tensor stats, Tensor d_query,
              Tensor d_key, Tensor d_value, std::optional<Tensor> d_bias) {
  const Batch batch(query, key, value, bias, scale);
  check(grad, "grad", ScalarType::Float, 3);
  check(stats, "stats", ScalarType::Float, 3);
  check(d_query, "d_query", ScalarType::Float, 3);
  check(d_key, "d_key", ScalarType::Float, 3);
  check(d_value, "d_value", ScalarType::Float, 3);
  if (d_bias) check(*d_bias, "d_bias", ScalarType::Float, 3);
  const std::vector<Sequence> sequences = sequences_of(queries, keys, key_mask);
  const int64_t heads = key.size(1), width = key.size(2), longest = longest_of(sequences);
  const Kernels& kernels = *capability().attention;
  const auto work = [&](int64_t h, const Sequence& sequence, float* room) {
    Gradients gradients{Batch::rows(grad, h), Batch::mutable_rows(d_query, h), Batch::mutable_rows(d_key, h),
                        Batch::mutable_rows(d_value, h), nullptr, 0};
    if (d_bias) {
      gradients.bias = static_cast<float*>(d_bias->data_ptr()) + h * d_bias->stride(0);
      gradients.pitch = d_bias->stride(1);
    }
    kernels.backward(batch.head(h), sequence, stats_of(stats, h), gradients, room);
  };
  // A head's gradient of the bias is the sum over the sequences in their order, so one thread adds it up.
  const int64_t number = static_cast<int64_t>(sequences.size()), together = d_bias ? std::max<int64_t>(number, 1) : 1;
  const int64_t tasks = heads * number / together;
  torch::stable::parallel_for(0, tasks, grain_of(sequences, width, together), [&](int64_t begin, int64_t end) {
    std::vector<float> room(kernels.room(longest, width));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / heads * together;
      for (int64_t s = first; s < first + together; ++s) work(task % heads, sequences[s], room.data());
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlmo_fast, CPU, m) {
  m.impl("attention_cpu_", TORCH_BOX(&forward));
  m.impl("attention_backward_cpu_", TORCH_BOX(&backward));
}

}  // namespace vlmo_fast::attention
