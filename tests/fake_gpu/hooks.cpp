// Loaded before Python imports torch: tells a torch built without CUDA that there is a device.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>

thread_local int fake_device = 0;
int fake_devices = 1;

struct CUDAHooks : at::CUDAHooksInterface {  // under this name torch looks for its own
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return fake_devices; }
  c10::DeviceIndex deviceCount() const override { return fake_devices; }
  c10::DeviceIndex current_device() const override { return fake_device; }
  c10::DeviceIndex getCurrentDevice() const override { return fake_device; }
  void setCurrentDevice(c10::DeviceIndex d) const override { fake_device = d; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex d) const override {
    const int before = fake_device;
    if (d >= 0) fake_device = d;
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex d) const override { return exchangeDevice(d); }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};

namespace at {
using ::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at
