"""What `sparse=` and `--sparse` take (pattern, plan file, "auto", "off") as the engine's text."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ArgumentError

CRITERIA = ("act", "norm", "amber", "amber-b")  # and clact, for evaluation alone
SHIFTS = ("dpts", "dpts-median", "spts", "spts-channel", "lpts")  # a rule has one of them
MITIGATIONS = ("none", "var", *SHIFTS, "ls", "rsparse:R")

# One rule of a plan file: {"pattern": "8:16", "projections": ["q", "gate"], "layers": "0-18",
# "criterion": "amber", "mitigation": ["var"]}; all but the pattern may be left out.
_RULE_KEYS = {"pattern", "projections", "layers", "criterion", "mitigation"}

Sparse = str | os.PathLike | Mapping[str, Any] | None


def plan_text(sparse: Sparse, criterion: str | None = None, mitigation: str | None = None) -> str:
    """The engine's plan text.

    sparse: "off"; "auto" (the plan that a model file carries; none: dense); a pattern with an
        optional scope and methods such as "8:16", "8:16@all", "8:16/amber/var@q,gate#0-18"; a path
        ending in .json; or that file's content, {"rules": [...]}.
    criterion, mitigation: for all rules that do not name their own.

    Errors: ArgumentError, naming what was expected and found.
    """
    if sparse is None or sparse in ("auto", "off", ""):
        if criterion or mitigation:
            raise ArgumentError("criterion, mitigation: expected a sparsity pattern beside them")
        return "auto" if sparse == "auto" else "off"
    if isinstance(sparse, Mapping):
        return _from_rules(sparse, "plan", criterion, mitigation)
    name = os.fspath(sparse)
    if name.endswith(".json"):
        return _from_rules(_read(name), os.path.basename(name), criterion, mitigation)
    return ";".join(_with_methods(rule, criterion, mitigation) for rule in name.split(";"))


def _read(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise ArgumentError(f"{path}: expected a plan file, {error.strerror}") from error
    except ValueError as error:
        raise ArgumentError(f"{path}: expected JSON, found an error: {error}") from error


def _check_method(what: str, value: str, known: Sequence[str]) -> str:
    if value not in known and not ("rsparse:R" in known and re.fullmatch(r"rsparse:\d+", value)):
        raise ArgumentError(f"{what}: expected one of {', '.join(known)}, found {value!r}")
    return value


def _methods(criterion: str | None, mitigation: str | Sequence[str] | None) -> str:
    methods = [_check_method("criterion", criterion, (*CRITERIA, "clact"))] if criterion else []
    if isinstance(mitigation, str):
        mitigation = mitigation.replace("+", ",").split(",")
    methods += [_check_method("mitigation", m.strip(), MITIGATIONS) for m in mitigation or ()]
    return "".join("/" + method for method in methods if method != "none")


def _with_methods(rule: str, criterion: str | None, mitigation: str | None) -> str:
    cut = min((i for i in (rule.find("@"), rule.find("#")) if i >= 0), default=len(rule))
    named = "/" in rule[:cut]
    return rule if named else rule[:cut] + _methods(criterion, mitigation) + rule[cut:]


def _from_rules(plan: Any, where: str, criterion: str | None, mitigation: str | None) -> str:
    rules = plan.get("rules") if isinstance(plan, Mapping) else None
    if not isinstance(rules, list) or not rules:
        raise ArgumentError(f'{where}: expected {{"rules": [...]}} with at least one rule')
    texts = []
    for i, rule in enumerate(rules):
        if not isinstance(rule, Mapping) or not isinstance(rule.get("pattern"), str):
            raise ArgumentError(f'{where}: rule {i}: expected an object with a "pattern"')
        unknown = set(rule) - _RULE_KEYS
        if unknown:
            raise ArgumentError(
                f"{where}: rule {i}: expected {', '.join(sorted(_RULE_KEYS))}, "
                f"found {', '.join(sorted(unknown))}"
            )
        text = rule["pattern"] + _methods(
            rule.get("criterion", criterion), rule.get("mitigation", mitigation)
        )
        if rule.get("projections"):
            text += "@" + ",".join(rule["projections"])
        if "layers" in rule:
            layers = rule["layers"]
            text += "#" + (layers if isinstance(layers, str) else ",".join(map(str, layers)))
        texts.append(text)
    return ";".join(texts)
