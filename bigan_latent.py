# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy", "pillow>=10.1"]
# ///
"""Toward better reconstruction of style images with GANs (Lorbert, Ben-Zvi, Ciptadi, Oks, Tyagi, Amazon, 2017).

A BiGAN: a generator G from latents to images, an encoder E from images to latents, and one discriminator D that tells
pairs (x, E(x)) from pairs (G(z), z). At its optimum G and E are each other's inverse; in practice they are not. The
paper adds a penalty on the reconstruction of latents, z against E(G(z)): it does not blur images, as a penalty on
pixels does, and with enough weight it helps against collapse. Penalties on pixels and on AlexNet's features are
compared with it. D is unrolled: G and E look K of its updates ahead.

    python bigan_latent.py --quick                            # cartoon faces within three minutes on two CPU cores
    python bigan_latent.py --data photos/ --out runs/photos   # the paper's EX7 on a folder of images
    python bigan_latent.py --experiment EX8 --out runs/ex8    # another row of Table 1

paper -> code
    Figures 1-3  the three networks                     Generator, Encoder, Discriminator
    Eq. 1-3      the objective of a BiGAN               discriminator_loss (for D), generator_loss (for G, E)
    Eq. 4        penalty on pixels                      autoencoder_loss
    Eq. 5        penalty on features                    feature_loss; Features is H
    Eq. 6, 7     penalties on latents                   autodecoder_loss (trained), autodecoder_loss_q (logged)
    Eq. 8        the whole objective                    total_loss (for G, E); all of it: all_losses, train_step
    Section 5    the pseudo-Huber loss of Figure 4      pseudo_huber
    Section 5    8 discriminator unrolling steps        unrolled_generator_loss
    Table 1      the nine experiments                   EXPERIMENTS, --experiment
    Figures 5-22 samples and reconstructions            save_samples, save_reconstructions; D's output: percent
    Section 1    a walk through the latent space        save_interpolations
    Section 5    "indicative of mode collapse"          sample_diversity
    Section 5    reconstructions that fool D            measure: d_on_reconstructions, d_on_samples, d_on_real

Rulings, where the paper is silent
    - The text names only the kinds of layers in Figures 1-3. Here they are those of DCGAN's own code: 64 to 512
      channels, 4x4 kernels. D has convolutions like E's for x, a dense layer for z, and one of 128 units, with the
      dropout, for both: with 1,024 units samples collapsed where D was unrolled. Layers before batch norm have no bias.
    - Decay 0.97 and dropout 0.8 are TensorFlow's: momentum 0.03 and a probability of 0.2 in torch.
    - In training every pass normalises by its own batch: (x, E(x)) and (G(z), z) go through D one after the other.
      Figures and results use the running averages, which every pass moves.
    - The pseudo-Huber of Eq. 4, 6 and 7 is taken of each coordinate and averaged: Section 4 wants each dimension of z
      reconstructed. In Eq. 5 it is taken of the norm: H has length 1, and the average over its 9,216 coordinates could
      not exceed 0.0022.
    - H is torchvision's AlexNet, of images resized to 224x224; the last of its features is pool5.
    - G and E minimise -log D(G(z), z) - log(1 - D(x, E(x))), labels swapped, as BiGAN's authors do.
    - Unrolling is that of Metz et al.: G and E are trained against D after K Adam steps on the batch, from D's weights
      and moments, and through those steps; every pass of D draws its own dropout. D itself takes the first of these
      steps, at the same time as G and E take theirs.
    - Of the techniques of Salimans et al., whom the paper cites, there is the one it names: label smoothing.
    - The second Adam moment decays with 0.999, Adam's usual; weights start as DCGAN's do. Batches are drawn with
      replacement, and not mirrored.
    - A reconstruction is judged as the pair (G(E(x)), E(x)). The walk is drawn between held-out images.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
import zlib
from collections import defaultdict
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.func import functional_call

from common import DataError, draw_images, load_data, place_images, save_grid, to_float

EXPERIMENTS = {  # Table 1: lambda_1 (Eq. 6), lambda_2 (Eq. 4), lambda_3 (Eq. 5)
    "EX1": {"lambda_ad": 0.05, "lambda_ae": 0.0, "lambda_h": 0.0},
    "EX2": {"lambda_ad": 0.05, "lambda_ae": 1.0, "lambda_h": 0.0},
    "EX3": {"lambda_ad": 0.05, "lambda_ae": 0.0, "lambda_h": 1.0},
    "EX4": {"lambda_ad": 1.0, "lambda_ae": 0.0, "lambda_h": 0.0},
    "EX5": {"lambda_ad": 1.0, "lambda_ae": 1.0, "lambda_h": 0.0},
    "EX6": {"lambda_ad": 1.0, "lambda_ae": 0.0, "lambda_h": 1.0},
    "EX7": {"lambda_ad": 2.5, "lambda_ae": 0.0, "lambda_h": 0.0},
    "EX8": {"lambda_ad": 2.5, "lambda_ae": 1.0, "lambda_h": 0.0},
    "EX9": {"lambda_ad": 2.5, "lambda_ae": 0.0, "lambda_h": 1.0},
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
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that AlexNet takes
QUICK = {"image_size": 16, "channels": 32, "latent_dim": 32, "steps": 1700, "unroll": 1, "lr": 5e-4, "save_every": 500}


# ---------------------------------------------------------------------------------------------------------- networks


def conv_widths(image_size, channels):
    """Channels from the image to 4x4, in E and D, and backwards in G: c, 2c, 4c, 8c where S = 64."""
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
    """G: latents z [N, Z] -> images x_hat [N, 3, S, S] in [-1, 1]."""

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
    """H (Eq. 5): images x [N, 3, S, S] in [-1, 1] -> AlexNet's pool5 [N, 9216], of length 1. Fixed."""

    def __init__(self):
        super().__init__()
        self.layers = torchvision.models.alexnet().features.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(self, x):
        x = F.interpolate((x + 1) / 2, (224, 224), mode="bilinear")
        return F.normalize(self.layers((x - self.mean) / self.std).flatten(1))


def build_networks(image_size, channels, latent_dim, stochastic=False, H=None):
    """The networks by the paper's names: G, E, D and, if there is one, H."""
    nets = nn.ModuleDict({"G": Generator(image_size, channels, latent_dim)})
    nets["E"] = Encoder(image_size, channels, latent_dim, stochastic)
    nets["D"] = Discriminator(image_size, channels, latent_dim)
    for layer in nets.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(layer.weight, std=INITIAL_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    if H:
        nets["H"] = H
    return nets


# ------------------------------------------------------------------------------------------------------------ losses


def discriminator_loss(d_q, d_p):
    """Eq. 1 to 3 as D minimises them: -E_q[log D(x, E(x))] - E_p[log(1 - D(G(z), z))], with label 0.9 for the first.

    d_q, d_p: D's logits [N, 1] of pairs (x, E(x)) and (G(z), z).
    """
    real = F.binary_cross_entropy_with_logits(d_q, torch.full_like(d_q, REAL))
    return real + F.binary_cross_entropy_with_logits(d_p, torch.zeros_like(d_p))


def generator_loss(d_q, d_p):
    """Eq. 1 to 3 as G and E minimise them: -E_q[log(1 - D(x, E(x)))] - E_p[log D(G(z), z)], without smoothing.

    d_q, d_p: as in discriminator_loss.
    """
    real = F.binary_cross_entropy_with_logits(d_q, torch.zeros_like(d_q))
    return real + F.binary_cross_entropy_with_logits(d_p, torch.ones_like(d_p))


def unrolled_generator_loss(D, optimizer, pairs, d_q, d_p, unroll):
    """generator_loss against D after `unroll` Adam steps on this batch, differentiable through every step.

    pairs: [(x, E(x)), (G(z), z)]; d_q, d_p: D's logits [N, 1] of them; optimizer: D's, from whose state the steps
    start. D, its buffers and the optimizer are left as they are. (Section 5; Metz et al. 2016)
    """
    if unroll == 0:
        return generator_loss(d_q, d_p)
    names, parameters = zip(*D.named_parameters())
    buffers = {name: buffer.clone() for name, buffer in D.named_buffers()}  # batch norm writes to these, not to D's
    states = [optimizer.state.get(p, {"step": 0.0}) for p in parameters]
    theta = torch.cat([p.flatten() for p in parameters])  # all parameters, one vector [P]; m, v: its moments
    m, v = (
        torch.cat([s.get(name, torch.zeros_like(p)).flatten() for s, p in zip(states, parameters)])
        for name in ("exp_avg", "exp_avg_sq")
    )
    step = torch.as_tensor(states[0]["step"], dtype=theta.dtype)
    lr, (beta_1, beta_2), eps = (optimizer.param_groups[0][name] for name in ("lr", "betas", "eps"))
    for _ in range(unroll):
        gradients = torch.autograd.grad(discriminator_loss(d_q, d_p), parameters, create_graph=True)
        gradient = torch.cat([g.flatten() for g in gradients])
        m = beta_1 * m + (1 - beta_1) * gradient
        v = beta_2 * v + (1 - beta_2) * gradient**2
        step = step + 1
        m_hat, v_hat = (-moment / torch.expm1(step * math.log(beta)) for moment, beta in ((m, beta_1), (v, beta_2)))
        theta = theta - lr * m_hat / ((v_hat + TINY).sqrt() + eps)
        parts = theta.split([p.numel() for p in parameters])
        parameters = [part.view_as(p) for part, p in zip(parts, parameters)]
        state = {**dict(zip(names, parameters)), **buffers}
        d_q, d_p = (functional_call(D, state, pair) for pair in pairs)
    return generator_loss(d_q, d_p)


def pseudo_huber(t):
    """Section 5: gamma (sqrt(1 + (t / gamma)^2) - 1) with gamma = 0.05, of each element; |t| - gamma for large |t|."""
    return GAMMA * ((1 + (t / GAMMA) ** 2).sqrt() - 1)


def autoencoder_loss(x_tilde, x):
    """Eq. 4: ||x - G(E(x))||, pseudo-Huber, the mean over pixels. x_tilde, x: [N, 3, S, S]."""
    return pseudo_huber(x - x_tilde).mean()


def feature_loss(h_tilde, h):
    """Eq. 5: ||H(x) - H(G(E(x)))||, the pseudo-Huber of the norm, the mean over images. h_tilde, h: [N, 9216]."""
    return pseudo_huber(torch.linalg.vector_norm(h - h_tilde, dim=1)).mean()


def autodecoder_loss(z_tilde, z):
    """Eq. 6: ||z - E(G(z))||, pseudo-Huber, the mean over dimensions. z_tilde, z: [N, Z]."""
    return pseudo_huber(z - z_tilde).mean()


def autodecoder_loss_q(z_hat_tilde, z_hat):
    """Eq. 7: ||E(x) - E(G(E(x)))||, pseudo-Huber, the mean over dimensions. z_hat_tilde, z_hat: [N, Z]."""
    return pseudo_huber(z_hat - z_hat_tilde).mean()


def total_loss(terms, weights):
    """Eq. 8 for G and E: the sum of weights[name] * terms[name]."""
    return sum(weights[name] * term for name, term in terms.items())


def all_losses(nets, optimizers, x, z, weights, unroll):
    """The losses of one forward pass: images x [N, 3, S, S] in [-1, 1] and latents z [N, Z] -> {name: scalar}.

    `D` and `G_E` are for the networks of that name to minimise; the other names are the terms of `G_E`, whose weights
    are {name: number}. A term of weight 0 is left out, and not computed. unroll: K, 0 for none; the steps start from
    the state of optimizers["D"].
    """
    G, E, D = nets["G"], nets["E"], nets["D"]
    x_hat, z_hat = G(z), E(x)
    pairs = [(x, z_hat), (x_hat, z)]
    d_q, d_p = (D(*pair) for pair in pairs)
    terms = {"L_GAN": unrolled_generator_loss(D, optimizers["D"], pairs, d_q, d_p, unroll)}
    if weights["L_AD"]:
        terms["L_AD"] = autodecoder_loss(E(x_hat), z)
    if weights["L_AE"] or weights["L_H"]:
        x_tilde = G(z_hat)
    if weights["L_AE"]:
        terms["L_AE"] = autoencoder_loss(x_tilde, x)
    if weights["L_H"]:
        terms["L_H"] = feature_loss(nets["H"](x_tilde), nets["H"](x))
    return {"D": discriminator_loss(d_q, d_p), "G_E": total_loss(terms, weights), **terms}


# ---------------------------------------------------------------------------------------------------------- training


def build_optimizers(nets, lr):
    """One Adam for each loss that is minimised, by the loss's name: D has its own, G and E share one."""
    groups = {"D": list(nets["D"].parameters()), "G_E": [*nets["G"].parameters(), *nets["E"].parameters()]}
    return {
        loss: torch.optim.Adam(parameters, lr, BETAS, fused=True, capturable=True)
        for loss, parameters in groups.items()
    }


def draw_batch(images, latent_dim):
    """x: the images uint8 [N, 3, S, S] in [-1, 1]; z ~ U[-1, 1]^Z: [N, Z]."""
    return to_float(images), torch.rand(len(images), latent_dim, device=images.device) * 2 - 1


def train_step(nets, optimizers, x, z, weights, unroll):
    """One update of every network, all at the same point. Returns the losses there, as tensors: see all_losses."""
    losses = all_losses(nets, optimizers, x, z, weights, unroll)
    for name, optimizer in optimizers.items():
        optimizer.zero_grad()
        losses[name].backward(inputs=optimizer.param_groups[0]["params"], retain_graph=True)
    for optimizer in optimizers.values():
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


def percent(D, x, z):
    """D's output for pairs of images x [N, 3, S, S] and latents z [N, Z], in percent: [N]."""
    return 100 * D(x, z).sigmoid().squeeze(1)


def save_samples(path, nets, z):
    """Figures 5, 7, ... 21: G(z), ten a row, with D's output in percent. z: [N, Z]."""
    x_hat = nets["G"](z)
    save_grid(path, x_hat, captions=[captions(percent(nets["D"], x_hat, z))])


def save_reconstructions(path, nets, x):
    """Figures 6, 8, ... 22: pairs (x, G(E(x))), five a row, with D's output in percent. x: [N, 3, S, S] in [-1, 1]."""
    z_hat = nets["E"](x)
    x_tilde = nets["G"](z_hat)
    texts = [captions(percent(nets["D"], images, z_hat)) for images in (x, x_tilde)]
    save_grid(path, x, x_tilde, columns=5, captions=texts)


def captions(percents):
    """Two digits for each of the percents [N], 99 at most."""
    return [f"{min(p, 99):02.0f}" for p in percents.tolist()]


def save_interpolations(path, nets, x, columns=8):
    """A walk in the latent space: five rows of x_1, images on the straight line from E(x_1) to E(x_2), x_2.

    x: images [10, 3, S, S] in [-1, 1].
    """
    x_1, x_2 = x[0::2], x[1::2]
    z_1, z_2 = nets["E"](x_1), nets["E"](x_2)
    between = [nets["G"](torch.lerp(z_1, z_2, i / (columns - 1))) for i in range(columns)]
    save_grid(path, torch.stack([x_1, *between, x_2], dim=1).flatten(0, 1), columns=columns + 2)


@torch.no_grad()
def save_figures(nets, data, z, out, step=None):
    """Into the folder out: samples, reconstructions and a walk; with a step only samples_<step>.png and
    reconstructions_<step>.png.

    The images are the first held-out ones, the same in every run. z: latents [N, Z], of which 100 are shown.
    """
    x = to_float(data.heldout[torch.arange(10) % len(data.heldout)].to(z.device))
    nets.eval()
    save_samples(out / ("figure_samples.png" if step is None else f"samples_{step}.png"), nets, z[:100])
    save_reconstructions(
        out / ("figure_reconstructions.png" if step is None else f"reconstructions_{step}.png"), nets, x
    )
    if step is None:
        save_interpolations(out / "figure_interpolations.png", nets, x)
    nets.train()


@torch.no_grad()
def heldout_autodecoder_loss_q(nets, data, device):
    """Eq. 7 on the first 250 held-out images, for the log: a scalar tensor."""
    nets.eval()
    z_hat = nets["E"](to_float(data.heldout[:250].to(device)))
    loss = autodecoder_loss_q(nets["E"](nets["G"](z_hat)), z_hat)
    nets.train()
    return loss


def sample_diversity(samples, images):
    """The mean distance of two samples over that of two images: about 1, or 0 in total collapse.

    samples: [N, 3, S, S], images: [M, 3, S, S], N, M > 1.
    """
    return (torch.pdist(samples.flatten(1)).mean() / torch.pdist(images.flatten(1)).mean()).item()


@torch.no_grad()
def measure(nets, data, z):
    """The figures of merit, on held-out images and latents z [N, Z]; D's outputs in percent."""
    nets.eval()
    G, E, D = nets["G"], nets["E"], nets["D"]
    x_hat = G(z)
    mean_image = to_float(sum(part.sum(0) for part in data.train.split(1000)) / len(data.train)).to(z.device)
    results = defaultdict(float)
    for part in data.heldout.split(250):
        x, share = to_float(part.to(z.device)), len(part) / len(data.heldout)
        z_hat = E(x)
        x_tilde = G(z_hat)
        values = {"heldout_l1": F.l1_loss(x_tilde, x)}
        values["heldout_l1_of_mean_image"] = F.l1_loss(mean_image.expand_as(x), x)
        values["autodecoder_q"] = autodecoder_loss_q(E(x_tilde), z_hat)
        values["d_on_real"] = percent(D, x, z_hat).mean()
        values["d_on_reconstructions"] = percent(D, x_tilde, z_hat).mean()
        for name, value in values.items():
            results[name] += share * value.item()
    results["d_on_samples"] = percent(D, x_hat, z).mean().item()
    results["latent_l1"] = F.l1_loss(E(x_hat), z).item()
    results["sample_diversity"] = sample_diversity(x_hat, to_float(data.heldout[: len(z)].to(z.device)))
    nets.train()
    return dict(results)


# ------------------------------------------------------------------------------------------------------ command line


def fail(message):
    """End the program with one line on the standard error and exit status 2."""
    print(f"bigan_latent.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args(argv):
    """The arguments, and the checkpoint of --out if they ask for it, else None."""
    parser = argparse.ArgumentParser(
        description="Toward better reconstruction of style images with GANs (Lorbert et al. 2017). Defaults are the "
        "paper's (Section 5).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail
    add = parser.add_argument
    quick = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in QUICK.items())
    table = "the row of Table 1 that sets the weights; the next three arguments override it"
    weight = {"type": float, "default": argparse.SUPPRESS}  # see EXPERIMENTS
    add("--experiment", choices=EXPERIMENTS, default="EX7", help=table)
    add("--lambda-ad", **weight, help="lambda_1, weight of Eq. 6: latents z against E(G(z))")
    add("--lambda-ae", **weight, help="lambda_2, weight of Eq. 4: pixels of x against G(E(x))")
    add("--lambda-h", **weight, help="lambda_3, weight of Eq. 5: AlexNet's features of x against G(E(x))")
    add("--alexnet-weights", help="torchvision's alexnet-owt-7be5be79.pth; downloaded if needed and not given")
    add("--data", default="faces", help="folder of images, searched recursively, or faces (drawn), cifar10, mnist")
    add("--out", default="runs/bigan_latent", help="folder for pictures, log.csv, results.json, checkpoint.pt")
    add("--resume", action="store_true", help="continue the run in --out, or with a larger --steps go further")
    add("--eval", action="store_true", help="no training: figures and results of the run in --out")
    add("--quick", action="store_true", help=f"faces within three minutes on two CPU cores: {quick}")
    add("--steps", type=int, default=200_000, help="updates of every network (Section 5)")
    add("--unroll", type=int, default=8, help="K, D's updates that G and E look ahead (Section 5); 0: a plain BiGAN")
    add("--batch-size", type=int, default=32, help="images a step (Section 5)")
    add("--image-size", type=int, choices=IMAGE_SIZES, default=64, help="side of the images in pixels (Section 5)")
    add("--latent-dim", type=int, default=100, help="dimensions Z of the latents (Section 5)")
    add("--stochastic-encoder", action="store_true", help="E gives a mean and a variance (footnote 1)")
    add("--channels", type=int, default=64, help="width of the layers next to the image (DCGAN's code)")
    add("--lr", type=float, default=2e-4, help="learning rate (Section 5)")
    add("--log-every", type=int, default=100, help="steps between lines of the log")
    add("--save-every", type=int, default=2000, help="steps between checkpoints, with pictures")
    add("--seed", type=int, default=0, help="of weights, batches and dropout; the held-out images are always the same")
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
    else:
        parser.set_defaults(**EXPERIMENTS[args.experiment], **QUICK if args.quick else {})
    args = parser.parse_args(argv)
    check_args(args, checkpoint)
    return args, checkpoint


def check_args(args, checkpoint):
    """Refuse arguments that cannot be, or that differ from those of the checkpoint's run, if there is one."""
    for name, value in vars(args).items():
        minimum = {int: 0 if name in ("seed", "unroll") else 1, float: 0}.get(type(value))
        if minimum is not None and not minimum <= value < 2**63:
            fail(f"--{name.replace('_', '-')} cannot be {value}: it must be at least {minimum}")
    free = {"data", "log_every", "save_every", "alexnet_weights"}
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
        if checkpoint["script"] == "bigan_latent":
            return checkpoint
    except Exception:  # torch.load raises many kinds on what is no checkpoint
        pass
    fail(f"{path} is not a checkpoint of bigan_latent.py: give another --out")


def load_features(path):
    """H, with AlexNet's weights from the file at path, or from torchvision if that is None."""
    H, name = Features(), "alexnet-owt-7be5be79.pth"
    try:
        if path is None:
            source = torchvision.models.AlexNet_Weights.IMAGENET1K_V1
            weights = source.get_state_dict(check_hash=True, weights_only=True)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        features = {k.removeprefix("features."): w for k, w in weights.items() if k.startswith("features.")}
        H.layers.load_state_dict(features)
    except Exception as error:  # the network, the disk and torch.load raise many kinds
        if path is None:
            fail(f"AlexNet's weights cannot be downloaded ({error}): give torchvision's {name} to --alexnet-weights")
        fail(f"{path} does not hold AlexNet's weights: give torchvision's {name}")
    return H


def train(args, nets, optimizers, data, z, run):
    """The training loop, from run["step"] to args.steps. z: latents [N, Z] of the pictures."""
    out, images = Path(args.out), place_images(data.train, z.device)
    weights = {"L_GAN": 1.0, "L_AD": args.lambda_ad, "L_AE": args.lambda_ae, "L_H": args.lambda_h}

    def save():
        """Write a temporary file and rename it, so that checkpoint.pt is always whole."""
        state = {"networks": nets.state_dict(), "optimizers": {k: v.state_dict() for k, v in optimizers.items()}}
        state["random"] = {"cpu": torch.get_rng_state()}
        if z.is_cuda:
            state["random"]["cuda"] = torch.cuda.get_rng_state(z.device)
        torch.save({"script": "bigan_latent", **run, **state}, out / "checkpoint.tmp")
        os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")

    def iterate(drawn):
        """One step on uint8 images."""
        return train_step(nets, optimizers, *draw_batch(drawn, args.latent_dim), weights, args.unroll)

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
        losses = {**losses, "autodecoder_q": heldout_autodecoder_loss_q(nets, data, z.device)}
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
    H = None
    if args.lambda_h > 0:
        H = Features() if checkpoint else load_features(args.alexnet_weights)  # a checkpoint has its weights
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
    sizes = args.image_size, args.channels, args.latent_dim
    nets = build_networks(*sizes, args.stochastic_encoder, H).to(device)
    use_precision(nets, args.precision)
    optimizers = build_optimizers(nets, args.lr)
    z = torch.rand(256, args.latent_dim, generator=torch.Generator().manual_seed(0)) * 2 - 1  # the same in every run
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
    weights = f"weights {args.lambda_ad:g}, {args.lambda_ae:g}, {args.lambda_h:g}"
    print(
        f"{args.experiment}, {weights}, on {len(data.train)} images of {args.data}, on {device}, into {out}/",
        flush=True,
    )
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
