"""The loop. Comes in: handles on ranks, engines and collector; goes out: a trained model.

It must not know ranks, devices or transports: `workers.x()` is the only thing that touches other
ranks. Asked to stop, it leaves what it collects, and everything finished is saved.
"""

from __future__ import annotations

from spmd_rl import control
from spmd_rl.checkpoint import Checkpoints, State
from spmd_rl.config import Config
from spmd_rl.evaluations import Evaluations
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
    evaluations = Evaluations(cfg, collector, log, workers.stop_requested)
    engines.push(workers, state.version)
    for rollout in range(state.rollout, state.num_rollout):
        evaluations.before_collecting(state)
        with log.phase("collect"):
            collected = collector.collect(rollout, state.version, until=workers.stop_requested)
        if collected is None:
            break
        evaluations.before_training(state)
        with engines.asleep():
            with log.phase("train"):
                stats = workers.train(rollout, mine={"batch": collected.batch})[0]
            state = state.after(collected.state)
            if state.due(cfg.checkpoint.save_interval):
                with log.phase("save_model"):
                    checkpoints.save(state)
            evaluations.finish()
            with log.phase("update_weights"):
                stats |= engines.push(workers, state.version)
        log.rollout(rollout, collected, stats)
        checkpoints.commit()
    evaluations.now(state)
    checkpoints.finish(state, engines)
    return state
