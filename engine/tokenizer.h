/* tokenizer.h: the engine's side of the tokenizer; the rest of its interface is in amber.h. */
#ifndef AMBER_TOKENIZER_H
#define AMBER_TOKENIZER_H

#include "gguf.h"

/* Builds a tokenizer from a file's tokenizer.ggml.* keys. Copies what it needs: the file may be
 * closed afterwards. */
amber_status tok_new(const struct gguf_file *file, amber_tokenizer **out, amber_error *err);

#endif
