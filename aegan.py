# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy", "pillow>=10.1"]
# ///
"""Autoencoding generative adversarial networks (Conor Lazarou, 2020, https://arxiv.org/abs/2004.05472).

A generator G from latents to images, an encoder E back, and discriminators D_x of images, D_z of latents. x_hat = G(z)
and x_tilde = G(E(x)) must look real to D_x; z_hat = E(x) and z_tilde = E(G(z)), to D_z. x_tilde must equal x, z_tilde
must equal z. So G and E become inverse to each other. And as G has to give back every image, it should not collapse.

    python aegan.py --quick                             # cartoon faces within three minutes on two CPU cores
    python aegan.py --data photos/ --out runs/photos    # the paper's set-up on a folder of images
    python aegan.py --model gan --out runs/gan          # the paper's baseline: the same G and D_x alone

paper -> code
    Section 3.1  x, z; x_hat = G(z), z_hat = E(x), x_tilde = G(E(x)), z_tilde = E(G(z)); D(.) is the sigmoid of a logit
    Figure 2     the four networks                    Generator, Encoder (E and D_x), LatentDiscriminator
    Eq. 2-5      adversarial losses                   discriminator_loss (for D), generator_loss (for G, E)
    Eq. 6, 7     reconstruction, the whole objective  aegan_losses; which loss moves which network: train_step
    Section 4    the baselines GAN (Eq. 1) and AAE    gan_losses, aae_losses; --model
    Figure 1     interpolation between real images    save_interpolations
    Figures 3, 4 samples; pairs of x and x_tilde      save_figures
    Section 4    collapse; blur; inverses             measure's sample_diversity; sharpness; heldout_l1, latent_mse

Rulings, where the paper is silent or contradicts itself
    - It names no widths, depths or loss weights. Ours, like the noise, learning rates and Adam's numbers, are those of
      the author's code (for 64x64), to which the paper refers: https://github.com/ConorLazarou/AEGAN-keras.
    - log D_x(x) stands in Eq. 2 and in Eq. 3, so real images count twice, against two kinds of fakes; latents likewise.
    - The AAE has Eq. 4 and the image half of Eq. 6, as in that code.
Departures from the paper, shared with that code
    - G and E minimise -log D(fake), not log(1 - D(fake)), and only D's labels are smoothed.
    - The norms of Eq. 6 are means, the second one squared: so the lambdas have another scale.
    - Each parameter's gradient is clipped to a norm of 1. For G and E the sum of Eq. 2 to 5 has a weight, alpha = 1.
Departures of ours
    - That code updates each network four times a step, on new batches. Here all are updated once, at the same time.
    - Each image of a batch is mirrored with probability 1/2, in place of the paper's mirrored copies.
"""

import json
import math
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import DataError, draw_images, load_data, place_images, save_grid, to_float

NAME = "aegan"
MODELS = {"aegan": ("G", "E", "D_x", "D_z"), "gan": ("G", "D_x"), "aae": ("G", "E", "D_z")}  # Section 4
IMAGE_SIZES = {16: 2, 32: 3, 64: 4, 128: 5, 256: 6}  # side of the images: how often it is halved to reach 4x4
REAL, FAKE = 0.95, 0.05  # the discriminators' labels
LEAK = 0.02  # slope of the discriminators' leaky ReLU
INPUT_NOISE = 0.01  # deviation of the noise added to the inputs of E, D_x and D_z
LAYER_NOISE = math.sqrt(0.005 / (1 - 0.005))  # deviation of their multiplicative noise: Keras's GaussianDropout(0.005)
INITIAL_STD = 0.02  # of the weights at first, but for G.style's and D_z's, which are Xavier uniform
BETAS, EPSILON = (0.5, 0.999), 1e-7  # of Adam; Keras's epsilon
EAGER_STEPS = 3  # run before a CUDA graph is recorded, so that libraries have chosen algorithms and Adam has moments
AT_LEAST_1 = ("steps", "batch_size", "latent_dim", "channels", "log_every", "save_every")  # options
AT_LEAST_0 = ("lr", "lr_discriminator", "alpha", "lambda_rx", "lambda_rz")
MAY_CHANGE = ("data", "steps", "log_every", "save_every")  # options that --resume lets differ from the run's
QUICK = dict(image_size=16, channels=16, steps=1100, save_every=300, lr=5e-4, alpha=0.05, lambda_rz=0.5)


# ---------------------------------------------------------------------------------------------------------- networks


class ChannelNorm(nn.LayerNorm):
    """Layer norm over dimension 1, in images at each pixel: [N, C] -> [N, C] or [N, C, H, W] -> [N, C, H, W]."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-3)

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class AddNoise(nn.Module):
    """In training mode, x + 0.01 n with n ~ N(0, I)."""

    def forward(self, x):
        return x + INPUT_NOISE * torch.randn_like(x) if self.training else x


class MultiplyNoise(nn.Module):
    """In training mode, x (1 + 0.07 n) with n ~ N(0, I)."""

    def forward(self, x):
        return x * (1 + LAYER_NOISE * torch.randn_like(x)) if self.training else x


def same_conv(c_in, c_out, kernel, stride=1):
    """Convolution with Keras's "same" padding: [N, c_in, H, H] -> [N, c_out, H / stride, H / stride]."""
    before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2  # one left over goes after, as in Keras
    return nn.Sequential(nn.ZeroPad2d((before, after, before, after)), nn.Conv2d(c_in, c_out, kernel, stride))


class Encoder(nn.Sequential):
    """E: images [N, 3, S, S] in [-1, 1] -> latents z_hat [N, Z]; D_x: -> logits [N, 1], positive for real images."""

    def __init__(self, image_size, channels, outputs, kernel=4, leak=0.0):
        widths = [3] + [channels * w for w in (1, 1, 2, 2, 2, 4)]
        strides = [2] * IMAGE_SIZES[image_size] + [1] * (6 - IMAGE_SIZES[image_size])
        layers = [AddNoise()]
        for c_in, c_out, stride in zip(widths, widths[1:], strides):
            conv = same_conv(c_in, c_out, kernel, stride)
            layers += [conv, MultiplyNoise(), ChannelNorm(c_out), nn.LeakyReLU(leak)]  # a leak of 0 is a ReLU
        super().__init__(*layers, nn.Flatten(), nn.Linear(4 * channels * 4 * 4, outputs))  # 4x4 pixels


class LatentDiscriminator(nn.Module):
    """D_z: latents [N, Z] -> logits [N, 1], positive for real ones. Each layer sees the outputs of all before it."""

    def __init__(self, latent_dim, width=16, depth=16):
        super().__init__()
        self.noise = AddNoise()
        self.layers = nn.ModuleList()
        for i in range(depth):
            linear = nn.Linear(latent_dim + i * width, width)
            self.layers.append(nn.Sequential(linear, MultiplyNoise(), ChannelNorm(width), nn.LeakyReLU(LEAK)))
        self.hidden = nn.Sequential(nn.Linear(latent_dim + depth * width, 128), nn.LeakyReLU(LEAK))
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
        doublings = IMAGE_SIZES[image_size]
        first = max(0, 4 - doublings)  # the first layer that doubles the side: 2 at 16x16, 0 at 64x64
        self.scales = [2 if first <= i < first + doublings else 1 for i in range(6)]  # at 16x16: 1 1 2 2 1 1
        widths = [channels * w for w in (1, 4, 2, 2, 1, 1)]
        units = channels * 4 * 4  # 4x4 pixels
        self.trunk = nn.Sequential(nn.Linear(latent_dim, units), ChannelNorm(units), nn.ReLU())
        self.style = nn.Sequential(nn.Linear(latent_dim, channels), ChannelNorm(channels), nn.ReLU())
        self.layers = nn.ModuleList()
        for c_in, c_out in zip(widths, widths[1:]):
            self.layers.append(nn.Sequential(same_conv(c_in + channels, c_out, 4), ChannelNorm(c_out), nn.ReLU()))
        self.layers.append(nn.Sequential(same_conv(widths[-1] + channels, 3, 4), nn.Tanh()))

    def forward(self, z):
        h = self.trunk(z).unflatten(1, (-1, 4, 4))  # (N, c, 4, 4)
        style = self.style(z)[:, :, None, None]  # (N, c, 1, 1)
        for scale, layer in zip(self.scales, self.layers):
            h = torch.cat([h, style.expand(-1, -1, *h.shape[2:])], dim=1)
            if scale > 1:
                h = F.interpolate(h, scale_factor=scale)  # nearest neighbour
            h = layer(h)
        return h


def build_networks(model, image_size, channels, latent_dim):
    """The networks of MODELS[model], in training mode. With one seed a network starts alike in every model."""
    if model not in MODELS or image_size not in IMAGE_SIZES:
        raise ValueError(f"model {model}, size {image_size}: there are {list(MODELS)} and {list(IMAGE_SIZES)}")
    nets = nn.ModuleDict({"G": Generator(image_size, channels, latent_dim)})
    nets["E"] = Encoder(image_size, channels, latent_dim)
    nets["D_x"] = Encoder(image_size, channels, 1, kernel=3, leak=LEAK)
    nets["D_z"] = LatentDiscriminator(latent_dim)
    for name, layer in nets.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.zeros_(layer.bias)
            nn.init.normal_(layer.weight, std=INITIAL_STD)
            if name.startswith(("G.style", "D_z")):
                nn.init.xavier_uniform_(layer.weight)
    return nn.ModuleDict({name: nets[name] for name in MODELS[model]})


# ------------------------------------------------------------------------------------------------------------ losses


def discriminator_loss(d_real, d_fake):
    """Eq. 2 to 5 as D minimises them: -mean log D(real) - mean log(1 - D(fake)), with 0.95 and 0.05 as labels 1 and 0.

    d_real: D's logits [N, 1] of x or of z. d_fake: logits [M, 1] of x_hat or x_tilde, or of z_hat or z_tilde.
    """
    real = F.binary_cross_entropy_with_logits(d_real, torch.full_like(d_real, REAL))
    return real + F.binary_cross_entropy_with_logits(d_fake, torch.full_like(d_fake, FAKE))


def generator_loss(d_fake):
    """Eq. 2 to 5 as G and E minimise them: -mean log D(fake). d_fake: D's logits [N, 1], as in discriminator_loss."""
    return F.binary_cross_entropy_with_logits(d_fake, torch.ones_like(d_fake))


def aegan_losses(nets, x, z, weights):
    """AEGAN, one forward pass: images x [N, 3, S, S] in [-1, 1] and latents z ~ N(0, I) [M, Z] -> {name: scalar}.

    L_D_x, L_D_z and L_G_E are for the networks of that name to minimise, the others are the terms of L_G_E. weights:
    "alpha" of the four GAN terms, "lambda_rx" of r_x, "lambda_rz" of r_z; 1, 10 and 5 in the author's code.
    """
    G, E, D_x, D_z = nets["G"], nets["E"], nets["D_x"], nets["D_z"]
    x_hat, z_hat = G(z), E(x)
    x_tilde, z_tilde = G(z_hat), E(x_hat)
    # All that a discriminator judges goes through it at once, which is faster.
    d_x, d_x_hat, d_x_tilde = D_x(torch.cat([x, x_hat, x_tilde])).split([len(x), len(x_hat), len(x_tilde)])
    d_z, d_z_hat, d_z_tilde = D_z(torch.cat([z, z_hat, z_tilde])).split([len(z), len(z_hat), len(z_tilde)])
    L_D_x = discriminator_loss(d_x, d_x_hat) + discriminator_loss(d_x, d_x_tilde)  # Eq. 2, Eq. 3
    L_D_z = discriminator_loss(d_z, d_z_hat) + discriminator_loss(d_z, d_z_tilde)  # Eq. 4, Eq. 5
    GAN_x_hat, GAN_x_tilde = generator_loss(d_x_hat), generator_loss(d_x_tilde)  # Eq. 2, Eq. 3
    GAN_z_hat, GAN_z_tilde = generator_loss(d_z_hat), generator_loss(d_z_tilde)  # Eq. 4, Eq. 5
    L_GAN = GAN_x_hat + GAN_x_tilde + GAN_z_hat + GAN_z_tilde  # Section 3.1, the sum
    r_x, r_z = F.l1_loss(x_tilde, x), F.mse_loss(z_tilde, z)  # means of |x_tilde - x| and (z_tilde - z)^2
    L_r = weights["lambda_rx"] * r_x + weights["lambda_rz"] * r_z  # Eq. 6
    L_G_E = weights["alpha"] * L_GAN + L_r  # Eq. 7; alpha: the author's code
    terms = {"GAN_x_hat": GAN_x_hat, "GAN_x_tilde": GAN_x_tilde, "GAN_z_hat": GAN_z_hat, "GAN_z_tilde": GAN_z_tilde}
    return {"L_D_x": L_D_x, "L_D_z": L_D_z, "L_G_E": L_G_E, **terms, "r_x": r_x, "r_z": r_z}


def gan_losses(nets, x, z, weights):
    """The GAN of Section 4, G and D_x: Eq. 1, which is Eq. 2 alone. Otherwise as aegan_losses."""
    d_x, d_x_hat = nets["D_x"](torch.cat([x, nets["G"](z)])).split([len(x), len(z)])
    L_D_x, GAN_x_hat = discriminator_loss(d_x, d_x_hat), generator_loss(d_x_hat)  # Eq. 2
    return {"L_D_x": L_D_x, "L_G_E": weights["alpha"] * GAN_x_hat, "GAN_x_hat": GAN_x_hat}


def aae_losses(nets, x, z, weights):
    """The AAE (Makhzani et al.) of Section 4, G, E and D_z: Eq. 4 and half of Eq. 6. Otherwise as aegan_losses."""
    z_hat = nets["E"](x)
    r_x = F.l1_loss(nets["G"](z_hat), x)  # Eq. 6
    d_z, d_z_hat = nets["D_z"](torch.cat([z, z_hat])).split([len(z), len(x)])
    L_D_z, GAN_z_hat = discriminator_loss(d_z, d_z_hat), generator_loss(d_z_hat)  # Eq. 4
    L_G_E = weights["alpha"] * GAN_z_hat + weights["lambda_rx"] * r_x
    return {"L_D_z": L_D_z, "L_G_E": L_G_E, "GAN_z_hat": GAN_z_hat, "r_x": r_x}


LOSSES = {"aegan": aegan_losses, "gan": gan_losses, "aae": aae_losses}


# ---------------------------------------------------------------------------------------------------------- training


def build_optimizer(nets, lr, lr_discriminator):
    """One Adam for all networks, since they all take their step at the same time. capturable: for CUDA graphs."""
    rates = {"G": lr, "E": lr, "D_x": lr_discriminator, "D_z": lr_discriminator}
    groups = [{"params": net.parameters(), "lr": rates[name]} for name, net in nets.items()]
    return torch.optim.Adam(groups, betas=BETAS, eps=EPSILON, fused=True, capturable=True)


def make_inputs(images, latent_dim, flip):
    """uint8 images [N, 3, S, S] -> x: the same in [-1, 1], mirrored at random if flip; z ~ N(0, I): [N, Z]."""
    x = to_float(images)
    if flip:
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)
    return x, torch.randn(len(x), latent_dim, device=x.device)


def trainable(optimizer, *networks):
    """The parameters that require gradients, for backward's `inputs`. ValueError if the optimizer lacks one."""
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) not in updated for p in parameters):
        raise ValueError("the optimizer does not have all parameters of the networks")
    return parameters


def train_step(nets, optimizer, model, weights, x, z):
    """Update every network, by gradients all taken before any network moves. Returns the losses: see LOSSES."""
    losses = LOSSES[model](nets, x, z, weights)
    optimizer.zero_grad()
    # Each backward fills the gradients of its `inputs` alone. So all losses share one forward pass, without detach.
    if "D_x" in nets:
        losses["L_D_x"].backward(inputs=trainable(optimizer, nets["D_x"]), retain_graph=True)  # Eq. 2, 3
    if "D_z" in nets:
        losses["L_D_z"].backward(inputs=trainable(optimizer, nets["D_z"]), retain_graph=True)  # Eq. 4, 5
    G_E = [nets[name] for name in ("G", "E") if name in nets]
    losses["L_G_E"].backward(inputs=trainable(optimizer, *G_E))  # Eq. 7
    gradients = [p.grad for p in nets.parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))  # of each parameter's gradient by itself
    torch._foreach_div_(gradients, norms.clamp(min=1).unbind())  # each over its norm where that is above 1: clipped
    optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()}


def record(step, inputs):
    """Record step(*inputs) as a CUDA graph, without executing it. Returns a function that executes it with new inputs.
    Each call of that function overwrites the losses that the last one returned."""
    inputs = [tensor.clone() for tensor in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):  # the stream that open_device made
        losses = step(*inputs)

    def replay(*new_inputs):
        torch._foreach_copy_(inputs, new_inputs)
        graph.replay()
        return losses

    return replay


# -------------------------------------------------------------------------------------------------------- evaluation


def save_interpolations(path, nets, x_1, x_2, count=8):
    """Figure 1: a row is x_1, then count images from E(x_1) straight to E(x_2), then x_2. x_1, x_2: [N, 3, S, S]."""
    z_1, z_2 = nets["E"](x_1), nets["E"](x_2)
    between = [nets["G"](torch.lerp(z_1, z_2, i / (count - 1))) for i in range(count)]
    save_grid(path, x_1, *between, x_2, groups_per_row=1)  # row i: image i of each argument, side by side


@torch.no_grad()
def save_figures(nets, data, z, out, step):
    """Figure 3, samples_<step>.png of latents z [N, Z], and Figures 4 and 1, of held-out images."""
    was_training = nets.training
    nets.eval()
    save_grid(out / f"samples_{step}.png", nets["G"](z[:100]))
    if "E" in nets:
        x = to_float(data.heldout[:40]).to(z.device)
        save_grid(out / f"reconstructions_{step}.png", x, nets["G"](nets["E"](x)), groups_per_row=5)
        pairs = min(5, len(x) // 2)
        x_1, x_2 = x[:pairs], x[pairs : 2 * pairs].clone()
        x_2[-1] = x_1[-1].flip(-1)  # the last pair: an image and its mirror image
        save_interpolations(out / "figure1_interpolations.png", nets, x_1, x_2)
    nets.train(was_training)


def sample_diversity(samples, images):
    """Mean distance of two samples, divided by that of two images, both [N, 3, S, S]: 0 in total collapse."""
    return (torch.pdist(samples.flatten(1)).mean() / torch.pdist(images.flatten(1)).mean()).item()


def edges(x):
    """How much neighbouring pixels of images [N, 3, S, S] differ: less where blurred, more where speckled."""
    return x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()


@torch.no_grad()
def measure(nets, data, z):
    """sample_diversity, of latents z [N, Z]; with E also how well z and up to 1,000 held-out images are given back."""
    was_training = nets.training
    nets.eval()
    x = to_float(data.heldout[:1000]).to(z.device)
    x_hat = nets["G"](z)
    results = {"sample_diversity": sample_diversity(x_hat, x[: len(z)])}
    if "E" in nets:
        x_tilde = torch.cat([nets["G"](nets["E"](part)) for part in x.split(250)])
        mean_image = to_float(data.train.sum(dim=0) / len(data.train)).to(z.device)  # mean() takes no uint8; sum() does
        results["heldout_l1"] = F.l1_loss(x_tilde, x).item()
        results["heldout_l1_of_mean_image"] = F.l1_loss(mean_image.expand_as(x), x).item()
        results["sharpness"] = (edges(x_tilde) / edges(x)).item()  # next line: at half the size
        results["sharpness_of_halves"] = (edges(F.avg_pool2d(x_tilde, 2)) / edges(F.avg_pool2d(x, 2))).item()
        results["latent_mse"] = F.mse_loss(nets["E"](x_hat), z).item()
    nets.train(was_training)
    return results


# ------------------------------------------------------------------------------------------------------ command line


def fail(message, status=2):
    """End the program with one line on the standard error."""
    print(f"{NAME}.py: error: {message.splitlines()[0]}", file=sys.stderr)
    sys.exit(status)


def parse_args(argv):
    """The arguments and, with --resume, the checkpoint of the run in --out, else None."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    quick = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in QUICK.items())
    add("--model", choices=MODELS, default="aegan", help="the paper's model, or a baseline (Section 4)")
    add("--data", default="faces", help="folder of images, searched recursively, or faces (cartoons), cifar10, mnist")
    add("--out", type=Path, default=f"runs/{NAME}", help="folder for pictures, log.csv, results.json, checkpoint.pt")
    add("--resume", action="store_true", help="go on with the run in --out, with its settings; --steps may be larger")
    add("--quick", action="store_true", help=f"faces within three minutes on two CPU cores: {quick}")
    add("--steps", type=int, default=300_000, help="updates of every network (Section 4)")
    add("--batch-size", type=int, default=16, help="images a step (Section 4)")
    add("--image-size", type=int, choices=IMAGE_SIZES, default=64, help="side of the images in pixels (Section 4)")
    add("--latent-dim", type=int, default=32, help="dimensions Z of the latents (Section 4)")
    add("--channels", type=int, default=64, help="width of the narrowest layers of G, E, D_x (the author's code)")
    add("--no-flip", action="store_true", help="turn off the mirroring of Section 4")
    add("--lr", type=float, default=2e-4, help="learning rate of G and E (the author's code)")
    add("--lr-discriminator", type=float, default=5e-4, help="learning rate of D_x and D_z (the author's code)")
    add("--alpha", type=float, default=1.0, help="weight of L_GAN (Eq. 2 to 5) for G and E (the author's code)")
    add("--lambda-rx", type=float, default=10.0, help="weight of image reconstruction, Eq. 6 (the author's code)")
    add("--lambda-rz", type=float, default=5.0, help="weight of latent reconstruction, Eq. 6 (the author's code)")
    add("--log-every", type=int, default=100, help="steps between lines of the log")
    add("--save-every", type=int, default=2000, help="steps between checkpoints, with pictures")
    add("--seed", type=int, default=0, help="of weights, batches and noise; the held-out images are always the same")
    add("--no-graph", action="store_true", help="on CUDA: launch each step anew, not as a recorded CUDA graph")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)  # a first time: some arguments decide the defaults of the others
    path = args.out / "checkpoint.pt"
    checkpoint = None
    if args.resume:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            parser.set_defaults(**checkpoint[NAME])  # that run's arguments: see config in main
        except Exception:  # torch.load raises many kinds; a checkpoint of another script has no such key
            fail(f"there is no run of {NAME}.py in {args.out}: give the --out of one, or leave out --resume")
    elif path.exists():
        fail(f"{args.out} holds a run: continue it with --resume, or give another --out")
    elif args.quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)  # again: what is given wins over these defaults
    for name in AT_LEAST_1 + AT_LEAST_0:
        least = 1 if name in AT_LEAST_1 else 0
        if not least <= getattr(args, name) < math.inf:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be finite and at least {least}")
    if args.out.resolve().is_relative_to(Path(args.data).resolve()):
        fail(f"--out {args.out} is in --data {args.data}, so that its pictures would be read as data: give another")
    return args, checkpoint


def open_device(args):
    """The torch.device of the run, and whether a step is recorded as a CUDA graph: on CUDA, unless --no-graph."""
    torch.set_float32_matmul_precision("high")  # TF32
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ValueError) as error:  # one of these, if there is no such device
        fail(f"--device {args.device} cannot be used: {error}")
    graph = device.type == "cuda" and not args.no_graph
    if graph:
        torch.cuda.set_stream(torch.cuda.Stream(device))  # the default stream cannot be recorded
    return device, graph


def restore(checkpoint, args, data, nets, optimizer):
    """Restore the run, if arguments and images are still its own. Returns its step and the text of its log.csv."""
    for name, value in checkpoint[NAME].items():
        if getattr(args, name) != value and name not in MAY_CHANGE:
            fail(f"{args.out} was made with {name} = {value}, not {getattr(args, name)}: give another --out")
    if args.steps < checkpoint["step"]:
        fail(f"{args.out} is at step {checkpoint['step']} already, beyond --steps {args.steps}")
    if checkpoint["images"] != data.checksum:
        fail(f"the images of --data {args.data} are not those of the run in {args.out}: give those, or another --out")
    nets.load_state_dict(checkpoint["networks"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    torch.set_rng_state(checkpoint["random"])
    torch.cuda.set_rng_state_all(checkpoint["random_on_cuda"][: torch.cuda.device_count()])  # maybe fewer GPUs now
    return checkpoint["step"], checkpoint["log"]


def main(argv=None):
    args, checkpoint = parse_args(argv)
    out = args.out
    device, graph = open_device(args)
    try:
        data = load_data(args.data, args.image_size, args.batch_size)
        out.mkdir(parents=True, exist_ok=True)
    except (DataError, OSError) as error:  # their messages name the file or folder
        fail(str(error))

    torch.manual_seed(args.seed)
    nets = build_networks(args.model, args.image_size, args.channels, args.latent_dim).to(device)
    optimizer = build_optimizer(nets, args.lr, args.lr_discriminator)
    weights = {"alpha": args.alpha, "lambda_rx": args.lambda_rx, "lambda_rz": args.lambda_rz}
    z_shown = torch.randn(256, args.latent_dim, generator=torch.Generator().manual_seed(0)).to(device)
    config = {name: value for name, value in vars(args).items() if name not in ("out", "resume", "device", "no_graph")}
    begin, log = restore(checkpoint, args, data, nets, optimizer) if checkpoint else (0, "")
    print(f"{args.model} on {len(data.train)} images of {args.data}, {device}, step {begin}, in {out}/")

    images = place_images(data.train, device)
    step_function = partial(train_step, nets, optimizer, args.model, weights)
    start = time.perf_counter()
    for step in range(begin + 1, args.steps + 1):
        inputs = make_inputs(draw_images(images, args.batch_size, device), args.latent_dim, not args.no_flip)
        if graph and step == begin + EAGER_STEPS + 1:
            step_function = record(step_function, inputs)  # executed below, like any step
        losses = step_function(*inputs)
        save_due = step % args.save_every == 0 or step == args.steps
        if not (save_due or step % args.log_every == 0 or step == 1):
            continue
        bad = [name for name, value in {**losses, **nets.state_dict()}.items() if not value.isfinite().all()]
        if bad:  # the weights are checked, too: they can be lost while the losses are still finite
            fail(f"{bad[0]} is not finite at step {step}: {out}/checkpoint.pt, if there is one, is of an earlier step")
        values = {name: loss.item() for name, loss in losses.items()}
        log = log or ",".join(["step", *values]) + "\n"
        log += ",".join(map(str, [step, *values.values()])) + "\n"
        (out / "log.csv").write_text(log)
        rate = (step - begin) / (time.perf_counter() - start)
        left = timedelta(seconds=round((args.steps - step) / rate))
        terms = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        print(f"step {step}  {terms}  {rate:.1f} steps/s  {left} left", flush=True)
        if step == 1 and device.type == "cpu" and left > timedelta(hours=1):
            print("This is long for a CPU: --quick takes three minutes", flush=True)
        if save_due:
            save_figures(nets, data, z_shown, out, step)
            state = {"networks": nets.state_dict(), "optimizer": optimizer.state_dict(), "images": data.checksum}
            state |= {"random": torch.get_rng_state(), "random_on_cuda": torch.cuda.get_rng_state_all()}
            torch.save({NAME: config, "step": step, "log": log, **state}, out / "checkpoint.tmp")
            (out / "checkpoint.tmp").replace(out / "checkpoint.pt")  # so it is whole at any moment

    if begin == args.steps:  # a finished run: its figures are made again
        save_figures(nets, data, z_shown, out, begin)
    results = measure(nets, data, z_shown)
    for name, value in results.items():
        print(f"{name:26}{value:10.3f}")
    (out / "results.json").write_text(json.dumps({**results, "steps": args.steps, "config": config}, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped: --resume goes on from the last checkpoint, if there is one", status=130)
