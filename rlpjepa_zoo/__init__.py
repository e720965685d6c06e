"""Sparse, non-negative image embeddings of a density you choose: Rectified LpJEPA on any timm backbone.

Names are loaded on first use, so that importing the package costs nothing and changes nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classifier import Classifier as Classifier
    from .distributions import GeneralizedGaussian as GeneralizedGaussian
    from .distributions import RectifiedGeneralizedGaussian as RectifiedGeneralizedGaussian
    from .distributions import mu_for_density as mu_for_density
    from .distributions import sigma_gn as sigma_gn
    from .distributions import sigma_rgn as sigma_rgn
    from .encoder import SparseEncoder as SparseEncoder
    from .evaluation import evaluate as evaluate
    from .loading import create_encoder as create_encoder
    from .loading import load_classifier as load_classifier
    from .loading import load_encoder as load_encoder
    from .objectives import RectifiedLpJEPALoss as RectifiedLpJEPALoss
    from .recipe import Recipe as Recipe
    from .sigreg import LeJEPALoss as LeJEPALoss
    from .sigreg import SIGReg as SIGReg
    from .sigreg import strong_sigreg as strong_sigreg
    from .sigreg import weak_sigreg as weak_sigreg
    from .sliced import sliced_wasserstein as sliced_wasserstein
    from .slices import directions as directions
    from .sparse import SparseEmbeddings as SparseEmbeddings
    from .training import train as train
    from .tuning import finetune as finetune
    from .tuning_recipe import TuningRecipe as TuningRecipe
    from .zoo import list_encoders as list_encoders

__version__ = "0.1.0"

_HOME = {
    "GeneralizedGaussian": "distributions",
    "RectifiedGeneralizedGaussian": "distributions",
    "mu_for_density": "distributions",
    "sigma_gn": "distributions",
    "sigma_rgn": "distributions",
    "Classifier": "classifier",
    "SparseEncoder": "encoder",
    "create_encoder": "loading",
    "load_classifier": "loading",
    "load_encoder": "loading",
    "evaluate": "evaluation",
    "RectifiedLpJEPALoss": "objectives",
    "directions": "slices",
    "sliced_wasserstein": "sliced",
    "Recipe": "recipe",
    "LeJEPALoss": "sigreg",
    "SIGReg": "sigreg",
    "strong_sigreg": "sigreg",
    "weak_sigreg": "sigreg",
    "SparseEmbeddings": "sparse",
    "train": "training",
    "finetune": "tuning",
    "TuningRecipe": "tuning_recipe",
    "list_encoders": "zoo",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rlpjepa_zoo' has no attribute '{name}'")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
