"""Sampling: seeds, temperature, top-k, streaming text, and what is refused."""

from __future__ import annotations

import pytest
import torch

from dnsp.config import DeltaNetConfig, ModelConfig
from dnsp.data.tokenizer import load_tokenizer
from dnsp.errors import UsageError
from dnsp.generate import Step, _decode_stream, generate, generate_text, sample
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


def mixture() -> Decoder:
    """A layer of every kind; widths that the Triton kernels have."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=41,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        pattern=["gated_delta", "attention", "deltanet", "linear_attention"],
        head_dim=16,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        initializer_range=0.2,
        deltanet=DeltaNetConfig(num_heads=2),
    )
    return Decoder(config)


def test_a_cache_of_fixed_size_gives_the_same_steps() -> None:
    model, prompt = mixture().double(), torch.randint(41, (2, 9))
    plan = local_plan([[0], [0, 5]], 9)
    _, grows = model.prefill(prompt, plan)
    _, fixed = model.prefill(prompt, plan)
    for state in fixed:
        state.fix(9 + 12)
    addresses = [state.keys_BGTK.data_ptr() for state in fixed if state.keys_BGTK is not None]
    for token in torch.randint(41, (12, 2)):
        assert torch.allclose(model.step(token, fixed), model.step(token, grows), rtol=1e-12, atol=1e-12)
    assert addresses == [state.keys_BGTK.data_ptr() for state in fixed if state.keys_BGTK is not None] != []


@pytest.mark.gpu
def test_steps_by_graph_are_those_of_the_model() -> None:
    model, prompt = mixture().cuda(), torch.randint(41, (1, 9), device="cuda")
    plan = local_plan([[0]], 9).to("cuda")
    _, states = model.prefill(prompt, plan)
    _, captured = model.prefill(prompt, plan)
    step = Step(model, captured, 9 + 20)
    for token in range(20):
        expected = model.step(torch.tensor([token], device="cuda"), states)
        assert ((step(token) - expected).norm() / expected.norm()).item() < 1e-5, token
    assert step.graph is not None
    on_host = list(generate(mixture(), prompt[0].tolist(), 20, temperature=0))
    assert list(generate(model, prompt[0].tolist(), 20, temperature=0)) == on_host
