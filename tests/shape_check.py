"""The type checker that the jaxtyping import hook applies to bayestie under pytest."""

from collections.abc import Callable
from typing import get_args

import beartype
import jaxtyping


def _mentions_shape(annotation: object) -> bool:
    if isinstance(annotation, str):  # a postponed annotation
        return "Tensor," in annotation
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(_mentions_shape(part) for part in get_args(annotation))


def check[F: Callable](function: F) -> F:
    """Checks calls of functions that state shapes; leaves all others to pyright.

    Public functions answer bad input with a named error, which a check of their annotations would pre-empt.
    """
    if any(map(_mentions_shape, getattr(function, "__annotations__", {}).values())):
        return beartype.beartype(function)
    return function
