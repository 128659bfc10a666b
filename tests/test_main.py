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
from kill_and_resume import unequal
from PIL import Image
from program import REPO, TINY, load, rows, run, steps

import main
import model
import utils

DENSITIES = ("samples_prior", "samples_gaussian", "samples_mixture")
SETS = {"real", "reconstructions", *DENSITIES}
OF_CODES = {"test_mse", "test_mmd", "test_w2", "eigenvalue_min", "eigenvalue_max"}
FIGURES = {"test_nats", *OF_CODES, *(f"sharpness_{name}" for name in SETS)}
FIGURES |= {"test_w2_std_of_prior", "eigenvalue_min_of_prior", "eigenvalue_max_of_prior"}
FIGURES |= {"step", "n_test", "n_samples"}
CHECKPOINT, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
DENSITIES_FILE = "densities.pth.tar"


def train(tmp_path: Path, data: Path, *flags: str) -> Path:
    """Trains for one epoch of three steps, or as the flags say. Returns the folder of the run."""
    common = [f"--dataroot={data}", *TINY, "--niter=1", "--seed=1"]
    run(tmp_path, *common, *flags, f"--outf={tmp_path / 'run'}").succeeds()
    return tmp_path / "run"


def evaluated(checkpoint: Path, outf: Path, *flags: str) -> Path:
    """Evaluates a checkpoint into another folder. Returns that."""
    assert main.execute([f"--checkpoint={checkpoint}", "--evaluate", f"--outf={outf}", *flags]) == 0
    return outf


def column(outf: Path, name: str) -> list[float]:
    """The numbers in a column of the log."""
    return [float(row[name]) for row in rows(outf) if row[name]]


def figures(outf: Path) -> dict[str, float]:
    """The metrics of a run."""
    return json.loads((outf / "metrics.json").read_text())


def picture(path: Path) -> np.ndarray:
    """The pixels of a PNG in [0, 1], (height, width, 3)."""
    return np.asarray(Image.open(path).convert("RGB")) / 255


def cells(path: Path, side: int, columns: int) -> np.ndarray:
    """The images of a grid, (n, side, side, 3), without the two pixels between them."""
    grid, cell = picture(path), side + 2
    places = itertools.product(range(2, len(grid), cell), range(2, cell * columns, cell))
    return np.stack([grid[y : y + side, x : x + side] for y, x in places])


def written(folder: Path) -> list[bytes]:
    """The PNG files in a folder, which are numbered."""
    paths = sorted(folder.iterdir())
    assert [path.name for path in paths] == [f"{i:05d}.png" for i in range(len(paths))]
    return [path.read_bytes() for path in paths]


def pixels(folder: Path) -> np.ndarray:
    """The same as an array in [0, 1], (n, side, side, 3)."""
    return np.stack([picture(path) for path in sorted(folder.iterdir())])


def count(outf: Path) -> dict[str, int]:
    """How many images each folder of an evaluation has."""
    return {path.name: len(written(path)) for path in (outf / "eval").iterdir() if path.is_dir()}


def held_out(data: Path, crop: int = 140) -> tuple[list[str], np.ndarray]:
    """The last six paths, and the images decoded anew: their central square, (6, 32, 32, 3)."""
    paths = sorted(data.glob("*/*.jpg"))[-6:]
    box = ((178 - crop) // 2, (218 - crop) // 2, (178 + crop) // 2, (218 + crop) // 2)
    images = [
        Image.open(path).crop(box).resize((32, 32), Image.Resampling.LANCZOS) for path in paths
    ]
    return [str(path.relative_to(data)) for path in paths], np.stack(images) / 255


def test_get_parser_help(capsys):
    """It names every flag with its default."""
    with pytest.raises(SystemExit):
        main.execute(["-h"])
    text = capsys.readouterr().out
    entries = dict(re.findall(r"^  --(\w+)(.*?)(?=^  --|^\w|\Z)", text, re.DOTALL | re.MULTILINE))
    flags = vars(main.get_parser().parse_args([]))
    assert set(entries) == set(flags)
    for name, value in flags.items():
        entry = " ".join(entries[name].split())
        if isinstance(value, bool):
            assert f"--no-{name}" in entry and (not value or "(default: True)" in entry)
        elif value is not None and name != "gpu_id":
            shown = ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)
            assert f"(default: {shown}" in entry, name


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


REFUSED = {
    "": "--dataroot is required",
    "--dataroot=d --outf=": "argument --outf: it is empty",
    "--dataroot=d --outf=d/faces": "--outf=d/faces and --dataroot=d: one is inside the other",
    "--dataroot=d --outf=e/../d": "one is inside the other; choose another --outf",
    "--dataroot=e/eval/real --outf=e": "--outf=e and --dataroot=e/eval/real: one is inside",
    "--dataroot=d --outf=/dev/null/x": "cannot write /dev/null/x: Not a directory",
    "--dataroot=d --mode=mmd --nowozin_trick": "--nowozin_trick is for --mode=gan",
    "--dataroot=d --mode=vae --noise=add_noise": "--mode=vae needs --noise=gaussian$",
    "--dataroot=d --ngpu=3": "--batch_size=100 cannot be shared by 3 processes",
    "--dataroot=d --ngpu=100": "--batch_size=100 cannot be shared by 100 processes",
    "--dataroot=d --batch=4": "unrecognized arguments: --batch=4",
    "--evaluate --generate=4": "argument --generate: not allowed with argument --evaluate",
    "--dataroot=d --lr=0": "argument --lr: 0 is out of range: it must be more than 0",
    "--dataroot=d --lr=nan": "argument --lr: nan is out of range",
    "--dataroot=d --nz=two": "argument --nz: invalid int value: 'two'",
    "--dataroot=d --seed=-1": "argument --seed: -1 is out of range: it must be at least 0",
    "--dataroot=d --mode=ae": "argument --mode: invalid choice: 'ae'",
    "--dataroot=d --imq_scales=1,0": "argument --imq_scales: 0 is out of range",
    "--dataroot=d --cuda": "--cuda: PyTorch finds no CUDA GPU",
    "--dataroot=d --cuda --ngpu=2": "--ngpu=2: there are 0 GPUs",
    "--outf=none --evaluate": "none/checkpoint.pth.tar: no such file",
}


@pytest.mark.parametrize("command", REFUSED)
def test_get_flags_refused(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(utils.UserError, match=REFUSED[command]):
        main.execute(command.split())
    assert not list(tmp_path.iterdir())


def other(action: argparse.Action, value: object) -> str:
    """The flag with another value."""
    if isinstance(value, bool):
        return action.option_strings[int(value)]
    numbers = {"n_test": 5, "batch_size": 4, "beta1": 0.25}
    new = next((c for c in action.choices or () if c != value), numbers.get(action.dest, 7))
    return f"{action.option_strings[0]}={new}"


def test_get_flags_of_a_run(trained, toy_faces):
    """A flag that differs is refused, whichever it is, but for those that are listed."""
    resume = [f"--checkpoint={trained['gan'] / CHECKPOINT}", f"--dataroot={toy_faces}"]
    stored = load(trained["gan"])["flags"]
    for action in main.get_parser()._actions:
        if action.dest not in main.MAY_CHANGE | {"help"}:
            words = rf"--{action.dest}=\S+ \(checkpoint: "
            with pytest.raises(utils.UsageError, match=words):
                main.get_flags([*resume, other(action, stored[action.dest])])
    same = ["--seed=1", "--lr=0.00030", "--mode=gan", "--noise=add_noise"]
    changed = [
        "--niter=9",
        "--print_every=7",
        "--sample_every=2",
        "--amp",
        "--no-graph",
        "--workers=0",
    ]
    flags, _ = main.get_flags([*resume, *same, *changed])
    assert (flags.niter, flags.batch_size, flags.outf) == (9, 8, trained["gan"])

    common = [f"--dataroot={toy_faces}", *TINY, f"--outf={trained['gan']}"]
    with pytest.raises(utils.UsageError) as error:
        main.get_flags([*common, "--nz=8", "--mode=mmd", "--seed=2"])
    named = re.findall(r"--(\w+)=\S+ \(checkpoint", str(error.value))
    assert sorted(named) == ["LAMBDA", "mode", "nz", "seed"]
    with pytest.raises(utils.UsageError, match=" holds a run; --checkpoint=.* continues it"):
        main.get_flags([*resume, f"--outf={trained['mmd']}"])


def test_get_flags_not_kept(trained, tmp_path):
    """A checkpoint does not bring the flags of a machine or a command, or unknown ones."""
    outf, state = tmp_path / "x", load(trained["mmd"])
    state["flags"] |= {"cuda": True, "ngpu": 4, "gpu_id": 3, "workers": 9, "compile": True}
    state["flags"] |= {"outf": "/elsewhere", "generate": 5, "fid": True, "x y": 1, "graph": False}
    utils.save_checkpoint(utils.make_folder(outf) / "moved.pth", state)
    evaluated(outf / "moved.pth", outf)
    assert figures(outf)["n_samples"] == 10
    words = f"--noise=add_noise: .* .flags that were not typed are those of {outf}/moved.pth.$"
    with pytest.raises(utils.UsageError, match=words):
        main.get_flags([f"--checkpoint={outf / 'moved.pth'}", "--evaluate", "--mode=vae"])


@pytest.mark.parametrize("flag", ["--n_test=25", "--batch_size=26", "--n_test=999999999"])
def test_load_data_too_few_images(flag, tiny_flags, tmp_path):
    with pytest.raises(utils.UsageError, match=f"{flag}.*: 30 images are too few"):
        main.execute([*tiny_flags, flag, f"--outf={tmp_path / 'x'}"])


@pytest.mark.parametrize("flag", ["tensorboard", "fid"])
def test_check_packages(flag, monkeypatch, trained, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(utils.UsageError, match=f"--{flag}: .* is not installed; pip install"):
        evaluated(trained["gan"] / CHECKPOINT, tmp_path / "x", f"--{flag}")


def test_main_command_of_the_predecessor(toy_faces, tmp_path):
    """As people have it in their scripts, in a process of its own, at the default 64 pixels."""
    command = f"""{sys.executable} {REPO / "main.py"} --dataroot={toy_faces} --dataset='celebA' \
        --noise='add_noise' --outf=x/ --mode='gan' --lr=0.0003 --pz_scale=1 --LAMBDA=10 \
        --niter=1 --e_pretrain --nf=2 --batch_size=8 --n_samples=10 --e_pretrain_iters=3 \
        --e_pretrain_sample_size=20 --print_every=1"""
    ended = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "pretraining" in ended.stderr and "Warning" not in ended.stderr
    assert "\r" not in ended.stderr  # in a file, bars are lines

    grid = (8 * 66 + 2, 8 * 66 + 2)
    sizes = {f"{name}_epoch_001.png": grid for name in ("fake_samples", "reconstructions")}
    sizes |= {"interpolations_epoch_001.png": (10 * 66 + 2, 8 * 66 + 2), "codes.png": (600, 600)}
    sizes |= {"real_samples.png": (8 * 66 + 2, 4 * 66 + 2)}  # all 27 training images
    others = {"args.json", "log.csv", "metrics.json", CHECKPOINT, BEST, DENSITIES_FILE, ".lock"}
    outf = tmp_path / "x"
    assert {path.name for path in outf.iterdir()} == {*sizes, *others}
    assert {name: Image.open(outf / name).size for name in sizes} == sizes
    flags = json.loads((outf / "args.json").read_text())
    given = {"dataroot": str(toy_faces), "noise": "add_noise", "LAMBDA": 10.0, "e_pretrain": True}
    assert flags.items() >= (given | {"lr_adv": 3 * 0.0003, "niter": 1, "seed": 0}).items()
    assert set(figures(outf)) == FIGURES and figures(outf)["n_test"] == 3


def test_train_log(toy_faces, tmp_path):
    """At a rate that is high enough for the held-out error to go up and down."""
    flags = ("--mode=mmd", "--noise=gaussian", "--print_every=2", "--sample_every=4")
    outf = train(tmp_path, toy_faces, "--niter=6", "--lr=0.03", "--seed=0", *flags)
    log, tests = rows(outf), main.METRICS
    training = ["reconstruction", "penalty", "discriminator", "lr", "images_per_s"]
    assert list(log[0]) == ["epoch", "step", *training, *tests]
    assert steps(outf) == list(range(2, 19, 2))
    ends = [(row["epoch"], row["step"]) for row in log if row["test_mse"]]
    assert ends == [(str(epoch), str(3 * epoch)) for epoch in range(1, 7)]
    for row in log:
        full = {name for name in (*training, *tests) if row[name]}
        assert full == set(tests if row["test_mse"] else training) - {"discriminator"}
    for name in tests:  # the metrics of the finished run are the last row
        assert log[-1][name] == f"{figures(outf)[name]:.6g}"
    pictures = {path.name for path in outf.glob("fake_samples_*")}
    assert pictures == {f"fake_samples_epoch_00{epoch}.png" for epoch in (4, 6)}  # and the last

    errors, best = column(outf, "test_mse"), load(outf, BEST)
    assert errors.index(min(errors)) < 5  # otherwise best and last are one
    assert best["step"] == 3 * (errors.index(min(errors)) + 1)
    assert f"{best['best']:.6g}" == f"{min(errors):.6g}"


def test_train_scaled_rates(toy_faces, tmp_path):
    """They fall within a short run, and stretch with a longer one."""
    outf = train(tmp_path, toy_faces, "--niter=3", "--lr=0.002", "--lr_schedule=scaled")
    assert column(outf, "lr") == [0.002] * 5 + [0.001] * 4  # a half after 30/55 of nine steps
    program = run(tmp_path, f"--checkpoint={outf / CHECKPOINT}", "--niter=6").succeeds()
    assert column(outf, "lr")[9:] == [0.002] + [0.001] * 7 + [0.0002]
    assert "main.py: --lr_schedule=scaled is stretched to --niter=6" in program.messages


def new_run(device: str, *flags: str) -> main.Run:
    """A run on a device, before its first step."""
    argv = ["--dataroot=unused", *TINY, *flags, "--outf=unused_too"]
    return main.Run(main.get_flags(argv)[0], utils.World(0, 1, torch.device(device)))


def test_set_learning_rates():
    """Steps follow the rates, whatever those were when a checkpoint was written."""
    flags = ("--mode=gan", "--lr=0.5", "--lr_adv=4")
    old, wae = new_run("cpu", *flags), new_run("cpu", *flags)
    old.set_learning_rates(0.5)
    wae.load_state_dict({"step": 0, "images": ""} | old.weights() | old.moments())
    rates = [adam.param_groups[0]["lr"] for adam in wae.optimizers.values()]
    for factor in (1, 0.1):
        assert wae.set_learning_rates(factor) == 0.5 * factor
        # The tensors stay where they are, since a recorded step reads them there.
        assert [rate.item() for rate in rates] == pytest.approx([0.5 * factor, 4 * factor])
        for name, rate in (("net", 0.5), ("discriminator", 4)):
            weight = next(wae.networks[name].parameters())
            before, weight.grad = weight.detach().clone(), torch.ones_like(weight)
            wae.optimizers[name].step()  # as long as the rate, since gradients are always the same
            assert (before - weight).mean().item() == pytest.approx(rate * factor, rel=1e-4)


COMBINATIONS = [
    "--mode=gan --noise=gaussian --arch=paper --nowozin_trick --nz=1",
    "--mode=gan --noise=deterministic --input_normalize_sym --LAMBDA=0 --channels=1",
    "--mode=mmd --kernel=RBF --dataset=folder --image_size=64 --beta1=0 --amp",
    "--mode=mmd --mmd=sampled --quadratic=0.3 --noise=deterministic --imq_scales=1,2",
    "--mode=vae --pz_scale=2 --crop=100 --cost=l1 --lr_schedule=constant",
]


@pytest.mark.parametrize("flags", COMBINATIONS)
def test_train_combinations(flags, toy_faces, tmp_path):
    """Each shows in the checkpoint's networks, trains, and reaches pictures and metrics."""
    outf = train(tmp_path, toy_faces, *flags.split())
    state = load(outf)
    stored = state["flags"]
    assert ("discriminator" in state) == (stored["mode"] == "gan")
    gaussian, net = stored["noise"] == "gaussian", state["net"]
    assert net["encoder.moments.bias"].shape == (stored["nz"] * (2 if gaussian else 1),)
    kernels = {weight.shape[-1] for weight in net.values() if weight.ndim == 4}
    assert kernels == ({5} if stored["arch"] == "paper" else {4})
    assert net["encoder.features.0.weight"].shape[1] == stored["channels"]
    assert all(w.dtype == torch.float32 for w in net.values() if w.is_floating_point())

    metrics = figures(outf)
    assert len(column(outf, "reconstruction")) == len(column(outf, "penalty")) == 3
    assert set(metrics) == FIGURES | ({"noise_variance"} if gaussian else set())
    assert all(np.isfinite(value) for value in metrics.values()) and 0 < metrics["test_mse"] < 0.5
    fake = cells(outf / "fake_samples_epoch_001.png", stored["image_size"], 8)
    assert len(fake) == 64 and 0.05 < fake.mean() < 0.95  # near the middle of either range


def test_sample_grids(toy_faces, tmp_path):
    """With a rate that leaves the networks what they are, the pictures of two epochs are one."""
    outf = train(tmp_path, toy_faces, "--niter=2", "--lr=1e-12", "--noise=deterministic")
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


def test_train_tensorboard(toy_faces, tmp_path):
    """It has the log and the pictures of a continued run."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    outf = train(tmp_path, toy_faces, "--mode=mmd", "--tensorboard")
    run(tmp_path, f"--checkpoint={outf / CHECKPOINT}", "--niter=2").succeeds()
    events = accumulator.EventAccumulator(str(outf))
    events.Reload()
    for name in ("penalty", "test_w2"):
        logged = [(int(row["step"]), float(row[name])) for row in rows(outf) if row[name]]
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        np.testing.assert_allclose(shown, logged, rtol=1e-4)
    assert [event.step for event in events.Images("fake_samples")] == [3, 6]


def test_train_compiled(monkeypatch, trained, tiny_flags, tmp_path):
    """It computes the same, differentiated ahead of time; the default back end takes minutes.

    The penalty in blocks differentiates within, which is what could go wrong.
    """
    argv = [*tiny_flags, "--mode=mmd", "--compile", f"--outf={tmp_path}"]
    with monkeypatch.context() as patched:
        patched.setattr(model, "BLOCK_ENTRIES", 4 * 8)
        patched.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        assert main.execute(argv) == 0
    for name in ("reconstruction", "penalty", "test_mse"):
        assert column(trained["mmd"], name) == pytest.approx(column(tmp_path, name), rel=0.01)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # networks and penalty
    assert list(load(tmp_path)["net"]) == list(load(trained["mmd"])["net"])  # no trace of it

    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "false"))  # with the default, and no compiler
    with pytest.raises(Exception) as error:  # noqa: PT011
        main.execute([*argv, "--niter=2"])
    message = main.one_line(error.value)
    assert message.startswith("--compile does not work here, leave it out: ")
    assert "compiler" in message and "\n" not in message


def test_run_without_bfloat16(monkeypatch, trained, tiny_flags, tmp_path, capfd):
    """--amp warns, and is in float32."""
    monkeypatch.setattr(utils, "cpu_has_bfloat16", lambda: False)
    assert main.execute([*tiny_flags, "--mode=mmd", "--amp", f"--outf={tmp_path}"]) == 0
    assert capfd.readouterr().err.count("main.py: --amp: without bfloat16 instructions") == 1
    assert unequal(load(trained["mmd"])["net"], load(tmp_path)["net"], "net") == []


STEPS = [
    "--mode=gan --noise=add_noise --nowozin_trick",
    "--mode=gan --arch=paper --cost=l1 --input_normalize_sym",
    "--mode=mmd --cost=l2 --quadratic=1",
    "--mode=mmd --kernel=RBF --batch_size=1100",  # in blocks
    "--mode=mmd --kernel=RBF --mmd=sampled",
    "--mode=vae",
]


@pytest.mark.parametrize("flags", STEPS)
def test_train_step_waits_for_nothing(flags, monkeypatch):
    """On tensors of a device without values: reading one, or mixing it with the CPU's, fails."""
    adam = lambda self, net, lr: torch.optim.Adam(net.parameters(), lr, foreach=False)  # noqa: E731
    monkeypatch.setattr(main.Run, "adam", adam)  # the fused one would compute
    wae = new_run("meta", *flags.split())
    n = wae.flags.batch_size
    x = wae.to_input(torch.empty(n, 32, 32, 3, dtype=torch.uint8, device="meta"))
    losses = main.train_step(wae, x, *[wae.sample_prior(n)] * wae.needs_prior)
    assert losses.shape == (3,) and losses.device.type == "meta"


def test_evaluate_figures(toy_faces, tmp_path):
    """Computed here in another way, from the image files, and in both normalisations."""
    flags = ("--mode=mmd", "--noise=gaussian", "--input_normalize_sym", "--pz_scale=1.5")
    outf = train(tmp_path, toy_faces, *flags, "--crop=100", "--niter=2")
    net, stored = main.load_network(outf / CHECKPOINT)
    assert not net.training and stored.pz_scale == 1.5
    names, real = held_out(toy_faces, crop=100)
    x = torch.tensor(real, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        mean, log_variance = net.encoder(2 * x - 1)
    kept = (CHECKPOINT, BEST, DENSITIES_FILE, "metrics.json", "log.csv")
    before = {name: (outf / name).read_bytes() for name in kept}
    program = run(tmp_path, f"--outf={outf}", "--evaluate").succeeds()
    assert {name: (outf / name).read_bytes() for name in kept} == before
    metrics = figures(outf)
    assert f"test_mse  {metrics['test_mse']:.5g}\n" in program.out and program.messages == []
    assert metrics["noise_variance"] == pytest.approx(log_variance.exp().mean().item(), rel=1e-4)

    assert np.abs(pixels(outf / "eval" / "real") - real).max() < 1e-6
    codes = np.load(outf / "eval" / "codes.npy")
    assert codes.dtype == np.float32 and codes.shape == (6, 4)
    deviation = np.abs(codes - mean.numpy()) / log_variance.div(2).exp().numpy()
    assert 0.1 < deviation.mean() < 2  # a draw of the Gaussian
    with torch.no_grad():
        decoded = (net.decoder(torch.from_numpy(codes)) + 1) / 2
    shown = torch.tensor(pixels(outf / "eval" / "reconstructions")).permute(0, 3, 1, 2)
    assert (shown - decoded).abs().max() < 1 / 255
    errors = (decoded - x).square().mean((1, 2, 3)).numpy()
    heading, *lines = (outf / "eval" / "images.csv").read_text().splitlines()
    assert heading == "path,squared_error" and [line.split(",")[0] for line in lines] == names
    np.testing.assert_allclose([float(line.split(",")[1]) for line in lines], errors, rtol=1e-4)
    assert metrics["test_mse"] == pytest.approx(errors.mean(), rel=1e-4)
    values = np.linalg.eigvalsh(np.cov(codes.T.astype(float)))
    extremes = (metrics["eigenvalue_min"], metrics["eigenvalue_max"])
    assert extremes == pytest.approx((values[0], values[-1]), rel=1e-4)
    assert metrics["eigenvalue_min_of_prior"] < 1.5**2 < metrics["eigenvalue_max_of_prior"]
    sharpness = model.sharpness(decoded).mean().item()
    assert metrics["sharpness_reconstructions"] == pytest.approx(sharpness, rel=1e-3)
    mixture, z = load(outf, DENSITIES_FILE)["mixture"], torch.from_numpy(codes).double()
    terms = zip(*map(mixture.get, ("weights", "means", "covariances")), strict=True)
    normal = torch.distributions.MultivariateNormal
    terms = torch.stack([weight.log() + normal(m, c).log_prob(z) for weight, m, c in terms])
    nats = terms.logsumexp(0) - torch.distributions.Normal(0, 1.5).log_prob(z).sum(1)
    assert metrics["test_nats"] == pytest.approx(nats.mean().item(), rel=1e-3)


def test_evaluate_other_folders(trained, toy_faces, tmp_path):
    """A checkpoint reconstructs an image in one way, whatever lies beside it."""
    roots, images = {}, sorted(toy_faces.glob("*/*.jpg"))[-6:]
    for name, files in (("whole", []), ("all", []), ("alone", images), ("one", images[:1])):
        roots[name] = utils.make_folder(tmp_path / name / "faces").parent if files else toy_faces
        for file in files:
            shutil.copy(file, roots[name] / "faces")
    outs = {}
    for name, n_test in (("whole", 6), ("alone", 6), ("one", 1), ("all", 30)):
        flags = (f"--dataroot={roots[name]}", f"--n_test={n_test}")
        outs[name] = evaluated(trained["mmd"] / CHECKPOINT, tmp_path / f"of {name}", *flags)
        assert count(outs[name])["reconstructions"] == n_test
    drawn = {name: written(out / "eval" / "reconstructions") for name, out in outs.items()}
    assert drawn["alone"] == drawn["whole"]
    assert set(figures(outs["one"])) & OF_CODES == {"test_mse"}
    for name in ("alone", "one", "all"):  # without training images there is nothing to fit
        assert set(count(outs[name])) == {"real", "reconstructions", "samples_prior"}

    outf = Path(shutil.copytree(trained["mmd"], tmp_path / "run"))
    for i in range(9):
        Image.new("RGB", (140, 140), (i, 0, 0)).save(roots["one"] / "faces" / f"{i}.png")
    evaluated(outf / CHECKPOINT, outf, f"--dataroot={roots['one']}")
    before = (trained["mmd"] / DENSITIES_FILE).read_bytes()
    assert (outf / DENSITIES_FILE).read_bytes() == before  # they are those of the run
    assert len(written(outf / "eval" / "samples_mixture")) == 10


def test_evaluate_into_a_folder(trained, tmp_path):
    """A link is followed, images take the place of those before, and other files are kept."""
    outf, disk = Path(shutil.copytree(trained["gan"], tmp_path / "run")), tmp_path / "disk"
    utils.make_folder(outf / "eval")
    (outf / "eval" / "samples_prior").symlink_to(disk)
    for n in (10, 3):
        evaluated(outf / CHECKPOINT, outf, f"--n_samples={n}")
        assert count(outf) == {"real": 6, "reconstructions": 6} | dict.fromkeys(DENSITIES, n)
        assert (outf / "eval" / "samples_prior").is_symlink() and len(written(disk)) == n
    assert {path.name for path in tmp_path.rglob(".*")} == {".lock"}
    (disk / "mine.png").write_text("mine")
    with pytest.raises(utils.UserError, match=f"^{disk}/mine.png is not of this program"):
        evaluated(outf / CHECKPOINT, outf, "--n_samples=4")
    assert (disk / "mine.png").read_text() == "mine" and len(list(disk.iterdir())) == 4


def test_generate(trained, tmp_path):
    """The samples of an evaluation, from a checkpoint and the densities beside it or in it."""
    expected = evaluated(trained["mmd"] / CHECKPOINT, tmp_path / "e") / "eval"
    path, state = utils.make_folder(tmp_path / "moved") / "my.pth", load(trained["mmd"])
    state["flags"]["dataroot"] = "/nowhere"
    torch.save(state, path)
    densities = trained["mmd"] / DENSITIES_FILE
    other_step = load(trained["mmd"], densities.name) | {"step": 2}  # as of model_best.pth.tar
    for beside in (None, other_step):
        if beside:
            torch.save(beside, path.parent / densities.name)
        words = f"^--density=mixture: no {path.parent}/{densities.name} of step 3"
        with pytest.raises(utils.UserError, match=words):
            main.execute([f"--checkpoint={path}", "--generate=10", "--density=mixture"])
    shutil.copy(densities, path.parent)
    for name in ("prior", "gaussian", "mixture"):
        outf = tmp_path / name
        argv = [f"--checkpoint={path}", "--generate=10", f"--density={name}", f"--outf={outf}"]
        assert main.execute(argv) == 0
        samples = written(expected / f"samples_{name}")
        assert written(outf / "generated") == samples and len(set(samples)) > 5
        shown = cells(outf / "generated.png", 32, 8)
        assert np.array_equal(shown[9], picture(outf / "generated" / "00009.png"))
        (path.parent / densities.name).unlink(missing_ok=True)
        torch.save(state | {"densities": load(trained["mmd"], densities.name)}, path)


class Features(torch.nn.Module):
    """Stands in for the network of pytorch-fid, whose weights must be downloaded."""

    BLOCK_INDEX_BY_DIM = {2048: 3}

    def __init__(self, blocks: list[int]):
        super().__init__()
        torch.manual_seed(sum(blocks))
        self.convolution = torch.nn.Conv2d(3, 5, 8, stride=8)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.convolution(x).relu().mean((2, 3), keepdim=True)]


def test_evaluate_fid(trained, monkeypatch, tmp_path, capfd):
    """Of the images as they are written, by the formula of the distance."""
    inception = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(inception, "InceptionV3", Features)
    outf = evaluated(trained["gan"] / CHECKPOINT, tmp_path, "--fid", "--n_samples=30")
    assert "fewer than 2048 images" in capfd.readouterr().err
    moments = {}
    for name in SETS:
        x = torch.tensor(pixels(outf / "eval" / name), dtype=torch.float32).permute(0, 3, 1, 2)
        features = Features([3])(x)[0].flatten(1).detach().double().numpy()
        moments[name] = features.mean(0), np.cov(features.T)
    mean, covariance = moments.pop("real")
    for name, (m, c) in moments.items():
        cross = np.sqrt(np.linalg.eigvals(covariance @ c).real.clip(0)).sum()
        expected = np.square(mean - m).sum() + np.trace(covariance) + np.trace(c) - 2 * cross
        assert figures(outf)[f"fid_{name}"] == pytest.approx(expected, rel=1e-3)


def test_inception_without_weights(trained, tmp_path):
    pytest.importorskip("pytorch_fid")
    command = [f"--checkpoint={trained['gan'] / CHECKPOINT}", "--evaluate", "--fid"]
    env = {"https_proxy": "http://127.0.0.1:9", "TORCH_HOME": str(tmp_path / "none")}
    program = run(tmp_path, *command, f"--outf={tmp_path / 'x'}", env=env)
    assert program.wait() == 1 and "Traceback" not in program.err
    words = r"error: --fid: no weights of the Inception network: .*; download https://\S+ by hand "
    words += f"and put it into {tmp_path / 'none' / 'hub' / 'checkpoints'}$"
    assert re.search(words, program.messages[-1])


def test_load_network_in_the_readme(tmp_path):
    """The block under the heading is run where a reader would run it."""
    text = (REPO / "README.md").read_text()
    block = re.search(r"^### From Python\n.*?^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "figs").symlink_to(REPO / "figs")
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", block[1]]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
