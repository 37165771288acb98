// Where things lie in a tile: plain index arithmetic, compiled for the device and, by the tests, for the host, where an
// emulation of ldmatrix and mma.sync holds it to a matrix product.
#pragma once

#ifdef __CUDACC__
#define VLMO_FAST_BOTH __host__ __device__ __forceinline__
#else
#define VLMO_FAST_BOTH inline
#endif

namespace vlmo_fast {

constexpr int kTileM = 128, kTileN = 128;  // of S that one thread block computes

// An accumulator of m16n8 (mma.sync), and of each 16 rows of a wgmma: number e of a lane, relative to the 16 x 8 tile.
VLMO_FAST_BOTH int fragment_row(int lane, int e) { return (lane >> 2) + 8 * (e >> 1); }
VLMO_FAST_BOTH int fragment_column(int lane, int e) { return 2 * (lane & 3) + (e & 1); }

namespace sm80 {

constexpr int kTileK = 32, kStages = 4, kWarpsM = 2, kWarpsN = 4, kThreads = 32 * kWarpsM * kWarpsN;
constexpr int kFragmentsM = kTileM / kWarpsM / 16, kFragmentsN = kTileN / kWarpsN / 8;  // of a warp: 4 of 16, 4 of 8
constexpr int kChunks = kTileK / 8;  // of 16 bytes, 8 halves, in a row of a tile in shared memory
constexpr int kTileHalves = kTileM * kTileK;  // of one operand in one stage (kTileM == kTileN)

// Offset in halves of 16-byte chunk `chunk` of row `row`. The chunk is exchanged within its row so that the eight rows
// that ldmatrix reads at once (64 bytes apart) lie in different banks: row pairs cycle through the four places.
VLMO_FAST_BOTH int shared_offset(int row, int chunk) { return row * kTileK + ((chunk ^ ((row >> 1) & 3)) << 3); }

// The row and chunk that a lane names to ldmatrix.x4, whose matrix m of 8 x 8 halves takes its rows from lanes 8 m..8 m + 7.
// A, 16 rows x 16 k: matrices (rows 0-7, k 0-7), (rows 8-15, k 0-7), (rows 0-7, k 8-15), (rows 8-15, k 8-15).
VLMO_FAST_BOTH int a_row(int lane) { return lane & 15; }
VLMO_FAST_BOTH int a_chunk(int lane) { return lane >> 4; }
// B, 16 columns x 16 k, stored by column: (columns 0-7, k 0-7), (0-7, k 8-15), (8-15, k 0-7), (8-15, k 8-15).
VLMO_FAST_BOTH int b_row(int lane) { return (lane & 7) + 8 * (lane >> 4); }
VLMO_FAST_BOTH int b_chunk(int lane) { return (lane >> 3) & 1; }

}  // namespace sm80
}  // namespace vlmo_fast
