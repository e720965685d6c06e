"""Export an encoder or a classifier to one file for other programs: ``.onnx`` for ONNX Runtime, ``.pt2`` for PyTorch without this package.

    input   images         float32 (batch, 3, H, W), preprocessed as the metadata says; any batch size >= 1

    outputs of an encoder
            z              float32 (batch, D), >= 0 with exact zeros
            features       float32 (batch, F), the backbone's dense features, an intermediate of z
    outputs of a classifier of C classes
            logits         float32 (batch, C), in the order of the metadata's `classes`
            probabilities  float32 (batch, C), their softmax

Metadata, all strings: `architecture`, `fingerprint`, `preprocess` (JSON: size, mean, std, interpolation, crop_pct; see
`rlpjepa_zoo.data.preprocess.Preprocess`), `versions` and `outputs` (JSON), and of a classifier `classes` (JSON). Another program reads them from
`session.get_modelmeta().custom_metadata_map`, or by `metadata = {"preprocess": ""}; torch.export.load(path, extra_files=metadata)`.

Neither file holds a pickle: the .pt2 is raw tensors and JSON, without the sample inputs that torch would pickle. This holds for files
written here; `torch.export.load` unpickles any pickle in a file, so open only files you trust.

To add a format, write a class with the methods of `ExportFormat` and register it under its suffix in `EXPORT_FORMATS`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..core import files, rng
from ..core.package import versions
from ..core.registry import Registry
from ..core.source import expanded
from ..errors import ModelError, NonFiniteError, UsageError, ZooError, first_line
from ..ops.modules import plain_copy, unwrapped
from . import golden
from .classifier import Classifier
from .encoder import SparseEncoder

__all__ = ["EXPORT_FORMATS", "ExportFormat", "export"]

OUTPUTS = ["z", "features"]
"""Outputs of an encoder."""
CLASSIFIER_OUTPUTS = ["logits", "probabilities"]
TOLERANCE, SAME_ZERO = 1e-4, 1e-5
MAX_ONNX = 2**31 - 2**24  # bytes of weights: protobuf stops at 2 GiB, and the graph needs room too


def export(model: SparseEncoder | Classifier, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write all layers of a model, in evaluation mode, to one self-contained file; the module describes it. Returns its path.

    Before the file gets its name, it is opened and run on the CPU in float32. Its outputs are compared with those of the model on the golden
    images and noise, in batches of 1, 2 and 7. Each output may differ by 1e-4 * max(1, its largest value), and z must have the encoder's zeros, except for
    values below 1e-5 of the largest. The model itself is not changed.

    Args:
        model: an encoder or a classifier; any device, any mode, float32 weights.
        path: file that ends in ``.onnx`` (needs ``pip install 'rlpjepa-zoo[export]'``) or ``.pt2``, in a folder that exists.
        overwrite: replace an existing file, by one rename.

    Raises:
        UsageError: another ending, an existing file, weights that are not float32 or too large for .onnx, packages that are missing.
        ModelError: the architecture cannot be exported, or the file does not give what the encoder gives; nothing is left.
        NonFiniteError: a weight is NaN or infinite.
        OutputError: the folder is missing, full or read-only.

    Example:
        >>> import tempfile, rlpjepa_zoo
        >>> enc = rlpjepa_zoo.create_encoder("test_resnet", dim=16, hidden_dim=32)
        >>> with tempfile.TemporaryDirectory() as scratch:
        ...     program = torch.export.load(export(enc, f"{scratch}/enc.pt2")).module()
        >>> {name: tuple(value.shape) for name, value in program(torch.zeros(5, 3, *enc.config.preprocess.size)).items()}
        {'z': (5, 16), 'features': (5, 96)}
    """
    path = expanded(path)
    if path.suffix not in EXPORT_FORMATS:
        raise UsageError(f"{path}: expected a file ending in {' or '.join(EXPORT_FORMATS)}")
    model = unwrapped(model)
    format, state = EXPORT_FORMATS[path.suffix], model.state_dict()
    _check_weights(state)
    format.check(path, state)
    if os.path.lexists(path) and not (overwrite and os.path.isfile(path)):
        raise UsageError(f"{path}: exists; choose another name, or overwrite a file (--overwrite)")
    with files.atomic_file(path) as temporary, torch.no_grad(), torch.autocast("cpu", enabled=False):
        temporary.touch()  # a read-only folder fails here, before the minutes of tracing
        with _as_model_error(f"architecture '{_architecture(model)}' cannot be exported to {path.suffix}"):
            graph = _graph(plain_copy(model).eval().requires_grad_(False).cpu().to(memory_format=torch.contiguous_format))
            images = golden.make(model)["inputs"]
            more = torch.randn(5, *images.shape[1:], generator=rng.generator(0, "export"))
            batches = [images[:1], images, torch.cat([images, more])]
            expected = [graph(x) for x in batches]
            output = io.StringIO()  # torch prints whole graphs when it fails; the error below gives the reason
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                data = format.convert(_trace(graph, images), _metadata(model))
        with files.disk_errors(path, len(data)):
            files.write_durably(temporary, data)
        with _as_model_error(f"{path}: the exported file does not open or run"):
            given = list(map(format.open(temporary), batches))
        for got, want in zip(given, expected, strict=True):
            _compare(got, want, path)
    return path


class _EncoderGraph(nn.Module):
    """Both outputs of an encoder. Names of the argument and of the keys become the names in the file."""

    def __init__(self, encoder: SparseEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features, z = self.encoder.both(images)
        return {"z": z, "features": features}


class _ClassifierGraph(nn.Module):
    """Both outputs of a classifier."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        logits = self.classifier(images)
        return {"logits": logits, "probabilities": logits.softmax(1)}


def _graph(model: SparseEncoder | Classifier) -> nn.Module:
    return (_ClassifierGraph(model) if isinstance(model, Classifier) else _EncoderGraph(model)).eval()


def _architecture(model: SparseEncoder | Classifier) -> str:
    return (model.config.encoder if isinstance(model, Classifier) else model.config).architecture


@contextlib.contextmanager
def _as_model_error(what: str) -> Iterator[None]:
    """Turn any exception inside the block into a `ModelError` that starts with `what`."""
    try:
        yield
    except ZooError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # torch.onnx wraps the reason three times
            cause = cause.__cause__
        raise ModelError(f"{what}: {first_line(cause)}") from error


def _check_weights(state: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise UsageError(f"{name} is {tensor.dtype}; models are exported in float32, so call .float() first")
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{name} holds NaN or infinity; a model like that is not exported")


def _trace(model: nn.Module, example: Tensor) -> Any:
    """The program of a graph. `example` holds two images, because torch treats a size of 1 as a constant."""
    program = torch.export.export(model, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}})
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths and source lines of this machine
    return program


def _metadata(model: SparseEncoder | Classifier) -> dict[str, str]:
    classifier = isinstance(model, Classifier)
    return {
        "architecture": _architecture(model),
        "fingerprint": model.fingerprint(),
        "preprocess": json.dumps(dataclasses.asdict(model.config.preprocess)),
        "outputs": json.dumps(CLASSIFIER_OUTPUTS if classifier else OUTPUTS),
        **({"classes": json.dumps(model.classes)} if classifier else {}),
        "versions": json.dumps(versions()),
    }


# --- the formats ---------------------------------------------------------------------------------------------------------------------


class ExportFormat(Protocol):
    """One kind of file."""

    def check(self, path: Path, state: dict[str, Tensor]) -> None:
        """Refuse what the format cannot do, before any work."""

    def convert(self, program: Any, metadata: dict[str, str]) -> bytes:
        """Content of the file, from a `torch.export.ExportedProgram` with one input, images, and the outputs that the metadata names."""
        raise NotImplementedError

    def open(self, file: Path) -> Callable[[Tensor], dict[str, Tensor]]:
        """A function from images to outputs, which runs the file."""
        raise NotImplementedError


EXPORT_FORMATS: Registry[ExportFormat] = Registry("export format")
"""Formats by file suffix."""


class Onnx:
    """``.onnx``, for ONNX Runtime."""

    def check(self, path: Path, state: dict[str, Tensor]) -> None:
        if (total := sum(tensor.nbytes for tensor in state.values())) > MAX_ONNX:
            raise UsageError(f"{path}: {total / 1e9:.3g} GB of weights, one ONNX file holds {MAX_ONNX / 1e9:.3g} GB; export to .pt2")
        try:
            for package in ("onnx", "onnxscript", "onnxruntime"):
                importlib.import_module(package)
        except ImportError as error:
            raise UsageError(f"{path}: needs {package} ({first_line(error)}): pip install 'rlpjepa-zoo[export]'") from error

    def convert(self, program: Any, metadata: dict[str, str]) -> bytes:
        import onnx

        axes = {"images": {0: "batch"}}
        outputs = json.loads(metadata["outputs"])
        made = torch.onnx.export(program, input_names=["images"], output_names=outputs, dynamic_shapes=axes, dynamo=True, verbose=False)
        proto = cast(torch.onnx.ONNXProgram, made).model_proto
        onnx.helper.set_model_props(proto, metadata)
        return bytes(proto.SerializeToString())

    def open(self, file: Path) -> Callable[[Tensor], dict[str, Tensor]]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda x: dict(zip(names, map(torch.from_numpy, session.run(names, {"images": x.numpy()})), strict=True))


class Pt2:
    """``.pt2``, for PyTorch without this package."""

    def check(self, path: Path, state: dict[str, Tensor]) -> None:
        pass

    def convert(self, program: Any, metadata: dict[str, str]) -> bytes:
        program.example_inputs = None  # torch would pickle them
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files=metadata)
        with zipfile.ZipFile(buffer) as archive:
            for member in archive.infolist():
                sample = "/sample_inputs/" in member.filename and member.file_size > 0
                if sample or (member.filename.endswith("_config.json") and b'"use_pickle": true' in archive.read(member)):
                    raise ModelError(f"torch {torch.__version__} puts a pickle into this .pt2 ({member.filename}); export to .onnx")
        return buffer.getvalue()

    def open(self, file: Path) -> Callable[[Tensor], dict[str, Tensor]]:
        return cast(Callable[[Tensor], dict[str, Tensor]], torch.export.load(file).module())


EXPORT_FORMATS.register(".onnx")(Onnx())
EXPORT_FORMATS.register(".pt2")(Pt2())


# --- the comparison ------------------------------------------------------------------------------------------------------------------


def _compare(given: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    """Refuse a file with other outputs than the model."""
    for name, want in wanted.items():
        got = given[name]
        if got.shape != want.shape:
            raise ModelError(f"{path}: {name} of the exported file has shape {tuple(got.shape)}, the model's {tuple(want.shape)}")
        error, allowed = float((got - want).abs().max()), TOLERANCE * max(1.0, float(want.abs().max()))
        if not error <= allowed:
            raise ModelError(f"{path}: {name} of the exported file differs from the model's by {error:.2g} (allowed {allowed:.2g})")
    if "z" not in wanted:
        return
    got, want = given["z"], wanted["z"]
    differing = ((got != 0) != (want != 0)) & (torch.maximum(got, want) > SAME_ZERO * want.max())
    if differing.any() or (got < 0).any():
        raise ModelError(
            f"{path}: z of the exported file has other zeros than the encoder's, {int(differing.sum())} of {differing.numel()}"
        )
