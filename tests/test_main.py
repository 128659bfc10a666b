"""main.py from end to end on toy faces: what a run leaves, and what an evaluation writes."""

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
from program import REPO, TINY, rows, run, steps

import main
import model
import utils

DENSITIES = ("samples_prior", "samples_gaussian", "samples_mixture")
SETS = {"real", "reconstructions", *DENSITIES}
FIGURES = {"test_mse", "test_mmd", "test_w2", "test_w2_of_prior_draws"}
FIGURES |= {"eigenvalue_min", "eigenvalue_max", *(f"sharpness_{name}" for name in SETS)}
COUNTS = {"step", "n_test", "n_samples"}


def train(tmp_path: Path, data: Path, *flags: str, name: str = "run") -> Path:
    """Trains for one epoch of three steps, or as the flags say. Returns the folder of the run."""
    common = [f"--dataroot={data}", *TINY, "--niter=1", "--seed=1"]
    run(tmp_path, *common, *flags, f"--outf={tmp_path / name}").succeeds()
    return tmp_path / name


def column(outf: Path, name: str) -> list[float]:
    """The numbers in a column of the log."""
    return [float(row[name]) for row in rows(outf) if row[name]]


def figures(outf: Path) -> dict[str, float]:
    """The metrics of a run."""
    return json.loads((outf / "metrics.json").read_text())


def load(outf: Path, name: str = "checkpoint.pth.tar") -> dict:
    """A checkpoint of a run."""
    return torch.load(outf / name, weights_only=True)


def picture(path: Path) -> np.ndarray:
    """The pixels of a PNG in [0, 1], (height, width, 3)."""
    return np.asarray(Image.open(path).convert("RGB")) / 255


def cells(path: Path, side: int, columns: int) -> np.ndarray:
    """The images of a grid, (n, side, side, 3), without the two pixels between them."""
    grid, cell = picture(path), side + 2
    places = itertools.product(range(2, len(grid), cell), range(2, cell * columns, cell))
    return np.stack([grid[y : y + side, x : x + side] for y, x in places])


def written(outf: Path, name: str) -> np.ndarray:
    """The images of a folder of an evaluation, (n, side, side, 3)."""
    return np.stack([picture(path) for path in sorted((outf / "eval" / name).iterdir())])


def held_out_images(data: Path, crop: int = 140) -> np.ndarray:
    """The last six images by path, decoded anew: their central square, (6, 32, 32, 3)."""
    images = [Image.open(path) for path in sorted(data.glob("*/*.jpg"))[-6:]]
    assert {image.size for image in images} == {(178, 218)}  # as CelebA's
    box = ((178 - crop) // 2, (218 - crop) // 2, (178 + crop) // 2, (218 + crop) // 2)
    resized = [i.crop(box).resize((32, 32), Image.Resampling.LANCZOS) for i in images]
    return np.stack([np.asarray(image) for image in resized]) / 255


def test_the_command_line_of_the_predecessor(toy_faces, tmp_path):
    """As people have it in their scripts, in a process of its own, at the default 64 pixels."""
    command = f"""{sys.executable} {REPO / "main.py"} --dataroot={toy_faces} --dataset='celebA' \
        --noise='add_noise' --outf=x/ --mode='gan' --lr=0.0003 --pz_scale=1 --LAMBDA=10 \
        --niter=1 --e_pretrain --nf=2 --batch_size=8 --n_samples=10 --e_pretrain_iters=3 \
        --e_pretrain_sample_size=20 --print_every=1"""
    ended = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    assert "pretraining" in ended.stderr and "Warning" not in ended.stderr

    sizes = {
        "real_samples.png": (8 * 66 + 2, 4 * 66 + 2),  # all 27 training images
        "fake_samples_epoch_001.png": (8 * 66 + 2, 8 * 66 + 2),
        "reconstructions_epoch_001.png": (8 * 66 + 2, 8 * 66 + 2),
        "interpolations_epoch_001.png": (10 * 66 + 2, 8 * 66 + 2),
        "codes.png": (600, 600),
    }
    others = {"args.json", "log.csv", "metrics.json", "checkpoint.pth.tar", "model_best.pth.tar"}
    outf = tmp_path / "x"
    assert {path.name for path in outf.iterdir()} == {*sizes, *others, ".lock"}
    assert {name: Image.open(outf / name).size for name in sizes} == sizes
    flags = json.loads((outf / "args.json").read_text())
    given = {"dataroot": str(toy_faces), "noise": "add_noise", "LAMBDA": 10.0, "e_pretrain": True}
    assert flags.items() >= (given | {"lr_adv": 3 * 0.0003, "niter": 1, "seed": 0}).items()
    assert set(figures(outf)) == FIGURES | COUNTS
    assert (figures(outf)["step"], figures(outf)["n_test"]) == (3, 3)


def test_the_log_has_a_row_for_each_print_and_each_epoch(toy_faces, tmp_path):
    """At a rate that is high enough for the held-out error to go up and down."""
    flags = ("--mode=mmd", "--noise=gaussian", "--print_every=2", "--sample_every=4")
    outf = train(tmp_path, toy_faces, "--niter=6", "--lr=0.1", "--seed=3", *flags)
    log, tests = rows(outf), main.METRICS
    training = ["reconstruction", "penalty", "discriminator", "lr", "images_per_s"]
    assert list(log[0]) == ["epoch", "step", *training, *tests]
    assert steps(outf) == list(range(2, 19, 2))
    ends = [(row["epoch"], row["step"]) for row in log if row["test_mse"]]
    assert ends == [(str(epoch), str(3 * epoch)) for epoch in range(1, 7)]
    for row in log:
        full = {name for name in (*training, *tests) if row[name]}
        assert full == set(tests if row["test_mse"] else training) - {"discriminator"}
    pictures = {path.name for path in outf.glob("fake_samples_*")}
    assert pictures == {f"fake_samples_epoch_00{epoch}.png" for epoch in (4, 6)}  # and the last

    errors, best = column(outf, "test_mse"), load(outf, "model_best.pth.tar")
    assert errors.index(min(errors)) < 5  # otherwise best and last are one
    assert best["step"] == 3 * (errors.index(min(errors)) + 1)
    assert f"{best['best']:.6g}" == f"{min(errors):.6g}"
    assert load(outf)["step"] == 18


def test_scaled_rates_fall_within_a_short_run_and_stretch_with_a_longer_one(toy_faces, tmp_path):
    flags = ("--lr=0.002", "--lr_schedule=scaled")
    outf = train(tmp_path, toy_faces, "--niter=3", *flags)
    assert column(outf, "lr") == [0.002] * 6 + [0.001] * 3
    command = [f"--checkpoint={outf / 'checkpoint.pth.tar'}", "--niter=6", "--n_samples=10"]
    program = run(tmp_path, *command).succeeds()
    assert column(outf, "lr")[9:] == [0.002] * 3 + [0.001] * 6
    assert "main.py: --lr_schedule=scaled is stretched to --niter=6" in program.messages


COMBINATIONS = [
    ("--mode=gan", "--noise=gaussian", "--arch=paper", "--nowozin_trick", "--nz=1"),
    ("--mode=gan", "--noise=deterministic", "--input_normalize_sym", "--LAMBDA=0", "--amp"),
    ("--mode=mmd", "--kernel=RBF", "--dataset=folder", "--image_size=64", "--beta1=0"),
    ("--mode=vae", "--pz_scale=2", "--crop=100", "--cost=l1", "--lr_schedule=constant"),
]


@pytest.mark.parametrize("flags", COMBINATIONS, ids=" ".join)
def test_modes_kernels_noises_and_networks(flags, toy_faces, tmp_path):
    """Each shows in the checkpoint's networks, trains, and reaches pictures and metrics."""
    outf = train(tmp_path, toy_faces, *flags)
    stored, state = json.loads((outf / "args.json").read_text()), load(outf)
    networks = {"net"} | ({"discriminator"} if stored["mode"] == "gan" else set())
    assert {name for name in state if f"optimizer_{name}" in state} == networks
    gaussian = stored["noise"] == "gaussian"
    outputs = stored["nz"] * (2 if gaussian else 1)
    assert state["net"]["encoder.moments.bias"].shape == (outputs,)
    kernels = {weight.shape[-1] for weight in state["net"].values() if weight.ndim == 4}
    assert kernels == ({5} if stored["arch"] == "paper" else {4})
    assert all(w.dtype == torch.float32 for w in state["net"].values() if w.is_floating_point())

    assert len(column(outf, "reconstruction")) == len(column(outf, "penalty")) == 3
    metrics = figures(outf)
    assert set(metrics) == FIGURES | COUNTS | ({"noise_variance"} if gaussian else set())
    assert all(np.isfinite(value) for value in metrics.values())
    assert 0 < metrics["test_mse"] < 0.5
    fake = cells(outf / "fake_samples_epoch_001.png", stored["image_size"], 8)
    assert fake.shape == (64, stored["image_size"], stored["image_size"], 3)
    assert 0.05 < fake.mean() < 0.95  # near the middle of the range, in both normalisations


def test_samples_of_all_epochs_come_from_the_same_codes(toy_faces, tmp_path):
    """With a rate that leaves the networks what they are, the pictures of two epochs are one."""
    outf = train(tmp_path, toy_faces, "--niter=2", "--lr=1e-12")
    for name, columns in (("fake_samples", 8), ("interpolations", 10), ("reconstructions", 8)):
        first, second = (cells(outf / f"{name}_epoch_00{i}.png", 32, columns) for i in (1, 2))
        assert np.abs(first - second).max() <= 1.01 / 255
    fake = cells(outf / "fake_samples_epoch_001.png", 32, 8)
    assert np.abs(fake[1:] - fake[:-1]).max() > 10 / 255  # while other codes give other images


def test_pictures_show_held_out_images_above_their_reconstructions_and_paths(toy_faces, tmp_path):
    outf = train(tmp_path, toy_faces, "--mode=mmd", "--noise=deterministic")
    real = held_out_images(toy_faces)
    grid = cells(outf / "reconstructions_epoch_001.png", 32, 8).reshape(4, 2, 8, 32, 32, 3)
    above, below = (grid[:, i].reshape(32, 32, 32, 3) for i in (0, 1))
    shown = np.linspace(0, 5, 32).astype(int)
    assert np.abs(above - real[shown]).max() < 1.01 / 255
    paths = cells(outf / "interpolations_epoch_001.png", 32, 10).reshape(8, 10, 32, 32, 3)
    assert np.abs(paths[:, 0] - below[:8]).max() < 1.01 / 255  # from the first reconstructions
    assert np.abs(paths[:, -1] - below[-8:]).max() < 1.01 / 255  # to the last
    real_samples = cells(outf / "real_samples.png", 32, 8)
    assert len(real_samples) == 24
    distance = np.abs(real_samples[:, None] - real[None]).max((2, 3, 4))
    assert distance.min() > 2 / 255  # no held-out image among the training images


def test_figures_in_the_log_are_those_of_the_checkpoint(toy_faces, tmp_path):
    """Computed here in another way, from the image files, and in both normalisations."""
    flags = ("--mode=mmd", "--noise=gaussian", "--niter=2", "--input_normalize_sym")
    outf = train(tmp_path, toy_faces, *flags, "--pz_scale=1.5", "--crop=100")
    net = model.AutoEncoder(32, 4, 2, "dcgan", "gaussian", symmetric=True).eval()
    net.load_state_dict(load(outf)["net"])
    real = held_out_images(toy_faces, crop=100)
    x = torch.tensor(real, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        mean, log_variance = net.encoder(2 * x - 1)
    row, log_variance = rows(outf)[-1], log_variance.double()
    assert float(row["noise_variance"]) == pytest.approx(log_variance.exp().mean().item(), rel=1e-4)

    run(tmp_path, f"--outf={outf}", "--evaluate", "--n_samples=2").succeeds()
    assert np.abs(written(outf, "real") - real).max() < 1e-6
    codes = np.load(outf / "eval" / "codes.npy")
    assert codes.dtype == np.float32 and codes.shape == (6, 4)
    deviation = np.abs(codes - mean.numpy()) / log_variance.div(2).exp().numpy()
    assert 0.1 < deviation.mean() < 2  # a draw of the Gaussian
    with torch.no_grad():
        decoded = (net.decoder(torch.from_numpy(codes)) + 1) / 2
    metrics = figures(outf)
    assert metrics["test_mse"] == pytest.approx((decoded - x).square().mean().item(), rel=1e-4)
    values = np.linalg.eigvalsh(np.cov(codes.T.astype(float)))
    extremes = (metrics["eigenvalue_min"], metrics["eigenvalue_max"])
    assert extremes == pytest.approx((values[0], values[-1]), rel=0.2)
    sharpness = utils.sharpness(decoded).mean().item()
    assert metrics["sharpness_reconstructions"] == pytest.approx(sharpness, rel=1e-3)


def count(outf: Path) -> dict[str, int]:
    """How many images each folder of an evaluation has."""
    folders = [path for path in (outf / "eval").iterdir() if path.is_dir()]
    return {folder.name: len(list(folder.glob("?????.png"))) for folder in folders}


def test_an_evaluation_needs_the_folder_alone(trained, tmp_path):
    """It repeats the figures that training ended with, and changes nothing but what it writes."""
    outf = Path(shutil.copytree(trained["gan"], tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in outf.iterdir() if path.name != ".lock"}
    program = run(tmp_path, f"--outf={outf}", "--evaluate", "--n_samples=10").succeeds()
    after = {path.name: path.read_bytes() for path in outf.iterdir() if path.name in before}
    assert after == before
    assert count(outf) == dict.fromkeys(SETS, 6) | dict.fromkeys(DENSITIES, 10)
    metrics = figures(outf)
    error = np.square(written(outf, "reconstructions") - written(outf, "real")).mean()
    assert error == pytest.approx(metrics["test_mse"], rel=0.02)  # rounded to 8 bits
    assert f"test_mse  {metrics['test_mse']:.5g}" in program.out

    run(tmp_path, f"--outf={outf}", "--evaluate", "--n_samples=3", "--n_test=6").succeeds()
    assert count(outf) == dict.fromkeys(SETS, 6) | dict.fromkeys(DENSITIES, 3)  # in their place
    assert {path.name for path in outf.rglob(".*")} == {".lock"}


def test_samples_are_drawn_from_each_density(trained, tmp_path):
    """Each has its own, and those of a narrow density are nearer to each other than the prior's."""
    command = [f"--checkpoint={trained['mmd'] / 'checkpoint.pth.tar'}", "--evaluate"]
    run(tmp_path, *command, "--n_samples=40", f"--outf={tmp_path / 'x'}", "--pz_scale=9").succeeds()
    samples = {name: written(tmp_path / "x", name) for name in DENSITIES}
    assert {images.shape for images in samples.values()} == {(40, 32, 32, 3)}
    spread = {name: images.std(0).mean() for name, images in samples.items()}
    assert spread["samples_prior"] > 2 * spread["samples_gaussian"] > spread["samples_mixture"]
    assert np.abs(samples["samples_gaussian"] - samples["samples_mixture"]).max() > 1.5 / 255


@pytest.mark.parametrize("n_train", [0, 1])
def test_an_evaluation_of_almost_all_images(n_train, trained, tmp_path):
    command = [f"--checkpoint={trained['mmd'] / 'checkpoint.pth.tar'}", "--evaluate"]
    flags = [f"--n_test={30 - n_train}", "--n_samples=9", f"--outf={tmp_path / 'x'}"]
    program = run(tmp_path, *command, *flags).succeeds()
    densities = DENSITIES if n_train else ("samples_prior",)  # there is nothing to fit one to
    expected = {"real": 30 - n_train, "reconstructions": 30 - n_train}
    assert count(tmp_path / "x") == expected | dict.fromkeys(densities, 9)
    assert all(np.isfinite(value) for value in figures(tmp_path / "x").values())
    n = 24 - n_train
    assert program.messages == [
        f"main.py: --n_test={30 - n_train}: {n} of the held-out images were trained on"
    ]


class Features(torch.nn.Module):
    """Stands in for the network of pytorch-fid, whose weights must be downloaded."""

    BLOCK_INDEX_BY_DIM = {2048: 3}

    def __init__(self, blocks: list[int]):
        super().__init__()
        torch.manual_seed(sum(blocks))
        self.convolution = torch.nn.Conv2d(3, 2048, 8, stride=8)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.convolution(x).relu().mean((2, 3), keepdim=True)]


def simple_distance(mean_1, covariance_1, mean_2, covariance_2):
    """Stands in for the distance of pytorch-fid, which takes minutes."""
    return np.square(mean_1 - mean_2).sum() + np.trace(covariance_1) + np.trace(covariance_2)


def test_frechet_distances_are_of_the_images_as_they_are_written(trained, monkeypatch, tmp_path):
    score = pytest.importorskip("pytorch_fid.fid_score")
    monkeypatch.setattr(sys.modules["pytorch_fid.inception"], "InceptionV3", Features)
    monkeypatch.setattr(score, "calculate_frechet_distance", simple_distance)
    command = [f"--checkpoint={trained['gan'] / 'checkpoint.pth.tar'}", "--evaluate", "--fid"]
    outf = tmp_path / "x"
    assert main.execute([*command, "--n_samples=3", "--n_test=2", f"--outf={outf}"]) == 0
    metrics, moments = figures(outf), {}
    for name in SETS:
        files = sorted((outf / "eval" / name).iterdir())
        statistics = score.calculate_activation_statistics
        moments[name] = statistics(files, Features([3]), device="cpu", num_workers=0)
    for name in SETS - {"real"}:
        expected = simple_distance(*moments["real"], *moments[name])
        assert metrics[f"fid_{name}"] == pytest.approx(expected, rel=1e-4)


def test_weights_of_inception_that_cannot_be_downloaded(trained, tmp_path):
    pytest.importorskip("pytorch_fid")
    command = [f"--checkpoint={trained['gan'] / 'checkpoint.pth.tar'}", "--evaluate", "--fid"]
    env = {"https_proxy": "http://127.0.0.1:9", "TORCH_HOME": str(tmp_path / "none")}
    program = run(tmp_path, *command, f"--outf={tmp_path / 'x'}", env=env)
    assert program.wait() == 1 and "Traceback" not in program.err
    message = "main.py: error: --fid: no weights of the Inception network: "
    assert program.messages[-1].startswith(message)


def test_what_the_readme_says_of_python_works(trained, toy_faces, tmp_path):
    """The block under the heading is run where a reader would run it."""
    text = (REPO / "README.md").read_text()
    block = re.search(r"^### From Python\n.*?^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    shutil.copytree(trained["gan"], tmp_path / "gan_outputs")
    shutil.copytree(toy_faces, tmp_path / "data" / "celebA")
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", block[1]]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_tensorboard_has_the_log_and_the_pictures_of_a_continued_run(toy_faces, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    outf = train(tmp_path, toy_faces, "--mode=mmd", "--tensorboard")
    run(tmp_path, f"--checkpoint={outf / 'checkpoint.pth.tar'}", "--niter=2").succeeds()
    events = accumulator.EventAccumulator(str(outf))
    events.Reload()
    for name in ("penalty", "test_w2"):
        logged = [(int(row["step"]), float(row[name])) for row in rows(outf) if row[name]]
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        np.testing.assert_allclose(shown, logged, rtol=1e-4)
    assert [event.step for event in events.Images("fake_samples")] == [3, 6]


@pytest.mark.parametrize(
    ("flag", "words"),
    [("--tensorboard", "TensorBoard is not installed"), ("--fid", "pytorch-fid is not installed")],
)
def test_packages_that_are_not_installed(flag, words, monkeypatch, trained, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = [f"--checkpoint={trained['gan'] / 'checkpoint.pth.tar'}", "--evaluate"]
    with pytest.raises(utils.UsageError, match=f"{flag}:? {words}"):
        main.execute([*command, flag, "--n_samples=4", f"--outf={tmp_path / 'x'}"])


def test_compiled_networks_compute_the_same(monkeypatch, toy_faces, tmp_path):
    """Captured and differentiated ahead of time; the default back end would take minutes.

    The penalty in blocks differentiates within, which is what could go wrong.
    """
    monkeypatch.setattr(model, "BLOCK_ENTRIES", 4 * 8)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    flags = ("--mode=mmd", "--noise=deterministic")
    plain = train(tmp_path, toy_faces, *flags, name="plain")
    argv = [f"--dataroot={toy_faces}", *TINY, *flags, "--niter=1", "--seed=1", "--compile"]
    compiled = tmp_path / "compiled"
    assert main.execute([*argv, f"--outf={compiled}"]) == 0
    for name in ("reconstruction", "penalty", "test_mse"):
        assert column(plain, name) == pytest.approx(column(compiled, name), rel=0.001)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # networks and penalty
    assert list(load(compiled)["net"]) == list(load(plain)["net"])  # no trace of it in the names


@pytest.mark.parametrize(
    "flags",
    [
        ("--mode=gan", "--noise=add_noise", "--nowozin_trick"),
        ("--mode=gan", "--arch=paper", "--cost=l1", "--input_normalize_sym"),
        ("--mode=mmd", "--cost=l2"),
        ("--mode=mmd", "--kernel=RBF"),
        ("--mode=mmd", "--kernel=RBF", "--batch_size=1100"),  # in blocks
        ("--mode=vae",),
    ],
)
def test_a_step_waits_for_nothing_that_its_device_computes(flags, tmp_path):
    """On tensors of a device without values: reading one, or mixing it with the CPU's, fails."""
    argv = [f"--dataroot={tmp_path / 'data'}", *TINY, *flags, f"--outf={tmp_path}"]
    wae = main.Run(main.get_flags(argv)[0], utils.World(0, 1, torch.device("meta")))
    for optimizer in wae.optimizers.values():
        optimizer.param_groups[0] |= {"fused": False, "foreach": False}  # fused ones compute
    wae.wrap()
    n = wae.flags.batch_size
    x = wae.to_input(torch.empty(n, 32, 32, 3, dtype=torch.uint8, device="meta"))
    losses = main.train_step(wae, x, wae.sample_prior(n))
    assert losses.shape == (3,) and losses.device.type == "meta"


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        main.execute(["-h"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    entries = dict(re.findall(r"^  --(\w+)(.*?)(?=^  --|^\w|\Z)", text, re.DOTALL | re.MULTILINE))
    flags = vars(main.get_parser().parse_args([]))
    assert set(entries) == set(flags)
    for name, value in flags.items():
        entry = " ".join(entries[name].split())
        assert len(entry) > 10, name
        if isinstance(value, bool):
            assert value is False and f"--no-{name}" in entry
        elif value is not None and name not in ("gpu_id",):
            shown = ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)
            assert f"(default: {shown}" in entry, name
