// A device "cuda" made of host memory: every op runs on the CPU, and the rules of devices hold.
//
// * Tensors of two devices in one op raise, as do host tensors beside device ones (0-d ones and indices excepted).
// * Fresh memory holds NaN: a read of what was never written shows.
// * `sync_error(true)`: whatever would make the host wait raises, as under torch.cuda.set_sync_debug_mode("error").
// * torch.mm and torch.addmm with out_dtype, which the CPU has not, take what cuBLAS's versions take and no more.
#include <ATen/EmptyTensor.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <set>
#include <string>
#include <utility>

extern thread_local int fake_device;
extern int fake_devices;

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;
constexpr auto kFake = c10::DeviceType::CUDA;
constexpr size_t kHeader = 512;

std::atomic<int64_t> live{0}, peak{0};
bool wide_addmm = true, sync_error = false;

// ---- memory ----

void* take(size_t bytes) {
  void* base = nullptr;
  const size_t whole = (bytes + kHeader - 1) / kHeader * kHeader;
  if (posix_memalign(&base, kHeader, whole + kHeader)) throw std::bad_alloc();
  *static_cast<size_t*>(base) = bytes;
  char* data = static_cast<char*>(base) + kHeader;
  std::memset(data, 0xFF, whole);
  const int64_t now = live += int64_t(bytes);
  for (int64_t before = peak; now > before && !peak.compare_exchange_weak(before, now);) {
  }
  return data;
}

void give_back(void* data) {
  if (!data) return;
  char* base = static_cast<char*>(data) - kHeader;
  live -= int64_t(*reinterpret_cast<size_t*>(base));
  free(base);
}

struct FakeAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? take(bytes) : nullptr;
    return {data, data, &give_back, Device(kFake, fake_device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
FakeAllocator allocator;

struct FakeGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kFake; }
  Device exchangeDevice(Device d) const override {
    const Device before = getDevice();
    uncheckedSetDevice(d);
    return before;
  }
  Device getDevice() const override { return Device(kFake, fake_device); }
  void setDevice(Device d) const override { uncheckedSetDevice(d); }
  void uncheckedSetDevice(Device d) const noexcept override {
    if (d.index() >= 0) fake_device = d.index();
  }
  Stream getStream(Device d) const override { return Stream(Stream::DEFAULT, d); }
  Stream getDefaultStream(Device d) const override { return getStream(d); }
  Stream getStreamFromGlobalPool(Device d, bool) const override { return getStream(d); }
  Stream getNewStream(Device d, int) const override { return getStream(d); }
  Stream exchangeStream(Stream s) const override { return getStream(s.device()); }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  DeviceIndex deviceCount() const noexcept override { return fake_devices; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard)

at::Tensor make(at::IntArrayRef size, std::optional<at::IntArrayRef> stride, c10::ScalarType type,
                std::optional<Device> device, std::optional<at::MemoryFormat> format = std::nullopt) {
  const int before = fake_device;
  if (device && device->index() >= 0) fake_device = device->index();
  TORCH_CHECK(fake_device < fake_devices, "invalid device ordinal");
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  at::Tensor out = stride ? at::Tensor(at::detail::empty_strided_generic(size, *stride, &allocator, keys, type))
                          : at::Tensor(at::detail::empty_generic(size, &allocator, keys, type, format));
  fake_device = before;
  return out;
}

c10::ScalarType or_default(std::optional<c10::ScalarType> type) {
  return type ? *type : at::typeMetaToScalarType(at::get_default_dtype());
}

// The same bytes as a CPU tensor, which keeps them alive.
at::Tensor host(const at::Tensor& t) {
  auto* holder = new c10::Storage(t.storage());
  c10::DataPtr data(holder->mutable_data(), holder, [](void* h) { delete static_cast<c10::Storage*>(h); },
                    Device(c10::kCPU));
  c10::Storage storage(c10::Storage::use_byte_size_t(), holder->nbytes(), std::move(data), nullptr, false);
  at::Tensor out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage),
                                                            c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return out;
}

at::Tensor to_device(at::Tensor t, Device device) {
  if (!t.defined() || !t.is_cpu()) return t;
  const bool dense = t.is_non_overlapping_and_dense();
  if (!dense) t = t.contiguous();
  at::Tensor out = make(t.sizes(), t.strides(), t.scalar_type(), device);
  if (t.numel()) std::memcpy(out.mutable_data_ptr(), t.const_data_ptr(), t.numel() * t.element_size());
  return out;
}

// ---- every op without a kernel of its own ----

void wait_for(const std::string& what) { TORCH_CHECK(!sync_error, "called a synchronizing CUDA operation: ", what); }

const std::set<std::string> kWaits = {"aten::_local_scalar_dense", "aten::nonzero",  "aten::equal",
                                      "aten::masked_select",       "aten::_unique2", "aten::bincount"};
const std::set<std::string> kTakesHost = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"};

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  if (kWaits.count(name)) wait_for(name);
  const size_t count = schema.arguments().size(), begin = stack->size() - count;
  const std::vector<c10::IValue> given(stack->begin() + begin, stack->end());
  std::optional<Device> device;
  bool beside = false;  // a host tensor that is no scalar
  const auto convert = [&](const at::Tensor& t) -> at::Tensor {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      beside |= t.is_cpu() && t.dim() > 0;
      return t;
    }
    TORCH_CHECK(!device || *device == t.device(), "Expected all tensors to be on the same device, but found ", *device,
                " and ", t.device(), " (", name, ")");
    device = t.device();
    return host(t);
  };
  for (size_t i = 0; i < count; ++i) {
    c10::IValue& v = (*stack)[begin + i];
    const auto* alias = schema.arguments()[i].alias_info();
    if (v.isTensor()) {
      const at::Tensor t = v.toTensor();
      v = convert(t);
      if (alias && alias->isWrite() && t.defined() && t.is_cuda() && !t.numel()) {  // may be resized
        v = at::empty(t.sizes(), at::TensorOptions().dtype(t.dtype()));
      }
    } else if (v.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const at::Tensor& t : v.toTensorVector()) list.push_back(convert(t));
      v = c10::IValue(list);
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (std::optional<at::Tensor> t : v.toOptionalTensorList()) {
        list.push_back(t ? std::optional<at::Tensor>(convert(*t)) : std::nullopt);
      }
      v = c10::IValue(list);
    } else if (v.isDevice() && v.toDevice().type() == kFake) {
      device = Device(kFake, v.toDevice().index() < 0 ? fake_device : v.toDevice().index());
      v = c10::IValue(Device(c10::kCPU));
    }
  }
  TORCH_CHECK(!beside || !device || kTakesHost.count(name),
              "Expected all tensors to be on the same device, but found at least two devices, cuda and cpu (", name, ")");
  const std::vector<c10::IValue> inside(stack->begin() + begin, stack->end());
  op.callBoxed(stack);

  const size_t results = schema.returns().size(), first = stack->size() - results;
  const Device where = device.value_or(Device(kFake, fake_device));
  for (size_t k = 0; k < results; ++k) {
    c10::IValue& v = (*stack)[first + k];
    const auto* alias = schema.returns()[k].alias_info();
    bool written = false;
    for (size_t i = 0; alias && alias->isWrite() && i < count && !written; ++i) {
      const auto* own = schema.arguments()[i].alias_info();
      written = own && own->isWrite() && own->beforeSets() == alias->beforeSets() && given[i].isTensor();
      if (!written) continue;
      const at::Tensor original = given[i].toTensor(), result = inside[i].toTensor();
      if (original.is_cuda() && original.sizes() != result.sizes()) {
        at::native::resize_output(original, result.sizes());
        host(original).copy_(result);
      }
      v = original;
    }
    if (!written && v.isTensor()) v = to_device(v.toTensor(), where);
    if (!written && v.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const at::Tensor& t : v.toTensorVector()) list.push_back(to_device(t, where));
      v = c10::IValue(list);
    }
  }
}

// ---- what a device must bring ----

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout>,
                 std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return make(size, std::nullopt, or_default(type), device, format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> type,
                         std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  return make(size, stride, or_default(type), device);
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& from, bool non_blocking) {
  if (self.device() != from.device() && (self.is_cpu() || from.is_cpu()) && !non_blocking) wait_for("a copy");
  at::Tensor to = self.is_cuda() ? host(self) : self;
  to.copy_(from.is_cuda() ? host(from) : from);
  return self;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  at::Tensor out = to;
  return copy_(out, from, non_blocking);
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  if (format) impl->empty_tensor_restride(*format);
  auto* storage = self.storage().unsafeGetStorageImpl();
  const size_t need = (impl->storage_offset() + self.numel()) * self.element_size(), have = storage->nbytes();
  if (self.numel() && have < need) {
    c10::DataPtr fresh = allocator.allocate(need);
    if (have) std::memcpy(fresh.get(), storage->data(), have);
    storage->set_data_ptr_noswap(std::move(fresh));
    storage->set_nbytes(need);
  }
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage from, int64_t offset, at::IntArrayRef size,
                        at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(from));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage from) {
  const int64_t size = int64_t(from.nbytes()) / int64_t(self.element_size());
  return set_storage(self, std::move(from), 0, {size}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& from) {
  return set_storage(self, from.storage(), from.storage_offset(), from.sizes(), from.strides());
}

at::Tensor view(const at::Tensor& t, at::IntArrayRef size) { return at::native::view(t, size); }
at::Tensor as_strided(const at::Tensor& t, at::IntArrayRef size, at::IntArrayRef stride,
                      std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(t, size, stride, offset);
}
at::Tensor reshape_alias(const at::Tensor& t, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::_reshape_alias(t, size, stride);
}

// ---- products with a wider result: aten/src/ATen/native/cuda/Blas.cpp, _mm_dtype_out_cuda and _addmm_dtype_out_cuda ----

at::Tensor& addmm_out(const at::Tensor& self, const at::Tensor& a, const at::Tensor& b, at::ScalarType type,
                      const at::Scalar& beta, const at::Scalar& alpha, at::Tensor& out) {
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "shapes cannot be multiplied");
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), "mat1 and mat2 must have the same dtype");
  const bool narrow = a.scalar_type() == at::kHalf || a.scalar_type() == at::kBFloat16;
  TORCH_CHECK(type == a.scalar_type() || (type == at::kFloat && narrow), "out_dtype must be the inputs' or fp32");
  TORCH_CHECK(type == out.scalar_type(), "out_dtype must be the dtype of out");
  TORCH_CHECK(self.scalar_type() == a.scalar_type() || (wide_addmm && self.scalar_type() == type),
              "self dtype must match either out_dtype or mat1 dtype");
  TORCH_CHECK(out.dim() == 2 && out.size(0) == a.size(0) && out.size(1) == b.size(1), "out has another shape");
  for (const at::Tensor& t : {a, b, out}) {
    TORCH_CHECK(!t.numel() || t.stride(0) == 1 || t.stride(1) == 1, "cuBLAS would work on a copy");
    TORCH_CHECK(t.is_cuda() && t.device() == out.device(), "Expected all tensors to be on the same device");
  }
  at::Tensor sum = at::mm(host(a).to(at::kFloat), host(b).to(at::kFloat)) * alpha;
  if (beta.toDouble() != 0) sum += host(self).to(at::kFloat) * beta;
  host(out).copy_(sum);
  return out;
}

at::Tensor addmm_new(const at::Tensor& self, const at::Tensor& a, const at::Tensor& b, at::ScalarType type,
                 const at::Scalar& beta, const at::Scalar& alpha) {
  at::Tensor out = make({a.size(0), b.size(1)}, std::nullopt, type, a.device());
  return addmm_out(self, a, b, type, beta, alpha, out);
}

at::Tensor& mm_out(const at::Tensor& a, const at::Tensor& b, at::ScalarType type, at::Tensor& out) {
  return addmm_out(a, a, b, type, 0, 1, out);
}

at::Tensor mm_new(const at::Tensor& a, const at::Tensor& b, at::ScalarType type) {
  return addmm_new(a, a, b, type, 0, 1);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("view", view);
  m.impl("as_strided", as_strided);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("mm.dtype", mm_new);
  m.impl("mm.dtype_out", mm_out);
  m.impl("addmm.dtype", addmm_new);
  m.impl("addmm.dtype_out", addmm_out);
}

PYBIND11_MODULE(fake_gpu_device, m) {
  c10::SetAllocator(kFake, &allocator, 255);
  m.def("live", [] { return live.load(); });
  m.def("peak", [] { return peak.load(); });
  m.def("reset_peak", [] { peak = live.load(); });
  m.def("set_device", [](int index) { fake_device = index; });
  m.def("get_device", [] { return fake_device; });
  m.def("set_devices", [](int count) { fake_devices = count; });
  m.def("wide_addmm", [](bool on) { wide_addmm = on; });
  m.def("sync_error", [](bool on) { return std::exchange(sync_error, on); });
}
