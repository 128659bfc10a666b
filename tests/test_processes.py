"""Several processes train as one does, on the CPU with gloo.

Where torchrun itself is not what is tested, its processes are forked with the variables that it
would set.
"""

import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import program
import torch
from program import ENDLESS, Program, load, log_lines, rows, steps

import main
import utils

CASES = {
    "gan": ["--mode=gan"],
    "exact": ["--mode=mmd"],
    "sampled": ["--mode=mmd", "--mmd=sampled", "--kernel=RBF"],
    "vae": ["--mode=vae"],
}


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
            run.net.encoder.posterior.weight.data[4:] = 0
            run.net.encoder.posterior.bias.data[4:] = -49
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


def test_train_in_two_processes(tiny_flags, tmp_path):
    """Stopped in an epoch and continued, the run has the bits of one that was not."""
    whole, outf = tmp_path / "whole", tmp_path / "out"
    flags = [*tiny_flags, "--mode=gan", "--niter=2"]
    train(tmp_path, *flags, f"--outf={whole}")
    flags += [f"--outf={outf}"]
    stopped = train(tmp_path, *flags, status=130, change=partial(program.after_step, 4, interrupt))
    assert "stopped after step 4 of 6; the same command continues" in stopped[0].err
    assert steps(outf) == [1, 2, 3, 4]
    train(tmp_path, *flags)
    assert program.differences(whole, outf) == []
    # A step of the log is one of a batch of all processes, and one process may use the run.
    assert steps(outf) == [1, 2, 3, 4, 5, 6]
    assert [int(row["step"]) for row in rows(outf) if row["test_mse"]] == [3, 6]
    assert "is complete" in train(tmp_path, *flags)[0].out
    use = [f"--outf={outf}", "--evaluate"]
    ranks = enumerate(torchrun_variables(2))
    for process in [Program(tmp_path / f"{rank}", *use, env=env) for rank, env in ranks]:
        process.fails(2, "--evaluate and --generate run in one process: leave out torchrun")
    assert main.execute([f"--outf={outf}", "--evaluate"]) == 0


def test_launch(tiny_flags, tmp_path):
    """A launcher that Slurm warns lets its processes save. One process continues the run."""
    outf = tmp_path / "out"
    flags = [*tiny_flags, "--mode=mmd", f"--outf={outf}"]
    both = Program(tmp_path, *flags, *ENDLESS, "--ngpu=2")
    both.wait_until(lambda: log_lines(outf) > 5)
    both.kill(signal.SIGUSR1)
    assert both.wait() > 0
    step = load(outf)["step"]
    assert both.err.count(f"stopped after step {step} of") == 1
    assert steps(outf) == list(range(1, step + 1))
    epochs = step // 3 + 1
    assert main.execute([*flags, f"--niter={epochs}"]) == 0
    assert steps(outf) == list(range(1, epochs * 3 + 1))


def fork() -> None:
    """Goes on in a child of this process, which waits as torchrun does."""
    if os.fork():
        signal.pause()


def test_end_with_parent(tiny_flags, tmp_path):
    """A process whose launcher was killed ends, and frees the folder."""
    flags = [*tiny_flags, *ENDLESS, f"--outf={tmp_path / 'out'}"]
    launcher = Program(tmp_path, *flags, env=torchrun_variables(1)[0], change=fork)
    launcher.wait_until(lambda: log_lines(tmp_path / "out") > 2)
    process = Path(f"/proc/{launcher.process.pid}")
    (child,) = (process / "task" / process.name / "children").read_text().split()
    launcher.kill(signal.SIGKILL)
    end = time.monotonic() + 60
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    utils.lock(tmp_path / "out").close()
