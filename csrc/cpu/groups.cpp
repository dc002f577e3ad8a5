#include "groups.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"

namespace rlhf {

Moments group_moments(const double* values, const int64_t* order, int64_t begin, int64_t end) {
  const auto value = [&](int64_t i) { return values[order ? order[i] : i]; };
  while (begin < end && !std::isfinite(value(begin))) ++begin;
  const double pivot = begin < end ? value(begin) : 0.0;
  double count = 0.0, sum = 0.0, m2 = 0.0;
  for (int64_t i = begin; i < end; ++i) {
    if (!std::isfinite(value(i))) continue;
    count += 1.0;
    sum += value(i) - pivot;
  }
  const double mean = count > 0.0 ? sum / count : 0.0;
  for (int64_t i = begin; i < end; ++i) {
    if (!std::isfinite(value(i))) continue;
    const double deviation = (value(i) - pivot) - mean;
    m2 += deviation * deviation;
  }
  return {count, pivot + mean, m2};
}

namespace {

template <class Real>
std::vector<int64_t> bounds_of(const Groups<Real>& g) {
  std::vector<int64_t> bounds;
  for (int64_t i = 0; i < g.rows; ++i) {
    if (g.ids ? i == 0 || g.ids[i] != g.ids[i - 1] : i % g.size == 0) bounds.push_back(i);
  }
  bounds.push_back(g.rows);
  return bounds;
}

// r - b of each row of a group, 0 where the row is not valid, into centred (rows).
template <class Real>
void subtract(const Groups<Real>& g, const Moments& m, double batch_mean, int64_t begin, int64_t end,
              double* centred) {
  const double others = m.count / std::max(m.count - 1.0, 1.0);
  double weighted = 0.0, weights = 0.0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = g.order ? g.order[i] : i;
    const double r = g.rewards[row];
    bool valid = std::isfinite(r);
    if (g.baseline == kGiven) valid = valid && std::isfinite(g.given[row]);
    const double from_mean = r - m.mean;
    const double a = g.baseline == kNoBaseline     ? r
                     : g.baseline == kGiven        ? r - g.given[row]
                     : g.baseline == kBatch        ? r - batch_mean
                     : g.baseline == kLeaveOneOut ? from_mean * others
                                                   : from_mean;
    centred[row] = valid ? a : 0.0;
    g.valid[row] = valid;
    if (g.baseline == kWeighted && valid) {
      weighted += g.given[row] * a;
      weights += g.given[row];
    }
  }
  if (g.baseline != kWeighted) return;
  const double shift = weighted / std::max(weights, std::numeric_limits<double>::min());
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = g.order ? g.order[i] : i;
    if (g.valid[row]) centred[row] -= shift;
  }
}

}  // namespace

template <class Real>
void group_advantages(const Groups<Real>& g, int threads) {
  const std::vector<int64_t> bounds = bounds_of(g);
  const int64_t groups = static_cast<int64_t>(bounds.size()) - 1;
  threads = g.rows < 1 << 14 ? 1 : threads;
  const auto deviation = [&](const Moments& m) { return std::sqrt(variance(m, g.ddof)); };
  Moments batch{};
  if (g.baseline == kBatch || g.scale == kWholeBatch) batch = group_moments(g.rewards, nullptr, 0, g.rows);
  std::vector<Moments> of(groups);
  std::vector<double> centred(g.rows);
  parallel_for(groups, 64, threads, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      of[k] = group_moments(g.rewards, g.order, bounds[k], bounds[k + 1]);
      subtract(g, of[k], batch.mean, bounds[k], bounds[k + 1], centred.data());
    }
  });
  double shared = g.scale == kWholeBatch ? deviation(batch) : 0.0;
  if (g.scale == kCentered) {
    std::vector<double> valid;
    for (int64_t i = 0; i < g.rows; ++i) {
      if (g.valid[i]) valid.push_back(centred[i]);
    }
    shared = deviation(group_moments(valid.data(), nullptr, 0, static_cast<int64_t>(valid.size())));
  }
  parallel_for(groups, 64, threads, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const double own = deviation(of[k]);
      const double s = g.scale == kGroup ? own : g.scale == kGroupMean ? std::max(of[k].mean, 0.0) : shared;
      for (int64_t i = bounds[k]; i < bounds[k + 1]; ++i) {
        const int64_t row = g.order ? g.order[i] : i;
        g.valid[row] = g.valid[row] && !(g.drop_equal && own == 0.0);
        const bool zero = !g.valid[row] || (g.scale != kNoScale && s == 0.0);
        g.advantages[row] = Real(zero ? 0.0 : g.scale == kNoScale ? centred[row] : centred[row] / (s + g.eps));
        g.mean[row] = Real(of[k].mean);
        g.std[row] = Real(own);
        g.count[row] = static_cast<int64_t>(of[k].count);
        g.equal[row] = own == 0.0;
      }
    }
  });
  *g.invalid = std::count_if(g.rewards, g.rewards + g.rows, [](double r) { return !std::isfinite(r); });
}

template void group_advantages<float>(const Groups<float>&, int);
template void group_advantages<double>(const Groups<double>&, int);

}  // namespace rlhf
