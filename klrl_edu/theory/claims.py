"""The claims of the five articles that this project began from, each judged by numbers.

klrl check --claims, the tests and a page of the site share this table; what a claim is stands in
`verdicts.py`, and each article has a room of `articles/`.
"""

import re
from collections.abc import Iterable
from typing import Any

from klrl_edu.core.display import Cell, format_number, text_table
from klrl_edu.theory.articles import control, feedback, importance, tabular, transformers
from klrl_edu.theory.articles.sources import ARTICLES, Article
from klrl_edu.theory.verdicts import Check, Claim

CLAIMS: dict[str, Claim[Any]] = {
    claim.name: claim
    for room in (tabular, transformers, importance, control, feedback)
    for claim in vars(room).values()
    if isinstance(claim, Claim)
}
"""Name -> claim, in the order of the articles."""

TABLE_HEADER = (
    "claim",
    "article",
    "section",
    "verdict",
    "printed error",
    "corrected error",
    "unit",
    "tutorial",
    "check",
)
_MARKDOWN_HEADER = ("claim", "printed, and corrected", "by number")


def check_claims(claims: Iterable[Claim[Any]] | None = None) -> list[Check]:
    """Runs claims, all by default, and holds each verdict against the numbers; a few seconds at
    most.
    """
    return [claim.check() for claim in (CLAIMS.values() if claims is None else claims)]


def claims_table(checks: Iterable[Check]) -> list[list[Cell]]:
    """A row a claim, under `TABLE_HEADER`."""
    return [_row(check) for check in checks]


def _row(check: Check) -> list[Cell]:
    claim, finding = check.claim, check.finding
    described = [claim.name, claim.source, claim.section, claim.verdict]
    return [
        *described,
        finding.printed_error,
        finding.corrected_error,
        finding.unit,
        claim.tutorial,
        check.refusal or "agrees",
    ]


def claims_text(checks: Iterable[Check], *, details: bool = False) -> str:
    """The same as plain text, errors to three digits, and which article each letter is; with
    `details` also what was seen of each claim.
    """
    checks = list(checks)
    table = text_table(TABLE_HEADER, claims_table(checks), digits=3)
    articles = [f"{letter}  {article.citation}" for letter, article in _articles_of(checks)]
    seen = [f"{check.claim.name}: {check.finding.says}" for check in checks]
    return "\n".join([table, "", *articles, *(["", *seen] if details else [])])


def _articles_of(checks: Iterable[Check]) -> list[tuple[str, Article]]:
    letters = {check.claim.source for check in checks}
    return [(letter, article) for letter, article in ARTICLES.items() if letter in letters]


def claims_markdown(checks: Iterable[Check] | None = None) -> str:
    """The articles and the table of a page of the site: formulas as $…$, what was seen in a
    sentence; runs all claims unless their checks are given.
    """
    checks = check_claims() if checks is None else list(checks)
    articles = [f"- {letter}: {article.citation}" for letter, article in _articles_of(checks)]
    rows = [
        _MARKDOWN_HEADER,
        tuple("---" for _ in _MARKDOWN_HEADER),
        *(_markdown_row(check) for check in checks),
    ]
    return "\n".join([*articles, "", *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _markdown_row(check: Check) -> tuple[str, ...]:
    claim, finding = check.claim, check.finding
    errors = (
        f"{format_number(finding.printed_error, 3)} → {format_number(finding.corrected_error, 3)}"
        f" {finding.unit}"
    )
    verdict = f"{claim.verdict}, {errors}" if check.passed else f"**refused: {check.refusal}**"
    formulas = (  # \mid and \Vert in them: a bar would end the cell
        f"{claim.printed}<br>→ {claim.corrected or 'as printed'}"
    )
    return (
        f"`{claim.name}`<br>{claim.source}, {claim.section}; {claim.tutorial}<br>{verdict}",
        formulas,
        _literal(finding.says),
    )


def _literal(text: str) -> str:
    """Text whose bars, stars, underscores and brackets mean nothing to Markdown."""
    return re.sub(r"([|*_\[\]])", r"\\\1", text)
