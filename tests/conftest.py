"""Lets the tests import the program's files, and keeps each test to one core."""

import signal
import sys
from pathlib import Path

import pytest
import torch

# A job that a script runs in the background ignores Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)

from kill_and_resume import draw_faces  # noqa: E402
from program import TINY, run  # noqa: E402


@pytest.fixture(scope="session")
def toy_faces(tmp_path_factory):
    """A folder for --dataroot with 30 drawn faces. Not to be changed."""
    return draw_faces(tmp_path_factory.mktemp("faces"), 30)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, toy_faces):
    """The folders of two small runs of one epoch, by mode, with the seed 1. Not to be changed."""
    folders = {mode: tmp_path_factory.mktemp("trained") / mode for mode in ("gan", "mmd")}
    for mode, folder in folders.items():
        flags = [f"--dataroot={toy_faces}", f"--mode={mode}", *TINY, "--niter=1", "--seed=1"]
        program = run(folder.parent, *flags, f"--outf={folder}")
        assert program.wait() == 0, program.err
    return folders
