"""OpenAI's chat completions: a body to an `Ask`, a `Reply` to a body or to events of a stream."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import orjson

from spmd_rl.agent.protocol import Ask, Refused, Reply, positive, text_of, texts

ROLES = {"developer": "system", "function": "tool"}


def read(body: dict[str, Any]) -> Ask:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages is missing or empty")
    if body.get("n") not in (None, 1):
        raise Refused("n is not 1: send the request again for another answer")
    if body.get("top_logprobs"):
        raise Refused("top_logprobs is not kept, only the log-probs of what was sampled")
    if (body.get("response_format") or {}).get("type", "text") != "text":
        raise Refused(
            "response_format would force tokens upon the model that its log-probs do not explain"
        )
    tools = body.get("tools") or []
    if not all(isinstance(tool, dict) and "function" in tool for tool in tools):
        raise Refused("tools has entries without a function")
    return Ask(
        messages=[_message(message) for message in messages],
        model=str(body.get("model", "")),
        tools=tools,
        use_tools=may_call(body.get("tool_choice")),
        max_tokens=positive(
            body.get("max_completion_tokens") or body.get("max_tokens"), "max_tokens"
        ),
        stop=texts(body.get("stop")),
        stream=bool(body.get("stream")),
        log_probs=bool(body.get("logprobs")),
        usage=bool((body.get("stream_options") or {}).get("include_usage")),
    )


def may_call(choice: Any) -> bool:
    """Whether the model may call tools; that it must cannot be had."""
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind in (None, "auto", "none"):
        return kind != "none"
    raise Refused(
        f"tool_choice is {kind}: only auto and none can be, since a call that is forced upon the "
        "model is not explained by its log-probs"
    )


def _message(message: dict[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str):
        raise Refused("a message has no role")
    role = ROLES.get(role, role)
    found: dict[str, Any] = {"role": role, "content": text_of(message.get("content"), role)}
    if message.get("tool_calls"):
        found["tool_calls"] = [
            {"id": call.get("id"), "type": "function", "function": call["function"]}
            for call in message["tool_calls"]
        ]
    for key in ("name", "tool_call_id"):
        if message.get(key):
            found[key] = message[key]
    return found


def whole(reply: Reply, ask: Ask) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.content or None}
    if reply.thoughts:
        message["reasoning_content"] = reply.thoughts
    if reply.calls:
        message["tool_calls"] = [call.message_part() for call in reply.calls]
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": finish(reply),
        "logprobs": _log_probs(reply, ask),
    }
    return _frame(reply, ask, "chat.completion") | {"choices": [choice], "usage": usage(reply)}


def events(reply: Reply, ask: Ask) -> Iterator[bytes]:
    """A stream's lines: the whole answer in few pieces."""
    yield _chunk(reply, ask, {"role": "assistant", "content": ""})
    if reply.thoughts:
        yield _chunk(reply, ask, {"reasoning_content": reply.thoughts})
    if reply.content or ask.log_probs:
        log_probs = _log_probs(reply, ask)
        yield _chunk(reply, ask, {"content": reply.content}, log_probs=log_probs)
    for index, call in enumerate(reply.calls):
        yield _chunk(reply, ask, {"tool_calls": [{"index": index} | call.message_part()]})
    yield _chunk(reply, ask, {}, finish_reason=finish(reply))
    if ask.usage:
        last = _frame(reply, ask, "chat.completion.chunk") | {"choices": []}
        yield _line(last | {"usage": usage(reply)})
    yield b"data: [DONE]\n\n"


def finish(reply: Reply) -> str:
    if reply.calls:
        return "tool_calls"
    return "length" if reply.answer.finish == "length" else "stop"


def usage(reply: Reply) -> dict[str, Any]:
    new = len(reply.answer.tokens)
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": new,
        "total_tokens": reply.prompt_tokens + new,
        "prompt_tokens_details": {"cached_tokens": reply.answer.cached_tokens},
    }


def error(refused: Refused) -> dict[str, Any]:
    kind = "invalid_request_error" if refused.status < 500 else "server_error"
    return {"error": {"message": str(refused), "type": kind, "param": None, "code": refused.code}}


def failed_event(refused: Refused) -> bytes:
    return _line(error(refused))


PING = b": waiting\n\n"


def _frame(reply: Reply, ask: Ask, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{reply.id}", "object": kind, "created": int(time.time())} | {
        "model": ask.model
    }


def _chunk(
    reply: Reply,
    ask: Ask,
    delta: dict[str, Any],
    finish_reason: str | None = None,
    log_probs: Any = None,
) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": log_probs}
    return _line(_frame(reply, ask, "chat.completion.chunk") | {"choices": [choice]})


def _line(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _log_probs(reply: Reply, ask: Ask) -> dict[str, Any] | None:
    if not ask.log_probs:
        return None
    content = [
        {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
        for text, value in zip(reply.token_texts, reply.answer.log_probs, strict=True)
    ]
    return {"content": content, "refusal": None}
