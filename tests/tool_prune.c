/* tool_prune.c: the selection of survivors as a filter, for test_sparse_masks.py.
 *
 *   tool_prune columns     the columns that run on this machine, a line each
 *   tool_prune             a request on stdin, pruned rows on stdout
 *
 * A request is the line "PATTERN COLUMN CHANNELS ROWS HAS_F", then float32 f [channels] where HAS_F
 * is 1, then rows [rows, channels]. Two-token patterns pair rows 2i and 2i + 1; a last lone row
 * stays alone. Exit code 2 and a line on stderr: the pattern was refused. */
#include "sparse.h"
#include "cpu/cpuid.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static amber_prune_fn find_column(const char *name) {
    if (!strcmp(name, "ref")) return amber_prune_ref;
#if defined(__x86_64__)
    struct amber_cpu cpu = amber_cpu_detect();
    if (cpu.avx2 && !strcmp(name, "avx2")) return amber_prune_avx2;
    if (cpu.avx512vnni && !strcmp(name, "avx512vnni")) return amber_prune_avx512vnni;
#endif
    return NULL;
}

int main(int argc, char **argv) {
    static const char *const names[] = {"ref", "avx2", "avx512vnni"};
    if (argc == 2 && !strcmp(argv[1], "columns")) {
        for (int i = 0; i < 3; i++)
            if (find_column(names[i])) puts(names[i]);
        return 0;
    }
    char line[256], text[64], column[32], why[160];
    int n, rows, has_f;
    if (!fgets(line, sizeof line, stdin)) return 3;
    if (sscanf(line, "%63s %31s %d %d %d", text, column, &n, &rows, &has_f) != 5) return 3;
    struct amber_pattern p;
    if (!amber_pattern_parse(text, strlen(text), &p, why, sizeof why)) {
        fprintf(stderr, "%s\n", why);
        return 2;
    }
    amber_prune_fn prune = find_column(column);
    if (!prune || n < 0 || rows < 0) return 3;

    size_t size = (size_t)n * (size_t)rows * sizeof(float), f_size = (size_t)n * sizeof(float);
    float *z = malloc(size + 1), *f = malloc(f_size + 1);
    void *scratch = aligned_alloc(64, (amber_prune_scratch(n) + 64) / 64 * 64);
    if (!z || !f || !scratch) return 3;
    if (has_f && fread(f, 1, f_size, stdin) != f_size) return 3;
    if (fread(z, 1, size, stdin) != size) return 3;
    const int step = p.kind == AMBER_PATTERN_GROUP ? p.tokens : 1;
    for (int row = 0; row < rows; row += step)
        prune(&p, z + (size_t)row * (size_t)n, n, rows - row < step ? 1 : step, has_f ? f : NULL, n,
              scratch);
    fwrite(z, 1, size, stdout);
    free(scratch);
    free(f);
    free(z);
    return fflush(stdout) != 0;
}
