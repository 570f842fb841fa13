/*
A box of a photo, resized: bicubic with antialiasing, byte for byte as PyTorch's interpolate has it for uint8 images.

    image  H W 3, uint8, rows `stride` bytes apart    out  3 S S, uint8, flipped if asked for

    first along the rows, then down the columns:  out = clip((sum over taps weight x byte + half) >> precision)

16 rows at a time are transposed, 3 w by 16, so that a tap's 16 bytes lie side by side whatever the channel; what comes
out is transposed back, 16 rows of each channel. Weights are whole numbers below 2^15, as many bits as the largest has
room for; two taps are one multiply-add of pairs. Bound by arithmetic, and by transposing.

Alone:  g++ -std=c++20 -O3 -march=native -ffp-contract=off -fopenmp -DALONE csrc/cut_cpu.cpp -o build/k && build/k
*/
#include <algorithm>

#include "vector.h"

#include "kernels_cpu.h"

namespace LEVEL {

constexpr int N = 16;  // bytes at once

#if defined(__SSE2__)  // wider registers gain nothing: half the time goes into transposing
struct Sums { __m128i of[4]; };
static inline void add_pair(Sums& s, const uint8_t* a, const uint8_t* b, int32_t weights) {
    const __m128i x = _mm_loadu_si128((const __m128i*)a), y = _mm_loadu_si128((const __m128i*)b);
    const __m128i w = _mm_set1_epi32(weights), zero = _mm_setzero_si128();
    const __m128i both[2] = {_mm_unpacklo_epi8(x, y), _mm_unpackhi_epi8(x, y)};
    for (int i = 0; i < 4; i++) {
        const __m128i pairs = i % 2 ? _mm_unpackhi_epi8(both[i / 2], zero) : _mm_unpacklo_epi8(both[i / 2], zero);
        s.of[i] = _mm_add_epi32(s.of[i], _mm_madd_epi16(pairs, w));
    }
}
static inline void start_sums(Sums& s, int32_t half) {
    for (int i = 0; i < 4; i++) s.of[i] = _mm_set1_epi32(half);
}
static inline void store_sums(uint8_t* p, const Sums& s, int precision) {
    const __m128i by = _mm_cvtsi32_si128(precision);
    const auto two = [&](int i) { return _mm_packs_epi32(_mm_sra_epi32(s.of[i], by), _mm_sra_epi32(s.of[i + 1], by)); };
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(two(0), two(2)));
}
#else
struct Sums { int32_t of[N]; };
static inline void add_pair(Sums& s, const uint8_t* a, const uint8_t* b, int32_t weights) {
    const int32_t first = (int16_t)weights, second = weights >> 16;
    for (int i = 0; i < N; i++) s.of[i] += a[i] * first + b[i] * second;
}
static inline void start_sums(Sums& s, int32_t half) {
    for (int i = 0; i < N; i++) s.of[i] = half;
}
static inline void store_sums(uint8_t* p, const Sums& s, int precision) {
    for (int i = 0; i < N; i++) p[i] = (uint8_t)std::clamp(s.of[i] >> precision, 0, 255);
}
#endif

// 16 rows of 16 bytes become columns
static inline void transpose(uint8_t* to, int64_t to_stride, const uint8_t* from, int64_t from_stride) {
#if defined(__SSE2__)
    __m128i a[N], b[N];
    for (int i = 0; i < N; i++) a[i] = _mm_loadu_si128((const __m128i*)(from + i * from_stride));
#pragma GCC unroll 4
    for (int round = 0; round < 4; round++) {  // rows i and i + 8 are interleaved; after four times all are columns
#pragma GCC unroll 8
        for (int i = 0; i < N / 2; i++) {
            b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + N / 2]);
            b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + N / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < N; i++) a[i] = b[i];
    }
    for (int i = 0; i < N; i++) _mm_storeu_si128((__m128i*)(to + i * to_stride), a[i]);
#else
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) to[i * to_stride + j] = from[j * from_stride + i];
#endif
}

// --------------------------------------------------------------------------------
// weights

struct Taps {  // of `size` places
    int most, used;    // taps of one that there is room for, and that the widest has; even, both
    int precision;     // bits
    int32_t* first;    // size
    int16_t* weights;  // size most: those of each place, then zeros
};

static double cubic(double x) {  // a = -1/2
    x = std::fabs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((x - 5) * x + 8) * x * -0.5 + 2 : 0;
}

static double step_of(int64_t length, int64_t size) { return (double)length / size; }

static int most_taps(int64_t length, int64_t size) {  // even
    return (2 * (int)std::ceil(2 * std::max(step_of(length, size), 1.)) + 2) / 2 * 2;
}

// exact: room for size most doubles
static void find_taps(Taps& taps, double* exact, int64_t length, int64_t size) {
    const double step = step_of(length, size), support = 2 * std::max(step, 1.), narrow = 1 / std::max(step, 1.);
    double largest = 0;
    int64_t widest = 0;
    for (int64_t i = 0; i < size; i++) {
        const double centre = step * (i + 0.5);
        const int64_t first = std::max<int64_t>((int64_t)(centre - support + 0.5), 0);
        const int64_t count = std::min<int64_t>((int64_t)(centre + support + 0.5), length) - first;
        double* const own = exact + i * taps.most;
        double sum = 0;
        widest = std::max(widest, count);
        for (int64_t k = 0; k < taps.most; k++) {
            own[k] = k < count ? cubic((k + first - centre + 0.5) * narrow) : 0;
            sum += own[k];
        }
        for (int64_t k = 0; k < count; k++) largest = std::max(largest, own[k] /= sum);
        taps.first[i] = (int32_t)first;
    }
    taps.used = (int)(widest + 1) / 2 * 2;
    taps.precision = 0;
    while (taps.precision < 22 && (int)(0.5 + largest * (1 << (taps.precision + 1))) < 1 << 15) taps.precision++;
    for (int64_t i = 0; i < size * taps.most; i++)
        taps.weights[i] = (int16_t)(exact[i] * (1 << taps.precision) + (exact[i] < 0 ? -0.5 : 0.5));
}

// out[0..16) from bytes of taps that lie `stride` apart
static inline void weigh(uint8_t* out, const uint8_t* from, int64_t stride, const int16_t* weights, const Taps& taps) {
    Sums sums;
    start_sums(sums, 1 << (taps.precision - 1));
    for (int k = 0; k < taps.used; k += 2) {
        int32_t pair;
        memcpy(&pair, weights + k, 4);
        add_pair(sums, from + k * stride, from + (k + 1) * stride, pair);
    }
    store_sums(out, sums, taps.precision);
}

// --------------------------------------------------------------------------------
// launchers

static int64_t whole_blocks(int64_t n) { return (n + N - 1) / N * N; }

struct Room {  // how scratch is divided, in bytes
    int64_t most[2], exact, first, weights, rows, strip, columns, narrow;
    Room(int64_t height, int64_t width, int64_t size) {
        most[0] = most_taps(width, size), most[1] = most_taps(height, size);
        exact = size * std::max(most[0], most[1]) * 8;
        first = size * 4;
        weights = size * 2 * std::max(most[0], most[1]);
        rows = whole_blocks(3 * width) * N;                               // the last 16 rows, of which some may lack
        strip = (whole_blocks(3 * width) + 3 * most[0]) * N;              // 16 rows as columns
        columns = 3 * whole_blocks(size) * N;                             // of each channel, resized
        narrow = 3 * whole_blocks(size) * (whole_blocks(height) + most[1]);  // all of it, as rows again
    }
    int64_t sum() const { return exact + 2 * (first + weights) + rows + strip + columns + narrow; }
};

int64_t cut_scratch_cpu(int64_t height, int64_t width, int64_t size) { return Room(height, width, size).sum(); }

void cut_cpu(uint8_t* out, const uint8_t* image, int64_t stride, int64_t height, int64_t width, int64_t size, bool flip,
             uint8_t* scratch) {
    const Room room(height, width, size);
    const auto take = [&](int64_t bytes) { return (scratch += bytes) - bytes; };
    double* const exact = (double*)take(room.exact);
    Taps taps[2];  // along rows, down columns
    for (int i = 0; i < 2; i++) {
        taps[i].first = (int32_t*)take(room.first), taps[i].weights = (int16_t*)take(room.weights);
        taps[i].most = (int)room.most[i];
        find_taps(taps[i], exact, i ? height : width, size);
    }
    uint8_t *const rows = take(room.rows), *const strip = take(room.strip), *const columns = take(room.columns),
            *const narrow = take(room.narrow);
    const int64_t line = whole_blocks(size), plane = line * (whole_blocks(height) + room.most[1]);
    for (int64_t y = 0; y < height; y += N) {
        const uint8_t* from = image + y * stride;
        int64_t apart = stride;
        if (y + N >= height) {  // there the image may end
            apart = whole_blocks(3 * width);
            for (int64_t i = 0; i < height - y; i++) memcpy(rows + i * apart, from + i * stride, 3 * width);
            from = rows;
        }
        for (int64_t i = 0; i < 3 * width; i += N) transpose(strip + i * N, N, from + i, apart);
        for (int64_t x = 0; x < size; x++)
            for (int c = 0; c < 3; c++)
                weigh(columns + (c * line + (flip ? size - 1 - x : x)) * N, strip + (3 * taps[0].first[x] + c) * N,
                      3 * N, taps[0].weights + x * taps[0].most, taps[0]);
        for (int c = 0; c < 3; c++)
            for (int64_t x = 0; x < line; x += N)
                transpose(narrow + c * plane + y * line + x, line, columns + (c * line + x) * N, N);
    }
    for (int c = 0; c < 3; c++)
        for (int64_t y = 0; y < size; y++) {
            uint8_t *const to = out + (c * size + y) * size, last[N];
            const uint8_t* const from = narrow + c * plane + taps[1].first[y] * line;
            for (int64_t x = 0; x < size; x += N) {
                weigh(x + N <= size ? to + x : last, from + x, line, taps[1].weights + y * taps[1].most, taps[1]);
                if (x + N > size) memcpy(to + x, last, size - x);
            }
        }
}

}  // namespace LEVEL

// --------------------------------------------------------------------------------
// check against sums in double

#ifdef ALONE
#include <cstdio>
#include <vector>

static double worst_of(int H, int W, int size) {  // how far a byte lies from the exact one, of the whole image
    std::vector<uint8_t> image(H * W * 3), out(3 * size * size), scratch(LEVEL::cut_scratch_cpu(H, W, size));
    for (int i = 0; i < H * W * 3; i++) image[i] = (uint8_t)(128 + 127 * std::sin(1.7 * i) * std::cos(0.01 * i));
    LEVEL::cut_cpu(out.data(), image.data(), 3 * W, H, W, size, true, scratch.data());
    const auto weight = [&](int from, int to, int length) {  // not yet normalised
        const double step = std::fmax(1, (double)length / size);
        const double x = std::fabs((from + 0.5 - (to + 0.5) * length / size) / step);
        return x < 1 ? 1.5 * x * x * x - 2.5 * x * x + 1 : x < 2 ? -0.5 * x * x * x + 2.5 * x * x - 4 * x + 2 : 0;
    };
    double worst = 0;
    for (int i = 0; i < 3 * size * size; i++) {
        const int c = i / size / size, y = i / size % size, x = size - 1 - i % size;
        double sum = 0, weights = 0;
        for (int s = 0; s < H; s++) {
            double along = 0, beside = 0;
            for (int t = 0; t < W; t++) {
                along += weight(t, x, W) * image[(s * W + t) * 3 + c];
                beside += weight(t, x, W);
            }
            sum += weight(s, y, H) * std::fmin(255, std::fmax(0, along / beside));
            weights += weight(s, y, H);
        }
        worst = std::fmax(worst, std::fabs(std::fmin(255, std::fmax(0, sum / weights)) - out[i]));
    }
    printf("%d x %d to %d: at most %.2f from the exact one\n", H, W, size, worst);
    return worst;
}

int main() { return !(worst_of(37, 50, 16) < 1.3 && worst_of(20, 33, 45) < 1.3 && worst_of(1, 70, 5) < 1.3); }
#endif
