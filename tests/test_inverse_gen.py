import colorsys
import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    TINY,
    adam_by_hand,
    assert_refused,
    assert_same,
    files,
    graphs_on_the_cpu,
    load,
    log_of,
    refuse_reading_back,
    run_as_a_user,
)
from PIL import Image
from torch import nn

import inverse_gen
from common import Data, draw_faces, load_data, read_image

SMALL = [*TINY, "--gan-steps", 2]
NAMES = ("codes", "dhash", "phash", "colour_histogram")
CHANGES = ("colour", "sunglasses", "blur", "crop")


def tiny(method="aegan", size=16):
    """Small networks in float64 with weights that let every gradient be seen, and a batch of 6 images, 4 latents."""
    torch.manual_seed(0)
    nets = inverse_gen.build_networks(method, size, 2, 5).double()
    for parameter in nets.parameters():
        nn.init.normal_(parameter, std=0.3)
    return nets, torch.rand(6, 3, size, size).double(), torch.rand(4, 5).double() * 2 - 1


def log_sigmoid(x):
    return -np.log(1 + np.exp(-np.asarray(x)))


# ---------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("size", [16, 32, 64])
def test_shapes_and_ranges(size):
    nets = inverse_gen.build_networks("bigan", size, 2, 7)
    x, z = torch.rand(3, 3, size, size), torch.rand(3, 7) * 2 - 1
    images = inverse_gen.generate(nets["G"], z)
    assert images.shape == x.shape and 0 < images.min() < images.max() < 1
    assert nets["IG"](x).shape == z.shape and nets["D"](x, z).shape == (3, 1)
    assert inverse_gen.build_networks("aegan", size, 2, 7)["D"](x).shape == (3, 1)


def test_weights_of_the_tables_counted_by_hand():
    norms = 2 * (64 + 128 + 256 + 512)
    convs = 25 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512)
    count = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
    nets = inverse_gen.build_networks("aegan", 64, 64, 100)
    assert count(nets["G"]) == 100 * 8192 + convs + 3 + norms  # Table 3
    assert count(nets["D"]) == convs + norms + 8192 + 1  # Table 4
    assert count(nets["IG"]) == convs + norms + 8192 * 100 + 100  # Table 5
    of_x = 25 * (3 * 64 + 64 * 128 + 128 * 256) + 2 * (64 + 128 + 256)
    of_both = 25 * (356 * 512 + 512 * 512 + 512 * 512) + 3 * 2 * 512
    assert count(inverse_gen.build_networks("bigan", 64, 64, 100)["D"]) == of_x + of_both + 512 + 1  # Table 6


def test_what_the_layers_compute():
    """Tables 3 to 6 by hand, with the averages of the batch in batch norm."""
    nets, x, z = tiny("bigan", 32)
    nets["D_x"], x = tiny("aegan", 32)[0]["D"], x[:4]
    p = dict(nets.named_parameters())

    def norm(y, name):
        variance, mean = torch.var_mean(y, (0, 2, 3), correction=0, keepdim=True)
        weight, bias = p[f"{name}.weight"][:, None, None], p[f"{name}.bias"][:, None, None]
        return weight * (y - mean) / (variance + 1e-5).sqrt() + bias

    def convs(y, name, count, slope):
        for i in range(0, 3 * count, 3):
            y = norm(F.conv2d(y, p[f"{name}.{i}.weight"], stride=2, padding=2), f"{name}.{i + 1}")
            y = torch.where(y > 0, y, slope * y)
        return y

    def linear(y, name):
        return y.flatten(1) @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    y = (z @ p["G.0.weight"].T).view(4, 8, 4, 4)
    for i in (2, 5, 8):
        bias = p["G.10.bias"] if i == 8 else None
        y = F.conv_transpose2d(norm(y, f"G.{i}").clamp(min=0), p[f"G.{i + 2}.weight"], bias, 2, 2, 1)
    torch.testing.assert_close(nets["G"](z), y)
    torch.testing.assert_close(inverse_gen.generate(nets["G"], z), 1 / (1 + torch.exp(-y)))
    torch.testing.assert_close(nets["D_x"](x), linear(convs(x, "D_x.0", 3, 0.2), "D_x.2"))
    torch.testing.assert_close(nets["IG"](x), linear(convs(x, "IG.0", 3, 0), "IG.2").tanh())
    both = torch.cat([convs(x, "D.of_x", 2, 0.2), z[:, :, None, None].repeat(1, 1, 8, 8)], 1)
    torch.testing.assert_close(nets["D"](x, z), linear(convs(both, "D.of_both", 3, 0.2), "D.logit"))


@pytest.mark.parametrize("method", ["aegan", "direct", "bigan", "search"])
def test_networks_of_a_method_and_their_initial_weights(method):
    nets = inverse_gen.build_networks(method, 64, 16, 100)
    assert set(nets) == {"G", "D"} | ({"IG"} if method != "search" else set()) and nets.training
    assert isinstance(nets["D"], inverse_gen.PairDiscriminator) == (method == "bigan")
    for name, weight in nets.named_parameters():
        if weight.ndim > 1 and weight.numel() > 1000:
            assert 0.0185 < weight.std() < 0.0215 and abs(weight.mean()) < 0.002, name
        elif weight.ndim == 1:
            batch_norm_s = name.replace("bias", "running_mean") in nets.state_dict() or name.endswith(".weight")
            assert (weight == (1 if batch_norm_s and name.endswith("weight") else 0)).all(), name


def test_what_there_is_not_is_refused():
    for method, size, words in (("vae", 16, "vae.*aegan.*search"), ("aegan", 48, "48.*16, 32, 64")):
        with pytest.raises(ValueError, match=words):
            inverse_gen.build_networks(method, size, 2, 5)
    nets, x, z = tiny("search")
    before = copy.deepcopy(nets.eval().state_dict())
    with pytest.raises(ValueError, match="search.*gan.*aegan.*direct.*bigan"):
        inverse_gen.train_step(nets, inverse_gen.build_optimizer(nets, 1.0), "search", x, z)
    assert not nets["G"].training
    assert_same(before, nets.state_dict())


# ------------------------------------------------------------------------------------------------------------ losses


def test_adversarial_losses_eq_1_and_4():
    real, fake = 3 * torch.randn(2, 6, 1).double()
    d = -log_sigmoid(real).mean() - log_sigmoid(-fake).mean()
    assert inverse_gen.discriminator_loss(real, fake).item() == pytest.approx(d)
    assert inverse_gen.generator_loss(fake).item() == pytest.approx(-log_sigmoid(fake).mean())
    zero = torch.zeros(6, 1)
    assert inverse_gen.discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert inverse_gen.discriminator_loss(zero + 50, zero - 50) < 1e-9 > inverse_gen.generator_loss(zero + 50)
    assert inverse_gen.discriminator_loss(zero - 500, zero + 500) == 1000 == 2 * inverse_gen.generator_loss(zero - 500)
    torch.autograd.gradcheck(inverse_gen.discriminator_loss, (real.requires_grad_(), fake.requires_grad_()))
    torch.autograd.gradcheck(inverse_gen.generator_loss, fake)


def test_cross_entropy_eq_5():
    logits, x = 3 * torch.randn(2, 3, 4, 4).double(), torch.rand(2, 3, 4, 4).double()
    x_prime = 1 / (1 + np.exp(-logits.numpy()))
    expected = (-x.numpy() * np.log(x_prime) - (1 - x.numpy()) * np.log(1 - x_prime)).mean()
    assert inverse_gen.cross_entropy(logits, x).item() == pytest.approx(expected)
    torch.autograd.gradcheck(inverse_gen.cross_entropy, (logits.requires_grad_(), x))
    best = torch.logit(x).requires_grad_()
    (gradient,) = torch.autograd.grad(inverse_gen.cross_entropy(best, x), best)
    assert gradient.abs().max() < 1e-12 and inverse_gen.cross_entropy(best, x) < inverse_gen.cross_entropy(logits, x)
    far = torch.full((1, 3, 4, 4), 500.0)  # where log(1 - sigmoid) would be infinite
    assert inverse_gen.cross_entropy(far, torch.zeros_like(far)) == 500
    assert inverse_gen.cross_entropy(far, torch.ones_like(far)) == 0


@torch.no_grad()
def test_losses_of_the_stages_against_numpy_of_6_images_and_4_latents():
    nets, x, z = tiny()
    nets["pairs"] = tiny("bigan")[0]["D"]
    G, D, IG, pairs = nets.eval().values()
    generated = torch.from_numpy(np.exp(log_sigmoid(G(z))))
    real, fake, q, p = D(x), D(generated), pairs(x, IG(x)), pairs(generated, z)
    logits, z_prime = G(IG(generated)), IG(generated)
    entropy = (-generated.numpy() * log_sigmoid(logits) - (1 - generated.numpy()) * log_sigmoid(-logits)).mean()
    expected = {
        "gan": {"L_D": -log_sigmoid(real).mean() - log_sigmoid(-fake).mean(), "L_G": -log_sigmoid(fake).mean()},
        "bigan": {
            "L_D": -log_sigmoid(q).mean() - log_sigmoid(-p).mean(),
            "L_G": -log_sigmoid(-q).mean() - log_sigmoid(p).mean(),
        },
        "aegan": {"L_IG": entropy},
        "direct": {"L_IG": ((z - z_prime).numpy() ** 2).mean()},
    }
    assert inverse_gen.LOSSES.keys() == expected.keys()
    for stage, values in expected.items():
        losses = inverse_gen.LOSSES[stage]({**nets, "D": pairs} if stage == "bigan" else nets, x, z)
        assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(values), stage


def test_what_inverts_g_exactly_is_the_minimum():
    nets, x, z = tiny()
    perfect = {"G": nets["G"].eval(), "IG": lambda images: z}
    assert inverse_gen.direct_losses(perfect, x, z)["L_IG"] == 0
    p = inverse_gen.generate(nets["G"], z)
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    assert inverse_gen.aegan_losses(perfect, x, z)["L_IG"].item() == pytest.approx(entropy.item())
    for loss in (inverse_gen.direct_losses, inverse_gen.aegan_losses):
        assert loss({**perfect, "IG": lambda images: 0.9 * z}, x, z)["L_IG"] > loss(perfect, x, z)["L_IG"]


@pytest.mark.parametrize(
    "stage, name, reached",
    [
        ("gan", "L_D", {"G", "D"}),
        ("gan", "L_G", {"G", "D"}),
        ("bigan", "L_D", {"G", "D", "IG"}),
        ("bigan", "L_G", {"G", "D", "IG"}),
        ("direct", "L_IG", {"IG"}),
        ("aegan", "L_IG", {"IG", "G"}),  # through G, which the step does not update
    ],
)
def test_which_networks_a_loss_reaches(stage, name, reached):
    nets, x, z = tiny("bigan" if stage == "bigan" else "aegan")
    nets["IG"].register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0].requires_grad))
    seen, loss = [], inverse_gen.LOSSES[stage](nets, x, z)[name]
    for net in nets:
        gradients = torch.autograd.grad(loss, list(nets[net].parameters()), retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in gradients) == (net in reached), net
    assert not any(seen)  # IG's images have no gradient


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "stages", [["gan"] * 3, ["bigan"] * 3, ["aegan"] * 3, ["direct"] * 3, ["gan", "aegan", "gan", "direct", "gan"]]
)
def test_train_step_against_autograd_by_hand(stages):
    nets, _, _ = tiny(stages[0])if stages[0] != "gan" else tiny()
    optimizer = inverse_gen.build_optimizer(nets, 1e-3)
    nets.eval()  # as a figure leaves them
    other, moments, log = copy.deepcopy(nets).train(), {}, F.logsigmoid
    G, D, IG = other["G"], other["D"], other["IG"]
    for i, stage in enumerate(stages):
        torch.manual_seed(10 + i)
        x, z = torch.rand(4, 3, 16, 16).double(), torch.rand(4, 5).double() * 2 - 1
        losses = inverse_gen.train_step(nets, optimizer, stage, x, z)
        G.train(stage in ("gan", "bigan"))
        image = G(z).sigmoid()
        if stage == "gan":
            real, fake = D(x), D(image)
            values = {"L_D": (-log(real).mean() - log(-fake).mean(), [D]), "L_G": (-log(fake).mean(), [G])}
        elif stage == "bigan":
            q, p = D(torch.cat([x, image]), torch.cat([IG(x), z])).chunk(2)
            values = {"L_D": (-log(q).mean() - log(-p).mean(), [D]), "L_G": (-log(-q).mean() - log(p).mean(), [G, IG])}
        elif stage == "aegan":
            logits, image = G(IG(image.detach())), image.detach()
            values = {"L_IG": (-(image * log(logits) + (1 - image) * log(-logits)).mean(), [IG])}
        else:
            values = {"L_IG": ((IG(image.detach()) - z).square().mean(), [IG])}
        assert losses.keys() == values.keys()
        updates = []
        for name, (value, players) in values.items():
            assert losses[name].item() == pytest.approx(value.item()) and not losses[name].requires_grad
            parameters = [p for player in players for p in player.parameters()]
            gradients = torch.autograd.grad(value, parameters, retain_graph=True)
            zeros = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
            updates.append((parameters, gradients, 1e-3, moments.setdefault(name, [0, *zeros])))
        for update in updates:
            adam_by_hand(*update)
    state = other.state_dict()
    for name, value in nets.state_dict().items():
        torch.testing.assert_close(value, state[name], atol=1e-8, rtol=1e-6, msg=name)


@pytest.mark.parametrize("stage", ["aegan", "direct"])
def test_where_ig_is_trained_g_and_d_and_their_moments_stay_as_they_are(stage):
    nets, x, z = tiny()
    optimizer = inverse_gen.build_optimizer(nets, 1e-2)
    modes = lambda: {name: {m.training for m in net.modules()} for name, net in nets.items()}  # noqa: E731
    parts = lambda: {  # noqa: E731
        name: copy.deepcopy((nets[name].state_dict(), [optimizer.state.get(p) for p in nets[name].parameters()]))
        for name in nets
    }
    untrained = parts()
    nets.eval()
    inverse_gen.train_step(nets, optimizer, "gan", x, z)
    assert modes() == {"G": {True}, "D": {True}, "IG": {True}}
    before = parts()
    assert_same(untrained["IG"], before["IG"])
    for _ in range(3):
        nets.eval()
        inverse_gen.train_step(nets, optimizer, stage, x, z)
    assert modes()["G"] == {False} and modes()["IG"] == {True}
    after = parts()
    for net in "G", "D":
        assert_same(before[net], after[net])
    for name, value in after["IG"][0].items():
        assert not torch.equal(value, before["IG"][0][name]), name
    inverse_gen.train_step(nets, optimizer, "gan", x, z)
    assert_same(after["IG"], parts()["IG"])
    assert not torch.equal(nets["G"][2].running_mean, before["G"][0]["2.running_mean"])


@pytest.mark.parametrize("stage", ["gan", "bigan", "aegan", "direct"])
def test_train_step_never_reads_a_tensor_back(stage, monkeypatch):
    nets, images = inverse_gen.build_networks("bigan" if stage == "bigan" else "aegan", 16, 2, 5), draw_faces(4, 16)[0]
    optimizer = inverse_gen.build_optimizer(nets, 2e-4)
    refuse_reading_back(monkeypatch)
    inverse_gen.train_step(nets, optimizer, stage, *inverse_gen.draw_batch(images, 5))


def test_batches_are_the_images_and_uniform_noise():
    images = draw_faces(10, 16)[0].repeat(50, 1, 1, 1)
    torch.manual_seed(0)
    x, z = inverse_gen.draw_batch(images, 7)
    torch.testing.assert_close(x * 255, images.float())
    assert z.shape == (500, 7) and -1 <= z.min() < -0.99 and 0.99 < z.max() <= 1 and abs(z.mean()) < 0.05
    assert z.std().item() == pytest.approx(3**-0.5, rel=0.05)


# ---------------------------------------------------------------------------------------------------------- inversion


def test_search_codes_is_gradient_descent_eq_2():
    nets, x, _ = tiny("search")
    G, z, x = nets["G"].eval(), torch.zeros(4, 5).double(), x[:4]
    for _ in range(3):
        for i in range(4):  # each image by itself
            z_i = z[i : i + 1].clone().requires_grad_()
            x_hat = 1 / (1 + torch.exp(-G(z_i)))
            value = (-x[i] * x_hat.log() - (1 - x[i]) * (1 - x_hat).log()).mean()
            z[i] = (z_i - 200.0 * torch.autograd.grad(value, z_i)[0])[0].detach().clamp(-1, 1)
    with torch.no_grad():
        found = inverse_gen.search_codes(G, 3, 200.0, x)
    torch.testing.assert_close(found, z)
    assert not found.requires_grad and 0.01 < found.abs().max() <= 1
    assert inverse_gen.search_codes(G, 30, 1e6, x).abs().max() == 1
    alone = torch.cat([inverse_gen.search_codes(G, 3, 200.0, x[i : i + 1]) for i in (2, 0)])
    torch.testing.assert_close(alone, z[[2, 0]])  # whatever its place among others


def test_search_finds_what_g_made():
    nets, _, z = tiny("search")
    G = nets["G"].eval()
    for parameter in G.parameters():
        nn.init.normal_(parameter, std=1.0 if parameter.ndim == 1 else 0.3)
    x = inverse_gen.generate(G, z).detach()
    start, end = (inverse_gen.cross_entropy(G(inverse_gen.search_codes(G, n, 300.0, x)), x) for n in (0, 300))
    least = inverse_gen.cross_entropy(torch.logit(x), x)
    assert end - least < 0.3 * (start - least)


def test_the_inverter_is_ig_or_where_there_is_none_search(monkeypatch):
    nets = tiny()[0]
    assert inverse_gen.inverter(nets, 3, 1.0) is nets["IG"]
    nets, x, _ = tiny("search")
    monkeypatch.setattr(inverse_gen, "search_codes", lambda *args: args)
    assert inverse_gen.inverter(nets, 3, 1.5)(x) == (nets["G"], 3, 1.5, x)


# -------------------------------------------------------------------------------------------- descriptors and search


def resized(x, height, width):
    """Images [..., H, W] as NumPy, resized by a triangle as wide as two pixels of the coarser of both grids."""

    def weights(old, new):
        scale = old / new
        distance = (np.arange(old) + 0.5) - (np.arange(new)[:, None] + 0.5) * scale
        found = np.maximum(0, 1 - np.abs(distance) / max(1, scale))
        return found / found.sum(1, keepdims=True)

    return weights(x.shape[-2], height) @ x.double().numpy() @ weights(x.shape[-1], width).T


@pytest.mark.parametrize("size", [16, 32, 64])
def test_hashes_against_numpy(size):
    torch.manual_seed(0)
    x = torch.cat([draw_faces(4, size)[0] / 255, torch.rand(4, 3, size, size)])
    levels = np.array([0.2989, 0.587, 0.114])[:, None, None] * 255
    grey = np.rint((resized(x, 8, 9) * levels).sum(1))
    assert inverse_gen.dhash(x).tolist() == (grey[:, :, 1:] > grey[:, :, :-1]).reshape(8, 64).tolist()
    grey, i = np.rint((resized(x, 32, 32) * levels).sum(1)), np.arange(32) + 0.5
    waves = [np.outer(np.cos(math.pi * i * u / 32), np.cos(math.pi * i * v / 32)) for u in range(8) for v in range(8)]
    for image, bits in zip(grey, inverse_gen.phash(x), strict=True):
        low = [(image * wave).sum() for wave in waves]
        assert bits.tolist() == (np.array(low) > np.sort(low)[31]).tolist()


def test_dhash_says_where_it_grows_brighter_to_the_right():
    right = torch.linspace(0, 1, 36).expand(1, 3, 32, 36)
    for image, bit in ((right, 1), (right.flip(-1), 0), (right.mT, 0)):
        assert inverse_gen.dhash(image).tolist() == [[bit] * 64]
    red = torch.zeros(1, 3, 8, 9)
    red[:, 0, :, 1::2], red[:, 1, :, 0::2] = 1, 0.3  # grey: 0.299 of red against 0.176 of green
    assert inverse_gen.dhash(red).tolist() == [[1, 0] * 32]
    x = torch.rand(5, 3, 32, 32) / 2
    for hashes in (inverse_gen.dhash, inverse_gen.phash):
        assert torch.equal(hashes(x), hashes(x + 51 / 255))  # brighter
    for value in (0.2, 0.3, 1.0):
        flat = torch.full((1, 3, 16, 16), value)
        assert inverse_gen.dhash(flat).sum() == 0 and inverse_gen.phash(flat).tolist() == [[1] + [0] * 63]


def test_colour_histogram():
    x = torch.rand(4, 3, 16, 16)
    x[0], x[1, 0, 0, 0] = 1.0, 1.0  # the last box holds its upper edge
    found = inverse_gen.colour_histogram(x)
    for image, shares in zip(x, found):
        expected, _ = np.histogramdd(image.flatten(1).T.numpy(), bins=8, range=[(0, 1)] * 3)
        np.testing.assert_allclose(shares.numpy(), expected.flatten() / 256, atol=1e-6)
    assert found[0, -1] == 1 and torch.allclose(found.sum(1), torch.ones(4))


def test_hash_similarity():
    a = (torch.rand(5, 64) > 0.5).float()
    b = a.clone()
    b[0, :16] = 1 - b[0, :16]
    assert inverse_gen.hash_similarity(a, a) == 1 and inverse_gen.hash_similarity(a, 1 - a) == 0
    assert inverse_gen.hash_similarity(a, b) == pytest.approx(1 - 16 / 320)


def test_describe_and_distances():
    x, y = torch.rand(3, 3, 16, 16), torch.rand(260, 3, 16, 16)
    y[7] = x[1]
    invert = nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
    queries, gallery = inverse_gen.describe([x], invert), inverse_gen.describe(y.split(100), invert)
    assert tuple(queries) == NAMES and not queries["codes"].requires_grad
    for name, function in zip(NAMES, (invert, inverse_gen.dhash, inverse_gen.phash, inverse_gen.colour_histogram)):
        torch.testing.assert_close(gallery[name], function(y).detach())
    a, b = ({name: rows.double().numpy() for name, rows in found.items()} for found in (queries, gallery))
    for name, distance in inverse_gen.distances(queries, gallery).items():
        pairs = a[name][:, None], b[name][None]
        if name == "codes":
            expected = np.sqrt(((pairs[0] - pairs[1]) ** 2).sum(2))
        elif name == "colour_histogram":
            expected = 1 - np.minimum(*pairs).sum(2)
        else:
            expected = (pairs[0] != pairs[1]).sum(2)
        np.testing.assert_allclose(distance.numpy(), expected, atol=1e-5)
        assert distance[1, 7] < 1e-6


def test_nearest_shares_where_several_are_as_near():
    distance = torch.tensor([[3.0, 1.0, 2.0, 1.0], [0.0, 5.0, 5.0, 5.0]])
    assert inverse_gen.nearest(distance).tolist() == [[0, 0.5, 0, 0.5], [1, 0, 0, 0]]


def test_label_agreement():
    distance = torch.tensor([[1.0, 2.0, 3.0], [4.0, 2.0, 2.0]])
    queries = torch.tensor([[True, False, True], [True, True, False]])
    gallery = torch.tensor([[True, True, True], [True, False, False], [False, False, True]])
    # the first finds gallery 0: labels 0 and 2 agree; the second finds 1 and 2: 0.5, 0, 0.5; in float64
    assert inverse_gen.label_agreement(distance, queries, gallery) == pytest.approx((2 + 1) / 6, rel=1e-12)
    none = torch.zeros_like(queries)
    assert inverse_gen.label_agreement(distance, none, gallery) == pytest.approx(1.5 / 6 + 1 / 12 - 1 / 12, rel=1e-12)
    assert inverse_gen.label_agreement(torch.eye(3).neg(), gallery, gallery) == 1


# ------------------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize("size", [16, 64])
def test_changed_images_against_numpy(size):
    x = torch.cat([draw_faces(2, size)[0] / 255, torch.rand(2, 3, size, size)])
    changed = inverse_gen.change_images(x)
    assert tuple(changed) == CHANGES and all(0 <= y.min() and y.max() <= 1 + 1e-6 for y in changed.values())
    margin = 1 if size == 16 else 3
    np.testing.assert_allclose(changed["crop"], resized(x[..., margin:-margin, margin:-margin], size, size), atol=1e-5)
    sigma, reach = size // 16, 3 * (size // 16)
    weights = np.exp(-((np.arange(-reach, reach + 1) / sigma) ** 2) / 2)
    padded = np.pad(x.numpy(), [(0, 0), (0, 0), (reach, reach), (reach, reach)], mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1), (2, 3))
    blurred = np.einsum("ncijkl,k,l->ncij", windows, weights, weights) / weights.sum() ** 2
    np.testing.assert_allclose(changed["blur"], blurred, atol=1e-5)
    torch.testing.assert_close(inverse_gen.blur(x), changed["blur"])
    for before, after in zip(x[:, :, ::5, ::5].movedim(1, -1).flatten(0, 2).tolist(), pixels(changed["colour"])):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        turned = np.array(colorsys.hsv_to_rgb(hue + 0.1, saturation, value))
        assert after == pytest.approx((turned + turned @ [0.2989, 0.587, 0.114]) / 2, abs=1e-3)


def pixels(x):
    """Every fifth pixel across and down."""
    return x[:, :, ::5, ::5].movedim(1, -1).flatten(0, 2).tolist()


@pytest.mark.parametrize("size", [16, 32, 64])
def test_sunglasses_cover_the_eyes_that_common_draws_and_little_else(size):
    x = torch.rand(2, 3, size, size)
    worn = inverse_gen.change_images(x)["sunglasses"]
    black = (worn != x).all(1)
    assert torch.equal(black[0], black[1]) and torch.equal(black, black.flip(2))
    assert (worn.movedim(1, -1)[black] == 0.05).all() and torch.equal((worn != x).any(1), black)
    down, across = torch.meshgrid(*[(torch.arange(size) + 0.5) / size] * 2, indexing="ij")
    aside = (across - 0.5).abs()
    eyes = ((aside - 0.11) / 0.056) ** 2 + ((down - 0.52) / 0.046) ** 2 < 1  # FACE's white ellipses
    assert black[0][eyes].all() and black[0][(aside < 0.1) & ((down - 0.52).abs() < 0.015)].all()
    assert not black[0][(aside > 0.22) | ((down - 0.52).abs() > 0.085)].any()
    assert 0.04 < black.float().mean() < 0.07


# -------------------------------------------------------------------------------------------------------- evaluation


class Waves(nn.Module):
    """G: logits of an image that are not linear in the latent [N, 3]; others while it is trained."""

    def __init__(self):
        super().__init__()
        self.register_buffer("basis", torch.randn(3, 3 * 16 * 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, z):
        return 2 * (z @ self.basis + self.training).sin().unflatten(1, (3, 16, 16))


class Corner(nn.Module):
    """What inverts it, not well: three pixels of an image, brought to [-1, 1]; nothing while it is trained."""

    def forward(self, x):
        return torch.zeros(len(x), 3) if self.training else (x[:, :, 2, 3] * 2 - 1) ** 3


def image_of(z):
    return torch.sigmoid(Waves().eval()(z))


def restored(x):
    return image_of(Corner().eval()(x))


def stand_ins(train, heldout, attributes=()):
    """G and IG as a step leaves them, data of random images, 256 latents."""
    torch.manual_seed(0)
    images = torch.randint(256, (train + heldout, 3, 16, 16), dtype=torch.uint8)
    images[:train] //= 2
    labels = torch.rand(len(images), len(attributes)) > 0.4
    data = Data(images[:train], images[train:], attributes, labels[:train], labels[train:])
    return nn.ModuleDict({"G": Waves(), "IG": Corner()}), data, torch.rand(256, 3) * 4 - 2


def test_measure_inversion_against_numpy():
    nets, data, z = stand_ins(1100, 300)
    results = inverse_gen.measure_inversion(nets.eval(), nets["IG"], data, z)
    x, generated = data.heldout / 255, image_of(z)
    blurred = inverse_gen.blur(generated)
    same_bits = (inverse_gen.dhash(generated) == inverse_gen.dhash(restored(generated))).numpy().mean()

    def spread(images):
        rows = images.flatten(1).double().numpy()
        return np.mean(np.concatenate([np.linalg.norm(rows[i + 1 :] - row, axis=1) for i, row in enumerate(rows)]))

    difference = lambda a, b: 2 * np.abs(a.double().numpy() - b.numpy()).mean()  # noqa: E731
    expected = {
        "dhash_similarity": same_bits,
        "deblur_l1_before": difference(blurred, generated),
        "deblur_l1_after": difference(restored(blurred), generated),
        "heldout_l1": difference(restored(x), x),
        "heldout_l1_of_mean_image": difference(data.train.double().mean(0) / 255, x),
        "sample_diversity": spread(generated) / spread(x[:256]),
    }
    assert results.pop("inversions_per_second") > 0 and 0.3 < same_bits < 0.95
    assert results == pytest.approx(expected, rel=1e-5)


def test_sample_diversity_is_none_of_images_that_are_all_the_same():
    images = torch.rand(5, 3, 4, 4)
    assert inverse_gen.sample_diversity(images, images[:1].expand(4, -1, -1, -1)) is None
    assert inverse_gen.sample_diversity(images[:1].expand(4, -1, -1, -1), images) == 0


def test_inversions_are_timed_warm_and_to_their_end(monkeypatch):
    def invert(x):
        events.append(len(x))
        return corner(x)

    def item(tensor):
        events.append("wait")
        return tensor.detach().numpy().item()

    nets, data, z = stand_ins(30, 5)
    events, corner, ticks = [], nets.eval()["IG"], iter((10, 14))
    monkeypatch.setattr(torch.Tensor, "item", item)
    monkeypatch.setattr(inverse_gen.time, "perf_counter", lambda: events.append("clock") or next(ticks))
    assert inverse_gen.measure_inversion(nets, invert, data, z)["inversions_per_second"] == 256 / 4
    start = events.index("clock")
    assert events[:2] == [250, 6] and events[start - 1 : start + 5] == ["wait", "clock", 250, 6, "wait", "clock"]


@pytest.mark.parametrize("attributes", [(), ("a", "b", "c")])
@pytest.mark.parametrize("count", [256, 20])
def test_measure_search_against_numpy(attributes, count):
    nets, data, _ = stand_ins(400, 300, attributes)
    invert, gallery = nets.eval()["IG"], data.train[:300] / 255
    described = inverse_gen.describe([gallery], invert)
    results = inverse_gen.measure_search(invert, data, described, count, torch.device("cpu"))

    def nearest(queries):
        for name, d in inverse_gen.distances(inverse_gen.describe([queries], invert), described).items():
            yield name, [np.flatnonzero(row == row.min()) for row in d.numpy()]

    agreement = None
    if attributes:
        agrees = (data.heldout_labels[:count, None] == data.train_labels[None, :300]).numpy().mean(2)
        agreement = {"any_image": pytest.approx(agrees.mean())}
        for name, found in nearest(data.heldout[:count] / 255):
            agreement[name] = pytest.approx(np.mean([row[at].mean() for row, at in zip(agrees, found)]))
    assert results["label_agreement"] == agreement and tuple(results["search_top1"]) == CHANGES
    for change, images in inverse_gen.change_images(gallery[:count]).items():
        top = {name: np.mean([(i in at) / len(at) for i, at in enumerate(found)]) for name, found in nearest(images)}
        assert results["search_top1"][change] == pytest.approx(top, rel=1e-5), change


def test_figures_show_what_they_say(monkeypatch, tmp_path):
    def grid(path, *images, **options):
        shown[path.name] = images, options

    shown, (nets, data, z) = {}, stand_ins(120, 80)
    monkeypatch.setattr(inverse_gen, "save_grid", grid)
    gallery = data.train[:100]
    described = inverse_gen.describe([gallery / 255], Corner().eval())
    inverse_gen.save_figures(nets, nets["IG"], data, z, tmp_path, 70, described)
    generated, x = image_of(z), data.heldout / 255
    changed = torch.cat(list(inverse_gen.change_images(gallery[:4] / 255).values()))
    blurred = inverse_gen.blur(generated[:24])

    def found(queries):
        distances = inverse_gen.distances(inverse_gen.describe([queries], Corner().eval()), described)
        return [queries, *(gallery[distances[name].argmin(1)] / 255 for name in NAMES)]

    captions = {"captions": [[text] for text in ("query", "codes", "dHash", "pHash", "colours")]}
    columns = {"columns": 3, "captions": [["original"], ["blurred"], ["restored"]]}
    few = {
        "samples_70.png": ([generated[:100]], {}),
        "reconstructions_70.png": ([x[:40], restored(x[:40])], {"columns": 5}),
    }
    all_figures = few | {
        "figure2_pairs.png": ([generated[:40], restored(generated[:40])], {"columns": 5}),
        "figure3_changed.png": (found(changed), {"columns": 4} | captions),
        "figure4_found.png": (found(x[:64]), {"columns": 4} | captions),
        "figure5_deblurred.png": ([generated[:24], blurred, restored(blurred)], columns),
    }
    assert set(shown) == set(all_figures)
    for name, (images, options) in all_figures.items():
        assert shown[name][1] == options, name
        for tile, image in zip(shown[name][0], images, strict=True):
            torch.testing.assert_close(tile, 2 * image - 1, atol=1e-5, rtol=1e-5, msg=name)
    for invert, names in ((nets["IG"], set(few)), (None, {"samples_70.png"})):
        shown.clear()
        inverse_gen.save_figures(nets, invert, data, z, tmp_path, 70)
        assert set(shown) == names


def test_a_query_shows_the_nearest_nine_of_the_gallery(monkeypatch, tmp_path, capsys):
    shown, (nets, data, _) = [], stand_ins(300, 5)
    monkeypatch.setattr(inverse_gen, "save_grid", lambda path, *images, **options: shown.append((images, options)))
    invert, x = nets.eval()["IG"], data.train[270]
    codes = invert(data.train / 255).numpy()
    distance = np.linalg.norm(codes - codes[270], axis=1)
    for count in (280, 260, 4):
        order = np.argsort(distance[:count])[:9]
        inverse_gen.save_query(tmp_path / "query.png", invert, x, data, count, torch.device("cpu"))
        lines = capsys.readouterr().out.splitlines()[:-1]
        assert lines == [f"{distance[i]:8.3f}  training image {i}" for i in order]
        (images,), options = shown.pop()
        torch.testing.assert_close(images, torch.cat([x[None], data.train[order]]) / 127.5 - 1)
        assert options == {"captions": [["query", *(f"{distance[i]:.2f}" for i in order)]]}
