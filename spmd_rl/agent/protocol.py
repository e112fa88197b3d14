"""What OpenAI's and Anthropic's chat protocols have in common, as values.

`Ask` is a request with its messages in OpenAI's form, `Reply` what the model said to it. openai.py
and anthropic.py turn bodies into asks, and replies into bodies or events.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from spmd_rl.agent.tools import ToolCall
from spmd_rl.data.template import Messages
from spmd_rl.rollout.answers import Generated


class Refused(Exception):
    """A request that is answered with an error; `code` is OpenAI's word for its kind."""

    def __init__(self, message: str, status: int = 400, code: str = "invalid_request_error"):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Ask:
    """A request for one answer."""

    messages: Messages
    model: str
    tools: list[dict[str, Any]] = field(default_factory=list)  # OpenAI's schemas
    use_tools: bool = True  # false: calls in the answer stay text
    max_tokens: int | None = None
    stop: list[str] = field(default_factory=list)
    stream: bool = False
    log_probs: bool = False
    usage: bool = True  # tell it at the end of a stream


@dataclass
class Reply:
    """The model's answer."""

    id: str
    content: str
    thoughts: str
    calls: list[ToolCall]
    answer: Generated
    prompt_tokens: int
    stopped_by: str | None = None  # the stop text that ended it
    token_texts: list[str] = field(default_factory=list)  # where log-probs are wanted

    @property
    def message(self) -> dict[str, Any]:
        """As it comes back in the agent's next request."""
        calls = [call.message_part() for call in self.calls]
        found: dict[str, Any] = {"role": "assistant", "content": self.content}
        return found | ({"tool_calls": calls} if calls else {})


def text_of(content: Any, where: str) -> str:
    """A message's content: text, or parts that are text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refused(f"the content of {where} is neither text nor a list of parts")
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text")
        if not isinstance(text, str):
            raise Refused(f"{where} has a part of type {part.get('type')}: only text can be read")
        texts.append(text)
    return "\n".join(texts)


def texts(value: Any) -> list[str]:
    """`stop` is a text, several, or none."""
    return [value] if isinstance(value, str) else list(value or ())


def positive(value: Any, name: str) -> int | None:
    if value is not None and (not isinstance(value, int) or value < 1):
        raise Refused(f"{name} is {value!r}: it must be a whole number above 0")
    return value
