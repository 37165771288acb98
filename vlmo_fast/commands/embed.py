"""`vlmo-fast embed`: contrastive embeddings of a collection of images and texts, into one file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmo_fast.commands import options

if TYPE_CHECKING:
    from vlmo_fast.embedding import Collection, Embedded

_DESCRIPTION = """\
Embed images and texts with the dual encoder: unit-norm vectors whose dot product is the similarity of the two.

MODEL is a folder (save_pretrained, vlmo-fast convert, the demo) or a released checkpoint with a contrastive head. OUT's
suffix says the format:
  .parquet      rows of kind ('image' or 'text'), item, embedding; also where OUT has no suffix
  .safetensors  image_embeds (N, D), text_embeds (M, D), and the items in 'items', UTF-8 bytes of JSON
  .npy          one array (N, D), of images or of texts; the items in OUT.json

Embeddings are kept in a store as they are made: a run that was stopped, a collection that grew, another OUT or another
format encode only what is new. What is left out of OUT is counted, and named in OUT.left-out.jsonl."""

_EPILOG = """\
examples:
  vlmo-fast embed coco/ photos.parquet --images ~/photos
  vlmo-fast embed coco/ index.parquet --images paths.txt --texts captions.csv --text-column caption
  vlmo-fast embed vlmo_base_patch16_384_coco.pt captions.npy --texts captions.txt --vocab bert"""

_SHOWN = 5  # of what is left out, on the terminal


def configure(parser: argparse.ArgumentParser) -> None:
    """Describes the command."""
    parser.usage = "%(prog)s MODEL OUT --images PATH --texts FILE [options]"
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder or released checkpoint")
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write: .parquet, .safetensors or .npy")
    parser.add_argument("--images", type=Path, metavar="PATH", help="a folder, a file with a path a line, or a table")
    parser.add_argument("--image-column", metavar="NAME", help="of the table's paths")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="a file with a text a line, or a table")
    parser.add_argument("--text-column", metavar="NAME", help="of the table's texts (CSV, TSV, JSON Lines, Parquet)")
    options.add_vocab(parser, "WordPiece vocabulary where MODEL has none")
    parser.add_argument(
        "--batch-size", type=options.positive, default=64, metavar="N", help="items at once (default: %(default)s)"
    )
    options.add_device(parser)
    options.add_dtype(parser, "of the model (default: %(default)s)", default="float32")
    parser.add_argument(
        "--threads", type=options.positive, default=4, metavar="N", help="that read images (default: %(default)s)"
    )
    parser.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--store", type=Path, metavar="DIR", help="where embeddings are kept (default: user's cache)")
    parser.add_argument("--replace", action="store_true", help="write OUT even where it is there")
    options.add_json(parser, "report as JSON; no progress bar")


def run(args: argparse.Namespace) -> None:
    """Embeds what the store has not, and writes OUT. All that can be checked without the model comes first."""
    if args.images is None and args.texts is None:
        raise options.UsageError("nothing to embed: give --images, --texts or both")
    import torch
    from tqdm import tqdm

    from vlmo_fast import embedding
    from vlmo_fast.formats import loading
    from vlmo_fast.store import EmbeddingStore, default_folder, fingerprint

    device = loading.usable_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loading.check_path(args.model)
    if args.texts is not None and args.vocab is None and not loading.has_vocabulary(args.model):
        raise ValueError(f"--vocab must be given ('bert' is the released models'), got a MODEL without: {args.model}")
    collection = embedding.collect(
        args.images, args.texts, image_column=args.image_column, text_column=args.text_column
    )
    out = embedding.output_path(args.out, collection)
    _check_place(out, args.replace)

    model, processor = loading.load(args.model, device=device, dtype=options.dtype_of(args), vocab=args.vocab)
    if model.backbone.image_projection is None:
        raise ValueError(f"MODEL must have a contrastive head, got a {type(model).__name__}")
    path = (args.store or default_folder()) / f"{fingerprint(model.backbone)}.sqlite"
    total = len(collection.images) + len(collection.texts)
    # disable=None: shown on a terminal only
    with (
        EmbeddingStore(path, model.config.hidden_size) as store,
        tqdm(total=total, unit=" items", disable=True if args.json else None) as bar,
    ):
        try:
            done = embedding.embed(
                model,
                processor,
                collection,
                store,
                batch_size=args.batch_size,
                threads=args.threads,
                skip_broken=args.skip_broken,
                report=bar.update,
            )
            embedding.write(out, collection, done, store)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{len(store)} embeddings are kept; the same command goes on from there") from None
    left_out, cut = _losses(collection, done, model.config.max_text_length)
    beside = out.with_name(f"{out.name}.left-out.jsonl")
    beside.unlink(missing_ok=True)
    if left_out or cut:
        beside.write_text("".join(json.dumps(row) + "\n" for row in left_out + cut), encoding="utf-8")
    counts = {"images": len(collection.images) - len(done.broken), "texts": len(collection.texts)}
    if args.json:
        report = {"out": str(out), **counts, "width": done.width, "computed": done.computed, "store": str(path)}
        print(json.dumps({**report, "left_out": left_out, "cut": cut}, indent=2))
        return
    print(
        f"{counts['images']} images and {counts['texts']} texts, {done.width} numbers each, "
        f"{done.computed} encoded now: {out}"
    )
    for rows, what in ((left_out, "files are left out"), (cut, "texts are longer than the model takes, and cut")):
        if rows:
            print(f"{len(rows)} {what} (all of them: {beside}):", file=sys.stderr)
        for row in rows[:_SHOWN]:
            line = f"  {row['item']}: {row['reason']}"
            print(line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)


def _check_place(out: Path, replace: bool) -> None:
    if out.exists() and not replace:
        raise FileExistsError(f"OUT must be new (or take --replace), got {out}")
    if out.is_dir():
        raise IsADirectoryError(f"OUT must be a file, got the folder {out}")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise PermissionError(f"OUT must lie in a folder that can be written to, got {folder}")


def _losses(collection: Collection, done: Embedded, limit: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What is not in the output, and what is not there in full: item and reason."""
    left_out = [{"item": item, "reason": reason} for item, reason in (*collection.left_out, *done.broken)]
    cut = [{"item": collection.texts[row][:200], "row": row, "reason": f"cut to {limit} tokens"} for row in done.cut]
    return left_out, cut
