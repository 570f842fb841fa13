// What both passes of RoPE attention share: rows of a head in shared memory, and their products on tensor cores.
#pragma once

#include "kernels.h"
#include "mma.cuh"

constexpr float LOG2E = 1.4426950408889634f;

template <int E> constexpr int LD = E + 8;  // of a row in shared memory: 8 rows of ldmatrix touch every bank once

// blocks for the N rows of a head, and warps of each, of so many rows
struct Split { int blocks, warps; };
static inline Split split(int64_t N, int most_warps, int rows = 16) {
    const int tiles = (int)((N + rows - 1) / rows), blocks = (tiles + most_warps - 1) / most_warps;
    return {blocks, (tiles + blocks - 1) / blocks};
}

// whether fetch_rows may read these by 16 bytes
template <typename... T> static bool aligned(const RopeGroup& group, const T*... rows) {
    return (((uintptr_t)rows % 16 == 0) && ...) && ((uintptr_t)group.cos | (uintptr_t)group.sin) % 16 == 0;
}

template <typename T> __device__ inline uint32_t pack(float low, float high) {
    const T pair[2] = {from_float<T>(low), from_float<T>(high)};
    return (uint32_t)*(const uint16_t*)&pair[0] | (uint32_t)*(const uint16_t*)&pair[1] << 16;
}

// c (16 x 8 n) = x y^T, of 16 rows x and 8 n rows y in shared memory
template <typename T, int E, int n>
__device__ inline void dot_rows(float (&c)[n][4], const T* x, const T* y) {
    const int lane = threadIdx.x % 32;
    #pragma unroll
    for (int i = 0; i < n; i++) c[i][0] = c[i][1] = c[i][2] = c[i][3] = 0;
    #pragma unroll
    for (int e = 0; e < E; e += 16) {
        uint32_t a[4], b[4];
        load_matrices(a, x + lane % 16 * LD<E> + e + lane / 16 * 8);
        #pragma unroll
        for (int i = 0; i < n; i += 2) {
            load_matrices(b, y + (i * 8 + lane / 16 * 8 + lane % 8) * LD<E> + e + lane / 8 % 2 * 8);
            mma<T>(c[i], a, b[0], b[1]);
            mma<T>(c[i + 1], a, b[2], b[3]);
        }
    }
}

// c (16 x E) += p y, of p (16 x 8 n) as dot_rows leaves it, rounded to T, and 8 n rows y in shared memory
template <typename T, int E, int n>
__device__ inline void mix_rows(float (&c)[E / 8][4], const float (&p)[n][4], const T* y) {
    const int lane = threadIdx.x % 32;
    #pragma unroll
    for (int i = 0; i < n; i += 2) {
        const uint32_t a[4] = {pack<T>(p[i][0], p[i][1]), pack<T>(p[i][2], p[i][3]),
                               pack<T>(p[i + 1][0], p[i + 1][1]), pack<T>(p[i + 1][2], p[i + 1][3])};
        #pragma unroll
        for (int e = 0; e < E; e += 16) {
            uint32_t b[4];
            load_matrices_transposed(b, y + (i * 8 + lane % 16) * LD<E> + e + lane / 16 * 8);
            mma<T>(c[e / 8], a, b[0], b[1]);
            mma<T>(c[e / 8 + 1], a, b[2], b[3]);
        }
    }
}

// turns the pairs (a, b) of 2 or 8 neighbours by their angles, in float32, rounded to T once; swapped: they are (b, a)
template <typename T, typename Bits>
__device__ inline void turn(Bits& a, Bits& b, const float* cos, const float* sin, bool swapped = false) {
    constexpr int n = sizeof(Bits) / 2;
    struct alignas(n == 8 ? 16 : 8) Each { float of[n]; };
    const Each c = *(const Each*)cos, s = *(const Each*)sin;
    union { Bits all; T of[n]; } x = {a}, y = {b};
    #pragma unroll
    for (int j = 0; j < n; j++) {
        const float low = to_float(x.of[j]), high = to_float(y.of[j]), z = swapped ? -s.of[j] : s.of[j];
        x.of[j] = from_float<T>(low * c.of[j] - high * z), y.of[j] = from_float<T>(high * c.of[j] + low * z);
    }
    a = x.all, b = y.all;
}

// `rows` rows of a head from `first` on, `stride` apart, to shared memory, zeros beyond N; turned if there is a cos
template <typename T, int E>
__device__ inline void fetch_rows(T* tile, const T* x, int64_t stride, int64_t first, int rows, int64_t N,
                                  const float* cos = nullptr, const float* sin = nullptr) {
    for (int i = threadIdx.x; i < rows * (E / 16); i += blockDim.x) {
        const int row = i / (E / 16), e = i % (E / 16) * 8;  // the pairs (e to e + 7, e + E/2 to e + E/2 + 7)
        const int64_t n = first + row;
        uint4 low = make_uint4(0, 0, 0, 0), high = low;
        if (n < N) {
            low = *(const uint4*)(x + n * stride + e), high = *(const uint4*)(x + n * stride + e + E / 2);
            if (cos) turn<T>(low, high, cos + n * (E / 2) + e, sin + n * (E / 2) + e);
        }
        *(uint4*)(tile + row * LD<E> + e) = low, *(uint4*)(tile + row * LD<E> + e + E / 2) = high;
    }
}

// a warp's 16 x E accumulators, times `scale`, to rows `first` to `first + 16` of a head; turned back if there is a cos
template <typename T, int E>
__device__ inline void put_rows(T* y, int64_t stride, int64_t first, int64_t N, const float (&c)[E / 8][4],
                                const float (&scale)[2], const float* cos = nullptr, const float* sin = nullptr) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        const int64_t n = first + g + 8 * half;
        if (n >= N) continue;
        #pragma unroll
        for (int i = 0; i < E / 16; i++) {
            const int e = 8 * i + 2 * t;
            float low[2] = {c[i][2 * half] * scale[half], c[i][2 * half + 1] * scale[half]};
            float high[2] = {c[i + E / 16][2 * half] * scale[half], c[i + E / 16][2 * half + 1] * scale[half]};
            if (cos) {
                const float2 x = *(const float2*)(cos + n * (E / 2) + e), z = *(const float2*)(sin + n * (E / 2) + e);
                const float a[2] = {low[0], low[1]};
                low[0] = a[0] * x.x + high[0] * z.x, high[0] = high[0] * x.x - a[0] * z.x;
                low[1] = a[1] * x.y + high[1] * z.y, high[1] = high[1] * x.y - a[1] * z.y;
            }
            *(uint32_t*)(y + n * stride + e) = pack<T>(low[0], low[1]);
            *(uint32_t*)(y + n * stride + e + E / 2) = pack<T>(high[0], high[1]);
        }
    }
}
