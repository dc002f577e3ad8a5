// Export list of the divergence passes. One side crosses as a tuple in the order of DivergenceSide, pointers as
// integers, 0 for none; the GIL is released.
#include <pybind11/pybind11.h>

#include <tuple>

#include "divergence.h"

namespace py = pybind11;

namespace {

using Side = std::tuple<uintptr_t, int, int64_t, uintptr_t, double, double, double, uintptr_t, uintptr_t, uintptr_t,
                        uintptr_t, int, int64_t>;

template <class T>
T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

rlhf::DivergenceSide side(const Side& s) {
  const auto [logits, dtype, stride, bias, scale, softcap, inv_temperature, row_max, log_sum, kl, out, out_dtype,
              out_stride] = s;
  return {at<const void>(logits), dtype, stride, at<const float>(bias), scale, softcap, inv_temperature,
          at<const float>(row_max), at<const float>(log_sum), at<float>(kl), at<void>(out), out_dtype, out_stride};
}

template <void (*pass)(const rlhf::Divergence&, int)>
void run(const Side& own, const Side& ref, int64_t n, int64_t v, int kind, double ref_share, uintptr_t grad,
         int threads) {
  pass({side(own), side(ref), n, v, kind, ref_share, at<const float>(grad)}, threads);
}

}  // namespace

void bind_divergence(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> release;
  m.def("row_divergence", &run<rlhf::row_divergence>, release);
  m.def("divergence_dlogits", &run<rlhf::divergence_dlogits>, release);
}
