"""How many batches an audit may enumerate: multisets of sequences instead of all S^B orders, as a
loss that does not depend on the order of its batch has the same moments over both.

S sequences, B batch size.
"""

from collections.abc import Sequence

from klrl_edu.core.errors import TooLargeError
from klrl_edu.core.multisets import count_blocks
from klrl_edu.models.contract import readable_count


def check_executions(
    sequences: Sequence[int], size: int, max_executions: int, times: int = 1
) -> int:
    """The number of batches of `times` multisets of `size` sequences a problem, if it is allowed.

    Args:
        sequences: how many can be drawn for each problem.

    Raises:
        TooLargeError: it is not; before anything is allocated.
    """
    count = count_blocks(sequences, size, times)
    if count > max_executions:
        what = " and ".join(f"{each:,}" for each in sequences[:3])
        what += " and …" if len(sequences) > 3 else ""
        split = f"{times} parts of {size}" if times > 1 else f"{size}"
        raise TooLargeError(
            f"batches of {split} out of {what} sequences are {readable_count(count)} multisets,"
            f" more than max_executions = {max_executions:,}; take a smaller batch_size or space,"
            " raise max_executions, or sample: monte_carlo=n with draw=."
        )
    return count
