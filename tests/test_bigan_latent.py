import copy
import json
import math
from unittest.mock import MagicMock
from urllib.error import URLError

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import TINY, adam_by_hand, assert_refused, assert_same, files, log_of, run_as_a_user
from torch import nn
from torch.autograd import gradcheck

import bigan_latent
from common import Data, draw_faces, load_data, to_float

EX7 = {"lambda_1": 2.5, "lambda_2": 0.0, "lambda_3": 0.0}
ALL = {"lambda_1": 2.5, "lambda_2": 0.7, "lambda_3": 1.9}


def uniform(*shape):
    """Random numbers from -1 to 1 in float64."""
    return torch.rand(shape, dtype=torch.double) * 2 - 1


def tiny(steps=0, **options):
    """Small networks in float64 with weights that let every gradient be seen, and their optimizer; after some steps
    batch norm and the optimizer have a state. Four images, three latents."""
    torch.manual_seed(0)
    nets = bigan_latent.build_networks(**{"image_size": 16, "channels": 2, "latent_dim": 5, **options}).double()
    for parameter in nets.parameters():
        nn.init.normal_(parameter, std=0.3)
    optimizer = bigan_latent.build_optimizer(nets, 2e-2)
    x, z = uniform(4, 3, *2 * [options.get("image_size", 16)]), uniform(3, 5)
    for _ in range(steps):
        bigan_latent.train_step(nets, optimizer, None, {**ALL, "lambda_3": 0}, 0, x, z)
    return nets, optimizer, x, z


def features():
    """A small stand-in for H."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 11), nn.Tanh()).double().requires_grad_(False)


@pytest.fixture
def alexnet(monkeypatch):
    """The AlexNet that torchvision gives from now on to those who ask for the trained one: with random weights."""
    net = torchvision.models.alexnet()
    monkeypatch.setattr(torchvision.models, "alexnet", lambda weights: net if weights == "IMAGENET1K_V1" else None)
    return net


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def minus_log(logit):
    return np.log(1 + np.exp(-logit))


def huber(t):
    return 0.05 * (np.sqrt(1 + (t / 0.05) ** 2) - 1)


# ---------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("stochastic", [False, True])
def test_weights_of_the_paper_s_sizes_counted_by_hand_and_other_sizes_refused(stochastic):
    convs = 4 * 4 * (64 * 128 + 128 * 256 + 256 * 512) + 2 * (128 + 256 + 512) + (3 * 64 * 16 + 64)
    g = 100 * 512 * 16 + 2 * (512 + 256 + 128 + 64) + 16 * (512 * 256 + 256 * 128 + 128 * 64) + (64 * 3 * 16 + 3)
    e = convs + (512 * 16 * 100 + 100) * (1 + stochastic)
    d = convs + (100 * 512 + 512) + ((512 * 16 + 512) * 128 + 128) + (128 + 1)
    nets = bigan_latent.build_networks(64, 64, 100, stochastic)
    assert {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()} == {"G": g, "E": e, "D": d}
    with pytest.raises(ValueError, match="48.*64"):
        bigan_latent.build_networks(48, 2, 5, stochastic)


def leaky(h):
    return torch.where(h > 0, h, 0.2 * h)


def batch_norm(h, gain, shift):
    """Batch norm by the statistics of h."""
    h = (h - h.mean((0, 2, 3), keepdim=True)) / (h.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    return h * gain[:, None, None] + shift[:, None, None]


def convolve(weights, x):
    """What E and D share: conv, leaky ReLU, then conv, batch norm, leaky ReLU until 4x4."""
    first, bias, *rest = weights
    x = leaky(F.conv2d(x, first, bias, stride=2, padding=1))
    for kernel, gain, shift in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        x = leaky(batch_norm(F.conv2d(x, kernel, stride=2, padding=1), gain, shift))
    assert x.shape[2:] == (4, 4)
    return x.flatten(1)


def discriminate(weights, x, z):
    """D with the given weights, without dropout."""
    *convs, dense_z, bias_z, dense, bias, logit, bias_logit = weights
    h = torch.cat([convolve(convs, x), leaky(F.linear(z, dense_z, bias_z))], 1)
    return F.linear(leaky(F.linear(h, dense, bias)), logit, bias_logit)


def encode(E, x):
    """E in training: a sample of the Gaussian if it is stochastic."""
    h, noise = E.layers(x), torch.randn(len(x), 5, dtype=torch.double) if E.stochastic else 0
    return h[:, :5] + h[:, 5:].exp() ** 0.5 * noise if E.stochastic else h


@pytest.mark.parametrize("size", bigan_latent.IMAGE_SIZES)
def test_the_networks_layer_by_layer(size):
    nets, _, x, z = tiny(image_size=size)
    nets["D"].of_both.eval()  # without dropout
    dense, *convs, bias = nets["G"].parameters()
    h = (z @ dense.T).view(3, size // 4, 4, 4)
    for gain, shift, kernel in zip(convs[::3], convs[1::3], convs[2::3], strict=True):
        h = F.conv_transpose2d(batch_norm(h, gain, shift).relu(), kernel, stride=2, padding=1)
    torch.testing.assert_close(nets["G"](z), (h + bias[:, None, None]).tanh())
    assert h.shape == (3, 3, size, size) and h.std() > 0.01
    *convs, dense, bias = nets["E"].parameters()
    torch.testing.assert_close(nets["E"](x), F.linear(convolve(convs, x), dense, bias))
    torch.testing.assert_close(nets["D"](x[:3], z), discriminate(nets["D"].parameters(), x[:3], z))


def test_batch_norm_dropout_and_initial_weights_are_the_paper_s():
    torch.manual_seed(0)
    nets = bigan_latent.build_networks(64, 16, 100)
    norms = [m for m in nets.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 4 + 3 + 3
    for norm in norms:
        x = 7 + torch.randn(5, norm.num_features, 4, 4)
        assert (norm.weight == 1).all() and (norm.bias == 0).all()
        norm(x)
        torch.testing.assert_close(norm.running_mean, 0.03 * x.mean((0, 2, 3)))
    (drop,) = [m for m in nets["D"].modules() if isinstance(m, nn.Dropout)]
    assert (drop(torch.ones(100_000)) == 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    weighty = [m for m in nets.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    for m in weighty:
        assert abs(m.weight.std().item() / 0.02 - 1) < 3 / math.sqrt(2 * m.weight.numel())
        assert m.bias is None or (m.bias == 0).all()
    weights = torch.cat([m.weight.flatten() for m in weighty])
    assert (weights.abs() > 0.04).float().mean().item() == pytest.approx(0.0455, abs=2e-3)  # as of a Gaussian


def test_features_are_alexnet_s_pool5_of_length_1(alexnet):
    net, x = bigan_latent.Features(), torch.rand(2, 3, 16, 16) * 2 - 1
    imagenet = torchvision.models.AlexNet_Weights.IMAGENET1K_V1.transforms()
    image = F.interpolate((x + 1) / 2, (224, 224), mode="bilinear")
    image = torch.stack([(c - m) / s for c, m, s in zip(image.unbind(1), imagenet.mean, imagenet.std)], 1)
    pool5 = alexnet.features(image).flatten(1)
    torch.testing.assert_close(net(x), pool5 / (pool5**2).sum(1, keepdim=True).sqrt())
    assert net(x).shape == (2, 9216) and net(x)[0].norm().item() == pytest.approx(1)
    assert not any(p.requires_grad for p in net.parameters())


# ------------------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("discriminator_loss", (6, 1), lambda q, p: (0.9 * minus_log(q) + 0.1 * minus_log(-q) + minus_log(-p)).mean()),
        ("generator_loss", (6, 1), lambda q, p: (minus_log(-q) + minus_log(p)).mean()),  # both: Eq. 1 to 3
        ("penalty", (2, 3, 4, 4), lambda a, b: huber(a - b).mean()),  # Eq. 4
        ("penalty", (4, 5), lambda a, b: huber(a - b).mean()),  # Eq. 6, 7
        ("feature_penalty", (4, 7), lambda a, b: huber(((a - b) ** 2).sum(1) ** 0.5).mean()),  # Eq. 5
        ("pseudo_huber", (20,), lambda a, _: huber(a)),  # Figure 4
    ],
)
def test_each_loss_against_numpy_and_its_gradient_by_finite_differences(name, shape, expected):
    torch.manual_seed(0)
    pair = [torch.randn(shape, dtype=torch.double, requires_grad=True) for _ in range(2)]
    expected, inputs = expected(*(t.detach().numpy() for t in pair)), pair[: 1 if name == "pseudo_huber" else 2]
    loss = getattr(bigan_latent, name)
    np.testing.assert_allclose(loss(*inputs).detach(), expected)
    gradcheck(loss, inputs)


def test_what_the_losses_want():
    best = [bigan_latent.discriminator_loss(torch.tensor(math.log(9) + d), torch.tensor(-50.0)) for d in (-0.1, 0, 0.1)]
    assert best[1] == min(best)  # D answers 0.9 to real pairs, and 0 to fake ones
    logits = torch.randn(2, 6, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(bigan_latent.generator_loss(*logits), logits)
    assert (gradient[0] > 0).all() and (gradient[1] < 0).all()  # E wants D to say "p", G wants it to say "q"
    for loss in (bigan_latent.penalty, bigan_latent.feature_penalty):
        a = torch.randn(4, 7, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(a, a.detach()), a)
        assert loss(a, a) == 0 < loss(a, -a) and torch.equal(gradient, 0 * gradient)


@pytest.mark.parametrize("unroll", [0, 2])
def test_which_networks_each_loss_reaches(unroll):
    nets, optimizer, x, z = tiny()
    reached = {}
    for name, loss in bigan_latent.bigan_losses(nets, optimizer, features(), ALL, unroll, x, z).items():
        gradients = torch.autograd.grad(loss, list(nets.parameters()), retain_graph=True, allow_unused=True)
        names = [name for name, _ in nets.named_parameters()]
        reached[name] = {name[0] for name, g in zip(names, gradients) if g is not None and g.abs().max() > 0}
    both, all_three = {"G", "E"}, {"G", "E", "D"}
    assert reached == {"L_AD": both, "L_AE": both, "L_H": both} | dict.fromkeys(("L_D", "L_GAN", "L_G_E"), all_three)


def unrolled(nets, optimizer, unroll, x, z_hat, x_hat, z):
    """D's unrolled logits of (x, z_hat) and (x_hat, z), with the same dropout at every call."""
    torch.manual_seed(7)
    D, q, p = nets["D"], (x, z_hat), (x_hat, z)
    return bigan_latent.unrolled_logits(D, optimizer, q, p, D(*q), D(*p), unroll)


@pytest.mark.parametrize("steps_before", [0, 3])
def test_the_gradient_through_two_unrolled_steps_is_that_of_finite_differences(steps_before):
    nets, optimizer, x, z = tiny(steps_before)
    x_hat, ways = uniform(3, 3, 16, 16), torch.randn(12, 3, 3, 16, 16, dtype=torch.double)
    z_hat, at = uniform(4, 5).requires_grad_(), torch.zeros(12, dtype=torch.double, requires_grad=True)

    def logits(at, z_hat):
        return unrolled(nets, optimizer, 2, x, z_hat, x_hat + torch.tensordot(at, ways, 1), z)

    gradcheck(logits, (at, z_hat), eps=1e-6, atol=1e-5, rtol=1e-3, nondet_tol=1e-9)


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("unroll", [0, 1, 3])
def test_unrolled_steps_are_those_of_torch_s_adam(unroll, steps_before):
    nets, optimizer, x, z = tiny(steps_before)
    of_d = {id(parameter) for parameter in nets["D"].parameters()}
    (whole,) = optimizer.param_groups  # D gets a group of its own, the second
    mine = [parameter for parameter in whole["params"] if id(parameter) in of_d]
    whole["params"] = [parameter for parameter in whole["params"] if id(parameter) not in of_d]
    optimizer.add_param_group({"params": mine, "lr": 3e-2, "betas": (0.6, 0.99), "eps": 1e-3})
    D, q, p = copy.deepcopy(nets["D"]), (x, uniform(4, 5)), (uniform(3, 3, 16, 16), z)
    logits = unrolled(nets, optimizer, unroll, *q, *p)
    adam = torch.optim.Adam(D.parameters(), 3e-2, (0.6, 0.99), 1e-3)
    for mine, theirs in zip(D.parameters(), nets["D"].parameters()):
        if steps_before:
            adam.state[mine] = copy.deepcopy(optimizer.state[theirs])
    torch.manual_seed(7)
    for _ in range(unroll):
        adam.zero_grad()
        bigan_latent.discriminator_loss(D(*q), D(*p)).backward()
        adam.step()
    for logit, expected in zip(logits, (D(*q), D(*p)), strict=True):
        torch.testing.assert_close(logit, expected, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_unrolling_leaves_the_discriminator_and_its_optimizer_as_they_are(steps_before):
    nets, optimizer, x, z = tiny(steps_before)
    D, q, p = nets["D"], (x, uniform(4, 5)), (uniform(3, 3, 16, 16), z)
    d_q, d_p = D(*q), D(*p)
    optimizer.zero_grad()
    before = copy.deepcopy((dict(D.state_dict()), optimizer.state_dict()))
    bigan_latent.unrolled_logits(D, optimizer, q, p, d_q, d_p, 3)
    assert_same(before, (dict(D.state_dict()), optimizer.state_dict()))
    assert all(p.grad is None and p.requires_grad for p in D.parameters()) and D.training


def test_unrolling_needs_a_plain_adam_that_has_the_discriminator_and_its_gradients():
    def refused(optimizer, words="unrolling needs"):
        with pytest.raises(ValueError, match=words):
            bigan_latent.bigan_losses(nets, optimizer, None, EX7, 1, x, z)
        assert bigan_latent.bigan_losses(nets, optimizer, None, EX7, 0, x, z)["L_GAN"].isfinite()

    nets, optimizer, x, z = tiny()
    of_d, everything = list(nets["D"].parameters()), list(nets.parameters())
    refused(torch.optim.AdamW(everything), "torch.optim.Adam")
    refused(torch.optim.SGD(everything), "torch.optim.Adam")
    for parameters in (nets["G"].parameters(), of_d[:-1], of_d[1:], [{"params": of_d[:3]}, {"params": of_d[3:]}]):
        refused(torch.optim.Adam(parameters), "all of D in one group")
    for option in ({"weight_decay": 1e-3}, {"amsgrad": True}, {"maximize": True}):
        refused(torch.optim.Adam(everything, **option), f"without.*{[*option][0]}")
    for betas in ((0.0, 0.999), (0.5, 0.0)):
        refused(torch.optim.Adam(everything, betas=betas), "betas above 0")
    with torch.no_grad():
        refused(optimizer, "gradients on")
    of_d[0].requires_grad_(False)
    refused(optimizer, "none frozen")


def test_unrolling_where_a_gradient_is_zero_stays_finite():
    nets = bigan_latent.build_networks(16, 2, 5)
    nets["D"].of_both[3].weight.data.zero_()  # no gradient reaches the layers before it
    optimizer = bigan_latent.build_optimizer(nets, 2e-4)
    x, z = torch.rand(4, 3, 16, 16), torch.rand(4, 5)
    loss = bigan_latent.bigan_losses(nets, optimizer, None, EX7, 2, x, z)["L_GAN"]
    gradients = torch.autograd.grad(loss, list(nets["G"].parameters()))
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("unroll", [0, 2])
@pytest.mark.parametrize("lambdas", [(2.5, 0, 0), (0, 0.7, 0), (0, 0, 1.9), (2.5, 0.7, 1.9)])
def test_train_step_of_four_images_and_three_latents_against_autograd_by_hand(lambdas, unroll, stochastic):
    weights = dict(zip(ALL, lambdas))
    nets, optimizer, _, _ = tiny(stochastic=stochastic)
    nets["D"].of_both.eval()  # without dropout
    other, H = copy.deepcopy(nets), features()
    G, E, theirs = other["G"], other["E"], list(other["D"].parameters())
    mine = [*G.parameters(), *E.parameters()]
    of_d, of_g_e = ([0, [0] * len(parameters), [0] * len(parameters)] for parameters in (theirs, mine))
    bce, one, zero = F.binary_cross_entropy_with_logits, torch.ones(4, 1).double(), torch.zeros(4, 1).double()

    def loss_of_d(theta, x, z_hat, x_hat, z):
        return bce(discriminate(theta, x, z_hat), 0.9 * one) + bce(discriminate(theta, x_hat, z), zero[:3])

    for seed in range(3):
        torch.manual_seed(10 + seed)
        x, z = uniform(4, 3, 16, 16), uniform(3, 5)
        torch.manual_seed(seed)
        losses = bigan_latent.train_step(nets, optimizer, H if lambdas[2] else None, weights, unroll, x, z)
        torch.manual_seed(seed)
        z_hat, x_hat = encode(E, x), G(z)
        pairs, theta, (before, m, v) = (x, z_hat, x_hat, z), theirs, of_d
        value = {"L_D": loss_of_d(theta, *pairs)}
        for t in range(before + 1, before + 1 + unroll):
            along = torch.autograd.grad(loss_of_d(theta, *pairs), theta, create_graph=True)
            m, v = [(a + g) / 2 for a, g in zip(m, along)], [0.999 * a + 0.001 * g * g for a, g in zip(v, along)]
            steps = [a / (1 - 0.5**t) / ((b / (1 - 0.999**t)) ** 0.5 + 1e-8) for a, b in zip(m, v)]
            theta = [w - 2e-2 * step for w, step in zip(theta, steps)]
        value["L_GAN"] = bce(discriminate(theta, x, z_hat), zero) + bce(discriminate(theta, x_hat, z), one[:3])
        x_tilde, z_tilde = G(z_hat), encode(E, x_hat)
        distances = z_tilde - z, x_tilde - x, (H(x_tilde) - H(x)).norm(dim=1)
        for name, number, t in zip(("L_AD", "L_AE", "L_H"), lambdas, distances):
            value[name] = ((0.05**2 + t**2).sqrt() - 0.05).mean() * (number > 0)
        value["L_G_E"] = value["L_GAN"] + sum(a * b for a, b in zip(lambdas, [*value.values()][2:]))
        expected = {name: loss.item() for name, loss in value.items()}
        assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-6)
        assert not any(loss.requires_grad for loss in losses.values())
        gradients = torch.autograd.grad(value["L_G_E"], mine, retain_graph=True)
        adam_by_hand(theirs, torch.autograd.grad(value["L_D"], theirs), 2e-2, of_d)
        adam_by_hand(mine, gradients, 2e-2, of_g_e)
    passes = 1 + any(lambdas[1:]), 1 + any(lambdas[1:]), 1 + any(lambdas[:1]), 2  # not those of the unrolled D
    assert [b.item() for name, b in nets.named_buffers() if "tracked" in name] == [3 * count for count in passes]
    for a, b in zip(nets.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_batches_are_the_images_and_uniform_latents():
    images = draw_faces(10, 16)[0].repeat(50, 1, 1, 1)
    torch.manual_seed(0)
    x, z = bigan_latent.make_inputs(images, 7)
    assert torch.equal(x, to_float(images)) and z.shape == (500, 7)
    assert z.abs().max() <= 1 and z.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.05) and abs(z.mean()) < 0.05


# -------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("stochastic", [False, True])
def test_measure_against_numpy(stochastic):
    nets = tiny(3, channels=4, stochastic=stochastic)[0].float()
    other = copy.deepcopy(nets).eval()
    data = conftest.random_data()
    z = torch.rand(20, 5) * 2 - 1
    G, E, D = other["G"], other["E"], other["D"]
    x = torch.from_numpy(data.heldout[:1000].numpy() / np.float32(127.5) - 1)  # of 1,100
    with torch.no_grad():
        x_hat, z_hat = G(z), E(x)
        x_tilde = G(z_hat)
        mean_image = (data.train.numpy() / 127.5 - 1).mean(0)
        expected = {
            "heldout_l1": np.abs((x_tilde - x).numpy()).mean(),
            "heldout_l1_of_mean_image": np.abs(x.numpy() - mean_image).mean(),
            "autodecoder_q": huber((z_hat - E(x_tilde)).numpy()).mean(),
            "d_on_real": 100 * sigmoid(D(x, z_hat).numpy()).mean(),
            "d_on_reconstructions": 100 * sigmoid(D(x_tilde, z_hat).numpy()).mean(),
            "d_on_samples": 100 * sigmoid(D(x_hat, z).numpy()).mean(),
            "latent_l1": np.abs((E(x_hat) - z).numpy()).mean(),
            "sample_diversity": conftest.mean_distance(x_hat) / conftest.mean_distance(x[:20]),
            **conftest.sharpness_by_hand(x_tilde, x),
        }
    for training in (True, False):
        assert bigan_latent.measure(nets.train(training), data, z) == pytest.approx(expected, rel=1e-4)
        assert all(module.training == training for module in nets.modules())  # the mode that it found
    assert_same(dict(nets.state_dict()), dict(other.state_dict()))
    assert expected["sharpness"] > 0.01
    flat = bigan_latent.measure(nets, data._replace(heldout=torch.full_like(data.train[:30], 7)), z)
    unknown = ["sharpness", "sharpness_of_halves", "sample_diversity"]
    assert [name for name, value in flat.items() if not math.isfinite(value)] == unknown


def test_figures_show_what_they_say(monkeypatch, tmp_path):
    shown = {}
    monkeypatch.setattr(bigan_latent, "save_grid", lambda path, *args, **kwargs: shown.update({path: (args, kwargs)}))
    nets = tiny(3, channels=4, stochastic=True)[0].float()
    other = copy.deepcopy(nets).eval()
    images, z = draw_faces(25, 16)[0], torch.rand(256, 5) * 2 - 1
    data = Data(images[:11], images[11:], (), None, None, (), 0)
    for training in (False, True):
        bigan_latent.save_figures(nets.train(training), data, z, tmp_path, 70)
        assert all(module.training == training for module in nets.modules())
    assert_same(dict(nets.state_dict()), dict(other.state_dict()))
    names = ("samples_70.png", "reconstructions_70.png", "figure_interpolations.png")
    assert list(shown) == [tmp_path / name for name in names]
    G, E, D, x, z = other["G"], other["E"], other["D"], to_float(images[11:21]), z[:100]
    with torch.no_grad():
        x_hat, z_hat = G(z), E.layers(x)[:, :5]  # the mean
        x_tilde = G(z_hat)
        percents = [100 * sigmoid(D(*pair)[:, 0].numpy()) for pair in ((x_hat, z), (x, z_hat), (x_tilde, z_hat))]
        texts = [[f"{round(min(99, value)):02}" for value in values] for values in percents]
        walks = x[:5], *(G(z_hat[:5] + (z_hat[5:] - z_hat[:5]) * i / 7) for i in range(8)), x[5:]
    grids = [(x_hat,), (x, x_tilde), walks]
    settings = [{"captions": texts[:1]}, {"captions": texts[1:], "groups_per_row": 5}, {"groups_per_row": 1}]
    assert [options for _, options in shown.values()] == settings
    for (batches, _), pictures in zip(shown.values(), grids, strict=True):
        torch.testing.assert_close(batches, pictures, atol=1e-5, rtol=1e-5)
    assert len({*texts[1], *texts[2]}) > 5 and (walks[1].lerp(walks[8], 3 / 7) - walks[4]).abs().max() > 1e-2
    logits = torch.tensor([[0.002], [0.076], [0.42], [0.999]]).logit()
    assert bigan_latent.percents(lambda x, z: logits, None, None) == ["00", "08", "42", "99"]


# ------------------------------------------------------------------------------------------------------ command line


def test_a_run_as_a_user_starts_it(photos, tmp_path):
    pictures = {f"samples_{step}": (10, 10, 1) for step in (2, 4, 5)}
    pictures |= {f"reconstructions_{step}": (3, 1, 2) for step in (2, 4, 5)} | {"figure_interpolations": (1, 1, 10)}
    arguments = ["--data", photos, *TINY, "--steps", 5]
    out, results, header, rows = run_as_a_user("bigan_latent", *arguments, cwd=tmp_path, pictures=pictures)
    assert out.startswith("{'lambda_1': 2.5, 'lambda_2': 0.0, 'lambda_3': 0.0} on 27 images of ")
    assert "cpu, step 0, in runs/bigan_latent/" in out
    names = "heldout_l1 heldout_l1_of_mean_image sharpness sharpness_of_halves autodecoder_q latent_l1".split()
    names += ["sample_diversity", "d_on_real", "d_on_samples", "d_on_reconstructions"]
    for name in names:
        assert 0 <= results[name] < (100 if name.startswith("d_") else 10)
        assert f"{name:26}{results[name]:10.3f}" in out
    assert set(results) == {*names, "steps", "config"}
    expected = {"channels": 2, "unroll": 8, "experiment": "EX7", "lambda_1": 2.5, "lambda_3": 0}
    assert expected.items() <= results["config"].items() and not {"out", "device", "graph"} & set(results["config"])
    assert header == ["L_D", "L_G_E", "L_GAN", "L_AD", "L_AE", "L_H"]
    for _, _, total, gan, *terms in (map(float, row) for row in rows):
        assert total == pytest.approx(gan + 2.5 * terms[0]) and terms[1:] == [0, 0]


def test_all_weights_go_from_the_options_into_the_losses(photos, tmp_path, cli, alexnet):
    weights = ["--lambda-1", 3, "--lambda-2", 0.5, "--lambda-3", 40]
    small = ["--data", photos, *TINY, "--unroll", 1, "--log-every", 3, "--save-every", 4, "--steps", 5]
    result = cli(bigan_latent, *small, *weights, "--out", tmp_path)
    assert result.status == 0 and result.out.startswith("{'lambda_1': 3.0, 'lambda_2': 0.5, 'lambda_3': 40.0} on 27")
    config = json.loads((tmp_path / "results.json").read_text())["config"]
    assert [config[f"lambda_{i}"] for i in (1, 2, 3)] == [3, 0.5, 40]
    _, rows = log_of(tmp_path)
    assert [row[0] for row in rows] == ["1", "3", "4", "5"]
    for _, _, total, gan, ad, ae, h in (map(float, row) for row in rows):
        assert total == pytest.approx(gan + 3 * ad + 0.5 * ae + 40 * h) and min(ad, ae, 40 * h) > 1e-4
    checkpoint = torch.load(tmp_path / "checkpoint.pt")
    assert {name[:2] for name in checkpoint["networks"]} == {"G.", "E.", "D."}  # H is fixed, and not kept
    kept = {"bigan_latent", "step", "log", "networks", "optimizer", "images", "random", "random_on_cuda"}
    assert set(checkpoint) == kept


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError('invalid hash value\n(expected "7be5be79")')])
def test_without_alexnet_s_weights_a_run_ends_before_training(photos, tmp_path, cli, monkeypatch, error):
    monkeypatch.setattr(torchvision.models, "alexnet", MagicMock(side_effect=error))
    small = ["--data", photos, *TINY, "--unroll", 0, "--steps", 1]
    for options in (["--experiment", "EX9"], ["--lambda-3", 0.1]):
        result = cli(bigan_latent, *small, *options, "--out", tmp_path / "9")
        words = "--lambda-3", "alexnet-owt-7be5be79.pth", f"{torch.hub.get_dir()}/checkpoints"
        assert_refused(result, *words, str(error).split("\n")[0])
        assert files(tmp_path) == [] and result.out == ""
    assert cli(bigan_latent, *small, "--experiment", "EX8", "--out", tmp_path / "8").status == 0


def test_the_settings_reach_the_training_step_and_the_figures(photos, tmp_path, cli, monkeypatch):
    def spy(nets, optimizer, H, weights, unroll, x, z):
        (group,) = optimizer.param_groups
        adam = [group[name] for name in ("lr", "betas", "eps", "weight_decay")]
        width, lambdas = nets["G"][-2].weight.shape[0], [weights[name] for name in ALL]
        assert weights.keys() == ALL.keys()
        seen.append([z.shape, width, lambdas, H, unroll, *adam, nets["E"].stochastic])
        batches.append(x)
        return train_step(nets, optimizer, H, weights, unroll, x, z)

    seen, batches, figures = [], [], []
    train_step, measure = bigan_latent.train_step, bigan_latent.measure
    monkeypatch.setattr(bigan_latent, "train_step", spy)
    monkeypatch.setattr(bigan_latent, "save_figures", lambda nets, *rest: figures.append(rest))
    monkeypatch.setattr(bigan_latent, "measure", lambda *rest: figures.append(rest[1:]) or measure(*rest))
    settings = "--lr 1e-3 --lambda-1 3 --lambda-2 4 --latent-dim 7 --unroll 2 --stochastic-encoder --channels 3".split()
    common = ["--data", photos, *TINY, "--unroll", 1, "--steps", 2]
    for i, more in enumerate((settings, [*settings, "--seed", 9], ["--experiment", "EX5", "--latent-dim", 7])):
        assert cli(bigan_latent, *common, *more, "--out", tmp_path / str(i)).status == 0
    first = [(4, 7), 3, [3, 4, 0], None, 2, 1e-3, (0.5, 0.999), 1e-8, 0, True]
    third = [(4, 7), 2, [1, 1, 0], None, 1, 2e-4, (0.5, 0.999), 1e-8, 0, False]
    assert seen == [first] * 4 + [third] * 2
    train, heldout = (to_float(part) for part in load_data(photos, 16)[:2])
    assert all((train == x).flatten(1).all(1).any() for x in torch.cat(batches))
    assert len(torch.cat(batches).unique(dim=0)) > 8 and not torch.equal(batches[0], batches[2])  # another seed
    z = figures[0][1]
    assert z.shape == (256, 7) and z.abs().max() <= 1 and z.min() < -0.9 and z.max() > 0.9
    assert [rest for _, _, *rest in figures if rest] == [[tmp_path / str(i), 2] for i in range(3)] and len(figures) == 6
    assert all(torch.equal(to_float(data.heldout), heldout) for data, *_ in figures)
    assert all(torch.equal(vectors, z) for _, vectors, *_ in figures)  # the same whatever the seed


def test_the_defaults_are_the_paper_s():
    args, _ = bigan_latent.parse_args(["--out", "nowhere"])
    assert (args.steps, args.batch_size, args.image_size, args.latent_dim, args.channels) == (200_000, 32, 64, 100, 64)
    assert (args.lr, args.unroll, args.experiment, args.stochastic_encoder) == (2e-4, 8, "EX7", False)
    for i, row in enumerate((a, b, c) for a in (0.05, 1, 2.5) for b, c in ((0, 0), (1, 0), (0, 1))):  # Table 1
        args, _ = bigan_latent.parse_args(["--out", "nowhere", "--experiment", f"EX{i + 1}"])
        assert (args.lambda_1, args.lambda_2, args.lambda_3) == row
    args, _ = bigan_latent.parse_args(["--out", "nowhere", "--experiment", "EX3", "--lambda-2", "0.2", "--quick"])
    assert (args.lambda_1, args.lambda_2, args.lambda_3) == (0.05, 0.2, 1)
    assert {name: getattr(args, name) for name in bigan_latent.QUICK} == bigan_latent.QUICK
