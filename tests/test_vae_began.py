import copy
import json
import shutil
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import TINY, adam_by_hand, assert_refused, files, load, log_of, refuse_reading_back, run_as_a_user
from PIL import Image
from torch import nn

import vae_began
from common import Data, draw_faces, draw_images, to_float

SMALL = ["--filters" if argument == "--channels" else argument for argument in TINY]
TERMS = {"vae-began": "L_n L_e L_d L_g L_v L_s", "began-lsm": "L_d L_g L_s", "began": "L_d L_g"}
MODELS = list(vae_began.MODELS)
WEIGHTS = {"alpha": 0.3, "beta": 0.2, "gamma": 0.7, "eta": 0.6}


def weights(model):
    return {**WEIGHTS, "beta": 0.0} if model == "began" else WEIGHTS


def tiny(model="vae-began", seed=0, gains=(0.3, 0.2, 0.1)):
    """Small networks in float64 with weights that let every gradient be seen, k = 0.4, and a batch x, z_g, epsilon."""
    torch.manual_seed(seed)
    nets = vae_began.build_networks(model, 16, 2, 5, gains).double()
    for parameter in nets.parameters():
        nn.init.normal_(parameter, std=0.3)
    nets["controller"].k.fill_(0.4)
    return nets, torch.rand(4, 3, 16, 16).double() * 2 - 1, *torch.randn(2, 4, 5).double()


# ---------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("size", vae_began.IMAGE_SIZES)
def test_shapes_and_ranges(size):
    nets = vae_began.build_networks("vae-began", size, 2, 7, (0, 0, 0))
    x, z = torch.randn(3, 3, size, size), torch.randn(3, 7)
    x_prime, codes = nets["D"](x)
    assert nets["G"](z).shape == x_prime.shape == (3, 3, size, size) and codes.shape == (3, 7)
    assert nets["E"](x).shape == (3, 14) and nets["G"](1e6 * z).abs().max() > 1  # no output activation


def test_weights_of_began_s_networks_counted_by_hand():
    def conv(c_in, c_out):
        return 9 * c_in * c_out + c_out

    pairs = [(64, 64), (64, 64), (64, 64), (64, 128), (128, 128), (128, 128), (128, 192), (192, 192), (192, 192)]
    pairs += [(192, 256), (256, 256)]  # a first, a second and a halving convolution a block; the last halves nothing
    convs = conv(3, 64) + sum(conv(*pair) for pair in pairs)
    g = 64 * 64 * 64 + 64 * 64 + 8 * conv(64, 64) + conv(64, 3)
    expected = {"G": g, "D": convs + 64 * 256 * 64 + 64 + g, "E": convs + 64 * 256 * 128 + 128, "controller": 0}
    nets = vae_began.build_networks("vae-began", 64, 64, 64, (0, 0, 0))
    assert {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()} == expected


def test_no_batch_norm_no_dropout_no_transposed_convolution():
    nets = vae_began.build_networks("vae-began", 64, 2, 5, (0, 0, 0))
    kinds = {type(layer) for layer in nets.modules() if not list(layer.children())}
    assert kinds == {nn.Conv2d, nn.ELU, nn.Linear, nn.Flatten, nn.Unflatten, nn.Upsample, vae_began.Controller}


def elu(h):
    return torch.where(h > 0, h, h.exp() - 1)


@pytest.mark.parametrize("size, sizes", [(16, [16] * 3 + [8] * 3), (32, [32] * 3 + [16] * 3 + [8] * 3)])
def test_the_encoder_layer_by_layer(size, sizes):
    torch.manual_seed(0)
    net, h, seen = vae_began.Encoder(size, 2, 5).double(), torch.randn(3, 3, size, size).double(), []
    *convs, dense = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    expected = h
    for i, layer in enumerate(convs):
        halving = (
            i % 3 == 0 and i > 0
        )  # the first convolution, two a block, and one that halves after each but the last
        expected = elu(F.conv2d(expected, layer.weight, layer.bias, stride=2 if halving else 1, padding=1))
        seen.append(expected.shape[-1])
    blocks = size.bit_length() - 3
    widths = [2] + [2 * i for i in range(1, blocks + 1) for _ in range(3)][: 3 * blocks - 1]
    assert [layer.out_channels for layer in convs] == widths and seen == sizes
    torch.testing.assert_close(net(h), F.linear(expected.flatten(1), dense.weight, dense.bias))


@pytest.mark.parametrize("blocks", [2, 3])
def test_the_decoder_layer_by_layer(blocks):
    torch.manual_seed(0)
    net, z = vae_began.Decoder(4 * 2**blocks, 2, 5).double(), torch.randn(3, 5).double()
    dense, *convs, last = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    h = F.linear(z, dense.weight, dense.bias).view(3, 2, 8, 8)
    assert len(convs) == 2 * blocks
    for i, layer in enumerate(convs):
        if i % 2 == 0 and i > 0:
            h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)  # to the nearest neighbour
        h = elu(F.conv2d(h, layer.weight, layer.bias, padding=1))
    torch.testing.assert_close(net(z), F.conv2d(h, last.weight, last.bias, padding=1))


def test_the_discriminator_is_an_autoencoder_eq_8():
    nets, x, _, _ = tiny()
    x_prime, z = nets["D"](x)
    assert torch.equal(z, nets["D"].encoder(x)) and torch.equal(x_prime, nets["D"].decoder(z))


@pytest.mark.parametrize("model", MODELS)
def test_networks_of_the_models(model):
    names = {"G", "D", "controller"} | ({"E"} if model == "vae-began" else set())
    assert set(tiny(model)[0]) == names


# -------------------------------------------------------------------------------------------------------- controller


def controlled(errors, gains, k=0.0):
    """k after each of the errors, by Eq. 12, in NumPy."""
    e_1 = e_2 = 0.0
    ks = []
    for e in errors:
        k = min(1, max(0, k + gains[0] * e + gains[1] * (e - e_1) + gains[2] * (e + e_2 - 2 * e_1)))
        e_1, e_2 = e, e_1
        ks.append(k)
    return ks


def test_controller_eq_12():
    errors, gains = np.random.RandomState(0).randn(60), (0.3, 0.2, 0.1)
    controller = vae_began.Controller(gains).double()
    ks = []
    for e in errors:
        controller.update(torch.tensor(e))
        ks.append(controller.k.item())
    np.testing.assert_allclose(ks, controlled(errors, gains), atol=1e-12)
    assert min(ks) == 0 and max(ks) == 1 and sum(0 < k < 1 for k in ks) > 30
    assert set(controller.state_dict()) == {"k", "e_1", "e_2"} and not list(controller.parameters())
    for _ in range(200):
        controller.update(torch.tensor(1.0))
    assert controller.k == 1


def test_controller_starts_at_zero_and_has_each_gain_in_its_place():
    for gains, expected in (((0.1, 0, 0), [0.1, 0.2, 0.3]), ((0, 0.1, 0), [0.1, 0.1, 0.1]), ((0, 0, 0.1), [0.1, 0, 0])):
        controller, ks = vae_began.Controller(gains), []
        assert controller.k == controller.e_1 == controller.e_2 == 0
        for _ in range(3):
            controller.update(torch.tensor(1.0))
            ks.append(controller.k.item())
        assert ks == pytest.approx(expected, abs=1e-7)


def simulate(gains, steps=6000, seed=0):
    """The controller against a first-order plant with noise: y follows 1.6 k slowly, and is to be 0.8. All y."""
    controller, noise, y, ys = vae_began.Controller(gains), np.random.RandomState(seed).randn(steps), 0.0, []
    for n in noise:
        y += 0.005 * (1.6 * controller.k.item() - y)
        controller.update(torch.tensor(0.8 - y + 0.01 * n))
        ys.append(y)
    return np.array(ys)


def overshoot_and_settling(ys):
    """How far y rises above 0.8, in shares of it, and the step after which it stays within 5 percent of it."""
    outside = np.flatnonzero(np.abs(ys / 0.8 - 1) > 0.05)
    return ys.max() / 0.8 - 1, outside[-1] + 1


def test_simulation_the_proportional_gain_dampens_and_hastens_the_balance():
    integral, damped = (overshoot_and_settling(simulate(gains)) for gains in ((3e-3, 0, 0), (3e-3, 0.5, 0)))
    assert integral[0] > 0.15 and damped[0] < 0.5 * integral[0] and damped[1] < 0.8 * integral[1] and integral[1] < 5500
    printed, began = (simulate(vae_began.MODELS[model]["gains"]) for model in ("vae-began", "began"))
    assert 0 < np.abs(printed - began).max() < 0.02  # the paper's gains are too small to be told from BEGAN's


# ------------------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize(
    "loss, shape",
    [
        (vae_began.pixel_loss, (2, 3, 4, 4)),  # Eq. 2
        (vae_began.autoencoder_loss, (2, 3, 4, 4)),  # Eq. 7
        (vae_began.similarity_loss, (4, 5)),  # Eq. 9
    ],
)
def test_absolute_losses_eq_2_7_9(loss, shape):
    a, b = torch.randn(shape).double(), torch.randn(shape).double()
    assert loss(a, b).item() == pytest.approx(np.abs(a.numpy() - b.numpy()).sum() / a.numel())
    assert loss(a, a) == 0
    torch.autograd.gradcheck(loss, (a.requires_grad_(), b.requires_grad_()))


def test_kl_loss_eq_3():
    mean, log_variance = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0)).mean()
    assert vae_began.kl_loss(mean, log_variance).item() == pytest.approx(expected.item())
    zero = torch.zeros(4, 5).double().requires_grad_()
    assert vae_began.kl_loss(zero, zero) == 0
    (gradient,) = torch.autograd.grad(vae_began.kl_loss(zero, zero), zero)
    assert (gradient == 0).all()
    torch.autograd.gradcheck(vae_began.kl_loss, (mean.requires_grad_(), log_variance.requires_grad_()))


def test_reparameterise_eq_4():
    mean, log_variance, epsilon = torch.randn(3, 4, 5).double()
    expected = mean.numpy() + epsilon.numpy() * np.sqrt(np.exp(log_variance.numpy()))
    np.testing.assert_allclose(vae_began.reparameterise(mean, log_variance, epsilon).numpy(), expected)
    mean, log_variance = mean.requires_grad_(), log_variance.requires_grad_()
    torch.autograd.gradcheck(vae_began.reparameterise, (mean, log_variance, epsilon))


def test_sums_of_losses_eq_6_and_10_to_15():
    torch.manual_seed(0)
    d, g, v, s, e, n, k, fake, alpha, beta, gamma, eta = (torch.rand(12).double() + 0.1).unbind()
    cases = {
        vae_began.fake_loss: ((g, v, alpha), g + alpha * v),  # Eq. 6
        vae_began.balance: ((d, fake), fake / d),  # Eq. 10
        vae_began.balance_error: ((d, fake, eta), eta * d - fake),  # Eq. 11
        vae_began.discriminator_loss: ((d, fake, k), d - k * fake),  # Eq. 13
        vae_began.decoder_loss: ((fake, s, e, beta, gamma), fake + beta * s + gamma * e),  # Eq. 14
        vae_began.encoder_loss: ((n, s, e, beta, gamma), n + beta * s + gamma * e),  # Eq. 15
        vae_began.convergence_measure: ((d, -e), d + e),  # Section 3.4
    }
    for loss, (arguments, expected) in cases.items():
        assert loss(*arguments).item() == pytest.approx(expected.item()), loss
        torch.autograd.gradcheck(loss, [a.clone().requires_grad_() for a in arguments])
    assert vae_began.balance_error(d, eta * d, eta) == 0 and vae_began.balance(d, 0.5 * d) == 0.5
    assert vae_began.convergence_measure(d, 0 * e) == d  # the least, in equilibrium


@pytest.mark.parametrize("model", MODELS)
def test_all_losses_against_numpy(model):
    nets, x, z_g, epsilon = tiny(model)
    losses = vae_began.all_losses(nets, x, z_g, epsilon, **weights(model))
    G, D = nets["G"], nets["D"]
    with torch.no_grad():
        x_g = G(z_g)
        l1 = lambda a, b: np.abs(a.numpy() - b.numpy()).mean()  # noqa: E731
        expected = {"L_d": l1(x, D(x)[0]), "L_g": l1(x_g, D(x_g)[0]), "k": 0.4}
        fake, x_s = expected["L_g"], x_g
        if model == "vae-began":
            mean, log_variance = nets["E"](x)[:, :5], nets["E"](x)[:, 5:]
            x_v = G(mean + epsilon * (log_variance / 2).exp())
            expected |= {"L_e": l1(x_v, x), "L_v": l1(x_v, D(x_v)[0])}
            m, v = mean.numpy(), np.exp(log_variance.numpy())
            expected["L_n"] = (0.5 * (m**2 + v - 1 - np.log(v))).mean()
            fake, x_s = fake + 0.3 * expected["L_v"], x_v
        if model != "began":
            expected["L_s"] = l1(D(x_s)[1], D(x)[1])
    assert set(TERMS[model].split()) | {"k"} == set(expected)
    guide = 0.2 * expected.get("L_s", 0) + 0.7 * expected.get("L_e", 0)
    if model == "vae-began":
        expected["L_enc"] = expected["L_n"] + guide
    expected |= {"L_gen": fake + guide, "L_dis": expected["L_d"] - 0.4 * fake, "balance": fake / expected["L_d"]}
    expected["e"] = 0.6 * expected["L_d"] - fake
    expected["convergence"] = expected["L_d"] + abs(expected["e"])
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected)


@pytest.mark.parametrize(
    "name, reached",
    [
        ("L_n", {"E"}),
        ("L_e", {"E", "G"}),
        ("L_d", {"D"}),
        ("L_g", {"G", "D"}),
        ("L_v", {"E", "G", "D"}),
        ("L_s", {"E", "G", "D"}),
    ],
)
def test_which_networks_a_loss_reaches(name, reached):
    nets, *batch = tiny()
    loss = vae_began.all_losses(nets, *batch, **WEIGHTS)[name]
    for net in ("E", "G", "D"):
        gradients = torch.autograd.grad(loss, list(nets[net].parameters()), retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in gradients) == (net in reached), net


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("model", MODELS)
def test_train_step_against_autograd_by_hand(model):
    nets, _, _, _ = tiny(model)
    optimizers = vae_began.build_optimizers(nets, 1e-3)
    other, k, errors = copy.deepcopy(nets), 0.4, []
    moments = {}
    for i in range(4):
        torch.manual_seed(10 + i)
        x, (z_g, epsilon) = torch.rand(4, 3, 16, 16).double() * 2 - 1, torch.randn(2, 4, 5).double()
        losses = vae_began.train_step(nets, optimizers, x, z_g, epsilon, **weights(model))
        G, D, E = other["G"], other["D"], other["E"] if "E" in other else None
        l1 = lambda a, b: (a - b).abs().mean()  # noqa: E731

        def score(image, D=D, l1=l1):
            return l1(image, D.decoder(D.encoder(image)))

        x_g = G(z_g)
        fake, x_s, pixels = score(x_g), x_g, 0
        if E:
            mean, log_variance = E(x).chunk(2, 1)
            x_v = G(mean + epsilon * (log_variance / 2).exp())
            fake, x_s, pixels = fake + 0.3 * score(x_v), x_v, 0.7 * l1(x_v, x)
        guide = pixels + (0.2 * l1(D.encoder(x_s), D.encoder(x)) if model != "began" else 0)
        theirs = score(x) - k * (score(x_g.detach()) + (0.3 * score(x_v.detach()) if E else 0))
        values = {"L_gen": (fake + guide, G), "L_dis": (theirs, D)}
        if E:
            kl = ((mean**2 + log_variance.exp() - log_variance - 1) / 2).mean()
            values["L_enc"] = kl + guide, E
        assert set(values) == set(optimizers)
        updates = []
        for name, (value, net) in values.items():
            assert losses[name].item() == pytest.approx(value.item()) and not losses[name].requires_grad
            parameters = list(net.parameters())
            gradients = torch.autograd.grad(value, parameters, retain_graph=True)
            zeros = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
            updates.append((parameters, gradients, 1e-3, moments.setdefault(name, [0, *zeros])))
        assert losses["k"].item() == pytest.approx(k)
        errors.append((0.6 * score(x) - fake).item())
        for update in updates:
            adam_by_hand(*update, beta=0.9)
        k = controlled(errors, (0.3, 0.2, 0.1), 0.4)[-1]
        assert nets["controller"].k.item() == pytest.approx(k)
    for name, parameter in nets.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_train_step_never_reads_a_tensor_back(model, monkeypatch):
    nets, images = vae_began.build_networks(model, 16, 2, 5, (0.1, 0.1, 0.1)), draw_faces(8, 16)[0]
    optimizers = vae_began.build_optimizers(nets, 2e-4)
    refuse_reading_back(monkeypatch)
    vae_began.train_step(nets, optimizers, *vae_began.draw_batch(images[:4], 5), **WEIGHTS)


def test_batches_are_the_images_and_normal_noise():
    images = draw_faces(10, 16)[0].repeat(50, 1, 1, 1)
    torch.manual_seed(0)
    x, z_g, epsilon = vae_began.draw_batch(images, 7)
    assert torch.equal(x, to_float(images))
    for noise in (z_g, epsilon):
        assert noise.shape == (500, 7) and abs(noise.mean()) < 0.1 and noise.std().item() == pytest.approx(1, abs=0.1)
    assert abs(torch.corrcoef(torch.stack([z_g.flatten(), epsilon.flatten()]))[0, 1]) < 0.1


def test_the_encoder_stays_alive():
    """After a short run its codes say something: KL above 3 nats, and reconstructions beat the mean image."""
    torch.manual_seed(0)
    images, attributes, labels = draw_faces(600, 16)
    data = Data(images[:540], images[540:], attributes, labels[:540], labels[540:])
    quick = {"alpha": 0.3, "beta": 0.1, "gamma": vae_began.QUICK["gamma"], "eta": 0.5}
    nets = vae_began.build_networks("vae-began", 16, 8, 64, (1e-3, 1e-5, 1e-5))
    optimizers = vae_began.build_optimizers(nets, vae_began.QUICK["lr"])
    for _ in range(150):
        images = draw_images(data.train, 16, data.train.device)
        vae_began.train_step(nets, optimizers, *vae_began.draw_batch(images, 64), **quick)
    results = vae_began.measure(nets, data, torch.randn(60, 64), quick)
    with torch.no_grad():
        mean, log_variance = nets["E"](to_float(data.heldout)).chunk(2, 1)
    nats = (0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)).sum(1).mean().item()
    assert results["kl_nats"] == pytest.approx(nats, rel=1e-4) and nats > 3
    assert results["heldout_l1"] < 0.9 * results["heldout_l1_of_mean_image"]


# -------------------------------------------------------------------------------------------------------- evaluation


def test_inception_score_of_known_probabilities():
    uniform = torch.full((40, 8), 1 / 8)
    assert vae_began.inception_score(uniform) == pytest.approx((1, 0), abs=1e-6)
    certain = torch.eye(8).repeat(10, 1)  # every split has each class once
    assert vae_began.inception_score(certain) == pytest.approx((8, 0), abs=1e-5)
    one_class = torch.eye(8)[:1].expand(40, -1)
    assert vae_began.inception_score(one_class) == pytest.approx((1, 0), abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"splits": 3}])
def test_inception_score_against_numpy(options):
    p = torch.randn(67, 7).double().softmax(1)
    scores = []
    for part in np.array_split(p.numpy(), options.get("splits", 10)):
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    assert vae_began.inception_score(p, **options) == pytest.approx((np.mean(scores), np.std(scores)))


def test_inception_sees_images_of_299_pixels_in_its_own_range():
    x, seen = torch.randn(2, 3, 16, 16), []
    p = vae_began.inception_probabilities(lambda images: seen.append(images) or images.mean((2, 3)), x)
    torch.testing.assert_close(seen[0], F.interpolate(x.clamp(-1, 1), (299, 299), mode="bilinear"))
    torch.testing.assert_close(p, seen[0].mean((2, 3)).softmax(1))


@pytest.mark.parametrize("model", MODELS)
def test_measure_against_numpy(model):
    nets, _, _, _ = tiny(model)
    nets, z = nets.float(), torch.randn(80, 5)
    torch.manual_seed(0)
    images = torch.randint(256, (1400, 3, 16, 16), dtype=torch.uint8)
    data = Data(images[:1100] // 2, images[1100:], (), None, None)
    inception = lambda images: images[:, :, :8, :8].flatten(1)  # noqa: E731
    results = vae_began.measure(nets, data, z, weights(model), inception, 130)
    x, G = to_float(data.heldout), nets["G"]
    with torch.no_grad():
        x_g = G(z)
        losses = vae_began.all_losses(nets, x[:64], z[:64], z[:64].flip(1), **weights(model))
        noise = torch.randn(130, 5, generator=torch.Generator().manual_seed(1))
        p, q = (
            vae_began.inception_probabilities(inception, images) for images in (G(noise), to_float(data.train[:130]))
        )
        score, spread = vae_began.inception_score(p)
        expected = {
            "heldout_l1": None,
            "heldout_l1_of_mean_image": np.abs(x.numpy() - (data.train.numpy() / 127.5 - 1).mean(0)).mean(),
            "kl_nats": None,
            "convergence_measure": losses["convergence"].item(),
            "balance": losses["balance"].item(),
            "k": nets["controller"].k.item(),
            "sample_diversity": vae_began.sample_diversity(x_g, x[:80]),
            "inception_score": score,
            "inception_score_std": spread,
            "inception_score_of_real": vae_began.inception_score(q)[0],
        }
        if model == "vae-began":
            mean, log_variance = nets["E"](x).chunk(2, 1)
            expected["heldout_l1"] = np.abs((G(mean) - x).numpy()).mean()
            expected["kl_nats"] = (0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)).sum(1).mean().item()
    for name, value in expected.items():
        assert results[name] == (value if value is None else pytest.approx(value, rel=1e-4)), name
    assert set(results) == set(expected)
    without = vae_began.measure(nets, data, z, weights(model))
    assert without["inception_score"] is without["inception_score_std"] is without["inception_score_of_real"] is None


def stub_networks():
    """E(x) is half of x's mean colour, G(z) an image of the first three latents, D darkens an image."""
    nets = nn.ModuleDict({"G": nn.Module(), "E": nn.Module(), "D": nn.Module()})
    nets["E"].forward = lambda x: torch.cat([x.mean((2, 3)) / 2, x.new_ones(len(x), 3)], 1)
    nets["G"].forward = lambda z: z[:, :3, None, None].expand(-1, -1, 16, 16)
    nets["D"].forward = lambda x: (x - 0.1, x.mean((2, 3)))
    return nets


def test_figures_show_what_they_say(monkeypatch, tmp_path):
    shown = {}
    monkeypatch.setattr(
        vae_began, "save_grid", lambda path, *images, **options: shown.update({path.name: (images, options)})
    )
    nets, (images, attributes, labels) = stub_networks(), draw_faces(60, 16)
    data, z = Data(images[:20], images[20:], attributes, labels[:20], labels[20:]), torch.randn(256, 3)
    vae_began.save_figures(nets, data, z, tmp_path, attributes=["beard", "bald"])
    x, x_g = to_float(data.heldout), nets["G"](z[:20])
    names = {"figure2_samples", "figure4_discriminator", "reconstructions", "figure6_interpolations"}
    assert set(shown) == {f"{name}.png" for name in names | {"figure8_arithmetic"}}
    assert torch.equal(shown["figure2_samples.png"][0][0], nets["G"](z[:100]))
    originals, reconstructions = shown["reconstructions.png"][0]
    assert torch.equal(originals, x) and len(x) == 40
    torch.testing.assert_close(reconstructions, x.mean((2, 3), keepdim=True).expand_as(x) / 2)
    (grid,), options = shown["figure4_discriminator.png"]
    rows = grid.view(8, 10, 3, 16, 16)
    assert options.get("columns", 10) == 10
    for i in (0, 1):
        part = slice(10 * i, 10 * i + 10)
        expected = x_g[part], x_g[part] - 0.1, x[part], x[part] - 0.1
        assert all(torch.equal(row, images) for row, images in zip(rows[4 * i : 4 * i + 4], expected))
    (grid,), options = shown["figure6_interpolations.png"]
    for i, row in enumerate(grid.view(5, options["columns"], 3, 16, 16)):
        first, last = x[2 * i], x[2 * i + 1]
        assert torch.equal(row[0], first) and torch.equal(row[-1], last)
        ends = first.mean((1, 2)) / 2, last.mean((1, 2)) / 2
        for j, image in enumerate(row[1:-1]):
            torch.testing.assert_close(image[:, 0, 0], ends[0] + (ends[1] - ends[0]) * j / (len(row) - 3))
    (grid,), options = shown["figure8_arithmetic.png"]
    colours = to_float(data.train).mean((2, 3)) / 2
    for i, name in enumerate(("beard", "bald")):
        has = data.train_labels[:, attributes.index(name)]
        direction = colours[has].mean(0) - colours[~has].mean(0)
        texts = options["captions"][0][9 * i : 9 * i + 9]
        assert texts == [name, "-1.5", "-1", "-0.5", "+0", "+0.5", "+1", "+1.5", "+2"] and options["columns"] == 9
        for image, strength in zip(grid[9 * i : 9 * i + 9], np.arange(-2, 2.5, 0.5)):
            torch.testing.assert_close(image[:, 0, 0], z[i] + float(strength) * direction)
    vae_began.save_figures(nets, data, z, tmp_path, step=70, attributes=["beard"])
    assert {"samples_70.png", "reconstructions_70.png"} <= set(shown) and len(shown) == 7
    shown.clear()
    del nets["E"]
    vae_began.save_figures(nets, data, z, tmp_path, attributes=["beard"])
    assert set(shown) == {"figure2_samples.png", "figure4_discriminator.png"}


def test_the_most_balanced_attributes_are_chosen_and_wrong_ones_refused(capsys):
    labels = torch.tensor([[i < n for n in (3, 18, 10, 20, 0, 9, 14, 7)] for i in range(20)])
    data = Data(None, None, tuple("abcdefgh"), labels, None)
    assert vae_began.choose_attributes(None, data) == ["c", "f", "h", "g", "a"]
    assert vae_began.choose_attributes(["b", "a"], data) == ["b", "a"]
    for name in ("d", "e", "x"):
        with pytest.raises(SystemExit):
            vae_began.choose_attributes(["a", name], data)
        assert f"--attribute {name}" in capsys.readouterr().err
    assert vae_began.choose_attributes(None, Data(None, None, (), torch.zeros(10, 0).bool(), None)) == []


# ------------------------------------------------------------------------------------------------------ command line


def test_a_run_as_a_user_starts_it(photos, tmp_path):
    pictures = {f"samples_{step}": (10, 10, 1) for step in (2, 4, 5)}
    pictures |= {f"reconstructions_{step}": (5, 8, 2) for step in (2, 4, 5)}
    pictures |= {"figure2_samples": (10, 10, 1), "figure4_discriminator": (10, 8, 1)}
    pictures |= {"figure6_interpolations": (10, 5, 1), "reconstructions": (5, 8, 2)}
    arguments = ["--data", photos, *SMALL, "--steps", 5]
    out, results, header, _ = run_as_a_user("vae_began", *arguments, cwd=tmp_path, pictures=pictures)
    assert results["config"]["filters"] == 2 and out.startswith("vae-began on ") and "no Figure 8" in out
    assert results["config"]["gains"] == [1e-3, 1e-5, 1e-5] and results["inception_score"] is None
    for name in "heldout_l1 heldout_l1_of_mean_image convergence_measure balance sample_diversity".split():
        assert 0 < results[name] < 10 and f"{name:26}{results[name]:10.3f}" in out
    assert 0 < results["kl_nats"] < 10 and 0 < results["k"] < 1
    assert header == "L_gen L_dis L_enc L_n L_e L_d L_g L_v L_s k e balance convergence".split()


@pytest.mark.parametrize("model", ["began-lsm", "began"])
def test_the_other_models_write_what_they_can(model, photos, tmp_path, cli):
    run = tmp_path / model
    result = cli(vae_began, "--model", model, "--data", photos, *SMALL, "--steps", 2, "--out", run)
    assert result.status == 0 and "Figure 8" not in result.out, result
    results, names = json.loads((run / "results.json").read_text()), files(run)
    assert results["heldout_l1"] is results["kl_nats"] is None and results["config"]["model"] == model
    assert not any("reconstructions" in name or "figure6" in name for name in names)
    assert {"figure2_samples.png", "figure4_discriminator.png", "samples_2.png"} <= set(names)
    similarity = ["L_s"] if model == "began-lsm" else []
    assert log_of(run)[0] == ["step", "L_gen", "L_dis", "L_d", "L_g", *similarity, "k", "e", "balance", "convergence"]
    assert results["config"]["gains"] == ([1e-3, 1e-5, 1e-5] if similarity else [1e-3, 0, 0])


def test_figure_8_of_a_folder_with_attributes(photos, tmp_path, cli):
    folder, run = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(photos, folder)
    rows = [f"{i}.png,{i % 2},{int(i > 5)},0" for i in range(30)]
    (folder / "attributes.csv").write_text("\n".join(["file,odd,late,never", *rows]))
    small = ["--data", folder, *SMALL, "--steps", 2, "--out", run]
    assert_refused(cli(vae_began, *small, "--attribute", "odd", "never"), "--attribute never", "odd, late, never")
    assert not run.exists()
    assert cli(vae_began, *small).status == 0
    for more, down in ((["--attribute", "late"], 1), ([], 2)):
        assert cli(vae_began, "--eval", "--out", run, "--device", "cpu", *more).status == 0
        with Image.open(run / "figure8_arithmetic.png") as image:
            assert image.size == (9 * 68 + 4, down * 68 + 4)


def test_the_inception_score_of_a_run(photos, tmp_path, cli, monkeypatch):
    def download(*_, **options):
        assert options == {"check_hash": True, "weights_only": True}
        return torch.load(file, weights_only=True)

    torch.manual_seed(0)
    file, run = tmp_path / "inception.pth", tmp_path / "run"
    net = torchvision.models.inception_v3(weights=None, init_weights=False).eval()
    for parameter in net.parameters():  # so that the classes of two images differ
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
    with torch.no_grad():
        net.fc.bias -= net(F.interpolate(to_float(draw_faces(4, 16)[0]), (299, 299))).mean(0)
        net.fc.weight *= 30
        net.fc.bias *= 30
    torch.save(net.state_dict(), file)
    monkeypatch.setattr(torchvision.models.Inception_V3_Weights, "get_state_dict", download)
    small = ["--data", photos, *SMALL, "--steps", 1, "--inception-samples", 12]
    assert cli(vae_began, *small, "--out", run).status == 0
    results = json.loads((run / "results.json").read_text())
    nets = vae_began.build_networks("vae-began", 16, 2, 64, (0, 0, 0)).eval()
    nets.load_state_dict(load(run)["networks"])
    with torch.no_grad():
        images = nets["G"](torch.randn(12, 64, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
        p = net(F.interpolate(images, (299, 299), mode="bilinear")).softmax(1)
    assert results["inception_score"] == pytest.approx(vae_began.inception_score(p)[0], rel=1e-3)
    assert results["inception_score_of_real"] > 1.01 and results["inception_score"] > 1
    again = ["--eval", "--out", run, "--device", "cpu", "--inception-samples", 15, "--inception-weights", file]
    assert cli(vae_began, *again).status == 0
    assert json.loads((run / "results.json").read_text())["inception_score"] != results["inception_score"]


def test_without_inception_s_weights_everything_else_is_written(photos, tmp_path, cli, monkeypatch):
    def download(*_, **options):
        raise URLError("no route")

    monkeypatch.setattr(torchvision.models.Inception_V3_Weights, "get_state_dict", download)
    result = cli(vae_began, "--data", photos, *SMALL, "--steps", 1, "--inception-samples", 12, "--out", tmp_path / "a")
    (line,) = [line for line in result.out.splitlines() if "Inception" in line]
    assert result.status == 0 and "no route" in line and "--inception-weights" in line
    assert json.loads((tmp_path / "a" / "results.json").read_text())["inception_score"] is None


def test_the_settings_reach_the_training_step(photos, tmp_path, cli, monkeypatch):
    def spy(nets, optimizers, x, z_g, epsilon, **weights):
        rates = {name: (o.param_groups[0]["lr"], o.param_groups[0]["betas"]) for name, o in optimizers.items()}
        seen.append((x.shape, z_g.shape, epsilon.shape, weights, list(nets["controller"].gains), rates))
        return train_step(nets, optimizers, x, z_g, epsilon, **weights)

    seen, vectors, measured, train_step = [], [], [], vae_began.train_step
    monkeypatch.setattr(vae_began, "measure", lambda nets, data, z, weights, *_: measured.append(weights) or {})
    monkeypatch.setattr(vae_began, "train_step", spy)
    monkeypatch.setattr(vae_began, "save_figures", lambda nets, data, z, *args, **_: vectors.append(z))
    settings = "--alpha 3 --beta 4 --gamma 5 --eta 6 --gains 0.1 0.2 0.3 --lr 1e-3 --latent-dim 7".split()
    for i, more in enumerate((settings, [*settings, "--seed", 9], ["--latent-dim", 7])):
        cli(vae_began, "--data", photos, *SMALL, "--steps", 1, "--out", tmp_path / str(i), *more)
    losses = ("L_enc", "L_gen", "L_dis")
    first = {"alpha": 3, "beta": 4, "gamma": 5, "eta": 6}, [0.1, 0.2, 0.3], dict.fromkeys(losses, (1e-3, (0.9, 0.999)))
    third = {"alpha": 0.3, "beta": 0.1, "gamma": 0.1, "eta": 0.5}, [1e-3, 1e-5, 1e-5]
    third = *third, dict.fromkeys(losses, (5e-5, (0.9, 0.999)))
    assert seen == [((4, 3, 16, 16), (4, 7), (4, 7), *rest) for rest in (first, first, third)]
    assert measured == [first[0], first[0], third[0]]
    assert all(torch.equal(z, vectors[0]) for z in vectors) and len(vectors) == 6  # the same vectors whatever the seed


def test_the_defaults_are_the_paper_s():
    args, _ = vae_began.parse_args(["--out", "nowhere"])
    assert (args.steps, args.batch_size, args.image_size, args.latent_dim, args.filters) == (300_000, 16, 64, 64, 64)
    assert (args.lr, args.alpha, args.beta, args.gamma, args.eta) == (5e-5, 0.3, 0.1, 0.1, 0.5)
    assert args.model == "vae-began" and args.gains == [1e-3, 1e-5, 1e-5] and args.inception_samples == 0
    args, _ = vae_began.parse_args(["--out", "nowhere", "--data", "cifar10"])
    assert args.inception_samples == 50_000  # Table 1
    args, _ = vae_began.parse_args("--out nowhere --quick --data cifar10 --filters 8 --model began --beta 0.2".split())
    assert (args.filters, args.beta, args.gamma, args.inception_samples) == (8, 0.2, 5, 0)
    for model, beta, gains in (("began-lsm", 0.1, [1e-3, 1e-5, 1e-5]), ("began", 0, [1e-3, 0, 0])):
        args, _ = vae_began.parse_args(["--out", "nowhere", "--model", model, "--image-size", "128"])
        assert (args.beta, args.gains, args.filters) == (beta, gains, 128)


# -------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_a_step_never_waits_for_the_device():
    nets, images = vae_began.build_networks("vae-began", 16, 4, 5, (0.1, 0, 0)).cuda(), draw_faces(40, 16)[0].cuda()
    optimizers = vae_began.build_optimizers(nets, 2e-4)
    for _ in range(3):
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses = vae_began.train_step(nets, optimizers, *vae_began.draw_batch(images[:4], 5), **WEIGHTS)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(loss.isfinite() and loss.device.type == "cuda" for loss in losses.values())
