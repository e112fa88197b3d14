"""The table of keys in the documentation is that of the schema."""

from spmd_rl.config.schema import SECTIONS
from tools.config_table import DOC, main, read_meanings


def test_the_document_is_current():
    assert main(["--check"]) == 0, "run python tools/config_table.py"


def test_every_key_says_what_it_means():
    meanings = read_meanings()
    for model in SECTIONS.values():
        for key in model.model_fields:
            assert meanings[model.__name__, key], key
            assert f"| `{key}` |" in DOC.read_text()
