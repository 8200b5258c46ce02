// Which instruction sets were built in, and which of them this processor runs.
#include <unistd.h>

#include "kernels.h"

#define NW_DECLARE(isa) \
  namespace isa {       \
  const Kernels* kernels(); \
  }

namespace nw {

NW_DECLARE(generic)
#ifdef NW_HAVE_AVX2
NW_DECLARE(avx2)
#endif
#ifdef NW_HAVE_AVX512
NW_DECLARE(avx512)
#endif
#ifdef NW_HAVE_NEON
NW_DECLARE(neon)
#endif

ParallelFor parallel_for = nullptr;
ThreadCount thread_count = nullptr;

namespace {

struct Registry {
  const Kernels* sets[4];
  int count = 0;
  Registry() {
    sets[count++] = generic::kernels();
#ifdef NW_HAVE_NEON
    sets[count++] = neon::kernels();  // every aarch64 processor has it
#endif
#if defined(__x86_64__)
    __builtin_cpu_init();
#ifdef NW_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
      sets[count++] = avx2::kernels();
#endif
#ifdef NW_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      sets[count++] = avx512::kernels();
#endif
#endif
  }
};
const Registry& registry() {
  static const Registry r;
  return r;
}

}  // namespace

int instruction_set_count() { return registry().count; }
const Kernels* instruction_set(int index) { return registry().sets[index]; }

int64_t last_level_cache_bytes() {
  static const int64_t bytes = [] {
    int64_t b = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
    b = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return b > 0 ? b : int64_t(16) << 20;
  }();
  return bytes;
}

}  // namespace nw
