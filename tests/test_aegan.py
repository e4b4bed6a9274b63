import copy
import math
from functools import partial
from itertools import product
from unittest.mock import MagicMock

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, adam_by_hand, assert_same, files, log_of, run_as_a_user
from torch import nn

import aegan
from common import Data, draw_faces, to_float

WEIGHTS = {"alpha": 0.7, "lambda_rx": 3.0, "lambda_rz": 5.0}
TERMS = {"aegan": ["x_hat", "x_tilde", "z_hat", "z_tilde", "r_x", "r_z"], "gan": ["x_hat"], "aae": ["z_hat", "r_x"]}
SCALES = {16: "112211", 32: "122211", 64: "222211", 128: "222221", 256: "222222"}  # of G's layers
STRIDES = SCALES | {16: "221111", 32: "222111"}  # of the layers of E and D_x
FACTOR = math.sqrt(0.005 / 0.995)  # of the multiplicative noise
PADDING = {(4, 2): (1, 1, 1, 1), (4, 1): (1, 2, 1, 2), (3, 2): (0, 1, 0, 1), (3, 1): (1, 1, 1, 1)}  # Keras's "same"


def tiny(model="aegan", size=16, channels=4):
    """Networks in float64 with weights that let every gradient be seen, four images x and two latents z."""
    torch.manual_seed(0)
    nets = aegan.build_networks(model, size, channels, 5).double()
    for parameter in nets.parameters():
        nn.init.normal_(parameter, *{1: (0.5, 0.4), 2: (0, 0.4), 4: (0, 0.2)}[parameter.ndim])
    return nets, torch.rand(4, 3, size, size).double() * 2 - 1, torch.randn(2, 5).double()


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


def layers(net, kind):
    return [module for module in net.modules() if isinstance(module, kind)]


def conv(h, layer, stride=1):
    return F.conv2d(F.pad(h, PADDING[layer.weight.shape[-1], stride]), layer.weight, layer.bias, stride)


def norm(h, layer, factor=0.0):
    """Layer norm over dimension 1, with the weights of the given layer, after multiplicative noise."""
    h = h * (1 + factor * noise(h)) if layer.training else h
    h = (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, unbiased=False) + 1e-3).sqrt()
    shape = (-1,) + (1,) * (h.ndim - 2)
    return h * layer.weight.view(shape) + layer.bias.view(shape)


def generator(z, net, size, channels):
    (trunk, style), (trunk_norm, style_norm, *norms) = layers(net, nn.Linear), layers(net, nn.LayerNorm)
    h = norm(trunk(z), trunk_norm).relu().view(2, channels, 4, 4)
    style = norm(style(z), style_norm).relu()[:, :, None, None]
    *convs, last = layers(net, nn.Conv2d)
    for i, scale in enumerate(map(int, SCALES[size])):
        h = h.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        h = torch.cat([h, style.expand(-1, -1, *h.shape[2:])], 1)
        h = norm(conv(h, convs[i]), norms[i]).relu() if i < 5 else conv(h, last).tanh()
    return h


def encoder(x, net, size, channels, kernel=4, slope=0):
    convs, norms, (dense,) = (layers(net, kind) for kind in (nn.Conv2d, nn.LayerNorm, nn.Linear))
    h = x + 0.01 * noise(x) if net.training else x
    for layer, after, width, stride in zip(convs, norms, (1, 1, 2, 2, 2, 4), map(int, STRIDES[size]), strict=True):
        assert layer.weight.shape == (width * channels, h.shape[1], kernel, kernel)
        h = F.leaky_relu(norm(conv(h, layer, stride), after, FACTOR), slope)
    return dense(h.flatten(1))


def latent_discriminator(z, net, *_):
    *dense, hidden, logit = layers(net, nn.Linear)
    h = z + 0.01 * noise(z) if net.training else z
    for layer, after in zip(dense, layers(net, nn.LayerNorm), strict=True):
        h = torch.cat([h, F.leaky_relu(norm(layer(h), after, FACTOR), 0.02)], 1)
    assert len(dense) == 16 and h.shape == (2, 5 + 256)
    return logit(F.leaky_relu(hidden(h), 0.02))


BY_HAND = {"G": generator, "E": encoder, "D_x": partial(encoder, kernel=3, slope=0.02), "D_z": latent_discriminator}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size, channels", [*product(SCALES, [3]), (16, 4)])
def test_networks_of_every_size_layer_by_layer_with_their_noise(size, channels, training, monkeypatch):
    nets, x, z = tiny(size=size, channels=channels)
    monkeypatch.setattr(torch, "randn_like", noise)
    for name, net in nets.train(training).items():
        inputs = z if name in ("G", "D_z") else x
        torch.testing.assert_close(net(inputs), BY_HAND[name](inputs, net, size, channels), msg=name)


def test_weights_of_the_author_s_networks_counted_by_hand():
    pairs = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 128), (128, 256)]
    e, d_x = (sum(a * b * kernel**2 + 3 * b for a, b in pairs) for kernel in (4, 3))  # with biases and layer norms
    d_z = sum((32 + 16 * i) * 16 + 3 * 16 for i in range(16)) + (288 * 128 + 128) + (128 + 1)
    nets = aegan.build_networks("aegan", 64, 64, 32).items()
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in nets}
    assert counts == {"G": 1_946_691, "E": e + 4096 * 32 + 32, "D_x": d_x + 4096 + 1, "D_z": d_z}


def test_initial_weights():
    torch.manual_seed(0)
    nets = aegan.build_networks("aegan", 64, 16, 32)
    parts = {name: part for name, part in nets.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)}
    for name, part in parts.items():
        w, glorot = part.weight.detach(), name.startswith(("G.style", "D_z"))
        deviation = math.sqrt(2 / sum(w.shape)) if glorot else 0.02
        assert w.std().item() == pytest.approx(deviation, rel=0.1) and not part.bias.any(), name
        assert w.abs().max() < 1.74 * deviation if glorot else w.abs().max() > 2.3 * deviation, name  # uniform, normal
    assert len(parts) == 40 and all(part.training for part in nets.modules())


def test_the_baselines_share_the_parts_of_the_model():
    def weights(model):
        torch.manual_seed(3)
        return {name: dict(net.state_dict()) for name, net in aegan.build_networks(model, 16, 2, 5).items()}

    whole = weights("aegan")
    for model, names in (("aegan", ["G", "E", "D_x", "D_z"]), ("gan", ["G", "D_x"]), ("aae", ["G", "E", "D_z"])):
        assert_same({name: whole[name] for name in names}, weights(model), model)


@pytest.mark.parametrize("model, size", [("aegan", 8), ("gan", 48), ("vae", 16)])
def test_unknown_models_and_image_sizes_are_refused(model, size):
    with pytest.raises(ValueError, match=f"{model}, size {size}"):
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
    pairs = product((-1, 0, 1), repeat=2)
    at = [aegan.discriminator_loss(*torch.tensor([[best + a], [-best + b]])).item() for a, b in pairs]
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
            D, real, fake = f"D_{name[0]}", {"x": x, "z": z}[name[0]], fakes[name]()
            losses[f"L_{D}"] = losses.get(f"L_{D}", 0) - log(D, real, 0.95) - log(D, fake, 0.05)
            name, weight, value = f"GAN_{name}", WEIGHTS["alpha"], -log(D, fake)
        else:
            weight = WEIGHTS[f"lambda_{name.replace('_', '')}"]
            value = (G(E(x)) - x).abs().mean() if name == "r_x" else ((E(G(z)) - z) ** 2).mean()
        losses |= {name: value, "L_G_E": losses["L_G_E"] + weight * value}
    return losses


def test_inverse_networks_have_no_reconstruction_loss_and_undecided_ones_cost_log_2():
    G, E = StandIn(lambda z: z.asinh().view(-1, 3, 4, 4)), StandIn(lambda x: x.flatten(1).sinh())
    D = StandIn(lambda inputs: 0 * inputs.flatten(1)[:, :1])
    nets = nn.ModuleDict({"G": G, "E": E, "D_x": D, "D_z": D})
    x, z = torch.rand(4, 3, 4, 4).double() * 2 - 1, torch.randn(3, 48).double()
    losses, two = values(aegan.aegan_losses(nets.eval(), x, z, WEIGHTS)), math.log(2)
    expected = {"L_D_x": 4 * two, "L_D_z": 4 * two, "L_G_E": 0.7 * 4 * two, "r_x": 0, "r_z": 0}
    assert losses == pytest.approx(dict.fromkeys(losses, two) | expected)


REACHED = {
    "aegan": {"L_D_x": "G E D_x", "L_D_z": "G E D_z", "L_G_E": "G E D_x D_z", "r_x": "G E", "r_z": "G E"},
    "gan": {"L_D_x": "G D_x", "L_G_E": "G D_x", "GAN_x_hat": "G D_x"},
    "aae": {"L_D_z": "E D_z", "L_G_E": "G E D_z", "GAN_z_hat": "E D_z", "r_x": "G E"},
}
REACHED["aegan"] |= {"GAN_x_hat": "G D_x", "GAN_x_tilde": "G E D_x", "GAN_z_hat": "E D_z", "GAN_z_tilde": "G E D_z"}


@pytest.mark.parametrize("model, reached", REACHED.items())
def test_gradients_of_the_losses_are_right_and_which_networks_each_reaches(model, reached):
    nets, x, z = tiny(model)
    function = partial(aegan.LOSSES[model], nets.eval(), x, weights=WEIGHTS)
    losses = function(z)
    torch.autograd.gradcheck(lambda z: tuple(function(z).values()), z.requires_grad_())
    for name, net in product(reached, nets):
        parameters, options = list(nets[net].parameters()), {"retain_graph": True, "materialize_grads": True}
        gradients = torch.autograd.grad(losses[name], parameters, **options)
        assert any(g.any() for g in gradients) == (net in reached[name].split()), (name, net)


@pytest.mark.parametrize("model, passes", [("aegan", "G2 E2 D_x1 D_z1"), ("gan", "G1 D_x1"), ("aae", "G1 E1 D_z1")])
def test_nothing_is_made_twice_so_one_draw_of_noise_serves_all_losses(model, passes):
    nets, x, z = tiny(model)
    assert conftest.count_passes(nets, aegan.LOSSES[model], nets, x, z, WEIGHTS) == passes


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("model", aegan.MODELS)
def test_losses_and_train_step_eq_1_to_7_by_hand_with_noise_and_batches_of_unequal_length(model, monkeypatch):
    nets, _, _ = tiny(model)
    other, optimizer, norms = copy.deepcopy(nets), aegan.build_optimizer(nets, 2e-4, 5e-4), []
    moments = {name: [0, [0.0] * 99, [0.0] * 99] for name in nets}
    monkeypatch.setattr(torch, "randn_like", noise)
    for i in range(3):
        torch.manual_seed(10 + i)
        x, z, gradients = torch.rand(4, 3, 16, 16).double() * 2 - 1, torch.randn(2, 5).double(), {}
        losses = aegan.train_step(nets, optimizer, model, WEIGHTS, x, z)
        expected = losses_by_hand(model, other, x, z)
        assert values(losses) == pytest.approx(values(expected)) and not any(v.requires_grad for v in losses.values())
        for name, net in other.items():
            loss = expected["L_G_E" if name in "GE" else f"L_{name}"]
            gradients[name] = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
            norms += [g.norm() for g in gradients[name]]
        for name, net in other.items():
            clipped = [g * min(1, 1 / g.norm().item()) for g in gradients[name]]
            adam_by_hand(net.parameters(), clipped, 2e-4 if name in "GE" else 5e-4, moments[name], epsilon=1e-7)
    assert sum(norm > 1 for norm in norms) > 5 and sum(norm < 1 for norm in norms) > 5
    for (name, a), b in zip(nets.named_parameters(), other.parameters()):
        torch.testing.assert_close(a, b, msg=name, atol=1e-12, rtol=0)


def test_batches_are_the_images_half_of_them_mirrored_and_normal_latents():
    images = draw_faces(10, 16)[0].repeat(50, 1, 1, 1)
    torch.manual_seed(0)
    x, z = aegan.make_inputs(images, 7, flip=True)
    same, mirrored = ((x == y).flatten(1).all(1) for y in (to_float(images), to_float(images).flip(-1)))
    assert (same ^ mirrored).all() and 200 < mirrored.sum() < 300 and z.shape == (500, 7)
    assert abs(z.mean()) < 0.1 and z.std().item() == pytest.approx(1, abs=0.05) and z.abs().max() > 2.5
    assert torch.equal(aegan.make_inputs(images, 7, flip=False)[0], to_float(images))


# -------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("model", aegan.MODELS)
def test_measure_against_numpy(model):
    data = conftest.random_data()
    nets = tiny(model)[0].float().eval().requires_grad_(False)
    z = torch.randn(20, 5)
    train, x = (part.numpy() / 127.5 - 1 for part in (data.train, data.heldout[:1000]))  # of 1,100
    x_hat = nets["G"](z)
    expected = {"sample_diversity": conftest.mean_distance(x_hat) / conftest.mean_distance(x[:20])}
    if model != "gan":
        x_tilde = nets["G"](nets["E"](torch.from_numpy(x).float())).numpy()
        expected |= {"heldout_l1": np.abs(x_tilde - x).mean(), **conftest.sharpness_by_hand(x_tilde, x)}
        expected["latent_mse"] = np.square((nets["E"](x_hat) - z).numpy()).mean()
        expected["heldout_l1_of_mean_image"] = np.abs(x - train.mean(0)).mean()
    for training in (True, False):
        assert aegan.measure(nets.train(training), data, z) == pytest.approx(expected, rel=1e-4)
        assert all(module.training == training for module in nets.modules())  # the mode that it found


@pytest.mark.parametrize("count, pairs", [(45, 5), (9, 4), (7, 3), (2, 1)])
def test_figures_show_what_they_say(count, pairs, monkeypatch, tmp_path):
    def picture(z):
        return (z[..., None, None] ** 3).expand(*z.shape, 16, 16)

    shown = {}
    monkeypatch.setattr(aegan, "save_grid", lambda path, *batches, **options: shown.update({path: (batches, options)}))
    nets = nn.ModuleDict({"G": StandIn(picture), "E": StandIn(lambda x: x.mean((2, 3)).sinh())})
    images, z = draw_faces(2 + count, 16)[0], torch.randn(256, 3)
    data, x = Data(images[:2], images[2:], (), None, None, (), 0), to_float(images[2:])
    for training in (False, True):
        aegan.save_figures(nets.train(training), data, z, tmp_path, 80)
        assert all(net.training == training for net in nets.modules())
    names = ("samples_80.png", "reconstructions_80.png", "figure1_interpolations.png")
    assert set(shown) == {tmp_path / name for name in names}
    ((samples,), _), ((originals, pictures), by_five), (walks, by_one) = (shown[tmp_path / name] for name in names)
    assert torch.equal(samples, picture(z[:100])) and torch.equal(originals, x[:40])
    torch.testing.assert_close(pictures, picture(x[:40].mean((2, 3)).sinh()))
    assert (by_five["groups_per_row"], by_one["groups_per_row"]) == (5, 1)
    ends = [(x[i], x[pairs + i]) for i in range(pairs - 1)] + [(x[pairs - 1], x[pairs - 1].flip(-1))]
    for row, (first, last) in zip(torch.stack(walks, dim=1), ends, strict=True):
        assert torch.equal(row[0], first) and torch.equal(row[9], last)
        a, b = first.mean((1, 2)).sinh(), last.mean((1, 2)).sinh()
        between = torch.stack([picture(a + (b - a) * i / 7) for i in range(8)])
        torch.testing.assert_close(row[1:9], between, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------ command line


def test_a_run_as_a_user_starts_it(photos, tmp_path):
    pictures = {f"samples_{step}": (10, 10, 1) for step in (2, 4, 5)}
    pictures |= {f"reconstructions_{step}": (3, 1, 2) for step in (2, 4, 5)} | {"figure1_interpolations": (1, 1, 10)}
    arguments = ["aegan", "--data", photos, *TINY, "--steps", 5]
    out, results, header, _ = run_as_a_user(*arguments, cwd=tmp_path, pictures=pictures)
    assert out.startswith("aegan on ")
    measures = ["sample_diversity", "heldout_l1", "heldout_l1_of_mean_image", "sharpness", "sharpness_of_halves"]
    measures.append("latent_mse")
    assert list(results) == [*measures, "steps", "config"] and results["config"]["channels"] == 2
    assert all(0 < results[name] < 10 and f"{name:26}{results[name]:10.3f}" in out for name in measures)
    assert header == "L_D_x L_D_z L_G_E GAN_x_hat GAN_x_tilde GAN_z_hat GAN_z_tilde r_x r_z".split()


@pytest.mark.parametrize("model, header", [("gan", "L_D_x L_G_E GAN_x_hat"), ("aae", "L_D_z L_G_E GAN_z_hat r_x")])
def test_the_baselines_write_what_they_can(model, header, photos, tmp_path, cli):
    few = [*TINY, "--log-every", 9, "--save-every", 9, "--steps", 3]
    assert cli(aegan, "--model", model, "--data", photos, *few, "--out", tmp_path).status == 0
    pictures = {"figure1_interpolations.png", "reconstructions_3.png"} if model == "aae" else set()
    assert set(files(tmp_path)) == pictures | {"samples_3.png", "checkpoint.pt", "log.csv", "results.json"}
    names, rows = log_of(tmp_path)
    assert names == ["step", *header.split()] and [row[0] for row in rows] == ["1", "3"]


def test_the_settings_reach_the_training_step(photos, tmp_path, cli, monkeypatch):
    def step(nets, *args):
        training.append(all(module.training for module in nets.modules()))
        return train_step(nets, *args)

    training, train_step, spies = [], aegan.train_step, {}
    for name in ("build_networks", "make_inputs", "train_step", "save_figures", "measure"):
        spies[name] = MagicMock(wraps=step if name == "train_step" else getattr(aegan, name))
        monkeypatch.setattr(aegan, name, spies[name])
    rates, weights = {"G": 1e-6, "E": 1e-6, "D_x": 2e-6, "D_z": 2e-6}, {"alpha": 3, "lambda_rx": 5, "lambda_rz": 6}
    settings = "--lr 1e-6 --lr-discriminator 2e-6 --alpha 3 --lambda-rx 5 --lambda-rz 6 --latent-dim 7".split()
    arguments = ["--data", photos, *TINY, "--steps", 3, *settings, "--out"]
    for run, more in ((tmp_path / "a", []), (tmp_path / "b", ["--no-flip", "--seed", 9])):
        assert cli(aegan, *arguments, run, *more).status == 0
    calls = {name: [call.args for call in spy.call_args_list] for name, spy in spies.items()}
    assert calls["build_networks"] == [("aegan", 16, 2, 7)] * 2 and training == [True] * 6
    assert [flip for _, _, flip in calls["make_inputs"]] == [True] * 3 + [False] * 3
    for nets, optimizer, model, given, x, z in calls["train_step"]:
        assert (model, x.shape, z.shape) == ("aegan", (4, 3, 16, 16), (4, 7)) and given == weights
        assert dict(zip(nets, (group["lr"] for group in optimizer.param_groups))) == rates
    assert [args[4] for args in calls["save_figures"]] == [2, 3] * 2
    z = torch.randn(256, 7, generator=torch.Generator().manual_seed(0))  # whatever the seed
    assert all(torch.equal(args[2], z) for args in calls["save_figures"] + calls["measure"])


def test_the_defaults_are_the_paper_s():
    args, _ = aegan.parse_args(["--out", "nowhere"])
    assert (args.steps, args.batch_size, args.image_size, args.latent_dim, args.channels) == (300_000, 16, 64, 32, 64)
    assert (args.lr, args.lr_discriminator, args.alpha, args.lambda_rx, args.lambda_rz) == (2e-4, 5e-4, 1, 10, 5)
    assert not args.no_flip and args.model == "aegan"
    quick, _ = aegan.parse_args(["--out", "nowhere", "--quick"])
    assert (quick.alpha, quick.lambda_rx, quick.lambda_rz) == (1 / 20, 10, 5 / 10)
