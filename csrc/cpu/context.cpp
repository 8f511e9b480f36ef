#include "context.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#if defined(__unix__)
#include <unistd.h>
#endif

namespace modeconn {
namespace {

struct Isa {
  const char* name;
  void (*fill)(Context&);
  bool (*runs)();
};

const Isa isas[] = {
#if defined(MODECONN_HAVE_AVX512)
    {"avx512", fill_avx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
     }},
#endif
#if defined(MODECONN_HAVE_AVX2)
    {"avx2", fill_avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"generic", fill_generic, [] { return true; }},
};

std::string names() {
  const char* list[3];
  int n = supported_isas(list);
  std::string text = list[0];
  for (int i = 1; i < n; ++i) text += std::string(", ") + list[i];
  return text;
}

Context make(const Isa& isa) {
  Context c{};
  fill_generic(c);
  isa.fill(c);
  c.isa = isa.name;
  return c;
}

}  // namespace

int supported_isas(const char* list[3]) {
  int n = 0;
  for (const Isa& isa : isas)
    if (isa.runs()) list[n++] = isa.name;
  return n;
}

const Context& context(const char* wanted) {
  const char* from = "isa";
  if (!wanted || !*wanted) {
    wanted = std::getenv("MODECONN_ISA");
    from = "the environment variable MODECONN_ISA";
  }
  for (const Isa& isa : isas) {
    bool any = !wanted || !*wanted;
    if ((any || !std::strcmp(wanted, isa.name)) && isa.runs()) {
      static Context made[3];
      static const bool once = [] {
        for (const Isa& i : isas)
          if (i.runs()) made[&i - isas] = make(i);
        return true;
      }();
      (void)once;
      return made[&isa - isas];
    }
  }
  throw std::invalid_argument(std::string(from) + " must be one of the instruction sets this CPU runs (" + names() +
                              "), got '" + wanted + "'");
}

int64_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes >= 128 * 1024) return bytes < (4 << 20) ? bytes : (4 << 20);
#endif
  return 512 * 1024;
}

}  // namespace modeconn
