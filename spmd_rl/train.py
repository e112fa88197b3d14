"""The loop. Comes in: handles on ranks, engines and collector; goes out: a trained model.

It must not know ranks, devices or transports: `workers.x()` is the only thing that touches other
ranks.
"""

from __future__ import annotations

from spmd_rl import checkpoint, control
from spmd_rl.checkpoint import State
from spmd_rl.config import Config
from spmd_rl.layout import evaluates
from spmd_rl.rollout.collector import Collector
from spmd_rl.rollout.fleet import Engines
from spmd_rl.runlog import RunLog


def run(
    cfg: Config,
    workers: control.Workers,
    engines: Engines,
    collector: Collector,
    log: RunLog,
    state: State,
) -> State:
    """One run, as plain Python on rank 0; every other rank is inside control.follow()."""
    engines.push(workers, state.version)
    if evaluates(cfg) and state.rollout == 0 and not cfg.eval.skip_eval_before_train:
        with log.phase("eval"):
            log.evaluation(-1, collector.evaluate(0))
    for rollout in range(state.rollout, state.num_rollout):
        with log.phase("collect"):
            collected = collector.collect(rollout, state.version)
        with engines.asleep():
            with log.phase("train"):
                stats = workers.train(rollout, mine={"batch": collected.batch})[0]
            state = state.after(collected.state)
            if due(rollout, cfg.checkpoint.save_interval, state) or workers.stop_requested():
                with log.phase("save_model"):
                    checkpoint.save(cfg, workers, state, log.run_dir)
            with log.phase("update_weights"):
                stats |= engines.push(workers, state.version)
        log.rollout(rollout, collected, stats)
        if evaluates(cfg) and due(rollout, cfg.eval.eval_interval, state):
            with log.phase("eval"):
                log.evaluation(rollout, collector.evaluate(rollout + 1))
        if workers.stop_requested():
            break
    return state


def due(rollout: int, interval: int | None, state: State) -> bool:
    """Whether something with an interval happens after this rollout; the last one always counts."""
    return bool(interval) and ((rollout + 1) % interval == 0 or rollout + 1 == state.num_rollout)
