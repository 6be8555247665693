"""Springs of a ring of atoms, simulated: do bonds of one type share one force constant?"""

import pyro
import pyro.distributions as dist
import torch

import bayestie as bt


def bond_types(displacement, force, *, sigma, kinds, noise_sd=0.5):
    """force_ni ~ N(k_i (u_i+1 - u_i) - k_i-1 (u_i - u_i-1), noise_sd^2), bonds tied within their type.

    Args:
        displacement: u of each atom in each snapshot, shape (n, atoms).
        force: on each atom, shape (n, atoms).
        sigma: sd of a bond's force constant around that of its type, >= 0.
        kinds: type of the bond from atom i to atom i + 1, a label per atom.
        noise_sd: sd of a force.
    """
    num, num_atoms = displacement.shape
    constant = bt.tied("constant", bt.Tie.groups(kinds), sigma, dist.Normal(5.0, 5.0))
    tension = constant * (displacement.roll(-1, -1) - displacement)
    with pyro.plate("snapshot", num, dim=-2), pyro.plate("atom", num_atoms, dim=-1):
        pyro.sample("force", dist.Normal(tension - tension.roll(1, -1), noise_sd), obs=force)


CONSTANTS = {"single": 3.0, "double": 6.0, "triple": 9.0}


def data(seed=0, num_atoms=12, num_snapshots=10, spread=0.0, noise_sd=0.5):
    """The model's arguments with their labels.

    Args:
        seed: of the simulation.
        num_atoms: of the ring; bond types go round single, double, single, triple.
        num_snapshots: configurations seen.
        spread: true sd of a bond's constant around that of its type.
        noise_sd: sd of a force.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = [("single", "double", "single", "triple")[i % 4] for i in range(num_atoms)]
    constant = torch.tensor([CONSTANTS[kind] for kind in kinds], dtype=torch.float64)
    constant = constant + spread * torch.randn(num_atoms, generator=generator, dtype=torch.float64)
    displacement = torch.randn(num_snapshots, num_atoms, generator=generator, dtype=torch.float64)
    tension = constant * (displacement.roll(-1, -1) - displacement)
    noise = torch.randn(num_snapshots, num_atoms, generator=generator, dtype=torch.float64)
    return {
        "displacement": displacement,
        "force": tension - tension.roll(1, -1) + noise_sd * noise,
        "kinds": kinds,
        "coords": {"bond": [f"{kind} {i}" for i, kind in enumerate(kinds)]},
        "dims": {"constant": ["bond"]},
    }
