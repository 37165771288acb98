"""`vlmo-fast doctor` and the compiled extensions: built or not, and the command (the rest: test_house.py)."""

import json
from pathlib import Path

import pytest

from vlmo_fast import cli, extensions


def test_extensions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each by itself; one that was built for another torch is as good as none."""
    monkeypatch.setattr(extensions, "FOLDER", tmp_path)
    extensions.library.cache_clear()
    extensions.library("cuda").touch()
    (tmp_path / extensions.library("cpu").name.replace("-torch", "-torch1")).touch()
    try:
        assert cli.main(["doctor", "--json"]) == 0
        cpu, cuda = json.loads(capsys.readouterr().out)["extensions"]
        assert cli.main(["doctor"]) == 0
    finally:
        extensions.library.cache_clear()
    assert (cuda["path"], cuda["install"]) == (str(tmp_path / Path(cuda["path"]).name), None)
    assert (cpu["path"], cpu["version"], cpu["install"]) == (None, None, extensions.build_command("cpu"))
    missing = capsys.readouterr().out.partition("\nMissing\n")[2]
    assert f"  cpu extension:\n    {extensions.build_command('cpu')}\n" in f"{missing}\n"
    assert "cuda extension" not in missing
