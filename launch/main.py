"""The program every rank runs: `torchrun launch/main.py --config X [key=value ...]`; see --help."""

import os
import sys
from pathlib import Path

# An uninstalled checkout works from any directory; the user's own modules lie where he stands.
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if p != str(HERE)), os.getcwd()]

from spmd_rl import cli  # noqa: E402


def main() -> int:
    args = cli.parse(sys.argv[1:])
    if args.dry_run:
        cli.print_plan(args)
        return 0
    from spmd_rl import job  # torch and the engines' packages, from here on

    return job.main(args)


if __name__ == "__main__":
    sys.exit(main())
