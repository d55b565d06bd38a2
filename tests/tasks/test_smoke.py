"""``dnsp tasks run all --scale smoke`` and its report, as a user types them."""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dnsp.tasks.suite import ABLATIONS, MODELS, PITFALLS
from tests.ranks import python_path

ROOT = Path(__file__).resolve().parents[2]
CPU_SECONDS = 2 * 360  # 6 minutes on 2 cores; the time of a machine that others use too says nothing
MARGIN = 20.0  # points of accuracy
PATIENCE = 2400.0


def dnsp(*arguments: str, cwd: Path) -> str:
    environ = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "dnsp", *arguments], cwd=cwd, env=environ, capture_output=True, text=True,
        timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_everything_in_six_minutes(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = dnsp("tasks", "run", "all", "--scale", "smoke", "--device", "cpu", "--out", "all", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "finished after" in said
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_SECONDS
    out = tmp_path / "all"
    results: dict[str, dict[str, Any]] = {
        p.parent.relative_to(out / "runs").as_posix(): json.loads(p.read_text(), parse_constant=pytest.fail)
        for p in out.rglob("result.json")
    }
    assert len(results) == json.loads((out / "queue.json").read_text())["total"]
    assert not list(out.rglob("checkpoints"))

    said = dnsp("report", "all", cwd=tmp_path)
    assert "Multi-query associative recall" in said
    tables = {path.stem: list(csv.DictReader(path.open())) for path in (out / "tables").glob("*.csv")}
    assert {"kv", "copy", "mqar", "recall32k", "ablation-beta", "ablation-norm", "ablation-others", "chunks", "speed",
            "speed-bytes", "speed-ranks", "lm", "lm-by-position", "search", "configuration"} <= set(tables)  # fmt: skip
    assert sum(name.startswith("pitfall-") for name in tables) == len(PITFALLS)
    assert len(tables["ablation-beta"]) + len(tables["ablation-norm"]) + len(tables["ablation-others"]) == (
        len(ABLATIONS) + 2
    )  # the base stands in each
    pictures = re.findall(r"!\[\w+\]\(([^)]+)\)", (out / "report.md").read_text())
    assert len(pictures) == 7 and all((out / picture).stat().st_size > 5000 for picture in pictures)

    order_on_mqar(results)
    figures_of_the_files(results, tables)
    pitfalls(results)
    over_ranks(results)


def best(results: dict[str, dict[str, Any]], task: str, model: str) -> dict[str, Any]:
    """The run that the search chose, found without the report's code."""
    runs = [r for r in results.values() if r["task"] == task and r.get("labels", {}).get("model") == model]
    assert len(runs) == 2 and all(run["outcome"] == "finished" for run in runs)
    return max(runs, key=lambda r: (r["tests"]["validation"]["accuracy"], -r["tests"]["validation"]["loss"]))


def order_on_mqar(results: dict[str, dict[str, Any]]) -> None:
    accuracy = {model: best(results, "mqar", model)["tests"]["test"]["accuracy"] for model in MODELS}
    for model in ("deltanet", "gated_delta", "hybrid"):
        assert accuracy[model] > accuracy["linear_attention"] + MARGIN, accuracy


def figures_of_the_files(results: dict[str, dict[str, Any]], tables: dict[str, list[dict[str, str]]]) -> None:
    for task in ("kv", "copy", "mqar", "recall32k"):
        for row in tables[task]:
            run = best(results, task, row["model"])
            assert row["accuracy %"] == f"{run['tests']['test']['accuracy']:.1f}"
            assert float(row["learning rate"]) == run["lr"]
    bits = [r["figures"] for r in results.values() if r["kind"] == "speed" and "ranks" not in r["figures"]]
    for row in tables["speed"]:
        for figures in bits:
            if figures["name"] == row["model"]:
                assert float(row[f"{figures['context']:,}"]) == figures["tokens_per_s"]
    chunks = [r["figures"] for r in results.values() if r["kind"] == "chunk"]
    assert sorted(int(row["chunk"]) for row in tables["chunks"]) == [32, 64, 128]
    assert statistics.fmean(float(row["ms, forward and backward"]) for row in tables["chunks"]) == pytest.approx(
        statistics.fmean(f["ms"] for f in chunks)
    )
    assert all(f["output_error"] < 1e-5 and f["gradient_error"] < 1e-5 for f in chunks)


def pitfalls(results: dict[str, dict[str, Any]]) -> None:
    rows = {r["figures"]["number"]: r["figures"]["rows"] for r in results.values() if r["kind"] == "pitfall"}
    assert sorted(rows) == list(range(1, 8))
    normed, unnormed = rows[1][1], rows[1][3]
    assert normed["state norm"] < 1e3 and unnormed["state norm"] == "not finite"
    assert rows[2][0]["what comes back, of the value"] == pytest.approx(1.0, abs=1e-6)
    assert rows[2][1]["what comes back, of the value"] == pytest.approx(1.5, abs=1e-6)  # 2 - beta
    assert rows[3][2]["largest output"] > 100 * rows[3][0]["largest output"]  # with the denominator, not without
    at_two = {row["what"]: row["state norm"] for row in rows[4]}
    assert at_two["keys by l2, beta 2.1"] > 10 * at_two["keys by l2, beta 0.5"]
    assert rows[5][0]["error of all pairs"] < 0.6 < rows[5][1]["error of all pairs"]
    assert rows[6][0]["error"] < rows[6][1]["error"] < rows[6][2]["error"]
    slow, fast = (row["ms, forward and backward"] for row in rows[7])
    assert slow > 2 * fast


def over_ranks(results: dict[str, dict[str, Any]]) -> None:
    (figures,) = (r["figures"] for r in results.values() if r["kind"] == "speed" and "ranks" in r["figures"])
    assert figures["ranks"] == 2 and figures["error"] < 1e-5 and figures["same_tokens"] == 1.0
    assert figures["state_bytes"] > 0 and figures["cache_bytes"] == 2 * 256 * 64 * 4  # keys and values, all 256 tokens
