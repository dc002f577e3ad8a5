// The pass of the value loss for one instruction set: compiled as often as row_pass_kernel.cpp (CMakeLists.txt).
#include "policy_lanes.h"
#include "value.h"

namespace rlhf {
namespace {

void clip(const ValueClip& a, float weight, int64_t begin, int64_t end, double* sums) {
  const Vec zero = all(0.0f), half = all(0.5f), delta = all(a.delta), bound = all(a.clip), w = all(weight);
  const bool huber = a.delta < kInf;
  const auto penalty = [&](Vec e) {
    const Vec size = abs_of(e), square = half * e * e;
    return huber ? pick(less(delta, size), delta * (size - half * delta), square) : square;
  };
  in_vectors(begin, end, [&](int64_t i, int steps, Mask present, auto get) {
    Vec loss_sum = zero, value_sum = zero, return_sum = zero, error_sum = zero;
    Count clips{}, tokens{};
    for (const int64_t last = i + int64_t{steps} * kLanes; i < last; i += kLanes) {
      const Mask valid = a.mask ? present & get.mask(a.mask + i) : present;
      const auto clean = [&](const float* p) { return pick(valid, get(p + i), zero); };
      const Vec v = clean(a.values), r = clean(a.returns), error = v - r;
      Vec loss = penalty(error);
      Vec slope = huber ? at_most(at_least(error, all(-1.0f) * delta), delta) : error;
      if (a.old_values) {  // the second branch is larger only where v was clipped, and there it does not depend on v
        const Vec old = clean(a.old_values);
        const Vec other = penalty(at_most(at_least(v, old - bound), old + bound) - r);
        const Mask clipped = less(loss, other);
        loss = pick(clipped, other, loss);
        slope = pick(clipped, zero, slope);
        count(&clips, clipped & valid);
      }
      get.put(a.dvalues + i, w * slope);
      loss_sum = loss_sum + loss;
      value_sum = value_sum + v;
      return_sum = return_sum + r;
      error_sum = error_sum + abs_of(error);
      count(&tokens, valid);
    }
    const Vec floats[4] = {loss_sum, value_sum, return_sum, error_sum};
    static constexpr int kSlots[4] = {0, 2, 3, 4};
    for (int k = 0; k < 4; ++k) {
      float lanes[kLanes];
      store(lanes, floats[k]);
      double sum = 0.0;
      for (float x : lanes) sum += double{x};
      sums[kSlots[k]] += k == 0 ? double{weight} * sum : sum;
    }
    sums[1] += double(total(clips));
    sums[5] += double(total(tokens));
  });
}

}  // namespace

const ValueKernels RLHF_VALUE_KERNELS = {&clip};

}  // namespace rlhf
