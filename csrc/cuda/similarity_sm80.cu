// S tile by tile on tensor cores with mma.sync, from sm_80 on: cp.async into four stages of swizzled shared memory,
// ldmatrix, m16n8k16 with float32 sums; the tile never leaves the registers.

#include "similarity_tiles.cuh"

namespace vlmo_fast {
namespace sm80 {

template <class Half>
struct Shared {
  union {
    struct {
      Half a[kStages][kTileHalves], b[kStages][kTileHalves];
    } operands;  // 64 KiB
    SumsShared<kWarpsM, kWarpsN> sums;  // after the last product
  };
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes to shared memory, or zeros where there is nothing to copy.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0));
}

__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(from)));
}

__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// One operand's tile of one stage: rows first..first + 127 of (count, depth), depth columns k..k + 31; zeros beyond.
template <class Half>
__device__ __forceinline__ void copy_tile(Half* to, const Half* from, int first, int count, int depth, int k) {
  for (int piece = threadIdx.x; piece < kTileM * kChunks; piece += kThreads) {
    const int row = piece / kChunks, chunk = piece % kChunks;
    const bool there = first + row < count && k + 8 * chunk < depth;
    copy_async(to + shared_offset(row, chunk), there ? from + int64_t(first + row) * depth + k + 8 * chunk : from, there);
  }
}

template <class Half, class Finish>
__device__ __forceinline__ void compute_tile(const Half* a, const Half* b, int depth, const Problem& p, Finish finish) {
  extern __shared__ __align__(128) unsigned char raw[];
  auto& shared = *reinterpret_cast<Shared<Half>*>(raw);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warp_m = warp / kWarpsN, warp_n = warp % kWarpsN;
  const int row0 = blockIdx.x * kTileM, column0 = blockIdx.y * kTileN;
  const int steps = (depth + kTileK - 1) / kTileK;

  float acc[kFragmentsM][kFragmentsN][4] = {};
  const auto copy_step = [&](int step) {
    if (step < steps) {
      copy_tile(shared.operands.a[step % kStages], a, row0, p.rows, depth, step * kTileK);
      copy_tile(shared.operands.b[step % kStages], b, column0, p.columns, depth, step * kTileK);
    }
    asm volatile("cp.async.commit_group;");  // empty at the end, so that the count of groups stays the step's
  };
  for (int step = 0; step < kStages - 1; ++step) copy_step(step);
  for (int step = 0; step < steps; ++step) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2));
    __syncthreads();  // this step's tiles are there for all, and all are done with the stage that is filled next
    copy_step(step + kStages - 1);
    const Half* tile_a = shared.operands.a[step % kStages];
    const Half* tile_b = shared.operands.b[step % kStages];
#pragma unroll
    for (int k = 0; k < kTileK / 16; ++k) {
      uint32_t of_a[kFragmentsM][4], of_b[kFragmentsN / 2][4];
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
        const int row = warp_m * 16 * kFragmentsM + 16 * i + a_row(lane);
        load_matrices(of_a[i], tile_a + shared_offset(row, 2 * k + a_chunk(lane)));
      }
#pragma unroll
      for (int j = 0; j < kFragmentsN / 2; ++j) {
        const int column = warp_n * 8 * kFragmentsN + 16 * j + b_row(lane);
        load_matrices(of_b[j], tile_b + shared_offset(column, 2 * k + b_chunk(lane)));
      }
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j) {
          multiply(acc[i][j], of_a[i], of_b[j / 2][2 * (j % 2)], of_b[j / 2][2 * (j % 2) + 1], Half());
        }
      }
    }
  }
  asm volatile("cp.async.wait_group 0;");
  __syncthreads();  // shared memory changes its use
  finish(acc, shared, warp_m, warp_n, lane);
}

template <class Half>
__global__ __launch_bounds__(kThreads, 2) void _similarity_sums_sm80_kernel(const Half* a, const Half* b, int depth,
                                                                            Problem p, Sums sums) {
  compute_tile(a, b, depth, p, [&](auto& acc, auto& shared, int warp_m, int warp_n, int) {
    write_sums<kWarpsM, kWarpsN, kFragmentsM, kFragmentsN, kThreads>(acc, p, sums, shared.sums, warp_m, warp_n, threadIdx.x,
                                                                     blockIdx.x, blockIdx.y, [] { __syncthreads(); });
  });
}

template <class Half>
__global__ __launch_bounds__(kThreads, 2) void _similarity_gradient_sm80_kernel(const Half* a, const Half* b, int depth,
                                                                                Problem p, Gradient<Half> gradient) {
  compute_tile(a, b, depth, p, [&](auto& acc, auto&, int warp_m, int warp_n, int lane) {
    write_gradient(acc, p, gradient, warp_m, warp_n, lane, blockIdx.x, blockIdx.y);
  });
}

template <class Half, class Kernel, class Result>
int launch(Kernel kernel, const Half* a, const Half* b, int depth, Problem p, Result result, void* stream) {
  const dim3 grid((p.rows + kTileM - 1) / kTileM, (p.columns + kTileN - 1) / kTileN);
  const int bytes = sizeof(Shared<Half>);
  const auto status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  kernel<<<grid, kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(a, b, depth, p, result);
  return cudaGetLastError();
}

}  // namespace sm80

template <class Half>
int launch_sums_sm80(const Half* a, const Half* b, int depth, Problem p, Sums sums, void* stream) {
  return sm80::launch(sm80::_similarity_sums_sm80_kernel<Half>, a, b, depth, p, sums, stream);
}

template <class Half>
int launch_gradient_sm80(const Half* a, const Half* b, int depth, Problem p, Gradient<Half> gradient, void* stream) {
  return sm80::launch(sm80::_similarity_gradient_sm80_kernel<Half>, a, b, depth, p, gradient, stream);
}

template int launch_sums_sm80(const __nv_bfloat16*, const __nv_bfloat16*, int, Problem, Sums, void*);
template int launch_sums_sm80(const __half*, const __half*, int, Problem, Sums, void*);
template int launch_gradient_sm80(const __nv_bfloat16*, const __nv_bfloat16*, int, Problem, Gradient<__nv_bfloat16>, void*);
template int launch_gradient_sm80(const __half*, const __half*, int, Problem, Gradient<__half>, void*);

}  // namespace vlmo_fast
