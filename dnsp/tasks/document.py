"""The figures that the document *DeltaNet: Gated Delta Rule for Sequence Modeling* states, as it states them."""

from __future__ import annotations

# accuracy in percent: task, model
RECALL: dict[str, dict[str, float]] = {
    "kv": {"attention": 98.2, "linear_attention": 72.1, "deltanet": 94.5},
    "copy": {"attention": 99.1, "linear_attention": 81.3, "deltanet": 96.8},
    "mqar": {"attention": 95.3, "linear_attention": 68.7, "deltanet": 91.2},
}

# perplexity and recall accuracy in percent, by our name of the variant
BETA: dict[str, tuple[float, float | None]] = {
    "fixed 0.1": (8.95, 76.2),
    "fixed 0.5": (8.42, 84.1),
    "learned beta, q and k by l2": (8.18, 94.5),
}
NORM: dict[str, tuple[float, str]] = {
    "none": (9.12, "unstable"),
    "k by RMSNorm, as written": (8.45, "stable"),
    "q and k by RMSNorm, as written": (8.18, "very stable"),
}
# the same by l2, which it takes for the same; keys have norm 1 then
NORM_SCALED: dict[str, tuple[float, str]] = {
    "none": NORM["none"],
    "k by l2": NORM["k by RMSNorm, as written"],
    "learned beta, q and k by l2": NORM["q and k by RMSNorm, as written"],
}

# what it says that an option of the layer is for, by our group of ablations
OPTIONS: dict[str, str] = {
    "denominator": "for stability, it prevents unbounded state growth",
    "forget gate": "for bounded memory, it allows selective forgetting of old associations",
    "periodic decay": "for very long sequences",
}

# tokens a second at batch 1: model, context
SPEED: dict[str, dict[int, float]] = {
    "attention": {512: 120, 2048: 45, 8192: 12},
    "deltanet": {512: 180, 2048: 165, 8192: 155},
}
