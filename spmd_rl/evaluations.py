"""When the model is evaluated: at once, or while it is trained on.

Comes in: the state of the run and the collector; goes out: evaluations in the log. Engines that
share their GPUs with the trainer evaluate between rollouts. Others evaluate while the next step is
trained: they hold the weights in question until the next push, and would have nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable

from spmd_rl.checkpoint import State
from spmd_rl.config import Config, evaluation
from spmd_rl.rollout.collector import Collector
from spmd_rl.runlog import RunLog


class Evaluations:
    """All of a run's. Asked to stop meanwhile, one is left out: who goes on begins with it."""

    def __init__(
        self, cfg: Config, collector: Collector, log: RunLog, stop_requested: Callable[[], bool]
    ):
        self.cfg, self.collector, self.log, self.until = cfg, collector, log, stop_requested
        # A mended engine gets the trainer's weights, which may be newer than those evaluated.
        self.beside = not cfg.placement.colocate and not cfg.rollout.use_fault_tolerance
        self._begun: int | None = None

    def due(self, state: State) -> bool:
        """Before the first rollout, then by the interval and after the last; each once."""
        if not evaluation.evaluates(self.cfg) or self.log.has_evaluation(state.rollout - 1):
            return False
        if state.rollout == 0:
            return not self.cfg.eval.skip_eval_before_train
        return state.due(self.cfg.eval.eval_interval)

    def before_collecting(self, state: State) -> None:
        if not self.beside:
            self.now(state)

    def now(self, state: State) -> None:
        if self.due(state):
            self._begin(state)
            self.finish()

    def before_training(self, state: State) -> None:
        if self.beside and self.due(state):
            self._begin(state)

    def _begin(self, state: State) -> None:
        self.collector.begin_evaluation(state.rollout)
        self._begun = state.rollout

    def finish(self) -> None:
        """Wait for what was begun; afterwards engines may get other weights."""
        if self._begun is None:
            return
        with self.log.phase("eval"):
            values = self.collector.finish_evaluation(until=self.until)
        if values is not None:
            self.log.evaluation(self._begun - 1, values)
        self._begun = None
