// Merging moments over a warp and a block, in a fixed order.
#pragma once

#include "../common/moments.h"

namespace rlhf {

__device__ inline Moments warp_merge(Moments m) {
  for (int by = 16; by > 0; by /= 2) {
    const Moments other = {__shfl_down_sync(0xffffffffu, m.count, by), __shfl_down_sync(0xffffffffu, m.mean, by),
                           __shfl_down_sync(0xffffffffu, m.m2, by)};
    m = merge(m, other);  // lanes past the end merge with themselves; lane 0 never reads them
  }
  return m;
}

// The block's moments, in thread 0. Every thread of the block must call it; it may be called again.
template <int kThreads>
__device__ Moments block_merge(Moments m) {
  __shared__ Moments s_warp[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  m = warp_merge(m);
  __syncthreads();  // thread 0 may still be reading what an earlier call left
  if (lane == 0) s_warp[warp] = m;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / 32; ++w) m = merge(m, s_warp[w]);
  }
  return m;
}

}  // namespace rlhf
