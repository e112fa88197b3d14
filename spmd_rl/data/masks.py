"""Which tokens of a conversation are trained on: those the assistant wrote, its end token too.

Comes in: chat messages; goes out: token ids and a 0/1 mask. The header before an answer is encoded
apart from it, as it is when an engine generates the answer. A type says how a message becomes text:

qwen          every message by itself
qwen3         every message after a dummy question, so that its thoughts stay in it
qwen3_5       the whole conversation at once, with what the template drops of earlier thoughts
distill_qwen  all messages but the last are the prompt
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from spmd_rl.data.rows import DataError
from spmd_rl.data.template import Messages, Template

TYPES = ("qwen", "qwen3", "qwen3_5", "distill_qwen")
Pieces = list[tuple[str, int]]  # text, and whether it is trained on

DUMMY: Messages = [{"role": "user", "content": "x"}]
DISTILLED = "<｜Assistant｜>"  # a token of DeepSeek's distilled models, which are of type qwen too
THINK = "<think>"


class MultiTurnLossMaskGenerator:
    """Token ids and masks of whole conversations, for templates with one header for answers."""

    def __init__(
        self,
        tokenizer: Any,
        tokenizer_type: str = "qwen",
        template_kwargs: dict[str, Any] | None = None,
    ):
        """`template_kwargs`: more arguments of the chat template (apply_chat_template_kwargs)."""
        if tokenizer_type not in TYPES:
            known = ", ".join(TYPES)
            raise ValueError(
                f"data.loss_mask_type '{tokenizer_type}' is unknown: choose one of {known}"
            )
        if tokenizer_type == "qwen" and DISTILLED in tokenizer.get_added_vocab():
            tokenizer_type = "distill_qwen"
        self.template = Template(tokenizer, True, template_kwargs)
        self.type = tokenizer_type
        self._before = self.template.chat(DUMMY)
        self._dummy = self.template.chat(DUMMY * 2)[len(self._before) :]
        opened = self.template.chat(DUMMY, add_generation_prompt=True)
        if not opened.startswith(self._before):
            raise DataError("the chat template changes a message when a generation prompt follows")
        # What comes before an assistant's answer; thinking models may begin it with a thought.
        self._header = opened[len(self._before) :]
        self._bare_header = self._header.split(THINK)[0]

    def get_loss_mask(
        self, messages: Messages, tools: list | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids and mask [T]. DataError where the template leaves out what the assistant wrote."""
        ids: list[int] = []
        mask: list[int] = []
        make = {"qwen3_5": self._whole, "distill_qwen": self._last}.get(self.type, self._turns)
        for text, trained in make(messages, tools):
            tokens = self.template.encode(text)
            ids += tokens
            mask += [trained] * len(tokens)
        return ids, mask

    def get_response_lengths(self, masks: list[list[int]]) -> list[int]:
        return get_response_lengths(masks)

    def _turns(self, messages: Messages, tools: list | None) -> Pieces:
        found: Pieces = []
        for position, block in _blocks(messages):
            if block[0]["role"] != "assistant":
                found.append((self._context(position, block, tools), 0))
                continue
            if position == 0:
                found.append((self._preamble(tools), 0))
            text = self._answer(block[0])
            self._check_complete(block[0], text)
            found += self._split(text, block[0])
        return found

    def _context(self, position: int, block: Messages, tools: list | None) -> str:
        if position:
            return self.template.chat([*DUMMY, *block])[len(self._before) :]
        # Some templates demand a question, and render the tools before it.
        text = self.template.chat([*block, *DUMMY], tools=tools or None)
        return text.removesuffix(self._dummy)

    def _preamble(self, tools: list | None) -> str:
        return self.template.chat(DUMMY, tools=tools or None).removesuffix(self._dummy)

    def _answer(self, message: dict[str, Any]) -> str:
        if self.type == "qwen3":
            return self.template.chat([*DUMMY, message])[len(self._before) :]
        return self.template.chat([message]).removeprefix(self._preamble(None))

    def _split(self, text: str, message: dict[str, Any]) -> Pieces:
        trained = int(message.get("step_loss_mask", 1) == 1)
        for header in (self._header, self._bare_header):
            if text.startswith(header):
                return [(header, 0), (text[len(header) :], trained)]
        return [(text, trained)]

    def _check_complete(self, message: dict[str, Any], text: str) -> None:
        for key in ("content", "reasoning_content"):
            said = message.get(key)
            parts = re.split(r"</?think>", said) if isinstance(said, str) else []
            lost = next((part for part in parts if part.strip() not in text), None)
            if lost is not None:
                raise DataError(
                    f"the chat template leaves out '{lost.strip():.40}' of an assistant message: "
                    f"set data.loss_mask_type: qwen3, which keeps thoughts (it is {self.type})"
                )

    def _whole(self, messages: Messages, tools: list | None) -> Pieces:
        text = self.template.chat(messages, tools=tools or None)
        first, *rest = text.split(self._bare_header)
        answers = [message for message in messages if message["role"] == "assistant"]
        if len(rest) != len(answers):
            raise DataError(
                f"a conversation has {len(answers)} assistant messages, but the template's "
                f"{self._bare_header!r} stands {len(rest)} times in its text: a message contains "
                "it, or data.loss_mask_type qwen3_5 does not fit the model"
            )
        end = self.template.after_answer()
        found: Pieces = [(first, 0)]
        for message, part in zip(answers, rest, strict=True):
            answer, closing, after = part.partition(end)
            opened = self._header.removeprefix(self._bare_header) or THINK + "\n"
            begun = opened if answer.startswith(opened) else ""
            if not begun and answer.startswith(THINK + "\n"):
                begun = THINK + "\n"
            trained = int(message.get("step_loss_mask", 1) == 1)
            found.append((self._bare_header + begun, 0))
            found.append((answer.removeprefix(begun) + closing, trained))
            found.append((after, 0))
        return found

    def _last(self, messages: Messages, tools: list | None) -> Pieces:
        *before, last = messages
        prompt = self.template.chat(before, tools=tools or None, add_generation_prompt=True)
        answer = str(last.get("content") or "")
        if prompt.endswith(THINK + "\n"):
            answer = answer.removeprefix(THINK + "\n")
        answer += self.template.tokenizer.eos_token or ""
        return [(prompt, 0), (answer, int(last.get("step_loss_mask", 1) == 1))]


def _blocks(messages: Messages) -> Iterator[tuple[int, Messages]]:
    """Messages with their position; tool messages that follow each other are one block, which
    templates render together."""
    position = 0
    while position < len(messages):
        end = position + 1
        if messages[position]["role"] == "tool":
            while end < len(messages) and messages[end]["role"] == "tool":
                end += 1
        yield position, messages[position:end]
        position = end


def get_response_lengths(masks: list[list[int]]) -> list[int]:
    """Tokens from the first trained one to the end; 0 when none is trained."""
    return [len(mask) - mask.index(1) if 1 in mask else 0 for mask in masks]
