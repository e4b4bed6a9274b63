import copy
import json
import math
import shutil
import subprocess
import sys
from unittest.mock import MagicMock

import make_classifier
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, TINY, adam_by_hand, count_passes, load, log_of, mean_distance, run_as_a_user
from torch import nn
from torchvision.transforms.v2.functional import gaussian_blur

import pagan
import vae_began
from common import Data, DataError, draw_faces, load_data, to_float

ROWS = [("l1", "none"), *(("pair", kind) for kind in ("crop", "blur", "contrast", "none"))]
NUMBERS = "sample_diversity heldout_l1 heldout_l1_of_mean_image rmse_255 l1_of_blur l2_of_blur l1_of_crop".split()
NUMBERS += ["l2_of_crop"]
JUDGED = "inception_score inception_score_std inception_score_of_real fid fid_of_real rid rid_of_augmentation".split()
JUDGED += ["rid_of_mean_image"]


def random_batch(images, latents):
    """x, x_aug, z, epsilon."""
    x, x_aug = torch.rand(2, images, 3, 16, 16).double() * 2 - 1
    return x, x_aug, torch.randn(latents, 5).double(), torch.randn(images, 5).double()


def tiny(reconstruction="pair", images=4, latents=4):
    """Small networks in float64 with weights that let every gradient be seen, and a batch x, x_aug, z, epsilon."""
    torch.manual_seed(0)
    nets = pagan.build_networks(reconstruction, 16, 2, 5).double()
    for name, buffer in nets.named_buffers():
        if "running" in name:  # so that in training mode they are other functions
            nn.init.uniform_(buffer, 0.1, 0.4)
    for parameter in nets.parameters():
        parameter.data += (0.1 if len(parameter) < pagan.HIDDEN else 0.02) * torch.randn_like(parameter)
    for layer in [*nets.modules()] * 100:
        getattr(layer, "weight", None)  # a power iteration each, for the norms of the new weights
    return nets, *random_batch(images, latents)


# ---------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("size, widths", [(16, [2, 4, 8]), (32, [2, 4, 8, 16]), (64, [2, 4, 8, 16, 32])])
def test_shapes_and_ranges(size, widths):
    nets = pagan.build_networks("pair", size, 2, 7)
    x, z = torch.randn(3, 3, size, size), torch.randn(3, 7)
    assert [2 * width for width in pagan.IMAGE_SIZES[size]] == widths and nets.training
    assert nets["G"](z).shape == x.shape and nets["G"](100 * z).abs().max() <= 1
    assert nets["E"](x).shape == (3, 14)
    for logits in (nets["D_x"](x), nets["D_z"](z), nets["D_xx"](x, x)):
        assert logits.shape == (3, 1) and logits.std() > 0


def test_weights_of_sngan_s_networks_counted_by_hand():
    def conv(c_in, c_out, kernel):
        return kernel**2 * c_in * c_out + c_out

    norms, widths = 2 * (512 + 256 + 128 + 64), (64, 128, 256)
    stages = sum(conv(c, c, 4) + conv(c, 2 * c, 3) for c in widths) + 4 * 4 * 512 + 1
    expected = {
        "G": 128 * 8192 + 8192 + sum(conv(2 * c, c, 4) for c in widths) + conv(64, 3, 3) + norms,
        "E": conv(3, 64, 3) + sum(conv(c, 2 * c, 4) for c in widths) + norms + 8192 * 256 + 256,
        "D_x": conv(3, 64, 3) + stages,
        "D_z": 128 * 512 + 512 + 512 * 512 + 512 + 512 + 1,
        "D_xx": conv(6, 64, 3) + stages,
    }
    nets = pagan.build_networks("pair", 32, 64, 128)
    assert {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()} == expected
    assert pagan.build_networks("l1", 16, 2, 5).keys() == expected.keys() - {"D_xx"}


def test_the_networks_layer_by_layer():
    steps = {
        "linear": lambda h, w, layer: F.linear(h, w, layer.bias),
        "same": lambda h, w, layer: F.conv2d(h, w, layer.bias, 1, 1),
        "half": lambda h, w, layer: F.conv2d(h, w, layer.bias, 2, 1),
        "double": lambda h, w, layer: F.conv_transpose2d(h, w, layer.bias, 2, 1),
        "norm": lambda h, w, layer: F.batch_norm(h, layer.running_mean, layer.running_var, layer.weight, layer.bias),
        "relu": lambda h, *_: h.relu(),
        "leaky": lambda h, *_: torch.where(h > 0, h, 0.1 * h),
        "tanh": lambda h, *_: h.tanh(),
        "flat": lambda h, *_: h.flatten(1),
        "4x4": lambda h, *_: h.view(4, 8, 4, 4),
    }
    nets, x, y, z, _ = tiny()
    nets.eval()
    d = "same leaky half leaky same leaky half leaky same leaky flat linear"
    g = "linear 4x4 norm relu double norm relu double norm relu same tanh", z
    e = "same norm leaky half norm leaky half norm leaky flat linear", x
    d_z = "linear leaky linear leaky linear", z
    for (layers, *inputs), name in zip((g, e, (d, x), d_z, (d, x, y)), nets, strict=True):
        h = torch.cat(inputs, 1)
        for step, layer in zip(layers.split(), nets[name], strict=True):
            w = next((p for p in layer.parameters() if p.ndim > 1), None)
            if name in ("D_x", "D_xx") and w is not None:  # spectral norm
                w = w / torch.linalg.svdvals(w.flatten(1))[0]
            h = steps[step](h, w, layer)
        torch.testing.assert_close(nets[name](*inputs), h, rtol=1e-4, atol=1e-6, msg=name)


def test_initial_weights_are_torch_s():
    weights = [w for w in pagan.build_networks("pair", 16, 16, 64).parameters() if w.ndim > 1]
    assert len(weights) == 4 + 4 + 6 + 6 + 3
    for w in weights:
        bound = 1 / math.sqrt(w[0].numel())  # of a uniform distribution
        assert 0.9 * bound < w.abs().max() < 1.001 * bound
        assert w.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("reconstruction, size", [("pair", 8), ("l1", 48), ("l2", 16)])
def test_unknown_sizes_and_models_are_refused(reconstruction, size):
    with pytest.raises(ValueError, match=f"{reconstruction}, size {size}.*16, 32, 64"):
        pagan.build_networks(reconstruction, size, 2, 5)


def test_the_arguments_of_the_library_s_layers():
    nets = pagan.build_networks("pair", 32, 2, 5)
    norms = [module for module in nets.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps, norm.affine) for norm in norms} == {(0.1, 1e-5, True)} and len(norms) == 8
    spectral = [module for module in nets.modules() if hasattr(module, "_power_method")]
    assert {(module.n_power_iterations, module.eps) for module in spectral} == {(1, 1e-12)} and len(spectral) == 2 * 8
    convs = [module for module in nets.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]
    assert all(conv.padding_mode == "zeros" and conv.bias is not None for conv in convs)


# ----------------------------------------------------------------------------------------------------- augmentations


@pytest.mark.parametrize("size, p, pad", [(16, 0, 0), (16, 0.06, 1), (16, 0.1, 2), (32, 0.1, 3), (16, 0.5, 8)])
def test_crop_against_a_loop(size, p, pad):
    x, u = torch.randn(42, 3, size, size), torch.cat([torch.rand(40, 2), torch.tensor([[0, 0], [1 - 2**-24] * 2])])
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode="reflect")
    rows, columns = np.floor(u.numpy() * (2 * pad + 1)).astype(int).T
    y = pagan.AUGMENTATIONS["crop"](x, u, p)
    for i, (row, column) in enumerate(zip(rows, columns)):
        assert np.array_equal(y[i].numpy(), padded[i, :, row : row + size, column : column + size])
    assert y.is_contiguous() and rows[-1] == columns[-1] == 2 * pad
    with pytest.raises(ValueError, match="square"):
        pagan.crop(x[..., 1:], u, p)


@pytest.mark.parametrize("size", pagan.IMAGE_SIZES)
def test_blur_against_torchvision(size):
    x, u = torch.randn(5, 3, size, size).double(), torch.rand(5, 2).double()
    kernel = 2 * math.ceil(3 * size * 3 / 64) + 1
    for image, blurred, (amount, _) in zip(x, pagan.AUGMENTATIONS["blur"](x, u, 0.1), u.tolist()):
        expected = gaussian_blur(image, [kernel] * 2, [size / 32 * (0.5 + amount)] * 2)  # 1/64 to 3/64 of the side
        torch.testing.assert_close(blurred, expected)


def test_contrast_against_numpy():
    x, u = torch.rand(5, 3, 16, 16).double() * 2 - 1, torch.rand(5, 2).double()
    for image, changed, (amount, _) in zip(x.numpy(), pagan.AUGMENTATIONS["contrast"](x, u, 0.1).numpy(), u.tolist()):
        expected = (0.5 + amount) * image + (0.5 - amount) * image.mean()
        np.testing.assert_allclose(changed, np.clip(expected, -1, 1))
    torch.testing.assert_close(pagan.contrast(x, 0 * u + 0.5), x)  # a factor of 1
    assert pagan.contrast(3 * x, u).max() == 1 == -pagan.contrast(3 * x, u).min()


# ------------------------------------------------------------------------------------------------------------ losses


def test_reparameterise():
    mean, log_variance, epsilon = torch.randn(3, 4, 5).double()
    expected = mean.numpy() + epsilon.numpy() * np.sqrt(np.exp(log_variance.numpy()))
    np.testing.assert_allclose(pagan.reparameterise(mean, log_variance, epsilon).numpy(), expected)
    torch.autograd.gradcheck(pagan.reparameterise, (mean.requires_grad_(), log_variance.requires_grad_(), epsilon))


def test_the_objective_of_logits():
    d, loss, loss_not = 3 * torch.randn(6, 1).double(), pagan.minus_log, pagan.minus_log_not
    D = 1 / (1 + np.exp(-d.numpy()))
    assert (loss(d).item(), loss_not(d).item()) == pytest.approx((-np.log(D).mean(), -np.log(1 - D).mean()))
    assert loss(0 * d + 50) < 1e-20 and loss(0 * d - 1000) == 1000 == loss_not(0 * d + 1000)  # no logarithm of 0
    for function, sign in ((loss, -1), (loss_not, 1)):
        torch.autograd.gradcheck(function, d.requires_grad_())
        assert (sign * torch.autograd.grad(function(d), d)[0] > 0).all()


def losses_by_hand(nets, x, x_aug, z, epsilon):
    """Algorithm 1 line by line: every discriminator judges its inputs apart. Only G's are together, if it trains."""

    def D(name, *inputs):
        return torch.sigmoid(nets[name](*inputs))

    mean, log_variance = nets["E"](x).split(5, 1)
    z_hat = mean + epsilon * log_variance.exp().sqrt()
    x_pr, x_rec = nets["G"](z), nets["G"](z_hat)
    if nets["G"].training:
        x_pr, x_rec = nets["G"](torch.cat([z, z_hat])).tensor_split([len(z)])
    losses = {"L_d_x": -D("D_x", x).log().mean() - (1 - D("D_x", x_pr)).log().mean()}
    losses["L_d_z"] = -D("D_z", z).log().mean() - (1 - D("D_z", z_hat)).log().mean()
    if "D_xx" in nets:
        losses["L_d_xx"] = -D("D_xx", x, x_aug).log().mean() - (1 - D("D_xx", x, x_rec)).log().mean()
        rec = -D("D_xx", x, x_rec).log().mean()
    else:
        losses["L1"] = (x - x_rec).abs().sum() / x.numel()
        rec = 10 * losses["L1"]
    losses["L_g"] = rec - D("D_x", x_pr).log().mean()
    losses["L_e"] = rec - D("D_z", z_hat).log().mean()
    return losses


@pytest.mark.parametrize("reconstruction", ["pair", "l1"])
def test_losses_line_by_line(reconstruction):
    def of_batch(*batch):
        return tuple(pagan.LOSSES[reconstruction](nets, *batch).values())

    nets, *batch = tiny(reconstruction, images=6, latents=3)
    nets.eval()  # so that one image is judged without regard to the others
    losses = pagan.LOSSES[reconstruction](nets, *batch)
    expected = {name: loss.item() for name, loss in losses_by_hand(nets, *batch).items()}
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected)
    torch.autograd.gradcheck(of_batch, [t.requires_grad_() for t in batch], fast_mode=True)
    if reconstruction == "l1":
        nets["G"].forward = lambda z: torch.cat([batch[0][:3], batch[0]])  # perfect
        assert pagan.pagan_l1_losses(nets, *batch)["L1"] == 0


REACHED = {
    "pair": {"L_d_x": "D_x G", "L_d_z": "D_z E", "L_d_xx": "D_xx G E", "L_g": "D_x D_xx G E", "L_e": "D_z D_xx G E"},
    "l1": {"L_d_x": "D_x G", "L_d_z": "D_z E", "L_g": "D_x G E", "L_e": "D_z G E", "L1": "G E"},
}


@pytest.mark.parametrize("reconstruction", REACHED)
def test_which_networks_a_loss_reaches(reconstruction):
    nets, *batch = tiny(reconstruction)
    nets["G"].eval()  # else E reaches the samples through the statistics of the batch that they share
    losses = pagan.LOSSES[reconstruction](nets, *batch)
    assert losses.keys() == REACHED[reconstruction].keys()
    for name, reached in REACHED[reconstruction].items():
        for net in nets:
            parameters = list(nets[net].parameters())
            gradients = torch.autograd.grad(losses[name], parameters, retain_graph=True, allow_unused=True)
            assert any(g is not None and g.abs().max() > 0 for g in gradients) == (net in reached.split()), (name, net)


@pytest.mark.parametrize("reconstruction, passes", [("pair", "G1 E1 D_x1 D_z1 D_xx1"), ("l1", "G1 E1 D_x1 D_z1")])
def test_nothing_is_made_twice_so_one_z_hat_serves_all_losses(reconstruction, passes):
    nets, *batch = tiny(reconstruction)
    assert count_passes(nets, pagan.LOSSES[reconstruction], nets, *batch) == passes


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("reconstruction", ["pair", "l1"])
def test_train_step_against_autograd_by_hand(reconstruction):
    nets, *_ = tiny(reconstruction)
    for name in nets.keys() & {"D_x", "D_xx"}:
        nets[name].eval()  # without power iterations, which would be more where inputs are judged apart
    optimizer, other, moments = pagan.build_optimizer(nets, 1e-3), copy.deepcopy(nets), []
    players = {"D_x": "L_d_x", "D_z": "L_d_z", "D_xx": "L_d_xx", "G": "L_g", "E": "L_e"}
    # A bias that batch norm takes out again has no gradient but rounding, of which Adam makes whole steps.
    idle = {"G.4.bias", "G.7.bias", "E.0.bias", "E.3.bias", "E.6.bias"}
    for i in range(3):
        torch.manual_seed(10 + i)
        batch, parameters, gradients = random_batch(4, 3), [], []
        losses = pagan.train_step(nets, optimizer, reconstruction, *batch)
        expected = losses_by_hand(other, *batch)
        for name, value in expected.items():
            assert losses[name].item() == pytest.approx(value.item()) and not losses[name].requires_grad
        for name, net in other.items():
            parameters += net.parameters()
            gradients += torch.autograd.grad(expected[players[name]], list(net.parameters()), retain_graph=True)
        moments = moments or [0, *([torch.zeros_like(p) for p in parameters] for _ in range(2))]
        adam_by_hand(parameters, gradients, 1e-3, moments)
        for name, parameter in nets.named_parameters():
            assert (parameter.grad.abs().max() < 1e-12) == (name in idle), name
            if name in idle:
                other.get_parameter(name).data.copy_(parameter.data)
            torch.testing.assert_close(parameter, other.get_parameter(name), atol=1e-8, rtol=1e-6, msg=name)


def test_batches_are_the_images_their_augmentations_and_normal_noise(monkeypatch):
    images, augment = draw_faces(10, 16)[0].repeat(50, 1, 1, 1), MagicMock()
    monkeypatch.setitem(pagan.AUGMENTATIONS, "blur", augment)
    torch.manual_seed(0)
    x, x_aug, z, epsilon = pagan.make_inputs(images, 7, "blur", 0.3)
    ((source, u, p),) = [call.args for call in augment.call_args_list]
    assert torch.equal(x, to_float(images)) and source is x and x_aug is augment.return_value
    assert p == 0.3 and u.shape == (500, 2) and 0 <= u.min() < 0.02 and 0.98 < u.max() < 1
    for noise in (z, epsilon):
        assert noise.shape == (500, 7) and abs(noise.mean()) < 0.1 and noise.std().item() == pytest.approx(1, abs=0.1)
    for pair in (u.T, torch.stack([z.flatten(), epsilon.flatten()])):
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.2


# -------------------------------------------------------------------------------------------------------- evaluation


def test_rid():
    rid = pagan.reconstruction_inception_dissimilarity
    log_p, log_q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert rid(log_p, log_q) == pytest.approx(math.sqrt(4 / 3))  # KL = (log 2 + log 2/3) / 2
    p, q = torch.randn(2, 9, 7).double().log_softmax(2)
    expected = np.exp((p.exp().numpy() * (p.numpy() - q.numpy())).sum(1).mean())
    assert rid(p, q) == pytest.approx(expected) and rid(q, p) != pytest.approx(expected) and expected > 1
    sure = torch.tensor([[0.0, 200.0]]).log_softmax(1)
    assert rid(sure, sure.flip(1)) == pytest.approx(math.exp(200)) and rid(sure, sure) == 1


@pytest.mark.parametrize("script", [pagan, vae_began])
def test_inception_score_of_known_and_of_random_probabilities(script):
    assert script.inception_score(torch.full((40, 8), 1 / 8)) == pytest.approx((1, 0), abs=1e-6)
    assert script.inception_score(torch.eye(8).repeat(10, 1)) == pytest.approx((8, 0), abs=1e-5)  # each class once
    assert script.inception_score(torch.eye(8)[:1].expand(40, -1)) == pytest.approx((1, 0), abs=1e-6)
    p = torch.randn(67, 7).double().softmax(1)
    for splits in (3, 10):
        scores = []
        for part in np.array_split(p.numpy(), splits):
            scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
        assert script.inception_score(p, splits) == pytest.approx((np.mean(scores), np.std(scores)))


def test_fid_against_the_root_of_the_product():
    """Covariances that do not commute: the eigenvalues of C_a C_b itself, in NumPy."""
    torch.manual_seed(0)
    fid = pagan.frechet_inception_distance
    x, y = (torch.randn(count, 6).double() @ torch.randn(6, 6).double() for count in (40, 50))
    c_x, c_y = np.cov(x.numpy().T), np.cov(y.numpy().T)
    trace = np.sqrt(np.linalg.eigvals(c_x @ c_y).real.clip(0)).sum()
    expected = ((x.mean(0) - y.mean(0)).numpy() ** 2).sum() + np.trace(c_x) + np.trace(c_y) - 2 * trace
    assert fid(x, y) == pytest.approx(expected) == fid(y, x) and fid(x, x) == pytest.approx(0, abs=1e-9)
    assert fid(x.float(), y.float()) == pytest.approx(expected, rel=1e-4)
    few = torch.randn(30, 100) @ torch.randn(100, 200)  # of most features no more than rounding
    assert fid(few, few + 1) == pytest.approx(200, rel=1e-4)


@pytest.mark.parametrize("heldout, training", [(45, True), (3, False)])
def test_figures_show_what_they_say(heldout, training, monkeypatch, tmp_path):
    shown, captions = {}, [["original"], ["blur"], ["contrast"], ["pad + crop"]]
    monkeypatch.setattr(pagan, "save_grid", lambda path, *images, **more: shown.update({path: (images, more)}))
    nets, images, z = tiny()[0].float(), draw_faces(20 + heldout, 16)[0], torch.randn(256, 5)
    data = Data(images[:20], images[20:], (), None, None, (), 0)
    pagan.save_figures(nets.train(training), data, z, tmp_path, 70, 0.2)
    assert all(module.training == training for module in nets.modules())  # the mode that it found
    x = to_float(images[20:60])
    few = x[:10]
    u = torch.rand(len(few), 2, generator=torch.Generator().manual_seed(0))
    nets.eval()
    with torch.no_grad():
        expected = {"samples_70": ([nets["G"](z[:100])], {})}
        expected["reconstructions_70"] = [x, nets["G"](nets["E"](x)[:, :5])], {"groups_per_row": 5}
    columns = [few, *(pagan.AUGMENTATIONS[kind](few, u, 0.2) for kind in ("blur", "contrast", "crop"))]
    expected["figure_augmentations"] = columns, {"groups_per_row": 2, "captions": captions}
    assert set(shown) == {tmp_path / f"{name}.png" for name in expected}
    for name, (wanted, options) in expected.items():
        pictures, given = shown[tmp_path / f"{name}.png"]
        assert given == options and len(pictures) == len(wanted), name
        assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(pictures, wanted)), name


@pytest.mark.parametrize("kind, training", [("crop", True), ("none", False)])
def test_measure_against_numpy(kind, training):
    def stub_classifier(x):
        assert not x.requires_grad
        return x[:, :, :2, :2].flatten(1) * 3, x[:, 0, :4, 0]

    def uniform(rows):
        return torch.rand(rows, 2, generator=torch.Generator().manual_seed(1))

    nets, z = tiny()[0].float(), torch.randn(80, 5)
    images = torch.randint(256, (2340, 3, 16, 16), dtype=torch.uint8)
    data = Data(images[:1100] // 2, images[1100:], (), None, None, (), 0)
    nets.train(training)
    results = pagan.measure(nets, data, z, kind, 0.2, None, 130)
    with_classifier = pagan.measure(nets, data, z, kind, 0.2, stub_classifier, 130)
    judged = {name: with_classifier[name] for name in JUDGED}
    assert with_classifier == results | judged and [*with_classifier] == NUMBERS + JUDGED
    assert all(module.training == training for module in nets.modules())  # the mode that it found
    nets.eval()
    x, u, mean = to_float(data.heldout[:1000]), uniform(1000), (data.train.numpy() / 127.5 - 1).mean(0)
    with torch.no_grad():
        rec, blur, crop = nets["G"](nets["E"](x)[:, :5]), pagan.blur(x, u), pagan.crop(x, u, 0.2)
        diversity = mean_distance(nets["G"](z)) / mean_distance(x[:80])
    l1 = {name: np.abs(y - x.numpy()).mean() for name, y in zip(("rec", "mean"), (rec.numpy(), mean))}
    expected = {"sample_diversity": diversity, "heldout_l1": l1["rec"]}
    expected |= {"heldout_l1_of_mean_image": l1["mean"], "rmse_255": 127.5 * ((rec - x).numpy() ** 2).mean() ** 0.5}
    for name, y in (("blur", blur), ("crop", crop)):
        expected |= {f"l1_of_{name}": np.abs((y - x).numpy()).mean(), f"l2_of_{name}": ((y - x).numpy() ** 2).mean()}
    assert results == pytest.approx(expected, rel=1e-3, abs=1e-6) and list(results) == NUMBERS
    x = x[:130]
    noise = torch.randn(130, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        aug = pagan.AUGMENTATIONS[kind](x, uniform(130), 0.2)
        made = nets["G"](noise), rec[:130], aug, torch.from_numpy(mean).float().expand_as(x)
        of_x, of_train, *of_made = (stub_classifier(part) for part in (x, to_float(data.train[:130]), *made))
    p, p_train, p_pr, p_rec, p_aug, p_mean = (logits.log_softmax(1) for logits, _ in (of_x, of_train, *of_made))
    rid, fid = pagan.reconstruction_inception_dissimilarity, pagan.frechet_inception_distance
    expected = [*pagan.inception_score(p_pr.exp()), pagan.inception_score(p_train.exp())[0]]
    expected += [fid(of_x[1], of_made[0][1]), fid(of_x[1], of_train[1])]
    expected += [rid(p, other) for other in (p_rec, p_aug, p_mean)]
    assert judged == pytest.approx(dict(zip(JUDGED, expected, strict=True)), rel=1e-3, abs=1e-6)
    assert (judged["rid_of_augmentation"] == pytest.approx(1)) == (kind == "none")


@pytest.fixture(scope="module")
def classifier(photos, tmp_path_factory):
    """A classifier made of photos in three sub-folders, as a user makes it, and this folder."""
    folder, path = tmp_path_factory.mktemp("classes"), tmp_path_factory.mktemp("made") / "classifier.pt"
    shutil.copy(photos / "1.png", folder / "of no class.png")
    for i, image in enumerate(sorted(photos.glob("*.png"))):
        (folder / "abc"[i % 3]).mkdir(exist_ok=True)
        shutil.copy(image, folder / "abc"[i % 3])
    command = [sys.executable, ROOT / "tests/make_classifier.py", "--data", folder, "--steps", "30", "--out", path]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "sub-folders: a, b, c" in out and "3 classes" in out
    return path, folder


def test_a_classifier_of_sub_folders_measures_a_run(classifier, tmp_path, cli):
    path, folder = classifier
    small = ["--data", folder, *TINY, "--steps", 1, "--samples", 20, "--classifier", path, "--out", tmp_path]
    assert cli(pagan, *small).status == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["config"]["classifier"] == str(path) and results["fid"] > 0
    assert 1 <= results["inception_score"] <= 3 and results["rid"] > 1 and results["rid_of_augmentation"] > 1


def test_a_classifier_of_attributes(photos, tmp_path, monkeypatch):
    shutil.copytree(photos, tmp_path / "photos")
    rows = [f"{i}.png,{i % 2},{int(i > 14)},0" for i in range(30)]
    (tmp_path / "photos" / "attributes.csv").write_text("\n".join(["file,odd,late,never", *rows]))
    command = ["make_classifier.py", "--steps", "5", "--out", str(tmp_path / "c.pt"), "--data"]
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "photos")])
    make_classifier.main()
    logits, features = torch.jit.load(tmp_path / "c.pt")(torch.zeros(3, 3, 16, 16))
    assert logits.shape == (3, 4) and features.shape == (3, 128)
    monkeypatch.setattr(sys, "argv", [*command, str(photos)])  # which has no attributes, and one sub-folder
    with pytest.raises(SystemExit, match="error"):
        make_classifier.main()


@pytest.mark.parametrize("script", [pagan, vae_began])
def test_classifiers_are_loaded_for_evaluation_and_unfit_ones_refused(script, classifier, tmp_path):
    path, device = str(classifier[0]), torch.device("cpu")
    assert not script.load_classifier(path, 16, device).training and script.load_classifier("none", 16, device) is None
    planes, rows, one = lambda x: (x[:, 0], x[:, 0]), lambda x: x[:, 0, 0], lambda x: (x[:1, 0, 0], x[:1, 0, 0])
    unfits = [planes, rows, one, lambda x: x[:, 0]]
    if script is pagan:  # which needs the features, too
        unfits += [lambda x: (x[:, 0, 0], x[:, 0, 0, 0]), lambda x: (x[:, 0, 0], x[:, 0, 0, :1])]
    for unfit in unfits:
        torch.jit.trace(unfit, torch.zeros(2, 3, 16, 16)).save(str(tmp_path / "unfit"))
        with pytest.raises(DataError, match=r"unfit is no TorchScript taking \[N, 3, 16, 16\] to"):
            script.load_classifier(str(tmp_path / "unfit"), 16, device)


@pytest.mark.parametrize("script", [pagan, vae_began])
@pytest.mark.parametrize("error", [OSError("no network"), RuntimeError("invalid hash value")])
def test_inception_without_its_whole_file_is_refused(script, error, monkeypatch):
    monkeypatch.setattr(torchvision.models.Inception_V3_Weights, "get_state_dict", MagicMock(side_effect=error))
    with pytest.raises(DataError, match=f"checkpoints/inception_v3_google-0cc3c7bd.pth, which cannot be had: {error}"):
        script.load_classifier("inception", 16, torch.device("cpu"))


@pytest.mark.parametrize("script", [pagan, vae_began])
def test_inception_sees_images_of_299_pixels_in_its_own_range(script, monkeypatch):
    net, pooled = torchvision.models.inception_v3(weights=None, init_weights=False).eval(), []
    for parameter in (p for p in net.parameters() if p.ndim > 1):  # so that images differ
        nn.init.kaiming_normal_(parameter)
    weights = torchvision.models.Inception_V3_Weights  # with net's weights instead of those that are fetched
    monkeypatch.setattr(weights, "get_state_dict", lambda *_, **__: net.state_dict())
    net.avgpool.register_forward_hook(lambda layer, inputs, output: pooled.append(output.flatten(1)))
    x, classifier = torch.rand(2, 3, 16, 16) * 2 - 1, script.load_classifier("inception", 16, torch.device("cpu"))
    with torch.no_grad():
        logits, features = classifier(x)
        torch.testing.assert_close(logits, net(F.interpolate(x, (299, 299), mode="bilinear")))
    assert logits.shape == (2, 1000) and logits.std(0).max() > 0
    if script is pagan:
        torch.testing.assert_close(features, pooled[0])
        assert features.shape == (2, 2048) and features.std(0).max() > 0


# ------------------------------------------------------------------------------------------------------ command line


def test_a_run_as_a_user_starts_it(photos, tmp_path):
    pictures = {f"samples_{step}": (10, 10, 1) for step in (2, 4, 5)}
    pictures |= {f"reconstructions_{step}": (3, 1, 2) for step in (2, 4, 5)} | {"figure_augmentations": (2, 2, 4)}
    arguments = ["--data", photos, *TINY, "--steps", 5]
    out, results, header, _ = run_as_a_user("pagan", *arguments, cwd=tmp_path, pictures=pictures)
    assert results["config"]["channels"] == 2 and out.startswith("pair, augmentation crop on 27 images of ")
    assert set(results) == {*NUMBERS, "steps", "config"}
    assert all(0 < results[name] < 255 and f"{name:26}{results[name]:10.3f}" in out for name in NUMBERS)
    assert header == "L_d_x L_d_z L_d_xx L_g L_e".split()


@pytest.mark.parametrize("reconstruction, kind", ROWS)
def test_every_row_of_the_ablation_study_trains(reconstruction, kind, photos, tmp_path, cli):
    more = ["--reconstruction", reconstruction, "--augmentation", kind, "--steps", 1, "--out", tmp_path]
    result = cli(pagan, "--data", photos, *TINY, *more)
    assert result.status == 0 and result.out.startswith(f"{reconstruction}, augmentation {kind} on 27 "), result
    assert log_of(tmp_path)[0] == ["step", *REACHED[reconstruction]]
    assert ("D_xx.0.bias" in load(tmp_path)["networks"]) == (reconstruction == "pair")


def test_the_settings_reach_the_training_step(photos, tmp_path, cli, monkeypatch):
    def spy(nets, optimizer, *args):
        (group,) = optimizer.param_groups
        assert group["capturable"] and [*map(id, group["params"])] == [*map(id, nets.parameters())]
        steps.append((group["lr"], args[0], *(tensor.shape for tensor in args[1:])))
        return train_step(nets, optimizer, *args)

    steps, drawn, figures, results = [], [], [], []
    data, train_step, make_inputs = load_data(photos, 16), pagan.train_step, pagan.make_inputs
    monkeypatch.setattr(pagan, "train_step", spy)
    monkeypatch.setattr(pagan, "make_inputs", lambda *args: drawn.append(args[1:]) or make_inputs(*args))
    monkeypatch.setattr(pagan, "save_figures", lambda nets, *args: figures.append(args))
    monkeypatch.setattr(pagan, "measure", lambda nets, *args: results.append(args) or {})
    monkeypatch.setattr(pagan, "load_classifier", lambda *args: "classifier")
    settings = "--reconstruction l1 --augmentation blur --crop 0.3 --lr 1e-3 --samples 33 --seed 9"
    for i, more in enumerate((settings.split(), [])):
        cli(pagan, "--data", photos, *TINY, "--steps", 1, "--latent-dim", 7, "--out", tmp_path / str(i), *more)
    shapes = (4, 3, 16, 16), (4, 3, 16, 16), (4, 7), (4, 7)
    assert steps == [(1e-3, "l1", *shapes), (2e-4, "pair", *shapes)]
    assert drawn == [(7, "blur", 0.3), (7, "crop", 0.1)]
    assert [args[2:] for args in results] == [("blur", 0.3, "classifier", 33), ("crop", 0.1, "classifier", 10_000)]
    assert [args[2:] for args in figures] == [(tmp_path / "0", 1, 0.3), (tmp_path / "1", 1, 0.1)]
    normal = torch.randn(256, 7, generator=torch.Generator().manual_seed(0))
    for shown, z, *_ in (*figures, *results):  # the same latents whatever the seed
        assert torch.equal(shown.heldout, data.heldout) and torch.equal(z, normal)


def test_the_defaults_and_quick_are_those_of_the_rulings():
    args, quick = (vars(pagan.parse_args(["--out", "nowhere", *more])[0]) for more in ([], ["--quick"]))
    expected = {"steps": 100_000, "batch_size": 64, "image_size": 32, "latent_dim": 128, "channels": 64, "lr": 2e-4}
    expected |= {"reconstruction": "pair", "augmentation": "crop", "crop": 0.1, "samples": 10_000}
    assert args.items() >= {**expected, "classifier": "none", "data": "faces"}.items()
    assert round(quick["crop"] * quick["image_size"]) == 1 and quick["lr"] == pytest.approx(1.5 * args["lr"])
