"""Text from a trained model: the prompt in one chunked pass, then token by token with a state of constant size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dnsp.config import GenerateConfig
from dnsp.data.tokenizer import Tokenizer
from dnsp.errors import UsageError
from dnsp.model.decoder import Decoder
from dnsp.model.state import LayerState
from dnsp.parallel.plan import local_plan


def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    stop_id: int | None = None,
) -> Iterator[int]:
    """Yields up to ``tokens`` ids that go on from the prompt, ending early at ``stop_id`` (which is not yielded).

    Temperature 0 is greedy; ``top_k`` keeps the k most likely ids. The same seed gives the same ids.

    Raises:
        UsageError: an empty prompt, an id beyond the vocabulary, a negative temperature or a top_k below 1.
    """
    prompt = _checked(model, prompt_ids, temperature, top_k)
    return _generate(model, prompt, tokens, temperature, top_k, seed, stop_id)  # checked now, not at the first next()


def generate_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Yields the continuation of a prompt, piece by piece as whole characters appear, to the end of the document."""
    ids = generate(
        model,
        [int(i) for i in tokenizer.encode(prompt)],
        tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        stop_id=tokenizer.eod,
    )
    return _decode_stream(ids, tokenizer)


def _generate(
    model: Decoder,
    prompt: Tensor,
    tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    stop_id: int | None,
) -> Iterator[int]:
    if tokens < 1:
        return
    device = model.lm_head.weight.device
    random = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device
    plan = local_plan([[0]], prompt.shape[1]).to(device)
    hidden, states = model.prefill(prompt.to(device), plan)
    with torch.no_grad():
        logits = model.logits(hidden[:, -1])
    step = Step(model, states, prompt.shape[1] + tokens)
    for made in range(tokens):
        token = sample(logits[0], temperature, top_k, random)
        if token == stop_id:
            return
        yield token
        if made + 1 < tokens:
            logits = step(token)


class Step:
    """A decoder's step for one sequence. On a GPU the first call runs as it is, which compiles what it needs; the next
    one is captured as a CUDA graph, and all from there on replay it: a launch for all layers' kernels."""

    def __init__(self, model: Decoder, states: list[LayerState], capacity: int) -> None:
        """``states`` are those of a prefill, ``capacity`` the tokens that an attention cache will hold at most."""
        self.model, self.states = model, states
        self.token_B = torch.zeros(1, dtype=torch.long, device=model.lm_head.weight.device)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        if self.token_B.is_cuda:
            for state in states:
                state.fix(capacity)

    def __call__(self, token: int) -> Tensor:
        """Logits ``[1, V]``, to be read before the next call."""
        self.token_B.fill_(token)
        self.calls += 1
        if not self.token_B.is_cuda or self.calls == 1:
            return self.model.step(self.token_B, self.states)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.device_of(self.token_B), torch.cuda.graph(self.graph):
                self.logits = self.model.step(self.token_B, self.states)
        self.graph.replay()
        return self.logits


def sample(logits_V: Tensor, temperature: float, top_k: int | None, random: torch.Generator) -> int:
    """One id drawn from ``softmax(logits / temperature)``, of the ``top_k`` likeliest; temperature 0 takes the best."""
    if temperature == 0:
        return int(logits_V.argmax())
    logits = logits_V.double().cpu() / temperature
    if top_k is not None and top_k < len(logits):
        best, ids = logits.topk(top_k)
        return int(ids[torch.multinomial(best.softmax(0), 1, generator=random)])
    return int(torch.multinomial(logits.softmax(0), 1, generator=random))


def _decode_stream(ids: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Text of ids as they come. A character may need several ids, and an id's text may depend on the one before it, so
    the text of the last whole piece is decoded once more and what stands behind it is new."""
    before: list[int] = []  # the last piece, already given out
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = _after(tokenizer, before, pending)
        if text and not text.endswith("\ufffd"):  # the replacement character: the last one is not whole yet
            yield text
            before, pending = pending, []
    if pending and (text := _after(tokenizer, before, pending)):
        yield text


def sample_text(model: Decoder, tokenizer: Tokenizer, settings: GenerateConfig) -> str:
    """A prompt and what the model makes of it, at the end of a training run."""
    model.eval()
    pieces = generate_text(model, tokenizer, settings.prompt, settings.tokens, temperature=settings.temperature)
    return settings.prompt + "".join(pieces)


def _after(tokenizer: Tokenizer, before: list[int], pending: list[int]) -> str:
    return tokenizer.decode(before + pending)[len(tokenizer.decode(before)) :]


def _checked(model: Decoder, prompt_ids: Sequence[int], temperature: float, top_k: int | None) -> Tensor:
    if len(prompt_ids) == 0:
        raise UsageError("the prompt is empty: generation goes on from at least one token; give --prompt some text")
    worst, vocabulary = max(prompt_ids, key=lambda i: i if i >= 0 else float("inf")), model.config.vocab_size
    if not 0 <= worst < vocabulary:
        raise UsageError(
            f"the prompt holds token id {worst}, the model knows 0 to {vocabulary - 1}; use its own tokenizer"
        )
    if temperature < 0:
        raise UsageError(f"generate.temperature={temperature:g} must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k={top_k} keeps no token; it must be 1 or more")
    return torch.tensor([list(prompt_ids)], dtype=torch.long)
