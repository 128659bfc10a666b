"""What any training run needs: files, images, seeds, processes, checkpoints, a log, pictures.

Nothing here knows what an auto-encoder is. `main.py` puts these functions together with `model.py`.
"""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

try:
    import fcntl
except ImportError:
    sys.exit("main.py needs Linux, macOS or WSL: there are no file locks here")

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import make_grid
from tqdm import tqdm

Images = np.ndarray | Tensor  # uint8, (N, S, S, C), on disk or on a GPU

CELEBA_CROP = 140  # the central square of an aligned CelebA image that the paper keeps, in pixels
CELEBA_TEST_IMAGES = 19_962  # the official test partition, the last images by name

# Endings of the image files that are read.
ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
ENDINGS += (".ppm", ".pgm", ".pbm", ".tga", ".jp2", ".avif")

# No trained weight comes near this; beyond it a run has diverged.
LARGEST_WEIGHT = 1e6


class UserError(Exception):
    """An error that the user can fix: one line, exit status 1. Any function here may raise it."""

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
    """A file that replaces `path` when the block ends: whole and flushed, or not at all."""
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

    Where another process has the lock, it waits or, without `wait`, raises UserError.
    """
    with writing(path):
        file = open(path, "a+", errors="replace")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = f"{path.parent} is in use by process {file.read().strip()}"
        if not wait:
            raise UserError(f"{owner}: wait for it, or choose another folder") from None
        warn(f"{owner}: waiting for it")
        fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError:
        return file  # some network file systems have no locks
    file.truncate(0)
    print(os.getpid(), file=file, flush=True)
    return file


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces `path` by the content as indented JSON."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Replaces `path` by a table."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))


# --------------------------------------------------------------------------------------------------
# Images: decoded once into one array on disk, which training maps into memory


def find_images(dataroot: Path) -> list[tuple[str, int, int]]:
    """Path in `dataroot`, size and time of change of each image in a folder inside it, by path.

    Hidden files and folders are left out: they belong to other programs.
    """
    layout = f"images must lie in a folder inside it, as in {dataroot}/sub_directory/XXX.jpg"
    if not dataroot.is_dir():
        raise UserError(f"--dataroot={dataroot}: no such folder; {layout}")
    files: list[tuple[str, int, int]] = []
    others: Counter[str] = Counter()
    seen: dict[tuple[int, int], str] = {}

    def walk(folder: str, prefix: str) -> None:
        status = os.stat(folder)
        first = seen.setdefault((status.st_dev, status.st_ino), folder)
        if first != folder:
            raise UserError(
                f"--dataroot={dataroot}: {folder} is {first} again, by a link; remove the link"
            )
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            warn(f"skipped the folder {folder}: {error.strerror}")
            return
        for entry in entries:
            name, ending = prefix + entry.name, os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                walk(entry.path, name + "/")
            elif prefix and ending in ENDINGS:
                try:
                    status = entry.stat()
                    files.append((name, status.st_size, status.st_mtime_ns))
                except OSError:  # a link that leads nowhere: decoding will say so
                    files.append((name, 0, 0))
            elif prefix:
                others[ending or "none"] += 1

    walk(str(dataroot), "")
    found = ", ".join(f"{ending} ({n})" for ending, n in others.most_common(5))
    left_out = f"files with other endings than {' '.join(ENDINGS)} are left out: {found}"
    if not files:
        hint = f"{layout}; {left_out}" if others else layout
        raise UserError(f"--dataroot={dataroot}: no image in a folder inside it; {hint}")
    if others:
        warn(left_out)
    return sorted(files)


def digest(*parts: Any) -> str:
    """Sixteen hexadecimal digits that depend on all parts, for names and comparisons."""
    text = "\n".join(map(str, parts))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def open_image(file: BinaryIO, channels: int) -> Image.Image:
    """An image file, upright, in 8 bits of RGB (3 channels) or grey (1); on white if transparent.

    Raises:
        ValueError: pixels of 32 bits or floating point, whose range only their author knows.
        Exception: whatever Pillow makes of a file that is not a whole image.
    """
    with Image.open(file) as image:
        kind = image.format
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        # 16 bits of grey, which Pillow would clip to 8.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("32-bit pixels, whose range is unknown")
    if image.mode.endswith(("A", "a")) or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB" if channels == 3 else "L")


def central_square(image: Image.Image, size: int, crop: int | None) -> np.ndarray:
    """The central `crop` pixels of an image, or the largest square: uint8 (size, size, C)."""
    side = crop or min(image.size)
    if min(image.size) < side:
        pixels = " x ".join(map(str, image.size))
        hint = "use another --crop, or --dataset=folder"
        raise UserError(f"{pixels} pixels, less than the crop of {side} x {side}; {hint}")
    left, top = ((length - side) // 2 for length in image.size)
    square = image.crop((left, top, left + side, top + side))
    # Lanczos, as the official implementation; sharpness and FID depend on it.
    pixels = np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))
    return pixels.reshape(size, size, -1)


class Decoded(Dataset):
    """Decodes image files.

    Items are the pixels, or the error; a checksum of the file; and whether the crop is less than
    half of the image's shorter side.
    """

    def __init__(self, paths: list[Path], size: int, crop: int | None, channels: int):
        self.paths, self.size, self.crop, self.channels = paths, size, crop, channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[np.ndarray | Exception, int, bool]:
        path, checksum = self.paths[i], 0
        try:
            if not path.is_file():  # a pipe would be waited for
                raise OSError("not a file")
            content = path.read_bytes()
            checksum = zlib.crc32(content)
            image = open_image(io.BytesIO(content), self.channels)
            pixels = central_square(image, self.size, self.crop)
            return pixels, checksum, bool(self.crop) and 2 * self.crop < min(image.size)
        except UserError as error:
            return UserError(f"{path}: {error}"), checksum, False
        except Exception as error:  # Pillow fails on broken files in many ways
            return ValueError(str(error)), checksum, False


def start_worker(_number: int) -> None:
    """Prepares a worker: Ctrl-C is the main process's, and Pillow's warnings are silenced."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    end_with_parent()  # or it would wait for ever for somebody to take what it has decoded


def build_array(target: Path, images: Decoded, names: list[str], workers: int) -> None:
    """Decodes the images into `target`, a file of their pixels alone.

    A .json beside it has the names that are skipped, with the reason, a digest of names and file
    contents, and how many images are more than twice as large as the crop.
    """
    n, free = len(names), shutil.disk_usage(target.parent).free
    n_bytes = n * images.size**2 * images.channels
    if n_bytes > free:
        need = f"{n} decoded images take {n_bytes / 1e9:.1f} GB in {target.parent}"
        raise UserError(f"{need}, where {free / 1e9:.1f} GB are free; name another --cache_dir")
    skipped, checksums, too_large = {}, [], 0
    try:
        workers = min(workers, math.ceil(n / 64))
        loader = DataLoader(
            images, 64, num_workers=workers, collate_fn=list, worker_init_fn=start_worker
        )
        batches = iter(loader)  # starts the workers, outside of what names the disk in its errors
        items = (item for batch in batches for item in batch)
        bar = progress(zip(names, items, strict=True), "decoding once", n, unit="img")
        with atomic_write(target) as file:
            for name, (pixels, checksum, is_large) in bar:
                if isinstance(pixels, UserError):
                    raise pixels
                checksums.append(checksum)
                too_large += is_large
                if isinstance(pixels, Exception):
                    skipped[name] = str(pixels)
                else:
                    file.write(pixels.tobytes())
            if len(skipped) == n:
                raise UserError(f"none of the {n} images can be read: {names[0]} ({pixels})")
            notes = {"skipped": skipped, "digest": digest(*zip(names, checksums, strict=True))}
            write_json(target.with_suffix(".json"), notes | {"too_large": too_large})
    except (OSError, RuntimeError) as error:  # of the workers: no memory, or too many processes
        hint = "use fewer --workers, or --workers=0"
        raise UserError(f"the processes that decode cannot go on ({error}); {hint}") from error


def read_array(
    target: Path, n_files: int, shape: tuple[int, ...]
) -> tuple[np.ndarray, dict[str, Any]] | None:
    """What `build_array` wrote: the array, memory-mapped, and the notes. None if damaged."""
    try:
        notes = json.loads(target.with_suffix(".json").read_text())
        shape = (n_files - len(notes["skipped"]), *shape)
        if target.stat().st_size == math.prod(shape):
            return np.memmap(target, np.uint8, "r", shape=shape), notes
    except FileNotFoundError:
        return None
    except OSError as error:
        hint = "name another --cache_dir"
        raise UserError(f"cannot map {target} into memory ({error}): {hint}") from error
    except (ValueError, KeyError, TypeError):
        pass
    return None


def load_images(
    dataroot: Path,
    dataset: str = "folder",
    size: int = 64,
    crop: int | None = None,
    workers: int = 0,
    cache_dir: Path | None = None,
    channels: int = 3,
) -> tuple[np.ndarray, list[str], str]:
    """All images of a folder, decoded, in order of their paths; their names; and a digest of them.

    The array, uint8 (N, size, size, channels), is built on first use and mapped into memory ever
    after. It is a hidden file in `dataroot` or `cache_dir` or, if `dataroot` cannot be written, in
    the user's cache folder. Its name has a digest of names, sizes and times of the files, so that
    it is built again when they change. Any number of processes may ask for it at once. The digest
    that is returned is of names and contents, and so a copy has the same.

    Args:
        dataset: `celebA` takes the central 140 pixels, `folder` the largest central square.
        crop: takes so many central pixels in place of that.
        workers: processes that decode; 0 decodes in this one.
        channels: 3 for RGB, 1 for grey.
    """
    files = find_images(dataroot)
    names = [name for name, _, _ in files]
    crop = crop or (CELEBA_CROP if dataset == "celebA" else None)
    if cache_dir is None and not os.access(dataroot, os.W_OK):
        try:
            cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wae"
            make_folder(cache_dir)
        except (RuntimeError, UserError) as error:
            hint = "name a --cache_dir for the decoded images"
            raise UserError(f"--dataroot={dataroot} cannot be written: {hint}") from error
    folder = make_folder(cache_dir or dataroot)
    home = digest(dataroot.resolve()) if cache_dir else "here"
    prefix = f".wae_{size}_{channels}_{crop}_{home}"
    target, shape = folder / f"{prefix}_{digest(*files)}.u8", (size, size, channels)
    # One lock for all versions of the array: who holds it may remove those that are outdated.
    with lock(folder / f"{prefix}.lock", wait=True):
        found = read_array(target, len(files), shape)
        if found is None:
            if target.exists():
                warn(f"{target} is damaged or out of date: the images are decoded again")
            images = Decoded([dataroot / name for name in names], size, crop, channels)
            build_array(target, images, names, workers)
            found = read_array(target, len(files), shape)
            for old in folder.glob(f"*{prefix}_*"):
                if old.stem != target.stem:
                    old.unlink(missing_ok=True)
    array, notes = found
    if skipped := notes["skipped"]:
        some = ", ".join(list(skipped)[:10]) + (", ..." if len(skipped) > 10 else "")
        counts = f"{len(skipped)} of {len(names)} images that cannot be read"
        warn(f"skipped {counts}: {some} ({next(iter(skipped.values()))})")
    if 2 * notes["too_large"] > len(names):
        hint = "--dataset=folder takes the largest central square"
        warn(f"most images are more than twice as large as the crop of {crop} pixels; {hint}")
    return array, [name for name in names if name not in skipped], notes["digest"]


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
    """Batches images[i] for each array of indices i: uint8 (n, S, S, C) on the device.

    From memory-mapped images a thread gathers `ahead` batches in advance, into pinned memory when
    they go to a GPU.
    """
    if isinstance(images, Tensor):
        for index in indices:
            yield images[torch.from_numpy(index).to(device, non_blocking=True)]
        return

    def read(index: np.ndarray) -> Tensor:
        batch = torch.from_numpy(images[index])
        return batch.pin_memory() if device.type == "cuda" else batch

    # A thread starts with GPU 0, and would take memory there.
    prepare = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    with ThreadPoolExecutor(1, initializer=prepare) as thread:
        queue: deque = deque()
        try:
            for index in indices:
                queue.append(thread.submit(read, index))
                if len(queue) > ahead:
                    yield queue.popleft().result().to(device, non_blocking=True)
            while queue:
                yield queue.popleft().result().to(device, non_blocking=True)
        finally:
            thread.shutdown(cancel_futures=True)


def from_uint8(batch: Tensor, symmetric: bool) -> Tensor:
    """Pixels (n, S, S, C) as float32 (n, C, S, S) in [0, 1] or, if `symmetric`, in [-1, 1]."""
    x = batch.permute(0, 3, 1, 2).float()
    return x.div_(127.5).sub_(1) if symmetric else x.div_(255)


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (n, C, S, S) in [0, 1] as pixels (n, S, S, C)."""
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


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16; without, it is much slower than float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class World(NamedTuple):
    """Rank, number of processes and device of this process."""

    rank: int
    size: int
    device: torch.device


def is_main() -> bool:
    """Whether this is rank 0, which writes and speaks; also before it has joined the others."""
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


def get_world(cuda: bool, gpu_id: int) -> World:
    """This process's place and device. Raises UsageError: no GPU, or not the one asked for."""
    if not dist.is_torchelastic_launched():
        return World(0, 1, pick_device(cuda, gpu_id))
    rank, local_rank, size = (int(os.environ[k]) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    end_with_parent()
    return World(rank, size, pick_device(cuda, local_rank))


def join(world: World) -> None:
    """Joins the other processes, if there are any: by NCCL on GPUs, by gloo on CPUs."""
    if not dist.is_torchelastic_launched():
        return
    cuda = world.device.type == "cuda"
    # While it waits for the others, which is not in Python, only the default action ends it.
    handle_signals(signal.SIG_DFL)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=world.device if cuda else None)
    handle_signals(exit_at_once)


def copy_from_main(network: nn.Module, world: World) -> None:
    """Gives all processes the weights that rank 0 has."""
    for tensor in network.state_dict().values() if world.size > 1 else ():
        dist.broadcast(tensor, 0)


def end_with_parent() -> None:
    """Ends this process when the one that launched it ends, even by SIGKILL."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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


def all_values(value: Any, world: World) -> list[Any]:
    """The value that each process has, in rank order."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def average(values: Tensor, world: World) -> Tensor:
    """The mean over processes, for reporting."""
    values = values / world.size
    if world.size > 1:
        dist.all_reduce(values)
    return values


class Recorded:
    """`step(*inputs)`, recorded as a CUDA graph at the fourth call and replayed from then on.

    Python launches the kernels of a step one by one, and a large GPU is done sooner than Python:
    it waits most of the time. A graph launches them all at once. The first calls are ordinary ones,
    on a stream of their own, as recording needs it; in them cuDNN and the compiler make their
    choices. If the step cannot be recorded, it says so once and stays as it is.

    Args:
        step: takes tensors of always the same shapes and returns one. It must not wait for the GPU,
            and whatever else changes between steps must stay at one place in memory.
    """

    WARM_UP = 3

    def __init__(self, step: Callable[..., Tensor]):
        self.step, self.calls, self.graph = step, 0, None
        self.stream = torch.cuda.Stream()

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= self.WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                output = self.step(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return output
        if self.calls == self.WARM_UP + 1:
            self.record(*inputs)
        if self.graph is None:
            return self.step(*inputs)
        for recorded, new in zip(self.inputs, inputs, strict=True):
            recorded.copy_(new)
        self.graph.replay()
        return self.output.clone()

    def record(self, *inputs: Tensor) -> None:
        """Records the step, which does not run it; `graph` stays None if that fails."""
        self.inputs = [tensor.clone() for tensor in inputs]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        generator = torch.cuda.default_generators[stream.device.index]
        seed = generator.initial_seed()
        try:
            # Thread-local: meanwhile, the thread of `batches` may ask for pinned memory.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.output = self.step(*self.inputs)
            self.graph = graph
        except RuntimeError as error:
            # The error is that of ending the recording, and its context says why it failed. It
            # leaves behind its stream and a generator that counts for the graph.
            torch.cuda.set_stream(stream)
            generator.graphsafe_set_state(torch.Generator(stream.device).graphsafe_get_state())
            generator.manual_seed(seed)
            reason = str(error.__context__ or error).splitlines()[0]
            warn(f"the step is not recorded as a CUDA graph, and so it is slower: {reason}")


# --------------------------------------------------------------------------------------------------
# Signals and messages

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handle_signals(handler: Callable[[int, Any], None]) -> None:
    """Sets the handler of Ctrl-C, SIGTERM and a closed terminal; nohup's choice of it stays."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def tell(message: str) -> None:
    """Writes a line from a signal handler: at once, and whether anybody reads it or not."""
    if is_main():
        with contextlib.suppress(OSError):
            os.write(2, f"\nmain.py: {message}\n".encode())


def exit_at_once(signum: int, _frame: object) -> None:
    """Ends the program, as a signal handler. No file is half-written, so nothing is cleaned up."""
    tell("interrupted")
    os._exit(128 + signum)


class Stop:
    """Notes the first signal, so that a step can end with a checkpoint.

    A second signal ends the program at once; not so under torchrun, which passes on what a terminal
    sends to all processes anyway.
    """

    def __init__(self) -> None:
        self.signum = 0
        handle_signals(self.note)

    def note(self, signum: int, _frame: object) -> None:
        self.signum = self.signum or signum
        if dist.is_torchelastic_launched():
            tell("stopping soon")
        else:
            self.close()
            tell("stopping after this step; Ctrl-C again stops at once")

    def close(self) -> None:
        """Lets the next signal end the program."""
        handle_signals(exit_at_once)

    def agreed(self, world: World) -> int:
        """The signal that any process got, or 0; all processes call this at the same step."""
        if world.size == 1:
            return self.signum
        signum = torch.tensor(self.signum, device=world.device)
        dist.all_reduce(signum, dist.ReduceOp.MAX)
        return int(signum)


class Output:
    """A text stream that drops what it cannot write: a closed terminal must not end a training.

    In a file, a progress bar is one line after another.
    """

    def __init__(self, stream: TextIO | None):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115
        if hasattr(self.stream, "reconfigure"):  # not so in a notebook
            self.stream.reconfigure(errors="backslashreplace", line_buffering=True)

    def write(self, text: str) -> int:
        if text.startswith("\r") and not self.stream.isatty():
            bar = text.strip()
            text = bar and bar + "\n"
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def progress(items: Iterable, name: str, total: int, leave: bool = True, **options: Any) -> tqdm:
    """The items, with a progress bar; a line a minute where standard error is no terminal."""
    tty = sys.stderr.isatty()
    options |= {"disable": not is_main(), "mininterval": 0.1 if tty else 60, "leave": tty and leave}
    return tqdm(items, name, total, **options)


def printable(text: str) -> str:
    """The text as one line, whatever the file names in it are."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def warn(message: str) -> None:
    """Prints a line to standard error, clear of the progress bar, in the main process."""
    if is_main():
        tqdm.write(f"main.py: {printable(message)}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replaces `path` by the state. Raises UserError if it cannot be written."""
    content = io.BytesIO()
    torch.save(state, content)
    with atomic_write(path) as file:
        file.write(content.getbuffer())


def load_checkpoint(path: Path, *needed: str) -> dict[str, Any]:
    """A checkpoint with the keys `needed`, on the CPU. Plain values only: no code is run."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.load warns about files that it does not know
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch.load and pickle fail on broken files in many ways
        name = type(error).__name__
        raise UserError(f"{path}: not a whole checkpoint of this program ({name})") from error
    if not isinstance(state, dict) or not set(needed) <= state.keys():
        raise UserError(f"{path}: not a checkpoint of this program")
    return state


def weights_are_sound(state: dict[str, Tensor]) -> bool:
    """Whether all numbers in the state of a network are finite and below 1e6."""
    largest = [t.abs().max().float() for t in state.values() if t.is_floating_point()]
    return bool(torch.stack(largest).max() < LARGEST_WEIGHT)  # not so for nan


# --------------------------------------------------------------------------------------------------
# The log


class Log:
    """`log.csv`, a row at a time, and the same numbers in TensorBoard if asked for.

    `text`, all that was logged so far, goes into each checkpoint. A resumed run starts from it, so
    that rows written after the last checkpoint are replaced and not repeated.
    """

    def __init__(
        self, folder: Path, columns: Sequence[str], text: str, step: int, tensorboard: bool
    ):
        self.path, self.columns = folder / "log.csv", columns
        self.text = text or ",".join(columns) + "\n"
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder), purge_step=step + 1)
        with atomic_write(self.path) as file:
            file.write(self.text.encode())

    def add(self, **values: float) -> None:
        """Appends a row; columns without a value stay empty."""
        cells = (values.get(name, "") for name in self.columns)
        line = ",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in cells) + "\n"
        self.text += line
        with writing(self.path), open(self.path, "a") as file:
            file.write(line)
        for name, value in values.items():
            if self.board and name not in ("epoch", "step"):
                self.board.add_scalar(name, value, values["step"])

    def add_picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Shows a picture in TensorBoard."""
        if self.board:
            self.board.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Flushes TensorBoard's file."""
        if self.board:
            self.board.close()


# --------------------------------------------------------------------------------------------------
# Pictures


def grid(images: Tensor, columns: int) -> Image.Image:
    """A picture of images (N, C, S, S) in [0, 1], row by row."""
    canvas = make_grid(images.clamp(0, 1), nrow=columns, padding=2, pad_value=1)
    return Image.fromarray(to_uint8(canvas[None])[0])


def save_picture(path: Path, picture: Image.Image) -> None:
    """Replaces `path` by the picture as PNG."""
    with atomic_write(path) as file:
        picture.save(file, "PNG")


def write_images(folder: Path, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Passes on batches of images (n, C, S, S) in [0, 1], and writes them as 00000.png and on.

    They take the place of the folder when the last one is written; until then it stays as it is.
    """
    folder = folder.resolve()  # a link may lead to a larger disk
    if folder.exists():
        for path in folder.iterdir():
            if not re.fullmatch(r"\d{5,}\.png", path.name):
                raise UserError(f"{path} is not of this program; move it, or choose another --outf")
    new, old = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    make_folder(new)
    count = 0
    for images in batches:
        for pixels in to_uint8(images):
            path = new / f"{count:05d}.png"
            with writing(path):
                Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path)
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
# The network of the Frechet inception distance


class Inception:
    """Features of images, by the optional package pytorch-fid."""

    def __init__(self, device: torch.device):
        from pytorch_fid import inception

        self.device, network = device, inception.InceptionV3
        try:
            self.network = network([network.BLOCK_INDEX_BY_DIM[2048]]).to(device).eval()
        except (OSError, RuntimeError) as error:
            url, folder = inception.FID_WEIGHTS_URL, f"{torch.hub.get_dir()}/checkpoints"
            hint = f"download {url} by hand and put it into {folder}"
            message = f"--fid: no weights of the Inception network: {error}"
            raise UserError(f"{message}; {hint}") from error

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features (n, 2048) of images (n, C, S, S) in [0, 1], seen as the PNG files have them."""
        pixels = torch.from_numpy(to_uint8(images)).to(self.device)
        x = from_uint8(pixels, symmetric=False)
        parts = x.expand(-1, 3, -1, -1).split(128)  # its layers are much larger than the images
        return torch.cat([self.network(part)[0].flatten(1) for part in parts])
