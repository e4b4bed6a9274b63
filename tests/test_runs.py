"""What all scripts do alike on the command line: resume to the same bits, survive a kill, refuse bad input, ..."""

import copy
import importlib
import json
import math
import shutil
import signal
import time
from unittest.mock import MagicMock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import (
    TINY,
    assert_refused,
    assert_same,
    files,
    graphs_on_the_cpu,
    load,
    log_of,
    mean_distance,
    refuse_reading_back,
    start,
)
from PIL import Image

from common import draw_faces, load_data

CLASSIFIER = [  # bad input of vae_began.py and pagan.py
    (["--samples", 0], ["--samples", "0", "at least 1"]),
    (["--classifier", "missing.pt"], ["--classifier missing.pt"]),
    (["--classifier", "other/checkpoint.pt"], ["--classifier other/checkpoint.pt"]),
    (["--classifier", "inception"], ["inception_v3_google-0cc3c7bd.pth", "checkpoints"]),
]
# For each script: its small arguments, what makes other models of it, the losses function that a run uses and a loss of
# it, input that it alone refuses, and settings of a run that it does not change.
SCRIPTS = {
    "aegan": {
        "tiny": TINY,
        "breaks": ("aegan", "L_G_E"),
        "models": [["--model", "gan"], ["--model", "aae"]],
        "bad": [(["--model", "vae"], ["--model", "vae", "aegan"]), (["--lambda-rx", "nan"], ["--lambda-rx", "nan"])],
        "fixed": [(["--model", "gan"], ["model = aegan, not gan"])],
    },
    "bigan_latent": {
        "tiny": [*TINY, "--unroll", 1],
        "breaks": (None, "L_G_E"),
        "models": [["--unroll", 0], ["--unroll", 3, "--stochastic-encoder"], ["--experiment", "EX8"]],
        "bad": [
            (["--experiment", "EX10"], ["--experiment", "EX10", "EX9"]),
            (["--unroll", -1], ["--unroll", "-1", "at least 0"]),
            (["--lambda-2", "nan"], ["--lambda-2", "nan"]),
            (["--lambda-3", 1], ["--lambda-3", "alexnet-owt-7be5be79.pth", "checkpoints"]),
        ],
        "fixed": [(["--experiment", "EX8"], ["experiment = EX7, not EX8"]), (["--unroll", 0], ["unroll = 1, not 0"])],
    },
    "vae_began": {
        "tiny": ["--filters" if argument == "--channels" else argument for argument in TINY],
        "breaks": ("vae-began", "L_gen"),
        "models": [["--model", "began"], ["--model", "began-lsm"]],
        "bad": [
            (["--model", "vae"], ["--model", "vae", "began-lsm"]),
            (["--gains", 1, 2], ["--gains"]),
            (["--gains", "nan", 0, 0], ["--gains", "nan"]),
            (["--gains", 0, "inf", 0], ["--gains", "inf", "at least 0"]),
            (["--gains", 0, 0, "-0.5"], ["--gains", "-0.5"]),
            (["--gamma", "nan"], ["--gamma", "nan"]),
            *CLASSIFIER,
        ],
        "fixed": [
            (["--model", "began"], ["model = vae-began, not began"]),
            (["--gains", 1, 2, 3], ["gains = [0.001, 1e-05, 1e-05], not [1.0, 2.0, 3.0]"]),
        ],
    },
    "pagan": {
        "tiny": TINY,
        "breaks": ("pair", "L_g"),
        "models": [
            ["--reconstruction", "l1"],
            *(["--augmentation", kind, "--crop", 0.2] for kind in ("crop", "blur", "contrast", "none")),
        ],
        "bad": [
            (["--reconstruction", "l2"], ["--reconstruction", "l2", "pair"]),
            (["--augmentation", "flip"], ["--augmentation", "flip", "contrast"]),
            (["--crop", "-0.1"], ["--crop", "-0.1", "at least 0"]),
            (["--samples", 9], ["--samples 9", "at least 10"]),
            (["--crop", 0.6], ["--crop", "0.6", "at most 0.5"]),
            (["--crop", 0.03], ["--crop", "0.03", "a pixel"]),
            (["--crop", "nan"], ["--crop", "nan"]),
            *CLASSIFIER,
        ],
        "fixed": [
            (["--augmentation", "none"], ["augmentation = crop, not none"]),
            (["--crop", 0.2], ["crop = 0.1, not 0.2"]),
        ],
    },
    "inverse_gen": {
        "tiny": [*TINY, "--method", "bigan", "--search-steps", 2],  # test_inverse_gen.py has runs of two stages
        "breaks": ("bigan", "L_G"),
        "models": [["--method", "search"], *(["--method", kind, "--gan-steps", 1] for kind in ("aegan", "direct"))],
        "bad": [
            (["--method", "vae"], ["--method", "vae", "search"]),
            (["--gan-steps", 0], ["--gan-steps", "at least 1"]),
            (["--method", "aegan", "--gan-steps", 2], ["--gan-steps 2", "--steps 2", "IG"]),
            (["--search-rate", "nan"], ["--search-rate", "nan"]),
            (["--gallery", 0], ["--gallery", "0", "at least 1"]),
        ],
        "fixed": [
            (["--method", "search"], ["method = bigan, not search"]),
            (["--gan-steps", 5], ["gan_steps = 50000, not 5"]),
            (["--latent-dim", 5], ["latent_dim = 100, not 5"]),
        ],
    },
}
BAD = [
    (["--data", "missing"], ["missing", "folder"]),
    (["--data", "empty"], ["empty", "0 readable images", "20 or more"]),
    (["--data", "PHOTOS", "--batch-size", 28], ["27 images", "--batch-size 28"]),
    (["--image-size", 48], ["--image-size", "48", "64"]),
    (["--stepps", 5], ["--stepps"]),
    (["--steps", 0], ["--steps", "0", "at least 1"]),
    (["--steps", "many"], ["--steps", "many"]),
    (["--lr", -1], ["--lr", "-1"]),
    (["--lr", "inf"], ["--lr", "inf", "finite"]),
    (["--device", "abacus"], ["--device abacus"]),
    (["--device", "meta"], ["--device meta"]),
    (["--eval"], ["--eval"]),
    (["--resume"], ["there is no run of SCRIPT.py in runs/SCRIPT", "--resume"]),
    (["--resume", "--out", "missing"], ["there is no run of SCRIPT.py in missing"]),
    (["--data", "PHOTOS", "--out", "file"], ["'file'", "xists"]),
    (["--data", "pictures", "--out", "pictures/run"], ["--out pictures/run", "--data pictures", "another"]),
    (["--data", "pictures", "--out", "empty/../pictures"], ["--out empty/../pictures", "--data pictures"]),
    (["--resume", "--out", "other"], ["there is no run of SCRIPT.py in other"]),
    (["--resume", "--out", "noise"], ["there is no run of SCRIPT.py in noise"]),
]
FIXED = [
    (["--image-size", 32], ["image_size = 16, not 32"]),
    (["--quick"], ["quick = False, not True"]),
    (["--steps", 5], ["at step 6 already", "--steps 5"]),
    (["--data", "OTHER"], ["the images of --data", "are not those of the run"]),
    (["--data", "MORE"], ["the images of --data", "are not those of the run"]),
]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(scope="module", params=SCRIPTS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def script(name):
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def tiny(name, photos):
    """Arguments of a small run."""
    return ["--data", photos, *SCRIPTS[name]["tiny"]]


@pytest.fixture(scope="module")
def finished(script, tiny, tmp_path_factory):
    """A run of six steps, never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    script.main([str(argument) for argument in (*tiny, "--steps", 6, "--out", folder)])
    return folder


def test_the_same_seed_gives_the_same_run_and_another_another(script, tiny, tmp_path, cli, finished):
    for seed in (0, 1):
        cli(script, *tiny, "--steps", 6, "--out", tmp_path / str(seed), "--seed", seed)
    assert_same(load(finished), load(tmp_path / "0"))
    assert (finished / "log.csv").read_bytes() == (tmp_path / "0" / "log.csv").read_bytes()
    assert log_of(tmp_path / "0")[1][0] != log_of(tmp_path / "1")[1][0]


def test_a_resumed_run_ends_in_the_same_bits(script, tiny, tmp_path, cli, finished):
    run = tmp_path / "run"
    cli(script, *tiny, "--steps", 4, "--out", run)
    assert cli(script, "--resume", "--out", run, "--steps", 6, "--device", "cpu").status == 0
    assert_same(load(finished), load(run))
    assert (finished / "log.csv").read_bytes() == (run / "log.csv").read_bytes()
    a, b = (json.loads((folder / "results.json").read_text()) for folder in (finished, run))
    assert a == b


def test_killed_at_any_moment_a_run_resumes(name, script, tiny, tmp_path, cli, finished):
    process = start(name, *tiny, "--steps", 100_000, "--out", "run", cwd=tmp_path)
    run, deadline = tmp_path / "run", time.time() + 120
    while len(list(run.glob("samples_*.png"))) < 2 and time.time() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    step = load(run)["step"]
    assert step % 2 == 0 and step >= 2
    with (run / "log.csv").open("a") as log:  # lines from after the checkpoint, the last one cut off in the middle
        log.write(f"{step + 50},1,1,1,1,1,1\n1")
    assert cli(script, "--resume", "--out", run, "--steps", step + 3, "--device", "cpu").status == 0
    assert cli(script, *tiny, "--steps", step + 3, "--out", tmp_path / "whole").status == 0
    assert_same(load(tmp_path / "whole"), load(run))
    assert (tmp_path / "whole" / "log.csv").read_bytes() == (run / "log.csv").read_bytes()


def test_a_run_killed_while_it_saves_keeps_the_checkpoint_before(script, tiny, tmp_path, cli, finished, monkeypatch):
    def killed(content, path):
        if content["step"] == 4:
            path.write_bytes(b"half a checkpoint")
            raise MemoryError
        save(content, path)

    save, run = torch.save, tmp_path / "run"
    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(MemoryError):
        cli(script, *tiny, "--steps", 6, "--out", run)
    monkeypatch.undo()
    assert load(run)["step"] == 2
    assert cli(script, "--resume", "--out", run, "--device", "cpu").status == 0
    assert_same(load(finished), load(run))


def test_ctrl_c_ends_in_one_line_and_the_run_goes_on_from_its_checkpoint(name, script, tiny, tmp_path, cli, finished):
    process = start(name, *tiny, "--steps", 100_000, "--out", "run", cwd=tmp_path)
    run, deadline = tmp_path / "run", time.time() + 120
    while not (run / "checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.splitlines()[-1].endswith("if there is one") and "Trace" not in err
    step = load(run)["step"]
    assert cli(script, "--resume", "--out", run, "--steps", step + 2, "--device", "cpu").status == 0
    assert load(run)["step"] == step + 2


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    name, script, tiny, tmp_path, cli, monkeypatch
):
    def broken(*args):
        counts.append(1)
        losses = function(*args)
        return losses | {loss: losses[loss] * (math.nan if len(counts) == 4 else 1)}

    model, loss = SCRIPTS[name]["breaks"]
    counts, run = [], tmp_path / "run"
    if model:
        function = script.LOSSES[model]
        monkeypatch.setitem(script.LOSSES, model, broken)
    else:
        function = script.bigan_losses
        monkeypatch.setattr(script, "bigan_losses", broken)
    result = cli(script, *tiny, "--steps", 6, "--out", run)
    assert_refused(result, "step 4", f"{loss} is not finite", run / "checkpoint.pt")
    assert load(run)["step"] == 2 and all(p.isfinite().all() for p in load(run)["networks"].values())


def test_resuming_a_finished_run_writes_its_figures_and_results_again(script, cli, finished):
    def content():
        return {file: (finished / file).read_bytes() for file in files(finished)}

    before = content()
    for file in before:
        if file.startswith(("figure", "samples_6", "reconstructions_6")) or file in ("results.json", "log.csv"):
            (finished / file).unlink()
    (finished / "log.csv").write_bytes(before["log.csv"])
    assert cli(script, "--resume", "--out", finished, "--device", "cpu").status == 0
    assert content() == before


def test_what_does_not_change_training_may_be_given_anew(script, tiny, tmp_path, cli, finished):
    run = tmp_path / "run"
    assert cli(script, *tiny, "--steps", 3, "--out", run).status == 0
    more = ["--steps", 6, "--log-every", 4, "--save-every", 5, "--device", "cpu"]
    assert cli(script, "--resume", "--out", run, *more).status == 0
    a, b = load(finished), load(run)
    assert_same(a["networks"], b["networks"])
    assert [row[0] for row in log_of(run)[1]] == ["1", "2", "3", "4", "5", "6"]  # 5 and 6 are saved
    assert {"samples_5.png", "samples_6.png"} <= set(files(run)) and "samples_4.png" not in files(run)


def test_the_first_line_says_how_long_a_cpu_will_take(script, tiny, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(script, "train_step", lambda *args, **_: {"loss": torch.tensor(1.0)})
    hours = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(script.time, "perf_counter", lambda: next(hours))
    four = ["--save-every", 4, "--log-every", 4, "--steps", 4, "--out", tmp_path / "run"]
    _, first, second, third, *_ = cli(script, *tiny, *four).out.splitlines()
    assert first.startswith("step 1 ") and "3:00:00 left" in first and "--quick" in second and third[:7] == "step 4 "


def test_quick_sets_what_its_help_says(script, cli, monkeypatch):
    args, _ = script.parse_args(["--quick", "--out", "nowhere", "--steps", "7000"])
    assert {key: getattr(args, key) for key in script.QUICK} == {**script.QUICK, "steps": 7000}
    monkeypatch.setenv("COLUMNS", "1000")
    shown = cli(script, "--help").out
    for key, value in script.QUICK.items():
        assert f"--{key.replace('_', '-')} {value}" in shown


def test_sample_diversity(script):
    a, b = torch.randn(5, 3, 4, 4), torch.randn(6, 3, 4, 4)
    assert script.sample_diversity(a, b) == pytest.approx(mean_distance(a) / mean_distance(b), rel=1e-5)
    assert script.sample_diversity(a[:1].expand(5, -1, -1, -1), b) == 0
    assert not math.isfinite(script.sample_diversity(b, a[:1].expand(5, -1, -1, -1)))


def test_bad_input_is_refused_in_one_line_and_nothing_is_written(
    name, script, tiny, photos, tmp_path, tmp_path_factory, cli, monkeypatch
):
    def no_network(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "other", "noise", "pictures"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").write_text("not a folder")
    torch.save({"script": "another", "step": 3}, "other/checkpoint.pt")
    (tmp_path / "noise" / "checkpoint.pt").write_bytes(b"noise")
    before = files(tmp_path)
    for arguments, words in BAD + SCRIPTS[name]["bad"]:
        arguments = [photos if argument == "PHOTOS" else argument for argument in arguments]
        result = cli(script, *tiny, "--steps", 2, *arguments)
        assert_refused(result, *(word.replace("SCRIPT", name) for word in words))
        assert files(tmp_path) == before and result.out.startswith("Downloading: " if result.out else ""), arguments


def test_another_run_s_folder_is_left_alone(name, script, tiny, photos, tmp_path, cli, finished):
    other, more = tmp_path / "other", tmp_path / "more"
    shutil.copytree(photos, more)
    other.mkdir()
    for i, image in enumerate(draw_faces(25, 16, seed=5)[0]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(other / f"{i}.png")
    shutil.copy(other / "0.png", more / "0 first.png")  # one image more, and others are held out
    before = {file: (finished / file).read_bytes() for file in files(finished)}
    again = ([*tiny, "--steps", 2], ["holds a run", "--resume", "another --out"])
    for arguments, words in [again, *FIXED, *SCRIPTS[name]["fixed"]]:
        arguments = [{"OTHER": other, "MORE": more}.get(argument, argument) for argument in arguments]
        arguments += () if "--data" in arguments else ("--data", photos)
        result = cli(script, *arguments, *(() if "--batch-size" in arguments else ("--resume",)), "--out", finished)
        assert_refused(result, *words)
        assert {file: (finished / file).read_bytes() for file in files(finished)} == before, arguments


def test_the_same_images_elsewhere_are_the_same_data(script, tiny, photos, tmp_path, cli, finished, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(photos, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    assert cli(script, *tiny, "--data", "./photos/", "--steps", 2, "--out", run).status == 0
    assert cli(script, "--resume", "--data", "photos", "--out", "run", "--steps", 4, "--device", "cpu").status == 0
    shutil.move(tmp_path / "photos", tmp_path / "moved")
    assert_refused(cli(script, "--resume", "--out", run, "--steps", 6), "photos is not a folder")
    arguments = ["--data", tmp_path / "moved", "--out", run, "--steps", 6, "--device", "cpu"]
    assert cli(script, "--resume", *arguments).status == 0
    assert_same(load(finished), load(run))


def test_an_optimizer_that_lacks_a_network_is_refused_and_frozen_weights_stay(
    name, script, tiny, tmp_path, cli, monkeypatch
):
    def tried(nets, optimizer, *args):
        parameters = dict(nets.named_parameters())
        before = copy.deepcopy(parameters)
        losses = train_step(nets, optimizer, *args)
        moved = [key for key, p in parameters.items() if not torch.equal(p, before[key])]
        players = {key.split(".")[0] for key in moved}
        for player in players:
            others = [p for key, p in parameters.items() if not key.startswith(f"{player}.")]
            with pytest.raises(ValueError, match="optimizer|unrolling"):
                train_step(nets, torch.optim.Adam(others), *args)
        unrolled = name == "bigan_latent" and args[2] > 0  # which needs all of D
        frozen = [next(nets[player].parameters()) for player in players if not (player == "D" and unrolled)]
        before = copy.deepcopy(parameters)
        for parameter in frozen:
            parameter.requires_grad_(False)
        train_step(nets, optimizer, *args)
        for key in moved:
            stays = any(parameters[key] is parameter for parameter in frozen)
            assert torch.equal(parameters[key], before[key]) == stays, key
        for parameter in frozen:
            parameter.requires_grad_(True)
        tries.append(players)
        return losses

    tries, train_step = [], script.train_step
    monkeypatch.setattr(script, "train_step", tried)
    for i, model in enumerate([[], *SCRIPTS[name]["models"]]):
        assert cli(script, *tiny, *model, "--steps", 2, "--out", tmp_path / str(i)).status == 0, model
    assert len(tries) > 5 and all(tries)


def test_weights_that_are_not_finite_are_never_saved(script, tiny, tmp_path, cli, monkeypatch):
    def broken(nets, optimizer, *args):
        losses = train_step(nets, optimizer, *args)
        if next(iter(optimizer.state.values()))["step"] == 4:
            with torch.no_grad():
                list(nets.parameters())[-1].fill_(math.inf)
        return losses

    train_step, run = script.train_step, tmp_path / "run"
    monkeypatch.setattr(script, "train_step", broken)
    assert_refused(cli(script, *tiny, "--steps", 6, "--out", run), "is not finite at step 4", run / "checkpoint.pt")
    monkeypatch.undo()
    assert load(run)["step"] == 2
    assert cli(script, "--resume", "--out", run, "--steps", 6, "--device", "cpu").status == 0


def test_batches_are_drawn_from_the_training_images(script, tiny, tmp_path, cli, photos, monkeypatch):
    def spy(images, count, device):
        drawn.append((torch.equal(images, train), count, device))
        return draw_images(images, count, device)

    drawn, draw_images, train = [], script.draw_images, load_data(photos, 16).train
    monkeypatch.setattr(script, "draw_images", spy)
    cli(script, *tiny, "--steps", 2, "--out", tmp_path / "run")
    assert drawn == [(True, 4, torch.device("cpu"))] * 2


def test_a_recorded_run_and_a_resumed_one_end_in_the_same_bits(script, tiny, tmp_path, cli, finished, monkeypatch):
    graphs = graphs_on_the_cpu(monkeypatch, script)
    assert cli(script, *tiny, "--steps", 6, "--out", tmp_path / "whole").status == 0
    assert [graph.replays for graph in graphs] == [3] and len(graphs[0].calls) > 60  # steps 4 to 6
    assert cli(script, *tiny, "--steps", 1, "--out", tmp_path / "run").status == 0
    again = ["--resume", "--steps", 6, "--out", tmp_path / "run"]
    assert cli(script, *again).status == 0 and [graph.replays for graph in graphs] == [3, 2]
    for run in (tmp_path / "whole", tmp_path / "run"):
        assert_same(load(finished)["networks"], load(run)["networks"])
        assert_same(load(finished)["optimizer"], load(run)["optimizer"])
        assert (finished / "log.csv").read_bytes() == (run / "log.csv").read_bytes()


def test_every_model_is_recorded(name, script, tiny, tmp_path, cli, monkeypatch):
    graphs = graphs_on_the_cpu(monkeypatch, script)
    for i, model in enumerate(SCRIPTS[name]["models"]):
        eager, recorded = tmp_path / f"{i} eager", tmp_path / f"{i} recorded"
        small = [*tiny, "--save-every", 20, "--steps", 5, *model]
        count = len(graphs)
        assert cli(script, *small, "--no-graph", "--out", eager).status == 0 and len(graphs) == count
        assert cli(script, *small, "--out", recorded).status == 0 and len(graphs) > count
        assert_same(load(eager), load(recorded), model)
        assert all(graph.replays > 0 for graph in graphs), model


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_a_step_never_waits_for_the_device(device, name, script, tiny, tmp_path, cli, monkeypatch):
    def watched(function):
        def call(*args):
            with monkeypatch.context() as patch:
                refuse_reading_back(patch)
                sync_debug_mode("error")
                try:
                    return function(*args)
                finally:
                    sync_debug_mode("default")

        return call

    sync_debug_mode = torch.cuda.set_sync_debug_mode if device == "cuda" else MagicMock()
    for function in ("draw_images", "make_inputs", "train_step"):
        monkeypatch.setattr(script, function, watched(getattr(script, function)))
    for i, model in enumerate([[], *SCRIPTS[name]["models"]]):
        run = tmp_path / str(i)
        assert cli(script, *tiny, *model, "--steps", 5, "--device", device, "--out", run).status == 0, model
        assert all(p.device.type == device for p in load(run)["networks"].values())


# -------------------------------------------------------------------------------------------------------------- CUDA


@pytest.fixture
def deterministic(monkeypatch):
    """CUDA gives the same bits again, where it can."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@needs_cuda
@pytest.mark.parametrize("memory", [2**40, 0])
@pytest.mark.parametrize("more", [[], ["--no-graph"]])
def test_on_cuda_a_resumed_run_goes_on_with_the_same_random_numbers(
    script, tiny, tmp_path, cli, monkeypatch, memory, more, deterministic
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory, memory))  # 0: the images stay on the host
    tiny = [*tiny, *more, "--device", "cuda"]
    assert cli(script, *tiny, "--steps", 12, "--out", tmp_path / "whole").status == 0
    assert cli(script, *tiny, "--steps", 6, "--out", tmp_path / "run").status == 0
    assert cli(script, "--resume", *more, "--steps", 12, "--out", tmp_path / "run").status == 0
    a, b = load(tmp_path / "whole"), load(tmp_path / "run")
    assert torch.equal(a["random"], b["random"]) and all(map(torch.equal, a["random_on_cuda"], b["random_on_cuda"]))
    for key, weight in a["networks"].items():
        torch.testing.assert_close(weight, b["networks"][key], atol=2e-3, rtol=1e-2)


@needs_cuda
def test_on_cuda_the_first_hundred_losses_of_a_recorded_run_are_those_of_an_eager_one(
    name, script, tiny, tmp_path, cli, deterministic
):
    tiny = [*tiny, "--device", "cuda", "--save-every", 1000, "--steps", 100]
    for i, model in enumerate([[], *SCRIPTS[name]["models"]]):
        runs = [tmp_path / f"eager{i}", tmp_path / f"recorded{i}"]
        for run, more in zip(runs, (["--no-graph"], [])):
            assert cli(script, *tiny, *model, *more, "--out", run).status == 0
        (header, a), (same_header, b) = map(log_of, runs)
        assert header == same_header and len(a) == len(b) >= 100
        a, b = ([[float(value or 0) for value in row] for row in rows] for rows in (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=str(model))
