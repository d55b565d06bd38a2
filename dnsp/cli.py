"""The command line. It starts fast: what is slow to import is imported by the command that needs it.

Long because it is one flat list, a function a command, with every option's help where the option is.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from dnsp.config import load_config
from dnsp.ending import end, speaks
from dnsp.errors import Echo, PeerFailed, RunError, UsageError
from dnsp.folder import check_new, check_start
from dnsp.json_files import write_json
from dnsp.launch.environment import LaunchError, find_environment
from dnsp.launch.local import SUPERVISOR, start_ranks
from dnsp.parallel.errors import LayoutError, PlanError
from dnsp.schedule import check_ranks
from dnsp.tasks.commands import tasks_app

app = typer.Typer(
    name="dnsp",
    help="Hybrid delta-rule language models, one sequence over any number of ranks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Prepare training data.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")
bench_app = typer.Typer(
    help="Measure against the peers that are installed, in one run.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(bench_app, name="bench")
app.add_typer(tasks_app, name="tasks")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see configs/.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example train.steps=10.")]
Ranks = Annotated[int | None, typer.Option(min=1, help="Start this many local ranks; not under a launcher.")]
Port = Annotated[int | None, typer.Option(min=1, max=65535, help="Where rank 0 listens; left out, a free one.")]


def _can_be_written(option: typer.CallbackParam, file: Path | None) -> Path | None:
    """Said before the work, not after it."""
    if file is not None and (file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK)):
        name = option.opts[0]
        raise UsageError(f"{name} {file}: cannot be written; name a file in a folder that exists and is yours")
    return file


JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the figures here as JSON.", callback=_can_be_written),
]

Shapes = Annotated[
    list[str] | None, typer.Argument(metavar="SHAPE", help="KEY=VALUE,KEY=VALUE; left out, the usual ones.")
]
Runs = Annotated[int, typer.Option(help="Of each, by turns; medians are reported.")]
Warmup = Annotated[int, typer.Option(help="Runs of each that do not count.")]
Peers = Annotated[str, typer.Option(help="Any of flash-qla,fla; all or none.")]
ProfileFile = Annotated[
    Path | None,
    typer.Option("--profile", metavar="FILE", help="Write what takes the time here.", callback=_can_be_written),
]


@app.callback()
def _launcher_options(
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    # deepspeed's launcher puts --local_rank before the command; LOCAL_RANK says the same
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: Ranks = None,
    port: Port = None,
    json_file: JsonFile = None,
) -> None:
    """Train a model. Under deepspeed, torchrun or srun this is one rank of the run."""
    settings = load_config(config, overrides or [])
    environment = find_environment()
    if ranks is not None and environment.launcher != "none":
        raise UsageError(f"--ranks {ranks} under {environment.launcher}; leave it out, the launcher decides")
    check_ranks(settings, ranks or environment.world_size)
    check_start(settings)
    if environment.launcher == "none":  # others may have started this run before: all ranks agree on that first
        check_new(settings)
    if ranks is not None and ranks > 1:
        raise typer.Exit(start_ranks(_without_ranks(sys.argv[1:]), ranks, port))

    from dnsp.train import train as run

    figures = run(settings, environment, name=config.stem)
    if environment.rank == 0:
        write_json(json_file, figures)


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or one of its checkpoints.")],
    overrides: Overrides = None,
    json_file: JsonFile = None,
) -> None:
    """Held-out loss of a trained model, whole and by position."""
    from dnsp.evaluate import evaluate_run

    environment = find_environment()
    figures = evaluate_run(run, overrides or [], environment)
    if environment.rank == 0:
        write_json(json_file, figures)


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or one of its checkpoints.")],
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "def ",
    tokens: Annotated[int, typer.Option(min=1, help="How many to add.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token each time.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Continue a prompt with the recurrent decoder of a trained model."""
    from dnsp.evaluate import generate_from_run

    print(generate_from_run(run, prompt, tokens, temperature, seed))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or one of its checkpoints.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The Hugging Face folder to make.")],
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
) -> None:
    """Write a trained model as a folder that transformers loads: safetensors, configuration, tokenizer."""
    if dtype not in ("fp32", "bf16"):
        raise UsageError(f"--dtype {dtype}: it is not one of fp32, bf16")
    import torch

    from dnsp.evaluate import export_run

    found = export_run(run, out, torch.bfloat16 if dtype == "bf16" else torch.float32)
    print(f"{out}: {found} as {dtype}; transformers.AutoModelForCausalLM.from_pretrained({str(out)!r}) reads it")


@app.command()
def verify(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: Annotated[str, typer.Option(help="World sizes to check, as in 1,2,4.")] = "1,2",
    layouts: Annotated[str, typer.Option(help="Any of contiguous,zigzag.")] = "contiguous,zigzag",
    transports: Annotated[str, typer.Option(help="Any of peer,p2p,gather; peer needs GPUs.")] = "p2p,gather",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    zero: Annotated[str, typer.Option(help="ZeRO stages, as in 0,1,2,3; else the configuration's.")] = "",
    sequence: Annotated[str, typer.Option(help="Sizes of a sequence group, as in 1,2; else the configuration's.")] = "",
    json_file: JsonFile = None,
) -> None:
    """Prove that loss and every parameter's gradient equal one process's, and the delta rule bit for bit."""
    from dnsp.verify import run

    worlds, sizes, stages = _numbers("--ranks", ranks), _numbers("--sequence", sequence), _numbers("--zero", zero, 0)
    ways = layouts.split(","), transports.split(",")
    raise typer.Exit(run(config, overrides or [], worlds, *ways, dtype, json_file, stages, sizes))


def _numbers(option: str, text: str, least: int = 1) -> list[int]:
    """``1,2,4`` as numbers; nothing as none."""
    found = []
    for part in text.split(",") if text else ():
        if not part.strip().isdigit() or int(part) < least:
            raise UsageError(f"{option}: {part!r} is not a number; give numbers of {least} or more, as in {option} 1,2")
        found.append(int(part))
    return found


@app.command("verify-ranks", hidden=True)
def verify_ranks(folder: Path) -> None:
    """One rank of what verify starts."""
    from dnsp.verify import rank_main

    rank_main(folder)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="Whether it can run, too.")] = None,
    overrides: Overrides = None,
    hostfile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Whether deepspeed --hostfile FILE can start CONFIG.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Of CONFIG; left out, every slot or GPU.")] = None,
    ssh_port: Annotated[int | None, typer.Option(min=1, max=65535, help="As deepspeed's --ssh_port.")] = None,
    prove: Annotated[bool, typer.Option("--prove", help="Prove the Triton kernels on this GPU, for CONFIG.")] = False,
    json_file: JsonFile = None,
) -> None:
    """What this machine can and cannot do, with the cure for each; whether CONFIG can run on it, or on other hosts."""
    settings = None if config is None else load_config(config, overrides or [])
    if prove:
        from dnsp.prove import run as prove_kernels

        raise typer.Exit(prove_kernels(settings, json_file))
    if settings is None and (hostfile, ranks) != (None, None):
        raise UsageError("--hostfile and --ranks go with a configuration: dnsp doctor CONFIG --hostfile FILE")
    from dnsp.doctor import run

    raise typer.Exit(run(json_file, None, settings, hostfile, ranks, ssh_port))


@app.command("host-facts", hidden=True)
def host_facts() -> None:
    """What doctor --hostfile asks a host over ssh."""
    from dnsp.hosts import facts

    print(facts())


Layouts = Annotated[str, typer.Option(help="Any of contiguous,zigzag.")]
Worlds = Annotated[str, typer.Option(help="Numbers of ranks, as in 2,4,8; on one GPU they share it.")]
Steps = Annotated[int, typer.Option(min=1, help="Timed turns of each; the median counts.")]


@bench_app.command("scan")
def bench_scan(
    tokens: Annotated[int, typer.Option(min=1, help="In all.")] = 131_072,
    ranks: Worlds = "2,4,8",
    layouts: Layouts = "contiguous,zigzag",
    transports: Annotated[str, typer.Option(help="Any of peer,p2p,gather.")] = "peer,p2p,gather",
    heads: Annotated[int, typer.Option(min=1, help="Of keys.")] = 16,
    value_heads: Annotated[int, typer.Option(min=1)] = 32,
    width: Annotated[int, typer.Option(min=1, help="Of a head.")] = 128,
    decay: Annotated[str, typer.Option(help="Of a token, as of bench delta: logsigmoid, or a number.")] = "logsigmoid",
    segment_tokens: Annotated[int | None, typer.Option(min=64, help="Left out: what fills the GPU.")] = None,
    steps: Steps = 5,
    json_file: JsonFile = None,
) -> None:
    """The delta rule over several ranks, against one process and against the local shard."""
    from dnsp.bench.scan import run

    status = run(
        tokens, _numbers("--ranks", ranks), layouts.split(","), transports.split(","), heads=heads,
        value_heads=value_heads, width=width, decay=decay, segment_tokens=segment_tokens, steps=steps,
        json_path=json_file,
    )  # fmt: skip
    raise typer.Exit(status)


@bench_app.command("attention")
def bench_attention(
    tokens: Annotated[int, typer.Option(min=1, help="In all.")] = 65_536,
    ranks: Worlds = "2,4",
    layouts: Layouts = "contiguous,zigzag",
    transports: Annotated[str, typer.Option(help="Of keys and values: any of peer,ring,gather.")] = "peer,ring,gather",
    heads: Annotated[int, typer.Option(min=1, help="Of queries.")] = 16,
    key_heads: Annotated[int, typer.Option(min=1)] = 2,
    widths: Annotated[str, typer.Option(help="Of a head, as in 256,128.")] = "256,128",
    backend: Annotated[str, typer.Option(help="Of parallel.attention_backend.")] = "auto",
    document: Annotated[int | None, typer.Option(min=1, help="Tokens of each document; left out: one.")] = None,
    steps: Steps = 5,
    json_file: JsonFile = None,
) -> None:
    """Softmax attention over several ranks, against one process."""
    from dnsp.bench.attention import run

    status = run(
        tokens, _numbers("--ranks", ranks), layouts.split(","), transports.split(","), heads=heads,
        key_heads=key_heads, widths=_numbers("--widths", widths), backend=backend, document=document,
        steps=steps, json_path=json_file,
    )  # fmt: skip
    raise typer.Exit(status)


@bench_app.command("stack")
def bench_stack(
    overrides: Overrides = None,
    tokens: Annotated[int, typer.Option(min=1, help="In all.")] = 65_536,
    ranks: Worlds = "4",
    layouts: Layouts = "contiguous,zigzag",
    steps: Steps = 5,
    json_file: JsonFile = None,
) -> None:
    """Three gated delta layers and one of attention over several ranks, against one process."""
    from dnsp.bench.stack import run

    worlds = _numbers("--ranks", ranks)
    raise typer.Exit(run(overrides or [], tokens, worlds, layouts.split(","), steps=steps, json_path=json_file))


@bench_app.command("plot")
def bench_plot(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="What bench delta, train or scan wrote.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="A .png, .svg or .pdf.")],
) -> None:
    """What benchmarks wrote with --json, as one picture."""
    from dnsp.bench.plots import plot

    raise typer.Exit(plot(files, out))


@app.command("bench-rank", hidden=True)
def bench_rank(what: str, file: Path) -> None:
    """One rank of what bench scan, attention and stack start."""
    from dnsp.bench.ranks import as_rank

    as_rank(what, file)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="What dnsp tasks run --out made.")],
    json_file: JsonFile = None,
) -> None:
    """Tables beside the document's figures; report.md, CSV files and plots in the first DIR."""
    from dnsp.tasks.report import report as run

    raise typer.Exit(run(folders, json_file))


@data_app.command("prepare")
def prepare(
    source: Annotated[str, typer.Argument(help="Text, a folder, .jsonl, .parquet (.gz, .zst), python-stdlib(-long).")],
    out: Annotated[Path, typer.Argument(help="Prefix of the .bin and .idx files to write.")],
    tokenizer: Annotated[str, typer.Option(help="bytes, or a Hugging Face name or path.")] = "bytes",
    text_key: Annotated[str, typer.Option(help="The key or column of the text in .jsonl and .parquet.")] = "text",
    join: Annotated[
        int, typer.Option(min=0, help="Documents that follow each other become one of at least so many bytes; 0: none.")
    ] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")] = False,
) -> None:
    """Tokenize text into Megatron's .bin and .idx files."""
    from dnsp.data.prepare import prepare as run

    done = run(source, out, tokenizer, text_key=text_key, join=join, overwrite=overwrite)
    made = done.metadata
    empty = f" ({done.empty_documents:,} empty ones left out)" if done.empty_documents else ""
    print(f"{done.prefix}: {made.documents:,} documents{empty}, {made.tokens:,} tokens, {done.seconds:.1f} s")


@bench_app.command("delta")
def bench_delta(
    shapes: Shapes = None,
    runs: Runs = 20,
    warmup: Warmup = 3,
    peers: Peers = "all",
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="segment_tokens=deterministic for shapes that do not say.")
    ] = False,
    errors: Annotated[bool, typer.Option(help="Hold outputs and gradients against the fp64 reference.")] = True,
    cold: Annotated[bool, typer.Option("--cold", help="Measure the first call of fresh processes instead.")] = False,
    profile: ProfileFile = None,
    json_file: JsonFile = None,
) -> None:
    """The gated delta rule, forward and backward: times, memory and errors beside the peers'.

    A SHAPE is tokens=32768,heads=16/32,K=128,V=128,batch=1,dtype=bf16,decay=logsigmoid (or a number),documents=1,
    segment_tokens=auto (or deterministic, or a number),l2norm=yes; these are the defaults.
    """
    from dnsp.bench.delta import run

    options = {"runs": runs, "warmup": warmup, "peers": peers, "deterministic": deterministic}
    files = {"profile": profile, "json_path": json_file}
    raise typer.Exit(run(shapes or [], **options, errors=errors, cold=cold, **files))  # type: ignore[arg-type]


@bench_app.command("decode")
def bench_decode(
    shapes: Shapes = None,
    runs: Runs = 20,
    warmup: Warmup = 3,
    peers: Annotated[str, typer.Option(help="fla or all, or none.")] = "all",
    json_file: JsonFile = None,
) -> None:
    """One token for a batch of sequences, eagerly and as a CUDA graph.

    A SHAPE is batch=1,heads=16/32,K=128,V=128,W=4,dtype=bf16; these are the defaults.
    """
    from dnsp.bench.decode import run

    raise typer.Exit(run(shapes or [], runs=runs, warmup=warmup, peers=peers, json_path=json_file))


@bench_app.command("train")
def bench_train(
    overrides: Overrides = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a row: data.sequence_length.")] = None,
    steps: Annotated[int, typer.Option(help="Of each, by turns; the median is reported.")] = 5,
    warmup: Annotated[int, typer.Option(help="Steps of each before those.")] = 2,
    only_ours: Annotated[bool, typer.Option("--only-ours", help="Leave transformers out.")] = False,
    profile: ProfileFile = None,
    json_file: JsonFile = None,
) -> None:
    """A training step, ours and that of transformers on fla, of one shape."""
    from dnsp.bench.train import run

    status = run(
        overrides or [], tokens=tokens, steps=steps, warmup=warmup, only_ours=only_ours, profile=profile,
        json_path=json_file,
    )  # fmt: skip
    raise typer.Exit(status)


def _without_ranks(arguments: Sequence[str]) -> list[str]:
    """The command line of one rank: everything but --ranks and --port."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--ranks", "--port"):
            skip = True
        elif not argument.startswith(("--ranks=", "--port=")):
            kept.append(argument)
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status. What a user did wrong is said in a line or two, no traceback."""
    if arguments is not None:
        sys.argv[1:] = arguments
    if "RANK" not in os.environ and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a command clears away what it began
    if SUPERVISOR in os.environ:
        from dnsp.watchdog import end_with

        end_with(int(os.environ[SUPERVISOR]))
    warnings.formatwarning = _format_warning
    try:
        status = app(standalone_mode=False)
        return _leave(status if isinstance(status, int) else 0)
    except (UsageError, LaunchError, LayoutError, PlanError) as error:
        # every rank refuses alike; one a node says it
        return end(2, str(error), quiet=not speaks())
    except PeerFailed as error:
        return end(1, str(error), consequence=True)
    except Echo as error:
        return end(1, str(error), consequence=True, quiet=True)
    except RunError as error:
        return end(1, str(error))
    except (KeyboardInterrupt, typer.Abort):
        return _leave(128 + signal.SIGINT)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a slip on the command line: click words it
            if not speaks():
                return end(int(error.exit_code), str(error), quiet=True)
            error.show()
            return int(error.exit_code)
        if isinstance(status := getattr(error, "exit_status", None), int):  # kernels that fail their proof
            return end(status, str(error))
        if "OutOfMemory" in type(error).__name__:
            why = str(error).splitlines()[0]
            return end(
                1,
                f"out of memory: {why}; before the first step it is weights, gradients and moments that do not fit: "
                "engine.zero_stage=3, engine.offload_optimizer=true, or more ranks",
            )
        if "RANK" not in os.environ:
            raise
        with suppress(OSError):
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)  # see ending.end


def _leave(status: int) -> int:
    """The exit status. A rank ends here, without destructors: threads of gloo still winding down would abort it."""
    if "RANK" in os.environ:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # a full disk under them is no failure of a run that is saved
                stream.flush()
        os._exit(status)
    return status


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Our own warnings are for the user, others' for who looks into them."""
    if f"{os.sep}dnsp{os.sep}" in filename:
        return f"warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"
