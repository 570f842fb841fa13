// What the mains of the RoPE attention kernels check them against: loops in double, and slopes of those.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <random>
#include <vector>

using Floats = std::vector<float>;

struct Crops { int64_t n, N; };  // images, and tokens of each

struct Problem {
    std::vector<Crops> groups;
    int64_t T = 0;
    int A, E;
    Floats qkv, dout;              // T 3 A E, T A E
    std::vector<Floats> cos, sin;  // N E/2 of each group

    Problem(std::vector<Crops> groups, int A, int E) : groups(groups), A(A), E(E) {
        std::mt19937 random(E + groups[0].N);
        std::normal_distribution<float> normal;
        for (auto [n, N] : groups) {
            T += n * N;
            cos.emplace_back(N * E / 2), sin.emplace_back(N * E / 2);
            for (int64_t i = 0; i < N * E / 2; i++) {
                const float angle = normal(random);
                cos.back()[i] = std::cos(angle), sin.back()[i] = std::sin(angle);
            }
        }
        qkv.resize(T * 3 * A * E), dout.resize(T * A * E);
        for (auto* x : {&qkv, &dout})
            for (float& v : *x) v = std::round(normal(random) * 32) / 32;  // exact in bfloat16 and float16
    }

    // out by the equation, of another qkv;  returns the sum of dout out
    double by_hand(const std::vector<double>& qkv, std::vector<double>& out) const {
        double total = 0;
        int64_t first = 0;  // token of the image
        for (size_t g = 0; g < groups.size(); g++)
            for (int64_t image = 0; image < groups[g].n; image++, first += groups[g].N)
                for (int a = 0; a < A; a++) total += head_by_hand(qkv, out, g, first, a);
        return total;
    }

    double head_by_hand(const std::vector<double>& qkv, std::vector<double>& out, size_t g, int64_t first,
                        int a) const {
        const int64_t N = groups[g].N;
        auto turned = [&](int64_t n, int which, int e) {
            const double* x = &qkv[(((first + n) * 3 + which) * A + a) * E];
            const int h = e % (E / 2);
            const double c = cos[g][n * (E / 2) + h], s = sin[g][n * (E / 2) + h];
            return e < E / 2 ? x[h] * c - x[h + E / 2] * s : x[h + E / 2] * c + x[h] * s;
        };
        std::vector<double> q(N * E), k(N * E);
        for (int64_t i = 0; i < N * E; i++) q[i] = turned(i / E, 0, i % E), k[i] = turned(i / E, 1, i % E);
        double total = 0;
        for (int64_t i = 0; i < N; i++) {
            std::vector<double> o(E);
            double sum = 0;
            for (int64_t j = 0; j < N; j++) {
                double s = 0;
                for (int e = 0; e < E; e++) s += q[i * E + e] * k[j * E + e];
                sum += s = std::exp(s / std::sqrt(E));
                for (int e = 0; e < E; e++) o[e] += s * qkv[(((first + j) * 3 + 2) * A + a) * E + e];
            }
            for (int e = 0; e < E; e++) {
                const int64_t at = ((first + i) * A + a) * E + e;
                total += (out[at] = o[e] / sum) * dout[at];
            }
        }
        return total;
    }
};

// run(problem, out, dqkv) fills out, and dqkv where it has a backward pass;  returns whether they are right to `most`
static bool check(const char* name, const Problem& problem, double most,
                  std::function<void(const Problem&, Floats&, Floats&)> run) {
    Floats out(problem.dout.size()), dqkv;
    run(problem, out, dqkv);
    std::vector<double> x(problem.qkv.begin(), problem.qkv.end()), exact(out.size()), unused(out.size());
    problem.by_hand(x, exact);
    double worst = 0, slope = 0, size = 0;
    for (size_t i = 0; i < out.size(); i++) worst = std::max(worst, std::abs(exact[i] - out[i]));
    std::mt19937 random(1);
    std::normal_distribution<double> normal;
    for (int which = 0; which < 3 && !dqkv.empty(); which++) {  // of q, of k, of v
        std::vector<double> up = x, down = x;
        double ours = 0;
        for (size_t i = 0; i < x.size(); i++)
            if ((int)(i / (problem.A * problem.E) % 3) == which) {
                const double d = normal(random);
                up[i] += 1e-5 * d, down[i] -= 1e-5 * d, ours += d * dqkv[i], size += dqkv[i] * dqkv[i];
            }
        const double hand = (problem.by_hand(up, unused) - problem.by_hand(down, unused)) / 2e-5;
        slope = std::max(slope, std::abs(ours - hand));
    }
    slope = dqkv.empty() ? 0 : slope / std::sqrt(size);
    printf("%s A %d E %3d, tokens", name, problem.A, problem.E);
    for (auto [n, N] : problem.groups) printf(" %d x %d", (int)n, (int)N);
    printf(": largest error %.1e, of slopes %.1e of their size\n", worst, slope);
    return worst < most && slope < most;  // false for NaN
}
