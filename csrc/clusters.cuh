// Rows of bfloat16 in the registers of eight blocks, a cluster: each of their threads has 8 G columns, of every row
// the same. So a row is read once from memory, what columns add up stays where it is, and only sums over a row cross
// from block to block: each warp writes its own to all eight, where all add them up in the same order.
//
// Rows come through a ring in shared memory, where a thread copies what it will read itself: nobody waits for others'.
#pragma once

#include <type_traits>

#include "row_sums.cuh"

namespace clusters {

constexpr int SIZE = 8, THREADS = 512, WARPS = THREADS / 32;
constexpr int STAGES = 4;                    // rows of a ring, three of them under way
constexpr int COLUMNS = 8 * SIZE * THREADS;  // of a row, at 8 a thread
constexpr int GROUPS = 3;                    // of 8 columns, at most, as registers allow
constexpr int MOST = 16;                     // clusters, of 128 multiprocessors

// What the warps of all blocks add up of a row: N sums, each in two numbers. Of two rows, as some blocks are ahead: no
// block writes of a row before it has read of the one before it what all warps wrote, who by then had read of the last.
template <int N> struct Mail {
    uint64_t boxes[2];
    float2 of_warps[2][N][SIZE * WARPS];

    __device__ void open() {
        if (threadIdx.x == 0)
            for (uint64_t& box : boxes) make_mailbox(&box), expect(&box, sizeof of_warps / 2);
        meet_in_cluster();
    }
    // this warp's sum `which` of the block's i-th row, to all blocks
    __device__ void tell(unsigned i, int which, float2 sum) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        before_sending();  // this warp has read of the last row what may now be overwritten
        if (lane < SIZE)
            send(lane, &of_warps[i % 2][which][rank_in_cluster() * WARPS + warp], sum, &boxes[i % 2]);
    }
    // until all have told theirs
    __device__ void wait(unsigned i) {
        wait_for(&boxes[i % 2], i / 2 % 2 == 0);
        if (threadIdx.x == 0) expect(&boxes[i % 2], sizeof of_warps / 2);
    }
    // sum of y 2^(x - top) over all (x, y) that were told
    __device__ LogSum whole(unsigned i, int which) const {
        constexpr int EACH = SIZE * WARPS / 32;
        float2 parts[EACH];
        float top = -1e30f, sum = 0;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            parts[j] = of_warps[i % 2][which][j * 32 + threadIdx.x % 32];
            top = fmaxf(top, parts[j].x);
        }
        top = warp_max(top);
#pragma unroll
        for (int j = 0; j < EACH; j++) sum += parts[j].y * exp2_fast(parts[j].x - top);
        return {top, warp_sum(sum)};
    }
};

// the first of 8 columns in this thread's group g
template <int G> __device__ inline int64_t column(int g) {
    return (((int64_t)rank_in_cluster() * G + g) * THREADS + threadIdx.x) * 8;
}

// this thread's columns of rows `first`, `first` + `by`, ... of x, n K, in this order
template <typename T, int G> struct Ring {
    static constexpr int bytes = STAGES * G * THREADS * 8 * (int)sizeof(T);
    T* stages;
    const T* x;
    int64_t stride;  // from row to row
    int left;        // rows that are there to be copied
    bool there[G];
    unsigned to = 0, from = 0;

    __device__ Ring(void* shared, const T* x, int64_t first, int64_t by, int64_t n, int64_t K)
        : stages((T*)shared + threadIdx.x * 8), x(x + first * K + column<G>(0)), stride(by * K),
          left((n - first + by - 1) / by) {
#pragma unroll
        for (int g = 0; g < G; g++) there[g] = column<G>(g) < K;
    }
    // begins to copy the next row, if there is one
    __device__ void begin() {
#pragma unroll
        for (int g = 0; g < G; g++)
            if (left > 0) copy_async(place(to, g), x + g * THREADS * 8, there[g]);
        to = (to + 1) % STAGES, x += stride, left--;
    }
    // the next row of those whose copies have come
    __device__ void take(float (&z)[G][8]) {
#pragma unroll
        for (int g = 0; g < G; g++) load8(z[g], place(from, g));
        from = (from + 1) % STAGES;
    }
    __device__ T* place(unsigned stage, int g) const { return stages + (stage * G + g) * THREADS * 8; }
};

// log2 u of this thread's columns, so low beyond the last that nothing adds up there
template <int G> __device__ inline void load_log2(float (&u)[G][8], const float* log_u, int64_t K) {
#pragma unroll
    for (int g = 0; g < G; g++) {
        load_row<true>(u[g], log_u, min(column<G>(g), K - 8), K, 0.f);
#pragma unroll
        for (int j = 0; j < 8; j++) u[g][j] = column<G>(g) < K ? u[g][j] * LOG2E : -1e9f;
    }
}

// 2^(z - top) in place of z, and what these are in all
template <int G> __device__ inline LogSum powers(float (&z)[G][8]) {
    LogSum own;
#pragma unroll
    for (int i = 0; i < 8 * G; i++) own.top = fmaxf(own.top, z[i / 8][i % 8]);
#pragma unroll
    for (int i = 0; i < 8 * G; i++) own.sum += z[i / 8][i % 8] = exp2_fast(z[i / 8][i % 8] - own.top);
    return own;
}

// whether these rows can be taken so
template <typename... Rows> static bool fit(int64_t K, const Rows*... rows) {
    return K <= GROUPS * COLUMNS && vectors(K, rows...);
}

// run(G), as a constant, of so many columns
template <typename Run> static cudaError_t for_columns(int64_t K, Run run) {
    return K <= COLUMNS     ? run(std::integral_constant<int, 1>())
         : K <= 2 * COLUMNS ? run(std::integral_constant<int, 2>())
                            : run(std::integral_constant<int, 3>());
}

// starts a kernel of n rows, by as many clusters as run at a time; none, and no error, where the device knows none
template <typename... Parameters, typename... Arguments>
static cudaError_t launch(int& count, void (*kernel)(Parameters...), int shared, int64_t n, cudaStream_t stream,
                          Arguments... arguments) {
    const cudaError_t status = clusters_at_once(count, kernel, SIZE, THREADS, shared);
    count = std::min<int64_t>({count, MOST, n});
    if (status != cudaSuccess || !count) return status;
    return start(kernel, {count * SIZE, 1, SIZE}, THREADS, shared, stream, arguments...);
}

}  // namespace clusters
