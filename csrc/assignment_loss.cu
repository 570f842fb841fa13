/*
Cross-entropies of student logits against the teacher's assignments, and their gradients, on a GPU. The assignments are
never written to memory.

    q_tbk     = softmax over k of teacher_tbk / teacher_temp + log u_k
    loss_sb   = -weight_b sum_t pairs_st sum_k q_tbk log_softmax(student_sb / student_temp)_k
    grad_sbk  = weight_b / student_temp (sum_t pairs_st softmax(student_sb / student_temp)_k - sum_t pairs_st q_tbk)

    student, grad  S B K    teacher  T B K, the same dtype    log_u  K    weights  B    pairs  S T    losses  S B

Two kernels. The first adds up the teacher's rows, once for all crops of the student. In the second a block has a row of
the student: it adds up, then goes over the row again, kept in shared memory where that is large enough, and over the
teacher's. Bound by memory: in bf16 an element of the student moves 4 + 4 T / S bytes from and to it, and, through L2,
8 + 2 T and (2 + 4/4) T / S. 2 + T + T / S exp2. A third, for one crop each, shares a row among the blocks of a cluster,
clusters.cuh, and reads each logit once: 6 bytes of a pair, 2.8 exp2; it has not run on a GPU, and nothing chooses it.

No atomics and a fixed order of all sums: the same bits every time. grad may be student: a thread writes what it read.

Alone:  nvcc -std=c++20 -O3 -arch=native -DALONE csrc/assignment_loss.cu -o build/k && build/k
*/
#include "clusters.cuh"
#include "kernels.h"

static constexpr float LN2 = 0.6931471805599453f;
static constexpr int THREADS = 512, WARPS = THREADS / 32, TILE = 8 * THREADS;  // 8 elements for each thread

// --------------------------------------------------------------------------------
// kernel

template <int T> struct alignas(16) Shared {  // behind it the student's row, if it is kept
    LogSum student[WARPS], teacher[T];
    float dots[WARPS];
};

// grid: B S blocks, the crops of an image one after another, so that they find its teacher rows in L2
template <typename X, int T, bool VECTOR, bool KEEP>
__global__ void __launch_bounds__(THREADS, 2) assignment_loss(
    float* losses, X* grad, const X* student, const X* __restrict__ teacher, const LogSum* __restrict__ parts,
    const float* __restrict__ log_u, const float* __restrict__ weights, const float* __restrict__ pairs, int S,
    int64_t B, int64_t K, float student_scale, float teacher_scale) {
    Shared<T>& shared = *shared_memory<Shared<T>>();
    X* kept = (X*)(&shared + 1);
    constexpr int AHEAD = sizeof(X) == 2 ? 2 : 1;  // tiles whose loads are under way at once, as registers allow
    const int s = blockIdx.x % S, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t b = blockIdx.x / S, row = (s * B + b) * K;

    LogSum student_sum;
    float x[8], z[T][8], u[8];
    for (int64_t k = threadIdx.x * 8; k < K; k += TILE) {
        load_row<VECTOR>(x, student + row, k, K, -INFINITY);
        if (KEEP) store8(kept + k, x);
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] *= student_scale;
        student_sum.add(x);
    }
    student_sum.over_warp();
    if (lane == 0) shared.student[warp] = student_sum;
    if (warp < T) {  // a warp for each row of the teacher
        LogSum part;
        for (int64_t c = lane; c < row_sums::chunks(K); c += 32) part.add(parts[(c * T + warp) * B + b]);
        part.over_warp();
        if (lane == 0) shared.teacher[warp] = part;
    }
    __syncthreads();

    student_sum = shared.student[lane % WARPS];
    if (lane >= WARPS) student_sum.sum = 0;  // each warp adds the parts of all
    student_sum.over_warp();
    const float log2_Z = student_sum.log2(), weight = weights[b];
    float top[T], factor[T], mass = 0, dot = 0;
#pragma unroll
    for (int t = 0; t < T; t++) {
        const float pair = pairs[s * T + t];
        mass += pair;
        top[t] = shared.teacher[t].top, factor[t] = pair / shared.teacher[t].sum;
    }
    const float of_grad = weight * student_scale * LN2;  // weight / student_temp
#pragma unroll(AHEAD)
    for (int64_t k = threadIdx.x * 8; k < K; k += TILE) {
        if (KEEP) load8(x, kept + k);
        else load_row<VECTOR>(x, student + row, k, K, 0.f);
        load_row<VECTOR>(u, log_u, k, K, -1e9f);
#pragma unroll
        for (int t = 0; t < T; t++) load_row<VECTOR>(z[t], teacher + (t * B + b) * K, k, K, 0.f);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float q = 0;
#pragma unroll
            for (int t = 0; t < T; t++)
                q += factor[t] * exp2_fast(fmaf(z[t][j], teacher_scale, u[j] * LOG2E) - top[t]);
            const float own = fmaf(x[j], student_scale, -log2_Z);  // log2 of the softmax
            dot += q * own;
            x[j] = of_grad * (mass * exp2_fast(own) - q);
        }
        store_row<VECTOR>(grad + row, x, k, K);
    }
    dot = warp_sum(dot);
    if (lane == 0) shared.dots[warp] = dot;
    __syncthreads();
    if (warp == 0) {
        dot = warp_sum(lane < WARPS ? shared.dots[lane] : 0);
        if (lane == 0) losses[s * B + b] = -weight * LN2 * dot;
    }
}

// The same of one crop each, a row in a cluster at a time, whose powers stay in registers: each logit is read once.
// grid: clusters SIZE
template <typename X, int G>
__global__ void __launch_bounds__(clusters::THREADS) assignment_loss_by_clusters(
    float* losses, X* grad, const X* student, const X* __restrict__ teacher, const float* __restrict__ log_u,
    const float* __restrict__ weights, const float* __restrict__ pairs, int64_t B, int64_t K, float student_scale,
    float teacher_scale) {
    using namespace clusters;
    Mail<3>& mail = *shared_memory<Mail<3>>();  // of the teacher's row, its dot with the student's, the student's
    const int64_t first = blockIdx.x / SIZE, by = gridDim.x / SIZE;
    Ring<X, G> teachers(&mail + 1, teacher, first, by, B, K);
    Ring<X, G> students((X*)(&mail + 1) + teachers.bytes / sizeof(X), student, first, by, B, K);
    for (int i = 0; i < STAGES - 1; i++) teachers.begin(), students.begin(), end_group();
    float u[G][8];
    load_log2(u, log_u, K);
    mail.open();
    int64_t b = first;
    for (unsigned i = 0; b < B; i++, b += by) {
        float q[G][8], p[G][8], dot = 0;
        wait_for_copies<STAGES - 2>();
        teachers.take(q), students.take(p);
        teachers.begin(), students.begin(), end_group();
#pragma unroll
        for (int c = 0; c < 8 * G; c++) q[c / 8][c % 8] = fmaf(q[c / 8][c % 8], teacher_scale, u[c / 8][c % 8]);
        const LogSum own_q = powers(q);
#pragma unroll
        for (int c = 0; c < 8 * G; c++) {
            p[c / 8][c % 8] = column<G>(c / 8) < K ? p[c / 8][c % 8] * student_scale : -1e9f;
            dot = fmaf(q[c / 8][c % 8], p[c / 8][c % 8], dot);
        }
        const LogSum own_p = powers(p);
        LogSum of_q = own_q, of_p = own_p;
        of_q.over_warp(), of_p.over_warp();
        dot = warp_sum(dot * exp2_fast(own_q.top - of_q.top));
        mail.tell(i, 0, {of_q.top, of_q.sum});
        mail.tell(i, 1, {of_q.top, dot});
        mail.tell(i, 2, {of_p.top, of_p.sum});
        mail.wait(i);
        of_q = mail.whole(i, 0);
        const float of_sum = __fdividef(1, of_q.sum);
        dot = mail.whole(i, 1).sum * of_sum;
        const float log2_Z = mail.whole(i, 2).log2(), weight = weights[b] * pairs[0] * LN2;
        const float by_q = weight * student_scale * exp2_fast(own_q.top - of_q.top) * of_sum;
        const float by_p = weight * student_scale * exp2_fast(own_p.top - log2_Z);
#pragma unroll
        for (int c = 0; c < 8 * G; c++) p[c / 8][c % 8] = by_p * p[c / 8][c % 8] - by_q * q[c / 8][c % 8];
#pragma unroll
        for (int g = 0; g < G; g++)
            if (column<G>(g) < K) store8(grad + b * K + column<G>(g), p[g]);
        if (rank_in_cluster() == 0 && threadIdx.x == 0) losses[b] = weight * (log2_Z - dot);
    }
}

// --------------------------------------------------------------------------------
// launcher

int64_t assignment_loss_scratch_cuda(int64_t T, int64_t B, int64_t K) { return 2 * T * B * row_sums::chunks(K); }

template <typename X, int T>
static cudaError_t launch(float* losses, X* grad, const X* student, const X* teacher, const float* log_u,
                          const float* weights, const float* pairs, float* scratch, int64_t S, int64_t B, int64_t K,
                          float student_scale, float teacher_scale, cudaStream_t stream) {
    int device, room;
    cudaError_t status = cudaGetDevice(&device);
    if (!status) status = cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    LogSum* parts = (LogSum*)scratch;
    if (!status) status = row_sums::launch(parts, teacher, log_u, T * B, K, teacher_scale, stream);
    if (status) return status;
    const int64_t least = sizeof(Shared<T>), all = least + K * (int64_t)sizeof(X);
    const bool vector = vectors(K, grad, student, teacher, log_u), keep = vector && all <= room;
    auto kernel = keep ? assignment_loss<X, T, true, true>
                : vector ? assignment_loss<X, T, true, false> : assignment_loss<X, T, false, false>;
    return start(kernel, S * B, THREADS, keep ? all : least, stream, losses, grad, student, teacher, parts, log_u,
                 weights, pairs, (int)S, B, K, student_scale, teacher_scale);
}

// the same, by so many clusters; 0 where the device knows none
template <typename X>
static cudaError_t launch_by_clusters(int& count, float* losses, X* grad, const X* student, const X* teacher,
                                      const float* log_u, const float* weights, const float* pairs, int64_t B,
                                      int64_t K, float student_scale, float teacher_scale, cudaStream_t stream) {
    return clusters::for_columns(K, [&](auto groups) {
        constexpr int G = decltype(groups)::value;
        return clusters::launch(count, assignment_loss_by_clusters<X, G>, sizeof(clusters::Mail<3>) +
                                2 * clusters::Ring<X, G>::bytes, B, stream, losses, grad, student, teacher, log_u,
                                weights, pairs, B, K, student_scale, teacher_scale);
    });
}

cudaError_t assignment_loss_cuda(float* losses, void* grad, const void* student, const void* teacher,
                                 const float* log_u, const float* weights, const float* pairs, float* scratch,
                                 int64_t S, int64_t T, int64_t B, int64_t K, double student_temp, double teacher_temp,
                                 bool by_clusters, Dtype dtype, cudaStream_t stream) {
    if (!(S * B * K)) return cudaSuccess;
    if (T != 1 && T != 2) return cudaErrorInvalidValue;
    const float student_scale = 1.4426950408889634 / student_temp, teacher_scale = 1.4426950408889634 / teacher_temp;
    auto run = [&](auto* g) {
        using X = decltype(g);
        if constexpr (std::is_same_v<X, __nv_bfloat16*>) {
            int count = 0;
            if (by_clusters && S * T == 1 && clusters::fit(K, g, (X)student, (X)teacher, log_u)) {
                const cudaError_t status = launch_by_clusters(count, losses, g, (X)student, (X)teacher, log_u, weights,
                                                              pairs, B, K, student_scale, teacher_scale, stream);
                if (count || status != cudaSuccess) return status;
            }
        }
        auto kernel = T == 1 ? launch<std::remove_pointer_t<X>, 1> : launch<std::remove_pointer_t<X>, 2>;
        return kernel(losses, g, (X)student, (X)teacher, log_u, weights, pairs, scratch, S, B, K, student_scale,
                      teacher_scale, stream);
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

template <typename X>
static bool check(Dtype dtype, int S, int T, int B, int K, bool overwrite, bool by_clusters = false) {
    const double ts = 0.1, tt = 0.05, rounding = dtype == Dtype::f32 ? 0 : dtype == Dtype::f16 ? 0x1p-11 : 0x1p-8;
    std::vector<float> x(S * B * K), y(T * B * K), u(K), w(B), pairs(S * T), g(S * B * K), losses(S * B);
    for (int i = 0; i < S * B * K; i++) x[i] = to_float(from_float<X>(0.5 * std::sin(1.7 * i)));
    for (int i = 0; i < T * B * K; i++) y[i] = to_float(from_float<X>(0.5 * std::sin(0.01 * i * (double)i)));
    for (int k = 0; k < K; k++) u[k] = std::cos(k);
    for (int b = 0; b < B; b++) w[b] = 1.f / (b + 1);
    for (int i = 0; i < S * T; i++) pairs[i] = T == 1 || i / T != i % T;
    X *dx = on_device<X>(x), *dy = on_device<X>(y), *dg = overwrite ? dx : on_device<X>(g);
    float *dl = on_device<float>(losses), *du = on_device<float>(u), *dw = on_device<float>(w);
    float *dp = on_device<float>(pairs);
    float* scratch = on_device<float>(std::vector<float>(assignment_loss_scratch_cuda(T, B, K)));
    int status = assignment_loss_cuda(dl, dg, dx, dy, du, dw, dp, scratch, S, T, B, K, ts, tt, by_clusters,
                                      dtype, 0);
    std::vector<X> there(g.size());
    status |= cudaMemcpy(there.data(), dg, there.size() * sizeof(X), cudaMemcpyDeviceToHost);
    status |= cudaMemcpy(losses.data(), dl, losses.size() * 4, cudaMemcpyDeviceToHost);
    double worst = 0;
    auto compare = [&](double ours, double exact, double rounding) {
        const double error = std::fabs(ours - exact) - rounding * std::fabs(exact);
        worst = error <= worst ? worst : error;  // NaN counts
    };
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
            compare(to_float(there[i * K + k]), w[b] / ts * (mass * std::exp(x[i * K + k] / ts) / Z - a[k]), rounding);
        }
        compare(losses[i], loss, 0);
    }
    printf("S %d T %d B %d K %d: %s, largest error %.2e\n", S, T, B, K, cudaGetErrorString((cudaError_t)status), worst);
    return !status && worst < 2e-5;
}

int main() {  // with vectors and without, kept in shared memory and not, each dtype, clusters
    bool good = check<float>(Dtype::f32, 1, 1, 7, 1003, false) & check<__nv_bfloat16>(Dtype::bf16, 5, 2, 3, 1000, true);
    good &= check<__half>(Dtype::f16, 3, 2, 2, 20001, true) & check<float>(Dtype::f32, 1, 1, 2, 70000, false);
    good &= check<__nv_bfloat16>(Dtype::bf16, 1, 1, 5, 40000, true, true);
    return !(good & check<__half>(Dtype::f16, 2, 1, 3, 9000, false));
}
#endif
