// One block pools some channels of one window. Every hidden row is read once, in 16-byte accesses, and only the
// result is written. Compiled by nvcc, or by NVRTC on the machine that runs it. weighted_pool.cuh has the arithmetic.
#include "weighted_pool.cuh"

namespace weighted_pool {

constexpr int kChunk = 256;  // positions of a window in shared memory at once
constexpr int kThreads = 128;
// Blocks per multiprocessor. Leaves the registers that kAhead needs; otherwise ptxas waits for each load before the next.
constexpr int kBlocks = 8;
// Loads in flight per thread. A single one would leave the memory idle; the usual windows of 18 positions take three rounds.
constexpr int kAhead = 6;

// Read part of a row. 16-byte reads bypass the L1 cache, because each value is used once. In assembly, because the
// compiler would split some of these accesses.
template <typename Row>
__device__ __forceinline__ Row fetch(const Row* from) {
    if constexpr (sizeof(Row) == 16) {
        union {
            unsigned words[4];
            Row row;
        } read;
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(read.words[0]), "=r"(read.words[1]), "=r"(read.words[2]), "=r"(read.words[3])
                     : "l"(from));
        return read.row;
    } else {
        return *from;
    }
}

template <typename T, bool kGelu, int kLanes>
__device__ __forceinline__ void pool(const T* __restrict__ hidden, const float* __restrict__ weights, const Problem& p, T* __restrict__ out) {
    using Row = Lanes<T, kLanes>;
    __shared__ float scores[kChunk];
    __shared__ int rows[kChunk];
    const int window = blockIdx.x, count = p.kernel.count();
    const int channel = (blockIdx.y * kThreads + threadIdx.x) * kLanes;
    Pooled<kLanes> pooled;

    for (int first = 0; first < count; first += kChunk) {
        const int here = min(kChunk, count - first);
        if (first) __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < here; i += kThreads) {
            rows[i] = p.row(window, first + i);
            scores[i] = p.score(weights[rows[i]]);
        }
        __syncthreads();
        if (channel >= p.channels) continue;
        float top = scores[0];
#pragma unroll 2
        for (int i = 1; i < here; ++i) top = fmaxf(top, scores[i]);
        pooled.expect(top);
        const T* const mine = hidden + channel;
        int i = 0;
        for (; i + kAhead <= here; i += kAhead) {
            Row ahead[kAhead];
#pragma unroll
            for (int j = 0; j < kAhead; ++j) ahead[j] = fetch(reinterpret_cast<const Row*>(mine + static_cast<long long>(rows[i + j]) * p.channels));
#pragma unroll
            for (int j = 0; j < kAhead; ++j) pooled.template add<kGelu>(ahead[j], scores[i + j]);
        }
#pragma unroll 1
        for (; i < here; ++i) {
            pooled.template add<kGelu>(fetch(reinterpret_cast<const Row*>(mine + static_cast<long long>(rows[i]) * p.channels)), scores[i]);
        }
    }
    if (channel < p.channels) *reinterpret_cast<Row*>(out + static_cast<long long>(window) * p.channels + channel) = pooled.template result<T>();
}

}  // namespace weighted_pool

// The temperature is passed as the bits of a float: ahead-of-time plugins of TensorRT pass only 32-bit integers
// between inputs and outputs.
#define WEIGHTED_POOL(name, T, gelu, lanes)                                                                                               \
    extern "C" __global__ void __launch_bounds__(weighted_pool::kThreads, weighted_pool::kBlocks)                                                                 \
        name(const weighted_pool::T* hidden, const float* weights, int t, int h, int w, int channels, int kt, int kh, int kw, int st,      \
             int sh, int sw, int temperature, weighted_pool::T* out) {                                                                    \
        const weighted_pool::Problem p{{t, h, w}, channels, {kt, kh, kw}, {st, sh, sw}, __int_as_float(temperature)};                     \
        weighted_pool::pool<weighted_pool::T, gelu, lanes>(hidden, weights, p, out);                                                      \
    }
WEIGHTED_POOL_EACH(WEIGHTED_POOL)
