// What the CPU under this process offers, and what this extension was built with.
#pragma once

#include <cstdint>
#include <string>

namespace modeconn {

struct Features {
    // Instruction sets that both the CPU and the operating system allow. All false on other processors than x86-64.
    bool avx2 = false;
    bool fma = false;
    bool avx512f = false;
    bool avx512bw = false;
    bool avx512dq = false;
    bool avx512vl = false;
    int cores = 1;                 // that this process may use
    std::int64_t l1d_bytes = 0;    // caches as the first core sees them; 0 where the system does not tell
    std::int64_t l2_bytes = 0;
    std::int64_t l3_bytes = 0;
};

struct Versions {
    std::string modeconn;
    std::string compiler;
    long cplusplus = 0;
    std::string instruction_sets;  // that the compiler could build code for, space-separated; "generic" is always there
    std::string sanitizers;        // "" in a normal build
};

Features detect_features();
Versions build_versions();

}  // namespace modeconn
