// Attention of one head over one sequence of a packed batch, float32. As with the similarity kernels nothing here is
// inline: the kernels are compiled once for each instruction set.
#pragma once

#include <cstdint>

namespace vlmo_fast::attention {

// Tokens that lie one after the other.
struct Part {
  int64_t row;  // of the first, in the packed batch
  int64_t length;
  int64_t place;  // row of the bias of the first
};

// Text, then image; either may be empty.
struct Tokens {
  Part parts[2];
  int64_t length;  // of both
};

struct Sequence {
  Tokens queries, keys;
  const bool* mask;  // of the keys: false for those that no query sees; or null
};

// Rows of one head: row r begins at data + r * stride and is contiguous.
struct Rows {
  const float* data;
  int64_t stride;
};

struct MutableRows {
  float* data;
  int64_t stride;
};

// One head of the batch.
struct Head {
  Rows query, key, value;
  int64_t width;  // d
  const float* bias;  // rows `pitch` apart; or null
  int64_t pitch;
  float scale;
};

// Of each query the largest score, and the sum of exp(score - largest).
struct Stats {
  float* top;
  float* total;
};

struct Gradients {
  Rows grad;  // of the output
  MutableRows query, key, value;
  float* bias;  // to be added to; or null
  int64_t pitch;
};

struct Kernels {
  // Size in floats of the scratch memory that a call needs, for sequences of up to `length` keys.
  int64_t (*room)(int64_t length, int64_t width);
  void (*forward)(const Head& head, const Sequence& sequence, MutableRows out, Stats stats, float* room);
  void (*backward)(const Head& head, const Sequence& sequence, Stats stats, const Gradients& gradients, float* room);
};

extern const Kernels kBaseline;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace vlmo_fast::attention
