// Vectors for the CPU kernels, as GCC and Clang spell them: 16 floats on any machine, so that every machine, and every
// number of threads, adds in the same order. AVX-512 holds one in a register, AVX2 in two, NEON in four. No torch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
static inline int this_thread() { return omp_get_thread_num(); }
#else
static inline int this_thread() { return 0; }
#endif
#ifdef __SSE__
#include <immintrin.h>
#endif

constexpr int LANES = 16;
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));

struct bf16 { uint16_t bits; };

// Numbers below 2^-126 take a hundred cycles each; a thread that holds this takes them for zero.
struct NoSubnormals {
#ifdef __SSE__
    const unsigned before = _mm_getcsr();
    NoSubnormals() { _mm_setcsr(before | 0x8040); }
    ~NoSubnormals() { _mm_setcsr(before); }
#else
    NoSubnormals() {}
#endif
};

static inline vec splat(float v) { return vec{} + v; }
#ifdef __AVX512F__  // what GCC 12 does not find by itself
static inline vec max(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }  // b where one is NaN
static inline vec min(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
static inline ivec widen(hvec h) { return (ivec)_mm512_cvtepu16_epi32((__m256i)h); }
#else
static inline vec max(vec a, vec b) { return a > b ? a : b; }
static inline vec min(vec a, vec b) { return a < b ? a : b; }
static inline ivec widen(hvec h) { return __builtin_convertvector(h, ivec); }
#endif

// the first `count` lanes (of 16) of what lies at p; the others are `rest`
static inline vec load(const float* p) { vec v; memcpy(&v, p, sizeof v); return v; }
static inline vec load(const bf16* p) {
    hvec h;
    memcpy(&h, p, sizeof h);
    return (vec)(widen(h) << 16);
}
template <typename T> static inline vec load(const T* p, int count, float rest) {
    T tail[LANES] = {};
    memcpy(tail, p, sizeof(T) * count);
    vec v = load(tail);
    for (int i = count; i < LANES; i++) v[i] = rest;
    return v;
}

static inline void store(float* p, vec v) { memcpy(p, &v, sizeof v); }
static inline void store(bf16* p, vec v) {  // to nearest, ties to even; finite values only
    ivec i = (ivec)v;
    hvec h = __builtin_convertvector((i + 0x7fff + ((i >> 16) & 1)) >> 16, hvec);
    memcpy(p, &h, sizeof h);
}
template <typename T> static inline void store(T* p, vec v, int count) {
    T tail[LANES];
    store(tail, v);
    memcpy(p, tail, sizeof(T) * count);
}

static inline float sum(vec v) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
}
static inline float largest(vec v) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
    return v[0];
}

// 2^z to 1.5e-7, 0 below 2^-126; NaN stays NaN. Minimax polynomial on [-1/2, 1/2].
static inline vec exp2(vec z) {
#ifdef __AVX512DQ__
    vec f = (vec)_mm512_reduce_ps((__m512)z, 0), n = z - f;  // what rounding to an integer takes away; 0 of infinities
#else
    z = max(splat(-127.f), min(splat(127.f), z));            // beyond: the value at 2^127
    vec n = (z + 12582912.f) - 12582912.f, f = z - n;        // 1.5 x 2^23 leaves no place for fractions
#endif
    vec p = splat(0.001327647129073739f);
    p = p * f + 0.009675540961325169f;
    p = p * f + 0.05550713092088699f;
    p = p * f + 0.24022120237350464f;
    p = p * f + 0.6931469440460205f;
    p = p * f + 1.0000001192092896f;
#ifdef __AVX512DQ__
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return n < -126.f ? vec{} : (vec)((ivec)p + (__builtin_convertvector(n, ivec) << 23));
#endif
}

// ln v to 2e-7, for normal positive v, else NaN: the series of atanh, mantissa in [2/3, 4/3)
static inline vec log(vec v) {
    ivec i = (ivec)v - 0x3f2aaaab;
    vec e = __builtin_convertvector(i >> 23, vec), m = (vec)((i & 0x7fffff) + 0x3f2aaaab);
    vec s = (m - 1.f) / (m + 1.f), q = s * s;
    return s * (2.f + q * (0.6666667f + q * (0.4f + q * (0.2857143f + q * 0.2222222f)))) + e * 0.6931472f + (v - v);
}
