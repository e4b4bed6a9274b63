# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy", "pillow>=10.1"]
# ///
"""Adversarial training of variational auto-encoders for high fidelity image generation (Khan, Hayat, Barnes, 2018).

https://arxiv.org/abs/1804.10323
The generator is a variational auto-encoder: an encoder E from images to latents, a decoder G from latents to images.
The discriminator D, an auto-encoder too, learns to reconstruct real images x well and fake ones badly. The fakes are
x_g = G(noise) and x_v = G(E's latents of x). G learns to make images that D reconstructs well. As in BEGAN a number k
says how much D minds the fakes; a PID controller moves it so that the losses of real and fake images keep a ratio. x_v
has to resemble x in its pixels (L_e) and in its code in D (L_s, a similarity that is learned).

    python vae_began.py --quick                           # cartoon faces within three minutes on two CPU cores
    python vae_began.py --data img_align_celeba/ --out runs/celeba  # Figure 8, if list_attr_celeba.txt is beside --data
    python vae_began.py --model began --data cifar10 --image-size 32 --classifier inception    # a row of Table 1

paper -> code
    Figure 1     F_vae-e is E, F_vae-d is G           Encoder (theta_e), Decoder (theta_d)
    Figure 1     F_ae-e and F_ae-d are D's halves     Discriminator (theta_e', theta_d')
    Eq. 1        the likelihood of a VAE              not computed: L_e and L_n stand for it
    Eq. 2: L_e. Eq. 7: L_d, L_g, L_v. Eq. 9: L_s      vae_began_losses
    Eq. 3        KL loss of the VAE, L_n              kl_loss
    Eq. 4        reparameterisation                   reparameterise
    Eq. 5, 6     the losses without k, beta, gamma    vae_began_losses: Eq. 5 is L_dis with k = 1; Eq. 6 is L_fake
    Eq. 8        the discriminator's output           Discriminator
    Eq. 10, 11   eta, e_t; convergence (Section 3.4)  balance
    Eq. 12       PID controller                       Controller
    Eq. 13-15    L_dis, L_gen, L_enc                  vae_began_losses; which loss moves which network: train_step
    Algorithm 1  line 1: build_networks; 2: draw_images; 4: make_inputs; 3, 5 to 13: vae_began_losses, train_step
    Table 1      Inception score of three models      measure_inception; --model, began_losses
    Figures 2-4  samples; what D makes of them        save_figures. Section 5.2's claims, as numbers: l1_of_d, balance
    Figure 6     interpolation between real images    save_interpolations
    Figure 8     arithmetic with attributes           save_arithmetic, attribute_directions
    Left out     Figures 5 and 7 and the other rows of Table 1, which are of other papers' models

Rulings, where the paper is silent or contradicts itself
    - Eq. 7 prints L_g as |x - x_g'|. We use |x_g - x_g'|, as in L_v and in BEGAN, because x_g has no partner x.
    - Eq. 11 prints - L_g + alpha L_v. We use - (L_g + alpha L_v), as in Eq. 10 and in the convergence measure.
    - In Eq. 10 eta is a measured ratio (here eta_measured, of a batch), in Eq. 11 its set point 0.5 (here eta).
    - The text calls sigma_v the variance; Eq. 4 uses it as the standard deviation. E gives log-variances.
    - Near Eq. 2 the divisor |x| is called the size of the latent space. We take the number of values in x.
    - Section 4 draws z "from [0, 1]". We draw from N(0, I), as Eq. 3 says.
    - At the first step k, e_{t-1} and e_{t-2} are 0. k is kept in [0, 1], as in BEGAN.
    - The networks are BEGAN's as in carpedm20/BEGAN-tensorflow. Their width n is 128, here 64 for images below 128x128.
    - Section 4's three pairs of convolutions are those of 32x32: we use log2(S) - 2, four at 64x64.
    - 16 images a step and Z = 64 are BEGAN's. Adam's betas and initial weights are torch's.
    - Eq. 9 compares x with x_v, which needs E. BEGAN* + LSM of Table 1 has no E: we take an unrelated x_g for x_v.
    - Codes of real images are E's means. Figure 6 is of real images, as in its text; its caption says generated ones.
Departures
    - The KL divergence of Eq. 3 is averaged over the Z dimensions, as Eq. 9 is: as a sum it outweighs the other terms.
    - BEGAN has uniform z and a learning rate of its own. Here all three models have this paper's.
    - Algorithm 1 updates E, G and D in turn, from one forward pass. Here all gradients are taken before any update.
"""

import json
import math
import sys
import time
import warnings
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from common import DataError, draw_images, load_data, place_images, save_grid, to_float

NAME = "vae_began"
MODELS = {  # Table 1: beta, the weight of L_s, and the gains l1, l2, l3 of Eq. 12 (Section 4, BEGAN's in the last row)
    "vae-began": {"beta": 0.1, "gains": [1e-3, 1e-5, 1e-5]},
    "began-lsm": {"beta": 0.1, "gains": [1e-3, 1e-5, 1e-5]},
    "began": {"beta": 0.0, "gains": [1e-3, 0.0, 0.0]},
}
WIDTHS = {16: 64, 32: 64, 64: 64, 128: 128}  # side of the images: n, the width of their networks
BLOCKS = {16: 2, 32: 3, 64: 4, 128: 5}  # pairs of convolutions in a network: R = log2(S) - 2
EAGER_STEPS = 3  # run before a CUDA graph is recorded, so that libraries have chosen algorithms and Adam has moments
AT_LEAST_1 = ("steps", "batch_size", "latent_dim", "filters", "log_every", "save_every")  # options
AT_LEAST_0 = ("lr", "alpha", "beta", "gamma", "eta")
MAY_CHANGE = ("data", "steps", "log_every", "save_every", "classifier", "samples")  # --resume lets them differ
SPLITS = 10  # parts of the images, each with an Inception score of its own
QUICK = dict(image_size=16, filters=16, steps=1400, lr=1e-3, gamma=5.0, save_every=500)


# ---------------------------------------------------------------------------------------------------------- networks


def conv(c_in, c_out, stride=1):
    """3x3 convolution and ELU: [N, c_in, H, H] -> [N, c_out, H / stride, H / stride]."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), nn.ELU())


class Encoder(nn.Sequential):
    """Images [N, 3, S, S] in [-1, 1] -> [N, outputs]: blocks of n, 2n, 3n, ... channels; the side is halved between
    them, down to 8. It is E, with 2 Z outputs (means and log-variances), and the first half of D, with Z."""

    def __init__(self, image_size, filters, outputs):
        blocks = BLOCKS[image_size]
        layers = [conv(3, filters)]
        for i in range(1, blocks + 1):
            c_in = filters if i == 1 else (i - 1) * filters
            layers += [conv(c_in, i * filters), conv(i * filters, i * filters)]
            if i < blocks:
                layers.append(conv(i * filters, i * filters, stride=2))
        super().__init__(*layers, nn.Flatten(), nn.Linear(blocks * filters * 8 * 8, outputs))  # 8x8 pixels


class Decoder(nn.Sequential):
    """Latents [N, Z] -> images [N, 3, S, S], about in [-1, 1]: blocks of n channels; the side, 8 at first, is doubled
    between them. It is G, and the second half of D."""

    def __init__(self, image_size, filters, latent_dim):
        blocks = BLOCKS[image_size]
        layers = [nn.Linear(latent_dim, filters * 8 * 8), nn.Unflatten(1, (filters, 8, 8))]
        for i in range(1, blocks + 1):
            layers += [conv(filters, filters), conv(filters, filters)]
            if i < blocks:
                layers.append(nn.Upsample(scale_factor=2))
        super().__init__(*layers, nn.Conv2d(filters, 3, 3, 1, 1))


class Discriminator(nn.Module):
    """D: images x [N, 3, S, S] -> its reconstructions of them x' [N, 3, S, S], and its codes [N, Z]. Eq. 8."""

    def __init__(self, image_size, filters, latent_dim):
        super().__init__()
        self.encoder = Encoder(image_size, filters, latent_dim)
        self.decoder = Decoder(image_size, filters, latent_dim)

    def forward(self, x):
        z = self.encoder(x)
        return self.decoder(z), z


class Controller(nn.Module):
    """Eq. 12: k_t from k_{t-1} and e_t. gains: l1 (integral), l2 (proportional), l3 (differential).
    k, e_{t-1} and e_{t-2} are scalar buffers: they live on the device, and in the checkpoint."""

    def __init__(self, gains):
        super().__init__()
        self.gains = gains
        for name in ("k", "e_before", "e_before_that"):
            self.register_buffer(name, torch.zeros(()))

    @torch.no_grad()
    def update(self, e_t):
        """Move k by Eq. 11's error of this iteration, a scalar tensor. An error that is not finite changes nothing."""
        l1, l2, l3 = self.gains
        change = l1 * e_t + l2 * (e_t - self.e_before) + l3 * (e_t + self.e_before_that - 2 * self.e_before)  # Eq. 12
        usable = e_t.isfinite()
        self.k.copy_(torch.where(usable, (self.k + change).clamp(0, 1), self.k))
        self.e_before_that.copy_(torch.where(usable, self.e_before, self.e_before_that))
        self.e_before.copy_(torch.where(usable, e_t, self.e_before))


def build_networks(model, image_size, filters, latent_dim, gains):
    """G, D, the controller, and for "vae-began" E, with 2 Z outputs. ValueError for an unknown model or size."""
    if model not in MODELS or image_size not in WIDTHS:
        raise ValueError(f"model {model}, size {image_size}: there are {list(MODELS)} and {list(WIDTHS)}")
    nets = nn.ModuleDict({"G": Decoder(image_size, filters, latent_dim)})
    nets["D"] = Discriminator(image_size, filters, latent_dim)
    if model == "vae-began":
        nets["E"] = Encoder(image_size, filters, 2 * latent_dim)
    nets["controller"] = Controller(gains)
    return nets


# ------------------------------------------------------------------------------------------------------------ losses


def kl_loss(mean, log_variance):
    """Eq. 3, L_n: KL(N(mean, variance) || N(0, I)) in nats, the mean over dimensions. Both [N, Z]."""
    return ((mean**2 + log_variance.exp() - 1 - log_variance) / 2).mean()


def reparameterise(mean, log_variance, epsilon):
    """Eq. 4: z_v = mean + epsilon * sigma; the paper's mu_v is mean. All [N, Z]."""
    return mean + epsilon * (log_variance / 2).exp()


def balance(L_d, L_fake, eta):
    """eta_measured (Eq. 10, near eta in equilibrium), e_t (Eq. 11), convergence (Section 3.4). L_fake: Eq. 6."""
    e_t = eta * L_d - L_fake  # Eq. 11: eta L_d - (L_g + alpha L_v)
    return {"eta_measured": L_fake / L_d, "e_t": e_t, "convergence": L_d + e_t.abs()}


def vae_began_losses(nets, weights, x, z_g, epsilon):
    """Algorithm 1, one forward pass: images x [N, 3, S, S] in [-1, 1], z_g [M, Z], epsilon [N, Z] ~ N(0, I).
    Returns {name: scalar}: L_enc, L_gen and L_dis for E, G and D to minimise, their terms, k, and what balance gives.
    weights: alpha, beta, gamma, eta by name."""
    alpha, beta, gamma = weights["alpha"], weights["beta"], weights["gamma"]
    k = nets["controller"].k.clone()  # k_{t-1}: the controller writes k_t into the same tensor
    mean, log_variance = nets["E"](x).chunk(2, dim=1)
    z_v = reparameterise(mean, log_variance, epsilon)  # line 3
    # G and D run once, on all their inputs, which is faster; no layer mixes images.
    x_v, x_g = nets["G"](torch.cat([z_v, z_g])).split([len(x), len(z_g)])  # line 5
    lengths = [len(x), len(z_g), len(x)]
    x_prime, z_prime = nets["D"](torch.cat([x, x_g, x_v]))  # lines 6, 9
    x_prime_d, x_prime_g, x_prime_v = x_prime.split(lengths)
    z_d, z_prime_g, z_prime_v = z_prime.split(lengths)  # D's codes of x, x_g, x_v; no loss has z_prime_g
    L_e = F.l1_loss(x_v, x)  # line 7, Eq. 2
    L_n = kl_loss(mean, log_variance)  # line 7, Eq. 3
    L_s = F.l1_loss(z_prime_v, z_d)  # line 7, Eq. 9
    L_d = F.l1_loss(x_prime_d, x)  # line 10, Eq. 7
    L_g = F.l1_loss(x_prime_g, x_g)  # line 10, Eq. 7
    L_v = F.l1_loss(x_prime_v, x_v)  # line 10, Eq. 7
    L_fake = L_g + alpha * L_v  # Eq. 6
    L_enc = L_n + beta * L_s + gamma * L_e  # Eq. 15
    L_gen = L_fake + beta * L_s + gamma * L_e  # Eq. 14
    L_dis = L_d - k * L_fake  # Eq. 13, or with k = 1 Eq. 5
    losses = {"L_enc": L_enc, "L_gen": L_gen, "L_dis": L_dis, "L_e": L_e, "L_n": L_n, "L_s": L_s}
    return {**losses, "L_d": L_d, "L_g": L_g, "L_v": L_v, "k": k, **balance(L_d, L_fake, weights["eta"])}


def began_losses(nets, weights, x, z_g, epsilon=None):
    """The losses of BEGAN (beta = 0) and BEGAN* + LSM. There is no E, and epsilon is not used; L_s compares x with an
    x_g unrelated to it. Otherwise as vae_began_losses. ValueError unless there are as many z_g as x."""
    if len(x) != len(z_g):
        raise ValueError(f"{len(x)} images, but {len(z_g)} latents")
    k = nets["controller"].k.clone()  # k_{t-1}, as above
    x_g = nets["G"](z_g)
    x_prime, z_prime = nets["D"](torch.cat([x, x_g]))
    x_prime_d, x_prime_g = x_prime.chunk(2)
    z_d, z_prime_g = z_prime.chunk(2)
    L_d, L_g = F.l1_loss(x_prime_d, x), F.l1_loss(x_prime_g, x_g)  # Eq. 7
    L_s = F.l1_loss(z_prime_g, z_d)  # Eq. 9
    L_gen = L_g + weights["beta"] * L_s  # Eq. 14
    L_dis = L_d - k * L_g  # Eq. 13
    losses = {"L_gen": L_gen, "L_dis": L_dis, "L_s": L_s, "L_d": L_d, "L_g": L_g, "k": k}
    return {**losses, **balance(L_d, L_g, weights["eta"])}


LOSSES = {"vae-began": vae_began_losses, "began-lsm": began_losses, "began": began_losses}


# ---------------------------------------------------------------------------------------------------------- training


def build_optimizer(nets, lr):
    """One Adam for all networks, since they all take their step at the same time. capturable: for CUDA graphs."""
    return torch.optim.Adam(nets.parameters(), lr, fused=True, capturable=True)


def make_inputs(images, latent_dim):
    """uint8 images [N, 3, S, S] -> x: the same in [-1, 1]; z_g and epsilon ~ N(0, I): [N, Z]."""
    z_g, epsilon = torch.randn(2, len(images), latent_dim, device=images.device)  # unpacked: two of [N, Z]
    return to_float(images), z_g, epsilon


def trainable(optimizer, *networks):
    """The parameters that require gradients, for backward's `inputs`. ValueError if the optimizer lacks one."""
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) not in updated for p in parameters):
        raise ValueError("the optimizer does not have all parameters of the networks")
    return parameters


def train_step(nets, optimizer, model, weights, x, z_g, epsilon):
    """Update every network, by gradients all taken before any network moves; then update k. Returns the losses."""
    losses = LOSSES[model](nets, weights, x, z_g, epsilon)
    optimizer.zero_grad()
    # Each backward fills the gradients of its `inputs` alone. So all losses share one forward pass, without detach.
    if "E" in nets:
        losses["L_enc"].backward(inputs=trainable(optimizer, nets["E"]), retain_graph=True)  # line 8: theta_e
    losses["L_gen"].backward(inputs=trainable(optimizer, nets["G"]), retain_graph=True)  # line 11: theta_d
    losses["L_dis"].backward(inputs=trainable(optimizer, nets["D"]))  # line 13: theta_e', theta_d'
    optimizer.step()
    nets["controller"].update(losses["e_t"])  # line 12; L_dis had k_{t-1}
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


@torch.no_grad()
def encode(nets, x):
    """The codes of images x [N, 3, S, S] in [-1, 1]: E's means [N, Z]."""
    mean, log_variance = nets["E"](x).chunk(2, dim=1)
    return mean


def save_interpolations(path, nets, x_1, x_2, count=8):
    """Figure 6: a row is x_1, then count images from E(x_1) straight to E(x_2), then x_2. x_1, x_2: [N, 3, S, S]."""
    z_1, z_2 = encode(nets, x_1), encode(nets, x_2)
    between = [nets["G"](torch.lerp(z_1, z_2, i / (count - 1))) for i in range(count)]
    save_grid(path, x_1, *between, x_2, groups_per_row=1)  # row i: image i of each argument, side by side


def attribute_directions(nets, data, device):
    """Section 5.5: for each attribute, the mean code of training images with it minus that of those without: [A, Z]."""
    codes = torch.cat([encode(nets, to_float(part.to(device))) for part in data.train.split(250)])
    return torch.stack([codes[has].mean(0) - codes[~has].mean(0) for has in data.train_labels.to(device).T])


def save_arithmetic(path, nets, data, z, strengths=(-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2)):
    """Figure 8: for each of A attributes its name and a row of G(z + strength * direction). z: [N, Z], of any N."""
    directions = attribute_directions(nets, data, z.device).nan_to_num()  # nan where all images have it, or none
    z = z[torch.arange(len(directions)) % len(z)]  # [A, Z]: a latent for each attribute, again from the first if A > N
    tiles = [nets["G"](z + strength * directions) for strength in strengths]  # a column of A images each
    names = [name.replace("_", "\n") for name in data.attributes]  # a word a line, so that it fits in a tile
    captions = [names] + [[f"{strength:+g}"] for strength in strengths]  # a list for each column, from its top
    white = torch.ones_like(tiles[0])  # a first column of white tiles, for the names
    save_grid(path, white, *tiles, groups_per_row=1, captions=captions)


@torch.no_grad()
def save_figures(nets, data, z, out, step):
    """Figures 2 and 3, samples_<step>.png: G(z[:100]), z [N, Z]; Figure 4: D on real and fake. With E also Figure 6,
    reconstructions_<step>.png of up to 40 held-out images and, with attributes, Figure 8."""
    x = to_float(data.heldout[:40]).to(z.device)
    save_grid(out / f"samples_{step}.png", nets["G"](z[:100]))
    x_d = x[:10]
    x_g = nets["G"](z[: len(x_d)])
    captions = [["fake"], ["D(fake)"], ["real"], ["D(real)"]]  # for the first image of each batch below
    fours = [x_g, nets["D"](x_g)[0], x_d, nets["D"](x_d)[0]]
    save_grid(out / "figure4_discriminator.png", *fours, groups_per_row=2, captions=captions)
    if "E" in nets:
        save_grid(out / f"reconstructions_{step}.png", x, nets["G"](encode(nets, x)), groups_per_row=5)
        pairs = min(5, len(x) // 2)
        save_interpolations(out / "figure6_interpolations.png", nets, x[:pairs], x[pairs : 2 * pairs])
        if data.attributes:
            save_arithmetic(out / "figure8_arithmetic.png", nets, data, z)


def sample_diversity(samples, images):
    """Mean distance of two samples, divided by that of two images, both [N, 3, S, S]: 0 in total collapse."""
    return (torch.pdist(samples.flatten(1)).mean() / torch.pdist(images.flatten(1)).mean()).item()


def inception_score(probabilities, splits=SPLITS):
    """Table 1: exp(E KL(p(y|x) || p(y))), its mean and standard deviation over the splits (Salimans et al. 2016).
    probabilities: p(y|x) of images x, [N, classes], N >= splits. A score is between 1 and the number of classes."""
    scores = []
    for p in probabilities.tensor_split(splits):
        kl = (torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0))).sum(1)  # xlogy(p, q): p log q
        scores.append(kl.mean().exp())
    return torch.stack(scores).mean().item(), torch.stack(scores).std(correction=0).item()


def load_classifier(name, image_size, device):
    """The classifier of --classifier: images [N, 3, S, S] in [-1, 1] -> (logits [N, C], features: not used).

    `none`: None; `inception`: torchvision's Inception v3, cached or downloaded; else `name` is a TorchScript file.
    DataError if it cannot be had, or does not give such logits.
    """
    if name == "none":
        return None
    if name == "inception":
        try:
            net = torchvision.models.inception_v3(weights="IMAGENET1K_V1", transform_input=False)  # so it takes [-1, 1]
        except (OSError, RuntimeError) as error:  # no network, or a damaged file
            file = f"{torch.hub.get_dir()}/checkpoints/inception_v3_google-0cc3c7bd.pth"
            raise DataError(f"--classifier inception needs {file}, which cannot be had: {error}") from error
        net.eval().to(device)
        return lambda x: (net(F.interpolate(x, (299, 299), mode="bilinear")), None)  # [N, 1000]
    problem = f"--classifier {name} is no TorchScript taking [N, 3, {image_size}, {image_size}] to (logits, features)"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated
            classifier = torch.jit.load(name, map_location=device).eval()
        logits, features = classifier(torch.zeros(2, 3, image_size, image_size, device=device))
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{problem}: {error}") from error
    if logits.ndim != 2 or len(logits) != 2:
        raise DataError(problem)
    return classifier


def l1_of_d(D, x):
    """Eq. 7: L_d, L_g or L_v of any number of images x [N, 3, S, S]."""
    return F.l1_loss(torch.cat([D(part)[0] for part in x.split(250)]), x)


@torch.no_grad()
def measure(nets, data, z, alpha, eta, classifier, count):
    """The figures of merit, of up to 1,000 held-out images and as many new samples; sample_diversity is of G(z)."""
    G, D = nets["G"], nets["D"]
    x = to_float(data.heldout[:1000]).to(z.device)
    z_g, epsilon = torch.randn(2, len(x), z.shape[1], generator=torch.Generator().manual_seed(0)).to(z.device)
    L_d = l1_of_d(D, x)
    L_g = l1_of_d(D, torch.cat([G(part) for part in z_g.split(250)]))
    L_fake = L_g
    results = {"l1_of_d_on_real": L_d.item(), "l1_of_d_on_samples": L_g.item(), "k": nets["controller"].k.item()}
    results["sample_diversity"] = sample_diversity(G(z), x[: len(z)])
    if "E" in nets:
        mean, log_variance = torch.cat([nets["E"](part) for part in x.split(250)]).chunk(2, dim=1)
        x_v = torch.cat([G(part) for part in reparameterise(mean, log_variance, epsilon).split(250)])
        L_fake = L_g + alpha * l1_of_d(D, x_v)  # Eq. 6
        x_of_mean = torch.cat([G(part) for part in mean.split(250)])
        mean_image = to_float(data.train.sum(dim=0) / len(data.train)).to(z.device)  # mean() takes no uint8; sum() does
        results["heldout_l1"] = F.l1_loss(x_of_mean, x).item()
        results["heldout_l1_of_mean_image"] = F.l1_loss(mean_image.expand_as(x), x).item()
        results["kl_nats"] = z.shape[1] * kl_loss(mean, log_variance).item()
    balanced = balance(L_d, L_fake, eta)
    results["eta_measured"] = balanced["eta_measured"].item()
    results["convergence_measure"] = balanced["convergence"].item()
    if classifier:
        results |= measure_inception(nets, data, z.shape[1], classifier, count, z.device)
    return results


@torch.no_grad()
def measure_inception(nets, data, latent_dim, classifier, count, device):
    """Table 1: Inception scores by the classifier, of up to count training images and of as many samples."""
    reals = data.train[:count]
    z = torch.randn(len(reals), latent_dim, generator=torch.Generator().manual_seed(1)).to(device)
    p_of_samples = torch.cat([classifier(nets["G"](part).clamp(-1, 1))[0].softmax(dim=1) for part in z.split(100)])
    p_of_reals = torch.cat([classifier(to_float(part).to(device))[0].softmax(dim=1) for part in reals.split(100)])
    score, deviation = inception_score(p_of_samples)
    score_of_real, _ = inception_score(p_of_reals)
    return {"inception_score": score, "inception_score_std": deviation, "inception_score_of_real": score_of_real}


# ------------------------------------------------------------------------------------------------------ command line


def fail(message, status=2):
    """End the program with one line on the standard error."""
    print(f"{NAME}.py: error: {message.splitlines()[0]}", file=sys.stderr)
    sys.exit(status)


def parse_args(argv):
    """The arguments and, with --resume, the checkpoint of the run in --out, else None."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.error = fail
    add = parser.add_argument  # those with default=SUPPRESS get their default from set_defaults, below
    quick = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in QUICK.items())
    add("--model", choices=MODELS, default="vae-began", help="the paper's model, or another row of Table 1")
    add("--alpha", type=float, default=0.3, help="weight of L_v (Section 4)")
    add("--beta", type=float, default=SUPPRESS, help="weight of L_s; 0.1 (Section 4), or 0 for --model began")
    add("--gamma", type=float, default=0.1, help="weight of L_e (Section 4)")
    add("--eta", type=float, default=0.5, help="set point of the balance (Section 4)")
    gains = "l1, l2, l3 of Eq. 12; 1e-3, 1e-5, 1e-5 (Section 4), or 1e-3, 0, 0 for --model began"
    add("--gains", type=float, nargs=3, metavar=("I", "P", "D"), default=SUPPRESS, help=gains)
    files = "none, inception, or a TorchScript file: images to (logits, features). tests/make_classifier.py makes one"
    add("--classifier", default="none", help=files)
    add("--samples", type=int, default=50_000, help="images for the Inception score; at most the training set's size")
    add("--data", default="faces", help="folder of images, searched recursively, or faces (cartoons), cifar10, mnist")
    add("--out", type=Path, default=f"runs/{NAME}", help="folder for pictures, log.csv, results.json, checkpoint.pt")
    add("--resume", action="store_true", help="go on with the run in --out, with its settings; --steps may be larger")
    add("--quick", action="store_true", help=f"faces within three minutes on two CPU cores: {quick}")
    add("--steps", type=int, default=300_000, help="updates of every network (Section 4)")
    add("--batch-size", type=int, default=16, help="images a step (BEGAN's)")
    add("--image-size", type=int, choices=WIDTHS, default=64, help="side of the images in pixels (Figures 2, 3)")
    add("--latent-dim", type=int, default=64, help="dimensions Z of the latents (BEGAN's)")
    add("--filters", type=int, default=64, help="n, width of the networks (128 where --image-size is 128)")
    add("--lr", type=float, default=5e-5, help="learning rate (Section 4)")
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
    else:
        parser.set_defaults(**MODELS[args.model], filters=WIDTHS[args.image_size])
        if args.quick:
            parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)  # again: what is given wins over these defaults
    for name in AT_LEAST_1 + AT_LEAST_0:
        least = 1 if name in AT_LEAST_1 else 0
        if not least <= getattr(args, name) < math.inf:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be finite and at least {least}")
    if args.samples < SPLITS:
        fail(f"--samples {args.samples}: must be at least {SPLITS}")
    if not all(0 <= gain < math.inf for gain in args.gains):
        fail(f"--gains {args.gains}: must be finite and at least 0")
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
    nets = build_networks(args.model, args.image_size, args.filters, args.latent_dim, args.gains).to(device)
    optimizer = build_optimizer(nets, args.lr)
    weights = {"alpha": args.alpha, "beta": args.beta, "gamma": args.gamma, "eta": args.eta}
    z_shown = torch.randn(256, args.latent_dim, generator=torch.Generator().manual_seed(0)).to(device)
    config = {name: value for name, value in vars(args).items() if name not in ("out", "resume", "device", "no_graph")}
    begin, log = restore(checkpoint, args, data, nets, optimizer) if checkpoint else (0, "")
    print(f"{args.model} on {len(data.train)} images of {args.data}, {device}, step {begin}, in {out}/")

    images = place_images(data.train, device)
    step_function = partial(train_step, nets, optimizer, args.model, weights)
    start = time.perf_counter()
    for step in range(begin + 1, args.steps + 1):
        inputs = make_inputs(draw_images(images, args.batch_size, device), args.latent_dim)
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
    results = measure(nets, data, z_shown, args.alpha, args.eta, classifier, args.samples)
    for name, value in results.items():
        print(f"{name:26}{value:10.3f}")
    (out / "results.json").write_text(json.dumps({**results, "steps": args.steps, "config": config}, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped: --resume goes on from the last checkpoint, if there is one", status=130)
