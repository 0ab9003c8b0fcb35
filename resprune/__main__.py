"""The command `resprune`, also as `python -m resprune`."""

import signal
import sys


def main() -> int:
    """Run the command; Ctrl-C before it has begun and after it has ended kills the process without a traceback."""
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # as a shell sets it for what it runs in the background
        from resprune.runtime.cli import main as run

        return run()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from resprune.runtime.cli import main as run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return run()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
