"""How many batches an audit may enumerate: multisets of sequences instead of all S^B orders, as a
loss that does not depend on the order of its batch has the same moments over both.

S sequences, B batch size.
"""

from klrl_edu.core.errors import TooLargeError
from klrl_edu.core.multisets import count_multisets
from klrl_edu.models.contract import readable_count


def check_executions(sequences: int, size: int, max_executions: int) -> int:
    """The number of multisets, if it is allowed.

    Raises:
        TooLargeError: it is not; before anything is allocated.
    """
    count = count_multisets(sequences, size)
    if count > max_executions:
        raise TooLargeError(
            f"batches of {size} out of {sequences:,} sequences are {readable_count(count)}"
            f" multisets, more than max_executions = {max_executions:,}; take a smaller batch_size"
            " or space, raise max_executions, or sample: monte_carlo=n with draw= and bound=."
        )
    return count
