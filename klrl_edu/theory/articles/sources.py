"""The five articles that this project began from: their titles and authors' names as printed, where
the copies that we have carry them.

They were read for their topics and for the claims to be checked; none of their sentences or code is
used.
"""

from typing import NamedTuple


class Article(NamedTuple):
    """One article.

    Attributes:
        file: the name of our copy.
        title: as printed; "" where the copy carries none.
        author: as signed; "" where the copy carries no name.
        subject: what it is about, in our words.
    """

    file: str
    title: str
    author: str
    subject: str

    @property
    def citation(self) -> str:
        """Title, author, file and subject, as far as they are known."""
        signed = f"signed {self.author}" if self.author else ""
        missing = "" if self.title or self.author else "neither title nor name in our copy"
        about = ", ".join(part for part in (signed, missing) if part)
        printed = f"《{self.title}》, {self.file}" if self.title else self.file
        return f"{printed}{f' ({about})' if about else ''}: {self.subject}"


ARTICLES: dict[str, Article] = {
    "A": Article(
        "000_91836c92fc3d3449",
        "",
        "禅与计算机程序设计艺术",
        "KL penalty and Bayesian inference, with tabular code",
    ),
    "B": Article(
        "001_dc30f4a8d6ea2d7f",
        "",
        "",
        "Transformer, BERT and GPT, with KL as a regulariser",
    ),
    "C": Article(
        "002_eba1d912e35743ba",
        "大语言模型原理基础与前沿 带有KL惩罚的强化学习：贝叶斯推理观点",
        "",
        "four sentences, an RNN policy and importance sampling",
    ),
    "D": Article(
        "003_e9dee0ade0c38ff0",
        "",
        "禅与计算机程序设计艺术",
        "encoder–decoder LSTM: policy gradient, value functions, models",
    ),
    "E": Article(
        "004_7fa0d3502c9ccd8c",
        "",
        "",
        "feedback from an AI, Q-learning, a Transformer policy",
    ),
}
"""Letter -> article."""
