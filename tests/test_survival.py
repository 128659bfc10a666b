"""Interruptions, broken checkpoints, full disks: what is said, and what is left.

`KILLS=20 python3 -m pytest tests/test_survival.py -k killed -n 0 -s` makes a longer series.
"""

import contextlib
import fcntl
import math
import os
import pty
import random
import shutil
import signal
import struct
import sys
import termios
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from program import ENDLESS, Program, after_step, differences, load, log_lines, run, steps

import main
import utils

CHECKPOINT = "checkpoint.pth.tar"
STOPPING = "main.py: stopping after this step; Ctrl-C again stops at once"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name, but the one that locks it."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def mmd_flags(tiny_flags):
    """Flags of a run of one epoch of WAE-MMD."""
    return (*tiny_flags, "--mode=mmd")


@pytest.fixture(autouse=True)
def step(monkeypatch):
    """Puts the training step back where a test changes it."""
    monkeypatch.setattr(main, "Step", main.Step)


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the folder of a run of WAE-MMD, which may be changed."""
    return Path(shutil.copytree(trained["mmd"], tmp_path / "copy"))


def send(number: int, *_: object) -> None:
    """Sends a signal to this process."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("mode", ["gan", "mmd", "vae"])
def test_train_continued(mode, tiny_flags, tmp_path, monkeypatch):
    """Stopped in two epochs and at the end of the last, a run has the bits of one that was not."""
    outf = tmp_path / "out"
    monkeypatch.setattr(main, "PRETRAIN_STEPS", 3)
    flags = [*tiny_flags, f"--mode={mode}", "--e_pretrain", "--niter=2", "--checkpoint_every=1e9"]
    assert main.execute([*flags, f"--outf={tmp_path / 'whole'}"]) == 0
    flags += [f"--outf={outf}"]
    for number, signum in ((2, signal.SIGTERM), (4, signal.SIGINT)):
        after_step(number, partial(send, signum))
        assert main.execute(flags) == 128 + signum
        stopped = load(outf)
        assert stopped["step"] == number and stopped["mixture"] is None
        assert stopped["log"] == (outf / "log.csv").read_text()
        assert steps(outf) == list(range(1, number + 1))
    with monkeypatch.context() as patch:
        draw = main.sample_grids
        patch.setattr(main, "sample_grids", lambda *run: send(signal.SIGTERM) or draw(*run))
        assert main.execute(flags) == 128 + signal.SIGTERM
    assert load(outf)["step"] == 6 and not (outf / "metrics.json").exists()
    assert main.execute(flags) == 0
    assert differences(tmp_path / "whole", outf) == []


def on_terminal(name: str, go: Path) -> None:
    """Makes the terminal of that name this process's own, and lets the third step wait for `go`."""

    def wait(_run: object) -> None:
        go.with_name("waiting").touch()
        while not go.exists():
            time.sleep(0.001)

    after_step(3, wait)
    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(terminal, number)
        setattr(sys, stream, open(number, "w", closefd=False))  # noqa: SIM115


@pytest.mark.parametrize(
    "events",
    [
        ("closed", signal.SIGHUP),  # a window: its program and the kernel send one each
        (signal.SIGHUP, signal.SIGTERM),  # a log-out
        (signal.SIGUSR1,),
        (signal.SIGUSR2, signal.SIGTERM),
        ("Ctrl-C", "closed"),
    ],
    ids=str,
)
def test_train_on_a_terminal(events, mmd_flags, tmp_path):
    """Whatever it sends, and however often, the step ends and is saved."""
    outf = tmp_path / "out"
    terminal, other_end = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 25, 80, 0, 0))
    change = partial(on_terminal, os.ttyname(other_end), tmp_path / "go")
    program = Program(tmp_path, *mmd_flags, *ENDLESS, f"--outf={outf}", change=change)
    os.set_blocking(terminal, False)
    shown = []

    def has_bar() -> bool:
        with contextlib.suppress(BlockingIOError):
            shown.append(os.read(terminal, 10_000))
        return b"%|" in b"".join(shown)

    program.wait_until(lambda: (tmp_path / "waiting").exists() and has_bar())
    os.close(other_end)
    for event in events:
        if event == "Ctrl-C":
            os.write(terminal, b"\x03")
        elif event == "closed":
            os.close(terminal)
        else:
            program.kill(event)
        time.sleep(0.1)  # two of a kind would be one
    (tmp_path / "go").touch()
    first = {"closed": signal.SIGHUP, "Ctrl-C": signal.SIGINT}.get(events[0], events[0])
    assert program.wait() == 128 + first
    assert load(outf)["step"] == 3 and steps(outf) == [1, 2, 3]


@pytest.mark.parametrize("what", ["full", "pipe"])
def test_train_output_that_goes_nowhere(what, mmd_flags, tmp_path):
    """It does not keep Ctrl-C from writing a checkpoint."""
    outf = tmp_path / "out"
    where = tmp_path / "pipe" if what == "pipe" else "/dev/full"
    os.mkfifo(tmp_path / "pipe")
    flags = [*mmd_flags, *ENDLESS, f"--outf={outf}", "--checkpoint_every=1e9"]
    program = Program(tmp_path, *flags, stdout=where, stderr=where)
    reader = os.open(where, os.O_RDONLY) if what == "pipe" else None
    program.wait_until(lambda: log_lines(outf) > 2)
    if reader:  # as in `2>&1 | tee`, which Ctrl-C ends, too
        os.close(reader)
    program.kill(signal.SIGINT)
    assert program.wait() == 130
    assert steps(outf) == list(range(1, load(outf)["step"] + 1))


def hang(_run: object) -> None:
    """Lets a step have no end."""
    utils.warn("hanging")
    time.sleep(1000)


def test_train_second_interrupt(mmd_flags, tmp_path):
    """It ends a step that has no end."""
    outf = tmp_path / "out"
    change = partial(after_step, 1, hang)
    program = Program(tmp_path, *mmd_flags, f"--outf={outf}", change=change)
    for message in ("hanging", "stopping"):
        program.wait_until(lambda message=message: message in program.err)
        program.kill(signal.SIGINT)
    assert program.wait() == 130
    told = ["main.py: hanging", STOPPING, "main.py: error: interrupted"]
    assert program.messages == told
    assert not (outf / CHECKPOINT).exists()


def test_evaluate_interrupted(copy, trained, tmp_path):
    """One line, and the run is as it was."""
    program = Program(tmp_path, f"--outf={copy}", "--evaluate", "--n_samples=50000")
    program.wait_until((copy / "eval" / "samples_prior").exists)
    program.kill(signal.SIGINT)
    program.fails(130, "interrupted")
    assert differences(trained["mmd"], copy) == []


def test_execute_leaves_handlers(mmd_flags, trained, tmp_path):
    """The caller's are put back, and a signal that it ignores, as nohup does, is ignored."""
    handlers = {number: signal.getsignal(number) for number in utils.Stop.SIGNALS}
    mine = handlers | {signal.SIGHUP: signal.SIG_IGN, signal.SIGUSR1: lambda *_: None}
    after_step(2, partial(send, signal.SIGHUP))
    try:
        for number, handler in mine.items():
            signal.signal(number, handler)
        assert main.execute([*mmd_flags, f"--outf={tmp_path / 'x'}"]) == 0
        assert {number: signal.getsignal(number) for number in mine} == mine
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert differences(trained["mmd"], tmp_path / "x") == []


def test_execute_in_a_thread(mmd_flags, trained, tmp_path):
    """Where no handler can be set, it trains as ever."""
    done = []
    argv = [*mmd_flags, f"--outf={tmp_path / 'x'}"]
    thread = threading.Thread(target=lambda: done.append(main.execute(argv)))
    thread.start()
    thread.join()
    assert done == [0]
    assert differences(trained["mmd"], tmp_path / "x") == []


def changed(path: Path) -> tuple[int, int] | None:
    """A value that differs each time that the file is replaced or written."""
    try:
        return path.stat().st_ino, path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def kill(program: Program, outf: Path, moment: str, epochs: int, rng: random.Random) -> None:
    """Kills a run at a moment of that kind, or lets it end if it does not get there.

    Moments are told by what the run writes, not by the clock: a machine may be slow, or busy.
    """
    half, log = outf / f".{CHECKPOINT}.tmp", outf / "log.csv"
    before = {path: changed(path) for path in (half, log)}
    if moment == "start":
        time.sleep(rng.uniform(0, 0.5))
    elif moment == "checkpoint":
        program.wait_until(lambda: changed(half) not in (None, before[half]))
        time.sleep(rng.choice([0, rng.uniform(0, 0.01)]))
    elif moment == "training":
        program.wait_until(lambda: changed(log) != before[log])  # it begins by replacing the log
        lines = log_lines(outf) + rng.randrange(5)
        program.wait_until(lambda: log_lines(outf) >= lines)
    else:
        program.wait_until(lambda: f"epoch {epochs}/{epochs}: " in program.out)
        time.sleep(rng.uniform(0, 0.1))
    program.kill(signal.SIGKILL)


@pytest.mark.parametrize("mode", ["gan", "mmd"])
def test_train_killed(mode, tiny_flags, tmp_path):
    """By SIGKILL at any moment and continued, a run has the bits of one that was not."""
    kills = int(os.environ.get("KILLS", 2))
    flags = [*tiny_flags, f"--mode={mode}", f"--niter={2 * kills}", "--sample_every=3"]
    run(tmp_path, *flags, f"--outf={tmp_path / 'whole'}").succeeds()
    outf, rng = tmp_path / "killed", random.Random(kills)
    half_written = 0
    moments = ["checkpoint", "training", *rng.choices(["checkpoint", "training", "start"], k=kills)]
    for moment in [*moments[: kills - 1], "evaluation"]:
        program = Program(tmp_path, *flags, f"--outf={outf}")
        kill(program, outf, moment, 2 * kills, rng)
        assert program.wait() == -signal.SIGKILL, (moment, program.err)
        half_written += (outf / f".{CHECKPOINT}.tmp").exists()
    run(tmp_path, *flags, f"--outf={outf}").succeeds()
    assert differences(tmp_path / "whole", outf) == []
    print(f"{mode}: {kills} kills, a half-written checkpoint after {half_written}")


@pytest.mark.parametrize(("seconds", "saved"), [("0", [2, 3, 4, 6, 6, 6]), ("1e9", [6, 6])])
def test_train_checkpoint_every(seconds, saved, mmd_flags, tmp_path, monkeypatch):
    """Checkpoints come at rows of the log and ends of epochs when it is time, and last."""
    steps_saved = []
    save = main.save
    monkeypatch.setattr(main, "save", lambda r, *_: steps_saved.append(r.step) or save(r, *_))
    flags = [*mmd_flags, "--niter=2", "--print_every=2", f"--checkpoint_every={seconds}"]
    assert main.execute([*flags, f"--outf={tmp_path / 'x'}"]) == 0
    assert steps_saved == saved


def test_execute_complete(trained, mmd_flags, tmp_path, monkeypatch, capfd):
    """Another process may complete the run while this one waits to lock the folder."""
    outf = tmp_path / "out"
    lock = utils.lock

    def late(folder: Path) -> Any:
        shutil.copytree(trained["mmd"], folder, dirs_exist_ok=True)
        return lock(folder)

    monkeypatch.setattr(utils, "lock", late)
    assert main.execute([*mmd_flags, f"--outf={outf}"]) == 0
    told = f"the run in {outf} is complete; a larger --niter continues it\n"
    assert capfd.readouterr() == (told, "")
    assert contents(outf) == contents(trained["mmd"])


def test_train_anew(copy, mmd_flags):
    """What an earlier run left is not taken for the new one's."""
    (copy / CHECKPOINT).unlink()
    after_step(1, partial(send, signal.SIGTERM))
    assert main.execute([*mmd_flags, "--seed=2", f"--outf={copy}"]) == 143
    assert load(copy)["mixture"] is None
    assert not {"metrics.json", "codes.png"} & set(os.listdir(copy))
    with pytest.raises(utils.UserError, match="mixture: it is fitted after the last epoch"):
        main.execute([f"--outf={copy}", "--generate=2", "--density=mixture"])


def test_execute_folder_in_use(copy, mmd_flags, tmp_path):
    """A second run is refused; an evaluation of the last checkpoint is not."""
    first = Program(tmp_path / "first", *mmd_flags, *ENDLESS, f"--outf={copy}")
    first.wait_until(lambda: log_lines(copy) > 6)
    with pytest.raises(utils.UserError, match=f"^{copy} is in use by another process: "):
        main.execute([*mmd_flags, f"--outf={copy}", "--niter=2"])
    assert main.execute([f"--outf={copy}", "--evaluate"]) == 0
    first.kill(signal.SIGKILL)
    first.wait()
    epochs = load(copy)["step"] // 3 + 1
    assert main.execute([*mmd_flags, f"--outf={copy}", f"--niter={epochs}"]) == 0
    assert steps(copy) == list(range(1, 3 * epochs + 1))


def test_load_data_other_images(copy, mmd_flags, toy_faces, tmp_path):
    """A copy of the folder is as good; other images would mix those held out and trained on."""
    data = shutil.copytree(toy_faces, tmp_path / "data")
    flags = [*mmd_flags, f"--outf={copy}", f"--dataroot={data}"]
    assert main.execute([*flags, "--niter=2"]) == 0
    shutil.copy(*(data / "img_align_toy" / f"{number:06d}.jpg" for number in (1, 7)))
    before = contents(copy)
    with pytest.raises(utils.UserError, match=f"^{data}: not the images that the run was trained"):
        main.execute([*flags, "--niter=3"])
    assert contents(copy) == before


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


BROKEN = {
    "empty": "not a whole checkpoint",
    "cut": "(not a whole checkpoint|cannot be read)",
    "hostile": "not a whole checkpoint",
    "other program's": "not a checkpoint of this program",
    "other flags": "with different flags: --nz=4 .checkpoint: 8",
    "other shapes": "the checkpoint's net does not fit",
}


@pytest.mark.parametrize("what", BROKEN)
def test_load_checkpoint_broken(what, copy, mmd_flags, tmp_path):
    """One line, and nothing is touched, still less executed."""
    state, whole = load(copy), (copy / CHECKPOINT).read_bytes()
    if what == "hostile":
        state["more"] = Hostile(tmp_path / "executed")
    elif what == "other program's":
        state.pop("net")
    elif what == "other flags":
        state["flags"]["nz"] = 8
    elif what == "other shapes":
        state["net"] = dict.fromkeys(state["net"], torch.ones(3))
    torch.save(state, copy / CHECKPOINT)
    if what in ("empty", "cut"):
        (copy / CHECKPOINT).write_bytes(whole[: 20000 * (what == "cut")])
    before = contents(copy)
    with pytest.raises(utils.UserError, match=BROKEN[what]):
        main.execute([*mmd_flags, f"--outf={copy}", "--niter=2"])
    assert contents(copy) == before and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("print_every", [1, 100])
def test_train_diverges(print_every, tiny_flags, tmp_path):
    """Whether the log or the end of the epoch notices, no checkpoint is written."""
    flags = [*tiny_flags, f"--print_every={print_every}", "--lr=1e9", "--LAMBDA=1e9"]
    with pytest.raises(utils.UserError, match=r" at step \d; try a lower --lr"):
        main.execute([*flags, f"--outf={tmp_path / 'x'}"])
    assert not list((tmp_path / "x").glob("*.pth.tar*"))


def break_weights(run: main.Run) -> None:
    """Breaks a weight and sends a signal, which asks for a checkpoint."""
    with torch.no_grad():
        run.net.decoder.layers[0].bias[0] = math.nan
    send(signal.SIGTERM)


def test_save_broken_weights(copy):
    """The checkpoint before stays."""
    before = (copy / CHECKPOINT).read_bytes()
    after_step(4, break_weights)
    with pytest.raises(utils.UserError, match="weights are not finite at step 4"):
        main.execute([f"--checkpoint={copy / CHECKPOINT}", "--niter=2"])
    assert (copy / CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize(("max_bytes", "name"), [(50_000, ".pth.tar"), (600, "args.json")])
def test_train_on_a_full_disk(max_bytes, name, copy, mmd_flags, tmp_path):
    """The checkpoint before stays, no half file does, and the run continues when there is space."""
    before = (copy / CHECKPOINT).read_bytes()
    flags = [*mmd_flags, f"--outf={copy}", "--niter=2"]
    program = run(tmp_path, *flags, max_bytes=max_bytes)
    assert program.wait() == 1
    assert f"main.py: error: cannot write {copy}" in program.messages[-1]
    assert name in program.messages[-1] and "File too large" in program.messages[-1]
    assert (copy / CHECKPOINT).read_bytes() == before
    assert {path.name for path in copy.glob(".*")} == {".lock"}
    assert main.execute(flags) == 0
