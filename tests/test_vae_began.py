import copy
import json
import math
import shutil

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, adam_by_hand, assert_refused, files, load, log_of, run_as_a_user
from PIL import Image
from torch import nn

import vae_began
from common import Data, draw_faces, load_data, to_float

SMALL = ["--filters" if argument == "--channels" else argument for argument in TINY]
MODELS = list(vae_began.MODELS)
WEIGHTS = {"alpha": 0.3, "beta": 0.2, "gamma": 0.7, "eta": 0.9}
GAINS = (0.05, 0.1, 0.2)
MEASURES = "l1_of_d_on_real l1_of_d_on_samples k sample_diversity eta_measured convergence_measure".split()


def tiny(model="vae-began"):
    """Small networks in float64 with weights that let every gradient be seen, and k = 0.4."""
    torch.manual_seed(0)
    nets = vae_began.build_networks(model, 16, 2, 5, GAINS).double()
    for parameter in nets.parameters():
        nn.init.normal_(parameter, std=0.3)
    nets["controller"].k.fill_(0.4)
    return nets


def random_batch(model, seed=0):
    """Six x, z_g and epsilon; of z_g three where the losses do not pair it with x."""
    torch.manual_seed(seed)
    x, noise = torch.rand(6, 3, 16, 16).double() * 2 - 1, torch.randn(2, 6, 5).double()
    return x, noise[0, :3] if model == "vae-began" else noise[0], noise[1]


@torch.no_grad()
def in_numpy(net, inputs):
    """A network of NumPy's arrays, an image or latent at a time."""
    return np.concatenate([net(one[None]).numpy() for one in torch.from_numpy(inputs)])


def losses_by_hand(model, nets, weights, k, x, z_g, epsilon, call=lambda net, inputs: net(inputs)):
    """All losses, the images and latents apart from each other; of torch's tensors, or with in_numpy of arrays."""

    def l1(a, b):
        return abs(a - b).mean()

    def score(images):
        return l1(images, call(D.decoder, call(D.encoder, images)))

    G, D, losses = nets["G"], nets["D"], {"k": k}
    x_g = x_s = call(G, z_g)
    losses |= {"L_d": score(x), "L_g": score(x_g)}
    fake, guide = losses["L_g"], 0
    if model == "vae-began":
        codes = call(nets["E"], x)
        mean, variance = codes[:, :5], np.e ** codes[:, 5:]
        x_s = x_v = call(G, mean + epsilon * variance**0.5)
        losses |= {"L_v": score(x_v), "L_e": l1(x_v, x), "L_n": (mean**2 + variance - 1 - codes[:, 5:]).mean() / 2}
        fake, guide = fake + weights["alpha"] * losses["L_v"], weights["gamma"] * losses["L_e"]
    losses["L_s"] = l1(call(D.encoder, x_s), call(D.encoder, x))
    guide = guide + weights["beta"] * losses["L_s"]
    losses |= {"L_enc": losses["L_n"] + guide} if model == "vae-began" else {}
    losses |= {"L_gen": fake + guide, "L_dis": losses["L_d"] - k * fake, "e_t": weights["eta"] * losses["L_d"] - fake}
    return losses | {"eta_measured": fake / losses["L_d"], "convergence": losses["L_d"] + abs(losses["e_t"])}


def test_networks_of_the_models_and_other_models_and_sizes_refused():
    for model in MODELS:
        nets = vae_began.build_networks(model, 64, 64, 64, (0, 0, 0))
        assert set(nets) == {"G", "D", "controller"} | ({"E"} if model == "vae-began" else set())
    sizes = [sum(p.numel() for p in net.parameters()) for net in (nets["D"].encoder, nets["D"].decoder)]
    assert [round(size / 1e6, 2) for size in sizes] == [3.45, 0.56]  # as the docstring says
    for model, size in (("vae-began", 48), ("began", 8), ("vae", 16)):
        with pytest.raises(ValueError, match=f"{model}, size {size}"):
            vae_began.build_networks(model, size, 2, 5, (0, 0, 0))


@pytest.mark.parametrize("blocks", [2, 3, 4, 5])
def test_networks_layer_by_layer(blocks):
    torch.manual_seed(0)
    size, widths = 4 * 2**blocks, [2, 2, 2, 2, 4, 4, 4, 6, 6, 6, 8, 8, 8, 10, 10][: 3 * blocks]
    nets = vae_began.build_networks("vae-began", size, 2, 5, GAINS).double()
    x, z = torch.randn(2, 3, size, size).double(), torch.randn(3, 5).double()
    for net in (nets["E"], nets["D"].encoder):
        *convs, dense = [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        assert [layer.out_channels for layer in convs] == widths
        h = x
        for i, layer in enumerate(convs):  # a first one, two a block, one that halves after each block but the last
            h = F.elu(F.conv2d(h, layer.weight, layer.bias, 2 if i % 3 == 0 and i > 0 else 1, padding=1))
        assert h.shape == (2, 2 * blocks, 8, 8) and dense.out_features == (10 if net is nets["E"] else 5)
        torch.testing.assert_close(net(x), F.linear(h.flatten(1), dense.weight, dense.bias))
    for net in (nets["G"], nets["D"].decoder):
        dense, *convs, last = [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        h = F.linear(z, dense.weight, dense.bias).view(3, 2, 8, 8)
        for i, layer in enumerate(convs):
            if i % 2 == 0 and i > 0:
                h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)  # to the nearest neighbour
            h = F.elu(F.conv2d(h, layer.weight, layer.bias, padding=1))
        assert h.shape == (3, 2, size, size) and len(convs) == 2 * blocks
        torch.testing.assert_close(net(z), F.conv2d(h, last.weight, last.bias, padding=1))
    assert all(layer.bias is not None for layer in nets.modules() if isinstance(layer, nn.Conv2d | nn.Linear))
    x_prime, codes = nets["D"](x)  # Eq. 8
    assert torch.equal(codes, nets["D"].encoder(x)) and torch.equal(x_prime, nets["D"].decoder(codes))


def controlled(errors, k=0.0):
    """k after each of the errors, by Eq. 12 with GAINS, in NumPy."""
    ks, (l1, l2, l3) = [], GAINS
    for e_2, e_1, e in zip([0, 0, *errors], [0, *errors], errors):
        k = min(1, max(0, k + l1 * e + l2 * (e - e_1) + l3 * (e + e_2 - 2 * e_1)))
        ks.append(k)
    return ks


@pytest.mark.parametrize("low, high", [(0, 0.05), (-0.9, 1.1)])
def test_controller_eq_12_and_its_sum_a_pid_controller_while_k_is_in_its_range(low, high):
    errors = np.random.RandomState(0).uniform(low, high, 60)
    controller, ks = vae_began.Controller(GAINS).double(), []
    assert all(buffer == 0 for buffer in controller.buffers())
    for e in errors:
        controller.update(torch.tensor(e))
        ks.append(controller.k.item())
    np.testing.assert_allclose(ks, controlled(errors), atol=1e-12)
    if low < 0:
        assert min(ks) == 0 and max(ks) == 1 and sum(0 < k < 1 for k in ks) > 30
    else:
        pid = 0.05 * errors.cumsum() + 0.1 * errors + 0.2 * np.diff(errors, prepend=0)
        np.testing.assert_allclose(ks, pid, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_error_that_is_not_finite_changes_neither_k_nor_the_errors_kept(bad):
    controller, errors = vae_began.Controller(GAINS).double(), [0.3, -0.1, 0.25, 0.4]
    for e in (bad, *errors[:2], bad, bad, *errors[2:], bad):
        controller.update(torch.tensor(e))
    assert controller.k.item() == pytest.approx(controlled(errors)[-1])
    assert [buffer.item() for buffer in controller.buffers()][1:] == pytest.approx([0.4, 0.25])


def simulate(gains):
    """A first-order plant with noise that follows 1.6 k and is to be 0.8: its overshoot, when it settles, and all y."""
    controller, ys = vae_began.Controller(gains), [0.0]
    for noise in 0.01 * np.random.RandomState(0).randn(6000):
        ys.append(ys[-1] + 0.005 * (1.6 * controller.k.item() - ys[-1]))
        controller.update(torch.tensor(0.8 - ys[-1] + noise))
    return max(ys) / 0.8 - 1, np.flatnonzero(np.abs(np.array(ys) / 0.8 - 1) > 0.05)[-1], np.array(ys)


def test_simulation_the_proportional_gain_dampens_and_hastens_the_balance():
    integral, damped = (simulate(gains) for gains in ((3e-3, 0, 0), (3e-3, 0.5, 0)))
    assert integral[0] > 0.15 and damped[0] < 0.5 * integral[0] and damped[1] < 0.8 * integral[1] and integral[1] < 5500
    printed, began = (simulate(vae_began.MODELS[model]["gains"])[2] for model in ("vae-began", "began"))
    assert 0 < np.abs(printed - began).max() < 0.02  # the paper's gains are too small to be told from BEGAN's


# ------------------------------------------------------------------------------------------------------------ losses


def test_kl_loss_eq_3_is_the_integral_and_zero_at_the_prior_and_reparameterise_eq_4():
    torch.manual_seed(0)
    mean, log_variance, epsilon = torch.randn(3, 4, 5).double()
    m, s = mean.numpy()[..., None], np.exp(log_variance.numpy() / 2)[..., None]
    z = m + s * np.linspace(-12, 12, 4001)
    logs = -0.5 * ((z - m) / s) ** 2 - np.log(s), -0.5 * z**2  # of both densities, but for the same constant
    integral = (np.exp(logs[0]) / np.sqrt(2 * np.pi) * (logs[0] - logs[1]) * s * 24 / 4000).sum(-1)
    assert integral.min() > 0 and vae_began.kl_loss(mean, log_variance).item() == pytest.approx(integral.mean())
    zero = torch.zeros(4, 5).double().requires_grad_()
    loss = vae_began.kl_loss(zero, zero)
    assert loss == 0 and (torch.autograd.grad(loss, zero)[0] == 0).all()
    z_v = vae_began.reparameterise(mean, log_variance, epsilon)
    np.testing.assert_allclose(z_v.numpy(), mean.numpy() + epsilon.numpy() * s[..., 0])
    inputs = mean.requires_grad_(), log_variance.requires_grad_(), epsilon
    torch.autograd.gradcheck(vae_began.kl_loss, inputs[:2])
    torch.autograd.gradcheck(vae_began.reparameterise, inputs)


@pytest.mark.parametrize("eta", [0.1, 0.5, 3.0])  # the error below 0, near it, and above it
def test_balance_eq_10_11(eta):
    L_d, L_fake = (torch.tensor(value).double().requires_grad_() for value in (0.7, 0.32))
    result = vae_began.balance(L_d, L_fake, eta)
    expected = {"eta_measured": 0.32 / 0.7, "e_t": eta * 0.7 - 0.32, "convergence": 0.7 + np.abs(eta * 0.7 - 0.32)}
    assert {name: value.item() for name, value in result.items()} == pytest.approx(expected)
    torch.autograd.gradcheck(lambda *a: tuple(vae_began.balance(*a, eta).values()), (L_d, L_fake))
    even = vae_began.balance(L_d, eta * L_d, eta)  # where the convergence measure is least
    assert even["e_t"] == 0 and even["convergence"] == L_d and even["eta_measured"].item() == pytest.approx(eta)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("eta", [0.1, 5.0])  # the error below 0, and above it
def test_losses_against_numpy_gradcheck_and_which_networks_they_reach(model, eta):
    nets, batch, weights, function = tiny(model), random_batch(model), WEIGHTS | {"eta": eta}, vae_began.LOSSES[model]
    losses = function(nets, weights, *batch)
    expected = losses_by_hand(model, nets, weights, 0.4, *(tensor.numpy() for tensor in batch), call=in_numpy)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected)
    assert (expected["e_t"] > 0) == (eta > 1)
    reached = {"L_d": "D", "L_g": "GD", "L_s": "GD"}
    reached |= {"L_n": "E", "L_e": "GE", "L_v": "GDE", "L_s": "GDE"} if model == "vae-began" else {}
    for name, letters in reached.items():
        nets.zero_grad()
        losses[name].backward(retain_graph=True)
        found = [name for name in nets if any(p.grad is not None and p.grad.any() for p in nets[name].parameters())]
        assert "".join(found) == letters, name
    names, inputs = [name for name in losses if name != "k"], [tensor.requires_grad_() for tensor in batch]
    torch.autograd.gradcheck(lambda *a: tuple(map(function(nets, weights, *a).get, names)), inputs, fast_mode=True)


@pytest.mark.parametrize("model", MODELS)
def test_nothing_is_made_twice_so_one_draw_of_noise_serves_all_losses(model):
    nets = tiny(model)
    parts = {name: nets[name] for name in ("G", "E") if name in nets} | dict(nets["D"].named_children())
    passes = conftest.count_passes(parts, vae_began.LOSSES[model], nets, WEIGHTS, *random_batch(model))
    assert passes == " ".join(f"{name}1" for name in parts) and len(parts) == (4 if model == "vae-began" else 3)


def test_models_without_an_encoder_need_a_latent_for_each_image():
    x, z_g, epsilon = random_batch("began")
    for count in (1, 5):
        with pytest.raises(ValueError, match=f"6 images, but {count} latents"):
            vae_began.began_losses(tiny("began"), WEIGHTS, x, z_g[:count], epsilon)


def test_perfect_autoencoders_have_losses_of_zero():
    nets = {"G": lambda z: z.view(-1, 3, 2, 2), "D": lambda x: (x, x.flatten(1)), "controller": tiny()["controller"]}
    nets["E"] = lambda x: torch.cat([x.flatten(1), torch.full((len(x), 12), -300.0)], 1)  # a deviation of 0
    x = torch.rand(6, 3, 2, 2) * 2 - 1
    for model, z_g in (("vae-began", torch.randn(3, 12)), ("began", x.flatten(1))):
        losses = vae_began.LOSSES[model](nets, WEIGHTS, x, z_g, torch.randn(6, 12))
        assert all(losses.get(name, 0) == 0 for name in "L_e L_s L_d L_g L_v L_gen L_dis convergence".split())


@pytest.mark.parametrize("model", MODELS)
def test_train_step_against_autograd_by_hand(model):
    nets, k, ks, errors = tiny(model), 0.4, [], []
    optimizer, other = vae_began.build_optimizer(nets, 1e-2), copy.deepcopy(nets)
    moves = [("L_gen", "G"), ("L_dis", "D"), ("L_enc", "E")][: len(nets) - 1]
    parameters = [list(other[name].parameters()) for _, name in moves]
    moments = [0, *([torch.zeros_like(p) for p in sum(parameters, [])] for _ in range(2))]
    for seed in (10, 11, 12):
        batch = random_batch(model, seed)
        losses = vae_began.train_step(nets, optimizer, model, WEIGHTS, *batch)
        expected = losses_by_hand(model, other, WEIGHTS, k, *batch)
        errors.append(expected["e_t"].item())
        values = {name: loss if name == "k" else loss.item() for name, loss in expected.items()}
        assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(values)
        assert not any(loss.requires_grad for loss in losses.values())
        gradients = [torch.autograd.grad(expected[move[0]], p, retain_graph=True) for move, p in zip(moves, parameters)]
        adam_by_hand(sum(parameters, []), sum(gradients, ()), 1e-2, moments, beta=0.9)
        ks.append(k)
        k = controlled(errors, 0.4)[-1]
        assert nets["controller"].k.item() == pytest.approx(k)
    assert all(0.05 < k < 0.95 for k in ks) and np.abs(np.diff(ks)).min() > 0.02, ks
    for name, parameter in nets.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), atol=1e-10, rtol=1e-8)


def test_batches_are_the_images_and_normal_noise():
    images = draw_faces(10, 16)[0].repeat(50, 1, 1, 1)
    torch.manual_seed(0)
    x, z_g, epsilon = vae_began.make_inputs(images, 7)
    assert torch.equal(x, to_float(images)) and z_g.shape == epsilon.shape == (500, 7)
    for noise in (z_g, epsilon):
        assert abs(noise.mean()) < 0.1 and noise.std().item() == pytest.approx(1, abs=0.1)
    assert abs(torch.corrcoef(torch.stack([z_g.flatten(), epsilon.flatten()]))[0, 1]) < 0.1


# -------------------------------------------------------------------------------------------------------- evaluation


def score_in_numpy(p, splits=10):
    """The mean and the deviation of exp(E KL(p(y|x) || p(y))) over the splits."""
    scores = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in np.array_split(np.asarray(p), splits)]
    return np.mean(scores), np.std(scores)


class Classifier(nn.Module):
    """Logits of the four corners' colours, and four features; half of it is dropped where it is not evaluated."""

    def forward(self, x):
        corners = 5 * F.dropout(x[:, :, ::15, ::15].flatten(1), 0.5, self.training)
        return corners, corners[:, :4]


def probabilities(images):
    """What the Classifier makes of images [N, 3, 16, 16], by NumPy."""
    p = np.exp(5 * np.clip(images, -1, 1)[:, :, ::15, ::15].reshape(len(images), -1))
    return p / p.sum(1, keepdims=True)


def in_one(net, inputs):
    return net(torch.from_numpy(inputs)).numpy()


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
def test_measure_against_numpy(model):
    nets, z, G = tiny(model).float(), torch.randn(80, 5), lambda z: in_one(nets["G"], z)
    data = conftest.random_data()
    train, x = ((part.numpy() / 127.5 - 1).astype(np.float32) for part in (data.train, data.heldout[:1000]))  # of 1,100
    z_g, epsilon = torch.randn(2, 1000, 5, generator=torch.Generator().manual_seed(0)).numpy()
    losses = losses_by_hand(model, nets, WEIGHTS, 0.4, x, z_g, epsilon, in_one)
    expected = {"l1_of_d_on_real": losses["L_d"], "l1_of_d_on_samples": losses["L_g"], "k": 0.4}
    expected |= {"eta_measured": losses["eta_measured"], "convergence_measure": losses["convergence"]}
    expected["sample_diversity"] = conftest.mean_distance(G(z.numpy())) / conftest.mean_distance(x[:80])
    if model == "vae-began":
        mean, log_variance = np.split(in_one(nets["E"], x), 2, axis=1)
        expected["heldout_l1"] = np.abs(G(mean) - x).mean()
        expected["heldout_l1_of_mean_image"] = np.abs(x - train.mean(0)).mean()
        expected["kl_nats"] = (0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance)).sum(1).mean()
    assert vae_began.measure(nets, data, z, WEIGHTS["alpha"], WEIGHTS["eta"], None, 9) == pytest.approx(
        expected, rel=1e-4
    )
    found = vae_began.measure_inception(nets, data, 5, Classifier().eval(), 130, torch.device("cpu"))
    noise = torch.randn(130, 5, generator=torch.Generator().manual_seed(1)).numpy()
    (score, deviation), (real, _) = (score_in_numpy(probabilities(x)) for x in (G(noise), train[:130]))
    expected = {"inception_score": score, "inception_score_std": deviation, "inception_score_of_real": real}
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("heldout, count, latents", [(3, 3, 5), (13, 13, 256), (45, 40, 256)])
def test_figures_show_what_they_say(monkeypatch, tmp_path, heldout, count, latents):
    def save_grid(path, *batches, groups_per_row=10, captions=()):
        assert path.parent == tmp_path
        shown[path.name] = [batch.numpy() for batch in batches], groups_per_row, captions

    def decoded(z):
        return np.broadcast_to(np.sin(2 * z)[..., None, None], (*z.shape, 16, 16))

    (images, attributes, labels), shown = draw_faces(60 + heldout, 16), {}
    nets = {"E": lambda x: torch.cat([torch.exp(x.mean((2, 3))), x.new_ones(len(x), 3)], 1)}  # none of them is linear
    nets["G"] = lambda z: torch.sin(2 * z[:, :, None, None]).expand(-1, -1, 16, 16)
    nets["D"] = lambda x: (x**3 - 0.1, x.mean((2, 3)))
    monkeypatch.setattr(vae_began, "save_grid", save_grid)
    data = Data(images[:60], images[60:], attributes, labels[:60], ~labels[60:], (), 0)
    z = torch.randn(latents, 3).numpy()
    vae_began.save_figures(nets, data, torch.from_numpy(z), tmp_path, 70)

    x, ten, pairs = to_float(data.heldout).numpy()[:count], min(10, heldout), min(5, heldout // 2)
    codes, codes_of_train = (np.exp(images.mean((2, 3))) for images in (x, to_float(data.train).numpy()))
    fours, sixes = [decoded(z)[:ten], decoded(z)[:ten] ** 3 - 0.1, x[:ten], x[:ten] ** 3 - 0.1], [x[:pairs]]
    for share in np.linspace(0, 1, 8):
        sixes.append(decoded(codes[:pairs] * (1 - share) + codes[pairs : 2 * pairs] * share))
    has, eights = labels[:60].numpy(), [np.ones((14, 3, 16, 16))]
    directions = np.stack([codes_of_train[a].mean(0) - codes_of_train[~a].mean(0) for a in has.T])
    for strength in np.arange(-2, 2.5, 0.5):
        eights.append(decoded(z[np.arange(14) % latents] + strength * directions))
    names = [name.replace("_", "\n") for name in attributes]
    texts = [names, *([text] for text in "-2 -1.5 -1 -0.5 +0 +0.5 +1 +1.5 +2".split())]
    expected = {"samples_70": ([decoded(z)[:100]], 10, ()), "reconstructions_70": ([x, decoded(codes)], 5, ())}
    expected["figure4_discriminator"] = fours, 2, [["fake"], ["D(fake)"], ["real"], ["D(real)"]]
    expected["figure6_interpolations"] = [*sixes, x[pairs : 2 * pairs]], 1, ()
    expected["figure8_arithmetic"] = eights, 1, texts
    assert {f"{name}.png" for name in expected} == set(shown) and "pale\nskin" in names
    for name, (batches, *rest) in expected.items():
        found, *others = shown[f"{name}.png"]
        assert len(batches) == len(found) and rest == others
        for a, b in zip(batches, found):
            np.testing.assert_allclose(b, a, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_no_graph_and_the_modes_that_it_found(training, tmp_path):
    images, _, labels = draw_faces(30, 16)
    names, many = tuple(f"name_{i}" for i in range(300)), labels[:, :1].expand(-1, 300)  # more than there are latents
    data = Data(images[:20], images[20:], names, many[:20], many[20:], (), 0)
    nets, z = tiny().float().train(training), torch.randn(256, 5)
    vae_began.save_figures(nets, data, z, tmp_path, 1)
    with Image.open(tmp_path / "figure8_arithmetic.png") as image:
        assert image.size == (10 * 64 + 8, 300 * 68 + 4)
    vae_began.measure(nets, data, z, 0.3, 0.5, None, 9)
    assert all(module.training == training for module in nets.modules())
    assert not vae_began.encode(nets, to_float(images)).requires_grad
    assert not vae_began.attribute_directions(nets, data, z.device).requires_grad


# ------------------------------------------------------------------------------------------------------ command line


def test_a_run_as_a_user_starts_it(photos, tmp_path):
    pictures = {f"samples_{step}": (10, 10, 1) for step in (2, 4, 5)}
    pictures |= {f"reconstructions_{step}": (3, 1, 2) for step in (2, 4, 5)}
    pictures |= {"figure4_discriminator": (2, 2, 4), "figure6_interpolations": (1, 1, 10)}
    arguments = ["--data", photos, *SMALL, "--steps", 5]
    out, results, header, _ = run_as_a_user("vae_began", *arguments, cwd=tmp_path, pictures=pictures)
    assert results["config"]["filters"] == 2 and out.startswith("vae-began on ")
    assert set(results) == {*MEASURES, "heldout_l1", "heldout_l1_of_mean_image", "kl_nats", "steps", "config"}
    numbers = [(name, value) for name, value in results.items() if name not in ("steps", "config")]
    assert all(0 < value < 10 and f"{name:26}{value:10.3f}" in out for name, value in numbers)
    assert header == "L_enc L_gen L_dis L_e L_n L_s L_d L_g L_v k eta_measured e_t convergence".split()


@pytest.mark.parametrize("model", ["began-lsm", "began"])
def test_the_other_models_write_what_they_can(model, photos, tmp_path, cli):
    run = tmp_path / model
    assert cli(vae_began, "--model", model, "--data", photos, *SMALL, "--steps", 1, "--out", run).status == 0
    results, pictures = json.loads((run / "results.json").read_text()), [f for f in files(run) if f.endswith("png")]
    assert set(results) == {*MEASURES, "steps", "config"} and results["config"]["model"] == model
    assert pictures == ["figure4_discriminator.png", "samples_1.png"]
    assert log_of(run)[0] == "step L_gen L_dis L_s L_d L_g k eta_measured e_t convergence".split()


def test_figure_8_and_the_inception_score_of_a_run(photos, tmp_path, cli):
    folder, run, good, bad = (tmp_path / name for name in ("photos", "run", "good.pt", "bad.pt"))
    shutil.copytree(photos, folder)
    rows = [f"{i}.png,{i % 2},{int(i > 5)},0" for i in range(30)]
    (folder / "attributes.csv").write_text("\n".join(["file,odd,late,never", *rows]))
    torch.jit.script(Classifier()).save(good)
    torch.jit.trace(lambda x: (x, x.flatten(1)), torch.zeros(2, 3, 16, 16)).save(str(bad))
    small, again = ["--data", folder, *SMALL, "--steps", 1, "--out", run], ["--resume", "--out", run, "--device", "cpu"]
    refused = cli(vae_began, "--data", photos, *small[2:], "--classifier", bad)
    assert_refused(refused, f"--classifier {bad}", "3, 16, 16", "logits")
    assert_refused(cli(vae_began, *small, "--samples", 9), "--samples 9", "at least 10")
    assert not run.exists()
    for arguments, samples, count in ((small, 12, 12), (again, 500, 27)):  # there are 27 to train on
        assert cli(vae_began, *arguments, "--samples", samples, "--classifier", good).status == 0
        with Image.open(run / "figure8_arithmetic.png") as image:
            assert image.size == (10 * 64 + 8, 3 * 68 + 4)
            boxes = [[(4 + 64 * i, y, 68 + 64 * i, y + 40) for i in range(1, 10)] for y in (28, 96, 164)]
            kinds = [len({image.crop(box).tobytes() for box in row}) for row in boxes]
            assert min(kinds[:2]) > 4 and kinds[2] == 1  # no image has the third attribute
        results = json.loads((run / "results.json").read_text())
        nets = vae_began.build_networks("vae-began", 16, 2, 64, (0, 0, 0))
        nets.load_state_dict(load(run)["networks"])
        images = in_numpy(nets["G"], torch.randn(count, 64, generator=torch.Generator().manual_seed(1)).numpy())
        reals = to_float(load_data(photos, 16).train[:count]).numpy()
        (score, deviation), (real, _) = (score_in_numpy(probabilities(x)) for x in (images, reals))
        found = [results[f"inception_score{name}"] for name in ("", "_std", "_of_real")]
        assert found == pytest.approx([score, deviation, real], rel=1e-3)


def test_the_settings_reach_the_training_step_the_figures_and_the_measure(photos, tmp_path, cli, monkeypatch):
    def step(nets, optimizer, model, weights, x, z_g, epsilon):
        (group,) = optimizer.param_groups
        assert len(group["params"]) == len(list(nets.parameters())) and x.shape == (4, 3, 16, 16)
        given = [weights[name] for name in WEIGHTS], nets["controller"].gains, group["lr"], group["betas"], group["eps"]
        seen.append((model, *given, z_g.shape, epsilon.shape))
        return train_step(nets, optimizer, model, weights, x, z_g, epsilon)

    def measure(nets, data, z, alpha, eta, *rest):
        seen.append((len(data.train), len(z), alpha, eta))
        return measured(nets, data, z, alpha, eta, *rest)

    def measure_inception(nets, data, latent_dim, judge, count, device):
        judged.append((len(data.train), latent_dim, judge, count, device.type))
        return {}

    seen, shown, judged, train_step, measured = [], [], [], vae_began.train_step, vae_began.measure
    monkeypatch.setattr(vae_began, "measure", measure)
    monkeypatch.setattr(vae_began, "measure_inception", measure_inception)
    monkeypatch.setattr(vae_began, "load_classifier", lambda name, *call: (name, *call) if name != "none" else None)
    monkeypatch.setattr(vae_began, "train_step", step)
    monkeypatch.setattr(vae_began, "save_figures", lambda nets, data, z, out, step: shown.append((data, z, step)))
    settings = "--alpha 3 --beta 4 --gamma 5 --eta 6 --gains 0.1 0.2 0.3 --lr 1e-3 --samples 20".split()
    settings += ["--classifier", "c", "--seed"]
    given, default = ([3, 4, 5, 6], [0.1, 0.2, 0.3], 1e-3), ([0.3, 0.1, 0.1, 0.5], [1e-3, 1e-5, 1e-5], 5e-5)
    began = [0.3, 0, 0.1, 0.5], [1e-3, 0, 0], 5e-5
    runs = [("vae-began", [*settings, 0], given), ("began", [*settings, 9], given)]
    for model, more, expected in [*runs, ("vae-began", [], default), ("began-lsm", [], default), ("began", [], began)]:
        small = ["--data", photos, *SMALL, "--steps", 1, "--latent-dim", 7, "--out", tmp_path / str(len(shown))]
        assert cli(vae_began, *small, "--model", model, *more).status == 0
        assert seen[-2] == (model, *expected, (0.9, 0.999), 1e-8, (4, 7), (4, 7))
        assert seen[-1] == (27, 256, expected[0][0], expected[0][3])
        data, z, step_shown = shown[-1]
        assert len(data.heldout) == 3 and step_shown == 1
        assert torch.equal(z, shown[0][1])  # the same latents whatever the seed
    assert judged == [(27, 7, ("c", 16, torch.device("cpu")), 20, "cpu")] * 2 and len(shown) == 5


def test_the_defaults_are_the_paper_s():
    args, _ = vae_began.parse_args(["--out", "nowhere"])
    assert (args.steps, args.batch_size, args.image_size, args.latent_dim, args.filters) == (300_000, 16, 64, 64, 64)
    assert (args.model, args.classifier) == ("vae-began", "none")
    args, _ = vae_began.parse_args("--out nowhere --quick --filters 8 --model began --beta 0.2".split())
    assert (args.filters, args.beta, args.gamma) == (8, 0.2, 5)
    assert vae_began.parse_args(["--out", "nowhere", "--image-size", "128"])[0].filters == 128
