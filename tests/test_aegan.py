import copy
import json
import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, adam_by_hand, assert_same, files, log_of, refuse_reading_back, run_as_a_user
from torch import nn

import aegan
from common import Data, draw_faces, to_float

WEIGHTS = {"alpha": 0.7, "lambda_rx": 3.0, "lambda_rz": 5.0}
TERMS = {"aegan": ["x_hat", "x_tilde", "z_hat", "z_tilde", "r_x", "r_z"], "gan": ["x_hat"], "aae": ["z_hat", "r_x"]}
SCALES = {16: "112211", 32: "122211", 64: "222211", 128: "222221", 256: "222222"}  # of G's layers
STRIDES = SCALES | {16: "221111", 32: "222111"}  # of the layers of E and D_x
FACTOR = math.sqrt(0.005 / 0.995)  # of the multiplicative noise
PADDING = {(4, 2): (1, 1, 1, 1), (4, 1): (1, 2, 1, 2), (3, 2): (0, 1, 0, 1), (3, 1): (1, 1, 1, 1)}  # Keras's "same"


def tiny(model="aegan", size=16, channels=2):
    """Networks in float64 with weights that let every gradient be seen, four images x and three latents z."""
    torch.manual_seed(0)
    nets = aegan.build_networks(model, size, channels, 5).double()
    for parameter in nets.parameters():
        nn.init.normal_(parameter, std=0.4 if parameter.ndim < 4 else 0.2)
    return nets, torch.rand(4, 3, size, size).double() * 2 - 1, torch.randn(3, 5).double()


class StandIn(nn.Module):
    """A function as a network, which in training mode gives something else."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, inputs):
        return self.function(inputs) + self.training


def noise(h):
    """In place of random numbers, so that the noise is the same wherever something is made more than once."""
    return (3 * h.detach()).cos()


# ---------------------------------------------------------------------------------------------------------- networks


def noisy(net, h, size):
    return h + size * noise(h) if net.training else h


def norm(h, layer):
    """Layer norm over dimension 1, with the weights of the given layer."""
    h = (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, unbiased=False) + 1e-3).sqrt()
    shape = (-1,) + (1,) * (h.ndim - 2)
    return h * layer.weight.view(shape) + layer.bias.view(shape)


def layers(net, kind):
    return [module for module in net.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size, channels", [*product(SCALES, [2]), (16, 3)])
@pytest.mark.parametrize("name, kernel, slope", [("E", 4, 0), ("D_x", 3, 0.02)])
def test_encoder_and_image_discriminator_layer_by_layer(name, kernel, slope, size, channels, training, monkeypatch):
    nets, x, _ = tiny(size=size, channels=channels)
    net = nets[name].train(training)
    convs, norms, (dense,) = (layers(net, kind) for kind in (nn.Conv2d, nn.LayerNorm, nn.Linear))
    monkeypatch.setattr(torch, "randn_like", noise)
    h = noisy(net, x, 0.01)
    for conv, layer, width, stride in zip(convs, norms, (1, 1, 2, 2, 2, 4), map(int, STRIDES[size]), strict=True):
        assert conv.weight.shape == (width * channels, h.shape[1], kernel, kernel)
        h = F.conv2d(F.pad(h, PADDING[kernel, stride]), conv.weight, conv.bias, stride)
        h = F.leaky_relu(norm(noisy(net, h, FACTOR * h), layer), slope)
    assert h.shape == (4, 4 * channels, 4, 4)
    torch.testing.assert_close(net(x), F.linear(h.flatten(1), dense.weight, dense.bias))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size, channels", [*product(SCALES, [2]), (16, 3)])
def test_the_generator_layer_by_layer(size, channels, training):
    nets, _, z = tiny(size=size, channels=channels)
    net = nets["G"].train(training)
    h, style = (norm(F.linear(z, part[0].weight, part[0].bias), part[1]).relu() for part in (net.trunk, net.style))
    h = h.view(3, channels, 4, 4)
    for conv, layer, scale in zip(
        layers(net, nn.Conv2d), [*layers(net, nn.LayerNorm)[2:], None], map(int, SCALES[size])
    ):
        h = h.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        h = torch.cat([h, style[:, :, None, None].expand(-1, -1, *h.shape[2:])], 1)
        h = F.conv2d(F.pad(h, PADDING[4, 1]), conv.weight, conv.bias)
        h = norm(h, layer).relu() if layer else h.tanh()
    assert h.shape == (3, 3, size, size) and h.abs().max() > 0.5
    torch.testing.assert_close(net(z), h)


@pytest.mark.parametrize("training", [True, False])
def test_every_layer_of_the_latent_discriminator_sees_all_before_it(training, monkeypatch):
    nets, _, z = tiny()
    net = nets["D_z"].train(training)
    *dense, hidden, logit = layers(net, nn.Linear)
    monkeypatch.setattr(torch, "randn_like", noise)
    h = noisy(net, z, 0.01)
    for linear, layer in zip(dense, layers(net, nn.LayerNorm), strict=True):
        out = F.linear(h, linear.weight, linear.bias)
        h = torch.cat([h, F.leaky_relu(norm(noisy(net, out, FACTOR * out), layer), 0.02)], 1)
    assert len(dense) == 16 and h.shape == (3, 5 + 256)
    h = F.leaky_relu(F.linear(h, hidden.weight, hidden.bias), 0.02)
    torch.testing.assert_close(net(z), F.linear(h, logit.weight, logit.bias))


def test_weights_of_the_author_s_networks_counted_by_hand():
    def conv(c_in, c_out, kernel):
        return c_in * c_out * kernel * kernel + c_out

    widths = [3, 64, 64, 128, 128, 128, 256]
    norms = 2 * sum(widths[1:])
    e = sum(conv(a, b, 4) for a, b in zip(widths, widths[1:])) + norms + 4096 * 32 + 32
    d_x = sum(conv(a, b, 3) for a, b in zip(widths, widths[1:])) + norms + 4096 + 1
    d_z = sum((32 + 16 * i) * 16 + 16 + 2 * 16 for i in range(16)) + (288 * 128 + 128) + (128 + 1)
    nets = aegan.build_networks("aegan", 64, 64, 32)
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    assert counts == {"G": 1_946_691, "E": e, "D_x": d_x, "D_z": d_z}


def test_initial_weights():
    torch.manual_seed(0)
    nets = aegan.build_networks("aegan", 64, 16, 32)
    seen = []
    for name, layer in nets.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear | nn.LayerNorm):
            continue
        w, glorot = layer.weight.detach(), name.startswith(("G.style", "D_z"))
        seen.append(glorot)
        assert (layer.bias == 0).all(), name
        if isinstance(layer, nn.LayerNorm):
            assert (w == 1).all(), name
            continue
        deviation = math.sqrt(2 / sum(w.shape)) if glorot else 0.02
        assert w.std().item() == pytest.approx(deviation, rel=0.1), name
        assert w.abs().max() < 1.74 * deviation if glorot else w.abs().max() > 2.3 * deviation, name  # uniform, normal
    assert (len(seen), sum(seen)) == (75, 36) and all(net.training for net in nets.modules())


def test_the_baselines_share_the_parts_of_the_model():
    torch.manual_seed(3)
    whole = aegan.build_networks("aegan", 16, 2, 5)
    assert list(whole) == ["G", "E", "D_x", "D_z"]
    for model, names in (("gan", ["G", "D_x"]), ("aae", ["G", "E", "D_z"])):
        torch.manual_seed(3)
        part = aegan.build_networks(model, 16, 2, 5)
        assert list(part) == names
        for name, net in part.items():
            assert_same(dict(net.state_dict()), dict(whole[name].state_dict()), name)


@pytest.mark.parametrize("model, size, word", [("vae", 16, "vae"), ("aegan", 48, "48"), ("aegan", 8, "8")])
def test_unknown_models_and_image_sizes_are_refused(model, size, word):
    with pytest.raises(ValueError, match=word):
        aegan.build_networks(model, size, 2, 5)


# ------------------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("loss, labels", [(aegan.discriminator_loss, (0.95, 0.05)), (aegan.generator_loss, (1.0,))])
def test_losses_of_logits_eq_2_to_5_against_numpy(loss, labels):
    logits, expected = [torch.randn(n, 1).double().requires_grad_() for n in (6, 3)[: len(labels)]], 0
    for d, label in zip(logits, labels):
        p = 1 / (1 + np.exp(-d.detach().numpy()))
        expected -= np.mean(label * np.log(p) + (1 - label) * np.log(1 - p))
    assert loss(*logits).item() == pytest.approx(expected)
    torch.autograd.gradcheck(loss, logits)


def test_the_discriminator_loss_is_least_at_its_labels_and_the_generator_loss_where_d_says_real():
    best, entropy = math.log(0.95 / 0.05), -0.95 * math.log(0.95) - 0.05 * math.log(0.05)
    pairs = [torch.tensor([[best + a], [-best + b]]) for a, b in product((-1, 0, 1), repeat=2)]
    at = [aegan.discriminator_loss(*pair).item() for pair in pairs]
    assert at[4] == min(at) == pytest.approx(2 * entropy)
    at = [aegan.generator_loss(torch.tensor([[d]])).item() for d in (-3.0, 0.0, 3.0, 30.0)]
    assert at == sorted(at, reverse=True) and at[-1] < 1e-9


def values(losses):
    return {name: loss.item() for name, loss in losses.items()}


def losses_by_hand(model, nets, x, z):
    """From the paper's definitions, with a pass through the networks for everything that stands in them."""

    def log(D, inputs, label=1.0):
        d = nets[D](inputs)
        return (label * F.logsigmoid(d) + (1 - label) * F.logsigmoid(-d)).mean()

    G, E = nets["G"], nets["E"] if "E" in nets else None
    fakes = {"x_hat": lambda: G(z), "z_hat": lambda: E(x), "x_tilde": lambda: G(E(x)), "z_tilde": lambda: E(G(z))}
    losses = {"L_G_E": 0.0}
    for name in TERMS[model]:
        if name in fakes:
            D, real, fake, weight = f"D_{name[0]}", x if name[0] == "x" else z, fakes[name](), WEIGHTS["alpha"]
            losses[f"L_{D}"] = losses.get(f"L_{D}", 0) - log(D, real, 0.95) - log(D, fake, 0.05)
            key, value = f"GAN_{name}", -log(D, fake)
        else:
            key, weight = name, WEIGHTS[f"lambda_{name.replace('_', '')}"]
            value = (G(E(x)) - x).abs().mean() if name == "r_x" else ((E(G(z)) - z) ** 2).mean()
        losses[key] = value
        losses["L_G_E"] = losses["L_G_E"] + weight * value
    return losses


@pytest.mark.parametrize("model", aegan.MODELS)
def test_all_losses_eq_1_to_7_by_hand_from_batches_of_unequal_length(model):
    nets, x, z = tiny(model)
    nets, function = nets.eval(), aegan.LOSSES[model]
    assert values(function(nets, x, z, WEIGHTS)) == pytest.approx(values(losses_by_hand(model, nets, x, z)))
    torch.autograd.gradcheck(lambda z: tuple(function(nets, x, z, WEIGHTS).values()), z.requires_grad_())


def test_inverse_networks_have_no_reconstruction_loss_and_undecided_ones_cost_log_2():
    G, E = StandIn(lambda z: z.asinh().view(-1, 3, 4, 4)), StandIn(lambda x: x.flatten(1).sinh())
    D = StandIn(lambda inputs: 0 * inputs.flatten(1)[:, :1])
    nets = nn.ModuleDict({"G": G, "E": E, "D_x": D, "D_z": D})
    x, z = torch.rand(4, 3, 4, 4).double() * 2 - 1, torch.randn(3, 48).double()
    losses = values(aegan.aegan_losses(nets.eval(), x, z, WEIGHTS))
    two, adversarial = math.log(2), ("GAN_x_hat", "GAN_x_tilde", "GAN_z_hat", "GAN_z_tilde")
    expected = {"L_D_x": 4 * two, "L_D_z": 4 * two, "L_G_E": 4 * 0.7 * two, "r_x": 0, "r_z": 0}
    assert losses == pytest.approx(expected | dict.fromkeys(adversarial, two))


@pytest.mark.parametrize(
    "model, reached",
    [
        ("aegan", {"L_D_x": "G E D_x", "L_D_z": "G E D_z", "L_G_E": "G E D_x D_z", "r_x": "G E", "r_z": "G E"}),
        ("aegan", {"GAN_x_hat": "G D_x", "GAN_x_tilde": "G E D_x", "GAN_z_hat": "E D_z", "GAN_z_tilde": "G E D_z"}),
        ("gan", {"L_D_x": "G D_x", "L_G_E": "G D_x", "GAN_x_hat": "G D_x"}),
        ("aae", {"L_D_z": "E D_z", "L_G_E": "G E D_z", "GAN_z_hat": "E D_z", "r_x": "G E"}),
    ],
)
def test_which_networks_a_loss_reaches(model, reached):
    nets, x, z = tiny(model)
    losses = aegan.LOSSES[model](nets, x, z, WEIGHTS)
    for name, net in product(reached, nets):
        parameters, options = list(nets[net].parameters()), {"retain_graph": True, "materialize_grads": True}
        gradients = torch.autograd.grad(losses[name], parameters, **options)
        assert any(g.any() for g in gradients) == (net in reached[name].split()), (name, net)


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("model", aegan.MODELS)
def test_train_step_with_its_noise_against_autograd_by_hand(model, monkeypatch):
    nets, _, _ = tiny(model)
    other = copy.deepcopy(nets)
    optimizer, moments, norms = aegan.build_optimizer(nets, 2e-4, 5e-4), {}, []
    monkeypatch.setattr(torch, "randn_like", noise)
    monkeypatch.setitem(WEIGHTS, "alpha", 3.0)  # so that some gradients of each model are clipped
    for i in range(3):
        torch.manual_seed(10 + i)
        x, z, updates = torch.rand(4, 3, 16, 16).double() * 2 - 1, torch.randn(3, 5).double(), []
        losses = aegan.train_step(nets, optimizer, model, WEIGHTS, x, z)
        expected = losses_by_hand(model, other, x, z)
        assert values(losses) == pytest.approx(values(expected))
        assert not any(loss.requires_grad for loss in losses.values())
        for name, net in other.items():
            parameters = list(net.parameters())
            loss, lr = ("L_G_E", 2e-4) if name in "GE" else (f"L_{name}", 5e-4)
            gradients = torch.autograd.grad(expected[loss], parameters, retain_graph=True)
            norms += [g.norm().item() for g in gradients]
            gradients = [g * min(1, 1 / g.norm().item()) for g in gradients]
            zeros = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
            updates.append((parameters, gradients, lr, moments.setdefault(name, [0, *zeros])))
        for update in updates:
            adam_by_hand(*update, epsilon=1e-7)
    assert sum(norm > 1 for norm in norms) > 5 and sum(norm < 1 for norm in norms) > 5
    for (name, a), b in zip(nets.named_parameters(), other.parameters()):
        torch.testing.assert_close(a, b, msg=name, atol=1e-12, rtol=0)


@pytest.mark.parametrize("model", aegan.MODELS)
def test_train_step_never_reads_a_tensor_back(model, monkeypatch):
    nets, images = aegan.build_networks(model, 16, 2, 5), draw_faces(8, 16)[0]
    optimizer = aegan.build_optimizer(nets, 2e-4, 5e-4)
    refuse_reading_back(monkeypatch)
    for _ in range(2):
        aegan.train_step(nets, optimizer, model, WEIGHTS, *aegan.draw_batch(images[:4], 5, True))


def test_batches_are_the_images_half_of_them_mirrored_and_normal_latents():
    images = draw_faces(10, 16)[0].repeat(50, 1, 1, 1)
    torch.manual_seed(0)
    x, z = aegan.draw_batch(images, 7, flip=True)
    same, mirrored = ((x == y).flatten(1).all(1) for y in (to_float(images), to_float(images).flip(-1)))
    assert (same ^ mirrored).all() and 200 < mirrored.sum() < 300 and z.shape == (500, 7)
    assert abs(z.mean()) < 0.1 and z.std().item() == pytest.approx(1, abs=0.05) and z.abs().max() > 2.5
    x, _ = aegan.draw_batch(images, 7, flip=False)
    assert torch.equal(x, to_float(images))


# -------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("model", aegan.MODELS)
def test_measure_against_numpy(model):
    def spread(x):
        return np.mean([np.linalg.norm(x[i] - x[j]) for i in range(len(x)) for j in range(i)])

    def edges(x):
        return np.abs(x[:, :, 1:] - x[:, :, :-1]).mean() + np.abs(x[..., 1:] - x[..., :-1]).mean()

    images = torch.randint(256, (1400, 3, 16, 16), dtype=torch.uint8)
    data, (nets, _, _), z = Data(images[:1100] // 2, images[1100:], (), None, None), tiny(model), torch.randn(20, 5)
    results = aegan.measure(nets.float(), data, z)
    nets.eval().requires_grad_(False)
    train, x = (part.numpy() / 127.5 - 1 for part in data[:2])
    x_hat = nets["G"](z)
    expected = dict.fromkeys(("heldout_l1", "sharpness", "latent_mse"))
    if model != "gan":
        x_tilde = nets["G"](nets["E"](to_float(data.heldout))).numpy()
        expected = {"heldout_l1": np.abs(x_tilde - x).mean(), "sharpness": edges(x_tilde) / edges(x)}
        expected["latent_mse"] = np.square((nets["E"](x_hat) - z).numpy()).mean()
    expected["heldout_l1_of_mean_image"] = np.abs(x - train.mean(0)).mean()
    expected["sample_diversity"] = spread(x_hat.numpy()) / spread(x[:20])
    assert results == pytest.approx(expected, rel=1e-4)
    assert aegan.sample_diversity(x_hat, x_hat[:1].expand(4, -1, -1, -1)) is None


@pytest.mark.parametrize("count, pairs", [(45, 4), (9, 4), (7, 3), (2, 1)])
def test_figures_show_what_they_say(count, pairs, monkeypatch, tmp_path):
    def picture(z):
        return (z[..., None, None] ** 3).expand(*z.shape, 16, 16)

    shown = {}
    monkeypatch.setattr(aegan, "save_grid", lambda path, *batches, **options: shown.update({path: (batches, options)}))
    nets = nn.ModuleDict({"G": StandIn(picture), "E": StandIn(lambda x: x.mean((2, 3)).sinh())})
    images = draw_faces(2 + count, 16)[0]
    data, z = Data(images[:2], images[2:], (), None, None), torch.randn(256, 3)
    aegan.save_figures(nets, data, z, tmp_path, 70, last=False)
    assert set(shown) == {tmp_path / "samples_70.png", tmp_path / "reconstructions_70.png"}
    aegan.save_figures(nets, data, z, tmp_path, 80)
    names = ("samples_80.png", "reconstructions_80.png", "figure1_interpolations.png")
    assert len(shown) == 5 and all(net.training for net in nets.modules())
    ((samples,), _), ((originals, pictures), by_five), ((grid,), by_ten) = (shown[tmp_path / name] for name in names)
    x = to_float(data.heldout)

    assert torch.equal(samples, picture(z[:100]))
    assert torch.equal(originals, x[:40]) and by_five["columns"] == 5
    torch.testing.assert_close(pictures, picture(x[:40].mean((2, 3)).sinh()))
    ends = [(x[2 * i], x[2 * i + 1]) for i in range(pairs)] + ([(x[8], x[8].flip(-1))] if count > 8 else [])
    assert by_ten["columns"] == 10
    for row, (first, last) in zip(grid.view(-1, 10, 3, 16, 16), ends, strict=True):
        assert torch.equal(row[0], first) and torch.equal(row[9], last)
        a, b = first.mean((1, 2)).sinh(), last.mean((1, 2)).sinh()
        between = [picture(a + (b - a) * i / 7) for i in range(8)]
        torch.testing.assert_close(row[1:9], torch.stack(between), atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------ command line


def test_a_run_as_a_user_starts_it(photos, tmp_path):
    pictures = {f"samples_{step}": (10, 10, 1) for step in (2, 4, 5)}
    pictures |= {f"reconstructions_{step}": (3, 1, 2) for step in (2, 4, 5)} | {"figure1_interpolations": (10, 1, 1)}
    arguments = ["--data", photos, *TINY, "--steps", 5]
    out, results, header, _ = run_as_a_user("aegan", *arguments, cwd=tmp_path, pictures=pictures)
    assert out.startswith("aegan on ")
    measures = ["heldout_l1", "heldout_l1_of_mean_image", "sharpness", "latent_mse", "sample_diversity"]
    assert list(results) == [*measures, "steps", "steps_per_second", "config"] and results["config"]["channels"] == 2
    assert all(0 < results[name] < 10 and f"{name:26}{results[name]:10.3f}" in out for name in measures)
    assert header == [*"L_D_x L_D_z L_G_E GAN_x_hat GAN_x_tilde GAN_z_hat GAN_z_tilde r_x r_z".split()]


@pytest.mark.parametrize("model, header", [("gan", "L_D_x L_G_E GAN_x_hat"), ("aae", "L_D_z L_G_E GAN_z_hat r_x")])
def test_the_baselines_write_what_they_can(model, header, photos, tmp_path, cli):
    few = [*TINY, "--log-every", 9, "--save-every", 9, "--steps", 3]
    assert cli(aegan, "--model", model, "--data", photos, *few, "--out", tmp_path).status == 0
    results, pictures = json.loads((tmp_path / "results.json").read_text()), {"samples_3.png"}
    assert (results["heldout_l1"] is None) == (results["latent_mse"] is None) == (model == "gan")
    pictures |= {"figure1_interpolations.png", "reconstructions_3.png"} if model == "aae" else set()
    assert set(files(tmp_path)) == pictures | {"checkpoint.pt", "log.csv", "results.json"}
    names, rows = log_of(tmp_path)
    assert names == ["step", *header.split()] and [row[0] for row in rows] == ["1", "3"]


def test_the_settings_reach_the_training_step(photos, tmp_path, cli, monkeypatch):
    def spy(name, note):
        function = getattr(aegan, name)
        calls[name] = []
        monkeypatch.setattr(
            aegan,
            name,
            lambda *args, **options: calls[name].append(note(*args, **options)) or function(*args, **options),
        )

    def step(nets, optimizer, model, weights, x, z):
        rates = dict(zip(nets, (group["lr"] for group in optimizer.param_groups)))
        training = all(module.training for module in nets.modules())
        return model, {name: weights[name] for name in WEIGHTS}, x.shape, z.shape, rates, training

    calls, z = {}, torch.randn(256, 7, generator=torch.Generator().manual_seed(0))
    spy("build_networks", lambda *args: args)
    spy("draw_batch", lambda images, latent_dim, flip: flip)
    spy("train_step", step)
    spy("save_figures", lambda nets, data, shown, out, step, last=True: (torch.equal(shown, z), step, last))
    spy("measure", lambda nets, data, shown: torch.equal(shown, z))
    settings = (
        "--lr 1e-6 --lr-discriminator 2e-6 --alpha 3 --lambda-rx 5 --lambda-rz 6 --latent-dim 7 --steps 3".split()
    )
    for i, more in enumerate(([], ["--no-flip", "--seed", 9])):
        assert cli(aegan, "--data", photos, *TINY, "--out", tmp_path / str(i), *settings, *more).status == 0
    rates = {"G": 1e-6, "E": 1e-6, "D_x": 2e-6, "D_z": 2e-6}
    weights = {"alpha": 3, "lambda_rx": 5, "lambda_rz": 6}
    assert calls["train_step"] == [("aegan", weights, (4, 3, 16, 16), (4, 7), rates, True)] * 6
    assert calls["build_networks"] == [("aegan", 16, 2, 7)] * 2
    assert calls["draw_batch"] == [True] * 3 + [False] * 3 and calls["measure"] == [True, True]
    assert calls["save_figures"] == [(True, 2, False), (True, 3, False), (True, 3, True)] * 2


def test_the_defaults_are_the_paper_s():
    args, _ = aegan.parse_args(["--out", "nowhere"])
    assert (args.steps, args.batch_size, args.image_size, args.latent_dim, args.channels) == (300_000, 16, 64, 32, 64)
    assert (args.lr, args.lr_discriminator, args.alpha, args.lambda_rx, args.lambda_rz) == (2e-4, 5e-4, 1, 10, 5)
    assert not args.no_flip and args.model == "aegan"
    quick, _ = aegan.parse_args(["--out", "nowhere", "--quick"])
    assert (quick.alpha, quick.lambda_rx, quick.lambda_rz) == (1 / 20, 10, 5 / 10)


# -------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_a_step_never_waits_for_the_device():
    nets, images = aegan.build_networks("aegan", 16, 4, 5).cuda(), draw_faces(40, 16)[0].cuda()
    optimizer = aegan.build_optimizer(nets, 2e-4, 5e-4)
    for _ in range(3):
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses = aegan.train_step(nets, optimizer, "aegan", WEIGHTS, *aegan.draw_batch(images[:4], 5, True))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(loss.isfinite() and loss.device.type == "cuda" for loss in losses.values())
