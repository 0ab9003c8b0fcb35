"""Ends a process that opens a network socket, whatever library does it: seccomp on Linux, Python's own elsewhere."""

import ctypes
import os
import platform
import struct
import sys
from typing import Any

SOCKET_CALL = {"x86_64": 41, "aarch64": 198}
AF_UNIX = 1
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2
_KILL_PROCESS, _ALLOW = 0x80000000, 0x7FFF0000
KILLED = -31
"""The return code that `subprocess` gives for a process that the guard ended (SIGSYS); elsewhere it is 31."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def forbid_sockets() -> None:
    """From now on this process and its children die at `socket()`, but for local ones."""
    sys.addaudithook(_no_python_socket)
    call = SOCKET_CALL.get(platform.machine())
    if sys.platform != "linux" or call is None:
        return
    # Load the number of the call; if it is socket's, load its first argument; anything but AF_UNIX ends the process.
    lines = [
        (0x20, 0, 0, 0),
        (0x15, 0, 3, call),
        (0x20, 0, 0, 16),
        (0x15, 1, 0, AF_UNIX),
        (0x06, 0, 0, _KILL_PROCESS),
        (0x06, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = _Program(len(lines), ctypes.addressof(code))
    libc: Any = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(program)):
        raise OSError(ctypes.get_errno(), "this kernel has no seccomp filters")


def _no_python_socket(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.__new__" and arguments[1] != AF_UNIX:
        os._exit(-KILLED)
