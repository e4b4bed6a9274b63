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
from common import Data, draw_faces, draw_images, load_data, to_float

SMALL = ["--filters" if argument == "--channels" else argument for argument in TINY]
MODELS = list(vae_began.MODELS)
WEIGHTS = {"alpha": 0.3, "beta": 0.2, "gamma": 0.7, "eta": 0.6}
GAINS = (0.05, 0.1, 0.2)


def random_batch(model):
    x, noise = torch.rand(6, 3, 16, 16).double() * 2 - 1, torch.randn(2, 6, 5).double()
    return x, noise[0, :3] if model == "vae-began" else noise[0], noise[1]


def tiny(model="vae-began", k=0.4):
    """Small networks in float64 with weights that let every gradient be seen, and a batch: 6 x, z_g, 6 epsilon.

    Of z_g there are 3 where the losses do not pair it with x.
    """
    torch.manual_seed(0)
    nets = vae_began.build_networks(model, 16, 2, 5, GAINS).double()
    for parameter in nets.parameters():
        nn.init.normal_(parameter, std=0.3)
    nets["controller"].k.fill_(k)
    return nets, *random_batch(model)


# ---------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("size", vae_began.IMAGE_SIZES)
def test_shapes_and_ranges(size):
    nets = vae_began.build_networks("vae-began", size, 2, 7, (0, 0, 0))
    x, z = torch.randn(3, 3, size, size), torch.randn(3, 7)
    x_prime, codes = nets["D"](x)
    assert nets["G"](z).shape == x_prime.shape == (3, 3, size, size) and codes.shape == (3, 7)
    assert nets["E"](x).shape == (3, 14) and nets["G"](1e6 * z).abs().max() > 1  # no output activation


def test_networks_of_the_models_and_what_there_is_not():
    for model, more in (("vae-began", {"E"}), ("began-lsm", set()), ("began", set())):
        nets = vae_began.build_networks(model, 16, 2, 5, (1, 2, 3))
        assert set(nets) == {"G", "D", "controller"} | more and nets["controller"].gains == (1, 2, 3)
    for model, size in (("vae", 16), ("vae-began", 48), ("began", 8)):
        with pytest.raises(ValueError, match="model vae:" if model == "vae" else f"image_size {size}"):
            vae_began.build_networks(model, size, 2, 5, (0, 0, 0))


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
        halving = i % 3 == 0 and i > 0  # a first one, two a block, and one that halves after each block but the last
        expected = elu(F.conv2d(expected, layer.weight, layer.bias, stride=2 if halving else 1, padding=1))
        seen.append(expected.shape[-1])
    blocks = len(sizes) // 3
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
    nets, x, *_ = tiny()
    x_prime, z = nets["D"](x)
    assert torch.equal(z, nets["D"].encoder(x)) and torch.equal(x_prime, nets["D"].decoder(z))


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


def test_controller_eq_12_keeps_k_in_its_range():
    errors = np.random.RandomState(0).randn(60)
    controller, ks = vae_began.Controller((0.3, 0.2, 0.1)).double(), []
    for e in errors:
        controller.update(torch.tensor(e))
        ks.append(controller.k.item())
    np.testing.assert_allclose(ks, controlled(errors, (0.3, 0.2, 0.1)), atol=1e-12)
    assert min(ks) == 0 and max(ks) == 1 and sum(0 < k < 1 for k in ks) > 30
    assert set(controller.state_dict()) == {"k", "e_1", "e_2"} and not list(controller.parameters())


def test_controller_sums_up_to_a_pid_of_the_error_its_sum_and_its_difference():
    errors = np.random.RandomState(1).rand(30) / 20
    controller, ks = vae_began.Controller(GAINS).double(), []
    assert controller.k == controller.e_1 == controller.e_2 == 0
    for e in errors:
        controller.update(torch.tensor(e))
        ks.append(controller.k.item())
    differences = np.diff(errors, prepend=0)
    np.testing.assert_allclose(ks, 0.05 * errors.cumsum() + 0.1 * errors + 0.2 * differences, atol=1e-12)


def overshoot_and_settling(gains, steps=6000):
    """The controller against a first-order plant with noise: y follows 1.6 k slowly, and is to be 0.8.

    How far y rises above 0.8, in shares of it, the step after which it stays within 5 percent of it, and all y.
    """
    controller, noise, y, ys = vae_began.Controller(gains), np.random.RandomState(0).randn(steps), 0.0, []
    for n in noise:
        y += 0.005 * (1.6 * controller.k.item() - y)
        controller.update(torch.tensor(0.8 - y + 0.01 * n))
        ys.append(y)
    return max(ys) / 0.8 - 1, np.flatnonzero(np.abs(np.array(ys) / 0.8 - 1) > 0.05)[-1] + 1, np.array(ys)


def test_simulation_the_proportional_gain_dampens_and_hastens_the_balance():
    integral, damped = (overshoot_and_settling(gains) for gains in ((3e-3, 0, 0), (3e-3, 0.5, 0)))
    assert integral[0] > 0.15 and damped[0] < 0.5 * integral[0] and damped[1] < 0.8 * integral[1] and integral[1] < 5500
    printed, began = (overshoot_and_settling(vae_began.MODELS[model]["gains"])[2] for model in ("vae-began", "began"))
    assert 0 < np.abs(printed - began).max() < 0.02  # the paper's gains are too small to be told from BEGAN's


# ------------------------------------------------------------------------------------------------------------ losses


def test_kl_loss_eq_3_is_the_integral_and_zero_at_the_prior():
    torch.manual_seed(0)
    mean, log_variance = torch.randn(2, 4, 5).double()
    m, s = mean.numpy()[..., None], np.exp(log_variance.numpy() / 2)[..., None]
    z = m + s * np.linspace(-12, 12, 4001)
    logs = -0.5 * ((z - m) / s) ** 2 - np.log(s), -0.5 * z**2  # of both densities, but for the same constant
    integral = (np.exp(logs[0]) / np.sqrt(2 * np.pi) * (logs[0] - logs[1]) * s * 24 / 4000).sum(-1)
    assert integral.min() > 0 and vae_began.kl_loss(mean, log_variance).item() == pytest.approx(integral.mean())
    zero = torch.zeros(4, 5).double().requires_grad_()
    loss = vae_began.kl_loss(zero, zero)
    assert loss == 0 and (torch.autograd.grad(loss, zero)[0] == 0).all()
    torch.autograd.gradcheck(vae_began.kl_loss, (mean.requires_grad_(), log_variance.requires_grad_()))


def test_reparameterise_eq_4():
    mean, log_variance, epsilon = torch.randn(3, 4, 5).double()
    expected = mean.numpy() + epsilon.numpy() * np.sqrt(np.exp(log_variance.numpy()))
    np.testing.assert_allclose(vae_began.reparameterise(mean, log_variance, epsilon).numpy(), expected)
    arguments = mean.requires_grad_(), log_variance.requires_grad_(), epsilon
    torch.autograd.gradcheck(vae_began.reparameterise, arguments)


@pytest.mark.parametrize("eta", [0.1, 0.5, 3.0])  # the error below 0, near it, and above it
def test_fake_loss_and_balance_eq_6_10_11(eta):
    L_d, L_g, L_v = (torch.tensor(value).double().requires_grad_() for value in (0.7, 0.2, 0.4))
    L_fake = vae_began.fake_loss(L_g, L_v, 0.3)
    assert L_fake.item() == pytest.approx(0.32)
    result = vae_began.balance(L_d, L_fake, eta)
    expected = {"eta_measured": 0.32 / 0.7, "e_t": eta * 0.7 - 0.32, "convergence": 0.7 + abs(eta * 0.7 - 0.32)}
    assert {name: value.item() for name, value in result.items()} == pytest.approx(expected)
    torch.autograd.gradcheck(lambda *a: tuple(vae_began.balance(*a, eta).values()), (L_d, L_g))
    torch.autograd.gradcheck(lambda *a: vae_began.fake_loss(*a, 0.3), (L_g, L_v))
    even = vae_began.balance(L_d, eta * L_d, eta)  # where the convergence measure is least
    assert even["e_t"] == 0 and even["convergence"] == L_d and even["eta_measured"].item() == pytest.approx(eta)


def losses_in_numpy(model, nets, weights, x, z_g, epsilon):
    """All losses, each image apart from the others through the networks."""

    def passed(net, inputs):
        with torch.no_grad():
            return np.concatenate([net(one[None]).numpy() for one in torch.as_tensor(inputs)])

    def l1(a, b):
        return np.abs(a - b).sum() / a.size

    G, D, k, beta = nets["G"], nets["D"], nets["controller"].k.item(), weights["beta"]
    x_g, reals = passed(G, z_g), x.numpy()
    encoded = {"d": passed(D.encoder, x), "g": passed(D.encoder, x_g)}
    losses = {"k": k, "L_d": l1(reals, passed(D.decoder, encoded["d"]))}
    fake = losses["L_g"] = l1(x_g, passed(D.decoder, encoded["g"]))
    if model == "vae-began":
        mean, log_variance = np.split(passed(nets["E"], x), 2, axis=1)
        x_v = passed(G, mean + epsilon.numpy() * np.exp(log_variance) ** 0.5)
        codes = passed(D.encoder, x_v)
        losses |= {"L_v": l1(x_v, passed(D.decoder, codes)), "L_e": l1(x_v, reals), "L_s": l1(codes, encoded["d"])}
        losses["L_n"] = (0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance)).mean()
        fake += weights["alpha"] * losses["L_v"]
        guide = beta * losses["L_s"] + weights["gamma"] * losses["L_e"]
        losses |= {"L_enc": losses["L_n"] + guide}
    else:
        losses["L_s"] = l1(encoded["g"], encoded["d"])
        guide = beta * losses["L_s"]
    e_t = weights["eta"] * losses["L_d"] - fake
    losses |= {"L_gen": fake + guide, "L_dis": losses["L_d"] - k * fake, "e_t": e_t}
    return losses | {"eta_measured": fake / losses["L_d"], "convergence": losses["L_d"] + abs(e_t)}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("eta", [0.1, 5.0])  # the error below 0, and above it
def test_losses_against_numpy_and_gradcheck(model, eta):
    nets, *batch = tiny(model)
    weights = WEIGHTS | {"eta": eta}
    losses = vae_began.LOSSES[model](nets, weights, *batch)
    expected = losses_in_numpy(model, nets, weights, *batch)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected)
    assert (expected["e_t"] > 0) == (eta > 1)
    inputs = [tensor.requires_grad_() for tensor in batch]
    nets.requires_grad_(False)
    names = [name for name in losses if name != "k"]
    function = vae_began.LOSSES[model]
    torch.autograd.gradcheck(lambda *a: tuple(map(function(nets, weights, *a).get, names)), inputs, fast_mode=True)


@pytest.mark.parametrize("model", MODELS)
def test_which_networks_a_loss_reaches(model):
    nets, *batch = tiny(model)
    losses = vae_began.LOSSES[model](nets, WEIGHTS, *batch)
    reached = {"L_d": {"D"}, "L_g": {"G", "D"}, "L_s": {"G", "D"}}
    if "E" in nets:
        reached |= {"L_n": {"E"}, "L_e": {"E", "G"}, "L_v": {"E", "G", "D"}, "L_s": {"E", "G", "D"}}
    for name, expected in reached.items():
        parameters = {key: list(nets[key].parameters()) for key in nets if key != "controller"}
        found = {key: torch.autograd.grad(losses[name], p, retain_graph=True, allow_unused=True)
                 for key, p in parameters.items()}  # fmt: skip
        assert {key for key, gs in found.items() if any(g is not None and g.abs().max() > 0 for g in gs)} == expected


def test_perfect_autoencoders_have_losses_of_zero():
    nets, x, z_g, epsilon = stand_ins(), torch.rand(6, 3, 2, 2) * 2 - 1, torch.randn(3, 12), torch.randn(6, 12)
    nets["E"].forward = lambda x: torch.cat([x.flatten(1), torch.full((len(x), 12), -300.0)], 1)  # a deviation of 0
    nets["G"].forward = lambda z: z.view(-1, 3, 2, 2)
    nets["D"].forward = lambda x: (x, x.flatten(1))
    losses = vae_began.vae_began_losses(nets, WEIGHTS, x, z_g, epsilon)
    assert all(losses[name] == 0 for name in ("L_e", "L_s", "L_d", "L_g", "L_v", "L_gen", "L_dis", "convergence"))
    losses = vae_began.began_losses(nets, WEIGHTS, x, x.flatten(1), epsilon)
    assert all(losses[name] == 0 for name in ("L_s", "L_d", "L_g", "L_gen", "L_dis", "convergence"))


# ---------------------------------------------------------------------------------------------------------- training


def gradients_by_hand(model, nets, k, x, z_g, epsilon):
    """{network: (parameters, gradients)} of Eq. 13 to 15, with passes of their own, and L_d and the loss of the fakes."""

    def l1(a, b):
        return (a - b).abs().mean()

    def score(images):
        return l1(images, D.decoder(D.encoder(images)))

    G, D, beta = nets["G"], nets["D"], {"began": 0}.get(model, 0.2)
    x_g = G(z_g)
    if model == "vae-began":
        mean, log_variance = nets["E"](x).split(5, 1)
        x_v = G(mean + epsilon * log_variance.exp().sqrt())
        fake, theirs = score(x_g) + 0.3 * score(x_v), score(x_g.detach()) + 0.3 * score(x_v.detach())
        guide = beta * l1(D.encoder(x_v), D.encoder(x)) + 0.7 * l1(x_v, x)
        kl = (mean**2 + log_variance.exp() - log_variance - 1).mean() / 2
    else:
        fake, theirs, guide = score(x_g), score(x_g.detach()), beta * l1(D.encoder(x_g), D.encoder(x))
    objectives = {"G": fake + guide, "D": score(x) - k * theirs} | ({"E": kl + guide} if "E" in nets else {})
    result = {}
    for name, objective in objectives.items():
        parameters = list(nets[name].parameters())
        result[name] = parameters, torch.autograd.grad(objective, parameters, retain_graph=True)
    return result, score(x).item(), fake.item()


@pytest.mark.parametrize("model", MODELS)
def test_train_step_against_autograd_by_hand(model):
    nets, *_ = tiny(model)
    optimizer, other, k, ks, errors, moments = vae_began.build_optimizer(nets, 1e-2), copy.deepcopy(nets), 0.4, [], [], {}
    weights = WEIGHTS | ({"beta": 0} if model == "began" else {})
    for i in range(3):
        torch.manual_seed(10 + i)
        batch = random_batch(model)
        expected = losses_in_numpy(model, nets, weights, *batch)
        losses = vae_began.train_step(nets, optimizer, model, weights, *batch)
        assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected)
        assert losses["k"].item() == pytest.approx(k) and not any(loss.requires_grad for loss in losses.values())
        updates, L_d, fake = gradients_by_hand(model, other, k, *batch)
        for name, (parameters, gradients) in updates.items():
            zeros = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
            adam_by_hand(parameters, gradients, 1e-2, moments.setdefault(name, [0, *zeros]), beta=0.9)
        ks.append(k)
        errors.append(0.6 * L_d - fake)
        k = controlled(errors, GAINS, 0.4)[-1]
        assert nets["controller"].k.item() == pytest.approx(k)
    assert all(0.05 < k < 0.95 for k in ks) and np.abs(np.diff(ks)).min() > 0.02, ks
    for name, parameter in nets.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("model", MODELS)
def test_train_step_never_reads_a_tensor_back(model, monkeypatch):
    nets, images = vae_began.build_networks(model, 16, 2, 5, GAINS), draw_faces(8, 16)[0]
    optimizer = vae_began.build_optimizer(nets, 2e-4)
    refuse_reading_back(monkeypatch)
    vae_began.train_step(nets, optimizer, model, WEIGHTS, *vae_began.draw_batch(images[:4], 5))


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
    optimizer = vae_began.build_optimizer(nets, vae_began.QUICK["lr"])
    for _ in range(150):
        images = draw_images(data.train, 16, data.train.device)
        vae_began.train_step(nets, optimizer, "vae-began", quick, *vae_began.draw_batch(images, 64))
    results = vae_began.measure(nets, data, torch.randn(60, 64), "vae-began", quick)
    assert results["kl_nats"] > 3 and results["heldout_l1"] < 0.9 * results["heldout_l1_of_mean_image"]


# -------------------------------------------------------------------------------------------------------- evaluation


def score_in_numpy(p, splits=10):
    """The mean and the deviation of exp(H(mean p) - mean H(p)) over the splits."""

    def entropy(p):
        return -(p * np.log(np.maximum(p, 1e-300))).sum(-1)

    scores = [np.exp(entropy(part.mean(0)) - entropy(part).mean()) for part in np.array_split(np.asarray(p), splits)]
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize("options", [{}, {"splits": 3}])
def test_inception_score_of_known_and_of_random_probabilities(options):
    assert vae_began.inception_score(torch.full((40, 8), 1 / 8)) == pytest.approx((1, 0), abs=1e-6)
    certain = torch.eye(8).repeat(10, 1)  # every split of ten has each class once
    assert vae_began.inception_score(certain) == pytest.approx((8, 0), abs=1e-5)
    assert vae_began.inception_score(torch.eye(8)[:1].expand(40, -1)) == pytest.approx((1, 0), abs=1e-6)
    p = torch.randn(67, 7).double().softmax(1)
    assert vae_began.inception_score(p, **options) == pytest.approx(score_in_numpy(p, **options))


def test_inception_is_torchvision_s_in_evaluation_mode_with_images_of_299_pixels(monkeypatch):
    def inception_v3(weights, transform_input):
        assert (weights, transform_input) == ("IMAGENET1K_V1", False)  # Google's own range is [-1, 1]
        return copy.deepcopy(net).train()

    torch.manual_seed(0)
    net, x = torchvision.models.inception_v3(weights=None, init_weights=False, transform_input=False), torch.randn(2, 3, 16, 16)
    monkeypatch.setattr(torchvision.models, "inception_v3", inception_v3)
    classifier, seen = vae_began.load_classifier("inception", 16), []
    net.eval().avgpool.register_forward_hook(lambda layer, inputs, output: seen.append(output.flatten(1)))
    with torch.no_grad():
        (logits, features), expected = classifier(x), net(F.interpolate(x, (299, 299), mode="bilinear"))
    torch.testing.assert_close((logits, features), (expected, seen[0]))
    assert logits.shape == (2, 1000) and features.shape == (2, 2048)


class Classifier(nn.Module):
    """Logits of the four corners' colours and four features; half of them are dropped where it is not in eval mode."""

    def forward(self, x):
        corners = 5 * F.dropout(x[:, :, ::15, ::15].flatten(1), 0.5, self.training)
        return corners, corners[:, :4]


class OneFeature(Classifier):
    def forward(self, x):
        return x.flatten(1), x.mean((1, 2, 3))


def test_load_classifier_reads_a_file_and_refuses_another(tmp_path):
    assert vae_began.load_classifier("none", 16) is None
    torch.jit.script(Classifier().train()).save(tmp_path / "good.pt")
    torch.jit.script(OneFeature()).save(tmp_path / "bad.pt")
    x = torch.randn(3, 3, 16, 16)
    logits, features = vae_began.load_classifier(tmp_path / "good.pt", 16)(x)
    assert torch.equal(logits, 5 * x[:, :, [0, 0, 15, 15], [0, 15, 0, 15]].flatten(1)) and features.shape == (3, 4)
    with pytest.raises(ValueError, match="16, 16"):
        vae_began.load_classifier(tmp_path / "bad.pt", 16)


def distance(images):
    images = np.asarray(images).reshape(len(images), -1)
    return np.mean([np.linalg.norm(a - b) for i, a in enumerate(images) for b in images[:i]])


@pytest.mark.parametrize("model", MODELS)
def test_measure_against_numpy(model):
    nets, *_ = tiny(model)
    nets, G, z = nets.float(), nets["G"], torch.randn(80, 5)
    images = torch.randint(256, (1400, 3, 16, 16), dtype=torch.uint8)
    data = Data(images[:1100] // 2, images[1100:], (), None, None)
    results = vae_began.measure(nets, data, z, model, WEIGHTS, Classifier().eval(), 130)
    x, train = (part.numpy() / 127.5 - 1 for part in (data.heldout, data.train))
    noise, few = torch.randn(130, 5, generator=torch.Generator().manual_seed(1)), z[:64]
    losses = losses_in_numpy(model, nets, WEIGHTS, torch.from_numpy(x[:64]).float(), few, few.flip(1))
    expected = {name: losses[name] for name in ("k", "eta_measured")} | {"convergence_measure": losses["convergence"]}
    expected |= {"heldout_l1_of_mean_image": np.abs(x - train.mean(0)).mean(), "heldout_l1": None, "kl_nats": None}
    with torch.no_grad():
        expected["sample_diversity"] = distance(G(z)) / distance(x[:80])
        p = Classifier().eval()(G(noise).clamp(-1, 1))[0].softmax(1)
        expected["inception_score"], expected["inception_score_std"] = score_in_numpy(p)
        p = Classifier().eval()(torch.from_numpy(train[:130]))[0].softmax(1)
        expected["inception_score_of_real"] = score_in_numpy(p)[0]
        if model == "vae-began":
            mean, log_variance = nets["E"](torch.from_numpy(x).float()).split(5, 1)
            expected["heldout_l1"] = np.abs(G(mean).numpy() - x).mean()
            expected["kl_nats"] = (0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)).sum(1).mean().item()
    assert set(results) == set(expected)
    for name, value in expected.items():
        assert results[name] == (value if value is None else pytest.approx(value, rel=1e-4)), name
    without = vae_began.measure(nets, data, z, model, WEIGHTS)
    assert without == results | dict.fromkeys(name for name in results if "inception" in name)


def stand_ins():
    """Networks none of which is linear: E's and G's of three colours, D's cube of an image."""
    nets = nn.ModuleDict({name: nn.Module() for name in "GED"} | {"controller": vae_began.Controller(GAINS)})
    nets["E"].forward = lambda x: torch.cat([torch.exp(x.mean((2, 3))), x.new_ones(len(x), 3)], 1)
    nets["G"].forward = lambda z: torch.sin(2 * z[:, :3, None, None]).expand(-1, -1, 16, 16)
    nets["D"].forward = lambda x: (x**3 - 0.1, x.mean((2, 3)))
    return nets


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """figures(heldout, **options): what save_figures shows, {name: (batches, columns, captions)}, and its data and z."""

    def save_grid(path, *batches, columns=10, captions=()):
        assert path.parent == tmp_path
        shown[path.name] = batches, columns, captions

    def run(heldout, without=(), **options):
        shown.clear()
        images, attributes, labels = draw_faces(60 + heldout, 16)
        data = Data(images[:60], images[60:], attributes, labels[:60], labels[60:])
        nets, z = stand_ins(), torch.randn(256, 3)
        for name in without:
            del nets[name]
        vae_began.save_figures(nets, data, z, tmp_path, 70, **options)
        return dict(shown), data, z

    shown = {}
    monkeypatch.setattr(vae_began, "save_grid", save_grid)
    return run


def decoded(z):
    """What the stand-in G makes of latents, by NumPy."""
    return np.broadcast_to(np.sin(2 * np.asarray(z))[..., None, None], (*z.shape, 16, 16))


def encoded(images):
    """What the stand-in E makes of images, by NumPy."""
    return np.exp(np.asarray(images, dtype=np.float32).mean((-2, -1)))


def close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-5)
    return True


@pytest.mark.parametrize("heldout, count", [(3, 3), (13, 13), (45, 40)])
def test_samples_reconstructions_and_figure_4_show_what_they_say(figures, heldout, count):
    shown, data, z = figures(heldout)
    x = to_float(data.heldout)[:count]
    (samples,), columns, _ = shown["samples_70.png"]
    assert close(samples, decoded(z[:100])) and columns == 10
    (originals, reconstructions), columns, _ = shown["reconstructions_70.png"]
    assert torch.equal(originals, x) and close(reconstructions, decoded(encoded(x))) and columns == 5
    (grid,), columns, _ = shown["figure4_discriminator.png"]
    blocks = {3: [range(3)], 13: [range(10)], 45: [range(10), range(10, 20)]}[heldout]
    expected = []
    for block in blocks:
        x_g, reals = decoded(z[list(block)]), x[list(block)].numpy()
        expected += [x_g, x_g**3 - 0.1, reals, reals**3 - 0.1]
    assert close(grid, np.concatenate(expected)) and columns == len(blocks[0])


@pytest.mark.parametrize("heldout, rows", [(3, 1), (9, 4), (45, 5)])
def test_figure_6_goes_straight_from_code_to_code(figures, heldout, rows):
    shown, data, _ = figures(heldout)
    (grid,), columns, _ = shown["figure6_interpolations.png"]
    assert len(grid) == rows * columns and columns == 10
    x = to_float(data.heldout)
    for i, row in enumerate(grid.view(rows, columns, 3, 16, 16)):
        first, last = x[2 * i], x[2 * i + 1]
        assert torch.equal(row[0], first) and torch.equal(row[-1], last)
        shares = np.linspace(0, 1, 8)[:, None]
        close(row[1:-1], decoded(encoded(first) * (1 - shares) + encoded(last) * shares))


def test_figure_8_adds_the_directions_of_training_images(figures):
    shown, data, z = figures(45, attributes=["beard", "bald"])
    (grid,), columns, (texts,) = shown["figure8_arithmetic.png"]
    assert len(grid) == len(texts) == 18 and columns == 9
    codes = encoded(to_float(data.train))
    for i, name in enumerate(("beard", "bald")):
        has = data.train_labels[:, data.attributes.index(name)].numpy()
        direction = codes[has].mean(0) - codes[~has].mean(0)
        assert texts[9 * i : 9 * i + 9] == [name, "-1.5", "-1", "-0.5", "+0", "+0.5", "+1", "+1.5", "+2"]
        close(grid[9 * i : 9 * i + 9], decoded(z[i].numpy() + np.arange(-2, 2.5, 0.5)[:, None] * direction))


def test_which_figures_there_are(figures):
    first, more = {"samples_70.png", "reconstructions_70.png"}, {"figure4_discriminator.png", "figure6_interpolations.png"}
    assert set(figures(5, last=False, attributes=["bald"])[0]) == first
    assert set(figures(5)[0]) == first | more
    assert set(figures(5, attributes=["bald"])[0]) == first | more | {"figure8_arithmetic.png"}
    assert set(figures(5, without="E")[0]) == {"samples_70.png", "figure4_discriminator.png"}
    assert set(figures(5, without="E", last=False)[0]) == {"samples_70.png"}


def test_the_most_balanced_attributes_are_chosen_and_wrong_ones_refused():
    labels = torch.tensor([[i < n for n in (3, 18, 10, 20, 0, 9, 14, 7)] for i in range(20)])
    data = Data(None, None, tuple("abcdefgh"), labels, ~labels[:, [3] * 8])
    assert vae_began.choose_attributes(None, data) == ["c", "f", "h", "g", "a"]
    assert vae_began.choose_attributes(["b", "a"], data) == ["b", "a"]
    for name in ("d", "e", "x"):
        with pytest.raises(ValueError, match=f"without {name}; there are a, b, c, d"):
            vae_began.choose_attributes(["a", name], data)
    assert vae_began.choose_attributes(None, Data(None, None, (), torch.zeros(10, 0).bool(), None)) == []


# ------------------------------------------------------------------------------------------------------ command line


def test_a_run_as_a_user_starts_it(photos, tmp_path):
    pictures = {f"samples_{step}": (10, 10, 1) for step in (2, 4, 5)}
    pictures |= {f"reconstructions_{step}": (3, 1, 2) for step in (2, 4, 5)}
    pictures |= {"figure4_discriminator": (3, 4, 1), "figure6_interpolations": (10, 1, 1)}
    arguments = ["--data", photos, *SMALL, "--steps", 5]
    out, results, header, _ = run_as_a_user("vae_began", *arguments, cwd=tmp_path, pictures=pictures)
    assert results["config"]["filters"] == 2 and out.startswith("vae-began on ")
    assert results["config"]["gains"] == [1e-3, 1e-5, 1e-5] and results["inception_score"] is None
    for name in "heldout_l1 heldout_l1_of_mean_image convergence_measure eta_measured sample_diversity".split():
        assert 0 < results[name] < 10 and f"{name:26}{results[name]:10.3f}" in out
    assert 0 < results["kl_nats"] < 10 and 0 < results["k"] < 1
    assert header == "L_enc L_gen L_dis L_e L_n L_s L_d L_g L_v k eta_measured e_t convergence".split()


@pytest.mark.parametrize("model", ["began-lsm", "began"])
def test_the_other_models_write_what_they_can(model, photos, tmp_path, cli):
    run = tmp_path / model
    result = cli(vae_began, "--model", model, "--data", photos, *SMALL, "--steps", 1, "--out", run)
    assert result.status == 0, result
    results, pictures = json.loads((run / "results.json").read_text()), [f for f in files(run) if f.endswith("png")]
    assert results["heldout_l1"] is results["kl_nats"] is None and results["config"]["model"] == model
    assert pictures == ["figure4_discriminator.png", "samples_1.png"]
    assert log_of(run)[0] == "step L_gen L_dis L_s L_d L_g k eta_measured e_t convergence".split()
    assert results["config"]["gains"] == ([1e-3, 1e-5, 1e-5] if model == "began-lsm" else [1e-3, 0, 0])
    again = cli(vae_began, "--resume", "--out", run, "--device", "cpu", "--attribute", "odd")
    assert_refused(again, "--attribute", "encoder", "vae-began")


def test_figure_8_of_a_folder_with_attributes(photos, tmp_path, cli):
    folder, run = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(photos, folder)
    rows = [f"{i}.png,{i % 2},{int(i > 5)},0" for i in range(30)]
    (folder / "attributes.csv").write_text("
".join(["file,odd,late,never", *rows]))
    small = ["--data", folder, *SMALL, "--steps", 1, "--out", run]
    assert_refused(cli(vae_began, *small, "--attribute", "odd", "never"), "--attribute", "never", "odd, late, never")
    assert not run.exists()
    for arguments, down in ((small, 2), (["--resume", "--out", run, "--device", "cpu", "--attribute", "late"], 1)):
        assert cli(vae_began, *arguments).status == 0
        with Image.open(run / "figure8_arithmetic.png") as image:
            assert image.size == (9 * 68 + 4, down * 68 + 4)


def test_the_inception_score_of_a_run_by_a_classifier_of_a_file(photos, tmp_path, cli):
    run, train = tmp_path / "run", to_float(load_data(str(photos), 16).train)
    torch.jit.script(Classifier()).save(tmp_path / "classifier.pt")
    torch.jit.script(OneFeature()).save(tmp_path / "bad.pt")
    small = ["--data", photos, *SMALL, "--steps", 1, "--out", run]
    assert_refused(cli(vae_began, *small, "--classifier", tmp_path / "bad.pt"), "--classifier", "bad.pt", "logits")
    again = ["--resume", "--out", run, "--device", "cpu"]
    for arguments, more, count in ((small, ["--samples", 12], 12), (again, ["--samples", 500], 27)):  # 27 to train on
        assert cli(vae_began, *arguments, *more, "--classifier", tmp_path / "classifier.pt").status == 0
        results = json.loads((run / "results.json").read_text())
        nets = vae_began.build_networks("vae-began", 16, 2, 64, (0, 0, 0))
        nets.load_state_dict(load(run)["networks"])
        with torch.no_grad():
            images = nets["G"](torch.randn(count, 64, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
        p_g, p_x = (Classifier().eval()(x)[0].softmax(1) for x in (images, train[:count]))
        scores = results["inception_score"], results["inception_score_std"]
        assert scores == pytest.approx(score_in_numpy(p_g), rel=1e-4)
        assert results["inception_score_of_real"] == pytest.approx(score_in_numpy(p_x)[0], rel=1e-4)


def test_without_inception_s_weights_a_run_ends_before_training(photos, tmp_path, cli, monkeypatch):
    def download(*_, **options):
        raise URLError("no route\nsecond line")

    monkeypatch.setattr(torchvision.models.Inception_V3_Weights, "get_state_dict", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/where/hub")
    monkeypatch.setattr(vae_began, "train_step", None)
    result = cli(vae_began, "--data", photos, *SMALL, "--classifier", "inception", "--out", tmp_path / "run")
    assert_refused(result, "inception_v3_google-0cc3c7bd.pth", "/where/hub/checkpoints", "no route")
    assert result.out == "" and not (tmp_path / "run").exists()


def test_the_settings_reach_the_training_step_the_figures_and_the_measure(photos, tmp_path, cli, monkeypatch):
    def step(nets, optimizer, model, weights, x, z_g, epsilon):
        (group,) = optimizer.param_groups
        assert len(group["params"]) == len(list(nets.parameters()))
        rate = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        seen.append((x.shape, z_g.shape, epsilon.shape, model, weights_of(weights), nets["controller"].gains, *rate))
        return train_step(nets, optimizer, model, weights, x, z_g, epsilon)

    def weights_of(weights):
        return [weights[name] for name in ("alpha", "beta", "gamma", "eta")]

    def measure(nets, data, z, model, weights, classifier, samples):
        measured.append((len(data.train), len(z), model, weights_of(weights), classifier, samples))
        return {}

    def save_figures(nets, data, z, out, step, *attributes, **last):
        shown.append((len(data.heldout), step, attributes, last))
        vectors.append(z)

    seen, shown, vectors, measured, train_step = [], [], [], [], vae_began.train_step
    for name, function in (("measure", measure), ("train_step", step), ("save_figures", save_figures)):
        monkeypatch.setattr(vae_began, name, function)
    settings = "--alpha 3 --beta 4 --gamma 5 --eta 6 --gains 0.1 0.2 0.3 --lr 1e-3 --latent-dim 7 --samples 20".split()
    runs = [settings, [*settings, "--seed", 9], ["--latent-dim", 7], ["--model", "began", "--latent-dim", 7]]
    for i, more in enumerate(runs):
        assert cli(vae_began, "--data", photos, *SMALL, "--steps", 1, "--out", tmp_path / str(i), *more).status == 0
    given = "vae-began", [3, 4, 5, 6], [0.1, 0.2, 0.3], 1e-3
    default = "vae-began", [0.3, 0.1, 0.1, 0.5], [1e-3, 1e-5, 1e-5], 5e-5
    began = "began", [0.3, 0.0, 0.1, 0.5], [1e-3, 0, 0], 5e-5
    expected = given, given, default, began
    assert seen == [((4, 3, 16, 16), (4, 7), (4, 7), *each, (0.9, 0.999), 1e-8, 0) for each in expected]
    counts = 20, 20, 50_000, 50_000
    assert measured == [(27, 256, *each[:2], None, count) for each, count in zip(expected, counts)]
    assert shown == [(3, 1, (), {"last": False}), (3, 1, ([],), {})] * 4
    assert all(torch.equal(z, vectors[0]) for z in vectors)  # the same latents whatever the seed


def test_the_defaults_are_the_paper_s():
    args, _ = vae_began.parse_args(["--out", "nowhere"])
    assert (args.steps, args.batch_size, args.image_size, args.latent_dim, args.filters) == (300_000, 16, 64, 64, 64)
    assert (args.lr, args.alpha, args.beta, args.gamma, args.eta) == (5e-5, 0.3, 0.1, 0.1, 0.5)
    assert args.model == "vae-began" and args.gains == [1e-3, 1e-5, 1e-5] and args.attribute is None
    assert args.classifier == "none" and args.samples == 50_000
    args, _ = vae_began.parse_args("--out nowhere --quick --filters 8 --model began --beta 0.2".split())
    assert (args.filters, args.beta, args.gamma) == (8, 0.2, 5)
    for model, beta, gains in (("began-lsm", 0.1, [1e-3, 1e-5, 1e-5]), ("began", 0, [1e-3, 0, 0])):
        args, _ = vae_began.parse_args(["--out", "nowhere", "--model", model, "--image-size", "128"])
        assert (args.beta, args.gains, args.filters) == (beta, gains, 128)


# -------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("model", MODELS)
def test_on_cuda_a_step_never_waits_for_the_device(model):
    nets, images = vae_began.build_networks(model, 16, 4, 5, GAINS).cuda(), draw_faces(40, 16)[0].cuda()
    optimizer = vae_began.build_optimizer(nets, 2e-4)
    for _ in range(3):
        batch = vae_began.draw_batch(images[:4], 5)
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses = vae_began.train_step(nets, optimizer, model, WEIGHTS, *batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(loss.isfinite() and loss.device.type == "cuda" for loss in losses.values())
