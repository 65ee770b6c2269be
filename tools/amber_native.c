/* amber_native.c: amber-native: one prompt, one answer, over amber.h alone, for machines without
 * Python. The text goes to stdout and nothing else does; timings and errors go to stderr. Exit
 * codes: 0 done, 1 failed, 2 wrong use, 130 interrupted. */
#include "amber.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { EXIT_DONE = 0, EXIT_FAILED = 1, EXIT_USAGE = 2, EXIT_INTERRUPTED = 130 };

static const char usage[] =
    "usage: amber-native MODEL [-p TEXT] [options]      (without -p the prompt is read from "
    "stdin)\n"
    "  -p TEXT       prompt, taken as it is\n"
    "  -n N          tokens to write (default: until the model ends or the context is full)\n"
    "  -c N          context in tokens (default: 4096, or less where the model was trained on "
    "less)\n"
    "  -t N          threads (default: physical cores)\n"
    "  --temp X      temperature (default 0.8; 0 always takes the likeliest token)\n"
    "  -s N          seed (default: random, and told at the end)\n"
    "  --precision int8|float\n"
    "  --kv-type f16|int8   what keys and values are kept as (default: f16)\n"
    "  --device D    cpu, cuda, cuda:N or auto (default: $AMBER_DEVICE, else cpu)\n"
    "  --sparse S    prunes activations in prefill: off, auto or a pattern such as 8:16\n"
    "  --list-devices\n"
    "  --info        tell about the model and stop\n"
    "  -h, --help    this text\n"
    "  --version\n";

struct arguments {
    const char *model, *prompt;
    int32_t n_predict; /* -1: no limit */
    amber_engine_options engine;
    amber_session_options session;
    amber_sampling sampling;
    int info;
};

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal_number) {
    (void)signal_number;
    interrupted = 1;
}

static int on_progress(void *user, int32_t phase, int64_t done, int64_t total) {
    (void)user;
    static int last_percent = -1;
    int percent = total > 0 ? (int)(100 * done / total) : 100;
    if (isatty(STDERR_FILENO) && percent != last_percent) {
        /* The line goes away when it is done, so that the answer starts on a clean one. */
        if (percent < 100)
            fprintf(stderr, "\r%s %d %%", phase == AMBER_PHASE_LOAD ? "loading" : "reading",
                    percent);
        else
            fputs("\r\033[K", stderr);
        last_percent = percent;
    }
    return interrupted;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int wrong_use(const char *what, const char *value) {
    fprintf(stderr, "amber-native: %s%s%s\n%s", what, value ? ": " : "", value ? value : "", usage);
    return EXIT_USAGE;
}

static int failed(amber_status status, const amber_error *err) {
    if (status == AMBER_ERR_CANCELLED && interrupted) return EXIT_INTERRUPTED;
    fprintf(stderr, "amber-native: %s\n", err->msg);
    return status == AMBER_ERR_ARGUMENT ? EXIT_USAGE : EXIT_FAILED;
}

static int read_integer(const char *text, long long low, long long high, long long *out) {
    char *end;
    errno = 0;
    *out = strtoll(text, &end, 10);
    return end != text && !*end && !errno && *out >= low && *out <= high;
}

/* Returns 0, or an exit code above 0; -1 means that all is said and done. */
static int read_arguments(int argc, char **argv, struct arguments *a) {
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i];
        if (strcmp(name, "-h") == 0 || strcmp(name, "--help") == 0) {
            fputs(usage, stdout);
            return -1;
        }
        if (strcmp(name, "--version") == 0) {
            printf("%s\n", amber_version());
            return -1;
        }
        if (strcmp(name, "--list-devices") == 0) {
            char list[4096];
            amber_device_list(list, sizeof list);
            fputs(list, stdout);
            return -1;
        }
        if (strcmp(name, "--info") == 0) {
            a->info = 1;
            continue;
        }
        if (name[0] != '-') {
            if (a->model) return wrong_use("more than one model", name);
            a->model = name;
            continue;
        }
        const char *value = i + 1 < argc ? argv[++i] : NULL;
        if (!value) return wrong_use("unknown option, or no value after it", name);
        long long n;
        if (strcmp(name, "-p") == 0) {
            a->prompt = value;
        } else if (strcmp(name, "-n") == 0) {
            if (!read_integer(value, -1, INT32_MAX, &n)) return wrong_use("-n: not a count", value);
            a->n_predict = (int32_t)n;
        } else if (strcmp(name, "-c") == 0) {
            if (!read_integer(value, 0, INT32_MAX, &n)) return wrong_use("-c: not a count", value);
            a->session.n_ctx = (int32_t)n;
        } else if (strcmp(name, "-t") == 0) {
            if (!read_integer(value, 1, INT32_MAX, &n)) return wrong_use("-t: not a count", value);
            a->engine.threads = (int32_t)n;
        } else if (strcmp(name, "-s") == 0) {
            if (!read_integer(value, 0, LLONG_MAX, &n)) return wrong_use("-s: not a seed", value);
            a->sampling.seed = (uint64_t)n;
        } else if (strcmp(name, "--temp") == 0) {
            char *end;
            a->sampling.temperature = strtof(value, &end);
            if (end == value || *end) return wrong_use("--temp: not a number", value);
        } else if (strcmp(name, "--device") == 0) {
            a->engine.device = value;
        } else if (strcmp(name, "--sparse") == 0) {
            a->engine.sparse = value;
        } else if (strcmp(name, "--precision") == 0) {
            if (strcmp(value, "float") == 0)
                a->engine.precision = AMBER_PRECISION_FLOAT;
            else if (strcmp(value, "int8") != 0)
                return wrong_use("--precision: neither int8 nor float", value);
        } else if (strcmp(name, "--kv-type") == 0) {
            if (strcmp(value, "int8") == 0)
                a->session.kv_type = AMBER_KV_INT8;
            else if (strcmp(value, "f16") != 0)
                return wrong_use("--kv-type: neither f16 nor int8", value);
        } else {
            return wrong_use("unknown option", name);
        }
    }
    return a->model ? 0 : wrong_use("no model given", NULL);
}

/* Everything on stdin, or NULL. */
static char *read_stdin(size_t *length) {
    size_t cap = 1 << 16, n = 0;
    char *text = malloc(cap);
    while (text) {
        n += fread(text + n, 1, cap - n, stdin);
        if (n < cap) break;
        char *larger = realloc(text, cap *= 2);
        if (!larger) free(text);
        text = larger;
    }
    if (text && ferror(stdin)) {
        free(text);
        text = NULL;
    }
    *length = n;
    return text;
}

static void tell_info(const amber_engine_info *i) {
    printf(
        "name           %s\narchitecture   %s\nparameters     %.1f M\nweights        %s\n"
        "layers         %d\nembedding      %d\nheads          %d (%d for keys and values)\n"
        "feed-forward   %d\nvocabulary     %d\ntrained for    %d tokens\nfile           %.1f MB\n"
        "in memory      %.1f MB, %s\ndevice         %s, %.1f MB there\n"
        "kernels        %s, %d threads\nload           %.2f s\n",
        i->name, i->architecture, (double)i->n_params / 1e6, i->weight_types, i->n_layer, i->n_embd,
        i->n_head, i->n_head_kv, i->n_ff, i->n_vocab, i->n_ctx_train, (double)i->file_bytes / 1e6,
        (double)i->weight_bytes / 1e6, i->precision == AMBER_PRECISION_INT8 ? "int8" : "float",
        i->device, (double)i->device_bytes / 1e6, i->isa, i->threads, i->load_seconds);
}

/* Returns whether the text ended inside a line, or did_before where there was none. */
static int write_text(const char *text, int32_t length, int did_before) {
    if (!text || length <= 0) return did_before;
    fwrite(text, 1, (size_t)length, stdout);
    fflush(stdout);
    return text[length - 1] != '\n';
}

/* Samples until the model ends, n tokens are written, or the context is full. */
static int generate(amber_session *session, amber_sampler *sampler, amber_text_stream *stream,
                    const amber_tokenizer *tokenizer, int32_t n, double *first_token) {
    amber_error err = {0};
    amber_session_stats stats = {.size = sizeof stats};
    amber_session_get_stats(session, &stats);
    int32_t length;
    const char *text;
    int exit_code = EXIT_DONE, open_line = 0, full = 0;
    for (int32_t i = 0; n < 0 || i < n; i++) {
        int32_t token = amber_sampler_sample(sampler, amber_session_logits(session));
        if (i == 0) *first_token = now();
        if (token < 0) {
            fprintf(stderr, "amber-native: the model's logits are not finite (a damaged file?)\n");
            exit_code = EXIT_FAILED;
            break;
        }
        if (amber_token_flags(tokenizer, token) & AMBER_TOKEN_EOG) break;
        amber_sampler_accept(sampler, token);
        text = amber_text_stream_push(stream, token, &length);
        open_line = write_text(text, length, open_line);
        if (interrupted) {
            exit_code = EXIT_INTERRUPTED;
            break;
        }
        if (i + 1 == n) break;
        if (amber_session_length(session) == stats.n_ctx) {
            full = 1;
            break;
        }
        amber_status status = amber_session_append(session, token, &err);
        if (status != AMBER_OK) {
            exit_code = failed(status, &err);
            break;
        }
    }
    text = amber_text_stream_finish(stream, &length);
    open_line = write_text(text, length, open_line);
    if (open_line) write_text("\n", 1, 1);
    if (full)
        fprintf(stderr, "amber-native: the context of %d tokens is full (-c makes it larger)\n",
                stats.n_ctx);
    return exit_code;
}

/* The prompt's tokens, spellings of special tokens read as such, with BOS in front exactly once
 * where the model wants it. The caller frees *out. */
static amber_status tokenize_prompt(const amber_tokenizer *tokenizer, const char *prompt,
                                    size_t bytes, int32_t **out, int32_t *count, amber_error *err) {
    if (bytes > INT32_MAX) {
        snprintf(err->msg, sizeof err->msg, "the prompt is larger than 2 GiB");
        return AMBER_ERR_ARGUMENT;
    }
    int32_t n = amber_tokenize(tokenizer, prompt, (int32_t)bytes, 0, 1, NULL, 0, err);
    if (n < 0) return (amber_status)-n;
    int32_t *tokens = malloc(((size_t)n + 1) * sizeof *tokens);
    if (!tokens) {
        snprintf(err->msg, sizeof err->msg, "out of memory");
        return AMBER_ERR_MEMORY;
    }
    tokens[0] = amber_tokenizer_adds_bos(tokenizer) ? amber_tokenizer_bos(tokenizer) : -1;
    int32_t lead = tokens[0] >= 0;
    amber_tokenize(tokenizer, prompt, (int32_t)bytes, 0, 1, tokens + lead, n, err);
    if (lead && n > 0 && tokens[1] == tokens[0]) { /* the prompt brought its own */
        memmove(tokens, tokens + 1, (size_t)n * sizeof *tokens);
        lead = 0;
    }
    *out = tokens;
    *count = n + lead;
    if (*count > 0) return AMBER_OK;
    snprintf(err->msg, sizeof err->msg, "the prompt is empty, and this model has no start token");
    return AMBER_ERR_ARGUMENT;
}

static int answer(amber_engine *engine, const struct arguments *a, const char *prompt,
                  size_t bytes) {
    amber_error err = {0};
    amber_session *session = NULL;
    amber_sampler *sampler = NULL;
    amber_text_stream *stream = NULL;
    int32_t *tokens = NULL;
    int exit_code;
    amber_engine_info info = {.size = sizeof info};
    amber_engine_get_info(engine, &info);
    const amber_tokenizer *tokenizer = amber_engine_tokenizer(engine);

    int32_t n = 0;
    amber_status status = tokenize_prompt(tokenizer, prompt, bytes, &tokens, &n, &err);
    if (status == AMBER_OK && !(stream = amber_text_stream_new(tokenizer, 0, 1))) {
        status = AMBER_ERR_MEMORY;
        snprintf(err.msg, sizeof err.msg, "out of memory");
    }
    if (status == AMBER_OK) status = amber_session_new(engine, &a->session, &session, &err);
    if (status == AMBER_OK) status = amber_sampler_new(&a->sampling, info.n_vocab, &sampler, &err);
    double start = now(), first_token = start;
    if (status == AMBER_OK) status = amber_session_sync(session, tokens, n, &err);
    if (status == AMBER_OK) {
        for (int32_t i = 0; i < n; i++) amber_sampler_accept(sampler, tokens[i]);
        exit_code = generate(session, sampler, stream, tokenizer, a->n_predict, &first_token);
        amber_session_stats s = {.size = sizeof s};
        amber_session_get_stats(session, &s);
        /* A prompt of one token is a decode step to the session; the rate then says nothing. */
        double prefill = s.prefill_seconds > 0 ? s.prefill_tokens / s.prefill_seconds : 0;
        double decode = s.decode_seconds > 0 ? (double)s.decode_tokens / s.decode_seconds : 0;
        fprintf(stderr,
                "load %.2f s | prefill %d tok, %.1f tok/s | first token %.2f s | "
                "decode %lld tok, %.1f tok/s | seed %llu\n",
                info.load_seconds, s.prefill_tokens, prefill, first_token - start,
                (long long)s.decode_tokens, decode,
                (unsigned long long)amber_sampler_seed(sampler));
    } else {
        exit_code = failed(status, &err);
    }
    amber_sampler_free(sampler);
    amber_session_free(session);
    amber_text_stream_free(stream);
    free(tokens);
    return exit_code;
}

int main(int argc, char **argv) {
    struct arguments a = {.n_predict = -1};
    amber_engine_options_defaults(&a.engine);
    amber_session_options_defaults(&a.session);
    amber_sampling_defaults(&a.sampling);
    int exit_code = read_arguments(argc, argv, &a);
    if (exit_code != 0) return exit_code < 0 ? EXIT_DONE : exit_code;
    if (!a.info && !a.prompt && isatty(STDIN_FILENO))
        return wrong_use("no prompt: give -p TEXT, or pipe one in", NULL);

    struct sigaction action = {.sa_handler = on_interrupt, .sa_flags = SA_RESETHAND};
    sigaction(SIGINT, &action, NULL); /* a second Ctrl-C ends the program at once */
    a.engine.progress = a.session.progress = on_progress;

    char *piped = NULL;
    size_t bytes = a.prompt ? strlen(a.prompt) : 0;
    if (!a.info && !a.prompt) {
        piped = read_stdin(&bytes);
        if (interrupted) {
            free(piped);
            return EXIT_INTERRUPTED;
        }
        if (!piped) {
            fprintf(stderr, "amber-native: stdin: %s\n", strerror(errno));
            return EXIT_FAILED;
        }
    }

    amber_engine *engine = NULL;
    amber_error err = {0};
    amber_status status = amber_engine_open(a.model, &a.engine, &engine, &err);
    if (status != AMBER_OK) {
        exit_code = failed(status, &err);
    } else if (a.info) {
        amber_engine_info info = {.size = sizeof info};
        amber_engine_get_info(engine, &info);
        tell_info(&info);
    } else {
        exit_code = answer(engine, &a, a.prompt ? a.prompt : piped, bytes);
    }
    amber_engine_close(engine);
    free(piped);
    if (fflush(stdout) != 0 && exit_code == EXIT_DONE) {
        fprintf(stderr, "amber-native: stdout: %s\n", strerror(errno));
        exit_code = EXIT_FAILED;
    }
    return exit_code;
}
