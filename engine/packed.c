/* packed.c: matrices of an Amber GGUF, proved and used in place. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1 /* posix_madvise under -std=c11 */
#endif
#include "packed.h"
#include "dequant.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#define FORMAT    1
#define LAYOUT    "p16k4o128"
#define ALIGNMENT 64
#define SCORES    3

amber_status packed_check(const struct gguf_file *file, bool *packed, amber_error *err) {
    int64_t format = 0;
    int found = gguf_get_i64(file, "amber.format", 1, INT32_MAX, &format, err);
    *packed = found == 1;
    if (found < 0) return AMBER_ERR_FORMAT;
    if (!found) return AMBER_OK;
    if (format > FORMAT)
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "%s: Amber GGUF: expected format %d, found the newer format %" PRId64
                          " (update Amber, or run amber-quantize of this version)",
                          file->label, FORMAT, format);
    struct gguf_string layout = {"", 0};
    if (gguf_get_string(file, "amber.layout", &layout, err) < 0) return AMBER_ERR_FORMAT;
    if (layout.len != strlen(LAYOUT) || memcmp(layout.data, LAYOUT, layout.len) != 0)
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "%s: key amber.layout: expected \"" LAYOUT "\", found \"%.*s\" (run "
                          "amber-quantize of this version)",
                          file->label, (int)(layout.len > 40 ? 40 : layout.len), layout.data);
    return AMBER_OK;
}

/* Finds NAME.part of this type and shape, aligned for the kernels. */
static amber_status find_part(const struct gguf_file *file, const char *name, const char *part,
                              uint32_t type, uint64_t ne0, uint64_t ne1, const uint8_t **data,
                              amber_error *err) {
    char full[96];
    snprintf(full, sizeof full, "%s.%s", name, part);
    const struct gguf_tensor *t = gguf_find_tensor(file, full);
    if (!t)
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: tensor %s: expected in an Amber GGUF, not found (quantize it again)",
                          file->label, full);
    if (t->type != type || t->ne[0] != ne0 || t->ne[1] != ne1 || t->ne[2] != 1 || t->ne[3] != 1)
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: tensor %s: expected %s %" PRIu64 " x %" PRIu64 ", found %s %" PRIu64
                          " x %" PRIu64 " (quantize it again)",
                          file->label, full, type_info(type)->name, ne0, ne1,
                          type_info(t->type)->name, t->ne[0], t->ne[1]);
    if ((uintptr_t)t->data % ALIGNMENT)
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: tensor %s: expected an offset in steps of %d bytes, found steps of "
                          "%" PRIu32 " (quantize it again: another tool has rewritten the file)",
                          file->label, full, ALIGNMENT, file->alignment);
    *data = t->data;
    return AMBER_OK;
}

static amber_status check_floats(const struct gguf_file *file, const char *name, const char *part,
                                 const float *v, int n, bool zero, amber_error *err) {
    for (int i = 0; i < n; i++)
        if (!isfinite(v[i]) || v[i] < 0 || (v[i] == 0 && !zero))
            return amber_fail(
                err, AMBER_ERR_FORMAT,
                "%s: tensor %s.%s: expected finite values %s 0, found %g at %d (damaged "
                "file)",
                file->label, name, part, zero ? "from" : "above", (double)v[i], i);
    return AMBER_OK;
}

amber_status packed_matrix(const struct gguf_file *file, const char *name, int n_out, int n_in,
                           struct amber_w8 *w, amber_error *err) {
    int panels = (n_out + AMBER_PANEL - 1) / AMBER_PANEL;
    int k_pad = (int)amber_round_up(n_in, AMBER_K_ALIGN);
    const uint8_t *q = NULL, *scale = NULL;
    amber_status status = find_part(file, name, "weight", TYPE_I8, (uint64_t)k_pad * AMBER_PANEL,
                                    (uint64_t)panels, &q, err);
    if (status == AMBER_OK)
        status = find_part(file, name, "scale", TYPE_F32, (uint64_t)panels * AMBER_PANEL, 1, &scale,
                           err);
    if (status != AMBER_OK) return status;
    *w = (struct amber_w8){.q = q,
                           .scale = (const float *)(const void *)scale,
                           .n_out = n_out,
                           .n_in = n_in,
                           .k_pad = k_pad};
    return check_floats(file, name, "scale", w->scale, panels * AMBER_PANEL, true, err);
}

amber_status packed_score(const struct gguf_file *file, const char *name, int n_in,
                          enum criterion criterion, const float **f, amber_error *err) {
    const uint8_t *data = NULL;
    amber_status status =
        find_part(file, name, "score", TYPE_F32, (uint64_t)n_in, SCORES, &data, err);
    if (status != AMBER_OK) return status;
    *f = (const float *)(const void *)data + (int64_t)(criterion - CRITERION_NORM) * n_in;
    return check_floats(file, name, "score", *f, n_in, false, err);
}

void packed_rows(const struct amber_w8 *w, int first, int count, float *rows) {
    const uint8_t *panel = w->q + (int64_t)(first / AMBER_PANEL) * AMBER_PANEL * w->k_pad;
    for (int r = 0; r < count; r++) {
        const uint8_t *lane = panel + (first % AMBER_PANEL + r) * 4;
        float scale = w->scale[first + r], *row = rows + (int64_t)r * w->n_in;
        for (int k = 0; k < w->n_in; k++)
            row[k] = (float)(lane[(int64_t)(k / 4) * AMBER_PANEL * 4 + k % 4] - 128) * scale;
    }
}

void packed_read_ahead(const struct gguf_file *file) {
    /* A wish: failing costs only speed. */
    if (file->owns_map)
        (void)posix_madvise((void *)(uintptr_t)file->map, file->size, POSIX_MADV_WILLNEED);
}
