"""The decoder by itself: its recurrent form, documents, recomputation, positions, the optimizer's groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dnsp.config import DeltaNetConfig, ModelConfig
from dnsp.kernels import kept
from dnsp.model.decoder import MIXERS, Decoder
from dnsp.model.mlp import MLP, feed_forward_tiled
from dnsp.model.norm import RMSNorm
from dnsp.model.rotary import rotary_angles
from dnsp.parallel.layout import Layout
from dnsp.parallel.plan import local_plan, make_plan

TOLERANCE = {
    "step": 1e-11,
    "step fp32": 2e-5,
    "rotary": 1e-6,
    "checkpointing": 1e-6,
    torch.float64: 1e-13,  # tiles against the whole
    torch.bfloat16: 1e-2,  # roundings of each tile's share
}

DELTANETS = {
    "plain": {},
    "every option": {
        "qk_norm": "rms",
        "forget_gate": True,
        "denominator": True,
        "decay_every": 5,
        "use_beta_gate": False,
        "norm": "layer",
        "feed_forward": False,
        "conv_size": 4,
    },
    "a fixed beta": {"use_beta_gate": False, "train_beta": False},
}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def decoder(pattern: list[str], deltanet: str = "plain", widths: tuple[int, int] = (8, 12), **settings) -> Decoder:
    torch.manual_seed(0)
    return Decoder(
        ModelConfig(
            vocab_size=41,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=len(pattern),
            pattern=pattern,
            head_dim=16,
            linear_key_head_dim=widths[0],
            linear_value_head_dim=widths[1],
            initializer_range=0.2,
            deltanet=DeltaNetConfig(num_heads=2, **DELTANETS[deltanet]),
        ),
        **settings,
    )


MIX = list(MIXERS)
KINDS = [*([kind] for kind in MIXERS), MIX]


def tokens_and_plan(starts: list[list[int]], tokens: int):
    torch.manual_seed(1)
    return torch.randint(41, (len(starts), tokens)), local_plan(starts, tokens, segment_tokens=64)


@pytest.mark.filterwarnings("ignore:deltanet")
@pytest.mark.parametrize("pattern", KINDS, ids=lambda p: "+".join(p))
@pytest.mark.parametrize("deltanet", DELTANETS)
def test_forward_equals_token_by_token_steps(pattern: list[str], deltanet: str) -> None:
    """From nothing, and going on from prefills that end inside a document, at its start, or in the first tokens."""
    model = decoder(pattern, deltanet).double()
    ids, plan = tokens_and_plan([[0], [0]], 100)
    with torch.no_grad():
        expected = model.logits(model.hidden(ids, plan))

    states = model.init_states(2)
    steps = torch.stack([model.step(ids[:, t], states) for t in range(100)], 1)
    assert ((steps - expected).norm() / expected.norm()).item() < TOLERANCE["step"]

    for prompt in (1, 2, 70):
        hidden, states = model.prefill(ids[:, :prompt], local_plan([[0], [0]], prompt))
        assert torch.allclose(model.logits(hidden), expected[:, :prompt], rtol=1e-10, atol=1e-10)
        for t in range(prompt, prompt + 5):
            assert torch.allclose(model.step(ids[:, t], states), expected[:, t], rtol=1e-9, atol=1e-9), (prompt, t)


def test_step_in_fp32() -> None:
    model = decoder(MIX)
    ids, plan = tokens_and_plan([[0]], 100)
    states = model.init_states(1)
    with torch.no_grad():
        expected = model.logits(model.hidden(ids, plan))
    steps = torch.stack([model.step(ids[:, t], states) for t in range(100)], 1)
    assert ((steps - expected).norm() / expected.norm()).item() < TOLERANCE["step fp32"]


def test_prefill_of_packed_rows_goes_on_from_each_rows_last_document() -> None:
    model = decoder(MIX).double()
    starts = [[0, 30, 60], [0, 68], [0, 69], [0]]
    ids, _ = tokens_and_plan(starts, 76)
    with torch.no_grad():
        expected = model.logits(model.hidden(ids, local_plan(starts, 76)))
    hidden, states = model.prefill(ids[:, :70], local_plan(starts, 70))
    assert states[0].position_B.tolist() == [10, 2, 1, 70]
    for t in range(70, 76):
        assert torch.allclose(model.step(ids[:, t], states), expected[:, t], rtol=1e-9, atol=1e-9), t


def test_states_are_updated_in_place_and_are_of_constant_size() -> None:
    model = decoder(["gated_delta", "deltanet"])
    ids, _ = tokens_and_plan([[0]], 9)
    _, states = model.prefill(ids, local_plan([[0]], 9))
    before = [(s.S_BHKV.data_ptr(), s.S_BHKV.clone()) for s in states]
    model.step(ids[:, 0], states)
    for state, (pointer, S) in zip(states, before, strict=True):
        assert state.S_BHKV.data_ptr() == pointer and not torch.equal(state.S_BHKV, S)
        assert state.S_BHKV.dtype == torch.float32 and state.position_B.item() == 10


@pytest.mark.filterwarnings("ignore:deltanet")
@pytest.mark.parametrize("deltanet", DELTANETS)
def test_another_document_changes_nothing(deltanet: str) -> None:
    """Bit for bit: outputs and the gradient of the embeddings of documents that were not touched."""
    model = decoder(MIX, deltanet)
    starts = [0, 50, 51, 130]
    ids, plan = tokens_and_plan([starts], 150)
    other = ids.clone()
    other[:, 50:51] = (ids[:, 50:51] + 1) % 41
    other[:, 51:130] = ids[:, 51:130].roll(7, 1)
    untouched = torch.cat([torch.arange(50), torch.arange(130, 150)])
    seen = []
    for tokens in (ids, other):
        embedded = []
        hook = model.model.embed_tokens.register_forward_hook(lambda m, a, out, kept=embedded: kept.append(out))
        hidden = model.hidden(tokens, plan)
        hook.remove()
        (grad,) = torch.autograd.grad(hidden.square().sum(), embedded)
        seen.append((hidden[:, untouched], grad[:, untouched]))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize("pattern", KINDS, ids=lambda p: "+".join(p))
def test_checkpointing_gives_the_same_numbers_and_keeps_scans(pattern: list[str], monkeypatch) -> None:
    """The loss bit for bit; gradients but for the order in which a feed-forward's share joins the residual stream's."""
    results, ran = [], []
    once = kept.once
    monkeypatch.setattr(kept, "once", lambda fn: once(lambda: (ran.append(1), fn())[1]))
    for checkpointing in (False, True):
        model = decoder(pattern, activation_checkpointing=checkpointing)
        ids, plan = tokens_and_plan([[0, 40], [0]], 100)
        ran.clear()
        loss = model(ids, ids, plan)
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()], len(ran)))
    (loss_a, grads_a, ran_a), (loss_b, grads_b, ran_b) = results
    assert torch.equal(loss_a, loss_b)
    assert all(relative(a, b) < TOLERANCE["checkpointing"] for a, b in zip(grads_a, grads_b, strict=True))
    assert ran_a == ran_b > 0  # the recomputation ran none of them again


@pytest.mark.parametrize("pattern", KINDS, ids=lambda p: "+".join(p))
def test_checkpointing_keeps_two_inputs_a_layer_and_what_passes_through_kept(pattern: list[str], monkeypatch) -> None:
    """Everything that autograd holds for the layers' backward pass, and the tapes: nothing else has a token axis."""
    model = decoder(pattern, activation_checkpointing=True)
    ids, plan = tokens_and_plan([[0, 40], [0]], 100)
    held: list[torch.Tensor] = []
    monkeypatch.setattr("dnsp.model.decoder.cross_entropy_sum", lambda hidden, *rest, **more: hidden.sum())
    monkeypatch.setattr(model.model, "norm", torch.nn.Identity())
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (held.append(x), x)[1], lambda x: x):
        model(ids, ids, plan)
    stream = (2, 100, model.config.hidden_size)
    over_tokens = [x for x in held if x.dim() > 2 and x.shape[1] == 100]
    assert all(x.shape == stream for x in over_tokens)
    assert len(over_tokens) == 2 * len(pattern)


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("attention", [(2, 128, 4, 16), (1, 4, 2 * 128)]),  # output, log-sum-exp of both rows
        ("gated_delta", [(2, 2, 4, 8, 8), (2, 2, 4, 8, 12)]),  # of two segments: summaries, incoming states
    ],
)
def test_what_is_kept_of_a_mixer(kind: str, shapes: list[tuple[int, ...]]) -> None:
    model, tape = decoder([kind], activation_checkpointing=True), []
    _, plan = tokens_and_plan([[0], [0, 70]], 128)
    x = torch.randn(2, 128, 32, requires_grad=True)
    model.model.layers[0](x, plan, model._rotary(plan.position_BT, x.dtype), tape=tape)
    assert [tuple(tensor.shape) for results in tape for tensor in results or () if tensor is not None] == shapes


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tile", [1, 32, 77])
def test_tiles_of_a_feed_forward_give_its_numbers(tile: int, checkpointing: bool, dtype: torch.dtype) -> None:
    results, calls = [], []
    for size in (None, tile):
        model = decoder(["attention", "deltanet"], mlp_tile=size, activation_checkpointing=checkpointing).double()
        model.autocast = None if dtype == torch.float64 else dtype
        model = model if dtype == torch.float64 else model.float()
        for parameter in model.parameters():
            parameter.register_hook(lambda grad: calls.append(1))
        ids, plan = tokens_and_plan([[0, 40], [0]], 100)
        loss = model(ids, ids, plan)
        calls.clear()
        loss.backward()
        assert len(calls) == len(list(model.parameters()))  # each gradient comes once, whole
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for whole, tiled in zip(*results, strict=True):
        assert whole.dtype == tiled.dtype and relative(tiled, whole) < TOLERANCE[dtype]


def test_no_intermediate_of_a_tiled_feed_forward_is_whole() -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                largest = max(largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    mlp, norm = MLP(8, 64), RMSNorm(8, 1e-6)
    mlp.reset_parameters(0.1)
    x = torch.randn(2, 500, 8, requires_grad=True)
    with Watch():
        feed_forward_tiled(x, norm, mlp, 20).sum().backward()
    assert largest == x.numel() < 1000 * 64


def test_offloaded_or_not_a_step_is_the_same_where_there_is_no_gpu() -> None:
    ids, plan = tokens_and_plan([[0]], 70)
    losses = [
        decoder(MIX, activation_checkpointing=True, activation_offloading=offloading)(ids, ids, plan)
        for offloading in (False, True)
    ]
    assert torch.equal(*losses)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", KINDS, ids=lambda p: "+".join(p))
def test_offloading_gives_the_same_bits(pattern: list[str], monkeypatch) -> None:
    """Copies out and back on their stream, among work that reuses memory at once."""
    monkeypatch.setattr("dnsp.model.offload.SMALL", 1)
    ids, plan = tokens_and_plan([[0, 40], [0]], 100)
    results = []
    for offloading in (False, True):
        settings = {"activation_checkpointing": True, "activation_offloading": offloading}
        model = decoder(pattern * 3, widths=(16, 16), **settings).cuda()  # widths that have kernels
        for _ in range(3):
            model.zero_grad()
            loss = model(ids.cuda(), ids.cuda(), plan.to("cuda"))
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rotary_angles_at_a_million_tokens() -> None:
    """Against exact integer turns; an angle taken in fp32 would be off by 0.06."""
    theta, width = 10_000_000.0, 64
    position = torch.tensor([0, 1, 999_999, 1_048_575])
    cos, sin = rotary_angles(position, theta, width, torch.float32)
    assert cos.dtype == torch.float32
    for t, row in zip(position.tolist(), range(4), strict=True):
        for i in range(width // 2):
            angle = t * theta ** (-2 * i / width)
            assert abs(cos[row, i].item() - math.cos(angle)) < TOLERANCE["rotary"]
            assert abs(sin[row, i].item() - math.sin(angle)) < TOLERANCE["rotary"]


def test_rope_theta_can_be_raised() -> None:
    model = decoder(["attention"])
    ids, plan = tokens_and_plan([[0]], 30)
    before = model.hidden(ids, plan)
    model.set_rope_theta(1e6)
    assert not torch.allclose(model.hidden(ids, plan), before)
    model.set_rope_theta(model.config.rope_theta)
    assert torch.equal(model.hidden(ids, plan), before)


@pytest.mark.filterwarnings("ignore:deltanet")
def test_only_matrices_decay() -> None:
    model = decoder(MIX, "every option")
    decayed, kept_as_is = model.param_groups(0.1)
    assert decayed["weight_decay"] == 0.1 and kept_as_is["weight_decay"] == 0.0
    names = {id(p): n for n, p in model.named_parameters()}
    free = {names[id(p)] for p in kept_as_is["params"]}
    assert len(free) + len(decayed["params"]) == len(names)
    for name in names.values():
        wanted = name.endswith(("A_log", "dt_bias", "bias", "deltanet.beta")) or "norm" in name
        assert (name in free) == wanted, name


def test_pattern_is_repeated_and_cut() -> None:
    config = ModelConfig(num_hidden_layers=5, pattern=["gated_delta", "attention", "linear_attention"])
    assert config.layers == ["gated_delta", "attention", "linear_attention", "gated_delta", "attention"]
    names = [layer.mixer_name for layer in Decoder(config).model.layers]
    assert names == ["linear_attn", "self_attn", "linear_attention", "linear_attn", "self_attn"]


def test_prefill_needs_the_whole_sequence() -> None:
    from dnsp.parallel.grid import Grid

    plan = make_plan([[0]], Layout("contiguous", 2, 128), Grid(2, 0, 2))
    with pytest.raises(ValueError, match="64 of 128 tokens"):
        decoder(["gated_delta"]).prefill(torch.zeros(1, 64, dtype=torch.long), plan)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"num_attention_heads": 5}, "num_attention_heads=5 must be a multiple of model.num_key_value_heads=2"),
        ({"linear_num_value_heads": 3}, "linear_num_value_heads=3 must be a multiple"),
        ({"partial_rotary_factor": 0.1}, "must be an even number"),
        ({"hidden_size": 126, "pattern": ["deltanet"]}, "deltanet.num_heads=4 must divide model.hidden_size=126"),
        ({"pattern": []}, "at least 1 item"),
        ({"pattern": ["attentoin"]}, "gated_delta"),
    ],
)
def test_widths_that_do_not_fit_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModelConfig(**settings)
