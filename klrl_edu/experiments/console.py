"""What every command shares: exit codes, and how it talks."""

from collections.abc import Callable
from typing import Annotated

import tyro

OK, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
Quiet = Annotated[bool, tyro.conf.arg(help="Print nothing but errors.")]


def speaker(quiet: bool) -> Callable[[str], None]:
    """`print`, or nothing."""
    return (lambda text: None) if quiet else print
