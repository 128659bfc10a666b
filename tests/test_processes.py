"""Several processes train as one does, on the CPU with gloo.

Where torchrun itself is not what is tested, its processes are forked with the variables that it
would set.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import program
import pytest
import torch
from PIL import Image
from program import ENDLESS, REPO, TINY, Program, log_lines, rows, steps

import main
import utils

N_IMAGES, STEPS = 46, 5  # of which TINY holds out 6, and makes batches of 8
CASES = {
    "gan": ["--mode=gan"],
    "IMQ": ["--mode=mmd", "--kernel=IMQ"],
    "RBF": ["--mode=mmd", "--kernel=RBF"],
    "vae": ["--mode=vae"],
}
LAUNCHED = ("--ngpu=2", *ENDLESS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags for a tiny run on a folder of small images."""
    root = tmp_path_factory.mktemp("data")
    (root / "all").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (N_IMAGES, 4, 4, 3), np.uint8)
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).resize((32, 32)).save(root / "all" / f"{i:02d}.jpg")
    return [*TINY, f"--dataroot={root}", "--dataset=folder", "--seed=1", "--mode=mmd"]


def torchrun_variables(size: int) -> list[dict[str, str]]:
    """What torchrun sets in the environment of each of its processes."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def in_world(env: dict[str, str], function: Callable[[utils.World], object], path: Path) -> None:
    """Does what one of several processes does: saves the function's value."""
    os.environ |= env
    world = utils.get_world(cuda=False, gpu_id=0)
    utils.join(world)
    torch.save(function(world), path)
    utils.leave_world()


def from_all(size: int, function: Callable[[utils.World], object], folder: Path) -> list:
    """The values of a function called in each of so many processes."""
    paths = [folder / f"{rank}.pt" for rank in range(size)]
    pairs = zip(torchrun_variables(size), paths, strict=True)
    processes = [program.start(in_world, env, function, path) for env, path in pairs]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [torch.load(path) for path in paths]


def children(pid: int) -> dict[str, int]:
    """Processes that torchrun has started, by rank."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        for line in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if line.startswith(b"RANK="):
                found[line[5:].decode()] = int(child)
    return found


def all_end(pids: list[int]) -> bool:
    """Whether processes end within some seconds."""
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def gradients(world: utils.World) -> dict[str, torch.Tensor]:
    """What a step leaves in .grad, by case and weight; batch norm is in evaluation mode."""
    found = {}
    rng = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 256, (12, 32, 32, 3), generator=rng, dtype=torch.uint8)
    prior = torch.randn(12, 4, generator=rng)
    for case, argv in CASES.items():
        tiny = ["--image_size=32", "--nf=4", "--nz=4", "--batch_size=12"]
        noise = [] if case == "vae" else ["--noise=deterministic"]
        folders = ["--dataroot=unused", "--outf=unused_too"]
        run = main.Run(main.get_flags([*argv, *tiny, *noise, *folders])[0], world)
        if case == "vae":  # no noise to speak of
            run.net.encoder.moments.weight.data[4:] = 0
            run.net.encoder.moments.bias.data[4:] = -49
        with torch.no_grad():
            for _ in range(20):  # so that activations and gradients are of ordinary size
                run.net(run.to_input(batch))
        run.net.eval()
        for optimizer in run.optimizers.values():
            optimizer.step = lambda: None
        run.wrap()
        main.train_step(run, run.to_input(batch.chunk(world.size)[world.rank]), prior)
        for name, network in run.networks.items():
            for key, value in network.named_parameters():
                found[f"{case} {name} {key}"] = value.grad.clone()
    return found


def test_gradients_are_those_of_one_process(tmp_path):
    expected = gradients(utils.World(0, 1, torch.device("cpu")))
    assert {name.split()[1] for name in expected} == {"net", "discriminator"}
    for rank, found in enumerate(from_all(3, gradients, tmp_path)):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = gradient.abs().max()
            assert scale > 1e-6, f"nothing to compare: {name}"
            difference = (found[name] - gradient).abs().max()
            assert difference <= 5e-5 * scale, f"{name}, process {rank}"


def test_torchrun_by_hand_continues_a_run_of_one_process(data, tmp_path):
    out = tmp_path / "out"
    program.run(tmp_path / "one", *data, "--niter=1", f"--outf={out}")
    before = set(os.listdir(out))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(REPO / "main.py"), *data, "--niter=2", f"--outf={out}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    # One set of files, of which each belongs to an epoch or to the run ...
    pictures = {
        f"{name}_epoch_002.png" for name in ("fake_samples", "reconstructions", "interpolations")
    }
    assert set(os.listdir(out)) == before | pictures
    # ... and a log in which a step is one of a global batch.
    assert steps(out) == list(range(1, 2 * STEPS + 1))
    assert [int(row["step"]) for row in rows(out) if row["test_mse"]] == [STEPS, 2 * STEPS]
    assert done.stdout.count("epoch 2:") == done.stderr.count("continuing the run") == 1

    again = program.run(tmp_path / "again", *data, "--niter=2", "--ngpu=2", f"--outf={out}")
    again.succeeds()
    assert again.out == f"the run in {out} is complete; a larger --niter continues it\n"


def test_processes_that_find_different_checkpoints(data, tmp_path):
    """As on machines that do not share --outf: one would continue, the other begin."""
    program.run(tmp_path / "one", *data, "--niter=1", f"--outf={tmp_path / '0'}")
    argv = [*data, "--niter=2"]
    ranks = [
        Program(tmp_path / f"rank {n}", *argv, f"--outf={tmp_path / str(n)}", env=env)
        for n, env in enumerate(torchrun_variables(2))
    ]
    ranks[0].fails(1, "the processes do not find the same checkpoint and images")
    ranks[1].kill(signal.SIGKILL)  # it waits for torchrun to do that


def continues(data: list[str], out: Path) -> None:
    """Checks that one process continues the run to the end of its epoch, with each step once."""
    epochs = utils.load_checkpoint(out / "checkpoint.pth.tar")["step"] // STEPS + 1
    program.run(out.parent / "one", *data, f"--niter={epochs}", f"--outf={out}").succeeds()
    assert steps(out) == list(range(1, epochs * STEPS + 1))


def test_sigterm_to_ngpu_2_leaves_a_checkpoint_that_one_process_continues(data, tmp_path):
    out = tmp_path / "out"
    both = Program(tmp_path / "two", *data, *LAUNCHED, f"--outf={out}")
    both.wait_until(lambda: log_lines(out) > 3)
    both.kill(signal.SIGTERM)
    assert both.wait() == 128 + signal.SIGTERM, both.err
    assert "Traceback" not in both.err
    assert sorted(p.name for p in out.glob("*checkpoint*")) == ["checkpoint.pth.tar"]
    assert both.err.count("; the same command continues") == 1
    continues(data, out)


def test_sigint_in_one_process_stops_all(data, tmp_path):
    out = tmp_path / "out"
    argv = [*data, *ENDLESS, f"--outf={out}"]
    ranks = [Program(tmp_path / env["RANK"], *argv, env=env) for env in torchrun_variables(2)]
    ranks[0].wait_until(lambda: log_lines(out) > 3)
    ranks[1].kill(signal.SIGINT)
    assert [rank.wait() for rank in ranks] == [128 + signal.SIGINT] * 2
    assert "the same command continues" in ranks[0].err and not ranks[1].messages
    assert utils.load_checkpoint(out / "checkpoint.pth.tar")["flags"]["batch_size"] == 8


def test_any_number_of_interrupts(data, tmp_path):
    """Of Ctrl-C, which a terminal sends to all processes of the command."""
    out = tmp_path / "out"
    both = Program(tmp_path / "two", *data, *LAUNCHED, f"--outf={out}")
    both.wait_until(lambda: log_lines(out) > 3)
    for _ in range(15):
        # What ends meanwhile has no entry in /proc any more.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for pid in (*children(both.process.pid).values(), both.process.pid):
                os.kill(pid, signal.SIGINT)
        time.sleep(0.05)
    assert both.wait() == 128 + signal.SIGINT, both.err
    assert "Traceback" not in both.err and "Exception ignored" not in both.err
    assert (out / "checkpoint.pth.tar").exists()


def test_processes_end_with_their_launcher(data, tmp_path):
    """Killed, it cannot end them; the run then continues and has each step once."""
    out = tmp_path / "out"
    both = Program(tmp_path / "two", *data, *LAUNCHED, f"--outf={out}")
    both.wait_until(lambda: (out / "checkpoint.pth.tar").exists() and log_lines(out) > 3)
    ranks = list(children(both.process.pid).values())
    both.kill(signal.SIGKILL)
    both.wait()
    assert len(ranks) == 2 and all_end(ranks)
    continues(data, out)


def test_a_process_that_is_killed_ends_the_run(data, tmp_path):
    out = tmp_path / "out"
    both = Program(tmp_path / "two", *data, *LAUNCHED, f"--outf={out}")
    both.wait_until(lambda: log_lines(out) > 3)
    ranks = children(both.process.pid)
    os.kill(ranks["1"], signal.SIGKILL)
    both.fails(128 + signal.SIGKILL, "process 1 of 2 was killed by signal 9")
    assert all_end(list(ranks.values()))


def test_a_mistake_is_told_once(data, tmp_path):
    flags = ["--ngpu=2", f"--dataroot={tmp_path / 'none'}", f"--outf={tmp_path / 'out'}"]
    wrong = program.run(tmp_path, *data, *flags)
    wrong.fails(1, f"--dataroot={tmp_path / 'none'}: no such folder")


def test_impossible_numbers_of_processes(data, tmp_path):
    def refuses(env: dict[str, str], words: str, *flags: str) -> None:
        refused = program.run(tmp_path, *data, *flags, f"--outf={tmp_path / 'out'}", env=env)
        refused.fails(2, words)

    refuses(torchrun_variables(3)[0], "--batch_size=8 cannot be shared by 3 processes")
    no_gpu = torchrun_variables(2)[0] | {"CUDA_VISIBLE_DEVICES": ""}
    refuses(no_gpu, "--cuda: PyTorch finds no CUDA GPU", "--cuda")
    assert not (tmp_path / "out").exists()
