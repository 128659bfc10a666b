"""Interruptions, broken checkpoints, full disks, wrong flags: what is said, and what is left."""

import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kill_and_resume import compare, differences, draw_faces, flags_of, log_lines, unequal
from program import REPO, TINY, Program, run, start

import main
import utils

NO_GPU = not torch.cuda.is_available()
CHECKPOINTS = ("checkpoint.pth.tar", "model_best.pth.tar")
STOPPING = "main.py: stopping after this step; Ctrl-C again stops at once"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name, but the one that locks it."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def says(program: Program, status: int, *words: str) -> None:
    """Checks that a run ended with one line that has these words."""
    assert program.wait() == status, program.err
    assert len(program.messages) == 1, program.err
    assert program.messages[0].startswith("main.py: error: ")
    for word in words:
        assert word in program.messages[0]


def ends_well(program: Program) -> None:
    """Checks that a run came to its end."""
    assert program.wait() == 0, program.err
    assert "Traceback" not in program.err


def continued(folder: Path, tmp_path: Path) -> tuple[Path, str]:
    """A copy of a trained run's folder, and the flag to continue it."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    return copy, f"--checkpoint={copy / 'checkpoint.pth.tar'}"


def edit(path: Path, change: Callable[[dict], Any]) -> None:
    """Changes a checkpoint by hand."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def steps(outf: Path) -> list[int]:
    """The steps that the log has a row of training for."""
    rows = [line.split(",") for line in (outf / "log.csv").read_text().splitlines()[1:]]
    return [int(row[1]) for row in rows if row[2]]


# --------------------------------------------------------------------------------------------------
# Signals and kills


@pytest.mark.parametrize(("mode", "number"), [("gan", signal.SIGINT), ("mmd", signal.SIGTERM)])
def test_a_signal_ends_the_step_and_the_same_command_continues(mode, number, toy_faces, tmp_path):
    """The step is finished and saved, and in the end no bit tells of the interruption."""
    outf = tmp_path / "a run"
    flags = [f"--dataroot={toy_faces}", f"--mode={mode}", *TINY, "--batch_size=2", "--niter=6"]
    program = Program(tmp_path / "output", *flags, f"--outf={outf}")
    program.wait_until(lambda: log_lines(outf) >= 4)  # three steps of the twelve of an epoch
    program.kill(number)
    assert program.wait() == 128 + number, program.err
    stopped = torch.load(outf / "checkpoint.pth.tar", weights_only=True)
    step = stopped["step"]
    told = f"main.py: stopped after step {step} of 72; the same command continues"
    assert program.messages == [STOPPING, told]
    assert stopped["log"] == (outf / "log.csv").read_text()
    assert steps(outf) == list(range(1, step + 1))

    again = run(tmp_path / "output", *flags, f"--outf={outf}")
    ends_well(again)
    assert again.messages == [f"main.py: continuing the run in {outf} from step {step} of 72"]
    ends_well(run(tmp_path / "output", *flags, f"--outf={tmp_path / 'whole'}"))
    assert differences(tmp_path / "whole", outf) == []
    assert steps(outf) == list(range(1, 73))


def test_a_second_interrupt_stops_at_once(toy_faces, tmp_path):
    slow = ["--nf=64", "--batch_size=24", "--image_size=128", "--n_test=6", "--mode=mmd"]
    program = Program(tmp_path, f"--dataroot={toy_faces}", *slow, f"--outf={tmp_path / 'x'}")
    program.wait_until(lambda: log_lines(tmp_path / "x") == 1)  # the first step is under way
    program.wait_until(lambda: "0/55" in program.err)
    program.kill(signal.SIGINT)
    program.wait_until(lambda: "stopping" in program.err)
    program.kill(signal.SIGINT)
    assert program.wait() == 130
    assert program.messages == [STOPPING, "main.py: interrupted"]
    assert not list((tmp_path / "x").glob("*checkpoint*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["pretraining", "training", "evaluation"])
def test_any_number_of_interrupts(where, number, trained, toy_faces, tmp_path):
    """Each burst ends with the status of the first, without a traceback, and the run continues."""
    outf, _ = continued(trained["mmd"], tmp_path)
    before = contents(outf)
    flags = [f"--dataroot={toy_faces}", "--mode=mmd", *TINY, "--seed=1", f"--outf={outf}"]
    flags += {
        "training": ["--niter=100000", "--sample_every=100000"],
        "evaluation": ["--evaluate", "--n_samples=1000000"],
        "pretraining": ["--e_pretrain", "--e_pretrain_iters=10000000", "--pz_scale=1000"],
    }[where]
    if where == "pretraining":
        flags += [f"--outf={tmp_path / 'new'}"]
    bar = {"training": "epoch 3/", "evaluation": "samples_prior:", "pretraining": "pretraining:"}
    program = Program(tmp_path, *flags)
    program.wait_until(lambda: bar[where] in program.err)
    for _ in range(30):
        program.kill(number)
        time.sleep(0.002)
    assert program.wait(60) == 128 + number
    assert set(program.messages) <= {
        *("main.py: interrupted", STOPPING),
        *(line for line in program.messages if "continuing the run in" in line),
        *(line for line in program.messages if "the same command continues" in line),
    }
    if where == "evaluation":
        assert {name: contents(outf)[name] for name in before} == before
    elif where == "training":
        step = torch.load(outf / "checkpoint.pth.tar", weights_only=True)["step"]
        niter = f"--niter={step // 3 + 1}"
        ends_well(run(tmp_path, *flags, niter, "--sample_every=1"))
        assert steps(outf) == list(range(1, 3 * (step // 3 + 1) + 1))


def test_an_interrupt_during_the_imports_is_quiet(tmp_path):
    """A module that waits takes the place of the first one that is slow to import."""
    (tmp_path / "numpy").mkdir()
    code = "import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(60)\n"
    (tmp_path / "numpy" / "__init__.py").write_text(code)
    program = subprocess.Popen(
        [sys.executable, str(REPO / "main.py")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
    )
    while not (tmp_path / "importing").exists():
        time.sleep(0.01)
    program.send_signal(signal.SIGINT)
    assert program.communicate(timeout=60)[1] == b""
    assert program.returncode == -signal.SIGINT  # which a shell shows as 130


def test_a_kill_in_the_last_evaluation_and_a_finished_run(trained, toy_faces, tmp_path):
    """The first is finished by the same command; the second is one line on standard output."""
    outf = tmp_path / "x"
    flags = [f"--dataroot={toy_faces}", "--mode=mmd", *TINY, "--niter=1", "--seed=1"]
    program = Program(tmp_path, *flags, f"--outf={outf}", "--n_samples=1000000")
    program.wait_until(lambda: "samples_prior:" in program.err)
    program.kill(signal.SIGKILL)
    program.wait()
    assert not (outf / "metrics.json").exists()
    ends_well(run(tmp_path, *flags, f"--outf={outf}"))
    assert json.loads((outf / "metrics.json").read_text())["step"] == 3
    found = [name for name in differences(trained["mmd"], outf) if "n_samples" not in name]
    assert found == []

    before = contents(outf)
    program = run(tmp_path, *flags, f"--outf={outf}")
    assert (program.wait(), program.err) == (0, "")
    assert program.out == f"the run in {outf} is complete; a larger --niter continues it\n"
    assert contents(outf) == before


def test_a_signal_while_images_are_decoded(toy_faces, tmp_path):
    data = tmp_path / "data" / "faces"
    data.mkdir(parents=True)
    for i in range(6_000):
        os.link(next(toy_faces.glob("*/*.jpg")), data / f"{i}.jpg")
    flags = [f"--dataroot={data.parent}", *TINY, "--niter=1", f"--outf={tmp_path / 'x'}"]
    program = Program(tmp_path, *flags, "--workers=2")
    program.wait_until(lambda: bool(list(data.parent.glob(".*.tmp"))))
    program.kill(signal.SIGTERM)
    assert program.wait(60) == 143
    assert program.messages == ["main.py: interrupted"]
    assert not list(data.parent.glob(".*.npy"))
    for path in sorted(data.iterdir())[30:]:
        path.unlink()
    ends_well(run(tmp_path, *flags))


def test_killed_three_times_it_leaves_the_same_bits(tmp_path):
    """The short form of kill_and_resume.py."""
    flags = flags_of("mmd", draw_faces(tmp_path), epochs=8)
    tally, found = compare(tmp_path, flags, kills=3, seed=0)
    assert tally["kills"] == 3
    assert found == []


def test_half_a_checkpoint_is_neither_read_nor_kept(trained, tmp_path):
    outf, resume = continued(trained["mmd"], tmp_path)
    whole = (outf / "checkpoint.pth.tar").read_bytes()
    (outf / ".checkpoint.pth.tar.tmp").write_bytes(whole[: len(whole) // 2])
    ends_well(run(tmp_path, resume, "--niter=2"))
    assert [path.name for path in outf.glob(".*")] == [".lock"]


# --------------------------------------------------------------------------------------------------
# Others at the same time, and messages that cannot go anywhere


@pytest.mark.parametrize("what", ["run", "evaluation"])
def test_a_folder_belongs_to_one_process(what, trained, toy_faces, tmp_path):
    outf, _ = continued(trained["mmd"], tmp_path)
    flags = [f"--dataroot={toy_faces}", "--mode=mmd", *TINY, "--seed=1", f"--outf={outf}"]
    endless = ["--niter=100000"] if what == "run" else ["--evaluate", "--n_samples=1000000"]
    first = Program(tmp_path / "first", *flags, *endless)
    first.wait_until(lambda: ("epoch 2/" if what == "run" else "samples_prior") in first.err)
    owner = f"{outf} is in use by process {first.process.pid}:"
    for second in (["--niter=2"], ["--evaluate"]):
        says(run(tmp_path / "second", *flags, *second), 1, owner)
    first.kill(signal.SIGKILL)
    first.wait()
    ends_well(run(tmp_path / "second", *flags, "--evaluate"))


@pytest.mark.parametrize("what", ["closed", "full", "pipe"])
def test_output_that_goes_nowhere_does_not_end_a_run(what, trained, toy_faces, tmp_path):
    where = {"closed": None, "full": "/dev/full", "pipe": tmp_path / "pipe"}[what]
    streams = {"stdout": where} | ({} if what == "pipe" else {"stderr": where})
    os.mkfifo(tmp_path / "pipe")
    flags = [f"--dataroot={toy_faces}", "--mode=mmd", *TINY, "--niter=1", "--seed=1"]
    program = Program(tmp_path, *flags, f"--outf={tmp_path / 'x'}", **streams)
    if what == "pipe":  # as `| head -1`
        os.close(os.open(where, os.O_RDONLY))
    assert program.wait() == 0
    assert differences(trained["mmd"], tmp_path / "x") == []


def test_a_log_that_is_removed_meanwhile_is_whole_at_the_end(toy_faces, tmp_path):
    log = tmp_path / "x" / "log.csv"
    flags = [f"--dataroot={toy_faces}", "--mode=mmd", *TINY, "--niter=20", "--sample_every=20"]
    program = Program(tmp_path, *flags, f"--outf={log.parent}")
    program.wait_until(lambda: log_lines(log.parent) >= 5)
    log.unlink()
    ends_well(program)
    assert steps(log.parent) == list(range(1, 61))
    assert log.read_text().startswith("epoch,step,reconstruction,")


# --------------------------------------------------------------------------------------------------
# Runs that continue elsewhere, with other flags, or on other images


def test_a_checkpoint_moves_and_takes_the_flags_that_may_change(trained, toy_faces, tmp_path):
    """Another folder for checkpoint, output and data: the same networks as without any move."""
    moved = Path(shutil.copy(trained["mmd"] / "checkpoint.pth.tar", tmp_path / "mine.pth"))
    before = moved.read_bytes()
    data = shutil.copytree(toy_faces, tmp_path / "other data", copy_function=shutil.copy)
    flags = [f"--outf={tmp_path / 'new'}", f"--dataroot={data}", "--print_every=2", "--gpu_id=3"]
    changed = ["--niter=3", "--sample_every=2", "--workers=1", f"--cache_dir={tmp_path / 'c'}"]
    ends_well(run(tmp_path, f"--checkpoint={moved}", *flags, *changed))
    assert moved.read_bytes() == before
    assert not (tmp_path / "new" / "fake_samples_epoch_001.png").exists()
    assert steps(tmp_path / "new") == [1, 2, 3, 4, 6, 8]  # every second from step 3 on

    flags = [f"--dataroot={toy_faces}", "--mode=mmd", *TINY, "--niter=3", "--seed=1"]
    ends_well(run(tmp_path, *flags, f"--outf={tmp_path / 'whole'}"))
    a, b = (
        torch.load(tmp_path / name / "checkpoint.pth.tar", weights_only=True)
        for name in ("whole", "new")
    )
    assert b["flags"]["dataroot"] == str(data)
    for name in ("net", "optimizer_net", "best", "step"):
        assert unequal(a[name], b[name], name) == []


@pytest.mark.skipif(NO_GPU, reason="needs a CUDA GPU")
def test_a_checkpoint_moves_between_cpu_and_gpu(trained, tmp_path):
    outf, resume = continued(trained["gan"], tmp_path)
    for epochs, machine in ((2, "--cuda"), (3, "--no-cuda")):
        ends_well(run(tmp_path, resume, f"--niter={epochs}", machine))
    assert steps(outf) == list(range(1, 10))


def test_flags_of_another_run_are_named_and_those_that_agree_are_not(trained, toy_faces, tmp_path):
    outf, resume = continued(trained["mmd"], tmp_path)
    before = contents(outf)
    other = ["--mode=gan", "--noise=add_noise", "--e_pretrain", "--seed=2", "--lr=0.00030"]
    program = run(tmp_path, f"--dataroot={toy_faces}", *TINY, "--nz=8", *other, f"--outf={outf}")
    says(program, 2, "--nz=8 (there: 4)", "--mode=gan (there: mmd)", "choose another --outf")
    says(program, 2, "--e_pretrain=True (there: False)", "--seed=2 (there: 1)")
    assert not any(f"--{name}=" in program.messages[0] for name in ("noise", "nf", "lr"))
    says(run(tmp_path, resume, "--niter=2", "--kernel=RBF"), 2, "--kernel=RBF (there: IMQ)")
    (tmp_path / "other").mkdir()
    shutil.copy(trained["mmd"] / "checkpoint.pth.tar", tmp_path / "other")
    program = run(tmp_path, resume, "--niter=2", f"--outf={tmp_path / 'other'}")
    says(program, 2, f"--outf={tmp_path / 'other'} holds a run already")
    assert contents(outf) == before


def test_other_images_than_those_trained_on(trained, toy_faces, tmp_path):
    """An error for a run, which would mix held-out and training images, and a word otherwise."""
    outf, resume = continued(trained["mmd"], tmp_path)
    before = contents(outf)
    data = shutil.copytree(toy_faces, tmp_path / "data", copy_function=shutil.copy)
    image = next(data.glob("*/*.jpg"))
    shutil.copy(image, image.with_name("0.jpg"))
    told = f"--dataroot={data}: not the images that the checkpoint was trained on"
    says(run(tmp_path, resume, "--niter=2", f"--dataroot={data}"), 1, told)
    assert contents(outf) == before
    program = run(tmp_path, resume, "--evaluate", f"--dataroot={data}")
    ends_well(program)
    assert program.messages == [f"main.py: {told}"]


# --------------------------------------------------------------------------------------------------
# Files that are no checkpoints


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "inside"])
def test_a_hostile_checkpoint_is_not_executed(kind, trained, tmp_path):
    mark, path = tmp_path / "executed", tmp_path / "hostile.pth.tar"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Hostile(mark)))
    elif kind == "inside":
        state = torch.load(trained["mmd"] / "checkpoint.pth.tar", weights_only=True)
        torch.save(state | {"more": Hostile(mark)}, path)
    else:
        torch.save(Hostile(mark), path, _use_new_zipfile_serialization=kind == "zip")
    says(run(tmp_path, f"--checkpoint={path}", f"--outf={tmp_path / 'x'}"), 1, str(path))
    assert not mark.exists()


KINDS = ["missing", "folder", "fifo", "empty", "text", "zip", "picture", 1, 0.3, 0.9, -100, -1]


@pytest.mark.parametrize("what", KINDS)
def test_a_file_that_is_no_whole_checkpoint(what, trained, tmp_path):
    path = tmp_path / "broken.pth.tar"
    whole = (trained["mmd"] / "checkpoint.pth.tar").read_bytes()
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data.txt", "no checkpoint")
    elif what == "picture":
        shutil.copy(trained["mmd"] / "codes.png", path)
    elif what != "missing":
        texts = {"empty": b"", "text": b"not a checkpoint\n" * 100}
        end = int(what * len(whole)) if isinstance(what, float) else what
        path.write_bytes(texts[what] if what in texts else whole[:end])
    program = run(tmp_path, f"--checkpoint={path}", "--evaluate", f"--outf={tmp_path / 'x'}")
    says(program, 1, str(path))
    assert not (tmp_path / "x").exists()


def put(place: str, value: Any) -> Callable[[dict], None]:
    """Sets what lies at a path of keys, None for removing it, a function of what is there."""

    def change(state: dict[str, Any]) -> None:
        *path, last = [int(key) if key.isdigit() else key for key in place.split("/")]
        for key in path:
            state = state[key]
        if value is None:
            del state[last]
        else:
            state[last] = value(state[last]) if callable(value) else value

    change.__name__ = place
    return change


WEIGHT, MOMENTS = "net/encoder.moments.bias", "optimizer_net/state/0"
NOT_A_NUMBER, INFINITE = (lambda w: w * math.nan), (lambda w: torch.full_like(w, math.inf))
WRONG = [
    *[put(key, None) for key in ("net", "optimizer_net", "step", "best", "log", "flags", WEIGHT)],
    *[put(key, "text") for key in ("net", "optimizer_net", "step", "flags", WEIGHT, MOMENTS)],
    *[put("flags/nz", value) for value in (-1, 5.5, "4 --evaluate", [4], True, 8)],
    *[put("flags/lr", value) for value in (0.0, math.nan, "1e-3 --seed=2")],
    *[put("flags/mode", "gan"), put("flags/e_pretrain", "yes"), put("flags/x y", 1)],
    *[put("step", -1), put("log", 7), put("n_train", "24"), put("images", "others")],
    *[put(WEIGHT, change) for change in (lambda w: w[:-1], torch.Tensor.to_sparse)],
    *[put(WEIGHT, change) for change in (NOT_A_NUMBER, INFINITE, lambda w: w.to("meta"))],
    *[put(f"{MOMENTS}/exp_avg", change) for change in (torch.zeros(3), torch.Tensor.to_sparse)],
    *[put(f"{MOMENTS}/exp_avg", change) for change in (NOT_A_NUMBER, None)],
    put(f"{MOMENTS}/step", "text"),
]


@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_a_checkpoint_that_was_edited(change, trained, tmp_path):
    """One line; the file stays as it is, and nothing takes the place of a checkpoint."""
    path = Path(shutil.copy(trained["mmd"] / "checkpoint.pth.tar", tmp_path / "wrong.pth.tar"))
    edit(path, change)
    before = path.read_bytes()
    program = run(tmp_path, f"--checkpoint={path}", "--niter=2", f"--outf={tmp_path / 'x'}")
    assert program.wait() == 1, program.err
    assert len([line for line in program.messages if "error: " in line]) == 1
    assert set(program.messages[:-1]) <= {
        f"main.py: continuing the run in {tmp_path / 'x'} from step 3 of 6"
    }
    assert path.read_bytes() == before
    assert not list((tmp_path / "x").glob("*.pth.tar"))


def spread(value: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape that has the memory of one number."""
    return torch.zeros(1).expand(value.shape)


UNUSUAL = [
    *[put(WEIGHT, change) for change in (spread, torch.Tensor.double, torch.Tensor.int)],
    *[put(f"{MOMENTS}/exp_avg", change) for change in (spread, torch.Tensor.half)],
    put("optimizer_net/param_groups/0", {"amsgrad": True, "betas": "no", "weight_decay": 1e30}),
    *[put("log", ""), put("log", "epoch,step\n2,x,y\n"), put("step", 10**30)],
    *[put("flags/outf", "/nowhere"), put("flags/help", True), put("flags/evaluate", True)],
]


@pytest.mark.parametrize("change", UNUSUAL, ids=lambda change: change.__name__)
def test_a_checkpoint_of_unusual_values_is_read_into_the_programs_own(change, trained, tmp_path):
    """Layouts and settings come from the program, commands from the command line."""
    outf, resume = continued(trained["mmd"], tmp_path)
    edit(outf / "checkpoint.pth.tar", change)
    ends_well(run(tmp_path, resume, "--niter=2"))
    state = torch.load(outf / "checkpoint.pth.tar", weights_only=True)
    assert state["net"]["encoder.moments.bias"].dtype == torch.float32
    assert json.loads((outf / "metrics.json").read_text())["step"] in (6, 10**30)


# --------------------------------------------------------------------------------------------------
# Numbers that are not finite, singular covariances


@pytest.mark.parametrize(("batch_size", "print_every"), [(8, 1), (8, 100), (24, 1)])
def test_a_loss_that_is_not_finite_is_not_saved(batch_size, print_every, toy_faces, tmp_path):
    """Whether the log or the end of the epoch notices; a single step shows in the metrics."""
    flags = [f"--batch_size={batch_size}", f"--print_every={print_every}", "--lr=1e30"]
    program = run(tmp_path, f"--dataroot={toy_faces}", *TINY, *flags, f"--outf={tmp_path / 'x'}")
    says(program, 1, " at step ", "lower --lr")
    assert not list((tmp_path / "x").glob("*.pth.tar*"))


def blow_up(argv: list[str], value: float) -> None:
    """Runs a command line in which the first step breaks the weights and a signal comes."""
    step = main.train_step

    def train_step(*args: object) -> torch.Tensor:
        losses = step(*args)
        with torch.no_grad():
            args[0].net.decoder.layers[0].bias += value
        os.kill(os.getpid(), signal.SIGTERM)
        return losses

    main.train_step, sys.argv = train_step, ["main.py", *argv]
    sys.exit(main.main())


@pytest.mark.parametrize("value", [math.nan, 1e12])
def test_a_signal_does_not_save_broken_weights(value, trained, tmp_path):
    outf, resume = continued(trained["gan"], tmp_path)
    before = contents(outf)
    process = start(blow_up, [resume, "--niter=3"], value)
    process.join(60)
    assert process.exitcode == 1
    assert {name: contents(outf)[name] for name in CHECKPOINTS} == {
        name: before[name] for name in CHECKPOINTS
    }
    ends_well(run(tmp_path, resume, "--niter=2"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--mode=mmd", "--nz=300"],
        ["--mode=gan", "--lr=0.3"],
        ["--mode=mmd", "--lr=0.1", "--nz=16", "--pz_scale=1e3"],
    ],
    ids=" ".join,
)
def test_codes_of_a_singular_or_huge_covariance_are_evaluated(flags, toy_faces, tmp_path):
    outf = tmp_path / "x"
    ends_well(
        run(tmp_path, f"--dataroot={toy_faces}", *TINY, *flags, "--niter=1", f"--outf={outf}")
    )
    metrics = json.loads((outf / "metrics.json").read_text())
    assert all(math.isfinite(value) for value in metrics.values())
    ends_well(run(tmp_path, f"--outf={outf}", "--evaluate"))
    assert np.isfinite(np.load(outf / "eval" / "codes.npy")).all()


# --------------------------------------------------------------------------------------------------
# Full disks, folders that cannot be written


LIMITS = [(200_000, ".pth.tar"), (8_000, ".png"), (600, "args.json")]


@pytest.mark.parametrize(("max_bytes", "name"), LIMITS)
def test_a_full_disk_leaves_the_checkpoint_whole(max_bytes, name, trained, tmp_path):
    outf, resume = continued(trained["gan"], tmp_path)
    before = contents(outf)
    program = run(tmp_path, resume, "--niter=2", max_bytes=max_bytes)
    assert program.wait() == 1
    assert f"main.py: error: cannot write {outf}" in program.messages[-1]
    assert name in program.messages[-1] and "File too large" in program.messages[-1]
    for checkpoint in CHECKPOINTS:
        assert contents(outf)[checkpoint] == before[checkpoint]
    assert {path.name for path in outf.glob(".*")} == {".lock"}
    ends_well(run(tmp_path, resume, "--niter=2"))  # there is space again


def test_a_full_disk_stops_the_decoding_and_the_evaluation(trained, toy_faces, tmp_path):
    cache, outf = tmp_path / "cache", tmp_path / "y"
    flags = [f"--dataroot={toy_faces}", *TINY, f"--cache_dir={cache}", f"--outf={tmp_path / 'x'}"]
    says(run(tmp_path, *flags, max_bytes=40_000), 1, f"cannot write {cache}", "File too large")
    assert not list(cache.glob("*.npy")) and not list(cache.glob(".*.npy"))
    evaluate = [f"--checkpoint={trained['mmd'] / 'checkpoint.pth.tar'}", "--evaluate"]
    program = run(tmp_path, *evaluate, f"--outf={outf}", max_bytes=500)
    says(program, 1, f"cannot write {outf / 'eval'}", "File too large")
    assert not (outf / "metrics.json").exists()


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_where_the_output_should_go(below, toy_faces, tmp_path):
    (tmp_path / "file").write_text("mine")
    outf = tmp_path / "file" / below
    program = run(tmp_path / "o", f"--dataroot={toy_faces}", *TINY, f"--outf={outf}")
    says(program, 1, "cannot create the folder", str(outf))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_may_not_be_written(trained, toy_faces):
    """Root may write anywhere, and becomes nobody for this."""
    options = {"uid": 65534} if os.getuid() == 0 else {}
    with tempfile.TemporaryDirectory() as name:  # unlike tmp_path, open to others
        folder = Path(name)
        folder.chmod(0o755)
        data = shutil.copytree(toy_faces, folder / "data")
        data.chmod(0o777)
        outf = shutil.copytree(trained["mmd"], folder / "outf")
        (outf / ".lock").unlink()
        outf.chmod(0o555)
        before = contents(outf)
        flags = [f"--checkpoint={outf / 'checkpoint.pth.tar'}", "--niter=2", f"--dataroot={data}"]
        program = run(folder / "o", *flags, **options)
        says(program, 1, f"cannot write {outf}", "Permission denied")
        flags = [f"--dataroot={data}", *TINY, f"--outf={outf / 'deeper'}"]
        program = run(folder / "o", *flags, **options)
        says(program, 1, f"cannot create the folder {outf / 'deeper'}", "Permission denied")
        assert contents(outf) == before
        outf.chmod(0o755)


# --------------------------------------------------------------------------------------------------
# Flags and the environment

REFUSED = {
    "": "--dataroot is required",
    "--dataroot=d --outf=": "argument --outf: it is empty",
    "--dataroot=d --outf=d/faces": "--outf=d/faces is inside --dataroot=d",
    "--dataroot=d --outf=e/../d": "--outf=e/../d is inside --dataroot=d",
    "--dataroot=d --mode=mmd --nowozin_trick": "--nowozin_trick is for --mode=gan",
    "--dataroot=d --mode=vae --noise=add_noise": "--mode=vae needs --noise=gaussian",
    "--dataroot=d --ngpu=3": "--batch_size=100 cannot be shared by 3 processes",
    "--dataroot=d --batch_size=4 --ngpu=4": "--batch_size=4 cannot be shared by 4 processes",
    "--dataroot=d --beta1=1": "--beta1=1.0 must be below 1",
    "--dataroot=d --batch=4": "unrecognized arguments: --batch=4",
    "--dataroot=d extra": "unrecognized arguments: extra",
    "--dataroot=d --lr=0": "argument --lr: 0 is out of range: it must be more than 0",
    "--dataroot=d --lr=nan": "argument --lr: nan is out of range",
    "--dataroot=d --LAMBDA=1e400": "argument --LAMBDA: 1e400 is out of range",
    "--dataroot=d --nz=two": "argument --nz: invalid int value: 'two'",
    "--dataroot=d --seed=-1": "argument --seed: -1 is out of range: it must be at least 0",
    "--dataroot=d --n_test=1": "argument --n_test: 1 is out of range: it must be at least 2",
    "--dataroot=d --image_size=31": "argument --image_size: invalid choice: 31",
    "--dataroot=d --mode=ae": "argument --mode: invalid choice: 'ae'",
    "--dataroot=d --imq_scales=1,0": "argument --imq_scales: 0 is out of range",
}


@pytest.mark.parametrize("command", REFUSED)
def test_flags_that_make_no_sense(command, tmp_path):
    says(run(tmp_path, *command.split()), 2, REFUSED[command])


def test_what_this_machine_lacks(toy_faces, tmp_path):
    flags = [f"--dataroot={toy_faces}", *TINY, f"--outf={tmp_path / 'x'}"]
    nothing = {"PATH": "/nowhere"}
    says(run(tmp_path, *flags, "--compile", env=nothing), 2, "--compile needs a C++ compiler")
    gpus = {"CUDA_VISIBLE_DEVICES": ""}
    says(run(tmp_path, *flags, "--cuda", env=gpus), 2, "--cuda", "no CUDA GPU")
    says(run(tmp_path, *flags, "--cuda", "--ngpu=2", env=gpus), 2, "--ngpu=2: there are 0 GPUs")
    says(
        run(tmp_path, *flags, "--evaluate"), 1, f"{tmp_path / 'x' / 'checkpoint.pth.tar'}: no such"
    )
    assert not (tmp_path / "x").exists()


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(utils.UsageError, match="--gpu_id=2: the 2 GPUs here are 0 to 1"):
        utils.pick_device(True, 2)


@pytest.mark.parametrize("flags", [["--n_test=25"], ["--batch_size=26"], ["--n_test=" + "9" * 40]])
def test_more_images_asked_for_than_there_are(flags, toy_faces, tmp_path):
    program = run(tmp_path, f"--dataroot={toy_faces}", *TINY, *flags, f"--outf={tmp_path / 'x'}")
    says(program, 2, flags[0], "30 images are too few")


def test_variables_that_another_program_left_are_ignored(trained, toy_faces, tmp_path):
    left = {"LOCAL_RANK": "0", "WORLD_SIZE": "3"}
    flags = [f"--dataroot={toy_faces}", "--mode=mmd", *TINY, "--niter=1", "--seed=1"]
    ends_well(run(tmp_path, *flags, f"--outf={tmp_path / 'x'}", env=left))
    assert differences(trained["mmd"], tmp_path / "x") == []


def test_any_flags_end_in_a_run_or_in_a_line(trained, toy_faces, tmp_path):
    """Draws command lines, with values in and out of range: none may end otherwise."""
    numbers = ["-1", "0", "1", "2", "7", "1e-3", "0.5", "1e3", "1e30", "nan", "1e400", "x", ""]
    pool = dict.fromkeys(("LAMBDA", "pz_scale", "lr", "lr_adv", "beta1", "seed"), numbers)
    pool |= {"n_test": numbers, "nz": ["1", "2", "9", "0"], "batch_size": ["2", "8", "24", "25"]}
    pool |= {"image_size": ["32", "31"], "nf": ["1", "3"], "niter": ["1", "2", "0"]}
    pool |= {"mode": ["gan", "mmd", "vae"], "arch": ["dcgan", "paper", ""], "cost": ["l2", "l1"]}
    pool |= {"noise": ["deterministic", "add_noise", "gaussian"], "kernel": ["IMQ", "RBF"]}
    pool |= {"lr_schedule": ["paper", "scaled", "constant"], "crop": ["32", "140", "999"]}
    pool |= {"imq_scales": ["1", "1,2", "1,"], "n_samples": ["2", "9", "1"]}
    pool |= {"checkpoint": [f"{path}/checkpoint.pth.tar" for path in trained.values()] + ["none"]}
    pool |= {"dataroot": [str(toy_faces), str(tmp_path), "none"]}
    for name in ("input_normalize_sym", "nowozin_trick", "e_pretrain", "evaluate", "amp"):
        pool |= {name: None, f"no-{name}": None}
    rng, statuses = random.Random(0), []
    for number in range(24):
        names = rng.sample(sorted(pool), rng.randint(1, 4))
        values = {name: rng.choice(pool[name]) if pool[name] else None for name in names}
        flags = [f"--{k}" if value is None else f"--{k}={value}" for k, value in values.items()]
        argv = [f"--dataroot={toy_faces}", *TINY, "--niter=1", *flags]
        program = run(tmp_path / "o", *argv, f"--outf={tmp_path / 'o' / str(number)}")
        assert program.wait() in (0, 1, 2), argv
        assert "Traceback" not in program.err, argv
        errors = [line for line in program.messages if "main.py: error: " in line]
        assert len(errors) == (program.wait() > 0), argv
        statuses.append(program.wait())
    assert {0, 1, 2} == set(statuses)  # the draws reach all three
