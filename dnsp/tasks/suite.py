"""What each task trains and asks: sizes, fixed here before any training, and one configuration a run.

A *cell* is a line of a table: one model on one task. Every cell gets the same search: each learning rate of its scale
on the first seed, the best by validation, then that one on the seeds of ``FINAL_SEEDS``. Models of a task have the same
depth, width, feed-forward and batches; delta-rule states, linear attention's and those of gated delta layers are of
equal size (one head of the width, up to 128).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from dnsp.errors import UsageError

Scale = Literal["smoke", "full"]
NAMES = ("kv", "copy", "mqar", "recall32k", "ablations", "speed", "lm", "pitfalls")
PATTERNS: dict[str, list[str]] = {
    "attention": ["attention"],
    "linear_attention": ["linear_attention"],
    "deltanet": ["deltanet"],
    "gated_delta": ["gated_delta"],
    "hybrid": ["gated_delta", "attention"],
}
MODELS = tuple(PATTERNS)
SEARCH_SEED = 0
FINAL_SEEDS: dict[Scale, tuple[int, ...]] = {"smoke": (0,), "full": (1, 2, 3)}
# Of the full scale as in the work that MQAR comes from, half a decade apart.
LEARNING_RATES: dict[Scale, tuple[float, ...]] = {"smoke": (1e-3, 3e-3), "full": (1e-3, 3e-3, 1e-2, 3e-2)}
LM_LEARNING_RATES: dict[Scale, tuple[float, ...]] = {"smoke": (3e-3,), "full": (5e-4, 1e-3, 2e-3, 4e-3)}
VALIDATION = "validation"  # the test that a learning rate is chosen by


def learning_rates(task: str, scale: Scale) -> tuple[float, ...]:
    """What every model of a task is tried with."""
    if task == "lm":
        return LM_LEARNING_RATES[scale]
    return LEARNING_RATES[scale][-1:] if (task, scale) == ("ablations", "smoke") else LEARNING_RATES[scale]


@dataclass(frozen=True)
class Cell:
    """One model on one task.

    tree: the runs' configuration without learning rate, seed and folder. tests: what a trained model is asked, by name
    (``dnsp.tasks.measure``); ``validation`` is what the learning rate is chosen by: by accuracy, its loss where equal,
    or, where ``choose`` is ``loss``, by the loss alone. search_part: the part of the steps that the search's runs have;
    None for all of them.
    """

    task: str
    name: str
    tree: dict[str, Any]
    tests: dict[str, dict[str, Any]]
    learning_rates: tuple[float, ...]
    choose: Literal["accuracy", "loss"] = "accuracy"
    labels: dict[str, Any] = field(default_factory=dict)  # model, width, variant, group: what a table sorts by
    search_part: float | None = None


@dataclass(frozen=True)
class Measurement:
    """A part of a task that trains nothing, alone on its device: ``kind`` of dnsp/tasks/, with its arguments."""

    task: str
    name: str
    kind: Literal["speed", "pitfall", "chunk"]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Suite:
    cells: tuple[Cell, ...]
    measurements: tuple[Measurement, ...]


TURNS = ("kv", "copy", "mqar", "ablations", "recall32k", "lm")


def turn(cell: Cell, scale: Scale) -> tuple[bool, bool, int]:
    """By what a queue sorts its tables, so that it has whole ones at any time, and part of one: as in ``TURNS``, those
    of other widths than the usual behind all that have it, and ``lm`` behind them."""
    beside = cell.labels.get("width", RECALL_WIDTH[scale]) != RECALL_WIDTH[scale]
    return cell.task == "lm", beside, TURNS.index(cell.task)


def suite(
    names: list[str], scale: Scale, gpu: bool, models: tuple[str, ...] = MODELS, text: str | None = None
) -> Suite:
    """All cells and measurements of some tasks.

    gpu: in bf16, otherwise in fp32. text: ``.bin/.idx`` prefix for ``lm`` instead of ``python-stdlib-long``.

    Raises UsageError for unknown names.
    """
    for name in names:
        if name not in (*NAMES, "all"):
            raise UsageError(f"unknown task {name!r}: the tasks are {', '.join(NAMES)}, or all of them with all")
    for model in models:
        if model not in MODELS:
            raise UsageError(f"unknown model {model!r}: the models are {', '.join(MODELS)}")
    wanted = NAMES if "all" in names else tuple(dict.fromkeys(names))
    cells: list[Cell] = []
    measurements: list[Measurement] = []
    for name in wanted:
        if name in RECALL:
            cells += recall_cells(name, scale, gpu, models)
        elif name == "ablations":
            cells += ablation_cells(scale, gpu)
            measurements += chunk_measurements(scale)
        elif name == "lm":
            cells += lm_cells(scale, gpu, models, text)
        elif name == "speed":
            measurements += speed_measurements(scale, models)
        else:
            measurements += pitfall_measurements(scale)
    return Suite(tuple(cells), tuple(measurements))


def model_tree(kind: str, width: int, vocab: int, layers: int = 2) -> dict[str, Any]:
    """``model`` of a configuration. Heads of the width up to 128; two value heads a key head in gated delta layers, so
    that each has two decays and a state of the same size; attention with heads half as wide, none sharing keys,
    rotated whole (a quarter is the default, of heads of 256)."""
    heads = max(1, width // 128)
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "pattern": PATTERNS[kind],
        "num_attention_heads": 2 * heads,
        "num_key_value_heads": 2 * heads,
        "head_dim": width // (2 * heads),
        "partial_rotary_factor": 1.0,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": 2 * heads,
        "linear_key_head_dim": width // heads,
        "linear_value_head_dim": width // (2 * heads),
        "deltanet": {"num_heads": heads},
        "initializer_range": round(width**-0.5, 4),  # by the fan-in: the default is for models far wider than these
    }


def _tree(model: dict[str, Any], sources: list[dict[str, Any]], train: dict[str, Any], length: int, gpu: bool) -> dict:
    return {
        "model": model,
        "data": {"sources": sources, "sequence_length": length},
        "parallel": {"layout": "contiguous"},
        # models this narrow have room for a step's feed-forward at once, and each tile is a dozen launches of its own
        "engine": {"dtype": "bf16" if gpu else "fp32", "mlp_tile": 65536},
        "train": {"weight_decay": 0.1, "schedule": "cosine", "min_lr_ratio": 0.1, **train},
        "eval": {"sequences": 1},  # what is asked of the model is asked behind the run
        "run": {"timeout": 300},
    }


# Recall. Sizes: (task options, length, rows a step, steps, tests by name: (pairs or None, length, sequences)). Pairs,
# lengths and batches in training are those of the work that MQAR comes from: 100,000 sequences of 4 pairs, 20,000 of
# each other number, in batches of 256 (here whole turns of the nine, and half as many in kv, where a document's second
# half is all questions). With as many sequences of each number, 64 a step, attention answered 0.7 % of kv after 2,500
# steps, DeltaNet 0.3 %.

IN_TRAINING = [4, 4, 4, 4, 4, 8, 16, 32, 64]

RECALL: dict[str, dict[Scale, dict[str, Any]]] = {
    "kv": {
        # fewer pairs too while training, as in mqar; chosen and tested at 64
        "full": dict(options={"vocab": 8192, "pairs": IN_TRAINING, "packed": True}, length=256, rows=126, steps=5000,
                     tests={"test": (64, 256, 512)}),
        "smoke": dict(options={"vocab": 64, "pairs": 4}, length=16, rows=16, steps=40, tests={"test": (None, 16, 64)}),
    },
    "copy": {
        "full": dict(options={"vocab": 64}, length=512, rows=64, steps=5000, tests={"test": (None, 512, 256)}),
        "smoke": dict(options={"vocab": 8}, length=16, rows=16, steps=40, tests={"test": (None, 16, 64)}),
    },
    "mqar": {
        "full": dict(
            options={"vocab": 8192, "pairs": IN_TRAINING, "packed": True}, length=256, rows=252, steps=4000,
            widths=(64, 128, 256),
            tests={
                "test": ([4, 64], 256, 512), **{f"{n} pairs": (n, 256, 256) for n in (4, 8, 16, 32, 64)},
                "128 pairs": (128, 512, 128), "256 pairs": (256, 1024, 64),
            },
        ),
        "smoke": dict(options={"vocab": 8, "pairs": 2}, length=16, rows=16, steps=320, widths=(64,),
                      tests={"test": (None, 16, 256), "2 pairs": (2, 16, 128), "4 pairs": (4, 16, 64)}),
    },
    "recall32k": {
        # lengthened within one run: tokens, rows a step, of them at once, steps
        "full": dict(options={"vocab": 8192, "pairs": IN_TRAINING, "packed": True}, length=32768, rows=72,
                     stages=((512, 72, 72, 4000), (4096, 36, 36, 500), (32768, 16, 4, 160)),
                     tests={"test": ([16, 64], 32768, 32), **{f"{n} tokens": (64, n, max(16, 2**17 // n))
                                                          for n in (512, 2048, 8192, 32768)}}),
        "smoke": dict(options={"vocab": 64, "pairs": 2}, length=256, rows=8, stages=((32, 8, 8, 20), (256, 4, 2, 5)),
                      tests={"test": (None, 256, 16), "512 tokens": (2, 512, 8)}),
    },
}  # fmt: skip
RECALL_WIDTH: dict[Scale, int] = {"smoke": 64, "full": 128}


def recall_cells(task: str, scale: Scale, gpu: bool, models: tuple[str, ...]) -> list[Cell]:
    sizes = RECALL[task][scale]
    source = "mqar" if task == "recall32k" else task
    options, length, rows = sizes["options"], sizes["length"], sizes["rows"]
    train: dict[str, Any] = {"micro_batch": rows, "global_batch": rows}
    if "stages" in sizes:
        train["stages"] = [
            {"sequence_length": n, "tokens": n * whole * steps}
            | ({} if micro == rows else {"global_batch": whole, "micro_batch": micro})
            for n, whole, micro, steps in sizes["stages"]
        ]
        steps = sum(steps for *_, steps in sizes["stages"])
    else:
        train["steps"] = steps = sizes["steps"]
    train["warmup_steps"] = max(5, steps // 20)
    whole = [{"path": f"task:{source}", "options": options}]
    asked: dict[str, dict[str, Any]] = {}
    for name, (pairs, at, sequences) in sizes["tests"].items():
        alone = {**options, "pairs": pairs, "packed": False}  # each sequence one document, its gaps as long as it is
        sources = whole if pairs is None else [{"path": f"task:{source}", "options": alone}]
        if name == "test":
            asked[VALIDATION] = {"sources": sources, "length": at, "sequences": sequences}
        # behind the sequences that the learning rate was chosen by, where they are of the same kind
        asked[name] = {"sources": sources, "length": at, "sequences": sequences, "skip": asked[VALIDATION]["sequences"]}
    cells = []
    for width in sizes.get("widths", (RECALL_WIDTH[scale],)):
        for model in models:
            tree = _tree(model_tree(model, width, options["vocab"]), whole, train, length, gpu)
            tree["engine"]["activation_checkpointing"] = "stages" in sizes  # several such runs share a GPU's memory
            labels = {"model": model, "width": width}
            cells.append(Cell(task, f"{model}-{width}", tree, asked, learning_rates(task, scale), labels=labels))
    return cells


# Ablations: one model on text and recall together. Group, variant, options of the layer.

ABLATIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("base", "learned beta, q and k by l2", {}),
    ("beta", "fixed 0.1", {"use_beta_gate": False, "train_beta": False, "beta_init": 0.1}),
    ("beta", "fixed 0.5", {"use_beta_gate": False, "train_beta": False, "beta_init": 0.5}),
    ("beta", "learned, at most 0.5", {"beta_cap": 0.5}),
    ("norm", "none", {"normalise": "none", "scaled": False}),
    ("norm", "k by RMSNorm, as written", {"qk_norm": "rms", "normalise": "k", "scaled": False}),
    ("norm", "q and k by RMSNorm, as written", {"qk_norm": "rms", "normalise": "qk", "scaled": False}),
    ("norm", "k by l2", {"normalise": "k"}),
    ("norm", "q and k by RMSNorm, scaled", {"qk_norm": "rms"}),
    ("denominator", "on", {"denominator": True}),
    ("forget gate", "one a head", {"forget_gate": True}),
    ("periodic decay", "0.9 every {every} tokens", {"decay_every": None}),
)
ABLATION_SIZES: dict[Scale, dict[str, Any]] = {
    "full": dict(width=128, vocab=512, pairs=[4, 4, 4, 8, 16, 32], length=512, rows=64, steps=2000,
                 text=256, recall=512, longer=(2048, 8192), decay_every=256),
    "smoke": dict(width=64, vocab=64, pairs=[2], length=64, rows=8, steps=8, text=8, recall=32, longer=(256,),
                  decay_every=32),
}  # fmt: skip
BYTES = 257  # ids of the text


def ablation_cells(scale: Scale, gpu: bool) -> list[Cell]:
    sizes = ABLATION_SIZES[scale]
    length, rows = sizes["length"], sizes["rows"]
    text = {"path": "python-stdlib"}
    ids = {"vocab": sizes["vocab"], "first_id": BYTES}
    recall = {"path": "task:mqar", "options": {**ids, "pairs": sizes["pairs"], "packed": scale == "full"}}
    asked = {"path": "task:mqar", "options": {**ids, "pairs": sorted(set(sizes["pairs"]))}}
    steps = sizes["steps"]
    train = {"micro_batch": rows, "global_batch": rows, "steps": steps, "warmup_steps": max(2, steps // 20)}
    tests = {
        VALIDATION: {"sources": [text, recall], "length": length, "sequences": sizes["text"]},
        "text": {"sources": [text], "length": length, "sequences": sizes["text"], "skip": sizes["text"]},
        "recall": {"sources": [asked], "length": length, "sequences": sizes["recall"], "skip": sizes["text"]},
    }
    for n in sizes["longer"]:
        count = max(4, sizes["text"] * length // n)
        tests[f"text at {n}"] = {"sources": [text], "length": n, "sequences": count}
    cells = []
    for group, variant, options in ABLATIONS:
        if "decay_every" in options:
            options = {"decay_every": sizes["decay_every"]}
        variant = variant.format(every=sizes["decay_every"])
        model = model_tree("deltanet", sizes["width"], BYTES + sizes["vocab"])
        model["deltanet"] = {**model["deltanet"], **options}
        tree = _tree(model, [text, recall], train, length, gpu)
        rates = learning_rates("ablations", scale)
        labels = {"group": group, "variant": variant}
        cells.append(Cell("ablations", _file_name(f"{group} {variant}"), tree, tests, rates, "loss", labels))
    return cells


def chunk_measurements(scale: Scale) -> list[Measurement]:
    """The torch path in chunks of 32, 64 and 128 tokens: time and error."""
    shape = dict(tokens=2048, heads=4, width=128) if scale == "full" else dict(tokens=256, heads=2, width=32)
    return [Measurement("ablations", f"chunk-{n}", "chunk", {**shape, "chunk": n}) for n in (32, 64, 128)]


# Language modelling.

LM_SIZES: dict[Scale, dict[str, Any]] = {
    "full": dict(width=512, layers=8, lengths=(4096, 65536), tokens=65536, steps=600, asked=2**21),
    "smoke": dict(width=64, layers=2, lengths=(64, 128), tokens=256, steps=8, asked=512),
}
LM_SEARCH_PART = 1 / 3  # its runs are the longest of all, and so are its tests


def lm_cells(scale: Scale, gpu: bool, models: tuple[str, ...], text: str | None) -> list[Cell]:
    """Each step has the same tokens at either length. Tests go to 16 times the training length, each over as many
    tokens: two documents of a million, in the library's case all that is held out."""
    sizes = LM_SIZES[scale]
    sources = [{"path": text or "python-stdlib-long"}]
    cells = []
    for length in sizes["lengths"]:
        rows, steps = sizes["tokens"] // length, sizes["steps"]
        micro = min(rows, 4)
        train = {"micro_batch": micro, "global_batch": rows, "steps": steps, "warmup_steps": max(2, steps // 20)}
        tests = {VALIDATION: {"sources": sources, "length": length, "sequences": max(2, 2 * sizes["tokens"] // length)}}
        for times in (1, 4, 16):
            at = length * times
            tests[f"{times}x"] = {"sources": sources, "length": at, "sequences": max(1, sizes["asked"] // at)}
        for model in models:
            tree = _tree(model_tree(model, sizes["width"], BYTES, sizes["layers"]), sources, train, length, gpu)
            tree["engine"]["activation_checkpointing"] = length > 8192
            tree["data"]["holdout"] = 0.2  # enough of the library for the longest sequence
            labels = {"model": model, "length": length}
            rates = learning_rates("lm", scale)
            part = LM_SEARCH_PART if scale == "full" else None
            cells.append(Cell("lm", f"{model}-{length}", tree, tests, rates, "loss", labels, part))
    return cells


# Speed and pitfalls.

SPEED_SIZES: dict[Scale, dict[str, Any]] = {
    "full": dict(width=2048, layers=16, vocab=32768, contexts=(512, 2048, 8192, 32768, 131072), tokens=64),
    "smoke": dict(width=64, layers=2, vocab=64, contexts=(64, 256), tokens=8),
}


def speed_measurements(scale: Scale, models: tuple[str, ...]) -> list[Measurement]:
    sizes = SPEED_SIZES[scale]
    found = []
    for model in models:
        if model == "linear_attention":  # the document compares attention and DeltaNet
            continue
        tree = model_tree(model, sizes["width"], sizes["vocab"], sizes["layers"])
        for context in sizes["contexts"]:
            arguments = {"model": tree, "context": context, "tokens": sizes["tokens"], "name": model}
            found.append(Measurement("speed", f"{model}-{context}", "speed", arguments))
    for model in models:  # over ranks, which share a GPU where there is one
        if model != "linear_attention" and (scale == "full" or model == "hybrid"):
            tree = model_tree(model, sizes["width"], sizes["vocab"], sizes["layers"])
            context = sizes["contexts"][-2] if scale == "full" else sizes["contexts"][-1]
            arguments = {"model": tree, "context": context, "tokens": sizes["tokens"], "name": model, "ranks": 2}
            found.append(Measurement("speed", f"{model}-{context}-over-ranks", "speed", arguments))
    return found


PITFALLS = (
    "no q and k norm", "update before predict", "no denominator", "beta too large", "state of the wrong shape",
    "no mixed precision", "sequential training",
)  # fmt: skip


def pitfall_measurements(scale: Scale) -> list[Measurement]:
    tokens, width = (8192, 128) if scale == "full" else (512, 32)
    return [
        Measurement(
            "pitfalls", f"{n}-{_file_name(name)}", "pitfall", {"pitfall": name, "tokens": tokens, "width": width}
        )
        for n, name in enumerate(PITFALLS, 1)
    ]


def _file_name(text: str) -> str:
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in text).split())
