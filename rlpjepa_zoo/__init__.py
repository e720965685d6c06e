"""Sparse, non-negative image embeddings of a density you choose: Rectified LpJEPA on any timm backbone.

Names are loaded on first use, so that importing the package costs nothing and changes nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import moved

if TYPE_CHECKING:
    from .config.finetune import TuningRecipe as TuningRecipe
    from .config.pretrain import Recipe as Recipe
    from .distributions import GeneralizedGaussian as GeneralizedGaussian
    from .distributions import RectifiedGeneralizedGaussian as RectifiedGeneralizedGaussian
    from .distributions import mu_for_density as mu_for_density
    from .distributions import sigma_gn as sigma_gn
    from .distributions import sigma_rgn as sigma_rgn
    from .embedding.load import load_embeddings as load_embeddings
    from .evaluation.evaluate import evaluate as evaluate
    from .hub.zoo import list_encoders as list_encoders
    from .models.classifier import Classifier as Classifier
    from .models.encoder import SparseEncoder as SparseEncoder
    from .models.factory import create_encoder as create_encoder
    from .models.pretrained import load_classifier as load_classifier
    from .models.pretrained import load_encoder as load_encoder
    from .objectives import list_objectives as list_objectives
    from .objectives.lejepa import LeJEPALoss as LeJEPALoss
    from .objectives.rectified_lpjepa import RectifiedLpJEPALoss as RectifiedLpJEPALoss
    from .objectives.sigreg import SIGReg as SIGReg
    from .objectives.sigreg import strong_sigreg as strong_sigreg
    from .objectives.sigreg import weak_sigreg as weak_sigreg
    from .ops.directions import directions as directions
    from .ops.sliced_wasserstein import sliced_wasserstein as sliced_wasserstein
    from .sparse.embeddings import SparseEmbeddings as SparseEmbeddings
    from .training.tasks.finetune import finetune as finetune
    from .training.tasks.pretrain import train as train

__version__ = "0.1.0"

_HOME = {
    "GeneralizedGaussian": "distributions",
    "RectifiedGeneralizedGaussian": "distributions",
    "mu_for_density": "distributions",
    "sigma_gn": "distributions",
    "sigma_rgn": "distributions",
    "Classifier": "models.classifier",
    "SparseEncoder": "models.encoder",
    "create_encoder": "models.factory",
    "load_classifier": "models.pretrained",
    "load_encoder": "models.pretrained",
    "evaluate": "evaluation.evaluate",
    "load_embeddings": "embedding.load",
    "RectifiedLpJEPALoss": "objectives.rectified_lpjepa",
    "directions": "ops.directions",
    "sliced_wasserstein": "ops.sliced_wasserstein",
    "Recipe": "config.pretrain",
    "LeJEPALoss": "objectives.lejepa",
    "SIGReg": "objectives.sigreg",
    "strong_sigreg": "objectives.sigreg",
    "weak_sigreg": "objectives.sigreg",
    "SparseEmbeddings": "sparse.embeddings",
    "train": "training.tasks.pretrain",
    "finetune": "training.tasks.finetune",
    "TuningRecipe": "config.finetune",
    "list_encoders": "hub.zoo",
    "list_objectives": "objectives",
}
__all__ = ["__version__", *_HOME]

moved.install(__name__)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rlpjepa_zoo' has no attribute '{name}'")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
