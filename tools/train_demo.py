#!/usr/bin/env python3
"""Train a small story-telling Llama on a CPU and write it as GGUF.

    python tools/train_demo.py --corpus TEXTS --out demo.gguf --minutes 60 --work /tmp/demo

TEXTS is a folder of plain-text files: a blank line between paragraphs, two blank lines between
books. heldout.txt, or else the last 5 % of all text, is kept out of training and measures the
result. Needs torch, numpy, sentencepiece and gguf; with g++ on the path it runs twice as fast.

The learning rate follows the clock: it is warmed up, held, and decayed to almost nothing when
the minutes are over. A stopped run goes on with --resume, a running one can be exported from
its last checkpoint with --export-only. Progress goes to stderr, one line of JSON to stdout.

Letters in shape comments: B rows, T positions, D width, H heads, G key/value heads, E head size,
F feed-forward width, V vocabulary.
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import sentencepiece as spm
import torch
import torch.nn.functional as F
from torch import nn

UNK, BOS, EOS = 0, 1, 2
SHORT, LONG = 256, 1024  # row lengths; LONG is the context of the model
LONG_FROM = 0.67  # the part of the time after which rows are LONG
STEP_TOKENS = 8192
WARMUP_STEPS = 100
DECAY_FROM = 0.4  # the part of the time after which the learning rate falls
MUON_LR, ADAM_LR = 0.02, 0.003
CHECKPOINT_SECONDS = 300
PROMPTS = ("Once upon a time", "The old king", '"Where are you going?" said the')


@dataclass(frozen=True)
class Config:
    vocab: int = 4096
    width: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 768
    context: int = LONG
    eps: float = 1e-5
    rope_base: float = 10000.0

    @property
    def head_size(self):
        return self.width // self.heads


# ---------------------------------------------------------------------------------------- text


def read_corpus(folder):
    """The training text and the held-out text of a folder, each as a list of books."""
    files = sorted(Path(folder).glob("*.txt"))
    if not files:
        raise SystemExit(f"error: no .txt files in {folder}")
    texts = {f.name: f.read_text(encoding="utf-8").strip("\n") for f in files}
    held = texts.pop("heldout.txt", None)
    train = "\n\n\n".join(texts.values())
    if held is None:
        cut = train.find("\n\n", int(len(train) * 0.95))
        train, held = train[:cut], train[cut:].strip("\n")
    return re.split(r"\n{3,}", train), re.split(r"\n{3,}", held)


def train_tokenizer(books, path, vocab):
    """A byte-fallback BPE model in SentencePiece's format.

    No piece holds a newline, so "\\n" is always the byte token <0x0A>: the one spelling that
    SentencePiece and readers of GGUF's "llama" tokenizer agree on. Nothing is normalized, so
    text survives encoding and decoding unchanged.
    """
    lines = (line for book in books for line in book.split("\n") if line)
    with open(path, "wb") as f:
        spm.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=f, model_type="bpe", vocab_size=vocab,
            byte_fallback=True, add_dummy_prefix=True, remove_extra_whitespaces=False,
            normalization_rule_name="identity", character_coverage=1.0, split_digits=True,
            max_sentence_length=16384, unk_id=UNK, bos_id=BOS, eos_id=EOS, pad_id=-1,
            minloglevel=1,
        )  # fmt: skip


def is_heading(paragraph):
    """Whether a paragraph looks like the title of a story or chapter."""
    return (
        len(paragraph) < 64
        and "\n" not in paragraph
        and (paragraph.isupper() or paragraph[-1].isalnum())
        and paragraph[0].isupper()
    )


class Stream:
    """Books as one array of token ids that rows of any length are cut from.

    A paragraph is written in two ways: as it goes on after a line break, and as it begins a text,
    where the tokenizer puts a space in front. A row starts with BOS, and half of the rows start
    a paragraph behind it: so a prompt looks like what the model was trained on, wherever in a
    story it begins. The stream itself has EOS and BOS between books, and before every second
    heading if `rng` is given, so that stories end.
    """

    def __init__(self, tokenizer, books, rng=None):
        ids, end, opening, opening_at = [], [], [], [0]
        newline = tokenizer.piece_to_id("<0x0A>")
        size = 0
        for book in books:
            paragraphs = [p.strip("\n") for p in book.split("\n\n") if p.strip()]
            first = tokenizer.encode(paragraphs)
            # Behind a newline there is no added space: encode one, drop it and what leads it.
            later = tokenizer.encode(["\n" + p for p in paragraphs])
            for i, p in enumerate(paragraphs):
                begins = i == 0 or (rng is not None and is_heading(p) and rng.random() < 0.5)
                lead = [EOS, BOS] if begins else [newline, newline]
                body = first[i] if begins else later[i][later[i].index(newline) + 1 :]
                ids.append(np.array(lead + body, dtype=np.int16))
                opening.append(np.array(first[i], dtype=np.int16))
                size += len(ids[-1])
                end.append(size)
                opening_at.append(opening_at[-1] + len(first[i]))
        self.ids = np.concatenate(ids)
        self.end = np.array(end)  # of every paragraph
        self.opening = np.concatenate(opening)
        self.opening_at = np.array(opening_at)

    def row(self, start, n, aligned):
        """BOS and n tokens from `start` on, or from the next paragraph on if `aligned`: [n + 1]."""
        p = int(np.searchsorted(self.end, start)) + 1  # the paragraph behind the one at `start`
        if not aligned or p >= len(self.end) or self.end[p] + n > len(self.ids):
            return np.concatenate(([BOS], self.ids[start : start + n]))
        head = self.opening[self.opening_at[p] : self.opening_at[p + 1]]
        rest = self.ids[self.end[p] : self.end[p] + n]
        return np.concatenate(([BOS], head, rest))[: n + 1]

    def batches(self, rows, n, rng):
        """Endless [rows, n + 1] batches; each pass over the stream cuts and shuffles anew."""
        while True:
            starts = np.arange(rng.integers(n), len(self.ids) - n, n)
            if len(starts) < rows:
                raise SystemExit("error: the corpus is too small to train on")
            rng.shuffle(starts)
            for i in range(0, len(starts) - rows + 1, rows):
                batch = [self.row(s, n, rng.random() < 0.5) for s in starts[i : i + rows]]
                yield torch.from_numpy(np.stack(batch).astype(np.int64))


# --------------------------------------------------------------------------------------- model


def rope_tables(config, device="cpu"):
    """cos and sin of each position and pair, every value twice: [T, E] each."""
    e = config.head_size
    freq = config.rope_base ** (-torch.arange(0, e, 2, dtype=torch.float64) / e)
    angle = torch.outer(torch.arange(config.context, dtype=torch.float64), freq)
    angle = angle.repeat_interleave(2, dim=1).to(device)
    return angle.cos().float(), angle.sin().float()


def pair_rotation(e):
    """The matrix [E, E] that turns (a, b) into (-b, a) in every pair of channels 2i, 2i + 1."""
    m = torch.zeros(e, e)
    even = torch.arange(0, e, 2)
    m[even + 1, even] = -1.0
    m[even, even + 1] = 1.0
    return m


class Block(nn.Module):
    """One layer, its weights named as GGUF names them."""

    def __init__(self, c):
        super().__init__()
        kv = c.kv_heads * c.head_size
        self.c = c
        self.attn_norm = nn.RMSNorm(c.width, eps=c.eps)
        self.attn_q = nn.Linear(c.width, c.width, bias=False)
        self.attn_k = nn.Linear(c.width, kv, bias=False)
        self.attn_v = nn.Linear(c.width, kv, bias=False)
        self.attn_output = nn.Linear(c.width, c.width, bias=False)
        self.ffn_norm = nn.RMSNorm(c.width, eps=c.eps)
        self.ffn_gate = nn.Linear(c.width, c.ffn, bias=False)
        self.ffn_up = nn.Linear(c.width, c.ffn, bias=False)
        self.ffn_down = nn.Linear(c.ffn, c.width, bias=False)

    def attention(self, x, rope):
        """x [B, T, D] -> [B, T, D], causal, with RoPE on the pairs of channels (2i, 2i + 1)."""
        b, t, _ = x.shape
        cos, sin, rotation = rope
        heads = lambda y: y.view(b, t, -1, self.c.head_size).transpose(1, 2)  # noqa: E731
        q, k, v = heads(self.attn_q(x)), heads(self.attn_k(x)), heads(self.attn_v(x))
        q, k = ((y * cos + (y @ rotation) * sin).to(v.dtype) for y in (q, k))
        group = self.c.heads // self.c.kv_heads
        k, v = (y.repeat_interleave(group, dim=1) for y in (k, v))  # [B, H, T, E]
        if t <= SHORT:  # compiled, this form is faster than the library's on a CPU
            scores = (q @ k.transpose(2, 3)).float() / math.sqrt(self.c.head_size)
            future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
            y = scores.masked_fill(future, -1e30).softmax(-1).to(v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attn_output(y.transpose(1, 2).reshape(b, t, -1))

    def forward(self, x, rope):
        """x [B, T, D] -> [B, T, D]"""
        x = x + self.attention(self.attn_norm(x), rope)
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


class Llama(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.token_embd = nn.Embedding(c.vocab, c.width)  # also the output head
        self.blk = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.output_norm = nn.RMSNorm(c.width, eps=c.eps)
        cos, sin = rope_tables(c)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("rotation", pair_rotation(c.head_size), persistent=False)
        for name, p in self.named_parameters():
            if name.endswith(("attn_output.weight", "ffn_down.weight")):
                nn.init.zeros_(p)  # every layer starts as the identity
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02 if "embd" in name else 0.5 / math.sqrt(c.width))

    def forward(self, ids):
        """ids [B, T] -> logits [B, T, V]"""
        t = ids.shape[1]
        x = self.token_embd(ids)
        for block in self.blk:
            x = block(x, (self.cos[:t], self.sin[:t], self.rotation))
        return F.linear(self.output_norm(x), self.token_embd.weight)

    def loss(self, rows):
        """rows [B, T + 1] -> mean nats per predicted token"""
        logits = self(rows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


# ------------------------------------------------------------------------------------ training


class Run:
    """A model in training: its optimizers, its clock and its checkpoint file."""

    def __init__(self, model, minutes, path):
        hidden = [p for n, p in model.named_parameters() if p.dim() == 2 and "blk" in n]
        other = [p for n, p in model.named_parameters() if p.dim() == 1 or "blk" not in n]
        self.model, self.seconds, self.path = model, minutes * 60, path
        self.optimizers = [
            torch.optim.Muon(hidden, lr=MUON_LR, weight_decay=0.05),
            torch.optim.AdamW(other, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.step = self.tokens = self.elapsed = 0
        self.train_loss = float("nan")

    def save(self):
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "counters": (self.step, self.tokens, self.elapsed, self.train_loss),
        }
        torch.save(state, f"{self.path}.tmp")
        os.replace(f"{self.path}.tmp", self.path)

    def load(self):
        state = torch.load(self.path)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self.elapsed, self.train_loss = state["counters"]

    def update(self, loss):
        """One step of both optimizers along the gradient of `loss`."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        left = max(1 - self.elapsed / self.seconds, 0) / (1 - DECAY_FROM)
        factor = min((self.step + 1) / WARMUP_STEPS, left, 1.0)
        for optimizer, lr in zip(self.optimizers, (MUON_LR, ADAM_LR), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * max(factor, 0.01)
            optimizer.step()
            optimizer.zero_grad()

    def train(self, stream, evaluate, seed, compile_model):
        """Train until the time is used up, with a checkpoint and an evaluation now and then."""
        loss_of = self.model.loss
        if compile_model:
            loss_of = torch.compile(loss_of, dynamic=False)
        begun = time.monotonic() - self.elapsed
        saved = logged = self.elapsed
        batches, length, recent = None, 0, []
        while self.elapsed < self.seconds:
            wanted = SHORT if self.elapsed < LONG_FROM * self.seconds else LONG
            if wanted != length:
                length = wanted
                rng = np.random.default_rng((seed, self.step))
                batches = stream.batches(STEP_TOKENS // length, length, rng)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(next(batches))
            self.update(loss)
            recent.append(loss.item())
            self.step += 1
            self.tokens += STEP_TOKENS
            self.elapsed = time.monotonic() - begun
            if self.elapsed - logged > 20:
                self.train_loss = float(np.mean(recent[-200:]))
                log(
                    f"{self.elapsed / 60:5.1f} min  step {self.step:5d}  "
                    f"{self.tokens / 1e6:6.2f} M tokens  train {np.mean(recent[-25:]):.3f}"
                )
                logged = self.elapsed
            if self.elapsed - saved > CHECKPOINT_SECONDS:
                self.save()
                nats, bits = evaluate(length, 64 * SHORT // length)
                log(f"heldout {nats:.3f} nats/token, {bits:.3f} bits/byte (rows of {length})")
                saved = self.elapsed
        self.save()


def heldout_loss(model, ids, token_bytes, length=LONG, windows=None):
    """(nats per token, bits per byte) of BOS and length - 1 tokens at a time, each scored."""
    n = length - 1
    starts = np.arange(0, len(ids) - n, n)
    if windows:  # spread over the text
        starts = starts[:: max(1, len(starts) // windows)][:windows]
    nats = 0.0
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        for some in np.array_split(starts, math.ceil(len(starts) * length / STEP_TOKENS)):
            rows = np.stack([np.concatenate(([BOS], ids[s : s + n])) for s in some])
            rows = torch.from_numpy(rows.astype(np.int64))
            nats += model.loss(rows).item() * len(some) * n
    size = sum(int(token_bytes[ids[s : s + n]].sum()) for s in starts)
    return nats / (len(starts) * n), nats / size / math.log(2)


@torch.inference_mode()
def sample(model, tokenizer, prompt, n, temperature, seed=1):
    """The prompt and up to n more tokens as text; temperature 0 takes the likeliest."""
    generator = torch.Generator().manual_seed(seed)
    ids = [BOS, *tokenizer.encode(prompt)]
    while n > 0 and ids[-1] != EOS:
        logits = model(torch.tensor([ids]))[0, -1].float()
        if temperature > 0:
            p = (logits / temperature).softmax(-1)
            ids.append(int(torch.multinomial(p, 1, generator=generator)))
        else:
            ids.append(int(logits.argmax()))
        n -= 1
    return tokenizer.decode(ids)


# -------------------------------------------------------------------------------------- export


def token_type(tokenizer, i):
    if tokenizer.is_unknown(i):
        return gguf.TokenType.UNKNOWN
    if tokenizer.is_control(i):
        return gguf.TokenType.CONTROL
    return gguf.TokenType.BYTE if tokenizer.is_byte(i) else gguf.TokenType.NORMAL


def export(model, tokenizer, path, kind, license_name):
    """Write a GGUF file: matrices as `kind`, norms as F32. The file appears whole or not at all."""
    c = model.c
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    w = gguf.GGUFWriter(unfinished, "llama")
    w.add_name("Amber demo stories")
    w.add_description(
        "A small English story model trained from scratch on public-domain children's books. "
        "It continues stories; it does not follow instructions."
    )
    w.add_license(license_name)
    w.add_context_length(c.context)
    w.add_embedding_length(c.width)
    w.add_block_count(c.layers)
    w.add_feed_forward_length(c.ffn)
    w.add_rope_dimension_count(c.head_size)
    w.add_head_count(c.heads)
    w.add_head_count_kv(c.kv_heads)
    w.add_layer_norm_rms_eps(c.eps)
    w.add_rope_freq_base(c.rope_base)
    w.add_vocab_size(c.vocab)
    w.add_file_type({"f32": 0, "f16": 1, "q8_0": 7}[kind])
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)

    ids = range(c.vocab)
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list([tokenizer.id_to_piece(i).encode() for i in ids])
    w.add_token_scores([tokenizer.get_score(i) for i in ids])
    w.add_token_types([token_type(tokenizer, i) for i in ids])
    w.add_unk_token_id(UNK)
    w.add_bos_token_id(BOS)
    w.add_eos_token_id(EOS)
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    w.add_add_space_prefix(True)

    matrix = gguf.GGMLQuantizationType[kind.upper()]
    for name, tensor in model.state_dict().items():
        tensor_type = matrix if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(tensor.float().numpy(), tensor_type)
        w.add_tensor(name, data, raw_dtype=tensor_type)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    os.replace(unfinished, path)


# ---------------------------------------------------------------------------------------- main


def log(text):
    print(text, file=sys.stderr, flush=True)


def parse_args():
    p = argparse.ArgumentParser(
        description="Train a small story-telling Llama on a CPU and write it as GGUF."
    )
    p.add_argument("--corpus", required=True, type=Path, metavar="DIR", help="folder of .txt files")
    p.add_argument("--out", required=True, type=Path, metavar="FILE", help="the .gguf to write")
    p.add_argument("--work", required=True, type=Path, metavar="DIR",
                   help="keeps the tokenizer and the checkpoint")  # fmt: skip
    p.add_argument("--minutes", type=float, default=60, help="of training (default 60)")
    p.add_argument("--type", choices=("q8_0", "f16", "f32"), default="q8_0")
    p.add_argument("--license", default="mit", help="general.license of the file (default mit)")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    p.add_argument("--export-only", action="store_true", help="write the checkpoint as GGUF, stop")
    p.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    return p.parse_args()


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    vocabulary = args.work / "tokenizer.model"
    go_on = args.resume or args.export_only

    train_books, held_books = read_corpus(args.corpus)
    model = Llama(Config())
    if not go_on:
        train_tokenizer(train_books, vocabulary, model.c.vocab)
    tokenizer = spm.SentencePieceProcessor(model_file=str(vocabulary))
    run = Run(model, args.minutes, args.work / "checkpoint.pt")
    if go_on:
        run.load()

    held = Stream(tokenizer, held_books).ids
    token_bytes = np.array([
        0 if i <= EOS else 1 if tokenizer.is_byte(i) else
        len(tokenizer.id_to_piece(i).replace("\u2581", " ").encode())
        for i in range(model.c.vocab)
    ])  # fmt: skip
    evaluate = partial(heldout_loss, model, held, token_bytes)

    parameters = sum(p.numel() for p in model.parameters())
    if not args.export_only:
        stream = Stream(tokenizer, train_books, np.random.default_rng(args.seed))
        log(f"{parameters} parameters, {len(stream.ids)} training tokens, {len(held)} held out")
        compile_model = not args.no_compile and shutil.which("g++") is not None
        run.train(stream, evaluate, args.seed, compile_model)
    export(model, tokenizer, args.out, args.type, args.license)
    nats, bits = evaluate(LONG, 64 if args.export_only else None)
    for prompt in PROMPTS:
        log(f"---- {sample(model, tokenizer, prompt, 100, temperature=0.8)}")
    print(
        json.dumps({
            "file": str(args.out), "bytes": args.out.stat().st_size, "parameters": parameters,
            "steps": run.step, "tokens": run.tokens, "minutes": round(run.elapsed / 60, 1),
            "train_loss": round(run.train_loss, 4), "heldout_loss": round(nats, 4),
            "heldout_bits_per_byte": round(bits, 4),
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
