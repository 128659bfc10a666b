"""Runs main.py many times without paying for its imports each time, and reads what it leaves.

A server imports main.py, uses nothing of it, and forks for each command line. The fork runs
`main.main()` as `python3 main.py ...` does, in a process of its own, with its own exit status, that
can be signalled and killed.
"""

import atexit
import contextlib
import csv
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import download_datasets

REPO = Path(__file__).resolve().parent.parent
TINY = ("--image_size=32", "--nf=2", "--nz=4", "--batch_size=8", "--n_test=6", "--print_every=1")
TINY += ("--n_samples=10", "--checkpoint_every=0", "--no-e_pretrain")
ENDLESS = ("--niter=100000", "--sample_every=100000")

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["main", "pytest"])  # pytest is the main module of its children


def start(target: Callable[..., None], *args: object) -> multiprocessing.process.BaseProcess:
    """A process, forked from the server, that runs target(*args)."""
    with mock.patch.dict(os.environ, PYTHONPATH=str(REPO), OMP_NUM_THREADS="1"):
        multiprocessing.forkserver.ensure_running()
    process = CONTEXT.Process(target=target, args=args)
    process.start()
    atexit.register(process.kill)  # where a test failed, it may have no end
    return process


def _main(argv: list[str], folder: Path, options: dict) -> None:
    """Does what `python3 main.py ARGV` does, in a fork."""
    os.environ |= options.get("env", {})
    for number, name in ((1, "stdout"), (2, "stderr")):
        # To its end, since processes of a killed launcher may still write to it.
        file = os.open(options.get(name, folder / name), os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
        os.dup2(file, number)
        # A stream of its own, which knows a file from a pipe.
        setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
    if "max_bytes" in options:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does: the write fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (options["max_bytes"],) * 2)
    import main

    sys.argv = ["main.py", *argv]
    if "change" in options:
        options["change"]()
    sys.exit(main.main())


class Program:
    """`python3 main.py ARGV`, started; what it prints goes to files in `folder`.

    Options are `env`, `max_bytes` (of a file, as on a full disk), `stdout` and `stderr` (where
    these go), and `change`, a function to call before main.main().
    """

    def __init__(self, folder: Path, *argv: object, **options: object):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        self.process = start(_main, [str(a) for a in argv], folder, options)

    def kill(self, number: int) -> None:
        """Sends a signal; nothing happens if the process is over."""
        with contextlib.suppress(ProcessLookupError):
            if self.process.exitcode is None:
                os.kill(self.process.pid, number)

    def wait(self, timeout: float = 200) -> int:
        """The exit status, or minus the signal that ended it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"main.py still runs after {timeout} s:\n{self.err}")
        return self.process.exitcode

    def wait_until(self, happens: Callable[[], bool], timeout: float = 200) -> bool:
        """Waits until something happens; False if the process ended before it did."""
        end = time.monotonic() + timeout
        while not happens():
            if self.process.exitcode is not None:
                return happens()
            if time.monotonic() > end:
                self.process.kill()
                raise TimeoutError(f"nothing happened in {timeout} s:\n{self.err}")
            time.sleep(0.0002)
        return True

    def succeeds(self) -> "Program":
        """Checks that it comes to its end without complaint."""
        assert self.wait() == 0, self.err
        assert "Traceback" not in self.err and "Warning" not in self.err, self.err
        return self

    def fails(self, status: int, *words: str) -> None:
        """Checks that it ends with one line that has these words."""
        assert self.wait() == status, self.err
        assert len(self.messages) == 1, self.err
        assert self.messages[0].startswith("main.py: error: ")
        for word in words:
            assert word in self.messages[0], self.messages

    @property
    def out(self) -> str:
        """What it printed."""
        return (self.folder / "stdout").read_text()

    @property
    def err(self) -> str:
        """What it printed on standard error: messages and tracebacks."""
        return (self.folder / "stderr").read_text()

    @property
    def messages(self) -> list[str]:
        """The lines on standard error."""
        return [line for line in self.err.splitlines() if line.strip()]


def run(folder: Path, *argv: object, **options: object) -> Program:
    """`python3 main.py ARGV`, ended."""
    program = Program(folder, *argv, **options)
    program.wait()
    return program


def draw_faces(folder: Path, n_images: int) -> Path:
    """Makes toy faces. Returns the folder for --dataroot."""
    download_datasets.get_toy(folder, n_images)
    return folder / "toy"


def load(outf: Path, name: str = "checkpoint.pth.tar") -> dict[str, Any]:
    """A checkpoint of a run."""
    return torch.load(outf / name, weights_only=True)


def rows(outf: Path) -> list[dict[str, str]]:
    """The log of a run."""
    return list(csv.DictReader((outf / "log.csv").read_text().splitlines()))


def steps(outf: Path) -> list[int]:
    """The steps that the log has a row of training for."""
    return [int(row["step"]) for row in rows(outf) if row["lr"]]


def log_lines(outf: Path) -> int:
    """Rows of the log so far, with the heading."""
    log = outf / "log.csv"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def after_step(number: int, act: Callable[..., None]) -> None:
    """Lets something happen at the end of a training step. A test puts main.Step back."""
    import main

    class Step(main.Step):
        def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
            losses = super().__call__(*inputs)
            if self.run.step + 1 == number:
                act(self.run)
            return losses

    main.Step = Step


def unequal(a: Any, b: Any, name: str) -> list[str]:
    """Names of what differs, in any bit, between two values from checkpoints."""
    if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
        return [place for key in a for place in unequal(a[key], b[key], f"{name}/{key}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        same = same and a.numpy().tobytes() == b.numpy().tobytes()
    else:
        same = repr(a) == repr(b)
    return [] if same else [name]


def comparable(path: Path) -> Any:
    """What a file has in common with that of a like run: all but the clock and names of folders."""
    if path.name == "log.csv":
        return [row | {"images_per_s": ""} for row in rows(path.parent)]
    if path.name == "checkpoint.pth.tar":
        state = load(path.parent)
        state["log"] = state["log"] == (path.parent / "log.csv").read_text()
        for name in ("optimizer_net", "optimizer_discriminator"):
            state.get(name, {}).pop("param_groups", None)  # the rate, which every step sets
        return state
    return path.is_file() and path.name != "args.json" and path.read_bytes()


def differences(a: Path, b: Path) -> list[str]:
    """Names of what differs, in any bit, between the files of two runs."""
    names = sorted({path.name for folder in (a, b) for path in folder.iterdir()})
    return [x for name in names for x in unequal(comparable(a / name), comparable(b / name), name)]
