"""Named errors: what was found, what was expected, what to do next."""


class BayestieError(Exception):
    """Base of every error that bayestie raises on purpose.

    Args:
        what: the site, argument or file the error is about.
        found: what was there.
        expected: what should have been there.
        fix: the next thing to do, as a sentence.
    """

    def __init__(self, what: str, *, found: str, expected: str, fix: str):
        self.what, self.found, self.expected, self.fix = what, found, expected, fix
        super().__init__(f"{what}: found {found}, expected {expected}. {fix}")

    def __reduce__(self):
        # BaseException pickles positional args only; workers send errors back whole.
        return _rebuild, (type(self), self.what, self.found, self.expected, self.fix)


def _rebuild(cls, what, found, expected, fix):
    return cls(what, found=found, expected=expected, fix=fix)


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough to stand in one of ours; it may say nothing."""
    return (str(error).strip().splitlines() or [""])[0][:200]


class TieError(BayestieError, ValueError):
    """A graph of copies that cannot be: a bad edge, weight, label or shape."""


class StrengthError(BayestieError, ValueError):
    """A prior strength (sigma) that is negative, NaN, misshapen or impossible for the form."""


class FormError(BayestieError, ValueError):
    """A form (level, copies, matched) that does not exist, or that the tie does not have."""


class BaseError(BayestieError, ValueError):
    """A base prior that does not fit the form or the event shape."""


class ShapeError(BayestieError, ValueError):
    """Tensors whose shapes do not fit together."""


class DataError(BayestieError, ValueError):
    """Data the model was given holds NaN, infinity or values outside the likelihood's support."""


class ModelError(BayestieError, ValueError):
    """A model that cannot be fitted as written."""


class NoLatentError(ModelError):
    """The model has no latent site, so there is nothing to infer."""


class DiscreteLatentError(ModelError):
    """A discrete latent site is not marked for enumeration."""


class DuplicateSiteError(ModelError):
    """Two statements of the model use one site name."""


class KeywordError(BayestieError, TypeError):
    """A keyword that the model lacks, or that collides with one of ours."""


class NameLookupError(BayestieError, LookupError):
    """A name (engine, site, variable, swept value) that matches nothing."""


class DeviceError(BayestieError, RuntimeError):
    """A device that was asked for and is not there."""


class InferenceError(BayestieError, RuntimeError):
    """An engine could not produce draws at all."""


class OutputError(BayestieError, OSError):
    """A path that cannot be written."""


class ResultsFileError(BayestieError, OSError):
    """A file that is not a bayestie result, or is damaged."""


class OptionError(BayestieError, ValueError):
    """An option of fit, sweep or report outside its range."""


class CoverageError(BayestieError, ValueError):
    """The strengths swept do not reach where the posterior of sigma lies."""
