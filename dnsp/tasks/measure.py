"""What a trained model is asked: loss and accuracy on sequences that no training and no choice has seen."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from dnsp.config import Config, Source
from dnsp.data.batch import batch
from dnsp.data.mix import Mixture, open_data
from dnsp.data.pack import IGNORE
from dnsp.model.decoder import Decoder
from dnsp.parallel.layout import Layout
from dnsp.parallel.plan import local_plan

TOKENS_AT_ONCE = 2**14  # of a forward pass, where rows are shorter than that
LOGITS_AT_ONCE = 2**25
FIRST_BUCKET = 64  # positions 0-63, then powers of two


@torch.no_grad()
def measure(model: Decoder, config: Config, test: dict[str, Any]) -> dict[str, Any]:
    """Loss and accuracy of a model on held-out sequences.

    test: ``sources`` (as in ``data.sources``), ``length`` tokens, ``sequences`` of them after the first ``skip``.

    Returns ``loss`` (nats a target), ``accuracy`` (share of targets that the most likely token is, in percent),
    ``targets``, and ``by_position``: the loss by position in the document, in buckets of powers of two.
    """
    data = _data(config, test)
    length, device = test["length"], model.lm_head.weight.device
    cursor = data.step(data.start, length, test["skip"]).cursor if test.get("skip") else data.start
    rows = max(1, TOKENS_AT_ONCE // length)
    buckets = max(1, math.ceil(math.log2(length / FIRST_BUCKET)) + 1) if length > FIRST_BUCKET else 1
    sums = torch.zeros(3, buckets, dtype=torch.float64)  # losses, right answers, targets
    done, autocast = 0, torch.autocast(device.type, torch.bfloat16, enabled=config.engine.dtype == "bf16")
    while done < test["sequences"]:
        count = min(rows, test["sequences"] - done)
        step = data.step(cursor, length, count)
        cursor, done = step.cursor, done + count
        part = batch(
            step, 0, micro_batch=count, data_rank=0, data_size=1,
            intervals=Layout("contiguous", 1, length).intervals(0), vocab_size=config.model.vocab_size,
        )  # fmt: skip
        plan = local_plan(part.doc_starts, length).to(device)
        targets = part.targets_BT.to(device)
        asked = targets != IGNORE
        with autocast:
            hidden = model.hidden(part.tokens_BT.to(device), plan)[asked]
            wanted = targets[asked]
            losses, right = _answers(model, hidden, wanted)
        position = plan.position_BT[asked].double().cpu()
        bucket = (position / FIRST_BUCKET).clamp_min(0.5).log2().floor().long() + 1
        for n, value in enumerate((losses, right, torch.ones_like(losses))):
            sums[n] += torch.bincount(bucket, value.double().cpu(), minlength=buckets)
    losses, right, counts = sums
    total = float(counts.sum())
    return {
        "loss": float(losses.sum()) / total,
        "accuracy": 100 * float(right.sum()) / total,
        "targets": int(total),
        "by_position": {_span(n): float(losses[n] / counts[n]) for n in range(buckets) if counts[n] > 0},
    }


def _data(config: Config, test: dict[str, Any]) -> Mixture:
    sources = [Source.model_validate(source) for source in test["sources"]]
    changed = config.data.model_copy(update={"sources": sources})
    data = open_data(changed, vocab_size=config.model.vocab_size, split="heldout")
    data.check_length(test["length"])
    return data


def _answers(model: Decoder, hidden: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    losses, right = [], []
    chunk = max(1, LOGITS_AT_ONCE // len(model.lm_head.weight))
    for h, target in zip(hidden.split(chunk), wanted.split(chunk), strict=True):
        logits = model.logits(h)
        losses.append(F.cross_entropy(logits.float(), target, reduction="none"))
        right.append(logits.argmax(-1) == target)
    return torch.cat(losses), torch.cat(right)


def _span(bucket: int) -> str:
    low = 0 if bucket == 0 else FIRST_BUCKET << (bucket - 1)
    return f"{low}-{(FIRST_BUCKET << bucket) - 1}"
