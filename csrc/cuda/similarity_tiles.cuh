// What happens to a tile of S in the registers of the warps that computed it, whichever instruction did: sums for the
// forward pass, G for the backward pass. Logits are in base 2 here: t = s log2(e).
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif  // the tests compile this file for the host, with lanes as threads (tests/cuda_emulation.cpp)

#include <cstdint>

#include "tile_math.h"

namespace vlmo_fast {

constexpr float kLog2E = 1.4426950408889634f;
constexpr double kLn2 = 0.69314718055994530942;
constexpr int kNoDiagonal = INT32_MIN;

struct Problem {
  int rows, columns;  // of this block of S
  const float* logit_scale;  // 0-d
  const int64_t* row_ids;  // (rows,) or null
  const int64_t* column_ids;  // (columns,) or null
  int diagonal;  // the column that row 0 leaves out, or kNoDiagonal
};

// Parts of the log-sum-exps: of each row over the columns of a tile, of each column over its rows. No atomics: each
// number has one writer, so results are the same in every run.
struct Sums {
  float *row_top, *row_total;  // (column tiles, rows)
  float *column_top, *column_total;  // (row tiles, columns)
};

template <class Half>
struct Gradient {
  Half* out;  // (rows, columns)
  const float *row_lse, *row_weight;  // (rows,)
  const float *column_lse, *column_weight;  // (columns,)
};

__device__ __forceinline__ float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }
__device__ __forceinline__ float finite_shift(float top) { return top == minus_infinity() ? 0.0f : top; }

__device__ __forceinline__ bool counts(const Problem& p, int row, int column) {
  if (row >= p.rows || column >= p.columns) return false;
  if (p.diagonal != kNoDiagonal && column == row + p.diagonal) return false;
  return p.row_ids == nullptr || p.row_ids[row] != p.column_ids[column];
}

// Reductions over the lanes that share rows (four neighbours) and over those that share columns (every fourth).
template <int kFirst, int kLast, class Op>
__device__ __forceinline__ float reduce_lanes(float value, Op op) {
#pragma unroll
  for (int distance = kFirst; distance <= kLast; distance *= 2) {
    value = op(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }  // drops a NaN ...
};
struct Add {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }  // ... which stays in the sums
};

template <int kWarpsM, int kWarpsN>
struct SumsShared {
  float row_top[kWarpsN][kTileM], row_total[kWarpsN][kTileM];
  float column_top[kWarpsM][kTileN], column_total[kWarpsM][kTileN];
};

// What a sum with maximum `top` is multiplied by when it joins one with maximum `higher`. Without a maximum it is 0 (or
// NaN) and stays what it is: a shift in its place could give 0 * infinity.
__device__ __forceinline__ float rescale(float top, float higher) {
  return top == minus_infinity() ? 1.0f : exp2_fast(top - higher);
}

// Two (maximum, sum) become one.
__device__ __forceinline__ void join(float& top, float& total, float other_top, float other_total) {
  const float higher = fmaxf(top, other_top);
  total = total * rescale(top, higher) + other_total * rescale(other_top, higher);
  top = higher;
}

// `acc[i][j]` is the 16 x 8 tile at rows 16 i, columns 8 j of the warp's part, which begins at (warp_row, warp_column)
// of the block's tile and at (row0 + warp_row, column0 + warp_column) of S. All `kThreads` threads call it, after a
// barrier behind the last read of the shared memory that `shared` lies in; `sync` is a barrier among them.
template <int kWarpsM, int kWarpsN, int kFragmentsM, int kFragmentsN, int kThreads, class Sync>
__device__ __forceinline__ void write_sums(float (&acc)[kFragmentsM][kFragmentsN][4], const Problem& p, const Sums& sums,
                                           SumsShared<kWarpsM, kWarpsN>& shared, int warp_m, int warp_n, int thread,
                                           int row_tile, int column_tile, Sync sync) {
  const int lane = thread & 31;
  const int warp_row = warp_m * 16 * kFragmentsM, warp_column = warp_n * 8 * kFragmentsN;
  const int row0 = row_tile * kTileM, column0 = column_tile * kTileN;
  const float scale = *p.logit_scale * kLog2E;

  // One exponential serves row and column where the warp's logits lie within 2^5 of one another (in base 2), as they do
  // at any usual scale: no term is lost then. Elsewhere each row and column has a shift of its own, and two are taken.
  float high = minus_infinity(), low = -high;
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
    for (int j = 0; j < kFragmentsN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = row0 + warp_row + 16 * i + fragment_row(lane, e);
        const int column = column0 + warp_column + 8 * j + fragment_column(lane, e);
        const bool in = counts(p, row, column);
        const float t = in ? acc[i][j][e] * scale : minus_infinity();
        acc[i][j][e] = t;
        high = fmaxf(high, t);
        low = in ? fminf(low, t) : low;
      }
    }
  }
  high = reduce_lanes<1, 16>(high, Max());
  low = -reduce_lanes<1, 16>(-low, Max());
  const bool narrow = low <= high && high - low <= 32.0f;  // not where nothing counts, nor for infinities

  float column_total[kFragmentsN][2], column_top[kFragmentsN][2];
#pragma unroll
  for (int j = 0; j < kFragmentsN; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float top = high;
      if (!narrow) {
        top = minus_infinity();
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) top = fmaxf(top, fmaxf(acc[i][j][c], acc[i][j][c + 2]));
        top = reduce_lanes<4, 16>(top, Max());
      }
      column_top[j][c] = top;
      column_total[j][c] = 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = high, total = 0.0f;
      if (narrow) {
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float y = exp2_fast(acc[i][j][2 * h + c] - high);
            total += y;
            column_total[j][c] += y;
          }
        }
      } else {
        top = minus_infinity();
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j) top = fmaxf(top, fmaxf(acc[i][j][2 * h], acc[i][j][2 * h + 1]));
        top = reduce_lanes<1, 2>(top, Max());
        const float shift = finite_shift(top);
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float t = acc[i][j][2 * h + c];
            total += exp2_fast(t - shift);
            column_total[j][c] += exp2_fast(t - finite_shift(column_top[j][c]));
          }
        }
      }
      total = reduce_lanes<1, 2>(total, Add());
      if ((lane & 3) == 0) {
        const int row = warp_row + 16 * i + fragment_row(lane, 2 * h);
        shared.row_top[warp_n][row] = total == 0.0f ? minus_infinity() : finite_shift(top);
        shared.row_total[warp_n][row] = total;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kFragmentsN; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float total = reduce_lanes<4, 16>(column_total[j][c], Add());
      if (lane < 4) {
        const int column = warp_column + 8 * j + fragment_column(lane, c);
        shared.column_top[warp_m][column] = total == 0.0f ? minus_infinity() : finite_shift(column_top[j][c]);
        shared.column_total[warp_m][column] = total;
      }
    }
  }
  sync();

  for (int row = thread; row < kTileM; row += kThreads) {
    if (row0 + row >= p.rows) continue;
    float top = shared.row_top[0][row], total = shared.row_total[0][row];
#pragma unroll
    for (int w = 1; w < kWarpsN; ++w) join(top, total, shared.row_top[w][row], shared.row_total[w][row]);
    sums.row_top[int64_t(column_tile) * p.rows + row0 + row] = top;
    sums.row_total[int64_t(column_tile) * p.rows + row0 + row] = total;
  }
  for (int column = thread; column < kTileN; column += kThreads) {
    if (column0 + column >= p.columns) continue;
    float top = shared.column_top[0][column], total = shared.column_total[0][column];
#pragma unroll
    for (int w = 1; w < kWarpsM; ++w) join(top, total, shared.column_top[w][column], shared.column_total[w][column]);
    sums.column_top[int64_t(row_tile) * p.columns + column0 + column] = top;
    sums.column_total[int64_t(row_tile) * p.columns + column0 + column] = total;
  }
}

#ifdef __CUDACC__
__device__ __forceinline__ void store(__nv_bfloat16* at, float value) { *at = __float2bfloat16_rn(value); }
__device__ __forceinline__ void store(__half* at, float value) { *at = __float2half_rn(value); }
#endif

template <int kFragmentsM, int kFragmentsN, class Half>
__device__ __forceinline__ void write_gradient(float (&acc)[kFragmentsM][kFragmentsN][4], const Problem& p,
                                               const Gradient<Half>& gradient, int warp_m, int warp_n, int lane,
                                               int row_tile, int column_tile) {
  const int row0 = row_tile * kTileM + warp_m * 16 * kFragmentsM;
  const int column0 = column_tile * kTileN + warp_n * 8 * kFragmentsN;
  const float scale = *p.logit_scale * kLog2E;
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row0 + 16 * i + fragment_row(lane, 2 * h);
      if (row >= p.rows) continue;
      const float row_lse = gradient.row_lse[row] * kLog2E, row_weight = gradient.row_weight[row];
#pragma unroll
      for (int j = 0; j < kFragmentsN; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = column0 + 8 * j + fragment_column(lane, c);
          if (column >= p.columns) continue;
          const float t = acc[i][j][2 * h + c] * scale;
          const float of_row = row_weight * exp2_fast(t - row_lse);
          const float column_lse = gradient.column_lse[column] * kLog2E;
          const float of_column = gradient.column_weight[column] * exp2_fast(t - column_lse);
          store(gradient.out + int64_t(row) * p.columns + column, counts(p, row, column) ? of_row + of_column : 0.0f);
        }
      }
    }
  }
}

// Launchers, one file for each instruction. `rows_ptr` is (rows, depth), `columns_ptr` (columns, depth), contiguous halves,
// 16-byte aligned, depth a multiple of 8. They return what cudaGetLastError says.
template <class Half>
int launch_sums_sm80(const Half* rows_ptr, const Half* columns_ptr, int depth, Problem p, Sums sums, void* stream);
template <class Half>
int launch_gradient_sm80(const Half* rows_ptr, const Half* columns_ptr, int depth, Problem p, Gradient<Half> gradient,
                         void* stream);
template <class Half>
int launch_sums_sm90(const Half* rows_ptr, const Half* columns_ptr, int depth, Problem p, Sums sums, void* stream);
template <class Half>
int launch_gradient_sm90(const Half* rows_ptr, const Half* columns_ptr, int depth, Problem p, Gradient<Half> gradient,
                         void* stream);

}  // namespace vlmo_fast
