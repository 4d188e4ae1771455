"""Differential privacy of opened sums: every party adds its share of discrete Gaussian noise to its own words.

What is protected is one party's whole contribution to a sum: its series where losses and gradients are opened, its
people's recorded events where outputs are. Each contribution is clipped to a stated L2 norm, so replacing it changes
the sum by at most twice that. The noise is drawn on integers, exactly (no float decides anything), with a ChaCha20
stream; each party's share has the variance σ²/h, so the noise of any h honest parties is enough whoever else colludes.
The books are `dp-accounting`'s: the discrete Gaussian obeys the Rényi bound of the continuous one, and the sum of
shares does too, up to a term that is 0 in double precision at the widths used here.

Sources: Canonne, Kamath, Steinke 2020 (the discrete Gaussian and its sampler); Kairouz, Liu, Steinke 2021 (its sum).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from lpm import ring
from lpm.errors import InputError
from lpm.privacy.policy import MODES

__all__ = [
    "Mechanism",
    "SecretStream",
    "calibrated_multiplier",
    "delta_of",
    "discrete_gaussian",
    "epsilon_lower_bound",
    "epsilon_of",
]

_NARROWEST = 2.0**10
"""Least standard deviation of one party's share, in words: the sum of shares is then as good as one draw."""

_CHUNK = 4096


class SecretStream:
    """Random bits that only the holder of a key can repeat.

    Args:
        key: secret, any length.
        context: what they are for: another context gives independent bits.

    Guarantee: the same key and context give the same bits, so an answer that is repeated after a crash has the same
        noise and tells nothing new.
    """

    def __init__(self, key: bytes, context: bytes) -> None:
        derived = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"lpm dp noise 1" + context).derive(key)
        self._cipher = Cipher(ChaCha20(derived, bytes(16)), mode=None).encryptor()
        self._left, self._bits = 0, 0

    def __repr__(self) -> str:
        return "SecretStream()"

    def _take(self, count: int) -> int:
        while self._bits < count:
            fresh = int.from_bytes(self._cipher.update(bytes(_CHUNK)), "little")
            self._left |= fresh << self._bits
            self._bits += 8 * _CHUNK
        taken = self._left & ((1 << count) - 1)
        self._left >>= count
        self._bits -= count
        return taken

    def below(self, limit: int) -> int:
        """A uniform whole number from 0 and below a limit, without bias."""
        count = (limit - 1).bit_length()
        while (drawn := self._take(count)) >= limit:
            pass
        return drawn


def _bernoulli_exp(numerator: int, denominator: int, stream: SecretStream) -> bool:
    """True with probability exp(−numerator/denominator), exactly."""
    while numerator > denominator:
        if not _bernoulli_exp(1, 1, stream):
            return False
        numerator -= denominator
    k = 1
    while stream.below(k * denominator) < numerator:
        k += 1
    return k % 2 == 1


def _discrete_laplace(scale: int, stream: SecretStream) -> int:
    while True:
        first = stream.below(scale)
        if not _bernoulli_exp(first, scale, stream):
            continue
        whole = 0
        while _bernoulli_exp(1, 1, stream):
            whole += 1
        value, negative = first + scale * whole, stream.below(2)
        if not (negative and value == 0):
            return -value if negative else value


def discrete_gaussian(numerator: int, denominator: int, stream: SecretStream) -> int:
    """One draw of the discrete Gaussian with σ² = numerator/denominator: P(k) ∝ exp(−k²/2σ²), exactly.

    Args:
        numerator: of σ², above 0.
        denominator: of σ², above 0.
        stream: of random bits.

    Source: Canonne, Kamath, Steinke 2020, algorithms 1 to 3.
    """
    scale = math.isqrt(numerator // denominator) + 1
    while True:
        drawn = _discrete_laplace(scale, stream)
        off = abs(drawn) * denominator * scale - numerator
        if _bernoulli_exp(off * off, 2 * numerator * denominator * scale * scale, stream):
            return drawn


@dataclass(frozen=True)
class Mechanism:
    """The noise that a session's parties have agreed on.

    Args:
        mode: one of `MODES`.
        multiplier: standard deviation of the noise that h honest parties add up to, per L2 sensitivity.
        honest: h, whose noise is counted on.
        clips: "outputs", "loss" and "gradient" → largest L2 norm of one party's part in one draw.
    """

    mode: str = "none"
    multiplier: float = 4.0
    honest: int = 2
    clips: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"privacy.mode is {self.mode!r}: {', '.join(MODES)}.")
        if not 0 < self.multiplier < math.inf:
            raise InputError(f"privacy.noise is {self.multiplier}: a number above 0.")
        if self.honest < 1:
            raise InputError(f"privacy.honest is {self.honest}: a whole number from 1.")
        for name, clip in self.clips.items():
            if not 0 < clip < math.inf:
                raise InputError(f"privacy.clip_{name} is {clip}: a number above 0.")

    @property
    def label(self) -> str:
        """In words, for manifest, ledger and report."""
        if self.mode == "none":
            return "none"
        clips = ", ".join(f"{name} ≤ {clip:g}" for name, clip in self.clips.items() if self.covers(name))
        return f"{self.mode}: noise {self.multiplier:g} × sensitivity by any {self.honest} parties; clipped to {clips}"

    def covers(self, tensor: str) -> bool:
        """Whether a tensor is opened with noise."""
        if tensor == "outputs":
            return self.mode != "none"
        return self.mode == "outputs+gradients"

    def releases(self, kind: str) -> Mapping[str, int]:
        """Noise multiplier → number of noisy sums that a task of a kind opens."""
        count = {"simulate": int(self.covers("outputs")), "evaluate": 2 * int(self.covers("loss"))}.get(kind, 0)
        return {repr(self.multiplier): count} if count else {}

    def protect(self, tensor: str, values: NDArray[np.float64], stream: SecretStream, bits: int) -> NDArray[np.int64]:
        """One party's words with its share of the noise.

        Args:
            tensor: which clip applies.
            values: [K, any]: one row for each draw; what is not finite counts as 0.
            stream: the party's secret bits for this answer and tensor.
            bits: fraction bits of the words.

        Returns:
            [K, any] words.

        Raises:
            InputError: if the noise would be too narrow for these words, or could overflow.
        """
        clip, finite = self.clips[tensor], np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        norm = np.linalg.norm(finite, axis=1, keepdims=True)
        words = ring.encode(finite * np.minimum(1.0, clip / np.maximum(norm, clip)), bits)
        # Rounding moves each word by at most ½, in what is replaced and in what replaces it.
        sensitivity = 2.0 * clip * math.sqrt(len(values)) * 2.0**bits + math.sqrt(words.size)
        sigma = self.multiplier * sensitivity / math.sqrt(self.honest)
        if not _NARROWEST <= sigma < 2.0**55:
            raise InputError(
                f"The noise of {tensor} is {sigma:.3g} words wide: from {_NARROWEST:g} to 2^55.",
                "Change privacy.noise, the clip or federation.fraction_bits.",
            )
        variance = math.ceil(sigma * sigma)
        noise = np.array([discrete_gaussian(variance, 1, stream) for _ in range(words.size)], dtype=np.int64)
        return words + noise.reshape(words.shape)


def epsilon_of(noise: Mapping[str, int], delta: float) -> float:
    """The ε of all noisy sums together, by the Rényi accountant of `dp-accounting`.

    Args:
        noise: multiplier, as text → how many sums had it.
        delta: of (ε, δ).

    Returns:
        ε; 0 if nothing was opened with noise.
    """
    return _epsilon(tuple(sorted((float(z), count) for z, count in noise.items() if count)), delta)


@functools.lru_cache(maxsize=4096)
def _epsilon(noise: tuple[tuple[float, int], ...], delta: float) -> float:
    if not noise:
        return 0.0
    import dp_accounting

    accountant = dp_accounting.rdp.RdpAccountant()
    for multiplier, count in noise:
        accountant.compose(dp_accounting.GaussianDpEvent(multiplier), count)
    return float(accountant.get_epsilon(delta))


def delta_of(noise: Mapping[str, int], epsilon: float) -> float:
    """The δ of all noisy sums together at an ε; see `epsilon_of`."""
    import dp_accounting

    accountant = dp_accounting.rdp.RdpAccountant()
    for multiplier, count in noise.items():
        accountant.compose(dp_accounting.GaussianDpEvent(float(multiplier)), count)
    return float(accountant.get_delta(epsilon))


def calibrated_multiplier(epsilon: float, delta: float, releases: int) -> float:
    """The least noise multiplier with which so many sums cost at most ε.

    Args:
        epsilon: the budget.
        delta: of (ε, δ).
        releases: how many sums are opened with it.
    """
    import dp_accounting

    def event(multiplier: float) -> object:
        return dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(multiplier), releases)

    found = dp_accounting.calibrate_dp_mechanism(dp_accounting.rdp.RdpAccountant, event, epsilon, delta)
    return float(found)


def epsilon_lower_bound(
    hits: int, runs: int, false_hits: int, false_runs: int, delta: float, confidence: float
) -> float:
    """What an auditor can prove of ε: below it, the two counts could not both have come about.

    Args:
        hits: runs on the one data set in which the auditor's event came about.
        runs: how many there were.
        false_hits: the same on the neighbouring data set.
        false_runs: how many there were.
        delta: of (ε, δ).
        confidence: that the bound holds, such as 0.999.

    Returns:
        ln((p − δ)/q) for the Clopper–Pearson lower limit p of the one and upper limit q of the other; at least 0.
    """
    from scipy.stats import beta

    wrong = (1.0 - confidence) / 2
    low = float(beta.ppf(wrong, hits, runs - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - wrong, false_hits + 1, false_runs - false_hits)) if false_hits < false_runs else 1.0
    return max(0.0, math.log((low - delta) / high)) if low > delta else 0.0
