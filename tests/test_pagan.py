import copy
import json
import math
import shutil
import subprocess
import sys
from urllib.error import URLError

import make_classifier
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, TINY, adam_by_hand, assert_refused, load, log_of, refuse_reading_back, run_as_a_user
from PIL import Image
from torch import nn
from torch.nn.utils import parametrize
from torchvision.transforms.v2.functional import gaussian_blur

import pagan
from common import Data, draw_faces, load_data, to_float

KINDS = ("crop", "blur", "contrast", "none")
NUMBERS = "heldout_l1 heldout_l1_of_mean_image l1_of_blur l1_of_crop l2_of_blur l2_of_crop rmse_255".split()
NUMBERS += ["rmse_255_of_augmentation", "sample_diversity"]
JUDGED = "fid inception_score inception_score_std inception_score_of_real rid rid_of_augmentation".split()
WEIGHTED = nn.Conv2d | nn.ConvTranspose2d | nn.Linear


def random_batch(images, latents):
    """x, x_aug, z, epsilon."""
    x, x_aug = torch.rand(2, images, 3, 16, 16).double() * 2 - 1
    return x, x_aug, torch.randn(latents, 5).double(), torch.randn(images, 5).double()


def tiny(reconstruction="pair", images=4, latents=4):
    """Small networks in float64 with weights that let every gradient be seen, and a batch x, x_aug, z, epsilon."""
    torch.manual_seed(0)
    nets = pagan.build_networks(reconstruction, 16, 2, 5).double()
    for parameter in nets.parameters():
        nn.init.normal_(parameter, std=0.3)
    batch = random_batch(images, latents)
    for _ in range(30):  # power iterations, for the norms of the new weights
        nets["D_x"](batch[0])
        if "D_xx" in nets:
            nets["D_xx"](batch[0], batch[1])
    return nets, *batch


def sigmoid(d):
    return 1 / (1 + np.exp(-d.detach().numpy()))


def spread(x):
    """The mean distance of two images."""
    x = x.flatten(1).numpy()
    return np.mean([np.linalg.norm(x[i] - x[j]) for i in range(len(x)) for j in range(i)])


# ---------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("size, widths", [(16, [2, 4, 8]), (32, [2, 4, 8, 16]), (64, [2, 4, 8, 16, 32])])
def test_shapes_and_ranges(size, widths):
    nets = pagan.build_networks("pair", size, 2, 7)
    x, z = torch.randn(3, 3, size, size), torch.randn(3, 7)
    assert pagan.conv_widths(size, 2) == widths and nets.training
    assert nets["G"](z).shape == (3, 3, size, size) and 0.9 < nets["G"](100 * z).abs().max() <= 1
    assert nets["E"](x).shape == (3, 14)
    for logits in (nets["D_x"](x), nets["D_z"](z), nets["D_xx"](x, x)):
        assert logits.shape == (3, 1) and logits.std() > 0


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
    assert set(pagan.build_networks("l1", 16, 2, 5)) == {"G", "E", "D_x", "D_z"}


@pytest.mark.parametrize("training", [True, False])
def test_the_networks_layer_by_layer(training):
    nets, x, y, z, _ = tiny()
    for layer in nets.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    for name in ("G", "E"):
        nets[name].train(training)
    nets["D_x"].eval(), nets["D_xx"].eval()  # without further power iterations

    def norm(h, layer):
        mean, var = layer.running_mean, layer.running_var
        if training:
            mean, var = h.mean((0, 2, 3)), h.var((0, 2, 3), unbiased=False)
        mean, var, weight, bias = (v[:, None, None] for v in (mean, var, layer.weight, layer.bias))
        return (h - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv(h, layer, stride):
        return F.conv2d(h, layer.weight, layer.bias, stride=stride, padding=1)

    def linear(h, layer):
        return h.flatten(1) @ layer.weight.T + layer.bias

    def leaky(h):
        return torch.where(h > 0, h, 0.1 * h)

    G, E, D_z = (list(nets[name]) for name in ("G", "E", "D_z"))
    with torch.no_grad():
        h = norm(linear(z, G[0]).view(4, 8, 4, 4), G[2]).relu()
        for i in (4, 7):
            h = norm(F.conv_transpose2d(h, G[i].weight, G[i].bias, stride=2, padding=1), G[i + 1]).relu()
        expected = {"G": conv(h, G[10], 1).tanh()}
        h = x
        for i, stride in ((0, 1), (3, 2), (6, 2)):
            h = leaky(norm(conv(h, E[i], stride), E[i + 1]))
        expected["E"] = linear(h, E[10])
        for name, h in (("D_x", x), ("D_xx", torch.cat([x, y], 1))):
            layers = list(nets[name])
            for i, stride in ((0, 1), (2, 2), (4, 1), (6, 2), (8, 1)):
                h = leaky(conv(h, layers[i], stride))
            expected[name] = linear(h, layers[11])
        expected["D_z"] = linear(leaky(linear(leaky(linear(z, D_z[0])), D_z[2])), D_z[4])
        for name, inputs in {"G": [z], "E": [x], "D_x": [x], "D_xx": [x, y], "D_z": [z]}.items():
            torch.testing.assert_close(nets[name](*inputs), expected[name], msg=name)


def test_spectral_norm_in_the_image_discriminators_and_nowhere_else():
    nets, x, *_ = tiny()
    for _ in range(300):  # a power iteration each
        nets["D_x"](x)
        nets["D_xx"](x, x)
    nets.eval()
    for name, net in nets.items():
        for layer in net:
            if isinstance(layer, WEIGHTED):
                assert parametrize.is_parametrized(layer, "weight") == (name in ("D_x", "D_xx"))
                if name in ("D_x", "D_xx"):
                    original = layer.parametrizations.weight.original.detach().flatten(1).numpy()
                    expected = original / np.linalg.svd(original, compute_uv=False)[0]
                    np.testing.assert_allclose(layer.weight.detach().flatten(1).numpy(), expected, rtol=1e-3)


def test_initial_weights_are_torch_s():
    layers = [layer for layer in pagan.build_networks("pair", 16, 16, 64).modules() if isinstance(layer, WEIGHTED)]
    for layer in layers:
        weight = getattr(layer, "parametrizations", {"weight": layer})["weight"]
        weight = weight.original if hasattr(weight, "original") else weight.weight
        bound = 1 / math.sqrt(weight[0].numel() if not isinstance(layer, nn.ConvTranspose2d) else weight.shape[1] * 16)
        assert 0.9 * bound < weight.abs().max() <= bound and weight.numel() > 400
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert layer.bias.abs().max() <= bound
    assert len(layers) == 4 + 4 + 6 + 6 + 3


def test_unknown_names_and_sizes_are_refused():
    for reconstruction, size in (("l2", 16), ("pair", 48), ("l1", 8), ("pair", 128)):
        with pytest.raises(ValueError, match="l2.*pair.*l1" if size == 16 else f"image_size {size}.*16, 32, 64"):
            pagan.build_networks(reconstruction, size, 2, 5)
    with pytest.raises(ValueError, match="flip.*crop.*blur.*contrast.*none"):
        pagan.augment(torch.zeros(2, 3, 16, 16), torch.zeros(2, 2), "flip", 0.1)


# ----------------------------------------------------------------------------------------------------- augmentations


@pytest.mark.parametrize("size, p, pad", [(16, 0, 0), (16, 0.06, 1), (16, 0.1, 2), (32, 0.1, 3), (16, 0.5, 8)])
def test_crop_against_a_loop(size, p, pad):
    x, u = torch.randn(40, 3, size, size), torch.rand(40, 2)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode="reflect")
    rows, columns = np.floor(u.numpy() * (2 * pad + 1)).astype(int).T
    y = pagan.crop(x, u, p)
    for i, (row, column) in enumerate(zip(rows, columns)):
        assert np.array_equal(y[i].numpy(), padded[i, :, row : row + size, column : column + size])
    assert y.shape == x.shape and y.is_contiguous() and (pad > 0 or torch.equal(y, x))


def test_crop_cuts_everywhere_and_never_beyond():
    x = torch.arange(32.0).expand(502, 3, 32, 32)  # the value of a pixel is its column
    u = torch.cat([torch.rand(500, 2), torch.tensor([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24]])])
    across, down = pagan.crop(x, u, 0.1)[:, 0, 0, 5].int(), pagan.crop(x.mT, u, 0.1)[:, 0, 5, 0].int()
    for first in (across, down):
        assert set(first.tolist()) == set(range(2, 9)) and first[-2] == 2 and first[-1] == 8  # 3 pixels either way
    assert not torch.equal(across, down)


@pytest.mark.parametrize("size", pagan.IMAGE_SIZES)
def test_blur_against_torchvision(size):
    x, u = torch.randn(5, 3, size, size).double(), torch.rand(5, 2).double()
    kernel = 2 * math.ceil(3 * size * 3 / 64) + 1
    for image, blurred, (amount, _) in zip(x, pagan.blur(x, u), u.tolist()):
        expected = gaussian_blur(image, [kernel] * 2, [size / 32 * (0.5 + amount)] * 2)  # 1/64 to 3/64 of the side
        torch.testing.assert_close(blurred, expected)
    flat = torch.full((2, 3, size, size), 0.3)
    torch.testing.assert_close(pagan.blur(flat, torch.rand(2, 2)), flat)


def test_contrast_against_numpy():
    x, u = torch.rand(5, 3, 16, 16).double() * 2 - 1, torch.rand(5, 2).double()
    for image, changed, (amount, _) in zip(x.numpy(), pagan.contrast(x, u).numpy(), u.tolist()):
        expected = (0.5 + amount) * image + (0.5 - amount) * image.mean()
        np.testing.assert_allclose(changed, np.clip(expected, -1, 1))
    torch.testing.assert_close(pagan.contrast(x, torch.full((5, 2), 0.5).double()), x)  # a factor of 1
    strong = pagan.contrast(3 * x, u)
    assert strong.max() == 1 and strong.min() == -1
    torch.testing.assert_close(pagan.contrast(x, 0 * u).mean((1, 2, 3)), x.mean((1, 2, 3)))


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
    assert torch.equal(pagan.reparameterise(mean, log_variance, 0 * epsilon), mean)
    torch.autograd.gradcheck(pagan.reparameterise, (mean.requires_grad_(), log_variance.requires_grad_(), epsilon))


@pytest.mark.parametrize("loss, sign", [(pagan.minus_log, 1), (pagan.minus_log_not, -1)])
def test_the_objectives_of_logits(loss, sign):
    d = 3 * torch.randn(6, 1).double()
    assert loss(d).item() == pytest.approx(-np.log(sigmoid(sign * d)).mean())
    assert loss(0 * d).item() == pytest.approx(math.log(2))
    assert loss(0 * d + sign * 50) < 1e-20 and loss(0 * d - sign * 1000) == 1000  # no logarithm of 0
    torch.autograd.gradcheck(loss, d.requires_grad_())
    (gradient,) = torch.autograd.grad(loss(d), d)
    assert (sign * gradient < 0).all()


@pytest.mark.parametrize("reconstruction", ["pair", "l1"])
def test_losses_against_separate_passes_in_numpy(reconstruction):
    nets, x, x_aug, z, epsilon = tiny(reconstruction, images=6, latents=3)
    nets.eval()  # so that one image is judged without regard to the others
    losses = pagan.LOSSES[reconstruction](nets, x, x_aug, z, epsilon, 7.0)

    def d(name, *inputs):
        return sigmoid(nets[name](*inputs))

    with torch.no_grad():
        mean, log_variance = nets["E"](x)[:, :5], nets["E"](x)[:, 5:]
        z_hat = mean + epsilon * torch.exp(log_variance).sqrt()
        x_pr, x_rec = nets["G"](z), nets["G"](z_hat)
        expected = {
            "L_d_x": -np.log(d("D_x", x)).mean() - np.log(1 - d("D_x", x_pr)).mean(),
            "L_d_z": -np.log(d("D_z", z)).mean() - np.log(1 - d("D_z", z_hat)).mean(),
        }
        if reconstruction == "pair":
            expected["L_d_xx"] = -np.log(d("D_xx", x, x_aug)).mean() - np.log(1 - d("D_xx", x, x_rec)).mean()
            rec = -np.log(d("D_xx", x, x_rec)).mean()
        else:
            expected["L1"] = np.abs(x.numpy() - x_rec.numpy()).mean()
            rec = 7 * expected["L1"]
        expected["L_g"] = -np.log(d("D_x", x_pr)).mean() + rec
        expected["L_e"] = -np.log(d("D_z", z_hat)).mean() + rec
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected)

    def of_batch(*batch):
        return tuple(pagan.LOSSES[reconstruction](nets, *batch, 7.0).values())

    torch.autograd.gradcheck(of_batch, [t.requires_grad_() for t in (x, x_aug, z, epsilon)], fast_mode=True)


def test_the_l1_loss_is_nothing_at_perfect_reconstruction():
    nets, _, _, z, epsilon = tiny("l1")
    nets.eval()
    nets["G"].forward = lambda z: z.new_full((len(z), 3, 16, 16), 0.3)
    x = torch.full((4, 3, 16, 16), 0.3).double()
    losses = pagan.pagan_l1_losses(nets, x, x, z, epsilon, 7.0)
    assert losses["L1"] == 0 and losses["L_g"].item() == pytest.approx(-np.log(sigmoid(nets["D_x"](x))).mean())


REACHED = {
    "pair": {"L_d_x": "D_x G", "L_d_z": "D_z E", "L_d_xx": "D_xx G E", "L_g": "D_x D_xx G E", "L_e": "D_z D_xx G E"},
    "l1": {"L_d_x": "D_x G", "L_d_z": "D_z E", "L_g": "D_x G E", "L_e": "D_z G E", "L1": "G E"},
}


@pytest.mark.parametrize("reconstruction", REACHED)
def test_which_networks_a_loss_reaches(reconstruction):
    nets, *batch = tiny(reconstruction)
    nets["G"].eval()  # else E reaches the samples through the statistics of the batch that they share
    losses = pagan.LOSSES[reconstruction](nets, *batch, 10.0)
    assert losses.keys() == REACHED[reconstruction].keys()
    for name, reached in REACHED[reconstruction].items():
        for net in nets:
            parameters = list(nets[net].parameters())
            gradients = torch.autograd.grad(losses[name], parameters, retain_graph=True, allow_unused=True)
            assert any(g is not None and g.abs().max() > 0 for g in gradients) == (net in reached.split()), (name, net)


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("reconstruction", ["pair", "l1"])
def test_train_step_against_autograd_by_hand(reconstruction):
    nets, *_ = tiny(reconstruction)
    optimizer, other, moments = pagan.build_optimizer(nets, 1e-3), copy.deepcopy(nets), {}
    for i in range(3):
        torch.manual_seed(10 + i)
        x, x_aug, z, epsilon = random_batch(4, 3)
        losses = pagan.train_step(nets, optimizer, reconstruction, 7.0, x, x_aug, z, epsilon)
        mean, log_variance = other["E"](x).chunk(2, 1)
        z_hat = mean + epsilon * (log_variance / 2).exp()
        images = other["G"](torch.cat([z, z_hat]))
        x_pr, x_rec = images[:3], images[3:]
        d, d_z = (other[name](torch.cat(parts)) for name, parts in (("D_x", [x, x_pr]), ("D_z", [z_hat, z])))
        values = {
            "D_x": ("L_d_x", -F.logsigmoid(d[:4]).mean() - F.logsigmoid(-d[4:]).mean()),
            "D_z": ("L_d_z", -F.logsigmoid(d_z[4:]).mean() - F.logsigmoid(-d_z[:4]).mean()),
        }
        if reconstruction == "pair":
            d_xx = other["D_xx"](torch.cat([x, x]), torch.cat([x_aug, x_rec]))
            values["D_xx"] = "L_d_xx", -F.logsigmoid(d_xx[:4]).mean() - F.logsigmoid(-d_xx[4:]).mean()
            rec = -F.logsigmoid(d_xx[4:]).mean()
        else:
            rec = 7 * (x - x_rec).abs().mean()
        values["G"] = "L_g", -F.logsigmoid(d[4:]).mean() + rec
        values["E"] = "L_e", -F.logsigmoid(d_z[:4]).mean() + rec
        assert set(values) == set(nets) and set(losses) == set(REACHED[reconstruction])
        updates = []
        for net, (name, value) in values.items():
            assert losses[name].item() == pytest.approx(value.item()) and not losses[name].requires_grad
            parameters = list(other[net].parameters())
            gradients = torch.autograd.grad(value, parameters, retain_graph=True)
            zeros = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
            updates.append((parameters, gradients, 1e-3, moments.setdefault(net, [0, *zeros])))
        for update in updates:
            adam_by_hand(*update)
        # A bias that batch norm takes out again has no gradient but rounding, of which Adam makes whole steps.
        idle = {"G.4.bias", "G.7.bias", "E.0.bias", "E.3.bias", "E.6.bias"}
        for name, parameter in nets.named_parameters():
            assert (parameter.grad.abs().max() < 1e-12) == (name in idle), name
            if name in idle:
                other.get_parameter(name).data.copy_(parameter.data)
            torch.testing.assert_close(parameter, other.get_parameter(name), atol=1e-8, rtol=1e-6, msg=name)
    for name, buffer in nets.named_buffers():
        torch.testing.assert_close(buffer, other.get_buffer(name), msg=name)


@pytest.mark.parametrize("reconstruction, kind", [("l1", "none"), *(("pair", kind) for kind in KINDS)])
def test_train_step_never_reads_a_tensor_back(reconstruction, kind, monkeypatch):
    nets, images = pagan.build_networks(reconstruction, 16, 2, 5), draw_faces(4, 16)[0]
    optimizer = pagan.build_optimizer(nets, 2e-4)
    refuse_reading_back(monkeypatch)
    pagan.train_step(nets, optimizer, reconstruction, 10.0, *pagan.draw_batch(images, 5, kind, 0.1))


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


def test_fid_against_the_root_of_the_product():
    """Covariances that do not commute: the eigenvalues of C_a C_b itself, in NumPy."""
    torch.manual_seed(0)
    x, y = (torch.randn(count, 6).double() @ torch.randn(6, 6).double() for count in (40, 50))
    c_x, c_y = np.cov(x.numpy().T), np.cov(y.numpy().T)
    trace = np.sqrt(np.linalg.eigvals(c_x @ c_y).real.clip(0)).sum()
    expected = ((x.mean(0) - y.mean(0)).numpy() ** 2).sum() + np.trace(c_x) + np.trace(c_y) - 2 * trace
    assert pagan.frechet_inception_distance(x, y) == pytest.approx(expected)
    assert pagan.frechet_inception_distance(x.float(), y.float()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("count, size", [(900, 400), (30, 200)])
def test_fid_of_many_features_from_few_samples(count, size):
    torch.manual_seed(0)
    x = torch.randn(count, 100) @ torch.randn(100, size) / math.sqrt(size)  # most directions hardly vary
    moved = pagan.frechet_inception_distance(x, x + 0.1)  # so the covariances cancel
    assert moved == pytest.approx(0.01 * size, rel=1e-4)


class Stub(nn.Module):
    """A function, twice as large in training mode."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, inputs):
        assert not torch.is_grad_enabled()
        return self.function(inputs) * (1 + self.training)


def mean_of_q(x):
    return (3 * x.mean((2, 3))).sin()


def picture_of(z):
    return (z[:, :3, None, None] ** 2 + z[:, :3, None, None]).tanh().expand(-1, -1, 16, 16)


@pytest.mark.parametrize("heldout, last", [(45, True), (3, False)])
def test_figures_show_what_they_say(heldout, last, monkeypatch, tmp_path):
    shown = {}
    monkeypatch.setattr(pagan, "save_grid", lambda path, *images, **more: shown.update({path: (images, more)}))
    images, z = draw_faces(20 + heldout, 16)[0], torch.randn(256, 5)
    q = lambda x: torch.cat([mean_of_q(x), x.new_ones(len(x), 3)], 1)  # noqa: E731
    nets = nn.ModuleDict({"G": Stub(picture_of), "E": Stub(q)})
    pagan.save_figures(nets, Data(images[:20], images[20:], (), None, None), z, tmp_path, 70, 0.2, *[False][last:])
    assert nets.training and nets["G"].training and nets["E"].training
    x, u = to_float(images[20:60]), torch.rand(10, 2, generator=torch.Generator().manual_seed(0))
    expected = {"samples_70": ([picture_of(z[:100])], {}), "reconstructions_70": ([x, picture_of(mean_of_q(x))], {})}
    expected["reconstructions_70"][1]["columns"] = 5
    if last:
        captions = [["original"], ["blur"], ["contrast"], ["pad + crop"]]
        columns = [x[:10], *(pagan.augment(x[:10], u, kind, 0.2) for kind in ("blur", "contrast", "crop"))]
        expected["figure_augmentations"] = columns, {"columns": 2, "captions": captions}
    assert set(shown) == {tmp_path / f"{name}.png" for name in expected}
    for name, (wanted, options) in expected.items():
        pictures, options_given = shown[tmp_path / f"{name}.png"]
        assert options_given == options
        for a, b in zip(pictures, wanted, strict=True):
            assert torch.equal(a, b), name


def test_sample_diversity():
    a, b = torch.randn(5, 3, 4, 4), torch.randn(6, 3, 4, 4)
    assert pagan.sample_diversity(a, 3 * b) == pytest.approx(spread(a) / (3 * spread(b)), rel=1e-5)
    same = a[:1].expand(5, -1, -1, -1)
    assert pagan.sample_diversity(same, b) == 0 and pagan.sample_diversity(a, same) is None


def stub_classifier(x):
    return x[:, :, :2, :2].flatten(1) * 3, x[:, 0, :4, 0]


@pytest.mark.parametrize("kind", ["crop", "none"])
def test_measure_against_numpy(kind):
    nets, z = tiny()[0].float(), torch.randn(80, 5)
    images = torch.randint(256, (1340, 3, 16, 16), dtype=torch.uint8)
    data = Data(images[:1100] // 2, images[1100:], (), None, None)
    nets["G"](2 * z), nets["E"](to_float(images[:50]) / 2)  # so that the statistics differ in training and after
    results = pagan.measure(nets, data, z, kind, 0.2, stub_classifier, 130)
    without = pagan.measure(nets.train(), data, z, kind, 0.2)
    nets.eval()
    x, generator = to_float(data.heldout), torch.Generator().manual_seed(1)
    with torch.no_grad():
        u = torch.cat([torch.rand(n, 2, generator=generator) for n in (100, 100, 40)])
        rec, noise = nets["G"](nets["E"](x)[:, :5]), torch.randn(130, 5, generator=generator)
        aug, blur, crop = pagan.augment(x, u, kind, 0.2), pagan.blur(x, u), pagan.crop(x, u, 0.2)
        judged = [stub_classifier(part) for part in (x, rec, aug, nets["G"](noise), to_float(data.train[:130]))]
        diversity = spread(nets["G"](z)) / spread(x[:80])
    (p, f), (p_rec, _), (p_aug, _), (p_pr, f_pr), (p_train, _) = [(d.log_softmax(1), feature) for d, feature in judged]
    mean = (data.train.numpy() / 127.5 - 1).mean(0)
    expected = [np.abs(y - x.numpy()).mean() for y in (rec.numpy(), mean, blur.numpy(), crop.numpy())]
    squares = [((y - x).numpy() ** 2).mean() for y in (blur, crop, rec, aug)]
    expected += [*squares[:2], *(127.5 * np.sqrt(squares[2:])), diversity]
    expected = dict(zip(NUMBERS, expected, strict=True))
    assert without == pytest.approx({**expected, **dict.fromkeys(JUDGED)}, rel=1e-3, abs=1e-6)
    rid = pagan.reconstruction_inception_dissimilarity
    values = [pagan.frechet_inception_distance(f, f_pr), *pagan.inception_score(p_pr.exp())]
    values += [pagan.inception_score(p_train.exp())[0], rid(p, p_rec), rid(p, p_aug)]
    assert results == pytest.approx({**expected, **dict(zip(JUDGED, values, strict=True))}, rel=1e-3, abs=1e-6)
    assert (results["rid_of_augmentation"] == pytest.approx(1)) == (kind == "none")


# -------------------------------------------------------------------------------------------------------- classifiers


def make(monkeypatch, *arguments):
    """Run make_classifier.py; the message with which it ends, or None."""
    monkeypatch.setattr(sys, "argv", ["make_classifier.py", *map(str, arguments)])
    try:
        return make_classifier.main()
    except SystemExit as stop:
        return stop.code


@pytest.fixture(scope="module")
def classifier(photos, tmp_path_factory):
    """A classifier made of photos in three sub-folders, as a user makes it, and this folder."""
    folder, path = tmp_path_factory.mktemp("classes"), tmp_path_factory.mktemp("made") / "classifier.pt"
    shutil.copy(photos / "1.png", folder / "of no class.png")
    for i, image in enumerate(sorted(photos.glob("*.png"))):
        (folder / "abc"[i % 3]).mkdir(exist_ok=True)
        shutil.copy(image, folder / "abc"[i % 3])
    command = [sys.executable, ROOT / "tests/make_classifier.py", "--data", folder, "--steps", "30", "--out", path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "sub-folders: a, b, c" in result.stdout and "3 classes" in result.stdout, result
    return path, folder


def test_a_classifier_of_sub_folders_measures_a_run(classifier, tmp_path, cli):
    path, folder = classifier
    run = tmp_path / "run"
    small = ["--data", folder, *TINY, "--steps", 2, "--samples", 20, "--out", run]
    assert cli(pagan, *small, "--classifier", path).status == 0
    results = json.loads((run / "results.json").read_text())
    assert results["config"]["classifier"] == str(path) and results["fid"] > 0
    assert 1 <= results["inception_score"] <= 3 and results["rid"] > 1 and results["rid_of_augmentation"] > 1
    net, nets = torch.jit.load(path).eval(), pagan.build_networks("pair", 16, 2, 128).eval()
    nets.load_state_dict(load(run)["networks"])
    with torch.no_grad():
        x = to_float(load_data(folder, 16).heldout)
        (logits, features), (logits_rec, _) = net(x), net(nets["G"](nets["E"](x)[:, :128]))
    assert features.shape == (len(x), 128) and logits.shape == (len(x), 3)
    rid = pagan.reconstruction_inception_dissimilarity(logits.log_softmax(1), logits_rec.log_softmax(1))
    assert results["rid"] == pytest.approx(rid, rel=1e-4)


def test_a_classifier_of_attributes(photos, tmp_path, monkeypatch, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    rows = [f"{i}.png,{i % 2},{int(i > 14)},0" for i in range(30)]
    (tmp_path / "photos" / "attributes.csv").write_text("\n".join(["file,odd,late,never", *rows]))
    arguments = ["--data", tmp_path / "photos", "--steps", 5, "--out", tmp_path / "c.pt"]
    assert make(monkeypatch, *arguments) is None and "4 classes" in capsys.readouterr().out
    logits, features = torch.jit.load(tmp_path / "c.pt")(torch.zeros(3, 3, 16, 16))
    assert logits.shape == (3, 4) and features.shape == (3, 128)


def test_classes_are_the_combinations_that_were_trained():
    labels = torch.tensor([[0, 1], [1, 1], [0, 1], [0, 0]], dtype=torch.bool)
    data = Data(torch.zeros(3), torch.zeros(3), ("a", "b"), labels[:3], labels[1:])
    (a, b, c), (d, e, f) = (numbers.tolist() for numbers in make_classifier.classes_of_attributes(data))
    assert {a, b} == {0, 1} and (c, d, e, f) == (a, b, a, -1)


def test_a_classifier_needs_classes(tmp_path, monkeypatch):
    for i, image in enumerate(draw_faces(25, 16)[0]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    for folder in (tmp_path, tmp_path / "missing"):
        assert "error" in make(monkeypatch, "--data", folder, "--out", tmp_path / "c.pt")
    assert not (tmp_path / "c.pt").exists()


class Scripted(nn.Module):
    """A classifier of 32x32 images alone, with features of the given number of columns."""

    def __init__(self, columns: int):
        super().__init__()
        self.linear, self.columns = nn.Linear(3 * 32 * 32, 5), columns

    def forward(self, x: torch.Tensor):
        y = self.linear(x.flatten(1))
        return (y[:, 0] if self.columns == 0 else y), torch.dropout(y[:, : self.columns], 0.5, self.training)


def test_classifiers_are_loaded_for_evaluation_and_unfit_ones_refused(photos, tmp_path, cli):
    for columns in (0, 1, 5):
        torch.jit.script(Scripted(columns).train()).save(tmp_path / f"{columns}.pt")
    loaded = pagan.load_classifier(str(tmp_path / "5.pt"), 32)
    assert not loaded.training and pagan.load_classifier("none", 32) is None
    for columns in (0, 1):
        with pytest.raises(ValueError, match=r"\[N, 3, 32, 32\] to logits"):
            pagan.load_classifier(str(tmp_path / f"{columns}.pt"), 32)
    for name, size in (("missing", 16), ("1", 32), ("5", 16)):
        path, out = tmp_path / f"{name}.pt", tmp_path / "out"
        result = cli(pagan, "--data", photos, *TINY, "--image-size", size, "--classifier", path, "--out", out)
        assert_refused(result, f"--classifier {path} cannot be used")
        assert result.out == "" and not out.exists()


def test_inception_sees_images_of_299_pixels_in_its_own_range(monkeypatch):
    torch.manual_seed(0)
    net, pooled = torchvision.models.inception_v3(weights=None, init_weights=False).eval(), []
    for parameter in net.parameters():
        if parameter.ndim > 1:  # so that images differ
            nn.init.kaiming_normal_(parameter)
    weights = torchvision.models.Inception_V3_Weights  # with net's weights instead of those that are fetched
    monkeypatch.setattr(weights, "get_state_dict", lambda *_, **__: net.state_dict())
    net.avgpool.register_forward_hook(lambda layer, inputs, output: pooled.append(output.flatten(1)))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    classifier = pagan.load_classifier("inception", 16)
    with torch.no_grad():
        logits, features = classifier(x)
        expected = net(F.interpolate(x, (299, 299), mode="bilinear"))
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(features, pooled[0])
    assert not classifier.training and features.shape == (2, 2048) and features.std(0).max() > 0


def test_without_inception_s_weights_a_run_ends_before_training(photos, tmp_path, cli, monkeypatch):
    def no_network(*_, **__):
        raise URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    result = cli(pagan, "--data", photos, *TINY, "--classifier", "inception", "--out", tmp_path / "out")
    line = result.err.splitlines()[-1]
    assert result.status == 2 and line.startswith("pagan.py: error: --classifier inception") and "no route" in line
    assert "inception_v3_google-0cc3c7bd.pth in " + str(tmp_path / "cache/hub/checkpoints") in line
    assert "Traceback" not in result.err and result.out == "" and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ command line


def test_a_run_as_a_user_starts_it(photos, tmp_path):
    pictures = {f"samples_{step}": (10, 10, 1) for step in (2, 4, 5)}
    pictures |= {f"reconstructions_{step}": (3, 1, 2) for step in (2, 4, 5)} | {"figure_augmentations": (2, 2, 4)}
    arguments = ["--data", photos, *TINY, "--steps", 5]
    out, results, header, _ = run_as_a_user("pagan", *arguments, cwd=tmp_path, pictures=pictures)
    assert results["config"]["channels"] == 2 and out.startswith("pair, crop (crop: 2 pixels), on 27 images of ")
    assert set(results) == {*NUMBERS, *JUDGED, "steps", "steps_per_second", "config"}
    assert all(results[name] is None for name in JUDGED)
    assert all(0 < results[name] < 255 and f"{name:26}{results[name]:10.3f}" in out for name in NUMBERS)
    assert header == "L_d_x L_d_z L_d_xx L_g L_e".split()


@pytest.mark.parametrize("reconstruction, kind", [("l1", "crop"), *(("pair", kind) for kind in KINDS[1:])])
def test_every_row_of_the_ablation_study_trains(reconstruction, kind, photos, tmp_path, cli):
    more = ["--reconstruction", reconstruction, "--augmentation", kind, "--steps", 2, "--out", tmp_path]
    result = cli(pagan, "--data", photos, *TINY, *more)
    assert result.status == 0 and result.out.startswith(f"{reconstruction}, {kind} (crop: 2 pixels), on "), result
    assert log_of(tmp_path)[0] == ["step", *REACHED[reconstruction]]
    assert any(name.startswith("D_xx") for name in load(tmp_path)["networks"]) == (reconstruction == "pair")
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["rmse_255_of_augmentation"] == 0) == (kind == "none")


def test_the_settings_reach_the_training_step(photos, tmp_path, cli, monkeypatch):
    def spy(nets, optimizer, reconstruction, l1_weight, *batch):
        (group,) = optimizer.param_groups
        assert group["betas"] == (0.5, 0.999) and [*map(id, group["params"])] == [*map(id, nets.parameters())]
        steps.append((reconstruction, l1_weight, group["lr"], *(tensor.shape for tensor in batch)))
        weights.append(next(nets.parameters()).detach().clone())
        return train_step(nets, optimizer, reconstruction, l1_weight, *batch)

    steps, weights, drawn, figures, results = [], [], [], [], []
    data, train_step, draw_batch = load_data(photos, 16), pagan.train_step, pagan.draw_batch
    monkeypatch.setattr(pagan, "train_step", spy)
    monkeypatch.setattr(pagan, "draw_batch", lambda *args: drawn.append(args[1:]) or draw_batch(*args))
    monkeypatch.setattr(pagan, "save_figures", lambda nets, *args, last=True: figures.append((*args, last)))
    monkeypatch.setattr(pagan, "measure", lambda nets, *args: results.append(args) or {})
    settings = "--reconstruction l1 --augmentation blur --crop 0.3 --l1-weight 3 --lr 1e-3 --latent-dim 7".split()
    for i, more in enumerate(([*settings, "--samples", 33], [*settings, "--seed", 9], ["--latent-dim", 7])):
        cli(pagan, "--data", photos, *TINY, "--steps", 1, "--out", tmp_path / str(i), *more)
    shapes = (4, 3, 16, 16), (4, 3, 16, 16), (4, 7), (4, 7)
    assert steps == [("l1", 3, 1e-3, *shapes)] * 2 + [("pair", 10, 2e-4, *shapes)]
    assert drawn == [(7, "blur", 0.3)] * 2 + [(7, "crop", 0.1)] and not torch.equal(weights[0], weights[1])
    assert [args[2:] for args in results] == [("blur", 0.3, None, n) for n in (33, 10_000)] + [
        ("crop", 0.1, None, 10_000)
    ]
    outs = [(tmp_path / str(i), 1, p, last) for i, p in enumerate((0.3, 0.3, 0.1)) for last in (False, True)]
    assert [args[2:] for args in figures] == outs
    normal = torch.randn(256, 7, generator=torch.Generator().manual_seed(0))
    for args in (*figures, *results):
        assert torch.equal(args[0].train, data.train) and torch.equal(args[0].heldout, data.heldout)
        assert torch.equal(args[1], normal)  # the same latents whatever the seed


def test_the_defaults_and_quick_are_those_of_the_rulings():
    args = vars(pagan.parse_args(["--out", "nowhere"])[0])
    expected = {"steps": 100_000, "batch_size": 64, "image_size": 32, "latent_dim": 128, "channels": 64, "lr": 2e-4}
    expected |= {"reconstruction": "pair", "augmentation": "crop", "crop": 0.1, "l1_weight": 10, "samples": 10_000}
    expected |= {"classifier": "none", "data": "faces"}
    assert {name: args[name] for name in expected} == expected
    quick = vars(pagan.parse_args(["--quick", "--out", "nowhere"])[0])
    assert round(quick["crop"] * quick["image_size"]) == 1 and quick["lr"] == pytest.approx(1.5 * args["lr"])


# -------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("reconstruction, kind", [("l1", "none"), *(("pair", kind) for kind in KINDS)])
def test_on_cuda_a_step_never_waits_for_the_device(reconstruction, kind):
    nets, images = pagan.build_networks(reconstruction, 16, 4, 5).cuda(), draw_faces(4, 16)[0].cuda()
    optimizer = pagan.build_optimizer(nets, 2e-4)
    for _ in range(3):
        torch.cuda.set_sync_debug_mode("error")
        try:
            batch = pagan.draw_batch(images, 5, kind, 0.1)
            losses = pagan.train_step(nets, optimizer, reconstruction, 10.0, *batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(loss.isfinite() and loss.device.type == "cuda" for loss in losses.values())
