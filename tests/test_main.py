"""main.py from end to end on toy faces: flags, what a run leaves, and what an evaluation writes."""

import argparse
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
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
    """Evaluates a run. Returns the folder with the results."""
    checkpoint = f"--checkpoint={run_folder / CHECKPOINT}"
    assert main.execute([checkpoint, "--evaluate", f"--outf={outf}", *flags]) == 0
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
    """The files in a folder by name, but for the lock and without those in folders inside it."""
    paths = [path for path in folder.iterdir() if path.is_file() and path.name != ".lock"]
    return {path.name: path.read_bytes() for path in paths}


def pixels(*paths: Path) -> np.ndarray:
    """The pixels of PNG files in [0, 1], (n, height, width, 3)."""
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths]) / 255


def cells(path: Path, columns: int) -> np.ndarray:
    """The images of a grid, (n, 32, 32, 3), without the two pixels between them."""
    grid = pixels(path)[0]
    places = itertools.product(range(2, len(grid), 34), range(2, 34 * columns, 34))
    return np.stack([grid[y : y + 32, x : x + 32] for y, x in places])


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
    for name, recipe in itertools.product(("LAMBDA", "lr"), main.RECIPES.values()):
        assert re.search(rf"\(default: .* {recipe[name]:g}\b", entries[name])


# Flags of torchrun, of download_datasets.py, of WAE-PyTorch, and of the tools that run.sh calls.
OTHERS = "nnodes nproc_per_node rdzv_backend rdzv_endpoint rdzv_id zip img_norm"
OTHERS += " check disable-pip-version-check quiet version"


@pytest.mark.parametrize("page", ["README.md", "figs/README.md", "run.sh"])
def test_get_parser_documentation(page):
    """Every flag in it is one of main.py, and has a value that is understood."""
    parser, text = main.get_parser(), (REPO / page).read_text()
    known = vars(parser.parse_args([]))
    for name, value in re.findall(r"""--([A-Za-z][\w-]*)(?:=["']?([^\s`|)"']+))?""", text):
        if name not in OTHERS.split():
            assert name.removeprefix("no-") in known
            if value not in ("", "N", "$mode"):
                parser.parse_args([f"--{name}={value.rstrip('.,')}"])


def test_parse_recipes():
    """A mode brings its settings, and what is typed comes first."""
    flags = get_flags("--dataroot=d", "--outf=none", "--mode=mmd", "--lr=1")
    assert (flags.LAMBDA, flags.lr, flags.lr_adv, flags.e_pretrain) == (30, 1, 3, True)
    flags = get_flags("--dataroot=d", "--outf=none", "--mode=vae")
    assert (flags.LAMBDA, flags.lr, flags.e_pretrain) == (0.2, 0.001, False)


REFUSED = {
    "": "--dataroot is required",
    "--dataroot=d --ngpu=3": "--batch_size=100 cannot be shared by 3 processes",
    "--dataroot=d --testroot=t --outf=e/../t/x": "x and --testroot=t: one is inside the other",
    "--dataroot=e/eval/real --outf=e": "--outf=e and --dataroot=e/eval/real: one is inside",
    "--dataroot=d --outf=/dev/null/x": "cannot write /dev/null/x/.lock: Not a directory",
    "--dataroot=d --mode=mmd --nowozin_trick": "--nowozin_trick is for --mode=gan",
    "--dataroot=d --mode=vae --noise=add_noise": "--mode=vae needs --noise=gaussian$",
    "--dataroot=d --batch=4": "unrecognized arguments: --batch=4",
    "--dataroot=d --lr=nan": "argument --lr: nan is not between 1e-12 and 1e",
    "--dataroot=d --imq_scales=1,0": "argument --imq_scales: 0 is not between",
    "--dataroot=d --cuda": "--cuda: PyTorch finds no CUDA GPU",
    "--dataroot=d --tensorboard": "--tensorboard: it is not installed; pip install tensorboard",
    "--outf=none --evaluate": "none/checkpoint.pth.tar: no such file",
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


DEFINE_A_RUN = "image_size channels mode arch nz nf noise input_normalize_sym LAMBDA pz_scale cost"
DEFINE_A_RUN += " mmd kernel imq_scales quadratic nowozin_trick lr lr_adv lr_schedule e_pretrain"
DEFINE_TRAINING = "dataset crop n_test batch_size seed"


@pytest.mark.parametrize("use", ["--niter=9", "--evaluate", "--generate=4"])
def test_get_flags_of_a_checkpoint(use, trained):
    """It brings its flags, and none of those that define the run may differ."""
    command, stored = [f"--outf={trained['mmd']}", use], load(trained["mmd"])["flags"]
    flags = vars(get_flags(*command))
    assert {name: flags[name] for name in DEFINE_A_RUN.split()}.items() <= stored.items()
    get_flags(*command, *TINY, "--lr=0.00100", "--LAMBDA=30", "--print_every=7", "--amp")

    choices = {action.dest: action.choices or () for action in main.get_parser()._actions}
    for name in f"{DEFINE_A_RUN} {DEFINE_TRAINING}".split():
        new = next((choice for choice in choices[name] if choice != stored[name]), 7)
        switch = f"--no-{name}" if stored[name] else f"--{name}"
        flag = switch if isinstance(stored[name], bool) else f"--{name}={new}"
        free = name in DEFINE_TRAINING.split() and use != "--niter=9"
        words = rf"--{name}=.* \(checkpoint: "
        with nullcontext() if free else pytest.raises(utils.UsageError, match=words):
            get_flags(*command, flag)


def test_get_flags_not_kept(trained, monkeypatch, tmp_path):
    """Flags of a machine or a command; and those that say what an evaluation is for."""
    state = load(trained["mmd"])
    state["flags"] |= {"cuda": True, "ngpu": 4, "graph": False, "outf": "/x", "generate": 5}
    state["flags"] |= {"unknown": 1, "tensorboard": True, "testroot": "/t", "crop": 99}
    torch.save(state, tmp_path / "moved.pth")
    moved = f"--checkpoint={tmp_path / 'moved.pth'}"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no TensorBoard here
    flags = get_flags(moved, "--evaluate")
    assert (flags.cuda, flags.ngpu, flags.graph, flags.generate) == (False, 1, True, None)
    assert (flags.outf, str(flags.testroot), flags.crop) == (tmp_path, "/t", 99)
    # The images that are typed are scored, cropped as is typed. A training keeps what it has.
    flags = get_flags(moved, "--evaluate", "--dataroot=d", "--dataset=folder")
    assert (flags.testroot, flags.crop, flags.n_test) == (None, None, None)
    flags = get_flags(moved, "--no-tensorboard", "--dataroot=d")
    assert (str(flags.testroot), flags.crop, flags.n_test) == ("/t", 99, 6)
    with pytest.raises(utils.UsageError, match="--tensorboard: it is not installed"):
        get_flags(moved)
    with pytest.raises(
        utils.UsageError, match="--outf=.*gan holds a run; leave out --checkpoint if it is"
    ):
        get_flags(moved, "--no-tensorboard", f"--outf={trained['gan']}")


def test_main_command_of_the_predecessor(toy_faces, tmp_path):
    """As people have it in their scripts, in a process and a folder of its own."""
    command = f"""OMP_NUM_THREADS=1 {sys.executable} {REPO / "main.py"} --dataroot={toy_faces} \
        --dataset='celebA' --gpu_id=0 --noise='add_noise' --outf=x/ --mode='gan' --lr=0.0003 \
        --pz_scale=1 --LAMBDA=10 --niter=1 --e_pretrain --nf=1 --image_size=32 --batch_size=8"""
    ended = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "epoch 1/1: test_mse 0." in ended.stdout and "Warning" not in ended.stderr
    assert "\r" not in ended.stdout + ended.stderr  # no progress bars in a file
    sizes = {f"{name}_epoch_001.png": (274, 274) for name in ("fake_samples", "reconstructions")}
    sizes |= {"interpolations_epoch_001.png": (342, 274), "codes.png": (600, 600)}
    sizes |= {"real_samples.png": (274, 138)}  # all 27 training images
    outf = tmp_path / "x"
    assert set(contents(outf)) == {*sizes, "args.json", "log.csv", "metrics.json", CHECKPOINT}
    assert {name: Image.open(outf / name).size for name in sizes} == sizes
    flags = json.loads((outf / "args.json").read_text())
    given = {"dataroot": str(toy_faces), "noise": "add_noise", "LAMBDA": 10.0, "e_pretrain": True}
    assert flags.items() >= (given | {"lr_adv": 3 * 0.0003, "niter": 1, "seed": 0}).items()
    assert set(figures(outf)) == OF_RUN and figures(outf)["n_test"] == 3


def test_train_log(six_epochs):
    """Rows of losses and of metrics, and pictures of some epochs."""
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
    pictures = {path.name for path in six_epochs.glob("fake_samples_*")}
    assert pictures == {f"fake_samples_epoch_00{epoch}.png" for epoch in (4, 6)}  # and the last


def test_learning_rate_factor():
    """In 55 epochs the schedules are one; in others `scaled` is stretched, and `paper` is not."""
    schedules = {
        ("paper", 55, 7): [(1, 210), (0.5, 140), (0.1, 35)],
        ("scaled", 55, 7): [(1, 210), (0.5, 140), (0.1, 35)],
        ("scaled", 55, 4): [(1, 120), (0.5, 80), (0.1, 20)],
        ("paper", 103, 4): [(1, 120), (0.5, 80), (0.1, 200), (0.01, 12)],
        ("paper", 120, 7): [(1, 210), (0.5, 140), (0.1, 350), (0.01, 140)],
        ("scaled", 120, 7): [(1, 459), (0.5, 305), (0.1, 76)],  # falls after 458.2 and 763.6
        ("scaled", 11, 10): [(1, 60), (0.5, 40), (0.1, 10)],
        ("scaled", 1, 7): [(1, 4), (0.5, 3)],  # falls after 3.8 and 6.4
    }
    for (schedule, niter, per_epoch), expected in schedules.items():
        flags = argparse.Namespace(lr_schedule=schedule, niter=niter)
        places = range(niter * per_epoch)
        factors = [main.learning_rate_factor(step, per_epoch, flags) for step in places]
        assert [(k, len(list(group))) for k, group in itertools.groupby(factors)] == expected


def test_fit_mixture_codes(tiny_flags, tmp_path, monkeypatch):
    """Of many codes, the first are fitted, and as many prior samples."""
    fitted = []
    fit = main.model.fit_mixture
    monkeypatch.setattr(main, "MIXTURE_CODES", 5)
    monkeypatch.setattr(main.model, "fit_mixture", lambda z, s: fitted.append(len(z)) or fit(z, s))
    flags = [*tiny_flags, "--mode=mmd", "--niter=1", f"--outf={tmp_path / 'x'}"]
    assert main.execute(flags) == 0
    assert fitted == [5, 5]


def test_train_complete(trained, tmp_path, capfd):
    """A run at its last step says so; a larger --niter continues it, also in TensorBoard."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    outf = Path(shutil.copytree(trained["mmd"], tmp_path / "run"))
    assert main.execute([f"--outf={outf}"]) == 0
    assert f"the run in {outf} is complete; a larger --niter continues" in capfd.readouterr().out
    assert contents(outf) == contents(trained["mmd"])

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


COMBINATIONS = [
    "--mode=gan --noise=gaussian --arch=paper --nowozin_trick --nz=1",
    "--mode=gan --noise=deterministic --input_normalize_sym --LAMBDA=0 --channels=1",
    "--mode=mmd --mmd=sampled --kernel=RBF --dataset=folder --image_size=64 --amp",
    "--mode=vae --pz_scale=2 --crop=100 --cost=l1 --lr_schedule=paper",
]


@pytest.mark.parametrize("flags", COMBINATIONS)
def test_train_combinations(flags, toy_faces, tmp_path):
    """Each shows in the checkpoint's networks, trains, and reaches its metrics."""
    state = load(train(toy_faces, tmp_path / "run", *flags.split()))
    stored, net, metrics = state["flags"], state["net"], figures(tmp_path / "run")
    gaussian = stored["noise"] == "gaussian"
    assert ("discriminator" in state) == (stored["mode"] == "gan")
    assert net["encoder.posterior.bias"].shape == (stored["nz"] * (2 if gaussian else 1),)
    side = 5 if stored["arch"] == "paper" else 4
    assert net["encoder.features.0.weight"].shape == (2, stored["channels"], side, side)
    assert set(metrics) == OF_RUN | ({"noise_variance"} if gaussian else set())
    assert all(np.isfinite(value) for value in metrics.values()) and 0 < metrics["test_mse"] < 0.5


def test_sample_grids(trained, toy_faces):
    """Samples of always the same codes; held-out images above, reconstructions below; paths."""
    _, real = held_out(toy_faces)
    shown = cells(trained["mmd"] / "reconstructions_epoch_001.png", 8)
    above, below = shown.reshape(4, 2, 8, 32, 32, 3).swapaxes(0, 1)
    expected = real[np.linspace(0, 5, 32).astype(int)].reshape(above.shape)
    assert np.abs(above - expected).max() < 1.01 / 255
    paths = cells(trained["mmd"] / "interpolations_epoch_001.png", 10).reshape(8, 10, 32, 32, 3)
    assert np.abs(paths[:, 0] - below[0]).max() < 1.01 / 255  # from the first reconstructions
    assert np.abs(paths[:, -1] - below[-1]).max() < 1.01 / 255  # to the last
    net = main.load_network(trained["mmd"] / CHECKPOINT)
    utils.set_seed(1, "pictures")
    with torch.no_grad():
        fake = net.sample(64).permute(0, 2, 3, 1).numpy()
    assert np.abs(cells(trained["mmd"] / "fake_samples_epoch_001.png", 8) - fake).max() < 1 / 255
    distance = np.abs(cells(trained["mmd"] / "real_samples.png", 8)[:, None] - real).max((2, 3, 4))
    assert len(distance) == 24 and distance.min() > 2 / 255  # no held-out image among them


def test_train_compiled(monkeypatch, trained, toy_faces, tmp_path):
    """It computes the same, differentiated ahead of time; the default back end takes minutes.

    The penalty in blocks is computed again for its gradient, which is what could go wrong.
    """
    monkeypatch.setattr(model, "BLOCK_ENTRIES", 4 * 8)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    outf = train(toy_faces, tmp_path / "run", "--mode=mmd", "--compile")
    for name in ("reconstruction", "penalty", "test_mse"):
        assert column(trained["mmd"], name) == pytest.approx(column(outf, name), rel=0.01)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # networks and penalty
    assert list(load(outf)["net"]) == list(load(trained["mmd"])["net"])  # no trace of it


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
    monkeypatch.setattr(model.AutoEncoder, "autocast", lambda self: nullcontext())
    device = torch.device("meta")
    new = main.Run(get_flags("--dataroot=d", *TINY, *flags.split()), utils.World(0, 1, device))
    n = new.flags.batch_size
    batch = torch.empty(n, 32, 32, 3, dtype=torch.uint8, device=device)
    losses = main.Step(new)(batch, new.net.sample_prior(n))
    assert losses.shape == (3,) and losses.device == device


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
    words = r"^the checkpoint's net does not fit; it is of a run with .*--nz=4 --nf=2 [^\n]*$"
    with pytest.raises(utils.UserError, match=words):
        train(toy_faces, tmp_path / "other", init, "--nz=5")


NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"
Newer = getattr(torch, "AcceleratorError", RuntimeError)  # what newer versions of PyTorch raise
MESSAGES = [
    (RuntimeError(f"{NO_KERNEL}\nCompile with `TORCH_USE_CUDA_DSA`"), NO_KERNEL),
    (Newer(f"{NO_KERNEL}\nSearch for it"), NO_KERNEL),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory; try --no-graph, --no-e"),
    (OSError(28, "No space left on device", "x/log.csv"), "x/log.csv: No space left on device"),
    (torch._dynamo.exc.Unsupported("no\ncompiler"), "--compile does not work here, leave it out"),
    (utils.UserError("a\nb: no such file"), r"a\nb: no such file"),
    (RuntimeError("a bug"), ""),
]


@pytest.mark.parametrize(("error", "message"), MESSAGES)
def test_one_line(error, message):
    line = main.one_line(error)
    assert line.startswith(message) and "\n" not in line and bool(line) == bool(message)


def test_evaluate_figures(six_epochs, toy_faces, tmp_path):
    """Computed here in another way, from the image files."""
    net = main.load_network(six_epochs / CHECKPOINT)
    paths, real = held_out(toy_faces, crop=100)
    x = torch.tensor(real, dtype=torch.float32).permute(0, 3, 1, 2)
    command = [f"--checkpoint={six_epochs / CHECKPOINT}", "--evaluate", f"--outf={tmp_path / 'e'}"]
    program = run(tmp_path, *command).succeeds()
    folder = tmp_path / "e" / "eval"
    metrics = figures(folder)
    assert set(metrics) == OF_RUN | {"noise_variance", *(f"sharpness_{name}" for name in SETS)}
    assert metrics.items() >= figures(six_epochs).items()
    assert f"test_mse  {metrics['test_mse']:.5g}\n" in program.out and program.messages == []

    codes = np.load(folder / "codes.npy")
    assert codes.dtype == np.float32 and codes.shape == (6, 4)
    with torch.no_grad():
        mean, log_variance = net.encoder.posterior(net.encoder.features(2 * x - 1)).chunk(2, 1)
        decoded = (net.decoder.layers(torch.from_numpy(codes)) + 1) / 2
    deviation = np.abs(codes - mean.numpy()) / log_variance.div(2).exp().numpy()
    assert 0.1 < deviation.mean() < 2  # a draw of the Gaussian
    assert metrics["noise_variance"] == pytest.approx(log_variance.exp().mean().item(), rel=1e-4)
    assert np.abs(pixels(*sorted((folder / "real").iterdir())) - real).max() < 1e-6
    shown = pixels(*sorted((folder / "reconstructions").iterdir()))
    assert np.abs(shown - decoded.permute(0, 2, 3, 1).numpy()).max() < 1 / 255
    errors = (decoded - x).square().mean((1, 2, 3)).numpy()
    heading, *lines = (folder / "images.csv").read_text().splitlines()
    names = [str(path.relative_to(toy_faces)) for path in paths]
    assert heading == "path,squared_error" and [line.split(",")[0] for line in lines] == names
    np.testing.assert_allclose([float(line.split(",")[1]) for line in lines], errors, rtol=1e-4)
    assert metrics["test_mse"] == pytest.approx(errors.mean(), rel=1e-4)
    for name, value in model.code_metrics(torch.from_numpy(codes), 1.5).items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6)
    mixture, z = load(six_epochs)["mixture"], torch.from_numpy(codes).double()
    normal = torch.distributions.MultivariateNormal
    terms = zip(*map(mixture.get, ("weights", "means", "covariances")), strict=True)
    terms = torch.stack([weight.log() + normal(m, c).log_prob(z) for weight, m, c in terms])
    nats = terms.logsumexp(0) - torch.distributions.Normal(0, 1.5).log_prob(z).sum(1)
    assert metrics["test_nats"] == pytest.approx(nats.mean().item(), rel=1e-3)


def test_evaluate_other_folders(trained, six_epochs, toy_faces, tmp_path):
    """All images of another folder, or the held-out ones of the run's own, and fewer if asked."""
    paths, real = held_out(toy_faces)
    for name, images in (("six", paths), ("one", paths[:1])):
        (tmp_path / name / "img_align_toy").mkdir(parents=True)
        for image in images:
            shutil.copy(image, tmp_path / name / "img_align_toy")
    six, one = f"{tmp_path}/six", f"--dataroot={tmp_path}/one"
    whole = evaluate(trained["mmd"], tmp_path / "a")
    alone = evaluate(trained["mmd"], tmp_path / "b", f"--dataroot={six}")
    for name, n in zip(SETS, (6, 6, 10, 10), strict=True):
        assert contents(whole / name) == contents(alone / name) and len(contents(whole / name)) == n
    fewer = evaluate(trained["mmd"], tmp_path / "c", "--n_test=3")
    lines = (fewer / "images.csv").read_text().splitlines()[1:]
    assert [Path(line.split(",")[0]).name for line in lines] == [paths[i].name for i in (0, 2, 5)]
    # A typed --dataset replaces the crop of the run, here of 100 pixels.
    single = evaluate(six_epochs, tmp_path / "d", one, "--dataset=celebA")
    assert not set(figures(single)) & OF_CODES and figures(single)["test_mse"] > 0
    assert np.abs(pixels(single / "real" / "00000.png") - real[:1]).max() < 1e-6

    outf = train(toy_faces, tmp_path / "run", f"--testroot={six}", "--mode=mmd")
    assert load(outf)["step"] == 3 and figures(outf)["n_test"] == 6
    of_run = evaluate(outf, tmp_path / "e")
    assert contents(of_run / "real") == contents(whole / "real")
    assert figures(of_run).items() >= figures(outf).items()
    assert len(contents(evaluate(outf, tmp_path / "f", one) / "real")) == 1


def test_evaluate_into_its_folder(trained, tmp_path):
    """Images take the place of those before; other files, and those of the run, are kept."""
    outf = Path(shutil.copytree(trained["gan"], tmp_path / "run"))
    samples = outf / "eval" / "samples_prior"
    samples.mkdir(parents=True)
    others = [samples / ".DS_Store", samples / "notes.txt", samples / "mine.png"]
    for path in (*others, samples.parent / "Thumbs.db"):
        path.write_text("mine")
    for n in (10, 3):
        evaluate(outf, outf, f"--n_samples={n}")
        numbers = {f"{i:05d}.png" for i in range(n)}
        assert set(contents(samples)) == numbers | {path.name for path in others}
        assert set(contents(samples.parent / "samples_mixture")) == numbers
    assert contents(outf) == contents(trained["gan"])
    files = {"Thumbs.db", "metrics.json", "codes.npy", "codes.png", "images.csv"}
    assert set(contents(samples.parent)) == files
    assert {path.read_text() for path in others} == {"mine"}


def test_generate(trained, tmp_path):
    """The samples of an evaluation, from a lone checkpoint."""
    path, state = tmp_path / "my.pth", load(trained["mmd"])
    state["net"]["decoder.layers.0.weight"] *= 1000  # after three steps, all images are alike
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run" / CHECKPOINT)
    expected = evaluate(tmp_path / "run", tmp_path / "e")
    state["flags"]["dataroot"] = "/nowhere"
    torch.save(state, path)
    for density in ("prior", "mixture"):
        command = [f"--checkpoint={path}", "--generate=10", f"--density={density}"]
        outf = tmp_path / density
        assert main.execute([*command, f"--outf={outf}"]) == 0
        samples = contents(expected / f"samples_{density}")
        assert contents(outf / "generated") == samples and len(set(samples.values())) > 5
        last = pixels(outf / "generated" / "00009.png")[0]
        assert np.array_equal(cells(outf / "generated.png", 8)[9], last)
    torch.save(state | {"mixture": None}, path)
    run(tmp_path, *command).fails(1, "--density=mixture: it is fitted after the last epoch")


def test_load_network_in_the_readme(monkeypatch, tmp_path):
    """The block under the heading is run where its files are found."""
    text = (REPO / "README.md").read_text()
    block = re.search(r"^### From Python\n.*?^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "figs").symlink_to(REPO / "figs")
    monkeypatch.chdir(tmp_path)
    exec(block[1], {})
    assert list(tmp_path.glob("*.png"))
