"""Trains and evaluates Wasserstein auto-encoders (Tolstikhin et al., ICLR 2018, arXiv 1711.01558).

    python3 main.py --dataroot=data/celebA --cuda --mode=gan --e_pretrain --outf=gan_outputs
    python3 main.py --dataroot=data/celebA --cuda --mode=mmd --e_pretrain --outf=mmd_outputs
    python3 main.py --checkpoint=gan_outputs/checkpoint.pth.tar --evaluate --cuda

The first two train WAE-GAN (Algorithm 1) and WAE-MMD (Algorithm 2); the same command continues a
run that was interrupted. The third writes samples and metrics.

model.py: networks, costs and penalties. utils.py: images, processes, checkpoints, pictures.
"""

import signal

if __name__ == "__main__":
    # Ctrl-C during the imports, which take seconds, ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import importlib.util
import json
import logging
import math
import os
import shutil
import sys
import time
from argparse import BooleanOptionalAction as Switch
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import model
import utils
from utils import Images, UsageError, UserError, World

CHECKPOINT, METRICS_FILE = "checkpoint.pth.tar", "metrics.json"
LOSSES = ("reconstruction", "penalty", "discriminator")
METRICS = ("test_mse", "test_mmd", "test_w2", "eigenvalue_min", "eigenvalue_max", "noise_variance")
COLUMNS = ("epoch", "step", *LOSSES, "lr", "images_per_s", *METRICS)

PAPER_EPOCHS = 55  # the length of run that the paper's schedule of learning rates is made for
BATCH_NORM_BATCHES = 100  # that batch norm is re-estimated from at an epoch's end
DIVERGED = "the last checkpoint is intact; try a lower --lr"
MIXTURE = 10  # Gaussians in the mixture that is fitted to the codes (Ghosh et al., ICLR 2020)

MODE_DEFAULTS = {
    "gan": {"LAMBDA": 1.0, "noise": "add_noise"},
    "mmd": {"LAMBDA": 100.0, "noise": "add_noise"},
    "vae": {"LAMBDA": 0.2, "noise": "gaussian"},
}

# Flags that define a run. They are stored in the checkpoint and cannot change when it continues.
FIXED = (
    *("dataset", "crop", "image_size", "n_test", "batch_size", "mode", "arch", "nz", "nf", "noise"),
    *("input_normalize_sym", "LAMBDA", "pz_scale", "cost", "kernel", "imq_scales", "quadratic"),
    *("nowozin_trick", "lr", "lr_adv", "beta1", "lr_schedule", "e_pretrain"),
    *("e_pretrain_sample_size", "e_pretrain_iters", "seed"),
)

# Flags of a single command, or machine. All others are stored too, and --checkpoint takes them.
PER_COMMAND = ("checkpoint", "outf", "evaluate", "fid", "help", "gpu_id", "workers", "compile")


# --------------------------------------------------------------------------------------------------
# Flags


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message: str) -> None:
        raise UsageError(message)


def at_least(kind: type, low: float, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite number from `low` on, or above it."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value < math.inf or (above and value == low):
            bound = f"{'more than' if above else 'at least'} {low:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bound}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is no number at all
    return parse


def folder(text: str) -> Path:
    """An argparse type: a path, which is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return Path(text)


def positive_numbers(text: str) -> tuple[float, ...]:
    """An argparse type: numbers above 0, separated by commas."""
    return tuple(at_least(float, 0, above=True)(part) for part in text.split(","))


def get_parser() -> argparse.ArgumentParser:
    """Every flag, with its meaning, range and default."""
    parser = Parser(
        "main.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    count, positive = at_least(int, 1), at_least(float, 0, above=True)

    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--dataroot", type=folder, help="image folder, laid out as DATAROOT/sub_directory/XXX.jpg")
    add("--dataset", default="celebA", choices=("celebA", "folder"),
        help="celebA: the central 140 pixels; folder: the largest central square (default: celebA)")
    add("--crop", type=count, help="side of the central square, in place of that of --dataset")
    add("--image_size", type=int, default=64, choices=model.IMAGE_SIZES,
        help="side of the images that the networks see, in pixels (default: 64)")
    add("--n_test", type=at_least(int, 2),
        help="images held out, the last by path; 2 or more (default: a tenth, at most 19962)")
    add("--batch_size", type=at_least(int, 2), default=100,
        help="images in a step, over all processes; 2 or more (default: 100)")
    add("--cache_dir", type=folder, help="where to keep the decoded images (default: a hidden file "
        "in DATAROOT or, if that cannot be written, in the user's cache folder)")

    add = parser.add_argument_group("model").add_argument
    add("--mode", default="gan", choices=MODE_DEFAULTS, help="gan: WAE-GAN, Algorithm 1; "
        "mmd: WAE-MMD, Algorithm 2; vae: the baseline (default: gan)")
    add("--arch", default="dcgan", choices=("dcgan", "paper"),
        help="dcgan: 4x4 convolutions; paper: the networks of its appendix (default: dcgan)")
    add("--nz", type=count, default=64, help="latent dimensions (default: 64)")
    add("--nf", type=count, default=128,
        help="base width; the widest layers have 8 x NF channels (default: 128)")
    add("--noise", choices=("deterministic", "add_noise", "gaussian"),
        help="randomness of the encoder. deterministic: none; add_noise: on the pixels while "
        "training; gaussian: a Gaussian code (default: add_noise, and gaussian for vae)")
    add("--input_normalize_sym", action=Switch, default=False,
        help="the networks work in [-1, 1] with a tanh, not in [0, 1] with a sigmoid")

    add = parser.add_argument_group("objective").add_argument
    add("--LAMBDA", type=at_least(float, 0), help="weight of the penalty; for vae, a tenth of the "
        "decoder's variance, for pixels in [-1, 1] (default: 1 for gan, 100 for mmd, 0.2 for vae)")
    add("--pz_scale", type=positive, default=1.0,
        help="standard deviation of the prior (default: 1.0)")
    add("--cost", default="l2sq", choices=("l2sq", "l2", "l1"),
        help="l2sq: 0.05 |x-y|^2; l2: 0.2 |x-y|; l1: 0.02 |x-y|_1 (default: l2sq)")
    add("--kernel", default="IMQ", choices=("IMQ", "RBF"),
        help="mmd: inverse multiquadratic or Gaussian (default: IMQ)")
    add("--imq_scales", type=positive_numbers, default=model.IMQ_SCALES, metavar="X,X,...",
        help="mmd: scales of the IMQ kernels that are summed; 1 alone is the paper's "
        "(default: 0.1,0.2,0.5,1,2,5,10, the official code's)")
    add("--quadratic", type=at_least(float, 0), default=0.0, help="mmd: weight of a quadratic "
        "kernel that is added; it sees directions that the codes do not use (default: 0.0)")
    add("--nowozin_trick", action=Switch, default=False,
        help="gan: add the prior's log density to the discriminator's logit")

    add = parser.add_argument_group("optimisation").add_argument
    add("--niter", type=count, default=PAPER_EPOCHS, help="epochs (default: 55)")
    add("--lr", type=positive, default=0.0003,
        help="learning rate of encoder and decoder (default: 0.0003)")
    add("--lr_adv", type=positive, help="gan: rate of the discriminator (default: 3 x lr)")
    add("--beta1", type=at_least(float, 0), default=0.5,
        help="Adam's decay of the first moment, below 1 (default: 0.5)")
    add("--lr_schedule", default="paper", choices=("paper", "scaled", "constant"),
        help="paper: rates times 0.5, 0.1 and 0.01 after epochs 30, 50 and 100; scaled: the same "
        "shape over NITER epochs, so that a larger --niter raises them again (default: paper)")
    add("--e_pretrain", action=Switch, default=False,
        help="first train the encoder alone, to match the moments of its codes to the prior's")
    add("--e_pretrain_sample_size", type=at_least(int, 2), default=256,
        help="images in a step of pretraining; 2 or more (default: 256)")
    add("--e_pretrain_iters", type=count, default=200,
        help="steps of pretraining, at most (default: 200)")
    add("--seed", type=at_least(int, 0), default=0, help="fixes the run (default: 0)")

    add = parser.add_argument_group("output").add_argument
    add("--outf", type=folder, help="where to write; a run in it is continued if it has the same "
        "flags (default: outputs, or the folder of --checkpoint)")
    add("--print_every", type=count, default=10, help="steps between rows of log.csv (default: 10)")
    add("--sample_every", type=count, default=1, help="epochs between pictures (default: 1)")
    add("--checkpoint", type=folder,
        help="continue or evaluate this run; its flags become the defaults")
    add("--tensorboard", action=Switch, default=False,
        help="write log and pictures for TensorBoard too, which must be installed")
    add("--evaluate", action=Switch, default=False,
        help="no training: write images and metrics of a checkpoint")
    add("--n_samples", type=at_least(int, 2), default=10000,
        help="samples of each latent density in an evaluation; 2 or more (default: 10000)")
    add("--fid", action=Switch, default=False,
        help="add Frechet inception distances to an evaluation; needs pytorch-fid")

    add = parser.add_argument_group("machine").add_argument
    add("--cuda", action=Switch, default=False, help="train on a GPU")
    add("--gpu_id", type=at_least(int, 0), default=0,
        help="which GPU, from 0; several processes take one each, from the first")
    add("--ngpu", type=count, default=1, help="processes, with a GPU each if --cuda (default: 1)")
    add("--workers", type=count, help="processes that decode, on first use (default: one a core)")
    add("--amp", action=Switch, default=False,
        help="run encoder and decoder in bfloat16; weights and penalties stay in float32")
    add("--compile", action=Switch, default=False, help="compile encoder, decoder and the MMD")
    # fmt: on
    return parser


def as_arguments(stored: dict[str, Any]) -> Iterator[str]:
    """The flags of a checkpoint as one would type them, but for those of a single command."""
    for name, value in stored.items():
        if name in PER_COMMAND:
            continue
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
        elif value is not None:
            yield f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"


def get_flags(argv: list[str]) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The flags, and the checkpoint to continue from or to evaluate, if there is one.

    Raises:
        UsageError: flags that are wrong, contradict each other, or contradict the checkpoint.
        UserError: a checkpoint that cannot be read.
    """
    parser = get_parser()
    flags = complete(parser.parse_args(argv))
    here = flags.outf / CHECKPOINT
    path = flags.checkpoint or here
    if not path.exists() and not flags.checkpoint and not flags.evaluate:
        return check(flags), None
    checkpoint = utils.load_checkpoint(path)
    stored = checkpoint["flags"]
    if flags.checkpoint or flags.evaluate:
        try:
            # Typed flags come later, and so they win.
            flags = complete(parser.parse_args([*as_arguments(stored), *argv]))
        except UsageError as error:
            raise UserError(f"{path}: not a checkpoint of this program: {error}") from None
    if not flags.evaluate:
        differ = [name for name in FIXED if getattr(flags, name) != stored.get(name)]
        if differ:
            pairs = ", ".join(f"--{k}={getattr(flags, k)} (there: {stored.get(k)})" for k in differ)
            raise UsageError(f"{path} is of a run with other flags: {pairs}; choose another --outf")
        if here.exists() and not path.samefile(here):
            raise UsageError(f"--outf={flags.outf} holds a run already; choose another")
    return check(flags), checkpoint


def complete(flags: argparse.Namespace) -> argparse.Namespace:
    """The flags, with the defaults that depend on other flags."""
    for name, value in MODE_DEFAULTS[flags.mode].items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
    flags.lr_adv = flags.lr_adv or 3 * flags.lr
    flags.workers = flags.workers or utils.n_cores()
    flags.outf = flags.outf or (flags.checkpoint.parent if flags.checkpoint else Path("outputs"))
    return flags


def check(flags: argparse.Namespace) -> argparse.Namespace:
    """The flags. Raises UsageError where they contradict each other or this machine."""
    if flags.dataroot is None:
        raise UsageError("--dataroot is required: the folder with the folders of images")
    if flags.outf.resolve().is_relative_to(flags.dataroot.resolve()):
        raise UsageError(
            f"--outf={flags.outf} is inside --dataroot={flags.dataroot}: its pictures would become "
            "training images; choose another"
        )
    if flags.mode == "vae" and flags.noise != "gaussian":
        raise UsageError(f"--noise={flags.noise}: --mode=vae needs --noise=gaussian")
    if flags.nowozin_trick and flags.mode != "gan":
        raise UsageError("--nowozin_trick is for --mode=gan: there is no discriminator otherwise")
    if flags.beta1 >= 1:
        raise UsageError(f"--beta1={flags.beta1} must be below 1")
    if flags.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard: TensorBoard is not installed; pip install tensorboard")
    if flags.fid and importlib.util.find_spec("pytorch_fid") is None:
        raise UsageError("--fid: pytorch-fid is not installed; pip install pytorch-fid")
    compilers = (os.environ.get("CXX", "g++"), "c++", "clang++")
    if flags.compile and not any(map(shutil.which, compilers)):
        raise UsageError("--compile needs a C++ compiler, and there is none here")
    launched = utils.started_by_torchrun()
    flag, here = "--ngpu", flags.ngpu
    if launched:
        flag, here = "--nproc_per_node", int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    n_gpus = torch.cuda.device_count()
    if flags.cuda and here > max(1, n_gpus):
        raise UsageError(f"{flag}={here}: there are {n_gpus} GPUs here")
    size = int(os.environ["WORLD_SIZE"]) if launched else flags.ngpu
    if flags.batch_size % size or flags.batch_size < 2 * size:
        raise UsageError(f"--batch_size={flags.batch_size} cannot be shared by {size} processes")
    return flags


# --------------------------------------------------------------------------------------------------
# The training step


class Run:
    """Networks and optimisers of a run, which a checkpoint keeps, and how its flags use them."""

    def __init__(self, flags: argparse.Namespace, world: World):
        self.flags, self.world = flags, world
        symmetric = flags.input_normalize_sym
        utils.set_seed(flags.seed, "weights")
        self.net: nn.Module = model.AutoEncoder(
            flags.image_size, flags.nz, flags.nf, flags.arch, flags.noise, symmetric
        )
        self.networks = {"net": self.net}
        if flags.mode == "gan":
            trick = {"pz_scale": flags.pz_scale} if flags.nowozin_trick else {}
            self.networks["discriminator"] = model.Discriminator(flags.nz, **trick)
        if flags.cuda and world.size > 1:
            self.net = self.networks["net"] = nn.SyncBatchNorm.convert_sync_batchnorm(self.net)
        # Channels last is how images lie in memory, and the faster layout for convolutions.
        for network in self.networks.values():
            network.to(world.device, memory_format=torch.channels_last)
        self.discriminator = self.networks.get("discriminator")

        self.rates = {"net": flags.lr, "discriminator": flags.lr_adv}
        self.optimizers = {
            name: self.adam(network, self.rates[name]) for name, network in self.networks.items()
        }

    def adam(self, network: nn.Module, lr: float) -> torch.optim.Adam:
        """The optimiser of the paper, for the weights of a network."""
        return torch.optim.Adam(
            network.parameters(), lr=lr, betas=(self.flags.beta1, 0.999), fused=True
        )

    def wrap(self) -> None:
        """Prepares the step functions for several processes and compilation."""
        gpus = [self.world.device.index] if self.flags.cuda else None
        several = partial(DistributedDataParallel, device_ids=gpus)
        wrapped = {
            name: several(network) if self.world.size > 1 else network
            for name, network in self.networks.items()
        }
        compiled: Callable = torch.compile if self.flags.compile else lambda function: function
        self.step_net = compiled(wrapped["net"])
        self.step_discriminator = wrapped.get("discriminator")
        self.mmd_penalty = compiled(model.mmd_penalty)

    def set_learning_rates(self, factor: float) -> float:
        """Sets the rates to so many times their flags. Returns that of encoder and decoder."""
        for name, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = self.rates[name] * factor
        return self.rates["net"] * factor

    def autocast(self) -> AbstractContextManager:
        """Where the networks run: in bfloat16 with --amp."""
        if not self.flags.amp:
            return nullcontext()
        return torch.autocast(self.world.device.type, torch.bfloat16)

    def sample_prior(self, n: int) -> Tensor:
        """Draws of the prior, (n, nz)."""
        return model.sample_prior(n, self.flags.nz, self.flags.pz_scale, self.world.device)

    def to_input(self, batch: Tensor) -> Tensor:
        """uint8 images (n, S, S, 3) as the encoder takes them, (n, 3, S, S)."""
        return utils.from_uint8(batch, self.flags.input_normalize_sym)

    @torch.no_grad()
    def encode(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes and log variances (n, nz) of uint8 images (n, S, S, 3), in evaluation mode."""
        with self.autocast():
            mean, log_variance = self.net.eval().encoder(self.to_input(batch))
            return model.draw_code(mean, log_variance), log_variance

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images (n, 3, S, S) in [0, 1] of codes (n, nz), in evaluation mode."""
        with self.autocast():
            images = self.net.eval().decoder(codes.float()).float()
            return images / 2 + 0.5 if self.flags.input_normalize_sym else images

    def state_dict(self) -> dict[str, Any]:
        """Weights and moments, by name."""
        networks = {name: network.state_dict() for name, network in self.networks.items()}
        return networks | {
            f"optimizer_{name}": optimizer.state_dict()
            for name, optimizer in self.optimizers.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies weights and moments. Raises UserError if they do not fit or are not finite."""
        name = ""
        try:
            for name, network in self.networks.items():
                network.load_state_dict(state[name])
                if not self.flags.evaluate:
                    utils.load_adam(self.optimizers[name], state[f"optimizer_{name}"])
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"the checkpoint's {name} does not fit its flags") from error
        if not utils.weights_are_sound(self.networks.values()):
            raise UserError("the checkpoint's weights are not finite")


def train_step(run: Run, x: Tensor, prior: Tensor) -> Tensor:
    """One step of Algorithm 1 (gan) or 2 (mmd) of the paper, or of a VAE.

    Does not wait for the GPU, except where batch norm is synchronised.

    Args:
        x: this process's images x_1 ... x_n of the batch, (n, 3, S, S).
        prior: draws z_1 ... z_N of the prior for the batch of all processes, (N, nz).

    Returns:
        Reconstruction cost, penalty and the discriminator's loss, (3,).
    """
    flags, world = run.flags, run.world
    with run.autocast():
        # z~_i from Q(Z|x_i): the one encoding that all of the step shares.
        y, codes, mean, log_variance = run.step_net(x)
    loss_d = torch.zeros((), device=x.device)

    if flags.mode == "gan":
        # Algorithm 1: update D by ascending LAMBDA/n sum_i log D(z_i) + log(1 - D(z~_i)) ...
        z = prior.chunk(world.size)[world.rank]
        both = torch.cat([z, codes.detach()])
        logits_prior, logits_codes = run.step_discriminator(both).chunk(2)
        loss_d = flags.LAMBDA * model.discriminator_loss(logits_prior, logits_codes)
        run.optimizers["discriminator"].zero_grad()
        loss_d.backward()
        run.optimizers["discriminator"].step()
        # ... and Q and G by descending 1/n sum_i c(x_i, G(z~_i)) - LAMBDA log D(z~_i).
        penalty = model.gan_penalty(run.discriminator, codes)
    elif flags.mode == "mmd":
        # Algorithm 2: update Q and G by descending 1/n sum_i c(x_i, G(z~_i)) + LAMBDA MMD^2(z, z~).
        all_codes = utils.gather(codes, world)
        kernel = (flags.kernel, flags.pz_scale, flags.imq_scales, flags.quadratic)
        penalty = run.mmd_penalty(all_codes, prior, *kernel)
    else:
        # VAE: update Q and G by descending 1/n sum_i c(x_i, G(z~_i)) + LAMBDA KL(Q(Z|x_i) || P_Z).
        penalty = model.kl_divergence(mean, log_variance, flags.pz_scale)

    cost = model.reconstruction_cost(x, y, flags.cost, flags.input_normalize_sym)
    run.optimizers["net"].zero_grad()
    (cost + flags.LAMBDA * penalty).backward()
    run.optimizers["net"].step()
    return torch.stack([cost, penalty, loss_d]).detach()


def pretrain_encoder(run: Run, images: Images) -> None:
    """Trains the encoder alone until its codes have the prior's mean and covariance.

    It stops when the loss is what as many draws of the prior would score, or after
    --e_pretrain_iters steps.
    """
    flags, n = run.flags, run.flags.e_pretrain_sample_size
    optimizer = run.adam(run.net.encoder, flags.lr)
    rng = np.random.default_rng([flags.seed, 2**32])  # no epoch has this number
    indices = (rng.integers(len(images), size=n) for _ in range(flags.e_pretrain_iters))
    target = model.pretrain_floor(n, flags.nz, flags.pz_scale)
    bar = tqdm(
        utils.batches(images, indices, run.world.device),
        desc="pretraining",
        total=flags.e_pretrain_iters,
        disable=not run.world.is_main,
    )
    for step, batch in enumerate(bar):
        utils.set_seed(flags.seed, "pretrain", step)
        with run.autocast():
            codes = model.draw_code(*run.net.encoder(run.to_input(batch)))
        loss = model.pretrain_loss(codes, flags.pz_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            # The mean over processes, so that all of them stop together.
            value = utils.average(loss.detach(), run.world).item()
            bar.set_postfix(loss=f"{value:.3g}", target=f"{target:.3g}")
            if value <= target:
                break


# --------------------------------------------------------------------------------------------------
# Training


def learning_rate_factor(epoch: int, schedule: str, niter: int) -> float:
    """What the rates are multiplied by in an epoch, counted from 0 (the paper's appendix)."""
    if schedule == "scaled":
        epoch = epoch * PAPER_EPOCHS // niter  # where the paper's run would be
    if schedule == "constant" or epoch < 30:
        return 1.0
    return 0.5 if epoch < 50 else 0.1 if epoch < 100 else 0.01


def batch_indices(n_images: int, steps: range, flags: argparse.Namespace, world: World) -> Iterator:
    """The indices of this process's images in each step, a function of seed and step.

    An epoch leaves out the images of its permutation that do not fill a batch.
    """
    per_epoch = n_images // flags.batch_size
    for step in steps:
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == steps.start:
            order = utils.epoch_order(n_images, flags.seed, epoch)
        batch = order[i * flags.batch_size : (i + 1) * flags.batch_size]
        yield batch.reshape(world.size, -1)[world.rank]


def check_finite(values: Tensor, first_step: int, names: Iterable[str]) -> None:
    """Raises UserError, naming value and step, if one of values (steps, names) is not finite."""
    for step, row in enumerate(values.tolist(), first_step):
        for name, value in zip(names, row, strict=True):
            if not math.isfinite(value):
                raise UserError(f"{name} is {value} at step {step}; {DIVERGED}")


def train(run: Run, images: Images, test: Images, data: dict, checkpoint: dict | None) -> int:
    """Trains to the last epoch. Returns 0, or the number of the signal that ended it early.

    Args:
        images, test: training and held-out images, uint8 (N, S, S, 3).
        data: what identifies the images, for the checkpoint.
        checkpoint: where to continue, None for a new run.
    """
    flags, world = run.flags, run.world
    per_epoch = len(images) // flags.batch_size
    start, end = checkpoint["step"] if checkpoint else 0, flags.niter * per_epoch
    best, text = (checkpoint["best"], checkpoint["log"]) if checkpoint else (math.inf, "")
    log = start_log(run, images, text, start) if world.is_main else None
    if flags.e_pretrain and not checkpoint:
        pretrain_encoder(run, images)
    run.wrap()

    stop, stopping, losses, clock = utils.Stop(), 0, [], time.perf_counter()
    indices = batch_indices(len(images), range(start, end), flags, world)
    batches = utils.batches(images, indices, world.device)
    bar = tqdm(batches, initial=start, total=end, unit="step", disable=not world.is_main)
    for step, batch in enumerate(bar, start):
        epoch = step // per_epoch
        lr = run.set_learning_rates(learning_rate_factor(epoch, flags.lr_schedule, flags.niter))

        # Randomness is a function of seed, purpose and step: a resumed run repeats a whole one.
        utils.set_seed(flags.seed, "prior", step)  # the same draws in every process ...
        prior = run.sample_prior(flags.batch_size)
        utils.set_seed(flags.seed, "noise", step, world.rank)  # ... but noise of its own
        run.net.train()
        losses.append(train_step(run, run.to_input(batch), prior))

        done = step + 1
        epoch_ends, printing = done % per_epoch == 0, done % flags.print_every == 0
        if printing or epoch_ends:
            check_finite(torch.stack(losses), done - len(losses) + 1, LOSSES)
            means = utils.average(losses[-1], world).tolist()
            speed = len(losses) * flags.batch_size / (time.perf_counter() - clock)
            losses = []
            if log and printing:
                used = dict(zip(LOSSES, means if flags.mode == "gan" else means[:2], strict=False))
                log.add(epoch=epoch + 1, step=done, **used, lr=lr, images_per_s=round(speed, 1))
                bar.set_description(f"epoch {epoch + 1}/{flags.niter}", refresh=False)
                bar.set_postfix({k: f"{v:.4g}" for k, v in used.items()}, refresh=False)
            clock = time.perf_counter()
        # Several processes agree on a signal where they wait for each other anyway.
        if world.size == 1 or printing or epoch_ends:
            stopping = stop.agreed(world)

        if epoch_ends:
            refresh_batch_norm(run, images, BATCH_NORM_BATCHES)
        if epoch_ends and log:
            metrics, _ = test_metrics(run, test)
            check_finite(torch.tensor([list(metrics.values())]), done, metrics)
            log.add(epoch=epoch + 1, step=done, **metrics)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            tqdm.write(f"epoch {epoch + 1}: {shown}")
            if (epoch + 1) % flags.sample_every == 0 or done == end:
                for name, picture in sample_grids(run, test).items():
                    utils.save_picture(flags.outf / f"{name}_epoch_{epoch + 1:03d}.png", picture)
                    log.add_picture(name, picture, done)
            if metrics["test_mse"] < best:
                best = metrics["test_mse"]
                save(run, done, best, log, data, "model_best.pth.tar")
            clock = time.perf_counter()
        if log and (epoch_ends or stopping):
            # Last, so that a checkpoint vouches for all that was written before it.
            save(run, done, best, log, data, CHECKPOINT)
        if stopping:
            break

    bar.close()
    stop.close()
    if log:
        log.close()
    if stopping:
        utils.warn(f"stopped after step {done} of {end}; the same command continues")
    return stopping


def start_log(run: Run, images: Images, text: str, step: int) -> utils.Log:
    """The log, after writing the flags of the run and a picture of training images."""
    flags = run.flags
    stored = {k: str(v) if isinstance(v, Path) else v for k, v in vars(flags).items()}
    utils.write_json(flags.outf / "args.json", stored)
    indices = [utils.epoch_order(len(images), flags.seed, 0)[:64]]
    sample = utils.from_uint8(next(utils.batches(images, indices, run.world.device)), False)
    utils.save_picture(flags.outf / "real_samples.png", utils.grid(sample, columns=8))
    return utils.Log(flags.outf, COLUMNS, text, step, flags.tensorboard)


def save(run: Run, step: int, best: float, log: utils.Log, data: dict, name: str) -> None:
    """Writes all that is needed to continue. Raises UserError if the weights are not finite."""
    if not utils.weights_are_sound(run.networks.values()):
        raise UserError(f"the weights are not finite at step {step}; {DIVERGED}")
    flags = {k: v for k, v in vars(run.flags).items() if k not in PER_COMMAND}
    flags["dataroot"] = str(run.flags.dataroot.resolve())  # it may continue from another folder
    flags["cache_dir"] = run.flags.cache_dir and str(run.flags.cache_dir.resolve())
    state = {"flags": flags, "step": step, "best": best, "log": log.text} | data
    utils.save_checkpoint(run.flags.outf / name, state | run.state_dict())


# --------------------------------------------------------------------------------------------------
# Evaluation


def refresh_batch_norm(run: Run, images: Images, n_batches: int | None = None) -> None:
    """Re-estimates the statistics of batch norm from so many training batches, or from all.

    Those kept while training lag behind the weights.
    """
    order = utils.epoch_order(len(images), run.flags.seed, 0)
    indices = np.array_split(order, max(1, len(order) // run.flags.batch_size))[:n_batches]
    if run.flags.cuda:  # batch norm is synchronised, so each process takes its share
        indices = [index[run.world.rank :: run.world.size] for index in indices]
    if len(order) > 1:  # batch norm needs two images
        utils.set_seed(run.flags.seed, "batch norm", run.world.rank)
        batches = utils.batches(images, indices, run.world.device)
        with torch.no_grad(), run.autocast():
            update_bn((run.to_input(batch) for batch in batches), run.net)


def in_order(run: Run, images: Images) -> Iterator[Tensor]:
    """Batches of uint8 images, from the first image to the last."""
    n = run.flags.batch_size
    indices = np.split(np.arange(len(images)), range(n, len(images), n))
    return utils.batches(images, indices, run.world.device)


def encode_all(run: Run, images: Images) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The same batches, with their codes and log variances (n, nz)."""
    utils.set_seed(run.flags.seed, "encode")  # a Gaussian encoder draws the same codes every time
    return ((batch, *run.encode(batch)) for batch in in_order(run, images))


def test_metrics(run: Run, images: Images) -> tuple[dict[str, float], Tensor]:
    """Metrics of held-out images, and their codes (N, nz).

    test_mse is the mean squared error of reconstructions, for pixels in [0, 1]. test_mmd and
    test_w2 are distances of the codes from the prior: `model.mmd_to_prior`, `model.gaussian_w2`.
    The eigenvalues are the extreme ones of the codes' covariance. noise_variance is the mean
    variance that a Gaussian encoder gives.
    """
    errors, codes, variances = [], [], []
    for batch, code, log_variance in encode_all(run, images):
        x = utils.from_uint8(batch, symmetric=False)
        errors.append((run.decode(code) - x).square().mean((1, 2, 3)))
        codes.append(code)
        if log_variance is not None:
            variances.append(log_variance.exp().mean(1))
    codes = torch.cat(codes)
    if not codes.isfinite().all():
        raise UserError(f"the codes are not finite; {DIVERGED}")
    eigenvalues, _ = model.covariance_eigenvalues(codes)
    metrics = {
        "test_mse": torch.cat(errors).mean(),
        "test_mmd": model.mmd_to_prior(codes, run.flags.pz_scale),
        "test_w2": model.gaussian_w2(codes, run.flags.pz_scale),
        "eigenvalue_min": eigenvalues[0],
        "eigenvalue_max": eigenvalues[-1],
    }
    if variances:
        metrics["noise_variance"] = torch.cat(variances).mean()
    return {name: value.item() for name, value in metrics.items()}, codes


def sample_grids(run: Run, images: Images) -> dict[str, Any]:
    """Pictures of samples, from always the same codes, and of held-out images and paths."""
    utils.set_seed(run.flags.seed, "pictures")
    samples = run.decode(run.sample_prior(64))
    indices = np.linspace(0, len(images) - 1, 32).astype(int)
    batch = next(utils.batches(images, [indices], run.world.device))
    codes, _ = run.encode(batch)
    pair = (utils.from_uint8(batch, symmetric=False), run.decode(codes))
    rows = torch.stack([images.unflatten(0, (-1, 8)) for images in pair], 1)
    starts, ends = codes[:8, None], codes[-8:, None]  # (8, 1, nz) each
    t = torch.linspace(0, 1, 10, device=codes.device)[:, None]
    paths = run.decode((starts + t * (ends - starts)).flatten(0, 1))
    return {
        "fake_samples": utils.grid(samples, columns=8),
        "reconstructions": utils.grid(rows.flatten(0, 2), columns=8),
        "interpolations": utils.grid(paths, columns=10),
    }


def plot_codes(run: Run, codes: Tensor) -> Any:
    """Codes (N, nz) and prior draws in the plane of the extreme eigenvectors of the covariance."""
    _, vectors = model.covariance_eigenvalues(codes)
    plane = vectors[:, [0, -1]].float()
    utils.set_seed(run.flags.seed, "plot")
    clouds = (run.sample_prior(min(len(codes), 2000)), codes[:2000])
    return utils.scatter(*((cloud @ plane).cpu().numpy() for cloud in clouds))


def evaluate(run: Run, train: Images, test: Images, step: int, folders: bool) -> None:
    """Writes metrics.json and codes.png and, with `folders`, all images and codes to eval/."""
    flags, outf = run.flags, run.flags.outf
    inception, features = utils.Inception(run.world.device) if flags.fid else None, {}
    metrics, codes = test_metrics(run, test)
    utils.set_seed(flags.seed, "prior metrics")
    draws = run.sample_prior(len(codes))
    metrics["test_w2_of_prior_draws"] = model.gaussian_w2(draws, flags.pz_scale).item()

    utils.set_seed(flags.seed, "samples")
    latents = {"samples_prior": run.sample_prior(flags.n_samples)}
    if len(train):
        train_codes = torch.cat([code for _, code, _ in encode_all(run, train)])
        for name, components in (("gaussian", 1), ("mixture", MIXTURE)):
            utils.set_seed(flags.seed, name)
            density = model.fit_mixture(train_codes, components)
            latents[f"samples_{name}"] = density.sample((flags.n_samples,))
    latents["reconstructions"] = codes

    sets = {"real": (utils.from_uint8(batch, False) for batch in in_order(run, test))}
    sets |= {name: map(run.decode, z.split(flags.batch_size)) for name, z in latents.items()}
    for name, batches in sets.items():
        if folders:
            batches = utils.write_images(outf / "eval" / name, batches)
        sharp, features[name] = [], []
        for images in tqdm(batches, desc=name, unit="batch", leave=False):
            sharp.append(utils.sharpness(images))
            if inception:
                features[name].append(inception.features(images))
        metrics[f"sharpness_{name}"] = torch.cat(sharp).mean().item()
        if inception and name != "real":
            both = (np.concatenate(features[key]) for key in ("real", name))
            metrics[f"fid_{name}"] = inception.fid(*both)

    if folders:
        with utils.atomic_write(outf / "eval" / "codes.npy") as file:
            np.save(file, codes.cpu().numpy())
    utils.save_picture(outf / "codes.png", plot_codes(run, codes))
    counts = {"step": step, "n_test": len(test), "n_samples": flags.n_samples}
    utils.write_json(outf / METRICS_FILE, counts | metrics)
    print("\n".join(f"{name:>28}  {value:.5g}" for name, value in metrics.items()))


# --------------------------------------------------------------------------------------------------
# The program


def check_data(flags: argparse.Namespace, data: dict[str, Any], stored: dict[str, Any]) -> None:
    """Compares the images with those that the checkpoint was trained on.

    Raises:
        UserError: a run would continue on other images.
    """
    if data["images"] != stored["images"]:
        message = f"--dataroot={flags.dataroot}: not the images that the checkpoint was trained on"
        if not flags.evaluate:
            raise UserError(f"{message}; bring those back, or start anew in another --outf")
        utils.warn(message)
    elif data["n_train"] < stored["n_train"]:
        n = stored["n_train"] - data["n_train"]
        utils.warn(f"--n_test={flags.n_test}: {n} of the held-out images were trained on")


def is_complete(flags: argparse.Namespace, step: int, end: int) -> bool:
    """Whether a run has come to its last step and been evaluated there."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return step >= end and json.loads((flags.outf / METRICS_FILE).read_text())["step"] == step
    return False


def execute(argv: list[str]) -> int:
    """Does what the command line asks. Returns the exit status. Raises UserError."""
    flags, checkpoint = get_flags(argv)
    if flags.ngpu > 1 and not utils.started_by_torchrun():
        return launch(flags.ngpu, argv)
    world = utils.get_world(flags.cuda, flags.gpu_id)
    images, digest = utils.load_images(
        *(flags.dataroot, flags.dataset, flags.image_size),
        *(flags.crop, flags.workers, flags.cache_dir),
    )
    n_test = flags.n_test or utils.default_n_test(len(images))
    data = {"images": digest, "n_train": len(images) - n_test}
    if data["n_train"] < (0 if flags.evaluate else flags.batch_size):
        raise UsageError(
            f"--n_test={n_test}, --batch_size={flags.batch_size}: {len(images)} images are too few"
        )
    step, end = 0, flags.niter * (data["n_train"] // flags.batch_size)
    if checkpoint:
        check_data(flags, data, checkpoint)
        step = checkpoint["step"]
    utils.make_folder(flags.outf)
    lock = utils.lock(flags.outf / ".lock", wait=False) if world.is_main else None
    utils.join(world)
    if not utils.all_equal((digest, step), world):
        raise UserError(
            f"--outf={flags.outf}, --dataroot={flags.dataroot}: the processes do not find the same "
            "checkpoint and images there; all machines need both"
        )
    if not flags.evaluate and is_complete(flags, step, end):
        utils.leave_world()
        if world.is_main:
            print(f"the run in {flags.outf} is complete; a larger --niter continues it")
        return 0
    images = utils.put_on_device(images, world.device)
    train_images, test_images = images[: data["n_train"]], images[data["n_train"] :]
    # Training batches have one shape, so that the search for fast convolutions pays.
    torch.backends.cudnn.benchmark = True
    run = Run(flags, world)
    if checkpoint:
        run.load_state_dict(checkpoint)
    signum = 0
    if not flags.evaluate:
        if checkpoint:
            utils.warn(f"continuing the run in {flags.outf} from step {step} of {end}")
            if flags.lr_schedule == "scaled" and flags.niter > checkpoint["flags"]["niter"]:
                utils.warn(f"--lr_schedule=scaled is stretched to --niter={flags.niter}")
        signum, step = train(run, train_images, test_images, data, checkpoint), end
    if not signum:
        refresh_batch_norm(run, train_images)
    utils.leave_world()  # now, since the others would not wait for a long evaluation
    if world.is_main and not signum:
        evaluate(run, train_images, test_images, step, folders=flags.evaluate)
        print(f"samples and metrics are in {flags.outf}")
    if lock:
        lock.close()
    return 128 + signum if signum else 0


def launch(processes: int, argv: list[str]) -> int:
    """Runs the command in several processes on this machine, as `torchrun` does."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Seconds to finish a step and write a checkpoint after a signal.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    # The processes say themselves what is wrong.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        torchrun.main(["--standalone", f"--nproc_per_node={processes}", __file__, *argv])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        utils.warn(f"error: process {rank} of {processes} was killed by signal {-failure.exitcode}")
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def main() -> int:
    """Runs the program and shows each error that a user can mend as one line."""
    sys.stdout, sys.stderr = utils.Output(sys.stdout), utils.Output(sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, utils.exit_at_once)
    try:
        return execute(sys.argv[1:])
    except UserError as error:
        message, status = str(error), error.status
    except OSError as error:
        message, status = f"{error.filename or 'a file'}: {error.strerror or error}", 1
    except (MemoryError, RuntimeError) as error:
        signs = ("out of memory", "allocate memory", "ALLOC_FAILED")
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in signs):
            utils.wait_for_torchrun()
            raise
        message, status = "out of memory; try a smaller --batch_size, --nf or --image_size", 1
    if not utils.is_main_process():
        utils.wait_for_torchrun()
    print(f"main.py: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
