// Vectors for the CPU kernels. A `reg` is what one register of this level holds, a `vec` 16 floats on any machine. All
// levels round alike: sums have the order of the 16 lanes, and every fused multiply-add is written as one, so that the
// same bits come out whatever the processor. No torch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef LEVEL
#define LEVEL alone  // compiled by hand; setup.py names one for each set of instructions
#endif

namespace LEVEL {  // else the linker would take one level's inline functions for all of them

#ifdef _OPENMP
static inline int this_thread() { return omp_get_thread_num(); }
#else
static inline int this_thread() { return 0; }
#endif

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a register
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int LANES = 16;  // floats in a vec
typedef float reg __attribute__((vector_size(4 * W)));
typedef int32_t ireg __attribute__((vector_size(4 * W)));
typedef float loose __attribute__((vector_size(4 * W), aligned(4), may_alias));  // a reg anywhere in memory

template <typename H> struct Pair { H low, high; };  // two of what a register, or a pair, holds
using vec = std::conditional_t<W == 16, reg, std::conditional_t<W == 8, Pair<reg>, Pair<Pair<reg>>>>;

struct bf16 { uint16_t bits; };

// Numbers below 2^-126 take a hundred cycles each; a thread that holds this takes them for zero.
struct NoSubnormals {
#ifdef __SSE2__
    const unsigned before = _mm_getcsr();
    NoSubnormals() { _mm_setcsr(before | 0x8040); }
    ~NoSubnormals() { _mm_setcsr(before); }
#else
    NoSubnormals() {}
#endif
};

// --------------------------------------------------------------------------------
// one register

static inline reg in_all(float v) { return v - reg{}; }  // v + 0 would be an instruction: it is not always v
static inline void fill(reg& r, float v) { r = in_all(v); }

static inline void load_into(reg& v, const float* p) { v = *(const loose*)p; }
static inline void store(float* p, reg v) { *(loose*)p = v; }

static inline void load_into(reg& v, const bf16* p) {
#if defined(__AVX512F__)
    v = (reg)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
    v = (reg)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#elif defined(__SSE2__)
    v = (reg)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i*)p));
#else
    for (int i = 0; i < W; i++) ((ireg&)v)[i] = (int32_t)p[i].bits << 16;
#endif
}

static inline void store(bf16* p, reg v) {  // to nearest, ties to even; finite values and the usual NaN
    const ireg i = (ireg)v, high = (i + 0x7fff + ((i >> 16) & 1)) >> 16;
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)high));
#elif defined(__AVX2__)
    const __m256i both = (__m256i)high;
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
#elif defined(__SSE2__)
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi32((__m128i)high, (__m128i)high));
#else
    for (int j = 0; j < W; j++) p[j].bits = high[j];
#endif
}

// whole numbers from 0 to 255
#if defined(__AVX512F__)
static inline void load_into(reg& v, const uint8_t* p) {
    v = (reg)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
static inline void store(uint8_t* p, reg v) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32((__m512)v)));
}
#elif defined(__AVX2__)
static inline void load_into(reg& v, const uint8_t* p) {
    v = (reg)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
static inline void store(uint8_t* p, reg v) {
    const __m256i i = _mm256_cvttps_epi32((__m256)v);
    const __m128i both = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(both, both));
}
#else
static inline void load_into(reg& v, const uint8_t* p) {
    for (int i = 0; i < W; i++) v[i] = p[i];
}
static inline void store(uint8_t* p, reg v) {
    const ireg whole = __builtin_convertvector(v, ireg);
    for (int i = 0; i < W; i++) p[i] = (uint8_t)whole[i];
}
#endif
static inline reg whole(reg v) {  // without what follows the point
    return __builtin_convertvector(__builtin_convertvector(v, ireg), reg);
}
static inline reg magnitude(reg v) { return (reg)((ireg)v & 0x7fffffff); }

// the second where one is NaN
#if defined(__AVX512F__)
static inline reg max(reg a, reg b) { return (reg)_mm512_max_ps((__m512)a, (__m512)b); }
static inline reg min(reg a, reg b) { return (reg)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
static inline reg max(reg a, reg b) { return (reg)_mm256_max_ps((__m256)a, (__m256)b); }
static inline reg min(reg a, reg b) { return (reg)_mm256_min_ps((__m256)a, (__m256)b); }
#elif defined(__SSE2__)
static inline reg max(reg a, reg b) { return (reg)_mm_max_ps((__m128)a, (__m128)b); }
static inline reg min(reg a, reg b) { return (reg)_mm_min_ps((__m128)a, (__m128)b); }
#else
static inline reg max(reg a, reg b) { return a > b ? a : b; }
static inline reg min(reg a, reg b) { return a < b ? a : b; }
#endif

// a b + c, rounded once
static inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#if defined(__AVX512F__)
static inline reg fma(reg a, reg b, reg c) { return (reg)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__AVX2__)
static inline reg fma(reg a, reg b, reg c) { return (reg)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#elif defined(__aarch64__)
static inline reg fma(reg a, reg b, reg c) { return (reg)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#elif defined(__SSE2__)
// Without the instruction: the product of two floats is exact in double, and so their sum with a third rounded to float
// is right, but where it lies just between two floats in double and not quite in truth.
static inline reg fma(reg a, reg b, reg c) {
    const __m128i low = _mm_set1_epi64x(0x1fffffff), between = _mm_set1_epi64x(0x100000000 | 0x10000000);
    __m128i tie = _mm_setzero_si128();
    const auto two = [&](__m128 a, __m128 b, __m128 c) {
        const __m128d s = _mm_add_pd(_mm_mul_pd(_mm_cvtps_pd(a), _mm_cvtps_pd(b)), _mm_cvtps_pd(c));
        tie = _mm_or_si128(tie, _mm_cmpeq_epi32(_mm_and_si128(_mm_castpd_si128(s), low), between));
        return _mm_cvtpd_ps(s);
    };
    const auto upper = [](reg x) { return _mm_movehl_ps((__m128)x, (__m128)x); };
    reg r = (reg)_mm_movelh_ps(two((__m128)a, (__m128)b, (__m128)c), two(upper(a), upper(b), upper(c)));
    if (__builtin_expect(_mm_movemask_epi8(tie), 0))
        for (int i = 0; i < W; i++) r[i] = fma(a[i], b[i], c[i]);
    return r;
}
#else
static inline reg fma(reg a, reg b, reg c) {
    for (int i = 0; i < W; i++) c[i] = fma(a[i], b[i], c[i]);
    return c;
}
#endif

// 2^z to 1.5e-7, 0 below 2^-126; NaN stays NaN; beyond 2^127 any large number. Minimax polynomial on [-1/2, 1/2].
static inline reg exp2(reg z) {
#if defined(__AVX512DQ__)
    const reg f = (reg)_mm512_reduce_ps((__m512)z, 0), n = z - f;  // what rounding takes away; 0 of infinities
#else
    z = min(in_all(127.f), z);
#if defined(__AVX2__)
    const ireg i = (ireg)_mm256_cvtps_epi32((__m256)z);
    const reg n = (reg)_mm256_cvtepi32_ps((__m256i)i), f = z - n;
#else
    const reg n = (z + 12582912.f) - 12582912.f, f = z - n;        // 1.5 x 2^23 leaves no place for fractions
    const ireg i = __builtin_convertvector(n, ireg);
#endif
#endif
    reg p = in_all(0.001327647129073739f);
    p = fma(p, f, in_all(0.009675540961325169f));
    p = fma(p, f, in_all(0.05550713092088699f));
    p = fma(p, f, in_all(0.24022120237350464f));
    p = fma(p, f, in_all(0.6931469440460205f));
    p = fma(p, f, in_all(1.0000001192092896f));
#if defined(__AVX512DQ__)
    const __mmask16 there = _mm512_cmp_ps_mask((__m512)z, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
    return (reg)_mm512_maskz_scalef_ps(there, (__m512)p, (__m512)n);
#elif defined(__AVX2__)
    const __m256 there = _mm256_cmp_ps((__m256)z, _mm256_set1_ps(-126.f), _CMP_NLT_UQ);
    return (reg)_mm256_and_ps(there, (__m256)((ireg)p + (i << 23)));
#else
    return (reg)(~(ireg)(z < -126.f) & ((ireg)p + (i << 23)));
#endif
}

// ln v to 2e-7, for normal positive v, else NaN: the series of atanh, mantissa in [2/3, 4/3)
static inline reg log(reg v) {
    const ireg i = (ireg)v - 0x3f2aaaab;
    const reg e = __builtin_convertvector(i >> 23, reg), m = (reg)((i & 0x7fffff) + 0x3f2aaaab);
    const reg s = (m - 1.f) / (m + 1.f), q = s * s;
    const reg series = 2.f + q * (0.6666667f + q * (0.4f + q * (0.2857143f + q * 0.2222222f)));
    return s * series + e * 0.6931472f + (v - v);
}

// --------------------------------------------------------------------------------
// pairs of registers, and pairs of these

template <typename H> static inline Pair<H> operator+(Pair<H> x, Pair<H> y) { return {x.low + y.low, x.high + y.high}; }
template <typename H> static inline Pair<H> operator-(Pair<H> x, Pair<H> y) { return {x.low - y.low, x.high - y.high}; }
template <typename H> static inline Pair<H> operator*(Pair<H> x, Pair<H> y) { return {x.low * y.low, x.high * y.high}; }
template <typename H> static inline Pair<H> operator-(Pair<H> x, float y) { return {x.low - y, x.high - y}; }
template <typename H> static inline Pair<H> operator*(Pair<H> x, float y) { return {x.low * y, x.high * y}; }
template <typename H> static inline Pair<H>& operator+=(Pair<H>& x, Pair<H> y) { return x = x + y; }
template <typename H> static inline Pair<H> max(Pair<H> x, Pair<H> y) {
    return {max(x.low, y.low), max(x.high, y.high)};
}
template <typename H> static inline Pair<H> exp2(Pair<H> x) { return {exp2(x.low), exp2(x.high)}; }
template <typename H> static inline Pair<H> log(Pair<H> x) { return {log(x.low), log(x.high)}; }
template <typename H> static inline Pair<H> fma(Pair<H> x, Pair<H> y, Pair<H> z) {
    return {fma(x.low, y.low, z.low), fma(x.high, y.high, z.high)};
}
template <typename H> static inline void fill(Pair<H>& x, float v) { fill(x.low, v), fill(x.high, v); }
template <typename H, typename T> static inline void load_into(Pair<H>& v, const T* p) {
    load_into(v.low, p), load_into(v.high, p + sizeof(H) / 4);
}
template <typename H, typename T> static inline void store(T* p, Pair<H> v) {
    store(p, v.low), store(p + sizeof(H) / 4, v.high);
}

// --------------------------------------------------------------------------------
// sixteen lanes

static inline vec splat(float v) {
    vec all;
    fill(all, v);
    return all;
}

template <typename T> static inline vec load(const T* p) {
    vec v;
    load_into(v, p);
    return v;
}
// the first `count` lanes (of 16) of what lies at p; the others are `rest`
template <typename T> static inline vec load(const T* p, int count, float rest) {
    T tail[LANES] = {};
    float all[LANES];
    memcpy(tail, p, sizeof(T) * count);
    store(all, load(tail));
    for (int i = count; i < LANES; i++) all[i] = rest;
    return load(all);
}
template <typename T> static inline void store(T* p, vec v, int count) {
    T tail[LANES];
    store(tail, v);
    memcpy(p, tail, sizeof(T) * count);
}

static inline float sum(vec v) {
    float all[LANES];
    store(all, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) all[i] += all[i + half];
    return all[0];
}
static inline float largest(vec v) {
    float all[LANES];
    store(all, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) all[i] = all[i] > all[i + half] ? all[i] : all[i + half];
    return all[0];
}

}  // namespace LEVEL
