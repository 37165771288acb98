"""Captioned scenes of the generator, as a source: synthetic pairs without end, for trying out a recipe."""

from __future__ import annotations

from PIL import Image

from vlmo_fast.data.randomness import item_generator, stable_id
from vlmo_fast.data.source import Sample, check_index, digest
from vlmo_fast.data.synthetic.scenes import SceneWorld, Split

__all__ = ["SceneCaptions"]


class SceneCaptions:
    """A `Source` of scenes of two objects and their captions, each drawn when it is asked for.

    Scenes of one meaning (the same two objects in the same layout) have the same caption; they count as one image, so
    that none is taken for a negative of another.

    Args:
        world: draws the scenes.
        split: of which pairs of objects.
        num_scenes: after so many different pictures an epoch ends.
        seed: draws the pictures.

    Raises:
        ValueError: `num_scenes` is not positive, or the split is unknown.
    """

    def __init__(
        self, world: SceneWorld, split: Split = "train", *, num_scenes: int = 1_000_000, seed: int = 0
    ) -> None:
        if num_scenes < 1:
            raise ValueError(f"SceneCaptions: num_scenes must be positive, got {num_scenes}")
        world.pairs(split)  # refuses an unknown one
        self.world, self.split, self.num_scenes, self.seed = world, split, num_scenes, seed

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        scene = self.world.captions(self.split, 1, rng=item_generator(self.seed, 0, index, "scene"))
        image_id = stable_id("scene", "/".join(self.world.sprites.names), int(scene.meanings[0]))
        return Sample(Image.fromarray(scene.images[0]), scene.captions[0], image_id)

    def place(self, index: int) -> str:
        """The split and the number of the scene."""
        return f"scene {index} of {self.split}"

    def fingerprint(self) -> str:
        """Of all that decides what is drawn, the sprites' pixels included."""
        world = self.world
        settings = (world.seed, world.image_size, world.num_test_pairs, world.num_validation_pairs)
        names, pixels = "/".join(world.sprites.names), world.sprites.pixels.tobytes()
        return digest(names, pixels, *settings, self.split, self.num_scenes, self.seed)
