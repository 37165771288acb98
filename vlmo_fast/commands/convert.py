"""`vlmo-fast convert`: any checkpoint that VLMo can start from, into a transformers folder or a released file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from vlmo_fast.commands import options

if TYPE_CHECKING:
    from vlmo_fast.formats.convert import Converted

_TASKS = ("pretrain", "retrieval", "vqa", "nlvr2", "text", "mim", "classification")

_DESCRIPTION = """\
Convert a checkpoint into a model of vlmo_fast, and say what became of every tensor.

IN is one of
  a released VLMo file       pre-training, retrieval, VQA, NLVR2 or text stage; any size; zip, legacy or safetensors
  a BEiT                     a file of the release, or a file or folder of transformers' BeitModel
  a folder of vlmo_fast      what save_pretrained, the demo or this command wrote
and its content, not its suffix, decides which. Opening it runs no code that it may hold.

OUT is a new folder (config.json, model.safetensors, and IN's tokenizer and processor: for from_pretrained), or, with a
suffix like .pt, a file that the released code loads. It appears whole or not at all, and may be IN itself."""

_EPILOG = """\
examples:
  vlmo-fast convert vlmo_base_patch16_384_coco.pt coco/ --vocab bert
  vlmo-fast convert vlmo_base_patch16_224.pt vqa-480/ --task vqa --image-size 480
  vlmo-fast convert beit_base_patch16_224_pt22k_ft22kto1k.pth text-stage.pt --task text --max-text-length 196
  vlmo-fast convert coco/ back.pt
  vlmo-fast convert unknown.pth --dry-run"""

_SETTINGS = ("task", "image_size", "max_text_length", "num_labels", "num_vl_layers", "num_attention_heads")


def configure(parser: argparse.ArgumentParser) -> None:
    """Describes the command."""
    parser.usage, parser.description, parser.epilog = "%(prog)s IN OUT [options]", _DESCRIPTION, _EPILOG
    parser.add_argument("source", metavar="IN", type=Path, help="file or folder to read")
    parser.add_argument("out", metavar="OUT", type=Path, nargs="?", help="folder, or file with a suffix, to write")
    model = parser.add_argument_group("the model to make")
    model.add_argument("--task", choices=_TASKS, help="its task (default: IN's own; for BEiT: text)")
    model.add_argument("--image-size", type=int, metavar="PIXELS", help="resize the positions to images of this side")
    model.add_argument("--max-text-length", type=int, metavar="TOKENS", help="longest text")
    model.add_argument("--num-labels", type=int, metavar="N", help="classes or answers (default: VQAv2 3129, NLVR2 2)")
    model.add_argument(
        "--num-vl-layers",
        type=int,
        metavar="F",
        help="layers with a vl expert, where IN holds none (default: presets')",
    )
    model.add_argument(
        "--num-attention-heads", type=int, metavar="H", help="for absolute positions in a width without a preset"
    )
    options.add_dtype(model, "dtype to write (default: IN's)")
    model.add_argument("--bert", type=Path, metavar="PATH", help="start the text embeddings from this BERT")
    options.add_vocab(
        model,
        "put a processor with this WordPiece vocabulary into OUT; sentence-transformers then loads a dual encoder",
    )
    model.add_argument("--seed", type=int, default=0, help="for tensors that start fresh (default: %(default)s)")
    output = parser.add_argument_group("output")
    output.add_argument("--overwrite", action="store_true", help="replace OUT where it is there")
    output.add_argument("--dry-run", action="store_true", help="read, check and report; write nothing")
    output.add_argument("--verbose", action="store_true", help="name every fresh and unused tensor")
    options.add_json(output, "report as JSON, with the names of all tensors")


def run(args: argparse.Namespace) -> None:
    """Converts, and prints what became of the tensors."""
    if args.out is None and not args.dry_run:
        raise options.UsageError("OUT is missing (only --dry-run needs none)")
    from vlmo_fast.formats.convert import convert

    done = convert(
        args.source,
        args.out,
        dtype=options.dtype_of(args),
        bert=args.bert,
        vocab=args.vocab,
        seed=args.seed,
        overwrite=args.overwrite,
        dry_run=args.dry_run,
        **{name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None},
    )
    out = None if args.dry_run else str(args.out)
    print(json.dumps({**done._asdict(), "out": out}, indent=2) if args.json else _render(done, out, args.verbose))


def _render(done: Converted, out: str | None, verbose: bool) -> str:
    size, length = done.image_size, done.max_text_length
    lines = [
        f"{done.model_class} ({done.task}) from a {done.source} checkpoint",
        f"  {done.num_parameters:,} parameters, {done.dtype}, images of {size} px, texts of {length} tokens",
        f"  taken    {done.taken} tensors",
    ]
    for what, names in (("resized", done.resized), ("fresh", done.fresh), ("unused", done.unused)):
        shown = names if verbose else names[:4]
        more = f", and {len(names) - len(shown)} more (--verbose)" if len(names) > len(shown) else ""
        lines.append(f"  {what:<8} {len(names)} tensors" + (f": {', '.join(shown)}{more}" if names else ""))
    lines.append(f"written to {out}" if out else "nothing written (--dry-run)")
    return "\n".join(lines)
