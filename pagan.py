# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy", "pillow>=10.1"]
# ///
"""Pairwise augmented GANs with adversarial reconstruction loss (Alanov, Kochurov, Yashkov, Vetrov, 2018).

https://arxiv.org/abs/1810.04920. This implements the authors' slides of 5 December 2018.
A generator G maps latents to images, an encoder E images to latents; E(x) is a sample of a Gaussian q(z|x). What makes
G(E(x)) like x is not a distance of pixels but a discriminator on pairs, D_xx. Its real pairs are (x, a(x)), where a(x)
is a random augmentation of x, its fake ones (x, G(E(x))). So G(E(x)) must show what x shows, but it need not be at the
same pixels. D_x matches G's samples to the images. D_z matches E's latents to the prior.

    python pagan.py --quick                             # cartoon faces within three minutes on two CPU cores
    python pagan.py --data photos/ --out runs/photos    # a folder of images
    python pagan.py --data cifar10 --reconstruction l1 --classifier inception --out runs/l1    # an ablation

slides -> code
    Algorithm 1                x, z, x_aug: make_inputs; z_hat ~ q(z|x), x_pr = G(z), x_rec = G(z_hat): pagan_losses;
                               theta of G, phi of E, psi of D_x, zeta of D_z, tau of D_xx: train_step
    PAGAN Diagram              Generator, Encoder, ImageDiscriminator (D_x of x, D_xx of x, y), LatentDiscriminator
    GAN                        D_x: L_d_x, and the first term of L_g, in pagan_losses
    Discriminator on Pairs     D_xx: L_d_xx, and the second terms of L_g and L_e, in pagan_losses
    Matching Encoder to Prior  D_z: L_d_z, and the first term of L_e, in pagan_losses
    Conditional Distributions  q(z|x): reparameterise; r(y|x): AUGMENTATIONS
    Augmentation Function      blur, contrast, crop; its figure: save_figures; its table: --augmentation, --crop
    Reconstruction Loss        L1: pagan_l1_losses, --reconstruction l1; L2 and perceptual losses: left out
    Drawbacks (table)          L1, L2 between x and a(x): measure's l1_of_blur, l2_of_crop, ...; perceptual: left out
    Samples, Reconstructions   save_figures
    Inception Score, FID, RID  inception_score, frechet_inception_distance, reconstruction_inception_dissimilarity
    Ablation Study             --reconstruction l1, --augmentation none. Other models of the tables: left out

Rulings, where the slides are silent or disagree with themselves
    - They name no networks. G, D_x and D_xx are SNGAN's for 32x32 (Miyato et al. 2018, Table 3), with a stage less or
      more for 16x16 and 64x64. G's dense layer has batch norm, too, as in public code of SNGAN (chainer-gan-lib).
    - D_xx takes both images as six channels, E mirrors G, D_z has two hidden layers: ours.
    - They name no settings. We take Z = 128, N(0, I), batches of 64 images, Adam with 2e-4, 0.5, 0.999, 100,000 steps.
    - Three names are undefined. We read: PAGAN-L1 has L1 in place of D_xx; PAGAN-NOAUG has a(x) = x; AUG is not a
      model but a(x): its row in the table of RID compares x with a(x), where a model's row compares x with G(E(x)).
    - Crop pads by reflection. The padding is 0.1 of the side (the slides' best by IS and FID), rounded to pixels.
    - They give no strengths of blur and contrast: ours are BLUR and CONTRAST, below.
    - In figures and results z_hat is the mean of q(z|x), and batch norm uses its running averages.
Departures
    - The slides' D is in [0, 1]; ours gives logits. Their p(x|z) is a distribution; ours is the point G(z).
    - The slides print L1 and L2 as squared norms; ours are means over pixels. PAGAN-L1's L1 has weight 10.
    - The five updates are Adam's, not plain gradient steps. x_pr and x_rec share one batch normalisation in G.
"""

import json
import math
import sys
import time
import warnings
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from common import DataError, draw_images, load_data, place_images, save_grid, to_float

NAME = "pagan"
IMAGE_SIZES = {16: (1, 2, 4), 32: (1, 2, 4, 8), 64: (1, 2, 4, 8, 16)}  # side: widths as multiples of --channels
LEAK = 0.1  # slope of the leaky ReLU, SNGAN's
BETAS = (0.5, 0.999)
HIDDEN = 512  # units of D_z's layers
L1_WEIGHT = 10.0  # of the L1 loss of PAGAN-L1
BLUR = (1 / 64, 3 / 64)  # least and greatest standard deviation, as a fraction of the image's side
CONTRAST = (0.5, 1.5)  # least and greatest factor
EAGER_STEPS = 3  # run before a CUDA graph is recorded, so that libraries have chosen algorithms and Adam has moments
AT_LEAST_1 = ("steps", "batch_size", "latent_dim", "channels", "log_every", "save_every", "samples")  # options
AT_LEAST_0 = ("lr", "crop")
MAY_CHANGE = ("data", "steps", "log_every", "save_every", "classifier", "samples")  # --resume lets them differ
QUICK = dict(image_size=16, channels=16, latent_dim=64, batch_size=16, crop=0.06, steps=2200, lr=3e-4, save_every=1000)


# ---------------------------------------------------------------------------------------------------------- networks


class Generator(nn.Sequential):
    """G: latents z [N, Z] -> images [N, 3, S, S] in [-1, 1]."""

    def __init__(self, image_size, channels, latent_dim):
        widths = [channels * w for w in reversed(IMAGE_SIZES[image_size])]
        layers = [nn.Linear(latent_dim, widths[0] * 4 * 4), nn.Unflatten(1, (widths[0], 4, 4))]
        layers += [nn.BatchNorm2d(widths[0]), nn.ReLU()]
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [nn.ConvTranspose2d(c_in, c_out, 4, 2, 1), nn.BatchNorm2d(c_out), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(channels, 3, 3, 1, 1), nn.Tanh())


class Encoder(nn.Sequential):
    """E, or q(z|x): images x [N, 3, S, S] in [-1, 1] -> means and log-variances [N, 2 Z]."""

    def __init__(self, image_size, channels, latent_dim):
        widths = [channels * w for w in IMAGE_SIZES[image_size]]
        layers = [nn.Conv2d(3, channels, 3, 1, 1), nn.BatchNorm2d(channels), nn.LeakyReLU(LEAK)]
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [nn.Conv2d(c_in, c_out, 4, 2, 1), nn.BatchNorm2d(c_out), nn.LeakyReLU(LEAK)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(widths[-1] * 4 * 4, 2 * latent_dim))


class ImageDiscriminator(nn.Sequential):
    """Images [N, 3, S, S] in [-1, 1] -> logits [N, 1]: D_x(x) > 0 if x is real; D_xx(x, y) > 0 if y is a(x)."""

    def __init__(self, image_size, channels, image_count):
        widths = [channels * w for w in IMAGE_SIZES[image_size]]
        layers = [spectral_norm(nn.Conv2d(3 * image_count, channels, 3, 1, 1)), nn.LeakyReLU(LEAK)]
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [spectral_norm(nn.Conv2d(c_in, c_in, 4, 2, 1)), nn.LeakyReLU(LEAK)]
            layers += [spectral_norm(nn.Conv2d(c_in, c_out, 3, 1, 1)), nn.LeakyReLU(LEAK)]
        super().__init__(*layers, nn.Flatten(), spectral_norm(nn.Linear(widths[-1] * 4 * 4, 1)))

    def forward(self, *images):
        return super().forward(torch.cat(images, dim=1))


class LatentDiscriminator(nn.Sequential):
    """D_z: latents [N, Z] -> logits [N, 1], positive for those of the prior."""

    def __init__(self, latent_dim):
        layers = [nn.Linear(latent_dim, HIDDEN), nn.LeakyReLU(LEAK), nn.Linear(HIDDEN, HIDDEN), nn.LeakyReLU(LEAK)]
        super().__init__(*layers, nn.Linear(HIDDEN, 1))


def build_networks(reconstruction, image_size, channels, latent_dim):
    """G, E, D_x, D_z and, if the reconstruction is "pair", D_xx, in training mode."""
    if reconstruction not in LOSSES or image_size not in IMAGE_SIZES:
        raise ValueError(f"{reconstruction}, size {image_size}: there are {list(LOSSES)} and {list(IMAGE_SIZES)}")
    nets = nn.ModuleDict({"G": Generator(image_size, channels, latent_dim)})
    nets["E"] = Encoder(image_size, channels, latent_dim)
    nets["D_x"] = ImageDiscriminator(image_size, channels, image_count=1)
    nets["D_z"] = LatentDiscriminator(latent_dim)
    if reconstruction == "pair":
        nets["D_xx"] = ImageDiscriminator(image_size, channels, image_count=2)
    return nets


# ----------------------------------------------------------------------------------------------------- augmentations


# All take images x, random numbers u [N, 2] and crop's padding p. Blur and contrast use u[:, 0], and no p.
def crop(x, u, p):
    """Pad + crop: pads each side by p * S pixels of reflection, then cuts S x S pixels out at a random place.
    x: [N, 3, S, S]; ValueError if not square. u: [N, 2] in [0, 1), where to cut, down and across. -> [N, 3, S, S]."""
    size = x.shape[-1]
    if x.shape[-2] != size:
        raise ValueError(f"images [N, 3, {x.shape[-2]}, {size}]: they must be square")
    pad = round(p * size)
    offsets = (u * (2 * pad + 1)).long()  # from 0 to twice the padding
    pixels = torch.arange(size, device=x.device)
    rows = offsets[:, 0, None, None] + pixels[:, None]  # (N, S, 1): those of image n to keep
    columns = offsets[:, 1, None, None] + pixels  # (N, 1, S)
    n = torch.arange(len(x), device=x.device)[:, None, None]  # (N, 1, 1); indexing below gives (N, S, S, 3)
    return F.pad(x, (pad,) * 4, mode="reflect").movedim(1, -1)[n, rows, columns].movedim(-1, 1).contiguous()


def blur(x, u, p=None):
    """Gaussian blur. x: [N, 3, S, S]. u: [N, 2] in [0, 1), the first for the deviation. -> [N, 3, S, S]."""
    count, channels, size, _ = x.shape
    sigma = size * (BLUR[0] + (BLUR[1] - BLUR[0]) * u[:, :1])  # (N, 1)
    radius = math.ceil(3 * BLUR[1] * size)
    distance = torch.arange(-radius, radius + 1, device=x.device)
    kernel = (-((distance / sigma) ** 2) / 2).softmax(dim=1)  # (N, 2r + 1): softmax is exp() made to sum to 1
    kernels = kernel.repeat_interleave(channels, 0)[:, None, None]  # (3N, 1, 1, 2r + 1): one for each plane
    planes = F.pad(x, (radius,) * 4, mode="reflect").flatten(0, 1)[None]  # (1, 3N, S + 2r, S + 2r)
    across = F.conv2d(planes, kernels, groups=count * channels)  # each plane by its own kernel
    return F.conv2d(across, kernels.mT, groups=count * channels).view_as(x)  # and down


def contrast(x, u, p=None):
    """Contrast: scales each image's deviation from its mean, then clips the image. x: [N, 3, S, S], u: [N, 2]."""
    mean = x.mean((1, 2, 3), keepdim=True)
    factor = CONTRAST[0] + (CONTRAST[1] - CONTRAST[0]) * u[:, :1, None, None]
    return (mean + factor * (x - mean)).clamp(-1, 1)


AUGMENTATIONS = {"crop": crop, "blur": blur, "contrast": contrast, "none": lambda x, u, p: x}  # a(x) ~ r(y|x)


# ------------------------------------------------------------------------------------------------------------ losses


def reparameterise(mean, log_variance, epsilon):
    """z_hat ~ q(z|x): mean + epsilon * sigma. All [N, Z]."""
    return mean + epsilon * (log_variance / 2).exp()


def minus_log(d):
    """-mean log D, of D's logits d [N, 1]."""
    return F.softplus(-d).mean()


def minus_log_not(d):
    """-mean log(1 - D), of D's logits d [N, 1]."""
    return F.softplus(d).mean()


def pagan_losses(nets, x, x_aug, z, epsilon):
    """PAGAN, Algorithm 1: images x and x_aug ~ r(y|x) [N, 3, S, S] in [-1, 1], z [M, Z], epsilon [N, Z] ~ N(0, I).
    Returns {name: scalar}: L_d_x, L_d_z, L_d_xx, L_g, L_e for D_x, D_z, D_xx, G, E to minimise."""
    # Each network runs once, on all its inputs, for speed; so x_pr and x_rec share G's batch normalisation.
    mean, log_variance = nets["E"](x).chunk(2, dim=1)
    z_hat = reparameterise(mean, log_variance, epsilon)
    x_pr, x_rec = nets["G"](torch.cat([z, z_hat])).split([len(z), len(x)])
    d_x, d_x_pr = nets["D_x"](torch.cat([x, x_pr])).split([len(x), len(z)])
    d_z, d_z_hat = nets["D_z"](torch.cat([z, z_hat])).split([len(z), len(x)])
    pairs = torch.cat([x, x]), torch.cat([x_aug, x_rec])  # (x, x_aug), then (x, x_rec)
    d_xx_aug, d_xx_rec = nets["D_xx"](*pairs).split([len(x), len(x)])
    L_d_x = minus_log(d_x) + minus_log_not(d_x_pr)
    L_d_z = minus_log(d_z) + minus_log_not(d_z_hat)
    L_d_xx = minus_log(d_xx_aug) + minus_log_not(d_xx_rec)
    L_g = minus_log(d_x_pr) + minus_log(d_xx_rec)
    L_e = minus_log(d_z_hat) + minus_log(d_xx_rec)
    return {"L_d_x": L_d_x, "L_d_z": L_d_z, "L_d_xx": L_d_xx, "L_g": L_g, "L_e": L_e}


def pagan_l1_losses(nets, x, x_aug, z, epsilon):
    """PAGAN-L1: 10 |x - x_rec| in place of -log D(x, x_rec). x_aug is not used. Otherwise as pagan_losses."""
    mean, log_variance = nets["E"](x).chunk(2, dim=1)
    z_hat = reparameterise(mean, log_variance, epsilon)
    x_pr, x_rec = nets["G"](torch.cat([z, z_hat])).split([len(z), len(x)])
    d_x, d_x_pr = nets["D_x"](torch.cat([x, x_pr])).split([len(x), len(z)])
    d_z, d_z_hat = nets["D_z"](torch.cat([z, z_hat])).split([len(z), len(x)])
    L_d_x = minus_log(d_x) + minus_log_not(d_x_pr)
    L_d_z = minus_log(d_z) + minus_log_not(d_z_hat)
    L1 = F.l1_loss(x_rec, x)
    L_g = minus_log(d_x_pr) + L1_WEIGHT * L1
    L_e = minus_log(d_z_hat) + L1_WEIGHT * L1
    return {"L_d_x": L_d_x, "L_d_z": L_d_z, "L_g": L_g, "L_e": L_e, "L1": L1}


LOSSES = {"pair": pagan_losses, "l1": pagan_l1_losses}


# ---------------------------------------------------------------------------------------------------------- training


def build_optimizer(nets, lr):
    """One Adam for all networks, since they all take their step at the same time. capturable: for CUDA graphs."""
    return torch.optim.Adam(nets.parameters(), lr, BETAS, fused=True, capturable=True)


def make_inputs(images, latent_dim, augmentation, p):
    """uint8 images [N, 3, S, S] -> x: the same in [-1, 1]; x_aug = a(x); z and epsilon ~ N(0, I): [N, Z]."""
    x = to_float(images)
    x_aug = AUGMENTATIONS[augmentation](x, torch.rand(len(x), 2, device=x.device), p)
    z, epsilon = torch.randn(2, len(x), latent_dim, device=x.device)  # unpacked: two of [N, Z]
    return x, x_aug, z, epsilon


def trainable(optimizer, *networks):
    """The parameters that require gradients, for backward's `inputs`. ValueError if the optimizer lacks one."""
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) not in updated for p in parameters):
        raise ValueError("the optimizer does not have all parameters of the networks")
    return parameters


def train_step(nets, optimizer, reconstruction, x, x_aug, z, epsilon):
    """Update every network, by gradients all taken before any network moves. Returns the losses: see LOSSES."""
    losses = LOSSES[reconstruction](nets, x, x_aug, z, epsilon)
    optimizer.zero_grad()
    # Each backward fills the gradients of its `inputs` alone. So all losses share one forward pass, without detach.
    losses["L_d_x"].backward(inputs=trainable(optimizer, nets["D_x"]), retain_graph=True)  # psi
    losses["L_d_z"].backward(inputs=trainable(optimizer, nets["D_z"]), retain_graph=True)  # zeta
    if "D_xx" in nets:
        losses["L_d_xx"].backward(inputs=trainable(optimizer, nets["D_xx"]), retain_graph=True)  # tau
    losses["L_g"].backward(inputs=trainable(optimizer, nets["G"]), retain_graph=True)  # theta
    losses["L_e"].backward(inputs=trainable(optimizer, nets["E"]))  # phi
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


def reconstruct(nets, x):
    """G of the mean of q(z|x): images x [N, 3, S, S] in [-1, 1] -> [N, 3, S, S]."""
    mean, log_variance = nets["E"](x).chunk(2, dim=1)
    return nets["G"](mean)


@torch.no_grad()
def save_figures(nets, data, z, out, step, p):
    """samples_<step>.png: G of 100 of the latents z [N, Z]; reconstructions_<step>.png: up to 40 held-out images;
    figure_augmentations.png: originals, then their blur, contrast and crop by p."""
    was_training = nets.training
    nets.eval()
    x = to_float(data.heldout[:40]).to(z.device)
    save_grid(out / f"samples_{step}.png", nets["G"](z[:100]))
    save_grid(out / f"reconstructions_{step}.png", x, reconstruct(nets, x), groups_per_row=5)
    few = x[:10]
    u = torch.rand(len(few), 2, generator=torch.Generator().manual_seed(0)).to(z.device)
    captions = [["original"], ["blur"], ["contrast"], ["pad + crop"]]  # for the first image of each batch below
    augmented = blur(few, u), contrast(few, u), crop(few, u, p)
    save_grid(out / "figure_augmentations.png", few, *augmented, groups_per_row=2, captions=captions)
    nets.train(was_training)


def sample_diversity(samples, images):
    """Mean distance of two samples, divided by that of two images, both [N, 3, S, S]: 0 in total collapse."""
    return (torch.pdist(samples.flatten(1)).mean() / torch.pdist(images.flatten(1)).mean()).item()


def reconstruction_inception_dissimilarity(log_p_x, log_p_rec):
    """RID: exp of the mean KL(p(y|x) || p(y|G(E(x)))), at least 1. log p(y|x), log p(y|G(E(x))): [N, classes]."""
    kl = F.kl_div(log_p_rec, log_p_x, reduction="batchmean", log_target=True)  # KL(second || first)
    return kl.double().exp().item()


def inception_score(probabilities, splits=10):
    """IS: exp(E KL(p(y|x) || p(y))), from 1 to C: mean and standard deviation over the splits (Salimans et al. 2016).
    probabilities: p(y|x) of images x, [N, C], N >= splits."""
    scores = []
    for p in probabilities.tensor_split(splits):
        kl = (torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0))).sum(1)  # xlogy(p, q): p log q
        scores.append(kl.mean().exp())
    return torch.stack(scores).mean().item(), torch.stack(scores).std(correction=0).item()


def frechet_inception_distance(features_a, features_b):
    """FID: |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), of means m and covariances C (Heusel et al. 2017).
    features: [N, F], [M, F], N, M > 1. tr (C_a C_b)^(1/2) = tr S^(1/2), where S = C_a^(1/2) C_b C_a^(1/2) is symmetric.
    Where N < F, rounding makes some eigenvalues of C_a and S negative: these are set to 0."""
    features_a, features_b = features_a.double(), features_b.double()
    cov_a, cov_b = features_a.T.cov(), features_b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    root_trace = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    difference = features_a.mean(0) - features_b.mean(0)
    return (difference.square().sum() + cov_a.trace() + cov_b.trace() - 2 * root_trace).item()


def load_classifier(name, image_size, device):
    """The classifier of --classifier: images [N, 3, S, S] in [-1, 1] -> (logits [N, C], features [N, F]).
    `none`: None; `inception`: torchvision's Inception v3, cached or downloaded; else `name` is a TorchScript file.
    DataError if it cannot be had, or does not give such tensors."""
    if name == "none":
        return None
    if name == "inception":
        try:
            net = torchvision.models.inception_v3(weights="IMAGENET1K_V1", transform_input=False)  # so it takes [-1, 1]
        except (OSError, RuntimeError) as error:  # no network, or a damaged file
            file = f"{torch.hub.get_dir()}/checkpoints/inception_v3_google-0cc3c7bd.pth"
            raise DataError(f"--classifier inception needs {file}, which cannot be had: {error}") from error
        net.eval().to(device)
        to_logits = net.fc
        net.fc = nn.Identity()  # so that the network gives its features

        def classify(x):
            features = net(F.interpolate(x, (299, 299), mode="bilinear"))
            return to_logits(features), features  # [N, 1000], [N, 2048]

        return classify
    problem = f"--classifier {name} is no TorchScript taking [N, 3, {image_size}, {image_size}] to (logits, features)"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated
            classifier = torch.jit.load(name, map_location=device).eval()
        logits, features = classifier(torch.zeros(2, 3, image_size, image_size, device=device))
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{problem}: {error}") from error
    if logits.ndim != 2 or features.ndim != 2 or len(logits) != 2 or len(features) != 2 or features.shape[1] < 2:
        raise DataError(problem)
    return classifier


def judge(classifier, images):
    """log p(y|x) [N, C] and features [N, F] of images [N, 3, S, S], by load_classifier's network."""
    logits, features = zip(*(classifier(part) for part in images.split(100)))
    return torch.cat(logits).log_softmax(dim=1), torch.cat(features)


@torch.no_grad()
def measure(nets, data, z, augmentation, p, classifier, count):
    """On up to 1,000 held-out x: L1 and RMSE of G(E(x)); L1 and L2 of blur and crop. Diversity of G(z), z [N, Z].
    With a classifier: IS, FID of count samples; RID of G(E(x)), for up to count held-out x. To compare: IS, FID of up
    to count training images; RID of a(x) (the row AUG) and of the mean image. Returns {name: float}."""
    was_training = nets.training
    nets.eval()
    x = to_float(data.heldout[:1000]).to(z.device)
    x_rec = torch.cat([reconstruct(nets, part) for part in x.split(100)])
    mean_image = to_float(data.train.sum(dim=0) / len(data.train)).to(z.device)  # mean() takes no uint8; sum() does
    u = torch.rand(len(data.heldout), 2, generator=torch.Generator().manual_seed(1)).to(z.device)
    results = {"sample_diversity": sample_diversity(nets["G"](z), x[: len(z)])}
    results["heldout_l1"] = F.l1_loss(x_rec, x).item()
    results["heldout_l1_of_mean_image"] = F.l1_loss(mean_image.expand_as(x), x).item()
    results["rmse_255"] = 127.5 * F.mse_loss(x_rec, x).sqrt().item()
    for name, changed in {"blur": blur(x, u[:1000]), "crop": crop(x, u[:1000], p)}.items():
        results[f"l1_of_{name}"] = F.l1_loss(changed, x).item()
        results[f"l2_of_{name}"] = F.mse_loss(changed, x).item()
    if classifier:
        judged = to_float(data.heldout[:count]).to(z.device)
        noise = torch.randn(count, z.shape[1], generator=torch.Generator().manual_seed(1)).to(z.device)
        log_p, features = judge(classifier, judged)
        log_p_train, features_train = judge(classifier, to_float(data.train[:count]).to(z.device))
        log_p_pr, features_pr = judge(classifier, torch.cat([nets["G"](part) for part in noise.split(100)]))
        log_p_rec, _ = judge(classifier, torch.cat([reconstruct(nets, part) for part in judged.split(100)]))
        log_p_aug, _ = judge(classifier, AUGMENTATIONS[augmentation](judged, u[:count], p))
        log_p_mean, _ = judge(classifier, mean_image.expand_as(judged))
        results["inception_score"], results["inception_score_std"] = inception_score(log_p_pr.exp())
        results["inception_score_of_real"], _ = inception_score(log_p_train.exp())
        results["fid"] = frechet_inception_distance(features, features_pr)
        results["fid_of_real"] = frechet_inception_distance(features, features_train)
        results["rid"] = reconstruction_inception_dissimilarity(log_p, log_p_rec)
        results["rid_of_augmentation"] = reconstruction_inception_dissimilarity(log_p, log_p_aug)
        results["rid_of_mean_image"] = reconstruction_inception_dissimilarity(log_p, log_p_mean)
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
    add("--reconstruction", choices=LOSSES, default="pair", help="PAGAN, or PAGAN-L1 of the ablation study")
    add("--augmentation", choices=AUGMENTATIONS, default="crop", help="a(x), for D_xx and AUG's RID; none: PAGAN-NOAUG")
    add("--crop", type=float, default=0.1, help="padding as a share of the side, in whole pixels (slides: 0.05-0.2)")
    add("--classifier", default="none", help="none, inception, or a TorchScript file (see tests/make_classifier.py)")
    add("--samples", type=int, default=10_000, help="samples for IS, FID; also the limit of real images for FID, RID")
    add("--data", default="faces", help="folder of images, searched recursively, or faces (cartoons), cifar10, mnist")
    add("--out", type=Path, default=f"runs/{NAME}", help="folder for pictures, log.csv, results.json, checkpoint.pt")
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
    if args.samples < 10:  # the splits of the Inception score
        fail(f"--samples {args.samples}: must be at least 10")
    if args.crop > 0.5 or 0 < args.crop * args.image_size <= 0.5:
        fail(f"--crop {args.crop}: must be 0, or above {0.5 / args.image_size} (half a pixel) and at most 0.5")
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
        classifier = load_classifier(args.classifier, args.image_size, device)
        out.mkdir(parents=True, exist_ok=True)
    except (DataError, OSError) as error:  # their messages name the file or folder
        fail(str(error))

    torch.manual_seed(args.seed)
    nets = build_networks(args.reconstruction, args.image_size, args.channels, args.latent_dim).to(device)
    optimizer = build_optimizer(nets, args.lr)
    z_shown = torch.randn(256, args.latent_dim, generator=torch.Generator().manual_seed(0)).to(device)
    config = {name: value for name, value in vars(args).items() if name not in ("out", "resume", "device", "no_graph")}
    begin, log = restore(checkpoint, args, data, nets, optimizer) if checkpoint else (0, "")
    model = f"{args.reconstruction}, augmentation {args.augmentation}"
    print(f"{model} on {len(data.train)} images of {args.data}, {device}, step {begin}, in {out}/")

    images = place_images(data.train, device)
    step_function = partial(train_step, nets, optimizer, args.reconstruction)
    start = time.perf_counter()
    for step in range(begin + 1, args.steps + 1):
        drawn = draw_images(images, args.batch_size, device)
        inputs = make_inputs(drawn, args.latent_dim, args.augmentation, args.crop)
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
            save_figures(nets, data, z_shown, out, step, args.crop)
            state = {"networks": nets.state_dict(), "optimizer": optimizer.state_dict(), "images": data.checksum}
            state |= {"random": torch.get_rng_state(), "random_on_cuda": torch.cuda.get_rng_state_all()}
            torch.save({NAME: config, "step": step, "log": log, **state}, out / "checkpoint.tmp")
            (out / "checkpoint.tmp").replace(out / "checkpoint.pt")  # so it is whole at any moment

    if begin == args.steps:  # a finished run: its figures are made again
        save_figures(nets, data, z_shown, out, begin, args.crop)
    results = measure(nets, data, z_shown, args.augmentation, args.crop, classifier, args.samples)
    for name, value in results.items():
        print(f"{name:26}{value:10.3f}")
    (out / "results.json").write_text(json.dumps({**results, "steps": args.steps, "config": config}, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped: --resume goes on from the last checkpoint, if there is one", status=130)
