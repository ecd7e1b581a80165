"""Image preprocessing that does each image once per call: GRPO repeats each image `group_size` times."""

from typing import Any

import torch
from transformers import BatchFeature


class ImagesOnce:
    """Mixin for an image processor that returns patches and grids, such as `Qwen2VLImageProcessor`."""

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """Process images that are the same object once.

        Returns:
            `pixel_values`, (patches, values), and `image_grid_thw`, (images, 3), bit by bit those of the plain class.
        """
        processor: Any = self
        plain: Any = super().preprocess  # type: ignore[misc]
        shown = processor._prepare_images_structure(images)
        once = {id(image): image for image in shown}
        if len(once) == len(shown) or kwargs.get("return_tensors") != "pt":
            return plain(images, *args, **kwargs)
        found = plain(list(once.values()), *args, **kwargs)
        patches = found["pixel_values"].split(found["image_grid_thw"].prod(-1).tolist())
        index = {name: i for i, name in enumerate(once)}
        indices = [index[id(image)] for image in shown]
        found["pixel_values"] = torch.cat([patches[i] for i in indices])
        found["image_grid_thw"] = found["image_grid_thw"][indices]
        return found
