// Enough of CUDA to run simple kernels on a CPU: every thread of a block is a fiber, one block after another. It checks
// indices, barriers and shuffles, and what is read before it is written; not speed, and not what a GPU does in parallel.
#pragma once
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#define __launch_bounds__(...)

struct Dim {
    unsigned x = 1, y = 1;
    Dim(int64_t x = 1, int64_t y = 1) : x(x), y(y) {}
};
struct Fiber {
    ucontext_t context;
    bool done;
    std::vector<char> stack = std::vector<char>(64 << 10);
};
struct Meeting { int arrived = 0, count = 0; };

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int current;
inline std::function<void()> body;
inline Dim blockIdx, blockDim, gridDim;
inline struct { struct { operator int() const { return current; } } x; } threadIdx;
inline Meeting block_meeting, warp_meetings[32];
inline float shuffled[32][32];
inline std::vector<char> dynamic_memory(1 << 20);

inline void meet(Meeting& meeting, int size) {
    const int mine = meeting.count;
    if (++meeting.arrived == size) meeting.arrived = 0, meeting.count++;
    while (meeting.count == mine) swapcontext(&fibers[current].context, &scheduler);
}
inline void __syncthreads() { meet(block_meeting, blockDim.x); }
inline float __shfl_xor_sync(unsigned, float v, int mask) {
    const int warp = current / 32, lane = current % 32;
    shuffled[warp][lane] = v;
    meet(warp_meetings[warp], 32);
    v = shuffled[warp][lane ^ mask];
    meet(warp_meetings[warp], 32);
    return v;
}
inline void run_fiber() {
    body();
    fibers[current].done = true;
    swapcontext(&fibers[current].context, &scheduler);
}
inline void run_kernel(Dim grid, int threads, size_t memory, std::function<void()> kernel) {
    gridDim = grid, blockDim = Dim(threads), body = kernel;
    fibers.resize(threads);
    for (unsigned i = 0; i < grid.x * grid.y; i++) {
        blockIdx = Dim(i % grid.x, i / grid.x);
        memset(dynamic_memory.data(), 0xff, memory);  // NaN, for who reads before writing
        for (Fiber& fiber : fibers) {
            fiber.done = false;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size();
            makecontext(&fiber.context, run_fiber, 0);
        }
        for (int left = threads; left;)
            for (current = 0; current < threads; current++)
                if (!fibers[current].done) {
                    swapcontext(&scheduler, &fibers[current].context);
                    left -= fibers[current].done;
                }
    }
}

inline cudaError_t allocate(void** p, size_t size) {
    *p = aligned_alloc(256, (size + 255) / 256 * 256);
    memset(*p, 0xff, size);
    return cudaSuccess;
}
#define cudaMalloc allocate
#define cudaMemcpy(to, from, size, kind) memcpy(to, from, size)
#define cudaGetErrorString(status) ((status) ? "error" : "no error")
#define cudaGetLastError() cudaSuccess
#define cudaGetDevice(p) (*(p) = 0, cudaSuccess)
#define cudaDeviceGetAttribute(p, name, device) (*(p) = 232448, cudaSuccess)
#define cudaFuncSetAttribute(kernel, name, value) ((void)(value), cudaSuccess)
