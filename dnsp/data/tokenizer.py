"""Text to token ids and back: raw bytes, or a Hugging Face tokenizer by name or local path."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dnsp.errors import UsageError

BYTE_EOD = 256
END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """What data preparation, evaluation and generation need of a tokenizer."""

    name: str
    vocab_size: int  # one more than the largest id
    eod: int  # the id that ends every document
    fingerprint: str  # equal fingerprints encode alike

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """UTF-8 texts to one array of ids each, int64, without the end-of-document id.

        Raises UnicodeDecodeError where a text is not UTF-8 and the tokenizer needs characters.
        """
        ...

    def encode(self, text: str | bytes) -> np.ndarray: ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...

    def count_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """Bytes of text that the ids stand for; the end-of-document id stands for none (for bits per byte)."""
        ...


class ByteTokenizer:
    """One id a byte, 0..255, and 256 for the end of a document."""

    name = "bytes"
    vocab_size = BYTE_EOD + 1
    eod = BYTE_EOD
    fingerprint = "bytes-257"

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode(self, text: str | bytes) -> np.ndarray:
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        array = np.asarray(ids, dtype=np.int64)
        return array[array < BYTE_EOD].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def count_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        return int((np.asarray(ids) < BYTE_EOD).sum())


class HuggingFaceTokenizer:
    """A tokenizer of transformers, without the special tokens it would add around a text."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._tokenizer = _from_pretrained(name)
        eod = self._tokenizer.eos_token_id
        if eod is None:
            raise UsageError(
                f"tokenizer {name!r} has no end-of-text token, which has to end every document: "
                "set eos_token in its tokenizer_config.json"
            )
        self.eod = int(eod)
        # len(tokenizer) is too small where the ids of added tokens leave a gap.
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend is not None else repr(sorted(vocabulary.items()))
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:32]

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        if not texts:
            return []
        encoded = self._tokenizer([text.decode("utf-8") for text in texts], add_special_tokens=False, verbose=False)
        return [np.asarray(ids, dtype=np.int64) for ids in encoded["input_ids"]]

    def encode(self, text: str | bytes) -> np.ndarray:
        return self.encode_batch([text.encode() if isinstance(text, str) else text])[0]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return str(self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=True))

    def count_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        return len(self.decode(ids).encode())


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes the files from which transformers' AutoTokenizer makes a tokenizer with the same ids."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer._tokenizer.save_pretrained(str(folder))
        return
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Pieces
    from transformers import PreTrainedTokenizerFast

    # byte-level BPE without merges: its symbols for the 256 bytes, with the bytes' own values as ids
    symbols = {symbol: byte for byte, symbol in byte_symbols().items()}
    pieces = Pieces(models.BPE(vocab=symbols, merges=[]))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces.decoder = decoders.ByteLevel()
    pieces.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])  # the next free id, 256
    PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token=END_OF_TEXT).save_pretrained(str(folder))


def byte_symbols() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte (Radford et al. 2019): itself where it is
    printable, else the next one above 255."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in plain)
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


@cache
def load_tokenizer(name: str) -> Tokenizer:
    """``bytes``, or the name on the Hugging Face hub or the local folder of a tokenizer.

    Raises UsageError for a tokenizer that cannot be had.
    """
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(name)


def _from_pretrained(name: str) -> Any:
    if name.startswith((".", "/", "~")) and not os.path.isdir(os.path.expanduser(name)):
        raise UsageError(f"tokenizer {name!r}: there is no such folder; give an existing one, a hub name, or 'bytes'")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UsageError(
            f"tokenizer {name!r} needs the transformers package ({error}): pip install transformers, or use 'bytes'"
        ) from error
    local = Path(name).expanduser()
    try:
        if local.is_dir():
            return AutoTokenizer.from_pretrained(str(local), local_files_only=True)
        return _from_hub(AutoTokenizer, name)
    except Exception as error:  # transformers and the hub's client raise whatever their many loaders meet
        reason = " ".join(str(error).split())[:160]
        raise UsageError(
            f"tokenizer {name!r} is neither 'bytes', nor a readable local folder, nor to be had from the hub: {reason}"
        ) from error


def _from_hub(loader: Any, name: str) -> Any:
    try:
        return loader.from_pretrained(name, local_files_only=True)  # downloaded before
    except Exception:
        from huggingface_hub import model_info

    # Asked first and once: the download itself would retry for most of a minute before it said that there is no such
    # name, or no network.
    model_info(name, timeout=10)
    return loader.from_pretrained(name)
