# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy", "pillow>=10.1"]
# ///
"""Learning inverse mapping by autoencoder based generative adversarial nets (Luo, Xu, Tang, Lv, 2017).
https://arxiv.org/abs/1703.10094

First a DCGAN is trained, then its generator G is frozen and made the decoder of an autoencoder, whose encoder, the
inverse generator IG, learns to invert it. Only generated images x = G(z) are used, and IG minimises the difference of
the images x and G(IG(x)), not that of the noise z and IG(x): where G maps several z to one image, any of them will do.
IG(x), the code of a real image x, tells what x shows: the image whose code is nearest to it looks similar to x.

    python inverse_gen.py --quick                            # cartoon faces within three minutes on two CPU cores
    python inverse_gen.py --data photos/ --out runs/photos   # the paper's set-up on a folder of images
    python inverse_gen.py --method direct --out runs/direct  # another way to train IG: by the noise, not the images

paper -> code
    Section 3    noise z, x = G(z), z' = IG(x), x' = G(z'), where G(z) is generate(G, z); E of Eq. 1 is IG
    Tables 3-6   G, D, IG, the BiGAN's D              Generator, Discriminator, InverseGenerator, PairDiscriminator
    Eq. 1        the BiGAN, a baseline                bigan_losses; --method bigan
    Eq. 2        gradient search for z, a baseline    search_codes; --method search
    Eq. 3        direct training, a baseline          direct_losses; --method direct
    Eq. 4        the DCGAN                            gan_losses; discriminator_loss, generator_loss
    Eq. 5, 7     cross-entropy V(x)                   cross_entropy
    Algorithm 1  the paper's AEGAN, Eq. 6 to 8        aegan_losses, train_step (not the AEGAN of aegan.py)
    Figure 2     reconstructed samples                save_figures
    Table 1      samples and their reconstructions    measure_inversion (dhash_similarity), dhash
    Figures 3, 4 search by changed and by new images  change_images, save_found; measure_search (search_top1_...)
    Table 2      labels in which found images agree   measure_search, label_agreement
    Figure 5     blurred images restored              save_figures; measure_inversion (deblur_l1_after)

Rulings, where the paper is silent or contradicts itself
    - Table 3 is of 64x64 images. 16x16 and 32x32 leave out the widest layers.
    - In figures and results, and in G once it is frozen, batch norm uses its running averages: G is one fixed function.
    - The paper gives no number of steps. We take 50,000 for each of two stages; 100,000 in all for bigan and search.
    - Eq. 3 has labels, Section 4.1 has none. We use none. Eq. 3 and 5 are means over dimensions or pixels.
    - Eq. 8 prints a plain gradient step, the Appendix has Adam. We use Adam.
    - Eq. 2 has no start, rate or end. We start from z = 0 and keep z in [-1, 1]; --search-rate, --search-steps.
    - The paper gives no sizes. Ours: dHash 9x8 grey pixels, pHash 32x32, histogram 8x8x8 bins, blur 1/16 of the side.
Departures
    - G minimises -log D(G(z)), as DCGAN does. G and IG of the BiGAN minimise D's loss with real and fake swapped,
      as in BiGAN's code.
    - D and G step at once; in DCGAN D is first. As in DCGAN, D(x) and D(G(z)) are batch-normalised separately.
    - The two kinds of pairs of the BiGAN go through D in one batch: when they went in two, samples collapsed.
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

from common import DataError, draw_images, load_data, place_images, save_grid

NAME = "inverse_gen"
METHODS = ("aegan", "direct", "bigan", "search")  # Section 4.1; search: Eq. 2
COLUMNS = ("L_D", "L_G", "L_IG")  # of log.csv
IMAGE_SIZES = {16: 2, 32: 3, 64: 4}  # side of the images: how often it is halved to reach 4x4
LEAK = 0.2  # slope of the leaky ReLU, DCGAN's
BETAS = (0.5, 0.999)  # 0.5 is the Appendix's
INITIAL_STD = 0.02  # of weights, DCGAN's
EAGER_STEPS = 3  # run before a CUDA graph is recorded, so that libraries have chosen algorithms and Adam has moments
AT_LEAST_1 = ("steps", "gan_steps", "search_steps", "gallery", "batch_size", "latent_dim", "channels")  # options
AT_LEAST_1 += ("log_every", "save_every")
AT_LEAST_0 = ("lr", "search_rate")
MAY_CHANGE = ("data", "steps", "log_every", "save_every", "search_steps", "search_rate", "gallery")  # with --resume
QUICK = dict(image_size=16, channels=32, latent_dim=32, gan_steps=2500, steps=4000, gallery=2000, save_every=1000)


# ---------------------------------------------------------------------------------------------------------- networks


def conv_widths(image_size, channels):
    """Widths of layers from the image to 4x4, in D and IG; G has them in reverse. S = 64: channels * 1, 2, 4, 8."""
    return [channels * 2**i for i in range(IMAGE_SIZES[image_size])]


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
        layers = [nn.Linear(latent_dim, widths[0] * 4 * 4, bias=False), nn.Unflatten(1, (widths[0], 4, 4))]
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [nn.BatchNorm2d(c_in), nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 5, 2, 2, 1, bias=False)]
        super().__init__(*layers, nn.BatchNorm2d(channels), nn.ReLU(), nn.ConvTranspose2d(channels, 3, 5, 2, 2, 1))


class Discriminator(nn.Sequential):
    """D, Table 4: images x [N, 3, S, S] in [0, 1] -> logits [N, 1], positive for real ones."""

    def __init__(self, image_size, channels):
        widths = conv_widths(image_size, channels)
        super().__init__(conv_stack(3, widths, nn.LeakyReLU(LEAK)), nn.Flatten(), nn.Linear(widths[-1] * 4 * 4, 1))


class InverseGenerator(nn.Sequential):
    """IG, Table 5: images x [N, 3, S, S] in [0, 1] -> latents z' [N, Z] in [-1, 1]."""

    def __init__(self, image_size, channels, latent_dim):
        widths = conv_widths(image_size, channels)
        layers = [conv_stack(3, widths, nn.ReLU()), nn.Flatten(), nn.Linear(widths[-1] * 4 * 4, latent_dim), nn.Tanh()]
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
    """G, D and, unless the method is search, IG, in training mode."""
    if method not in METHODS or image_size not in IMAGE_SIZES:
        raise ValueError(f"method {method}, size {image_size}: there are {METHODS} and {list(IMAGE_SIZES)}")
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
    """Eq. 4 and Eq. 1 as D minimises them: -E[log D(real)] - E[log(1 - D(fake))]. d_real, d_fake: D's logits [N, 1];
    DCGAN: of x and G(z); BiGAN: of (x, IG(x)) and (G(z), z)."""
    return F.softplus(-d_real).mean() + F.softplus(d_fake).mean()


def generator_loss(d_fake):
    """In place of Eq. 4's E[log(1 - D(G(z)))], for G to minimise: -E[log D(G(z))]. d_fake: D's logits [N, 1]."""
    return F.softplus(-d_fake).mean()


def cross_entropy(logits, x):
    """Eq. 5, Eq. 7, V(x): -x log x' - (1 - x) log(1 - x'), the mean over pixels, which is least where x' = x. x: images
    [N, 3, S, S] in [0, 1]. logits [N, 3, S, S]: what the network G gives for a code, x' before its sigmoid."""
    return F.binary_cross_entropy_with_logits(logits, x)


def gan_losses(nets, x, z):
    """The DCGAN, Eq. 4, in training mode: images x [N, 3, S, S] in [0, 1], latents z [M, Z] -> L_D for D, L_G for G."""
    d_real, d_fake = nets["D"](x), nets["D"](generate(nets["G"], z))
    return {"L_D": discriminator_loss(d_real, d_fake), "L_G": generator_loss(d_fake)}


def aegan_losses(nets, _, z):
    """AEGAN, Algorithm 1: latents z [N, Z] in [-1, 1] -> L_IG for IG to minimise. Real images are not used. G has to be
    in evaluation mode, IG in training mode. A plain backward() would reach G, too: see train_step."""
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
    """The BiGAN, Eq. 1, in training mode: x [N, 3, S, S] in [0, 1], latents z [M, Z] -> L_D for D, L_G for G and IG."""
    images = torch.cat([x, generate(nets["G"], z)])
    latents = torch.cat([nets["IG"](x), z])
    d_real, d_fake = nets["D"](images, latents).split([len(x), len(z)])  # of (x, IG(x)) and (G(z), z)
    swapped = discriminator_loss(d_real=d_fake, d_fake=d_real)  # G and IG want D's answers swapped
    return {"L_D": discriminator_loss(d_real, d_fake), "L_G": swapped}


LOSSES = {"gan": gan_losses, "aegan": aegan_losses, "direct": direct_losses, "bigan": bigan_losses}


# ---------------------------------------------------------------------------------------------------------- training


def build_optimizer(nets, lr):
    """One Adam for all networks. It does not move those that got no gradient. capturable: for CUDA graphs."""
    return torch.optim.Adam(nets.parameters(), lr, BETAS, fused=True, capturable=True)


def make_inputs(images, latent_dim):
    """uint8 images [N, 3, S, S] -> x: the same in [0, 1]; z ~ U(-1, 1): [N, Z]."""
    return to_unit(images), torch.rand(len(images), latent_dim, device=images.device) * 2 - 1


def to_unit(images):
    """uint8 images in [0, 255] -> float32 in [0, 1]."""
    return images.float() / 255


def trainable(optimizer, *networks):
    """The parameters that require gradients, for backward's `inputs`. ValueError if the optimizer lacks one."""
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) not in updated for p in parameters):
        raise ValueError("the optimizer does not have all parameters of the networks")
    return parameters


def train_step(nets, optimizer, stage, x, z):
    """Update the networks that the stage (gan, aegan, direct or bigan) trains, by gradients taken before any network
    moves. Sets the networks' modes. Returns the losses: see LOSSES."""
    with_gan = stage in ("gan", "bigan")
    nets.train()
    nets["G"].train(with_gan)  # else G is frozen: in evaluation mode, and not among the inputs below
    losses = LOSSES[stage](nets, x, z)
    optimizer.zero_grad()  # sets gradients to None: Adam skips the parameters that get none below
    # Each backward fills the gradients of its `inputs` alone. So all losses share one forward pass, without detach.
    if with_gan:
        losses["L_D"].backward(inputs=trainable(optimizer, nets["D"]), retain_graph=True)
        generators = [nets["G"], nets["IG"]] if stage == "bigan" else [nets["G"]]
        losses["L_G"].backward(inputs=trainable(optimizer, *generators))
    else:
        losses["L_IG"].backward(inputs=trainable(optimizer, nets["IG"]))  # Algorithm 1, step 4: update IG alone
    optimizer.step()  # Eq. 8, by Adam
    return {name: loss.detach() for name, loss in losses.items()}


def stage_of(step, method, gan_steps):
    """Stage of a step: gan up to gan_steps, then the method (Section 3.2). bigan: always bigan; search: always gan."""
    if method == "bigan":
        return "bigan"
    return "gan" if method == "search" or step <= gan_steps else method


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


@torch.enable_grad()  # its callers have turned gradients off
def search_codes(G, steps, rate, x):
    """Eq. 2: from z = 0, repeats z <- z - alpha grad_z cross_entropy(G(z), x): x [N, 3, S, S] -> z [N, Z]. G: in
    evaluation mode. steps: how often. rate: alpha, for the mean over the pixels of an image."""
    z = torch.zeros(len(x), G[0].in_features, dtype=x.dtype, device=x.device)
    for _ in range(steps):
        z.requires_grad_()
        loss = len(x) * cross_entropy(G(z), x)  # the sum over the images of the mean over an image's pixels
        (gradient,) = torch.autograd.grad(loss, z)
        z = (z.detach() - rate * gradient).clamp(-1, 1)
    return z


def grey_pixels(x, height, width):
    """Images [N, 3, S, S] in [0, 1] -> [N, height, width] grey levels, whole numbers in 0..255."""
    return (255 * transforms.resize(transforms.rgb_to_grayscale(x), [height, width], antialias=True)).round()[:, 0]


def dhash(x):
    """Is a pixel brighter than its left neighbour, in 9x8 grey pixels: [N, 3, S, S] -> [N, 64] of 0 and 1."""
    grey = grey_pixels(x, height=8, width=9)
    return (grey[:, :, 1:] > grey[:, :, :-1]).flatten(1).float()


def phash(x):
    """Are the lowest 8x8 frequencies of 32x32 grey pixels above their median: [N, 3, S, S] -> [N, 64] of 0 and 1."""
    i = torch.arange(32, dtype=torch.float64, device=x.device)
    cosines = torch.cos(math.pi / 32 * (i + 0.5) * i[:8, None])  # (8, 32): the discrete cosine transform's first rows
    frequencies = (cosines @ grey_pixels(x, height=32, width=32).double() @ cosines.T).flatten(1)
    return (frequencies > frequencies.median(1, keepdim=True).values).float()


def colour_histogram(x):
    """Shares of an image's pixels in 8x8x8 boxes of colour: [N, 3, S, S] -> [N, 512]."""
    red, green, blue = (x * 8).long().clamp(0, 7).flatten(2).unbind(1)  # (N, S^2) each
    boxes = 64 * red + 8 * green + blue
    return torch.stack([image.bincount(minlength=512) for image in boxes]) / boxes.shape[1]


@torch.no_grad()
def describe(x, descriptors):
    """Images x [N, 3, S, S] in [0, 1] by each of the descriptors, functions by name: {name: [N, features]}."""
    rows = []
    for part in x.split(250):
        rows.append({name: function(part) for name, function in descriptors.items()})
        if len(rows) % 4 == 0:
            print(f"described {min(250 * len(rows), len(x))} of {len(x)} images", file=sys.stderr, flush=True)
    return {name: torch.cat([row[name] for row in rows]) for name in descriptors}


def distances(queries, gallery):
    """Distances between the rows of two results of describe: {name: [Q, M]}. L1 for hashes (how many bits differ) and
    histograms (from 0, equal, to 2, no colour in common), else the Euclidean distance."""
    found = {}
    for name in queries:
        power = 1.0 if name in ("dhash", "phash", "colour_histogram") else 2.0
        exact = "donot_use_mm_for_euclid_dist"  # so that an image's distance to itself is 0
        found[name] = torch.cdist(queries[name], gallery[name], p=power, compute_mode=exact)
    return found


def nearest(distance):
    """[Q, M]: in the row of each query, 1 at the nearest gallery image (1/k at each of k tied ones) and 0 elsewhere."""
    is_nearest = (distance == distance.min(1, keepdim=True).values).double()
    return is_nearest / is_nearest.sum(1, keepdim=True)


def label_agreement(distance, query_labels, gallery_labels):
    """Table 2: the share of labels equal in a query and its nearest gallery image. Labels: bool [Q, A] and [M, A]."""
    share_with_label = nearest(distance) @ gallery_labels.double()  # [Q, A]: of the nearest image, or k tied ones
    return torch.where(query_labels, share_with_label, 1 - share_with_label).mean().item()


def blur(x):
    """Gaussian blur, sigma 1/16 of the side, for Figure 5 and, our addition, Figure 3: [N, 3, S, S] -> [N, 3, S, S]."""
    sigma = x.shape[-1] / 16
    return transforms.gaussian_blur(x, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma] * 2)


def wear_sunglasses(x):
    """Black glasses at the eyes of a centred face (CelebA's or common.py's): [N, 3, S, S] -> [N, 3, S, S]."""
    place = (torch.arange(x.shape[-1], device=x.device) + 0.5) / x.shape[-1]  # of each pixel, from 0 to 1
    down = place[:, None] - 0.52  # how far below the eyes
    across = (place - 0.5).abs()  # how far from the nose, to either side
    glass = ((across - 0.11) / 0.095) ** 2 + (down / 0.075) ** 2 < 1  # an ellipse on each side
    bridge = (down.abs() < 0.02) & (across < 0.11)
    return torch.where(glass | bridge, 0.05, x)


def change_images(x):
    """Figure 3: images x [N, 3, S, S] in [0, 1], changed in four ways, blur and crop being ours: {name: same shape}."""
    margin = max(1, round(0.05 * x.shape[-1]))  # of the crop: the middle 0.9 are left
    return {
        "colour": transforms.adjust_saturation(transforms.adjust_hue(x, 0.1), 0.5),
        "sunglasses": wear_sunglasses(x),
        "blur": blur(x),
        "crop": transforms.resize(x[..., margin:-margin, margin:-margin], x.shape[2:], antialias=True).clamp(0, 1),
    }


def to_signed(x):
    """Images in [0, 1] -> in [-1, 1], as save_grid takes them, and as the other scripts measure differences."""
    return 2 * x - 1


@torch.no_grad()
def save_figures(nets, invert, data, z, out, step):
    """Saves samples_<step>.png, from the first 100 latents z [N, Z]. With invert also reconstructions_<step>.png, pairs
    of x and G(IG(x)) for 40 held-out images x, and Figures 2 and 5, of samples."""
    modes = [(module, module.training) for module in nets.modules()]
    nets.eval()
    samples = generate(nets["G"], z[:100])
    save_grid(out / f"samples_{step}.png", to_signed(samples))
    if invert:
        x = to_unit(data.heldout[:40].to(z.device))
        for name, images in {f"reconstructions_{step}.png": x, "figure2_pairs.png": samples[:40]}.items():
            again = generate(nets["G"], invert(images))
            save_grid(out / name, to_signed(images), to_signed(again), groups_per_row=5)
        blurred = blur(samples[:24])
        restored = generate(nets["G"], invert(blurred))
        triples = to_signed(samples[:24]), to_signed(blurred), to_signed(restored)
        captions = [["original"], ["blurred"], ["restored"]]  # for the first image of each batch below
        save_grid(out / "figure5_deblurred.png", *triples, groups_per_row=3, captions=captions)
    for module, training in modes:
        module.training = training


@torch.no_grad()
def save_found(out, descriptors, data, described):
    """Saves queries, each beside what codes, dHash, pHash and colours find. The queries of Figure 3: the gallery's
    first four images, changed, one row a change; of Figure 4: up to 64 held-out ones. Arguments: see measure_search."""
    codes = described["codes"]
    gallery = data.train[: len(codes)]
    four = to_unit(gallery[:4].to(codes.device))
    changed = torch.cat(list(change_images(four).values()))
    others = to_unit(data.heldout[:64].to(codes.device))
    captions = [[text] for text in ("query", "codes", "dHash", "pHash", "colours")]  # for each batch's first image
    for file, queries in {"figure3_changed.png": changed, "figure4_found.png": others}.items():
        found = distances(describe(queries, descriptors), described)
        best = [found[name].argmin(1).cpu() for name in ("codes", "dhash", "phash", "colour_histogram")]  # [Q] each
        shown = [queries.cpu(), *(to_unit(gallery[rows]) for rows in best)]
        save_grid(out / file, *map(to_signed, shown), groups_per_row=len(four), captions=captions)


def sample_diversity(samples, images):
    """Mean distance of two samples, divided by that of two images, both [N, 3, S, S]: 0 in total collapse."""
    return (torch.pdist(samples.flatten(1)).mean() / torch.pdist(images.flatten(1)).mean()).item()


@torch.no_grad()
def measure_inversion(nets, invert, data, z, count):
    """Table 1 and Figure 5, of images generated from z [N, Z]; reconstructions of up to count held-out images."""
    x = to_unit(data.heldout[:count].to(z.device))
    x_prime = torch.cat([generate(nets["G"], invert(part)) for part in x.split(250)])
    mean_image = to_unit(data.train.sum(dim=0) / len(data.train)).to(z.device)  # mean() takes no uint8; sum() does
    samples = generate(nets["G"], z)
    again = generate(nets["G"], invert(samples))
    restored = generate(nets["G"], invert(blur(samples)))
    return {
        "dhash_similarity": (dhash(samples) == dhash(again)).float().mean().item(),  # the share of equal bits
        "dhash_similarity_of_unlike": (dhash(x) == dhash(x.roll(1, dims=0))).float().mean().item(),  # chance
        "deblur_l1_before": F.l1_loss(to_signed(blur(samples)), to_signed(samples)).item(),
        "deblur_l1_after": F.l1_loss(to_signed(restored), to_signed(samples)).item(),
        "sample_diversity": sample_diversity(samples, x[: len(z)]),
        "heldout_l1": F.l1_loss(to_signed(x_prime), to_signed(x)).item(),
        "heldout_l1_of_mean_image": F.l1_loss(to_signed(mean_image).expand_as(x), to_signed(x)).item(),
    }


@torch.no_grad()
def measure_search(descriptors, data, described, count):
    """Table 2, where the data have attributes, and Figure 3, of up to count images. descriptors: as in describe, with
    networks in evaluation mode. described: describe() of the gallery, the first images to train on."""
    codes = described["codes"]
    results = {}
    if data.attributes:
        found = distances(describe(to_unit(data.heldout[:count].to(codes.device)), descriptors), described)
        found["any_image"] = torch.zeros_like(found["codes"])  # chance: all are tied
        labels = data.heldout_labels[:count].to(codes.device), data.train_labels[: len(codes)].to(codes.device)
        for name, distance in found.items():
            results[f"label_agreement_{name}"] = label_agreement(distance, *labels)
    originals = to_unit(data.train[: min(count, len(codes))].to(codes.device))
    for change, changed in change_images(originals).items():
        found = distances(describe(changed, descriptors), described)
        for name, distance in found.items():
            found_itself = nearest(distance).diagonal()  # query i is gallery image i, changed
            results[f"search_top1_{change}_{name}"] = found_itself.mean().item()
    return results


def measure(nets, invert, untrained, data, z, out, gallery):
    """All figures of merit, on images G(z), z [N, Z], and on held-out images. Saves Figures 3 and 4. untrained: an
    IG to compare with. gallery: how many of the images to train on are searched."""
    heldout_count, query_count = (1000, 256) if "IG" in nets else (64, 64)  # gradient search is slow
    modes = [(module, module.training) for module in nets.modules()]
    nets.eval()
    descriptors = {"codes": invert, "dhash": dhash, "phash": phash, "colour_histogram": colour_histogram}
    descriptors |= {"pixels": nn.Flatten(), "untrained": untrained.eval()}  # controls
    described = describe(to_unit(data.train[:gallery].to(z.device)), descriptors)
    save_found(out, descriptors, data, described)
    results = measure_inversion(nets, invert, data, z[:query_count], heldout_count)
    results |= measure_search(descriptors, data, described, query_count)
    for module, training in modes:
        module.training = training
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
    add("--method", choices=METHODS, default="aegan", help="how G is inverted: the paper's way, or one of Section 2's")
    add("--gan-steps", type=int, default=50_000, help="updates of the DCGAN before IG's (not for bigan and search)")
    add("--search-steps", type=int, default=200, help="of gradient search, Eq. 2, for every image")
    add("--search-rate", type=float, default=10.0, help="alpha of Eq. 2, for the mean over pixels")
    add("--gallery", type=int, default=20_000, help="training images that are searched (Section 4.2)")
    add("--data", default="faces", help="folder of images, searched recursively, or faces (cartoons), cifar10, mnist")
    add("--out", type=Path, default=f"runs/{NAME}", help="folder for pictures, log.csv, results.json, checkpoint.pt")
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
        if args.method == "search":
            parser.set_defaults(gallery=250, search_steps=50)  # each image takes long
    args = parser.parse_args(argv)  # again: what is given wins over these defaults
    for name in AT_LEAST_1 + AT_LEAST_0:
        least = 1 if name in AT_LEAST_1 else 0
        if not least <= getattr(args, name) < math.inf:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be finite and at least {least}")
    if args.method in ("aegan", "direct") and args.gan_steps >= args.steps:
        fail(f"--gan-steps {args.gan_steps} leave none of --steps {args.steps} for IG: change one of them")
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
    nets = build_networks(args.method, args.image_size, args.channels, args.latent_dim).to(device)
    optimizer = build_optimizer(nets, args.lr)
    z_shown = torch.rand(256, args.latent_dim, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1
    invert = nets["IG"] if "IG" in nets else partial(search_codes, nets["G"], args.search_steps, args.search_rate)
    config = {name: value for name, value in vars(args).items() if name not in ("out", "resume", "device", "no_graph")}
    begin, log = restore(checkpoint, args, data, nets, optimizer) if checkpoint else (0, "")
    print(f"{args.method} on {len(data.train)} images of {args.data}, {device}, step {begin}, in {out}/")

    images = place_images(data.train, device)
    start = time.perf_counter()
    for step in range(begin + 1, args.steps + 1):
        if step in (begin + 1, args.gan_steps + 1):  # this run's first step; the stage may change after gan_steps
            stage = stage_of(step, args.method, args.gan_steps)
            step_function = partial(train_step, nets, optimizer, stage)
            first_step = step
        inputs = make_inputs(draw_images(images, args.batch_size, device), args.latent_dim)
        if graph and step == first_step + EAGER_STEPS:
            step_function = record(step_function, inputs)  # executed below, like any step
        losses = step_function(*inputs)
        save_due = step % args.save_every == 0 or step == args.steps
        if not (save_due or step % args.log_every == 0 or step == 1):
            continue
        bad = [name for name, value in {**losses, **nets.state_dict()}.items() if not value.isfinite().all()]
        if bad:  # the weights are checked, too: they can be lost while the losses are still finite
            fail(f"{bad[0]} is not finite at step {step}: {out}/checkpoint.pt, if there is one, is of an earlier step")
        values = {name: loss.item() for name, loss in losses.items()}
        log = log or ",".join(["step", *COLUMNS]) + "\n"
        log += ",".join(str(number) for number in [step, *(values.get(name, "") for name in COLUMNS)]) + "\n"
        (out / "log.csv").write_text(log)
        rate = (step - begin) / (time.perf_counter() - start)
        left = timedelta(seconds=round((args.steps - step) / rate))
        terms = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        print(f"step {step}  {terms}  {rate:.1f} steps/s  {left} left", flush=True)
        if step == 1 and device.type == "cpu" and left > timedelta(hours=1):
            print("This is long for a CPU: --quick takes three minutes", flush=True)
        if save_due:
            save_figures(nets, None if stage == "gan" else invert, data, z_shown, out, step)
            state = {"networks": nets.state_dict(), "optimizer": optimizer.state_dict(), "images": data.checksum}
            state |= {"random": torch.get_rng_state(), "random_on_cuda": torch.cuda.get_rng_state_all()}
            torch.save({NAME: config, "step": step, "log": log, **state}, out / "checkpoint.tmp")
            (out / "checkpoint.tmp").replace(out / "checkpoint.pt")  # so it is whole at any moment

    if begin == args.steps or args.method == "search":  # no step was run, or all of stage gan: no reconstructions yet
        save_figures(nets, invert, data, z_shown, out, args.steps)
    untrained = build_networks("aegan", args.image_size, args.channels, args.latent_dim)["IG"].to(device)
    results = measure(nets, invert, untrained, data, z_shown, out, args.gallery)
    for name, value in results.items():
        print(f"{name:40}{value:10.3f}")
    (out / "results.json").write_text(json.dumps({**results, "steps": args.steps, "config": config}, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped: --resume goes on from the last checkpoint, if there is one", status=130)
