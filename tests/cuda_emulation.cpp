// Runs the tile code of csrc/cuda on the host: each lane is a thread, shuffles and barriers are barriers, ldmatrix and
// mma.sync follow the PTX ISA's definitions. Reads a problem from one file, writes what the kernels would to another.

#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline

struct Warp {
  float exchange[32];
  std::barrier<> barrier{32};
};
thread_local Warp* this_warp;
thread_local int this_lane;

inline float __shfl_xor_sync(uint32_t, float value, int distance) {
  this_warp->exchange[this_lane] = value;
  this_warp->barrier.arrive_and_wait();
  const float other = this_warp->exchange[this_lane ^ distance];
  this_warp->barrier.arrive_and_wait();
  return other;
}

inline float __int_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }

namespace vlmo_fast {
inline void store(float* at, float value) { *at = value; }
}  // namespace vlmo_fast

#include "similarity_tiles.cuh"

using namespace vlmo_fast;

template <class T>
std::vector<T> read(std::FILE* file, size_t count) {
  std::vector<T> values(count);
  if (count && std::fread(values.data(), sizeof(T), count, file) != count) std::exit(2);
  return values;
}

void write(std::FILE* file, const std::vector<float>& values) {
  std::fwrite(values.data(), sizeof(float), values.size(), file);
}

// One operand's stage in shared memory, zeros beyond the matrix: what copy_tile leaves behind.
std::vector<float> stage(const std::vector<float>& matrix, int first, int count, int depth, int k) {
  std::vector<float> tile(sm80::kTileHalves, NAN);
  for (int row = 0; row < kTileM; ++row) {
    for (int chunk = 0; chunk < sm80::kChunks; ++chunk) {
      for (int e = 0; e < 8; ++e) {
        const int column = k + 8 * chunk + e;
        const bool there = first + row < count && column < depth;
        tile[sm80::shared_offset(row, chunk) + e] = there ? matrix[size_t(first + row) * depth + column] : 0.0f;
      }
    }
  }
  return tile;
}

// ldmatrix.x4: lane t receives of matrix m the elements (t / 4, 2 (t % 4)) and (t / 4, 2 (t % 4) + 1); the address of
// row r of matrix m is the one that lane 8 m + r names.
struct Registers {
  float value[32][4][2];  // lane, register, half of it
};

template <class Offset>
Registers load_matrices(const std::vector<float>& tile, Offset offset_of_lane) {
  Registers registers;
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < 4; ++m) {
      const int row = offset_of_lane(8 * m + lane / 4);
      for (int e = 0; e < 2; ++e) registers.value[lane][m][e] = tile[row + 2 * (lane % 4) + e];
    }
  }
  return registers;
}

// mma.m16n8k16: A holds (row g, k 2 q..) (g + 8, ..) (g, 8 + ..) (g + 8, 8 + ..) with g = lane / 4, q = lane % 4;
// B holds (k 2 q.., column g) (8 + .., g).
void multiply(std::vector<std::vector<float>>& acc, int at, const Registers& a, const Registers& b, int first_of_b) {
  float left[16][16], right[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int e = 0; e < 2; ++e) {
      for (int r = 0; r < 4; ++r) left[g + 8 * (r % 2)][2 * q + e + 8 * (r / 2)] = a.value[lane][r][e];
      for (int r = 0; r < 2; ++r) right[2 * q + e + 8 * r][g] = b.value[lane][first_of_b + r][e];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;  // C, from the same definition
      for (int k = 0; k < 16; ++k) acc[lane][4 * at + e] += left[row][k] * right[k][column];
    }
  }
}

// The accumulators of each lane of a warp, by the index arithmetic of similarity_sm80.cu.
std::vector<std::vector<float>> product_sm80(const std::vector<float>& x, const std::vector<float>& y, int rows,
                                             int columns, int depth, int row0, int column0, int warp) {
  using namespace sm80;
  std::vector<std::vector<float>> acc(32, std::vector<float>(kFragmentsM * kFragmentsN * 4, 0.0f));
  const int warp_m = warp / kWarpsN, warp_n = warp % kWarpsN;
  for (int start = 0; start < depth; start += kTileK) {
    const auto a = stage(x, row0, rows, depth, start), b = stage(y, column0, columns, depth, start);
    for (int k = 0; k < kTileK / 16; ++k) {
      for (int i = 0; i < kFragmentsM; ++i) {
        const Registers of_a = load_matrices(a, [&](int lane) {
          return shared_offset(warp_m * 16 * kFragmentsM + 16 * i + a_row(lane), 2 * k + a_chunk(lane));
        });
        for (int j = 0; j < kFragmentsN; ++j) {
          const Registers of_b = load_matrices(b, [&](int lane) {
            return shared_offset(warp_n * 8 * kFragmentsN + 16 * (j / 2) + b_row(lane), 2 * k + b_chunk(lane));
          });
          multiply(acc, i * kFragmentsN + j, of_a, of_b, 2 * (j % 2));
        }
      }
    }
  }
  return acc;
}

// Those of a 64 x 128 wgmma: warp w of a group owns rows 16 w.., its lanes columns as in m16n8 (PTX ISA, register
// fragments of wgmma.m64nNk16), number 4 j + e being (row lane / 4 + 8 (e / 2), column 8 j + 2 (lane % 4) + e % 2).
std::vector<std::vector<float>> product_sm90(const std::vector<float>& x, const std::vector<float>& y, int rows,
                                             int columns, int depth, int row0, int column0, int warp) {
  std::vector<std::vector<float>> acc(32, std::vector<float>(kTileN / 8 * 4, 0.0f));
  for (int lane = 0; lane < 32; ++lane) {
    for (int n = 0; n < kTileN / 8 * 4; ++n) {
      const int row = row0 + 16 * warp + lane / 4 + 8 * (n % 4 / 2);
      const int column = column0 + 8 * (n / 4) + 2 * (lane % 4) + n % 2;
      if (row >= rows || column >= columns) continue;
      for (int k = 0; k < depth; ++k) acc[lane][n] += x[size_t(row) * depth + k] * y[size_t(column) * depth + k];
    }
  }
  return acc;
}

template <int kWarpsM, int kWarpsN, int kFragmentsM, int kFragmentsN, class Product>
void run(const Problem& p, const Sums& sums, const Gradient<float>& gradient, Product product) {
  constexpr int kThreads = 256;
  for (int row_tile = 0; row_tile * kTileM < p.rows; ++row_tile) {
    for (int column_tile = 0; column_tile * kTileN < p.columns; ++column_tile) {
      auto shared = std::make_unique<SumsShared<kWarpsM, kWarpsN>>();
      std::vector<Warp> warps(kThreads / 32);
      std::vector<std::vector<std::vector<float>>> acc;
      for (int warp = 0; warp < kThreads / 32; ++warp) acc.push_back(product(row_tile * kTileM, column_tile * kTileN, warp));
      std::barrier<> block(kThreads);
      std::vector<std::thread> threads;
      for (int thread = 0; thread < kThreads; ++thread) {
        threads.emplace_back([&, thread] {
          const int warp = thread / 32, warp_m = warp / kWarpsN, warp_n = warp % kWarpsN;
          this_warp = &warps[warp];
          this_lane = thread % 32;
          float own[kFragmentsM][kFragmentsN][4];
          for (int n = 0; n < kFragmentsM * kFragmentsN * 4; ++n) {
            own[n / (4 * kFragmentsN)][n / 4 % kFragmentsN][n % 4] = acc[warp][this_lane][n];
          }
          write_gradient(own, p, gradient, warp_m, warp_n, this_lane, row_tile, column_tile);
          write_sums<kWarpsM, kWarpsN, kFragmentsM, kFragmentsN, kThreads>(own, p, sums, *shared, warp_m, warp_n, thread,
                                                                           row_tile, column_tile,
                                                                           [&] { block.arrive_and_wait(); });
        });
      }
      for (auto& thread : threads) thread.join();
    }
  }
}

int main(int, char** argv) {
  std::FILE* in = std::fopen(argv[1], "rb");
  const auto sizes = read<int32_t>(in, 6);
  const int arch = sizes[0], rows = sizes[1], columns = sizes[2], depth = sizes[3], diagonal = sizes[4];
  const auto scale = read<float>(in, 1), x = read<float>(in, size_t(rows) * depth), y = read<float>(in, size_t(columns) * depth);
  const auto row_lse = read<float>(in, rows), row_weight = read<float>(in, rows);
  const auto column_lse = read<float>(in, columns), column_weight = read<float>(in, columns);
  const auto row_ids = read<int64_t>(in, sizes[5] ? rows : 0), column_ids = read<int64_t>(in, sizes[5] ? columns : 0);
  std::fclose(in);

  const Problem p{rows, columns, scale.data(), sizes[5] ? row_ids.data() : nullptr,
                  sizes[5] ? column_ids.data() : nullptr, diagonal};
  const int row_tiles = (rows + kTileM - 1) / kTileM, column_tiles = (columns + kTileN - 1) / kTileN;
  std::vector<float> row_top(size_t(column_tiles) * rows, NAN), row_total = row_top;
  std::vector<float> column_top(size_t(row_tiles) * columns, NAN), column_total = column_top;
  std::vector<float> out(size_t(rows) * columns, NAN);
  const Sums sums{row_top.data(), row_total.data(), column_top.data(), column_total.data()};
  const Gradient<float> gradient{out.data(), row_lse.data(), row_weight.data(), column_lse.data(), column_weight.data()};
  if (arch == 80) {
    run<sm80::kWarpsM, sm80::kWarpsN, sm80::kFragmentsM, sm80::kFragmentsN>(p, sums, gradient, [&](int r, int c, int w) {
      return product_sm80(x, y, rows, columns, depth, r, c, w);
    });
  } else {
    run<8, 1, 1, kTileN / 8>(p, sums, gradient, [&](int r, int c, int w) {
      return product_sm90(x, y, rows, columns, depth, r, c, w);
    });
  }
  std::FILE* file = std::fopen(argv[2], "wb");
  for (const auto* values : {&row_top, &row_total, &column_top, &column_total, &out}) write(file, *values);
  std::fclose(file);
}
