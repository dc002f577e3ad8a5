// Export list of the CPU scans: pointers arrive as integers, 0 for none; the GIL is released.
#include <pybind11/pybind11.h>

#include "ppo.h"
#include "groups.h"
#include "scans.h"

namespace py = pybind11;

namespace {

template <typename T>
T* as(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

rlhf::GaeArgs gae_args(uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t offsets, int64_t batch,
                            int64_t length, double gamma, double lam, bool carry, uintptr_t bootstrap,
                            uintptr_t advantages, uintptr_t returns) {
  return {as<const float>(rewards), as<const float>(values), as<const uint8_t>(mask), as<const int64_t>(offsets),
          batch,                    length,                  gamma,                   lam,
          carry,                    as<const float>(bootstrap), as<float>(advantages), as<float>(returns)};
}

template <class Real>
void group_advantages(int64_t rows, uintptr_t rewards, uintptr_t order, uintptr_t ids, int64_t size, uintptr_t given,
                      int baseline, int scale, int ddof, double eps, bool drop_equal, uintptr_t advantages,
                      uintptr_t mean, uintptr_t std, uintptr_t count, uintptr_t equal, uintptr_t valid,
                      uintptr_t invalid, int threads) {
  rlhf::group_advantages<Real>(
      {rows, as<const double>(rewards), as<const int64_t>(order), as<const int64_t>(ids), size,
       as<const double>(given), baseline, scale, ddof, eps, drop_equal, as<Real>(advantages), as<Real>(mean),
       as<Real>(std), as<int64_t>(count), as<bool>(equal), as<bool>(valid), as<int64_t>(invalid)},
      threads);
}

}  // namespace

void bind_scans(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> release;
  m.def(
      "gae",
      [](uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t offsets, int64_t batch, int64_t length,
         double gamma, double lam, bool carry, uintptr_t bootstrap, uintptr_t advantages, uintptr_t returns,
         int threads) {
        rlhf::gae(gae_args(rewards, values, mask, offsets, batch, length, gamma, lam, carry, bootstrap,
                           advantages, returns),
                       threads);
      },
      release);
  m.def(
      "gae_tiled",
      [](uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t offsets, int64_t batch, int64_t length,
         double gamma, double lam, bool carry, uintptr_t bootstrap, uintptr_t advantages, uintptr_t returns,
         int64_t n, int64_t tile, int64_t lane, uintptr_t published) {
        rlhf::gae_tiled(gae_args(rewards, values, mask, offsets, batch, length, gamma, lam, carry, bootstrap,
                           advantages, returns),
                             n, tile, lane, as<const uint8_t>(published));
      },
      release);
  m.def(
      "ppo_advantages",
      [](uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t offsets, int64_t batch, int64_t length,
         double gamma, double lam, bool carry, uintptr_t bootstrap, uintptr_t advantages, uintptr_t returns,
         uintptr_t scores, uintptr_t logprob, uintptr_t ref_logprob, double kl_coef, double kl_clip,
         double score_clip, int kl_estimator, uintptr_t kl, bool whiten, double eps, int threads) {
        const rlhf::GaeArgs g = gae_args(rewards, values, mask, offsets, batch, length, gamma, lam, carry, bootstrap,
                                         advantages, returns);
        rlhf::ppo_advantages({g, as<const float>(scores), as<const float>(logprob), as<const float>(ref_logprob),
                              float(kl_coef), float(kl_clip), float(score_clip), kl_estimator, as<float>(rewards),
                              as<float>(kl), whiten, eps},
                             threads);
      },
      release);
  m.def(
      "moments",
      [](uintptr_t x, uintptr_t mask, int64_t n, uintptr_t out, int threads) {
        rlhf::moments(as<const float>(x), as<const uint8_t>(mask), n, as<double>(out), threads);
      },
      release);
  m.def(
      "whiten",
      [](uintptr_t x, uintptr_t mask, int64_t n, uintptr_t statistics, bool shift_mean, int ddof, double eps,
         uintptr_t out, int threads) {
        rlhf::whiten(as<const float>(x), as<const uint8_t>(mask), n, as<const double>(statistics), shift_mean, ddof,
                     eps, as<float>(out), threads);
      },
      release);
  m.def(
      "group_stats",
      [](uintptr_t values, uintptr_t order, uintptr_t offsets, int64_t groups, uintptr_t out, int threads) {
        rlhf::group_stats(as<const double>(values), as<const int64_t>(order), as<const int64_t>(offsets),
                               groups, as<double>(out), threads);
      },
      release);
  m.def("group_advantages_f32", &group_advantages<float>, release);
  m.def("group_advantages_f64", &group_advantages<double>, release);
}
