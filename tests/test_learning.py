"""Short runs on the CPU: each mode learns, and has the losses that it had when this was written."""

import numpy as np
import pytest
from program import draw_faces, rows

import main
import utils


@pytest.fixture(scope="module")
def more_faces(tmp_path_factory):
    """A folder for --dataroot with 120 drawn faces."""
    return draw_faces(tmp_path_factory.mktemp("more_faces"), 120)


@pytest.mark.parametrize("mode", ["gan", "mmd", "vae"])
def test_training_learns(mode, more_faces, tmp_path):
    """In 150 steps, to reconstruct held-out faces, and to bring the codes of a WAE to the prior."""
    argv = [f"--dataroot={more_faces}", f"--mode={mode}", f"--outf={tmp_path / 'run'}", "--seed=1"]
    argv += ["--image_size=32", "--nf=8", "--nz=8", "--batch_size=16", "--n_test=24", "--niter=25"]
    argv += ["--lr=0.005", "--sample_every=99", "--no-e_pretrain"]
    assert main.execute(argv) == 0
    epochs = [row for row in rows(tmp_path / "run") if row["test_mse"]]
    errors, distances = ([float(row[k]) for row in epochs] for k in ("test_mse", "test_w2"))
    data = utils.hold_out(utils.load_images(more_faces, None, 32, utils.CELEBA_CROP, 3), 24)
    images = np.asarray(data.images) / 255
    # The best that a decoder can do that ignores its codes is the mean of the training images.
    mean = images[data.train].mean(0)
    assert errors[-1] < 0.5 * np.square(images[data.test] - mean).mean()
    assert mode == "vae" or distances[-1] < 0.6 * distances[0]


# Reconstruction cost, penalty and loss of a discriminator, if there is one, of three steps.
EARLY = "--lr_schedule=paper --lr=0.0003"  # the defaults of the revision that these are of
IMQ = "--LAMBDA=100 --quadratic=0"
LOSSES = {
    f"--mode=gan {EARLY}": [
        [39.8619, 0.656349, 1.38567],
        [30.9032, 0.654999, 1.33989],
        [29.9244, 0.698169, 1.19245],
    ],
    f"--mode=mmd {IMQ} {EARLY}": [[39.8619, 0.832215], [30.9103, 0.859154], [29.9244, 0.895794]],
    f"--mode=mmd --mmd=sampled {IMQ} {EARLY}": [
        [39.8619, 1.10682],
        [30.9108, 0.672142],
        [29.9248, 1.37498],
    ],
    f"--mode=vae {EARLY}": [[35.238, 0.467075], [25.9587, 0.528886], [27.2779, 0.523451]],
}


@pytest.mark.parametrize("flags", LOSSES)
def test_training_first_losses(flags, tiny_flags, tmp_path):
    """What a run computes does not change."""
    assert main.execute([*tiny_flags, *flags.split(), f"--outf={tmp_path}"]) == 0
    steps = [row for row in rows(tmp_path) if row["lr"]]
    losses = [[float(row[name]) for name in main.LOSSES if row[name]] for row in steps]
    assert losses == [pytest.approx(step, rel=1e-3) for step in LOSSES[flags]]
