// One function, three instruction sets, chosen when the library is loaded. The result has the same bits in each: the
// order of additions is written down in the functions, and nothing is contracted to a fused multiply-add.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && \
    !defined(GATE_NO_CLONES)
#define GATE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define GATE_CLONES
#endif
