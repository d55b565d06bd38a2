"""One picture of what benchmarks wrote: its bars are the files' figures, and a file that is none is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dnsp.bench.plots import Bar, panels, plot
from dnsp.errors import UsageError

SHAPE = {"tokens": 64, "batch": 2, "key_heads": 1, "value_heads": 2, "decay": "-20"}
SHAPE |= {"l2norm": True, "segment_tokens": None, "documents": 1}
DELTA = {
    "kernels": "triton",
    "shapes": [
        {
            "shape": SHAPE,
            "sides": [
                {"name": "dnsp", "passes": {"training": {"ms": 2.0}}},
                {"name": "fla", "passes": {"training": {"ms": 5.0}}},
                {"name": "flash-qla", "passes": {"training": {"failure": "out of memory"}}},
            ],
        },
        {"shape": SHAPE | {"decay": "logsigmoid"}, "sides": [{"name": "dnsp", "passes": {"training": {"ms": 2.0}}}]},
    ],
}
FAILED = {"name": "transformers", "failure": "out of memory"}
TRAIN = {"rows": 2, "tokens": 32, "ours": {"name": "dnsp", "tokens_per_s": 4000.0}, "peer": FAILED}
ONE, LOCAL = {"one process": {"ms": 8.0}}, {"local shard": {"ms": 3.0}}
SCAN = {
    "tokens": 128,
    "value_heads": 2,
    "worlds": [
        {
            "ranks": 2, "sharing": 1, **ONE, **LOCAL,
            "peers": [
                {"name": "fla's context parallelism, zigzag", "ms": 12.0},
                {"name": "head all-to-all, fla's kernels", "ms": 6.0},
            ],
            "ways": [{"layout": "zigzag", "transport": "peer", "ms": 4.0}],
        },
        {
            "ranks": 4, "sharing": 4, **ONE, **LOCAL, "peers": [],
            "ways": [{"layout": "contiguous", "transport": "p2p", "ms": 10.0}],
        },
    ],
}  # fmt: skip


def test_bars_are_the_files_figures(tmp_path: Path) -> None:
    files = []
    for name, found in {"delta": DELTA, "train": TRAIN, "scan": SCAN}.items():
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(found))
    delta, train, scan = panels([*files, files[0]])
    assert delta.bars == [
        Bar(128, "2 x 64, 1/2, decay -20", "dnsp", 1.0),
        Bar(128, "2 x 64, 1/2, decay -20", "fla", 2.5),
    ]
    assert train.bars == [Bar(64, "64 tokens", "dnsp", 4.0)]
    assert scan.bars == [
        Bar(128, "128, 2 GPUs, zigzag", "peer", 75.0),
        Bar(128, "128, 2 GPUs, zigzag", "fla's context parallelism, zigzag", 25.0),
        Bar(128, "128, 2 GPUs", "head all-to-all, fla's kernels", 50.0),
        Bar(128, "128, 4 ranks on one GPU, contiguous", "p2p", 80.0),
    ]
    assert plot(files, tmp_path / "all.png") == 0
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match=r"--out .*all\.xyz cannot be written"):
        plot(files, tmp_path / "all.xyz")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("{", "give what dnsp bench wrote with --json"),
        ('{"loss": 1}', "holds no benchmark"),
        ("[1]", "holds no benchmark"),
        (json.dumps({"shapes": [], "runs": 3}), "nothing to draw"),  # bench decode's: it has no panel
    ],
)
def test_what_is_no_benchmark_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "figures.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=words):
        plot([file], tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()
