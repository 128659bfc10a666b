"""The networks, costs, penalties and latent densities of Wasserstein auto-encoders.

What the paper defines (Tolstikhin, Bousquet, Gelly, Schoelkopf, ICLR 2018, arXiv 1711.01558), as
modules and pure functions of tensors. Flags and training are in `main.py`, files in `utils.py`.

The objective is equation 4 of the paper, for an encoder Q(Z|X), a decoder G and a prior P_Z:

    min over Q, G of  E_{x ~ P_X} E_{z ~ Q(Z|x)} [c(x, G(z))]  +  LAMBDA * D_Z(Q_Z, P_Z)

P_Z is N(0, pz_scale^2 I). Q_Z, the aggregated posterior, is the distribution of the codes of all
images. D_Z is a maximum mean discrepancy (`mmd_penalty`) or a discriminator's loss on codes
(`gan_penalty`). A VAE has E_x KL(Q(Z|x) || P_Z) in its place (`kl_divergence`).

Shapes in comments: N images in a batch, nz latent dimensions, S the side of an image in pixels.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.func import functional_call

IMAGE_SIZES = (32, 64, 128, 256)

# The official implementation sums these; the paper's kernel is the one of scale 1.
IMQ_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

# Standard deviation of the pixel noise of --noise=add_noise, for pixels in [-1, 1].
PIXEL_NOISE = 0.01

# Codes, and as many prior draws, that the median heuristic looks at.
BANDWIDTH_SAMPLE = 1024

# Kernel matrices with more entries are computed in blocks of rows.
BLOCK_ENTRIES = 2**20


# --------------------------------------------------------------------------------------------------
# Networks


def stage_widths(image_size: int, nf: int) -> list[int]:
    """Channels after each stage of stride 2, from S down to 4: nf, 2nf, 4nf, 8nf, 8nf, ..."""
    n_stages = int(math.log2(image_size)) - 2
    return [nf * min(2**stage, 8) for stage in range(n_stages)]


class Encoder(nn.Module):
    """The moments of Q(Z|X), for images.

    Args:
        image_size: S, one of `IMAGE_SIZES`.
        nz: latent dimensions.
        nf: channels of the first convolution.
        arch: `dcgan` has 4x4 convolutions, as the decoder and as DCGAN's discriminator; `paper` has
            the 5x5 ones of the paper's appendix. Both halve the image down to 4x4.
        noise: the randomness of Q(Z|X). `deterministic` has none. `add_noise` adds Gaussian noise
            to the pixels while training. `gaussian` has a variance for each image and dimension.
        symmetric: whether pixels are in [-1, 1] or in [0, 1].
    """

    def __init__(
        self, image_size: int, nz: int, nf: int, arch: str, noise: str, symmetric: bool = False
    ):
        super().__init__()
        self.noise = noise
        self.pixel_noise = PIXEL_NOISE if symmetric else PIXEL_NOISE / 2
        kernel, padding = (4, 1) if arch == "dcgan" else (5, 2)
        widths = stage_widths(image_size, nf)
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise([3, *widths]):
            # No bias: the batch norm that follows would subtract it again.
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
        self.moments = nn.Linear(n_features, 2 * nz if noise == "gaussian" else nz)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (N, 3, S, S) to mean and log variance, (N, nz) each.

        The log variance is None for an encoder that is not Gaussian.
        """
        if self.noise == "add_noise" and self.training:
            # Drawn in the memory order of channels-last images, which is 7 times faster on a CPU.
            noise = torch.randn_like(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            x = x + self.pixel_noise * noise
        # To float32 before noise is added: bfloat16 would round small noise away.
        moments = self.moments(self.features(x)).float()
        if self.noise != "gaussian":
            return moments, None
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance.clamp(-50, 50)


class Decoder(nn.Module):
    """G: codes to images, in [0, 1] by a sigmoid or, if `symmetric`, in [-1, 1] by a tanh.

    Args as for `Encoder`. `dcgan` starts from 4x4 and doubles by 4x4 transposed convolutions up to
    the image. `paper` starts from 8x8, doubles by 5x5 ones and ends with one of stride 1.
    """

    def __init__(self, image_size: int, nz: int, nf: int, arch: str, symmetric: bool = False):
        super().__init__()
        widths = stage_widths(image_size, nf)[::-1]
        if arch == "dcgan":
            side, kernel = 4, {"kernel_size": 4, "stride": 2, "padding": 1}
            to_image = nn.ConvTranspose2d(widths[-1], 3, **kernel)
        else:
            side, kernel = 8, {"kernel_size": 5, "stride": 2, "padding": 2, "output_padding": 1}
            to_image = nn.ConvTranspose2d(widths[-1], 3, kernel_size=5, stride=1, padding=2)
        layers: list[nn.Module] = [nn.Linear(nz, widths[0] * side * side), nn.ReLU(inplace=True)]
        layers += [nn.Unflatten(1, (widths[0], side, side))]
        for n_in, n_out in pairwise(widths):
            layers += [nn.ConvTranspose2d(n_in, n_out, **kernel, bias=False)]
            layers += [nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, to_image, nn.Tanh() if symmetric else nn.Sigmoid())
        self.apply(init_weights)

    def forward(self, z: Tensor) -> Tensor:
        """Codes (N, nz) to images (N, 3, S, S)."""
        return self.layers(z)


class AutoEncoder(nn.Module):
    """Encoder and decoder, which train together. Args as for `Encoder`."""

    def __init__(
        self, image_size: int, nz: int, nf: int, arch: str, noise: str, symmetric: bool = False
    ):
        super().__init__()
        self.encoder = Encoder(image_size, nz, nf, arch, noise, symmetric)
        self.decoder = Decoder(image_size, nz, nf, arch, symmetric)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Images (N, 3, S, S) to reconstructions, codes, and the moments of Q(Z|x)."""
        mean, log_variance = self.encoder(x)
        code = draw_code(mean, log_variance)
        return self.decoder(code).float(), code, mean, log_variance


class Discriminator(nn.Module):
    """D: the logit of 'this code is a draw of the prior', by layers nz -> 512 x 4 -> 1.

    With `pz_scale`, the prior's log density is added to the logit (as in the official CelebA
    configuration, after Mescheder, Nowozin and Geiger, 2017). The best logit is
    log p(z) - log q(z), and p is known, so only log q(z) is left to learn.
    """

    def __init__(self, nz: int = 64, width: int = 512, pz_scale: float | None = None):
        super().__init__()
        self.pz_scale = pz_scale
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise([nz, width, width, width, width]):
            layers += [nn.Linear(n_in, n_out), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, z: Tensor) -> Tensor:
        """Codes (N, nz) to logits (N,)."""
        logit = self.layers(z).squeeze(1)
        return logit if self.pz_scale is None else logit + prior_log_density(z, self.pz_scale)


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


def sample_prior(n: int, nz: int, pz_scale: float, device: torch.device | str = "cpu") -> Tensor:
    """n draws of P_Z = N(0, pz_scale^2 I), (n, nz), from the global generator."""
    return pz_scale * torch.randn(n, nz, device=device)


def prior_log_density(z: Tensor, pz_scale: float) -> Tensor:
    """log p(z) of N(0, pz_scale^2 I) for codes (N, nz), as (N,)."""
    variance = pz_scale**2
    return -z.square().sum(1) / (2 * variance) - z.shape[1] / 2 * math.log(2 * math.pi * variance)


# --------------------------------------------------------------------------------------------------
# Reconstruction cost


def reconstruction_cost(
    x: Tensor, y: Tensor, cost: str = "l2sq", symmetric: bool = False
) -> Tensor:
    """c(x, y), summed over the pixels of an image and averaged over the batch; a scalar.

    `l2sq` is 0.05 |x - y|^2, `l2` is 0.2 |x - y| and `l1` is 0.02 |x - y|_1: the official weights.
    Pixels count on the [-1, 1] scale even if the networks work in [0, 1] (`symmetric` false), so
    that LAMBDA means the same in both.

    Raises:
        ValueError: an unknown cost.
    """
    difference = (x - y).flatten(1) * (1 if symmetric else 2)  # (N, 3 S S)
    if cost == "l2sq":
        return 0.05 * difference.square().sum(1).mean()
    if cost == "l2":
        # The small term keeps the slope of the square root finite at a perfect reconstruction.
        return 0.2 * (difference.square().sum(1) + 1e-8).sqrt().mean()
    if cost == "l1":
        return 0.02 * difference.abs().sum(1).mean()
    raise ValueError(f"unknown cost {cost!r}: l2sq, l2 or l1")


# --------------------------------------------------------------------------------------------------
# WAE-MMD (Algorithm 2)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 for points (N, nz) and (M, nz), as (N, M)."""
    return (a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def imq_kernel(
    d2: Tensor, nz: int, pz_scale: float, scales: tuple[float, ...] = IMQ_SCALES
) -> Tensor:
    """Inverse multiquadratics of squared distances: sum over scales s of C / (C + d2).

    C is 2 nz pz_scale^2 s, and 2 nz pz_scale^2 is the expected squared distance of two draws of the
    prior (section 4 of the paper).
    """
    bases = [2 * nz * pz_scale**2 * scale for scale in scales]
    return sum(base / (base + d2) for base in bases)


def rbf_kernel(d2: Tensor, variance: Tensor | float) -> Tensor:
    """Gaussian kernel exp(-d2 / (2 variance)) of squared distances; `variance` is a scalar."""
    return torch.exp(-d2 / (2 * variance))


def quadratic_kernel(a: Tensor, b: Tensor, pz_scale: float) -> Tensor:
    """(a'_i . b'_j)^2 / (nz pz_scale^4) for points (N, nz) and (M, nz), as (N, M).

    Its MMD^2 compares the second moments E[z' z'^T], and so it sees each direction of the codes; in
    many dimensions the other kernels see little but the mean of the distances. The points are
    shrunk to z' = z sqrt(2 / (1 + |z|^2 / (nz pz_scale^2))), which leaves prior draws about as long
    as they are and bounds the kernel: without it, a few long codes can make training diverge.
    """
    nz = a.shape[1]

    def shrunk(z: Tensor) -> Tensor:
        length2 = z.square().sum(1, keepdim=True) / (nz * pz_scale**2)
        return z * (2 / (1 + length2)).sqrt()

    return (shrunk(a) @ shrunk(b).T).square() / (nz * pz_scale**4)


@torch.no_grad()
def median_bandwidth(codes: Tensor, prior: Tensor) -> Tensor:
    """The RBF variance: the median squared distance of the pooled points; a scalar, no gradient.

    Looks at the first `BANDWIDTH_SAMPLE` codes and prior draws, which bounds its cost.
    """
    points = torch.cat([codes[:BANDWIDTH_SAMPLE], prior[:BANDWIDTH_SAMPLE]])
    i, j = torch.triu_indices(len(points), len(points), offset=1, device=points.device)
    # Clamped, so that points that are all equal give a kernel of ones and not 0 / 0.
    return squared_distances(points, points)[i, j].median().clamp(min=1e-12)


def mmd_penalty(
    codes: Tensor,
    prior: Tensor,
    kernel: str = "IMQ",
    pz_scale: float = 1.0,
    scales: tuple[float, ...] = IMQ_SCALES,
    quadratic: float = 0.0,
) -> Tensor:
    """Unbiased estimate of MMD^2 between the codes and the prior (Algorithm 2); a scalar.

    For codes q and prior draws p, (N, nz) each, and a kernel k:

        sum_{i != j} [ k(q_i, q_j) + k(p_i, p_j) ] / (N (N - 1))  -  2 sum_{i, j} k(q_i, p_j) / N^2

    A U-statistic: its mean is zero, and so it is often negative, when the distributions agree.
    Above `BLOCK_ENTRIES`, each block of rows of the kernel matrices is summed and differentiated
    before the next is computed: memory grows with N, not with N^2. Value and gradient of the codes
    are the same; the prior draws have no gradient then.

    Raises:
        ValueError: an unknown kernel, fewer than two codes, or not as many prior draws as codes.
    """
    n, nz = codes.shape
    if n < 2 or prior.shape != codes.shape:
        shapes = f"codes {tuple(codes.shape)}, prior {tuple(prior.shape)}"
        raise ValueError(f"{shapes}: must agree, with two rows or more")
    if kernel == "RBF":
        variance = median_bandwidth(codes, prior)
    elif kernel != "IMQ":
        raise ValueError(f"unknown kernel {kernel!r}: IMQ or RBF")

    def k(a: Tensor, b: Tensor) -> Tensor:
        d2 = squared_distances(a, b)
        if kernel == "RBF":
            values = rbf_kernel(d2, variance)
        else:
            values = imq_kernel(d2, nz, pz_scale, scales)
        return values + quadratic * quadratic_kernel(a, b, pz_scale) if quadratic else values

    def statistic(points: Tensor, first: int, rows: int) -> Tensor:
        """What rows `first` to `first + rows` of the kernel matrices add, for codes `points`."""
        q, p = points[first : first + rows], prior[first : first + rows]
        same = k(q, points) + k(p, prior)
        within = (same.sum() - same.diagonal(first).sum()) / (n * (n - 1))
        return within - 2 * k(q, prior).sum() / n**2

    if n * n <= BLOCK_ENTRIES:
        return statistic(codes, 0, n)
    rows = max(1, BLOCK_ENTRIES // n)
    points, gradient, value = codes.detach().requires_grad_(), torch.zeros_like(codes), 0
    for first in range(0, n, rows):
        block = statistic(points, first, rows)
        # Now, and not by autograd later, so that nothing of the block stays in memory.
        gradient += torch.autograd.grad(block, points)[0]
        value = value + block.detach()
    # The second term is 0, and has the gradient.
    return value + (gradient * (codes - codes.detach())).sum()


@torch.no_grad()
def mmd_to_prior(codes: Tensor, pz_scale: float = 1.0) -> Tensor:
    """`mmd_penalty` of codes (N, nz) with the IMQ kernel, averaged over all draws of the prior.

    The prior's terms are integrals of one variable: C / (C + d2) is the integral of
    exp(-t) exp(-t d2 / C) over t > 0, and the mean of a Gaussian in d2 is known in closed form.
    """
    n, nz = codes.shape
    variance = pz_scale**2
    # The trapezoidal rule in log t is exact here to about ten digits.
    u = torch.linspace(-25, 4.5, 300, dtype=torch.float64, device=codes.device)
    weights = torch.exp(u - u.exp()) * (u[1] - u[0])
    norms = codes.double().square().sum(1)
    total = torch.zeros((), dtype=torch.float64, device=codes.device)
    for scale in IMQ_SCALES:
        s = u.exp() / (2 * nz * variance * scale)  # t / C
        total += (weights * (1 + 4 * variance * s) ** (-nz / 2)).sum()
        shrink = 1 + 2 * variance * s
        for part in norms.split(1024):
            cross = shrink ** (-nz / 2) * torch.exp(-part[:, None] * s / shrink)
            total -= 2 * (cross @ weights).sum() / n
    for part in codes.split(max(1, BLOCK_ENTRIES // n)):
        same = imq_kernel(squared_distances(part, codes), nz, pz_scale)
        total += same.double().sum() / (n * (n - 1))
    # On the diagonal of the kernel matrix each scale has ones.
    return total - len(IMQ_SCALES) / (n - 1)


# --------------------------------------------------------------------------------------------------
# WAE-GAN (Algorithm 1)


def discriminator_loss(logits_prior: Tensor, logits_codes: Tensor) -> Tensor:
    """-mean log D(z) - mean log(1 - D(z~)), from logits (N,) of prior and codes; a scalar."""
    return F.softplus(-logits_prior).mean() + F.softplus(logits_codes).mean()


def gan_penalty(discriminator: nn.Module, codes: Tensor) -> Tensor:
    """-mean log D(z~) of codes (N, nz), the non-saturating loss of Algorithm 1; a scalar.

    The gradient passes through the discriminator to the codes and leaves none on its weights.
    """
    frozen = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    return F.softplus(-functional_call(discriminator, frozen, codes)).mean()


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
    """The expected `pretrain_loss` of n draws of the prior.

    The mean of n draws has variance pz_scale^2 / n in each dimension. An entry of their covariance,
    a Wishart matrix, has variance pz_scale^4 / (n - 1), and twice that on the diagonal.
    """
    return pz_scale**2 / n + pz_scale**4 * (1 + 1 / nz) / (n - 1)


# --------------------------------------------------------------------------------------------------
# The aggregated posterior: its distance from the prior, and densities fitted to it


def covariance_eigenvalues(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues (nz,) and eigenvectors (nz, nz) of the covariance of codes (N, nz)."""
    nz = codes.shape[1]
    values, vectors = torch.linalg.eigh(codes.double().T.cov().reshape(nz, nz))
    return values.clamp(min=0), vectors


def gaussian_w2(codes: Tensor, pz_scale: float = 1.0) -> Tensor:
    """Squared 2-Wasserstein distance to the prior of the Gaussian with the moments of the codes.

    For codes (N, nz) of mean m, whose covariance has the eigenvalues lambda_i, it is
    |m|^2 + sum_i (sqrt(lambda_i) - pz_scale)^2. It sees directions that the codes do not use; an
    MMD hardly does.
    """
    eigenvalues, _ = covariance_eigenvalues(codes)
    return codes.double().mean(0).square().sum() + (eigenvalues.sqrt() - pz_scale).square().sum()


def fit_mixture(codes: Tensor, components: int, iterations: int = 100) -> MixtureSameFamily:
    """A mixture of Gaussians fitted to codes (N, nz) by EM, in float64.

    One component is the Gaussian with the moments of the codes. Draws of such a density, decoded,
    are the ex-post density estimation of Ghosh et al., ICLR 2020. The eigenvalues of each
    covariance are at least 1e-6 of the largest one of all codes, so that codes can be fitted that
    span a part of the space only.
    """
    codes = codes.double()
    n, nz = codes.shape
    components = min(components, n)
    covariance = codes.T.cov(correction=0).reshape(nz, nz)
    largest = torch.linalg.eigvalsh(covariance)[-1].clamp(min=1e-6)
    jitter = 1e-6 * largest * torch.eye(nz).to(codes)

    weights = torch.full((components,), 1 / components).to(codes)
    means = codes[torch.randperm(n, device=codes.device)[:components]]
    covariances = (covariance + jitter).expand(components, nz, nz)
    likelihood = -math.inf
    for _ in range(iterations if components > 1 else 1):
        # E step: the responsibility of each component for each code.
        gaussians = [MultivariateNormal(m, c) for m, c in zip(means, covariances, strict=True)]
        log_p = torch.stack([g.log_prob(codes) for g in gaussians], 1) + weights.log()
        responsibility = log_p.softmax(1)  # (N, components)
        # M step: the moments of the codes under these weights.
        mass = responsibility.sum(0).clamp(min=1e-12)
        weights, means = mass / n, responsibility.T @ codes / mass[:, None]
        centred = (codes - m for m in means)
        weighted = zip(responsibility.T, centred, mass, strict=True)
        covariances = torch.stack([(r[:, None] * c).T @ c / s + jitter for r, c, s in weighted])
        previous, likelihood = likelihood, log_p.logsumexp(1).mean().item()
        if likelihood - previous < 1e-3:
            break
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))
