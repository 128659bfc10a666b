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
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import program
import pytest
import torch
from PIL import Image
from program import ENDLESS, REPO, TINY, Program, all_end, children, load, log_lines, rows, steps

import main
import utils

N_IMAGES, STEPS = 46, 5  # of which TINY holds out 6, and makes batches of 8
CASES = {
    "gan": ["--mode=gan"],
    "exact": ["--mode=mmd", "--quadratic=0.3"],
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
    return [*TINY, f"--dataroot={root}", "--dataset=folder", "--seed=1", "--mode=mmd"]


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
    world = utils.get_world(cuda=False, gpu_id=0)
    utils.join(world)
    torch.save(function(world), path)
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
        folders = ["--dataroot=unused", "--outf=unused_too"]
        run = main.Run(main.get_flags([*argv, *tiny, *noise, *folders])[0], world)
        if case == "vae":  # no noise to speak of
            run.net.encoder.moments.weight.data[4:] = 0
            run.net.encoder.moments.bias.data[4:] = -49
        with torch.no_grad():
            for _ in range(20):  # so that activations and gradients are of ordinary size
                run.net(run.to_input(batch))
        run.net.eval()
        for name, network in run.networks.items():
            run.optimizers[name].step = partial(note, found, f"{case} {name}", network)
        inputs = (run.to_input(batch.chunk(world.size)[world.rank]), prior)
        main.train_step(run, *inputs[: 1 + run.needs_prior])
    return found


def test_train_step_in_three_processes(tmp_path):
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


def test_main_by_torchrun(data, tmp_path):
    """It continues a run of one process, and leaves the same files."""
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
    names = ("fake_samples", "reconstructions", "interpolations")
    assert set(os.listdir(out)) == before | {f"{name}_epoch_002.png" for name in names}
    # ... and a log in which a step is one of a global batch.
    assert steps(out) == list(range(1, 2 * STEPS + 1))
    assert [int(row["step"]) for row in rows(out) if row["test_mse"]] == [STEPS, 2 * STEPS]
    assert done.stdout.count("epoch 2:") == done.stderr.count("continuing the run") == 1


def sleep_not() -> None:
    """Says how long the program would wait before its last words, and does not wait."""
    say = lambda seconds: print(f"waited {seconds:g} s", file=sys.stderr)  # noqa: E731
    main.time = SimpleNamespace(sleep=say, perf_counter=time.perf_counter)


@pytest.mark.parametrize("differ", ["--lr, --lr_adv", "the checkpoint in --outf"])
def test_check_agreement(differ, data, tmp_path):
    """A flag differs, or, as on machines that do not share --outf, the run to continue."""
    outs, flags = [tmp_path / "0", tmp_path / "1"], [["--lr=0.001"], ["--lr=0.002"]]
    if "checkpoint" in differ:
        program.run(tmp_path / "one", *data, "--niter=1", f"--outf={outs[0]}")
        flags = [["--niter=2"]] * 2
    ranks = [
        Program(
            tmp_path / f"of {out.name}", *data, *more, f"--outf={out}", env=env, change=sleep_not
        )
        for out, more, env in zip(outs, flags, torchrun_variables(2), strict=True)
    ]
    ranks[0].fails(1, f"the processes do not agree on {differ}")
    assert ranks[1].wait() == 1
    assert ranks[1].messages == ["waited 20 s", *ranks[0].messages]  # torchrun ends it before


def break_down() -> None:
    """Puts a bug into the program."""
    sleep_not()
    main.load_data = lambda *_: {}["a bug"]


def test_main_bug_in_a_process(data, tmp_path):
    """Its traceback is not waited for."""
    env = torchrun_variables(2)[1]
    broken = program.run(tmp_path, *data, f"--outf={tmp_path / 'x'}", env=env, change=break_down)
    assert broken.process.exitcode == 1 and "KeyError: 'a bug'" in broken.err
    assert "waited" not in broken.err


def launch(data: list[str], out: Path, number: int = 3) -> Program:
    """An endless run of two processes, which has logged so many steps."""
    both = Program(out.parent / "two", *data, "--ngpu=2", *ENDLESS, f"--outf={out}")
    both.wait_until(lambda: log_lines(out) > number)
    return both


def continues(data: list[str], out: Path) -> None:
    """Checks that one process continues the run to the end of its epoch, with each step once."""
    epochs = load(out)["step"] // STEPS + 1
    program.run(out.parent / "one", *data, f"--niter={epochs}", f"--outf={out}").succeeds()
    assert steps(out) == list(range(1, epochs * STEPS + 1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_launch_signals(number, data, tmp_path):
    """One SIGTERM, or any number of Ctrl-C, which a terminal sends to all processes."""
    both = launch(data, tmp_path / "out")
    for _ in range(15 if number == signal.SIGINT else 1):
        # What ends meanwhile has no entry in /proc any more.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for pid in children(both.process.pid) if number == signal.SIGINT else []:
                os.kill(pid, number)
        both.kill(number)
        time.sleep(0.05)
    assert both.wait() == 128 + number, both.err
    assert "Traceback" not in both.err and "Exception ignored" not in both.err
    assert both.err.count("; the same command continues") == 1
    continues(data, tmp_path / "out")


def test_launch_sigkill(data, tmp_path):
    """The processes of a launcher that is killed end by themselves."""
    both = launch(data, tmp_path / "out", STEPS + 3)  # in the second epoch
    ranks = children(both.process.pid)
    both.kill(signal.SIGKILL)
    both.wait()
    assert len(ranks) == 2 and all_end(ranks)
    continues(data, tmp_path / "out")


def test_launch_killed_process(data, tmp_path):
    both = launch(data, tmp_path / "out")
    ranks = children(both.process.pid)
    os.kill(ranks[1], signal.SIGKILL)
    both.fails(128 + signal.SIGKILL, "process 1 of 2 was killed by signal 9")
    assert all_end(ranks)


def test_launch_mistake(data, tmp_path):
    """It is told once, and no other machine is waited for."""
    flags = ["--ngpu=2", f"--dataroot={tmp_path / 'none'}", f"--outf={tmp_path / 'out'}"]
    wrong = program.run(tmp_path, *data, *flags, env={"PET_NNODES": "2"})
    wrong.fails(1, f"--dataroot={tmp_path / 'none'}: no such folder")


def test_train_sigint_in_one_process(data, tmp_path):
    out = tmp_path / "out"
    argv = [*data, *ENDLESS, f"--outf={out}"]
    ranks = [Program(tmp_path / env["RANK"], *argv, env=env) for env in torchrun_variables(2)]
    ranks[0].wait_until(lambda: log_lines(out) > 3)
    ranks[1].kill(signal.SIGINT)
    assert [rank.wait() for rank in ranks] == [128 + signal.SIGINT] * 2
    assert "the same command continues" in ranks[0].err and not ranks[1].messages
    assert load(out)["flags"]["batch_size"] == 8
