// Which instruction sets were built in, and which of them this processor runs.
#include <unistd.h>

#include <fstream>
#include <string>

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

namespace {

// Linux tells of one core's caches. The C library's figure can be the whole socket's: 256 MB for
// the third level on an EPYC where a core reaches 32 MB of it.
int64_t cache_bytes(int level, int name, int64_t otherwise) {
  for (int i = 0; i < 8; ++i) {
    const std::string base = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/";
    int64_t found = 0, size = 0;
    char type = 0, unit = 0;
    if (std::ifstream(base + "level") >> found && found == level &&
        std::ifstream(base + "type") >> type && type != 'I' &&  // instructions
        std::ifstream(base + "size") >> size >> unit && size > 0)
      return size << (unit == 'M' ? 20 : 10);
  }
  const int64_t told = name < 0 ? 0 : sysconf(name);
  return told > 0 ? told : otherwise;
}

}  // namespace

#ifdef _SC_LEVEL3_CACHE_SIZE
Caches caches = {cache_bytes(2, _SC_LEVEL2_CACHE_SIZE, int64_t(512) << 10),
                 cache_bytes(3, _SC_LEVEL3_CACHE_SIZE, int64_t(16) << 20)};
#else
Caches caches = {cache_bytes(2, -1, int64_t(512) << 10), cache_bytes(3, -1, int64_t(16) << 20)};
#endif

}  // namespace nw
