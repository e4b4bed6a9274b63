"""Train a small image classifier and save it as TorchScript, for --classifier FILE of pagan.py and vae_began.py.

    python tests/make_classifier.py --out classifier.pt                          # faces of 16x16 pixels, as --quick has
    python tests/make_classifier.py --data photos/ --image-size 32 --out classifier.pt

Its classes are the combinations of the data's attributes that occur: of all attributes where there are up to 100
combinations, as in cifar10 and mnist, else of the five that are nearest to even. A folder without attributes has a
class for each of its sub-folders. The result takes images [N, 3, S, S] in [-1, 1] to (logits [N, classes], features
[N, 128]). What it measures depends on its data and its training: compare such numbers within one table only.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import DataError, load_data, to_float


class Classifier(nn.Module):
    """Images [N, 3, S, S] in [-1, 1] -> logits [N, classes] and features [N, 128]."""

    def __init__(self, classes, channels=32):
        super().__init__()
        layers = []
        c_in = 3
        for c_out in (channels, 2 * channels, 4 * channels):
            layers += [nn.Conv2d(c_in, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2)]
            c_in = c_out
        layers += [nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(4 * c_in, 128), nn.ReLU()]
        self.features, self.logits = nn.Sequential(*layers), nn.Linear(128, classes)

    def forward(self, x):
        features = self.features(x)
        return self.logits(features), features


def classes_of_attributes(data):
    """Class numbers of the training and the held-out images, int64 [M], [H]; -1 for a combination not trained."""
    names = range(len(data.attributes))
    shares = data.train_labels.float().mean(0)
    if len(data.train_labels.unique(dim=0)) > 100:
        names = sorted(names, key=lambda i: abs(shares[i] - 0.5))[:5]
        print("attributes:", ", ".join(data.attributes[i] for i in names))
    numbers = [(labels[:, list(names)].long() * 2 ** torch.arange(len(names))).sum(1) for labels in data[3:5]]
    classes = numbers[0].unique()
    found = [(number[:, None] == classes).long().max(1) for number in numbers]
    return [torch.where(there == 1, index, -1) for there, index in found]


def classes_of_subfolders(data, folder):
    """Numbers of the sub-folders of the training and the held-out images, int64 [M], [H]; -1 for one in the folder."""
    names = [path.relative_to(folder).parts[0] if path.parent != folder else None for path in data.paths]
    classes = sorted(set(names) - {None})
    print("sub-folders:", ", ".join(classes))
    numbers = torch.tensor([classes.index(name) if name else -1 for name in names])
    return numbers[: len(data.train)], numbers[len(data.train) :]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="faces", help="as in the scripts")
    parser.add_argument("--image-size", type=int, choices=(16, 32, 64, 128), default=16, help="that of the run")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, default="classifier.pt")
    args = parser.parse_args()
    torch.manual_seed(0)
    try:
        data = load_data(args.data, args.image_size)
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except (DataError, OSError) as error:
        sys.exit(f"make_classifier.py: error: {error}")
    if data.attributes:
        classes, heldout_classes = classes_of_attributes(data)
    else:
        classes, heldout_classes = classes_of_subfolders(data, Path(args.data))
    images, classes = data.train[classes >= 0], classes[classes >= 0]
    if len(classes.unique()) < 2:
        sys.exit(f"make_classifier.py: error: {args.data} has neither attributes nor two sub-folders of images")
    count = int(classes.max()) + 1
    net = Classifier(count)
    start = time.time()
    pad = max(1, args.image_size // 16)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=args.steps)
    for step in range(args.steps):
        i = torch.randint(len(images), (64,))
        dy, dx = torch.randint(-pad, pad + 1, (2,)).tolist()
        x = F.pad(to_float(images[i]), (pad,) * 4, mode="reflect").roll((dy, dx), (2, 3))[..., pad:-pad, pad:-pad]
        loss = F.cross_entropy(net(x)[0], classes[i], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0:
            print(f"step {step + 1}  loss {loss.item():.3f}  {time.time() - start:.0f} s", flush=True)
    net.eval()
    with torch.no_grad():
        answers = torch.cat([net(to_float(part))[0].argmax(1) for part in data.heldout.split(250)])
    right = (answers == heldout_classes).float().mean()
    print(f"{count} classes, {100 * right:.1f} percent of the held-out images are right")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch would have another format
        torch.jit.save(torch.jit.trace(net, torch.zeros(2, 3, args.image_size, args.image_size)), args.out)


if __name__ == "__main__":
    main()
