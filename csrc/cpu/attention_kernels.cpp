// softmax(scale * Q K^T + bias) V of one head and one sequence, and its gradients, a block of queries at a time: scores of
// kBlock rows are all that exists, and what they need of keys and values lies packed in the core's cache.
//
// Compiled for each instruction set with VLMO_FAST_KERNELS naming the table.

#include "attention_kernels.h"

#include "fast_exp.h"

namespace vlmo_fast::attention {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
constexpr int kRows = 6, kVectors = 4;  // of a tile: 24 of 32 registers hold sums
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
constexpr int kRows = 6, kVectors = 2;  // 12 of 16
#else
constexpr int64_t kLanes = 4;
constexpr int kRows = 6, kVectors = 2;
#endif

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

constexpr int64_t kBlock = 48;  // queries
constexpr int64_t kDepth = 64;  // products that are added up one after the other
constexpr float kInfinity = __builtin_inff();

inline int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

// A matrix whose element (i, k) is data[i * row + k * step].
struct Left {
  const float* data;
  int64_t row, step;
};

// C (kR, kV * kLanes) = A B, or += where `add`; B and C have rows of `ldb` and `ldc`.
template <int kR, int kV>
inline void tile(int64_t depth, Left a, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  Vector sums[kR][kV];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kV; ++v) sums[r][v] = Vector{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[kV];
#pragma GCC unroll 8
    for (int v = 0; v < kV; ++v) right[v] = *reinterpret_cast<const Vector*>(b + k * ldb + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const float left = a.data[r * a.row + k * a.step];
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) sums[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kV; ++v) {
      Vector& target = *reinterpret_cast<Vector*>(c + r * ldc + v * kLanes);
      target = add ? target + sums[r][v] : sums[r][v];
    }
  }
}

template <int kR>
inline void tile_of(int64_t vectors, int64_t depth, Left a, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  if constexpr (kVectors == 4) {
    if (vectors == 4) return tile<kR, 4>(depth, a, b, ldb, c, ldc, add);
    if (vectors == 3) return tile<kR, 3>(depth, a, b, ldb, c, ldc, add);
  }
  if (vectors == 2) return tile<kR, 2>(depth, a, b, ldb, c, ldc, add);
  tile<kR, 1>(depth, a, b, ldb, c, ldc, add);
}

// C (rows, columns) = A B, or += where `add`; rows of B and C are `columns` padded to whole vectors, and read and written so.
// Sums of kDepth products at a time, so that rounding does not grow with the depth.
void product(int64_t rows, int64_t columns, int64_t depth, Left a, const float* b, int64_t ldb, float* c, int64_t ldc,
             bool add) {
  const int64_t vectors = padded(columns) / kLanes;
  for (int64_t k = 0; k < depth || k == 0; k += kDepth) {
    const int64_t deep = depth - k < kDepth ? depth - k : kDepth;
    int64_t wide;
    for (int64_t v = 0; v < vectors; v += wide) {
      const int64_t panels = (vectors - v + kVectors - 1) / kVectors;  // of about the same width
      wide = (vectors - v + panels - 1) / panels;
      const float* right = b + k * ldb + v * kLanes;
      for (int64_t r = 0; r < rows; r += kRows) {
        const Left left{a.data + r * a.row + k * a.step, a.row, a.step};
        float* sums = c + r * ldc + v * kLanes;
        const bool more = add || k > 0;
        switch (rows - r) {
          case 1: tile_of<1>(wide, deep, left, right, ldb, sums, ldc, more); break;
          case 2: tile_of<2>(wide, deep, left, right, ldb, sums, ldc, more); break;
          case 3: tile_of<3>(wide, deep, left, right, ldb, sums, ldc, more); break;
          case 4: tile_of<4>(wide, deep, left, right, ldb, sums, ldc, more); break;
          case 5: tile_of<5>(wide, deep, left, right, ldb, sums, ldc, more); break;
          default: tile_of<kRows>(wide, deep, left, right, ldb, sums, ldc, more);
        }
      }
    }
  }
}

// Calls `visit(token, row, place)` for the tokens [begin, end).
template <typename Visit>
inline void each(const Tokens& tokens, int64_t begin, int64_t end, Visit visit) {
  int64_t before = 0;
  for (const Part& part : tokens.parts) {
    const int64_t first = begin > before ? begin : before;
    const int64_t last = end < before + part.length ? end : before + part.length;
    for (int64_t t = first; t < last; ++t) visit(t, part.row + t - before, part.place + t - before);
    before += part.length;
  }
}

// to (width, ld): the tokens' rows as columns, zeros behind them.
void transpose(const Tokens& tokens, Rows from, int64_t width, float* to, int64_t ld) {
  int64_t t = 0;
  for (const Part& part : tokens.parts) {
    const float* source = from.data + part.row * from.stride;
    int64_t left = part.length;
    for (; left >= kLanes; left -= kLanes, t += kLanes, source += kLanes * from.stride) {
      for (int64_t c = 0; c < width; ++c) {
        for (int64_t lane = 0; lane < kLanes; ++lane) to[c * ld + t + lane] = source[lane * from.stride + c];
      }
    }
    for (; left > 0; --left, ++t, source += from.stride) {
      for (int64_t c = 0; c < width; ++c) to[c * ld + t] = source[c];
    }
  }
  for (int64_t c = 0; c < width; ++c) {
    for (int64_t behind = t; behind < ld; ++behind) to[c * ld + behind] = 0.0f;
  }
}

// to (end - begin, ld) = factor * rows, zeros behind them.
void copy_rows(const Tokens& tokens, int64_t begin, int64_t end, Rows from, int64_t width, float factor, float* to,
               int64_t ld) {
  each(tokens, begin, end, [&](int64_t t, int64_t row, int64_t) {
    const float* const source = from.data + row * from.stride;
    float* const target = to + (t - begin) * ld;
    for (int64_t c = 0; c < width; ++c) target[c] = factor * source[c];
    for (int64_t c = width; c < ld; ++c) target[c] = 0.0f;
  });
}

// scores (keys) += the bias of the query at `place`; -inf behind the sequence's keys, and where they are masked.
inline void add_bias(const Head& head, const Sequence& sequence, int64_t place, float* scores, int64_t keys) {
  for (int64_t j = sequence.keys.length; j < keys; ++j) scores[j] = -kInfinity;
  if (head.bias) {
    float* of_part = scores;
    for (const Part& part : sequence.keys.parts) {
      const float* bias = head.bias + place * head.pitch + part.place;
      for (int64_t j = 0; j < part.length; ++j) of_part[j] += bias[j];
      of_part += part.length;
    }
  }
  if (sequence.mask) {
    for (int64_t j = 0; j < sequence.keys.length; ++j) scores[j] = sequence.mask[j] ? scores[j] : -kInfinity;
  }
}

int64_t room(int64_t length, int64_t width) {
  const int64_t keys = padded(length), wide = padded(width);
  return 2 * width * keys + 3 * length * wide + 2 * kBlock * keys + 2 * kBlock * wide;
}

void forward(const Head& head, const Sequence& sequence, MutableRows out, Stats stats, float* room) {
  const int64_t length = sequence.keys.length, width = head.width, keys = padded(length), wide = padded(width);
  float* const key = room;  // (width, keys)
  float* const value = key + width * keys;  // (length, wide)
  float* const scores = value + length * wide;  // (kBlock, keys)
  float* const query = scores + kBlock * keys;  // (kBlock, wide), then the results
  transpose(sequence.keys, head.key, width, key, keys);
  copy_rows(sequence.keys, 0, length, head.value, width, 1.0f, value, wide);
  const int64_t queries = sequence.queries.length;
  for (int64_t begin = 0; begin < queries; begin += kBlock) {
    const int64_t end = begin + kBlock < queries ? begin + kBlock : queries;
    copy_rows(sequence.queries, begin, end, head.query, width, head.scale, query, wide);
    product(end - begin, length, width, {query, wide, 1}, key, keys, scores, keys, false);
    each(sequence.queries, begin, end, [&](int64_t t, int64_t row, int64_t place) {
      float* const score = scores + (t - begin) * keys;
      add_bias(head, sequence, place, score, keys);
      float top = -kInfinity;
#pragma omp simd reduction(max : top)
      for (int64_t j = 0; j < keys; ++j) top = score[j] > top ? score[j] : top;
      float total = 0.0f;
#pragma omp simd reduction(+ : total)
      for (int64_t j = 0; j < keys; ++j) {
        score[j] = exp_fast(score[j] - top);
        total += score[j];
      }
      stats.top[row] = top;
      stats.total[row] = length ? total : 1.0f;
    });
    product(end - begin, width, length, {scores, keys, 1}, value, wide, query, wide, false);
    each(sequence.queries, begin, end, [&](int64_t t, int64_t row, int64_t) {
      const float* const result = query + (t - begin) * wide;
      float* const target = out.data + row * out.stride;
      const float total = stats.total[row];
      for (int64_t c = 0; c < width; ++c) target[c] = result[c] / total;
    });
  }
}

// With P the weights: dV = P^T dO, dS = P (dO V^T - rowsum(P dO V^T)), dQ = scale dS K, dK = scale dS^T Q, dbias = dS.
void backward(const Head& head, const Sequence& sequence, Stats stats, const Gradients& gradients, float* room) {
  const int64_t length = sequence.keys.length, width = head.width, keys = padded(length), wide = padded(width);
  float* const key = room;  // (width, keys)
  float* const value = key + width * keys;  // (width, keys)
  float* const key_rows = value + width * keys;  // (length, wide)
  float* const d_key = key_rows + length * wide;  // (length, wide)
  float* const d_value = d_key + length * wide;  // (length, wide)
  float* const weights = d_value + length * wide;  // (kBlock, keys)
  float* const d_scores = weights + kBlock * keys;  // (kBlock, keys)
  float* const query = d_scores + kBlock * keys;  // (kBlock, wide), then the gradient of the queries
  float* const grad = query + kBlock * wide;  // (kBlock, wide)
  transpose(sequence.keys, head.key, width, key, keys);
  transpose(sequence.keys, head.value, width, value, keys);
  copy_rows(sequence.keys, 0, length, head.key, width, 1.0f, key_rows, wide);
  const int64_t queries = sequence.queries.length;
  if (!queries) {
    for (int64_t i = 0; i < 2 * length * wide; ++i) d_key[i] = 0.0f;  // and d_value
  }
  for (int64_t begin = 0; begin < queries; begin += kBlock) {
    const int64_t end = begin + kBlock < queries ? begin + kBlock : queries, rows = end - begin;
    copy_rows(sequence.queries, begin, end, head.query, width, head.scale, query, wide);
    copy_rows(sequence.queries, begin, end, gradients.grad, width, 1.0f, grad, wide);
    product(rows, length, width, {query, wide, 1}, key, keys, weights, keys, false);
    product(rows, length, width, {grad, wide, 1}, value, keys, d_scores, keys, false);
    each(sequence.queries, begin, end, [&](int64_t t, int64_t row, int64_t place) {
      float* const weight = weights + (t - begin) * keys;
      float* const d_score = d_scores + (t - begin) * keys;
      add_bias(head, sequence, place, weight, keys);
      const float top = stats.top[row], total = stats.total[row];
      float mean = 0.0f;
#pragma omp simd reduction(+ : mean)
      for (int64_t j = 0; j < keys; ++j) {
        weight[j] = exp_fast(weight[j] - top) / total;
        mean += weight[j] * d_score[j];
      }
      for (int64_t j = 0; j < keys; ++j) d_score[j] = weight[j] * (d_score[j] - mean);
      if (gradients.bias) {
        const float* from = d_score;
        for (const Part& part : sequence.keys.parts) {
          float* const to = gradients.bias + place * gradients.pitch + part.place;
          for (int64_t j = 0; j < part.length; ++j) to[j] += from[j];
          from += part.length;
        }
      }
    });
    product(length, width, rows, {weights, 1, keys}, grad, wide, d_value, wide, begin > 0);
    product(length, width, rows, {d_scores, 1, keys}, query, wide, d_key, wide, begin > 0);
    product(rows, width, length, {d_scores, keys, 1}, key_rows, wide, query, wide, false);
    each(sequence.queries, begin, end, [&](int64_t t, int64_t row, int64_t) {
      const float* const result = query + (t - begin) * wide;
      float* const target = gradients.query.data + row * gradients.query.stride;
      for (int64_t c = 0; c < width; ++c) target[c] = head.scale * result[c];
    });
  }
  each(sequence.keys, 0, length, [&](int64_t t, int64_t row, int64_t) {
    float* const of_key = gradients.key.data + row * gradients.key.stride;
    float* const of_value = gradients.value.data + row * gradients.value.stride;
    for (int64_t c = 0; c < width; ++c) {
      of_key[c] = d_key[t * wide + c];
      of_value[c] = d_value[t * wide + c];
    }
  });
}

}  // namespace

extern const Kernels VLMO_FAST_KERNELS;
const Kernels VLMO_FAST_KERNELS = {room, forward, backward};

}  // namespace vlmo_fast::attention
