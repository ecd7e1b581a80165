"""Names of stage instances and lists of their settings."""

from workflow_scripts.files.instances import flat, instance_name


def test_an_instance_is_named_by_its_stage_and_what_sets_it_apart() -> None:
    config = {"seed": 0, "training": {"steps": 4}, "dataset": "hpsv2", "shard": 2}
    assert instance_name({"stage": "read_images", "config": config}) == "read_images · hpsv2 · seed 0 · shard 2"
    assert instance_name({"stage": "make_tables", "config": {"seeds": [0]}}) == "make_tables"


def test_settings_are_listed_by_dotted_key() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": [2, {"e": 3}]}, "f": None}) == {"a.b.c": 1, "a.d": [2, {"e": 3}], "f": None}
    assert flat({}) == flat({"a": {}}) == {}
