"""Language models with finitely many contexts: what forward–backward can sum over.

    q(y) = Σ_{c_0 … } q(c_0) Π_t q(y_t|c_t) q(c_{t+1}|c_t, y_t)                                  (1)

In an n-gram the next context is a function of context and token; in an HMM it is drawn from a law
of its own. C contexts, V columns.
"""

from torch import Tensor

from klrl_edu.models.contract import LanguageModel


class FiniteStateModel(LanguageModel):
    """A model of the form (1); a subclass gives the first two laws, and one of the other two."""

    def initial_log_probs(self) -> Tensor:
        """log q(c_0) [C] in nats."""
        raise NotImplementedError

    def emission_log_probs(self) -> Tensor:
        """log q(y|c) [C,V] in nats, normalised over V, with the gradient of the parameters.

        The last column is EOS where the space has it.
        """
        raise NotImplementedError

    def successors(self) -> Tensor | None:
        """The context after each of K words [C,K], where they determine it; else None."""
        return None

    def transition_log_probs(self) -> Tensor | None:
        """log q(c'|c) [C,C] in nats, where the word does not move the context; else None."""
        return None
