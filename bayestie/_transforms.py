"""Orthonormal maps on the last axis, without ever forming their matrix.

Each basis below is the complement of the constant vector: ``synthesize`` takes the coefficients of the
non-constant eigenvectors to values on the copies (x = U c), ``analyze`` is its transpose (c = U^T x).
Householder: O(K). Cosine (DCT-II) and real Fourier: O(K log K) by an FFT of length K.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def householder_synthesize(coefficients: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch r+1"]:
    """The reflection that maps the first axis to the constant vector."""
    num = coefficients.shape[-1] + 1
    total = coefficients.sum(-1, keepdim=True)
    root = math.sqrt(num)
    rest = coefficients - total / (num - root)
    return torch.cat([total / root, rest], -1)


def householder_analyze(x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch K-1"]:
    """The transpose of `householder_synthesize`."""
    num = x.shape[-1]
    root = math.sqrt(num)
    head, rest = x[..., :1], x[..., 1:]
    return rest + head / root - rest.sum(-1, keepdim=True) / (num - root)


def _half_turn(num: int, count: int, like: Tensor) -> Tensor:
    """exp(i pi k / (2 num)) for k < count."""
    angle = torch.arange(count, dtype=like.dtype, device=like.device) * (math.pi / (2 * num))
    return torch.complex(angle.cos(), angle.sin())


def dct(x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch K"]:
    """Orthonormal DCT-II.

    c_j = sqrt((2 - [j=0]) / K) sum_k x_k cos(pi j (2k + 1) / (2K)); one real FFT of length K
    (Makhoul 1980, doi:10.1109/TASSP.1980.1163351).
    """
    num = x.shape[-1]
    if num == 1:
        return x
    shuffled = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1)
    half = torch.fft.rfft(shuffled) * _half_turn(num, num // 2 + 1, x).conj()
    upper = half.imag[..., 1 : (num + 1) // 2].flip(-1)
    both = torch.cat([half.real, -upper], -1) * math.sqrt(2.0 / num)
    return torch.cat([both[..., :1] / math.sqrt(2.0), both[..., 1:]], -1)


def inverse_dct(coefficients: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch K"]:
    """Inverse and transpose of `dct` (orthonormal DCT-III)."""
    num = coefficients.shape[-1]
    if num == 1:
        return coefficients
    both = torch.cat([coefficients[..., :1] * math.sqrt(2.0), coefficients[..., 1:]], -1)
    count = num // 2 + 1
    real = both[..., :count]
    # The coefficient at K - k, for k = 0 .. K // 2; the one at k = 0 does not exist.
    mirrored = torch.cat([torch.zeros_like(both[..., :1]), both[..., num - count + 1 :].flip(-1)], -1)
    half = torch.complex(real, -mirrored) * _half_turn(num, count, both)
    shuffled = torch.fft.irfft(half, n=num) * math.sqrt(num / 2.0)
    even, odd = shuffled[..., : (num + 1) // 2], shuffled[..., (num + 1) // 2 :].flip(-1)
    if num % 2:
        last = even[..., -1:]
        paired = torch.stack([even[..., :-1], odd], -1).flatten(-2)
        return torch.cat([paired, last], -1)
    return torch.stack([even, odd], -1).flatten(-2)


def fourier_synthesize(coefficients: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch r+1"]:
    """Cosines of frequency 1 .. K//2, then sines of frequency 1 .. (K-1)//2."""
    num = coefficients.shape[-1] + 1
    num_sines = (num - 1) // 2
    cosine, sine = coefficients[..., : num // 2], coefficients[..., num // 2 :]
    root = math.sqrt(2.0)
    if num % 2:
        cosine = cosine / root
    else:
        # The alternating vector has no sine beside it and keeps its full length.
        cosine = torch.cat([cosine[..., :num_sines] / root, cosine[..., num_sines:]], -1)
        sine = torch.cat([sine, torch.zeros_like(cosine[..., :1])], -1)
    half = torch.complex(cosine, -sine / root)
    half = torch.cat([torch.zeros_like(half[..., :1]), half], -1)
    return torch.fft.irfft(half, n=num, norm="ortho")


def fourier_analyze(x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch K-1"]:
    """The transpose of `fourier_synthesize`."""
    num = x.shape[-1]
    num_sines = (num - 1) // 2
    half = torch.fft.rfft(x, norm="ortho")
    root = math.sqrt(2.0)
    pairs = half[..., 1 : num_sines + 1]
    alone = half.real[..., num_sines + 1 :]
    return torch.cat([root * pairs.real, alone, -root * pairs.imag], -1)


def cosine_squares(v: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch K"]:
    """sum_j U_kj^2 v_j for the DCT-II basis U, in O(K log K).

    U_kj^2 = (1 + cos(2 pi j (k + 1/2) / K)) / K for j > 0, and 1/K for j = 0.
    """
    num = v.shape[-1]
    turn = _half_turn(num, num, v).square()
    turn = torch.cat([torch.zeros_like(turn[..., :1]), turn[..., 1:]], -1)
    return v.sum(-1, keepdim=True) / num + _inverse(v * turn)


def cosine_step_squares(v: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch K-1"]:
    """sum_j (U_kj - U_{k+1,j})^2 v_j for the DCT-II basis U.

    (U_kj - U_{k+1,j})^2 = l_j (1 - cos(2 pi j (k + 1) / K)) / K with l_j = 4 sin^2(pi j / (2K)).
    """
    num = v.shape[-1]
    weighted = v * path_eigenvalues(num, v)
    return weighted.sum(-1, keepdim=True) / num - _inverse(weighted)[..., 1:]


def _inverse(x: Tensor) -> Tensor:
    """Real part of the inverse Fourier transform; MKL refuses batches of none (an axis of one copy)."""
    return torch.fft.ifft(x).real if x.numel() else x.real


def path_eigenvalues(num: int, like: Tensor) -> Float[Tensor, " {num}"]:
    """Laplacian eigenvalues 4 sin^2(pi j / (2K)) of a path of K copies, j = 0 .. K - 1."""
    j = torch.arange(num, dtype=like.dtype, device=like.device)
    return 4 * (j * (math.pi / (2 * num))).sin().square()
