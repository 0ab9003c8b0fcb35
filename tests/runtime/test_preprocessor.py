import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPVisionConfig, Dinov2Config, LlavaConfig, SiglipVisionConfig

from resprune.runtime.bundle.files import Bundle
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.fixed_grid import FixedGrid
from resprune.runtime.families.llava import LLAVA_TOWER, TOWER_DEFAULTS, preprocessor, tower_size
from resprune.runtime.families.table import FAMILIES, family_of
from tests.runtime.bundles import bundle_of_files

PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 24},
    "crop_size": {"height": 24, "width": 24},
}


def bundle(root: Path, vision: object = None, **files: Any) -> Bundle:
    content = {"config.json": {"vision_config": vision}, "preprocessor_config.json": PROCESSOR} | files
    return bundle_of_files(root, {name: json.dumps(value) for name, value in content.items()})


def of_family(made: Bundle, family: str, num_tokens: int | None = 9) -> Bundle:
    selection = replace(made.manifest.selection, num_tokens=num_tokens)
    return replace(made, manifest=replace(made.manifest, family=family, selection=selection))


def test_a_fixed_grid_stacks_pictures_and_places_their_tokens(tmp_path: Path) -> None:
    grid = preprocessor(bundle(tmp_path, {"patch_size": 8}))
    pictures = [grid(Image.new("RGB", size, (200, 10, 10))) for size in ((60, 30), (24, 24))]
    assert [picture.num_tokens for picture in pictures] == [9, 9]
    np.testing.assert_array_equal(pictures[0].offsets, np.arange(9))
    assert pictures[0].advances == (9,)
    assert grid.batch(pictures)["pixel_values"].shape == (2, 3, 24, 24)
    boxes = grid.boxes((60, 30))
    assert boxes[0] == (15, 0, 25, 10)
    assert boxes[8] == (35, 20, 45, 30)


def test_a_class_token_lies_nowhere(tmp_path: Path) -> None:
    made = bundle(tmp_path, {"patch_size": 8})
    boxes = preprocessor(of_family(made, "llava", num_tokens=10)).boxes((24, 24))
    assert boxes[:2] == [None, (0, 0, 8, 8)]


def test_a_manifest_without_the_number_of_tokens(tmp_path: Path) -> None:
    made = bundle(tmp_path, {"patch_size": 8})
    with pytest.raises(ResPruneError, match="how many visual tokens"):
        preprocessor(of_family(made, "llava", num_tokens=None))


@pytest.mark.parametrize(
    "config", [CLIPVisionConfig(), SiglipVisionConfig(), Dinov2Config()], ids=lambda config: config.model_type
)
def test_sizes_that_a_config_leaves_out_are_those_of_transformers(tmp_path: Path, config: Any) -> None:
    sizes = {"patch_size": config.patch_size, "image_size": config.image_size}
    assert TOWER_DEFAULTS[config.model_type] == sizes
    assert tower_size(bundle(tmp_path, {"model_type": config.model_type})) == sizes
    given = {"model_type": config.model_type, "patch_size": 5, "image_size": 55}
    assert tower_size(bundle(tmp_path, given)) == {"patch_size": 5, "image_size": 55}


def test_a_config_without_a_tower_means_llavas_own(tmp_path: Path) -> None:
    default = LlavaConfig().vision_config
    assert {"patch_size": default.patch_size, "image_size": default.image_size} == LLAVA_TOWER
    assert tower_size(bundle(tmp_path)) == LLAVA_TOWER


@pytest.mark.parametrize("value", [0, -1, 1.5, "14", True, [14, 14]], ids=repr)
def test_a_patch_size_that_is_none(tmp_path: Path, value: object) -> None:
    with pytest.raises(ResPruneError, match=r"vision_config\.patch_size .* number from 1"):
        tower_size(bundle(tmp_path, {"patch_size": value}))
    with pytest.raises(ResPruneError, match=r"vision_config\.image_size"):
        tower_size(bundle(tmp_path, {"model_type": "pixtral", "patch_size": 14}))


def test_the_nested_image_processor_goes_first(tmp_path: Path) -> None:
    nested = PROCESSOR | {"crop_size": {"height": 16, "width": 16}}
    made = bundle(tmp_path, {"patch_size": 8}, **{"processor_config.json": {"image_processor": nested}})
    picture = preprocessor(made)(Image.new("RGB", (40, 40)))
    assert picture.arrays["pixel_values"].shape == (3, 16, 16)
    plain = bundle(tmp_path, {"patch_size": 8}, **{"processor_config.json": {"image_token": "<image>"}})
    assert preprocessor(plain)(Image.new("RGB", (40, 40))).arrays["pixel_values"].shape[1] == 24


def test_each_family_reads_its_own_bundle(tmp_path: Path) -> None:
    made = bundle(tmp_path, {"patch_size": 8, "image_size": 24})
    assert isinstance(family_of(of_family(made, "llava")).preprocessor(made), FixedGrid)
    next_processor = PROCESSOR | {
        "image_processor_type": "LlavaNextImageProcessor",
        "image_grid_pinpoints": [[24, 48]],
    }
    made = bundle(
        tmp_path, {"patch_size": 8, "image_size": 24}, **{"preprocessor_config.json": next_processor}
    )
    read = family_of(of_family(made, "llava_next")).preprocessor(made)
    assert read(Image.new("RGB", (48, 24))).num_tokens == 9 + 3 * 7
    assert len(read.boxes((48, 24))) == 9 + 3 * 7


def test_an_unknown_family_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ResPruneError, match="family flamingo") as caught:
        family_of(of_family(bundle(tmp_path), "flamingo"))
    for family in FAMILIES.values():
        assert family.title in str(caught.value)
