"""What confined code may ask of the kernel (seccomp) and which files it sees (Landlock).

Both need no rights and hold for this process and all it starts, for good.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence

from spmd_rl.sandbox import kernel

# System calls by number: (x86_64, aarch64); newer ones have the same number everywhere.
# Never: a socket of any kind (socketpair stays), other processes' memory, namespaces, mounts,
# memory that belongs to no process, and parts of the kernel with a history of holes.
NEVER = {
    "socket": (41, 198), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438), "kcmp": (312, 272),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180),
}  # fmt: skip
# Where other processes of the user are in sight as well: whatever reaches one, or starts one.
ALONE = {
    "fork": (57, None), "vfork": (58, None), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "process_madvise": (440, 440), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "migrate_pages": (256, 238),
    "move_pages": (279, 239),
}  # fmt: skip
_OTHER = {
    "kill": (62, 129), "tgkill": (234, 131), "clone": (56, 220), "clone3": (435, 435),
    "prlimit64": (302, 261), "fcntl": (72, 25),
}  # fmt: skip
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_NAMESPACES, _THREAD = 0x7E020000, 0x00010000  # flags of clone
_SETTERS = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: a signal to any process
_PR_SET_SECCOMP, _FILTER_MODE = 22, 2


def forbid(alone: bool) -> None:
    """Refuse with EPERM what NEVER names; with `alone` also new processes and all that reaches
    others of the same user.
    """
    column = list(_ARCHITECTURE).index(kernel.machine)
    refuse, absent = _ERROR | _EPERM, _ERROR | _ENOSYS
    names = NEVER | ALONE if alone else NEVER
    number = {name: both[column] for name, both in _OTHER.items()}
    code = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, _ARCHITECTURE[kernel.machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, 0, 1, 0x40000000),  # x32
        (_RETURN, 0, 0, absent),
    ]
    for both in names.values():
        if both[column] is not None:
            code += [(_EQUAL, 0, 1, both[column]), (_RETURN, 0, 0, refuse)]
    # Its flags are in memory, where no filter looks; without it the C library takes clone.
    code += [(_EQUAL, 0, 1, number["clone3"]), (_RETURN, 0, 0, absent)]
    code += _when(number["clone"], 0, [(_ANY_BIT, 0, 1, _NAMESPACES), (_RETURN, 0, 0, refuse)])
    if alone:
        me = os.getpid()
        only_me = [(_EQUAL, 1, 0, me), (_RETURN, 0, 0, refuse)]
        code += _when(number["kill"], 0, only_me) + _when(number["tgkill"], 0, only_me)
        code += _when(number["clone"], 0, [(_ANY_BIT, 1, 0, _THREAD), (_RETURN, 0, 0, refuse)])
        code += _when(number["prlimit64"], 0, [(_EQUAL, 1, 0, 0), (_RETURN, 0, 0, refuse)])
        owner = [step for v in _SETTERS for step in ((_EQUAL, 0, 1, v), (_RETURN, 0, 0, refuse))]
        code += _when(number["fcntl"], 1, owner)
    code.append((_RETURN, 0, 0, _ALLOW))
    program = b"".join(struct.pack("=HBBI", *step) for step in code)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(code), ctypes.addressof(buffer))
    argument = ctypes.create_string_buffer(header, len(header))
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    pointer = ctypes.c_void_p(ctypes.addressof(argument))
    if kernel.libc.prctl(_PR_SET_SECCOMP, _FILTER_MODE, pointer, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp: " + os.strerror(ctypes.get_errno()))


def _when(number: int, argument: int, steps: list) -> list:
    """These steps for one system call, on the low half of one of its arguments."""
    load = (_LOAD, 0, 0, 16 + 8 * argument)
    return [(_EQUAL, 0, len(steps) + 2, number), load, *steps, (_LOAD, 0, 0, 0)]


_CREATE, _ADD, _RESTRICT, _VERSION = 444, 445, 446, 1
_EXECUTE, _WRITE, _READ, _LIST = 1, 2, 4, 8
_OF_FILES = _EXECUTE | _WRITE | _READ | 1 << 14 | 1 << 15


def landlock_version() -> int:
    """0 where the kernel has none."""
    try:
        return kernel.syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(_VERSION))
    except OSError:
        return 0


def see_only(readable: Sequence[str], writable: Sequence[str]) -> None:
    """Of all files, only those below these paths can be opened; and other processes of the user
    neither traced nor (from version 6 on) signalled.
    """
    version = landlock_version()
    bits = 16 if version >= 5 else 15 if version >= 3 else 14 if version == 2 else 13
    everything = (1 << bits) - 1
    words = [everything]
    if version >= 4:
        words.append(3)  # TCP: bind, connect
    if version >= 6:
        words.append(3)  # abstract sockets, signals
    attributes = (ctypes.c_uint64 * len(words))(*words)
    rules = kernel.syscall(
        _CREATE, attributes, ctypes.c_size_t(ctypes.sizeof(attributes)), ctypes.c_uint(0)
    )
    for paths, access in ((readable, _EXECUTE | _READ | _LIST), (writable, everything)):
        for path in paths:
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = access if os.path.isdir(path) else access & everything & _OF_FILES
            rule = struct.pack("=Qi", allowed, folder)
            kernel.syscall(_ADD, ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint(0))
            os.close(folder)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.syscall(_RESTRICT, ctypes.c_int(rules), ctypes.c_uint(0))
    os.close(rules)
