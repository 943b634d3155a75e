"""Environments for libraries that are measured and never depended on: one each, made once, below `benchmarks/out`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUT = ROOT / "benchmarks" / "out"

_TORCH = ("torch==2.14.1", "torchvision==0.29.1")


class NotInstalled(Exception):
    """The environment could not be made; the text is pip's last line."""


@dataclass(frozen=True, slots=True)
class Rival:
    """`module` is its loop. `requirements` are one pip run each, `environ` what keeps it from the network."""

    name: str
    module: str
    requirements: Sequence[Sequence[str]]
    environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return OUT / f"venv-{self.name}"

    def python(self) -> Path:
        """The Python of its environment, which is made where it is not there yet. Raises `NotInstalled`."""
        python, made = self.folder / "bin" / "python", self.folder / "made-of"
        wanted = "\n".join(" ".join(one) for one in self.requirements)
        if made.is_file() and made.read_text() == wanted:
            return python
        print(f"making {self.folder} (some gigabytes, minutes)", file=sys.stderr, flush=True)
        _run([sys.executable, "-m", "venv", "--clear", str(self.folder)])
        for one in self.requirements:
            _run([str(python), "-m", "pip", "install", "--quiet", *one])
        made.write_text(wanted)
        return python

    def surroundings(self) -> dict[str, str]:
        """The environment variables of its loop; what it writes of its own stays in its folder."""
        own = {key: value.format(folder=self.folder) for key, value in self.environ.items()}
        return {**os.environ, **own}


RIVALS = (
    Rival(
        "ultralytics",
        "benchmarks.rivals.ultralytics_loop",
        [[*_TORCH, "ultralytics-opencv-headless==8.4.190", "onnxruntime==1.32.0", "onnx==1.23.2"]],
        {"YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true", "YOLO_CONFIG_DIR": "{folder}"},
    ),
    Rival(
        "inference-models",
        "benchmarks.rivals.inference_models_loop",
        [
            [*_TORCH, "inference-models[onnx-cpu]==0.39.6"],
            # It brings two OpenCV packages over one another; the one without windows runs everywhere.
            ["--force-reinstall", "--no-deps", "opencv-python-headless==5.0.0.93"],
        ],
        {"OFFLINE_MODE": "true", "INFERENCE_HOME": "{folder}/cache"},
    ),
)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise NotInstalled(said[-1] if said else f"{command[0]} ended with {done.returncode}")
