"""Draws of an engine -> the results tree: arrays collected, measured, labelled."""

import difflib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from bayestie._collect import PREDICTIVE_DRAWS, TieUse, collect, predict, tie_uses
from bayestie._engines import QUANTILES, Draws, LaplaceProposal, Task
from bayestie._errors import NameLookupError, OptionError, ShapeError
from bayestie._overlap import overlap, sparse_overlap
from bayestie._psis import psis
from bayestie._results import build_tree
from bayestie._sparse_collect import Columns, collect_copies, summaries

KEEP = ("posterior", "log_likelihood", "log_prior", "posterior_predictive", "overlap")
# Pointwise log likelihoods beyond this many bytes are summarised (elpd) and not stored unless asked for.
LOG_LIKELIHOOD_BYTES = 600_000_000
SAMPLE_STATS = {
    "diverging": False,
    "tree_depth": 0,
    "n_steps": 0,
    "acceptance_rate": 1.0,
    "step_size": 0.0,
}


class Assembly:
    """How one run's draws become its tree."""

    def __init__(
        self,
        task: Task,
        swept: Mapping[str, np.ndarray],
        attrs: dict[str, Any],
        keep: Sequence[str] | None,
        dims: Mapping[str, Sequence[str]],
        coords: Mapping[str, Sequence[Any]],
    ):
        unknown = sorted(set(keep or ()) - set(KEEP))
        if unknown:
            raise OptionError(
                "keep",
                found=repr(unknown[0]),
                expected=f"names among {', '.join(KEEP)}",
                fix="Correct the name.",
            )
        self.task, self.program = task, task.program
        self.swept, self.attrs, self.keep = dict(swept), attrs, keep
        self.ties = tie_uses(self.program)
        self.coords = dict(coords)
        self.dims = self._named_dims(dims)

    # -- labels ----------------------------------------------------------------------------------------

    def _named_dims(self, given: Mapping[str, Sequence[str]]) -> dict[str, list[str | None]]:
        program = self.program
        sites = {**program.latent, **program.observed, **program.deterministic}
        arguments = self.arguments()
        for name in given:
            if name not in sites and name not in arguments:
                raise NameLookupError(
                    f"dims['{name}']",
                    found="no such site or argument of the model",
                    expected=f"one of {sorted([*sites, *arguments])}",
                    fix="Correct the name.",
                )
        # A variable cannot share its name with a dimension: plate("data") over the argument data is usual.
        taken = {*sites, *arguments, *self.swept}
        named = {plate: f"{plate}_dim" if plate in taken else plate for plate in program.plates}
        dims: dict[str, list[str | None]] = {
            name: [None if plate is None else named[plate] for plate in site.dims]
            for name, site in sites.items()
        }
        sizes: dict[int, list[str]] = {}
        for plate, size in program.plates.items():
            sizes.setdefault(size, []).append(named[plate])
        for use in self.ties:
            # Copies that are as many as a plate's rows, and no other plate's, carry the plate's name.
            same = sizes.get(use.tie.num_copies, [])
            if len(same) == 1 and dims[use.name][0] is None:
                dims[use.name][0] = same[0]
            if use.name in given:
                dims[use.name] = list(given[use.name])
            z = f"{use.name}_z"
            if z in dims and use.tie.kind == "exchangeable" and z not in given:
                dims[z] = list(dims[use.name])
        for name in arguments:
            shape = tuple(arguments[name].shape)
            own = [sizes.get(n, []) for n in shape]
            dims.setdefault(name, [s[0] if len(s) == 1 else None for s in own])
        dims |= {name: list(value) for name, value in given.items()}
        shapes = {name: site.shape for name, site in sites.items()}
        shapes |= {name: tuple(x.shape) for name, x in arguments.items()}
        self._check_labels(given, dims, shapes)
        return dims

    def _check_labels(
        self,
        given: Mapping[str, Sequence[str]],
        dims: Mapping[str, Sequence[str | None]],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Refuse names and labels that do not fit before anything is drawn."""
        for name, value in given.items():
            if name in value and not isinstance(value, str):
                raise NameLookupError(
                    f"dims['{name}']",
                    found=f"{list(value)}, with the variable's own name",
                    expected="another name for the axis than for the variable",
                    fix=f'Write dims={{"{name}": ["row"]}}, for example.',
                )
            if isinstance(value, str) or len(value) > len(shapes[name]):
                raise OptionError(
                    f"dims['{name}']",
                    found=f"{value!r} for shape {shapes[name]}",
                    expected=f"a list of at most {len(shapes[name])} names, one per axis",
                    fix=f'Write dims={{"{name}": ["school"]}}, for example.',
                )
        lengths: dict[str, dict[int, str]] = {}
        for name, shape in shapes.items():
            own = [*dims.get(name, ())]
            for i, length in enumerate(shape):
                dim = (own[i] if i < len(own) else None) or f"{name}_dim_{i}"
                lengths.setdefault(dim, {}).setdefault(length, name)
        for dim, labels in self.coords.items():
            if dim not in lengths:
                close = ", ".join(difflib.get_close_matches(dim, lengths, n=3))
                raise NameLookupError(
                    f"coords['{dim}']",
                    found="a dimension that no variable has" + (f" (did you mean {close}?)" if close else ""),
                    expected=f"one of {sorted(lengths)}",
                    fix="Name the axis with dims=, or by a plate of that name.",
                )
            for length, name in lengths[dim].items():
                if len(labels) != length:
                    raise ShapeError(
                        f"coords['{dim}']",
                        found=f"{len(labels)} labels",
                        expected=f"{length}, as '{name}' has along that axis",
                        fix="Give one label per element.",
                    )

    def arguments(self) -> dict[str, Tensor]:
        """Tensor arguments of the model by name, without NaN or infinity."""
        program = self.program
        pairs = {**dict(zip(program.argument_names, program.args, strict=True)), **program.kwargs}
        taken = {*program.latent, *program.observed, *program.deterministic}
        return {
            name: value
            for name, value in pairs.items()
            if isinstance(value, Tensor) and bool(torch.isfinite(value).all()) and name not in taken
        }

    # -- the tree --------------------------------------------------------------------------------------

    def partial(self, draws: Draws, begin: float) -> xr.DataTree | None:
        """The finished points of an interrupted sweep; of a grid, the rows that are finished whole."""
        shape = tuple(len(values) for values in self.swept.values())
        done = np.zeros(shape, dtype=bool)
        done.reshape(-1)[draws.points.cpu().numpy()] = True
        # Whole rows along the axis that keeps most; without a swept keyword there is one point or none.
        axes = range(done.ndim)
        kept = [np.flatnonzero(done.all(tuple(b for b in axes if b != a))) for a in axes]
        axis = max(axes, key=lambda a: len(kept[a]) / shape[a], default=None)
        if not done.any() or (axis is not None and not len(kept[axis])):
            return None
        rows = np.arange(done.size).reshape(shape)
        if axis is not None:
            rows = rows.take(kept[axis], axis)
            name = list(self.swept)[axis]
            self.swept[name] = self.swept[name][kept[axis]]
        order = {int(point): i for i, point in enumerate(draws.points)}
        self.attrs["interrupted"] = 1
        return self.tree(draws.take([order[int(point)] for point in rows.reshape(-1)]), None, begin)

    def tree(self, draws: Draws, gaussian: LaplaceProposal | None, begin: float) -> xr.DataTree:
        program = self.program
        self._num_stored = draws.log_density.numel()
        arrays = self._collect(draws.points, draws.position, self._wanted)
        groups: dict[str, dict[str, np.ndarray]] = {}
        for key, value in arrays.items():
            group, name = key.split("/", 1)
            groups.setdefault(group, {})[name] = value
        groups["sample_stats"] = self._sample_stats(draws, gaussian)
        loo = self._leave_one_out(groups.get("log_likelihood", {}), draws)
        thinned = self._predictive(groups, draws)
        if not self._stores("log_likelihood", groups):
            groups.pop("log_likelihood", None)
        if self.keep is not None:
            for group in ("posterior", "log_prior", "posterior_predictive"):
                if group not in self.keep:
                    groups.pop(group, None)
        groups["observed_data"] = {n: v.cpu().numpy() for n, v in program.observed_values.items()}
        groups["constant_data"] = {n: v.cpu().numpy() for n, v in self.arguments().items()}
        groups["sweep"] = self._sweep_group(draws, loo)
        if draws.summary and self.task.sparse is not None:
            groups["summary"] = summaries(Columns(self.task.sparse.copies), draws.summary)
        groups = {group: self._shaped(group, variables) for group, variables in groups.items() if variables}
        attrs = {
            **self.attrs,
            "ties": self._tie_records(),
            "seconds_total": round(time.perf_counter() - begin, 4),
        }
        event_dims: dict[str, Sequence[str | None]] = dict(self.dims)
        for name in groups.get("summary", {}):
            site = next(n for n in sorted(self.dims, key=len, reverse=True) if name.startswith(f"{n}_"))
            event_dims[name] = ["quantile"] * name.endswith("quantiles") + list(self.dims[site])
        tree = build_tree(
            swept={name: values.tolist() for name, values in self.swept.items()},
            groups=groups,
            event_dims={n: d for n, d in event_dims.items() if any(n in g for g in groups.values())},
            coords=self.coords,
            attrs=attrs,
            group_coords={
                "posterior_predictive": {"draw": thinned} if "posterior_predictive" in groups else {},
                "summary": {"quantile": list(QUANTILES)},
            },
        )
        if draws.pool:
            tree["laplace_draws"] = self._by_point(draws.pool, "laplace_draw")
        if loo is not None and sum(x.nbytes for x in loo.values()) <= LOG_LIKELIHOOD_BYTES:
            tree["loo"] = self._by_point(loo, "observation")
        if self.keep is None or "overlap" in self.keep:
            if gaussian is not None:
                tree["overlap"] = overlap(self.task, draws, gaussian.fit, self.swept)
            elif draws.whitened:
                tree["overlap"] = sparse_overlap(self.task, draws, self.swept)
        return tree

    def _collect(
        self, points: Tensor, position: Tensor, wanted: Callable[[str], bool]
    ) -> dict[str, np.ndarray]:
        if self.task.sparse is None:
            return collect(self.program, points, position, wanted)
        return collect_copies(Columns(self.task.sparse.copies), points, position, wanted)

    def _wanted(self, key: str) -> bool:
        group = key.split("/", 1)[0]
        if group == "log_likelihood":
            return group in self.keep if self.keep is not None else not self._too_many_rows(self._num_stored)
        return group != "parameter"

    def _too_many_rows(self, num_draws: int) -> bool:
        """Whether something per observation and draw is more than fits beside draws of copies."""
        if self.task.sparse is None:
            return False
        rows = sum(value.numel() for value in self.program.observed_values.values())
        return 8 * rows * num_draws > LOG_LIKELIHOOD_BYTES

    def _stores(self, group: str, groups: Mapping[str, Mapping[str, np.ndarray]]) -> bool:
        if self.keep is not None:
            return group in self.keep
        return sum(x.nbytes for x in groups.get(group, {}).values()) <= LOG_LIKELIHOOD_BYTES

    def _shaped(self, group: str, variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays (points, ...) to (*swept, ...)."""
        if group in ("observed_data", "constant_data"):
            return variables
        lead = tuple(len(v) for v in self.swept.values())
        return {name: x.reshape((*lead, *x.shape[1:])) for name, x in variables.items()}

    def _sample_stats(self, draws: Draws, gaussian: LaplaceProposal | None) -> dict[str, np.ndarray]:
        lp = draws.log_density.cpu().numpy()
        stats = {"lp": lp}
        if gaussian is not None:
            stats["laplace_log_density"] = _laplace_log_density(draws, gaussian).cpu().numpy()
        for name, neutral in SAMPLE_STATS.items():
            found = draws.stats.get(name)
            kind = type(neutral) if not isinstance(neutral, int) or isinstance(neutral, bool) else np.int64
            stats[name] = (
                np.full(lp.shape, neutral, kind) if found is None else found.cpu().numpy().astype(kind)
            )
        energy = draws.stats.get("energy")
        stats["energy"] = -lp if energy is None else np.where(energy.cpu() == 0, -lp, energy.cpu().numpy())
        return stats

    def _predictive(self, groups: dict[str, dict[str, np.ndarray]], draws: Draws) -> np.ndarray:
        """Add posterior predictive draws to ``groups``; the numbers of the draws they belong to."""
        chains, length = self.task.num_chains, draws.position.shape[2]
        step = max(1, length // max(1, PREDICTIVE_DRAWS // chains))
        thinned = np.arange(0, length, step)
        if self.keep is not None and "posterior_predictive" not in self.keep:
            return thinned
        position = draws.position[:, :, ::step]
        if self.keep is None and self._too_many_rows(8 * position.shape[:3].numel()):
            return thinned
        parameters: dict[str, dict[str, np.ndarray]] = {}
        found = self._collect(draws.points, position, lambda key: key.startswith("parameter/"))
        for key, value in found.items():
            site, name = key.split("/", 1)[1].rsplit("/", 1)
            parameters.setdefault(site, {})[name] = value
        drawn = {s: predict(self.program, s, p, self.task.seed + 7919) for s, p in parameters.items()}
        if drawn:
            groups["posterior_predictive"] = drawn
        return thinned

    def _leave_one_out(
        self, log_likelihood: Mapping[str, np.ndarray], draws: Draws
    ) -> dict[str, np.ndarray] | None:
        """PSIS-LOO of every observation at every point, those of all sites together: (P, observations)."""
        if not log_likelihood:
            return None
        found = []
        for i in range(len(draws.points)):
            rows = np.concatenate(
                [x[i].reshape(-1, math.prod(x.shape[3:])) for x in log_likelihood.values()], 1
            )
            log_density = torch.as_tensor(rows).mT.contiguous()
            weights, khat = psis(-log_density)
            pointwise = torch.logsumexp(weights + log_density, 1)
            mean = torch.logsumexp(log_density, 1) - math.log(log_density.shape[1])
            found.append(torch.stack([pointwise, mean - pointwise, khat]).numpy())
        return dict(zip(("elpd_i", "p_loo_i", "pareto_k"), np.stack(found, 1), strict=True))

    def _sweep_group(self, draws: Draws, loo: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        quality = draws.quality.cpu().numpy().copy()
        # Independent draws: their number, less what weights and resampling by them cost.
        total = self.task.num_chains * self.task.num_draws
        effective = 1.0 / (1.0 / total + 1.0 / draws.ess_weights.cpu().numpy())
        independent = np.isnan(quality[:, 0])
        quality[independent] = np.stack([np.ones_like(effective), effective, effective], 1)[independent]
        out = {
            "engine": np.array(draws.engine),
            "certified": np.array(draws.certified, dtype=bool),
            "reason": np.array(draws.reason),
            "exact": np.array(draws.exact, dtype=bool),
            "log_evidence": draws.log_evidence.cpu().numpy(),
            "log_evidence_error": draws.log_evidence_error.cpu().numpy(),
            "khat": draws.khat.cpu().numpy(),
            "ess_weights": draws.ess_weights.cpu().numpy(),
            "max_rhat": quality[:, 0],
            "nested_rhat": draws.nested_rhat.cpu().numpy(),
            "min_ess_bulk": quality[:, 1],
            "min_ess_tail": quality[:, 2],
            "divergences": draws.divergences.cpu().numpy(),
            "seconds": draws.seconds.cpu().numpy(),
        }
        if loo is not None:
            elpd, num = loo["elpd_i"], loo["elpd_i"].shape[1]
            spread = elpd.std(1, ddof=1) if num > 1 else np.zeros(len(elpd))
            out |= {"elpd": elpd.sum(1), "elpd_se": math.sqrt(num) * spread}
            out |= {"p_loo": loo["p_loo_i"].sum(1), "max_pareto_k": loo["pareto_k"].max(1)}
        for use in self.ties:
            swept = self._sigma_from(use)
            if swept is None or use.tie.num_components > 1:
                continue
            values = np.array([float(self.program.swept[swept][p]) for p in draws.points])
            if use.tie.scaled:
                out[f"sigma_raw_{use.name}"] = values / math.sqrt(float(use.tie.scale_factor.reshape(-1)[0]))
            else:
                out[f"sigma_scaled_{use.name}"] = values * math.sqrt(
                    float(use.tie.typical_variance.reshape(-1)[0])
                )
        return out

    def _by_point(self, arrays: Mapping[str, Any], dim: str) -> xr.Dataset:
        """Arrays (points, n) with the swept dimensions in front."""
        lead = tuple(len(v) for v in self.swept.values())
        data = {
            name: ((*self.swept, dim), torch.as_tensor(x).cpu().numpy().reshape(*lead, -1))
            for name, x in arrays.items()
        }
        return xr.Dataset(data, coords=dict(self.swept))

    # -- ties ------------------------------------------------------------------------------------------

    def _sigma_from(self, use: TieUse) -> str | None:
        """The swept keyword that is this tie's sigma at every point, if one is."""
        seen = self.program.tie_strengths[use.name]
        if any(isinstance(s, Tensor) and s.numel() != 1 for s in seen):
            return None
        found = np.array([float(s) for s in seen])
        for name, values in self.program.swept.items():
            if np.array_equal(found, values.cpu().numpy()):
                return name
        return None

    def _tie_records(self) -> str:
        records = {}
        for use in self.ties:
            about = use.about
            base = about["base"]
            record = {
                **use.tie.describe(),
                "form": about["form"],
                "event_shape": list(about["event_shape"]),
                "sigma_from": self._sigma_from(use),
                "copy_dims": [self._copy_dim(use)],
                **_describe_base(base),
            }
            tril = about.get("event_scale_tril")
            if tril is not None:
                record["event_scale_tril"] = (
                    "learned" if self._learned(use, "event_scale_tril") else tril.tolist()
                )
            if not self.swept and not self._learned(use, "sigma"):
                record["sigma"] = torch.as_tensor(about["sigma"]).tolist()
            record["sigma_elsewhere"] = self._sigma_elsewhere(use)
            records[use.name] = record
        return json.dumps(records)

    def _copy_dim(self, use: TieUse) -> str:
        names = self.dims.get(use.name) or [None]
        return names[0] or f"{use.name}_dim_0"

    def _learned(self, use: TieUse, name: str) -> bool:
        """Whether a part of a tied statement depends on the latents: runs at two positions tell."""
        program, found = self.program, []
        for shift in (0.1, 0.4):
            position = torch.full((program.num_latent,), shift, dtype=program.dtype, device=program.device)
            with torch.no_grad(), program.quiet():
                lane = program.run_lane(position, program.point(0))
            found.append(torch.as_tensor(lane.messages[use.name]["infer"]["bayestie"][name]))
        return not torch.equal(*found)

    def _sigma_elsewhere(self, use: TieUse) -> bool:
        """Whether a site beside the ties of the swept sigma depends on it, their copies held still."""
        name = self._sigma_from(use)
        values = self.program.swept.get(name) if name is not None else None
        if values is None:
            return False
        usable = torch.nonzero((values > 0) & torch.isfinite(values)).squeeze(1)
        if len(usable) < 2:
            return False
        program = self.program
        together = [other.name for other in self.ties if self._sigma_from(other) == name]
        own = {f"{tied}{part}" for tied in together for part in ("", "_z", "_level", "_level_z")}
        generator = torch.Generator().manual_seed(1)
        position = 0.3 * torch.randn(program.num_latent, dtype=program.dtype, generator=generator)
        position = position.to(program.device)
        first, second = (program.point_inputs(usable[[i]]) for i in (0, -1))
        with torch.no_grad(), program.quiet():
            before = program.run_lane(position, first.unflatten([x[0] for x in first.flat()]))
            inputs = second.unflatten([x[0] for x in second.flat()])
            there, moved = program.run_lane(position, inputs), position.clone()
            for tied in together:
                theta = before.messages[tied]["value"]
                level = before.messages[tied]["infer"]["bayestie"]["level"]
                prior = there.messages[tied]["infer"]["bayestie"]["prior"]
                for part, value in prior.noise_of(theta, level).items():
                    if (site := program.latent.get(f"{tied}{part}")) is not None:
                        moved[site.slice] = value.reshape(-1)
            after = program.run_lane(moved, inputs)
        for site, density in before.log_densities.items():
            if site not in own and not torch.allclose(
                density, after.log_densities[site], rtol=1e-7, atol=1e-8
            ):
                return True
        return False


def _describe_base(base: Any) -> dict[str, Any]:
    if not isinstance(base, torch.distributions.Distribution):
        value = torch.as_tensor(base, dtype=torch.float64)
        return {
            "base": f"{float(value):g} (known)" if value.numel() == 1 else "known",
            "base_known": value.tolist(),
        }
    inner: Any = base
    while hasattr(inner, "base_dist"):
        inner = inner.base_dist
    loc, scale = getattr(inner, "loc", None), getattr(inner, "scale", None)
    text = type(inner).__name__
    if isinstance(loc, Tensor) and isinstance(scale, Tensor):
        one = loc.unique().numel() == 1 and scale.unique().numel() == 1
        text += f"({float(loc.flatten()[0]):g}, {float(scale.flatten()[0]):g})" if one else "(...)"
        return {"base": text, "base_loc": loc.tolist(), "base_scale": scale.tolist()}
    return {"base": text}


def _laplace_log_density(draws: Draws, gaussian: LaplaceProposal) -> Tensor:
    """Of all draws, the log density of the Laplace engine's proposal: known where they come from it."""
    found = draws.stats["log_proposal"].clone()
    known = torch.isfinite(found).all(2).all(1) & torch.tensor([e == "laplace" for e in draws.engine]).to(
        found.device
    )
    index = torch.nonzero(~known).squeeze(1)
    if len(index):
        flat = draws.position[index].flatten(1, 2)
        found[index] = gaussian.take(index).log_density(flat).reshape(found[index].shape)
    return found
