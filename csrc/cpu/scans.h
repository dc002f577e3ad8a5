// Scans and segmented statistics for the CPU. Raw pointers; nothing here knows of Python or torch.
#pragma once

#include <cstdint>

#include "../common/moments.h"

namespace rlhf {

// Advantages and returns of a packed batch. `values` may be null (zeros); so may either output.
// `offsets` (batch + 1) cuts the batch into sequences; null: `batch` sequences of `length` tokens.
// `bootstrap` (batch) is the value after a sequence's last token; null: zero.
struct GaeArgs {
  const float* rewards;
  const float* values;
  const uint8_t* mask;  // null: every token counts
  const int64_t* offsets;
  int64_t batch;
  int64_t length;
  double gamma;
  double lam;
  bool carry;
  const float* bootstrap;
  float* advantages;
  float* returns;
};

void gae(const GaeArgs& args, int threads);

// The order of work of the CUDA kernel, for tests: tiles of `tile` tokens, each the sum of its `lane`-token runs;
// tile prefixes found by look-back, where `published` (one byte a tile) says whose prefix a tile may see.
void gae_tiled(const GaeArgs& args, int64_t n, int64_t tile, int64_t lane, const uint8_t* published);

// count, mean, m2 of the counted elements, in blocks of fixed size: the same bits on any number of threads.
void moments(const float* x, const uint8_t* mask, int64_t n, double* out, int threads);

// (x - mean) / sqrt(var + eps), plus the mean unless shift_mean, where counted; else 0. `statistics`: as `moments`.
void whiten(const float* x, const uint8_t* mask, int64_t n, const double* statistics, bool shift_mean, int ddof,
            double eps, float* out, int threads);

// out (3, groups): count, mean, m2 of the finite values of each group. `order` (n) lists rows group by group
// (null: rows are already so); `offsets` (groups + 1) cuts that list.
void group_stats(const double* values, const int64_t* order, const int64_t* offsets, int64_t groups, double* out,
                 int threads);

// One compilation of moments_kernel.cpp: elements [begin, end).
struct MomentKernels {
  Moments (*moments)(const float* x, const uint8_t* mask, int64_t begin, int64_t end);
  void (*whiten)(const float* x, const uint8_t* mask, int64_t begin, int64_t end, double mean, double scale,
                 double shift, float* out);
};
extern const MomentKernels kMomentKernelsPortable, kMomentKernelsAvx2, kMomentKernelsAvx512;

}  // namespace rlhf
