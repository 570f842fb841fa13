// Small products of float32 matrices on one core, of registers of vector.h. No torch.
#pragma once

#include <algorithm>

#include "vector.h"

namespace LEVEL {

constexpr int PANEL = W == 16 ? 4 : 2;  // registers in a tile's row: 6 x 4 of AVX-512's 32, 6 x 2 of 16 accumulate
constexpr int ROWS = 6, DEPTH = 64;     // a tile's rows; how much of the sum it takes while its right factor is in L1

static int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ----------------------------------------------------------------------------
// products

#define UNROLL _Pragma("GCC unroll 8")  // else the accumulators pass through memory at the ends

// c[i, :] (+)= sum_k a[i, k] b[k, :]  for 6 rows and NV vectors; a[i, k] lies at a[i ai + k ak]
template <int NV, bool ADD>
static void tile(float* c, int64_t ldc, const float* a, int64_t ai, int64_t ak, const float* b, int64_t ldb, int K) {
    reg sum[ROWS][NV];
    UNROLL for (int i = 0; i < ROWS; i++)
        UNROLL for (int v = 0; v < NV; v++) if (ADD) load_into(sum[i][v], c + i * ldc + v * W); else sum[i][v] = reg{};
    for (int k = 0; k < K; k++, a += ak, b += ldb) {
        reg right[NV];
        UNROLL for (int v = 0; v < NV; v++) load_into(right[v], b + v * W);
        UNROLL for (int i = 0; i < ROWS; i++) {
            const reg left = in_all(a[i * ai]);
            UNROLL for (int v = 0; v < NV; v++) sum[i][v] = fma(left, right[v], sum[i][v]);
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

}  // namespace LEVEL
