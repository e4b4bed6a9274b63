# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy", "pillow>=10.1"]
# ///
"""Autoencoding generative adversarial networks (Conor Lazarou, arXiv:2004.05472, 2020).

Four networks: a generator G from latents to images, an encoder E from images to latents, and a discriminator on either
side, D_x of images and D_z of latents. G and E must fool them with what they make of real latents and images,
x_hat = G(z) and z_hat = E(x), and with what they make of each other's output, x_tilde = G(E(x)) and z_tilde = E(G(z));
and the latter two must be the x and z they began with. So G and E become each other's inverse, and G, which has to
give back every training image, cannot collapse to a few.

    python aegan.py --quick                             # cartoon faces within three minutes on two CPU cores
    python aegan.py --data photos/ --out runs/photos    # the paper's set-up on a folder of images
    python aegan.py --model gan --out runs/gan          # the paper's baseline: the same G and D_x alone

paper -> code
    Figure 2   the four networks                    Generator, Encoder, ImageDiscriminator, LatentDiscriminator
    Eq. 1-5    adversarial losses                   discriminator_loss (for D_x, D_z), generator_loss (for G, E)
    Eq. 6      reconstruction losses                image_reconstruction_loss, latent_reconstruction_loss
    Eq. 7      the whole objective                  total_loss (for G, E); all in all_losses, minimised by train_step
    Section 4  the baselines GAN and AAE            --model gan, --model aae; MODELS
    Figure 1   interpolation between real images    save_interpolations
    Figure 3   GAN and AEGAN, the same 100 vectors  save_samples
    Figure 4   reconstructions by AAE and AEGAN     save_reconstructions
    Sec. 4.1   "total mode collapse" of the GAN     sample_diversity

Rulings, where the paper is silent, or its text and the author's published code part
    - The paper names no architecture and no weights; numbers that cite no section are from that code, or Adam's usual.
    - G and E minimise -log D(fake), not log(1 - D(fake)), and only the discriminators' labels are smoothed, as there.
    - The norms of Eq. 6 are means: absolute error over pixels, squared error over latent dimensions, as there.
    - log D_x(x) stands in Eq. 2 and in Eq. 3, so real images count twice, against two kinds of fakes; latents likewise.
    - There, D_x and D_z are updated four times, a kind of batch each, then G and E four times. Here a step draws one x
      and one z and updates every network once with all its terms: in the same ratio, from one forward pass.
    - D_x has layer norm as E has; dense layers start as Keras's do (Glorot's weights, zero biases).
    - The AAE is that of Makhzani et al., which the paper cites: Eq. 4 and the image term of Eq. 6.
    - Batches are drawn with replacement; each image is mirrored with probability 1/2, for the paper's mirrored copies.
    - Other image sizes keep six layers and the 4x4 bottleneck; the number of layers that resize varies.
    - "11134 epochs" is a misprint: 300,000 steps of 16 are 111.34 epochs of 43,104 images.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
import zlib
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import DataError, draw_images, load_data, place_images, save_grid, to_float

MODELS = {"aegan": ("G", "E", "D_x", "D_z"), "gan": ("G", "D_x"), "aae": ("G", "E", "D_z")}  # Section 4
IMAGE_SIZES = (16, 32, 64, 128, 256)
REAL, FAKE = 0.95, 0.05  # the discriminators' labels
LEAK = 0.02  # slope of the discriminators' leaky ReLU
NORM_EPSILON = 1e-3
INPUT_NOISE = 0.01  # standard deviation of the noise added to the inputs of E, D_x, D_z
LAYER_NOISE = math.sqrt(0.005 / (1 - 0.005))  # and of the factor after each of their layers: Keras's rate of 0.005
BETAS = (0.5, 0.999)
CLIP_NORM = 1.0  # of each parameter's gradient
QUICK = {"image_size": 16, "channels": 16, "steps": 1100, "save_every": 300}
QUICK |= {"lr": 5e-4, "lambda_ax": 0.05, "lambda_az": 0.05, "lambda_rz": 0.5}


# ---------------------------------------------------------------------------------------------------------- networks


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels, at each pixel: [N, C, H, W] -> [N, C, H, W]."""

    def __init__(self, channels):
        super().__init__(channels, NORM_EPSILON)

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class AddNoise(nn.Module):
    """In training, x + 0.01 n with n ~ N(0, I)."""

    def forward(self, x):
        return x + torch.normal(0, INPUT_NOISE, x.shape, device=x.device) if self.training else x


class MultiplyNoise(nn.Module):
    """In training, x (1 + 0.07 n) with n ~ N(0, I)."""

    def forward(self, x):
        return x * torch.normal(1, LAYER_NOISE, x.shape, device=x.device) if self.training else x


def same_conv(c_in, c_out, kernel, stride=1):
    """Convolution with Keras's "same" padding: [N, c_in, H, H] -> [N, c_out, H / stride, H / stride]."""
    before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
    return nn.Sequential(nn.ZeroPad2d((before, after, before, after)), nn.Conv2d(c_in, c_out, kernel, stride))


def conv_stack(image_size, channels, kernel, activation):
    """What E and D_x share: images [N, 3, S, S] in [-1, 1] -> features [N, 64 * channels]."""
    widths = [3] + [channels * w for w in (1, 1, 2, 2, 2, 4)]
    halvings = image_size.bit_length() - 3  # to 4x4
    strides = [2] * halvings + [1] * (6 - halvings)
    layers = [AddNoise()]
    for c_in, c_out, stride in zip(widths, widths[1:], strides):
        layers += [same_conv(c_in, c_out, kernel, stride), ChannelNorm(c_out), activation, MultiplyNoise()]
    return nn.Sequential(*layers, nn.Flatten())


class Encoder(nn.Sequential):
    """E: images x [N, 3, S, S] in [-1, 1] -> latents z_hat [N, Z]."""

    def __init__(self, image_size, channels, latent_dim):
        super().__init__(conv_stack(image_size, channels, 4, nn.ReLU()), nn.Linear(64 * channels, latent_dim))


class ImageDiscriminator(nn.Sequential):
    """D_x: images [N, 3, S, S] in [-1, 1] -> logits [N, 1], positive for real ones."""

    def __init__(self, image_size, channels):
        super().__init__(conv_stack(image_size, channels, 3, nn.LeakyReLU(LEAK)), nn.Linear(64 * channels, 1))


class LatentDiscriminator(nn.Module):
    """D_z: latents [N, Z] -> logits [N, 1], positive for real ones. Each layer sees the outputs of all before it."""

    def __init__(self, latent_dim, width=16, depth=16):
        super().__init__()
        self.noise, self.layers = AddNoise(), nn.ModuleList()
        for c_in in range(latent_dim, latent_dim + depth * width, width):
            norm = nn.LayerNorm(width, NORM_EPSILON)
            self.layers.append(nn.Sequential(nn.Linear(c_in, width), norm, nn.LeakyReLU(LEAK), MultiplyNoise()))
        self.hidden = nn.Sequential(nn.Linear(latent_dim + depth * width, 128), nn.LeakyReLU(LEAK), MultiplyNoise())
        self.logit = nn.Linear(128, 1)

    def forward(self, z):
        h = self.noise(z)
        for layer in self.layers:
            h = torch.cat([h, layer(h)], dim=1)  # (N, Z), (N, Z + 16), ..., (N, Z + 256)
        return self.logit(self.hidden(h))


class Generator(nn.Module):
    """G: latents z [N, Z] -> images x_hat [N, 3, S, S] in [-1, 1]. A style vector joins the input of every layer."""

    def __init__(self, image_size, channels, latent_dim):
        super().__init__()
        doublings = image_size.bit_length() - 3  # from 4x4
        self.scales = [1] * (4 - doublings) + [2] * doublings + [1] * min(2, 6 - doublings)
        widths = [channels * w for w in (1, 4, 2, 2, 1, 1)]
        self.trunk = nn.Sequential(nn.Linear(latent_dim, 16 * channels), nn.Unflatten(1, (channels, 4, 4)))
        self.trunk.extend([ChannelNorm(channels), nn.ReLU()])
        self.style = nn.Sequential(nn.Linear(latent_dim, channels), nn.LayerNorm(channels, NORM_EPSILON), nn.ReLU())
        self.layers = nn.ModuleList()
        for c_in, c_out in zip(widths, widths[1:]):
            self.layers.append(nn.Sequential(same_conv(c_in + channels, c_out, 4), ChannelNorm(c_out), nn.ReLU()))
        self.layers.append(nn.Sequential(same_conv(2 * channels, 3, 4), nn.Tanh()))

    def forward(self, z):
        h, style = self.trunk(z), self.style(z)[:, :, None, None]  # (N, c, 4, 4), (N, c, 1, 1)
        for scale, layer in zip(self.scales, self.layers):
            h = torch.cat([h, style.expand(-1, -1, *h.shape[2:])], dim=1)
            h = layer(F.interpolate(h, scale_factor=scale) if scale > 1 else h)  # to the nearest neighbour
        return h


def build_networks(model, image_size, channels, latent_dim):
    """The networks of MODELS[model] by the paper's names; from one seed they are the same in all models."""
    nets = nn.ModuleDict({"G": Generator(image_size, channels, latent_dim)})
    nets["E"] = Encoder(image_size, channels, latent_dim)
    nets["D_x"] = ImageDiscriminator(image_size, channels)
    nets["D_z"] = LatentDiscriminator(latent_dim)
    for layer in nets.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.zeros_(layer.bias)
            nn.init.normal_(layer.weight, std=0.02) if layer.weight.ndim == 4 else nn.init.xavier_uniform_(layer.weight)
    return nn.ModuleDict({name: nets[name] for name in MODELS[model]})


# ------------------------------------------------------------------------------------------------------------ losses


def discriminator_loss(d_real, d_fake):
    """Eq. 2 to 5 as D minimises them: -E[log D(real)] - E[log(1 - D(fake))], with labels 0.95 and 0.05 for 1 and 0.

    d_real, d_fake: D's logits [N, 1]; in Eq. 1 and 2 D_x of x and x_hat, in Eq. 3 D_x of x and x_tilde, in Eq. 4 D_z of
    z and z_hat, in Eq. 5 D_z of z and z_tilde.
    """
    real = F.binary_cross_entropy_with_logits(d_real, torch.full_like(d_real, REAL))
    return real + F.binary_cross_entropy_with_logits(d_fake, torch.full_like(d_fake, FAKE))


def generator_loss(d_fake):
    """Eq. 2 to 5 as G and E minimise them: -E[log D(fake)]. d_fake: D's logits [N, 1], as in discriminator_loss."""
    return F.binary_cross_entropy_with_logits(d_fake, torch.ones_like(d_fake))


def image_reconstruction_loss(x_tilde, x):
    """Eq. 6, first term without its weight: E|x_tilde - x|, the mean over pixels. x_tilde, x: [N, 3, S, S]."""
    return F.l1_loss(x_tilde, x)


def latent_reconstruction_loss(z_tilde, z):
    """Eq. 6, second term without its weight: E(z_tilde - z)^2, the mean over dimensions. z_tilde, z: [N, Z]."""
    return F.mse_loss(z_tilde, z)


def total_loss(terms, weights):
    """Eq. 7 for G and E: the sum of weights[name] * terms[name], over the terms that the model has."""
    return sum(weights[name] * term for name, term in terms.items())


def adversarial_losses(D, real, fakes):
    """One pass of D over real and fake inputs {name: tensor}: D's loss, and G and E's losses {name: scalar}."""
    d_real, *d_fakes = D(torch.cat([real, *fakes.values()])).chunk(1 + len(fakes))
    loss = sum(discriminator_loss(d_real, d_fake) for d_fake in d_fakes)
    return loss, {name: generator_loss(d_fake) for name, d_fake in zip(fakes, d_fakes)}


def all_losses(nets, x, z, weights):
    """The losses of one forward pass: images x [N, 3, S, S] in [-1, 1] and latents z [N, Z] -> {name: scalar}.

    `D_x`, `D_z` and `G_E` are for the networks of that name to minimise; the other names are the terms of `G_E`, whose
    weights are {name: number}: the paper's are 1 for x_hat, x_tilde, z_hat, z_tilde, 10 for r_x and 5 for r_z.
    """
    G, E = nets["G"], nets["E"] if "E" in nets else None
    losses, terms, x_fakes, z_fakes = {}, {}, {}, {}
    if "D_x" in nets:
        x_fakes["x_hat"] = G(z)
    if E:
        z_fakes["z_hat"] = E(x)
        x_fakes["x_tilde"] = G(z_fakes["z_hat"])
        terms["r_x"] = image_reconstruction_loss(x_fakes["x_tilde"], x)
    if E and "D_x" in nets:
        z_fakes["z_tilde"] = E(x_fakes["x_hat"])
        terms["r_z"] = latent_reconstruction_loss(z_fakes["z_tilde"], z)
    for name, real, fakes in (("D_x", x, x_fakes), ("D_z", z, z_fakes)):  # Eq. 2 and 3, Eq. 4 and 5
        if name in nets:
            losses[name], adversarial = adversarial_losses(nets[name], real, fakes)
            terms |= adversarial
    return {**losses, "G_E": total_loss(terms, weights), **terms}


# ---------------------------------------------------------------------------------------------------------- training


def build_optimizers(nets, lr, lr_discriminator):
    """One Adam for each loss that is minimised, by the loss's name: G and E share one, D_x and D_z have their own."""
    optimizers = {}
    for loss, names, rate in (("D_x", "D_x", lr_discriminator), ("D_z", "D_z", lr_discriminator), ("G_E", "G E", lr)):
        parameters = [p for name in names.split() if name in nets for p in nets[name].parameters()]
        if parameters:
            optimizers[loss] = torch.optim.Adam(parameters, rate, BETAS, fused=True, capturable=True)
    return optimizers


def draw_batch(images, latent_dim, flip):
    """x: the images uint8 [N, 3, S, S] in [-1, 1], mirrored at random if flip; z ~ N(0, I): [N, Z]."""
    x = to_float(images)
    if flip:
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)
    return x, torch.randn(len(x), latent_dim, device=x.device)


def train_step(nets, optimizers, x, z, weights):
    """One update of every network, all at the same point. Returns the losses there, as tensors: see all_losses."""
    losses = all_losses(nets, x, z, weights)
    for name, optimizer in optimizers.items():
        optimizer.zero_grad()
        losses[name].backward(inputs=optimizer.param_groups[0]["params"], retain_graph=True)
    for optimizer in optimizers.values():
        gradients = [parameter.grad for parameter in optimizer.param_groups[0]["params"]]
        norms = torch.stack(torch._foreach_norm(gradients))  # one call for all
        torch._foreach_div_(gradients, (norms / CLIP_NORM).clamp(min=1).unbind())
        optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()}


def record(iterate, images, nets, optimizers):
    """iterate(images) as a CUDA graph: a function that replays it and returns the same tensors, with new values.

    images: uint8 [N, 3, S, S], some of the kind that will be given. What it takes to record leaves no trace: networks,
    optimizers and random numbers are afterwards as they were before.
    """

    def state():
        """The tensors that a step changes."""
        moments = [moment for optimizer in optimizers.values() for moment in optimizer.state.values()]
        return [*nets.parameters(), *nets.buffers(), *(tensor for moment in moments for tensor in moment.values())]

    images, random = images.clone(), torch.cuda.get_rng_state(images.device)
    before = {tensor: tensor.detach().clone() for tensor in state()}
    with torch.cuda.device(images.device):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose their algorithms, Adam makes its moments
                iterate(images)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            losses = iterate(images)
    with torch.no_grad():
        for tensor in state():
            tensor.copy_(before[tensor]) if tensor in before else tensor.zero_()
    torch.cuda.set_rng_state(random, images.device)

    def replay(new_images):
        """A step on other images."""
        images.copy_(new_images)
        graph.replay()
        return losses

    return replay


def use_precision(nets, precision):
    """Let CUDA compute products in float32 alone (fp32), or in TensorFloat-32 (tf32), here and in all of the process.

    bf16: the networks compute under autocast, on any device, and return float32. Parameters and losses are float32.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    for net in nets.values() if precision == "bf16" else ():
        net.forward = partial(forward_in_bfloat16, net.forward)


def forward_in_bfloat16(forward, *inputs):
    """A network's forward under autocast. Inputs and output: tensors, float32."""
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        return forward(*inputs).float()


# -------------------------------------------------------------------------------------------------------- evaluation


def save_samples(path, nets, z):
    """Figure 3: G(z), ten a row. z: [N, Z]."""
    save_grid(path, nets["G"](z))


def save_reconstructions(path, nets, x):
    """Figure 4: pairs (x, G(E(x))), five a row. x: images [N, 3, S, S] in [-1, 1]."""
    save_grid(path, x, nets["G"](nets["E"](x)), columns=5)


def save_interpolations(path, nets, x, columns=8):
    """Figure 1: five rows of x_1, images on the straight line from E(x_1) to E(x_2), x_2.

    x: images [9, 3, S, S] in [-1, 1]: four pairs, and the one that is paired with its mirror image.
    """
    x_1, x_2 = x[0::2], torch.cat([x[1::2], x[8:].flip(-1)])
    z_1, z_2 = nets["E"](x_1), nets["E"](x_2)
    between = [nets["G"](torch.lerp(z_1, z_2, i / (columns - 1))) for i in range(columns)]
    save_grid(path, torch.stack([x_1, *between, x_2], dim=1).flatten(0, 1), columns=columns + 2)


@torch.no_grad()
def save_figures(nets, data, z, out, step=None):
    """Into the folder out: Figures 1, 3 and 4; with a step only samples_<step>.png and reconstructions_<step>.png.

    The images are the first held-out ones, the same in every run. z: latents [N, Z], of which 100 are shown.
    """
    x = to_float(data.heldout[torch.arange(40) % len(data.heldout)].to(z.device))
    nets.eval()
    save_samples(out / ("figure3_samples.png" if step is None else f"samples_{step}.png"), nets, z[:100])
    if "E" in nets:
        name = "figure4_reconstructions.png" if step is None else f"reconstructions_{step}.png"
        save_reconstructions(out / name, nets, x)
        if step is None:
            save_interpolations(out / "figure1_interpolations.png", nets, x[:9])
    nets.train()


def sample_diversity(samples, images):
    """The mean distance of two samples over that of two images (Section 4.1): about 1, or 0 in total collapse.

    samples: [N, 3, S, S], images: [M, 3, S, S], N, M > 1.
    """
    return (torch.pdist(samples.flatten(1)).mean() / torch.pdist(images.flatten(1)).mean()).item()


@torch.no_grad()
def measure(nets, data, z):
    """The figures of merit, on held-out images and latents z [N, Z]; None where the model has no encoder."""
    nets.eval()
    G, E = nets["G"], nets["E"] if "E" in nets else None
    x_hat = G(z)
    mean_image = to_float(sum(part.sum(0) for part in data.train.split(1000)) / len(data.train)).to(z.device)
    l1 = l1_of_mean_image = 0.0
    for part in data.heldout.split(250):
        x, share = to_float(part.to(z.device)), len(part) / len(data.heldout)
        l1 += share * F.l1_loss(G(E(x)), x).item() if E else 0
        l1_of_mean_image += share * F.l1_loss(mean_image.expand_as(x), x).item()
    results = {
        "heldout_l1": l1 if E else None,
        "heldout_l1_of_mean_image": l1_of_mean_image,
        "latent_mse": F.mse_loss(E(x_hat), z).item() if E else None,
        "sample_diversity": sample_diversity(x_hat, to_float(data.heldout[: len(z)].to(z.device))),
    }
    nets.train()
    return results


# ------------------------------------------------------------------------------------------------------ command line


def fail(message):
    """End the program with one line on the standard error and exit status 2."""
    print(f"aegan.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args(argv):
    """The arguments, and the checkpoint of --out if they ask for it, else None."""
    parser = argparse.ArgumentParser(
        description="Autoencoding generative adversarial networks (Lazarou 2020). Defaults are the paper's (Section 4) "
        "and, where it names none, those of the author's published code.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail
    add = parser.add_argument
    quick = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in QUICK.items())
    add("--model", choices=MODELS, default="aegan", help="the paper's model, or a baseline (Section 4)")
    add("--data", default="faces", help="folder of images, searched recursively, or faces (drawn), cifar10, mnist")
    add("--out", default="runs/aegan", help="folder for pictures, log.csv, results.json, checkpoint.pt")
    add("--resume", action="store_true", help="continue the run in --out, or with a larger --steps go further")
    add("--eval", action="store_true", help="no training: figures and results of the run in --out")
    add("--quick", action="store_true", help=f"faces within three minutes on two CPU cores: {quick}")
    add("--steps", type=int, default=300_000, help="updates of every network (Section 4)")
    add("--batch-size", type=int, default=16, help="images a step (Section 4)")
    add("--image-size", type=int, choices=IMAGE_SIZES, default=64, help="side of the images in pixels (Section 4)")
    add("--latent-dim", type=int, default=32, help="dimensions Z of the latents (Section 4)")
    add("--no-flip", action="store_true", help="do not add mirror images (Section 4)")
    add("--channels", type=int, default=64, help="width of the narrowest layers; others are 2 or 4 times as wide")
    add("--lr", type=float, default=2e-4, help="learning rate of G and E")
    add("--lr-discriminator", type=float, default=5e-4, help="learning rate of D_x and D_z")
    add("--lambda-ax", type=float, default=1.0, help="weight of Eq. 2 and 3 for G and E")
    add("--lambda-az", type=float, default=1.0, help="weight of Eq. 4 and 5 for G and E")
    add("--lambda-rx", type=float, default=10.0, help="weight of image reconstruction (Eq. 6)")
    add("--lambda-rz", type=float, default=5.0, help="weight of latent reconstruction (Eq. 6)")
    add("--log-every", type=int, default=100, help="steps between lines of the log")
    add("--save-every", type=int, default=2000, help="steps between checkpoints, with pictures")
    add("--seed", type=int, default=0, help="of weights, batches and noise; the held-out images are always the same")
    add("--precision", choices=("bf16", "tf32", "fp32"), default="tf32", help="of products; on a CPU tf32 is fp32")
    add("--graph", action="store_true", help="on CUDA: record a training step as a CUDA graph, and replay it")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")

    args, checkpoint = parser.parse_args(argv), None
    path = Path(args.out, "checkpoint.pt")
    if args.resume or args.eval:
        checkpoint = load_checkpoint(path)
        parser.set_defaults(**checkpoint["config"])
    elif path.exists():
        fail(f"{args.out} holds a run: continue it with --resume, or give another --out")
    elif args.quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    check_args(args, checkpoint)
    return args, checkpoint


def check_args(args, checkpoint):
    """Refuse arguments that cannot be, or that differ from those of the checkpoint's run, if there is one."""
    for name, value in vars(args).items():
        minimum = {int: 0 if name == "seed" else 1, float: 0}.get(type(value))
        if minimum is not None and not minimum <= value < 2**63:
            fail(f"--{name.replace('_', '-')} cannot be {value}: it must be at least {minimum}")
    free = {"data", "log_every", "save_every"}
    free |= set() if args.eval else {"steps"}
    for name, value in checkpoint["config"].items() if checkpoint else ():
        if getattr(args, name) != value and name not in free:
            fail(f"{args.out} was made with {name} = {value}, not {getattr(args, name)}: give another --out")
    if checkpoint and not args.eval and args.steps < checkpoint["step"]:
        fail(f"{args.out} is at step {checkpoint['step']} already, beyond --steps {args.steps}")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
    if args.graph and torch.device(args.device).type != "cuda":
        fail(f"--graph needs CUDA, not --device {args.device}")


def load_checkpoint(path):
    """The checkpoint that train() saved, on the CPU."""
    if not path.is_file():
        fail(f"{path} does not exist: give the --out of a run, or leave out --resume and --eval")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] == "aegan":
            return checkpoint
    except Exception:  # torch.load raises many kinds on what is no checkpoint
        pass
    fail(f"{path} is not a checkpoint of aegan.py: give another --out")


def train(args, nets, optimizers, data, z, run):
    """The training loop, from run["step"] to args.steps. z: latents [N, Z] of the pictures."""
    out, images = Path(args.out), place_images(data.train, z.device)
    weights = {"x_hat": args.lambda_ax, "x_tilde": args.lambda_ax, "z_hat": args.lambda_az, "z_tilde": args.lambda_az}
    weights |= {"r_x": args.lambda_rx, "r_z": args.lambda_rz}

    def save():
        """Write a temporary file and rename it, so that checkpoint.pt is always whole."""
        state = {"networks": nets.state_dict(), "optimizers": {k: v.state_dict() for k, v in optimizers.items()}}
        state["random"] = {"cpu": torch.get_rng_state()}
        if z.is_cuda:
            state["random"]["cuda"] = torch.cuda.get_rng_state(z.device)
        torch.save({"script": "aegan", **run, **state}, out / "checkpoint.tmp")
        os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")

    def iterate(drawn):
        """One step on uint8 images."""
        return train_step(nets, optimizers, *draw_batch(drawn, args.latent_dim, not args.no_flip), weights)

    if args.graph:
        iterate = record(iterate, images[: args.batch_size].to(z.device), nets, optimizers)
    if run["step"] == 0:
        save()
    log, stops = (out / "log.csv").open("a", buffering=1), []
    run["log_size"] = min(run["log_size"], log.tell())
    log.truncate(run["log_size"])  # without what a stopped run wrote after its last checkpoint
    signal.signal(signal.SIGINT, lambda *_: stops.append(True))  # Ctrl-C ends the loop after the step under way
    step, stop, last_step, last_time = run["step"], False, run["step"], time.perf_counter()
    while step < args.steps and not stop:
        losses = iterate(draw_images(images, args.batch_size, z.device))
        step, stop = step + 1, bool(stops)
        save_due = step % args.save_every == 0 or step == args.steps or stop
        if not (save_due or step % args.log_every == 0 or step == 10):
            continue
        values = dict(zip(losses, torch.stack(list(losses.values())).tolist()))  # waits for the device
        seconds = time.perf_counter() - last_time
        broken = [f"loss {name}" for name, value in values.items() if not math.isfinite(value)]
        broken += [f"weight {name}" for name, weight in nets.named_parameters() if not weight.isfinite().all()]
        if broken:
            fail(f"{broken[0]} is not finite by step {step}; {out}/checkpoint.pt holds the last good step")
        left = timedelta(seconds=round((args.steps - step) * seconds / (step - last_step)))
        terms = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        print(f"step {step}  {terms}  {(step - last_step) / seconds:.1f} steps/s  {left} left", flush=True)
        if step == 10 and left > timedelta(hours=1) and args.device == "cpu":
            print("This is long for a CPU: --quick takes three minutes", flush=True)
        if run["log_size"] == 0:
            print("step", *values, sep=",", file=log)
        print(step, *values.values(), sep=",", file=log)
        run |= {"step": step, "seconds": run["seconds"] + seconds, "log_size": log.tell()}
        if save_due:
            save_figures(nets, data, z, out, step)
            save()
        last_step, last_time = step, time.perf_counter()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if stop:
        print(f"stopped after step {step}: continue with --resume")
        sys.exit(130)


def main(argv=None):
    """The command line; see --help."""
    args, checkpoint = parse_args(argv)
    out, device = Path(args.out), torch.device(args.device)
    try:
        data = load_data(args.data, args.image_size)
    except DataError as error:
        fail(error)
    if len(data.train) < args.batch_size:
        fail(f"{args.data} has {len(data.train)} images to train on, fewer than --batch-size {args.batch_size}")
    fingerprint = zlib.crc32(data.heldout.numpy(), zlib.crc32(data.train.numpy()))
    if checkpoint and checkpoint["fingerprint"] != fingerprint:
        fail(f"{args.data} does not hold the images that {out} was made with: give the same --data, or another --out")

    torch.manual_seed(args.seed)
    nets = build_networks(args.model, args.image_size, args.channels, args.latent_dim).to(device)
    use_precision(nets, args.precision)
    optimizers = build_optimizers(nets, args.lr, args.lr_discriminator)
    z = torch.randn(256, args.latent_dim, generator=torch.Generator().manual_seed(0))  # the same in every run
    z = z.to(device)
    config = {
        name: value for name, value in vars(args).items() if name not in ("out", "resume", "eval", "device", "graph")
    }
    run = {"step": 0, "seconds": 0.0, "log_size": 0, "fingerprint": fingerprint, "config": config}
    if checkpoint:
        run |= {name: checkpoint[name] for name in ("step", "seconds", "log_size")}
        nets.load_state_dict(checkpoint["networks"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(checkpoint["optimizers"][name])
        torch.set_rng_state(checkpoint["random"]["cpu"])
        if z.is_cuda and "cuda" in checkpoint["random"]:
            torch.cuda.set_rng_state(checkpoint["random"]["cuda"], device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {out} cannot be made: {error.strerror}")
    print(f"{args.model} on {len(data.train)} images of {args.data}, on {device}, into {out}/", flush=True)
    if not args.eval:
        train(args, nets, optimizers, data, z, run)

    save_figures(nets, data, z, out)
    results = measure(nets, data, z)
    results |= {"steps": run["step"], "steps_per_second": run["step"] / max(run["seconds"], 1e-9), "config": config}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    for name, value in results.items():
        if isinstance(value, float):
            print(f"{name:26}{value:10.3f}")
    print(f"The figures and results.json are in {out}/")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before or after training, when there is nothing to save
        sys.exit(130)
