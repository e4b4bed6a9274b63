import copy
import json
import math
import shutil
import subprocess
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, TINY, adam_by_hand, assert_refused, load, log_of, refuse_reading_back, run_as_a_user, start
from PIL import Image
from torch import nn
from torch.nn.utils import parametrize
from torchvision.transforms.v2.functional import adjust_contrast, gaussian_blur

import pagan
from common import Data, draw_faces, to_float

SMALL = [*TINY, "--classifier", "none"]
KINDS = ("crop", "blur", "contrast", "none")


def tiny(reconstruction="pair", seed=0):
    """Small networks in float64 with weights that let every gradient be seen, and a batch x, x_aug, z, epsilon."""
    torch.manual_seed(seed)
    nets = pagan.build_networks(reconstruction, 16, 2, 5).double()
    for parameter in nets.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    x, x_aug = torch.rand(2, 4, 3, 16, 16).double() * 2 - 1
    for _ in range(20):  # power iterations, for the norms of the new weights
        nets["D_x"](x)
        if "D_xx" in nets:
            nets["D_xx"](x, x)
    return nets, x, x_aug, *torch.randn(2, 4, 5).double()


def softplus(x):
    return np.log(1 + np.exp(x))


# ---------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("size", pagan.IMAGE_SIZES)
def test_shapes_and_ranges(size):
    nets = pagan.build_networks("pair", size, 2, 7)
    x, z = torch.randn(3, 3, size, size), torch.randn(3, 7)
    assert nets["G"](z).shape == (3, 3, size, size) and nets["G"](100 * z).abs().max() <= 1
    assert nets["E"](x).shape == (3, 14)
    for logits in (nets["D_x"](x), nets["D_z"](z), nets["D_xx"](x, x)):
        assert logits.shape == (3, 1)


def test_weights_of_sngan_s_networks_counted_by_hand():
    def conv(c_in, c_out, kernel):
        return kernel**2 * c_in * c_out + c_out

    norms = 2 * (512 + 256 + 128 + 64)
    d = conv(64, 64, 4) + conv(64, 128, 3) + conv(128, 128, 4) + conv(128, 256, 3) + conv(256, 256, 4)
    d += conv(256, 512, 3) + 4 * 4 * 512 + 1
    between = conv(64, 128, 4) + conv(128, 256, 4) + conv(256, 512, 4)
    expected = {
        "G": 128 * 8192 + 8192 + conv(512, 256, 4) + conv(256, 128, 4) + conv(128, 64, 4) + conv(64, 3, 3) + norms,
        "E": conv(3, 64, 3) + between + norms + 8192 * 256 + 256,
        "D_x": conv(3, 64, 3) + d,
        "D_z": 128 * 512 + 512 + 512 * 512 + 512 + 512 + 1,
        "D_xx": conv(6, 64, 3) + d,
    }
    nets = pagan.build_networks("pair", 32, 64, 128)
    assert {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()} == expected


def kinds(net):
    return [type(layer).__name__.removeprefix("Parametrized") for layer in net]


def test_layers_in_order():
    nets = pagan.build_networks("pair", 16, 2, 5)
    stage = ["ConvTranspose2d", "BatchNorm2d", "ReLU"]
    assert kinds(nets["G"]) == ["Linear", "Unflatten", "BatchNorm2d", "ReLU", *stage, *stage, "Conv2d", "Tanh"]
    assert kinds(nets["E"]) == [*["Conv2d", "BatchNorm2d", "LeakyReLU"] * 3, "Flatten", "Linear"]
    for name in ("D_x", "D_xx"):
        assert kinds(nets[name]) == [*["Conv2d", "LeakyReLU"] * 5, "Flatten", "Linear"]
        convs = [layer for layer in nets[name] if isinstance(layer, nn.Conv2d)]
        assert [(c.kernel_size[0], c.stride[0]) for c in convs] == [(3, 1), (4, 2), (3, 1), (4, 2), (3, 1)]
    assert kinds(nets["D_z"]) == ["Linear", "LeakyReLU", "Linear", "LeakyReLU", "Linear"]
    slopes = {layer.negative_slope for layer in nets.modules() if isinstance(layer, nn.LeakyReLU)}
    assert slopes == {0.1} and set(pagan.build_networks("l1", 16, 2, 5)) == {"G", "E", "D_x", "D_z"}


def test_spectral_norm_in_the_image_discriminators_and_nowhere_else():
    nets, x, *_ = tiny()
    for name, net in nets.items():
        layers = [layer for layer in net if isinstance(layer, nn.Conv2d | nn.Linear | nn.ConvTranspose2d)]
        assert all(parametrize.is_parametrized(layer, "weight") == (name in ("D_x", "D_xx")) for layer in layers)
    for _ in range(200):  # a power iteration each
        nets["D_x"](x)
        nets["D_xx"](x, x)
    nets.eval()
    for name in ("D_x", "D_xx"):
        for layer in nets[name]:
            if hasattr(layer, "weight"):
                norm = np.linalg.norm(layer.weight.detach().flatten(1).numpy(), 2)
                assert norm == pytest.approx(1, abs=1e-3)


def test_a_pair_is_six_channels_the_first_image_first():
    nets, x, y, *_ = tiny()
    nets.eval()
    seen = []
    nets["D_xx"][0].register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    nets["D_xx"](x, y)
    assert torch.equal(seen[0], torch.cat([x, y], dim=1)) and not torch.allclose(nets["D_xx"](x, y), nets["D_xx"](y, x))


# ----------------------------------------------------------------------------------------------------- augmentations


@pytest.mark.parametrize("size, p", [(16, 0.0), (16, 0.1), (32, 0.1), (32, 0.2), (16, 0.5)])
def test_crop_against_a_loop(size, p):
    x, u = torch.randn(40, 3, size, size), torch.rand(40, 2)
    pad = round(p * size)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode="reflect")
    rows, columns = np.floor(u.numpy() * (2 * pad + 1)).astype(int).T
    y = pagan.crop(x, u, p)
    for i, (row, column) in enumerate(zip(rows, columns)):
        assert np.array_equal(y[i].numpy(), padded[i, :, row : row + size, column : column + size])
    assert y.shape == x.shape and y.is_contiguous()
    if p == 0:
        assert torch.equal(y, x)


def test_crop_cuts_everywhere_and_never_beyond():
    x = torch.arange(32.0).expand(3, 32, 32)  # the value of a pixel is its column
    u = torch.cat([torch.rand(500, 2), torch.tensor([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24]])])
    y = pagan.crop(x.expand(502, -1, -1, -1), u, 0.1)
    first = y[:, 0, 0, 5].int()
    assert set(first.tolist()) == set(range(2, 9)) and first[-2] == 2 and first[-1] == 8  # 3 pixels either way
    assert (y[:, 0, 0] == y[:, 2, 31]).all()
    down = pagan.crop(x.mT.expand(502, -1, -1, -1), u, 0.1)[:, 0, 5, 0].int()
    assert set(down.tolist()) == set(range(2, 9)) and not torch.equal(first, down)


@pytest.mark.parametrize("size", pagan.IMAGE_SIZES)
def test_blur_against_torchvision(size):
    x, u = torch.randn(5, 3, size, size).double(), torch.rand(5, 2).double()
    kernel = 2 * math.ceil(3 * size * 3 / 64) + 1
    y = pagan.blur(x, u)
    for image, blurred, (amount, _) in zip(x, y, u.tolist()):
        expected = gaussian_blur(image, [kernel] * 2, [size / 32 * (0.5 + amount)] * 2)  # 1/64 to 3/64 of the side
        torch.testing.assert_close(blurred, expected)
    flat = torch.full((2, 3, size, size), 0.3)
    torch.testing.assert_close(pagan.blur(flat, torch.rand(2, 2)), flat)


def test_contrast_against_torchvision():
    x, u = torch.rand(5, 3, 16, 16).double(), torch.rand(5, 2).double()
    grey = x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    y = pagan.contrast(2 * grey - 1, u)
    for image, changed, (amount, _) in zip(grey, y, u.tolist()):
        torch.testing.assert_close((changed + 1) / 2, adjust_contrast(image, 0.5 + amount), atol=1e-3, rtol=0)
    mean = (2 * x - 1).mean((1, 2, 3), keepdim=True)
    half = pagan.contrast(2 * x - 1, torch.full((5, 2), 0.5).double())
    torch.testing.assert_close(half, 2 * x - 1)  # a factor of 1
    torch.testing.assert_close(pagan.contrast(2 * x - 1, 0 * u), mean + 0.5 * (2 * x - 1 - mean))
    assert pagan.contrast(3 * (2 * x - 1), u).abs().max() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_augment_takes_the_named_one(kind):
    x, u = torch.rand(4, 3, 16, 16) * 2 - 1, torch.rand(4, 2)
    expected = {"crop": pagan.crop(x, u, 0.2), "blur": pagan.blur(x, u), "contrast": pagan.contrast(x, u), "none": x}
    assert torch.equal(pagan.augment(x, u, kind, 0.2), expected[kind])


# ------------------------------------------------------------------------------------------------------------ losses


def test_reparameterise():
    mean, log_variance, epsilon = torch.randn(3, 4, 5).double()
    expected = mean.numpy() + epsilon.numpy() * np.sqrt(np.exp(log_variance.numpy()))
    np.testing.assert_allclose(pagan.reparameterise(mean, log_variance, epsilon).numpy(), expected)
    mean, log_variance = mean.requires_grad_(), log_variance.requires_grad_()
    torch.autograd.gradcheck(pagan.reparameterise, (mean, log_variance, epsilon))


def test_discriminator_loss():
    real, fake = 3 * torch.randn(2, 6, 1).double()
    d = lambda logits: 1 / (1 + np.exp(-logits.numpy()))  # noqa: E731
    expected = -np.log(d(real)).mean() - np.log(1 - d(fake)).mean()
    assert pagan.discriminator_loss(real, fake).item() == pytest.approx(expected)
    zero = torch.zeros(6, 1).double()
    assert pagan.discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert pagan.discriminator_loss(zero + 40, zero - 40) < 1e-15 < 79 < pagan.discriminator_loss(zero - 40, zero + 40)
    torch.autograd.gradcheck(pagan.discriminator_loss, (real.requires_grad_(), fake.requires_grad_()))


def test_pair_loss():
    logits = 3 * torch.randn(6, 1).double()
    assert pagan.pair_loss(logits).item() == pytest.approx(-np.log(1 / (1 + np.exp(-logits.numpy()))).mean())
    assert pagan.pair_loss(logits + 1) < pagan.pair_loss(logits)
    torch.autograd.gradcheck(pagan.pair_loss, logits.requires_grad_())


@pytest.mark.parametrize("loss", [pagan.generator_loss, pagan.encoder_loss])
def test_losses_of_generator_and_encoder(loss):
    logits, L_rec = 3 * torch.randn(6, 1).double(), torch.rand(()).double()
    expected = -np.log(1 / (1 + np.exp(-logits.numpy()))).mean() + L_rec.item()
    assert loss(logits, L_rec).item() == pytest.approx(expected)
    assert loss(logits + 1, L_rec) < loss(logits, L_rec)
    torch.autograd.gradcheck(loss, (logits.requires_grad_(), L_rec.requires_grad_()))


def test_l1_loss():
    a, b = torch.randn(2, 2, 3, 4, 4).double()
    assert pagan.l1_loss(a, b).item() == pytest.approx(np.abs(a.numpy() - b.numpy()).sum() / a.numel())
    assert pagan.l1_loss(a, a) == 0
    torch.autograd.gradcheck(pagan.l1_loss, (a.requires_grad_(), b.requires_grad_()))


@pytest.mark.parametrize("reconstruction", ["pair", "l1"])
def test_all_losses_against_numpy(reconstruction):
    nets, x, x_aug, z, epsilon = tiny(reconstruction)
    nets.eval()  # so that one image is judged without regard to the others
    losses = pagan.all_losses(nets, x, x_aug, z, epsilon, 7.0)
    with torch.no_grad():
        mean, log_variance = nets["E"](x)[:, :5], nets["E"](x)[:, 5:]
        z_hat = mean + epsilon * (log_variance / 2).exp()
        x_pr, x_rec = nets["G"](z), nets["G"](z_hat)
        log_d = lambda name, *inputs: -softplus(-nets[name](*inputs).numpy()).mean()  # noqa: E731
        log_not_d = lambda name, *inputs: -softplus(nets[name](*inputs).numpy()).mean()  # noqa: E731
        expected = {
            "L_d_x": -log_d("D_x", x) - log_not_d("D_x", x_pr),
            "L_d_z": -log_d("D_z", z) - log_not_d("D_z", z_hat),
        }
        if reconstruction == "pair":
            expected["L_d_xx"] = -log_d("D_xx", x, x_aug) - log_not_d("D_xx", x, x_rec)
            rec = -log_d("D_xx", x, x_rec)
        else:
            rec = 7 * np.abs(x.numpy() - x_rec.numpy()).mean()
        expected |= {"L_g": -log_d("D_x", x_pr) + rec, "L_e": -log_d("D_z", z_hat) + rec, "L_rec": rec}
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected)


@pytest.mark.parametrize(
    "reconstruction, name, reached",
    [
        ("pair", "L_d_x", {"D_x", "G"}),
        ("pair", "L_d_z", {"D_z", "E"}),
        ("pair", "L_d_xx", {"D_xx", "G", "E"}),
        ("pair", "L_g", {"D_x", "D_xx", "G", "E"}),
        ("pair", "L_e", {"D_z", "D_xx", "G", "E"}),
        ("l1", "L_d_x", {"D_x", "G"}),
        ("l1", "L_g", {"D_x", "G", "E"}),
        ("l1", "L_e", {"D_z", "G", "E"}),
        ("l1", "L_rec", {"G", "E"}),
    ],
)
def test_which_networks_a_loss_reaches(reconstruction, name, reached):
    nets, *batch = tiny(reconstruction)
    nets["G"].eval()  # else E reaches the samples through the statistics of the batch that they share
    loss = pagan.all_losses(nets, *batch, 10.0)[name]
    for net in nets:
        gradients = torch.autograd.grad(loss, list(nets[net].parameters()), retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in gradients) == (net in reached), net


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("reconstruction", ["pair", "l1"])
def test_train_step_against_autograd_by_hand(reconstruction):
    nets, *_ = tiny(reconstruction)
    optimizers, other, moments = pagan.build_optimizers(nets, 1e-3), copy.deepcopy(nets), {}
    for i in range(3):
        torch.manual_seed(10 + i)
        (x, x_aug), (z, epsilon) = torch.rand(2, 4, 3, 16, 16).double() * 2 - 1, torch.randn(2, 4, 5).double()
        losses = pagan.train_step(nets, optimizers, x, x_aug, z, epsilon, 7.0)
        mean, log_variance = other["E"](x).chunk(2, 1)
        z_hat = mean + epsilon * (log_variance / 2).exp()
        images = other["G"](torch.cat([z, z_hat]))
        x_pr, x_rec = images[:4], images[4:]
        log = torch.nn.functional.logsigmoid
        d = other["D_x"](torch.cat([x, x_pr]))
        d_z = other["D_z"](torch.cat([z, z_hat]))
        if reconstruction == "pair":
            d_xx = other["D_xx"](torch.cat([x, x]), torch.cat([x_aug, x_rec]))
            rec = -log(d_xx[4:]).mean()
        else:
            rec = 7 * (x - x_rec).abs().mean()
        values = {
            "L_d_x": (-log(d[:4]).mean() - log(-d[4:]).mean(), "D_x"),
            "L_d_z": (-log(d_z[:4]).mean() - log(-d_z[4:]).mean(), "D_z"),
            "L_g": (-log(d[4:]).mean() + rec, "G"),
            "L_e": (-log(d_z[4:]).mean() + rec, "E"),
        }
        if reconstruction == "pair":
            values["L_d_xx"] = -log(d_xx[:4]).mean() - log(-d_xx[4:]).mean(), "D_xx"
        assert set(values) == set(optimizers)
        updates = []
        for name, (value, net) in values.items():
            assert losses[name].item() == pytest.approx(value.item()) and not losses[name].requires_grad
            parameters = list(other[net].parameters())
            gradients = torch.autograd.grad(value, parameters, retain_graph=True)
            zeros = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
            updates.append((parameters, gradients, 1e-3, moments.setdefault(name, [0, *zeros])))
        for update in updates:
            adam_by_hand(*update)
    for name, parameter in nets.named_parameters():
        if "bias" in name and parameter.grad.abs().max() < 1e-12:
            continue  # before batch norm a bias has no gradient but rounding, of which Adam makes whole steps
        torch.testing.assert_close(parameter, other.get_parameter(name), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("reconstruction, kind", [("l1", "none"), *(("pair", kind) for kind in KINDS)])
def test_train_step_never_reads_a_tensor_back(reconstruction, kind, monkeypatch):
    nets, images = pagan.build_networks(reconstruction, 16, 2, 5), draw_faces(8, 16)[0]
    optimizers = pagan.build_optimizers(nets, 2e-4)
    refuse_reading_back(monkeypatch)
    pagan.train_step(nets, optimizers, *pagan.draw_batch(images[:4], 5, kind, 0.1), 10.0)


def test_batches_are_the_images_their_augmentations_and_normal_noise(monkeypatch):
    images, seen = draw_faces(10, 16)[0].repeat(50, 1, 1, 1), []
    monkeypatch.setattr(pagan, "augment", lambda *args: seen.append(args) or args[0] / 2)
    torch.manual_seed(0)
    x, x_aug, z, epsilon = pagan.draw_batch(images, 7, "blur", 0.3)
    assert torch.equal(x, to_float(images))
    (source, u, kind, p), *more = seen
    assert not more and torch.equal(source, x) and torch.equal(x_aug, x / 2) and (kind, p) == ("blur", 0.3)
    assert u.shape == (500, 2) and 0 <= u.min() < 0.02 and 0.98 < u.max() < 1
    assert abs(torch.corrcoef(u.T)[0, 1]) < 0.2
    for noise in (z, epsilon):
        assert noise.shape == (500, 7) and abs(noise.mean()) < 0.1 and noise.std().item() == pytest.approx(1, abs=0.1)
    assert abs(torch.corrcoef(torch.stack([z.flatten(), epsilon.flatten()]))[0, 1]) < 0.1


# -------------------------------------------------------------------------------------------------------- evaluation


def test_rid():
    log_p, log_q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    rid = pagan.reconstruction_inception_dissimilarity
    assert rid(log_p, log_q) == pytest.approx(math.sqrt(4 / 3))  # KL = (log 2 + log 2/3) / 2
    assert rid(log_p, log_p) == 1
    assert rid(torch.cat([log_p, log_p]), torch.cat([log_q, log_p])) == pytest.approx((4 / 3) ** 0.25)
    p, q = torch.randn(2, 9, 7).double().log_softmax(2)
    expected = np.exp((p.exp().numpy() * (p.numpy() - q.numpy())).sum(1).mean())
    assert rid(p, q) == pytest.approx(expected) and rid(q, p) != pytest.approx(expected) and expected > 1
    sure = torch.tensor([[0.0, 200.0]]).log_softmax(1)
    assert rid(sure, sure.flip(1)) == pytest.approx(math.exp(200)) and rid(sure, sure) == 1


def test_inception_score():
    uniform, certain = torch.full((40, 8), 1 / 8), torch.eye(8).repeat(10, 1)  # every split has each class once
    assert pagan.inception_score(uniform) == pytest.approx((1, 0), abs=1e-6)
    assert pagan.inception_score(certain) == pytest.approx((8, 0), abs=1e-5)
    p = torch.randn(67, 7).double().softmax(1)
    scores = []
    for part in np.array_split(p.numpy(), 10):
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    assert pagan.inception_score(p) == pytest.approx((np.mean(scores), np.std(scores)))


def with_moments(mean, covariance, count):
    """Points [count, F] whose mean and covariance are exactly these."""
    points = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(count)).double()
    points -= points.mean(0)
    points = points @ torch.linalg.inv(torch.linalg.cholesky(points.T.cov())).T
    return points @ torch.linalg.cholesky(covariance).T + mean


def test_fid_of_gaussians_with_known_distance():
    fid = pagan.frechet_inception_distance
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 1.0]).double()
    mean = torch.tensor([1.0, 2.0, 2.0]).double()
    x, y = with_moments(mean, a.diag(), 30), with_moments(0 * mean, b.diag(), 50)
    assert fid(x, y) == pytest.approx(9 + 1 + 1 + 4)  # |m|^2 + sum of (sqrt a - sqrt b)^2
    assert fid(y, x) == pytest.approx(fid(x, y)) and fid(x, x) == pytest.approx(0, abs=1e-9)
    assert fid(x + 3, x) == pytest.approx(27)


def test_fid_against_the_root_of_the_product():
    """Covariances that do not commute: the eigenvalues of C_a C_b itself, in NumPy."""
    torch.manual_seed(0)
    x, y = (
        torch.randn(40, 6).double() @ torch.randn(6, 6).double(),
        torch.randn(50, 6).double() @ torch.randn(6, 6).double(),
    )
    c_x, c_y = np.cov(x.numpy().T), np.cov(y.numpy().T)
    trace = np.sqrt(np.linalg.eigvals(c_x @ c_y).real.clip(0)).sum()
    expected = ((x.mean(0) - y.mean(0)).numpy() ** 2).sum() + np.trace(c_x) + np.trace(c_y) - 2 * trace
    assert pagan.frechet_inception_distance(x, y) == pytest.approx(expected)
    assert pagan.frechet_inception_distance(y, x) == pytest.approx(expected)
    assert pagan.frechet_inception_distance(x.float(), y.float()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("count, size", [(2500, 1024), (30, 200)])
def test_fid_of_many_features_from_few_samples(count, size):
    torch.manual_seed(0)
    rank = 100  # as Inception's features: most directions hardly vary
    basis = torch.randn(rank, size) / math.sqrt(size)
    x, y = (torch.randn(count, rank) @ basis for _ in range(2))
    moved, other = (pagan.frechet_inception_distance(x, features) for features in (x + 0.1, y))
    assert moved == pytest.approx(0.01 * size, rel=1e-4)  # so the covariances cancel
    c_x, c_y = (torch.cov(features.T.double()) for features in (x, y))
    assert 0 < other < (c_x.trace() + c_y.trace()) / (2 if count < size else 20)


def stub_networks():
    """E(x) is half of x's mean colour and a variance of 1, G(z) an image of the first three latents."""
    nets = nn.ModuleDict({"G": nn.Module(), "E": nn.Module()})
    nets["E"].forward = lambda x: torch.cat([x.mean((2, 3)) / 2, x.new_ones(len(x), 3)], 1)
    nets["G"].forward = lambda z: z[:, :3, None, None].expand(-1, -1, 16, 16)
    return nets


def test_reconstructions_are_made_from_the_mean_of_q():
    x = torch.randn(4, 3, 16, 16)
    expected = x.mean((2, 3), keepdim=True).expand_as(x) / 2
    torch.testing.assert_close(pagan.reconstruct(stub_networks(), x), expected)


def stub_classifier(x):
    return x[:, :, :2, :2].flatten(1) * 3, x[:, 0, :4, 0]


@pytest.mark.parametrize("kind", ["crop", "none"])
def test_measure_against_numpy(kind):
    nets, *_ = tiny()
    nets, z = nets.float().eval(), torch.randn(80, 5)
    torch.manual_seed(0)
    images = torch.randint(256, (1340, 3, 16, 16), dtype=torch.uint8)
    data = Data(images[:1100] // 2, images[1100:], (), None, None)
    results = pagan.measure(nets, data, z, kind, 0.2, stub_classifier, 130)
    assert nets.training
    nets.eval()
    x, generator = to_float(data.heldout), torch.Generator().manual_seed(1)
    with torch.no_grad():
        rec, u = (
            nets["G"](nets["E"](x)[:, :5]),
            torch.cat([torch.rand(n, 2, generator=generator) for n in (100, 100, 40)]),
        )
        aug, blur, crop = pagan.augment(x, u, kind, 0.2), pagan.blur(x, u), pagan.crop(x, u, 0.2)
        samples = nets["G"](torch.randn(130, 5, generator=generator))
        judged = [stub_classifier(part) for part in (x, rec, aug, samples, to_float(data.train[:130]))]
        (p, f), (p_rec, _), (p_aug, _), (p_pr, f_pr), (p_train, _) = [
            (logits.log_softmax(1), feature) for logits, feature in judged
        ]
        l1 = lambda a, b: np.abs(a.numpy() - b.numpy()).mean()  # noqa: E731
        l2 = lambda a, b: ((a.numpy() - b.numpy()) ** 2).mean()  # noqa: E731
        expected = {
            "heldout_l1": l1(rec, x),
            "heldout_l1_of_mean_image": np.abs(x.numpy() - (data.train.numpy() / 127.5 - 1).mean(0)).mean(),
            "l1_of_blur": l1(blur, x),
            "l1_of_crop": l1(crop, x),
            "l2_of_blur": l2(blur, x),
            "l2_of_crop": l2(crop, x),
            "rmse_255": np.sqrt((((rec - x) * 127.5).numpy() ** 2).mean()),
            "rmse_255_of_augmentation": np.sqrt((((aug - x) * 127.5).numpy() ** 2).mean()),
            "sample_diversity": pagan.sample_diversity(nets["G"](z), x[:80]),
            "fid": pagan.frechet_inception_distance(f, f_pr),
            "inception_score": pagan.inception_score(p_pr.exp())[0],
            "inception_score_std": pagan.inception_score(p_pr.exp())[1],
            "inception_score_of_real": pagan.inception_score(p_train.exp())[0],
            "rid": pagan.reconstruction_inception_dissimilarity(p, p_rec),
            "rid_of_augmentation": pagan.reconstruction_inception_dissimilarity(p, p_aug),
        }
    for name, value in expected.items():
        assert results[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert set(results) == set(expected)
    assert (results["rid_of_augmentation"] == pytest.approx(1)) == (kind == "none")
    without = pagan.measure(nets, data, z, kind, 0.2)
    assert all(without[name] is None for name in list(expected)[-6:])


def test_figures_show_what_they_say(monkeypatch, tmp_path):
    shown = {}
    monkeypatch.setattr(
        pagan, "save_grid", lambda path, *images, **options: shown.update({path.name: (images, options)})
    )
    images = draw_faces(60, 16)[0]
    data, z = Data(images[:20], images[20:], (), None, None), torch.randn(256, 3)
    nets = stub_networks()
    pagan.save_figures(nets, data, z, tmp_path, 0.2)
    x = to_float(data.heldout)
    assert set(shown) == {"figure_samples.png", "figure_reconstructions.png", "figure_augmentations.png"}
    assert torch.equal(shown["figure_samples.png"][0][0], nets["G"](z[:100]))
    originals, reconstructions = shown["figure_reconstructions.png"][0]
    assert torch.equal(originals, x) and len(x) == 40
    torch.testing.assert_close(reconstructions, x.mean((2, 3), keepdim=True).expand_as(x) / 2)
    columns, options = shown["figure_augmentations.png"]
    u = torch.rand(10, 2, generator=torch.Generator().manual_seed(0))
    expected = (x[:10], *(pagan.augment(x[:10], u, kind, 0.2) for kind in ("blur", "contrast", "crop")))
    for shown_images, wanted in zip(columns, expected, strict=True):
        assert torch.equal(shown_images, wanted)
    assert options == {"columns": 2, "captions": [["original"], ["blur"], ["contrast"], ["pad + crop"]]}
    pagan.save_figures(nets, data, z, tmp_path, 0.2, step=70)
    assert {"samples_70.png", "reconstructions_70.png"} <= set(shown) and len(shown) == 5


# ------------------------------------------------------------------------------------------------------ command line


def test_a_run_as_a_user_starts_it(photos, tmp_path):
    pictures = {f"samples_{step}": (10, 10, 1) for step in (2, 4, 5)}
    pictures |= {f"reconstructions_{step}": (5, 8, 2) for step in (2, 4, 5)}
    pictures |= {"figure_samples": (10, 10, 1), "figure_reconstructions": (5, 8, 2), "figure_augmentations": (2, 5, 4)}
    arguments = ["--data", photos, *SMALL, "--steps", 5]
    out, results, header, _ = run_as_a_user("pagan", *arguments, cwd=tmp_path, pictures=pictures)
    assert results["config"]["channels"] == 2 and out.startswith("pair: augmentation crop, on ")
    assert results["fid"] is results["rid"] is results["inception_score"] is results["classifier"] is None
    numbers = "heldout_l1 heldout_l1_of_mean_image l1_of_blur l1_of_crop l2_of_blur l2_of_crop rmse_255"
    for name in [*numbers.split(), "rmse_255_of_augmentation", "sample_diversity"]:
        assert 0 < results[name] < 255 and f"{name:26}{results[name]:10.3f}" in out
    assert header == "L_d_x L_d_z L_d_xx L_g L_e L_rec".split()


def test_pagan_l1_has_no_pair_discriminator(photos, tmp_path, cli):
    result = cli(pagan, "--reconstruction", "l1", "--data", photos, *SMALL, "--steps", 2, "--out", tmp_path / "l1")
    assert result.status == 0 and result.out.startswith("l1: L1 loss times 10, on "), result
    assert log_of(tmp_path / "l1")[0] == ["step", "L_d_x", "L_d_z", "L_g", "L_e", "L_rec"]
    assert not any(name.startswith("D_xx") for name in load(tmp_path / "l1")["networks"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_augmentation_trains(kind, photos, tmp_path, cli):
    run = tmp_path / "run"
    result = cli(pagan, "--augmentation", kind, "--data", photos, *SMALL, "--steps", 2, "--out", run)
    assert result.status == 0 and f"augmentation {kind}" in result.out, result
    assert (json.loads((run / "results.json").read_text())["rmse_255_of_augmentation"] == 0) == (kind == "none")


def make_classifier(*arguments):
    command = [sys.executable, ROOT / "tests" / "make_classifier.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def classifier(photos, tmp_path_factory):
    """A classifier made of photos in three sub-folders, and this folder."""
    folder, path = tmp_path_factory.mktemp("classes"), tmp_path_factory.mktemp("made") / "classifier.pt"
    shutil.copy(photos / "1.png", folder / "of no class.png")
    for i, image in enumerate(sorted(photos.glob("*.png"))):
        (folder / "abc"[i % 3]).mkdir(exist_ok=True)
        shutil.copy(image, folder / "abc"[i % 3])
    result = make_classifier("--data", folder, "--steps", 30, "--out", path)
    assert result.returncode == 0 and "sub-folders: a, b, c" in result.stdout and "3 classes" in result.stdout, result
    return path, folder


def test_a_classifier_of_sub_folders_measures_a_run(classifier, tmp_path, cli):
    path, folder = classifier
    run = tmp_path / "run"
    small = ["--data", folder, *TINY, "--steps", 2, "--samples", 20, "--out", run]
    assert cli(pagan, *small, "--classifier", path).status == 0
    results = json.loads((run / "results.json").read_text())
    assert results["classifier"] == str(path) and results["fid"] > 0
    assert 1 <= results["inception_score"] <= 3 and results["rid"] > 1 and results["rid_of_augmentation"] > 1
    net, nets = torch.jit.load(path).eval(), pagan.build_networks("pair", 16, 2, 128).eval()
    nets.load_state_dict(load(run)["networks"])
    with torch.no_grad():
        x = to_float(pagan.load_data(folder, 16).heldout)
        (logits, features), (logits_rec, _) = net(x), net(nets["G"](nets["E"](x)[:, :128]))
    assert features.shape == (len(x), 128) and logits.shape == (len(x), 3)
    rid = pagan.reconstruction_inception_dissimilarity(logits.log_softmax(1), logits_rec.log_softmax(1))
    assert results["rid"] == pytest.approx(rid, rel=1e-4)
    again = ["--eval", "--out", run, "--device", "cpu", "--classifier", path, "--samples", 30]
    assert cli(pagan, *again).status == 0
    assert json.loads((run / "results.json").read_text())["inception_score"] != results["inception_score"]


def test_a_classifier_of_attributes(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    rows = [f"{i}.png,{i % 2},{int(i > 14)},0" for i in range(30)]
    (tmp_path / "photos" / "attributes.csv").write_text("\n".join(["file,odd,late,never", *rows]))
    result = make_classifier("--data", tmp_path / "photos", "--steps", 10, "--out", tmp_path / "c.pt")
    assert result.returncode == 0 and "4 classes" in result.stdout, result
    logits, features = torch.jit.load(tmp_path / "c.pt")(torch.zeros(3, 3, 16, 16))
    assert logits.shape == (3, 4) and features.shape == (3, 128)


class Picky(nn.Module):
    """A classifier of 32x32 images alone."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 32 * 32, 5)

    def forward(self, x: torch.Tensor):
        y = self.linear(x.flatten(1))
        return y, torch.dropout(y, 0.5, self.training)


def test_a_classifier_of_other_images_is_refused(tmp_path, capsys):
    torch.jit.script(Picky().train()).save(tmp_path / "c.pt")
    assert not pagan.load_classifier(str(tmp_path / "c.pt"), None, 32).training
    with pytest.raises(SystemExit):
        pagan.load_classifier(str(tmp_path / "c.pt"), None, 16)
    assert "[N, 3, 16, 16]" in capsys.readouterr().err


def test_a_classifier_that_is_missing_is_refused_in_one_line(photos, tmp_path):
    process = start("pagan", "--data", photos, *TINY, "--classifier", "missing.pt", cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.count("error") == 1 and "Warning" not in err


def test_a_classifier_needs_classes(tmp_path):
    for i, image in enumerate(draw_faces(25, 16)[0]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    for folder in (tmp_path, tmp_path / "missing"):
        result = make_classifier("--data", folder, "--out", tmp_path / "c.pt")
        assert result.returncode == 1 and "error" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "c.pt").exists()


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """A file like torchvision's of Inception v3's weights, but with random ones that let images differ."""
    torch.manual_seed(0)
    net = torchvision.models.inception_v3(weights=None, init_weights=False).eval()
    for parameter in net.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(net.state_dict(), path)
    return path


def test_inception_sees_images_of_299_pixels_in_its_own_range(inception_file):
    weights = torch.load(inception_file, weights_only=True)
    net = torchvision.models.inception_v3(weights=None, init_weights=False).eval()
    net.load_state_dict(weights)
    pooled = []
    net.avgpool.register_forward_hook(lambda layer, inputs, output: pooled.append(output.flatten(1)))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        logits, features = pagan.Inception(weights).eval()(x)
        expected = net(F.interpolate(x, (299, 299), mode="bilinear"))
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(features, pooled[0])
    assert features.shape == (2, 2048) and features.std(0).max() > 0


def test_inception_measures_a_run(photos, tmp_path, cli, monkeypatch, inception_file):
    def download(*_, **options):
        assert options == {"check_hash": True, "weights_only": True}
        return torch.load(inception_file, weights_only=True)

    small = ["--data", photos, *TINY, "--steps", 1, "--samples", 12, "--out", tmp_path / "run"]
    assert cli(pagan, *small, "--inception-weights", inception_file).status == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["classifier"] == "inception" and results["fid"] > 0 and results["rid"] > 1
    monkeypatch.setattr(torchvision.models.Inception_V3_Weights, "get_state_dict", download)
    config = ["--eval", "--out", tmp_path / "run", "--device", "cpu"]
    assert_refused(cli(pagan, *config, "--inception-weights", tmp_path / "run" / "checkpoint.pt"), "Inception v3")
    net = pagan.load_classifier("inception", None, 16)
    assert net.fc.out_features == 1000 and not net.training


def test_without_inception_s_weights_everything_else_is_written(photos, tmp_path, cli, monkeypatch, inception_file):
    def download(*_, **options):
        assert options == {"check_hash": True, "weights_only": True}
        raise URLError("no route")

    monkeypatch.setattr(torchvision.models.Inception_V3_Weights, "get_state_dict", download)
    result = cli(pagan, "--data", photos, *TINY, "--steps", 1, "--out", tmp_path / "a")
    (line,) = [line for line in result.out.splitlines() if "Inception" in line]
    assert result.status == 0 and "no route" in line and "--inception-weights" in line and "--classifier" in line
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["fid"] is results["classifier"] is None and results["heldout_l1"] > 0


def test_the_settings_reach_the_training_step(photos, tmp_path, cli, monkeypatch):
    def spy(nets, optimizers, x, x_aug, z, epsilon, l1_weight):
        rates = {name: (o.param_groups[0]["lr"], o.param_groups[0]["betas"]) for name, o in optimizers.items()}
        seen.append((x.shape, x_aug.shape, z.shape, epsilon.shape, l1_weight, rates))
        return train_step(nets, optimizers, x, x_aug, z, epsilon, l1_weight)

    seen, drawn, vectors, train_step, draw_batch = [], [], [], pagan.train_step, pagan.draw_batch
    monkeypatch.setattr(pagan, "measure", lambda nets, data, z, *rest: drawn.append(rest) or {})
    monkeypatch.setattr(pagan, "draw_batch", lambda *args: drawn.append(args[1:]) or draw_batch(*args))
    monkeypatch.setattr(pagan, "train_step", spy)
    monkeypatch.setattr(pagan, "save_figures", lambda nets, data, z, out, p, step=None: vectors.append((z, p)))
    settings = "--augmentation blur --crop 0.3 --l1-weight 3 --lr 1e-3 --latent-dim 7 --samples 33".split()
    for i, more in enumerate((settings, [*settings, "--seed", 9], ["--latent-dim", 7])):
        cli(pagan, "--data", photos, *SMALL, "--steps", 1, "--out", tmp_path / str(i), *more)
    losses, batch = ("L_d_x", "L_d_z", "L_d_xx", "L_g", "L_e"), (4, 3, 16, 16)
    first, third = ((weight, dict.fromkeys(losses, (lr, (0.5, 0.999)))) for weight, lr in ((3, 1e-3), (10, 2e-4)))
    assert seen == [(batch, batch, (4, 7), (4, 7), *rest) for rest in (first, first, third)]
    first, third = (((7, kind, p), (kind, p, None, n)) for kind, p, n in (("blur", 0.3, 33), ("crop", 0.1, 10_000)))
    assert drawn == [*first, *first, *third]
    assert [p for _, p in vectors] == [0.3] * 4 + [0.1] * 2
    normal = torch.randn(256, 7, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(z, normal) for z, _ in vectors)  # the same vectors whatever the seed


def test_the_defaults_are_those_of_the_rulings():
    args, _ = pagan.parse_args(["--out", "nowhere"])
    assert (args.steps, args.batch_size, args.image_size, args.latent_dim, args.channels) == (100_000, 64, 32, 128, 64)
    assert (args.lr, args.reconstruction, args.augmentation, args.crop, args.l1_weight) == (
        2e-4,
        "pair",
        "crop",
        0.1,
        10,
    )
    assert (args.classifier, args.samples) == ("inception", 10_000)


# -------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", KINDS)
def test_on_cuda_a_step_never_waits_for_the_device(kind):
    nets, images = pagan.build_networks("pair", 16, 4, 5).cuda(), draw_faces(40, 16)[0].cuda()
    optimizers = pagan.build_optimizers(nets, 2e-4)
    for _ in range(3):
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses = pagan.train_step(nets, optimizers, *pagan.draw_batch(images[:4], 5, kind, 0.1), 10.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(loss.isfinite() and loss.device.type == "cuda" for loss in losses.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_a_run_is_measured_with_a_classifier(classifier, tmp_path, cli):
    path, folder = classifier
    small = ["--data", folder, *TINY, "--device", "cuda", "--steps", 2, "--samples", 20, "--classifier", path]
    assert cli(pagan, *small, "--out", tmp_path / "run").status == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rid"] > 1
