"""`python -m klrl_edu` is `klrl`: the process's own side of the command line.

Importing torch and matplotlib takes seconds, so what must hold from the first moment is set here,
before anything heavy is imported: how the process is stopped, and that no window is ever opened.
"""

import os
import signal
import sys
from types import FrameType

_INTERRUPTED = 130


def main() -> int:
    """Runs the command line; returns its exit code."""
    # nothing is written yet: leave at once, whatever import is under way
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files, whatever the shell says
    from klrl_edu.experiments import cli

    # from here on a command can put down what it has: `kill` and Ctrl-C are the same to it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return cli.main()


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"klrl: interrupted\n")
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
