from __future__ import annotations

import gzip
import json
import os
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from dnsp.data.documents import documents, stdlib_files
from dnsp.errors import UsageError

TEXTS = ["first\n", "naïve 漢字 🙂\r\n", "third, no newline"]


def texts(source: Path, key: str = "text") -> list[str]:
    return [document.text.decode() for document in documents(str(source), key)]


def json_lines(key: str = "text") -> bytes:
    return b"".join(json.dumps({"id": n, key: text}).encode() + b"\n\n" for n, text in enumerate(TEXTS))


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("packing", PACKERS)
def test_files_and_json_lines(tmp_path: Path, packing: str) -> None:
    pack = PACKERS[packing]
    plain, lines = tmp_path / f"a.txt{packing}", tmp_path / f"b.jsonl{packing}"
    plain.write_bytes(pack("".join(TEXTS).encode()))
    lines.write_bytes(pack(json_lines("body")))
    assert texts(plain) == ["".join(TEXTS)]
    assert texts(lines, "body") == TEXTS
    two_parts = tmp_path / f"c.jsonl{packing}"
    two_parts.write_bytes(pack(json_lines()) + pack(json_lines()))
    assert texts(two_parts) == TEXTS * 2


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_large_compressed_files(tmp_path: Path, packing: str) -> None:
    rows = [f"row {n} " + os.urandom(40).hex() for n in range(20_000)]
    file = tmp_path / f"a.jsonl{packing}"
    file.write_bytes(PACKERS[packing]("".join(json.dumps({"text": row}) + "\n" for row in rows).encode()))
    assert texts(file) == rows


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("left", [0.2, 0.99])
def test_truncated_compressed_files(tmp_path: Path, packing: str, left: float) -> None:
    whole = PACKERS[packing](os.urandom(300_000).hex().encode())
    file = tmp_path / f"a.txt{packing}"
    file.write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(UsageError, match=rf"a\.txt\{packing} is not a whole \{packing} file .*: get it again"):
        texts(file)
    file.write_bytes(b"not compressed at all")
    with pytest.raises(UsageError, match=rf"a\.txt\{packing} is not a whole \{packing} file"):
        texts(file)


def test_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS * 1000, "id": list(range(3000))}), file)
    assert texts(file) == TEXTS * 1000
    with pytest.raises(UsageError, match=r"no column 'body' \(it has: 'text', 'id'\): name it with --text-key"):
        texts(file, "body")
    with pytest.raises(UsageError, match=r"a\.parquet, row 1: 'id' is int, not text"):
        texts(file, "id")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UsageError, match=r"a\.parquet is not a readable Parquet file"):
        texts(file)


@pytest.mark.parametrize(("package", "name"), [("pyarrow", "a.parquet"), ("zstandard", "a.txt.zst")])
def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str) -> None:
    (tmp_path / name).write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"{name}: .* needs the {package} package: pip install {package}"):
        texts(tmp_path / name)


def test_folder_is_read_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ["b/2.txt", "b/10.md", "a.txt", ".hidden", ".git/config", "c.jsonl.gz"]:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(gzip.compress(json_lines()) if name.endswith(".gz") else name.encode())
    os.mkfifo(tmp_path / "pipe")  # would be waited for for ever
    assert texts(tmp_path) == ["a.txt", "b/10.md", "b/2.txt", *TEXTS]


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "not JSON": ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
    "no key": (
        "a.jsonl",
        b'{"body": "x", "id": 1}\n',
        r"line 1 has no key 'text' \(it has: 'body', 'id'\).*--text-key",
    ),
    "no object": ("a.jsonl", b"[1, 2]\n", r"line 1 has no key 'text' \(it has: list\)"),
    "not text": ("a.jsonl", b'{"text": 5}\n', r"line 1: 'text' is int, not text"),
    "binary": ("a.bin.txt", b"\x7fELF\x00\x00", r"a\.bin\.txt is not text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_contents(tmp_path: Path, case: str) -> None:
    name, content, message = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        texts(tmp_path / name)


def test_missing_sources(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no file or folder '.*nothing': give .* python-stdlib"):
        texts(tmp_path / "nothing")
    with pytest.raises(UsageError, match="holds no files"):
        texts(tmp_path)


def test_a_lone_surrogate_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x\\ud800y"}\n')
    assert texts(tmp_path / "a.jsonl") == ["x?y"]


def test_stdlib_files_are_the_librarys_own() -> None:
    files = stdlib_files()
    root = Path(sysconfig.get_path("stdlib"))
    inside = [file.relative_to(root).as_posix() for file in files]
    assert inside == sorted(inside) and {"ast.py", "json/decoder.py"} <= set(inside)
    assert not any("site-packages" in name or "/test/" in f"/{name}" for name in inside)
    assert sum(file.stat().st_size for file in files) > 3_000_000
