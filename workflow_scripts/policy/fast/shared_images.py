"""Preprocessing that does each image once, however many rows show it: GRPO repeats each of them `group_size` times."""

from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin, Qwen2VLImageProcessor


def process_images_once(processor: ProcessorMixin) -> None:
    """Let the processor of a Qwen2-VL or Qwen2.5-VL preprocess equal objects once; others stay as they are.

    The class keeps its name, by which it is saved and loaded again as the plain one.
    """
    images: Any = processor.image_processor
    if isinstance(images, Qwen2VLImageProcessor):
        images.__class__ = type(type(images).__name__, (ImagesOnce, type(images)), {})


class ImagesOnce:
    """Mixin for an image processor that gives patches and grids, such as `Qwen2VLImageProcessor`."""

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """The processor's own `pixel_values`, (patches, values), and `image_grid_thw`, (images, 3), to the last bit."""
        processor: Any = self
        plain: Any = super().preprocess  # type: ignore[misc]
        shown = processor._prepare_images_structure(images)
        once = {id(image): image for image in shown}
        if len(once) == len(shown) or kwargs.get("return_tensors") != "pt":
            return plain(images, *args, **kwargs)
        found = plain(list(once.values()), *args, **kwargs)
        pictures = found["pixel_values"].split(found["image_grid_thw"].prod(-1).tolist())
        place = {name: i for i, name in enumerate(once)}
        places = [place[id(image)] for image in shown]
        found["pixel_values"] = torch.cat([pictures[i] for i in places])
        found["image_grid_thw"] = found["image_grid_thw"][places]
        return found
