/* session_file.c: a session as a file: its tokens, and what it would cost to compute them again.
 *
 *     struct head
 *     int32   tokens [n_tokens]
 *     float   logits [n_vocab]              where has_logits says so
 *     for every layer: keys, then values
 *             cells [n_head_kv, positions, head_dim], float16, float32 or INT8
 *     float   scales [n_head_kv, positions] behind INT8 cells
 *
 * Positions are 0..n_tokens-1; of windowed layers oldest..n_tokens-1, what their ring still held.
 * Numbers are in the machine's own byte order, and a machine with another one does not know the magic
 * number. A file serves the model, the type of cells and the sparsity plan that it was made with alone:
 * keys and values of another plan are those of another prompt. */
#include "ops.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAGIC   0x3153534552424d41u /* "AMBRESS1", little-endian */
#define VERSION 1
#define BLOCK   ((size_t)1 << 20)

struct head {
    uint64_t magic;
    uint32_t version, cell_bytes;
    uint64_t file_bytes, sum; /* of the whole file; hash of all that follows the head */
    uint64_t model, plan;
    int32_t n_tokens, oldest, n_vocab, n_layer, n_head_kv, head_dim, window;
    int32_t long_rope; /* positions turn by the frequencies for long contexts */
    int32_t has_logits, zero;
    char model_label[96], plan_text[96]; /* for messages */
};

/* What tells models apart: their keys, and of every tensor its head and tail. The plan is told apart
 * by its own hash. */
static uint64_t model_hash(const struct gguf_file *file) {
    static const char plan_keys[] = "amber.plan";
    uint64_t hash = AMBER_HASH_START;
    for (uint64_t i = 0; i < file->n_kv; i++) {
        const struct gguf_kv *kv = &file->kv[i];
        if (kv->key.len >= sizeof plan_keys - 1 &&
            memcmp(kv->key.data, plan_keys, sizeof plan_keys - 1) == 0)
            continue;
        hash = amber_hash(hash, kv->key.data, kv->key.len);
        hash = amber_hash(hash, kv->data, kv->size);
    }
    for (uint64_t i = 0; i < file->n_tensors; i++) {
        const struct gguf_tensor *t = &file->tensors[i];
        const size_t part = t->size < 64 ? t->size : 64;
        hash = amber_hash(hash, t->name.data, t->name.len);
        hash = amber_hash(hash, t->ne, sizeof t->ne);
        hash = amber_hash(hash, &t->type, sizeof t->type);
        hash = amber_hash(hash, t->data, part);
        hash = amber_hash(hash, t->data + t->size - part, part);
    }
    return hash;
}

/* What a file of this session says of it. */
static struct head make_head(const struct amber_session *session) {
    const struct batch *b = &session->batch;
    const struct shape *s = &b->model->shape;
    struct head h = {.magic = MAGIC,
                     .version = VERSION,
                     .cell_bytes = (uint32_t)amber_cell_bytes(b->cells),
                     .model = model_hash(b->model->file),
                     .plan = b->model->plan.hash,
                     .n_tokens = session->n_past,
                     .n_vocab = s->n_vocab,
                     .n_layer = s->n_layer,
                     .n_head_kv = s->n_head_kv,
                     .head_dim = s->head_dim,
                     .window = s->window,
                     .long_rope = b->rope_freq[0] != s->rope_freq,
                     .has_logits = session->has_logits};
    if (s->window) h.oldest = amber_max(0, session->n_written - b->window_ctx);
    snprintf(h.model_label, sizeof h.model_label, "%s", b->model->file->label);
    plan_describe(&b->model->plan, h.plan_text, sizeof h.plan_text);
    return h;
}

static int first_stored(const struct head *h, const struct shape *s, int il) {
    return layer_window(s, il) ? amber_min(h->oldest, h->n_tokens) : 0;
}

/* Every run of cells of a session, in the order of the file. Calls `each` with its place in the cache
 * and its bytes; stops at the first false. */
typedef bool (*cells_fn)(void *user, uint8_t *cells, size_t bytes);

/* Of rows [n_head_kv, positions] of so many bytes. */
static bool each_row(const struct batch *b, const struct head *h, int il, uint8_t *rows,
                     int64_t bytes, cells_fn each, void *user) {
    const struct shape *s = &b->model->shape;
    const int positions = layer_positions(b, s, il);
    /* A shorter ring takes the last positions alone; the others are passed over (NULL). */
    const int first = first_stored(h, s, il), held = amber_max(first, h->n_tokens - positions);
    for (int head = 0; head < s->n_head_kv; head++, rows += positions * bytes) {
        if (!each(user, NULL, (size_t)((held - first) * bytes))) return false;
        for (int pos = held; pos < h->n_tokens;) { /* up to the ring's end, and from its start */
            const int at = pos % positions, n = amber_min(positions - at, h->n_tokens - pos);
            if (!each(user, rows + at * bytes, (size_t)(n * bytes))) return false;
            pos += n;
        }
    }
    return true;
}

static bool each_run(const struct batch *b, const struct head *h, cells_fn each, void *user) {
    const struct shape *s = &b->model->shape;
    for (int il = 0; il < s->n_layer; il++) {
        for (int part = 0; part < 2; part++) {
            float *scales = kv_scales(b, il, part);
            if (!each_row(b, h, il, kv_layer(b, il, part), (int64_t)h->cell_bytes * s->head_dim,
                          each, user))
                return false;
            if (scales && !each_row(b, h, il, (uint8_t *)scales, sizeof *scales, each, user))
                return false;
        }
    }
    return true;
}

static size_t file_bytes(const struct head *h, const struct shape *s) {
    size_t bytes = sizeof *h + sizeof(int32_t) * (size_t)h->n_tokens;
    if (h->has_logits) bytes += sizeof(float) * (size_t)h->n_vocab;
    const size_t scale = h->cell_bytes == 1 ? sizeof(float) : 0; /* of INT8 cells */
    const size_t row = (size_t)h->cell_bytes * (size_t)h->head_dim + scale;
    const size_t position = 2 * (size_t)h->n_head_kv * row;
    for (int il = 0; il < h->n_layer; il++)
        bytes += position * (size_t)(h->n_tokens - first_stored(h, s, il));
    return bytes;
}

/* ---- saving ---- */

/* Bytes go out in blocks of whole words, so that their hash is that of all of them at once. */
struct writer {
    struct batch *batch;
    FILE *file;
    uint8_t *block; /* [BLOCK] */
    size_t filled;
    uint64_t sum;
    bool failed, device_failed;
};

static void flush(struct writer *w) {
    w->sum = amber_hash(w->sum, w->block, w->filled);
    w->failed |= fwrite(w->block, 1, w->filled, w->file) != w->filled;
    w->filled = 0;
}

static void put(struct writer *w, const void *data, size_t bytes) {
    const uint8_t *at = data;
    while (bytes > 0) {
        const size_t n = bytes < BLOCK - w->filled ? bytes : BLOCK - w->filled;
        memcpy(w->block + w->filled, at, n);
        w->filled += n;
        at += n;
        bytes -= n;
        if (w->filled == BLOCK) flush(w);
    }
}

static bool put_cells(void *user, uint8_t *cells, size_t bytes) {
    struct writer *w = user;
    while (cells && bytes > 0 && !w->failed) {
        const size_t n = bytes < BLOCK - w->filled ? bytes : BLOCK - w->filled;
        w->device_failed = !w->batch->op->read_cells(w->batch, w->block + w->filled, cells, n);
        w->failed |= w->device_failed;
        w->filled += n;
        cells += n;
        bytes -= n;
        if (w->filled == BLOCK) flush(w);
    }
    return !w->failed;
}

static bool write_session(struct amber_session *session, FILE *file, uint8_t *block,
                          bool *device_failed) {
    struct head h = make_head(session);
    struct writer w = {
        .batch = &session->batch, .file = file, .block = block, .sum = AMBER_HASH_START};
    h.file_bytes = file_bytes(&h, &session->batch.model->shape);
    w.failed = fwrite(&h, sizeof h, 1, file) != 1;
    put(&w, session->tokens, sizeof *session->tokens * (size_t)h.n_tokens);
    if (h.has_logits) put(&w, session->logits, sizeof *session->logits * (size_t)h.n_vocab);
    pthread_mutex_lock(&session->engine->lock);
    each_run(&session->batch, &h, put_cells, &w);
    pthread_mutex_unlock(&session->engine->lock);
    flush(&w);
    *device_failed = w.device_failed;
    h.sum = w.sum;
    return !w.failed && fseek(file, 0, SEEK_SET) == 0 && fwrite(&h, sizeof h, 1, file) == 1;
}

/* Writes `part` and puts it in the place of `path`: who stops half-way has lost nothing. */
static amber_status save_beside(struct amber_session *session, const char *path, const char *part,
                                uint8_t *block, amber_error *err) {
    bool device_failed = false;
    /* What was said is nobody else's to read. */
    const int fd = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    FILE *file = fd >= 0 ? fdopen(fd, "wb") : NULL;
    bool ok = file && write_session(session, file, block, &device_failed);
    if (file)
        ok &= fclose(file) == 0;
    else if (fd >= 0)
        close(fd);
    ok = ok && rename(part, path) == 0;
    if (ok) return AMBER_OK;
    if (device_failed) {
        unlink(part);
        return amber_fail(err, AMBER_ERR_DEVICE, "%s: %s", amber_basename(path),
                          session->batch.why);
    }
    amber_status status = amber_fail(err, AMBER_ERR_IO, "%s: cannot write the session: %s",
                                     amber_basename(path), strerror(errno));
    if (fd >= 0) unlink(part);
    return status;
}

amber_status amber_session_save(amber_session *session, const char *path, amber_error *err) {
    const size_t length = strlen(path) + sizeof ".part";
    char *part = malloc(length);
    uint8_t *block = malloc(BLOCK);
    amber_status status;
    if (part && block) {
        snprintf(part, length, "%s.part", path);
        status = save_beside(session, path, part, block, err);
    } else {
        status = amber_fail(err, AMBER_ERR_MEMORY, "%s: no memory", amber_basename(path));
    }
    free(part);
    free(block);
    return status;
}

/* ---- loading ---- */

struct mapping {
    const uint8_t *data;
    size_t bytes;
};

static amber_status map_file(const char *path, struct mapping *map, amber_error *err) {
    const char *name = amber_basename(path);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat info;
    if (fd < 0 || fstat(fd, &info) != 0) {
        amber_status status =
            amber_fail(err, AMBER_ERR_IO, "%s: cannot open: %s", name, strerror(errno));
        if (fd >= 0) close(fd);
        return status;
    }
    *map = (struct mapping){NULL, (size_t)info.st_size};
    void *data = MAP_FAILED;
    if (S_ISREG(info.st_mode) && map->bytes >= sizeof(struct head))
        data = mmap(NULL, map->bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (data == MAP_FAILED)
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: expected an Amber session file, found %zu bytes", name, map->bytes);
    map->data = data;
    return AMBER_OK;
}

/* What a user chose that made the cells what they are. */
static const char *cells_text(const struct head *h) {
    return h->cell_bytes == 4   ? "precision float"
           : h->cell_bytes == 1 ? "precision int8 with kv_type int8"
                                : "precision int8 with kv_type f16";
}

/* Whether the file's head fits the session; `ours` is what the session would say. */
static amber_status check_head(const struct amber_session *session, const char *name,
                               const struct head *h, const struct head *ours, size_t bytes,
                               amber_error *err) {
    if (h->magic != MAGIC)
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: expected an Amber session file, found another", name);
    if (h->version != VERSION)
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "%s: expected session format %d, found %u (another version of Amber)",
                          name, VERSION, h->version);
    if (h->model != ours->model)
        return amber_fail(err, AMBER_ERR_ARGUMENT,
                          "%s: expected a session of this model, %s, found one of %s%.90s (name "
                          "another session file)",
                          name, ours->model_label,
                          strncmp(h->model_label, ours->model_label, 90) ? "" : "another ",
                          h->model_label);
    if (h->cell_bytes != ours->cell_bytes)
        return amber_fail(err, AMBER_ERR_ARGUMENT, "%s: expected a session of %s, found one of %s",
                          name, cells_text(ours), cells_text(h));
    if (h->plan != ours->plan)
        return amber_fail(err, AMBER_ERR_ARGUMENT,
                          "%s: expected a session under this engine's sparsity plan (%s), found "
                          "another (%.90s): its keys and values would not be this plan's",
                          name, ours->plan_text, h->plan_text);
    if (h->n_tokens < 0 || h->oldest < 0 || h->oldest > 1 << 28 || h->n_vocab != ours->n_vocab ||
        h->n_layer != ours->n_layer || h->n_head_kv != ours->n_head_kv ||
        h->head_dim != ours->head_dim || h->window != ours->window ||
        (h->has_logits != 0 && h->has_logits != 1) || (!h->window && h->oldest))
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: the head does not fit its model (damaged file)", name);
    if (h->n_tokens > session->batch.n_ctx)
        return amber_fail(err, AMBER_ERR_CONTEXT,
                          "%s: the session has %d tokens, context is %d (use a larger context)",
                          name, h->n_tokens, session->batch.n_ctx);
    if (h->long_rope != ours->long_rope)
        return amber_fail(err, AMBER_ERR_ARGUMENT,
                          "%s: expected a session of a %s context, found one of a %s context (this "
                          "model turns positions another way beyond %d tokens)",
                          name, ours->long_rope ? "long" : "short", h->long_rope ? "long" : "short",
                          session->batch.model->shape.n_ctx_orig);
    const size_t expected = file_bytes(h, &session->batch.model->shape);
    if (h->file_bytes != expected || bytes != expected)
        return amber_fail(err, AMBER_ERR_FORMAT, "%s: expected %zu bytes, found %zu (%s)", name,
                          expected, bytes, bytes < expected ? "cut short" : "damaged file");
    return AMBER_OK;
}

struct reader {
    struct batch *batch;
    const uint8_t *at;
};

static bool get_cells(void *user, uint8_t *cells, size_t bytes) {
    struct reader *r = user;
    const uint8_t *from = r->at;
    r->at += bytes;
    return !cells || r->batch->op->write_cells(r->batch, cells, from, bytes);
}

static amber_status check_body(const struct head *h, const char *name, const uint8_t *body,
                               amber_error *err) {
    if (amber_hash(AMBER_HASH_START, body, h->file_bytes - sizeof *h) != h->sum)
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: its bytes do not have their hash (damaged file)", name);
    for (int i = 0; i < h->n_tokens; i++) {
        int32_t token;
        memcpy(&token, body + sizeof token * (size_t)i, sizeof token);
        if (token < 0 || token >= h->n_vocab)
            return amber_fail(err, AMBER_ERR_FORMAT, "%s: token %d: expected 0..%d, found %d", name,
                              i, h->n_vocab - 1, token);
    }
    return AMBER_OK;
}

static amber_status take_body(struct amber_session *session, const struct head *h, const char *name,
                              const uint8_t *at, amber_error *err) {
    struct batch *b = &session->batch;
    memcpy(session->tokens, at, sizeof *session->tokens * (size_t)h->n_tokens);
    at += sizeof *session->tokens * (size_t)h->n_tokens;
    if (h->has_logits) {
        memcpy(session->logits, at, sizeof *session->logits * (size_t)h->n_vocab);
        at += sizeof *session->logits * (size_t)h->n_vocab;
    }
    pthread_mutex_lock(&session->engine->lock);
    const bool ok = each_run(b, h, get_cells, &(struct reader){b, at});
    pthread_mutex_unlock(&session->engine->lock);
    session->n_past = ok ? h->n_tokens : 0;
    session->has_logits = ok && h->has_logits;
    /* As if this ring had lost what the file's had. */
    session->n_written = session->n_past;
    if (ok && h->oldest > 0)
        session->n_written = amber_max(session->n_written, h->oldest + b->window_ctx);
    return ok ? AMBER_OK : amber_fail(err, AMBER_ERR_DEVICE, "%s: %s", name, b->why);
}

amber_status amber_session_load(amber_session *session, const char *path, amber_error *err) {
    struct mapping map = {NULL, 0};
    amber_status status = map_file(path, &map, err);
    if (status != AMBER_OK) return status;
    const char *name = amber_basename(path);
    const struct head ours = make_head(session);
    struct head h;
    memcpy(&h, map.data, sizeof h);
    h.model_label[sizeof h.model_label - 1] = h.plan_text[sizeof h.plan_text - 1] = 0;
    const uint8_t *body = map.data + sizeof h;
    status = check_head(session, name, &h, &ours, map.bytes, err);
    if (status == AMBER_OK) status = check_body(&h, name, body, err);
    if (status == AMBER_OK) status = take_body(session, &h, name, body, err);
    munmap((void *)(uintptr_t)map.data, map.bytes);
    return status;
}
