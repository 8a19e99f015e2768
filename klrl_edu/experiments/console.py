"""What every command shares of its talk: quiet or not."""

from collections.abc import Callable
from typing import Annotated

import tyro

Quiet = Annotated[bool, tyro.conf.arg(help="Print nothing but errors.")]


def speaker(quiet: bool) -> Callable[[str], None]:
    """`print`, or nothing."""
    return (lambda text: None) if quiet else print
