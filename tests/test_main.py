"""main.py from end to end on toy faces: what a run leaves, that a seed repeats it, and what an evaluation writes."""

import csv
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_and_resume import differences
from PIL import Image
from program import REPO, TINY, Program, run

import main
import model
import utils

FIGURES = {"test_mse", "test_mmd", "test_code_mean", "test_code_variance", "test_mmd_gaussian", "sharpness_real"}
FIGURES |= {"sharpness_reconstructions", "sharpness_samples_prior", "sharpness_samples_gaussian"}


def done(program: Program) -> Program:
    """The program, ended well."""
    assert program.wait() == 0, program.err
    assert "Traceback" not in program.err
    return program


def train(tmp_path: Path, toy_faces: Path, *flags: str, name: str = "run") -> Path:
    """Trains with the flags for one epoch of three steps, or as they say. Returns the folder of the run."""
    done(run(tmp_path, f"--dataroot={toy_faces}", *TINY, "--niter=1", "--seed=1", *flags, f"--outf={tmp_path / name}"))
    return tmp_path / name


def rows(outf: Path) -> list[dict[str, str]]:
    """The log of a run."""
    return list(csv.DictReader((outf / "log.csv").read_text().splitlines()))


def load(outf: Path, name: str = "checkpoint.pth.tar") -> dict:
    """A checkpoint of a run."""
    return torch.load(outf / name, weights_only=True)


def picture(path: Path) -> np.ndarray:
    """The pixels of a PNG in [0, 1], (height, width, 3)."""
    return np.asarray(Image.open(path).convert("RGB")) / 255


def cells(path: Path, side: int, columns: int) -> np.ndarray:
    """The images of a grid, (n, side, side, 3), without the two pixels between them."""
    grid = picture(path)
    places = itertools.product(range(2, grid.shape[0], side + 2), range(2, (side + 2) * columns, side + 2))
    return np.stack([grid[y : y + side, x : x + side] for y, x in places])


def held_out_images(toy_faces: Path, n: int = 6) -> np.ndarray:
    """The last images by path, decoded anew: the central 140 pixels at 32 x 32, in [0, 1], (n, 32, 32, 3)."""
    images = [Image.open(path) for path in sorted(toy_faces.glob("*/*.jpg"))[-n:]]
    assert {image.size for image in images} == {(178, 218)}  # as CelebA's: 19 columns off each side, 39 rows
    squares = [image.crop((19, 39, 159, 179)).resize((32, 32), Image.Resampling.BILINEAR) for image in images]
    return np.stack([np.asarray(square) for square in squares]) / 255


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves


def test_the_command_line_of_the_predecessor(toy_faces, tmp_path):
    """As people have it in their scripts, in a process of its own, at the default 64 pixels."""
    command = f"""{sys.executable} {REPO / "main.py"} --dataroot={toy_faces} --dataset='celebA' --noise='add_noise' \
        --outf=x/ --mode='gan' --lr=0.0003 --pz_scale=1 --LAMBDA=10 --niter=1 --e_pretrain"""
    small = " --nf=2 --batch_size=8 --n_samples=10 --e_pretrain_iters=3 --e_pretrain_sample_size=20 --print_every=1"
    ended = subprocess.run(command + small, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "pretraining" in ended.stderr
    assert "Warning" not in ended.stderr
    outf = tmp_path / "x"

    sizes = {
        "real_samples.png": (8 * 66 + 2, 4 * 66 + 2),  # all 27 training images
        "fake_samples_epoch_001.png": (8 * 66 + 2, 8 * 66 + 2),
        "reconstructions_epoch_001.png": (8 * 66 + 2, 8 * 66 + 2),
        "interpolations_epoch_001.png": (10 * 66 + 2, 8 * 66 + 2),
        "codes.png": (600, 600),
        "losses.png": (800, 5 * 180),
    }
    others = {"args.json", "log.csv", "metrics.json", "checkpoint.pth.tar", "model_best.pth.tar"}
    assert {path.name for path in outf.iterdir()} == set(sizes) | others
    assert {name: Image.open(outf / name).size for name in sizes} == sizes

    seed = int(re.fullmatch(r"--seed=(\d+)", ended.stdout.splitlines()[0])[1])
    stored = json.loads((outf / "args.json").read_text())
    given = {"dataroot": str(toy_faces), "noise": "add_noise", "mode": "gan", "LAMBDA": 10.0, "e_pretrain": True}
    assert stored.items() >= (given | {"seed": seed, "lr_adv": 3 * 0.0003, "n_test": 3, "niter": 1}).items()
    assert load(outf)["flags"]["seed"] == seed
    assert set(json.loads((outf / "metrics.json").read_text())) == FIGURES | {"epoch", "n_test", "n_samples", "sampler"}


def test_the_log_has_a_row_for_each_print_and_each_epoch(toy_faces, tmp_path):
    outf = train(tmp_path, toy_faces, "--niter=3", "--print_every=2", "--sample_every=2", "--lr=0.001")
    columns = ["epoch", "step", "reconstruction", "penalty", "discriminator", "lr", "images_per_s"]
    tests = ["test_mse", "test_mmd", "test_code_mean", "test_code_variance"]
    log = rows(outf)
    assert list(log[0]) == columns + tests
    steps = [("1", "2"), ("2", "4"), ("2", "6"), ("3", "8")]
    assert [(row["epoch"], row["step"]) for row in log if row["reconstruction"]] == steps
    assert [(row["epoch"], row["step"]) for row in log if row["test_mse"]] == [("1", "3"), ("2", "6"), ("3", "9")]
    for row in log:
        filled, empty = (columns, tests) if row["lr"] else (["epoch", "step", *tests], columns[2:])
        assert all(np.isfinite(float(row[name])) for name in filled)
        assert all(row[name] == "" for name in empty)
    assert {float(row["lr"]) for row in log if row["lr"]} == {0.001}
    pictures = {path.name for path in outf.glob("fake_samples_*")}
    assert pictures == {"fake_samples_epoch_002.png", "fake_samples_epoch_003.png"}  # every second, and the last


def test_scaled_rates_fall_within_a_short_run_and_stretch_with_a_longer_one(toy_faces, tmp_path):
    outf = train(tmp_path, toy_faces, "--niter=3", "--lr=0.002", "--lr_schedule=scaled")
    assert [float(row["lr"]) for row in rows(outf) if row["lr"]] == [0.002] * 6 + [0.001] * 3
    done(run(tmp_path, f"--checkpoint={outf / 'checkpoint.pth.tar'}", "--niter=6", "--n_samples=10"))
    assert [float(row["lr"]) for row in rows(outf) if row["lr"]][9:] == [0.002] * 3 + [0.001] * 6


def test_the_best_model_is_that_of_the_lowest_held_out_error(toy_faces, tmp_path):
    """The rate is high enough for the error to go up and down."""
    outf = train(tmp_path, toy_faces, "--niter=6", "--mode=mmd", "--lr=0.03", "--seed=4")
    errors = [float(row["test_mse"]) for row in rows(outf) if row["test_mse"]]
    best = load(outf, "model_best.pth.tar")
    assert errors.index(min(errors)) < 5  # otherwise best and last are one
    assert best["epoch"] == errors.index(min(errors)) + 1
    assert f"{best['best']:.6g}" == f"{min(errors):.6g}"
    assert load(outf)["epoch"] == 6


@pytest.mark.parametrize("mode", ["gan", "mmd"])
def test_a_seed_repeats_the_run_bit_for_bit(mode, trained, toy_faces, tmp_path):
    again = train(tmp_path, toy_faces, f"--mode={mode}")
    assert differences(trained[mode], again) == []
    other = train(tmp_path, toy_faces, f"--mode={mode}", "--seed=2", name="other")
    assert "fake_samples_epoch_001.png" in differences(other, again)


COMBINATIONS = [
    ("--mode=gan", "--noise=deterministic", "--nowozin_trick"),
    ("--mode=gan", "--noise=gaussian", "--arch=paper", "--cost=l1"),
    ("--mode=gan", "--input_normalize_sym", "--lr_schedule=constant", "--nz=1"),
    ("--mode=mmd", "--noise=deterministic", "--kernel=RBF", "--dataset=folder"),
    ("--mode=mmd", "--noise=add_noise", "--kernel=IMQ", "--cost=l2"),
    ("--mode=mmd", "--noise=gaussian", "--kernel=RBF", "--input_normalize_sym", "--pz_scale=2", "--arch=paper"),
    ("--mode=mmd", "--image_size=64", "--amp", "--beta1=0"),
    ("--mode=gan", "--amp", "--lr_adv=0.01", "--LAMBDA=0"),
]


@pytest.mark.parametrize("flags", COMBINATIONS, ids=" ".join)
def test_modes_kernels_noises_and_networks(flags, toy_faces, tmp_path):
    """Each is what the checkpoint's networks show, trains, and reaches the pictures and the metrics."""
    outf = train(tmp_path, toy_faces, *flags)
    chosen = dict(flag[2:].split("=") if "=" in flag else (flag[2:], "True") for flag in flags)
    stored = json.loads((outf / "args.json").read_text())
    assert {name: str(stored[name]) for name in chosen if name not in ("pz_scale", "LAMBDA", "beta1")}.items() <= (
        chosen.items()
    )
    state = load(outf)
    assert ("discriminator" in state) == ("optimizer_d" in state) == (chosen["mode"] == "gan")
    outputs = int(chosen.get("nz", 4)) * (2 if stored["noise"] == "gaussian" else 1)
    assert state["encoder"]["code.bias"].shape == (outputs,)
    kernels = [weight.shape[-1] for weight in state["decoder"].values() if weight.ndim == 4]
    assert set(kernels) == ({5} if stored["arch"] == "paper" else {4})
    assert all(w.dtype == torch.float32 for w in state["encoder"].values() if w.is_floating_point())

    steps = [row for row in rows(outf) if row["lr"]]
    assert len(steps) == 3
    names = ["reconstruction", "penalty"] + ["discriminator"] * (chosen["mode"] == "gan")
    assert all(np.isfinite(float(row[name])) for row in steps for name in names)
    metrics = json.loads((outf / "metrics.json").read_text())
    assert all(np.isfinite(metrics[name]) for name in FIGURES)
    assert 0 < metrics["test_mse"] < 0.5
    fake = cells(outf / "fake_samples_epoch_001.png", stored["image_size"], 8)
    assert fake.shape == (64, stored["image_size"], stored["image_size"], 3)
    assert 0.05 < fake.mean() < 0.95  # near the middle of the range, in both normalisations


def test_flags_of_the_objective_reach_the_first_step(trained, toy_faces, tmp_path):
    """From the same weights, images and draws: the penalty depends on the kernel, the cost on its formula."""
    imq, rbf, l2 = (
        rows(trained["mmd"])[0],
        rows(train(tmp_path, toy_faces, "--mode=mmd", "--kernel=RBF", name="rbf"))[0],
        rows(train(tmp_path, toy_faces, "--mode=mmd", "--cost=l2", name="l2"))[0],
    )
    assert imq["reconstruction"] == rbf["reconstruction"]
    assert imq["penalty"] != rbf["penalty"]
    assert imq["penalty"] == l2["penalty"]
    # 0.2 |d| averaged over the images is at most 0.2 sqrt(mean |d|^2), with 0.05 |d|^2 averaged in the other log
    bound = 0.2 * (float(imq["reconstruction"]) / 0.05) ** 0.5
    assert 0.8 * bound < float(l2["reconstruction"]) <= bound * 1.00001


def test_pretraining_brings_the_codes_to_the_prior(toy_faces, tmp_path):
    flags = ("--mode=mmd", "--noise=deterministic", "--lr=0.003", "--kernel=IMQ")
    plain = train(tmp_path, toy_faces, *flags, name="plain")
    pretraining = ("--e_pretrain", "--e_pretrain_iters=60", "--e_pretrain_sample_size=24")
    pretrained = train(tmp_path, toy_faces, *flags, *pretraining, name="pretrained")
    before, after = (float(rows(outf)[0]["penalty"]) for outf in (plain, pretrained))
    assert after < before / 2


def test_samples_of_an_epoch_come_from_the_same_codes_as_those_of_any_other(toy_faces, tmp_path):
    """With a rate so low that the networks stay what they are, the pictures of two epochs are one."""
    outf = train(tmp_path, toy_faces, "--niter=2", "--lr=1e-12")
    for name, columns in (("fake_samples", 8), ("interpolations", 10), ("reconstructions", 8)):
        first, second = (cells(outf / f"{name}_epoch_00{epoch}.png", 32, columns) for epoch in (1, 2))
        assert np.abs(first - second).max() <= 1.01 / 255
    fake = cells(outf / "fake_samples_epoch_001.png", 32, 8)
    assert np.abs(fake[1:] - fake[:-1]).max() > 10 / 255  # while other codes give other images


def test_pictures_show_held_out_images_above_their_reconstructions_and_paths_between_them(toy_faces, tmp_path):
    outf = train(tmp_path, toy_faces, "--mode=mmd", "--noise=deterministic")
    real = held_out_images(toy_faces)
    grid = cells(outf / "reconstructions_epoch_001.png", 32, 8).reshape(4, 2, 8, 32, 32, 3)
    above, below = (grid[:, i].reshape(32, 32, 32, 3) for i in (0, 1))
    shown = np.linspace(0, 5, 32).astype(int)
    assert np.abs(above - real[shown]).max() < 1.01 / 255
    paths = cells(outf / "interpolations_epoch_001.png", 32, 10).reshape(8, 10, 32, 32, 3)
    assert np.abs(paths[:, 0] - below[:8]).max() < 1.01 / 255  # from the reconstructions of the first
    assert np.abs(paths[:, -1] - below[-8:]).max() < 1.01 / 255  # to those of the last
    real_samples = cells(outf / "real_samples.png", 32, 8)
    assert len(real_samples) == 24
    distance = np.abs(real_samples[:, None] - real[None]).max((2, 3, 4))
    assert distance.min() > 2 / 255  # no held-out image among the training images


def test_the_figures_in_the_log_are_those_of_the_networks_in_the_checkpoint(toy_faces, tmp_path):
    """Computed here with the networks in evaluation mode, from the image files."""
    outf = train(tmp_path, toy_faces, "--mode=mmd", "--noise=deterministic", "--niter=2", "--input_normalize_sym")
    state = load(outf)
    encoder = model.Encoder(32, 4, 2, "dcgan", "deterministic").eval()
    decoder = model.Decoder(32, 4, 2, "dcgan", symmetric=True).eval()
    encoder.load_state_dict(state["encoder"]), decoder.load_state_dict(state["decoder"])
    x = torch.tensor(held_out_images(toy_faces), dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        codes = encoder(2 * x - 1)
        mse = ((decoder(codes) + 1) / 2 - x).square().mean().item()
    row = rows(outf)[-1]
    assert float(row["test_mse"]) == pytest.approx(mse, rel=1e-4)
    assert float(row["test_code_mean"]) == pytest.approx(codes.mean(0).norm().item(), rel=1e-4)
    assert float(row["test_code_variance"]) == pytest.approx(codes.var(0).mean().item(), rel=1e-4)
    assert json.loads((outf / "metrics.json").read_text())["test_mse"] == pytest.approx(mse, rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


def count(outf: Path) -> dict[str, int]:
    """How many images each folder of an evaluation has."""
    return {folder.name: len(list(folder.glob("?????.png"))) for folder in (outf / "eval").iterdir()}


def test_an_evaluation_needs_the_checkpoint_alone(trained, toy_faces, tmp_path):
    """It repeats the figures that training ended with, and writes one file an image beside the checkpoint."""
    outf = Path(shutil.copytree(trained["gan"], tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in outf.iterdir()}
    checkpoint = f"--checkpoint={outf / 'checkpoint.pth.tar'}"
    program = done(run(tmp_path, checkpoint, "--evaluate", "--n_samples=10"))
    after = {path.name: path.read_bytes() for path in outf.iterdir() if path.is_file()}
    assert after == before
    assert count(outf) == {"samples": 10, "real": 6, "reconstructions": 6}
    real = np.stack([picture(path) for path in sorted((outf / "eval" / "real").iterdir())])
    assert np.abs(real - held_out_images(toy_faces)).max() < 1e-6
    reconstructions = np.stack([picture(path) for path in sorted((outf / "eval" / "reconstructions").iterdir())])
    metrics = json.loads((outf / "metrics.json").read_text())
    assert np.square(reconstructions - real).mean() == pytest.approx(metrics["test_mse"], rel=0.02)  # rounded to 8 bits
    assert metrics["epoch"] == 1
    assert f"test_mse  {metrics['test_mse']:.5g}" in program.out

    again = run(tmp_path, checkpoint, "--evaluate", "--n_samples=3", "--sampler=gaussian", "--n_test=20")
    done(again)
    assert count(outf) == {"samples": 3, "real": 20, "reconstructions": 20}  # in place of the others
    metrics = json.loads((outf / "metrics.json").read_text())
    assert set(metrics) == FIGURES | {"epoch", "n_test", "n_samples", "sampler"}
    assert (metrics["n_test"], metrics["n_samples"], metrics["sampler"]) == (20, 3, "gaussian")
    assert all(0 < metrics[name] < 1 for name in FIGURES if name.startswith("sharpness"))
    assert [path for path in outf.rglob(".*")] == []


def test_an_evaluation_of_all_images_leaves_none_to_fit_a_gaussian_to(trained, tmp_path):
    flags = [f"--checkpoint={trained['mmd'] / 'checkpoint.pth.tar'}", "--evaluate", f"--outf={tmp_path / 'x'}"]
    done(run(tmp_path, *flags, "--n_test=30", "--n_samples=9", "--batch_size=7"))
    assert count(tmp_path / "x") == {"samples": 9, "real": 30, "reconstructions": 30}
    metrics = json.loads((tmp_path / "x" / "metrics.json").read_text())
    assert set(metrics) == {name for name in FIGURES if "gaussian" not in name} | {
        *("epoch", "n_test", "n_samples", "sampler")
    }
    refused = run(tmp_path, *flags, "--n_test=30", "--n_samples=9", "--sampler=gaussian")
    assert refused.wait() == 2
    assert refused.messages == [
        "main.py: error: --sampler=gaussian fits the codes of training images: --n_test=30 leaves none"
    ]


def test_samplers_draw_from_the_prior_and_from_the_fitted_gaussian(trained, tmp_path):
    """The decoder of an untrained network shows where its codes come from: a wide prior gives other images."""
    flags = [f"--checkpoint={trained['mmd'] / 'checkpoint.pth.tar'}", "--evaluate", "--n_samples=8"]
    samples = {}
    for sampler in ("prior", "gaussian"):
        done(run(tmp_path, *flags, f"--sampler={sampler}", f"--outf={tmp_path / sampler}"))
        folder = tmp_path / sampler / "eval" / "samples"
        samples[sampler] = np.stack([picture(path) for path in sorted(folder.iterdir())])
    assert samples["prior"].shape == samples["gaussian"].shape == (8, 32, 32, 3)
    assert np.abs(samples["prior"] - samples["gaussian"]).max() > 5 / 255
    sharpness = utils.sharpness(torch.tensor(samples["gaussian"]).permute(0, 3, 1, 2).float()).mean().item()
    metrics = json.loads((tmp_path / "gaussian" / "metrics.json").read_text())
    assert sharpness == pytest.approx(metrics["sharpness_samples_gaussian"], rel=0.1)  # rounded to 8 bits


# ----------------------------------------------------------------------------------------------------------------------
# Options of the machine


def test_tensorboard_has_the_numbers_of_the_log_and_the_pictures(toy_faces, tmp_path):
    """A continued run, too."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    outf = train(tmp_path, toy_faces, "--mode=mmd", "--tensorboard")
    done(run(tmp_path, f"--checkpoint={outf / 'checkpoint.pth.tar'}", "--niter=2", "--n_samples=10", "--tensorboard"))
    events = accumulator.EventAccumulator(str(outf))
    events.Reload()
    for name in ("reconstruction", "penalty", "lr", "test_mse", "test_mmd"):
        logged = [(int(row["step"]), float(row[name])) for row in rows(outf) if row[name]]
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in shown] == [step for step, _ in logged]
        assert [value for _, value in shown] == pytest.approx([value for _, value in logged], rel=1e-4)
    assert [event.step for event in events.Images("fake_samples")] == [3, 6]


def test_tensorboard_that_is_not_installed(monkeypatch, toy_faces, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(utils.UsageError, match="--tensorboard: TensorBoard is not installed"):
        main.run([f"--dataroot={toy_faces}", "--tensorboard", f"--outf={tmp_path / 'x'}"])
    assert not (tmp_path / "x").exists()


def test_compiled_networks_compute_the_same(monkeypatch, toy_faces, tmp_path):
    """Captured and differentiated ahead of time; the default back end would take minutes to compile the result."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    flags = ("--mode=mmd", "--noise=deterministic")
    plain, compiled = train(tmp_path, toy_faces, *flags, name="plain"), tmp_path / "compiled"
    argv = [f"--dataroot={toy_faces}", *TINY, *flags, "--niter=1", "--seed=1", "--compile", f"--outf={compiled}"]
    assert main.run(argv) == 0
    for one, other in zip(rows(plain), rows(compiled), strict=True):
        for name in ("reconstruction", "penalty", "test_mse"):
            assert one[name] == other[name] or float(one[name]) == pytest.approx(float(other[name]), rel=0.001)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3  # encoder, decoder and penalty were compiled
    assert list(load(compiled)["encoder"]) == list(load(plain)["encoder"])  # no trace of it in the names


@pytest.mark.parametrize(
    "flags",
    [
        ("--mode=gan", "--noise=add_noise", "--nowozin_trick"),
        ("--mode=gan", "--arch=paper", "--cost=l1", "--input_normalize_sym"),
        ("--mode=mmd", "--kernel=IMQ", "--cost=l2"),
        ("--mode=mmd", "--kernel=RBF"),
        ("--mode=mmd", "--kernel=RBF", "--batch_size=1100"),  # in blocks
    ],
)
def test_a_step_waits_for_nothing_that_its_device_computes(flags, tmp_path):
    """On tensors of a device and a shape, but no values: reading one, or mixing it with the CPU's, would fail."""
    argv = [f"--dataroot={tmp_path}", *TINY, "--seed=1", *flags, f"--outf={tmp_path}"]
    wae = main.WAE(main.parse_flags(argv)[0], utils.World(0, 1, 0, torch.device("meta")))
    for optimizer in filter(None, (wae.optimizer, wae.optimizer_d)):
        optimizer.param_groups[0] |= {"fused": False, "foreach": False}  # fused is for devices that compute
    wae.prepare_training()
    n = wae.flags.batch_size
    x = wae.to_input(torch.empty(n, 32, 32, 3, dtype=torch.uint8, device="meta"))
    losses = wae.train_step(x, wae.sample_prior(n))
    assert losses.shape == (3,) and losses.device.type == "meta"


def test_bfloat16_is_close_to_float32(trained, toy_faces, tmp_path):
    outf = train(tmp_path, toy_faces, "--mode=gan", "--amp")
    plain, amp = rows(trained["gan"])[0], rows(outf)[0]
    assert plain["reconstruction"] != amp["reconstruction"]
    assert float(amp["reconstruction"]) == pytest.approx(float(plain["reconstruction"]), rel=0.02)


# ----------------------------------------------------------------------------------------------------------------------
# Help

DEFAULTS = {
    **{"dataset": "celebA", "dataroot": "required", "batch_size": "100", "image_size": "64", "nz": "64", "nf": "128"},
    **{"arch": "dcgan", "mode": "gan", "kernel": "IMQ", "noise": "add_noise for gan, gaussian for mmd"},
    **{"LAMBDA": "10 for gan, 100 for mmd", "pz_scale": "1.0", "cost": "l2sq", "niter": "55", "lr": "0.0003"},
    **{"lr_adv": "3 x lr", "beta1": "0.5", "lr_schedule": "paper", "e_pretrain": "", "e_pretrain_sample_size": "256"},
    **{"e_pretrain_iters": "200", "input_normalize_sym": "", "nowozin_trick": "", "cuda": "", "gpu_id": "from 0"},
    **{"ngpu": "1", "seed": "drawn, printed and stored", "checkpoint": "", "outf": "outputs", "print_every": "10"},
    **{"sample_every": "1", "n_test": "a tenth, at most 19962", "n_samples": "10000", "workers": "one a core"},
    **{"cache_dir": "in DATAROOT", "amp": "", "compile": "", "evaluate": "", "sampler": "prior", "tensorboard": ""},
}


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        main.run(["-h"])
    assert end.value.code == 0
    text = capsys.readouterr().out.split("options:")[1]
    entries = {
        match[1]: " ".join(match[2].split())
        for match in re.finditer(r"^  --(\w+)(.*?)(?=^  --|^\w|\Z)", text, re.MULTILINE | re.DOTALL)
    }
    assert set(entries) == set(DEFAULTS)
    for flag, default in DEFAULTS.items():
        usual = f"default: {default}"
        assert usual in entries[flag] or default in entries[flag], flag
        assert len(entries[flag]) > 10, flag
