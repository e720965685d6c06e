"""Published cards import this module: it registers the small-image ResNets with timm."""

from .models import small_resnet as small_resnet
