// Small products of float32 matrices on one core, and the vectors that they and their neighbours are made of. No torch.
//
// A vector is what one register holds, else GCC keeps accumulators in memory; vector.h, where nothing accumulates for
// long, has 16 floats on any machine.
#pragma once

#include <algorithm>
#include <cstdint>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int W = 16, PANEL = 4;  // floats in a vector, vectors in a tile's row: 6 x 4 of 32 registers accumulate
#elif defined(__AVX__)
constexpr int W = 8, PANEL = 2;   // 6 x 2 of 16
#else
constexpr int W = 4, PANEL = 2;
#endif
constexpr int ROWS = 6, DEPTH = 64;  // a tile's rows; how much of the sum it takes while its right factor is in L1
typedef float Vec __attribute__((vector_size(4 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef float Loose __attribute__((vector_size(4 * W), aligned(4), may_alias));  // a vector anywhere in memory

static inline Vec load(const float* p) { return *(const Loose*)p; }
static inline void store(float* p, Vec v) { *(Loose*)p = v; }
static inline Vec all(float v) { return v - Vec{}; }  // v + 0 would be an instruction: it is not always v

// 2^x for x <= 1, 0 below 2^-100 (nothing subnormal: that is slow); relative error 1e-7
static inline Vec exp2(Vec x) {
    const Vec n = x + 12582912.f, f = x - (n - 12582912.f);  // 1.5 2^23: the integer nearest to x in the low bits of n
    Vec p = all(1.5252734e-5f);                              // Taylor's (ln 2)^i / i!, and |f| <= 1/2: error 5e-9
    for (float c : {1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f})
        p = p * f + c;
    const Vec e = (Vec)((Bits)p + ((Bits)n << 23));
    return x < -100.f ? Vec{} : e;                           // a NaN stays one
}

static int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ----------------------------------------------------------------------------
// products

#define UNROLL _Pragma("GCC unroll 8")  // else the accumulators pass through memory at the ends

// c[i, :] (+)= sum_k a[i, k] b[k, :]  for 6 rows and NV vectors; a[i, k] lies at a[i ai + k ak]
template <int NV, bool ADD>
static void tile(float* c, int64_t ldc, const float* a, int64_t ai, int64_t ak, const float* b, int64_t ldb, int K) {
    Vec sum[ROWS][NV];
    UNROLL for (int i = 0; i < ROWS; i++)
        UNROLL for (int v = 0; v < NV; v++) sum[i][v] = ADD ? load(c + i * ldc + v * W) : Vec{};
    for (int k = 0; k < K; k++, a += ak, b += ldb) {
        Vec right[NV];
        UNROLL for (int v = 0; v < NV; v++) right[v] = load(b + v * W);
        UNROLL for (int i = 0; i < ROWS; i++) {
            const Vec left = all(a[i * ai]);
            UNROLL for (int v = 0; v < NV; v++) sum[i][v] += left * right[v];
        }
    }
    UNROLL for (int i = 0; i < ROWS; i++)
        UNROLL for (int v = 0; v < NV; v++) store(c + i * ldc + v * W, sum[i][v]);
}

template <int NV>
static void column(float* c, int64_t ldc, const float* a, int64_t ai, int64_t ak, const float* b, int64_t ldb,
                   int64_t M, int64_t K, bool add) {
    for (int64_t k = 0; k < K; k += DEPTH, add = true)
        for (int64_t i = 0; i < M; i += ROWS) {
            const auto f = add ? tile<NV, true> : tile<NV, false>;
            f(c + i * ldc, ldc, a + i * ai + k * ak, ai, ak, b + k * ldb, ldb, std::min<int64_t>(DEPTH, K - k));
        }
}

// c (+)= a b: M (made whole tiles) by `vectors` W, over K > 0.  b comes in panels of PANEL vectors, `bp` floats apart
static void product(float* c, int64_t ldc, const float* a, int64_t ai, int64_t ak, const float* b, int64_t bp,
                    int64_t ldb, int64_t M, int vectors, int64_t K, bool add) {
    for (; vectors > 0; vectors -= PANEL, c += PANEL * W, b += bp) {
        const auto f = vectors == 1 ? column<1> : vectors == 2 ? column<2> : vectors == 3 ? column<3> : column<4>;
        (vectors < PANEL ? f : column<PANEL>)(c, ldc, a, ai, ak, b, ldb, M, K, add);
    }
}

// y = x^T, W by W
static void transpose(float* y, int64_t ldy, const float* x, int64_t ldx) {
#if defined(__AVX512F__)
    __m512 r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(x + i * ldx);
    for (int i = 0; i < 16; i += 2)
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {  // r[i + n]: column 4 l + n of rows i to i + 3, in lane l
            const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
            r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    for (int n = 0; n < 4; n++) {  // a 4 x 4 transpose of lanes
        const __m512 a = _mm512_shuffle_f32x4(r[n], r[n + 4], 0x44), b = _mm512_shuffle_f32x4(r[n], r[n + 4], 0xee);
        const __m512 c = _mm512_shuffle_f32x4(r[n + 8], r[n + 12], 0x44);
        const __m512 d = _mm512_shuffle_f32x4(r[n + 8], r[n + 12], 0xee);
        _mm512_storeu_ps(y + n * ldy, _mm512_shuffle_f32x4(a, c, 0x88));
        _mm512_storeu_ps(y + (n + 4) * ldy, _mm512_shuffle_f32x4(a, c, 0xdd));
        _mm512_storeu_ps(y + (n + 8) * ldy, _mm512_shuffle_f32x4(b, d, 0x88));
        _mm512_storeu_ps(y + (n + 12) * ldy, _mm512_shuffle_f32x4(b, d, 0xdd));
    }
#else
    for (int i = 0; i < W; i++)
        for (int j = 0; j < W; j++) y[j * ldy + i] = x[i * ldx + j];
#endif
}
