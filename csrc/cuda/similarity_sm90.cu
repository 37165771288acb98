// S tile by tile with Hopper's TMA and WGMMA (sm_90a): CUTLASS's warp-specialised mainloop, one warp group that loads and
// two that multiply 64 x 128 each, and behind it the epilogue that all tiles share. A lane's accumulators of a 64 x 128
// wgmma lie as those of sixteen m16n8 in a row, its warp owning 16 of the 64 rows (PTX ISA, "wgmma fragments").

#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cute/tensor.hpp>

#include "similarity_tiles.cuh"

namespace vlmo_fast {
namespace sm90 {

using namespace cute;

constexpr int kWarpsM = 8, kWarpsN = 1, kFragmentsN = kTileN / 8, kConsumers = 256, kThreads = kConsumers + 128;

template <class Half>
struct ElementOf;
template <>
struct ElementOf<__nv_bfloat16> {
  using type = cutlass::bfloat16_t;
};
template <>
struct ElementOf<__half> {
  using type = cutlass::half_t;
};

template <class Half>
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, typename ElementOf<Half>::type, cutlass::layout::RowMajor, 8,
    typename ElementOf<Half>::type, cutlass::layout::ColumnMajor, 8, float, Shape<Int<kTileM>, Int<kTileN>, _64>,
    Shape<_1, _1, _1>, cutlass::gemm::collective::StageCount<4>,
    cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;

template <class Half>
struct Shared {
  typename Mainloop<Half>::TensorStorage operands;  // 4 stages of 32 KiB
  alignas(16) typename Mainloop<Half>::PipelineStorage pipeline;
  SumsShared<kWarpsM, kWarpsN> sums;
};

template <class Half, class Finish>
__device__ __forceinline__ void compute_tile(const typename Mainloop<Half>::Params& params, int depth, const Problem& p,
                                             Finish finish) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& shared = *reinterpret_cast<Shared<Half>*>(raw);
  using Pipeline = typename Mainloop<Half>::MainloopPipeline;
  const int thread = threadIdx.x, warp_group = cutlass::canonical_warp_group_idx();
  const int warp = cutlass::canonical_warp_idx_sync();
  const bool is_producer = warp_group == 0;

  if (warp == 0 && cute::elect_one_sync()) Mainloop<Half>::prefetch_tma_descriptors(params);

  typename Pipeline::Params pipeline_params;
  pipeline_params.role = is_producer && warp == 0 ? Pipeline::ThreadCategory::Producer
                         : is_producer            ? Pipeline::ThreadCategory::NonParticipant
                                                  : Pipeline::ThreadCategory::Consumer;
  pipeline_params.is_leader = thread % 128 == 0;
  pipeline_params.num_consumers = kConsumers;
  pipeline_params.transaction_bytes = params.tma_transaction_bytes;
  Pipeline pipeline(shared.pipeline, pipeline_params, Shape<_1, _1, _1>{});
  __syncthreads();  // the pipeline's barriers are there for all

  Mainloop<Half> mainloop;
  const auto shape = make_shape(p.rows, p.columns, depth, Int<1>{});
  auto inputs = mainloop.load_init(shape, params);
  const int steps = size<3>(get<0>(inputs));

  if (is_producer) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (warp == 0) {
      auto state = cutlass::make_producer_start_state<Pipeline>();
      mainloop.load(params, pipeline, state, inputs, make_coord(int(blockIdx.x), int(blockIdx.y), _, 0),
                    make_coord_iterator(cute::shape<3>(get<0>(inputs))), steps, thread % 32, 0, shared.operands);
      state.advance(steps);
      mainloop.load_tail(pipeline, state);
    }
    return;
  }
  cutlass::arch::warpgroup_reg_alloc<232>();
  typename Mainloop<Half>::TiledMma tiled_mma;
  auto accumulators = partition_fragment_C(tiled_mma, Shape<Int<kTileM>, Int<kTileN>>{});
  static_assert(decltype(size(accumulators))::value == 4 * kFragmentsN);
  typename Mainloop<Half>::PipelineState state;
  mainloop.mma(pipeline, state, accumulators, steps, thread - 128, shared.operands, params);
  mainloop.mma_tail(pipeline, state, steps);

  float acc[1][kFragmentsN][4];
#pragma unroll
  for (int j = 0; j < kFragmentsN; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[0][j][e] = accumulators(4 * j + e);
  }
  finish(acc, shared, (thread - 128) / 32, thread - 128);
#endif
}

struct ConsumerBarrier {
  __device__ __forceinline__ void operator()() const { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); }
};

template <class Half>
__global__ __launch_bounds__(kThreads, 1) void _similarity_sums_sm90_kernel(
    const __grid_constant__ typename Mainloop<Half>::Params params, int depth, Problem p, Sums sums) {
  compute_tile<Half>(params, depth, p, [&](auto& acc, auto& shared, int warp, int thread) {
    write_sums<kWarpsM, kWarpsN, 1, kFragmentsN, kConsumers>(acc, p, sums, shared.sums, warp, 0, thread, blockIdx.x,
                                                             blockIdx.y, ConsumerBarrier());
  });
}

template <class Half>
__global__ __launch_bounds__(kThreads, 1) void _similarity_gradient_sm90_kernel(
    const __grid_constant__ typename Mainloop<Half>::Params params, int depth, Problem p, Gradient<Half> gradient) {
  compute_tile<Half>(params, depth, p, [&](auto& acc, auto&, int warp, int thread) {
    write_gradient(acc, p, gradient, warp, 0, thread & 31, blockIdx.x, blockIdx.y);
  });
}

template <class Half, class Kernel, class Result>
int launch(Kernel kernel, const Half* a, const Half* b, int depth, Problem p, Result result, void* stream) {
  using Element = typename ElementOf<Half>::type;
  typename Mainloop<Half>::Arguments arguments{};
  arguments.ptr_A = reinterpret_cast<const Element*>(a);
  arguments.dA = {int64_t(depth), _1{}, int64_t(0)};
  arguments.ptr_B = reinterpret_cast<const Element*>(b);
  arguments.dB = {int64_t(depth), _1{}, int64_t(0)};
  const auto shape = make_shape(p.rows, p.columns, depth, 1);
  const auto params = Mainloop<Half>::to_underlying_arguments(shape, arguments, nullptr);
  const dim3 grid((p.rows + kTileM - 1) / kTileM, (p.columns + kTileN - 1) / kTileN);
  const int bytes = sizeof(Shared<Half>);
  const auto status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  kernel<<<grid, kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(params, depth, p, result);
  return cudaGetLastError();
}

}  // namespace sm90

template <class Half>
int launch_sums_sm90(const Half* a, const Half* b, int depth, Problem p, Sums sums, void* stream) {
  return sm90::launch(sm90::_similarity_sums_sm90_kernel<Half>, a, b, depth, p, sums, stream);
}

template <class Half>
int launch_gradient_sm90(const Half* a, const Half* b, int depth, Problem p, Gradient<Half> gradient, void* stream) {
  return sm90::launch(sm90::_similarity_gradient_sm90_kernel<Half>, a, b, depth, p, gradient, stream);
}

template int launch_sums_sm90(const __nv_bfloat16*, const __nv_bfloat16*, int, Problem, Sums, void*);
template int launch_sums_sm90(const __half*, const __half*, int, Problem, Sums, void*);
template int launch_gradient_sm90(const __nv_bfloat16*, const __nv_bfloat16*, int, Problem, Gradient<__nv_bfloat16>, void*);
template int launch_gradient_sm90(const __half*, const __half*, int, Problem, Gradient<__half>, void*);

}  // namespace vlmo_fast
