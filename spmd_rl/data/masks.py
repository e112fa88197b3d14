"""Which tokens of a conversation are trained on: those the assistant wrote, its end token too.

Comes in: chat messages; goes out: token ids and a 0/1 mask. Each message is rendered next to a
dummy one and encoded by itself, so a turn's tokens do not depend on what follows it, and the
answer is encoded apart from its header, as it is when an engine generates it.
"""

from __future__ import annotations

from typing import Any

from spmd_rl.data.rows import DataError
from spmd_rl.data.template import Messages, Template

DUMMY: Messages = [{"role": "user", "content": "x"}]


class MultiTurnLossMaskGenerator:
    """Masks for templates that render messages one after the other (qwen and its relatives)."""

    def __init__(self, template: Template):
        self.template = template
        self._before = template.chat(DUMMY)
        opened = template.chat(DUMMY, add_generation_prompt=True)
        self._header = opened[len(self._before) :]  # what comes before an assistant's answer
        if not opened.startswith(self._before):
            raise DataError("the chat template changes a message when a generation prompt follows")

    def get_loss_mask(
        self, messages: Messages, tools: list | None = None
    ) -> tuple[list[int], list[int]]:
        tokens: list[int] = []
        mask: list[int] = []
        for position, message in enumerate(messages):
            for text, trained in self._pieces(position, message, tools):
                ids = self.template.encode(text)
                tokens += ids
                mask += [trained] * len(ids)
        return tokens, mask

    def _pieces(self, position: int, message: dict[str, Any], tools: list | None):
        text = self._text(position, message, tools)
        if message["role"] != "assistant" or message.get("step_loss_mask", 1) != 1:
            return [(text, 0)]
        if not text.startswith(self._header):
            return [(text, 1)]
        return [(self._header, 0), (text[len(self._header) :], 1)]

    def _text(self, position: int, message: dict[str, Any], tools: list | None) -> str:
        if position == 0 and message["role"] != "assistant":
            return self.template.chat([message], **({"tools": tools} if tools else {}))
        return self.template.chat([*DUMMY, message])[len(self._before) :]


def get_response_lengths(masks: list[list[int]]) -> list[int]:
    """Tokens from the first trained one to the end; 0 when none is trained."""
    return [len(mask) - mask.index(1) if 1 in mask else 0 for mask in masks]
