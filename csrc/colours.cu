/*
The colours of training crops on a GPU: the bytes of colours_cpu.cpp, one block a crop.

    crops  n 3 H W, uint8    table  n 12, f32, as data.py draws it    out  n 3 H W, f32: a byte x scale + shift

A block reads its crop once and writes it once. In between it stands as bytes in shared memory, 196,608 of them at 256
pixels; where it does not fit, or the card has less, in scratch. The mean that contrast asks for is a sum of whole
numbers over the block. The blur goes down in bands: rows blurred along themselves stand in a ring of up to 32, of which
8 are there already when the next band begins; what is blurred across them goes to memory at once. Bound by arithmetic:
per pixel about 150 instructions of colours and 100 of blur, 110 us for 64 images of 2 + 8 crops on an H100, computed.

Not run on a GPU.    Alone:  nvcc -std=c++20 -O3 -arch=sm_90a -DALONE csrc/colours.cu -o build/k && build/k
*/
#include <algorithm>
#include <cmath>

#include "common.cuh"
#include "kernels.h"

// --------------------------------------------------------------------------------
// a number whose products and sums are not fused

struct Number { float v; };

__device__ inline Number operator+(Number a, Number b) { return {__fadd_rn(a.v, b.v)}; }
__device__ inline Number operator-(Number a, Number b) { return {__fsub_rn(a.v, b.v)}; }
__device__ inline Number operator*(Number a, Number b) { return {__fmul_rn(a.v, b.v)}; }
__device__ inline Number operator/(Number a, Number b) { return {__fdiv_rn(a.v, b.v)}; }
__device__ inline Number operator+(Number a, float b) { return a + Number{b}; }
__device__ inline Number operator-(Number a, float b) { return a - Number{b}; }
__device__ inline Number operator*(Number a, float b) { return a * Number{b}; }
__device__ inline bool operator==(Number a, Number b) { return a.v == b.v; }
__device__ inline bool operator<(Number a, Number b) { return a.v < b.v; }
__device__ inline bool operator>=(Number a, Number b) { return a.v >= b.v; }
__device__ inline Number max(Number a, Number b) { return {fmaxf(a.v, b.v)}; }
__device__ inline Number min(Number a, Number b) { return {fminf(a.v, b.v)}; }
__device__ inline Number whole(Number a) { return {truncf(a.v)}; }
__device__ inline Number magnitude(Number a) { return {fabsf(a.v)}; }

#include "colours.h"

// --------------------------------------------------------------------------------
// kernel

struct Scale { float scale[3], shift[3]; };

constexpr int EDGE = 4, ROWS = 32, WARPS = 32;  // taps on either side; most rows of the ring; most warps of a block
constexpr int64_t HEAD = (8 + WARPS) * 4;       // bytes of shared memory before the ring: taps, sums of the warps

// N bytes at once; p on a multiple of N
template <int N> __device__ inline void load_bytes(Number (&to)[N], const uint8_t* p) {
    if constexpr (N == 4) {
        const uint32_t all = *reinterpret_cast<const uint32_t*>(p);
#pragma unroll
        for (int i = 0; i < 4; i++) to[i] = {(float)(all >> 8 * i & 255)};
    } else {
        to[0] = {(float)*p};
    }
}
template <int N> __device__ inline void store_bytes(uint8_t* p, const Number (&from)[N]) {
    if constexpr (N == 4) {
        uint32_t all = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) all |= (uint32_t)from[i].v << 8 * i;
        *reinterpret_cast<uint32_t*>(p) = all;
    } else {
        *p = (uint8_t)from[0].v;
    }
}
template <int N> __device__ inline void store_numbers(float* p, const Number (&from)[N], float scale, float shift) {
    float to[N];
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = (from[i] * scale + shift).v;
    if constexpr (N == 4) *reinterpret_cast<float4*>(p) = {to[0], to[1], to[2], to[3]};
    else *p = to[0];
}

// take(place, channels) of all P pixels of x, N to a thread, after the recipe's changes from `first` to `last`
template <int N, typename Take>
__device__ void run(const uint8_t* x, int P, const Recipe& recipe, int first, int last, float mean, Take take) {
    for (int i = threadIdx.x * N; i < P; i += blockDim.x * N) {
        Number c[3][N];
        for (int k = 0; k < 3; k++) load_bytes(c[k], x + (int64_t)k * P + i);
        for (int k = first; k < last; k++) {
#pragma unroll
            for (int j = 0; j < N; j++) {
                const Pixels<Number> p = changed(Pixels<Number>{c[0][j], c[1][j], c[2][j]}, recipe.changes[k], mean);
                c[0][j] = p.r, c[1][j] = p.g, c[2][j] = p.b;
            }
        }
        take(i, c);
    }
}

__device__ inline unsigned block_sum(unsigned v, unsigned* sums) {
    for (int lane = 16; lane; lane /= 2) v += __shfl_xor_sync(ALL_LANES, v, lane);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
    __syncthreads();
    unsigned total = 0;
    for (int warp = 0; warp < blockDim.x / 32; warp++) total += sums[warp];
    return total;
}

// one channel; rows: of the ring
template <int N>
__device__ void blur(float* out, const uint8_t* x, float* ring, const float (&taps)[5], int rows, int H, int width,
                     bool solarize, float scale, float shift) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, first = threadIdx.x % 32 * N, band = rows - 2 * EDGE;
    for (int top = 0; top < H; top += band) {
        const int end = min(top + band, H);
        for (int y = (top ? top + EDGE : -EDGE) + warp; y < end + EDGE; y += warps) {
            const uint8_t* from = x + mirrored(y, H) * width;
            for (int i = first; i < width; i += 32 * N) {
                Number near[N + 2 * EDGE], sums[N];
                if (N == 4 && i >= EDGE && i + N + EDGE <= width) {
#pragma unroll
                    for (int k = 0; k < N + 2 * EDGE; k += N) load_bytes<N>((Number(&)[N])near[k], from + i - EDGE + k);
                } else {
#pragma unroll
                    for (int k = 0; k < N + 2 * EDGE; k++) near[k] = {(float)from[mirrored(i - EDGE + k, width)]};
                }
#pragma unroll
                for (int j = 0; j < N; j++)
                    sums[j] = blurred<Number>(taps, [&](int t) { return near[EDGE + j + t]; });
                float* const to = ring + (y + EDGE) % rows * width + i;
#pragma unroll
                for (int j = 0; j < N; j++) to[j] = sums[j].v;
            }
        }
        __syncthreads();
        for (int y = top + warp; y < end; y += warps) {
            for (int i = first; i < width; i += 32 * N) {
                Number v[N];
#pragma unroll
                for (int j = 0; j < N; j++) {
                    v[j] = blurred<Number>(taps, [&](int t) {
                        return Number{ring[(y + EDGE + t) % rows * width + i + j]};
                    });
                    v[j] = {rintf(v[j].v)};
                    if (solarize) v[j] = solarized(v[j]);
                }
                store_numbers(out + (int64_t)y * width + i, v, scale, shift);
            }
        }
        __syncthreads();
    }
}

// INSIDE: the crop's bytes stand in shared memory;  N: pixels of a row that a thread takes at once
template <bool INSIDE, int N>
__global__ void __launch_bounds__(1024) recolour(float* out, const uint8_t* crops, const float* table, uint8_t* scratch,
                                                 int H, int width, int rows, Scale by) {
    const int P = H * width;
    const int64_t at = (int64_t)blockIdx.x * 3 * P;
    float* const taps_there = shared_memory<float>();
    unsigned* const sums = (unsigned*)(taps_there + 8);
    float* const ring = (float*)(sums + WARPS);
    uint8_t* const copy = INSIDE ? (uint8_t*)(ring + rows * width) : scratch + at;
    const Recipe recipe = read_recipe(table + (int64_t)blockIdx.x * 12);
    const uint8_t* x = crops + at;
    out += at;
    if (recipe.sigma && threadIdx.x == 0) {
        float taps[5];
        blur_taps(taps, recipe.sigma);
        for (int t = 0; t < 5; t++) taps_there[t] = taps[t];
    }
    const auto keep = [&](int i, const Number (&c)[3][N]) {
        for (int k = 0; k < 3; k++) store_bytes(copy + (int64_t)k * P + i, c[k]);
    };
    int done = 0;
    float mean = 0;
    if (recipe.contrast < recipe.n) {
        unsigned sum = 0;  // of 2^24 pixels at most: below 2^32
        done = recipe.contrast;
        run<N>(x, P, recipe, 0, done, 0, [&](int i, const Number (&c)[3][N]) {
            for (int j = 0; j < N; j++) sum += (unsigned)luma(Pixels<Number>{c[0][j], c[1][j], c[2][j]}).v;
            if (INSIDE || done) keep(i, c);
        });
        mean = mean_of(block_sum(sum, sums), P);
        if (INSIDE || done) x = copy;
    }
    if (!recipe.sigma) {
        run<N>(x, P, recipe, done, recipe.n, mean, [&](int i, Number (&c)[3][N]) {
            for (int k = 0; k < 3; k++) {
                for (int j = 0; recipe.solarize && j < N; j++) c[k][j] = solarized(c[k][j]);
                store_numbers(out + (int64_t)k * P + i, c[k], by.scale[k], by.shift[k]);
            }
        });
        return;
    }
    if (done < recipe.n || x != copy) {
        run<N>(x, P, recipe, done, recipe.n, mean, keep);
        x = copy;
    }
    __syncthreads();
    float taps[5];
    for (int t = 0; t < 5; t++) taps[t] = taps_there[t];
    for (int k = 0; k < 3; k++)
        blur<N>(out + (int64_t)k * P, x + (int64_t)k * P, ring, taps, rows, H, width, recipe.solarize, by.scale[k],
                by.shift[k]);
}

// --------------------------------------------------------------------------------
// launchers

struct Layout {  // of shared memory
    int rows;          // of the ring
    bool inside;       // the crop is there too
    int64_t shared;    // bytes
};

static Layout layout_of(int64_t H, int64_t width) {
    int device = 0, most = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const auto rows_beside = [&](int64_t bytes) {
        return (int)std::min<int64_t>({ROWS, H + 2 * EDGE, (most - HEAD - bytes) / (4 * width)});
    };
    const int64_t crop = (3 * H * width + 15) / 16 * 16;
    const int beside = rows_beside(crop), alone = rows_beside(0);
    if (beside >= std::min<int64_t>(16, H + 2 * EDGE)) return {beside, true, HEAD + 4 * beside * width + crop};
    return {alone, false, HEAD + 4 * alone * width};
}

int64_t colours_scratch_cuda(int64_t n, int64_t H, int64_t width) {
    return layout_of(H, width).inside ? 0 : n * 3 * H * width;
}

cudaError_t colours_cuda(float* out, const uint8_t* crops, const float* table, uint8_t* scratch, int64_t n, int64_t H,
                         int64_t width, const float* scale, const float* shift, cudaStream_t stream) {
    if (!n) return cudaSuccess;
    const Layout layout = layout_of(H, width);
    if (layout.rows < 2 * EDGE + 1) return cudaErrorInvalidValue;  // a row of more than 6,000 pixels
    const bool four = width % 4 == 0 && (uintptr_t)crops % 4 == 0 && (uintptr_t)out % 16 == 0;
    const auto kernel = layout.inside ? four ? recolour<true, 4> : recolour<true, 1>
                                      : four ? recolour<false, 4> : recolour<false, 1>;
    const Scale by = {{scale[0], scale[1], scale[2]}, {shift[0], shift[1], shift[2]}};
    const int threads = layout.shared > 113 << 10 ? 1024 : 512;  // a multiprocessor holds 1,024 then, or as many
    return start(kernel, n, threads, layout.shared, stream, out, crops, table, scratch, H, width, layout.rows, by);
}

// --------------------------------------------------------------------------------
// check against one pixel after another

#ifdef ALONE
#include "colours_check.h"

template <typename T> static T* on_device(const T* x, int64_t n) {
    T* p;
    cudaMalloc(&p, n * sizeof(T));
    if (x) cudaMemcpy(p, x, n * sizeof(T), cudaMemcpyHostToDevice);
    return p;
}

int main() {  // by four and by one; the last does not fit into shared memory
    int failed = 0;
    const auto run = [&](float* out, const uint8_t* crops, const float* table, int n, int H, int W, const float* scale,
                         const float* shift) {
        const int64_t size = (int64_t)n * 3 * H * W;
        float* const there = on_device<float>(nullptr, size);
        uint8_t* const scratch = on_device<uint8_t>(nullptr, colours_scratch_cuda(n, H, W));
        failed |= colours_cuda(there, on_device(crops, size), on_device(table, 12 * n), scratch, n, H, W, scale, shift,
                               0);
        failed |= cudaMemcpy(out, there, size * sizeof(float), cudaMemcpyDeviceToHost);
    };
    const bool good = check_colours(48, 64, run) & check_colours(29, 37, run) & check_colours(280, 284, run);
    return failed || !good;
}
#endif
