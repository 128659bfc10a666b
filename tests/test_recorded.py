"""The training step as a CUDA graph: the schedule with a stand-in, the rest on a GPU."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from program import ENDLESS, TINY, Program, after_step, load, log_lines, rows, run, steps

import main
import utils

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Graph:
    """Stands in for a recording: what runs when it is replayed."""

    def __init__(self) -> None:
        self.kernels = []

    def replay(self) -> None:
        for kernel in self.kernels:
            kernel()


@pytest.fixture
def recordings(monkeypatch):
    """Stands in for the streams of a GPU. Returns the recordings, of which the last goes on."""
    recordings = [None]

    @contextmanager
    def record(graph: Graph, stream: str, **_: object) -> Iterator[None]:
        assert stream == "the current stream"
        recordings.append(graph)
        try:
            yield
        except RuntimeError:
            raise RuntimeError("the recording is broken off") from None  # as the end of one says
        finally:
            recordings.append(None)

    stand_ins = {
        "graph": record,
        "CUDAGraph": Graph,
        "current_stream": lambda: "the current stream",
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return recordings


def test_recorded_schedule(recordings):
    """Three ordinary steps, then one that is recorded, and replayed from then on."""
    where = []
    x = torch.empty(2)

    def double() -> torch.Tensor:
        graph = recordings[-1]
        where.append(graph)
        if graph is None:
            return 2 * x
        output = torch.full_like(x, torch.nan)  # until it is replayed
        graph.kernels.append(lambda: output.copy_(2 * x))
        return output

    recorded = utils.Recorded(double)
    for i in range(7):
        x.fill_(i)
        assert recorded().tolist() == [2 * i] * 2
    assert where == [None] * 3 + [recorded.graph]


def test_recorded_failure(recordings):
    """The error says why, and what to do."""

    def wait() -> torch.Tensor:
        if recordings[-1]:
            raise RuntimeError("not permitted\nin a recording")
        return torch.zeros(2)

    recorded = utils.Recorded(wait)
    for _ in range(3):
        recorded()
    with pytest.raises(utils.UserError, match=r"--no-graph: not permitted$"):
        recorded()


def keep_on_disk() -> None:
    """Lets a thread pin memory for batches, during the recording, too."""
    utils.put_on_device = lambda images, _device: images


@needs_gpu
@pytest.mark.parametrize("flags", ["--mode=mmd --amp", "--mode=gan", "--mode=mmd --compile"])
def test_recorded_losses(flags, toy_faces, tmp_path):
    """They are those of ordinary steps, but for what other algorithms of cuDNN round."""
    argv = [f"--dataroot={toy_faces}", *TINY, *flags.split(), "--cuda", "--niter=4"]
    logs = {}
    for graph in ("--graph", "--no-graph"):
        outf = f"--outf={tmp_path / graph}"
        program = run(tmp_path, *argv, graph, outf, change=keep_on_disk)
        assert program.wait() == 0, program.err
        logs[graph] = rows(tmp_path / graph)
    for one, other in zip(*logs.values(), strict=True):
        for name in ("reconstruction", "penalty", "test_mse"):
            expected = pytest.approx(float(other[name] or 0), rel=0.02, abs=2e-3)
            assert float(one[name] or 0) == expected


@needs_gpu
def test_recorded_rates(tmp_path):
    """A change of the rate takes effect."""
    argv = ["--dataroot=unused", *TINY, "--mode=mmd", "--cuda", f"--outf={tmp_path}"]
    device = torch.device("cuda", 0)
    wae = main.Run(main.parse(argv)[1], utils.World(0, 1, device))
    weight = wae.net.decoder.layers[0].weight
    batch = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8, device=device)
    with torch.cuda.stream(torch.cuda.Stream()):
        step = utils.Recorded(partial(main.Step(wae), batch, wae.net.sample_prior(8)))
        for factor in (1, 1, 1, 1, 1, 0, 1, 0):
            wae.set_learning_rates(factor)
            before = weight.detach().clone()
            step()
            assert weight.equal(before) == (factor == 0)
    assert step.graph is not None


@needs_gpu
def test_recorded_interrupt(toy_faces, tmp_path):
    """Ctrl-C leaves a checkpoint, which a GPU continues, and then a CPU."""
    outf = tmp_path / "out"
    argv = [f"--dataroot={toy_faces}", *TINY, "--mode=gan", f"--outf={outf}"]
    program = Program(tmp_path, *argv, *ENDLESS, "--cuda")
    program.wait_until(lambda: log_lines(outf) > 8)
    program.kill(signal.SIGINT)
    assert program.wait() == 130, program.err
    epochs = load(outf)["step"] // 3 + 1
    for more, machine in ((0, "--cuda"), (1, "--no-cuda")):
        run(tmp_path, *argv, f"--niter={epochs + more}", machine).succeeds()
    assert steps(outf) == list(range(1, 3 * epochs + 4))


def wait_for_gpu(run: main.Run) -> None:
    """Waits, which a recording does not permit."""
    next(run.net.parameters()).sum().item()


@needs_gpu
def test_recorded_step_that_waits(toy_faces, tmp_path):
    """The run ends with one line."""
    argv = [f"--dataroot={toy_faces}", *TINY, "--mode=mmd", "--cuda", "--niter=2"]
    change = partial(after_step, 4, wait_for_gpu)
    program = run(tmp_path, *argv, f"--outf={tmp_path / 'x'}", change=change)
    program.fails(1, "the step cannot be recorded, try --no-graph: ")
