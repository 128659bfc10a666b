"""The networks, costs, penalties and latent densities of Wasserstein auto-encoders.

What the paper defines (Tolstikhin, Bousquet, Gelly, Schoelkopf, ICLR 2018, arXiv 1711.01558), as
modules and pure functions of tensors. Flags and training are in `main.py`, files in `utils.py`.

The objective is equation 4 of the paper, for an encoder Q(Z|X), a decoder G and a prior P_Z:

    min over Q, G of  E_{x ~ P_X} E_{z ~ Q(Z|x)} [c(x, G(z))]  +  LAMBDA * D_Z(Q_Z, P_Z)

P_Z is N(0, pz_scale^2 I). Q_Z, the aggregated posterior, is the distribution of the codes of all
images. D_Z is a maximum mean discrepancy (`exact_mmd`, `sampled_mmd`) or a discriminator's loss on
codes (`gan_penalty`). A VAE has E_x KL(Q(Z|x) || P_Z) in its place (`kl_divergence`).

Shapes in comments: N images in a batch, C channels, S pixels a side, nz latent dimensions.
"""

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

IMAGE_SIZES = (32, 64, 128, 256)

# The official implementation sums these; the paper's kernel is the one of scale 1.
IMQ_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

# Standard deviation of the pixel noise of --noise=add_noise, for pixels in [-1, 1].
PIXEL_NOISE = 0.01

# A kernel matrix with more entries is computed in blocks of rows; on a GPU, four times as many.
BLOCK_ENTRIES = 2**20


# --------------------------------------------------------------------------------------------------
# Networks


def stage_widths(size: int, nf: int) -> list[int]:
    """Channels after each stage of stride 2, from S down to 4: nf, 2nf, 4nf, 8nf, 8nf, ..."""
    n_stages = int(math.log2(size)) - 2
    return [nf * min(2**stage, 8) for stage in range(n_stages)]


class Encoder(nn.Module):
    """Q(Z|X): images in [0, 1] to a mean and, if it is Gaussian, a variance of their codes.

    Args:
        size: S, one of `IMAGE_SIZES`.
        channels: C, 3 for colour and 1 for grey images.
        nz: latent dimensions.
        nf: channels of the first convolution.
        arch: `dcgan` has 4x4 convolutions, as DCGAN's discriminator has; `paper` has
            the 5x5 ones of the paper's appendix. Both halve the image down to 4x4.
        noise: the randomness of Q(Z|X). `deterministic` has none. `add_noise` adds Gaussian noise
            to the pixels while training. `gaussian` has a variance for each image and dimension.
        symmetric: whether the layers see pixels in [-1, 1] and not in [0, 1].
    """

    def __init__(
        self, size: int, channels: int, nz: int, nf: int, arch: str, noise: str, symmetric: bool
    ):
        super().__init__()
        self.noise, self.symmetric = noise, symmetric
        kernel, padding = (4, 1) if arch == "dcgan" else (5, 2)
        widths = stage_widths(size, nf)
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise([channels, *widths]):
            # A bias would be of no use: the batch norm that follows subtracts it again.
            layers += [nn.Conv2d(n_in, n_out, kernel, 2, padding, bias=False)]
            layers += [nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]
        n_features = widths[-1] * 4 * 4
        if arch == "dcgan":
            # From 4x4 to 1x1. Straight from 4x4, codes are so correlated at the start that WAE-GAN
            # needs several times as many steps to match them to the prior.
            n_features = widths[-1]
            layers += [nn.Conv2d(n_features, n_features, 4, bias=False)]
            layers += [nn.BatchNorm2d(n_features), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.posterior = nn.Linear(n_features, 2 * nz if noise == "gaussian" else nz)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (N, C, S, S) in [0, 1] to mean and log variance, (N, nz) each.

        The log variance is None for an encoder that is not Gaussian.
        """
        if self.symmetric:
            x = 2 * x - 1
        if self.noise == "add_noise" and self.training:
            # Drawn in the memory order of channels-last images, it is 7 times faster on a CPU.
            noise = torch.randn_like(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            x = x + (PIXEL_NOISE if self.symmetric else PIXEL_NOISE / 2) * noise
        # The moments are float32 before noise is added: bfloat16 would round small noise away.
        moments = self.posterior(self.features(x)).float()
        if self.noise != "gaussian":
            return moments, None
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance.clamp(-50, 50)


class Decoder(nn.Module):
    """G: codes to images in [0, 1], by a sigmoid or, if `symmetric`, by a tanh.

    Args as for `Encoder`. `dcgan` starts from 4x4 and doubles by 4x4 transposed convolutions up to
    the image. `paper` starts from 8x8, doubles by 5x5 ones and ends with one of stride 1.
    """

    def __init__(self, size: int, channels: int, nz: int, nf: int, arch: str, symmetric: bool):
        super().__init__()
        self.symmetric = symmetric
        widths = stage_widths(size, nf)[::-1]
        if arch == "dcgan":
            side, kernel = 4, {"kernel_size": 4, "stride": 2, "padding": 1}
            to_image = nn.ConvTranspose2d(widths[-1], channels, **kernel)
        else:
            side, kernel = 8, {"kernel_size": 5, "stride": 2, "padding": 2, "output_padding": 1}
            to_image = nn.ConvTranspose2d(widths[-1], channels, 5, stride=1, padding=2)
        layers: list[nn.Module] = [nn.Linear(nz, widths[0] * side * side), nn.ReLU(inplace=True)]
        layers += [nn.Unflatten(1, (widths[0], side, side))]
        for n_in, n_out in pairwise(widths):
            layers += [nn.ConvTranspose2d(n_in, n_out, **kernel, bias=False)]
            layers += [nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, to_image, nn.Tanh() if symmetric else nn.Sigmoid())
        self.apply(init_weights)

    def forward(self, z: Tensor) -> Tensor:
        """Codes (N, nz) to images (N, C, S, S) in [0, 1]."""
        y = self.layers(z).float()
        return y / 2 + 0.5 if self.symmetric else y


class AutoEncoder(nn.Module):
    """An encoder, a decoder, and the prior of the codes between them. Images are in [0, 1].

    Args are the flags of the same names, as for `Encoder`, and
        pz_scale: standard deviation of the prior.
        amp: whether encoder and decoder compute in bfloat16. Weights, codes and images are float32.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        nz: int,
        nf: int,
        arch: str,
        noise: str,
        input_normalize_sym: bool,
        pz_scale: float,
        amp: bool = False,
    ):
        super().__init__()
        self.nz, self.pz_scale, self.amp = nz, pz_scale, amp
        self.encoder = Encoder(image_size, channels, nz, nf, arch, noise, input_normalize_sym)
        self.decoder = Decoder(image_size, channels, nz, nf, arch, input_normalize_sym)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.encoder.posterior.weight.device

    def autocast(self) -> torch.autocast:
        """The context in which encoder and decoder run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Images (N, C, S, S) to reconstructions, codes, and mean and log variance of Q(Z|x)."""
        with self.autocast():
            mean, log_variance = self.encoder(x)
            code = draw_code(mean, log_variance)
            return self.decoder(code), code, mean, log_variance

    def encode(self, x: Tensor) -> Tensor:
        """Images (N, C, S, S) to codes (N, nz)."""
        with self.autocast():
            return draw_code(*self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Codes (N, nz) to images (N, C, S, S)."""
        with self.autocast():
            return self.decoder(z)

    def sample_prior(self, n: int) -> Tensor:
        """n samples of P_Z = N(0, pz_scale^2 I), (n, nz)."""
        return self.pz_scale * torch.randn(n, self.nz, device=self.device)

    def sample(self, n: int) -> Tensor:
        """n images (n, C, S, S) of samples of the prior."""
        return self.decode(self.sample_prior(n))


class Discriminator(nn.Module):
    """D: the logit of 'this code is a sample of the prior', by layers nz -> 512 x 4 -> 1.

    With `prior_scale`, the log density of N(0, prior_scale^2 I) is added to the logit (as in the
    official CelebA configuration, after Mescheder, Nowozin and Geiger, 2017). The best logit is
    log p(z) - log q(z), and p is known, so only log q(z) is left to learn.
    """

    def __init__(self, nz: int, prior_scale: float | None = None):
        super().__init__()
        self.prior_scale = prior_scale
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise([nz, 512, 512, 512, 512]):
            layers += [nn.Linear(n_in, n_out), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Linear(512, 1))

    def forward(self, z: Tensor) -> Tensor:
        """Codes (N, nz) to logits (N,)."""
        logit = self.layers(z).squeeze(1)
        if self.prior_scale is not None:
            logit = logit + prior_log_density(z, self.prior_scale)
        return logit


def init_weights(module: nn.Module) -> None:
    """Draws convolution weights from N(0, 0.02^2), as DCGAN does; the rest is PyTorch's default."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)


# --------------------------------------------------------------------------------------------------
# Codes and their prior


def draw_code(mean: Tensor, log_variance: Tensor | None) -> Tensor:
    """A draw from Q(Z|x) for each image, (N, nz), from its moments (N, nz)."""
    if log_variance is None:
        return mean
    return mean + torch.randn_like(mean) * torch.exp(log_variance / 2)


def prior_log_density(z: Tensor, pz_scale: float) -> Tensor:
    """log p(z) of N(0, pz_scale^2 I) for codes (N, nz), as (N,)."""
    variance = pz_scale**2
    return -z.square().sum(1) / (2 * variance) - z.shape[1] / 2 * math.log(2 * math.pi * variance)


# --------------------------------------------------------------------------------------------------
# Reconstruction cost


def reconstruction_cost(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """c(x, y) of images in [0, 1], summed over pixels and averaged over the batch; a scalar.

    `l2sq` is 0.05 |x - y|^2, `l2` is 0.2 |x - y| and `l1` is 0.02 |x - y|_1: the official weights,
    for pixels in [-1, 1]. So differences count double here, and LAMBDA means the same whatever the
    networks work in. It is a sum over pixels and channels: at another image size, or in grey,
    another LAMBDA balances it.
    """
    difference = 2 * (x - y).flatten(1)  # (N, C S S)
    if cost == "l2sq":
        return 0.05 * difference.square().sum(1).mean()
    if cost == "l2":
        # The small term keeps the slope of the square root finite at a perfect reconstruction.
        return 0.2 * (difference.square().sum(1) + 1e-8).sqrt().mean()
    return 0.02 * difference.abs().sum(1).mean()


# --------------------------------------------------------------------------------------------------
# WAE-MMD (Algorithm 2)


class Kernel:
    """The kernel of an MMD, and its expectations over the prior P_Z = N(0, v I), v = pz_scale^2.

    Both kernels are mixtures of Gaussians in the distance, k = sum_l w_l exp(-s_l d^2): `RBF` is
    exp(-d^2 / (2 C)), a single one; `IMQ`, the sum over scales of C / (C + d^2), is the integral of
    exp(-t) exp(-t d^2 / C) over t > 0. Here C = 2 nz v, the expected squared distance of two prior
    samples (section 4 of the paper), times the scale. So their expectations have closed forms:

        E exp(-s |q - p|^2) = (1 + 2 s v)^(-nz/2) exp(-s |q|^2 / (1 + 2 s v))
        E exp(-s |p - p'|^2) = (1 + 4 s v)^(-nz/2)

    The quadratic kernel (s(a).s(b))^2 / (nz v^2) is of shrunk points s(z) = z sqrt(f(z)), where
    f(z) = 2 / (1 + |z|^2 / (nz v)). None is longer than sqrt(2 nz v), and samples of the prior keep
    about their length. E[s(p) s(p)^T] = m I by symmetry, so E (s(q).s(p))^2 = m |s(q)|^2 and
    E (s(p).s(p'))^2 = nz m^2, where m = 2 v (1 - E[1 / (1 + |p|^2 / (nz v))]).

    Args:
        nz: latent dimensions.
        pz_scale: standard deviation of the prior.
        name: `IMQ` or `RBF`.
        scales: of IMQ, which is summed over them.
        quadratic: weight of the quadratic kernel, which is added. Its MMD^2 compares the second
            moments E[s(z) s(z)^T], and so it sees each direction of the codes; in many dimensions
            the others see little but the mean of the distances. Without shrinking, a few long codes
            can make training diverge.
        device: of the points.
    """

    def __init__(
        self,
        nz: int,
        pz_scale: float = 1.0,
        name: str = "IMQ",
        scales: tuple[float, ...] = IMQ_SCALES,
        quadratic: float = 0.0,
        device: torch.device | str = "cpu",
    ):
        self.name = name
        v = pz_scale**2
        self.bases = [2 * nz * v * scale for scale in (scales if name == "IMQ" else (1.0,))]
        self.base_column = torch.tensor(self.bases, device=device)[:, None, None]
        self.nz_v = nz * v  # E |p|^2
        self.quadratic = quadratic / (nz * v**2)

        # The trapezoidal rule in log t, exact here to some seven digits. Its weights are float64:
        # the expectations are sums of many terms, and small differences of them count.
        u = torch.linspace(-16, 4, 64, dtype=torch.float64)
        t, weights = u.exp(), torch.exp(u - u.exp())
        weights = weights / weights.sum()
        if name == "IMQ":
            w = weights.repeat(len(self.bases))
            s = torch.cat([t / base for base in self.bases])
        else:
            w = torch.ones(1, dtype=torch.float64)
            s = torch.full_like(w, 1 / (2 * self.bases[0]))
        shrunk = 1 + 2 * s * v
        self.rates = (s / shrunk).float().to(device)  # of |q|^2, in E k(q, p)
        self.factors = (w * shrunk ** (-nz / 2)).float().to(device)
        m = 2 * v * (1 - (weights * (1 + 2 * t / nz) ** (-nz / 2)).sum().item())
        self.quadratic_with_prior = self.quadratic * m
        of_prior = (w * (1 + 4 * s * v) ** (-nz / 2)).sum().item()
        self.of_prior = of_prior + self.quadratic * nz * m**2  # E k(p, p')

    def shrinkage(self, length2: Tensor) -> Tensor:
        """f(z) for points of squared lengths |z|^2."""
        return 2 / (1 + length2 / self.nz_v)

    def matrix(self, a: Tensor, b: Tensor) -> Tensor:
        """k(a_i, b_j) for points (N, nz) and (M, nz), as (N, M)."""
        products = a @ b.T
        a2, b2 = a.square().sum(1, keepdim=True), b.square().sum(1)
        d2 = (a2 + b2 - 2 * products).clamp(min=0)
        if self.name == "RBF":
            values = torch.exp(-d2 / (2 * self.bases[0]))
        elif d2.is_cuda:  # one launch for all scales; a CPU is slower that way
            values = (self.base_column / (self.base_column + d2)).sum(0)
        else:
            values = sum(base / (base + d2) for base in self.bases)
        if self.quadratic:
            # In this order nothing overflows: no |products| is more than |a| |b|.
            shrunk = (products * self.shrinkage(a2)) * (products * self.shrinkage(b2))
            values = values + self.quadratic * shrunk
        return values

    def with_prior(self, q: Tensor) -> Tensor:
        """E k(q_i, p) over the prior for points (N, nz), as (N,)."""
        q2 = q.square().sum(1)
        values = torch.exp(-q2[:, None] * self.rates) @ self.factors
        if self.quadratic:
            values = values + self.quadratic_with_prior * self.shrinkage(q2) * q2
        return values


def sum_of_blocks(statistic: Callable[[Tensor, int, int], Tensor], codes: Tensor) -> Tensor:
    """statistic(codes, 0, N) of codes (N, nz), from blocks of rows when N^2 is large.

    statistic(codes, first, rows) is what rows first, first + 1, ... of the kernel matrix add. A
    block is computed again for its gradient, so memory grows with N and not with N^2.
    """
    n = len(codes)
    rows = max(1, BLOCK_ENTRIES * (4 if codes.is_cuda else 1) // n)
    if rows >= n:
        return statistic(codes, 0, n)
    again = {"use_reentrant": False, "preserve_rng_state": False}
    return sum(checkpoint(statistic, codes, first, rows, **again) for first in range(0, n, rows))


def exact_mmd(codes: Tensor, kernel: Kernel) -> Tensor:
    """The expectation of `sampled_mmd` over the samples of the prior, in closed form; a scalar.

    For codes q (N, nz), samples p of the prior and a kernel k it is

        sum_{i != j} k(q_i, q_j) / (N (N - 1))  -  2 sum_i E k(q_i, p) / N  +  E k(p, p')
    """
    n = len(codes)

    def statistic(points: Tensor, first: int, rows: int) -> Tensor:
        same = kernel.matrix(points[first : first + rows], points)
        return (same.sum(dtype=torch.float64) - same.diagonal(first).sum()) / (n * (n - 1))

    across = kernel.with_prior(codes).double().mean()
    within = sum_of_blocks(statistic, codes)
    return (within - 2 * across + kernel.of_prior).to(codes.dtype)


def sampled_mmd(codes: Tensor, kernel: Kernel, prior: Tensor) -> Tensor:
    """Unbiased estimate of MMD^2 between the codes and the prior (Algorithm 2); a scalar.

    For codes q and prior samples p, (N, nz) each, and a kernel k:

        sum_{i != j} [ k(q_i, q_j) + k(p_i, p_j) ] / (N (N - 1))  -  2 sum_{i, j} k(q_i, p_j) / N^2

    A U-statistic: its mean is zero, and so it is often negative, when the distributions agree. The
    prior samples get no gradient.
    """
    n = len(codes)

    def statistic(points: Tensor, first: int, rows: int) -> Tensor:
        q, p = points[first : first + rows], prior[first : first + rows]
        same = kernel.matrix(q, points) + kernel.matrix(p, prior)
        within = (same.sum() - same.diagonal(first).sum()) / (n * (n - 1))
        return within - 2 * kernel.matrix(q, prior).sum() / n**2

    return sum_of_blocks(statistic, codes)


# --------------------------------------------------------------------------------------------------
# WAE-GAN (Algorithm 1)


def discriminator_loss(logits_prior: Tensor, logits_codes: Tensor) -> Tensor:
    """-mean log D(z) - mean log(1 - D(z~)), from logits (N,) of prior and codes; a scalar."""
    return F.softplus(-logits_prior).mean() + F.softplus(logits_codes).mean()


def gan_penalty(discriminator: nn.Module, codes: Tensor) -> Tensor:
    """-mean log D(z~) of codes (N, nz), the non-saturating loss of Algorithm 1; a scalar.

    The discriminator's weights are constants here: only the codes get a gradient.
    """
    weights = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    return F.softplus(-functional_call(discriminator, weights, (codes,))).mean()


# --------------------------------------------------------------------------------------------------
# VAE, the paper's baseline


def kl_divergence(mean: Tensor, log_variance: Tensor, pz_scale: float = 1.0) -> Tensor:
    """KL(N(mean, variance) || P_Z) of each image's moments (N, nz), averaged; a scalar.

    With the cost 0.05 |x - y|^2, the objective cost + LAMBDA KL is LAMBDA times the negative ELBO
    of a decoder with Gaussian noise of variance 10 LAMBDA, for pixels in [-1, 1].
    """
    log_ratio = log_variance - 2 * math.log(pz_scale)
    terms = mean.square() / pz_scale**2 + log_ratio.exp() - 1 - log_ratio
    return terms.sum(1).mean() / 2


# --------------------------------------------------------------------------------------------------
# Pretraining of the encoder


def pretrain_loss(codes: Tensor, pz_scale: float = 1.0) -> Tensor:
    """How far mean and covariance of codes (N, nz) are from the prior's; a scalar.

    The mean over entries of the squared differences, as in the official implementation, but to the
    exact moments of the prior, 0 and pz_scale^2 I, and not to those of a sample.
    """
    mean = codes.mean(0)  # (nz,)
    centred = codes - mean
    covariance = centred.T @ centred / (len(codes) - 1)  # (nz, nz)
    target = pz_scale**2 * torch.eye(codes.shape[1], device=codes.device, dtype=codes.dtype)
    return mean.square().mean() + (covariance - target).square().mean()


def pretrain_floor(n: int, nz: int, pz_scale: float = 1.0) -> float:
    """The expected `pretrain_loss` of n samples of the prior.

    Their mean has variance pz_scale^2 / n in each dimension. An entry of their covariance, a
    Wishart matrix, has variance pz_scale^4 / (n - 1), and twice that on the diagonal.
    """
    return pz_scale**2 / n + pz_scale**4 * (1 + 1 / nz) / (n - 1)


# --------------------------------------------------------------------------------------------------
# Evaluation: the aggregated posterior, a mixture fitted to it, sharpness


def covariance_eigenvalues(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues (nz,) and eigenvectors (nz, nz) of the covariance of codes (N, nz)."""
    nz = codes.shape[1]
    values, vectors = torch.linalg.eigh(codes.double().T.cov().reshape(nz, nz))
    return values.clamp(min=0), vectors


def gaussian_scores(codes: Tensor, pz_scale: float = 1.0) -> Tensor:
    """Squared 2-Wasserstein distance of a Gaussian to the prior; its extreme variances; (3,).

    The Gaussian has the moments of the codes (N, nz). The distance sees directions that the codes
    do not use; an MMD hardly does. Of N samples of the prior it is too large, the more so the fewer
    they are: `prior_scores` says by how much.
    """
    eigenvalues, _ = covariance_eigenvalues(codes)
    mean = codes.double().mean(0)
    w2 = mean.square().sum() + (eigenvalues.sqrt() - pz_scale).square().sum()
    return torch.stack([w2, eigenvalues[0], eigenvalues[-1]])


@cache
def prior_scores(n: int, nz: int, pz_scale: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of `gaussian_scores` of n samples of the prior, (3,) each.

    They are of twenty draws, always the same ones. Codes whose figure is that near cannot be told
    from samples of the prior.
    """
    generator = torch.Generator().manual_seed(0)
    samples = (pz_scale * torch.randn(n, nz, generator=generator) for _ in range(20))
    scores = torch.stack([gaussian_scores(z, pz_scale) for z in samples])
    return scores.mean(0), scores.std(0)


def code_metrics(codes: Tensor, pz_scale: float = 1.0) -> dict[str, float]:
    """How far two codes or more (N, nz) are from the prior, and what as many prior samples score.

    The README explains the figures. `test_w2` is less that of prior samples.
    """
    n, nz = codes.shape
    w2, smallest, largest = gaussian_scores(codes, pz_scale).tolist()
    means, deviations = (scores.tolist() for scores in prior_scores(n, nz, pz_scale))
    return {
        "test_mmd": exact_mmd(codes, Kernel(nz, pz_scale, device=codes.device)).item(),
        "test_w2": w2 - means[0],
        "test_w2_std_of_prior": deviations[0],
        "eigenvalue_min": smallest,
        "eigenvalue_min_of_prior": means[1],
        "eigenvalue_max": largest,
        "eigenvalue_max_of_prior": means[2],
    }


def sharpness(images: Tensor) -> Tensor:
    """Variance of each image after a Laplace filter, for images (N, C, S, S) in [0, 1], as (N,).

    The paper's measure of blur (section 4), on grey values: a blurred image has weak edges.
    """
    weights = [0.299, 0.587, 0.114] if images.shape[1] == 3 else [1.0]
    grey = torch.tensor(weights, device=images.device).view(1, -1, 1, 1)
    laplace = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], device=images.device)
    filtered = F.conv2d((images * grey).sum(1, keepdim=True), laplace.view(1, 1, 3, 3))
    return filtered.flatten(1).var(1, correction=0)


def mixture(weights: Tensor, means: Tensor, covariances: Tensor) -> MixtureSameFamily:
    """The mixture of K Gaussians of weights (K,), means (K, nz) and covariances (K, nz, nz)."""
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))


def nats_from_prior(codes: Tensor, density: MixtureSameFamily, pz_scale: float = 1.0) -> Tensor:
    """The mean over codes (N, nz) of log density(z) - log p(z); a scalar.

    For a density fitted to other codes of the same distribution Q_Z it is, on average, at most
    KL(Q_Z || P_Z), and sees what is not Gaussian.
    """
    codes = codes.double()
    return (density.log_prob(codes) - prior_log_density(codes, pz_scale)).mean()


def spread_points(codes: Tensor, k: int) -> Tensor:
    """k of the codes (N, nz), each drawn by its squared distance to those before (k-means++)."""
    chosen = codes[torch.randint(len(codes), (1,), device=codes.device)]
    distances = torch.full_like(codes[:, 0], math.inf)
    for _ in range(k - 1):
        distances = torch.minimum(distances, (codes - chosen[-1]).square().sum(1))
        # Where all codes are equal there is no distance, and any of them will do.
        pick = (distances / distances.max().clamp(min=1e-300) + 1e-12).multinomial(1)
        chosen = torch.cat([chosen, codes[pick]])
    return chosen


def fit_mixture(codes: Tensor, pz_scale: float = 1.0, components: int = 10) -> dict[str, Tensor]:
    """The arguments of a `mixture` of Gaussians fitted to codes (N, nz) by EM, in float64.

    Samples of it, decoded, are the ex-post density estimation of Ghosh et al., ICLR 2020. A
    component of few codes has too few for a covariance of its own. So each covariance starts from
    2 nz pseudo-codes with the covariance of all codes, and that one from nz samples of the prior.
    """
    codes = codes.double()
    n, nz = codes.shape
    components = min(components, n)
    of_prior = pz_scale**2 * torch.eye(nz).to(codes)
    of_all = (n * codes.T.cov(correction=0).reshape(nz, nz) + nz * of_prior) / (n + nz)

    weights = torch.full((components,), 1 / components).to(codes)
    means = spread_points(codes, components)
    covariances = of_all.expand(components, nz, nz)
    likelihood = -math.inf
    for _ in range(100):
        # E step: the responsibility of each component for each code.
        pairs = zip(means, covariances, strict=True)
        gaussians = [MultivariateNormal(m, c, validate_args=False) for m, c in pairs]
        log_p = torch.stack([g.log_prob(codes) for g in gaussians], 1) + weights.log()
        responsibility = log_p.softmax(1)  # (N, components)
        # M step: the moments of the codes under these weights.
        mass = responsibility.sum(0).clamp(min=1e-12)
        weights = mass / n
        means = responsibility.T @ codes / mass[:, None]
        products = []
        for r, m in zip(responsibility.T, means, strict=True):
            centred = codes - m
            products.append((r[:, None] * centred).T @ centred)
        covariances = torch.stack(products) + 2 * nz * of_all
        covariances = covariances / (mass + 2 * nz)[:, None, None]
        previous = likelihood
        likelihood = log_p.logsumexp(1).mean().item()
        if likelihood - previous < 1e-3:
            break
    return {"weights": weights, "means": means, "covariances": covariances}
