/*
RoPE attention on a CPU, of every image and head of packed crop groups:

    q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]        T 3 A E, rows of one image after another
    q, k    = (a cos - b sin, b cos + a sin)         a, b = first, second half of E; the prefix has angle 0
    out     = softmax(q k^T / sqrt(E)) v             T A E
    lse     = log2 sum exp2(log2(e) q k^T / sqrt(E)) A T

The backward pass keeps nothing but qkv, out and lse: it turns q and k again, and their gradients back.

Bound by arithmetic: 4 N^2 E FLOP forward, 10 N^2 E backward for an image and head, all in float32. A thread owns an
image and head, converts and turns its rows once, into buffers that fit its L2 cache, and takes blocks of whole rows of
scores from there: no online softmax, no sums across threads, so that the result does not depend on how many there are.
Every product is one micro-kernel: 6 rows by up to 4 registers of accumulators, its left factor broadcast from any
strides.

Alone:  g++ -std=c++20 -O3 -march=native -ffp-contract=off -fopenmp -DALONE csrc/rope_attention_cpu.cpp -o build/k
        build/k
*/
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "matmul.h"

#include "kernels_cpu.h"

namespace LEVEL {

constexpr int MOST_ROWS = 96;  // queries in a block
constexpr float LOG2E = 1.4426950f;

// ----------------------------------------------------------------------------
// rows of one head, in and out

static float to_float(float v) { return v; }
static float to_float(uint16_t v) { const uint32_t bits = (uint32_t)v << 16; float f; memcpy(&f, &bits, 4); return f; }
static void assign(float& to, float v) { to = v; }
static void assign(uint16_t& to, float v) { uint32_t b; memcpy(&b, &v, 4); to = (b + 0x7fff + (b >> 16 & 1)) >> 16; }

struct Shape {
    int64_t N, M;           // tokens; made whole tiles
    int A, E, wide, keys;   // wide: registers of a row; keys: registers of a row of scores
    int64_t ld, lds, rows;  // floats of a row, of a row of scores; queries in a block
    float scale;
    reg none;               // -inf where the last register of scores has no key
    Shape(int64_t N, int A, int E) : N(N), M(up(N, ROWS)), A(A), E(E), wide(up(E, W) / W), keys(up(N, W) / W) {
        ld = wide * W, scale = 1 / std::sqrt((float)E);
        for (int i = 0; i < W; i++) none[i] = (keys - 1) * W + i < N ? 0 : -INFINITY;
        lds = (up(std::max<int64_t>(M, keys * W), W) / W | 1) * W;  // odd: columns use all cache sets
        rows = std::min(M, up(std::clamp<int64_t>(65536 / lds, 24, MOST_ROWS), ROWS));  // 256 kB of scores
    }
    int64_t matrix() const { return std::max<int64_t>(M, keys * W) * ld; }
    int64_t panels() const { return up(keys, PANEL) * W * ld; }
};

template <typename T>
static void read(float* __restrict y, const T* __restrict x, int E) {
    for (int e = 0; e < E; e++) y[e] = to_float(x[e]);
}
template <typename T>
static void write(T* __restrict y, const float* __restrict x, int E, float scale) {
    for (int e = 0; e < E; e++) assign(y[e], x[e] * scale);
}
template <typename T>
static void turn(float* __restrict y, const T* __restrict x, const float* __restrict cos, const float* __restrict sin,
                 int H, float scale) {
    for (int e = 0; e < H; e++) {
        const float a = to_float(x[e]), b = to_float(x[e + H]), c = cos[e] * scale, s = sin[e] * scale;
        y[e] = fma(a, c, -(b * s)), y[e + H] = fma(b, c, a * s);
    }
}
template <typename T>
static void turn_back(T* __restrict y, const float* __restrict x, const float* __restrict cos,
                      const float* __restrict sin, int H, float scale) {
    for (int e = 0; e < H; e++) {
        const float a = x[e], b = x[e + H], c = cos[e] * scale, s = sin[e] * scale;
        assign(y[e], fma(a, c, b * s)), assign(y[e + H], fma(b, c, -(a * s)));
    }
}

static float dot(const float* x, const float* y, int E) {
    vec total = splat(0);
    int e = 0;
    for (; e + LANES <= E; e += LANES) total = fma(load(x + e), load(y + e), total);
    if (e < E) total = fma(load(x + e, E - e, 0), load(y + e, E - e, 0), total);
    return sum(total);
}

// x^T in panels of PANEL W keys:  keys E -> panels E (PANEL W)
static void transposed(float* y, const float* x, const Shape& s) {
    const int64_t side = PANEL * W;
    for (int64_t n = 0; n < s.keys * W; n += W)
        for (int64_t e = 0; e < s.ld; e += W)
            transpose(y + n / side * side * s.ld + e * side + n % side, side, x + n * s.ld + e, s.ld);
}

// the scores of one query become exp2(s - largest);  returns their sum, in the order of 16 lanes, and the largest
static float softmax(float* s, const Shape& shape, float& most) {
    float *last = s + (shape.keys - 1) * W, lanes[LANES] = {};
    reg top, x;
    load_into(x, last), store(last, x + shape.none), load_into(top, s);
    for (float* p = s; p <= last; p += W) load_into(x, p), top = max(top, x);
    store(lanes, top);
    most = *std::max_element(lanes, lanes + W);
    const reg shift = in_all(most);
    constexpr int PARTS = LANES / W;
    reg sums[PARTS] = {};
    for (float* p = s; p <= last;)
        for (int i = 0; i < PARTS && p <= last; i++, p += W) {
            load_into(x, p);
            const reg e = exp2(x - shift);
            store(p, e), sums[i] += e;
        }
    for (int i = 0; i < PARTS; i++) store(lanes + i * W, sums[i]);
    return sum(load(lanes));
}

// ----------------------------------------------------------------------------
// one image, one head: pointers to its first row

struct Memory {  // that a thread once needed, it keeps: fresh pages cost more than small images
    float* start = nullptr;
    int64_t size = 0;
    ~Memory() { free(start); }
};
static float* scratch(int64_t floats) {
    static thread_local Memory memory;
    if (memory.size < floats) {
        free(memory.start);
        memory.start = (float*)aligned_alloc(64, up(floats * 4, 64));
        memory.size = memory.start ? floats : 0;
        if (!memory.start) abort();
    }
    return memory.start;
}

template <typename T>
static void forward(T* out, float* lse, const T* qkv, const RopeGroup& g, const Shape& s) {
    const int64_t D = (int64_t)s.A * s.E, H = s.E / 2, ld = s.ld, side = PANEL * W;
    float* k = scratch(2 * s.matrix() + s.panels() + s.rows * (2 * ld + s.lds));
    float *v = k + s.matrix(), *kt = v + s.matrix(), *q = kt + s.panels(), *o = q + s.rows * ld, *p = o + s.rows * ld;
    for (int64_t n = 0; n < s.N; n++) {
        turn(k + n * ld, qkv + (3 * n + 1) * D, g.cos + n * H, g.sin + n * H, H, 1);
        read(v + n * ld, qkv + (3 * n + 2) * D, s.E);
    }
    std::fill(k + s.N * ld, k + s.keys * W * ld, 0.f);
    transposed(kt, k, s);
    for (int64_t i = 0; i < s.N; i += s.rows) {
        const int64_t m = std::min(s.rows, s.N - i), M = up(m, ROWS);
        for (int64_t r = 0; r < m; r++)
            turn(q + r * ld, qkv + 3 * (i + r) * D, g.cos + (i + r) * H, g.sin + (i + r) * H, H, s.scale * LOG2E);
        std::fill(q + m * ld, q + M * ld, 0.f);
        product(p, s.lds, q, ld, 1, kt, side * ld, side, M, s.keys, s.E, false);
        float sum[MOST_ROWS], largest;
        for (int64_t r = 0; r < m; r++) {
            sum[r] = softmax(p + r * s.lds, s, largest);
            lse[i + r] = largest + std::log2(sum[r]);
        }
        product(o, ld, p, s.lds, 1, v, side, ld, M, s.wide, s.N, false);
        for (int64_t r = 0; r < m; r++) write(out + (i + r) * D, o + r * ld, s.E, 1 / sum[r]);
    }
}

// with P = exp2(q k^T - lse):  dv = P^T dout,  dS = P (dout v^T - delta),  delta = dout . out,  dq = dS k,  dk = dS^T q
template <typename T>
static void backward(T* dqkv, const T* dout, const T* qkv, const T* out, const float* lse, const RopeGroup& g,
                     const Shape& s) {
    const int64_t D = (int64_t)s.A * s.E, H = s.E / 2, ld = s.ld, side = PANEL * W;
    float* k = scratch(3 * s.matrix() + 2 * s.panels() + s.rows * (3 * ld + 2 * s.lds));
    float *dk = k + s.matrix(), *dv = dk + s.matrix(), *kt = dv + s.matrix(), *vt = kt + s.panels();
    float *q = vt + s.panels(), *d = q + s.rows * ld, *dq = d + s.rows * ld;
    float *p = dq + s.rows * ld, *ds = p + s.rows * s.lds;
    for (int64_t n = 0; n < s.N; n++) {
        turn(k + n * ld, qkv + (3 * n + 1) * D, g.cos + n * H, g.sin + n * H, H, 1);
        read(dv + n * ld, qkv + (3 * n + 2) * D, s.E);  // v is wanted as columns only
    }
    std::fill(k + s.N * ld, k + s.keys * W * ld, 0.f), std::fill(dv + s.N * ld, dv + s.keys * W * ld, 0.f);
    transposed(kt, k, s), transposed(vt, dv, s);
    for (int64_t i = 0; i < s.N; i += s.rows) {
        const int64_t m = std::min(s.rows, s.N - i), M = up(m, ROWS);
        float delta[MOST_ROWS];
        for (int64_t r = 0; r < m; r++) {
            turn(q + r * ld, qkv + 3 * (i + r) * D, g.cos + (i + r) * H, g.sin + (i + r) * H, H, s.scale * LOG2E);
            read(d + r * ld, dout + (i + r) * D, s.E), read(dq, out + (i + r) * D, s.E);
            delta[r] = dot(d + r * ld, dq, s.E);
        }
        std::fill(q + m * ld, q + M * ld, 0.f), std::fill(d + m * ld, d + M * ld, 0.f);
        product(p, s.lds, q, ld, 1, kt, side * ld, side, M, s.keys, s.E, false);
        product(ds, s.lds, d, ld, 1, vt, side * ld, side, M, s.keys, s.E, false);
        for (int64_t r = 0; r < m; r++)
            for (int64_t j = r * s.lds; j < r * s.lds + s.keys * W; j += W) {  // beyond N: anything, nobody asks
                reg x, y;
                load_into(x, p + j), load_into(y, ds + j);
                const reg e = exp2(x - in_all(lse[i + r]));
                store(p + j, e), store(ds + j, e * (y - in_all(delta[r])));
            }
        product(dq, ld, ds, s.lds, 1, k, side, ld, M, s.wide, s.N, false);
        for (int64_t r = 0; r < m; r++)
            turn_back(dqkv + 3 * (i + r) * D, dq + r * ld, g.cos + (i + r) * H, g.sin + (i + r) * H, H, s.scale);
        product(dk, ld, ds, 1, s.lds, q, side, ld, s.M, s.wide, m, i > 0);
        product(dv, ld, p, 1, s.lds, d, side, ld, s.M, s.wide, m, i > 0);
    }
    for (int64_t n = 0; n < s.N; n++) {
        turn_back(dqkv + (3 * n + 1) * D, dk + n * ld, g.cos + n * H, g.sin + n * H, H, 1 / LOG2E);
        write(dqkv + (3 * n + 2) * D, dv + n * ld, s.E, 1);
    }
}

// ----------------------------------------------------------------------------
// all of them

// work(group, shape, its first row of T, head), each once, on as many threads as have something to do
template <typename F>
static void each(const RopeGroup* groups, int n_groups, int A, int E, int threads, F work) {
    int64_t tasks = 0;
    double flop = 0;
    for (const RopeGroup* g = groups; g < groups + n_groups; g++)
        tasks += g->n * A, flop += 4. * g->n * A * g->N * g->N * E;
    threads = std::clamp<double>(flop / 2e6, 1, threads);  // to wake a thread takes as long as 2 MFLOP
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < tasks; task++) {
        const NoSubnormals here;
        const RopeGroup* g = groups;
        int64_t i = task;
        for (; i >= g->n * A; g++) i -= g->n * A;
        if (g->N) work(*g, Shape(g->N, A, E), g->first + i / A * g->N, i % A);
    }
}

void rope_attention_cpu(void* out, float* lse, const void* qkv, const RopeGroup* groups, int n_groups,
                        int64_t T, int A, int E, Dtype dtype, int threads) {
    each(groups, n_groups, A, E, threads, [&](const RopeGroup& g, const Shape& s, int64_t row, int a) {
        const int64_t at = row * A * E + a * E, at3 = row * 3 * A * E + a * E;
        float* l = lse + a * T + row;
        const auto run = [&]<typename X>(X* y) { forward(y + at, l, (const X*)qkv + at3, g, s); };
        if (dtype == Dtype::f32) run((float*)out);
        else run((uint16_t*)out);  // the bits of a bfloat16
    });
}

void rope_attention_backward_cpu(void* dqkv, const void* dout, const void* qkv, const void* out, const float* lse,
                                 const RopeGroup* groups, int n_groups, int64_t T, int A, int E, Dtype dtype,
                                 int threads) {
    each(groups, n_groups, A, E, threads, [&](const RopeGroup& g, const Shape& s, int64_t row, int a) {
        const int64_t at = row * A * E + a * E, at3 = row * 3 * A * E + a * E;
        const float* l = lse + a * T + row;
        const auto run = [&]<typename X>(X* y) {
            backward(y + at3, (const X*)dout + at, (const X*)qkv + at3, (const X*)out + at, l, g, s);
        };
        if (dtype == Dtype::f32) run((float*)dqkv);
        else run((uint16_t*)dqkv);
    });
}

}  // namespace LEVEL

// ----------------------------------------------------------------------------
// check against loops in double

#ifdef ALONE
#include "rope_attention_check.h"

using namespace LEVEL;

int main() {  // E from 8 on, of any width; one group and two
    bool good = true;
    for (int E : {8, 12, 32, 64, 128})
        for (const auto& groups : {std::vector<Crops>{{2, 1}, {1, 21}}, {{1, 103}}})
            good &= check("float32", Problem(groups, groups.size(), E), 1e-5,
                          [](const Problem& p, Floats& out, Floats& dqkv) {
                std::vector<RopeGroup> groups;
                int64_t first = 0;
                for (size_t g = 0; g < p.groups.size(); first += p.groups[g].n * p.groups[g].N, g++)
                    groups.push_back({first, p.groups[g].n, p.groups[g].N, p.cos[g].data(), p.sin[g].data()});
                Floats lse(p.A * p.T);
                dqkv.resize(p.qkv.size());
                rope_attention_cpu(out.data(), lse.data(), p.qkv.data(), groups.data(), groups.size(), p.T, p.A, p.E,
                                   Dtype::f32, 2);
                rope_attention_backward_cpu(dqkv.data(), p.dout.data(), p.qkv.data(), out.data(), lse.data(),
                                            groups.data(), groups.size(), p.T, p.A, p.E, Dtype::f32, 2);
            });
    return !good;
}
#endif
