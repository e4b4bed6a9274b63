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

WEIGHTS = {"x_hat": 0.7, "x_tilde": 1.3, "z_hat": 0.4, "z_tilde": 1.9, "r_x": 10.0, "r_z": 5.0}
TERMS = {"aegan": set(WEIGHTS), "gan": {"x_hat"}, "aae": {"z_hat", "r_x"}}


def tiny(model="aegan", seed=0, **options):
    """Small networks in float64 with weights that let every gradient be seen, and a batch x, z."""
    torch.manual_seed(seed)
    nets = aegan.build_networks(model, **{"image_size": 16, "channels": 2, "latent_dim": 5, **options}).double()
    for parameter in nets.parameters():
        nn.init.normal_(parameter, std=0.4) if parameter.ndim < 4 else nn.init.normal_(parameter, std=0.2)
    return nets, torch.rand(4, 3, 16, 16).double() * 2 - 1, torch.randn(4, 5).double()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# ---------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("size", aegan.IMAGE_SIZES)
def test_shapes_and_ranges(size):
    nets = aegan.build_networks("aegan", size, 2, 7)
    x, z = torch.randn(3, 3, size, size), torch.randn(3, 7)
    assert nets["G"](z).shape == (3, 3, size, size) and nets["G"](100 * z).abs().max() <= 1
    assert nets["E"](x).shape == (3, 7) and nets["D_x"](x).shape == nets["D_z"](z).shape == (3, 1)


def test_weights_of_the_author_s_networks_counted_by_hand():
    def conv(c_in, c_out, kernel):
        return c_in * c_out * kernel * kernel + c_out

    widths = [3, 64, 64, 128, 128, 128, 256]
    norms = 2 * sum(widths[1:])
    e = sum(conv(a, b, 4) for a, b in zip(widths, widths[1:])) + norms + 4096 * 32 + 32
    d_x = sum(conv(a, b, 3) for a, b in zip(widths, widths[1:])) + norms + 4096 + 1
    g = (32 * 1024 + 1024 + 2 * 64) + (32 * 64 + 64 + 2 * 64)
    g += sum(conv(a + 64, b, 4) for a, b in ((64, 256), (256, 128), (128, 128), (128, 64), (64, 64), (64, 3)))
    g += 2 * (256 + 128 + 128 + 64 + 64)
    d_z = sum((32 + 16 * i) * 16 + 16 + 2 * 16 for i in range(16)) + (288 * 128 + 128) + (128 + 1)
    nets = aegan.build_networks("aegan", 64, 64, 32)
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    assert counts == {"G": g, "E": e, "D_x": d_x, "D_z": d_z}


@pytest.mark.parametrize("size, expected", [(64, [8, 16, 32, 64, 64, 64]), (32, [4, 8, 16, 32, 32, 32])])
def test_the_style_vector_joins_every_layer_at_its_scale(size, expected):
    net, sizes = aegan.Generator(size, 2, 5), []
    z = torch.randn(3, 5)
    style = net.style(z)

    def hook(_, inputs, output):
        h = inputs[0]
        assert torch.equal(h[:, -2:], style[:, :, None, None].expand(-1, -1, *h.shape[2:]))
        if h.shape[-1] == 2 * ([4] + sizes)[-1]:
            assert torch.equal(h[..., ::2, ::2], h[..., 1::2, 1::2])  # nearest neighbours
        sizes.append(output.shape[-1])

    for layer in net.layers:
        layer.register_forward_hook(hook)
    net(z)
    assert sizes == expected


@pytest.mark.parametrize("size, expected", [(64, [32, 16, 8, 4, 4, 4]), (16, [8, 4, 4, 4, 4, 4])])
def test_strides_of_the_encoder_and_the_image_discriminator(size, expected):
    for net in (aegan.Encoder(size, 2, 5), aegan.ImageDiscriminator(size, 2)):
        sizes = []
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(lambda *args, sizes=sizes: sizes.append(args[2].shape[-1]))
        net(torch.zeros(1, 3, size, size))
        assert sizes == expected


@pytest.mark.parametrize("kernel, stride, before, after", [(4, 2, 1, 1), (4, 1, 1, 2), (3, 2, 0, 1), (3, 1, 1, 1)])
def test_same_padding_is_that_of_keras(kernel, stride, before, after):
    layer, x = aegan.same_conv(2, 3, kernel, stride).double(), torch.randn(2, 2, 8, 8).double()
    weight, bias = (p.detach().numpy() for p in layer.parameters())
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (before, after), (before, after)))
    expected = np.empty((2, 3, 8 // stride, 8 // stride))
    for n, c, i, j in np.ndindex(expected.shape):
        window = padded[n, :, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
        expected[n, c, i, j] = (window * weight[c]).sum() + bias[c]
    np.testing.assert_allclose(layer(x).detach().numpy(), expected)


def test_layer_norm_is_over_channels_at_each_pixel():
    x = torch.randn(2, 5, 3, 3)
    layer = aegan.ChannelNorm(5)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    a = x.numpy()
    expected = (a - a.mean(1, keepdims=True)) / np.sqrt(a.var(1, keepdims=True) + 1e-3)
    expected = expected * layer.weight.detach().numpy()[:, None, None] + layer.bias.detach().numpy()[:, None, None]
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-5)


def test_noise_is_of_the_published_size_and_only_in_training():
    x = torch.full((200, 500), 3.0)
    add, multiply = aegan.AddNoise(), aegan.MultiplyNoise()
    assert (add(x) - x).std().item() == pytest.approx(0.01, rel=0.02) and (add(x) - x).mean().abs() < 1e-3
    assert (multiply(x) / x - 1).std().item() == pytest.approx(math.sqrt(0.005 / 0.995), rel=0.02)
    assert (multiply(x) / x).mean().item() == pytest.approx(1, abs=1e-3)
    assert torch.equal(add.eval()(x), x) and torch.equal(multiply.eval()(x), x)


@pytest.mark.parametrize("name, noisy", [("G", 0), ("E", 7), ("D_x", 7), ("D_z", 18)])
def test_which_networks_are_noisy(name, noisy):
    nets, x, z = tiny()
    net, inputs = nets[name], z if name in ("G", "D_z") else x
    assert sum(isinstance(layer, aegan.AddNoise | aegan.MultiplyNoise) for layer in net.modules()) == noisy
    assert torch.equal(net(inputs), net(inputs)) == (noisy == 0)
    assert torch.equal(net.eval()(inputs), net(inputs))


def leaky(h, slope):
    return torch.where(h > 0, h, slope * h)


def norm(h, layer):
    """Layer norm over dimension 1, with the weights of the given layer."""
    h = (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, unbiased=False) + 1e-3).sqrt()
    shape = (-1,) + (1,) * (h.ndim - 2)
    return h * layer.weight.view(shape) + layer.bias.view(shape)


@pytest.mark.parametrize("name, slope", [("E", 0), ("D_x", 0.02)])
def test_the_encoder_and_the_image_discriminator_layer_by_layer(name, slope):
    nets, x, _ = tiny()
    net = nets[name].eval()
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in net.modules() if isinstance(m, nn.LayerNorm)]
    (dense,) = [m for m in net.modules() if isinstance(m, nn.Linear)]
    h, kernel = x, {"E": 4, "D_x": 3}[name]
    for i, (conv, layer) in enumerate(zip(convs, norms, strict=True)):
        pads = kernel - (2 if i < 2 else 1)
        h = F.pad(h, (pads // 2, pads - pads // 2) * 2)
        h = leaky(norm(F.conv2d(h, conv.weight, conv.bias, stride=2 if i < 2 else 1), layer), slope)
    torch.testing.assert_close(net(x), F.linear(h.flatten(1), dense.weight, dense.bias))


def test_the_generator_layer_by_layer():
    nets, _, z = tiny()
    net = nets["G"]
    h = norm(F.linear(z, net.trunk[0].weight, net.trunk[0].bias).view(4, 2, 4, 4), net.trunk[2]).relu()
    style = norm(F.linear(z, net.style[0].weight, net.style[0].bias), net.style[1]).relu()
    for scale, layer in zip((1, 1, 2, 2, 1, 1), net.layers, strict=True):
        h = torch.cat([h, style[:, :, None, None].expand(4, 2, *h.shape[2:])], 1)
        h = F.pad(h.repeat_interleave(scale, 2).repeat_interleave(scale, 3), (1, 2, 1, 2))
        h = F.conv2d(h, layer[0][1].weight, layer[0][1].bias)
        h = norm(h, layer[1]).relu() if len(layer) == 3 else h.tanh()
    assert h.abs().max() > 0.9
    torch.testing.assert_close(net(z), h)


def test_every_layer_of_the_latent_discriminator_sees_all_before_it():
    nets, _, z = tiny()
    net = nets["D_z"].eval()
    h = z
    for layer in net.layers:
        out = F.layer_norm(layer[0](h), (16,), layer[1].weight, layer[1].bias, 1e-3)
        h = torch.cat([h, torch.where(out > 0, out, 0.02 * out)], 1)
    assert len(net.layers) == 16 and h.shape == (4, 5 + 256)
    torch.testing.assert_close(net(z), net.logit(F.leaky_relu(net.hidden[0](h), 0.02)))


def test_initial_weights():
    nets = aegan.build_networks("aegan", 64, 16, 32)
    convs = [m for m in nets.modules() if isinstance(m, nn.Conv2d)]
    dense = [m for m in nets.modules() if isinstance(m, nn.Linear)]
    assert len(convs) == 18 and all(m.weight.std().item() == pytest.approx(0.02, rel=0.1) for m in convs)
    assert all((m.bias == 0).all() for m in convs + dense)
    for m in dense:
        assert m.weight.abs().max() <= math.sqrt(6 / sum(m.weight.shape)) + 1e-6


def test_the_baselines_share_the_parts_of_the_model():
    torch.manual_seed(3)
    whole = aegan.build_networks("aegan", 16, 2, 5)
    for model, names in (("gan", {"G", "D_x"}), ("aae", {"G", "E", "D_z"})):
        torch.manual_seed(3)
        part = aegan.build_networks(model, 16, 2, 5)
        assert set(part) == names
        for name, net in part.items():
            assert_same(dict(net.state_dict()), dict(whole[name].state_dict()), name)


# ------------------------------------------------------------------------------------------------------------ losses


def test_discriminator_loss_eq_2_to_5():
    d_real, d_fake = torch.randn(6, 1).double(), torch.randn(6, 1).double()
    p, q = sigmoid(d_real.numpy()), sigmoid(d_fake.numpy())
    expected = -np.mean(0.95 * np.log(p) + 0.05 * np.log(1 - p)) - np.mean(0.05 * np.log(q) + 0.95 * np.log(1 - q))
    assert aegan.discriminator_loss(d_real, d_fake).item() == pytest.approx(expected)
    torch.autograd.gradcheck(aegan.discriminator_loss, (d_real.requires_grad_(), d_fake.requires_grad_()))


def test_discriminator_loss_is_least_at_the_labels():
    best = math.log(0.95 / 0.05)
    entropy = -0.95 * math.log(0.95) - 0.05 * math.log(0.05)
    at = [
        aegan.discriminator_loss(*torch.tensor([[best + a], [-best + b]])).item()
        for a, b in product((-1, 0, 1), repeat=2)
    ]
    assert at[4] == min(at) == pytest.approx(2 * entropy)


def test_generator_loss_eq_2_to_5():
    d_fake = torch.randn(6, 1).double()
    assert aegan.generator_loss(d_fake).item() == pytest.approx(-np.mean(np.log(sigmoid(d_fake.numpy()))))
    torch.autograd.gradcheck(aegan.generator_loss, d_fake.requires_grad_())
    (gradient,) = torch.autograd.grad(aegan.generator_loss(d_fake), d_fake)
    assert (gradient < 0).all()  # G and E want D to say "real"


def test_reconstruction_losses_eq_6():
    x_tilde, x = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    z_tilde, z = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    image, latent = aegan.image_reconstruction_loss, aegan.latent_reconstruction_loss
    assert image(x_tilde, x).item() == pytest.approx(np.abs(x_tilde.numpy() - x.numpy()).mean())
    assert latent(z_tilde, z).item() == pytest.approx(((z_tilde.numpy() - z.numpy()) ** 2).mean())
    assert image(x, x) == latent(z, z) == 0
    torch.autograd.gradcheck(image, (x_tilde.requires_grad_(), x))
    torch.autograd.gradcheck(latent, (z_tilde.requires_grad_(), z))


def test_total_loss_eq_7():
    terms = {name: torch.rand((), dtype=torch.double, requires_grad=True) for name in WEIGHTS}
    loss = aegan.total_loss(terms, WEIGHTS)
    assert loss.item() == pytest.approx(sum(WEIGHTS[name] * terms[name].item() for name in WEIGHTS))
    gradients = torch.autograd.grad(loss, list(terms.values()))
    assert {name: g.item() for name, g in zip(terms, gradients)} == WEIGHTS


@pytest.mark.parametrize("model", aegan.MODELS)
def test_all_losses_against_numpy(model):
    nets, x, z = tiny(model)
    nets.eval()
    losses = {k: v.item() for k, v in aegan.all_losses(nets, x, z, WEIGHTS).items()}
    everything, _, _ = tiny("aegan")  # the terms are those of the whole model
    G, E, D_x, D_z = (nets[name] if name in nets else everything[name].eval() for name in ("G", "E", "D_x", "D_z"))
    with torch.no_grad():
        x_hat, z_hat = G(z), E(x)
        x_tilde, z_tilde = G(z_hat), E(x_hat)
        fakes = {"x_hat": D_x(x_hat), "x_tilde": D_x(x_tilde), "z_hat": D_z(z_hat), "z_tilde": D_z(z_tilde)}
        p_x, p_z = sigmoid(D_x(x).numpy()), sigmoid(D_z(z).numpy())
    expected = {name: -np.log(sigmoid(d.numpy())).mean() for name, d in fakes.items()}
    expected |= {"r_x": (x_tilde - x).abs().mean().item(), "r_z": ((z_tilde - z) ** 2).mean().item()}
    expected = {name: value for name, value in expected.items() if name in TERMS[model]}
    expected["G_E"] = sum(WEIGHTS[name] * value for name, value in expected.items())
    for name, p in (("D_x", p_x), ("D_z", p_z)):
        mine = [d for key, d in fakes.items() if key in TERMS[model] and key[0] == name[-1]]
        if name in nets:
            qs = [sigmoid(d.numpy()) for d in mine]
            real = -(0.95 * np.log(p) + 0.05 * np.log(1 - p)).mean()
            expected[name] = len(qs) * real + sum(-(0.05 * np.log(q) + 0.95 * np.log(1 - q)).mean() for q in qs)
    assert losses == pytest.approx(expected)


@pytest.mark.parametrize(
    "name, reached",
    [
        ("x_hat", {"G", "D_x"}),
        ("x_tilde", {"G", "E", "D_x"}),
        ("z_hat", {"E", "D_z"}),
        ("z_tilde", {"G", "E", "D_z"}),
        ("r_x", {"G", "E"}),
        ("r_z", {"G", "E"}),
        ("D_x", {"G", "E", "D_x"}),
        ("D_z", {"G", "E", "D_z"}),
    ],
)
def test_which_networks_a_loss_reaches(name, reached):
    nets, x, z = tiny()
    loss = aegan.all_losses(nets, x, z, WEIGHTS)[name]
    for net in nets:
        gradients = torch.autograd.grad(loss, list(nets[net].parameters()), retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in gradients) == (net in reached), net


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("model", aegan.MODELS)
def test_train_step_against_autograd_by_hand(model):
    nets, _, _ = tiny(model)
    nets.eval()  # without noise
    other, _, _ = tiny(model)
    other.eval()
    optimizers = aegan.build_optimizers(nets, 2e-4, 5e-4)
    assert set(optimizers) == {"G_E"} | set(nets) & {"D_x", "D_z"}
    bce = F.binary_cross_entropy_with_logits

    def d_loss(D, real, *fakes):
        d = D(real)
        return sum(bce(d, 0 * d + 0.95) + bce(D(fake.detach()), 0 * d + 0.05) for fake in fakes)

    moments, clipped = {}, []
    for i in range(3):
        torch.manual_seed(10 + i)
        x, z = torch.rand(4, 3, 16, 16).double() * 2 - 1, torch.randn(4, 5).double()
        losses = aegan.train_step(nets, optimizers, x, z, WEIGHTS)
        G, E, D_x, D_z = (other[name] if name in other else None for name in ("G", "E", "D_x", "D_z"))
        one = torch.ones(4, 1).double()
        x_hat = G(z)
        if model == "gan":
            loss = {"D_x": d_loss(D_x, x, x_hat), "G_E": 0.7 * bce(D_x(x_hat), one)}
        elif model == "aae":
            z_hat = E(x)
            loss = {"D_z": d_loss(D_z, z, z_hat), "G_E": 0.4 * bce(D_z(z_hat), one) + 10 * (G(z_hat) - x).abs().mean()}
        else:
            z_hat = E(x)
            x_tilde, z_tilde = G(z_hat), E(x_hat)
            loss = {"D_x": d_loss(D_x, x, x_hat, x_tilde), "D_z": d_loss(D_z, z, z_hat, z_tilde)}
            loss["G_E"] = 0.7 * bce(D_x(x_hat), one) + 1.3 * bce(D_x(x_tilde), one)
            loss["G_E"] += 0.4 * bce(D_z(z_hat), one) + 1.9 * bce(D_z(z_tilde), one)
            loss["G_E"] += 10 * (x_tilde - x).abs().mean() + 5 * ((z_tilde - z) ** 2).mean()
        players = {"D_x": ["D_x"], "D_z": ["D_z"], "G_E": ["G", "E"]}
        updates = []
        for name, value in loss.items():
            assert losses[name].item() == pytest.approx(value.item()) and not losses[name].requires_grad
            parameters = [p for net in players[name] if net in other for p in other[net].parameters()]
            gradients = torch.autograd.grad(value, parameters, retain_graph=True)
            clipped += [g.norm().item() > 1 for g in gradients]
            gradients = [g * min(1, 1 / g.norm().item()) for g in gradients]
            zeros = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
            updates.append(
                (parameters, gradients, 2e-4 if name == "G_E" else 5e-4, moments.setdefault(name, [0, *zeros]))
            )
        for update in updates:
            adam_by_hand(*update)
    assert not all(clipped) and (any(clipped) or model == "gan")
    for (name, a), b in zip(nets.named_parameters(), other.parameters()):
        torch.testing.assert_close(a, b, msg=name, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("model", aegan.MODELS)
def test_train_step_never_reads_a_tensor_back(model, monkeypatch):
    nets, images = aegan.build_networks(model, 16, 2, 5), draw_faces(8, 16)[0]
    optimizers = aegan.build_optimizers(nets, 2e-4, 5e-4)
    refuse_reading_back(monkeypatch)
    aegan.train_step(nets, optimizers, *aegan.draw_batch(images[:4], 5, True), WEIGHTS)


def test_batches_are_the_images_half_of_them_mirrored_and_normal_latents():
    images = draw_faces(10, 16)[0].repeat(50, 1, 1, 1)
    torch.manual_seed(0)
    x, z = aegan.draw_batch(images, 7, flip=True)
    same, mirrored = ((x == y).flatten(1).all(1) for y in (to_float(images), to_float(images).flip(-1)))
    assert (same ^ mirrored).all() and 200 < mirrored.sum() < 300 and z.shape == (500, 7)
    assert abs(z.mean()) < 0.1 and z.std().item() == pytest.approx(1, abs=0.1)
    x, _ = aegan.draw_batch(images, 7, flip=False)
    assert torch.equal(x, to_float(images))


# -------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("model", aegan.MODELS)
def test_measure_against_numpy(model):
    torch.manual_seed(0)
    images = torch.randint(256, (1400, 3, 16, 16), dtype=torch.uint8)
    data = Data(images[:1100] // 2, images[1100:], (), None, None)
    nets, z = aegan.build_networks(model, 16, 2, 5), torch.randn(20, 5)
    results = aegan.measure(nets, data, z)
    assert all(net.training for net in nets.values())
    x = data.heldout.numpy() / 127.5 - 1
    assert results["heldout_l1_of_mean_image"] == pytest.approx(
        np.abs(x - (data.train.numpy() / 127.5 - 1).mean(0)).mean()
    )
    nets.eval()
    with torch.no_grad():
        x_hat = nets["G"](z)
        assert results["sample_diversity"] == pytest.approx(aegan.sample_diversity(x_hat, to_float(data.heldout[:20])))
        if model == "gan":
            assert results["heldout_l1"] is results["latent_mse"] is None
        else:
            x_tilde = nets["G"](nets["E"](to_float(data.heldout)))
            assert results["heldout_l1"] == pytest.approx(np.abs(x_tilde.numpy() - x).mean(), rel=1e-5)
            assert results["latent_mse"] == pytest.approx(((nets["E"](x_hat) - z) ** 2).mean().item(), rel=1e-4)


def test_figures_show_what_they_say(monkeypatch, tmp_path):
    """With G and E such that G(E(x)) is x's mean colour, one can tell from the saved arguments what stands where."""
    shown = {}
    monkeypatch.setattr(
        aegan, "save_grid", lambda path, *images, **options: shown.update({path.name: (images, options)})
    )
    nets = nn.ModuleDict({"G": nn.Module(), "E": nn.Module()})
    nets["E"].forward = lambda x: x.mean((2, 3))
    nets["G"].forward = lambda z: z[:, :3, None, None].expand(-1, -1, 16, 16)
    images = draw_faces(12, 16)[0]
    data, z = Data(images[:2], images[2:], (), None, None), torch.randn(256, 3)
    aegan.save_figures(nets, data, z, tmp_path)
    x = to_float(data.heldout)
    assert set(shown) == {"figure1_interpolations.png", "figure3_samples.png", "figure4_reconstructions.png"}
    assert torch.equal(shown["figure3_samples.png"][0][0], nets["G"](z[:100]))
    originals, reconstructions = shown["figure4_reconstructions.png"][0]
    assert len(originals) == 40 and torch.equal(originals[:10], x) and torch.equal(originals[30:], x)
    torch.testing.assert_close(reconstructions[:10], x.mean((2, 3), keepdim=True).expand_as(x))
    (grid,), options = shown["figure1_interpolations.png"]
    rows = grid.view(5, options["columns"], 3, 16, 16)
    for row, (first, last) in zip(
        rows, [(x[0], x[1]), (x[2], x[3]), (x[4], x[5]), (x[6], x[7]), (x[8], x[8].flip(-1))]
    ):
        assert torch.equal(row[0], first) and torch.equal(row[-1], last)
        ends = first.mean((1, 2)), last.mean((1, 2))
        for i, image in enumerate(row[1:-1]):
            torch.testing.assert_close(image[:, 0, 0], ends[0] + (ends[1] - ends[0]) * i / (len(row) - 3))
    aegan.save_figures(nets, data, z, tmp_path, step=70)
    assert {"samples_70.png", "reconstructions_70.png"} <= set(shown) and len(shown) == 5


# ------------------------------------------------------------------------------------------------------ command line


def test_a_run_as_a_user_starts_it(photos, tmp_path):
    pictures = {f"samples_{step}": (10, 10, 1) for step in (2, 4, 5)}
    pictures |= {f"reconstructions_{step}": (5, 8, 2) for step in (2, 4, 5)}
    pictures |= {"figure1_interpolations": (10, 5, 1), "figure3_samples": (10, 10, 1)}
    pictures |= {"figure4_reconstructions": (5, 8, 2)}
    arguments = ["--data", photos, *TINY, "--steps", 5]
    out, results, header, _ = run_as_a_user("aegan", *arguments, cwd=tmp_path, pictures=pictures)
    assert results["config"]["channels"] == 2 and out.startswith("aegan on ")
    for name in ("heldout_l1", "heldout_l1_of_mean_image", "latent_mse", "sample_diversity"):
        assert 0 < results[name] < 10 and f"{name:26}{results[name]:10.3f}" in out
    assert header == ["D_x", "D_z", "G_E", "r_x", "r_z", "x_hat", "x_tilde", "z_hat", "z_tilde"]


@pytest.mark.parametrize("model", ["gan", "aae"])
def test_the_baselines_write_what_they_can(model, photos, tmp_path, cli):
    run = tmp_path / model
    result = cli(aegan, "--model", model, "--data", photos, *TINY, "--steps", 2, "--out", run)
    assert result.status == 0, result
    results, names = json.loads((run / "results.json").read_text()), files(run)
    assert (results["heldout_l1"] is None) == (results["latent_mse"] is None) == (model == "gan")
    assert ("figure4_reconstructions.png" in names) == ("figure1_interpolations.png" in names) == (model == "aae")
    assert "figure3_samples.png" in names and results["config"]["model"] == model
    assert (
        log_of(run)[0] == ["step", "D_x", "G_E", "x_hat"] if model == "gan" else ["step", "D_z", "G_E", "r_x", "z_hat"]
    )


def test_the_settings_reach_the_training_step(photos, tmp_path, cli, monkeypatch):
    def spy(nets, optimizers, x, z, weights):
        seen.append((x.shape, z.shape, weights, {name: o.param_groups[0]["lr"] for name, o in optimizers.items()}))
        return train_step(nets, optimizers, x, z, weights)

    seen, flips, vectors, train_step, draw_batch = [], [], [], aegan.train_step, aegan.draw_batch
    monkeypatch.setattr(aegan, "train_step", spy)
    monkeypatch.setattr(aegan, "draw_batch", lambda *args: flips.append(args[2]) or draw_batch(*args))
    monkeypatch.setattr(aegan, "save_figures", lambda nets, data, z, *args: vectors.append(z))
    settings = (
        "--lr 1 --lr-discriminator 2 --lambda-ax 3 --lambda-az 4 --lambda-rx 5 --lambda-rz 6 --latent-dim 7".split()
    )
    for i, more in enumerate(([], ["--no-flip", "--seed", 9])):
        cli(aegan, "--data", photos, *TINY, "--steps", 1, "--out", tmp_path / str(i), *settings, *more)
    weights = {"x_hat": 3, "x_tilde": 3, "z_hat": 4, "z_tilde": 4, "r_x": 5, "r_z": 6}
    assert seen == [((4, 3, 16, 16), (4, 7), weights, {"D_x": 2, "D_z": 2, "G_E": 1})] * 2 and flips == [True, False]
    assert all(torch.equal(z, vectors[0]) for z in vectors) and len(vectors) == 4  # the same vectors whatever the seed


def test_the_defaults_are_the_paper_s():
    args, _ = aegan.parse_args(["--out", "nowhere"])
    assert (args.steps, args.batch_size, args.image_size, args.latent_dim, args.channels) == (300_000, 16, 64, 32, 64)
    assert (args.lr, args.lr_discriminator, args.lambda_rx, args.lambda_rz) == (2e-4, 5e-4, 10, 5)
    assert args.lambda_ax == args.lambda_az == 1 and not args.no_flip and args.model == "aegan"


# -------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_a_step_never_waits_for_the_device():
    nets, images = aegan.build_networks("aegan", 16, 4, 5).cuda(), draw_faces(40, 16)[0].cuda()
    optimizers = aegan.build_optimizers(nets, 2e-4, 5e-4)
    for _ in range(3):
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses = aegan.train_step(nets, optimizers, *aegan.draw_batch(images[:4], 5, True), WEIGHTS)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(loss.isfinite() and loss.device.type == "cuda" for loss in losses.values())
