// parallel_for: disjoint ranges of [0, count) on OpenMP's threads, or on std::thread without OpenMP.
//
// - Blocks have a fixed size and are handed out as threads become free, so rows of unequal cost balance.
// - With torch imported first, OpenMP's pool is torch's own: no second set of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#else
#include <atomic>
#include <thread>
#include <vector>
#endif

namespace rlhf {

// body(begin, end) must not throw. `block` items are the smallest piece worth handing to a thread.
template <class Body>
void parallel_for(int64_t count, int64_t block, int threads, const Body& body) {
  if (count <= 0) return;
  block = std::max<int64_t>(block, 1);
  const int64_t blocks = (count + block - 1) / block;
  const int workers = static_cast<int>(std::min<int64_t>(std::max(threads, 1), blocks));
  if (workers == 1) return body(int64_t{0}, count);
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(workers)
  for (int64_t i = 0; i < blocks; ++i) body(i * block, std::min(count, (i + 1) * block));
#else
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1)) < blocks;) body(i * block, std::min(count, (i + 1) * block));
  };
  std::vector<std::thread> pool;
  for (int t = 1; t < workers; ++t) pool.emplace_back(work);
  work();
  for (auto& thread : pool) thread.join();
#endif
}

}  // namespace rlhf
