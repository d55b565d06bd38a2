"""What a step can meet: numbers that are not finite, a loss that jumps, memory and disks that do not suffice.

Long because each trouble is made by hand, in processes that are real.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from dnsp import checkpoint
from dnsp.cli import main
from dnsp.config import FaultsConfig, load_config, parse_config
from dnsp.data.mix import open_data
from dnsp.data.prepare import prepare
from dnsp.faults import Skipped, Spikes, _ways
from dnsp.launch.local import free_port
from dnsp.parallel.grid import Grid
from dnsp.telemetry import RANKS_INTERVAL
from tests.dnsp.conftest import environment
from tests.ranks import run_ranks

Dnsp = Callable[..., Any]


def overflowing(stage: int, hurt: str = "") -> str:
    """Finite weights, too large from layer 1 on, or rank 1's gradient of ``hurt``: who is named on two ranks."""
    from dnsp.config import parse_config
    from dnsp.engine import Engine
    from dnsp.faults import find_nonfinite
    from dnsp.model.decoder import Decoder
    from dnsp.parallel.grid import make_grid
    from dnsp.parallel.layout import Layout
    from dnsp.parallel.plan import make_plan

    tree = {
        "model": {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16},
        "engine": {"zero_stage": stage},
        "train": {"global_batch": 2},
    }
    config = parse_config({**tree, "parallel": {"layout": "contiguous"}}, "the test")
    grid = make_grid(1)
    torch.manual_seed(0)
    model = Decoder(config.model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(1e-2 if hurt else 1e38)
        model.model.layers[1].mlp.gate_proj.weight.fill_(1e-2 if hurt else 1e38)
    engine = Engine(model, config, grid, 1)
    if hurt and grid.rank == 1:
        engine.names[hurt].register_hook(lambda grad: grad * math.inf)
    plan = make_plan([[0]], Layout("contiguous", 1, 128), grid)
    tokens = torch.full((1, 128), grid.rank)

    def backward(micro: int) -> None:
        engine.backward(tokens, tokens, plan, 256)

    backward(0)
    engine.skip()
    return find_nonfinite(engine, backward, lambda micro: f"sequence {grid.rank}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_the_first_layer_that_is_not_finite_is_named(stage: int) -> None:
    for said in run_ranks(overflowing, 2, stage):
        assert said == "first in the output of layer 1 (gated_delta), micro-batch 0 (sequence 0) on rank 0, and on 1"
    name = "model.layers.1.mlp.up_proj.weight"  # every output is finite, and the gradients that come before
    for said in run_ranks(overflowing, 2, stage, name):
        assert said == f"first in the gradient of {name}, micro-batch 0 (sequence 1) on rank 1"


@pytest.mark.timeout(200)
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    workplace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    metrics: Callable[[Path], list[dict[str, Any]]],
) -> None:
    """The embedding of one character is infinite; the steps that read it are passed over, and the others learn."""
    from dnsp.model.decoder import Decoder
    from dnsp.model.hf import save_pretrained

    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": ("~" if n % 6 == 3 else "") + f"line {n} " * 30}) for n in range(60)]
    Path("text.jsonl").write_text("\n".join(lines) + "\n")
    prepare("text.jsonl", "text", "bytes")
    given = ("data.sources=[{path: text}]", "data.sequence_length=256", "model.tie_word_embeddings=false")
    config = load_config(workplace / "tiny.yaml", given)
    torch.manual_seed(0)
    model = Decoder(config.model)
    with torch.no_grad():
        model.model.embed_tokens.weight[ord("~")] = math.inf
    save_pretrained(model, "poisoned")
    data = open_data(config.data, vocab_size=257)
    cursor, bad = data.start, []
    for step in range(1, 21):
        work = data.step(cursor, 256, 1)
        bad += [step] if ord("~") in work.sequences[0].tokens_and_targets(0, 256)[0] else []
        cursor = work.cursor
    assert 0 < len(bad) < 10

    # the probe would meet that character too
    settings = ("init_from=hf:poisoned", "run.dir=run", "train.steps=20", "engine.probe=false")
    assert main(["train", str(workplace / "tiny.yaml"), *given, *settings, "faults.nonfinite_steps=20"]) == 0
    said = re.findall(r"not finite at step (\d+) on rank 0: (.*); skipped \((\d+) so far\)", capsys.readouterr().out)
    cause = "the weights of model.embed_tokens.weight are not finite themselves (rank 0)"
    assert said == [(str(step), cause, str(count)) for count, step in enumerate(bad, 1)]
    records = metrics(Path("run"))
    assert [record["step"] for record in records if record["loss"] is None] == bad
    assert all((record["grad_norm"] is None) == (record["loss"] is None) for record in records)
    counts = [sum(step <= record["step"] for step in bad) for record in records]
    assert [record.get("skipped", 0) for record in records] == counts
    learned = [record["loss"] for record in records if record["loss"] is not None]
    assert learned[-1] < learned[0] - 1


def test_steps_in_a_row_end_a_run_and_others_do_not() -> None:
    skipped = Skipped(FaultsConfig(nonfinite_steps=2))
    assert [skipped.bad(), skipped.bad()] == [False, False]
    skipped.in_a_row = 0  # a good step between
    assert [skipped.bad(), skipped.bad(), skipped.bad()] == [False, False, True]
    assert skipped.total == 5
    assert Skipped(FaultsConfig(nonfinite_steps=0)).bad()


def test_a_spike_is_measured_against_the_median() -> None:
    spikes = Spikes(FaultsConfig(spike_factor=2.0, spike_window=4, rollbacks=1))
    assert not spikes.is_one(100.0)  # nothing to compare with
    spikes.losses.extend([1.0, 9.0, 1.0, 1.1])
    assert spikes.is_one(2.2) and not spikes.is_one(2.0) and not spikes.is_one(float("nan"))
    assert spikes.may_roll_back(10) and not spikes.losses
    assert not spikes.may_roll_back(10) and spikes.may_roll_back(20)
    off = Spikes(FaultsConfig())
    off.losses.extend([1.0] * 50)
    assert not off.is_one(1e9)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_spike_is_rolled_back_and_its_sequences_passed_over(
    stage: int, workplace: Path, dnsp: Dnsp, metrics: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """A learning rate that is too high sends the loss up by a quarter in the fourth step."""
    name, sharded = f"spiky-{stage}", "engine.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"
    rule = ("faults.spike_factor=1.05", "faults.spike_window=2", "faults.rollbacks=50", "checkpoint.every=1")
    place = (f"engine.zero_stage={stage}", sharded, "train.steps=20", f"run.dir={name}", "train.lr=0.15")
    done = dnsp("train", "tiny.yaml", "--ranks", 2, *place, *rule, cwd=workplace)
    assert done.returncode == 0, done.stderr
    backs = [line for line in done.stdout.splitlines() if "is a spike" in line and "back to step" in line]
    assert backs and "of the data are passed over" in backs[0]
    records = metrics(workplace / name)
    assert [record["step"] for record in records] == list(range(1, 21))  # each once
    state = checkpoint.latest(workplace / name)[0].state
    assert len(state["passed_over"]) == len(backs)
    assert state["cursor"]["sequences"] == 20 + len(backs)  # one sequence a step, and those passed over
    # what was put back is what was saved: without the rule and the data passed over, the first steps are the same
    first = int(backs[0].split("back to step ")[1].split(",")[0])
    plain = dnsp(
        *("train", "tiny.yaml", "--ranks", 2, f"engine.zero_stage={stage}", sharded, f"run.dir=plain-{name}"),
        f"train.steps={first}",
        "train.lr=0.15",
        cwd=workplace,
    )
    assert plain.returncode == 0, plain.stderr
    assert [r["loss"] for r in metrics(workplace / f"plain-{name}")] == [r["loss"] for r in records[:first]]


@pytest.mark.slow
def test_too_many_rollbacks_end_the_run(workplace: Path, dnsp: Dnsp) -> None:
    rule = ("faults.spike_factor=1.0001", "faults.spike_window=1", "faults.rollbacks=1", "checkpoint.every=3")
    settings = ("run.dir=hopeless", "train.steps=200", "train.lr=1e-6", *rule)
    done = dnsp("train", "tiny.yaml", "--ranks", 2, *settings, cwd=workplace)
    assert done.returncode == 1
    assert "is a spike" in done.stderr and "was gone back to 1 times already" in done.stderr, done.stderr
    assert "resume=auto goes on from" in done.stderr


A_SLOW_DISK = """
import sys, time
from dnsp import checkpoint
from dnsp.cli import main

latest = checkpoint.latest

def slowly(folder):
    time.sleep(8)
    return latest(folder)[0], ["a later one is damaged"]

checkpoint.latest = slowly
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_checkpoint_that_takes_long_to_read_is_no_stall(workplace: Path) -> None:
    """A run that goes back reads all of it against its checksums, and says which are damaged; on a GPU a step may last
    as long as a collective may."""
    rule = ("faults.spike_factor=1.0001", "faults.spike_window=1", "faults.rollbacks=1", "checkpoint.every=3")
    settings = ("tiny.yaml", "run.dir=patient", "train.steps=200", "train.lr=1e-6", "run.stall=5", *rule)
    done = subprocess.run(
        [sys.executable, "-c", A_SLOW_DISK, "train", *settings],
        cwd=workplace,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "no progress" not in done.stderr and "back to step" in done.stdout, done.stdout + done.stderr
    assert "a later one is damaged; it is passed over\n" in done.stdout, done.stdout


ON_ANOTHER_DISK = """
import os, sys
from pathlib import Path
from dnsp import checkpoint
from dnsp.cli import main

opened = checkpoint.open_checked
if os.environ["RANK"] == "1":
    checkpoint.open_checked = lambda path: opened(Path("elsewhere", path))
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_refusal_of_one_rank_in_a_roll_back_is_that_ranks_to_say(workplace: Path) -> None:
    """Rank 1 cannot see the checkpoint, and is none that says what all ranks have to say. As under torchrun, which
    ends all ranks when the first has ended."""
    rule = ("faults.spike_factor=1.0001", "faults.spike_window=1", "checkpoint.every=1", "train.lr=1e-6")
    settings = ("tiny.yaml", "run.dir=apart", "train.steps=200", "run.timeout=5", *rule)
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ON_ANOTHER_DISK, "train", *settings],
            cwd=workplace,
            env={**environment(), **place, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        while all(rank.poll() is None for rank in ranks):
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.terminate()
    (_, zeros), (_, ones) = (rank.communicate(timeout=30) for rank in ranks)
    assert zeros == "" and ones.startswith("error: rank 1: rank 0 sees the checkpoint elsewhere/apart/"), zeros + ones
    assert "another rank does not: No such file or directory; run.dir=apart resume=auto goes on from" in ones
    assert len(ones.splitlines()) == 1 and ranks[1].returncode == 1


def test_a_run_folder_that_nodes_do_not_share_is_refused(workplace: Path, tmp_path: Path) -> None:
    """Each would write its part of every checkpoint onto a disk of its own, and none could be read again."""
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    port, ranks = str(free_port()), []
    for rank in "01":
        (tmp_path / rank).mkdir()
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "dnsp", "train", str(workplace / "tiny.yaml"), "run.dir=runs/mine"],
                cwd=tmp_path / rank,
                env={**environment(), **place, "MASTER_PORT": port, "RANK": rank},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for rank in ranks:
        _, stderr = rank.communicate(timeout=100)
        assert rank.returncode == 2, stderr
        said = f"{tmp_path / '1' / 'runs' / 'mine'} is not the run folder that rank 0 has made"
        assert said in stderr and "that all nodes share" in stderr and len(stderr.splitlines()) == 1, stderr
    assert not (tmp_path / "1" / "runs" / "mine").exists()
    assert not list((tmp_path / "0" / "runs" / "mine").glob(".seen*"))


def starved() -> str:
    """A real engine in an address space that cannot hold the step."""
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from dnsp.config import parse_config
    from dnsp.engine import Engine
    from dnsp.errors import RunError
    from dnsp.faults import explained_memory
    from dnsp.model.decoder import Decoder
    from dnsp.parallel.grid import make_grid
    from dnsp.parallel.layout import Layout
    from dnsp.parallel.plan import make_plan

    config = parse_config({"train": {"micro_batch": 2, "global_batch": 2}}, "the test")
    grid = make_grid(1)
    engine = Engine(Decoder(config.model), config, grid, 1)
    length = 65536
    plan = make_plan([[0], [0]], Layout("zigzag", 1, length), grid)
    tokens = torch.zeros(2, length, dtype=torch.long)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20, resource.RLIM_INFINITY))
    try:
        with explained_memory(engine, config, length):
            engine.backward(tokens, tokens, plan, length)
    except RunError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "it fitted"


def test_out_of_memory_says_what_holds_it_and_what_would_make_it_fit() -> None:
    (said,) = run_ranks(starved, 1)
    assert said.startswith("out of memory on rank 0: ")
    for what in ("parameters 0.00 GiB", "gradients", "moments and master weights", "activations and the rest"):
        assert what in said
    ways = said.partition("To make it fit: ")[2]
    assert ways.count("; ") >= 2
    for setting in ("engine.activation_checkpointing=true", "train.micro_batch=1", "engine.mlp_tile=2048"):
        assert setting in ways, said


def test_no_way_out_of_memory_is_one_that_the_ranks_refuse() -> None:
    tree = {"engine": {"activation_checkpointing": True, "mlp_tile": 1024, "zero_stage": 3}}
    held = dict.fromkeys(("parameters", "gradients", "moments and master weights", "activations and the rest"), 1.0)
    for world, size, more in ((1, 1, []), (2, 2, []), (3, 1, []), (4, 2, ["parallel.sequence=4"])):
        ways = [way for way, _ in _ways(Grid(world, 0, size), parse_config(tree, "the test"), 8192, False, held)]
        assert ways == [*more, "data.sequence_length=4096", "more ranks"], world


def starved_on_a_gpu() -> str:
    """A step that is given a fiftieth of the GPU."""
    from dnsp.config import parse_config
    from dnsp.engine import Engine
    from dnsp.errors import RunError
    from dnsp.faults import explained_memory
    from dnsp.model.decoder import Decoder
    from dnsp.parallel.grid import make_grid
    from dnsp.parallel.layout import Layout
    from dnsp.parallel.plan import make_plan

    heads = {name: 64 for name in ("head_dim", "linear_key_head_dim", "linear_value_head_dim")}
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, **heads}
    config = parse_config({"model": wide, "engine": {"zero_stage": 1, "dtype": "bf16"}}, "the test")
    grid = make_grid(1)
    engine = Engine(Decoder(config.model).cuda(), config, grid, 1)
    try:
        for length in (1024, 2**18):  # in the first one kernels are proven
            plan = make_plan([[0]], Layout("zigzag", 1, length), grid).to(engine.device)
            tokens = torch.zeros(1, length, dtype=torch.long, device=engine.device)
            with explained_memory(engine, config, length):
                engine.backward(tokens, tokens, plan, length)
            engine.skip()
            torch.cuda.set_per_process_memory_fraction(0.02)
    except RunError as error:
        return str(error)
    return "it fitted"


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_out_of_memory_on_a_gpu() -> None:
    (said,) = run_ranks(starved_on_a_gpu, 1, timeout=280)
    assert said.startswith("out of memory on rank 0: CUDA out of memory"), said
    (rest,) = re.findall(r"activations and the rest (\d+\.\d+) GiB", said)
    assert float(rest) > 0.1, said
    ways = said.partition("To make it fit: ")[2]
    for setting in ("engine.activation_checkpointing=true", "engine.offload_optimizer=true", "engine.mlp_tile=2048"):
        assert setting in ways, said


def starved_start() -> str:
    """A real engine that finds no room for the optimizer's shard."""
    from dnsp.config import parse_config
    from dnsp.engine import Engine
    from dnsp.errors import RunError
    from dnsp.faults import explained_start
    from dnsp.model.decoder import Decoder
    from dnsp.parallel.grid import make_grid

    tree = {
        "model": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4},
        "engine": {"zero_stage": 1, "deepspeed": {"prescale_gradients": False}},  # which is not why
    }
    config = parse_config(tree, "the test")
    model, grid = Decoder(config.model), make_grid(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20, resource.RLIM_INFINITY))
    try:
        with explained_start(model, config, grid):
            Engine(model, config, grid, 1)
    except RunError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "it fitted"


def test_out_of_memory_at_the_start_says_what_needs_it() -> None:
    (said,) = run_ranks(starved_start, 1)
    assert said.startswith("out of memory on rank 0: "), said
    assert "Needed by parameters 0.2" in said and "moments and master weights 0.59" in said, said
    ways = said.partition("To make it fit: ")[2]
    for setting in ("more ranks (", "model.num_hidden_layers=2", "model.hidden_size=512"):
        assert setting in ways, said
    assert "activation" not in ways


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_disk_that_is_full_for_a_while(workplace: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    """No file of the ranks grows any more: not the records, TensorBoard's, a checkpoint, nor what they print into."""
    run, log = workplace / "brim", workplace / "brim.log"
    settings = ("train", "tiny.yaml", "--ranks", 2, "run.dir=brim", "checkpoint.every=3", "train.steps=100000")
    with log.open("wb") as out:
        process = start(*settings, cwd=workplace, stdout=out)
    try:
        wait(lambda: bool(checkpoint.checkpoints(run)), process)
        ranks = psutil.Process(process.pid).children()
        before = checkpoint.checkpoints(run)[-1]
        for rank in ranks:
            rank.rlimit(psutil.RLIMIT_FSIZE, (1, psutil.RLIM_INFINITY))
        time.sleep(RANKS_INTERVAL + 2)  # every file was to be written
        assert process.poll() is None, process.communicate()
        recorded = len((run / "metrics.jsonl").read_text().splitlines())
        for rank in ranks:
            rank.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
        wait(lambda: checkpoint.checkpoints(run)[-1] > before and "can be written again" in log.read_text(), process)
    finally:
        process.send_signal(signal.SIGUSR1)
        _, stderr = process.communicate(timeout=60)
    said = log.read_text()
    assert process.returncode == 0, stderr + said
    assert said.count("NOT RECORDED: cannot write into brim: File too large; the run goes on") == 1, said
    assert "NOT SAVED: the checkpoint of step" in said and "File too large" in said
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    last, *after = steps[recorded - 1 :]  # what the outage has left out, and nothing else, is missing
    assert steps[:recorded] == list(range(1, last + 1))
    assert after and after[0] > last + 1 and after == list(range(after[0], after[-1] + 1))
    saved = checkpoint.latest(run)[0]
    assert saved is not None and saved.step == steps[-1]
    assert len(list((run / "tensorboard").glob("events.*"))) >= 2


STALLED = """
import sys, threading
from dnsp.launch.environment import Environment
from dnsp.watchdog import Watch

def busy():
    if "hangs" in sys.argv:
        threading.Event().wait()
    raise OSError("the terminal is gone")

watch = Watch(Environment("torchrun", 0, 2, 0, 2, "127.0.0.1", 0))
watch.at_end = busy
print("a word that is still to come out")
threading.Thread(target=watch._stalled, args=("no progress",)).start()
threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("report", "end"),
    [({}, "fails"), ({"DNSP_ERROR_FILE": "/dev/full"}, "hangs"), ({"DNSP_ERROR_FILE": "/no/folder"}, "fails")],
)
def test_a_rank_that_stands_still_ends_though_it_cannot_say_so(report: dict[str, str], end: str) -> None:
    """Nor give its terminal and the driver's library back."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", STALLED, end],
            env={**environment(), "RANK": "0", **report},
            stdout=full,
            stderr=full,
            timeout=40,
        )
    assert done.returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(), ("--ranks", 2)])
def test_a_run_that_is_saved_has_not_failed_for_words_that_found_no_room(
    ranks: tuple[object, ...], workplace: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    name = f"mute-{len(ranks)}"
    settings = ("train.steps=2", "generate.tokens=5", f"run.dir={name}")
    with open("/dev/full", "w") as full:
        process = start("train", "tiny.yaml", *ranks, *settings, cwd=workplace, stdout=full)
        _, stderr = process.communicate(timeout=90)
    assert (process.returncode, stderr) == (0, "")
    saved = checkpoint.latest(workplace / name)[0]
    assert saved is not None and saved.step == 2


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_run_that_cannot_save_goes_on_and_says_so(
    workplace: Path, dnsp: Dnsp, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """The folder of the checkpoints is in the way of itself, as on a disk that went read-only; then it is mended."""
    run = workplace / "unsaved"
    process = start(
        *("train", "tiny.yaml", "--ranks", 2, "run.dir=unsaved", "checkpoint.every=3", "train.steps=5000"),
        cwd=workplace,
    )
    try:
        wait(lambda: bool(checkpoint.checkpoints(run)), process)
        (run / "checkpoints").rename(run / "elsewhere")
        (run / "checkpoints").write_text("no folder")
        log = run / "checkpoints.jsonl"
        wait(lambda: log.exists() and any(json.loads(line)["error"] for line in log.read_text().splitlines()), process)
        failed = log.read_text().count("\n")
        (run / "checkpoints").unlink()
        (run / "elsewhere").rename(run / "checkpoints")
        wait(lambda: any(not json.loads(line)["error"] for line in log.read_text().splitlines()[failed:]), process)
    finally:
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "NOT SAVED: the checkpoint of step" in stdout and "the run goes on" in stdout
    assert checkpoint.latest(run)[0] is not None and not checkpoint.latest(run)[1]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_rank_that_stands_still_is_named_with_its_place(
    workplace: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """One process, stopped for longer than it may make no progress: it gives its own verdict once it is woken."""
    run = workplace / "still"
    process = start("train", "tiny.yaml", "run.dir=still", "train.steps=5000", "run.stall=4", cwd=workplace)
    wait(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0, process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(6)
    process.send_signal(signal.SIGCONT)
    _, stderr = process.communicate(timeout=30)
    said = (run / "failure.txt").read_text() if (run / "failure.txt").exists() else ""
    assert process.returncode == 1, stderr
    assert "no progress for" in stderr and "rank 0 (node " in stderr and "was at step" in stderr, (stderr, said)
    (stacks,) = (run / "stacks").glob("rank-*.txt")
    assert "dnsp/train.py" in stacks.read_text() and os.uname().nodename in stacks.read_text()


def wait(true: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 100) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
