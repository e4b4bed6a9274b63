"""What the tests of all scripts share: a folder of images, runs of a script, comparison of checkpoints."""

import csv
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import Data, draw_face

ROOT = Path(__file__).parent.parent
SCRIPTS = ("aegan", "bigan_latent", "inverse_gen", "pagan", "vae_began")
TINY = "--image-size 16 --channels 2 --batch-size 4 --log-every 1 --save-every 2 --device cpu".split()


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of 30 small PNG files, a few of them in a folder inside."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for i in range(30):
        image, _ = draw_face(random.Random(i), 20)
        image.save(folder / ("more" if i % 5 == 0 else ".") / f"{i}.png")
    return folder


@pytest.fixture
def cli(capsys):
    """cli(script, *arguments): run a script's main() in this process; its exit status and what it printed."""

    def run(script, *arguments):
        capsys.readouterr()
        try:
            script.main([str(argument) for argument in arguments])
            status = 0
        except SystemExit as stop:
            status = stop.code
        return Result(status, *capsys.readouterr())

    return run


def start(script, *arguments, cwd):
    """Run a script in a process of its own, as a user does; returns the process."""
    command = [sys.executable, ROOT / f"{script}.py", *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_as_a_user(name, *arguments, cwd, pictures):
    """Run a script, five steps, in a process of its own: what it printed, results.json, the log's header and its rows.

    pictures: all that it should leave, {name: (columns, rows, tiles of 64 pixels in a column)}.
    """
    process = start(name, *arguments, cwd=cwd)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    folder = cwd / "runs" / name
    assert set(files(folder)) == {f"{name}.png" for name in pictures} | {"checkpoint.pt", "log.csv", "results.json"}
    for picture, (columns, down, images) in pictures.items():
        with Image.open(folder / f"{picture}.png") as image:
            image.load()
            gap = 4 if columns * down > 1 else 0  # torchvision leaves none around a single tile
            assert image.size == (columns * (64 * images + gap) + gap, down * (64 + gap) + gap), picture
    results, (header, rows) = json.loads((folder / "results.json").read_text()), log_of(folder)
    assert results["steps"] == 5
    assert header[0] == "step" and [row[0] for row in rows] == list("12345")
    assert all(math.isfinite(float(value or 0)) for row in rows for value in row)
    assert " on 27 images of " in out and "step 5  " in out and "steps/s" in out and "left" in out
    return out, results, header[1:], rows


def assert_refused(result, *words):
    """Exit status 2 and one line of error that has all the words; no traceback."""
    notices = ("reading ", "skipped ", "Downloading: ")  # the last one is torch's, in some versions
    lines = [line for line in result.err.split("\n") if line and not line.startswith(notices)]
    assert result.status == 2 and len(lines) == 1 and ": error: " in lines[0], result
    assert all(str(word) in lines[0] for word in words), lines[0]


def assert_same(a, b, where="checkpoint"):
    """Two checkpoints (nested dicts, lists, tensors, numbers) are the same bit for bit, but for arguments."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - set(SCRIPTS):
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}.{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def load(folder):
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def log_of(folder):
    """The header and the rows of a run's log.csv."""
    header, *rows = csv.reader(Path(folder, "log.csv").open())
    return header, rows


def adam_by_hand(parameters, gradients, lr, moments, beta=0.5, epsilon=1e-8):
    """One step of Adam with beta, 0.999; moments: [step, m, v] is updated."""
    moments[0] += 1
    for i, (parameter, gradient) in enumerate(zip(parameters, gradients)):
        moments[1][i] = beta * moments[1][i] + (1 - beta) * gradient
        moments[2][i] = 0.999 * moments[2][i] + 0.001 * gradient**2
        m, v = moments[1][i] / (1 - beta ** moments[0]), moments[2][i] / (1 - 0.999 ** moments[0])
        with torch.no_grad():
            parameter -= lr * m / (v.sqrt() + epsilon)


def random_data():
    """1,100 random images of 16x16 to train on, darker than the 1,100 held out, the last of which are darkest."""
    images = torch.randint(256, (2200, 3, 16, 16), dtype=torch.uint8)
    images[2050:] //= 3
    return Data(images[:1100] // 2, images[1100:], (), None, None, (), 0)


def mean_distance(images):
    """Of all pairs of images [N, 3, S, S], in NumPy."""
    rows = np.asarray(images, np.float64).reshape(len(images), -1)
    return np.mean([np.linalg.norm(rows[i] - rows[j]) for i in range(len(rows)) for j in range(i)])


def sharpness_by_hand(x, originals):
    """The mean step from a pixel to the next of images [N, 3, S, S], by that of the originals; the same of halves."""

    def step(x):
        return np.mean([np.abs(np.diff(x, axis=axis)).mean() for axis in (2, 3)])

    def halves(x):
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4

    x, originals = np.asarray(x), np.asarray(originals)
    of_halves = step(halves(x)) / step(halves(originals))
    return {"sharpness": step(x) / step(originals), "sharpness_of_halves": of_halves}


def count_passes(nets, function, *arguments):
    """Call the function, and count the passes through each of the networks {name: network}: "G2 E1"."""
    counts = dict.fromkeys(nets, 0)
    for name, net in nets.items():
        net.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    function(*arguments)
    return " ".join(f"{name}{count}" for name, count in counts.items())


def refuse_reading_back(monkeypatch):
    """From now on a tensor that is read by the host raises: on CUDA the host would wait for the device."""

    def refuse(*_):
        raise AssertionError("the host waited for the device")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)


class CPUGraph(TorchDispatchMode):
    """What a CUDA graph is, on the CPU: the operations that were run under it, and their tensors.

    replay() runs them again without the Python around them, and writes what they give into the tensors of the first
    time. So a number that Python puts in stays what it was, and a tensor that Python puts in another's place is lost.
    The first replay is what was recorded: CUDA records without running, this runs.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a graph cannot read a tensor back"
        self.calls.append((function, args, kwargs or {}, function(*args, **(kwargs or {}))))
        return self.calls[-1][-1]

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, first in self.calls if self.replays > 1 else ():
            for old, new in zip(tree_leaves(first), tree_leaves(function(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def graphs_on_the_cpu(monkeypatch, script):
    """From now on the script records steps on the CPU, too, but for --no-graph; returns the list of its CPUGraphs."""
    graphs, current = [], object()
    monkeypatch.setattr(script, "open_device", lambda args: (torch.device("cpu"), not args.no_graph))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(CPUGraph()) or graphs[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph if stream is current else None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    return graphs
