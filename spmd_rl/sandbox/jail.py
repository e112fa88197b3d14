"""What confined code sees of the machine: built once by the launcher, entered again by each run.

With namespaces: a root of its own (system and Python read-only, a box in memory), no network, its
own processes. Without them: Landlock and seccomp, and no second process. No other way is taken.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from spmd_rl.sandbox import filters, kernel

NAMESPACES, FILTERS = "namespaces", "filters"
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
BOX = "/box"  # the folder that may be written to, and /tmp
NOBODY, INSIDE = 65534, 1000  # user numbers: what root becomes; what all are inside


def choose(packages: list[str], wanted: str | None) -> str:
    """The strongest way that works here, tried out in a process; OSError: none does."""
    faults = []
    for way in (NAMESPACES, FILTERS):
        if wanted in (None, way):
            fault = _tried(way, packages)
            if fault is None:
                return way
            faults.append(f"{way}: {fault}")
    raise OSError("; ".join(faults) or f"{wanted} is neither {NAMESPACES} nor {FILTERS}")


def prepare(way: str, packages: list[str]) -> None:
    """In the launcher, once. With namespaces, / is the jail from here on."""
    if way == FILTERS:
        return
    me = os.geteuid(), os.getegid()
    flags = kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC
    kernel.unshare(flags | (0 if me[0] == 0 else kernel.CLONE_NEWUSER))
    if me[0]:
        kernel.map_ids(INSIDE, me)
    kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    root = "/tmp"  # the mount covers it, for this process alone
    paths = _visible(packages)
    links = {path: os.readlink(path) for path in SYSTEM if os.path.islink(path)}
    held = {path: os.open(path, os.O_PATH) for path in paths if path.startswith("/tmp/")}
    kernel.mount("box", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,mode=755")
    for path in (*paths, *DEVICES):
        source = f"/proc/self/fd/{held[path]}" if path in held else path
        target = root + path
        if os.path.isdir(source):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            Path(target).touch()
        kernel.bind_read_only(source, target)
    for path, aim in links.items():
        os.symlink(aim, root + path)
    for name in (BOX, "/proc"):
        os.makedirs(root + name, exist_ok=True)
    if not os.path.exists(f"{root}/tmp"):
        os.symlink(BOX, f"{root}/tmp")
    os.symlink(BOX, f"{root}/dev/shm")
    # A new /proc can be mounted only where a whole one is in sight; each run covers this one.
    kernel.mount("/proc", f"{root}/proc", "", kernel.MS_BIND | kernel.MS_REC)
    kernel.become_root(root)
    kernel.mount("", "/", "", kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY)
    for descriptor in held.values():
        os.close(descriptor)
    if me[0] == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # or /proc/self is root's


def start_run(way: str) -> int:
    """Fork a run's supervisor: 0 in it."""
    per_run = kernel.CLONE_NEWUSER | kernel.CLONE_NEWPID | kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC
    return kernel.clone(per_run if way == NAMESPACES else 0)


@contextlib.contextmanager
def box(way: str, ids: tuple[int, int], size: int) -> Iterator[str]:
    """In the supervisor: an empty folder of at most `size` bytes; `ids`: the launcher's."""
    if way == FILTERS:
        folder = tempfile.mkdtemp(prefix="spmd_rl-box-")
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    kernel.map_ids(INSIDE, ids)
    plain = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("box", BOX, "tmpfs", plain, f"size={size},nr_inodes=4096,mode=700")
    try:
        kernel.mount("proc", "/proc", "proc", plain)
    except OSError:  # containers hide parts of theirs: then none
        kernel.mount("none", "/proc", "tmpfs", plain | kernel.MS_RDONLY)
    yield BOX


def confine(way: str, packages: list[str], folder: str) -> None:
    """In the process that is to run the code: for good."""
    kernel.drop_capabilities()
    if way == FILTERS:
        filters.see_only([*_visible(packages), *DEVICES], [folder, "/dev/null"])
    filters.forbid(alone=way == FILTERS)


def _visible(packages: list[str]) -> list[str]:
    """Files and folders of the system and of Python, none inside another."""
    wanted = [path for path in SYSTEM if not os.path.islink(path)]
    wanted += [sys.prefix, sys.base_prefix, sys.exec_prefix, *packages]
    found = sorted({os.path.abspath(path) for path in wanted if os.path.exists(path)} - {"/"})
    return [p for p in found if not any(p.startswith(f"{other}/") for other in found)]


def _tried(way: str, packages: list[str]) -> str | None:
    """None when a process can be confined this way, else why not."""
    if kernel.machine not in ("x86_64", "aarch64"):
        return f"not known for {kernel.machine}"
    if way == FILTERS and not filters.landlock_version():
        return "this kernel has no Landlock (Linux 5.13 brought it)"
    answer, out = os.pipe()
    first = os.fork()
    if first == 0:
        try:
            os.close(answer)
            prepare(way, packages)
            ids = os.geteuid(), os.getegid()
            if start_run(way) == 0:
                with box(way, ids, 1 << 20) as folder:
                    confine(way, packages, folder)
                    os.listdir(folder)
            else:
                os.wait()
                os._exit(0)
        except BaseException as error:
            os.write(out, str(error).encode() or b"failed")
        os._exit(0)
    os.close(out)
    with open(answer, "rb") as file:
        fault = file.read().decode()
    os.waitpid(first, 0)
    return fault or None
