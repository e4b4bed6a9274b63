"""Learning inverse mapping by autoencoder based generative adversarial nets (Luo, Xu, Tang, Lv, 2017).

https://arxiv.org/abs/1703.10094

First a DCGAN is trained, then its generator G is frozen and made the decoder of an autoencoder, whose encoder, the
inverse generator IG, learns to invert it. Only generated images x = G(z) are used, and IG minimises the difference of
the images x and G(IG(x)), not that of the noise z and IG(x): where G maps several z to one image, any of them will do.
The codes IG(x) of real images say what they show: the nearest code finds a similar image.

    python inverse_gen.py --quick                            # cartoon faces within three minutes on two CPU cores
    python inverse_gen.py --data photos/ --out runs/photos   # the paper's set-up on a folder of images
    python inverse_gen.py --out runs/photos --query me.jpg   # which of its training images are most like this one

paper -> code
    Section 3    noise z, x = G(z), z' = IG(x), x' = G(z'), where G(z) is generate(G, z); E of Eq. 1 is IG
    Tables 3-5   G, D, IG                             Generator, Discriminator, InverseGenerator
    Table 6      D of the BiGAN                       PairDiscriminator
    Eq. 1        the BiGAN, a baseline                bigan_losses; --method bigan
    Eq. 2        gradient search for z, a baseline    search_codes; --method search
    Eq. 3        direct training, a baseline          direct_losses; --method direct
    Eq. 4        the DCGAN                            gan_losses; discriminator_loss, generator_loss
    Eq. 5, 7     cross-entropy V(x)                   cross_entropy
    Algorithm 1  the paper's AEGAN, Eq. 6 to 8        aegan_losses, train_step (not the AEGAN of aegan.py)
    Figure 2     reconstructed samples                save_figures
    Table 1      their similarity by dHash            dhash; measure_inversion: dhash_similarity
    Figures 3, 4 search with changed, other images    change_images, save_found; measure_search: search_top1_...
    Table 2      label similarity of what is found    label_agreement
    Section 4.2  dHash, pHash, colour histogram       dhash, phash, colour_histogram; describe, distances
    Figure 5     blurred images restored              save_figures; measure_inversion: deblur_l1_after

Rulings, where the paper is silent or contradicts itself
    - The text's strides (1, 2, 2, 1) cannot lead from 4x4 to 64x64: Table 3's four times 2 do. "Equation (4)" in
      Algorithm 1 means Eq. 5; its IG(G(x)) is IG(G(z)). 16x16 and 32x32 images leave out the widest layers.
    - In figures and results, and in G once it is frozen, batch norm uses its running averages: G is one fixed function.
    - Initial weights and leaky ReLU are DCGAN's. Both stages take 50,000 steps; the BiGAN and search have one.
    - Eq. 3, without labels as in Section 4.1, and 5 are means over dimensions or pixels. Eq. 8 prints a plain gradient
      step, the Appendix has Adam. Eq. 2, which is not measured in the paper, starts from z = 0, kept in [-1, 1].
    - dHash has 9x8 grey pixels, pHash 32x32, the colour histogram 8x8x8 bins, compared by intersection.
    - Figure 3 has 16 queries, four images changed in four ways; Figure 4 has 64. Both, and Tables 1 and 2, are scored
      on up to 256 images; where several are nearest, each has its share.
Departures
    - G minimises -log D(G(z)), as DCGAN does; G and IG of the BiGAN have labels swapped, as in BiGAN's code.
    - D and G step at once (in DCGAN D first); D(x) and D(G(z)) are normalised each by its own batch, as there. The two
      kinds of pairs of the BiGAN are normalised by one, or samples collapse.
    - Default data are drawn faces. A tenth is held out; nine tenths, in random order, train, and the first --gallery of
      them are the gallery, which Figure 3's queries are from. Differences are given for [-1, 1].
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
from torchvision.transforms.v2 import functional as transforms

from common import draw_images, load_data, place_images, read_image, save_grid

NAME = "inverse_gen"
FREE = ("steps", "log_every", "save_every", "search_steps", "search_rate", "gallery")  # what --resume may change
METHODS = ("aegan", "direct", "bigan", "search")  # Section 4.1; search: Eq. 2
COLUMNS = ("L_D", "L_G", "L_IG")  # of log.csv
IMAGE_SIZES = (16, 32, 64)
LEAK = 0.2  # slope of the leaky ReLU, DCGAN's
BETAS = (0.5, 0.999)  # the first: Appendix
INITIAL_STD = 0.02  # of weights, DCGAN's
BLUR = 1 / 16  # standard deviation of Figure 5, and of our blur in Figure 3, in sides of the image
QUICK = {"image_size": 16, "channels": 32, "latent_dim": 32, "gan_steps": 2500, "steps": 4000, "gallery": 2000}
QUICK |= {"save_every": 1000}


# ---------------------------------------------------------------------------------------------------------- networks


def conv_widths(image_size, channels):
    """Channels from the image to 4x4, in D and IG, and backwards in G: f, 2f, 4f, 8f where S = 64."""
    if image_size not in IMAGE_SIZES:
        raise ValueError(f"image_size {image_size}: must be one of {IMAGE_SIZES}")
    return [channels * 2**i for i in range(image_size.bit_length() - 3)]


def conv_stack(c_in, widths, activation):
    """Tables 4 to 6: 5x5 convolutions of stride 2, batch norm: [N, c_in, H, H] -> [N, widths[-1], H / 2^n, H / 2^n]."""
    layers = []
    for c_out in widths:
        layers += [nn.Conv2d(c_in, c_out, 5, 2, 2, bias=False), nn.BatchNorm2d(c_out), activation]
        c_in = c_out
    return nn.Sequential(*layers)


class Generator(nn.Sequential):
    """G, Table 3: latents z [N, Z] in [-1, 1] -> logits [N, 3, S, S] of images in [0, 1]; see generate."""

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
    """The networks by the paper's names, in training mode, IG but for "search". ValueError for a size that is none."""
    sizes = image_size, channels, latent_dim
    nets = nn.ModuleDict({"G": Generator(*sizes)})
    nets["D"] = PairDiscriminator(*sizes) if method == "bigan" else Discriminator(image_size, channels)
    if method != "search":
        nets["IG"] = InverseGenerator(*sizes)
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
    """Eq. 4 and Eq. 1 as D minimises them: -E[log D(real)] - E[log(1 - D(fake))]. d_real, d_fake: D's logits [N, 1], of
    x and G(z), or of (x, IG(x)) and (G(z), z)."""
    return F.softplus(-d_real).mean() + F.softplus(d_fake).mean()


def generator_loss(d_fake):
    """Eq. 4 as G minimises it: -E[log D(G(z))]. d_fake: D's logits [N, 1]."""
    return F.softplus(-d_fake).mean()


def cross_entropy(logits, x):
    """Eq. 5, Eq. 7, V(x): -x log x' - (1 - x) log(1 - x'), the mean over pixels; x' is the sigmoid of G's logits.

    logits: what the network G gives for IG(x), x: images in [0, 1]; [N, 3, S, S]. Least where x' = x.
    """
    return F.binary_cross_entropy_with_logits(logits, x)


def gan_losses(nets, x, z):
    """The DCGAN, Eq. 4: images x [N, 3, S, S] in [0, 1], latents z [M, Z] in [-1, 1] -> L_D for D, L_G for G."""
    d_real, d_fake = nets["D"](x), nets["D"](generate(nets["G"], z))
    return {"L_D": discriminator_loss(d_real, d_fake), "L_G": generator_loss(d_fake)}


def aegan_losses(nets, _, z):
    """AEGAN, Algorithm 1: latents z [N, Z] in [-1, 1] -> L_IG for IG to minimise. Real images are not used."""
    with torch.no_grad():
        x = generate(nets["G"], z)  # step 1
    z_prime = nets["IG"](x)  # step 2, Eq. 6: z'
    logits = nets["G"](z_prime)  # step 2, Eq. 6: x' before its sigmoid
    return {"L_IG": cross_entropy(logits, x)}  # step 3, Eq. 7


def direct_losses(nets, _, z):
    """Direct training, Eq. 3 without labels: the mean of (z - IG(G(z)))^2. Otherwise as aegan_losses."""
    with torch.no_grad():
        x = generate(nets["G"], z)
    return {"L_IG": F.mse_loss(nets["IG"](x), z)}


def bigan_losses(nets, x, z):
    """The BiGAN, Eq. 1: images x [N, 3, S, S] in [0, 1], latents z [M, Z] -> L_D for D, L_G for G and IG."""
    images, latents = torch.cat([x, generate(nets["G"], z)]), torch.cat([nets["IG"](x), z])
    d_q, d_p = nets["D"](images, latents).split([len(x), len(z)])  # of (x, IG(x)) and (G(z), z): one batch norm
    return {"L_D": discriminator_loss(d_q, d_p), "L_G": discriminator_loss(-d_q, -d_p)}  # labels swapped


LOSSES = {"gan": gan_losses, "aegan": aegan_losses, "direct": direct_losses, "bigan": bigan_losses}


# ---------------------------------------------------------------------------------------------------------- training


def build_optimizer(nets, lr):
    """One Adam for all networks; those that have no gradient in a step stay as they are."""
    return torch.optim.Adam(nets.parameters(), lr, BETAS, fused=True, capturable=True)


def draw_batch(images, latent_dim):
    """x: the images (uint8 [N, 3, S, S]) in [0, 1]; z ~ U(-1, 1): [N, Z]."""
    return to_unit(images), torch.rand(len(images), latent_dim, device=images.device) * 2 - 1


def to_unit(images):
    """uint8 images in [0, 255] -> float32 in [0, 1]."""
    return images.float() / 255


def train_step(nets, optimizer, stage, x, z):
    """One update of the networks of the stage, gan, aegan, direct or bigan, all at the same point, in the modes that it
    sets. Returns the losses before it, detached: see LOSSES."""
    nets.train()
    nets["G"].train(stage in ("gan", "bigan"))  # else G is frozen: in evaluation mode, and without gradients
    losses = LOSSES[stage](nets, x, z)
    optimizer.zero_grad()
    theta = {name: list(net.parameters()) for name, net in nets.items()}
    # A loss gives gradients to its `inputs` alone, where others detach the fakes and make them a second time.
    if stage in ("gan", "bigan"):
        losses["L_D"].backward(inputs=theta["D"], retain_graph=True)
        losses["L_G"].backward(inputs=theta["G"] + (theta["IG"] if stage == "bigan" else []))
    else:
        losses["L_IG"].backward(inputs=theta["IG"])  # Algorithm 1, step 4: update IG alone
    optimizer.step()  # Eq. 8, by Adam
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


@torch.no_grad()
def describe(parts, invert):
    """The codes and the DESCRIPTORS of images, an iterable of [n, 3, S, S] in [0, 1]: {name: [M, features]}."""
    functions = {"codes": invert, **DESCRIPTORS}
    rows = [{name: function(x) for name, function in functions.items()} for x in parts]
    return {name: torch.cat([row[name] for row in rows]) for name in functions}


def distances(queries, gallery):
    """Two results of describe -> {name: [Q, M]}: Euclidean for codes; bits that differ; 2 - 2 the intersection."""
    codes = torch.cdist(queries["codes"], gallery["codes"], compute_mode="donot_use_mm_for_euclid_dist")
    return {"codes": codes, **{name: torch.cdist(queries[name], gallery[name], p=1.0) for name in DESCRIPTORS}}


def nearest(distance):
    """The share of each gallery image in the nearest of each query, [Q, M]: 1, or less where several are as near."""
    first = (distance == distance.min(1, keepdim=True).values).double()
    return first / first.sum(1, keepdim=True)


def label_agreement(distance, query_labels, gallery_labels):
    """Table 2: the share of labels in which queries, bool [Q, A], and the nearest of the gallery, [M, A], agree."""
    share = nearest(distance) @ gallery_labels.double()
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
    """Figure 3: images x [N, 3, S, S] in [0, 1], changed in four ways, blur and crop being ours: {name: same shape}."""
    size, margin = x.shape[-1], max(1, round(0.05 * x.shape[-1]))
    return {
        "colour": transforms.adjust_saturation(transforms.adjust_hue(x, 0.1), 0.5),
        "sunglasses": wear_sunglasses(x),
        "blur": blur(x),
        "crop": transforms.resize(x[..., margin:-margin, margin:-margin], [size, size], antialias=True).clamp(0, 1),
    }


def save_images(path, *batches, **options):
    """save_grid of images in [0, 1]."""
    save_grid(path, *(2 * images - 1 for images in batches), **options)


def save_found(path, invert, queries, gallery, described, per_row):
    """Figures 3 and 4: queries [Q, 3, S, S] in [0, 1], per_row of them a row, each with the nearest of the gallery,
    uint8 [M, 3, S, S], by codes and by each of the DESCRIPTORS. described: describe() of the gallery."""
    found = distances(describe([queries], invert), described)
    results = [to_unit(gallery[distance.argmin(1).cpu()]) for distance in found.values()]
    captions = [[text] for text in ("query", "codes", "dHash", "pHash", "colours")]
    save_images(path, queries.cpu(), *results, columns=per_row, captions=captions)


@torch.no_grad()
def save_figures(nets, invert, data, z, out, step, described=None):
    """samples_<step>.png, with invert reconstructions_<step>.png, (x, G(IG(x))), and with described Figures 2 to 5.

    data: the first held-out images are shown, in Figure 3 the first of the gallery, a row each of colour, sunglasses,
    blur, crop. z: latents [N, Z], of which 100 are shown. described: describe() of the gallery.
    """
    nets.eval()
    x, x_generated = to_unit(data.heldout[:64].to(z.device)), generate(nets["G"], z[:100])
    save_images(out / f"samples_{step}.png", x_generated)
    if invert:
        save_images(out / f"reconstructions_{step}.png", x[:40], generate(nets["G"], invert(x[:40])), columns=5)
    if described:
        x_prime = generate(nets["G"], invert(x_generated[:40]))
        save_images(out / "figure2_pairs.png", x_generated[:40], x_prime, columns=5)
        gallery = data.train[: len(described["codes"])]
        few = to_unit(gallery[:4].to(z.device))
        changed = torch.cat(list(change_images(few).values()))
        save_found(out / "figure3_changed.png", invert, changed, gallery, described, len(few))
        save_found(out / "figure4_found.png", invert, x, gallery, described, 4)
        x, captions = x_generated[:24], [["original"], ["blurred"], ["restored"]]
        restored = generate(nets["G"], invert(blur(x)))
        save_images(out / "figure5_deblurred.png", x, blur(x), restored, columns=3, captions=captions)


def sample_diversity(samples, images):
    """Mean distance of samples over that of images, [N, 3, S, S]: 0 in total collapse, None if all images are one."""
    a, b = (torch.pdist(x.flatten(1)).mean().item() for x in (samples, images))
    return a / b if b > 0 else None


@torch.no_grad()
def measure_inversion(nets, invert, data, z):
    """Table 1 and Figure 5, of x generated from z [N, Z], and held-out images. Differences are of images in [-1, 1]."""
    G, x = nets["G"], generate(nets["G"], z)
    z_prime = torch.cat([invert(part) for part in x.split(250)])
    results = {"dhash_similarity": (dhash(x) == dhash(generate(G, z_prime))).float().mean().item()}  # equal bits
    blurred = blur(x)
    restored = torch.cat([generate(G, invert(part)) for part in blurred.split(250)])
    results["deblur_l1_before"] = 2 * F.l1_loss(blurred, x).item()
    results["deblur_l1_after"] = 2 * F.l1_loss(restored, x).item()
    results["sample_diversity"] = sample_diversity(x, to_unit(data.heldout[: len(z)].to(z.device)))
    mean_image = to_unit(sum(part.sum(0) for part in data.train.split(1000)) / len(data.train)).to(z.device)
    results |= {"heldout_l1": 0.0, "heldout_l1_of_mean_image": 0.0}
    for x in map(to_unit, data.heldout.to(z.device).split(250)):
        share = 2 * len(x) / len(data.heldout)
        results["heldout_l1"] += share * F.l1_loss(generate(G, invert(x)), x).item()
        results["heldout_l1_of_mean_image"] += share * F.l1_loss(mean_image.expand_as(x), x).item()
    return results


@torch.no_grad()
def measure_search(invert, data, described, count, device):
    """Table 2 and Figure 3, of up to count images. described: describe() of the gallery, the first of data.train."""
    gallery, results = len(described["codes"]), {}
    if data.attributes:
        x = to_unit(data.heldout[:count].to(device))
        found = distances(describe(x.split(250), invert), described)
        found["any_image"] = torch.zeros_like(found["codes"])
        labels = data.heldout_labels[:count].to(device), data.train_labels[:gallery].to(device)
        results = {f"label_agreement_{name}": label_agreement(d, *labels) for name, d in found.items()}
    for change, x in change_images(to_unit(data.train[: min(count, gallery)].to(device))).items():
        found = distances(describe(x.split(250), invert), described)
        results |= {f"search_top1_{change}_{name}": nearest(d).diagonal().mean().item() for name, d in found.items()}
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


# ------------------------------------------------------------------------------------------------------ command line


def fail(message, status=2):
    """End the program with one line, the message's first, on the standard error."""
    print(f"{NAME}.py: error: {message}".split("\n")[0], file=sys.stderr)
    sys.exit(status)


def parse_args(argv):
    """The arguments and, with --resume or --query, the checkpoint of the run in --out, else None."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.error, add = fail, parser.add_argument
    quick = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in QUICK.items())
    add("--method", choices=METHODS, default="aegan", help="how G is inverted: the paper's way, or one of Section 2's")
    add("--query", metavar="IMAGE", help="no training: which images of the run in --out are most like this file")
    add("--gan-steps", type=int, default=50_000, help="updates of the DCGAN, then IG (bigan: none; search: all steps)")
    add("--search-steps", type=int, default=200, help="of gradient search, Eq. 2, for every image")
    add("--search-rate", type=float, default=10.0, help="alpha of Eq. 2, for the mean over pixels")
    add("--gallery", type=int, default=20_000, help="training images that are searched (Section 4.2)")
    add("--data", default="faces", help="folder of images, searched recursively, or faces (drawn), cifar10, mnist")
    add("--out", default=f"runs/{NAME}", help="folder for pictures, log.csv, results.json, checkpoint.pt")
    add("--resume", action="store_true", help="go on with the run in --out, with its settings; --steps may be larger")
    add("--quick", action="store_true", help=f"faces within three minutes on two CPU cores: {quick}")
    add("--steps", type=int, default=100_000, help="all updates, those of the DCGAN included")
    add("--batch-size", type=int, default=64, help="images a step (Appendix)")
    add("--image-size", type=int, choices=IMAGE_SIZES, default=64, help="side of the images in pixels (Table 4)")
    add("--latent-dim", type=int, default=100, help="dimensions Z of the latents (Table 3)")
    add("--channels", type=int, default=64, help="f, width of the layers next to the image (Tables 3 to 6)")
    add("--lr", type=float, default=2e-4, help="learning rate (Appendix)")
    add("--log-every", type=int, default=100, help="steps between lines of the log")
    add("--save-every", type=int, default=2000, help="steps between checkpoints, with pictures")
    add("--seed", type=int, default=0, help="of weights, batches and noise; the held-out images are always the same")
    add("--graph", action="store_true", help="on CUDA: record a training step as a CUDA graph, and replay it")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")

    args, checkpoint = parser.parse_args(argv), None
    path = Path(args.out, "checkpoint.pt")
    if args.resume or args.query:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            parser.set_defaults(**checkpoint[NAME])
        except Exception:  # torch.load raises many kinds on what is no checkpoint
            fail(f"{path} is not a checkpoint of {NAME}.py: give the --out of a run, or no --resume and --query")
    elif path.exists():
        fail(f"{args.out} holds a run: continue it with --resume, or give another --out")
    elif args.quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        least = {int: 0 if name == "seed" else 1, float: 0}.get(type(value))
        if least is not None and not least <= value <= 1e12:
            fail(f"--{name.replace('_', '-')} cannot be {value}: it must be at least {least} and at most 1e12")
    for name, value in checkpoint[NAME].items() if checkpoint else ():
        if getattr(args, name) != value and name not in FREE:
            fail(f"{args.out} was made with {name} = {value}, not {getattr(args, name)}: give another --out")
    if checkpoint and args.steps < checkpoint["step"]:
        fail(f"{args.out} is at step {checkpoint['step']} already, beyond --steps {args.steps}")
    if args.method in ("aegan", "direct") and args.gan_steps >= args.steps:
        fail(f"--gan-steps {args.gan_steps} leave none of --steps {args.steps} for IG: change one of them")
    if args.query and args.method in ("aegan", "direct") and checkpoint["step"] <= args.gan_steps:
        fail(f"{args.out} is at step {checkpoint['step']}, and IG is not trained yet: go on with --resume")
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
        option = f"--query {args.query}"
        query = read_image(args.query, args.image_size) if args.query else None
        option = f"--out {out}"
        out.mkdir(parents=True, exist_ok=True)
    except Exception as error:  # of many kinds
        fail(f"{option} cannot be used: {error}")

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # TF32
    nets = build_networks(args.method, args.image_size, args.channels, args.latent_dim).to(device)
    optimizer = build_optimizer(nets, args.lr)
    z_shown = torch.rand(256, args.latent_dim, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1
    invert = nets["IG"] if "IG" in nets else partial(search_codes, nets["G"], args.search_steps, args.search_rate)
    config = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "query", "device", "graph")}
    begin, log = 0, ""
    if checkpoint:
        begin, log = checkpoint["step"], checkpoint["log"]
        nets.load_state_dict(checkpoint["networks"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["random"][0])
        torch.cuda.set_rng_state_all(checkpoint["random"][1 : 1 + torch.cuda.device_count()])
    if args.query:
        nets.eval()
        return save_query(out / "query.png", invert, query, data, args.gallery, device)
    print(f"{args.method} on {len(data.train)} images of {args.data}, {device}, step {begin}, in {out}/")

    images, start = place_images(data.train, device), time.perf_counter()
    for step in range(begin + 1, args.steps + 1):
        if step in (begin + 1, args.gan_steps + 1):  # "First we train the GAN's generator G", then IG (Section 3.2)
            of_gan = args.method == "search" or args.method != "bigan" and step <= args.gan_steps
            stage, first = "gan" if of_gan else args.method, step
            step_on = partial(train_step, nets, optimizer, stage)
        batch = draw_batch(draw_images(images, args.batch_size, device), args.latent_dim)
        if args.graph and step == first + 3:
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
        log = log or ",".join(("step", *COLUMNS)) + "\n"
        log += ",".join(map(str, (step, *(values.get(name, "") for name in COLUMNS)))) + "\n"
        (out / "log.csv").write_text(log)
        if save_due:
            save_figures(nets, invert if stage != "gan" else None, data, z_shown, out, step)
            state = {NAME: config, "networks": nets.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step, "log": log, "random": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]}
            torch.save(state, out / "checkpoint.tmp")
            (out / "checkpoint.tmp").replace(out / "checkpoint.pt")  # so it is whole at any moment

    nets.eval()
    gallery = data.train[: args.gallery]
    described = describe((to_unit(part.to(device)) for part in gallery.split(250)), invert)
    save_figures(nets, invert, data, z_shown, out, args.steps, described)
    results = measure_inversion(nets, invert, data, z_shown)
    results |= measure_search(invert, data, described, len(z_shown), device) | {"steps": args.steps, "config": config}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    for name, value in results.items():
        if isinstance(value, float):
            print(f"{name:40}{value:10.3f}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped: --resume goes on from the last checkpoint, if there is one", status=130)
