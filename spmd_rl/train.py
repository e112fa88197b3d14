"""The loop. Comes in: handles on ranks, engines and collector; goes out: a trained model.

It must not know ranks, devices or transports: `workers.x()` is the only thing that touches other
ranks. Asked to stop, it leaves what it collects, and everything finished is saved.
"""

from __future__ import annotations

from spmd_rl import control
from spmd_rl.checkpoint import Checkpoints, State
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
    checkpoints: Checkpoints,
    log: RunLog,
    state: State,
) -> State:
    """One run, as plain Python on rank 0; every other rank is inside control.follow()."""
    engines.push(workers, state.version)
    if evaluation_due(cfg, state) and not log.has_evaluation(state.rollout - 1):
        evaluate(workers, collector, log, state)
    for rollout in range(state.rollout, state.num_rollout):
        with log.phase("collect"):
            collected = collector.collect(rollout, state.version, until=workers.stop_requested)
        if collected is None:
            break
        with engines.asleep():
            with log.phase("train"):
                stats = workers.train(rollout, mine={"batch": collected.batch})[0]
            state = state.after(collected.state)
            if due(cfg.checkpoint.save_interval, state):
                with log.phase("save_model"):
                    checkpoints.save(state)
            with log.phase("update_weights"):
                stats |= engines.push(workers, state.version)
        log.rollout(rollout, collected, stats)
        checkpoints.commit()
        if evaluation_due(cfg, state):
            evaluate(workers, collector, log, state)
    checkpoints.finish(state, engines)
    return state


def evaluate(workers: control.Workers, collector: Collector, log: RunLog, state: State) -> None:
    """Asked to stop meanwhile, it is left out: the run that goes on begins with it."""
    with log.phase("eval"):
        values = collector.evaluate(state.rollout, until=workers.stop_requested)
    if values is not None:
        log.evaluation(state.rollout - 1, values)


def evaluation_due(cfg: Config, state: State) -> bool:
    """Whether the state is to be evaluated: before the first rollout, then by its interval."""
    if not evaluates(cfg):
        return False
    if state.rollout == 0:
        return not cfg.eval.skip_eval_before_train
    return due(cfg.eval.eval_interval, state)


def due(interval: int | None, state: State) -> bool:
    """Whether something with an interval happens now; after the last rollout it always does."""
    return bool(interval) and (state.rollout % interval == 0 or state.rollout == state.num_rollout)
