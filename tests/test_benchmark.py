import importlib
import json
import subprocess
import sys

import benchmark
import pytest
import torch
from conftest import ROOT


@pytest.mark.parametrize("task", benchmark.TASKS)
def test_the_plain_loop_updates_what_the_script_updates(task):
    args, nets, step, options, plain_step = benchmark.build(task, torch.device("cpu"))
    images = torch.randint(256, (args.batch_size, 3, args.image_size, args.image_size), dtype=torch.uint8)
    batch = importlib.import_module(task.split()[0]).make_inputs(images, *options)

    def changed(function, *arguments):
        before = {name: parameter.clone() for name, parameter in nets.named_parameters()}
        function(*arguments)
        return {name for name, parameter in nets.named_parameters() if not torch.equal(before[name], parameter)}

    by_script = changed(step, *batch)
    x = torch.rand(args.batch_size, 3, args.image_size, args.image_size)
    by_plain = changed(plain_step, x)
    assert by_plain == by_script and len(by_script) > 7


def test_it_prints_a_table_and_writes_json(tmp_path):
    command = [sys.executable, ROOT / "tests" / "benchmark.py", "--scripts", "inverse_gen", "--device", "cpu"]
    small = ["--turns", "1", "--seconds", "0.01", "--out", tmp_path / "b.json"]
    result = subprocess.run([*command, *small], capture_output=True, text=True)
    assert result.returncode == 0 and "inverse_gen gan" in result.stdout, result
    found = json.loads((tmp_path / "b.json").read_text())
    tasks = {row["task"]: row["steps"] for row in found["rows"]}
    assert tasks == {"inverse_gen gan": 2500, "inverse_gen aegan": 1500}
    for row in found["rows"]:
        assert row["ratio"] == pytest.approx(row["script"] / row["plain"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_a_recorded_step_is_faster_than_an_eager_one_and_that_than_the_plain_loop(tmp_path):
    row = benchmark.measure("inverse_gen gan", torch.device("cuda"), tmp_path, 1, 0.5)
    assert row["script"] > row["eager"] > row["plain"] > 0 and row["memory"] > 0
