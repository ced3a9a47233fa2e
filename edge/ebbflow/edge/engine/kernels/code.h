/* Coding, a part of passes.h: bfloat16 weights become codes and scales, to the bit as `quantise_int8` and `derive_nibbles`
 * of common/codes/quantise.py make them where no scale is kept. */

static const float WEIGHT_MOST = 458000.0f; /* the INT4 scale of a larger weight would not fit into float16 */
static const uint16_t SCALE_MOST = 0x6b0d;  /* float16 3610 */

INLINE uint16_t to_f16(float x) { /* to the nearest, ties to even; x is at least 0 and small enough to fit */
    union { float f; uint32_t u; } value = {x};
    if (x < 0x1p-14f) { /* a float16 subnormal; the product is exact, so it may become one instruction with the sum */
        value.f = x * 0x1p24f + 0x1.8p23f;
        return (uint16_t)(value.u & 0xffff);
    }
    return (uint16_t)((value.u + 0xfff + ((value.u >> 13) & 1) - (112u << 23)) >> 13);
}

/* One group of INT8; -1 if a weight is too large or no number. */
INLINE int code_group(const uint16_t *weights, int8_t *codes, uint16_t *scale) {
    int16_t most = 0; /* without their signs, numbers are in the order of their bits, those that are none above all */
    for (int i = 0; i < EBB_GROUP; i++) {
        int16_t size = (int16_t)(weights[i] & 0x7fff);
        most = size > most ? size : most;
    }
    float largest = ebb_from_bf16((uint16_t)most);
    if (!(largest <= WEIGHT_MOST)) return -1;
    uint16_t s = to_f16(largest * (float)(1.06 / 127)); /* HEADROOM */
    s = s < SCALE_MOST ? s : SCALE_MOST;
    if (ebb_from_f16(s) * 127.5f < largest) s++; /* a subnormal that was rounded down too far */
    *scale = s;
    float divisor = ebb_from_f16(s > 0 ? s : 1);
    for (int i = 0; i < EBB_GROUP; i++) {
        float code = ebb_from_bf16(weights[i]) / divisor;
        code = code < 127.0f ? code : 127.0f;
        code = code > -127.0f ? code : -127.0f;
        union { float f; int32_t i; } rounded = {code + 0x1.8p23f}; /* ties to even, the code in the last bits */
        codes[i] = (int8_t)(rounded.i & 0xff);
    }
    return 0;
}

static int pass_code8(const uint16_t *weights, size_t groups, int8_t *codes, uint16_t *scales) {
    int failed = 0;
    for (size_t g = 0; g < groups; g++) failed |= code_group(weights + g * EBB_GROUP, codes + g * EBB_GROUP, scales + g);
    return failed;
}

/* Two INT8 codes as the byte of their INT4 codes, each plus 8: 7/127 of them, rounded. */
INLINE uint8_t nibbles_of(int8_t low, int8_t high) {
    int16_t a = low, b = high;
    uint16_t x = (uint16_t)(14 * (a < 0 ? -a : a) + 127) / 254, y = (uint16_t)(14 * (b < 0 ? -b : b) + 127) / 254;
    return (uint8_t)((a < 0 ? 8 - x : 8 + x) | (b < 0 ? 8 - y : 8 + y) << 4);
}

static int pass_code4(const uint16_t *weights, size_t groups, uint8_t *restrict nibbles, uint16_t *restrict scales) {
    enum { AT_ONCE = 16 };
    int failed = 0;
    for (size_t g = 0; g < groups; g += AT_ONCE) {
        size_t count = groups - g < AT_ONCE ? groups - g : AT_ONCE;
        int8_t codes[AT_ONCE * EBB_GROUP];
        if (pass_code8(weights + g * EBB_GROUP, count, codes, scales + g)) {
            failed = -1;
            continue;
        }
        for (size_t i = 0; i < count * EBB_GROUP / 2; i++)
            nibbles[g * EBB_GROUP / 2 + i] = nibbles_of(codes[2 * i], codes[2 * i + 1]);
        for (size_t i = g; i < g + count; i++) scales[i] = to_f16(ebb_from_f16(scales[i]) * 127.0f / 7.0f);
    }
    return failed;
}
