// What the colours of a pixel become, with Pillow's rounding: whole numbers from 0 to 255 after every operation. V is a
// register of pixels on a CPU (vector.h), a single one in CUDA (colours.cu); either way each product and each sum
// rounds by itself, so that the same bytes come out everywhere. The definition in PyTorch: data.py. Included inside the
// namespace of a level, as it takes min, max, whole and magnitude of V from around it; <cmath>, <cstdint> come before.
#pragma once

#ifdef __CUDACC__
#define ANYWHERE __host__ __device__
#else
#define ANYWHERE
#endif

enum Operation { BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY };

struct Change {
    int operation;
    float amount;  // a factor; of hue the turn, in steps of 1/255 of the circle
};

struct Recipe {  // of one crop, as data.py's table has it in 12 columns
    int n, contrast;  // operations; which of them is contrast, which asks for a mean over all pixels: n = none
    Change changes[5];
    float sigma;      // of the blur; 0 = none
    bool solarize;
};

ANYWHERE static inline Recipe read_recipe(const float* row) {
    Recipe recipe = {};
    for (int turn = 0; row[0] && turn < 4; turn++) {
        const int operation = (int)row[5 + turn];
        float amount = row[1 + operation];
        if (operation == HUE) amount = (uint8_t)(int)(amount * 255.0);
        recipe.changes[recipe.n++] = {operation, amount};
    }
    if (row[9]) recipe.changes[recipe.n++] = {GREY, 0};
    recipe.contrast = recipe.n;
    for (int i = 0; i < recipe.n; i++)
        if (recipe.changes[i].operation == CONTRAST) recipe.contrast = i;
    recipe.sigma = row[10];
    recipe.solarize = row[11];
    return recipe;
}

// the middle one of the 9 taps of the blur, and those beside it on either side
ANYWHERE static inline void blur_taps(float (&taps)[5], float sigma) {
    double weights[5], sum = 0;
    for (int t = 0; t < 5; t++) {
        weights[t] = exp(-0.5 * t * t / ((double)sigma * sigma));
        sum += t ? 2 * weights[t] : weights[t];
    }
    for (int t = 0; t < 5; t++) taps[t] = (float)(weights[t] / sum);
}

// where a row or column beyond the edges of n is mirrored
ANYWHERE static inline int64_t mirrored(int64_t i, int64_t n) { return i < 0 ? -i : i >= n ? 2 * n - 2 - i : i; }

// of luma, rounded
ANYWHERE static inline float mean_of(int64_t sum, int64_t n) { return (float)((2 * sum + n) / (2 * n)); }

template <typename V> struct Pixels { V r, g, b; };

template <typename V> ANYWHERE static inline V luma(Pixels<V> p) {  // ITU-R 601; all below 2^24, so exact
    return whole((p.r * 19595.f + p.g * 38470.f + p.b * 7471.f + 32768.f) * 0x1p-16f);
}

template <typename V> ANYWHERE static inline V blend(V from, V to, float factor) {
    return whole(max(min(from + (to - from) * factor, V{} + 255.f), V{}));
}

template <typename V> ANYWHERE static inline Pixels<V> blend(V from, Pixels<V> to, float factor) {
    return {blend(from, to.r, factor), blend(from, to.g, factor), blend(from, to.b, factor)};
}

// value less what saturation takes of a channel that lies `share` of 255 from the hue
template <typename V> ANYWHERE static inline V channel(V value, V value_times_saturation, V share) {
    share = max(min(share, V{} + 255.f), V{});
    return whole((value + 0.5f) - value_times_saturation * share * (1 / 65025.f));
}

// To HSV and back, all three in 0 to 255. Pillow rounds the hue where it takes the middle channel's place in the sector
// from the sector's number, to float, and nowhere else that matters: so does this, and all 2^24 colours come out alike.
template <typename V> ANYWHERE static inline Pixels<V> turn_hue(Pixels<V> p, float by) {
    const V one = V{} + 1.f, top = max(p.r, max(p.g, p.b)), low = min(p.r, min(p.g, p.b)), chroma = top - low;
    const V middle = p.r + p.g + p.b - top - low, x = (top - middle) / max(chroma, one);
    const auto red = top == p.r, green = top == p.g;
    const V sector = red ? V{} : green ? one + 1.f : one + 3.f;
    const V lowest = red ? p.g : green ? p.b : p.r;
    const V sign = lowest == low ? one : V{} - one;
    V hue = ((sector - sign) + sign * x) / (V{} + 6.f);
    hue = whole((hue < V{} ? hue + 1.f : hue) * 255.f) + by;
    const V saturation = whole(chroma / max(top, one) * 255.f), both = top * saturation;
    const V turn = (hue >= V{} + 256.f ? hue - 256.f : hue) * 6.f;
    return {channel(top, both, V{} + 510.f - magnitude(turn - 765.f)),
            channel(top, both, magnitude(turn - 510.f) - 255.f),
            channel(top, both, magnitude(turn - 1020.f) - 255.f)};
}

template <typename V> ANYWHERE static inline Pixels<V> changed(Pixels<V> p, Change change, float mean) {
    switch (change.operation) {
        case BRIGHTNESS: return blend(V{}, p, change.amount);
        case CONTRAST:   return blend(V{} + mean, p, change.amount);
        case SATURATION: return blend(luma(p), p, change.amount);
        case HUE:        return turn_hue(p, change.amount);
    }
    const V grey = luma(p);
    return {grey, grey, grey};
}

template <typename V> ANYWHERE static inline V solarized(V v) { return min(v, V{} + 255.f - v); }

// 9 taps about at[0], `apart` from one another
template <typename V, typename Load>
ANYWHERE static inline V blurred(const float (&taps)[5], Load at) {
    V sum = at(0) * taps[0];
    for (int t = 1; t < 5; t++) sum = sum + (at(-t) + at(t)) * taps[t];
    return sum;
}
