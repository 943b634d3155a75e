"""`edgectl models export`: a PyTorch module becomes an ONNX file, which is held to what the module itself gives.

A pickled module is opened only with `trust`: opening one runs the code that is in it.
"""

from __future__ import annotations

import importlib
import json
import pickle
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray

from edge_agent.config import InferenceOptions, ModelOptions
from edge_agent.errors import ConfigError, EdgeAgentError, ModelError
from edge_agent.models.inspect import facts_of, make_family
from edge_agent.models.store import NewModel, StoredModel
from edgectl._progress import Tell, progress
from edgectl.store import Shelf, entry_from, introduce

Arrays = Mapping[str, NDArray[Any]]

_INPUT = "images"
_FILES = (".pt", ".pth", ".ts", ".torchscript", ".jit")
_MOST_DIFFERENT = 1e-3
"""How far an output may be off, as a share of its largest value."""
_SEED = 20_000_000


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and how far it is off: any output's largest difference, as a share of its largest value."""

    file: Path
    outputs: Mapping[str, Sequence[int | None]]
    difference: float
    pictures: int


def export(
    source: str,
    path: Path | None,
    *,
    size: str,
    out: Path | None,
    name: str | None,
    weights: Path | None,
    trust: bool,
    parent: str | None,
    labels: str | None,
    facts: Sequence[str],
    opset: int,
    fixed_batch: bool,
    settings: Sequence[str],
    as_json: bool,
) -> None:
    """Write the file, compare it, and register it if it gets a name. Raises `EdgeAgentError` with a sentence."""
    if out is None and name is None:
        raise typer.BadParameter("say where to: --out FILE.onnx, or --name NAME for the store")
    width, height = _sides(size)
    metadata = {"imgsz": str([height, width]), **_labels(labels), **dict(map(_fact, facts))}
    shelf = Shelf(path)
    with tempfile.TemporaryDirectory(prefix="edgectl-") as scratch, progress("starting PyTorch") as tell:
        torch = _torch()
        tell("opening", None)
        module = _module(torch, source, weights, trust=trust)
        file = Path(scratch) / "exported.onnx"
        batches = (1,) if fixed_batch else (1, 2)
        exported = _exported(torch, module, file, (3, height, width), batches, opset, metadata, tell)
        if out is not None:
            _keep(file, out)
        kept = None
        if name is not None:
            tell("registering", None)
            known = _parent(shelf, parent, source)
            new = NewModel(file, name, entry=entry_from(settings), source=_place(source), parent=known)
            kept = shelf.library.register(new)
        taken = _taken_for(file, settings)
    _tell(exported, out, taken, shelf, kept, as_json=as_json)


def _torch() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import torch
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"models export needs the Python module {error.name!r}, which is not installed: "
            "pip install 'edge-agent[export]'"
        ) from error
    except (ImportError, OSError) as error:
        raise ConfigError(f"models export needs PyTorch, which cannot be imported here: {error}") from error
    return torch


def _module(torch: Any, source: str, weights: Path | None, *, trust: bool) -> Any:
    """The module to export, as it is when it infers."""
    sys.path.insert(0, str(Path.cwd()))  # modules of one's own, for pickled ones too
    path = Path(source)
    if path.suffix.lower() in _FILES or path.is_file():
        if weights is not None:
            raise ConfigError("--weights is for a module of Python, package.module:Class; a file has its own")
        module = _opened(torch, path, trust=trust)
    elif ":" in source:
        module = _imported(torch, source)
        if weights is not None:
            _load_weights(torch, module, weights)
    else:
        raise ConfigError(f"{source}: neither a file ({', '.join(_FILES)}) nor package.module:Class")
    with _foreign(source):
        return module.eval()


def _opened(torch: Any, path: Path, *, trust: bool) -> Any:
    """TorchScript, or a pickled module if it is trusted."""
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file")
    try:
        with _quiet():
            return torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError):  # no TorchScript
        pass
    found = _unpickled(torch, path, trust=trust)
    if isinstance(found, Mapping) and isinstance(found.get("model"), torch.nn.Module):
        found = found["model"]
    if isinstance(found, torch.nn.Module):
        return found.float()
    raise ModelError(
        f"{path}: it holds weights alone; say what they belong to: edgectl models export package.module:Class "
        f"--weights {path}"
    )


def _unpickled(torch: Any, path: Path, *, trust: bool) -> Any:
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        if not trust:
            raise ModelError(
                f"{path}: no TorchScript and no plain weights; a pickled module, perhaps, which runs the code that is "
                "in it: if you trust whoever made it, --trust"
            ) from error
    with _foreign(str(path)):
        return torch.load(str(path), map_location="cpu", weights_only=False)


def _imported(torch: Any, source: str) -> Any:
    """What `package.module:name` stands for, called if it is no module yet; from the working directory too."""
    module_name, _, attribute = source.partition(":")
    with _foreign(source):
        found = importlib.import_module(module_name)
    if not hasattr(found, attribute):
        raise ConfigError(f"{module_name} has no {attribute!r}, which {source!r} asks for")
    made = getattr(found, attribute)
    if not isinstance(made, torch.nn.Module) and callable(made):
        with _foreign(f"{source}()"):
            made = made()
    if not isinstance(made, torch.nn.Module):
        raise ConfigError(f"{source}: it gives {type(made).__name__}, no torch.nn.Module")
    return made


def _load_weights(torch: Any, module: Any, path: Path) -> None:
    try:
        with _foreign(f"--weights {path}"):
            state = torch.load(str(path), map_location="cpu", weights_only=True)
    except ModelError as error:
        raise ModelError(f"--weights {path}: it cannot be read as plain weights (a state dict)") from error
    with _foreign(f"--weights {path}"):
        for key in ("state_dict", "model"):
            state = state[key] if isinstance(state.get(key), Mapping) else state
        module.load_state_dict(state)


def _exported(
    torch: Any,
    module: Any,
    file: Path,
    shape: tuple[int, int, int],
    batches: Sequence[int],
    opset: int,
    metadata: Mapping[str, str],
    tell: Tell,
) -> Exported:
    """Trace, write, and compare on other pictures: one, and where it takes any number, two at once."""
    tell("running", None)
    trials = [images for batch in batches for images in _trials(torch, batch, shape)]
    wanted = [_run(torch, module, images) for images in trials]
    varying = _varying(wanted, trials) if len(batches) > 1 else ()
    shapes = {name: _open(value.shape, name in varying) for name, value in wanted[0].items()}
    tell("tracing", None)
    example = torch.rand((1, *shape), generator=torch.Generator().manual_seed(_SEED + 1))
    with _foreign("the export"), _quiet():
        torch.onnx.export(
            module,
            (example,),
            str(file),
            input_names=[_INPUT],
            output_names=list(shapes),
            dynamic_axes={name: {0: "batch"} for name in (_INPUT, *varying)} if varying else None,
            opset_version=opset,
            dynamo=False,
        )
    _describe(file, shapes, metadata)
    tell("comparing", None)
    difference = max(_difference(file, images, values) for images, values in zip(trials, wanted, strict=True))
    return Exported(file, shapes, difference, sum(len(images) for images in trials))


def _trials(torch: Any, batch: int, shape: tuple[int, int, int]) -> Sequence[Any]:
    """Noise, black and white: what a trace fixed for one picture shows on another."""
    noise = torch.rand((batch, *shape), generator=torch.Generator().manual_seed(_SEED))
    return noise, torch.zeros_like(noise), torch.ones_like(noise)


def _varying(wanted: Sequence[Arrays], trials: Sequence[Any]) -> Sequence[str]:
    """The outputs that have a row a picture. Raises `ModelError` where none has."""
    pairs = list(zip(wanted, trials, strict=True))
    names = [name for name in wanted[0] if all(values[name].shape[:1] == (len(images),) for values, images in pairs)]
    if not names:
        raise ModelError("no output has a row for each of two pictures; if it takes one at a time: --fixed-batch")
    return names


def _open(shape: tuple[int, ...], is_varying: bool) -> Sequence[int | None]:
    return [None, *shape[1:]] if is_varying else shape


def _run(torch: Any, module: Any, images: Any) -> Arrays:
    """The module's outputs by name."""
    how = "" if len(images) == 1 else "; if it takes one picture at a time: --fixed-batch"
    with _foreign(f"the module, on {list(images.shape)}", how), torch.no_grad():
        given = module(images)
    named = dict(_named(torch, given))
    if not named:
        raise ModelError("the module gives no tensor that could be an output")
    return {name: value.detach().numpy() for name, value in named.items()}


def _named(torch: Any, given: Any) -> Iterator[tuple[str, Any]]:
    """A tensor, a list or table of them, or lists in lists: `output0` and so on, or the table's own names."""
    if isinstance(given, Mapping):
        yield from ((str(key), value) for key, value in given.items() if isinstance(value, torch.Tensor))
        return
    for index, value in enumerate(_flat(torch, given)):
        yield f"output{index}", value


def _flat(torch: Any, given: Any) -> Iterator[Any]:
    if isinstance(given, torch.Tensor):
        yield given
    elif isinstance(given, (list, tuple)):
        for part in given:
            yield from _flat(torch, part)


def _describe(file: Path, shapes: Mapping[str, Sequence[int | None]], metadata: Mapping[str, str]) -> None:
    """Write the metadata, and the outputs' shapes, which tracing may leave open and families are told by."""
    import onnx

    model = onnx.load(str(file))
    for output in model.graph.output:
        dims = output.type.tensor_type.shape.dim
        for dim, value in zip(dims, shapes[output.name], strict=False):
            if value is None:
                dim.dim_param = "batch"
            else:
                dim.dim_value = value
    onnx.helper.set_model_props(model, dict(metadata))
    with _foreign("the exported file"):
        onnx.checker.check_model(model)
    onnx.save(model, str(file))


def _difference(file: Path, images: Any, wanted: Arrays) -> float:
    """The largest of any output, as a share of its largest value. Raises `ModelError` where it is too large."""
    import onnxruntime

    with _foreign(f"the exported file, on {list(images.shape)}", "; if it takes one picture at a time: --fixed-batch"):
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        got = dict(zip(wanted, session.run(list(wanted), {_INPUT: images.numpy()}), strict=True))
    worst = 0.0
    for name, value in wanted.items():
        if got[name].shape != value.shape:
            raise ModelError(f"{name} is {list(got[name].shape)} in ONNX, {list(value.shape)} in PyTorch")
        largest = float(np.abs(value).max(initial=0.0)) or 1.0
        off = float(np.abs(got[name].astype(np.float64) - value).max(initial=0.0)) / largest
        if not off <= _MOST_DIFFERENT:
            raise ModelError(
                f"{name} is off by {off:.2g} of its largest value; the trace does not hold for any picture"
            )
        worst = max(worst, off)
    return worst


def _keep(file: Path, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}") from error


def _parent(shelf: Shelf, named: str | None, source: str) -> str | None:
    """The model that is named, or the last one that came from the same source."""
    if named is not None:
        return shelf.store.get(named).id
    same = [one for one in shelf.store.registry().models if one.is_kept and one.source == _place(source)]
    return same[-1].id if same else None


def _place(source: str) -> str:
    """As the registry has it."""
    return str(Path(source).absolute()) if Path(source).is_file() else source


def _taken_for(file: Path, settings: Sequence[str]) -> Mapping[str, Any]:
    """What the agent makes of the file, or why it can make nothing of it."""
    try:
        options = ModelOptions(**{**entry_from(settings), "path": str(file)})
        stored = StoredModel(file.stem, "config", options, None)
        family, proposal = make_family(facts_of(file), options, stored.labels(), InferenceOptions())
    except EdgeAgentError as error:
        return {"family": None, "task": None, "problem": str(error)}
    return {"family": proposal.family, "task": family.task, "problem": None}


def _tell(
    exported: Exported,
    out: Path | None,
    taken: Mapping[str, Any],
    shelf: Shelf,
    kept: StoredModel | None,
    *,
    as_json: bool,
) -> None:
    if as_json:
        told = {
            "file": str(out) if out else None,
            "outputs": {name: list(shape) for name, shape in exported.outputs.items()},
            "difference": exported.difference,
            **taken,
            "registered": shelf.library.show(kept.id) if kept else None,
        }
        typer.echo(json.dumps(told, indent=2))
        return
    for name, shape in exported.outputs.items():
        typer.echo(f"output   {name}  [{', '.join('?' if side is None else str(side) for side in shape)}]")
    typer.echo(f"differs  {exported.difference:.2g} of the largest value, on {exported.pictures} pictures")
    typer.echo(f"taken for  {taken['family']}, {taken['task']}" if taken["family"] else f"unknown  {taken['problem']}")
    if out is not None:
        typer.echo(f"written  {out}")
    if kept is not None:
        introduce(shelf, kept, as_json=False)


def _sides(size: str) -> tuple[int, int]:
    width, separator, height = size.lower().partition("x")
    if not width.isdecimal() or (separator and not height.isdecimal()) or not int(width) or height == "0":
        raise typer.BadParameter(f"--size {size}: write 320, or 640x480 (width x height)")
    return int(width), int(height or width)


def _labels(given: str | None) -> Mapping[str, str]:
    if given is None:
        return {}
    path = Path(given)
    names = path.read_text(encoding="utf-8").splitlines() if path.is_file() else given.split(",")
    return {"names": str({i: name.strip() for i, name in enumerate(name for name in names if name.strip())})}


def _fact(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise typer.BadParameter(f"--fact {text}: write key=value, such as task=detect")
    return key, value


@contextmanager
def _foreign(what: str, hint: str = "") -> Iterator[None]:
    """What somebody else's code raises, as a sentence."""
    try:
        yield
    except EdgeAgentError:
        raise
    except Exception as error:
        raise ModelError(f"{what}: {type(error).__name__}: {_first_line(error)}{hint}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what tracing warns of: the comparison tells whether it matters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
