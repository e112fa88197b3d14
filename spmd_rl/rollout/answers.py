"""What an engine answers to /generate, believed only as far as it makes sense.

Comes in: an answer's JSON; goes out: `Generated`, or BadAnswer for what no sound engine says. It
must not know how the answer came here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spmd_rl.config.schema import Config
from spmd_rl.rollout import engine_args
from spmd_rl.rollout.routes import Routes


class EngineError(RuntimeError):
    """An engine refused a request."""


class EngineFault(EngineError):
    """An engine gave no answer that could be used; another one, or it itself once mended, may."""


class EngineUnreachable(EngineFault):
    """No answer came, in time or at all: most likely the engine is dead."""


class BadAnswer(EngineFault):
    """An answer came that no sound engine gives."""


class Unpushed(EngineFault):
    """A restarted engine answered before it was given the trainer's weights."""


class Generated(NamedTuple):
    """What an engine made of one request; the lists have one entry per new token."""

    text: str
    tokens: list[int]
    log_probs: list[float]
    versions: list[int]
    finish: str  # stop, length or abort
    prompt_tokens: int
    cached_tokens: int
    # [k, layers with experts, experts of a token] of the last k tokens but one, where asked for
    experts: np.ndarray | None = None


def read_answer(
    answer: Any,
    vocab_size: int | None = None,
    pushed: bool = False,
    routes: Routes | None = None,
) -> Generated:
    """One answer of /generate. `pushed`: only tokens of a version that we pushed count. `routes`:
    the experts of its tokens were asked for."""
    try:
        meta = answer["meta_info"]
        pairs = meta.get("output_token_logprobs") or []
        tokens, log_probs = [pair[1] for pair in pairs], [pair[0] for pair in pairs]
        versions = _versions(meta, len(pairs), pushed)
        finish = (meta.get("finish_reason") or {}).get("type", "abort")
        experts = None
        told = meta.get("routed_experts") is not None or finish != "abort"
        if routes is not None and tokens and told:  # a request aborted in the queue has none
            experts = routes.read(meta["routed_experts"], meta["prompt_tokens"] + len(tokens))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BadAnswer(f"answered in another form: {error!r} in {answer!r:.200}") from error
    ids = answer.get("output_ids")
    if ids is not None and len(ids) != len(tokens):
        raise BadAnswer(f"gave {len(ids)} tokens, but {len(tokens)} log-probs")
    # Millions of tokens pass here: nothing is done in Python for each of them.
    if not set(map(type, log_probs)) <= {float, int} or not all(map(math.isfinite, log_probs)):
        raise BadAnswer("gave log-probs that are no finite numbers")
    if not set(map(type, tokens)) <= {int} or (
        tokens and not 0 <= min(tokens) <= max(tokens) < (vocab_size or math.inf)
    ):
        raise BadAnswer(f"gave tokens that are not in the vocabulary of {vocab_size}")
    return Generated(
        text=answer.get("text", ""),
        tokens=tokens,
        log_probs=log_probs,
        versions=versions,
        finish=finish,
        prompt_tokens=meta.get("prompt_tokens", 0),
        cached_tokens=meta.get("cached_tokens", 0),
        experts=experts,
    )


def _versions(meta: dict[str, Any], count: int, pushed: bool) -> list[int]:
    """The version of each token: spans where the engine tells them, else one for all."""
    versions = [meta.get("weight_version")] * count
    for span in meta.get("weight_versions") or ():
        stop = min(span["end"], count)
        versions[span["start"] : stop] = [span["version"]] * (stop - span["start"])
    numbers = {version: _number(version) for version in set(versions)}
    if pushed and None in numbers.values():
        raise Unpushed("has not been given the trainer's weights yet")
    return [numbers[version] or 0 for version in versions]


def _number(version: Any) -> int | None:
    """Versions are counted; an engine nobody pushed to calls its own 'default'."""
    return int(version) if str(version).isdigit() else None


def vocab_size(cfg: Config) -> int | None:
    """Tokens of the model, where its directory says so."""
    path = Path(engine_args.model_path(cfg)) / "config.json"
    return json.loads(path.read_text()).get("vocab_size") if path.is_file() else None
