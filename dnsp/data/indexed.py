"""Tokens on disk: Megatron's ``.bin`` and ``.idx``, written and read by megatron-core, with a ``.json`` beside them.

The ``.json`` says how the tokens were made. A pair that Megatron itself wrote has none and is read all the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import struct
import sys
import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from dnsp.errors import UsageError

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type of the ids, sequences, document boundaries
_MAGIC = b"MMIDIDX\x00\x00"
_LONGEST_ITEM = 1 << 30  # the index keeps lengths as int32; a longer document is stored as several items
_SCAN_TOKENS = 1 << 26  # a vocabulary nobody recorded is found by reading, where that takes well under a second


@cache
def _megatron() -> ModuleType:
    """megatron-core's module for these files, without the rest of megatron-core.

    The package's own ``__init__`` imports all of its training, which takes every rank four seconds. The module needs of
    it one function that logs; with a megatron-core whose module needs more, all is imported.
    """
    name, package = "megatron.core.datasets.indexed_dataset", find_spec("megatron.core")
    if package is not None and "megatron.core" not in sys.modules:
        bare, utils = ModuleType("megatron.core"), ModuleType("megatron.core.utils")
        bare.__path__ = list(package.submodule_search_locations or ())
        utils.__dict__["log_single_rank"] = logging.Logger.log
        sys.modules |= {bare.__name__: bare, utils.__name__: utils}
        try:
            return import_module(name)
        except (ImportError, AttributeError):
            pass
        finally:  # whoever imports megatron-core later gets it whole
            for module in [module for module in sys.modules if f"{module}.".startswith("megatron.core.")]:
                del sys.modules[module]
    # Optional accelerations of its own training loop, which is not used here.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


class Metadata(BaseModel):
    """How a pair of files was made; kept as ``.json``."""

    model_config = ConfigDict(frozen=True)

    tokenizer: str
    fingerprint: str  # of the tokenizer
    vocab_size: int
    eod: int
    source: str
    documents: int
    tokens: int  # an end-of-document id for each document included
    text_bytes: int
    digest: str  # sha256 over every document's length and ids


def data_prefix(path: str | Path) -> Path:
    """``x`` for ``x``, ``x.bin`` and ``x.idx``."""
    path = Path(path).expanduser()
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def beside(prefix: Path, suffix: str) -> Path:
    """``prefix`` with ``suffix`` put after it (a dot inside the name stays)."""
    return prefix.with_name(prefix.name + suffix)


class IndexedWriter:
    """Writes one pair. Nothing is at ``prefix`` until ``commit``; after it, all is.

    Used as ``with IndexedWriter(prefix, vocab_size) as writer``; what an earlier killed writer left is taken over.
    Raises UsageError where ``prefix`` is taken (unless ``overwrite``) or is being written by another process.
    """

    def __init__(self, prefix: str | Path, vocab_size: int, *, overwrite: bool = False) -> None:
        self.prefix = data_prefix(prefix)
        self.documents = self.tokens = 0
        self._digest = hashlib.sha256()
        if self.prefix.is_dir() or str(prefix).endswith(os.sep):
            raise UsageError(
                f"{str(prefix)!r} is a folder; give the files' common beginning, as in {self.prefix / 'corpus'}"
            )
        taken = [beside(self.prefix, suffix) for suffix in (".bin", ".idx") if beside(self.prefix, suffix).exists()]
        if taken and not overwrite:
            raise UsageError(f"{taken[0]} exists already: choose another name, or replace it with --overwrite")
        self._megatron = _megatron()
        self._type = self._megatron.DType.optimal_dtype(vocab_size)
        self._partial = beside(self.prefix, ".partial")
        self._partial.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self._partial / "lock", blocking=False)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UsageError(f"another process is writing {self.prefix}: wait, or choose another name") from error
        try:
            self._builder = self._megatron.IndexedDatasetBuilder(str(self._partial / "bin"), dtype=self._type)
        except OSError:
            self._clear()
            raise

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._builder.data_file.close()
        self._clear()

    def _clear(self) -> None:
        # The lock goes with the folder: no other writer may find the folder half removed.
        shutil.rmtree(self._partial, ignore_errors=True)
        self._lock.release()

    def add(self, ids: np.ndarray) -> None:
        """Appends one document: ids of shape [tokens], any integer type."""
        stored = ids.astype(self._type)
        full, rest = divmod(len(stored), _LONGEST_ITEM)
        self._builder.add_document(stored, [_LONGEST_ITEM] * full + [rest] * (rest > 0))
        self._digest.update(struct.pack("<Q", len(stored)))
        self._digest.update(stored.tobytes())
        self.documents += 1
        self.tokens += len(stored)

    def commit(
        self, *, tokenizer: str, fingerprint: str, vocab_size: int, eod: int, source: str, text_bytes: int
    ) -> Metadata:
        """Puts the finished files in place, on disk for good."""
        metadata = Metadata(
            tokenizer=tokenizer,
            fingerprint=fingerprint,
            vocab_size=vocab_size,
            eod=eod,
            source=source,
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=text_bytes,
            digest=self._digest.hexdigest(),
        )
        self._builder.finalize(str(self._partial / "idx"))
        (self._partial / "json").write_text(metadata.model_dump_json(indent=2) + "\n")
        for name in ("bin", "json", "idx"):
            _to_disk(self._partial / name)
        # Readers need the .idx: without it there is no data here, so it goes first and comes last.
        beside(self.prefix, ".idx").unlink(missing_ok=True)
        for name in ("bin", "json", "idx"):
            os.replace(self._partial / name, beside(self.prefix, f".{name}"))
        _to_disk(self.prefix.parent)
        return metadata


class IndexedSource:
    """One pair, memory mapped: documents by number, read in part.

    Raises UsageError for a missing, empty, truncated, damaged or foreign pair.
    """

    def __init__(self, path: str | Path) -> None:
        self.prefix = data_prefix(path)
        self.metadata = _read_metadata(self.prefix)
        dtype_bytes, sequences = _check_header(self.prefix)
        bin_path, idx_path = beside(self.prefix, ".bin"), beside(self.prefix, ".idx")
        try:
            self._dataset = _megatron().IndexedDataset(str(self.prefix))
        except (AssertionError, ValueError, IndexError) as error:
            raise _refusal(idx_path, f"is damaged ({error or 'its counts disagree'})") from error
        sequence_lengths = np.asarray(self._dataset.sequence_lengths, dtype=np.int64)
        boundaries = np.asarray(self._dataset.document_indices, dtype=np.int64)
        ends = np.concatenate([[0], np.cumsum(sequence_lengths)])
        pointers = np.asarray(self._dataset.index.sequence_pointers, dtype=np.int64)
        consistent = (
            (sequence_lengths >= 0).all()
            and (pointers == ends[:-1] * dtype_bytes).all()
            and boundaries[0] == 0
            and (np.diff(boundaries) >= 0).all()
            and boundaries[-1] == sequences
        )
        if not consistent:
            raise _refusal(idx_path, "is damaged (its lengths, offsets and document boundaries disagree)")
        size, expected = bin_path.stat().st_size, int(ends[-1]) * dtype_bytes
        if size != expected:
            what = "truncated" if size < expected else "not the file this index describes"
            raise _refusal(bin_path, f"is {what}: it has {size:,} bytes, its index says {expected:,}")
        self.lengths_N = np.diff(ends[boundaries])  # tokens of each document, int64
        self.tokens = int(ends[-1])
        self._first_item_N = boundaries[:-1]
        if self.tokens == 0:
            raise _refusal(bin_path, "holds no tokens")
        if self.metadata and (self.metadata.tokens, self.metadata.documents) != (self.tokens, len(self.lengths_N)):
            raise _refusal(beside(self.prefix, ".json"), "belongs to other .bin and .idx files: its counts differ")

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        """``length`` ids from ``offset`` in a document, in the type they are stored in."""
        # Items of one document lie one after the other, so reading past the first one's end is reading the next.
        ids: np.ndarray = self._dataset.get(int(self._first_item_N[document]), offset=offset, length=length)
        return ids

    @property
    def identity(self) -> str:
        """Equal for equal contents: the digest, or, without metadata, that of the index."""
        if self.metadata:
            return self.metadata.digest
        return "idx-" + hashlib.sha256(beside(self.prefix, ".idx").read_bytes()).hexdigest()

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises UsageError where ids are known to lie beyond the model's vocabulary.

        Without metadata a file of up to 2^26 tokens is read through; a larger one is checked batch by batch.
        """
        if self.metadata:
            needed = self.metadata.vocab_size
        elif self.tokens <= _SCAN_TOKENS:
            needed = int(self._dataset.get(0, offset=0, length=self.tokens).max()) + 1
        else:
            return
        if needed > vocab_size:
            made = f" (tokenizer {self.metadata.tokenizer!r})" if self.metadata else ""
            raise UsageError(
                f"data {self.prefix}{made} needs a vocabulary of {needed}, the model has {vocab_size}: "
                f"set model.vocab_size={needed} or more"
            )


def exists(path: str | Path) -> bool:
    """Whether a complete pair was put at this prefix."""
    prefix = data_prefix(path)
    return beside(prefix, ".idx").exists() and beside(prefix, ".bin").exists()


def _check_header(prefix: Path) -> tuple[int, int]:
    """(bytes of an id, number of items), after all that can be refused before megatron-core maps the files."""
    for path in (beside(prefix, ".idx"), beside(prefix, ".bin")):
        if not path.is_file():
            raise _refusal(path, "does not exist")
        if path.stat().st_size == 0:
            raise _refusal(path, "is empty")
    idx_path = beside(prefix, ".idx")
    try:
        with idx_path.open("rb") as stream:
            header = stream.read(_HEADER.size)
    except OSError as error:
        raise _refusal(idx_path, f"cannot be read ({error.strerror})") from error
    if not header.startswith(_MAGIC[: len(header)]):
        raise _refusal(idx_path, "is not a Megatron index")
    if len(header) < _HEADER.size:
        raise _refusal(idx_path, f"is truncated at {len(header)} bytes")
    _, version, code, items, boundaries = _HEADER.unpack(header)
    if version != 1:
        raise _refusal(idx_path, f"is a Megatron index of version {version}; version 1 is read")
    megatron = _megatron()
    try:
        dtype = np.dtype(megatron.DType.dtype_from_code(code))
    except ValueError as error:
        raise _refusal(idx_path, f"is damaged (there is no type of ids with code {code})") from error
    if dtype.kind not in "iu":
        raise _refusal(idx_path, f"holds {dtype} numbers, not token ids")
    size, expected = idx_path.stat().st_size, _HEADER.size + 12 * items + 8 * boundaries
    if size == expected + items > expected:
        raise _refusal(idx_path, "is a multimodal index; text alone is read")
    if size != expected or boundaries < 1:
        what = "truncated" if size < expected else "damaged"
        raise _refusal(idx_path, f"is {what}: it has {size:,} bytes, its header says {expected:,}")
    return dtype.itemsize, items


def _read_metadata(prefix: Path) -> Metadata | None:
    path = beside(prefix, ".json")
    if not path.exists():
        return None
    try:
        return Metadata.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        raise _refusal(path, "is not what `dnsp data prepare` writes") from error


def _refusal(path: Path, what: str) -> UsageError:
    out = path.with_suffix("")
    return UsageError(f"data file {path} {what}. Make it with: dnsp data prepare SOURCE {out} --overwrite")


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
