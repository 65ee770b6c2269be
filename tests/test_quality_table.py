"""tools/quality_table.py: the committed texts are what its figures say."""

import json

import pytest

import quality_table as tool
from conftest import ROOT

RESULTS = ROOT / "tools" / "results"


def rows(name: str) -> list[dict]:
    return json.loads((RESULTS / f"quality-{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["demo", "3m"])
def test_tables(name: str) -> None:
    text = "\n".join(tool.tables(rows(name))) + "\n"
    assert text == (RESULTS / f"quality-{name}.md").read_text(encoding="utf-8")
    assert text.count("budgeted") >= 6 and text.count("in order") >= 20


def test_claims() -> None:
    """And each verdict is of the figures: with the patterns' costs swapped, "yes" becomes "no"."""
    models = {name: rows(name) for name in ("demo", "3m")}
    text = "\n".join(tool.claims(models)) + "\n"
    assert text == (RESULTS / "quality.md").read_text(encoding="utf-8")
    assert text.splitlines()[8].count("**yes**") == 2
    for row in models["demo"]:
        row["kl_mean"] = 1 / (1e-9 + row["kl_mean"])
    swapped = list(tool.claims(models))[-len(tool.CLAIMS) :]
    assert "**no**" in swapped[0] and "**yes**" in swapped[0]
