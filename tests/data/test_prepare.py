from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dnsp.data.documents import documents, stdlib_files
from dnsp.data.indexed import IndexedSource, exists
from dnsp.data.prepare import ensure, prepare
from dnsp.errors import UsageError

STDLIB_SECONDS = 10  # on one busy core; about 1 alone


def test_files_come_back_byte_for_byte(tmp_path: Path) -> None:
    contents = [b"plain\n", bytes(range(1, 256)), b"", "é漢\r\n".encode(), os.urandom(5_000_000).replace(b"\0", b"1")]
    folder = tmp_path / "in"
    folder.mkdir()
    for number, content in enumerate(contents):
        (folder / f"{number}.txt").write_bytes(content)
    summary = prepare(str(folder), tmp_path / "out" / "corpus")
    source = IndexedSource(summary.prefix)
    filled = [content for content in contents if content]
    assert len(source.lengths_N) == len(filled) and summary.empty_documents == 1
    for number, content in enumerate(filled):
        ids = source.read(number, 0, int(source.lengths_N[number]))
        assert ids[-1] == 256 and ids[:-1].astype(np.uint8).tobytes() == content
    made = summary.metadata
    assert (made.documents, made.text_bytes) == (len(filled), sum(map(len, filled)))
    assert made.tokens == made.text_bytes + made.documents == source.tokens
    assert (made.tokenizer, made.vocab_size, made.eod) == ("bytes", 257, 256)
    assert source.metadata == made
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["corpus.bin", "corpus.idx", "corpus.json"]


def test_the_digest_is_of_the_contents(tmp_path: Path) -> None:
    digests = []
    for name, text in [
        ("a", '{"text":"ab"}\n{"text":"c"}'),
        ("b", '{"text": "ab"}\n\n{"text": "c"}\n'),
        ("c", '{"text":"abc"}'),
    ]:
        (tmp_path / f"{name}.jsonl").write_text(text)
        digests.append(prepare(str(tmp_path / f"{name}.jsonl"), tmp_path / name).metadata.digest)
    assert digests[0] == digests[1] != digests[2]


def test_standard_library(tmp_path: Path) -> None:
    began = time.monotonic()
    prefix = ensure("python-stdlib", cache_dir=tmp_path)
    assert time.monotonic() - began < STDLIB_SECONDS
    source = IndexedSource(prefix)
    expected = [document.text for document in documents("python-stdlib") if document.text]
    read = [source.read(n, 0, int(length) - 1) for n, length in enumerate(source.lengths_N)]
    assert [ids.astype(np.uint8).tobytes() for ids in read] == expected
    assert len(expected) <= len(stdlib_files())
    before = Path(f"{prefix}.bin").stat().st_mtime_ns
    assert ensure("python-stdlib", cache_dir=tmp_path) == prefix
    assert Path(f"{prefix}.bin").stat().st_mtime_ns == before
    # What was damaged in the cache is made again, not refused.
    Path(f"{prefix}.bin").write_bytes(b"x")
    assert IndexedSource(ensure("python-stdlib", cache_dir=tmp_path)).tokens == source.tokens


def test_long_documents_are_the_same_files_in_the_same_order(tmp_path: Path) -> None:
    source = IndexedSource(ensure("python-stdlib-long", cache_dir=tmp_path))
    read = [source.read(n, 0, int(length) - 1).astype(np.uint8).tobytes() for n, length in enumerate(source.lengths_N)]
    codecs = f"{os.sep}encodings{os.sep}"  # tables, no text
    files = [document for document in documents("python-stdlib") if codecs not in document.origin]
    assert b"\n".join(read) == b"\n".join(document.text for document in files)
    assert min(map(len, read)) >= 1_100_000 > 16 * 65_536 and len(read) > 4


@pytest.mark.parametrize(
    ("size", "wanted"), [(0, ["aa", "b", "ccc", "d"]), (3, ["aa\nb", "ccc\nd"]), (99, ["aa\nb\nccc\nd"])]
)
def test_documents_are_joined_to_a_size(size: int, wanted: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ["aa", "b", "ccc", "d"]))
    prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", join=size)
    source = IndexedSource(tmp_path / "out")
    read = [bytes(source.read(n, 0, int(length) - 1).tolist()) for n, length in enumerate(source.lengths_N)]
    assert read == [text.encode() for text in wanted]


def _ensure(cache: Path, outcome) -> None:  # noqa: ANN001
    prefix = ensure("python-stdlib", cache_dir=cache)
    outcome.put((prefix, IndexedSource(prefix).tokens, Path(f"{prefix}.bin").stat().st_ino))


def test_several_ranks_prepare_once(tmp_path: Path) -> None:
    context = get_context("fork")
    outcome = context.SimpleQueue()
    ranks = [context.Process(target=_ensure, args=(tmp_path, outcome)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert len({outcome.get() for _ in ranks}) == 1  # the same file: nobody wrote a second one


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dnsp.data.prepare.stdlib_files", lambda: [Path(os.__file__)])
    monkeypatch.setattr("dnsp.data.documents.stdlib_files", lambda: [Path(os.__file__)])
    monkeypatch.setenv("DNSP_CACHE", str(tmp_path / "chosen"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Path(ensure("python-stdlib")).parent == tmp_path / "chosen"
    monkeypatch.delenv("DNSP_CACHE")
    assert Path(ensure("python-stdlib")).parent == tmp_path / "xdg" / "dnsp"
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cache .* cannot be used .*: set DNSP_CACHE"):
        ensure("python-stdlib", cache_dir=tmp_path / "file" / "below")
    assert ensure(f"{tmp_path}/mine.bin") == f"{tmp_path}/mine"


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.touch()
    latin.write_bytes("café".encode("latin-1"))
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"holds no text \(1 empty documents\)"):
        prepare(str(empty), out)
    with pytest.raises(UsageError, match="there is no file or folder"):
        prepare(str(tmp_path / "none"), tmp_path / "new" / "out")
    with pytest.raises(UsageError, match="tokenizer './none'"):
        prepare(str(latin), out, "./none")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt", "latin.txt"]
    prepare(str(latin), out)  # bytes take any text
    with pytest.raises(UsageError, match=r"out\.bin exists already"):
        prepare(str(latin), out)
    latin.write_bytes(b"another text")
    assert prepare(str(latin), out, overwrite=True).metadata.text_bytes == 12
    with pytest.raises(UsageError, match="it cannot be written"):
        prepare(str(latin), empty / "below")


def test_text_that_is_not_utf8_for_a_tokenizer_of_characters(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<end>": 0, "<unk>": 1, "a": 2, "b": 3}, "<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>").save_pretrained(tmp_path / "words")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "1.txt").write_text("a b a")
    (folder / "2.txt").write_text("b x")
    made = prepare(str(folder), tmp_path / "out", str(tmp_path / "words"))
    source = IndexedSource(tmp_path / "out")
    assert [source.read(n, 0, int(length)).tolist() for n, length in enumerate(source.lengths_N)] == [
        [2, 3, 2, 0],
        [3, 1, 0],
    ]
    assert made.metadata.vocab_size == 4 and made.metadata.text_bytes == 8
    (folder / "3.txt").write_bytes(b"abc\xff")
    with pytest.raises(UsageError, match=r"3\.txt is not UTF-8 \(byte 3\).*--tokenizer bytes"):
        prepare(str(folder), tmp_path / "other", str(tmp_path / "words"))
    assert not exists(tmp_path / "other")


def _prepare_with_little_room(source: Path, out: Path, outcome) -> None:  # noqa: ANN001
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        prepare(str(source), out)
        outcome.put("written")
    except UsageError as error:
        outcome.put(str(error))


def test_full_disk(tmp_path: Path) -> None:
    (tmp_path / "big.txt").write_text("text " * 20_000)
    context = get_context("fork")
    outcome = context.SimpleQueue()
    child = context.Process(target=_prepare_with_little_room, args=(tmp_path / "big.txt", tmp_path / "out", outcome))
    child.start()
    child.join(30)
    said = outcome.get()
    assert "out: the disk is full (File too large); nothing was left there" in said
    assert [p.name for p in tmp_path.iterdir()] == ["big.txt"]


def test_progress_on_a_terminal_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")  # on one that can do nothing there is no live line
    (tmp_path / "a.txt").write_text("text")
    for terminal in (True, False):
        shown = io.StringIO()
        console = Console(file=shown, force_terminal=terminal)
        prepare(str(tmp_path / "a.txt"), tmp_path / "out", overwrite=True, console=console)
        assert ("1 documents, 5 tokens" in shown.getvalue()) == terminal
        assert terminal or shown.getvalue() == ""


def test_importing_data_is_quick() -> None:
    """megatron-core and transformers take seconds: only a file or a tokenizer that is really used imports them."""
    loaded = "any(name in sys.modules for name in ('megatron', 'transformers'))"
    check = f"import sys, dnsp.data.mix, dnsp.data.batch; sys.exit({loaded})"
    assert subprocess.run([sys.executable, "-c", check], timeout=60).returncode == 0


def test_opening_data_says_nothing(tmp_path: Path) -> None:
    """What megatron-core warns about on import is of no concern here."""
    (tmp_path / "a.txt").write_text("text")
    command = f"from dnsp.data.prepare import prepare; prepare({str(tmp_path / 'a.txt')!r}, {str(tmp_path / 'out')!r})"
    done = subprocess.run([sys.executable, "-c", command], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
