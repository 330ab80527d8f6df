"""The published schema of `bits.json` is that of the code."""

import json
from pathlib import Path

from pyro_bbits import BitConfiguration

ROOT = Path(__file__).parents[2]


def test_published_schema_is_current() -> None:
    published = json.loads((ROOT / "docs" / "bits.schema.json").read_text())
    assert published == BitConfiguration.model_json_schema(mode="serialization"), "run `make schema`"


def test_every_key_of_the_schema_is_explained() -> None:
    page = (ROOT / "docs" / "bits-json.md").read_text()
    schema = BitConfiguration.model_json_schema(mode="serialization")
    objects = [schema, *schema["$defs"].values()]
    missing = {key for content in objects for key in content["properties"] if f"`{key}`" not in page}
    assert not missing
