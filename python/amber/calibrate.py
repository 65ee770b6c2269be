"""What amber-quantize measures and decides: calibration text, a plan's cost, the budgeted plan.

Cost is the KL divergence of the dense INT8 model from the sparse one, per token, on windows of a
calibration text by amber-eval's protocol (the second half of each window is scored).

The budgeted plan is the fastest within a cost, or the cheapest of some speed. A cell is one
projection in a group of neighbouring layers. Each cell runs sparse alone, with a few of the
patterns, and the KL of the patterns between is interpolated in its logarithm. Of each cell only the
patterns on the lower convex hull of (modelled time, KL) are kept; the steps along all hulls, sorted
by time saved per KL, make one sequence of ever faster plans. KLs of cells add up only roughly, so
what decides is a measurement: the longest start of the sequence whose whole plan stays within the
budget, found by halving. For a speed alone, the first start that has it.
"""

import argparse
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .engine import Engine, EngineInfo, memory_estimate
from .errors import AmberError, ArgumentError
from .eval import evaluate, log_softmax, read_text, row_blocks, window_logits
from .sensitivity import output_errors
from .sparse import plan_text
from .timing import PROJECTIONS, Cell, Pattern, Plan, TimeModel, read_pattern
from .tokenizer import Tokenizer

POLICY = ("q", "gate", "down")  # of arXiv 2508.02128; down everywhere, the others but where skipped
# Layers whose q and gate stay dense, by (layers, width, feed-forward width; of an expert in a
# mixture); as in engine/plan.c.
PRESETS = {
    (32, 4096, 14336): (19, 21, 28, 30, 31),  # Llama-3.1-8B
    (28, 3584, 18944): (0, 6, 23, 26, 27),  # Qwen2-7B
    (48, 2048, 768): (41, 46, 47),  # Qwen3-30B-A3B
}
AUTO_COVERAGE = (
    0.55  # share of the work that --skip auto leaves sparse at least (the paper's claim)
)
FAMILY = "8:16x4t2"
# Multiply-adds that the runs of one sensitivity study may take: some minutes on a small machine.
STUDY_WORK = 1e14
ERROR_WINDOWS = 2  # whose tokens tell the report's e_q
CACHE_BYTES = 1 << 29  # of dense logits that are kept for the study

Bars = Callable[[str, str], Any]  # (name, unit) -> a context manager that is progress(done, total)


# ---- plans as data ----


def work(info: EngineInfo, layer: int) -> dict[str, int]:
    """Multiplications per token of each projection of a layer."""
    return dict(zip(PROJECTIONS, info.work[layer], strict=True))


def preset(info: EngineInfo) -> tuple[int, ...]:
    """The paper's layers whose q and gate stay dense, where this is one of its models."""
    feed_forward = info.matrices[0][PROJECTIONS.index("up")][0]
    return PRESETS.get((info.n_layer, info.n_embd, feed_forward), ())


def layer_list(text: str) -> list[int]:
    """[0, 1, 2, 5] of "0-2,5". ValueError where it is not one."""
    layers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not found:
            raise ValueError(part)
        layers += range(int(found[1]), int(found[2] or found[1]) + 1)
    return layers


def expand(text: str, info: EngineInfo, skip: Iterable[int]) -> Plan:
    """What each projection of each layer does under a plan that the engine has accepted. skip:
    layers that a rule without projections leaves out for q and gate."""
    plan: Plan = {}
    skipped = set(skip)
    for rule in text.split(";"):
        head, _, layers = rule.partition("#")
        method, _, scope = head.partition("@")
        names = [name.strip() for name in scope.split(",")] if scope.strip() else []
        if "all" in names:
            names = list(PROJECTIONS)
        method = "".join(method.split())
        for layer in layer_list(layers) if layers.strip() else range(info.n_layer):
            for name in names or POLICY:
                if not names and name != "down" and layer in skipped:
                    continue
                plan[layer, name] = method
    return {cell: method for cell, method in plan.items() if method.split("/")[0] != "dense"}


def ranges(layers: Sequence[int]) -> str:
    """ "0-2,5" of sorted layers."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][1] == layer - 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def compact(plan: Plan) -> str:
    """The engine's text of a plan, in few rules; every rule names its projections and layers."""
    places: dict[tuple[str, str], list[int]] = {}
    for (layer, name), method in sorted(plan.items()):
        places.setdefault((method, name), []).append(layer)
    rules: dict[tuple[str, str], list[str]] = {}
    for (method, name), layers in places.items():
        rules.setdefault((method, ranges(layers)), []).append(name)
    return ";".join(
        f"{method}@{','.join(sorted(names, key=PROJECTIONS.index))}#{layers}"
        for (method, layers), names in rules.items()
    )


def coverage(plan: Plan, info: EngineInfo) -> float:
    """Share of the layers' multiplications that have a sparse operand."""
    sparse = sum(work(info, layer)[name] for layer, name in plan)
    return sparse / sum(map(sum, info.work))


# ---- text ----


def sample_text(engine: Engine, tokens: int, progress: Callable[[int, int], Any]) -> str:
    """About `tokens` tokens that the model writes from nothing, at temperature 1. The same model
    writes the same text on the same kernels."""
    tokenizer = engine.tokenizer
    start = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
    prompt = [start] if start is not None else engine.tokenize("\n")[:1]
    pieces: list[str] = []
    have = seed = 0
    while have < tokens:
        room = min(engine.info.n_ctx - len(prompt), max(tokens - have, 32))
        result = engine.generate(
            prompt, max_tokens=room, temperature=1, top_k=0, top_p=1, min_p=0, seed=seed
        )
        seed += 1
        if len(result.token_ids) < 8 and seed > 20 + tokens // 8:
            raise AmberError(
                "--calibrate self: the model ends every text at once (give it a text file)"
            )
        have += len(result.token_ids)
        pieces.append(result.text)
        progress(min(have, tokens), tokens)
    return "\n".join(pieces)


class Text:
    """The calibration text that the command line names, of one window at least."""

    def __init__(self, path: str, args: argparse.Namespace, bars: Bars) -> None:
        own = args.calibrate == "self"
        text = "" if own else read_text(args.calibrate)
        self.origin = "the model's own text" if own else os.path.basename(args.calibrate)
        with Engine(path, sparse="off", device="cpu", threads=args.threads) as engine:
            self.info = engine.info
            self.ctx = min(args.ctx, self.info.n_ctx)
            if own:
                with bars("own text", " tok") as bar:
                    text = sample_text(engine, args.chunks * self.ctx + 1, bar)
            self.text = text
            self.windows = cut(engine.tokenizer, text, self.ctx, args.chunks)
        if not self.windows:
            raise AmberError(
                f"--calibrate: expected at least {self.ctx} tokens for one window, found fewer "
                "(use a longer text or a smaller --ctx)"
            )


def cut(tokenizer: Tokenizer, text: str, ctx: int, chunks: int) -> list[list[int]]:
    """Windows of a text by amber-eval's protocol, at most `chunks`."""
    tokens = tokenizer.encode(text, add_special=True, parse_special=False)
    windows = [tokens[i * ctx : (i + 1) * ctx] for i in range(min(chunks, len(tokens) // ctx))]
    if tokenizer.adds_bos and tokenizer.bos is not None:
        for window in windows:
            window[0] = tokenizer.bos
    return windows


# ---- cost ----


class Reference:
    """The dense model's logits on some windows, to hold sparse runs against."""

    def __init__(self, path: str, text: str, ctx: int, chunks: int, threads: int | None) -> None:
        self.path, self.ctx, self.threads = path, ctx, threads
        with Engine(path, sparse="off", device="cpu", n_ctx=ctx, threads=threads) as engine:
            self.info = engine.info
            most = CACHE_BYTES // (4 * (ctx - ctx // 2) * self.info.n_vocab)
            self.windows = cut(engine.tokenizer, text, ctx, max(1, min(chunks, most)))
            with engine.session(n_ctx=ctx) as session:
                self.logits = [
                    window_logits(session, window, ctx // 2, i)
                    for i, window in enumerate(self.windows)
                ]

    def kl(self, plan: Plan) -> float:
        """Mean KL divergence of the model under a plan."""
        import numpy as np

        if not plan:
            return 0.0
        total, count = 0.0, 0
        with (
            Engine(
                self.path,
                sparse=compact(plan),
                device="cpu",
                n_ctx=self.ctx,
                threads=self.threads,
                evaluation=True,
            ) as engine,
            engine.session(n_ctx=self.ctx) as session,
        ):
            for i, (window, dense) in enumerate(zip(self.windows, self.logits, strict=True)):
                sparse = window_logits(session, window, self.ctx // 2, i)
                for begin, end in row_blocks(*dense.shape):
                    truth = log_softmax(dense[begin:end])
                    ours = log_softmax(sparse[begin:end])
                    total += float(np.sum(np.exp(truth) * (truth - ours)))
                count += len(dense)
        return max(total / count, 0.0)


@dataclass(slots=True)
class Choice:
    """A cell of the budgeted plan: a projection in some layers."""

    layers: list[int]
    projection: str
    patterns: list[Pattern]  # fewest first
    measured: dict[int, float]  # n -> KL when it alone runs sparse
    kl: list[float] = field(default_factory=list)  # of every pattern, interpolated

    def fill(self) -> None:
        """Interpolates ln KL in n, extends it at the ends, and makes it fall as n grows."""
        import numpy as np

        known = sorted(self.measured)
        logs = np.log([max(self.measured[n], 1e-12) for n in known])
        logs = np.minimum.accumulate(logs)
        self.kl = []
        for pattern in self.patterns:
            if len(known) > 1 and pattern.n > known[-1]:
                slope = (logs[-1] - logs[-2]) / (known[-1] - known[-2])
                value = logs[-1] + slope * (pattern.n - known[-1])
            elif len(known) > 1 and pattern.n < known[0]:
                slope = (logs[1] - logs[0]) / (known[1] - known[0])
                value = logs[0] + slope * (pattern.n - known[0])
            else:
                value = np.interp(pattern.n, known, logs)
            self.kl.append(math.exp(value))


def groups(n_layer: int, count: int) -> list[list[int]]:
    """The layers in `count` groups of neighbours."""
    return [list(range(n_layer * i // count, n_layer * (i + 1) // count)) for i in range(count)]


def study_groups(info: EngineInfo, tokens: int, runs_per_layer: int) -> int:
    """Groups of layers that a study with so many runs per group can tell apart."""
    runs = STUDY_WORK / (tokens * info.n_params)
    return max(1, min(info.n_layer, int(runs / runs_per_layer)))


def candidates(family: Pattern) -> list[Pattern]:
    """Patterns of a family between a quarter and dense, fewest first."""
    sizes = {family.m * n // 16 for n in (4, 6, 8, 10, 12, 14)} - {0, family.m}
    return [Pattern(n, family.m, family.suffix) for n in sorted(sizes)]


def cell_time(times: TimeModel, info: EngineInfo, cell: Cell, method: str) -> float:
    """Modelled time of one projection of one layer."""
    layer, i = cell[0], PROJECTIONS.index(cell[1])
    return times.projection(method, cell[1], info.work[layer][i], info.matrices[layer][i])


def steps(
    choices: Sequence[Choice], info: EngineInfo, times: TimeModel
) -> list[tuple[int, Pattern, float, float]]:
    """Steps (choice, its new pattern, KL added, time saved), the most time saved per KL first.
    Within a choice they follow its hull from dense to the fewest kept."""
    found = []
    for index, choice in enumerate(choices):

        def took(method: str, choice: Choice = choice) -> float:
            cells = [(il, choice.projection) for il in choice.layers]
            return sum(cell_time(times, info, cell, method) for cell in cells)

        dense = took("dense")
        points = [(0.0, 0.0, None)]  # time saved, KL, pattern; dense first
        for pattern, kl in reversed(list(zip(choice.patterns, choice.kl, strict=True))):
            point = (dense - took(str(pattern)), max(kl, points[-1][1]), pattern)
            if point[0] <= points[-1][0]:
                continue  # costs more and saves nothing
            while len(points) > 1 and _slope(points[-2], points[-1]) >= _slope(points[-1], point):
                points.pop()
            points.append(point)
        for before, after in zip(points, points[1:], strict=False):
            found.append((index, after[2], after[1] - before[1], after[0] - before[0]))
    return sorted(found, key=lambda step: step[2] / step[3])


def _slope(a: tuple[float, float, Any], b: tuple[float, float, Any]) -> float:
    """KL per time saved from a to b."""
    return (b[1] - a[1]) / (b[0] - a[0])


def plan_after(
    count: int, sequence: Sequence[tuple[int, Pattern, float, float]], choices: Sequence[Choice],
    methods: str,
) -> Plan:  # fmt: skip
    """The plan after the first `count` steps."""
    plan: Plan = {}
    for index, pattern, _, _ in sequence[:count]:
        choice = choices[index]
        plan |= {(il, choice.projection): f"{pattern}{methods}" for il in choice.layers}
    return plan


def longest(count: int, guess: int, fits: Callable[[int], bool]) -> int:
    """The largest n of 0..count that fits, where 0 does; fits() is asked near `guess` first."""
    low, high, stride = 0, count + 1, 1
    at = max(1, min(guess, count))
    while high - low > 1:
        if fits(at):
            low = at
        else:
            high = at
        if low and high <= count:
            at = (low + high) // 2
        else:  # one end is open yet: go on that way, in growing strides
            at = low + stride if low else high - stride
            stride *= 2
            at = max(low + 1, min(at, high - 1))
    return low


# ---- the wish and its fulfilment ----


@dataclass(frozen=True, slots=True)
class Budget:
    """What a plan may cost, and what it must gain; None: nothing is said."""

    max_kl: float | None = None  # nats per token, from the dense model
    max_ppl_increase: float | None = None  # percent of the dense model's perplexity
    min_speedup: float | None = None  # of the layers' projections, modelled

    @property
    def limits_cost(self) -> bool:
        return self.max_kl is not None or self.max_ppl_increase is not None

    @property
    def given(self) -> bool:
        return self.limits_cost or self.min_speedup is not None

    def allows(self, figures: dict[str, Any]) -> bool:
        """Whether amber-eval's figures against the dense model are within the cost."""
        change = 100 * (figures["perplexity"] / figures["reference_perplexity"] - 1)
        return (self.max_kl is None or figures["kl_mean"] <= self.max_kl) and (
            self.max_ppl_increase is None or change <= self.max_ppl_increase
        )

    def near(self, kl: float) -> bool:
        """Whether a plan of this KL is likely allowed: a perplexity rises by less than exp(KL)
        where the dense model is right about the text."""
        limit = math.inf if self.max_kl is None else self.max_kl
        if self.max_ppl_increase is not None:
            limit = min(limit, math.log1p(self.max_ppl_increase / 100))
        return kl <= limit


@dataclass(slots=True)
class Outcome:
    """What goes into the file and into the report."""

    keys: dict[str, Any]
    report: dict[str, Any]


@dataclass(slots=True)
class Vectors:
    """What the methods of a plan use, for the file."""

    keys: dict[str, Any]
    tensors: dict[str, Any]


class Wish:
    """What the command line asks of the plan."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.skip = args.skip
        self.times = TimeModel.read(args.times)
        self.budget = Budget(args.max_kl, args.max_ppl_increase, args.min_speedup)
        if self.budget.given:
            self.text = args.sparse or FAMILY
            rule = self.text.partition("#")[0]
            if ";" in self.text or self.text.endswith(".json"):
                raise ArgumentError("--sparse: expected one pattern to vary, found a plan")
            pattern, at, scope = rule.partition("@")
            family = read_pattern(pattern.split("/")[0])
            if not family:
                raise ArgumentError(
                    f"--sparse: expected a pattern N:M, N:Mx4 or N:Mx4t2 to vary, found {pattern!r}"
                )
            self.family = family
            full = plan_text(self.text, args.criterion, args.mitigation)
            self.methods = "".join(full.split("#")[0].split("@")[0].partition("/")[1:])
            self.scope = scope if at else "all"
            n = candidates(self.family)
            if not n:
                raise ArgumentError(f"--sparse: {self.text}: this pattern has no family of others")
            self.text = f"{n[0]}{self.methods}@{self.scope}" + self._layers_of(self.text)
        else:
            self.text = plan_text(args.sparse, args.criterion, args.mitigation)

    @staticmethod
    def _layers_of(text: str) -> str:
        return "".join(text.partition("#")[1:])

    def check(self, path: str) -> None:
        """Proves the file and the plan with the engine before any work is done."""
        memory_estimate(path, sparse=self.text)
        if self.skip not in (None, "preset", "auto"):
            try:
                layer_list(self.skip)
            except ValueError as error:
                raise ArgumentError(
                    f"--skip: expected preset, auto or layers such as 0,26-27, found {error}"
                ) from None

    def vectors(self, path: str, calibration: Text, bars: Bars) -> Vectors | None:
        """Makes the vectors that the plan's methods use, for the Amber GGUF at `path`; None where
        they use none. Learned ones are not made here: the file has them, or the plan is refused."""
        from . import smooth
        from .quantize import Source

        plan, info = expand(self.text, calibration.info, ()), calibration.info
        methods = {m for method in plan.values() for m in method.split("/")[1:]}
        static = sorted(methods & {"spts", "spts-channel"})
        ranks = sorted({m.partition(":")[2] for m in methods if m.startswith("rsparse:")})
        if len(static) > 1 or len(ranks) > 1:
            raise ArgumentError(
                "--mitigation: expected one kind of static shift and one rank in a file, found "
                + ", ".join(static + [f"rsparse:{rank}" for rank in ranks])
            )
        if not static and not ranks:
            return None
        made = Vectors({}, {})
        if static:
            with bars("activations", "window") as bar:
                found = smooth.statistics(path, calibration.windows, self.args.threads, bar)
            made.tensors |= smooth.shifts(found, static[0])
            made.keys["amber.shift"] = static[0]
        if ranks:
            shapes = {c: info.matrices[c[0]][PROJECTIONS.index(c[1])] for c in plan}
            with bars("factors", "matrix") as bar:
                made.tensors |= smooth.factors(Source(path), shapes, int(ranks[0]), bar)
        return made

    def carry_out(self, path: str, calibration: Text, bars: Bars) -> Outcome:
        """Decides on the plan for the Amber GGUF at `path` and measures it."""
        text, origin = calibration.text, calibration.origin
        info, ctx = calibration.info, calibration.ctx
        if not self.budget.given:
            plan, study = self._fixed(path, text, ctx, info, bars)
            result = self._measure(path, plan, text, ctx, bars)
        else:
            plan, study, result = self._budgeted(path, text, ctx, info, bars)
        plan_line = compact(plan) if plan else "off"
        numbers = {
            "perplexity": result["perplexity"],
            "dense_perplexity": result["reference_perplexity"],
            "kl_mean": result["kl_mean"],
            "kl_p99": result["kl_p99"],
            "top1_agreement": result["top1_agreement"],
            "tokens": result["tokens"],
            "ctx": ctx,
        }
        keys: dict[str, Any] = {
            "amber.plan": plan_line,
            "amber.plan.coverage": coverage(plan, info),
            "amber.plan.modelled_time": self.times.plan(plan, info),
            "amber.plan.calibration": origin,
        }
        keys |= {f"amber.plan.{name}": value for name, value in numbers.items()}
        report = {
            "sparse": result["sparse"],
            "plan": plan_line,
            "time_model": self.times.name,
            "coverage": coverage(plan, info),
            "modelled_time": self.times.plan(plan, info),
            **asdict(self.budget),
            "calibration": origin,
            **numbers,
            "layers": self._layers(path, plan, calibration, bars, study.pop("costs", {})),
            **study,
        }
        return Outcome(keys, report)

    def _layers(
        self, path: str, plan: Plan, calibration: Text, bars: Bars, costs: dict[Cell, float]
    ) -> list[dict[str, Any]]:
        """By layer: coverage, modelled time over dense, and by projection the pattern, e_q,
        modelled time over dense and, where it was studied, the KL of this projection alone."""
        info = calibration.info
        errors: dict[Cell, float] = {}
        if plan:
            with bars("output errors", "window") as bar:
                windows = calibration.windows[:ERROR_WINDOWS]
                errors = output_errors(
                    path, compact(plan), plan, windows, self.args.threads, progress=bar
                )
        rows = []
        for il in range(info.n_layer):
            each = work(info, il)
            names = [name for name in PROJECTIONS if (il, name) in plan]
            dense = {name: cell_time(self.times, info, (il, name), "dense") for name in each}
            took = dense | {
                name: cell_time(self.times, info, (il, name), plan[il, name]) for name in names
            }
            rows.append(
                {"layer": il, "coverage": sum(each[name] for name in names) / sum(each.values())}
                | {"modelled_time": sum(took.values()) / sum(dense.values())}
                | {name: plan.get((il, name), "dense") for name in PROJECTIONS}
                | {"e_q": {name: errors.get((il, name)) for name in names}}
                | {"time": {name: took[name] / dense[name] for name in names if dense[name]}}
                | {"kl": {name: costs.get((il, name)) for name in names}}
            )
        return rows

    def _measure(self, path: str, plan: Plan, text: str, ctx: int, bars: Bars) -> dict[str, Any]:
        """amber-eval's figures of a plan against the dense model."""
        common = {"n_ctx": ctx, "threads": self.args.threads, "device": "cpu"}
        with (
            Engine(path, sparse=compact(plan) if plan else "off", **common) as engine,
            Engine(path, sparse="off", **common) as dense,
            bars("measuring", "window") as bar,
        ):
            share = engine.info.coverage
            if abs(share - coverage(plan, engine.info)) > 1e-9:
                raise AssertionError(f"plan {compact(plan)}: coverage {share}")
            result = evaluate(
                engine, text, ctx=ctx, chunks=self.args.chunks, against=dense,
                progress=lambda done, total, _: bar(done, total),
            )  # fmt: skip
            return asdict(result) | {"sparse": engine.info.sparse}

    # ---- a plan that was given ----

    def _fixed(
        self, path: str, text: str, ctx: int, info: EngineInfo, bars: Bars
    ) -> tuple[Plan, dict[str, Any]]:
        if self.skip == "auto":
            return self._auto(path, text, ctx, bars)
        skip = preset(info) if self.skip in (None, "preset") else layer_list(self.skip)
        if max(skip, default=0) >= info.n_layer:
            raise ArgumentError(
                f"--skip: expected layers within 0-{info.n_layer - 1}, found {max(skip)}"
            )
        return expand(self.text, info, skip), {"skipped": sorted(skip)}

    def _auto(self, path: str, text: str, ctx: int, bars: Bars) -> tuple[Plan, dict[str, Any]]:
        """Leaves q and gate dense in the layers where they cost most, as long as the coverage stays
        at the paper's."""
        reference = Reference(path, text, ctx, self.args.chunks, self.args.threads)
        info = reference.info
        plan = expand(self.text, info, ())
        tokens = ctx * len(reference.windows)
        parts = groups(info.n_layer, study_groups(info, tokens, 1))
        costs = []
        with bars("sensitivity", "run") as bar:
            for i, layers in enumerate(parts):
                alone = {c: m for c, m in plan.items() if c[0] in layers and c[1] in ("q", "gate")}
                costs.append((reference.kl(alone), layers))
                bar(i + 1, len(parts))
        skip: list[int] = []
        for _, layers in sorted(costs, key=lambda cost: -cost[0]):
            smaller = expand(self.text, info, skip + layers)
            if coverage(smaller, info) >= AUTO_COVERAGE:
                skip, plan = skip + layers, smaller
        study = [{"layers": layers, "projections": "q,gate", "kl": kl} for kl, layers in costs]
        return plan, {"skipped": sorted(skip), "sensitivity": study}

    # ---- a plan within a budget ----

    def _budgeted(
        self, path: str, text: str, ctx: int, info: EngineInfo, bars: Bars
    ) -> tuple[Plan, dict[str, Any], dict[str, Any]]:
        reference = Reference(path, text, ctx, self.args.chunks, self.args.threads)
        patterns = candidates(self.family)
        probes = sorted({patterns[i] for i in (0, len(patterns) // 2, -1)}, key=lambda p: p.n)
        allowed = expand(self.text, info, ())
        names = [name for name in PROJECTIONS if any(cell[1] == name for cell in allowed)]
        tokens = ctx * len(reference.windows)
        count = study_groups(info, tokens, len(names) * len(probes))
        choices = [
            Choice([il for il in layers if (il, name) in allowed], name, patterns, {})
            for layers in groups(info.n_layer, count)
            for name in names
        ]
        choices = [choice for choice in choices if choice.layers]
        runs = [(choice, probe) for choice in choices for probe in probes]
        with bars("sensitivity", "run") as bar:
            for i, (choice, probe) in enumerate(runs):
                alone = {(il, choice.projection): f"{probe}{self.methods}" for il in choice.layers}
                choice.measured[probe.n] = reference.kl(alone)
                bar(i + 1, len(runs))
        for choice in choices:
            choice.fill()
        sequence = steps(choices, info, self.times)
        sums = [0.0]
        for step in sequence:
            sums.append(sums[-1] + step[2])
        guess = max(i for i, kl in enumerate(sums) if self.budget.near(kl))
        tried: dict[int, dict[str, Any]] = {}

        def fits(n: int) -> bool:
            plan = plan_after(n, sequence, choices, self.methods)
            tried[n] = self._measure(path, plan, text, ctx, bars)
            return self.budget.allows(tried[n])

        def speed(n: int) -> float:
            return 1 / self.times.plan(plan_after(n, sequence, choices, self.methods), info)

        best = longest(len(sequence), guess, fits) if self.budget.limits_cost else len(sequence)
        wanted = self.budget.min_speedup
        if wanted is not None and speed(best) < wanted:
            within = " within the budget" if self.budget.limits_cost else ""
            raise AmberError(
                f"--min-speedup {wanted:g}: the fastest plan of {self.family.m}{self.family.suffix}"
                f"{within} is {speed(best):.2f} times as fast as dense (allow more, or choose "
                "another family with --sparse)"
            )
        if wanted is not None and not self.budget.limits_cost:
            best = next(n for n in range(len(sequence) + 1) if speed(n) >= wanted)
        plan = plan_after(best, sequence, choices, self.methods)
        result = tried.get(best) or self._measure(path, plan, text, ctx, bars)
        study = {
            "predicted_kl": sums[best],
            "costs": {
                (il, choice.projection): choice.kl[choice.patterns.index(pattern)]
                / len(choice.layers)
                for index, pattern in {step[0]: step[1] for step in sequence[:best]}.items()
                for choice in [choices[index]]
                for il in choice.layers
            },
            "tried": [
                {"steps": n, "predicted_kl": sums[n], "kl_mean": tried[n]["kl_mean"]}
                for n in sorted(tried)
            ],
            "sensitivity": [
                {
                    "layers": choice.layers,
                    "projection": choice.projection,
                    "kl": {str(Pattern(n, self.family.m, self.family.suffix)): kl
                           for n, kl in sorted(choice.measured.items())},
                }
                for choice in choices
            ],
        }  # fmt: skip
        return plan, study, result
