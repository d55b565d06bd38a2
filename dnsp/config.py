"""What a run is made of: pydantic models, read from YAML, overridden with ``key=value``.

Every name here is a name that users type. Unknown keys and wrong types are refused with the nearest valid name.
One file, though long: every key is found in it.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dnsp.deepspeed_json import contradiction
from dnsp.errors import UsageError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: Any) -> Any:
        # pydantic reads true as 1; a step count of "true" is a slip, not a one
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and annotation is not bool and bool not in get_args(annotation):
            raise ValueError("must be a value, not true or false")
        return value


MOST_TAPS = 8  # of a convolution: a decode step on a GPU has no more


class DeltaNetConfig(Section):
    """Options of the ``deltanet`` layer; the names are those of the document it follows.

    As that document writes it (``qk_norm: rms, scaled: false``, ``denominator: true``) the layer can diverge; it is
    offered exactly so, with a warning. ``linear_attention`` layers take heads, widths and ``conv_size`` from here.
    """

    num_heads: int = Field(4, gt=0)
    head_dim: int | None = Field(None, gt=0)  # key width; None: hidden_size // num_heads
    value_head_dim: int | None = Field(None, gt=0)  # None: the key width
    use_beta_gate: bool = True  # beta = beta_cap * sigmoid(W x) per token; otherwise one beta a head
    beta_init: float = Field(0.3, gt=0)  # of the beta a head
    train_beta: bool = True  # the beta a head; False: it stays at beta_init
    beta_cap: float = Field(1.0, gt=0, le=2)  # of the learned beta; the document's advice is 0.5
    use_output_gate: bool = True
    conv_size: int = Field(0, ge=0, le=MOST_TAPS)  # of a convolution over q, k and v; 0: none, as in the document
    qk_norm: Literal["l2", "rms"] = "l2"
    normalise: Literal["qk", "k", "none"] = "qk"  # what qk_norm is applied to
    scaled: bool = True  # keys (and normalised queries) of norm 1; False follows the document to the letter
    forget_gate: bool = False  # one per head and token; the error is taken from the state before it
    denominator: bool = False  # o = q S / (q D + eps), D the sum of the document's keys
    denominator_eps: float = Field(1e-6, ge=0)
    decay_every: int = Field(0, ge=0)  # tokens of a document; 0 is off
    decay_factor: float = Field(0.9, gt=0, le=1)
    norm: Literal["rms", "layer"] = "rms"  # the block's pre-norms
    feed_forward: bool = True  # False: the block ends after the residual

    @model_validator(mode="after")
    def _options_agree(self) -> DeltaNetConfig:
        if self.normalise == "none" and self.scaled:
            raise ValueError(
                "deltanet.normalise=none leaves keys of any norm, deltanet.scaled=true promises keys of norm 1; "
                "set deltanet.scaled=false or normalise k or qk"
            )
        if not self.use_beta_gate and self.beta_cap != 1.0:
            raise ValueError(
                f"deltanet.beta_cap={self.beta_cap:g} bounds the learned beta, and use_beta_gate=false has none; "
                "set deltanet.beta_init instead"
            )
        if self.use_beta_gate and not self.train_beta:
            raise ValueError(
                "deltanet.train_beta=false keeps the beta a head at beta_init, and use_beta_gate=true has none; "
                "set deltanet.use_beta_gate=false"
            )
        return self


LayerKind = Literal["gated_delta", "deltanet", "attention", "linear_attention"]


class ModelConfig(Section):
    """Widths and pattern. Names are those of transformers' Qwen3.5 text configuration where it has one."""

    vocab_size: int = Field(257, gt=0)  # 256 bytes and the end of a document, as the bytes tokenizer needs
    hidden_size: int = Field(128, gt=0)
    intermediate_size: int = Field(352, gt=0)
    num_hidden_layers: int = Field(4, gt=0)
    pattern: list[LayerKind] = Field(  # repeated, or cut, to num_hidden_layers
        ["gated_delta", "gated_delta", "gated_delta", "attention"], min_length=1
    )
    num_attention_heads: int = Field(4, gt=0)
    num_key_value_heads: int = Field(2, gt=0)
    head_dim: int = Field(32, gt=0)
    partial_rotary_factor: float = Field(0.25, ge=0, le=1)
    rope_theta: float = Field(10_000.0, gt=0)
    linear_num_key_heads: int = Field(2, gt=0)
    linear_num_value_heads: int = Field(4, gt=0)
    linear_key_head_dim: int = Field(32, gt=0)
    linear_value_head_dim: int = Field(32, gt=0)
    linear_conv_kernel_dim: int = Field(4, gt=0, le=MOST_TAPS)
    rms_norm_eps: float = Field(1e-6, gt=0)
    initializer_range: float = Field(0.02, ge=0)
    tie_word_embeddings: bool = True
    deltanet: DeltaNetConfig = DeltaNetConfig()

    @property
    def layers(self) -> list[LayerKind]:
        """The kind of every layer."""
        return [self.pattern[i % len(self.pattern)] for i in range(self.num_hidden_layers)]

    @property
    def rotary_dim(self) -> int:
        """How many of an attention head's channels are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @model_validator(mode="after")
    def _widths_divide(self) -> ModelConfig:
        for heads, groups in (
            ("num_attention_heads", "num_key_value_heads"),
            ("linear_num_value_heads", "linear_num_key_heads"),
        ):
            many, few = getattr(self, heads), getattr(self, groups)
            if many % few:
                raise ValueError(f"model.{heads}={many} must be a multiple of model.{groups}={few}; change one of them")
        if self.rotary_dim % 2:
            raise ValueError(
                f"model.partial_rotary_factor={self.partial_rotary_factor:g} of model.head_dim={self.head_dim} rotates "
                f"{self.rotary_dim} channels, which must be an even number; change one of them"
            )
        uses_deltanet = {"deltanet", "linear_attention"} & set(self.layers)
        if uses_deltanet and self.deltanet.head_dim is None and self.hidden_size % self.deltanet.num_heads:
            raise ValueError(
                f"model.deltanet.num_heads={self.deltanet.num_heads} must divide model.hidden_size={self.hidden_size}; "
                "change one of them or set model.deltanet.head_dim"
            )
        return self


class Source(Section):
    path: str  # prefix of a .bin/.idx pair, ``python-stdlib`` (``-long``), or ``task:NAME`` of dnsp/tasks/sources.py
    weight: float = Field(1.0, gt=0)
    options: dict[str, Any] = Field(default_factory=dict)  # of a task


class DataConfig(Section):
    sources: list[Source] = Field(default_factory=lambda: [Source(path="python-stdlib")], min_length=1)
    sequence_length: int = Field(8192, gt=0)
    tokenizer: str = "bytes"
    seed: int = 0
    holdout: float = Field(0.05, gt=0, lt=1)  # share of the documents kept for evaluation


class ParallelConfig(Section):
    sequence: int | None = Field(None, gt=0)  # size of the sequence group; None: all ranks
    layout: Literal["contiguous", "zigzag"] = "zigzag"
    transport: Literal["auto", "peer", "p2p", "gather"] = "auto"
    attention_transport: Literal["auto", "peer", "ring", "gather"] = "auto"
    attention_backend: Literal[
        "auto", "cudnn", "flash", "flash_deterministic", "flash_attn_2", "flash_attn_2_deterministic", "flash_attn_3",
        "flash_attn_3_deterministic", "flash_attn_4", "flash_attn_4_deterministic", "flash_cpu", "plain",
    ] = "auto"  # fmt: skip
    segment_tokens: int | None = Field(None, gt=0)  # None: chosen from the layout


class EngineConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: bool = False  # fp32 weights and moments live in the host's memory, and are updated there
    offload_parameters: bool = False  # ZeRO 3: so do the shards of the weights between their uses
    probe: bool = True  # before the first step the engine's reduction is held against the sum over the ranks
    dtype: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False
    activation_offloading: bool = False  # what checkpointing keeps waits in the host's memory
    mlp_tile: int = Field(8192, ge=0)  # local tokens that are in a feed-forward at once; 0: all
    deterministic: bool = False  # attention repeats its bits
    deepspeed: dict[str, Any] = Field(default_factory=dict)  # DeepSpeed's own options, nested as in its JSON

    @model_validator(mode="after")
    def _offloading_needs_a_stage(self) -> EngineConfig:
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError(
                "engine.offload_optimizer=true moves ZeRO's share of the optimizer, and engine.zero_stage=0 has none; "
                "set engine.zero_stage to 1, 2 or 3, or do not offload"
            )
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(
                f"engine.offload_parameters=true moves ZeRO 3's shards of the weights, and engine.zero_stage="
                f"{self.zero_stage} has none; set engine.zero_stage=3, or do not offload"
            )
        return self

    @model_validator(mode="after")
    def _offloading_needs_checkpoints(self) -> EngineConfig:
        if self.activation_offloading and not self.activation_checkpointing:
            raise ValueError(
                "engine.activation_offloading=true moves what activation checkpointing keeps, and "
                "engine.activation_checkpointing=false keeps everything; set it to true, or do not offload"
            )
        return self


class Stage(Section):
    """A part of the run at one context length and batch."""

    sequence_length: int = Field(gt=0)
    tokens: int = Field(gt=0)  # trained on in this stage, rounded up to whole steps
    rope_theta: float | None = Field(None, gt=0)  # None: as before the stage
    micro_batch: int | None = Field(None, gt=0)  # None: train.micro_batch, as in every stage that gives none
    global_batch: int | None = Field(None, gt=0)  # None: train.global_batch, likewise


Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    steps: int | None = Field(None, gt=0)  # None: as many as the stages' tokens need; 100 without stages
    micro_batch: int = Field(1, gt=0)  # sequences a data-parallel rank holds at once
    global_batch: int = Field(1, gt=0)  # sequences per optimizer step
    lr: float = Field(3e-3, gt=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    warmup_steps: int = Field(10, ge=0)
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_fraction: float = Field(0.2, ge=0, le=1)  # of the steps, for wsd
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    clip: float = Field(1.0, ge=0)  # of the global gradient norm; 0: none
    seed: int = 0
    stages: list[Stage] = Field(default_factory=list)


class EvalConfig(Section):
    every: int = Field(0, ge=0)  # steps; 0: at the end only
    sequences: int = Field(2, gt=0)


class CheckpointConfig(Section):
    every: int = Field(0, ge=0)  # steps; 0: at the end only
    keep: int = Field(2, gt=0)
    keep_every: int = Field(0, ge=0)  # steps; those of every so many steps are kept for good; 0: of none


class RunConfig(Section):
    dir: str | None = None  # None: a new folder under runs/
    timeout: float = Field(25.0, gt=0)  # seconds a collective may wait before its peer counts as lost
    stall: float = Field(600.0, gt=0)  # seconds without progress (a layer, a step) before a rank ends the run
    tensorboard: bool = True  # its files beside metrics.jsonl; a millisecond or two a step


class FaultsConfig(Section):
    nonfinite_steps: int = Field(3, ge=0)  # in a row are skipped where loss or gradient is not finite; one more ends it
    spike_factor: float = Field(0.0, ge=0)  # a loss above this times the median of the last is rolled back; 0: off
    spike_window: int = Field(50, gt=0)  # steps that the median is taken over, and half as many are needed
    rollbacks: int = Field(3, gt=0)  # to one checkpoint; one more ends the run

    @model_validator(mode="after")
    def _a_spike_is_more(self) -> FaultsConfig:
        if 0 < self.spike_factor <= 1:
            raise ValueError(
                f"faults.spike_factor={self.spike_factor:g} would call every other loss a spike; "
                "set it above 1, for example 2, or to 0 for no rule"
            )
        return self


class GenerateConfig(Section):
    prompt: str = "def "
    tokens: int = Field(0, ge=0)  # sampled at the end of a training run; 0: none
    temperature: float = Field(0.8, ge=0)

    @model_validator(mode="after")
    def _a_sample_goes_on_from_text(self) -> GenerateConfig:
        if self.tokens and not self.prompt:
            raise ValueError("generate.prompt is empty: give it some text, or generate.tokens=0 for no sample")
        return self


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    engine: EngineConfig = EngineConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    generate: GenerateConfig = GenerateConfig()
    resume: str = "none"  # none | auto | a checkpoint folder
    init_from: str | None = None  # run:PATH | hf:PATH

    @field_validator("init_from")
    @classmethod
    def _init_from_is_known(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("run:", "hf:")):
            raise ValueError("must be run:PATH of a run or checkpoint folder, or hf:PATH of a Hugging Face folder")
        return value

    @model_validator(mode="after")
    def _auto_has_a_folder(self) -> Config:
        if self.resume == "auto" and self.run.dir is None:
            raise ValueError("resume=auto needs run.dir: name the run folder to continue")
        return self

    @model_validator(mode="after")
    def _deepspeed_says_nothing_else(self) -> Config:
        if words := contradiction(self):
            raise ValueError(words)
        return self



# Reading: YAML, then overrides, then validation; every refusal is one or two lines.


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key.with.dots=value`` overrides (values are YAML) and validate.

    Raises:
        UsageError: for a file that cannot be read, an unknown key (with the nearest valid one) or a wrong value.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"cannot read the configuration {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"the configuration {str(path)!r} is not text") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UsageError(f"{path} holds a {type(tree).__name__}, not keys and values such as 'train: {{steps: 10}}'")
    return parse_config(override_tree(tree, overrides), str(path))


def override_tree(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of a nested mapping with every ``key.with.dots=value`` put in."""
    tree = copy.deepcopy(tree)
    for override in overrides:
        _apply(tree, override)
    return tree


def parse_config(tree: dict[str, Any], where: str) -> Config:
    """Validate a nested mapping; ``where`` is named in refusals."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = error.errors()
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UsageError(f"{where}: {_explain(problems[0])}{more}") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"{override!r} is not an override; write key=value, for example train.steps=10")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"{override!r}: the value is not valid YAML; quote it, for example {key}='\"...\"'") from None
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = _item(node, part, override)
        else:
            if not isinstance(node.get(part), dict | list):
                if part in node and ".".join(key.split(".")[: depth + 1]) not in _sections():
                    raise UsageError(f"{override!r}: {part!r} is a single value and has no keys of its own")
                node[part] = {}
            node = node[part]
    if isinstance(node, list):
        _item(node, last, override)
        node[int(last)] = value
    else:
        node[last] = value


def _item(node: list[Any], index: str, override: str) -> Any:
    if not index.isdigit() or int(index) >= len(node):
        raise UsageError(f"{override!r}: {index!r} is not an entry of a list of {len(node)} (counted from 0)")
    return node[int(index)]


LISTS = {  # how each list is written
    "model.pattern": "[gated_delta, attention]",
    "data.sources": "'[{path: python-stdlib}]'",
    "train.betas": "[0.9, 0.95]",
    "train.stages": "'[{sequence_length: 8192, tokens: 1000000}]'",
}


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = nearest_key(key)
        return f"unknown key {key!r}" + (f"; did you mean {near!r}?" if near else "; see the keys in dnsp/config.py")
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key}={problem['input']!r}: expected a mapping of keys"
    text = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if problem["type"] == "literal_error" and isinstance(problem["input"], str):
        choices = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        near_values = difflib.get_close_matches(problem["input"], choices, n=1)
        text += f"; did you mean {near_values[0]!r}?" if near_values else ""
    if problem["type"] == "missing":
        return f"{key}: this key is required"
    if problem["type"] in ("list_type", "tuple_type"):
        return f"{key}={problem['input']!r}: must be a list, for example {key}={LISTS[key]}"
    if problem["type"] == "value_error" and isinstance(problem["input"], dict | BaseModel):
        return text  # two keys that do not agree; the text names them
    return f"{key}={problem['input']!r}: {text}"


def nearest_key(key: str) -> str | None:
    """The valid dotted key that looks most like ``key``: among its siblings, else anywhere by its last name."""
    plain = ".".join(part for part in key.split(".") if not part.isdigit())
    valid = _keys(Config)
    parent, _, last = plain.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in valid if name.rpartition(".")[0] == parent}
    outermost_last = sorted(reversed(valid), key=lambda name: -name.count("."))  # of equal names it is the one kept
    for names, wanted, cutoff in (
        (siblings, last, 0.6),
        ({name.rpartition(".")[2]: name for name in outermost_last}, last, 0.8),
        ({name: name for name in valid}, plain, 0.6),
    ):
        match = difflib.get_close_matches(wanted, names, n=1, cutoff=cutoff)
        if match:
            return names[match[0]]
    return None


def _keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in section.model_fields.items():
        names.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                names += _keys(kind, f"{prefix}{name}.")
    return names


def _sections() -> set[str]:
    names = _keys(Config)
    return {name for name in names if any(other.startswith(name + ".") for other in names)}
