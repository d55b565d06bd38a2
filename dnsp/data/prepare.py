"""``dnsp data prepare``: text to tokens on disk, whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dnsp.data.documents import PYTHON_STDLIB, PYTHON_STDLIB_LONG, Document, documents, joined, stdlib_files
from dnsp.data.indexed import IndexedSource, IndexedWriter, Metadata, data_prefix, exists
from dnsp.data.tokenizer import Tokenizer, load_tokenizer
from dnsp.errors import UsageError

_BATCH_BYTES = 1 << 22  # of text handed to the tokenizer at once
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Summary:
    """What was written."""

    prefix: str
    metadata: Metadata
    empty_documents: int  # left out
    seconds: float


def prepare(
    source: str,
    out: str | Path,
    tokenizer: str = "bytes",
    *,
    text_key: str = "text",
    join: int = 0,
    overwrite: bool = False,
    console: Console | None = None,
) -> Summary:
    """Writes ``out.bin``, ``out.idx`` and ``out.json``: every document's ids, then the end-of-document id.

    source: a text file, a folder, ``.jsonl`` (key ``text_key``), each also ``.gz`` or ``.zst``, ``.parquet``
        (column ``text_key``), or ``python-stdlib``.
    tokenizer: ``bytes``, or a Hugging Face name or folder.
    join: documents that follow each other become one, of at least so many bytes; 0: they stay as they are.
    console: where progress is shown, if it is a terminal; standard error by default.

    Raises UsageError for everything that a user can put right, a full disk included; then nothing is left at ``out``.
    """
    began = time.monotonic()
    stream, encoder = documents(source, text_key), load_tokenizer(tokenizer)
    if join:
        stream = joined(stream, join)
    text_bytes = empty = 0
    with (
        _in_words(out),
        IndexedWriter(out, encoder.vocab_size, overwrite=overwrite) as writer,
        _progress(console) as advance,
    ):
        for batch in _batches(stream):
            filled = [document for document in batch if document.text]
            empty += len(batch) - len(filled)
            text_bytes += sum(len(document.text) for document in filled)
            for ids in _encode(encoder, filled):
                writer.add(np.append(ids, encoder.eod))
            advance(writer.documents, writer.tokens)
        if writer.documents == 0:
            raise UsageError(f"{source!r} holds no text ({empty} empty documents): give a source with text in it")
        metadata = writer.commit(
            tokenizer=encoder.name,
            fingerprint=encoder.fingerprint,
            vocab_size=encoder.vocab_size,
            eod=encoder.eod,
            source=source,
            text_bytes=text_bytes,
        )
    return Summary(str(writer.prefix), metadata, empty, time.monotonic() - began)


def ensure(path: str, tokenizer: str = "bytes", cache_dir: str | Path | None = None) -> str:
    """The prefix of prepared data: ``path`` itself, or for ``python-stdlib`` (``-long``) one in the cache, made now if
    need be.

    Safe to call from every rank: one prepares, the others wait. The cache is ``cache_dir``, else ``DNSP_CACHE``, else
    ``dnsp`` in ``XDG_CACHE_HOME`` or ``~/.cache``; its entries are keyed by the tokenizer, Python's version and the
    library's contents.
    """
    if path not in (PYTHON_STDLIB, PYTHON_STDLIB_LONG):
        return str(data_prefix(path))
    folder = Path(cache_dir) if cache_dir else default_cache()
    key = hashlib.sha256(load_tokenizer(tokenizer).fingerprint.encode())
    for file in stdlib_files():
        key.update(file.read_bytes())
    prefix = folder / f"{path}-{platform.python_version()}-{key.hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{prefix}.lock"):
            if not _usable(prefix):
                prepare(path, prefix, tokenizer, overwrite=True)
    except OSError as error:
        raise UsageError(
            f"the data cache {folder} cannot be used ({error.strerror or error}): "
            "set DNSP_CACHE to a folder that you can write to"
        ) from error
    return str(prefix)


def default_cache() -> Path:
    """``DNSP_CACHE``, or ``dnsp`` in the user's cache folder."""
    if chosen := os.environ.get("DNSP_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "dnsp"


def _usable(prefix: Path) -> bool:
    try:
        return exists(prefix) and IndexedSource(prefix).metadata is not None
    except UsageError:  # damaged since: made again
        return False


def _batches(stream: Iterator[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in stream:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES or len(batch) == 1024:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(encoder: Tokenizer, batch: list[Document]) -> list[np.ndarray]:
    try:
        return encoder.encode_batch([document.text for document in batch])
    except UnicodeDecodeError as error:
        origin = next(document.origin for document in batch if document.text == error.object)
        raise UsageError(
            f"{origin} is not UTF-8 (byte {error.start}), which tokenizer {encoder.name!r} needs: "
            "convert it, take it out, or use --tokenizer bytes"
        ) from error


@contextmanager
def _in_words(out: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = "the disk is full" if error.errno in _FULL_DISK else "it cannot be written"
        raise UsageError(
            f"{out}: {full} ({error.strerror or error}); nothing was left there. Free space, or choose another place"
        ) from error


@contextmanager
def _progress(console: Console | None) -> Iterator[Callable[[int, int], None]]:
    """Yields ``advance(documents, tokens)``; shows a line on a terminal, nothing elsewhere."""
    console = console or Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading")
        yield lambda documents, tokens: progress.update(task, description=f"{documents:,} documents, {tokens:,} tokens")
