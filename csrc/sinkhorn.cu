/*
One pass of Sinkhorn-Knopp, and the assignments that the last one leads to, on a GPU.

    pass      log r_k = log sum_b v_b exp(x_bk / T)       v_b = 1 / sum_k u_k exp(x_bk / T), or 1 where log_u is null
    targets   q_bk    = softmax over k of x_bk / T + log u_k

    x  n K    log_u, log_r  K, f32    q  n K

Bound by memory: every pass reads x once, 2 bytes an element in bf16, as a panel of up to 128 rows and 24 MB stays in L2
between its row sums and its column sums; there it is read twice, beside 4/4 bytes of u. Up to 2.25 exp2 an element.
Not run on a GPU.

No atomics and a fixed order of all sums: the same bits every time. With u from a pass, the column sums of the next one
lie in [1/(n K), n] if u scales them, so that only row sums, and the first pass, carry their largest exponent along.

Alone:  nvcc -std=c++17 -O3 -arch=native -DALONE csrc/sinkhorn.cu -o build/k && build/k
*/
#include <algorithm>
#include <type_traits>

#include "common.cuh"
#include "kernels.h"

static constexpr float LOG2E = 1.4426950408889634f;
static constexpr int THREADS = 256, WARPS = THREADS / 32, TILE = 8 * THREADS;  // 8 elements of a row for each thread
static constexpr int ROWS = 4;          // that share a read of u
static constexpr int CHUNK = 4 * TILE;  // columns of a row sum's part
static constexpr int MOST = 128;        // rows of a panel

static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t panel_rows(int64_t K, Dtype dtype) {
    const int64_t fit = (24 << 20) / (K * (dtype == Dtype::f32 ? 4 : 2));
    return std::max<int64_t>(WARPS, std::min<int64_t>(MOST, fit / WARPS * WARPS));
}

// --------------------------------------------------------------------------------
// kernels

struct RowShared { LogSum parts[ROWS][WARPS]; };
struct ColumnShared { float sums[WARPS][THREADS], tops[WARPS][THREADS], log_v[MOST]; };
struct TargetShared { LogSum parts[WARPS]; };

// parts[b, chunk] = sum over the chunk's columns of 2^(x_bk scale + log2 u_k);  grid: chunks, rows / ROWS
template <typename T>
__global__ void __launch_bounds__(THREADS) row_sums(
    LogSum* parts, const T* __restrict__ x, const float* __restrict__ log_u, int64_t n, int64_t K, float scale,
    bool vector) {
    RowShared& shared = *shared_memory<RowShared>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t first = (int64_t)blockIdx.y * ROWS, end = min((blockIdx.x + (int64_t)1) * CHUNK, K);
    LogSum total[ROWS];
    for (int64_t k = (int64_t)blockIdx.x * CHUNK + threadIdx.x * 8; k < end; k += TILE) {
        float u[8];
        load_row(u, log_u, k, K, vector, -1e9f);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            float z[8];
            load_row(z, x + min(first + i, n - 1) * K, k, K, vector, 0.f);  // past the end: the last row, unused
#pragma unroll
            for (int j = 0; j < 8; j++) z[j] = fmaf(z[j], scale, u[j] * LOG2E);
            total[i].add(z);
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
        if (lane == 0 && first + warp < n) parts[(first + warp) * gridDim.x + blockIdx.x] = part;
    }
}

// sums[panel, k] = sum over the panel's rows of v_b 2^(x_bk scale) u_k, as 2^tops[panel, k] times it in the first pass;
// a block has 256 columns: its warps take the rows in turn;  grid: K / 256, panels
template <typename T, bool FIRST>
__global__ void __launch_bounds__(THREADS) column_sums(
    float* tops, float* sums, const T* __restrict__ x, const LogSum* __restrict__ parts,
    const float* __restrict__ log_u, int64_t n, int64_t rows, int chunks, int64_t K, float scale, bool vector) {
    ColumnShared& shared = *shared_memory<ColumnShared>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t k = (int64_t)blockIdx.x * THREADS + lane * 8, first = blockIdx.y * rows;
    const int count = (int)min(rows, n - first);
    if (!FIRST && threadIdx.x < count) {
        const LogSum* own = parts + (first + threadIdx.x) * chunks;
        LogSum total = own[0];
        for (int c = 1; c < chunks; c++) {
            LogSum part = own[c];
            total.raise(part.top);
            total.sum += part.sum * exp2_fast(part.top - total.top);
        }
        shared.log_v[threadIdx.x] = -total.log2();
    }
    __syncthreads();
    float top[8], sum[8], u[8] = {};
#pragma unroll
    for (int j = 0; j < 8; j++) top[j] = -1e30f, sum[j] = 0;
    if (!FIRST) load_row(u, log_u, k, K, vector, 0.f);
#pragma unroll 4
    for (int b = warp; b < count; b += WARPS) {
        float z[8];
        load_row(z, x + (first + b) * K, k, K, vector, 0.f);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            if (FIRST) {
                const float own = z[j] * scale, most = fmaxf(top[j], own);
                sum[j] = sum[j] * exp2_fast(top[j] - most) + exp2_fast(own - most);
                top[j] = most;
            } else {
                sum[j] += exp2_fast(fmaf(z[j], scale, u[j] * LOG2E) + shared.log_v[b]);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        shared.sums[warp][lane * 8 + j] = sum[j];
        if (FIRST) shared.tops[warp][lane * 8 + j] = top[j];
    }
    __syncthreads();
    const int64_t column = (int64_t)blockIdx.x * THREADS + threadIdx.x, at = blockIdx.y * K + column;
    if (column >= K) return;
    float most = FIRST ? -1e30f : 0, total = 0;
    for (int w = 0; FIRST && w < WARPS; w++) most = fmaxf(most, shared.tops[w][threadIdx.x]);
    for (int w = 0; w < WARPS; w++)
        total += shared.sums[w][threadIdx.x] * (FIRST ? exp2_fast(shared.tops[w][threadIdx.x] - most) : 1.f);
    sums[at] = total;
    if (FIRST) tops[at] = most;
}

// log_r from the sums of all panels
template <bool FIRST>
__global__ void finish(
    float* log_r, const float* tops, const float* sums, const float* log_u, int64_t panels, int64_t K) {
    const int64_t k = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (k >= K) return;
    float most = FIRST ? -1e30f : 0, total = 0;
    for (int64_t p = 0; FIRST && p < panels; p++) most = fmaxf(most, tops[p * K + k]);
    for (int64_t p = 0; p < panels; p++) total += sums[p * K + k] * (FIRST ? exp2_fast(tops[p * K + k] - most) : 1.f);
    total = total < 1.2e-38f ? 1.2e-38f : total;  // keeps NaN
    log_r[k] = (float)(0.6931471805599453 * ((double)log2f(total) + (FIRST ? most : -log_u[k] * LOG2E)));
}

// q of one row for each block, which reads it twice, the second time from L1 or L2
template <typename T, typename Q>
__global__ void __launch_bounds__(THREADS) targets_of_row(
    Q* q, const T* x, const float* __restrict__ log_u, int64_t K, float scale, bool vector) {
    TargetShared& shared = *shared_memory<TargetShared>();
    const int64_t row = blockIdx.x * K;
    LogSum total;
    auto logits = [&](float (&z)[8], int64_t k) {
        float u[8];
        load_row(z, x + row, k, K, vector, 0.f);
        load_row(u, log_u, k, K, vector, -1e9f);
#pragma unroll
        for (int j = 0; j < 8; j++) z[j] = fmaf(z[j], scale, u[j] * LOG2E);
    };
    float z[8];
    for (int64_t k = threadIdx.x * 8; k < K; k += TILE) {
        logits(z, k);
        total.add(z);
    }
    total.over_warp();
    if (threadIdx.x % 32 == 0) shared.parts[threadIdx.x / 32] = total;
    __syncthreads();
    total = shared.parts[threadIdx.x % WARPS];
    if (threadIdx.x % 32 >= WARPS) total.sum = 0;  // each warp adds the parts of all
    total.over_warp();
    const float of_sum = 1 / total.sum;
    for (int64_t k = threadIdx.x * 8; k < K; k += TILE) {
        logits(z, k);
#pragma unroll
        for (int j = 0; j < 8; j++) z[j] = exp2_fast(z[j] - total.top) * of_sum;
        store_row(q + row, z, k, K, vector);
    }
}

// --------------------------------------------------------------------------------
// launchers

int64_t sinkhorn_scratch_cuda(int64_t n, int64_t K, Dtype dtype) {
    const int64_t panels = divide_up(n, panel_rows(K, dtype));
    return 2 * panels * K + 2 * n * divide_up(K, CHUNK);
}

template <typename T>
static cudaError_t run_pass(float* log_r, const T* x, const float* log_u, float* scratch, int64_t n, int64_t K,
                            float scale, Dtype dtype, cudaStream_t stream) {
    const int64_t rows = panel_rows(K, dtype), panels = divide_up(n, rows), chunks = divide_up(K, CHUNK);
    const int64_t blocks = divide_up(K, THREADS);
    const bool vector = K % 8 == 0 && (uintptr_t)x % 16 == 0 && (uintptr_t)log_u % 16 == 0;
    float *sums = scratch, *tops = sums + panels * K;
    LogSum* parts = (LogSum*)(tops + panels * K);  // 8 bytes each; 2 panels K floats lie before it
    if (!log_u) {
        const cudaError_t status = start(column_sums<T, true>, {blocks, panels}, THREADS, sizeof(ColumnShared), stream,
                                         tops, sums, x, nullptr, nullptr, n, rows, 0, K, scale, vector);
        if (status != cudaSuccess) return status;
        return start(finish<true>, blocks, THREADS, 0, stream, log_r, tops, sums, nullptr, panels, K);
    }
    for (int64_t p = 0; p < panels; p++) {
        const int64_t count = std::min(rows, n - p * rows);
        const T* panel = x + p * rows * K;
        cudaError_t status = start(row_sums<T>, {chunks, divide_up(count, ROWS)}, THREADS, sizeof(RowShared), stream,
                                   parts, panel, log_u, count, K, scale, vector);
        if (status == cudaSuccess)
            status = start(column_sums<T, false>, blocks, THREADS, sizeof(ColumnShared), stream, nullptr, sums + p * K,
                           panel, parts, log_u, count, rows, chunks, K, scale, vector);
        if (status != cudaSuccess) return status;
    }
    return start(finish<false>, blocks, THREADS, 0, stream, log_r, nullptr, sums, log_u, panels, K);
}

cudaError_t sinkhorn_pass_cuda(float* log_r, const void* logits, const float* log_u, float* scratch, int64_t n,
                               int64_t K, double temperature, Dtype dtype, cudaStream_t stream) {
    const float scale = 1.4426950408889634 / temperature;
    if (!n || !K) return cudaSuccess;  // of no rows: log_r stays what it is
    auto run = [&](auto* x) { return run_pass(log_r, x, log_u, scratch, n, K, scale, dtype, stream); };
    switch (dtype) {
        case Dtype::f32:  return run((const float*)logits);
        case Dtype::f16:  return run((const __half*)logits);
        case Dtype::bf16: return run((const __nv_bfloat16*)logits);
    }
    return cudaErrorInvalidValue;
}

template <typename T>
static cudaError_t run_targets(void* q, Dtype q_dtype, const T* x, const float* log_u, int64_t n, int64_t K,
                               float scale, cudaStream_t stream) {
    const bool vector = K % 8 == 0 && ((uintptr_t)x | (uintptr_t)log_u | (uintptr_t)q) % 16 == 0;
    auto run = [&](auto* to) {
        return start(targets_of_row<T, std::remove_pointer_t<decltype(to)>>, n, THREADS, sizeof(TargetShared), stream,
                     to, x, log_u, K, scale, vector);
    };
    switch (q_dtype) {
        case Dtype::f32:  return run((float*)q);
        case Dtype::f16:  return run((__half*)q);
        case Dtype::bf16: return run((__nv_bfloat16*)q);
    }
    return cudaErrorInvalidValue;
}

cudaError_t sinkhorn_targets_cuda(void* targets, Dtype target_dtype, const void* logits, const float* log_u, int64_t n,
                                  int64_t K, double temperature, Dtype dtype, cudaStream_t stream) {
    const float scale = 1.4426950408889634 / temperature;
    if (!n || !K) return cudaSuccess;
    auto run = [&](auto* x) { return run_targets(targets, target_dtype, x, log_u, n, K, scale, stream); };
    switch (dtype) {
        case Dtype::f32:  return run((const float*)logits);
        case Dtype::f16:  return run((const __half*)logits);
        case Dtype::bf16: return run((const __nv_bfloat16*)logits);
    }
    return cudaErrorInvalidValue;
}

// --------------------------------------------------------------------------------
// check against a loop in double
#ifdef ALONE
#include <cmath>
#include <cstdio>
#include <vector>

static float* on_device(size_t count, const float* from = nullptr) {
    float* there;
    cudaMalloc((void**)&there, count * sizeof(float));
    if (from) cudaMemcpy(there, from, count * sizeof(float), cudaMemcpyHostToDevice);
    return there;
}

static double check(int n, int K, double T, double spread) {
    std::vector<float> x(n * K), log_u(K), log_r(K), q(n * K);
    for (int i = 0; i < n * K; i++) x[i] = spread * (std::sin(1.7 * i) + std::sin(0.01 * i * (double)i));
    float *dx = on_device(n * K, x.data()), *dq = on_device(n * K), *du = on_device(K), *dr = on_device(K);
    float* scratch = on_device(sinkhorn_scratch_cuda(n, K, Dtype::f32));
    std::vector<double> u(K, 0), v(n, 0);
    double worst = 0;
    int failed = 0;
    auto normalise_rows = [&] {
        for (int b = 0; b < n; b++) {
            double c = 0;
            for (int k = 0; k < K; k++) c += std::exp(x[b * K + k] / T + u[k]);
            v[b] = -std::log(c);
        }
    };
    for (int pass = 0; pass < 3; pass++) {
        failed |= sinkhorn_pass_cuda(dr, dx, pass ? du : nullptr, scratch, n, K, T, Dtype::f32, 0);
        cudaMemcpy(log_r.data(), dr, K * 4, cudaMemcpyDeviceToHost);
        if (pass) normalise_rows();
        for (int k = 0; k < K; k++) {
            double r = 0;
            for (int b = 0; b < n; b++) r += std::exp(x[b * K + k] / T + v[b]);
            u[k] = -std::log(r);
            log_u[k] = -log_r[k];
            worst = std::fmax(worst, std::fabs(u[k] + log_r[k]));
        }
        cudaMemcpy(du, log_u.data(), K * 4, cudaMemcpyHostToDevice);
    }
    failed |= sinkhorn_targets_cuda(dq, Dtype::f32, dx, du, n, K, T, Dtype::f32, 0);
    cudaMemcpy(q.data(), dq, n * K * 4, cudaMemcpyDeviceToHost);
    normalise_rows();
    for (int i = 0; i < n * K; i++) worst = fmax(worst, fabs(q[i] - std::exp(x[i] / T + u[i % K] + v[i / K])));
    printf("%d x %d: %s, largest error %.2e\n", n, K, cudaGetErrorString((cudaError_t)failed), worst);
    return failed ? 1 : worst;
}

int main() {  // no multiples of what the kernel works in; one row; three panels; several chunks
    return !(check(37, 1003, .05, 1) < 2e-5 && check(1, 8, .07, 1) < 2e-5 && check(300, 264, .05, .5) < 2e-5 &&
             check(9, 9000, .07, .5) < 2e-5);
}
#endif
