// Spreads the rows over the threads, on the instruction set that row_pass.cpp has chosen.
#include "divergence.h"

#include <cstring>

#include "parallel.h"
#include "row_pass.h"

namespace rlhf {
namespace {

// Smaller pieces of work than this cost more to hand out than to do.
constexpr int64_t kElementsPerBlock = 8192;

const DivergenceKernels& chosen() {
#ifdef RLHF_X86_KERNELS
  if (!std::strcmp(isa_name(), "avx512")) return kDivergenceAvx512;
  if (!std::strcmp(isa_name(), "avx2")) return kDivergenceAvx2;
#endif
  return kDivergencePortable;
}

}  // namespace

void row_divergence(const Divergence& args, int threads) {
  const DivergenceKernels& kernels = chosen();
  parallel_for(args.n, kElementsPerBlock / std::max<int64_t>(args.v, 1), threads,
               [&](int64_t begin, int64_t end) { kernels.values(args, begin, end); });
}

void divergence_dlogits(const Divergence& args, int threads) {
  const DivergenceKernels& kernels = chosen();
  parallel_for(args.n, kElementsPerBlock / std::max<int64_t>(args.v, 1), threads,
               [&](int64_t begin, int64_t end) { kernels.dlogits(args, begin, end); });
}

}  // namespace rlhf
