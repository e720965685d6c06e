"""The published format: files, keys and versions. `save_pretrained` writes it, the Hub holds it, `load_encoder` reads it.

    config.json           timm's own keys, and one block "rlpjepa_zoo", which timm and transformers ignore
    model.safetensors     the bare timm backbone
    head.safetensors      the projector
    golden.safetensors    two images, their preprocessed inputs, features and codes (of a classifier: inputs of its linear layer, and logits)
    recipe.yaml           the training recipe (absent when the model was not trained from a recipe)
    log.jsonl             the log of the training run (only encoders of the zoo have it; `rlpjepa zoo reproduce` compares with it)
    NOTICE                attributions that must stay with the weights, the text of info["notice"] (absent without one)
    README.md             the generated card; *.png, its figures (absent when nothing was measured)

The block of a classifier has the key "classifier". A classifier on features has its linear layer in model.safetensors, as every timm
classifier has, and no head.safetensors. A classifier on z has the projector and the linear layer in head.safetensors.

No file is pickled. config.json is written last and holds the sha256 of every other file and of itself, so a changed byte in any file is
detected, and a folder with some old and some new files does not verify.

To add a key: add a field to `Published`, a line to `pack` and a checked line to `parse`. `PublishedModel.contents` in `models/base.py` fills
the field, and `models/pretrained.py` uses it on load if needed. Raise `FORMAT` if an older reader must refuse the folder, and write the new
number only for models that use the key.

Weights are float32. If float16 holds every matrix and kernel of a model exactly (`PublishedModel.rounded`), they are saved as float16, which
takes half the bytes, and read as float32 with the same values; biases, normalisation and golden codes are float32 always.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.files import parse_json, sha256
from ..errors import ModelError, UsageError, first_line

if TYPE_CHECKING:
    from ..sparse.topk import Dial

__all__ = [
    "BACKBONE", "CARD", "CONFIG", "GOLDEN", "HEAD", "LOG", "MARK", "MEASURED", "NAMES", "NOTICE", "PICKLES", "RECIPE", "REPLACED", "LinearLayer",
    "Projector", "Published", "is_card", "listed_files", "pack", "parse", "tensor_place",
]  # fmt: skip

FORMAT = 4
"""Newest version. Version 1 has no sha256 of config.json. Format 3 is written only for encoders with a dial (`sparse/topk.py`), which a reader of format 2
would ignore; format 4 only for weights in float16, and for folders with a log or a notice."""
FLOAT16 = "float16"

CONFIG, BACKBONE, HEAD, GOLDEN = "config.json", "model.safetensors", "head.safetensors", "golden.safetensors"
RECIPE, CARD, FIGURES = "recipe.yaml", "README.md", ("training.png", "accuracy.png")
REQUIRED = (BACKBONE, HEAD, GOLDEN, CARD)
LOG, NOTICE = "log.jsonl", "NOTICE"
REPLACED = (CONFIG, *REQUIRED, RECIPE, *FIGURES)
"""Files that a save writes or removes. A log, or a notice, that a model does not have stays where it is: it may be somebody's own."""
NAMES = (*REPLACED, LOG, NOTICE)
MEASURED = ("results", "transfer", "codes")
"""Keys of `Published.info` with what was measured of these weights with this dial."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy")
"""Suffixes of files that may hold a pickle."""
MARK = b"rlpjepa_zoo"
"""Bytes that every config.json of this package contains."""
_BLOCK = MARK.decode()
_BLANK = "0" * 64
_MAX_WIDTH, _MAX_DEPTH, _MAX_CLASSES = 2**20, 64, 2**20


@dataclass(frozen=True)
class Projector:
    """Sizes of a projector: D, H and its number of linear layers.

    Raises:
        ValueError: not integers, or out of the range that is saved and loaded.
    """

    dim: int
    hidden_dim: int
    depth: int

    def __post_init__(self) -> None:
        for name, most in (("dim", _MAX_WIDTH), ("hidden_dim", _MAX_WIDTH), ("depth", _MAX_DEPTH)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name}: expected an integer in 1 .. {most}, got {str(value)[:40]!r}")


@dataclass(frozen=True)
class LinearLayer:
    """The linear layer of a classifier.

    Attributes:
        input: ``"features"`` or ``"z"``.
        classes: names, in the order of the logits.

    Raises:
        ValueError: not names, or a number of them that is not saved and loaded.
    """

    input: str
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 2 <= len(self.classes) <= _MAX_CLASSES or not all(isinstance(name, str) for name in self.classes):
            raise ValueError(f"classes: expected at least two names and at most {_MAX_CLASSES}, got {len(self.classes)}")


@dataclass(frozen=True)
class Published:
    """A published model as config.json describes it.

    Attributes:
        timm: the keys that timm reads: architecture, model_args, pretrained_cfg and others.
        preprocess: fields of `rlpjepa_zoo.data.preprocess.Preprocess`.
        projector: None for a classifier on features.
        classifier: None for an encoder.
        dial: None for an encoder without a dial, and for a classifier.
        float16: whether matrices and kernels are saved as float16.
        name: source name in the examples of the card.
        needs_package: plain timm does not know the architecture.
        fingerprint: digest of weights and preprocessing.
        info: JSON-able record of training and results.
        versions: of the packages that trained or saved the model.
        files: size and sha256 of the other files, by name. `parse` sets it from config.json; `pack` computes its own and ignores this field.
    """

    timm: dict[str, Any]
    preprocess: dict[str, Any]
    projector: Projector | None = None
    classifier: LinearLayer | None = None
    dial: Dial | None = None
    float16: bool = False
    name: str = "owner/repo"
    needs_package: bool = False
    fingerprint: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """timm name of the backbone."""
        return str(self.timm["architecture"])

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments of `timm.create_model`."""
        return dict(self.timm.get("model_args", {}))

    @property
    def tensor_files(self) -> tuple[str, ...]:
        """Names of the safetensors files."""
        return (BACKBONE, GOLDEN) if self.projector is None else (BACKBONE, HEAD, GOLDEN)


def tensor_place(key: str, published: Published, linear: str = "") -> tuple[str, str]:
    """File of a tensor, and its name in that file.

    Args:
        key: in the `state_dict` of a `SparseEncoder` or `Classifier`.
        published: the model.
        linear: timm's name of the linear layer; for classifiers on features only.

    Example:
        >>> tensor_place("projector.0.bias", Published({}, {}, Projector(8, 8, 1)))
        ('head.safetensors', '0.bias')
    """
    part, _, name = key.partition(".")
    if part == "backbone":
        return BACKBONE, name
    if published.projector is None:
        return BACKBONE, f"{linear}.{name}"
    return HEAD, name if published.classifier is None else key


# --- writing -------------------------------------------------------------------------------------------------------------------------


def pack(published: Published, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """`files` and their config.json, which holds their sizes and sha256, and its own sha256, computed with that value blank.

    Args:
        published: the model.
        files: contents of all other files, by name.

    Raises:
        UsageError: `published.info` is not JSON.
    """
    newest = published.float16 or not {LOG, NOTICE}.isdisjoint(files)
    timm = dict(published.timm)
    license = {"license": published.info["license"]} if published.info.get("license") is not None else {}
    timm["pretrained_cfg"] = {key: value for key, value in timm["pretrained_cfg"].items() if key != "license"} | license
    listed = {name: {"sha256": sha256(content), "size": len(content)} for name, content in sorted(files.items())}
    classifier = {} if published.classifier is None else {"classifier": dataclasses.asdict(published.classifier)}
    block = {
        "name": published.name,
        **classifier,
        "projector": {} if published.projector is None else dataclasses.asdict(published.projector),
        "preprocess": published.preprocess,
        "needs_package": published.needs_package,
        "fingerprint": published.fingerprint,
        **({} if published.dial is None else {"dial": published.dial.saved()}),
        "info": published.info,
        "versions": published.versions,
        **({"weights": FLOAT16} if published.float16 else {}),
        "format": FORMAT if newest else 2 if published.dial is None else 3,
        "files": listed,
        "sha256": _BLANK,
    }
    try:
        text = json.dumps({**timm, _BLOCK: block}, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UsageError(f"info: not JSON ({error}); expected text, finite numbers, lists and objects") from error
    if text.count(_BLANK) != 1:
        raise UsageError("info: holds 64 zeros in a row, which stand for the sha256 of config.json; leave them out")
    config = text.replace(_BLANK, sha256(text.encode())).encode()
    try:
        parse(config, CONFIG)  # what a load would refuse is not written
    except ModelError as error:
        raise UsageError(f"info: {error}") from error
    return {**files, CONFIG: config}


# --- reading -------------------------------------------------------------------------------------------------------------------------


def parse(text: bytes, where: str) -> Published:
    """The model that a config.json describes. Anybody may have written it, so every key is checked.

    Args:
        text: content of config.json.
        where: its path, for error messages.

    Raises:
        ModelError: not a config.json of this package, a newer format, or an unexpected value.
    """
    config = parse_json(text, where)
    block = config.get(_BLOCK) if isinstance(config, dict) else None
    if not isinstance(block, dict):
        raise ModelError(
            f"{where}: no '{_BLOCK}' block, so this is not a sparse encoder; for a plain timm model use "
            f"create_encoder('local-dir:{Path(where).parent}', pretrained=True) and train a projector"
        )
    if type(block.get("format")) is not int or not 1 <= block["format"] <= FORMAT:
        raise ModelError(f"{where}: format {block.get('format')!r}, this version reads 1 to {FORMAT}; update rlpjepa_zoo")
    if block["format"] >= 2 or "sha256" in block:
        own = ascii(block.get("sha256")).strip("'")
        if text.count(own.encode()) != 1 or sha256(text.replace(own.encode(), _BLANK.encode())) != own:
            raise ModelError(f"{where}: differs from its own sha256 (damaged or edited); download or save the encoder again")
    for key in ("info", "projector", "preprocess", "files", *(["classifier"] if "classifier" in block else [])):
        if not isinstance(block.get(key, {} if key == "info" else None), dict):
            raise ModelError(f"{where}: {_BLOCK}.{key}: expected an object, got {type(block.get(key)).__name__}")
    if not isinstance(config.get("architecture"), str) or not isinstance(config.get("model_args", {}), dict):
        raise ModelError(f"{where}: expected 'architecture' (a string) and 'model_args' (an object)")
    if not isinstance(config.get("pretrained_cfg"), dict):
        raise ModelError(f"{where}: expected 'pretrained_cfg' (an object)")
    projector = None if "classifier" in block and not block["projector"] else _projector(block["projector"], where)
    return Published(
        timm={key: value for key, value in config.items() if key != _BLOCK},
        preprocess=block["preprocess"],
        projector=projector,
        classifier=_classifier(block["classifier"], projector, where) if "classifier" in block else None,
        dial=_dial(block.get("dial"), where),
        float16=_float16(block.get("weights"), where),
        name=str(block.get("name", "owner/repo")),
        needs_package=bool(block.get("needs_package")),
        fingerprint=str(block.get("fingerprint", "")),
        info=block.get("info", {}),
        versions=block.get("versions") or {},
        files=block["files"],
    )


def _projector(saved: dict[str, Any], where: str) -> Projector:
    try:
        return Projector(saved["dim"], saved["hidden_dim"], saved["depth"])
    except (KeyError, ValueError) as error:
        raise ModelError(f"{where}: {_BLOCK}.projector is not what this version expects ({error})") from error


def _classifier(saved: dict[str, Any], projector: Projector | None, where: str) -> LinearLayer:
    expected, classes = "features" if projector is None else "z", saved.get("classes")
    if saved.get("input") != expected:
        raise ModelError(f"{where}: {_BLOCK}.classifier.input: expected {expected}, got {saved.get('input')!r}")
    try:
        return LinearLayer(expected, tuple(classes if isinstance(classes, list) else ()))
    except ValueError as error:
        raise ModelError(f"{where}: {_BLOCK}.classifier.{error}") from error


def _dial(saved: Any, where: str) -> Dial | None:
    if saved is None:
        return None
    from ..sparse.topk import Dial  # imports torch, which the list of the zoo does without

    try:
        return Dial(**saved)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{where}: {_BLOCK}.dial is not what this version expects ({first_line(error)})") from error


def _float16(saved: Any, where: str) -> bool:
    if saved not in (None, FLOAT16):
        raise ModelError(f"{where}: {_BLOCK}.weights: expected {FLOAT16}, got {saved!r}")
    return saved == FLOAT16


def listed_files(published: Published, where: str) -> dict[str, dict[str, Any]]:
    """The other files by name, with size and sha256.

    Raises:
        ModelError: a name that the format does not have, or a required file without its sha256.
    """
    absent = {HEAD} if published.projector is None else set()
    for name in sorted({*REQUIRED, *published.files} - absent):
        if name not in NAMES or name == CONFIG:
            raise ModelError(f"{where}/config.json: lists an unexpected file {name!r}; expected {', '.join(NAMES[1:])}")
        entry = published.files.get(name)
        if not isinstance(entry, dict) or type(entry.get("size")) is not int or not isinstance(entry.get("sha256"), str):
            raise ModelError(f"{where}/config.json: {name} is not listed with its size and sha256")
    return dict(published.files)


def is_card(name: str) -> bool:
    """Whether a file is the card or one of its figures, which may be edited or lost without harm to the model, or the notice, which is written
    with the card."""
    return name in (CARD, NOTICE) or name.endswith(".png")
