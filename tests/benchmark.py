"""Measures speed and memory on this machine; run by hand. The table goes to standard output.

    python3 tests/benchmark.py                                 # on toy faces, on the CPU
    python3 tests/benchmark.py --cuda --dataroot=data/celebA   # on a GPU
    python3 tests/benchmark.py --only=training,mmd --nf=32     # some of the rows

A figure is a median over rounds. A row with a dash is measured in turns with the row above it, and
its ratio is that row's figure divided by its own. In memory: the step on one batch that stays where
it is, on a GPU recorded as a graph. Memory of a GPU is all that PyTorch holds.
"""

import argparse
import csv
import gc
import itertools
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import download_datasets  # noqa: E402
import main  # noqa: E402
import model  # noqa: E402
import utils  # noqa: E402


class EndOfEpoch(Exception):
    """Ends main.train where it would evaluate."""


class Bench:
    """What all rows share: options, images, and a folder that is removed afterwards."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder = options, folder
        self.steps = options.steps or (50 if options.cuda else 10)
        self.world = utils.World(0, 1, utils.pick_device(options.cuda, 0))
        dataroot = options.dataroot or folder / "toy"
        if not options.dataroot:
            download_datasets.get_toy(folder, 4000)
        crop = utils.CELEBA_CROP if options.dataset == "celebA" else None
        images = utils.load_images(dataroot, None, 64, crop, 3, folder).images
        n = max(2000, 100 * (self.steps + 10))
        images = images[:n] if len(images) >= n else np.resize(images, (n, 64, 64, 3))
        rows = np.arange(n)
        images = utils.put_on_device(images, self.world.device)
        self.data = utils.Data(images, [""] * n, rows, rows, rows[:2], "")

    def run(self, *flags: str) -> main.Run:
        """Networks and optimisers as main.py makes them."""
        argv = [f"--dataroot={self.folder}", f"--outf={tempfile.mkdtemp(dir=self.folder)}"]
        argv += [f"--nf={self.options.nf}", "--niter=1", "--no-e_pretrain", *flags]
        argv += ["--cuda"] if self.options.cuda else []
        run = main.Run(main.complete(vars(main.get_parser().parse_args(argv))), self.world)
        run.net.train()
        return run

    def loop(self, run: main.Run) -> float:
        """The images/s of an epoch of main.train after its first rows, in which it records."""
        run.step, run.epoch, run.log = 0, 0, utils.Log(main.COLUMNS)
        end = mock.patch.object(main, "end_epoch", side_effect=EndOfEpoch)
        with end, suppress(EndOfEpoch):
            main.train(run, self.data)
        log = csv.DictReader((run.flags.outf / "log.csv").read_text().splitlines())
        images = [(run.flags.batch_size * int(r["step"]), float(r["images_per_s"])) for r in log]
        (first, first_rate), (last, last_rate) = images[0], images[-1]
        return (last - first) / (last / last_rate - first / first_rate)

    def step(self, run: main.Run, record: bool) -> Callable[[], torch.Tensor]:
        """The step of main.train on a batch that stays in memory."""
        rows = np.arange(run.flags.batch_size)
        batch = next(utils.batches(self.data.images, [rows], self.world.device))
        step = partial(main.Step(run), batch, run.net.sample_prior(len(rows)))
        return utils.Recorded(step) if record else step

    def compare(self, unit: str, functions: dict[str, Callable[[], float]]) -> None:
        """Prints a row for each function."""
        rounds = [[f() for f in functions.values()] for _ in range(self.options.rounds)]
        for i, (name, values) in enumerate(zip(functions, zip(*rounds, strict=True), strict=True)):
            ratio = f"{median(values[0] / values[i] for values in rounds):.3g}" if i else ""
            show(name, f"{median(values):,.{0 if median(values) >= 100 else 2}f} {unit}", ratio)


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


def rate(function: Callable, images: int, times: int) -> float:
    """The images/s of so many calls, each for so many images."""
    return images * times / seconds(function, times)


def training(bench: Bench) -> None:
    """The loop against its step."""
    for mode in ("--mode=gan", "--mode=mmd"):
        step = bench.step(bench.run(mode), record=bench.options.cuda)
        seconds(step, utils.Recorded.WARM_UP + 1)  # cuDNN chooses, and the step is recorded
        loop = partial(bench.loop, bench.run(mode))
        in_memory = partial(rate, step, 100, bench.steps)
        bench.compare("images/s", {f"training, {mode}": loop, "- in memory": in_memory})


def gpu(bench: Bench) -> None:
    """What bfloat16, compilation, recording and larger batches are worth on a GPU."""
    precisions = ([], ["--amp"], ["--amp", "--compile"]) if bench.options.cuda else ()
    for more, n, mode in itertools.product(precisions, (100, 1024), ("gan", "mmd")):
        torch.compiler.reset()  # a batch size is compiled by itself
        flags = (f"--mode={mode}", f"--batch_size={n}", *more)
        functions = {}
        run = bench.run(*flags)
        bench.step(run, record=False)()  # cuDNN chooses, torch.compile compiles
        for record in (False, True):  # so that the first has no memory of a graph
            step = bench.step(run, record)
            gc.collect()  # the networks of the row before
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            seconds(step, utils.Recorded.WARM_UP + 1)
            used = f"{torch.cuda.max_memory_reserved() / 1e6:,.0f} MB"
            name = f"in memory, {' '.join(flags)}, {used}" if record else f"- not recorded, {used}"
            times = max(5, bench.steps * 40 // n)
            functions = {name: partial(rate, step, n, times)} | functions
        bench.compare("images/s", functions)


def resident_mb() -> float:
    """The most resident memory of this process so far."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1e3


def penalty_alone(name: str, n: int, cuda: bool, rounds: int) -> tuple[float, float]:
    """Milliseconds, and MB, of an MMD and its gradient for n codes, in a new process."""
    device = utils.pick_device(cuda, 0)
    kernel = model.Kernel(64, device=device)

    def step(n: int) -> None:
        prior = [torch.randn(n, 64, device=device)] if name == "sampled_mmd" else []
        codes = torch.randn(n, 64, device=device, requires_grad=True)
        getattr(model, name)(codes, kernel, *prior).backward()

    step(10)
    before = resident_mb()
    step(n)
    most = torch.cuda.max_memory_allocated() / 1e6 if cuda else resident_mb() - before
    return median(1e3 * seconds(partial(step, n)) for _ in range(rounds)), most


def mmd(bench: Bench) -> None:
    """The penalties of WAE-MMD."""
    for n, name in itertools.product((100, 1000, 4096), ("exact_mmd", "sampled_mmd")):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            how = (name, n, bench.options.cuda, bench.options.rounds)
            time_ms, most = pool.apply(penalty_alone, how)
        show(f"{name}, {n:,} codes of 64, with gradient", f"{time_ms:,.1f} ms, {most:,.0f} MB")


ROWS = {row.__name__: row for row in (training, gpu, mmd)}


def execute() -> None:
    """Does what the command line asks."""
    parser = argparse.ArgumentParser(usage=__doc__)
    add = parser.add_argument
    add("--cuda", action="store_true", help="train on the GPU")
    add("--dataroot", type=Path, help="folder of images (default: 4000 toy faces)")
    add("--dataset", choices=("celebA", "folder"), default="celebA", help="how they are cut")
    add("--nf", type=int, default=128, help="width of the networks (default: 128)")
    add("--only", default=",".join(ROWS), help="rows, with commas between (default: %(default)s)")
    add("--rounds", type=int, default=5, help="rounds that a median is of (default: 5)")
    add("--steps", type=int, help="training steps in a round (default: 10, on a GPU 50)")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - ROWS.keys():
        parser.error(f"--only: no row is called {', '.join(unknown)}")
    torch.backends.cudnn.benchmark = True  # as in main.py
    # Steps are recorded on another stream than the default one, as in main.py.
    stream = torch.cuda.stream(torch.cuda.Stream()) if options.cuda else nullcontext()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr), stream:
        bench = Bench(options, Path(folder))
        device = torch.cuda.get_device_name(0) if options.cuda else "no GPU"
        show(f"{device}, PyTorch {torch.__version__}; --nf={options.nf}", "measured", "ratio")
        show("---", "---", "---")
        for name in options.only.split(","):
            ROWS[name](bench)


if __name__ == "__main__":
    execute()
