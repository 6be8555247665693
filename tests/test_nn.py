"""bt.nn: hard-tied ends equal PyTorch's shared modules, free ends separate ones, and engines run both."""

import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import ClippedAdam
from torch import nn

import bayestie as bt

DOUBLE = torch.float64
# Sums in another order: a few units in the last place of values of order one.
ROUNDING = 1e-13


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    yield
    torch.set_default_dtype(torch.float32)


def unit():
    return dist.Normal(torch.zeros(()), 1.0)


def draw(statement, seed=0, **values):
    """What a statement returns, and its trace, at random or given values of its sites."""
    pyro.set_rng_seed(seed)
    conditioned: Any = poutine.condition(statement, data=values)
    trace = poutine.trace(conditioned).get_trace()
    return trace.nodes["_RETURN"]["value"], trace


def shared(module, copies):
    """A plain module with the parameters of copy 0."""
    module.load_state_dict({name: x[0] for name, x in copies.parameters.items()})
    return module


# -- hard sharing is PyTorch's own module ----------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "geometry", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": (0, 2)}], ids=str
)
def test_soft_convolution_at_zero_is_conv2d(geometry, bias):
    conv = nn.Conv2d(2, 3, 3, bias=bias, **geometry)
    layer, trace = draw(lambda: bt.nn.soft_conv2d("conv", conv, (7, 6), 0.0, unit()))
    for name, _ in conv.named_parameters():
        conv.get_parameter(name).data = trace.nodes[f"conv.{name}"]["value"][0].clone()
    x = torch.randn(5, 2, 7, 6)
    assert layer(x).shape == conv(x).shape
    torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=20 * ROUNDING)


def test_soft_convolution_away_from_zero_is_a_kernel_per_place():
    conv = nn.Conv2d(2, 3, 3)
    layer, trace = draw(lambda: bt.nn.soft_conv2d("conv", conv, (5, 6), 0.7, unit()))
    weight, bias = (trace.nodes[f"conv.{name}"]["value"] for name in ("weight", "bias"))
    assert weight.shape == (12, 3, 2, 3, 3)
    x = torch.randn(4, 2, 5, 6)
    for place in range(12):
        r, c = divmod(place, 4)
        patch = x[:, :, r : r + 3, c : c + 3]
        naive = torch.einsum("bijk,oijk->bo", patch, weight[place]) + bias[place]
        torch.testing.assert_close(layer(x)[:, :, r, c], naive, rtol=0, atol=20 * ROUNDING)


@pytest.mark.parametrize("kind", ["tanh", "relu"])
def test_cells_tied_over_time_at_zero_are_the_rnn(kind):
    cell, rnn = nn.RNNCell(3, 4, nonlinearity=kind), nn.RNN(3, 4, nonlinearity=kind)
    copies, _ = draw(lambda: bt.nn.tied_modules("cell", cell, bt.Tie.chain(6), 0.0, bt.nn.fan_in()))
    for name, values in copies.parameters.items():
        rnn.get_parameter(f"{name}_l0").data = values[0].clone()
    inputs, state = torch.randn(6, 3), torch.randn(4)
    outputs, _ = rnn(inputs, state[None])
    torch.testing.assert_close(torch.stack(copies.scan(inputs, state)), outputs, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("cell", [nn.GRUCell(2, 3), nn.LSTMCell(2, 3)], ids=["gru", "lstm"])
def test_gated_cells_at_zero_are_one_cell(cell):
    copies, _ = draw(lambda: bt.nn.tied_modules("cell", cell, bt.Tie.chain(4), 0.0, bt.nn.fan_in()))
    one, inputs = shared(cell.double(), copies), torch.randn(4, 2)
    first = (torch.zeros(3), torch.zeros(3)) if isinstance(cell, nn.LSTMCell) else torch.zeros(3)
    state = first
    for x, found in zip(inputs, copies.scan(inputs, first), strict=True):
        state = one(x, state)
        torch.testing.assert_close(found, state, rtol=0, atol=ROUNDING)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x):
        return x + self.net(x)


def test_blocks_over_depth_at_zero_are_the_iterated_block():
    copies, _ = draw(lambda: bt.nn.tied_modules("block", Block(), bt.Tie.chain(5), 0.0, bt.nn.fan_in()))
    one, x = shared(Block(), copies), torch.randn(7, 3)
    expected = x
    for _ in range(5):
        expected = one(expected)
    torch.testing.assert_close(copies.iterate(x), expected, rtol=0, atol=ROUNDING)


def test_named_copies_fit_the_module_that_lists_them():
    stack = nn.Sequential(*(Block() for _ in range(3)))
    copies, _ = draw(lambda: bt.nn.tied_modules("block", Block(), bt.Tie.chain(3), 0.7, bt.nn.fan_in()))
    deep, x = nn.ModuleDict({"blocks": stack}), torch.randn(7, 3)
    named = copies.named("blocks")
    assert set(named) == {name for name, _ in deep.named_parameters()}
    assert torch.equal(bt.nn.bind(stack, copies.named(""))(x), copies.iterate(x))
    assert not torch.equal(named["blocks.0.net.0.weight"], named["blocks.2.net.0.weight"])


@pytest.mark.parametrize("form", ["copies", "matched"])
def test_infinity_is_independent_modules(form):
    tie = bt.Tie.complete(3)
    copies, trace = draw(
        lambda: bt.nn.tied_modules("block", Block(), tie, float("inf"), dist.Normal(0.0, 2.0), form=form)
    )
    x = torch.randn(3, 7, 3)
    for k in range(3):
        one = Block()
        one.load_state_dict({name: values[k] for name, values in copies.parameters.items()})
        torch.testing.assert_close(copies[k](x[k]), one(x[k]), rtol=0, atol=ROUNDING)
        torch.testing.assert_close(copies.map(x)[k], one(x[k]), rtol=0, atol=ROUNDING)
    # The joint density of all copies is that of independent parameters: sites are (level, z), of the same
    # volume as theta, so that densities agree up to the constant Jacobian of each parameter's rotation.
    gap = []
    for seed in range(2):
        copies, trace = draw(
            lambda: bt.nn.tied_modules("block", Block(), tie, float("inf"), dist.Normal(0.0, 2.0), form=form),
            seed=seed,
        )
        independent = sum(
            dist.Normal(0.0, 2.0).log_prob(values).sum() for values in copies.parameters.values()
        )
        gap.append(trace.log_prob_sum() - independent)
    torch.testing.assert_close(gap[0], gap[1], rtol=0, atol=1e-10)


def test_listed_modules_keep_their_untied_values_and_buffers():
    modules = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval() for _ in range(3)]
    for k, module in enumerate(modules):
        module[1].running_mean.fill_(float(k))  # pyright: ignore[reportCallIssue]
    copies, _ = draw(
        lambda: bt.nn.tied_modules("m", modules, bt.Tie.chain(3), 0.0, unit(), names=["0.weight"])
    )
    x = torch.randn(4, 2)
    for k, module in enumerate(modules):
        module[0].weight.data = copies.parameters["0.weight"][k].clone()
        torch.testing.assert_close(copies[k](x), module(x), rtol=0, atol=ROUNDING)
    assert len(list(copies)) == 3


# -- parameters of one module ----------------------------------------------------------------------------


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 2), nn.Linear(2, 4, bias=False)

    def forward(self, x):
        return self.decoder(self.encoder(x))


def transposed_pair(sigma):
    net = Autoencoder()
    names = {"encoder.weight": None, "decoder.weight": torch.t}
    return net, bt.nn.tied_parameters("w", net, names, bt.Tie.complete(2), sigma, unit())


def test_transposed_pair_at_zero_is_the_tied_autoencoder():
    (net, weights), _ = draw(lambda: transposed_pair(0.0))
    assert torch.equal(weights["decoder.weight"], weights["encoder.weight"].T)
    x = torch.randn(3, 4)
    w = weights["encoder.weight"]
    torch.testing.assert_close(bt.nn.bind(net, weights)(x), (x @ w.T + net.encoder.bias) @ w)
    (_, loose), _ = draw(lambda: transposed_pair(0.5))
    assert not torch.equal(loose["decoder.weight"], loose["encoder.weight"].T)


class Language(nn.Module):
    """Input and output embeddings that PyTorch has tied itself."""

    def __init__(self, tied):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


@pytest.mark.parametrize("already_tied", [False, True])
def test_embedding_pair(already_tied):
    net, tokens = Language(already_tied), torch.tensor([0, 3, 6])

    def statement(sigma):
        names = ["embed.weight", "head.weight"]
        return bt.nn.tied_parameters("e", net, names, bt.Tie.complete(2), sigma, unit())

    hard, _ = draw(lambda: statement(0.0))
    plain = Language(True)
    plain.embed.weight.data = hard["embed.weight"].clone()
    torch.testing.assert_close(bt.nn.bind(net, hard)(tokens), plain(tokens), rtol=0, atol=ROUNDING)
    soft, _ = draw(lambda: statement(1.0))
    expected = soft["embed.weight"][tokens] @ soft["head.weight"].T
    torch.testing.assert_close(bt.nn.bind(net, soft)(tokens), expected)


def test_groups_share_within_a_type_alone():
    labels = ["OH", "CH", "OH", "CH", "CH"]
    copies, _ = draw(lambda: bt.nn.tied_modules("bond", nn.Linear(1, 1), bt.Tie.groups(labels), 0.0, unit()))
    weight = copies.parameters["weight"].flatten()
    assert len(set(weight.tolist())) == 2
    assert weight[0] == weight[2] and weight[1] == weight[3] == weight[4]


def test_free_parameters_are_independent_sites():
    net = Autoencoder()
    values, trace = draw(lambda: bt.nn.free_parameters("net", net, bt.nn.fan_in(2.0)))
    assert set(values) == {"encoder.weight", "encoder.bias", "decoder.weight"}
    assert trace.nodes["net.encoder.weight"]["fn"].base_dist.scale.unique().item() == pytest.approx(1.0)
    expected = dist.Normal(0.0, 2.0).log_prob(values["encoder.bias"]).sum()
    assert torch.isclose(trace.nodes["net.encoder.bias"]["fn"].log_prob(values["encoder.bias"]), expected)


# -- gradients -------------------------------------------------------------------------------------------


def _uses_of_conv():
    conv, x = nn.Conv2d(1, 2, 3), torch.randn(3, 1, 6, 5)
    return (
        conv,
        bt.Tie.grid(4, 3),
        lambda c: (
            bt.nn.locally_connected2d(x, c.parameters["weight"], c.parameters["bias"]).square().sum(),
            lambda m: m(x).square().sum(),
        ),
    )


def _uses_of_cell():
    cell, x = nn.RNNCell(2, 3), torch.randn(5, 2)

    def iterate(m):
        state = torch.zeros(3)
        for step in x:
            state = m(step, state)
        return state.square().sum()

    return cell, bt.Tie.chain(5), lambda c: (c.scan(x, torch.zeros(3))[-1].square().sum(), iterate)


def _uses_of_branches():
    branch, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.randn(2, 6, 4)
    return (
        branch,
        bt.Tie.complete(2),
        lambda c: (
            (c[0](x[0]) - c[1](x[1])).square().sum(),
            lambda m: (m(x[0]) - m(x[1])).square().sum(),
        ),
    )


@pytest.mark.parametrize("uses", [_uses_of_conv, _uses_of_cell, _uses_of_branches], ids=lambda f: f.__name__)
def test_gradient_of_a_shared_parameter_is_the_sum_over_its_uses(uses):
    module, tie, loss = uses()
    levels = {name: x.detach().clone().requires_grad_() for name, x in module.named_parameters()}
    known = {f"m.{name}_level": x for name, x in levels.items()}
    copies, _ = draw(lambda: bt.nn.tied_modules("m", module, tie, 0.0, unit()), **known)
    untied, plain = loss(copies)
    names = list(levels)
    total = torch.autograd.grad(untied, [levels[n] for n in names], retain_graph=True)
    each = torch.autograd.grad(untied, [copies.parameters[n] for n in names])
    own = torch.autograd.grad(plain(module), list(module.parameters()))
    for level, copy, shared_grad in zip(total, each, own, strict=True):
        assert copy.shape[0] == tie.num_copies
        torch.testing.assert_close(level, copy.sum(0), rtol=0, atol=1e-10)
        torch.testing.assert_close(level, shared_grad, rtol=0, atol=1e-10)
        assert not torch.allclose(copy[0], level)


# -- engines ---------------------------------------------------------------------------------------------


# Made once: a module that a model makes in its body would draw random numbers in every lane.
SMALL_CONV, SMALL_CELL = nn.Conv2d(1, 1, 2), nn.RNNCell(1, 1, bias=False)
SMALL_NET = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh())


def soft_regression(x, y, *, sigma):
    layer = bt.nn.soft_conv2d("conv", SMALL_CONV, (3, 4), sigma, unit(), form="matched")
    with pyro.plate("row", 2, dim=-2), pyro.plate("column", 3, dim=-1), pyro.plate("image", len(x), dim=-3):
        pyro.sample("y", dist.Normal(layer(x)[:, 0], 0.5), obs=y)


def soft_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 1, 3, 4, generator=generator)
    y = nn.functional.conv2d(x, torch.tensor([[[[1.0, -0.5], [0.3, 0.0]]]])) + 0.2
    return x, y[:, 0] + 0.5 * torch.randn(30, 2, 3, generator=generator)


def test_swept_ends_are_one_regression_and_one_per_place():
    x, y = soft_data()
    path = bt.sweep(soft_regression, x, y, over={"sigma": [0.0, 1.0, np.inf]}, seed=1, engine="laplace")
    assert path["sweep"]["certified"].all()
    rows = nn.functional.unfold(x, (2, 2)).mT  # image, place, 4
    rows = torch.cat([rows, torch.ones(30, 6, 1)], -1)
    target = y.flatten(1)
    posterior = path["posterior"].to_dataset()
    found = torch.cat(
        [
            torch.tensor(posterior["conv.weight"].values).flatten(4),
            torch.tensor(posterior["conv.bias"].values),
        ],
        -1,
    ).flatten(1, 2)

    def check(draws, a, b):
        precision = a.T @ a / 0.25 + torch.eye(5)
        mean = torch.linalg.solve(precision, a.T @ b / 0.25)
        error = torch.linalg.inv(precision).diagonal().sqrt() / len(draws) ** 0.5
        assert (((draws.mean(0) - mean) / error).abs() < 4.5).all()

    check(found[0, :, 0], rows.flatten(0, 1), target.flatten())
    assert torch.equal(found[0, :, 0], found[0, :, 5])
    for place in range(6):
        check(found[2, :, place], rows[:, place], target[:, place])


def rnn_model(inputs, y, *, sigma):
    cell = bt.nn.tied_modules("cell", SMALL_CELL, bt.Tie.chain(len(y)), sigma, unit())
    states = torch.stack(cell.scan(inputs, torch.zeros(1, dtype=inputs.dtype)))[..., 0]
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(states, 0.2), obs=y)


def branches_model(x, y, *, sigma):
    net = bt.nn.tied_modules("net", SMALL_NET, bt.Tie.complete(2), sigma, unit())
    with pyro.plate("branch", 2, dim=-2), pyro.plate("row", x.shape[1], dim=-1):
        pyro.sample("y", dist.Normal(net.map(x)[..., 0], 0.2), obs=y)


@pytest.mark.parametrize(
    ("model", "engine", "site"),
    [(branches_model, "nuts", "net.0.weight"), (rnn_model, "svi", "cell.weight_hh")],
)
def test_engines_sweep_a_small_net_without_loops(model, engine, site):
    if model is rnn_model:
        data = torch.tensor([[1.0], [0.5], [-1.0]]), torch.tensor([0.6, 0.5, -0.2])
    else:
        x = torch.linspace(-2, 2, 12).expand(2, 12)
        data = x[..., None], torch.tanh(torch.tensor([[0.8], [1.3]]) * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a loop over lanes would warn
        path = bt.sweep(model, *data, over={"sigma": [0.0, 0.5]}, engine=engine, target_ess=100)
    copies = path["posterior"].to_dataset()[site]
    spread = np.ptp(copies.values, axis=3).mean((1, 2)).ravel()
    assert spread[0] == 0 and spread[1] > 0.05
    assert np.isfinite(copies.values).all()


def test_pyro_svi_takes_minibatches():
    x, y = soft_data()

    def model(sigma):
        layer = bt.nn.soft_conv2d("conv", SMALL_CONV, (3, 4), sigma, unit())
        with pyro.plate("image", len(x), subsample_size=10) as rows:
            pyro.sample("y", dist.Normal(layer(x[rows])[:, 0], 0.5).to_event(2), obs=y[rows])

    guide = AutoNormal(model, init_scale=0.05)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.03}), Trace_ELBO())
    for _ in range(150):
        svi.step(0.0)
    level = guide.median(0.0)["conv.weight_level"].flatten()
    # Least squares of all images; posterior sd about 0.04, minibatch noise of the same order.
    rows = torch.cat([nn.functional.unfold(x, (2, 2)).mT, torch.ones(30, 6, 1)], -1).flatten(0, 1)
    best = torch.linalg.lstsq(rows, y.reshape(-1, 1)).solution.flatten()[:4]
    assert (level - best).abs().max() < 0.15
    assert best.abs().max() > 0.8


def test_float32_module_runs_in_float64():
    net = nn.Linear(2, 1).float()
    values, _ = draw(lambda: bt.nn.free_parameters("n", net, unit(), names=["weight"]))
    assert bt.nn.bind(net, values)(torch.ones(2)).dtype == DOUBLE


# -- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "error", "message"),
    [
        (
            lambda: bt.nn.tied_modules("m", [Block(), Block()], bt.Tie.chain(3), 1.0, unit()),
            bt.errors.ShapeError,
            "2 modules",
        ),
        (
            lambda: bt.nn.tied_modules("m", [nn.Linear(2, 2), nn.Linear(2, 3)], bt.Tie.chain(2), 1.0, unit()),
            bt.errors.ModelError,
            "several architectures",
        ),
        (
            lambda: bt.nn.tied_modules("m", nn.Tanh(), bt.Tie.chain(2), 1.0, unit()),
            bt.errors.ModelError,
            "without parameters",
        ),
        (
            lambda: bt.nn.tied_modules("m", nn.Linear(2, 2), bt.Tie.chain(2), 1.0, unit(), names=["weigth"]),
            bt.errors.NameLookupError,
            r"'weigth'.*'weight'",
        ),
        (
            lambda: bt.nn.tied_modules("m", nn.Linear(2, 2), bt.Tie.chain(2), 1.0, {"weight": unit()}),
            bt.errors.NameLookupError,
            "base of parameter 'bias'",
        ),
        (
            lambda: bt.nn.tied_parameters(
                "w", Autoencoder(), ["encoder.weight", "decoder.weight"], bt.Tie.chain(2), 1.0, unit()
            ),
            bt.errors.ShapeError,
            r"'decoder.weight' of shape \(4, 2\)",
        ),
        (
            lambda: bt.nn.tied_parameters(
                "w", Autoencoder(), ["encoder.weight"], bt.Tie.chain(2), 1.0, unit()
            ),
            bt.errors.ShapeError,
            "1 names",
        ),
        (
            lambda: bt.nn.tied_parameters(
                "w", Autoencoder(), {"encoder.weight": torch.t}, bt.Tie.chain(1), 1.0, unit()
            ),
            bt.errors.ShapeError,
            "a view for every",
        ),
        (lambda: bt.nn.free_parameters("w", Autoencoder(), 1.0), bt.errors.ModelError, "a float"),
        (
            lambda: bt.nn.bind(Autoencoder(), {"encoder.wait": torch.ones(1)}),
            bt.errors.NameLookupError,
            "encoder.weight",
        ),
        (
            lambda: bt.nn.soft_conv2d("c", nn.Conv2d(2, 2, 3, groups=2), (5, 5), 1.0, unit()),
            bt.errors.ModelError,
            "groups=2",
        ),
        (
            lambda: bt.nn.soft_conv2d("c", nn.Conv2d(1, 1, 3), (2, 5), 1.0, unit()),
            bt.errors.ShapeError,
            "2 x 5",
        ),
        (
            lambda: bt.nn.soft_conv2d("c", nn.Conv2d(1, 1, 3), (5, 5), 1.0, unit(), tie=bt.Tie.chain(4)),
            bt.errors.ShapeError,
            "3 x 3 = 9",
        ),
        (
            lambda: bt.nn.tied_modules("m", nn.RNNCell(1, 1), bt.Tie.chain(2), 0.0, unit()).scan(
                torch.ones(3, 1), torch.zeros(1)
            ),
            bt.errors.ShapeError,
            "3 time steps",
        ),
    ],
)
def test_wrong_input_is_named(statement, error, message):
    with pytest.raises(error, match=message):
        statement()


# -- optimiser audit and Toeplitz ------------------------------------------------------------------------


def test_audit_warns_of_coupled_decay_on_shared_parameters():
    net = Language(True)
    with pytest.warns(UserWarning, match=r"'embed.weight' is used 2 times.*Adam: its decay is about 0\.71"):
        (finding,) = bt.nn.audit_optimizer(torch.optim.Adam(net.parameters(), weight_decay=0.1), net)
    assert (finding.name, finding.num_uses, finding.factor) == ("embed.weight", 2, 2**-0.5)
    conv = nn.Conv2d(1, 1, 3)
    with pytest.warns(UserWarning, match="'weight' is used 100 times"):
        found = bt.nn.audit_optimizer(
            torch.optim.RMSprop(conv.parameters(), weight_decay=0.1), conv, uses={"weight": 100}
        )
    assert [f.factor for f in found] == [0.1]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, weight_decay=0.1, decoupled_weight_decay=True),
        torch.optim.Adam,
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    ],
)
def test_audit_is_silent_where_all_is_well(make):
    net = Language(True)
    assert bt.nn.audit_optimizer(make(net.parameters()), net) == []  # a warning would be an error
    free = Language(False)
    assert bt.nn.audit_optimizer(torch.optim.Adam(free.parameters(), weight_decay=0.1), free) == []


def test_matrix_of_a_convolution():
    weight, x = torch.randn(2, 6, 2, 3), torch.randn(3, 5)
    matrix = bt.nn.convolution_matrix(weight[..., :6, :, :], (3, 5))
    assert matrix.shape == (2, 6, 15)
    for k in range(2):
        layer = bt.nn.locally_connected2d(x[None, None], weight[k][:, None, None])
        torch.testing.assert_close(matrix[k] @ x.flatten(), layer[0, 0])


def test_nearest_toeplitz_is_the_orthogonal_projection():
    places, pixels = (2, 3), (3, 5)
    kernel = torch.randn(1, 2, 3).expand(6, 2, 3)
    exact = bt.nn.convolution_matrix(kernel, pixels)
    torch.testing.assert_close(bt.nn.nearest_toeplitz(exact, places, pixels), exact, rtol=0, atol=ROUNDING)
    matrix = torch.randn(6, 15)
    projected = bt.nn.nearest_toeplitz(matrix, places, pixels)
    # Entries of one offset are equal, and what is left is orthogonal to every convolution.
    by_offset: dict[tuple[int, int], set[float]] = {}
    for p in range(6):
        for q in range(15):
            offset = (q // 5 - p // 3, q % 5 - p % 3)
            by_offset.setdefault(offset, set()).add(round(projected[p, q].item(), 12))
    assert all(len(values) == 1 for values in by_offset.values())
    assert abs(((matrix - projected) * exact).sum()) < 1e-12
    assert (matrix - projected).norm() > 1
