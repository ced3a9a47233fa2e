/* Feeds cases from a file to the coder in C, each from memory of exactly its length, so that a sanitiser sees any step
 * beyond it. A case: kind (0 decode, 1 encode and decode), lanes, number of symbols and of bytes (int32 each), 256
 * shares (uint16 each), the bytes.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int64_t ebbflow_rans_encode(const uint8_t *, int64_t, int32_t, const uint16_t *, uint8_t *, int64_t);
int32_t ebbflow_rans_decode(const uint8_t *, int64_t, int64_t, int32_t, const uint16_t *, uint8_t *);
void ebbflow_rans_count(const uint8_t *, int64_t, int64_t *);

static uint8_t *exactly(int64_t size) {
    uint8_t *memory = malloc(size > 0 ? (size_t)size : 1);
    if (!memory) abort();
    return memory;
}

int main(int argc, char **argv) {
    FILE *file = argc == 2 ? fopen(argv[1], "rb") : NULL;
    int32_t head[4];
    uint16_t shares[256];
    long cases = 0, refused = 0;
    if (!file) return 2;
    while (fread(head, sizeof head, 1, file) == 1) {
        int64_t symbols = head[2], size = head[3];
        if (fread(shares, sizeof shares, 1, file) != 1) return 2;
        uint8_t *bytes = exactly(size);
        if (size && fread(bytes, (size_t)size, 1, file) != 1) return 2;
        uint8_t *decoded = exactly(symbols);
        if (head[0] == 0) {
            refused += ebbflow_rans_decode(bytes, size, symbols, head[1], shares, decoded) != 0;
        } else {
            int64_t room = 4 * (int64_t)head[1] + 2 * symbols, counts[256] = {0};
            uint8_t *payload = exactly(room);
            ebbflow_rans_count(bytes, symbols, counts);
            int64_t coded = ebbflow_rans_encode(bytes, symbols, head[1], shares, payload, room);
            if (coded < 0) {
                refused++;
            } else if (ebbflow_rans_decode(payload, coded, symbols, head[1], shares, decoded) != 0 ||
                       memcmp(bytes, decoded, (size_t)symbols) != 0) {
                return 3;
            }
            free(payload);
        }
        free(decoded);
        free(bytes);
        cases++;
    }
    fclose(file);
    printf("%ld %ld\n", cases, refused);
    return 0;
}
