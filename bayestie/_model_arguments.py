"""The arguments of a model: their names, and the keywords that cannot be served."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bayestie._errors import KeywordError

RESERVED = (
    "over",
    "engine",
    "seed",
    "num_chains",
    "num_draws",
    "target_ess",
    "device",
    "dims",
    "coords",
    "keep",
    "guide",
    "schedule",
    "monitor",
    "progress",
    "out",
    "executor",
)


def argument_names(model: Callable[..., Any], args: Sequence[Any]) -> list[str]:
    try:
        parameters = list(inspect.signature(model).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return (names + [f"arg_{i}" for i in range(len(names), len(args))])[: len(args)]


def check_keywords(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], swept: Mapping[str, Any]
) -> None:
    """Refuse swept keywords that the model lacks, and model keywords that collide with ours.

    Raises:
        KeywordError: naming the keyword and what the model takes.
    """
    try:
        parameters = inspect.signature(model).parameters
    except (TypeError, ValueError):
        return
    taken = [name for name in parameters if name in RESERVED]
    if taken:
        raise KeywordError(
            f"keyword '{taken[0]}' of the model",
            found=f"a model argument named like an option of fit and sweep ({', '.join(RESERVED)})",
            expected="another name",
            fix=f"Rename the model's '{taken[0]}', or wrap the model in a function that renames it.",
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    names = [n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY)]
    for name in [*swept, *kwargs]:
        if name not in names:
            raise KeywordError(
                f"keyword '{name}'",
                found=f"no such argument of model '{getattr(model, '__name__', type(model).__name__)}'",
                expected=f"one of {names}",
                fix="Name a keyword of the model, or add it to the model's signature.",
            )
    absent = [
        n
        for n, p in list(parameters.items())
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    absent = [n for n in absent if n not in argument_names(model, args) and n not in (*swept, *kwargs)]
    if absent:
        own = getattr(model, "__name__", type(model).__name__)
        raise KeywordError(
            f"argument '{absent[0]}'",
            found="no value",
            expected=f"a value for each argument of model '{own}'",
            fix=f"Pass {absent[0]}=..., or sweep it with over=.",
        )
    positional = argument_names(model, args)
    for name in swept:
        if name in positional:
            raise KeywordError(
                f"keyword '{name}'",
                found="a swept keyword that is also passed as a positional argument",
                expected="swept values in over= alone",
                fix=f"Drop the positional '{name}', or make it keyword-only in the model (after *).",
            )
