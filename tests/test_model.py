"""The paper's formulas against second ways to compute them, and the training step against both.

Draws are seeded, so every statistical test is a fixed computation. Its tolerance is 4 standard
errors of the estimate.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import main
import model
import utils
from model import Kernel

CPU = utils.World(0, 1, torch.device("cpu"))
KERNELS = ("IMQ", "RBF")

double = partial(torch.randn, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    """Gives the same draws whichever tests ran before."""
    torch.manual_seed(0)


def assert_mean(values: Tensor, expected: Tensor | float) -> None:
    """Compares the mean over the first dimension with its expectation, to 4 standard errors."""
    error = values.std(0) / math.sqrt(len(values))
    near = (values.mean(0) - expected).abs() <= 4 * error
    assert near.all(), (values.mean(0), expected, error)


def wave(*shape: int, phase: float = 0) -> Tensor:
    """sin(phase), sin(1 + phase), ..., in float64."""
    return torch.arange(math.prod(shape)).double().add(phase).sin().view(shape)


# --------------------------------------------------------------------------------------------------
# The MMD


def mmds(codes: Tensor, kernel: Kernel, prior: Tensor) -> Tensor:
    """`exact_mmd` and `sampled_mmd`, (2,)."""
    return torch.stack([model.exact_mmd(codes, kernel), model.sampled_mmd(codes, kernel, prior)])


def u_statistic(
    codes: Tensor, prior: Tensor, pz_scale: float, name: str, scales: tuple, quadratic: float
) -> float:
    """MMD^2 from the kernels of all pairs, in NumPy."""
    n, nz = codes.shape
    variance = pz_scale**2
    points = torch.cat([codes, prior]).double().numpy()
    d2 = ((points[:, None] - points) ** 2).sum(2)
    if name == "RBF":
        values = np.exp(-d2 / (2 * (2 * nz * variance)))
    else:
        values = sum(c / (c + d2) for c in 2 * nz * variance * np.array(scales))
    shrunk = points * np.sqrt(2 / (1 + (points**2).sum(1, keepdims=True) / (nz * variance)))
    values += quadratic * (shrunk @ shrunk.T) ** 2 / (nz * variance**2)
    others = ~np.eye(n, dtype=bool)
    within = values[:n, :n][others].mean() + values[n:, n:][others].mean()
    return within - 2 * values[:n, n:].mean()


@pytest.mark.parametrize("quadratic", [0.0, 0.5])
@pytest.mark.parametrize("scales", [model.IMQ_SCALES, (1.0,)])
@pytest.mark.parametrize("pz_scale", [1.0, 2.5])
@pytest.mark.parametrize("name", KERNELS)
def test_sampled_mmd_is_the_u_statistic(name, pz_scale, scales, quadratic):
    codes, prior = 0.5 * torch.randn(7, 3) + 1, pz_scale * torch.randn(7, 3)
    values = mmds(codes, Kernel(3, pz_scale, name, scales, quadratic), prior)
    expected = u_statistic(codes, prior, pz_scale, name, scales, quadratic)
    assert values[1].item() == pytest.approx(expected, 1e-4)
    # The unit of the latent space does not matter.
    wide = Kernel(3, 3 * pz_scale, name, scales, quadratic)
    assert_close(mmds(3 * codes, wide, 3 * prior), values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("spread", "shift"), [(0.1, 0), (1, 0), (3, 2)])
@pytest.mark.parametrize("nz", [1, 8, 64])
@pytest.mark.parametrize("quadratic", [0.0, 0.5])
@pytest.mark.parametrize("name", KERNELS)
def test_exact_mmd_is_the_mean_of_sampled_mmd(name, quadratic, nz, spread, shift):
    kernel = Kernel(nz, 1.5, name, quadratic=quadratic)
    codes = 1.5 * (spread * torch.randn(20, nz) + shift)
    sampled = torch.vmap(lambda prior: model.sampled_mmd(codes, kernel, prior))
    assert_mean(sampled(1.5 * torch.randn(1000, 20, nz)), model.exact_mmd(codes, kernel))


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("name", KERNELS)
def test_sum_of_blocks(name, rows, monkeypatch):
    """So many rows at a time have the value and the gradient of the whole."""
    kernel = Kernel(2, 1.5, name, quadratic=0.5)
    codes, prior = torch.randn(5, 2, requires_grad=True), torch.randn(5, 2) + 1
    whole = mmds(codes, kernel, prior)
    (gradient,) = torch.autograd.grad(7 * whole.sum(), codes)
    spy = mock.Mock(wraps=kernel.matrix)
    monkeypatch.setattr(kernel, "matrix", spy)
    monkeypatch.setattr(model, "BLOCK_ENTRIES", rows * 5)
    in_blocks = mmds(codes, kernel, prior)
    assert max(len(call.args[0]) for call in spy.mock_calls) == rows
    assert_close(in_blocks, whole)
    assert_close(torch.autograd.grad(7 * in_blocks.sum(), codes)[0], gradient)
    with torch.no_grad():
        assert_close(mmds(codes, kernel, prior), whole)


@pytest.mark.parametrize("name", KERNELS)
def test_mmds_of_extreme_codes(name):
    """All equal, or so long that the quadratic kernel overflows unless they are shrunk."""
    ones, prior = torch.ones(8, 3), torch.randn(8, 3)
    kernel = Kernel(3, name=name, quadratic=0.5)
    for codes, z, away in ((ones, prior, True), (ones, ones, False), (1e10 * prior, prior, True)):
        values = mmds(codes.requires_grad_(), kernel, z.detach())
        (gradient,) = torch.autograd.grad(values.sum(), codes)
        assert gradient.isfinite().all()
        assert values.max() < 20 and (values > 0.1).tolist() == [True, away]


# --------------------------------------------------------------------------------------------------
# The official code: constants are from its formulas (tolstikhin/wae on GitHub, commit 0d9002c,
# wae.py and models.py), written down again in NumPy, in float64.


def test_reconstruction_cost_of_the_official_code():
    x, y = wave(2, 3, 4, 4), wave(2, 3, 4, 4, phase=1)  # on the scale from -1 to 1
    # 0.05 mean_n sum d^2, 0.2 mean_n sqrt(1e-8 + sum d^2) and 0.02 mean_n sum |d|.
    costs = {"l2sq": 1.1008506695598865, "l2": 0.9384214674861941, "l1": 0.584377740598482}
    for cost, expected in costs.items():
        value = model.reconstruction_cost((x + 1) / 2, (y + 1) / 2, cost)
        assert value.item() == pytest.approx(expected, 1e-7)
        perfect = x.clone().requires_grad_()
        model.reconstruction_cost(perfect, x, cost).backward()
        assert perfect.grad.isfinite().all()


def test_mmd_prior_density_and_sharpness_of_the_official_code():
    q, p = 2 * wave(5, 3), 2 * wave(5, 3, phase=2)
    # Sums of C / (C + d^2), C = 2 * 3 * 1.5^2 s, over 5 * 4 pairs i != j and over 5 * 5.
    value = model.sampled_mmd(q, Kernel(3, 1.5), p)
    assert value.item() == pytest.approx(0.9093311563031832, 1e-9)
    # -|z|^2 / (2 * 1.5^2) - log(2 pi) / 2 - 3 / 2 log(1.5^2): of three dimensions the official code
    # has one log(2 pi) / 2, which the bias of the discriminator makes up for.
    plain, trick = model.Discriminator(3), model.Discriminator(3, prior_scale=1.5)
    trick.load_state_dict(plain.state_dict())
    values = trick(q.float()) - plain(q.float()) + math.log(2 * math.pi)
    assert values[:2].tolist() == pytest.approx([-3.4996851719, -3.4795122025], 1e-6)
    # The variance over 3 x 3 places of [[0, 1, 0], [1, -4, 1], [0, 1, 0]] on the grey image, of
    # weights 0.299, 0.587, 0.114 (0.2989 there, for 0.61836 and 0.54289); and of one channel.
    images = (wave(2, 3, 5, 5).float() + 1) / 2
    values = [*model.sharpness(images), *model.sharpness(images[:, :1])]
    assert values == pytest.approx([0.61848571, 0.54300245, 0.64295952, 0.56583253], 1e-5)


# --------------------------------------------------------------------------------------------------
# The training step


def build_run(tmp_path, *flags: str) -> main.Run:
    """A small auto-encoder with its optimisers, as the command line makes it."""
    argv = ["--dataroot=unused", f"--outf={tmp_path}", "--image_size=32", "--nf=2", "--nz=3"]
    run = main.Run(main.parse([*argv, "--batch_size=8", "--seed=1", *flags])[1], CPU)
    run.net.train()
    return run


def gradients(network: nn.Module) -> list[Tensor]:
    return [weight.grad.clone() for weight in network.parameters()]


def check_step(run: main.Run, expected: Callable[..., tuple[Tensor, ...]]) -> nn.Module:
    """Compares a step with `expected(x, prior, *net(x))`: its losses, and d cost + 7 d penalty.

    Returns the network as it was before the step, with its gradient.
    """
    batch = torch.randint(256, (8, 32, 32, run.flags.channels), dtype=torch.uint8)
    x = batch.permute(0, 3, 1, 2) / 255
    prior, net, calls = run.net.sample_prior(8), copy.deepcopy(run.net), []
    run.net.encoder.register_forward_hook(lambda *call: calls.append(call))
    torch.manual_seed(5)
    losses = main.Step(run)(batch, prior)
    assert len(calls) == 1
    torch.manual_seed(5)  # the same noise
    cost, penalty, loss_d = expected(x, prior, *net(x))
    net.zero_grad()
    (cost + 7 * penalty).backward()
    assert_close(losses, torch.stack([cost, penalty, loss_d]).detach())
    assert_close(gradients(run.net), gradients(net), rtol=1e-3, atol=3e-5)
    return net


@pytest.mark.parametrize("trick", [[], ["--nowozin_trick"]])
def test_train_step_gan(trick, tmp_path):
    # At this rate the discriminators before and after their step differ to the penalty.
    run = build_run(tmp_path, "--mode=gan", "--LAMBDA=7", "--lr_adv=0.01", *trick)
    # The gradients that a step leaves must have no part in the next one.
    main.Step(run)(torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8), run.net.sample_prior(8))
    discriminator, optimizer, used = copy.deepcopy(run.discriminator), run.optimizers, []
    adam = torch.optim.Adam(discriminator.parameters())
    adam.load_state_dict(copy.deepcopy(optimizer["discriminator"].state_dict()))
    assert float(adam.param_groups[0]["lr"]) == pytest.approx(0.01)
    assert adam.param_groups[0]["betas"] == (0.5, 0.999)
    optimizer["discriminator"].register_step_pre_hook(
        lambda *_: used.extend(gradients(run.discriminator))
    )
    bce, ones, zeros = F.binary_cross_entropy_with_logits, torch.ones(8), torch.zeros(8)

    def expected(x, prior, y, codes, *_) -> tuple[Tensor, ...]:
        loss_d = bce(discriminator(prior), ones) + bce(discriminator(codes.detach()), zeros)
        discriminator.zero_grad()
        (7 * loss_d).backward()
        assert_close(used, gradients(discriminator), rtol=1e-4, atol=1e-6)
        # The penalty leaves no gradient on the discriminator.
        assert_close(gradients(run.discriminator), used, rtol=0, atol=0)
        adam.step()
        # Adam moves weights of tiny gradients, whose signs are rounding errors, as much as others.
        # If the step's own discriminator is where it should be, it is the more exact one.
        assert_close(run.discriminator(prior), discriminator(prior), rtol=1e-2, atol=1e-2)
        cost = 0.05 * (2 * (x - y)).square().sum((1, 2, 3)).mean()
        return cost, bce(run.discriminator(codes), ones), loss_d

    check_step(run, expected)
    # log(1 - sigmoid(300)) would be minus infinity.
    assert model.discriminator_loss(torch.tensor([-300.0]), torch.tensor([300.0])) == 600


@pytest.mark.parametrize(
    ("flags", "kernel"),
    [
        ("--mode=mmd", Kernel(3, 2.0, quadratic=0.3)),
        ("--mode=mmd --mmd=sampled --quadratic=0", Kernel(3, 2.0)),
        ("--mode=mmd --mmd=sampled --kernel=RBF --quadratic=0", Kernel(3, 2.0, "RBF")),
        ("--mode=mmd --imq_scales=1 --quadratic=.5", Kernel(3, 2.0, "IMQ", (1.0,), 0.5)),
        ("--mode=vae", None),
    ],
)
def test_train_step_mmd_and_vae(flags, kernel, tmp_path):
    common = ("--noise=gaussian", "--channels=1", "--LAMBDA=7", "--pz_scale=2", "--cost=l1")
    run = build_run(tmp_path, *flags.split(), *common, "--lr=0.02")
    run.set_learning_rates(0.5)

    def expected(x, prior, y, codes, mean, log_variance) -> tuple[Tensor, ...]:
        assert not torch.equal(codes, mean)
        if kernel:
            penalty = mmds(codes, kernel, prior)[int("sampled" in flags)]
        else:
            posterior = Normal(mean, (log_variance / 2).exp())
            penalty = kl_divergence(posterior, Normal(0.0, 2.0)).sum(1).mean()
        return 0.02 * (2 * (x - y)).abs().sum((1, 2, 3)).mean(), penalty, torch.tensor(0.0)

    start = check_step(run, expected).encoder.posterior.bias
    # Adam's first step moves each weight by the rate, against its gradient.
    moved = start - 0.01 * start.grad.sign()
    assert_close(run.net.encoder.posterior.bias, moved, rtol=1e-3, atol=1e-5)


def test_set_seed():
    """Each key has its own draws, the same ones each time."""
    keys = [(1,), (2,), (1, "noise"), (1, "prior"), (1, "noise", 0, 1), (1, "noise", 1, 0)]
    keys += [(1, "noise", 0, 11), (1, "noise", 0, 1, 1), (2**63 - 1, "noise")]
    draws = {(utils.set_seed(*key), tuple(torch.randn(4).tolist())) for key in 2 * keys}
    assert len(draws) == len(keys)


@pytest.mark.parametrize(("n", "nz", "pz_scale"), [(10, 3, 2.0), (2, 1, 0.5)])
def test_pretrain_loss_and_floor(n, nz, pz_scale):
    sets = pz_scale * double(2000, n, nz)
    losses = torch.stack([model.pretrain_loss(codes, pz_scale) for codes in sets])
    assert_mean(losses, model.pretrain_floor(n, nz, pz_scale))
    off = np.cov(sets[0].T).reshape(nz, nz) - pz_scale**2 * np.eye(nz)
    expected = sets[0].mean(0).square().mean().item() + (off**2).mean()
    assert losses[0].item() == pytest.approx(expected)


def test_pretrain_encoder(tmp_path):
    """It brings mean and covariance of the codes to those of the prior."""
    run = build_run(tmp_path, "--noise=gaussian", "--pz_scale=1.5", "--lr=0.01")
    pixels = np.random.default_rng(0).integers(256, size=(256, 32, 32, 3), dtype=np.uint8)
    rows = np.arange(len(pixels))
    decoder, codes = copy.deepcopy(run.net.decoder.state_dict()), []
    run.net.encoder.register_forward_hook(lambda *call: codes.append(model.draw_code(*call[2])))
    main.pretrain_encoder(run, utils.Data(pixels, [], rows, rows, rows[:0], ""))
    assert len(codes) < main.PRETRAIN_STEPS  # it ends when they cannot be told from the prior
    first, last = codes[0], torch.cat(codes[-4:])
    assert (first.T.cov() - 1.5**2 * torch.eye(3)).abs().max() > 1
    assert (last.T.cov() - 1.5**2 * torch.eye(3)).abs().max() < 0.75
    assert last.mean(0).abs().max() < 0.3
    assert_close(run.net.decoder.state_dict(), decoder, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------
# Networks


def build_network(**options: object) -> model.AutoEncoder:
    """An auto-encoder, small unless `options` say else."""
    default = {"image_size": 32, "channels": 3, "nz": 3, "nf": 2, "arch": "dcgan"}
    default |= {"noise": "deterministic", "input_normalize_sym": False, "pz_scale": 1.0}
    return model.AutoEncoder(**default | options)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", model.IMAGE_SIZES)
@pytest.mark.parametrize("arch", ["dcgan", "paper"])
def test_shapes_and_ranges(arch, size, channels):
    """Images are in [0, 1] outside of the networks, whatever these work in."""
    options = {"image_size": size, "channels": channels, "arch": arch}
    x = torch.rand(2, channels, size, size)
    for noise in ("deterministic", "add_noise", "gaussian"):
        net = build_network(noise=noise, **options)
        y, codes, mean, log_variance = net(x)
        assert y.shape == x.shape and codes.shape == mean.shape == (2, 3)
        assert log_variance.shape == (2, 3) if noise == "gaussian" else log_variance is None
    symmetric = build_network(noise=noise, input_normalize_sym=True, **options)
    symmetric.load_state_dict(net.state_dict())
    with torch.no_grad():
        # The first layer sees [-1, 1], and the last is a tanh in place of a sigmoid.
        assert_close(symmetric.encoder(x)[0], net.encoder(2 * x - 1)[0])
        y, y_symmetric = net.decode(100 * codes), symmetric.decode(100 * codes)
    assert y.std() > 1e-3
    assert_close(y_symmetric, torch.logit(y).tanh() / 2 + 0.5, rtol=1e-4, atol=1e-5)


def test_encode_decode_and_sample():
    """They are the parts of `forward`; samples are decoded draws of the prior."""
    net, x = build_network(pz_scale=2.0, noise="gaussian").eval(), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        torch.manual_seed(1)
        y, codes, _, _ = net(x)
        torch.manual_seed(1)
        assert torch.equal(net.encode(x), codes) and torch.equal(net.decode(codes), y)
        torch.manual_seed(2)
        samples = net.sample(5)
        torch.manual_seed(2)
        assert torch.equal(samples, net.decode(2 * torch.randn(5, 3)))
    assert_mean(net.sample_prior(5000) ** 2, 4.0)


@pytest.mark.parametrize(("arch", "kernel", "side"), [("paper", 5, 8), ("dcgan", 4, 4)])
def test_network_sizes(arch, kernel, side):
    """Counts weights: a batch norm has 2 a channel, and no bias before it (appendix C.2)."""
    size = {"image_size": 64, "nz": 64, "nf": 128, "arch": arch}
    with torch.device("meta"):
        plain, gaussian = build_network(**size), build_network(noise="gaussian", **size)
        networks = (plain.encoder, gaussian.encoder, plain.decoder, model.Discriminator(64))
    inner = kernel**2 * (128 * 256 + 256 * 512 + 512 * 1024)
    convolutions = kernel**2 * 3 * 128 + inner + 2 * (128 + 256 + 512 + 1024)
    linear = (4 * 4 * 1024 + 1) * 64
    if arch == "dcgan":  # one more convolution, from 4x4 to 1x1
        convolutions, linear = convolutions + (4 * 4 * 1024 + 2) * 1024, (1024 + 1) * 64
    decoder = (64 + 1) * side**2 * 1024 + inner + 2 * (512 + 256 + 128) + kernel**2 * 128 * 3 + 3
    expected = [convolutions + linear, convolutions + 2 * linear, decoder]
    expected += [(64 + 1) * 512 + 3 * (512 + 1) * 512 + (512 + 1)]
    assert [sum(w.numel() for w in network.parameters()) for network in networks] == expected


@pytest.mark.parametrize(("symmetric", "deviation"), [(True, 0.01), (False, 0.005)])
def test_encoder_add_noise_while_training(symmetric, deviation):
    """Looks at what the first layer sees: the same noise on the scale of the cost."""
    noisy, seen = build_network(noise="add_noise", input_normalize_sym=symmetric).encoder, []
    noisy.features.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.rand(8, 3, 32, 32)
    before, clean = x.clone(), 2 * x - 1 if symmetric else x
    noisy(x), noisy(x)
    assert torch.equal(x, before)  # the target of the reconstruction stays clean
    assert not torch.equal(*seen)
    noise = (torch.stack(seen) - clean).flatten()
    assert_mean(noise, 0.0)
    assert_mean(noise**2, deviation**2)
    noisy.eval()(x)
    assert torch.equal(seen[-1], clean)


def test_gaussian_codes():
    """Of the moments given, around 3 and by 0.01; neighbours in bfloat16 are 0.016 apart there."""
    x = torch.rand(4, 3, 32, 32)
    for training, amp in ((True, False), (False, False), (True, True)):
        net = build_network(nz=2, noise="gaussian", amp=amp).train(training)
        bias = net.encoder.posterior.bias
        bias.data = torch.tensor([3.0, 3.1, -10.0, -9.0])
        with torch.no_grad():
            images, codes, mean, log_variance = net(x.repeat(500, 1, 1, 1))
        assert images.dtype == codes.dtype == torch.float32
        assert_mean(codes - mean, 0.0)
        assert_mean((codes - mean) ** 2 / log_variance.exp(), 1.0)
    nn.init.constant_(bias, 1e4)  # an extreme variance
    codes = net(x)[1]
    codes.sum().backward()
    assert codes.isfinite().all() and bias.grad.isfinite().all()


# --------------------------------------------------------------------------------------------------
# Metrics of codes


def test_gaussian_scores_has_the_distance_of_gaussians():
    codes = (3 + double(50, 6) @ double(6, 6)).float()
    # |m|^2 + tr(A + B - 2 (B^1/2 A B^1/2)^1/2) for covariances A and B = 1.5^2 I. The last trace is
    # the sum of the roots of the eigenvalues of A B.
    a, b = np.cov(codes.double().T), 1.5**2 * np.eye(6)
    roots = np.sqrt(np.linalg.eigvals(a @ b).real)
    expected = (codes.double().numpy().mean(0) ** 2).sum() + np.trace(a + b) - 2 * roots.sum()
    assert model.gaussian_scores(codes, 1.5)[0].item() == pytest.approx(expected, 1e-6)
    values, vectors = model.covariance_eigenvalues(codes)
    np.testing.assert_allclose(vectors * values @ vectors.T, a, rtol=1e-9)
    assert values.tolist() == sorted(values.tolist())


@pytest.mark.parametrize(("n", "nz", "pz_scale"), [(100, 64, 1.0), (5, 64, 2.0), (30, 2, 1.5)])
def test_metrics_of_prior_samples(n, nz, pz_scale):
    """Of any number, they score 0 on average, to 4 standard errors of both averages."""
    sets = pz_scale * torch.randn(100, n, nz)
    metrics = [model.code_metrics(codes, pz_scale) for codes in sets]
    w2 = torch.tensor([m["test_w2"] for m in metrics])
    assert abs(w2.mean()) < 4 * w2.std() * math.sqrt(1 / 100 + 1 / 20)
    assert metrics[0]["test_w2_std_of_prior"] == pytest.approx(w2.std().item(), rel=0.6)
    assert_mean(torch.tensor([m["test_mmd"] for m in metrics]), 0.0)
    for name in ("eigenvalue_min", "eigenvalue_max"):
        mean = np.mean([m[name] for m in metrics])
        assert metrics[0][f"{name}_of_prior"] == pytest.approx(mean, rel=0.15, abs=1e-6)
    if n > nz:
        sets[0, :, 0] = 0  # a direction that is not used shows
        assert model.code_metrics(sets[0], pz_scale)["test_w2"] - metrics[0]["test_w2"] > 0.1


# --------------------------------------------------------------------------------------------------
# The mixture


@pytest.mark.parametrize("seed", range(10, 18))
def test_fit_mixture_finds_clusters(seed):
    """As many codes as outweigh the pseudo-codes, in clusters of their own weights and shapes."""
    torch.manual_seed(seed)
    sizes = (9000, 3000, 1000)
    clusters = [torch.randn(n, 2) @ torch.randn(2, 2) / 3 for n in sizes]
    for i, cluster in enumerate(clusters):
        cluster[:, 0] += 100 * i
    codes = torch.cat(clusters)
    fitted = model.fit_mixture(codes, components=3)
    # Covariances start from 2 nz pseudo-codes, and that of all codes from nz prior samples.
    n, nz = codes.shape
    of_all = (n * codes.T.cov(correction=0) + nz * torch.eye(nz)) / (n + nz)
    for i, cluster in zip(fitted["weights"].argsort(descending=True), clusters, strict=True):
        m = len(cluster)
        covariance = (m * cluster.T.cov(correction=0) + 2 * nz * of_all) / (m + 2 * nz)
        expected = torch.tensor(m / n), cluster.mean(0), covariance
        for value, moment in zip(fitted.values(), expected, strict=True):
            assert_close(value[i], moment.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("n", "least"), [(1, -60), (5, -30), (90, -10), (1000, -3)])
def test_fit_mixture_of_few_codes(n, least):
    """Each covariance can be inverted, and prior samples do not score absurd figures."""
    codes, others = 2 * torch.randn(n, 64), 2 * torch.randn(1000, 64)
    density = model.mixture(**model.fit_mixture(codes, pz_scale=2.0))
    assert torch.linalg.eigvalsh(density.component_distribution.covariance_matrix).min() > 0.5
    assert least < model.nats_from_prior(others, density, pz_scale=2.0) < 0


def test_fit_mixture_of_any_codes():
    """In a plane, far away, all equal, and in one dimension: samples are where the codes are."""
    flat = torch.randn(50, 3) * torch.tensor([1, 1, 0])
    for codes in (flat, 1e4 * torch.randn(30, 4) + 1e5, torch.ones(30, 4), torch.randn(30, 1)):
        samples = model.mixture(**model.fit_mixture(codes)).sample((1000,))
        assert samples.shape == (1000, codes.shape[1])
        reach = 10 * (codes.double().std(0, correction=0).max() + 1)
        assert (samples - codes.double().mean(0)).abs().max() < reach


def test_nats_from_prior_is_a_kl_divergence():
    """That of two Gaussians, on average over codes of the first."""
    mean, deviation = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 3.0]).double()
    density = model.mixture(torch.ones(1).double(), mean[None], torch.diag(deviation**2)[None])
    expected = kl_divergence(Normal(mean, deviation), Normal(0.0, 1.5)).sum()
    sets = mean + deviation * double(500, 10, 2)
    values = torch.stack([model.nats_from_prior(codes, density, 1.5) for codes in sets])
    assert_mean(values, expected)
