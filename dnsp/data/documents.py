"""Where text comes from: files, folders, JSON lines, Parquet, compressed or not, and Python's own library."""

from __future__ import annotations

import gzip
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from dnsp.errors import UsageError

PYTHON_STDLIB = "python-stdlib"
PYTHON_STDLIB_LONG = "python-stdlib-long"
LONG = 1_100_000  # bytes of its documents, at least: 16 times 65,536 tokens of a byte each, and more
JSON_LINES = {".jsonl", ".ndjson"}
COMPRESSED = {".gz", ".zst"}
# Not the library itself: what others installed, its tests, and what the build generated for this one machine.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_GENERATED = ("_sysconfigdata", "config-")


class Document(NamedTuple):
    """One text, and where it was found, for messages."""

    text: bytes
    origin: str


def documents(source: str, text_key: str = "text") -> Iterator[Document]:
    """The documents of ``source``, in an order that depends on its contents alone.

    A plain file is one document, a JSON line or a Parquet row is one (its ``text_key``), a folder is all its files
    sorted by path, hidden ones left out. ``python-stdlib`` is the running Python's own standard library, and
    ``python-stdlib-long`` the same without its codecs' tables, files joined to documents of a million bytes.

    Raises UsageError: at once for a missing source; while reading for what is unreadable, damaged or not text, or needs
    a package that is not installed.
    """
    if source == PYTHON_STDLIB_LONG:
        return joined(_read([file for file in stdlib_files() if file.parent.name != "encodings"], text_key), LONG)
    if source == PYTHON_STDLIB:
        files = stdlib_files()
    else:
        path = Path(source).expanduser()
        if path.is_dir():
            files = _folder_files(path)
        elif path.exists():
            files = [path]
        else:
            raise UsageError(
                f"there is no file or folder {source!r}: give a text file, a folder, .jsonl, .parquet, "
                f"or the name {PYTHON_STDLIB} or {PYTHON_STDLIB_LONG}"
            )
    return _read(files, text_key)


def joined(stream: Iterator[Document], size: int) -> Iterator[Document]:
    """Documents that follow each other as one, of ``size`` bytes or more; a shorter rest goes with the last."""
    whole: Document | None = None
    parts: list[Document] = []
    bytes_so_far = 0
    for document in stream:
        parts.append(document)
        bytes_so_far += len(document.text)
        if bytes_so_far >= size:
            if whole is not None:
                yield whole
            whole, parts, bytes_so_far = _one(parts), [], 0
    if whole is not None:
        parts.insert(0, whole)
    if parts:
        yield _one(parts)


def _one(parts: list[Document]) -> Document:
    return Document(b"\n".join(part.text for part in parts), parts[0].origin)


def _read(files: list[Path], text_key: str) -> Iterator[Document]:
    for file in files:
        with _reading(file):
            yield from _file_documents(file, text_key)


def stdlib_files() -> list[Path]:
    """The source files of the running Python's standard library, sorted by their path inside it."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in _NOT_STDLIB and not s.startswith(_GENERATED)]
        found += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith(_GENERATED)]
    if not found:
        raise UsageError(f"this Python keeps no source files of its library under {root}: prepare another text")
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _folder_files(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if not s.startswith(".")]
        found += [file for n in names if not n.startswith(".") and (file := Path(folder, n)).is_file()]
    if not found:
        raise UsageError(f"folder {str(root)!r} holds no files: give a folder with text in it")
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _file_documents(file: Path, text_key: str) -> Iterator[Document]:
    kind = file.with_suffix("").suffix if file.suffix in COMPRESSED else file.suffix
    if file.suffix == ".parquet":
        yield from _parquet(file, text_key)
    elif kind in JSON_LINES:
        with _open(file) as stream:
            yield from _json_lines(stream, file, text_key)
    else:
        with _open(file) as stream:
            text = stream.read()
        if b"\0" in text[:8192]:
            raise UsageError(f"{file} is not text (it has zero bytes): take it out, or convert it to UTF-8")
        yield Document(text, str(file))


def _json_lines(stream: BinaryIO, file: Path, text_key: str) -> Iterator[Document]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{where} is not JSON ({error}): correct or remove that line") from error
        yield Document(_text_of(record, text_key, where), where)


def _text_of(record: Any, text_key: str, where: str) -> bytes:
    if not isinstance(record, dict) or text_key not in record:
        keys = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
        raise UsageError(f"{where} has no key {text_key!r} (it has: {keys[:120]}): name the text's key with --text-key")
    text = record[text_key]
    if not isinstance(text, str):
        raise UsageError(f"{where}: {text_key!r} is {type(text).__name__}, not text: name another key with --text-key")
    # A lone surrogate, which JSON can spell, has no UTF-8.
    return text.encode("utf-8", errors="replace")


def _parquet(file: Path, text_key: str) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError(f"{file}: reading Parquet needs the pyarrow package: pip install pyarrow") from error
    try:
        with pq.ParquetFile(file) as table:
            if text_key not in table.schema_arrow.names:
                names = ", ".join(map(repr, table.schema_arrow.names))
                raise UsageError(f"{file} has no column {text_key!r} (it has: {names}): name it with --text-key")
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
                for record in batch.to_pylist():
                    row += 1
                    where = f"{file}, row {row}"
                    yield Document(_text_of(record, text_key, where), where)
    except pa.ArrowException as error:
        raise UsageError(f"{file} is not a readable Parquet file ({error}): get it again") from error


def _open(file: Path) -> BinaryIO:
    """The file's bytes, uncompressed."""
    if file.suffix == ".gz":
        return cast(BinaryIO, gzip.open(file))
    if file.suffix == ".zst":
        return io.BufferedReader(_ZstdStream(file))
    return file.open("rb")


class _ZstdStream(io.RawIOBase):
    """A .zst file's bytes. zstandard's own stream reader takes a truncated file for a whole one."""

    def __init__(self, file: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise UsageError(f"{file}: reading .zst needs the zstandard package: pip install zstandard") from error
        self._damage: type[Exception] = zstandard.ZstdError
        self._frame = zstandard.ZstdDecompressor().decompressobj
        self._decoder = self._frame()
        self._file, self._raw = file, file.open("rb")
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._decoder.unused_data if self._decoder.eof else b""
            packed = packed or self._raw.read(1 << 16)
            if not packed:
                if not self._decoder.eof:
                    raise UsageError(f"{self._file} is not a whole .zst file (it is truncated): get it again")
                return 0
            if self._decoder.eof:  # one frame may follow another
                self._decoder = self._frame()
            try:
                self._ready = self._decoder.decompress(packed)
            except self._damage as error:
                raise UsageError(f"{self._file} is not a whole .zst file ({error}): get it again") from error
        taken = min(len(buffer), len(self._ready))
        buffer[:taken], self._ready = self._ready[:taken], self._ready[taken:]
        return taken

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Says in words what a damaged or unreadable file is."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"{file} is not a whole .gz file ({error}): get it again") from error
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror or error}): correct that, or leave it out") from error
