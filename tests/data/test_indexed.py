from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from dnsp.data.indexed import IndexedSource, IndexedWriter, data_prefix, exists
from dnsp.errors import UsageError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

FIELDS = dict(tokenizer="bytes", fingerprint="bytes-257", vocab_size=257, eod=256, source="test", text_bytes=1)


def megatron_pair(prefix: Path, documents: list[list[list[int]]], dtype: type = np.int32) -> None:
    """Documents of items of ids, as Megatron's own tools write them."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for items in documents:
        for item in items:
            builder.add_item(torch.tensor(item))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def test_megatron_reads_what_we_write(write: Callable[..., IndexedSource], distinct: list[np.ndarray]) -> None:
    source = write(distinct)
    theirs = IndexedDataset(str(source.prefix))
    assert len(theirs) == len(distinct)
    assert theirs.document_indices.tolist() == list(range(len(distinct) + 1))
    for ids, read in zip(distinct, theirs, strict=True):
        assert read.dtype == np.uint16 and np.array_equal(read, ids)


def test_we_read_what_megatron_writes(tmp_path: Path) -> None:
    documents = [[[1, 2, 3], [4, 5]], [], [[6]], [[7, 8], [], [9]]]
    megatron_pair(tmp_path / "m", documents)
    source = IndexedSource(tmp_path / "m.bin")
    assert source.metadata is None
    assert source.lengths_N.tolist() == [5, 0, 1, 3]
    for number, items in enumerate(documents):
        flat = [i for item in items for i in item]
        for start in range(len(flat)):
            for stop in range(start, len(flat) + 1):
                assert source.read(number, start, stop - start).tolist() == flat[start:stop]


def test_round_trip_of_wide_ids(write: Callable[..., IndexedSource]) -> None:
    ids = np.array([0, 65_499, 65_500, 150_000, 2**31 - 1])
    source = write([ids], vocab_size=2**31)
    assert source.read(0, 0, 5).dtype == np.int32 and np.array_equal(source.read(0, 0, 5), ids)


def test_document_longer_than_an_item(
    write: Callable[..., IndexedSource], distinct: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dnsp.data.indexed._LONGEST_ITEM", 50)
    source = write(distinct)
    assert len(IndexedDataset(str(source.prefix))) > len(distinct)
    for number, ids in enumerate(distinct):
        assert np.array_equal(source.read(number, 0, len(ids)), ids)


def test_vocabulary_is_known_without_metadata(tmp_path: Path) -> None:
    megatron_pair(tmp_path / "m", [[[5, 299, 2]]])
    source = IndexedSource(tmp_path / "m")
    source.check_vocabulary(300)
    with pytest.raises(UsageError, match=r"needs a vocabulary of 300, the model has 299: set model.vocab_size=300"):
        source.check_vocabulary(299)


def test_vocabulary_of_the_metadata(write: Callable[..., IndexedSource]) -> None:
    source = write([np.arange(5)], vocab_size=257)
    source.check_vocabulary(257)
    with pytest.raises(UsageError, match=r"\(tokenizer 'bytes'\) needs a vocabulary of 257, the model has 256"):
        source.check_vocabulary(256)


def test_identity_is_of_the_contents(write: Callable[..., IndexedSource], tmp_path: Path) -> None:
    one, same, other = (write([np.arange(n, 9)], name=str(k)).identity for k, n in enumerate((0, 0, 1)))
    assert one == same != other
    megatron_pair(tmp_path / "m", [[[1]]])
    megatron_pair(tmp_path / "n", [[[1, 2]]])
    assert IndexedSource(tmp_path / "m").identity != IndexedSource(tmp_path / "n").identity


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def patch(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))


# The index of three documents: 34 bytes of header, 3 lengths of 4, 3 offsets of 8, 4 boundaries of 8.
DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no index": (".idx", Path.unlink, r"\.idx does not exist"),
    "no data": (".bin", Path.unlink, r"\.bin does not exist"),
    "empty index": (".idx", lambda p: cut(p, 0), r"\.idx is empty"),
    "empty data": (".bin", lambda p: cut(p, 0), r"\.bin is empty"),
    "short header": (".idx", lambda p: cut(p, 20), r"\.idx is truncated at 20 bytes"),
    "short index": (".idx", lambda p: cut(p, 90), r"\.idx is truncated: it has 90 bytes, its header says 102"),
    "long index": (".idx", lambda p: p.write_bytes(p.read_bytes() + b"1234"), r"\.idx is damaged: it has 106"),
    "multimodal": (".idx", lambda p: p.write_bytes(p.read_bytes() + b"123"), r"multimodal"),
    "short data": (".bin", lambda p: cut(p, 4), r"\.bin is truncated: it has 4 bytes, its index says 12"),
    "long data": (".bin", lambda p: p.write_bytes(b"1" * 14), r"\.bin is not the file this index describes"),
    "foreign index": (".idx", lambda p: p.write_bytes(b"\x89PNG" + b"0" * 200), r"\.idx is not a Megatron index"),
    "short foreign index": (".idx", lambda p: p.write_bytes(b"hello"), r"\.idx is not a Megatron index"),
    "version": (".idx", lambda p: patch(p, 9, b"\x02"), r"of version 2"),
    "type": (".idx", lambda p: patch(p, 17, b"\x63"), r"no type of ids with code 99"),
    "floats": (".idx", lambda p: patch(p, 17, b"\x07"), r"holds float32 numbers, not token ids"),
    "lengths": (".idx", lambda p: patch(p, 34, b"\xff\xff\xff\xff"), r"\.idx is damaged"),
    "offsets": (".idx", lambda p: patch(p, 46 + 8, b"\x00"), r"\.idx is damaged"),
    "boundaries": (".idx", lambda p: patch(p, 70 + 8, b"\x03"), r"\.idx is damaged"),
    "last boundary": (".idx", lambda p: patch(p, 70 + 24, b"\x07"), r"\.idx is damaged"),
    "metadata": (".json", lambda p: p.write_text("{}"), r"\.json is not what `dnsp data prepare` writes"),
    "broken metadata": (".json", lambda p: cut(p, 30), r"\.json is not what `dnsp data prepare` writes"),
    "other metadata": (
        ".json",
        lambda p: p.write_text(p.read_text().replace('"tokens": 6', '"tokens": 7')),
        r"\.json belongs to other \.bin and \.idx files",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused(write: Callable[..., IndexedSource], case: str) -> None:
    prefix = write([np.arange(n) for n in (1, 2, 3)]).prefix
    suffix, damage, message = DAMAGE[case]
    damage(prefix.with_suffix(suffix))
    with pytest.raises(UsageError, match=message) as caught:
        IndexedSource(prefix)
    assert f"dnsp data prepare SOURCE {prefix} --overwrite" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_documents(tmp_path: Path) -> None:
    megatron_pair(tmp_path / "m", [[]])
    with pytest.raises(UsageError, match=r"m\.bin is empty"):
        IndexedSource(tmp_path / "m")


def test_taken_names_and_folders_are_refused(write: Callable[..., IndexedSource], tmp_path: Path) -> None:
    before = write([np.arange(3)])
    with pytest.raises(UsageError, match=r"corpus\.bin exists already: .* --overwrite"):
        IndexedWriter(tmp_path / "corpus", 257)
    assert IndexedSource(before.prefix).tokens == 3
    for folder in (tmp_path, f"{tmp_path}/new/"):
        with pytest.raises(UsageError, match="is a folder; give the files' common beginning"):
            IndexedWriter(folder, 257)
    with IndexedWriter(tmp_path / "two", 257), pytest.raises(UsageError, match="another process is writing"):
        IndexedWriter(tmp_path / "two", 257)


def test_names_with_dots(write: Callable[..., IndexedSource], tmp_path: Path) -> None:
    source = write([np.arange(3)], name="v1.5")
    assert source.prefix == tmp_path / "v1.5" and exists(tmp_path / "v1.5") and exists(tmp_path / "v1.5.bin")
    assert data_prefix("v1.5.idx") == Path("v1.5")


def test_nothing_is_there_before_commit_or_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyError), IndexedWriter(tmp_path / "x", 257) as writer:
        writer.add(np.arange(100_000))
        assert not exists(tmp_path / "x")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_overwriting_fails_without_harm(write: Callable[..., IndexedSource], tmp_path: Path) -> None:
    write([np.arange(3)])
    with pytest.raises(KeyError), IndexedWriter(tmp_path / "corpus", 257, overwrite=True) as writer:
        writer.add(np.arange(9))
        raise KeyError
    assert IndexedSource(tmp_path / "corpus").tokens == 3
    with IndexedWriter(tmp_path / "corpus", 257, overwrite=True) as writer:
        writer.add(np.arange(9))
        writer.commit(**FIELDS)
    assert IndexedSource(tmp_path / "corpus").tokens == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.bin", "corpus.idx", "corpus.json"]


def _killed(prefix: Path) -> None:
    writer = IndexedWriter(prefix, 257)
    writer.add(np.arange(100_000))
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_writer_left_is_taken_over(tmp_path: Path) -> None:
    child = get_context("fork").Process(target=_killed, args=(tmp_path / "x",))
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL and not exists(tmp_path / "x")
    with IndexedWriter(tmp_path / "x", 257) as writer:
        writer.add(np.arange(5))
        writer.commit(**FIELDS)
    assert IndexedSource(tmp_path / "x").tokens == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.json"]


def _write_with_little_room(prefix: Path, room: int, tokens: int, outcome) -> None:  # noqa: ANN001
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        with IndexedWriter(prefix, 257) as writer:
            for _ in range(tokens // 1000):
                writer.add(np.arange(1000))
            writer.commit(**FIELDS)
        outcome.put("written")
    except OSError as error:
        outcome.put(error.errno)


@pytest.mark.parametrize("room", [1_000, 100_000, 199_999])
def test_full_disk_leaves_nothing(tmp_path: Path, room: int) -> None:
    """Full in the first write, in a later one, and in the last bytes that closing the file writes."""
    context = get_context("fork")
    outcome = context.SimpleQueue()
    child = context.Process(target=_write_with_little_room, args=(tmp_path / "x", room, 100_000, outcome))
    child.start()
    child.join(30)
    assert child.exitcode == 0 and outcome.get() != "written"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", [False, True])
def test_one_module_of_megatron_core_is_imported_and_no_more(tmp_path: Path, broken: bool) -> None:
    """Unless that module wants more, as another version's might; and who wants the whole package still gets it."""
    megatron_pair(tmp_path / "m", [[[5, 299, 2]]])
    command = f"""
import sys
from dnsp.data.indexed import IndexedSource

class Whole:  # it is not found in a package whose own __init__ has not run
    def find_spec(name, path, target=None):
        if name == "megatron.core.msc_utils" and sys.modules["megatron.core"].__spec__ is None:
            raise ImportError(name)

if {broken}:
    sys.meta_path.insert(0, Whole)
source = IndexedSource({str(tmp_path / "m")!r})
assert source.read(0, 0, 3).tolist() == [5, 299, 2]
assert ("megatron.core.tensor_parallel" in sys.modules) == {broken}
import megatron.core
from megatron.core.datasets.indexed_dataset import IndexedDataset
assert megatron.core.tensor_parallel and isinstance(source._dataset, IndexedDataset) == {broken}
"""
    done = subprocess.run([sys.executable, "-c", command], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
