"""Measures speed and memory on this machine, and prints a table; run by hand.

    python3 tests/benchmark.py                                       # all rows, on toy faces, on the CPU
    python3 tests/benchmark.py --cuda --dataroot=data/celebA         # all rows, with training on the GPU
    python3 tests/benchmark.py --only=training,mmd --nf=32           # some of them
    python3 tests/benchmark.py --train_predecessor --dataroot=data/celebA --mode=gan --niter=5 --outf=predecessor

A figure is a median over rounds. What it is compared with is measured in the same rounds, in turns, and the ratio is
the median of the rounds' ratios. "In memory" is the same training step on one batch that stays where it is.
"Predecessor" is the schedule of telin0411/WAE-PyTorch, with the networks of this project: see `Predecessor`.
`--train_predecessor` trains by that schedule on the training images of main.py, evaluates as main.py does, and takes
main.py's flags.
"""

import argparse
import contextlib
import csv
import io
import itertools
import multiprocessing
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import ImageFolder

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
import download_datasets  # noqa: E402
import main  # noqa: E402
import model  # noqa: E402
import utils  # noqa: E402

CELEBA_SHAPE = (202_599, 64, 64, 3)


class Row(NamedTuple):
    """A line of the table."""

    name: str
    figure: str
    compared: str = ""
    ratio: str = ""
    demand: str = ""


# ----------------------------------------------------------------------------------------------------------------------
# The predecessor's schedule


class Predecessor:
    """Trains the networks of a WAE as telin0411/WAE-PyTorch does: an encoding and a backward pass for each loss.

    Gradients are set to zero once, at the beginning of a step, so that the encoder's last Adam step sees the sum of
    what all the backward passes left; the reconstruction loss is a mean over pixels. It knows neither channels last nor
    bfloat16; `train_predecessor`, which is about results and not about speed, has both, as main.py has.
    """

    def __init__(self, wae: main.WAE, layout: torch.memory_format = torch.contiguous_format):
        self.wae, flags = wae, wae.flags
        for network in wae.networks().values():
            network.to(memory_format=layout)
        adam = partial(torch.optim.Adam, betas=(flags.beta1, 0.999))
        self.adam_encoder = adam(wae.encoder.parameters(), lr=flags.lr)
        self.adam_decoder = adam(wae.decoder.parameters(), lr=flags.lr)
        if wae.discriminator is not None:
            self.adam_discriminator = adam(wae.discriminator.parameters(), lr=flags.lr_adv)
            self.adam_penalty = adam(wae.encoder.parameters(), lr=flags.lr)

    def encode(self, x: Tensor) -> Tensor:
        """Codes (n, nz) of images (n, 3, S, S)."""
        with self.wae.autocast():
            return self.wae.encoder(x).float()

    def decode(self, codes: Tensor) -> Tensor:
        """Images (n, 3, S, S) of codes (n, nz)."""
        with self.wae.autocast():
            return self.wae.decoder(codes).float()

    def step(self, x: Tensor) -> None:
        """One step on images (n, 3, S, S)."""
        wae, flags = self.wae, self.wae.flags
        for network in wae.networks().values():
            network.zero_grad()
        F.mse_loss(self.decode(self.encode(x)), x).backward()
        self.adam_decoder.step()
        self.adam_encoder.step()

        z = wae.sample_prior(len(x))
        if flags.mode == "mmd":
            (flags.LAMBDA * model.mmd_penalty(self.encode(x), z, flags.kernel, flags.pz_scale)).backward()
            self.adam_encoder.step()
            return
        wae.encoder.eval()
        codes = self.encode(x)  # not detached: the discriminator's loss leaves a gradient on the encoder, too
        wae.encoder.train()
        (flags.LAMBDA * model.discriminator_loss(wae.discriminator(z), wae.discriminator(codes))).backward()
        self.adam_discriminator.step()
        (flags.LAMBDA * F.softplus(-wae.discriminator(self.encode(x))).mean()).backward()
        self.adam_penalty.step()


def train_predecessor(argv: list[str]) -> None:
    """Trains by the predecessor's schedule on main.py's training images, and evaluates as main.py does."""
    flags, _ = main.parse_flags(argv)
    flags.seed = flags.seed or 0
    utils.make_folder(flags.outf)
    world = utils.join_world(flags.cuda, flags.gpu_id)
    images = utils.load_images(flags.dataroot, flags.dataset, flags.image_size, flags.workers, flags.cache_dir)
    flags.n_test = flags.n_test or utils.default_n_test(len(images))
    images = utils.put_on_device(images, world.device)
    train, test = images[: -flags.n_test], images[-flags.n_test :]
    wae = main.WAE(flags, world)
    predecessor = Predecessor(wae, torch.channels_last)
    steps = len(train) // flags.batch_size
    for epoch in range(flags.niter):
        indices = utils.epoch_order(len(train), flags.seed, epoch)[: steps * flags.batch_size].reshape(steps, -1)
        for batch in utils.batches(train, indices, world.device):
            predecessor.step(wae.to_input(batch))
        print(f"epoch {epoch + 1}/{flags.niter}")
    main.refresh_batch_norm(wae, train)
    main.evaluate(wae, train, test, flags.niter, folders=False)


# ----------------------------------------------------------------------------------------------------------------------
# How things are measured


class Bench:
    """What all rows share: options, images, and a folder that is removed afterwards."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.folder, self.rounds, self.nf, self.cuda = folder, options.rounds, options.nf, options.cuda
        self.steps = options.steps or (50 if options.cuda else 10)
        self.world = utils.World(0, 1, 0, utils.pick_device(options.cuda, 0))
        self.dataset, self.dataroot = options.dataset, options.dataroot
        if self.dataroot is None:
            self.dataset, self.dataroot = "celebA", folder / "toy"
            with quiet():
                download_datasets.get_toy(folder, 0, options.n_images)
        self.paths = [path for path, _ in ImageFolder(str(self.dataroot)).samples][:20_000]
        with quiet():
            self.images = utils.load_images(self.dataroot, self.dataset, 64, utils.n_cores(), folder)

    def wae(self, *argv: str) -> main.WAE:
        """Networks as main.py makes them for these flags."""
        outf = tempfile.mkdtemp(dir=self.folder)
        given = [f"--dataroot={self.dataroot}", f"--outf={outf}", f"--nf={self.nf}", "--seed=0", *argv]
        flags, _ = main.parse_flags([*given, "--cuda"] if self.cuda else given)
        return main.WAE(flags, self.world)

    def batch(self, n: int) -> Tensor:
        """n images on the device."""
        return torch.from_numpy(np.resize(self.images, (n, 64, 64, 3))).to(self.world.device)

    def loader(self) -> DataLoader:
        """Batches of 100 from the files, decoded in every epoch by one process."""
        crop = [transforms.CenterCrop(utils.CELEBA_CROP)] if self.dataset == "celebA" else []
        end = [transforms.CenterCrop(64), transforms.ToTensor()]
        folder = ImageFolder(str(self.dataroot), transforms.Compose([*crop, transforms.Resize(64), *end]))
        return DataLoader(folder, 100, shuffle=True, num_workers=1, drop_last=True)

    def rate(self, n: int, function: Callable[[], object]) -> float:
        """n by the seconds that the function takes, on the device too."""
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return n / (time.perf_counter() - start)

    def wait(self) -> None:
        """Until the device has done all."""
        if self.cuda:
            torch.cuda.synchronize()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars and messages."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def in_turns(rounds: int, *functions: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Medians of the functions' figures, and medians of the ratios of the first one's to each one's."""
    figures = [[function() for function in functions] for _ in range(rounds)]
    ratios = [[line[0] / value for value in line] for line in figures]
    return [[statistics.median(column) for column in zip(*table, strict=True)] for table in (figures, ratios)]


def status_mb(key: str, pid: int | str = "self") -> float:
    """A line of /proc/PID/status in MB: RssAnon, memory of its own; VmHWM, the most so far of that and mapped files."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) / 1e3


def apart(function: Callable, *arguments: object) -> tuple:
    """The value of a function called in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def loop_rate(bench: Bench, wae: main.WAE, images: np.ndarray | Tensor) -> float:
    """images/s of main.train, as its log tells it, over one epoch: from the start of reading to the last step's end."""
    steps = min(bench.steps, len(images) // wae.flags.batch_size)
    wae.flags.niter, wae.flags.print_every, wae.flags.sample_every = 1, steps, 1000
    nothing = mock.Mock(return_value={})
    with quiet(), mock.patch.multiple(main, refresh_batch_norm=nothing, epoch_pictures=nothing, evaluate=nothing):
        main.train(wae, images[: steps * wae.flags.batch_size], images[:2], None)
    with (wae.flags.outf / "log.csv").open() as file:
        return next(float(row["images_per_s"]) for row in csv.DictReader(file))


def memory_rate(bench: Bench, wae: main.WAE, x: Tensor) -> float:
    """images/s of the training step on one batch that stays in memory."""
    prior = wae.sample_prior(len(x))
    steps = [partial(wae.train_step, x, prior)] * bench.steps
    return bench.rate(bench.steps * len(x), lambda: [step() for step in steps])


def predecessor_rate(bench: Bench, predecessor: Predecessor) -> float:
    """images/s of the predecessor's schedule, from files, without the first batch, for which a process starts."""
    loader = bench.loader()
    batches, steps = iter(loader), min(bench.steps, len(loader) - 1)
    next(batches)
    step = lambda: predecessor.step(next(batches)[0].to(bench.world.device))  # noqa: E731
    return bench.rate(100 * steps, lambda: [step() for _ in range(steps)])


# ----------------------------------------------------------------------------------------------------------------------
# Rows


def build(bench: Bench) -> Iterator[Row]:
    """Decoding once, with all cores, against as many times what one core decodes."""
    crop, cores = utils.CELEBA_CROP if bench.dataset == "celebA" else None, utils.n_cores()
    n, some = len(bench.paths), min(len(bench.paths), 1000)

    def all_cores() -> float:
        with quiet():
            return bench.rate(n, lambda: utils._build_array(bench.folder / "array", bench.paths, 64, crop, cores))

    def one_core() -> float:
        return bench.rate(some * cores, lambda: [utils.decode_image(path, 64, crop) for path in bench.paths[:some]])

    (rate, one), (_, ratio) = in_turns(bench.rounds, all_cores, one_core)
    against = f"{cores} x one core's decoding, {one:.0f} images/s"
    yield Row("building the array, all cores", f"{rate:.0f} images/s", against, f"{ratio:.2f}", ">= 0.85")


def delivery(bench: Bench) -> Iterator[Row]:
    """Shuffled batches of 100, from the array and from the files."""

    def array() -> float:
        order = np.concatenate([utils.epoch_order(len(bench.images), 0, epoch) for epoch in range(10)])
        indices = order[: len(order) // 100 * 100].reshape(-1, 100)
        batches = utils.batches(bench.images, indices, torch.device("cpu"))
        return bench.rate(indices.size, lambda: sum(len(batch) for batch in batches))

    def files() -> float:
        loader = bench.loader()
        batches, n = iter(loader), min(10, len(loader) - 1)
        next(batches)
        return bench.rate(n * 100, lambda: [next(batches) for _ in range(n)])

    (rate, decoded), (_, ratio) = in_turns(bench.rounds, array, files)
    against = f"ImageFolder, DataLoader with one worker, {decoded:.0f} images/s"
    yield Row("batches of 100 from the array", f"{rate:.0f} images/s", against, f"{ratio:.0f}", ">= 100")


def deliver_and_watch(path: Path) -> tuple[float, float, float]:
    """images/s of shuffled batches from an array like CelebA's; own memory in MB after 20 batches, and at most."""
    images = np.memmap(path, np.uint8, "r").reshape(CELEBA_SHAPE)
    order = utils.epoch_order(len(images), 0, 0)
    indices = order[: len(order) // 100 * 100].reshape(-1, 100)
    first = most = 0.0
    start = time.perf_counter()
    for n, _ in enumerate(utils.batches(images, indices, torch.device("cpu")), 1):
        if n % 20 == 0:
            most = max(most, status_mb("RssAnon"))
            first = first or most
    return n * 100 / (time.perf_counter() - start), first, most


def celeba_size(bench: Bench) -> Iterator[Row]:
    """An epoch over an array of the size of CelebA."""
    path, rng = bench.folder / "celeba.u8", np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(CELEBA_SHAPE[0]):
            file.write(rng.bytes(64 * 64 * 3))
    rate, first, most = apart(deliver_and_watch, path)
    path.unlink()
    yield Row("an epoch's batches of 100 from 202,599 images (2.5 GB)", f"{rate:.0f} images/s")
    yield Row("own memory (RssAnon) meanwhile, most", f"{most:.0f} MB", f"after 20 batches, {first:.0f} MB")


def training(bench: Bench) -> Iterator[Row]:
    """main.py's own loop against the step alone and against the predecessor's."""
    for mode, demand in (("gan", ">= 1.7 on a CPU"), ("mmd", ">= 1.35 on a CPU")):
        wae, old = bench.wae(f"--mode={mode}"), Predecessor(bench.wae(f"--mode={mode}"))
        images = utils.put_on_device(bench.images, bench.world.device)
        wae.prepare_training()
        x = wae.to_input(bench.batch(100))
        wae.train_step(x, wae.sample_prior(100)), old.step(x.contiguous())
        measure = (partial(loop_rate, bench, wae, images), partial(memory_rate, bench, wae, x))
        rates, ratios = in_turns(bench.rounds, *measure, partial(predecessor_rate, bench, old))
        name, figure = f"training, {mode}, nf {bench.nf}, batch 100", f"{rates[0]:.1f} images/s"
        yield Row(name, figure, f"in memory, {rates[1]:.1f} images/s", f"{ratios[1]:.3f}", ">= 0.97")
        yield Row(name, figure, f"predecessor, {rates[2]:.1f} images/s", f"{ratios[2]:.2f}", demand)


def peak(bench: Bench) -> Iterator[Row]:
    """The operations of a step per second, against those of a matrix product; and where the time goes."""
    size = 8192 if bench.cuda else 2048
    a = torch.randn(size, size, device=bench.world.device)

    def product() -> float:
        torch.set_float32_matmul_precision("high" if bench.cuda else "highest")  # TF32, which convolutions may use
        rate = bench.rate(5 * 2 * size**3, lambda: [a @ a for _ in range(5)])
        torch.set_float32_matmul_precision("highest")
        return rate

    for mode in ("gan", "mmd"):
        wae = bench.wae(f"--mode={mode}")
        wae.prepare_training()
        x, prior = wae.to_input(bench.batch(100)), wae.sample_prior(100)
        with FlopCounterMode(display=False) as counter:
            wae.train_step(x, prior)
        per_image = counter.get_total_flops() / 100
        step = partial(memory_rate, bench, wae, x)
        (rate, best), (_, ratio) = in_turns(bench.rounds, lambda step=step, n=per_image: step() * n, product)
        against = f"{'TF32' if bench.cuda else 'fp32'} product, {best / 1e9:.0f} GFLOP/s"
        name = f"operations of a step, {mode}, nf {bench.nf}"
        yield Row(name, f"{rate / 1e9:.0f} GFLOP/s ({per_image / 1e9:.2f} an image)", against, f"{ratio:.2f}")
        shares = ", ".join(f"{op[:60]} {share:.0%}" for op, share in profiled(bench, wae, x, prior)[0][:6])
        yield Row(f"where the time of a step goes, {mode}", shares)


def profiled(bench: Bench, wae: main.WAE, x: Tensor, prior: Tensor) -> tuple[list[tuple[str, float]], float]:
    """Operators with their shares of the time of a few steps, and the share of time that the GPU is busy."""
    # On a GPU its kernels alone: to record what launches them would take time of its own.
    with profile(activities=[ProfilerActivity.CUDA if bench.cuda else ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for _ in range(bench.steps):
            wae.train_step(x, prior)
        bench.wait()
        wall = time.perf_counter() - start
    events = [e for e in profiler.key_averages() if not e.is_user_annotation]
    if bench.cuda:
        events = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    times = {e.key: e.self_device_time_total if bench.cuda else e.self_cpu_time_total for e in events}
    total = max(sum(times.values()), 1e-9)
    shares = sorted(((key.removeprefix("aten::"), t / total) for key, t in times.items()), key=lambda pair: -pair[1])
    return shares, total / 1e6 / wall


def penalty_alone(n: int, kernel: str, cuda: bool, rounds: int) -> tuple[float, float]:
    """Seconds, and MB at most, of the MMD penalty and its gradient for n codes."""
    device = utils.pick_device(cuda, 0)
    warm = torch.randn(10, 64, device=device, requires_grad=True)
    model.mmd_penalty(warm, torch.randn(10, 64, device=device)).backward()
    codes, prior = torch.randn(n, 64, device=device, requires_grad=True), torch.randn(n, 64, device=device)
    if not cuda:
        Path("/proc/self/clear_refs").write_text("5")  # lets VmHWM start anew
    before = torch.cuda.memory_allocated() / 1e6 if cuda else status_mb("VmRSS")
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        model.mmd_penalty(codes, prior, kernel).backward()
        codes.grad[0, 0].item()
        seconds.append(time.perf_counter() - start)
    most = torch.cuda.max_memory_allocated() / 1e6 if cuda else status_mb("VmHWM")
    return statistics.median(seconds), most - before


def mmd(bench: Bench) -> Iterator[Row]:
    """The MMD penalty alone."""
    for kernel in ("IMQ", "RBF"):
        for n in (100, 1000, 8192):
            seconds, most = apart(penalty_alone, n, kernel, bench.cuda, bench.rounds)
            name, demand = f"MMD penalty, {kernel}, {n:,} codes of 64, with gradient", "<= 1500 MB" if n == 8192 else ""
            yield Row(name, f"{seconds * 1e3:.1f} ms, {most:.0f} MB", demand=demand)


def start_up(bench: Bench) -> Iterator[Row]:
    """From the command to the first training step, against the imports alone."""
    peaks = []

    def command() -> float:
        outf = Path(tempfile.mkdtemp(dir=bench.folder))
        argv = [f"--dataroot={bench.dataroot}", f"--dataset={bench.dataset}", f"--cache_dir={bench.folder}"]
        argv += [f"--nf={bench.nf}", "--print_every=1", f"--outf={outf}"] + ["--cuda"] * bench.cuda
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, REPO / "main.py", *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        log = outf / "log.csv"
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 1):
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        peaks.append(status_mb("VmHWM", process.pid))
        process.kill()
        process.wait()
        return seconds

    def imports() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch, torchvision"], check=True)
        return time.perf_counter() - start

    (seconds, least), (_, ratio) = in_turns(bench.rounds, command, imports)
    against = f"import torch, torchvision, {least:.1f} s"
    yield Row("from the command to the end of the first step", f"{seconds:.1f} s", against, f"{ratio:.2f}")
    yield Row("memory (VmHWM) after the first step", f"{statistics.median(peaks):.0f} MB")


def choices(bench: Bench) -> Iterator[Row]:
    """What fused Adam and channels last are worth."""
    usual, unfused, planes = (bench.wae("--mode=mmd") for _ in range(3))
    unfused.optimizer = torch.optim.Adam(unfused.optimizer.param_groups[0]["params"], 3e-4, betas=(0.5, 0.999))
    for network in planes.networks().values():
        network.to(memory_format=torch.contiguous_format)
    x = usual.to_input(bench.batch(100))
    pairs = [(usual, x), (unfused, x), (planes, x.contiguous())]
    for wae, images in pairs:
        wae.prepare_training()
        wae.train_step(images, wae.sample_prior(100))
    rates, ratios = in_turns(bench.rounds, *(partial(memory_rate, bench, *pair) for pair in pairs))
    figure = f"{rates[0]:.1f} images/s"
    yield Row(f"fused Adam, mmd, nf {bench.nf}", figure, f"unfused, {rates[1]:.1f} images/s", f"{ratios[1]:.2f}")
    yield Row(f"channels last, mmd, nf {bench.nf}", figure, f"contiguous, {rates[2]:.1f} images/s", f"{ratios[2]:.2f}")


def gpu(bench: Bench) -> Iterator[Row]:
    """On a GPU: precision, compilation, batch size, memory, and how busy it is."""
    if not bench.cuda:
        return
    settings = {"fp32": (), "amp": ("--amp",), "amp, compiled": ("--amp", "--compile")}
    for arch, mode, n in itertools.product(("dcgan", "paper"), ("gan", "mmd"), (100, 1024)):
        torch.compiler.reset()  # it compiles a function for a limited number of networks
        flags = (f"--mode={mode}", f"--arch={arch}", f"--batch_size={n}")
        waes = {name: bench.wae(*flags, *more) for name, more in settings.items()}
        images, used = bench.batch(bench.steps * n), {}
        for name, wae in waes.items():
            loop_rate(bench, wae, images)  # in which cuDNN chooses and torch.compile compiles
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            _, busy = profiled(bench, wae, wae.to_input(images[:n]), wae.sample_prior(n))
            most = (torch.cuda.max_memory_allocated() - before) / 1e6
            used[name] = f"{most:.0f} MB in a step, GPU busy {busy:.0%}"
        rates, ratios = in_turns(bench.rounds, *(partial(loop_rate, bench, wae, images) for wae in waes.values()))
        for name, rate, ratio in zip(waes, rates, ratios, strict=True):
            against = f"fp32, {rates[0]:.0f} images/s" if name != "fp32" else ""
            label = f"training, {mode}, {arch}, nf {bench.nf}, batch {n}, {name}"
            yield Row(label, f"{rate:.0f} images/s; {used[name]}", against, f"{1 / ratio:.2f}" if against else "")


# Processes are forked to build the array, and so before anything else has started threads.
ROWS = {f.__name__: f for f in (build, delivery, celeba_size, training, peak, mmd, start_up, choices, gpu)}


# ----------------------------------------------------------------------------------------------------------------------
# The program


def machine() -> str:
    """The machine and the versions, in a line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}, torchvision {torchvision.__version__}"
    return f"{cpu or platform.machine()}, {utils.n_cores()} cores, {device}; {versions}, NumPy {np.__version__}"


def run() -> None:
    """Measures what the command line asks for."""
    if "--train_predecessor" in sys.argv:
        return train_predecessor([a for a in sys.argv[1:] if a != "--train_predecessor"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="train on the GPU")
    parser.add_argument("--dataroot", type=Path, help="folder of folders of images (default: toy faces, made for this)")
    parser.add_argument("--dataset", choices=("celebA", "folder"), default="celebA", help="how they are cut")
    parser.add_argument("--n_images", type=int, default=4000, help="toy faces (default: 4000)")
    parser.add_argument("--nf", type=int, default=128, help="width of the networks (default: 128)")
    parser.add_argument("--only", help=f"rows, with commas between them, of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that a median is of (default: 5)")
    parser.add_argument("--steps", type=int, help="training steps in a round (default: 10, on a GPU 50)")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(ROWS)
    if unknown := set(names) - set(ROWS):
        parser.error(f"--only: no row is called {', '.join(unknown)}")

    torch.backends.cudnn.benchmark = True  # as in main.py
    print(f"{machine()}\n\n| what | measured | compared with | ratio | demanded |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        for name in names:
            for row in ROWS[name](bench):
                print(f"| {' | '.join(row)} |", flush=True)
    return None


if __name__ == "__main__":
    run()
