/*
The colours of training crops on the CPU: jitter in each crop's own order, grey, blur, solarise, normalise.

    crops  n 3 H W, uint8    table  n 12, f32, as data.py draws it    out  n 3 H W, f32: a byte x scale + shift

A crop is read once and written once: its operations meet in registers. Only contrast needs a pass of its own, for the
mean of what came before it, and the blur, which reads 9 rows: a ring of 9 rows blurred along themselves stays in L1,
and what is blurred across them is rounded, solarised, normalised and written at once. In between stand bytes, as in
Pillow, so that a crop of 256 pixels stays in L2. Bound by arithmetic: the hue takes most, 75 instructions a register.

Alone:  g++ -std=c++20 -O3 -march=native -ffp-contract=off -fopenmp -DALONE csrc/colours_cpu.cpp -o build/k && build/k
*/
#include <algorithm>

#include "vector.h"

#include "kernels_cpu.h"

namespace LEVEL {

#include "colours.h"

static constexpr int EDGE = 4;  // taps on either side of the middle one

static int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

template <typename T> static inline reg load_some(const T* p, int count) {
    reg v;
    T some[W] = {};
    if (count < W) memcpy(some, p, count * sizeof(T));
    load_into(v, count < W ? some : p);
    return v;
}
template <typename T> static inline void store_some(T* p, reg v, int count) {
    T some[W];
    store(count < W ? some : p, v);
    if (count < W) memcpy(p, some, count * sizeof(T));
}

// take(place, count, pixels) of all P pixels of x, W at a time, after the recipe's changes from `first` to `last`
template <typename Take>
static void run(const uint8_t* x, int64_t P, const Recipe& recipe, int first, int last, float mean, Take take) {
    const auto some = [&](int64_t i, int count) __attribute__((always_inline)) {
        Pixels<reg> p = {load_some(x + i, count), load_some(x + P + i, count), load_some(x + 2 * P + i, count)};
        for (int k = first; k < last; k++) p = changed(p, recipe.changes[k], mean);
        take(i, count, p);
    };
    int64_t i = 0;
    for (; i + W <= P; i += W) some(i, W);
    if (i < P) some(i, (int)(P - i));
}

static void blur(float* out, const uint8_t* x, float* rows, int64_t H, int64_t width, const Recipe& recipe, float scale,
                 float shift) {
    const int64_t row = padded(width) + LANES;  // a ring of 9; before them a row as it is, with its mirrored edges
    float *const line = rows + EDGE, *const ring = rows + row, taps[5];
    blur_taps(taps, recipe.sigma);
    const auto along = [&](int64_t y) {
        const uint8_t* from = x + mirrored(y, H) * width;
        for (int64_t i = 0; i < width; i += W)
            store(line + i, load_some(from + i, (int)std::min<int64_t>(W, width - i)));
        for (int i = 1; i <= EDGE; i++) line[-i] = line[i], line[width - 1 + i] = line[width - 1 - i];
        float* to = ring + (y + 9) % 9 * row;
        for (int64_t i = 0; i < width; i += W)
            store(to + i, blurred<reg>(taps, [&](int t) { return load_some(line + i + t, W); }));
    };
    for (int64_t y = -EDGE; y < EDGE; y++) along(y);
    for (int64_t y = 0; y < H; y++) {
        along(y + EDGE);
        const float* near[9];
        for (int t = 0; t < 9; t++) near[t] = ring + (y + t - EDGE + 9) % 9 * row;
        const auto across = [&](int64_t i, int count) __attribute__((always_inline)) {
            reg v = blurred<reg>(taps, [&](int t) { return load_some(near[EDGE + t] + i, W); });
            v = (v + 12582912.f) - 12582912.f;  // to the nearest whole number: 1.5 x 2^23 leaves no place for fractions
            store_some(out + y * width + i, (recipe.solarize ? solarized(v) : v) * scale + shift, count);
        };
        int64_t i = 0;
        for (; i + W <= width; i += W) across(i, W);
        if (i < width) across(i, (int)(width - i));
    }
}

// x: bytes of a crop; copy: as many, of any content; rows: as colours_scratch_cpu counts them
static void recolour(float* out, const uint8_t* x, const float* row, uint8_t* copy, float* rows, int64_t H,
                     int64_t width, const float* scale, const float* shift) {
    const int64_t P = H * width;
    const Recipe recipe = read_recipe(row);
    const auto keep = [&](int64_t i, int count, Pixels<reg> p) {
        store_some(copy + i, p.r, count);
        store_some(copy + P + i, p.g, count);
        store_some(copy + 2 * P + i, p.b, count);
    };
    int done = 0;
    float mean = 0;
    if (recipe.contrast < recipe.n) {
        ireg sums = {};
        int64_t sum = 0;
        done = recipe.contrast;
        run(x, P, recipe, 0, done, 0, [&](int64_t i, int count, Pixels<reg> p) {
            sums += __builtin_convertvector(luma(p), ireg);  // of 2^24 pixels at most: below 2^31
            if (done) keep(i, count, p);
        });
        for (int i = 0; i < W; i++) sum += sums[i];
        mean = mean_of(sum, P);
        if (done) x = copy;
    }
    if (!recipe.sigma) {
        run(x, P, recipe, done, recipe.n, mean, [&](int64_t i, int count, Pixels<reg> p) {
            if (recipe.solarize) p = {solarized(p.r), solarized(p.g), solarized(p.b)};
            store_some(out + i, p.r * scale[0] + shift[0], count);
            store_some(out + P + i, p.g * scale[1] + shift[1], count);
            store_some(out + 2 * P + i, p.b * scale[2] + shift[2], count);
        });
        return;
    }
    if (done < recipe.n) {
        run(x, P, recipe, done, recipe.n, mean, keep);
        x = copy;
    }
    for (int c = 0; c < 3; c++) blur(out + c * P, x + c * P, rows, H, width, recipe, scale[c], shift[c]);
}

// --------------------------------------------------------------------------------
// launchers

static int64_t scratch_of(int64_t H, int64_t width) { return padded(3 * H * width) + 40 * (padded(width) + LANES); }

int64_t colours_scratch_cpu(int64_t H, int64_t width, int threads) { return threads * scratch_of(H, width); }

void colours_cpu(float* out, const uint8_t* crops, const float* table, uint8_t* scratch, int64_t n, int64_t H,
                 int64_t width, const float* scale, const float* shift, int threads) {
    const int64_t size = 3 * H * width;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < n; i++) {
        uint8_t* const own = scratch + this_thread() * scratch_of(H, width);
        recolour(out + i * size, crops + i * size, table + 12 * i, own, (float*)(own + padded(size)), H, width, scale,
                 shift);
    }
}

}  // namespace LEVEL

// --------------------------------------------------------------------------------
// check against one pixel after another

#ifdef ALONE
#include "colours_check.h"

int main() {
    const auto run = [](float* out, const uint8_t* crops, const float* table, int n, int H, int W, const float* scale,
                        const float* shift) {
        std::vector<uint8_t> scratch(LEVEL::colours_scratch_cpu(H, W, 2));
        LEVEL::colours_cpu(out, crops, table, scratch.data(), n, H, W, scale, shift, 2);
    };
    return !(check_colours(48, 64, run) & check_colours(29, 37, run) & check_colours(5, 5, run));
}
#endif
