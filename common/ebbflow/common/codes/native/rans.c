/* The entropy coder of deltas: static rANS over bytes, as `ebbflow.common.codes.rans` describes it.
 *
 * Portable C11 without state, allocation or IO, called through ctypes, which lets other Python threads run meanwhile.
 * Nothing of a payload is trusted: every read and write is inside the lengths that the caller gives.
 *
 * Source of the method: J. Duda, "Asymmetric numeral systems", arXiv 1311.2540; interleaved states over one stream of
 * 16-bit words as in F. Giesen, "Interleaved entropy coders", arXiv 1402.3392.
 */
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum { ABI = 1, PROBABILITY_BITS = 14, TOTAL = 1 << PROBABILITY_BITS, MOST_LANES = 64, SYMBOLS = 256 };
#define LOWEST_STATE ((uint32_t)1 << 16)

/* What went wrong; also the Python side's. */
enum { BAD_TABLE = -1, BAD_PAYLOAD = -2, NO_ROOM = -3, BAD_LANES = -4 };

static uint32_t load32(const uint8_t *at) {
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static uint32_t load16(const uint8_t *at) { return (uint32_t)at[0] | (uint32_t)at[1] << 8; }

static void store32(uint8_t *at, uint32_t value) {
    for (int i = 0; i < 4; i++) at[i] = (uint8_t)(value >> (8 * i));
}

/* Fills in where each symbol's share of the probabilities begins; 0 if the shares do not add up. */
static int accumulate(const uint16_t *frequencies, uint16_t *begins) {
    uint32_t sum = 0;
    for (int symbol = 0; symbol < SYMBOLS; symbol++) {
        begins[symbol] = (uint16_t)sum;
        sum += frequencies[symbol];
        if (frequencies[symbol] >= TOTAL || sum > TOTAL) return 0;
    }
    return sum == TOTAL;
}

/* Says whether library and caller are of one version. */
EXPORT int32_t ebbflow_rans_abi(void) { return ABI; }

/* Adds the occurrences of each byte to `counts`. Four tables keep equal neighbours from waiting for each other. */
EXPORT void ebbflow_rans_count(const uint8_t *symbols, int64_t length, int64_t *counts) {
    uint32_t partial[4][SYMBOLS];
    while (length > 0) {
        int64_t piece = length < ((int64_t)1 << 30) ? length : ((int64_t)1 << 30);
        int64_t i = 0;
        memset(partial, 0, sizeof partial);
        for (; i + 4 <= piece; i += 4)
            for (int k = 0; k < 4; k++) partial[k][symbols[i + k]]++;
        for (; i < piece; i++) partial[0][symbols[i]]++;
        for (int s = 0; s < SYMBOLS; s++)
            counts[s] += (int64_t)partial[0][s] + partial[1][s] + partial[2][s] + partial[3][s];
        symbols += piece;
        length -= piece;
    }
}

/* Codes `length` symbols, the last one first, and returns the payload's bytes or what went wrong.
 *
 * `payload` has room for `room` bytes: 4 for each lane and 2 for each symbol are always enough.
 */
EXPORT int64_t ebbflow_rans_encode(const uint8_t *symbols, int64_t length, int32_t lanes, const uint16_t *frequencies,
                                   uint8_t *payload, int64_t room) {
    uint16_t begins[SYMBOLS];
    uint32_t states[MOST_LANES];
    if (!accumulate(frequencies, begins)) return BAD_TABLE;
    if (lanes < 1 || lanes > MOST_LANES || length < 0) return BAD_LANES;
    if (room < 4 * (int64_t)lanes + 2 * length) return NO_ROOM;
    for (int lane = 0; lane < lanes; lane++) states[lane] = LOWEST_STATE;
    uint8_t *end = payload + room, *at = end;
    int32_t lane = (int32_t)(length % lanes);
    for (int64_t i = length - 1; i >= 0; i--) {
        lane = lane ? lane - 1 : lanes - 1;
        uint32_t frequency = frequencies[symbols[i]];
        if (!frequency) return BAD_TABLE;
        uint32_t state = states[lane];
        if (state >= frequency << (32 - PROBABILITY_BITS)) {
            at -= 2;
            at[0] = (uint8_t)state;
            at[1] = (uint8_t)(state >> 8);
            state >>= 16;
        }
        uint32_t whole = state / frequency;
        states[lane] = (whole << PROBABILITY_BITS) + (state - whole * frequency) + begins[symbols[i]];
    }
    for (lane = 0; lane < lanes; lane++) store32(payload + 4 * lane, states[lane]);
    memmove(payload + 4 * lanes, at, (size_t)(end - at));
    return 4 * (int64_t)lanes + (end - at);
}

/* Decodes exactly `length` symbols from exactly `size` bytes and returns 0, or what went wrong.
 *
 * Every state must come back to where the coder began and every word must be used, so that hardly any damage passes.
 */
EXPORT int32_t ebbflow_rans_decode(const uint8_t *payload, int64_t size, int64_t length, int32_t lanes,
                                   const uint16_t *frequencies, uint8_t *symbols) {
    uint16_t begins[SYMBOLS];
    uint32_t shares[SYMBOLS]; /* frequency, and above it the beginning */
    uint8_t symbol_of[TOTAL];
    uint32_t states[MOST_LANES];
    if (!accumulate(frequencies, begins)) return BAD_TABLE;
    if (lanes < 1 || lanes > MOST_LANES || length < 0) return BAD_LANES;
    if (size < 4 * (int64_t)lanes || (size & 1)) return BAD_PAYLOAD;
    for (int s = 0; s < SYMBOLS; s++) {
        shares[s] = (uint32_t)begins[s] << 16 | frequencies[s];
        memset(symbol_of + begins[s], s, frequencies[s]);
    }
    for (int lane = 0; lane < lanes; lane++) states[lane] = load32(payload + 4 * lane);
    const uint8_t *at = payload + 4 * lanes, *end = payload + size;
    int64_t i = 0;
    while (i < length) {
        int32_t step = length - i < lanes ? (int32_t)(length - i) : lanes;
        if (end - at >= 2 * (int64_t)lanes + 2) { /* no check for each word: a step takes one a lane at most */
            for (int32_t lane = 0; lane < step; lane++) {
                uint32_t state = states[lane], slot = state & (TOTAL - 1);
                uint8_t symbol = symbol_of[slot];
                uint32_t share = shares[symbol];
                symbols[i + lane] = symbol;
                state = (share & 0xFFFF) * (state >> PROBABILITY_BITS) + slot - (share >> 16);
                uint32_t low = state < LOWEST_STATE;
                states[lane] = low ? state << 16 | load16(at) : state;
                at += 2 * low;
            }
        } else {
            for (int32_t lane = 0; lane < step; lane++) {
                uint32_t state = states[lane], slot = state & (TOTAL - 1);
                uint8_t symbol = symbol_of[slot];
                uint32_t share = shares[symbol];
                symbols[i + lane] = symbol;
                state = (share & 0xFFFF) * (state >> PROBABILITY_BITS) + slot - (share >> 16);
                if (state < LOWEST_STATE) {
                    if (end - at < 2) return BAD_PAYLOAD;
                    state = state << 16 | load16(at);
                    at += 2;
                }
                states[lane] = state;
            }
        }
        i += step;
    }
    if (at != end) return BAD_PAYLOAD;
    for (int lane = 0; lane < lanes; lane++)
        if (states[lane] != LOWEST_STATE) return BAD_PAYLOAD;
    return 0;
}
