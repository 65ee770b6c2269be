/* tool_dequant.c: the dequantizers as a filter, for test_dequant.py.
 *
 *   tool_dequant types          the type table, a line each: number name values bytes readable
 *   tool_dequant N              blocks of type N on stdin, float32 on stdout
 *   tool_dequant to-f16         float32 on stdin, halves on stdout
 *
 * The input is read to an odd address, since blocks of a file may have any alignment, and lies at
 * the end of its buffer, where an address checker sees a read beyond it. */
#include "dequant.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint8_t *read_all(size_t *size) {
    uint8_t *data = NULL, chunk[65536];
    size_t n;
    *size = 0;
    while ((n = fread(chunk, 1, sizeof chunk, stdin)) > 0) {
        uint8_t *grown = realloc(data, 1 + *size + n);
        if (!grown) exit(2);
        data = grown;
        memcpy(data + 1 + *size, chunk, n);
        *size += n;
    }
    return data;
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    if (!strcmp(argv[1], "types")) {
        for (uint32_t i = 0; i < 1000; i++) {
            const struct type_info *info = type_info(i);
            if (!info) continue;
            printf("%u %s %u %u %d\n", info->type, info->name, info->block_values,
                   info->block_bytes, info->to_float != NULL);
        }
        return 0;
    }
    size_t size;
    uint8_t *buffer = read_all(&size);
    const uint8_t *data = buffer + 1;
    if (!buffer) return 2;
    if (!strcmp(argv[1], "to-f16")) {
        for (size_t i = 0; i < size / 4; i++) {
            float f;
            memcpy(&f, data + 4 * i, 4);
            uint16_t h = f16_from_f32(f);
            fwrite(&h, 2, 1, stdout);
        }
    } else {
        const struct type_info *info = type_info((uint32_t)strtoul(argv[1], NULL, 10));
        if (!info || !info->to_float || size % info->block_bytes) return 2;
        size_t n = size / info->block_bytes * info->block_values;
        float *out = malloc(n * sizeof *out);
        if (!out) return 2;
        info->to_float(data, out, (int64_t)n);
        fwrite(out, sizeof *out, n, stdout);
        free(out);
    }
    free(buffer);
    return fflush(stdout) != 0;
}
