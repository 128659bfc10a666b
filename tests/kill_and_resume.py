"""Kills a small training with SIGKILL again and again, resumes it each time, and compares what it leaves in the end.

    python3 tests/kill_and_resume.py --kills=30 --mode=both --seed=0

An undisturbed run with the same flags must leave the same bits: weights and optimisers, log (but images_per_s),
pictures and metrics. Kills fall anywhere: while a run starts, trains or draws, while it writes a checkpoint, and in the
final evaluation. The exit status is 0 if nothing differs. A short form of this is in the test suite.
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
from program import REPO, TINY, Program

N_IMAGES = 60  # less 6 held out: six steps of 8 in an epoch
HALF_WRITTEN = ".*.pth.tar.*.tmp"  # what a checkpoint is called until it is whole


def draw_faces(folder: Path, n_images: int = N_IMAGES) -> Path:
    """Makes toy faces. Returns the folder for --dataroot."""
    command = [sys.executable, REPO / "download_datasets.py", "toy", f"--n_images={n_images}", f"--data_dir={folder}"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder / "toy"


def flags_of(mode: str, data: Path, epochs: int) -> list[str]:
    """The command line of the training, less where it writes."""
    pretraining = ["--e_pretrain", "--e_pretrain_iters=3", "--e_pretrain_sample_size=16"] if mode == "gan" else []
    return [f"--dataroot={data}", f"--mode={mode}", *TINY, *pretraining, f"--niter={epochs}", "--seed=5"]


def log_lines(outf: Path) -> int:
    """Rows of the log so far, with the heading."""
    log = outf / "log.csv"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kill_at_random(run: Program, outf: Path, moment: str, rng: random.Random) -> None:
    """Kills a run at a moment of the kind asked for, as far as it gets there before it is over.

    Moments are told by what the run has written, not by the clock: a machine may be slow, or fast, or busy.
    """

    def log_id() -> tuple[int, int] | None:
        log = outf / "log.csv"
        return (log.stat().st_ino, log.stat().st_mtime_ns) if log.exists() else None

    left_over = set(outf.glob(HALF_WRITTEN))

    def writes() -> bool:
        return bool(set(outf.glob(HALF_WRITTEN)) - left_over)

    if moment == "start":
        time.sleep(rng.uniform(0, 0.5))
    elif moment == "training":
        before = log_id()
        run.wait_until(lambda: log_id() != before)  # a run begins by replacing the log
        lines = log_lines(outf) + rng.randrange(9)  # an epoch has six steps, and a row at its end
        run.wait_until(lambda: log_lines(outf) >= lines)
        time.sleep(rng.uniform(0, 0.02))
    elif moment == "checkpoint":
        for _ in range(rng.randrange(3)):  # let some be written
            run.wait_until(writes)
            run.wait_until(lambda: not writes())
        run.wait_until(writes)
        time.sleep(rng.choice([0, rng.uniform(0, 0.01)]))
    else:
        run.wait_until((outf / "losses.png").exists)
        time.sleep(rng.uniform(0, 0.1))
    run.kill(signal.SIGKILL)


def kill_and_resume(outf: Path, flags: list[str], kills: int, seed: int) -> Counter[str]:
    """Trains with so many kills, the last of them in the final evaluation, and then to the end.

    Returns:
        How many kills hit, in all and by moment, and how many left a half-written checkpoint behind.
    """
    rng, tally = random.Random(seed), Counter()
    checkpoint = outf / "checkpoint.pth.tar"
    moments = ["checkpoint", "training", *rng.choices(["checkpoint", "training", "start"], [5, 5, 1], k=kills)]
    for moment in [*moments[: kills - 1], "evaluation", None]:
        resume = [f"--checkpoint={checkpoint}"] if checkpoint.exists() else []
        before = set(outf.glob(HALF_WRITTEN))
        longer = ["--n_samples=1000000"] if moment == "evaluation" else []  # or it would be over before the kill
        run = Program(outf.parent / "output", *flags, f"--outf={outf}", *resume, *longer)
        if moment:
            kill_at_random(run, outf, moment, rng)
        status = run.wait()
        if status not in (0, -signal.SIGKILL):
            raise SystemExit(f"a run ended with status {status} after {tally}:\n{run.err}")
        if status:
            tally.update(["kills", f"kills, {moment}"])
            tally["half-written checkpoints"] += bool(set(outf.glob(HALF_WRITTEN)) - before)
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
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    else:
        same = type(a) is type(b) and (without_speed(a) == without_speed(b) if name.endswith("/log") else a == b)
    return [] if same else [name]


def differences(a: Path, b: Path) -> list[str]:
    """Names of what differs between the folders of two runs, leaving out clock and folder names."""
    names = [{path.name for path in folder.iterdir()} for folder in (a, b)]
    found = [f"{name}: only one has it" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        one, other = a / name, b / name
        if name.endswith(".pth.tar"):
            found += unequal(*(torch.load(path, weights_only=True) for path in (one, other)), name)
        elif name == "log.csv":
            found += [] if without_speed(one.read_text()) == without_speed(other.read_text()) else [name]
        elif name == "args.json":
            flags = [json.loads(path.read_text()) | {"outf": "", "checkpoint": ""} for path in (one, other)]
            found += [] if flags[0] == flags[1] else [name]
        elif one.read_bytes() != other.read_bytes():
            found += [name]
    return found


def try_out(folder: Path, data: Path, mode: str, epochs: int, kills: int, seed: int) -> tuple[Counter[str], list[str]]:
    """One undisturbed and one killed training: the tally of the second, and what differs between them."""
    flags = flags_of(mode, data, epochs)
    whole = Program(folder / "output", *flags, f"--outf={folder / 'whole'}")
    if whole.wait():
        raise SystemExit(whole.err)
    tally = kill_and_resume(folder / "killed", flags, kills, seed)
    return tally, differences(folder / "whole", folder / "killed")


def main() -> int:
    """Runs it by hand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="kills in each mode (default: 30)")
    parser.add_argument("--mode", choices=("gan", "mmd", "both"), default="both", help="which modes (default: both)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments to kill at (default: 0)")
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as name:
        data = draw_faces(Path(name))
        for mode in ("gan", "mmd") if args.mode == "both" else (args.mode,):
            epochs = args.kills + 5  # a life between two kills trains about half an epoch
            tally, found = try_out(Path(name) / mode, data, mode, epochs, args.kills, args.seed)
            print(f"{mode}: {epochs} epochs; " + ", ".join(f"{what} {n}" for what, n in sorted(tally.items())))
            files = len(list((Path(name) / mode / "whole").iterdir()))
            print(
                f"{mode}: {files} files compared, " + (f"differ: {', '.join(found)}" if found else "not a bit differs")
            )
            failed |= bool(found) or tally["kills"] < args.kills
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
