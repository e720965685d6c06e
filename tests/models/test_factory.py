"""Untrusted configurations of backbones are refused before memory is used."""

import functools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from published import config_of
from refusals import refused

import rlpjepa_zoo as rz
from rlpjepa_zoo.errors import ModelError
from rlpjepa_zoo.hub.folder import write_folder
from rlpjepa_zoo.hub.format import pack, parse, tensor_place
from rlpjepa_zoo.models.pretrained import _DTYPES, build_encoder, skeleton

BOMBS = {
    "dpn68": {"k_sec": [65536, 4, 20, 3]},
    "dla34": {"levels": [1, 1, 30, 2, 2, 1]},
    "focalnet_tiny_srf": {"focal_levels": [16000] * 4},
    "tiny_vit_5m_224": {"window_sizes": [7, 7, 400, 7]},
    "davit_tiny": {"depths": [256] * 60},
    "swin_tiny_patch4_window7_224": {"depths": [256] * 20},
    "test_vit": {"depth": 200, "embed_dim": 16384},
    "hieradet_small": {"stages": [4000, 2, 3, 2]},
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("ours", [True, False])
def test_config_larger_than_its_files_is_refused_at_once(tmp_path, contents, name, ours):
    path = write_folder(tmp_path / "enc", contents)
    with config_of(path) as config:
        config |= {"architecture": name, "model_args": BOMBS[name]}
        if not ours:
            del config["rlpjepa_zoo"]
    started = time.monotonic()
    with refused(ModelError):
        rz.load_encoder(path) if ours else rz.create_encoder(f"local-dir:{path}", pretrained=True)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("name", ["hf_hub:owner/repo", "file:model", "owner/repo", "timm:owner/repo"])
def test_name_with_another_prefix_is_no_timm_model(name):
    with refused(ModelError, match="is not a timm model"):
        rz.create_encoder(name, dim=8)


def test_timm_prefix_of_a_backbone_is_ignored():
    config = rz.create_encoder("timm:test_resnet", dim=8, hidden_dim=8).config
    assert config == rz.create_encoder("test_resnet", dim=8, hidden_dim=8).config


# A sample of names runs by default; the slow test takes every architecture of timm. Models are built without memory, and of what is saved the
# names, types and shapes of all tensors and the configuration are compared with what a load expects. Weights are not written: that they
# survive is a matter of the file format, which the small models of test_saving.py go through.


def described(name: str, options: dict[str, Any], scratch: Path) -> None:
    """Raise what a save, or a load of what was saved, would raise."""
    with torch.device("meta"):
        enc = rz.create_encoder(name, dim=8, hidden_dim=8, **options)
        enc.fingerprint = lambda: ""  # of weights, which a model without memory does not have
        published, _ = enc._description({}, "owner/repo", scratch)
    files = {file: {} for file in published.tensor_files}
    for key, value in enc.state_dict().items():
        file, place = tensor_place(key, published)
        files[file][place] = _DTYPES[value.dtype], tuple(value.shape)
    height, width = enc.config.preprocess.size
    files["golden.safetensors"] = {
        "images": ("U8", (2, height + height // 4, width + width // 4 + 8, 3)), "inputs": ("F32", (2, 3, height, width)),
        "features": ("F32", (2, enc.config.features)), "codes": ("F32", (2, 8)),
    }  # fmt: skip
    read = parse(pack(published, {})["config.json"], name)
    skeleton(read, files, scratch, functools.partial(build_encoder, read, name, None))


@pytest.mark.parametrize(
    "name",
    [
        "caformer_s18",
        "convformer_s18",
        "efficientnet_b3_pruned",
        "coat_mini",
        "vit_base_patch16_siglip_224",
        "levit_128s",
        "vitamin_xlarge_336",
    ],
)
def test_architecture_loads_what_it_saves(tmp_path, name):
    described(name, {}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_every_timm_architecture_loads_what_it_saves(tmp_path, part):
    failed = {}
    for name in timm.list_models()[part::8]:
        try:
            described(name, {}, tmp_path)
        except Exception as error:
            failed[name] = error
    assert failed == {}


@pytest.mark.parametrize(
    "change",
    [
        {"model_args": {"features_only": True}}, {"model_args": {"global_pool": ""}}, {"model_args": {"pretrained_strict": False}},
        {"pretrained_cfg": {"input_size": [3, 99999, 99999]}}, {"pretrained_cfg": {"mean": "x"}}, {"pretrained_cfg": {"crop_pct": [1]}},
        {"architecture": "hf-hub:a/b"}, {"architecture": None}, {"model_args": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_untrusted_timm_config_is_checked(tmp_path, change):
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=0), tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {**change, "pretrained_cfg": config["pretrained_cfg"] | change.get("pretrained_cfg", {})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused(ModelError):
        rz.create_encoder(f"local-dir:{tmp_path}", pretrained=True)
