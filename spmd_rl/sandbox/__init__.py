"""Runs Python code that a model wrote, where it can do no harm; docs/security.md says what holds.

    sandbox = Sandbox()
    result = await sandbox.run("print(6 * 7)", limits=Limits(wall_seconds=5))
    result.ok, result.stdout, result.stderr, result.reason     # True, "42\\n", "", "finished"

Knows neither rewards nor engines.
"""

from spmd_rl.sandbox.client import Limits, Result, Sandbox, SandboxUnavailable

__all__ = ["Limits", "Result", "Sandbox", "SandboxUnavailable"]
