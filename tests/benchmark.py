"""Measures speed and memory on this machine; run by hand. The table goes to standard output.

    python3 tests/benchmark.py                                 # on toy faces, on the CPU
    python3 tests/benchmark.py --cuda --dataroot=data/celebA   # on a GPU
    python3 tests/benchmark.py --only=training,mmd --nf=32     # some of the rows

A figure is a median over rounds. A row with a dash is measured in turns with the row above without
one; the ratio is that row's figure divided by this one's. In memory: the step on one batch that
stays where it is, recorded on a GPU (if that fails, standard error says so). Predecessor: such a
step as that of telin0411/WAE-PyTorch, not recorded. Memory of a GPU is all that PyTorch holds.
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
from statistics import median
from subprocess import DEVNULL, Popen
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import download_datasets  # noqa: E402
import main  # noqa: E402
import model  # noqa: E402
import utils  # noqa: E402


class Predecessor:
    """Trains by an encoding, a backward pass and an Adam step for each loss."""

    def __init__(self, run: main.Run):
        self.run, encoder = run, run.net.encoder
        parts = run.networks | {"encoder": encoder, "decoder": run.net.decoder, "penalty": encoder}
        adam = partial(torch.optim.Adam, lr=run.flags.lr, betas=(run.flags.beta1, 0.999))
        self.adam = {name: adam(part.parameters()) for name, part in parts.items()}

    def step(self, x: Tensor) -> None:
        """One step on images (n, C, S, S)."""
        encoder, d, weight = self.run.net.encoder, self.run.discriminator, self.run.flags.LAMBDA
        for network in self.run.networks.values():
            network.zero_grad()  # once: each Adam step sees all that was left since
        F.mse_loss(self.run.net(x)[0], x).backward()
        self.adam["decoder"].step()
        self.adam["encoder"].step()
        z = self.run.sample_prior(len(x))
        if d is None:
            (weight * model.sampled_mmd(encoder(x)[0], model.Kernel(), z)).backward()
            self.adam["encoder"].step()
            return
        encoder.eval()
        codes, _ = encoder(x)  # not detached: this loss leaves a gradient on the encoder, too
        encoder.train()
        (weight * model.discriminator_loss(d(z), d(codes))).backward()
        self.adam["discriminator"].step()
        (weight * model.gan_penalty(d, encoder(x)[0])).backward()
        self.adam["penalty"].step()


class Bench:
    """What all rows share: options, images, and a folder that is removed afterwards."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder, self.cuda = options, folder, options.cuda
        self.steps = options.steps or (50 if self.cuda else 10)
        self.dataroot = options.dataroot or folder / "toy"
        if not options.dataroot:
            download_datasets.get_toy(folder, 4000)
        data = {"dataroot": self.dataroot, "dataset": options.dataset, "cache_dir": folder}
        flags = data | {"nf": options.nf, "niter": 1}
        self.flags = [*(f"--{k}={v}" for k, v in flags.items()), *["--cuda"] * self.cuda]
        self.world = utils.World(0, 1, utils.pick_device(self.cuda, 0))
        images, *_ = utils.load_images(**data, workers=utils.n_cores())
        n = max(2000, 100 * (self.steps + 10))
        images = images[:n] if len(images) >= n else np.resize(images, (n, 64, 64, 3))
        self.images = utils.put_on_device(images, self.world.device)

    def run(self, *flags: str) -> main.Run:
        """Networks and optimisers as main.py makes them."""
        outf = tempfile.mkdtemp(dir=self.folder)
        return main.Run(main.get_flags([*self.flags, f"--outf={outf}", *flags])[0], self.world)

    def train(self, run: main.Run, n: int) -> None:
        """main.train on n images, from the first step."""
        run.step = 0
        main.train(run, main.Data(self.images[:n], self.images[:2], [], ""))
        # It leaves handlers that end the process at once; the folder would stay.
        utils.handle_signals(signal.default_int_handler)

    def step(self, run: main.Run, record: bool) -> Callable[[], Tensor]:
        """The step of main.train on a batch that stays in memory."""
        n, step = run.flags.batch_size, lambda b, *z: main.train_step(run, run.to_input(b), *z)
        batch = next(utils.batches(self.images, [np.arange(n)], self.world.device))
        prior = (run.sample_prior(n),) if run.needs_prior else ()
        return partial(utils.Recorded(step) if record else step, batch, *prior)

    def compare(self, unit: str, functions: dict[str, Callable[[], float]]) -> list[float]:
        """Prints a row for each function. Returns the medians."""
        rounds = [[f() for f in functions.values()] for _ in range(self.options.rounds)]
        medians = [median(column) for column in zip(*rounds, strict=True)]
        for i, (name, value) in enumerate(zip(functions, medians, strict=True)):
            ratio = f"{median(values[0] / values[i] for values in rounds):.3g}" if i else ""
            show(name, f"{value:,.{0 if value >= 100 else 2}f} {unit}", ratio)
        return medians


def show(name: str, figure: str, ratio: str = "") -> None:
    """Prints a row of the table."""
    print(f"| {name} | {figure} | {ratio} |", file=sys.__stdout__, flush=True)


def seconds(function: Callable, times: int = 1) -> float:
    """The seconds that so many calls take, on a GPU too."""
    begin = time.perf_counter()
    for _ in range(times):
        function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def rate(function: Callable, images: int, times: int = 1) -> float:
    """images/s of so many calls, each for so many images."""
    return images * times / seconds(function, times)


def resident_mb(pid: int | str = "self") -> float:
    """The most resident memory of a process so far."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1e3


def start(bench: Bench) -> None:
    """What comes before the training, and the memory that the first step takes."""
    listing, memory = partial(utils.find_images, bench.dataroot), []

    def first_step() -> float:
        log, begin = Path(tempfile.mkdtemp(dir=bench.folder)) / "log.csv", time.perf_counter()
        flags = [*bench.flags, f"--outf={log.parent}", "--print_every=1"]
        with Popen([sys.executable, main.__file__, *flags], stdout=DEVNULL) as process:
            while process.poll() is None and not (log.exists() and "\n1,1," in log.read_text()):
                time.sleep(0.01)
            taken = time.perf_counter() - begin
            memory.append(resident_mb(process.pid))
            process.kill()
        return taken

    bench.compare("s", {f"listing {len(listing()):,} images": partial(seconds, listing)})
    bench.compare("s", {"from the command to the end of the first step": first_step})
    show("resident memory by then (VmHWM)", f"{median(memory):,.0f} MB")


def build(bench: Bench) -> None:
    """Decoding once."""
    names, n = [name for name, *_ in utils.find_images(bench.dataroot)][:10_000], utils.n_cores()
    crop = utils.CELEBA_CROP if bench.options.dataset == "celebA" else None
    images = utils.Decoded([bench.dataroot / name for name in names], 64, crop, 3)
    decode = partial(utils.build_array, bench.folder / "built", images, names)
    every, one = (partial(rate, partial(decode, workers), len(names)) for workers in (n, 0))
    bench.compare("images/s", {f"decoding once, {n} cores": every, "- one core": one})


def training(bench: Bench) -> None:
    """The loop, against its step and the predecessor's."""

    def loop(run: main.Run) -> float:
        bench.train(run, len(bench.images))
        log = csv.DictReader((run.flags.outf / "log.csv").read_text().splitlines())
        rates = [float(row["images_per_s"]) for row in log if row["images_per_s"]]
        return median(rates[1:])  # in the first steps it starts, and records

    for mode in ("--mode=gan", "--mode=mmd"):
        run, old = bench.run(mode), Predecessor(bench.run(mode))
        functions = {f"training, {mode}": partial(loop, run)}
        step = bench.step(bench.run(mode), record=bench.cuda)
        old_step = partial(old.step, run.to_input(step.args[0]))
        for label, each in (("in memory (at least 0.97)", step), ("predecessor", old_step)):
            seconds(each, utils.Recorded.WARM_UP + 1)  # cuDNN chooses, and the step is recorded
            functions[f"- {label}"] = partial(rate, each, 100, bench.steps)
        bench.compare("images/s", functions)


def gpu(bench: Bench) -> None:
    """What bfloat16, compilation, recording and larger batches are worth."""
    speeds, precisions = {}, ([], ["--amp"], ["--amp", "--compile"]) if bench.cuda else ()
    for more, n, mode in itertools.product(precisions, (100, 1024), ("gan", "mmd")):
        torch.compiler.reset()  # a batch size is compiled by itself
        flags, functions = (f"--mode={mode}", f"--batch_size={n}", *more), {}
        run, times = bench.run(*flags), max(5, bench.steps * 40 // n)
        bench.step(run, record=False)()  # cuDNN chooses, torch.compile compiles
        for record in (False, True):  # so that the first has no memory of a graph
            step = bench.step(run, record)
            gc.collect()  # the networks of the row before
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            seconds(step, utils.Recorded.WARM_UP + 1)
            used = f"{torch.cuda.max_memory_reserved() / 1e6:,.0f} MB"
            name = f"in memory, {' '.join(flags)}, {used}" if record else f"- not recorded, {used}"
            functions = {name: partial(rate, step, n, times)} | functions
        speeds[flags] = bench.compare("images/s", functions)
    # Last, because the profiler may slow down what follows. The kernels of a recorded step are the
    # same, and so it looks at the step as it is.
    for flags, (recorded, plain) in speeds.items():
        if "--compile" not in flags:
            run = bench.run(*flags)
            seconds(step := bench.step(run, record=False))
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                seconds(step, 5)
            events = [e for e in profiler.key_averages() if e.device_type == DeviceType.CUDA]
            time_us = sum(e.self_device_time_total for e in events if not e.is_user_annotation)
            image_s = time_us / 1e6 / 5 / run.flags.batch_size
            busy = f"{image_s * recorded:.0%}, not recorded {image_s * plain:.0%}"
            show(f"GPU busy, {' '.join(flags)}", busy)


def penalty_alone(name: str, n: int, cuda: bool, rounds: int) -> tuple[float, float]:
    """Milliseconds, and MB, of an MMD and its gradient for n codes, in a new process."""
    randn = partial(torch.randn, device=utils.pick_device(cuda, 0))

    def step(n: int) -> None:
        prior = [randn(n, 64)] if name == "sampled_mmd" else []
        getattr(model, name)(randn(n, 64, requires_grad=True), model.Kernel(), *prior).backward()

    step(10)
    before = resident_mb()
    step(n)
    most = torch.cuda.max_memory_allocated() / 1e6 if cuda else resident_mb() - before
    return median(1e3 * seconds(partial(step, n)) for _ in range(rounds)), most


def mmd(bench: Bench) -> None:
    """The penalties of WAE-MMD."""
    for n, name in itertools.product((100, 1000, 4096), ("exact_mmd", "sampled_mmd")):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            how = (name, n, bench.cuda, bench.options.rounds)
            time_ms, most = pool.apply(penalty_alone, how)
        show(f"{name}, {n:,} codes of 64, with gradient", f"{time_ms:,.1f} ms, {most:,.0f} MB")


def checkpoints(bench: Bench) -> None:
    """What a run of short epochs spends in writing checkpoints."""

    def saving() -> float:
        short = ("--nf=64", "--batch_size=10", "--niter=20", "--sample_every=20")
        spent, save = [], main.save
        with mock.patch.object(main, "save", lambda *a: spent.append(seconds(partial(save, *a)))):
            bench.train(bench.run(*short), 20)
        return sum(spent)

    bench.compare("s", {"checkpoints in 20 epochs of two steps, nf 64": saving})


# `build` forks processes, and so it runs before anything has started threads.
ROWS = {row.__name__: row for row in (start, build, training, gpu, mmd, checkpoints)}


def execute() -> None:
    """Does what the command line asks."""
    parser = argparse.ArgumentParser(usage=__doc__)
    add = parser.add_argument
    add("--cuda", action="store_true", help="train on the GPU")
    add("--dataroot", type=Path, help="folder of folders of images (default: 4000 toy faces)")
    add("--dataset", choices=("celebA", "folder"), default="celebA", help="how they are cut")
    add("--nf", type=int, default=128, help="width of the networks (default: 128)")
    add("--only", default=",".join(ROWS), help="rows, with commas between (default: %(default)s)")
    add("--rounds", type=int, default=5, help="rounds that a median is of (default: 5)")
    add("--steps", type=int, help="training steps in a round (default: 10, on a GPU 50)")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - ROWS.keys():
        parser.error(f"--only: no row is called {', '.join(unknown)}")
    torch.backends.cudnn.benchmark = True  # as in main.py
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        bench = Bench(options, Path(folder))
        device = torch.cuda.get_device_name(0) if options.cuda else "no GPU"
        machine = f"{utils.n_cores()} cores, {device}, PyTorch {torch.__version__}"
        show(f"{machine}; --nf={options.nf}", "measured", "ratio")
        show("---", "---", "---")
        for name, row in ROWS.items():
            if name in options.only.split(","):
                row(bench)


if __name__ == "__main__":
    execute()
