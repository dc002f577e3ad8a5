// Advantages and returns of a packed batch in one pass over memory: a scan over affine maps with look-back.
//
// * Tile 0 is the end of the batch, as the scan runs from the last token to the first. A tile composes its tokens'
//   maps, publishes that aggregate, finds the state that enters it from the tiles before it, and writes.
// * The state s_t that leaves tile t is defined as aggregate_t(s_{t-1}) and is always computed so, one map after the
//   other from the nearest published state: the same bits, whatever the timing.
// * An aggregate that is constant (some sequence ends in the tile) publishes its state at once: with sequences shorter
//   than a tile nobody ever waits.
// * Tiles are numbered by a ticket, so that whoever is waited for is already running.
// * Rewards may be shaped on the way in (a KL penalty, the score on the last token that counts) and the advantages'
//   moments taken on the way out; the last tile to finish merges those of all tiles in the order of the tiles.
// * fp64 state: powers of gamma lam, and sums over long sequences, cost digits that fp32 does not have. The kernel is
//   bound by memory.
//
// Merrill and Garland 2016, "Single-pass parallel prefix scan with decoupled look-back". The order of work is emulated
// by gae_tiled in csrc/cpu/scans.cpp.
#include "../common/affine_scan.h"
#include "moments.cuh"
#include "scans.h"

namespace rlhf {
namespace {

constexpr int kThreads = 256;
constexpr int kItems = 16;  // consecutive tokens of one thread
constexpr int kTile = kThreads * kItems;
constexpr int kWarps = kThreads / 32;
constexpr int kPadded = kTile + kTile / kItems;  // one float of padding per thread: no bank conflicts

enum : uint32_t { kEmpty = 0, kAggregate = 1, kState = 2 };

struct TileStatus {
  Affine<double>* aggregate;  // (tiles)
  double* state;              // (tiles)
  Moments* moments;           // (tiles)
  uint32_t* flag;             // (tiles), zero at launch
  uint32_t* ticket;           // zero at launch
  uint32_t* finished;         // zero at launch
};

int64_t tile_count(int64_t n) { return (n + kTile - 1) / kTile; }

__device__ __forceinline__ int padded(int i) { return i + i / kItems; }

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(uint32_t* p, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

__device__ __forceinline__ Affine<double> shuffle_up(const Affine<double>& f, int by) {
  return {__shfl_up_sync(0xffffffffu, f.slope, by), __shfl_up_sync(0xffffffffu, f.offset, by)};
}

__device__ __forceinline__ int64_t sequence_begin(const GaeCudaArgs& a, int64_t b) {
  return a.offsets ? a.offsets[b] : b * a.length;
}

// One thread's walk from its last token to its first: which sequence it is in, and whether that sequence starts here.
struct Walk {
  int64_t sequence;
  int64_t begin;  // of the sequence
  int64_t last;   // the token that takes the sequence's start state
  double start;

  __device__ void enter(const GaeCudaArgs& a, int64_t b) {
    sequence = b;
    begin = sequence_begin(a, b);
    last = (a.ends ? a.ends[b] : sequence_begin(a, b + 1)) - 1;
    start = a.bootstrap ? a.gamma * double(a.bootstrap[b]) : 0.0;
  }

  // Empty sequences are walked over; sequence 0 is never left, whatever the offsets say.
  __device__ void move_to(const GaeCudaArgs& a, int64_t i) {
    while (i < begin && sequence > 0) enter(a, sequence - 1);
  }
};

// The state that enters `tile`, by one warp; tile > 0.
__device__ double look_back(const TileStatus& status, int64_t tile) {
  const int lane = threadIdx.x % 32;
  int64_t nearest = tile - 1;  // the latest tile whose state is known
  double state = 0.0;
  for (int64_t window = tile - 1;; window -= 32) {
    const int64_t t = window - lane;
    const uint32_t flag = t >= 0 ? load_acquire(status.flag + t) : uint32_t(kEmpty);
    const uint32_t known = __ballot_sync(0xffffffffu, flag == kState);
    if (known) {
      const int who = __ffs(known) - 1;
      nearest = window - who;
      if (lane == who) state = __ldcg(status.state + nearest);  // by the lane whose load acquired the flag
      state = __shfl_sync(0xffffffffu, state, who);
      break;
    }
    if (window < 32) window = tile - 1 + 32;  // nothing published yet: look again from the start
  }
  for (int64_t first = nearest + 1; first < tile; first += 32) {
    const int64_t t = first + lane;
    Affine<double> f = identity_map<double>();
    if (t < tile) {
      while (load_acquire(status.flag + t) == kEmpty) __nanosleep(20);
      f = {__ldcg(&status.aggregate[t].slope), __ldcg(&status.aggregate[t].offset)};
    }
    const int many = tile - first < 32 ? int(tile - first) : 32;
    for (int k = 0; k < many; ++k) {
      const Affine<double> g = {__shfl_sync(0xffffffffu, f.slope, k), __shfl_sync(0xffffffffu, f.offset, k)};
      state = apply(g, state);
    }
  }
  return state;
}

__device__ __forceinline__ float kl_value(float d, int estimator) {
  if (estimator == 0) return d;
  if (estimator == 1) return fabsf(d);
  if (estimator == 2) return 0.5f * d * d;
  const double x = fmin(-double(d), 20.0);
  return d == d ? float(expm1(x) - x) : d;
}

// A NaN stays.
__device__ __forceinline__ float clamp_to(float x, float bound) { return x < -bound ? -bound : x > bound ? bound : x; }

// Reward of token i without its sequence's score.
__device__ __forceinline__ float kl_reward(const GaeCudaArgs& a, int64_t i, bool counts) {
  float reward = 0.0f;
  if (a.logprob) {
    const float kl = counts ? kl_value(a.logprob[i] - a.ref_logprob[i], a.kl_estimator) : 0.0f;
    a.kl[i] = kl;
    if (counts) reward = -a.kl_coef * clamp_to(kl, a.kl_clip);
  }
  a.shaped[i] = reward;
  return reward;
}

// Moments of the tile's advantages (slots of this thread: [from, to)), and of all tiles when this is the last one.
__device__ void tile_moments(const GaeCudaArgs& a, const TileStatus& status, int64_t tile, int64_t tiles,
                             const float* s_advantages, const uint8_t* s_counts, int from, int to) {
  __shared__ bool s_is_last;
  double count = 0.0, sum = 0.0, m2 = 0.0;
  for (int j = from; j < to; ++j) {
    count += s_counts[j] ? 1.0 : 0.0;
    sum += s_counts[j] ? double(s_advantages[padded(j)]) : 0.0;
  }
  const double mean = count > 0.0 ? sum / count : 0.0;
  for (int j = from; j < to; ++j) {
    const double deviation = s_counts[j] ? double(s_advantages[padded(j)]) - mean : 0.0;
    m2 += deviation * deviation;
  }
  Moments mine = block_merge<kThreads>({count, mean, m2});
  if (threadIdx.x == 0) {
    status.moments[tile] = mine;
    __threadfence();
    s_is_last = atomicAdd(status.finished, 1u) == uint32_t(tiles - 1);
    __threadfence();
  }
  __syncthreads();
  if (!s_is_last) return;
  mine = {0.0, 0.0, 0.0};
  for (int64_t t = threadIdx.x; t < tiles; t += kThreads) {
    const Moments* m = status.moments + t;
    mine = merge(mine, {__ldcg(&m->count), __ldcg(&m->mean), __ldcg(&m->m2)});
  }
  mine = block_merge<kThreads>(mine);
  if (threadIdx.x == 0) {
    a.statistics[0] = mine.count;
    a.statistics[1] = mine.mean;
    a.statistics[2] = mine.m2;
  }
}

// Four blocks a multiprocessor, as many as shared memory has room for on sm_80. For a fifth on sm_90 it would spill.
template <bool kShaped, bool kMoments>
__global__ void __launch_bounds__(kThreads, 4) gae_kernel(const GaeCudaArgs a, const TileStatus status) {
  __shared__ float s_rewards[kPadded];
  __shared__ float s_values[kPadded];
  __shared__ uint8_t s_counts[kTile];
  __shared__ Affine<double> s_warp[kWarps];
  __shared__ int64_t s_tile, s_low, s_high;
  __shared__ double s_state;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

  if (thread == 0) s_tile = atomicAdd(status.ticket, 1u);
  __syncthreads();
  const int64_t tile = s_tile;
  const int64_t high = a.n - tile * kTile;  // one past the tile's last token
  const int64_t low = high > kTile ? high - kTile : 0;
  const int size = int(high - low);

  // Slot j holds token high - 1 - j: thread 0 has the last tokens, the order of the scan.
  for (int j = thread; j < size; j += kThreads) {
    const int64_t i = high - 1 - j;
    s_counts[j] = a.mask ? a.mask[i] : uint8_t(1);
    s_rewards[padded(j)] = kShaped ? kl_reward(a, i, s_counts[j] != 0) : a.rewards[i];
    s_values[padded(j)] = a.values ? a.values[i] : 0.0f;
  }
  if (thread == 0) s_high = a.offsets ? find_sequence(a.offsets, 0, a.batch - 1, high - 1) : (high - 1) / a.length;
  if (thread == 32) s_low = a.offsets ? find_sequence(a.offsets, 0, a.batch - 1, low) : low / a.length;
  __syncthreads();

  const GaeCoefficients<double> k(a.gamma, a.lam, a.carry);
  const int from = thread * kItems;
  const int to = from + kItems < size ? from + kItems : size;
  Walk at_first{};
  Affine<double> run = identity_map<double>();
  if (from < to) {
    const int64_t i = high - 1 - from;
    at_first.enter(a, a.offsets ? find_sequence(a.offsets, s_low, s_high, i) : i / a.length);
    Walk at = at_first;
    for (int j = from; j < to; ++j) {
      const int64_t token = high - 1 - j;
      at.move_to(a, token);
      if (kShaped && token == at.last) {  // no other thread has this token; the barrier above ordered the first store
        const float reward = s_rewards[padded(j)] + clamp_to(a.scores[at.sequence], a.score_clip);
        s_rewards[padded(j)] = reward;
        a.shaped[token] = reward;
      }
      Affine<double> f = gae_map(k, double(s_rewards[padded(j)]), double(s_values[padded(j)]), s_counts[j] != 0);
      if (token == at.last) f = constant_map(f, at.start);
      run = compose(f, run);
    }
  }

  // Exclusive scan over the threads: `before` composes the runs of all earlier threads.
  Affine<double> through = run;
  for (int by = 1; by < 32; by *= 2) {
    const Affine<double> earlier = shuffle_up(through, by);
    if (lane >= by) through = compose(through, earlier);
  }
  if (lane == 31) s_warp[warp] = through;
  Affine<double> before = shuffle_up(through, 1);
  if (lane == 0) before = identity_map<double>();
  __syncthreads();
  Affine<double> earlier_warps = identity_map<double>(), total = identity_map<double>();
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) earlier_warps = total;
    total = compose(s_warp[w], total);
  }
  before = compose(before, earlier_warps);

  if (warp == 0) {
    const bool constant = tile == 0 || total.slope == 0.0;
    if (lane == 0) {
      const double own = apply(total, 0.0);
      // The aggregate is shown even where the state is known: a later tile may find an older state and walk over this.
      status.aggregate[tile] = constant ? Affine<double>{0.0, own} : total;
      if (constant) status.state[tile] = own;
      __threadfence();
      store_release(status.flag + tile, constant ? kState : kAggregate);
    }
    const double entering = tile == 0 ? 0.0 : look_back(status, tile);
    if (lane == 0) {
      s_state = entering;
      if (!constant) {
        status.state[tile] = apply(total, entering);
        __threadfence();
        store_release(status.flag + tile, kState);
      }
    }
  }
  __syncthreads();

  if (from < to) {
    double state = apply(before, s_state);
    Walk at = at_first;
    for (int j = from; j < to; ++j) {
      const int64_t token = high - 1 - j;
      at.move_to(a, token);
      if (token == at.last) state = at.start;
      const float reward = s_rewards[padded(j)], value = s_values[padded(j)];
      const bool counts = s_counts[j] != 0;
      const double to_go = double(reward) + state;
      const Affine<double> f = gae_map(k, double(reward), double(value), counts);
      state = f.slope * state + f.offset;
      s_rewards[padded(j)] = counts ? float(to_go) : 0.0f;
      s_values[padded(j)] = counts ? float(to_go - double(value)) : 0.0f;
    }
  }
  __syncthreads();
  for (int j = thread; j < size; j += kThreads) {
    const int64_t i = high - 1 - j;
    if (a.returns) a.returns[i] = s_rewards[padded(j)];
    if (a.advantages) a.advantages[i] = s_values[padded(j)];
  }
  if (kMoments) tile_moments(a, status, tile, gridDim.x, s_values, s_counts, from, to);
}

// aggregates | states | moments | flags | ticket | finished
int64_t flags_begin(int64_t tiles) {
  return tiles * int64_t(sizeof(Affine<double>) + sizeof(double) + sizeof(Moments));
}

}  // namespace

const char* error_text(int code) { return cudaGetErrorString(cudaError_t(code)); }

int64_t gae_workspace_bytes(int64_t n) {
  const int64_t tiles = tile_count(n);
  return flags_begin(tiles) + (tiles + 2) * int64_t(sizeof(uint32_t));
}

int gae(const GaeCudaArgs& a, void* workspace, void* stream) {
  if (a.n <= 0) return int(cudaSuccess);
  const int64_t tiles = tile_count(a.n);
  auto* bytes = static_cast<uint8_t*>(workspace);
  TileStatus status;
  status.aggregate = reinterpret_cast<Affine<double>*>(bytes);
  status.state = reinterpret_cast<double*>(status.aggregate + tiles);
  status.moments = reinterpret_cast<Moments*>(status.state + tiles);
  status.flag = reinterpret_cast<uint32_t*>(status.moments + tiles);
  status.ticket = status.flag + tiles;
  status.finished = status.ticket + 1;
  cudaError_t error = cudaMemsetAsync(status.flag, 0, size_t(tiles + 2) * sizeof(uint32_t),
                                      static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) return int(error);
  const auto kernel = a.scores ? (a.statistics ? gae_kernel<true, true> : gae_kernel<true, false>)
                               : (a.statistics ? gae_kernel<false, true> : gae_kernel<false, false>);
  kernel<<<unsigned(tiles), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a, status);
  return int(cudaGetLastError());
}

}  // namespace rlhf
