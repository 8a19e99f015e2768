"""The errors a user can meet: each says what was given, what was expected, and the remedy."""


class KlrlError(Exception):
    """Base of every error that this package raises on purpose.

    The command line turns it into one line and exit code 2.
    """


class InputError(KlrlError, ValueError):
    """An argument is wrong: the message names it, its value and the remedy."""


class InfeasibleError(InputError):
    """The evidence is zero: no supported sequence has a finite reward, so there is no posterior."""


class TooLargeError(InputError):
    """An exact computation would need more memory or time than allowed.

    The message states the count and what to use instead.
    """


class UnsupportedPolicyError(InputError):
    """The policy gives mass where the posterior has none, so KL(policy‖posterior) is infinite."""


class DivergedError(KlrlError, ArithmeticError):
    """Training met a NaN or an infinity; the policy holds the last good weights.

    Attributes:
        step: the step (from 1) whose update was refused.
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class CheckpointError(KlrlError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another model."""
