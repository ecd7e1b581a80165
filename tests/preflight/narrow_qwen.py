"""A narrow Qwen2.5-VL of which nothing but its config.json is here, as of a model that is still to be downloaded."""

import json
from pathlib import Path
from typing import Any

from workflow_scripts.configuration.model import Configuration, load
from workflow_scripts.files.paths import ROOT


def narrow(folder: Path, changes: dict[str, Any], **policy: Any) -> Configuration:
    """Write the config.json of a model with a large vocabulary, and return the default with it and with changes."""
    folder.mkdir(parents=True, exist_ok=True)
    values = json.loads((ROOT / "models/tiny-qwen2.5-vl/config.json").read_text(encoding="utf-8"))
    del values["text_config"]["layer_types"]
    values["text_config"] |= {"vocab_size": 5000, "num_hidden_layers": 1, "eos_token_id": 4990, "pad_token_id": 4991}
    values |= {"image_token_id": 4992, "video_token_id": 4993, "vision_start_token_id": 4994, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(values))
    return load(changes | {"policy": {"source": "hub", "hub": {"path": str(folder)}, **policy}})
