"""The workloads as a user of Pyro or NumPyro writes them by hand, without bayestie.

Both speak one language but for its array library, so each model is written once. `centred` is a number, 0 or
1, and data like sigma: one compiled program serves both parametrisations at every strength.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Language:
    """What Pyro and NumPyro name alike.

    Attributes:
        dist, sample, deterministic, factor: of the library.
        xp: its arrays (torch, jax.numpy).
        constant: from a numpy array to its arrays.
    """

    dist: Any
    sample: Any
    deterministic: Any
    factor: Any
    xp: Any
    constant: Any


def exchangeable(ppl, name, num_copies, level, sigma, centred, event=()):
    """theta ~ N(level, sigma): through itself if `centred`, else through (theta - level) / sigma."""
    x = ppl.sample(
        f"{name}_x",
        ppl.dist.Normal(level * centred, sigma**centred)
        .expand((num_copies, *event))
        .to_event(1 + len(event)),
    )
    return ppl.deterministic(name, level * (1 - centred) + sigma ** (1 - centred) * x)


def normal(ppl, name, loc, scale, shape):
    """Independent normals of a shape."""
    return ppl.sample(name, ppl.dist.Normal(loc, scale).expand(shape).to_event(len(shape)))


def eight_schools(ppl, effect, stderr, sigma, centred):
    level = ppl.sample("theta_level", ppl.dist.Normal(0.0, 5.0))
    theta = exchangeable(ppl, "theta", len(effect), level, sigma, centred)
    ppl.sample("y", ppl.dist.Normal(theta, stderr).to_event(1), obs=effect)


def contraception(ppl, use, age, urban, district, num_districts, sigma, centred):
    level = ppl.sample("intercept_level", ppl.dist.Normal(0.0, 1.5))
    intercept = exchangeable(ppl, "intercept", num_districts, level, sigma, centred)
    age_slope = ppl.sample("age_slope", ppl.dist.Normal(0.0, 1.0))
    urban_effect = ppl.sample("urban_effect", ppl.dist.Normal(0.0, 1.0))
    logit = intercept[district] + age_slope * age + urban_effect * urban
    ppl.sample("y", ppl.dist.Bernoulli(logits=logit).to_event(1), obs=use)


def radon(ppl, log_radon, floor, county, num_counties, sigma, centred):
    level = normal(ppl, "line_level", 0.0, 2.0, (2,))
    line = exchangeable(ppl, "line", num_counties, level, sigma, centred, (2,))
    noise_sd = ppl.sample("noise_sd", ppl.dist.HalfNormal(1.0))
    mean = line[county, 0] + line[county, 1] * floor
    ppl.sample("y", ppl.dist.Normal(mean, noise_sd).to_event(1), obs=log_radon)


def inst_eval(ppl, rating, service, student, lecturer, num_students, num_lecturers, sigma, centred):
    level = ppl.sample("lecturers_level", ppl.dist.Normal(3.0, 1.0))
    lecturers = exchangeable(ppl, "lecturers", num_lecturers, level, sigma, centred)
    students = exchangeable(ppl, "students", num_students, 0.0, sigma, centred)
    service_effect = ppl.sample("service_effect", ppl.dist.Normal(0.0, 1.0))
    noise_sd = ppl.sample("noise_sd", ppl.dist.HalfNormal(2.0))
    mean = lecturers[lecturer] + students[student] + service_effect * service
    ppl.sample("y", ppl.dist.Normal(mean, noise_sd).to_event(1), obs=rating)


def poisson_chain(ppl, count, sigma, centred):
    """Centred: x is the log rate. Otherwise x[0] is its mean, x[1:] its steps in units of sigma."""
    xp, dist = ppl.xp, ppl.dist
    x = ppl.sample(
        "x", dist.ImproperUniform(dist.constraints.real, batch_shape=(), event_shape=(len(count),))
    )
    walk = sigma * (xp.cumsum(x, 0) - x[0])
    log_rate = ppl.deterministic("log_rate", centred * x + (1 - centred) * (x[0] + walk - walk.mean()))
    level = centred * x.mean() + (1 - centred) * x[0]
    step = centred * (x[1:] - x[:-1]) / sigma + (1 - centred) * x[1:]
    ppl.factor("prior", -0.5 * (level / 2.0) ** 2 - 0.5 * (step**2).sum())
    ppl.sample("y", dist.Poisson(xp.exp(log_rate)).to_event(1), obs=count)


def soft_convolution(ppl, images, digit, sigma, centred):
    """Kernels in the eigenvectors of the grid of places, where the tie's prior is diagonal."""
    patches, eigenvectors, eigenvalues = (ppl.constant(x) for x in convolution_constants(images))
    sd = ppl.xp.sqrt(matched_variances(ppl.xp, eigenvalues, sigma, 1.5))[:, None]
    x = ppl.sample("conv_x", ppl.dist.Normal(0.0, sd**centred).expand((9, 40)).to_event(2))
    # (place, 4 x 9 weights and 4 biases)
    kernels = ppl.deterministic("kernels", eigenvectors @ (sd ** (1 - centred) * x))
    head = normal(ppl, "head_weight", 0.0, 4.0 / 6.0, (10, 36))
    head_bias = normal(ppl, "head_bias", 0.0, 4.0, (10,))
    weight, bias = kernels[:, :36].reshape(9, 4, 9), kernels[:, 36:]
    features = ppl.xp.tanh(ppl.xp.einsum("npk,pok->nop", patches, weight) + bias.T)
    logits = features.reshape(len(digit), 36) @ head.T + head_bias
    ppl.deterministic("probability", _softmax(ppl.xp, logits))
    ppl.sample("digit", ppl.dist.Categorical(logits=logits).to_event(1), obs=digit)


def _softmax(xp, logits):
    return 1.0 / xp.exp(logits[:, None, :] - logits[:, :, None]).sum(-1)


def convolution_constants(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patches (n, 9 places, 9 pixels) of a 3 x 3 kernel at stride 2, and the eigenpairs of the 3 x 3 grid."""
    places = [(2 * row, 2 * column) for row in range(3) for column in range(3)]
    patches = np.stack([images[:, i : i + 3, j : j + 3].reshape(len(images), 9) for i, j in places], 1)
    path = np.array([[1.0, -1.0, 0.0], [-1.0, 2.0, -1.0], [0.0, -1.0, 1.0]])
    eigenvalues, eigenvectors = np.linalg.eigh(np.kron(path, np.eye(3)) + np.kron(np.eye(3), path))
    return patches, eigenvectors, np.where(eigenvalues < 1e-9, 0.0, eigenvalues)


def matched_variances(xp, eigenvalues, sigma, base_sd, num=9):
    """The form `matched`: v_j = 1 / (l_j / sigma^2 + 1 / s^2), v_0 = K s^2 - sum_j v_j."""
    deviations = 1.0 / (eigenvalues / sigma**2 + 1.0 / base_sd**2)
    level = num * base_sd**2 - (deviations.sum() - base_sd**2)
    return xp.where(eigenvalues <= 0.0, level, deviations)
