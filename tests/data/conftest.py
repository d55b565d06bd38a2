from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dnsp.data.indexed import IndexedSource, IndexedWriter

Documents = list[np.ndarray]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., IndexedSource]:
    """Writes documents of ids as a data file and opens it."""

    def write(documents: Documents, name: str = "corpus", vocab_size: int = 60_000) -> IndexedSource:
        with IndexedWriter(tmp_path / name, vocab_size) as writer:
            for ids in documents:
                writer.add(np.asarray(ids))
            writer.commit(
                tokenizer="bytes",
                fingerprint="bytes-257",
                vocab_size=vocab_size,
                eod=256,
                source="test",
                text_bytes=sum(map(len, documents)),
            )
        return IndexedSource(tmp_path / name)

    return write


@pytest.fixture
def distinct() -> Documents:
    """40 documents, 1 to 300 tokens, no id twice: an id says which document and which place it is from."""
    lengths = np.random.default_rng(0).integers(1, 300, 40)
    lengths[:3] = 1
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end) for length, end in zip(lengths, ends, strict=True)]
