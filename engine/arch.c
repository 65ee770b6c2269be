/* arch.c: the table of architectures, and a model's shape from the keys of its file. */
#include "model.h"
#include "dequant.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct arch architectures[] = {
    {.name = "llama", .window_period = 1, .expert_norm = true},
    {.name = "qwen2", .rope_halves = true},
    {.name = "qwen2moe", .rope_halves = true},
    {.name = "qwen3", .rope_halves = true},
    {.name = "qwen3moe", .rope_halves = true, .expert_norm = true},
    {.name = "gemma", .rope_halves = true, .act = ACT_GELU, .scale_embedding = true},
    {.name = "gemma2",
     .norms = NORM_PRE_POST,
     .rope_halves = true,
     .act = ACT_GELU,
     .scale_embedding = true,
     .window_period = 2,
     .window = 4096,
     .wide_layers = 46,
     .attn_softcap = 50,
     .final_softcap = 30},
    {.name = "gemma3",
     .norms = NORM_PRE_POST,
     .rope_halves = true,
     .act = ACT_GELU,
     .scale_embedding = true,
     .window_period = 6,
     .window_base = 10000,
     .wide_layers = 62},
    {.name = "phi3", .rope_halves = true, .window_period = 1},
    {.name = "smollm3", .no_rope_period = 4},
    {.name = "olmo2", .norms = NORM_POST, .rope_halves = true, .window_period = 4},
    {.name = "granite", .divide_logits = true},
    {.name = "granitemoe", .divide_logits = true, .expert_norm = true},
    {.name = "olmoe", .rope_halves = true},
    {.name = "starcoder2",
     .layer_norm = true,
     .act = ACT_GELU,
     .no_gate = true,
     .rope_halves = true,
     .window_period = 1},
    {.name = "stablelm", .norms = NORM_PRE_OR_PARALLEL, .layer_norm = true, .rope_halves = true},
    {.name = "command-r", .norms = NORM_PARALLEL, .layer_norm = true},
    {.name = "cohere2",
     .norms = NORM_PARALLEL,
     .layer_norm = true,
     .window_period = 4,
     .rope_windowed = true},
    {.name = "phi2",
     .norms = NORM_PARALLEL,
     .layer_norm = true,
     .act = ACT_GELU,
     .no_gate = true,
     .rope_halves = true},
    {.name = "chatglm"},
    {.name = "glm4", .norms = NORM_PRE_POST},
    {.name = "glm4moe",
     .ffn_norm = "post_attention_norm",
     .rope_halves = true,
     .expert_norm = true,
     .expert_sigmoid = true},
    {.name = "ernie4_5"},
    {.name = "ernie4_5-moe", .expert_norm = true},
    {.name = "exaone4",
     .norms = NORM_POST,
     .rope_halves = true,
     .window_period = 4,
     .rope_windowed = true},
    {.name = "exaone", .rope_halves = true},
    {.name = "internlm2"},
    {.name = "baichuan", .alibi_layers = 40},
    {.name = "xverse"},
    {.name = "minicpm", .divide_logits = true, .factors_told = true},
    {.name = "pangu-embedded", .rope_halves = true},
    {.name = "qwen", .rope_halves = true, .gate_counted = true},
    {.name = "olmo", .layer_norm = true, .norm_plain = true},
    {.name = "maincoder", .rope_first = true},
    {.name = "plamo", .norms = NORM_PARALLEL, .rope_halves = true},
    {.name = "orion", .layer_norm = true, .rope_halves = true},
    {.name = "codeshell",
     .layer_norm = true,
     .act = ACT_GELU,
     .no_gate = true,
     .rope_halves = true},
    {.name = "deepseek"},
    {.name = "gpt2",
     .layer_norm = true,
     .act = ACT_GELU,
     .no_gate = true,
     .positions = true,
     .no_rope_period = 1},
    {.name = "starcoder",
     .layer_norm = true,
     .act = ACT_GELU,
     .no_gate = true,
     .positions = true,
     .no_rope_period = 1},
    {.name = "gptneox",
     .norms = NORM_PARALLEL,
     .layer_norm = true,
     .act = ACT_GELU_ERF,
     .no_gate = true,
     .rope_halves = true},
    {.name = "falcon",
     .norms = NORM_PARALLEL,
     .layer_norm = true,
     .act = ACT_GELU_ERF,
     .no_gate = true,
     .rope_halves = true},
    {.name = "bailingmoe"},
    {.name = "jais2", .layer_norm = true, .act = ACT_RELU2, .no_gate = true, .rope_halves = true},
    {.name = "hunyuan-dense", .rope_halves = true, .rope_first = true},
    {.name = "hunyuan-moe", .rope_halves = true, .rope_first = true, .expert_norm = true},
    {.name = "mistral3", .window_period = 1, .expert_norm = true},
    {.name = "arcee", .act = ACT_RELU2, .no_gate = true},
    {.name = "nemotron",
     .layer_norm = true,
     .act = ACT_RELU2,
     .no_gate = true,
     .rope_halves = true},
    {.name = "dots1", .rope_halves = true, .expert_norm = true, .expert_sigmoid = true},
    {.name = "minimax-m2", .rope_halves = true, .expert_norm = true, .expert_sigmoid = true},
    /* Of models with vision the part on text, whose positions count the same along all axes. */
    {.name = "qwen2vl", .rope_halves = true},
    {.name = "qwen3vl", .rope_halves = true},
    {.name = "qwen3vlmoe", .rope_halves = true, .expert_norm = true},
    {.name = "gpt-oss",
     .ffn_norm = "post_attention_norm",
     .act = ACT_CLAMPED,
     .rope_halves = true,
     .window_period = 2,
     .expert_norm = true,
     .yarn_exact = true},
    {.name = "seed_oss", .ffn_norm = "post_attention_norm", .rope_halves = true},
};

#define N_ARCHITECTURES (sizeof architectures / sizeof architectures[0])

const char *arch_list(void) {
    return "llama (as Mistral, Mixtral and SmolLM2 are) qwen2 qwen2moe qwen3 qwen3moe gemma gemma2 "
           "gemma3 gpt-oss mistral3 phi2 phi3 smollm3 olmo2 olmoe granite granitemoe starcoder2 "
           "stablelm command-r cohere2 chatglm glm4 glm4moe ernie4_5 ernie4_5-moe exaone "
           "exaone4 hunyuan-dense hunyuan-moe internlm2 jais2 arcee nemotron dots1 minimax-m2 "
           "seed_oss deepseek bailingmoe minicpm baichuan xverse orion qwen codeshell "
           "pangu-embedded olmo maincoder plamo gpt2 starcoder gptneox falcon, and of models with "
           "vision the part on "
           "text: qwen2vl qwen3vl qwen3vlmoe";
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
 * The ramp's ends are rounded to pairs, but for exact. Returns the share of interpolation for pair i. */
static double yarn_ramp(int i, int n_rot, double base, double n_ctx_orig, double beta_fast,
                        double beta_slow, bool exact) {
    const double pi = 3.14159265358979323846;
    double low = n_rot * log(n_ctx_orig / (beta_fast * 2 * pi)) / (2 * log(base));
    double high = n_rot * log(n_ctx_orig / (beta_slow * 2 * pi)) / (2 * log(base));
    low = fmax(exact ? low : floor(low), 0);
    high = exact ? high : ceil(high);
    high = fmin(high, n_rot - 1);
    double ramp = (i - low) / fmax(high - low, 0.001);
    return fmin(fmax(ramp, 0), 1);
}

/* A tensor of n divisors of the frequencies, one per pair: Llama 3 and longrope write their scaling
 * so. *out stays NULL where the file has none. */
static amber_status find_divisors(const struct gguf_file *file, const char *name, int n,
                                  const uint8_t **out, amber_error *err) {
    const struct gguf_tensor *t = gguf_find_tensor(file, name);
    if (!t) return AMBER_OK;
    if (t->type != TYPE_F32 || t->ne[0] != (uint64_t)n)
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: %s: expected %d F32 values, found %llu of type %u", file->label,
                          name, n, (unsigned long long)t->ne[0], t->type);
    for (int i = 0; i < n; i++) {
        float d;
        memcpy(&d, t->data + sizeof d * (size_t)i, sizeof d);
        if (!(d > 0) || !isfinite(d))
            return amber_fail(err, AMBER_ERR_FORMAT, "%s: %s[%d]: expected > 0, found %g",
                              file->label, name, i, (double)d);
    }
    *out = t->data;
    return AMBER_OK;
}

static float divisor(const uint8_t *divisors, int i) {
    float d = 1;
    if (divisors) memcpy(&d, divisors + sizeof d * (size_t)i, sizeof d);
    return d;
}

static bool is_text(struct gguf_string s, const char *text) {
    return s.len == strlen(text) && memcmp(s.data, text, s.len) == 0;
}

static amber_status read_rope(const struct gguf_file *file, struct shape *s, amber_error *err) {
    const char *arch = s->arch->name;
    const int half = s->n_rot / 2;
    double base = 10000, local_base = s->arch->window_base, factor = 0, attn_factor = 1;
    double beta_fast = 32, beta_slow = 1, log_factor = 0;
    if (get_float(file, arch, "rope.freq_base", &base, err) < 0 ||
        get_float(file, arch, "rope.freq_base_swa", &local_base, err) < 0 ||
        get_float(file, arch, "rope.scale_linear", &factor, err) < 0 ||
        get_float(file, arch, "rope.scaling.factor", &factor, err) < 0 ||
        get_float(file, arch, "rope.scaling.attn_factor", &attn_factor, err) < 0 ||
        get_float(file, arch, "rope.scaling.yarn_beta_fast", &beta_fast, err) < 0 ||
        get_float(file, arch, "rope.scaling.yarn_beta_slow", &beta_slow, err) < 0 ||
        get_float(file, arch, "rope.scaling.yarn_log_multiplier", &log_factor, err) < 0 ||
        get_float(file, arch, "attention.temperature_scale", &s->temperature, err) < 0)
        return AMBER_ERR_FORMAT;
    s->n_ctx_orig = s->n_ctx_train;
    if (get_int(file, arch, "rope.scaling.original_context_length", 1, 1 << 30, &s->n_ctx_orig,
                err) < 0)
        return AMBER_ERR_FORMAT;
    s->temperature_length = s->n_ctx_orig;
    if (get_int(file, arch, "attention.temperature_length", 1, 1 << 30, &s->temperature_length,
                err) < 0)
        return AMBER_ERR_FORMAT;
    if (base <= 1 || (local_base && local_base <= 1))
        return amber_fail(err, AMBER_ERR_FORMAT, "%s: %s.rope.freq_base: expected > 1, found %g",
                          file->label, arch, base <= 1 ? base : local_base);

    char key[128];
    struct gguf_string type = {0};
    snprintf(key, sizeof key, "%s.rope.scaling.type", arch);
    if (gguf_get_string(file, key, &type, err) < 0) return AMBER_ERR_FORMAT;
    bool yarn = is_text(type, "yarn"), none = is_text(type, "none");
    if (!yarn && !none && type.len && !is_text(type, "linear") && !is_text(type, "longrope"))
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "%s: %s is \"%.*s\"; this version knows none, linear, yarn and longrope",
                          file->label, key, (int)(type.len > 40 ? 40 : type.len), type.data);
    if (none || factor <= 0 || is_text(type, "longrope")) factor = 1;

    const uint8_t *divisors = NULL, *long_divisors = NULL;
    amber_status status = find_divisors(file, "rope_freqs.weight", half, &divisors, err);
    if (status == AMBER_OK)
        status = find_divisors(file, "rope_factors_short.weight", half, &divisors, err);
    if (status == AMBER_OK)
        status = find_divisors(file, "rope_factors_long.weight", half, &long_divisors, err);
    if (status != AMBER_OK) return status;
    const bool factors = gguf_find_tensor(file, "rope_factors_short.weight") != NULL;
    if ((is_text(type, "longrope") || factors || long_divisors) && (!factors || !long_divisors))
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: longrope: expected the tensors rope_factors_short.weight and "
                          "rope_factors_long.weight, not found both (convert it anew)",
                          file->label);

    double *freq = malloc(sizeof *freq * 3 * (size_t)half);
    if (!freq) return amber_fail(err, AMBER_ERR_MEMORY, "%s: no memory", file->label);
    s->rope_freq = freq;
    s->rope_long = long_divisors ? freq + half : NULL;
    s->rope_local = local_base && s->window ? freq + 2 * (int64_t)half : NULL;
    s->rope_mscale = (float)attn_factor;
    if (yarn && factor > 1)
        s->rope_mscale *= (float)((1 + 0.1 * log(factor)) / (1 + 0.1 * log_factor * log(factor)));
    for (int i = 0; i < half; i++) {
        double plain = pow(base, -2.0 * i / s->n_rot), f = plain / (double)divisor(divisors, i);
        double mix = yarn ? yarn_ramp(i, s->n_rot, base, s->n_ctx_orig, beta_fast, beta_slow,
                                      s->arch->yarn_exact)
                          : 1;
        freq[i] = f * (1 - mix) + f / factor * mix;
        freq[half + i] = plain / (double)divisor(long_divisors, i);
        freq[2 * (int64_t)half + i] = local_base ? pow(local_base, -2.0 * i / s->n_rot) : 0;
    }
    return AMBER_OK;
}

/* Values of expert_gating_func. */
enum { GATE_SOFTMAX = 1, GATE_SIGMOID, GATE_SOFTMAX_OF_CHOSEN };

static amber_status read_experts(const struct gguf_file *file, struct shape *s, amber_error *err) {
    const char *arch = s->arch->name;
    double scale = 1;
    int shared = 0, groups = 1, gating = s->arch->expert_sigmoid ? GATE_SIGMOID : GATE_SOFTMAX;
    s->n_ff_expert = s->n_ff;
    s->expert_norm = s->arch->expert_norm;
    if (get_int(file, arch, "expert_count", 0, MAX_EXPERTS, &s->n_expert, err) < 0 ||
        get_int(file, arch, "expert_used_count", 0, MAX_EXPERTS, &s->n_expert_used, err) < 0 ||
        get_int(file, arch, "expert_feed_forward_length", 1, AMBER_MAX_K, &s->n_ff_expert, err) <
            0 ||
        get_int(file, arch, "expert_shared_feed_forward_length", 1, AMBER_MAX_K, &s->n_ff_shared,
                err) < 0 ||
        get_int(file, arch, "expert_shared_count", 0, MAX_EXPERTS, &shared, err) < 0 ||
        get_int(file, arch, "expert_group_count", 0, MAX_EXPERTS, &groups, err) < 0 ||
        get_int(file, arch, "expert_gating_func", 0, 1 << 20, &gating, err) < 0 ||
        get_float(file, arch, "expert_weights_scale", &scale, err) < 0)
        return AMBER_ERR_FORMAT;
    char key[128];
    snprintf(key, sizeof key, "%s.expert_weights_norm", arch);
    if (gguf_get_bool(file, key, &s->expert_norm, err) < 0) return AMBER_ERR_FORMAT;
    if (groups > 1 || gating > GATE_SOFTMAX_OF_CHOSEN)
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "%s: %s: experts in %d groups, gating %d; this version knows one group "
                          "and gating by 1 softmax, 2 sigmoid or 3 softmax of the chosen",
                          file->label, arch, groups, gating);
    s->expert_sigmoid = gating == GATE_SIGMOID;
    s->expert_norm |= gating == GATE_SOFTMAX_OF_CHOSEN;
    s->expert_scale = (float)(scale ? scale : 1);
    if (!s->n_ff_shared && (int64_t)shared * s->n_ff_expert <= AMBER_MAX_K)
        s->n_ff_shared = shared * s->n_ff_expert;
    if (s->n_expert && (s->n_expert_used < 1 || s->n_expert_used > s->n_expert))
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: %s.expert_used_count: expected 1..%d, found %d", file->label, arch,
                          s->n_expert, s->n_expert_used);
    if (!s->n_expert) s->n_expert_used = s->n_ff_expert = s->n_ff_shared = 0;
    bool any = false;
    for (int il = 0; il < s->n_layer && s->n_expert; il++) {
        char name[64];
        snprintf(name, sizeof name, "blk.%d.ffn_gate_inp.weight", il);
        s->mixture[il] = gguf_find_tensor(file, name) != NULL;
        any |= s->mixture[il];
        /* Some files do not tell the width of the shared expert. */
        snprintf(name, sizeof name, "blk.%d.ffn_down_shexp.weight", il);
        const struct gguf_tensor *down = gguf_find_tensor(file, name);
        if (down && !s->n_ff_shared && down->ne[0] <= AMBER_MAX_K)
            s->n_ff_shared = (int)down->ne[0];
    }
    if (s->n_expert && !any)
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: %s.expert_count is %d: expected tensors blk.*.ffn_gate_inp.weight, "
                          "not found (the file is incomplete or split)",
                          file->label, arch, s->n_expert);
    return AMBER_OK;
}

/* Which layers see only a window. The file may say so layer by layer, or as a period. */
static amber_status read_windows(const struct gguf_file *file, struct shape *s, amber_error *err) {
    const char *arch = s->arch->name;
    int period = s->arch->window_period;
    if (!period) return AMBER_OK;
    s->window = s->arch->window;
    if (get_int(file, arch, "attention.sliding_window", 0, 1 << 30, &s->window, err) < 0)
        return AMBER_ERR_FORMAT;
    if (!s->window) return AMBER_OK;
    char key[128];
    snprintf(key, sizeof key, "%s.attention.sliding_window_pattern", arch);
    const struct gguf_kv *kv = gguf_find(file, key);
    bool listed = kv && kv->type == GGUF_ARRAY;
    if (listed && (kv->elem_type == GGUF_STRING || kv->count < (uint64_t)s->n_layer))
        return amber_fail(err, AMBER_ERR_FORMAT, "%s: %s: expected %d flags, found %llu%s",
                          file->label, key, s->n_layer, (unsigned long long)kv->count,
                          kv->elem_type == GGUF_STRING ? " strings" : "");
    if (!listed &&
        get_int(file, arch, "attention.sliding_window_pattern", 1, 4096, &period, err) < 0)
        return AMBER_ERR_FORMAT;
    for (int il = 0; il < s->n_layer; il++)
        s->windowed[il] =
            listed ? gguf_array_i64(kv, (uint64_t)il) != 0 : period == 1 || (il + 1) % period != 0;
    return AMBER_OK;
}

/* Factors and caps that some architectures have. */
static amber_status read_factors(const struct gguf_file *file, struct shape *s, amber_error *err) {
    const struct arch *a = s->arch;
    double width = a->wide_layers == s->n_layer && a->wide_layers ? (double)s->n_embd / s->n_head
                                                                  : s->head_dim;
    double attn = 0, attn_cap = (double)a->attn_softcap, final_cap = (double)a->final_softcap;
    double clamp = 0;
    double embed = a->scale_embedding ? sqrt(s->n_embd) : 1, residual = 1, logit = 1;
    const struct {
        const char *name;
        double *value;
    } keys[] = {
        {"attention.scale", &attn},      {"attn_logit_softcapping", &attn_cap},
        {"embedding_scale", &embed},     {"final_logit_softcapping", &final_cap},
        {"residual_scale", &residual},   {"logit_scale", &logit},
        {"attention.clamp_kqv", &clamp},
    };
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        const int found = get_float(file, a->name, keys[i].name, keys[i].value, err);
        if (found < 0) return AMBER_ERR_FORMAT;
        if (!found && a->factors_told && strstr(keys[i].name, "_scale"))
            return missing(file, a->name, keys[i].name, err);
    }
    s->attn_scale = (float)(attn ? attn : 1 / sqrt(width));
    s->attn_softcap = (float)attn_cap;
    s->final_softcap = (float)final_cap;
    s->clamp = (float)clamp;
    s->embed_scale = (float)(embed ? embed : 1);
    s->residual_scale = (float)(residual ? residual : 1);
    s->logit_scale = (float)(!logit ? 1 : a->divide_logits ? 1 / logit : logit);
    return AMBER_OK;
}

void shape_free(struct shape *s) {
    free(s->rope_freq);
    free(s->windowed);
    *s = (struct shape){0};
}

amber_status arch_find(const struct gguf_file *file, const struct arch **out, amber_error *err) {
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

static amber_status read_shape(const struct gguf_file *file, struct shape *s, amber_error *err) {
    amber_status status = arch_find(file, &s->arch, err);
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
    /* The last layers of a file may be ones that guess further tokens: they are not used. */
    char key[128];
    int guessing = 0;
    if (get_int(file, arch, "nextn_predict_layers", 0, s->n_layer - 1, &guessing, err) < 0)
        return AMBER_ERR_FORMAT;
    s->n_layer -= guessing;
    if (s->arch->gate_counted) s->n_ff /= 2;
    snprintf(key, sizeof key, "%s.use_parallel_residual", arch);
    s->parallel = true;
    if (gguf_get_bool(file, key, &s->parallel, err) < 0) return AMBER_ERR_FORMAT;
    if (s->n_layer == s->arch->alibi_layers)
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "%s: a %s of %d layers has biases by distance (ALiBi) where this version "
                          "knows rotary positions",
                          file->label, arch, s->n_layer);
    if (!s->n_head_kv) s->n_head_kv = s->n_head;
    if (!s->head_dim) s->head_dim = s->n_embd / s->n_head;
    if (!s->n_rot) s->n_rot = s->head_dim;
    int value_length = s->head_dim;
    double eps = 0;
    if (get_int(file, arch, "attention.value_length", 1, 1 << 20, &value_length, err) < 0)
        return AMBER_ERR_FORMAT;
    const char *eps_key =
        s->arch->layer_norm ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon";
    int found = get_float(file, arch, eps_key, &eps, err);
    if (found < 0) return AMBER_ERR_FORMAT;
    if (!found) return missing(file, arch, eps_key, err);
    s->norm_eps = (float)eps;

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
    status = read_factors(file, s, err);
    s->windowed = calloc((size_t)s->n_layer, 2);
    if (!s->windowed) return amber_fail(err, AMBER_ERR_MEMORY, "%s: no memory", file->label);
    s->mixture = s->windowed + s->n_layer;
    if (status == AMBER_OK) status = read_experts(file, s, err);
    if (status == AMBER_OK) status = read_windows(file, s, err);
    return status == AMBER_OK ? read_rope(file, s, err) : status;
}

amber_status arch_read_shape(const struct gguf_file *file, struct shape *s, amber_error *err) {
    *s = (struct shape){0};
    amber_status status = read_shape(file, s, err);
    if (status != AMBER_OK) shape_free(s);
    return status;
}
