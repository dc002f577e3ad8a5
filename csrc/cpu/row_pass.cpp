// Chooses the instruction set once per process and spreads the rows over the threads.
#include "row_pass.h"

#include <atomic>
#include <cstring>

#include "parallel.h"

namespace rlhf {
namespace {

// Smaller pieces of work than this cost more to hand out than to do.
constexpr int64_t kElementsPerBlock = 16384;

const RowKernels* find(const char* name) {
#ifdef RLHF_X86_KERNELS
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (!name || !std::strcmp(name, "avx512"))) return &kRowKernelsAvx512;
  if (avx2 && (!name || !std::strcmp(name, "avx2"))) return &kRowKernelsAvx2;
#endif
  return !name || !std::strcmp(name, "portable") ? &kRowKernelsPortable : nullptr;
}

std::atomic<const RowKernels*>& chosen() {
  static std::atomic<const RowKernels*> kernels{find(nullptr)};
  return kernels;
}

}  // namespace

const char* isa_name() { return chosen().load()->name; }

bool use_isa(const char* name) {
  const RowKernels* kernels = find(name);
  if (kernels) chosen() = kernels;
  return kernels != nullptr;
}

void row_stats(const RowStats& args, int threads) {
  const RowKernels* kernels = chosen();
  parallel_for(args.n, kElementsPerBlock / std::max<int64_t>(args.v, 1), threads,
               [&](int64_t begin, int64_t end) { kernels->stats(args, begin, end); });
}

void row_dlogits(const RowGrad& args, int threads) {
  const RowKernels* kernels = chosen();
  parallel_for(args.k, kElementsPerBlock / std::max<int64_t>(args.v, 1), threads,
               [&](int64_t begin, int64_t end) { kernels->dlogits(args, begin, end); });
}

}  // namespace rlhf
