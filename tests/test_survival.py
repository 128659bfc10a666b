"""Interruptions, broken checkpoints, full disks, wrong flags: what a run answers, and what is still there after."""

import os
import pickle
import random
import shlex
import shutil
import signal
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_and_resume import differences, draw_faces, log_lines, try_out, unequal
from program import TINY, Program, run

import main
import utils

NO_GPU = not torch.cuda.is_available()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def says(program: Program, status: int, *words: str) -> None:
    """Checks that a run ended with one line that has these words, and with no traceback."""
    assert program.wait() == status, program.err
    assert "Traceback" not in program.err
    assert len(program.messages) == 1, program.err
    assert program.messages[0].startswith("main.py: error: ")
    for word in words:
        assert word in program.messages[0]


def refuses(program: Program, *words: str) -> None:
    """Checks that argparse refused the command line for a reason that has these words."""
    assert program.wait() == 2, program.err
    assert program.messages[0].startswith("usage: main.py")
    for word in words:
        assert word in program.messages[-1]


def continued(folder: Path, tmp_path: Path) -> tuple[Path, str]:
    """A copy of a trained run's folder, and the flag to continue it."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    return copy, f"--checkpoint={copy / 'checkpoint.pth.tar'}"


# ----------------------------------------------------------------------------------------------------------------------
# Signals and kills


@pytest.mark.parametrize(("mode", "number"), [("gan", signal.SIGINT), ("mmd", signal.SIGTERM)])
def test_a_signal_ends_the_step_and_the_run_continues_as_if_undisturbed(mode, number, toy_faces, tmp_path):
    """The step is finished, the checkpoint written, the command to continue printed, and that command works."""
    outf = tmp_path / "a run"  # with a space, which the command has to quote
    flags = [f"--dataroot={toy_faces}", f"--mode={mode}", *TINY, "--batch_size=2", "--niter=10", "--seed=3"]
    program = Program(tmp_path / "output", *flags, f"--outf={outf}")
    program.wait_until(lambda: log_lines(outf) >= 4)  # three steps of the twelve of an epoch
    program.kill(number)
    assert program.wait() == 128 + number, program.err
    assert program.messages == ["main.py: stopping after this step; Ctrl-C again stops at once"]
    stopped = torch.load(outf / "checkpoint.pth.tar", weights_only=True)
    assert stopped["log"] == (outf / "log.csv").read_bytes().decode()
    trained_steps = stopped["epoch"] * 12 + stopped["step"]
    assert [r["step"] for r in utils.log_rows(stopped["log"]) if r["lr"]][-1] == str(trained_steps)

    command = shlex.split(program.out.split("to continue: ")[1])
    assert command[:2] == ["python3", "main.py"]
    again = run(tmp_path / "output", *command[2:])
    assert again.wait() == 0, again.err
    rows = utils.log_rows((outf / "log.csv").read_text())
    assert [int(r["step"]) for r in rows if r["lr"]] == list(range(1, 121))
    assert [int(r["epoch"]) for r in rows if r["test_mse"]] == list(range(1, 11))

    whole = run(tmp_path / "output", *flags, f"--outf={tmp_path / 'whole'}")
    assert whole.wait() == 0
    assert [name for name in differences(tmp_path / "whole", outf) if name != "args.json"] == []


def test_a_second_interrupt_stops_at_once(toy_faces, tmp_path):
    wide = ["--nf=64", "--batch_size=24", "--image_size=128", "--n_test=6", "--print_every=1"]  # slow steps
    program = Program(tmp_path, f"--dataroot={toy_faces}", *wide, "--mode=mmd", f"--outf={tmp_path / 'x'}")
    program.wait_until(lambda: log_lines(tmp_path / "x") == 1)  # the first step is under way
    program.kill(signal.SIGINT)
    program.wait_until(lambda: "stopping" in program.err)
    program.kill(signal.SIGINT)
    assert program.wait() == 130
    assert program.messages[-1] == "main.py: interrupted"
    assert not list((tmp_path / "x").glob("*checkpoint*"))


@pytest.mark.parametrize(("number", "last_words"), [(signal.SIGINT, ["main.py: interrupted"]), (signal.SIGTERM, [])])
def test_a_signal_in_pretraining_or_in_the_last_evaluation(number, last_words, toy_faces, tmp_path):
    flags = [f"--dataroot={toy_faces}", "--mode=mmd", *TINY, "--niter=1", "--seed=1", f"--outf={tmp_path / 'x'}"]
    program = Program(tmp_path, *flags, "--e_pretrain", "--e_pretrain_iters=1000000000", "--pz_scale=1000")
    program.wait_until(lambda: "pretraining:   0%|" in program.err)
    program.kill(number)
    assert program.wait() == 128 + number
    assert program.messages == last_words
    assert not (tmp_path / "x" / "checkpoint.pth.tar").exists()

    program = Program(tmp_path, *flags, "--n_samples=1000000")  # nothing to continue yet: starts anew
    program.wait_until((tmp_path / "x" / "losses.png").exists)
    program.kill(number)
    assert program.wait() == 128 + number
    assert program.messages == last_words
    assert not (tmp_path / "x" / "metrics.json").exists()
    program = run(tmp_path, f"--checkpoint={tmp_path / 'x' / 'checkpoint.pth.tar'}", "--n_samples=10")
    assert program.wait() == 0, program.err
    assert (tmp_path / "x" / "metrics.json").exists()


def test_a_signal_while_the_last_epoch_ends_is_heard(trained, toy_faces, tmp_path):
    flags = [f"--dataroot={toy_faces}", "--mode=mmd", *TINY, "--n_samples=1000000", "--niter=1", "--seed=1"]
    program = Program(tmp_path, *flags, f"--outf={tmp_path / 'x'}")
    program.wait_until((tmp_path / "x" / "fake_samples_epoch_001.png").exists)
    program.kill(signal.SIGINT)
    assert program.wait(60) == 130
    assert run(tmp_path, f"--checkpoint={tmp_path / 'x' / 'checkpoint.pth.tar'}", "--n_samples=10").wait() == 0
    assert [name for name in differences(trained["mmd"], tmp_path / "x") if name != "args.json"] == []


def test_a_signal_while_images_are_decoded_leaves_nothing_half_made(toy_faces, tmp_path):
    data = tmp_path / "data" / "faces"
    data.mkdir(parents=True)
    for i in range(6_000):
        os.link(toy_faces / "img_align_toy" / f"{i % 30 + 1:06d}.jpg", data / f"{i}.jpg")
    for _ in range(5):  # the first moments, in which workers start, are the delicate ones
        program = Program(tmp_path, f"--dataroot={data.parent}", *TINY, f"--outf={tmp_path / 'x'}", "--workers=2")
        program.wait_until(lambda: bool(list(data.parent.glob(".*.tmp"))))
        program.kill(signal.SIGTERM)
        assert program.wait(60) == 143
        assert [path.name for path in data.parent.iterdir()] == ["faces"]


def test_killed_three_times_it_leaves_the_same_bits(tmp_path):
    """The short form of kill_and_resume.py: in a step, in the writing of a checkpoint, in the last evaluation."""
    tally, found = try_out(tmp_path, draw_faces(tmp_path), "mmd", epochs=8, kills=3, seed=0)
    assert tally["kills"] == 3
    assert found == []


def test_half_a_checkpoint_of_a_killed_process_is_neither_read_nor_kept(trained, toy_faces, tmp_path):
    outf, resume = continued(trained["mmd"], tmp_path)
    whole = (outf / "checkpoint.pth.tar").read_bytes()
    left_over = outf / f".checkpoint.pth.tar.{os.uname().nodename}.2147483647.tmp"  # no process has this number
    left_over.write_bytes(whole[: len(whole) // 2])
    program = run(tmp_path, resume, "--niter=2", "--n_samples=10")
    assert program.wait() == 0, program.err
    assert [path.name for path in outf.glob(".*")] == []


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints that move, and flags that contradict them


def test_a_checkpoint_moves_and_takes_the_flags_that_may_change(trained, toy_faces, tmp_path):
    """Another folder for the checkpoint, the output and the data: the same networks as without any move."""
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.copy(trained["mmd"] / "checkpoint.pth.tar", tmp_path / "elsewhere" / "mine.pth"))
    before = moved.read_bytes()
    data = shutil.copytree(toy_faces, tmp_path / "other data", copy_function=shutil.copy)
    changed = ["--niter=3", "--sample_every=2", "--n_samples=7", "--workers=1", f"--cache_dir={tmp_path / 'c'}"]
    flags = [f"--outf={tmp_path / 'new'}", f"--dataroot={data}", "--print_every=2", "--gpu_id=3", *changed]
    program = run(tmp_path, f"--checkpoint={moved}", *flags)
    assert program.wait() == 0, program.err
    assert moved.read_bytes() == before
    assert not (tmp_path / "new" / "fake_samples_epoch_001.png").exists()
    rows = utils.log_rows((tmp_path / "new" / "log.csv").read_text())
    assert [r["step"] for r in rows if r["lr"]] == ["1", "2", "3", "4", "6", "8"]  # every second from step 3 on

    flags = [f"--dataroot={toy_faces}", "--mode=mmd", *TINY, "--niter=3", "--seed=1", f"--outf={tmp_path / 'whole'}"]
    assert run(tmp_path, *flags).wait() == 0
    a, b = (torch.load(tmp_path / name / "checkpoint.pth.tar", weights_only=True) for name in ("whole", "new"))
    assert b["flags"]["dataroot"] == str(data)
    for name in ("encoder", "decoder", "optimizer", "best", "epoch"):
        assert unequal(a[name], b[name], name) == []


@pytest.mark.skipif(NO_GPU, reason="needs a CUDA GPU")
def test_a_checkpoint_moves_between_cpu_and_gpu(trained, tmp_path):
    outf, resume = continued(trained["gan"], tmp_path)
    for epochs, machine in ((2, ["--cuda"]), (3, [])):
        program = run(tmp_path, resume, f"--niter={epochs}", *machine)
        assert program.wait() == 0, program.err
    rows = utils.log_rows((outf / "log.csv").read_text())
    assert [int(r["step"]) for r in rows if r["lr"]] == list(range(1, 10))


def test_flags_that_contradict_the_checkpoint_are_named_and_those_that_agree_are_not(trained, tmp_path):
    outf, resume = continued(trained["mmd"], tmp_path)
    before = contents(outf)
    contradiction = ["--nz=8", "--noise=deterministic", "--mode=gan", "--e_pretrain", "--seed=2", "--nf=2"]
    program = run(tmp_path, resume, "--niter=2", *contradiction)
    refuses(program, resume, "--nz=8 (there: 4)", "--noise=deterministic (there: gaussian)", "--mode=gan (there: mmd)")
    refuses(program, "--e_pretrain=True (there: False)", "--seed=2 (there: 1)")
    assert "--nf" not in program.messages[-1]
    assert contents(outf) == before
    refuses(run(tmp_path, resume, "--evaluate", "--image_size=64"), "--image_size=64 (there: 32)")


def test_fewer_epochs_than_the_checkpoint_has_seen(trained, tmp_path):
    outf, resume = continued(trained["mmd"], tmp_path)
    assert run(tmp_path, resume, "--niter=2", "--n_samples=10").wait() == 0
    before = contents(outf)
    says(run(tmp_path, resume, "--niter=1"), 2, "--niter=1", "2 epochs")
    assert contents(outf) == before


def test_a_new_run_does_not_write_over_another(trained, toy_faces, tmp_path):
    outf, resume = continued(trained["mmd"], tmp_path)
    before = contents(outf)
    refuses(run(tmp_path, f"--dataroot={toy_faces}", *TINY, f"--outf={outf}"), "holds a run already", resume)
    assert contents(outf) == before


# ----------------------------------------------------------------------------------------------------------------------
# Files that are no checkpoints


class Hostile:
    """Creates a file when it is unpickled."""

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


@pytest.mark.parametrize("what", ["missing", "folder", "empty", "text", "zip", "picture", 1, 100, 0.3, 0.9, -100, -1])
def test_a_file_that_is_no_whole_checkpoint(what, trained, tmp_path):
    path = tmp_path / "broken.pth.tar"
    whole = (trained["mmd"] / "checkpoint.pth.tar").read_bytes()
    if what == "folder":
        path.mkdir()
    elif what == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data.txt", "no checkpoint")
    elif what == "picture":
        shutil.copy(trained["mmd"] / "codes.png", path)
    elif what != "missing":
        kinds = {"empty": b"", "text": b"not a checkpoint\n" * 100}
        path.write_bytes(kinds[what] if what in kinds else whole[: int(what * len(whole)) if 0 < what < 1 else what])
    says(run(tmp_path, f"--checkpoint={path}", "--evaluate", f"--outf={tmp_path / 'x'}"), 1, f"--checkpoint={path}")
    assert not (tmp_path / "x").exists()


def wrong(name: str, value: Any) -> Any:
    """A change of a checkpoint: a key given another value, or, by a path of keys, a key further inside."""

    def change(state: dict[str, Any]) -> None:
        *path, last = [int(key) if key.isdigit() else key for key in name.split("/")]
        for key in path:
            state = state[key]
        if value is None:
            del state[last]
        else:
            state[last] = value(state[last]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("change", "word"),
    [
        *[(wrong(key, None), key) for key in ("encoder", "decoder", "optimizer", "epoch", "step", "best", "log")],
        *[(wrong(key, "text"), key) for key in ("encoder", "optimizer", "epoch", "step", "best")],
        *[(wrong(key, -1), key) for key in ("epoch", "step")],
        (wrong("flags", None), "not a checkpoint"),
        (wrong("flags", ["nz", 4]), "not a checkpoint"),
        *[(wrong(f"flags/{key}", None), key) for key in ("seed", "nz", "mode")],
        *[(wrong("flags/nz", value), "nz") for value in (-1, 0, 5.5, "4 4", "4 --evaluate", [4], True, 10**400)],
        *[(wrong("flags/lr", value), "lr") for value in (0.0, float("nan"), float("inf"), "1e-3 --seed=2")],
        (wrong("flags/kernel", "IMQ --evaluate"), "kernel"),
        (wrong("flags/e_pretrain", "yes"), "e_pretrain"),
        (wrong("flags/nz", 8), "encoder"),
        (wrong("flags/mode", "gan"), "discriminator"),
        (wrong("flags/image_size", 64), "encoder"),
        (wrong("encoder/code.bias", lambda bias: bias[:-1]), "encoder"),
        (wrong("encoder/code.bias", "text"), "encoder"),
        (wrong("decoder/layers.0.weight", None), "decoder"),
        (wrong("optimizer/state", None), "optimizer"),
        (wrong("optimizer/state/0", lambda moments: moments | {"exp_avg": torch.zeros(3)}), "optimizer"),
        (wrong("optimizer/state/0", lambda moments: {"step": moments["step"]}), "optimizer"),
        (wrong("optimizer/state/0", 5), "optimizer"),
        (wrong("log", "a,b\r\n1,2\r\n"), "log"),
        (wrong("log", lambda log: log + "2,x,y\r\n"), "log"),
        (wrong("log", lambda log: log + "2," * 30 + "\r\n"), "log"),
        (wrong("log", 7), "log"),
    ],
)
def test_a_checkpoint_of_another_structure(change, word, trained, tmp_path):
    """One line with the file and what is wrong in it; the file stays as it is."""
    path = tmp_path / "wrong.pth.tar"
    state = torch.load(trained["mmd"] / "checkpoint.pth.tar", weights_only=True)
    change(state)
    torch.save(state, path)
    before = path.read_bytes()
    says(run(tmp_path, f"--checkpoint={path}", "--niter=2", f"--outf={tmp_path / 'x'}"), 1, str(path), word)
    assert path.read_bytes() == before
    assert not (tmp_path / "x" / "checkpoint.pth.tar").exists()


def test_settings_of_the_optimiser_come_from_the_flags(trained, tmp_path):
    """Not from the file, where they could be anything."""
    outf, resume = continued(trained["mmd"], tmp_path)
    state = torch.load(outf / "checkpoint.pth.tar", weights_only=True)
    state["optimizer"]["param_groups"][0] |= {"amsgrad": True, "betas": "no", "weight_decay": 1e30}
    torch.save(state, outf / "checkpoint.pth.tar")
    program = run(tmp_path, resume, "--niter=2", "--n_samples=10")
    assert program.wait() == 0, program.err


# ----------------------------------------------------------------------------------------------------------------------
# Losses that are not finite, full disks, folders that cannot be written


@pytest.mark.parametrize(("batch_size", "print_every"), [(8, 1), (8, 100), (24, 1)])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(
    batch_size, print_every, trained, toy_faces, tmp_path
):
    """Named with its step, whether the log or the end of the epoch notices; a single step shows in the figures."""
    flags = ["--mode=mmd", f"--batch_size={batch_size}", f"--print_every={print_every}", "--lr=1e30", "--seed=1"]
    program = run(tmp_path, f"--dataroot={toy_faces}", *TINY, *flags, f"--outf={tmp_path / 'x'}")
    says(program, 1, "test_" if batch_size == 24 else "loss", "step 1" if batch_size == 24 else "step 2", "lr")
    assert not list((tmp_path / "x").glob("*.pth.tar*"))


def test_the_last_good_checkpoint_outlives_a_loss_that_is_not_finite(trained, tmp_path):
    outf, resume = continued(trained["gan"], tmp_path)
    state = torch.load(outf / "checkpoint.pth.tar", weights_only=True)
    state["flags"]["lr"] = 1e30
    torch.save(state, outf / "checkpoint.pth.tar")
    before = contents(outf)
    says(run(tmp_path, resume, "--niter=3"), 1, "loss", "step 5")
    after = contents(outf)
    assert {name for name in before if before[name] != after.get(name)} <= {"args.json", "log.csv"}
    assert set(after) == set(before)


@pytest.mark.parametrize(("max_bytes", "name"), [(2_000_000, "model_best.pth.tar"), (20_000, ".png"), (250, "log.csv")])
def test_a_full_disk_leaves_the_checkpoint_whole(max_bytes, name, trained, tmp_path):
    outf, resume = continued(trained["gan"], tmp_path)
    state = torch.load(outf / "checkpoint.pth.tar", weights_only=True)
    state["best"] = float("inf")  # so that the next epoch is the best
    torch.save(state, outf / "checkpoint.pth.tar")
    before = contents(outf)
    says(run(tmp_path, resume, "--niter=2", max_bytes=max_bytes), 1, f"cannot write {outf}", name, "File too large")
    after = contents(outf)
    for checkpoint in ("checkpoint.pth.tar", "model_best.pth.tar"):
        assert after[checkpoint] == before[checkpoint]
    assert not [path for path in outf.iterdir() if path.name.startswith(".")]
    program = run(tmp_path, resume, "--niter=2", "--n_samples=10")  # there is space again
    assert program.wait() == 0, program.err


def test_a_full_disk_stops_the_decoding_and_the_evaluation(trained, toy_faces, tmp_path):
    flags = [f"--dataroot={toy_faces}", *TINY, "--mode=mmd", f"--outf={tmp_path / 'x'}", "--print_every=1"]
    cache = tmp_path / "cache"
    says(run(tmp_path, *flags, f"--cache_dir={cache}", max_bytes=40_000), 1, f"cannot write {cache}", "File too large")
    assert list(cache.iterdir()) == []
    evaluate = [f"--checkpoint={trained['mmd'] / 'checkpoint.pth.tar'}", "--evaluate", f"--outf={tmp_path / 'y'}"]
    says(run(tmp_path, *evaluate, "--n_samples=10", max_bytes=500), 1, "cannot write", "eval/", "File too large")
    assert not (tmp_path / "y" / "metrics.json").exists()


def test_a_full_disk_under_the_log(tmp_path):
    log = utils.Log(tmp_path, ("epoch", "step"))
    (tmp_path / "log.csv").unlink()
    (tmp_path / "log.csv").symlink_to("/dev/full")
    with pytest.raises(utils.UserError, match="cannot write .*log.csv: No space left on device"):
        log.add(epoch=1, step=2)


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_where_the_output_should_go(below, toy_faces, tmp_path):
    (tmp_path / "file").write_text("mine")
    outf = tmp_path / "file" / below
    says(
        run(tmp_path / "o", f"--dataroot={toy_faces}", *TINY, f"--outf={outf}"),
        1,
        "cannot create the folder",
        str(outf),
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_may_not_be_written(trained, toy_faces):
    """Whether it is empty or holds a run to continue. Root may write anywhere, and becomes nobody for this."""
    root = os.getuid() == 0
    with tempfile.TemporaryDirectory() as name:  # unlike tmp_path, open to others
        folder = Path(name)
        folder.chmod(0o755)
        data = shutil.copytree(toy_faces, folder / "data")  # with the array of its images, since runs have needed it
        data.chmod(0o777)
        outf = shutil.copytree(trained["mmd"], folder / "outf")
        outf.chmod(0o555)
        before = contents(outf)
        flags = [f"--dataroot={data}"]
        options = {"uid": 65534} if root else {}
        resume = f"--checkpoint={outf / 'checkpoint.pth.tar'}"
        says(run(folder / "o", resume, "--niter=2", *flags, **options), 1, f"cannot write {outf}", "Permission denied")
        new = run(folder / "o", *flags, *TINY, f"--outf={outf / 'deeper'}", **options)
        says(new, 1, f"cannot create the folder {outf / 'deeper'}", "Permission denied")
        assert contents(outf) == before
        outf.chmod(0o755)


# ----------------------------------------------------------------------------------------------------------------------
# GPUs and flags


@pytest.fixture
def in_process(monkeypatch, capsys):
    """Calls `main.main()` with a command line; returns exit status and what went to standard error."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(*argv: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, argv)])
        try:
            status = main.main()
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().err

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_cuda_without_a_gpu(toy_faces, tmp_path):
    flags = [f"--dataroot={toy_faces}", *TINY, "--cuda", f"--outf={tmp_path / 'x'}"]
    says(run(tmp_path, *flags), 2, "--cuda", "no CUDA GPU")
    refuses(run(tmp_path, *flags, "--ngpu=2"), "--ngpu=2", "0 GPUs")


def test_a_gpu_that_is_not_there(monkeypatch, in_process, toy_faces, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    flags = [f"--dataroot={toy_faces}", *TINY, "--cuda", f"--outf={tmp_path / 'x'}"]
    status, err = in_process(*flags, "--gpu_id=2")
    assert (status, err) == (2, "main.py: error: --gpu_id=2: there are 2 GPUs here, numbered from 0 to 1\n")
    status, err = in_process(*flags, "--ngpu=4")
    assert status == 2
    assert err.splitlines()[-1] == "main.py: error: --ngpu=4: there are 2 GPUs here"


INTEGERS = ("n_test", "batch_size", "nz", "nf", "niter", "e_pretrain_sample_size", "e_pretrain_iters", "seed")
INTEGERS += ("print_every", "sample_every", "n_samples", "gpu_id", "ngpu", "workers", "image_size")
FLOATS = ("LAMBDA", "pz_scale", "lr", "lr_adv", "beta1")
MAY_BE_0 = ("seed", "gpu_id", "LAMBDA", "beta1")
MORE_THAN_1 = ("n_test", "batch_size", "e_pretrain_sample_size", "n_samples", "image_size")
TOO_LARGE = {
    "nz": 4097,
    "nf": 1025,
    "seed": 2**63,
    "e_pretrain_sample_size": 10**9,
    "image_size": 512,
    "n_samples": 10**7,
}
TOO_LARGE |= {"beta1": 1, "pz_scale": 1e300}
CHOICES = ("dataset", "mode", "arch", "noise", "cost", "kernel", "lr_schedule", "sampler")


@pytest.mark.parametrize("flag", [*INTEGERS, *FLOATS, *CHOICES])
def test_a_value_out_of_range_is_refused_before_anything_is_read(flag, in_process, tmp_path):
    values = ["nan", "inf", "-inf", "-1", "1e400", "-1e400", "two", "", " ", "-" + "9" * 400, "9" * 5000]
    values += [] if flag in FLOATS else ["1.5", "1e1"]
    values += [] if flag in MAY_BE_0 else ["0"]
    values += ["1"] if flag in MORE_THAN_1 else []
    values += [str(TOO_LARGE[flag]), "9" * 400] if flag in TOO_LARGE else []
    for value in values:
        status, err = in_process(f"--dataroot={tmp_path / 'none'}", f"--outf={tmp_path / 'x'}", f"--{flag}={value}")
        assert status == 2, f"--{flag}={value}"
        assert f"argument --{flag}: " in err.splitlines()[-1]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--dataroot is required"),
        (["--evaluate"], "--evaluate needs --checkpoint"),
        (["--dataroot=d", "--mode=mmd", "--nowozin_trick"], "--nowozin_trick is for --mode=gan"),
        (["--dataroot=d", "--ngpu=3"], "--batch_size=100 cannot be shared out evenly to 3"),
        (["--dataroot=d", "--batch_size=4", "--ngpu=4"], "--batch_size=4 cannot be shared out evenly to 4"),
        (["--dataroot=d", "--img_norm"], "unrecognized arguments: --img_norm"),
        (["--dataroot=d", "--batch=4"], "unrecognized arguments: --batch=4"),
        (["--dataroot=d", "extra"], "unrecognized arguments: extra"),
    ],
)
def test_flags_that_make_no_sense_together(flags, words, in_process):
    status, err = in_process(*flags)
    assert status == 2
    assert words in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--n_test=31"], ["--n_test=31", "30 images"]),
        (["--n_test=30"], ["--batch_size=8", "30 images", "--n_test=30"]),
        (["--batch_size=26"], ["--batch_size=26", "30 images"]),
        (["--n_test=" + "9" * 400], ["--n_test=999", "30 images"]),
    ],
)
def test_more_images_asked_for_than_there_are(flags, words, toy_faces, tmp_path):
    program = run(tmp_path, f"--dataroot={toy_faces}", *TINY, *flags, f"--outf={tmp_path / 'x'}")
    says(program, 2, *words)


def test_any_flags_end_in_a_run_or_in_a_message(in_process, trained, toy_faces, tmp_path):
    """Draws command lines, with values in and out of range: none may end otherwise."""
    numbers = ["-1", "0", "1", "2", "7", "1e-3", "0.5", "1e3", "1e30", "1e308", "nan", "1e400", "x", "", "9" * 50]
    small = {"image_size": ["32", "31"], "nf": ["1", "3", "0"], "ngpu": ["1", "3", "0"], "n_samples": ["2", "9", "1"]}
    small |= {"niter": ["1", "2", "0", "-3"], "e_pretrain_iters": ["1", "11", "0"], "nz": ["1", "2", "9", "0", "x"]}
    small |= {"e_pretrain_sample_size": ["2", "9", "1"], "batch_size": ["2", "8", "24", "25", "3", "x", "9" * 50]}
    pool = {flag: small.get(flag, numbers) for flag in (*INTEGERS, *FLOATS)}
    pool |= {"mode": ["gan", "mmd", "vae"], "arch": ["dcgan", "paper", ""], "cost": ["l2sq", "l2", "l1", "l0"]}
    pool |= {"noise": ["deterministic", "add_noise", "gaussian", "x"], "kernel": ["IMQ", "RBF", "imq"]}
    pool |= {"sampler": ["prior", "gaussian"], "dataset": ["celebA", "folder"]}
    pool |= {"lr_schedule": ["paper", "scaled", "constant"]}
    pool |= {"checkpoint": [str(path / "checkpoint.pth.tar") for path in trained.values()] + ["none"]}
    switches = ["input_normalize_sym", "nowozin_trick", "e_pretrain", "evaluate", "amp"]
    pool |= {"dataroot": [str(toy_faces), str(tmp_path), "none"]} | dict.fromkeys(switches)

    rng = random.Random(0)
    statuses = []
    for number in range(40):
        names = rng.sample(sorted(pool), rng.randint(1, 7))
        flags = [f"--{name}={rng.choice(pool[name])}" if pool[name] else f"--{name}" for name in names]
        argv = [f"--dataroot={toy_faces}", *TINY, "--niter=1", *flags, f"--outf={tmp_path / str(number)}"]
        status, err = in_process(*argv)
        assert status in (0, 1, 2), argv
        assert "Traceback" not in err, argv
        assert status == 0 or "main.py: error: " in err, argv
        statuses.append(status)
    assert {0, 1, 2} == set(statuses)  # the draws reach all three
