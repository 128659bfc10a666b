"""main.py from end to end on toy faces: flags, what a run leaves, and what an evaluation writes."""

import argparse
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from program import REPO, TINY, load, rows, run, steps, unequal

import main
import model
import utils

CHECKPOINT = "checkpoint.pth.tar"
OF_CODES = {"test_mmd", "test_w2", "eigenvalue_min", "eigenvalue_max"}
OF_CODES |= {f"{name}_of_prior" for name in ("test_w2_std", "eigenvalue_min", "eigenvalue_max")}
OF_RUN = OF_CODES | {"step", "n_test", "test_mse", "test_nats", "test_nats_of_prior"}
SETS = ("real", "reconstructions", "samples_prior", "samples_mixture")


def train(data: Path, outf: Path, *flags: str) -> Path:
    """Trains for one epoch of three steps, or as the flags say. Returns the folder of the run."""
    common = [f"--dataroot={data}", *TINY, "--niter=1", "--seed=1"]
    assert main.execute([*common, *flags, f"--outf={outf}"]) == 0
    return outf


def evaluate(run_folder: Path, outf: Path, *flags: str) -> Path:
    """Evaluates a run into another folder. Returns that."""
    checkpoint = run_folder / CHECKPOINT
    assert main.execute([f"--checkpoint={checkpoint}", "--evaluate", f"--outf={outf}", *flags]) == 0
    return outf / "eval"


def get_flags(*argv: str) -> argparse.Namespace:
    """The flags of a command, with those of its checkpoint."""
    return main.get_flags(*main.parse(list(argv)))[0]


def column(outf: Path, name: str) -> list[float]:
    """The numbers in a column of the log."""
    return [float(row[name]) for row in rows(outf) if row[name]]


def figures(folder: Path) -> dict[str, float]:
    """The metrics of a run or an evaluation."""
    return json.loads((folder / "metrics.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder by name, without those in folders inside it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def picture(path: Path) -> np.ndarray:
    """The pixels of a PNG in [0, 1], (height, width, 3)."""
    return np.asarray(Image.open(path).convert("RGB")) / 255


def pixels(folder: Path) -> np.ndarray:
    """The numbered PNG files of a folder, (n, side, side, 3) in [0, 1]."""
    return np.stack([picture(path) for path in sorted(folder.glob("*.png"))])


def cells(path: Path, side: int, columns: int) -> np.ndarray:
    """The images of a grid, (n, side, side, 3), without the two pixels between them."""
    grid, cell = picture(path), side + 2
    places = itertools.product(range(2, len(grid), cell), range(2, cell * columns, cell))
    return np.stack([grid[y : y + side, x : x + side] for y, x in places])


def count(folder: Path) -> dict[str, int]:
    """How many images each folder of an evaluation has."""
    return {path.name: len(list(path.iterdir())) for path in folder.iterdir() if path.is_dir()}


def held_out(data: Path, crop: int = 140) -> tuple[list[Path], np.ndarray]:
    """The last six paths, and the images decoded anew: their central square, (6, 32, 32, 3)."""
    paths = sorted(data.glob("*/*.jpg"))[-6:]
    box = ((178 - crop) // 2, (218 - crop) // 2, (178 + crop) // 2, (218 + crop) // 2)
    squares = [Image.open(path).crop(box) for path in paths]
    images = [square.resize((32, 32), Image.Resampling.LANCZOS) for square in squares]
    return paths, np.stack(images) / 255


@pytest.fixture(scope="module")
def six_epochs(toy_faces, tmp_path_factory):
    """A run of six epochs with a Gaussian encoder. Not to be changed."""
    flags = ("--mode=mmd", "--noise=gaussian", "--input_normalize_sym", "--pz_scale=1.5")
    flags += ("--crop=100", "--niter=6", "--lr=0.002", "--print_every=2", "--sample_every=4")
    return train(toy_faces, tmp_path_factory.mktemp("six") / "run", *flags)


# --------------------------------------------------------------------------------------------------
# Flags


def test_get_parser_help(capsys):
    """It names every flag with its default, and with those of the modes."""
    with pytest.raises(SystemExit):
        main.execute(["-h"])
    text = capsys.readouterr().out
    entries = dict(re.findall(r"^  --(\w+)(.*?)(?=^  --|^\w|\Z)", text, re.DOTALL | re.MULTILINE))
    entries = {name: " ".join(entry.split()) for name, entry in entries.items()}
    defaults = vars(main.get_parser().parse_args([]))
    assert set(entries) == set(defaults)
    for name, value in defaults.items():
        assert value is None or f"(default: {value})" in entries[name]
    for mode, recipe in main.RECIPES.items():
        for name in ("LAMBDA", "lr"):
            assert re.search(rf"\(default: .*{mode}[a-z ]* {recipe[name]:g}\b", entries[name])


OTHERS = {"nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint", "rdzv_id"}  # of torchrun
OTHERS |= {"check", "disable-pip-version-check", "only", "quiet", "rounds", "steps", "version"}
OTHERS |= {"zip", "img_norm"}  # the last is of WAE-PyTorch


@pytest.mark.parametrize("page", ["README.md", "figs/README.md", "run.sh"])
def test_get_parser_documentation(page):
    """Every flag in it is one of main.py, and has a value that is understood."""
    parser, text = main.get_parser(), (REPO / page).read_text()
    known = vars(parser.parse_args([]))
    for name, value in re.findall(r"""--([A-Za-z][\w-]*)(?:=["']?([^\s`|)"']+))?""", text):
        if name not in OTHERS:
            assert name.removeprefix("no-") in known
            if value not in ("", "N"):
                parser.parse_args([f"--{name}={value.rstrip('.,')}"])


def test_parse_recipes():
    """A mode brings its settings, and what is typed comes first."""
    names = ("LAMBDA", "quadratic", "lr", "lr_adv", "lr_schedule", "noise", "e_pretrain")
    recipes = {
        "gan": (1, 0.3, 0.0003, 0.0009, "scaled", "add_noise", True),
        "mmd": (30, 0.3, 0.001, 0.003, "scaled", "add_noise", True),
        "vae": (0.2, 0.3, 0.001, 0.003, "scaled", "gaussian", False),
    }
    for mode, recipe in recipes.items():
        flags = get_flags("--dataroot=d", "--outf=none", f"--mode={mode}")
        assert tuple(getattr(flags, name) for name in names) == pytest.approx(recipe)
    typed = ["--LAMBDA=0", "--lr=1", "--noise=deterministic", "--no-e_pretrain"]
    flags = get_flags("--dataroot=d", "--outf=none", "--mode=mmd", *typed)
    assert (flags.LAMBDA, flags.lr, flags.lr_adv) == (0, 1, 3)
    assert (flags.noise, flags.e_pretrain) == ("deterministic", False)


REFUSED = {
    "": "--dataroot is required",
    "--dataroot=d --outf=d/faces": "--outf=d/faces and --dataroot=d: one is inside the other",
    "--dataroot=d --outf=e/../d": "one is inside the other; choose another --outf",
    "--dataroot=d --testroot=t --outf=t/x": "--outf=t/x and --testroot=t: one is inside the other",
    "--dataroot=e/eval/real --outf=e": "--outf=e and --dataroot=e/eval/real: one is inside",
    "--dataroot=d --outf=/dev/null/x": "cannot write /dev/null/x/.lock: Not a directory",
    "--dataroot=d --mode=mmd --nowozin_trick": "--nowozin_trick is for --mode=gan",
    "--dataroot=d --mode=vae --noise=add_noise": "--mode=vae needs --noise=gaussian$",
    "--dataroot=d --ngpu=3": "--batch_size=100 cannot be shared by 3 processes",
    "--dataroot=d --ngpu=100": "--batch_size=100 cannot be shared by 100 processes",
    "--dataroot=d --batch=4": "unrecognized arguments: --batch=4",
    "--evaluate --generate=4": "argument --generate: not allowed with argument --evaluate",
    "--dataroot=d --lr=0": "argument --lr: 0 is not between 1e-12 and 1e",
    "--dataroot=d --lr=nan": "argument --lr: nan is not between",
    "--dataroot=d --nz=two": "argument --nz: invalid int value: 'two'",
    "--dataroot=d --mode=ae": "argument --mode: invalid choice: 'ae'",
    "--dataroot=d --imq_scales=1,0": "argument --imq_scales: 0 is not between",
    "--dataroot=d --cuda": "--cuda: PyTorch finds no CUDA GPU",
    "--dataroot=d --cuda --ngpu=2": "--ngpu=2: there are 0 GPUs",
    "--dataroot=d --tensorboard": "--tensorboard: it is not installed; pip install tensorboard",
    "--outf=none --evaluate": "none/checkpoint.pth.tar: no such file",
    "--checkpoint=none --generate=4": "none: no such file",
}


@pytest.mark.parametrize("command", REFUSED)
def test_execute_refused(command, monkeypatch, tmp_path):
    """It leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(utils.UserError, match=REFUSED[command]):
        main.execute(command.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("n_test", [25, 999999999])
def test_load_data_too_few_images(n_test, tiny_flags, tmp_path):
    words = f"--batch_size=8: {max(0, 30 - n_test)} images to train on, of 30, are too few"
    with pytest.raises(utils.UsageError, match=words):
        main.execute([*tiny_flags, f"--n_test={n_test}", f"--outf={tmp_path / 'x'}"])


DEFINE_A_RUN = "image_size channels mode arch nz nf noise input_normalize_sym LAMBDA pz_scale cost"
DEFINE_A_RUN += " mmd kernel imq_scales quadratic nowozin_trick lr lr_adv lr_schedule e_pretrain"
DEFINE_TRAINING = "dataset crop n_test batch_size seed"


def other(name: str, value: object) -> str:
    """The flag with another value."""
    if isinstance(value, bool):
        return f"--no-{name}" if value else f"--{name}"
    actions = {action.dest: action for action in main.get_parser()._actions}
    return f"--{name}=" + next((c for c in actions[name].choices or () if c != value), "7")


def test_get_flags_of_a_checkpoint(trained):
    """It brings its flags in all uses, and none that defines the run may differ."""
    run_folder = f"--outf={trained['mmd']}"
    stored = load(trained["mmd"])["flags"]
    uses = [[run_folder], [run_folder, "--evaluate"], [run_folder, "--generate=4"]]
    for use in uses:
        flags = vars(get_flags(*use))
        for name in DEFINE_A_RUN.split():
            assert flags[name] == stored[name]
            with pytest.raises(utils.UsageError, match=rf"--{name}=\S+( \S+)* \(checkpoint: "):
                get_flags(*use, other(name, stored[name]))
        for name in DEFINE_TRAINING.split():
            if len(use) > 1:
                assert str(vars(get_flags(*use, f"--{name}={stored[name]}"))[name])
                get_flags(*use, other(name, stored[name]))
            else:
                with pytest.raises(utils.UsageError, match=rf"--{name}=7|--{name}=folder"):
                    get_flags(*use, other(name, stored[name]))
        get_flags(*use, *TINY, "--lr=0.00100", "--mode=mmd", "--LAMBDA=30")  # the same once more

    flags = get_flags(run_folder, "--niter=9", "--print_every=7", "--amp", "--cache_dir=x")
    assert (flags.niter, flags.print_every, flags.amp, flags.seed) == (9, 7, True, 1)
    with pytest.raises(utils.UsageError) as error:
        get_flags(run_folder, "--generate=8", "--nz=8", "--mode=gan")
    assert re.findall(r"--(\w+)=\S+ \(checkpoint", str(error.value)) == ["nz", "mode"]
    with pytest.raises(utils.UsageError, match="--outf=.*gan holds another run"):
        get_flags(f"--checkpoint={trained['mmd'] / CHECKPOINT}", f"--outf={trained['gan']}")


def test_get_flags_not_kept(trained, monkeypatch, tmp_path):
    """A checkpoint does not bring flags of a machine or a command, or what an evaluation is for."""
    state = load(trained["mmd"])
    state["flags"] |= {"cuda": True, "ngpu": 4, "gpu_id": 3, "compile": True, "graph": False}
    state["flags"] |= {"outf": "/elsewhere", "generate": 5, "unknown": 1, "tensorboard": True}
    state["flags"] |= {"testroot": "/t", "crop": 99}
    torch.save(state, tmp_path / "moved.pth")
    moved = f"--checkpoint={tmp_path / 'moved.pth'}"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no TensorBoard here
    flags = get_flags(moved, "--evaluate")
    assert (flags.cuda, flags.ngpu, flags.gpu_id, flags.compile) == (False, 1, 0, False)
    assert (flags.graph, flags.outf, flags.generate) == (True, tmp_path, None)
    assert (str(flags.testroot), flags.crop, flags.n_test) == ("/t", 99, None)
    # The images that are typed are those that are scored, cropped as is typed.
    flags = get_flags(moved, "--evaluate", "--dataroot=d", "--dataset=folder")
    assert (flags.testroot, flags.crop) == (None, None)
    flags = get_flags(moved, "--no-tensorboard", "--dataroot=d", "--n_test=6")
    assert (str(flags.testroot), flags.crop, flags.n_test) == ("/t", 99, 6)
    with pytest.raises(utils.UsageError, match="--tensorboard: it is not installed"):
        get_flags(moved)


# --------------------------------------------------------------------------------------------------
# Training


def test_main_command_of_the_predecessor(toy_faces, tmp_path):
    """As people have it in their scripts, in a process and a folder of its own."""
    command = f"""{sys.executable} {REPO / "main.py"} --dataroot={toy_faces} --dataset='celebA' \
        --gpu_id=0 --noise='add_noise' --outf=x/ --mode='gan' --lr=0.0003 --pz_scale=1 --LAMBDA=10 \
        --niter=1 --e_pretrain --nz=8 --nf=2 --image_size=32 --batch_size=8"""
    ended = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "epoch 1/1: test_mse 0." in ended.stdout and "Warning" not in ended.stderr
    assert "\r" not in ended.stdout + ended.stderr  # no progress bars in a file

    sizes = {f"{name}_epoch_001.png": (274, 274) for name in ("fake_samples", "reconstructions")}
    sizes |= {"interpolations_epoch_001.png": (342, 274), "codes.png": (600, 600)}
    sizes |= {"real_samples.png": (274, 138)}  # all 27 training images
    others = {"args.json", "log.csv", "metrics.json", CHECKPOINT, ".lock"}
    outf = tmp_path / "x"
    assert {path.name for path in outf.iterdir()} == {*sizes, *others}
    assert {name: Image.open(outf / name).size for name in sizes} == sizes
    flags = json.loads((outf / "args.json").read_text())
    given = {"dataroot": str(toy_faces), "noise": "add_noise", "LAMBDA": 10.0, "e_pretrain": True}
    assert flags.items() >= (given | {"lr_adv": 3 * 0.0003, "niter": 1, "seed": 0}).items()
    assert set(figures(outf)) == OF_RUN and figures(outf)["n_test"] == 3


def test_train_log(six_epochs):
    """Rows of losses and of metrics, falling rates, and pictures of some epochs."""
    log, tests = rows(six_epochs), main.METRICS
    training = ["reconstruction", "penalty", "discriminator", "lr", "images_per_s"]
    assert list(log[0]) == ["epoch", "step", *training, *tests]
    assert steps(six_epochs) == list(range(2, 19, 2))
    ends = [(row["epoch"], row["step"]) for row in log if row["test_mse"]]
    assert ends == [(str(epoch), str(3 * epoch)) for epoch in range(1, 7)]
    for row in log:
        full = {name for name in (*training, *tests) if row[name]}
        assert full == set(tests if row["test_mse"] else training) - {"discriminator"}
    for name in tests:  # the metrics of the finished run are the last row
        assert log[-1][name] == f"{figures(six_epochs)[name]:.6g}"
    # 30/55 and 50/55 of 18 steps are 9.8 and 16.4.
    assert column(six_epochs, "lr") == [0.002] * 5 + [0.001] * 3 + [0.0002]
    pictures = {path.name for path in six_epochs.glob("fake_samples_*")}
    assert pictures == {f"fake_samples_epoch_00{epoch}.png" for epoch in (4, 6)}  # and the last


def test_learning_rate_factor():
    """In 55 epochs the schedules are one; in others `scaled` is stretched, and `paper` is not."""
    rates = {}
    for schedule, niter in itertools.product(("scaled", "paper"), (11, 55, 120)):
        flags = argparse.Namespace(lr_schedule=schedule, niter=niter)
        factors = [main.learning_rate_factor(step, 7, flags) for step in range(niter * 7)]
        rates[schedule, niter] = [(k, len(list(group))) for k, group in itertools.groupby(factors)]
    assert rates["paper", 55] == [(1, 30 * 7), (0.5, 20 * 7), (0.1, 5 * 7)]
    assert rates["scaled", 55] == rates["paper", 55]
    assert rates["scaled", 11] == [(1, 6 * 7), (0.5, 4 * 7), (0.1, 7)]
    assert rates["scaled", 120] == [(1, 459), (0.5, 305), (0.1, 76)]  # from 458.2 and 763.6 on
    assert rates["paper", 11] == [(1, 11 * 7)]
    assert rates["paper", 120] == [(1, 210), (0.5, 140), (0.1, 350), (0.01, 140)]


def test_train_complete(trained, tmp_path, capfd):
    """A run at its last step says so; a larger --niter continues it, also in TensorBoard."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    outf = Path(shutil.copytree(trained["mmd"], tmp_path / "run"))
    before = contents(outf)
    assert main.execute([f"--outf={outf}"]) == 0
    assert f"the run in {outf} is complete; a larger --niter continues" in capfd.readouterr().out
    assert contents(outf) == before

    run(tmp_path, f"--outf={outf}", "--niter=2", "--tensorboard").succeeds()
    assert steps(outf) == [1, 2, 3, 4, 5, 6] and figures(outf)["step"] == load(outf)["step"] == 6
    assert column(outf, "lr") == [0.001, 0.001, 0.0005] + [0.001, 0.0005, 0.0005]
    events = accumulator.EventAccumulator(str(outf))
    events.Reload()
    for name in ("penalty", "test_w2"):
        logged = [(int(row["step"]), float(row[name])) for row in rows(outf)[4:] if row[name]]
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        np.testing.assert_allclose(shown, logged, rtol=1e-4)
    assert [event.step for event in events.Images("fake_samples")] == [6]


def new_run(device: str, *flags: str) -> main.Run:
    """A run on a device, before its first step."""
    flags = get_flags("--dataroot=unused", *TINY, *flags, "--outf=unused_too")
    return main.Run(flags, utils.World(0, 1, torch.device(device)))


def test_set_learning_rates():
    """Steps follow the rates, whatever those were when a checkpoint was written."""
    flags = ("--mode=gan", "--lr=0.5", "--lr_adv=4")
    old, new = new_run("cpu", *flags), new_run("cpu", *flags)
    old.set_learning_rates(0.5)
    new.load_state_dict(old.state_dict())
    rates = [adam.param_groups[0]["lr"] for adam in new.optimizers.values()]
    for factor in (1, 0.1):
        new.set_learning_rates(factor)
        # The tensors stay where they are, since a recorded step reads them there.
        assert [rate.item() for rate in rates] == pytest.approx([0.5 * factor, 4 * factor])
        for name, rate in (("net", 0.5), ("discriminator", 4)):
            weight = next(new.networks[name].parameters())
            before, weight.grad = weight.detach().clone(), torch.ones_like(weight)
            new.optimizers[name].step()  # as long as the rate, since gradients are always the same
            assert (before - weight).mean().item() == pytest.approx(rate * factor, rel=1e-4)


COMBINATIONS = [
    "--mode=gan --noise=gaussian --arch=paper --nowozin_trick --nz=1",
    "--mode=gan --noise=deterministic --input_normalize_sym --LAMBDA=0 --channels=1",
    "--mode=mmd --mmd=sampled --kernel=RBF --dataset=folder --image_size=64 --amp",
    "--mode=vae --pz_scale=2 --crop=100 --cost=l1 --lr_schedule=paper",
]


@pytest.mark.parametrize("flags", COMBINATIONS)
def test_train_combinations(flags, toy_faces, tmp_path):
    """Each shows in the checkpoint's networks, trains, and reaches pictures and metrics."""
    outf = train(toy_faces, tmp_path / "run", *flags.split())
    state = load(outf)
    stored, net = state["flags"], state["net"]
    assert ("discriminator" in state) == (stored["mode"] == "gan")
    gaussian = stored["noise"] == "gaussian"
    assert net["encoder.posterior.bias"].shape == (stored["nz"] * (2 if gaussian else 1),)
    kernels = {weight.shape[-1] for weight in net.values() if weight.ndim == 4}
    assert kernels == ({5} if stored["arch"] == "paper" else {4})
    assert net["encoder.features.0.weight"].shape[1] == stored["channels"]
    assert all(w.dtype == torch.float32 for w in net.values() if w.is_floating_point())

    metrics = figures(outf)
    assert len(column(outf, "reconstruction")) == len(column(outf, "penalty")) == 3
    assert set(metrics) == OF_RUN | ({"noise_variance"} if gaussian else set())
    assert all(np.isfinite(value) for value in metrics.values()) and 0 < metrics["test_mse"] < 0.5
    fake = cells(outf / "fake_samples_epoch_001.png", stored["image_size"], 8)
    assert len(fake) == 64 and 0.05 < fake.mean() < 0.95  # near the middle of either range


def test_sample_grids(toy_faces, tmp_path):
    """With a rate that leaves the networks what they are, the pictures of two epochs are one."""
    flags = ("--niter=2", "--lr=1e-12", "--noise=deterministic")
    outf = train(toy_faces, tmp_path / "run", *flags)
    for name, columns in (("fake_samples", 8), ("interpolations", 10), ("reconstructions", 8)):
        first, second = (cells(outf / f"{name}_epoch_00{i}.png", 32, columns) for i in (1, 2))
        assert np.abs(first - second).max() <= 1.01 / 255
    fake = cells(outf / "fake_samples_epoch_001.png", 32, 8)
    assert np.abs(fake[1:] - fake[:-1]).max() > 10 / 255  # while other codes give other images

    _, real = held_out(toy_faces)
    grid = cells(outf / "reconstructions_epoch_001.png", 32, 8).reshape(4, 2, 8, 32, 32, 3)
    above, below = (grid[:, i].reshape(32, 32, 32, 3) for i in (0, 1))
    assert np.abs(above - real[np.linspace(0, 5, 32).astype(int)]).max() < 1.01 / 255
    paths = cells(outf / "interpolations_epoch_001.png", 32, 10).reshape(8, 10, 32, 32, 3)
    assert np.abs(paths[:, 0] - below[:8]).max() < 1.01 / 255  # from the first reconstructions
    assert np.abs(paths[:, -1] - below[-8:]).max() < 1.01 / 255  # to the last
    real_samples = cells(outf / "real_samples.png", 32, 8)
    distance = np.abs(real_samples[:, None] - real[None]).max((2, 3, 4))
    assert len(real_samples) == 24 and distance.min() > 2 / 255  # no held-out image among them


def test_train_compiled(monkeypatch, trained, toy_faces, tmp_path):
    """It computes the same, differentiated ahead of time; the default back end takes minutes.

    The penalty in blocks is computed again for its gradient, which is what could go wrong.
    """
    flags = ("--mode=mmd", "--compile")
    with monkeypatch.context() as patched:
        patched.setattr(model, "BLOCK_ENTRIES", 4 * 8)
        patched.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        outf = train(toy_faces, tmp_path / "run", *flags)
    for name in ("reconstruction", "penalty", "test_mse"):
        assert column(trained["mmd"], name) == pytest.approx(column(outf, name), rel=0.01)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # networks and penalty
    assert list(load(outf)["net"]) == list(load(trained["mmd"])["net"])  # no trace of it

    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "false"))  # with the default, and no compiler
    with pytest.raises(Exception) as error:  # noqa: PT011
        train(toy_faces, outf, *flags, "--niter=2")
    message = main.one_line(error.value)
    assert message.startswith("--compile does not work here, leave it out: ")
    assert "compiler" in message and "\n" not in message


def test_run_without_bfloat16(monkeypatch, trained, toy_faces, tmp_path, capfd):
    """--amp warns, and is in float32."""
    monkeypatch.setattr(utils, "has_bfloat16", lambda device: False)
    outf = train(toy_faces, tmp_path / "run", "--mode=mmd", "--amp")
    assert capfd.readouterr().err.count("main.py: --amp: without bfloat16 instructions") == 1
    assert unequal(load(trained["mmd"])["net"], load(outf)["net"], "net") == []


STEPS = [
    "--mode=gan --noise=add_noise --nowozin_trick",
    "--mode=gan --arch=paper --cost=l1 --input_normalize_sym",
    "--mode=mmd --cost=l2",
    "--mode=mmd --kernel=RBF --batch_size=1100",  # in blocks
    "--mode=mmd --kernel=RBF --mmd=sampled",
    "--mode=vae",
]


@pytest.mark.parametrize("flags", STEPS)
def test_step_waits_for_nothing(flags, monkeypatch):
    """On tensors of a device without values: reading one, or mixing it with the CPU's, fails."""
    adam = lambda self, net, lr: torch.optim.Adam(net.parameters(), lr, foreach=False)  # noqa: E731
    monkeypatch.setattr(main.Run, "adam", adam)  # the fused one would compute
    new = new_run("meta", *flags.split())
    n = new.flags.batch_size
    batch = torch.empty(n, 32, 32, 3, dtype=torch.uint8, device="meta")
    losses = main.Step(new)(batch, new.net.sample_prior(n))
    assert losses.shape == (3,) and losses.device.type == "meta"


def test_train_init(trained, toy_faces, monkeypatch, tmp_path):
    """A new run with flags of its own, but for the weights, which must fit."""
    monkeypatch.setattr(main, "pretrain_encoder", None)  # not called
    init = f"--init={trained['mmd'] / CHECKPOINT}"
    flags = ("--mode=gan", "--batch_size=12", "--lr=1e-12", "--e_pretrain", "--seed=7")
    outf = train(toy_faces, tmp_path / "run", init, *flags)
    state, source = load(outf), load(trained["mmd"])
    assert steps(outf) == [1, 2] and (state["step"], state["epoch"]) == (2, 1)
    assert state["flags"]["mode"] == "gan" and "init" not in state["flags"]
    for name, weight in source["net"].items():
        if "running" not in name and "batches" not in name:
            np.testing.assert_allclose(state["net"][name], weight, atol=1e-9)
    program = run(tmp_path, init, f"--dataroot={toy_faces}", *TINY, "--nz=5", f"--outf={outf}5")
    assert program.wait() == 1
    assert program.messages[-1].startswith("main.py: error: the checkpoint's net has other shapes:")
    assert "--image_size=32" in program.messages[-1] and "--nz=4" in program.messages[-1]


NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"
MESSAGES = [
    (RuntimeError(f"{NO_KERNEL}\nCompile with `TORCH_USE_CUDA_DSA`"), NO_KERNEL),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory; try --no-graph, or a"),
    (OSError(28, "No space left on device", "x/log.csv"), "x/log.csv: No space left on device"),
    (utils.UserError("a\nb: no such file"), r"a\nb: no such file"),
    (RuntimeError("a bug"), ""),
]
if hasattr(torch, "AcceleratorError"):  # what newer versions of PyTorch raise
    MESSAGES.append((torch.AcceleratorError(f"{NO_KERNEL}\nSearch for it"), NO_KERNEL))


@pytest.mark.parametrize(("error", "message"), MESSAGES)
def test_one_line(error, message):
    line = main.one_line(error)
    assert line.startswith(message) and "\n" not in line and bool(line) == bool(message)


# --------------------------------------------------------------------------------------------------
# Evaluation


def test_evaluate_figures(six_epochs, toy_faces, tmp_path):
    """Computed here in another way, from the image files."""
    net = main.load_network(six_epochs / CHECKPOINT)
    paths, real = held_out(toy_faces, crop=100)
    x = torch.tensor(real, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        mean, log_variance = net.encoder.posterior(net.encoder.features(2 * x - 1)).chunk(2, 1)
    command = [f"--checkpoint={six_epochs / CHECKPOINT}", "--evaluate", f"--outf={tmp_path / 'e'}"]
    program = run(tmp_path, *command).succeeds()
    folder = tmp_path / "e" / "eval"
    metrics = figures(folder)
    assert set(metrics) == OF_RUN | {"noise_variance", *(f"sharpness_{name}" for name in SETS)}
    assert metrics.items() >= figures(six_epochs).items()
    assert f"test_mse  {metrics['test_mse']:.5g}\n" in program.out and program.messages == []

    assert np.abs(pixels(folder / "real") - real).max() < 1e-6
    codes = np.load(folder / "codes.npy")
    assert codes.dtype == np.float32 and codes.shape == (6, 4)
    deviation = np.abs(codes - mean.numpy()) / log_variance.div(2).exp().numpy()
    assert 0.1 < deviation.mean() < 2  # a draw of the Gaussian
    assert metrics["noise_variance"] == pytest.approx(log_variance.exp().mean().item(), rel=1e-4)
    with torch.no_grad():
        decoded = (net.decoder.layers(torch.from_numpy(codes)) + 1) / 2
    shown = torch.tensor(pixels(folder / "reconstructions")).permute(0, 3, 1, 2)
    assert (shown - decoded).abs().max() < 1 / 255
    errors = (decoded - x).square().mean((1, 2, 3)).numpy()
    heading, *lines = (folder / "images.csv").read_text().splitlines()
    names = [str(path.relative_to(toy_faces)) for path in paths]
    assert heading == "path,squared_error" and [line.split(",")[0] for line in lines] == names
    np.testing.assert_allclose([float(line.split(",")[1]) for line in lines], errors, rtol=1e-4)
    assert metrics["test_mse"] == pytest.approx(errors.mean(), rel=1e-4)
    sharpness = model.sharpness(decoded).mean().item()
    assert metrics["sharpness_reconstructions"] == pytest.approx(sharpness, rel=1e-3)

    def gaussian_w2(points: np.ndarray) -> float:
        deviations = np.sqrt(np.linalg.eigvalsh(np.cov(points.T)).clip(0))
        return np.square(points.mean(0)).sum() + np.square(deviations - 1.5).sum()

    values = np.linalg.eigvalsh(np.cov(codes.T.astype(float)))
    extremes = (metrics["eigenvalue_min"], metrics["eigenvalue_max"])
    assert extremes == pytest.approx((values[0], values[-1]), rel=1e-4)
    assert metrics["eigenvalue_min_of_prior"] < 1.5**2 < metrics["eigenvalue_max_of_prior"]
    draws = 1.5 * np.random.default_rng(0).normal(size=(2000, 6, 4))
    of_prior = np.array([gaussian_w2(points) for points in draws])
    expected = gaussian_w2(codes.astype(float)) - of_prior.mean()
    assert metrics["test_w2"] == pytest.approx(expected, abs=4 * of_prior.std() / 20**0.5)
    assert metrics["test_w2_std_of_prior"] == pytest.approx(of_prior.std(), rel=0.6)

    mixture, z = load(six_epochs)["mixture"], torch.from_numpy(codes).double()
    terms = zip(*map(mixture.get, ("weights", "means", "covariances")), strict=True)
    normal = torch.distributions.MultivariateNormal
    terms = torch.stack([weight.log() + normal(m, c).log_prob(z) for weight, m, c in terms])
    nats = terms.logsumexp(0) - torch.distributions.Normal(0, 1.5).log_prob(z).sum(1)
    assert metrics["test_nats"] == pytest.approx(nats.mean().item(), rel=1e-3)


def copied(files: list[Path], folder: Path) -> Path:
    """Copies images into a folder for --dataroot. Returns that."""
    (folder / "img_align_toy").mkdir(parents=True)
    for file in files:
        shutil.copy(file, folder / "img_align_toy")
    return folder


def test_evaluate_other_folders(trained, six_epochs, toy_faces, tmp_path):
    """All images of another folder, or the held-out ones of the run's own, and fewer if asked."""
    paths, real = held_out(toy_faces)
    six = copied(paths, tmp_path / "six images")
    one = copied(paths[:1], tmp_path / "one image")
    own = copied(sorted(toy_faces.glob("*/*.jpg")), tmp_path / "own")  # a copy
    mmd = trained["mmd"]
    whole = evaluate(mmd, tmp_path / "a")
    alone = evaluate(mmd, tmp_path / "b", f"--dataroot={six}")
    assert count(whole) == count(alone) == dict(zip(SETS, (6, 6, 10, 10), strict=True))
    assert contents(whole / "reconstructions") == contents(alone / "reconstructions")
    fewer = evaluate(mmd, tmp_path / "c", f"--dataroot={own}", "--n_test=3")
    lines = (fewer / "images.csv").read_text().splitlines()[1:]
    assert [Path(line.split(",")[0]).name for line in lines] == [paths[i].name for i in (0, 2, 5)]

    # A typed --dataset replaces the crop of the run, here of 100 pixels.
    single = evaluate(six_epochs, tmp_path / "d", f"--dataroot={one}", "--dataset=celebA")
    assert set(figures(single)) & (OF_CODES | {"test_mse"}) == {"test_mse"}
    assert np.abs(pixels(single / "real") - real[:1]).max() < 1e-6

    outf = train(toy_faces, tmp_path / "run", f"--testroot={six}", "--mode=mmd")
    assert load(outf)["step"] == 3 and figures(outf)["n_test"] == 6
    own_images = evaluate(outf, tmp_path / "e")
    assert contents(own_images / "real") == contents(whole / "real")
    assert figures(own_images).items() >= figures(outf).items()
    assert count(evaluate(outf, tmp_path / "f", f"--dataroot={one}"))["real"] == 1


def test_evaluate_into_its_folder(trained, tmp_path):
    """Images take the place of those before; other files, and those of the run, are kept."""
    outf = Path(shutil.copytree(trained["gan"], tmp_path / "run"))
    before = contents(outf)
    samples = outf / "eval" / "samples_prior"
    samples.mkdir(parents=True)
    others = [samples / ".DS_Store", samples / "notes.txt", samples / "mine.png"]
    for path in (*others, samples.parent / "Thumbs.db"):
        path.write_text("mine")
    for n in (10, 3):
        evaluate(outf, outf, f"--n_samples={n}")
        numbers = [f"{i:05d}.png" for i in range(n)]
        assert set(contents(samples)) == {*numbers, *(path.name for path in others)}
        assert set(contents(samples.parent / "samples_mixture")) == set(numbers)
    assert contents(outf) == before
    files = {".lock", "Thumbs.db", "metrics.json", "codes.npy", "codes.png", "images.csv"}
    assert set(contents(samples.parent)) == files
    assert {path.read_text() for path in others} == {"mine"}


def test_generate(trained, tmp_path):
    """The samples of an evaluation, from a lone checkpoint."""
    expected = evaluate(trained["mmd"], tmp_path / "e")
    path, state = tmp_path / "my.pth", load(trained["mmd"])
    state["flags"]["dataroot"] = "/nowhere"
    torch.save(state, path)
    for density in ("prior", "mixture"):
        outf = tmp_path / density
        command = [f"--checkpoint={path}", "--generate=10", f"--density={density}"]
        assert main.execute([*command, f"--outf={outf}"]) == 0
        samples = contents(expected / f"samples_{density}")
        generated = contents(outf / "generated")
        assert generated.pop(".lock") == b""
        assert generated == samples and len(set(samples.values())) > 5
        shown = cells(outf / "generated.png", 32, 8)
        assert np.array_equal(shown[9], picture(outf / "generated" / "00009.png"))
    torch.save(state | {"mixture": None}, path)
    run(tmp_path, *command).fails(1, "--density=mixture: it is fitted after the last epoch")


def test_load_network_in_the_readme(tmp_path):
    """The block under the heading is run where a reader would run it."""
    text = (REPO / "README.md").read_text()
    block = re.search(r"^### From Python\n.*?^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "figs").symlink_to(REPO / "figs")
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", block[1]]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
