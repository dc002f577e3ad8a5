// One block of a CUDA kernel as threads of the host: `test_cuda_build.py` puts the text of a kernel in kernel.inc.
//
// * Warps meet at every shuffle and blocks at every barrier, as on a GPU; in between threads run in any order.
// * A thread that leaves early would hang the others: give whole blocks of work.
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

using std::fmin;
using std::isfinite;

struct Index {
  int x;
};
thread_local Index threadIdx;
Index blockIdx;
std::unique_ptr<std::barrier<>> block;
std::vector<std::unique_ptr<std::barrier<>>> warps;
double cells[1024];

void __syncthreads() { block->arrive_and_wait(); }

double __shfl_xor_sync(unsigned, double value, int by) {
  auto& warp = *warps[threadIdx.x / 32];
  cells[threadIdx.x] = value;
  warp.arrive_and_wait();
  const double other = cells[threadIdx.x ^ by];
  warp.arrive_and_wait();
  return other;
}

#include "kernel.inc"

template <int kWarps, int kTeam>
void run(const std::vector<double>& values, const std::vector<int64_t>& offsets) {
  const int64_t groups = int64_t(offsets.size()) - 1;
  std::vector<double> out(3 * groups);
  for (blockIdx.x = 0; blockIdx.x * (kWarps / kTeam) < groups; ++blockIdx.x) {
    block = std::make_unique<std::barrier<>>(kWarps * 32);
    warps.clear();
    for (int w = 0; w < kWarps; ++w) warps.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::thread> threads;
    for (int t = 0; t < kWarps * 32; ++t) {
      threads.emplace_back([&, t] {
        threadIdx.x = t;
        group_stats_kernel<kWarps, kTeam>(values.data(), nullptr, offsets.data(), groups, out.data());
      });
    }
    for (auto& thread : threads) thread.join();
  }
  for (double number : out) std::printf("%.17g\n", number);
}

// Arguments: nothing. Standard input: values, then offsets, each behind their count. Output: count, mean, m2 by group.
int main() {
  int64_t n, groups;
  if (std::scanf("%ld", &n) != 1) return 1;
  std::vector<double> values(n);
  for (double& value : values) {
    if (std::scanf("%lf", &value) != 1) return 1;
  }
  if (std::scanf("%ld", &groups) != 1) return 1;
  std::vector<int64_t> offsets(groups);
  for (int64_t& offset : offsets) {
    if (std::scanf("%ld", &offset) != 1) return 1;
  }
  groups == 2 ? run<32, 32>(values, offsets) : run<8, 1>(values, offsets);
}
