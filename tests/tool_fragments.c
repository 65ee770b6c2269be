/* tool_fragments.c: rows as the tensor cores read them, as a filter for test_cuda_fragments.py.
 *
 * Request on stdin: the line "FORM ROWS K HAS_F N_OUT" (FORM: dense, 2:4, 2:4+r32, 2:4+r16, 8:16x),
 * float32 f [K] where HAS_F is 1, float32 rows [ROWS, K], int8 weights [N_OUT, K_PAD]. On stdout: A, E,
 * float32 scale [ROWS], B, int32 products [ROWS, N_OUT]. */
#include "fragments.h"

#include <stdio.h>

int main(void) {
    static const char *const names[N_FORMS] = {"dense", "2:4", "2:4+r32", "2:4+r16", "8:16x"};
    char line[256], name[32];
    int rows, k, has_f, n_out, form = 0;
    if (!fgets(line, sizeof line, stdin)) return 3;
    if (sscanf(line, "%31s %d %d %d %d", name, &rows, &k, &has_f, &n_out) != 5) return 3;
    while (form < N_FORMS && strcmp(name, names[form]) != 0) form++;
    if (form == N_FORMS || rows < 1 || k < 1 || n_out < 1) return 3;

    struct fragments f;
    fragments_new(&f, form, rows, k);
    const size_t n = (size_t)n_out, wide = (size_t)k;
    float *factors = calloc(wide, 4), *z = calloc(wide * (size_t)rows, 4);
    int8_t *w = calloc(n, (size_t)f.k_pad);
    int32_t *acc = calloc(n * (size_t)rows, 4);
    if (!factors || !z || !w || !acc) return 3;
    if (has_f && fread(factors, 4, wide, stdin) != wide) return 3;
    if (fread(z, 4, wide * (size_t)rows, stdin) != wide * (size_t)rows) return 3;
    if (fread(w, (size_t)f.k_pad, n, stdin) != n) return 3;
    for (int row = 0; row < rows; row++)
        fragments_put_row(&f, row, z + (size_t)row * wide, has_f ? factors : NULL);
    uint8_t *b = fragments_of_weights(w, n_out, f.k_pad);
    bool legal = fragments_multiply(&f, b, n_out, acc);
    fwrite(f.a, 1, f.a_bytes, stdout);
    fwrite(f.e, 1, f.e_bytes, stdout);
    fwrite(f.scale, 4, (size_t)rows, stdout);
    fwrite(b, 1, frag_b_bytes(n_out, f.k_pad), stdout);
    fwrite(acc, 4, n * (size_t)rows, stdout);
    free(b);
    free(acc);
    free(w);
    free(z);
    free(factors);
    fragments_free(&f);
    return !legal || fflush(stdout) != 0;
}
