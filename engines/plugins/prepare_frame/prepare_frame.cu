#include "prepare_frame.cuh"

// One thread per output element and channel. in (height, *, channels), strides in bytes → out (height, width, 3), dense.
extern "C" __global__ void resample_rows(const unsigned char* in, long long row, long long pixel, long long channel, int height, int width,
                                         const int* bounds, const int* weights, int taps, unsigned char* out) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= height * width * 3) return;
  int c = i % 3, x = i / 3 % width, y = i / 3 / width;
  out[i] = resample(in + y * row + c * channel, pixel, bounds, weights, taps, x);
}

// in (*, width, 3), dense → (height, width, 3) at (left, top) of a canvas with rows of `canvas_width` pixels.
extern "C" __global__ void resample_columns(const unsigned char* in, int height, int width, const int* bounds, const int* weights, int taps,
                                            unsigned char* canvas, int canvas_width, int left, int top) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= height * width * 3) return;
  int c = i % 3, x = i / 3 % width, y = i / 3 / width;
  canvas[((top + y) * canvas_width + left + x) * 3 + c] = resample(in + x * 3 + c, width * 3ll, bounds, weights, taps, y);
}

// (side, side, 3) 8-bit → (3, side, side) in the engine's type.
#define NORMALISE_FRAME(SUFFIX, TYPE)                                                                                                                    \
  extern "C" __global__ void normalise_frame_##SUFFIX(const unsigned char* in, int side, float mean0, float mean1, float mean2, float std0, float std1,    \
                                                      float std2, TYPE* out) {                                                                            \
    int i = blockIdx.x * blockDim.x + threadIdx.x, area = side * side;                                                                                    \
    if (i >= area * 3) return;                                                                                                                            \
    int c = i / area, at = i % area;                                                                                                                      \
    weighted_pool::store(normalise(in[at * 3 + c], c == 0 ? mean0 : c == 1 ? mean1 : mean2, c == 0 ? std0 : c == 1 ? std1 : std2), out + i);                \
  }
NORMALISE_FRAME(f32, weighted_pool::Float)
NORMALISE_FRAME(f16, weighted_pool::Half)
