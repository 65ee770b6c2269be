"""Writes engine/unicode_tables.c: character classes for tokenizers' regular expressions.

    python tools/gen_unicode.py > engine/unicode_tables.c

The properties come from the `regex` module (pip install regex), whose documentation names the
Unicode version that it carries; pass it with --unicode so that the table says so too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re

import regex

BLOCK = 128
CATEGORIES = {
    "Lu": "UNI_LU",
    "Ll": "UNI_LL",
    "Lt": "UNI_LT",
    "Lm": "UNI_LM",
    "Lo": "UNI_LO",
    "M": "UNI_M",
    "N": "UNI_N",
    "P": "UNI_P",
    "S": "UNI_S",
}
EXTRA = {r"\p{White_Space}": "UNI_SPACE", r"\p{Script=Han}": "UNI_HAN"}


def documented_version() -> str:
    """The Unicode version named in the regex module's own description."""
    text = importlib.metadata.distribution("regex").read_text("METADATA") or ""
    found = re.search(r"Unicode (\d+\.\d+\.\d+)", text)
    return found.group(1) if found else "unknown"


def classify() -> list[tuple[str, ...]]:
    """The flags of every code point."""
    patterns = [(regex.compile(rf"\p{{{k}}}"), v) for k, v in CATEGORIES.items()]
    patterns += [(regex.compile(k), v) for k, v in EXTRA.items()]
    flags: list[list[str]] = [[] for _ in range(0x110000)]
    # Surrogates are no characters in UTF-8 and have none of these properties.
    text = "".join(chr(c) for c in range(0x110000))
    for pattern, flag in patterns:
        for match in pattern.finditer(text):
            flags[match.start()].append(flag)
    return [tuple(f) for f in flags]


def c_string(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unicode", default=documented_version(), help="version to write down")
    args = parser.parse_args()

    flags = classify()
    classes = sorted(set(flags), key=lambda f: (len(f), f))
    assert len(classes) <= 26, classes
    letter = {f: chr(ord("A") + i) for i, f in enumerate(classes)}
    blocks: dict[str, int] = {}
    stage1 = []
    for start in range(0, 0x110000, BLOCK):
        block = "".join(letter[f] for f in flags[start : start + BLOCK])
        stage1.append(blocks.setdefault(block, len(blocks)))

    version = importlib.metadata.version("regex")
    print(f"""/* unicode_tables.c: made by tools/gen_unicode.py from regex {version}; do not edit.
 * Unicode {args.unicode}. */
#include "unicode.h"

/* clang-format off */
const char uni_version[] = "{args.unicode}";

const uint16_t uni_class_flags[] = {{""")
    for f in classes:
        print(f"    {' | '.join(f) or '0'}, /* {letter[f]} */")
    print("};\n\nconst uint16_t uni_stage1[0x110000 >> 7] = {")
    row = "   "
    for i, value in enumerate(stage1):
        cell = f" {value},"
        if len(row) + len(cell) > 100:
            print(row)
            row = "   "
        row += cell
        if i == len(stage1) - 1:
            print(row)
    print("};\n\nconst char uni_blocks[][129] = {")
    for block in blocks:
        print(f"    {c_string(block[:64])}")
        print(f"    {c_string(block[64:])},")
    print("};\n/* clang-format on */")


if __name__ == "__main__":
    main()
