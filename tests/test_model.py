"""The paper's formulas against second ways to compute them, and the training step against both.

Draws are seeded, so every statistical test is a fixed computation. Its tolerance is 4 standard
errors of the estimate.
"""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Independent, Normal

import main
import model
import utils

CPU = utils.World(0, 1, torch.device("cpu"))
KERNELS = ("IMQ", "RBF")
ARCHS = ("dcgan", "paper")


@pytest.fixture(autouse=True)
def seeded():
    """Gives the same draws whichever tests ran before."""
    torch.manual_seed(0)


def double(*shape: int) -> Tensor:
    """Returns a draw of N(0, 1) in float64."""
    return torch.randn(*shape, dtype=torch.float64)


def assert_mean(values: Tensor, expected: Tensor | float) -> None:
    """Compares the mean over the first dimension with its expectation, to 4 standard errors."""
    error = values.std(0) / math.sqrt(len(values))
    assert ((values.mean(0) - expected).abs() <= 4 * error).all(), (values.mean(0), expected, error)


def with_moments(mean: list[float], deviations: list[float]) -> Tensor:
    """Returns 50 codes of exactly this mean and, along the axes, these standard deviations."""
    centred = double(50, len(mean))
    directions, _ = torch.linalg.qr(centred - centred.mean(0))
    return math.sqrt(49) * directions * torch.tensor(deviations) + torch.tensor(mean)


def build_run(tmp_path, *flags: str) -> main.Run:
    """Returns a small auto-encoder with its optimisers, as the command line makes it."""
    argv = ["--dataroot=unused", f"--outf={tmp_path}", "--image_size=32", "--nf=2", "--nz=3"]
    run = main.Run(main.get_flags([*argv, "--batch_size=8", "--seed=1", *flags])[0], CPU)
    run.wrap()
    return run


def encoder(image_size=32, nz=3, nf=2, arch="dcgan", noise="deterministic", **options):
    """Returns a small encoder."""
    return model.Encoder(image_size, nz, nf, arch, noise, **options)


def mmd_by_pairs(q: np.ndarray, p: np.ndarray, kernel, pz_scale, scales, quadratic) -> float:
    """Computes the U-statistic pair by pair."""
    n, nz = q.shape
    variance, points = pz_scale**2, np.concatenate([q, p])
    pooled = [((points[i] - points[j]) ** 2).sum() for i in range(2 * n) for j in range(i)]

    def k(a: np.ndarray, b: np.ndarray) -> float:
        d2 = ((a - b) ** 2).sum()
        if kernel == "RBF":
            value = np.exp(-d2 / (2 * np.median(pooled)))
        else:
            value = sum((2 * nz * variance * s) / (2 * nz * variance * s + d2) for s in scales)
        a, b = (z * np.sqrt(2 / (1 + z @ z / (nz * variance))) for z in (a, b))
        return value + quadratic * (a @ b) ** 2 / (nz * variance**2)

    within = sum(k(x[i], x[j]) for x in (q, p) for i in range(n) for j in range(n) if i != j)
    return within / (n * (n - 1)) - 2 * sum(k(a, b) for a in q for b in p) / n**2


@pytest.mark.parametrize("quadratic", [0.0, 0.5])
@pytest.mark.parametrize("scales", [(0.1, 0.2, 0.5, 1, 2, 5, 10), (1.0,)])
@pytest.mark.parametrize("pz_scale", [1.0, 2.5])
@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_equals_a_loop_over_pairs(kernel, pz_scale, scales, quadratic):
    codes, prior = 0.5 * double(7, 3) + 1, pz_scale * double(7, 3)
    value = model.mmd_penalty(codes, prior, kernel, pz_scale, scales, quadratic)
    expected = mmd_by_pairs(codes.numpy(), prior.numpy(), kernel, pz_scale, scales, quadratic)
    assert value.shape == ()
    assert value.item() == pytest.approx(expected, rel=1e-9)
    # The unit of the latent space does not matter.
    scaled = model.mmd_penalty(3 * codes, 3 * prior, kernel, 3 * pz_scale, scales, quadratic)
    torch.testing.assert_close(scaled, value)


@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_gradient_equals_finite_differences(kernel, monkeypatch):
    # Finite differences would see the bandwidth change, through which no gradient passes.
    monkeypatch.setattr(model, "median_bandwidth", lambda *_: 3.0)
    codes, prior = double(5, 3).requires_grad_(), 1 + double(5, 3)
    assert torch.autograd.gradcheck(lambda q: 7 * model.mmd_penalty(q, prior, kernel, 1.5), codes)


@pytest.mark.parametrize("entries", [1, 4 * 13])
@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_in_blocks_has_the_same_value_and_gradient(kernel, entries, monkeypatch):
    codes, prior = double(13, 3).requires_grad_(), double(13, 3) + 1
    whole = 2 * model.mmd_penalty(codes, prior, kernel)
    (whole_gradient,) = torch.autograd.grad(whole, codes)

    sizes, distances = [], model.squared_distances
    constant = model.median_bandwidth(codes, prior)

    def counted(a: Tensor, b: Tensor) -> Tensor:
        sizes.append(len(a))
        return distances(a, b)

    monkeypatch.setattr(model, "median_bandwidth", lambda *_: constant)
    monkeypatch.setattr(model, "squared_distances", counted)
    monkeypatch.setattr(model, "BLOCK_ENTRIES", entries)
    blocked = 2 * model.mmd_penalty(codes, prior, kernel)
    torch.testing.assert_close(blocked, whole)
    torch.testing.assert_close(torch.autograd.grad(blocked, codes)[0], whole_gradient)
    assert max(sizes) == max(1, entries // 13)  # no kernel matrix was larger than allowed


@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_of_a_collapsed_encoder_is_finite(kernel):
    codes = torch.ones(8, 3, requires_grad=True)
    for prior, away in ((torch.randn(8, 3), True), (torch.ones(8, 3), False)):
        value = model.mmd_penalty(codes, prior, kernel)
        (gradient,) = torch.autograd.grad(value, codes)
        assert value.isfinite() and gradient.isfinite().all()
        assert (value > 0.1) == away


@pytest.mark.parametrize(("nz", "pz_scale"), [(2, 1.0), (16, 0.7)])
def test_mmd_to_prior_is_the_mean_penalty_over_draws_of_the_prior(nz, pz_scale):
    codes = pz_scale * (0.8 * torch.randn(30, nz) + 0.3)
    draws = model.sample_prior(3000 * 30, nz, pz_scale).view(3000, 30, nz)
    values = torch.stack([model.mmd_penalty(codes, draw, "IMQ", pz_scale) for draw in draws])
    assert_mean(values.double(), model.mmd_to_prior(codes, pz_scale))
    assert values.std() / math.sqrt(3000) < 0.02 * values.mean()  # a sharp comparison


def test_discriminator_loss_is_the_binary_cross_entropy():
    real, fake = double(50), 3 * double(50)
    expected = -real.sigmoid().log().mean() - (1 - fake.sigmoid()).log().mean()
    torch.testing.assert_close(model.discriminator_loss(real, fake), expected)
    # log(1 - sigmoid(300)) would be minus infinity.
    assert model.discriminator_loss(torch.tensor([-300.0]), torch.tensor([300.0])) == 600


@pytest.mark.parametrize("pz_scale", [None, 1.5])
def test_gan_penalty_is_the_non_saturating_loss_with_a_gradient_for_the_codes_only(pz_scale):
    discriminator = model.Discriminator(3, width=8, pz_scale=pz_scale).double()
    codes = double(5, 3).requires_grad_()
    expected = -discriminator(codes).sigmoid().log().mean()
    torch.testing.assert_close(model.gan_penalty(discriminator, codes), expected)
    assert torch.autograd.gradcheck(lambda z: model.gan_penalty(discriminator, z), codes)
    model.gan_penalty(discriminator, codes).backward()
    assert codes.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in discriminator.parameters())
    model.discriminator_loss(discriminator(codes), discriminator(codes)).backward()
    assert all(weight.grad is not None for weight in discriminator.parameters())  # it still learns


def test_the_trick_adds_the_log_density_of_the_prior_to_the_logit():
    plain, trick = model.Discriminator(3), model.Discriminator(3, pz_scale=1.7)
    trick.load_state_dict(plain.state_dict())
    z = 3 * torch.randn(10, 3)
    torch.testing.assert_close(trick(z), plain(z) + Normal(0.0, 1.7).log_prob(z).sum(1))


def test_kl_divergence_is_that_of_gaussians():
    mean, log_variance = double(20, 4), double(20, 4)
    posterior = Independent(Normal(mean, (log_variance / 2).exp()), 1)
    prior = Independent(Normal(torch.zeros(20, 4).double(), 1.5), 1)
    expected = torch.distributions.kl_divergence(posterior, prior).mean()
    torch.testing.assert_close(model.kl_divergence(mean, log_variance, 1.5), expected)


def gradients(network: nn.Module) -> list[Tensor]:
    return [weight.grad.clone() for weight in network.parameters()]


def step(run: main.Run, x: Tensor, prior: Tensor) -> tuple[Tensor, nn.Module, tuple[Tensor, ...]]:
    """Does a step. Returns its losses and, before it, the network and what that makes of x."""
    net, calls = copy.deepcopy(run.net), []
    run.net.encoder.register_forward_hook(lambda *call: calls.append(call))
    torch.manual_seed(5)
    losses = main.train_step(run, x, prior)
    assert len(calls) == 1
    torch.manual_seed(5)  # the same noise
    return losses, net, net(x)


def check_step(run: main.Run, net: nn.Module, losses: Tensor, expected: list[Tensor]) -> None:
    """Compares losses, and gradients with those of cost + 7 penalty."""
    net.zero_grad()
    (expected[0] + 7 * expected[1]).backward()
    torch.testing.assert_close(losses, torch.stack(expected).detach())
    torch.testing.assert_close(gradients(run.net), gradients(net), rtol=1e-3, atol=3e-5)


@pytest.mark.parametrize("trick", [[], ["--nowozin_trick"]])
def test_gan_step_is_a_step_of_the_discriminator_and_one_of_the_auto_encoder(trick, tmp_path):
    # At this rate the discriminators before and after their step differ to the penalty.
    run = build_run(tmp_path, "--mode=gan", "--LAMBDA=7", "--lr_adv=0.01", *trick)
    # Its gradients must leave no trace in the next step.
    main.train_step(run, torch.rand(8, 3, 32, 32), torch.randn(8, 3))
    discriminator = copy.deepcopy(run.discriminator)
    adam = torch.optim.Adam(discriminator.parameters())
    adam.load_state_dict(copy.deepcopy(run.optimizers["discriminator"].state_dict()))
    assert (adam.param_groups[0]["lr"], adam.param_groups[0]["betas"]) == (0.01, (0.5, 0.999))
    discriminator.zero_grad()
    x, prior = torch.rand(8, 3, 32, 32), torch.randn(8, 3)
    losses, net, (y, codes, _, _) = step(run, x, prior)

    bce, ones, zeros = F.binary_cross_entropy_with_logits, torch.ones(8), torch.zeros(8)
    loss_d = 7 * (bce(discriminator(prior), ones) + bce(discriminator(codes.detach()), zeros))
    loss_d.backward()
    adam.step()
    # Adam moves weights of tiny gradients, whose signs are rounding errors, as much as any other.
    # If the step's own discriminator is where it should be, it is the more exact one.
    z = torch.randn(20, 3)
    torch.testing.assert_close(run.discriminator(z), discriminator(z), rtol=1e-2, atol=1e-2)
    # It has the gradient of its own loss only.
    pair = gradients(run.discriminator), gradients(discriminator)
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6)
    cost = 0.05 * (2 * (x - y)).square().sum((1, 2, 3)).mean()
    check_step(run, net, losses, [cost, bce(run.discriminator(codes), ones), loss_d])


@pytest.mark.parametrize(
    ("flags", "kernel"),
    [
        (["--mode=mmd"], ("IMQ", 2.0)),
        (["--mode=mmd", "--kernel=RBF"], ("RBF", 2.0)),
        (["--mode=mmd", "--imq_scales=1", "--quadratic=.5"], ("IMQ", 2.0, (1.0,), 0.5)),
        (["--mode=vae"], None),
    ],
)
def test_mmd_and_vae_steps_are_one_step_on_cost_plus_lambda_times_penalty(flags, kernel, tmp_path):
    flags = [*flags, "--noise=gaussian"]
    run = build_run(tmp_path, *flags, "--LAMBDA=7", "--lr=0.01", "--pz_scale=2", "--cost=l1")
    x, prior = torch.rand(8, 3, 32, 32), 2 * torch.randn(8, 3)
    losses, net, (y, codes, mean, log_variance) = step(run, x, prior)
    cost = 0.02 * (2 * (x - y)).abs().sum((1, 2, 3)).mean()
    if kernel:
        penalty = model.mmd_penalty(codes, prior, *kernel)
    else:
        penalty = model.kl_divergence(mean, log_variance, 2.0)
    assert not torch.equal(codes, mean)
    check_step(run, net, losses, [cost, penalty, torch.tensor(0.0)])
    # Adam's first step moves each weight by the rate, against its gradient.
    bias, start = run.net.encoder.moments.bias, net.encoder.moments.bias
    torch.testing.assert_close(bias, start - 0.01 * bias.grad.sign(), rtol=1e-3, atol=1e-5)


def test_cost_counts_pixels_on_the_scale_from_minus_one_to_one():
    x, y = torch.rand(2, 5, 3, 4, 4, dtype=torch.float64)
    d = np.abs(2 * (x - y).numpy())
    by_hand = {"l2sq": 0.05 * (d**2).sum((1, 2, 3)), "l1": 0.02 * d.sum((1, 2, 3))}
    by_hand["l2"] = 0.2 * np.sqrt((d**2).sum((1, 2, 3)))
    for cost, expected in by_hand.items():
        value = model.reconstruction_cost(x, y, cost)
        symmetric = model.reconstruction_cost(2 * x - 1, 2 * y - 1, cost, symmetric=True)
        assert [value.item(), symmetric.item()] == pytest.approx([expected.mean()] * 2)
        perfect = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model.reconstruction_cost(x, perfect, cost), perfect)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("image_size", model.IMAGE_SIZES)
@pytest.mark.parametrize("arch", ARCHS)
def test_shapes_and_ranges(arch, image_size):
    x = torch.rand(2, 3, image_size, image_size)
    for noise in ("deterministic", "add_noise", "gaussian"):
        z, log_variance = encoder(image_size, arch=arch, noise=noise)(x)
        assert z.shape == (2, 3) and z.isfinite().all()
        assert log_variance.shape == (2, 3) if noise == "gaussian" else log_variance is None
    unit = model.Decoder(image_size, 3, 2, arch)
    symmetric = model.Decoder(image_size, 3, 2, arch, symmetric=True)
    symmetric.load_state_dict(unit.state_dict())
    with torch.no_grad():
        y, y_symmetric = unit(100 * z), symmetric(100 * z)
    assert y.shape == x.shape
    assert 0 < y.min() < 0.5 < y.max() < 1
    # One layer's outputs through a sigmoid, and through a tanh.
    torch.testing.assert_close(y_symmetric, torch.logit(y).tanh(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("arch", "kernel", "side"), [("paper", 5, 8), ("dcgan", 4, 4)])
def test_sizes_of_the_networks(arch, kernel, side):
    """Counts weights: a batch norm has 2 a channel, and no bias before it (appendix C.2)."""
    with torch.device("meta"):
        networks = [model.Encoder(64, 64, 128, arch, "deterministic")]
        networks += [model.Encoder(64, 64, 128, arch, "gaussian"), model.Decoder(64, 64, 128, arch)]
        networks += [model.Discriminator(64)]
    sizes = [sum(weight.numel() for weight in network.parameters()) for network in networks]
    inner = kernel**2 * (128 * 256 + 256 * 512 + 512 * 1024)
    linear = 4 * 4 * 1024 * 64 + 64
    convolutions = kernel**2 * 3 * 128 + inner + 2 * (128 + 256 + 512 + 1024)
    if arch == "dcgan":  # one more convolution, from 4x4 to 1x1
        convolutions += 4 * 4 * 1024 * 1024 + 2 * 1024
        linear = 1024 * 64 + 64
    decoder = (64 + 1) * side * side * 1024 + inner + 2 * (512 + 256 + 128)
    decoder += kernel**2 * 128 * 3 + 3
    discriminator = (64 * 512 + 512) + 3 * (512 * 512 + 512) + (512 + 1)
    assert sizes == [convolutions + linear, convolutions + 2 * linear, decoder, discriminator]


@pytest.mark.parametrize(("symmetric", "deviation"), [(True, 0.01), (False, 0.005)])
def test_add_noise_disturbs_the_pixels_while_training_only(symmetric, deviation):
    """Looks at what the first layer sees: the same noise on the scale of the cost."""
    noisy, seen = encoder(noise="add_noise", symmetric=symmetric), []
    noisy.features.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.rand(8, 3, 32, 32)
    before = x.clone()
    noisy(x), noisy(x)
    assert torch.equal(x, before)  # the target of the reconstruction stays clean
    assert not torch.equal(*seen)
    noise = (torch.stack(seen) - x).flatten()
    assert_mean(noise, 0.0)
    assert_mean(noise**2, deviation**2)
    noisy.eval()
    assert torch.equal(noisy(x)[0], noisy(x)[0])
    assert torch.equal(seen[-1], x)


def test_a_gaussian_encoder_draws_codes_of_the_moments_that_it_gives():
    net, x = model.AutoEncoder(32, 2, 2, "dcgan", "gaussian"), torch.rand(4, 3, 32, 32)
    nn.init.normal_(net.encoder.moments.bias)
    for training in (True, False):
        with torch.no_grad():
            _, draws, means, log_variances = net.train(training)(x.repeat(1000, 1, 1, 1))
        draws, mean, variance = draws.view(1000, 4, 2), means[:4], log_variances[:4].exp()
        assert_mean(draws, mean)
        assert_mean((draws - mean) ** 2, variance)
    nn.init.constant_(net.encoder.moments.bias, 1e4)  # an extreme variance
    codes = net(x)[1]
    codes.sum().backward()
    assert codes.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in net.encoder.parameters())


def test_small_noise_of_a_gaussian_encoder_survives_bfloat16():
    """Draws around 3, where neighbours in bfloat16 are 0.016 apart, with a deviation of 0.0067."""
    net = model.AutoEncoder(32, 1, 2, "dcgan", "gaussian")
    nn.init.zeros_(net.encoder.moments.weight)
    net.encoder.moments.bias.data = torch.tensor([3.0, -10.0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        images, codes, _, _ = net(torch.rand(2000, 3, 32, 32))
    assert codes.dtype == images.dtype == torch.float32
    assert_mean(codes, 3.0)
    assert_mean((codes - 3) ** 2, math.exp(-10))


def test_pretrain_loss_compares_mean_and_covariance_with_those_of_the_prior():
    codes = with_moments([1.0, 2.0], [1.5, 2.0]) @ torch.tensor([[0.6, -0.8], [0.8, 0.6]]).double()
    # The mean rotates to (2.2, 0.4). So does the covariance, less the prior's: diag(0, 4 - 2.25).
    expected = (2.2**2 + 0.4**2) / 2 + (4 - 2.25) ** 2 / 4
    assert model.pretrain_loss(codes, pz_scale=1.5).item() == pytest.approx(expected)


@pytest.mark.parametrize(("n", "nz", "pz_scale"), [(10, 3, 2.0), (2, 1, 0.5)])
def test_pretrain_floor_is_what_draws_of_the_prior_score_on_average(n, nz, pz_scale):
    draws = pz_scale * double(2000, n, nz)
    losses = torch.stack([model.pretrain_loss(codes, pz_scale) for codes in draws])
    assert_mean(losses, model.pretrain_floor(n, nz, pz_scale))


def test_pretraining_brings_the_moments_of_the_codes_to_those_of_the_prior(tmp_path):
    flags = ["--noise=gaussian", "--pz_scale=1.5", "--lr=0.003", "--e_pretrain_sample_size=128"]
    run = build_run(tmp_path, *flags, "--e_pretrain_iters=400")
    images = np.random.default_rng(0).integers(256, size=(256, 32, 32, 3), dtype=np.uint8)
    decoder, codes = copy.deepcopy(run.net.decoder.state_dict()), []
    run.net.encoder.register_forward_hook(lambda *call: codes.append(model.draw_code(*call[2])))
    main.pretrain_encoder(run, images)
    assert len(codes) < 400  # it ends once the codes cannot be told from the prior
    first, last = codes[0], torch.cat(codes[-8:])
    target = 1.5**2 * torch.eye(3)
    assert (first.T.cov() - target).abs().max() > 1
    assert (last.T.cov() - target).abs().max() < 0.75
    assert last.mean(0).abs().max() < 0.3
    torch.testing.assert_close(run.net.decoder.state_dict(), decoder, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("schedule", "niter", "epochs_at_each_rate"),
    [
        ("paper", 103, (30, 20, 50, 3)),
        ("constant", 103, (103, 0, 0, 0)),
        ("scaled", 28, (16, 10, 2, 0)),
        ("scaled", 1, (1, 0, 0, 0)),
    ],
)
def test_learning_rates_fall_three_times(schedule, niter, epochs_at_each_rate):
    factors = [main.learning_rate_factor(epoch, schedule, niter) for epoch in range(niter)]
    assert factors == np.repeat([1.0, 0.5, 0.1, 0.01], epochs_at_each_rate).tolist()


def test_a_seed_repeats_its_draws_and_another_key_has_others():
    def draw(*key: int | str) -> tuple[float, ...]:
        utils.set_seed(*key)
        return tuple(torch.randn(4).tolist())

    keys = [(1,), (2,), (1, "noise"), (1, "prior"), (1, "noise", 0, 1), (1, "noise", 1, 0)]
    keys += [(1, "noise", 0, 11), (1, "noise", 0, 1, 1), (2**63 - 1, "noise")]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(1, "noise", 0, 1) == draw(1, "noise", 0, 1)


def test_gaussian_w2_by_hand():
    codes = with_moments([1.0, 0.0, -2.0], [2.0, 0.5, 0.0])
    expected = 1 + 4 + (2 - 1.5) ** 2 + (0.5 - 1.5) ** 2 + 1.5**2
    assert model.gaussian_w2(codes, pz_scale=1.5).item() == pytest.approx(expected)
    rotation, _ = torch.linalg.qr(double(3, 3))
    assert model.gaussian_w2(codes @ rotation, pz_scale=1.5).item() == pytest.approx(expected)


def test_one_component_is_the_gaussian_with_the_moments_of_the_codes():
    codes = double(300, 3) @ torch.tensor([[2.0, 1, 0], [0, 1, -1], [0, 0, 0.5]]).double() + 3
    mean, covariance = codes.mean(0), codes.T.cov(correction=0)
    samples = model.fit_mixture(codes.float(), 1).sample((20000,))
    assert_mean(samples, mean)
    centred = samples - mean
    assert_mean(centred[:, :, None] * centred[:, None], covariance)


def test_a_mixture_recovers_two_clusters_and_is_likelier_than_one_gaussian():
    first = torch.tensor([3.0, 0.0]) + torch.randn(1500, 2) * torch.tensor([0.5, 1.0])
    second = torch.tensor([-3.0, 1.0]) + 0.7 * torch.randn(500, 2)
    codes = torch.cat([first, second]).double()
    mixture, gaussian = model.fit_mixture(codes.float(), 2), model.fit_mixture(codes.float(), 1)
    weights, parts = mixture.mixture_distribution.probs, mixture.component_distribution
    for i, cluster in zip(weights.argsort(descending=True), (first, second), strict=True):
        assert weights[i].item() == pytest.approx(len(cluster) / 2000, abs=0.01)
        moments = cluster.double().mean(0), cluster.double().T.cov()
        found = parts.mean[i], parts.covariance_matrix[i]
        torch.testing.assert_close(found, moments, rtol=0, atol=0.05)
    assert mixture.log_prob(codes).mean() > gaussian.log_prob(codes).mean() + 0.5


@pytest.mark.parametrize("components", [1, 10])
@pytest.mark.parametrize(
    "codes",
    [
        pytest.param(torch.cat([torch.randn(50, 2), torch.full((50, 1), 0.5)], 1), id="singular"),
        pytest.param(torch.randn(20, 100), id="fewer codes than dimensions"),
        pytest.param(torch.randn(30, 4) * 1e38, id="the largest of float32"),
        pytest.param(torch.ones(30, 4), id="all equal"),
        pytest.param(torch.randn(1, 4), id="one code"),
        pytest.param(torch.randn(30, 1), id="one dimension"),
    ],
)
def test_any_codes_can_be_fitted(codes, components):
    codes = codes.clamp(-3e38, 3e38)
    samples = model.fit_mixture(codes, components).sample((1000,))
    assert samples.shape == (1000, codes.shape[1])
    assert samples.isfinite().all()
    # They are where the codes are.
    reach = 10 * (codes.double().std(0, correction=0).max() + 1e-3)
    assert (samples - codes.double().mean(0)).abs().max() < reach


def test_sharpness_is_the_variance_of_the_laplace_filtered_grey_image():
    images = torch.rand(3, 3, 6, 5)
    grey = np.einsum("ncij,c->nij", images.double().numpy(), [0.299, 0.587, 0.114])
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    expected = (around - 4 * grey[:, 1:-1, 1:-1]).var((1, 2))
    np.testing.assert_allclose(utils.sharpness(images), expected, rtol=1e-4)


def test_the_quadratic_kernel_is_bounded_however_long_the_codes_are():
    codes = 1e6 * torch.randn(50, 8)
    assert model.quadratic_kernel(codes, codes, 1.0).max() <= (2 * 8) ** 2 / 8 * 1.001
