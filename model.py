"""The Wasserstein auto-encoder: networks, objective and penalties.

What the paper defines (Tolstikhin, Bousquet, Gelly, Schoelkopf: Wasserstein Auto-Encoders, ICLR 2018, arXiv 1711.01558)
and nothing else: modules and pure functions of tensors. Files, flags and the training loop live in `utils.py` and
`main.py`.

The objective is equation 4 of the paper, for an encoder Q(Z|X), a decoder G and a prior P_Z = N(0, pz_scale^2 I):

    min over Q, G of   E_{x ~ P_X} E_{z ~ Q(Z|x)} [c(x, G(z))]  +  LAMBDA * D_Z(Q_Z, P_Z)

where Q_Z, the aggregated posterior, is the distribution of codes over the whole data set. D_Z is either a maximum mean
discrepancy (`mmd_penalty`) or the verdict of a discriminator on codes (`gan_penalty`).

Shapes in comments: N images in the batch, nz latent dimensions, S the side of an image in pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

IMAGE_SIZES = (32, 64, 128, 256)
IMQ_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # of the official implementation; the paper uses the sum's s = 1
INPUT_NOISE = 0.01  # standard deviation of the pixel noise that --noise=add_noise shows the encoder
BANDWIDTH_SAMPLE = 1024  # codes, and as many prior draws, that the median heuristic looks at
BLOCK_ENTRIES = (
    2**20
)  # larger kernel matrices are built, and differentiated, in blocks of rows of about this many entries


# ----------------------------------------------------------------------------------------------------------------------
# Networks


def stage_widths(image_size: int, nf: int) -> list[int]:
    """Channels after each stride-2 stage: nf, 2nf, 4nf, 8nf, 8nf, ... with one stage for each halving from S to 4."""
    return [nf * min(2**stage, 8) for stage in range(int(math.log2(image_size)) - 2)]


class Encoder(nn.Module):
    """Q(Z|X): images to codes.

    Args:
        image_size: S, one of `IMAGE_SIZES`.
        nz: latent dimensions.
        nf: channels of the first convolution.
        arch: `dcgan`, unpadded convolutions down to 1x1, or `paper`, 'same' padding down to 4x4 (the paper's appendix).
        noise: where the randomness of Q(Z|X) comes from: `deterministic` has none; `add_noise` adds N(0, 0.01^2) to the
            pixels while training; `gaussian` samples N(mean(x), diag(variance(x))), in evaluation mode as well, because
            a draw from Q_Z is what the objective and its measures are about.
    """

    def __init__(
        self, image_size: int = 64, nz: int = 64, nf: int = 128, arch: str = "dcgan", noise: str = "deterministic"
    ):
        super().__init__()
        self.noise = noise
        widths = stage_widths(image_size, nf)
        layers: list[nn.Module] = []
        for n_in, n_out in zip([3, *widths], widths, strict=False):
            # No bias: the batch norm that follows would subtract it again.
            layers += [nn.Conv2d(n_in, n_out, 5, stride=2, padding=0 if arch == "dcgan" else 2, bias=False)]
            layers += [nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers, nn.Flatten())
        n_features = widths[-1] * (1 if arch == "dcgan" else 4 * 4)
        self.code = nn.Linear(n_features, 2 * nz if noise == "gaussian" else nz)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """One draw of the code of each image: (N, 3, S, S) to (N, nz)."""
        if self.noise == "add_noise" and self.training:
            # Drawn in the order in which channels-last images lie in memory: on a CPU, seven times as fast.
            x = x + INPUT_NOISE * torch.randn_like(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        code = self.code(self.features(x))  # (N, nz), or (N, 2 nz)
        if self.noise != "gaussian":
            return code
        mean, log_variance = code.chunk(2, dim=1)
        return mean + torch.randn_like(mean) * torch.exp(log_variance.clamp(-50, 50) / 2)


class Decoder(nn.Module):
    """G: codes to images, in [0, 1] through a sigmoid or, with `symmetric`, in [-1, 1] through a tanh.

    Args as for `Encoder`. `dcgan` starts from 4x4 and doubles with 4x4 transposed convolutions up to the image; `paper`
    starts from 8x8, doubles with 5x5 ones, and makes the image with a last one of stride 1.
    """

    def __init__(self, image_size: int = 64, nz: int = 64, nf: int = 128, arch: str = "dcgan", symmetric: bool = False):
        super().__init__()
        *widths, n_start = stage_widths(image_size, nf)
        widths = widths[::-1]
        if arch == "dcgan":
            side, kernel = 4, {"kernel_size": 4, "stride": 2, "padding": 1}
            to_image = nn.ConvTranspose2d(widths[-1], 3, **kernel)
        else:
            side, kernel = 8, {"kernel_size": 5, "stride": 2, "padding": 2, "output_padding": 1}
            to_image = nn.ConvTranspose2d(widths[-1], 3, kernel_size=5, stride=1, padding=2)
        layers: list[nn.Module] = [nn.Linear(nz, n_start * side * side), nn.ReLU(inplace=True)]
        layers += [nn.Unflatten(1, (n_start, side, side))]
        for n_in, n_out in zip([n_start, *widths], widths, strict=False):
            layers += [nn.ConvTranspose2d(n_in, n_out, **kernel, bias=False)]
            layers += [nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, to_image, nn.Tanh() if symmetric else nn.Sigmoid())
        self.apply(init_weights)

    def forward(self, z: Tensor) -> Tensor:
        """Codes (N, nz) to images (N, 3, S, S)."""
        return self.layers(z)


class Discriminator(nn.Module):
    """D: the logit of 'this code was drawn from the prior', nz -> 512 -> 512 -> 512 -> 512 -> 1.

    With `pz_scale` given, the prior's log density is added to the logit (as in the official CelebA configuration, after
    Mescheder, Nowozin and Geiger, 2017): the best logit is log p(z) - log q(z), and p is known, so that the network has
    only log q(z) left to learn.
    """

    def __init__(self, nz: int = 64, width: int = 512, pz_scale: float | None = None):
        super().__init__()
        self.pz_scale = pz_scale
        sizes = [nz, width, width, width, width]
        layers: list[nn.Module] = []
        for n_in, n_out in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(n_in, n_out), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, z: Tensor) -> Tensor:
        """Codes (N, nz) to logits (N,)."""
        logit = self.layers(z).squeeze(1)
        return logit if self.pz_scale is None else logit + prior_log_density(z, self.pz_scale)


def init_weights(module: nn.Module) -> None:
    """Draws convolution weights from N(0, 0.02^2), as DCGAN does; other layers keep PyTorch's initial weights."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)


# ----------------------------------------------------------------------------------------------------------------------
# The prior


def sample_prior(n: int, nz: int, pz_scale: float, device: torch.device | str = "cpu") -> Tensor:
    """n draws of P_Z = N(0, pz_scale^2 I), (n, nz), from the global generator."""
    return pz_scale * torch.randn(n, nz, device=device)


def prior_log_density(z: Tensor, pz_scale: float) -> Tensor:
    """log p(z) of N(0, pz_scale^2 I) for codes (N, nz), as (N,)."""
    nz = z.shape[1]
    return -z.square().sum(1) / (2 * pz_scale**2) - nz / 2 * math.log(2 * math.pi * pz_scale**2)


# ----------------------------------------------------------------------------------------------------------------------
# Reconstruction cost


def reconstruction_cost(x: Tensor, y: Tensor, cost: str = "l2sq", symmetric: bool = False) -> Tensor:
    """c(x, y), summed over an image's pixels and averaged over the batch; a scalar.

    `l2sq` is 0.05 ||x - y||^2, `l2` is 0.2 ||x - y|| and `l1` is 0.02 |x - y|_1, the weights of the official
    implementation. Pixels count on the [-1, 1] scale even where the networks work in [0, 1] (`symmetric` false):
    LAMBDA then means the same in both.
    """
    difference = (x - y).flatten(1) * (1 if symmetric else 2)  # (N, 3 S S)
    if cost == "l2sq":
        return 0.05 * difference.square().sum(1).mean()
    if cost == "l2":
        # The small term keeps the square root's slope finite at a perfect reconstruction.
        return 0.2 * (difference.square().sum(1) + 1e-8).sqrt().mean()
    if cost == "l1":
        return 0.02 * difference.abs().sum(1).mean()
    raise ValueError(f"unknown cost {cost!r}: l2sq, l2 or l1")


# ----------------------------------------------------------------------------------------------------------------------
# WAE-MMD (Algorithm 2)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """||a_i - b_j||^2 for points (N, nz) and (M, nz), as (N, M)."""
    return (a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def imq_kernel(d2: Tensor, nz: int, pz_scale: float) -> Tensor:
    """Inverse multiquadratic kernel of squared distances: the sum over scales s of C / (C + d2), C = 2 nz pz_scale^2 s.

    2 nz pz_scale^2 is the expected squared distance of two draws of the prior (section 4 of the paper).
    """
    bases = [2 * nz * pz_scale**2 * scale for scale in IMQ_SCALES]
    return sum(base / (base + d2) for base in bases)


def rbf_kernel(d2: Tensor, variance: Tensor | float) -> Tensor:
    """Gaussian kernel exp(-d2 / (2 sigma^2)) at squared distances d2, for `variance` sigma^2, the squared bandwidth."""
    return torch.exp(-d2 / (2 * variance))


@torch.no_grad()
def median_bandwidth(codes: Tensor, prior: Tensor) -> Tensor:
    """sigma^2 by the median heuristic: the median squared distance among the pooled points; a scalar without gradient.

    Looks at the first `BANDWIDTH_SAMPLE` codes and prior draws, which bounds its cost for any batch.
    """
    points = torch.cat([codes[:BANDWIDTH_SAMPLE], prior[:BANDWIDTH_SAMPLE]])
    i, j = torch.triu_indices(len(points), len(points), offset=1, device=points.device)
    # Clamped, so that codes and prior collapsed into one point give a kernel of ones and not 0 / 0.
    return squared_distances(points, points)[i, j].median().clamp(min=1e-12)


def mmd_penalty(codes: Tensor, prior: Tensor, kernel: str = "IMQ", pz_scale: float = 1.0) -> Tensor:
    """Unbiased estimate of MMD^2 between the aggregated posterior and the prior (Algorithm 2 of the paper); a scalar.

    For codes q and prior draws p, (N, nz) each, and a kernel k:

        sum_{i != j} [ k(q_i, q_j) + k(p_i, p_j) ] / (N (N - 1))  -  2 sum_{i, j} k(q_i, p_j) / N^2

    A U-statistic: zero on average when the distributions agree, and so negative about half the time then. Past
    `BLOCK_ENTRIES` the kernel matrices never exist as a whole: each block of rows is summed and differentiated before
    the next is computed. The value stays the same, and so does the gradient of the codes, though the draws of the prior
    then have none; memory grows with N, not N^2.

    Raises:
        ValueError: an unknown kernel, fewer than two codes, or not as many prior draws as codes.
    """
    n, nz = codes.shape
    if n < 2 or prior.shape != codes.shape:
        raise ValueError(f"codes {tuple(codes.shape)}, prior {tuple(prior.shape)}: must agree, with two rows or more")
    if kernel == "RBF":
        variance = median_bandwidth(codes, prior)
    elif kernel != "IMQ":
        raise ValueError(f"unknown kernel {kernel!r}: IMQ or RBF")

    def k(a: Tensor, b: Tensor) -> Tensor:
        d2 = squared_distances(a, b)
        return rbf_kernel(d2, variance) if kernel == "RBF" else imq_kernel(d2, nz, pz_scale)

    def statistic(points: Tensor, first: int, rows: int) -> Tensor:
        """What rows `first` to `first + rows` of the kernel matrices add to the estimate, for codes `points`."""
        q, p = points[first : first + rows], prior[first : first + rows]
        same = k(q, points) + k(p, prior)
        cross = k(q, prior)
        return (same.sum() - same.diagonal(first).sum()) / (n * (n - 1)) - 2 * cross.sum() / n**2

    if n * n <= BLOCK_ENTRIES:
        return statistic(codes, 0, n)
    rows = max(1, BLOCK_ENTRIES // n)
    if not (torch.is_grad_enabled() and codes.requires_grad):
        return torch.stack([statistic(codes, first, rows) for first in range(0, n, rows)]).sum()
    points, gradient, values = codes.detach().requires_grad_(), torch.zeros_like(codes), []
    for first in range(0, n, rows):
        value = statistic(points, first, rows)
        gradient += torch.autograd.grad(value, points)[0]  # now, so that nothing of the block stays in memory
        values.append(value.detach())
    return torch.stack(values).sum() + (gradient * (codes - codes.detach())).sum()  # the second term is 0


# ----------------------------------------------------------------------------------------------------------------------
# WAE-GAN (Algorithm 1)


def discriminator_loss(logits_prior: Tensor, logits_codes: Tensor) -> Tensor:
    """-mean log D(z) - mean log(1 - D(z~)), from the logits (N,) of prior draws and of codes; a scalar."""
    return F.softplus(-logits_prior).mean() + F.softplus(logits_codes).mean()


def gan_penalty(discriminator: nn.Module, codes: Tensor) -> Tensor:
    """-mean log D(z~) of codes (N, nz): the non-saturating loss that Algorithm 1 gives the encoder; a scalar.

    The gradient passes through the discriminator to the codes and leaves nothing on its weights.
    """
    frozen = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    return F.softplus(-functional_call(discriminator, frozen, codes)).mean()


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining of the encoder


def pretrain_loss(codes: Tensor, pz_scale: float = 1.0) -> Tensor:
    """How far mean and covariance of the codes (N, nz) are from the prior's, 0 and pz_scale^2 I; a scalar.

    The mean over entries of the squared differences, as in the official implementation, but against the prior's exact
    moments rather than those of a sample. `pretrain_floor` says what draws of the prior itself would score.
    """
    mean = codes.mean(0)  # (nz,)
    centred = codes - mean
    covariance = centred.T @ centred / (len(codes) - 1)  # (nz, nz)
    target = pz_scale**2 * torch.eye(codes.shape[1], device=codes.device, dtype=codes.dtype)
    return mean.square().mean() + (covariance - target).square().mean()


def pretrain_floor(n: int, nz: int, pz_scale: float = 1.0) -> float:
    """The expected `pretrain_loss` of n draws of the prior: below it, codes cannot be told from the prior by this loss.

    The mean of n draws has variance pz_scale^2 / n in each dimension; an entry of their covariance (a Wishart matrix)
    has pz_scale^4 / (n - 1), and twice that on the diagonal.
    """
    return pz_scale**2 / n + pz_scale**4 * (1 + 1 / nz) / (n - 1)
