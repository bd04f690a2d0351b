// Tells a CPU-only build of torch that one CUDA device exists on which every stream and event operation does nothing.
//
// Preloaded with LD_PRELOAD, it lets autograd and autocast accept FakeTensors on "cuda". Nothing is ever computed there.

#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device kOnlyDevice(c10::DeviceType::CUDA, 0);

struct NoOpGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return kOnlyDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return kOnlyDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}

  c10::Stream getStream(c10::Device) const override { return onlyStream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return onlyStream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return onlyStream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return onlyStream(); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}

  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = &any_event_;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}

 private:
  static c10::Stream onlyStream() { return c10::Stream(c10::Stream::DEFAULT, kOnlyDevice); }
  mutable char any_event_ = 0;
};

C10_REGISTER_GUARD_IMPL(CUDA, NoOpGuard);

}  // namespace

namespace at {

struct NoOpHooks final : CUDAHooksInterface {
  explicit NoOpHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return 1; }
};

C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, NoOpHooks)  // the name under which torch looks them up

namespace accelerator {
// In place of the function of this name in libtorch_cpu.so.
__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) {
  return c10::DeviceType::CUDA;
}
}  // namespace accelerator

}  // namespace at
