"""The Linux calls that Python has no functions for: namespaces, mounts, capabilities.

Each raises OSError as the kernel words it. Nothing here knows what is confined, or why.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT = 1, 2, 4, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
_AT_FDCWD, _AT_RECURSIVE, _SYS_MOUNT_SETATTR = -100, 0x8000, 442
_NUMBERS = {"x86_64": {"clone": 56, "pivot_root": 155}, "aarch64": {"clone": 220, "pivot_root": 41}}

machine = platform.machine()
libc = ctypes.CDLL(None, use_errno=True)


def syscall(number: int, *args) -> int:
    result = libc.syscall(ctypes.c_long(number), *args)
    return _checked(result, f"system call {number}")


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, value: int) -> None:
    _checked(libc.prctl(option, value, 0, 0, 0), f"prctl {option}")


def clone(flags: int) -> int:
    """fork() into new namespaces; this process must have one thread only. Unlike os.fork it runs
    no hooks in the child.
    """
    if not flags:
        return os.fork()
    number = _NUMBERS[machine]["clone"]
    return syscall(number, ctypes.c_long(flags | signal.SIGCHLD), *[ctypes.c_long(0)] * 4)


def unshare(flags: int) -> None:
    _checked(libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    arguments = (source.encode(), target.encode(), kind.encode(), flags, options.encode())
    source_, target_, kind_, flags_, options_ = arguments
    result = libc.mount(source_, target_, kind_, ctypes.c_ulong(flags_), options_ or None)
    _checked(result, f"mount {target}")


def bind_read_only(source: str, target: str) -> None:
    """`source` and what is mounted below it, at `target`: nothing there can be written to."""
    mount(source, target, "", MS_BIND | MS_REC)

    class Attributes(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]

    # The MOUNT_ATTR_ flags for these three have the values of MS_.
    wanted = Attributes(MS_RDONLY | MS_NOSUID | (0 if source.startswith("/dev/") else MS_NODEV))
    try:
        size = ctypes.c_size_t(ctypes.sizeof(wanted))
        where = (ctypes.c_int(_AT_FDCWD), target.encode(), ctypes.c_uint(_AT_RECURSIVE))
        syscall(_SYS_MOUNT_SETATTR, *where, ctypes.byref(wanted), size)
    except OSError:  # before Linux 5.12: the top alone; flags that are there must stay
        kept = os.statvfs(target).f_flag & 0xF
        mount("", target, "", MS_BIND | MS_REMOUNT | kept | wanted.set)


def become_root(folder: str) -> None:
    """`folder`, which is a mount, becomes /; what was there is out of reach."""
    os.chdir(folder)
    syscall(_NUMBERS[machine]["pivot_root"], b".", b".")
    _checked(libc.umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/")


def map_ids(inside: int, outside: tuple[int, int]) -> None:
    """In a new user namespace: user and group `outside` (numbers before it was entered) are number
    `inside` here.
    """
    with open("/proc/self/setgroups", "w") as file:
        file.write("deny")
    for name, number in zip(("uid_map", "gid_map"), outside, strict=True):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(f"{inside} {number} 1")


def drop_capabilities() -> None:
    """And nothing run later can bring any back."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _checked(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
