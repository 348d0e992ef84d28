// CPU loops that the compiler vectorises for the machine at hand, without -m flags: one build runs on any x86-64.
#pragma once

// A function so marked is compiled for AVX-512, AVX2 and plain x86-64; the loader picks. Its helpers are inlined into
// it.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define TORCH_FUSED_X86_DISPATCH
#define TORCH_FUSED_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TORCH_FUSED_SIMD
#endif
#define TORCH_FUSED_INLINE inline __attribute__((always_inline))
