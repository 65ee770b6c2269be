/* arch.c: the table of architectures, and a model's shape from the keys of its file. */
#include "model.h"
#include "dequant.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct arch architectures[] = {
    {.name = "llama", .rope_halves = false, .sliding_window = true},
    {.name = "qwen2", .rope_halves = true},
};

#define N_ARCHITECTURES (sizeof architectures / sizeof architectures[0])

const char *arch_list(void) {
    return "llama qwen2";
}

/* Integer key "<arch>.<name>"; per-layer arrays serve where all their elements agree. */
static int get_int(const struct gguf_file *file, const char *arch, const char *name, int min,
                   int max, int *out, amber_error *err) {
    char key[128];
    snprintf(key, sizeof key, "%s.%s", arch, name);
    const struct gguf_kv *kv = gguf_find(file, key);
    int64_t value;
    if (kv && kv->type == GGUF_ARRAY && kv->elem_type != GGUF_STRING && kv->count > 0) {
        value = gguf_array_i64(kv, 0);
        for (uint64_t i = 1; i < kv->count; i++) {
            if (gguf_array_i64(kv, i) == value) continue;
            amber_fail(err, AMBER_ERR_UNSUPPORTED,
                       "%s: %s differs between layers; this version needs one value for all",
                       file->label, key);
            return -1;
        }
        if (value < min || value > max) {
            amber_fail(err, AMBER_ERR_FORMAT, "%s: %s: expected %d..%d, found %lld", file->label,
                       key, min, max, (long long)value);
            return -1;
        }
    } else {
        int found = gguf_get_i64(file, key, min, max, &value, err);
        if (found <= 0) return found;
    }
    *out = (int)value;
    return 1;
}

static int get_float(const struct gguf_file *file, const char *arch, const char *name, double *out,
                     amber_error *err) {
    char key[128];
    snprintf(key, sizeof key, "%s.%s", arch, name);
    int found = gguf_get_f64(file, key, out, err);
    if (found > 0 && !isfinite(*out)) {
        amber_fail(err, AMBER_ERR_FORMAT, "%s: %s: expected a finite number", file->label, key);
        return -1;
    }
    return found;
}

static amber_status missing(const struct gguf_file *file, const char *arch, const char *name,
                            amber_error *err) {
    return amber_fail(
        err, AMBER_ERR_FORMAT,
        "%s: key %s.%s: expected, not found (the file is incomplete; convert it anew)", file->label,
        arch, name);
}

/* YaRN (arXiv 2309.00071, section 3.2): frequencies that turn more than beta_fast times within the
 * original context stay, those below beta_slow turns are interpolated, with a linear ramp between.
 * Returns the share of interpolation for pair i. */
static double yarn_ramp(int i, int n_rot, double base, double n_ctx_orig, double beta_fast,
                        double beta_slow) {
    const double pi = 3.14159265358979323846;
    double low = floor(n_rot * log(n_ctx_orig / (beta_fast * 2 * pi)) / (2 * log(base)));
    double high = ceil(n_rot * log(n_ctx_orig / (beta_slow * 2 * pi)) / (2 * log(base)));
    low = fmax(low, 0);
    high = fmin(high, n_rot - 1);
    double ramp = (i - low) / fmax(high - low, 0.001);
    return fmin(fmax(ramp, 0), 1);
}

static amber_status read_rope(const struct gguf_file *file, struct shape *s, amber_error *err) {
    const char *arch = s->arch->name;
    double base = 10000, factor = 0, n_ctx_orig = s->n_ctx_train, attn_factor = 1;
    double beta_fast = 32, beta_slow = 1;
    if (get_float(file, arch, "rope.freq_base", &base, err) < 0 ||
        get_float(file, arch, "rope.scale_linear", &factor, err) < 0 ||
        get_float(file, arch, "rope.scaling.factor", &factor, err) < 0 ||
        get_float(file, arch, "rope.scaling.attn_factor", &attn_factor, err) < 0 ||
        get_float(file, arch, "rope.scaling.yarn_beta_fast", &beta_fast, err) < 0 ||
        get_float(file, arch, "rope.scaling.yarn_beta_slow", &beta_slow, err) < 0)
        return AMBER_ERR_FORMAT;
    int orig = 0, has_orig = get_int(file, arch, "rope.scaling.original_context_length", 1, 1 << 30,
                                     &orig, err);
    if (has_orig < 0) return AMBER_ERR_FORMAT;
    if (has_orig) n_ctx_orig = orig;
    if (base <= 1)
        return amber_fail(err, AMBER_ERR_FORMAT, "%s: %s.rope.freq_base: expected > 1, found %g",
                          file->label, arch, base);

    char key[128];
    struct gguf_string type = {0};
    snprintf(key, sizeof key, "%s.rope.scaling.type", arch);
    if (gguf_get_string(file, key, &type, err) < 0) return AMBER_ERR_FORMAT;
    bool yarn = type.len == 4 && memcmp(type.data, "yarn", 4) == 0;
    bool linear = type.len == 0 || (type.len == 6 && memcmp(type.data, "linear", 6) == 0);
    bool none = type.len == 4 && memcmp(type.data, "none", 4) == 0;
    if (!yarn && !linear && !none)
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "%s: %s is \"%.*s\"; this version knows none, linear and yarn",
                          file->label, key, (int)(type.len > 40 ? 40 : type.len), type.data);
    if (none || factor <= 0) factor = 1;

    /* Llama 3 writes its scaling as a tensor of divisors, one per pair. */
    const struct gguf_tensor *divisors = gguf_find_tensor(file, "rope_freqs.weight");
    if (divisors && (divisors->type != TYPE_F32 || divisors->ne[0] != (uint64_t)s->n_rot / 2))
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: rope_freqs.weight: expected %d F32 values, found %llu of type %u",
                          file->label, s->n_rot / 2, (unsigned long long)divisors->ne[0],
                          divisors->type);

    s->rope_freq = malloc(sizeof(double) * (size_t)(s->n_rot / 2));
    if (!s->rope_freq) return amber_fail(err, AMBER_ERR_MEMORY, "%s: no memory", file->label);
    s->rope_mscale = (float)attn_factor;
    if (yarn && factor > 1) s->rope_mscale *= (float)(1 + 0.1 * log(factor));
    for (int i = 0; i < s->n_rot / 2; i++) {
        double freq = pow(base, -2.0 * i / s->n_rot);
        if (divisors) {
            float d;
            memcpy(&d, divisors->data + sizeof d * (size_t)i, sizeof d);
            if (!(d > 0) || !isfinite(d)) {
                free(s->rope_freq);
                s->rope_freq = NULL;
                return amber_fail(err, AMBER_ERR_FORMAT,
                                  "%s: rope_freqs.weight[%d]: expected > 0, found %g", file->label,
                                  i, (double)d);
            }
            freq /= d;
        }
        double interpolated = freq / factor;
        double mix = yarn ? yarn_ramp(i, s->n_rot, base, n_ctx_orig, beta_fast, beta_slow) : 1;
        s->rope_freq[i] = freq * (1 - mix) + interpolated * mix;
    }
    return AMBER_OK;
}

static amber_status find_arch(const struct gguf_file *file, const struct arch **out,
                              amber_error *err) {
    struct gguf_string name;
    int found = gguf_get_string(file, "general.architecture", &name, err);
    if (found < 0) return AMBER_ERR_FORMAT;
    if (!found)
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: key general.architecture: expected, not found (not a model?)",
                          file->label);
    for (size_t i = 0; i < N_ARCHITECTURES; i++) {
        if (strlen(architectures[i].name) == name.len &&
            memcmp(architectures[i].name, name.data, name.len) == 0) {
            *out = &architectures[i];
            return AMBER_OK;
        }
    }
    return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                      "%s: architecture \"%.*s\" is not supported; this version runs: %s",
                      file->label, (int)(name.len > 40 ? 40 : name.len), name.data, arch_list());
}

amber_status arch_read_shape(const struct gguf_file *file, struct shape *s, amber_error *err) {
    *s = (struct shape){0};
    amber_status status = find_arch(file, &s->arch, err);
    if (status != AMBER_OK) return status;
    const char *arch = s->arch->name;

    const struct {
        const char *name;
        int max;
        int *out;
        bool required;
    } keys[] = {
        {"block_count", 4096, &s->n_layer, true},
        {"embedding_length", AMBER_MAX_K, &s->n_embd, true},
        {"feed_forward_length", AMBER_MAX_K, &s->n_ff, true},
        {"attention.head_count", 4096, &s->n_head, true},
        {"attention.head_count_kv", 4096, &s->n_head_kv, false},
        {"context_length", 1 << 30, &s->n_ctx_train, true},
        {"attention.key_length", AMBER_HEAD_MAX, &s->head_dim, false},
        {"rope.dimension_count", AMBER_HEAD_MAX, &s->n_rot, false},
    };
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        int found = get_int(file, arch, keys[i].name, 1, keys[i].max, keys[i].out, err);
        if (found < 0) return err ? (amber_status)err->code : AMBER_ERR_FORMAT;
        if (!found && keys[i].required) return missing(file, arch, keys[i].name, err);
    }
    if (!s->n_head_kv) s->n_head_kv = s->n_head;
    if (!s->head_dim) s->head_dim = s->n_embd / s->n_head;
    if (!s->n_rot) s->n_rot = s->head_dim;
    int value_length = s->head_dim, experts = 0;
    double eps = 0;
    if (get_int(file, arch, "attention.value_length", 1, 1 << 20, &value_length, err) < 0 ||
        get_int(file, arch, "expert_count", 0, 1 << 20, &experts, err) < 0)
        return AMBER_ERR_FORMAT;
    if (s->arch->sliding_window &&
        get_int(file, arch, "attention.sliding_window", 0, 1 << 30, &s->window, err) < 0)
        return AMBER_ERR_FORMAT;
    int found = get_float(file, arch, "attention.layer_norm_rms_epsilon", &eps, err);
    if (found < 0) return AMBER_ERR_FORMAT;
    if (!found) return missing(file, arch, "attention.layer_norm_rms_epsilon", err);
    s->norm_eps = (float)eps;

    if (experts > 0)
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "%s: %d experts: mixture-of-experts models are not supported yet",
                          file->label, experts);
    if (value_length != s->head_dim)
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "%s: heads of %d keys and %d values; this version needs them equal",
                          file->label, s->head_dim, value_length);
    if (s->n_head % s->n_head_kv)
        return amber_fail(err, AMBER_ERR_FORMAT, "%s: %d heads cannot share %d key-value heads",
                          file->label, s->n_head, s->n_head_kv);
    if (s->head_dim < 8 || s->head_dim > AMBER_HEAD_MAX || s->head_dim % 8)
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "%s: head size: expected a multiple of 8 up to %d, found %d", file->label,
                          AMBER_HEAD_MAX, s->head_dim);
    if (s->n_rot > s->head_dim || s->n_rot % 2)
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: %s.rope.dimension_count: expected even and at most %d, found %d",
                          file->label, arch, s->head_dim, s->n_rot);
    if ((int64_t)s->n_head * s->head_dim > AMBER_MAX_K)
        return amber_fail(err, AMBER_ERR_UNSUPPORTED, "%s: attention width: at most %d, found %lld",
                          file->label, AMBER_MAX_K, (long long)s->n_head * s->head_dim);
    s->attn_scale = (float)(1 / sqrt(s->head_dim));

    const struct gguf_tensor *embedding = gguf_find_tensor(file, "token_embd.weight");
    if (!embedding)
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: tensor token_embd.weight: expected, not found (is this a vocabulary "
                          "or a part of a split model?)",
                          file->label);
    if (embedding->ne[1] < 1 || embedding->ne[1] > (1 << 24))
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: token_embd.weight: expected 1..16777216 rows, found %llu",
                          file->label, (unsigned long long)embedding->ne[1]);
    s->n_vocab = (int)embedding->ne[1];
    return read_rope(file, s, err);
}
