// A CUDA device with nothing behind it, so that FakeTensorMode traces steps on `cuda:0` where there is no GPU.
//
// Hooks say that there is one device, a device guard does nothing. Load it before torch, for the hooks, and call
// `replace_guard` after it: a build with CUDA has registered a guard of its own by then.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);
const c10::Stream kStream(c10::Stream::DEFAULT, kDevice);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return kStream; }
  c10::Stream getDefaultStream(c10::Device) const override { return kStream; }
  c10::Stream getNewStream(c10::Device, int) const override { return kStream; }
  c10::Stream exchangeStream(c10::Stream) const override { return kStream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

// Not marked `override`: versions of torch differ in which of these they have.
struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const {}
  bool hasCUDA() const { return true; }
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const { return true; }
  at::DeviceIndex deviceCount() const { return 1; }
  void setCurrentDevice(at::DeviceIndex) const {}
  at::DeviceIndex getCurrentDevice() const { return 0; }
  at::DeviceIndex exchangeDevice(at::DeviceIndex) const { return 0; }
  at::DeviceIndex maybeExchangeDevice(at::DeviceIndex) const { return 0; }
  at::DeviceIndex current_device() const { return 0; }
  int getNumGPUs() const { return 1; }
  bool isPinnedPtr(const void*) const { return false; }
  bool compiledWithCuDNN() const { return true; }
  bool supportsDilatedConvolutionWithCuDNN() const { return true; }
  bool supportsDepthwiseConvolutionWithCuDNN() const { return false; }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const { return true; }
  long versionCuDNN() const { return 91000; }
  long versionRuntimeCuDNN() const { return 91000; }
};

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, Hooks)

}  // namespace

extern "C" void replace_guard() {
  static const Guard guard;
  const c10::impl::DeviceGuardImplRegistrar registered(c10::DeviceType::CUDA, &guard);
}
