"""LLaVA-1.5: a fixed grid; and the sizes of the towers that LLaVAs have."""

from resprune.runtime.bundle.files import Bundle
from resprune.runtime.errors import ResPruneError, shown
from resprune.runtime.families.fixed_grid import FixedGrid

# patch_size and image_size where a checkpoint's config leaves them out, as in transformers 5.
TOWER_DEFAULTS = {
    "clip_vision_model": {"patch_size": 32, "image_size": 224},
    "siglip_vision_model": {"patch_size": 16, "image_size": 224},
    "dinov2": {"patch_size": 14, "image_size": 224},
}
MAX_SIDE = 1 << 14  # pixels, as of the processors' sizes
LLAVA_TOWER = {"patch_size": 14, "image_size": 336}  # of a config without a vision_config


def preprocessor(bundle: Bundle) -> FixedGrid:
    """From the bundle's image processor, manifest and config."""
    return FixedGrid.from_bundle(bundle, tower_size(bundle)["patch_size"])


def tower_size(bundle: Bundle) -> dict[str, int]:
    """`patch_size` and `image_size` of the vision tower, in pixels."""
    config = bundle.json("config.json").get("vision_config")
    if not isinstance(config, dict):
        return dict(LLAVA_TOWER)
    sizes = TOWER_DEFAULTS.get(str(config.get("model_type", "clip_vision_model")), {})
    sizes = sizes | {key: config[key] for key in ("patch_size", "image_size") if key in config}
    for key in ("patch_size", "image_size"):
        value = sizes.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIDE:
            raise ResPruneError(
                f"vision_config.{key} in {bundle.root / 'config.json'} should be a number from 1 to {MAX_SIDE}, "
                f"not {shown(value)}; correct it in the checkpoint and export again"
            )
    return sizes
