// Count, mean and spread: of a masked vector (whitening) and of groups of rewards.
//
// * Blocks own fixed ranges of the input, and their results are merged in a fixed order: the same bits in every run.
// * Two passes over each thread's elements while they sit in registers, Chan's merge above that (common/moments.h).
#include "moments.cuh"
#include "scans.h"

namespace rlhf {
namespace {

constexpr int kThreads = 256;
constexpr int kItems = 8;
constexpr int kMaxBlocks = 1024;
constexpr int kGroupWarps = 8;   // of a block: as many groups
constexpr int kWholeWarps = 32;  // of a block that takes the only group

int block_count(int64_t n) {
  const int64_t blocks = (n + kThreads * kItems - 1) / (kThreads * kItems);
  return int(blocks < 1 ? 1 : blocks > kMaxBlocks ? kMaxBlocks : blocks);
}

__global__ void __launch_bounds__(kThreads)
    partial_moments_kernel(const float* x, const uint8_t* mask, int64_t n, Moments* partial) {
  Moments mine{0.0, 0.0, 0.0};
  const int64_t step = int64_t(gridDim.x) * kThreads * kItems;
  for (int64_t begin = int64_t(blockIdx.x) * kThreads * kItems; begin < n; begin += step) {
    double values[kItems];
    bool counts[kItems];
    double count = 0.0, sum = 0.0, m2 = 0.0;
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int64_t i = begin + j * kThreads + threadIdx.x;
      counts[j] = i < n && (!mask || mask[i]);
      values[j] = counts[j] ? double(x[i]) : 0.0;
      count += counts[j] ? 1.0 : 0.0;
      sum += values[j];
    }
    const double mean = count > 0.0 ? sum / count : 0.0;
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const double deviation = counts[j] ? values[j] - mean : 0.0;
      m2 += deviation * deviation;
    }
    mine = merge(mine, {count, mean, m2});
  }
  mine = block_merge<kThreads>(mine);
  if (threadIdx.x == 0) partial[blockIdx.x] = mine;
}

__global__ void __launch_bounds__(kThreads) merge_moments_kernel(const Moments* partial, int blocks, double* out) {
  Moments mine{0.0, 0.0, 0.0};
  for (int b = threadIdx.x; b < blocks; b += kThreads) mine = merge(mine, partial[b]);
  mine = block_merge<kThreads>(mine);
  if (threadIdx.x == 0) {
    out[0] = mine.count;
    out[1] = mine.mean;
    out[2] = mine.m2;
  }
}

__global__ void __launch_bounds__(kThreads)
    whiten_kernel(const float* x, const uint8_t* mask, int64_t n, const double* statistics, bool shift_mean, int ddof,
                  double eps, float* out) {
  const Moments m{statistics[0], statistics[1], statistics[2]};
  const double scale = 1.0 / sqrt(variance(m, ddof) + eps), shift = shift_mean ? 0.0 : m.mean;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    out[i] = !mask || mask[i] ? float((double(x[i]) - m.mean) * scale + shift) : 0.0f;
  }
}

// `value` of every lane of the team by `join`, in each of them: first the warps, then their results in order.
template <int kTeam, typename Join>
__device__ double team_reduce(double value, Join join) {
  for (int by = 16; by > 0; by /= 2) value = join(value, __shfl_xor_sync(0xffffffffu, value, by));
  if constexpr (kTeam > 1) {
    __shared__ double s_warp[kTeam];
    __syncthreads();  // some may still be reading what an earlier call left
    if (threadIdx.x % 32 == 0) s_warp[threadIdx.x / 32] = value;
    __syncthreads();
    value = s_warp[0];
    for (int w = 1; w < kTeam; ++w) value = join(value, s_warp[w]);
  }
  return value;
}

// A team of kTeam warps per group, kWarps / kTeam groups per block; a team is one warp or the block. Everything is
// measured from the group's smallest reward: equal rewards deviate by exactly 0.
template <int kWarps, int kTeam>
__global__ void __launch_bounds__(kWarps * 32)
    group_stats_kernel(const double* values, const int64_t* order, const int64_t* offsets, int64_t groups,
                       double* out) {
  static_assert(kTeam == 1 || kTeam == kWarps, "barriers are the block's");
  constexpr int kLanes = kTeam * 32;
  const int lane = threadIdx.x % kLanes;
  const int64_t g = int64_t(blockIdx.x) * (kWarps / kTeam) + threadIdx.x / kLanes;
  if (g >= groups) return;
  const auto add = [](double a, double b) { return a + b; };
  const auto least = [](double a, double b) { return fmin(a, b); };
  const int64_t begin = offsets[g], end = offsets[g + 1];
  const auto value = [&](int64_t i) { return values[order ? order[i] : i]; };
  double count = 0.0, pivot = INFINITY;
  for (int64_t i = begin + lane; i < end; i += kLanes) {
    const double v = value(i);
    if (!isfinite(v)) continue;
    count += 1.0;
    pivot = fmin(pivot, v);
  }
  count = team_reduce<kTeam>(count, add);
  pivot = team_reduce<kTeam>(pivot, least);
  if (count == 0.0) pivot = 0.0;
  double sum = 0.0, m2 = 0.0;
  for (int64_t i = begin + lane; i < end; i += kLanes) {
    const double v = value(i);
    if (isfinite(v)) sum += v - pivot;
  }
  sum = team_reduce<kTeam>(sum, add);
  const double mean = count > 0.0 ? sum / count : 0.0;
  for (int64_t i = begin + lane; i < end; i += kLanes) {
    const double v = value(i);
    if (isfinite(v)) m2 += (v - pivot - mean) * (v - pivot - mean);
  }
  m2 = team_reduce<kTeam>(m2, add);
  if (lane == 0) {
    out[g] = count;
    out[groups + g] = pivot + mean;
    out[2 * groups + g] = m2;
  }
}

}  // namespace

int64_t moments_workspace_bytes(int64_t n) { return int64_t(block_count(n)) * int64_t(sizeof(Moments)); }

int moments(const float* x, const uint8_t* mask, int64_t n, void* workspace, double* out, void* stream) {
  const int blocks = block_count(n);
  auto* partial = static_cast<Moments*>(workspace);
  partial_moments_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(x, mask, n, partial);
  merge_moments_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(partial, blocks, out);
  return int(cudaGetLastError());
}

int whiten(const float* x, const uint8_t* mask, int64_t n, const double* statistics, bool shift_mean, int ddof,
           double eps, float* out, void* stream) {
  if (n <= 0) return int(cudaSuccess);
  const int64_t blocks = (n + kThreads - 1) / kThreads;
  const unsigned grid = unsigned(blocks > (1 << 20) ? (1 << 20) : blocks);
  whiten_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(x, mask, n, statistics, shift_mean, ddof,
                                                                          eps, out);
  return int(cudaGetLastError());
}

int group_stats(const double* values, const int64_t* order, const int64_t* offsets, int64_t groups, double* out,
                void* stream) {
  if (groups <= 0) return int(cudaSuccess);
  const auto queue = static_cast<cudaStream_t>(stream);
  if (groups == 1) {  // the batch: 65,536 rewards are 64 rounds of 1,024 threads, three times
    group_stats_kernel<kWholeWarps, kWholeWarps><<<1, kWholeWarps * 32, 0, queue>>>(values, order, offsets, 1, out);
  } else {
    const unsigned grid = unsigned((groups + kGroupWarps - 1) / kGroupWarps);
    group_stats_kernel<kGroupWarps, 1><<<grid, kGroupWarps * 32, 0, queue>>>(values, order, offsets, groups, out);
  }
  return int(cudaGetLastError());
}

}  // namespace rlhf
