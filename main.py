"""Trains, evaluates and samples Wasserstein auto-encoders (Tolstikhin et al., ICLR 2018,
arXiv 1711.01558).

    python3 main.py --dataroot=data/celebA --cuda --mode=gan --e_pretrain --outf=gan_outputs
    python3 main.py --dataroot=data/celebA --cuda --mode=mmd --e_pretrain --outf=mmd_outputs \\
        --lr=0.001 --LAMBDA=30 --quadratic=0.3
    python3 main.py --outf=gan_outputs --evaluate --cuda
    python3 main.py --outf=gan_outputs --generate=64

The first two train WAE-GAN (Algorithm 1) and WAE-MMD (Algorithm 2); the same command continues a
run that was interrupted. The third writes samples and metrics; the fourth writes samples and needs
no images.

model.py: networks, costs and penalties. utils.py: images, processes, checkpoints, pictures.
"""

import argparse
import importlib.util
import json
import logging
import math
import os
import signal
import sys
import time
from argparse import BooleanOptionalAction
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed import DistError, is_torchelastic_launched
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import model
import utils
from utils import Images, UsageError, UserError, World

CHECKPOINT, BEST, METRICS_FILE = "checkpoint.pth.tar", "model_best.pth.tar", "metrics.json"
DENSITIES = "densities.pth.tar"
LOSSES = ("reconstruction", "penalty", "discriminator")
METRICS = ("test_mse", "test_mmd", "test_w2", "eigenvalue_min", "eigenvalue_max", "noise_variance")
COLUMNS = ("epoch", "step", *LOSSES, "lr", "images_per_s", *METRICS)

PAPER_EPOCHS = 55  # the length of run that the paper's schedule of learning rates is made for
BATCH_NORM_BATCHES = 100  # that batch norm is re-estimated from at an epoch's end
N_MIXTURE = 10  # Gaussians in the mixture that is fitted to the codes (Ghosh et al., ICLR 2020)
GPU_BATCH = 1024  # images of 64 pixels that a GPU encodes or decodes at a time in an evaluation
LOST = "another process has ended or cannot be reached"
DIVERGED_HINT = "try a lower --lr in another --outf; a checkpoint written before is intact"

MODE_DEFAULTS = {
    "gan": {"LAMBDA": 1.0, "noise": "add_noise"},
    "mmd": {"LAMBDA": 100.0, "noise": "add_noise"},
    "vae": {"LAMBDA": 0.2, "noise": "gaussian"},
}

# Flags of a single command or of a machine: a checkpoint does not bring them.
NOT_KEPT = {"checkpoint", "outf", "evaluate", "fid", "generate", "density"}
NOT_KEPT |= {"cuda", "gpu_id", "ngpu", "workers", "compile", "graph"}
# Flags that a continued run may change. All others define the run.
MAY_CHANGE = NOT_KEPT | {"dataroot", "cache_dir", "niter", "amp", "n_samples"}
MAY_CHANGE |= {"print_every", "sample_every", "checkpoint_every", "tensorboard"}


# --------------------------------------------------------------------------------------------------
# Flags


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message: str) -> None:
        raise UsageError(message)


def number(kind: type, low: float, high: float = 1e9, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: a number from `low` on, or above it, up to `high`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high or (above and value == low):
            bounds = f"{'more than' if above else 'at least'} {low:g} and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is no number at all
    return parse


def path(text: str) -> Path:
    """An argparse type: a path, which is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return Path(text).expanduser()


def positive_numbers(text: str) -> tuple[float, ...]:
    """An argparse type: numbers above 0, separated by commas."""
    return tuple(number(float, 0, above=True)(part) for part in text.split(","))


def get_parser() -> argparse.ArgumentParser:
    """Every flag, with its meaning, range and default."""
    parser = Parser(
        "main.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    count, width, positive = number(int, 1), number(int, 1, 1e6), number(float, 0, above=True)
    switch = {"action": BooleanOptionalAction, "default": False}

    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--dataroot", type=path, help="image folder, laid out as DATAROOT/sub_directory/XXX.jpg")
    add("--dataset", default="celebA", choices=("celebA", "folder"), help="centre crop. celebA: "
        "140 x 140 pixels; folder: the largest square (default: celebA)")
    add("--crop", type=count, help="side of the centre crop, in place of that of --dataset")
    add("--image_size", type=int, default=64, choices=model.IMAGE_SIZES,
        help="side of the images that the networks see, in pixels (default: 64)")
    add("--channels", type=int, default=3, choices=(1, 3),
        help="3: colour; 1: grey; the cost is a sum over channels (default: 3)")
    add("--n_test", type=count,
        help="images held out, the last by path (default: a tenth, at most 19962)")
    add("--batch_size", type=number(int, 2), default=100,
        help="images in a step, over all processes; 2 or more (default: 100)")
    add("--cache_dir", type=path, help="where to keep the decoded images (default: a hidden file "
        "in DATAROOT or, if that cannot be written, in the user's cache folder)")

    add = parser.add_argument_group("model").add_argument
    add("--mode", default="gan", choices=MODE_DEFAULTS, help="gan: WAE-GAN, Algorithm 1; "
        "mmd: WAE-MMD, Algorithm 2; vae: the baseline (default: gan)")
    add("--arch", default="dcgan", choices=("dcgan", "paper"),
        help="dcgan: 4x4 convolutions; paper: the networks of its appendix (default: dcgan)")
    add("--nz", type=width, default=64, help="latent dimensions (default: 64)")
    add("--nf", type=width, default=128,
        help="base width; the widest layers have 8 x NF channels (default: 128)")
    add("--noise", choices=("deterministic", "add_noise", "gaussian"),
        help="type of encoder: deterministic; add_noise: noise on the pixels while training; "
        "gaussian: a Gaussian code (default: add_noise, and gaussian for vae)")
    add("--input_normalize_sym", **switch,
        help="the networks work in [-1, 1] with a tanh, not in [0, 1] with a sigmoid")

    add = parser.add_argument_group("objective").add_argument
    add("--LAMBDA", type=number(float, 0), help="weight of the penalty; for vae, decoder variance "
        "/ 10, for pixels in [-1, 1] (default: 1 for gan, 100 for mmd, 0.2 for vae)")
    add("--pz_scale", type=number(float, 1e-3, 1e3), default=1.0,
        help="standard deviation of the prior (default: 1.0)")
    add("--cost", default="l2sq", choices=("l2sq", "l2", "l1"),
        help="l2sq: 0.05 |x-y|^2; l2: 0.2 |x-y|; l1: 0.02 |x-y|_1 (default: l2sq)")
    add("--mmd", default="exact", choices=("exact", "sampled"), help="mmd: the expectation over "
        "the prior in closed form, or samples of it, as in Algorithm 2 (default: exact)")
    add("--kernel", default="IMQ", choices=("IMQ", "RBF"),
        help="mmd: inverse multiquadratic or Gaussian (default: IMQ)")
    add("--imq_scales", type=positive_numbers, default=model.IMQ_SCALES, metavar="X,X,...",
        help="mmd: scales of the IMQ kernels that are summed; 1 alone is the paper's "
        "(default: 0.1,0.2,0.5,1,2,5,10, the official code's)")
    add("--quadratic", type=number(float, 0), default=0.0, help="mmd: weight of a quadratic "
        "kernel that is added; it sees directions that the codes do not use (default: 0.0)")
    add("--nowozin_trick", **switch,
        help="gan: add the prior's log density to the discriminator's logit")

    add = parser.add_argument_group("optimisation").add_argument
    add("--niter", type=count, default=PAPER_EPOCHS, help="epochs (default: 55)")
    add("--lr", type=positive, default=0.0003,
        help="learning rate of encoder and decoder (default: 0.0003)")
    add("--lr_adv", type=positive, help="gan: that of the discriminator (default: 3 x lr)")
    add("--beta1", type=number(float, 0, 0.9999), default=0.5,
        help="Adam's decay of the first moment, below 1 (default: 0.5)")
    add("--lr_schedule", default="paper", choices=("paper", "scaled", "constant"),
        help="paper: multiply learning rates by 0.5, 0.1 and 0.01 after epochs 30, 50 and 100; "
        "scaled: by 0.5 and 0.1 after 30/55 and 50/55 of the run (default: paper)")
    add("--e_pretrain", **switch,
        help="first train the encoder alone, to match the moments of its codes to the prior's")
    add("--e_pretrain_sample_size", type=number(int, 2), default=256,
        help="images in a step of pretraining; 2 or more (default: 256)")
    add("--e_pretrain_iters", type=count, default=200,
        help="steps of pretraining, at most (default: 200)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="random seed (default: 0)")

    add = parser.add_argument_group("output").add_argument
    add("--outf", type=path, help="where to write; a run in it is continued if it has the same "
        "flags (default: outputs, or the folder of --checkpoint)")
    add("--print_every", type=count, default=10, help="steps between rows of log.csv (default: 10)")
    add("--sample_every", type=count, default=1, help="epochs between pictures (default: 1)")
    add("--checkpoint_every", type=number(float, 0), default=60.0, help="seconds between "
        "checkpoints, at the ends of epochs; the last epoch has one anyway (default: 60.0)")
    add("--tensorboard", **switch,
        help="write log and pictures for TensorBoard too, which must be installed")

    group = parser.add_argument_group("use of a checkpoint")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--checkpoint", type=path,
        help="continue, evaluate or sample this run; its flags become the defaults")
    either("--evaluate", **switch, help="no training: write images and metrics of a checkpoint")
    add("--n_samples", type=number(int, 2), default=10000,
        help="samples of each latent density in an evaluation; 2 or more (default: 10000)")
    add("--fid", **switch,
        help="add Frechet inception distances to an evaluation; needs pytorch-fid")
    either("--generate", type=count, metavar="N",
        help="no training, no images needed: write N samples of a checkpoint")
    add("--density", default="prior", choices=("prior", "gaussian", "mixture"),
        help="of the samples: the prior, or one fitted to codes by an evaluation (default: prior)")

    add = parser.add_argument_group("machine").add_argument
    add("--cuda", **switch, help="use a GPU")
    add("--gpu_id", type=number(int, 0), default=0,
        help="index of the GPU, from 0; ignored with several processes")
    add("--ngpu", type=count, default=1, help="processes, with a GPU each if --cuda (default: 1)")
    add("--workers", type=number(int, 0), help="processes that decode, on first use; 0 decodes in "
        "this one (default: one a core)")
    add("--amp", **switch,
        help="run encoder and decoder in bfloat16; weights and penalties stay in float32")
    add("--compile", **switch, help="compile encoder, decoder and the MMD")
    add("--graph", **switch | {"default": True}, help="on one GPU, record the training step as a "
        "CUDA graph; --no-graph to debug it (default: True)")
    # fmt: on
    return parser


def get_flags(argv: list[str]) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The flags, and the checkpoint to continue, evaluate or sample from, if there is one."""
    parser = get_parser()
    flags = complete(parser.parse_args(argv))
    here = flags.outf / CHECKPOINT
    source, trains = flags.checkpoint or here, not (flags.evaluate or flags.generate)
    if trains and not flags.checkpoint and not here.exists():
        return check(flags), None
    checkpoint = utils.load_checkpoint(source, "flags", "net", "step", "images", "n_train")
    stored = checkpoint["flags"]
    restored = flags.checkpoint or not trains
    if restored:
        kept = (vars(flags).keys() - NOT_KEPT) & stored.keys()
        parser.set_defaults(**{name: stored[name] for name in kept})
        flags = complete(parser.parse_args(argv))  # what is typed wins
    try:
        check(flags)
    except UsageError as error:
        origin = f" (flags that were not typed are those of {source})" if restored else ""
        raise UsageError(f"{error}{origin}") from None
    if not trains:
        return flags, checkpoint
    differ = {k: v for k, v in vars(flags).items() if k not in MAY_CHANGE and v != stored.get(k)}
    if differ:
        pairs = ", ".join(f"--{k}={v} (checkpoint: {stored.get(k)})" for k, v in differ.items())
        raise UsageError(f"{source} was trained with different flags: {pairs}; use another --outf")
    if "optimizer_net" not in checkpoint:
        raise UserError(f"{source} has no optimiser states: it can be evaluated, not continued")
    if here.exists() and not source.samefile(here):
        raise UsageError(f"--outf={flags.outf} holds a run; --checkpoint={here} continues it")
    return flags, checkpoint


def complete(flags: argparse.Namespace) -> argparse.Namespace:
    """The flags, with the defaults that depend on other flags."""
    for name, value in MODE_DEFAULTS[flags.mode].items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
    flags.lr_adv = flags.lr_adv or 3 * flags.lr
    flags.workers = utils.n_cores() if flags.workers is None else flags.workers
    flags.outf = flags.outf or (flags.checkpoint.parent if flags.checkpoint else Path("outputs"))
    return flags


def check(flags: argparse.Namespace) -> argparse.Namespace:
    """The flags. Raises UsageError where they contradict each other or this machine."""
    if not flags.generate:
        if flags.dataroot is None:
            raise UsageError("--dataroot is required: the folder with the folders of images")
        outf, dataroot = flags.outf.resolve(), flags.dataroot.resolve()
        # Pictures would become training images, and an evaluation replaces what is in OUTF/eval.
        if outf.is_relative_to(dataroot) or dataroot.is_relative_to(outf / "eval"):
            pair = f"--outf={flags.outf} and --dataroot={flags.dataroot}"
            raise UsageError(f"{pair}: one is inside the other; choose another --outf")
    if flags.mode == "vae" and flags.noise != "gaussian":
        raise UsageError(f"--noise={flags.noise}: --mode=vae needs --noise=gaussian")
    if flags.nowozin_trick and flags.mode != "gan":
        raise UsageError("--nowozin_trick is for --mode=gan: there is no discriminator otherwise")
    for flag, package in (("tensorboard", "tensorboard"), ("fid", "pytorch_fid")):
        if getattr(flags, flag) and importlib.util.find_spec(package) is None:
            name = package.replace("_", "-")
            raise UsageError(f"--{flag}: {name} is not installed; pip install {name}")
    if flags.cuda and flags.ngpu > max(1, torch.cuda.device_count()):
        raise UsageError(f"--ngpu={flags.ngpu}: there are {torch.cuda.device_count()} GPUs here")
    size = int(os.environ["WORLD_SIZE"]) if is_torchelastic_launched() else flags.ngpu
    if flags.batch_size % size or flags.batch_size < 2 * size:
        raise UsageError(f"--batch_size={flags.batch_size} cannot be shared by {size} processes")
    return flags


# --------------------------------------------------------------------------------------------------
# The training step


class Data(NamedTuple):
    """Images for training and for testing, uint8 (N, S, S, C).

    `names` are the paths of the test images in --dataroot, `digest` stands for all images.
    """

    train: Images
    test: Images
    names: list[str]
    digest: str


def build_network(flags: argparse.Namespace) -> model.AutoEncoder:
    """The auto-encoder that the flags describe."""
    shape = (flags.image_size, flags.channels, flags.nz, flags.nf, flags.arch, flags.noise)
    return model.AutoEncoder(*shape, symmetric=flags.input_normalize_sym)


class Run:
    """What a checkpoint keeps: networks, optimisers, and how far the training is."""

    def __init__(self, flags: argparse.Namespace, world: World):
        self.flags, self.world, self.amp = flags, world, flags.amp
        if self.amp and world.device.type == "cpu" and not utils.cpu_has_bfloat16():
            utils.warn("--amp: without bfloat16 instructions, float32 is faster, and is used")
            self.amp = False
        self.step, self.best, self.log = 0, math.inf, ""
        self.images: str | None = None  # the digest of those that a checkpoint was trained on
        self.best_state: dict[str, Any] | None = None  # until the next checkpoint is written
        # Images that are encoded or decoded at a time in an evaluation.
        gpu_batch = GPU_BATCH * 64**2 // flags.image_size**2 if flags.cuda else 0
        self.eval_batch = max(flags.batch_size, gpu_batch)
        utils.set_seed(flags.seed, "weights")
        net = build_network(flags)
        if flags.cuda and world.size > 1:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        self.networks = {"net": net}
        if flags.mode == "gan":
            scale = flags.pz_scale if flags.nowozin_trick else None
            self.networks["discriminator"] = model.Discriminator(flags.nz, prior_scale=scale)
        # Channels last is how images lie in memory, and the faster layout for convolutions.
        for network in self.networks.values():
            network.to(world.device, memory_format=torch.channels_last)
        self.net, self.discriminator = net, self.networks.get("discriminator")

        # What a step calls: the same networks, for several processes and compiled.
        gpus = [world.device.index] if flags.cuda else None
        several = partial(DistributedDataParallel, device_ids=gpus)
        ddp = {k: several(part) if world.size > 1 else part for k, part in self.networks.items()}
        self.ddp_net, self.ddp_discriminator = ddp["net"], ddp.get("discriminator")
        self.mmd = model.exact_mmd if flags.mmd == "exact" else model.sampled_mmd
        if flags.compile:
            self.ddp_net, self.mmd = torch.compile(self.ddp_net), torch.compile(self.mmd)

        self.rates = {"net": flags.lr, "discriminator": flags.lr_adv}
        self.optimizers = {k: self.adam(part, self.rates[k]) for k, part in self.networks.items()}

    def adam(self, network: nn.Module, lr: float) -> torch.optim.Adam:
        """The optimiser of the paper, for the weights of a network.

        Its rate is a tensor on the device, from which a recorded step reads it.
        """
        device, betas = self.world.device, (self.flags.beta1, 0.999)
        rate, capturable = torch.tensor(lr, device=device), device.type == "cuda"
        return torch.optim.Adam(
            network.parameters(), lr=rate, betas=betas, fused=True, capturable=capturable
        )

    def set_learning_rates(self, factor: float) -> float:
        """Sets the rates to `factor` times their flags. Returns that of encoder and decoder."""
        for name, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"].fill_(self.rates[name] * factor)
        return self.rates["net"] * factor

    def autocast(self) -> AbstractContextManager:
        """Autocast context of the networks: bfloat16 with --amp."""
        if not self.amp:
            return nullcontext()
        return torch.autocast(self.world.device.type, torch.bfloat16)

    @property
    def needs_prior(self) -> bool:
        """Whether a step takes samples of the prior."""
        return self.flags.mode == "gan" or (self.flags.mode, self.flags.mmd) == ("mmd", "sampled")

    def sample_prior(self, n: int) -> Tensor:
        """Samples of the prior, (n, nz)."""
        return model.sample_prior(n, self.flags.nz, self.flags.pz_scale, self.world.device)

    def to_input(self, batch: Tensor) -> Tensor:
        """uint8 images (n, S, S, C) as the encoder takes them, (n, C, S, S)."""
        return utils.from_uint8(batch, self.flags.input_normalize_sym)

    @torch.no_grad()
    def encode(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes and log variances (n, nz) of uint8 images (n, S, S, C), in evaluation mode."""
        with self.autocast():
            mean, log_variance = self.net.eval().encoder(self.to_input(batch))
            return model.draw_code(mean, log_variance), log_variance

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images (n, C, S, S) in [0, 1] of codes (n, nz), in evaluation mode."""
        with self.autocast():
            images = self.net.eval().decoder(codes.float()).float()
            return images / 2 + 0.5 if self.flags.input_normalize_sym else images

    def weights(self) -> dict[str, Any]:
        """The states of the networks, by name."""
        return {name: network.state_dict() for name, network in self.networks.items()}

    def moments(self) -> dict[str, Any]:
        """The states of the optimisers, by name."""
        return {f"optimizer_{k}": adam.state_dict() for k, adam in self.optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies what a checkpoint keeps. Raises UserError if it does not fit or is not finite."""
        self.step, self.images = state["step"], state["images"]
        self.best, self.log = state.get("best", math.inf), state.get("log", "")
        try:
            for name, network in self.networks.items():
                if name in state:
                    network.load_state_dict(state[name])
                if moments := state.get(f"optimizer_{name}"):
                    # The rates stay: they are tensors on this device.
                    groups = self.optimizers[name].state_dict()["param_groups"]
                    self.optimizers[name].load_state_dict(moments | {"param_groups": groups})
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the checkpoint's {name} does not fit its flags") from error
        if not all(map(utils.weights_are_sound, self.weights().values())):
            raise UserError("the checkpoint's weights are not finite, or above 1e6")


def train_step(run: Run, x: Tensor, *prior: Tensor) -> Tensor:
    """One step of Algorithm 1 (gan) or 2 (mmd) of the paper, or of a VAE.

    Does not wait for the GPU, except on several GPUs, whose batch norm is synchronised.

    Args:
        x: this process's images x_1 ... x_n of the batch, (n, C, S, S).
        prior: if `run.needs_prior`, samples z_1 ... z_N of the prior for the batch of all
            processes, (N, nz).

    Returns:
        Reconstruction cost, penalty and the discriminator's loss, (3,).
    """
    flags, world = run.flags, run.world
    with run.autocast():
        # z~_i from Q(Z|x_i): the one encoding that all of the step shares.
        y, codes, mean, log_variance = run.ddp_net(x)
    loss_d = torch.zeros((), device=x.device)

    if flags.mode == "gan":
        # Algorithm 1: update D by ascending LAMBDA/n sum_i log D(z_i) + log(1 - D(z~_i)) ...
        z = prior[0].chunk(world.size)[world.rank]
        both = torch.cat([z, codes.detach()])
        logits_prior, logits_codes = run.ddp_discriminator(both).chunk(2)
        loss_d = model.discriminator_loss(logits_prior, logits_codes)
        run.optimizers["discriminator"].zero_grad()
        (flags.LAMBDA * loss_d).backward()
        run.optimizers["discriminator"].step()
        # ... and Q and G by descending 1/n sum_i c(x_i, G(z~_i)) - LAMBDA log D(z~_i).
        penalty = model.gan_penalty(run.discriminator, codes)
    elif flags.mode == "mmd":
        # Algorithm 2: update Q and G by descending 1/n sum_i c(x_i, G(z~_i)) + LAMBDA MMD^2(z, z~),
        # where the expectation over z replaces the samples z_i unless --mmd=sampled.
        all_codes = utils.Gather.apply(codes) if world.size > 1 else codes
        kernel = model.Kernel(flags.kernel, flags.pz_scale, flags.imq_scales, flags.quadratic)
        penalty = run.mmd(all_codes, kernel, *prior)
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

    It stops when the loss is what the same number of prior samples would score, or after
    --e_pretrain_iters steps.
    """
    flags, n = run.flags, run.flags.e_pretrain_sample_size
    optimizer = run.adam(run.net.encoder, flags.lr)
    rng = np.random.default_rng([flags.seed, 2**32])  # no epoch has this number
    indices = (rng.integers(len(images), size=n) for _ in range(flags.e_pretrain_iters))
    target = model.pretrain_floor(n, flags.nz, flags.pz_scale)
    batches = utils.batches(images, indices, run.world.device)
    bar = utils.progress(batches, "pretraining", flags.e_pretrain_iters)
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
    # Each process pretrained on its own, with the same draws; this removes differences of rounding.
    utils.copy_from_main(run.net, run.world)


# --------------------------------------------------------------------------------------------------
# Training


def learning_rate_factor(step: int, per_epoch: int, flags: argparse.Namespace) -> float:
    """What the rates are multiplied by at a step, counted from 0 (the paper's appendix)."""
    epoch = step // per_epoch
    if flags.lr_schedule == "scaled":
        epoch = PAPER_EPOCHS * step / (flags.niter * per_epoch)  # where the paper's run would be
    if flags.lr_schedule == "constant" or epoch < 30:
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


def check_finite(step: int, values: dict[str, float]) -> None:
    """Raises UserError, naming value and step, if a value is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"{name} is {value} at step {step}; {DIVERGED_HINT}")


def train(run: Run, data: Data) -> int:
    """Trains to the last epoch. Returns 0, or the number of the signal that ended it early."""
    flags, world = run.flags, run.world
    log = start_log(run, data.train) if utils.is_main() else None
    if flags.e_pretrain and run.step == 0:
        pretrain_encoder(run, data.train)
    per_epoch = len(data.train) // flags.batch_size
    start, end = run.step, flags.niter * per_epoch
    indices = batch_indices(len(data.train), range(start, end), flags, world)
    batches = utils.batches(data.train, indices, world.device)
    bar = utils.progress(batches, "", end, initial=start, unit="step")

    def step(batch: Tensor, *prior: Tensor) -> Tensor:
        return train_step(run, run.to_input(batch), *prior)

    if flags.graph and flags.cuda and world.size == 1:
        step = utils.Recorded(step)
    stop, signum, losses = utils.Stop(), 0, []
    clock = saved = time.perf_counter()
    for batch in bar:
        epoch = run.step // per_epoch + 1
        lr = run.set_learning_rates(learning_rate_factor(run.step, per_epoch, flags))
        # Randomness is a function of seed, purpose and step: a resumed run repeats a whole one.
        prior = ()
        if run.needs_prior:
            utils.set_seed(flags.seed, "prior", run.step)  # the same samples in every process ...
            prior = (run.sample_prior(flags.batch_size),)
        utils.set_seed(flags.seed, "noise", run.step, world.rank)  # ... but noise of its own
        run.net.train()
        losses.append(step(batch, *prior))
        run.step += 1

        epoch_ends, printing = run.step % per_epoch == 0, run.step % flags.print_every == 0
        if printing or epoch_ends:
            for i, row in enumerate(torch.stack(losses).tolist(), run.step - len(losses) + 1):
                check_finite(i, dict(zip(LOSSES, row, strict=True)))
            # Of the last step alone, so that the log of a resumed run has the same bits.
            means = utils.average(losses[-1], world).tolist()
            speed = len(losses) * flags.batch_size / (time.perf_counter() - clock)
            if log and printing:
                used = dict(zip(LOSSES, means if flags.mode == "gan" else means[:2], strict=False))
                log.add(epoch=epoch, step=run.step, **used, lr=lr, images_per_s=round(speed, 1))
                bar.set_description(f"epoch {epoch}/{flags.niter}", refresh=False)
                bar.set_postfix({k: f"{v:.4g}" for k, v in used.items()}, refresh=False)
        # Several processes agree on a signal where they wait for each other anyway.
        if world.size == 1 or printing or epoch_ends:
            signum = stop.agreed(world)
        if epoch_ends:
            refresh_batch_norm(run, data.train, None if run.step == end else BATCH_NORM_BATCHES)
            if log:
                end_epoch(run, log, data, epoch, last=run.step == end)
        due = run.step == end or time.perf_counter() - saved >= flags.checkpoint_every
        if log and (signum or (epoch_ends and due)):
            # Last, so that a checkpoint vouches for all that was written before it.
            save(run, log, data)
            saved = time.perf_counter()
        if printing or epoch_ends:
            losses, clock = [], time.perf_counter()
        if signum:
            utils.warn(f"stopped after step {run.step} of {end}; the same command continues")
            break
    bar.close()
    stop.close()
    if log:
        log.close()
    return signum


def start_log(run: Run, images: Images) -> utils.Log:
    """The log, after writing the flags of the run and a picture of training images."""
    flags = run.flags
    stored = {k: str(v) if isinstance(v, Path) else v for k, v in vars(flags).items()}
    utils.write_json(flags.outf / "args.json", stored)
    indices = [utils.epoch_order(len(images), flags.seed, 0)[:64]]
    sample = utils.from_uint8(next(utils.batches(images, indices, run.world.device)), False)
    utils.save_picture(flags.outf / "real_samples.png", utils.grid(sample, columns=8))
    return utils.Log(flags.outf, COLUMNS, run.log, run.step, flags.tensorboard)


def end_epoch(run: Run, log: utils.Log, data: Data, epoch: int, last: bool) -> None:
    """Logs the metrics of an epoch, draws its pictures, and keeps the best weights so far."""
    metrics, _, _ = test_metrics(run, data.test)
    check_finite(run.step, metrics)
    log.add(epoch=epoch, step=run.step, **metrics)
    tqdm.write(f"epoch {epoch}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
    if epoch % run.flags.sample_every == 0 or last:
        for name, picture in sample_grids(run, data.test).items():
            utils.save_picture(run.flags.outf / f"{name}_epoch_{epoch:03d}.png", picture)
            log.add_picture(name, picture, run.step)
    if metrics["test_mse"] < run.best:
        run.best = metrics["test_mse"]
        weights = {k: {n: t.clone() for n, t in v.items()} for k, v in run.weights().items()}
        run.best_state = header(run, data) | weights


def header(run: Run, data: Data) -> dict[str, Any]:
    """What a checkpoint has besides weights, moments and log."""
    flags = {k: v for k, v in vars(run.flags).items() if k not in NOT_KEPT}
    for name in ("dataroot", "cache_dir"):  # absolute, since a run may continue from elsewhere
        flags[name] = flags[name] and str(flags[name].resolve())
    counts = {"step": run.step, "best": run.best}
    return {"flags": flags, "images": data.digest, "n_train": len(data.train)} | counts


def save(run: Run, log: utils.Log, data: Data) -> None:
    """Writes the best weights, if they are new, and then all that is needed to continue."""
    if not all(map(utils.weights_are_sound, run.weights().values())):
        raise UserError(f"the weights diverged before step {run.step}; {DIVERGED_HINT}")
    if run.best_state:
        utils.save_checkpoint(run.flags.outf / BEST, run.best_state)
        run.best_state = None
    state = header(run, data) | {"log": log.text} | run.weights() | run.moments()
    utils.save_checkpoint(run.flags.outf / CHECKPOINT, state)


# --------------------------------------------------------------------------------------------------
# Evaluation


def refresh_batch_norm(run: Run, images: Images, n_batches: int | None = None) -> None:
    """Re-estimates the statistics of batch norm from `n_batches` training batches (default: all).

    Those kept while training lag behind the weights.
    """
    order = utils.epoch_order(len(images), run.flags.seed, 0)
    indices = np.array_split(order, max(1, len(order) // run.flags.batch_size))[:n_batches]
    if run.flags.cuda:  # batch norm is synchronised, so each process takes its share
        indices = [index[run.world.rank :: run.world.size] for index in indices]
    utils.set_seed(run.flags.seed, "batch norm", run.world.rank)
    batches = utils.batches(images, indices, run.world.device)
    with torch.no_grad(), run.autocast():
        update_bn((run.to_input(batch) for batch in batches), run.net)


def batches_in_order(run: Run, images: Images) -> Iterator[Tensor]:
    """Batches of uint8 images, from the first image to the last."""
    n = run.eval_batch
    indices = np.split(np.arange(len(images)), range(n, len(images), n))
    return utils.batches(images, indices, run.world.device)


def encode_all(run: Run, images: Images) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Batches of uint8 images in order, with their codes and log variances (n, nz)."""
    utils.set_seed(run.flags.seed, "encode")  # a Gaussian encoder draws the same codes every time
    return ((batch, *run.encode(batch)) for batch in batches_in_order(run, images))


@torch.no_grad()
def test_metrics(run: Run, images: Images) -> tuple[dict[str, float], Tensor, Tensor]:
    """Metrics of held-out images, their codes (N, nz), and the squared error of each (N,).

    The README explains the metrics. A single image has test_mse alone.
    """
    errors, codes, variances = [], [], []
    for batch, code, log_variance in encode_all(run, images):
        x = utils.from_uint8(batch, symmetric=False)
        errors.append((run.decode(code) - x).square().mean((1, 2, 3)))
        codes.append(code)
        if log_variance is not None:
            variances.append(log_variance.exp().mean(1))
    codes, errors = torch.cat(codes), torch.cat(errors)
    if not codes.isfinite().all():
        raise UserError(f"the codes are not finite; {DIVERGED_HINT}")
    metrics = {"test_mse": errors.mean()}
    if len(codes) > 1:
        eigenvalues, _ = model.covariance_eigenvalues(codes)
        pz_scale = run.flags.pz_scale
        metrics |= {
            "test_mmd": model.exact_mmd(codes, model.Kernel(pz_scale=pz_scale)),
            "test_w2": model.gaussian_w2(codes, pz_scale),
            "eigenvalue_min": eigenvalues[0],
            "eigenvalue_max": eigenvalues[-1],
        }
    if variances:
        metrics["noise_variance"] = torch.cat(variances).mean()
    return {name: value.item() for name, value in metrics.items()}, codes, errors


def sample_grids(run: Run, images: Images) -> dict[str, Image.Image]:
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


def plot_codes(run: Run, codes: Tensor) -> Image.Image:
    """Codes (N, nz) and prior samples in the plane of the covariance's extreme eigenvectors."""
    _, vectors = model.covariance_eigenvalues(codes)
    plane = vectors[:, [0, -1]].float()
    utils.set_seed(run.flags.seed, "plot")
    clouds = (run.sample_prior(min(len(codes), 2000)), codes[:2000])
    return utils.scatter(*((cloud @ plane).cpu().numpy() for cloud in clouds))


def fit_densities(run: Run, images: Images) -> dict[str, Any]:
    """A Gaussian and a mixture (arguments of `model.mixture`), fitted to codes of the images."""
    codes, fitted = torch.cat([code for _, code, _ in encode_all(run, images)]), {}
    for name, components in (("gaussian", 1), ("mixture", N_MIXTURE)):
        utils.set_seed(run.flags.seed, name)
        fitted[name] = model.fit_mixture(codes, components)
    return fitted


def sample_images(run: Run, name: str, density: Any, n: int) -> Iterator[Tensor]:
    """n decoded samples of a latent density, or of the prior if it is None, in batches."""
    utils.set_seed(run.flags.seed, "samples", name)
    for first in range(0, n, run.eval_batch):
        m = min(n - first, run.eval_batch)
        yield run.decode(density.sample((m,)) if density else run.sample_prior(m))


def evaluate(run: Run, data: Data, folders: bool) -> None:
    """Writes metrics, codes.png and densities; with `folders`, images and codes to eval/, too."""
    flags, outf, n = run.flags, run.flags.outf, run.flags.n_samples
    inception = utils.Inception(run.world.device) if flags.fid else None
    if inception and min(len(data.test), n) < 2048:
        utils.warn("--fid: with fewer than 2048 images it is too large, and not comparable")
    metrics, codes, errors = test_metrics(run, data.test)
    fitted = fit_densities(run, data.train) if len(data.train) > 1 else {}
    densities = {name: model.mixture(**state) for name, state in fitted.items()}
    if densities:
        nats = model.nats_from_prior(codes, densities["mixture"], flags.pz_scale)
        metrics["test_nats"] = nats.item()
        if run.images in (None, data.digest):  # of other images they would not be the run's
            utils.save_checkpoint(outf / DENSITIES, fitted | {"step": run.step})
    if len(codes) > 1:
        utils.set_seed(flags.seed, "prior metrics")
        metrics |= model.prior_metrics(*codes.shape, flags.pz_scale, codes.device)
        utils.save_picture(outf / "codes.png", plot_codes(run, codes))

    test = (utils.from_uint8(batch, False) for batch in batches_in_order(run, data.test))
    sets = {"real": (len(codes), test)}
    sets["reconstructions"] = len(codes), map(run.decode, codes.split(run.eval_batch))
    for name, density in {"prior": None, **densities}.items():
        sets[f"samples_{name}"] = n, sample_images(run, name, density, n)
    for name, (count, batches) in sets.items():
        if folders:
            batches = utils.write_images(outf / "eval" / name, batches)
        sharp, moments = [], model.Moments()  # of the features
        n_batches = math.ceil(count / run.eval_batch)
        for images in utils.progress(batches, name, n_batches, unit="batch", leave=False):
            sharp.append(model.sharpness(images))
            if inception:
                moments.add(inception.features(images))
        metrics[f"sharpness_{name}"] = torch.cat(sharp).mean().item()
        if name == "real":
            real = moments
        elif inception:
            distance = model.frechet_distance(*real.result(), *moments.result())
            metrics[f"fid_{name}"] = distance.item()

    if folders:
        with utils.atomic_write(outf / "eval" / "codes.npy") as file:
            np.save(file, codes.cpu().numpy())
        rows = zip(data.names, errors.tolist(), strict=True)
        utils.write_csv(outf / "eval" / "images.csv", ("path", "squared_error"), rows)
    counts = {"step": run.step, "n_test": len(codes), "n_samples": n}
    utils.write_json(outf / METRICS_FILE, counts | metrics)
    print("\n".join(f"{name:>28}  {value:.5g}" for name, value in metrics.items()))


def generate(flags: argparse.Namespace, checkpoint: dict[str, Any]) -> int:
    """Writes --generate samples of a checkpoint, and a picture of the first ones. Returns 0."""
    run, density = Run(flags, utils.get_world(flags.cuda, flags.gpu_id)), None
    run.load_state_dict(checkpoint)
    if flags.density != "prior":
        path = (flags.checkpoint or flags.outf / CHECKPOINT).with_name(DENSITIES)
        densities = checkpoint.get("densities")
        if densities is None and path.exists():
            densities = utils.load_checkpoint(path, flags.density, "step")
        if densities is None or densities.get("step", run.step) != run.step:
            hint = "--evaluate leaves it"
            raise UserError(f"--density={flags.density}: no {path} of step {run.step}; {hint}")
        state = densities[flags.density]
        density = model.mixture(**{k: v.to(run.world.device).double() for k, v in state.items()})
    utils.make_folder(flags.outf)
    folder, picture, first = flags.outf / "generated", flags.outf / "generated.png", []
    with utils.lock(flags.outf / ".generated.lock", wait=False):
        images = sample_images(run, flags.density, density, flags.generate)
        for batch in utils.write_images(folder, images):
            first = [*first, *batch][:64]
        utils.save_picture(picture, utils.grid(torch.stack(first), columns=8))
    print(f"{flags.generate} images are in {folder}, and the first of them in {picture}")
    return 0


def load_network(path: Path | str) -> tuple[model.AutoEncoder, argparse.Namespace]:
    """The network of a checkpoint, on the CPU and ready to use, and the flags of its run."""
    checkpoint = utils.load_checkpoint(Path(path), "flags", "net")
    flags = argparse.Namespace(**checkpoint["flags"])
    network = build_network(flags)
    network.load_state_dict(checkpoint["net"])
    return network.eval(), flags


# --------------------------------------------------------------------------------------------------
# The program


def load_data(flags: argparse.Namespace, stored: dict[str, Any] | None, world: World) -> Data:
    """The images of --dataroot, those of the checkpoint `stored`; on the GPU if they fit."""
    how = (flags.dataset, flags.image_size, flags.crop, flags.workers, flags.cache_dir)
    images, names, digest = utils.load_images(flags.dataroot, *how, flags.channels)
    n_test = flags.n_test or max(2, min(len(images) // 10, utils.CELEBA_TEST_IMAGES))
    if flags.evaluate:  # of any number of images, those of the checkpoint or others
        n_test = min(n_test, len(images))
    n_train = len(images) - n_test
    if not flags.evaluate and n_train < flags.batch_size:
        flag = f"--n_test={n_test}, --batch_size={flags.batch_size}"
        raise UsageError(f"{flag}: {len(images)} images are too few")
    if stored and digest != stored["images"]:
        message = f"--dataroot={flags.dataroot}: not the images that the checkpoint was trained on"
        if not flags.evaluate:
            raise UserError(f"{message}; bring those back, or start again in another --outf")
        utils.warn(message)
    elif stored and n_train < stored["n_train"]:
        n = stored["n_train"] - n_train
        utils.warn(f"--n_test={n_test}: {n} of the held-out images were trained on")
    images = utils.put_on_device(images, world.device)
    return Data(images[:n_train], images[n_train:], names[n_train:], digest)


def is_complete(flags: argparse.Namespace, step: int, end: int) -> bool:
    """Whether a run has come to its last step and been evaluated there."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return step >= end and json.loads((flags.outf / METRICS_FILE).read_text())["step"] == step
    return False


def check_agreement(flags: argparse.Namespace, data: Data, step: int, world: World) -> None:
    """Raises UserError if processes have different flags, images or checkpoints."""
    own = {"outf", "checkpoint", "dataroot", "cache_dir", "gpu_id", "workers"}
    mine = {f"--{name}": value for name, value in vars(flags).items() if name not in own}
    mine |= {"the images in --dataroot": data.digest, "the checkpoint in --outf": step}
    others = utils.all_values(mine, world)
    if differ := [name for name, value in mine.items() if any(o[name] != value for o in others)]:
        raise UserError(f"the processes do not agree on {', '.join(differ)}")


def execute(argv: list[str]) -> int:
    """Does what the command line asks. Returns the exit status. Raises UserError."""
    flags, checkpoint = get_flags(argv)
    if flags.generate:
        return generate(flags, checkpoint)
    if flags.ngpu > 1 and not is_torchelastic_launched():
        return launch(flags.ngpu, flags.cuda, argv)
    world, signum = utils.get_world(flags.cuda, flags.gpu_id), 0
    utils.make_folder(flags.outf)
    # Rank 0 alone has the lock; if it fails, it ends the others.
    with utils.lock(flags.outf / ".lock", wait=False) if utils.is_main() else nullcontext():
        # Once more, since another run may have written here until it gave the lock back.
        flags, checkpoint = get_flags(argv)
        data = load_data(flags, checkpoint, world)
        utils.join(world)
        step = checkpoint["step"] if checkpoint else 0
        check_agreement(flags, data, step, world)
        end = flags.niter * (len(data.train) // flags.batch_size)
        if not flags.evaluate and is_complete(flags, step, end):
            utils.leave_world()
            if utils.is_main():
                print(f"the run in {flags.outf} is complete; a larger --niter continues it")
            return 0
        # Training batches have one shape, so that the search for fast convolutions pays.
        torch.backends.cudnn.benchmark = True
        run = Run(flags, world)
        if checkpoint:
            run.load_state_dict(checkpoint)
        if not flags.evaluate:
            if checkpoint:
                utils.warn(f"continuing the run in {flags.outf} from step {step} of {end}")
                if flags.lr_schedule == "scaled" and flags.niter > checkpoint["flags"]["niter"]:
                    utils.warn(f"--lr_schedule=scaled is stretched to --niter={flags.niter}")
            signum = train(run, data)
        utils.leave_world()  # now, since the others would not wait for a long evaluation
        if utils.is_main() and not signum:
            evaluate(run, data, folders=flags.evaluate)
            print(f"samples and metrics are in {flags.outf}")
    return 128 + signum if signum else 0


def launch(processes: int, cuda: bool, argv: list[str]) -> int:
    """Runs the command in several processes on this machine, as `torchrun` does."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in [name for name in os.environ if name.startswith("PET_")]:
        del os.environ[name]  # a cluster's settings of torchrun, which would wait for more machines
    # Seconds to finish a step and write a checkpoint after a signal.
    # A process that waits for a GPU that is gone takes it all.
    timeout = "60" if cuda else "300"
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", timeout)
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
    """Runs the program and shows each error that a user can fix as one line."""
    sys.stdout, sys.stderr = utils.Output(sys.stdout), utils.Output(sys.stderr)
    utils.handle_signals(utils.exit_at_once)
    try:
        return execute(sys.argv[1:])
    except Exception as error:
        message, status = one_line(error), getattr(error, "status", 1)
        if not message:
            raise
    if not utils.is_main() or message.startswith(LOST):
        # Rank 0 reports what all processes meet, and a lost connection echoes another's error.
        # Wait: torchrun ends this process once the other has ended.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(20)
    print(f"main.py: error: {utils.printable(message)}", file=sys.stderr)
    return status


def one_line(error: Exception) -> str:
    """What a user can do about an error; empty if it is a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    signs = ("out of memory", "allocate memory", "ALLOC_FAILED")
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in signs):
        return "out of memory; try a smaller --batch_size, --nf or --image_size"
    if isinstance(error, DistError) or "gloo/transport" in str(error):
        return f"{LOST}: {str(error).strip().splitlines()[-1]}"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile does not work here, leave it out: {str(error).splitlines()[0]}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
