"""Checkpoints to and from transformers' Qwen3.5 text model. The only file that imports transformers.

Parameter names are the same on both sides; what differs is the configuration's, and which layer kinds exist there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dnsp.config import ModelConfig
from dnsp.data.tokenizer import Tokenizer, save_tokenizer
from dnsp.errors import UsageError
from dnsp.model.decoder import Decoder

if TYPE_CHECKING:
    from transformers import Qwen3_5TextConfig

KINDS = {"gated_delta": "linear_attention", "attention": "full_attention"}  # our names, theirs
SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
)


def to_hf_config(config: ModelConfig, rope_theta: float | None = None, max_positions: int = 32768) -> Qwen3_5TextConfig:
    """The configuration under which transformers builds the same model.

    Raises:
        UsageError: the pattern holds a layer kind that transformers does not have.
    """
    from transformers import Qwen3_5TextConfig

    foreign = [kind for kind in config.layers if kind not in KINDS]
    if foreign:
        raise UsageError(
            f"model.pattern holds {foreign[0]!r}, which transformers' Qwen3.5 text model does not have; "
            f"only {' and '.join(KINDS)} layers can be exported"
        )
    return Qwen3_5TextConfig(
        **{name: getattr(config, name) for name in SAME_NAME},
        layer_types=[KINDS[kind] for kind in config.layers],
        max_position_embeddings=max_positions,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": config.rope_theta if rope_theta is None else rope_theta,
            "partial_rotary_factor": config.partial_rotary_factor,
        },
    )


def from_hf_config(hf: Qwen3_5TextConfig) -> ModelConfig:
    """Our configuration of a Qwen3.5 text model (of a model with vision: its ``text_config``).

    Raises:
        UsageError: the model uses something that the decoder here does not have.
    """
    rope = hf.rope_parameters
    for name, value, known in (
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("hidden_act", hf.hidden_act, "silu"),
        ("attention_bias", hf.attention_bias, False),
    ):
        if value != known:
            raise UsageError(f"{name}={value!r} of the Hugging Face model is not supported; it must be {known!r}")
    ours = {theirs: kind for kind, theirs in KINDS.items()}
    return ModelConfig(
        **{name: getattr(hf, name) for name in SAME_NAME},
        pattern=[ours[kind] for kind in hf.layer_types],
        rope_theta=rope["rope_theta"],
        partial_rotary_factor=rope.get("partial_rotary_factor", 1.0),
    )


def load_state_dict(model: Decoder, state: dict[str, Tensor]) -> None:
    """Copies a transformers state dict into the model; a text model's or that of a model with vision.

    Raises:
        UsageError: a parameter is missing, left over, or of another shape.
    """
    renamed = {name.replace("model.language_model.", "model.", 1): value for name, value in state.items()}
    given = {n: v for n, v in renamed.items() if not n.startswith(("mtp.", "model.visual."))}  # parts not modelled here
    if model.config.tie_word_embeddings:
        given["lm_head.weight"] = given.get("model.embed_tokens.weight", model.lm_head.weight)
    wanted = model.state_dict()
    for name in [*wanted, *given]:
        there, here = given.get(name), wanted.get(name)
        if there is None or here is None or there.shape != here.shape:
            shapes = [None if t is None else list(t.shape) for t in (there, here)]
            raise UsageError(
                f"{name} is {shapes[0] or 'missing'} in the checkpoint and {shapes[1] or 'missing'} in the model; "
                "the model section must describe the checkpoint's own widths and layers"
            )
    model.load_state_dict(given)


def export_state_dict(model: Decoder) -> dict[str, Tensor]:
    """The model's parameters under transformers' names, on the CPU."""
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def save_pretrained(
    model: Decoder,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    max_positions: int = 32768,
    eos_token_id: int | None = None,
) -> None:
    """Writes a folder that ``transformers.AutoModelForCausalLM.from_pretrained`` reads."""
    from transformers import Qwen3_5ForCausalLM

    hf_config = to_hf_config(model.config, model.rope_theta, max_positions)
    hf_config.eos_token_id = eos_token_id
    with torch.device("meta"):
        hf = Qwen3_5ForCausalLM(hf_config)
    hf.load_state_dict(export_state_dict(model), assign=True)
    hf.tie_weights()
    (hf if dtype is None else hf.to(dtype)).save_pretrained(folder)


def load_pretrained(name_or_path: str | Path) -> Decoder:
    """A decoder with the weights of a Qwen3.5 text model from the hub or a folder, in fp32."""
    from transformers import Qwen3_5ForCausalLM

    hf = Qwen3_5ForCausalLM.from_pretrained(name_or_path, dtype=torch.float32)
    model = Decoder(from_hf_config(hf.config))
    load_state_dict(model, hf.state_dict())
    return model


def read_weights(name_or_path: str, wanted: ModelConfig) -> dict[str, Tensor]:
    """The weights of a Hugging Face model for a model of this configuration, in fp32, what is tied once.

    Raises:
        UsageError: there is no such model, or it is another one: the first field that differs, and both values.
    """
    if name_or_path.startswith((".", "/", "~")) and not Path(name_or_path).expanduser().is_dir():
        raise UsageError(f"init_from=hf:{name_or_path}: there is no such folder; dnsp export makes one of a run")
    try:
        there = load_pretrained(Path(name_or_path).expanduser() if name_or_path.startswith("~") else name_or_path)
    except ImportError as error:
        raise UsageError(f"init_from=hf:{name_or_path} needs transformers ({error}): pip install 'dnsp[hf]'") from None
    except UsageError:
        raise
    except Exception as error:  # transformers and the hub's client raise whatever their many loaders meet
        why = " ".join(str(error).split())[:200]
        raise UsageError(f"init_from=hf:{name_or_path} cannot be read as a Qwen3.5 text model: {why}") from None
    for name in (*SAME_NAME, "layers", "partial_rotary_factor"):
        ours, theirs = getattr(wanted, name), getattr(there.config, name)
        if ours != theirs and name != "initializer_range":
            raise UsageError(
                f"init_from=hf:{name_or_path} is a model with {name}={theirs!r}, the configuration has {ours!r}; "
                "describe the model's own widths and layers in the model section"
            )
    return {name: parameter.detach() for name, parameter in there.named_parameters()}


def export(model: Decoder, tokenizer: Tokenizer, folder: Path, max_positions: int, dtype: torch.dtype) -> None:
    """A folder of weights, configuration and tokenizer, from which AutoModelForCausalLM and AutoTokenizer are made."""
    save_pretrained(model, folder, dtype, max_positions, eos_token_id=tokenizer.eod)
    save_tokenizer(tokenizer, folder)


def twin(model: Decoder, max_positions: int) -> Any:
    """transformers' model with a decoder's weights, on its device and in its dtype, to be compared with it."""
    from transformers import Qwen3_5ForCausalLM

    weight = model.lm_head.weight
    with weight.device:
        hf = Qwen3_5ForCausalLM(to_hf_config(model.config, model.rope_theta, max_positions))
    for parameter in hf.parameters():  # not .to(): rotary frequencies, which are buffers, stay fp32
        parameter.data = parameter.data.to(weight.dtype)
    hf.load_state_dict(model.state_dict())
    return hf
