"""`vlmo-fast embed`: contrastive embeddings of a collection of images and texts, into one file, resumable.

The collection is cut into parts. Each part's embeddings go into a file of their own, in a folder beside the output, as
soon as they are there; a run that was stopped takes up after the last of them. At the end they become one file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from vlmo_fast.hf.modeling import VLMoPreTrainedModel
    from vlmo_fast.hf.processing import VLMoProcessor

__all__ = ["main"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = (".safetensors", ".npy", ".parquet")
KINDS = ("image", "text")

_DESCRIPTION = """\
Embed images and texts with the dual encoder: unit-norm vectors whose dot product is the similarity of the two.

MODEL is a folder (save_pretrained, or vlmo-fast convert) or a released checkpoint with a contrastive head. OUT's suffix
says the format:
  .safetensors  image_embeds (N, D), text_embeds (M, D); the items in the metadata 'items', as JSON
  .npy          one array (N, D), of images or of texts; the items in OUT.json
  .parquet      rows of kind ('image' or 'text'), item, embedding

A run that was stopped goes on where it was when the same command is given again."""

_EPILOG = """\
examples:
  vlmo-fast embed coco/ photos.safetensors --images ~/photos
  vlmo-fast embed coco/ index.parquet --images paths.txt --texts captions.txt --batch-size 128
  vlmo-fast embed vlmo_base_patch16_384_coco.pt captions.npy --texts captions.txt --vocab bert"""


class Plan(NamedTuple):
    """What one run of the command is to do; another one is not resumed.

    Attributes:
        images: paths, as they will be named in the output.
        texts: the texts.
        fingerprint: of the model, the items and the settings.
        part_size: items of one kind in a part.
    """

    images: list[str]
    texts: list[str]
    fingerprint: str
    part_size: int

    def parts(self) -> Iterator[tuple[str, int]]:
        """Kind and first item of each part."""
        for kind, items in zip(KINDS, (self.images, self.texts), strict=True):
            yield from ((kind, first) for first in range(0, len(items), self.part_size))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 1 where it cannot go on, with one message; finished parts are kept."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.images and not args.texts:
        parser.error("nothing to embed: give --images, --texts or both")
    try:
        report = _run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"vlmo-fast embed: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print(f"{report['images']} images and {report['texts']} texts, {report['width']} numbers each: {report['out']}")
        if report["skipped"]:
            print(
                f"{len(report['skipped'])} images that cannot be read are left out: {', '.join(report['skipped'][:5])}"
            )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmo-fast embed",
        usage="%(prog)s MODEL OUT --images PATH --texts FILE [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder or released checkpoint")
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write: .safetensors, .npy or .parquet")
    parser.add_argument("--images", type=Path, metavar="PATH", help="a folder, searched through, or a file with paths")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="a file with one text a line")
    parser.add_argument("--vocab", metavar="FILE", help="WordPiece vocabulary where MODEL has none ('bert': BERT's)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="items at once (default: %(default)s)")
    parser.add_argument("--part-size", type=int, default=4096, metavar="N", help="items a part (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the model (default: float32)"
    )
    parser.add_argument("--threads", type=int, default=4, metavar="N", help="that decode images (default: %(default)s)")
    parser.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--restart", action="store_true", help="forget the parts of an earlier run, and replace OUT")
    parser.add_argument("--json", action="store_true", help="report as JSON; no progress bar")
    return parser


def _run(args: argparse.Namespace) -> dict[str, Any]:
    if args.out.suffix not in FORMATS:
        raise ValueError(f"OUT must end in one of {', '.join(FORMATS)}, got {args.out}")
    if args.out.suffix == ".npy" and args.images and args.texts:
        raise ValueError("OUT must be .safetensors or .parquet for images and texts together, got .npy")
    for name in ("batch_size", "part_size", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.out.exists() and not args.restart:
        raise FileExistsError(f"OUT must be new (or take --restart), got {args.out}")
    if args.out.suffix == ".parquet":
        _pyarrow()
    images = _image_paths(args.images) if args.images else []
    texts = _lines(args.texts) if args.texts else []
    plan = Plan([str(path) for path in images], texts, _fingerprint(args, images, texts), args.part_size)
    folder = args.out.with_name(f".{args.out.name}.parts")
    done = [] if args.restart else _finished_parts(folder, plan)
    todo = [part for part in plan.parts() if part not in done]
    if todo:
        model, processor = _load(args)
        if not done:
            _start_parts(folder, plan)
        embedder = _Embedder(model, processor, args.batch_size, args.threads, skip_broken=args.skip_broken)
        total = sum(len(_items(plan, part)) for part in plan.parts())
        with _progress(total, sum(len(_items(plan, part)) for part in done), quiet=args.json) as bar:
            for part in todo:
                _save_part(folder, part, *embedder(part[0], _items(plan, part), bar.update))
    embeds, kept = _collect(folder, plan)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    _write(args.out, embeds, kept)
    shutil.rmtree(folder)
    return {
        "out": str(args.out),
        "images": len(kept["image"]),
        "texts": len(kept["text"]),
        "width": next(iter(embeds.values())).shape[1],
        "resumed_parts": len(done),
        "skipped": sorted(set(plan.images) - set(kept["image"])),
    }


# The collection


def _image_paths(source: Path) -> list[Path]:
    """Files of a folder, at any depth, by name; or the paths in a list, relative to the list."""
    if source.is_dir():
        paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    else:
        paths = [source.parent / line for line in _lines(source)]
    if not paths:
        raise ValueError(f"--images must lead to images ({', '.join(IMAGE_SUFFIXES)}), got none in {source}")
    return paths


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a file with one item a line")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"{path} must hold one item a line, got none")
    return lines


def _fingerprint(args: argparse.Namespace, images: list[Path], texts: list[str]) -> str:
    files = sorted(args.model.iterdir()) if args.model.is_dir() else [args.model]
    stamps = [[(str(path), *_stamp(path)) for path in paths] for paths in (files, images)]
    content = [*stamps, texts, args.part_size, args.dtype, args.vocab]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes with a file's content; nothing where there is no file."""
    return (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else ()


def _items(plan: Plan, part: tuple[str, int]) -> list[str]:
    kind, first = part
    return (plan.images if kind == "image" else plan.texts)[first : first + plan.part_size]


# Parts


def _finished_parts(folder: Path, plan: Plan) -> list[tuple[str, int]]:
    """The parts that an earlier run of this plan has left."""
    mark = folder / "plan.json"
    if not mark.is_file():
        return []
    if json.loads(mark.read_text(encoding="utf-8")) != {"fingerprint": plan.fingerprint}:
        raise ValueError(
            f"{folder} must hold the parts of this very run, got those of another model, collection or setting; "
            "--restart forgets them"
        )
    return [part for part in plan.parts() if _part_path(folder, part).is_file()]


def _start_parts(folder: Path, plan: Plan) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({"fingerprint": plan.fingerprint}), encoding="utf-8")


def _part_path(folder: Path, part: tuple[str, int]) -> Path:
    return folder / f"{part[0]}-{part[1]:09d}.safetensors"


def _save_part(folder: Path, part: tuple[str, int], embeds: Tensor, kept: Tensor) -> None:
    from safetensors.torch import save_file

    from vlmo_fast.files import write_whole

    write_whole(_part_path(folder, part), lambda path: save_file({"embeds": embeds, "kept": kept}, path))


def _collect(folder: Path, plan: Plan) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """The embeddings of each kind, and the items that they are of."""
    import torch
    from safetensors.torch import load_file

    embeds: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    kept: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for part in plan.parts():
        tensors, items = load_file(_part_path(folder, part)), _items(plan, part)
        embeds[part[0]].append(tensors["embeds"])
        kept[part[0]] += [items[index] for index in tensors["kept"].tolist()]
    if not any(kept.values()):
        raise ValueError("--images must lead to images that can be read, got none")
    return {kind: torch.cat(parts) for kind, parts in embeds.items() if parts}, kept


def _write(out: Path, embeds: dict[str, Tensor], kept: dict[str, list[str]]) -> None:
    from vlmo_fast.files import write_whole

    if out.suffix == ".safetensors":
        from safetensors.torch import save_file

        tensors = {f"{kind}_embeds": x for kind, x in embeds.items()}
        # One entry: several would come out in an order of their own each time.
        metadata = {"items": json.dumps({f"{kind}s": kept[kind] for kind in embeds})}
        write_whole(out, lambda path: save_file(tensors, path, metadata))
    elif out.suffix == ".npy":
        import numpy as np

        ((kind, array),) = embeds.items()

        def save(path: Path) -> None:
            with path.open("xb") as file:
                np.save(file, array.numpy())

        def name(path: Path) -> None:
            path.write_text(json.dumps(kept[kind]), encoding="utf-8")

        write_whole(out.with_name(f"{out.name}.json"), name)
        write_whole(out, save)
    else:
        pa, parquet = _pyarrow()
        width = next(iter(embeds.values())).shape[1]
        columns = {
            "kind": pa.array([kind for kind in embeds for _ in kept[kind]]),
            "item": pa.array([item for kind in embeds for item in kept[kind]]),
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.concat_arrays([pa.array(x.flatten().numpy()) for x in embeds.values()]), width
            ),
        }
        write_whole(out, lambda path: parquet.write_table(pa.table(columns), path))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        from vlmo_fast.doctor import install_command

        raise ImportError(f"Parquet needs the package pyarrow. To install it: {install_command('data')}") from error
    return pa, parquet


# The model


def _load(args: argparse.Namespace) -> tuple[VLMoPreTrainedModel, VLMoProcessor]:
    import torch

    import vlmo_fast
    from vlmo_fast.hf.processing import VLMoProcessor

    if args.model.is_dir():
        from vlmo_fast.formats.official import open_saved

        model = open_saved(args.model).build()
    else:
        model = vlmo_fast.load_official(args.model)
    if model.backbone.image_projection is None:
        raise ValueError(f"MODEL must have a contrastive head, got a {type(model).__name__}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.vocab is None and (args.model / "processor_config.json").is_file():
        processor = VLMoProcessor.from_pretrained(args.model)
    elif args.texts and args.vocab is None:
        raise ValueError(f"--vocab must be given ('bert' is the released models'), got a MODEL without: {args.model}")
    elif args.texts:
        processor = VLMoProcessor.from_vocabulary(None if args.vocab == "bert" else args.vocab, model.config)
    else:
        processor = _image_processor_alone(model)
    return model.to(device, getattr(torch, args.dtype)).eval(), processor


def _image_processor_alone(model: VLMoPreTrainedModel) -> Any:
    from types import SimpleNamespace

    from vlmo_fast.hf.processing import VLMoImageProcessor

    size = {"height": model.config.image_size, "width": model.config.image_size}
    return SimpleNamespace(image_processor=VLMoImageProcessor(size=size))


class _Embedder:
    """Embeddings of the items of a part: images decoded by threads while the model works, texts sorted by length."""

    def __init__(
        self, model: VLMoPreTrainedModel, processor: Any, batch_size: int, threads: int, *, skip_broken: bool
    ) -> None:
        self.model, self.processor = model, processor
        self.batch_size, self.threads, self.skip_broken = batch_size, threads, skip_broken

    def __call__(self, kind: str, items: list[str], report: Callable[[int], None]) -> tuple[Tensor, Tensor]:
        """Embeddings (n, D) float32 of those items that can be read, and their indices (n,) int64, ascending."""
        import torch

        results: list[tuple[Tensor, list[int]]] = []
        with torch.inference_mode():
            for size, indices, inputs in (self._images if kind == "image" else self._texts)(items):
                if indices:
                    output = self.model.backbone(**inputs, cls_only=True)
                    embeds = output.image_embeds if kind == "image" else output.text_embeds
                    results.append((embeds.float().cpu(), indices))
                report(size)
        order = torch.tensor([index for _, indices in results for index in indices], dtype=torch.int64)
        embeds = torch.cat([x for x, _ in results]) if results else torch.zeros(0, self.model.config.hidden_size)
        kept, by_index = order.sort()
        return embeds[by_index].contiguous(), kept

    def _texts(self, texts: list[str]) -> Iterator[tuple[int, list[int], dict[str, Tensor]]]:
        """Size, indices and inputs of each batch."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for first in range(0, len(order), self.batch_size):
            indices = order[first : first + self.batch_size]
            inputs = self.processor(text=[texts[index] for index in indices], return_tensors="pt")
            yield len(indices), indices, {name: x.to(self.model.device) for name, x in inputs.items()}

    def _images(self, paths: list[str]) -> Iterator[tuple[int, list[int], dict[str, Tensor]]]:
        """Size, indices of the images that can be read, and inputs of each batch."""
        with ThreadPoolExecutor(self.threads) as pool:
            waiting = pool.map(self._pixels, paths[: self.batch_size])
            for first in range(0, len(paths), self.batch_size):
                after = first + self.batch_size
                ready, waiting = list(waiting), pool.map(self._pixels, paths[after : after + self.batch_size])
                yield len(ready), *self._stack(first, ready)

    def _stack(self, first: int, pixels: Sequence[Tensor | None]) -> tuple[list[int], dict[str, Tensor]]:
        import torch

        found = [(first + offset, x) for offset, x in enumerate(pixels) if x is not None]
        if not found:
            return [], {}
        stacked = torch.stack([x for _, x in found]).to(self.model.device, self.model.dtype)
        return [index for index, _ in found], {"pixel_values": stacked}

    def _pixels(self, path: str) -> torch.Tensor | None:
        from PIL import Image

        try:
            with Image.open(path) as image:
                return self._to_tensor(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
            if self.skip_broken:
                return None
            raise ValueError(
                f"{path} must be an image that can be read (or take --skip-broken), got {type(error).__name__}: {error}"
            ) from error

    def _to_tensor(self, image: Image.Image) -> torch.Tensor:
        pixels: torch.Tensor = self.processor.image_processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        return pixels[0]


def _progress(total: int, done: int, *, quiet: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit=" items", disable=True if quiet else None)  # None: only on a terminal
