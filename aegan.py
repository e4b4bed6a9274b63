# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy", "pillow"]
# ///
"""Autoencoding generative adversarial networks (Conor Lazarou, arXiv:2004.05472, 2020).

Four networks: a generator G from latents to images, an encoder E from images to latents, and a discriminator on either
side, D_x of images and D_z of latents. G and E must fool them with what they make from scratch, x_hat = G(z) and
z_hat = E(x), and with what they make of each other's output, x_tilde = G(E(x)) and z_tilde = E(G(z)); and the latter
must be the x and z they began with. So G and E become each other's inverse, and G, which has to reproduce the training
images, cannot collapse to a few of them.

    python aegan.py --quick                       # cartoon faces in three minutes on two CPU cores
    python aegan.py --data photos/                # the paper's set-up on a folder of images
    python aegan.py --model gan --out runs/gan    # the paper's baseline, the same G and D_x alone

paper -> code
    Figure 2   networks      Generator, Encoder, ImageDiscriminator, LatentDiscriminator; MODELS
    Eq. 2-5    adversarial   discriminator_loss (for D_x, D_z), generator_loss (for G, E)
    Eq. 6      reconstruct   image_reconstruction_loss, latent_reconstruction_loss
    Eq. 7      total         total_loss, put together in all_losses and minimised in train_step
    Figure 1   interpolation between held-out images          save_interpolations
    Figure 3   samples from 100 vectors, --model gan, aegan   save_samples
    Figure 4   held-out reconstructions, --model aae, aegan   save_reconstructions
    Section 4  "total mode collapse", six of six GANs         sample_diversity, in results.json

Rulings, where the paper is silent or departs from the author's published code (github.com/ConorLazarou/AEGAN-keras)
 1. The paper gives no architecture and no weights: all numbers below that name no section are those of that code.
 2. G and E do not minimise log(1 - D(fake)) but -log D(fake), as that code does. Labels are smoothed for D only.
 3. "Norms" of Eq. 6 are means: mean absolute error of images, mean squared error of latents.
 4. log D_x(x) stands in Eq. 2 and in Eq. 3: real images count twice against two kinds of fakes. So do real latents.
 5. That code updates D_x, D_z four times, once for each kind of batch, then G and E four times. Here a step draws one x
    and one z and updates every network once, on all its terms: the same ratio, one forward pass.
 6. The AAE baseline is Makhzani et al.'s: G, E, D_z with Eq. 4 and the image term of Eq. 6.
 7. Batches are drawn with replacement, each image mirrored with probability 1/2, for the paper's mirrored copies.
 8. Other image sizes keep six layers a network and the 4x4 bottleneck, and change how many of them resize.
 9. "11134 epochs" is a misprint: 300,000 steps of 16 images are 111.34 epochs of 43,104.
"""

import argparse
import csv
import json
import math
import os
import signal
import sys
import time
import zlib
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import DataError, load_data, save_grid, to_float

MODELS = {"aegan": ("G", "E", "D_x", "D_z"), "gan": ("G", "D_x"), "aae": ("G", "E", "D_z")}  # Section 4
IMAGE_SIZES = (16, 32, 64, 128, 256)
REAL, FAKE = 0.95, 0.05  # the discriminators' labels
LEAK = 0.02  # slope of the discriminators' leaky ReLU
NORM_EPSILON = 1e-3
INPUT_NOISE = 0.01  # standard deviation of the noise added to the inputs of E, D_x, D_z
LAYER_NOISE = math.sqrt(0.005 / (1 - 0.005))  # and of the factor after each of their layers: Keras's dropout rate 0.005
BETAS = (0.5, 0.999)
CLIP_NORM = 1.0  # of the gradient of each parameter
QUICK = {"image_size": 32, "channels": 16, "steps": 1000}


# --------------------------------------------------------------------------------------------------------- networks


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels, at each pixel: [N, C, H, W] -> [N, C, H, W]."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class AddNoise(nn.Module):
    """In training, x + 0.01 n with n ~ N(0, I)."""

    def forward(self, x):
        return x + torch.empty(x.shape, device=x.device).normal_(0, INPUT_NOISE) if self.training else x


class MultiplyNoise(nn.Module):
    """In training, x (1 + 0.07 n) with n ~ N(0, I)."""

    def forward(self, x):
        return x * torch.empty(x.shape, device=x.device).normal_(1, LAYER_NOISE) if self.training else x


def same_conv(c_in, c_out, kernel, stride=1):
    """Convolution with Keras's "same" padding: [N, c_in, H, H] -> [N, c_out, H / stride, H / stride]."""
    before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
    return nn.Sequential(nn.ZeroPad2d((before, after, before, after)), nn.Conv2d(c_in, c_out, kernel, stride))


def conv_stack(image_size, channels, kernel, activation):
    """What E and D_x share: images [N, 3, S, S] -> features [N, 64 channels]."""
    halvings = image_size.bit_length() - 3  # down to 4 x 4
    layers, c_in = [AddNoise()], 3
    for i, width in enumerate((1, 1, 2, 2, 2, 4)):
        c_out = width * channels
        layers += [same_conv(c_in, c_out, kernel, 2 if i < halvings else 1), ChannelNorm(c_out, NORM_EPSILON)]
        layers += [activation, MultiplyNoise()]
        c_in = c_out
    return *layers, nn.Flatten()


class Encoder(nn.Sequential):
    """E: images x [N, 3, S, S] in [-1, 1] -> latents z_hat [N, Z]."""

    def __init__(self, image_size, channels, latent_dim):
        super().__init__(*conv_stack(image_size, channels, 4, nn.ReLU()), nn.Linear(64 * channels, latent_dim))


class ImageDiscriminator(nn.Sequential):
    """D_x: images [N, 3, S, S] in [-1, 1] -> logits [N, 1], positive for real ones."""

    def __init__(self, image_size, channels):
        super().__init__(*conv_stack(image_size, channels, 3, nn.LeakyReLU(LEAK)), nn.Linear(64 * channels, 1))


class LatentDiscriminator(nn.Module):
    """D_z: latents [N, Z] -> logits [N, 1], positive for real ones. Each layer sees the outputs of all before it."""

    def __init__(self, latent_dim, width=16, depth=16):
        super().__init__()
        self.noise = AddNoise()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(latent_dim + i * width, width),
                nn.LayerNorm(width, NORM_EPSILON),
                nn.LeakyReLU(LEAK),
                MultiplyNoise(),
            )
            for i in range(depth)
        )
        self.head = nn.Sequential(
            nn.Linear(latent_dim + depth * width, 128), nn.LeakyReLU(LEAK), MultiplyNoise(), nn.Linear(128, 1)
        )

    def forward(self, z):
        h = self.noise(z)
        for layer in self.layers:
            h = torch.cat([h, layer(h)], dim=1)
        return self.head(h)  # (N, Z + 256) -> (N, 1)


class Generator(nn.Module):
    """G: latents z [N, Z] -> images x_hat [N, 3, S, S] in [-1, 1]. A style vector joins the input of every layer."""

    def __init__(self, image_size, channels, latent_dim):
        super().__init__()
        doublings = image_size.bit_length() - 3  # from 4 x 4
        self.scales = (1,) * (4 - doublings) + (2,) * doublings + (1,) * (6 - max(4, doublings))
        widths = [w * channels for w in (1, 4, 2, 2, 1, 1)]
        self.trunk = nn.Sequential(nn.Linear(latent_dim, 16 * channels), nn.Unflatten(1, (channels, 4, 4)))
        self.trunk.extend([ChannelNorm(channels, NORM_EPSILON), nn.ReLU()])
        self.style = nn.Sequential(nn.Linear(latent_dim, channels), nn.LayerNorm(channels, NORM_EPSILON), nn.ReLU())
        self.layers = nn.ModuleList(
            nn.Sequential(same_conv(c_in + channels, c_out, 4), ChannelNorm(c_out, NORM_EPSILON), nn.ReLU())
            for c_in, c_out in zip(widths, widths[1:])
        )
        self.layers.append(nn.Sequential(same_conv(widths[-1] + channels, 3, 4), nn.Tanh()))

    def forward(self, z):
        h, style = self.trunk(z), self.style(z)[:, :, None, None]  # (N, c, 4, 4), (N, c, 1, 1)
        for scale, layer in zip(self.scales, self.layers):
            h = torch.cat([h, style.expand(-1, -1, *h.shape[2:])], dim=1)
            h = layer(F.interpolate(h, scale_factor=scale) if scale > 1 else h)
        return h


def build_networks(model, image_size, channels, latent_dim):
    """The networks of MODELS[model] by the paper's names, with fresh weights, in training mode."""
    networks = {
        "G": Generator(image_size, channels, latent_dim),
        "E": Encoder(image_size, channels, latent_dim),
        "D_x": ImageDiscriminator(image_size, channels),
        "D_z": LatentDiscriminator(latent_dim),
    }
    for module in nn.ModuleDict(networks).modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.zeros_(module.bias)
    return nn.ModuleDict({name: networks[name] for name in MODELS[model]})


# ----------------------------------------------------------------------------------------------------------- losses


def discriminator_loss(d_real, d_fake):
    """Eq. 2 to 5 as D minimises them: -E[log D(real)] - E[log(1 - D(fake))], with smoothed labels 0.95 and 0.05.

    d_real, d_fake: logits [N, 1]. Eq. 2: D_x of x, x_hat; Eq. 3: D_x of x, x_tilde; Eq. 4: D_z of z, z_hat; Eq. 5: D_z
    of z, z_tilde.
    """
    real = F.binary_cross_entropy_with_logits(d_real, torch.full_like(d_real, REAL))
    return real + F.binary_cross_entropy_with_logits(d_fake, torch.full_like(d_fake, FAKE))


def generator_loss(d_fake):
    """Eq. 2 to 5 as G and E minimise them: -E[log D(fake)] (ruling 2). d_fake: logits [N, 1], as above."""
    return F.binary_cross_entropy_with_logits(d_fake, torch.ones_like(d_fake))


def image_reconstruction_loss(x_tilde, x):
    """Eq. 6, first term, without its weight: E|x_tilde - x|, mean over pixels. Images [N, 3, S, S]."""
    return F.l1_loss(x_tilde, x)


def latent_reconstruction_loss(z_tilde, z):
    """Eq. 6, second term, without its weight: E(z_tilde - z)^2, mean over dimensions. Latents [N, Z]."""
    return F.mse_loss(z_tilde, z)


def total_loss(terms, weights):
    """Eq. 7, with the weights of Eq. 6: the sum of weights[name] * terms[name] over the terms that the model has."""
    return sum(weights[name] * term for name, term in terms.items())


def all_losses(nets, x, z, weights):
    """All losses of one forward pass: images x [N, 3, S, S] in [-1, 1], latents z [N, Z] -> {name: scalar}.

    `D_x`, `D_z` and `G_E` are minimised by the networks of that name; the others are the terms of `G_E`, unweighted.
    """
    G, E, D_x, D_z = (nets[name] if name in nets else None for name in ("G", "E", "D_x", "D_z"))
    losses, terms = {}, {}
    if E:
        z_hat = E(x)
        x_tilde = G(z_hat)
        terms["r_x"] = image_reconstruction_loss(x_tilde, x)
    if D_x:
        x_hat = G(z)
        fakes = {"x_hat": x_hat, "x_tilde": x_tilde} if E else {"x_hat": x_hat}
        d_real, *d_fakes = D_x(torch.cat([x, *fakes.values()])).chunk(1 + len(fakes))
        losses["D_x"] = sum(discriminator_loss(d_real, d_fake) for d_fake in d_fakes)  # Eq. 2 + Eq. 3
        terms.update((name, generator_loss(d_fake)) for name, d_fake in zip(fakes, d_fakes))
    if D_z:
        fakes = {"z_hat": z_hat, "z_tilde": E(x_hat)} if D_x else {"z_hat": z_hat}
        d_real, *d_fakes = D_z(torch.cat([z, *fakes.values()])).chunk(1 + len(fakes))
        losses["D_z"] = sum(discriminator_loss(d_real, d_fake) for d_fake in d_fakes)  # Eq. 4 + Eq. 5
        terms.update((name, generator_loss(d_fake)) for name, d_fake in zip(fakes, d_fakes))
        if D_x:
            terms["r_z"] = latent_reconstruction_loss(fakes["z_tilde"], z)
    return {**losses, "G_E": total_loss(terms, weights), **terms}


# --------------------------------------------------------------------------------------------------------- training


def build_optimizers(nets, lr, lr_discriminator):
    """One Adam for each loss that is minimised, by the loss's name: G and E share one, D_x and D_z have their own."""
    optimizers = {}
    for loss, names, rate in (
        ("D_x", ["D_x"], lr_discriminator),
        ("D_z", ["D_z"], lr_discriminator),
        ("G_E", "GE", lr),
    ):
        parameters = [p for name in names if name in nets for p in nets[name].parameters()]
        if parameters:
            optimizers[loss] = torch.optim.Adam(parameters, rate, BETAS, fused=True)
    return optimizers


def draw_batch(images, batch_size, latent_dim, flip):
    """x: random images of uint8 [M, 3, S, S] in [-1, 1], mirrored at random if flip; z ~ N(0, I). On their device."""
    device = images.device
    x = to_float(images[torch.randint(len(images), (batch_size,), device=device)])
    if flip:
        x = torch.where(torch.rand(batch_size, 1, 1, 1, device=device) < 0.5, x.flip(-1), x)
    return x, torch.randn(batch_size, latent_dim, device=device)


def train_step(nets, optimizers, x, z, weights):
    """One update of every network, all at the same point. Returns the losses of all_losses before it, as tensors."""
    losses = all_losses(nets, x, z, weights)
    for name, optimizer in optimizers.items():
        optimizer.zero_grad()
        losses[name].backward(inputs=optimizer.param_groups[0]["params"], retain_graph=True)
    for optimizer in optimizers.values():
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad.div_((parameter.grad.norm() / CLIP_NORM).clamp(min=1))
        optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()}


# ------------------------------------------------------------------------------------------------------- evaluation


def save_samples(path, nets, z):
    """Figure 3: G(z), ten a row. z: [N, Z]."""
    save_grid(path, nets["G"](z))


def save_reconstructions(path, nets, x):
    """Figure 4: pairs (x, G(E(x))), five a row. x: images [N, 3, S, S] in [-1, 1]."""
    save_grid(path, x, nets["G"](nets["E"](x)), columns=5)


def save_interpolations(path, nets, x, columns=8):
    """Figure 1: x_1, images on the straight line from E(x_1) to E(x_2), x_2; the last row from an image to its mirror.

    x: nine images [9, 3, S, S] in [-1, 1]: four pairs, and the one that is mirrored.
    """
    x_1, x_2 = x[0::2], torch.cat([x[1::2], x[8:].flip(-1)])
    z_1, z_2 = nets["E"](x_1), nets["E"](x_2)
    between = [nets["G"](torch.lerp(z_1, z_2, i / (columns - 1))) for i in range(columns)]
    save_grid(path, torch.stack([x_1, *between, x_2], dim=1).flatten(0, 1), columns=columns + 2)


def sample_diversity(samples, images):
    """Mean Euclidean distance between two samples over that between two images: 1 as varied as they, 0 collapsed.

    samples, images: [N, 3, S, S], [M, 3, S, S]; N, M > 1. Section 4.1 judges "total mode collapse" by eye.
    """
    return (torch.pdist(samples.flatten(1)).mean() / torch.pdist(images.flatten(1)).mean()).item()


def measure(nets, data, z):
    """The figures of merit of results.json, on held-out images and latents z [N, Z]; None where there is no E."""
    G, E = nets["G"], nets["E"] if "E" in nets else None
    x_hat = G(z)
    mean_image = sum(part.sum(0, dtype=torch.float64) for part in data.train.split(1000)) / len(data.train)
    mean_image = to_float(mean_image).to(z.device)
    l1, l1_of_mean_image = 0.0, 0.0
    for part in data.heldout.split(250):
        x = to_float(part.to(z.device))
        share = len(x) / len(data.heldout)
        l1_of_mean_image += share * F.l1_loss(mean_image.expand_as(x), x).item()
        l1 += share * F.l1_loss(G(E(x)), x).item() if E else 0
    return {
        "heldout_l1": l1 if E else None,
        "heldout_l1_of_mean_image": l1_of_mean_image,
        "latent_mse": F.mse_loss(E(x_hat), z).item() if E else None,
        "sample_diversity": sample_diversity(x_hat, to_float(data.heldout[: len(z)].to(z.device))),
    }


@torch.no_grad()
def evaluate(nets, data, latent_dim, out, step=None):
    """Save samples_<step>.png and reconstructions_<step>.png to the folder out; without a step Figures 1, 3 and 4.

    Returns measure()'s results. All runs show the same held-out images, and samples from the same vectors.
    """
    device = next(nets.parameters()).device
    z = torch.randn(256, latent_dim, generator=torch.Generator().manual_seed(0)).to(device)
    x = to_float(data.heldout[torch.arange(40) % len(data.heldout)].to(device))
    nets.eval()
    save_samples(out / ("figure3_samples.png" if step is None else f"samples_{step}.png"), nets, z[:100])
    if "E" in nets:
        name = "figure4_reconstructions.png" if step is None else f"reconstructions_{step}.png"
        save_reconstructions(out / name, nets, x)
        if step is None:
            save_interpolations(out / "figure1_interpolations.png", nets, x[:9])
    results = measure(nets, data, z)
    nets.train()
    return results


# ------------------------------------------------------------------------------------------------------ command line


def fail(message):
    """Ends the program with one line on the standard error and exit status 2."""
    print(f"aegan.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args(argv=None):
    """The arguments, and the checkpoint that --resume or --eval names (None without)."""
    quick = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in QUICK.items())
    parser = argparse.ArgumentParser(
        description="Autoencoding generative adversarial networks (Lazarou 2020). Defaults are the paper's (section 4) "
        "and those of the author's published code.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.error = fail
    add = parser.add_argument
    add("--model", choices=MODELS, default="aegan", help="the paper's model, or one of its baselines (section 4)")
    add("--data", default="faces", help="a folder of images, searched through, or faces (drawn), cifar10, mnist")
    add("--out", default="runs/aegan", help="folder for pictures, log.csv, results.json and checkpoint.pt")
    add("--resume", action="store_true", help="go on with the run in --out, with a larger --steps: further")
    add("--eval", action="store_true", help="no training: figures and results of the run in --out")
    add(
        "--quick", action="store_true", help=f"faces in three minutes on two CPU cores, the paper's set-up with {quick}"
    )
    add("--steps", type=positive, default=300_000, help="updates of every network (section 4)")
    add("--batch-size", type=positive, default=16, help="images a step (section 4)")
    add("--image-size", type=int, choices=IMAGE_SIZES, default=64, help="side of the images in pixels (section 4)")
    add("--channels", type=positive, default=64, help="of the widest images; 1, 2, 4 times as many elsewhere")
    add("--latent-dim", type=positive, default=32, help="dimensions Z of the latents (section 4)")
    add("--lr", type=float, default=2e-4, help="learning rate of G and E")
    add("--lr-discriminator", type=float, default=5e-4, help="learning rate of D_x and D_z")
    add("--lambda-ax", type=float, default=1.0, help="weight of Eq. 2 and 3 for G and E")
    add("--lambda-az", type=float, default=1.0, help="weight of Eq. 4 and 5 for G and E")
    add("--lambda-rx", type=float, default=10.0, help="weight of the image reconstruction (Eq. 6)")
    add("--lambda-rz", type=float, default=5.0, help="weight of the latent reconstruction (Eq. 6)")
    add("--no-flip", action="store_true", help="leave out the mirror images (section 4)")
    add("--log-every", type=positive, default=100, help="steps from one line of the log to the next")
    add("--save-every", type=positive, default=2000, help="steps from one checkpoint, with pictures, to the next")
    add("--seed", type=int, default=0, help="of weights, batches and noise; the held-out images are always the same")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")

    args, checkpoint = parser.parse_args(argv), None
    path = Path(args.out, "checkpoint.pt")
    if args.resume or args.eval:
        checkpoint = load_checkpoint(path)
        parser.set_defaults(**checkpoint["config"])
    elif args.quick:
        parser.set_defaults(**QUICK)
    if checkpoint is None and path.exists():
        fail(f"{args.out} holds a run: go on with --resume, or give another --out")
    args = parser.parse_args(argv)
    for name, value in checkpoint["config"].items() if checkpoint else ():
        if getattr(args, name) != value and name not in ("data", "steps", "log_every", "save_every"):
            fail(f"{args.out} was made with {name} = {value}, not {getattr(args, name)}: give another --out")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
    return args, checkpoint


def positive(text):
    """A whole number above 0."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def load_checkpoint(path):
    """What save_checkpoint wrote, on the CPU. Ends the program if path is not such a file."""
    if not path.is_file():
        fail(f"{path} does not exist: start the run without --resume and --eval")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] == "aegan":
            return checkpoint
    except Exception:  # torch.load raises many kinds on a file that is no checkpoint
        pass
    fail(f"{path} is not a checkpoint of aegan.py: give another --out")


def open_log(path, step):
    """log.csv to append to, without the lines that a stopped run wrote after its last checkpoint, at the given step."""
    rows = list(csv.reader(path.open(newline=""))) if step and path.exists() else []
    rows = [row for row in rows if row == rows[0] or len(row) == len(rows[0]) and int(row[0]) <= step]
    log = path.open("w", newline="", buffering=1)
    csv.writer(log).writerows(rows)
    return log


def train(args, nets, optimizers, data, run):
    """From step run["step"] to args.steps; a log line every args.log_every, a checkpoint every args.save_every steps."""
    out, images = Path(args.out), data.train.to(args.device)
    weights = {"x_hat": args.lambda_ax, "x_tilde": args.lambda_ax, "z_hat": args.lambda_az, "z_tilde": args.lambda_az}
    weights |= {"r_x": args.lambda_rx, "r_z": args.lambda_rz}

    def save():
        """Write a temporary file and rename it: checkpoint.pt is always whole."""
        state = {"networks": nets.state_dict(), "optimizers": {k: v.state_dict() for k, v in optimizers.items()}}
        state |= {"random": torch.get_rng_state(), "cuda_random": torch.cuda.get_rng_state_all()}
        torch.save({"script": "aegan", **run, **state}, out / "checkpoint.tmp")
        os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")

    if run["step"] == 0:
        out.mkdir(parents=True, exist_ok=True)
        save()
    log, stops = open_log(out / "log.csv", run["step"]), []
    # Ctrl-C ends the loop after the step under way; a second one ends it at once.
    signal.signal(signal.SIGINT, lambda *_: stops.append(signal.signal(signal.SIGINT, signal.default_int_handler)))
    last_step, last_time, stop = run["step"], time.perf_counter(), False
    while run["step"] < args.steps and not stop:
        x, z = draw_batch(images, args.batch_size, args.latent_dim, not args.no_flip)
        losses = train_step(nets, optimizers, x, z, weights)
        run["step"] += 1
        step, stop = run["step"], bool(stops)
        log_due, save_due = step == 10 or step % args.log_every == 0, step % args.save_every == 0 or step == args.steps
        if not (log_due or save_due or stop):
            continue
        values = dict(zip(losses, torch.stack(list(losses.values())).tolist()))  # the host waits for the device here
        now = time.perf_counter()
        run["seconds"] += now - last_time
        broken = [f"loss {name}" for name, value in values.items() if not math.isfinite(value)]
        broken += [f"weight {name}" for name, p in nets.named_parameters() if save_due and not p.isfinite().all()]
        if broken:
            fail(f"the {broken[0]} is not finite at step {step}; {out}/checkpoint.pt holds an earlier step")
        if log_due:
            rate = (step - last_step) / (now - last_time)
            left = timedelta(seconds=round((args.steps - step) / rate))
            terms = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
            print(f"step {step}  {terms}  {rate:.1f} steps/s  {left} left", flush=True)
            if step == 10 and left > timedelta(hours=1) and args.device == "cpu":
                print("That is long: --quick takes three minutes on a CPU.", flush=True)
            if log.tell() == 0:
                csv.writer(log).writerow(["step", *values])
            csv.writer(log).writerow([step, *values.values()])
        if save_due or stop:
            evaluate(nets, data, args.latent_dim, out, step)
            save()
        last_step, last_time = step, time.perf_counter()
    if stop:
        print(f"Stopped after step {step}: go on with --resume.")
        sys.exit(130)


def main(argv=None):
    args, checkpoint = parse_args(argv)
    out, device = Path(args.out), torch.device(args.device)
    try:
        data = load_data(args.data, args.image_size)
    except DataError as error:
        fail(error)
    if len(data.train) < args.batch_size:
        fail(f"{args.data} has {len(data.train)} training images, fewer than --batch-size {args.batch_size}")
    fingerprint = zlib.crc32(data.heldout.numpy(), zlib.crc32(data.train.numpy()))
    if checkpoint and checkpoint["fingerprint"] != fingerprint:
        fail(f"{args.data} does not hold the images that {args.out} was made with")

    torch.manual_seed(args.seed)
    nets = build_networks(args.model, args.image_size, args.channels, args.latent_dim).to(device)
    optimizers = build_optimizers(nets, args.lr, args.lr_discriminator)
    run = {"step": 0, "seconds": 0.0, "fingerprint": fingerprint}
    run["config"] = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "eval", "device")}
    if checkpoint:
        run |= {"step": checkpoint["step"], "seconds": checkpoint["seconds"]}
        nets.load_state_dict(checkpoint["networks"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(checkpoint["optimizers"][name])
        torch.set_rng_state(checkpoint["random"])
        torch.cuda.set_rng_state_all(checkpoint["cuda_random"])
    if not args.eval:
        train(args, nets, optimizers, data, run)

    results = evaluate(nets, data, args.latent_dim, out)
    results |= {"steps": run["step"], "steps_per_second": run["step"] / run["seconds"], "config": run["config"]}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{args.model} on {args.data} after {run['step']} steps")
    for name, value in results.items():
        if isinstance(value, float):
            print(f"  {name:26}{value:8.3f}")
    print(f"  Figures 1, 3, 4 and results.json are in {out}/")


if __name__ == "__main__":
    main()
