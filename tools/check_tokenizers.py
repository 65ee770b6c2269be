"""Amber's tokenizers against sentencepiece and Hugging Face's tokenizers on random Unicode texts.

    python tools/check_tokenizers.py TESTDATA [--strings 100000] [--seed 1] [--only NAME ...]

For every vocabulary in TESTDATA (vocab/*.gguf, and one file of each of its models) the ids of each
text and the text of its ids must be the same; for every pre-tokenizer that Amber knows, vocabulary
or not, the pieces must be those of the expression in the models' tokenizer.json (this part needs
tool_pretok, which the C build makes). Prints one line each; ends with 1 where anything differs.
tests/test_tokenizer.py makes the same comparisons on fewer texts.
"""

import argparse
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import amber

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import tokenizer_oracles as oracles  # noqa: E402

BATCH = 2000
SHOWN = 3  # differences


def vocabularies(testdata: Path) -> dict[str, Path]:
    """Files by name. Of files of one model, which share a vocabulary, the first."""
    found = {p.stem.removeprefix("ggml-vocab-"): p for p in sorted(testdata.glob("vocab/*.gguf"))}
    for path in sorted(testdata.glob("models/*.gguf")):
        found.setdefault(path.stem.split("-")[0], path)
    return found


def reference(path: Path, name: str) -> tuple[str, Callable[[list[str]], list[list[int]]]]:
    """Another library's name and its function from texts to ids."""
    vocabulary = oracles.read_vocabulary(path)
    if not vocabulary["merges"]:
        return "sentencepiece", oracles.sentencepiece_model(vocabulary).encode
    made = oracles.hf_tokenizer(path, name)

    def encode(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in made.encode_batch(texts, add_special_tokens=False)]

    return "tokenizers", encode


def check_vocabulary(path: Path, name: str, texts: list[str]) -> int:
    """Prints what was found. Returns the number of texts that differ: in their ids, or from what
    the ids are in text again."""
    tokenizer = amber.Tokenizer(path)
    library, encode = reference(path, name)
    types = oracles.read_vocabulary(path)["token_type"]
    # Without a token for each byte, characters are lost, and sentencepiece makes one <unk> of
    # several in a row.
    lossy = library == "sentencepiece" and 6 not in types
    unknown = types.index(2) if lossy else -1
    wrong = tokens = 0
    seconds = [0.0, 0.0]
    for first in range(0, len(texts), BATCH):
        batch = texts[first : first + BATCH]
        begun = perf_counter()
        found = [tokenizer.encode(text, add_special=False) for text in batch]
        seconds[0] += perf_counter() - begun
        begun = perf_counter()
        wanted = encode(batch)
        seconds[1] += perf_counter() - begun
        for text, ids, want in zip(batch, found, wanted, strict=True):
            tokens += len(ids)
            back = text if lossy else tokenizer.decode(ids)
            if lossy:
                ids = [x for i, x in enumerate(ids) if i == 0 or x != unknown or ids[i - 1] != x]
            # SentencePiece writes its visible space for a space, and reads it as one.
            expected = text.replace("\u2581", " ") if library == "sentencepiece" else text
            if ids != want or (back != expected and not lossy):
                wrong += 1
                if wrong <= SHOWN:
                    print(f"  {text!r:.300}: {ids!s:.300} {back!r:.300}, expected {want!s:.300}")
    print(
        f"{name:18} {len(texts):7} texts {tokens:9} tokens  {wrong} differ from {library}  "
        f"({seconds[0]:.1f} s; {library} {seconds[1]:.1f} s)",
        flush=True,
    )
    return wrong


def check_pretokenizer(tool: Path, name: str, texts: list[str]) -> int:
    """Prints what was found. Returns the number of texts that differ."""
    split = oracles.hf_splitter(name).pre_tokenize_str
    wrong = pieces = 0
    for first in range(0, len(texts), BATCH):
        batch = texts[first : first + BATCH]
        data = b"".join(struct.pack("<I", len(b)) + b for b in (t.encode() for t in batch))
        done = subprocess.run([tool, name], input=data, capture_output=True, check=True)
        for text, line in zip(batch, done.stdout.decode().split("\n")[:-1], strict=True):
            want = [len(piece.encode()) for piece, _ in split(text)]
            pieces += len(want)
            if list(map(int, line.split())) != want:
                wrong += 1
                if wrong <= SHOWN:
                    print(f"  {text!r:.300}: {line:.300}, expected {want!s:.300}")
    print(f"{name:18} {len(texts):7} texts {pieces:9} pieces  {wrong} differ", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("testdata", type=Path)
    parser.add_argument("--strings", type=int, default=100_000, help="for each (100000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="these vocabularies and pre-tokenizers")
    parser.add_argument("--tool", type=Path, default=ROOT / "build" / "ctest" / "tool_pretok")
    args = parser.parse_args()
    texts, wrong = list(oracles.texts(args.strings, args.seed)), 0
    for name, path in vocabularies(args.testdata).items():
        if not args.only or name in args.only:
            wrong += check_vocabulary(path, name, texts)
    if args.tool.exists():
        for name in oracles.EXPRESSIONS:
            if not args.only or name in args.only:
                wrong += check_pretokenizer(args.tool, name, texts)
    else:
        print(f"pre-tokenizers left out: {args.tool} is not there (--tool)", file=sys.stderr)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
