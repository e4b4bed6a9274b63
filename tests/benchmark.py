"""How fast the scripts train, beside a plain loop over the same networks and losses, with as many updates.

    python tests/benchmark.py                                # all scripts: the paper's settings on CUDA, else --quick's
    python tests/benchmark.py --scripts aegan pagan --out benchmark.json

`script` is what the script does: draw_images, make_inputs and train_step, on CUDA recorded as a graph; there `eager` is
the same with --no-graph. `plain` is the loop that public collections have: a DataLoader of image files with workers, a
forward pass for every loss with detach, torch's default Adam, .item() at every step. They take turns, after one that
warms up; a turn ends when the device has done its work. Medians over the turns. Memory is the script's.
"""

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from functools import cache, partial
from itertools import repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, ToTensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import draw_faces, draw_images

draw_faces = cache(draw_faces)
TASKS = ("aegan", "bigan_latent", "vae_began", "pagan", "inverse_gen gan", "inverse_gen aegan")


class Files(Dataset):
    """Image files in [-1, 1], or in [0, 1] for inverse_gen."""

    def __init__(self, folder, unit):
        self.paths = sorted(folder.glob("*.png"))
        self.transform = Compose([ToTensor()] if unit else [ToTensor(), Normalize(0.5, 0.5)])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.transform(Image.open(self.paths[i]).convert("RGB"))


class Plain:
    """A plain loop's optimizers, torch's default Adam for each loss, and their steps."""

    def __init__(self, optimizer, **players):
        group = optimizer.param_groups[0]
        self.parameters = {loss: [p for net in nets for p in net.parameters()] for loss, nets in players.items()}
        self.adam = {loss: torch.optim.Adam(ps, group["lr"], group["betas"]) for loss, ps in self.parameters.items()}

    def minimise(self, name, loss, clip=False):
        """One step of one optimizer on its loss."""
        self.adam[name].zero_grad()
        loss.backward()
        if clip:
            for parameter in self.parameters[name]:
                torch.nn.utils.clip_grad_norm_(parameter, 1.0)
        self.adam[name].step()
        return loss.item()


def aegan(m, args, nets, device):
    optimizer = m.build_optimizer(nets, args.lr, args.lr_discriminator)
    step = partial(m.train_step, nets, optimizer, args.model, vars(args))
    G, E, D_x, D_z = (nets[name] for name in ("G", "E", "D_x", "D_z"))
    loop = Plain(optimizer, L_D_x=[D_x], L_D_z=[D_z], L_G_E=[G, E])

    def plain(x):
        z = torch.randn(len(x), args.latent_dim, device=device)
        d = D_x(x)
        fakes = D_x(G(z).detach()), D_x(G(E(x)).detach())
        loop.minimise("L_D_x", sum(m.discriminator_loss(d, fake) for fake in fakes), clip=True)
        d = D_z(z)
        fakes = D_z(E(x).detach()), D_z(E(G(z)).detach())
        loop.minimise("L_D_z", sum(m.discriminator_loss(d, fake) for fake in fakes), clip=True)
        x_hat, z_hat = G(z), E(x)
        x_tilde, z_tilde = G(z_hat), E(x_hat)
        loss = sum(m.generator_loss(d) for d in (D_x(x_hat), D_x(x_tilde), D_z(z_hat), D_z(z_tilde))) * args.alpha
        loss = loss + args.lambda_rx * F.l1_loss(x_tilde, x) + args.lambda_rz * F.mse_loss(z_tilde, z)
        loop.minimise("L_G_E", loss, clip=True)

    return step, (args.latent_dim, not args.no_flip), plain


def bigan_latent(m, args, nets, device):
    optimizer = m.build_optimizer(nets, args.lr)
    step = partial(m.train_step, nets, optimizer, None, vars(args), args.unroll)
    G, E, D = (nets[name] for name in ("G", "E", "D"))
    loop = Plain(optimizer, L_D=[D], L_G_E=[G, E])

    def plain(x):
        z = torch.rand(len(x), args.latent_dim, device=device) * 2 - 1
        loop.minimise("L_D", m.discriminator_loss(D(x, E(x).detach()), D(G(z).detach(), z)))
        q, p = (x, E(x)), (G(z), z)
        loss = m.generator_loss(*m.unrolled_logits(D, loop.adam["L_D"], q, p, D(*q), D(*p), args.unroll))
        loop.minimise("L_G_E", loss + args.lambda_1 * m.penalty(E(p[0]), z))

    return step, (args.latent_dim,), plain


def vae_began(m, args, nets, device):
    optimizer = m.build_optimizer(nets, args.lr)
    step = partial(m.train_step, nets, optimizer, args.model, vars(args))
    E, G, D = (nets[name] for name in ("E", "G", "D"))
    loop = Plain(optimizer, L_enc=[E], L_gen=[G], L_dis=[D])
    k = [0.0]

    def fake_loss(x_g, x_v):
        return F.l1_loss(D(x_g)[0], x_g) + args.alpha * F.l1_loss(D(x_v)[0], x_v)

    def plain(x):
        z_g, epsilon = torch.randn(2, len(x), args.latent_dim, device=device)
        mean, log_variance = E(x).chunk(2, 1)
        x_v = G(m.reparameterise(mean, log_variance, epsilon))
        guide = args.beta * F.l1_loss(D(x_v)[1], D(x)[1]) + args.gamma * F.l1_loss(x_v, x)
        loop.minimise("L_enc", m.kl_loss(mean, log_variance) + guide)
        x_v = G(m.reparameterise(*(part.detach() for part in E(x).chunk(2, 1)), epsilon))
        x_g = G(z_g)
        guide = args.beta * F.l1_loss(D(x_v)[1], D(x)[1]) + args.gamma * F.l1_loss(x_v, x)
        loop.minimise("L_gen", fake_loss(x_g, x_v) + guide)
        real, fake = F.l1_loss(D(x)[0], x), fake_loss(x_g.detach(), x_v.detach())
        loop.minimise("L_dis", real - k[0] * fake)
        k[0] = min(1.0, max(0.0, k[0] + args.gains[0] * (args.eta * real - fake).item()))

    return step, (args.latent_dim,), plain


def pagan(m, args, nets, device):
    optimizer = m.build_optimizer(nets, args.lr)
    step = partial(m.train_step, nets, optimizer, args.reconstruction)
    G, E, D_x, D_z, D_xx = (nets[name] for name in ("G", "E", "D_x", "D_z", "D_xx"))
    loop = Plain(optimizer, L_d_x=[D_x], L_d_z=[D_z], L_d_xx=[D_xx], L_g=[G], L_e=[E])

    def plain(x):
        z, epsilon = torch.randn(2, len(x), args.latent_dim, device=device)
        x_aug = m.AUGMENTATIONS[args.augmentation](x, torch.rand(len(x), 2, device=device), args.crop)

        def sample():
            return m.reparameterise(*E(x).chunk(2, 1), epsilon)

        loop.minimise("L_d_x", m.minus_log(D_x(x)) + m.minus_log_not(D_x(G(z).detach())))
        loop.minimise("L_d_z", m.minus_log(D_z(z)) + m.minus_log_not(D_z(sample().detach())))
        loop.minimise("L_d_xx", m.minus_log(D_xx(x, x_aug)) + m.minus_log_not(D_xx(x, G(sample()).detach())))
        loop.minimise("L_g", m.minus_log(D_x(G(z))) + m.minus_log(D_xx(x, G(sample().detach()))))
        z_hat = sample()
        loop.minimise("L_e", m.minus_log(D_z(z_hat)) + m.minus_log(D_xx(x, G(z_hat))))

    return step, (args.latent_dim, args.augmentation, args.crop), plain


def inverse_gen(m, args, nets, device, stage):
    optimizer = m.build_optimizer(nets, args.lr)
    step = partial(m.train_step, nets, optimizer, stage)
    G, D, IG = (nets[name] for name in ("G", "D", "IG"))
    loop = Plain(optimizer, L_D=[D], L_G=[G], L_IG=[IG])

    def plain(x):
        z = torch.rand(len(x), args.latent_dim, device=device) * 2 - 1
        if stage == "gan":
            loop.minimise("L_D", m.discriminator_loss(D(x), D(m.generate(G, z).detach())))
            loop.minimise("L_G", m.generator_loss(D(m.generate(G, z))))
        else:
            image = m.generate(G, z).detach()
            loop.minimise("L_IG", m.cross_entropy(G(IG(image)), image))

    return step, (args.latent_dim,), plain


def build(task, device):
    """A task's arguments, networks, step(*batch), what make_inputs takes after the images, and plain_step(x)."""
    name, *stage = task.split()
    module = importlib.import_module(name)
    argv = ["--out", "a folder that is not there"]
    if device.type == "cpu":
        argv.append("--quick")
    args, _ = module.parse_args(argv)
    torch.manual_seed(0)
    if name == "vae_began":
        nets = module.build_networks("vae-began", args.image_size, args.filters, args.latent_dim, args.gains)
    else:
        model = {"aegan": ["aegan"], "bigan_latent": [], "pagan": ["pair"], "inverse_gen": ["aegan"]}[name]
        nets = module.build_networks(*model, args.image_size, args.channels, args.latent_dim)
    nets.to(device)
    return args, nets, *globals()[name](module, args, nets, device, *stage)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(function, arguments, seconds, device):
    """Calls a second of function(next of arguments), over so many seconds or more."""
    wait(device)
    start = time.perf_counter()
    calls = 0
    while time.perf_counter() - start < seconds:
        function(next(arguments))
        calls += 1
        if calls % 100 == 0:  # so that the host does not run away from the device
            wait(device)
    wait(device)
    return calls / (time.perf_counter() - start)


def load_batches(task, images, batch_size, folder, device):
    """Batches of the images [M, 3, S, S], which are saved into the folder first, without end: [N, 3, S, S]."""
    size = images.shape[-1]
    if task == "inverse_gen aegan":  # which takes no images, only their number
        return repeat(torch.zeros(batch_size, 3, size, size, device=device))
    files = folder / str(size)
    if not files.exists():
        files.mkdir()
        for i, image in enumerate(images.cpu()):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(files / f"{i:04}.png")
    loader = DataLoader(
        Files(files, task.startswith("inverse_gen")),
        batch_size,
        shuffle=True,
        num_workers=min(4, torch.get_num_threads()),
        drop_last=True,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    return (x.to(device, non_blocking=True) for _ in repeat(None) for x in loader)


def measure(task, device, folder, turns, seconds):
    """One row of the table, as a dict."""
    args, _, step, options, _ = build(task, device)
    module = importlib.import_module(task.split()[0])
    images = draw_faces(1000, args.image_size)[0].to(device)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))
        torch.cuda.reset_peak_memory_stats(device)

    def script_step(run, _):
        run(*module.make_inputs(draw_images(images, args.batch_size, device), *options))

    loops = {"script": (partial(script_step, step), repeat(None))}
    for _ in range(3):
        script_step(step, None)
    if device.type == "cuda":
        loops["eager"] = loops["script"]
        recorded = module.record(step, module.make_inputs(images[: args.batch_size], *options))
        loops["script"] = partial(script_step, recorded), repeat(None)
    row = {"task": task, "batch_size": args.batch_size, "image_size": args.image_size}
    if device.type == "cuda":
        row["memory"] = torch.cuda.max_memory_reserved(device)
    *_, plain_step = build(task, device)
    loops["plain"] = plain_step, load_batches(task, images, args.batch_size, folder, device)
    rates = {name: [] for name in loops}
    for turn in range(turns + 1):
        for name, (function, arguments) in loops.items():
            value = args.batch_size * rate(function, arguments, seconds, device)
            if turn > 0:  # the first one warms up
                rates[name].append(value)
    for name, values in rates.items():
        row[name] = statistics.median(values)
    row["rates"] = rates
    row["ratio"] = statistics.median(a / b for a, b in zip(rates["script"], rates["plain"]))
    row["steps"] = args.steps
    if task == "inverse_gen gan":
        row["steps"] = args.gan_steps
    elif task == "inverse_gen aegan":
        row["steps"] = args.steps - args.gan_steps
    row["minutes_for_all_steps"] = row["steps"] * args.batch_size / row["script"] / 60
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", choices=sorted({task.split()[0] for task in TASKS}))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="a turn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a JSON file for all numbers; not given: none")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        shown = ("script", "eager", "plain")
    else:
        name = f"{torch.get_num_threads()} CPU cores"
        shown = ("script", "plain")
    print(f"{name}, torch {torch.__version__}; images a second")
    print(f"{'':20}{''.join(f'{title:>9}' for title in shown)}{'ratio':>7}{'all steps':>12}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for task in TASKS:
            if not args.scripts or task.split()[0] in args.scripts:
                row = measure(task, device, Path(folder), args.turns, args.seconds)
                rows.append(row)
                rates = "".join(f"{row[title]:9.0f}" for title in shown)
                print(f"{task:20}{rates}{row['ratio']:7.2f}{row['minutes_for_all_steps']:8.1f} min", flush=True)
    if args.out:
        content = {"device": name, "torch": torch.__version__, "rows": rows}
        args.out.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
