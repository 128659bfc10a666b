"""The paper's formulas against second ways to compute them, and the training step against both.

Draws are seeded, so every statistical test is a fixed computation. Its tolerance is 4 standard
errors of the estimate.
"""

import copy
import math
from argparse import Namespace
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


def assert_mean(values: Tensor, expected: Tensor | float, slack: float = 0) -> None:
    """Compares the mean over the first dimension with its expectation, to 4 standard errors."""
    error = values.std(0) / math.sqrt(len(values))
    near = (values.mean(0) - expected).abs() <= 4 * error + slack
    assert near.all(), (values.mean(0), expected, error)


def mmds(codes: Tensor, kernel: Kernel, prior: Tensor) -> Tensor:
    """`exact_mmd` and `sampled_mmd`, (2,)."""
    return torch.stack([model.exact_mmd(codes, kernel), model.sampled_mmd(codes, kernel, prior)])


def u_statistic(codes: Tensor, prior: Tensor, kernel: Kernel) -> float:
    """MMD^2 from the kernels of all pairs, in NumPy."""
    (n, nz), variance, points = codes.shape, kernel.pz_scale**2, torch.cat([codes, prior]).numpy()
    d2 = ((points[:, None] - points) ** 2).sum(2)
    values = sum(c / (c + d2) for c in 2 * nz * variance * np.array(kernel.scales))
    if kernel.name == "RBF":
        values = np.exp(-d2 / (2 * np.median(d2[np.triu_indices(2 * n, 1)])))
    shrunk = points * np.sqrt(2 / (1 + (points**2).sum(1, keepdims=True) / (nz * variance)))
    values += kernel.quadratic * (shrunk @ shrunk.T) ** 2 / (nz * variance**2)
    others = ~np.eye(n, dtype=bool)
    within = values[:n, :n][others].mean() + values[n:, n:][others].mean()
    return within - 2 * values[:n, n:].mean()


@pytest.mark.parametrize("quadratic", [0.0, 0.5])
@pytest.mark.parametrize("scales", [model.IMQ_SCALES, (1.0,)])
@pytest.mark.parametrize("pz_scale", [1.0, 2.5])
@pytest.mark.parametrize("name", KERNELS)
def test_sampled_mmd_is_the_u_statistic(name, pz_scale, scales, quadratic):
    codes, prior = 0.5 * double(7, 3) + 1, pz_scale * double(7, 3)
    kernel = Kernel(name, pz_scale, scales, quadratic)
    values = mmds(codes, kernel, prior)
    assert values[1].item() == pytest.approx(u_statistic(codes, prior, kernel), 1e-9)
    # The unit of the latent space does not matter.
    assert_close(mmds(3 * codes, kernel._replace(pz_scale=3 * pz_scale), 3 * prior), values)


@pytest.mark.parametrize(("spread", "shift"), [(0.1, 0), (1, 0), (3, 2)])
@pytest.mark.parametrize("nz", [1, 8, 64])
@pytest.mark.parametrize("quadratic", [0.0, 0.5])
@pytest.mark.parametrize("name", KERNELS)
def test_exact_mmd_is_the_mean_of_sampled_mmd(name, quadratic, nz, spread, shift, monkeypatch):
    monkeypatch.setattr(model, "median_bandwidth", lambda *_: 2 * nz * 1.5**2)  # as in exact_mmd
    kernel, codes = Kernel(name, 1.5, quadratic=quadratic), 1.5 * (spread * double(20, nz) + shift)
    sampled = torch.vmap(lambda prior: model.sampled_mmd(codes, kernel, prior))
    assert_mean(sampled(1.5 * double(1000, 20, nz)), model.exact_mmd(codes, kernel))


@pytest.mark.parametrize("name", KERNELS)
def test_exact_mmd_of_prior_samples(name):
    mmd = torch.vmap(partial(model.exact_mmd, kernel=Kernel(name, 1.5, quadratic=0.5)))
    sets = model.sample_prior(1000 * 20, 8, 1.5).view(1000, 20, 8)
    assert_mean(mmd(sets), 0.0)
    with pytest.raises(AssertionError):
        assert_mean(mmd(1.2 * sets), 0.0)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("name", KERNELS)
def test_sum_of_blocks(name, rows, monkeypatch):
    """So many rows at a time have the value of the whole and the gradient of differences."""
    kernel, codes, prior = Kernel(name, 1.5, quadratic=0.5), double(5, 2), double(5, 2) + 1
    whole, variance = mmds(codes, kernel, prior), model.median_bandwidth(codes, prior)
    spy = mock.Mock(wraps=model.squared_distances)
    monkeypatch.setattr(model, "squared_distances", spy)
    # No gradient passes through the bandwidth, and finite differences would see it change.
    monkeypatch.setattr(model, "median_bandwidth", lambda *_: variance)
    monkeypatch.setattr(model, "BLOCK_ENTRIES", rows * 5)
    codes.requires_grad_()
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert_close(mmds(codes, kernel, prior), whole)
    assert torch.autograd.gradcheck(lambda q: 7 * mmds(q, kernel, prior), codes)
    assert max(len(call.args[0]) for call in spy.mock_calls) == rows


@pytest.mark.parametrize("name", KERNELS)
def test_mmds_of_extreme_codes(name):
    """All equal, or so long that the quadratic kernel overflows unless they are shrunk."""
    ones, prior = torch.ones(8, 3), torch.randn(8, 3)
    for codes, z, away in ((ones, prior, True), (ones, ones, False), (1e10 * prior, prior, True)):
        values = mmds(codes.requires_grad_(), Kernel(name, quadratic=0.5), z.detach())
        (gradient,) = torch.autograd.grad(values.sum(), codes)
        assert gradient.isfinite().all()
        assert values.max() < 20 and (values > 0.1).tolist() == [True, away]
    for codes, z in ((ones[:1], ones[:1]), (ones, ones[:5])):
        with pytest.raises(ValueError, match="two rows or more"):
            model.sampled_mmd(codes, Kernel(), z)
    with pytest.raises(ValueError, match="two codes or more"):
        model.exact_mmd(ones[:1], Kernel())


def wave(*shape: int, phase: float = 0) -> Tensor:
    """sin(phase), sin(1 + phase), ..., in float64."""
    return torch.arange(math.prod(shape)).double().add(phase).sin().view(shape)


# In the next two tests, constants are from the formulas of the official code (tolstikhin/wae on
# GitHub, commit 0d9002c, wae.py and models.py), written down again in NumPy, in float64.


def test_reconstruction_cost_of_the_official_code():
    x, y = wave(2, 3, 4, 4), wave(2, 3, 4, 4, phase=1)  # on the scale from -1 to 1
    # 0.05 mean_n sum d^2, 0.2 mean_n sqrt(1e-8 + sum d^2) and 0.02 mean_n sum |d|.
    costs = {"l2sq": 1.1008506695598865, "l2": 0.9384214674861941, "l1": 0.584377740598482}
    for cost, expected in costs.items():
        symmetric = model.reconstruction_cost(x, y, cost, True)
        unit = model.reconstruction_cost((x + 1) / 2, (y + 1) / 2, cost)
        assert [symmetric.item(), unit.item()] == pytest.approx([expected] * 2, 1e-7)
        perfect = x.clone().requires_grad_()
        model.reconstruction_cost(perfect, x, cost).backward()
        assert perfect.grad.isfinite().all()


def test_mmd_prior_density_and_sharpness_of_the_official_code():
    q, p = 2 * wave(5, 3), 2 * wave(5, 3, phase=2)
    # Sums of C / (C + d^2), C = 2 * 3 * 1.5^2 s, over 5 * 4 pairs i != j and over 5 * 5.
    value = model.sampled_mmd(q, Kernel("IMQ", 1.5), p)
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


def build_run(tmp_path, *flags: str) -> main.Run:
    """A small auto-encoder with its optimisers, as the command line makes it."""
    argv = ["--dataroot=unused", f"--outf={tmp_path}", "--image_size=32", "--nf=2", "--nz=3"]
    return main.Run(main.get_flags([*argv, "--batch_size=8", "--seed=1", *flags])[0], CPU)


def gradients(network: nn.Module) -> list[Tensor]:
    return [weight.grad.clone() for weight in network.parameters()]


def check_step(run: main.Run, expected: Callable[..., tuple[Tensor, ...]]) -> nn.Module:
    """Compares a step with `expected(x, prior, *net(x))`: its losses, and d cost + 7 d penalty.

    Returns the network as it was before the step, with its gradient.
    """
    x = torch.rand(8, run.flags.channels, 32, 32)
    prior, net, calls = run.sample_prior(8), copy.deepcopy(run.net), []
    run.net.encoder.register_forward_hook(lambda *call: calls.append(call))
    torch.manual_seed(5)
    losses = main.train_step(run, x, *([prior] if run.needs_prior else []))
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
    main.train_step(run, torch.rand(8, 3, 32, 32), run.sample_prior(8))
    discriminator, optimizer, used = copy.deepcopy(run.discriminator), run.optimizers, []
    adam = torch.optim.Adam(discriminator.parameters())
    adam.load_state_dict(copy.deepcopy(optimizer["discriminator"].state_dict()))
    assert (adam.param_groups[0]["lr"], adam.param_groups[0]["betas"]) == (0.01, (0.5, 0.999))
    optimizer["discriminator"].register_step_pre_hook(
        lambda *_: used.extend(gradients(run.discriminator))
    )
    bce, ones, zeros = F.binary_cross_entropy_with_logits, torch.ones(8), torch.zeros(8)

    def expected(x, prior, y, codes, *_) -> tuple[Tensor, ...]:
        loss_d = bce(discriminator(prior), ones) + bce(discriminator(codes.detach()), zeros)
        discriminator.zero_grad()
        (7 * loss_d).backward()
        assert_close(used, gradients(discriminator), rtol=1e-4, atol=1e-6)
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
        ("--mode=mmd", Kernel("IMQ", 2.0)),
        ("--mode=mmd --mmd=sampled", Kernel("IMQ", 2.0)),
        ("--mode=mmd --mmd=sampled --kernel=RBF", Kernel("RBF", 2.0)),
        ("--mode=mmd --imq_scales=1 --quadratic=.5", Kernel("IMQ", 2.0, (1.0,), 0.5)),
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

    start = check_step(run, expected).encoder.moments.bias
    # Adam's first step moves each weight by the rate, against its gradient.
    moved = start - 0.01 * start.grad.sign()
    assert_close(run.net.encoder.moments.bias, moved, rtol=1e-3, atol=1e-5)


def test_learning_rate_factor():
    cases = [("paper", 103, 4, (120, 80, 200, 12)), ("constant", 103, 4, (412, 0, 0, 0))]
    # After 30 / 55 and 50 / 55 of 110 steps and of 7 steps, that is after 3.8 and 6.4 of them.
    cases += [("scaled", 11, 10, (60, 40, 10, 0)), ("scaled", 1, 7, (4, 3, 0, 0))]
    for schedule, niter, per_epoch, steps_at_each_rate in cases:
        flags, steps = Namespace(lr_schedule=schedule, niter=niter), range(niter * per_epoch)
        factors = [main.learning_rate_factor(step, per_epoch, flags) for step in steps]
        assert factors == np.repeat([1.0, 0.5, 0.1, 0.01], steps_at_each_rate).tolist()


def test_set_seed():
    """Each key has its own draws, the same ones each time."""
    keys = [(1,), (2,), (1, "noise"), (1, "prior"), (1, "noise", 0, 1), (1, "noise", 1, 0)]
    keys += [(1, "noise", 0, 11), (1, "noise", 0, 1, 1), (2**63 - 1, "noise")]
    draws = {(utils.set_seed(*key), tuple(torch.randn(4).tolist())) for key in 2 * keys}
    assert len(draws) == len(keys)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", model.IMAGE_SIZES)
@pytest.mark.parametrize("arch", ["dcgan", "paper"])
def test_encoder_and_decoder_shapes(arch, size, channels):
    x, shape = torch.rand(2, channels, size, size), (size, channels, 3, 2, arch)
    for noise in ("deterministic", "add_noise", "gaussian"):
        z, log_variance = model.Encoder(*shape, noise, False)(x)
        assert z.shape == (2, 3) and z.isfinite().all()
        assert log_variance.shape == (2, 3) if noise == "gaussian" else log_variance is None
    unit, symmetric = (model.Decoder(*shape, symmetric) for symmetric in (False, True))
    symmetric.load_state_dict(unit.state_dict())
    with torch.no_grad():
        y, y_symmetric = unit(100 * z), symmetric(100 * z)
    assert y.shape == x.shape and y.std() > 1e-3
    # One layer's outputs through a sigmoid, and through a tanh.
    assert_close(y_symmetric, torch.logit(y).tanh(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("arch", "kernel", "side"), [("paper", 5, 8), ("dcgan", 4, 4)])
def test_network_sizes(arch, kernel, side):
    """Counts weights: a batch norm has 2 a channel, and no bias before it (appendix C.2)."""
    with torch.device("meta"):
        plain, gaussian = (
            model.AutoEncoder(64, 3, 64, 128, arch, noise, False)
            for noise in ("deterministic", "gaussian")
        )
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
    noisy, seen = model.Encoder(32, 3, 3, 2, "dcgan", "add_noise", symmetric), []
    noisy.features.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.rand(8, 3, 32, 32)
    before = x.clone()
    noisy(x), noisy(x)
    assert torch.equal(x, before)  # the target of the reconstruction stays clean
    assert not torch.equal(*seen)
    noise = (torch.stack(seen) - x).flatten()
    assert_mean(noise, 0.0)
    assert_mean(noise**2, deviation**2)
    noisy.eval()(x)
    assert torch.equal(seen[-1], x)


def test_auto_encoder_gaussian_codes():
    """Of the moments given, around 3 and by 0.01; neighbours in bfloat16 are 0.016 apart there."""
    net, x = model.AutoEncoder(32, 3, 2, 2, "dcgan", "gaussian", False), torch.rand(4, 3, 32, 32)
    bias = net.encoder.moments.bias
    bias.data = torch.tensor([3.0, 3.1, -10.0, -9.0])
    for training, amp in ((True, False), (False, False), (True, True)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            images, codes, mean, log_variance = net.train(training)(x.repeat(500, 1, 1, 1))
        assert images.dtype == codes.dtype == torch.float32
        assert_mean(codes - mean, 0.0)
        assert_mean((codes - mean) ** 2 / log_variance.exp(), 1.0)
    nn.init.constant_(bias, 1e4)  # an extreme variance
    codes = net(x)[1]
    codes.sum().backward()
    assert codes.isfinite().all() and bias.grad.isfinite().all()


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
    flags = ["--noise=gaussian", "--pz_scale=1.5", "--lr=0.003", "--e_pretrain_sample_size=128"]
    run = build_run(tmp_path, *flags, "--e_pretrain_iters=400")
    images = np.random.default_rng(0).integers(256, size=(256, 32, 32, 3), dtype=np.uint8)
    decoder, codes = copy.deepcopy(run.net.decoder.state_dict()), []
    run.net.encoder.register_forward_hook(lambda *call: codes.append(model.draw_code(*call[2])))
    main.pretrain_encoder(run, images)
    assert len(codes) < 400  # it ends once the codes cannot be told from the prior
    first, last = codes[0], torch.cat(codes[-8:])
    assert (first.T.cov() - 1.5**2 * torch.eye(3)).abs().max() > 1
    assert (last.T.cov() - 1.5**2 * torch.eye(3)).abs().max() < 0.75
    assert last.mean(0).abs().max() < 0.3
    assert_close(run.net.decoder.state_dict(), decoder, rtol=0, atol=0)


def test_frechet_distance():
    mean, a, b = double(2, 6), double(6, 9), double(6, 4)
    a, b = a @ a.T, b @ b.T
    # The trace of (A^1/2 B A^1/2)^1/2 is the sum of the roots of the eigenvalues of A B.
    roots = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt()
    expected = (mean[0] - mean[1]).square().sum() + a.trace() + b.trace() - 2 * roots.sum()
    assert_close(model.frechet_distance(mean[0], a, mean[1], b), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("n", "nz", "sets"), [(900, 64, 40), (100, 4, 1000)])
@pytest.mark.parametrize(
    ("low", "high", "unused", "mean", "pz_scale"),
    [(1.0, 1.0, 0, 0.0, 1.0), (0.3, 2.0, 0, 0.1, 1.5), (1.2, 1.2, 1, 0.0, 1.0)],
)
def test_gaussian_w2_on_average(n, nz, sets, low, high, unused, mean, pz_scale):
    """It is the true distance, but for terms of the second order, which are not corrected."""
    (axes, _), deviations = torch.linalg.qr(double(nz, nz)), torch.linspace(low, high, nz).sqrt()
    deviations[: unused * nz // 4] = 0
    codes = (double(sets, n, nz) * deviations + mean) @ axes
    values = torch.stack([model.gaussian_w2(z, pz_scale) for z in codes])
    expected = nz * mean**2 + (deviations - pz_scale).square().sum()
    assert_mean(values, expected, slack=nz**3 / n**2 / 6)  # 0.05 and 0.001


def test_moments_and_covariance_eigenvalues():
    rows, moments = (3 + double(10, 4) @ double(4, 4)).float(), model.Moments()
    for batch in rows.split(4):
        moments.add(batch)
    mean, covariance = moments.result()
    np.testing.assert_allclose(mean, rows.double().mean(0), rtol=1e-9)
    np.testing.assert_allclose(covariance, np.cov(rows.double().T), rtol=1e-9)
    values, vectors = model.covariance_eigenvalues(rows)
    np.testing.assert_allclose(vectors * values @ vectors.T, covariance, rtol=1e-9)
    assert values.tolist() == sorted(values.tolist())


def test_spread_points():
    codes = torch.tensor([[0.0], [1.0], [3.0]]).double()
    first, second = torch.stack([model.spread_points(codes, 2) for _ in range(2000)])[..., 0].T
    assert_mean(first, 4 / 3)
    for start, other, probability in ((0, 3, 9 / 10), (1, 3, 4 / 5), (3, 0, 9 / 13)):
        assert_mean((second[first == start] == other).double(), probability)
    assert model.spread_points(codes, 3).sum() == 4  # each once


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("seed", range(10, 18))
def test_fit_mixture_finds_clusters(seed, k):
    """As from 99 of 100 seeds; from starts that are drawn uniformly it would be 76."""
    torch.manual_seed(seed)
    sizes = (900, 300, 100)[:k]
    clusters = [torch.randn(n, 8) @ torch.randn(8, 8) / 3 for n in sizes]
    for i, cluster in enumerate(clusters):
        cluster[:, 0] += 100 * i
    fitted = model.fit_mixture(torch.cat(clusters), k)
    for i, cluster in zip(fitted["weights"].argsort(descending=True), clusters, strict=True):
        weight = torch.tensor(len(cluster) / sum(sizes))
        moments = weight, cluster.mean(0), cluster.T.cov(correction=0)
        for value, expected in zip(fitted.values(), moments, strict=True):
            assert_close(value[i], expected.double(), rtol=0, atol=0.01)


@pytest.mark.parametrize("components", [1, 10])
def test_fit_mixture_of_any_codes(components):
    """In a plane, fewer than dimensions, as large as float32 can be, all equal, and one alone."""
    flat, huge = torch.randn(50, 3) * torch.tensor([1, 1, 0]), 1e38 * torch.randn(30, 4)
    others = torch.randn(20, 60), torch.ones(30, 4), torch.randn(1, 4), torch.randn(30, 1)
    for codes in (flat, huge.clamp(-3e38, 3e38), *others):
        samples = model.mixture(**model.fit_mixture(codes, components)).sample((1000,))
        assert samples.shape == (1000, codes.shape[1])
        # They are where the codes are, and finite.
        reach = 10 * (codes.double().std(0, correction=0).max() + 1e-3)
        assert (samples - codes.double().mean(0)).abs().max() < reach
