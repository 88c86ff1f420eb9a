// The host build for tests: the same functions over host memory, with a loop instead of the grid.
#include "prepare_frame.cuh"

extern "C" void resample_rows(const unsigned char* in, long long row, long long pixel, long long channel, int height, int width, const int* bounds,
                              const int* weights, int taps, unsigned char* out) {
  for (int i = 0; i < height * width * 3; ++i)
    out[i] = resample(in + i / 3 / width * row + i % 3 * channel, pixel, bounds, weights, taps, i / 3 % width);
}

extern "C" void resample_columns(const unsigned char* in, int height, int width, const int* bounds, const int* weights, int taps, unsigned char* canvas,
                                 int canvas_width, int left, int top) {
  for (int i = 0; i < height * width * 3; ++i) {
    int c = i % 3, x = i / 3 % width, y = i / 3 / width;
    canvas[((top + y) * canvas_width + left + x) * 3 + c] = resample(in + x * 3 + c, width * 3ll, bounds, weights, taps, y);
  }
}

#define NORMALISE_FRAME(SUFFIX, TYPE)                                                                                                                    \
  extern "C" void normalise_frame_##SUFFIX(const unsigned char* in, int side, float mean0, float mean1, float mean2, float std0, float std1, float std2,   \
                                           TYPE* out) {                                                                                                   \
    float mean[] = {mean0, mean1, mean2}, deviation[] = {std0, std1, std2};                                                                               \
    for (int i = 0, area = side * side; i < area * 3; ++i)                                                                                                \
      weighted_pool::store(normalise(in[i % area * 3 + i / area], mean[i / area], deviation[i / area]), out + i);                                         \
  }
NORMALISE_FRAME(f32, weighted_pool::Float)
NORMALISE_FRAME(f16, weighted_pool::Half)
