"""Toward better reconstruction of style images with GANs (Lorbert, Ben-Zvi, Ciptadi, Oks, Tyagi, 2017).

https://pdfslide.us/documents/toward-better-reconstruction-of-style-images-with-gans-the-rationale-of-using-gans.html

A BiGAN: a generator G from latents to images, an encoder E from images to latents, and one discriminator D that tells
pairs (x, E(x)) from pairs (G(z), z). At its optimum G and E are each other's inverse; in practice they are not. The
paper adds a penalty on the reconstruction of latents, z against E(G(z)): it does not blur images, as a penalty on
pixels does, and with enough weight it helps against collapse. Penalties on pixels and on AlexNet's features are
compared with it. D is unrolled: G and E look K of its updates ahead.

    python bigan_latent.py --quick                            # cartoon faces within three minutes on two CPU cores
    python bigan_latent.py --data photos/ --out runs/photos   # the paper's EX7 on a folder of images
    python bigan_latent.py --experiment EX8 --out runs/ex8    # another row of Table 1

paper -> code
    Section 3    the pairs q, (x, z'), and p, (x', z); here x' is x_hat = G(z), z' is z_hat = E(x); x_tilde = G(E(x))
    Figures 1-3  the three networks                     Generator, Encoder, Discriminator
    Eq. 1, Eq. 2, Eq. 3: the objective of a BiGAN       discriminator_loss (for D), generator_loss (for G, E)
    Eq. 4, 6     penalties on pixels and on latents     penalty
    Eq. 5        penalty on features                    feature_penalty; Features is H
    Eq. 7        the other penalty on latents, L_AD'    measure: autodecoder_q (not used for training)
    Footnote 1   a variance of E                        Encoder; --stochastic-encoder
    Eq. 8        the whole objective                    bigan_losses; which loss moves which network: train_step
    Section 5    the pseudo-Huber loss of Figure 4      pseudo_huber
    Section 5    8 discriminator unrolling steps        unrolled_logits, adam_step
    Table 1      the nine experiments                   EXPERIMENTS, --experiment
    Figures 5-22 samples, reconstructions, D's output   save_figures, percent
    Section 1    a walk through the latent space        save_interpolations
    Section 5    mode collapse; who fools D             sample_diversity; measure: d_on_reconstructions, ...

Rulings, where the paper is silent or contradicts itself
    - Section 3 also calls G's distribution q(x|z) and E's p(z|x): swapped. In process p, z is drawn first.
    - The text of Figures 1-3 names only kinds of layers. Widths and kernels are soumith/dcgan.torch's; D has E's
      convolutions for x, a dense layer of 8c = 512 units for z, and one of 2c = 128, with dropout, for both.
    - Decay 0.97 and dropout 0.8 are TensorFlow's: momentum 0.03 and a probability of 0.2 in torch. Epsilon is torch's.
    - In training each batch of D is normalised by itself: (x, E(x)) and (G(z), z) are two. Pictures and results use the
      running averages, which every pass moves but the unrolled ones.
    - The pseudo-Huber of Eq. 4, 6 and 7 is taken of each coordinate and averaged: Section 4 wants each dimension of z
      reconstructed. In Eq. 5 it is taken of the norm, since H has length 1 and 9,216 coordinates.
    - H is torchvision's AlexNet, the narrower one of 2014, of images resized to 224x224; its last feature is pool5.
    - Unrolling is that of Metz et al.: G and E see D after K Adam steps on the batch, from D's weights and moments, and
      have gradients through them. D's real label is 0.9 in them, too, but not for G and E; dropout is drawn anew.
    - Adam's second moment decays with 0.999. Weights start from N(0, 0.02), batch norm's from 1, not N(1, 0.02).
Departures
    - G and E minimise -log D(G(z), z) - log(1 - D(x, E(x))), labels swapped, as BiGAN's code does; so the logged L_GAN
      is not Eq. 3's. (Metz et al. let G minimise Eq. 3's value itself.)
    - E is deterministic by default; footnote 1's variance is --stochastic-encoder. Figures and results use its mean.
    - All networks step at once; D takes the first of the K steps. Batches are drawn with replacement.
    - Default data are drawn faces, not fashion, and nothing is cropped to the person. A tenth is held out, and pictures
      and results show only that. --quick has K = 1 and 2.5 times the learning rate.
"""

import json
import math
import sys
import time
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser
from collections import defaultdict
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.func import functional_call

from common import draw_images, load_data, place_images, save_grid, to_float

NAME = "bigan_latent"
EXPERIMENTS = {  # Table 1: lambda_1 (Eq. 6), lambda_2 (Eq. 4), lambda_3 (Eq. 5)
    f"EX{i + 1}": {"lambda_1": (0.05, 1.0, 2.5)[i // 3], "lambda_2": float(i % 3 == 1), "lambda_3": float(i % 3 == 2)}
    for i in range(9)
}
IMAGE_SIZES = (16, 32, 64)
REAL = 0.9  # D's label of real pairs: one-sided label smoothing (Section 5)
LEAK = 0.2  # slope of the leaky ReLU (Section 5)
BATCH_NORM_MOMENTUM = 1 - 0.97  # (Section 5)
DROPOUT = 1 - 0.8  # (Section 5)
GAMMA = 0.05  # of the pseudo-Huber loss (Section 5)
BETAS = (0.5, 0.999)  # the first: Section 5
INITIAL_STD = 0.02  # of weights, DCGAN's
TINY = 1e-30  # under the root of the unrolled Adam: finite derivatives where a gradient is zero
FILE = "alexnet-owt-7be5be79.pth"  # AlexNet's weights, in torchvision's cache
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that AlexNet takes
QUICK = {"image_size": 16, "channels": 32, "latent_dim": 32, "steps": 1700, "unroll": 1, "lr": 5e-4, "save_every": 500}


# ---------------------------------------------------------------------------------------------------------- networks


def conv_widths(image_size, channels):
    """Channels from the image to 4x4, in E and D, and backwards in G: c, 2c, 4c, 8c where S = 64."""
    if image_size not in IMAGE_SIZES:
        raise ValueError(f"image_size {image_size}: must be one of {IMAGE_SIZES}")
    return [channels * 2**i for i in range(image_size.bit_length() - 3)]


def batch_norm(channels):
    """Batch norm with the paper's decay: [N, C, H, W] -> [N, C, H, W]."""
    return nn.BatchNorm2d(channels, momentum=BATCH_NORM_MOMENTUM)


def conv_stack(image_size, channels):
    """What E and D share: images [N, 3, S, S] in [-1, 1] -> features [N, 2 c S] of a 4x4 map."""
    first, *widths = conv_widths(image_size, channels)
    layers = [nn.Conv2d(3, first, 4, 2, 1), nn.LeakyReLU(LEAK)]
    for c_in, c_out in zip([first, *widths], widths):
        layers += [nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False), batch_norm(c_out), nn.LeakyReLU(LEAK)]
    return nn.Sequential(*layers, nn.Flatten())


class Generator(nn.Sequential):
    """G: latents [N, Z], z in [-1, 1] or E(x), which is unbounded -> images [N, 3, S, S] in [-1, 1]."""

    def __init__(self, image_size, channels, latent_dim):
        widths = conv_widths(image_size, channels)[::-1]
        layers = [nn.Linear(latent_dim, 16 * widths[0], bias=False), nn.Unflatten(1, (widths[0], 4, 4))]
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [batch_norm(c_in), nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=False)]
        layers += [batch_norm(channels), nn.ReLU(), nn.ConvTranspose2d(channels, 3, 4, 2, 1)]
        super().__init__(*layers, nn.Tanh())


class Encoder(nn.Module):
    """E: images x [N, 3, S, S] in [-1, 1] -> latents z_hat [N, Z]; if stochastic (footnote 1), in training a sample of
    the Gaussian whose mean and log-variance the layers give, else its mean."""

    def __init__(self, image_size, channels, latent_dim, stochastic=False):
        super().__init__()
        outputs = 2 * latent_dim if stochastic else latent_dim
        self.stochastic = stochastic
        self.layers = nn.Sequential(conv_stack(image_size, channels), nn.Linear(2 * channels * image_size, outputs))

    def forward(self, x):
        if not self.stochastic:
            return self.layers(x)
        mean, log_variance = self.layers(x).chunk(2, dim=1)
        return mean + (log_variance / 2).exp() * torch.randn_like(mean, dtype=x.dtype) if self.training else mean


class Discriminator(nn.Module):
    """D: images x [N, 3, S, S] in [-1, 1], latents z [N, Z] -> logits [N, 1], positive for pairs (x, E(x))."""

    def __init__(self, image_size, channels, latent_dim):
        super().__init__()
        self.of_x = conv_stack(image_size, channels)
        self.of_z = nn.Sequential(nn.Linear(latent_dim, 8 * channels), nn.LeakyReLU(LEAK))
        hidden = nn.Linear(2 * channels * image_size + 8 * channels, 2 * channels)
        self.of_both = nn.Sequential(hidden, nn.LeakyReLU(LEAK), nn.Dropout(DROPOUT), nn.Linear(2 * channels, 1))

    def forward(self, x, z):
        return self.of_both(torch.cat([self.of_x(x), self.of_z(z)], dim=1))


class Features(nn.Module):
    """H (Eq. 5): images x [N, 3, S, S] in [-1, 1] -> AlexNet's pool5 [N, 9216], of length 1. Fixed.

    The weights are torchvision's, from its cache or fetched by it; raises what it raises where it has neither.
    """

    def __init__(self):
        super().__init__()
        self.layers = torchvision.models.alexnet(weights="IMAGENET1K_V1").features.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(self, x):
        x = F.interpolate((x + 1) / 2, (224, 224), mode="bilinear")
        return F.normalize(self.layers((x - self.mean) / self.std).flatten(1))


def build_networks(image_size, channels, latent_dim, stochastic=False):
    """The networks by the paper's names, G, E and D, in training mode. ValueError for a size that they cannot have."""
    nets = nn.ModuleDict({"G": Generator(image_size, channels, latent_dim)})
    nets["E"] = Encoder(image_size, channels, latent_dim, stochastic)
    nets["D"] = Discriminator(image_size, channels, latent_dim)
    for layer in nets.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(layer.weight, std=INITIAL_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return nets


# ------------------------------------------------------------------------------------------------------------ losses


def discriminator_loss(d_q, d_p):
    """Eq. 1, Eq. 2, Eq. 3 as D minimises them: -E_q[log D(x, E(x))] - E_p[log(1 - D(G(z), z))], label 0.9 for q.

    d_q, d_p: D's logits [N, 1] of pairs (x, E(x)) and (G(z), z).
    """
    real = F.binary_cross_entropy_with_logits(d_q, torch.full_like(d_q, REAL))
    return real + F.binary_cross_entropy_with_logits(d_p, torch.zeros_like(d_p))


def generator_loss(d_q, d_p):
    """Eq. 1, Eq. 2, Eq. 3 as G and E minimise them: -E_q[log(1 - D(x, E(x)))] - E_p[log D(G(z), z)], without smoothing.

    d_q, d_p: as in discriminator_loss.
    """
    real = F.binary_cross_entropy_with_logits(d_q, torch.zeros_like(d_q))
    return real + F.binary_cross_entropy_with_logits(d_p, torch.ones_like(d_p))


def pseudo_huber(t):
    """Section 5: gamma (sqrt(1 + (t / gamma)^2) - 1) with gamma = 0.05, of each element; |t| - gamma for large |t|."""
    return GAMMA * ((1 + (t / GAMMA) ** 2).sqrt() - 1)


def penalty(reconstruction, original):
    """Eq. 4: ||x - G(E(x))||, Eq. 6: ||z - E(G(z))||, Eq. 7: ||E(x) - E(G(E(x)))||: pseudo-Huber, mean of coordinates.

    Both [N, 3, S, S] or [N, Z].
    """
    return pseudo_huber(original - reconstruction).mean()


def feature_penalty(h_tilde, h):
    """Eq. 5: ||H(x) - H(G(E(x)))||, the pseudo-Huber of the norm, the mean over images. h_tilde, h: [N, 9216]."""
    return pseudo_huber(torch.linalg.vector_norm(h - h_tilde, dim=1)).mean()


def bigan_losses(nets, optimizer, H, weights, unroll, x, z):
    """One forward pass: images x [N, 3, S, S] in [-1, 1], latents z [M, Z] in [-1, 1] -> {name: scalar}.

    L_D is for D to minimise, L_G_E for G and E; the others are its terms. weights: {"lambda_1": number, ...}; a penalty
    of weight 0 is not computed, but 0, and H may then be None. unroll: K, 0 for none; optimizer: see unrolled_logits.
    """
    G, E, D, zero = nets["G"], nets["E"], nets["D"], torch.zeros((), device=x.device)
    x_hat, z_hat = G(z), E(x)
    q, p = (x, z_hat), (x_hat, z)
    d_q, d_p = D(*q), D(*p)
    L_D = discriminator_loss(d_q, d_p)  # Eq. 3, max over D
    L_GAN = generator_loss(*unrolled_logits(D, optimizer, q, p, d_q, d_p, unroll))  # Eq. 3, min over G, E
    x_tilde = G(z_hat) if weights["lambda_2"] or weights["lambda_3"] else None
    L_AD = penalty(E(x_hat), z) if weights["lambda_1"] else zero  # Eq. 6
    L_AE = penalty(x_tilde, x) if weights["lambda_2"] else zero  # Eq. 4
    L_H = feature_penalty(H(x_tilde), H(x)) if weights["lambda_3"] else zero  # Eq. 5
    L_G_E = L_GAN + weights["lambda_1"] * L_AD + weights["lambda_2"] * L_AE + weights["lambda_3"] * L_H  # Eq. 8
    return {"L_D": L_D, "L_G_E": L_G_E, "L_GAN": L_GAN, "L_AD": L_AD, "L_AE": L_AE, "L_H": L_H}


def unrolled_logits(D, optimizer, q, p, d_q, d_p, unroll):
    """D's logits of the pairs q and p after `unroll` Adam steps on them, differentiable through the steps (Section 5).

    d_q, d_p: its logits now. optimizer: a torch.optim.Adam that has D in one group; the steps start from its moments. D
    and the optimizer are left as they are.
    """
    names, theta = zip(*D.named_parameters())
    buffers = {name: buffer.clone() for name, buffer in D.named_buffers()}  # batch norm writes to these, not to D's
    states, zero = [optimizer.state.get(w, {}) for w in theta], torch.zeros((), device=d_q.device)
    m, v = ([state.get(name, zero) for state in states] for name in ("exp_avg", "exp_avg_sq"))
    t = states[0].get("step", zero)
    group = next(g for g in optimizer.param_groups if any(w is theta[0] for w in g["params"]))
    for _ in range(unroll):
        gradients = torch.autograd.grad(discriminator_loss(d_q, d_p), theta, create_graph=True)
        t = t + 1
        theta, m, v = zip(*(adam_step(*each, t, group) for each in zip(theta, gradients, m, v)))
        unrolled = {**dict(zip(names, theta)), **buffers}
        d_q, d_p = functional_call(D, unrolled, q), functional_call(D, unrolled, p)
    return d_q, d_p


def adam_step(theta, gradient, m, v, t, group):
    """Step number t of Adam for one parameter, differentiable: the new theta, m, v. group: of a torch.optim.Adam."""
    beta_1, beta_2 = group["betas"]
    m = beta_1 * m + (1 - beta_1) * gradient
    v = beta_2 * v + (1 - beta_2) * gradient**2
    m_hat = m / -torch.expm1(t * math.log(beta_1))  # 1 - beta_1^t
    v_hat = v / -torch.expm1(t * math.log(beta_2))
    return theta - group["lr"] * m_hat / ((v_hat + TINY).sqrt() + group["eps"]), m, v


# ---------------------------------------------------------------------------------------------------------- training


def build_optimizer(nets, lr):
    """One Adam for all networks, since they all take their step at the same time."""
    return torch.optim.Adam(nets.parameters(), lr, BETAS, fused=True, capturable=True)


def draw_batch(images, latent_dim):
    """x: the images (uint8 [N, 3, S, S]) in [-1, 1]; z ~ U[-1, 1]^Z: [N, Z]."""
    return to_float(images), torch.rand(len(images), latent_dim, device=images.device) * 2 - 1


def train_step(nets, optimizer, H, weights, unroll, x, z):
    """One update of every network, all at the same point. Returns the losses before it, detached: see bigan_losses."""
    losses = bigan_losses(nets, optimizer, H, weights, unroll, x, z)
    optimizer.zero_grad()
    # A loss gives gradients to its `inputs` alone, where others detach the fakes and make them a second time.
    losses["L_D"].backward(inputs=list(nets["D"].parameters()), retain_graph=True)
    losses["L_G_E"].backward(inputs=[*nets["G"].parameters(), *nets["E"].parameters()])
    optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()}


def record(step, batch):
    """step(*batch) as a CUDA graph: a function of other batches that replays it and returns the same tensors as it."""
    graph, batch = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in batch]
    with torch.cuda.graph(graph):
        losses = step(*batch)

    def replay(*new_batch):
        torch._foreach_copy_(batch, new_batch)
        graph.replay()
        return losses

    return replay


# -------------------------------------------------------------------------------------------------------- evaluation


def percent(D, x, z):
    """D's output for pairs of images x [N, 3, S, S] and latents z [N, Z], in percent: [N]."""
    return 100 * D(x, z).sigmoid().squeeze(1)


def captions(percents):
    """Two digits for each of the percents [N], 99 at most."""
    return [f"{min(p, 99):02.0f}" for p in percents.tolist()]


def save_interpolations(path, nets, x_1, x_2, columns=8):
    """A walk: rows of x_1, images on the straight line from E(x_1) to E(x_2), x_2. x_1, x_2: [N, 3, S, S]."""
    z_1, z_2 = nets["E"](x_1), nets["E"](x_2)
    between = [nets["G"](torch.lerp(z_1, z_2, i / (columns - 1))) for i in range(columns)]
    save_grid(path, torch.stack([x_1, *between, x_2], dim=1).flatten(0, 1), columns=columns + 2)


@torch.no_grad()
def save_figures(nets, data, z, out, step, last=True):
    """samples_<step>.png, Figures 5, 7, ... 21, reconstructions_<step>.png, Figures 6, 8, ... 22, with D's output in
    percent, and if last figure_interpolations.png.

    data: of which up to ten held-out images are shown. z: latents [N, Z], of which 100 are. The same in every run.
    """
    nets.eval()
    x, x_hat = to_float(data.heldout[:10].to(z.device)), nets["G"](z[:100])
    z_hat = nets["E"](x)
    x_tilde = nets["G"](z_hat)
    save_grid(out / f"samples_{step}.png", x_hat, captions=[captions(percent(nets["D"], x_hat, z[:100]))])
    texts = [captions(percent(nets["D"], images, z_hat)) for images in (x, x_tilde)]  # with the code it is made from
    save_grid(out / f"reconstructions_{step}.png", x, x_tilde, columns=5, captions=texts)
    if last:
        save_interpolations(out / "figure_interpolations.png", nets, x[: len(x) // 2 * 2 : 2], x[1::2])
    nets.train()


def sample_diversity(samples, images):
    """Mean distance of samples over that of images, [N, 3, S, S]: 0 in total collapse, None if all images are one."""
    a, b = (torch.pdist(x.flatten(1)).mean().item() for x in (samples, images))
    return a / b if b > 0 else None


def neighbour_difference(x):
    """The mean absolute difference of neighbouring pixels of images [N, 3, S, S]: less where they are blurred."""
    return (x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()) / 2


@torch.no_grad()
def measure(nets, data, z):
    """The figures of merit, on held-out images and latents z [N, Z]; D's outputs in percent."""
    nets.eval()
    G, E, D = nets["G"], nets["E"], nets["D"]
    mean_image = to_float(sum(part.sum(0) for part in data.train.split(1000)) / len(data.train)).to(z.device)
    results, edges = defaultdict(float), 0.0
    for x in map(to_float, data.heldout.to(z.device).split(250)):
        z_hat = E(x)
        x_tilde, share = G(z_hat), len(x) / len(data.heldout)
        results["heldout_l1"] += share * F.l1_loss(x_tilde, x).item()
        results["heldout_l1_of_mean_image"] += share * F.l1_loss(mean_image.expand_as(x), x).item()
        results["sharpness"] += share * neighbour_difference(x_tilde).item()
        edges += share * neighbour_difference(x).item()
        results["autodecoder_q"] += share * penalty(E(x_tilde), z_hat).item()  # Eq. 7, L_AD'
        results["d_on_real"] += share * percent(D, x, z_hat).mean().item()
        results["d_on_reconstructions"] += share * percent(D, x_tilde, z_hat).mean().item()
    x_hat = G(z)
    return (
        results
        | {
            "sharpness": results["sharpness"] / edges if edges else None,  # 1 where reconstructions lose nothing
            "d_on_samples": percent(D, x_hat, z).mean().item(),
            "latent_l1": F.l1_loss(E(x_hat), z).item(),
            "sample_diversity": sample_diversity(x_hat, to_float(data.heldout[: len(z)].to(z.device))),
        }
    )


# ------------------------------------------------------------------------------------------------------ command line


def fail(message, status=2):
    """End the program with one line, the message's first, on the standard error."""
    print(f"{NAME}.py: error: {message}".split("\n")[0], file=sys.stderr)
    sys.exit(status)


def parse_args(argv):
    """The arguments and, with --resume, the checkpoint of the run in --out, else None."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.error, add = fail, parser.add_argument
    quick = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in QUICK.items())
    add("--experiment", choices=EXPERIMENTS, default="EX7", help="row of Table 1 that sets the next three")
    add("--lambda-1", type=float, default=SUPPRESS, help="weight of Eq. 6: latents z against E(G(z))")
    add("--lambda-2", type=float, default=SUPPRESS, help="weight of Eq. 4: pixels of x against G(E(x))")
    add("--lambda-3", type=float, default=SUPPRESS, help="weight of Eq. 5: AlexNet's features of x against G(E(x))")
    add("--unroll", type=int, default=8, help="K, D's updates that G and E look ahead (Section 5); 0: a plain BiGAN")
    add("--stochastic-encoder", action="store_true", help="E gives a mean and a variance (footnote 1)")
    add("--data", default="faces", help="folder of images, searched recursively, or faces (drawn), cifar10, mnist")
    add("--out", default=f"runs/{NAME}", help="folder for pictures, log.csv, results.json, checkpoint.pt")
    add("--resume", action="store_true", help="go on with the run in --out, with its settings; --steps may be larger")
    add("--quick", action="store_true", help=f"faces within three minutes on two CPU cores: {quick}")
    add("--steps", type=int, default=200_000, help="updates of every network (Section 5)")
    add("--batch-size", type=int, default=32, help="images a step (Section 5)")
    add("--image-size", type=int, choices=IMAGE_SIZES, default=64, help="side of the images in pixels (Section 5)")
    add("--latent-dim", type=int, default=100, help="dimensions Z of the latents (Section 5)")
    add("--channels", type=int, default=64, help="width of the layers next to the image (DCGAN's code)")
    add("--lr", type=float, default=2e-4, help="learning rate (Section 5)")
    add("--log-every", type=int, default=100, help="steps between lines of the log")
    add("--save-every", type=int, default=2000, help="steps between checkpoints, with pictures")
    add("--seed", type=int, default=0, help="of weights, batches and noise; the held-out images are always the same")
    add("--graph", action="store_true", help="on CUDA: record a training step as a CUDA graph, and replay it")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")

    args, checkpoint = parser.parse_args(argv), None
    path = Path(args.out, "checkpoint.pt")
    if args.resume:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            parser.set_defaults(**checkpoint[NAME])
        except Exception:  # torch.load raises many kinds on what is no checkpoint
            fail(f"{path} is not a checkpoint of {NAME}.py: give the --out of a run, or leave out --resume")
    elif path.exists():
        fail(f"{args.out} holds a run: continue it with --resume, or give another --out")
    else:
        parser.set_defaults(**EXPERIMENTS[args.experiment], **QUICK if args.quick else {})
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        least = {int: 0 if name in ("seed", "unroll") else 1, float: 0}.get(type(value))
        if least is not None and not least <= value <= 1e12:
            fail(f"--{name.replace('_', '-')} cannot be {value}: it must be at least {least} and at most 1e12")
    for name, value in checkpoint[NAME].items() if checkpoint else ():
        if getattr(args, name) != value and name not in ("steps", "log_every", "save_every"):
            fail(f"{args.out} was made with {name} = {value}, not {getattr(args, name)}: give another --out")
    if checkpoint and args.steps < checkpoint["step"]:
        fail(f"{args.out} is at step {checkpoint['step']} already, beyond --steps {args.steps}")
    return args, checkpoint


def main(argv=None):
    """The command line; see --help."""
    args, checkpoint = parse_args(argv)
    out, option = Path(args.out), f"--device {args.device}" + " with --graph" * args.graph
    try:
        torch.zeros(1, device=(device := torch.device(args.device))).item()
        if args.graph:
            torch.cuda.set_stream(torch.cuda.Stream(device))  # what precedes a recording must not be on the default one
        option = f"--lambda-3 {args.lambda_3}, without {FILE} in {torch.hub.get_dir()}/checkpoints,"
        H = Features().to(device) if args.lambda_3 > 0 else None
        option = f"--data {args.data}"
        data = load_data(args.data, args.image_size, args.batch_size)
        option = f"--out {out}"
        out.mkdir(parents=True, exist_ok=True)
    except Exception as error:  # of many kinds
        fail(f"{option} cannot be used: {error}")

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # TF32
    nets = build_networks(args.image_size, args.channels, args.latent_dim, args.stochastic_encoder).to(device)
    optimizer = build_optimizer(nets, args.lr)
    z_shown = torch.rand(256, args.latent_dim, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1
    config = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "device", "graph")}
    begin, log = 0, ""
    if checkpoint:
        begin, log = checkpoint["step"], checkpoint["log"]
        nets.load_state_dict(checkpoint["networks"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["random"][0])
        torch.cuda.set_rng_state_all(checkpoint["random"][1 : 1 + torch.cuda.device_count()])
    print(f"{args.experiment} on {len(data.train)} images of {args.data}, {device}, step {begin}, in {out}/")

    images, step_on = place_images(data.train, device), partial(train_step, nets, optimizer, H, vars(args), args.unroll)
    start = time.perf_counter()
    for step in range(begin + 1, args.steps + 1):
        batch = draw_batch(draw_images(images, args.batch_size, device), args.latent_dim)
        if args.graph and step == begin + 4:
            step_on = record(step_on, batch)
        losses = step_on(*batch)
        save_due = step % args.save_every == 0 or step == args.steps
        if not (save_due or step % args.log_every == 0 or step == (1 if device.type == "cpu" else 10)):
            continue
        values = {name: loss.item() for name, loss in losses.items()}  # waits for the device
        for name in (name for name, value in values.items() if not math.isfinite(value)):
            fail(f"{name} is not finite at step {step}: {out}/checkpoint.pt, if there is one, is of an earlier step")
        rate = (step - begin) / (time.perf_counter() - start)
        left = timedelta(seconds=round((args.steps - step) / rate))
        terms = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        print(f"step {step}  {terms}  {rate:.1f} steps/s  {left} left", flush=True)
        if step == 1 and left > timedelta(hours=1):
            print("This is long for a CPU: --quick takes three minutes", flush=True)
        log = log or ",".join(("step", *values)) + "\n"
        log += ",".join(map(str, (step, *values.values()))) + "\n"
        (out / "log.csv").write_text(log)
        if save_due:
            save_figures(nets, data, z_shown, out, step, last=False)
            state = {NAME: config, "networks": nets.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step, "log": log, "random": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]}
            torch.save(state, out / "checkpoint.tmp")
            (out / "checkpoint.tmp").replace(out / "checkpoint.pt")  # so it is whole at any moment

    save_figures(nets, data, z_shown, out, args.steps)
    results = measure(nets, data, z_shown) | {"steps": args.steps, "config": config}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    for name, value in results.items():
        if isinstance(value, float):
            print(f"{name:26}{value:10.3f}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped: --resume goes on from the last checkpoint, if there is one", status=130)
