"""Writes the first inputs of fuzz_gguf into a folder: python make_fuzz_seeds.py FOLDER [GGUF...]

Small sound files of every kind of content, and of each given GGUF file its keys with arrays cut to
their first elements.
"""

import sys
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType

import gguf_bytes as gb

MOST = 60  # elements kept of an array: a seed should be a few kilobytes


def every_kind() -> bytes:
    image = gb.Image(version=2)
    for kind in (gb.U8, gb.I8, gb.U16, gb.I16, gb.U32, gb.I32, gb.U64, gb.I64, gb.BOOL):
        image.key(f"k.{kind}", kind, 1)
        image.array(f"a.{kind}", kind, [0, 1])
    image.key("k.f", gb.F32, 0.5).key("k.d", gb.F64, 0.5).key("k.s", gb.STRING, b"a\0\xff")
    image.array("a.s", gb.STRING, ["", "one"]).array("a.e", gb.STRING, [])
    return image.finish()


def every_type() -> bytes:
    image = gb.Image(alignment=8)
    image.key("general.alignment", gb.U32, 8)
    for kind, (values, size) in GGML_QUANT_SIZES.items():
        if kind != GGMLQuantizationType.Q8_1:
            image.tensor(kind.name, int(kind), (values,), bytes(i & 63 for i in range(size)))
    return image.finish()


def vocabulary(kind: str) -> bytes:
    image = gb.Image()
    image.key("general.architecture", gb.STRING, "llama")
    if kind == "spm":
        gb.spm_vocabulary(image)
    else:
        gb.bpe_vocabulary(image, kind)
    return image.finish()


def shortened(path: str) -> bytes:
    """The file's keys, with short arrays; no tensors."""
    image = gb.Image()
    for field in GGUFReader(path).fields.values():
        if field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        if kind == GGUFValueType.ARRAY:
            parts = [field.parts[i] for i in field.data[:MOST]]
            inner = field.types[-1]
            strings = inner == GGUFValueType.STRING
            values = [bytes(p) if strings else p[0].item() for p in parts]
            image.array(field.name, int(inner), values)
        elif kind == GGUFValueType.STRING:
            image.key(field.name, gb.STRING, bytes(field.parts[-1])[:300])
        else:
            image.key(field.name, int(kind), field.parts[-1][0].item())
    return image.finish()


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    seeds = {
        "kinds": every_kind(),
        "types": every_type(),
        "empty": gb.Image().finish(),
    }
    for kind in ("spm", "gpt-2", "llama-bpe", "qwen2", "deepseek-coder", "default"):
        seeds[f"vocabulary-{kind}"] = vocabulary(kind)
    for path in sys.argv[2:]:
        seeds[Path(path).stem] = shortened(path)
    for name, data in seeds.items():
        (folder / name).write_bytes(data)
    print(f"{len(seeds)} seeds, {sum(map(len, seeds.values()))} bytes")


if __name__ == "__main__":
    main()
