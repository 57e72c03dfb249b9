"""Build sdist and wheel, install the wheel into an empty environment, and train five steps there.

    python tests/scripts/package.py [FOLDER]      where sdist and wheel go; "dist" by default

The wheel is built from the sdist. The environment has, beside the wheel, what the wheel says that it needs and what
that needs in turn, linked from the environment that runs this: so nothing is downloaded, and what is not declared is
not there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "embedded" / "model"
BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, 'build_' + sys.argv[1])(sys.argv[2]))"
TRAINING = """
import sys
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
import peft_dlqat
from peft_dlqat import DLQATCallback, DLQATConfig
assert peft_dlqat.__file__.startswith(sys.prefix), peft_dlqat.__file__
torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = get_peft_model(base, DLQATConfig(bits=3, init="minmax", task_type="CAUSAL_LM"))
ids = torch.randint(3, 1000, (20, 32))
rows = [{"input_ids": row, "labels": row} for row in ids]
settings = TrainingArguments("out", max_steps=5, per_device_train_batch_size=4, learning_rate=2e-4, logging_steps=1,
                             report_to=[], use_cpu=True, save_strategy="no")
trainer = Trainer(model, settings, train_dataset=rows, callbacks=[DLQATCallback()])
losses = [entry["loss"] for entry in (trainer.train(), trainer.state.log_history)[1] if "loss" in entry]
print("losses:", losses)
assert len(losses) == 5 and losses[-1] < losses[0]
model.save_pretrained("adapter")
with torch.no_grad():
    expected = model.eval()(input_ids=ids).logits
    found = AutoPeftModelForCausalLM.from_pretrained("adapter", dtype=torch.float32).eval()(input_ids=ids).logits
assert torch.equal(found, expected)
"""


def build(dist: Path) -> Path:
    """Make the sdist, and from it the wheel."""
    dist.mkdir(parents=True, exist_ok=True)

    def run(kind: str, source: Path) -> Path:
        made = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", BUILD, kind, str(dist)],
            cwd=source,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        return dist / made.stdout.splitlines()[-1]

    sdist = run("sdist", ROOT)
    with tempfile.TemporaryDirectory() as room, tarfile.open(sdist) as archive:
        archive.extractall(room, filter="data")
        (source,) = Path(room).iterdir()
        return run("wheel", source)


def needed(entry: Distribution, extras: Iterable[str] = ()) -> dict[str, Distribution]:
    """All that a distribution needs, with some of its extras, and what that needs, by name."""
    found: dict[str, Distribution] = {}
    asked = [(entry, ("", *sorted(extras)))]
    for entry, wanted in asked:
        for requirement in map(Requirement, entry.requires or ()):
            marker = requirement.marker
            if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in wanted):
                continue
            other = distribution(requirement.name)
            if not requirement.specifier.contains(other.version, prereleases=True):
                raise SystemExit(f"{entry.name} needs {requirement}, and {other.version} is here")
            further = (other, ("", *sorted(requirement.extras)))
            if all((known.name, with_extras) != (other.name, further[1]) for known, with_extras in asked):
                found[other.name] = other
                asked.append(further)
    return found


def link(entry: Distribution, site: Path) -> None:
    """Put links to a distribution's files into an environment."""
    if entry.files is None:
        raise SystemExit(f"{entry.name} does not say which files it has")
    for top in {file.parts[0] for file in entry.files} - {"..", "__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(Path(str(entry.locate_file(top))).resolve())


def main() -> None:
    """As the module says."""
    dist = Path(sys.argv[1] if len(sys.argv) > 1 else "dist").resolve()
    wheel = build(dist)
    print(*sorted(path.name for path in dist.iterdir()))
    with tempfile.TemporaryDirectory() as room:
        venv.create(f"{room}/env", symlinks=True)
        python = f"{room}/env/bin/python"
        install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run([*install, str(wheel)], check=True)
        site = next(Path(room, "env", "lib").glob("python*")) / "site-packages"
        (own,) = Distribution.discover(name="peft-dlqat", path=[str(site)])
        found = needed(own)
        for entry in found.values():
            link(entry, site)
        print(f"{len(found)} distributions beside it")
        alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        for command in ([f"{room}/env/bin/dlqat", "--help"], [python, "-W", "ignore", "-c", TRAINING, str(MODEL)]):
            subprocess.run(command, cwd=room, env=alone, check=True)


if __name__ == "__main__":
    main()
