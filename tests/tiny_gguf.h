/* tiny_gguf.h: writes a small random model as a GGUF v3 file, for tests that need a whole engine.
 */
#ifndef AMBER_TINY_GGUF_H
#define AMBER_TINY_GGUF_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct tiny {
    FILE *f;
    uint64_t rng;
    uint64_t offset; /* of the next tensor's data */
    struct {
        int rows, cols;
    } tensors[64];
    int n_tensors;
};

static inline void tiny_put(struct tiny *t, const void *p, size_t n) {
    fwrite(p, 1, n, t->f);
}
static inline void tiny_u32(struct tiny *t, uint32_t v) {
    tiny_put(t, &v, 4);
}
static inline void tiny_u64(struct tiny *t, uint64_t v) {
    tiny_put(t, &v, 8);
}
static inline void tiny_str(struct tiny *t, const char *s) {
    tiny_u64(t, strlen(s));
    tiny_put(t, s, strlen(s));
}
static inline void tiny_kv_u32(struct tiny *t, const char *key, uint32_t v) {
    tiny_str(t, key);
    tiny_u32(t, 4);
    tiny_u32(t, v);
}
static inline void tiny_kv_f32(struct tiny *t, const char *key, float v) {
    tiny_str(t, key);
    tiny_u32(t, 6);
    tiny_put(t, &v, 4);
}
static inline void tiny_kv_str(struct tiny *t, const char *key, const char *v) {
    tiny_str(t, key);
    tiny_u32(t, 8);
    tiny_str(t, v);
}
static inline void tiny_array(struct tiny *t, const char *key, uint32_t type, uint64_t n) {
    tiny_str(t, key);
    tiny_u32(t, 9);
    tiny_u32(t, type);
    tiny_u64(t, n);
}

/* Uniform in [-1, 1): a 64-bit linear congruential generator (Knuth's MMIX constants). */
static inline float tiny_random(struct tiny *t) {
    t->rng = t->rng * 6364136223846793005ull + 1442695040888963407ull;
    return (float)((double)(t->rng >> 11) / (double)(1ull << 52) - 1.0);
}

static inline void tiny_tensor(struct tiny *t, const char *name, int rows, int cols) {
    tiny_str(t, name);
    tiny_u32(t, rows ? 2 : 1);
    tiny_u64(t, (uint64_t)cols);
    if (rows) tiny_u64(t, (uint64_t)rows);
    tiny_u32(t, 0); /* F32 */
    tiny_u64(t, t->offset);
    uint64_t bytes = 4ull * (uint64_t)cols * (uint64_t)(rows ? rows : 1);
    t->offset += (bytes + 31) / 32 * 32;
    t->tensors[t->n_tensors].rows = rows;
    t->tensors[t->n_tensors++].cols = cols;
}

enum {
    TINY_VOCAB = 300,
    TINY_EMBD = 48,
    TINY_HEADS = 6,
    TINY_KV = 2,
    TINY_FF = 88,
    TINY_LAYERS = 3
};

/* Returns 0 on success. Vocabulary: <unk> <s> </s>, 256 bytes, letters. */
static inline int tiny_write(const char *path, uint64_t seed) {
    struct tiny t = {.f = fopen(path, "wb"), .rng = seed};
    if (!t.f) return -1;
    tiny_put(&t, "GGUF", 4);
    tiny_u32(&t, 3);
    tiny_u64(&t, 3 + 9 * TINY_LAYERS);
    tiny_u64(&t, 15);
    tiny_kv_str(&t, "general.architecture", "llama");
    tiny_kv_str(&t, "general.name", "tiny");
    tiny_kv_u32(&t, "llama.block_count", TINY_LAYERS);
    tiny_kv_u32(&t, "llama.context_length", 256);
    tiny_kv_u32(&t, "llama.embedding_length", TINY_EMBD);
    tiny_kv_u32(&t, "llama.feed_forward_length", TINY_FF);
    tiny_kv_u32(&t, "llama.attention.head_count", TINY_HEADS);
    tiny_kv_u32(&t, "llama.attention.head_count_kv", TINY_KV);
    tiny_kv_f32(&t, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    tiny_kv_str(&t, "tokenizer.ggml.model", "llama");
    tiny_array(&t, "tokenizer.ggml.tokens", 8, TINY_VOCAB);
    char text[8];
    for (int i = 0; i < TINY_VOCAB; i++) {
        if (i < 3)
            snprintf(text, sizeof text, "%s", i == 0 ? "<unk>" : i == 1 ? "<s>" : "</s>");
        else if (i < 259)
            snprintf(text, sizeof text, "<0x%02X>", i - 3);
        else
            snprintf(text, sizeof text, "%c%c", 'a' + (i - 259) % 26, i < 285 ? 0 : 'z');
        tiny_str(&t, text);
    }
    tiny_array(&t, "tokenizer.ggml.scores", 6, TINY_VOCAB);
    for (int i = 0; i < TINY_VOCAB; i++) {
        float score = (float)-i;
        tiny_put(&t, &score, 4);
    }
    tiny_array(&t, "tokenizer.ggml.token_type", 5, TINY_VOCAB);
    for (int i = 0; i < TINY_VOCAB; i++) tiny_u32(&t, i == 0 ? 2 : i < 3 ? 3 : i < 259 ? 6 : 1);
    tiny_kv_u32(&t, "tokenizer.ggml.bos_token_id", 1);
    tiny_kv_u32(&t, "tokenizer.ggml.eos_token_id", 2);

    const int head = TINY_EMBD / TINY_HEADS;
    const struct {
        const char *name;
        int rows, cols;
    } layer[] = {{"attn_norm", 0, TINY_EMBD},           {"attn_q", TINY_EMBD, TINY_EMBD},
                 {"attn_k", TINY_KV * head, TINY_EMBD}, {"attn_v", TINY_KV * head, TINY_EMBD},
                 {"attn_output", TINY_EMBD, TINY_EMBD}, {"ffn_norm", 0, TINY_EMBD},
                 {"ffn_gate", TINY_FF, TINY_EMBD},      {"ffn_up", TINY_FF, TINY_EMBD},
                 {"ffn_down", TINY_EMBD, TINY_FF}};
    tiny_tensor(&t, "token_embd.weight", TINY_VOCAB, TINY_EMBD);
    tiny_tensor(&t, "output_norm.weight", 0, TINY_EMBD);
    tiny_tensor(&t, "output.weight", TINY_VOCAB, TINY_EMBD);
    for (int il = 0; il < TINY_LAYERS; il++) {
        for (size_t i = 0; i < sizeof layer / sizeof layer[0]; i++) {
            char name[64];
            snprintf(name, sizeof name, "blk.%d.%s.weight", il, layer[i].name);
            tiny_tensor(&t, name, layer[i].rows, layer[i].cols);
        }
    }
    while (ftell(t.f) % 32) tiny_put(&t, "", 1);
    for (int i = 0; i < t.n_tensors; i++) {
        int n = t.tensors[i].cols * (t.tensors[i].rows ? t.tensors[i].rows : 1);
        for (int j = 0; j < n; j++) {
            float v = t.tensors[i].rows ? 0.3f * tiny_random(&t) : 1.0f + 0.1f * tiny_random(&t);
            tiny_put(&t, &v, 4);
        }
        while (ftell(t.f) % 32) tiny_put(&t, "", 1);
    }
    return fclose(t.f);
}

#endif
