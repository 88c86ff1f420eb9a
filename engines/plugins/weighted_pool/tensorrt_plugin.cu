// PromptGuidedPool3d as a TensorRT plugin (IPluginV3, TensorRT 10.0 and later) for programs that load engines in C++.
// CMake builds a library that the registry loads: loadLibrary(), trtexec --dynamicPlugins, or
// IBuilderConfig::setPluginsToSerialize.
//
// Inputs: hidden (T,H,W,C) float, half or bfloat16; weights (T,H,W) float. Output: (N,C) of hidden's type.
// Attributes: kernel int[3], stride int[3], temperature float, gelu int (1: apply the projector's GELU to hidden).
#include "weighted_pool.cu"

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace weighted_pool {

using namespace nvinfer1;

constexpr char kName[] = "PromptGuidedPool3d";
constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "ppllava_edge";

struct Attributes {
    std::array<int32_t, 3> kernel{}, stride{};
    float temperature{0.01f};
    int32_t gelu{0};

    bool valid() const {
        for (int axis = 0; axis < 3; ++axis) {
            if (kernel[axis] < 1 || stride[axis] < 1) return false;
        }
        return temperature > 0.0f;
    }
};

template <typename T, int kLanes>
cudaError_t launch(const void* hidden, const void* weights, void* out, const Problem& p, bool gelu, cudaStream_t stream);

#define WEIGHTED_POOL_LAUNCH(name, T, withGelu, lanes)                                                                                      \
    if (gelu == withGelu && kLanes == lanes) {                                                                                            \
        name<<<grid, kThreads, 0, stream>>>(static_cast<const T*>(hidden), static_cast<const float*>(weights), p.input.t, p.input.h,       \
                                            p.input.w, p.channels, p.kernel.t, p.kernel.h, p.kernel.w, p.stride.t, p.stride.h,             \
                                            p.stride.w, static_cast<int>(bits_of(p.temperature)), static_cast<T*>(out));                   \
    }
#define WEIGHTED_POOL_LAUNCHER(suffix, T, lanes_, last)                                                                                   \
    template <>                                                                                                                           \
    cudaError_t launch<T, lanes_>(const void* hidden, const void* weights, void* out, const Problem& p, bool gelu, cudaStream_t stream) { \
        constexpr int kLanes = lanes_;                                                                                                    \
        const dim3 grid(p.output().count(), (p.channels + kThreads * kLanes - 1) / (kThreads * kLanes));                                  \
        WEIGHTED_POOL_LAUNCH(weighted_pool_##suffix##last, T, false, lanes_)                                                              \
        WEIGHTED_POOL_LAUNCH(weighted_pool_##suffix##_gelu##last, T, true, lanes_)                                                        \
        return cudaGetLastError();                                                                                                        \
    }
WEIGHTED_POOL_LAUNCHER(f32, Float, 4, )
WEIGHTED_POOL_LAUNCHER(f32, Float, 1, _single)
WEIGHTED_POOL_LAUNCHER(f16, Half, 8, )
WEIGHTED_POOL_LAUNCHER(f16, Half, 1, _single)
WEIGHTED_POOL_LAUNCHER(bf16, BFloat, 8, )
WEIGHTED_POOL_LAUNCHER(bf16, BFloat, 1, _single)

template <typename T>
cudaError_t dispatch(const void* hidden, const void* weights, void* out, const Problem& p, bool gelu, cudaStream_t stream) {
    constexpr int kWide = 16 / sizeof(T);
    const bool aligned = (reinterpret_cast<std::uintptr_t>(hidden) | reinterpret_cast<std::uintptr_t>(out)) % 16 == 0;
    return aligned && p.channels % kWide == 0 ? launch<T, kWide>(hidden, weights, out, p, gelu, stream)
                                              : launch<T, 1>(hidden, weights, out, p, gelu, stream);
}

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    explicit Plugin(const Attributes& attributes) : mAttributes(attributes) {}

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
            case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        }
        return nullptr;
    }
    IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(mAttributes); }

    char const* getPluginName() const noexcept override { return kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t getNbOutputs() const noexcept override { return 1; }

    int32_t getOutputDataTypes(DataType* outputs, int32_t, DataType const* inputs, int32_t) const noexcept override {
        outputs[0] = inputs[0];
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t, DimsExprs const*, int32_t, DimsExprs* outputs, int32_t,
                            IExprBuilder& expressions) noexcept override {
        if (inputs[0].nbDims != 4 || inputs[1].nbDims != 3) return -1;
        const IDimensionExpr* windows = expressions.constant(1);
        for (int axis = 0; axis < 3; ++axis) {  // (size - kernel) / stride + 1
            const auto* room = expressions.operation(DimensionOperation::kSUB, *inputs[1].d[axis], *expressions.constant(mAttributes.kernel[axis]));
            const auto* steps = expressions.operation(DimensionOperation::kFLOOR_DIV, *room, *expressions.constant(mAttributes.stride[axis]));
            const auto* count = expressions.operation(DimensionOperation::kSUM, *steps, *expressions.constant(1));
            windows = expressions.operation(DimensionOperation::kPROD, *windows, *count);
        }
        outputs[0].nbDims = 2;
        outputs[0].d[0] = windows;
        outputs[0].d[1] = inputs[0].d[3];
        return 0;
    }

    bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* all, int32_t, int32_t) noexcept override {
        const auto type = all[position].desc.type;
        if (all[position].desc.format != TensorFormat::kLINEAR) return false;
        if (position == 0) return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
        return type == (position == 1 ? DataType::kFLOAT : all[0].desc.type);
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) noexcept override { return 0; }

    size_t getWorkspaceSize(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) const noexcept override { return 0; }

    int32_t onShapeChange(PluginTensorDesc const*, int32_t, PluginTensorDesc const*, int32_t) noexcept override { return 0; }

    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs, void* const* outputs, void*,
                    cudaStream_t stream) noexcept override {
        const auto& d = in[0].dims;
        const auto& a = mAttributes;
        const Problem p{{int(d.d[0]), int(d.d[1]), int(d.d[2])},
                        int(d.d[3]),
                        {a.kernel[0], a.kernel[1], a.kernel[2]},
                        {a.stride[0], a.stride[1], a.stride[2]},
                        a.temperature};
        const bool gelu = a.gelu != 0;
        cudaError_t status = cudaErrorInvalidValue;
        if (in[0].type == DataType::kFLOAT) status = dispatch<Float>(inputs[0], inputs[1], outputs[0], p, gelu, stream);
        if (in[0].type == DataType::kHALF) status = dispatch<Half>(inputs[0], inputs[1], outputs[0], p, gelu, stream);
        if (in[0].type == DataType::kBF16) status = dispatch<BFloat>(inputs[0], inputs[1], outputs[0], p, gelu, stream);
        return status == cudaSuccess ? 0 : -1;
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        mFields = {{"kernel", mAttributes.kernel.data(), PluginFieldType::kINT32, 3},
                   {"stride", mAttributes.stride.data(), PluginFieldType::kINT32, 3},
                   {"temperature", &mAttributes.temperature, PluginFieldType::kFLOAT32, 1},
                   {"gelu", &mAttributes.gelu, PluginFieldType::kINT32, 1}};
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
        return &mCollection;
    }

private:
    Attributes mAttributes;
    std::vector<PluginField> mFields;
    PluginFieldCollection mCollection{};
};

class Creator final : public IPluginCreatorV3One {
public:
    Creator() {
        mFields = {{"kernel", nullptr, PluginFieldType::kINT32, 3},
                   {"stride", nullptr, PluginFieldType::kINT32, 3},
                   {"temperature", nullptr, PluginFieldType::kFLOAT32, 1},
                   {"gelu", nullptr, PluginFieldType::kINT32, 1}};
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
    }
    char const* getPluginName() const noexcept override { return kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }
    PluginFieldCollection const* getFieldNames() noexcept override { return &mCollection; }

    IPluginV3* createPlugin(char const*, PluginFieldCollection const* fields, TensorRTPhase) noexcept override {
        Attributes attributes;
        for (int32_t i = 0; i < fields->nbFields; ++i) {
            const PluginField& field = fields->fields[i];
            if (!std::strcmp(field.name, "kernel") && !integers(field, attributes.kernel.data(), 3)) return nullptr;
            if (!std::strcmp(field.name, "stride") && !integers(field, attributes.stride.data(), 3)) return nullptr;
            if (!std::strcmp(field.name, "gelu") && !integers(field, &attributes.gelu, 1)) return nullptr;
            if (!std::strcmp(field.name, "temperature")) {
                if (field.type != PluginFieldType::kFLOAT32 || field.length != 1) return nullptr;
                attributes.temperature = *static_cast<float const*>(field.data);
            }
        }
        return attributes.valid() ? new (std::nothrow) Plugin(attributes) : nullptr;
    }

private:
    // Depending on their version, parsers pass integers with 32 or 64 bits.
    static bool integers(const PluginField& field, int32_t* to, int32_t count) {
        if (field.length != count) return false;
        for (int32_t i = 0; i < count; ++i) {
            if (field.type == PluginFieldType::kINT32) {
                to[i] = static_cast<int32_t const*>(field.data)[i];
            } else if (field.type == PluginFieldType::kINT64) {
                to[i] = static_cast<int32_t>(static_cast<int64_t const*>(field.data)[i]);
            } else {
                return false;
            }
        }
        return true;
    }

    std::vector<PluginField> mFields;
    PluginFieldCollection mCollection{};
};

}  // namespace weighted_pool

#if defined(_WIN32)
#define WEIGHTED_POOL_API extern "C" __declspec(dllexport)
#else
#define WEIGHTED_POOL_API extern "C" __attribute__((visibility("default")))
#endif

// The entry points that TensorRT looks for in a plugin library.
WEIGHTED_POOL_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static weighted_pool::Creator creator;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
    count = 1;
    return creators;
}

WEIGHTED_POOL_API void setLoggerFinder(nvinfer1::ILoggerFinder*) {}
