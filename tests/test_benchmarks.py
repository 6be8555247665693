"""Benchmarks: peers' models are ours, the judge is arviz's, and the command runs."""

import importlib.util
import json
from dataclasses import replace
from typing import Any

import arviz_stats as azs
import numpy as np
import pytest
import torch
from pyro import poutine

from benchmarks import _judge, _search, certification, gpu, scaling
from benchmarks.__main__ import main
from benchmarks._contender import Setting
from benchmarks._workloads import WORKLOADS, load_arrays

# Small data: the density is what counts.
SMALL = {
    name: replace(w, data_options={"num_steps": 7} if w.model == "poisson_chain" else w.data_options)
    for name, w in WORKLOADS.items()
    if name != "W4-large"
}
# Peer -> package that must be there.
PEERS = {"pyro": "pyro", "numpyro": "numpyro", "nutpie": "pymc"}


def arrays_of(workload, tmp_path):
    workload.save_arrays(tmp_path / "data.npz")
    data = load_arrays(tmp_path / "data.npz")
    if workload.model == "inst_eval":  # 3,000 of 73,421 rows, all students and lecturers
        data = {name: x if isinstance(x, int) else x[:3000] for name, x in data.items()}
    return data


def random_sites(workload, seed) -> dict[str, np.ndarray]:
    """A point of the hand-written model, centred at 0 or 1 alike: the law of x is not used."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "eight_schools": {"theta_level": (), "theta_x": (8,)},
        "contraception": {
            "intercept_level": (), "intercept_x": (60,), "age_slope": (), "urban_effect": (),
        },
        "radon": {"line_level": (2,), "line_x": (85, 2), "noise_sd": ()},
        "poisson_chain": {"x": (7,)},
        "soft_convolution": {"conv_x": (9, 40), "head_weight": (10, 36), "head_bias": (10,)},
        "inst_eval": {
            "lecturers_level": (), "lecturers_x": (1128,), "students_x": (2972,), "service_effect": (),
            "noise_sd": (),
        },
    }  # fmt: skip
    point = {name: rng.normal(size=shape) for name, shape in shapes[workload.model].items()}
    return {name: np.exp(0.3 * x) if name == "noise_sd" else x for name, x in point.items()}


def at_hand(workload, arrays, sites, sigma, centred):
    """Trace of the model written by hand in Pyro, at a point."""
    from benchmarks._pyro import hand_written_model

    with poutine.condition(data={name: torch.as_tensor(x) for name, x in sites.items()}):
        trace: Any = poutine.trace(hand_written_model(workload.model)).get_trace(
            **tensors(arrays), sigma=sigma, centred=centred
        )
    return trace


def tensors(arrays):
    return {name: x if isinstance(x, int) else torch.as_tensor(x) for name, x in arrays.items()}


def at_ours(workload, arrays, trace, sigma):
    """Log joint of bayestie's model at the same copies as in the trace of the model written by hand."""
    model, data = workload.function(), tensors(arrays)
    there = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}
    if "kernels" in there:
        kernels = there["kernels"]
        there |= {"conv.weight": kernels[:, :36].reshape(9, 4, 1, 3, 3), "conv.bias": kernels[:, 36:]}
        there |= {"head.weight": there["head_weight"], "head.bias": there["head_bias"]}
    own: Any = poutine.trace(model).get_trace(**data, sigma=sigma)
    given = {name: there[name] for name in own.nodes if name in there and name != "y"}
    for name, site in own.nodes.items():
        if "bayestie" not in (site.get("infer") or {}):
            continue
        theta, tie = there[name], site["infer"]["bayestie"]["tie"]
        del given[name]
        if f"{name}_level" in own.nodes:
            given.setdefault(f"{name}_level", theta.mean(0))
        shape = own.nodes[f"{name}_z"]["value"].shape

        def copies(z, name=name):
            with poutine.condition(data={**given, f"{name}_z": z}):
                found: Any = poutine.trace(model).get_trace(**data, sigma=sigma)
            return found.nodes[name]["value"]

        # theta is affine in z: its columns, or at once where it is level + sigma z.
        difference = theta - copies(torch.zeros(shape))
        if tie.rank == tie.num_copies:
            given[f"{name}_z"] = difference / sigma
        else:
            units = [torch.eye(tie.rank)[:, i].reshape(-1, *[1] * (len(shape) - 1)) for i in range(tie.rank)]
            origin = theta - difference
            columns = [(copies(unit.expand(shape)) - origin).reshape(len(theta), -1)[:, 0] for unit in units]
            solution = torch.linalg.lstsq(
                torch.stack(columns, 1), difference.reshape(len(theta), -1)
            ).solution
            given[f"{name}_z"] = solution.reshape(shape)
        torch.testing.assert_close(copies(given[f"{name}_z"]), theta)
    with poutine.condition(data=given):
        result: Any = poutine.trace(model).get_trace(**data, sigma=sigma)
    return float(result.log_prob_sum())


def log_joint_of(peer, workload, arrays, sigma, centred):
    """A function from a point to the peer's log joint, in the constrained space."""
    if peer == "pyro":
        return lambda sites: float(at_hand(workload, arrays, sites, sigma, centred).log_prob_sum())
    if peer == "numpyro":
        import jax  # pyright: ignore[reportMissingImports]
        from numpyro.infer.util import log_density  # pyright: ignore[reportMissingImports]

        from benchmarks._numpyro import hand_written_model

        model = hand_written_model(workload.model)
        with jax.enable_x64(True):
            data = {n: x if isinstance(x, int) else jax.numpy.asarray(x) for n, x in arrays.items()}
        keywords = {**data, "sigma": sigma, "centred": centred}

        def density(sites):
            with jax.enable_x64(True):
                return float(log_density(model, (), keywords, sites)[0])

        return density
    import pymc as pm  # pyright: ignore[reportMissingImports]

    from benchmarks._pymc_models import build

    model = build(workload.model, arrays)
    with model:
        pm.set_data({"sigma": sigma, "centred": centred})
    log_prob = model.compile_logp(jacobian=False)

    def density_of_pymc(sites):
        point = {f"{n}_log__" if n == "noise_sd" else n: np.log(x) if n == "noise_sd" else x
                 for n, x in sites.items()}  # fmt: skip
        return float(log_prob(point))

    return density_of_pymc


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("centred", [0.0, 1.0])
@pytest.mark.parametrize("name", list(SMALL))
@pytest.mark.parametrize("peer", list(PEERS))
@pytest.mark.filterwarnings("ignore")  # the peers' own
def test_log_joint_of_a_peer_is_ours_up_to_a_constant(peer, name, centred, tmp_path, float64):
    if importlib.util.find_spec(PEERS[peer]) is None:
        pytest.skip(f"{PEERS[peer]} is not installed (extra 'benchmarks')")
    workload, sigma = SMALL[name], 0.7
    arrays = arrays_of(workload, tmp_path)
    theirs = log_joint_of(peer, workload, arrays, sigma, centred)
    constants, size = [], 1.0
    for seed in range(3):
        sites = random_sites(workload, seed)
        ours = at_ours(workload, arrays, at_hand(workload, arrays, sites, sigma, centred), sigma)
        size = max(size, abs(ours))
        constants.append(theirs(sites) - ours)
    assert np.ptp(constants) < 1e-10 * size


def test_judge_is_arviz():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(4, 251, 3))
    noise[:, 1:, 1] += 0.9 * noise[:, :-1, 1]
    noise[0, :, 2] += 0.5
    rhat, bulk, tail = _judge.diagnose(noise)
    for i in range(3):
        one = noise[..., i]
        assert rhat[i] == pytest.approx(float(azs.rhat(one)), rel=1e-10)
        assert bulk[i] == pytest.approx(float(azs.ess(one, method="bulk")), rel=1e-10)
        assert tail[i] == pytest.approx(float(azs.ess(one, method="tail", prob=(0.05, 0.95))), rel=1e-10)


def test_judge_refuses_what_does_not_move():
    assert not _judge.judge(np.zeros((4, 1000, 1)))[0].passed
    assert _judge.judge(np.random.default_rng(0).normal(size=(4, 1000, 1)))[0].passed


class Autoregression:
    """Draws of known autocorrelation: nearly independent if centred at 1, slow otherwise."""

    together = False
    parametrisations = (0, 1)
    workload = SMALL["W1"].shortened(2, True)

    def run(self, strengths, settings, progress):
        rng, found = np.random.default_rng(0), []
        for setting in settings:
            x = rng.normal(size=(4, setting.draws, 2))
            for i in range(1, setting.draws if setting.centred == 0 else 0):
                x[:, i] += 0.95 * x[:, i - 1]
            found.append(x)
        return found


def test_search_finds_the_fewest_draws_and_the_better_parametrisation():
    kept: list[tuple[list[Setting], list[bool]]] = []
    _search.search(Autoregression(), None, 4000, lambda *found: kept.append(found))  # pyright: ignore
    settings, passed = kept[-1]
    assert all(passed) and len(settings) == 2
    assert all(setting.centred == 1 and setting.draws <= 650 for setting in settings)


@pytest.mark.parametrize("contenders", [["bayestie", "pyro"]])
def test_command_writes_one_table(contenders, tmp_path, capsys):
    assert main(["--smoke", "--workload", "W1", "--contender", *contenders, "--out", str(tmp_path)]) == 0
    assert "eight schools" in capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())
    assert [result["contender"] for result in found["results"]] == contenders
    for result in found["results"]:
        assert result["error"] == "" and result["record"]["stage"] == "done"
        assert 0 < result["record"]["cold"] < result["record"]["whole"]
    assert (tmp_path / "results.md").read_text().count("\n| bayestie") == 1


def test_a_contender_is_stopped_at_its_limit(tmp_path):
    options = ["--limit", "0.5", "--smoke", "--workload", "W1", "--contender", "bayestie"]
    assert main([*options, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["results"][0]["stopped"]
    assert "> 0" in (tmp_path / "results.md").read_text()


def test_scaling_measures_a_curve(tmp_path):
    assert scaling.main(["--smoke", "--curve", "copies", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert [point["error"] for point in found["points"]] == [""]
    assert found["points"][0]["certified"] == "2 of 2" and found["ratios"][0]["ratio"] > 0
    assert found["imports"]["import bayestie, over pyro"] < 0.3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_gpu_script_says_what_it_needs(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "CUDA" in capsys.readouterr().err


@pytest.mark.slow
def test_gpu_script_runs_on_the_cpu_too(tmp_path):
    assert gpu.main(["--smoke", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert [part["error"] for part in found] == [""] * len(found)
    assert "NOT" not in found[0]["result"]


def test_certification_judges_random_models(tmp_path, capsys):
    assert (
        certification.main(["--models", "2", "--workers", "1", "--ess", "300", "--out", str(tmp_path)]) == 0
    )
    printed = capsys.readouterr().out
    assert "means and sds compared" in printed
    lines = [json.loads(line) for line in (tmp_path / "certification.jsonl").read_text().splitlines()]
    found = json.loads((tmp_path / "certification.json").read_text())
    assert found["results"] == lines and [line["seed"] for line in lines] == [0, 1]
    assert found["comparisons"] == sum(line["comparisons"] for line in lines) > 0
    assert 0.0 < found["largest"] < found["limit"]


def test_a_wrong_certificate_is_told(tmp_path, monkeypatch, capsys):
    sure = {
        "what": "a model",
        "engine": "laplace",
        "reason": "sure",
        "certified": True,
        "long_certified": True,
    }
    monkeypatch.setattr(
        certification, "judged", lambda seed, long_ess: {**sure, "comparisons": 10, "worst": 1.0 + 9.0 * seed}
    )
    keywords = ["--workers", "1", "--out", str(tmp_path)]
    assert certification.main(["--models", "1", *keywords]) == 0
    assert certification.main(["--models", "2", *keywords]) == 1
    assert "a model: sure, |z| 10.00" in capsys.readouterr().out


def test_random_models_are_of_every_kind():
    found = [certification.random_model(seed)[0] for seed in range(60)]
    for word in (*certification.FAMILIES, *certification.TIES, "level", "copies", "matched", "slope"):
        assert any(word in what for what in found), word
