// Weighted convolutional pooling (PPLLaVA): in every window over (frames, rows, columns), softmax(weights / temperature),
// then the weighted sum of the hidden rows. Channels last. All arithmetic is in this file, which compiles for host and
// device; tests compare the host build with arrays of the original implementation. The device build includes no other
// header, so NVRTC compiles it anywhere.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define WP_BOTH __host__ __device__ __forceinline__
#else
#define WP_BOTH inline
#endif
#if defined(__CUDA_ARCH__)
#define WP_DEVICE 1
#else
#define WP_DEVICE 0
#endif
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define WP_UNROLL _Pragma("unroll")
#else
#define WP_UNROLL
#endif
#if !defined(__CUDACC_RTC__)
#include <math.h>
#include <string.h>
#endif

namespace weighted_pool {

// -- storage types ------------------------------------------------------------------------------------------

using Float = float;
struct Half {  // IEEE half
    unsigned short bits;
};
struct BFloat {  // the upper half of a float
    unsigned short bits;
};

WP_BOTH unsigned bits_of(float value) {
#if WP_DEVICE
    return __float_as_uint(value);
#else
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

WP_BOTH float float_of(unsigned bits) {
#if WP_DEVICE
    return __uint_as_float(bits);
#else
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

WP_BOTH float lowest() { return float_of(0xFF800000u); }  // -infinity: NVRTC has no INFINITY

WP_BOTH float load(float value) { return value; }

WP_BOTH float load(BFloat value) { return float_of(static_cast<unsigned>(value.bits) << 16); }

WP_BOTH float load(Half value) {
#if WP_DEVICE
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#else
    const unsigned sign = (value.bits & 0x8000u) << 16, exponent = (value.bits >> 10) & 31u, fraction = value.bits & 0x3FFu;
    if (exponent == 31) return float_of(sign | 0x7F800000u | (fraction << 13));
    if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(fraction) * 0x1p-24f));  // zero and subnormals
    return float_of(sign | ((exponent + 112) << 23) | (fraction << 13));
#endif
}

WP_BOTH void store(float value, float* to) { *to = value; }

WP_BOTH void store(float value, BFloat* to) {  // to nearest, ties to even; capability 7.5 has no instruction for it
    const unsigned bits = bits_of(value);
    to->bits = static_cast<unsigned short>(value != value ? 0x7FFFu : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

WP_BOTH void store(float value, Half* to) {
#if WP_DEVICE
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(value));
#else
    const unsigned bits = bits_of(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude >= 0x47800000u) {  // too large: infinity, or NaN
        to->bits = static_cast<unsigned short>(sign | (magnitude > 0x7F800000u ? 0x7FFFu : 0x7C00u));
    } else if (magnitude < 0x38800000u) {  // subnormal: adding 1/2 leaves multiples of 2^-24 in the lowest bits
        to->bits = static_cast<unsigned short>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
    } else {
        to->bits = static_cast<unsigned short>(sign | ((magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13));
    }
#endif
}

// -- GELU ---------------------------------------------------------------------------------------------------

// x * Phi(x). Exact in float32 (erf). 16-bit values use max(x, 0) - |x| Phi(-|x|) with a polynomial for the second
// term: within 1.7e-4 of the exact value everywhere and 4e-5 for |x| <= 4, which is less than the rounding of x to
// 16 bits. It takes half of erf's instructions: with erf the kernel would be bound by arithmetic, not by memory.
WP_BOTH float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }

WP_BOTH float gelu_for_16_bits(float x) {
    const float t = fminf(fabsf(x), 4.0f);
    float p = 5.1185285e-05f;
    p = p * t - 0.000849327596f;
    p = p * t + 0.00509905489f;
    p = p * t - 0.0102996537f;
    p = p * t - 0.018431399f;
    p = p * t + 0.100381352f;
    p = p * t - 0.0264790822f;
    p = p * t - 0.389800519f;
    p = p * t + 0.498960555f;
    return fmaxf(x, 0.0f) - p * t;
}

template <bool kGelu>
WP_BOTH float activate(float stored) {
    return kGelu ? gelu(stored) : stored;
}
template <bool kGelu, typename T>
WP_BOTH float activate(T stored) {
    return kGelu ? gelu_for_16_bits(load(stored)) : load(stored);
}

// -- windows ------------------------------------------------------------------------------------------------

struct Size {
    int t, h, w;
    WP_BOTH int count() const { return t * h * w; }
};

struct Problem {
    Size input;     // frames, rows, columns
    int channels;   // of a hidden row
    Size kernel, stride;
    float temperature;

    WP_BOTH Size output() const {
        return Size{(input.t - kernel.t) / stride.t + 1, (input.h - kernel.h) / stride.h + 1, (input.w - kernel.w) / stride.w + 1};
    }
    // The hidden row at the i-th position of a window.
    WP_BOTH int row(int window, int i) const {
        const Size out = output();
        const int t = window / (out.h * out.w) * stride.t + i / (kernel.h * kernel.w);
        const int h = window / out.w % out.h * stride.h + i / kernel.w % kernel.h;
        const int w = window % out.w * stride.w + i % kernel.w;
        return (t * input.h + h) * input.w + w;
    }
    // The softmax's input for a weight.
    WP_BOTH float score(float weight) const { return weight / temperature; }
};

// Neighbouring channels of a row, 16 bytes in one access; a single lane where rows are not multiples of 16 bytes.
template <typename T, int kLanes>
struct alignas(sizeof(T) * kLanes) Lanes {
    T lane[kLanes];
};

// Running weighted sum of a window for some channels, with the running sum of the softmax.
template <int kLanes>
struct Pooled {
    float sum[kLanes] = {}, total = 0.0f, top = lowest();

    // Raise the running maximum to a score of the rows that follow; rescales the sums.
    WP_BOTH void expect(float score) {
        if (score <= top) return;
        const float scale = expf(top - score);
WP_UNROLL
        for (int lane = 0; lane < kLanes; ++lane) sum[lane] *= scale;
        total *= scale;
        top = score;
    }
    template <bool kGelu, typename T>
    WP_BOTH void add(const Lanes<T, kLanes>& row, float score) {
        const float share = expf(score - top);
WP_UNROLL
        for (int lane = 0; lane < kLanes; ++lane) sum[lane] += share * activate<kGelu>(row.lane[lane]);
        total += share;
    }
    template <typename T>
    WP_BOTH Lanes<T, kLanes> result() const {
        Lanes<T, kLanes> values;
        const float scale = 1.0f / total;
WP_UNROLL
        for (int lane = 0; lane < kLanes; ++lane) store(sum[lane] * scale, &values.lane[lane]);
        return values;
    }
};

}  // namespace weighted_pool

// Every variant: EACH(name, element type, GELU, lanes).
#define WEIGHTED_POOL_TYPE(EACH, suffix, T, lanes)                \
    EACH(weighted_pool_##suffix, T, false, lanes)                 \
    EACH(weighted_pool_##suffix##_gelu, T, true, lanes)           \
    EACH(weighted_pool_##suffix##_single, T, false, 1)            \
    EACH(weighted_pool_##suffix##_gelu_single, T, true, 1)
#define WEIGHTED_POOL_EACH(EACH)             \
    WEIGHTED_POOL_TYPE(EACH, f32, Float, 4)  \
    WEIGHTED_POOL_TYPE(EACH, f16, Half, 8)   \
    WEIGHTED_POOL_TYPE(EACH, bf16, BFloat, 8)
