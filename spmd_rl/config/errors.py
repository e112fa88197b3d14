"""Faults of a configuration: sentences for its user, collected and raised all at once."""

from __future__ import annotations

from typing import NamedTuple


class ConfigError(ValueError):
    """`faults` holds one sentence for each fault, naming the key, where it was set, and the fix."""

    def __init__(self, faults: list[str]):
        self.faults = faults
        super().__init__("\n".join(faults))


class Fault(NamedTuple):
    """A fault whose place is not known yet: the `section.key` names concerned, the main first."""

    keys: tuple[str, ...]
    text: str
