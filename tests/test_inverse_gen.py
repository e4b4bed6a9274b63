import copy
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
    graphs_on_the_cpu,
    load,
    log_of,
    refuse_reading_back,
    run_as_a_user,
)
from PIL import Image
from torch import nn

import inverse_gen
from common import Data, draw_faces

SMALL = [*TINY, "--gan-steps", 2]
METHODS = inverse_gen.METHODS


def tiny(method="aegan", seed=0):
    """Small networks in float64 with weights that let every gradient be seen, and a batch x, z."""
    torch.manual_seed(seed)
    nets = inverse_gen.build_networks(method, 16, 2, 5).double()
    for parameter in nets.parameters():
        nn.init.normal_(parameter, std=0.3)
    return nets, torch.rand(4, 3, 16, 16).double(), torch.rand(4, 5).double() * 2 - 1


def log_sigmoid(x):
    return -np.log(1 + np.exp(-x))


def count(net):
    return sum(p.numel() for p in net.parameters())


# ---------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("size", inverse_gen.IMAGE_SIZES)
def test_shapes_and_ranges(size):
    nets = inverse_gen.build_networks("bigan", size, 2, 7)
    x, z = torch.rand(3, 3, size, size), torch.rand(3, 7) * 2 - 1
    images = inverse_gen.generate(nets["G"], z)
    assert images.shape == (3, 3, size, size) and 0 < images.min() < images.max() < 1
    assert nets["IG"](x).shape == (3, 7) and nets["IG"](1e6 * torch.randn_like(x)).abs().max() <= 1
    assert nets["D"](x, z).shape == (3, 1)
    assert inverse_gen.build_networks("aegan", size, 2, 7)["D"](x).shape == (3, 1)


def test_weights_of_the_tables_counted_by_hand():
    norms = 2 * (64 + 128 + 256 + 512)
    convs = 25 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512)
    nets = inverse_gen.build_networks("aegan", 64, 64, 100)
    assert count(nets["G"]) == 100 * 8192 + 25 * (512 * 256 + 256 * 128 + 128 * 64 + 64 * 3) + 3 + norms  # Table 3
    assert count(nets["D"]) == convs + norms + 8192 + 1  # Table 4
    assert count(nets["IG"]) == convs + norms + 8192 * 100 + 100  # Table 5
    D = inverse_gen.build_networks("bigan", 64, 64, 100)["D"]
    of_x = 25 * (3 * 64 + 64 * 128 + 128 * 256) + 2 * (64 + 128 + 256)
    of_both = 25 * (356 * 512 + 512 * 512 + 512 * 512) + 3 * 2 * 512
    assert count(D) == of_x + of_both + 512 + 1  # Table 6


def kinds(net):
    return [type(layer).__name__ for layer in net.modules() if not list(layer.children())]


def test_layers_in_order():
    nets = inverse_gen.build_networks("bigan", 64, 2, 5)
    stage, conv = ["BatchNorm2d", "ReLU", "ConvTranspose2d"], ["Conv2d", "BatchNorm2d"]
    assert kinds(nets["G"]) == ["Linear", "Unflatten", *stage * 4]
    assert kinds(nets["D"]) == [*conv, "LeakyReLU", *conv, *conv, *conv, "LeakyReLU", *conv, *conv, "Linear"]  # shared
    nets["D"] = inverse_gen.build_networks("aegan", 64, 2, 5)["D"]
    assert [type(layer).__name__ for layer in nets["D"][0]] == [*conv, "LeakyReLU"] * 4
    assert [type(layer).__name__ for layer in nets["IG"][0]] == [*conv, "ReLU"] * 4
    assert kinds(nets["IG"])[-3:] == ["Flatten", "Linear", "Tanh"]
    convs = [m for m in nets.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert {(c.kernel_size, c.stride) for c in convs} == {((5, 5), (2, 2))}
    assert {m.negative_slope for m in nets.modules() if isinstance(m, nn.LeakyReLU)} == {0.2}


def test_the_latent_joins_the_images_at_8x8_pixels():
    nets, x, z = tiny("bigan")
    seen = []
    nets["D"].of_both.register_forward_hook(lambda layer, inputs, output: seen.append((inputs[0], output.shape)))
    nets["D"](x, z)
    both, shape = seen[0]
    assert both.shape == (4, 2 + 5, 8, 8) and shape == (4, 4, 1, 1)
    assert (both[:, 2:] == z[:, :, None, None]).all()


def test_initial_weights():
    nets = inverse_gen.build_networks("bigan", 64, 16, 100)
    for layer in nets.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.15)
            assert layer.bias is None or (layer.bias == 0).all()


def test_networks_of_the_methods():
    names = {method: set(inverse_gen.build_networks(method, 16, 2, 5)) for method in METHODS}
    three = {"G", "D", "IG"}
    assert names == {"aegan": three, "direct": three, "bigan": three, "search": {"G", "D"}}


# ------------------------------------------------------------------------------------------------------------ losses


def test_adversarial_losses_eq_1_and_4():
    real, fake = 3 * torch.randn(2, 6, 1).double()
    r, f = real.numpy(), fake.numpy()
    d = -log_sigmoid(r).mean() - log_sigmoid(-f).mean()
    assert inverse_gen.discriminator_loss(real, fake).item() == pytest.approx(d)
    assert inverse_gen.generator_loss(fake).item() == pytest.approx(-log_sigmoid(f).mean())
    swapped = -log_sigmoid(-r).mean() - log_sigmoid(f).mean()
    assert inverse_gen.bigan_loss(real, fake).item() == pytest.approx(swapped)
    assert inverse_gen.bigan_loss(real, fake) == inverse_gen.discriminator_loss(-real, -fake)
    for loss, inputs in (
        (inverse_gen.discriminator_loss, (real, fake)),
        (inverse_gen.generator_loss, (fake,)),
        (inverse_gen.bigan_loss, (real, fake)),
    ):
        torch.autograd.gradcheck(loss, [i.clone().requires_grad_() for i in inputs])


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


def test_direct_loss_eq_3():
    a, b = torch.randn(2, 4, 5).double()
    assert inverse_gen.direct_loss(a, b).item() == pytest.approx(((a - b).numpy() ** 2).mean())
    assert inverse_gen.direct_loss(a, a) == 0
    torch.autograd.gradcheck(inverse_gen.direct_loss, (a.requires_grad_(), b.requires_grad_()))


def test_losses_of_the_stages_against_numpy():
    for method in ("aegan", "bigan"):
        nets, x, z = tiny(method)
        nets.eval()
        with torch.no_grad():
            G, D, IG = nets["G"], nets["D"], nets["IG"]
            x_hat = 1 / (1 + torch.exp(-G(z)))
            pairs = (x, IG(x)), (x_hat, z)
            d_real, d_fake = (D(*pair if method == "bigan" else pair[:1]).numpy() for pair in pairs)
            expected = {"L_D": -log_sigmoid(d_real).mean() - log_sigmoid(-d_fake).mean()}
            expected["L_G"] = -log_sigmoid(d_fake).mean()
            if method == "bigan":
                expected["L_G"] -= log_sigmoid(-d_real).mean()
                losses = inverse_gen.bigan_losses(nets, x, z)
            else:
                losses = inverse_gen.gan_losses(nets, x, z)
            assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected)
            z_prime, y = IG(x_hat), G(IG(x_hat)).numpy()
            entropy = (-x_hat.numpy() * log_sigmoid(y) - (1 - x_hat.numpy()) * log_sigmoid(-y)).mean()
            for how, value in (("aegan", entropy), ("direct", ((z_prime - z).numpy() ** 2).mean())):
                losses = inverse_gen.inverse_losses(nets, z, how)
                assert {name: loss.item() for name, loss in losses.items()} == pytest.approx({"L_IG": value})


@pytest.mark.parametrize(
    "stage, name, reached",
    [
        ("gan", "L_D", {"G", "D"}),
        ("gan", "L_G", {"G", "D"}),
        ("bigan", "L_D", {"G", "D", "IG"}),
        ("bigan", "L_G", {"G", "D", "IG"}),
        ("direct", "L_IG", {"IG"}),
        ("aegan", "L_IG", {"IG", "G"}),  # through G, whose weights no optimizer of this loss has
    ],
)
def test_which_networks_a_loss_reaches(stage, name, reached):
    nets, x, z = tiny("bigan" if stage == "bigan" else "aegan")
    if stage in ("gan", "bigan"):
        loss = {"gan": inverse_gen.gan_losses, "bigan": inverse_gen.bigan_losses}[stage](nets, x, z)[name]
    else:
        loss = inverse_gen.inverse_losses(nets, z, stage)[name]
    for net in nets:
        gradients = torch.autograd.grad(loss, list(nets[net].parameters()), retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in gradients) == (net in reached), net


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("stage", ["gan", "bigan", "aegan", "direct"])
def test_train_step_against_autograd_by_hand(stage):
    nets, _, _ = tiny("bigan" if stage == "bigan" else "aegan")
    optimizers = inverse_gen.build_optimizers(nets, "bigan" if stage == "bigan" else "aegan", 1e-3)
    other, moments, log = copy.deepcopy(nets), {}, F.logsigmoid
    for i in range(3):
        torch.manual_seed(10 + i)
        x, z = torch.rand(4, 3, 16, 16).double(), torch.rand(4, 5).double() * 2 - 1
        losses = inverse_gen.train_step(nets, optimizers, stage, x, z)
        G, D, IG = other["G"], other["D"], other["IG"]
        if stage == "gan":
            d_real, d_fake = D(x), D(G(z).sigmoid())
            values = {"L_D": (-log(d_real).mean() - log(-d_fake).mean(), [D]), "L_G": (-log(d_fake).mean(), [G])}
        elif stage == "bigan":
            d_real, d_fake = D(torch.cat([x, G(z).sigmoid()]), torch.cat([IG(x), z])).split(4)
            values = {"L_D": (-log(d_real).mean() - log(-d_fake).mean(), [D])}
            values["L_G"] = -log(-d_real).mean() - log(d_fake).mean(), [G, IG]
        else:
            G.eval()
            with torch.no_grad():
                image = G(z).sigmoid()
            logits = G(IG(image))
            entropy = (-image * log(logits) - (1 - image) * log(-logits)).mean()
            values = {"L_IG": (entropy if stage == "aegan" else ((IG(image) - z) ** 2).mean(), [IG])}
        assert set(values) == set(losses)
        updates = []
        for name, (value, players) in values.items():
            assert losses[name].item() == pytest.approx(value.item()) and not losses[name].requires_grad
            parameters = [p for player in players for p in player.parameters()]
            gradients = torch.autograd.grad(value, parameters, retain_graph=True)
            zeros = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
            updates.append((parameters, gradients, 1e-3, moments.setdefault(name, [0, *zeros])))
        for update in updates:
            adam_by_hand(*update)
    for name, parameter in nets.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("stage", ["aegan", "direct"])
def test_stage_two_changes_nothing_in_g_and_d(stage):
    nets, x, z = tiny()
    optimizers = inverse_gen.build_optimizers(nets, "aegan", 1e-2)
    inverse_gen.train_step(nets, optimizers, "gan", x, z)
    before = copy.deepcopy(nets.state_dict())
    nets.eval()  # as a picture leaves them
    for _ in range(3):
        inverse_gen.train_step(nets, optimizers, stage, x, z)
    assert not nets["G"].training and nets["IG"].training
    for name, value in nets.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("IG."), name
    inverse_gen.train_step(nets, optimizers, "gan", x, z)
    assert nets["G"].training and not torch.equal(nets["G"][2].running_mean, before["G.2.running_mean"])


@pytest.mark.parametrize("stage", ["gan", "bigan", "aegan", "direct"])
def test_train_step_never_reads_a_tensor_back(stage, monkeypatch):
    method = "bigan" if stage == "bigan" else "aegan"
    nets, images = inverse_gen.build_networks(method, 16, 2, 5), draw_faces(8, 16)[0]
    optimizers = inverse_gen.build_optimizers(nets, method, 2e-4)
    refuse_reading_back(monkeypatch)
    inverse_gen.train_step(nets, optimizers, stage, *inverse_gen.draw_batch(images[:4], 5))


def test_batches_are_the_images_and_uniform_noise():
    images = draw_faces(10, 16)[0].repeat(50, 1, 1, 1)
    torch.manual_seed(0)
    x, z = inverse_gen.draw_batch(images, 7)
    torch.testing.assert_close(x * 255, images.float())
    assert z.shape == (500, 7) and -1 <= z.min() < -0.99 and 0.99 < z.max() <= 1 and abs(z.mean()) < 0.05


# ---------------------------------------------------------------------------------------------------------- inversion


def test_search_codes_is_gradient_descent_eq_2():
    nets, x, _ = tiny("search")
    G, z = nets["G"].eval(), torch.zeros(4, 5).double()
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
    torch.manual_seed(0)
    G, z = inverse_gen.build_networks("search", 16, 2, 5)["G"].eval(), torch.rand(4, 5) * 2 - 1
    for parameter in G.parameters():
        nn.init.normal_(parameter, std=1.0 if parameter.ndim == 1 else 0.3)
    with torch.no_grad():
        x = inverse_gen.generate(G, z)
        start, end = (inverse_gen.cross_entropy(G(inverse_gen.search_codes(G, n, 300.0, x)), x) for n in (0, 300))
    least = inverse_gen.cross_entropy(torch.logit(x), x)
    assert end - least < 0.3 * (start - least)


def test_the_inverter_is_ig_or_where_there_is_none_search(monkeypatch):
    nets, x, _ = tiny()
    assert inverse_gen.inverter(nets, 3, 1.0) is nets["IG"]
    nets, x, _ = tiny("search")
    monkeypatch.setattr(inverse_gen, "search_codes", lambda *args: args)
    assert inverse_gen.inverter(nets, 3, 1.5)(x) == (nets["G"], 3, 1.5, x)


# -------------------------------------------------------------------------------------------- descriptors and search


def test_dhash_of_ramps():
    right = torch.linspace(0, 1, 36).expand(1, 3, 32, 36)
    checks = torch.tensor([0.0, 1.0]).repeat_interleave(4).repeat(5)[:36].expand(1, 3, 32, 36)  # columns 0, 1, 0, ...
    assert inverse_gen.dhash(right).tolist() == [[1.0] * 64] and inverse_gen.dhash(right.flip(-1)).tolist() == [
        [0.0] * 64
    ]
    assert inverse_gen.dhash(right.mT).tolist() == [[0.0] * 64]  # no pixel is brighter than its left neighbour
    assert inverse_gen.dhash(checks).tolist() == [[1.0, 0.0] * 32]
    x = 0.5 * torch.rand(5, 3, 16, 16)
    assert torch.equal(inverse_gen.dhash(x), inverse_gen.dhash(x + 51 / 255)) and inverse_gen.dhash(x).shape == (5, 64)
    red = torch.zeros(1, 3, 8, 9)
    red[:, 0, :, 1::2], red[:, 1, :, 0::2] = 1, 0.3  # grey: 0.299 of red against 0.176 of green
    assert inverse_gen.dhash(red).tolist() == [[1.0, 0.0] * 32]


def test_phash():
    x = 0.5 * torch.rand(5, 3, 32, 32)
    hashes = inverse_gen.phash(x)
    assert hashes.shape == (5, 64) and (hashes.sum(1) == 32).all()  # half are above the median
    grey = (x * torch.tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1).mul(255).round().double().numpy()
    i = np.arange(32)
    for image, bits in zip(grey, hashes):
        low = [
            (image * np.outer(np.cos(math.pi * (i + 0.5) * u / 32), np.cos(math.pi * (i + 0.5) * v / 32))).sum()
            for u in range(8)
            for v in range(8)
        ]
        assert bits.tolist() == (np.array(low) > np.sort(low)[31]).astype(float).tolist()
    assert torch.equal(inverse_gen.phash(x + 51 / 255), hashes)  # brighter
    wide = torch.rand(2, 3, 64, 64)
    assert inverse_gen.phash(wide).shape == (2, 64)


def test_hashes_of_a_constant_image():
    for value in (0.2, 0.3, 1.0):
        flat = torch.full((1, 3, 16, 16), value)
        assert inverse_gen.dhash(flat).sum() == 0 and inverse_gen.phash(flat).tolist() == [[1.0] + [0.0] * 63]


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
    invert = lambda x: x.flatten(1)[:, :5]  # noqa: E731
    queries, gallery = inverse_gen.describe([x], invert), inverse_gen.describe(y.split(100), invert)
    assert set(queries) == {"codes", "dhash", "phash", "colour_histogram"} and torch.equal(gallery["codes"], invert(y))
    assert torch.equal(gallery["phash"], inverse_gen.phash(y)) and torch.equal(queries["dhash"], inverse_gen.dhash(x))
    found = inverse_gen.distances(queries, gallery)
    for name, distance in found.items():
        a, b = queries[name].numpy()[:, None], gallery[name].numpy()[None]
        if name == "codes":
            expected = np.sqrt(((a - b) ** 2).sum(2))
        elif name == "colour_histogram":
            expected = 1 - np.minimum(a, b).sum(2)
        else:
            expected = (a != b).sum(2)
        np.testing.assert_allclose(distance.numpy(), expected, atol=1e-5)
        assert distance[1, 7] == 0


def test_nearest_shares_where_several_are_as_near():
    distance = torch.tensor([[3.0, 1.0, 2.0, 1.0], [0.0, 5.0, 5.0, 5.0]])
    assert inverse_gen.nearest(distance).tolist() == [[0, 0.5, 0, 0.5], [1, 0, 0, 0]]


def test_label_agreement():
    distance = torch.tensor([[1.0, 2.0, 3.0], [4.0, 2.0, 2.0]])
    queries = torch.tensor([[True, False, True, True], [True, True, False, False]])
    gallery = torch.tensor([[True, True, True, False], [True, False, False, True], [False, False, False, False]])
    # the first finds gallery 0: labels 0 and 2 agree; the second finds 1 and 2: 0.5, 0, 1, 0.5
    assert inverse_gen.label_agreement(distance, queries, gallery) == pytest.approx((2 + 2) / 8)
    assert inverse_gen.label_agreement(torch.eye(3).neg(), gallery, gallery) == 1


def test_change_images():
    for size in inverse_gen.IMAGE_SIZES:
        x = draw_faces(6, size)[0].float() / 255
        changed = inverse_gen.change_images(x)
        assert set(changed) == {"colour", "sunglasses", "blur", "crop"}
        for name, images in changed.items():
            assert images.shape == x.shape and 0 <= images.min() and images.max() <= 1 + 1e-6, name
            assert 0.01 < (images - x).abs().mean() < 0.25, name
        different = (changed["sunglasses"] != x).any(1).float().mean(0)  # where, over the images
        down, across = torch.meshgrid(*[(torch.arange(size) + 0.5) / size] * 2, indexing="ij")
        assert 0.02 < different.bool().float().mean() < 0.1
        assert torch.equal(different, different.flip(1))  # both eyes
        assert (different * (down - 0.52)).abs().sum() / different.sum() < 0.08
        assert 0.08 < (different * (across - 0.5).abs()).sum() / different.sum() < 0.15  # eyes are at 0.11
        assert different[size // 2, round(0.39 * size)] == 1 and changed["sunglasses"].min() <= 0.05
        margin = max(1, round(0.05 * size))
        framed = torch.ones(1, 3, size, size)
        framed[..., margin:-margin, margin:-margin] = 0
        assert inverse_gen.change_images(framed)["crop"].max() == 0
        framed = torch.zeros(1, 3, size, size)
        framed[..., margin : margin + 1, :] = framed[..., -margin - 1, :] = 1
        framed[..., margin : margin + 1] = framed[..., -margin - 1] = 1
        kept = inverse_gen.change_images(framed)["crop"]
        assert min(kept[..., 0, :].min(), kept[..., -1, :].min(), kept[..., 0].min(), kept[..., -1].min()) > 0.5
        grey = torch.full((1, 3, size, size), 0.4)
        others = inverse_gen.change_images(grey)
        for name in ("colour", "blur", "crop"):
            torch.testing.assert_close(others[name], grey, atol=1e-4, rtol=0)
        red = torch.zeros(1, 3, size, size)
        red[:, 0] = 1
        colour = inverse_gen.change_images(red)["colour"][0, :, 0, 0]  # hue 0.1: (1, 0.6, 0), grey 0.65; half of it
        torch.testing.assert_close(colour, torch.tensor([0.826, 0.626, 0.326]), atol=2e-3, rtol=0)
        saturation = lambda images: (images.amax(1) - images.amin(1)).mean()  # noqa: E731
        assert saturation(changed["colour"]) < 0.7 * saturation(x)
        assert changed["blur"].std((2, 3)).mean() < x.std((2, 3)).mean()


def test_blur_s_strength():
    dot = torch.zeros(1, 3, 32, 32)
    dot[..., 16, 16] = 1
    spread = inverse_gen.blur(dot)[0, 0]
    at = torch.arange(32) - 16.0
    assert spread.sum().item() == pytest.approx(1, abs=1e-4)
    assert (spread.sum(0) * at**2).sum().sqrt().item() == pytest.approx(2, rel=0.05)  # 1/16 of 32 pixels


# -------------------------------------------------------------------------------------------------------- evaluation


class Linear(nn.Module):
    """G: logits of an image that are a fixed linear function of the latent [N, 3]."""

    def __init__(self):
        super().__init__()
        self.register_buffer("basis", torch.randn(3, 3 * 16 * 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, z):
        return (z @ self.basis).unflatten(1, (3, 16, 16))


def corner(x):
    """What inverts it, not well: three pixels of an image, brought to [-1, 1]."""
    return x[:, :, 2, 3] * 2 - 1


def image_of(x):
    """G of what the corner says."""
    return torch.sigmoid(Linear()(corner(x)))


@pytest.mark.parametrize("attributes", [(), ("a", "b")])
def test_measure_against_numpy(attributes):
    torch.manual_seed(0)
    images = torch.randint(256, (652, 3, 16, 16), dtype=torch.uint8)
    labels = torch.rand(652, len(attributes)) > 0.4
    data, z = Data(images[:400] // 2, images[400:], attributes, labels[:400], labels[400:]), torch.rand(256, 3) * 4 - 2
    x, gallery, nets = data.heldout / 255, data.train[:300] / 255, nn.ModuleDict({"G": Linear()})
    described = inverse_gen.describe(gallery.split(250), corner)
    results = inverse_gen.measure(nets, corner, data, z, described)
    x_hat = torch.sigmoid(nets["G"](z))
    blurred = inverse_gen.blur(x_hat)
    same_bits = (inverse_gen.dhash(x_hat) == inverse_gen.dhash(image_of(x_hat))).float().mean().item()
    expected = {
        "dhash_similarity": same_bits,
        "deblur_l1_before": 2 * np.abs((blurred - x_hat).numpy()).mean(),
        "deblur_l1_after": 2 * np.abs((image_of(blurred) - x_hat).numpy()).mean(),
        "heldout_l1": 2 * np.abs((image_of(x) - x).numpy()).mean(),
        "heldout_l1_of_mean_image": 2 * np.abs((data.train.float().mean(0) / 255 - x).numpy()).mean(),
        "sample_diversity": inverse_gen.sample_diversity(x_hat, x),
    }
    for name, value in expected.items():
        assert results[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    names = set(expected) | {"inversions_per_second", "label_agreement", "search_top1"}
    assert set(results) == names and results["inversions_per_second"] > 0 and 0.3 < same_bits < 0.95
    found = inverse_gen.distances(inverse_gen.describe([x], corner), described)
    if attributes:
        for name, distance in found.items():
            agreement = inverse_gen.label_agreement(distance, data.heldout_labels, data.train_labels[:300])
            assert results["label_agreement"].pop(name) == pytest.approx(agreement)
        pairs = (data.heldout_labels[:, None] == data.train_labels[None, :300]).float().mean().item()
        assert results["label_agreement"] == {"any_image": pytest.approx(pairs)}
    else:
        assert results["label_agreement"] is None
    for change, changed in inverse_gen.change_images(gallery[:256]).items():
        row = inverse_gen.distances(inverse_gen.describe([changed], corner), described)
        for name, distance in row.items():
            ties = (distance == distance.min(1, keepdim=True).values).sum(1)
            first = distance.diagonal() == distance.min(1).values
            assert results["search_top1"][change][name] == pytest.approx((first / ties).mean().item())


def test_figures_show_what_they_say(monkeypatch, tmp_path):
    shown = {}
    monkeypatch.setattr(
        inverse_gen, "save_grid", lambda path, *images, **options: shown.update({path.name: (images, options)})
    )
    images, nets = draw_faces(200, 16)[0], nn.ModuleDict({"G": Linear()})
    data, z = Data(images[:120], images[120:], (), None, None), torch.randn(256, 3)
    described = inverse_gen.describe([data.train[:100] / 255], corner)
    inverse_gen.save_figures(nets, corner, data, z, tmp_path, described=described)
    figures = {"figure2_pairs.png", "figure3_changed.png", "figure4_found.png", "figure5_deblurred.png"}
    assert set(shown) == figures | {"figure_samples.png", "figure_reconstructions.png"}
    x_hat, x = torch.sigmoid(nets["G"](z)), data.heldout / 255
    blurred = inverse_gen.blur(x_hat[:24])
    same = lambda a, b: torch.testing.assert_close(a, 2 * b - 1, atol=1e-5, rtol=1e-5)  # noqa: E731
    same(shown["figure_samples.png"][0][0], x_hat[:100])
    for name, source in (("figure_reconstructions.png", x[:40]), ("figure2_pairs.png", x_hat[:40])):
        (originals, reconstructions), options = shown[name]
        same(originals, source)
        same(reconstructions, image_of(source))
        assert options == {"columns": 5}
    tiles, options = shown["figure5_deblurred.png"]
    for tile, expected in zip(tiles, (x_hat[:24], blurred, image_of(blurred)), strict=True):
        same(tile, expected)
    assert options == {"columns": 3, "captions": [["original"], ["blurred"], ["restored"]]}
    changed = torch.cat(list(inverse_gen.change_images(data.train[:4] / 255).values()))
    for name, queries in (("figure3_changed.png", changed), ("figure4_found.png", x[:64])):
        tiles, options = shown[name]
        captions = [[text] for text in ("query", "codes", "dHash", "pHash", "colours")]
        assert options == {"columns": 4, "captions": captions}
        same(tiles[0], queries)
        found = inverse_gen.distances(inverse_gen.describe([queries], corner), described)
        for tile, distance in zip(tiles[1:], found.values(), strict=True):
            same(tile, data.train[distance.argmin(1)] / 255)
    shown.clear()
    inverse_gen.save_figures(nets, corner, data, z, tmp_path, 70)
    assert set(shown) == {"samples_70.png", "reconstructions_70.png"}
    shown.clear()
    inverse_gen.save_figures(nets, None, data, z, tmp_path, 70)
    assert set(shown) == {"samples_70.png"}


# ------------------------------------------------------------------------------------------------------ command line


def test_a_run_as_a_user_starts_it(photos, tmp_path):
    pictures = dict.fromkeys(("samples_2", "samples_4", "samples_5", "figure_samples"), (10, 10, 1))
    pairs = "reconstructions_4", "reconstructions_5", "figure_reconstructions", "figure2_pairs"
    pictures |= dict.fromkeys(pairs, (5, 8, 2))
    pictures |= {"figure3_changed": (4, 4, 5), "figure4_found": (4, 16, 5), "figure5_deblurred": (3, 8, 3)}
    arguments = ["--data", photos, *SMALL, "--steps", 3]
    out, results, header, rows = run_as_a_user("inverse_gen", *arguments, cwd=tmp_path, pictures=pictures)
    assert results["config"]["gan_steps"] == 2 and out.startswith("aegan on ")
    changes = {"colour", "sunglasses", "blur", "crop"}
    assert results["label_agreement"] is None and set(results["search_top1"]) == changes
    for name in "dhash_similarity deblur_l1_before deblur_l1_after heldout_l1 sample_diversity".split():
        assert 0 < results[name] < 5 and f"{name:26}{results[name]:10.3f}" in out
    assert "search_top1 crop          codes " in out and "step 2  L_D" in out and "step 5  L_IG" in out
    given = [[value != "" for value in row[1:]] for row in rows]
    assert header == ["L_D", "L_G", "L_IG"] and given == [[True, True, False]] * 2 + [[False, False, True]] * 3


@pytest.mark.parametrize("method", ["direct", "bigan", "search"])
def test_the_other_methods_train_what_they_should(method, photos, tmp_path, cli):
    run = tmp_path / method
    search = ["--search-steps", 2]
    result = cli(inverse_gen, "--method", method, "--data", photos, *SMALL, "--steps", 2, *search, "--out", run)
    assert result.status == 0 and result.out.startswith(f"{method} on "), result
    columns = [[value != "" for value in row[1:]] for row in log_of(run)[1]]
    gan, inverse = [True, True, False], [False, False, True]
    assert columns == {"direct": [gan] * 2 + [inverse] * 2, "bigan": [gan] * 4, "search": [gan] * 2}[method]
    results = json.loads((run / "results.json").read_text())
    assert results["steps"] == len(columns) and results["heldout_l1"] > 0
    assert ("IG.0.0.weight" in load(run)["networks"]) == (method != "search")


def test_a_generator_is_taken_from_another_run_and_left_as_it_is(photos, tmp_path, cli):
    first = tmp_path / "first"
    small = ["--data", photos, "--batch-size", 4, "--log-every", 1, "--device", "cpu"]
    assert (
        cli(
            inverse_gen, *small, *SMALL, "--latent-dim", 7, "--method", "search", "--search-steps", 2, "--out", first
        ).status
        == 0
    )
    shared = [*small, "--generator", first / "checkpoint.pt"]
    for method in ("aegan", "direct", "search"):
        run = tmp_path / method
        assert (
            cli(inverse_gen, *shared, "--method", method, "--steps", 2, "--search-steps", 2, "--out", run).status == 0
        )
        g, other = (
            {k: v for k, v in load(folder)["networks"].items() if k.startswith("G.")} for folder in (first, run)
        )
        assert_same(g, other)
        assert len(log_of(run)[1] if method != "search" else []) == (2 if method != "search" else 0)
        config = load(run)["config"]
        assert (config["image_size"], config["channels"], config["latent_dim"], config["gan_steps"]) == (16, 2, 7, 0)
    refused = cli(inverse_gen, *shared, "--image-size", 32, "--out", tmp_path / "new")
    assert_refused(refused, first / "checkpoint.pt", "image_size = 16, not 32")
    assert_refused(cli(inverse_gen, *small, "--generator", first, "--out", tmp_path / "new"), first, "is not there")
    (first / "checkpoint.pt").unlink()
    assert cli(inverse_gen, "--resume", "--out", tmp_path / "aegan", "--steps", 3, "--device", "cpu").status == 0
    assert_refused(cli(inverse_gen, *shared, "--out", tmp_path / "new"), first / "checkpoint.pt", "is not there")


def test_stopped_in_either_stage_a_run_resumes_to_the_same_bits(photos, tmp_path, cli):
    small = ["--data", photos, *TINY, "--gan-steps", 4, "--steps", 4]
    assert cli(inverse_gen, *small, "--out", tmp_path / "whole").status == 0

    class Stop(Exception):
        pass

    for stop in (3, 4, 7):  # in the first stage, between the two, in the second
        run, counts, train_step = tmp_path / str(stop), [], inverse_gen.train_step
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):

            def stopped(*args, stop=stop, counts=counts, train_step=train_step):
                counts.append(1)
                if len(counts) > stop:
                    raise Stop
                return train_step(*args)

            patch.setattr(inverse_gen, "train_step", stopped)
            cli(inverse_gen, *small, "--out", run)
        assert load(run)["step"] == 2 * (stop // 2)
        assert cli(inverse_gen, "--resume", "--out", run, "--device", "cpu").status == 0
        assert_same(load(tmp_path / "whole"), load(run))
        assert (tmp_path / "whole" / "log.csv").read_bytes() == (run / "log.csv").read_bytes()


def test_each_stage_is_recorded_by_itself(photos, tmp_path, cli, monkeypatch):
    small = ["--data", photos, *TINY, "--gan-steps", 3, "--steps", 3]
    assert cli(inverse_gen, *small, "--out", tmp_path / "eager").status == 0
    graphs = graphs_on_the_cpu(inverse_gen, monkeypatch)
    assert cli(inverse_gen, *small, "--out", tmp_path / "recorded").status == 0
    assert [graph.replays for graph in graphs] == [3, 3]
    assert_same(load(tmp_path / "eager"), load(tmp_path / "recorded"))
    assert (tmp_path / "eager" / "log.csv").read_bytes() == (tmp_path / "recorded" / "log.csv").read_bytes()


def test_a_query_finds_the_nearest_images(photos, tmp_path, cli):
    run = tmp_path / "run"
    assert cli(inverse_gen, "--data", photos, *SMALL, "--steps", 2, "--out", run).status == 0
    data = inverse_gen.load_data(str(photos), 16)
    before = load(run)
    result = cli(inverse_gen, "--query", data.paths[5], "--out", run, "--device", "cpu")
    rows = [line.split() for line in result.out.splitlines()[2:-1]]
    distance = [float(row[0]) for row in rows]
    assert result.status == 0 and len(rows) == 9 and rows[0] == ["0.000", str(data.paths[5])]
    assert distance == sorted(distance) and {row[1] for row in rows} <= {str(path) for path in data.paths[:27]}
    with Image.open(run / "query.png") as image:
        assert image.size == (684, 72)
    assert_same(before, load(run))
    assert_refused(
        cli(inverse_gen, "--query", tmp_path / "no.png", "--out", run), tmp_path / "no.png", "cannot be read"
    )
    assert_refused(cli(inverse_gen, "--query", "", "--out", run), "--query", "cannot be read")
    few = cli(inverse_gen, "--query", data.paths[5], "--gallery", 3, "--out", run, "--device", "cpu")
    assert len(few.out.splitlines()) == 2 + 3 + 1
    begun = tmp_path / "begun"
    search = ["--method", "search", "--search-steps", 1]
    assert cli(inverse_gen, "--data", photos, *SMALL, *search, "--out", begun).status == 0
    assert cli(inverse_gen, "--query", data.paths[5], "--out", begun, "--device", "cpu").status == 0
    checkpoint = {**before, "step": 2}
    torch.save(checkpoint, run / "checkpoint.pt")
    assert_refused(cli(inverse_gen, "--query", data.paths[5], "--out", run), "IG is not trained yet")


def test_few_images_suffice(photos, tmp_path, cli):
    small = ["--data", photos, *SMALL, "--steps", 1, "--out", tmp_path / "run"]
    assert cli(inverse_gen, *small, "--gallery", 3).status == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert all(0 <= share <= 1 for row in results["search_top1"].values() for share in row.values())
    with Image.open(tmp_path / "run" / "figure3_changed.png") as image:
        assert image.size == (3 * (5 * 64 + 4) + 4, 4 * 68 + 4)


def test_label_agreement_of_data_with_attributes(tmp_path, cli):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, image in enumerate(draw_faces(30, 16)[0]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    (folder / "attributes.csv").write_text("\n".join(["file,odd,all", *(f"{i}.png,{i % 2},1" for i in range(30))]))
    result = cli(inverse_gen, "--data", folder, *SMALL, "--steps", 1, "--out", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    names = {"codes", "dhash", "phash", "colour_histogram", "any_image"}
    assert set(results["label_agreement"]) == names and "label_agreement           codes 0." in result.out
    assert all(0.5 <= value <= 1 for value in results["label_agreement"].values())  # "all" always agrees


def test_the_settings_reach_the_training_step(photos, tmp_path, cli, monkeypatch):
    def spy(nets, optimizers, stage, x, z):
        rates = {name: (o.param_groups[0]["lr"], o.param_groups[0]["betas"]) for name, o in optimizers.items()}
        seen.append((stage, x.shape, z.shape, rates))
        return train_step(nets, optimizers, stage, x, z)

    seen, vectors, sizes, train_step = [], [], [], inverse_gen.train_step

    def measure(nets, invert, data, z, described):
        vectors.append(z)
        sizes.append(len(described["codes"]))
        return {"search_top1": {}, "label_agreement": None}

    monkeypatch.setattr(inverse_gen, "measure", measure)
    monkeypatch.setattr(inverse_gen, "train_step", spy)
    monkeypatch.setattr(inverse_gen, "save_figures", lambda nets, invert, data, z, *args, **_: vectors.append(z))
    settings = ["--latent-dim", 7, "--lr", 1e-3, "--gallery", 13]
    for i, more in enumerate((["--seed", 0], ["--seed", 9], ["--method", "bigan"])):
        cli(
            inverse_gen,
            "--data",
            photos,
            *TINY,
            "--gan-steps",
            1,
            "--steps",
            1,
            *settings,
            "--out",
            tmp_path / str(i),
            *more,
        )
    rates = {
        loss: dict.fromkeys(names, (1e-3, (0.5, 0.999)))
        for loss, names in (("a", ("L_D", "L_G", "L_IG")), ("b", ("L_D", "L_G")))
    }
    batch = (4, 3, 16, 16), (4, 7)
    assert (
        seen == [("gan", *batch, rates["a"]), ("aegan", *batch, rates["a"])] * 2 + [("bigan", *batch, rates["b"])] * 2
    )
    assert sizes == [13] * 3
    uniform = torch.rand(256, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert all(torch.equal(z, uniform) for z in vectors) and len(vectors) == 12  # the same vectors whatever the seed


def test_search_s_settings_reach_it(photos, tmp_path, cli, monkeypatch):
    def inverter(nets, steps, rate):
        seen.append((steps, rate))
        return real(nets, 1, rate)

    seen, real = [], inverse_gen.inverter
    monkeypatch.setattr(inverse_gen, "inverter", inverter)
    search = ["--method", "search", "--search-steps", 3, "--search-rate", 0.5]
    assert cli(inverse_gen, "--data", photos, *SMALL, *search, "--out", tmp_path / "run").status == 0
    assert seen == [(3, 0.5)]


def test_the_defaults_are_the_paper_s():
    args, _ = inverse_gen.parse_args(["--out", "nowhere"])
    assert (args.batch_size, args.image_size, args.latent_dim, args.channels, args.lr) == (64, 64, 100, 64, 2e-4)
    assert (args.steps, args.gan_steps, args.method, args.gallery) == (50_000, 50_000, "aegan", 20_000)


# -------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("stage", ["gan", "bigan", "aegan", "direct"])
def test_on_cuda_a_step_never_waits_for_the_device(stage):
    method = "bigan" if stage == "bigan" else "aegan"
    nets, images = inverse_gen.build_networks(method, 16, 4, 5).cuda(), draw_faces(40, 16)[0].cuda()
    optimizers = inverse_gen.build_optimizers(nets, method, 2e-4)
    for _ in range(3):
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses = inverse_gen.train_step(nets, optimizers, stage, *inverse_gen.draw_batch(images[:4], 5))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(loss.isfinite() and loss.device.type == "cuda" for loss in losses.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_a_run_searches_and_answers(photos, tmp_path, cli):
    for method in ("aegan", "search"):
        run = tmp_path / method
        small = ["--data", photos, *SMALL, "--steps", 2, "--search-steps", 2, "--device", "cuda", "--method", method]
        assert cli(inverse_gen, *small, "--out", run).status == 0
        assert cli(inverse_gen, "--query", next(photos.glob("*.png")), "--out", run).status == 0
