"""Every example runs like for a user; training examples use small settings."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("[0-9]*.py"))
TRAINING = ("04_finetune_lora.py", "05_train_fsdp.py")
LITTLE = ["--save-every", "2", "--length", "64"]
TINY = {"04_finetune_lora.py": ["--tiny"], "05_train_fsdp.py": ["--hidden", "64", "--layers", "2"]}


def run(name, *arguments, launcher=(), **variables):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    command = [sys.executable, *launcher, str(FOLDER / name), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.name not in TRAINING], ids=lambda path: path.name)
def test_example_runs(path):
    assert run(path.name).strip()


def losses(name, output):
    """The losses in the last line of a training example."""
    found = re.findall(r"\b(?:loss|before|after) ([\d.]+)", output.splitlines()[-1])
    assert found, f"{name}: {output}"
    return [float(loss) for loss in found]


@pytest.mark.parametrize("name", TRAINING)
def test_training_resumes_from_a_checkpoint(name, tmp_path):
    """Two runs give the same result as one; each saves a plot."""
    options = [*LITTLE, *TINY[name]]
    run(name, *options, "--output", tmp_path / "two", "--steps", 2)
    resumed = run(name, *options, "--output", tmp_path / "two", "--steps", 4)
    at_once = run(name, *options, "--output", tmp_path / "one", "--steps", 4)
    assert losses(name, resumed) == pytest.approx(losses(name, at_once), rel=1e-4)
    assert (tmp_path / "two" / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.full  # test_adamw_parallel.py has two processes, and FSDP2
def test_two_processes_train_as_one(tmp_path):
    """The FSDP2 example under torchrun: the same losses, and its checkpoint can be resumed in one process."""
    name = "05_train_fsdp.py"
    options = [*LITTLE, *TINY[name], "--checkpoint"]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = run(name, *options, "--output", tmp_path / "two", "--steps", 4, launcher=two, OMP_NUM_THREADS="1")
    assert output.startswith("2 processes")
    expected = run(name, *options, "--output", tmp_path / "one", "--steps", 4)
    assert losses(name, output) == pytest.approx(losses(name, expected), rel=1e-4)
    assert "steps 4 to 6" in run(name, *options, "--output", tmp_path / "two", "--steps", 6)


@pytest.mark.parametrize(
    "error",
    ["torch.OutOfMemoryError('CUDA out of memory')", "MemoryError()", 'RuntimeError("... can\'t allocate memory ...")'],
)
def test_a_message_when_memory_runs_out(error):
    """It says what to change, instead of a traceback; other errors keep theirs."""
    code = "import torch, helpers\nwith helpers.advice_if_out_of_memory('use less'): raise "
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), *sys.path])}
    results = [
        subprocess.run([sys.executable, "-c", code + raised], capture_output=True, text=True, env=environment)
        for raised in (error, "RuntimeError('another')")
    ]
    assert results[0].returncode == 1 and results[0].stderr.startswith("Out of memory: use less")
    assert "Traceback" not in results[0].stderr and "Traceback" in results[1].stderr


@pytest.mark.full
def test_finetuning_the_demos_model(tmp_path):
    """The held-out loss of a real model falls by the same amount as with stock."""
    options = ["--steps", 20, "--length", 64, "--batch-size", 1, "--accumulate", 1]
    ends = [
        losses("04", run("04_finetune_lora.py", *options, *more, "--output", tmp_path / str(len(more))))
        for more in ([], ["--stock"])
    ]
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    assert ends[0][1] < 0.99 * ends[0][0]
    assert ends[0][1] == pytest.approx(ends[1][1], rel=5e-3)
