"""Shared by all tests: shapes checked at run time, seeds, and a canonical place for slow warnings."""

from pathlib import Path

import jaxtyping
import pytest

# Before anything imports bayestie: functions whose annotations hold jaxtyping shapes are checked by beartype.
# The kernels have none, and numba compiles only what it is given undecorated.
_ROOT = Path(__file__).parents[1]
_MODULES = [
    ".".join(path.relative_to(_ROOT).with_suffix("").parts)
    for path in (_ROOT / "bayestie").rglob("*.py")
    if not path.name.endswith(("_kernels.py", "__init__.py"))
]
jaxtyping.install_import_hook(_MODULES, "shape_check.check")


@pytest.fixture(autouse=True)
def _clean_pyro():
    """Pyro's parameter store and torch's default dtype are global: each test starts from scratch."""
    import pyro
    import torch

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    dtype = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == dtype, "a call changed torch's default dtype and did not restore it"
