"""spmd_rl: RL post-training of LLMs in one torchrun or Slurm job, without Ray."""

__version__ = "0.1.0"
