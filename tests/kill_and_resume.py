"""Kills a small training with SIGKILL again and again, and compares what it leaves in the end.

    python3 tests/kill_and_resume.py --kills=40 --mode=both --seed=0

After each kill the same command is run again. An undisturbed run must leave the same bits: weights
and optimisers, log (but images_per_s), pictures, densities and metrics. Kills fall anywhere: while
a run starts, trains or draws, while it writes a checkpoint, and in the final evaluation. Then the
same with the launcher of two processes. The exit status is 0 if nothing differs. The tests have a
short form of this.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from program import REPO, TINY, Program, log_lines

N_IMAGES = 60  # less 6 held out: six steps of 8 in an epoch
HALF_WRITTEN = ".checkpoint.pth.tar.tmp"  # what a checkpoint is called until it is whole


def draw_faces(folder: Path, n_images: int = N_IMAGES) -> Path:
    """Makes toy faces. Returns the folder for --dataroot."""
    command = [sys.executable, REPO / "download_datasets.py", "toy", f"--n_images={n_images}"]
    command += [f"--data_dir={folder}"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder / "toy"


def flags_of(mode: str, data: Path, epochs: int, processes: int = 1) -> list[str]:
    """The command line of the training, less where it writes."""
    flags = [f"--dataroot={data}", f"--mode={mode}", *TINY, f"--niter={epochs}", "--seed=5"]
    flags += ["--n_samples=1000", "--lr_schedule=scaled"]  # an evaluation long enough to be killed
    if mode == "gan":
        flags += ["--e_pretrain", "--e_pretrain_iters=3", "--e_pretrain_sample_size=16"]
    return flags + ([f"--ngpu={processes}"] if processes > 1 else [])


def changed(path: Path) -> tuple[int, int] | None:
    """A value that differs each time that the file is replaced or written."""
    try:
        return path.stat().st_ino, path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def kill_at_random(run: Program, outf: Path, moment: str, rng: random.Random) -> None:
    """Kills a run at a moment of the kind asked for, or lets it end if it does not get there.

    Moments are told by what the run writes, not by the clock: a machine may be slow, or busy.
    """
    half, log = outf / HALF_WRITTEN, outf / "log.csv"
    if moment == "start":
        time.sleep(rng.uniform(0, 0.5))
    elif moment == "training":
        before = changed(log)
        run.wait_until(lambda: changed(log) != before)  # a run begins by replacing the log
        lines = log_lines(outf) + rng.randrange(9)
        run.wait_until(lambda: log_lines(outf) >= lines)
        time.sleep(rng.uniform(0, 0.02))
    elif moment == "checkpoint":
        for last in [False] * rng.randrange(3) + [True]:  # let some be written
            before = changed(half)  # left over by an earlier kill
            run.wait_until(lambda before=before: changed(half) not in (None, before))
            if not last:
                run.wait_until(lambda: not half.exists())
        time.sleep(rng.choice([0, rng.uniform(0, 0.01)]))
    else:
        run.wait_until(lambda: "samples_prior: " in run.err)
        time.sleep(rng.uniform(0, 0.1))
    run.kill(signal.SIGKILL)


def kill_and_resume(outf: Path, flags: list[str], kills: int, seed: int) -> Counter[str]:
    """Trains with so many kills, the last of them in the final evaluation, and then to the end.

    Returns:
        How many kills hit, in all and by moment, and how many left a half-written checkpoint.
    """
    rng, tally = random.Random(seed), Counter()
    moments = ["checkpoint", "training"]
    moments += rng.choices(["checkpoint", "training", "start"], [5, 5, 1], k=kills)
    for moment in [*moments[: kills - 1], "evaluation", None]:
        before = changed(outf / HALF_WRITTEN)
        for _ in range(200):
            run = Program(outf.parent / "output", *flags, f"--outf={outf}")
            if moment:
                kill_at_random(run, outf, moment, rng)
            status = run.wait()
            if "is in use by process" not in run.err:
                break
            time.sleep(0.1)  # the processes of a killed launcher end by themselves
        if status not in (0, -signal.SIGKILL):
            raise SystemExit(f"a run ended with status {status} after {tally}:\n{run.err}")
        if status:
            tally.update(["kills", f"kills, {moment}"])
            tally["half-written checkpoints"] += changed(outf / HALF_WRITTEN) not in (None, before)
    return tally


def without_speed(log: str) -> list[list[str]]:
    """The cells of a log.csv less the column images_per_s, the one that depends on the clock."""
    rows = [line.split(",") for line in log.splitlines()]
    column = rows[0].index("images_per_s")
    return [row[:column] + row[column + 1 :] for row in rows]


def unequal(a: Any, b: Any, name: str) -> list[str]:
    """Names of what differs, in any bit, between two values from checkpoints."""
    if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
        return [place for key in a for place in unequal(a[key], b[key], f"{name}/{key}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        same = same and a.numpy().tobytes() == b.numpy().tobytes()
    elif name.endswith("/log"):
        same = without_speed(a) == without_speed(b)
    else:
        same = type(a) is type(b) and a == b
    return [] if same else [name]


def differences(a: Path, b: Path) -> list[str]:
    """Names of what differs between the folders of two runs, leaving out clock and folder names."""
    names = [{path.name for path in folder.iterdir()} - {".lock"} for folder in (a, b)]
    found = [f"{name}: only one has it" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        paths = (a / name, b / name)
        if name.endswith(".pth.tar"):
            one, other = (torch.load(path, weights_only=True) for path in paths)
        elif name == "args.json":
            folders = {"outf": "", "checkpoint": ""}
            one, other = (json.loads(path.read_text()) | folders for path in paths)
        elif name == "log.csv":
            one, other = (without_speed(path.read_text()) for path in paths)
        else:
            one, other = ("" if path.is_dir() else path.read_bytes() for path in paths)
        found += unequal(one, other, name)
    return found


def compare(folder: Path, flags: list[str], kills: int, seed: int) -> tuple[Counter[str], list]:
    """The tally of a killed training, and what differs between it and an undisturbed one."""
    whole = Program(folder / "output", *flags, f"--outf={folder / 'whole'}")
    if whole.wait():
        raise SystemExit(whole.err)
    tally = kill_and_resume(folder / "killed", flags, kills, seed)
    return tally, differences(folder / "whole", folder / "killed")


def main() -> int:
    """Runs it by hand."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kills", type=int, default=40, help="kills in each mode (default: 40)")
    add("--launcher_kills", type=int, default=10, help="kills of the launcher (default: 10)")
    add("--mode", choices=("gan", "mmd", "vae", "both"), default="both", help="(default: both)")
    add("--seed", type=int, default=0, help="of the moments to kill at (default: 0)")
    args = parser.parse_args()
    modes = ("gan", "mmd") if args.mode == "both" else (args.mode,)
    series = [(mode, args.kills, 1) for mode in modes] + [("mmd", args.launcher_kills, 2)]
    failed = False
    with tempfile.TemporaryDirectory() as name:
        data = draw_faces(Path(name))
        for mode, kills, processes in series:
            flags = flags_of(mode, data, epochs=kills + 5, processes=processes)
            tally, found = compare(Path(name) / f"{mode}{processes}", flags, kills, args.seed)
            counts = ", ".join(f"{what} {n}" for what, n in sorted(tally.items()))
            print(f"{mode}, {processes} process(es), {kills + 5} epochs; {counts}")
            print(f"  differ: {', '.join(found)}" if found else "  not a bit differs")
            failed |= bool(found) or tally["kills"] < kills
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
