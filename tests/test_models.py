"""Models: their data row by row where it matters, and that each runs and means what its docstring says."""

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine

import bayestie as bt

MODELS = [
    "adamw_decay",
    "bias_variance",
    "bond_types",
    "contraception",
    "curriculum",
    "dyestuff",
    "eight_schools",
    "inst_eval",
    "lip_cancer",
    "nile",
    "penalty",
    "poisson_chain",
    "radon",
    "recurrent",
    "residual_depth",
    "shared_filter",
    "siamese",
    "soft_convolution",
    "soft_filter",
    "tied_autoencoder",
    "transformer_tying",
]
# Keywords that are strengths, where it is not `sigma` alone.
STRENGTHS = {"transformer_tying": ["sigma_embedding", "sigma_depth"]}
FOLDER = Path(__file__).parent.parent / "models"


def _load(name):
    module = importlib.import_module(f"models.{name}")
    return getattr(module, name), module.data()


def _trace(model, arguments, **keywords):
    torch.set_default_dtype(torch.float64)
    try:
        with pyro.validation_enabled(True):
            trace = poutine.trace(model).get_trace(**arguments, **keywords)
            trace.compute_log_prob()
    finally:
        torch.set_default_dtype(torch.float32)
    return trace


def _strengths(name, sigma):
    return dict.fromkeys(STRENGTHS.get(name, ["sigma"]), sigma)


def _arguments(data):
    return {name: value for name, value in data.items() if name not in ("coords", "dims")}


def test_every_model_file_is_tested():
    assert sorted(path.stem for path in FOLDER.glob("[!_]*.py")) == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_imports_only_pyro_torch_and_bayestie(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    roots = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
    assert roots - {"typing"} == {"pyro", "torch", "bayestie"}


@pytest.mark.parametrize("name", MODELS)
def test_sigma_is_keyword_only_and_data_are_arguments(name):
    model, data = _load(name)
    parameters = inspect.signature(model).parameters
    strengths = _strengths(name, 1.0)
    assert all(parameters[one].kind is inspect.Parameter.KEYWORD_ONLY for one in strengths)
    assert set(_arguments(data)) < set(parameters)
    inspect.signature(model).bind(**_arguments(data), **strengths)


@pytest.mark.parametrize("sigma", [0.0, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_runs_under_validation_with_labels_that_fit(name, sigma):
    model, data = _load(name)
    trace = _trace(model, _arguments(data), **_strengths(name, sigma))
    assert torch.isfinite(torch.as_tensor(trace.log_prob_sum()))
    sizes = {f.name: f.size for node in trace.nodes.values() for f in node.get("cond_indep_stack", ())}
    for dim, labels in data["coords"].items():
        assert len(set(labels)) == len(labels) == sizes.get(dim, len(labels))
    sizes |= {dim: len(labels) for dim, labels in data["coords"].items()}
    for name, dims in data["dims"].items():
        value = data[name] if name in data else trace.nodes[name]["value"]
        assert [sizes[dim] for dim in dims] == list(value.shape)


@pytest.mark.parametrize("name", MODELS)
def test_data_are_float64_and_finite(name):
    _, data = _load(name)
    tensors = [value for value in data.values() if isinstance(value, torch.Tensor)]
    assert tensors
    for tensor in tensors:
        assert tensor.dtype in (torch.float64, torch.int64)
        assert torch.isfinite(tensor.double()).all()


def test_eight_schools_rows():
    # Rubin (1981), table 1.
    _, data = _load("eight_schools")
    assert data["effect"].tolist() == [28, 8, -3, 7, -1, 1, 18, 12]
    assert data["stderr"].tolist() == [15, 10, 16, 11, 9, 11, 10, 18]


def test_contraception_rows():
    _, data = _load("contraception")
    assert data["use"].shape == (1934,)
    assert data["use"].sum() == 759
    assert data["urban"].sum() == 562
    assert data["district"].unique().tolist() == list(range(60))
    assert data["coords"]["district"] == [i for i in range(1, 62) if i != 54]
    # First woman: district 1, 18.44 years above the mean age, in town, no use.
    first = [data[name][0].item() for name in ("use", "age", "urban", "district")]
    assert first == [0.0, pytest.approx(1.844), 1.0, 0]
    assert abs(data["age"].mean()) < 1e-3


def test_nile_rows():
    _, data = _load("nile")
    assert data["flow"].sum() == 91935
    assert data["flow"][:3].tolist() == [1120, 1160, 963]
    assert data["flow"][-2:].tolist() == [714, 740]
    assert (data["coords"]["year"][0], data["coords"]["year"][-1]) == (1871, 1970)


def test_dyestuff_rows():
    module = importlib.import_module("models.dyestuff")
    # Batch means of Davies and Goldsmith, table 6.3.
    assert module.data()["grams"].mean(-1).tolist() == [1505, 1528, 1564, 1498, 1600, 1470]
    assert module.data()["grams"][0].tolist() == [1545, 1440, 1440, 1520, 1580]
    second = module.data2()["grams"]
    assert second.shape == (6, 5)
    assert second.sum().item() == pytest.approx(169.968)
    with pytest.raises(ValueError, match=r"Dyestuff3.*Dyestuff2"):
        module.data("Dyestuff3")


def test_lip_cancer_rows():
    module = importlib.import_module("models.lip_cancer")
    data = module.data()
    assert data["cases"].sum() == 536
    assert data["expected"].sum().item() == pytest.approx(536.2, abs=0.05)
    assert data["coords"]["district"][0] == "Skye-Lochalsh"
    # Skye-Lochalsh: 9 cases where 1.4 were expected, 16 per cent outdoors.
    assert [data[name][0].item() for name in ("cases", "expected", "outdoor")] == [9, 1.4, 1.6]
    pairs = {(i, j) for i, neighbours in module.NEIGHBOURS.items() for j in neighbours}
    assert len(pairs) == 132
    assert all(1 <= i < j <= 56 for i, j in pairs)
    assert module.MAP.num_copies == 56
    assert module.MAP.num_components == 1
    names = data["coords"]["district"]
    assert [names[j - 1] for j in module.NEIGHBOURS[1]] == [
        "Ross-Cromarty",
        "Lochaber",
        "Western Isles",
        "Inverness",
    ]


def test_nile_learns_its_noise_on_request():
    model, data = _load("nile")
    trace = _trace(model, _arguments(data), sigma=30.0, noise_sd=None)
    assert "noise_sd" in trace.nodes


def test_dyestuff_at_its_maximum_gives_the_published_deviance():
    # With level, noise and sigma at their ML values the deviance (lme4: 327.32705988) is -2 log evidence.
    model, data = _load("dyestuff")
    known: dict[str, Any] = _arguments(data) | {"level_mean": 1527.5, "level_sd": 0.0}
    fit = bt.fit(model, **known, noise_sd=49.5101, sigma=37.2603, engine="laplace", num_draws=100)
    assert -2 * fit["sweep"]["log_evidence"].item() == pytest.approx(327.32705988, abs=1e-6)


def test_radon_rows():
    _, data = _load("radon")
    assert data["log_radon"].shape == (919,)
    assert data["floor"].sum() == 153
    assert data["county"].unique().tolist() == list(range(85))
    # First home: Aitkin, 2.2 pCi/l on the first floor.
    first = [data[name][0].item() for name in ("log_radon", "floor", "county")]
    assert first == [pytest.approx(0.788457), 1.0, 0]
    assert data["coords"]["county_name"][0] == "AITKIN"


def test_poisson_chain_is_the_same_every_time_at_any_length():
    module = importlib.import_module("models.poisson_chain")
    first, again = (module.data(50)["count"] for _ in range(2))
    assert torch.equal(first, again)
    assert module.data(100_000)["count"].max() < 1000


def test_inst_eval_rows():
    _, data = _load("inst_eval")
    assert data["rating"].shape == (73421,)
    assert data["student"].unique().tolist() == list(range(2972))
    assert data["lecturer"].unique().tolist() == list(range(1128))
    # First row: student 1 gave lecturer 1002, of the same department, a 5.
    assert (data["rating"][0], data["service"][0]) == (5, 0)
    assert data["coords"]["student_code"][data["student"][0]] == 1
    assert data["coords"]["lecturer_code"][data["lecturer"][0]] == 1002
