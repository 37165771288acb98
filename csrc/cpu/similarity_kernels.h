// What the two kernels need to know. Nothing here is inline: the kernels are compiled once for each instruction set, and
// a linker may keep any one copy of an inline function for all of them.
#pragma once

#include <cstdint>

namespace vlmo_fast::similarity {

// Elements of S that count nowhere: column row + diagonal (none if the diagonal is kNone), or where ids are equal.
struct Excluded {
  static constexpr int64_t kNone = INT64_MIN;
  int64_t diagonal;
  const int64_t* row_ids;  // (R,) of the block's rows, or null
  const int64_t* column_ids;  // (M,), or null
};

struct Kernels {
  // Columns [begin, end) of a block of S (rows, columns), contiguous: writes -inf where excluded; for each row the
  // maximum and the sum of exp(s - maximum) over these columns; adds to the columns' running maximum and sum.
  void (*sums)(float* block, int64_t rows, int64_t columns, int64_t begin, int64_t end, Excluded excluded, float* row_top,
               double* row_total, float* column_top, double* column_total);

  // Rows [begin, end): out = row_weight exp(s - row_lse) + column_weight exp(s - column_lse), 0 where excluded.
  void (*gradient)(const float* block, float* out, int64_t columns, int64_t begin, int64_t end, Excluded excluded,
                   const float* row_lse, const float* row_weight, const float* column_lse, const float* column_weight);
};

constexpr int64_t kPanel = 512;  // columns: with 128 rows of float32 a quarter of a megabyte, which a core's cache holds

extern const Kernels kBaseline;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace vlmo_fast::similarity
