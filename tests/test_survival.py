"""Interruptions, broken checkpoints, full disks, wrong flags: what is said, and what is left."""

import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_and_resume import compare, differences, flags_of, unequal
from program import ENDLESS, REPO, TINY, Program, log_lines, run, steps

import main
import utils

NO_GPU = not torch.cuda.is_available()
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


def load(outf: Path) -> dict[str, Any]:
    """The last checkpoint of a run."""
    return torch.load(outf / "checkpoint.pth.tar", weights_only=True)


def continued(folder: Path, tmp_path: Path) -> tuple[Path, str]:
    """A copy of a trained run's folder, and the flag to continue it."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    return copy, f"--checkpoint={copy / 'checkpoint.pth.tar'}"


@pytest.mark.parametrize(("mode", "number"), [("gan", signal.SIGINT), ("mmd", signal.SIGTERM)])
def test_a_signal_ends_the_step_and_the_same_command_continues(mode, number, tiny_flags, tmp_path):
    """The step is finished and saved, and in the end no bit tells of the interruption."""
    outf = tmp_path / "a run"
    flags = [*tiny_flags, f"--mode={mode}", "--batch_size=2", "--niter=4"]
    program = Program(tmp_path / "output", *flags, f"--outf={outf}")
    program.wait_until(lambda: log_lines(outf) >= 4)  # three steps of the twelve of an epoch
    program.kill(number)
    assert program.wait() == 128 + number, program.err
    stopped = load(outf)
    step = stopped["step"]
    told = f"main.py: stopped after step {step} of 48; the same command continues"
    assert program.messages == [STOPPING, told]
    assert stopped["log"] == (outf / "log.csv").read_text()
    assert steps(outf) == list(range(1, step + 1))

    again = run(tmp_path / "output", *flags, f"--outf={outf}").succeeds()
    assert again.messages == [f"main.py: continuing the run in {outf} from step {step} of 48"]
    run(tmp_path / "output", *flags, f"--outf={tmp_path / 'whole'}").succeeds()
    assert differences(tmp_path / "whole", outf) == []


def make_steps_endless() -> None:
    """Lets no training step end."""

    def train_step(*_: object) -> None:
        utils.warn("a step begins")
        time.sleep(1000)

    main.train_step = train_step


def test_a_second_interrupt_stops_at_once(tiny_flags, tmp_path):
    program = Program(tmp_path, *tiny_flags, f"--outf={tmp_path / 'x'}", change=make_steps_endless)
    program.wait_until(lambda: "a step begins" in program.err)
    program.kill(signal.SIGINT)
    program.wait_until(lambda: "stopping" in program.err)
    program.kill(signal.SIGINT)
    assert program.wait() == 130
    assert program.messages == ["main.py: a step begins", STOPPING, "main.py: interrupted"]
    assert not list((tmp_path / "x").glob("*checkpoint*"))


@pytest.mark.parametrize("where", ["pretraining", "evaluation"])
def test_any_number_of_interrupts(where, trained, mmd_flags, tmp_path):
    """A burst ends with the status of the first, and changes nothing."""
    outf, flags = tmp_path / "x", ["--e_pretrain", "--e_pretrain_iters=1000000", "--pz_scale=1e3"]
    if where == "evaluation":
        shutil.copytree(trained["mmd"], outf)
        flags = ["--evaluate", "--n_samples=50000"]
    bar = "samples_prior:" if where == "evaluation" else "pretraining:"
    program = Program(tmp_path, *mmd_flags, *flags, f"--outf={outf}")
    program.wait_until(lambda: bar in program.err)
    for _ in range(30):
        program.kill(signal.SIGINT)
        time.sleep(0.002)
    assert program.wait() == 130
    assert set(program.messages) <= {"main.py: interrupted", STOPPING}
    if where == "evaluation":
        assert differences(trained["mmd"], outf) == ["eval: only one has it"]


def test_an_interrupt_during_the_imports_is_quiet(tmp_path):
    """A module that waits takes the place of the first one that is slow to import."""
    (tmp_path / "numpy").mkdir()
    code = "import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(600)\n"
    (tmp_path / "numpy" / "__init__.py").write_text(code)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(REPO / "main.py")]
    program = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE)
    while not (tmp_path / "importing").exists():
        time.sleep(0.01)
    program.send_signal(signal.SIGINT)
    assert program.communicate(timeout=100)[1] == b""
    assert program.returncode == -signal.SIGINT  # which a shell shows as 130


def test_a_finished_run_is_one_line(trained, mmd_flags, tmp_path):
    outf, _ = continued(trained["mmd"], tmp_path)
    before = contents(outf)
    program = run(tmp_path, *mmd_flags, f"--outf={outf}").succeeds()
    assert program.err == ""
    assert program.out == f"the run in {outf} is complete; a larger --niter continues it\n"
    assert contents(outf) == before


@pytest.mark.parametrize("mode", ["gan", "mmd"])
def test_killed_three_times_it_leaves_the_same_bits(mode, toy_faces, tmp_path):
    """The short form of kill_and_resume.py."""
    tally, found = compare(tmp_path, flags_of(mode, toy_faces, epochs=6), kills=3, seed=0)
    assert tally["kills"] == 3
    assert found == []


def test_a_folder_belongs_to_one_process(trained, mmd_flags, tmp_path):
    outf, _ = continued(trained["mmd"], tmp_path)
    first = Program(tmp_path / "first", *mmd_flags, *ENDLESS, f"--outf={outf}")
    first.wait_until(lambda: "epoch 2/" in first.err)
    owner = f"{outf} is in use by process {first.process.pid}:"
    for second in ("--niter=2", "--evaluate"):
        run(tmp_path / "second", *mmd_flags, f"--outf={outf}", second).fails(1, owner)
    first.kill(signal.SIGKILL)
    first.wait()
    run(tmp_path / "second", f"--outf={outf}", "--evaluate").succeeds()


@pytest.mark.parametrize("what", ["closed", "full", "pipe"])
def test_output_that_goes_nowhere_does_not_end_a_run(what, trained, mmd_flags, tmp_path):
    where = {"closed": None, "full": "/dev/full", "pipe": tmp_path / "pipe"}[what]
    streams = {"stdout": where} | ({} if what == "pipe" else {"stderr": where})
    os.mkfifo(tmp_path / "pipe")
    program = Program(tmp_path, *mmd_flags, f"--outf={tmp_path / 'x'}", **streams)
    if what == "pipe":  # as `| head -1`
        os.close(os.open(where, os.O_RDONLY))
    assert program.wait() == 0
    assert differences(trained["mmd"], tmp_path / "x") == []


def test_a_checkpoint_moves_and_takes_the_flags_that_may_change(trained, mmd_flags, tmp_path):
    """Another folder for checkpoint, output and data: the same networks as without any move."""
    moved = Path(shutil.copy(trained["mmd"] / "checkpoint.pth.tar", tmp_path / "mine.pth"))
    before = moved.read_bytes()
    root = Path(mmd_flags[0].removeprefix("--dataroot="))
    data = shutil.copytree(root, tmp_path / "other data", copy_function=shutil.copy)
    flags = [f"--outf={tmp_path / 'new'}", f"--dataroot={data}", "--print_every=2", "--gpu_id=3"]
    changed = ["--niter=3", "--sample_every=2", "--workers=1", f"--cache_dir={tmp_path / 'c'}"]
    run(tmp_path, f"--checkpoint={moved}", *flags, *changed).succeeds()
    assert moved.read_bytes() == before
    assert not (tmp_path / "new" / "fake_samples_epoch_001.png").exists()
    assert steps(tmp_path / "new") == [1, 2, 3, 4, 6, 8]  # every second from step 3 on

    run(tmp_path, *mmd_flags, "--niter=3", f"--outf={tmp_path / 'whole'}").succeeds()
    a, b = load(tmp_path / "whole"), load(tmp_path / "new")
    assert b["flags"]["dataroot"] == str(data)
    for name in ("net", "optimizer_net", "best", "step"):
        assert unequal(a[name], b[name], name) == []


@pytest.mark.skipif(NO_GPU, reason="needs a CUDA GPU")
def test_a_checkpoint_moves_between_cpu_and_gpu(trained, tmp_path):
    outf, resume = continued(trained["gan"], tmp_path)
    for epochs, machine in ((2, "--cuda"), (3, "--no-cuda")):
        run(tmp_path, resume, f"--niter={epochs}", machine).succeeds()
    assert steps(outf) == list(range(1, 10))


def test_flags_of_another_run_are_named_and_those_that_agree_are_not(trained, toy_faces, tmp_path):
    outf, resume = continued(trained["mmd"], tmp_path)
    before = contents(outf)
    other = ["--mode=gan", "--noise=add_noise", "--e_pretrain", "--seed=2", "--lr=0.00030"]
    program = run(tmp_path, f"--dataroot={toy_faces}", *TINY, "--nz=8", *other, f"--outf={outf}")
    program.fails(2, "--nz=8 (there: 4)", "--mode=gan (there: mmd)", "choose another --outf")
    program.fails(2, "--e_pretrain=True (there: False)", "--seed=2 (there: 1)")
    assert not any(f"--{name}=" in program.messages[0] for name in ("noise", "nf", "lr"))
    run(tmp_path, resume, "--kernel=RBF").fails(2, "--kernel=RBF (there: IMQ)")
    (tmp_path / "other").mkdir()
    shutil.copy(trained["mmd"] / "checkpoint.pth.tar", tmp_path / "other")
    program = run(tmp_path, resume, "--niter=2", f"--outf={tmp_path / 'other'}")
    program.fails(2, f"--outf={tmp_path / 'other'} holds a run already")
    assert contents(outf) == before


def test_other_images_than_those_trained_on(trained, toy_faces, tmp_path):
    """An error for a run, which would mix held-out and training images, and a word otherwise."""
    outf, resume = continued(trained["mmd"], tmp_path)
    before = contents(outf)
    data = shutil.copytree(toy_faces, tmp_path / "data", copy_function=shutil.copy)
    image = next(data.glob("*/*.jpg"))
    shutil.copy(image, image.with_name("0.jpg"))
    told = f"--dataroot={data}: not the images that the checkpoint was trained on"
    run(tmp_path, resume, "--niter=2", f"--dataroot={data}").fails(1, told)
    assert contents(outf) == before
    program = run(tmp_path, resume, "--evaluate", f"--dataroot={data}").succeeds()
    assert program.messages == [f"main.py: {told}"]


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
        torch.save(load(trained["mmd"]) | {"more": Hostile(mark)}, path)
    else:
        torch.save(Hostile(mark), path, _use_new_zipfile_serialization=kind == "zip")
    run(tmp_path, f"--checkpoint={path}", f"--outf={tmp_path / 'x'}").fails(1, str(path))
    assert not mark.exists()


@pytest.mark.parametrize("what", ["missing", "folder", "fifo", "empty", "text", 1, 0.9, -1])
def test_a_file_that_is_no_whole_checkpoint(what, trained, tmp_path):
    path = tmp_path / "broken.pth.tar"
    whole = (trained["mmd"] / "checkpoint.pth.tar").read_bytes()
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what != "missing":
        texts = {"empty": b"", "text": b"not a checkpoint\n" * 100}
        end = int(what * len(whole)) if isinstance(what, float) else what
        path.write_bytes(texts[what] if what in texts else whole[:end])
    program = run(tmp_path, f"--checkpoint={path}", "--evaluate", f"--outf={tmp_path / 'x'}")
    program.fails(1, str(path))
    assert not (tmp_path / "x").exists()


def put(place: str, value: Any) -> Callable[[dict], None]:
    """Sets what lies at a path of keys; None removes it, a function gets what is there."""

    def change(state: dict[str, Any]) -> None:
        *path, last = [int(key) if key.isdigit() else key for key in place.split("/")]
        for key in path:
            state = state[key]
        state[last] = value(state.get(last)) if callable(value) else value
        if value is None:
            del state[last]

    change.__name__ = place
    return change


WEIGHT, MOMENTS = "net/encoder.moments.bias", "optimizer_net/state/0"
WRONG = [
    *[put(key, None) for key in ("net", "optimizer_net", "step", "flags", WEIGHT)],
    *[put(key, "text") for key in ("net", "optimizer_net", "step", "flags", WEIGHT)],
    *[put("flags/nz", value) for value in (-1, "4 --evaluate", [4], 8)],
    *[put("flags/lr", math.nan), put("flags/mode", "gan"), put("flags/x y", 1)],
    *[put("step", -1), put("log", 7), put("n_train", "24"), put("images", "others")],
    *[put(WEIGHT, change) for change in (lambda w: w[:-1], torch.Tensor.to_sparse)],
    *[put(WEIGHT, change) for change in (lambda w: w * math.nan, lambda w: w.to("meta"))],
    *[put(f"{MOMENTS}/exp_avg", change) for change in (torch.zeros(3), lambda w: w * math.nan)],
]


UNUSUAL = [
    # The shape of before, in the memory of one number.
    *[
        put(place, lambda w: torch.zeros(1).expand(w.shape))
        for place in (WEIGHT, f"{MOMENTS}/exp_avg")
    ],
    *[put(WEIGHT, torch.Tensor.double), put(f"{MOMENTS}/exp_avg", torch.Tensor.half)],
    put("optimizer_net/param_groups/0", {"amsgrad": True, "betas": "no", "weight_decay": 1e30}),
    *[put("log", "epoch,step\n2,x,y\n"), put("flags/evaluate", True)],
]


@pytest.mark.parametrize("change", [*WRONG, *UNUSUAL], ids=lambda change: change.__name__)
def test_a_checkpoint_that_was_edited(change, trained, tmp_path):
    """One line refuses it, or a run continues in the layouts and settings of the program."""
    path, outf = tmp_path / "edited.pth.tar", tmp_path / "x"
    state = load(trained["mmd"])
    change(state)
    torch.save(state, path)
    before = path.read_bytes()
    program = run(tmp_path, f"--checkpoint={path}", "--niter=2", f"--outf={outf}")
    assert path.read_bytes() == before
    if change in UNUSUAL:
        program.succeeds()
        assert load(outf)["net"]["encoder.moments.bias"].dtype == torch.float32
        return
    assert program.wait() == 1, program.err
    *others, last = program.messages
    assert last.startswith("main.py: error: ")
    assert all("continuing the run in" in line for line in others)
    assert not list(outf.glob("*.pth.tar"))


@pytest.mark.parametrize(("batch_size", "print_every"), [(8, 1), (8, 100), (24, 1)])
def test_a_loss_that_is_not_finite_is_not_saved(batch_size, print_every, tiny_flags, tmp_path):
    """Whether the log or the end of the epoch notices; a single step shows in the metrics."""
    flags = [f"--batch_size={batch_size}", f"--print_every={print_every}", "--lr=1e30"]
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
def test_a_signal_does_not_save_broken_weights(value, trained, tmp_path):
    outf, resume = continued(trained["gan"], tmp_path)
    before = contents(outf)
    program = run(tmp_path, resume, "--niter=3", change=partial(blow_up, value))
    assert program.wait() == 1 and "the weights are not finite" in program.messages[-1]
    assert all(contents(outf)[name] == before[name] for name in CHECKPOINTS)


@pytest.mark.parametrize(("max_bytes", "name"), [(200_000, ".pth.tar"), (600, "args.json")])
def test_a_full_disk_leaves_the_checkpoint_whole(max_bytes, name, trained, tmp_path):
    outf, resume = continued(trained["gan"], tmp_path)
    before = contents(outf)
    program = run(tmp_path, resume, "--niter=2", max_bytes=max_bytes)
    assert program.wait() == 1
    assert f"main.py: error: cannot write {outf}" in program.messages[-1]
    assert name in program.messages[-1] and "File too large" in program.messages[-1]
    assert all(contents(outf)[name] == before[name] for name in CHECKPOINTS)
    assert {path.name for path in outf.glob(".*")} == {".lock"}
    run(tmp_path, resume, "--niter=2").succeeds()  # there is space again


def test_a_folder_that_cannot_be_made_or_written(trained, toy_faces, tiny_flags, tmp_path):
    """Root may write anywhere, and becomes nobody for this."""
    (tmp_path / "file").write_text("mine")
    program = run(tmp_path, *tiny_flags, f"--outf={tmp_path / 'file' / 'deeper'}")
    program.fails(1, f"cannot write {tmp_path / 'file' / 'deeper'}")
    assert (tmp_path / "file").read_text() == "mine"

    options = {"uid": 65534} if os.getuid() == 0 else {}
    with tempfile.TemporaryDirectory() as name:  # unlike tmp_path, open to others
        Path(name).chmod(0o755)
        data = shutil.copytree(toy_faces, Path(name, "data"))
        outf = shutil.copytree(trained["mmd"], Path(name, "outf"))
        data.chmod(0o777)
        (outf / ".lock").unlink()
        outf.chmod(0o555)
        before = contents(outf)
        flags = [f"--checkpoint={outf / 'checkpoint.pth.tar'}", "--niter=2"]
        program = run(Path(name, "o"), *flags, f"--dataroot={data}", **options)
        program.fails(1, f"cannot write {outf}", "Permission denied")
        assert contents(outf) == before
        outf.chmod(0o755)


REFUSED = {
    "": "--dataroot is required",
    "--dataroot=d --outf=": "argument --outf: it is empty",
    "--dataroot=d --outf=d/faces": "--outf=d/faces is inside --dataroot=d",
    "--dataroot=d --outf=e/../d": "--outf=e/../d is inside --dataroot=d",
    "--dataroot=d --mode=mmd --nowozin_trick": "--nowozin_trick is for --mode=gan",
    "--dataroot=d --mode=vae --noise=add_noise": "--mode=vae needs --noise=gaussian",
    "--dataroot=d --ngpu=3": "--batch_size=100 cannot be shared by 3 processes",
    "--dataroot=d --beta1=1": "--beta1=1.0 must be below 1",
    "--dataroot=d --batch=4": "unrecognized arguments: --batch=4",
    "--dataroot=d --lr=0": "argument --lr: 0 is out of range: it must be more than 0",
    "--dataroot=d --lr=nan": "argument --lr: nan is out of range",
    "--dataroot=d --nz=two": "argument --nz: invalid int value: 'two'",
    "--dataroot=d --seed=-1": "argument --seed: -1 is out of range: it must be at least 0",
    "--dataroot=d --n_test=1": "argument --n_test: 1 is out of range: it must be at least 2",
    "--dataroot=d --mode=ae": "argument --mode: invalid choice: 'ae'",
    "--dataroot=d --imq_scales=1,0": "argument --imq_scales: 0 is out of range",
}


@pytest.mark.parametrize("command", REFUSED)
def test_flags_that_make_no_sense(command, tmp_path):
    run(tmp_path, *command.split()).fails(2, REFUSED[command])


def test_what_this_machine_lacks(tiny_flags, tmp_path):
    def refuses(flag: str, status: int, words: str, **env: str) -> None:
        flags = [*tiny_flags, f"--outf={tmp_path / 'x'}", *flag.split()]
        run(tmp_path, *flags, env=env).fails(status, words)

    refuses("--compile", 2, "--compile needs a C++ compiler", PATH="/nowhere")
    no_gpu = {"CUDA_VISIBLE_DEVICES": ""}
    refuses("--cuda", 2, "--cuda: PyTorch finds no CUDA GPU", **no_gpu)
    refuses("--cuda --ngpu=2", 2, "--ngpu=2: there are 0 GPUs", **no_gpu)
    refuses("--evaluate", 1, f"{tmp_path / 'x' / 'checkpoint.pth.tar'}: no such file")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("flag", ["--n_test=25", "--batch_size=26", "--n_test=" + "9" * 40])
def test_more_images_asked_for_than_there_are(flag, tiny_flags, tmp_path):
    program = run(tmp_path, *tiny_flags, flag, f"--outf={tmp_path / 'x'}")
    program.fails(2, flag, "30 images are too few")


def test_variables_that_another_program_left_are_ignored(trained, mmd_flags, tmp_path):
    left = {"LOCAL_RANK": "0", "WORLD_SIZE": "3"}
    run(tmp_path, *mmd_flags, f"--outf={tmp_path / 'x'}", env=left).succeeds()
    assert differences(trained["mmd"], tmp_path / "x") == []
