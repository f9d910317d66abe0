"""The loss of the errors that the samples of a batch share, band by band: `DistributionMatchingLoss`.

B samples of this process, G of all processes, n bands, C channels, h,w latent height and width, D = C·h·w, D_b the
degrees of freedom of a band. A sample is active if its weight is above 0.

    KERNELS, STATISTICS, TIMESTEP_WEIGHTS   what is compared with what, and how much each pair or sample counts
    SampleErrors                            what the loss needs to know of every sample, of all processes
    UsualErrors                             running means of the size of the error at each noise level
    Bank                                    sums of past errors
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from trainkit.frequency.bands import TINY, Bands, LowPass, cached, refuse_unknown, widened

BAND_NORMS = ("grid", "dof", "whiten")
BINS = 8  # of log SNR, over the window
DECAY = 0.99  # of the running means: they cover about the last hundred visits of a bin

# ----------------------------------------------------------------------------------------------------------------------
# The statistic: which samples are compared with which


def same_class(features: Tensor, active: Tensor) -> Tensor:
    """1 where two samples have the same features."""
    return (features[:, None] == features[None]).all(-1).to(features)


def rbf(features: Tensor, active: Tensor, widths: Sequence[float] = (1.0,)) -> Tensor:
    """Mean over widths of exp(−|f_i − f_j|²/2σ²), σ = width · the median distance of two active samples."""
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")  # [G,G]
    pairs = active[:, None] & active & ~torch.eye(len(active), dtype=torch.bool, device=active.device)
    median = distances.masked_fill(~pairs, math.nan).nanmedian().nan_to_num(1.0).clamp(min=TINY)
    return torch.stack([(-0.5 * (distances / (width * median)) ** 2).exp() for width in widths]).mean(0)


# Features [G,F], active [G] -> k [G,G], k_ii = 1. Every kernel keeps the optimum (Muandet et al. 2020, "Kernel
# Conditional Moment Test via Maximum Moment Restriction"): the right denoiser has E[h(z, c)·error] = 0 for every h.
KERNELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda features, active: features.new_ones(len(features), len(features)),
    "class": same_class, "text": rbf, "latent": partial(rbf, widths=(0.5, 1.0, 2.0)),
}
# w_i w_j k_ij [G,G], which pairs are of one image (the diagonal too) bool [G,G] -> what each pair counts
STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda pairs, same: pairs,
    "diagonal": lambda pairs, same: pairs.diagonal().diag(),
    "u": lambda pairs, same: pairs.masked_fill(same, 0),
}
# snr [G], usual |e|²/D at its level [G] -> factor of the error [G]
TIMESTEP_WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x0": lambda snr, usual: torch.ones_like(snr),
    "eps": lambda snr, usual: snr.sqrt(),
    "whiten": lambda snr, usual: usual.rsqrt(),
}

# ----------------------------------------------------------------------------------------------------------------------
# The samples of all processes

Gather = Callable[[Tensor], tuple[Tensor, int]]  # my rows -> the rows of all processes, index of my first


def single_process(rows: Tensor) -> tuple[Tensor, int]:
    """The gather of a process that is alone."""
    return rows, 0


def digits(labels: Tensor) -> Tensor:
    """Integers [B] as four numbers below 2^16, which fp32 holds exactly -> [B,4] fp32."""
    return torch.stack([(labels >> shift) & 0xFFFF for shift in (0, 16, 32, 48)], 1).float()


@dataclass(frozen=True, eq=False)
class SampleErrors:
    """What the statistic needs of samples, without a graph. A sample that is not active has error 0 and SNR 1."""

    error: Tensor  # [G,n,C,h,w]  P_b (x̂0 − x0)
    weight: Tensor  # [G]
    snr: Tensor  # [G]
    energy: Tensor  # [G,n+1]  |P_b e|²/D_b of each band, then |e|²/D
    slope: Tensor  # [G,2,n]  <P_b x0, P_b x̂0> and |P_b x̂0|²
    alike: Tensor  # [G,F]  what the kernel compares
    image: Tensor  # [G,4]  the digits of an image's number; [G,0]: every sample is another image

    @property
    def active(self) -> Tensor:
        return self.weight > 0

    @property
    def same(self) -> Tensor:
        """Which pairs are of one image, so that their errors are not independent -> bool [G,G]."""
        itself = torch.eye(len(self.weight), dtype=torch.bool, device=self.weight.device)
        return itself | same_class(self.image, self.active).bool() if self.image.shape[1] else itself

    def gathered(self, gather: Gather) -> tuple[SampleErrors, int]:
        """-> the samples of all processes with latents of this shape, index of my first. It calls `gather` once.

        Everything travels as channels of h·w numbers, so that only samples of the same h and w have the same shape.
        """
        h, w = self.error.shape[-2:]
        parts = [getattr(self, field.name) for field in fields(self)]
        sizes = [math.prod(part.shape[1:]) for part in parts]

        # All numbers of a sample in one row, filled up to whole channels.
        flat = torch.cat([part.reshape(len(part), size) for part, size in zip(parts, sizes, strict=True)], 1)
        channels = -(-flat.shape[1] // (h * w))
        spare = channels * h * w - flat.shape[1]
        rows, first = gather(F.pad(flat, (0, spare)).view(len(flat), channels, h, w))

        # The same backwards, for the samples of everybody.
        *pieces, _ = rows.flatten(1).split([*sizes, spare], 1)
        shapes = [(len(rows), *part.shape[1:]) for part in parts]
        return SampleErrors(*(piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True))), first


# ----------------------------------------------------------------------------------------------------------------------
# What lasts from call to call


class UsualErrors:
    """The usual size of the error at each noise level: running means per bin of log SNR, free of their start."""

    def __init__(self, window: tuple[float, float], bands: int):
        low, high = window
        if not 0 <= low < high < math.inf:
            raise ValueError(f"the window of SNR {low:g} to {high:g} is empty: give the lower end first")
        self.ends = math.log(max(low, high * 1e-6)), math.log(high)
        self.total, self.count = torch.zeros(BINS, bands + 1), torch.zeros(BINS, 1)

    def bins(self, snr: Tensor) -> Tensor:
        """[G] -> long [G]; levels outside of the window fall into the bins at its ends."""
        low, high = self.ends
        return ((snr.log() - low) / (high - low) * BINS).clamp(0, BINS - 1).long()

    def after(self, sizes: Tensor) -> UsualErrors:
        """The means after samples of all processes, [N,3+n]: weight, snr, energy. Only active, finite ones count."""
        weight, snr, energy = sizes[:, 0], sizes[:, 1], sizes[:, 2:]
        valid = (weight > 0) & energy.isfinite().all(1)
        inside = F.one_hot(self.bins(snr), BINS).to(energy) * valid[:, None]  # [N,BINS]
        visits = inside.sum(0)[:, None]  # [BINS,1]
        mean = inside.T @ torch.where(valid[:, None], energy, 0) / visits.clamp(min=1)
        keep = torch.where(visits > 0, DECAY, 1.0)
        after = copy(self)
        after.total = self.total.to(sizes.device) * keep + mean
        after.count = self.count.to(sizes.device) * keep + (visits > 0)
        return after

    def at(self, bins: Tensor) -> Tensor:
        """-> [G,n+1]: |P_b e|²/D_b of each band, then |e|²/D."""
        return (self.total / self.count.clamp(min=TINY)).clamp(min=TINY)[bins]


class Bank:
    """Sums of past errors, scaled as the term scales them; they stand for B · decay / (1 − decay) samples at batch B.

    There is one sum for each (bin of log SNR, class, latent shape), and every visit decays it. It has n·C·h·w numbers;
    for the kernel class there are as many of them as captions. Reading the keys waits for the device once a call.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.sums: dict[tuple[int, ...], Tensor] = {}  # each [n,C,h,w]
        self.counts: dict[tuple[int, ...], float] = {}

    def keys(self, bins: Tensor, samples: SampleErrors) -> list[tuple[int, ...]]:
        label = torch.cat([bins[:, None].to(samples.alike), samples.alike], 1).long()
        return [(*key, *samples.error.shape[2:]) for key in label.tolist()]

    def recall(self, keys: Sequence[tuple[int, ...]], like: Tensor) -> tuple[Tensor, Tensor]:
        """What is remembered for each of the samples `like` [G,n,C,h,w] -> sums of that shape, counts [G]."""
        sums = torch.zeros_like(like)
        for i, key in enumerate(keys):
            if key in self.sums:
                sums[i] = self.sums[key]
        return sums, like.new_tensor([self.counts.get(key, 0.0) for key in keys])

    def update(self, keys: Sequence[tuple[int, ...]], weight: Tensor, scaled: Tensor) -> None:
        """Add weight [G] · scaled [G,n,C,h,w]; only active and finite samples leave a trace."""
        finite = weight * scaled.flatten(1).isfinite().all(1)
        added = [(key, w, errors) for key, w, errors in zip(keys, finite.tolist(), scaled, strict=True) if w > 0]
        for key, w, errors in added:
            self.sums[key] = w * errors + (self.sums[key].to(errors) if key in self.sums else 0)
            self.counts[key] = w + self.counts.get(key, 0.0)
        for key in dict.fromkeys(key for key, _, _ in added):
            self.sums[key] *= self.decay
            self.counts[key] *= self.decay


# ----------------------------------------------------------------------------------------------------------------------
# The loss


class DistributionMatchingLoss:
    """What the errors of a batch have in common, band by band, as losses [B] whose mean over all G samples is the term.

        r_bi = τ_bi · P_b (x̂0_i − x0_i)        M_ij by `statistic`, from w_i w_j k_ij
        term = Σ_b κ_b (1/G) Σ_ij M_ij <r_bi, r_bj>

        statistic  sum       M = G · w_i w_j k_ij: Σ_b κ_b |Σ_i w_i r_bi|², which grows with the batch (Real-Fake)
                   diagonal  M = G · w_i² δ_ij: the part of sum that comes from each sample alone, a control
                   u         M = G · w_i w_j k_ij / Σ_{i≠j} w_i w_j k_ij, 0 for i = j: the unbiased |mean error|². Its
                             expectation is the same for every batch, number of processes and accumulation (with the
                             kernel none and every sample active). It may be negative. Samples of one `picture` are no
                             pair, because the right denoiser's errors of it are not independent
        κ_b        gain · c_b / D (band_norm grid) or gain · c_b / D_b (dof, whiten), c = weights, lowest band first
        τ_bi       by timestep_weight 1 (x0), √snr_i (eps) or 1/√s (whiten), times 1/√s_b for band_norm whiten; s and
                   s_b are the usual |e|²/D and |P_b e|²/D_b at that noise level, running means over the run
        kernel     k: 1 (none), 1 for equal integers `alike` [B] (class), by the distance of `alike` [B,F] (the others)
        bank       decay of a memory of past errors, which are compared with a sample too (u only); 0: none
        window     lowest and highest SNR; 8 bins between them have an s each
        lone       what a call with one sample over all processes is, which u has nothing to compare with: refused, or
                   with lone=True a term of 0, where batches differ in size

    r_j of the others are constants, so no graph crosses samples or processes, and the gradient of a sample is the exact
    one of the term, 2 Σ_b κ_b m_bi with m_bi = Σ_j M_ij r_bj. Over processes gradients are to be summed, not averaged.
    `gather` returns the rows of all processes; every call uses it twice, also with 0 rows or weights of 0.

    Sources: Yuan et al. 2024, "Real-Fake: Effective Training Data Synthesis Through Distribution Matching" (the sum);
    Hoeffding 1948, "A Class of Statistics with Asymptotically Normal Distribution" (U). Raises ValueError for values
    that do not go together.
    """

    def __init__(
        self, *, gain: float, statistic: str = "u", method: str = "dct", wavelet: str = "db3", levels: int = 2,
        boundary: str = "zero", backend: str = "matrix", weights: Sequence[float] = (0.7, 0.3),
        band_norm: str = "whiten", timestep_weight: str = "x0", kernel: str = "none", bank: float = 0.0,
        window: tuple[float, float] = (0.1925, 3.07), gather: Gather = single_process, lone: bool = False,
    ):
        for name, value, choices in (
            ("statistic", statistic, STATISTICS), ("band_norm", band_norm, BAND_NORMS), ("kernel", kernel, KERNELS),
            ("timestep_weight", timestep_weight, TIMESTEP_WEIGHTS),
        ):
            refuse_unknown(name, value, choices)
        if not 0 <= gain < math.inf or min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise ValueError(f"gain {gain} and weights {tuple(weights)} must be finite and not negative, and one "
                             "weight above 0")
        if band_norm == timestep_weight == "whiten":
            raise ValueError("band_norm whiten already divides by the usual error at each noise level, which "
                             "timestep_weight whiten would do again: use x0 or eps there, or another band_norm")
        if statistic == "diagonal" and kernel != "none":
            raise ValueError(f"the statistic diagonal compares no two samples, so the kernel {kernel} has no effect: "
                             "leave it at none, or use the statistic u or sum")
        if not 0 <= bank < 1 or bank and (statistic != "u" or kernel not in ("none", "class")):
            raise ValueError(f"a bank of decay {bank} needs the statistic u, the kernel none or class, and a decay "
                             f"from 0 to below 1 (here {statistic}, {kernel})")
        self.bands = Bands(LowPass(method, wavelet, levels, boundary, backend), len(weights))
        self.gain, self.weights, self.statistic, self.kernel = gain, tuple(weights), statistic, kernel
        self.band_norm, self.timestep_weight, self.gather, self.lone = band_norm, timestep_weight, gather, lone
        self.usual_errors = UsualErrors(window, len(weights))
        self.bank = Bank(bank) if bank else None
        self.report_sums: Tensor | None = None  # sums over the calls since `describe`, on the device

    def __call__(
        self, x0_hat: Tensor, x0: Tensor, *, snr: Tensor, weight: Tensor, alike: Tensor | None = None,
        picture: Tensor | None = None, observe: bool = True,
    ) -> Tensor:
        """x0_hat, x0 [B,C,h,w], snr and weight [B] -> losses [B], fp32. A sample of weight 0 does not count.

        alike    [B] of integers (kernel class) or [B,F]: what the kernel compares
        picture  [B] of integers, equal for samples of one image; None: no two samples are
        observe  whether the running means, the bank and `describe` learn of this call; not in validation. The losses
                 are the same either way

        Raises ValueError for the statistic u of one sample without a bank (see `lone`), and without what the kernel
        compares.
        """
        with torch.autocast(x0.device.type, enabled=False):
            x0_hat = widened(x0_hat)
            x0 = x0.detach().to(x0_hat)
            error = self.bands.split(x0_hat - x0).transpose(0, 1)  # [B,n,C,h,w]

            # What my samples have in common with those of all processes, as constants.
            with torch.no_grad():
                mine = self._samples(error.detach(), x0, snr, weight, self._features(alike, error), picture)
                samples, first = mine.gathered(self.gather)
                sizes, _ = self.gather(torch.cat([mine.weight[:, None], mine.snr[:, None], mine.energy], 1))
                usual = self.usual_errors.after(sizes)
                if observe:
                    self.usual_errors = usual
                one_shape = len(samples.weight) == len(sizes)
                factor, common = self._compare(samples, usual, one_shape=one_shape, observe=observe)

            # The value is <r, m>; its gradient counts twice, because r is on both sides of the pairs.
            here = slice(first, first + len(x0))
            scaled = torch.where(column(mine.active), factor[here] * error, 0)
            values = self._inner(scaled, common[here])
            return 2 * values - values.detach()

    def low(self, x: Tensor) -> Tensor:
        """The lowest band of x [B,C,h,w], by which the kernel latent compares noised latents."""
        return self.bands.low(x)

    def require(self, latents: Sequence[int]) -> None:
        """Raises ValueError for latents of a shape (C,h,w) that these bands cannot split."""
        self.bands.low.refuse_size(*latents[1:])
        self.bands.degrees(latents)

    def describe(self) -> dict[str, float]:
        """Means over the calls since last asked, per band (names low, high or band0, band1, ...):

            u      U_b/D_b of r, the part that samples share; in units of a band's usual error where it is whitened
            z      U_b over its standard deviation for independent errors of equal size
            error  |P_b e|²/D_b, in units of x0
            slope  <P_b x0, P_b x̂0>/|P_b x̂0|²: below 1 where x̂0 has too much of the band, above 1 where too little

        and snr, bin, loss. Empty when no sample was active. Waits for the device.
        """
        if self.report_sums is None:
            return {}
        sums, self.report_sums, n = self.report_sums.tolist(), None, self.bands.count
        u, z, error, product, square = (sums[k * n:(k + 1) * n] for k in range(5))
        snr, bins, loss, compared, calls = sums[5 * n:]
        if not calls:
            return {}
        means = {"snr": snr / calls, "bin": bins / calls, "loss": loss / calls}
        for b, name in enumerate(self.bands.names):
            means[f"error_{name}"] = error[b] / calls
            if compared:
                means |= {f"u_{name}": u[b] / compared, f"z_{name}": z[b] / compared}
            if square[b]:
                means[f"slope_{name}"] = product[b] / square[b]
        return {f"dist_match/{name}": value for name, value in means.items()}

    def pack(self) -> tuple[dict[str, Tensor], dict]:
        """All that lasts from call to call -> (tensors, JSON)."""
        bank = self.bank or Bank(0)
        tensors = {"scales.total": self.usual_errors.total, "scales.count": self.usual_errors.count}
        tensors |= {f"bank.{i}": errors for i, errors in enumerate(bank.sums.values())}
        packed = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        return packed, {"bank": [[list(key), count] for key, count in bank.counts.items()]}

    def unpack(self, tensors: dict[str, Tensor], data: dict) -> None:
        """Undo `pack`. Raises ValueError for the state of a loss with other bands, or with a bank that is not here."""
        total, count = tensors["scales.total"], tensors["scales.count"]
        if total.shape != self.usual_errors.total.shape or data["bank"] and not self.bank:
            raise ValueError("the saved state of distribution matching has another number of bands, or a bank that is "
                             "not asked for here: go on with the settings of that run, or start anew")
        self.usual_errors.total, self.usual_errors.count = total.clone(), count.clone()
        if self.bank:
            self.bank.counts = {tuple(key): count for key, count in data["bank"]}
            self.bank.sums = {key: tensors[f"bank.{i}"].clone() for i, key in enumerate(self.bank.counts)}

    def _samples(self, error: Tensor, x0: Tensor, snr: Tensor, weight: Tensor, alike: Tensor, image: Tensor | None
                 ) -> SampleErrors:
        """What the other processes need to know of my samples; error [B,n,C,h,w]."""
        weight, snr = weight.detach().to(error), snr.detach().to(error)
        active = weight > 0
        error = torch.where(column(active), error, 0)
        clean = self.bands.split(x0).transpose(0, 1)
        recovered = clean + error
        degrees = cached(float64_vector, *self.bands.degrees(x0.shape[1:]), like=error)
        whole = error.sum(1).flatten(1).square().mean(1, keepdim=True)  # bands add up, but may not be orthogonal
        energy = torch.cat([inner(error, error) / degrees, whole], 1)
        slope = torch.stack([inner(clean, recovered), inner(recovered, recovered)], 1)
        images = error.new_zeros(len(error), 0) if image is None else digits(image).to(error)
        return SampleErrors(error, weight, torch.where(active, snr, 1), energy, slope, alike, images)

    def _features(self, alike: Tensor | None, like: Tensor) -> Tensor:
        """What the kernel compares -> [B,F]."""
        if (alike is None) != (self.kernel == "none"):
            raise ValueError(f"the kernel is {self.kernel}: `alike`, by which it compares samples, must be given for "
                             "every kernel but none, and left out for none")
        if alike is None:
            return like.new_zeros(len(like), 0)
        if self.kernel == "class":
            if alike.is_floating_point() or alike.ndim != 1:
                raise ValueError("the kernel class compares by one integer a sample: give `alike` as [B] of integers")
            return digits(alike).to(like)
        return alike.detach().to(like).flatten(1)

    def _compare(self, samples: SampleErrors, usual_errors: UsualErrors, *, one_shape: bool, observe: bool
                 ) -> tuple[Tensor, Tensor]:
        """The factor τ [G,n,1,1,1] of each sample, and what it has in common with the others, m [G,n,C,h,w]."""
        G, weight = len(samples.weight), samples.weight
        if G == 1 and self.statistic == "u" and not (self.bank or self.lone):
            raise ValueError("the statistic u compares samples with one another, and this batch has one: use a batch "
                             "of 2 or more over all processes, or a bank")

        # r: the errors in the units that timestep_weight and band_norm ask for.
        bins = usual_errors.bins(samples.snr)
        usual = usual_errors.at(bins).to(samples.error)  # [G,n+1]
        factor = TIMESTEP_WEIGHTS[self.timestep_weight](samples.snr, usual[:, -1])
        factor = factor[:, None].expand(G, self.bands.count)
        if self.band_norm == "whiten":
            factor = factor * usual[:, :-1].rsqrt()
        factor = factor[..., None, None, None]
        scaled = factor * samples.error  # [G,n,C,h,w]

        # m: the others' r, and those that the bank remembers, each by what the pair counts.
        pairs = KERNELS[self.kernel](samples.alike, samples.active) * weight[:, None] * weight
        pair_weights = STATISTICS[self.statistic](pairs, samples.same)
        common, pair_sum = (pair_weights @ scaled.flatten(1)).view_as(scaled), pair_weights.sum()
        if self.bank:
            keys = self.bank.keys(bins, samples)
            sums, counts = self.bank.recall(keys, scaled)
            common, pair_sum = common + column(weight) * sums, pair_sum + (weight * counts).sum()
            if observe and one_shape:  # else a process would remember what others have not seen
                self.bank.update(keys, weight, scaled)
        common = common * (torch.where(pair_sum > 0, G / pair_sum, 0) if self.statistic == "u" else G)
        if observe:
            self._report(samples, scaled, pairs, bins, self._inner(scaled, common))
        return factor, common

    def _inner(self, r: Tensor, m: Tensor) -> Tensor:
        """Σ_b κ_b <r_b, m_b> of [B,n,C,h,w] -> [B]."""
        degrees = self.bands.degrees(r.shape[2:])
        divisors = [sum(degrees)] * len(degrees) if self.band_norm == "grid" else degrees
        kappa = [self.gain * c / d for c, d in zip(self.weights, divisors, strict=True)]
        return inner(r, m) @ cached(float64_vector, *kappa, like=r)

    def _report(self, samples: SampleErrors, scaled: Tensor, pairs: Tensor, bins: Tensor, values: Tensor) -> None:
        """Add to the sums behind `describe`. A call adds none if no sample is active, or if something is not finite."""
        degrees = cached(float64_vector, *self.bands.degrees(scaled.shape[2:]), like=scaled)
        active = samples.active.to(scaled)
        count = active.sum().clamp(min=1)

        # U_b/D_b, whatever the statistic is, and its standard deviation for independent errors of equal size.
        pair_weights = STATISTICS["u"](pairs, samples.same)
        compared = pair_weights.sum() > 0
        pair_weights = pair_weights / pair_weights.sum().clamp(min=TINY)
        gram = torch.einsum("gnd,hnd->ngh", scaled.flatten(2), scaled.flatten(2))
        u = (pair_weights * gram).sum((1, 2)) / degrees
        size = gram.diagonal(dim1=1, dim2=2).sum(1) / count / degrees
        z = u / (size * (2 * pair_weights.square().sum() / degrees).sqrt()).clamp(min=TINY)

        means = active @ torch.cat([samples.energy[:, :-1], samples.snr[:, None], bins[:, None]], 1) / count
        row = torch.cat([u, z, means[:-2], (active @ samples.slope.flatten(1)), means[-2:],
                         torch.stack([values.mean(), compared.to(u), torch.ones_like(count)])])
        row = torch.where((active.sum() > 0) & row.isfinite().all(), row, 0)
        self.report_sums = row if self.report_sums is None else self.report_sums + row


def float64_vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def column(v: Tensor) -> Tensor:
    """[G] -> [G,1,1,1,1]."""
    return v.view(-1, 1, 1, 1, 1)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a_b, b_b> of [G,n,C,h,w] -> [G,n]."""
    return (a * b).flatten(2).sum(2)
