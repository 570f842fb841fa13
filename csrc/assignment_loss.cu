/*
Cross-entropies of student logits against the teacher's assignments, and their gradients, on a GPU. The assignments are
never written to memory.

    q_tbk     = softmax over k of teacher_tbk / teacher_temp + log u_k
    loss_sb   = -weight_b sum_t pairs_st sum_k q_tbk log_softmax(student_sb / student_temp)_k
    grad_sbk  = weight_b / student_temp (sum_t pairs_st softmax(student_sb / student_temp)_k - sum_t pairs_st q_tbk)

    student, grad  S B K    teacher  T B K, the same dtype    log_u  K    weights  B    pairs  S T    losses  S B

Bound by memory: student and teacher are read and the gradient is written once, 6 bytes an element in bf16. A block has
a row of the student: it adds up, then goes over the row again, kept in shared memory where that is large enough, and
over the teacher's rows, which are in L2 by then. 2 (1 + T) exp2 an element. Not run on a GPU.

No atomics and a fixed order of all sums: the same bits every time. grad may be student: a thread writes what it read.

Alone:  nvcc -std=c++17 -O3 -arch=native -DALONE csrc/assignment_loss.cu -o build/k && build/k
*/
#include "common.cuh"
#include "kernels.h"

static constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
static constexpr int THREADS = 512, WARPS = THREADS / 32, TILE = 8 * THREADS;  // 8 elements for each thread

// --------------------------------------------------------------------------------
// kernel

// sum 2^z and sum 2^z x over what was added so far, both as multiples of 2^top
struct WeightedLogSum : LogSum {
    float dot = 0;

    __device__ void add(const float (&z)[8], const float (&x)[8]) {
        float most = z[0];
#pragma unroll
        for (int j = 1; j < 8; j++) most = fmaxf(most, z[j]);
        if (most > top) dot *= exp2_fast(top - most);
        raise(most);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float e = exp2_fast(z[j] - top);
            sum += e;
            dot += e * x[j];
        }
    }
    __device__ void over_warp() {
        const float before = top;
        LogSum::over_warp();
        dot = warp_sum(dot * exp2_fast(before - top));
    }
};

// the same in all threads: `own` of each warp, added by every warp in the same order
template <typename Sum> __device__ inline Sum over_block(Sum own, float (&shared)[3][WARPS]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    own.over_warp();
    __syncthreads();  // nobody reads the last one any more
    if (lane == 0) {
        shared[0][warp] = own.top;
        shared[1][warp] = own.sum;
        if constexpr (sizeof(Sum) > sizeof(LogSum)) shared[2][warp] = own.dot;
    }
    __syncthreads();
    own.top = shared[0][lane % WARPS];
    own.sum = lane < WARPS ? shared[1][lane % WARPS] : 0;
    if constexpr (sizeof(Sum) > sizeof(LogSum)) own.dot = lane < WARPS ? shared[2][lane % WARPS] : 0;
    own.over_warp();
    return own;
}

// grid: B S blocks, the crops of an image one after another, so that they find its teacher rows in L2
template <typename X, int T>
__global__ void __launch_bounds__(THREADS) assignment_loss(
    float* losses, X* grad, const X* student, const X* __restrict__ teacher, const float* __restrict__ log_u,
    const float* __restrict__ weights, const float* __restrict__ pairs, int S, int64_t B, int64_t K,
    float student_scale, float teacher_scale, bool vector, bool keep) {
    auto& shared = *shared_memory<float[3][WARPS]>();
    X* kept = (X*)(&shared + 1);  // K, if `keep`: the row of the student
    const int s = blockIdx.x % S;
    const int64_t b = blockIdx.x / S, row = (s * B + b) * K;

    LogSum student_sum;
    WeightedLogSum teacher_sum[T];
    float x[8], z[8], u[8];
    for (int64_t k = threadIdx.x * 8; k < K; k += TILE) {
        load_row(x, student + row, k, K, vector, -1e9f);
        if (keep) store8(kept + k, x);
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] *= student_scale;
        student_sum.add(x);
        load_row(u, log_u, k, K, vector, -1e9f);
#pragma unroll
        for (int t = 0; t < T; t++) {
            load_row(z, teacher + (t * B + b) * K, k, K, vector, 0.f);
#pragma unroll
            for (int j = 0; j < 8; j++) z[j] = fmaf(z[j], teacher_scale, u[j] * LOG2E);
            teacher_sum[t].add(z, x);
        }
    }

    student_sum = over_block(student_sum, shared);
    const float log2_Z = student_sum.log2(), weight = weights[b];
    float pair[T], mass = 0, loss = 0;
#pragma unroll
    for (int t = 0; t < T; t++) {
        teacher_sum[t] = over_block(teacher_sum[t], shared);
        pair[t] = pairs[s * T + t];
        mass += pair[t];
        loss += pair[t] * (log2_Z - teacher_sum[t].dot / teacher_sum[t].sum);
        pair[t] /= teacher_sum[t].sum;
    }
    if (threadIdx.x == 0) losses[s * B + b] = weight * LN2 * loss;

    const float of_grad = weight * student_scale * LN2;  // weight / student_temp
    for (int64_t k = threadIdx.x * 8; k < K; k += TILE) {
        if (keep) load8(x, kept + k);
        else load_row(x, student + row, k, K, vector, 0.f);
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] = mass * exp2_fast(fmaf(x[j], student_scale, -log2_Z));
        load_row(u, log_u, k, K, vector, 0.f);
#pragma unroll
        for (int t = 0; t < T; t++) {
            load_row(z, teacher + (t * B + b) * K, k, K, vector, 0.f);
#pragma unroll
            for (int j = 0; j < 8; j++)
                x[j] -= pair[t] * exp2_fast(fmaf(z[j], teacher_scale, u[j] * LOG2E) - teacher_sum[t].top);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] *= of_grad;
        store_row(grad + row, x, k, K, vector);
    }
}

// --------------------------------------------------------------------------------
// launcher

template <typename X, int T>
static cudaError_t launch(float* losses, X* grad, const X* student, const X* teacher, const float* log_u,
                          const float* weights, const float* pairs, int64_t S, int64_t B, int64_t K,
                          float student_scale, float teacher_scale, cudaStream_t stream) {
    const uintptr_t places = (uintptr_t)grad | (uintptr_t)student | (uintptr_t)teacher | (uintptr_t)log_u;
    const bool vector = K % 8 == 0 && places % 16 == 0;
    int device, room;
    cudaError_t status = cudaGetDevice(&device);
    if (!status) status = cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status) return status;
    const int64_t least = sizeof(float[3][WARPS]), bytes = least + K * (int64_t)sizeof(X);
    const bool keep = vector && bytes <= room;
    return start(assignment_loss<X, T>, S * B, THREADS, keep ? bytes : least, stream, losses, grad, student, teacher,
                 log_u, weights, pairs, (int)S, B, K, student_scale, teacher_scale, vector, keep);
}

cudaError_t assignment_loss_cuda(float* losses, void* grad, const void* student, const void* teacher,
                                 const float* log_u, const float* weights, const float* pairs, int64_t S, int64_t T,
                                 int64_t B, int64_t K, double student_temp, double teacher_temp, Dtype dtype,
                                 cudaStream_t stream) {
    if (!(S * B * K)) return cudaSuccess;
    if (T != 1 && T != 2) return cudaErrorInvalidValue;
    const float student_scale = 1.4426950408889634 / student_temp, teacher_scale = 1.4426950408889634 / teacher_temp;
    auto run = [&](auto* g) {
        using X = decltype(g);
        auto kernel = T == 1 ? launch<std::remove_pointer_t<X>, 1> : launch<std::remove_pointer_t<X>, 2>;
        return kernel(losses, g, (X)student, (X)teacher, log_u, weights, pairs, S, B, K, student_scale, teacher_scale,
                      stream);
    };
    switch (dtype) {
        case Dtype::f32:  return run((float*)grad);
        case Dtype::f16:  return run((__half*)grad);
        case Dtype::bf16: return run((__nv_bfloat16*)grad);
    }
    return cudaErrorInvalidValue;
}

// --------------------------------------------------------------------------------
// check against a loop in double

#ifdef ALONE
#include <cmath>
#include <cstdio>
#include <vector>

template <typename T> static T* copy(const std::vector<T>& x) {
    T* there;
    cudaMalloc((void**)&there, x.size() * sizeof(T));
    cudaMemcpy(there, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice);
    return there;
}

static double check(int S, int T, int B, int K, bool overwrite) {
    const double ts = 0.1, tt = 0.05;
    std::vector<float> x(S * B * K), y(T * B * K), u(K), w(B), pairs(S * T), g(S * B * K), losses(S * B);
    for (int i = 0; i < S * B * K; i++) x[i] = 0.5 * std::sin(1.7 * i);
    for (int i = 0; i < T * B * K; i++) y[i] = 0.5 * std::sin(0.01 * i * (double)i);
    for (int k = 0; k < K; k++) u[k] = std::cos(k);
    for (int b = 0; b < B; b++) w[b] = 1.f / (b + 1);
    for (int i = 0; i < S * T; i++) pairs[i] = T == 1 || i / T != i % T;
    float *dx = copy(x), *dg = overwrite ? dx : copy(g), *dl = copy(losses);
    cudaError_t status = assignment_loss_cuda(dl, dg, dx, copy(y), copy(u), copy(w), copy(pairs), S, T, B, K, ts, tt,
                                              Dtype::f32, 0);
    cudaMemcpy(g.data(), dg, g.size() * 4, cudaMemcpyDeviceToHost);
    cudaMemcpy(losses.data(), dl, losses.size() * 4, cudaMemcpyDeviceToHost);
    double worst = 0;
    for (int i = 0; i < S * B; i++) {
        const int s = i / B, b = i % B;
        double Z = 0, loss = 0, mass = 0;
        std::vector<double> a(K, 0);
        for (int k = 0; k < K; k++) Z += std::exp(x[i * K + k] / ts);
        for (int t = 0; t < T; t++) {
            double c = 0;
            const float* row = y.data() + (t * B + b) * K;
            for (int k = 0; k < K; k++) c += std::exp(row[k] / tt + u[k]);
            for (int k = 0; k < K; k++) a[k] += pairs[s * T + t] * std::exp(row[k] / tt + u[k]) / c;
            mass += pairs[s * T + t];
        }
        for (int k = 0; k < K; k++) {
            loss -= w[b] * a[k] * (x[i * K + k] / ts - std::log(Z));
            const double grad = w[b] / ts * (mass * std::exp(x[i * K + k] / ts) / Z - a[k]);
            worst = std::fmax(worst, std::fabs(g[i * K + k] - grad));
        }
        worst = std::fmax(worst, std::fabs(losses[i] - loss));
    }
    printf("S %d T %d B %d K %d: %s, largest error %.2e\n", S, T, B, K, cudaGetErrorString(status), worst);
    return status ? 1 : worst;
}

int main() {  // with vectors and without, kept in shared memory and not
    return !(check(1, 1, 7, 1003, false) < 2e-5 && check(5, 2, 3, 1000, true) < 2e-5 &&
             check(3, 2, 2, 20001, true) < 2e-5 && check(1, 1, 2, 70000, false) < 2e-5 &&
             check(2, 1, 3, 9000, false) < 2e-5);
}
#endif
