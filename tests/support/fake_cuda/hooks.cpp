// Hooks and a device guard that do nothing, for a CPU-only build of torch; compiled with -DFAKE_CUDA, -DFAKE_MPS or -DFAKE_XPU.
// Without them autograd ends the process at the first tensor on the device. Nothing is ever launched.
#include <ATen/detail/AcceleratorHooksInterface.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/detail/XPUHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

// torch asks its registries for classes of exactly these names.
#if defined(FAKE_CUDA)
constexpr DeviceType type_of_card = DeviceType::CUDA;

struct CUDAHooks : public at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
};

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);
#elif defined(FAKE_MPS)
constexpr DeviceType type_of_card = DeviceType::MPS;

struct MPSHooks : public at::MPSHooksInterface {
  void init() const override {}
  bool hasMPS() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex deviceCount() const override { return 1; }
};

using at::MPSHooksRegistry;
using at::RegistererMPSHooksRegistry;
REGISTER_MPS_HOOKS(MPSHooks);
#elif defined(FAKE_XPU)
constexpr DeviceType type_of_card = DeviceType::XPU;

struct XPUHooks : public at::XPUHooksInterface {
  void init() const override {}
  bool hasXPU() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
};

using at::RegistererXPUHooksRegistry;
using at::XPUHooksRegistry;
REGISTER_XPU_HOOKS(XPUHooks);
#endif

const Device card{type_of_card, 0};

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return type_of_card; }
  Device exchangeDevice(Device) const override { return card; }
  Device getDevice() const override { return card; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, card); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, card); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, card); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};

#if defined(FAKE_CUDA)
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
#elif defined(FAKE_MPS)
C10_REGISTER_GUARD_IMPL(MPS, Guard);
#elif defined(FAKE_XPU)
C10_REGISTER_GUARD_IMPL(XPU, Guard);
#endif

}  // namespace
