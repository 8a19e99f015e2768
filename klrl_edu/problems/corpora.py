"""Real text that ships with the package.

US census surnames, 1990: the Bureau's file dist.all.last, a work of the United States government in
the public domain (17 U.S.C. § 105; see data/surnames.LICENSE). The table holds the 5,000 most
frequent names with their share in percent.
"""

import csv
from importlib import resources

from klrl_edu.core.errors import InputError
from klrl_edu.core.validation import check_count
from klrl_edu.models.table import SequenceTable

SURNAMES = 5000


def surname_frequencies(count: int = SURNAMES) -> dict[str, float]:
    """The `count` most frequent US surnames of 1990 in lower case -> share in percent."""
    check_count(count, "count")
    if count > SURNAMES:
        raise InputError(
            f"count = {count} is more than the {SURNAMES} surnames that ship with the package."
        )
    table = resources.files("klrl_edu.problems") / "data" / "surnames.csv"
    with table.open(encoding="utf-8") as lines:
        # below the header names stand by falling frequency
        rows = list(csv.reader(lines))[1 : count + 1]
    return {name: float(percent) for name, percent in rows}


def surname_prior(count: int = SURNAMES) -> SequenceTable:
    """A SequenceTable of `count` surnames, spelled as characters with an EOS: an exact prior."""
    # shares of all names: those of the first `count` do not sum to one
    return SequenceTable.from_texts(surname_frequencies(count), separator="", normalize=True)
