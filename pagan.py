"""Pairwise augmented GANs with adversarial reconstruction loss (Alanov, Kochurov, Yashkov, Vetrov, 2018).

https://arxiv.org/abs/1810.04920, of which the slides of 5 December 2018 are implemented

A generator G from latents to images and an encoder E from images to latents, E(x) being a sample of a Gaussian q(z|x).
What makes G(E(x)) like x is not a distance of pixels but a discriminator on pairs D(x, y): it tells (x, a(x)), an image
and a random augmentation of it, from (x, G(E(x))). So G(E(x)) must show what x shows, but not at the same pixels. D(x)
matches G's samples to the images, and D(z) E's latents to the prior.

    python pagan.py --quick                             # cartoon faces within three minutes on two CPU cores
    python pagan.py --data photos/ --out runs/photos    # a folder of images
    python pagan.py --data cifar10 --reconstruction l1 --classifier inception --out runs/l1    # an ablation

slides -> code
    Algorithm 1                x, z, x_aug: draw_batch; z_hat ~ q(z|x), x_pr = G(z), x_rec = G(z_hat): pagan_losses;
                               theta of G, phi of E, psi of D_x, zeta of D_z, tau of D_xx: train_step
    PAGAN Diagram              Generator, Encoder, ImageDiscriminator (D_x of x, D_xx of x, y), LatentDiscriminator
    Discriminator on Pairs     D_xx: L_d_xx in pagan_losses
    Matching Encoder to Prior  D_z: L_d_z, L_e in pagan_losses
    Conditional Distributions  q(z|x): reparameterise; r(y|x): AUGMENTATIONS
    Augmentation Function      blur, contrast, crop; figure: save_figures
    Reconstruction Loss        L1: pagan_l1_losses, --reconstruction l1
    Drawbacks (table)          measure: l1_of_blur, l2_of_crop, ...
    Samples, Reconstructions   save_figures
    Inception Score, FID, RID  inception_score, frechet_inception_distance, reconstruction_inception_dissimilarity
    Ablation, Augmentation     --reconstruction l1, --augmentation none; --augmentation, --crop

Rulings, where the slides are silent or disagree with themselves
    - Networks and settings are ours. G, D_x and D_xx are SNGAN's for 32x32 (Miyato et al. 2018, Table 3), with a stage
      less or more for 16x16 and 64x64; D_xx takes both images as six channels. E mirrors G and gives a diagonal
      Gaussian; D_z has two hidden layers. 128 latents from N(0, I), 64 images, Adam's 2e-4, 0.5, 0.999; 100,000 steps.
    - Crop: padded by its own reflection, by 0.1 of the side, the slides' best by IS and FID, in whole pixels. Blur and
      contrast: BLUR and CONTRAST, below. Which network judges is not said: --classifier.
    - In figures and results z_hat is the mean of q(z|x), and batch norm uses its running averages.
Departures
    - L1 and L2 are means over pixels, not squared norms as printed; PAGAN-L1's has a weight of 10.
    - The five updates are Adam's, not plain gradient steps. x_pr and x_rec go through G together, so that one batch
      normalisation serves both.
    - Default data are drawn faces. A tenth is held out, and pictures and results show only that, but for the Inception
      score of real images. --quick crops by 0.06, one pixel, and has 1.5 times the learning rate.
"""

import json
import math
import sys
import time
import warnings
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections import defaultdict
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from common import draw_images, load_data, place_images, save_grid, to_float

NAME = "pagan"
IMAGE_SIZES = (16, 32, 64)
LEAK = 0.1  # slope of the leaky ReLU, SNGAN's
BETAS = (0.5, 0.999)
HIDDEN = 512  # units of D_z's layers
BLUR = (1 / 64, 3 / 64)  # least and greatest standard deviation, in sides of the image
CONTRAST = (0.5, 1.5)  # least and greatest factor
FREE = ("steps", "log_every", "save_every", "classifier", "samples")  # what --resume may change
FILE = "inception_v3_google-0cc3c7bd.pth"  # Inception's weights, in torchvision's cache
QUICK = {"image_size": 16, "channels": 16, "latent_dim": 64, "batch_size": 16, "crop": 0.06, "steps": 2200, "lr": 3e-4}
QUICK |= {"save_every": 1000}


# ---------------------------------------------------------------------------------------------------------- networks


def conv_widths(image_size, channels):
    """Channels of the stages from S to 8x8, and of the 4x4 map: c, 2c, 4c, 8c where S = 32."""
    if image_size not in IMAGE_SIZES:
        raise ValueError(f"image_size {image_size}: must be one of {IMAGE_SIZES}")
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
    """D_x and D_xx: one or two images [N, 3, S, S] in [-1, 1] -> logits [N, 1], positive for real ones."""

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
    """D_z: latents [N, Z] -> logits [N, 1], positive for those of the prior."""

    def __init__(self, latent_dim):
        layers = [nn.Linear(latent_dim, HIDDEN), nn.LeakyReLU(LEAK), nn.Linear(HIDDEN, HIDDEN), nn.LeakyReLU(LEAK)]
        super().__init__(*layers, nn.Linear(HIDDEN, 1))


def build_networks(reconstruction, image_size, channels, latent_dim):
    """G, E, D_x, D_z and, for "pair", not for "l1", D_xx, in training mode. ValueError for a size they cannot have."""
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


def blur(x, u, p=None):
    """Gaussian blur. x: [N, 3, S, S]. u: [N, 2] in [0, 1), the first for the standard deviation. [N, 3, S, S]."""
    count, channels, size, _ = x.shape
    radius = math.ceil(3 * BLUR[1] * size)
    sigma = size * (BLUR[0] + (BLUR[1] - BLUR[0]) * u[:, :1])
    kernels = (-((torch.arange(-radius, radius + 1, device=x.device) / sigma) ** 2) / 2).softmax(dim=1)  # (N, 2r + 1)
    kernels = kernels.repeat_interleave(channels, 0)[:, None, None]  # (3N, 1, 1, 2r + 1)
    planes = F.pad(x, (radius,) * 4, mode="reflect").flatten(0, 1)[None]  # (1, 3N, S + 2r, S + 2r)
    planes = F.conv2d(planes, kernels, groups=count * channels)
    return F.conv2d(planes, kernels.mT, groups=count * channels).view_as(x)


def contrast(x, u, p=None):
    """Contrast: deviations from each image's mean grey times a factor, clipped. x: [N, 3, S, S], u: [N, 2]."""
    mean = x.mean((1, 2, 3), keepdim=True)
    factor = CONTRAST[0] + (CONTRAST[1] - CONTRAST[0]) * u[:, :1, None, None]
    return (mean + factor * (x - mean)).clamp(-1, 1)


AUGMENTATIONS = {"crop": crop, "blur": blur, "contrast": contrast, "none": lambda x, u, p: x}  # a(x) ~ r(y|x)


# ------------------------------------------------------------------------------------------------------------ losses


def reparameterise(mean, log_variance, epsilon):
    """z_hat ~ q(z|x): mean + epsilon * sigma. All [N, Z]."""
    return mean + epsilon * (log_variance / 2).exp()


def minus_log(d):
    """-mean log D of D's logits d [N, 1]; of -d it is -mean log(1 - D)."""
    return F.softplus(-d).mean()


def pagan_losses(nets, x, x_aug, z, epsilon, l1_weight=None):
    """PAGAN, Algorithm 1: images x and x_aug ~ r(y|x) [N, 3, S, S] in [-1, 1], z [M, Z], epsilon [N, Z] ~ N(0, I).

    Returns {name: scalar}: L_d_x, L_d_z, L_d_xx, L_g, L_e for D_x, D_z, D_xx, G, E to minimise.
    """
    # What goes through a network goes at once, for speed; so x_pr and x_rec share G's batch normalisation.
    z_hat = reparameterise(*nets["E"](x).chunk(2, dim=1), epsilon)
    x_pr, x_rec = nets["G"](torch.cat([z, z_hat])).split([len(z), len(x)])
    d_x, d_x_pr = nets["D_x"](torch.cat([x, x_pr])).split([len(x), len(z)])
    d_z, d_z_hat = nets["D_z"](torch.cat([z, z_hat])).split([len(z), len(x)])
    d_xx_aug, d_xx_rec = nets["D_xx"](torch.cat([x, x]), torch.cat([x_aug, x_rec])).split([len(x), len(x)])
    L_d_x = minus_log(d_x) + minus_log(-d_x_pr)
    L_d_z = minus_log(d_z) + minus_log(-d_z_hat)
    L_d_xx = minus_log(d_xx_aug) + minus_log(-d_xx_rec)
    L_g = minus_log(d_x_pr) + minus_log(d_xx_rec)
    L_e = minus_log(d_z_hat) + minus_log(d_xx_rec)
    return {"L_d_x": L_d_x, "L_d_z": L_d_z, "L_d_xx": L_d_xx, "L_g": L_g, "L_e": L_e}


def pagan_l1_losses(nets, x, x_aug, z, epsilon, l1_weight):
    """PAGAN-L1 of the ablation study: l1_weight |x - x_rec|_1 for -log D(x, x_rec). Otherwise as pagan_losses."""
    z_hat = reparameterise(*nets["E"](x).chunk(2, dim=1), epsilon)
    x_pr, x_rec = nets["G"](torch.cat([z, z_hat])).split([len(z), len(x)])
    d_x, d_x_pr = nets["D_x"](torch.cat([x, x_pr])).split([len(x), len(z)])
    d_z, d_z_hat = nets["D_z"](torch.cat([z, z_hat])).split([len(z), len(x)])
    L_d_x = minus_log(d_x) + minus_log(-d_x_pr)
    L_d_z = minus_log(d_z) + minus_log(-d_z_hat)
    L1 = F.l1_loss(x_rec, x)
    L_g = minus_log(d_x_pr) + l1_weight * L1
    L_e = minus_log(d_z_hat) + l1_weight * L1
    return {"L_d_x": L_d_x, "L_d_z": L_d_z, "L_g": L_g, "L_e": L_e, "L1": L1}


LOSSES = {"pair": pagan_losses, "l1": pagan_l1_losses}


# ---------------------------------------------------------------------------------------------------------- training


def build_optimizer(nets, lr):
    """One Adam for all networks, since they all take their step at the same time."""
    return torch.optim.Adam(nets.parameters(), lr, BETAS, fused=True, capturable=True)


def draw_batch(images, latent_dim, augmentation, p):
    """x: the images (uint8 [N, 3, S, S]) in [-1, 1]; a(x); z and epsilon ~ N(0, I): [N, Z]."""
    x = to_float(images)
    x_aug = AUGMENTATIONS[augmentation](x, torch.rand(len(x), 2, device=x.device), p)
    return x, x_aug, *torch.randn(2, len(x), latent_dim, device=x.device)


def train_step(nets, optimizer, reconstruction, l1_weight, x, x_aug, z, epsilon):
    """One update of every network, all at the same point. Returns the losses before it, detached: see pagan_losses."""
    losses = LOSSES[reconstruction](nets, x, x_aug, z, epsilon, l1_weight)
    optimizer.zero_grad()
    # A loss gives gradients to its `inputs` alone, where others detach the fakes and make them a second time.
    losses["L_d_x"].backward(inputs=list(nets["D_x"].parameters()), retain_graph=True)  # psi
    losses["L_d_z"].backward(inputs=list(nets["D_z"].parameters()), retain_graph=True)  # zeta
    if "D_xx" in nets:
        losses["L_d_xx"].backward(inputs=list(nets["D_xx"].parameters()), retain_graph=True)  # tau
    losses["L_g"].backward(inputs=list(nets["G"].parameters()), retain_graph=True)  # theta
    losses["L_e"].backward(inputs=list(nets["E"].parameters()))  # phi
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


@torch.no_grad()
def save_figures(nets, data, z, out, step, p, last=True):
    """samples_<step>.png, of 100 of the latents z [N, Z], reconstructions_<step>.png, of up to 40 held-out images, and
    if last figure_augmentations.png, original, blur, contrast and crop by p."""
    nets.eval()
    x = to_float(data.heldout[:40].to(z.device))
    save_grid(out / f"samples_{step}.png", nets["G"](z[:100]))
    save_grid(out / f"reconstructions_{step}.png", x, nets["G"](nets["E"](x).chunk(2, dim=1)[0]), columns=5)
    if last:
        x, u = x[:10], torch.rand(len(x[:10]), 2, generator=torch.Generator().manual_seed(0)).to(z.device)
        captions = [["original"], ["blur"], ["contrast"], ["pad + crop"]]
        augmented = blur(x, u), contrast(x, u), crop(x, u, p)
        save_grid(out / "figure_augmentations.png", x, *augmented, columns=2, captions=captions)
    nets.train()


def sample_diversity(samples, images):
    """Mean distance of samples over that of images, [N, 3, S, S]: 0 in total collapse, None if all images are one."""
    a, b = (torch.pdist(x.flatten(1)).mean().item() for x in (samples, images))
    return a / b if b > 0 else None


def reconstruction_inception_dissimilarity(log_p_x, log_p_rec):
    """RID: exp of the mean KL(p(y|x) || p(y|G(E(x)))), at least 1. log p(y|x), log p(y|G(E(x))): [N, classes]."""
    kl = F.kl_div(log_p_rec, log_p_x, reduction="batchmean", log_target=True)  # torch has the second argument's first
    return kl.double().exp().item()


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


def load_classifier(name, image_size, device):
    """p(y|x) by --classifier, None for none: images [N, 3, S, S] in [-1, 1] -> logits [N, C] and features [N, F].

    inception: torchvision's Inception v3, from its cache or fetched by it; a file: TorchScript. Raises what they raise
    where there is neither, and ValueError where the file's answers are no such tensors.
    """
    if name == "none":
        return None
    if name == "inception":
        net = torchvision.models.inception_v3(weights="IMAGENET1K_V1", transform_input=False).eval().to(device)
        to_logits, net.fc = net.fc, nn.Identity()

        def classify(x):
            """Logits [N, 1000] and features [N, 2048]."""
            features = net(F.interpolate(x, (299, 299), mode="bilinear"))
            return to_logits(features), features

        return classify
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch would have another format
        classifier = torch.jit.load(name, map_location=device).eval()
    answers = classifier(torch.zeros(2, 3, image_size, image_size, device=device))
    if [(2, 2)] * 2 != [(len(a), a.ndim) for a in answers] or answers[1].shape[1] == 1:
        raise ValueError(f"it does not take images [N, 3, {image_size}, {image_size}] to (logits, features)")
    return classifier


@torch.no_grad()
def measure(nets, data, z, augmentation, p, classifier=None, count=0):
    """The figures of merit, on held-out images and latents z [N, Z]; some only with a classifier.

    augmentation, p: those of the AUG row; l1_of_crop and l2_of_crop are of crop with p in any case. classifier: see
    load_classifier; count: how many samples it judges, and at most how many images to train on.
    """
    nets.eval()
    G, device, rng = nets["G"], z.device, torch.Generator().manual_seed(1)
    mean_image = to_float(sum(part.sum(0) for part in data.train.split(1000)) / len(data.train)).to(device)
    l1, l2, answers = defaultdict(float), defaultdict(float), defaultdict(list)
    for x in map(to_float, data.heldout.to(device).split(100)):
        u, share = torch.rand(len(x), 2, generator=rng).to(device), len(x) / len(data.heldout)
        x_rec = G(nets["E"](x).chunk(2, dim=1)[0])
        images = {"x": x, "rec": x_rec, "aug": AUGMENTATIONS[augmentation](x, u, p)}
        for name in images if classifier else ():
            answers[name].append(classifier(images[name]))
        images |= {"blur": blur(x, u), "crop": crop(x, u, p), "mean_image": mean_image.expand_as(x)}
        for name, y in images.items():
            l1[name] += share * F.l1_loss(y, x).item()
            l2[name] += share * F.mse_loss(y, x).item()
    results = {"heldout_l1": l1["rec"], "heldout_l1_of_mean_image": l1["mean_image"]}
    results |= {f"l1_of_{name}": l1[name] for name in ("blur", "crop")}
    results |= {f"l2_of_{name}": l2[name] for name in ("blur", "crop")}
    results |= {"rmse_255": 127.5 * l2["rec"] ** 0.5, "rmse_255_of_augmentation": 127.5 * l2["aug"] ** 0.5}
    results["sample_diversity"] = sample_diversity(G(z), to_float(data.heldout[: len(z)].to(device)))
    if classifier:
        noise = torch.randn(count, z.shape[1], generator=rng)
        answers["pr"] = [classifier(G(part.to(device))) for part in noise.split(100)]
        answers["train"] = [classifier(to_float(part.to(device))) for part in data.train[:count].split(100)]
        log_p = {name: torch.cat([part[0] for part in parts]).log_softmax(dim=1) for name, parts in answers.items()}
        features = {name: torch.cat([part[1] for part in parts]) for name, parts in answers.items()}
        results["fid"] = frechet_inception_distance(features["x"], features["pr"])
        results["inception_score"], results["inception_score_std"] = inception_score(log_p["pr"].exp())
        results["inception_score_of_real"], _ = inception_score(log_p["train"].exp())
        results["rid"] = reconstruction_inception_dissimilarity(log_p["x"], log_p["rec"])
        results["rid_of_augmentation"] = reconstruction_inception_dissimilarity(log_p["x"], log_p["aug"])
    return results


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
    add("--reconstruction", choices=LOSSES, default="pair", help="PAGAN, or PAGAN-L1 of the ablation study")
    augmentations = "a(x), for the pair loss; none: PAGAN-NOAUG of the ablation study"
    add("--augmentation", choices=AUGMENTATIONS, default="crop", help=augmentations)
    add("--crop", type=float, default=0.1, help="padding in sides of the image; the slides try 0, 0.05, 0.1, 0.15, 0.2")
    add("--l1-weight", type=float, default=10.0, help="of the L1 loss of PAGAN-L1")
    files = "inception, none or a TorchScript file, as tests/make_classifier.py makes, of images to (logits, features)"
    add("--classifier", default="none", help=files)
    add("--samples", type=int, default=10_000, help="generated and, at most, training images that are judged")
    add("--data", default="faces", help="folder of images, searched recursively, or faces (drawn), cifar10, mnist")
    add("--out", default=f"runs/{NAME}", help="folder for pictures, log.csv, results.json, checkpoint.pt")
    add("--resume", action="store_true", help="go on with the run in --out, with its settings; --steps may be larger")
    add("--quick", action="store_true", help=f"faces within three minutes on two CPU cores: {quick}")
    add("--steps", type=int, default=100_000, help="updates of every network")
    add("--batch-size", type=int, default=64, help="images a step")
    add("--image-size", type=int, choices=IMAGE_SIZES, default=32, help="side of the images in pixels (CIFAR-10's)")
    add("--latent-dim", type=int, default=128, help="dimensions Z of the latents")
    add("--channels", type=int, default=64, help="width of the layers next to the image")
    add("--lr", type=float, default=2e-4, help="learning rate")
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
    elif args.quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        least = {int: 10 if name == "samples" else 0 if name == "seed" else 1, float: 0}.get(type(value))
        if least is not None and not least <= value <= 1e12:
            fail(f"--{name.replace('_', '-')} cannot be {value}: it must be at least {least} and at most 1e12")
    if args.crop > 0.5 or 0 < args.crop * args.image_size <= 0.5:
        fail(f"--crop cannot be {args.crop}: it must be 0, or from more than half a pixel to half of the side")
    for name, value in checkpoint[NAME].items() if checkpoint else ():
        if getattr(args, name) != value and name not in FREE:
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
        option = f"--data {args.data}"
        data = load_data(args.data, args.image_size, args.batch_size)
        option = f"--classifier {args.classifier}"
        option += f", without {FILE} in {torch.hub.get_dir()}/checkpoints," if args.classifier == "inception" else ""
        classifier = load_classifier(args.classifier, args.image_size, device)
        option = f"--out {out}"
        out.mkdir(parents=True, exist_ok=True)
    except Exception as error:  # of many kinds
        fail(f"{option} cannot be used: {error}")

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # TF32
    nets = build_networks(args.reconstruction, args.image_size, args.channels, args.latent_dim).to(device)
    optimizer = build_optimizer(nets, args.lr)
    z_shown = torch.randn(256, args.latent_dim, generator=torch.Generator().manual_seed(0)).to(device)
    config = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "device", "graph")}
    begin, log = 0, ""
    if checkpoint:
        begin, log = checkpoint["step"], checkpoint["log"]
        nets.load_state_dict(checkpoint["networks"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["random"][0])
        torch.cuda.set_rng_state_all(checkpoint["random"][1 : 1 + torch.cuda.device_count()])
    kind = f"{args.reconstruction}, {args.augmentation} (crop: {round(args.crop * args.image_size)} pixels),"
    print(f"{kind} on {len(data.train)} images of {args.data}, {device}, step {begin}, in {out}/")

    images = place_images(data.train, device)
    step_on = partial(train_step, nets, optimizer, args.reconstruction, args.l1_weight)
    start = time.perf_counter()
    for step in range(begin + 1, args.steps + 1):
        drawn = draw_images(images, args.batch_size, device)
        batch = draw_batch(drawn, args.latent_dim, args.augmentation, args.crop)
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
            save_figures(nets, data, z_shown, out, step, args.crop, last=False)
            state = {NAME: config, "networks": nets.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step, "log": log, "random": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]}
            torch.save(state, out / "checkpoint.tmp")
            (out / "checkpoint.tmp").replace(out / "checkpoint.pt")  # so it is whole at any moment

    save_figures(nets, data, z_shown, out, args.steps, args.crop)
    results = measure(nets, data, z_shown, args.augmentation, args.crop, classifier, args.samples)
    results |= {"steps": args.steps, "config": config}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    for name, value in results.items():
        if isinstance(value, float):
            print(f"{name:26}{value:10.3f}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped: --resume goes on from the last checkpoint, if there is one", status=130)
