"""Measures speed and memory on this machine, and prints a table; run by hand.

    python3 tests/benchmark.py                                 # all rows, on toy faces, on the CPU
    python3 tests/benchmark.py --cuda --dataroot=data/celebA   # all rows, with training on a GPU
    python3 tests/benchmark.py --only=training,mmd --nf=32     # some of them
    python3 tests/benchmark.py --train_predecessor --dataroot=data/celebA --mode=gan --outf=old

A figure is a median over rounds. What it is compared with is measured in the same rounds, in turns,
and the ratio is the median of the rounds' ratios. "In memory" is the same training step on one
batch that stays where it is. "Predecessor" is the schedule of telin0411/WAE-PyTorch, with the
networks of this project. `--train_predecessor` trains by that and takes the flags of main.py.
"""

import argparse
import io
import itertools
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from functools import partial
from pathlib import Path
from statistics import median
from subprocess import DEVNULL, PIPE, Popen
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor
from tqdm import tqdm

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
import download_datasets  # noqa: E402
import main  # noqa: E402
import model  # noqa: E402
import utils  # noqa: E402

CELEBA_SHAPE = (202_599, 64, 64, 3)
CPU = torch.device("cpu")


class Predecessor:
    """Trains networks as telin0411/WAE-PyTorch does: each loss has its encoding and backward pass.

    Gradients are set to zero once, at the beginning of a step, so that the encoder's last Adam step
    sees the sum of what all the backward passes left. The reconstruction loss is a mean over
    pixels. The rates are constant.
    """

    def __init__(self, run: main.Run):
        self.run, flags, net = run, run.flags, run.net
        adam = partial(torch.optim.Adam, betas=(flags.beta1, 0.999))
        self.adam_encoder = adam(net.encoder.parameters(), lr=flags.lr)
        self.adam_decoder = adam(net.decoder.parameters(), lr=flags.lr)
        if flags.mode == "gan":
            self.adam_discriminator = adam(run.discriminator.parameters(), lr=flags.lr_adv)
            self.adam_penalty = adam(net.encoder.parameters(), lr=flags.lr)

    def encode(self, x: Tensor) -> Tensor:
        """Codes (n, nz) of images (n, 3, S, S)."""
        with self.run.autocast():
            return model.draw_code(*self.run.net.encoder(x))

    def step(self, x: Tensor) -> None:
        """One step on images (n, 3, S, S)."""
        run, flags, net = self.run, self.run.flags, self.run.net
        x = x.to(run.world.device)
        for network in run.networks.values():
            network.zero_grad()
        with run.autocast():
            y, *_ = net(x)
        F.mse_loss(y, x).backward()
        self.adam_decoder.step()
        self.adam_encoder.step()

        z = run.sample_prior(len(x))
        if flags.mode == "mmd":
            how = (flags.kernel, flags.pz_scale, flags.imq_scales)
            (flags.LAMBDA * model.mmd_penalty(self.encode(x), z, *how)).backward()
            self.adam_encoder.step()
            return
        net.encoder.eval()
        codes = self.encode(x)  # not detached: this loss leaves a gradient on the encoder, too
        net.encoder.train()
        loss_d = model.discriminator_loss(run.discriminator(z), run.discriminator(codes))
        (flags.LAMBDA * loss_d).backward()
        self.adam_discriminator.step()
        (flags.LAMBDA * F.softplus(-run.discriminator(self.encode(x))).mean()).backward()
        self.adam_penalty.step()


def train_predecessor(run: main.Run, images: Any, test: Any, data: dict, checkpoint: Any) -> int:
    """Trains by the predecessor's schedule, in place of main.train.

    Batches, layout and --amp are main.py's. Leaves a grid of samples and a checkpoint, so that
    `main.py --outf=... --evaluate` works.
    """
    flags, world = run.flags, run.world
    if flags.mode == "vae" or checkpoint:
        raise utils.UsageError("--train_predecessor has no --mode=vae, and continues no run")
    log = main.start_log(run, images, "", 0)
    if flags.e_pretrain:
        main.pretrain_encoder(run, images)
    predecessor, end = Predecessor(run), flags.niter * (len(images) // flags.batch_size)
    indices = main.batch_indices(len(images), range(end), flags, world)
    for batch in tqdm(utils.batches(images, indices, world.device), total=end, unit="step"):
        predecessor.step(run.to_input(batch))

    main.refresh_batch_norm(run, images)
    main.save(run, end, float("inf"), log, data, main.CHECKPOINT)
    path = flags.outf / f"fake_samples_epoch_{flags.niter:03d}.png"
    utils.save_picture(path, main.sample_grids(run, test)["fake_samples"])
    return 0


class Bench:
    """What all rows share: options, images, and a folder that is removed afterwards."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.folder, self.rounds, self.cuda = folder, options.rounds, options.cuda
        self.nf, self.steps = options.nf, options.steps or (50 if options.cuda else 10)
        self.dataset, self.dataroot = options.dataset, options.dataroot
        self.world = utils.World(0, 1, utils.pick_device(options.cuda, 0))
        if self.dataroot is None:
            self.dataset, self.dataroot = "celebA", folder / "toy"
            download_datasets.get_toy(folder, 0, 4000)
        how = (64, None, utils.n_cores(), folder)
        self.images, _ = utils.load_images(self.dataroot, self.dataset, *how)

    def run(self, *argv: str, layout: torch.memory_format = torch.channels_last) -> main.Run:
        """Networks and optimisers as main.py makes them for these flags, ready to train."""
        outf = tempfile.mkdtemp(dir=self.folder)
        given = [f"--dataroot={self.dataroot}", f"--outf={outf}", f"--nf={self.nf}", "--niter=1"]
        flags, _ = main.get_flags([*given, *["--cuda"] * self.cuda, *argv])
        run = main.Run(flags, self.world)
        run.net.to(memory_format=layout)
        run.wrap()
        return run

    def batch(self, n: int) -> Tensor:
        """n images on the device, uint8 (n, 64, 64, 3)."""
        return torch.from_numpy(np.resize(self.images, (n, 64, 64, 3))).to(self.world.device)

    def compare(self, name: str, measure: Callable, *others: tuple, unit: str = "images/s") -> None:
        """Prints a row for each of the others: a label, a function to compare with, a demand."""
        functions = (measure, *(function for _, function, _ in others))
        rounds = [[function() for function in functions] for _ in range(self.rounds)]
        first, *columns = zip(*rounds, strict=True)
        for (label, _, demand), column in zip(others, columns, strict=True):
            ratio = median(a / b for a, b in zip(first, column, strict=True))
            against = f"{label}, {median(column):,.1f} {unit}"
            show(name, f"{median(first):,.1f} {unit}", against, f"{ratio:.3g}", demand)


def show(name: str, figure: str, compared: str = "", ratio: str = "", demand: str = "") -> None:
    """Prints a row of the table."""
    print(f"| {name} | {figure} | {compared} | {ratio} | {demand} |", flush=True)


def rate(n: float, function: Callable) -> float:
    """n by the seconds that the function takes, on a GPU too."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return n / (time.perf_counter() - start)


def status_mb(key: str, pid: int | str = "self") -> float:
    """A line of /proc/PID/status in MB: RssAnon, its own memory; VmHWM, the most so far of all."""
    return int(re.search(rf"{key}:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1e3


def apart(function: Callable, *arguments: object) -> tuple:
    """The value of a function called in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def loop_rate(bench: Bench, run: main.Run, images: utils.Images) -> float:
    """images/s of main.train from the first step to the last of an epoch, as its log tells it."""
    n = run.flags.batch_size
    run.flags.print_every = steps = min(bench.steps, len(images) // n)
    # It ends where the evaluation would begin, and its handlers of signals are not installed.
    end = mock.patch.object(main, "refresh_batch_norm", side_effect=InterruptedError)
    with end, mock.patch("signal.signal"), suppress(InterruptedError):
        main.train(run, images[: steps * n], images[:2], {}, None)
    row = (run.flags.outf / "log.csv").read_text().splitlines()[1].split(",")
    return float(row[main.COLUMNS.index("images_per_s")])


def memory_rate(bench: Bench, run: main.Run, x: Tensor, worth: float = 1) -> float:
    """images/s, or `worth` times as much, of the training step on a batch that stays in memory."""
    prior, n = run.sample_prior(len(x)), bench.steps
    return rate(n * len(x) * worth, lambda: [main.train_step(run, x, prior) for _ in range(n)])


def array_rate(images: np.ndarray, epochs: int, use: Callable) -> float:
    """images/s of shuffled batches of 100 on the CPU, as main.train has them."""
    flags, steps = argparse.Namespace(batch_size=100, seed=0), range(epochs * (len(images) // 100))
    indices = main.batch_indices(len(images), steps, flags, utils.World(0, 1, CPU))
    return rate(len(steps) * 100, lambda: [use(b) for b in utils.batches(images, indices, CPU)])


def files_rate(bench: Bench, n: int, use: Callable) -> float:
    """images/s of n shuffled batches of 100 from the files, decoded every time by one process."""
    crop = [CenterCrop(utils.CELEBA_CROP)] if bench.dataset == "celebA" else []
    transform = Compose([*crop, Resize(64), CenterCrop(64), ToTensor()])
    images = ImageFolder(str(bench.dataroot), transform)
    loader = DataLoader(images, 100, shuffle=True, num_workers=1, drop_last=True)
    batches, n = iter(loader), min(n, len(loader) - 1)
    next(batches)  # for which the process starts
    return rate(100 * n, lambda: [use(next(batches)[0]) for _ in range(n)])


def build(bench: Bench) -> None:
    """Decoding once, with all cores, against as many times what one core decodes."""
    crop, cores = utils.CELEBA_CROP if bench.dataset == "celebA" else None, utils.n_cores()
    names = [name for name, _, _ in utils.find_images(bench.dataroot)][:20_000]
    some = [bench.dataroot / name for name in names[:1000]]
    array = (bench.folder / "built.npy", bench.dataroot, names, 64, crop, cores)
    all_cores = partial(rate, len(names), lambda: utils.build_array(*array))
    decode = partial(utils.decode_image, size=64, crop=crop)
    one_core = partial(rate, len(some) * cores, lambda: [decode(path) for path in some])
    other = (f"{cores} x one core's decoding", one_core, ">= 0.85")
    bench.compare("building the array, all cores", all_cores, other)


def delivery(bench: Bench) -> None:
    """Shuffled batches of 100, from the array and from the files."""
    other = ("ImageFolder, one worker", partial(files_rate, bench, 10, len), ">= 100")
    array = partial(array_rate, bench.images, 10, len)
    bench.compare("batches of 100 from the array", array, other)


def watch_delivery(path: Path) -> tuple[float, float, float]:
    """images/s of an epoch of such batches; own memory in MB after 20 of them, and at most."""
    images, used = np.memmap(path, np.uint8, "r", shape=CELEBA_SHAPE), []
    n = itertools.count()
    note = lambda _: next(n) % 20 or used.append(status_mb("RssAnon"))  # noqa: E731
    return array_rate(images, 1, note), used[1], max(used)


def celeba_size(bench: Bench) -> None:
    """An epoch over an array of the size of CelebA."""
    path, rng = bench.folder / "celeba.u8", np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(CELEBA_SHAPE[0]):
            file.write(rng.bytes(64 * 64 * 3))
    speed, first, most = apart(watch_delivery, path)
    path.unlink()
    show("batches of 100 from an array of 202,599 images (2.5 GB)", f"{speed:,.0f} images/s")
    show("own memory (RssAnon) meanwhile, most", f"{most:.0f} MB", f"at first {first:.0f} MB")


def training(bench: Bench) -> None:
    """main.py's own loop against the step alone and against the predecessor's."""
    images = utils.put_on_device(bench.images, bench.world.device)
    for mode, demand in (("gan", ">= 1.7 on a CPU"), ("mmd", ">= 1.35 on a CPU")):
        run = bench.run(f"--mode={mode}")
        old = Predecessor(bench.run(f"--mode={mode}", layout=torch.contiguous_format))
        x = run.to_input(bench.batch(100))
        main.train_step(run, x, run.sample_prior(100))
        old.step(x.contiguous())
        bench.compare(
            f"training, {mode}, nf {bench.nf}, batch 100",
            partial(loop_rate, bench, run, images),
            ("in memory", partial(memory_rate, bench, run, x), ">= 0.97"),
            ("predecessor", partial(files_rate, bench, bench.steps, old.step), demand),
        )


def peak(bench: Bench) -> None:
    """The operations of a step per second, against those of a matrix product."""
    size = 8192 if bench.cuda else 2048
    a = torch.randn(size, size, device=bench.world.device)

    def product() -> float:
        # TF32 on a GPU, which convolutions may use.
        torch.set_float32_matmul_precision("high" if bench.cuda else "highest")
        speed = rate(5 * 2 * size**3 / 1e9, lambda: [a @ a for _ in range(5)])
        torch.set_float32_matmul_precision("highest")
        return speed

    for mode in ("gan", "mmd"):
        run = bench.run(f"--mode={mode}")
        x = run.to_input(bench.batch(100))
        with FlopCounterMode(display=False) as counter:
            main.train_step(run, x, run.sample_prior(100))
        giga = counter.get_total_flops() / 100 / 1e9  # for an image
        name = f"operations of a step, {mode}, nf {bench.nf}, {giga:.2f} GFLOP an image"
        other = ("a matrix product", product, "")
        bench.compare(name, partial(memory_rate, bench, run, x, giga), other, unit="GFLOP/s")


def penalty_alone(n: int, kernel: str, cuda: bool, rounds: int) -> tuple[float, float]:
    """Seconds, and MB at most, of the MMD penalty and its gradient for n codes."""
    randn = partial(torch.randn, device=utils.pick_device(cuda, 0))
    model.mmd_penalty(randn(10, 64, requires_grad=True), randn(10, 64)).backward()
    codes, prior = randn(n, 64, requires_grad=True), randn(n, 64)
    if not cuda:
        Path("/proc/self/clear_refs").write_text("5")  # lets VmHWM start anew
    before = torch.cuda.memory_allocated() / 1e6 if cuda else status_mb("VmRSS")
    step = partial(rate, 1, lambda: model.mmd_penalty(codes, prior, kernel).backward())
    seconds = median(1 / step() for _ in range(rounds))
    most = torch.cuda.max_memory_allocated() / 1e6 if cuda else status_mb("VmHWM")
    return seconds, most - before


def mmd(bench: Bench) -> None:
    """The MMD penalty alone."""
    for kernel, n in itertools.product(("IMQ", "RBF"), (100, 1000, 8192)):
        seconds, most = apart(penalty_alone, n, kernel, bench.cuda, bench.rounds)
        name = f"MMD penalty, {kernel}, {n:,} codes of 64, with gradient"
        show(name, f"{seconds * 1e3:.1f} ms, {most:.0f} MB", "", "", "<= 1500 MB" * (n == 8192))


def start_up(bench: Bench) -> None:
    """From the command to the end of the first training step, against the imports alone."""
    argv = [f"--dataroot={bench.dataroot}", f"--dataset={bench.dataset}", f"--nf={bench.nf}"]
    argv += [f"--cache_dir={bench.folder}", "--print_every=1", *["--cuda"] * bench.cuda]
    peaks = []

    def command() -> float:
        outf = Path(tempfile.mkdtemp(dir=bench.folder))
        log, start = outf / "log.csv", time.perf_counter()
        arguments = [sys.executable, REPO / "main.py", *argv, f"--outf={outf}"]
        with Popen(arguments, stdout=DEVNULL, stderr=PIPE) as process:
            while not (log.exists() and log.read_text().count("\n") > 1):
                if process.poll() is not None:
                    raise RuntimeError(process.stderr.read().decode())
                time.sleep(0.01)
            seconds = time.perf_counter() - start
            peaks.append(status_mb("VmHWM", process.pid))
            process.kill()
        return seconds

    imports = [sys.executable, "-c", "import torch, torchvision"]
    other = (imports[2], lambda: 1 / rate(1, lambda: Popen(imports).wait()), "")
    bench.compare("from the command to the first step's end", command, other, unit="s")
    show("memory (VmHWM) after the first step", f"{median(peaks):.0f} MB")


def gpu(bench: Bench) -> None:
    """On a GPU: what bfloat16, compilation and larger batches are worth, and memory in a step."""
    sizes = (100, 1024) if bench.cuda else ()
    for arch, mode, n in itertools.product(("dcgan", "paper"), ("gan", "mmd"), sizes):
        torch.compiler.reset()  # it compiles a function for a limited number of networks
        images, loops = bench.batch(bench.steps * n), {}
        for more in ((), ("--amp",), ("--amp", "--compile")):
            flags = (f"--mode={mode}", f"--arch={arch}", f"--batch_size={n}", *more)
            loop = partial(loop_rate, bench, bench.run(*flags), images)
            loop()  # in which cuDNN chooses and torch.compile compiles
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            loop()
            most = (torch.cuda.max_memory_allocated() - before) / 1e6
            used = f"{most:.0f} MB in a step, GPU busy {busy(bench, flags):.0%}"
            loops[f"training, nf {bench.nf}, {' '.join(flags)}; {used}"] = loop
        for name, loop in loops.items():
            bench.compare(name, loop, ("float32", next(iter(loops.values())), ""))


def busy(bench: Bench, flags: tuple[str, ...]) -> float:
    """The share of time for which kernels run on the GPU in a row of training steps."""
    run = bench.run(*flags)
    x = run.to_input(bench.batch(run.flags.batch_size))
    memory_rate(bench, run, x)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds = bench.steps * len(x) / memory_rate(bench, run, x)
    kernels = [e for e in profiler.key_averages() if e.device_type == DeviceType.CUDA]
    return sum(e.self_device_time_total for e in kernels) / 1e6 / seconds


# Processes are forked to build the array, and so before anything else has started threads.
ROWS = (build, delivery, celeba_size, training, peak, mmd, start_up, gpu)


def execute() -> int:
    """Does what the command line asks. Returns the exit status."""
    if "--train_predecessor" in sys.argv:
        sys.argv.remove("--train_predecessor")
        sys.argv.append("--ngpu=1")  # several processes would run main.py itself
        main.train = train_predecessor
        return main.main()
    rows, how = {row.__name__: row for row in ROWS}, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    add = parser.add_argument
    add("--cuda", action="store_true", help="train on the GPU")
    add("--dataroot", type=Path, help="folder of folders of images (default: 4000 toy faces)")
    add("--dataset", choices=("celebA", "folder"), default="celebA", help="how they are cut")
    add("--nf", type=int, default=128, help="width of the networks (default: 128)")
    add("--only", default=",".join(rows), help="rows, with commas between (default: %(default)s)")
    add("--rounds", type=int, default=5, help="rounds that a median is of (default: 5)")
    add("--steps", type=int, help="training steps in a round (default: 10, on a GPU 50)")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(rows):
        parser.error(f"--only: no row is called {', '.join(unknown)}")
    torch.backends.cudnn.benchmark = True  # as in main.py
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    device = torch.cuda.get_device_name(0) if options.cuda else "no GPU"
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):  # no bars
        bench = Bench(options, Path(folder))
        print(f"{cpu[1] if cpu else 'CPU'}, {utils.n_cores()} cores, {device}; ", end="")
        print(f"PyTorch {torch.__version__}, torchvision {torchvision.__version__}\n")
        show("what", "measured", "compared with", "ratio", "demanded")
        show(*["---"] * 5)
        for name in names:
            rows[name](bench)
    return 0


if __name__ == "__main__":
    sys.exit(execute())
