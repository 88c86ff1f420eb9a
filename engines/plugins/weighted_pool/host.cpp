// The header's arithmetic on the host, for tests: c++ -O2 -shared -fPIC host.cpp. Takes the kernels' arguments and gives
// the same results.
#include "weighted_pool.cuh"

namespace weighted_pool {

template <typename T, bool kGelu, int kLanes>
void pool(const T* hidden, const float* weights, const Problem& p, T* out) {
    using Row = Lanes<T, kLanes>;
    for (int window = 0; window < p.output().count(); ++window) {
        float top = lowest();
        for (int i = 0; i < p.kernel.count(); ++i) top = fmaxf(top, p.score(weights[p.row(window, i)]));
        for (int channel = 0; channel < p.channels; channel += kLanes) {
            Pooled<kLanes> pooled;
            pooled.expect(top);
            for (int i = 0; i < p.kernel.count(); ++i) {
                const long long row = p.row(window, i);
                pooled.template add<kGelu>(*reinterpret_cast<const Row*>(hidden + row * p.channels + channel), p.score(weights[row]));
            }
            *reinterpret_cast<Row*>(out + static_cast<long long>(window) * p.channels + channel) = pooled.template result<T>();
        }
    }
}

}  // namespace weighted_pool

#define WEIGHTED_POOL(name, T, gelu, lanes)                                                                                            \
    extern "C" void name(const weighted_pool::T* hidden, const float* weights, int t, int h, int w, int channels, int kt, int kh,      \
                         int kw, int st, int sh, int sw, int temperature, weighted_pool::T* out) {                                     \
        const float value = weighted_pool::float_of(static_cast<unsigned>(temperature));                                              \
        const weighted_pool::Problem p{{t, h, w}, channels, {kt, kh, kw}, {st, sh, sw}, value};                                        \
        weighted_pool::pool<weighted_pool::T, gelu, lanes>(hidden, weights, p, out);                                                   \
    }
WEIGHTED_POOL_EACH(WEIGHTED_POOL)
