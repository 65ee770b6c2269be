"""Hugging Face folders: what is written against the files and configurations they came from."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import amber
from amber import quantize as q
from amber.convert import Folder, write_gguf
from amber.safetensors import read_folder

HF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


# ---- folders ----


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 values (the rest is cut off)."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    kinds = {"float32": "F32", "float16": "F16", "uint16": "BF16", "float64": "F64", "int8": "I8"}
    header, data = {}, b""
    for name, values in tensors.items():
        begin = len(data)
        data += np.ascontiguousarray(values).tobytes()
        header[name] = {"dtype": kinds[values.dtype.name], "shape": list(values.shape),
                        "data_offsets": [begin, len(data)]}  # fmt: skip
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "vocab_size": 40,
}  # fmt: skip


def tiny(folder: Path, change: dict[str, Any] | None = None, **tensors: np.ndarray | None) -> Path:
    """A folder of a llama with one layer. change: other values of config.json; tensors: others by
    the last part of their module's name, None leaves one out."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", CONFIG | (change or {}))
    rng = np.random.default_rng(5)
    shapes = {
        "model.embed_tokens": (40, 32), "model.norm": (32,), "lm_head": (40, 32),
        "model.layers.0.input_layernorm": (32,), "model.layers.0.post_attention_layernorm": (32,),
        "model.layers.0.self_attn.q_proj": (32, 32), "model.layers.0.self_attn.k_proj": (16, 32),
        "model.layers.0.self_attn.v_proj": (16, 32), "model.layers.0.self_attn.o_proj": (32, 32),
        "model.layers.0.mlp.gate_proj": (64, 32), "model.layers.0.mlp.up_proj": (64, 32),
        "model.layers.0.mlp.down_proj": (32, 64),
    }  # fmt: skip
    made = {}
    for name, shape in shapes.items():
        values = tensors.get(name.rsplit(".", 1)[-1], rng.standard_normal(shape).astype(np.float32))
        if values is not None:
            made[f"{name}.weight"] = values
    write_safetensors(folder / "model.safetensors", made)
    return folder


def contents(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Keys and float32 tensors of a GGUF file."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of Q or K as Hugging Face has them: of each head the even channels, then the odd."""
    size = len(rows) // heads
    order = [h * size + i for h in range(heads) for i in [*range(0, size, 2), *range(1, size, 2)]]
    return rows[order]


@pytest.fixture(scope="module")
def demo_folder(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as its makers would have published it: two files in float16 and float32, and a
    tokenizer.model."""
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    folder = tmp_path_factory.mktemp("demo")
    keys, tensors = contents(demo_model)
    arch = lambda name: keys[f"llama.{name}"]  # noqa: E731
    heads = {"attn_q": arch("attention.head_count"), "attn_k": arch("attention.head_count_kv")}
    parts: tuple[dict, dict] = ({}, {})
    for name, values in tensors.items():
        *layer, short = name.removesuffix(".weight").removeprefix("blk.").split(".")
        if short in heads:
            values = halves(values, heads[short])
        prefix = f"model.layers.{layer[0]}." if layer else ""
        exact = (values.astype(np.float16) == values).all()
        target = parts[len(name) % 2]
        target[f"{prefix}{HF_NAMES[short]}.weight"] = values.astype("f2") if exact else values
    places = {}
    for i, part in enumerate(parts):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        write_safetensors(folder / file, part)
        places |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"weight_map": places})
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "hidden_size": arch("embedding_length"), "intermediate_size": arch("feed_forward_length"),
        "num_hidden_layers": arch("block_count"), "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"], "max_position_embeddings": arch("context_length"),
        "rms_norm_eps": arch("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.get("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": keys["tokenizer.ggml.bos_token_id"],
        "eos_token_id": keys["tokenizer.ggml.eos_token_id"],
    })  # fmt: skip
    model = proto.ModelProto()
    names = ("tokens", "scores", "token_type")
    for text, score, kind in zip(*(keys[f"tokenizer.ggml.{n}"] for n in names), strict=True):
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.normalizer_spec.add_dummy_prefix = keys.get("tokenizer.ggml.add_space_prefix", True)
    model.normalizer_spec.remove_extra_whitespaces = False
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    return folder


# ---- whole models ----


def test_demo_comes_back(demo_model: Path, demo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo.gguf"
    write_gguf(demo_folder, out, "auto")
    keys, tensors = contents(out)
    wanted_keys, wanted = contents(demo_model)
    assert tensors.keys() == wanted.keys()
    assert all(np.array_equal(tensors[name], wanted[name]) for name in wanted)
    model = {k: v for k, v in wanted_keys.items() if k.startswith(("llama.", "tokenizer.ggml."))}
    assert {k: keys.get(k, v) for k, v in model.items()} == model
    assert keys["general.architecture"] == "llama" and keys["general.name"] == demo_folder.name
    with amber.Engine(demo_model) as one, amber.Engine(out) as two:
        prompt = "Once upon a time"
        options = {"temperature": 0, "max_tokens": 24}
        assert one.generate(prompt, **options).text == two.generate(prompt, **options).text


def test_quantized_folder_is_the_quantized_file(
    demo_model: Path, demo_folder: Path, tmp_path: Path
) -> None:
    one, two, plain = (tmp_path / f"{name}.gguf" for name in ("one", "two", "plain"))
    for source, out in ((demo_model, one), (demo_folder, two)):
        done = command(source, out, "--json", "-q")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["out_bytes"] == out.stat().st_size
    a, b = (
        {t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors} for path in (one, two)
    )
    embedding = "token_embd.weight"  # of another type
    assert a.keys() == b.keys() and all(a[name] == b[name] for name in a.keys() - {embedding})
    source = gguf.GGUFReader(two).fields["amber.source.name"].contents()
    assert source == demo_folder.name
    assert "bf16" in (done := command(demo_folder, plain, "--type", "bf16", "--json", "-q")).stdout
    assert done.returncode == 0
    assert contents(plain)[0]["general.file_type"] == int(gguf.LlamaFileType.MOSTLY_BF16)
    assert {p.name for p in tmp_path.iterdir()} == {"one.gguf", "two.gguf", "plain.gguf"}


def command(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "amber.quantize", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_published_folder(testdata: Path, tmp_path: Path) -> None:
    """A real folder (tokenizer.json with SentencePiece pieces) and the file others made of it."""
    out = tmp_path / "model.gguf"
    write_gguf(testdata / "models" / "tinystories-656k-hf", out, "f32")
    theirs = testdata / "models" / "tinystories-656k-f32.gguf"
    keys, tensors = contents(out)
    wanted_keys, wanted = contents(theirs)
    assert tensors.keys() == wanted.keys()
    assert all(np.array_equal(tensors[name], wanted[name]) for name in wanted)
    assert keys["tokenizer.ggml.tokens"] == wanted_keys["tokenizer.ggml.tokens"]
    text = (testdata / "text" / "tinystories-eval.txt").read_text()[:50_000]
    assert amber.Tokenizer(out).encode(text) == amber.Tokenizer(theirs).encode(text)


# ---- types ----


def test_types(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model")
    source = {name: t.bits() for name, t in read_folder(str(folder)).items()}
    out = tmp_path / "out.gguf"
    up = source["model.layers.0.mlp.up_proj.weight"]
    rounded = {
        "f32": up,
        "f16": up.astype(np.float16).astype(np.float32),
        "q8_0": gguf.quants.dequantize(
            gguf.quants.quantize(up, gguf.GGMLQuantizationType.Q8_0),
            gguf.GGMLQuantizationType.Q8_0,
        ),
    }
    for dtype, values in rounded.items():
        write_gguf(folder, out, dtype, synthetic_vocab=True)
        keys, tensors = contents(out)
        assert np.array_equal(tensors["blk.0.ffn_up.weight"], values)
        assert np.array_equal(
            tensors["blk.0.attn_norm.weight"], source["model.layers.0.input_layernorm.weight"]
        )
        assert len(keys["tokenizer.ggml.tokens"]) == 40
        assert np.array_equal(
            halves(tensors["blk.0.attn_q.weight"], 2).astype(np.float32),
            source["model.layers.0.self_attn.q_proj.weight"],
        ) == (dtype == "f32")

    write_gguf(folder, out, "bf16", synthetic_vocab=True)
    got, error = contents(out)[1]["blk.0.ffn_up.weight"], 2.0**-8 * np.abs(up)
    assert (np.abs(got - up) <= error).all() and (got != up).any()
    assert (got.view(np.uint32) & 0xFFFF == 0).all()


def test_stored_types(tmp_path: Path) -> None:
    """bfloat16, float64 and float16 in one folder; what a type cannot hold is refused."""
    rng = np.random.default_rng(1)
    up, gate = (rng.standard_normal((64, 32)).astype(np.float32) for _ in range(2))
    up = (up.view(np.uint32) & 0xFFFF0000).view(np.float32)
    down = rng.standard_normal((32, 64)).astype(np.float16)
    folder = tiny(tmp_path / "model", up_proj=bfloat16(up), gate_proj=gate.astype(np.float64),
                  down_proj=down)  # fmt: skip
    out = tmp_path / "out.gguf"
    for dtype in ("auto", "f32"):
        write_gguf(folder, out, dtype, synthetic_vocab=True)
        _, tensors = contents(out)
        assert np.array_equal(tensors["blk.0.ffn_up.weight"], up)
        assert np.array_equal(tensors["blk.0.ffn_gate.weight"], gate)
        assert np.array_equal(tensors["blk.0.ffn_down.weight"], down.astype(np.float32))
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out).tensors}
    assert set(kinds.values()) == {"F32"}
    gate[3, 4] = 1e6
    folder = tiny(tmp_path / "model", gate_proj=gate)
    with pytest.raises(amber.FileFormatError, match="f16 cannot hold"):
        write_gguf(folder, out, "f16", synthetic_vocab=True)
    assert not out.exists()
    write_gguf(folder, out, "bf16", synthetic_vocab=True)


def test_synthetic_vocabulary(tmp_path: Path) -> None:
    n = 300
    rows = np.ones((n, 32), np.float32)
    folder = tiny(tmp_path / "model", embed_tokens=rows, lm_head=rows)
    out = tmp_path / "out.gguf"
    with pytest.raises(amber.FileFormatError, match=r"tokenizer\.json"):
        write_gguf(folder, out)
    write_gguf(folder, out, "f32", synthetic_vocab=True)
    tokenizer = amber.Tokenizer(out)
    text = "Is this 日本?\n\0"
    assert len(tokenizer) == n and tokenizer.decode(tokenizer.encode(text)) == text
    assert not tokenizer.adds_bos and tokenizer.is_eog(tokenizer.eos)


# ---- what cannot be converted ----


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"architectures": ["BertModel"]}, amber.UnsupportedModelError, "BertModel.*LlamaFor"),
        ({"architectures": None}, amber.UnsupportedModelError, "missing"),
        ({"hidden_size": None}, amber.FileFormatError, "hidden_size"),
        ({"hidden_size": "32"}, amber.FileFormatError, "expected a number, found '32'"),
        ({"num_hidden_layers": -1}, amber.FileFormatError, "num_hidden_layers"),
        ({"num_hidden_layers": 9999}, amber.FileFormatError, "at most"),
        ({"num_attention_heads": 4}, amber.FileFormatError, r"k_proj.*= \[8, 32\].*\[16, 32\]"),
        ({"intermediate_size": 96}, amber.FileFormatError, "gate_proj.*feed_forward_length"),
        ({"head_dim": 15, "num_attention_heads": 2}, amber.FileFormatError, "q_proj"),
        ({"rms_norm_eps": None}, amber.FileFormatError, "rms_norm_eps"),
        ({"rms_norm_eps": 1e300}, amber.FileFormatError, "rms_norm_eps"),
        ({"rope_theta": 1e300}, amber.FileFormatError, "rope_theta"),
        ({"hidden_act": "relu"}, amber.UnsupportedModelError, "relu"),
        ({"rope_scaling": {"type": "ntk-by-parts"}}, amber.UnsupportedModelError, "ntk-by-parts"),
        ({"rope_scaling": 7}, amber.FileFormatError, "rope_scaling: expected an object"),
        ({"rope_scaling": {"type": "linear"}}, amber.FileFormatError, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, amber.FileFormatError, "factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, amber.FileFormatError, "low_freq"),
        ({"rope_scaling": {"type": "longrope"}}, amber.FileFormatError, "_factor"),
        ({"sliding_window": 8, "layer_types": ["sliding_attention"] * 2},
         amber.FileFormatError, "layer_types"),
    ],
)  # fmt: skip
def test_bad_configurations(
    tmp_path: Path, change: dict, error: type[Exception], words: str
) -> None:
    folder = tiny(tmp_path / "model", change)
    with pytest.raises(error, match=words):
        write_gguf(folder, tmp_path / "out.gguf", "f32", synthetic_vocab=True)
    assert not (tmp_path / "out.gguf").exists()


def test_bad_folders(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"

    def refused(folder: Path, words: str, error: type[Exception] = amber.FileFormatError) -> None:
        with pytest.raises(error, match=words):
            write_gguf(folder, out, "f32", synthetic_vocab=True)
        assert not out.exists()

    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, r"config\.json.*not found")
    (empty / "config.json").write_text("{")
    refused(empty, "expected JSON")
    write_json(empty / "config.json", [1])
    refused(empty, "JSON object")
    write_json(empty / "config.json", CONFIG)
    refused(empty, r"expected \*\.safetensors")

    folder = tiny(tmp_path / "model", q_proj=np.zeros((32, 32), np.int8))
    refused(folder, "type I8 cannot be converted", amber.UnsupportedModelError)
    refused(tiny(folder, embed_tokens=None), "expected an embedding")
    refused(tiny(folder, {"num_hidden_layers": 0}), "num_hidden_layers")
    tiny(folder)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for damaged, words in (
        (b"", "expected a header"),
        (whole[:7], "expected a header"),
        (whole[:40], "expected a header"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not fetched"),
        (whole[:-1], "cut short"),
        (struct.pack("<Q", 4) + b"[1 ]", "expected a JSON object"),
        (struct.pack("<Q", 4) + b"{{{{", "expected JSON"),
        (whole.replace(b"[64, 32]", b"[64, 33]"), "takes"),
        (whole.replace(b"[64, 32]", b"[-4, 32]"), "expected dtype, shape"),
        (whole.replace(b'"dtype": "F32"', b'"dtype": 12345'), "expected dtype, shape"),
        (whole.replace(b"mlp.up_proj", b"mlp.xx_proj"), "not a tensor of llama"),
        (whole.replace(b"layers.0.mlp.up", b"layers.7.mlp.up"), "not a tensor of llama"),
    ):
        file.write_bytes(damaged)
        unsupported = "not a tensor" in words
        refused(
            folder, words, amber.UnsupportedModelError if unsupported else amber.FileFormatError
        )
    file.write_bytes(whole)
    index = folder / "model.safetensors.index.json"
    for places, words in (
        ({"weight_map": 3}, "weight_map"),
        ({"weight_map": {"a": "../model.safetensors"}}, "in its folder"),
        ({"weight_map": {"a": "other.safetensors"}}, "not found"),
        ({"weight_map": {"a.weight": "model.safetensors"}}, r"a\.weight: expected by"),
    ):
        write_json(index, places)
        refused(folder, words)
    index.unlink()
    (folder / "copy.safetensors").write_bytes(whole)
    refused(folder, "found in another file too")
    with pytest.raises(amber.ArgumentError, match="dtype"):
        write_gguf(folder, out, "int4")


def test_command_refuses(demo_model: Path, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model")
    for args, words, code in (
        ((demo_model, "out.gguf", "--type", "f16"), "expected a Hugging Face folder", 2),
        ((folder, "out.gguf", "--type", "f16", "--permute"), "--type", 2),
        ((folder, "out.gguf"), "tokenizer.json", 1),
        ((tmp_path, "out.gguf"), "config.json", 1),
    ):
        done = command(*args[:1], tmp_path / args[1], *args[2:])
        assert done.returncode == code and words in done.stderr, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    tiny(folder, {"num_hidden_layers": 2})
    with pytest.raises(amber.FileFormatError, match="layer 1: expected the tensors of layer 0"):
        write_gguf(folder, tmp_path / "out.gguf", synthetic_vocab=True)
    # The engine reads the header before the weights are written.
    tiny(folder, {"max_position_embeddings": 2**31 - 1})
    with pytest.raises(amber.AmberError, match=r"model: .*context_length"):
        write_gguf(folder, tmp_path / "out.gguf", synthetic_vocab=True,
                   check=lambda name: q._prove(name, str(folder)))  # fmt: skip
    assert Folder(str(folder)).name() == "model"
