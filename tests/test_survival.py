"""Interruptions, broken checkpoints, full disks, wrong flags: what is said, and what is left."""

import io
import math
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_and_resume import compare, differences, flags_of
from PIL import Image
from program import ENDLESS, TINY, Program, load, log_lines, run, steps

import main
import utils

CHECKPOINTS = ("checkpoint.pth.tar", "model_best.pth.tar")
STOPPING = "main.py: stopping after this step; Ctrl-C again stops at once"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name, but the one that locks it."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def mmd_flags(tiny_flags):
    """Flags of a run of one epoch of WAE-MMD."""
    return (*tiny_flags, "--mode=mmd")


def continued(folder: Path, tmp_path: Path) -> tuple[Path, str]:
    """A copy of a trained run's folder, and the flag to continue it."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    return copy, f"--checkpoint={copy / 'checkpoint.pth.tar'}"


def ignore_hangup() -> None:
    """What nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_train_signals(tiny_flags, tmp_path):
    """Each ends the step and saves it, the same command continues, and no bit tells of it all."""
    outf, whole = tmp_path / "a run", tmp_path / "whole"
    flags = [*tiny_flags, "--mode=gan", "--batch_size=2", "--niter=4", "--sample_every=9"]
    lines = 4  # of the log, with the heading: three steps of the twelve of an epoch
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        program = Program(tmp_path / "output", *flags, f"--outf={outf}")
        program.wait_until(lambda lines=lines: log_lines(outf) >= lines)
        program.kill(number)
        assert program.wait() == 128 + number, program.err
        stopped = load(outf)
        told = f"stopped after step {stopped['step']} of 48; the same command continues"
        assert program.messages[-2:] == [STOPPING, f"main.py: {told}"]
        assert stopped["log"] == (outf / "log.csv").read_text()
        assert steps(outf) == list(range(1, stopped["step"] + 1))
        lines = log_lines(outf) + 4
    again = run(tmp_path / "output", *flags, f"--outf={outf}").succeeds()
    step = stopped["step"]
    assert again.messages == [f"main.py: continuing the run in {outf} from step {step} of 48"]

    left = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}  # by some other program
    flags += [f"--outf={whole}"]
    program = Program(tmp_path / "output", *flags, change=ignore_hangup, env=left)
    program.wait_until(lambda: log_lines(whole) >= 4)
    program.kill(signal.SIGHUP)
    program.succeeds()
    assert differences(whole, outf) == []


def make_steps_endless() -> None:
    """Lets no training step end."""

    def train_step(*_: object) -> None:
        utils.warn("a step begins")
        time.sleep(1000)

    main.train_step = train_step


def test_train_second_interrupt(tiny_flags, tmp_path):
    program = Program(tmp_path, *tiny_flags, f"--outf={tmp_path / 'x'}", change=make_steps_endless)
    for message in ("a step begins", "stopping"):
        program.wait_until(lambda message=message: message in program.err)
        program.kill(signal.SIGINT)
    assert program.wait() == 130
    assert program.messages == ["main.py: a step begins", STOPPING, "main.py: interrupted"]
    assert not list((tmp_path / "x").glob("*checkpoint*"))


def test_evaluate_any_number_of_interrupts(trained, tmp_path):
    """A burst ends with the status of the first, and changes nothing."""
    outf = Path(shutil.copytree(trained["mmd"], tmp_path / "x"))
    program = Program(tmp_path, f"--outf={outf}", "--evaluate", "--n_samples=50000")
    program.wait_until(lambda: "samples_prior:" in program.err)
    for _ in range(30):
        program.kill(signal.SIGINT)
        time.sleep(0.002)
    assert program.wait() == 130
    assert set(program.messages) == {"main.py: interrupted"}
    assert differences(trained["mmd"], outf) == ["eval: only one has it"]


@pytest.mark.parametrize("what", ["closed", "full", "pipe"])
def test_main_output_that_goes_nowhere(what, trained, mmd_flags, tmp_path):
    """Neither does it end a run nor keep Ctrl-C from writing a checkpoint."""
    outf = tmp_path / "x"
    where = {"closed": None, "full": "/dev/full", "pipe": tmp_path / "pipe"}[what]
    os.mkfifo(tmp_path / "pipe")
    for flags, status in ((ENDLESS, 130), (["--niter=1"], 0)):
        flags = [*mmd_flags, *flags, f"--outf={outf}"]
        program = Program(tmp_path, *flags, stdout=where, stderr=where)
        if what == "pipe":  # whose reader is gone, as `2>&1 | head -1`
            reader = os.open(where, os.O_RDONLY)
            program.wait_until(lambda: outf.exists())
            os.close(reader)
        if status:
            program.wait_until(lambda: log_lines(outf) > 4)
            program.kill(signal.SIGINT)
        assert program.wait() == status
        if status:
            assert steps(outf) == list(range(1, load(outf)["step"] + 1))
            shutil.rmtree(outf)
    assert differences(trained["mmd"], outf) == []


def test_output():
    """A stream of a notebook, which cannot be reconfigured; bars are lines but on a terminal."""
    stream = io.StringIO()
    output = utils.Output(stream)
    for text in ("a\n", "\r  1%|", "\r  2%|", "\r    \r", "b\n"):
        output.write(text)
    assert stream.getvalue() == "a\n1%|\n2%|\nb\n" and output.getvalue() == stream.getvalue()
    stream.isatty = lambda: True
    output.write("\r  3%|")
    assert stream.getvalue().endswith("b\n\r  3%|")


@pytest.mark.parametrize("mode", ["gan", "mmd"])
def test_main_killed_three_times(mode, toy_faces, tmp_path):
    """The short form of kill_and_resume.py."""
    tally, found = compare(tmp_path, flags_of(mode, toy_faces, epochs=6), kills=3, seed=0)
    assert tally["kills"] == 3
    assert found == []


def test_train_checkpoint_every(mmd_flags, tmp_path):
    """It decides when checkpoints are written, not what is in the last."""
    for seconds in ("0", "1e9"):
        flags = [*mmd_flags, "--niter=3", f"--checkpoint_every={seconds}"]
        program = Program(tmp_path, *flags, f"--outf={tmp_path / seconds}")
        written = tmp_path / seconds / "checkpoint.pth.tar"
        program.wait_until(lambda written=written: written.exists())
        first = load(tmp_path / seconds)["step"]
        assert first in ([9] if seconds == "1e9" else [3, 6, 9])
        program.succeeds()
    flag = "flags/checkpoint_every"
    found = {"args.json/checkpoint_every", *(f"{name}/{flag}" for name in CHECKPOINTS)}
    assert set(differences(tmp_path / "0", tmp_path / "1e9")) == found


def test_train_best(trained, tmp_path):
    """The best networks alone: they can be evaluated, not continued."""
    best = trained["gan"] / "model_best.pth.tar"
    kept = {"flags", "images", "n_train", "step", "best", "net", "discriminator"}
    assert set(load(trained["gan"], best.name)) == kept
    flags = [f"--checkpoint={best}", f"--outf={tmp_path / 'x'}"]
    with pytest.raises(utils.UserError, match=f"^{best} has no optimiser states: it can be eval"):
        main.execute([*flags, "--niter=2"])
    assert main.execute([*flags, "--evaluate"]) == 0


def hold(path: Path) -> None:
    """Holds the program between its first look at --outf and the lock, until the path exists."""
    get_world = utils.get_world

    def wait(*args: object) -> utils.World:
        print("waiting", flush=True)
        while not path.exists():
            time.sleep(0.01)
        return get_world(*args)

    utils.get_world = wait


@pytest.mark.parametrize("epochs", [1, 2])
def test_execute_run_that_ended_meanwhile(epochs, trained, mmd_flags, tmp_path):
    """Another one, in the same folder: it is complete, or continued, and not begun again."""
    outf, go = tmp_path / "copy", tmp_path / "go"
    flags = [*mmd_flags, f"--niter={epochs}", f"--outf={outf}"]
    program = Program(tmp_path / "o", *flags, change=partial(hold, go))
    program.wait_until(lambda: "waiting" in program.out)
    continued(trained["mmd"], tmp_path)
    before = contents(outf)
    go.touch()
    program.succeeds()
    if epochs == 1:
        told = f"waiting\nthe run in {outf} is complete; a larger --niter continues it\n"
        assert (program.out, program.err) == (told, "") and contents(outf) == before
    else:
        assert program.messages == [f"main.py: continuing the run in {outf} from step 3 of 6"]
        assert steps(outf) == list(range(1, 7))


def test_execute_folder_in_use(trained, mmd_flags, tmp_path):
    outf, _ = continued(trained["mmd"], tmp_path)
    first = Program(tmp_path / "first", *mmd_flags, *ENDLESS, f"--outf={outf}")
    first.wait_until(lambda: log_lines(outf) > 6)
    for second in ("--niter=2", "--evaluate"):
        with pytest.raises(
            utils.UserError, match=f"{outf} is in use by process {first.process.pid}:"
        ):
            main.execute([*mmd_flags, f"--outf={outf}", second])
    first.kill(signal.SIGKILL)
    first.wait()
    assert main.execute([f"--outf={outf}", "--evaluate"]) == 0


def test_load_data_other_images(trained, tmp_path):
    """An error for a run, which would mix held-out and training images, and a word otherwise."""
    data = tmp_path / "data" / "all"
    data.mkdir(parents=True)
    for i in range(30):  # as long as any other BMP
        Image.new("RGB", (140, 140), (i, 0, 0)).save(data / f"{i:02d}.bmp")
    outf, flags = tmp_path / "x", [*TINY, "--mode=mmd", f"--dataroot={data.parent}"]
    run(tmp_path, *flags, "--niter=1", f"--outf={outf}").succeeds()
    Image.new("RGB", (140, 140), "white").save(data / "07.bmp")
    before = contents(outf)
    told = f"--dataroot={data.parent}: not the images that the checkpoint was trained on"
    run(tmp_path, *flags, "--niter=2", f"--outf={outf}").fails(1, told, "start again in another")
    assert contents(outf) == before
    assert run(tmp_path, f"--outf={outf}", "--evaluate").succeeds().messages == [f"main.py: {told}"]


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


BROKEN = ["missing", "folder", "fifo", "empty", "text", "cut", "hostile", "densities"]


@pytest.mark.parametrize("what", BROKEN)
def test_load_checkpoint_broken(what, trained, tmp_path):
    path, mark, whole = tmp_path / "broken.pth.tar", tmp_path / "executed", trained["mmd"]
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "hostile":
        torch.save(load(whole) | {"more": Hostile(mark)}, path)
    elif what == "densities":  # a file of this program, but another one
        shutil.copy(whole / "densities.pth.tar", path)
    elif what != "missing":
        half = (whole / "checkpoint.pth.tar").read_bytes()[:20000]
        path.write_bytes({"empty": b"", "text": b"not a checkpoint\n" * 100, "cut": half}[what])
    with pytest.raises(utils.UserError, match=f"^{path}: (no such|not a|cannot)"):
        main.execute([f"--checkpoint={path}", "--evaluate", f"--outf={tmp_path / 'x'}"])
    assert not mark.exists() and not (tmp_path / "x").exists()


WEIGHT = "encoder.moments.bias"
EDITS = {
    "not a checkpoint of this program": lambda state: state.pop("net"),
    "net does not fit its flags": lambda state: state["net"].update({WEIGHT: torch.zeros(3)}),
    "not finite, or above 1e6": lambda state: state["net"].update({WEIGHT: torch.full((4,), 1e9)}),
    "with different flags: --nz=4 .checkpoint: 8": lambda state: state["flags"].update(nz=8),
}


@pytest.mark.parametrize("words", EDITS)
def test_load_checkpoint_edited(words, trained, mmd_flags, tmp_path):
    outf, _ = continued(trained["mmd"], tmp_path)
    state = load(outf)
    EDITS[words](state)
    torch.save(state, outf / "checkpoint.pth.tar")
    before = contents(outf)
    with pytest.raises(utils.UserError, match=words):
        main.execute([*mmd_flags, "--niter=2", f"--outf={outf}"])
    assert contents(outf) == before


@pytest.mark.parametrize(("batch_size", "print_every"), [(8, 1), (8, 100), (24, 1)])
def test_train_diverges(batch_size, print_every, tiny_flags, tmp_path):
    """Whether the log or the end of the epoch notices; a single step shows in the metrics."""
    flags = [
        f"--batch_size={batch_size}",
        f"--print_every={print_every}",
        "--lr=1e9",
        "--LAMBDA=1e9",
    ]
    program = run(tmp_path, *tiny_flags, *flags, f"--outf={tmp_path / 'x'}")
    program.fails(1, " at step ", "lower --lr")
    assert not list((tmp_path / "x").glob("*.pth.tar*"))


def blow_up(value: float) -> None:
    """Lets the first step break the weights, and a signal come."""
    step = main.train_step

    def train_step(run: main.Run, *args: torch.Tensor) -> torch.Tensor:
        losses = step(run, *args)
        with torch.no_grad():
            run.net.decoder.layers[0].bias += value
        os.kill(os.getpid(), signal.SIGTERM)
        return losses

    main.train_step = train_step


@pytest.mark.parametrize("value", [math.nan, 1e12])
def test_save_broken_weights(value, trained, tmp_path):
    outf, resume = continued(trained["gan"], tmp_path)
    before = contents(outf)
    program = run(tmp_path, resume, "--niter=3", change=partial(blow_up, value))
    assert program.wait() == 1 and "the weights diverged before step 4" in program.messages[-1]
    assert all(contents(outf)[name] == before[name] for name in CHECKPOINTS)


@pytest.mark.parametrize(("max_bytes", "name"), [(200_000, ".pth.tar"), (600, "args.json")])
def test_save_on_a_full_disk(max_bytes, name, trained, tmp_path):
    outf, resume = continued(trained["gan"], tmp_path)
    before = contents(outf)
    program = run(tmp_path, resume, "--niter=2", max_bytes=max_bytes)
    assert program.wait() == 1
    assert f"main.py: error: cannot write {outf}" in program.messages[-1]
    assert name in program.messages[-1] and "File too large" in program.messages[-1]
    assert all(contents(outf)[name] == before[name] for name in CHECKPOINTS)
    assert {path.name for path in outf.glob(".*")} == {".lock"}
    run(tmp_path, resume, "--niter=2").succeeds()  # there is space again
