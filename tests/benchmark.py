"""Measures speed and memory on this machine; run by hand. The table goes to standard output.

    python3 tests/benchmark.py                                 # on toy faces, on the CPU
    python3 tests/benchmark.py --cuda --dataroot=data/celebA   # on a GPU, and row `gpu`
    python3 tests/benchmark.py --only=training,mmd --nf=32     # some of the rows

A figure is a median over rounds. What it is compared with is measured in the same rounds, in turns.
"In memory" is the training step on one batch that stays where it is, recorded on a GPU.
"Predecessor" is the step of telin0411/WAE-PyTorch, with the networks of this project, not recorded.
"""

import argparse
import csv
import gc
import itertools
import multiprocessing
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from statistics import harmonic_mean, median
from subprocess import DEVNULL, Popen
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
import download_datasets  # noqa: E402
import main  # noqa: E402
import model  # noqa: E402
import utils  # noqa: E402


class Predecessor:
    """Each loss has its own encoding, backward pass and Adam step.

    Gradients are set to zero once a step, so that later steps see the sum of what is left.
    """

    def __init__(self, run: main.Run):
        self.run, self.flags, self.encoder = run, run.flags, run.net.encoder
        adam = partial(torch.optim.Adam, lr=self.flags.lr, betas=(self.flags.beta1, 0.999))
        self.adam_encoder, self.adam_penalty = (adam(self.encoder.parameters()) for _ in range(2))
        self.adam_decoder = adam(run.net.decoder.parameters())
        if run.discriminator:
            self.adam_d = adam(run.discriminator.parameters(), lr=self.flags.lr_adv)

    def step(self, x: Tensor) -> None:
        """One step on images (n, C, S, S)."""
        run, weight, d = self.run, self.flags.LAMBDA, self.run.discriminator
        for network in run.networks.values():
            network.zero_grad()
        F.mse_loss(run.net(x)[0], x).backward()
        self.adam_decoder.step()
        self.adam_encoder.step()
        z = run.sample_prior(len(x))
        if self.flags.mode == "mmd":
            (weight * model.sampled_mmd(self.encoder(x)[0], model.Kernel(), z)).backward()
            self.adam_encoder.step()
            return
        self.encoder.eval()
        codes, _ = self.encoder(x)  # not detached: this loss leaves a gradient on the encoder, too
        self.encoder.train()
        (weight * model.discriminator_loss(d(z), d(codes))).backward()
        self.adam_d.step()
        (weight * model.gan_penalty(d, self.encoder(x)[0])).backward()
        self.adam_penalty.step()


class Bench:
    """What all rows share: options, images, and a folder that is removed afterwards."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.folder, self.rounds, self.cuda, self.nf = (
            folder,
            options.rounds,
            options.cuda,
            options.nf,
        )
        self.steps = options.steps or (50 if self.cuda else 10)
        self.dataroot, self.dataset = options.dataroot or folder / "toy", options.dataset
        if not options.dataroot:
            download_datasets.get_toy(folder, 0, 4000)
        self.world = utils.World(0, 1, utils.pick_device(self.cuda, 0))
        how = (self.dataset, 64, None, utils.n_cores(), folder)
        self.array, *_ = utils.load_images(self.dataroot, *how)

    def flags(self, *more: str) -> list[str]:
        """A command line of main.py, which writes to the folder of the benchmark."""
        data = [f"--dataroot={self.dataroot}", f"--dataset={self.dataset}", f"--nf={self.nf}"]
        paths = [f"--cache_dir={self.folder}", f"--outf={tempfile.mkdtemp(dir=self.folder)}"]
        return [*data, *paths, "--niter=1", *["--cuda"] * self.cuda, *more]

    def run(self, *more: str) -> main.Run:
        """Networks and optimisers as main.py makes them."""
        return main.Run(main.get_flags(self.flags(*more))[0], self.world)

    def images(self, n: int) -> utils.Images:
        """n images, on the GPU if there is one; repeated if there are fewer."""
        few = n > len(self.array)
        images = np.resize(self.array, (n, 64, 64, 3)) if few else self.array[:n]
        return utils.put_on_device(images, self.world.device)

    def train(self, run: main.Run, n: int) -> None:
        """main.train on n images, from the first step."""
        run.step, images = 0, self.images(n)
        main.train(run, main.Data(images, images[:2], [], ""))
        # It leaves handlers that end the process at once; the folder would stay.
        utils.handle_signals(signal.default_int_handler)

    def step(self, run: main.Run, record: bool) -> Callable[[], Tensor]:
        """The step of main.train on a batch that stays in memory."""
        n, step = run.flags.batch_size, lambda b, *z: main.train_step(run, run.to_input(b), *z)
        batch = next(utils.batches(self.images(n), [np.arange(n)], self.world.device))
        prior = (run.sample_prior(n),) if run.needs_prior else ()
        return partial(utils.Recorded(step) if record else step, batch, *prior)

    def compare(self, name: str, unit: str, measure: Callable, *others: tuple) -> list[float]:
        """Prints a row for each of the others, which are label, function and target.

        Returns the medians.
        """
        functions = (measure, *(function for _, function, _ in others))
        rounds = [[function() for function in functions] for _ in range(self.rounds)]
        medians = [median(column) for column in zip(*rounds, strict=True)]
        texts = [f"{value:,.{0 if value >= 100 else 2}f} {unit}" for value in medians]
        for i, (label, _, target) in enumerate(others, 1):
            ratio = median(values[0] / values[i] for values in rounds)
            show(name, texts[0], f"{label}: {texts[i]}", f"{ratio:.3g}", target)
        if not others:
            show(name, texts[0])
        return medians


def show(*cells: str) -> None:
    """Prints a row of the table."""
    print("|", " | ".join([*cells, *[""] * (5 - len(cells))]), "|", file=sys.__stdout__, flush=True)


def seconds(function: Callable, times: int = 1) -> float:
    """The seconds that so many calls take, on a GPU too."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(times):
        function()
    wait()
    return time.perf_counter() - start


def resident_mb(pid: int | str = "self") -> float:
    """The most resident memory of a process so far."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1e3


def peak_mb(function: Callable, cuda: bool) -> float:
    """The memory that a function needs: all that PyTorch holds on the GPU, or what this adds."""
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_reserved() / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = resident_mb()
    function()
    return resident_mb() - before


def first_steps(bench: Bench, steps: int) -> tuple[float, float]:
    """Seconds from the command to the end of so many steps, and resident memory by then in MB."""
    outf, start = Path(tempfile.mkdtemp(dir=bench.folder)), time.perf_counter()
    flags, log = bench.flags(f"--outf={outf}", "--print_every=1"), outf / "log.csv"
    with Popen([sys.executable, REPO / "main.py", *flags], stdout=DEVNULL) as process:
        while not (log.exists() and log.read_text().count("\n") > steps):
            if process.poll() is not None:
                sys.exit("main.py ended before its first steps")
            time.sleep(0.01)
        result = time.perf_counter() - start, resident_mb(process.pid)
        process.kill()
    return result


def start(bench: Bench) -> None:
    """What comes before the training."""
    listing = partial(utils.find_images, bench.dataroot)
    bench.compare(f"listing {len(bench.array):,} images", "s", partial(seconds, listing))
    bench.compare("from the command to the first step's end", "s", lambda: first_steps(bench, 1)[0])


def build(bench: Bench) -> None:
    """Decoding once."""
    names, cores = [name for name, *_ in utils.find_images(bench.dataroot)], utils.n_cores()
    crop = utils.CELEBA_CROP if bench.dataset == "celebA" else None

    def speed(n: int, workers: int) -> float:
        images = utils.Decoded([bench.dataroot / name for name in names[:n]], 64, crop, 3)
        array = (bench.folder / "built", images, names[:n], workers)
        return len(images) / seconds(partial(utils.build_array, *array))

    one = ("one core", partial(speed, 1000, 0), f">= {0.85 * cores:.3g}")
    bench.compare(f"decoding, {cores} cores", "images/s", partial(speed, 20_000, cores), one)


def memory(bench: Bench) -> None:
    """Of main.py."""
    most = lambda: first_steps(bench, 3)[1]  # noqa: E731
    bench.compare("resident memory (VmHWM) after three steps", "MB", most)


def training(bench: Bench) -> None:
    """main.train against the step alone."""
    n, every = bench.steps, min(10, bench.steps)

    def loop(run: main.Run) -> float:
        bench.train(run, (every + n) * 100)
        rows = csv.DictReader((run.flags.outf / "log.csv").open())
        # Without the first steps, in which it starts and records.
        return harmonic_mean(
            [float(row["images_per_s"]) for row in rows if row["images_per_s"]][1:]
        )

    for mode in (["--mode=gan"], ["--mode=mmd"]):
        run, old = bench.run(*mode, f"--print_every={every}"), Predecessor(bench.run(*mode))
        step = bench.step(bench.run(*mode), record=bench.cuda)
        old_step = partial(old.step, run.to_input(step.args[0]))
        seconds(step, 4 if bench.cuda else 1)  # in which cuDNN chooses, and it is recorded
        old_step()
        others = (("in memory", step, ">= 0.97"), ("predecessor", old_step, ""))
        others = ((k, lambda f=f: 100 * n / seconds(f, n), target) for k, f, target in others)
        name = f"training, nf {bench.nf}, {mode[0]}"
        bench.compare(name, "images/s", partial(loop, run), *others)


def gpu(bench: Bench) -> None:
    """What bfloat16, compilation, recording and larger batches are worth."""
    rates, precisions = {}, ([], ["--amp"], ["--amp", "--compile"])
    for more, n, mode in itertools.product(precisions * bench.cuda, (100, 1024), ("gan", "mmd")):
        gc.collect()  # the networks of the row before
        torch.compiler.reset()  # each batch size is compiled by itself
        flags, n_steps = (
            (f"--mode={mode}", f"--batch_size={n}", *more),
            max(5, bench.steps * 40 // n),
        )
        run = bench.run(*flags)
        recorded, plain = bench.step(run, True), bench.step(run, False)
        plain()  # in which cuDNN chooses and torch.compile compiles
        memory = [peak_mb(partial(seconds, step, 5), cuda=True) for step in (recorded, plain)]
        recorded, plain = (lambda f=f: n * n_steps / seconds(f, n_steps) for f in (recorded, plain))
        other = (f"not recorded, {memory[1]:,.0f} MB", plain, "")
        name = f"in memory, nf {bench.nf}, {' '.join(flags)}, {memory[0]:,.0f} MB"
        others = [] if n > 100 and "--compile" in more else [other]
        rates[flags] = bench.compare(name, "images/s", recorded, *others)
    # Last, because the profiler may slow down what follows. The kernels of a recorded step are the
    # same, and so their time is measured once.
    for flags, medians in rates.items():
        if "--compile" not in flags:
            run = bench.run(*flags)
            kernels = kernel_seconds(bench.step(run, False)) / run.flags.batch_size
            busy = [f"{kernels * images_per_s:.0%}" for images_per_s in medians]
            show(f"GPU busy, {' '.join(flags)}", busy[0], f"not recorded: {busy[1]}")


def kernel_seconds(step: Callable, n: int = 5) -> float:
    """The seconds of a step in which the GPU computes."""
    step()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds(step, n)
    events = [e for e in profiler.key_averages() if e.device_type == DeviceType.CUDA]
    return sum(e.self_device_time_total for e in events if not e.is_user_annotation) / 1e6 / n


def penalty_alone(name: str, n: int, cuda: bool, rounds: int) -> tuple[float, float]:
    """Milliseconds, and MB, of an MMD and its gradient for n codes."""
    randn = partial(torch.randn, device=utils.pick_device(cuda, 0))

    def step(n: int) -> None:
        prior = [randn(n, 64)] if name == "sampled_mmd" else []
        getattr(model, name)(randn(n, 64, requires_grad=True), model.Kernel(), *prior).backward()

    step(10)
    most = peak_mb(partial(step, n), cuda)
    return median(1e3 * seconds(partial(step, n)) for _ in range(rounds)), most


def mmd(bench: Bench) -> None:
    """The penalties of WAE-MMD, each in a new process: an old one has memory to use again."""
    for name, n in itertools.product(("exact_mmd", "sampled_mmd"), (100, 1000, 4096)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            time_ms, most = pool.apply(penalty_alone, (name, n, bench.cuda, bench.rounds))
        show(f"{name}, {n:,} codes of 64, with gradient", f"{time_ms:,.1f} ms, {most:,.0f} MB")


def checkpoints(bench: Bench) -> None:
    """What a run of short epochs spends in writing checkpoints."""

    def saving() -> float:
        spent, save = [], main.save
        with mock.patch.object(main, "save", lambda *a: spent.append(seconds(partial(save, *a)))):
            bench.train(bench.run("--nf=64", "--batch_size=10", "--niter=20"), 20)
        return sum(spent)

    bench.compare("checkpoints in 20 epochs of two steps, nf 64", "s", saving)


# `build` forks processes, and so it runs before anything has started threads.
ROWS = {row.__name__: row for row in (start, build, memory, training, gpu, mmd, checkpoints)}


def execute() -> None:
    """Does what the command line asks."""
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    add = parser.add_argument
    add("--cuda", action="store_true", help="train on the GPU")
    add("--dataroot", type=Path, help="folder of folders of images (default: 4000 toy faces)")
    add("--dataset", choices=("celebA", "folder"), default="celebA", help="how they are cut")
    add("--nf", type=int, default=128, help="width of the networks (default: 128)")
    add("--only", default=",".join(ROWS), help="rows, with commas between (default: %(default)s)")
    add("--rounds", type=int, default=5, help="rounds that a median is of (default: 5)")
    add("--steps", type=int, help="training steps in a round (default: 10, on a GPU 50)")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(ROWS):
        parser.error(f"--only: no row is called {', '.join(unknown)}")
    torch.backends.cudnn.benchmark = True  # as in main.py
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        bench = Bench(options, Path(folder))
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        device = torch.cuda.get_device_name(0) if options.cuda else cpu[1] if cpu else "CPU"
        show(
            f"{device}, {utils.n_cores()} cores, PyTorch {torch.__version__}",
            "measured",
            "compared with",
            "ratio",
            "target",
        )
        show(*["---"] * 5)
        for name, row in ROWS.items():
            if name in options.only.split(","):
                row(bench)


if __name__ == "__main__":
    execute()
