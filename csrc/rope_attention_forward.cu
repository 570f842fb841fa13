/*
RoPE attention, forward, on tensor cores (mma.sync m16n8k16, sm_80 and later). Compiled for sm_90a; not run on a GPU.

    q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]        T 3 A E, bf16 or f16, E = 64 or 128; one image after another
    q, k    = (a cos - b sin, b cos + a sin)         a, b = first, second half of E; float32, rounded to T once
    out     = softmax(q k^T / sqrt(E)) v             T A E
    lse     = log2 sum exp2(log2(e) q k^T / sqrt(E)) A T, for the backward pass

A block takes up to 144 queries of one image and head, a warp 16 of them; keys and values pass through shared memory, 64
at a time, and are turned on their way; softmax online. Reads qkv and writes out where they lie: no transpose, no copy.
Bound by memory below N = 366 on an H200: 8 bytes for an element of T A E. A second block of a head reads its k and v
again, from L2. Nothing is prefetched: other blocks of the multiprocessor fill the wait. A launch for each crop group.

Alone:  nvcc -std=c++20 -O3 -arch=native -DALONE csrc/rope_attention_*.cu -o build/k && build/k
*/
#include "rope_attention.cuh"

// ----------------------------------------------------------------------------
// kernel

constexpr int KEYS = 64;  // that are in shared memory at a time
constexpr int WARPS = 9;  // of a block, at most: 261 tokens are 2 blocks

template <typename T, int E>
__global__ void __launch_bounds__(WARPS * 32)
forward_kernel(T* out, float* lse, const T* qkv, RopeGroup group, int blocks, int64_t n_tokens, int A) {
    const int rows = blockDim.x / 2, warp = threadIdx.x / 32, t = threadIdx.x % 4, g = threadIdx.x % 32 / 4;
    T *q = shared_memory<T>(), *k = q + rows * LD<E>, *v = k + KEYS * LD<E>;
    const int a = blockIdx.x / blocks % A;
    const int64_t N = group.N, image = blockIdx.x / blocks / A, i = blockIdx.x % blocks * (int64_t)rows;  // first query
    const int64_t token = group.first + image * N, D = (int64_t)A * E, mine = i + warp * 16;
    const T* x = qkv + token * 3 * D + a * E;
    const float scale = LOG2E * rsqrtf(E);

    fetch_rows<T, E>(q, x, 3 * D, i, rows, N, group.cos, group.sin);
    float o[E / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};  // of the rows g and g + 8
    for (int64_t j = 0; j < N; j += KEYS) {
        __syncthreads();
        fetch_rows<T, E>(k, x + D, 3 * D, j, KEYS, N, group.cos, group.sin);
        fetch_rows<T, E>(v, x + 2 * D, 3 * D, j, KEYS, N);
        __syncthreads();
        if (mine >= N) continue;
        float s[KEYS / 8][4];
        dot_rows<T, E>(s, q + warp * 16 * LD<E>, k);
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = top[half];
            #pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
                for (int c = 2 * half; c < 2 * half + 2; c++) {
                    s[n][c] = j + 8 * n + 2 * t + c % 2 < N ? s[n][c] * scale : -INFINITY;
                    most = fmaxf(most, s[n][c]);
                }
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            const float shrink = exp2_fast(top[half] - most);  // 0 at first
            top[half] = most, sum[half] *= shrink;
            #pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
                for (int c = 2 * half; c < 2 * half + 2; c++) sum[half] += s[n][c] = exp2_fast(s[n][c] - most);
            #pragma unroll
            for (int n = 0; n < E / 8; n++) o[n][2 * half] *= shrink, o[n][2 * half + 1] *= shrink;
        }
        mix_rows<T, E>(o, s, v);
    }
    if (mine >= N) return;
    float inverse[2];
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
        sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
        inverse[half] = 1 / sum[half];
        const int64_t query = mine + g + 8 * half;
        if (t == 0 && query < N) lse[a * n_tokens + token + query] = top[half] + log2f(sum[half]);
    }
    put_rows<T, E>(out + token * D + a * E, D, mine, N, o, inverse);
}

// ----------------------------------------------------------------------------
// launcher

template <typename T, int E>
static cudaError_t launch(void* out, float* lse, const void* qkv, const RopeGroup& group, int64_t n_tokens, int A,
                          cudaStream_t stream) {
    const Split s = split(group.N, WARPS);
    const int shared = (s.warps * 16 + 2 * KEYS) * LD<E> * sizeof(T);
    return start(forward_kernel<T, E>, group.n * A * s.blocks, s.warps * 32, shared, stream, (T*)out, lse,
                 (const T*)qkv, group, s.blocks, n_tokens, A);
}

cudaError_t rope_attention_cuda(void* out, float* lse, const void* qkv, const RopeGroup* groups, int n_groups,
                           int64_t T, int A, int E, Dtype dtype, cudaStream_t stream) {
    if (dtype == Dtype::f32 || (E != 64 && E != 128)) return cudaErrorInvalidValue;
    const auto f = dtype == Dtype::f16 ? (E == 64 ? launch<__half, 64> : launch<__half, 128>)
                                       : (E == 64 ? launch<__nv_bfloat16, 64> : launch<__nv_bfloat16, 128>);
    for (const RopeGroup* g = groups; g < groups + n_groups; g++) {
        if (g->n * g->N * A == 0) continue;
        if (!aligned(*g, out, qkv)) return cudaErrorMisalignedAddress;
        const cudaError_t status = f(out, lse, qkv, *g, T, A, stream);
        if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

// ----------------------------------------------------------------------------
// check against loops in double

#ifdef ALONE
#include "rope_attention_check.h"

template <typename T> static T* on_device(const Floats& x) {
    std::vector<T> there(x.size());
    for (size_t i = 0; i < x.size(); i++) there[i] = from_float<T>(x[i]);
    T* p;
    cudaMalloc(&p, x.size() * sizeof(T));
    cudaMemcpy(p, there.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice);
    return p;
}

template <typename T> static cudaError_t on_host(Floats& to, const T* from) {
    std::vector<T> here(to.size());
    const cudaError_t status = cudaMemcpy(here.data(), from, to.size() * sizeof(T), cudaMemcpyDeviceToHost);
    for (size_t i = 0; i < to.size(); i++) to[i] = status == cudaSuccess ? to_float(here[i]) : NAN;
    return status;
}

template <typename T, auto forward> static void run(const Problem& p, Floats& out, Floats& dqkv) {
    const Dtype dtype = std::is_same_v<T, __half> ? Dtype::f16 : Dtype::bf16;
    auto *qkv = on_device<T>(p.qkv), *dout = on_device<T>(p.dout), *out_ = on_device<T>(out);
    auto* dqkv_ = on_device<T>(dqkv);
    const Floats rows(p.T * p.A);
    float *lse = on_device<float>(rows), *delta = on_device<float>(rows);
    std::vector<RopeGroup> groups;
    int64_t first = 0;
    for (size_t g = 0; g < p.groups.size(); first += p.groups[g].n * p.groups[g].N, g++)
        groups.push_back({first, p.groups[g].n, p.groups[g].N, on_device<float>(p.cos[g]), on_device<float>(p.sin[g])});
    cudaError_t status = forward(out_, lse, qkv, groups.data(), groups.size(), p.T, p.A, p.E, dtype, 0);
    if (status == cudaSuccess)
        status = rope_attention_backward_cuda(dqkv_, delta, dout, qkv, out_, lse, groups.data(), groups.size(), p.T,
                                              p.A, p.E, dtype, 0);
    for (cudaError_t copied : {on_host(out, out_), on_host(dqkv, dqkv_)})
        if (status == cudaSuccess) status = copied;
    if (status != cudaSuccess) out.assign(out.size(), NAN), printf("%s\n", cudaGetErrorString(status));
}

int main() {  // 3 and 4 digits of results of size 1; one group and two, one block of a head and several
    bool good = true;
    for (int E : {64, 128})
        for (const auto& groups : {std::vector<Crops>{{2, 1}, {1, 21}}, {{1, 150}}}) {
            const Problem problem(groups, groups.size(), E);
            good &= check("bfloat16", problem, 3e-2, run<__nv_bfloat16, rope_attention_cuda>);
            good &= check("float16 ", problem, 4e-3, run<__half, rope_attention_cuda>);
            good &= check("bfloat16, resident", problem, 3e-2, run<__nv_bfloat16, rope_attention_resident_cuda>);
            good &= check("float16, resident ", problem, 4e-3, run<__half, rope_attention_resident_cuda>);
        }
    return !good;
}
#endif
