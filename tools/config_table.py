"""Write the table of keys in docs/configuration.md anew from spmd_rl/config/schema.py.

  python tools/config_table.py            rewrite the file
  python tools/config_table.py --check    exit 1 when it is out of date

The meaning of a key is the comment beside it in the schema, or above it.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spmd_rl.config.schema import SECTIONS, Section  # noqa: E402

DOC = ROOT / "docs" / "configuration.md"
SCHEMA = [ROOT / "spmd_rl" / "config" / name for name in ("algorithm.py", "schema.py")]
MARK = "<!-- Below: written by tools/config_table.py from spmd_rl/config/schema.py -->\n"


def table() -> str:
    meanings = read_meanings()
    parts = [MARK]
    for section, model in SECTIONS.items():
        about = f"{model.__doc__.strip()}\n\n" if "__doc__" in vars(model) and model.__doc__ else ""
        rows = [row(model, key, meanings[model.__name__, key]) for key in model.model_fields]
        head = "| key | type | default | meaning |\n|---|---|---|---|\n"
        parts.append(f"\n### {section}\n{about}{head}" + "\n".join(rows) + "\n")
    return "".join(parts)


def row(model: type[Section], key: str, meaning: str) -> str:
    field = model.model_fields[key]
    if field.is_required():
        default = "**required**"
    else:
        default = f"`{json.dumps(field.get_default(call_default_factory=True))}`"
    kind = re.sub(r"Literal\[(.*?)\]", r"\1", type_text(model, key)).replace("'", "")
    return f"| `{key}` | {cell(kind)} | {default} | {cell(meaning).replace('None:', 'null:')} |"


def type_text(model: type[Section], key: str) -> str:
    annotation = model.model_fields[key].annotation
    text = str(annotation) if "[" in str(annotation) or "|" in str(annotation) else ""
    text = text or getattr(annotation, "__name__", str(annotation))
    return re.sub(r"typing\.|Optional\[(.*)\]", lambda m: m[1] or "", text).replace(" | None", "")


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("None:", "null:")


def read_meanings() -> dict[tuple[str, str], str]:
    """(class, key) -> the comment on the key's line, else the lines of comment above it."""
    found: dict[tuple[str, str], str] = {}
    for source in (path.read_text() for path in SCHEMA):
        lines = source.splitlines()
        for node in ast.parse(source).body:
            for item in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    last = lines[(item.end_lineno or item.lineno) - 1]
                    found[node.name, item.target.id] = beside(last) or above(lines, item.lineno - 1)
    return found


def beside(line: str) -> str:
    return line.partition("  # ")[2]


def above(lines: list[str], index: int) -> str:
    comments: list[str] = []
    while index > 0 and lines[index - 1].strip().startswith("# "):
        index -= 1
        comments.insert(0, lines[index].strip().removeprefix("# "))
    return " ".join(comments)


def main(words: list[str]) -> int:
    text = DOC.read_text()
    wanted = text.partition(MARK)[0] + table()
    if "--check" in words:
        return int(text != wanted)
    DOC.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
