"""Lets the tests import the program's files, and keeps each test to one core."""

import signal
import sys
from pathlib import Path

import pytest
import torch

# A job in the background ignores Ctrl-C, and under nohup SIGHUP, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)

from program import TINY, draw_faces, run  # noqa: E402


@pytest.fixture(scope="session")
def toy_faces(tmp_path_factory):
    """A folder for --dataroot with 30 drawn faces. Not to be changed."""
    return draw_faces(tmp_path_factory.mktemp("faces"), 30)


@pytest.fixture(scope="session")
def tiny_flags(toy_faces):
    """Flags of a run of one epoch of three steps, but for the mode and --outf."""
    return (f"--dataroot={toy_faces}", *TINY, "--niter=1", "--seed=1")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_flags):
    """The folders of two such runs, by mode. Not to be changed."""
    folders = {mode: tmp_path_factory.mktemp("trained") / mode for mode in ("gan", "mmd")}
    for mode, folder in folders.items():
        run(folder.parent, *tiny_flags, f"--mode={mode}", f"--outf={folder}").succeeds()
    return folders
