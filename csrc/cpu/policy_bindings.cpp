// Export list of the CPU policy pass: pointers arrive as integers, 0 for none; the GIL is released.
#include <pybind11/pybind11.h>

#include "policy.h"
#include "value.h"

namespace py = pybind11;

namespace {

template <typename T>
T* as(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void policy_clip(int64_t n, int form, int level, uintptr_t logprob, uintptr_t old_logprob, uintptr_t advantages, int64_t advantage_count,
                 uintptr_t weight, int64_t weight_count, uintptr_t mask, uintptr_t policy_weight,
                 uintptr_t ref_logprob, uintptr_t entropy, uintptr_t entropy_weight, int64_t entropy_weight_count,
                 uintptr_t offsets, int64_t segments, int64_t length, double low, double high, double delta,
                 double dual_clip, double beta, int kl_estimator, int kl_gradient, bool kl_correction,
                 double entropy_coef, double first, double second, uintptr_t held, uintptr_t dlogprob,
                 uintptr_t dentropy, uintptr_t sums, int threads) {
  rlhf::PolicyClip a{};
  a.n = n;
  a.form = form;
  a.level = level;
  a.logprob = as<const float>(logprob);
  a.old_logprob = as<const float>(old_logprob);
  a.advantages = {as<const float>(advantages), advantage_count};
  a.weight = {as<const float>(weight), weight_count};
  a.mask = as<const uint8_t>(mask);
  a.policy_weight = as<const float>(policy_weight);
  a.ref_logprob = as<const float>(ref_logprob);
  a.entropy = as<const float>(entropy);
  a.entropy_weight = {as<const float>(entropy_weight), entropy_weight_count};
  a.offsets = as<const int64_t>(offsets);
  a.segments = segments;
  a.length = length;
  a.low = float(low);
  a.high = float(high);
  a.delta = float(delta);
  a.dual_clip = float(dual_clip);
  a.beta = float(beta);
  a.kl_estimator = kl_estimator;
  a.kl_gradient = kl_gradient;
  a.kl_correction = kl_correction;
  a.entropy_coef = float(entropy_coef);
  a.first = float(first);
  a.second = float(second);
  a.held = as<const float>(held);
  a.dlogprob = as<float>(dlogprob);
  a.dentropy = as<float>(dentropy);
  a.sums = as<float>(sums);
  rlhf::policy_clip(a, threads);
}

}  // namespace

void bind_policy(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("policy_clip", &policy_clip, release);
  m.def(
      "value_clip",
      [](int64_t n, uintptr_t values, uintptr_t old_values, uintptr_t returns, uintptr_t mask, uintptr_t weight,
         uintptr_t offsets, int64_t segments, int64_t length, double clip, double delta, uintptr_t dvalues,
         uintptr_t sums, int threads) {
        rlhf::value_clip({n, as<const float>(values), as<const float>(old_values), as<const float>(returns),
                          as<const uint8_t>(mask), as<const float>(weight), as<const int64_t>(offsets), segments,
                          length, float(clip), float(delta), as<float>(dvalues), as<float>(sums)},
                         threads);
      },
      release);
  m.def(
      "kl_terms",
      [](int64_t n, uintptr_t logprob, uintptr_t ref_logprob, uintptr_t mask, int estimator, int gradient,
         uintptr_t value, uintptr_t slope, int threads) {
        rlhf::kl_terms({n, as<const float>(logprob), as<const float>(ref_logprob), as<const uint8_t>(mask), estimator,
                        gradient, as<float>(value), as<float>(slope)},
                       threads);
      },
      release);
  m.def(
      "segment_counts",
      [](uintptr_t mask, uintptr_t offsets, int64_t segments, int64_t length, uintptr_t out, int threads) {
        rlhf::segment_counts(as<const uint8_t>(mask), as<const int64_t>(offsets), segments, length, as<int64_t>(out),
                             threads);
      },
      release);
}
