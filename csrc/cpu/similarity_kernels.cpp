// Between the matmuls: row and column sums of exp(S), and the gradient of the log-sum-exps, in one sweep over a block.
//
// Compiled for each instruction set with VLMO_FAST_KERNELS naming the table; the loops are plain, the compiler vectorises.
// Each sum has a shift of its own, so none under- or overflows; a NaN or an infinity in S gives a NaN.

#include "similarity_kernels.h"

#include "fast_exp.h"

extern "C" double exp(double);  // not <cmath>, whose inline functions would be compiled for this instruction set

namespace vlmo_fast::similarity {
namespace {

constexpr int64_t kTile = 128;  // rows
constexpr float kInfinity = __builtin_inff();

inline float finite_shift(float top) { return top == -kInfinity ? 0.0f : top; }

// The (maximum, sum) of one part of a column joins that of the parts before.
inline void join(float part_top, double part_total, float& top, double& total) {
  if (part_top > top) {
    total = total * exp(static_cast<double>(top) - part_top) + part_total;  // exp(-inf) is 0
    top = part_top;
  } else {  // without a maximum the part is 0 (or NaN): a shift in its place could give 0 * infinity
    total += part_top == -kInfinity ? part_total : part_total * exp(static_cast<double>(part_top) - top);
  }
}

void sums(float* block, int64_t rows, int64_t columns, int64_t begin, int64_t end, Excluded excluded, float* row_top,
          double* row_total, float* column_top, double* column_total) {
  const int64_t width = end - begin;  // at most kPanel
  float tops[kPanel], totals[kPanel];  // of the columns in a tile
  for (int64_t first = 0; first < rows; first += kTile) {
    const int64_t last = first + kTile < rows ? first + kTile : rows;
    for (int64_t j = 0; j < width; ++j) tops[j] = -kInfinity;
    for (int64_t i = first; i < last; ++i) {
      float* row = block + i * columns + begin;
      if (excluded.row_ids) {
        const int64_t id = excluded.row_ids[i];
        const int64_t* ids = excluded.column_ids + begin;
        for (int64_t j = 0; j < width; ++j) row[j] = ids[j] == id ? -kInfinity : row[j];
      }
      if (excluded.diagonal != Excluded::kNone) {
        const int64_t j = i + excluded.diagonal - begin;
        if (j >= 0 && j < width) row[j] = -kInfinity;
      }
      float top = -kInfinity;
#pragma omp simd reduction(max : top)
      for (int64_t j = 0; j < width; ++j) {
        top = row[j] > top ? row[j] : top;
        tops[j] = row[j] > tops[j] ? row[j] : tops[j];
      }
      row_top[i] = top;
    }
    for (int64_t j = 0; j < width; ++j) {
      totals[j] = 0.0f;
      tops[j] = finite_shift(tops[j]);
    }
    for (int64_t i = first; i < last; ++i) {
      const float* row = block + i * columns + begin;
      const float top = finite_shift(row_top[i]);
      float total = 0.0f;
#pragma omp simd reduction(+ : total)
      for (int64_t j = 0; j < width; ++j) {
        total += exp_fast(row[j] - top);
        totals[j] += exp_fast(row[j] - tops[j]);
      }
      row_total[i] = total;
    }
    for (int64_t j = 0; j < width; ++j) {
      // A column of -inf alone was shifted by 0 and has the sum 0: it must not raise the running maximum.
      join(totals[j] == 0.0f ? -kInfinity : tops[j], totals[j], column_top[begin + j], column_total[begin + j]);
    }
  }
}

void gradient(const float* block, float* out, int64_t columns, int64_t begin, int64_t end, Excluded excluded,
              const float* row_lse, const float* row_weight, const float* column_lse, const float* column_weight) {
  for (int64_t i = begin; i < end; ++i) {
    const float* row = block + i * columns;
    float* result = out + i * columns;
    const float lse = row_lse[i], weight = row_weight[i];
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {
      result[j] = weight * exp_fast(row[j] - lse) + column_weight[j] * exp_fast(row[j] - column_lse[j]);
    }
    if (excluded.row_ids) {
      const int64_t id = excluded.row_ids[i];
      for (int64_t j = 0; j < columns; ++j) result[j] = excluded.column_ids[j] == id ? 0.0f : result[j];
    }
    if (excluded.diagonal != Excluded::kNone) {
      const int64_t j = i + excluded.diagonal;
      if (j >= 0 && j < columns) result[j] = 0.0f;
    }
  }
}

}  // namespace

extern const Kernels VLMO_FAST_KERNELS;
const Kernels VLMO_FAST_KERNELS = {sums, gradient};

}  // namespace vlmo_fast::similarity
