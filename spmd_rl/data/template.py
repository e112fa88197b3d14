"""Tokenizers and chat templates, without importing torch.

Comes in: a Hugging Face directory; goes out: text and token ids. transformers imports torch with
its tokenizers when it finds it (3.6 s and 420 MB, against 1.0 s and 75 MB without), and the
collector process needs neither.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from spmd_rl.data.rows import DataError

Messages = list[dict[str, Any]]

MARK = "What the assistant says."


@contextmanager
def torch_hidden() -> Iterator[None]:
    """Inside, `import torch` fails, so that optional users of torch do without it."""
    if "torch" in sys.modules:  # a user's hook wants it anyway
        yield
        return
    hidden: dict[str, Any] = {"torch": None, "torchvision": None}
    sys.modules.update(hidden)
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, ...) is None:
                del sys.modules[name]


def load_tokenizer(path: str, trust_remote_code: bool = False, without_torch: bool = False) -> Any:
    """The tokenizer. `without_torch` is for the collector process: transformers, once loaded so,
    can load no model in that process any more."""
    if trust_remote_code or not without_torch:  # its code may import torch
        return _from_pretrained(path, trust_remote_code=trust_remote_code)
    logging.getLogger("transformers").addFilter(_says_something_else)
    with torch_hidden():
        return _from_pretrained(path)


def _from_pretrained(path: str, **kwargs: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, **kwargs)


def _says_something_else(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


class Template:
    """Turns a prompt as the data has it (text or chat messages) into text and token ids."""

    def __init__(self, tokenizer: Any, apply: bool, kwargs: dict[str, Any] | None = None):
        self.tokenizer, self.apply, self.kwargs = tokenizer, apply, dict(kwargs or {})
        if apply and not tokenizer.chat_template:
            raise DataError(
                "data.apply_chat_template is true, but the tokenizer of model.hf_checkpoint has no "
                "chat template: leave it out, or give the model one"
            )

    def render(self, value: str | Messages, tools: list | None = None) -> str | Messages:
        """The prompt's text; chat messages stay what they are when no template is asked for."""
        if not self.apply:
            return value
        return self.chat(as_messages(value), tools=tools, add_generation_prompt=True)

    def chat(self, messages: Messages, **options: Any) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, **(self.kwargs | options)
        )

    def after_answer(self) -> str:
        """What the template writes after an answer: its end token, and more."""
        answer = {"role": "assistant", "content": MARK}
        text = self.chat([{"role": "user", "content": "x"}, answer])
        return text[text.rindex(MARK) + len(MARK) :]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]


def as_messages(value: str | Messages) -> Messages:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value
