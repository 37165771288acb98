"""The README's first example runs as printed."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_first_example_runs_as_printed(capsys):
    example = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL).group(1)
    assert len([line for line in example.splitlines() if line.strip()]) <= 6
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out == "torch.Size([2, 768]) torch.Size([2, 768])\n"


def test_every_file_that_the_readme_links_is_there():
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []
