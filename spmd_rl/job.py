"""One job from start to end on each rank: join, start the parts together, run the loop, put away.

Rank 0 leads; every other rank follows. Comes in: parsed arguments; goes out: an exit status.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from spmd_rl import control, resume, train
from spmd_rl.checkpoint import Checkpoints, State
from spmd_rl.cli import Args
from spmd_rl.config import Config, deterministic, dump
from spmd_rl.layout import describe, launched, needs_engines
from spmd_rl.metrics import steps_per_rollout
from spmd_rl.rollout.collector import Collector
from spmd_rl.rollout.fleet import EngineAddresses, Engines
from spmd_rl.rollout.repair import Repairs
from spmd_rl.rollout.router import Router
from spmd_rl.runlog import RunLog
from spmd_rl.summary import write_summary
from spmd_rl.timeline import Timeline
from spmd_rl.worker import ENGINES, Worker


def main(args: Args) -> NoReturn:
    started = time.time()
    cfg, placement = args.cfg, args.placement
    run_dir = Path(cfg.logging.run_dir) / str(cfg.logging.name)
    run_dir.mkdir(parents=True, exist_ok=True)
    os.environ.update(deterministic.environment(cfg))  # before CUDA is first used
    here = launched()
    if here is None or here.rank == 0:
        owner = control.hold(run_dir)
        if owner:
            words = f"{run_dir} is in use by {owner}: give this run another logging.name"
            print(words, file=sys.stderr, flush=True)
            sys.exit(control.tell_script(control.FAULTY))
    job = control.join()
    control.log_to(run_dir, job)
    job.start_watching(cfg.placement.heartbeat_timeout, run_dir)
    job.share_secret(run_dir)
    job.on_command = Timeline(run_dir, f"rank {job.rank}").add
    quieten()
    worker = Worker(cfg, placement, job, run_dir)
    if job.rank:
        control.follow(job, worker)
        job.leave(0)
    with job.failing():
        status = lead(cfg, worker, job, run_dir, started)
    job.leave(control.tell_script(status))


def quieten() -> None:
    """Upstream's words about packages that a CPU host has no use for would bury ours."""
    warnings.filterwarnings("ignore", module=r"megatron\b|torch\.distributed|spmd_rl\.trainer")
    logging.getLogger("megatron").setLevel(logging.ERROR)


def lead(cfg: Config, worker: Worker, job: control.Job, run_dir: Path, started: float) -> int:
    """Rank 0: start everything at once (imports dominate a start), then run the loop."""
    placement = worker.placement
    (run_dir / "config.yaml").write_text(dump(cfg))
    print(describe(placement, cfg), flush=True)
    alone = cfg.debug.debug_rollout_only
    start = resume.Start("") if alone else resume.find(cfg, run_dir)
    memory = control.PeakMemory(job)
    workers = control.Workers(job, worker, timeout=cfg.placement.command_timeout)
    generates = needs_engines(cfg)
    collector = Collector(cfg, run_dir)
    if generates:
        workers.launch_engines()

    state = initial_state(cfg, collector, start.state)
    log = RunLog(cfg, run_dir, state.num_rollout, state.rollout)
    for note in start.notes:
        log.say(note)
    steps = state.num_rollout * steps_per_rollout(cfg)
    take = {"optimizer": start.optimizer, "random": start.random, "weights": start.weights}
    info = workers.build_trainer(steps, start.model, take)[0]
    job.forget_secret()
    resumed = f"; resumed from {Path(start.model).parent}" if start.state and start.model else ""
    log.say(f"trainer: {info or 'none'}{resumed}")

    addresses, router, mends = None, None, cfg.rollout.use_fault_tolerance
    if generates:
        found = dict(sum(workers.engines_ready(), []))
        urls = [found[engine.index] for engine in placement.engines]
        teacher = found[placement.teacher.index] if placement.teacher else ""
        key = job.secret.key(ENGINES)
        router = Router(cfg, urls, key, run_dir, None if mends else job.fail)
        addresses = EngineAddresses(urls, router.url, key, teacher)
        workers.connect(urls)
        collector.connect(addresses)
    engines = Engines(cfg, None if alone else addresses)
    if router and mends:
        notices = control.Notices(job)
        engines.repairs = Repairs(cfg, engines, workers, router, collector, notices, log.say)
        collector.while_waiting = engines.repairs.watch
    log.say(f"ready after {time.time() - started:.1f} s")

    checkpoints = Checkpoints(cfg, workers, log, start.origin, state)
    state = train.run(cfg, workers, engines, collector, checkpoints, log, state)
    finished = state.rollout >= state.num_rollout
    if finished and cfg.checkpoint.save_hf:
        workers.save_hf(str(run_dir / "hf"))
    log.close()
    write_summary(run_dir, minutes=(time.time() - started) / 60, peak_rss=memory.peak())
    collector.close()
    if router:
        router.stop()
    workers.close()
    workers.exit()
    return 0 if finished else control.REQUEUE


def initial_state(cfg: Config, collector: Collector, resumed: State | None) -> State:
    """Where the run begins: after its newest checkpoint, or at the start."""
    num_rollout = cfg.rollout.num_rollout
    if num_rollout is None:
        per_epoch = collector.num_prompts // cfg.rollout.rollout_batch_size
        num_rollout = per_epoch * (cfg.rollout.num_epoch or 1)
    if resumed is None:
        return State(num_rollout=num_rollout, rollout=cfg.rollout.start_rollout_id or 0)
    collector.load_state(resumed.data)
    return replace(resumed, num_rollout=num_rollout)
