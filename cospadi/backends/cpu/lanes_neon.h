/* Eight floats in two vectors: NEON of 64-bit Arm.  The expansion is a table lookup that a table of the 256 masks gives. */
#include "job.h"
#include <arm_neon.h>

#define LANES 8
typedef struct { float32x4_t low, high; } lanes;

/* places[m][i]: which of the next values belongs to bit i of mask m; 0xff (which the lookup reads as zero) for none. */
static uint8_t places[256][8];

__attribute__((constructor)) static void fill_places(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int bit = 0, next = 0; bit < 8; bit++) places[mask][bit] = mask >> bit & 1 ? (uint8_t)next++ : 0xff;
}

INLINE lanes zero(void) { return (lanes){vdupq_n_f32(0), vdupq_n_f32(0)}; }
INLINE lanes load_lanes(const float *p) { return (lanes){vld1q_f32(p), vld1q_f32(p + 4)}; }

INLINE lanes multiply_add(lanes a, lanes b, lanes c) {
    return (lanes){vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}

INLINE lanes scale_lanes(lanes a, float scale) {
    return (lanes){vmulq_n_f32(a.low, scale), vmulq_n_f32(a.high, scale)};
}

INLINE float sum(lanes a) { return vaddvq_f32(vaddq_f32(a.low, a.high)); }

INLINE lanes from_halves(int64_t kind, uint16x8_t halves) {
    if (kind == F16) {
        const float16x8_t numbers = vreinterpretq_f16_u16(halves);
        return (lanes){vcvt_f32_f16(vget_low_f16(numbers)), vcvt_high_f32_f16(numbers)};
    }
    return (lanes){vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16)),
                   vreinterpretq_f32_u32(vshll_high_n_u16(halves, 16))};
}

INLINE lanes from_bytes(int8x8_t bytes) {
    const int16x8_t wide = vmovl_s8(bytes);
    return (lanes){vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))};
}

INLINE lanes dense(int64_t kind, const void *values, int64_t index, int64_t count) {
    char last[32] = {0};
    const char *p = (const char *)values + (size_t)index * bytes_of(kind);
    if (count < LANES) {
        memcpy(last, p, (size_t)count * bytes_of(kind));
        p = last;
    }
    if (kind == F32) return load_lanes((const float *)p);
    if (kind == INT8) return from_bytes(vld1_s8((const int8_t *)p));
    return from_halves(kind, vreinterpretq_u16_u8(vld1q_u8((const uint8_t *)p)));
}

INLINE lanes expand(int64_t kind, const void *values, uint32_t bits) {
    const uint8x8_t bytes = vld1_u8(places[bits]);
    if (kind == INT8) return from_bytes(vreinterpret_s8_u8(vtbl1_u8(vld1_u8((const uint8_t *)values), bytes)));
    if (kind == F32) {
        float next[LANES], at[LANES];
        memcpy(next, values, sizeof next);
        for (int i = 0; i < LANES; i++) at[i] = bits >> i & 1 ? next[places[bits][i]] : 0.0f;
        return load_lanes(at);
    }
    /* Both bytes of every half: 2 p and 2 p + 1; an empty place stays beyond the table. */
    const uint8x16_t pairs = vcombine_u8(vzip1_u8(bytes, bytes), vzip2_u8(bytes, bytes));
    const uint8x16_t order = vorrq_u8(vorrq_u8(vshlq_n_u8(pairs, 1), vreinterpretq_u8_u16(vdupq_n_u16(0x0100))),
                                      vandq_u8(pairs, vdupq_n_u8(0x80)));
    return from_halves(kind, vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8((const uint8_t *)values), order)));
}

INLINE void store_lanes(int64_t kind, void *values, int64_t index, int64_t count, lanes a) {
    float at[LANES];
    vst1q_f32(at, a.low);
    vst1q_f32(at + 4, a.high);
    for (int i = 0; i < LANES && i < count; i++) put(values, kind, index + i, at[i]);
}
