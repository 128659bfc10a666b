"""The paper's formulas against second ways to compute them, and what the training step makes of them.

Oracles are plain loops, numpy or hand-made steps. Draws are seeded, so that every statistical test is a fixed
computation; its tolerance is 4 standard errors of the estimate, and says so.
"""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import main
import model
import utils

CPU = utils.World(0, 1, 0, torch.device("cpu"))
KERNELS = ("IMQ", "RBF")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same draws whichever tests ran before."""
    torch.manual_seed(0)


def double(*shape: int) -> Tensor:
    """A draw of N(0, 1) in float64."""
    return torch.randn(*shape, dtype=torch.float64)


def assert_mean(values: Tensor, expected: Tensor | float) -> None:
    """The mean over the first dimension is within 4 standard errors of what it should be."""
    standard_error = values.std(0) / math.sqrt(len(values))
    assert ((values.mean(0) - expected).abs() <= 4 * standard_error).all(), (values.mean(0), standard_error)


def build_wae(tmp_path, *flags: str) -> main.WAE:
    """A small auto-encoder with its optimisers, as the command line makes it."""
    argv = ["--dataroot=unused", f"--outf={tmp_path}", "--seed=1", "--image_size=32", "--nf=2", "--nz=3", *flags]
    wae = main.WAE(main.parse_flags(argv)[0], CPU)
    wae.prepare_training()
    return wae


# ----------------------------------------------------------------------------------------------------------------------
# MMD


def mmd_by_pairs(q: np.ndarray, p: np.ndarray, kernel: str, pz_scale: float) -> float:
    """The U-statistic, pair by pair."""
    n, nz = q.shape
    points = np.concatenate([q, p])
    pooled = [((points[i] - points[j]) ** 2).sum() for i in range(2 * n) for j in range(i)]
    variance = np.median(pooled)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        d2 = ((a - b) ** 2).sum()
        if kernel == "RBF":
            return np.exp(-d2 / (2 * variance))
        scales = (0.1, 0.2, 0.5, 1, 2, 5, 10)
        return sum((2 * nz * pz_scale**2 * s) / (2 * nz * pz_scale**2 * s + d2) for s in scales)

    total = 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                total += (k(q[i], q[j]) + k(p[i], p[j])) / (n * (n - 1))
            total -= 2 * k(q[i], p[j]) / n**2
    return total


@pytest.mark.parametrize("pz_scale", [1.0, 2.5])
@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_equals_a_loop_over_pairs(kernel, pz_scale):
    codes, prior = 0.5 * double(7, 3) + 1, pz_scale * double(7, 3)
    value = model.mmd_penalty(codes, prior, kernel, pz_scale)
    assert value.shape == ()
    assert value.item() == pytest.approx(mmd_by_pairs(codes.numpy(), prior.numpy(), kernel, pz_scale), rel=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_does_not_depend_on_the_unit_of_the_latent_space(kernel):
    codes, prior = double(9, 4) + 1, double(9, 4)
    value = model.mmd_penalty(codes, prior, kernel)
    torch.testing.assert_close(model.mmd_penalty(3 * codes, 3 * prior, kernel, pz_scale=3.0), value)


def test_the_bandwidth_is_the_median_over_distinct_pairs_of_the_first_points(monkeypatch):
    codes, prior = double(9, 3), 2 * double(9, 3)
    monkeypatch.setattr(model, "BANDWIDTH_SAMPLE", 5)
    points = np.concatenate([codes[:5].numpy(), prior[:5].numpy()])
    pooled = [((points[i] - points[j]) ** 2).sum() for i in range(10) for j in range(i)]  # 45: a true middle
    variance = model.median_bandwidth(codes.requires_grad_(), prior)
    assert variance.item() == pytest.approx(np.median(pooled))
    assert not variance.requires_grad


@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_of_two_draws_of_one_distribution_is_zero_on_average(kernel):
    draws = (1 + 2 * torch.randn(1500, 2, 6, 3)).unbind()
    values = torch.stack([model.mmd_penalty(*draw, kernel) for draw in draws])
    assert_mean(values, 0.0)
    assert 0.2 < (values < 0).double().mean() < 0.9  # unbiased, and so negative about half the time


@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_grows_with_the_distance_between_the_distributions(kernel):
    codes, prior = torch.randn(2, 200, 4)
    values = [model.mmd_penalty(codes + shift, prior, kernel).item() for shift in (0.0, 0.3, 0.6, 1.0, 2.0)]
    assert values == sorted(values)
    assert abs(values[0]) < 0.1 * values[-1]


@pytest.fixture
def constant_bandwidth(monkeypatch) -> None:
    """RBF's bandwidth, through which no gradient passes, as the constant that finite differences need it to be."""
    monkeypatch.setattr(model, "median_bandwidth", lambda codes, prior: torch.tensor(3.0, dtype=torch.float64))


@pytest.mark.parametrize("block_entries", [10**6, 12])  # at once, or of 5 rows in blocks of 2, 2 and 1
@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_gradient_equals_finite_differences(kernel, block_entries, constant_bandwidth, monkeypatch):
    monkeypatch.setattr(model, "BLOCK_ENTRIES", block_entries)
    codes, prior = double(5, 3).requires_grad_(), 1 + double(5, 3)
    assert torch.autograd.gradcheck(lambda q: 7 * model.mmd_penalty(q, prior, kernel, 1.5), (codes,))


def test_no_gradient_passes_through_the_bandwidth(monkeypatch):
    codes, prior = double(6, 3).requires_grad_(), double(6, 3) + 1
    (gradient,) = torch.autograd.grad(model.mmd_penalty(codes, prior, "RBF"), codes)
    constant = model.median_bandwidth(codes, prior).item()
    monkeypatch.setattr(model, "median_bandwidth", lambda *_: constant)
    (expected,) = torch.autograd.grad(model.mmd_penalty(codes, prior, "RBF"), codes)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("rows", [1, 3, 4, 12])  # 13 points: none but 1 divides them
@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_in_blocks_has_the_same_value_and_gradient(kernel, rows, monkeypatch):
    n = 13
    codes, prior = double(n, 3).requires_grad_(), double(n, 3) + 1
    whole = model.mmd_penalty(codes, prior, kernel)
    (whole_gradient,) = torch.autograd.grad(whole, codes)

    sizes = []

    def recorded(a: Tensor, b: Tensor, of=model.squared_distances) -> Tensor:
        d2 = of(a, b)
        sizes.append(d2.numel())
        return d2

    constant = model.median_bandwidth(codes, prior)
    monkeypatch.setattr(model, "median_bandwidth", lambda *_: constant)
    monkeypatch.setattr(model, "squared_distances", recorded)
    monkeypatch.setattr(model, "BLOCK_ENTRIES", rows * n)
    blocked = model.mmd_penalty(codes, prior, kernel)
    with torch.no_grad():
        torch.testing.assert_close(model.mmd_penalty(codes, prior, kernel), whole)  # as an evaluation calls it
    (gradient,) = torch.autograd.grad(blocked, codes)
    torch.testing.assert_close(blocked, whole)
    torch.testing.assert_close(gradient, whole_gradient)
    assert max(sizes) == rows * n  # no kernel matrix was larger than allowed, in either pass


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiled_mmd_in_blocks_has_the_same_value_and_gradient(kernel, monkeypatch):
    """Captured, not generated: what differentiates inside of the penalty is what a compiler could get wrong."""
    monkeypatch.setattr(model, "BLOCK_ENTRIES", 5 * 13)
    codes, prior = double(13, 3).requires_grad_(), double(13, 3) + 1
    compiled = torch.compile(model.mmd_penalty, backend="aot_eager")
    values = [penalty(2 * codes, prior, kernel) for penalty in (model.mmd_penalty, compiled)]
    gradients = [torch.autograd.grad(value, codes)[0] for value in values]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)


def test_mmd_in_blocks_of_less_than_a_row_takes_one_row(monkeypatch):
    codes, prior = double(6, 2), double(6, 2)
    whole = model.mmd_penalty(codes, prior)
    monkeypatch.setattr(model, "BLOCK_ENTRIES", 1)
    torch.testing.assert_close(model.mmd_penalty(codes, prior), whole)


@pytest.mark.parametrize("where", ["away from the prior", "with the prior"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_of_a_collapsed_encoder_is_finite(kernel, where):
    codes = torch.ones(8, 3, requires_grad=True)
    prior = torch.randn(8, 3) if where == "away from the prior" else torch.ones(8, 3)
    value = model.mmd_penalty(codes, prior, kernel)
    value.backward()
    assert value.isfinite()
    assert codes.grad.isfinite().all()
    assert (value > 0.1) == (where == "away from the prior")


@pytest.mark.parametrize(
    ("codes", "prior", "kernel", "message"),
    [
        ((1, 3), (1, 3), "IMQ", r"\(1, 3\).*two rows or more"),
        ((4, 3), (5, 3), "IMQ", r"\(4, 3\).*\(5, 3\): must agree"),
        ((4, 3), (4, 2), "RBF", r"\(4, 3\).*\(4, 2\): must agree"),
        ((4, 3), (4, 3), "cauchy", "unknown kernel 'cauchy': IMQ or RBF"),
    ],
)
def test_mmd_names_what_is_wrong(codes, prior, kernel, message):
    with pytest.raises(ValueError, match=message):
        model.mmd_penalty(torch.zeros(codes), torch.zeros(prior), kernel)


# ----------------------------------------------------------------------------------------------------------------------
# GAN


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def test_discriminator_loss_is_the_binary_cross_entropy():
    real, fake = double(50), 3 * double(50)
    expected = -np.log(sigmoid(real.numpy())).mean() - np.log(1 - sigmoid(fake.numpy())).mean()
    assert model.discriminator_loss(real, fake).item() == pytest.approx(expected)


def test_discriminator_loss_of_certain_verdicts_is_finite():
    """log(1 - sigmoid(300)) would be minus infinity."""
    assert model.discriminator_loss(torch.tensor([-300.0]), torch.tensor([300.0])).item() == pytest.approx(600)


def test_gan_penalty_is_the_non_saturating_loss():
    discriminator, codes = model.Discriminator(3).double(), double(20, 3)
    expected = -np.log(sigmoid(discriminator(codes).detach().numpy())).mean()
    assert model.gan_penalty(discriminator, codes).item() == pytest.approx(expected)


@pytest.mark.parametrize("pz_scale", [None, 1.5])
def test_gan_penalty_has_a_gradient_for_the_codes_and_none_for_the_discriminator(pz_scale):
    discriminator = model.Discriminator(3, width=8, pz_scale=pz_scale).double()
    codes = double(5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: model.gan_penalty(discriminator, z), (codes,))
    (-model.gan_penalty(discriminator, codes)).backward()
    assert codes.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in discriminator.parameters())
    model.discriminator_loss(discriminator(codes), discriminator(codes)).backward()
    assert all(weight.grad is not None for weight in discriminator.parameters())  # it can still learn


def test_the_trick_adds_the_log_density_of_the_prior_to_the_logit():
    plain, trick = model.Discriminator(3, pz_scale=None), model.Discriminator(3, pz_scale=1.7)
    trick.load_state_dict(plain.state_dict())
    z = 3 * torch.randn(10, 3)
    log_density = torch.distributions.Normal(0.0, 1.7).log_prob(z).sum(1)
    torch.testing.assert_close(trick(z), plain(z) + log_density)
    torch.testing.assert_close(model.prior_log_density(z, 1.7), log_density)


def test_discriminator_has_four_hidden_layers_of_512():
    # nz -> 512 -> 512 -> 512 -> 512 -> 1, with biases
    n_weights = (64 * 512 + 512) + 3 * (512 * 512 + 512) + (512 + 1)
    discriminator = model.Discriminator(64)
    assert sum(weight.numel() for weight in discriminator.parameters()) == n_weights
    assert discriminator(torch.randn(2, 64)).shape == (2,)


# ----------------------------------------------------------------------------------------------------------------------
# The training step: one loss, one backward pass, one encoding


def record_calls(network: nn.Module) -> list[Tensor]:
    """The outputs of the network from now on."""
    outputs: list[Tensor] = []
    network.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    return outputs


def gradients(*networks: nn.Module) -> list[Tensor]:
    return [weight.grad.clone() for network in networks for weight in network.parameters()]


@pytest.mark.parametrize("trick", [False, True])
def test_gan_step_is_a_step_of_the_discriminator_and_one_of_the_auto_encoder(trick, tmp_path):
    # A high lr_adv, so that the discriminator before its step and after it are not the same to the penalty.
    wae = build_wae(tmp_path, "--mode=gan", "--LAMBDA=7", "--lr_adv=0.01", *["--nowozin_trick"] * trick)
    wae.train_step(torch.rand(8, 3, 32, 32), torch.randn(8, 3))  # its gradients must leave no trace in the next step
    encoder, decoder, discriminator = copy.deepcopy([wae.encoder, wae.decoder, wae.discriminator])
    adam = torch.optim.Adam(discriminator.parameters())
    adam.load_state_dict(copy.deepcopy(wae.optimizer_d.state_dict()))
    assert (adam.param_groups[0]["lr"], adam.param_groups[0]["betas"]) == (0.01, (0.5, 0.999))
    for network in (encoder, decoder, discriminator):
        network.zero_grad()
    x, prior = torch.rand(8, 3, 32, 32), torch.randn(8, 3)
    calls = record_calls(wae.encoder)
    torch.manual_seed(5)  # the same pixel noise
    cost, penalty, loss_d = wae.train_step(x, prior)

    torch.manual_seed(5)
    codes = encoder(x)
    bce = F.binary_cross_entropy_with_logits
    verdict_prior, verdict_codes = discriminator(prior), discriminator(codes.detach())
    expected_d = 7 * (bce(verdict_prior, torch.ones(8)) + bce(verdict_codes, torch.zeros(8)))
    expected_d.backward()
    adam.step()
    expected_cost = 0.05 * (2 * (x - decoder(codes))).square().sum((1, 2, 3)).mean()
    # Its verdict on the codes afterwards. Adam moves weights of tiny gradients, whose signs are rounding errors, by as
    # much as any other: from here on the step's own discriminator is the more exact one, if it is where it should be.
    z = torch.randn(20, 3)
    torch.testing.assert_close(wae.discriminator(z), discriminator(z), rtol=1e-2, atol=1e-2)
    # It has the gradient of its own loss only.
    torch.testing.assert_close(gradients(wae.discriminator), gradients(discriminator), rtol=1e-4, atol=1e-6)
    expected_penalty = bce(wae.discriminator(codes), torch.ones(8))
    (expected_cost + 7 * expected_penalty).backward()

    torch.testing.assert_close([cost, penalty, loss_d], [expected_cost, expected_penalty, expected_d])
    torch.testing.assert_close(gradients(wae.encoder, wae.decoder), gradients(encoder, decoder), rtol=1e-4, atol=1e-5)
    assert len(calls) == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_step_is_one_step_on_cost_plus_lambda_times_mmd(kernel, tmp_path):
    wae = build_wae(tmp_path, "--mode=mmd", f"--kernel={kernel}", "--LAMBDA=7", "--lr=0.01", "--pz_scale=2")
    encoder, decoder = copy.deepcopy([wae.encoder, wae.decoder])
    x, prior = torch.rand(8, 3, 32, 32), 2 * torch.randn(8, 3)
    calls = record_calls(wae.encoder)
    torch.manual_seed(5)  # the same codes
    cost, penalty, loss_d = wae.train_step(x, prior)

    torch.manual_seed(5)
    codes = encoder(x)
    expected_penalty = model.mmd_penalty(codes, prior, kernel, 2.0)
    expected_cost = 0.05 * (2 * (x - decoder(codes))).square().sum((1, 2, 3)).mean()
    (expected_cost + 7 * expected_penalty).backward()

    torch.testing.assert_close([cost, penalty, loss_d], [expected_cost, expected_penalty, torch.tensor(0.0)])
    torch.testing.assert_close(gradients(wae.encoder, wae.decoder), gradients(encoder, decoder), rtol=1e-4, atol=1e-5)
    assert len(calls) == 1
    # Adam's first step moves each weight by the rate, against its gradient.
    bias, start = wae.encoder.code.bias, encoder.code.bias
    torch.testing.assert_close(bias, start - 0.01 * bias.grad.sign(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["gan", "mmd"])
def test_without_a_penalty_the_step_is_that_of_the_reconstruction_alone(mode, tmp_path):
    wae = build_wae(tmp_path, f"--mode={mode}", "--noise=deterministic", "--LAMBDA=0", "--cost=l1")
    encoder, decoder = copy.deepcopy([wae.encoder, wae.decoder])
    x = torch.rand(8, 3, 32, 32)
    wae.train_step(x, torch.randn(8, 3))
    (0.02 * (2 * (x - decoder(encoder(x)))).abs().sum((1, 2, 3)).mean()).backward()
    torch.testing.assert_close(gradients(wae.encoder, wae.decoder), gradients(encoder, decoder), rtol=1e-4, atol=1e-6)


def test_both_pixel_ranges_give_the_images_of_the_network_in_the_same_range(tmp_path):
    """What is decoded, counted and drawn is in [0, 1], and close to one half before training."""
    for flags in ([], ["--input_normalize_sym"]):
        wae = build_wae(tmp_path, *flags)
        images = wae.decode(wae.sample_prior(4))
        assert ((images >= 0) & (images <= 1)).all()
        assert images.mean().item() == pytest.approx(0.5, abs=0.05)


# ----------------------------------------------------------------------------------------------------------------------
# Cost


@pytest.mark.parametrize(
    ("cost", "by_hand"),
    [
        ("l2sq", lambda d: 0.05 * (d**2).sum((1, 2, 3)).mean()),
        ("l2", lambda d: 0.2 * np.sqrt((d**2).sum((1, 2, 3))).mean()),
        ("l1", lambda d: 0.02 * np.abs(d).sum((1, 2, 3)).mean()),
    ],
)
def test_cost_counts_pixels_on_the_scale_from_minus_one_to_one(cost, by_hand):
    x, y = torch.rand(2, 5, 3, 4, 4, dtype=torch.float64)
    expected = by_hand((2 * x - 1).numpy() - (2 * y - 1).numpy())
    assert model.reconstruction_cost(x, y, cost).item() == pytest.approx(expected)
    symmetric = model.reconstruction_cost(2 * x - 1, 2 * y - 1, cost, symmetric=True)
    assert symmetric.item() == pytest.approx(expected)


@pytest.mark.parametrize("cost", ["l2sq", "l2", "l1"])
def test_cost_of_a_perfect_reconstruction_has_a_finite_gradient(cost):
    x = torch.rand(2, 3, 4, 4)
    y = x.clone().requires_grad_()
    value = model.reconstruction_cost(x, y, cost)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-4)
    assert y.grad.isfinite().all()


def test_an_unknown_cost_is_named():
    with pytest.raises(ValueError, match="unknown cost 'huber': l2sq, l2 or l1"):
        model.reconstruction_cost(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), "huber")


# ----------------------------------------------------------------------------------------------------------------------
# Networks


@pytest.mark.parametrize("image_size", model.IMAGE_SIZES)
@pytest.mark.parametrize("arch", ["dcgan", "paper"])
def test_shapes_and_ranges(arch, image_size):
    x = torch.rand(2, 3, image_size, image_size)
    for noise in ("deterministic", "add_noise", "gaussian"):
        z = model.Encoder(image_size, nz=3, nf=2, arch=arch, noise=noise)(x)
        assert z.shape == (2, 3)
        assert z.isfinite().all()
    unit = model.Decoder(image_size, nz=3, nf=2, arch=arch)
    symmetric = model.Decoder(image_size, nz=3, nf=2, arch=arch, symmetric=True)
    symmetric.load_state_dict(unit.state_dict())
    with torch.no_grad():
        y, y_symmetric = unit(100 * z), symmetric(100 * z)
    assert y.shape == x.shape
    assert 0 < y.min() < 0.5 < y.max() < 1
    # One layer's outputs through a sigmoid, and through a tanh.
    torch.testing.assert_close(y_symmetric, torch.logit(y).tanh(), rtol=1e-4, atol=1e-5)


def n_weights(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


def test_size_of_the_networks_of_the_paper():
    """Appendix C.2, for images of 64 and 64 latent dimensions; no bias where a batch norm, with 2 weights, follows."""
    with torch.device("meta"):
        encoder, decoder = model.Encoder(arch="paper"), model.Decoder(arch="paper")
    # 5x5 convolutions 3 -> 128 -> 256 -> 512 -> 1024, batch norms, linear from 4x4x1024 to 64 (with bias)
    convolutions = 5 * 5 * (3 * 128 + 128 * 256 + 256 * 512 + 512 * 1024)
    assert n_weights(encoder) == convolutions + 2 * (128 + 256 + 512 + 1024) + (4 * 4 * 1024 * 64 + 64)
    # linear to 8x8x1024 (with bias), 5x5 transposed convolutions to 512, 256, 128, batch norms, and to 3 (with bias)
    convolutions = 5 * 5 * (1024 * 512 + 512 * 256 + 256 * 128)
    linear = 64 * 8 * 8 * 1024 + 8 * 8 * 1024
    assert n_weights(decoder) == linear + convolutions + 2 * (512 + 256 + 128) + (5 * 5 * 128 * 3 + 3)


def test_size_of_the_networks_of_dcgan():
    with torch.device("meta"):
        encoder, decoder = model.Encoder(), model.Decoder()
    # 5x5 convolutions 3 -> 128 -> 256 -> 512 -> 1024, batch norms, linear from 1x1x1024 to 64 (with bias)
    convolutions = 5 * 5 * (3 * 128 + 128 * 256 + 256 * 512 + 512 * 1024)
    assert n_weights(encoder) == convolutions + 2 * (128 + 256 + 512 + 1024) + (1024 * 64 + 64)
    # linear to 4x4x1024 (with bias), 4x4 transposed convolutions to 512, 256, 128, batch norms, and to 3 (with bias)
    convolutions = 4 * 4 * (1024 * 512 + 512 * 256 + 256 * 128)
    linear = 64 * 4 * 4 * 1024 + 4 * 4 * 1024
    assert n_weights(decoder) == linear + convolutions + 2 * (512 + 256 + 128) + (4 * 4 * 128 * 3 + 3)


def test_a_gaussian_encoder_has_twice_the_outputs():
    plain, gaussian = (n_weights(model.Encoder(32, nz=3, nf=2, noise=noise)) for noise in ("deterministic", "gaussian"))
    assert gaussian - plain == 8 * 3 + 3  # a second linear layer from 4 nf features


@pytest.mark.parametrize("build", [model.Encoder, model.Decoder])
@pytest.mark.parametrize("arch", ["dcgan", "paper"])
def test_convolutions_start_with_a_standard_deviation_of_0_02(arch, build):
    convolutions = [m for m in build(32, nf=16, arch=arch).modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(convolutions) >= 3
    for weight in (m.weight for m in convolutions):
        assert weight.mean().abs() < 4 * 0.02 / math.sqrt(weight.numel())
        assert (weight.std() - 0.02).abs() < 4 * 0.02 / math.sqrt(2 * weight.numel())


def test_batch_norm_has_the_decay_of_the_paper():
    encoder = model.Encoder(32, nf=2)
    x = torch.rand(16, 3, 32, 32)
    encoder(x)
    batch_mean = encoder.features[0](x).mean((0, 2, 3))
    torch.testing.assert_close(encoder.features[1].running_mean, 0.9 * 0 + 0.1 * batch_mean)


@pytest.mark.parametrize("training", [True, False])
def test_a_deterministic_encoder_repeats_itself(training):
    encoder = model.Encoder(32, nz=3, nf=2).train(training)
    x = torch.rand(4, 3, 32, 32)
    assert torch.equal(encoder(x), encoder(x))


def test_add_noise_disturbs_the_pixels_while_training_only():
    encoder = model.Encoder(32, nz=3, nf=2, noise="add_noise")
    seen = []
    encoder.features.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.rand(8, 3, 32, 32)
    before = x.clone()
    assert not torch.equal(encoder(x), encoder(x))
    assert torch.equal(x, before)  # the target of the reconstruction stays clean
    noise = torch.cat([seen[0] - x, seen[1] - x]).flatten()
    assert_mean(noise, 0.0)
    assert noise.std().item() == pytest.approx(0.01, abs=4 * 0.01 / math.sqrt(2 * len(noise)))
    assert not torch.equal(seen[0], seen[1])

    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))
    assert torch.equal(seen[-1], x)


@pytest.mark.parametrize("training", [True, False])
def test_a_gaussian_encoder_draws_codes_of_the_mean_and_variance_that_it_gives(training):
    encoder = model.Encoder(32, nz=2, nf=2, noise="gaussian").train(training)
    nn.init.normal_(encoder.code.bias)
    x = torch.rand(4, 3, 32, 32).repeat(1000, 1, 1, 1)
    with torch.no_grad():
        draws = encoder(x).view(1000, 4, 2)
        mean, log_variance = encoder.code(encoder.features(x))[:4].chunk(2, dim=1)
    assert_mean(draws, mean)
    assert_mean((draws - mean) ** 2, log_variance.exp())


def test_a_gaussian_encoder_survives_an_extreme_variance():
    encoder = model.Encoder(32, nz=2, nf=2, noise="gaussian")
    nn.init.constant_(encoder.code.bias, 1e4)
    codes = encoder(torch.rand(4, 3, 32, 32))
    codes.sum().backward()
    assert codes.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in encoder.parameters())


def test_the_prior_has_its_scale():
    z = model.sample_prior(5000, 3, 2.5)
    assert z.shape == (5000, 3)
    assert_mean(z, 0.0)
    assert_mean(z**2, 2.5**2)


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining


def test_pretrain_loss_compares_mean_and_covariance_with_those_of_the_prior():
    codes = 2 * double(30, 4) + 0.5
    mean, covariance = codes.numpy().mean(0), np.cov(codes.numpy(), rowvar=False)
    expected = (mean**2).mean() + ((covariance - 1.5**2 * np.eye(4)) ** 2).mean()
    assert model.pretrain_loss(codes, pz_scale=1.5).item() == pytest.approx(expected)


@pytest.mark.parametrize(("n", "nz", "pz_scale"), [(10, 3, 1.0), (40, 5, 2.0), (2, 1, 0.5)])
def test_pretrain_floor_is_what_draws_of_the_prior_score_on_average(n, nz, pz_scale):
    losses = torch.stack([model.pretrain_loss(pz_scale * double(n, nz), pz_scale) for _ in range(2000)])
    assert_mean(losses, model.pretrain_floor(n, nz, pz_scale))


@pytest.mark.parametrize("noise", ["add_noise", "gaussian"])
def test_pretraining_brings_the_moments_of_the_codes_to_those_of_the_prior(noise, tmp_path):
    wae = build_wae(
        tmp_path, f"--noise={noise}", "--pz_scale=1.5", "--lr=0.006", "--e_pretrain", "--e_pretrain_sample_size=128",
        "--e_pretrain_iters=400",
    )  # fmt: skip
    images = np.random.default_rng(0).integers(256, size=(256, 32, 32, 3), dtype=np.uint8)
    decoder = copy.deepcopy(wae.decoder.state_dict())

    def moments() -> tuple[Tensor, Tensor]:
        x = wae.to_input(torch.from_numpy(images))
        with torch.no_grad():
            codes = torch.cat([wae.encoder(x) for _ in range(8)])  # in training mode, as pretraining sees them
        return codes.mean(0), codes.T.cov()

    target = 1.5**2 * torch.eye(3)
    assert (moments()[1] - target).abs().max() > 1
    calls = record_calls(wae.encoder)
    main.pretrain_encoder(wae, images)
    assert len(calls) < 400  # ended once the codes could not be told from the prior
    mean, covariance = moments()
    assert mean.abs().max() < 0.3
    assert (covariance - target).abs().max() < 0.75
    torch.testing.assert_close(wae.decoder.state_dict(), decoder, rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Learning rates, seeds, orders, metrics


def test_learning_rates_halve_after_30_epochs_and_fall_to_a_tenth_after_50():
    factors = [main.learning_rate_factor(epoch, "paper", niter=60) for epoch in range(60)]
    assert factors == [1.0] * 30 + [0.5] * 20 + [0.1] * 10
    assert {main.learning_rate_factor(epoch, "constant", niter=100) for epoch in range(100)} == {1.0}


@pytest.mark.parametrize("niter, at_each", [(55, (30, 20, 5)), (110, (60, 40, 10)), (28, (16, 10, 2)), (1, (1, 0, 0))])
def test_scaled_learning_rates_fall_after_the_same_part_of_any_run(niter, at_each):
    factors = [main.learning_rate_factor(epoch, "scaled", niter) for epoch in range(niter)]
    assert factors == np.repeat([1.0, 0.5, 0.1], at_each).tolist()


def test_epoch_order_is_a_permutation_of_seed_and_epoch():
    order = utils.epoch_order(50, seed=3, epoch=4)
    assert sorted(order) == list(range(50))
    assert np.array_equal(order, utils.epoch_order(50, seed=3, epoch=4))
    others = [utils.epoch_order(50, seed=3, epoch=5), utils.epoch_order(50, seed=4, epoch=4)]
    others += [utils.epoch_order(50, seed=4, epoch=3), np.arange(50)]
    assert not any(np.array_equal(order, other) for other in others)


def test_a_seed_repeats_its_draws_and_another_key_has_others():
    def draw(*key: int | str) -> tuple[float, ...]:
        utils.set_seed(*key)
        return tuple(torch.randn(4).tolist())

    keys = [(1,), (2,), (1, "noise"), (1, "prior"), (1, "noise", 0, 1), (1, "noise", 1, 0), (1, "noise", 0, 11)]
    keys += [(1, "noise", 0, 1, 1), (2**63 - 1, "noise")]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(1, "noise", 0, 1) == draw(1, "noise", 0, 1)


def test_the_fitted_gaussian_has_the_moments_of_the_codes():
    codes = torch.randn(300, 3) @ torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, -1.0], [0.0, 0.0, 0.5]]) + 3
    mean, covariance = codes.numpy().mean(0), np.cov(codes.numpy(), rowvar=False)
    samples = main.fit_gaussian(codes).sample((20000,))
    assert_mean(samples, torch.from_numpy(mean))
    centred = samples - torch.from_numpy(mean)
    assert_mean(centred[:, :, None] * centred[:, None], torch.from_numpy(covariance))


def test_a_gaussian_fits_codes_that_leave_a_dimension_unused():
    codes = torch.cat([torch.randn(50, 2), torch.full((50, 1), 0.5)], dim=1)
    samples = main.fit_gaussian(codes).sample((100,))
    torch.testing.assert_close(samples[:, 2], torch.full((100,), 0.5), rtol=0, atol=0.01)


def test_sharpness_is_the_variance_of_the_laplace_filtered_grey_image():
    images = torch.rand(3, 3, 6, 5)
    grey = np.einsum("ncij,c->nij", images.double().numpy(), [0.299, 0.587, 0.114])
    for image, value in zip(grey, utils.sharpness(images), strict=True):
        filtered = [
            image[i - 1, j] + image[i + 1, j] + image[i, j - 1] + image[i, j + 1] - 4 * image[i, j]
            for i in range(1, 5)
            for j in range(1, 4)
        ]
        assert value.item() == pytest.approx(np.var(filtered), rel=1e-4)


def test_blur_and_flatness_lower_the_sharpness():
    sharp = torch.rand(1, 3, 16, 16)
    blurred = F.avg_pool2d(sharp, 3, stride=1, padding=1)
    assert utils.sharpness(sharp) > 10 * utils.sharpness(blurred)
    assert utils.sharpness(torch.full((1, 3, 16, 16), 0.3)).item() == pytest.approx(0, abs=1e-9)
