"""The teacher of on-policy distillation behind HTTP: an SGLang server tells the log-probs of tokens
that the policy sampled.

Comes in: finished samples; goes out: the same with `teacher_log_probs`. The server is the user's
(reward.rm_url, as in slime) or an engine of this job. It must not know what is done with them.
"""

from __future__ import annotations

import math
from typing import Any

from spmd_rl.config.schema import Config
from spmd_rl.rollout.answers import BadAnswer
from spmd_rl.rollout.connection import Connection
from spmd_rl.tasks import together
from spmd_rl.types import Group, Sample

PATH = "/generate"


class Teacher:
    """`url` and `key` of the job's own server; else the user's is asked."""

    def __init__(self, cfg: Config, url: str, key: str):
        url, key = (url, key) if url else (str(cfg.reward.rm_url), "")
        self.url = url.rstrip("/").removesuffix(PATH) + PATH
        self.name = f"the teacher ({self.url})"
        self.connection = Connection(key, cfg.rollout.rollout_request_timeout)

    async def tell(self, samples: Group) -> None:
        """Fill in `teacher_log_probs` of finished samples that have none yet."""
        waiting = [s for s in samples if len(s.teacher_log_probs) != s.response_length]
        await together(map(self._sample, waiting))

    async def close(self) -> None:
        await self.connection.close()

    async def _sample(self, sample: Sample) -> None:
        body = {
            "input_ids": sample.tokens,
            "sampling_params": {"temperature": 0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": max(sample.prompt_length - 1, 0),
        }
        answer = await self.connection.post(self.name, self.url, body)
        sample.teacher_log_probs = self._read(answer, sample.tokens[sample.prompt_length :])

    def _read(self, answer: Any, tokens: list[int]) -> list[float]:
        """One of each of `tokens`, the last that were sent."""
        try:
            told = answer["meta_info"]["input_token_logprobs"][-len(tokens) :]
            # SGLang calls the vocabulary's last token 0 here; its log-prob is its own
            same = all(it[1] in (token, 0) for it, token in zip(told, tokens, strict=True))
            values = [float(entry[0]) for entry in told]
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise BadAnswer(
                f"{self.name} told no log-probs of the tokens it was sent: {answer!r:.200}"
            ) from error
        if not same or not all(map(math.isfinite, values)):
            raise BadAnswer(f"{self.name} told log-probs of other tokens: {told!r:.200}")
        return values
