// What the mains of the RoPE attention kernels check them against: loops in double, and slopes of those.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <random>
#include <vector>

using Floats = std::vector<float>;

struct Problem {
    int B, N, A, E;
    Floats qkv, dout, cos, sin;  // B N 3 A E, B N A E, N E/2 twice

    Problem(int B, int N, int A, int E) : B(B), N(N), A(A), E(E), qkv(3 * B * N * A * E), dout(B * N * A * E),
                                          cos(N * E / 2), sin(N * E / 2) {
        std::mt19937 random(N);
        std::normal_distribution<float> normal;
        for (auto* x : {&qkv, &dout})
            for (float& v : *x) v = std::round(normal(random) * 32) / 32;  // exact in bfloat16 and float16
        for (size_t i = 0; i < sin.size(); i++) cos[i] = std::cos(sin[i] = normal(random)), sin[i] = std::sin(sin[i]);
    }

    // out by the equation, of another qkv;  returns the sum of dout out
    double by_hand(const std::vector<double>& qkv, std::vector<double>& out) const {
        auto turned = [&](int64_t n, int which, int a, int e) {
            const double* x = &qkv[((n * 3 + which) * A + a) * E];
            const int h = e % (E / 2), t = n % N * (E / 2) + h;
            return e < E / 2 ? x[h] * cos[t] - x[h + E / 2] * sin[t] : x[h + E / 2] * cos[t] + x[h] * sin[t];
        };
        double total = 0;
        for (int64_t ba = 0; ba < B * A; ba++)
            for (int64_t a = ba % A, first = ba / A * N, i = first; i < first + N; i++) {
                std::vector<double> o(E);
                double sum = 0;
                for (int64_t j = first; j < first + N; j++) {
                    double s = 0;
                    for (int e = 0; e < E; e++) s += turned(i, 0, a, e) * turned(j, 1, a, e);
                    sum += s = std::exp(s / std::sqrt(E));
                    for (int e = 0; e < E; e++) o[e] += s * qkv[((j * 3 + 2) * A + a) * E + e];
                }
                for (int e = 0; e < E; e++) {
                    const int64_t at = (i * A + a) * E + e;
                    total += (out[at] = o[e] / sum) * dout[at];
                }
            }
        return total;
    }
};

// run(problem, out, dqkv) fills both;  returns what main is to return
static int check(std::vector<std::array<int, 4>> shapes, double most,
                 std::function<void(const Problem&, Floats&, Floats&)> run) {
    bool good = true;
    for (auto [B, N, A, E] : shapes) {
        const Problem problem(B, N, A, E);
        Floats out(B * N * A * E), dqkv(3 * out.size());
        run(problem, out, dqkv);
        std::vector<double> x(problem.qkv.begin(), problem.qkv.end()), exact(out.size()), unused(out.size());
        problem.by_hand(x, exact);
        double worst = 0, slope = 0, size = 0;
        for (size_t i = 0; i < out.size(); i++) worst = std::max(worst, std::abs(exact[i] - out[i]));
        std::mt19937 random(1);
        std::normal_distribution<double> normal;
        for (int which = 0; which < 3; which++) {  // of q, of k, of v
            std::vector<double> up = x, down = x;
            double ours = 0;
            for (size_t i = 0; i < x.size(); i++)
                if ((int)(i / (A * E) % 3) == which) {
                    const double d = normal(random);
                    up[i] += 1e-5 * d, down[i] -= 1e-5 * d, ours += d * dqkv[i], size += dqkv[i] * dqkv[i];
                }
            const double hand = (problem.by_hand(up, unused) - problem.by_hand(down, unused)) / 2e-5;
            slope = std::max(slope, std::abs(ours - hand));
        }
        slope /= std::sqrt(size);
        printf("B %d N %3d A %d E %3d: largest error %.1e, of slopes %.1e of their size\n", B, N, A, E, worst, slope);
        good &= worst < most && slope < most;  // false for NaN
    }
    return !good;
}
