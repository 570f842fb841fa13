// What the mains of colours_cpu.cpp and colours.cu compare with: one pixel after another, by way of HSV's sectors, the
// blur in double. They differ from it by no byte, but for a blurred one in 10,000, which a level may be off.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

static int to_byte(double v) { return v < 0 ? 0 : v > 255 ? 255 : (int)v; }

static int grey_of(const uint8_t* p) { return (19595 * p[0] + 38470 * p[1] + 7471 * p[2] + 32768) >> 16; }

static void turn_by_sectors(uint8_t* p, int by) {
    const int top = p[0] > p[1] ? (p[0] > p[2] ? p[0] : p[2]) : (p[1] > p[2] ? p[1] : p[2]);
    const int low = p[0] < p[1] ? (p[0] < p[2] ? p[0] : p[2]) : (p[1] < p[2] ? p[1] : p[2]);
    if (top == low) return;
    float away[3];
    for (int k = 0; k < 3; k++) away[k] = (float)(top - p[k]) / (float)(top - low);
    const int most = p[0] == top ? 0 : p[1] == top ? 1 : 2;
    const float sixths = (float)(2.0 * most + away[(most + 2) % 3] - away[(most + 1) % 3]);
    const int hue = (to_byte((float)std::fmod(sixths / 6.0 + 1, 1.0) * 255.0) + by) & 255;
    const int saturation = to_byte((float)(top - low) / (float)top * 255.0), sector = 6 * hue / 255;
    const float part = (float)(6 * hue / 255.0 - sector), share = saturation / 255.f;
    const int down = std::lround(top * (1.0 - share)), falling = std::lround(top * (1.0 - share * part)),
              rising = std::lround(top * (1.0 - share * (1.0 - part)));
    const int found[6][3] = {{top, rising, down}, {falling, top, down}, {down, top, rising},
                             {down, falling, top}, {rising, down, top}, {top, down, falling}};
    for (int k = 0; k < 3; k++) p[k] = to_byte(found[sector % 6][k]);
}

// x: H W 3; row: of the table
static void recolour_by_hand(std::vector<uint8_t>& x, const float* row, int H, int W) {
    for (int turn = 0; turn < 4 && row[0]; turn++) {
        const int what = (int)row[5 + turn];
        const float factor = row[1 + what];
        int64_t sum = 0;
        for (int i = 0; i < H * W; i++) sum += grey_of(&x[3 * i]);
        const int mean = (int)((double)sum / (H * W) + 0.5);
        for (int i = 0; i < H * W; i++) {
            if (what == 3) turn_by_sectors(&x[3 * i], (uint8_t)(int)(factor * 255.0));
            else for (int k = 0, low = what == 0 ? 0 : what == 1 ? mean : grey_of(&x[3 * i]); k < 3; k++) {
                const float more = factor * (float)(x[3 * i + k] - low);
                x[3 * i + k] = to_byte(low + more);
            }
        }
    }
    for (int i = 0; i < H * W && row[9]; i++) x[3 * i] = x[3 * i + 1] = x[3 * i + 2] = grey_of(&x[3 * i]);
    const std::vector<uint8_t> sharp = x;
    for (int i = 0; i < 3 * H * W && row[10]; i++) {
        double sum = 0, weights = 0;
        for (int s = -4; s <= 4; s++)
            for (int t = -4; t <= 4; t++) {
                const int y = std::abs(i / 3 / W + s), z = std::abs(i / 3 % W + t);
                const double weight = std::exp(-0.5 * (s * s + t * t) / ((double)row[10] * row[10]));
                weights += weight;
                sum += weight * sharp[3 * ((y < H ? y : 2 * H - 2 - y) * W + (z < W ? z : 2 * W - 2 - z)) + i % 3];
            }
        x[i] = (uint8_t)std::lround(sum / weights);
    }
    for (int i = 0; i < 3 * H * W && row[11]; i++) x[i] = x[i] < 128 ? x[i] : 255 - x[i];
}

// run(out, crops, table, n, H, W, scale, shift) beside them
template <typename Run> static bool check_colours(int H, int W, Run run) {
    static const float table[6][12] = {
        {1, .7f, 1.3f, 1.2f, .1f, 0, 1, 2, 3}, {1, 1.4f, .6f, .8f, -.1f, 3, 2, 1, 0, 0, 1, 1},
        {1, 1.2f, 1.4f, 1.1f, .3f, 2, 3, 0, 1, 1, 0, 1}, {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, .1f},
        {0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2}, {1, 1, 1, 1, .5f, 1, 3, 2, 0}};
    const float scale[3] = {1, 2, .5f}, shift[3] = {0, -1, 3};
    const int P = H * W;
    std::vector<uint8_t> crops(18 * P);
    std::vector<float> out(18 * P);
    for (int i = 0; i < 18 * P; i++) crops[i] = (uint8_t)(128 + 127 * std::sin(1.7 * i) * std::cos(0.01 * i));
    run(out.data(), crops.data(), table[0], 6, H, W, scale, shift);
    int64_t wrong = 0, far = 0;
    for (int n = 0; n < 6; n++) {
        std::vector<uint8_t> x(3 * P);
        for (int i = 0; i < 3 * P; i++) x[i] = crops[3 * P * n + i % 3 * P + i / 3];
        recolour_by_hand(x, table[n], H, W);
        for (int i = 0; i < 3 * P; i++) {
            const double level = (out[3 * P * n + i % 3 * P + i / 3] - shift[i % 3]) / scale[i % 3];
            wrong += !(level == x[i]), far += !(std::fabs(level - x[i]) <= (table[n][10] ? 1 : 0));
        }
    }
    printf("%d x %d: %ld of %d bytes differ, %ld too far\n", H, W, (long)wrong, 18 * P, (long)far);
    return wrong <= 18 * P / 10000 && !far;
}
