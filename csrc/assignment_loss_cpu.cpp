/*
Cross-entropies of student logits against the teacher's assignments, and their gradients, on the CPU. The assignments
are never written to memory.

    q_tbk     = softmax over k of teacher_tbk / teacher_temp + log u_k
    loss_sb   = -weight_b sum_t pairs_st sum_k q_tbk log_softmax(student_sb / student_temp)_k
    grad_sbk  = weight_b / student_temp (sum_t pairs_st softmax(student_sb / student_temp)_k - sum_t pairs_st q_tbk)

    student, grad  S B K, f32 or bf16    teacher  T B K, the same    log_u  K    weights  B    pairs  S T    losses  S B

Bound by memory where the matrices leave the caches: student and teacher are read and the gradient is written once, 6
bytes an element in bf16. An image's rows are worked on in L2: one exp2 an element of student and teacher.

Alone:  g++ -std=c++20 -O3 -march=native -ffp-contract=off -fopenmp -DALONE csrc/assignment_loss_cpu.cpp -o build/k
        build/k
*/
#include <algorithm>

#include "vector.h"

#include "kernels_cpu.h"

namespace LEVEL {

static constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;
static constexpr float LOW = -1e9f;  // below any logit; finite, as 0 times it is to be 0

static constexpr int64_t BLOCK = 64 * LANES;  // sums of sums: float32 loses less than in one long sum

static int64_t padded(int64_t K) { return (K + LANES - 1) / LANES * LANES; }

template <typename X> static inline vec load_row(const X* x, int64_t k, int64_t K, float rest) {
    return k + LANES <= K ? load(x + k) : load(x + k, (int)(K - k), rest);
}

// p_k = 2^(x_k scale + u_k - shift), shift the largest of these; returns their sum
template <typename X>
static float exponentials(float* p, float& shift, const X* x, const float* u, int64_t K, float scale) {
    vec top = splat(LOW), total = {};
    for (int64_t k = 0; k < K; k += LANES)
        top = max(top, fma(load_row(x, k, K, 0.f), splat(scale), load(u + k)));
    shift = largest(top);
    for (int64_t k = 0; k < K;) {
        vec part = {};
        for (int64_t end = std::min(k + BLOCK, K); k < end; k += LANES) {
            vec e = exp2(fma(load_row(x, k, K, 0.f), splat(scale), load(u + k) - shift));
            store(p + k, e);
            part += e;
        }
        total += part;
    }
    return sum(total);
}

// a = sum_t pairs_t q_t, from the unnormalised q; `sums` are theirs
static void combine(float* a, const float* q, const float* sums, const float* pairs, int64_t T, int64_t P) {
    for (int64_t k = 0; k < P; k += LANES) {
        vec total = {};
        for (int64_t t = 0; t < T; t++) total = fma(load(q + t * P + k), splat(pairs[t] / sums[t]), total);
        store(a + k, total);
    }
}

// one row of the student against the combined assignments a, whose sum is `mass`; p is scratch
template <typename X>
static float row_loss(X* grad, float* p, const X* x, const float* a, float mass, float weight, int64_t K, double temp) {
    const float scale = LOG2E / temp;
    vec top = splat(LOW), total = {}, dot = {};
    for (int64_t k = 0; k < K; k += LANES) top = max(top, load_row(x, k, K, LOW));
    const float shift = largest(top);  // of x itself: where one student logit outweighs all, log p is exactly 0
    for (int64_t k = 0; k < K;) {
        vec part = {}, dot_part = {};
        for (int64_t end = std::min(k + BLOCK, K); k < end; k += LANES) {
            vec z = (load_row(x, k, K, LOW) - shift) * scale, e = exp2(z);
            store(p + k, e);
            part += e;
            dot_part = fma(load(a + k), z, dot_part);
        }
        total += part;
        dot += dot_part;
    }
    const float Z = sum(total), of_softmax = weight / temp * mass / Z, of_a = weight / temp;
    for (int64_t k = 0; k < K; k += LANES) {
        vec g = fma(load(p + k), splat(of_softmax), load(a + k) * -of_a);
        k + LANES <= K ? store(grad + k, g) : store(grad + k, g, (int)(K - k));
    }
    return weight * (mass * std::log(Z) - LN2 * sum(dot));
}

template <typename X>
static void run(float* losses, X* grad, const X* student, const X* teacher, const float* log_u, const float* weights,
                const float* pairs, float* scratch, int64_t S, int64_t T, int64_t B, int64_t K, double student_temp,
                double teacher_temp, int threads) {
    const int64_t P = padded(K);
    float *u = scratch, *rows = u + P;
    for (int64_t k = 0; k < P; k++) u[k] = k < K ? (float)(log_u[k] * LOG2E) : LOW;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t b = 0; b < B; b++) {
        const NoSubnormals here;
        float *q = rows + this_thread() * (T * (P + LANES) + 2 * P), *sums = q + T * P, *a = sums + T * LANES;
        float *p = a + P, shift;
        for (int64_t t = 0; t < T; t++)
            sums[t] = exponentials(q + t * P, shift, teacher + (t * B + b) * K, u, K, (float)(LOG2E / teacher_temp));
        for (int64_t s = 0; s < S; s++) {
            const float* own = pairs + s * T;
            if (s == 0 || memcmp(own, own - T, T * sizeof(float))) combine(a, q, sums, own, T, P);
            float mass = 0;
            for (int64_t t = 0; t < T; t++) mass += own[t];
            const int64_t i = s * B + b;
            losses[i] = row_loss(grad + i * K, p, student + i * K, a, mass, weights[b], K, student_temp);
        }
    }
}

// --------------------------------------------------------------------------------
// launcher

int64_t assignment_loss_scratch_cpu(int64_t T, int64_t K, int threads) {
    return padded(K) + threads * (T * (padded(K) + LANES) + 2 * padded(K));
}

void assignment_loss_cpu(float* losses, void* grad, const void* student, const void* teacher, const float* log_u,
                         const float* weights, const float* pairs, float* scratch, int64_t S, int64_t T, int64_t B,
                         int64_t K, double student_temp, double teacher_temp, Dtype dtype, int threads) {
    auto go = [&](auto* g) {
        using X = decltype(g);
        run(losses, g, (X)student, (X)teacher, log_u, weights, pairs, scratch, S, T, B, K, student_temp, teacher_temp,
            threads);
    };
    dtype == Dtype::f32 ? go((float*)grad) : go((bf16*)grad);
}

}  // namespace LEVEL

// --------------------------------------------------------------------------------
// check against a loop in double

#ifdef ALONE
#include <cstdio>
#include <vector>

using namespace LEVEL;

int main() {
    const int S = 3, T = 2, B = 5, K = 1003;  // no multiple of what the kernel works in
    const double ts = 0.1, tt = 0.05;
    std::vector<float> x(S * B * K), y(T * B * K), u(K), w{1, .5, .25, 0, 2}, pairs{0, 1, 1, 0, 1, 1};
    std::vector<float> g(S * B * K), losses(S * B), scratch(assignment_loss_scratch_cpu(T, K, 2));
    for (int i = 0; i < S * B * K; i++) x[i] = std::sin(1.7 * i);
    for (int i = 0; i < T * B * K; i++) y[i] = std::sin(0.01 * i * i);
    for (int k = 0; k < K; k++) u[k] = std::cos(k);
    assignment_loss_cpu(losses.data(), g.data(), x.data(), y.data(), u.data(), w.data(), pairs.data(), scratch.data(),
                        S, T, B, K, ts, tt, Dtype::f32, 2);
    double worst = 0;
    for (int s = 0; s < S; s++)
        for (int b = 0; b < B; b++) {
            const float* xs = x.data() + (s * B + b) * K;
            double Z = 0, loss = 0, mass = 0;
            std::vector<double> a(K, 0);
            for (int k = 0; k < K; k++) Z += std::exp(xs[k] / ts);
            for (int t = 0; t < T; t++) {
                double c = 0;
                const float* ys = y.data() + (t * B + b) * K;
                for (int k = 0; k < K; k++) c += std::exp(ys[k] / tt + u[k]);
                for (int k = 0; k < K; k++) a[k] += pairs[s * T + t] * std::exp(ys[k] / tt + u[k]) / c;
                mass += pairs[s * T + t];
            }
            for (int k = 0; k < K; k++) {
                loss -= w[b] * a[k] * (xs[k] / ts - std::log(Z));
                double want = w[b] / ts * (mass * std::exp(xs[k] / ts) / Z - a[k]);
                worst = std::fmax(worst, std::fabs(g[(s * B + b) * K + k] - want));
            }
            worst = std::fmax(worst, std::fabs(losses[s * B + b] - loss));
        }
    printf("largest error of losses and gradients %.2e\n", worst);
    return !(worst < 2e-5);
}
#endif
