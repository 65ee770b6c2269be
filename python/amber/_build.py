"""Writes the C source of the extension module `amber._amber`: python _build.py AMBER_H OUT_C.

cffi API mode: the C compiler checks every declaration against amber.h, and the module keeps to the
limited API, so one binary serves Python 3.10 and later.
"""

import sys
from pathlib import Path

# Callbacks that C calls and Python implements (see _lib.py).
CALLBACKS = """
extern "Python" {
    int amber_py_progress(void *user, int32_t phase, int64_t done, int64_t total);
    void amber_py_tap(void *user, int32_t layer, int32_t projection, int32_t pos, int32_t rows,
                      int32_t n_in, const float *x);
    void amber_py_log(void *user, int32_t level, const char *text);
}
"""


def declarations(header: str) -> str:
    """The part of amber.h between its two cffi markers. ValueError where they are missing."""
    begin, end = "/* cffi: begin */", "/* cffi: end */"
    if header.count(begin) != 1 or header.count(end) != 1:
        raise ValueError(f"amber.h: expected {begin} and {end} once each")
    return header.split(begin)[1].split(end)[0]


def main() -> None:
    from cffi import FFI

    if len(sys.argv) != 3:
        sys.exit("usage: _build.py AMBER_H OUT_C")
    ffi = FFI()
    ffi.cdef(declarations(Path(sys.argv[1]).read_text(encoding="utf-8")) + CALLBACKS)
    ffi.set_source("amber._amber", '#include "amber.h"')
    ffi.emit_c_code(sys.argv[2])


if __name__ == "__main__":
    main()
