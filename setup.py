"""Package spmd_rl. The pins live in tools/pins; tools/install.sh installs the engines on a CPU."""

from pathlib import Path

from setuptools import find_packages, setup

PINS = Path(__file__).parent / "tools" / "pins"


def pins(name: str) -> list[str]:
    lines = (PINS / f"{name}.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


setup(
    name="spmd_rl",
    version="0.1.0",
    description="RL post-training of LLMs in one torchrun or Slurm job, without Ray",
    python_requires=">=3.10",
    packages=find_packages(include=["spmd_rl", "spmd_rl.*"]),
    include_package_data=True,
    install_requires=pins("base"),
    extras_require={
        "cpu": pins("torch") + pins("cpu"),
        "cuda": pins("cuda"),
        "dev": pins("dev"),
    },
)
