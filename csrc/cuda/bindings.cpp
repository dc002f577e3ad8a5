// The export list of rlhf_fast._cuda. Device addresses and the stream arrive as integers, 0 for none;
// rlhf_fast/_backend_scans.py has checked what they point to. A failed launch raises.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "scans.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(int code, const char* what) {
  if (code != 0) throw std::runtime_error(std::string(what) + ": " + rlhf::error_text(code));
}

void gae(uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t offsets, int64_t n, int64_t batch,
         int64_t length, double gamma, double lam, bool carry, uintptr_t bootstrap, uintptr_t ends,
         uintptr_t advantages, uintptr_t returns, uintptr_t workspace, uintptr_t stream) {
  const rlhf::GaeCudaArgs args{at<const float>(rewards), at<const float>(values), at<const uint8_t>(mask),
                               at<const int64_t>(offsets), n, batch, length, gamma, lam, carry,
                               at<const float>(bootstrap), at<const int64_t>(ends), at<float>(advantages),
                               at<float>(returns), nullptr, nullptr, nullptr, 0.0f, 0.0f, 0.0f, 0, nullptr, nullptr,
                               nullptr};
  check(rlhf::gae(args, at<void>(workspace), at<void>(stream)), "gae");
}

void ppo_advantages(uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t offsets, int64_t n, int64_t batch,
                    int64_t length, double gamma, double lam, bool carry, uintptr_t bootstrap, uintptr_t ends,
                    uintptr_t advantages, uintptr_t returns, uintptr_t scores, uintptr_t logprob,
                    uintptr_t ref_logprob, double kl_coef, double kl_clip, double score_clip, int kl_estimator,
                    uintptr_t shaped, uintptr_t kl, uintptr_t statistics, double eps, uintptr_t workspace,
                    uintptr_t stream) {
  const rlhf::GaeCudaArgs args{at<const float>(rewards), at<const float>(values), at<const uint8_t>(mask),
                               at<const int64_t>(offsets), n, batch, length, gamma, lam, carry,
                               at<const float>(bootstrap), at<const int64_t>(ends), at<float>(advantages),
                               at<float>(returns), at<const float>(scores), at<const float>(logprob),
                               at<const float>(ref_logprob), float(kl_coef), float(kl_clip), float(score_clip),
                               kl_estimator, at<float>(shaped), at<float>(kl), at<double>(statistics)};
  check(rlhf::gae(args, at<void>(workspace), at<void>(stream)), "ppo_advantages");
  if (statistics && n > 0) {
    check(rlhf::whiten(args.advantages, args.mask, n, args.statistics, true, 1, eps, args.advantages,
                       at<void>(stream)),
          "ppo_advantages");
  }
}

void moments(uintptr_t x, uintptr_t mask, int64_t n, uintptr_t workspace, uintptr_t out, uintptr_t stream) {
  check(rlhf::moments(at<const float>(x), at<const uint8_t>(mask), n, at<void>(workspace), at<double>(out),
                      at<void>(stream)),
        "moments");
}

void whiten(uintptr_t x, uintptr_t mask, int64_t n, uintptr_t statistics, bool shift_mean, int ddof, double eps,
            uintptr_t out, uintptr_t stream) {
  check(rlhf::whiten(at<const float>(x), at<const uint8_t>(mask), n, at<const double>(statistics), shift_mean, ddof,
                     eps, at<float>(out), at<void>(stream)),
        "whiten");
}

void group_stats(uintptr_t values, uintptr_t order, uintptr_t offsets, int64_t groups, uintptr_t out,
                 uintptr_t stream) {
  check(rlhf::group_stats(at<const double>(values), at<const int64_t>(order), at<const int64_t>(offsets), groups,
                          at<double>(out), at<void>(stream)),
        "group_stats");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "rlhf_fast CUDA kernels";
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("gae_workspace_bytes", &rlhf::gae_workspace_bytes);
  m.def("gae", &gae, release);
  m.def("ppo_advantages", &ppo_advantages, release);
  m.def("moments_workspace_bytes", &rlhf::moments_workspace_bytes);
  m.def("moments", &moments, release);
  m.def("whiten", &whiten, release);
  m.def("group_stats", &group_stats, release);
}
