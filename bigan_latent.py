# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy", "pillow>=10.1"]
# ///
"""Toward better reconstruction of style images with GANs (Lorbert, Ben-Zvi, Ciptadi, Oks, Tyagi, 2017).

https://pdfslide.us/documents/toward-better-reconstruction-of-style-images-with-gans-the-rationale-of-using-gans.html

A BiGAN: a generator G from latents to images, an encoder E back, and one discriminator D that tells pairs (x, E(x))
from pairs (G(z), z). At its optimum G and E are each other's inverse; in practice they are not. So the paper adds a
penalty on latents, z against E(G(z)). The paper finds that this aids against collapse and gives the best images, while
penalties on pixels and on AlexNet's features cost sharpness and style. D is unrolled: G and E are trained against D as
it would be after K further updates.

    python bigan_latent.py --quick                            # cartoon faces within three minutes on two CPU cores
    python bigan_latent.py --data photos/ --out runs/photos   # the paper's EX7 on a folder of images
    python bigan_latent.py --experiment EX8 --out runs/ex8    # another row of Table 1

paper -> code
    Section 3    the pairs (x, z') and (x', z)          q = (x, z_hat), p = (x_hat, z): z_hat = E(x), x_hat = G(z)
    Figures 1-3  the three networks                     Generator, Encoder, Discriminator
    Eq. 1, Eq. 2, Eq. 3: the objective of a BiGAN       discriminator_loss (for D), generator_loss (for G, E)
    Eq. 4, 6     L_AE on pixels, L_AD on latents        penalty
    Eq. 5        penalty on features                    feature_penalty; Features is H
    Eq. 7        the other penalty on latents, L_AD'    measure: autodecoder_q (not used for training)
    Footnote 1   a variance of E                        Encoder; --stochastic-encoder
    Eq. 8        the whole objective                    bigan_losses; which loss moves which network: train_step
    Section 5    the pseudo-Huber loss of Figure 4      pseudo_huber
    Section 5    8 discriminator unrolling steps        unrolled_logits, adam_step
    Table 1      the nine experiments                   EXPERIMENTS, --experiment
    Figures 5-22 samples, reconstructions, D's output   save_figures, percents
    Section 1    a walk through the latent space        save_interpolations
    Section 5    mode collapse; who fools D             sample_diversity; measure: d_on_reconstructions, ...

Rulings, where the paper is silent or contradicts itself
    - Section 3 writes p(x|z) for G and q(z|x) for E, but later swaps the letters. We keep p for G and q for E.
    - Figures 1-3 name kinds of layers, no widths or kernels. We use those of soumith/dcgan.torch, since Section 5 bases
      G on DCGAN. D's dense layers are ours: 8 * --channels units on z; 2 * --channels, with dropout, on x and z joined.
    - Decay 0.97 and dropout 0.8 are in TensorFlow's terms: in torch's, momentum 0.03 and a dropout probability of 0.2.
    - In training D's batch norm takes its statistics from (x, E(x)) and (G(z), z) separately, as two batches.
    - Pictures and results use batch norm's running averages. In training G(z) updates those of G, and so does G(E(x))
      if lambda_2 or lambda_3 is not 0; E(x) updates those of E, and so does E(G(z)) if lambda_1 is not 0.
    - Eq. 4, 6 and 7 average the pseudo-Huber loss over coordinates, since Section 4 wants each dimension of z
      reconstructed. Eq. 5 applies it to the norm: |H| = 1, so on H's 9,216 coordinates it would mostly be a square.
    - Unrolling is that of Metz et al., whom Section 5 cites: G and E see D after K Adam steps on the batch, from D's
      weights and moments, and get gradients through them. The first of the K is the very step that D makes itself.
    - Weights start from N(0, 0.02), as DCGAN's, but batch norm's from 1. Adam's beta_2 and epsilon are torch's.
Departures
    - In Eq. 3 G and E minimise log D(x, E(x)) + log(1 - D(G(z), z)). Here they minimise generator_loss, with swapped
      labels, as in BiGAN's code. So the logged L_GAN is not Eq. 3's value.
    - Footnote 1 gives E a variance; here it has one with --stochastic-encoder only. Then L_AD and D see samples from E.
"""

import json
import math
import sys
import time
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from common import DataError, draw_images, load_data, place_images, save_grid, to_float

NAME = "bigan_latent"
EXPERIMENTS = {  # Table 1; weights of Eq. 6, 4 and 5
    "EX1": {"lambda_1": 0.05, "lambda_2": 0.0, "lambda_3": 0.0},
    "EX2": {"lambda_1": 0.05, "lambda_2": 1.0, "lambda_3": 0.0},
    "EX3": {"lambda_1": 0.05, "lambda_2": 0.0, "lambda_3": 1.0},
    "EX4": {"lambda_1": 1.0, "lambda_2": 0.0, "lambda_3": 0.0},
    "EX5": {"lambda_1": 1.0, "lambda_2": 1.0, "lambda_3": 0.0},
    "EX6": {"lambda_1": 1.0, "lambda_2": 0.0, "lambda_3": 1.0},
    "EX7": {"lambda_1": 2.5, "lambda_2": 0.0, "lambda_3": 0.0},
    "EX8": {"lambda_1": 2.5, "lambda_2": 1.0, "lambda_3": 0.0},
    "EX9": {"lambda_1": 2.5, "lambda_2": 0.0, "lambda_3": 1.0},
}
IMAGE_SIZES = {16: (1, 2), 32: (1, 2, 4), 64: (1, 2, 4, 8)}  # side: the layers' widths, as multiples of --channels
REAL = 0.9  # D's label of real pairs: one-sided label smoothing (Section 5)
LEAK = 0.2  # slope of the leaky ReLU (Section 5)
batch_norm = partial(nn.BatchNorm2d, momentum=1 - 0.97)  # (Section 5)
DROPOUT = 1 - 0.8  # (Section 5)
GAMMA = 0.05  # of the pseudo-Huber loss (Section 5)
BETAS = (0.5, 0.999)  # the first: Section 5
INITIAL_STD = 0.02  # of weights, DCGAN's
TINY = 1e-30  # under the root of the unrolled Adam: finite derivatives where a gradient is zero
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that AlexNet takes
EAGER_STEPS = 3  # run before a CUDA graph is recorded, so that libraries have chosen algorithms and Adam has moments
AT_LEAST_1 = ("steps", "batch_size", "latent_dim", "channels", "log_every", "save_every")  # options
AT_LEAST_0 = ("lr", "lambda_1", "lambda_2", "lambda_3", "unroll")
MAY_CHANGE = ("data", "steps", "log_every", "save_every")  # options that --resume lets differ from the run's
QUICK = dict(image_size=16, channels=32, latent_dim=32, steps=1700, unroll=1, lr=5e-4, save_every=500)


# ---------------------------------------------------------------------------------------------------------- networks


def conv_stack(widths):
    """What E and D share: images [N, 3, S, S] in [-1, 1] -> features [N, C * 4 * 4], where C is the last width."""
    layers = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(LEAK)]  # kernel 4, stride 2, padding 1, as all below
    for c_in, c_out in zip(widths, widths[1:]):
        layers += [nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False), batch_norm(c_out), nn.LeakyReLU(LEAK)]
    return nn.Sequential(*layers, nn.Flatten())


class Generator(nn.Sequential):
    """G: latents [N, Z], either z in [-1, 1] or E(x), unbounded -> images [N, 3, S, S] in [-1, 1]."""

    def __init__(self, image_size, channels, latent_dim):
        widths = [channels * w for w in reversed(IMAGE_SIZES[image_size])]
        layers = [nn.Linear(latent_dim, widths[0] * 4 * 4, bias=False), nn.Unflatten(1, (widths[0], 4, 4))]
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [batch_norm(c_in), nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=False)]
        layers += [batch_norm(widths[-1]), nn.ReLU(), nn.ConvTranspose2d(widths[-1], 3, 4, 2, 1)]
        super().__init__(*layers, nn.Tanh())


class Encoder(nn.Module):
    """E: images x [N, 3, S, S] in [-1, 1] -> latents z_hat [N, Z]. If stochastic (footnote 1), the layers give the mean
    and log-variance of a Gaussian: z_hat is a sample of it in training mode, its mean in evaluation mode."""

    def __init__(self, image_size, channels, latent_dim, stochastic=False):
        super().__init__()
        widths = [channels * w for w in IMAGE_SIZES[image_size]]
        outputs = 2 * latent_dim if stochastic else latent_dim
        self.stochastic = stochastic
        self.layers = nn.Sequential(conv_stack(widths), nn.Linear(widths[-1] * 4 * 4, outputs))

    def forward(self, x):
        if not self.stochastic:
            return self.layers(x)
        mean, log_variance = self.layers(x).chunk(2, dim=1)
        std = (log_variance / 2).exp()
        return (mean + std * torch.randn_like(std)) if self.training else mean


class Discriminator(nn.Module):
    """D: images x [N, 3, S, S] in [-1, 1], latents z [N, Z] -> logits [N, 1], positive for pairs (x, E(x))."""

    def __init__(self, image_size, channels, latent_dim):
        super().__init__()
        widths = [channels * w for w in IMAGE_SIZES[image_size]]
        self.of_x = conv_stack(widths)
        self.of_z = nn.Sequential(nn.Linear(latent_dim, 8 * channels), nn.LeakyReLU(LEAK))
        hidden = nn.Linear(widths[-1] * 4 * 4 + 8 * channels, 2 * channels)
        self.of_both = nn.Sequential(hidden, nn.LeakyReLU(LEAK), nn.Dropout(DROPOUT), nn.Linear(2 * channels, 1))

    def forward(self, x, z):
        return self.of_both(torch.cat([self.of_x(x), self.of_z(z)], dim=1))


class Features(nn.Module):
    """H (Eq. 5): images x [N, 3, S, S] in [-1, 1] -> AlexNet's pool5 [N, 9216], of length 1. Fixed. DataError where
    torchvision has no weights of it in its cache, nor can fetch them."""

    def __init__(self):
        super().__init__()
        try:
            layers = torchvision.models.alexnet(weights="IMAGENET1K_V1").features
        except (OSError, RuntimeError) as error:  # no network, or a damaged file
            file = f"{torch.hub.get_dir()}/checkpoints/alexnet-owt-7be5be79.pth"
            raise DataError(f"--lambda-3 above 0 needs {file}, which cannot be had: {error}") from error
        self.layers = layers.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(self, x):
        x = F.interpolate((x + 1) / 2, (224, 224), mode="bilinear")
        return F.normalize(self.layers((x - self.mean) / self.std).flatten(1))


def build_networks(image_size, channels, latent_dim, stochastic=False):
    """The networks by the paper's names, G, E and D, in training mode."""
    if image_size not in IMAGE_SIZES:
        raise ValueError(f"size {image_size}: there are {list(IMAGE_SIZES)}")
    nets = nn.ModuleDict({"G": Generator(image_size, channels, latent_dim)})
    nets["E"] = Encoder(image_size, channels, latent_dim, stochastic)
    nets["D"] = Discriminator(image_size, channels, latent_dim)
    for layer in nets.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(layer.weight, std=INITIAL_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return nets


# ------------------------------------------------------------------------------------------------------------ losses


def discriminator_loss(d_q, d_p):
    """Eq. 1 to 3, negated, for D to minimise: -mean log D(x, E(x)) - mean log(1 - D(G(z), z)), but with the label 0.9
    in place of 1 for q. d_q, d_p: D's logits [N, 1] of pairs (x, E(x)) and (G(z), z)."""
    loss_q = F.binary_cross_entropy_with_logits(d_q, torch.full_like(d_q, REAL))
    return loss_q + F.binary_cross_entropy_with_logits(d_p, torch.zeros_like(d_p))


def generator_loss(d_q, d_p):
    """In place of Eq. 1 to 3, for G and E: -mean log(1 - D(x, E(x))) - mean log D(G(z), z), with labels swapped and not
    smoothed. It has Eq. 3's optimum, but not its value. d_q, d_p: as in discriminator_loss."""
    loss_q = F.binary_cross_entropy_with_logits(d_q, torch.zeros_like(d_q))
    return loss_q + F.binary_cross_entropy_with_logits(d_p, torch.ones_like(d_p))


def pseudo_huber(t):
    """Section 5: gamma (sqrt(1 + (t / gamma)^2) - 1) with gamma = 0.05, of each element; |t| - gamma for large |t|."""
    return GAMMA * ((1 + (t / GAMMA) ** 2).sqrt() - 1)


def penalty(reconstruction, original):
    """Eq. 4: ||x - G(E(x))||, Eq. 6: ||z - E(G(z))||, Eq. 7: ||E(x) - E(G(E(x)))||, by the pseudo-Huber loss of each
    coordinate, averaged. Both [N, 3, S, S] or [N, Z]."""
    return pseudo_huber(original - reconstruction).mean()


def feature_penalty(h_tilde, h):
    """Eq. 5: ||H(x) - H(G(E(x)))||, the pseudo-Huber of the norm, the mean over images. h_tilde, h: [N, 9216]."""
    return pseudo_huber(torch.linalg.vector_norm(h - h_tilde, dim=1)).mean()


def bigan_losses(nets, optimizer, H, weights, unroll, x, z):
    """One forward pass: images x [N, 3, S, S] in [-1, 1], latents z [M, Z] in [-1, 1] -> {name: scalar}.
    D minimises L_D, G and E minimise L_G_E; the others are terms of L_G_E. weights: {"lambda_1": number, ...}; where
    one is 0, its penalty is returned as 0. H: None if lambda_3 is 0. optimizer, unroll: see unrolled_logits."""
    G, E, D = nets["G"], nets["E"], nets["D"]
    x_hat, z_hat = G(z), E(x)
    q, p = (x, z_hat), (x_hat, z)
    d_q, d_p = D(*q), D(*p)
    L_D = discriminator_loss(d_q, d_p)  # Eq. 3, max over D
    # D's logits of the same pairs after K updates of D. Gradients reach G and E through pairs and updates alike.
    later_d_q, later_d_p = unrolled_logits(D, optimizer, q, p, d_q, d_p, unroll)
    L_GAN = generator_loss(later_d_q, later_d_p)  # in place of Eq. 3, min over G, E
    zero = torch.zeros((), device=x.device)
    x_tilde = G(z_hat) if weights["lambda_2"] or weights["lambda_3"] else None
    L_AD = penalty(E(x_hat), z) if weights["lambda_1"] else zero  # Eq. 6
    L_AE = penalty(x_tilde, x) if weights["lambda_2"] else zero  # Eq. 4
    L_H = feature_penalty(H(x_tilde), H(x)) if weights["lambda_3"] else zero  # Eq. 5
    L_G_E = L_GAN + weights["lambda_1"] * L_AD + weights["lambda_2"] * L_AE + weights["lambda_3"] * L_H  # Eq. 8
    return {"L_D": L_D, "L_G_E": L_G_E, "L_GAN": L_GAN, "L_AD": L_AD, "L_AE": L_AE, "L_H": L_H}


def unrolled_logits(D, optimizer, q, p, d_q, d_p, unroll):
    """D's logits of the pairs q and p after `unroll` Adam steps on them, differentiable through the steps (Section 5).

    q, p: (images, latents). d_q, d_p: D's logits of them before the steps. The first step starts from D's weights and
    the optimizer's moments; D and the optimizer are not changed. Raises adam_group's ValueError, unless unroll is 0.
    """
    if unroll == 0:
        return d_q, d_p
    group = adam_group(D, optimizer)
    names, theta = zip(*D.named_parameters())  # theta: D's weights; in the loop those after each step
    buffers = {name: buffer.clone() for name, buffer in D.named_buffers()}  # batch norm writes to these, not to D's
    zero = torch.zeros((), device=d_q.device)  # moments and step number, if D has made no step yet
    states = [optimizer.state.get(parameter, {}) for parameter in theta]
    m = [state.get("exp_avg", zero) for state in states]
    v = [state.get("exp_avg_sq", zero) for state in states]
    t = states[0].get("step", zero)
    for _ in range(unroll):
        gradients = torch.autograd.grad(discriminator_loss(d_q, d_p), theta, create_graph=True)
        t = t + 1
        updated = [adam_step(w, g, m_w, v_w, t, group) for w, g, m_w, v_w in zip(theta, gradients, m, v)]
        theta, m, v = zip(*updated)
        later = {**dict(zip(names, theta)), **buffers}
        d_q, d_p = (torch.func.functional_call(D, later, pair) for pair in (q, p))  # D(*pair) with these weights
    return d_q, d_p


def adam_group(D, optimizer):
    """The optimizer's group that has D. ValueError if its steps are not adam_step's, or cannot be differentiated."""
    parameters = {id(p) for p in D.parameters()}
    groups = [group for group in optimizer.param_groups if parameters.issubset(map(id, group["params"]))]
    differentiable = torch.is_grad_enabled() and all(p.requires_grad for p in D.parameters())
    if type(optimizer) is not torch.optim.Adam or not groups or not differentiable:
        raise ValueError("unrolling needs a torch.optim.Adam with all of D in one group, none frozen, and gradients on")
    if any(groups[0][name] for name in ("weight_decay", "amsgrad", "maximize")) or min(groups[0]["betas"]) <= 0:
        raise ValueError("unrolling needs an Adam without weight_decay, amsgrad and maximize, and with betas above 0")
    return groups[0]


def adam_step(theta, gradient, m, v, t, group):
    """Step number t of Adam for one parameter, differentiable: the new theta, m, v. group: of a torch.optim.Adam."""
    beta_1, beta_2 = group["betas"]
    m = beta_1 * m + (1 - beta_1) * gradient
    v = beta_2 * v + (1 - beta_2) * gradient**2
    # 1 - beta^t, written as -expm1(t log beta), which keeps digits that float32 would lose in the difference.
    m_hat = m / -torch.expm1(t * math.log(beta_1))
    v_hat = v / -torch.expm1(t * math.log(beta_2))
    return theta - group["lr"] * m_hat / ((v_hat + TINY).sqrt() + group["eps"]), m, v


# ---------------------------------------------------------------------------------------------------------- training


def build_optimizer(nets, lr):
    """One Adam for all networks, since they all take their step at the same time. capturable: for CUDA graphs."""
    return torch.optim.Adam(nets.parameters(), lr, BETAS, fused=True, capturable=True)


def make_inputs(images, latent_dim):
    """uint8 images [N, 3, S, S] -> x: the same in [-1, 1]; z ~ U[-1, 1]^Z: [N, Z]."""
    return to_float(images), torch.rand(len(images), latent_dim, device=images.device) * 2 - 1


def trainable(optimizer, *networks):
    """The parameters that require gradients, for backward's `inputs`. ValueError if the optimizer lacks one."""
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) not in updated for p in parameters):
        raise ValueError("the optimizer does not have all parameters of the networks")
    return parameters


def train_step(nets, optimizer, H, weights, unroll, x, z):
    """Update every network, by gradients all taken before any network moves. Returns the losses: see bigan_losses."""
    losses = bigan_losses(nets, optimizer, H, weights, unroll, x, z)
    optimizer.zero_grad()
    # Each backward fills the gradients of its `inputs` alone. So all losses share one forward pass, without detach.
    losses["L_D"].backward(inputs=trainable(optimizer, nets["D"]), retain_graph=True)  # Eq. 3
    losses["L_G_E"].backward(inputs=trainable(optimizer, nets["G"], nets["E"]))  # Eq. 8
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


def percents(D, x, z):
    """D's output for each pair of images x [N, 3, S, S] and latents z [N, Z], in percent: N texts of two digits."""
    return [f"{min(p, 99):02.0f}" for p in (100 * D(x, z).sigmoid()).flatten().tolist()]


def save_interpolations(path, nets, x_1, x_2, count=8):
    """Walks: a row is x_1, then count images from E(x_1) straight to E(x_2), then x_2. x_1, x_2: [N, 3, S, S]."""
    z_1, z_2 = nets["E"](x_1), nets["E"](x_2)
    between = [nets["G"](torch.lerp(z_1, z_2, i / (count - 1))) for i in range(count)]
    save_grid(path, x_1, *between, x_2, groups_per_row=1)  # row i: image i of each argument, side by side


@torch.no_grad()
def save_figures(nets, data, z, out, step):
    """Figures 5, 7, ... (samples_<step>.png, G of the first 100 latents z [N, Z]), Figures 6, 8, ...
    (reconstructions_<step>.png, of up to ten held-out images) and walks (figure_interpolations.png)."""
    was_training = nets.training
    nets.eval()
    z = z[:100]
    x = to_float(data.heldout[:10]).to(z.device)
    x_hat, z_hat = nets["G"](z), nets["E"](x)
    x_tilde = nets["G"](z_hat)
    save_grid(out / f"samples_{step}.png", x_hat, captions=[percents(nets["D"], x_hat, z)])  # a list per batch
    texts = [percents(nets["D"], x, z_hat), percents(nets["D"], x_tilde, z_hat)]  # both with z_hat = E(x)
    save_grid(out / f"reconstructions_{step}.png", x, x_tilde, groups_per_row=5, captions=texts)
    pairs = len(x) // 2
    save_interpolations(out / "figure_interpolations.png", nets, x[:pairs], x[pairs : 2 * pairs])
    nets.train(was_training)


def sample_diversity(samples, images):
    """Mean distance of two samples, divided by that of two images, both [N, 3, S, S]: 0 in total collapse."""
    return (torch.pdist(samples.flatten(1)).mean() / torch.pdist(images.flatten(1)).mean()).item()


def edges(x):
    """How much neighbouring pixels of images [N, 3, S, S] differ: less where blurred, more where speckled."""
    return x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()


@torch.no_grad()
def measure(nets, data, z):
    """The figures of merit, of up to 1,000 held-out images and of latents z [N, Z]; d_on_...: D's output in percent."""
    was_training = nets.training
    nets.eval()
    G, E, D = nets["G"], nets["E"], nets["D"]
    x = to_float(data.heldout[:1000]).to(z.device)
    z_hat = torch.cat([E(part) for part in x.split(250)])
    x_tilde = torch.cat([G(part) for part in z_hat.split(250)])
    z_tilde = torch.cat([E(part) for part in x_tilde.split(250)])
    d_real = torch.cat([D(*pair) for pair in zip(x.split(250), z_hat.split(250))])
    d_tilde = torch.cat([D(*pair) for pair in zip(x_tilde.split(250), z_hat.split(250))])
    x_hat = G(z)
    mean_image = to_float(data.train.sum(dim=0) / len(data.train)).to(z.device)  # mean() takes no uint8; sum() does
    results = {
        "heldout_l1": F.l1_loss(x_tilde, x).item(),
        "heldout_l1_of_mean_image": F.l1_loss(mean_image.expand_as(x), x).item(),
        "sharpness": (edges(x_tilde) / edges(x)).item(),
        "sharpness_of_halves": (edges(F.avg_pool2d(x_tilde, 2)) / edges(F.avg_pool2d(x, 2))).item(),  # at half the size
        "autodecoder_q": penalty(z_tilde, z_hat).item(),  # Eq. 7, L_AD'
        "latent_l1": F.l1_loss(E(x_hat), z).item(),
        "d_on_real": 100 * d_real.sigmoid().mean().item(),
        "d_on_reconstructions": 100 * d_tilde.sigmoid().mean().item(),
        "d_on_samples": 100 * D(x_hat, z).sigmoid().mean().item(),
        "sample_diversity": sample_diversity(x_hat, x[: len(z)]),
    }
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
    add = parser.add_argument  # those with default=SUPPRESS get their default from set_defaults, below
    quick = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in QUICK.items())
    add("--experiment", choices=EXPERIMENTS, default="EX7", help="row of Table 1 that sets the next three")
    add("--lambda-1", type=float, default=SUPPRESS, help="weight of Eq. 6: latents z against E(G(z))")
    add("--lambda-2", type=float, default=SUPPRESS, help="weight of Eq. 4: pixels of x against G(E(x))")
    add("--lambda-3", type=float, default=SUPPRESS, help="weight of Eq. 5: AlexNet's features of x against G(E(x))")
    add("--unroll", type=int, default=8, help="K, D's updates that G and E look ahead (Section 5); 0: a plain BiGAN")
    add("--stochastic-encoder", action="store_true", help="E gives a mean and a variance (footnote 1)")
    add("--data", default="faces", help="folder of images, searched recursively, or faces (cartoons), cifar10, mnist")
    add("--out", type=Path, default=f"runs/{NAME}", help="folder for pictures, log.csv, results.json, checkpoint.pt")
    add("--resume", action="store_true", help="go on with the run in --out, with its settings; --steps may be larger")
    add("--quick", action="store_true", help=f"faces within three minutes on two CPU cores: {quick}")
    add("--steps", type=int, default=200_000, help="updates of every network (Section 5)")
    add("--batch-size", type=int, default=32, help="images a step (Section 5)")
    add("--image-size", type=int, choices=IMAGE_SIZES, default=64, help="side of the images in pixels (Section 5)")
    add("--latent-dim", type=int, default=100, help="dimensions Z of the latents (Section 5)")
    add("--channels", type=int, default=64, help="width of the layers next to the image (DCGAN's code)")
    add("--lr", type=float, default=2e-4, help="learning rate (Section 5)")
    add("--log-every", type=int, default=100, help="steps between lines of the log")
    add("--save-every", type=int, default=2000, help="steps between checkpoints, with pictures")
    add("--seed", type=int, default=0, help="of weights, batches and noise; the held-out images are always the same")
    add("--no-graph", action="store_true", help="on CUDA: launch each step anew, not as a recorded CUDA graph")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)  # a first time: some arguments decide the defaults of the others
    parser.set_defaults(**EXPERIMENTS[args.experiment])  # lambda_1 to lambda_3, where not given
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
        H = Features().to(device) if args.lambda_3 > 0 else None
        data = load_data(args.data, args.image_size, args.batch_size)
        out.mkdir(parents=True, exist_ok=True)
    except (DataError, OSError) as error:  # their messages name the file or folder
        fail(str(error))

    torch.manual_seed(args.seed)
    nets = build_networks(args.image_size, args.channels, args.latent_dim, args.stochastic_encoder).to(device)
    optimizer = build_optimizer(nets, args.lr)
    weights = {"lambda_1": args.lambda_1, "lambda_2": args.lambda_2, "lambda_3": args.lambda_3}
    z_shown = torch.rand(256, args.latent_dim, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1
    config = {name: value for name, value in vars(args).items() if name not in ("out", "resume", "device", "no_graph")}
    begin, log = restore(checkpoint, args, data, nets, optimizer) if checkpoint else (0, "")
    print(f"{weights} on {len(data.train)} images of {args.data}, {device}, step {begin}, in {out}/")

    images = place_images(data.train, device)
    step_function = partial(train_step, nets, optimizer, H, weights, args.unroll)
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
    results = measure(nets, data, z_shown)
    for name, value in results.items():
        print(f"{name:26}{value:10.3f}")
    (out / "results.json").write_text(json.dumps({**results, "steps": args.steps, "config": config}, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped: --resume goes on from the last checkpoint, if there is one", status=130)
