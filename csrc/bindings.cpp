// The export list of rlhf_fast._C. Addresses arrive as integers; rlhf_fast/_backend.py has checked what
// they point to. Kernels run without the GIL.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/row_pass.h"

namespace py = pybind11;

void bind_divergence(py::module_& m);  // cpu/divergence_bindings.cpp
void bind_policy(py::module_& m);  // cpu/policy_bindings.cpp
void bind_scans(py::module_& m);   // cpu/scans_bindings.cpp

namespace {

template <class T>
T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

void row_stats(uintptr_t logits, int dtype, int64_t n, int64_t v, int64_t row_stride, uintptr_t target,
               uintptr_t bias, double scale, double softcap, double inv_temperature, uintptr_t logprob,
               uintptr_t row_max, uintptr_t log_sum, uintptr_t entropy, int threads) {
  rlhf::row_stats({at<const void>(logits), dtype, n, v, row_stride, at<const int64_t>(target),
                   at<const float>(bias), scale, softcap, inv_temperature, at<float>(logprob),
                   at<float>(row_max), at<float>(log_sum), at<float>(entropy)},
                  threads);
}

void row_dlogits(uintptr_t logits, int dtype, int64_t row_stride, uintptr_t out, int out_dtype,
                 int64_t out_stride, int64_t k, int64_t v, uintptr_t order, uintptr_t target, uintptr_t bias,
                 double scale, double softcap, double inv_temperature, uintptr_t row_max, uintptr_t log_sum,
                 uintptr_t d_target, uintptr_t a, uintptr_t b, int threads) {
  rlhf::row_dlogits({at<const void>(logits), dtype, row_stride, at<void>(out), out_dtype, out_stride, k, v,
                     at<const int64_t>(order), at<const int64_t>(target), at<const float>(bias), scale, softcap,
                     inv_temperature, at<const float>(row_max), at<const float>(log_sum),
                     at<const float>(d_target), at<const float>(a), at<const float>(b)},
                    threads);
}

void use_isa(const std::string& name) {
  if (!rlhf::use_isa(name.c_str())) throw std::invalid_argument("isa is unknown or unavailable here: " + name);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "rlhf_fast CPU kernels";
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("row_stats", &row_stats, release);
  m.def("row_dlogits", &row_dlogits, release);
  m.def("isa", &rlhf::isa_name, "instruction set of the row passes: avx512, avx2 or portable");
  m.def("use_isa", &use_isa, "choose another one; for tests");
  m.attr("cuda_state") = RLHF_CUDA_STATE;  // why _cuda was not built beside this module; "" if it was
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  bind_policy(m);
  bind_divergence(m);
  bind_scans(m);
}
