from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from dnsp.data.tokenizer import load_tokenizer
from dnsp.errors import UsageError

SECONDS_TO_REFUSE = 20
TEXTS = ["", "def f(x):\n    return x\n", "naïve café, Ω≈ç√ 漢字 🙂", "a\x00b\r\n\t"]


@pytest.fixture
def hub_style(tmp_path: Path) -> Path:
    """A folder as transformers saves it: a byte-level BPE with an end-of-text token and a gap in its ids."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS * 4, trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>").save_pretrained(tmp_path / "bpe")
    return tmp_path / "bpe"


@pytest.mark.parametrize("text", TEXTS)
def test_bytes(text: str) -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64 and ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(np.append(ids, tokenizer.eod)) == text
    assert tokenizer.count_bytes(np.append(ids, tokenizer.eod)) == len(text.encode())
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)


def test_hugging_face(hub_style: Path) -> None:
    tokenizer = load_tokenizer(str(hub_style))
    batch = tokenizer.encode_batch([text.encode() for text in TEXTS])
    for text, ids in zip(TEXTS, batch, strict=True):
        assert np.array_equal(ids, tokenizer.encode(text))
        assert tokenizer.decode(ids) == text
        assert tokenizer.count_bytes(np.append(ids, tokenizer.eod)) == len(text.encode())
        assert len(ids) == 0 or int(ids.max()) < tokenizer.vocab_size
    assert len(batch[1]) < len(TEXTS[1].encode())  # it does merge
    assert len(tokenizer.fingerprint) == 32
    with pytest.raises(UnicodeDecodeError):
        tokenizer.encode(b"\xff")


def test_fingerprint_tells_tokenizers_apart(hub_style: Path) -> None:
    before = load_tokenizer(str(hub_style)).fingerprint
    other = hub_style.with_name("other")
    hub_style.rename(other)
    content = (other / "tokenizer.json").read_text()
    assert load_tokenizer(str(other)).fingerprint == before
    third = other.with_name("third")
    third.mkdir()
    for file in other.iterdir():
        (third / file.name).write_text(file.read_text())
    (third / "tokenizer.json").write_text(content.replace('"add_prefix_space": false', '"add_prefix_space": true', 1))
    assert (third / "tokenizer.json").read_text() != content
    assert load_tokenizer(str(third)).fingerprint != before


def test_no_end_of_text(hub_style: Path) -> None:
    config = hub_style / "tokenizer_config.json"
    config.write_text(config.read_text().replace("eos_token", "unused_token"))
    with pytest.raises(UsageError, match="has no end-of-text token, .* set eos_token in its tokenizer_config.json"):
        load_tokenizer(str(hub_style))


@pytest.mark.parametrize("name", ["./no-such-folder", "/no/such/folder", "not a name"])
def test_unknown(name: str) -> None:
    with pytest.raises(UsageError, match=f"tokenizer '{name}'.*'bytes'"):
        load_tokenizer(name)


def test_unknown_to_the_hub_or_no_network() -> None:
    began = time.monotonic()
    with pytest.raises(UsageError, match="tokenizer 'dnsp-no-such/tokenizer' is neither 'bytes'"):
        load_tokenizer("dnsp-no-such/tokenizer")
    assert time.monotonic() - began < SECONDS_TO_REFUSE


def test_broken_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nor a readable local folder"):
        load_tokenizer(str(tmp_path))
