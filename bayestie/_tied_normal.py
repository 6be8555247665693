"""tied, TiedNormal and TieReparam: the prior of a tie in Pyro."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution, TorchDistributionMixin
from pyro.infer.reparam.reparam import Reparam, ReparamMessage, ReparamResult
from pyro.poutine.runtime import effectful
from torch import Tensor

from bayestie._errors import ModelError, StrengthError
from bayestie._tie_arguments import Base, Form, Strength, align, common_dtype, number_or_tensor
from bayestie._tie_densities import log_prob
from bayestie._tie_priors import TiePrior
from bayestie._ties import Tie

_NO_DIMS = torch.Size()


def tied(
    name: str,
    tie: Tie,
    sigma: Strength,
    base: Base,
    *,
    form: Form = "level",
    event_shape: Sequence[int] = (),
    event_scale_tril: Tensor | None = None,
) -> Tensor:
    """State in a Pyro model that K parameters are tied.

    theta = level + sigma B z, z standard normal, B B^T = L^+ of the tie (B = I for exchangeable copies).

    Sites: ``{name}`` (deterministic), ``{name}_level`` (absent where the level is known) and ``{name}_z``
        (absent where
    the tie has no edge). In the form `matched` on exchangeable copies ``{name}_level`` is deterministic
    too, of ``{name}_level_z``: its variance vanishes at sigma = inf.

    Args:
        name: name of the site.
        tie: which copies are tied.
        sigma: strength >= 0, in units of theta: scale of an edge's factor exp(-w Delta^2 / (2 sigma^2)). 0
            is hard sharing, exact. A number; a tensor that broadcasts over E, with batch dims (plates,
            particles) to the left; or sampled in the model. inf (no sharing) in the forms `copies` and
            `matched`.
        base: prior of the level, a Pyro distribution whose shape broadcasts to E, or to (c, *E) for several
            components; a number or tensor is a known level. `copies` and `matched` need a Normal.
        form: ``"level"``: level ~ base, deviations of variance sigma^2 / l_j. ``"copies"``: each copy ~
            base, times the edge factors. ``"matched"``: each copy has the base's variance on average at
            every strength.
        event_shape: E, shape of one copy.
        event_scale_tril: (..., n, n), n the last event dim: lower-triangular T that correlates the event
            elements of a deviation, which becomes sigma * (T @ deviation). Form `level` only.

    Returns:
        theta, (*batch, K, *E); for a grid, copies row-major.

    Raises:
        StrengthError: sigma negative, NaN, or inf with form `level`.
        ShapeError: sigma or event_scale_tril does not fit E.
        BaseError: the base does not fit the form or E.
        FormError: the tie does not have the form.

    A Pyro effect handler with a method ``_pyro_tied`` may pick other coordinates by replacing
    ``msg["fn"]``, which is called with the message's args (name, tie, sigma, base, form, event_shape,
    event_scale_tril).

    Example:
        >>> import pyro.distributions as dist
        >>> tied("theta", Tie.chain(5), 0.0, dist.Normal(0.0, 1.0)).unique().numel()
        1
    """
    return _tied(name, tie, sigma, base, form, tuple(event_shape), event_scale_tril)


@effectful(type="tied")
def _tied(
    name: str,
    tie: Tie,
    sigma: Strength,
    base: Base,
    form: Form,
    event_shape: tuple[int, ...],
    event_scale_tril: Tensor | None,
) -> Tensor:
    sigma = number_or_tensor(sigma, f"sigma of tied site '{name}'", StrengthError)

    def make_prior(batch_shape: torch.Size | None) -> TiePrior:
        args = align(
            tie, sigma, base, form, event_shape, event_scale_tril, site=name, batch_shape=batch_shape
        )
        return TiePrior(args)

    dtype, device = common_dtype(sigma, base, event_scale_tril)
    noise = _standard_normal((tie.rank, *event_shape), dtype, device)
    theta, level, z, prior = _state(name, noise, make_prior)
    about = {
        "tie": tie,
        "form": form,
        "sigma": sigma,
        "level": level,
        "z": z,
        "event_shape": torch.Size(event_shape),
        "event_scale_tril": event_scale_tril,
        "base": base,
        "prior": prior,
    }
    return _record(name, theta, 1 + len(event_shape), {"bayestie": about})


class TiedNormal(TorchDistribution):
    """Distribution of tied copies, event shape (K, *E).

    log p(theta) = log p_level(mean) - 1/2 sum_j (u_j^T theta)^2 / v_j - 1/2 sum_j log(2 pi v_j) - 1/2 sum_c
    log K_c per event element, with v_j = sigma^2 / l_j in the form `level` and 1 / (l_j / sigma^2 + 1 /
    s^2) otherwise; the hub of exchangeable copies is integrated out.

    Args:
        tie: which copies are tied.
        sigma: strength, as in `tied`; log_prob needs sigma > 0, rsample does not.
        base: as in `tied`. With exchangeable copies log_prob needs a Normal, a MultivariateNormal or a
            known level.
        form: as in `tied`.
        event_shape: E.
        event_scale_tril: as in `tied`.
        validate_args: check values; Pyro's switch where None.

    Raises:
        StrengthError, ShapeError, BaseError, FormError: as `tied`.

    Example:
        >>> import pyro.distributions as dist
        >>> TiedNormal(Tie.chain(3), 1.0, dist.Normal(0.0, 1.0)).event_shape
        torch.Size([3])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"sigma": constraints.nonnegative}

    def __init__(
        self,
        tie: Tie,
        sigma: Strength,
        base: Base,
        form: Form = "level",
        event_shape: Sequence[int] = (),
        event_scale_tril: Tensor | None = None,
        validate_args: bool | None = None,
    ):
        args = align(tie, sigma, base, form, event_shape, event_scale_tril, site="TiedNormal")
        self.prior = TiePrior(args)
        event = torch.Size([tie.num_copies, *args.event_shape])
        super().__init__(self.prior.batch_shape, event, validate_args=validate_args)

    @property
    def tie(self) -> Tie:
        return self.prior.tie

    @property
    def form(self) -> Form:
        return self.prior.args.form

    @property
    def sigma(self) -> Tensor:
        return self.prior.args.sigma

    @property
    def has_rsample(self) -> bool:
        level = self.prior.level_distribution
        return level is None or level.has_rsample

    @constraints.dependent_property(is_discrete=False)
    def support(self):
        return constraints.independent(constraints.real, self.event_dim)

    def expand(self, batch_shape, _instance=None):
        new: Any = self._get_checked_instance(TiedNormal, _instance)
        new.prior = self.prior
        TorchDistribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _draw(self, sample_shape, reparametrised: bool) -> Tensor:
        args, law = self.prior.args, self.prior.level_distribution
        shape = torch.Size(sample_shape) + self.batch_shape
        if law is None:
            level = self.prior.known_level
        else:
            law = law.expand(self.batch_shape)
            level = law.rsample(sample_shape) if reparametrised else law.sample(sample_shape)
        z = None
        if self.tie.rank:
            z = torch.randn(*shape, self.tie.rank, *args.event_shape, dtype=args.dtype, device=args.device)
        assert level is not None
        return self.prior.combine(level, z).expand(shape + self.event_shape)

    def rsample(self, sample_shape=_NO_DIMS):
        return self._draw(sample_shape, True)

    def sample(self, sample_shape=_NO_DIMS):
        with torch.no_grad():
            return self._draw(sample_shape, self.has_rsample)

    def log_prob(self, value):
        if self._validate_args:
            self._validate_sample(value)
            if not bool((self.sigma > 0).all()):
                raise StrengthError(
                    "sigma of TiedNormal",
                    found="0",
                    expected="more than 0, as theta has no density on R^K at 0",
                    fix="State the site with tied, or reparametrise it with TieReparam.",
                )
        batch = torch.broadcast_shapes(self.batch_shape, value.shape[: value.dim() - self.event_dim])
        return log_prob(self.prior, value).expand(batch)

    @property
    def mean(self):
        law = self.prior.level_distribution
        level = self.prior.known_level if law is None else law.mean
        assert level is not None
        return self.prior.combine(level, None).expand(self.batch_shape + self.event_shape)

    @property
    def variance(self):
        return self.prior.variance().expand(self.batch_shape + self.event_shape)


class TieReparam(Reparam):
    """Reparametrise a `TiedNormal` site to its level and standard normal coefficients.

    theta = level + U diag(sqrt v) z: the same theta with the same density after the Jacobian, and, unlike
    the density of theta, valid at sigma = 0. The new sites are those of `tied`: ``{name}_level`` and
    ``{name}_z``.

    Raises:
        ModelError: the site is not a `TiedNormal`, or is observed.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     return pyro.sample("theta", TiedNormal(Tie.chain(3), 0.0, dist.Normal(0.0, 1.0)))
        >>> pyro.poutine.reparam(model, {"theta": TieReparam()})().unique().numel()
        1
    """

    def apply(self, msg: ReparamMessage) -> ReparamResult:
        name, value = msg["name"], msg["value"]
        fn, event_dim = self._unwrap(msg["fn"])
        if not isinstance(fn, TiedNormal):
            raise ModelError(
                f"TieReparam at site '{name}'",
                found=f"a {type(fn).__name__}",
                expected="a TiedNormal",
                fix="Leave it out.",
            )
        if msg["is_observed"]:
            raise ModelError(
                f"TieReparam at site '{name}'",
                found="an observed value",
                expected="a latent site",
                fix="Leave it out: TiedNormal scores an observed theta itself.",
            )
        prior, args = fn.prior, fn.prior.args
        noise = _standard_normal((fn.tie.rank, *args.event_shape), args.dtype, args.device)
        num_independent = event_dim - fn.event_dim
        theta, *_ = _state(name, noise, lambda _: prior, fn.batch_shape, num_independent, value)
        value = theta.expand(fn.batch_shape + fn.event_shape) if value is None else value
        return {"fn": dist.Delta(value, event_dim=event_dim).mask(False), "value": value, "is_observed": True}


def _standard_normal(shape: Sequence[int], dtype: torch.dtype, device: torch.device):
    zero = torch.zeros((), dtype=dtype, device=device).expand(torch.Size(shape))
    one = torch.ones((), dtype=dtype, device=device).expand(torch.Size(shape))
    return dist.Normal(zero, one, validate_args=False).to_event(len(shape))


def _state(
    name: str,
    noise: TorchDistributionMixin,
    make_prior: Callable[[torch.Size | None], TiePrior],
    batch_shape: torch.Size = _NO_DIMS,
    num_independent: int = 0,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, TiePrior]:
    """Sample z and the level: what `tied` and `TieReparam` share.

    z comes first: its shape shows the batch dims that plates and particles add, and by them those of sigma.

    Args:
        noise: law of z, event shape (r, *E).
        batch_shape: batch dims of the site's own distribution; the last `num_independent` are event dims.
        initial: a value of theta to start from (from an initialisation strategy).
    """

    def sample(site: str, law: Any, value: Tensor | None, infer: Any) -> Tensor:
        law = law.expand(batch_shape).to_event(num_independent) if batch_shape else law
        if value is not None:
            value, infer = value.expand(law.shape()), {**infer, "is_observed": False}
        return pyro.sample(site, law, obs=value, infer=infer)

    first_level, first_z = (None, None) if initial is None else make_prior(None).split(initial)
    z, plates = None, None
    if noise.event_shape[0]:
        z = sample(f"{name}_z", noise, first_z, {"bayestie_z": name})
        plates = z.shape[: z.dim() - noise.event_dim]
    prior = make_prior(plates)
    law, mark = prior.level_distribution, {"bayestie_level": name}
    if law is None:
        assert prior.known_level is not None
        level = prior.known_level
    elif prior.level_may_be_fixed:
        loc, scale, args = prior.base_loc, prior.level_scale(), prior.args
        unit = _standard_normal(args.level_shape, args.dtype, args.device)
        first_unit = None if first_level is None else torch.where(scale > 0, (first_level - loc) / scale, 0.0)
        level = loc + scale * sample(f"{name}_level_z", unit, first_unit, {"bayestie_level_z": name})
        level = _record(f"{name}_level", level, len(args.level_shape) + num_independent, mark)
    else:
        level = sample(f"{name}_level", law, first_level, mark)
    return prior.combine(level, z), level, z, prior


def _record(name: str, value: Tensor, event_dim: int, infer: dict) -> Tensor:
    """pyro.deterministic, with what the site is in its infer dict."""
    marked = dist.Delta(value, event_dim=event_dim, validate_args=False).mask(False)
    about: Any = {"_deterministic": True, **infer}
    return pyro.sample(name, marked, obs=value, infer=about)
