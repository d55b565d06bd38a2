"""``dnsp train``: one run, top to bottom; long because it is read in one go."""

from __future__ import annotations

import math
import os
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dnsp import checkpoint, watchdog
from dnsp.begin import (
    changed_stages,
    check_configuration,
    check_data,
    check_kernels,
    check_layout,
    identity_of,
    initial_weights,
    open_folder,
    settle_transports,
    starting_point,
)
from dnsp.choices import Choices, confirm, make_choices
from dnsp.config import Config
from dnsp.data.batch import Batch, batch, micro_batches
from dnsp.data.mix import Cursor, Step, open_data
from dnsp.data.tokenizer import load_tokenizer
from dnsp.engine import Engine
from dnsp.errors import UsageError
from dnsp.evaluate import evaluate, headline, table
from dnsp.faults import Skipped, Spikes, agree_on_step, both_see, explained_memory, explained_start, find_nonfinite
from dnsp.figures import Figures
from dnsp.folder import check_free, check_new, started_again
from dnsp.generate import sample_text
from dnsp.launch.environment import Environment
from dnsp.launch.local import cores
from dnsp.model import liger
from dnsp.model.decoder import Decoder
from dnsp.parallel.grid import Grid, make_grid
from dnsp.parallel.layout import Layout
from dnsp.parallel.plan import Plan, make_plan
from dnsp.parallel.transport import backend_of
from dnsp.probe import probe
from dnsp.saving import Saver
from dnsp.schedule import Span, learning_rate, spans
from dnsp.stalls import Lead
from dnsp.telemetry import Telemetry


def train(config: Config, environment: Environment, name: str) -> dict[str, Any]:
    """Train as one rank of a run; every rank calls it.

    Args:
        config: of the run.
        environment: this process's place among the ranks.
        name: of the configuration, for the run folder's.

    Returns:
        ``run_dir, step, loss, tokens`` and the held-out figures of ``evaluate`` under ``heldout``.

    Raises:
        UsageError: what cannot be carried out, before the first step, on every rank.
        RunError: what ends the run later: a loss that is not finite, a full disk, a lost rank.
    """
    began = time.monotonic()
    environment = environment.placed(config.parallel.sequence)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // environment.local_world_size))
    watchdog.take_device(environment)
    watchdog.join(environment)
    with watchdog.Watch(environment) as watch:
        return _train(config, environment, name, watch, began)


def _train(config: Config, environment: Environment, name: str, watch: watchdog.Watch, began: float) -> dict[str, Any]:
    rank, first = environment.rank, environment.rank == 0

    # What can be refused is refused here, on every rank, before anything is written.
    check_configuration(config)
    grid = make_grid(config.parallel.sequence, config.run.timeout)
    # torchrun's agents count each for itself: one that only follows another's restart has counted none
    restarts = max(watchdog.from_all(environment.restarts))
    with watchdog.agreed():
        resume = started_again(config, restarts).resume if first else None
    config = config.model_copy(update={"resume": watchdog.from_first(resume)})
    with watchdog.agreed():
        if first:
            check_free(config)
            check_new(config)
        tokenizer = load_tokenizer(config.data.tokenizer)
        data = open_data(config.data, vocab_size=config.model.vocab_size)
        heldout = open_data(config.data, vocab_size=config.model.vocab_size, split="heldout")
        stages = spans(config)
        accumulations = [
            micro_batches(stage.global_batch, stage.micro_batch, grid.data_size, stage.setting) for stage in stages
        ]
        for stage in stages:
            data.check_length(stage.sequence_length)
            heldout.check_length(stage.sequence_length)
            check_layout(config, grid, stage.sequence_length)
        identity = identity_of(config, tokenizer, data)
        first_step = data.step(data.start, stages[0].sequence_length, stages[0].global_batch)
        _micro_batch(stages[0].of(config), grid, first_step, 0, stages[0])
        torch.manual_seed(config.train.seed)
        check_kernels(config.model)
        model = Decoder(
            config.model,
            config.engine.activation_checkpointing,
            activation_offloading=config.engine.activation_offloading,
            mlp_tile=config.engine.mlp_tile or None,
            hollow=config.engine.zero_stage == 3,  # no rank ever holds the whole model: the engine fills it
        )
        begin = starting_point(config, identity) if first else None
    check_data(identity)
    begin = watchdog.from_first(begin)  # rank 0 has read every byte of it against the checksums
    with watchdog.agreed():
        found = checkpoint.open_checked(begin) if begin else None
        if found and found.step > stages[-1].stop:
            raise UsageError(f"{found.path} is past train.steps={stages[-1].stop}; raise it to go on, or see dnsp eval")
        # of a hollow model rank 0 hands every part to the others
        reads = first or not model.hollow
        weights = found.weights() if found else initial_weights(config, stages[0].rope_theta, first) if reads else None
        if weights is not None:
            where = str(found.path) if found else str(config.init_from)
            checkpoint.check_weights(model, checkpoint.shapes_of(weights), where)
            if not model.hollow:
                checkpoint.load_weights(model, weights, where)
    if torch.cuda.is_available() and not model.hollow:
        with explained_start(model, config, grid):
            model.cuda()
    why_not_peer = watchdog.peer_refusal(grid)
    with watchdog.agreed():
        before = found.state.get("choices") if found else None
        layout = Layout(config.parallel.layout, grid.sequence_size, stages[0].sequence_length)
        chosen = make_choices(config, before, why_not_peer, bool(grid.near), layout) if first else None
    wanted, why = watchdog.from_first(chosen)
    with watchdog.agreed():
        confirm(wanted, config)
    choices, shared, unshared = settle_transports(wanted, config, grid, [stage.shape for stage in stages])
    folder = open_folder(config, identity, name, first)
    watch.folder = watch.stalls.folder = folder
    with explained_start(model, config, grid):
        start = found.step if found else 0
        now = next((n for n, stage in enumerate(stages) if start < stage.stop), len(stages) - 1)
        engine = Engine(model, stages[now].of(config), grid, accumulations[now], found, weights)
    del weights  # a whole model perhaps, or another run's open files
    if found:
        checkpoint.set_random_state(found.random(rank), engine.device)
        found.close()
    if config.engine.probe:
        with explained_start(model, config, grid):  # the first gradients
            proven = probe(engine, stages[now].of(config), choices, max(accumulations[now:]))
    saver = Saver(folder, engine, config.checkpoint, lambda: watch.place.at("the writing of a checkpoint"))
    watch.settle = saver.settle

    steps = stages[-1].stop
    aside = checkpoint.set_aside(folder, start) if found and first else []
    cursor = Cursor.from_dict(found.state["cursor"]) if found else data.start
    tokens = found.state["tokens"] if found else 0
    loss = float("nan")
    telemetry = Telemetry(folder if first else None, steps, start, config.run.tensorboard)
    watch.at_end = telemetry.stop
    count = sum(math.prod(shape) for shape in engine.shapes().values())
    telemetry.say(
        f"{count:,} parameters, {grid.data_size} x {grid.sequence_size} ranks (data x sequence), "
        f"{accumulations[now]} micro-batches a step, {steps} steps; {folder}"
    )

    places = watchdog.from_all((environment.node, environment.host, environment.local_rank))
    meter = Figures(config, grid, model, engine.device, places, telemetry)
    watch.at_end = meter.stop
    if restarts:
        telemetry.say(f"{environment.launcher} has started this run again ({restarts}): from step {start}")
    if "attention" in config.model.layers:
        telemetry.say(f"attention: {choices.attention_backend}" + (f" ({why})" if why else ""))
    if grid.sequence_size > 1:
        telemetry.say(choices.transports(config, why_not_peer or unshared, shared))
    if engine.device.type == "cuda":
        telemetry.say(f"norms, SwiGLU, rotary positions, cross entropy: {liger.described()}")

    if config.engine.probe:
        exact = f"within {proven.error:.0e} (asked in {proven.seconds:.1f} s)"
        telemetry.say(f"gradients are the ranks' sum after the reduction, {exact}")

    if found and (changed := changed_stages(found, stages)):
        telemetry.say(changed)
    for path in aside:
        telemetry.say(f"this run goes on from step {start}: a later checkpoint of the folder is now {path.name}")

    skipped, spikes = Skipped(config.faults), Spikes(config.faults)
    passed_over = [tuple(those) for those in found.state.get("passed_over", [])] if found else []
    deadlines = engine.device.type == "cuda" and grid.world > 1 and backend_of(grid.everyone) == "nccl"
    watch.place.follow(model.model.layers, list(config.model.layers), Lead() if deadlines else None)
    watch.look_after(folder, config.run.stall)

    model.set_rope_theta(stages[now].rope_theta)  # where no step is left, too
    done, at, settings = start, None, config
    plan: Plan | None = None
    while done < steps:
        step_began = time.perf_counter()
        meter.begin()
        before, at = at, next(index for index, span in enumerate(stages) if done < span.stop)
        stage = stages[at]
        if at != before:
            model.set_rope_theta(stage.rope_theta)
            engine.accumulate(accumulations[at])
            settings = stage.of(config)
            spikes.losses.clear()  # another length or batch has other losses
            if len(stages) > 1:
                rows = f"{stage.global_batch} sequences a step, {stage.micro_batch} at once on a rank"
                telemetry.say(f"context of {stage.sequence_length:,} tokens from step {stage.start + 1}; {rows}")
        watch.place.at("the data", step=done + 1)
        compiled = done > max(start, stage.start)
        watch.stalls.limit = watchdog.patience(config.run, late=deadlines and compiled)
        work = data.step(cursor, stage.sequence_length, stage.global_batch)
        while any(first < work.cursor.sequences and cursor.sequences < end for first, end in passed_over):
            cursor = work.cursor
            work = data.step(cursor, stage.sequence_length, stage.global_batch)

        def backward(micro: int, work: Step = work, stage: Span = stage, settings: Config = settings) -> Tensor:
            nonlocal plan
            rows, made = _micro_batch(settings, grid, work, micro, stage, choices, plan)
            plan = made.agreed().to(engine.device)
            tokens_BT, targets_BT, asked_N = rows.to(engine.device)
            return engine.backward(tokens_BT, targets_BT, plan, work.targets, asked_N)

        local_loss = torch.zeros((), dtype=torch.float64, device=engine.device)
        with explained_memory(engine, settings, stage.sequence_length):
            for micro in range(engine.accumulation):
                meter.mark("data")
                local_loss += backward(micro)
                if micro + 1 < engine.accumulation:
                    engine.advance()
            watch.place.at("the sum of the losses")
            meter.mark("communication")
            agreed = agree_on_step(local_loss, work.targets, watch.stop, grid)
            loss, stopping = agreed.loss, agreed.stopping
            lr = learning_rate(done, steps, config.train)
            watch.place.at("the update")
            meter.mark("optimizer")
            trouble, grad_norm = "", math.nan
            if agreed.broken:
                trouble = f"the loss is not finite at step {done + 1} on rank {', '.join(map(str, agreed.broken))}"
                engine.skip()
            elif spikes.is_one(loss):
                engine.skip()
                watch.place.at("going back to a checkpoint")
                watch.stalls.limit = math.inf  # reading one against its checksums may take its time
                said = f"step {done + 1}: the loss {loss:.4f} is a spike (median {spikes.median():.4f})"
                if (back := roll_back(engine, saver, spikes, said, telemetry)) is not None:
                    passed_over.append((cursor.sequences, work.cursor.sequences))
                    these = f"sequences {cursor.sequences} to {work.cursor.sequences - 1}"
                    done, cursor, tokens = back.step, Cursor.from_dict(back.state["cursor"]), back.state["tokens"]
                    telemetry.back_to(done)
                    telemetry.say(f"{said}; back to step {done}, {these} of the data are passed over")
                    continue
                telemetry.say(f"{said}; there is no checkpoint to go back to: skipped")
            else:
                grad_norm = engine.step(lr)
                if not grad_norm < math.inf:
                    trouble = f"the gradient norm is {grad_norm} at step {done + 1}"
                skipped.in_a_row = 0 if not trouble else skipped.in_a_row
                spikes.losses.append(loss)
            if trouble:
                cause = find_nonfinite(engine, backward, partial(sequences, settings, grid, cursor))
                if skipped.bad():
                    often = f"{skipped.in_a_row} times in a row" if skipped.in_a_row > 1 else "once"
                    way = f"nothing was saved after it: lower train.lr or train.clip; {checkpoint.way_on(folder)}"
                    raise both_see(first, f"{trouble} ({often}): {cause}; {way}")
                telemetry.say(f"{trouble}: {cause}; skipped ({skipped.total} so far)")

        cursor, done = work.cursor, done + 1
        tokens += stage.tokens
        phases, seconds = meter.end(), time.perf_counter() - step_began
        record = {
            "step": done,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens_per_s": stage.tokens / seconds,
            "tokens": tokens,
            "sequence_length": stage.sequence_length,
            "step_s": seconds,
            "time": time.time(),
            **({"skipped": skipped.total} if skipped.total else {}),
            **meter.step(done, seconds, work, phases),
        }
        telemetry.step(record)
        watch.stalls.limit = config.run.stall
        # not while steps are skipped: what led there may be in the weights already
        due = config.checkpoint.every and done % config.checkpoint.every == 0 and not skipped.in_a_row
        if stopping or done == steps or due:
            watch.place.at("the checkpoint")
            saver.save(
                done,
                {
                    "tokens": tokens,
                    "cursor": cursor.to_dict(),
                    "passed_over": sorted(passed_over),
                    "rope_theta": stage.rope_theta,
                    "sequence_length": stage.sequence_length,
                    "choices": wanted.to_dict(),  # whoever resumes asks for it again
                    "identity": identity,
                    "config": config.model_dump(mode="json"),
                },
            )
        for news in saver.news():
            telemetry.say(news)
        if stopping and done < steps:
            end_saved(saver, telemetry, watch, grid)
            telemetry.say(f"stopped after step {done} as asked; resume=auto continues {folder}")
            telemetry.close()
            watchdog.leave()
            return {"run_dir": str(folder), "step": done, "loss": loss, "tokens": tokens, "stopped": True}
        if config.eval.every and done % config.eval.every == 0 and done < steps:
            figures = evaluate(engine.deepspeed, heldout, tokenizer, config, grid, stage.sequence_length, choices)
            telemetry.evaluation(done, figures)

    watch.place.at("the evaluation")
    figures = evaluate(engine.deepspeed, heldout, tokenizer, config, grid, stages[-1].sequence_length, choices)
    telemetry.evaluation(steps, figures)
    if engine.stage == 3 and config.generate.tokens:
        model = whole_model(engine, config, stages[-1].rope_theta)
    end_saved(saver, telemetry, watch, grid)
    watchdog.leave()  # what is left concerns rank 0 alone
    if first:
        telemetry.stop()
        telemetry.say(table(figures))
        if config.generate.tokens:
            telemetry.say(sample_text(model, tokenizer, config.generate), style="cyan")
        telemetry.say(f"held-out {headline(figures)} after {time.monotonic() - began:.0f} s")
        telemetry.say(f"run folder: {folder}")
    telemetry.close()
    last = loss if steps > start else None  # nothing was left to train
    return {"run_dir": str(folder), "step": steps, "loss": last, "tokens": tokens, "heldout": figures}


def _micro_batch(
    config: Config,
    grid: Grid,
    work: Any,
    micro: int,
    stage: Span,
    choices: Choices = Choices(),  # noqa: B008 (frozen)
    before: Plan | None = None,
) -> tuple[Batch, Plan]:
    """This rank's part of a micro-batch, and its plan: that of the micro-batch ``before``, where documents lie as they
    did in it."""
    layout = Layout(config.parallel.layout, grid.sequence_size, stage.sequence_length)
    rows = batch(
        work,
        micro,
        micro_batch=config.train.micro_batch,
        data_rank=grid.data_rank,
        data_size=grid.data_size,
        intervals=layout.intervals(grid.sequence_rank),
        vocab_size=config.model.vocab_size,
    )
    if before is not None and before.layout == layout and before.documents == tuple(map(tuple, rows.doc_starts)):
        return rows, before
    plan = make_plan(
        rows.doc_starts,
        layout,
        grid,
        choices.segment_tokens(config, layout),
        transport=choices.transport,
        attention_transport=choices.attention_transport,
        attention_backend=choices.attention_backend,
    )
    return rows, plan


def sequences(config: Config, grid: Grid, cursor: Cursor, micro: int) -> str:
    """The data of a micro-batch on this rank, in words."""
    rows = config.train.micro_batch
    first = cursor.sequences + (micro * grid.data_size + grid.data_rank) * rows
    return f"sequence {first}" if rows == 1 else f"sequences {first} to {first + rows - 1}"


def roll_back(
    engine: Engine, saver: Saver, spikes: Spikes, said: str, telemetry: Telemetry
) -> checkpoint.Checkpoint | None:
    """Put the engine back to the newest whole checkpoint of this run; None where there is none. Every rank calls it.

    Raises:
        RunError: it was put back there too often, on every rank.
        UsageError: this rank does not see the checkpoint that rank 0 has read.
    """
    saver.wait()
    first = engine.grid.rank == 0
    found, words = checkpoint.latest(saver.folder) if first else (None, [])
    path = watchdog.from_first(found.path if found else None)
    for word in words:
        telemetry.say(f"{word}; it is passed over")
    if path is None:
        return None
    if not spikes.may_roll_back(checkpoint.step_of(path)):
        often = f"{path.name} was gone back to {spikes.settings.rollbacks} times already"
        raise both_see(first, f"{said}, and {often}: lower train.lr; {checkpoint.way_on(saver.folder)}")
    found = found or checkpoint.open_checked(path)
    if first:
        checkpoint.set_aside(saver.folder, found.step)  # damaged ones; their steps are saved again
    engine.load(found, weights=True)
    checkpoint.set_random_state(found.random(engine.grid.rank), engine.device)
    found.close()
    return found


def end_saved(saver: Saver, telemetry: Telemetry, watch: watchdog.Watch, grid: Grid) -> None:
    """Wait for the last checkpoint.

    Raises:
        RunError: it could not be written, on every rank.
    """
    watch.stalls.limit = math.inf  # a write may take its time
    saved = saver.wait()
    for news in saver.news():
        telemetry.say(news)
    error = watchdog.from_first(saved.error if saved else "")
    if error and saved:
        raise both_see(
            grid.rank == 0,
            f"cannot write the checkpoint of step {saved.step}: {error}; {checkpoint.way_on(saver.folder)}. "
            "Make room in run.dir first",
        )


def whole_model(engine: Engine, config: Config, rope_theta: float) -> Decoder:
    """On rank 0 a model of its own, with the weights that ZeRO 3 keeps in shards."""
    weights = engine.whole_weights()
    model = Decoder(config.model)
    if weights:
        checkpoint.load_weights(model, weights, "the engine")
    model.set_rope_theta(rope_theta)
    return model.to(engine.device)
