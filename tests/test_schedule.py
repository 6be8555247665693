"""Strength schedules: copies carried exactly, one posterior in the end, a better optimum where it helps."""

import json

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from tie_kinds import TIES

import bayestie as bt
from bayestie._errors import OptionError, StrengthError
from bayestie._program import LaneProgram
from bayestie._schedule import _stages, carried, checked_schedule
from models.curriculum import held_back, held_back_data
from models.eight_schools import data, eight_schools

SIGMAS = torch.tensor([0.3, 2.0], dtype=torch.float64)
FALLING = {"sigma": bt.strengths(0.05, 20, 8)[::-1]}


def copies_at(program, position):
    with torch.no_grad(), program.quiet():
        lanes = [program.run_lane(position[p], program.point(p)) for p in range(len(position))]
    return [{name: msg["value"] for name, msg in lane.messages.items()} for lane in lanes]


def forms(tie):
    """The forms of the prior that a tie has."""
    return ["level", *(["copies"] if not (tie.has_hub or tie.anchored) else []), *(
        ["matched"] if not tie.anchored else []
    )]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "form"), [(kind, form) for kind, tie in TIES.items() for form in forms(tie)]
)
def test_copies_are_carried_exactly(kind, form):
    tie = TIES[kind]

    def model(*, sigma):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        theta = bt.tied("theta", tie, sigma, dist.Normal(0.5, 2.0), form=form, event_shape=(2,))
        pyro.sample("y", dist.Normal(theta.sum(), scale), obs=torch.tensor(1.0))

    before = LaneProgram(model, (), {}, {"sigma": SIGMAS})
    after = LaneProgram(model, (), {}, {"sigma": torch.tensor([0.01, 5.0], dtype=torch.float64)})
    generator = torch.Generator().manual_seed(0)
    position = torch.randn(2, before.num_latent, generator=generator, dtype=torch.float64)
    moved = carried(before, after, position)
    for old, new in zip(copies_at(before, position), copies_at(after, moved), strict=True):
        torch.testing.assert_close(new["theta"], old["theta"], rtol=1e-10, atol=1e-10)
        assert torch.equal(new["scale"], old["scale"])


@pytest.mark.parametrize(
    ("tie", "form"),
    [(bt.Tie.chain(3), "level"), (bt.Tie.chain(3), "copies"), (bt.Tie.exchangeable(3), "matched")],
)
def test_a_statement_that_rests_on_another_is_carried_with_it(tie, form):
    def model(*, sigma):
        first = bt.tied("first", bt.Tie.chain(3), sigma, dist.Normal(0.0, 1.0), form="copies")
        second = bt.tied("second", tie, sigma, dist.Normal(first.mean(), first[0].exp()), form=form)
        pyro.sample("y", dist.Normal(second, 1.0).to_event(1), obs=torch.zeros(3))

    before = LaneProgram(model, (), {}, {"sigma": SIGMAS})
    after = LaneProgram(model, (), {}, {"sigma": SIGMAS / 7})
    position = torch.randn(2, before.num_latent, generator=torch.Generator().manual_seed(1)).double()
    moved = carried(before, after, position)
    for old, new in zip(copies_at(before, position), copies_at(after, moved), strict=True):
        for name in ("first", "second"):
            torch.testing.assert_close(new[name], old[name], rtol=1e-10, atol=1e-10)


def test_copies_meet_at_hard_sharing():
    def model(*, sigma):
        theta = bt.tied("theta", bt.Tie.complete(4), sigma, dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0).to_event(1), obs=torch.zeros(4))

    before = LaneProgram(model, (), {}, {"sigma": SIGMAS})
    after = LaneProgram(model, (), {}, {"sigma": torch.zeros(2, dtype=torch.float64)})
    position = torch.randn(2, before.num_latent, generator=torch.Generator().manual_seed(2)).double()
    moved = carried(before, after, position)
    for old, new in zip(copies_at(before, position), copies_at(after, moved), strict=True):
        torch.testing.assert_close(new["theta"], old["theta"].mean().expand(4))


def test_a_strength_leaves_the_schedule_where_it_is_reached():
    program = LaneProgram(eight_schools, tuple(data()[k] for k in ("effect", "stderr")), {}, {
        "sigma": torch.tensor([0.1, 3.0, 50.0], dtype=torch.float64)
    })  # fmt: skip
    falling = list(_stages(program, {"sigma": np.array([10.0, 1.0])}))
    assert [stage["sigma"].tolist() for stage in falling] == [[10.0, 10.0, 50.0], [1.0, 3.0, 50.0]]
    rising = list(_stages(program, {"sigma": np.array([0.01, 1.0])}))
    assert [stage["sigma"].tolist() for stage in rising] == [[0.01, 0.01, 0.01], [0.1, 1.0, 1.0]]
    assert not list(_stages(program, {"sigma": np.array([0.1, 0.05])}))  # all begin where they end


@pytest.mark.parametrize("engine", ["laplace", "svi"])
def test_one_mode_is_reached_from_everywhere(engine):
    over = {"sigma": [0.0, 0.5, 5.0, 30.0]}
    keywords = {"over": over, "engine": engine, "seed": 2, "keep": ("posterior",)}
    with_it = bt.sweep(eight_schools, **data(), **keywords, schedule={"sigma": [100.0, 10.0, 1.0]})
    without = bt.sweep(eight_schools, **data(), **keywords)
    assert json.loads(with_it.attrs["schedule"]) == {"sigma": [100.0, 10.0, 1.0]}
    assert "schedule" not in without.attrs
    # Eight schools are Gaussian: the mode is the mean, and draws are made with the same noise.
    np.testing.assert_allclose(
        with_it.posterior["theta"].values, without.posterior["theta"].values, rtol=1e-6, atol=1e-6
    )


def test_fit_takes_its_own_strength_as_the_end():
    path = bt.fit(eight_schools, **data(), sigma=0.5, schedule={"sigma": [20.0, 2.0]}, seed=1)
    assert bool(path.sweep.certified)
    plain = bt.fit(eight_schools, **data(), sigma=0.5, seed=1)
    np.testing.assert_allclose(path.posterior["theta"].mean(), plain.posterior["theta"].mean(), atol=1e-6)


@pytest.mark.parametrize("engine", ["laplace", "svi"])
def test_a_loose_beginning_finds_the_better_of_two_optima(engine):
    # Where a firm tie begins at 0 the one copy that has seen 0 holds back five that have seen 6; begun loose,
    # those find 6 and are the stronger.
    given = held_back_data()
    given["y"] = torch.where(given["y"] > 3.0, 6.0, 0.0).double()  # the heights of the two are known

    def found(schedule):
        path = bt.fit(held_back, **given, sigma=0.05, engine=engine, seed=6, num_draws=100, schedule=schedule)
        return float(path.posterior["theta"].mean()), float(path.sample_stats["lp"].max())

    (begun_loose, high), (begun_firm, low) = found(FALLING), found(None)
    assert abs(begun_loose - 6.0) < 0.3
    assert abs(begun_firm) < 0.3
    # Twelve observations 20 scales off instead of fifteen: log(401) each.
    assert high - low == pytest.approx(3 * np.log(401), abs=3.0)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ([1.0, 2.0], ["a dict from keywords"]),
        ({"sigma": [1.0, 3.0, 2.0]}, ["[1.0, 3.0, 2.0]", "only falls, or only rises"]),
        ({"sigma": []}, ["only falls"]),
        ({"sigma": "loose"}, ["'loose'"]),
        ({"sigma": [1.0, float("nan")]}, ["nan"]),
        ({"tau": [1.0, 2.0]}, ["no number for 'tau'", "swept, or given as one number"]),
    ],
)
def test_bad_schedules_are_named(schedule, words):
    with pytest.raises(OptionError) as caught:
        bt.sweep(eight_schools, **data(), over={"sigma": [1.0]}, schedule=schedule)
    for word in words:
        assert word in str(caught.value)


def test_schedules_of_two_keywords_go_together():
    swept = {"sigma": [1.0], "tau": [1.0]}
    with pytest.raises(OptionError, match="2 values of 'sigma', 3 values of 'tau'"):
        checked_schedule({"sigma": [2.0, 1.0], "tau": [3.0, 2.0, 1.0]}, swept, {})


def test_pyro_engines_refuse_a_schedule():
    with pytest.raises(OptionError, match="engine 'pyro_nuts'"):
        bt.fit(eight_schools, **data(), sigma=1.0, engine="pyro_nuts", schedule=FALLING)


def test_an_impossible_strength_of_the_schedule_is_refused():
    with pytest.raises(StrengthError, match="sigma"):
        bt.fit(eight_schools, **data(), sigma=1.0, schedule={"sigma": [-1.0, 0.5]})
