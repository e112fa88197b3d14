"""Megatron-core training: a shard of a batch in, updated weights and metrics out."""

import logging
import warnings

# megatron-core warns in every rank of what is as it should be: no Transformer Engine, no reruns
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
logging.getLogger("megatron.core").setLevel(logging.ERROR)
