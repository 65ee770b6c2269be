/* tool_pretok.c: what the pre-tokenizers do, for comparison with a real regular expression engine.
 *
 *   tool_pretok NAME < texts > lines   texts: 32-bit little-endian length and bytes, repeated;
 *                                      lines: the byte lengths of each text's pieces
 *   tool_pretok --flags > flags        a 16-bit little-endian uni_property set per code point
 *   tool_pretok --version              the tables' Unicode version */
#include "tok_internal.h"
#include "unicode.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void print_piece(void *user, const char *text, size_t n) {
    (void)user;
    (void)text;
    printf("%zu ", n);
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    if (strcmp(argv[1], "--version") == 0) return puts(uni_version) < 0;
    if (strcmp(argv[1], "--flags") == 0) {
        for (uint32_t cp = 0; cp < 0x110000; cp++) {
            unsigned f = uni_flags(cp);
            putchar((int)(f & 0xFF));
            putchar((int)(f >> 8));
        }
        return 0;
    }
    const struct tok_pretokenizer *pre = tok_pre_find(argv[1], strlen(argv[1]));
    if (!pre) return 3;
    unsigned char head[4];
    while (fread(head, 1, 4, stdin) == 4) {
        size_t n = head[0] | (size_t)head[1] << 8 | (size_t)head[2] << 16 | (size_t)head[3] << 24;
        char *text = malloc(n + 1); /* of this very size, so that a sanitizer sees overruns */
        if (!text || fread(text, 1, n, stdin) != n) return 4;
        tok_pre_split(pre, text, n, print_piece, NULL);
        putchar('\n');
        free(text);
    }
    return 0;
}
