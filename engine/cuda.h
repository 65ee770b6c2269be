/* cuda.h: running a model on an NVIDIA GPU through libamber_cuda, which is opened at run time: a build
 * without CUDA, or a machine without a driver, only lacks these devices. */
#ifndef AMBER_CUDA_H
#define AMBER_CUDA_H

#include "cuda/device.h"
#include "session.h"

struct cuda {
    const struct amber_cuda_api *api;
    struct amber_cuda_device *device;
    struct amber_cuda_info info;
    int index;
    int64_t weight_bytes; /* what the model takes of its memory */
};

/* A weight matrix on the GPU: fragments and what the epilogue wants; of experts all of them, one
 * behind the other. */
struct cuda_linear {
    uint8_t *b;
    float *scale, *bias, *sum; /* [n_out]; bias and sum may be NULL */
    const float *score;        /* [n_in], or NULL */
};

/* Writes one line per GPU, "cuda:0  NAME, 80.0 GB, 79.1 GB free" or with the reason why it cannot be
 * used, or one line why there is none. Returns the length as snprintf does. */
int cuda_list(char *buf, size_t cap);

/* name: "cuda" (the first GPU that can be used) or "cuda:N". Errors: AMBER_ERR_DEVICE. */
amber_status cuda_open(const char *name, struct cuda **out, amber_error *err);
void cuda_close(struct cuda *cuda); /* and all that was allocated from it; NULL is allowed */

/* Copies the model's weights to the GPU; the host's copy of the matrices is freed. AMBER_ERR_UNSUPPORTED
 * for what only the CPU can do, AMBER_ERR_MEMORY with what is needed and what is free; the model then
 * still runs on the CPU. */
amber_status cuda_upload(struct cuda *cuda, struct model *model, struct amber_pool *pool,
                         amber_progress_fn progress, void *user, amber_error *err);

/* Bytes of a session's cache and buffers there. */
void cuda_batch_bytes(const struct model *model, struct batch *b, int64_t *kv, int64_t *scratch);
amber_status cuda_batch_new(struct cuda *cuda, struct batch *b, amber_error *err);
void cuda_batch_free(struct batch *b);

extern const struct ops cuda_ops;

#endif
