"""The dual encoder in sentence-transformers: two files beside the model, no code.

sentence-transformers' own `Transformer` module calls `get_image_features` and `get_text_features` once it is told to:

    import vlmo_fast.hf  # makes transformers know VLMo
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer("folder")
    model.similarity(model.encode([image]), model.encode(["a cat on a mat"]))
"""

from __future__ import annotations

import json
import os
from pathlib import Path

__all__ = ["describe_for_sentence_transformers"]

MODULES = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}]
TRANSFORMER = {
    "transformer_task": "feature-extraction",
    "modality_config": {
        "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
        "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
    },
    "module_output_name": "sentence_embedding",
}
SIMILARITY = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine", "prompts": {}}


def describe_for_sentence_transformers(folder: str | os.PathLike[str]) -> None:
    """Write the files by which sentence-transformers (5.4 or later) takes a model's contrastive embeddings.

    Args:
        folder: where a model with contrastive embeddings and its processor were saved.

    Raises:
        FileNotFoundError: the folder holds no model, or no processor.
    """
    path = Path(folder)
    for name in ("config.json", "processor_config.json"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"describe_for_sentence_transformers: folder must hold {name}, got {path}")
    contents = {
        "modules.json": MODULES,
        "sentence_bert_config.json": TRANSFORMER,
        "config_sentence_transformers.json": SIMILARITY,
    }
    for name, content in contents.items():
        (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
