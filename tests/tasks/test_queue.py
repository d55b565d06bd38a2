"""The queue of runs: what is chosen, refused, stopped, killed and gone on with. Processes and files are real.

Long because one queue, made once, is stopped, killed and moved in turn.
"""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock, Timeout

from dnsp.choices import delta_shapes
from dnsp.config import ModelConfig, load_config
from dnsp.errors import UsageError
from dnsp.json_files import json_text
from dnsp.kernels.chunk_triton import WIDTHS
from dnsp.tasks import pool
from dnsp.tasks.pool import Worker, devices_of, run
from dnsp.tasks.queue import Queue, Request, chosen_rate, measurement_job, train_job, with_overrides
from dnsp.tasks.suite import ABLATIONS, MODELS, NAMES, SEARCH_SEED, VALIDATION, Cell, suite, turn
from dnsp.tasks.worker import (
    RESULT,
    in_turn,
    make_small,
    parse_result,
    run_config,
    serve,
    training_record,
    without_damaged,
)
from tests.ranks import python_path

ROOT = Path(__file__).resolve().parents[2]
ENDED = 20.0  # seconds in which a killed queue's processes are gone
PATIENCE = 240.0
KEPT = 40_000  # bytes of a short run's folder
LOSS = 1e-3  # between one rank and two after six steps, relative


def command(out: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "dnsp", "tasks", "run", *arguments, "--out", str(out), "--device", "cpu"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}


def finished(out: Path) -> dict[str, dict[str, Any]]:
    runs = out / "runs"
    return {p.parent.relative_to(runs).as_posix(): json.loads(p.read_text()) for p in runs.rglob(RESULT)}


def result(lr: float, accuracy: float, loss: float, outcome: str = "finished") -> dict[str, Any]:
    tests = {} if outcome == "diverged" else {VALIDATION: {"accuracy": accuracy, "loss": loss}}
    return {"lr": lr, "outcome": outcome, "tests": tests}


def test_the_learning_rate_is_chosen_by_validation() -> None:
    runs = [result(1e-4, 50, 2.0), result(1e-3, 90, 0.5), result(3e-3, 90, 0.4), result(1e-2, 0, 0, "diverged")]
    assert chosen_rate(runs, "accuracy") == 3e-3  # of equal accuracy, the lower loss
    assert chosen_rate([result(1e-3, 90, 0.5), result(3e-3, 10, 0.4)], "loss") == 3e-3
    assert chosen_rate([result(1e-3, 100, 0.1), result(3e-3, 100, 0.1)], "accuracy") == 1e-3
    assert chosen_rate([result(1e-2, 0, 0, "diverged"), result(1e-3, 0, 0, "diverged")], "accuracy") == 1e-3
    broken = parse_result(json_text(result(1e-2, 5, float("nan"))).decode())  # as it is kept
    assert chosen_rate([broken, result(1e-1, 1, 9.0)], "loss") == 1e-1


@pytest.mark.parametrize("scale", ["smoke", "full"])
def test_every_run_of_every_task_is_a_valid_configuration(scale: Any) -> None:
    """Equal sizes and an equal search for all models of a task."""
    whole = suite(["all"], scale, gpu=False)
    assert {cell.task for cell in whole.cells} | {m.task for m in whole.measurements} == set(NAMES)
    for cell in whole.cells:
        run_config(train_job(cell, cell.learning_rates[0], SEARCH_SEED, scale), Path("x"))
        alike = [
            other for other in whole.cells if other.task == cell.task and other.tree["train"] == cell.tree["train"]
        ]
        assert len({other.learning_rates for other in alike}) == 1
        assert all("train" in other.tests or VALIDATION in other.tests for other in alike)
    if scale == "full":
        assert all(len(cell.learning_rates) >= 4 for cell in whole.cells)
    widths = {cell.labels["width"] for cell in whole.cells if cell.task == "mqar"}
    assert widths == ({64, 128, 256} if scale == "full" else {64})
    assert sum(cell.task == "ablations" for cell in whole.cells) == len(ABLATIONS)
    for width in widths:
        cells = [c for c in whole.cells if c.task == "mqar" and c.labels["width"] == width]
        assert [c.labels["model"] for c in cells] == list(MODELS)


def test_a_search_may_be_shorter_than_what_it_is_for() -> None:
    for cell in suite(["lm", "kv"], "full", gpu=True).cells:
        search, final = (train_job(cell, 1e-3, seed, "full") for seed in (SEARCH_SEED, 1))
        steps, whole = (run_config(job, Path("x")).train for job in (search, final))
        assert (whole.steps, final["tests"].keys()) == (cell.tree["train"]["steps"], cell.tests.keys())
        if cell.task == "lm":  # for every model
            assert (steps.steps, steps.warmup_steps, whole.steps, whole.warmup_steps) == (200, 10, 600, 30)
            assert search["tests"] == {VALIDATION: cell.tests[VALIDATION]}
        else:
            assert steps == whole.model_copy(update={"seed": SEARCH_SEED})
            assert search["tests"] == final["tests"]


def test_what_a_gpu_trains_and_times_has_kernels() -> None:
    whole = suite(["all"], "full", gpu=True)
    models = [cell.tree["model"] for cell in whole.cells]
    models += [m.arguments["model"] for m in whole.measurements if m.kind == "speed"]
    shapes = {shape for model in models for shape in delta_shapes(ModelConfig.model_validate(model))}
    assert len(shapes) == 10
    for _, key, value in shapes:
        assert key in WIDTHS and value in WIDTHS, (key, value)


def test_the_configuration_in_configs_is_a_run_of_the_queue() -> None:
    written = load_config(ROOT / "configs" / "tasks" / "mqar.yaml")
    (cell,) = [c for c in suite(["mqar"], "full", True, ("deltanet",)).cells if c.labels["width"] == 128]
    queued = run_config(train_job(cell, 3e-3, 0, "full"), Path("x"))
    assert (written.train, written.data, written.engine) == (queued.train, queued.data, queued.engine)
    assert written.model.deltanet == queued.model.deltanet and written.model.hidden_size == queued.model.hidden_size


def test_overrides_reach_runs_and_their_tests() -> None:
    cell = suite(["mqar"], "smoke", False, ("deltanet",)).cells[0]
    changed = with_overrides(cell, ["train.steps=7", "data.sources.0.options.pairs=3", "data.sequence_length=32",
                                  "checkpoint.every=3"])  # fmt: skip
    config = run_config(train_job(changed, 1e-3, 0, "smoke"), Path("x"))
    assert config.train.steps == 7 and config.data.sequence_length == 32 and config.checkpoint.every == 3
    assert changed.tests["test"]["sources"][0]["options"]["pairs"] == 3 and changed.tests["test"]["length"] == 32
    assert changed.tests["4 pairs"]["sources"][0]["options"]["pairs"] == 4  # asks what it is named after


def test_what_a_test_asks_otherwise_than_trained_stays_under_overrides() -> None:
    (cell,) = suite(["kv"], "full", True, ("deltanet",)).cells
    changed = with_overrides(cell, ["data.sources.0.options.vocab=512"])
    (trained,), (asked,) = changed.tree["data"]["sources"], changed.tests["test"]["sources"]
    assert asked["path"] == "task:kv" and asked["options"] == {"vocab": 512, "pairs": 64, "packed": False}
    assert trained["options"]["vocab"] == 512 and trained["options"]["packed"]
    (text,) = [c.tests["text"] for c in suite(["ablations"], "full", True).cells if c.labels["group"] == "base"]
    assert text["sources"] == [{"path": "python-stdlib"}]  # of one of two sources: that of the task as it is


REFUSED = (
    (["mqra"], "smoke", "cpu", {}, "unknown task 'mqra': the tasks are kv"),
    (["kv"], "smoke", "cpu", {"models": ("gru",)}, "unknown model 'gru': the models are attention"),
    (["kv"], "smoke", "cuda:99", {}, "--device cuda:99 is not there: this machine has"),
    (["kv"], "smoke", "tpu", {}, "--device tpu: give cpu, cuda"),
    (["kv"], "smoke", "cpu", {"workers": 0}, "--workers 0: at least one"),
    (["kv"], "smoke", "cpu", {"minutes": -1.0}, "--minutes -1: give the minutes"),
    (["kv"], "smoke", "cpu", {"overrides": ["train.stepz=3"]}, "did you mean 'train.steps'"),
    (["kv"], "smoke", "cpu", {"ranks": 3}, "--ranks 3: kv: sequence length 16 does not split into 3 .* fewer ranks"),
    (["kv"], "smoke", "cpu", {"overrides": ["train.lr=1e-3"]}, "train.lr=1e-3: the queue gives every run its train.lr"),
    (["mqar"], "smoke", "cpu", {"overrides": ["data.sources.0.options.pairs=9"]}, "half of vocab=8 are 4"),
    (
        ["mqar"],
        "smoke",
        "cpu",
        {"overrides": ["data.sequence_length=8", "data.sources.0.options.pairs=4"]},
        "4 need 16 tokens.*length is 8",
    ),
)


@pytest.mark.parametrize(("names", "scale", "device", "more", "words"), REFUSED)
def test_refusals(tmp_path: Path, names: Any, scale: Any, device: str, more: dict[str, Any], words: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=words):
        found = suite(names, scale, False, more.get("models", MODELS))
        run(found, Request(names, scale, device, out, **more))
    assert not out.exists()


def test_a_folder_with_other_results_is_refused_unless_asked(tmp_path: Path) -> None:
    def queue(names: list[str], **more: Any) -> Queue:
        return Queue(suite(names, "smoke", False), Request(names, "smoke", "cpu", tmp_path / "out", **more))

    queue(["kv"]).open().release()
    kept = tmp_path / "out" / "runs" / "kv" / "attention-64" / "lr-0.001-seed-0" / RESULT
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps(result(1e-3, 1, 1)))
    again = queue(["kv"])
    again.open().release()
    assert list(again.results) == ["kv/attention-64/lr-0.001-seed-0"]
    for other in (["mqar"], ["kv", "copy"]):
        with pytest.raises(UsageError, match="results of another queue .*another folder, or --overwrite"):
            queue(other).open()
    with pytest.raises(UsageError, match="overrides .* there"):
        queue(["kv"], overrides=["train.steps=3"]).open()
    (tmp_path / "out" / "report.md").write_text("of kv")
    for name in ("tables", "plots"):
        (tmp_path / "out" / name).mkdir()
        (tmp_path / "out" / name / "kv").write_text("of kv")
    queue(["kv"], overwrite=True).open().release()  # it goes on: nothing is another queue's
    assert kept.exists() and (tmp_path / "out" / "report.md").exists()
    lock = queue(["mqar"], overwrite=True).open()
    assert not kept.exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock", "queue.json", "runs"}
    with pytest.raises(UsageError, match="in use by a running queue"):
        queue(["mqar"]).open()
    lock.release()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("text")
    with pytest.raises(UsageError, match="files in it that are no queue's"):
        Queue(suite(["kv"], "smoke", False), Request(["kv"], "smoke", "cpu", tmp_path / "mine")).open()


def test_what_is_no_queues_report_is_kept(tmp_path: Path) -> None:
    """Overwriting a folder that held no queue takes its runs alone."""
    (tmp_path / "tables").mkdir()
    request = Request(["kv"], "smoke", "cpu", tmp_path, overwrite=True)
    Queue(suite(["kv"], "smoke", False), request).open().release()
    assert (tmp_path / "tables").exists()


def test_every_command_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def commands(names: list[str], *arguments: str, overwrite: bool = False) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["dnsp", *arguments])
        request = Request(names, "smoke", "cpu", tmp_path, overwrite=overwrite)
        Queue(suite(names, "smoke", False), request).open().release()
        return [" ".join(words) for words in json.loads((tmp_path / "queue.json").read_text())["commands"]]

    assert commands(["kv"], "a") == ["dnsp a"]
    assert commands(["kv"], "b") == commands(["kv"], "a") == ["dnsp a", "dnsp b"]
    assert commands(["mqar"], "c", overwrite=True) == ["dnsp c"]
    earlier = json.loads((tmp_path / "queue.json").read_text())
    earlier["command"] = earlier.pop("commands")[0]  # as it was kept before
    (tmp_path / "queue.json").write_text(json.dumps(earlier))
    assert commands(["mqar"], "d") == ["dnsp c", "dnsp d"]


def test_a_job_tells_which_code_it_is_of(tmp_path: Path) -> None:
    queue = Queue(suite(["kv", "pitfalls"], "smoke", False), Request(["kv"], "smoke", "cpu", tmp_path))
    jobs = [queue.next_job(0, measurements) for measurements in (True, False)]
    assert all(job is not None and re.match(r"(git|files) [0-9a-f]{7,}", job["code"]) for job in jobs), jobs
    assert all(job is not None and job["machine"] == {} for job in jobs)


def test_half_a_result_is_none(tmp_path: Path) -> None:
    queue = Queue(suite(["kv"], "smoke", False), Request(["kv"], "smoke", "cpu", tmp_path))
    queue.open().release()
    cut = tmp_path / "runs" / "kv" / "attention-64" / "lr-0.001-seed-0" / RESULT
    cut.parent.mkdir(parents=True)
    cut.write_text('{"kind": "train", "lr":')
    again = Queue(suite(["kv"], "smoke", False), Request(["kv"], "smoke", "cpu", tmp_path))
    again.open().release()
    assert again.results == {}


def test_a_queue_fills_one_table_after_another(tmp_path: Path) -> None:
    """Searches and final runs of a table before those of the next, whose search is begun where they wait."""
    names = ["mqar", "recall32k", "kv", "ablations"]
    queue = Queue(suite(names, "full", True), Request(names, "full", "cuda", tmp_path))

    def table(name: str) -> str:
        task, cell = name.split("/")[:2]
        return task if task != "mqar" or cell.endswith("-128") else "other widths"

    order = ["kv", "mqar", "ablations", "recall32k", "other widths"]
    jobs = queue._jobs(measurements=False)
    assert list(dict.fromkeys(table(job["name"]) for job, _ in jobs)) == order
    searches = [job["name"] for job, _ in jobs if job["name"].startswith("kv/") and "seed-0" in job["name"]]
    assert len(searches) == 5 * 4
    taken = [queue.next_job(0, False)["name"] for _ in range(25)]  # type: ignore[index]
    assert taken[:20] == searches and all(name.startswith("mqar/") for name in taken[20:])
    queue.results = {name: result(float(name.split("lr-")[1].split("-seed")[0]), 50, 1.0) for name in searches}
    best = {name.split("/")[1]: "0.001" for name in searches}  # of equal ones the lowest
    finals = [queue.next_job(0, False)["name"] for _ in range(15)]  # type: ignore[index]
    assert sorted(finals) == sorted(f"kv/{c}/lr-{lr}-seed-{seed}" for c, lr in best.items() for seed in (1, 2, 3))
    assert queue.planned["kv"] == dict.fromkeys(best, 7) and queue.total == 7 * (5 + 15 + 5 + 12) + 3


def test_any_task_may_have_other_widths() -> None:
    kv, wide, last, lm = (
        turn(Cell(task, "", {}, {}, (), labels={"width": width} if width else {}), "full")
        for task, width in (("kv", 128), ("kv", 256), ("recall32k", 128), ("lm", 0))
    )
    assert kv < last < wide < lm


def test_a_result_counts_whatever_its_process_says(tmp_path: Path) -> None:
    queue = Queue(suite(["kv"], "smoke", False), Request(["kv"], "smoke", "cpu", tmp_path))
    queue.open().release()
    job = queue.next_job(0, False)
    assert job is not None
    Path(job["folder"]).mkdir(parents=True)
    (Path(job["folder"]) / RESULT).write_text(json.dumps(result(1e-3, 1, 1)))
    queue.done(0, job, {"status": "failed", "message": "its process ended with signal SIGKILL"})
    assert list(queue.results) == [job["name"]] and not queue.tries and not queue.failed


def work(jobs: list[dict[str, Any]], folders: list[Path]) -> list[dict[str, Any]]:
    """What one worker process answers to these jobs, one after another."""
    lines = "".join(json.dumps({**job, "folder": str(at)}) + "\n" for job, at in zip(jobs, folders, strict=True))
    done = subprocess.run(
        [sys.executable, "-m", "dnsp", "tasks", "worker"], env=environment(), input=lines, capture_output=True,
        text=True, timeout=PATIENCE,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_worker_goes_on_behind_what_diverged_and_what_is_damaged(tmp_path: Path) -> None:
    """A run that diverges is a result, and the process' next run has the figures that it has in a process of its own.
    Half a checkpoint, of a folder that was copied while it was written, is no reason to fail."""
    cell = with_overrides(suite(["mqar"], "smoke", False, ("deltanet",)).cells[0], ["train.steps=6"])
    usual = train_job(cell, 1e-3, 0, "smoke")
    lost = {**usual, "lr": 1e30, "name": "lost"}
    usual["code"] = "git 1234567"
    (alone,) = work([usual], [tmp_path / "alone"])
    cut = tmp_path / "behind" / "checkpoints" / "step-00000003"
    cut.mkdir(parents=True)
    (cut / "manifest.json").write_text("{")
    answers = work([lost, usual], [tmp_path / "lost", tmp_path / "behind"])
    assert [answer["status"] for answer in (alone, *answers)] == ["finished"] * 3, answers
    first, second, diverged = (
        json.loads((tmp_path / name / RESULT).read_text()) for name in ("alone", "behind", "lost")
    )
    assert diverged["outcome"] == "diverged" and "the gradient norm is nan" in diverged["message"]
    assert first["code"] == "git 1234567"
    assert "bits per byte" not in (tmp_path / "alone" / "log.txt").read_text()  # a task's answers have no bytes
    assert "held-out loss" in (tmp_path / "alone" / "log.txt").read_text()
    assert first["tests"] == second["tests"] and first["training"]["loss"] == second["training"]["loss"]
    for name in ("alone", "behind", "lost"):
        kept = sum(path.stat().st_size for path in (tmp_path / name).rglob("*") if path.is_file())
        assert kept < KEPT, (name, kept)
        assert not (tmp_path / name / "tensorboard").exists()


def test_each_speed_has_a_process_of_its_own(tmp_path: Path) -> None:
    whole = suite(["speed", "ablations"], "smoke", False, ("deltanet",))
    speed, chunk = (next(m for m in whole.measurements if m.kind == kind) for kind in ("speed", "chunk"))
    answers = work([measurement_job(chunk), measurement_job(speed)], [tmp_path / "chunk", tmp_path / "speed"])
    assert [(a["status"], a["recycle"]) for a in answers] == [("finished", False), ("finished", True)]


def test_a_worker_without_a_run_leaves_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked to stop behind a run, while its model is asked: no run of its own saves, others use the GPU."""

    def asked() -> Iterator[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield "{}"

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "stdin", asked())
    try:
        with pytest.raises(SystemExit) as left:
            serve(io.StringIO())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 128 + signal.SIGTERM


def test_a_process_that_failed_has_ended_before_its_job_is_tried_again(tmp_path: Path) -> None:
    """It holds the lock of the run's folder, and another worker may be waiting for a job."""
    said: list[str] = []

    class Stub:
        jobs = [{"name": "a run", "folder": str(tmp_path)}]

        def next_job(self, worker: int, measurements: bool) -> dict[str, Any] | None:
            return self.jobs.pop() if self.jobs else None

        def done(self, worker: int, job: dict[str, Any], answer: dict[str, Any]) -> None:
            said.append(f"{job['name']} {answer['status']}")

    class Told(Worker):
        def _carry_out(self, job: dict[str, Any]) -> dict[str, Any]:
            return {"status": "failed", "recycle": True}

        def end(self) -> None:
            said.append("ended")

    Told(Stub(), 0, {}, False).run()  # type: ignore[arg-type]
    assert said == ["ended", "a run failed", "ended"]


DEAF = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: print("asked", file=sys.stderr, flush=True))
print("ready", file=sys.stderr, flush=True)
for _ in range(1200):  # a signal just before one long sleep would be answered behind it
    time.sleep(0.05)
"""


def test_a_process_is_asked_to_stop_once_and_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked a second time a run would no longer save; one that does not end is killed."""
    worker = Worker(None, 0, {}, False)  # type: ignore[arg-type]
    monkeypatch.setattr(pool, "END", 0.2)
    for _ in range(2):  # the next process is asked, too
        process = worker.process = subprocess.Popen(
            [sys.executable, "-c", DEAF], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stderr is not None and process.stderr.readline() == "ready\n"
        worker.ask_to_stop()
        assert process.stderr.readline() == "asked\n"
        worker.ask_to_stop()
        worker.end()
        assert process.returncode == -signal.SIGKILL and worker.process is None
        assert process.stderr.read() == ""
        process.stderr.close()


def test_of_a_long_run_a_curve_is_kept(tmp_path: Path) -> None:
    steps = range(1, 2501)
    record = {"loss": 1 / 3, "grad_norm": 2 / 3, "lr": 1e-3, "step_s": 0.01, "tokens_per_s": 1.0}
    skipped = {**record, "loss": None, "grad_norm": None}
    lines = [{"step": n, "tokens": n, **(skipped if n in (20, 21) else record)} for n in steps]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tensorboard").mkdir()
    assert training_record(tmp_path)["grad_norm_max"] == 2 / 3
    make_small(tmp_path)
    with gzip.open(tmp_path / "metrics.jsonl.gz", "rt") as packed:
        curve = [json.loads(line) for line in packed]
    assert [line["step"] for line in curve] == list(range(10, 2501, 10))
    assert curve[0]["loss"] == 0.33333 and curve[1]["loss"] is curve[1]["grad_norm"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl.gz"]


def test_a_full_disk_behind_a_result_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, mode: str) -> None:
        assert (tmp_path / "checkpoints").exists()
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gzip, "open", full)
    line = json.dumps({"step": 1, "loss": 1.0}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(line)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    make_small(tmp_path)
    assert "not packed: [Errno 28] No space left" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == line


def test_long_tests_are_asked_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes more of a GPU than a run, and runs that began together come to them together."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    job = {"queue": str(tmp_path)}
    with in_turn(job, {"length": 2**20}), pytest.raises(Timeout), FileLock(tmp_path / ".long-0-1", blocking=False):
        pass
    with in_turn(job, {"length": 2**17}), FileLock(tmp_path / ".long-0-1", blocking=False):
        pass
    assert {test["length"] > 2**17 for cell in suite(["lm"], "full", True).cells for test in cell.tests.values()} == {
        True, False,
    }  # fmt: skip


def test_damaged_checkpoints_of_a_living_run_are_left_alone(tmp_path: Path) -> None:
    cut = tmp_path / "checkpoints" / "step-00000003"
    cut.mkdir(parents=True)
    (cut / "manifest.json").write_text("{")
    with FileLock(tmp_path / ".lock"):
        assert not without_damaged(tmp_path)
    assert cut.exists()
    assert without_damaged(tmp_path) and not cut.exists()
    assert not without_damaged(tmp_path)  # there is none: whatever was refused, it was not for them


def test_the_cpu_is_one_device() -> None:
    assert devices_of("cpu") == [""]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_and_gone_on_with_it_comes_to_the_same(tmp_path: Path) -> None:
    """kill -9 in the middle: nothing is left running, what was finished is not done again, and every figure is that of
    a queue that was left alone, though the folder has another place now."""
    arguments = ("kv", "--models", "deltanet,attention", "train.steps=25", "checkpoint.every=5")
    whole = subprocess.run(
        command(tmp_path / "whole", *arguments), env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert whole.returncode == 0, whole.stderr
    assert "4 finished" in whole.stdout
    out = tmp_path / "killed"
    child = subprocess.Popen(
        command(out, *arguments, "--workers", "1"), env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + PATIENCE
    while not (before := finished(out)) and time.monotonic() < deadline:
        time.sleep(0.05)
    family = psutil.Process(child.pid).children(recursive=True)
    child.kill()
    child.wait()
    assert 1 <= len(before) < 4 and family
    psutil.wait_procs(family, timeout=ENDED)
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    out = out.rename(tmp_path / "moved")
    stamps = {name: (out / "runs" / name / RESULT).stat().st_mtime_ns for name in finished(out)}
    again = subprocess.run(
        command(out, *arguments), env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert again.returncode == 0, again.stderr
    assert f"{len(stamps)} of 4 finished before" in again.stdout
    assert all((out / "runs" / name / RESULT).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    expected, got = finished(tmp_path / "whole"), finished(out)
    assert expected.keys() == got.keys() and len(got) == 4
    for name, one in expected.items():
        assert got[name]["tests"] == one["tests"], name
        assert got[name]["training"]["loss"] == one["training"]["loss"]
        assert not (out / "runs" / name / "checkpoints").exists()
        with gzip.open(out / "runs" / name / "metrics.jsonl.gz", "rt") as metrics:
            steps = [json.loads(line)["step"] for line in metrics]
        assert steps == list(range(1, 26))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_asked_to_stop_a_run_saves_and_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("kv", "--models", "deltanet", "train.steps=400", "--workers", "1")
    child = subprocess.Popen(command(out, *arguments), env=environment(), stdout=subprocess.PIPE, text=True)
    metrics = out / "runs" / "kv" / "deltanet-64" / "lr-0.001-seed-0" / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    said, _ = child.communicate(timeout=PATIENCE)
    assert child.returncode == 0 and "the same command goes on from here" in said
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) < 400
    assert (metrics.parent / "checkpoints" / f"step-{steps[-1]:08d}").is_dir()
    timed = subprocess.run(  # out of time at once: the queue ends by itself, and cleanly
        command(out, *arguments, "--minutes", "0.02"), env=environment(), capture_output=True, text=True,
        timeout=PATIENCE,
    )  # fmt: skip
    assert timed.returncode == 0 and "stopped after" in timed.stdout
    assert finished(out) == {}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_runs_spread_over_ranks_come_to_the_same(tmp_path: Path) -> None:
    arguments = ("kv", "--models", "hybrid", "data.sequence_length=128", "train.steps=6")
    for ranks in ("1", "2"):
        done = subprocess.run(
            command(tmp_path / ranks, *arguments, "--ranks", ranks), env=environment(), capture_output=True, text=True,
            timeout=PATIENCE,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    alone, spread = finished(tmp_path / "1"), finished(tmp_path / "2")
    assert alone.keys() == spread.keys() and len(alone) == 2
    for name, one in alone.items():
        other = spread[name]
        assert "1 x 2 ranks" in (tmp_path / "2" / "runs" / name / "log.txt").read_text()
        assert other["training"]["loss"] == pytest.approx(one["training"]["loss"], rel=LOSS)
        assert other["tests"]["test"]["loss"] == pytest.approx(one["tests"]["test"]["loss"], rel=LOSS)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_on_a_gpu(tmp_path: Path) -> None:
    """Two processes on one GPU, training in bf16; then what is timed, with the device to itself."""
    out = tmp_path / "out"
    arguments = [part if part != "cpu" else "cuda" for part in command(out, "mqar", "--models", "deltanet,hybrid")]
    done = subprocess.run(
        [*arguments, "--workers", "2"], env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MPS: " in done.stdout
    got = finished(out)
    assert len(got) == 4 and all(r["config"]["engine"]["dtype"] == "bf16" for r in got.values())
    best = max(r["tests"]["test"]["accuracy"] for r in got.values())
    assert best > 80, {name: r["tests"]["test"]["accuracy"] for name, r in got.items()}

    from dnsp.tasks.chunks import chunk
    from dnsp.tasks.pitfalls import demonstrate
    from dnsp.tasks.speed import speed
    from dnsp.tasks.suite import PITFALLS, model_tree

    for name in ("attention", "deltanet", "gated_delta", "hybrid"):
        figures = speed(model_tree(name, 128, 512), context=1024, tokens=8, name=name)
        assert figures["tokens_per_s"] > 0 and figures["copy_bytes_per_s"] > 1e11
        assert (figures["cache_bytes"] > 0) == (name in ("attention", "hybrid"))
    assert chunk(tokens=256, heads=2, width=64, chunk=32)["output_error"] < 1e-5
    for pitfall in PITFALLS:
        assert demonstrate(pitfall, tokens=256, width=64)["rows"]
