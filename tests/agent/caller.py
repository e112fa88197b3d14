"""A tiny model that has learned one conversation by heart: it calls a tool, then says the result.

`caller()` returns its folder, made once and kept under build/ like other tiny models.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from spmd_rl.data.masks import MultiTurnLossMaskGenerator
from tests.models import ROOT, SCRIPT, tiny_model

TEMPLATE = ROOT / "tests/data/templates/qwen3_instruct_2507.jinja"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        },
    },
}
QUESTION = "What is 1+2?"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
SAID = "It is 3."


def conversation(result: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": SAID},
    ]


def add(a: int, b: int) -> int:
    return a + b


def caller() -> Path:
    base = tiny_model("qwen3", positions=1024, perturb=0.0)
    made_from = base.name.encode() + TEMPLATE.read_bytes() + Path(__file__).read_bytes()
    key = hashlib.sha256(made_from + SCRIPT.read_bytes()).hexdigest()[:12]
    path = base.parent / f"caller-{key}"
    if not (path / "config.json").is_file():
        _teach(base, path)
    return path


def _teach(base: Path, path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE.read_text()
    generator = MultiTurnLossMaskGenerator(tokenizer, "qwen3")
    rows = [generator.get_loss_mask(conversation("3"), tools) for tools in ([TOOL], None)]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(2000):
        worst = 0.0
        for ids, mask in rows:
            tokens, trained = torch.tensor([ids]), torch.tensor(mask[1:]).bool()
            logits = model(tokens).logits[0, :-1][trained]
            losses = torch.nn.functional.cross_entropy(
                logits, tokens[0, 1:][trained], reduction="none"
            )
            worst = max(worst, losses.max().item())
            losses.mean().backward()
        if worst < 0.01:
            break
        optimizer.step()
        optimizer.zero_grad()
    assert worst < 0.01, f"the model has not learned its lines: {worst}"
    with tempfile.TemporaryDirectory(dir=path.parent) as aside:  # whole or not at all
        made = Path(aside) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        if not path.exists():
            made.rename(path)
