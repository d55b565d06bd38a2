"""Which code a result is of: a commit where the package lies in a checkout, otherwise a hash of its files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dnsp.tasks.provenance import code_of, machine


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with a room that is linked into it, in a repository that does not have it yet."""
    made, room = tmp_path / "repository" / "dnsp", tmp_path / "repository" / "kernels"
    for folder in (made, room):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    (made / "kernels").symlink_to("../kernels")
    git(made.parent, "init", "--quiet")
    return made


def test_a_checkout_is_named_by_its_commit(package: Path) -> None:
    repository = package.parent
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "first")
    commit = git(repository, "rev-parse", "HEAD")
    clean = code_of(package)
    assert clean.startswith("git ") and len(clean) >= 11 and commit.startswith(clean.removeprefix("git "))
    (repository / "notes.txt").write_text("no part of the package")
    assert code_of(package) == clean
    (repository / "kernels" / "__init__.py").write_text("changed = True")
    assert code_of(package) == f"{clean}+"


def test_elsewhere_by_its_files(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, say, below a repository of something else, which does not have the package's files."""
    before = code_of(package)
    assert before.startswith("files ") and code_of(package) == before
    (package / "kernels" / "__init__.py").write_text("changed = True")
    changed = code_of(package)
    assert changed.startswith("files ") and changed != before
    monkeypatch.setenv("PATH", "")  # no git
    assert code_of(package) == changed


def test_a_queue_on_the_cpu_has_no_gpus() -> None:
    assert machine("cpu") == {}
    assert set(machine("cuda")) <= {"gpus", "driver"}
