"""The text that ships with the package."""

from importlib import resources

import pytest

from klrl_edu.core.errors import InputError
from klrl_edu.problems.corpora import SURNAMES, surname_frequencies, surname_prior


def test_five_thousand_surnames_ship_with_their_licence():
    frequencies = surname_frequencies()
    assert len(frequencies) == SURNAMES == 5000
    assert list(frequencies)[:5] == ["smith", "johnson", "williams", "jones", "brown"]
    assert frequencies["smith"] == 1.006
    shares = list(frequencies.values())
    assert shares == sorted(shares, reverse=True)
    assert all(name.isascii() and name.isalpha() and name.islower() for name in frequencies)
    licence = (resources.files("klrl_edu.problems") / "data" / "surnames.LICENSE").read_text(
        encoding="utf-8"
    )
    assert "public domain" in licence


def test_the_prior_spells_each_name_with_its_share():
    prior = surname_prior(300)
    frequencies = surname_frequencies(300)
    assert prior.space.decode(prior.tokens) == list(frequencies)
    total = sum(frequencies.values())
    assert prior.log_probs.exp().tolist() == pytest.approx(
        [share / total for share in frequencies.values()], rel=1e-12
    )
    assert set(prior.space.vocabulary) <= set("abcdefghijklmnopqrstuvwxyz")
    assert prior.space.max_length == max(map(len, frequencies)) + 1


@pytest.mark.parametrize("count", [0, -1, 2.5, 5001])
def test_the_number_of_names_is_checked(count):
    with pytest.raises(InputError, match=f"count = {count}"):
        surname_frequencies(count)
