"""Writes engine/iq_grids.c: the code books of the IQ1, IQ2 and IQ3 tensor types.

The code books are constants of the file format; they are read from the Python package `gguf`.
Run: python tools/gen_iq_grids.py > engine/iq_grids.c
"""

from importlib.metadata import version

import gguf.quants as quants

# type, C name, bits of one entry's index into the map of values
GRIDS = [
    ("IQ2_XXS", "iq2_xxs_grid", 2),
    ("IQ2_XS", "iq2_xs_grid", 2),
    ("IQ2_S", "iq2_s_grid", 2),
    ("IQ3_XXS", "iq3_xxs_grid", 3),
    ("IQ3_S", "iq3_s_grid", 3),
    ("IQ1_S", "iq1_grid", 2),
]


def codes(name: str, bits: int) -> list[int]:
    """One integer per row of the grid: entry i's index in the map at bit i * bits."""
    kind = getattr(quants, name)
    kind.init_grid()
    rows = kind.grid.reshape(kind.grid_shape)
    index = {float(value): i for i, value in enumerate(kind.grid_map)}
    return [sum(index[float(v)] << (i * bits) for i, v in enumerate(row)) for row in rows]


def main() -> None:
    print(
        "/* iq_grids.c: code books of the IQ1, IQ2 and IQ3 tensor types: constants of the format.\n"
        f" * Written by tools/gen_iq_grids.py from the Python package gguf {version('gguf')}. */\n"
        '#include "iq_grids.h"\n'
    )
    for name, c_name, bits in GRIDS:
        values = codes(name, bits)
        print(f"const uint16_t {c_name}[{len(values)}] = {{")
        for i in range(0, len(values), 12):
            print("    " + " ".join(f"{v}," for v in values[i : i + 12]))
        print("};\n")


if __name__ == "__main__":
    main()
