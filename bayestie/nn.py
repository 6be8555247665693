"""Ties for the parameters of torch modules: layers stay plain PyTorch, their parameters become tied sites.

`tied_modules` ties K copies of one module (cells over time, blocks over depth, branches), `tied_parameters`
named parameters of one module (an encoder and its transpose, an embedding pair), `soft_conv2d` the kernels
of a convolution over places. Each states Pyro sites and gives back a callable, inside a Pyro model.

Make the modules outside the model, and pass them as arguments where their sizes depend on the data: PyTorch's
initial values are random numbers, which lanes may not draw.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from bayestie._audit import audit_optimizer
from bayestie._cells import batchable_cells
from bayestie._errors import ModelError, NameLookupError, ShapeError
from bayestie._tie_arguments import Base, Form, Strength
from bayestie._tied_normal import tied
from bayestie._ties import Tie
from bayestie._toeplitz import convolution_matrix, nearest_toeplitz

__all__ = [
    "Copies",
    "audit_optimizer",
    "bind",
    "convolution_matrix",
    "fan_in",
    "free_parameters",
    "locally_connected2d",
    "nearest_toeplitz",
    "soft_conv2d",
    "tied_modules",
    "tied_parameters",
]

# One base for every parameter, one by name, or a rule from name and shape.
Bases = Base | Mapping[str, Base] | Callable[[str, torch.Size], Base]


def fan_in(scale: float = 1.0) -> Callable[[str, torch.Size], Base]:
    """Base for network parameters: Normal(0, scale / sqrt(fan in)), and Normal(0, scale) for vectors.

    Args:
        scale: sd of a layer's output per unit of its inputs' root mean square.

    Example:
        >>> fan_in()("weight", torch.Size([8, 4, 5, 5])).scale.item()
        0.1...
    """

    def base(name: str, shape: torch.Size) -> Base:
        # Made in the working precision: a float32 sd would cost seven digits.
        width = torch.tensor(
            float(shape[1:].numel()) if len(shape) > 1 else 1.0, dtype=torch.get_default_dtype()
        )
        return dist.Normal(torch.zeros_like(width), scale * width.rsqrt())

    return base


@dataclass(frozen=True)
class Copies:
    """K copies of one module whose parameters are tied.

    Args:
        module: the architecture; its own parameters are not touched.
        parameters: by name, (K, *shape of the parameter).
        buffers: by name, (K, *shape of the buffer).
    """

    module: nn.Module
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.parameters.values())))

    def __getitem__(self, copy: int) -> Callable[..., Any]:
        """The copy of that number, as a function of the module's inputs."""
        if not -len(self) <= copy < len(self):
            raise IndexError(f"copy {copy} of {len(self)}")  # ends iteration
        state = {name: x[copy] for name, x in (*self.parameters.items(), *self.buffers.items())}
        return lambda *args, **kwargs: _call(self.module, state, args, kwargs)

    def named(self, prefix: str) -> dict[str, Tensor]:
        """Parameters `{prefix}.{copy}.{name}`, as a module that lists the copies names them, for `bind`.

        An empty prefix is that of a list itself, such as nn.Sequential.
        """
        lead = f"{prefix}." if prefix else ""
        return {f"{lead}{k}.{one}": x[k] for one, x in self.parameters.items() for k in range(len(self))}

    def map(self, *inputs: Tensor) -> Any:
        """Every copy on its own inputs: each input leads with a dim of size K, and so does the output."""

        def one(parameters: Any, buffers: Any, *args: Tensor) -> Any:
            return _call(self.module, {**parameters, **buffers}, args, {})

        return torch.vmap(one)(dict(self.parameters), dict(self.buffers), *inputs)

    def iterate(self, x: Any) -> Any:
        """x through copy 0, its output through copy 1, and so on: blocks over depth."""
        for copy in range(len(self)):
            x = self[copy](x)
        return x

    def scan(self, inputs: Tensor, state: Any) -> list[Any]:
        """States of a recurrent cell: state_t = copy_t(inputs[t], state_{t-1}), one per time step."""
        if len(inputs) != len(self):
            raise ShapeError(
                "inputs of Copies.scan",
                found=f"{len(inputs)} time steps",
                expected=f"{len(self)}, one per copy",
                fix="Tie as many copies of the cell as there are steps.",
            )
        states = []
        for copy in range(len(self)):
            state = self[copy](inputs[copy], state)
            states.append(state)
        return states


def tied_modules(
    name: str,
    modules: nn.Module | Sequence[nn.Module],
    tie: Tie,
    sigma: Strength,
    base: Bases,
    *,
    form: Form = "level",
    names: Sequence[str] | None = None,
) -> Copies:
    """Tie K copies of a module, parameter by parameter.

    Each parameter p of shape E becomes a site `{name}.p` of shape (K, *E), as `tied` states it. At sigma = 0
    every copy is the same module; at sigma = inf (forms `copies` and `matched`) each is a module of its own.

    Args:
        name: prefix of the sites.
        modules: one module, whose architecture all copies have; or the K copies, whose buffers and untied
            parameters are then used.
        tie: which copies are tied, as many as `modules` where those are listed.
        sigma: strength >= 0, in units of the parameters.
        base: prior of the level of each parameter: a Normal or any other base of `tied`, a dict from
            parameter names to bases, or a function of name and shape such as `fan_in()`.
        form: as in `tied`.
        names: the parameters to tie; all where left out. Others keep the modules' values.

    Returns:
        The copies: `copies[k](x)`, `copies.map(xs)`, `copies.iterate(x)` or `copies.scan(xs, state)`.

    Raises:
        ShapeError: not as many modules as copies.
        ModelError: modules of several architectures, or nothing to tie.
        NameLookupError: a name that no parameter has.

    Example:
        >>> import pyro.distributions as dist
        >>> blocks = tied_modules("block", nn.Linear(2, 2), Tie.chain(3), 0.0, dist.Normal(0.0, 1.0))
        >>> blocks.parameters["weight"].shape
        torch.Size([3, 2, 2])
    """
    first, parameters, buffers = _stacked(name, modules, tie.num_copies)
    chosen = _chosen(first, names, f"names of tied modules '{name}'")
    if not chosen:
        raise ModelError(
            f"tied modules '{name}'",
            found=f"a {type(first).__name__} without parameters",
            expected="at least one parameter to tie",
            fix="Tie a module that has some.",
        )
    sites = {
        one: tied(
            f"{name}.{one}",
            tie,
            sigma,
            _base_of(base, one, parameters[one].shape[1:]),
            form=form,
            event_shape=parameters[one].shape[1:],
        )
        for one in chosen
    }
    like = sites[chosen[0]]
    rest = {one: _like(x, like) for one, x in parameters.items() if one not in sites}
    return Copies(first, {**sites, **rest}, {one: _like(x, like) for one, x in buffers.items()})


def tied_parameters(
    name: str,
    module: nn.Module,
    names: Sequence[str] | Mapping[str, Callable[[Tensor], Tensor] | None],
    tie: Tie,
    sigma: Strength,
    base: Base,
    *,
    form: Form = "level",
) -> dict[str, Tensor]:
    """Tie named parameters of one module to one another: one site `name` of shape (K, *E).

    Args:
        name: the site.
        module: where the parameters live; their values are not used.
        names: the K parameters in the order of the copies, all of shape E; or a dict from each to the view
            it has of its copy, None for the copy itself: `{"encoder.weight": None, "decoder.weight":
            torch.t}` ties a transposed pair.
        tie: which are tied, over K copies.
        sigma: strength >= 0.
        base: prior of the level, as in `tied`.
        form: as in `tied`.

    Returns:
        The parameters by name, to be joined with others and given to `bind`.

    Raises:
        NameLookupError: a name that no parameter has.
        ShapeError: parameters of several shapes, or not one per copy.
    """
    views = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names)
    shapes = {one: x.shape for one, x in module.named_parameters(remove_duplicate=False)}
    _chosen(module, list(views), f"names of tied parameters '{name}'")
    if len(views) != tie.num_copies:
        raise ShapeError(
            f"tied parameters '{name}'",
            found=f"{len(views)} names",
            expected=f"{tie.num_copies}, one per copy of the tie",
            fix="Name each parameter once, or tie as many copies.",
        )
    plain = [one for one, view in views.items() if view is None]
    if not plain:
        raise ShapeError(
            f"tied parameters '{name}'",
            found="a view for every parameter",
            expected="at least one that is the copy itself, which gives the copies their shape",
            fix="Write None for it.",
        )
    event = shapes[plain[0]]
    for one, view in views.items():
        seen = event if view is None else view(torch.empty(event)).shape
        if seen != shapes[one]:
            raise ShapeError(
                f"tied parameters '{name}'",
                found=f"'{one}' of shape {tuple(shapes[one])}",
                expected=f"{tuple(seen)}, what it sees of a copy of shape {tuple(event)}",
                fix="Give it a view of its copy, such as torch.t, or tie parameters of one shape.",
            )
    copies = tied(name, tie, sigma, base, form=form, event_shape=event)
    return {one: x if view is None else view(x) for (one, view), x in zip(views.items(), copies, strict=True)}


def free_parameters(
    name: str, module: nn.Module, base: Bases, *, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Parameters of a module as independent sites `{name}.p` ~ base: what a net has beside its ties.

    Args:
        name: prefix of the sites.
        module: where the parameters live; their values are not used.
        base: as in `tied_modules`, distributions only.
        names: which; all where left out.

    Returns:
        The parameters by name.

    Raises:
        NameLookupError: a name that no parameter has.
        ModelError: a base that is a number.
    """
    shapes = {one: x.shape for one, x in module.named_parameters()}
    found = {}
    for one in _chosen(module, names, f"names of free parameters '{name}'"):
        law = _base_of(base, one, shapes[one])
        if not isinstance(law, TorchDistributionMixin):
            raise ModelError(
                f"base of free parameter '{name}.{one}'",
                found=f"a {type(law).__name__}",
                expected="a distribution",
                fix="A known value needs no site: leave the parameter out.",
            )
        batch = shapes[one][: len(shapes[one]) - law.event_dim]
        found[one] = pyro.sample(f"{name}.{one}", law.expand(batch).to_event(len(batch)))
    return found


def bind(module: nn.Module, *parameters: Mapping[str, Tensor]) -> Callable[..., Any]:
    """The module as a function of its inputs, with some of its parameters replaced.

    Args:
        module: any module; those of its parameters and buffers that are not given keep their values, cast
            to the dtype of those that are.
        *parameters: values by name, such as `tied_parameters` and `free_parameters` return.

    Raises:
        NameLookupError: a name that the module has no parameter of.
    """
    given = {one: x for part in parameters for one, x in part.items()}
    _chosen(module, list(given), f"parameters of {type(module).__name__}")
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    like = next(iter(given.values()), None)
    rest = {one: x.detach() if like is None else _like(x, like) for one, x in own.items() if one not in given}
    return lambda *args, **kwargs: _call(module, {**rest, **given}, args, kwargs)


def soft_conv2d(
    name: str,
    conv: nn.Conv2d,
    size: tuple[int, int],
    sigma: Strength,
    base: Bases,
    *,
    form: Form = "level",
    tie: Tie | None = None,
) -> Callable[[Tensor], Tensor]:
    """A convolution with a kernel per place, kernels of neighbouring places tied.

    At sigma = 0 it is `conv` with one kernel, at sigma = inf a locally connected layer.

    Args:
        name: prefix of the sites `{name}.weight`, (places, out, in, kh, kw), and `{name}.bias`.
        conv: the layer; one group and padding by zeros.
        size: height and width of its input.
        sigma: strength >= 0, in units of the weights.
        base: as in `tied_modules`.
        form: as in `tied`.
        tie: which places are tied; neighbours on the grid of places where left out.

    Returns:
        A function from (batch, in, height, width) to (batch, out, rows, columns).

    Raises:
        ModelError: a convolution with groups, or padding that is not by a number of zeros.
        ShapeError: the input is smaller than the kernel.
    """
    if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ModelError(
            f"soft convolution '{name}'",
            found=f"groups={conv.groups}, padding={conv.padding!r}, padding_mode={conv.padding_mode!r}",
            expected="groups=1 and a number of zeros as padding",
            fix="Pad the input yourself, and split groups into convolutions of their own.",
        )
    rows, columns = (
        (n + 2 * pad - step * (k - 1) - 1) // stride + 1
        for n, pad, step, k, stride in zip(
            size, conv.padding, conv.dilation, conv.kernel_size, conv.stride, strict=True
        )
    )
    if min(rows, columns) < 1:
        raise ShapeError(
            f"soft convolution '{name}'",
            found=f"an input of {size[0]} x {size[1]}",
            expected=f"at least the size of the kernel, {conv.kernel_size}",
            fix="Pad the input, or take a smaller kernel.",
        )
    tie = Tie.grid(rows, columns) if tie is None else tie
    if tie.num_copies != rows * columns:
        raise ShapeError(
            f"tie of soft convolution '{name}'",
            found=f"{tie.num_copies} copies",
            expected=f"{rows} x {columns} = {rows * columns}, one per place",
            fix="Number the places row-major.",
        )
    kernels = tied_modules(name, conv, tie, sigma, base, form=form).parameters
    geometry: Any = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}

    def apply(x: Tensor) -> Tensor:
        out = locally_connected2d(x, kernels["weight"], kernels.get("bias"), **geometry)
        return out.unflatten(-1, (rows, columns))

    return apply


def locally_connected2d(
    x: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "places out channels kh kw"],
    bias: Float[Tensor, "places out"] | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Float[Tensor, "batch out places"]:
    """A convolution with a kernel per place: out_p = weight_p patch_p + bias_p, places row-major."""
    patches = nn.functional.unfold(
        x, tuple(weight.shape[-2:]), dilation=dilation, padding=padding, stride=stride
    )
    out = torch.einsum("bcp,poc->bop", patches, weight.flatten(2))
    return out if bias is None else out + bias.mT


def _stacked(
    name: str, modules: nn.Module | Sequence[nn.Module], num_copies: int
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    if isinstance(modules, nn.Module):
        parameters = {one: x.detach().expand(num_copies, *x.shape) for one, x in modules.named_parameters()}
        buffers = {one: x.detach().expand(num_copies, *x.shape) for one, x in modules.named_buffers()}
        return modules, parameters, buffers
    if len(modules) != num_copies:
        raise ShapeError(
            f"tied modules '{name}'",
            found=f"{len(modules)} modules",
            expected=f"{num_copies}, one per copy of the tie",
            fix="Tie as many copies as there are modules, or give one module as the architecture of all.",
        )
    shapes = [{one: x.shape for one, x in module.named_parameters()} for module in modules]
    if any(type(module) is not type(modules[0]) for module in modules) or any(s != shapes[0] for s in shapes):
        raise ModelError(
            f"tied modules '{name}'",
            found=f"several architectures among {sorted({type(module).__name__ for module in modules})}",
            expected="copies of one: same class, parameters of the same names and shapes",
            fix="Tie what they share by tied_parameters.",
        )
    parameters, buffers = stack_module_state(list(modules))
    return modules[0], {one: x.detach() for one, x in parameters.items()}, buffers


def _chosen(module: nn.Module, names: Sequence[str] | None, what: str) -> list[str]:
    own = [one for one, _ in module.named_parameters(remove_duplicate=names is None)]
    for one in names or ():
        if one not in own:
            near = difflib.get_close_matches(one, own, n=3, cutoff=0.0)
            raise NameLookupError(
                what,
                found=repr(one),
                expected=f"a parameter of the module, such as {', '.join(map(repr, near))}",
                fix="Take names from module.named_parameters().",
            )
    return own if names is None else list(names)


def _base_of(base: Bases, name: str, shape: torch.Size) -> Base:
    if isinstance(base, Mapping):
        if name not in base:
            raise NameLookupError(
                f"base of parameter '{name}'",
                found=f"bases for {sorted(base)}",
                expected="one for every parameter",
                fix="Add it to the dict.",
            )
        return base[name]
    # Pyro's distributions are callable too: calling one draws.
    if callable(base) and not isinstance(base, TorchDistributionMixin):
        return base(name, shape)
    return base  # pyright: ignore[reportReturnType]


def _like(x: Tensor, like: Tensor) -> Tensor:
    x = x.detach().to(like.device)
    return x.to(like.dtype) if x.is_floating_point() else x


def _call(module: nn.Module, state: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
    # What is tied is said by names: PyTorch's own ties would give one name the value of another.
    with batchable_cells():
        return functional_call(module, dict(state), args, kwargs, tie_weights=False)
