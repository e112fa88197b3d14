"""The process that forks confined runs: small, with one thread, in the jail itself.

Comes in: on the control socket, one descriptor for each run (a socket to whoever waits for it).
Goes out on it: at the start `{"way": "namespaces"}`, or `{"error": why}`. Ends when the control
socket closes; each run is a supervisor of its own (supervisor.py), which ends with its socket.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

from spmd_rl.sandbox import jail, kernel, supervisor

# Common imports of what models write; each run has them for nothing.
USUAL = (
    "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "fractions",
    "functools", "hashlib", "heapq", "itertools", "math", "operator", "random", "re", "statistics",
    "string", "tempfile", "threading", "traceback", "typing",
)  # fmt: skip


def main(control: int, parent: int, wanted: str | None, packages: list[str]) -> None:
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        os._exit(1)
    channel = socket.socket(fileno=control)
    try:
        way = jail.choose(packages, wanted)
        for name in USUAL:
            __import__(name)
        jail.prepare(way, packages)
    except OSError as error:
        channel.sendall(json.dumps({"error": str(error)}).encode())
        return
    channel.sendall(json.dumps({"way": way}).encode())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors leave no zombies
    ids = os.geteuid(), os.getegid()
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
        if not message:
            return
        if not descriptors:
            continue
        if jail.start_run(way) == 0:
            status = 1
            try:
                channel.close()
                with socket.socket(fileno=descriptors[0]) as waiting:
                    supervisor.serve(waiting, way, ids, packages)
                status = 0
            finally:
                os._exit(status)
        os.close(descriptors[0])


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    main(**arguments)
