// The ops vlmo_fast::similarity_sums_ and vlmo_fast::similarity_gradient_ on a CPU: checks and threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "capability.h"

namespace vlmo_fast::similarity {
namespace {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

void check(const Tensor& tensor, const char* name, ScalarType dtype, int64_t dim) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "similarity: ", name, " must be of dtype ", toString(dtype), ", got ",
                  toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.dim() == dim, "similarity: ", name, " must have ", dim, " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.is_contiguous(), "similarity: ", name, " must be contiguous");
}

void check_vector(const Tensor& tensor, const char* name, ScalarType dtype, int64_t size) {
  check(tensor, name, dtype, 1);
  STD_TORCH_CHECK(tensor.size(0) == size, "similarity: ", name, " must have ", size, " elements, got ",
                  tensor.size(0));
}

Excluded excluded_of(const std::optional<Tensor>& row_ids, const std::optional<Tensor>& column_ids,
                     std::optional<int64_t> diagonal, int64_t rows, int64_t columns) {
  Excluded excluded{diagonal.value_or(Excluded::kNone), nullptr, nullptr};
  if (row_ids && column_ids) {
    check_vector(*row_ids, "row_ids", ScalarType::Long, rows);
    check_vector(*column_ids, "column_ids", ScalarType::Long, columns);
    excluded.row_ids = static_cast<const int64_t*>(row_ids->data_ptr());
    excluded.column_ids = static_cast<const int64_t*>(column_ids->data_ptr());
  }
  return excluded;
}

void similarity_sums_(Tensor block, std::optional<Tensor> row_ids, std::optional<Tensor> column_ids,
                      std::optional<int64_t> diagonal, Tensor row_lse, Tensor column_top, Tensor column_total) {
  check(block, "block", ScalarType::Float, 2);
  const int64_t rows = block.size(0), columns = block.size(1);
  check_vector(row_lse, "row_lse", ScalarType::Double, rows);
  check_vector(column_top, "column_top", ScalarType::Float, columns);
  check_vector(column_total, "column_total", ScalarType::Double, columns);
  const Excluded excluded = excluded_of(row_ids, column_ids, diagonal, rows, columns);
  auto* data = static_cast<float*>(block.data_ptr());
  auto* tops = static_cast<float*>(column_top.data_ptr());
  auto* totals = static_cast<double*>(column_total.data_ptr());
  auto* lse = static_cast<double*>(row_lse.data_ptr());
  const Kernels* kernels = capability().similarity;

  // A part for each panel, joined in their order: the result does not depend on the number of threads.
  const int64_t panels = (columns + kPanel - 1) / kPanel;
  std::vector<float> part_top(panels * rows);
  std::vector<double> part_total(panels * rows);
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanel, last = first + kPanel < columns ? first + kPanel : columns;
      kernels->sums(data, rows, columns, first, last, excluded, part_top.data() + panel * rows,
                    part_total.data() + panel * rows, tops, totals);
    }
  });
  torch::stable::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float top = -INFINITY;
      for (int64_t panel = 0; panel < panels; ++panel) top = std::fmax(top, part_top[panel * rows + i]);
      double total = 0;
      const double shift = top == -INFINITY ? 0.0 : top;
      for (int64_t panel = 0; panel < panels; ++panel) {
        const float part = part_top[panel * rows + i];
        total += part_total[panel * rows + i] * (part == -INFINITY ? 1.0 : std::exp(part - shift));
      }
      lse[i] = shift + std::log(total);
    }
  });
}

void similarity_gradient_(Tensor block, Tensor out, std::optional<Tensor> row_ids, std::optional<Tensor> column_ids,
                          std::optional<int64_t> diagonal, Tensor row_lse, Tensor row_weight, Tensor column_lse,
                          Tensor column_weight) {
  check(block, "block", ScalarType::Float, 2);
  check(out, "out", ScalarType::Float, 2);
  const int64_t rows = block.size(0), columns = block.size(1);
  STD_TORCH_CHECK(out.size(0) == rows && out.size(1) == columns, "similarity: out must have the shape of block");
  check_vector(row_lse, "row_lse", ScalarType::Float, rows);
  check_vector(row_weight, "row_weight", ScalarType::Float, rows);
  check_vector(column_lse, "column_lse", ScalarType::Float, columns);
  check_vector(column_weight, "column_weight", ScalarType::Float, columns);
  const Excluded excluded = excluded_of(row_ids, column_ids, diagonal, rows, columns);
  const auto* data = static_cast<const float*>(block.data_ptr());
  auto* result = static_cast<float*>(out.data_ptr());
  const auto vector = [](const Tensor& tensor) { return static_cast<const float*>(tensor.data_ptr()); };
  const Kernels* kernels = capability().similarity;
  torch::stable::parallel_for(0, rows, 4, [&](int64_t begin, int64_t end) {
    kernels->gradient(data, result, columns, begin, end, excluded, vector(row_lse), vector(row_weight),
                      vector(column_lse), vector(column_weight));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlmo_fast, CPU, m) {
  m.impl("similarity_sums_", TORCH_BOX(&similarity_sums_));
  m.impl("similarity_gradient_", TORCH_BOX(&similarity_gradient_));
}

}  // namespace vlmo_fast::similarity
