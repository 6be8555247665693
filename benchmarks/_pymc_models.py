"""The workloads as a user of PyMC writes them; sigma and `centred` are data, so that one compilation serves.

Densities as in `_hand_written`.
"""

# pyright: reportMissingImports=false

from typing import Any

import numpy as np
import pymc
import pytensor.tensor

from benchmarks._hand_written import convolution_constants, matched_variances

pm: Any = pymc  # its types do not know that random variables are tensors
pt: Any = pytensor.tensor


def build(name: str, data: dict[str, Any]) -> Any:
    """The model of this name on these data; `sigma` and `centred` start at 1 and 0."""
    with pm.Model() as model:
        sigma = pm.Data("sigma", np.array(1.0))
        centred = pm.Data("centred", np.array(0.0))
        _MODELS[name](**data, sigma=sigma, centred=centred)
    return model


def _exchangeable(name, shape, level, sigma, centred):
    x = pm.Normal(f"{name}_x", level * centred, sigma**centred, shape=shape)
    return pm.Deterministic(name, level * (1 - centred) + sigma ** (1 - centred) * x)


def _eight_schools(effect, stderr, sigma, centred):
    level = pm.Normal("theta_level", 0.0, 5.0)
    theta = _exchangeable("theta", len(effect), level, sigma, centred)
    pm.Normal("y", theta, stderr, observed=effect)


def _contraception(use, age, urban, district, num_districts, sigma, centred):
    level = pm.Normal("intercept_level", 0.0, 1.5)
    intercept = _exchangeable("intercept", num_districts, level, sigma, centred)
    age_slope = pm.Normal("age_slope", 0.0, 1.0)
    urban_effect = pm.Normal("urban_effect", 0.0, 1.0)
    pm.Bernoulli(
        "y", logit_p=intercept[district] + age_slope * age + urban_effect * urban, observed=use.astype(int)
    )


def _radon(log_radon, floor, county, num_counties, sigma, centred):
    level = pm.Normal("line_level", 0.0, 2.0, shape=2)
    line = _exchangeable("line", (num_counties, 2), level, sigma, centred)
    noise_sd = pm.HalfNormal("noise_sd", 1.0)
    pm.Normal("y", line[county, 0] + line[county, 1] * floor, noise_sd, observed=log_radon)


def _inst_eval(rating, service, student, lecturer, num_students, num_lecturers, sigma, centred):
    level = pm.Normal("lecturers_level", 3.0, 1.0)
    lecturers = _exchangeable("lecturers", num_lecturers, level, sigma, centred)
    students = _exchangeable("students", num_students, 0.0, sigma, centred)
    service_effect = pm.Normal("service_effect", 0.0, 1.0)
    noise_sd = pm.HalfNormal("noise_sd", 2.0)
    mean = lecturers[lecturer] + students[student] + service_effect * service
    pm.Normal("y", mean, noise_sd, observed=rating)


def _poisson_chain(count, sigma, centred):
    x = pm.Flat("x", shape=len(count), initval=np.zeros(len(count)))
    walk = sigma * (pt.cumsum(x) - x[0])
    log_rate = pm.Deterministic("log_rate", centred * x + (1 - centred) * (x[0] + walk - walk.mean()))
    level = centred * x.mean() + (1 - centred) * x[0]
    step = centred * (x[1:] - x[:-1]) / sigma + (1 - centred) * x[1:]
    pm.Potential("prior", -0.5 * (level / 2.0) ** 2 - 0.5 * (step**2).sum())
    pm.Poisson("y", pt.exp(log_rate), observed=count.astype(int))


def _soft_convolution(images, digit, sigma, centred):
    patches, eigenvectors, eigenvalues = convolution_constants(images)
    sd = pt.sqrt(matched_variances(pt, pt.as_tensor(eigenvalues), sigma, 1.5))[:, None]
    x = pm.Normal("conv_x", 0.0, sd**centred, shape=(9, 40))
    kernels = pt.as_tensor(eigenvectors) @ (sd ** (1 - centred) * x)
    head = pm.Normal("head_weight", 0.0, 4.0 / 6.0, shape=(10, 36))
    head_bias = pm.Normal("head_bias", 0.0, 4.0, shape=10)
    weight, bias = kernels[:, :36].reshape((9, 4, 9)), kernels[:, 36:]
    maps = (pt.as_tensor(patches)[:, :, None, :] * weight[None]).sum(-1) + bias[None]  # (image, place, map)
    logits = pt.tanh(maps.transpose((0, 2, 1))).reshape((len(digit), 36)) @ head.T + head_bias
    probability = pm.Deterministic("probability", pm.math.softmax(logits, axis=-1))
    pm.Categorical("digit", p=probability, observed=digit)


_MODELS = {
    "eight_schools": _eight_schools,
    "contraception": _contraception,
    "radon": _radon,
    "inst_eval": _inst_eval,
    "poisson_chain": _poisson_chain,
    "soft_convolution": _soft_convolution,
}
