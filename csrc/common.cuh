// Shared by the CUDA kernels. No torch.
// Conversions are spelled out: torch builds with -D__CUDA_NO_HALF_CONVERSIONS__, plain nvcc does not.
// What C++ has no word for stands between #ifdef __CUDACC__ and #endif, here and in mma.cuh; tests/cuda_on_cpu.h has
// the same for a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
struct Grid {  // of x blocks, or of x by y; `cluster` neighbours in x run at the same time and see each other's memory
    int64_t x, y;
    int cluster;
    Grid(int64_t x, int64_t y = 1, int cluster = 1) : x(x), y(y), cluster(cluster) {}
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

// begins to copy 16 bytes to shared memory, zeros if they are not there; this thread has them after wait_for_copies()
__device__ inline void copy_async(void* shared, const void* global, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"((uint32_t)__cvta_generic_to_shared(shared)), "l"(global), "r"(there ? 16 : 0) : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// what was begun since the last one is a group; after wait_for_copies<LEFT> this thread has all but the last LEFT
__device__ inline void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory");
}

// Of clusters: this block's number among its own; a barrier of all their threads, after which they may write to each
// other; writes to the same place of another block's shared memory, counted by a mailbox there. A mailbox is empty at
// first; it is full when so many bytes have come as one thread has said it should expect, and then is empty again:
// wait_for returns when that has happened an odd number of times (odd), or an even one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define ON_HOPPER(...)  // older ones compile what uses them, and never run it
#else
#define ON_HOPPER(...) asm volatile(__VA_ARGS__)
#endif
__device__ inline uint32_t in_shared(const void* place) { return __cvta_generic_to_shared(place); }
__device__ inline int rank_in_cluster() {
    int rank = 0;
    ON_HOPPER("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ inline void meet_in_cluster() {
    ON_HOPPER("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ inline void make_mailbox(uint64_t* box) {
    ON_HOPPER("mbarrier.init.shared.b64 [%0], 1;\n\tfence.mbarrier_init.release.cluster;"
              :: "r"(in_shared(box)) : "memory");
}
__device__ inline void expect(uint64_t* box, int bytes) {
    ON_HOPPER("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(in_shared(box)), "r"(bytes) : "memory");
}
__device__ inline void before_sending() {  // reads of this warp's shared memory come before what is sent to it then
    ON_HOPPER("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
}
__device__ inline void send(int rank, float2* place, float2 v, uint64_t* box) {
    uint32_t at = in_shared(place), to = in_shared(box);
    ON_HOPPER("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(at) : "r"(rank));
    ON_HOPPER("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(to) : "r"(rank));
    ON_HOPPER("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
              :: "r"(at), "f"(v.x), "f"(v.y), "r"(to) : "memory");
}
__device__ inline void wait_for(uint64_t* box, bool odd) {
    uint32_t full = 1;
    do {
        ON_HOPPER("{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n\t"
                  "selp.u32 %0, 1, 0, p;\n\t}" : "=r"(full) : "r"(in_shared(box)), "r"((uint32_t)!odd) : "memory");
    } while (!full);
}

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

struct Launch {  // what cudaLaunchKernelEx wants
    cudaLaunchAttribute cluster{};
    cudaLaunchConfig_t config{};
    Launch(Grid grid, int threads, int64_t shared, cudaStream_t stream) {
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = grid.cluster, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        config.gridDim = dim3(grid.x, grid.y), config.blockDim = dim3(threads);
        config.dynamicSmemBytes = shared, config.stream = stream;
        config.attrs = &cluster, config.numAttrs = grid.cluster > 1;
    }
    Launch(const Launch&) = delete;
};

// as many clusters of `size` as the device runs at a time; 0 where it knows none, or has no room for them
template <typename Kernel>
static cudaError_t clusters_at_once(int& clusters, Kernel kernel, int size, int threads, int shared) {
    int device, major, room;
    cudaError_t status = cudaGetDevice(&device);
    if (!status) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (!status) status = cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    clusters = 0;
    if (status || major < 9 || shared > room) return status;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    const Launch launch({size, 1, size}, threads, shared, nullptr);
    return status ? status : cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config);
}

template <typename... Parameters, typename... Arguments>
static cudaError_t start(void (*kernel)(Parameters...), Grid grid, int threads, int64_t shared, cudaStream_t stream,
                         Arguments... arguments) {
    if (shared > 48 << 10) {  // more than a kernel gets unasked
        const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
        if (status != cudaSuccess) return status;
    }
    const Launch launch(grid, threads, shared, stream);
    return cudaLaunchKernelEx(&launch.config, kernel, (Parameters)arguments...);
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
        for (int j = 0; j < N; j++) {
            if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // as nvcc does not find it: one instruction each
                const uint32_t two = (&pack.bits.x)[j / 2];
                out[i + j] = __uint_as_float(j % 2 ? two & 0xffff0000u : two << 16);
            } else {
                out[i + j] = to_float(pack.values[j]);
            }
        }
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
