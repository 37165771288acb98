"""`vlmo-fast convert`: any checkpoint that VLMo can start from, into a transformers folder or a released file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmo_fast.formats.official import Conversion
    from vlmo_fast.hf.modeling import VLMoPreTrainedModel
    from vlmo_fast.hf.processing import VLMoProcessor

_TASKS = ("pretrain", "retrieval", "vqa", "nlvr2", "text", "mim", "classification")
_RELEASED_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".th")

_DESCRIPTION = """\
Convert a checkpoint into a model of vlmo_fast, and say what became of every tensor.

IN is one of
  a released VLMo file       pre-training, retrieval, VQA, NLVR2 or text stage; any size; zip, legacy or safetensors
  a BEiT                     a file of the release, or a file or folder of transformers' BeitModel
  a folder of vlmo_fast      what save_pretrained or this command wrote
and its content, not its suffix, decides which. Opening it runs no code that it may hold.

OUT is a new folder (config.json, model.safetensors: for from_pretrained), or, with a suffix like .pt, a file that the
released code loads. It appears whole or not at all."""

_EPILOG = """\
examples:
  vlmo-fast convert vlmo_base_patch16_384_coco.pt coco/ --vocab bert
  vlmo-fast convert vlmo_base_patch16_224.pt vqa-480/ --task vqa --image-size 480
  vlmo-fast convert beit_base_patch16_224_pt22k_ft22kto1k.pth text-stage.pt --task text --max-text-length 196
  vlmo-fast convert coco/ back.pt
  vlmo-fast convert unknown.pth --dry-run"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 1 where IN cannot be converted, with one message and no OUT."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.out is None and not args.dry_run:
        parser.error("OUT is missing (only --dry-run needs none)")
    try:
        report = _run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"vlmo-fast convert: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2) if args.json else _render(report, verbose=args.verbose))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmo-fast convert",
        usage="%(prog)s IN OUT [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    model.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="dtype to write (default: IN's)")
    model.add_argument("--bert", type=Path, metavar="PATH", help="start the text embeddings from this BERT")
    model.add_argument(
        "--vocab",
        metavar="FILE",
        help="put a processor with this WordPiece vocabulary into OUT ('bert': the released models'); a dual encoder "
        "then loads in sentence-transformers too",
    )
    model.add_argument("--seed", type=int, default=0, help="for tensors that start fresh (default: %(default)s)")
    output = parser.add_argument_group("output")
    output.add_argument("--overwrite", action="store_true", help="replace OUT where it is there")
    output.add_argument("--dry-run", action="store_true", help="read, check and report; write nothing")
    output.add_argument("--verbose", action="store_true", help="name every fresh and unused tensor")
    output.add_argument("--json", action="store_true", help="report as JSON, with the names of all tensors")
    return parser


def _run(args: argparse.Namespace) -> dict[str, Any]:
    to_file = args.out is not None and args.out.suffix in _RELEASED_SUFFIXES
    if to_file and args.vocab is not None:
        raise ValueError(f"--vocab must come with a folder as OUT, got {args.out}")
    if args.out is not None and not args.dry_run and args.out.exists() and not args.overwrite:
        raise FileExistsError(f"OUT must be new (or take --overwrite), got {args.out}")

    import torch

    from vlmo_fast.files import write_whole
    from vlmo_fast.formats.bert import load_bert_embeddings
    from vlmo_fast.formats.official import save_official

    torch.manual_seed(args.seed)
    settings = {
        name: getattr(args, name)
        for name in ("max_text_length", "num_labels", "num_vl_layers")
        if getattr(args, name) is not None
    }
    if to_file and args.task == "retrieval":
        settings["has_itm_head"] = False  # the release's has none
    conversion = _open(args, settings)
    model = conversion.build()
    fresh = set(conversion.report.fresh)
    if args.bert is not None:
        fresh -= set(load_bert_embeddings(model, args.bert))
    if args.dtype is not None:
        model = model.to(getattr(torch, args.dtype))
    processor = None
    if args.vocab is not None:
        from vlmo_fast.hf.processing import VLMoProcessor

        processor = VLMoProcessor.from_vocabulary(None if args.vocab == "bert" else args.vocab, model.config)
    if args.out is not None and not args.dry_run:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        if to_file:
            save_official(model, args.out)
        else:
            write_whole(args.out, lambda folder: _save(model, processor, folder))
    return {
        "source": conversion.report.source,
        "task": conversion.report.task,
        "model_class": type(model).__name__,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_size": model.config.image_size,
        "max_text_length": model.config.max_text_length,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "taken": conversion.report.taken,
        "resized": list(conversion.report.resized),
        "fresh": [name for name in conversion.report.fresh if name in fresh],
        "unused": list(conversion.report.unused),
        "out": None if args.dry_run else str(args.out),
    }


def _save(model: VLMoPreTrainedModel, processor: VLMoProcessor | None, folder: Path) -> None:
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    if processor is not None and model.backbone.image_projection is not None:
        from vlmo_fast.hf.sentence_transformers import describe_for_sentence_transformers

        describe_for_sentence_transformers(folder)


def _open(args: argparse.Namespace, settings: dict[str, Any]) -> Conversion:
    from vlmo_fast.files import read_tensors
    from vlmo_fast.formats.beit import open_beit
    from vlmo_fast.formats.official import open_official, open_saved

    options = {"task": args.task, "image_size": args.image_size, **settings}
    kind = None
    if (args.source / "config.json").is_file():
        try:
            kind = json.loads((args.source / "config.json").read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{args.source}/config.json must be a configuration, got {error}") from error
    if kind == "vlmo":
        return open_saved(args.source, **options)
    if kind is not None and kind != "beit":
        raise ValueError(f"IN must be a VLMo or a BEiT, got a folder with a model of type {kind!r}")
    heads = {"num_attention_heads": args.num_attention_heads}
    source = args.source
    if kind is None:
        source = read_tensors(args.source, "vlmo-fast convert")
        if any(name.startswith("transformer.") for name in source):
            return open_official(source, **heads, **options)
        if not any(name.endswith(("patch_embed.proj.weight", "patch_embeddings.projection.weight")) for name in source):
            raise ValueError(
                f"IN must be a VLMo or a BEiT, got {args.source} with {len(source)} tensors such as {list(source)[:3]}"
            )
    return open_beit(source, **heads, **{**options, "task": args.task or "text"})


def _render(report: dict[str, Any], *, verbose: bool) -> str:
    source, size, length = report["source"], report["image_size"], report["max_text_length"]
    lines = [
        f"{report['model_class']} ({report['task']}) from a {source} checkpoint",
        f"  {report['num_parameters']:,} parameters, {report['dtype']}, images of {size} px, texts of {length} tokens",
        f"  taken    {report['taken']} tensors",
    ]
    for what in ("resized", "fresh", "unused"):
        names = report[what]
        shown = names if verbose else names[:4]
        more = f", and {len(names) - len(shown)} more (--verbose)" if len(names) > len(shown) else ""
        lines.append(f"  {what:<8} {len(names)} tensors" + (f": {', '.join(shown)}{more}" if names else ""))
    lines.append(f"written to {report['out']}" if report["out"] else "nothing written (--dry-run)")
    return "\n".join(lines)
