/* Words that every file of the kernels uses. */
#ifndef COSPADI_MACROS_H
#define COSPADI_MACROS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define EXPORT(name) JOIN(name, LEVEL)
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#endif
