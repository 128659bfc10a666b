"""Several processes train as one does, on the CPU with gloo.

Where torchrun itself is not what is tested, its processes are forked with the variables that it
would set.
"""

import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import program
import pytest
import torch
from PIL import Image
from program import ENDLESS, TINY, Program, all_end, children, load, log_lines, rows, steps

import main
import utils

N_IMAGES, STEPS = 46, 5  # of which TINY holds out 6, and makes batches of 8
CASES = {
    "gan": ["--mode=gan"],
    "exact": ["--mode=mmd"],
    "sampled": ["--mode=mmd", "--mmd=sampled", "--kernel=RBF"],
    "vae": ["--mode=vae"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags for a tiny run on a folder of small images."""
    root = tmp_path_factory.mktemp("data")
    (root / "all").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (N_IMAGES, 4, 4, 3), np.uint8)
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).resize((32, 32)).save(root / "all" / f"{i:02d}.jpg")
    return [*TINY, f"--dataroot={root}", "--dataset=folder", "--seed=1"]


def torchrun_variables(size: int) -> list[dict[str, str]]:
    """What torchrun sets in the environment of each of its processes."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    shared["TORCHELASTIC_RUN_ID"] = "test"
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def in_world(env: dict[str, str], function: Callable[[utils.World], object], path: Path) -> None:
    """Does what one of several processes does: saves the function's value."""
    os.environ |= env
    torch.save(function(utils.join_world(cuda=False, gpu_id=0)), path)
    utils.leave_world()


def note(found: dict[str, torch.Tensor], name: str, network: torch.nn.Module) -> None:
    """Notes the gradients of the weights, as what an optimiser does."""
    found |= {f"{name} {key}": value.grad.clone() for key, value in network.named_parameters()}


def gradients(world: utils.World) -> dict[str, torch.Tensor]:
    """The gradients of a step, by case and weight; batch norm is in evaluation mode."""
    found = {}
    rng = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 256, (12, 32, 32, 3), generator=rng, dtype=torch.uint8)
    prior = torch.randn(12, 4, generator=rng)
    for case, argv in CASES.items():
        tiny = ["--image_size=32", "--nf=4", "--nz=4", "--batch_size=12"]
        noise = [] if case == "vae" else ["--noise=deterministic"]
        _, flags = main.parse([*argv, *tiny, *noise, "--dataroot=unused", "--outf=unused_too"])
        run = main.Run(flags, world)
        if case == "vae":  # no noise to speak of
            run.net.encoder.moments.weight.data[4:] = 0
            run.net.encoder.moments.bias.data[4:] = -49
        with torch.no_grad():
            for _ in range(20):  # so that activations and gradients are of ordinary size
                run.net(utils.from_uint8(batch))
        run.net.eval()
        for name, network in run.networks.items():
            run.optimizers[name].step = partial(note, found, f"{case} {name}", network)
        main.Step(run)(batch.chunk(world.size)[world.rank], prior)
    return found


def test_step_in_three_processes(tmp_path):
    """The gradients are those of one process."""
    paths = [tmp_path / f"{rank}.pt" for rank in range(3)]
    pairs = zip(torchrun_variables(3), paths, strict=True)
    processes = [program.start(in_world, env, gradients, path) for env, path in pairs]
    expected = gradients(utils.World(0, 1, torch.device("cpu")))
    assert {name.split()[1] for name in expected} == {"net", "discriminator"}
    for process, path in zip(processes, paths, strict=True):
        process.join(120)
        assert process.exitcode == 0
        found = torch.load(path)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = gradient.abs().max()
            assert scale > 1e-6, f"nothing to compare: {name}"
            assert (found[name] - gradient).abs().max() <= 5e-5 * scale, (name, path)


def train(folder: Path, *argv: object, status: int = 0, **options: object) -> list[Program]:
    """Two processes, ended with the status."""
    pairs = enumerate(torchrun_variables(2))
    ranks = [Program(folder / f"{rank}", *argv, env=env, **options) for rank, env in pairs]
    assert [rank.wait() for rank in ranks] == [status] * 2, ranks[0].err + ranks[1].err
    assert ranks[1].out + ranks[1].err == ""
    return ranks


def interrupt(run: main.Run) -> None:
    """Sends Ctrl-C to the second process, twice: from the terminal, and passed on by torchrun."""
    for _ in range(2 * run.world.rank):
        os.kill(os.getpid(), signal.SIGINT)


def test_train_in_two_processes(data, tmp_path):
    """Stopped in an epoch and continued, the run has the bits of one that was not."""
    whole, outf = tmp_path / "whole", tmp_path / "out"
    data = [*data, "--mode=gan", "--niter=2"]
    train(tmp_path, *data, f"--outf={whole}")
    data += [f"--outf={outf}"]
    stopped = train(tmp_path, *data, status=130, change=partial(program.after_step, 7, interrupt))
    assert "stopped after step 7 of 10; the same command continues" in stopped[0].err
    assert steps(outf) == list(range(1, 8))
    train(tmp_path, *data)
    assert program.differences(whole, outf) == []
    # A step of the log is one of a batch of all processes, and one process may use the run.
    assert steps(outf) == list(range(1, 2 * STEPS + 1))
    assert [int(row["step"]) for row in rows(outf) if row["test_mse"]] == [STEPS, 2 * STEPS]
    assert "is complete" in train(tmp_path, *data)[0].out
    assert main.execute([f"--outf={outf}", "--evaluate"]) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_launch(number, data, tmp_path):
    """A launcher that is told to end lets its processes save; without it, they end by themselves.

    One process continues the run, and each step is in the log once.
    """
    outf = tmp_path / "out"
    data = [*data, "--mode=mmd", f"--outf={outf}"]
    both = Program(tmp_path / "two", *data, *ENDLESS, "--ngpu=2", "--print_every=2")
    both.wait_until(lambda: log_lines(outf) > 5)
    ranks = children(both.process.pid)
    both.kill(number)
    assert (both.wait() == -number) == (number == signal.SIGKILL)
    assert len(ranks) == 2 and all_end(ranks)
    step = load(outf)["step"]
    if number == signal.SIGTERM:
        assert both.err.count(f"stopped after step {step} of") == 1
        assert steps(outf)[-1] == step
    epochs = step // STEPS + 1
    program.run(tmp_path / "one", *data, f"--niter={epochs}", "--print_every=2").succeeds()
    assert steps(outf) == list(range(2, epochs * STEPS + 1, 2))
