"""What is too much to enumerate is refused before it is begun."""

import pytest

from klrl_edu.audit.executions import check_executions
from klrl_edu.core.errors import TooLargeError


def test_too_many_are_refused_before_anything_is_allocated():
    assert check_executions([4], 2, 10) == 10
    with pytest.raises(
        TooLargeError,
        match=(
            r"batches of 2 out of 4 sequences are 10 multisets, more than max_executions ="
            r" 9.*monte_carlo=n"
        ),
    ):
        check_executions([4], 2, 9)
    with pytest.raises(TooLargeError, match=r"about 10\^442"):
        check_executions([10**6], 100, 100_000)
    # two problems of 4 and 3 sequences, each in two parts of one
    assert check_executions([4, 3], 1, 200, times=2) == (4 * 3) ** 2
    with pytest.raises(TooLargeError, match="2 parts of 1 out of 4 and 3 sequences are 144"):
        check_executions([4, 3], 1, 100, times=2)
