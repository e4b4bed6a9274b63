"""What all scripts do alike on the command line: resume to the same bits, survive a kill, refuse bad input, ..."""

import copy
import importlib
import json
import math
import os
import signal
import time

import numpy as np
import pytest
import torch
from conftest import TINY, assert_refused, assert_same, files, graphs_on_the_cpu, load, log_of, start
from PIL import Image

from common import draw_faces, load_data

# For each script: its small arguments, what makes other models of it, one of its loss functions and the loss that this
# breaks, a network, input that it alone refuses, and settings of a run that it does not change.
SCRIPTS = {
    "aegan": {
        "tiny": TINY,
        "breaks": ("image_reconstruction_loss", "G_E"),
        "network": "E",
        "models": [["--model", "gan"], ["--model", "aae"]],
        "bad": [
            (["--model", "vae"], ["--model", "vae", "aegan"]),
            (["--lambda-rx", "nan"], ["--lambda-rx", "nan"]),
        ],
        "fixed": [(["--eval", "--model", "gan"], ["model = aegan, not gan"])],
    },
    "bigan_latent": {
        "tiny": [*TINY, "--unroll", 1],
        "breaks": ("autodecoder_loss", "G_E"),
        "network": "D",
        "models": [["--unroll", 0], ["--unroll", 3, "--stochastic-encoder"], ["--experiment", "EX8"]],
        "bad": [
            (["--experiment", "EX10"], ["--experiment", "EX10", "EX9"]),
            (["--unroll", -1], ["--unroll", "-1", "at least 0"]),
            (["--lambda-ae", "nan"], ["--lambda-ae", "nan"]),
            (["--lambda-h", 1, "--alexnet-weights", "missing.pth"], ["missing.pth", "alexnet-owt-7be5be79.pth"]),
            (["--lambda-h", 1, "--alexnet-weights", "other/checkpoint.pt"], ["other/checkpoint.pt", "AlexNet"]),
        ],
        "fixed": [
            (["--eval", "--experiment", "EX8"], ["experiment = EX7, not EX8"]),
            (["--resume", "--unroll", 0], ["unroll = 1, not 0"]),
        ],
    },
    "vae_began": {
        "tiny": ["--filters" if argument == "--channels" else argument for argument in TINY],
        "breaks": ("pixel_loss", "L_gen"),
        "network": "D",
        "models": [["--model", "began"], ["--model", "began-lsm"]],
        "bad": [
            (["--model", "vae"], ["--model", "vae", "began-lsm"]),
            (["--gains", 1, 2], ["--gains"]),
            (["--gains", "nan", 0, 0], ["--gains", "nan"]),
            (["--gains", 0, "inf", 0], ["--gains", "inf", "at least 0"]),
            (["--gains", 0, 0, "-0.5"], ["--gains", "-0.5", "at least 0"]),
            (["--gamma", "nan"], ["--gamma", "nan"]),
            (["--inception-samples", 5], ["--inception-samples", "5", "10"]),
            (["--inception-samples", 20, "--inception-weights", "missing.pth"], ["missing.pth", "inception_v3_google"]),
            (["--inception-samples", 20, "--inception-weights", "other/checkpoint.pt"], ["checkpoint.pt", "Inception"]),
            (["--attribute", "beard"], ["--attribute beard", "none"]),
        ],
        "fixed": [
            (["--eval", "--model", "began"], ["model = vae-began, not began"]),
            (["--resume", "--gains", 1, 2, 3], ["gains = [0.001, 1e-05, 1e-05], not [1.0, 2.0, 3.0]"]),
        ],
    },
    "pagan": {
        "tiny": [*TINY, "--classifier", "none"],
        "breaks": ("pair_loss", "L_g"),
        "network": "D_xx",
        "models": [
            ["--reconstruction", "l1"],
            *(["--augmentation", kind, "--crop", 0.2] for kind in ("crop", "blur", "contrast", "none")),
        ],
        "bad": [
            (["--reconstruction", "l2"], ["--reconstruction", "l2", "pair"]),
            (["--augmentation", "flip"], ["--augmentation", "flip", "contrast"]),
            (["--crop", "-0.1"], ["--crop", "-0.1", "at least 0"]),
            (["--crop", 0.6], ["--crop", "0.6", "half of the side"]),
            (["--crop", 0.03], ["--crop", "0.03", "a pixel"]),
            (["--l1-weight", "nan"], ["--l1-weight", "nan"]),
            (["--samples", 5], ["--samples", "5", "10"]),
            (["--classifier", "missing.pt"], ["--classifier missing.pt", "does not exist"]),
            (["--classifier", "other/checkpoint.pt"], ["--classifier other/checkpoint.pt"]),
            (["--classifier", "inception", "--inception-weights", "missing.pth"], ["missing.pth", "inception_v3_goo"]),
        ],
        "fixed": [
            (["--eval", "--augmentation", "none"], ["augmentation = crop, not none"]),
            (["--resume", "--crop", 0.2], ["crop = 0.1, not 0.2"]),
        ],
    },
    "inverse_gen": {
        "tiny": [*TINY, "--generator", "GENERATOR"],  # so that all steps are of one stage
        "breaks": ("cross_entropy", "L_IG"),
        "network": "IG",
        "models": [
            ["--method", "direct"],
            ["--generator", "", "--gan-steps", 2],
            ["--method", "bigan", "--generator", "", "--gan-steps", 2],
        ],
        "bad": [
            (["--method", "vae"], ["--method", "vae", "search"]),
            (["--gan-steps", 3], ["--gan-steps", "--generator"]),
            (["--method", "bigan"], ["--method bigan", "--generator"]),
            (["--generator", "", "--gan-steps", 0], ["--gan-steps", "0", "--generator"]),
            (["--search-rate", "nan"], ["--search-rate", "nan"]),
            (["--gallery", 0], ["--gallery", "0", "at least 1"]),
            (["--generator", "missing.pt"], ["missing.pt", "is not there"]),
            (["--generator", "other/checkpoint.pt"], ["not a checkpoint of inverse_gen.py"]),
            (["--query", "PHOTOS"], ["checkpoint.pt", "--query"]),
        ],
        "fixed": [
            (["--eval", "--method", "direct"], ["method = aegan, not direct"]),
            (["--resume", "--gan-steps", 5], ["--generator", "--gan-steps"]),
            (["--query", "x.png", "--latent-dim", 5], ["latent_dim = 100, not 5"]),
        ],
    },
}
BAD = [
    (["--data", "missing"], ["missing", "folder"]),
    (["--data", "empty"], ["empty", "0 readable images", "at least 20"]),
    (["--data", "PHOTOS", "--batch-size", 28], ["27 images", "--batch-size 28"]),
    (["--image-size", 48], ["--image-size", "48", "64"]),
    (["--step", 5], ["--step"]),
    (["--steps", 0], ["--steps", "0", "at least 1"]),
    (["--steps", "many"], ["--steps", "many"]),
    (["--lr", -1], ["--lr", "-1"]),
    (["--seed", 2**70], ["--seed"]),
    (["--device", "abacus"], ["--device abacus"]),
    (["--device", "meta"], ["--device meta"]),
    (["--graph"], ["--graph", "CUDA", "--device cpu"]),
    (["--precision", "fp16"], ["--precision", "fp16", "bf16"]),
    (["--resume"], ["checkpoint.pt", "give the --out of a run"]),
    (["--eval"], ["checkpoint.pt", "--eval"]),
    (["--data", "PHOTOS", "--out", "file"], ["--out file"]),
    (["--resume", "--out", "other"], ["other", "not a checkpoint of SCRIPT.py"]),
    (["--resume", "--out", "noise"], ["noise", "not a checkpoint of SCRIPT.py"]),
]
FIXED = [
    (["--resume", "--image-size", 32], ["image_size = 16, not 32"]),
    (["--eval", "--steps", 9], ["steps = 6, not 9"]),
    (["--resume", "--precision", "bf16"], ["precision = tf32, not bf16"]),
    (["--resume", "--steps", 5], ["at step 6 already", "--steps 5"]),
    (["--resume", "--data", "OTHER"], ["does not hold the images"]),
]


@pytest.fixture(scope="module", params=SCRIPTS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def script(name):
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def tiny(name, script, photos, tmp_path_factory):
    """Arguments of a small run."""
    arguments = ["--data", photos, *SCRIPTS[name]["tiny"]]
    if "GENERATOR" in arguments:
        folder = tmp_path_factory.mktemp("generator") / "run"
        search = ["--method", "search", "--gan-steps", 1, "--search-steps", 1, "--out", folder]
        script.main([str(argument) for argument in ("--data", photos, *TINY, *search)])
        arguments[-1] = folder / "checkpoint.pt"
    return arguments


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
    times = {"steps_per_second": 0, "inversions_per_second": 0}
    assert {**a, **times} == {**b, **times}


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


def test_a_log_that_is_lost_or_left_over_begins_with_its_header(script, tiny, tmp_path, cli, finished):
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.csv").write_text("left over from a run that was killed before its first checkpoint")
    cli(script, *tiny, "--steps", 4, "--out", run)
    assert (finished / "log.csv").read_bytes().startswith((run / "log.csv").read_bytes())
    (run / "log.csv").unlink()
    cli(script, "--resume", "--out", run, "--steps", 6, "--device", "cpu")
    header, rows = log_of(run)
    assert header[0] == "step" and [row[0] for row in rows] == ["5", "6"]


def test_ctrl_c_saves_and_leaves(script, tiny, tmp_path, cli, finished, monkeypatch):
    def step_then_ctrl_c(*args, **weights):
        counts.append(1)
        if len(counts) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*args, **weights)

    counts, train_step, run = [], script.train_step, tmp_path / "run"
    monkeypatch.setattr(script, "train_step", step_then_ctrl_c)
    result = cli(script, *tiny, "--steps", 6, "--out", run)
    assert result.status == 130 and "stopped after step 3" in result.out and "--resume" in result.out
    assert load(run)["step"] == 3 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert cli(script, "--resume", "--out", run, "--device", "cpu").status == 0
    assert_same(load(finished), load(run))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    name, script, tiny, tmp_path, cli, monkeypatch
):
    def bad(*args):
        counts.append(1)
        return loss(*args) * (math.nan if len(counts) == 4 else 1)

    function, broken = SCRIPTS[name]["breaks"]
    counts, run, loss = [], tmp_path / "run", getattr(script, function)
    monkeypatch.setattr(script, function, bad)
    result = cli(script, *tiny, "--steps", 6, "--out", run)
    assert_refused(result, "step 4", f"loss {broken} is not finite", run / "checkpoint.pt")
    assert load(run)["step"] == 2 and all(p.isfinite().all() for p in load(run)["networks"].values())


def test_weights_that_are_not_finite_are_never_saved(name, script, tiny, tmp_path, cli, monkeypatch):
    def break_weights(nets, *args, **weights):
        losses = train_step(nets, *args, **weights)
        counts.append(1)
        next(nets[network].parameters()).data.fill_(math.inf if len(counts) == 2 else 0)
        return losses

    counts, train_step, run, network = [], script.train_step, tmp_path / "run", SCRIPTS[name]["network"]
    monkeypatch.setattr(script, "train_step", break_weights)
    result = cli(script, *tiny, "--log-every", 50, "--steps", 6, "--out", run)
    assert_refused(result, "step 2", f"weight {network}.", "not finite")
    assert load(run)["step"] == 0


def test_eval_writes_the_same_figures_and_results_again(script, cli, finished):
    def content():
        found = {file: (finished / file).read_bytes() for file in files(finished)}
        return {**found, "results.json": {**json.loads(found["results.json"]), "inversions_per_second": 0}}

    before = content()
    for file in before:
        if file.startswith("figure") or file in ("results.json", "reconstructions.png"):
            (finished / file).unlink()
    assert cli(script, "--eval", "--out", finished, "--device", "cpu").status == 0
    assert content() == before


def test_the_first_line_says_how_long_a_cpu_will_take(script, tiny, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(script, "train_step", lambda *args, **_: {"loss": torch.tensor(1.0)})
    hours = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(script.time, "perf_counter", lambda: next(hours))
    forty = ["--save-every", 40, "--log-every", 40, "--steps", 40, "--out", tmp_path / "run"]
    _, first, second, *_ = cli(script, *tiny, *forty).out.splitlines()
    assert first.startswith("step 10 ") and "3:00:00 left" in first and "--quick" in second


def test_quick_sets_what_its_help_says(script, cli, monkeypatch):
    args, _ = script.parse_args(["--quick", "--out", "nowhere", "--steps", "7"])
    assert {key: getattr(args, key) for key in script.QUICK} == {**script.QUICK, "steps": 7}
    monkeypatch.setenv("COLUMNS", "1000")
    shown = cli(script, "--help").out
    for key, value in script.QUICK.items():
        assert f"--{key.replace('_', '-')} {value}" in shown


def test_sample_diversity(script):
    a, b = torch.randn(5, 3, 4, 4), torch.randn(6, 3, 4, 4)

    def spread(x):
        x = x.flatten(1).numpy()
        return np.mean([np.linalg.norm(x[i] - x[j]) for i in range(len(x)) for j in range(i)])

    assert script.sample_diversity(a, b) == pytest.approx(spread(a) / spread(b), rel=1e-5)
    assert script.sample_diversity(a[:1].expand(5, -1, -1, -1), b) == 0


def test_bad_input_is_refused_in_one_line_and_nothing_is_written(
    name, script, tiny, photos, tmp_path, cli, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "other", "noise"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").write_text("not a folder")
    torch.save({"script": "another", "step": 3}, "other/checkpoint.pt")
    (tmp_path / "noise" / "checkpoint.pt").write_bytes(b"noise")
    before = files(tmp_path)
    for arguments, words in BAD + SCRIPTS[name]["bad"]:
        arguments = [photos if argument == "PHOTOS" else argument for argument in arguments]
        result = cli(script, *tiny, "--steps", 2, *arguments)
        assert_refused(result, *(word.replace("SCRIPT", name) for word in words))
        assert result.out == "" and files(tmp_path) == before, arguments


def test_another_run_s_folder_is_left_alone(name, script, tiny, photos, tmp_path, cli, finished):
    for i, image in enumerate(draw_faces(25, 16, seed=5)[0]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    before = {file: (finished / file).read_bytes() for file in files(finished)}
    again = ([*tiny, "--steps", 2], ["holds a run", "--resume", "another --out"])
    for arguments, words in [again, *FIXED, *SCRIPTS[name]["fixed"]]:
        arguments = [tmp_path if argument == "OTHER" else argument for argument in arguments]
        result = cli(script, *arguments, *(() if "--data" in arguments else ("--data", photos)), "--out", finished)
        assert_refused(result, *words)
        assert {file: (finished / file).read_bytes() for file in files(finished)} == before, arguments


def test_batches_are_drawn_from_the_training_images(script, tiny, tmp_path, cli, photos, monkeypatch):
    def spy(images, count, device):
        drawn.append((torch.equal(images, train), count, device))
        return draw_images(images, count, device)

    drawn, draw_images, train = [], script.draw_images, load_data(photos, 16).train
    monkeypatch.setattr(script, "draw_images", spy)
    cli(script, *tiny, "--steps", 2, "--out", tmp_path / "run")
    assert drawn == [(True, 4, torch.device("cpu"))] * 2


def test_a_recorded_run_and_a_resumed_one_end_in_the_same_bits(script, tiny, tmp_path, cli, finished, monkeypatch):
    graphs = graphs_on_the_cpu(script, monkeypatch)
    assert cli(script, *tiny, "--steps", 6, "--out", tmp_path / "whole").status == 0
    assert [graph.replays for graph in graphs] == [6] and len(graphs[0].calls) > 100
    assert cli(script, *tiny, "--steps", 3, "--out", tmp_path / "run").status == 0
    assert cli(script, "--resume", "--steps", 6, "--out", tmp_path / "run", "--device", "cpu").status == 0
    for run in (tmp_path / "whole", tmp_path / "run"):
        assert_same(load(finished), load(run))
    assert (finished / "log.csv").read_bytes() == (tmp_path / "whole" / "log.csv").read_bytes()


def test_every_model_is_recorded(name, script, tiny, tmp_path, cli, monkeypatch):
    runs = {folder: [tmp_path / folder / str(i) for i in range(9)] for folder in ("eager", "recorded")}
    for folder, paths in runs.items():
        if folder == "recorded":
            graphs_on_the_cpu(script, monkeypatch)
        for model, run in zip(SCRIPTS[name]["models"], paths):
            assert cli(script, *tiny, "--save-every", 9, "--steps", 2, *model, "--out", run).status == 0
    for model, a, b in zip(SCRIPTS[name]["models"], *runs.values()):
        assert_same(load(a), load(b), model)


def test_bf16_is_for_what_networks_compute_alone(name, script, tiny, tmp_path, cli, finished, monkeypatch):
    def spy(nets, optimizers, *args, **weights):
        layers = [m for m in nets.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.ConvTranspose2d)]
        for module in (*layers, *(net for net in nets.modules() if "forward" in vars(net))):
            module.register_forward_hook(lambda module, _, output: dtypes[module in layers].add(output.dtype))
        return train_step(nets, optimizers, *args, **weights)

    dtypes, train_step = {True: set(), False: set()}, script.train_step
    monkeypatch.setattr(script, "train_step", spy)
    assert cli(script, *tiny, "--precision", "bf16", "--steps", 1, "--out", tmp_path / "run").status == 0
    assert dtypes == {True: {torch.bfloat16}, False: {torch.float32}}
    checkpoint = load(tmp_path / "run")
    assert all(tensor.dtype != torch.bfloat16 for tensor in checkpoint["networks"].values())
    moments = [state for o in checkpoint["optimizers"].values() for state in o["state"].values()]
    assert all(tensor.dtype == torch.float32 for state in moments for tensor in state.values())
    (_, a), (_, b) = log_of(finished), log_of(tmp_path / "run")
    (a, b) = ([float(value or 0) for value in rows[0]] for rows in (a, b))
    assert a != b and a == pytest.approx(b, rel=0.03, abs=0.03)


@pytest.mark.parametrize("precision, allowed", [("fp32", False), ("tf32", True), ("bf16", True)])
def test_precision_sets_what_cuda_may_do(script, precision, allowed):
    nets = torch.nn.ModuleDict({"G": torch.nn.Linear(2, 2)})
    script.use_precision(nets, precision)
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is allowed


# -------------------------------------------------------------------------------------------------------------- CUDA

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@needs_cuda
@pytest.mark.parametrize("memory", [2**40, 0])
@pytest.mark.parametrize("more", [[], ["--graph"]])
def test_on_cuda_a_resumed_run_goes_on_with_the_same_random_numbers(
    script, tiny, tmp_path, cli, monkeypatch, memory, more
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory, memory))  # 0: the images stay on the host
    tiny = [*tiny, *more, "--device", "cuda"]
    assert cli(script, *tiny, "--steps", 6, "--out", tmp_path / "whole").status == 0
    assert cli(script, *tiny, "--steps", 4, "--out", tmp_path / "run").status == 0
    assert cli(script, "--resume", *more, "--steps", 6, "--out", tmp_path / "run").status == 0
    a, b = load(tmp_path / "whole"), load(tmp_path / "run")
    assert torch.equal(a["random"]["cuda"], b["random"]["cuda"]) and torch.equal(a["random"]["cpu"], b["random"]["cpu"])
    for key, weight in a["networks"].items():
        torch.testing.assert_close(weight, b["networks"][key], atol=2e-3, rtol=1e-2)


@needs_cuda
def test_on_cuda_the_first_hundred_losses_of_a_recorded_run_are_those_of_an_eager_one(
    name, script, tiny, tmp_path, cli, monkeypatch
):
    def spy(iterate, images, nets, optimizers):
        before = copy.deepcopy([nets.state_dict(), torch.cuda.get_rng_state()])
        replay = record(iterate, images, nets, optimizers)
        assert_same(before, copy.deepcopy([nets.state_dict(), torch.cuda.get_rng_state()]))
        return replay

    record = script.record
    monkeypatch.setattr(script, "record", spy)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    tiny = [*tiny, "--precision", "fp32", "--device", "cuda", "--save-every", 1000, "--steps", 100]
    for i, model in enumerate([[], *SCRIPTS[name]["models"]]):
        runs = [tmp_path / f"eager{i}", tmp_path / f"recorded{i}"]
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            for run, more in zip(runs, ([], ["--graph"])):
                assert cli(script, *tiny, *model, *more, "--out", run).status == 0
        finally:
            torch.use_deterministic_algorithms(False)
        (header, a), (same_header, b) = map(log_of, runs)
        assert header == same_header and len(a) == len(b) >= 100
        a, b = ([[float(value or 0) for value in row] for row in rows] for rows in (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=str(model))


@needs_cuda
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_on_cuda_a_recorded_run_in_lower_precision_begins_as_in_float32(script, tiny, tmp_path, cli, precision):
    runs = [tmp_path / "fp32", tmp_path / precision]
    for run in runs:
        more = ["--precision", run.name, "--device", "cuda", "--steps", 6, "--graph"]
        assert cli(script, *tiny, *more, "--out", run).status == 0
    a, b = ([float(value or 0) for value in log_of(run)[1][0]] for run in runs)
    assert a == pytest.approx(b, rel=0.03, abs=0.03)
    assert all(tensor.dtype != torch.bfloat16 for tensor in load(runs[1])["networks"].values())
