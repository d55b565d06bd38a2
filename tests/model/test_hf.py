"""The decoder against transformers' Qwen3.5 text model, same weights: logits, gradients, greedy continuation."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F

from dnsp.config import DeltaNetConfig, ModelConfig
from dnsp.errors import UsageError
from dnsp.generate import generate
from dnsp.loss import cross_entropy_sum
from dnsp.model.decoder import Decoder
from dnsp.parallel.plan import local_plan

# |ours - truth| / |truth|. In fp32 transformers' own gradients of the decay are off by up to 2e-4 from the model in
# fp64, ours by 1e-5: so those are compared with our fp64 gradients more strictly than with theirs.
TOLERANCE = {"logits": 1e-5, "gradient": 2e-5, "gradient of the decay": 5e-4, "gradient against fp64": 2e-5}
DECAY = ("A_log", "dt_bias", "in_proj_a.weight")
CONTINUATION = 24

CONFIGS = {
    "grouped": ModelConfig(vocab_size=97, hidden_size=64, intermediate_size=96, initializer_range=0.1),
    "untied": ModelConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        pattern=["attention", "gated_delta"],
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=24,
        partial_rotary_factor=0.5,
        rope_theta=500.0,
        linear_num_key_heads=1,
        linear_num_value_heads=3,
        linear_key_head_dim=16,
        linear_value_head_dim=24,
        linear_conv_kernel_dim=3,
        tie_word_embeddings=False,
        initializer_range=0.1,
    ),
}


@pytest.fixture(scope="module", autouse=True)
def torch_paths_of_transformers():
    """Without the kernels that transformers would otherwise take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fla", None)
        patch.setitem(sys.modules, "causal_conv1d", None)
        yield


def pair(config: ModelConfig):
    """Our model and theirs, same weights; norms away from their initial values, so that their centring shows."""
    from transformers import Qwen3_5ForCausalLM

    from dnsp.model.hf import load_state_dict, to_hf_config

    torch.manual_seed(1)
    hf_config = to_hf_config(config)
    hf_config._attn_implementation = "eager"
    theirs = Qwen3_5ForCausalLM(hf_config).float()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    ours = Decoder(config)
    load_state_dict(ours, theirs.state_dict())
    return ours, theirs


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [7, 150])
def test_logits_and_gradients(name: str, tokens: int) -> None:
    config = CONFIGS[name]
    ours, theirs = pair(config)
    torch.manual_seed(2)
    ids = torch.randint(config.vocab_size, (2, tokens))
    targets = torch.randint(config.vocab_size, (2, tokens))
    targets[0, 3] = -100

    hidden = ours.hidden(ids, local_plan([[0], [0]], tokens))
    expected = theirs(ids).logits
    assert relative(ours.logits(hidden), expected) < TOLERANCE["logits"]

    exact = copy.deepcopy(ours).double()
    exact(ids, targets, local_plan([[0], [0]], tokens)).backward()
    cross_entropy_sum(hidden, ours.lm_head.weight, targets).backward()
    F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    wanted = {n: p.grad for n, p in theirs.named_parameters()}
    truth = {n: p.grad for n, p in exact.named_parameters()}
    for n, parameter in ours.named_parameters():
        tolerance = TOLERANCE["gradient of the decay" if n.endswith(DECAY) else "gradient"]
        assert relative(parameter.grad, wanted[n]) < tolerance, n
        assert relative(parameter.grad, truth[n]) < TOLERANCE["gradient against fp64"], n


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_document_is_as_if_alone(name: str) -> None:
    config = CONFIGS[name]
    ours, theirs = pair(config)
    torch.manual_seed(3)
    ids = torch.randint(config.vocab_size, (1, 150))
    starts = [0, 1, 3, 40, 128]
    with torch.no_grad():
        packed = ours.logits(ours.hidden(ids, local_plan([starts], 150)))
        for start, stop in zip(starts, [*starts[1:], 150], strict=True):
            assert relative(packed[:, start:stop], theirs(ids[:, start:stop]).logits) < TOLERANCE["logits"]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_continuation(name: str) -> None:
    config = CONFIGS[name]
    ours, theirs = pair(config)
    torch.manual_seed(4)
    prompt = torch.randint(config.vocab_size, (1, 70))
    expected = theirs.generate(prompt, max_new_tokens=CONTINUATION, do_sample=False, eos_token_id=None)[0, 70:]
    assert list(generate(ours, prompt[0].tolist(), CONTINUATION, temperature=0)) == expected.tolist()


def test_config_and_names_go_both_ways(tmp_path) -> None:
    from transformers import Qwen3_5ForCausalLM

    from dnsp.model.hf import export_state_dict, from_hf_config, load_pretrained, save_pretrained, to_hf_config

    for config in CONFIGS.values():
        back = from_hf_config(to_hf_config(config))
        assert back.layers == config.layers
        assert back.model_copy(update={"pattern": config.pattern}) == config

        ours, theirs = pair(config)
        assert export_state_dict(ours).keys() == theirs.state_dict().keys()
        save_pretrained(ours, tmp_path)
        reread = Qwen3_5ForCausalLM.from_pretrained(tmp_path)
        again = load_pretrained(tmp_path)
        for name, value in ours.state_dict().items():
            assert torch.equal(reread.state_dict()[name], value) and torch.equal(again.state_dict()[name], value), name


def test_what_does_not_fit_is_refused() -> None:
    from dnsp.model.hf import load_state_dict, to_hf_config

    with pytest.raises(UsageError, match="'deltanet'.*gated_delta and attention"):
        to_hf_config(ModelConfig(pattern=["gated_delta", "deltanet"], deltanet=DeltaNetConfig()))
    ours, theirs = pair(CONFIGS["grouped"])
    state = dict(theirs.state_dict())
    state["model.norm.weight"] = torch.zeros(3)
    with pytest.raises(UsageError, match=r"model.norm.weight is \[3\] in the checkpoint and \[64\] in the model"):
        load_state_dict(ours, state)
    del state["model.norm.weight"]
    with pytest.raises(UsageError, match=r"model.norm.weight is missing in the checkpoint"):
        load_state_dict(ours, state)


def test_initial_weights_have_the_same_spread() -> None:
    """Standard deviations as transformers draws them, ``A_log`` in the same range; ``dt_bias`` as the authors do."""
    from transformers import Qwen3_5ForCausalLM

    from dnsp.model.hf import to_hf_config

    torch.manual_seed(5)
    ours = Decoder(CONFIGS["grouped"])
    theirs = dict(Qwen3_5ForCausalLM(to_hf_config(CONFIGS["grouped"])).named_parameters())
    for name, parameter in ours.named_parameters():
        if name.endswith("A_log"):
            rate = parameter.exp()
            assert rate.min() >= 0.01 and rate.max() <= 16 and rate.std() > 0
        elif name.endswith("dt_bias"):
            step = torch.nn.functional.softplus(parameter.double())
            assert step.min() >= 0.999e-3 and step.max() <= 0.1001 and step.std() > 0
        elif parameter.dim() == 1:
            assert torch.equal(parameter, theirs[name]), name
        else:
            assert (parameter.std() / theirs[name].std()).item() == pytest.approx(1, abs=0.15), name
