/* Which instruction sets this processor has (the kernels for the others must not be called), and its threads. */

void (*openmp_parallel)(void (*body)(void *), void *data, unsigned n_threads, unsigned flags);
void (*openmp_barrier)(void);

void use_openmp(void *parallel, void *barrier) {
    openmp_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
    openmp_barrier = (void (*)(void))barrier;
}

int supported_avx512(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512bf16");
#else
    return 0;
#endif
}

int supported_avx2(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
#else
    return 0;
#endif
}

int supported_neon(void) {
#if defined(__aarch64__)
    return 1;
#else
    return 0;
#endif
}

int supported_portable(void) { return 1; }
