"""Adversarial training of variational auto-encoders for high fidelity image generation (Khan, Hayat, Barnes, 2018).

https://arxiv.org/abs/1804.10323

The generator is a variational auto-encoder: an encoder E from images to latents, a decoder G from latents to images.
The discriminator D, an auto-encoder too, learns to reconstruct real images x well, and fake ones badly: those that G
makes of noise, x_g, and of E's latents, x_v. G learns to make images that D reconstructs well. As in BEGAN a number k
says how much D minds the fakes; a PID controller moves it so that the losses of real and fake images keep a ratio. E
and G learn to give back x: in its pixels, and in what D's encoder makes of it, a similarity that is learned.

    python vae_began.py --quick                           # cartoon faces within three minutes on two CPU cores
    python vae_began.py --data photos/ --out runs/photos  # the paper's set-up on a folder of images
    python vae_began.py --model began --data cifar10 --image-size 32 --classifier inception    # a row of Table 1

paper -> code
    Figure 1     F_vae-e, F_vae-d; F_ae-e and F_ae-d  Encoder E (theta_e), Decoder G (theta_d); D (theta_e', theta_d')
    Eq. 1        the likelihood of a VAE              not computed: L_e and L_n stand for it
    Eq. 2, Eq. 7, Eq. 9: L_e; L_d, L_g, L_v; L_s      vae_began_losses
    Eq. 3        KL loss of the VAE, L_n              kl_loss
    Eq. 4        reparameterisation                   reparameterise
    Eq. 5, 6     the losses without k, beta, gamma    vae_began_losses: L_dis where k = 1; L_fake
    Eq. 8        the discriminator's output           Discriminator
    Eq. 10, 11   measured eta; error e_t              balance
    Eq. 12       PID controller                       Controller
    Eq. 13-15    L_dis, L_gen, L_enc                  vae_began_losses; which loss moves which network: train_step
    Section 3.4  convergence measure                  balance
    Algorithm 1  lines 2, 4: draw_batch; 3, 5-13:     vae_began_losses, train_step ("Eq. 3.2" in line 10 is Eq. 7)
    Table 1      Inception score of three models      inception_score; --model, began_losses
    Figures 2, 3 samples of 64x64, 128x128            save_figures
    Figure 4     fakes, reals, D's reconstructions    save_discriminations
    Figure 6     interpolation between real images    save_interpolations
    Figure 8     arithmetic with attributes           save_arithmetic, attribute_directions

Rulings, where the paper is silent or contradicts itself
    - Eq. 7 prints L_g as |x - x_g'|, but x_g has no partner x: |x_g - x_g'|, as in L_v and in BEGAN. Eq. 11 prints
      - L_g + alpha L_v: - (L_g + alpha L_v), as in Eq. 10 and in the convergence measure.
    - Eq. 10 measures eta, here in one batch; in Eq. 11 it is the constant 0.5.
    - sigma_v, "variance" beside Eq. 4, is used as a deviation; E gives a log-variance. |.|, "the latent space's" beside
      Eq. 2, is the number of elements. The prior "from [0, 1]" of Section 4 is N(0, I), as in Eq. 3.
    - k and the two errors before the first start at 0, and k is kept in [0, 1], as in BEGAN. l1, "proportional" in
      Section 3.4's words on BEGAN, is the integral gain of Eq. 12.
    - The networks are BEGAN's in the layout of carpedm20/BEGAN-tensorflow, whose n is 128 (64 below 128x128 is ours).
      Section 4's three pairs of convolutions are those of 32x32: log2(S) - 2, four at 64x64.
    - Batches of 16 and 64 latents are BEGAN's; Adam's betas and initial weights are torch's; its rate is constant.
    - Codes of real images are E's means. Figure 6 is of real images, as in its text, not of generated ones, as in its
      caption. "BEGAN* + LSM" has an L_s of x and an unrelated x_g.
Departures
    - The KL divergence of Eq. 3 is averaged over the latents, as Eq. 9 is: as a sum it outweighs the other terms.
    - BEGAN's z is uniform, and its learning rate its own (Section 5.4); here both are this paper's in all three models.
    - Algorithm 1 updates E, G, k and D in turn, from one forward pass; here all gradients are of one point.
    - Default data are drawn faces. A tenth is held out, and pictures and results show only that, but for Figure 8's
      directions and the Inception score of real images. --quick has 20 times the learning rate and 50 times gamma.
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

from common import draw_images, load_data, place_images, save_grid, to_float

NAME = "vae_began"
MODELS = {  # Table 1: beta, the weight of L_s, and the gains l1, l2, l3 of Eq. 12 (Section 4; BEGAN's)
    "vae-began": {"beta": 0.1, "gains": [1e-3, 1e-5, 1e-5]},
    "began-lsm": {"beta": 0.1, "gains": [1e-3, 1e-5, 1e-5]},
    "began": {"beta": 0.0, "gains": [1e-3, 0.0, 0.0]},
}
IMAGE_SIZES = {16: 64, 32: 64, 64: 64, 128: 128}  # and the n of each
BETAS = (0.9, 0.999)  # of Adam, its usual
FREE = ("steps", "log_every", "save_every", "classifier", "samples")  # what --resume may change
FILE = "inception_v3_google-0cc3c7bd.pth"  # Inception's weights, in torchvision's cache
QUICK = {"image_size": 16, "filters": 16, "steps": 1400, "lr": 1e-3, "gamma": 5.0, "save_every": 500}


# ---------------------------------------------------------------------------------------------------------- networks


def conv(c_in, c_out, stride=1):
    """3x3 convolution and ELU: [N, c_in, H, H] -> [N, c_out, H / stride, H / stride]."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), nn.ELU())


def blocks_of(image_size):
    """R, the pairs of convolutions in a network: log2(S) - 2. ValueError for a size that the networks cannot have."""
    if image_size not in IMAGE_SIZES:
        raise ValueError(f"image_size {image_size}: must be one of {list(IMAGE_SIZES)}")
    return image_size.bit_length() - 3


class Encoder(nn.Sequential):
    """Images [N, 3, S, S] in [-1, 1] -> [N, outputs]: blocks of n, 2n, 3n, ... channels, halved in between down to 8x8.

    E, with 2 Z outputs, means and log-variances; and the first half of D, with Z.
    """

    def __init__(self, image_size, filters, outputs):
        blocks = blocks_of(image_size)
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
        blocks = blocks_of(image_size)
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
    """Eq. 12: k_t from k_{t-1} and e_t; gains lambda_1-3: l1 (integral), l2 (proportional), l3 (differential).

    k, e_{t-1} (e_1) and e_{t-2} (e_2) are scalar buffers: they live on the device, and in the checkpoint.
    """

    def __init__(self, gains):
        super().__init__()
        self.gains = gains
        for name in ("k", "e_1", "e_2"):
            self.register_buffer(name, torch.zeros(()))

    @torch.no_grad()
    def update(self, e_t):
        """Move k by Eq. 11's error of this iteration, a scalar tensor."""
        l1, l2, l3 = self.gains
        self.k += l1 * e_t + l2 * (e_t - self.e_1) + l3 * (e_t + self.e_2 - 2 * self.e_1)  # Eq. 12
        self.k.clamp_(0, 1)
        self.e_2.copy_(self.e_1)
        self.e_1.copy_(e_t)


def build_networks(model, image_size, filters, latent_dim, gains):
    """G, D, for "vae-began" E of 2 Z outputs, and the controller. ValueError for a size that they cannot have."""
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
    """Eq. 10, which is eta in equilibrium, Eq. 11, and Section 3.4's convergence measure, by name. L_fake: Eq. 6."""
    e_t = eta * L_d - L_fake  # Eq. 11: eta L_d - (L_g + alpha L_v)
    return {"eta_measured": L_fake / L_d, "e_t": e_t, "convergence": L_d + e_t.abs()}  # Eq. 10


def vae_began_losses(nets, weights, x, z_g, epsilon):
    """Algorithm 1, one forward pass: images x [N, 3, S, S] in [-1, 1], z_g [M, Z], epsilon [N, Z] ~ N(0, I).

    Returns {name: scalar}: L_enc, L_gen and L_dis for E, G and D to minimise, their terms, k, and what balance gives.
    weights: alpha, beta, gamma, eta by name.
    """
    alpha, beta, gamma, k = weights["alpha"], weights["beta"], weights["gamma"], nets["controller"].k.clone()
    mean, log_variance = nets["E"](x).chunk(2, dim=1)
    z_v = reparameterise(mean, log_variance, epsilon)  # line 3
    # What goes through a network goes at once, which is faster; no layer mixes images.
    x_v, x_g = nets["G"](torch.cat([z_v, z_g])).split([len(x), len(z_g)])  # line 5
    x_prime, z_prime = nets["D"](torch.cat([x, x_g, x_v]))  # lines 6, 9
    x_prime_d, x_prime_g, x_prime_v = x_prime.split([len(x), len(z_g), len(x)])
    z_d, _, z_prime_v = z_prime.split([len(x), len(z_g), len(x)])
    L_e = F.l1_loss(x_v, x)  # line 7, Eq. 2
    L_n = kl_loss(mean, log_variance)  # line 7, Eq. 3
    L_s = F.l1_loss(z_prime_v, z_d)  # line 7, Eq. 9
    L_d = F.l1_loss(x_prime_d, x)  # line 10, Eq. 7
    L_g = F.l1_loss(x_prime_g, x_g)  # line 10, Eq. 7
    L_v = F.l1_loss(x_prime_v, x_v)  # line 10, Eq. 7
    L_fake = L_g + alpha * L_v  # Eq. 6
    L_enc = L_n + beta * L_s + gamma * L_e  # Eq. 15
    L_gen = L_fake + beta * L_s + gamma * L_e  # Eq. 14
    L_dis = L_d - k * L_fake  # Eq. 13, or with k = 1 Eq. 5; here k_{t-1}: line 12 comes later
    losses = {"L_enc": L_enc, "L_gen": L_gen, "L_dis": L_dis, "L_e": L_e, "L_n": L_n, "L_s": L_s}
    return losses | {"L_d": L_d, "L_g": L_g, "L_v": L_v, "k": k} | balance(L_d, L_fake, weights["eta"])


def began_losses(nets, weights, x, z_g, epsilon):
    """BEGAN, and with a beta BEGAN* + LSM: no E, L_s of x and x_g, so z_g is [N, Z]. Otherwise as vae_began_losses."""
    k, x_g = nets["controller"].k.clone(), nets["G"](z_g)
    x_prime, z_prime = nets["D"](torch.cat([x, x_g]))
    x_prime_d, x_prime_g = x_prime.split([len(x), len(z_g)])
    L_d, L_g = F.l1_loss(x_prime_d, x), F.l1_loss(x_prime_g, x_g)  # Eq. 7
    z_d, z_prime_g = z_prime.split([len(x), len(z_g)])
    L_s = F.l1_loss(z_prime_g, z_d)  # Eq. 9
    losses = {"L_gen": L_g + weights["beta"] * L_s, "L_dis": L_d - k * L_g}  # Eq. 14, Eq. 13
    return losses | {"L_s": L_s, "L_d": L_d, "L_g": L_g, "k": k} | balance(L_d, L_g, weights["eta"])


LOSSES = {"vae-began": vae_began_losses, "began-lsm": began_losses, "began": began_losses}


# ---------------------------------------------------------------------------------------------------------- training


def build_optimizer(nets, lr):
    """One Adam for all networks, since they all take their step at the same time."""
    return torch.optim.Adam(nets.parameters(), lr, BETAS, fused=True, capturable=True)


def draw_batch(images, latent_dim):
    """x: the images (uint8 [N, 3, S, S]) in [-1, 1]; z_g and epsilon ~ N(0, I): [N, Z]."""
    return to_float(images), *torch.randn(2, len(images), latent_dim, device=images.device)


def train_step(nets, optimizer, model, weights, x, z_g, epsilon):
    """One update of every network, all at the same point, then of k. Returns the losses before it, detached."""
    losses = LOSSES[model](nets, weights, x, z_g, epsilon)
    optimizer.zero_grad()
    # A loss gives gradients to its `inputs` alone, where others detach the fakes and make them a second time.
    if "E" in nets:
        losses["L_enc"].backward(inputs=list(nets["E"].parameters()), retain_graph=True)  # line 8: theta_e
    losses["L_gen"].backward(inputs=list(nets["G"].parameters()), retain_graph=True)  # line 11: theta_d
    losses["L_dis"].backward(inputs=list(nets["D"].parameters()))  # line 13: theta_e', theta_d'
    optimizer.step()
    nets["controller"].update(losses["e_t"])  # line 12
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


def encode(nets, x):
    """The codes of images x [N, 3, S, S] in [-1, 1]: E's means [N, Z]."""
    return nets["E"](x).chunk(2, dim=1)[0]


def save_discriminations(path, nets, x, z):
    """Figure 4: rows of up to ten fakes x_g, D's reconstructions of them, real x, D's reconstructions of them; twice.

    x: [N, 3, S, S] in [-1, 1], z: [M, Z], M >= N.
    """
    columns = min(10, len(x))
    x, x_g = x[: len(x) // columns * columns], nets["G"](z[: len(x) // columns * columns])
    rows = [images.unflatten(0, (-1, columns)) for images in (x_g, nets["D"](x_g)[0], x, nets["D"](x)[0])]
    save_grid(path, torch.stack(rows, dim=1).flatten(0, 2), columns=columns)


def save_interpolations(path, nets, x_1, x_2, columns=8):
    """Figure 6: rows of x_1, images on the straight line from E(x_1) to E(x_2), x_2. x_1, x_2: [N, 3, S, S]."""
    z_1, z_2 = encode(nets, x_1), encode(nets, x_2)
    between = [nets["G"](torch.lerp(z_1, z_2, i / (columns - 1))) for i in range(columns)]
    save_grid(path, torch.stack([x_1, *between, x_2], dim=1).flatten(0, 1), columns=columns + 2)


def attribute_directions(nets, data, device):
    """Section 5.5: for each attribute, the mean code of training images with it minus that of those without: [A, Z]."""
    codes = torch.cat([encode(nets, to_float(part.to(device))) for part in data.train.split(250)])
    labels = data.train_labels.to(device)
    return torch.stack([codes[has].mean(0) - codes[~has].mean(0) for has in labels.unbind(1)])


def save_arithmetic(path, nets, data, z, strengths=(-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2)):
    """Figure 8: for each attribute a row of G(z + strength * direction), named in the first tile. z: [N, Z], N >= A."""
    directions = attribute_directions(nets, data, z.device).nan_to_num()  # nan where all images have it, or none
    images = [nets["G"](z[: len(directions)] + strength * directions) for strength in strengths]
    texts = [f"{s:+g}" if s != strengths[0] else name for name in data.attributes for s in strengths]
    save_grid(path, torch.stack(images, dim=1).flatten(0, 1), columns=len(strengths), captions=[texts])


@torch.no_grad()
def save_figures(nets, data, z, out, step, last=True):
    """samples_<step>.png, Figures 2 and 3, of 100 of the latents z [N, Z], reconstructions_<step>.png, of up to 40
    held-out images, and if last Figures 4, 6 and, with attributes, 8. Without E only samples and Figure 4."""
    x = to_float(data.heldout[:40].to(z.device))
    save_grid(out / f"samples_{step}.png", nets["G"](z[:100]))
    if last:
        save_discriminations(out / "figure4_discriminator.png", nets, x[:20], z)
    if "E" in nets:
        save_grid(out / f"reconstructions_{step}.png", x, nets["G"](encode(nets, x)), columns=5)
        if last:
            save_interpolations(out / "figure6_interpolations.png", nets, x[: len(x) // 2 * 2][:10:2], x[1:10:2])
        if last and data.attributes:
            save_arithmetic(out / "figure8_arithmetic.png", nets, data, z)


def sample_diversity(samples, images):
    """Mean distance of samples over that of images, [N, 3, S, S]: 0 in total collapse, None if all images are one."""
    a, b = (torch.pdist(x.flatten(1)).mean().item() for x in (samples, images))
    return a / b if b > 0 else None


def inception_score(probabilities, splits=10):
    """Table 1: exp(E KL(p(y|x) || p(y))), its mean and standard deviation over the splits (Salimans et al. 2016).

    probabilities: p(y|x) of images x, [N, classes], N >= splits. From 1 to the number of classes.
    """
    scores = []
    for p in probabilities.tensor_split(splits):
        scores.append((torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0))).sum(1).mean().exp())
    return torch.stack(scores).mean().item(), torch.stack(scores).std(correction=0).item()


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
def measure(nets, data, z, model, weights, classifier=None, count=0):
    """The figures of merit, on held-out images and latents z [N, Z]; None without encoder.

    classifier: see load_classifier; it judges count samples and count training images, or as many as these are.
    """
    G, device = nets["G"], z.device
    mean_image = to_float(sum(part.sum(0) for part in data.train.split(1000)) / len(data.train)).to(device)
    results = dict.fromkeys(("heldout_l1", "heldout_l1_of_mean_image", "kl_nats"), 0.0)
    for x in map(to_float, data.heldout.to(device).split(250)):
        share = len(x) / len(data.heldout)
        results["heldout_l1_of_mean_image"] += share * F.l1_loss(mean_image.expand_as(x), x).item()
        if "E" in nets:
            mean, log_variance = nets["E"](x).chunk(2, dim=1)
            results["heldout_l1"] += share * F.l1_loss(G(mean), x).item()
            results["kl_nats"] += share * z.shape[1] * kl_loss(mean, log_variance).item()
    if "E" not in nets:
        results["heldout_l1"] = results["kl_nats"] = None
    x = to_float(data.heldout[: len(z)].to(device))
    few = z[: min(64, len(x))]
    losses = LOSSES[model](nets, weights, x[:64], few, few.flip(1))  # flipped, for an epsilon that is not z_g
    results |= {"convergence_measure": losses["convergence"].item(), "eta_measured": losses["eta_measured"].item()}
    results |= {"k": losses["k"].item(), "sample_diversity": sample_diversity(G(z), x)}
    if classifier:
        reals = data.train[:count]
        noise = torch.randn(len(reals), z.shape[1], generator=torch.Generator().manual_seed(1))
        p_g = [classifier(G(part.to(device)).clamp(-1, 1))[0].softmax(dim=1) for part in noise.split(100)]
        p_x = [classifier(to_float(part.to(device)))[0].softmax(dim=1) for part in reals.split(100)]
        results["inception_score"], results["inception_score_std"] = inception_score(torch.cat(p_g))
        results["inception_score_of_real"], _ = inception_score(torch.cat(p_x))
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
    add("--model", choices=MODELS, default="vae-began", help="the paper's model, or another row of Table 1")
    add("--alpha", type=float, default=0.3, help="weight of L_v (Section 4)")
    add("--beta", type=float, default=SUPPRESS, help="weight of L_s; 0.1 (Section 4), or 0 for --model began")
    add("--gamma", type=float, default=0.1, help="weight of L_e (Section 4)")
    add("--eta", type=float, default=0.5, help="set point of the balance (Section 4)")
    gains = "l1, l2, l3 of Eq. 12; 1e-3, 1e-5, 1e-5 (Section 4), or the first alone for --model began"
    add("--gains", type=float, nargs=3, metavar=("I", "P", "D"), default=SUPPRESS, help=gains)
    files = "inception, none or a TorchScript file, as tests/make_classifier.py makes, of images to (logits, features)"
    add("--classifier", default="none", help=files)
    add("--samples", type=int, default=50_000, help="images in the Inception score, at most as many as to train on")
    add("--data", default="faces", help="folder of images, searched recursively, or faces (drawn), cifar10, mnist")
    add("--out", default=f"runs/{NAME}", help="folder for pictures, log.csv, results.json, checkpoint.pt")
    add("--resume", action="store_true", help="go on with the run in --out, with its settings; --steps may be larger")
    add("--quick", action="store_true", help=f"faces within three minutes on two CPU cores: {quick}")
    add("--steps", type=int, default=300_000, help="updates of every network (Section 4)")
    add("--batch-size", type=int, default=16, help="images a step (BEGAN's)")
    add("--image-size", type=int, choices=IMAGE_SIZES, default=64, help="side of the images in pixels (Section 4)")
    add("--latent-dim", type=int, default=64, help="dimensions Z of the latents (BEGAN's)")
    add("--filters", type=int, default=64, help="n, width of the networks (128 where --image-size is 128)")
    add("--lr", type=float, default=5e-5, help="learning rate (Section 4)")
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
        parser.set_defaults(**MODELS[args.model], filters=IMAGE_SIZES[args.image_size])
        parser.set_defaults(**QUICK if args.quick else {})
    args = parser.parse_args(argv)
    for name, value in [*vars(args).items(), *(("gains", gain) for gain in args.gains)]:
        least = {int: 10 if name == "samples" else 0 if name == "seed" else 1, float: 0}.get(type(value))
        if least is not None and not least <= value <= 1e12:
            fail(f"--{name.replace('_', '-')} cannot be {value}: it must be at least {least} and at most 1e12")
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
    nets = build_networks(args.model, args.image_size, args.filters, args.latent_dim, args.gains).to(device)
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
    print(f"{args.model} on {len(data.train)} images of {args.data}, {device}, step {begin}, in {out}/")

    images, step_on = place_images(data.train, device), partial(train_step, nets, optimizer, args.model, vars(args))
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
    results = measure(nets, data, z_shown, args.model, vars(args), classifier, args.samples)
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
