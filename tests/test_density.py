"""The batched density: the affine route against the lane program, curvature against differences."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from zoo import COUNTS, GROUP, ZOO, X, Y, numbers, tied_copies, tied_level

from bayestie import _affine
from bayestie._affine import AffineDensity
from bayestie._build_density import build_density
from bayestie._density import Density, ProgramDensity
from bayestie._linear_map import Gram, LinearMap
from bayestie._program import LaneProgram

POINT = torch.tensor([0])


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * (1.0 + float(expected.abs().max()))


def positions(density: Density, points: int = 1, batch: int = 3) -> torch.Tensor:
    return 0.7 * numbers(points, batch, density.num_latent, seed=9)


@pytest.mark.parametrize("name", ZOO)
def test_routes_agree(name):
    case = ZOO[name]
    program = LaneProgram(case.model, case.args, case.kwargs)
    density, general = build_density(program), ProgramDensity(program)
    assert isinstance(density, AffineDensity) == case.affine
    if not case.affine:
        return
    at = positions(density)
    value, grad = density.value_and_grad(POINT, at)
    expected, expected_grad = general.value_and_grad(POINT, at)
    close(value, expected, 1e-12)
    close(density.value(POINT, at), expected, 1e-12)
    close(grad, expected_grad, 1e-11)
    close(density.hessian(POINT, at[:, 0]), general.hessian(POINT, at[:, 0]), 1e-8)


@pytest.mark.parametrize("name", ZOO)
def test_curvature_is_the_derivative_of_the_gradient(name):
    case = ZOO[name]
    density = build_density(LaneProgram(case.model, case.args, case.kwargs))
    at = positions(density, batch=1)[:, 0]
    step = 1e-5
    eye = torch.eye(density.num_latent, dtype=at.dtype)
    shifted = torch.cat([at + step * eye, at - step * eye]).unsqueeze(0)
    _, grads = density.value_and_grad(POINT, shifted)
    up, down = grads[0].chunk(2)
    close(density.hessian(POINT, at)[0], (up - down) / (2 * step), 1e-7)


STRENGTHS = [0.0, 0.3, 3.0]


@pytest.mark.parametrize(("model", "y"), [(tied_level, Y), (tied_copies, COUNTS)])
def test_every_point_has_its_own_strength(model, y):
    swept = {"sigma": torch.tensor(STRENGTHS, dtype=torch.float64)}
    density = build_density(LaneProgram(model, (y, GROUP), {}, swept))
    points = torch.tensor([2, 0])
    at = positions(density, 2)
    value, grad = density.value_and_grad(points, at)
    for row, point in enumerate(points.tolist()):
        alone = ProgramDensity(LaneProgram(model, (y, GROUP), {"sigma": STRENGTHS[point]}))
        expected, expected_grad = alone.value_and_grad(POINT, at[row : row + 1])
        close(value[row : row + 1], expected, 1e-12)
        close(grad[row : row + 1], expected_grad, 1e-11)
        close(
            density.hessian(points, at[:, 0])[row : row + 1], alone.hessian(POINT, at[row : row + 1, 0]), 1e-8
        )


def test_wide_batches_are_cut_and_put_together(monkeypatch):
    swept = {"sigma": torch.tensor(STRENGTHS, dtype=torch.float64)}
    program = LaneProgram(tied_copies, (COUNTS, GROUP), {}, swept)
    affine, general = build_density(program), ProgramDensity(program)
    assert isinstance(affine, AffineDensity)
    points = torch.arange(3)
    at = positions(affine, 3, batch=11)

    def everything():
        return (
            affine.value_and_grad(points, at),
            general.value_and_grad(points, at),
            (affine.value(points, at),),
        )

    whole = everything()
    monkeypatch.setattr(_affine, "_NARROWEST", 2)
    monkeypatch.setattr(affine, "elements", 4 * affine.matrix.shape[1])  # two points, two draws at a time
    monkeypatch.setattr(general, "max_lanes", 4)
    affine._selections.clear()
    assert len(list(affine._jobs(points, at))) == 6 + 3  # and one point, four draws
    for found, expected in zip(everything(), whole, strict=True):
        for cut, uncut in zip(found, expected, strict=True):
            close(cut, uncut, 1e-14)


def test_far_out_the_short_forms_overflow_and_the_density_does_not():
    def model(y, x):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=slope * x), obs=y)

    x = torch.tensor([1.0, 2.0, -1.0, -2.0], dtype=torch.float64)
    program = LaneProgram(model, ((x > 0).double(), x), {}, {})
    affine = build_density(program)
    assert isinstance(affine, AffineDensity)
    at = torch.tensor([[[-3.0], [800.0], [-800.0]]], dtype=torch.float64)
    with torch.no_grad():
        expected = -0.5 * at[..., 0].square() - 0.5 * math.log(2.0 * math.pi)
        expected += torch.nn.functional.logsigmoid(at * x.abs()).sum(-1)
    value, grad = affine.value_and_grad(torch.arange(1), at)
    close(value, expected, 1e-12)
    close(affine.value(torch.arange(1), at), expected, 1e-12)
    slope = (x.abs() * torch.sigmoid(-at * x.abs())).sum(-1, keepdim=True) - at
    close(grad, slope, 1e-12)


def test_threads_give_the_same_numbers():
    swept = {"sigma": torch.tensor(STRENGTHS, dtype=torch.float64)}
    program = LaneProgram(tied_copies, (COUNTS, GROUP), {}, swept)
    affine, points = build_density(program), torch.arange(3)
    assert isinstance(affine, AffineDensity)
    at, threads = positions(affine, 3, batch=11), torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            affine._selections.clear()
            found.append(affine.value_and_grad(points, at))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*found, strict=True):
        close(one, other, 1e-14)


@pytest.mark.parametrize("entries", [2, 40])
def test_gram_of_few_entries_a_row_is_the_dense_product(entries):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.zeros(3, 200, 40, dtype=torch.float64)
    columns = torch.stack([torch.randperm(40, generator=generator)[:entries] for _ in range(200)])
    values = torch.randn(3, 200, entries, dtype=torch.float64, generator=generator)
    matrix.scatter_(2, columns.expand(3, -1, -1), values)
    matrix[1, :, 5] = 0.0  # a column that moves nothing at one point
    gram = Gram(matrix)
    assert (gram.row is None) == (entries == 40)
    weight = torch.randn(2, 200, dtype=torch.float64, generator=generator)
    points = torch.tensor([2, 1])
    close(
        gram(points, weight), torch.einsum("pmi,pm,pmj->pij", matrix[points], weight, matrix[points]), 1e-12
    )


def test_sparse_designs_give_the_dense_numbers():
    rows, groups = 2000, 60
    label = torch.arange(rows) % groups
    y = (numbers(rows, seed=12) > 0).double()

    def model(y, label):
        with pyro.plate("group", groups):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=effect[label]), obs=y)

    program = LaneProgram(model, (y, label))
    affine, general = build_density(program), ProgramDensity(program)
    assert isinstance(affine, AffineDensity)
    assert LinearMap(affine.matrix, affine.offset).dense is None
    at = positions(affine)
    for found, expected in zip(
        affine.value_and_grad(POINT, at), general.value_and_grad(POINT, at), strict=True
    ):
        close(found, expected, 1e-12)


NATURAL = {
    "bernoulli": lambda eta, n: (dist.Bernoulli(logits=eta), (eta.detach() * 0 + n % 2)),
    "binomial": lambda eta, n: (dist.Binomial(total_count=7.0 + n, logits=eta), n + 1.0),
    "poisson": lambda eta, n: (dist.Poisson((eta + 0.3).exp()), n + 2.0),
    "normal": lambda eta, n: (dist.Normal(eta - 1.0, 0.5 + n), n.sqrt()),
}


@pytest.mark.parametrize("prior", [dist.Normal(0.3, 1.2), dist.StudentT(5.0, 0.3, 1.2)])
@pytest.mark.parametrize("name", NATURAL)
def test_natural_likelihoods_with_scale_mask_and_offset(name, prior):
    n = torch.arange(6, dtype=X.dtype)
    x = numbers(6, 3, seed=4)

    def model(n):
        beta = pyro.sample("beta", prior.expand([3]).to_event(1))
        fn, obs = NATURAL[name](x @ beta, n)
        with pyro.plate("row", 6), pyro.poutine.scale(scale=1.7), pyro.poutine.mask(mask=n != 3):
            pyro.sample("y", fn, obs=obs.detach())

    program = LaneProgram(model, (n,))
    affine, general = build_density(program), ProgramDensity(program)
    assert isinstance(affine, AffineDensity)
    joined = name == "normal" and isinstance(prior, dist.Normal)
    assert len(affine.families) == (0 if joined else 1)
    assert all(natural is not None for natural in affine.naturals)
    at = positions(affine, batch=4)
    found, expected = affine.value_and_grad(POINT, at), general.value_and_grad(POINT, at)
    close(found[0], expected[0], 1e-13)
    close(found[1], expected[1], 1e-12)
    close(affine.hessian(POINT, at[:, 0]), general.hessian(POINT, at[:, 0]), 1e-10)
    factor = numbers(1, 3, 3, seed=8)
    nodes = torch.tensor([-3.0, -0.2, 0.0, 4.0], dtype=at.dtype)
    close(
        affine.profile(POINT, at[:, 0], factor, nodes), general.profile(POINT, at[:, 0], factor, nodes), 1e-12
    )


@pytest.mark.parametrize("name", NATURAL)
def test_repeats_are_counted(name):
    """2,400 observations that are 6 x 4, some masked, one strength another scale: the density is the same."""
    number = torch.randint(24, (2_400,), generator=torch.Generator().manual_seed(3))
    n, rows = (number % 4).to(X.dtype), number // 4
    x = numbers(6, 3, seed=4)

    def model(n, rows, sigma):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3), sigma).to_event(1))
        pyro.sample("other", dist.Gamma(2.0, 2.0))  # keeps Normal likelihoods out of a quadratic
        fn, obs = NATURAL[name](x[rows] @ beta, n)
        with pyro.plate("row", len(n)), pyro.poutine.scale(scale=sigma), pyro.poutine.mask(mask=n != 3):
            pyro.sample("y", fn, obs=obs.detach())

    swept = {"sigma": torch.tensor([0.5, 2.0], dtype=torch.float64)}
    program = LaneProgram(model, (n, rows), {}, swept)
    affine, general, both = build_density(program), ProgramDensity(program), torch.tensor([0, 1])
    assert isinstance(affine, AffineDensity)
    # Of the outcomes 0 and 1, two of the four kinds are alike.
    assert [family.size for family in affine.families] == [18 if name == "bernoulli" else 24]
    at = positions(affine, points=2, batch=4)
    found, expected = affine.value_and_grad(both, at), general.value_and_grad(both, at)
    close(found[0], expected[0], 1e-12)
    close(found[1], expected[1], 1e-11)
    close(affine.hessian(both, at[:, 0]), general.hessian(both, at[:, 0]), 1e-10)


def test_gaussian_data_far_from_zero_keep_their_digits():
    """Squares of 1e7 expanded about the origin would leave an error of 1e-2 in the log density."""
    y = 1e7 + numbers(50, seed=3)

    def model(y):
        level = pyro.sample("level", dist.Normal(1e7, 10.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(level, 1.0), obs=y)

    program = LaneProgram(model, (y,))
    affine, general = build_density(program), ProgramDensity(program)
    assert isinstance(affine, AffineDensity)
    assert affine.families == []
    at = 1e7 + positions(affine, batch=4)
    close(affine.value(POINT, at), general.value(POINT, at), 1e-9)


def test_what_is_nearly_affine_is_refused():
    """A curvature of 1e-6 in the predictor is no rounding."""

    def model(x, y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x @ beta + 1e-6 * beta[0] ** 2, 1.0), obs=y)

    assert isinstance(build_density(LaneProgram(model, (X, Y))), ProgramDensity)


def test_axes_of_a_strength_do_not_depend_on_the_others():
    """At sigma = 0 copies move nothing; that says nothing of the axes elsewhere."""
    swept = {"sigma": torch.tensor([0.0, 2.0], dtype=torch.float64)}
    density = build_density(LaneProgram(tied_copies, (COUNTS, GROUP), {}, swept))
    factor = torch.linalg.cholesky(torch.eye(density.num_latent, dtype=torch.float64) * 0.3 + 0.1)
    both = density.axes(torch.tensor([0, 1]), factor.expand(2, -1, -1))
    for point in (0, 1):
        alone = density.axes(torch.tensor([point]), factor.unsqueeze(0))
        close(both[point : point + 1], alone, 1e-12)
        close(alone @ alone.mT, (factor @ factor.mT).unsqueeze(0), 1e-12)
