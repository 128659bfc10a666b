"""Trains and evaluates Wasserstein auto-encoders (Tolstikhin et al., ICLR 2018, arXiv 1711.01558).

    python3 main.py --dataroot=data/celebA --cuda --mode=gan --e_pretrain --outf=gan_outputs   # WAE-GAN, Algorithm 1
    python3 main.py --dataroot=data/celebA --cuda --mode=mmd --e_pretrain --outf=mmd_outputs   # WAE-MMD, Algorithm 2
    python3 main.py --checkpoint=gan_outputs/checkpoint.pth.tar                                # continues a run
    python3 main.py --checkpoint=gan_outputs/checkpoint.pth.tar --evaluate                     # samples and metrics

The networks and the objective are in `model.py`, everything that has nothing to do with WAEs in `utils.py`.
"""

import argparse
import csv
import importlib.util
import logging
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import model
import utils
from utils import UsageError, UserError, World

COLUMNS = ("epoch", "step", "reconstruction", "penalty", "discriminator", "lr", "images_per_s")
TEST_COLUMNS = ("test_mse", "test_mmd", "test_code_mean", "test_code_variance")
PAPER_EPOCHS = 55  # of the paper's CelebA runs, which its schedule of learning rates is made for
BATCH_NORM_BATCHES = 20  # training batches that batch norm's statistics are re-estimated from before an evaluation

# Flags that say what is learned and how: a run keeps those that it began with. On --checkpoint they come from the file.
FIXED = (
    *("dataset", "n_test", "batch_size", "seed"),
    *("image_size", "nz", "nf", "arch", "mode", "kernel", "noise", "input_normalize_sym"),
    *("LAMBDA", "pz_scale", "cost", "nowozin_trick", "lr", "lr_adv", "beta1", "lr_schedule"),
    *("e_pretrain", "e_pretrain_sample_size", "e_pretrain_iters"),
)
# Flags that a continued run takes from the checkpoint unless given again. All others speak of one command only.
KEPT = ("dataroot", "niter", "print_every", "sample_every")
# Flags of `FIXED` that an evaluation may choose anew: they do not change what was learned.
FREE_IN_EVALUATION = ("dataset", "n_test", "batch_size", "seed")


# ----------------------------------------------------------------------------------------------------------------------
# Flags


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite int or float from `low` (excluded if `above`) to `high`."""

    def parse(text: str) -> Any:
        value = kind(text)
        # No comparison holds for nan, and isfinite() would choke on an integer beyond all floats.
        if not low <= value <= high or value == math.inf or (above and value == low):
            bounds = f"{'more than' if above else 'at least'} {low:g}" + (
                f", at most {high:g}" if high < math.inf else ""
            )
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is no number at all
    return parse


def build_parser() -> argparse.ArgumentParser:
    """Every flag, with its meaning, range and default."""
    parser = argparse.ArgumentParser(
        "main.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    count, positive, at_least_2 = number(int, 1), number(float, 0, above=True), number(int, 2)

    def section(title: str) -> Callable[..., None]:
        group = parser.add_argument_group(title)

        def add(name: str, default: Any, kind: Any, text: str, metavar: str | None = None) -> None:
            """A flag whose kind is a type, a tuple of choices or, for a switch, None."""
            text += f" (default: {default})" if default is not None and kind is not None else ""
            options = {"type": kind, "metavar": metavar or "X"}
            if kind is None:
                options = {"action": "store_true"}
            elif isinstance(kind, tuple):
                options = {"type": type(kind[0]), "choices": kind}
            group.add_argument(f"--{name}", default=default, help=text, **options)

        return add

    # fmt: off
    add = section("data")
    add("dataroot", None, Path, "folder of the images, which lie in folders inside it, as in "
        "DATAROOT/sub_directory/XXX.jpg; required, unless --checkpoint knows it", "FOLDER")
    add("dataset", "celebA", ("celebA", "folder"),
        "celebA: the central 140 x 140 pixels, resized; folder: the largest central square, resized")
    add("image_size", 64, model.IMAGE_SIZES, "side of the images that the networks see, in pixels")
    add("n_test", None, at_least_2,
        "images held out of training, the last by path; at least 2 (default: a tenth, at most 19962)")
    add("batch_size", 100, at_least_2, "images in a step, over all processes; at least 2")
    add("cache_dir", None, Path, "where the decoded images are kept (default: in a hidden file in DATAROOT or, if that "
        "cannot be written, in the user's cache folder)", "FOLDER")

    add = section("model")
    add("mode", "gan", ("gan", "mmd"),
        "penalty: gan, a discriminator of codes (Algorithm 1); mmd, a kernel distance (Algorithm 2)")
    add("arch", "dcgan", ("dcgan", "paper"), "networks: dcgan, or those of the paper's appendix")
    add("nz", 64, number(int, 1, 4096), "latent dimensions; 1 to 4096")
    add("nf", 128, number(int, 1, 1024), "channels of the narrowest convolution, an eighth of the widest's; 1 to 1024")
    add("noise", None, ("deterministic", "add_noise", "gaussian"), "the encoder's randomness: deterministic, none; "
        "add_noise, N(0, 0.01^2) on the pixels while training; gaussian, a sampled code (default: add_noise for gan, "
        "gaussian for mmd)")
    add("input_normalize_sym", False, None, "the networks work in [-1, 1], with a tanh, not in [0, 1], with a sigmoid")

    add = section("objective")
    add("LAMBDA", None, number(float, 0), "weight of the penalty; 0 or more (default: 10 for gan, 100 for mmd)")
    add("pz_scale", 1.0, number(float, 0.001, 1000),
        "standard deviation of the prior N(0, PZ_SCALE^2 I); 0.001 to 1000")
    add("cost", "l2sq", ("l2sq", "l2", "l1"),
        "reconstruction cost: l2sq, 0.05 |x-y|^2; l2, 0.2 |x-y|; l1, 0.02 |x-y|_1")
    add("kernel", "IMQ", ("IMQ", "RBF"), "mmd: the kernel, inverse multiquadratic or Gaussian")
    add("nowozin_trick", False, None, "gan: add the prior's log density to the discriminator's logit")

    add = section("optimisation")
    add("niter", PAPER_EPOCHS, count, "epochs; at least 1")
    add("lr", 0.0003, positive, "learning rate of encoder and decoder; more than 0")
    add("lr_adv", None, positive, "gan: learning rate of the discriminator; more than 0 (default: 3 x lr)")
    add("beta1", 0.5, number(float, 0, 0.9999), "Adam's decay of the first moment; 0 to 0.9999")
    add("lr_schedule", "paper", ("paper", "scaled", "constant"), "paper: half the rates after epoch 30, a tenth after "
        "epoch 50; scaled: the same, for NITER epochs in place of the paper's 55")
    add("e_pretrain", False, None, "first train the encoder alone, until the moments of its codes match the prior's")
    add("e_pretrain_sample_size", 256, number(int, 2, 100_000), "images in a step of that; 2 to 100000")
    add("e_pretrain_iters", 200, count, "steps of that, at most; at least 1")
    add("seed", None, number(int, 0, 2**63 - 1), "fixes the run; 0 or more (default: drawn, printed and stored)")

    add = section("output")
    add("outf", None, Path, "folder to write to (default: outputs, or where the checkpoint lies)", "FOLDER")
    add("print_every", 10, count, "steps between rows of log.csv; at least 1")
    add("sample_every", 1, count, "epochs between pictures; at least 1")
    add("checkpoint", None, Path, "checkpoint of a run to continue, or to evaluate", "FILE")
    add("tensorboard", False, None, "write log and pictures for TensorBoard too, which must be installed")
    add("evaluate", False, None, "no training: write images and metrics of --checkpoint")
    add("n_samples", 10000, number(int, 2, 1_000_000), "samples that an evaluation draws; 2 to 1000000")
    add("sampler", "prior", ("prior", "gaussian"),
        "where the codes of samples come from: the prior, or a Gaussian fitted to the codes of the training images")

    add = section("machine")
    add("cuda", False, None, "train on a GPU")
    add("gpu_id", 0, number(int, 0), "which GPU, from 0")
    add("ngpu", 1, count, "processes, with a GPU each if --cuda; more than 1 starts torchrun on this machine")
    add("workers", None, count, "processes that decode images, on first use; at least 1 (default: one a core)")
    add("amp", False, None, "run the networks in bfloat16; weights and penalties stay in float32")
    add("compile", False, None, "torch.compile the networks and the penalty")
    # fmt: on
    return parser


def read_checkpoint(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A checkpoint, and the flags in it as one would type them.

    Raises:
        UserError: they are not what this program writes. Whether the weights fit the flags, see `WAE.load`.
    """

    def refuse(reason: str) -> None:
        raise UserError(f"--checkpoint={path}: not a checkpoint of this program: {reason}")

    checkpoint = utils.load_checkpoint(path)
    kept = {name: checkpoint["flags"].get(name) for name in FIXED + KEPT}
    stored = [f"--{k}" if value is True else f"--{k}={value}" for k, value in kept.items() if value is not False]
    parser = build_parser()
    parser.error = refuse  # what is out of range there is not the fault of the command line
    parser.parse_args(stored)
    for name, kind in {"epoch": int, "step": int, "best": float, "log": str}.items():
        value = checkpoint.get(name)
        if not isinstance(value, kind) or (kind is int and value < 0):
            refuse(f"its {name} is missing or wrong")
    try:
        rows = utils.log_rows(checkpoint["log"])
        if rows and list(rows[0]) != list(COLUMNS + TEST_COLUMNS):
            refuse("its log has other columns")
        [float(value) for row in rows for value in row.values() if value != ""]
    except (ValueError, TypeError, csv.Error):
        refuse("its log holds something else than numbers")
    return checkpoint, stored


def parse_flags(argv: list[str]) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The flags, with those of the checkpoint to continue from behind them, and that checkpoint."""
    parser = build_parser()
    names = list(vars(parser.parse_args([])))
    # argparse sets no default where the namespace has the name already: what is not None afterwards was typed.
    blank = argparse.Namespace(**dict.fromkeys(names))
    typed = {name for name, value in vars(parser.parse_args(argv, blank)).items() if value is not None}
    flags = parser.parse_args(argv)

    checkpoint = None
    if flags.checkpoint:
        checkpoint, stored = read_checkpoint(flags.checkpoint)
        flags = parser.parse_args([*stored, *argv])  # what is typed comes later, and so wins
        fixed = [name for name in FIXED if not (flags.evaluate and name in FREE_IN_EVALUATION)]
        differ = [k for k in fixed if k in typed and getattr(flags, k) != checkpoint["flags"].get(k)]
        if differ:
            pairs = ", ".join(f"--{k}={getattr(flags, k)} (there: {checkpoint['flags'].get(k)})" for k in differ)
            parser.error(f"--checkpoint={flags.checkpoint} was made with other flags than {pairs}")
    elif flags.evaluate:
        parser.error("--evaluate needs --checkpoint=FILE")
    if flags.dataroot is None:
        parser.error("--dataroot is required: the folder in which the folders of images lie")
    if flags.nowozin_trick and flags.mode != "gan":
        parser.error("--nowozin_trick is for --mode=gan: there is no discriminator otherwise")

    processes = int(os.environ.get("WORLD_SIZE", flags.ngpu))
    if flags.batch_size % processes or flags.batch_size < 2 * processes:
        parser.error(f"--batch_size={flags.batch_size} cannot be shared out evenly to {processes} processes")
    if flags.cuda and "LOCAL_RANK" not in os.environ and flags.ngpu > max(1, torch.cuda.device_count()):
        parser.error(f"--ngpu={flags.ngpu}: there are {torch.cuda.device_count()} GPUs here")

    flags.outf = flags.outf or (flags.checkpoint.parent if flags.checkpoint else Path("outputs"))
    flags.noise = flags.noise or ("add_noise" if flags.mode == "gan" else "gaussian")
    flags.LAMBDA = (10.0 if flags.mode == "gan" else 100.0) if flags.LAMBDA is None else flags.LAMBDA
    flags.lr_adv = flags.lr_adv or 3 * flags.lr
    flags.workers = flags.workers or utils.n_cores()
    if not flags.evaluate and not flags.checkpoint and (flags.outf / "checkpoint.pth.tar").exists():
        there = flags.outf / "checkpoint.pth.tar"
        parser.error(
            f"--outf={flags.outf} holds a run already: continue it with --checkpoint={there}, or choose another"
        )
    return flags, checkpoint


# ----------------------------------------------------------------------------------------------------------------------
# The auto-encoder and its training step


class WAE:
    """Encoder, decoder and, for --mode=gan, discriminator, with their optimisers: what a checkpoint keeps."""

    def __init__(self, flags: argparse.Namespace, world: World):
        self.flags, self.world = flags, world
        utils.set_seed(flags.seed, "weights")
        shape = {"image_size": flags.image_size, "nz": flags.nz, "nf": flags.nf, "arch": flags.arch}
        self.encoder: nn.Module = model.Encoder(**shape, noise=flags.noise)
        self.decoder: nn.Module = model.Decoder(**shape, symmetric=flags.input_normalize_sym)
        self.discriminator: nn.Module | None = None
        if flags.mode == "gan":
            self.discriminator = model.Discriminator(flags.nz, pz_scale=flags.pz_scale if flags.nowozin_trick else None)
        if flags.cuda and world.size > 1:
            self.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(self.encoder)
            self.decoder = nn.SyncBatchNorm.convert_sync_batchnorm(self.decoder)
        for network in self.networks().values():
            # Channels last is how the images lie in the array, and the faster layout for convolutions on CPU and GPU.
            network.to(world.device, memory_format=torch.channels_last)

        adam = partial(torch.optim.Adam, betas=(flags.beta1, 0.999), fused=True)
        self.optimizer = adam([*self.encoder.parameters(), *self.decoder.parameters()], lr=flags.lr)
        self.optimizer_d = adam(self.discriminator.parameters(), lr=flags.lr_adv) if self.discriminator else None

    def networks(self) -> dict[str, nn.Module]:
        """The networks by name."""
        named = {"encoder": self.encoder, "decoder": self.decoder, "discriminator": self.discriminator}
        return {name: network for name, network in named.items() if network is not None}

    def parts(self) -> dict[str, Any]:
        """All that has a state to save, by the name that it has in a checkpoint."""
        parts = self.networks() | {"optimizer": self.optimizer}
        return parts | {"optimizer_d": self.optimizer_d} if self.optimizer_d else parts

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Takes over the states in a checkpoint. Raises UserError if they are not of these networks."""
        try:
            for name, part in self.parts().items():
                if isinstance(part, torch.optim.Optimizer):
                    utils.load_adam(part, checkpoint[name])
                else:
                    part.load_state_dict(checkpoint[name])
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"--checkpoint={self.flags.checkpoint}: its {name} does not fit its flags") from error

    def set_learning_rates(self, factor: float) -> list[float]:
        """Sets the rates of the optimisers to so many times their flags, and returns them."""
        pairs = [(self.optimizer, self.flags.lr * factor), (self.optimizer_d, self.flags.lr_adv * factor)]
        for optimizer, rate in pairs:
            for group in optimizer.param_groups if optimizer else ():
                group["lr"] = rate
        return [rate for _, rate in pairs]

    def autocast(self) -> Any:
        """Where the networks run: in bfloat16 with --amp."""
        return torch.autocast(self.world.device.type, torch.bfloat16) if self.flags.amp else nullcontext()

    def prepare_training(self) -> None:
        """Wraps the networks for several processes and compilation; only the training step uses them wrapped."""
        several = self.world.size > 1
        wrap = partial(DistributedDataParallel, device_ids=[self.world.device.index] if self.flags.cuda else None)
        compiled: Callable = torch.compile if self.flags.compile else lambda function: function
        self._encode = compiled(wrap(self.encoder) if several else self.encoder)
        self._decode = compiled(wrap(self.decoder) if several else self.decoder)
        self._mmd_penalty = compiled(model.mmd_penalty)
        if self.discriminator is not None:
            self._discriminate = wrap(self.discriminator) if several else self.discriminator

    def train_step(self, x: Tensor, prior: Tensor) -> Tensor:
        """One step of Algorithm 1 (gan) or 2 (mmd) of the paper.

        Args:
            x: this process's images x_1 ... x_n of the batch, (n, 3, S, S).
            prior: draws z_1 ... z_N of the prior, as many as the batch has over all processes, (N, nz).

        Returns:
            Reconstruction cost, penalty and the discriminator's loss (zero for mmd), without a wait for the device (but
            for those that PyTorch's batch norm over several GPUs has of its own).
        """
        flags, world = self.flags, self.world
        with self.autocast():
            codes = self._encode(x)  # z~_i from Q(Z|x_i): the one encoding that all of the step shares
            reconstructions = self._decode(codes)
        codes = codes.float()
        loss_d = torch.zeros((), device=x.device)

        if flags.mode == "gan":
            # Algorithm 1: update the discriminator by ascending LAMBDA/n sum_i log D(z_i) + log(1 - D(z~_i)) ...
            z = prior[world.rank * len(x) : (world.rank + 1) * len(x)]
            logits_prior, logits_codes = self._discriminate(torch.cat([z, codes.detach()])).chunk(2)
            loss_d = flags.LAMBDA * model.discriminator_loss(logits_prior, logits_codes)
            self.optimizer_d.zero_grad()
            loss_d.backward()
            self.optimizer_d.step()
            # ... and encoder and decoder by descending 1/n sum_i c(x_i, G(z~_i)) - LAMBDA log D(z~_i).
            penalty = model.gan_penalty(self.discriminator, codes)
        else:
            # Algorithm 2: update encoder and decoder by descending 1/n sum_i c(x_i, G(z~_i)) + LAMBDA MMD^2(z, z~).
            everyones = utils.gather_with_gradient(codes, world)
            penalty = self._mmd_penalty(everyones, prior, flags.kernel, flags.pz_scale)

        cost = model.reconstruction_cost(x, reconstructions.float(), flags.cost, flags.input_normalize_sym)
        self.optimizer.zero_grad()
        (cost + flags.LAMBDA * penalty).backward()
        self.optimizer.step()
        return torch.stack([cost, penalty, loss_d]).detach()

    def to_input(self, batch: Tensor) -> Tensor:
        """uint8 images (n, S, S, 3) as the encoder takes them."""
        return utils.from_uint8(batch, self.flags.input_normalize_sym)

    def encode(self, batch: Tensor) -> Tensor:
        """Codes (n, nz) of uint8 images (n, S, S, 3), in evaluation mode."""
        with torch.no_grad(), self.autocast(), utils.evaluating(self.encoder):
            return self.encoder(self.to_input(batch)).float()

    def decode(self, codes: Tensor) -> Tensor:
        """Images (n, 3, S, S) in [0, 1] of codes (n, nz), in evaluation mode."""
        with torch.no_grad(), self.autocast(), utils.evaluating(self.decoder):
            return utils.to_unit(self.decoder(codes), self.flags.input_normalize_sym)

    def sample_prior(self, n: int) -> Tensor:
        """Draws of the prior, (n, nz)."""
        return model.sample_prior(n, self.flags.nz, self.flags.pz_scale, self.world.device)


def pretrain_encoder(wae: WAE, images: np.ndarray | Tensor) -> None:
    """Trains the encoder alone until the moments of its codes are as close to the prior's as those of prior draws."""
    flags, n = wae.flags, wae.flags.e_pretrain_sample_size
    optimizer = torch.optim.Adam(wae.encoder.parameters(), lr=flags.lr, betas=(flags.beta1, 0.999), fused=True)
    rng = np.random.default_rng([flags.seed, 2**32])  # no epoch has this number
    indices = (rng.integers(len(images), size=n) for _ in range(flags.e_pretrain_iters))
    target = model.pretrain_floor(n, flags.nz, flags.pz_scale)
    with tqdm(total=flags.e_pretrain_iters, desc="pretraining", unit="step", disable=not wae.world.is_main) as bar:
        for step, batch in enumerate(utils.batches(images, indices, wae.world.device)):
            utils.set_seed(flags.seed, "pretrain", step)
            with wae.autocast():
                codes = wae.encoder(wae.to_input(batch))
            loss = model.pretrain_loss(codes.float(), flags.pz_scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update()
            if step % 10 == 9:
                value = utils.average(
                    loss.detach(), wae.world
                ).item()  # one number, so that all processes stop together
                bar.set_postfix(loss=f"{value:.3g}", target=f"{target:.3g}")
                if value <= target:
                    break


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation: always with batch norm's statistics of the weights at hand


def refresh_batch_norm(wae: WAE, images: np.ndarray | Tensor) -> None:
    """Re-estimates batch norm's statistics from training images: those kept while training lag behind the weights."""
    n = wae.flags.batch_size // wae.world.size
    order = utils.epoch_order(len(images), wae.flags.seed, 0)
    order = order[: len(order) // wae.world.size * wae.world.size][wae.world.rank :: wae.world.size]
    indices = [order[i : i + n] for i in range(0, len(order) - n + 1, n)][:BATCH_NORM_BATCHES]
    if not indices:
        return  # an evaluation that holds out all images keeps the statistics of the checkpoint
    utils.set_seed(wae.flags.seed, "batch norm", wae.world.rank)
    with torch.no_grad(), wae.autocast():
        inputs = (wae.to_input(batch) for batch in utils.batches(images, indices, wae.world.device))
        update_bn(inputs, nn.Sequential(wae.encoder, wae.decoder))


def in_order(wae: WAE, images: np.ndarray | Tensor) -> Iterator[Tensor]:
    """Batches of uint8 images, from the first to the last."""
    indices = np.split(np.arange(len(images)), range(wae.flags.batch_size, len(images), wae.flags.batch_size))
    return utils.batches(images, indices, wae.world.device)


def encode_all(wae: WAE, images: np.ndarray | Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Those batches with their codes."""
    utils.set_seed(wae.flags.seed, "encode")  # a Gaussian encoder draws the same codes every time
    return ((batch, wae.encode(batch)) for batch in in_order(wae, images))


def held_out_figures(wae: WAE, images: np.ndarray | Tensor) -> tuple[dict[str, float], Tensor]:
    """Figures of the held-out images, and their codes (N, nz).

    Mean squared error of the reconstructions (pixels in [0, 1]); unbiased MMD^2 of the codes to the prior, always with
    the IMQ kernel so that runs compare; norm of the codes' mean, 0 for the prior; mean over dimensions of their
    variance, pz_scale^2 for the prior.
    """
    errors, codes = [], []
    for batch, z in encode_all(wae, images):
        errors.append((wae.decode(z) - utils.from_uint8(batch, symmetric=False)).square().mean((1, 2, 3)))
        codes.append(z)
    codes = torch.cat(codes)
    utils.set_seed(wae.flags.seed, "evaluation prior")
    with torch.no_grad():
        mmd = model.mmd_penalty(codes, wae.sample_prior(len(codes)), "IMQ", wae.flags.pz_scale)
    return {
        "test_mse": torch.cat(errors).mean().item(),
        "test_mmd": mmd.item(),
        "test_code_mean": codes.mean(0).norm().item(),
        "test_code_variance": codes.var(0).mean().item(),
    }, codes


def epoch_pictures(wae: WAE, images: np.ndarray | Tensor) -> dict[str, Any]:
    """Samples from the same prior draws every time, and reconstructions and interpolations of held-out images."""
    utils.set_seed(wae.flags.seed, "pictures")
    fake = wae.decode(wae.sample_prior(64))
    batch = next(utils.batches(images, [np.linspace(0, len(images) - 1, 32).astype(int)], wae.world.device))
    codes = wae.encode(batch)
    real, reconstructed = utils.from_uint8(batch, symmetric=False), wae.decode(codes)
    starts, ends = codes[:8, None], codes[-8:, None]  # (8, 1, nz) each
    t = torch.linspace(0, 1, 10, device=codes.device)[:, None]
    paths = wae.decode((starts + t * (ends - starts)).flatten(0, 1))  # from each start to its end in ten steps
    return {
        "fake_samples": utils.grid(fake, columns=8),
        "reconstructions": utils.grid(utils.alternate_rows(real, reconstructed, columns=8), columns=8),
        "interpolations": utils.grid(paths, columns=10),
    }


def evaluate(wae: WAE, train: np.ndarray | Tensor, test: np.ndarray | Tensor, epoch: int, folders: bool) -> None:
    """Writes `metrics.json`, `codes.png` and, with `folders`, every image to a file of its own in `eval/`."""
    flags, outf = wae.flags, wae.flags.outf
    if flags.sampler == "gaussian" and not len(train):
        raise UsageError(f"--sampler=gaussian fits the codes of training images: --n_test={flags.n_test} leaves none")
    figures, codes = held_out_figures(wae, test)
    utils.set_seed(flags.seed, "samples")
    drawn = {"prior": wae.sample_prior(flags.n_samples)}
    if len(train):
        density = fit_gaussian(torch.cat([z for _, z in encode_all(wae, train)]))
        utils.set_seed(flags.seed, "gaussian samples")
        drawn["gaussian"] = density.sample((flags.n_samples,))
        with torch.no_grad():
            gap = model.mmd_penalty(codes, density.sample((len(codes),)), "IMQ", flags.pz_scale)
        figures["test_mmd_gaussian"] = gap.item()

    def decoded(z: Tensor) -> Iterator[Tensor]:
        return (wae.decode(some) for some in z.split(flags.batch_size))

    images = {
        "real": lambda: (utils.from_uint8(batch, symmetric=False) for batch in in_order(wae, test)),
        "reconstructions": lambda: decoded(codes),
    } | {f"samples_{sampler}": partial(decoded, z) for sampler, z in drawn.items()}
    for name, batches in images.items():
        figures[f"sharpness_{name}"] = torch.cat([utils.sharpness(batch) for batch in batches()]).mean().item()
    if folders:
        for folder, name in (("real", "real"), ("reconstructions",) * 2, ("samples", f"samples_{flags.sampler}")):
            utils.save_each(outf / "eval" / folder, images[name]())

    counts = {"epoch": epoch, "n_test": len(test), "n_samples": flags.n_samples, "sampler": flags.sampler}
    utils.write_json(outf / "metrics.json", counts | figures)
    utils.save_picture(outf / "codes.png", picture_of_codes(wae, codes))
    print("\n".join(f"{name:>28}  {value:.5g}" for name, value in figures.items()))


def fit_gaussian(codes: Tensor) -> MultivariateNormal:
    """The Gaussian with the moments of codes (N, nz): ex-post density estimation (Ghosh et al., ICLR 2020)."""
    jitter = 1e-6 * torch.eye(codes.shape[1], device=codes.device)  # codes may not span all of the space
    return MultivariateNormal(codes.mean(0), codes.T.cov() + jitter)


def picture_of_codes(wae: WAE, codes: Tensor) -> Any:
    """Codes (N, nz) and prior draws in the two dimensions whose mean and variance differ most from the prior's."""
    variance = wae.flags.pz_scale**2
    distance = codes.mean(0).square() / variance + (codes.var(0, correction=0) / variance - 1).square()
    axes = distance.topk(min(2, codes.shape[1])).indices.tolist()
    axes = axes * 2 if len(axes) == 1 else axes
    utils.set_seed(wae.flags.seed, "picture of codes")
    prior = wae.sample_prior(min(len(codes), 2000))
    names = ("draws of the prior", "codes of held-out images")
    points = [cloud[:2000, axes].cpu().numpy() for cloud in (prior, codes)]
    return utils.scatter(*points, names, (f"z[{axes[0]}]", f"z[{axes[1]}]"))


# ----------------------------------------------------------------------------------------------------------------------
# Training


def learning_rate_factor(epoch: int, schedule: str, niter: int) -> float:
    """What the rates are multiplied with in an epoch, counted from 0, of a run of `niter` (the paper's appendix)."""
    if schedule == "scaled":
        epoch = epoch * PAPER_EPOCHS // niter  # where the paper's run would be
    if schedule == "constant" or epoch < 30:
        return 1.0
    return 0.5 if epoch < 50 else 0.1


def check_finite(values: Tensor, last_step: int, names: Sequence[str] = COLUMNS[2:5]) -> None:
    """Raises UserError, naming it and the step, if one of the values (n, names) of the last n steps is not finite."""
    if values.isfinite().all():
        return
    row, column = (~values.isfinite()).nonzero()[0].tolist()
    step, name, value = last_step - len(values) + 1 + row, names[column], values[row, column]
    raise UserError(f"not a finite loss: {name} is {value} at step {step}; nothing was saved since; try a lower --lr")


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0  # whole epochs done
    step: int = 0  # steps done of the next one
    best: float = math.inf  # lowest held-out mean squared error so far


def train(wae: WAE, images: np.ndarray | Tensor, test: np.ndarray | Tensor, checkpoint: dict[str, Any] | None) -> int:
    """Trains to the last epoch. Returns the exit status: 0, or 128 + N if signal N ended the run early."""
    flags, world, outf = wae.flags, wae.world, wae.flags.outf
    progress = Progress(*(checkpoint[name] for name in ("epoch", "step", "best"))) if checkpoint else Progress()
    if progress.epoch > flags.niter:
        raise UsageError(f"--niter={flags.niter}: the checkpoint has seen {progress.epoch} epochs already")
    log = None
    if world.is_main:  # the one process that writes
        log = utils.Log(outf, COLUMNS + TEST_COLUMNS, checkpoint["log"] if checkpoint else "", flags.tensorboard)
        utils.write_json(outf / "args.json", {k: str(v) if isinstance(v, Path) else v for k, v in vars(flags).items()})
        sample = next(utils.batches(images, [utils.epoch_order(len(images), flags.seed, 0)[:64]], world.device))
        utils.save_picture(outf / "real_samples.png", utils.grid(utils.from_uint8(sample, False), columns=8))
    if flags.e_pretrain and not checkpoint:
        pretrain_encoder(wae, images)

    wae.prepare_training()
    number = None  # of the signal that ends the run early
    with utils.StopRequest() as stop:
        while progress.epoch < flags.niter and number is None:
            number = train_epoch(wae, images, progress, log, stop)
            if number is None:
                finish_epoch(wae, images, test, progress, log)
                utils.wait_for_all(world)
                number = stop.agreed(world)
            elif log:
                save(wae, progress, log)
    if log:
        log.close()
        if number is None:
            utils.save_picture(outf / "losses.png", utils.curves(loss_curves(log)))
            evaluate(wae, images, test, progress.epoch, folders=False)
            print(f"samples, log and checkpoints are in {outf}")
        else:
            print(f"stopped after epoch {progress.epoch}, step {progress.step}; to continue: {resume_command(flags)}")
    return 0 if number is None else 128 + number


def train_epoch(
    wae: WAE, images: np.ndarray | Tensor, progress: Progress, log: utils.Log | None, stop: utils.StopRequest
) -> int | None:
    """Trains to the end of the epoch. Returns None, or the number of the signal that ended it early."""
    flags, world, epoch = wae.flags, wae.world, progress.epoch
    n = flags.batch_size
    steps = len(images) // n  # an epoch leaves out those images of its permutation that fill no batch
    rates = wae.set_learning_rates(learning_rate_factor(epoch, flags.lr_schedule, flags.niter))
    # (steps, processes, images of each): every process takes its share of every batch
    order = utils.epoch_order(len(images), flags.seed, epoch)[: steps * n].reshape(steps, world.size, -1)
    first = min(progress.step, steps)  # a continued run may have moved to fewer images
    losses: list[Tensor] = []  # of the steps since the last row of the log
    clock, title = time.perf_counter(), f"epoch {epoch + 1}/{flags.niter}"
    number = None
    with tqdm(total=steps * n, initial=first * n, unit="img", desc=title, disable=log is None) as bar:
        for step, batch in enumerate(utils.batches(images, order[first:, world.rank], world.device), first):
            utils.set_seed(flags.seed, "prior", epoch, step)  # the same draws in every process ...
            prior = wae.sample_prior(n)
            utils.set_seed(flags.seed, "noise", epoch, step, world.rank)  # ... each of which has its own noise
            losses.append(wae.train_step(wae.to_input(batch), prior))

            bar.update(n)
            progress.step = step + 1
            done = epoch * steps + step + 1
            printing = done % flags.print_every == 0
            if printing:
                means = utils.average(losses[-1], world).tolist()  # the one wait for the device
                check_finite(torch.stack(losses), done)
                if log:
                    speed = len(losses) * n / (time.perf_counter() - clock)
                    values = dict(zip(COLUMNS[2:5], means if flags.mode == "gan" else means[:2], strict=False))
                    log.add(epoch=epoch + 1, step=done, **values, lr=rates[0], images_per_s=round(speed, 1))
                    bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
                losses.clear()
                clock = time.perf_counter()
            # One process looks for a signal at every step; several agree on it where they wait for each other anyway.
            if (world.size == 1 or printing) and (number := stop.agreed(world)):
                break
        if losses:
            check_finite(torch.stack(losses), done)
    return number


def finish_epoch(
    wae: WAE, images: np.ndarray | Tensor, test: np.ndarray | Tensor, progress: Progress, log: utils.Log | None
) -> None:
    """What an epoch ends with: held-out figures, pictures and, last, so that nothing is missed, the checkpoint."""
    flags = wae.flags
    step = (progress.epoch + 1) * (len(images) // flags.batch_size)
    progress.epoch, progress.step = progress.epoch + 1, 0
    refresh_batch_norm(wae, images)
    if log is None:
        return
    figures, _ = held_out_figures(wae, test)
    check_finite(torch.tensor([list(figures.values())]), step, list(figures))
    log.add(epoch=progress.epoch, step=step, **figures)
    print(f"epoch {progress.epoch}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    if progress.epoch % flags.sample_every == 0 or progress.epoch == flags.niter:
        for name, picture in epoch_pictures(wae, test).items():
            utils.save_picture(flags.outf / f"{name}_epoch_{progress.epoch:03d}.png", picture)
            log.add_picture(name, picture, step)
    if figures["test_mse"] < progress.best:
        progress.best = figures["test_mse"]
        save(wae, progress, log, "model_best.pth.tar")
    save(wae, progress, log)


def save(wae: WAE, progress: Progress, log: utils.Log, name: str = "checkpoint.pth.tar") -> None:
    """Writes all that is needed to continue from here."""
    flags = {name: value for name, value in vars(wae.flags).items() if name in FIXED + KEPT}
    flags["dataroot"] = str(wae.flags.dataroot.resolve())  # the run may be continued from another folder
    states = {name: part.state_dict() for name, part in wae.parts().items()}
    utils.save_checkpoint(wae.flags.outf / name, states | asdict(progress) | {"log": log.text, "flags": flags})


def loss_curves(log: utils.Log) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of each loss and held-out figure in the log."""
    wanted = ("reconstruction", "penalty", "discriminator", "test_mse", "test_mmd")
    points = {name: [(float(r["step"]), float(r[name])) for r in log.rows() if r[name]] for name in wanted}
    return {name: tuple(map(list, zip(*pairs, strict=True))) for name, pairs in points.items() if pairs}


def resume_command(flags: argparse.Namespace) -> str:
    """The command line that continues this run: its checkpoint, and those flags that a checkpoint does not keep."""
    usual = vars(build_parser().parse_args([]))
    command = ["python3", "main.py", f"--checkpoint={flags.outf / 'checkpoint.pth.tar'}"]
    for name in ("cuda", "gpu_id", "ngpu", "amp", "compile", "tensorboard", "cache_dir", "n_samples", "sampler"):
        value = getattr(flags, name)
        if value != usual[name]:
            command.append(f"--{name}" if value is True else f"--{name}={value}")
    return shlex.join(command)


# ----------------------------------------------------------------------------------------------------------------------
# The program


def run(argv: list[str]) -> int:
    """Does what the command line asks. Returns the exit status. Raises UserError for what the user can mend."""
    flags, checkpoint = parse_flags(argv)
    if flags.ngpu > 1 and "LOCAL_RANK" not in os.environ:
        return launch(flags.ngpu, argv)
    if flags.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard: TensorBoard is not installed; pip install tensorboard")
    utils.make_folder(flags.outf)

    world = utils.join_world(flags.cuda, flags.gpu_id)
    if flags.seed is None:
        flags.seed = utils.from_main(utils.draw_seed(), world)
        print(f"--seed={flags.seed}") if world.is_main else None
    # One process a machine decodes, on first use.
    images = utils.load_images(
        flags.dataroot, flags.dataset, flags.image_size, flags.workers, flags.cache_dir, build=world.local_rank == 0
    )
    flags.n_test = flags.n_test or utils.default_n_test(len(images))
    n_train = len(images) - flags.n_test
    if n_train < 0:
        raise UsageError(f"--n_test={flags.n_test}: there are {len(images)} images")
    if n_train < flags.batch_size and not flags.evaluate:
        raise UsageError(
            f"--batch_size={flags.batch_size}: {len(images)} images less the --n_test={flags.n_test} held out "
            f"leave {n_train} to train on"
        )
    images = utils.put_on_device(images, world.device)
    train_images, test_images = images[:n_train], images[n_train:]

    # All training batches have one shape. On a GPU, convolutions may use TF32, as by default; the penalties do not.
    torch.backends.cudnn.benchmark = True
    wae = WAE(flags, world)
    if checkpoint:
        wae.load(checkpoint)
    if not flags.evaluate:
        return train(wae, train_images, test_images, checkpoint)
    refresh_batch_norm(wae, train_images)
    if world.is_main:
        evaluate(wae, train_images, test_images, checkpoint["epoch"], folders=True)
    return 0


def launch(processes: int, argv: list[str]) -> int:
    """Runs this command line in several processes on this machine, as `torchrun --nproc_per_node=N` does."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")  # seconds to finish a step and write a checkpoint
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the processes say themselves what is wrong
    try:
        torchrun.main(["--standalone", f"--nproc_per_node={processes}", __file__, *argv])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        utils.warn(f"error: process {rank} of {processes} was killed by signal {-failure.exitcode} (out of memory?)")
        return 128 - failure.exitcode
    except SignalException as error:  # passed on to the processes, which have stopped as one alone does
        return 128 + error.sigval
    return 0


def main() -> int:
    """Runs the program and turns every error that a user can mend into one line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # while training, see utils.StopRequest
    try:
        status = run(sys.argv[1:])
    except UserError as error:
        utils.let_others_speak(unless_main=True)  # the main process says the same, if it has failed as well
        utils.warn(f"error: {error}")
        return error.status
    except KeyboardInterrupt:
        utils.warn("interrupted")
        return 130
    except OSError as error:
        utils.warn(f"error: {error.filename or 'a file'}: {error.strerror or error}")
        return 1
    except (MemoryError, RuntimeError) as error:
        utils.let_others_speak()
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate" not in str(error):
            raise
        utils.warn("error: out of memory; try a smaller --batch_size, --nf or --image_size")
        return 1
    utils.leave_world()
    return status


if __name__ == "__main__":
    sys.exit(main())
