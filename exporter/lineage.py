"""Child processes that end with the process that started them, even if that is killed."""

import ctypes
import os
import signal
import sys

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def die_with_parent(parent: int) -> None:
    """Let Linux kill this process as soon as `parent`, the process that started it, has ended; nothing elsewhere.

    Elsewhere a child notices when it next reads from its parent or writes to it. Linux counts the thread that started
    the child as its parent, so that thread has to live as long as the child is wanted.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)
