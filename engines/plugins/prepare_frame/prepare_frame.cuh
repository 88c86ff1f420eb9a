// Resampling and normalisation of one RGB frame, exactly as Pillow resamples 8-bit images: one pass along the rows and
// one along the columns, weights in fixed point with 22 fraction bits, each pass rounded and clipped to 8 bits. The
// kernels and their host build for tests share this arithmetic. The host computes the weights (resampling.py): for each
// output element its first input, the number of inputs, and a row of integers.
#pragma once

#include "../weighted_pool/weighted_pool.cuh"  // storage types

#ifdef __CUDACC__
#define PREPARE_INLINE __device__ __forceinline__
#define MULTIPLY(a, b) __fmul_rn(a, b)
#define SUBTRACT(a, b) __fsub_rn(a, b)
#define DIVIDE(a, b) __fdiv_rn(a, b)
#else  // compiled with -ffp-contract=off
#define PREPARE_INLINE inline
#define MULTIPLY(a, b) ((a) * (b))
#define SUBTRACT(a, b) ((a) - (b))
#define DIVIDE(a, b) ((a) / (b))
#endif

constexpr int kPrecision = 22;

PREPARE_INLINE unsigned char clip8(long long sum) {
  long long value = sum >> kPrecision;
  return value < 0 ? 0 : value > 255 ? 255 : static_cast<unsigned char>(value);
}

// One output element; its inputs are `step` bytes apart and start at `line`.
PREPARE_INLINE unsigned char resample(const unsigned char* line, long long step, const int* bounds, const int* weights, int taps, int at) {
  int first = bounds[2 * at], count = bounds[2 * at + 1];
  long long sum = 1ll << (kPrecision - 1);
  for (int i = 0; i < count; ++i) sum += static_cast<long long>(line[(first + i) * step]) * weights[at * taps + i];
  return clip8(sum);
}

// (value / 255 - mean) / std, rounded after each step as on the host: no fused multiply-add.
PREPARE_INLINE float normalise(unsigned char value, float mean, float deviation) {
  return DIVIDE(SUBTRACT(MULTIPLY(static_cast<float>(value), 1.0f / 255.0f), mean), deviation);
}
