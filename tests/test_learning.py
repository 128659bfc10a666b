"""Short runs on the CPU: each kind learns, and has the losses that it had when this was written."""

import numpy as np
import pytest
import torch
from kill_and_resume import draw_faces
from program import rows

import main
import utils

CPU = utils.World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def more_faces(tmp_path_factory):
    """A folder for --dataroot with 120 drawn faces."""
    return draw_faces(tmp_path_factory.mktemp("more_faces"), 120)


@pytest.mark.parametrize("mode", ["gan", "mmd", "vae"])
def test_training_learns(mode, more_faces, tmp_path):
    """In 90 steps, to reconstruct held-out faces, and to bring the codes of a WAE to the prior."""
    argv = [f"--dataroot={more_faces}", f"--mode={mode}", f"--outf={tmp_path / 'run'}", "--seed=1"]
    argv += ["--image_size=32", "--nf=8", "--nz=8", "--batch_size=16", "--n_test=24", "--niter=15"]
    argv += ["--lr=0.005", "--sample_every=99", "--n_samples=2"]
    argv += ["--LAMBDA=0.1"] if mode == "vae" else []
    assert main.execute(argv) == 0
    epochs = [row for row in rows(tmp_path / "run") if row["test_mse"]]
    errors, distances = ([float(row[k]) for row in epochs] for k in ("test_mse", "test_w2"))
    data = main.load_data(main.get_flags(argv)[0], None, CPU)
    train, test = (np.asarray(images) / 255 for images in (data.train, data.test))
    # The best that a decoder can do that ignores its codes is the mean of the training images.
    assert errors[-1] < 0.5 * np.square(test - train.mean(0)).mean()
    assert mode == "vae" or distances[-1] < 0.6 * distances[0]


GOLDEN = {
    "--mode=gan": [
        39.8619,
        0.656349,
        1.38567,
        30.9032,
        0.654999,
        1.33989,
        29.9244,
        0.698169,
        1.19245,
    ],
    "--mode=mmd": [39.8619, 0.832215, 30.9103, 0.859154, 29.9244, 0.895794],
    "--mode=mmd --mmd=sampled": [39.8619, 1.10682, 30.9108, 0.672142, 29.9248, 1.37498],
    "--mode=vae": [35.238, 0.467075, 25.9587, 0.528886, 27.2779, 0.523451],
}


@pytest.mark.parametrize("flags", GOLDEN)
def test_training_first_losses(flags, tiny_flags, tmp_path):
    """Reconstruction, penalty and loss of a discriminator, if there is one, of steps 1 to 3."""
    assert main.execute([*tiny_flags, *flags.split(), f"--outf={tmp_path}"]) == 0
    steps = [row for row in rows(tmp_path) if row["lr"]]
    losses = [float(row[name]) for row in steps for name in main.LOSSES if row[name]]
    assert losses == pytest.approx(GOLDEN[flags], rel=1e-3)
