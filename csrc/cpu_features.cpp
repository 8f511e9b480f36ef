#include "cpu_features.h"

#include <fstream>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace modeconn {
namespace {

int usable_cores() {
#if defined(__linux__)
    // A container or taskset often allows fewer cores than the machine has.
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) return CPU_COUNT(&allowed);
#endif
    const unsigned cores = std::thread::hardware_concurrency();
    return cores > 0 ? static_cast<int>(cores) : 1;
}

// Size of the first core's data or unified cache of a level, from Linux's sysfs ("1024K"); 0 where it does not say.
// sysconf(_SC_LEVEL3_CACHE_SIZE) is no substitute: on virtual machines it was seen to be wrong by a factor of 12.
std::int64_t cache_bytes(int wanted_level) {
    for (int index = 0; index < 8; ++index) {
        const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
        std::ifstream level_file(folder + "level"), type_file(folder + "type"), size_file(folder + "size");
        int level = 0;
        std::int64_t size = 0;
        std::string type, unit;
        if (!(level_file >> level) || !(type_file >> type) || !(size_file >> size)) break;
        size_file >> unit;
        if (level != wanted_level || type == "Instruction") continue;
        if (unit == "K") return size << 10;
        if (unit == "M") return size << 20;
        return size;
    }
    return 0;
}

}  // namespace

Features detect_features() {
    Features found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    found.avx2 = __builtin_cpu_supports("avx2");
    found.fma = __builtin_cpu_supports("fma");
    found.avx512f = __builtin_cpu_supports("avx512f");
    found.avx512bw = __builtin_cpu_supports("avx512bw");
    found.avx512dq = __builtin_cpu_supports("avx512dq");
    found.avx512vl = __builtin_cpu_supports("avx512vl");
#endif
    found.cores = usable_cores();
    found.l1d_bytes = cache_bytes(1);
    found.l2_bytes = cache_bytes(2);
    found.l3_bytes = cache_bytes(3);
    return found;
}

Versions build_versions() {
    Versions built;
    built.modeconn = MODECONN_VERSION;
#if defined(__clang__)
    built.compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
    built.compiler = "gcc " __VERSION__;
#endif
    built.cplusplus = __cplusplus;
    built.instruction_sets = "generic";
#if defined(MODECONN_HAVE_AVX2)
    built.instruction_sets += " avx2";
#endif
#if defined(MODECONN_HAVE_AVX512)
    built.instruction_sets += " avx512";
#endif
    built.sanitizers = MODECONN_SANITIZERS;
    return built;
}

}  // namespace modeconn
