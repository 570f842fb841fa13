/*
RoPE attention, backward, on tensor cores (mma.sync m16n8k16, sm_80 and later). Compiled for sm_90a; not run on a GPU.

    P     = exp2(log2(e) q k^T / sqrt(E) - lse)      q, k turned again from qkv; lse from the forward pass
    dS    = P (dout v^T - delta) / sqrt(E)           delta = sum over E of dout out
    dq    = turned back (dS k)                       dqkv  T 3 A E
    dk    = turned back (dS^T q)
    dv    = P^T dout

Two kernels, one after the other. The first owns queries, walks over the keys, and leaves dq and delta (A T); the second
owns keys, walks over the queries, and leaves dk and dv. Every sum is taken by one warp in a fixed order: no atomics,
the same bits every time. The price: 7 products instead of 5, as both compute P and dout v^T.
Bound by memory below N = 366 on an H200: 16 bytes for an element of T A E, and what both kernels read twice.

Alone: see rope_attention_forward.cu.
*/
#include "rope_attention.cuh"

// ----------------------------------------------------------------------------
// kernels

template <int E> constexpr int WARPS = E == 64 ? 8 : 6;          // of a block, at most: by registers; by shared memory
constexpr int KEYS = 64;                                         // in shared memory at a time, for dq
template <int E> constexpr int QUERIES = E == 64 ? 64 : 32;      // likewise, for dk and dv: their accumulators are many

template <typename T, int E>
__global__ void __launch_bounds__(WARPS<E> * 32, 1)
dq_kernel(T* dqkv, float* delta, const T* dout, const T* qkv, const T* out, const float* lse, RopeGroup group,
          int blocks, int64_t n_tokens, int A) {
    const int rows = blockDim.x / 2, warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4, g = lane / 4;
    T *q = shared_memory<T>(), *d = q + rows * LD<E>, *k = d + rows * LD<E>, *v = k + KEYS * LD<E>;
    const int a = blockIdx.x / blocks % A;
    const int64_t N = group.N, image = blockIdx.x / blocks / A, i = blockIdx.x % blocks * (int64_t)rows;  // first query
    const int64_t token = group.first + image * N, D = (int64_t)A * E, mine = i + warp * 16;
    const T* x = qkv + token * 3 * D + a * E;
    const float scale = rsqrtf(E);

    fetch_rows<T, E>(q, x, 3 * D, i, rows, N, group.cos, group.sin);
    fetch_rows<T, E>(d, dout + token * D + a * E, D, i, rows, N);
    __syncthreads();
    float shift[2] = {INFINITY, INFINITY}, part[2] = {};         // lse and delta of the rows g and g + 8
    for (int row = 0; row < 16 && mine + row < N; row++) {
        float sum = 0;
        for (int e = lane; e < E; e += 32)
            sum += to_float(d[(warp * 16 + row) * LD<E> + e]) * to_float(out[(token + mine + row) * D + a * E + e]);
        for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
        const int64_t at = a * n_tokens + token + mine + row;
        if (lane == 0) delta[at] = sum;
        if (row % 8 == g) shift[row / 8] = lse[at], part[row / 8] = sum;
    }
    float dq[E / 8][4] = {};
    for (int64_t j = 0; j < N; j += KEYS) {
        __syncthreads();
        fetch_rows<T, E>(k, x + D, 3 * D, j, KEYS, N, group.cos, group.sin);
        fetch_rows<T, E>(v, x + 2 * D, 3 * D, j, KEYS, N);
        __syncthreads();
        if (mine >= N) continue;
        float s[KEYS / 8][4], ds[KEYS / 8][4];
        dot_rows<T, E>(s, q + warp * 16 * LD<E>, k);
        dot_rows<T, E>(ds, d + warp * 16 * LD<E>, v);
        #pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
            #pragma unroll
            for (int c = 0; c < 4; c++) {
                const float p = j + 8 * n + 2 * t + c % 2 < N ? exp2f(s[n][c] * (scale * LOG2E) - shift[c / 2]) : 0;
                ds[n][c] = p * (ds[n][c] - part[c / 2]);
            }
        mix_rows<T, E>(dq, ds, k);
    }
    if (mine >= N) return;
    put_rows<T, E>(dqkv + token * 3 * D + a * E, 3 * D, mine, N, dq, {scale, scale}, group.cos, group.sin);
}

template <typename T, int E>
__global__ void __launch_bounds__(WARPS<E> * 32, 1)
dkdv_kernel(T* dqkv, const float* delta, const T* dout, const T* qkv, const float* lse, RopeGroup group, int blocks,
            int64_t n_tokens, int A) {
    constexpr int M = QUERIES<E>;
    const int rows = blockDim.x / 2, warp = threadIdx.x / 32, t = threadIdx.x % 4;
    T *k = shared_memory<T>(), *v = k + rows * LD<E>, *q = v + rows * LD<E>, *d = q + M * LD<E>;
    float *shift = (float*)(d + M * LD<E>), *part = shift + M;   // lse and delta of the queries
    const int a = blockIdx.x / blocks % A;
    const int64_t N = group.N, image = blockIdx.x / blocks / A, j = blockIdx.x % blocks * (int64_t)rows;  // first key
    const int64_t token = group.first + image * N, D = (int64_t)A * E, mine = j + warp * 16;
    const T* x = qkv + token * 3 * D + a * E;
    const float scale = rsqrtf(E);

    fetch_rows<T, E>(k, x + D, 3 * D, j, rows, N, group.cos, group.sin);
    fetch_rows<T, E>(v, x + 2 * D, 3 * D, j, rows, N);
    float dk[E / 8][4] = {}, dv[E / 8][4] = {};
    for (int64_t i = 0; i < N; i += M) {
        __syncthreads();
        fetch_rows<T, E>(q, x, 3 * D, i, M, N, group.cos, group.sin);
        fetch_rows<T, E>(d, dout + token * D + a * E, D, i, M, N);
        for (int n = threadIdx.x; n < M; n += blockDim.x) {
            shift[n] = i + n < N ? lse[a * n_tokens + token + i + n] : INFINITY;  // no such query: P = 0
            part[n] = i + n < N ? delta[a * n_tokens + token + i + n] : 0;
        }
        __syncthreads();
        if (mine >= N) continue;
        float p[M / 8][4], ds[M / 8][4];                         // transposed: keys by queries
        dot_rows<T, E>(p, k + warp * 16 * LD<E>, q);
        dot_rows<T, E>(ds, v + warp * 16 * LD<E>, d);
        #pragma unroll
        for (int n = 0; n < M / 8; n++)
            #pragma unroll
            for (int c = 0; c < 4; c++) {
                const int query = 8 * n + 2 * t + c % 2;
                p[n][c] = exp2f(p[n][c] * (scale * LOG2E) - shift[query]);
                ds[n][c] = p[n][c] * (ds[n][c] - part[query]);
            }
        mix_rows<T, E>(dv, p, d);
        mix_rows<T, E>(dk, ds, q);
    }
    if (mine >= N) return;
    T* y = dqkv + token * 3 * D + a * E;
    put_rows<T, E>(y + D, 3 * D, mine, N, dk, {scale, scale}, group.cos, group.sin);
    put_rows<T, E>(y + 2 * D, 3 * D, mine, N, dv, {1, 1});
}

// ----------------------------------------------------------------------------
// launcher

template <typename T, int E>
static cudaError_t launch(void* dqkv, float* delta, const void* dout, const void* qkv, const void* out,
                          const float* lse, const RopeGroup& group, int64_t n_tokens, int A, cudaStream_t stream) {
    const Split s = split(group.N, WARPS<E>);
    const int row = LD<E> * sizeof(T), own = 2 * s.warps * 16 * row, threads = s.warps * 32;
    const int64_t blocks = group.n * A * s.blocks;
    const cudaError_t status = start(dq_kernel<T, E>, blocks, threads, own + 2 * KEYS * row, stream, (T*)dqkv, delta,
        (const T*)dout, (const T*)qkv, (const T*)out, lse, group, s.blocks, n_tokens, A);
    if (status != cudaSuccess) return status;
    return start(dkdv_kernel<T, E>, blocks, threads, own + QUERIES<E> * (2 * row + 8), stream, (T*)dqkv, delta,
        (const T*)dout, (const T*)qkv, lse, group, s.blocks, n_tokens, A);
}

cudaError_t rope_attention_backward_cuda(void* dqkv, float* delta, const void* dout, const void* qkv, const void* out,
                                         const float* lse, const RopeGroup* groups, int n_groups, int64_t T, int A,
                                         int E, Dtype dtype, cudaStream_t stream) {
    if (dtype == Dtype::f32 || (E != 64 && E != 128)) return cudaErrorInvalidValue;
    const auto f = dtype == Dtype::f16 ? (E == 64 ? launch<__half, 64> : launch<__half, 128>)
                                       : (E == 64 ? launch<__nv_bfloat16, 64> : launch<__nv_bfloat16, 128>);
    for (const RopeGroup* g = groups; g < groups + n_groups; g++) {
        if (g->n * g->N * A == 0) continue;
        const cudaError_t status = f(dqkv, delta, dout, qkv, out, lse, *g, T, A, stream);
        if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}
