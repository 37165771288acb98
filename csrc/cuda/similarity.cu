// The ops on CUDA tensors: checks, the current stream, workspaces; kernels that join the parts of tiles; and those that
// read a float32 block of S which a matmul has stored, for the dtypes and devices that the tile kernels do not take.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "similarity_tiles.cuh"

namespace vlmo_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kBlock = 256;

__device__ __forceinline__ double wide_rescale(float top, float higher) {
  return top == minus_infinity() ? 1.0 : exp(double(top) - higher);  // see `rescale`
}

// Parts of tiles

__global__ void _similarity_join_rows_kernel(int rows, int tiles, const float* top, const float* total, double* lse) {
  const int row = blockIdx.x * kBlock + threadIdx.x;
  if (row >= rows) return;
  float high = minus_infinity();
  for (int tile = 0; tile < tiles; ++tile) high = fmaxf(high, top[int64_t(tile) * rows + row]);
  double sum = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    const int64_t at = int64_t(tile) * rows + row;
    sum += double(total[at]) * (top[at] == minus_infinity() ? 1.0 : exp2(double(top[at]) - high));
  }
  lse[row] = (finite_shift(high) + log2(sum)) * kLn2;
}

__global__ void _similarity_join_columns_kernel(int columns, int tiles, const float* top, const float* total,
                                                float* running_top, double* running_total) {
  const int column = blockIdx.x * kBlock + threadIdx.x;
  if (column >= columns) return;
  float high = running_top[column];
  double sum = running_total[column];
  for (int tile = 0; tile < tiles; ++tile) {
    const int64_t at = int64_t(tile) * columns + column;
    if (top[at] == minus_infinity()) {
      sum += total[at];  // 0 or NaN
      continue;
    }
    const double part_top = double(top[at]) * kLn2;  // in nats, like the running maximum
    const float higher = fmaxf(high, float(part_top));
    sum = sum * wide_rescale(high, higher) + double(total[at]) * exp(part_top - higher);
    high = higher;
  }
  running_top[column] = high;
  running_total[column] = sum;
}

// Blocks of S in memory, float32, logits in nats

__device__ void join_wide(float& top, double& total, float other_top, double other_total) {
  const float higher = fmaxf(top, other_top);
  total = total * wide_rescale(top, higher) + other_total * wide_rescale(other_top, higher);
  top = higher;
}

__device__ __forceinline__ float logit(const float* block, const Problem& p, int row, int column) {
  return counts(p, row, column) ? block[int64_t(row) * p.columns + column] : minus_infinity();
}

// A thread block for each row.
__global__ void _similarity_block_rows_kernel(const float* block, Problem p, double* lse) {
  __shared__ float tops[kBlock];
  __shared__ double totals[kBlock];
  const int row = blockIdx.x;
  float top = minus_infinity();
  for (int column = threadIdx.x; column < p.columns; column += kBlock) top = fmaxf(top, logit(block, p, row, column));
  const float shift = finite_shift(top);
  float total = 0;
  for (int column = threadIdx.x; column < p.columns; column += kBlock) {
    total += expf(logit(block, p, row, column) - shift);
  }
  tops[threadIdx.x] = top;
  totals[threadIdx.x] = total;
  __syncthreads();
  for (int half = kBlock / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      join_wide(tops[threadIdx.x], totals[threadIdx.x], tops[threadIdx.x + half], totals[threadIdx.x + half]);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) lse[row] = double(finite_shift(tops[0])) + log(totals[0]);
}

// 32 columns for each thread block, whose 8 warps take every eighth row.
__global__ void _similarity_block_columns_kernel(const float* block, Problem p, float* running_top, double* running_total) {
  __shared__ float tops[8][32];
  __shared__ double totals[8][32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, column = blockIdx.x * 32 + lane;
  float top = minus_infinity();
  float total = 0;
  if (column < p.columns) {
    for (int row = warp; row < p.rows; row += 8) top = fmaxf(top, logit(block, p, row, column));
    const float shift = finite_shift(top);
    for (int row = warp; row < p.rows; row += 8) total += expf(logit(block, p, row, column) - shift);
  }
  tops[warp][lane] = top;
  totals[warp][lane] = total;
  __syncthreads();
  if (warp == 0 && column < p.columns) {
    float high = running_top[column];
    double sum = running_total[column];
    for (int w = 0; w < 8; ++w) join_wide(high, sum, tops[w][lane], totals[w][lane]);
    running_top[column] = high;
    running_total[column] = sum;
  }
}

__global__ void _similarity_block_gradient_kernel(const float* block, Problem p, Gradient<float> gradient) {
  const int column = blockIdx.x * kBlock + threadIdx.x, row = blockIdx.y;
  if (column >= p.columns) return;
  const int64_t at = int64_t(row) * p.columns + column;
  const float s = block[at];
  const float of_row = gradient.row_weight[row] * expf(s - gradient.row_lse[row]);
  const float of_column = gradient.column_weight[column] * expf(s - gradient.column_lse[column]);
  gradient.out[at] = counts(p, row, column) ? of_row + of_column : 0.0f;
}

// Ops

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

template <class T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

void check_status(int status) {
  STD_TORCH_CHECK(status == cudaSuccess, "similarity: ", cudaGetErrorString(static_cast<cudaError_t>(status)));
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

int parts(int64_t size, int64_t part) { return static_cast<int>((size + part - 1) / part); }

Problem problem_of(int64_t rows, int64_t columns, const Tensor* logit_scale, const std::optional<Tensor>& row_ids,
                   const std::optional<Tensor>& column_ids, std::optional<int64_t> diagonal) {
  STD_TORCH_CHECK(rows > 0 && rows < (1 << 30) && columns > 0 && columns < (1 << 23) * int64_t(128) / 129,
                  "similarity: a block must have fewer than 2^30 rows and 8323580 columns, and not none, got ", rows, " and ",
                  columns);
  Problem p{static_cast<int>(rows), static_cast<int>(columns), nullptr, nullptr, nullptr, kNoDiagonal};
  if (logit_scale) {
    check(*logit_scale, "logit_scale", ScalarType::Float, 0);
    p.logit_scale = pointer<const float>(*logit_scale);
  }
  if (diagonal) p.diagonal = static_cast<int>(*diagonal);
  if (row_ids && column_ids) {
    check_vector(*row_ids, "row_ids", ScalarType::Long, rows);
    check_vector(*column_ids, "column_ids", ScalarType::Long, columns);
    p.row_ids = pointer<const int64_t>(*row_ids);
    p.column_ids = pointer<const int64_t>(*column_ids);
  }
  return p;
}

void check_operands(const Tensor& rows, const Tensor& columns, int64_t arch) {
  check(rows, "rows", columns.scalar_type(), 2);
  check(columns, "columns", rows.scalar_type(), 2);
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::BFloat16 || rows.scalar_type() == ScalarType::Half,
                  "similarity: rows must be of dtype BFloat16 or Half, got ", toString(rows.scalar_type()));
  STD_TORCH_CHECK(rows.size(1) == columns.size(1) && rows.size(1) % 8 == 0,
                  "similarity: rows and columns must be of the same width, a multiple of 8, got ", rows.size(1), " and ",
                  columns.size(1));
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(rows.data_ptr()) % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(columns.data_ptr()) % 16 == 0,
                  "similarity: rows and columns must be aligned to 16 bytes");
  int major = 0;
  check_status(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, rows.get_device_index()));
  STD_TORCH_CHECK(arch == 80 ? major >= 8 : (arch == 90 && major == 9),
                  "similarity: arch must be 80 (compute capability 8 or later) or 90 (9), got ", arch, " on ", major);
}

void similarity_tile_sums_(Tensor rows, Tensor columns, Tensor logit_scale, std::optional<Tensor> row_ids,
                           std::optional<Tensor> column_ids, std::optional<int64_t> diagonal, Tensor row_lse,
                           Tensor column_top, Tensor column_total, int64_t arch) {
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  check_operands(rows, columns, arch);
  const Problem p = problem_of(rows.size(0), columns.size(0), &logit_scale, row_ids, column_ids, diagonal);
  check_vector(row_lse, "row_lse", ScalarType::Double, p.rows);
  check_vector(column_top, "column_top", ScalarType::Float, p.columns);
  check_vector(column_total, "column_total", ScalarType::Double, p.columns);
  const int row_tiles = parts(p.rows, kTileM), column_tiles = parts(p.columns, kTileN);
  const int64_t of_rows = int64_t(column_tiles) * p.rows, of_columns = int64_t(row_tiles) * p.columns;
  const Tensor workspace = torch::stable::new_empty(logit_scale, {2 * (of_rows + of_columns)});
  float* part = pointer<float>(workspace);
  const Sums sums{part, part + of_rows, part + 2 * of_rows, part + 2 * of_rows + of_columns};
  const cudaStream_t stream = current_stream(rows);
  const int depth = static_cast<int>(rows.size(1));
  if (rows.scalar_type() == ScalarType::BFloat16) {
    const auto launch = arch == 90 ? launch_sums_sm90<__nv_bfloat16> : launch_sums_sm80<__nv_bfloat16>;
    check_status(launch(pointer<__nv_bfloat16>(rows), pointer<__nv_bfloat16>(columns), depth, p, sums, stream));
  } else {
    const auto launch = arch == 90 ? launch_sums_sm90<__half> : launch_sums_sm80<__half>;
    check_status(launch(pointer<__half>(rows), pointer<__half>(columns), depth, p, sums, stream));
  }
  _similarity_join_rows_kernel<<<parts(p.rows, kBlock), kBlock, 0, stream>>>(p.rows, column_tiles, sums.row_top,
                                                                             sums.row_total, pointer<double>(row_lse));
  check_status(cudaGetLastError());
  _similarity_join_columns_kernel<<<parts(p.columns, kBlock), kBlock, 0, stream>>>(
      p.columns, row_tiles, sums.column_top, sums.column_total, pointer<float>(column_top), pointer<double>(column_total));
  check_status(cudaGetLastError());
}

template <class T>
Gradient<T> gradient_of(const Tensor& out, const Problem& p, const Tensor& row_lse, const Tensor& row_weight,
                        const Tensor& column_lse, const Tensor& column_weight) {
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && out.size(0) == p.rows && out.size(1) == p.columns,
                  "similarity: out must be contiguous, (rows, columns)");
  check_vector(row_lse, "row_lse", ScalarType::Float, p.rows);
  check_vector(row_weight, "row_weight", ScalarType::Float, p.rows);
  check_vector(column_lse, "column_lse", ScalarType::Float, p.columns);
  check_vector(column_weight, "column_weight", ScalarType::Float, p.columns);
  return {pointer<T>(out), pointer<float>(row_lse), pointer<float>(row_weight), pointer<float>(column_lse),
          pointer<float>(column_weight)};
}

void similarity_tile_gradient_(Tensor rows, Tensor columns, Tensor logit_scale, Tensor out, std::optional<Tensor> row_ids,
                               std::optional<Tensor> column_ids, std::optional<int64_t> diagonal, Tensor row_lse,
                               Tensor row_weight, Tensor column_lse, Tensor column_weight, int64_t arch) {
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  check_operands(rows, columns, arch);
  check(out, "out", rows.scalar_type(), 2);
  const Problem p = problem_of(rows.size(0), columns.size(0), &logit_scale, row_ids, column_ids, diagonal);
  const cudaStream_t stream = current_stream(rows);
  const int depth = static_cast<int>(rows.size(1));
  if (rows.scalar_type() == ScalarType::BFloat16) {
    using Half = __nv_bfloat16;
    const auto gradient = gradient_of<Half>(out, p, row_lse, row_weight, column_lse, column_weight);
    const auto launch = arch == 90 ? launch_gradient_sm90<Half> : launch_gradient_sm80<Half>;
    check_status(launch(pointer<Half>(rows), pointer<Half>(columns), depth, p, gradient, stream));
  } else {
    const auto gradient = gradient_of<__half>(out, p, row_lse, row_weight, column_lse, column_weight);
    const auto launch = arch == 90 ? launch_gradient_sm90<__half> : launch_gradient_sm80<__half>;
    check_status(launch(pointer<__half>(rows), pointer<__half>(columns), depth, p, gradient, stream));
  }
}

void similarity_sums_(Tensor block, std::optional<Tensor> row_ids, std::optional<Tensor> column_ids,
                      std::optional<int64_t> diagonal, Tensor row_lse, Tensor column_top, Tensor column_total) {
  const torch::stable::accelerator::DeviceGuard guard(block.get_device_index());
  check(block, "block", ScalarType::Float, 2);
  const Problem p = problem_of(block.size(0), block.size(1), nullptr, row_ids, column_ids, diagonal);
  check_vector(row_lse, "row_lse", ScalarType::Double, p.rows);
  check_vector(column_top, "column_top", ScalarType::Float, p.columns);
  check_vector(column_total, "column_total", ScalarType::Double, p.columns);
  const cudaStream_t stream = current_stream(block);
  _similarity_block_rows_kernel<<<p.rows, kBlock, 0, stream>>>(pointer<float>(block), p, pointer<double>(row_lse));
  check_status(cudaGetLastError());
  _similarity_block_columns_kernel<<<parts(p.columns, 32), kBlock, 0, stream>>>(
      pointer<float>(block), p, pointer<float>(column_top), pointer<double>(column_total));
  check_status(cudaGetLastError());
}

void similarity_gradient_(Tensor block, Tensor out, std::optional<Tensor> row_ids, std::optional<Tensor> column_ids,
                          std::optional<int64_t> diagonal, Tensor row_lse, Tensor row_weight, Tensor column_lse,
                          Tensor column_weight) {
  const torch::stable::accelerator::DeviceGuard guard(block.get_device_index());
  check(block, "block", ScalarType::Float, 2);
  check(out, "out", ScalarType::Float, 2);
  const Problem p = problem_of(block.size(0), block.size(1), nullptr, row_ids, column_ids, diagonal);
  STD_TORCH_CHECK(p.rows < 65536, "similarity: block must have fewer than 65536 rows, got ", p.rows);
  const auto gradient = gradient_of<float>(out, p, row_lse, row_weight, column_lse, column_weight);
  const dim3 grid(parts(p.columns, kBlock), p.rows);
  _similarity_block_gradient_kernel<<<grid, kBlock, 0, current_stream(block)>>>(pointer<float>(block), p, gradient);
  check_status(cudaGetLastError());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlmo_fast, CUDA, m) {
  m.impl("similarity_sums_", TORCH_BOX(&similarity_sums_));
  m.impl("similarity_gradient_", TORCH_BOX(&similarity_gradient_));
  m.impl("similarity_tile_sums_", TORCH_BOX(&similarity_tile_sums_));
  m.impl("similarity_tile_gradient_", TORCH_BOX(&similarity_tile_gradient_));
}

}  // namespace vlmo_fast
