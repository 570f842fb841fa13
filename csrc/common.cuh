// Shared by the CUDA kernels. No torch.
// Conversions are spelled out: torch builds with -D__CUDA_NO_HALF_CONVERSIONS__, plain nvcc does not.
// What C++ has no word for stands between #ifdef __CUDACC__ and #endif, here and in mma.cuh; tests/cuda_on_cpu.h has
// the same for a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifdef __CUDACC__
struct Grid {  // of x blocks, or of x by y
    int64_t x, y;
    Grid(int64_t x, int64_t y = 1) : x(x), y(y) {}
};

// what a block shares, as many bytes as it was started with
template <typename T> __device__ inline T* shared_memory() {
    extern __shared__ uint4 memory_of_block[];
    return (T*)memory_of_block;
}

// 2^z to 2 units in the last place; 0 below 2^-126; NaN stays NaN
__device__ inline float exp2_fast(float z) {
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(z));
    return e;
}

// begins to copy 16 bytes to shared memory, zeros if they are not there; this thread has them after wait_for_copies
__device__ inline void copy_async(void* shared, const void* global, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"((uint32_t)__cvta_generic_to_shared(shared)), "l"(global), "r"(there ? 16 : 0) : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// as many blocks as the device runs at a time
template <typename Kernel>
static cudaError_t blocks_at_once(int& blocks, Kernel kernel, int threads, int shared) {
    int device, processors;
    cudaError_t status = cudaGetDevice(&device);
    if (!status) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (!status) status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (!status) status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared);
    if (!status && !(blocks *= processors)) status = cudaErrorInvalidConfiguration;
    return status;
}

template <typename... Parameters, typename... Arguments>
static cudaError_t start(void (*kernel)(Parameters...), Grid grid, int threads, int64_t shared, cudaStream_t stream,
                         Arguments... arguments) {
    if (shared > 48 << 10) {  // more than a kernel gets unasked
        const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
        if (status != cudaSuccess) return status;
    }
    kernel<<<dim3(grid.x, grid.y), threads, shared, stream>>>((Parameters)arguments...);
    return cudaGetLastError();
}
#endif

__host__ __device__ inline float to_float(float v) { return v; }
__host__ __device__ inline float to_float(__half v) { return __half2float(v); }
__host__ __device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T> __host__ __device__ T from_float(float v);
template <> __host__ __device__ inline float from_float<float>(float v) { return v; }
template <> __host__ __device__ inline __half from_float<__half>(float v) { return __float2half_rn(v); }
template <> __host__ __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
    return __float2bfloat16_rn(v);
}

// 8 elements in one transaction (two for float); p must be aligned to 16 bytes
template <typename T> __device__ inline void load8(float (&out)[8], const T* p) {
    constexpr int N = 16 / sizeof(T);
    union { uint4 bits; T values[N]; } pack;
#pragma unroll
    for (int i = 0; i < 8; i += N) {
        pack.bits = *reinterpret_cast<const uint4*>(p + i);
#pragma unroll
        for (int j = 0; j < N; j++) out[i + j] = to_float(pack.values[j]);
    }
}

template <typename T> __device__ inline void store8(T* p, const float (&in)[8]) {
    constexpr int N = 16 / sizeof(T);
    union { uint4 bits; T values[N]; } pack;
#pragma unroll
    for (int i = 0; i < 8; i += N) {
#pragma unroll
        for (int j = 0; j < N; j++) pack.values[j] = from_float<T>(in[i + j]);
        *reinterpret_cast<uint4*>(p + i) = pack.bits;
    }
}

constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ inline float warp_sum(float v) {
#pragma unroll
    for (int lane = 16; lane; lane /= 2) v += __shfl_xor_sync(ALL_LANES, v, lane);
    return v;  // the same in all lanes
}

__device__ inline float warp_max(float v) {
#pragma unroll
    for (int lane = 16; lane; lane /= 2) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, lane));
    return v;
}

// 8 elements from k on.  VECTOR: rows start on 16 bytes, K is a multiple of 8, and k < K;  else `rest` beyond K
template <bool VECTOR, typename T>
__device__ inline void load_row(float (&out)[8], const T* row, int64_t k, int64_t K, float rest) {
    if constexpr (VECTOR) {
        load8(out, row + k);
    } else {
#pragma unroll
        for (int j = 0; j < 8; j++) out[j] = k + j < K ? to_float(row[k + j]) : rest;
    }
}

template <bool VECTOR, typename T>
__device__ inline void store_row(T* row, const float (&in)[8], int64_t k, int64_t K) {
    if constexpr (VECTOR) {
        store8(row + k, in);
    } else {
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (k + j < K) row[k + j] = from_float<T>(in[j]);
    }
}

// whether load_row may take these rows of K by vectors
template <typename... T> static bool vectors(int64_t K, const T*... rows) {
    return K % 8 == 0 && (((uintptr_t)rows % 16 == 0) && ...);
}

#ifdef ALONE  // for the mains
#include <vector>

template <typename T> static T* on_device(const std::vector<float>& x) {
    std::vector<T> there(x.size());
    for (size_t i = 0; i < x.size(); i++) there[i] = from_float<T>(x[i]);
    T* p;
    cudaMalloc(&p, x.size() * sizeof(T));
    cudaMemcpy(p, there.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice);
    return p;
}
#endif
