"""The package works as an editable install, as a wheel and not installed at all; and it asks for what it imports."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("kernels", "parallel", "launch")
SOURCES = sorted(path for room in ("dnsp", *LINKED) for path in (ROOT / room).rglob("*.py"))

# From a folder that is not the source tree: the rooms are there, and under no global name.
REACHED = """
import dnsp, dnsp.kernels, dnsp.parallel, dnsp.launch, importlib.util
assert all(importlib.util.find_spec(room) is None for room in ("kernels", "parallel", "launch")), "global names"
print(dnsp.__file__)
"""


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source tree anew, so that what building leaves behind stays out of this one."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for room in ("dnsp", *LINKED):
        shutil.copytree(ROOT / room, copy / room, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out, ".", cwd=tree)
    return next(out.glob("dnsp-*.whl"))


def test_the_rooms_are_links() -> None:
    for room in LINKED:
        assert os.readlink(ROOT / "dnsp" / room) == f"../{room}"


def test_editable_install(tmp_path: Path) -> None:
    assert Path(run(sys.executable, "-c", REACHED, cwd=tmp_path).strip()) == ROOT / "dnsp" / "__init__.py"
    assert "train" in run(Path(sys.executable).with_name("dnsp"), "--help", cwd=tmp_path)


def test_a_wheel_holds_every_room_as_files_and_works(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for path in SOURCES:
        inside = path.relative_to(ROOT).as_posix()
        assert (inside if inside.startswith("dnsp/") else f"dnsp/{inside}") in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dnsp"}
    assert not any((tmp_path / "site" / "dnsp" / room).is_symlink() for room in LINKED)
    found = run(sys.executable, "-c", REACHED, cwd=tmp_path, path=tmp_path / "site")
    assert Path(found.strip()) == tmp_path / "site" / "dnsp" / "__init__.py"
    assert "train" in run(sys.executable, "-m", "dnsp", "--help", cwd=tmp_path, path=tmp_path / "site")


def test_no_install_at_all(tree: Path) -> None:
    where = "import dnsp.kernels; print(dnsp.__file__, dnsp.kernels.__file__)"
    found = run(sys.executable, "-c", where, cwd=tree).split()
    assert [Path(f).parent for f in found] == [tree / "dnsp", tree / "dnsp" / "kernels"]
    assert "train" in run(sys.executable, "-m", "dnsp", "--help", cwd=tree)


def test_what_is_imported_is_asked_for() -> None:
    """Every third-party import is of a dependency, or of an extra's where it is inside a function."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    needed = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    offered = needed | {canonicalize_name(Requirement(line).name) for line in extras}
    distributions = importlib.metadata.packages_distributions()
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        top = set(tree.body)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"dnsp"}:
                owners = {canonicalize_name(d) for d in distributions.get(name, [name])}
                assert owners & (needed if node in top else offered), f"{path.relative_to(ROOT)}:{node.lineno}: {name}"
