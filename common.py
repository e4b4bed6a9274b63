"""Data sets and image saving, shared by the five scripts.

data = load_data("photos/", size=64)               # a folder, or `faces`, `cifar10`, `mnist`
data.train, data.heldout                           # uint8 [M, 3, S, S]
save_grid("pairs.png", images, reconstructions)    # [N, 3, S, S] in [-1, 1]
"""

import csv
import math
import os
import random
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_pil_image

ATTRIBUTE_FILES = ("attributes.csv", "list_attr_celeba.csv", "list_attr_celeba.txt")


class DataError(ValueError):
    """Data that cannot be used; the message is one line that says what is wrong and what to do."""


class Data(NamedTuple):
    """A data set in a random order: the first nine tenths to train, the last tenth held out."""

    train: Tensor  # uint8 [M, 3, S, S]
    heldout: Tensor  # uint8 [H, 3, S, S]
    attributes: tuple[str, ...]  # names of the A yes/no attributes, () where the data has none
    train_labels: Tensor  # bool [M, A]
    heldout_labels: Tensor  # bool [H, A]
    paths: tuple[Path, ...]  # of the images, train then heldout; () where they come from no folder
    checksum: int  # of all images, so that --resume can tell whether they are still the same


def load_data(name, size, batch_size=1):
    """Read a whole data set into memory: a folder of images, or `faces`, or `cifar10`, `mnist`, downloaded to data/.

    size: side S of the square images in pixels. batch_size: the least number of images to train on. Returns Data, which
    takes 3 * S * S bytes an image. Raises DataError.
    """
    torchvision_sets = {"cifar10": torchvision.datasets.CIFAR10, "mnist": torchvision.datasets.MNIST}
    paths = ()
    if name == "faces":
        images, attributes, labels = draw_faces(10_000, size)
    elif name in torchvision_sets:
        images, attributes, labels = _load_torchvision(torchvision_sets[name], size)
    else:
        images, attributes, labels, paths = _load_folder(Path(name), size)
    split = len(images) - len(images) // 10
    if split < batch_size:
        raise DataError(f"{name} has {split} images to train on, fewer than --batch-size {batch_size}: lower that")
    checksum = zlib.crc32(images.numpy())
    return Data(images[:split], images[split:], tuple(attributes), labels[:split], labels[split:], paths, checksum)


def place_images(images, device):
    """Move images, uint8 [M, 3, S, S], to the torch.device, unless they would fill more than half of its free memory.
    This also decides from which device draw_images takes its random numbers: from that of the images."""
    fits = device.type != "cuda" or images.nbytes <= torch.cuda.mem_get_info(device)[0] / 2
    return images.to(device) if fits else images


def draw_images(images, count, device):
    """Draw count of the uint8 images [M, 3, S, S] at random, with replacement: [count, 3, S, S] on the torch.device."""
    return images[torch.randint(len(images), (count,), device=images.device)].to(device)


def to_float(images):
    """Images with values in [0, 255] -> float32 in [-1, 1], of any shape, on the same device."""
    return images.float() / 127.5 - 1


def read_image(path, size):
    """One image file -> uint8 [3, size, size]: upright, over white, the centre square, antialiased; of several
    frames the first. Raises what Pillow raises on a file that it cannot read."""
    with Image.open(path) as image:
        image.draft(None, (2 * size, 2 * size))  # a JPEG is decoded smaller, by 2, 4 or 8, but not below this
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
            grey = np.asarray(image, np.float32) / 257  # 65535 -> 255
            image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), (size, size))
        return pil_to_tensor(image)


def _load_folder(folder, size):
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give a folder of images, or faces, cifar10 or mnist")
    walk = os.walk(folder, followlinks=True)
    paths = sorted(Path(parent, name) for parent, _, names in walk for name in names if name not in ATTRIBUTE_FILES)
    random.Random(0).shuffle(paths)
    print(f"reading {len(paths)} files of {folder}", file=sys.stderr, flush=True)
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)

    def read(i):
        """Read the file at paths[i] into images[i]. Returns None, or what is wrong with it."""
        try:
            images[i] = read_image(paths[i], size)
        except Exception as error:  # Pillow's decoders raise many kinds
            return f"{paths[i]} ({error})"

    with ThreadPoolExecutor() as pool:
        errors = list(pool.map(read, range(len(paths))))
    skipped = [error for error in errors if error]
    if skipped:
        print(f"skipped {len(skipped)} that cannot be read: {', '.join(skipped[:3])}", file=sys.stderr)
        good = [i for i, error in enumerate(errors) if not error]
        images, paths = images[good], [paths[i] for i in good]
    if len(paths) < 20:  # of 20 two are held out, the fewest that the scripts' sample_diversity compares
        raise DataError(f"{folder} holds {len(paths)} readable images: give 20 or more")
    attributes, labels = _read_attributes(folder, paths)
    return images, attributes, labels, tuple(paths)


def _read_attributes(folder, paths):
    """Attribute names, and labels bool [M, A], of the images at paths. No names if there is no file, or if it
    lacks an image. The file is the first of ATTRIBUTE_FILES found in the folder, then in its folder Anno, then in the
    two folders above it in the same way."""
    nothing = [], torch.zeros(len(paths), 0, dtype=torch.bool)
    folder = Path(os.path.abspath(folder))
    above = (folder, *folder.parents[:2])
    places = [Path(place, inside, name) for place in above for inside in ("", "Anno") for name in ATTRIBUTE_FILES]
    file = next(filter(Path.is_file, places), None)
    if file is None:
        return nothing
    lines = file.read_text("utf-8-sig", "replace").splitlines()
    if file.suffix == ".txt":  # CelebA's: the number of images, the names, then a file name and 1 or -1 for each
        rows = [line.split() for line in lines[1:]]
        names = rows[0] if rows else []
    else:
        rows = list(csv.reader(lines))
        names = rows[0][1:] if rows else []  # the first column is of file names
    table = {}
    for row in rows[1:]:
        if len(row) == 1 + len(names) and {*row[1:]} <= {"0", "1", "-1"}:  # images with other rows are `missing` below
            table[row[0]] = [value == "1" for value in row[1:]]
    count = Counter(path.name for path in paths)

    def key_of(path):
        """The path from the attribute file's folder, if in table or if path.name is not unique; else path.name."""
        key = Path(os.path.relpath(path, file.parent)).as_posix()
        return key if key in table or count[path.name] > 1 else path.name

    keys = [key_of(path) for path in paths]
    missing = [key for key in keys if key not in table]
    if missing:
        missed = f"{len(missing)} of {len(paths)} images: {', '.join(missing[:3])}"
        print(f"without attributes: {file} has no row of {len(names)} values 0, 1 or -1 for {missed}", file=sys.stderr)
        return nothing
    return names, torch.tensor([table[key] for key in keys], dtype=torch.bool)


def _load_torchvision(dataset, size):
    try:
        source = dataset("data", download=True)
    except (OSError, RuntimeError) as error:
        advice = "put its files into data/, or give a folder of images"
        reason = str(error).splitlines()[0]
        raise DataError(f"{dataset.__name__} cannot be downloaded: {advice} ({reason})") from error
    order = random.Random(0).sample(range(len(source)), len(source))
    images = torch.as_tensor(source.data)[order]  # CIFAR-10 [M, 32, 32, 3], MNIST [M, 28, 28]
    images = images.permute(0, 3, 1, 2) if images.ndim == 4 else images[:, None]
    images = resize(images, [size, size], antialias=True).expand(-1, 3, -1, -1).contiguous()
    labels = F.one_hot(torch.as_tensor(source.targets)[order], len(source.classes))
    return images, source.classes, labels.bool()


def save_grid(path, *batches, groups_per_row=10, captions=()):
    """Save images as one picture, row by row; small ones enlarged by a whole factor, without blur.

    batches: one or more [N, 3, S, S] in [-1, 1] (clipped), on any device. Group i is image i of every batch, side by
    side: an original and its reconstruction, say. captions: captions[b][i] is written into the top-left corner of image
    i of batch b; there may be fewer captions than images or batches.
    """
    groups = []
    for images, texts in zip_longest(batches, captions, fillvalue=()):
        tiles = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
        factor = max(1, 64 // images.shape[-1])  # to 64 pixels
        tiles = F.interpolate(tiles, scale_factor=factor)  # nearest neighbour
        for tile, text in zip(tiles, texts):
            image = to_pil_image(tile)
            pen = ImageDraw.Draw(image)
            pen.rectangle(pen.textbbox((1, 0), text), "black")
            pen.text((1, 0), text, "white")
            tile.copy_(pil_to_tensor(image))  # changes tiles
        groups.append(tiles)
    grid = torchvision.utils.make_grid(torch.cat(groups, dim=-1), nrow=groups_per_row, padding=4, pad_value=255)
    to_pil_image(grid).save(path)


def draw_faces(count, size, seed=0):
    """Cartoon faces: images uint8 [count, 3, size, size], the names of the A attributes, labels bool [count, A].
    Image i depends on seed, i, size and Pillow's version alone."""
    print(f"drawing {count} faces", file=sys.stderr, flush=True)
    faces = [draw_face(random.Random(f"{seed} {i}"), size) for i in range(count)]
    images = torch.stack([pil_to_tensor(image) for image, parts in faces])
    labels = torch.tensor([[name in parts for name in FACE_ATTRIBUTES] for image, parts in faces])
    return images, FACE_ATTRIBUTES, labels


def draw_face(rng, size):
    """One face drawn with a random.Random: a Pillow image [size, size] and the set of its parts and attributes."""
    parts = {name for name, odds in ODDS.items() if rng.random() < odds} | {"face"}
    hair = int(rng.random() * len(HAIR))
    if "bald" in parts:
        parts -= {"long_hair", "bangs"}
    else:
        parts |= {"hair", HAIR[hair]}
    closed, opened = ("beaming", "laugh") if "smiling" in parts else ("stern", "gaping")
    parts.add(opened if "open_mouth" in parts else closed)
    colours = {"white": (255, 255, 255), "black": (28, 26, 34), "gold": (255, 214, 60)}
    for name, options in PALETTE.items():
        number = hair if name == "hair" else int(rng.random() * len(options))
        if name == "skin" and number == 0:
            parts.add("pale_skin")
        light = 0.95 + 0.1 * rng.random()
        warm = round(12 * (rng.random() - 0.5))
        for shade, factor in (("", 1), (" +", 0.94), (" -", 0.84), (" --", 0.55)):
            red, green, blue = (round(c * light * factor) for c in options[number])
            colours[name + shade] = (red + warm, green, blue - warm)  # Pillow clips them to [0, 255]

    # 250x250 pixels, with a margin of 40 around them for the tilt and the shift
    image = Image.new("RGB", (330, 330), colours["background"])
    pen = ImageDraw.Draw(image)
    across = 2.5 * (0.9 + 0.2 * rng.random())  # pixels per percent in x; in y they are always 2.5
    for part, colour, shape, (x0, y0, x1, y1), *arguments in FACE:
        if part not in parts:
            continue
        sides = [(x0, x1)]
        if x1 <= 50:
            sides.append((100 - x1, 100 - x0))  # mirrored
        for left, right in sides:
            box = [165 + (left - 50) * across, 40 + y0 * 2.5, 165 + (right - 50) * across, 40 + y1 * 2.5]
            getattr(pen, shape)(box, *arguments, fill=colours[colour], width=5)  # width: of arcs
    tilt = 0.3 * (rng.random() - 0.5)
    dx = 25 * (rng.random() - 0.5)
    dy = 20 * (rng.random() - 0.5)
    a, b = math.cos(tilt), math.sin(tilt)
    affine = (a, b, 165 + dx - (a + b) * 125, -b, a, 165 + dy - (a - b) * 125)
    image = image.transform((250, 250), Image.Transform.AFFINE, affine)  # (165 + dx, 165 + dy) goes to (125, 125)
    return image.resize((size, size), Image.Resampling.BOX), parts


# fmt: off
HAIR = ("black_hair", "brown_hair", "blond_hair", "red_hair")
ODDS = {"bald": 0.12, "long_hair": 0.4, "bangs": 0.4, "glasses": 0.3, "smiling": 0.5, "open_mouth": 0.35, "beard": 0.3,
        "hat": 0.2, "earrings": 0.25}
FACE_ATTRIBUTES = (*HAIR, *ODDS, "pale_skin")
CLOTHES = (200, 60, 66), (52, 96, 170), (60, 140, 96), (236, 236, 240), (90, 70, 120), (240, 160, 50)
BACKGROUNDS = (240, 192, 192), (244, 222, 170), (196, 228, 190), (176, 214, 236), (206, 190, 236), (170, 178, 190)
PALETTE = {
    "hair": ((38, 32, 36), (112, 70, 40), (238, 204, 112), (196, 78, 40)),
    "skin": ((246, 220, 202), (232, 184, 148), (192, 134, 94), (128, 84, 58)),
    "lips": ((176, 50, 60),), "background": BACKGROUNDS, "clothes": CLOTHES, "hat": CLOTHES,
    "eyes": ((86, 56, 36), (60, 110, 160), (70, 120, 70)),
}
# In drawing order: part, colour, shape, box in percent (on both sides if it ends left of the middle), radius or angles.
ROUNDED = "rounded_rectangle"
FACE = (
    ("face", "background +", "ellipse", (4, 4, 96, 88)), ("long_hair", "hair -", ROUNDED, (17, 24, 83, 92), 50),
    ("face", "clothes", "ellipse", (8, 83, 92, 137)), ("face", "skin -", ROUNDED, (42, 70, 58, 95), 15),
    ("hair", "hair", "ellipse", (17.5, 10.5, 82.5, 77.5)), ("face", "skin -", "ellipse", (18.5, 48.5, 28.5, 61.5)),
    ("earrings", "gold", "ellipse", (20.7, 60.5, 26.3, 67.5)), ("face", "skin", "ellipse", (23.5, 20.5, 76.5, 83.5)),
    ("face", "skin +", "ellipse", (29, 58, 38, 64)), ("beard", "hair -", "chord", (23.2, 20, 76.8, 84.5), 18, 162),
    ("beard", "hair -", "ellipse", (37, 62.5, 63, 77.5)), ("hair", "hair", "chord", (23, 14, 77, 40), 180, 360),
    ("bangs", "hair", "chord", (22.5, 16, 77.5, 52), 180, 360), ("bangs", "hair", "ellipse", (22.5, 26, 37.5, 43)),
    ("bangs", "hair", "ellipse", (35, 26, 50, 43)), ("face", "white", "ellipse", (33.4, 47.4, 44.6, 56.6)),
    ("face", "eyes", "ellipse", (35.6, 48.4, 42.4, 56)), ("face", "black", "ellipse", (37.4, 50.4, 40.6, 54)),
    ("face", "hair --", "arc", (32, 43, 46, 56), 220, 320), ("face", "skin --", "arc", (46.5, 54, 53.5, 61.5), 20, 160),
    ("laugh", "lips --", "chord", (40, 59, 60, 74), 0, 180), ("laugh", "white", "chord", (42, 63, 58, 69), 0, 180),
    ("gaping", "lips --", "ellipse", (44, 64, 56, 74)), ("gaping", "lips", "ellipse", (46.5, 69.5, 53.5, 73.5)),
    ("beaming", "lips", "chord", (38, 60, 62, 74), 0, 180), ("stern", "lips", "rectangle", (44, 67.4, 56, 69.6)),
    ("glasses", "black", "arc", (29, 43, 48, 61), 0, 360), ("glasses", "black", "rectangle", (47, 49, 53, 51)),
    ("hat", "hat", "chord", (20, 2, 80, 66), 180, 360), ("hat", "hat -", ROUNDED, (12, 30, 88, 37), 9),
)
