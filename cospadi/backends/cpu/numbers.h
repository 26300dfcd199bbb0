/* Conversions of single numbers and of whole rows; to nearest even, as torch rounds. */
#ifndef COSPADI_NUMBERS_H
#define COSPADI_NUMBERS_H

#include "macros.h"

enum kind { BF16, F16, F32, INT8 };

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float from_bf16(uint16_t half) { return from_bits((uint32_t)half << 16); }

INLINE uint16_t to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40); /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

INLINE float from_f16(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000u | (rest & 0x3ff) << 13);
    if (rest >= 0x400) return from_bits(sign | ((rest << 13) + (112u << 23)));
    const float small = (float)rest * 0x1p-24f;
    return sign ? -small : small;
}

INLINE uint16_t to_f16(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000u) { /* subnormal: adding one half aligns the last place, and rounds */
        const float aligned = from_bits(rest) + 0.5f;
        return (uint16_t)(sign | (bits_of(aligned) - 0x3f000000u));
    }
    return (uint16_t)(sign | (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1)) >> 13);
}

INLINE float number_at(const void *values, int64_t kind, int64_t index) {
    switch (kind) {
    case BF16: return from_bf16(((const uint16_t *)values)[index]);
    case F16: return from_f16(((const uint16_t *)values)[index]);
    case F32: return ((const float *)values)[index];
    default: return (float)((const int8_t *)values)[index];
    }
}

/* A row in float32, padded with zeros. */
static void widen(const void *values, int64_t kind, int64_t offset, int64_t count, float *row, int64_t stride) {
    for (int64_t i = 0; i < count; i++) row[i] = number_at(values, kind, offset + i);
    for (int64_t i = count; i < stride; i++) row[i] = 0.0f;
}

#endif
