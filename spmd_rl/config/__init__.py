"""Configuration: schema.py has the keys, load.py the way in. Must not import torch or engines."""

from spmd_rl.config.errors import ConfigError
from spmd_rl.config.load import dump, load
from spmd_rl.config.schema import Config

__all__ = ["Config", "ConfigError", "dump", "load"]
