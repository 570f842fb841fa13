/*
Sinkhorn-Knopp on the CPU: one pass, which ranks add up, or all passes of one rank; the assignments they lead to.

    pass      log r_k = log sum_b v_b exp(x_bk / T)       v_b = 1 / sum_k u_k exp(x_bk / T), or 1 where log_u is null
    sinkhorn  log_u after so many passes, each from u = 1 / r of the last
    targets   q_bk    = softmax over k of x_bk / T + log u_k

    x  n K, f32 or bf16    log_u, log_r  K, f32    q  n K, f32 or bf16

A pass is bound by memory where the matrix leaves the caches: it reads x once, 2 bytes an element in bf16, as a panel of
rows stays in L2 between its row sums and its column sums. In them: one exp2 an element, 13 instructions for 16.

With u from a pass, u_k exp(x_bk / T) lies below K, so the first try needs no shift; a row whose sum leaves [2^-60,
2^60] is done again, shifted by its largest element. The sums are those of up to 64 chunks of rows, whoever computes.

All passes of one rank take one exp2 an element, written once and multiplied in each pass; see tiles below.

Alone:  g++ -std=c++20 -O3 -march=native -ffp-contract=off -fopenmp -DALONE csrc/sinkhorn_cpu.cpp -o build/k && build/k
*/
#include <algorithm>
#include <limits>

#include "vector.h"

#include "kernels_cpu.h"

namespace LEVEL {

static constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;
static constexpr float LOW = -1e9f;  // below any logit; finite, as 0 times it is to be 0

static constexpr int64_t BLOCK = 64 * LANES;  // sums of sums: float32 loses less than in one long sum

// whole vectors, and an odd number of them: rows a multiple of 4096 bytes apart would fight for the same lines of L1
static int64_t padded(int64_t K) { return ((K + LANES - 1) / LANES | 1) * LANES; }
static int64_t n_chunks(int64_t n) { return std::min<int64_t>(64, (n + 7) / 8); }
static int64_t panel_rows(int64_t P) { return P < 1 << 15 ? 4 : P < 1 << 17 ? 2 : 1; }  // as many as stay in L2

template <typename T> static inline vec load_row(const T* x, int64_t k, int64_t K) {
    return k + LANES <= K ? load(x + k) : load(x + k, (int)(K - k), 0.f);
}

// p_k = 2^(x_k scale + u_k - shift) for V vectors of R rows, which are independent work for the processor's pipelines
template <int R, int V, typename T>
static inline void step(float* p, vec* parts, const T* x, const float* u, int64_t k, int64_t K, int64_t P,
                        float scale, float shift) {
#pragma GCC unroll 4
    for (int i = 0; i < R * V; i++) {
        const int64_t row = i / V, at = k + i % V * LANES;
        const vec own = V > 1 ? load(x + row * K + at) : load_row(x + row * K, at, K);
        const vec e = exp2(fma(own, splat(scale), load(u + at) - shift));
        store(p + row * P + at, e);
        parts[row * (4 / R) + i % V] += e;
    }
}

// of R rows, in p P apart; and their sums
template <int R, typename T>
static void exponentials(float* p, float* sums, const T* x, const float* u, int64_t K, int64_t P, float scale,
                         float shift) {
    vec total[4] = {};  // 4 / R of them for each row
    int64_t k = 0;
    while (k < K) {
        vec parts[4] = {};
        const int64_t end = std::min(k + BLOCK, K);
        for (; k + 4 / R * LANES <= end; k += 4 / R * LANES) step<R, 4 / R>(p, parts, x, u, k, K, P, scale, shift);
        for (; k < end; k += LANES) step<R, 1>(p, parts, x, u, k, K, P, scale, shift);
        for (int i = 0; i < 4; i++) total[i] += parts[i];
    }
    for (int i = 0; i < R; i++) {
        vec row = total[i * (4 / R)];
        for (int j = 1; j < 4 / R; j++) row += total[i * (4 / R) + j];
        sums[i] = sum(row);
        if (sums[i] > 0x1p-60f && sums[i] < 0x1p60f) continue;
        if (shift) continue;  // done again already: not finite
        vec top = splat(LOW);
        for (k = 0; k < K; k += LANES) top = max(top, fma(load_row(x + i * K, k, K), splat(scale), load(u + k)));
        const float again = largest(top);
        if (again) exponentials<1>(p + i * P, sums + i, x + i * K, u, K, P, scale, again);
    }
}

// r_k += q_bk of R rows
template <int R, typename T>
static void add_rows(float* r, float* p, const T* x, const float* u, int64_t K, int64_t P, float scale) {
    float sums[R];
    exponentials<R>(p, sums, x, u, K, P, scale, 0.f);
    for (int i = 0; i < R; i++) sums[i] = 1 / sums[i];
    for (int64_t k = 0; k < K; k += LANES) {
        vec total = load(r + k);
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) total = fma(load(p + i * P + k), splat(sums[i]), total);
        store(r + k, total);
    }
}

// R more rows in the largest x_bk scale of 16 columns, and in the sum of 2^(x_bk scale - largest)
template <int R, typename T>
static inline void add_to_columns(vec& top, vec& total, const T* x, int64_t k, int64_t K, float scale) {
    vec z[R], old = top, sums[2] = {};
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) top = max(top, z[i] = load_row(x + i * K, k, K) * scale);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) sums[i % 2] += exp2(z[i] - top);
    total = fma(total, exp2(old - top), sums[0] + sums[1]);
}

template <typename T>
static void column_sums(float* tops, float* sums, const T* x, int64_t first, int64_t last, int64_t K, float scale) {
    for (int64_t k = 0; k < K; k += LANES) {
        vec top = splat(LOW), total = {};
        int64_t b = first;
        for (; b + 8 <= last; b += 8) add_to_columns<8>(top, total, x + b * K, k, K, scale);
        for (; b < last; b++) add_to_columns<1>(top, total, x + b * K, k, K, scale);
        store(tops + k, top);
        store(sums + k, total);
    }
}

template <typename T>
static void run_pass(float* log_r, const T* x, const float* log_u, float* scratch, int64_t n, int64_t K, float scale,
                     int threads) {
    const int64_t P = padded(K), chunks = n_chunks(n), R = panel_rows(P);
    float *sums = scratch, *tops = sums + chunks * P, *u = tops + chunks * P, *panels = u + P;
    for (int64_t k = 0; k < P; k++) u[k] = log_u && k < K ? (float)(log_u[k] * LOG2E) : LOW;
#pragma omp parallel for num_threads(std::min<int64_t>(threads, chunks)) schedule(dynamic)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const NoSubnormals here;
        int64_t b = chunk * n / chunks, last = (chunk + 1) * n / chunks;
        float *r = sums + chunk * P, *p = panels + this_thread() * R * P;
        if (!log_u) {
            column_sums(tops + chunk * P, r, x, b, last, K, scale);
            continue;
        }
        memset(r, 0, P * sizeof(float));
        for (; R == 4 && b + 4 <= last; b += 4) add_rows<4>(r, p, x + b * K, u, K, P, scale);
        for (; R >= 2 && b + 2 <= last; b += 2) add_rows<2>(r, p, x + b * K, u, K, P, scale);
        for (; b < last; b++) add_rows<1>(r, p, x + b * K, u, K, P, scale);
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t k = 0; k < P; k += LANES) {
        vec top = splat(log_u ? 0 : LOW), total = {};
        for (int64_t c = 0; !log_u && c < chunks; c++) top = max(top, load(tops + c * P + k));
        for (int64_t c = 0; c < chunks; c++) {
            vec part = load(sums + c * P + k);
            total = fma(part, log_u ? splat(1) : exp2(load(tops + c * P + k) - top), total);
        }
        float logs[LANES], shifts[LANES];
        store(logs, log(total)), store(shifts, top);
        for (int64_t i = k; i < std::min(k + LANES, K); i++)
            log_r[i] = (float)(logs[i - k] + LN2 * ((double)shifts[i - k] - (log_u ? u[i] : 0)));
    }
}

template <typename T, typename Q>
static void run_targets(Q* q, const T* x, const float* log_u, float* scratch, int64_t n, int64_t K, float scale,
                        int threads) {
    const int64_t P = padded(K);
    float *u = scratch, *panels = u + P;
    for (int64_t k = 0; k < P; k++) u[k] = k < K ? (float)(log_u[k] * LOG2E) : LOW;
#pragma omp parallel for num_threads(threads)
    for (int64_t b = 0; b < n; b++) {
        const NoSubnormals here;
        float *p = panels + this_thread() * P, total;
        if (std::is_same_v<Q, float> && K % LANES == 0) p = (float*)(q + b * K);
        exponentials<1>(p, &total, x + b * K, u, K, P, scale, 0.f);
        int64_t k = 0;
        for (; k + LANES <= K; k += LANES) store(q + b * K + k, load(p + k) * (1 / total));
        if (k < K) store(q + b * K + k, load(p + k) * (1 / total), (int)(K - k));
    }
}

// --------------------------------------------------------------------------------
// All passes of one rank, by tiles: all rows of some columns, side by side. A pass ends within a tile: r of its
// columns, u = 1 / r, and what these add to the rows' sums, which alone wait for the other tiles.

// exp(x / T) of so many bytes is kept, 4 an element: the last cache of a server's group of cores. Asking the processor
// for its own would let its cache decide the last bits of a result.
static constexpr int64_t KEPT = 1 << 25;
static constexpr int64_t TILE = 1 << 16, WIDEST = 64 * LANES;  // floats of a tile, 256 KB of L2; columns of one

static int64_t rounded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
static int64_t tile_width(int64_t n, int64_t K) {
    return std::min(std::clamp(TILE / n / LANES * LANES, (int64_t)4 * LANES, WIDEST), rounded(K));
}

// 2^(x_k scale); beyond the row's last `there` whatever is finite, as u is 0
template <typename T>
static void tile_row(float* p, const T* x, int64_t there, int64_t width, float scale) {
    int64_t k = 0;
    for (; k + 4 * LANES <= there; k += 4 * LANES)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) store(p + k + j * LANES, exp2(load(x + k + j * LANES) * splat(scale)));
    for (; k < width; k += LANES) {
        const vec own = k + LANES <= there ? load(x + k) : load(x + k, (int)std::max<int64_t>(there - k, 0), 0.f);
        store(p + k, exp2(own * splat(scale)));
    }
}

// r_k += sum over R rows of v_b p_bk
template <int R> static void add_to_r(float* r, const float* p, const float* v, int64_t width) {
    for (int64_t k = 0; k < width; k += LANES) {
        vec total = load(p + k) * splat(v[0]);
#pragma GCC unroll 4
        for (int i = 1; i < R; i++) total = fma(load(p + i * width + k), splat(v[i]), total);
        store(r + k, load(r + k) + total);
    }
}

// sum_k p_bk u_k of R rows
template <int R> static void row_dots(float* sums, const float* p, const float* u, int64_t width) {
    vec total[R] = {};
    for (int64_t k = 0; k < width; k += LANES) {
        const vec own = load(u + k);
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) total[i] = fma(load(p + i * width + k), own, total[i]);
    }
    for (int i = 0; i < R; i++) sums[i] = sum(total[i]);
}

// one tile of a pass: r from v; then log_u, or else u and the tile's part of the rows' sums. -> all r within 2^+-60
static bool tile_pass(float* log_u, float drift, float* sums, const float* p, const float* v, int64_t n, int64_t there,
                      int64_t width) {
    float r[WIDEST] = {};
    int64_t b = 0;
    for (; b + 4 <= n; b += 4) add_to_r<4>(r, p + b * width, v + b, width);
    for (; b < n; b++) add_to_r<1>(r, p + b * width, v + b, width);
    bool fine = true;
    for (int64_t k = 0; k < there; k++) fine &= r[k] > 0x1p-60f && r[k] < 0x1p60f;
    if (log_u) {
        for (int64_t k = 0; k < width; k += LANES) store(r + k, log(load(r + k)));
        for (int64_t k = 0; k < there; k++) log_u[k] = drift - r[k];
        return fine;
    }
    for (int64_t k = 0; k < width; k++) r[k] = k < there ? 1 / r[k] : 0;
    for (b = 0; b + 4 <= n; b += 4) row_dots<4>(sums + b, p + b * width, r, width);
    for (; b < n; b++) row_dots<1>(sums + b, p + b * width, r, width);
    return fine;
}

/*
All passes, in one parallel region: waking threads for each takes as long as a pass of 128 x 4096. Nothing is shifted;
where a sum shows that it should have been, the answer is false, log_u is of no use, and logarithms must do it. Else
what p lost below 2^-126 is at most K 2^-126 2^60 of a row's sum above 2^-24, K 2^-126 2^24 of a column's above 2^-60.

Rows sum to K/n on average, as columns to 1: each pass would make v smaller by that, and u larger. So v is multiplied
with K/n, and log u gets it back at the end.
*/
template <typename T>
static bool run_tiles(float* log_u, const T* x, float* scratch, int64_t n, int64_t K, float scale, int64_t iterations,
                      int threads) {
    const int64_t width = tile_width(n, K), tiles = (K + width - 1) / width;
    const float mean = (float)K / n, drift = (iterations - 1) * std::log((double)mean);
    float *parts = scratch, *kept = parts + 2 * tiles * n, *scales = kept + tiles * width * n;
    bool fine = true;
#pragma omp parallel num_threads(threads) reduction(&& : fine)
    {
        const NoSubnormals here;
        float* v = scales + this_thread() * rounded(n);
        std::fill(v, v + n, 1.f);
        for (int64_t pass = 0; pass < iterations; pass++) {
            const bool last = pass == iterations - 1;
            float* sums = parts + pass % 2 * tiles * n;  // the others may still read those of the pass before
#pragma omp for schedule(static)
            for (int64_t tile = 0; tile < tiles; tile++) {
                const int64_t first = tile * width, there = std::min(width, K - first);
                float* p = kept + first * n;
                for (int64_t b = 0; b < n && !pass; b++)
                    tile_row(p + b * width, x + b * K + first, there, width, scale);
                fine &= tile_pass(last ? log_u + first : nullptr, drift, sums + tile * n, p, v, n, there, width);
            }
            for (int64_t b = 0; b < n && !last; b++) {  // each thread for itself: less than a barrier takes
                float total = 0;
                for (int64_t tile = 0; tile < tiles; tile++) total += sums[tile * n + b];
                fine &= total > 0x1p-24f && total < 0x1p100f;
                v[b] = mean / total;
            }
        }
    }
    return fine;
}

// --------------------------------------------------------------------------------
// launchers

int64_t sinkhorn_pass_scratch_cpu(int64_t n, int64_t K, int threads) {
    const int64_t P = padded(K);
    return (2 * n_chunks(n) + 1 + std::min<int64_t>(threads, n_chunks(n)) * panel_rows(P)) * P;
}

void sinkhorn_pass_cpu(float* log_r, const void* logits, const float* log_u, float* scratch, int64_t n, int64_t K,
                       double temperature, Dtype dtype, int threads) {
    const float scale = LOG2E / temperature;
    if (!n) std::fill(log_r, log_r + K, -std::numeric_limits<float>::infinity());
    else if (dtype == Dtype::f32) run_pass(log_r, (const float*)logits, log_u, scratch, n, K, scale, threads);
    else run_pass(log_r, (const bf16*)logits, log_u, scratch, n, K, scale, threads);
}

int64_t sinkhorn_scratch_cpu(int64_t n, int64_t K, int threads) {
    const int64_t passes = sinkhorn_pass_scratch_cpu(n, K, threads);
    if (!n || 4 * n * K > KEPT) return passes;
    const int64_t width = tile_width(n, K), tiles = (K + width - 1) / width;
    return std::max(passes, (2 + width) * tiles * n + threads * rounded(n));
}

void sinkhorn_cpu(float* log_u, const void* logits, float* scratch, int64_t n, int64_t K, double temperature,
                  int64_t iterations, Dtype dtype, int threads) {
    const float scale = LOG2E / temperature;
    auto done = [&](auto* x) { return run_tiles(log_u, x, scratch, n, K, scale, iterations, threads); };
    const bool keep = n && 4 * n * K <= KEPT;
    if (keep && (dtype == Dtype::f32 ? done((const float*)logits) : done((const bf16*)logits))) return;
    for (int64_t pass = 0; pass < iterations; pass++) {
        sinkhorn_pass_cpu(log_u, logits, pass ? log_u : nullptr, scratch, n, K, temperature, dtype, threads);
        for (int64_t k = 0; k < K; k++) log_u[k] = -log_u[k];
    }
}

int64_t sinkhorn_targets_scratch_cpu(int64_t K, int threads) { return (1 + threads) * padded(K); }

void sinkhorn_targets_cpu(void* targets, Dtype target_dtype, const void* logits, const float* log_u, float* scratch,
                          int64_t n, int64_t K, double temperature, Dtype dtype, int threads) {
    const float scale = LOG2E / temperature;
    auto run = [&](auto* q, auto* x) { run_targets(q, x, log_u, scratch, n, K, scale, threads); };
    auto into = [&](auto* q) { dtype == Dtype::f32 ? run(q, (const float*)logits) : run(q, (const bf16*)logits); };
    target_dtype == Dtype::f32 ? into((float*)targets) : into((bf16*)targets);
}

}  // namespace LEVEL

// --------------------------------------------------------------------------------
// check against a loop in double

#ifdef ALONE
#include <cstdio>
#include <vector>

using namespace LEVEL;

int main() {
    const int n = 37, K = 1003;  // neither a multiple of what the kernel works in
    const double T = 0.05;
    std::vector<float> x(n * K), log_u(K), log_r(K), q(n * K), all(K), scratch(sinkhorn_scratch_cpu(n, K, 2));
    for (int i = 0; i < n * K; i++) x[i] = std::sin(1.7 * i) + std::sin(0.01 * i * i);
    std::vector<double> u(K, 0), v(n, 0);
    double worst = 0;
    for (int pass = 0; pass < 3; pass++) {
        const float* u_or_none = pass ? log_u.data() : nullptr;
        sinkhorn_pass_cpu(log_r.data(), x.data(), u_or_none, scratch.data(), n, K, T, Dtype::f32, 2);
        for (int b = 0; b < n && pass; b++) {
            double c = 0;
            for (int k = 0; k < K; k++) c += std::exp(x[b * K + k] / T + u[k]);
            v[b] = -std::log(c);
        }
        for (int k = 0; k < K; k++) {
            double r = 0;
            for (int b = 0; b < n; b++) r += std::exp(x[b * K + k] / T + v[b]);
            u[k] = -std::log(r);
            log_u[k] = -log_r[k];
            worst = std::fmax(worst, std::fabs(u[k] - log_u[k]));
        }
    }
    sinkhorn_cpu(all.data(), x.data(), scratch.data(), n, K, T, 3, Dtype::f32, 2);
    for (int k = 0; k < K; k++) worst = std::fmax(worst, std::fabs(u[k] - all[k]));
    sinkhorn_targets_cpu(q.data(), Dtype::f32, x.data(), log_u.data(), scratch.data(), n, K, T, Dtype::f32, 2);
    for (int b = 0; b < n; b++) {
        double c = 0;
        for (int k = 0; k < K; k++) c += std::exp(x[b * K + k] / T + u[k]);
        for (int k = 0; k < K; k++)
            worst = std::fmax(worst, std::fabs(q[b * K + k] - std::exp(x[b * K + k] / T + u[k]) / c));
    }
    printf("largest error of log u and of the targets %.2e\n", worst);
    return !(worst < 2e-5);
}
#endif
