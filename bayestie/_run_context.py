"""What a model runs under: dtype, device and random state, restored afterwards; its arguments as tensors."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from bayestie._errors import DeviceError


@contextlib.contextmanager
def model_defaults(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Run a model under ``dtype`` and ``device`` defaults, and restore what was there."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device) if device.type != "cpu" else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's random numbers from ``seed`` on, and afterwards the caller's state as it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would seed every accelerator of the process, borrowed or not.
        torch.default_generator.manual_seed(seed)
        for one in devices:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for (None is the CPU), or a named error if it is not there.

    Raises:
        DeviceError: the device is unknown, or CUDA was asked for and is absent.
    """
    try:
        resolved = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise DeviceError(
            "device",
            found=repr(device),
            expected="'cpu', 'cuda' or 'cuda:0'",
            fix="Name a device torch knows.",
        ) from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "device",
            found="'cuda' asked for, and torch sees no CUDA device",
            expected="an NVIDIA GPU with a working driver and a CUDA build of torch",
            fix="Use device='cpu', or check torch.cuda.is_available() on this machine.",
        )
    return resolved


def to_tensors(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Arrays to tensors, floats to ``dtype``, everything to ``device``; other leaves stay as they are."""

    def leaf(x: Any) -> Any:
        if isinstance(x, np.ndarray | np.generic) and x.dtype.kind in "biuf":
            # A copy, as torch takes neither negative strides nor read-only memory; 0-d arrays stay 0-d.
            x = torch.as_tensor(np.array(x, order="C"))
        if isinstance(x, Tensor):
            x = x.detach().to(device)
            return x.to(dtype) if x.is_floating_point() else x
        return x

    return tree_map(leaf, value)
