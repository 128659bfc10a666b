"""Trains, evaluates and samples Wasserstein auto-encoders (Tolstikhin et al., ICLR 2018,
arXiv 1711.01558).

    python3 main.py --dataroot=data/celebA --cuda --mode=gan --outf=outputs/gan
    python3 main.py --dataroot=data/celebA --cuda --mode=mmd --outf=outputs/mmd
    python3 main.py --outf=outputs/gan --evaluate --cuda
    python3 main.py --outf=outputs/gan --generate=64

The first two train WAE-GAN (Algorithm 1) and WAE-MMD (Algorithm 2); the same command continues a
run that was interrupted. The third writes samples and metrics; the fourth writes samples and needs
no images.

model.py: networks, costs and penalties. utils.py: images, processes, checkpoints, pictures.
"""

import argparse
import importlib.util
import itertools
import math
import os
import sys
import time
import warnings
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed import DistError, is_torchelastic_launched
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import model
import utils
from utils import Data, UsageError, UserError, World

CHECKPOINT = "checkpoint.pth.tar"
LOSSES = ("reconstruction", "penalty", "discriminator")
METRICS = ("test_mse", "test_mmd", "test_w2", "eigenvalue_min", "eigenvalue_max", "noise_variance")
COLUMNS = ("epoch", "step", *LOSSES, "lr", "images_per_s", *METRICS)

# PyTorch 2.13 deprecated this argument of DistributedDataParallel, and warns of it.
warnings.filterwarnings("ignore", message=".*broadcast_buffers")

# What each mode means where nothing else is typed, as in `run.sh`.
RECIPES = {
    "gan": {"LAMBDA": 1.0, "lr": 0.0003, "noise": "add_noise", "e_pretrain": True},
    "mmd": {"LAMBDA": 30.0, "lr": 0.001, "noise": "add_noise", "e_pretrain": True},
    "vae": {"LAMBDA": 0.2, "lr": 0.001, "noise": "gaussian", "e_pretrain": False},
}
PAPER_EPOCHS = 55  # the length of the run that the paper's schedule of learning rates is made for
ADAM_BETAS = (0.5, 0.999)
PRETRAIN_STEPS, PRETRAIN_BATCH = 200, 256  # at most so many steps, of so many images
EVAL_BATCH = 256  # images of 64 pixels that an evaluation encodes or decodes at a time
MIXTURE_CODES = 20_000  # codes of training images that the mixture is fitted to, at most

SHAPES = ("image_size", "channels", "nz", "nf", "arch", "noise")
NETWORK_FLAGS = (*SHAPES, "input_normalize_sym", "pz_scale")
PATHS = ("dataroot", "testroot", "cache_dir")  # flags that a checkpoint keeps as absolute paths
# Flags of a single command or of a machine: a checkpoint does not bring them.
NOT_KEPT = {"checkpoint", "init", "outf", "evaluate", "generate", "density"}
NOT_KEPT |= {"cuda", "gpu_id", "ngpu", "compile", "graph"}
# Flags that a continued run may change. All others define the run.
MAY_CHANGE = NOT_KEPT | {*PATHS, "niter", "amp", "n_samples"}
MAY_CHANGE |= {"print_every", "sample_every", "checkpoint_every", "tensorboard"}
# Flags that an evaluation or --generate may change, too: which images, and which draws.
MAY_CHANGE_IN_USE = MAY_CHANGE | {"dataset", "crop", "n_test", "batch_size", "seed"}


# --------------------------------------------------------------------------------------------------
# Flags


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that shows the default of each flag, unless it is None."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser that raises a mistake as UsageError, without printing its usage."""

    def error(self, message: str) -> None:
        raise UsageError(message)


def number(kind: type, low: float, high: float = 1e9) -> Callable[[str], Any]:
    """An argparse type: a number from `low` to `high`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is no number at all
    return parse


def path(text: str) -> Path:
    """An argparse type: a path, in which ~ is the user's home."""
    return Path(text).expanduser()


def positive_numbers(text: str) -> tuple[float, ...]:
    """An argparse type: numbers above 0, separated by commas."""
    return tuple(map(number(float, 1e-9), text.split(",")))


def get_parser() -> Parser:
    """Every flag, with its meaning, range and default."""
    usage = "python3 main.py [--dataroot=FOLDER] [FLAG ...]"
    parser = Parser(usage=usage, description=__doc__, formatter_class=Help, allow_abbrev=False)
    count, positive = number(int, 1), number(float, 1e-12)
    switch = {"action": BooleanOptionalAction, "default": False}

    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--dataroot", type=path, help="folder of images, as in DATAROOT/sub_directory/XXX.jpg")
    add("--testroot", type=path, help="folder of held-out images, in place of a part of DATAROOT")
    add("--dataset", default="celebA", choices=("celebA", "folder"),
        help="centre crop. celebA: 140 x 140 pixels; folder: the largest square")
    add("--crop", type=count, help="side of the centre crop, in place of that of --dataset")
    add("--image_size", type=int, default=64, choices=model.IMAGE_SIZES,
        help="side of the images that the networks see, in pixels")
    add("--channels", type=int, default=3, choices=(1, 3), help="3: colour; 1: grey")
    add("--n_test", type=count, help="images held out, the last of each folder by path, in "
        "proportion (default: a tenth, at most 19962)")
    add("--batch_size", type=number(int, 2), default=100, help="images of a step, in all processes")
    add("--cache_dir", type=path, help="where to keep decoded images (default: DATAROOT)")

    add = parser.add_argument_group("model").add_argument
    add("--mode", default="gan", choices=RECIPES,
        help="gan: WAE-GAN, Algorithm 1; mmd: WAE-MMD, Algorithm 2; vae: the baseline")
    add("--arch", default="dcgan", choices=("dcgan", "paper"), help="dcgan: 4x4 convolutions; "
        "paper: the networks of its appendix, whose images have a fine checkerboard")
    add("--nz", type=number(int, 1, 1e6), default=64, help="latent dimensions")
    add("--nf", type=number(int, 1, 1e6), default=128,
        help="base width; the widest layers have 8 x NF channels")
    add("--noise", choices=("deterministic", "add_noise", "gaussian"), help="type of encoder; "
        "add_noise: noise on the pixels while training (default: add_noise; vae: gaussian)")
    add("--input_normalize_sym", **switch,
        help="the networks work in [-1, 1] with a tanh, not in [0, 1] with a sigmoid")

    add = parser.add_argument_group("objective").add_argument
    add("--LAMBDA", type=number(float, 0), help="weight of the penalty; vae: a tenth of the "
        "decoder variance, for pixels in [-1, 1] (default: gan 1, mmd 30, vae 0.2)")
    add("--pz_scale", type=number(float, 1e-3, 1e3), default=1.0,
        help="standard deviation of the prior")
    add("--cost", default="l2sq", choices=("l2sq", "l2", "l1"),
        help="l2sq: 0.05 |x-y|^2; l2: 0.2 |x-y|; l1: 0.02 |x-y|_1; summed over pixels and channels")
    add("--mmd", default="exact", choices=("exact", "sampled"),
        help="mmd: the expectation over the prior in closed form, or samples, as in Algorithm 2")
    add("--kernel", default="IMQ", choices=("IMQ", "RBF"), help="mmd: the kernel")
    add("--imq_scales", type=positive_numbers, default=model.IMQ_SCALES, metavar="X,X,...",
        help="mmd: scales of the IMQ kernels that are summed; 1 alone is the paper's")
    add("--quadratic", type=number(float, 0), default=0.3, help="mmd: weight of a quadratic "
        "kernel that is added; it sees directions that the codes do not use")
    add("--nowozin_trick", **switch,
        help="gan: add the prior's log density to the discriminator's logit")

    add = parser.add_argument_group("optimisation").add_argument
    add("--niter", type=count, default=PAPER_EPOCHS, help="epochs")
    add("--lr", type=positive, help="rate of encoder and decoder (default: gan 0.0003, else 0.001)")
    add("--lr_adv", type=positive, help="gan: rate of the discriminator (default: 3 x LR)")
    add("--lr_schedule", default="scaled", choices=("scaled", "paper"), help="scaled: rates fall "
        "to a half and a tenth after 30/55 and 50/55 of the run; paper: after epochs 30 and 50")
    add("--e_pretrain", action=BooleanOptionalAction, help="first train the encoder alone, to "
        "match the moments of its codes to the prior's (default: gan and mmd)")
    add("--init", type=path, help="start a new run from the networks of this checkpoint, "
        "without pretraining")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="random seed")

    add = parser.add_argument_group("output").add_argument
    add("--outf", type=path, help="where to write; a run in it is continued if it has the same "
        "flags (default: outputs, or the folder of --checkpoint)")
    add("--print_every", type=count, default=10, help="steps between rows of log.csv")
    add("--sample_every", type=count, default=1, help="epochs between pictures")
    add("--checkpoint_every", type=number(float, 0), default=60.0,
        help="seconds between checkpoints, at rows of log.csv and at the ends of epochs")
    add("--tensorboard", **switch, help="write log and pictures for TensorBoard, too")

    group = parser.add_argument_group("use of a checkpoint")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--checkpoint", type=path, help="continue, evaluate or sample this one, with its flags")
    either("--evaluate", **switch, help="no training: write images and metrics to OUTF/eval")
    add("--n_samples", type=number(int, 2), default=10000,
        help="samples of prior and mixture in an evaluation")
    either("--generate", type=count, metavar="N",
        help="no training, no images needed: write N samples to OUTF/generated")
    add("--density", default="prior", choices=("prior", "mixture"),
        help="of the samples: the prior, or a mixture fitted to the training codes")

    add = parser.add_argument_group("machine").add_argument
    add("--cuda", **switch, help="use a GPU")
    add("--gpu_id", type=number(int, 0), default=0, help="which one, if there is one process")
    add("--ngpu", type=count, default=1, help="processes, with a GPU each if --cuda")
    add("--amp", **switch, help="run encoder and decoder in bfloat16; all else is float32")
    add("--compile", **switch, help="compile encoder, decoder and the MMD")
    add("--graph", action=BooleanOptionalAction, default=True,
        help="on one GPU, record the training step as a CUDA graph; --no-graph to debug it")
    # fmt: on
    return parser


def parse(argv: list[str]) -> tuple[dict[str, Any], Namespace]:
    """The flags that are typed, and all flags with their defaults.

    A checkpoint may replace defaults in `get_flags`.
    """
    parser = get_parser()
    defaults = vars(parser.parse_args([]))
    untyped = object()
    given = vars(parser.parse_args(argv, Namespace(**dict.fromkeys(defaults, untyped))))
    typed = {name: value for name, value in given.items() if value is not untyped}
    flags = complete(defaults | typed)
    if source(flags).exists():
        return typed, flags  # `get_flags` checks them, with what the checkpoint brings
    if flags.checkpoint or flags.evaluate or flags.generate:
        raise UserError(f"{source(flags)}: no such file")
    # This comes before a folder is made or a process is started.
    return typed, check(flags)


def source(flags: Namespace) -> Path:
    """The checkpoint that a command continues, evaluates or samples."""
    return flags.checkpoint or flags.outf / CHECKPOINT


def complete(given: dict[str, Any]) -> Namespace:
    """The flags, with the defaults that depend on other flags."""
    recipe = RECIPES[given["mode"]]
    flags = Namespace(**{k: recipe.get(k) if v is None else v for k, v in given.items()})
    flags.lr_adv = flags.lr_adv or 3 * flags.lr
    flags.outf = flags.outf or (flags.checkpoint.parent if flags.checkpoint else Path("outputs"))
    return flags


def get_flags(typed: dict[str, Any], flags: Namespace) -> tuple[Namespace, dict[str, Any] | None]:
    """The flags of `parse`, and the checkpoint that they continue or use, if there is one.

    A checkpoint brings the flags of its run. Typing another value for a flag that defines the run
    is an error, whatever the checkpoint is used for.
    """
    if not source(flags).exists():
        return flags, None
    trains = not (flags.evaluate or flags.generate)
    needed = ("epoch", "log", "optimizer_net") if trains else ()
    checkpoint = utils.load_checkpoint(source(flags), "flags", "net", "step", "images", *needed)
    stored = checkpoint["flags"]
    free = MAY_CHANGE if trains else MAY_CHANGE_IN_USE
    if differ := {k: v for k, v in typed.items() if k not in free and v != stored.get(k)}:
        pairs = ", ".join(f"--{k}={v} (checkpoint: {stored.get(k)})" for k, v in differ.items())
        hint = "; use another --outf" if trains and not flags.checkpoint else ""
        raise UsageError(f"{source(flags)} was trained with different flags: {pairs}{hint}")
    brought = {k: v for k, v in stored.items() if k in vars(flags).keys() - NOT_KEPT}
    brought |= {k: Path(stored[k]) for k in PATHS if stored.get(k)}
    if not trains:
        # The images of a typed folder are all scored, and a typed --dataset says how to crop them.
        brought["n_test"] = None
        if "dataroot" in typed:
            brought["testroot"] = None
        if "dataset" in typed:
            brought["crop"] = None
    flags = complete(vars(flags) | brought | typed)
    if flags.evaluate and "testroot" in typed:
        flags.dataroot, flags.testroot = flags.testroot, None
    here = flags.outf / CHECKPOINT
    if trains and here.exists() and not source(flags).samefile(here):
        hint = "leave out --checkpoint if it is this one, or choose another --outf"
        raise UsageError(f"--outf={flags.outf} holds a run; {hint}")
    return check(flags), checkpoint


def check(flags: Namespace) -> Namespace:
    """The flags. Raises UsageError where they contradict each other or this machine."""
    trains = not (flags.evaluate or flags.generate)
    if flags.dataroot is None and not flags.generate:
        raise UsageError("--dataroot is required: the folder with the folders of images")
    for name in ("dataroot", "testroot"):
        root = getattr(flags, name)
        if root is None or flags.generate:
            continue
        # Otherwise pictures would become training images, or an evaluation would overwrite the
        # images that it reads.
        inside = flags.outf.resolve().is_relative_to(root.resolve())
        if inside or root.resolve().is_relative_to(flags.outf.resolve() / "eval"):
            pair = f"--outf={flags.outf} and --{name}={root}"
            raise UsageError(f"{pair}: one is inside the other; choose another --outf")
    if flags.mode == "vae" and flags.noise != "gaussian":
        raise UsageError(f"--noise={flags.noise}: --mode=vae needs --noise=gaussian")
    if flags.nowozin_trick and flags.mode != "gan":
        raise UsageError("--nowozin_trick is for --mode=gan: there is no discriminator otherwise")
    if flags.tensorboard and trains and importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard: it is not installed; pip install tensorboard")
    if flags.cuda and flags.ngpu > max(1, torch.cuda.device_count()):
        raise UsageError(f"--ngpu={flags.ngpu}: there are {torch.cuda.device_count()} GPUs here")
    size = int(os.environ["WORLD_SIZE"]) if is_torchelastic_launched() else flags.ngpu
    if is_torchelastic_launched() and size > 1 and not trains:
        raise UsageError("--evaluate and --generate run in one process: leave out torchrun")
    if trains and (flags.batch_size % size or flags.batch_size < 2 * size):
        raise UsageError(f"--batch_size={flags.batch_size} cannot be shared by {size} processes")
    return flags


# --------------------------------------------------------------------------------------------------
# A run


def build_network(flags: Namespace, amp: bool = False) -> model.AutoEncoder:
    """The auto-encoder that the flags describe."""
    return model.AutoEncoder(**{name: getattr(flags, name) for name in NETWORK_FLAGS}, amp=amp)


class Run:
    """What a checkpoint keeps: networks, optimisers, and how far the training is."""

    def __init__(self, flags: Namespace, world: World):
        self.flags, self.world = flags, world
        self.step = 0  # steps that are done
        self.epoch = 0  # epochs that are done, with their metrics
        self.log = utils.Log(COLUMNS)
        # The mixture is fitted to training codes after the last epoch. `nats_of_prior` is what a
        # mixture scores that is fitted to as many prior samples.
        self.mixture: dict[str, Tensor] | None = None
        self.nats_of_prior = math.nan

        amp = flags.amp and utils.has_bfloat16(world.device)
        if flags.amp and not amp:
            utils.warn("--amp: without bfloat16 instructions, float32 is faster, and is used")
        utils.set_seed(flags.seed, "weights")
        self.net = build_network(flags, amp)
        self.discriminator: model.Discriminator | None = None
        self.networks: dict[str, nn.Module] = {"net": self.net}
        if flags.mode == "gan":
            scale = flags.pz_scale if flags.nowozin_trick else None
            self.discriminator = model.Discriminator(flags.nz, prior_scale=scale)
            self.networks["discriminator"] = self.discriminator
        if flags.cuda and world.size > 1:
            nn.SyncBatchNorm.convert_sync_batchnorm(self.net)
        # Channels last is how images lie in memory, and the faster layout for convolutions.
        for network in self.networks.values():
            network.to(world.device, memory_format=torch.channels_last)
        self.rates = {"net": flags.lr, "discriminator": flags.lr_adv}
        self.optimizers = {k: self.adam(part, self.rates[k]) for k, part in self.networks.items()}
        self.rate_factor = 1.0
        # How many images are encoded or decoded at a time: fewer large ones, in the same memory.
        self.eval_batch = EVAL_BATCH * 64**2 // flags.image_size**2

    def adam(self, network: nn.Module, lr: float) -> torch.optim.Adam:
        """The optimiser of the paper, for the weights of a network.

        Its rate is a tensor on the device, from which a recorded step reads it.
        """
        device = self.world.device
        rate = torch.tensor(lr, device=device)
        how = {"betas": ADAM_BETAS, "fused": True, "capturable": device.type == "cuda"}
        return torch.optim.Adam(network.parameters(), lr=rate, **how)

    def set_learning_rates(self, factor: float) -> None:
        """Sets the rates to `factor` times their flags."""
        if factor == self.rate_factor:
            return
        self.rate_factor = factor
        for name, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"].fill_(self.rates[name] * factor)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        state = {"step": self.step, "epoch": self.epoch, "log": self.log.text}
        state |= {"mixture": self.mixture, "nats_of_prior": self.nats_of_prior}
        state |= {name: network.state_dict() for name, network in self.networks.items()}
        moments = {k: adam.state_dict()["state"] for k, adam in self.optimizers.items()}
        return state | {f"optimizer_{name}": value for name, value in moments.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies what a checkpoint keeps; it may have no optimisers, if it is not trained on."""
        self.step, self.epoch = state["step"], state.get("epoch", 0)
        self.log.text = state.get("log", self.log.text)
        if mixture := state.get("mixture"):
            self.mixture = {k: v.double().to(self.world.device) for k, v in mixture.items()}
            self.nats_of_prior = state["nats_of_prior"]
        self.load_networks(state)
        for name, adam in self.optimizers.items():
            if moments := state.get(f"optimizer_{name}"):
                # The rates stay: they are tensors on this device.
                groups = adam.state_dict()["param_groups"]
                adam.load_state_dict({"state": moments, "param_groups": groups})

    def load_networks(self, state: dict[str, Any]) -> None:
        """Copies the weights of a checkpoint. Raises UserError if they do not fit."""
        for name in self.networks.keys() & state.keys():
            try:
                self.networks[name].load_state_dict(state[name])
            except RuntimeError as error:
                shape = " ".join(f"--{flag}={state['flags'].get(flag)}" for flag in SHAPES)
                message = f"the checkpoint's {name} does not fit; it is of a run with {shape}"
                raise UserError(message) from error


# --------------------------------------------------------------------------------------------------
# One step


class Step:
    """One step of Algorithm 1 (gan) or 2 (mmd) of the paper, or of a VAE."""

    def __init__(self, run: Run):
        self.run = run
        flags, world = run.flags, run.world
        self.kernel = model.Kernel(
            flags.nz, flags.pz_scale, flags.kernel, flags.imq_scales, flags.quadratic, world.device
        )
        # Several processes and the compiler wrap these; `run` keeps the networks themselves.
        self.net, self.discriminator = run.net, run.discriminator
        self.mmd = model.exact_mmd if flags.mmd == "exact" else model.sampled_mmd
        if world.size > 1:
            wrap = partial(DistributedDataParallel, broadcast_buffers=False)  # averages gradients
            self.net = wrap(run.net)
            if run.discriminator:
                self.discriminator = wrap(run.discriminator)
        if flags.compile:
            self.net, self.mmd = torch.compile(self.net), torch.compile(self.mmd)

    def __call__(self, batch: Tensor, prior: Tensor) -> Tensor:
        """Trains all networks on a batch.

        Args:
            batch: this process's images x_1 ... x_n, uint8 (n, S, S, C).
            prior: samples z_1 ... z_N of the prior for the batch of all processes, (N, nz).

        Returns:
            Reconstruction cost, penalty and the discriminator's loss, (3,).
        """
        run, flags, world = self.run, self.run.flags, self.run.world
        x = utils.from_uint8(batch)
        # z~_i from Q(Z|x_i): the one encoding that all of the step shares.
        y, codes, mean, log_variance = self.net(x)
        loss_d = torch.zeros((), device=x.device)

        if flags.mode == "gan":
            # Algorithm 1: update D by ascending LAMBDA/n sum_i log D(z_i) + log(1 - D(z~_i)) ...
            z = prior.chunk(world.size)[world.rank]
            logits_prior, logits_codes = self.discriminator(torch.cat([z, codes.detach()])).chunk(2)
            loss_d = model.discriminator_loss(logits_prior, logits_codes)
            run.optimizers["discriminator"].zero_grad()
            (flags.LAMBDA * loss_d).backward()
            run.optimizers["discriminator"].step()
            # ... and Q and G by descending 1/n sum_i c(x_i, G(z~_i)) - LAMBDA log D(z~_i).
            # The plain discriminator: it gets no gradient that processes would have to average.
            penalty = model.gan_penalty(run.discriminator, codes)
        elif flags.mode == "mmd":
            # Algorithm 2: update Q and G by descending
            # 1/n sum_i c(x_i, G(z~_i)) + LAMBDA MMD^2(z, z~),
            # where the expectation over z replaces the samples z_i unless --mmd=sampled.
            all_codes = utils.Gather.apply(codes) if world.size > 1 else codes
            samples = (prior,) if flags.mmd == "sampled" else ()
            penalty = self.mmd(all_codes, self.kernel, *samples)
        else:
            # VAE: update Q and G by descending
            # 1/n sum_i c(x_i, G(z~_i)) + LAMBDA KL(Q(Z|x_i) || P_Z).
            penalty = model.kl_divergence(mean, log_variance, flags.pz_scale)

        cost = model.reconstruction_cost(x, y, flags.cost)
        run.optimizers["net"].zero_grad()
        (cost + flags.LAMBDA * penalty).backward()
        run.optimizers["net"].step()
        return torch.stack([cost, penalty, loss_d]).detach()


def pretrain_encoder(run: Run, data: Data) -> None:
    """Trains the encoder alone until its codes have the prior's mean and covariance.

    It stops when the loss is what the same number of prior samples would score, or after
    `PRETRAIN_STEPS`.
    """
    flags = run.flags
    optimizer = run.adam(run.net.encoder, flags.lr)
    rng = np.random.default_rng([flags.seed, 2**32])  # epochs are [seed, epoch]
    rows = (rng.integers(len(data.train), size=PRETRAIN_BATCH) for _ in range(PRETRAIN_STEPS))
    batches = utils.batches(data.images, (data.train[i] for i in rows), run.world.device)
    target = model.pretrain_floor(PRETRAIN_BATCH, flags.nz, flags.pz_scale)
    utils.say(f"pretraining the encoder: up to {PRETRAIN_STEPS} steps of {PRETRAIN_BATCH} images")
    run.net.train()
    with utils.progress("pretraining", PRETRAIN_STEPS) as bar:
        for step, batch in enumerate(batches):
            utils.set_seed(flags.seed, "pretrain", step)
            codes = run.net.encode(utils.from_uint8(batch))
            loss = model.pretrain_loss(codes, flags.pz_scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update()
            if step % 10 == 9:
                # The mean over processes, so that all of them stop together.
                value = utils.average(loss.detach(), run.world).item()
                bar.set_postfix(loss=f"{value:.3g}", target=f"{target:.3g}")
                if value <= target:
                    break


# --------------------------------------------------------------------------------------------------
# Training


def learning_rate_factor(step: int, per_epoch: int, flags: Namespace) -> float:
    """What the rates are multiplied by at a step, counted from 0 (the paper's appendix)."""
    if flags.lr_schedule == "scaled":
        epoch = PAPER_EPOCHS * step / (flags.niter * per_epoch)  # where the paper's run would be
    else:
        epoch = step // per_epoch
    return 1.0 if epoch < 30 else 0.5 if epoch < 50 else 0.1 if epoch < 100 else 0.01


def batch_rows(train: np.ndarray, steps: range, flags: Namespace, world: World) -> Iterator:
    """The rows of this process's images in each step, a function of seed and step.

    An epoch leaves out the images of its permutation that do not fill a batch.
    """
    per_epoch = len(train) // flags.batch_size
    for step in steps:
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == steps.start:
            order = train[utils.epoch_order(len(train), flags.seed, epoch)]
        batch = order[i * flags.batch_size : (i + 1) * flags.batch_size]
        yield batch.reshape(world.size, -1)[world.rank]


def train(run: Run, data: Data) -> int:
    """Trains to the last epoch. Returns 0, or the signal that ended it after some step."""
    flags, world = run.flags, run.world
    per_epoch = len(data.train) // flags.batch_size
    last = flags.niter * per_epoch
    if run.step > last:
        raise UsageError(f"--niter={flags.niter}: the run is at step {run.step} already, of {last}")
    if world.rank == 0:
        start_log(run, data)
    weights = sum(weight.numel() for weight in run.net.parameters())
    size = f"{weights:,} weights; {world.size} x {world.device.type}; {per_epoch} steps an epoch"
    utils.say(f"{utils.count_images(data)}; {size}")
    if run.step:
        utils.warn(f"continuing the run in {flags.outf} from step {run.step} of {last}")
    elif flags.e_pretrain and not flags.init:
        pretrain_encoder(run, data)

    rows = batch_rows(data.train, range(run.step, last), flags, world)
    shape = (flags.batch_size // world.size, *data.images.shape[1:])
    # A recorded step reads its inputs always from the same tensors.
    batch = torch.empty(shape, dtype=torch.uint8, device=world.device)
    prior = torch.empty(flags.batch_size, flags.nz, device=world.device)
    batches = utils.batches(data.images, rows, world.device, out=batch)
    step = partial(Step(run), batch, prior)
    if flags.graph and flags.cuda and world.size == 1:
        step = utils.Recorded(step)
    saved = time.perf_counter()
    stop = utils.Stop()

    def save_or_stop(due: bool) -> int:
        """Saves if it is due, and if any process got a signal. Returns the signal, or 0."""
        nonlocal saved
        signum = stop.agreed(world)
        due = due and time.perf_counter() - saved >= flags.checkpoint_every
        if world.rank == 0 and (signum or due or run.epoch == flags.niter):
            save(run, data)
            saved = time.perf_counter()
        if signum:
            utils.warn(f"stopped after step {run.step} of {last}; the same command continues")
        return signum

    with utils.progress("", last, initial=run.step, unit="step") as bar, stop:
        while run.epoch < flags.niter:
            run.net.train()
            begun, first = time.perf_counter(), run.step
            for _ in itertools.islice(batches, (run.epoch + 1) * per_epoch - first):  # into `batch`
                # One step. Every draw is a function of seed and step: no generator state to resume.
                run.set_learning_rates(learning_rate_factor(run.step, per_epoch, flags))
                utils.set_seed(flags.seed, "prior", run.step)  # alike in all processes
                prior.normal_(std=flags.pz_scale)
                utils.set_seed(flags.seed, "noise", run.step, world.rank)  # unlike in each
                losses = step()
                run.step += 1
                bar.update()

                # Log, save, and stop if asked to. Several processes agree at rows only, since they
                # wait for each other there.
                row = run.step % flags.print_every == 0
                if row:
                    log_losses(run, bar, losses, first, begun)
                if (row or world.size == 1) and (signum := save_or_stop(due=row)):
                    return signum

            # End of an epoch. Save last: on resume, all that was written before is trusted.
            seconds = (time.perf_counter() - begun) / max(1, run.step - first)  # a step
            run.net.eval()
            run.epoch += 1
            if world.rank == 0:
                end_epoch(run, data, flags.batch_size / seconds, seconds * (last - run.step))
            if signum := save_or_stop(due=True):
                return signum
    utils.leave_world()  # all together; what follows is for rank 0 alone
    if world.rank == 0:
        finish(run, data)
    return 0


def start_log(run: Run, data: Data) -> None:
    """Writes the flags of the run, a picture of training images, and the log so far."""
    flags = run.flags
    stored = {k: str(v) if isinstance(v, Path) else v for k, v in vars(flags).items()}
    utils.write_json(flags.outf / "args.json", stored)
    if run.step == 0:  # another run may have left them here
        for name in ("metrics.json", "codes.png"):
            (flags.outf / name).unlink(missing_ok=True)
    run.mixture = None  # one that an earlier last epoch left does not fit the codes to come
    rows = data.train[utils.epoch_order(len(data.train), flags.seed, 0)[:64]]
    sample = utils.from_uint8(next(utils.batches(data.images, [rows], run.world.device)))
    utils.save_picture(flags.outf / "real_samples.png", utils.grid(sample, columns=8))
    run.log.open(flags.outf, run.step, flags.tensorboard)


def log_losses(run: Run, bar: tqdm, losses: Tensor, first: int, begun: float) -> None:
    """Writes a row of the losses (3,) of the last step. Raises UserError if one is not finite.

    A mean over the steps since the last row would differ after a resume. The speed is the mean
    since the time `begun`, when `first` steps were done.
    """
    used = LOSSES if run.discriminator else LOSSES[:2]
    values = dict(zip(used, utils.average(losses, run.world).tolist(), strict=False))
    for name, value in values.items():
        if not math.isfinite(value):
            raise diverged(run, f"{name} is {value}")
    if run.world.rank == 0:
        lr = run.flags.lr * run.rate_factor
        speed = (run.step - first) * run.flags.batch_size / (time.perf_counter() - begun)
        row = {"epoch": run.epoch + 1, "step": run.step, "lr": lr, "images_per_s": round(speed, 1)}
        run.log.add(**row, **values)
        bar.set_description(f"epoch {run.epoch + 1}/{run.flags.niter}", refresh=False)
        bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)


def diverged(run: Run, what: str) -> UserError:
    """The error for numbers that are not finite."""
    hint = "try a lower --lr in another --outf; a checkpoint written before is intact"
    return UserError(f"{what} at step {run.step}; {hint}")


def end_epoch(run: Run, data: Data, speed: float, seconds_left: float) -> None:
    """Logs the metrics of an epoch, and draws its pictures."""
    metrics, _, _ = held_out_metrics(run, data)
    metrics = {name: metrics[name] for name in METRICS if name in metrics}
    run.log.add(epoch=run.epoch, step=run.step, **metrics)
    figures = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    left = timedelta(seconds=round(seconds_left))
    epochs = f"epoch {run.epoch}/{run.flags.niter}"
    utils.say(f"{epochs}: {figures}; {speed:,.0f} images/s, {left} left")
    if run.epoch % run.flags.sample_every == 0 or run.epoch == run.flags.niter:
        for name, picture in sample_grids(run, data).items():
            utils.save_picture(run.flags.outf / f"{name}_epoch_{run.epoch:03d}.png", picture)
            run.log.add_picture(name, picture, run.step)


def save(run: Run, data: Data) -> None:
    """Writes all that is needed to continue. Raises UserError if a weight is not finite."""
    for network in run.networks.values():
        if not all(t.isfinite().all() for t in network.state_dict().values()):
            raise diverged(run, "weights are not finite")
    run.log.flush()
    flags = {k: v for k, v in vars(run.flags).items() if k not in NOT_KEPT}
    for name in PATHS:  # a run may continue from another folder
        flags[name] = flags[name] and str(flags[name].resolve())
    state = run.state_dict() | {"flags": flags, "images": data.digest}
    utils.save_checkpoint(run.flags.outf / CHECKPOINT, state)


def finish(run: Run, data: Data) -> None:
    """Fits the mixture to the training codes, and writes the metrics of the finished run."""
    fit_mixture(run, data)
    metrics, codes, _ = held_out_metrics(run, data)
    write_metrics(run, run.flags.outf, metrics, codes)
    save(run, data)
    utils.say(f"pictures and metrics are in {run.flags.outf}; --evaluate writes samples")


# --------------------------------------------------------------------------------------------------
# Evaluation


def in_parts(run: Run, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), computed on `run.eval_batch` rows at a time."""
    return torch.cat([function(part) for part in x.split(run.eval_batch)])


def images_in_order(run: Run, data: Data, rows: np.ndarray) -> Iterator[Tensor]:
    """Seeds a Gaussian encoder's draws, and returns batches (n, C, S, S) of these rows' images."""
    utils.set_seed(run.flags.seed, "encode")
    parts = np.split(rows, range(run.eval_batch, len(rows), run.eval_batch))
    return map(utils.from_uint8, utils.batches(data.images, parts, run.world.device))


@torch.no_grad()
def held_out_metrics(run: Run, data: Data) -> tuple[dict[str, float], Tensor, Tensor]:
    """Metrics of held-out images, their codes (N, nz), and the squared error of each (N,).

    The README explains the metrics. A single image has test_mse alone.
    """
    errors, codes, variances = [], [], []
    for x in images_in_order(run, data, data.test):
        y, code, _, log_variance = run.net(x)
        errors.append((y - x).square().mean((1, 2, 3)))
        codes.append(code)
        if log_variance is not None:
            variances.append(log_variance.exp().mean(1))
    codes, errors = torch.cat(codes), torch.cat(errors)
    if not codes.isfinite().all():
        raise diverged(run, "the codes are not finite")
    metrics = {"test_mse": errors.mean().item()}
    if variances:
        metrics["noise_variance"] = torch.cat(variances).mean().item()
    if len(codes) > 1:
        metrics |= model.code_metrics(codes, run.flags.pz_scale)
    if run.mixture:
        nats = model.nats_from_prior(codes, model.mixture(**run.mixture), run.flags.pz_scale)
        metrics |= {"test_nats": nats.item(), "test_nats_of_prior": run.nats_of_prior}
    return metrics, codes, errors


@torch.no_grad()
def fit_mixture(run: Run, data: Data) -> None:
    """Fits the run's mixture to codes of training images, and another to as many prior samples.

    Of the second, only what it scores on new prior samples is kept.
    """
    pz_scale = run.flags.pz_scale
    rows = data.train[:MIXTURE_CODES]
    codes = torch.cat([run.net.encode(x) for x in images_in_order(run, data, rows)])
    utils.set_seed(run.flags.seed, "mixture")
    run.mixture = model.fit_mixture(codes, pz_scale)
    samples, others = (run.net.sample_prior(len(codes)) for _ in range(2))
    density = model.mixture(**model.fit_mixture(samples, pz_scale))
    run.nats_of_prior = model.nats_from_prior(others, density, pz_scale).item()


def write_metrics(run: Run, folder: Path, metrics: dict[str, float], codes: Tensor) -> None:
    """Writes metrics.json and, of two codes (N, nz) or more, codes.png; prints the metrics."""
    if len(codes) > 1:
        utils.save_picture(folder / "codes.png", plot_codes(run, codes))
    counts = {"step": run.step, "n_test": len(codes)}
    utils.write_json(folder / "metrics.json", counts | metrics)
    for name, value in metrics.items():
        utils.say(f"{name:>28}  {value:.5g}")


@torch.no_grad()
def sample_grids(run: Run, data: Data) -> dict[str, Image.Image]:
    """Pictures of samples (always of the same codes), reconstructions and interpolations."""
    utils.set_seed(run.flags.seed, "pictures")
    samples = in_parts(run, run.net.decode, run.net.sample_prior(64))
    rows = data.test[np.linspace(0, len(data.test) - 1, 32).astype(int)]
    x = utils.from_uint8(next(utils.batches(data.images, [rows], run.world.device)))
    codes = in_parts(run, run.net.encode, x)
    y = in_parts(run, run.net.decode, codes)
    pairs = torch.stack([images.unflatten(0, (-1, 8)) for images in (x, y)], 1)
    starts, ends = codes[:8, None], codes[-8:, None]  # (8, 1, nz) each
    t = torch.linspace(0, 1, 10, device=codes.device)[:, None]
    paths = in_parts(run, run.net.decode, (starts + t * (ends - starts)).flatten(0, 1))
    return {
        "fake_samples": utils.grid(samples, columns=8),
        "reconstructions": utils.grid(pairs.flatten(0, 2), columns=8),
        "interpolations": utils.grid(paths, columns=10),
    }


def plot_codes(run: Run, codes: Tensor) -> Image.Image:
    """Codes (N, nz) and prior samples in the plane of the covariance's extreme eigenvectors."""
    _, vectors = model.covariance_eigenvalues(codes)
    plane = vectors[:, [0, -1]].float()
    utils.set_seed(run.flags.seed, "plot")
    clouds = (run.net.sample_prior(min(len(codes), 2000)), codes[:2000])
    return utils.scatter(*((cloud @ plane).cpu().numpy() for cloud in clouds))


@torch.no_grad()
def sample_images(run: Run, density: str, n: int) -> Iterator[Tensor]:
    """n decoded samples of the prior or the mixture, in batches."""
    mixture = model.mixture(**run.mixture) if density == "mixture" else None
    utils.set_seed(run.flags.seed, "samples", density)
    for first in range(0, n, run.eval_batch):
        m = min(n - first, run.eval_batch)
        codes = mixture.sample((m,)).float() if mixture else run.net.sample_prior(m)
        yield run.net.decode(codes)


@torch.no_grad()
def evaluate(run: Run, data: Data, folder: Path) -> None:
    """Writes images, codes and metrics to the folder."""
    metrics, codes, errors = held_out_metrics(run, data)
    sets = {
        "real": images_in_order(run, data, data.test),
        "reconstructions": map(run.net.decode, codes.split(run.eval_batch)),
    }
    for density in ("prior", "mixture") if run.mixture else ("prior",):
        sets[f"samples_{density}"] = sample_images(run, density, run.flags.n_samples)
    for name, batches in sets.items():
        sharp = [model.sharpness(x) for x in utils.write_images(folder / name, batches)]
        metrics[f"sharpness_{name}"] = torch.cat(sharp).mean().item()
    with utils.atomic_write(folder / "codes.npy") as file:
        np.save(file, codes.cpu().numpy())
    paths = [data.names[row] for row in data.test]
    rows = zip(paths, errors.tolist(), strict=True)
    utils.write_csv(folder / "images.csv", ("path", "squared_error"), rows)
    write_metrics(run, folder, metrics, codes)
    utils.say(f"images, codes and metrics are in {folder}")


def generate(run: Run, folder: Path) -> None:
    """Writes --generate samples to the folder, and a picture of the first ones."""
    flags = run.flags
    if flags.density == "mixture" and not run.mixture:
        raise UserError("--density=mixture: it is fitted after the last epoch of a run")
    first: list[Tensor] = []
    for batch in utils.write_images(folder, sample_images(run, flags.density, flags.generate)):
        first = [*first, *batch][:64]
    picture = flags.outf / "generated.png"
    utils.save_picture(picture, utils.grid(torch.stack(first), columns=8))
    utils.say(f"{flags.generate} images are in {folder}, and the first of them in {picture}")


def load_network(path: Path | str) -> model.AutoEncoder:
    """The network of a checkpoint, on the CPU and ready to use."""
    checkpoint = utils.load_checkpoint(Path(path), "flags", "net")
    network = build_network(Namespace(**checkpoint["flags"]))
    network.load_state_dict(checkpoint["net"])
    return network.eval()


# --------------------------------------------------------------------------------------------------
# The program


def load_data(flags: Namespace, checkpoint: dict[str, Any] | None, world: World) -> Data:
    """The images of --dataroot and --testroot; on the GPU if they fit.

    An evaluation sees the held-out images of the run, or all images of another folder.
    """
    crop = flags.crop or (utils.CELEBA_CROP if flags.dataset == "celebA" else None)
    how = (flags.image_size, crop, flags.channels, flags.cache_dir)
    data = utils.load_images(flags.dataroot, flags.testroot, *how)
    own = checkpoint is None or checkpoint["images"] == data.digest
    if own and not flags.testroot:
        n_test = checkpoint["flags"]["n_test"] if checkpoint else flags.n_test
        data = utils.hold_out(data, n_test)
    if flags.evaluate:
        if not own:
            utils.warn(f"not the images of the run: all of {flags.dataroot} are scored")
            data = data._replace(test=np.arange(len(data.names)))
        n_test = min(len(data.test), flags.n_test or len(data.test))
        test = data.test[np.linspace(0, len(data.test) - 1, n_test).astype(int)]
        return data._replace(test=test)
    if not own:
        hint = "bring those back, or start again in another --outf"
        raise UserError(f"{flags.dataroot}: not the images that the run was trained on; {hint}")
    if len(data.train) < flags.batch_size or len(data.test) == 0:
        counts = f"{len(data.train)} images to train on and {len(data.test)} held out"
        raise UsageError(f"--batch_size={flags.batch_size}: {counts} are too few")
    if not flags.testroot:
        utils.warn_of_folders(flags.dataroot, data.names)
    return data._replace(images=utils.put_on_device(data.images, world.device))


def execute(argv: list[str]) -> int:
    """Does what the command line asks. Returns the exit status. Raises UserError."""
    typed, flags = parse(argv)
    trains = not (flags.evaluate or flags.generate)
    if trains and flags.ngpu > 1 and not is_torchelastic_launched():
        launch(flags.ngpu, argv)
    world = utils.join_world(flags.cuda, flags.gpu_id)
    folder = flags.outf
    if flags.evaluate:
        folder /= "eval"
    elif flags.generate:
        folder /= "generated"
    # A CUDA graph is recorded on another stream than the default one. All work is on that stream,
    # so that memory that is free in one part of the program can be used by the others.
    stream = torch.cuda.stream(torch.cuda.Stream()) if flags.cuda else nullcontext()
    with stream, utils.lock(folder) if world.rank == 0 else nullcontext():
        flags, checkpoint = get_flags(typed, flags)
        run = Run(flags, world)
        if checkpoint:
            run.load_state_dict(checkpoint)
        elif flags.init:
            run.load_networks(utils.load_checkpoint(flags.init, "flags", "net"))
        run.net.eval()
        # Training batches have one shape, so that the search for fast convolutions pays.
        torch.backends.cudnn.benchmark = True
        signum = 0
        if flags.generate:
            generate(run, folder)
        elif flags.evaluate:
            evaluate(run, load_data(flags, checkpoint, world), folder)
        elif run.epoch >= flags.niter and run.mixture:
            utils.say(f"the run in {flags.outf} is complete; a larger --niter continues it")
        else:
            signum = train(run, load_data(flags, checkpoint, world))
        utils.leave_world()
        return 128 + signum if signum else 0


def launch(processes: int, argv: list[str]) -> None:
    """Becomes `torchrun` with so many processes of this command on this machine."""
    # After a signal, a process has this long to end its step and to write a checkpoint.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    names = ",".join(number.name for number in utils.Stop.SIGNALS)
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", names)  # --signals-to-handle of torchrun
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
    command += [f"--nproc_per_node={processes}", os.path.abspath(__file__), *argv]
    os.execv(sys.executable, command)


def main() -> int:
    """Runs the program and shows each error that a user can fix as one line."""
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # of file names that it cannot write
    try:
        return execute(sys.argv[1:])
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except Exception as error:
        message, status = one_line(error), getattr(error, "status", 1)
        if not message:
            raise
    print(f"main.py: error: {message}", file=sys.stderr)
    return status


def one_line(error: Exception) -> str:
    """What a user can do about an error; empty if it is a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return utils.printable(str(error))
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    # The last is what cuDNN's search says when no algorithm finds the memory that it needs.
    signs = ("out of memory", "allocate memory", "ALLOC_FAILED", "unable to find an engine")
    if isinstance(error, MemoryError) or any(sign in text for sign in signs):
        hint = "try --no-graph, --no-e_pretrain, or a smaller --batch_size, --nf or --image_size"
        return f"out of memory; {hint}"
    if "CUDA error" in text:
        return utils.first_line(error)
    if isinstance(error, DistError) or "gloo/transport" in text:
        return f"another process has ended or cannot be reached: {utils.first_line(error)}"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile does not work here, leave it out: {text[:300]}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
