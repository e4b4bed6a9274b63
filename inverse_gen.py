# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy", "pillow>=10.1"]
# ///
"""Learning inverse mapping by autoencoder based generative adversarial nets (Luo, Xu, Tang, Lv, 2017).

First a DCGAN is trained, then its generator G is frozen and made the decoder of an autoencoder, whose encoder, the
inverse generator IG, learns to invert it. Only generated images x = G(z) are used, and IG minimises the difference of
the images x and G(IG(x)), not that of the noise z and IG(x): where G maps several z to one image, any of them will do.
The codes IG(x) of real images say what they show: the nearest code finds a similar image.

    python inverse_gen.py --quick                            # cartoon faces within three minutes on two CPU cores
    python inverse_gen.py --data photos/ --out runs/photos   # the paper's set-up on a folder of images
    python inverse_gen.py --out runs/photos --query me.jpg   # which of its training images are most like this one

paper -> code
    Tables 3-5   G, D, IG                             Generator, Discriminator, InverseGenerator
    Table 6      D of the BiGAN                       PairDiscriminator
    Eq. 1        the BiGAN, a baseline                discriminator_loss, bigan_loss, bigan_losses; --method bigan
    Eq. 2        gradient search for z, a baseline    search_codes; --method search
    Eq. 3        direct training, a baseline          direct_loss; --method direct
    Eq. 4        the DCGAN                            discriminator_loss, generator_loss, gan_losses
    Eq. 5, 7     cross-entropy of x and G(IG(x))      cross_entropy
    Eq. 6, 8     Algorithm 1                          inverse_losses, train_step
    Figure 2     reconstructed samples                save_pairs
    Table 1      their similarity by dHash            dhash, hash_similarity; measure: dhash_similarity
    Figure 3     search with changed images           change_images, save_found; measure: search_top1
    Table 2      label similarity of what is found    label_agreement
    Figure 4     search with other images             save_found
    Section 4.2  dHash, pHash, colour histogram       dhash, phash, colour_histogram; describe, distances
    Figure 5     blurred images restored              save_deblurred; measure: deblur_l1_after

Rulings, where the paper is silent or contradicts itself
    - The text's strides (1, 2, 2, 1) cannot lead from 4x4 to 64x64: Table 3's four times 2 do. "Equation (4)" in
      Algorithm 1 means Eq. 5. 16x16 and 32x32 images leave out the widest layers.
    - G minimises -log D(G(z)), as in DCGAN; G and IG of the BiGAN have labels swapped, as BiGAN's authors do.
    - D(x) and D(G(z)) are normalised each by its own batch, as in DCGAN; the two kinds of pairs of the BiGAN by one, or
      samples collapse. In figures and results, and in G once it is frozen, batch norm uses its running averages, so
      that G is one fixed function.
    - Weights start from N(0, 0.02), and leaky ReLU has slope 0.2, as in DCGAN; Adam's second moment decays with
      0.999. Both stages take 50,000 steps. The BiGAN, which has one stage, takes all of them for it.
    - Eq. 3 and 5 are means over dimensions or pixels, which Adam does not mind. Eq. 2 starts from z = 0, keeps z in
      [-1, 1], and has its alpha, for the mean over pixels, and its number of steps as arguments.
    - Images are in [0, 1] here, since G ends in a sigmoid; differences are given for [-1, 1], as in the other scripts.
    - dHash: 9x8 grey pixels, 64 bits. pHash: the lowest 8x8 frequencies of 32x32 grey pixels, above their median or
      not. Colour histogram: 8x8x8 bins, compared by intersection.
    - The gallery is the first 20,000 training images. Figure 3's changes are a turn of the hue by a tenth with half of
      the saturation, sunglasses at the eyes of a centred face, and, ours, Gaussian blur of 1/16 of the side and the
      middle 0.9 of it in whole pixels. They are scored on up to 256 images: how often the original comes first; where
      several are nearest, its share of them. Table 2 takes up to 256 held-out images, not 64.
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
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import functional as transforms

from common import DataError, draw_images, load_data, place_images, read_image, save_grid

METHODS = ("aegan", "direct", "bigan", "search")  # Section 4.1; search: Eq. 2
COLUMNS = ("L_D", "L_G", "L_IG")  # of log.csv
IMAGE_SIZES = (16, 32, 64)
LEAK = 0.2  # slope of the leaky ReLU, DCGAN's
BETAS = (0.5, 0.999)  # the first: Appendix
INITIAL_STD = 0.02  # of weights, DCGAN's
BLUR = 1 / 16  # standard deviation of Figures 3 and 5, in sides of the image
QUICK = {"image_size": 16, "channels": 32, "latent_dim": 32, "gan_steps": 2500, "steps": 1500, "gallery": 2000}
QUICK |= {"save_every": 1000}


# ---------------------------------------------------------------------------------------------------------- networks


def conv_widths(image_size, channels):
    """Channels from the image to 4x4, in D and IG, and backwards in G: f, 2f, 4f, 8f where S = 64."""
    return [channels * 2**i for i in range(image_size.bit_length() - 3)]


def conv_stack(c_in, widths, activation):
    """Tables 4 to 6: 5x5 convolutions of stride 2, batch norm: [N, c_in, H, H] -> [N, widths[-1], H / 2^n, H / 2^n]."""
    layers = []
    for c_out in widths:
        layers += [nn.Conv2d(c_in, c_out, 5, 2, 2, bias=False), nn.BatchNorm2d(c_out), activation]
        c_in = c_out
    return nn.Sequential(*layers)


class Generator(nn.Sequential):
    """G, Table 3: latents z [N, Z] -> logits [N, 3, S, S] of images in [0, 1]; see generate."""

    def __init__(self, image_size, channels, latent_dim):
        widths = conv_widths(image_size, channels)[::-1]
        layers = [nn.Linear(latent_dim, 16 * widths[0], bias=False), nn.Unflatten(1, (widths[0], 4, 4))]
        for c_in, c_out in zip(widths, [*widths[1:], 3]):
            layers += [nn.BatchNorm2d(c_in), nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 5, 2, 2, 1, bias=c_out == 3)]
        super().__init__(*layers)


class Discriminator(nn.Sequential):
    """D, Table 4: images x [N, 3, S, S] in [0, 1] -> logits [N, 1], positive for real ones."""

    def __init__(self, image_size, channels):
        widths = conv_widths(image_size, channels)
        super().__init__(conv_stack(3, widths, nn.LeakyReLU(LEAK)), nn.Flatten(), nn.Linear(16 * widths[-1], 1))


class InverseGenerator(nn.Sequential):
    """IG, Table 5: images x [N, 3, S, S] in [0, 1] -> latents z' [N, Z] in [-1, 1]."""

    def __init__(self, image_size, channels, latent_dim):
        widths = conv_widths(image_size, channels)
        layers = [conv_stack(3, widths, nn.ReLU()), nn.Flatten(), nn.Linear(16 * widths[-1], latent_dim), nn.Tanh()]
        super().__init__(*layers)


class PairDiscriminator(nn.Module):
    """D of the BiGAN, Table 6: images [N, 3, S, S] in [0, 1] and latents [N, Z] -> logits [N, 1]."""

    def __init__(self, image_size, channels, latent_dim):
        super().__init__()
        *widths, widest = conv_widths(image_size, channels)
        self.of_x = conv_stack(3, widths, nn.LeakyReLU(LEAK))  # to 8x8
        self.of_both = conv_stack(widths[-1] + latent_dim, [widest] * 3, nn.LeakyReLU(LEAK))  # to 1x1
        self.logit = nn.Linear(widest, 1)

    def forward(self, x, z):
        z = z[:, :, None, None].expand(-1, -1, 8, 8)
        return self.logit(self.of_both(torch.cat([self.of_x(x), z], dim=1)).flatten(1))


def build_networks(method, image_size, channels, latent_dim):
    """The networks by the paper's names; no IG where method is search."""
    nets = nn.ModuleDict({"G": Generator(image_size, channels, latent_dim)})
    if method == "bigan":
        nets["D"] = PairDiscriminator(image_size, channels, latent_dim)
    else:
        nets["D"] = Discriminator(image_size, channels)
    if method != "search":
        nets["IG"] = InverseGenerator(image_size, channels, latent_dim)
    for layer in nets.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(layer.weight, std=INITIAL_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return nets


def generate(G, z):
    """Images [N, 3, S, S] in [0, 1] from latents z [N, Z]: the sigmoid of Table 3."""
    return G(z).sigmoid()


# ------------------------------------------------------------------------------------------------------------ losses


def discriminator_loss(d_real, d_fake):
    """Eq. 4, and 1, as D minimises them: -E[log D(real)] - E[log(1 - D(fake))].

    d_real, d_fake: D's logits [N, 1] of x and G(z), or of (x, IG(x)) and (G(z), z).
    """
    return F.softplus(-d_real).mean() + F.softplus(d_fake).mean()


def generator_loss(d_fake):
    """Eq. 4 as G minimises it: -E[log D(G(z))]. d_fake: D's logits [N, 1]."""
    return F.softplus(-d_fake).mean()


def bigan_loss(d_real, d_fake):
    """Eq. 1 as G and IG minimise it: -E[log(1 - D(x, IG(x)))] - E[log D(G(z), z)]. D's logits [N, 1]."""
    return F.softplus(d_real).mean() + F.softplus(-d_fake).mean()


def cross_entropy(logits, x):
    """Eq. 5 and 7: -x log x' - (1 - x) log(1 - x'), the mean over pixels; x' is the sigmoid of G's logits.

    logits: G(IG(x)), x: images in [0, 1]; [N, 3, S, S]. Least where x' = x; 0 only where x is 0 or 1, too.
    """
    return F.binary_cross_entropy_with_logits(logits, x)


def direct_loss(z_prime, z):
    """Eq. 3 without labels: (z - IG(G(z)))^2, the mean over dimensions. Both [N, Z]."""
    return F.mse_loss(z_prime, z)


def gan_losses(nets, x, z):
    """Eq. 4: images x [N, 3, S, S] in [0, 1] and latents z [N, Z] -> L_D for D, L_G for G to minimise."""
    d_real, d_fake = nets["D"](x), nets["D"](generate(nets["G"], z))
    return {"L_D": discriminator_loss(d_real, d_fake), "L_G": generator_loss(d_fake)}


def bigan_losses(nets, x, z):
    """Eq. 1: images x [N, 3, S, S] in [0, 1] and latents z [N, Z] -> L_D for D, L_G for G and IG to minimise."""
    images, latents = torch.cat([x, generate(nets["G"], z)]), torch.cat([nets["IG"](x), z])
    d_real, d_fake = nets["D"](images, latents).chunk(2)
    return {"L_D": discriminator_loss(d_real, d_fake), "L_G": bigan_loss(d_real, d_fake)}


def inverse_losses(nets, z, stage):
    """Eq. 6 and 7, or in the stage direct Eq. 3: latents z [N, Z] -> L_IG for IG to minimise."""
    with torch.no_grad():
        x = generate(nets["G"], z)
    z_prime = nets["IG"](x)
    return {"L_IG": direct_loss(z_prime, z) if stage == "direct" else cross_entropy(nets["G"](z_prime), x)}


# ---------------------------------------------------------------------------------------------------------- training


def build_optimizers(nets, method, lr):
    """One Adam for each loss that is minimised, by the loss's name: in the BiGAN G and IG share one."""
    players = {"L_D": ["D"], "L_G": ["G", "IG"]} if method == "bigan" else {"L_D": ["D"], "L_G": ["G"], "L_IG": ["IG"]}
    optimizers = {}
    for loss, names in players.items():
        parameters = [p for name in names if name in nets for p in nets[name].parameters()]
        if parameters:
            optimizers[loss] = torch.optim.Adam(parameters, lr, BETAS, fused=True, capturable=True)
    return optimizers


def draw_batch(images, latent_dim):
    """x: the images uint8 [N, 3, S, S] in [0, 1]; z ~ U(-1, 1): [N, Z]."""
    return to_unit(images), torch.rand(len(images), latent_dim, device=images.device) * 2 - 1


def to_unit(images):
    """uint8 images in [0, 255] -> float32 in [0, 1]."""
    return images.float() / 255


def train_step(nets, optimizers, stage, x, z):
    """One update of the networks of the stage: D and G in gan, D, G and IG in bigan, IG alone in aegan and direct.

    The latter two are Algorithm 1, with Eq. 8: G is frozen, in evaluation mode, nothing in it changes, and x is not
    used. Returns the losses before the update, as tensors.
    """
    nets.train()
    nets["G"].train(stage in ("gan", "bigan"))
    if stage == "gan":
        losses = gan_losses(nets, x, z)
    elif stage == "bigan":
        losses = bigan_losses(nets, x, z)
    else:
        losses = inverse_losses(nets, z, stage)
    for name, loss in losses.items():
        optimizers[name].zero_grad()
        loss.backward(inputs=optimizers[name].param_groups[0]["params"], retain_graph=True)
    for name in losses:
        optimizers[name].step()
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


@torch.enable_grad()
def search_codes(G, steps, rate, x):
    """Eq. 2: z - alpha grad_z of the cross-entropy of x and G(z), steps times from z = 0. x: [N, 3, S, S] -> [N, Z].

    G: in evaluation mode. rate: alpha, for the mean over the pixels of an image.
    """
    z = torch.zeros(len(x), G[0].in_features, dtype=x.dtype, device=x.device)
    for _ in range(steps):
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(len(x) * cross_entropy(G(z), x), z)
        z = (z.detach() - rate * gradient).clamp(-1, 1)
    return z


def inverter(nets, search_steps, search_rate):
    """The function from images [N, 3, S, S] in [0, 1] to their codes, latents [N, Z]: IG, or if none search_codes."""
    return nets["IG"] if "IG" in nets else partial(search_codes, nets["G"], search_steps, search_rate)


def grey_pixels(x, height, width):
    """Images [N, 3, S, S] in [0, 1] -> [N, height, width] grey levels, whole numbers in 0..255."""
    return (255 * transforms.resize(transforms.rgb_to_grayscale(x), [height, width], antialias=True)).round()[:, 0]


def dhash(x):
    """Is a pixel brighter than its left neighbour, in 9x8 grey pixels: [N, 3, S, S] -> [N, 64] of 0 and 1."""
    grey = grey_pixels(x, 8, 9)
    return (grey[:, :, 1:] > grey[:, :, :-1]).flatten(1).float()


def phash(x):
    """Are the lowest 8x8 frequencies of 32x32 grey pixels above their median: [N, 3, S, S] -> [N, 64] of 0 and 1."""
    i = torch.arange(32, dtype=torch.float64, device=x.device)
    cosines = torch.cos(math.pi / 32 * (i + 0.5) * i[:8, None])  # (8, 32): the discrete cosine transform's first rows
    frequencies = (cosines @ grey_pixels(x, 32, 32).double() @ cosines.T).flatten(1).round(decimals=6)
    return (frequencies > frequencies.median(1, keepdim=True).values).float()


def colour_histogram(x, bins=8):
    """Shares of an image's pixels in 8x8x8 boxes of colour: [N, 3, S, S] -> [N, 512]."""
    red, green, blue = (x * bins).long().clamp(0, bins - 1).flatten(2).unbind(1)  # (N, S^2) each
    counts = torch.zeros(len(x), bins**3, device=x.device)
    counts.scatter_add_(1, (red * bins + green) * bins + blue, torch.ones_like(red, dtype=torch.float32))
    return counts / red.shape[1]


DESCRIPTORS = {"dhash": dhash, "phash": phash, "colour_histogram": colour_histogram}  # those of Section 4.2 but codes


def hash_similarity(a, b):
    """Table 1: the share of equal bits of two hashes [N, 64], the mean over N."""
    return (a == b).float().mean().item()


@torch.no_grad()
def describe(parts, invert):
    """The codes and the DESCRIPTORS of images, an iterable of [n, 3, S, S] in [0, 1]: {name: [M, features]}."""
    functions = {"codes": invert, **DESCRIPTORS}
    rows = [{name: function(x) for name, function in functions.items()} for x in parts]
    return {name: torch.cat([row[name] for row in rows]) for name in functions}


def distances(queries, gallery):
    """Two results of describe -> {name: [Q, M]}: Euclidean; bits that differ; 1 - the intersection."""
    found = {}
    for name, query in queries.items():
        exact = {"p": 2.0, "compute_mode": "donot_use_mm_for_euclid_dist"} if name == "codes" else {"p": 1.0}
        found[name] = torch.cdist(query, gallery[name], **exact) / (2 if name == "colour_histogram" else 1)
    return found


def nearest(distance):
    """The share of each gallery image in the nearest of each query, [Q, M]: 1, or less where several are as near."""
    first = (distance == distance.min(1, keepdim=True).values).float()
    return first / first.sum(1, keepdim=True)


def label_agreement(distance, query_labels, gallery_labels):
    """Table 2: the share of the labels bool [Q, A] that the nearest gallery image, of labels bool [M, A], has, too."""
    share = nearest(distance) @ gallery_labels.float()
    return torch.where(query_labels, share, 1 - share).mean().item()


def blur(x):
    """Gaussian blur of 1/16 of the side: [N, 3, S, S] -> [N, 3, S, S]."""
    sigma = BLUR * x.shape[-1]
    return transforms.gaussian_blur(x, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma] * 2)


def wear_sunglasses(x):
    """Black glasses at the eyes of a centred face (CelebA's or common.py's): [N, 3, S, S] -> [N, 3, S, S]."""
    size = x.shape[-1]
    at = (torch.arange(size, device=x.device) + 0.5) / size
    down, across = at[:, None] - 0.52, (at - 0.5).abs()
    glass = ((across - 0.11) / 0.095) ** 2 + (down / 0.075) ** 2 < 1
    bridge = (down.abs() < 0.02) & (across < 0.11)
    return torch.where(glass | bridge, 0.05, x)


def change_images(x):
    """Figure 3: images x [N, 3, S, S] in [0, 1], changed in four ways: {name: [N, 3, S, S]}."""
    size = x.shape[-1]
    margin = max(1, round(0.05 * size))
    return {
        "colour": transforms.adjust_saturation(transforms.adjust_hue(x, 0.1), 0.5),
        "sunglasses": wear_sunglasses(x),
        "blur": blur(x),
        "crop": transforms.resize(x[..., margin:-margin, margin:-margin], [size, size], antialias=True).clamp(0, 1),
    }


def save_images(path, *batches, **options):
    """save_grid of images in [0, 1]."""
    save_grid(path, *(2 * images - 1 for images in batches), **options)


def save_samples(path, nets, z):
    """G(z), ten a row. z: [N, Z]."""
    save_images(path, generate(nets["G"], z))


def save_pairs(path, nets, invert, x):
    """Pairs (x, G(IG(x))), five a row; of x = G(z), Figure 2. x: images [N, 3, S, S] in [0, 1]."""
    save_images(path, x, generate(nets["G"], invert(x)), columns=5)


def save_deblurred(path, nets, invert, x):
    """Figure 5: x, x blurred, G of the code of that, three times a row. x: images G(z), [N, 3, S, S] in [0, 1]."""
    blurred = blur(x)
    captions = [["original"], ["blurred"], ["restored"]]
    save_images(path, x, blurred, generate(nets["G"], invert(blurred)), columns=3, captions=captions)


def save_found(path, invert, queries, gallery, described, per_row):
    """Figures 3 and 4: images, and the nearest of the gallery to each by codes and by each of the DESCRIPTORS.

    queries: [Q, 3, S, S] in [0, 1], per_row of them a row; gallery: uint8 [M, 3, S, S]; described: its describe().
    """
    found = distances(describe([queries], invert), described)
    results = [to_unit(gallery[distance.argmin(1).cpu()]) for distance in found.values()]
    captions = [[text] for text in ("query", "codes", "dHash", "pHash", "colours")]
    save_images(path, queries.cpu(), *results, columns=per_row, captions=captions)


@torch.no_grad()
def save_figures(nets, invert, data, z, out, step=None, described=None):
    """Into the folder out: samples, reconstructions and Figures 2 to 5; with a step only samples_<step>.png and, where
    invert is not None, reconstructions_<step>.png.

    The images are the first held-out ones, the same in every run; in Figure 3 the first training images, a row each of
    colour, sunglasses, blur, crop. z: latents [N, Z], of which 100 are shown. described: describe() of the gallery.
    """
    x = to_unit(data.heldout[torch.arange(64) % len(data.heldout)].to(z.device))
    nets.eval()
    save_samples(out / ("figure_samples.png" if step is None else f"samples_{step}.png"), nets, z[:100])
    if invert:
        name = "figure_reconstructions.png" if step is None else f"reconstructions_{step}.png"
        save_pairs(out / name, nets, invert, x[:40])
    if step is None:
        x_hat, gallery = generate(nets["G"], z[:40]), data.train[: len(described["codes"])]
        few = to_unit(gallery[:4].to(z.device))
        save_pairs(out / "figure2_pairs.png", nets, invert, x_hat)
        changed = torch.cat(list(change_images(few).values()))
        save_found(out / "figure3_changed.png", invert, changed, gallery, described, len(few))
        save_found(out / "figure4_found.png", invert, x, gallery, described, 4)
        save_deblurred(out / "figure5_deblurred.png", nets, invert, x_hat[:24])


def sample_diversity(samples, images):
    """The mean distance of two samples over that of two images: about 1, or 0 in total collapse.

    samples: [N, 3, S, S], images: [M, 3, S, S], N, M > 1.
    """
    return (torch.pdist(samples.flatten(1)).mean() / torch.pdist(images.flatten(1)).mean()).item()


@torch.no_grad()
def measure(nets, invert, data, z, described):
    """The figures of merit: of images generated from z [N, Z], of held-out images, and of searches in the gallery.

    described: describe() of the gallery, the first training images. Differences are of images in [-1, 1].
    """
    nets.eval()
    G, device = nets["G"], z.device
    x_hat = generate(G, z)
    blurred = blur(x_hat)
    blurred.sum().item()  # waits for the device
    start = time.perf_counter()
    z_prime = torch.cat([invert(part) for part in x_hat.split(250)]).cpu()  # and here
    results = {"inversions_per_second": len(x_hat) / (time.perf_counter() - start)}
    results["dhash_similarity"] = hash_similarity(dhash(x_hat), dhash(generate(G, z_prime.to(device))))
    restored = torch.cat([generate(G, invert(part)) for part in blurred.split(250)])
    results["deblur_l1_before"] = 2 * F.l1_loss(blurred, x_hat).item()
    results["deblur_l1_after"] = 2 * F.l1_loss(restored, x_hat).item()

    mean_image = to_unit(sum(part.sum(0) for part in data.train.split(1000)) / len(data.train)).to(device)
    results |= dict.fromkeys(("heldout_l1", "heldout_l1_of_mean_image"), 0.0)
    for part in data.heldout.split(250):
        x, share = to_unit(part.to(device)), len(part) / len(data.heldout)
        results["heldout_l1"] += share * 2 * F.l1_loss(generate(G, invert(x)), x).item()
        results["heldout_l1_of_mean_image"] += share * 2 * F.l1_loss(mean_image.expand_as(x), x).item()
    x = to_unit(data.heldout[: len(z)].to(device))
    results["sample_diversity"] = sample_diversity(x_hat, x)

    results["label_agreement"] = None
    if data.attributes:
        found = distances(describe(x.split(250), invert), described)
        labels = data.heldout_labels[: len(x)].to(device), data.train_labels[: len(described["codes"])].to(device)
        results["label_agreement"] = {name: label_agreement(d, *labels) for name, d in found.items()}
        results["label_agreement"]["any_image"] = label_agreement(torch.zeros_like(found["codes"]), *labels)
    originals = to_unit(data.train[: min(len(z), len(described["codes"]))].to(device))
    results["search_top1"] = {}
    for change, changed in change_images(originals).items():
        found = distances(describe(changed.split(250), invert), described)
        results["search_top1"][change] = {name: nearest(d).diagonal().mean().item() for name, d in found.items()}
    return results


@torch.no_grad()
def save_query(path, invert, x, data, count, device):
    """--query: print which nine of the first count training images have the codes nearest to that of the image x, uint8
    [3, S, S], and save them as a picture."""
    gallery = data.train[:count]
    codes = torch.cat([invert(to_unit(part.to(device))) for part in gallery.split(250)])
    distance = torch.cdist(invert(to_unit(x[None].to(device))), codes, compute_mode="donot_use_mm_for_euclid_dist")[0]
    shortest, index = (found.tolist() for found in distance.topk(min(9, len(distance)), largest=False))
    for d, i in zip(shortest, index):
        print(f"{d:8.3f}  {data.paths[i] if data.paths else f'training image {i}'}")
    captions = [["query", *(f"{d:.2f}" for d in shortest)]]
    save_images(path, to_unit(torch.cat([x[None], gallery[index]])), captions=captions)
    print(f"{path} shows them")


# ------------------------------------------------------------------------------------------------------ command line


def fail(message):
    """End the program with one line on the standard error and exit status 2."""
    print(f"inverse_gen.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args(argv):
    """The arguments, and the checkpoint of --out if they ask for it, else None."""
    parser = argparse.ArgumentParser(
        description="Learning inverse mapping by autoencoder based GANs (Luo et al. 2017). Defaults are the paper's "
        "(Appendix) and, where it names none, ours (see the rulings at the head of the script).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail
    add = parser.add_argument
    quick = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in QUICK.items())
    add("--method", choices=METHODS, default="aegan", help="how G is inverted: the paper's way, or one of Section 2's")
    add("--generator", metavar="CHECKPOINT", help="take the trained G of another run's checkpoint.pt: no --gan-steps")
    add("--data", default="faces", help="folder of images, searched recursively, or faces (drawn), cifar10, mnist")
    add("--out", default="runs/inverse_gen", help="folder for pictures, log.csv, results.json, checkpoint.pt")
    add("--resume", action="store_true", help="continue the run in --out, or with a larger --steps go further")
    add("--eval", action="store_true", help="no training: figures and results of the run in --out")
    add("--query", metavar="IMAGE", help="no training: which images of the run in --out are most like this file")
    add("--quick", action="store_true", help=f"faces within three minutes on two CPU cores: {quick}")
    add("--gan-steps", type=int, default=50_000, help="updates of the DCGAN")
    add("--steps", type=int, default=50_000, help="updates of IG, after those (bigan: of all; search: unused)")
    add("--batch-size", type=int, default=64, help="images a step (Appendix)")
    add("--image-size", type=int, choices=IMAGE_SIZES, default=64, help="side of the images in pixels (Table 4)")
    add("--latent-dim", type=int, default=100, help="dimensions Z of the latents (Table 3)")
    add("--channels", type=int, default=64, help="f, width of the layers next to the image (Tables 3 to 6)")
    add("--lr", type=float, default=2e-4, help="learning rate (Appendix)")
    add("--search-steps", type=int, default=200, help="of gradient search, Eq. 2, for every image")
    add("--search-rate", type=float, default=10.0, help="alpha of Eq. 2, for the mean over pixels")
    add("--gallery", type=int, default=20_000, help="training images that are searched (Section 4.2)")
    add("--log-every", type=int, default=100, help="steps between lines of the log")
    add("--save-every", type=int, default=2000, help="steps between checkpoints, with pictures")
    add("--seed", type=int, default=0, help="of weights, batches and noise; the held-out images are always the same")
    add("--precision", choices=("bf16", "tf32", "fp32"), default="tf32", help="of products; on a CPU tf32 is fp32")
    add("--graph", action="store_true", help="on CUDA: record a training step as a CUDA graph, and replay it")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")

    args, checkpoint, sizes = parser.parse_args(argv), None, {}
    path = Path(args.out, "checkpoint.pt")
    if args.resume or args.eval or args.query is not None:
        checkpoint = load_checkpoint(path)
        parser.set_defaults(**checkpoint["config"])
    elif path.exists():
        fail(f"{args.out} holds a run: continue it with --resume, or give another --out")
    else:
        parser.set_defaults(**QUICK if args.quick else {})
        if args.generator:
            config = load_checkpoint(Path(args.generator))["config"]
            sizes = {name: config[name] for name in ("image_size", "channels", "latent_dim")}
            parser.set_defaults(**sizes, gan_steps=0)
    args = parser.parse_args(argv)
    for name, value in sizes.items():
        if getattr(args, name) != value:
            fail(f"{args.generator} was made with {name} = {value}, not {getattr(args, name)}: leave that out")
    check_args(args, checkpoint)
    return args, checkpoint


def check_args(args, checkpoint):
    """Refuse arguments that cannot be, or that differ from those of the checkpoint's run, if there is one."""
    for name, value in vars(args).items():
        minimum = {int: 0 if name in ("seed", "gan_steps") else 1, float: 0}.get(type(value))
        if minimum is not None and not minimum <= value < 2**63:
            fail(f"--{name.replace('_', '-')} cannot be {value}: it must be at least {minimum}")
    if args.generator and (args.method == "bigan" or args.gan_steps):
        fail("--generator goes neither with --method bigan, which trains its own, nor with --gan-steps")
    if not args.generator and not args.gan_steps:
        fail("--gan-steps cannot be 0 without --generator")
    free = {"data", "log_every", "save_every", "search_steps", "search_rate", "gallery"}
    free |= set() if args.eval or args.query is not None else {"steps"}
    for name, value in checkpoint["config"].items() if checkpoint else ():
        if getattr(args, name) != value and name not in free:
            fail(f"{args.out} was made with {name} = {value}, not {getattr(args, name)}: give another --out")
    if args.resume and total_steps(args) < checkpoint["step"]:
        first = f" after --gan-steps {args.gan_steps}" if args.gan_steps else ""
        fail(f"{args.out} is at step {checkpoint['step']} already, beyond --steps {args.steps}{first}")
    untrained = 0 if args.method == "bigan" else args.gan_steps
    if args.query is not None and args.method != "search" and checkpoint["step"] <= untrained:
        fail(f"{args.out} is at step {checkpoint['step']}, and IG is not trained yet: go on with --resume")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
    if args.graph and torch.device(args.device).type != "cuda":
        fail(f"--graph needs CUDA, not --device {args.device}")


def load_checkpoint(path):
    """The checkpoint that train() saved, on the CPU."""
    if not path.is_file():
        fail(f"{path} is not there: give the --out of a run, or no --resume, --eval, --query; a file to --generator")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] == "inverse_gen":
            return checkpoint
    except Exception:  # torch.load raises many kinds on what is no checkpoint
        pass
    fail(f"{path} is not a checkpoint of inverse_gen.py: give another")


def stage_of(args, step):
    """What the step after so many trains: see train_step."""
    return "gan" if step < args.gan_steps and args.method != "bigan" else args.method


def total_steps(args):
    """The number of steps of a whole run, both stages."""
    return args.gan_steps + (args.steps if args.method != "search" else 0)


def train(args, nets, optimizers, invert, data, z, run):
    """The training loop, from run["step"] to the last. invert, z: of the pictures, see save_figures."""
    out, images, end = Path(args.out), place_images(data.train, z.device), total_steps(args)

    def save():
        """Write a temporary file and rename it, so that checkpoint.pt is always whole."""
        state = {"networks": nets.state_dict(), "optimizers": {k: v.state_dict() for k, v in optimizers.items()}}
        state["random"] = {"cpu": torch.get_rng_state()}
        if z.is_cuda:
            state["random"]["cuda"] = torch.cuda.get_rng_state(z.device)
        torch.save({"script": "inverse_gen", **run, **state}, out / "checkpoint.tmp")
        os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")

    @lru_cache(1)  # one graph at a time
    def step_of(stage):
        """The function that is a step of the stage; with --graph it is recorded when the stage begins."""

        def iterate(drawn):
            """One step on uint8 images."""
            return train_step(nets, optimizers, stage, *draw_batch(drawn, args.latent_dim))

        return record(iterate, images[: args.batch_size].to(z.device), nets, optimizers) if args.graph else iterate

    if run["step"] == 0:
        save()
    log, stops = (out / "log.csv").open("a", buffering=1), []
    run["log_size"] = min(run["log_size"], log.tell())
    log.truncate(run["log_size"])  # without what a stopped run wrote after its last checkpoint
    signal.signal(signal.SIGINT, lambda *_: stops.append(True))  # Ctrl-C ends the loop after the step under way
    step, stop, last_step, last_time = run["step"], False, run["step"], time.perf_counter()
    while step < end and not stop:
        stage = stage_of(args, step)
        losses = step_of(stage)(draw_images(images, args.batch_size, z.device))
        step, stop = step + 1, bool(stops)
        save_due = step % args.save_every == 0 or step in (args.gan_steps, end) or stop
        if not (save_due or step % args.log_every == 0 or step == 10):
            continue
        values = dict(zip(losses, torch.stack(list(losses.values())).tolist()))  # waits for the device
        seconds = time.perf_counter() - last_time
        broken = [f"loss {name}" for name, value in values.items() if not math.isfinite(value)]
        broken += [f"weight {name}" for name, weight in nets.named_parameters() if not weight.isfinite().all()]
        if broken:
            fail(f"{broken[0]} is not finite by step {step}; {out}/checkpoint.pt holds the last good step")
        left = timedelta(seconds=round((end - step) * seconds / (step - last_step)))
        terms = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        print(f"step {step}  {terms}  {(step - last_step) / seconds:.1f} steps/s  {left} left", flush=True)
        if step == 10 and left > timedelta(hours=1) and args.device == "cpu":
            print("This is long for a CPU: --quick takes three minutes", flush=True)
        if run["log_size"] == 0:
            print("step", *COLUMNS, sep=",", file=log)
        print(step, *(values.get(name, "") for name in COLUMNS), sep=",", file=log)
        run |= {"step": step, "seconds": run["seconds"] + seconds, "log_size": log.tell()}
        if save_due:
            save_figures(nets, invert if stage != "gan" else None, data, z, out, step)
            save()
        last_step, last_time = step, time.perf_counter()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if stop:
        print(f"stopped after step {step}: continue with --resume")
        sys.exit(130)


def print_results(results):
    """A line for each number of measure's results, or for each row of numbers."""
    rows = {name: value for name, value in results.items() if isinstance(value, float)}
    rows |= {f"search_top1 {change}": row for change, row in results["search_top1"].items()}
    if results["label_agreement"]:
        rows["label_agreement"] = results["label_agreement"]
    for name, value in rows.items():
        row = value if isinstance(value, dict) else {"": value}
        print(
            f"{name:26}" + "  ".join(f"{key} {number:.3f}" if key else f"{number:10.3f}" for key, number in row.items())
        )


def main(argv=None):
    """The command line; see --help."""
    args, checkpoint = parse_args(argv)
    out, device = Path(args.out), torch.device(args.device)
    if args.query is not None:
        try:
            query = read_image(args.query, args.image_size)
        except Exception as error:  # Pillow raises many kinds
            fail(f"--query {args.query} cannot be read: {error}")
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
    nets = build_networks(args.method, args.image_size, args.channels, args.latent_dim).to(device)
    use_precision(nets, args.precision)
    optimizers = build_optimizers(nets, args.method, args.lr)
    z = torch.rand(256, args.latent_dim, generator=torch.Generator().manual_seed(0)) * 2 - 1  # the same in every run
    z = z.to(device)
    config = {
        name: value
        for name, value in vars(args).items()
        if name not in ("out", "resume", "eval", "query", "device", "graph")
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
    elif args.generator:
        weights = load_checkpoint(Path(args.generator))["networks"]
        nets["G"].load_state_dict({k.removeprefix("G."): w for k, w in weights.items() if k.startswith("G.")})
    invert = inverter(nets, args.search_steps, args.search_rate)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {out} cannot be made: {error.strerror}")
    print(f"{args.method} on {len(data.train)} images of {args.data}, on {device}, into {out}/", flush=True)
    if not args.eval and args.query is None:
        train(args, nets, optimizers, invert, data, z, run)

    nets.eval()
    gallery = data.train[: args.gallery]
    print(f"searching among {len(gallery)} images", flush=True)
    if args.query is not None:
        save_query(out / "query.png", invert, query, data, args.gallery, device)
        return
    described = describe((to_unit(part.to(device)) for part in gallery.split(250)), invert)
    save_figures(nets, invert, data, z, out, described=described)
    results = measure(nets, invert, data, z, described)
    results |= {"steps": run["step"], "steps_per_second": run["step"] / max(run["seconds"], 1e-9), "config": config}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print_results(results)
    print(f"The figures and results.json are in {out}/")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before or after training, when there is nothing to save
        sys.exit(130)
