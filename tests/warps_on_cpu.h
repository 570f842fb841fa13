// Enough of CUDA to run kernels for tensor cores on a CPU, slowly, where there is no GPU; included in place of
// common.cuh and mma.cuh. A thread is a fiber, which yields where CUDA synchronises; blocks run one by one. The layouts
// of ldmatrix and mma are written here from the PTX manual alone, element by element. cuda_on_cpu.h serves the others.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

typedef int cudaError_t, cudaStream_t;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
enum { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
template <typename T> cudaError_t cudaMalloc(T** p, size_t size) { return *p = (T*)malloc(size), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t size, int) {
    return memcpy(to, from, size), cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "cudaErrorInvalidValue"; }

struct uint4 { uint32_t x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float v) {
        uint32_t all;
        memcpy(&all, &v, 4);
        bits = (all + 0x7fff + (all >> 16 & 1)) >> 16;
    }
};
struct __half : __nv_bfloat16 { using __nv_bfloat16::__nv_bfloat16; };  // so that it compiles; nobody runs it
inline float to_float(uint16_t bits) {
    const uint32_t all = (uint32_t)bits << 16;
    float v;
    memcpy(&v, &all, 4);
    return v;
}
inline float to_float(__nv_bfloat16 v) { return to_float(v.bits); }
inline float __bfloat162float(__nv_bfloat16 v) { return to_float(v.bits); }
template <typename T> T from_float(float v) { return T(v); }

// ----------------------------------------------------------------------------
// fibers

struct Index { unsigned x; };
inline Index blockIdx, blockDim, threadIdx;
alignas(16) inline unsigned char memory[232448];  // 227 KiB, the most an H100 gives a block

struct Fiber { ucontext_t context; std::vector<char> stack; bool done; };
struct Barrier { unsigned arrived, generation; };
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Barrier barriers[1 + 32];  // of the block, of its warps
inline ucontext_t scheduler;
inline void (*body)(void*);
inline void* body_arguments;

inline void wait(Barrier& barrier, unsigned first, unsigned last) {  // for the fibers first to last that have not ended
    const unsigned me = threadIdx.x, generation = barrier.generation;
    for (barrier.arrived++; barrier.generation == generation;) {
        const auto alive = std::count_if(&fibers[first], &fibers[0] + last, [](auto& fiber) { return !fiber->done; });
        if (barrier.arrived < alive) swapcontext(&fibers[me]->context, &scheduler);
        else barrier.arrived = 0, barrier.generation++;
    }
}
inline void __syncthreads() { wait(barriers[0], 0, fibers.size()); }
inline unsigned warp() { return threadIdx.x / 32 * 32; }
inline void __syncwarp() { wait(barriers[1 + warp() / 32], warp(), warp() + 32); }

template <typename F> void run_block(F f, int threads) {
    body = [](void* p) { (*(F*)p)(); };
    body_arguments = &f;
    blockDim.x = threads;
    fibers.clear();
    for (Barrier& barrier : barriers) barrier = {};
    for (int i = 0; i < threads; i++) {
        fibers.push_back(std::unique_ptr<Fiber>(new Fiber{{}, std::vector<char>(1 << 16), false}));
        Fiber& fiber = *fibers.back();
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, [] { body(body_arguments), fibers[threadIdx.x]->done = true; }, 0);
    }
    for (bool any = true; any;) {
        any = false;
        for (unsigned i = 0; i < fibers.size(); i++)
            if (!fibers[i]->done) any = true, threadIdx.x = i, swapcontext(&scheduler, &fibers[i]->context);
    }
}

template <typename... Parameters, typename... Arguments>
cudaError_t start(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, cudaStream_t,
                  Arguments... arguments) {
    if (shared > (int)sizeof memory || threads > 1024 || blocks < 1) return cudaErrorInvalidValue;
    for (int64_t i = 0; i < blocks; i++) {
        memset(memory, 0xff, sizeof memory);  // NaN: what is not written must not be read
        blockIdx.x = i;
        run_block([=] { kernel((Parameters)arguments...); }, threads);
    }
    return cudaSuccess;
}

// ----------------------------------------------------------------------------
// what a warp does together: each lane shows what it brings, then all look

template <typename T> const T* show(T mine) {
    static T shown[1024];
    __syncwarp();
    shown[threadIdx.x] = mine;
    __syncwarp();
    return shown + warp();
}

inline float __shfl_xor_sync(uint32_t, float v, int mask) { return show(v)[(threadIdx.x % 32) ^ mask]; }

inline void load_matrices(uint32_t (&r)[4], const void* row) {
    const void* const* rows = show(row);
    for (int i = 0; i < 4; i++) memcpy(&r[i], (const uint32_t*)rows[8 * i + threadIdx.x % 32 / 4] + threadIdx.x % 4, 4);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    const void* const* rows = show(row);
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int i = 0; i < 4; i++)
        for (int half = r[i] = 0; half < 2; half++)
            r[i] |= (uint32_t)((const uint16_t*)rows[8 * i + 2 * t + half])[g] << 16 * half;
}

template <typename T> void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Given { uint32_t a[4], b[2]; };
    const Given* given = show(Given{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    auto half = [](uint32_t pair, int which) { return to_float((uint16_t)(pair >> 16 * which)); };
    for (int i = 0; i < 4; i++) {
        const int row = threadIdx.x % 32 / 4 + i / 2 * 8, column = threadIdx.x % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++)
            c[i] += half(given[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k % 2) *
                    half(given[column * 4 + k % 8 / 2].b[k / 8], k % 2);
    }
}
