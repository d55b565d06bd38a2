"""The command line. It starts fast: what is slow to import is imported by the command that needs it."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dnsp.config import Config, load_config
from dnsp.ending import end
from dnsp.errors import Echo, PeerFailed, RunError, UsageError
from dnsp.launch.environment import LaunchError, find_environment
from dnsp.launch.local import SUPERVISOR, start_ranks
from dnsp.parallel.errors import LayoutError, PlanError
from dnsp.parallel.layout import Layout
from dnsp.schedule import spans

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

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see configs/.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example train.steps=10.")]
Ranks = Annotated[int | None, typer.Option(min=1, help="Start this many local ranks; not under a launcher.")]
Port = Annotated[int | None, typer.Option(min=1, max=65535, help="Where rank 0 listens; left out, a free one.")]


def _can_be_written(file: Path | None) -> Path | None:
    """Said before the work, not after it."""
    if file is not None and (file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK)):
        raise UsageError(f"--json {file}: cannot be written; name a file in a folder that exists and is yours")
    return file


JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the figures here as JSON.", callback=_can_be_written),
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
    if ranks is not None and ranks > 1:
        check_ranks(settings, ranks)
        raise typer.Exit(start_ranks(_without_ranks(sys.argv[1:]), ranks, port))

    from dnsp.train import train as run

    figures = run(settings, environment, name=config.stem)
    if json_file is not None and environment.rank == 0:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


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
    if json_file is not None and environment.rank == 0:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


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
    transports: Annotated[str, typer.Option(help="Any of p2p,gather.")] = "p2p,gather",
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
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="With --prove: whose model.")] = None,
    overrides: Overrides = None,
    prove: Annotated[bool, typer.Option("--prove", help="Prove the Triton kernels on this GPU, for CONFIG.")] = False,
    json_file: JsonFile = None,
) -> None:
    """What this machine can and cannot do, with the cure for each."""
    if prove:
        from dnsp.prove import run as prove_kernels

        raise typer.Exit(prove_kernels(None if config is None else load_config(config, overrides or []), json_file))
    if config is not None:
        raise UsageError(f"doctor {config}: a configuration goes with --prove; doctor alone looks at the machine")
    from dnsp.doctor import run

    raise typer.Exit(run(json_file))


@data_app.command("prepare")
def prepare(
    source: Annotated[str, typer.Argument(help="Text, a folder, .jsonl, .parquet, also .gz or .zst; python-stdlib.")],
    out: Annotated[Path, typer.Argument(help="Prefix of the .bin and .idx files to write.")],
    tokenizer: Annotated[str, typer.Option(help="bytes, or a Hugging Face name or path.")] = "bytes",
    text_key: Annotated[str, typer.Option(help="The key or column of the text in .jsonl and .parquet.")] = "text",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")] = False,
) -> None:
    """Tokenize text into Megatron's .bin and .idx files."""
    from dnsp.data.prepare import prepare as run

    done = run(source, out, tokenizer, text_key=text_key, overwrite=overwrite)
    made = done.metadata
    empty = f" ({done.empty_documents:,} empty ones left out)" if done.empty_documents else ""
    print(f"{done.prefix}: {made.documents:,} documents{empty}, {made.tokens:,} tokens, {done.seconds:.1f} s")


def check_ranks(config: Config, ranks: int) -> None:
    """Refuse what can be known to fail before any rank is started."""
    sequence = config.parallel.sequence or ranks
    if ranks % sequence:
        raise UsageError(
            f"parallel.sequence={sequence} does not divide {ranks} ranks; "
            f"take a multiple of {sequence} ranks or another size"
        )
    for span in spans(config):
        Layout(config.parallel.layout, sequence, span.sequence_length)


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
    if SUPERVISOR in os.environ:
        from dnsp.watchdog import end_with

        end_with(int(os.environ[SUPERVISOR]))
    warnings.formatwarning = _format_warning
    try:
        status = app(standalone_mode=False)
        status = status if isinstance(status, int) else 0
        if "RANK" in os.environ:  # no destructors: threads of gloo still winding down would abort it
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status
    except (UsageError, LaunchError, LayoutError, PlanError) as error:
        # every rank refuses alike; one a node says it
        return end(2, str(error), quiet=os.environ.get("LOCAL_RANK", "0") != "0")
    except PeerFailed as error:
        return end(1, str(error), consequence=True)
    except Echo as error:
        return end(1, str(error), consequence=True, quiet=True)
    except RunError as error:
        return end(1, str(error))
    except (KeyboardInterrupt, typer.Abort):
        return 128 + signal.SIGINT
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a slip on the command line: click words it
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
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # see ending.end


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Our own warnings are for the user, others' for who looks into them."""
    if f"{os.sep}dnsp{os.sep}" in filename:
        return f"warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"
