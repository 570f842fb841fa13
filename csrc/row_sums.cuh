// Sums of 2^z over rows of logits, z = x scale + log2 u: what Sinkhorn's passes and the cross-entropies divide by.
#pragma once

#include <algorithm>

#include "common.cuh"

constexpr float LOG2E = 1.4426950408889634f;

__host__ __device__ inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// sum 2^z over what was added so far, as sum 2^(z - top), so that it cannot overflow
struct LogSum {
    float top = -1e30f, sum = 0;

    __device__ void add(const float (&z)[8]) {
        float most = z[0];
#pragma unroll
        for (int j = 1; j < 8; j++) most = fmaxf(most, z[j]);
        raise(most);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += exp2_fast(z[j] - top);
    }
    __device__ void add(const LogSum& other) {
        raise(other.top);
        sum += other.sum * exp2_fast(other.top - top);
    }
    __device__ void raise(float most) {  // no branch: loads of other rows go on meanwhile
        const float before = top;
        top = fmaxf(top, most);
        sum *= exp2_fast(before - top);
    }
    __device__ void over_warp() {
        const float most = warp_max(top);
        sum = warp_sum(sum * exp2_fast(top - most));
        top = most;
    }
    __device__ float log2() const { return top + log2f(sum); }
};

namespace row_sums {

constexpr int THREADS = 256, WARPS = THREADS / 32, TILE = 8 * THREADS;  // 8 elements of a row for each thread
constexpr int ROWS = 4;          // that share a read of u
constexpr int CHUNK = 4 * TILE;  // columns of a part

struct Shared { LogSum parts[ROWS][WARPS]; };

__host__ __device__ inline int64_t chunks(int64_t K) { return divide_up(K, CHUNK); }

// parts[chunk, b] = sum over the chunk's columns of 2^(x_bk scale + log2 u_k);  grid: n / ROWS, chunks
template <typename T, bool VECTOR>
__global__ void __launch_bounds__(THREADS) kernel(
    LogSum* parts, const T* __restrict__ x, const float* __restrict__ log_u, int64_t n, int64_t K, float scale) {
    Shared& shared = *shared_memory<Shared>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t first = (int64_t)blockIdx.x * ROWS, end = min((blockIdx.y + (int64_t)1) * CHUNK, K);
    LogSum total[ROWS];
    for (int64_t k = (int64_t)blockIdx.y * CHUNK + threadIdx.x * 8; k < end; k += TILE) {
        float u[8], z[ROWS][8];
        load_row<VECTOR>(u, log_u, k, K, -1e9f);
#pragma unroll
        for (int i = 0; i < ROWS; i++)
            load_row<VECTOR>(z[i], x + min(first + i, n - 1) * K, k, K, 0.f);  // past the end: the last row, unused
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
#pragma unroll
            for (int j = 0; j < 8; j++) z[i][j] = fmaf(z[i][j], scale, u[j] * LOG2E);
            total[i].add(z[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        total[i].over_warp();
        if (lane == 0) shared.parts[i][warp] = total[i];
    }
    __syncthreads();
    if (warp < ROWS) {  // warp i finishes row i
        LogSum part;
        if (lane < WARPS) part = shared.parts[warp][lane];
        part.over_warp();
        if (lane == 0 && first + warp < n) parts[blockIdx.y * n + first + warp] = part;
    }
}

// parts: chunks(K) n
template <typename T>
static cudaError_t launch(LogSum* parts, const T* x, const float* log_u, int64_t n, int64_t K, float scale,
                          cudaStream_t stream) {
    auto one = vectors(K, x, log_u) ? kernel<T, true> : kernel<T, false>;
    return start(one, {divide_up(n, ROWS), chunks(K)}, THREADS, sizeof(Shared), stream, parts, x, log_u, n, K, scale);
}

}  // namespace row_sums
