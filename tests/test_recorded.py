"""The training step as a CUDA graph: the schedule with a stand-in, the rest on a GPU."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import MagicMock, call

import pytest
import torch
from program import ENDLESS, TINY, Program, load, log_lines, rows, run, steps

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
def streams(monkeypatch):
    """Stands in for the streams of a GPU: the ordinary one, a side one, the current one (last)."""
    streams = [MagicMock(), MagicMock(), None]

    @contextmanager
    def use(stream: object, **_: object) -> Iterator[None]:
        streams[-1] = stream
        try:
            yield
        except RuntimeError:
            raise RuntimeError("the recording is broken off") from None  # as the end of one says
        finally:
            streams[-1] = streams[0]

    streams[-1] = streams[0]
    monkeypatch.setattr(torch, "Generator", MagicMock())
    stand_ins = {"Stream": lambda: streams[1], "current_stream": lambda: streams[-1]}
    stand_ins |= {"stream": use, "graph": use, "CUDAGraph": Graph, "set_stream": MagicMock()}
    for name, value in (stand_ins | {"default_generators": MagicMock()}).items():
        monkeypatch.setattr(torch.cuda, name, value)
    return streams


@pytest.mark.parametrize("works", [True, False])
def test_recorded_schedule(works, streams, capfd):
    """Three steps on a side stream, then one that is recorded, replayed from then on.

    Where it cannot be recorded, one line says why, and steps are ordinary ones.
    """
    where = []

    def double(x: torch.Tensor) -> torch.Tensor:
        where.append(streams[-1])
        if not isinstance(streams[-1], Graph):
            return 2 * x
        if not works:
            raise RuntimeError("not permitted\nin a recording")
        output = torch.full_like(x, torch.nan)  # until it is replayed
        streams[-1].kernels.append(lambda: output.copy_(2 * x))
        return output

    recorded = utils.Recorded(double)
    inputs = [torch.full((2,), float(i)) for i in range(7)]
    outputs = [recorded(x) for x in inputs]
    for i in range(7):  # later calls change neither
        assert inputs[i].tolist() == [i] * 2 and outputs[i].tolist() == [2 * i] * 2
    assert where[:3] == [streams[1]] * 3 and isinstance(where[3], Graph)
    assert where[4:] == ([] if works else [streams[0]] * 4)
    assert streams[1].wait_stream.call_count == streams[0].wait_stream.call_count == 3
    told = "main.py: the step is not recorded as a CUDA graph, and so it is slower: not permitted\n"
    assert capfd.readouterr().err == ("" if works else told)
    generator = torch.cuda.default_generators[0]
    assert generator.manual_seed.mock_calls == [call(generator.initial_seed())] * (not works)


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
        assert program.wait() == 0 and "is not recorded" not in program.err, program.err
        logs[graph] = rows(tmp_path / graph)
    for one, other in zip(*logs.values(), strict=True):
        for name in ("reconstruction", "penalty", "test_mse"):
            assert float(one[name] or 0) == pytest.approx(
                float(other[name] or 0), rel=0.02, abs=2e-3
            )


@needs_gpu
def test_recorded_rates(tmp_path):
    """A change of the rate takes effect."""
    argv = ["--dataroot=unused", *TINY, "--mode=mmd", "--cuda", f"--outf={tmp_path}"]
    device = torch.device("cuda", 0)
    wae = main.Run(main.get_flags(argv)[0], utils.World(0, 1, device))
    step = utils.Recorded(lambda x: main.train_step(wae, x))
    weight = wae.net.decoder.layers[0].weight
    for factor in (1, 1, 1, 1, 1, 0, 1, 0):
        wae.set_learning_rates(factor)
        before = weight.detach().clone()
        step(torch.rand(8, 3, 32, 32, device=device))
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


def wait_in_steps() -> None:
    """Lets each training step wait for the GPU."""
    step = main.train_step
    main.train_step = lambda run, x, *prior: step(run, x + 0 * x.sum().item(), *prior)


@needs_gpu
def test_recorded_step_that_waits(toy_faces, tmp_path):
    """It goes on unrecorded, with one line."""
    argv = [f"--dataroot={toy_faces}", *TINY, "--mode=mmd", "--cuda", "--niter=2"]
    program = run(tmp_path, *argv, f"--outf={tmp_path / 'x'}", change=wait_in_steps).succeeds()
    (line,) = program.messages
    assert line.startswith("main.py: the step is not recorded as a CUDA graph")
    assert steps(tmp_path / "x") == list(range(1, 7))
