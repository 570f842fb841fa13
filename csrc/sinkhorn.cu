/*
One pass of Sinkhorn-Knopp, and the assignments that the last one leads to, on a GPU.

    pass      log r_k = log sum_b v_b exp(x_bk / T)       v_b = 1 / sum_k u_k exp(x_bk / T), or 1 where log_u is null
    targets   q_bk    = softmax over k of x_bk / T + log u_k

    x  n K    log_u, log_r  K, f32    q  n K

Bound by memory: every pass reads x once, 2 bytes an element in bf16, as a panel of up to 256 rows and 24 MB stays in L2
between its row sums and its column sums; there it is read twice, beside 4/4 bytes of u and, by every block of columns,
the parts of the panel's row sums: .4 bytes. Up to 2.25 exp2 an element. A pass is two launches a panel; the first one
or two in all. Of a copy's speed on an H200: .59 at 1274 x 98304. By clusters, clusters.cuh, a pass reads x once and no
more, with 1.4 exp2 an element, in two launches in all; that form has not run on a GPU, and nothing chooses it yet.

No atomics and a fixed order of all sums: the same bits every time. With u from a pass, the column sums of the next one
lie in [1/(n K), n] if u scales them, so that only row sums, and the first pass, carry their largest exponent along.

Alone:  nvcc -std=c++20 -O3 -arch=native -DALONE csrc/sinkhorn.cu -o build/k && build/k
*/
#include <algorithm>
#include <type_traits>

#include "clusters.cuh"
#include "kernels.h"

static constexpr int THREADS = 256, WARPS = THREADS / 32;
static constexpr int MOST = THREADS;    // rows of a panel
static constexpr int BLOCKS = 2048;     // that fill a GPU, of the first pass

// --------------------------------------------------------------------------------
// kernels

// log r_k from 2^top sum, what u scaled divided out again
__device__ inline float log_of(float top, float sum, float log_u) {
    sum = sum < 1.2e-38f ? 1.2e-38f : sum;  // keeps NaN
    return (float)(0.6931471805599453 * ((double)log2f(sum) + top) - log_u);
}

struct ColumnShared { float sums[WARPS][THREADS], log_v[MOST]; };

// sums[k] += sum over the panel's rows of v_b 2^(x_bk scale) u_k, from 0 on in the first panel; log_r after the last.
// A block has 256 columns: its warps take the rows in turn.  grid: K / 256
template <typename T, bool VECTOR>
__global__ void __launch_bounds__(THREADS) column_sums(
    float* log_r, float* sums, const T* __restrict__ x, const LogSum* __restrict__ parts,
    const float* __restrict__ log_u, int rows, int64_t K, float scale, bool is_first, bool is_last) {
    ColumnShared& shared = *shared_memory<ColumnShared>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int chunks = row_sums::chunks(K);
    int64_t k = (int64_t)blockIdx.x * THREADS + lane * 8;
    if (VECTOR) k = min(k, K - 8);  // past the end: the last ones, unused
    if (threadIdx.x < rows) {       // one row each, of which neighbours' parts lie side by side
        LogSum total;
#pragma unroll 4
        for (int c = 0; c < chunks; c++) total.add(parts[c * (int64_t)rows + threadIdx.x]);
        shared.log_v[threadIdx.x] = -total.log2();
    }
    float sum[8] = {}, u[8];
    load_row<VECTOR>(u, log_u, k, K, 0.f);
#pragma unroll
    for (int j = 0; j < 8; j++) u[j] *= LOG2E;
    __syncthreads();
#pragma unroll 4
    for (int b = warp; b < rows; b += WARPS) {
        float z[8];
        load_row<VECTOR>(z, x + b * K, k, K, 0.f);
        const float log_v = shared.log_v[b];
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += exp2_fast(fmaf(z[j], scale, u[j]) + log_v);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) shared.sums[warp][lane * 8 + j] = sum[j];
    __syncthreads();
    const int64_t column = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (column >= K) return;
    float total = is_first ? 0 : sums[column];
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += shared.sums[w][threadIdx.x];
    if (is_last) log_r[column] = log_of(0, total, log_u[column]);
    else sums[column] = total;
}

struct FirstShared { LogSum parts[WARPS][THREADS]; };

// the same of the first pass, v = 1: parts[strip, k], or log_r where there is one strip of rows.  grid: K / 256, strips
template <typename T, bool VECTOR>
__global__ void __launch_bounds__(THREADS) first_column_sums(
    float* log_r, LogSum* parts, const T* __restrict__ x, int64_t n, int64_t rows, int64_t K, float scale) {
    FirstShared& shared = *shared_memory<FirstShared>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int64_t k = (int64_t)blockIdx.x * THREADS + lane * 8;
    if (VECTOR) k = min(k, K - 8);
    const int64_t end = min((blockIdx.y + (int64_t)1) * rows, n);
    LogSum total[8];
#pragma unroll 4
    for (int64_t b = blockIdx.y * rows + warp; b < end; b += WARPS) {
        float z[8];
        load_row<VECTOR>(z, x + b * K, k, K, 0.f);
#pragma unroll
        for (int j = 0; j < 8; j++) total[j].add(LogSum{z[j] * scale, 1});
    }
#pragma unroll
    for (int j = 0; j < 8; j++) shared.parts[warp][lane * 8 + j] = total[j];
    __syncthreads();
    const int64_t column = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (column >= K) return;
    LogSum all;
    for (int w = 0; w < WARPS; w++) all.add(shared.parts[w][threadIdx.x]);
    if (gridDim.y == 1) log_r[column] = log_of(all.top, all.sum, 0);
    else parts[blockIdx.y * K + column] = all;
}

// log_r from the parts of all strips
__global__ void finish_first(float* log_r, const LogSum* parts, int64_t strips, int64_t K) {
    const int64_t k = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (k >= K) return;
    LogSum all;
    for (int64_t s = 0; s < strips; s++) all.add(parts[s * K + k]);
    log_r[k] = log_of(all.top, all.sum, 0);
}

// parts[cluster, k] = sum over the cluster's rows, every gridDim / SIZE-th, of v_b 2^(x_bk scale) u_k.  A row's sum
// travels while the powers of the next one are made.  grid: clusters SIZE
template <typename T, int G>
__global__ void __launch_bounds__(clusters::THREADS) column_sums_by_clusters(
    float* parts, const T* __restrict__ x, const float* __restrict__ log_u, int64_t n, int64_t K, float scale) {
    using namespace clusters;
    Mail<1>& mail = *shared_memory<Mail<1>>();
    const int64_t first = blockIdx.x / SIZE, by = gridDim.x / SIZE;
    const unsigned rows = (n - first + by - 1) / by;
    Ring<T, G> ring(&mail + 1, x, first, by, n, K);
    for (int i = 0; i < STAGES - 1; i++) ring.begin(), end_group();
    float u[G][8], p[G][8], r[G][8] = {}, top;
    load_log2(u, log_u, K);
    mail.open();
    LogSum of_warp;
    auto make = [&](float (&z)[G][8]) {  // the powers of the next row, over 2^ what it returns
        wait_for_copies<STAGES - 2>();
        ring.take(z);
        ring.begin(), end_group();
#pragma unroll
        for (int c = 0; c < 8 * G; c++) z[c / 8][c % 8] = fmaf(z[c / 8][c % 8], scale, u[c / 8][c % 8]);
        const LogSum own = of_warp = powers(z);
        of_warp.over_warp();
        return own.top;
    };
    auto add = [&](const LogSum& row) {
        const float v = __fdividef(exp2_fast(top - row.top), row.sum);
#pragma unroll
        for (int c = 0; c < 8 * G; c++) r[c / 8][c % 8] = fmaf(p[c / 8][c % 8], v, r[c / 8][c % 8]);
    };
    top = make(p);
    mail.tell(0, 0, {of_warp.top, of_warp.sum});
#pragma unroll 2
    for (unsigned i = 1; i < rows; i++) {
        float z[G][8];
        const float next = make(z);
        mail.wait(i - 1);
        const LogSum row = mail.whole(i - 1, 0);
        mail.tell(i, 0, {of_warp.top, of_warp.sum});
        add(row);
        top = next;
#pragma unroll
        for (int c = 0; c < 8 * G; c++) p[c / 8][c % 8] = z[c / 8][c % 8];
    }
    mail.wait(rows - 1);
    add(mail.whole(rows - 1, 0));
#pragma unroll
    for (int g = 0; g < G; g++)
        if (column<G>(g) < K) store8(parts + first * K + column<G>(g), r[g]);
}

// log_r from the parts of all clusters
__global__ void finish_clusters(float* log_r, const float* parts, const float* log_u, int count, int64_t K) {
    const int64_t k = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (k >= K) return;
    float total = 0;
#pragma unroll 4
    for (int c = 0; c < count; c++) total += parts[c * K + k];
    log_r[k] = log_of(0, total, log_u[k]);
}

struct TargetShared { LogSum parts[WARPS]; };

// q of one row for each block, which reads it twice, the second time from L1 or L2
template <typename T, typename Q, bool VECTOR>
__global__ void __launch_bounds__(THREADS) targets_of_row(
    Q* q, const T* x, const float* __restrict__ log_u, int64_t K, float scale) {
    TargetShared& shared = *shared_memory<TargetShared>();
    const int64_t row = blockIdx.x * K;
    auto logits = [&](float (&z)[8], int64_t k) {
        float u[8];
        load_row<VECTOR>(z, x + row, k, K, 0.f);
        load_row<VECTOR>(u, log_u, k, K, -1e9f);
#pragma unroll
        for (int j = 0; j < 8; j++) z[j] = fmaf(z[j], scale, u[j] * LOG2E);
    };
    LogSum total;
    float z[8];
    for (int64_t k = threadIdx.x * 8; k < K; k += 8 * THREADS) {
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
    for (int64_t k = threadIdx.x * 8; k < K; k += 8 * THREADS) {
        logits(z, k);
#pragma unroll
        for (int j = 0; j < 8; j++) z[j] = exp2_fast(z[j] - total.top) * of_sum;
        store_row<VECTOR>(q + row, z, k, K);
    }
}

// --------------------------------------------------------------------------------
// launchers

static int64_t panel_rows(int64_t K, Dtype dtype) {
    const int64_t fit = (24 << 20) / (K * (dtype == Dtype::f32 ? 4 : 2));
    return std::max<int64_t>(WARPS, std::min<int64_t>(MOST, fit / WARPS * WARPS));
}

// of rows in the first pass: enough blocks to fill a GPU, each with rows enough for its warps
static int64_t strips(int64_t n, int64_t K) {
    return std::min(divide_up(n, 4 * WARPS), divide_up(BLOCKS, divide_up(K, THREADS)));
}

int64_t sinkhorn_scratch_cuda(int64_t n, int64_t K, Dtype dtype) {
    const int64_t rows = std::min(n, panel_rows(K, dtype));
    const int64_t panels = K / 2 + 1 + rows * row_sums::chunks(K), by_clusters = clusters::MOST * K / 2;
    return 2 * std::max({strips(n, K) * K, panels, K <= clusters::GROUPS * clusters::COLUMNS ? by_clusters : 0});
}

template <typename T>
static cudaError_t first_pass(float* log_r, const T* x, float* scratch, int64_t n, int64_t K, float scale,
                              cudaStream_t stream) {
    LogSum* parts = (LogSum*)scratch;
    const int64_t blocks = divide_up(K, THREADS), rows = divide_up(n, strips(n, K)), count = divide_up(n, rows);
    auto kernel = vectors(K, x) ? first_column_sums<T, true> : first_column_sums<T, false>;
    const cudaError_t status = start(kernel, {blocks, count}, THREADS, sizeof(FirstShared), stream, log_r, parts, x, n,
                                     rows, K, scale);
    if (status != cudaSuccess || count == 1) return status;
    return start(finish_first, blocks, THREADS, 0, stream, log_r, parts, count, K);
}

template <typename T>
static cudaError_t next_pass(float* log_r, const T* x, const float* log_u, float* scratch, int64_t n, int64_t K,
                             float scale, Dtype dtype, cudaStream_t stream) {
    float* sums = scratch;
    LogSum* parts = (LogSum*)scratch + K / 2 + 1;  // behind K floats
    const int64_t most = panel_rows(K, dtype);
    auto kernel = vectors(K, x, log_u) ? column_sums<T, true> : column_sums<T, false>;
    for (int64_t b = 0; b < n; b += most) {
        const int64_t rows = std::min(most, n - b);
        const T* panel = x + b * K;
        cudaError_t status = row_sums::launch(parts, panel, log_u, rows, K, scale, stream);
        if (status == cudaSuccess)
            status = start(kernel, divide_up(K, THREADS), THREADS, sizeof(ColumnShared), stream, log_r, sums, panel,
                           parts, log_u, (int)rows, K, scale, b == 0, b + rows == n);
        if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

// the same, by so many clusters; 0 where the device knows none
template <typename T>
static cudaError_t pass_by_clusters(int& count, float* log_r, const T* x, const float* log_u, float* scratch,
                                    int64_t n, int64_t K, float scale, cudaStream_t stream) {
    const cudaError_t status = clusters::for_columns(K, [&](auto groups) {
        constexpr int G = decltype(groups)::value;
        return clusters::launch(count, column_sums_by_clusters<T, G>, sizeof(clusters::Mail<1>) +
                                clusters::Ring<T, G>::bytes, n, stream, scratch, x, log_u, n, K, scale);
    });
    if (status != cudaSuccess || !count) return status;
    return start(finish_clusters, divide_up(K, THREADS), THREADS, 0, stream, log_r, scratch, log_u, count, K);
}

cudaError_t sinkhorn_pass_cuda(float* log_r, const void* logits, const float* log_u, float* scratch, int64_t n,
                               int64_t K, double temperature, bool by_clusters, Dtype dtype, cudaStream_t stream) {
    const float scale = 1.4426950408889634 / temperature;
    if (!n || !K) return cudaSuccess;  // of no rows: log_r stays what it is
    auto run = [&](auto* x) {
        if (!log_u) return first_pass(log_r, x, scratch, n, K, scale, stream);
        if constexpr (std::is_same_v<decltype(x), const __nv_bfloat16*>) {
            int count = 0;
            if (by_clusters && clusters::fit(K, x, log_u)) {
                const cudaError_t status = pass_by_clusters(count, log_r, x, log_u, scratch, n, K, scale, stream);
                if (count || status != cudaSuccess) return status;
            }
        }
        return next_pass(log_r, x, log_u, scratch, n, K, scale, dtype, stream);
    };
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
    auto run = [&](auto* to) {
        using Q = std::remove_pointer_t<decltype(to)>;
        auto kernel = vectors(K, x, log_u, to) ? targets_of_row<T, Q, true> : targets_of_row<T, Q, false>;
        return start(kernel, n, THREADS, sizeof(TargetShared), stream, to, x, log_u, K, scale);
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

template <typename T> static bool check(Dtype dtype, int n, int K, double temperature, double spread,
                                       bool by_clusters = false) {
    std::vector<float> x(n * K), log_u(K), log_r(K), q(n * K);
    for (int i = 0; i < n * K; i++)
        x[i] = to_float(from_float<T>(spread * (std::sin(1.7 * i) + std::sin(0.01 * i * (double)i))));
    T* dx = on_device<T>(x);
    float *dq = on_device<float>(q), *du = on_device<float>(log_u), *dr = on_device<float>(log_r);
    float* scratch = on_device<float>(std::vector<float>(sinkhorn_scratch_cuda(n, K, dtype)));
    std::vector<double> u(K, 0), v(n, 0);
    double worst = 0;
    int failed = 0;
    auto normalise_rows = [&] {
        for (int b = 0; b < n; b++) {
            double c = 0;
            for (int k = 0; k < K; k++) c += std::exp(x[b * K + k] / temperature + u[k]);
            v[b] = -std::log(c);
        }
    };
    for (int pass = 0; pass < 3; pass++) {
        failed |= sinkhorn_pass_cuda(dr, dx, pass ? du : nullptr, scratch, n, K, temperature, by_clusters, dtype, 0);
        failed |= cudaMemcpy(log_r.data(), dr, K * 4, cudaMemcpyDeviceToHost);
        if (pass) normalise_rows();
        for (int k = 0; k < K; k++) {
            double r = 0;
            for (int b = 0; b < n; b++) r += std::exp(x[b * K + k] / temperature + v[b]);
            u[k] = -std::log(r);
            log_u[k] = -log_r[k];
            worst = std::fmax(worst, std::fabs(u[k] + log_r[k]));
        }
        cudaMemcpy(du, log_u.data(), K * 4, cudaMemcpyHostToDevice);
    }
    failed |= sinkhorn_targets_cuda(dq, Dtype::f32, dx, du, n, K, temperature, dtype, 0);
    failed |= cudaMemcpy(q.data(), dq, n * K * 4, cudaMemcpyDeviceToHost);
    normalise_rows();
    for (int i = 0; i < n * K; i++) {
        const double error = std::fabs(q[i] - std::exp(x[i] / temperature + u[i % K] + v[i / K]));
        worst = error <= worst ? worst : error;  // NaN counts
    }
    printf("%d x %d: %s, largest error %.2e\n", n, K, cudaGetErrorString((cudaError_t)failed), worst);
    return !failed && worst < 2e-5;
}

int main() {  // no multiples of what the kernel works in; one row; two panels; several chunks; each dtype; clusters
    bool good = check<float>(Dtype::f32, 37, 1003, .05, 1) & check<float>(Dtype::f32, 1, 8, .07, 1);
    good &= check<__nv_bfloat16>(Dtype::bf16, 300, 264, .05, .5) & check<__half>(Dtype::f16, 9, 9000, .07, .5);
    good &= check<__nv_bfloat16>(Dtype::bf16, 5, 40000, .05, .5, true) &
            check<__nv_bfloat16>(Dtype::bf16, 7, 264, .07, .5, true);
    return !good;
}
#endif
