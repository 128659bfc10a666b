"""What any training run needs: files, images, seeds, processes, checkpoints, a log, pictures.

Nothing here knows what an auto-encoder is. `main.py` puts these functions together with `model.py`.
"""

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.utils import make_grid
from tqdm import tqdm

Images = np.ndarray | Tensor  # uint8, (N, S, S, 3), on disk or on a GPU

CELEBA_CROP = 140  # the central square of an aligned CelebA image that the paper keeps, in pixels
CELEBA_TEST_IMAGES = 19_962  # the official test partition, the last images by name

# What every checkpoint has besides the states of networks and optimisers.
CHECKPOINT_KINDS = {
    **{"flags": dict, "images": str, "n_train": int},
    **{"step": int, "best": float, "log": str},
}

# No trained weight comes near this; beyond it a run has diverged.
LARGEST_WEIGHT = 1e6


class UserError(Exception):
    """Something that the user can mend: shown as one line, exit status 1."""

    status = 1


class UsageError(UserError):
    """A flag that cannot be honoured: shown as one line, exit status 2."""

    status = 2


# --------------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises UserError, which names `path`, where the block cannot write."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends: whole and flushed, or not at all.

    Raises:
        UserError: the file cannot be written; `path` is then what it was before.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_folder(path: Path) -> Path:
    """Creates the folder, and its parents, where missing. Raises UserError if that cannot be."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def lock(path: Path, wait: bool) -> TextIO:
    """Locks a file until it is closed or the process ends, however it ends.

    Args:
        wait: whether to wait for another process that has the lock.

    Raises:
        UserError: another process has the lock, or the file cannot be written.
    """
    with writing(path):
        file = open(path, "a+")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = f"{path.parent} is in use by process {file.read().strip()}"
        raise UserError(f"{owner}: wait for it, or choose another folder") from None
    except OSError:
        return file  # some network file systems have no locks
    file.truncate(0)
    print(os.getpid(), file=file, flush=True)
    return file


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces `path` by the content as indented JSON."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


# --------------------------------------------------------------------------------------------------
# Images: decoded once into one array on disk, which training maps into memory


def find_images(dataroot: Path) -> list[tuple[str, int, int]]:
    """Path in `dataroot`, size and time of change of each image that `ImageFolder` finds, by path.

    Hidden files and folders are left out: they belong to other programs.

    Raises:
        UserError: no such folder, no image in a folder inside it, or a folder reached twice.
    """
    layout = f"images must lie in a folder inside it, as in {dataroot}/sub_directory/XXX.jpg"
    if not dataroot.is_dir():
        raise UserError(f"--dataroot={dataroot}: no such folder; {layout}")
    check_folders(dataroot)
    try:
        paths = [path for path, _ in ImageFolder(str(dataroot), allow_empty=True).samples]
    except FileNotFoundError:  # there is no folder inside
        paths = []
    names = sorted(os.path.relpath(path, dataroot) for path in paths)
    names = [name for name in names if not name.startswith(".") and "/." not in name]
    if not names:
        raise UserError(f"--dataroot={dataroot}: no image in a folder inside it; {layout}")
    return [(name, *status(dataroot / name)) for name in names]


def check_folders(dataroot: Path) -> None:
    """Names folders that cannot be read. Raises UserError for one that links lead to twice."""
    seen: dict[tuple[int, int], str] = {}

    def unreadable(error: OSError) -> None:
        warn(f"skipped the folder {error.filename}: {error.strerror}")

    for folder, _, _ in os.walk(dataroot, followlinks=True, onerror=unreadable):
        found = os.stat(folder)
        first = seen.setdefault((found.st_dev, found.st_ino), folder)
        if first != folder:
            raise UserError(
                f"--dataroot={dataroot}: {folder} is {first} again, by a link; remove the link"
            )


def status(path: Path) -> tuple[int, int]:
    """Size and time of change of a file; 0 for a link that leads nowhere."""
    try:
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    except OSError:
        return 0, 0


def digest(*parts: Any) -> str:
    """Sixteen hexadecimal digits that depend on all parts, for names and comparisons."""
    text = "\n".join(map(str, parts))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def decode_image(path: Path, size: int, crop: int | None) -> np.ndarray:
    """The central square of an image file, resized: (size, size, 3) uint8 RGB.

    Args:
        crop: side of the square in pixels; None takes the largest.

    Raises:
        UserError: the image is smaller than the crop.
        Exception: whatever Pillow makes of a file that is not a whole image.
    """
    if not path.is_file():  # a pipe would be waited for
        raise OSError(f"{path} is not a file")
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 8
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGB")
    side = crop or min(image.size)
    if min(image.size) < side:
        width, height = image.size
        raise UserError(
            f"{path}: {width} x {height} pixels, less than the crop of {side} x {side}; "
            "use another --crop, or --dataset=folder"
        )
    left, top = ((length - side) // 2 for length in image.size)
    square = image.crop((left, top, left + side, top + side))
    # As the official implementation does; sharpness and FID depend on it.
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


class Decoded(Dataset):
    """The pixels of each image file; a UserError to raise; or None if it cannot be read."""

    def __init__(self, paths: list[Path], size: int, crop: int | None):
        self.paths, self.size, self.crop = paths, size, crop

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> np.ndarray | UserError | None:
        try:
            return decode_image(self.paths[i], self.size, self.crop)
        except UserError as error:
            return error
        except Exception:  # Pillow fails on broken files in many ways
            return None


def start_worker(_number: int) -> None:
    """Prepares a worker: Ctrl-C is the main process's, and Pillow's warnings are no news."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    end_with_parent()  # or it would keep the lock of the array


def build_array(
    target: Path, dataroot: Path, names: list[str], size: int, crop: int | None, workers: int
) -> None:
    """Decodes the images into `target`, a .npy file; a .json beside it names those that it skips.

    Raises:
        UserError: no image can be read, one is smaller than the crop, or there is no space.
    """
    images = Decoded([dataroot / name for name in names], size, crop)
    loader = DataLoader(
        images, 64, num_workers=workers, collate_fn=list, worker_init_fn=start_worker
    )
    decoded = (pixels for batch in loader for pixels in batch)
    bar = tqdm(zip(names, decoded, strict=True), "decoding once", len(names), unit="img")
    skipped = []

    def write_header(file: BinaryIO, n: int) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (n, size, size, 3)}
        np.lib.format.write_array_header_1_0(file, header)

    with atomic_write(target) as file:
        write_header(file, len(names))
        for name, pixels in bar:
            if isinstance(pixels, UserError):
                raise pixels
            if pixels is None:
                skipped.append(name)
            else:
                file.write(pixels.tobytes())
        if len(skipped) == len(names):
            raise UserError(f"none of the {len(names)} images in {dataroot} can be read")
        # NumPy pads the header, so that one of fewer images has the same length.
        file.seek(0)
        write_header(file, len(names) - len(skipped))
        write_json(target.with_suffix(".json"), {"skipped": skipped})


def read_array(target: Path, size: int, n_files: int) -> tuple[np.ndarray, list[str]] | None:
    """What `build_array` wrote: the array, memory-mapped, and skipped names. None if damaged."""
    try:
        skipped = json.loads(target.with_suffix(".json").read_text())["skipped"]
        array = np.load(target, mmap_mode="r") if target.is_file() else None
        n_bytes = array.offset + array.nbytes
        shape = (n_files - len(skipped), size, size, 3)
        whole = array.dtype == np.uint8 and array.shape == shape
        return (array, skipped) if whole and target.stat().st_size == n_bytes else None
    except Exception:  # NumPy fails on broken files in many ways
        return None


def load_images(
    dataroot: Path,
    dataset: str,
    size: int,
    crop: int | None = None,
    workers: int = 1,
    cache_dir: Path | None = None,
) -> tuple[np.ndarray, str]:
    """All images of a folder, decoded, in order of their paths, and a digest of their listing.

    The array, uint8 (N, size, size, 3), is built on first use and mapped into memory ever after. It
    is a hidden file in `dataroot`, or in `cache_dir`, or, if `dataroot` cannot be written, in the
    user's cache folder. Its name has a digest of names, sizes and times of the files, so that it is
    built anew when they change. Any number of processes may ask for it at once.

    Args:
        dataset: `celebA` takes the central 140 pixels, `folder` the largest central square.
        crop: takes so many central pixels in place of that.
        workers: processes that decode.

    Raises:
        UserError: no image, none that can be read, one smaller than the crop, or no space.
    """
    files = find_images(dataroot)
    names = [name for name, _, _ in files]
    crop = crop or (CELEBA_CROP if dataset == "celebA" else None)
    if cache_dir is None and not os.access(dataroot, os.W_OK):
        try:
            cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wae"
        except RuntimeError:
            raise UserError(f"{dataroot} cannot be written: name a --cache_dir") from None
    folder = make_folder(cache_dir or dataroot)
    prefix = f".wae_{size}_{crop}_{digest(dataroot.resolve()) if cache_dir else 'here'}_"
    target = folder / f"{prefix}{digest(*files)}.npy"

    def usable() -> tuple[np.ndarray, list[str]] | None:
        found = read_array(target, size, len(files))
        skipped = Decoded([dataroot / name for name in found[1]], size, crop) if found else []
        # What could not be read before is tried again: a disk or a permission may be mended.
        return found if all(skipped[i] is None for i in range(len(skipped))) else None

    found = usable()
    if found is None:
        with lock(target.with_suffix(".lock"), wait=True):
            found = usable()
            if found is None:
                if target.exists():
                    warn(f"{target} is damaged or out of date: the images are decoded again")
                build_array(target, dataroot, names, size, crop, workers)
                found = read_array(target, size, len(files))
                for outdated in folder.glob(f"*{prefix}*"):
                    if outdated.stem != target.stem:
                        outdated.unlink(missing_ok=True)
    array, skipped = found
    if skipped:
        some = ", ".join(skipped[:10]) + (", ..." if len(skipped) > 10 else "")
        warn(f"skipped {len(skipped)} of {len(names)} images that cannot be read: {some}")
    # Times are left out: the same images may have been copied.
    return array, digest(*((name, n_bytes) for name, n_bytes, _ in files), *skipped)


def default_n_test(n_images: int) -> int:
    """Held-out images by default: a tenth, at most as many as CelebA's official test partition."""
    return max(2, min(n_images // 10, CELEBA_TEST_IMAGES))


def put_on_device(images: np.ndarray, device: torch.device) -> Images:
    """The array on the GPU if it fits in half of the free memory there; otherwise as it is."""
    if device.type != "cuda" or images.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return images
    resident = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for i in range(0, len(images), 4096):  # in pieces: it may be larger than this machine's memory
        resident[i : i + 4096] = torch.from_numpy(np.array(images[i : i + 4096]))
    return resident


def epoch_order(n_images: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation in which an epoch visits the images, a function of seed and epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n_images)


def batches(
    images: Images, indices: Iterable[np.ndarray], device: torch.device, ahead: int = 3
) -> Iterator[Tensor]:
    """Batches images[i] for each array of indices i: uint8 (n, S, S, 3) on the device.

    From memory-mapped images a thread gathers `ahead` batches in advance, into pinned memory when
    they go to a GPU.
    """
    if isinstance(images, Tensor):
        for index in indices:
            yield images[torch.from_numpy(index).to(device, non_blocking=True)]
        return

    def gather(index: np.ndarray) -> Tensor:
        batch = torch.from_numpy(images[index])
        return batch.pin_memory() if device.type == "cuda" else batch

    with ThreadPoolExecutor(1) as thread:
        queue: deque = deque()
        try:
            for index in indices:
                queue.append(thread.submit(gather, index))
                if len(queue) > ahead:
                    yield queue.popleft().result().to(device, non_blocking=True)
            while queue:
                yield queue.popleft().result().to(device, non_blocking=True)
        finally:
            thread.shutdown(cancel_futures=True)


def from_uint8(batch: Tensor, symmetric: bool) -> Tensor:
    """Pixels (n, S, S, 3) as float32 (n, 3, S, S) in [0, 1] or, if `symmetric`, in [-1, 1]."""
    x = batch.permute(0, 3, 1, 2).float()
    return x.div_(127.5).sub_(1) if symmetric else x.div_(255)


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (n, 3, S, S) in [0, 1] as pixels (n, S, S, 3)."""
    return (images.clamp(0, 1) * 255 + 0.5).byte().permute(0, 2, 3, 1).cpu().numpy()


# --------------------------------------------------------------------------------------------------
# Seeds and processes


def set_seed(*key: int | str) -> None:
    """Seeds PyTorch's generators by a purpose and a place in the run: (seed, "noise", step).

    The randomness of a step is a function of its place, so a resumed run needs no generator state,
    and an evaluation in between changes nothing.
    """
    torch.manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1)


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class World:
    """This process among those that train together, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0


def started_by_torchrun() -> bool:
    """Whether all of torchrun's variables are set; other programs set some of them."""
    names = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return names <= os.environ.keys()


def is_main_process() -> bool:
    """Whether this process is the one that speaks, also before it has joined the others."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


def get_world(cuda: bool, gpu_id: int) -> World:
    """This process's place and device. Raises UsageError: no GPU, or not the one asked for."""
    if not started_by_torchrun():
        return World(0, 1, pick_device(cuda, gpu_id))
    rank, local_rank, size = (int(os.environ[k]) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    end_with_parent()
    return World(rank, size, pick_device(cuda, local_rank))


def join(world: World) -> None:
    """Joins the other processes, if there are any: by NCCL on GPUs, by gloo on CPUs."""
    if started_by_torchrun():
        cuda = world.device.type == "cuda"
        device = world.device if cuda else None
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device)


def end_with_parent() -> None:
    """Ends this process when the one that launched it ends, even by SIGKILL."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def wait_for_torchrun() -> None:
    """Gives torchrun time to end this process, if another one has failed before and said why."""
    if started_by_torchrun():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(30)


def leave_world() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def pick_device(cuda: bool, gpu_id: int) -> torch.device:
    """The CPU, or the GPU of that number. Raises UsageError if it is not there."""
    if not cuda:
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise UsageError("--cuda: PyTorch finds no CUDA GPU; leave it out to train on the CPU")
    if gpu_id >= count:
        raise UsageError(f"--gpu_id={gpu_id}: the {count} GPUs here are 0 to {count - 1}")
    device = torch.device("cuda", gpu_id)
    torch.cuda.set_device(device)
    return device


class Gather(torch.autograd.Function):
    """The rows of all processes in rank order, (n, ...) to (size n, ...), with gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: Tensor, world: World) -> Tensor:
    """The rows of all processes, differentiable; x itself if there is only one process."""
    return Gather.apply(x) if world.size > 1 else x


def all_equal(value: Any, world: World) -> bool:
    """Whether all processes have the same value."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return all(other == value for other in values)


def average(values: Tensor, world: World) -> Tensor:
    """The mean over processes, for reporting."""
    values = values / world.size
    if world.size > 1:
        dist.all_reduce(values)
    return values


# --------------------------------------------------------------------------------------------------
# Signals and messages


def exit_at_once(signum: int, _frame: object) -> None:
    """Ends the program, as a signal handler. No file is half-written, so nothing is cleaned up."""
    if is_main_process():
        os.write(2, b"\nmain.py: interrupted\n")
    os._exit(128 + signum)


class Stop:
    """Notes the first SIGINT or SIGTERM, so that a step can end with a checkpoint.

    A second signal ends the program at once; not so under torchrun, which passes on what a terminal
    sends to all processes anyway.
    """

    def __init__(self) -> None:
        self.signum = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, signum: int, _frame: object) -> None:
        self.signum = self.signum or signum
        message = b"stopping soon"
        if not started_by_torchrun():
            self.close()
            message = b"stopping after this step; Ctrl-C again stops at once"
        if is_main_process():
            os.write(2, b"\nmain.py: %s\n" % message)

    def close(self) -> None:
        """Lets the next signal end the program."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, exit_at_once)

    def agreed(self, world: World) -> int:
        """The signal that any process got, or 0; all processes call this at the same step."""
        if world.size == 1:
            return self.signum
        signum = torch.tensor(self.signum, device=world.device)
        dist.all_reduce(signum, dist.ReduceOp.MAX)
        return int(signum)


class Output:
    """A text stream that drops what it cannot write: a closed pipe must not end a training."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115
        self.stream.reconfigure(errors="backslashreplace", line_buffering=True)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def warn(message: str) -> None:
    """Prints a line to standard error, clear of the progress bar, in the main process."""
    if is_main_process():
        tqdm.write(f"main.py: {message}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replaces `path` by the state. Raises UserError if it cannot be written."""
    content = io.BytesIO()
    torch.save(state, content)
    with atomic_write(path) as file:
        file.write(content.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU: tensors and plain values only, so that no code is executed.

    Raises:
        UserError: no such file, or not a checkpoint.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.load warns about files that it does not know
            state = torch.load(path, map_location="cpu", weights_only=True)
        sound = all(isinstance(state[name], kind) for name, kind in CHECKPOINT_KINDS.items())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch.load and pickle fail on broken files in many ways
        name = type(error).__name__
        raise UserError(f"{path}: not a whole checkpoint of this program ({name})") from error
    if not sound or state["step"] < 0:
        raise UserError(f"{path}: not a checkpoint of this program")
    return state


def load_adam(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Copies the moments of an Adam; its settings stay. Raises ValueError if they do not fit."""
    saved, mine = state["state"], optimizer.state_dict()
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {}
    for i, weight in enumerate(weights):
        moments[i] = {"step": torch.tensor(float(saved[i]["step"]))}
        for name in ("exp_avg", "exp_avg_sq"):
            if saved[i][name].shape != weight.shape:
                raise ValueError(f"{name} of another shape")
            # The fused Adam relies on the memory layout of the weight.
            moments[i][name] = torch.empty_like(weight).copy_(saved[i][name])
    optimizer.load_state_dict(mine | {"state": moments})


def weights_are_sound(networks: Iterable[nn.Module]) -> bool:
    """Whether all weights and statistics are finite and of a plausible size."""
    tensors = [t for network in networks for t in network.state_dict().values()]
    largest = torch.stack([t.abs().max().float() for t in tensors if t.is_floating_point()]).max()
    return bool(largest < LARGEST_WEIGHT)  # not so for nan


# --------------------------------------------------------------------------------------------------
# The log


class Log:
    """`log.csv`, a row at a time, and the same numbers in TensorBoard if asked for.

    `text`, all that was logged so far, goes into each checkpoint. A resumed run starts from it, so
    that rows written after the last checkpoint are replaced and not repeated.
    """

    def __init__(
        self,
        folder: Path,
        columns: Sequence[str],
        text: str = "",
        step: int = 0,
        tensorboard: bool = False,
    ):
        self.path, self.columns = folder / "log.csv", columns
        self.text = text or ",".join(columns) + "\n"
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder), purge_step=step + 1)
        self.rewrite()

    def rewrite(self) -> None:
        """Replaces the file by the whole log."""
        with atomic_write(self.path) as file:
            file.write(self.text.encode())

    def add(self, **values: float) -> None:
        """Appends a row; columns without a value stay empty."""
        line = io.StringIO()
        csv.DictWriter(line, self.columns, lineterminator="\n").writerow(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}
        )
        self.text += line.getvalue()
        with writing(self.path), open(self.path, "a") as file:
            file.write(line.getvalue())
        for name, value in values.items():
            if self.board and name not in ("epoch", "step"):
                self.board.add_scalar(name, value, values["step"])

    def add_picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Shows a picture in TensorBoard."""
        if self.board:
            self.board.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Leaves a whole `log.csv`, whatever happened to it, and flushes TensorBoard's file."""
        self.rewrite()
        if self.board:
            self.board.close()


# --------------------------------------------------------------------------------------------------
# Pictures


def grid(images: Tensor, columns: int) -> Image.Image:
    """A picture of images (N, 3, S, S) in [0, 1], row by row."""
    canvas = make_grid(images.clamp(0, 1), nrow=columns, padding=2, pad_value=1)
    return Image.fromarray(to_uint8(canvas[None])[0])


def save_picture(path: Path, picture: Image.Image) -> None:
    """Replaces `path` by the picture as PNG."""
    with atomic_write(path) as file:
        picture.save(file, "PNG")


def write_images(folder: Path, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Passes on batches of images (n, 3, S, S) in [0, 1], and writes them as 00000.png and on.

    They take the place of the folder when the last one is written; until then it stays as it is.
    """
    new, old = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    make_folder(new)
    count = 0
    for images in batches:
        for pixels in to_uint8(images):
            path = new / f"{count:05d}.png"
            with writing(path):
                Image.fromarray(pixels).save(path)
            count += 1
        yield images
    with writing(folder):
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def scatter(first: np.ndarray, second: np.ndarray) -> Image.Image:
    """Two clouds of points in the plane, (N, 2) each: orange, and blue on top of it."""
    side, reach = 300, np.abs(np.concatenate([first, second])).max() + 1e-9
    canvas = np.full((side, side, 3), 255, np.uint8)
    canvas[side // 2], canvas[:, side // 2] = 225, 225  # the axes
    for points, colour in ((first, (255, 127, 14)), (second, (31, 119, 180))):
        x, y = (np.round((points / reach * [1, -1] + 1) / 2 * (side - 1)).astype(int)).T
        canvas[y, x] = colour
    return Image.fromarray(canvas).resize((2 * side, 2 * side), Image.Resampling.NEAREST)


# --------------------------------------------------------------------------------------------------
# Metrics


def sharpness(images: Tensor) -> Tensor:
    """Variance of each image after a Laplace filter, for images (N, 3, S, S) in [0, 1], as (N,).

    The paper's measure of blur (section 4), on grey values: a blurred image has weak edges.
    """
    grey = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
    laplace = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], device=images.device)
    filtered = F.conv2d((images * grey).sum(1, keepdim=True), laplace.view(1, 1, 3, 3))
    return filtered.flatten(1).var(1, correction=0)


class Inception:
    """The network of the Frechet inception distance, by the optional package pytorch-fid.

    Raises:
        UserError: its weights cannot be downloaded.
    """

    def __init__(self, device: torch.device):
        from pytorch_fid.fid_score import calculate_frechet_distance
        from pytorch_fid.inception import InceptionV3

        self.distance, self.device = calculate_frechet_distance, device
        try:
            self.network = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).to(device).eval()
        except (OSError, RuntimeError) as error:
            raise UserError(f"--fid: no weights of the Inception network: {error}") from error

    @torch.no_grad()
    def features(self, images: Tensor) -> np.ndarray:
        """Features (n, 2048) of images (n, 3, S, S) in [0, 1], seen as the PNG files have them."""
        pixels = torch.from_numpy(to_uint8(images)).to(self.device)
        return self.network(from_uint8(pixels, False))[0].flatten(1).cpu().numpy()

    def fid(self, a: np.ndarray, b: np.ndarray) -> float:
        """The distance between two sets of features, (N, 2048) and (M, 2048)."""
        moments = [m for f in (a, b) for m in (f.mean(0), np.cov(f, rowvar=False))]
        return float(self.distance(*moments))
