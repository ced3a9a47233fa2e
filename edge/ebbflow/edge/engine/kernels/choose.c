/* Which instruction set computes. Chosen once for the process; tests change it between steps. */
#include <string.h>

#include "kernels.h"

static const ebb_kernels *const known[] = { /* best first; the build says which it could compile */
#ifdef EBB_HAS_AVX512
    &ebb_avx512,
#endif
#ifdef EBB_HAS_AVXVNNI
    &ebb_avxvnni,
#endif
#ifdef EBB_HAS_AVX2
    &ebb_avx2,
#endif
#ifdef EBB_HAS_I8MM
    &ebb_i8mm,
#endif
#ifdef EBB_HAS_DOTPROD
    &ebb_dotprod,
#endif
    &ebb_portable,
};

static const ebb_kernels *chosen;

const ebb_kernels *ebb_kernels_in_use(void) {
    for (size_t i = 0; !chosen; i++)
        if (known[i]->usable()) chosen = known[i];
    return chosen;
}

int ebb_abi(void) { return EBB_ABI; }

const char *ebb_isa(void) { return ebb_kernels_in_use()->name; }

int ebb_use_isa(const char *name) {
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(known[i]->name, name) && known[i]->usable()) {
            chosen = known[i];
            return 0;
        }
    return -1;
}
