"""How fast the scripts train, beside a plain loop over the same networks, losses, batches and updates.

    python tests/benchmark.py                                # all scripts: the paper's settings on CUDA, else --quick's
    python tests/benchmark.py --scripts aegan pagan --graph --precision bf16 --out benchmark.json

`script` is what the script does: draw_images, draw_batch and train_step, with its --graph and --precision. `plain` is
the loop that public collections have: a DataLoader of image files with workers, a forward pass for every loss with
detach, torch's default Adam and precision, .item() at every step. They take turns, after one that warms up; a turn ends
when the device has done its work. Medians over the turns. Floating-point operations and peak memory are those of the
script's step; the peak is that of a large matrix product, on CUDA in the same precision.
"""

import argparse
import gc
import importlib
import json
import statistics
import sys
import tempfile
import time
from itertools import repeat
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import Compose, Normalize, ToTensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import draw_faces, draw_images

TF32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32  # torch's defaults
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


def minimise(optimizer, loss):
    """One step of one optimizer on its loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def aegan(m, args, nets, device):
    weights = {"x_hat": args.lambda_ax, "x_tilde": args.lambda_ax, "z_hat": args.lambda_az, "z_tilde": args.lambda_az}
    weights |= {"r_x": args.lambda_rx, "r_z": args.lambda_rz}
    optimizers = m.build_optimizers(nets, args.lr, args.lr_discriminator)
    G, E, D_x, D_z = (nets[name] for name in ("G", "E", "D_x", "D_z"))

    def step(images):
        return m.train_step(nets, optimizers, *m.draw_batch(images, args.latent_dim, not args.no_flip), weights)

    def clipped(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        for parameter in optimizer.param_groups[0]["params"]:
            torch.nn.utils.clip_grad_norm_(parameter, 1.0)
        optimizer.step()
        return loss.item()

    def plain(x, adam):
        z = torch.randn(len(x), args.latent_dim, device=device)
        d = D_x(x)
        fakes = D_x(G(z).detach()), D_x(G(E(x)).detach())
        clipped(adam["D_x"], sum(m.discriminator_loss(d, fake) for fake in fakes))
        d = D_z(z)
        fakes = D_z(E(x).detach()), D_z(E(G(z)).detach())
        clipped(adam["D_z"], sum(m.discriminator_loss(d, fake) for fake in fakes))
        x_hat, z_hat = G(z), E(x)
        x_tilde, z_tilde = G(z_hat), E(x_hat)
        fakes = {"x_hat": D_x(x_hat), "x_tilde": D_x(x_tilde), "z_hat": D_z(z_hat), "z_tilde": D_z(z_tilde)}
        terms = {name: m.generator_loss(d) for name, d in fakes.items()}
        terms |= {"r_x": m.image_reconstruction_loss(x_tilde, x), "r_z": m.latent_reconstruction_loss(z_tilde, z)}
        clipped(adam["G_E"], m.total_loss(terms, weights))

    return optimizers, step, plain


def bigan_latent(m, args, nets, device):
    weights = {"L_GAN": 1.0, "L_AD": args.lambda_ad, "L_AE": args.lambda_ae, "L_H": args.lambda_h}
    optimizers = m.build_optimizers(nets, args.lr)
    G, E, D = (nets[name] for name in ("G", "E", "D"))

    def step(images):
        return m.train_step(nets, optimizers, *m.draw_batch(images, args.latent_dim), weights, args.unroll)

    def plain(x, adam):
        z = torch.rand(len(x), args.latent_dim, device=device) * 2 - 1
        minimise(adam["D"], m.discriminator_loss(D(x, E(x).detach()), D(G(z).detach(), z)))
        x_hat = G(z)
        pairs = [(x, E(x)), (x_hat, z)]
        d = [D(*pair) for pair in pairs]
        loss = m.unrolled_generator_loss(D, adam["D"], pairs, *d, args.unroll)
        minimise(adam["G_E"], loss + args.lambda_ad * m.autodecoder_loss(E(x_hat), z))

    return optimizers, step, plain


def vae_began(m, args, nets, device):
    weights = {name: getattr(args, name) for name in ("alpha", "beta", "gamma", "eta")}
    optimizers, (E, G, D) = m.build_optimizers(nets, args.lr), (nets[name] for name in ("E", "G", "D"))
    k = [0.0]

    def step(images):
        return m.train_step(nets, optimizers, *m.draw_batch(images, args.latent_dim), **weights)

    def plain(x, adam):
        z_g, epsilon = torch.randn(2, len(x), args.latent_dim, device=device)
        mean, log_variance = E(x).chunk(2, 1)
        x_v = G(m.reparameterise(mean, log_variance, epsilon))
        guide = args.beta * m.similarity_loss(D(x_v)[1], D(x)[1]) + args.gamma * m.pixel_loss(x_v, x)
        minimise(adam["L_enc"], m.kl_loss(mean, log_variance) + guide)
        z_v = m.reparameterise(*(part.detach() for part in E(x).chunk(2, 1)), epsilon)
        x_v, x_g = G(z_v), G(z_g)
        (x_v_prime, code), x_g_prime = D(x_v), D(x_g)[0]
        fake = m.fake_loss(m.autoencoder_loss(x_g_prime, x_g), m.autoencoder_loss(x_v_prime, x_v), args.alpha)
        guide = m.similarity_loss(code, D(x)[1]), m.pixel_loss(x_v, x)
        minimise(adam["L_gen"], m.decoder_loss(fake, *guide, args.beta, args.gamma))
        x_v, x_g = x_v.detach(), x_g.detach()
        real = m.autoencoder_loss(D(x)[0], x)
        fake = m.fake_loss(m.autoencoder_loss(D(x_g)[0], x_g), m.autoencoder_loss(D(x_v)[0], x_v), args.alpha)
        minimise(adam["L_dis"], m.discriminator_loss(real, fake, k[0]))
        k[0] = min(1.0, max(0.0, k[0] + args.gains[0] * m.balance_error(real, fake, args.eta).item()))

    return optimizers, step, plain


def pagan(m, args, nets, device):
    optimizers = m.build_optimizers(nets, args.lr)
    G, E, D_x, D_z, D_xx = (nets[name] for name in ("G", "E", "D_x", "D_z", "D_xx"))

    def step(images):
        batch = m.draw_batch(images, args.latent_dim, args.augmentation, args.crop)
        return m.train_step(nets, optimizers, *batch, args.l1_weight)

    def plain(x, adam):
        z, epsilon = torch.randn(2, len(x), args.latent_dim, device=device)
        x_aug = m.augment(x, torch.rand(len(x), 2, device=device), args.augmentation, args.crop)

        def sample():
            return m.reparameterise(*E(x).chunk(2, 1), epsilon)

        minimise(adam["L_d_x"], m.discriminator_loss(D_x(x), D_x(G(z).detach())))
        minimise(adam["L_d_z"], m.discriminator_loss(D_z(z), D_z(sample().detach())))
        minimise(adam["L_d_xx"], m.discriminator_loss(D_xx(x, x_aug), D_xx(x, G(sample()).detach())))
        minimise(adam["L_g"], m.generator_loss(D_x(G(z)), m.pair_loss(D_xx(x, G(sample().detach())))))
        z_hat = sample()
        minimise(adam["L_e"], m.encoder_loss(D_z(z_hat), m.pair_loss(D_xx(x, G(z_hat)))))

    return optimizers, step, plain


def inverse_gen(m, args, nets, device, stage):
    optimizers = m.build_optimizers(nets, args.method, args.lr)
    G, D, IG = (nets[name] for name in ("G", "D", "IG"))

    def step(images):
        return m.train_step(nets, optimizers, stage, *m.draw_batch(images, args.latent_dim))

    def plain(x, adam):
        z = torch.rand(len(x), args.latent_dim, device=device) * 2 - 1
        if stage == "gan":
            minimise(adam["L_D"], m.discriminator_loss(D(x), D(m.generate(G, z).detach())))
            minimise(adam["L_G"], m.generator_loss(D(m.generate(G, z))))
        else:
            image = m.generate(G, z).detach()
            minimise(adam["L_IG"], m.cross_entropy(G(IG(image)), image))

    return optimizers, step, plain


def build(task, device):
    """A task's arguments, networks, optimizers, step(a batch of uint8 images) and plain_step(x, optimizers)."""
    name, *stage = task.split()
    module = importlib.import_module(name)
    args, _ = module.parse_args(["--out", "a folder that is not there", *(["--quick"] if device.type == "cpu" else [])])
    torch.manual_seed(0)
    sizes = args.image_size, getattr(args, "channels", 0) or args.filters, args.latent_dim
    nets = {
        "aegan": lambda: module.build_networks("aegan", *sizes),
        "bigan_latent": lambda: module.build_networks(*sizes),
        "vae_began": lambda: module.build_networks("vae-began", *sizes, args.gains),
        "pagan": lambda: module.build_networks("pair", *sizes),
        "inverse_gen": lambda: module.build_networks("aegan", *sizes),
    }[name]().to(device)
    return args, nets, *globals()[name](module, args, nets, device, *stage)


def plain_optimizers(optimizers):
    """The same optimizers as torch makes them by default, without fused kernels."""
    groups = {loss: optimizer.param_groups[0] for loss, optimizer in optimizers.items()}
    return {loss: torch.optim.Adam(group["params"], group["lr"], group["betas"]) for loss, group in groups.items()}


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(function, arguments, seconds, device):
    """Calls a second of function(next of arguments), over so many seconds or more."""
    wait(device)
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        function(next(arguments))
        calls += 1
        if calls % 100 == 0:  # so that the host does not run away from the device
            wait(device)
    wait(device)
    return calls / (time.perf_counter() - start)


def allow_tf32(matmul, cudnn):
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def peak(device, size, precision):
    """Floating-point operations a second of a matrix product of this size."""
    allow_tf32(precision != "fp32", precision != "fp32")
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return 2 * size**3 * statistics.median(rate(lambda _: a @ a, repeat(None), 0.3, device) for _ in range(5))


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


def measure(task, device, folder, turns, seconds, precision, graph):
    """One row of the table, as a dict."""
    args, nets, optimizers, step, _ = build(task, device)
    module, images = importlib.import_module(task.split()[0]), draw_faces(1000, args.image_size)[0].to(device)
    some, run = images[: args.batch_size], step
    module.use_precision(nets, precision)
    if graph:
        run = module.record(step, some, nets, optimizers)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(3):
        run(some)
    row = {"task": task, "batch_size": len(some), "image_size": args.image_size, "precision": precision, "graph": graph}
    row["peak_memory"] = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    _, _, same_optimizers, _, plain_step = build(task, device)
    adam, rates = plain_optimizers(same_optimizers), {"script": [], "plain": []}
    batches = load_batches(task, images, args.batch_size, folder, device)

    def script_step(images):
        run(draw_images(images, args.batch_size, device))

    for turn in range(turns + 1):  # the first one warms up
        allow_tf32(precision != "fp32", precision != "fp32")
        here = [rate(script_step, repeat(images), seconds, device)]
        allow_tf32(*TF32)
        here += [rate(lambda x: plain_step(x, adam), batches, seconds, device)]
        for name, value in zip(rates, here):
            rates[name] += [args.batch_size * value] if turn else []
    with FlopCounterMode(display=False) as counter:
        step(some)
    script, plain = (statistics.median(values) for values in rates.values())
    row |= {"script": script, "plain": plain, "rates": rates, "operations_per_step": counter.get_total_flops()}
    row["ratio"] = statistics.median(a / b for a, b in zip(*rates.values()))
    row["operations_per_second"] = row["operations_per_step"] * script / args.batch_size
    steps = args.gan_steps if task == "inverse_gen gan" else args.steps
    row |= {"steps": steps, "minutes_for_all_steps": steps * args.batch_size / script / 60}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", choices=sorted({task.split()[0] for task in TASKS}))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="a turn")
    parser.add_argument("--precision", choices=("bf16", "tf32", "fp32"), default="tf32")
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default="benchmark.json")
    args = parser.parse_args()
    device, rows = torch.device(args.device), []
    top = peak(device, 8192 if device.type == "cuda" else 2048, args.precision if device.type == "cuda" else "fp32")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU cores"
    print(f"{name}, torch {torch.__version__}, peak {top / 1e12:.2f} TFLOP/s; images a second")
    print(f"{'':20}{'script':>9}{'plain':>9}{'ratio':>7}{'of peak':>9}{'all steps':>12}")
    with tempfile.TemporaryDirectory() as folder:
        for task in TASKS:
            if not args.scripts or task.split()[0] in args.scripts:
                row = measure(task, device, Path(folder), args.turns, args.seconds, args.precision, args.graph)
                row["share_of_peak"] = row["operations_per_second"] / top
                rows.append(row)
                print(
                    f"{task:20}{row['script']:9.0f}{row['plain']:9.0f}{row['ratio']:7.2f}{row['share_of_peak']:9.1%}"
                    f"{row['minutes_for_all_steps']:8.1f} min",
                    flush=True,
                )
    args.out.write_text(json.dumps({"device": name, "torch": torch.__version__, "peak": top, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
