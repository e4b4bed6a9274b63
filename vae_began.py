# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy", "pillow>=10.1"]
# ///
"""Adversarial training of variational auto-encoders for high fidelity image generation (Khan, Hayat, Barnes, 2018).

The generator is a variational auto-encoder: an encoder E from images to latents, a decoder G from latents to images.
The discriminator D is an auto-encoder too. It learns to reconstruct real images x well, and fake ones badly: those that
G makes of noise, x_g, and of E's latents, x_v. G learns to make images that D reconstructs well. As in BEGAN a number k
says how much D minds the fakes; a PID controller moves it so that the losses of real and fake images keep a ratio. E
and G learn to give back x: in its pixels, and in what D's encoder makes of it, a similarity that is learned.

    python vae_began.py --quick                           # cartoon faces within three minutes on two CPU cores
    python vae_began.py --data photos/ --out runs/photos  # the paper's set-up on a folder of images
    python vae_began.py --model began --data cifar10 --image-size 32 --out runs/began    # a row of Table 1

paper -> code
    Figure 1     the two auto-encoders                Encoder, Decoder; Discriminator has one of each
    Eq. 2, 3     pixel loss and KL loss of the VAE    pixel_loss, kl_loss
    Eq. 4        reparameterisation                   reparameterise
    Eq. 5, 13    the discriminator's loss             discriminator_loss
    Eq. 6, 14    the decoder's loss                   fake_loss, decoder_loss
    Eq. 7        what D makes of its images           autoencoder_loss (L_d, L_g, L_v)
    Eq. 8        the discriminator's output           Discriminator
    Eq. 9        learned similarity metric            similarity_loss
    Eq. 10, 11   balance of real and fake losses      balance, balance_error
    Eq. 12       PID controller                       Controller
    Eq. 15       the encoder's loss                   encoder_loss
    Section 3.4  convergence measure                  convergence_measure
    Algorithm 1                                       all_losses, train_step
    Table 1      Inception score of three models      inception_score; --model, MODELS
    Figures 2, 3 samples of 64x64, 128x128            save_samples
    Figure 4     fakes, reals, D's reconstructions    save_discriminations
    Figure 6     interpolation between real images    save_interpolations
    Figure 8     arithmetic with attributes           save_arithmetic, attribute_directions

Rulings, where the paper is silent or misprinted
    - Eq. 7 prints L_g as |x - x_g'|, but x_g has no partner x: |x_g - x_g'|, as in L_v and in BEGAN. Eq. 11 prints
      - L_g + alpha L_v: - (L_g + alpha L_v), as in Eq. 10 and in the convergence measure.
    - Eq. 10 measures eta; in Eq. 11 it is the constant 0.5. The measured ratio is logged.
    - k and the two errors before the first are 0 at the start; k is kept in [0, 1], as in BEGAN.
    - The networks are BEGAN's, to which the paper refers: log2(S) - 2 pairs of convolutions (the paper's "three" are
      those of 32x32), i n channels in the encoder's i-th, n in the decoder's; 64 latents from N(0, I), 16 images.
    - The KL divergence of Eq. 3 is averaged over the latents, as Eq. 9 is. As a sum it outweighs the other terms, and
      E's latents say nothing about the image.
    - BEGAN has no E, so no L_n, L_e and L_v; no L_s; and it moves k in proportion to the error (l1 alone). "BEGAN* +
      LSM" has the paper's controller, and an L_s of x and x_g.
    - Algorithm 1 updates E, G, k and D in turn, from one forward pass; here all gradients are taken before the first
      update, and D's loss has the k before its own, as in Eq. 13.
    - The codes of real images are the means that E gives; Figure 8's are of training images, and its attributes, unless
      named, the five that are nearest to even.
    - Inception scores are by torchvision's Inception v3, another network than the paper's: compare them with that of
      real images, and among themselves.
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
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from common import DataError, draw_images, load_data, place_images, save_grid, to_float

MODELS = {  # Table 1: beta, the weight of L_s, and the gains l1, l2, l3 of Eq. 12 (Section 4; BEGAN's)
    "vae-began": {"beta": 0.1, "gains": [1e-3, 1e-5, 1e-5]},
    "began-lsm": {"beta": 0.1, "gains": [1e-3, 1e-5, 1e-5]},
    "began": {"beta": 0.0, "gains": [1e-3, 0.0, 0.0]},
}
IMAGE_SIZES = (16, 32, 64, 128)
QUICK = {"image_size": 16, "filters": 16, "steps": 1400, "lr": 1e-3, "gamma": 5.0}
QUICK |= {"inception_samples": 0, "save_every": 500}


# ---------------------------------------------------------------------------------------------------------- networks


def conv(c_in, c_out, stride=1):
    """3x3 convolution and ELU: [N, c_in, H, H] -> [N, c_out, H / stride, H / stride]."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), nn.ELU())


class Encoder(nn.Sequential):
    """Images [N, 3, S, S] -> [N, outputs]: blocks of n, 2n, 3n, ... channels, halved in between down to 8x8.

    E, with 2 Z outputs, means and log-variances; and the first half of D, with Z.
    """

    def __init__(self, image_size, filters, outputs):
        blocks = image_size.bit_length() - 3  # R = log2(S) - 2
        layers = [conv(3, filters)]
        for i in range(1, blocks + 1):
            layers += [conv(max(i - 1, 1) * filters, i * filters), conv(i * filters, i * filters)]
            if i < blocks:
                layers.append(conv(i * filters, i * filters, stride=2))
        super().__init__(*layers, nn.Flatten(), nn.Linear(64 * blocks * filters, outputs))


class Decoder(nn.Sequential):
    """Latents [N, Z] -> images [N, 3, S, S], about in [-1, 1]: blocks of n channels, doubled in between from 8x8.

    G, and the second half of D.
    """

    def __init__(self, image_size, filters, latent_dim):
        blocks = image_size.bit_length() - 3
        layers = [nn.Linear(latent_dim, 64 * filters), nn.Unflatten(1, (filters, 8, 8))]
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
    """Eq. 12: k, moved by the error of the balance with the gains l1 (integral), l2 (proportional), l3 (differential).

    k and the last two errors are scalar buffers: they live on the device, and in the checkpoint.
    """

    def __init__(self, gains):
        super().__init__()
        self.gains = gains
        for name in ("k", "e_1", "e_2"):
            self.register_buffer(name, torch.zeros(()))

    @torch.no_grad()
    def update(self, e):
        """Move k by e, Eq. 11's error of this iteration, a scalar tensor."""
        l_1, l_2, l_3 = self.gains
        change = l_1 * e + l_2 * (e - self.e_1) + l_3 * (e + self.e_2 - 2 * self.e_1)
        self.k.add_(change).clamp_(0, 1)
        self.e_2.copy_(self.e_1)
        self.e_1.copy_(e)


def build_networks(model, image_size, filters, latent_dim, gains):
    """The networks of MODELS[model], E with two heads, mean and log-variance; and the controller."""
    nets = nn.ModuleDict({"G": Decoder(image_size, filters, latent_dim)})
    nets["D"] = Discriminator(image_size, filters, latent_dim)
    if model == "vae-began":
        nets["E"] = Encoder(image_size, filters, 2 * latent_dim)
    nets["controller"] = Controller(gains)
    return nets


# ------------------------------------------------------------------------------------------------------------ losses


def pixel_loss(x_v, x):
    """Eq. 2, L_e: |x - x_v|_1 / |x|, the mean over pixels. x_v, x: [N, 3, S, S]."""
    return F.l1_loss(x_v, x)


def kl_loss(mean, log_variance):
    """Eq. 3, L_n: KL(N(mean, variance) || N(0, I)) in nats, the mean over dimensions. Both [N, Z]."""
    return ((mean**2 + log_variance.exp() - 1 - log_variance) / 2).mean()


def reparameterise(mean, log_variance, epsilon):
    """Eq. 4: z_v = mean + epsilon * sigma. All [N, Z]."""
    return mean + epsilon * (log_variance / 2).exp()


def autoencoder_loss(x_prime, x):
    """Eq. 7: |x - x'|_1 / |x|, the mean over pixels: L_d of real images x, L_g of x_g, L_v of x_v. [N, 3, S, S]."""
    return F.l1_loss(x_prime, x)


def similarity_loss(z_prime, z_d):
    """Eq. 9, L_s: |z_d - z'|_1 / |z_d|, the mean over dimensions, of D's codes of real and fake images, [N, Z]."""
    return F.l1_loss(z_prime, z_d)


def fake_loss(L_g, L_v, alpha):
    """Eq. 6: L_g + alpha L_v."""
    return L_g + alpha * L_v


def balance(L_d, L_fake):
    """Eq. 10: (L_g + alpha L_v) / L_d, which is eta in equilibrium. L_fake: fake_loss."""
    return L_fake / L_d


def balance_error(L_d, L_fake, eta):
    """Eq. 11, e_t: eta L_d - (L_g + alpha L_v). L_fake: fake_loss."""
    return eta * L_d - L_fake


def discriminator_loss(L_d, L_fake, k):
    """Eq. 13 (Eq. 5 where k is 1), L_dis: L_d - k (L_g + alpha L_v). L_fake: fake_loss."""
    return L_d - k * L_fake


def decoder_loss(L_fake, L_s, L_e, beta, gamma):
    """Eq. 14, L_gen: L_g + alpha L_v + beta L_s + gamma L_e. L_fake: fake_loss."""
    return L_fake + beta * L_s + gamma * L_e


def encoder_loss(L_n, L_s, L_e, beta, gamma):
    """Eq. 15, L_enc: L_n + beta L_s + gamma L_e."""
    return L_n + beta * L_s + gamma * L_e


def convergence_measure(L_d, e):
    """Section 3.4: L_d + |eta L_d - L_g - alpha L_v|. e: balance_error."""
    return L_d + e.abs()


def all_losses(nets, x, z_g, epsilon, alpha, beta, gamma, eta):
    """Algorithm 1, one forward pass: images x [N, 3, S, S] in [-1, 1], noise z_g and epsilon [N, Z] -> {name: scalar}.

    `L_enc`, `L_gen` and `L_dis` are for E, G and D to minimise; the others are their terms, k, Eq. 10 and 11, and the
    convergence measure. Terms that a model lacks, without E or with beta 0 (no L_s), are left out, and count as 0.
    """
    G, D, k = nets["G"], nets["D"], nets["controller"].k.clone()
    terms = {}
    if "E" in nets:
        mean, log_variance = nets["E"](x).chunk(2, dim=1)
        x_v, x_g = G(torch.cat([reparameterise(mean, log_variance, epsilon), z_g])).chunk(2)
        terms["L_n"], terms["L_e"] = kl_loss(mean, log_variance), pixel_loss(x_v, x)
        images = (x, x_g, x_v)
    else:
        images = (x, G(z_g))
    x_prime, z_prime = (parts.chunk(len(images)) for parts in D(torch.cat(images)))
    terms |= {name: autoencoder_loss(*pair) for name, *pair in zip(("L_d", "L_g", "L_v"), x_prime, images)}
    if beta:
        terms["L_s"] = similarity_loss(z_prime[-1], z_prime[0])
    L_d, L_g, L_v, L_s, L_e = (terms.get(name, 0.0) for name in ("L_d", "L_g", "L_v", "L_s", "L_e"))
    L_fake = fake_loss(L_g, L_v, alpha)
    losses = {"L_gen": decoder_loss(L_fake, L_s, L_e, beta, gamma), "L_dis": discriminator_loss(L_d, L_fake, k)}
    if "E" in nets:
        losses["L_enc"] = encoder_loss(terms["L_n"], L_s, L_e, beta, gamma)
    e = balance_error(L_d, L_fake, eta)
    signals = {"k": k, "e": e, "balance": balance(L_d, L_fake), "convergence": convergence_measure(L_d, e)}
    return {**losses, **terms, **signals}


# ---------------------------------------------------------------------------------------------------------- training


def build_optimizers(nets, lr):
    """One Adam for each loss that is minimised, by the loss's name."""
    players = {"L_enc": "E", "L_gen": "G", "L_dis": "D"}
    return {
        loss: torch.optim.Adam(nets[name].parameters(), lr, fused=True, capturable=True)
        for loss, name in players.items()
        if name in nets
    }


def draw_batch(images, latent_dim):
    """x: the images uint8 [N, 3, S, S] in [-1, 1]; z_g and epsilon ~ N(0, I): [N, Z]."""
    return to_float(images), *torch.randn(2, len(images), latent_dim, device=images.device)


def train_step(nets, optimizers, x, z_g, epsilon, **weights):
    """One update of every network, all at the same point, then of k. Returns the losses there, as tensors."""
    losses = all_losses(nets, x, z_g, epsilon, **weights)
    for name, optimizer in optimizers.items():
        optimizer.zero_grad()
        losses[name].backward(inputs=optimizer.param_groups[0]["params"], retain_graph=True)
    for optimizer in optimizers.values():
        optimizer.step()
    nets["controller"].update(losses["e"])
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
    networks = [net for net in nets.modules() if isinstance(net, Encoder | Decoder)]  # D's two, too
    for net in networks if precision == "bf16" else ():
        net.forward = partial(forward_in_bfloat16, net.forward)


def forward_in_bfloat16(forward, *inputs):
    """A network's forward under autocast. Inputs and output: tensors, float32."""
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        return forward(*inputs).float()


# -------------------------------------------------------------------------------------------------------- evaluation


def encode(nets, x):
    """The codes of images x [N, 3, S, S] in [-1, 1]: E's means [N, Z]."""
    return nets["E"](x).chunk(2, dim=1)[0]


def save_samples(path, nets, z):
    """Figures 2 and 3: G(z), ten a row. z: [N, Z]."""
    save_grid(path, nets["G"](z))


def save_reconstructions(path, nets, x):
    """Pairs of images and what the VAE makes of them, (x, G(E(x))), five a row. x: [N, 3, S, S] in [-1, 1]."""
    save_grid(path, x, nets["G"](encode(nets, x)), columns=5)


def save_discriminations(path, nets, x, z):
    """Figure 4: twice four rows of ten: fakes x_g, D's reconstructions of them, real x, D's reconstructions of them.

    x: [20, 3, S, S] in [-1, 1], z: [20, Z].
    """
    x_g = nets["G"](z)
    rows = torch.stack([images.unflatten(0, (2, 10)) for images in (x_g, nets["D"](x_g)[0], x, nets["D"](x)[0])], dim=1)
    save_grid(path, rows.flatten(0, 2))


def save_interpolations(path, nets, x, columns=8):
    """Figure 6: five rows of x_1, images on the straight line from E(x_1) to E(x_2), x_2.

    x: images [10, 3, S, S] in [-1, 1].
    """
    x_1, x_2 = x[0::2], x[1::2]
    z_1, z_2 = encode(nets, x_1), encode(nets, x_2)
    between = [nets["G"](torch.lerp(z_1, z_2, i / (columns - 1))) for i in range(columns)]
    save_grid(path, torch.stack([x_1, *between, x_2], dim=1).flatten(0, 1), columns=columns + 2)


def attribute_directions(nets, data, names, device):
    """Section 5.5: for each named attribute, the mean code of training images with it minus that without: [A, Z]."""
    codes = torch.cat([encode(nets, to_float(part.to(device))) for part in data.train.split(250)])
    labels = data.train_labels[:, [data.attributes.index(name) for name in names]].to(device)
    return torch.stack([codes[has].mean(0) - codes[~has].mean(0) for has in labels.unbind(1)])


def save_arithmetic(path, nets, data, names, z, strengths=(-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2)):
    """Figure 8: for each named attribute a row of G(z + strength * direction), its name in the first tile.

    z: latents [len(names), Z] of generated images.
    """
    directions = attribute_directions(nets, data, names, z.device)
    images = [nets["G"](z + strength * directions) for strength in strengths]
    texts = [f"{strength:+g}" if strength != strengths[0] else name for name in names for strength in strengths]
    save_grid(path, torch.stack(images, dim=1).flatten(0, 1), columns=len(strengths), captions=[texts])


@torch.no_grad()
def save_figures(nets, data, z, out, step=None, attributes=()):
    """Into the folder out: Figures 2, 4, 6 and 8; with a step only samples_<step>.png and reconstructions_<step>.png.

    The images are the first held-out ones, the same in every run. z: latents [N, Z], of which 100 are shown.
    attributes: those of Figure 8. Figures that need an encoder are left out where there is none.
    """
    x = to_float(data.heldout[torch.arange(40) % len(data.heldout)].to(z.device))
    nets.eval()
    save_samples(out / ("figure2_samples.png" if step is None else f"samples_{step}.png"), nets, z[:100])
    if step is None:
        save_discriminations(out / "figure4_discriminator.png", nets, x[:20], z[:20])
    if "E" in nets:
        save_reconstructions(out / f"reconstructions{'' if step is None else f'_{step}'}.png", nets, x)
        if step is None:
            save_interpolations(out / "figure6_interpolations.png", nets, x[:10])
            if attributes:
                save_arithmetic(out / "figure8_arithmetic.png", nets, data, attributes, z[: len(attributes)])
    nets.train()


def sample_diversity(samples, images):
    """The mean distance of two samples over that of two images: about 1, or 0 in total collapse.

    samples: [N, 3, S, S], images: [M, 3, S, S], N, M > 1.
    """
    return (torch.pdist(samples.flatten(1)).mean() / torch.pdist(images.flatten(1)).mean()).item()


def inception_score(probabilities, splits=10):
    """Table 1: exp(E KL(p(y|x) || p(y))), its mean and standard deviation over the splits (Salimans et al. 2016).

    probabilities: p(y|x) of images x, [N, classes], N >= splits. From 1 to the number of classes.
    """
    scores = []
    for p in probabilities.tensor_split(splits):
        scores.append((torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0))).sum(1).mean().exp())
    return torch.stack(scores).mean().item(), torch.stack(scores).std(correction=0).item()


def inception_probabilities(inception, images):
    """Inception v3's class probabilities [N, 1000] of images [N, 3, S, S] in [-1, 1] (clipped)."""
    return inception(F.interpolate(images.clamp(-1, 1), (299, 299), mode="bilinear")).softmax(dim=1)


@torch.no_grad()
def measure(nets, data, z, weights, inception=None, inception_samples=0):
    """The figures of merit, on held-out images and latents z [N, Z]; None without encoder or inception."""
    nets.eval()
    G = nets["G"]
    mean_image = to_float(sum(part.sum(0) for part in data.train.split(1000)) / len(data.train)).to(z.device)
    results = dict.fromkeys(("heldout_l1", "heldout_l1_of_mean_image", "kl_nats"), 0.0)
    for part in data.heldout.split(250):
        x, share = to_float(part.to(z.device)), len(part) / len(data.heldout)
        results["heldout_l1_of_mean_image"] += share * F.l1_loss(mean_image.expand_as(x), x).item()
        if "E" in nets:
            mean, log_variance = nets["E"](x).chunk(2, dim=1)
            results["heldout_l1"] += share * F.l1_loss(G(mean), x).item()
            results["kl_nats"] += share * z.shape[1] * kl_loss(mean, log_variance).item()
    if "E" not in nets:
        results["heldout_l1"] = results["kl_nats"] = None
    x = to_float(data.heldout[: len(z)].to(z.device))
    few = z[: min(64, len(x))]
    losses = all_losses(nets, x[:64], few, few.flip(1), **weights)  # flipped, for an epsilon that is not z_g
    results |= {"convergence_measure": losses["convergence"].item(), "balance": losses["balance"].item()}
    results |= {"k": losses["k"].item(), "sample_diversity": sample_diversity(G(z), x)}
    results |= dict.fromkeys(("inception_score", "inception_score_std", "inception_score_of_real"))
    if inception:
        print(f"Inception score of {inception_samples} images", flush=True)
        noise = torch.randn(inception_samples, z.shape[1], generator=torch.Generator().manual_seed(1))
        fakes = [inception_probabilities(inception, G(part.to(z.device))) for part in noise.split(100)]
        reals = [
            inception_probabilities(inception, to_float(part.to(z.device)))
            for part in data.train[:inception_samples].split(100)
        ]
        results["inception_score"], results["inception_score_std"] = inception_score(torch.cat(fakes))
        results["inception_score_of_real"], _ = inception_score(torch.cat(reals))
    nets.train()
    return results


# ------------------------------------------------------------------------------------------------------ command line


def fail(message):
    """End the program with one line on the standard error and exit status 2."""
    print(f"vae_began.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args(argv):
    """The arguments, and the checkpoint of --out if they ask for it, else None."""
    parser = argparse.ArgumentParser(
        description="Adversarial training of variational auto-encoders (Khan, Hayat, Barnes 2018). Defaults are "
        "the paper's (Section 4) and, where it names none, BEGAN's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail
    add = parser.add_argument
    quick = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in QUICK.items())
    gains = "l1, l2, l3 of Eq. 12 (Section 4; began: the first alone)"
    add("--model", choices=MODELS, default="vae-began", help="the paper's model, or another row of Table 1")
    add("--data", default="faces", help="folder of images, searched recursively, or faces (drawn), cifar10, mnist")
    add("--out", default="runs/vae_began", help="folder for pictures, log.csv, results.json, checkpoint.pt")
    add("--resume", action="store_true", help="continue the run in --out, or with a larger --steps go further")
    add("--eval", action="store_true", help="no training: figures and results of the run in --out")
    add("--quick", action="store_true", help=f"faces within three minutes on two CPU cores: {quick}")
    add("--steps", type=int, default=300_000, help="updates of every network (Section 4)")
    add("--batch-size", type=int, default=16, help="images a step (BEGAN's)")
    add("--image-size", type=int, choices=IMAGE_SIZES, default=64, help="side of the images in pixels (Figures 2, 3)")
    add("--latent-dim", type=int, default=64, help="dimensions Z of the latents (BEGAN's)")
    add("--filters", type=int, default=64, help="n, width of the networks (BEGAN's; 128 where --image-size is 128)")
    add("--gains", type=float, nargs=3, metavar=("I", "P", "D"), default=MODELS["vae-began"]["gains"], help=gains)
    add("--alpha", type=float, default=0.3, help="weight of L_v (Section 4)")
    add("--beta", type=float, default=0.1, help="weight of L_s (Section 4; began: 0)")
    add("--gamma", type=float, default=0.1, help="weight of L_e (Section 4)")
    add("--eta", type=float, default=0.5, help="set point of the balance (Section 4)")
    add("--lr", type=float, default=5e-5, help="learning rate (Section 4)")
    add("--attribute", nargs="+", metavar="NAME", help="those of Figure 8; not given: the five nearest to even")
    add("--inception-samples", type=int, default=0, help="images in the Inception score; 50000 where --data is cifar10")
    add("--inception-weights", help="torchvision's inception_v3_google-0cc3c7bd.pth; downloaded if not given")
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
        parser.set_defaults(**MODELS[args.model], filters=128 if args.image_size == 128 else 64)
        parser.set_defaults(inception_samples=50_000 if args.data == "cifar10" else 0)
        parser.set_defaults(**QUICK if args.quick else {})
    args = parser.parse_args(argv)
    check_args(args, checkpoint)
    return args, checkpoint


def check_args(args, checkpoint):
    """Refuse arguments that cannot be, or that differ from those of the checkpoint's run, if there is one."""
    for name, value in vars(args).items():
        minimum = {int: 0 if name in ("seed", "inception_samples") else 1, float: 0}.get(type(value))
        if minimum is not None and not minimum <= value < 2**63:
            fail(f"--{name.replace('_', '-')} cannot be {value}: it must be at least {minimum}")
    if not all(0 <= gain < math.inf for gain in args.gains):
        fail(f"--gains cannot be {' '.join(map(str, args.gains))}: they must be at least 0")
    if 0 < args.inception_samples < 10:
        fail(f"--inception-samples cannot be {args.inception_samples}: it must be 0 or at least 10")
    free = {"data", "log_every", "save_every", "attribute", "inception_samples", "inception_weights"}
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
        if checkpoint["script"] == "vae_began":
            return checkpoint
    except Exception:  # torch.load raises many kinds on what is no checkpoint
        pass
    fail(f"{path} is not a checkpoint of vae_began.py: give another --out")


def load_inception(path):
    """Inception v3 with the weights in the file at path, or torchvision's if that is None; None if there is no way."""
    name = "inception_v3_google-0cc3c7bd.pth"
    try:
        if path is None:
            weights = torchvision.models.Inception_V3_Weights.IMAGENET1K_V1.get_state_dict(
                check_hash=True, weights_only=True
            )
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        net = torchvision.models.inception_v3(weights=None, init_weights=False)
        net.load_state_dict(weights)
    except Exception as error:  # the network, the disk and torch.load raise many kinds
        if path is not None:
            fail(f"{path} does not hold Inception v3's weights: give torchvision's {name}")
        print(f"no Inception score: {name} cannot be downloaded ({error}); give it to --inception-weights", flush=True)
        return None
    return net.eval()


def choose_attributes(names, data):
    """The attributes of Figure 8: the named ones, or the five that are nearest to even in the training images."""
    shares = dict(zip(data.attributes, data.train_labels.float().mean(0).tolist()))
    for name in names or ():
        if not 0 < shares.get(name, 0) < 1:
            fail(f"--attribute {name}: no training images with and without it; there are {', '.join(shares) or 'none'}")
    even = sorted((name for name in shares if 0 < shares[name] < 1), key=lambda name: abs(shares[name] - 0.5))
    return names or even[:5]


def train(args, nets, optimizers, data, z, weights, run):
    """The training loop, from run["step"] to args.steps. z: latents [N, Z] of the pictures."""
    out, images = Path(args.out), place_images(data.train, z.device)

    def save():
        """Write a temporary file and rename it, so that checkpoint.pt is always whole."""
        state = {"networks": nets.state_dict(), "optimizers": {k: v.state_dict() for k, v in optimizers.items()}}
        state["random"] = {"cpu": torch.get_rng_state()}
        if z.is_cuda:
            state["random"]["cuda"] = torch.cuda.get_rng_state(z.device)
        torch.save({"script": "vae_began", **run, **state}, out / "checkpoint.tmp")
        os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")

    def iterate(drawn):
        """One step on uint8 images."""
        return train_step(nets, optimizers, *draw_batch(drawn, args.latent_dim), **weights)

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
    try:
        data = load_data(args.data, args.image_size)
    except DataError as error:
        fail(error)
    if len(data.train) < args.batch_size:
        fail(f"{args.data} has {len(data.train)} images to train on, fewer than --batch-size {args.batch_size}")
    fingerprint = zlib.crc32(data.heldout.numpy(), zlib.crc32(data.train.numpy()))
    if checkpoint and checkpoint["fingerprint"] != fingerprint:
        fail(f"{args.data} does not hold the images that {out} was made with: give the same --data, or another --out")

    attributes = choose_attributes(args.attribute, data)
    inception = load_inception(args.inception_weights) if args.inception_samples else None

    torch.manual_seed(args.seed)
    sizes = args.image_size, args.filters, args.latent_dim
    nets = build_networks(args.model, *sizes, args.gains).to(device)
    use_precision(nets, args.precision)
    optimizers = build_optimizers(nets, args.lr)
    z = torch.randn(256, args.latent_dim, generator=torch.Generator().manual_seed(0))  # the same in every run
    z = z.to(device)
    weights = {name: getattr(args, name) for name in ("alpha", "beta", "gamma", "eta")}
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
    print(f"{args.model} on {len(data.train)} images of {args.data}, on {device}, into {out}/", flush=True)
    if not args.eval:
        train(args, nets, optimizers, data, z, weights, run)

    save_figures(nets, data, z, out, attributes=attributes)
    if "E" in nets and not attributes:
        print(f"{args.data} has no attributes that some images have and some lack: no Figure 8")
    results = measure(nets, data, z, weights, inception.to(device) if inception else None, args.inception_samples)
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
