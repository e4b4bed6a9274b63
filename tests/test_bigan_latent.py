import copy
import math
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import TINY, assert_refused, assert_same, files, load, log_of, refuse_reading_back, run_as_a_user
from torch import nn

import bigan_latent
from common import Data, draw_faces, to_float

SMALL = [*TINY, "--unroll", 1]
WEIGHTS = {"L_GAN": 1.0, "L_AD": 2.5, "L_AE": 0.7, "L_H": 0.0}


def tiny(seed=0, **options):
    """Small networks in float64 with weights that let every gradient be seen, D's optimizer, and a batch x, z."""
    torch.manual_seed(seed)
    nets = bigan_latent.build_networks(**{"image_size": 16, "channels": 2, "latent_dim": 5, **options}).double()
    for name in ("G", "E", "D"):
        for parameter in nets[name].parameters():
            nn.init.normal_(parameter, std=0.3)
    optimizers = bigan_latent.build_optimizers(nets, 2e-2)
    return nets, optimizers, torch.rand(4, 3, 16, 16).double() * 2 - 1, torch.rand(4, 5).double() * 2 - 1


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def huber(t):
    return 0.05 * (np.sqrt(1 + (t / 0.05) ** 2) - 1)


@pytest.fixture(scope="module")
def alexnet_file(tmp_path_factory):
    """A file like torchvision's of AlexNet's weights, but with random ones."""
    torch.manual_seed(0)
    weights = torchvision.models.alexnet().features.state_dict()
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save({"classifier.1.bias": torch.zeros(3)} | {f"features.{k}": w for k, w in weights.items()}, path)
    return path


# ---------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("size", bigan_latent.IMAGE_SIZES)
def test_shapes_and_ranges(size, stochastic):
    nets = bigan_latent.build_networks(size, 2, 7, stochastic)
    x, z = torch.randn(3, 3, size, size), torch.randn(3, 7)
    assert nets["G"](z).shape == (3, 3, size, size) and nets["G"](100 * z).abs().max() <= 1
    assert nets["E"](x).shape == (3, 7) and nets["D"](x, z).shape == (3, 1) and set(nets) == {"G", "E", "D"}


def test_weights_of_the_paper_s_sizes_counted_by_hand():
    convs = 4 * 4 * (64 * 128 + 128 * 256 + 256 * 512) + 2 * (128 + 256 + 512) + (3 * 64 * 16 + 64)
    g = 100 * 512 * 16 + 2 * (512 + 256 + 128 + 64) + 16 * (512 * 256 + 256 * 128 + 128 * 64) + (64 * 3 * 16 + 3)
    e = convs + (512 * 16 * 100 + 100)
    d = convs + (100 * 512 + 512) + ((512 * 16 + 512) * 128 + 128) + (128 + 1)
    nets = bigan_latent.build_networks(64, 64, 100)
    assert {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()} == {"G": g, "E": e, "D": d}
    stochastic = bigan_latent.build_networks(64, 64, 100, stochastic=True)["E"]
    assert sum(p.numel() for p in stochastic.parameters()) == e + 512 * 16 * 100 + 100


def leaky(h):
    return torch.where(h > 0, h, 0.2 * h)


def batch_norm(h, layer):
    """Batch norm by the statistics of h, with the weights of the given layer."""
    h = (h - h.mean((0, 2, 3), keepdim=True)) / (h.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    return h * layer.weight[:, None, None] + layer.bias[:, None, None]


def conv_stack(layers, x):
    """conv, leaky ReLU, then conv, batch norm, leaky ReLU until 4x4, from the weights of the given layers."""
    convs = [m for m in layers if isinstance(m, nn.Conv2d)]
    norms = [None] + [m for m in layers if isinstance(m, nn.BatchNorm2d)]
    for conv, norm in zip(convs, norms, strict=True):
        x = F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)
        x = leaky(batch_norm(x, norm) if norm else x)
    assert x.shape[2:] == (4, 4)
    return x.flatten(1)


def test_the_generator_layer_by_layer():
    torch.manual_seed(0)
    net, z = bigan_latent.Generator(32, 2, 5).double(), torch.randn(4, 5).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    dense, *convs = [m for m in net if isinstance(m, nn.Linear | nn.ConvTranspose2d)]
    norms = [m for m in net if isinstance(m, nn.BatchNorm2d)]
    h = (z @ dense.weight.T).view(4, 8, 4, 4)
    for conv, norm in zip(convs, norms, strict=True):
        h = F.conv_transpose2d(batch_norm(h, norm).relu(), conv.weight, conv.bias, stride=2, padding=1)
    assert len(convs) == 3 and h.abs().max() > 0.9
    torch.testing.assert_close(net(z), h.tanh())


@pytest.mark.parametrize("size", [16, 64])
def test_the_encoder_layer_by_layer(size):
    nets, _, _, _ = tiny(image_size=size)
    net, x = nets["E"], torch.randn(4, 3, size, size).double()
    expected = F.linear(conv_stack(net.layers[0], x), net.layers[1].weight, net.layers[1].bias)
    torch.testing.assert_close(net(x), expected)


def test_the_stochastic_encoder_is_a_gaussian_in_training_and_its_mean_otherwise():
    nets, _, x, _ = tiny(stochastic=True)
    net, x = nets["E"], x[:1].expand(2000, -1, -1, -1)
    net.layers.eval()
    mean, log_variance = net.layers(x[:1]).chunk(2, dim=1)
    sampled = net(x)
    torch.testing.assert_close(sampled.mean(0), mean[0], atol=0.1, rtol=0.05)
    torch.testing.assert_close(sampled.std(0), (log_variance[0] / 2).exp(), atol=0, rtol=0.1)
    assert abs(torch.corrcoef(sampled.T)[0, 1]) < 0.1  # each dimension has its own noise
    torch.testing.assert_close(net.eval()(x[:4]), mean.expand(4, -1))
    gradients = torch.autograd.grad(sampled.std(), list(net.layers[1].parameters()))
    assert all(g[5:].abs().max() > 0 for g in gradients)  # through the reparameterisation


def test_the_discriminator_layer_by_layer():
    nets, _, x, z = tiny()
    net = nets["D"]
    net.of_both.eval()  # without dropout
    h_z = leaky(F.linear(z, net.of_z[0].weight, net.of_z[0].bias))
    h = torch.cat([conv_stack(net.of_x, x), h_z], 1)
    h = leaky(F.linear(h, net.of_both[0].weight, net.of_both[0].bias))
    torch.testing.assert_close(net(x, z), F.linear(h, net.of_both[3].weight, net.of_both[3].bias))


def test_batch_norm_dropout_and_initial_weights_are_the_paper_s():
    torch.manual_seed(0)
    nets = bigan_latent.build_networks(64, 16, 100)
    norms = [m for m in nets.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 4 + 3 + 3
    norm, x = norms[0], 7 + torch.randn(50, norms[0].num_features, 4, 4)
    norm(x)
    torch.testing.assert_close(norm.running_mean, 0.03 * x.mean((0, 2, 3)))
    assert all(m.momentum == norm.momentum for m in norms)
    (drop,) = [m for m in nets.modules() if isinstance(m, nn.Dropout)]
    assert (drop(torch.ones(100_000)) == 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert drop in list(nets["D"].modules())
    weighty = [m for m in nets.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    assert all(abs(m.weight.std().item() / 0.02 - 1) < 3 / math.sqrt(2 * m.weight.numel()) for m in weighty)
    assert all((m.bias == 0).all() for m in weighty if m.bias is not None)


def test_features_are_alexnet_s_pool5_of_length_1(alexnet_file):
    net = bigan_latent.load_features(alexnet_file)
    alexnet = torchvision.models.alexnet().features
    weights = torch.load(alexnet_file, weights_only=True)
    alexnet.load_state_dict({k[9:]: w for k, w in weights.items() if k.startswith("features")})
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    preprocess = torchvision.models.AlexNet_Weights.IMAGENET1K_V1.transforms()
    image = F.interpolate((x + 1) / 2, (224, 224), mode="bilinear")
    image = torch.stack([(c - m) / s for c, m, s in zip(image.unbind(1), preprocess.mean, preprocess.std)], 1)
    pool5 = alexnet(image).flatten(1)
    h = net(x)
    assert h.shape == (2, 9216)
    torch.testing.assert_close(h, pool5 / pool5.norm(dim=1, keepdim=True))
    torch.testing.assert_close(h.norm(dim=1), torch.ones(2))
    assert not any(p.requires_grad for p in net.parameters())


# ------------------------------------------------------------------------------------------------------------ losses


def test_discriminator_loss_eq_1_to_3():
    d_q, d_p = torch.randn(6, 1).double(), torch.randn(6, 1).double()
    p, q = sigmoid(d_q.numpy()), sigmoid(d_p.numpy())
    expected = -np.mean(0.9 * np.log(p) + 0.1 * np.log(1 - p)) - np.mean(np.log(1 - q))
    assert bigan_latent.discriminator_loss(d_q, d_p).item() == pytest.approx(expected)
    torch.autograd.gradcheck(bigan_latent.discriminator_loss, (d_q.requires_grad_(), d_p.requires_grad_()))
    best = [bigan_latent.discriminator_loss(torch.tensor(math.log(9) + d), torch.tensor(-50.0)) for d in (-0.1, 0, 0.1)]
    assert best[1] == min(best)  # D answers 0.9 to real pairs, and 0 to fake ones


def test_generator_loss_eq_1_to_3():
    d_q, d_p = torch.randn(6, 1).double(), torch.randn(6, 1).double()
    expected = -np.mean(np.log(1 - sigmoid(d_q.numpy()))) - np.mean(np.log(sigmoid(d_p.numpy())))
    assert bigan_latent.generator_loss(d_q, d_p).item() == pytest.approx(expected)
    torch.autograd.gradcheck(bigan_latent.generator_loss, (d_q.requires_grad_(), d_p.requires_grad_()))
    at_q, at_p = torch.autograd.grad(bigan_latent.generator_loss(d_q, d_p), (d_q, d_p))
    assert (at_q > 0).all() and (at_p < 0).all()  # E wants D to say "p", G wants it to say "q"


def test_pseudo_huber_figure_4():
    t = torch.linspace(-2, 2, 41).double().requires_grad_()
    np.testing.assert_allclose(bigan_latent.pseudo_huber(t).detach(), huber(t.detach().numpy()))
    torch.autograd.gradcheck(bigan_latent.pseudo_huber, t)
    small, large = torch.tensor([1e-3, 10.0], dtype=torch.double)
    assert bigan_latent.pseudo_huber(small).item() == pytest.approx(1e-6 / (2 * 0.05), rel=1e-3)
    assert bigan_latent.pseudo_huber(large).item() == pytest.approx(10 - 0.05, rel=1e-3)


@pytest.mark.parametrize(
    "loss, shape",
    [
        (bigan_latent.autoencoder_loss, (2, 3, 4, 4)),  # Eq. 4
        (bigan_latent.autodecoder_loss, (4, 5)),  # Eq. 6
        (bigan_latent.autodecoder_loss_q, (4, 5)),  # Eq. 7
    ],
)
def test_penalties_of_each_coordinate_eq_4_6_7(loss, shape):
    a, b = torch.randn(shape).double(), torch.randn(shape).double()
    assert loss(a, b).item() == pytest.approx(huber(a.numpy() - b.numpy()).mean())
    assert loss(a, a) == 0 and loss(a, b) > 0
    torch.autograd.gradcheck(loss, (a.requires_grad_(), b.requires_grad_()))


def test_feature_loss_of_the_norm_eq_5():
    a, b = torch.randn(4, 7).double(), torch.randn(4, 7).double()
    expected = huber(np.sqrt(((a - b).numpy() ** 2).sum(1))).mean()
    assert bigan_latent.feature_loss(a, b).item() == pytest.approx(expected)
    torch.autograd.gradcheck(bigan_latent.feature_loss, (a.requires_grad_(), b))
    (gradient,) = torch.autograd.grad(bigan_latent.feature_loss(a, a.detach()), a)
    assert bigan_latent.feature_loss(a, a) == 0 and torch.equal(gradient, 0 * gradient)


def test_total_loss_eq_8():
    weights = {**WEIGHTS, "L_H": 0.3}
    terms = {name: torch.rand((), dtype=torch.double, requires_grad=True) for name in weights}
    loss = bigan_latent.total_loss(terms, weights)
    assert loss.item() == pytest.approx(sum(weights[name] * terms[name].item() for name in weights))
    gradients = torch.autograd.grad(loss, list(terms.values()))
    assert {name: g.item() for name, g in zip(terms, gradients)} == weights


def test_table_1():
    rows = [tuple(row.values()) for row in bigan_latent.EXPERIMENTS.values()]
    assert rows == [(a, b, c) for a in (0.05, 1, 2.5) for b, c in ((0, 0), (1, 0), (0, 1))]
    assert [*bigan_latent.EXPERIMENTS] == [f"EX{i}" for i in range(1, 10)]
    assert all([*row] == ["lambda_ad", "lambda_ae", "lambda_h"] for row in bigan_latent.EXPERIMENTS.values())


@pytest.mark.parametrize("weighty", [(), ("L_AD",), ("L_AE",), ("L_H",), ("L_AD", "L_AE", "L_H")])
def test_all_losses_against_numpy(weighty):
    torch.manual_seed(0)
    nets, optimizers, x, z = tiny(H=bigan_latent.Features() if "L_H" in weighty else None)
    nets["D"].of_both.eval()  # without dropout
    weights = {
        "L_GAN": 1,
        **{name: 2.0 + i if name in weighty else 0 for i, name in enumerate(("L_AD", "L_AE", "L_H"))},
    }
    losses = {k: v.item() for k, v in bigan_latent.all_losses(nets, optimizers, x, z, weights, 0).items()}
    with torch.no_grad():
        G, E, D = nets["G"], nets["E"], nets["D"]
        x_hat, z_hat = G(z), E(x)
        x_tilde, z_tilde = G(z_hat), E(x_hat)
        p, q = sigmoid(D(x, z_hat).numpy()), sigmoid(D(x_hat, z).numpy())
        terms = {"L_AD": huber((z - z_tilde).numpy()).mean(), "L_AE": huber((x - x_tilde).numpy()).mean()}
        if "L_H" in weighty:
            terms["L_H"] = huber((nets["H"](x) - nets["H"](x_tilde)).norm(dim=1).numpy()).mean()
    expected = {name: terms[name] for name in weighty} | {"L_GAN": -np.log(1 - p).mean() - np.log(q).mean()}
    expected["G_E"] = sum(weights[name] * value for name, value in expected.items())
    expected["D"] = -(0.9 * np.log(p) + 0.1 * np.log(1 - p)).mean() - np.log(1 - q).mean()
    assert losses == pytest.approx(expected)


@pytest.mark.parametrize(
    "name, unroll, reached",
    [
        ("L_GAN", 0, {"G", "E", "D"}),
        ("L_GAN", 2, {"G", "E", "D"}),
        ("L_AD", 2, {"G", "E"}),
        ("L_AE", 2, {"G", "E"}),
        ("L_H", 2, {"G", "E"}),
        ("D", 2, {"G", "E", "D"}),
    ],
)
def test_which_networks_a_loss_reaches(name, unroll, reached):
    nets, optimizers, x, z = tiny(H=bigan_latent.Features() if name == "L_H" else None)
    loss = bigan_latent.all_losses(nets, optimizers, x, z, {**WEIGHTS, "L_H": name == "L_H"}, unroll)[name]
    for net in ("G", "E", "D"):
        gradients = torch.autograd.grad(loss, list(nets[net].parameters()), retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in gradients) == (net in reached), net


# --------------------------------------------------------------------------------------------------------- unrolling


def after_some_steps(steps, **options):
    """tiny(), after some training steps: D's optimizer has a state, and batch norm has seen something."""
    nets, optimizers, x, z = tiny(**options)
    for _ in range(steps):
        bigan_latent.train_step(nets, optimizers, x, z, WEIGHTS, 0)
    return nets, optimizers, x, z


def unrolled(nets, optimizers, x, z, unroll, first_order=False):
    """The unrolled loss, with the same dropout at every call; first_order: without the gradient through the steps."""
    torch.manual_seed(7)
    D, pairs = nets["D"], [(x, nets["E"](x)), (nets["G"](z), z)]
    arguments = D, optimizers["D"], pairs, *(D(*pair) for pair in pairs), unroll
    if not first_order:
        return bigan_latent.unrolled_generator_loss(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        grad = torch.autograd.grad
        patch.setattr(torch.autograd, "grad", lambda *a, **_: [g.detach() for g in grad(*a, retain_graph=True)])
        return bigan_latent.unrolled_generator_loss(*arguments)


@pytest.mark.parametrize("steps_before", [0, 3])
def test_the_gradient_through_two_unrolled_steps_is_that_of_finite_differences(steps_before):
    nets, optimizers, x, z = after_some_steps(steps_before)
    seen = []
    for net, count in (("G", 12), ("E", 6)):
        parameters = list(nets[net].parameters())
        gradients = torch.autograd.grad(unrolled(nets, optimizers, x, z, 2), parameters)
        plain = torch.autograd.grad(unrolled(nets, optimizers, x, z, 2, first_order=True), parameters)
        for i in range(count):
            torch.manual_seed(i)
            ways = [torch.randn_like(p) for p in parameters]
            at = []
            for sign in (1, -1):
                for p, way in zip(parameters, ways):
                    p.data.add_(way, alpha=sign * 1e-6)
                at.append(unrolled(nets, optimizers, x, z, 2).item())
                for p, way in zip(parameters, ways):
                    p.data.sub_(way, alpha=sign * 1e-6)
            slope, slope_plain = (sum((g * w).sum().item() for g, w in zip(gs, ways)) for gs in (gradients, plain))
            assert slope == pytest.approx((at[0] - at[1]) / 2e-6, rel=1e-4, abs=1e-5)
            seen.append(abs(slope - slope_plain) > 1e-2 * abs(slope) + 1e-3)
    assert sum(seen) > 12  # of 18: the gradient through the steps, not only at their end, can be told from rounding


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("unroll", [1, 3])
def test_unrolled_steps_are_those_of_torch_s_adam(unroll, steps_before):
    nets, optimizers, x, z = after_some_steps(steps_before)
    loss = unrolled(nets, optimizers, x, z, unroll)
    D = copy.deepcopy(nets["D"])
    adam = torch.optim.Adam(D.parameters(), 2e-2, (0.5, 0.999))
    adam.load_state_dict(optimizers["D"].state_dict())
    torch.manual_seed(7)
    pairs = [(x, nets["E"](x).detach()), (nets["G"](z).detach(), z)]
    for _ in range(unroll):
        adam.zero_grad()
        bigan_latent.discriminator_loss(*(D(*pair) for pair in pairs)).backward()
        adam.step()
    assert loss.item() == pytest.approx(bigan_latent.generator_loss(*(D(*pair) for pair in pairs)).item(), rel=1e-9)
    assert abs(loss.item() - unrolled(nets, optimizers, x, z, 0).item()) > 1e-3


def test_unrolling_leaves_the_discriminator_and_its_optimizer_as_they_are():
    for steps_before in (0, 2):
        nets, optimizers, x, z = after_some_steps(steps_before)
        D, pairs = nets["D"], [(x, nets["E"](x)), (nets["G"](z), z)]
        d_q, d_p = (D(*pair) for pair in pairs)
        optimizers["D"].zero_grad()
        before = copy.deepcopy((dict(D.state_dict()), optimizers["D"].state_dict()))
        bigan_latent.unrolled_generator_loss(D, optimizers["D"], pairs, d_q, d_p, 3)
        assert_same(before, (dict(D.state_dict()), optimizers["D"].state_dict()))
        assert all(p.grad is None and p.requires_grad for p in D.parameters()) and D.training


def test_unrolling_where_a_gradient_is_zero_stays_finite():
    nets, _, x, z = tiny()
    nets, x, z = nets.float(), x.float(), z.float()
    optimizers = bigan_latent.build_optimizers(nets, 2e-4)
    nets["D"].of_both[3].weight.data.zero_()  # no gradient reaches the layers before it
    loss = unrolled(nets, optimizers, x, z, 2)
    gradients = torch.autograd.grad(loss, list(nets["G"].parameters()))
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)


# ---------------------------------------------------------------------------------------------------------- training


def test_without_unrolling_a_step_is_a_plain_bigan_s_bit_for_bit():
    nets, optimizers, x, z = tiny()
    nets, x, z = nets.float(), x.float(), z.float()
    optimizers = bigan_latent.build_optimizers(nets, 2e-4)
    other = copy.deepcopy(nets)
    G, E, D = other["G"], other["E"], other["D"]
    mine = [*G.parameters(), *E.parameters()]
    adam_d, adam_ge = (torch.optim.Adam(ps, 2e-4, (0.5, 0.999), fused=True) for ps in (list(D.parameters()), mine))
    bce = F.binary_cross_entropy_with_logits
    for seed in range(3):
        torch.manual_seed(seed)
        bigan_latent.train_step(nets, optimizers, x, z, {"L_GAN": 1, "L_AD": 0, "L_AE": 0, "L_H": 0}, 0)
        torch.manual_seed(seed)
        x_hat, z_hat = G(z), E(x)
        d_q, d_p = D(x, z_hat), D(x_hat, z)
        d_loss = bce(d_q, torch.full_like(d_q, 0.9)) + bce(d_p, torch.zeros_like(d_p))
        ge_loss = bce(d_q, torch.zeros_like(d_q)) + bce(d_p, torch.ones_like(d_p))
        for p, g in zip(D.parameters(), torch.autograd.grad(d_loss, list(D.parameters()), retain_graph=True)):
            p.grad = g
        for p, g in zip(mine, torch.autograd.grad(ge_loss, mine)):
            p.grad = g
        adam_d.step()
        adam_ge.step()
    assert_same(dict(nets.state_dict()), dict(other.state_dict()))


def adam_by_hand(parameters, gradients, lr, moments):
    """Adam with beta 0.5, 0.999: the new parameters and moments [step, m, v]."""
    step = moments[0] + 1
    m = [0.5 * a + 0.5 * g for a, g in zip(moments[1], gradients)]
    v = [0.999 * a + 0.001 * g * g for a, g in zip(moments[2], gradients)]
    new = []
    for p, a, b in zip(parameters, m, v):
        new.append(p - lr * (a / (1 - 0.5**step)) / ((b / (1 - 0.999**step)) ** 0.5 + 1e-8))
    return new, [step, m, v]


def discriminate(weights, x, z):
    """The tiny D with the given weights, without dropout."""
    conv_1, bias_1, conv_2, gain, shift, dense_z, bias_z, dense, bias, logit, bias_logit = weights
    h = leaky(F.conv2d(x, conv_1, bias_1, stride=2, padding=1))
    h = F.conv2d(h, conv_2, stride=2, padding=1)
    h = (h - h.mean((0, 2, 3), keepdim=True)) / (h.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    h = leaky(h * gain[:, None, None] + shift[:, None, None]).flatten(1)
    h = torch.cat([h, leaky(F.linear(z, dense_z, bias_z))], 1)
    return F.linear(leaky(F.linear(h, dense, bias)), logit, bias_logit)


@pytest.mark.parametrize("unroll", [0, 1, 2])
def test_train_step_against_autograd_by_hand(unroll):
    nets, optimizers, _, _ = tiny()
    nets["D"].of_both.eval()  # without dropout
    other = copy.deepcopy(nets)
    G, E = other["G"], other["E"]
    mine, theirs = [*G.parameters(), *E.parameters()], [p.detach().clone() for p in nets["D"].parameters()]
    moments = {"mine": [0, [0] * len(mine), [0] * len(mine)], "theirs": [0, [0] * len(theirs), [0] * len(theirs)]}
    bce = F.binary_cross_entropy_with_logits
    one, zero = torch.ones(4, 1).double(), torch.zeros(4, 1).double()
    for seed in range(3):
        torch.manual_seed(10 + seed)
        x, z = torch.rand(4, 3, 16, 16).double() * 2 - 1, torch.rand(4, 5).double() * 2 - 1
        losses = bigan_latent.train_step(nets, optimizers, x, z, WEIGHTS, unroll)
        x_hat, z_hat = G(z), E(x)

        def d_loss(weights, x=x, z=z, x_hat=x_hat, z_hat=z_hat):
            return bce(discriminate(weights, x, z_hat), 0.9 * one) + bce(discriminate(weights, x_hat, z), zero)

        weights, state = [p.requires_grad_() for p in theirs], moments["theirs"]
        value = {"D": d_loss(weights)}
        gradients = torch.autograd.grad(value["D"], weights, retain_graph=True)
        for _ in range(unroll):
            along = torch.autograd.grad(d_loss(weights), weights, create_graph=True)
            weights, state = adam_by_hand(weights, along, 2e-2, state)
        value["L_GAN"] = bce(discriminate(weights, x, z_hat), zero) + bce(discriminate(weights, x_hat, z), one)
        value["L_AD"] = (0.05 * ((1 + ((E(x_hat) - z) / 0.05) ** 2) ** 0.5 - 1)).mean()
        value["L_AE"] = (0.05 * ((1 + ((G(z_hat) - x) / 0.05) ** 2) ** 0.5 - 1)).mean()
        value["G_E"] = value["L_GAN"] + 2.5 * value["L_AD"] + 0.7 * value["L_AE"]
        assert set(losses) == set(value)
        for name in value:
            assert losses[name].item() == pytest.approx(value[name].item(), rel=1e-6), name
            assert not losses[name].requires_grad
        mine_gradients = torch.autograd.grad(value["G_E"], mine)
        new, moments["mine"] = adam_by_hand(mine, mine_gradients, 2e-2, moments["mine"])
        for p, value in zip(mine, new):
            p.data.copy_(value)
        theirs, moments["theirs"] = adam_by_hand([p.detach() for p in theirs], gradients, 2e-2, moments["theirs"])
    for a, b in zip([*nets["G"].parameters(), *nets["E"].parameters(), *nets["D"].parameters()], [*mine, *theirs]):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_train_step_runs_every_network_once_for_all_losses():
    """The encoder draws one sample, which goes into D and into G; batch norm sees G(z), G(E(x)), E(x), E(G(z)) once."""
    nets, optimizers, x, z = tiny(stochastic=True)
    seen = {"G": [], "E": [], "D": []}
    for name, calls in seen.items():
        nets[name].register_forward_hook(lambda _, inputs, output, calls=calls: calls.append((*inputs, output)))
    bigan_latent.train_step(nets, optimizers, x, z, WEIGHTS, 0)
    (z_1, x_hat), (z_2, _) = seen["G"]
    (x_1, z_hat), (x_2, _) = seen["E"]
    (x_3, z_3, _), (x_4, z_4, _) = seen["D"]
    for a, b in ((z_1, z), (z_2, z_hat), (x_1, x), (x_2, x_hat), (x_3, x), (z_3, z_hat), (x_4, x_hat), (z_4, z)):
        assert a is b


def test_train_step_never_reads_a_tensor_back(monkeypatch):
    nets, images = bigan_latent.build_networks(16, 2, 5, True, bigan_latent.Features()), draw_faces(8, 16)[0]
    optimizers = bigan_latent.build_optimizers(nets, 2e-4)
    refuse_reading_back(monkeypatch)
    for _ in range(2):
        bigan_latent.train_step(nets, optimizers, *bigan_latent.draw_batch(images[:4], 5), {**WEIGHTS, "L_H": 1}, 2)


def test_batches_are_the_images_and_uniform_latents():
    images = draw_faces(10, 16)[0].repeat(50, 1, 1, 1)
    torch.manual_seed(0)
    x, z = bigan_latent.draw_batch(images, 7)
    assert torch.equal(x, to_float(images)) and z.shape == (500, 7)
    assert z.abs().max() <= 1 and z.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.05) and abs(z.mean()) < 0.05


# -------------------------------------------------------------------------------------------------------- evaluation


def test_measure_against_numpy():
    nets, _, _, z = after_some_steps(3)
    nets, z = nets.float(), torch.rand(20, 5) * 2 - 1
    torch.manual_seed(0)
    images = torch.randint(256, (1400, 3, 16, 16), dtype=torch.uint8)
    data = Data(images[:1100] // 2, images[1100:], (), None, None)
    results = bigan_latent.measure(nets, data, z)
    logged = bigan_latent.heldout_autodecoder_loss_q(nets, data, "cpu")
    assert all(net.training for net in nets.values())
    x = to_float(data.heldout)
    nets.eval()
    G, E, D = nets["G"], nets["E"], nets["D"]
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
            "sample_diversity": bigan_latent.sample_diversity(x_hat, x[:20]),
        }
        assert results == pytest.approx(expected, rel=1e-4)
        first = huber((z_hat - E(x_tilde))[:250].numpy()).mean()
    assert logged.item() == pytest.approx(first, rel=1e-4)


def test_figures_show_what_they_say(monkeypatch, tmp_path):
    """With G and E such that G(E(x)) is half of x's mean colour, the saved arguments tell what stands where."""
    shown = {}
    monkeypatch.setattr(
        bigan_latent, "save_grid", lambda path, *images, **options: shown.update({path.name: (images, options)})
    )
    nets = nn.ModuleDict({"G": nn.Module(), "E": nn.Module(), "D": nn.Module()})
    nets["E"].forward = lambda x: x.mean((2, 3)) / 2
    nets["G"].forward = lambda z: z[:, :3, None, None].expand(-1, -1, 16, 16)
    nets["D"].forward = lambda x, z: x.var((1, 2, 3))[:, None] + z.mean(1, keepdim=True)
    images = draw_faces(14, 16)[0]
    data, z = Data(images[:2], images[2:], (), None, None), torch.rand(256, 3) * 2 - 1

    def texts(x, z):
        return [f"{min(99, v):02.0f}" for v in 100 * sigmoid(nets["D"](x, z)[:, 0].numpy())]

    bigan_latent.save_figures(nets, data, z, tmp_path)
    x = to_float(data.heldout)[:10]
    assert set(shown) == {"figure_samples.png", "figure_reconstructions.png", "figure_interpolations.png"}
    (samples,), options = shown["figure_samples.png"]
    assert torch.equal(samples, nets["G"](z[:100])) and options["captions"] == [texts(samples, z[:100])]
    (originals, reconstructions), options = shown["figure_reconstructions.png"]
    assert torch.equal(originals, x)
    torch.testing.assert_close(reconstructions, x.mean((2, 3), keepdim=True).expand_as(x) / 2)
    assert options["captions"] == [texts(images, x.mean((2, 3)) / 2) for images in (originals, reconstructions)]
    assert options["captions"][0] != options["captions"][1]
    (grid,), options = shown["figure_interpolations.png"]
    for i, row in enumerate(grid.view(5, options["columns"], 3, 16, 16)):
        first, last = x[2 * i], x[2 * i + 1]
        assert torch.equal(row[0], first) and torch.equal(row[-1], last)
        ends = first.mean((1, 2)) / 2, last.mean((1, 2)) / 2
        for j, image in enumerate(row[1:-1]):
            torch.testing.assert_close(image[:, 0, 0], ends[0] + (ends[1] - ends[0]) * j / (len(row) - 3))
    bigan_latent.save_figures(nets, data, z, tmp_path, step=70)
    assert {"samples_70.png", "reconstructions_70.png"} <= set(shown) and len(shown) == 5


def test_percents_have_two_digits():
    assert bigan_latent.captions(torch.tensor([0.2, 7.6, 42.0, 99.9])) == ["00", "08", "42", "99"]


# ------------------------------------------------------------------------------------------------------ command line


def test_a_run_as_a_user_starts_it(photos, tmp_path):
    pictures = {f"samples_{step}": (10, 10, 1) for step in (2, 4, 5)}
    pictures |= {f"reconstructions_{step}": (5, 2, 2) for step in (2, 4, 5)}
    pictures |= {"figure_interpolations": (10, 5, 1), "figure_samples": (10, 10, 1)}
    pictures |= {"figure_reconstructions": (5, 2, 2)}
    arguments = ["--data", photos, *TINY, "--steps", 5]
    out, results, header, _ = run_as_a_user("bigan_latent", *arguments, cwd=tmp_path, pictures=pictures)
    assert results["config"]["channels"] == 2 and out.startswith("EX7, weights 2.5, 0, 0, on ")
    assert results["config"]["unroll"] == 8 and results["config"]["experiment"] == "EX7"
    names = "heldout_l1 heldout_l1_of_mean_image latent_l1 autodecoder_q sample_diversity"
    for name in [*names.split(), "d_on_real", "d_on_samples", "d_on_reconstructions"]:
        assert 0 < results[name] < (100 if name.startswith("d_") else 10)
        assert f"{name:26}{results[name]:10.3f}" in out
    assert header == ["D", "G_E", "L_GAN", "L_AD", "autodecoder_q"]


def test_experiments_train_with_their_losses_and_nothing_else(photos, tmp_path, cli, alexnet_file):
    small = ["--data", photos, *TINY, "--unroll", 1, "--steps", 2, "--alexnet-weights", alexnet_file]
    for name, losses in (("EX2", ["L_AD", "L_AE"]), ("EX9", ["L_AD", "L_H"]), ("EX4", ["L_AD"])):
        result = cli(bigan_latent, *small, "--experiment", name, "--out", tmp_path / name)
        assert result.status == 0 and result.out.startswith(f"{name}, weights "), result
        assert log_of(tmp_path / name)[0] == ["step", "D", "G_E", "L_GAN", *losses, "autodecoder_q"]
    assert not any(k.startswith("H.") for k in load(tmp_path / "EX4")["networks"])
    resume = ["--resume", "--steps", 3, "--log-every", 7, "--save-every", 9, "--alexnet-weights", "missing.pth"]
    for more in (resume, ["--eval"]):  # AlexNet is in the checkpoint
        assert cli(bigan_latent, *more, "--out", tmp_path / "EX9", "--device", "cpu").status == 0
    weights = torch.load(alexnet_file, weights_only=True)
    assert torch.equal(load(tmp_path / "EX9")["networks"]["H.layers.0.weight"], weights["features.0.weight"])


def test_a_stochastic_encoder_trains(photos, tmp_path, cli):
    run = tmp_path / "run"
    small = ["--data", photos, *TINY, "--unroll", 1, "--latent-dim", 5, "--steps", 2]
    assert cli(bigan_latent, *small, "--stochastic-encoder", "--out", run).status == 0
    assert load(run)["networks"]["E.layers.1.weight"].shape[0] == 10
    assert cli(bigan_latent, "--eval", "--out", run, "--device", "cpu").status == 0


def test_alexnet_s_weights_are_downloaded_only_where_they_are_needed(photos, tmp_path, cli, monkeypatch, alexnet_file):
    def download(*_, **options):
        assert options == {"check_hash": True, "weights_only": True}
        calls.append(1)
        if len(calls) == 1:
            raise URLError("no route")
        return torch.load(alexnet_file, weights_only=True)

    calls = []
    monkeypatch.setattr(torchvision.models.AlexNet_Weights, "get_state_dict", download)
    small = ["--data", photos, *TINY, "--unroll", 0, "--steps", 1]
    assert cli(bigan_latent, *small, "--experiment", "EX8", "--out", tmp_path / "8").status == 0 and not calls
    before = files(tmp_path)
    result = cli(bigan_latent, *small, "--experiment", "EX9", "--out", tmp_path / "9")
    assert_refused(result, "downloaded", "no route", "--alexnet-weights", "alexnet-owt-7be5be79.pth")
    assert files(tmp_path) == before
    assert cli(bigan_latent, *small, "--lambda-h", 0.1, "--out", tmp_path / "h").status == 0 and len(calls) == 2


def test_the_settings_reach_the_training_step(photos, tmp_path, cli, monkeypatch):
    def spy(nets, optimizers, x, z, weights, unroll):
        rates = {name: (o.param_groups[0]["lr"], o.param_groups[0]["betas"]) for name, o in optimizers.items()}
        seen.append((x.shape, z.shape, weights, unroll, rates, nets["E"].stochastic, "H" in nets))
        return train_step(nets, optimizers, x, z, weights, unroll)

    seen, vectors, train_step = [], [], bigan_latent.train_step
    monkeypatch.setattr(bigan_latent, "train_step", spy)
    monkeypatch.setattr(bigan_latent, "save_figures", lambda nets, data, z, *args: vectors.append(z))
    settings = "--lr 1e-3 --lambda-ad 3 --lambda-ae 4 --latent-dim 7 --unroll 2 --stochastic-encoder".split()
    for i, more in enumerate((settings, [*settings, "--seed", 9], ["--experiment", "EX5", "--latent-dim", 7])):
        cli(bigan_latent, "--data", photos, *SMALL, "--steps", 1, "--out", tmp_path / str(i), *more)
    first = {"L_GAN": 1, "L_AD": 3, "L_AE": 4, "L_H": 0}, 2, dict.fromkeys(("D", "G_E"), (1e-3, (0.5, 0.999))), True
    third = {"L_GAN": 1, "L_AD": 1, "L_AE": 1, "L_H": 0}, 1, dict.fromkeys(("D", "G_E"), (2e-4, (0.5, 0.999))), False
    assert seen == [((4, 3, 16, 16), (4, 7), *rest, False) for rest in (first, first, third)]
    assert all(torch.equal(z, vectors[0]) for z in vectors) and len(vectors) == 6  # the same vectors whatever the seed
    assert vectors[0].abs().max() <= 1 and vectors[0].shape == (256, 7) and vectors[0].min() < -0.9


def test_the_defaults_are_the_paper_s():
    args, _ = bigan_latent.parse_args(["--out", "nowhere"])
    assert (args.steps, args.batch_size, args.image_size, args.latent_dim, args.channels) == (200_000, 32, 64, 100, 64)
    assert (args.lr, args.unroll, args.experiment, args.stochastic_encoder) == (2e-4, 8, "EX7", False)
    assert (args.lambda_ad, args.lambda_ae, args.lambda_h) == (2.5, 0, 0)
    args, _ = bigan_latent.parse_args(["--out", "nowhere", "--experiment", "EX3", "--lambda-ae", "0.2", "--quick"])
    assert (args.lambda_ad, args.lambda_ae, args.lambda_h) == (0.05, 0.2, 1)


# -------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_a_step_never_waits_for_the_device():
    nets, images = bigan_latent.build_networks(16, 4, 5).cuda(), draw_faces(40, 16)[0].cuda()
    optimizers = bigan_latent.build_optimizers(nets, 2e-4)
    for _ in range(3):
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses = bigan_latent.train_step(nets, optimizers, *bigan_latent.draw_batch(images[:4], 5), WEIGHTS, 2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(loss.isfinite() and loss.device.type == "cuda" for loss in losses.values())
