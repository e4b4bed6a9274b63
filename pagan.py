# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy", "pillow>=10.1"]
# ///
"""Pairwise augmented GANs with adversarial reconstruction loss (Alanov, Kochurov, Yashkov, Vetrov, 2018).

A generator G from latents to images and an encoder E from images to latents, E(x) being a sample of a Gaussian q(z|x).
What makes G(E(x)) like x is not a distance of pixels but a third player, a discriminator on pairs D(x, y): it tells
(x, a(x)), an image and a random augmentation of it, a cropped one say, from (x, G(E(x))). So G(E(x)) must show what x
shows, but not at the same pixels. D(x) matches G's samples to the images, and D(z) matches E's latents to the prior.

    python pagan.py --quick                                                 # cartoon faces in three minutes on a CPU
    python pagan.py --data photos/ --out runs/photos                        # a folder of images
    python pagan.py --data cifar10 --reconstruction l1 --out runs/cifar_l1  # a row of the ablation study

paper -> code (its slides by their titles)
    PAGAN Diagram               G, E and the discriminators      Generator, Encoder, ImageDiscriminator (of x, and of
                                                                 x, y), LatentDiscriminator
    Discriminator on Pairs,     the objectives of D(x), D(x, y)  discriminator_loss; of G and E: generator_loss,
    Matching Encoder to Prior   and D(z)                         encoder_loss, pair_loss
    Conditional Distributions   q(z|x), r(y|x)                   reparameterise, augment
    PAGAN Algorithm             Algorithm 1                      all_losses (L_d^x, ... L_e), train_step
    Augmentation Function       blur, contrast, pad + crop       blur, contrast, crop; figure: save_augmentations
    Reconstruction Loss         L1                               l1_loss; --reconstruction l1
    Drawbacks                   table: L1, L2 of augmentations   measure: l1_of_blur, l2_of_crop, ...
    Samples, Reconstructions    figure                           save_samples, save_reconstructions
    Inception Score, FID        table                            inception_score, frechet_inception_distance
    RID, RID Results            definition, table                reconstruction_inception_dissimilarity, measure
    Ablation Study              table                            --reconstruction l1; --augmentation none
    Choice of Augmentation      table                            --augmentation, --crop
    GAN Drawbacks               mode collapse                    sample_diversity

Rulings, where the slides are silent or disagree with themselves
    - Networks and settings are ours. G, D(x) and D(x, y) are SNGAN's for 32x32 (Miyato et al. 2018, Table 3), with a
      stage less or more for 16x16 and 64x64; D(x, y) takes both images as six channels. E mirrors G; D(z) has two
      hidden layers. 128 latents from N(0, I), 64 images, Adam with 2e-4, 0.5, 0.999; 100,000 steps.
    - The five updates are Adam's, all from gradients at one point. Samples and reconstructions go through G together,
      so that one batch normalisation serves both.
    - Crop: padded by its own reflection, by 0.1 of the side in whole pixels: of the slides' five that has the best FID
      and Inception score. Blur: a standard deviation of 1/64 to 3/64 of the side. Contrast: deviations from the mean
      grey times 0.5 to 1.5.
    - PAGAN-L1 has the L1 loss where PAGAN has -log D(x, G(E(x))): the mean over pixels, not its square, times 10.
    - In figures and results z_hat is the mean of q(z|x).
    - FID is of held-out images and 10,000 samples, RID of held-out images and their reconstructions; Inception score,
      of as many training images for comparison. RID has no spread here. Which network was used is not said: ours is
      torchvision's Inception v3, so compare the numbers among themselves. The slides give PAGAN a FID of 32.84, and of
      37.20 in another table.
    - RMSE is of pixels in 0..255; the slides do not say in what their 8.12, and 8.89 of the augmentation, are.
    - The two rows of perceptual distances in the table of drawbacks, which need VGG's weights, are left out.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
import warnings
import zlib
from collections import defaultdict
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from common import DataError, draw_images, load_data, place_images, save_grid, to_float

IMAGE_SIZES = (16, 32, 64)
LEAK = 0.1  # slope of the leaky ReLU, SNGAN's
BETAS = (0.5, 0.999)
HIDDEN = 512  # units of D(z)'s layers
BLUR = (1 / 64, 3 / 64)  # least and greatest standard deviation, in sides of the image
CONTRAST = (0.5, 1.5)  # least and greatest factor
QUICK = {"image_size": 16, "channels": 16, "latent_dim": 64, "batch_size": 16, "crop": 0.06, "steps": 2200, "lr": 3e-4}
QUICK |= {"classifier": "none", "save_every": 1000}


# ---------------------------------------------------------------------------------------------------------- networks


def conv_widths(image_size, channels):
    """Channels of the stages from S to 8x8, and of the 4x4 map: c, 2c, 4c, 8c where S = 32."""
    return [channels * 2**i for i in range(image_size.bit_length() - 2)]


class Generator(nn.Sequential):
    """G: latents z [N, Z] -> images [N, 3, S, S] in [-1, 1]."""

    def __init__(self, image_size, channels, latent_dim):
        widths = conv_widths(image_size, channels)[::-1]
        layers = [nn.Linear(latent_dim, 16 * widths[0]), nn.Unflatten(1, (widths[0], 4, 4))]
        layers += [nn.BatchNorm2d(widths[0]), nn.ReLU()]
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [nn.ConvTranspose2d(c_in, c_out, 4, 2, 1), nn.BatchNorm2d(c_out), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(channels, 3, 3, 1, 1), nn.Tanh())


class Encoder(nn.Sequential):
    """E, or q(z|x): images x [N, 3, S, S] in [-1, 1] -> means and log-variances [N, 2 Z]."""

    def __init__(self, image_size, channels, latent_dim):
        widths = conv_widths(image_size, channels)
        layers = [nn.Conv2d(3, channels, 3, 1, 1), nn.BatchNorm2d(channels), nn.LeakyReLU(LEAK)]
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [nn.Conv2d(c_in, c_out, 4, 2, 1), nn.BatchNorm2d(c_out), nn.LeakyReLU(LEAK)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(16 * widths[-1], 2 * latent_dim))


class ImageDiscriminator(nn.Sequential):
    """D(x) and D(x, y): one or two images [N, 3, S, S] in [-1, 1] -> logits [N, 1], positive for real ones."""

    def __init__(self, image_size, channels, images):
        widths = conv_widths(image_size, channels)
        layers = [spectral_norm(nn.Conv2d(3 * images, channels, 3, 1, 1)), nn.LeakyReLU(LEAK)]
        for c, c_next in zip(widths, widths[1:]):
            layers += [spectral_norm(nn.Conv2d(c, c, 4, 2, 1)), nn.LeakyReLU(LEAK)]
            layers += [spectral_norm(nn.Conv2d(c, c_next, 3, 1, 1)), nn.LeakyReLU(LEAK)]
        super().__init__(*layers, nn.Flatten(), spectral_norm(nn.Linear(16 * widths[-1], 1)))

    def forward(self, *images):
        return super().forward(torch.cat(images, dim=1))


class LatentDiscriminator(nn.Sequential):
    """D(z): latents [N, Z] -> logits [N, 1], positive for those of the prior."""

    def __init__(self, latent_dim):
        layers = [nn.Linear(latent_dim, HIDDEN), nn.LeakyReLU(LEAK), nn.Linear(HIDDEN, HIDDEN), nn.LeakyReLU(LEAK)]
        super().__init__(*layers, nn.Linear(HIDDEN, 1))


def build_networks(reconstruction, image_size, channels, latent_dim):
    """The networks by the names of their losses; D_xx, D(x, y), only where reconstruction is "pair", not "l1"."""
    nets = nn.ModuleDict({"G": Generator(image_size, channels, latent_dim)})
    nets["E"] = Encoder(image_size, channels, latent_dim)
    nets["D_x"] = ImageDiscriminator(image_size, channels, images=1)
    nets["D_z"] = LatentDiscriminator(latent_dim)
    if reconstruction == "pair":
        nets["D_xx"] = ImageDiscriminator(image_size, channels, images=2)
    return nets


# ----------------------------------------------------------------------------------------------------- augmentations


def crop(x, u, p):
    """Pad + crop: images padded with their reflection by p of their side, and S pixels of that from a random place.

    x: [N, 3, S, S]. u: [N, 2] in [0, 1), where to cut, down and across. Returns [N, 3, S, S].
    """
    size, pad = x.shape[-1], round(p * x.shape[-1])
    offsets = (u * (2 * pad + 1)).long()
    rows, columns = (offsets[:, :, None] + torch.arange(size, device=x.device)).unbind(1)  # (N, S) each
    i = torch.arange(len(x), device=x.device)[:, None, None]
    padded = F.pad(x, (pad, pad, pad, pad), mode="reflect").movedim(1, -1)
    return padded[i, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


def blur(x, u):
    """Gaussian blur. x: [N, 3, S, S]. u: [N, 2] in [0, 1), the first for the standard deviation. [N, 3, S, S]."""
    count, channels, size, _ = x.shape
    radius = math.ceil(3 * BLUR[1] * size)
    sigma = size * (BLUR[0] + (BLUR[1] - BLUR[0]) * u[:, :1])
    kernels = (-((torch.arange(-radius, radius + 1, device=x.device) / sigma) ** 2) / 2).softmax(dim=1)  # (N, 2r + 1)
    kernels = kernels.repeat_interleave(channels, 0)[:, None, None]  # (3N, 1, 1, 2r + 1)
    planes = F.pad(x, (radius,) * 4, mode="reflect").flatten(0, 1)[None]  # (1, 3N, S + 2r, S + 2r)
    planes = F.conv2d(planes, kernels, groups=count * channels)
    return F.conv2d(planes, kernels.mT, groups=count * channels).view_as(x)


def contrast(x, u):
    """Contrast: deviations from each image's mean grey times a factor, clipped. x: [N, 3, S, S], u: [N, 2]."""
    mean = x.mean((1, 2, 3), keepdim=True)
    factor = CONTRAST[0] + (CONTRAST[1] - CONTRAST[0]) * u[:, :1, None, None]
    return (mean + factor * (x - mean)).clamp(-1, 1)


def augment(x, u, kind, p):
    """a(x) ~ r(y|x): images x [N, 3, S, S] in [-1, 1], changed by u, random numbers [N, 2] in [0, 1). p: of crop."""
    if kind == "crop":
        return crop(x, u, p)
    if kind == "blur":
        return blur(x, u)
    if kind == "contrast":
        return contrast(x, u)
    return x


# ------------------------------------------------------------------------------------------------------------ losses


def reparameterise(mean, log_variance, epsilon):
    """z_hat ~ q(z|x): mean + epsilon * sigma. All [N, Z]."""
    return mean + epsilon * (log_variance / 2).exp()


def discriminator_loss(d_real, d_fake):
    """L_d^x, L_d^z, L_d^xx: -mean log D(real) - mean log(1 - D(fake)).

    d_real, d_fake: logits [N, 1] of D(x) and D(x_pr), or of D(z) and D(z_hat), or of D(x, x_aug) and D(x, x_rec).
    """
    return F.softplus(-d_real).mean() + F.softplus(d_fake).mean()


def pair_loss(d_rec):
    """Last term of L_g and of L_e: -mean log D(x, x_rec). d_rec: D's logits [N, 1]."""
    return F.softplus(-d_rec).mean()


def l1_loss(x_rec, x):
    """In place of pair_loss in PAGAN-L1: |x - x_rec|_1, the mean over pixels. x_rec, x: [N, 3, S, S]."""
    return F.l1_loss(x_rec, x)


def generator_loss(d_pr, L_rec):
    """L_g: -mean log D(x_pr) + L_rec. d_pr: D's logits [N, 1]; L_rec: pair_loss, or the weighted l1_loss."""
    return F.softplus(-d_pr).mean() + L_rec


def encoder_loss(d_hat, L_rec):
    """L_e: -mean log D(z_hat) + L_rec. d_hat: D's logits [N, 1]; L_rec: pair_loss, or the weighted l1_loss."""
    return F.softplus(-d_hat).mean() + L_rec


def all_losses(nets, x, x_aug, z, epsilon, l1_weight):
    """Algorithm 1, one forward pass -> {name: scalar}: L_d_x, L_d_z, L_d_xx, L_g and L_e, to minimise, and L_rec.

    x: images [N, 3, S, S] in [-1, 1], x_aug: augmentations of them. z ~ N(0, I), epsilon ~ N(0, I), q's noise: [N, Z].
    l1_weight: of the L1 loss where there is no D_xx, and so no L_d_xx.
    """
    z_hat = reparameterise(*nets["E"](x).chunk(2, dim=1), epsilon)
    x_pr, x_rec = nets["G"](torch.cat([z, z_hat])).chunk(2)
    d_x, d_pr = nets["D_x"](torch.cat([x, x_pr])).chunk(2)
    d_z, d_hat = nets["D_z"](torch.cat([z, z_hat])).chunk(2)
    losses = {"L_d_x": discriminator_loss(d_x, d_pr), "L_d_z": discriminator_loss(d_z, d_hat)}
    if "D_xx" in nets:
        d_aug, d_rec = nets["D_xx"](torch.cat([x, x]), torch.cat([x_aug, x_rec])).chunk(2)
        losses["L_d_xx"] = discriminator_loss(d_aug, d_rec)
        L_rec = pair_loss(d_rec)
    else:
        L_rec = l1_weight * l1_loss(x_rec, x)
    return {**losses, "L_g": generator_loss(d_pr, L_rec), "L_e": encoder_loss(d_hat, L_rec), "L_rec": L_rec}


# ---------------------------------------------------------------------------------------------------------- training


def build_optimizers(nets, lr):
    """One Adam for each loss that is minimised, by the loss's name."""
    players = {"L_d_x": "D_x", "L_d_z": "D_z", "L_d_xx": "D_xx", "L_g": "G", "L_e": "E"}
    return {
        loss: torch.optim.Adam(nets[name].parameters(), lr, BETAS, fused=True, capturable=True)
        for loss, name in players.items()
        if name in nets
    }


def draw_batch(images, latent_dim, augmentation, p):
    """x: the images uint8 [N, 3, S, S] in [-1, 1]; a(x); z and epsilon ~ N(0, I): [N, Z]."""
    x = to_float(images)
    x_aug = augment(x, torch.rand(len(x), 2, device=x.device), augmentation, p)
    return x, x_aug, *torch.randn(2, len(x), latent_dim, device=x.device)


def train_step(nets, optimizers, x, x_aug, z, epsilon, l1_weight):
    """One update of every network, all at the same point. Returns the losses there, as tensors: see all_losses."""
    losses = all_losses(nets, x, x_aug, z, epsilon, l1_weight)
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


def reconstruct(nets, x):
    """G of the means of q(z|x): images x [N, 3, S, S] in [-1, 1] -> [N, 3, S, S]."""
    return nets["G"](nets["E"](x).chunk(2, dim=1)[0])


def save_samples(path, nets, z):
    """G(z), ten a row. z: [N, Z]."""
    save_grid(path, nets["G"](z))


def save_reconstructions(path, nets, x):
    """Pairs (x, G(E(x))), five a row. x: images [N, 3, S, S] in [-1, 1]."""
    save_grid(path, x, reconstruct(nets, x), columns=5)


def save_augmentations(path, x, p):
    """Original, blur, contrast, pad + crop, twice a row. x: images [N, 3, S, S] in [-1, 1]; p: of crop."""
    u = torch.rand(len(x), 2, generator=torch.Generator().manual_seed(0)).to(x.device)
    captions = [["original"], ["blur"], ["contrast"], ["pad + crop"]]
    save_grid(path, x, blur(x, u), contrast(x, u), crop(x, u, p), columns=2, captions=captions)


@torch.no_grad()
def save_figures(nets, data, z, out, p, step=None):
    """Into the folder out: samples, reconstructions and augmentations; with a step only samples_<step>.png and
    reconstructions_<step>.png.

    The images are the first held-out ones, the same in every run. z: latents [N, Z], 100 of them shown. p: of crop.
    """
    x = to_float(data.heldout[torch.arange(40) % len(data.heldout)].to(z.device))
    nets.eval()
    save_samples(out / ("figure_samples.png" if step is None else f"samples_{step}.png"), nets, z[:100])
    save_reconstructions(
        out / ("figure_reconstructions.png" if step is None else f"reconstructions_{step}.png"), nets, x
    )
    if step is None:
        save_augmentations(out / "figure_augmentations.png", x[:10], p)
    nets.train()


def sample_diversity(samples, images):
    """The mean distance of two samples over that of two images: about 1, or 0 in total collapse.

    samples: [N, 3, S, S], images: [M, 3, S, S], N, M > 1.
    """
    return (torch.pdist(samples.flatten(1)).mean() / torch.pdist(images.flatten(1)).mean()).item()


def reconstruction_inception_dissimilarity(log_p_x, log_p_rec):
    """RID: exp E KL(p(y|x) || p(y|G(E(x)))), at least 1. log p(y|x) and log p(y|G(E(x))): [N, classes]."""
    return F.kl_div(log_p_rec, log_p_x, reduction="batchmean", log_target=True).double().exp().item()


def inception_score(probabilities, splits=10):
    """IS: exp(E KL(p(y|x) || p(y))), its mean and standard deviation over the splits (Salimans et al. 2016).

    probabilities: p(y|x) of images x, [N, classes], N >= splits. From 1 to the number of classes.
    """
    scores = []
    for p in probabilities.tensor_split(splits):
        scores.append((torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0))).sum(1).mean().exp())
    return torch.stack(scores).mean().item(), torch.stack(scores).std(correction=0).item()


def frechet_inception_distance(features_a, features_b):
    """FID: |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), of means m and covariances C (Heusel et al. 2017).

    features: [N, F] and [M, F], N, M > 1. The trace of the root is that of (C_a^(1/2) C_b C_a^(1/2))^(1/2), a symmetric
    matrix, whose eigenvalues are found in float64 and cut off at 0: so it exists where N < F, too.
    """
    features_a, features_b = features_a.double(), features_b.double()
    cov_a, cov_b = features_a.T.cov(), features_b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    root_trace = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    difference = features_a.mean(0) - features_b.mean(0)
    return (difference.square().sum() + cov_a.trace() + cov_b.trace() - 2 * root_trace).item()


class Inception(nn.Module):
    """torchvision's Inception v3: images [N, 3, S, S] in [-1, 1] -> logits [N, 1000] and features [N, 2048]."""

    def __init__(self, weights):
        super().__init__()
        self.net = torchvision.models.inception_v3(weights=None, init_weights=False)
        self.net.load_state_dict(weights)
        self.fc, self.net.fc = self.net.fc, nn.Identity()

    def forward(self, x):
        features = self.net(F.interpolate(x, (299, 299), mode="bilinear"))
        return self.fc(features), features


@torch.no_grad()
def measure(nets, data, z, augmentation, p, classifier=None, count=0):
    """The figures of merit, on held-out images and latents z [N, Z]; None where they need a classifier and have none.

    augmentation, p: those of the AUG row; l1_of_crop and l2_of_crop are of crop with p in any case. classifier: from
    images [N, 3, S, S] in [-1, 1] to (logits [N, classes], features [N, F]); count: how many samples it judges.
    """
    nets.eval()
    G, device, rng = nets["G"], z.device, torch.Generator().manual_seed(1)
    mean_image = to_float(sum(part.sum(0) for part in data.train.split(1000)) / len(data.train)).to(device)
    results, log_p, features = defaultdict(float), defaultdict(list), defaultdict(list)

    def judge(name, images):
        """Keep what the classifier says of these images, under a name."""
        if classifier:
            logits, part = classifier(images)
            log_p[name].append(logits.log_softmax(dim=1))
            features[name].append(part)

    for part in data.heldout.split(100):
        x, share = to_float(part.to(device)), len(part) / len(data.heldout)
        u = torch.rand(len(x), 2, generator=rng).to(device)
        x_rec, x_aug, x_blur, x_crop = reconstruct(nets, x), augment(x, u, augmentation, p), blur(x, u), crop(x, u, p)
        values = {
            "heldout_l1": F.l1_loss(x_rec, x),
            "heldout_l1_of_mean_image": F.l1_loss(mean_image.expand_as(x), x),
            "l1_of_blur": F.l1_loss(x_blur, x),
            "l1_of_crop": F.l1_loss(x_crop, x),
            "l2_of_blur": F.mse_loss(x_blur, x),
            "l2_of_crop": F.mse_loss(x_crop, x),
            "rmse_255": F.mse_loss(x_rec, x),
            "rmse_255_of_augmentation": F.mse_loss(x_aug, x),
        }
        for name, value in values.items():
            results[name] += share * value.item()
        for name, images in (("x", x), ("x_rec", x_rec), ("x_aug", x_aug)):
            judge(name, images)
    for name in ("rmse_255", "rmse_255_of_augmentation"):
        results[name] = 127.5 * math.sqrt(results[name])
    results["sample_diversity"] = sample_diversity(G(z), to_float(data.heldout[: len(z)].to(device)))
    results |= dict.fromkeys(("fid", "inception_score", "inception_score_std", "inception_score_of_real"))
    results |= dict.fromkeys(("rid", "rid_of_augmentation"))
    if classifier:
        for noise in torch.randn(count, z.shape[1], generator=rng).split(100):
            judge("x_pr", G(noise.to(device)))
        for part in data.train[:count].split(100):
            judge("train", to_float(part.to(device)))
        log_p, features = ({name: torch.cat(parts) for name, parts in d.items()} for d in (log_p, features))
        results["fid"] = frechet_inception_distance(features["x"], features["x_pr"])
        results["inception_score"], results["inception_score_std"] = inception_score(log_p["x_pr"].exp())
        results["inception_score_of_real"], _ = inception_score(log_p["train"].exp())
        results["rid"] = reconstruction_inception_dissimilarity(log_p["x"], log_p["x_rec"])
        results["rid_of_augmentation"] = reconstruction_inception_dissimilarity(log_p["x"], log_p["x_aug"])
    nets.train()
    return dict(results)


# ------------------------------------------------------------------------------------------------------ command line


def fail(message):
    """End the program with one line on the standard error and exit status 2."""
    print(f"pagan.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args(argv):
    """The arguments, and the checkpoint of --out if they ask for it, else None."""
    parser = argparse.ArgumentParser(
        description="Pairwise augmented GANs with adversarial reconstruction loss (Alanov et al. 2018). The slides "
        "name no settings but the augmentations: defaults are ours (see the rulings at the head of the script).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail
    add = parser.add_argument
    quick = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in QUICK.items())
    add("--reconstruction", choices=("pair", "l1"), default="pair", help="PAGAN, or PAGAN-L1 of the ablation study")
    augmentations = "a(x), for the pair loss; none: PAGAN-NOAUG of the ablation study"
    add("--augmentation", choices=("crop", "blur", "contrast", "none"), default="crop", help=augmentations)
    add("--crop", type=float, default=0.1, help="padding in sides of the image; the slides try 0, 0.05, 0.1, 0.15, 0.2")
    add("--l1-weight", type=float, default=10.0, help="of the L1 loss of PAGAN-L1")
    add("--data", default="faces", help="folder of images, searched recursively, or faces (drawn), cifar10, mnist")
    add("--out", default="runs/pagan", help="folder for pictures, log.csv, results.json, checkpoint.pt")
    add("--resume", action="store_true", help="continue the run in --out, or with a larger --steps go further")
    add("--eval", action="store_true", help="no training: figures and results of the run in --out")
    add("--quick", action="store_true", help=f"faces within three minutes on two CPU cores: {quick}")
    add("--steps", type=int, default=100_000, help="updates of every network")
    add("--batch-size", type=int, default=64, help="images a step")
    add("--image-size", type=int, choices=IMAGE_SIZES, default=32, help="side of the images in pixels (CIFAR-10's)")
    add("--latent-dim", type=int, default=128, help="dimensions Z of the latents")
    add("--channels", type=int, default=64, help="width of the layers next to the image")
    add("--lr", type=float, default=2e-4, help="learning rate")
    files = "inception, none or a TorchScript file, as tests/make_classifier.py makes, of images to (logits, features)"
    add("--classifier", default="inception", help=files)
    add(
        "--inception-weights", help="torchvision's inception_v3_google-0cc3c7bd.pth; downloaded if needed and not given"
    )
    add("--samples", type=int, default=10_000, help="generated images that the classifier judges")
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
    else:
        parser.set_defaults(**QUICK if args.quick else {})
    args = parser.parse_args(argv)
    check_args(args, checkpoint)
    return args, checkpoint


def check_args(args, checkpoint):
    """Refuse arguments that cannot be, or that differ from those of the checkpoint's run, if there is one."""
    for name, value in vars(args).items():
        minimum = {int: 0 if name == "seed" else 1, float: 0}.get(type(value))
        if minimum is not None and not minimum <= value < 2**63:
            fail(f"--{name.replace('_', '-')} cannot be {value}: it must be at least {minimum}")
    if args.crop > 0.5 or 0 < args.crop * args.image_size <= 0.5:
        fail(f"--crop cannot be {args.crop}: it must be 0, or from a pixel to half of the side")
    if args.samples < 10:
        fail(f"--samples cannot be {args.samples}: it must be at least 10")
    free = {"data", "log_every", "save_every", "classifier", "inception_weights", "samples"}
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
        if checkpoint["script"] == "pagan":
            return checkpoint
    except Exception:  # torch.load raises many kinds on what is no checkpoint
        pass
    fail(f"{path} is not a checkpoint of pagan.py: give another --out")


def load_classifier(name, path, image_size):
    """p(y|x) by --classifier: Inception v3 with the weights in the file at path, or torchvision's if that is None; or
    what the TorchScript file called name holds. None if there is to be none, or Inception's weights cannot be had."""
    if name == "none":
        return None
    if name == "inception":
        file = "inception_v3_google-0cc3c7bd.pth"
        try:
            if path is None:
                source = torchvision.models.Inception_V3_Weights.IMAGENET1K_V1
                return Inception(source.get_state_dict(check_hash=True, weights_only=True)).eval()
            return Inception(torch.load(path, map_location="cpu", weights_only=True)).eval()
        except Exception as error:  # the network, the disk and torch.load raise many kinds
            if path is not None:
                fail(f"{path} does not hold Inception v3's weights: give torchvision's {file}")
            print(
                f"no FID, RID and Inception score: {file} cannot be downloaded ({error}); give it to "
                "--inception-weights, or another classifier to --classifier",
                flush=True,
            )
            return None
    if not Path(name).is_file():
        fail(f"--classifier {name} does not exist: give a TorchScript file, inception or none")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch would have another format
            classifier = torch.jit.load(name, map_location="cpu").eval()
        logits, features = classifier(torch.zeros(2, 3, image_size, image_size))
        if len(logits) == len(features) == 2 and logits.ndim == features.ndim == 2 and features.shape[1] > 1:
            return classifier
    except Exception:  # TorchScript raises many kinds
        pass
    fail(
        f"--classifier {name} is no TorchScript file that takes [N, 3, {image_size}, {image_size}] to logits, features"
    )


def train(args, nets, optimizers, data, z, run):
    """The training loop, from run["step"] to args.steps. z: latents [N, Z] of the pictures."""
    out, images = Path(args.out), place_images(data.train, z.device)

    def save():
        """Write a temporary file and rename it, so that checkpoint.pt is always whole."""
        state = {"networks": nets.state_dict(), "optimizers": {k: v.state_dict() for k, v in optimizers.items()}}
        state["random"] = {"cpu": torch.get_rng_state()}
        if z.is_cuda:
            state["random"]["cuda"] = torch.cuda.get_rng_state(z.device)
        torch.save({"script": "pagan", **run, **state}, out / "checkpoint.tmp")
        os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")

    def iterate(drawn):
        """One step on uint8 images."""
        batch = draw_batch(drawn, args.latent_dim, args.augmentation, args.crop)
        return train_step(nets, optimizers, *batch, args.l1_weight)

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
            save_figures(nets, data, z, out, args.crop, step)
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

    classifier = load_classifier(args.classifier, args.inception_weights, args.image_size)

    torch.manual_seed(args.seed)
    nets = build_networks(args.reconstruction, args.image_size, args.channels, args.latent_dim).to(device)
    use_precision(nets, args.precision)
    optimizers = build_optimizers(nets, args.lr)
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
    loss = f"augmentation {args.augmentation}" if args.reconstruction == "pair" else f"L1 loss times {args.l1_weight:g}"
    print(
        f"{args.reconstruction}: {loss}, on {len(data.train)} images of {args.data}, on {device}, into {out}/",
        flush=True,
    )
    if not args.eval:
        train(args, nets, optimizers, data, z, run)

    save_figures(nets, data, z, out, args.crop)
    if classifier:
        print(f"classifying held-out images, {args.samples} samples, training images", flush=True)
        classifier = classifier.to(device)
    results = measure(nets, data, z, args.augmentation, args.crop, classifier, args.samples)
    results["classifier"] = args.classifier if classifier else None
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
