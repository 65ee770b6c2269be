/* fuzz_gguf.c: any bytes as a GGUF file, read through every function, and as a tokenizer behind it.
 *
 * With libFuzzer:
 *   CC=clang cmake -S . -B build/fuzz -DAMBER_FUZZ=ON \
 *       -DAMBER_SANITIZE=fuzzer-no-link,address,undefined && cmake --build build/fuzz -t fuzz_gguf
 *   python tests/make_fuzz_seeds.py seeds && mkdir -p corpus
 *   build/fuzz/fuzz_gguf -max_len=16384 -max_total_time=600 corpus seeds
 * Without it a program that runs the files it is given, or standard input. */
#include "gguf_walk.h"
#include "tokenizer.h"

#include <stdio.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile uint64_t sink; /* keeps the compiler from dropping the reads */

static void use_tokenizer(const amber_tokenizer *tok, const uint8_t *data, size_t size) {
    int32_t ids[256], length, n_tokens = amber_tokenizer_size(tok);
    char text[1024];
    amber_error err;
    for (int32_t i = -1; i <= n_tokens && i < 2000; i++) {
        const char *s = amber_token_text(tok, i, &length);
        if ((s != NULL) != (i >= 0 && i < n_tokens)) abort();
        if (s) sink += walk_bytes(s, (uint64_t)length) + (uint64_t)amber_token_find(tok, s, length);
        sink += (uint64_t)amber_token_flags(tok, i);
    }
    /* The ends of the input: header bytes, and text of the vocabulary or tensor data. */
    for (int part = 0; part < 2; part++) {
        size_t n = size < 100 ? size : 100;
        const char *from = (const char *)(part ? data + size - n : data);
        int32_t count = amber_tokenize(tok, from, (int32_t)n, part, 1 - part, ids, 256, &err);
        if (count < 0) continue;
        if (count > 256) count = 256;
        for (int32_t i = 0; i < count; i++) {
            if (ids[i] < 0 || ids[i] >= n_tokens) abort();
        }
        length = amber_detokenize(tok, ids, count, part, text, sizeof text, &err);
        if (length > 0) sink += walk_bytes(text, (uint64_t)amber_min(length, (int)sizeof text));
        amber_text_stream *stream = amber_text_stream_new(tok, part, 0);
        for (int32_t i = 0; stream && i < count; i++) {
            const char *piece = amber_text_stream_push(stream, ids[i], &length);
            if (piece) sink += walk_bytes(piece, (uint64_t)length);
        }
        const char *rest = stream ? amber_text_stream_finish(stream, &length) : NULL;
        if (rest) sink += walk_bytes(rest, (uint64_t)length);
        amber_text_stream_free(stream);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct gguf_file *file;
    amber_tokenizer *tok = NULL;
    amber_error err;
    memset(&err, 'x', sizeof err);
    if (gguf_parse(data, size, "fuzz.gguf", &file, &err) != AMBER_OK) {
        if (!memchr(err.msg, 0, sizeof err.msg) || strncmp(err.msg, "fuzz.gguf: ", 11)) abort();
        return 0;
    }
    sink += walk_file(file);
    amber_status status = tok_new(file, &tok, &err);
    gguf_close(file);
    if (status != AMBER_OK) {
        if (tok || !memchr(err.msg, 0, sizeof err.msg)) abort();
        return 0;
    }
    use_tokenizer(tok, data, size);
    amber_tokenizer_close(tok);
    return 0;
}

#ifndef AMBER_LIBFUZZER
static int run(FILE *f) {
    size_t size = 0, room = 1 << 20, n;
    uint8_t *data = malloc(room);
    while (data && (n = fread(data + size, 1, room - size, f)) > 0) {
        size += n;
        if (size < room) continue;
        uint8_t *grown = realloc(data, room *= 2);
        if (!grown) free(data);
        data = grown;
    }
    if (!data) return 1;
    uint8_t *exact = realloc(data, size ? size : 1);
    LLVMFuzzerTestOneInput(exact, size);
    free(exact);
    return 0;
}

int main(int argc, char **argv) {
    if (argc < 2) return run(stdin);
    int failed = 0;
    for (int i = 1; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        failed |= !f || run(f);
        if (f) fclose(f);
    }
    return failed;
}
#endif
