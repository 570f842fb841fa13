/*
RoPE attention, forward, of up to some hundred tokens, on tensor cores (mma.sync m16n8k16, cp.async: sm_80 and later).

    q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]        T 3 A E, bf16 or f16, E = 64 or 128; one image after another
    q, k    = (a cos - b sin, b cos + a sin)         a, b = first, second half of E; float32, rounded to T once
    out     = softmax(q k^T / sqrt(E)) v             T A E
    lse     = log2 sum exp2(log2(e) q k^T / sqrt(E)) A T

As many blocks as the device runs stay on it; each takes one head of an image after another. Its queries are in
registers, 128 / E tiles of 16 a warp, so that what is read of k or v serves all of them. Keys and values lie in shared
memory, all at once if they fit, else in parts, and the next ones come into a second buffer meanwhile: read once, turned
once, where they lie, by the thread that copied them, with one barrier a part. Softmax online; the top that is
subtracted rises only when a score is 2^8 above it, so that o is hardly ever scaled.

Rows in shared memory have no padding: their pieces of 16 bytes are swizzled. A quarter of a multiprocessor has 16,384
registers, three warps of 168, so 9 or 10 warps take as many as 12 would. Of N = 261, E = 64 nine do 17 tiles: the
products of the quarter that has 5 of them take longer than memory does. A launch for each crop group.

Alone:  nvcc -std=c++20 -O3 -arch=native -DALONE csrc/rope_attention.cu -o build/k && build/k
*/
#include "kernels.h"
#include "mma.cuh"

constexpr float LOG2E = 1.4426950408889634f;

// blocks for the N rows of a head, and warps of each, of so many rows
struct Split { int blocks, warps; };
static inline Split split(int64_t N, int most_warps, int rows = 16) {
    const int tiles = (int)((N + rows - 1) / rows), blocks = (tiles + most_warps - 1) / most_warps;
    return {blocks, (tiles + blocks - 1) / blocks};
}

// whether rows may be read by 16 bytes
static bool aligned(const RopeGroup& group, const void* out, const void* qkv) {
    return ((uintptr_t)out | (uintptr_t)qkv | (uintptr_t)group.cos | (uintptr_t)group.sin) % 16 == 0;
}

template <typename T> __device__ inline uint32_t pack(float low, float high) {
    const T pair[2] = {from_float<T>(low), from_float<T>(high)};
    return (uint32_t)*(const uint16_t*)&pair[0] | (uint32_t)*(const uint16_t*)&pair[1] << 16;
}

// ----------------------------------------------------------------------------
// rows in shared memory

// where a piece of 8 elements begins: the same piece of 8 rows, one after another, touches every bank once
template <int E> __device__ inline int place(int row, int piece) { return row * E + (piece ^ row % 8) * 8; }

// f(row, piece, the piece E / 2 from it) for all such pairs of some rows, the same ones in a thread whatever f is. Odd
// rows begin with the second half, so that two rows of E = 64 that are written at once touch every bank once.
template <int E, typename F> __device__ inline void for_pairs(int rows, F f) {
    const int begin = threadIdx.x / (E / 16), step = blockDim.x / (E / 16);  // even
    const int one = threadIdx.x % (E / 16) + begin % 2 * (E / 16);
    for (int row = begin; row < rows; row += step) f(row, one, one ^ E / 16);
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

// begins to copy `rows` rows of a head from `first` on, `stride` apart, zeros beyond N
template <typename T, int E>
__device__ inline void copy_rows(T* tile, const T* x, int64_t stride, int first, int rows, int N) {
    for_pairs<E>(rows, [=](int row, int one, int other) {
        const T* from = x + (first + row) * stride;
        copy_async(tile + place<E>(row, one), from + one * 8, first + row < N);
        copy_async(tile + place<E>(row, other), from + other * 8, first + row < N);
    });
}

// turns those that this thread has copied
template <typename T, int E>
__device__ inline void turn_rows(T* tile, int first, int rows, const RopeGroup& group) {
    for_pairs<E>(rows, [=](int row, int one, int other) {
        if (first + row >= group.N) return;
        const int at = (first + row) * (E / 2) + one % (E / 16) * 8;
        turn<T>(*(uint4*)(tile + place<E>(row, one)), *(uint4*)(tile + place<E>(row, other)), group.cos + at,
                group.sin + at, row % 2);
    });
}

// ----------------------------------------------------------------------------
// kernel

constexpr int WARPS = 10;                        // of a block, at most: 320 queries of E = 64, 160 of E = 128
constexpr float SLACK = 8;                       // exp2 of it, and sums of that, are exact enough in all dtypes
template <int E> constexpr int TILES = 128 / E;  // of 16 queries, that a warp has

// 16 queries as left factors of products, and what softmax adds up for them: a lane has the rows g and g + 8
template <int E> struct Tile {
    uint32_t q[E / 16][4];
    float o[E / 8][4], sum[2], top[2];
};

// takes the queries from row `row` on, the head's from `first` on, and turns them: a lane has both of each pair
template <typename T, int E>
__device__ inline void set_out(Tile<E>& tile, const T* queries, int row, int first, const RopeGroup& group) {
    const int lane = threadIdx.x % 32;
    #pragma unroll
    for (int e = 0; e < E / 16; e++) load_matrices(tile.q[e], queries + place<E>(row + lane % 16, 2 * e + lane / 16));
    #pragma unroll
    for (int e = 0; e < E / 32; e++)
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const int n = min(first + lane / 4 + i % 2 * 8, (int)group.N - 1);   // beyond N: any angle
            const int at = n * (E / 2) + 16 * e + i / 2 * 8 + lane % 4 * 2;
            turn<T>(tile.q[e][i], tile.q[e + E / 32][i], group.cos + at, group.sin + at);
        }
    tile.top[0] = tile.top[1] = -INFINITY, tile.sum[0] = tile.sum[1] = 0;
    #pragma unroll
    for (auto& o : tile.o) o[0] = o[1] = o[2] = o[3] = 0;
}

// scores of 16 queries and 16 keys to p = exp2(score - top), rounded to T, as the left factor of a product
template <typename T, int E>
__device__ inline void soften(uint32_t (&p)[4], float (&s)[2][4], Tile<E>& tile, float scale) {
    float most[2];
    #pragma unroll
    for (int c = 0; c < 4; c += 2)
        most[c / 2] = scale * fmaxf(fmaxf(s[0][c], s[0][c + 1]), fmaxf(s[1][c], s[1][c + 1]));
    if (__any_sync(~0u, most[0] > tile.top[0] + SLACK || most[1] > tile.top[1] + SLACK)) {
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            float& top = tile.top[half];
            most[half] = fmaxf(most[half], __shfl_xor_sync(~0u, most[half], 1));
            most[half] = fmaxf(most[half], __shfl_xor_sync(~0u, most[half], 2));
            most[half] = fmaxf(most[half], top);
            const float shrink = exp2_fast(top - most[half]);        // 0 at first
            top = most[half], tile.sum[half] *= shrink;
            #pragma unroll
            for (int n = 0; n < E / 8; n++) tile.o[n][2 * half] *= shrink, tile.o[n][2 * half + 1] *= shrink;
        }
    }
    #pragma unroll
    for (int i = 0; i < 2; i++)
        #pragma unroll
        for (int c = 0; c < 4; c++) tile.sum[c / 2] += s[i][c] = exp2_fast(s[i][c] * scale - tile.top[c / 2]);
    p[0] = pack<T>(s[0][0], s[0][1]), p[1] = pack<T>(s[0][2], s[0][3]);
    p[2] = pack<T>(s[1][0], s[1][1]), p[3] = pack<T>(s[1][2], s[1][3]);
}

// M tiles of a warp meet n keys and values
template <typename T, int E, int M>
__device__ inline void attend(Tile<E>* tiles, const T* k, const T* v, int n) {
    const int lane = threadIdx.x % 32, t = lane % 4;
    const float scale = LOG2E * rsqrtf(E);
    for (int j = 0; j < n; j += 16) {
        uint32_t b[4], p[M][4];
        float s[M][2][4] = {};
        #pragma unroll
        for (int e = 0; e < E / 16; e++) {
            load_matrices(b, k + j * E + place<E>(lane / 16 * 8 + lane % 8, 2 * e + lane / 8 % 2));
            #pragma unroll
            for (int m = 0; m < M; m++) {
                mma<T>(s[m][0], tiles[m].q[e], b[0], b[1]);
                mma<T>(s[m][1], tiles[m].q[e], b[2], b[3]);
            }
        }
        #pragma unroll
        for (int m = 0; m < M; m++) {
            if (j + 16 > n) {
                #pragma unroll
                for (int c = 0; c < 8; c++)
                    if (j + c / 4 * 8 + 2 * t + c % 2 >= n) s[m][c / 4][c % 4] = -INFINITY;
            }
            soften<T, E>(p[m], s[m], tiles[m], scale);
        }
        #pragma unroll
        for (int e = 0; e < E / 16; e++) {
            load_matrices_transposed(b, v + j * E + place<E>(lane % 16, 2 * e + lane / 16));
            #pragma unroll
            for (int m = 0; m < M; m++) {
                mma<T>(tiles[m].o[2 * e], p[m], b[0], b[1]);
                mma<T>(tiles[m].o[2 * e + 1], p[m], b[2], b[3]);
            }
        }
    }
}

template <typename T, int E>
__global__ void __launch_bounds__(WARPS * 32)
attention_kernel(T* out, float* lse, const T* qkv, RopeGroup group, int parts, int keys, int64_t n_tokens, int A) {
    constexpr int M = TILES<E>;
    const int rows = blockDim.x / 2 * M, lane = threadIdx.x % 32, t = lane % 4, g = lane / 4;
    const int N = group.N, mine = threadIdx.x / 32 * 16 * M;         // row of the warp's first query
    T *k = shared_memory<T>(), *v = k + 2 * keys * E, *q = v + 2 * keys * E;  // two buffers of each
    const int64_t D = (int64_t)A * E;
    const auto token_of = [&](int head) { return group.first + head / A * (int64_t)N; };
    const auto first_of = [&](int slot) {  // query; at E = 128 blocks take turns, as the last has fewer of them to do
        return (int)(M == 1 ? (blockIdx.y + slot) % gridDim.y : blockIdx.y) * rows;
    };
    const auto begin = [&](int head, int part, int buffer, int slot) {  // to copy what a part of a head needs
        const T* x = qkv + token_of(head) * 3 * D + head % A * E;
        copy_rows<T, E>(k + buffer * keys * E, x + D, 3 * D, part * keys, keys, N);
        copy_rows<T, E>(v + buffer * keys * E, x + 2 * D, 3 * D, part * keys, keys, N);
        if (part == 0) copy_rows<T, E>(q + slot * rows * E, x, 3 * D, first_of(slot), rows, N);
    };

    int buffer = 0, slot = 0;
    begin(blockIdx.x, 0, buffer, slot);
    for (int head = blockIdx.x; head < group.n * A; head += gridDim.x, slot ^= 1) {
        const int first = first_of(slot), left = N - first - mine;   // query of the block; how many from the warp's on
        T* const own = q + slot * rows * E;
        Tile<E> tiles[M];
        for (int part = 0; part < parts; part++, buffer ^= 1) {
            T *const ks = k + buffer * keys * E, *const vs = v + buffer * keys * E;
            wait_for_copies();
            turn_rows<T, E>(ks, part * keys, keys, group);
            __syncthreads();                                         // all is there, and nobody reads the other buffer
            if (part + 1 < parts) begin(head, part + 1, buffer ^ 1, slot);
            else if (head + gridDim.x < group.n * A) begin(head + gridDim.x, 0, buffer ^ 1, slot ^ 1);
            if (left <= 0) continue;
            if (part == 0) {
                #pragma unroll
                for (int m = 0; m < M; m++)
                    if (left > 16 * m) set_out<T, E>(tiles[m], own, mine + 16 * m, first + mine + 16 * m, group);
            }
            const int n = min(keys, N - part * keys);
            if (M == 1 || left > 16) attend<T, E, M>(tiles, ks, vs, n);
            else attend<T, E, 1>(tiles, ks, vs, n);
        }
        if (left <= 0) continue;

        const int64_t token = token_of(head) + first + mine, a = head % A;
        float inverse[2 * M];                                        // for the rows g, g + 8, and of the next tile
        #pragma unroll
        for (int i = 0; i < 2 * M; i++) {
            float total = tiles[i / 2].sum[i % 2];
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            inverse[i] = 1 / total;
            const int row = g + 8 * i;
            if (t == 0 && row < left) lse[a * n_tokens + token + row] = tiles[i / 2].top[i % 2] + log2f(total);
        }
        T *const from = own + mine * E, *const to = out + token * D + a * E;
        #pragma unroll
        for (int n = 0; n < E / 8; n++)
            #pragma unroll
            for (int i = 0; i < 2 * M; i++) {                        // by way of the queries' place, for whole rows
                const float* o = tiles[i / 2].o[n] + i % 2 * 2;
                *(uint32_t*)(from + 8 * i * E + place<E>(g, n) + 2 * t) = pack<T>(o[0] * inverse[i], o[1] * inverse[i]);
            }
        __syncwarp();
        for (int i = lane; i < 16 * M * (E / 8); i += 32) {
            const int row = i / (E / 8), piece = i % (E / 8);
            if (row < left) *(uint4*)(to + row * D + piece * 8) = *(uint4*)(from + place<E>(row, piece));
        }
    }
}

// ----------------------------------------------------------------------------
// launcher

template <typename T, int E>
static cudaError_t launch(void* out, float* lse, const void* qkv, const RopeGroup& group, int64_t n_tokens, int A,
                          cudaStream_t stream) {
    int device, most, at_once;
    cudaError_t status = cudaGetDevice(&device);
    if (!status) status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status) return status;
    const Split s = split(group.N, WARPS, 16 * TILES<E>);
    const int row = E * sizeof(T), queries = 2 * s.warps * 16 * TILES<E> * row;  // bytes
    const Split k = split(group.N, (most - queries) / (4 * row) / 16);           // parts, and tiles of keys in each
    const int keys = k.warps * 16, shared = queries + 4 * keys * row, threads = s.warps * 32;
    status = blocks_at_once(at_once, attention_kernel<T, E>, threads, shared);
    if (status) return status;
    const int64_t heads = group.n * A, stay = at_once < s.blocks ? 1 : at_once / s.blocks;
    return start(attention_kernel<T, E>, {heads < stay ? heads : stay, s.blocks}, threads, shared, stream, (T*)out, lse,
                 (const T*)qkv, group, k.blocks, keys, n_tokens, A);
}

cudaError_t rope_attention_cuda(void* out, float* lse, const void* qkv, const RopeGroup* groups, int n_groups,
                                int64_t T, int A, int E, Dtype dtype, cudaStream_t stream) {
    if (dtype == Dtype::f32 || (E != 64 && E != 128)) return cudaErrorInvalidValue;
    const auto f = dtype == Dtype::f16 ? (E == 64 ? launch<__half, 64> : launch<__half, 128>)
                                       : (E == 64 ? launch<__nv_bfloat16, 64> : launch<__nv_bfloat16, 128>);
    for (const RopeGroup* g = groups; g < groups + n_groups; g++) {
        if (g->n * g->N * A == 0) continue;
        if (!aligned(*g, out, qkv)) return cudaErrorMisalignedAddress;
        const cudaError_t status = f(out, lse, qkv, *g, T, A, stream);
        if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

// ----------------------------------------------------------------------------
// check against loops in double

#ifdef ALONE
#include "rope_attention_check.h"

template <typename T> static void run(const Problem& p, Floats& out, Floats&) {
    const Dtype dtype = std::is_same_v<T, __half> ? Dtype::f16 : Dtype::bf16;
    T *qkv = on_device<T>(p.qkv), *out_ = on_device<T>(out);
    std::vector<T> found(out.size());
    std::vector<RopeGroup> groups;
    int64_t first = 0;
    for (size_t g = 0; g < p.groups.size(); first += p.groups[g].n * p.groups[g].N, g++)
        groups.push_back({first, p.groups[g].n, p.groups[g].N, on_device<float>(p.cos[g]), on_device<float>(p.sin[g])});
    cudaError_t status = rope_attention_cuda(out_, on_device<float>(Floats(p.T * p.A)), qkv, groups.data(),
                                             groups.size(), p.T, p.A, p.E, dtype, 0);
    if (status == cudaSuccess)
        status = cudaMemcpy(found.data(), out_, out.size() * sizeof(T), cudaMemcpyDeviceToHost);
    for (size_t i = 0; i < out.size(); i++) out[i] = status == cudaSuccess ? to_float(found[i]) : NAN;
    if (status != cudaSuccess) printf("%s\n", cudaGetErrorString(status));
}

int main() {  // 3 and 4 digits of results of size 1; one group and two, one block of a head and several
    bool good = true;
    for (int E : {64, 128})
        for (const auto& groups : {std::vector<Crops>{{2, 1}, {1, 21}}, {{1, 350}}}) {
            const Problem problem(groups, groups.size(), E);
            good &= check("bfloat16", problem, 3e-2, run<__nv_bfloat16>);
            good &= check("float16 ", problem, 4e-3, run<__half>);
        }
    return !good;
}
#endif
