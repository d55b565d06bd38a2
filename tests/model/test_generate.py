"""Sampling: seeds, temperature, top-k, streaming text, and what is refused."""

from __future__ import annotations

import pytest
import torch

from dnsp.config import ModelConfig
from dnsp.data.tokenizer import load_tokenizer
from dnsp.errors import UsageError
from dnsp.generate import _decode_stream, generate, generate_text, sample
from dnsp.model.decoder import Decoder
from dnsp.parallel.plan import local_plan


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        pattern=["gated_delta", "attention"],
        initializer_range=0.2,
    )
    return Decoder(config)


def test_greedy_is_the_argmax_of_the_whole_forward(model: Decoder) -> None:
    ids = [5, 6, 7]
    made = list(generate(model, ids, 12, temperature=0))
    for token in made:
        hidden = model.hidden(torch.tensor([ids]), local_plan([[0]], len(ids)))
        assert token == int(model.logits(hidden[0, -1]).argmax())
        ids.append(token)


def test_a_seed_repeats_and_another_does_not(model: Decoder) -> None:
    first, again, other = (list(generate(model, [1, 2], 20, temperature=1.0, seed=s)) for s in (3, 3, 4))
    assert first == again != other and len(first) == 20


def test_samples_follow_the_distribution() -> None:
    logits, random = torch.tensor([0.0, 1.0, 2.0, -1.0]), torch.Generator().manual_seed(0)
    for temperature, top_k in ((1.0, None), (0.5, None), (1.0, 2), (2.0, 9)):
        draws = torch.tensor([sample(logits, temperature, top_k, random) for _ in range(4000)])
        kept = logits / temperature
        if top_k == 2:
            kept = kept.masked_fill(torch.tensor([True, False, False, True]), float("-inf"))
        share = torch.bincount(draws, minlength=4) / 4000
        assert (share - kept.softmax(0)).abs().max() < 0.03  # about four standard deviations
        assert not share[kept == float("-inf")].any()


def test_stops_at_the_end_of_the_document(model: Decoder) -> None:
    made = list(generate(model, [1, 2], 20, temperature=1.0, seed=3))
    stop = made[7]
    assert list(generate(model, [1, 2], 20, temperature=1.0, seed=3, stop_id=stop)) == made[: made.index(stop)]


def test_text_streams_in_whole_characters(model: Decoder) -> None:
    tokenizer = load_tokenizer("bytes")
    text = "ab\u00e9\u20ac\U0001f600 end"
    pieces = list(_decode_stream(iter(tokenizer.encode(text).tolist()), tokenizer))
    assert pieces == list(text)
    broken = list(_decode_stream(iter([0x61, 0xE2, 0x82]), tokenizer))
    assert "".join(broken) == "a\ufffd"

    ids = list(generate(model, list(b"def "), 15, seed=1, stop_id=256))
    pieces = list(generate_text(model, tokenizer, "def ", 15, seed=1))
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "prompt, settings, words",
    [
        ([], {}, "the prompt is empty"),
        ([3, 257], {}, "token id 257, the model knows 0 to 256"),
        ([-1, 3], {}, "token id -1"),
        ([1], {"temperature": -1.0}, "temperature=-1 must be 0"),
        ([1], {"top_k": 0}, "top_k=0"),
    ],
)
def test_refusals(model: Decoder, prompt: list[int], settings: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        generate(model, prompt, 5, **settings)
