"""What the README shows in Python runs as printed, one snippet after the other."""

import re
from pathlib import Path

import official
import torch

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def run(snippet: str, names: dict[str, object]) -> None:
    exec(compile(snippet, "README.md", "exec"), names)


def released_files(folder: Path) -> None:
    """Small models under the names of the large files that the README loads."""
    from transformers import BeitConfig, BeitModel

    for name, kind in (("vlmo_base_patch16_384_coco.pt", "irtr"), ("vlmo_base_patch16_224.pt", "pretrain")):
        state = official.official_state_dict(kind, "tiny_rel", "std")
        torch.save({key: torch.from_numpy(x) for key, x in state.items()}, folder / name)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    beit = BeitModel(BeitConfig(**sizes, image_size=32, patch_size=8, use_shared_relative_position_bias=True))
    torch.save(beit.state_dict(), folder / "beit_base_patch16_224_pt22k_ft22kto1k.pth")


def test_every_snippet_runs_as_printed(capsys, tmp_path, monkeypatch):
    """The second has the model of the first; the third finds files."""
    first, packed, files = SNIPPETS
    assert len([line for line in first.splitlines() if line.strip()]) <= 6
    names: dict[str, object] = {}
    run(first, names)
    assert capsys.readouterr().out == "torch.Size([2, 768]) torch.Size([2, 768])\n"

    with torch.no_grad():
        run(packed, names)
        out, model, ids, pixels = (names[name] for name in ("out", "model", "input_ids", "pixel_values"))
        close = lambda ours, wanted: torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
        close(out.text_embeds, model(ids[:1]).text_embeds)
        close(out.image_embeds, model(pixel_values=pixels).image_embeds)
        close(out.pooler_output, model(ids[1:, :7], pixel_values=pixels[:1]).pooler_output)

    released_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    run(files, {"vlmo_fast": names["vlmo_fast"]})
    again = names["vlmo_fast"].load_official("mine.pt")
    assert type(again).__name__ == "VLMoForMaskedLM"


def test_every_file_that_the_readme_links_is_there():
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []
