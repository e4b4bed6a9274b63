import colorsys
import copy
import itertools
import math
from functools import partial

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, adam_by_hand, assert_same, load, log_of, refuse_reading_back, run_as_a_user
from PIL import Image
from torch import nn

import inverse_gen
from common import Data, draw_faces, load_data

SMALL = [*TINY, "--gan-steps", 2]
NAMES = ("codes", "dhash", "phash", "colour_histogram")
SEARCHED = (*NAMES, "pixels", "untrained")  # with the controls
CHANGES = ("colour", "sunglasses", "blur", "crop")


def tiny(method="aegan", size=16):
    """Small networks in float64 with weights that let every gradient be seen, and a batch of 6 images, 4 latents."""
    torch.manual_seed(0)
    nets = inverse_gen.build_networks(method, size, 2, 5).double()
    for parameter in nets.parameters():
        nn.init.normal_(parameter, mean=parameter.mean().round().item(), std=0.3)  # of gains 1, else 0
    return nets, torch.rand(6, 3, size, size).double(), torch.rand(4, 5).double() * 2 - 1


def log_sigmoid(x):
    return -np.log(1 + np.exp(-np.asarray(x)))


# ---------------------------------------------------------------------------------------------------------- networks


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


@pytest.mark.parametrize("count", [2, 3, 4])
def test_what_the_layers_compute(count):
    """Tables 3 to 6 by hand, with the averages of the batch in batch norm."""
    nets, x, z = tiny("bigan", 4 * 2**count)
    nets["D_x"], x = tiny("aegan", 4 * 2**count)[0]["D"], x[:4]
    p, averages = dict(nets.named_parameters()), {}

    def norm(y, name):
        variance, mean = torch.var_mean(y, (0, 2, 3), correction=0, keepdim=True)
        averages[f"{name}.running_mean"] = 0.1 * mean.flatten()
        averages[f"{name}.running_var"] = 0.9 + 0.1 * y.transpose(0, 1).flatten(1).var(1)
        weight, bias = p[f"{name}.weight"][:, None, None], p[f"{name}.bias"][:, None, None]
        return weight * (y - mean) / (variance + 1e-5).sqrt() + bias

    def convs(y, name, count, slope):
        for i in range(0, 3 * count, 3):
            y = norm(F.conv2d(y, p[f"{name}.{i}.weight"], stride=2, padding=2), f"{name}.{i + 1}")
            y = torch.where(y > 0, y, slope * y)
        return y

    def linear(y, name):
        return y.flatten(1) @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    y = (z @ p["G.0.weight"].T).view(4, 2**count, 4, 4)
    for i in range(2, 3 * count, 3):
        y = norm(y, f"G.{i}").clamp(min=0)
        y = F.conv_transpose2d(y, p[f"G.{i + 2}.weight"], p.get(f"G.{i + 2}.bias"), 2, 2, 1)
    torch.testing.assert_close(inverse_gen.generate(copy.deepcopy(nets["G"]), z), 1 / (1 + torch.exp(-y)))
    torch.testing.assert_close(nets["G"](z), y)
    torch.testing.assert_close(nets["D_x"](x), linear(convs(x, "D_x.0", count, 0.2), "D_x.2"))
    torch.testing.assert_close(nets["IG"](x), linear(convs(x, "IG.0", count, 0), "IG.2").tanh())
    both = torch.cat([convs(x, "D.of_x", count - 1, 0.2), z[:, :, None, None].repeat(1, 1, 8, 8)], 1)
    torch.testing.assert_close(nets["D"](x, z), linear(convs(both, "D.of_both", 3, 0.2), "D.logit"))
    assert averages.keys() == {name for name, _ in nets.named_buffers() if "running" in name}
    for name, value in averages.items():  # what batch norm has in evaluation mode, after one batch
        torch.testing.assert_close(nets.get_buffer(name), value, msg=name)


@pytest.mark.parametrize("method", ["aegan", "direct", "bigan", "search"])
def test_networks_of_a_method_and_their_initial_weights(method):
    torch.manual_seed(0)
    nets = inverse_gen.build_networks(method, 64, 16, 100)
    assert set(nets) == {"G", "D"} | ({"IG"} if method != "search" else set()) and nets.training
    assert isinstance(nets["D"], inverse_gen.PairDiscriminator) == (method == "bigan")
    for name, weight in nets.named_parameters():
        if weight.ndim > 1 and weight.numel() > 1000:
            assert 0.0185 < weight.std() < 0.0215 and abs(weight.mean()) < 0.002, name
        elif weight.ndim == 1:
            assert (weight == (1 if name.endswith("weight") else 0)).all(), name  # 1: batch norm's


@pytest.mark.parametrize("method, size", [("aegan", 8), ("bigan", 48), ("bogus", 16), ("gan", 16)])
def test_unknown_methods_and_sizes_are_refused(method, size):
    with pytest.raises(ValueError, match=f"{method}.*{size}.*aegan.*16, 32, 64"):
        inverse_gen.build_networks(method, size, 2, 5)


# ------------------------------------------------------------------------------------------------------------ losses


def test_losses_at_their_ends_and_their_gradients():
    zero, far = torch.zeros(6, 1), torch.full((1, 3, 4, 4), 500.0)
    assert inverse_gen.discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert inverse_gen.discriminator_loss(zero + 50, zero - 50) < 1e-9 > inverse_gen.generator_loss(zero + 50)
    assert inverse_gen.discriminator_loss(zero - 500, zero + 500) == 1000 == 2 * inverse_gen.generator_loss(zero - 500)
    assert inverse_gen.cross_entropy(far, torch.zeros_like(far)) == 500  # where log(1 - sigmoid) would be infinite
    assert inverse_gen.cross_entropy(far, torch.ones_like(far)) == 0
    real, fake = (3 * torch.randn(2, 6, 1).double()).requires_grad_()
    torch.autograd.gradcheck(inverse_gen.discriminator_loss, (real, fake))
    torch.autograd.gradcheck(inverse_gen.generator_loss, fake)
    x = torch.rand(2, 3, 4, 4).double()
    torch.autograd.gradcheck(inverse_gen.cross_entropy, (torch.randn_like(x).requires_grad_(), x))
    least = torch.logit(x).requires_grad_()  # where the image is the same
    assert torch.autograd.grad(inverse_gen.cross_entropy(least, x), least)[0].abs().max() < 1e-12


def test_losses_of_the_stages_against_numpy_of_6_images_and_4_latents():
    nets, x, z = tiny()
    nets["pairs"] = tiny("bigan")[0]["D"]
    G, D, IG, pairs = nets.eval().requires_grad_(False).values()
    made = torch.from_numpy(np.exp(log_sigmoid(G(z))))
    z_prime, logits, y = IG(made), G(IG(made)), made.numpy()
    of_d = lambda real, fake: -log_sigmoid(real).mean() - log_sigmoid(-fake).mean()  # noqa: E731
    expected = {
        "gan": {"L_D": of_d(D(x), D(made)), "L_G": -log_sigmoid(D(made)).mean()},
        "bigan": {"L_D": of_d(pairs(x, IG(x)), pairs(made, z)), "L_G": of_d(pairs(made, z), pairs(x, IG(x)))},
        "aegan": {"L_IG": (-y * log_sigmoid(logits) - (1 - y) * log_sigmoid(-logits)).mean()},
        "direct": {"L_IG": ((z - z_prime).numpy() ** 2).mean()},
    }
    assert inverse_gen.LOSSES.keys() == expected.keys()
    for stage, values in expected.items():
        losses = inverse_gen.LOSSES[stage]({**nets, "D": pairs} if stage == "bigan" else nets, x, z)
        assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(values), stage


def test_what_inverts_g_exactly_is_the_minimum():
    nets, x, z = tiny()
    direct, aegan = (  # of IG that are right, and wrong
        [losses({"G": nets["G"].eval(), "IG": lambda _, by=by: by * z}, x, z)["L_IG"].item() for by in (1, 0.9)]
        for losses in (inverse_gen.direct_losses, inverse_gen.aegan_losses)
    )
    p = inverse_gen.generate(nets["G"], z)
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean().item()
    assert 0 == direct[0] < direct[1] and pytest.approx(entropy) == aegan[0] < aegan[1]


@pytest.mark.parametrize("stage, reached", [("gan", "G D"), ("bigan", "G D IG"), ("direct", "IG"), ("aegan", "IG G")])
def test_which_networks_the_losses_reach(stage, reached):
    nets, x, z = tiny("bigan" if stage == "bigan" else "aegan")
    seen = []
    nets["IG"].register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0].requires_grad))
    for loss in inverse_gen.LOSSES[stage](nets, x, z).values():
        for net in nets:
            gradients = torch.autograd.grad(loss, list(nets[net].parameters()), retain_graph=True, allow_unused=True)
            assert any(g is not None and g.abs().max() > 0 for g in gradients) == (net in reached.split()), net
    assert not any(seen)  # the images that IG is given have no gradient


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "stages", ["gan gan gan", "bigan bigan bigan", "aegan aegan aegan", "gan direct gan aegan gan"]
)
def test_train_step_against_autograd_by_hand_and_without_reading_a_tensor_back(stages, monkeypatch):
    nets, _, _ = tiny("bigan" if "bigan" in stages else "aegan")
    optimizer = inverse_gen.build_optimizer(nets, 1e-3)
    nets.eval()  # as a figure leaves them
    other, moments, log = copy.deepcopy(nets).train(), {}, F.logsigmoid
    G, D, IG = other["G"], other["D"], other["IG"]
    for i, stage in enumerate(stages.split()):
        torch.manual_seed(10 + i)
        x, z = torch.rand(4, 3, 16, 16).double(), torch.rand(4, 5).double() * 2 - 1
        with monkeypatch.context() as patch:
            refuse_reading_back(patch)
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
            zeros = ([torch.zeros_like(p) for p in parameters] for _ in "mv")
            updates.append((parameters, gradients, 1e-3, moments.setdefault(name, [0, *zeros])))
        for update in updates:
            adam_by_hand(*update)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(nets.state_dict()[name], value, atol=1e-8, rtol=1e-6, msg=name)


@pytest.mark.parametrize("stage", ["aegan", "direct"])
def test_where_ig_is_trained_g_and_d_and_their_moments_stay_as_they_are(stage):
    nets, x, z = tiny()
    optimizer, IG = inverse_gen.build_optimizer(nets, 1e-2), nets["IG"]
    untrained = copy.deepcopy(IG.state_dict())
    inverse_gen.train_step(nets.eval(), optimizer, "gan", x, z)
    assert all(m.training for m in nets.modules()) and not any(p in optimizer.state for p in IG.parameters())
    assert_same(untrained, IG.state_dict())
    others = [nets["G"].state_dict(), nets["D"].state_dict(), [state for _, state in optimizer.state.items()]]
    before = copy.deepcopy(others)
    inverse_gen.train_step(nets.eval(), optimizer, stage, x, z)
    assert not any(m.training for m in nets["G"].modules()) and all(m.training for m in IG.modules())
    assert_same(before, others)
    assert not any(torch.equal(value, untrained[name]) for name, value in IG.state_dict().items())


def test_batches_are_the_images_and_uniform_noise():
    images = draw_faces(10, 16)[0].repeat(50, 1, 1, 1)
    x, z = inverse_gen.make_inputs(images, 7)
    torch.testing.assert_close(x * 255, images.float())
    assert z.shape == (500, 7) and z.abs().max() <= 1 and abs(z.mean()) < 0.06 and abs(z.std() - 3**-0.5) < 0.03


# -------------------------------------------------------------------------------------- search and changed images


def test_search_is_gradient_descent_eq_2():
    nets, x, _ = tiny("search")
    G, z, x = nets["G"].eval(), torch.zeros(4, 5).double(), x[:4]
    for _ in range(3):
        for i in range(4):  # each image by itself
            z_i = z[i : i + 1].clone().requires_grad_()
            x_hat = 1 / (1 + torch.exp(-G(z_i)))
            value = (-x[i] * x_hat.log() - (1 - x[i]) * (1 - x_hat).log()).mean()
            z[i] = (z_i - 5.0 * torch.autograd.grad(value, z_i)[0])[0].detach().clamp(-1, 1)
    search = partial(inverse_gen.search_codes, G, 3, 5.0)
    with torch.no_grad():
        found = search(x)
    torch.testing.assert_close(found, z)
    assert not found.requires_grad and 0.01 < found.abs().max() <= 1
    assert inverse_gen.search_codes(G, 30, 1e6, x).abs().max() == 1
    torch.testing.assert_close(torch.cat([search(x[2:3]), search(x[:1])]), z[[2, 0]])  # whatever its place among others


def resized(x, height, width):
    """Images [..., H, W] in NumPy, resized by a triangle as wide as two pixels of the coarser of both grids."""

    def weights(old, new):
        distance = (np.arange(old) + 0.5) - (np.arange(new)[:, None] + 0.5) * old / new
        found = np.maximum(0, 1 - np.abs(distance) / max(1, old / new))
        return found / found.sum(1, keepdims=True)

    return weights(x.shape[-2], height) @ x.double().numpy() @ weights(x.shape[-1], width).T


@pytest.mark.parametrize("size", [16, 32, 64])
def test_descriptors_against_numpy(size):
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
    for value in (0.2, 0.3, 1.0):
        flat = torch.full((1, 3, size, size), value)
        assert inverse_gen.dhash(flat).sum() == 0 and inverse_gen.phash(flat)[0, 0] == 1
    x[0, :, 0] = 1  # the last box holds its upper edge
    for image, shares in zip(x, inverse_gen.colour_histogram(x), strict=True):
        expected, _ = np.histogramdd(image.flatten(1).T.numpy(), bins=8, range=[(0, 1)] * 3)
        np.testing.assert_allclose(shares.numpy(), expected.flatten() / size**2, atol=1e-6)


def test_label_agreement_in_float64():
    distance = torch.tensor([[1.0, 2.0, 3.0], [4.0, 2.0, 2.0]])
    queries = torch.tensor([[True, True, False], [True, False, False]])
    gallery = torch.tensor([[True, True, True], [True, False, False], [False, False, True]])
    # the first finds gallery 0: labels 0 and 1 agree; the second finds 1 and 2: 0.5, 1, 0.5
    assert inverse_gen.label_agreement(distance, queries, gallery) == pytest.approx(4 / 6, rel=1e-12)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_changed_images_against_numpy(size):
    x = torch.cat([draw_faces(2, size)[0] / 255, torch.rand(2, 3, size, size)])
    changed = inverse_gen.change_images(x)
    assert tuple(changed) == CHANGES and all(0 <= y.min() and y.max() <= 1 + 1e-6 for y in changed.values())
    margin = {16: 1, 32: 2, 64: 3}[size]
    np.testing.assert_allclose(changed["crop"], resized(x[..., margin:-margin, margin:-margin], size, size), atol=1e-5)
    sigma, reach = size // 16, 3 * (size // 16)
    weights = np.exp(-((np.arange(-reach, reach + 1) / sigma) ** 2) / 2)
    padded = np.pad(x.numpy(), [(0, 0), (0, 0), (reach, reach), (reach, reach)], mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1), (2, 3))
    blurred = np.einsum("ncijkl,k,l->ncij", windows, weights, weights) / weights.sum() ** 2
    np.testing.assert_allclose(changed["blur"], blurred, atol=1e-5)
    for before, after in zip(*(y[..., ::5, ::5].movedim(1, -1).flatten(0, 2).tolist() for y in (x, changed["colour"]))):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        turned = np.array(colorsys.hsv_to_rgb(hue + 0.1, saturation, value))
        assert after == pytest.approx((turned + turned @ [0.2989, 0.587, 0.114]) / 2, abs=1e-3)
    black = (changed["sunglasses"] == 0.05).all(1)[0]
    assert torch.equal(changed["sunglasses"], torch.where(black, 0.05, x)) and torch.equal(black, black.flip(1))
    down, across = torch.meshgrid(*[(torch.arange(size) + 0.5) / size] * 2, indexing="ij")
    down, aside = (down - 0.52).abs(), (across - 0.5).abs()
    eyes = ((aside - 0.11) / 0.056) ** 2 + (down / 0.046) ** 2 < 1  # the white ellipses that common draws
    assert black[eyes].all() and black[(aside < 0.1) & (down < 0.015)].all()
    assert not black[(aside > 0.22) | (down > 0.085)].any() and 0.04 < black.float().mean() < 0.07


# -------------------------------------------------------------------------------------------------------- evaluation


class Waves(nn.Module):
    """G: logits of an image that are not linear in the latent [N, 3]; others in training mode."""

    def forward(self, z):
        basis = torch.randn(3, 3 * 16 * 16, generator=torch.Generator().manual_seed(0))
        return 2 * (z @ basis + self.training).sin().unflatten(1, (3, 16, 16))


class Corner(nn.Module):
    """What inverts it, not well: three pixels of an image, brought to [-1, 1]; nothing in training mode."""

    def forward(self, x):
        return torch.zeros(len(x), 3) if self.training else (x[:, :, 2, 3] * 2 - 1) ** 3


def untrained(x):
    """In place of an inverse generator that was never trained."""
    return x[:, 1, 4:7, 5]


def restored(x):
    return Waves().eval()(Corner().eval()(x)).sigmoid()


HASHES = inverse_gen.dhash, inverse_gen.phash, inverse_gen.colour_histogram
DESCRIPTORS = dict(zip(SEARCHED, (Corner().eval(), *HASHES, lambda x: x.flatten(1), untrained)))


def distances(queries, gallery):
    """What images [Q, 3, 16, 16] and [M, 3, 16, 16] differ by, in NumPy: {name: [Q, M]}."""
    found = {}
    for name, function in DESCRIPTORS.items():
        a, b = function(queries).numpy()[:, None], function(gallery).numpy()
        if name in ("codes", "pixels", "untrained"):
            found[name] = ((a - b) ** 2).sum(2) ** 0.5
        else:
            found[name] = 2 - 2 * np.minimum(a, b).sum(2) if name == "colour_histogram" else (a != b).sum(2)
    return found


def stand_ins(train, heldout, attributes=()):
    """G and IG in training mode, data of random images, those to train on darker, and 256 latents."""
    torch.manual_seed(0)
    images = torch.randint(256, (train + heldout, 3, 16, 16), dtype=torch.uint8)
    images[:train] //= 2
    labels = torch.rand(len(images), len(attributes)) > 0.4
    data = Data(images[:train], images[train:], attributes, labels[:train], labels[train:], (), 0)
    return nn.ModuleDict({"G": Waves(), "IG": Corner()}), data, torch.rand(256, 3) * 4 - 2


def test_measure_against_numpy(tmp_path):
    nets, data, z = stand_ins(1100, 1030)
    x, made = data.heldout[:1000] / 255, Waves().eval()(z).sigmoid()
    nets["G"].eval()
    results = inverse_gen.measure(nets, nets["IG"], Corner(), data, z, tmp_path, 40)
    blurred = inverse_gen.blur(made)
    assert (nets["G"].training, nets["IG"].training) == (False, True)  # as it found them
    difference = lambda a, b: 2 * np.abs(a.double().numpy() - b.numpy()).mean()  # noqa: E731
    expected = {
        "dhash_similarity": (inverse_gen.dhash(made) == inverse_gen.dhash(restored(made))).numpy().mean(),
        "dhash_similarity_of_unlike": (inverse_gen.dhash(x) == inverse_gen.dhash(x[[-1, *range(999)]])).numpy().mean(),
        "deblur_l1_before": difference(blurred, made),
        "deblur_l1_after": difference(restored(blurred), made),
        "sample_diversity": conftest.mean_distance(made) / conftest.mean_distance(x[:256]),
        "heldout_l1": difference(restored(x), x),
        "heldout_l1_of_mean_image": difference(data.train.double().mean(0) / 255, x),
    }
    assert {name: results[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert set(results) == {*expected, *(f"search_top1_{change}_{name}" for change in CHANGES for name in SEARCHED)}
    assert 0.3 < results["dhash_similarity"] < 0.95


@pytest.mark.parametrize("count, attributes", [(256, ()), (20, ("a", "b", "c")), (256, ("a", "b", "c"))])
def test_measure_search_against_numpy(count, attributes):
    def nearest(queries):
        found = distances(queries, gallery)
        return {name: [np.flatnonzero(row == row.min()) for row in rows] for name, rows in found.items()}

    _, data, _ = stand_ins(100, 300, attributes)
    gallery = data.train[:60] / 255
    described = inverse_gen.describe(gallery, DESCRIPTORS)
    of_nine = inverse_gen.distances(inverse_gen.describe(gallery[:9], DESCRIPTORS), described)
    assert tuple(of_nine) == SEARCHED
    for name, found in of_nine.items():
        np.testing.assert_allclose(found, distances(gallery[:9], gallery)[name], atol=1e-5)
    results = inverse_gen.measure_search(DESCRIPTORS, data, described, count)
    expected = {}
    if attributes:
        agrees = (data.heldout_labels[:count, None] == data.train_labels[None, :60]).numpy().mean(2)
        found = nearest(data.heldout[:count] / 255) | {"any_image": [range(60)] * count}
        for name, rows in found.items():
            expected[f"label_agreement_{name}"] = np.mean([row[at].mean() for row, at in zip(agrees, rows)])
    for change, images in inverse_gen.change_images(gallery[:count]).items():
        for name, found in nearest(images).items():
            expected[f"search_top1_{change}_{name}"] = np.mean([(i in at) / len(at) for i, at in enumerate(found)])
    assert results == pytest.approx(expected)


def test_describing_many_images_says_how_far_it_is(capsys):
    x = torch.rand(2010, 3, 16, 16)
    assert torch.equal(inverse_gen.describe(x, {"untrained": untrained})["untrained"], untrained(x))
    assert capsys.readouterr().err.splitlines() == [f"described {count} of 2010 images" for count in (1000, 2000)]


def test_figures_show_what_they_say(monkeypatch, tmp_path):
    shown, (nets, data, z) = {}, stand_ins(120, 80)
    monkeypatch.setattr(inverse_gen, "save_grid", lambda path, *x, **more: shown.update({path.name: (x, more)}))
    gallery, x, made = data.train[:100], data.heldout / 255, Waves().eval()(z).sigmoid()
    nets["G"].eval()
    inverse_gen.save_figures(nets, nets["IG"], data, z, tmp_path, 70)
    assert (nets["G"].training, nets["IG"].training) == (False, True)  # as it found them
    inverse_gen.save_found(tmp_path, DESCRIPTORS, data, inverse_gen.describe(gallery / 255, DESCRIPTORS))
    changed = torch.cat(list(inverse_gen.change_images(gallery[:4] / 255).values()))
    blurred = inverse_gen.blur(made[:24])

    def found(queries):
        by_name = distances(queries, gallery / 255)
        return [queries, *(gallery[by_name[name].argmin(1)] / 255 for name in NAMES)]

    of_search = {"groups_per_row": 4, "captions": [[text] for text in ("query", "codes", "dHash", "pHash", "colours")]}
    of_blur = {"groups_per_row": 3, "captions": [["original"], ["blurred"], ["restored"]]}
    figures = {
        "samples_70.png": ([made[:100]], {}),
        "reconstructions_70.png": ([x[:40], restored(x[:40])], {"groups_per_row": 5}),
        "figure2_pairs.png": ([made[:40], restored(made[:40])], {"groups_per_row": 5}),
        "figure5_deblurred.png": ([made[:24], blurred, restored(blurred)], of_blur),
        "figure3_changed.png": (found(changed), of_search),
        "figure4_found.png": (found(x[:64]), of_search),
    }
    assert set(shown) == set(figures)
    for name, (images, options) in figures.items():
        assert shown[name][1] == options, name
        for tile, image in zip(shown[name][0], images, strict=True):
            torch.testing.assert_close(tile, 2 * image - 1, atol=1e-5, rtol=1e-5, msg=name)
    for invert, count in ((nets["IG"], 4), (None, 1)):
        shown.clear()
        inverse_gen.save_figures(nets, invert, data, z, tmp_path, 70)
        assert set(shown) == set(list(figures)[:count])


# ------------------------------------------------------------------------------------------------------ command line


def test_a_run_as_a_user_starts_it(photos, tmp_path):
    pictures = dict.fromkeys(("samples_2", "samples_4", "samples_5"), (10, 10, 1))
    pictures |= dict.fromkeys(("reconstructions_4", "reconstructions_5"), (3, 1, 2)) | {"figure2_pairs": (5, 8, 2)}
    pictures |= {"figure3_changed": (4, 4, 5), "figure4_found": (3, 1, 5), "figure5_deblurred": (3, 8, 3)}
    arguments = ["--data", photos, *SMALL, "--steps", 5]
    out, results, header, _ = run_as_a_user("inverse_gen", *arguments, cwd=tmp_path, pictures=pictures)
    assert results["config"]["gan_steps"] == 2 and out.startswith("aegan on ")
    names = "dhash_similarity dhash_similarity_of_unlike deblur_l1_before deblur_l1_after".split()
    names += "heldout_l1 heldout_l1_of_mean_image sample_diversity".split()
    shares = [f"search_top1_{change}_{name}" for change in CHANGES for name in SEARCHED]
    assert all(0 < results[name] < 5 for name in names) and all(0 <= results[name] <= 1 for name in shares)
    assert all(f"{name:40}{results[name]:10.3f}" in out for name in names + shares)
    assert set(results) == {"steps", "config", *names, *shares}
    assert header == ["L_D", "L_G", "L_IG"] and "step 2  L_D" in out and "step 5  L_IG" in out


@pytest.mark.parametrize("method", ["aegan", "direct", "bigan", "search"])
def test_the_settings_reach_the_steps_the_figures_and_the_results(method, photos, tmp_path, cli, monkeypatch):
    def spy(name):
        function, calls = getattr(inverse_gen, name), seen.setdefault(name, [])
        monkeypatch.setattr(inverse_gen, name, lambda *args: calls.append(args) or function(*args))

    seen, data = {}, load_data(photos, 16)
    for name in ("train_step", "save_figures", "save_found", "measure_inversion", "measure_search"):
        spy(name)
    settings = ["--latent-dim", 7, "--lr", 1e-3, "--seed", 9, "--search-steps", 2, "--search-rate", 0.5, "--gallery", 3]
    rarely = ["--gan-steps", 3, "--steps", 4, "--log-every", 50, "--save-every", 50, "--method", method]
    result = cli(inverse_gen, "--data", photos, *TINY, *settings, *rarely, "--out", tmp_path)
    assert result.status == 0 and result.out.startswith(f"{method} on "), result
    stages = {"bigan": ["bigan"] * 4, "search": ["gan"] * 4}.get(method, ["gan"] * 3 + [method])
    for stage, (*_, name, x, z) in zip(stages, seen["train_step"], strict=True):
        assert (name, x.shape, z.shape) == (stage, (4, 3, 16, 16), (4, 7))
        assert all((data.train == image).flatten(1).all(1).any() for image in (x * 255).round())
    (group,) = seen["train_step"][0][1].param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-3, (0.5, 0.999), 1e-8, 0)
    lines = [(int(row[0]), row[1] != "", row[2] != "", row[3] != "") for row in log_of(tmp_path)[1]]
    of_ig = method in ("aegan", "direct")
    assert lines == [(1, True, True, False), (4, not of_ig, not of_ig, of_ig)]
    ((_, invert, _, z, heldout),) = seen["measure_inversion"]
    ((descriptors, _, described, count),) = seen["measure_search"]
    assert (seen["save_found"][0][1], seen["save_found"][0][3]) == (descriptors, described)
    assert tuple(descriptors) == SEARCHED and descriptors["codes"] is invert
    assert (heldout, count) == ((64, 64) if method == "search" else (1000, 256))
    control = descriptors["untrained"]
    assert 0.01 < control[0][0].weight.std() < 0.03 and (control[0][1].running_mean == 0).all()  # as it is built
    assert not any(module.training for module in control.modules())
    seen["train_step"][0][0].eval()  # the networks, which are as they were before they were measured
    uniform = torch.rand(256, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1  # the same whatever the seed
    assert torch.equal(z, uniform[:count]) and all(torch.equal(row[3], uniform) for row in seen["save_figures"])
    for name, rows in inverse_gen.describe(data.train[:3] / 255, descriptors).items():
        torch.testing.assert_close(described[name], rows)
    figures = [(row[5], bool(row[1])) for row in seen["save_figures"]]
    assert figures == ([(4, False), (4, True)] if method == "search" else [(4, True)])
    with Image.open(tmp_path / "figure3_changed.png") as image:
        assert image.size == (3 * (5 * 64 + 4) + 4, 4 * 68 + 4)  # of three images
    if method == "search":
        assert invert.args[1:] == (2, 0.5)
    else:
        trained = {key[3:]: value for key, value in load(tmp_path)["networks"].items() if key.startswith("IG.")}
        assert_same(dict(invert.state_dict()), trained)


def test_recorded_or_stopped_in_either_stage_a_run_ends_in_the_same_bits(photos, tmp_path, cli, monkeypatch):
    def stopped(*args):
        if next(counts) == 0:
            raise KeyboardInterrupt
        return train_step(*args)

    small, train_step = ["--data", photos, *TINY, "--gan-steps", 5, "--steps", 11], inverse_gen.train_step
    whole, recorded = tmp_path / "whole", tmp_path / "recorded"
    assert cli(inverse_gen, *small, "--out", whole).status == 0
    for stop, step in ((4, 4), (5, 4), (9, 8)):  # in the first stage, between the two, in the second
        run, counts = tmp_path / str(stop), itertools.count(-stop)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(inverse_gen, "train_step", stopped)
            cli(inverse_gen, *small, "--out", run)
        assert load(run)["step"] == step
        assert cli(inverse_gen, "--resume", "--out", run, "--device", "cpu").status == 0
    graphs = conftest.graphs_on_the_cpu(monkeypatch, inverse_gen)
    assert cli(inverse_gen, *small, "--out", recorded).status == 0
    assert [graph.replays for graph in graphs] == [2, 3]  # three steps of a stage precede its recording
    for run in (recorded, *(tmp_path / name for name in "459")):
        assert_same(load(whole), load(run))
        assert (whole / "log.csv").read_bytes() == (run / "log.csv").read_bytes()


def test_the_defaults_are_the_paper_s():
    args, _ = inverse_gen.parse_args(["--out", "nowhere"])
    assert (args.batch_size, args.image_size, args.latent_dim, args.channels, args.lr) == (64, 64, 100, 64, 2e-4)
    assert (args.steps, args.gan_steps, args.method, args.gallery) == (100_000, 50_000, "aegan", 20_000)
    args, _ = inverse_gen.parse_args(["--quick", "--method", "search", "--out", "nowhere"])
    assert (args.steps, args.gallery) == (4000, 250)
